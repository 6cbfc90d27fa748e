"""What changed since a run was started: resuming is refused with one message that names it, and nothing is touched."""

import json
import re
import shlex
import shutil
import signal
from contextlib import contextmanager

import pytest

from reliability import ledger
from reliability.conftest import place, result
from reliability.test_kill_pairs import write_pairs

SHARED = "--batch 16 --max-steps 6 --checkpoint-steps 2 --log-steps 1 --max-tokens 512 --precision fp32"
RUNS = {
    "mlm": f"fit mlm text.txt --model model {SHARED}",
    "contrastive": f"fit contrastive pairs.jsonl --model model {SHARED} --dev dev.jsonl --guide guide --dims 32 16",
    "classify": f"fit classify more.jsonl --continue-from old {SHARED}",
    "run": f"run pairs.jsonl --model model {SHARED} --test-rows 20 --test-corpus 60",
}
KINDS = {"mlm": "bert", "contrastive": "minilm", "classify": "bert", "run": "minilm"}


def flip(data: bytes) -> bytes:
    """Weights with a bit of the first number changed."""
    at = 8 + int.from_bytes(data[:8], "little") + 2
    return data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :]


def respelled(data: bytes) -> bytes:
    """The first text of a table with another first letter."""
    return re.sub(rb'": "\w', b'": "x', data, count=1)


def other(name: str):
    """An edit of start.json: as if the run had been started where this was something else."""

    def edit(data: bytes) -> bytes:
        start = json.loads(data)
        assert name in start
        return json.dumps({**start, name: "another"}).encode()

    return edit


def cased(data: bytes) -> bytes:
    """The tokenizer, reading upper case as such."""
    return re.sub(rb'"lowercase": ?true', b'"lowercase":false', data)


START = "part.running/start.json"
ENVIRONMENT = ("torch", "transformers", "threads", "machine", "device")
# A run, what is edited and how, flags that are added, what must be said.
CASES = [
    ("mlm", None, None, "--lr 2e-3", ["1 thing(s)", "recipe: lr = 0.002 (was not set)"]),
    ("mlm", None, None, "--seed 4", ["recipe: seed = 4 (was 0)"]),
    ("mlm", None, None, "--batch 8 --whole-words", ["2 thing(s)", "batch = 8 (was 16)", "whole_words = true"]),
    ("mlm", None, None, "--precision bf16", ['precision = "bf16" (was "fp32")']),
    ("mlm", "text.txt", lambda data: data + b"one more line\n", "", ["training data: "]),
    ("mlm", "text.txt", lambda data: b"x" + data[1:], "", ["training data: "]),
    ("mlm", "model/model.safetensors", flip, "", ["model weights: "]),
    ("mlm", "model/tokenizer.json", cased, "", ["tokenizer: "]),
    *(("mlm", START, other(name), "", [f"{name}: ", "(was another)"]) for name in ENVIRONMENT),
    ("contrastive", "dev.jsonl", respelled, "", ["dev data: "]),
    ("contrastive", "guide/model.safetensors", flip, "", ["guide"]),
    ("contrastive", None, None, "--dims 32", ["dims = [32] (was [32, 16])"]),
    ("classify", "old/model.safetensors", flip, "", ["model weights: "]),
    ("classify", "more.jsonl", respelled, "", ["training data: "]),
    ("classify", "labels.jsonl", respelled, "", ["its training data has changed"]),
    ("classify", None, None, "--replay 0.1", ["replay = 0.1 (was 0.5)"]),
    ("run", None, None, "--negatives 2", ["its recipe changed"]),
    ("run", "pairs.jsonl", respelled, "", ["its data changed"]),
]


@pytest.fixture(scope="module")
def killed(zygote, tiny_model, tmp_path_factory):
    """killed(task) -> the folder of a run that was killed at its second checkpoint, and its arguments."""
    made = {}

    def run(task):
        if task not in made:
            folder = place(tmp_path_factory.mktemp(task), tiny_model(KINDS[task]))
            write_pairs(folder)
            rows = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
            if task == "contrastive":
                (folder / "pairs.jsonl").write_text("".join(rows[:80]))
                (folder / "dev.jsonl").write_text("".join(rows[80:]))
                shutil.copytree(folder / "model", folder / "guide")
            if task == "classify":
                before = shlex.split(f"fit classify labels.jsonl --model model {SHARED} --out old")
                assert zygote.run(before, folder).status == 0
            argv = [*shlex.split(RUNS[task]), "--out", "part"]
            ended = zygote.run(argv, folder, fault={"kind": "kill", "at": 3, "watch": "save:4"})
            assert ended.status == -signal.SIGKILL, ended.said
            made[task] = folder, argv
        return made[task]

    return run


@contextmanager
def edited(path, edit):
    """A file as `edit` makes it, and as it was afterwards."""
    before = path.read_bytes()
    path.write_bytes(edit(before))
    assert path.read_bytes() != before
    yield
    path.write_bytes(before)


@contextmanager
def nothing():
    yield


@pytest.mark.target("A9")
def test_what_changed_is_refused_by_name(zygote, killed):
    for task, name, edit, flags, says in CASES:
        folder, argv = killed(task)
        kept = {p: p.read_bytes() for p in folder.glob("part.running/**/checkpoints/*/*")}
        assert kept
        with edited(folder / name, edit) if name else nothing():
            ended = zygote.run([*argv, *shlex.split(flags), "--resume"], folder)
        assert ended.status == 2 and "Traceback" not in ended.said, (name, flags, ended.said)
        assert all(words in ended.said for words in says), (name, flags, ended.said)
        assert all(path.read_bytes() == data for path, data in kept.items()), "a refused resume changed a checkpoint"
        ledger.count()
    for task in RUNS:  # and put back as it was, it goes on
        folder, argv = killed(task)
        ended = zygote.run([*argv, "--resume"], folder)
        assert ended.status in (0, 3) and "resumed at step 2" in ended.said, ended.said
        assert (folder / "part").is_dir()
        ledger.count()


@pytest.mark.target("A9")
def test_a_run_of_another_task_is_not_resumed(zygote, tiny_model, tmp_path):
    folder = place(tmp_path / "task", tiny_model("minilm"))
    write_pairs(folder)
    argv = shlex.split(f"fit scored scored.jsonl --model model {SHARED} --out part")
    ended = zygote.run(argv, folder, fault={"kind": "kill", "at": 3, "watch": "save:4"})
    assert ended.status == -signal.SIGKILL
    ended = zygote.run(["fit", "contrastive", "--resume", "part"], folder)
    assert ended.status == 2 and "its task is 'scored', not 'contrastive'" in ended.said
    ended = zygote.run(["fit", "scored", "--resume", "part"], folder)
    assert ended.status == 0 and result(folder / "part").log[-1]["step"] == 6
