"""A disk that is really full: a small tmpfs that another file fills while a run is under way. It has to be mounted."""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from embedtune.fit import checkpoint
from reliability import ledger
from reliability.conftest import RUN, assert_clean, place, result

SIZE = 6 * 2**20  # bytes; a run of the tiny model needs about a third of them


@pytest.fixture
def disk(tmp_path):
    """A tmpfs of SIZE bytes, mounted in the folder where runs are started."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no mount here: {error}")
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder, leave: int = 0) -> None:
    """Leave no more than so many bytes."""
    with open(folder / "filler", "wb", buffering=0) as file:
        wanted = shutil.disk_usage(folder).free - leave
        while wanted > 0:
            try:
                wanted -= file.write(b"\0" * min(wanted, 2**16))
            except OSError:
                return


def filling(disk, log, lines: int, leave: int):
    """A strike: once the log has so many lines, fill the disk."""

    def strike(pid, gone) -> None:
        while not gone.is_set():
            if log.is_file() and log.read_bytes().count(b"\n") >= lines:
                # Stopped for as long as it takes, or a quick run is over first.
                os.kill(pid, signal.SIGSTOP)
                fill(disk, leave)
                os.kill(pid, signal.SIGCONT)
                return
            time.sleep(0.0005)

    return strike


@pytest.mark.target("A4")
@pytest.mark.parametrize("times", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_a_run_on_a_disk_that_fills_up_goes_on_when_there_is_room(zygote, tiny_model, tmp_path, disk, times):
    """Exit code 2, one message with the place; no half-written file, the checkpoint before sound; the same end."""
    place(tmp_path, tiny_model("bert"))
    assert zygote.run([*RUN, "--out", "whole"], tmp_path).status == 0
    whole, draw, met = result(tmp_path / "whole"), random.Random(times), 0
    lines = len(whole.log)
    for number in range(times):
        out = f"disk/run-{number}"
        home, words = tmp_path / f"{out}.running", [*RUN, "--out", out]
        strike = filling(disk, home / "log.jsonl", 1 + number * (lines - 2) // times, draw.choice([0, 0, 4096, 2**15]))
        ended = zygote.run(words, tmp_path, strike=strike)
        (disk / "filler").unlink(missing_ok=True)
        if ended.status:
            met += 1
            assert ended.status == 2 and "Traceback" not in ended.said, ended.said
            assert "No space left on device" in ended.said and "bytes free" in ended.said
            assert not list(home.rglob("*.tmp"))
            if (found := checkpoint.newest(home / "checkpoints")) is not None:
                assert found[2] == []
            ended = zygote.run([*words, "--resume" if home.exists() else "--discard"], tmp_path)
        assert ended.status == 0, ended.said
        assert result(tmp_path / out) == whole
        assert_clean(tmp_path / out)
        shutil.rmtree(tmp_path / out)
        ledger.count()
    assert met >= times / 2, "most runs met a full disk"


@pytest.mark.target("A4")
def test_a_full_disk_is_refused_before_any_work(zygote, tiny_model, tmp_path, disk):
    place(tmp_path, tiny_model("bert"))
    fill(disk, leave=300_000)
    ended = zygote.run([*RUN, "--out", "disk/run"], tmp_path)
    assert ended.status == 2 and "Traceback" not in ended.said, ended.said
    assert os.listdir(disk) == ["filler"]
    ledger.count()
