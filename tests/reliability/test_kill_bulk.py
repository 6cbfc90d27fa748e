"""Bulk embedding, killed at every call that changes the disk, and resumed: the bytes of an uninterrupted run."""

import hashlib
import shutil
import signal

import pytest

from conftest import corpus
from reliability import ledger
from reliability.conftest import place

pytestmark = pytest.mark.target("E1")

FAULT = {"kind": "kill", "watch": "start", "place": "vectors"}


def embed(out, *flags):
    return ["embed", "model", "text.txt", "--out", out, "--force", *flags]


def bytes_of(folder, out):
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (out, f"{out}.json")]


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """Three blocks of rows, the last one short."""
    folder = place(tmp_path_factory.mktemp("bulk"), tiny_model("minilm"))
    (folder / "text.txt").write_text("\n".join(line[:8] for line in corpus(4300, document=10_000).splitlines()))
    return folder


@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("out, flags", [("vectors.parquet", ["--text"]), ("vectors.npy", ["--dtype", "int8"])])
def test_killed_at_any_call_and_resumed(zygote, folder, out, flags, step):
    ended = zygote.run(embed(out, *flags), folder)
    assert ended.status == 0, ended.said
    whole = bytes_of(folder, out)
    ended = zygote.run(embed(out, *flags), folder, fault={**FAULT, "kind": "count"})
    calls = next(line for line in ended.said.splitlines() if line.startswith("COUNTED ")).split("|")
    assert len(calls) > 30 and bytes_of(folder, out) == whole
    resumed = 0
    for at in range(1, len(calls) + 1, step):
        for path in folder.glob(f"{out}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        ended = zygote.run(embed(out, *flags), folder, fault={**FAULT, "at": at})
        assert ended.status == -signal.SIGKILL, (at, ended.said)
        if (folder / out).exists():
            assert bytes_of(folder, out) == whole, at  # published, whole
        start = (folder / f"{out}.running" / "start.json").exists()
        ended = zygote.run(embed(out, *flags, *(["--resume"] if start else [])), folder)
        assert ended.status == 0, (at, ended.said)
        resumed += start
        assert bytes_of(folder, out) == whole, at
        assert sorted(p.name for p in folder.glob(f"{out}*")) == [out, f"{out}.json"]
        ledger.count()
    assert resumed > 3


def test_other_texts_or_another_wish_are_refused(zygote, folder):
    out = "vectors-2.npy"
    ended = zygote.run(embed(out), folder, fault={**FAULT, "at": 20})
    assert ended.status == -signal.SIGKILL
    blocks = sorted((folder / f"{out}.running").glob("block-*.json"))
    assert blocks
    ended = zygote.run(embed(out), folder)
    assert ended.status == 2 and "--resume continues it" in ended.said
    ended = zygote.run(embed(out, "--dtype", "binary", "--resume"), folder)
    assert ended.status == 2 and "dtype = 'binary' (was 'float32')" in ended.said
    text = (folder / "text.txt").read_text()
    (folder / "text.txt").write_text("another first line\n" + text)
    ended = zygote.run(embed(out, "--resume"), folder)
    (folder / "text.txt").write_text(text)
    assert ended.status == 2 and "rows 1 to 2,048 are not those of the first start" in ended.said
    ended = zygote.run(embed(out, "--resume"), folder)
    assert ended.status == 0 and "4,300 vectors" in ended.said, ended.said
