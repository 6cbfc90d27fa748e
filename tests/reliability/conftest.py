import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conftest import corpus
from reliability import ledger

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Of the tests that were asked for, those of this part that have not passed yet."""
    path = ledger.results()
    if path is None:
        return
    number, of = ledger.part()
    done = {record["test"] for record in ledger.lines(path) if not record["failed"]}
    kept = [item for place, item in enumerate(items) if place % of == number - 1 and item.nodeid not in done]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    target = item.get_closest_marker("target")
    if call.when == "setup":
        ledger.NOW.update(cases=0, remarks=[])
    if target is not None and (report.failed or call.when == "call" and report.passed):
        ledger.note(target.args[0], item.nodeid, report.failed, call.duration)
    return report


@dataclass
class Ended:
    """How a child ended: its exit code, or minus the signal that killed it, and all that it said."""

    status: int
    said: str
    seconds: float


@dataclass
class Zygote:
    """Talks to zygote.py."""

    process: subprocess.Popen = field(default=None)
    calls: int = 0

    def start(self) -> None:
        places = [str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(HERE / "zygote.py")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        assert self._hear() == {"ready": True}

    def _hear(self) -> dict:
        return json.loads(self.process.stdout.readline())

    def run(self, argv, cwd, fault=None, plot=False, strike=None) -> Ended:
        """Run one command to its end. `strike(pid, gone)` is called in a thread while the child runs."""
        return self.run_in(1, argv, cwd, fault, plot, strike and (lambda pids, gone: strike(pids[0], gone)))[0]

    def run_in(self, count, argv, cwd, fault=None, plot=False, strike=None) -> list[Ended]:
        """Run one command in so many processes, as torchrun does, to the end of all."""
        self.calls += 1
        logs = [Path(cwd) / f"said-{self.calls}{f'-{rank}' if rank else ''}.log" for rank in range(count)]
        request = {"argv": argv, "cwd": str(cwd), "logs": list(map(str, logs)), "fault": fault, "plot": plot}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        pids, start = self._hear()["pids"], time.monotonic()
        gone = threading.Event()
        if strike is not None:
            thread = threading.Thread(target=strike, args=(pids, gone))
            thread.start()
        statuses = self._hear()["statuses"]
        gone.set()
        if strike is not None:
            thread.join()
        said = [log.read_text() if log.exists() else "" for log in logs]  # none where it was killed before it began
        return [Ended(status, words, time.monotonic() - start) for status, words in zip(statuses, said)]


@pytest.fixture(scope="session")
def zygote():
    made = Zygote()
    made.start()
    yield made
    made.process.stdin.close()
    made.process.wait(timeout=30)


RUN = shlex.split(
    "fit mlm text.txt --model model --epochs 4 --batch 16 --checkpoint-steps 3 --eval-steps 5 --log-steps 1 "
    "--dev-rows 16 --max-tokens 256 --seed 3 --lr 1e-3"
)


def place(folder: Path, model: Path, lines: int = 160) -> Path:
    """A folder with text.txt and a model of its own, to run in."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(corpus(lines))
    shutil.copytree(model, folder / "model")
    return folder


