"""Bulk embedding by Ray's workers: the bytes of the one process, also where a worker dies."""

import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import corpus
from embedtune import cli
from embedtune.encoder.encode import identity
from embedtune.errors import UserError
from embedtune.search import bulk, spread


@pytest.fixture(scope="module")
def ray():
    """A Ray of two processors on this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray", reason="needs the package ray")
    options = {"_node_ip_address": "127.0.0.1", "include_dashboard": False, "object_store_memory": 100 << 20}
    try:
        ray.init(num_cpus=2, log_to_driver=False, logging_level="error", **options)
    except Exception as error:  # noqa: BLE001 - whatever keeps it from starting
        pytest.skip(f"Ray cannot be started here: {error}")
    yield ray
    ray.shutdown()


@pytest.fixture
def place(tiny_model, tmp_path, monkeypatch):
    """A folder with a model and three blocks of short texts, the last one short."""
    shutil.copytree(tiny_model("minilm"), tmp_path / "model")
    lines = corpus(2 * bulk.BLOCK + 300, document=10**6).splitlines()
    (tmp_path / "text.txt").write_text("\n".join(f"{line[:8]} {i % 7}" for i, line in enumerate(lines)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words, code=0):
    assert cli.run(["embed", "model", "text.txt", *words]) == code


def same(*outs):
    first, *others = [[Path(out + end).read_bytes() for end in ("", ".json")] for out in outs]
    return all(other == first for other in others)


def test_the_bytes_of_one_process(ray, place, capsys):
    for out, flags in (("v.parquet", ["--text"]), ("v.npy", ["--dtype", "int8", "--shard", "2/2", "--dims", "20"])):
        run("--out", f"one-{out}", *flags)
        capsys.readouterr()
        run("--out", f"ray-{out}", "--engine", "ray", *flags)
        assert "2 workers of Ray, one CPU each" in capsys.readouterr().err
        assert same(f"one-{out}", f"ray-{out}")
    assert not list(place.glob("*.running"))


@pytest.fixture
def killing(ray, monkeypatch):
    """Once the first block is there, the process of the first worker is killed, which is at another block then.

    Holds the process ids of that worker: the first one, and in a run that goes on to its end the last one.
    """
    start, stream, processes = spread.start, spread.spread, []

    def started(*args):
        workers = start(*args)
        processes.append(ray.get(workers[0].ready.remote()))
        return workers

    def struck(ray, workers, texts):
        parts = stream(ray, workers, texts)
        yield next(parts)
        os.kill(processes[0], signal.SIGKILL)
        yield from parts
        processes.append(ray.get(workers[0].ready.remote()))

    monkeypatch.setattr(spread, "start", started)
    monkeypatch.setattr(spread, "spread", struck)
    return processes


def test_a_killed_worker_loses_nothing(place, killing):
    run("--out", "one.npy")
    run("--out", "ray.npy", "--engine", "ray")
    assert len(set(killing)) == 2, "another process in place of the first"
    assert same("one.npy", "ray.npy")


def test_a_worker_that_dies_again_and_again_ends_the_run_which_can_be_resumed(place, killing, monkeypatch, capsys):
    monkeypatch.setattr(spread, "DEATHS", 0)
    run("--out", "ray.npy", "--engine", "ray", "--workers", "1", code=2)
    said = capsys.readouterr().err
    assert "a worker died more than 0 times" in said and "Traceback" not in said and len(killing) == 1
    assert not Path("ray.npy").exists() and list(Path("ray.npy.running").glob("block-*.json"))
    run("--out", "ray.npy", "--resume")  # the engine does not matter to the bytes
    run("--out", "one.npy")
    assert same("one.npy", "ray.npy")


def test_another_model_on_a_workers_machine_is_refused(ray, place):
    folder = str(place / "model")
    with pytest.raises(UserError, match="is another model on a worker's machine") as error:
        spread.start(ray, spread.Model(folder, "0" * 64), 1, print)
    assert error.value.where == folder and error.value.fix
    with pytest.raises(UserError, match="9 workers need 9 CPUs, the cluster has 2"):
        spread.start(ray, spread.Model(folder, identity(folder)), 9, print)


@pytest.mark.parametrize(
    "words, says",
    [
        (["--engine", "ray", "--workers", "0"], "at least 1"),
        (["--workers", "2"], "is for --engine ray"),
    ],
)
def test_mistakes(place, capsys, words, says):
    pytest.importorskip("ray")
    run("--out", "v.npy", *words, code=2)
    assert says in capsys.readouterr().err and not list(place.glob("v.npy*"))


def test_without_the_package(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    run("--out", "v.npy", "--engine", "ray", code=2)
    assert "pip install 'embedtune[ray]'" in capsys.readouterr().err
    assert cli.run(["embed", "openai:some", "text.txt", "--out", "v.npy", "--engine", "ray"]) == 2


class Playing:
    """A Ray whose answers arrive in any order, to look at what is on its way."""

    def __init__(self, workers):
        self.sent, self.draw = [], np.random.default_rng(0)
        self.workers = [self.Worker(self, number) for number in range(workers)]

    class Worker:
        def __init__(self, ray, number):
            self.ray, self.number, self.embed = ray, number, self

        def remote(self, block):
            self.ray.sent.append(self.number)
            return SimpleNamespace(future=lambda: self.ray.Future(self.ray, block))

    class Future:
        def __init__(self, ray, block):
            self.ray, self.block = ray, block

        def done(self):
            return self.ray.draw.random() < 0.5

        def result(self):
            return self.block


def test_order_and_memory(monkeypatch):
    monkeypatch.setattr(spread, "WINDOW", 3)
    ray, read = Playing(4), []

    def texts():
        for number in range(100):
            read.append(number)
            yield str(number)

    got = []
    for part in spread.spread(ray, ray.workers, texts()):
        got += part
        assert len(read) - len(got) <= 3 * spread.AHEAD * 4, "no more than so many blocks are held"
    assert got == [str(number) for number in range(100)]
    assert set(ray.sent) == {0, 1, 2, 3} and len(ray.sent) == 34
