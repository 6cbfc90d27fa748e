"""Every call that changes the disk, one after the other: killed there, failed there; then resumed, and no harm done."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from embedtune.fit import checkpoint
from reliability import ledger
from reliability.conftest import SOURCE, assert_clean, place, result

RUN = shlex.split(
    "fit mlm text.txt --model model --epochs 3 --max-steps 12 --batch 16 --checkpoint-steps 3 --eval-steps 3 "
    "--log-steps 1 --dev-rows 16 --max-tokens 256 --seed 3 --lr 3e-3 --warmup 0 --schedule constant --precision fp32"
)
SAVE, FINISH = "save:9", "finish"
LATE = "after:12"  # the last step has its checkpoint, and is logged and scored only then
LATE_RUN = " ".join(RUN).replace("--eval-steps 3 --log-steps 1", "--eval-steps 5 --log-steps 7").split()


class Stage:
    """A run that was killed just before the save of step 9 (or later, as `watch` says), and copies of it."""

    def __init__(self, zygote, folder, watch):
        self.zygote, self.folder, self.watch = zygote, folder, watch
        run = LATE_RUN if watch == LATE else RUN
        ended = zygote.run([*run, "--out", "whole"], folder)
        assert ended.status == 0, ended.said
        self.whole = result(folder / "whole")
        ended = zygote.run([*run, "--out", "base"], folder, fault={"kind": "kill", "at": 1, "watch": watch})
        assert ended.status == -signal.SIGKILL, ended.said
        ended = self.resume("counted", {"kind": "count", "watch": watch})
        line = next(line for line in ended.said.splitlines() if line.startswith("COUNTED "))
        self.calls = line.removeprefix("COUNTED ").split("|")
        assert ended.status == 0 and result(folder / "counted") == self.whole

    def copy(self, name):
        home = self.folder / f"{name}.running"
        shutil.copytree(self.folder / "base.running", home)
        return home

    def resume(self, name, fault=None, strike=None):
        if not (self.folder / f"{name}.running").exists():
            self.copy(name)
        return self.zygote.run(["fit", "mlm", "--resume", name], self.folder, fault=fault, strike=strike)

    def each(self, kind, places):
        """Go on from the killed run once for every place, each in a folder of its own, with a fault there.

        Yields (place, folder, exit status, what was said).
        """
        to = self.folder.parent / f"{self.folder.name}-{kind}-{self.watch.replace(':', '-')}-{len(places)}-{places[0]}"
        to.mkdir()
        clean = to / "start"
        clean.mkdir()
        for name in ("text.txt", "model", "base.running"):
            source = self.folder / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, clean / name)
        fault = {"kind": kind, "each": places, "to": str(to), "watch": self.watch}
        ended = self.zygote.run(["fit", "mlm", "--resume", "base"], clean, fault=fault)
        assert ended.status == 0, ended.said
        statuses = json.loads((to / "statuses.json").read_text())
        for place_ in places:
            folder = to / str(place_)
            yield place_, folder, statuses[str(place_)], (folder / "said-fault.log").read_text()
            shutil.rmtree(folder)

    def assert_ends_well(self, name, folder=None):
        folder = folder or self.folder
        if not (folder / name).exists():
            ended = self.zygote.run(["fit", "mlm", "--resume", name], folder)
            assert ended.status == 0, ended.said
        assert result(folder / name) == self.whole
        assert_clean(folder / name)
        shutil.rmtree(folder / name)


@pytest.fixture(scope="module")
def stage(zygote, tiny_model, tmp_path_factory):
    made = {}

    def make(watch):
        if watch not in made:
            folder = place(tmp_path_factory.mktemp("crash"), tiny_model("bert"), 120)
            made[watch] = Stage(zygote, folder, watch)
        return made[watch]

    return make


@pytest.mark.target("A7")
def test_the_order_of_durability(stage):
    """Written, flushed to the disk, renamed, the directory flushed; the old goes only when the new is whole."""
    for watch in (SAVE, FINISH):
        calls = stage(watch).calls
        for at, call in enumerate(calls):
            kind, name = call.split(" ", 1)
            if kind != "rename" or not name.endswith(".tmp"):
                continue
            before = [n for n in range(at) if calls[n] in (f"write {name}", f"fsync {name}")]
            assert calls[before[-1]] == f"fsync {name}", call
            assert calls[at + 1].startswith("fsync ") and not calls[at + 1].endswith(name), call
            ledger.count()
    calls = stage(SAVE).calls
    weights = calls.index("rename state.safetensors.tmp")  # written by the library, flushed and renamed by us
    assert calls[weights - 1] == "fsync state.safetensors.tmp" and any(c.startswith("unlink") for c in calls)
    whole = calls.index("rename step-0000009.tmp")
    assert calls.index("fsync log.jsonl") < calls.index("mkdir step-0000009.tmp"), "the log before its checkpoint"
    assert calls[whole + 1] == "fsync checkpoints"
    assert all(n > whole + 1 for n, call in enumerate(calls) if call.split()[0] in ("unlink", "rmdir"))
    assert calls.index("rename manifest.json.tmp", calls.index("rename state.json.tmp")) < whole


@pytest.mark.target("A3")
@pytest.mark.parametrize("watch", [SAVE, LATE])
def test_killed_at_every_call_of_one_save(stage, watch):
    """And of what comes after the last one: a line of the log, a scoring with its line, and a save with both."""
    at_save = stage(watch)
    assert len(at_save.calls) >= 30
    for number, folder, status, said in at_save.each("kill", list(range(1, len(at_save.calls) + 1))):
        assert status == -signal.SIGKILL, (number, said)
        at_save.assert_ends_well("base", folder)
        ledger.count()


@pytest.mark.target("A3")
@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_killed_at_every_call_of_the_end(stage, part):
    """From the last step to the finished folder; a fourth of the calls in every run, all in the long one."""
    at_end = stage(FINISH)
    assert len(at_end.calls) >= 60
    places = list(range(len(at_end.calls) - part, 0, -4))
    for number, folder, status, said in at_end.each("kill", places):
        assert status == -signal.SIGKILL, (number, said)
        assert not (folder / "base").exists() or number > at_end.calls.index("rename counted.running") + 1
        at_end.assert_ends_well("base", folder)
        ledger.count()


@pytest.mark.target("A4")
@pytest.mark.parametrize(
    "kind, part, of",
    [("enospc-on", 0, 3), ("enospc", 1, 6), ("eio", 2, 6)]
    + [pytest.param(kind, 0, 1, marks=pytest.mark.slow) for kind in ("enospc-on", "enospc", "eio")],
)
def test_a_disk_that_fails_at_any_call_of_one_save(stage, kind, part, of):
    """Exit 2 with one message; the previous checkpoint is as it was, nothing half-written is left, resume works."""
    at_save = stage(SAVE)
    fallible = ("create", "write", "fsync", "rename", "mkdir")
    places = [n for n, call in enumerate(at_save.calls, 1) if call.split()[0] in fallible][part::of]
    for number, folder, status, said in at_save.each(kind, places):
        assert status == 2, (number, at_save.calls[number - 1], said)
        assert "Traceback" not in said and "cannot be written" in said
        assert ("bytes free" in said) == kind.startswith("enospc")
        home = folder / "base.running"
        assert not [p for p in home.rglob("*.tmp")], at_save.calls[number - 1]
        found = checkpoint.newest(home / "checkpoints")
        assert found is not None and found[0].step in (6, 9) and found[2] == []
        if number in places[1::4]:
            at_save.assert_ends_well("base", folder)
        ledger.count()


@pytest.mark.target("A4")
def test_a_disk_that_fails_at_the_end(stage):
    at_end = stage(FINISH)
    fallible = ("create", "write", "mkdir")
    places = [n for n, call in enumerate(at_end.calls, 1) if call.split()[0] in fallible]
    for number, folder, status, said in at_end.each("enospc-on", places):
        assert status == 2, (number, at_end.calls[number - 1], said)
        assert "Traceback" not in said and "No space left on device" in said
        assert (folder / "base.running").exists() and not (folder / "base").exists()
        if number in places[1::4]:
            at_end.assert_ends_well("base", folder)
        ledger.count()


@pytest.mark.target("A4")
def test_a_full_disk_at_the_start_leaves_nothing(stage):
    made = stage(SAVE)
    for number in (1, 2, 9, 20):
        fault = {"kind": "enospc-on", "at": number, "watch": "start"}
        ended = made.zygote.run([*RUN, "--out", "full"], made.folder, fault=fault)
        assert ended.status == 2 and "Traceback" not in ended.said, ended.said
        assert not (made.folder / "full").exists() and not (made.folder / "full.running").exists()
        ledger.count()


def damage_flip(home, newest):
    file = newest / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[random.Random(1).randrange(len(data))] ^= 4
    file.write_bytes(data)


def damage_truncate(home, newest):
    file = newest / "state.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def damage_manifest(home, newest):
    (newest / "manifest.json").unlink()


def damage_state(home, newest):
    (newest / "state.json").unlink()


def damage_text(home, newest):
    (newest / "state.json").write_bytes(b"{")


def damage_best(home, newest):
    """The best weights that only the newest checkpoint names."""
    best = home / "checkpoints" / "best-0000006"
    (best / "weights.safetensors").unlink()


DAMAGES = [damage_flip, damage_truncate, damage_manifest, damage_state, damage_text, damage_best]


@pytest.mark.target("A6")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over(stage, damage):
    made = stage(SAVE)
    name = damage.__name__
    home = made.copy(name)
    newest = sorted((home / "checkpoints").glob("step-*"))[-1]
    damage(home, newest)
    # Stopped once more, at a step of its own, while the damaged directory still lies there.
    ended = made.resume(name, {"kind": "signal-at", "at": 1, "watch": "save:4"})
    assert "damaged" in ended.said and f"{newest.name} is damaged and was passed over" in ended.said, ended.said
    assert "resumed at step 3 of 12" in ended.said
    assert ended.status == 143, ended.said
    assert (home / "checkpoints" / "step-0000004").exists()
    made.assert_ends_well(name)


@pytest.mark.target("A6")
def test_no_intact_checkpoint_is_an_error_never_a_fresh_start(stage):
    made = stage(SAVE)
    home = made.copy("broken")
    for path in (home / "checkpoints").glob("step-*"):
        (path / "state.safetensors").write_bytes(b"")
    ended = made.resume("broken")
    assert ended.status == 2 and "no checkpoint is intact" in ended.said and "Traceback" not in ended.said
    assert "step-0000006" in ended.said and "step-0000003" in ended.said and "--discard" in ended.said
    assert (home / "checkpoints").exists()


@pytest.mark.target("A6")
def test_two_checkpoints_whose_files_were_swapped(stage):
    made = stage(SAVE)
    home = made.copy("swapped")
    old, new = sorted((home / "checkpoints").glob("step-*"))
    shutil.copy(old / "state.safetensors", new / "state.safetensors")
    ended = made.resume("swapped")
    assert ended.status == 0 and "does not match its sha256" in ended.said
    assert result(made.folder / "swapped") == made.whole


@pytest.mark.target("A3")
def test_finished_but_not_renamed_is_just_published(stage):
    made = stage(FINISH)
    last = made.calls.index("rename counted.running") + 1
    made.resume("published", {"kind": "kill", "at": last, "watch": FINISH})
    assert not (made.folder / "published").exists()
    ended = made.resume("published")
    assert ended.status == 0 and "only its last rename was missing" in ended.said
    assert "reading and tokenising" not in ended.said and "resumed" not in ended.said
    made.assert_ends_well("published")


def strace_allowed() -> bool:
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-e", "trace=none", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.target("A3")
@pytest.mark.skipif(not strace_allowed(), reason="strace is absent, or ptrace is not permitted here")
@pytest.mark.parametrize(
    "call, when",
    [("fsync", 30), ("rename", 12)]
    + [pytest.param(c, k, marks=pytest.mark.slow) for c in ("fsync", "rename", "unlinkat") for k in range(2, 40, 5)],
)
def test_killed_by_the_kernels_own_count(stage, call, when):
    """The same from outside, at the k-th system call: nothing of ours decides where."""
    made = stage(SAVE)
    name = f"strace-{call}-{when}"
    made.copy(name)
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    inject = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={call}"]
    command = [*inject, "-e", f"inject={call}:signal=KILL:when={when}", sys.executable, "-m", "embedtune.cli"]
    done = subprocess.run([*command, "fit", "mlm", "--resume", name], cwd=made.folder, env=env, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode in (0, -signal.SIGKILL, 128 + signal.SIGKILL), done.stderr
    if (call, when) in (("fsync", 30), ("rename", 12)):  # these do strike
        assert done.returncode != 0 and not (made.folder / name).exists()
    made.assert_ends_well(name)


@pytest.mark.target("A9")
def test_changed_things_are_refused_with_a_list(stage):
    made = stage(SAVE)
    text, model = made.folder / "text.txt", made.folder / "model"

    def refused(*flags, says):
        ended = made.zygote.run([*RUN, "--out", "base", "--resume", *flags], made.folder)
        assert ended.status == 2 and "cannot be resumed" in ended.said and "Traceback" not in ended.said, ended.said
        for words in says:
            assert words in ended.said, ended.said
        ledger.count()

    before = {p: p.read_bytes() for p in (made.folder / "base.running").rglob("*") if p.is_file()}
    refused("--lr", "2e-3", says=["1 thing(s)", "recipe: lr = 0.002 (was 0.003)"])
    refused(
        "--batch", "8", "--whole-words", says=["2 thing(s)", "batch = 8 (was 16)", "whole_words = true (was false)"]
    )
    original = text.read_bytes()
    text.write_bytes(original + b"one more line\n")
    refused(says=["training data:"])
    text.write_bytes(original)
    weights = model / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    refused(says=["model weights:"])
    weights.write_bytes(kept)
    tokenizer = model / "tokenizer.json"
    kept = tokenizer.read_text()
    tokenizer.write_text(re.sub(r'"lowercase": ?true', '"lowercase":false', kept))
    assert tokenizer.read_text() != kept
    refused(says=["tokenizer:"])
    tokenizer.write_text(kept)
    same = ("checkpoints", "start.json", "log.jsonl")
    for path, data in before.items():
        if any(part in path.parts for part in same):
            assert path.read_bytes() == data, f"a refused resume changed {path}"


@pytest.mark.target("A9")
def test_places_that_exist_or_do_not(stage):
    made = stage(SAVE)
    cases = [
        (["--out", "nowhere", "--resume"], "there is nothing to resume: no run was started there"),
        (["--out", "whole", "--resume"], "there is nothing to resume: whole is finished"),
        (["--out", "whole"], "exists already"),
        (["--out", "base"], "a run was started here and not finished"),
        (["--out", "base", "--resume", "--discard"], "exclude each other"),
    ]
    for flags, words in cases:
        ended = made.zygote.run([*RUN, *flags], made.folder)
        assert ended.status == 2 and words in ended.said and "Traceback" not in ended.said, ended.said
        assert len(ended.said.strip().splitlines()) <= 3
        ledger.count()
    assert not (made.folder / "nowhere").exists() and not (made.folder / "nowhere.running").exists()
    assert (made.folder / "base.running" / "start.json").exists()


def test_discard_and_force(stage):
    made = stage(SAVE)
    made.copy("again")
    ended = made.zygote.run([*RUN, "--out", "again", "--discard"], made.folder)
    assert ended.status == 0 and "resumed" not in ended.said
    assert result(made.folder / "again") == made.whole
    (made.folder / "again" / "scores.json").write_text("{}")
    (made.folder / "again" / "old.txt").write_text("of the old one")
    ended = made.zygote.run([*RUN, "--out", "again", "--force"], made.folder)
    assert ended.status == 0
    assert result(made.folder / "again") == made.whole and not (made.folder / "again" / "old.txt").exists()
    assert_clean(made.folder / "again")


def test_resume_without_naming_the_data(stage):
    made = stage(SAVE)
    flags_of = {"short": ["--resume", "short"], "slash": ["--resume", "slash/"], "equals": ["--resume", "--out=equals"]}
    for name, flags in flags_of.items():
        made.copy(name)
        ended = made.zygote.run(["fit", "mlm", *flags], made.folder)
        assert ended.status == 0, ended.said
        assert result(made.folder / name) == made.whole