@dataclass(frozen=True)
class Result:
    """What must be the same, bit for bit, however often a run was killed."""

    files: dict
    log: list


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run: where it ran, how it was called, how it ended, and what it left."""

    folder: Path
    argv: list
    ended: Ended
    left: Result
    witnessed: tuple


def result(out: Path) -> Result:
    names = ("model.safetensors", "tokenizer.json", "config.json", "scores.json", "recipe.toml", "README.md")
    found = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names}
    scores = json.loads((out / "scores.json").read_text())
    if "machine" in scores:  # of `embedtune run`: how fast the machine was, and the name of the folder
        del scores["machine"], scores["repeat"]
        found["scores.json"] = json.dumps(scores, sort_keys=True)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for record in log:
        record.pop("seconds", None)
        record.pop("tokens_per_second", None)
    return Result(found, log)


def witnessed(folder: Path, out: str) -> tuple[dict, dict]:
    """What faults.witness saw of a run: the rows of every step, and the sha256 of weights and moments at the end.

    A step that was lost by a kill and taken again took the same rows.
    """
    rows, states = {}, {}
    for line in (folder / f"witness-{out}.jsonl").read_text().splitlines():
        record = json.loads(line)
        kept, at = (rows, (record["stage"], record["step"])) if "rows" in record else (states, record["stage"])
        assert kept.setdefault(at, record) == record, f"{at} is not what it was before the kill"
    return rows, states


def uninterrupted(zygote, folder: Path, argv: list) -> Whole:
    """Run a command whole, in folder/whole."""
    ended = zygote.run([*argv, "--out", "whole"], folder)
    assert ended.status in (0, 3), ended.said  # 3: the verdict of a tiny run may be REGRESSION
    return Whole(folder, argv, ended, result(folder / "whole"), witnessed(folder, "whole"))


def assert_clean(out: Path) -> None:
    """Nothing but the finished folder is left: no temporary file, no running folder."""
    assert not out.with_name(out.name + ".running").exists() and not out.with_name(out.name + ".old").exists()
    assert not [p for p in out.rglob("*") if p.name.endswith(".tmp") or p.name.startswith(".")]
    assert not (out / "checkpoints").exists() and not (out / "data").exists() and not (out / "start.json").exists()


def at_line(log: Path, lines: int, delay: float, number: int):
    """A strike: once the log has so many lines (and a little later), send the signal."""

    def strike(pid: int, gone: threading.Event) -> None:
        while not gone.is_set():
            if log.is_file() and log.read_bytes().count(b"\n") >= lines:
                after(delay, number)(pid, gone)
                return
            time.sleep(0.0005)

    return strike


def after(delay: float, number: int):
    """A strike: once so many seconds are over, send the signal."""

    def strike(pid: int, gone: threading.Event) -> None:
        if not gone.wait(delay):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    return strike


ENDS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}


def instant(whole: Whole, home: Path, draw, number: int):
    """A strike at a random instant: of the clock, or a little after a random line of the log."""
    if whole.argv[0] == "run" or draw.random() < 0.25:
        return after(draw.random() * whole.ended.seconds, number)
    log, lines = home / "log.jsonl", len(whole.left.log)
    now = log.read_bytes().count(b"\n") if log.exists() else 0
    return at_line(log, draw.randrange(min(now, lines - 2), lines - 1), draw.random() * 0.03, number)


def interrupted(zygote, whole: Whole, out: str, times: int, draw, number: int) -> int:
    """Start a run, strike it `times` times, each time go on with it, let it end as if nothing had been.

    Returns how many signals struck: the run may end before.
    """
    folder, struck = whole.folder, 0
    home = folder / f"{out}.running"
    while home.exists() or not (folder / out).exists():
        resumed = ["--resume"] if home.exists() else []
        strike = instant(whole, home, draw, number) if struck < times else None
        ended = zygote.run([*whole.argv, "--out", out, *resumed], folder, strike=strike)
        if ended.status != whole.ended.status:
            # What was struck before it had begun could say nothing, and act upon nothing.
            assert ended.status == ENDS[number] or not ended.said, ended.said
            assert "Traceback" not in ended.said, ended.said
            struck += 1
    found = result(folder / out)
    assert found.log == whole.left.log and found.files == whole.left.files
    assert witnessed(folder, out) == whole.witnessed
    assert_clean(folder / out)
    shutil.rmtree(folder / out)
    (folder / f"witness-{out}.jsonl").unlink()
    return struck


def strike_at_random(zygote, whole: Whole, name: str, times: int, number: int = signal.SIGKILL) -> None:
    """Strike until so many signals have struck, in as many runs as that takes; the draw follows from the name."""
    draw, struck = random.Random(name), 0
    for chain in range(20 + times):
        struck += (now := interrupted(zygote, whole, f"{name}-{chain}", times - struck, draw, number))
        ledger.count(now)
        if struck == times:
            return
        if not now:  # the uninterrupted run was timed while the machine had more to do
            whole.ended.seconds /= 2
    raise AssertionError(f"only {struck} of {times} signals struck")


@pytest.fixture(scope="session")
def reference(zygote, tiny_model, tmp_path_factory):
    """reference(kind, precision) -> the uninterrupted run."""
    made = {}

    def run(kind="bert", precision="fp32"):
        if (kind, precision) not in made:
            folder = place(tmp_path_factory.mktemp("reference"), tiny_model(kind))
            made[kind, precision] = uninterrupted(zygote, folder, [*RUN, "--precision", precision])
        return made[kind, precision]

    return run
