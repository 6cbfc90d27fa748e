import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conftest import corpus

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"


@dataclass
class Ended:
    """How a child ended: its exit code, or minus the signal that killed it, and all that it said."""

    status: int
    said: str


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
        """Run one command to its end. `strike(pid)` is called in a thread while the child runs."""
        self.calls += 1
        log = Path(cwd) / f"said-{self.calls}.log"
        request = {"argv": argv, "cwd": str(cwd), "log": str(log), "fault": fault, "plot": plot}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        pid = self._hear()["pid"]
        gone = threading.Event()
        if strike is not None:
            thread = threading.Thread(target=strike, args=(pid, gone))
            thread.start()
        status = self._hear()["status"]
        gone.set()
        if strike is not None:
            thread.join()
        return Ended(status, log.read_text() if log.exists() else "")  # none where it was killed before it began


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


def result(out: Path) -> Result:
    names = ("model.safetensors", "tokenizer.json", "config.json", "scores.json", "recipe.toml", "README.md")
    found = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for record in log:
        record.pop("seconds", None)
        record.pop("tokens_per_second", None)
    return Result(found, log)


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
                time.sleep(delay)
                if not gone.is_set():
                    os.kill(pid, number)
                return
            time.sleep(0.0005)

    return strike


@pytest.fixture(scope="session")
def reference(zygote, tiny_model, tmp_path_factory):
    """reference(kind, precision) -> (folder to run in, arguments, result of the uninterrupted run)."""
    made = {}

    def run(kind="bert", precision="fp32"):
        if (kind, precision) not in made:
            folder = place(tmp_path_factory.mktemp("reference"), tiny_model(kind))
            argv = [*RUN, "--precision", precision]
            ended = zygote.run([*argv, "--out", "whole"], folder)
            assert ended.status == 0, ended.said
            made[kind, precision] = folder, argv, result(folder / "whole")
        return made[kind, precision]

    return run
