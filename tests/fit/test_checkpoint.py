"""Checkpoints as they are written, kept and found; what is damaged is tried in tests/reliability."""

import json
import math
import re

import pytest
import torch

from embedtune import files
from embedtune.errors import UserError
from embedtune.fit import checkpoint
from embedtune.fit.checkpoint import State

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5])}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_what_comes_back(tmp_path):
    state = State(step=7, tokens=9, seconds=1.5, best=0.25, stale=2, scored=5, skipped=1, loss_sum=3.5, loss_steps=4,
                  log_tokens=8, max_tokens=64, events=["one", "two"])  # fmt: skip
    turned = {"turned": WEIGHTS["a"].T}  # not contiguous
    assert checkpoint.save(tmp_path, state, {**WEIGHTS, **turned}) == tmp_path / "step-0000007"
    found, tensors, remarks = checkpoint.newest(tmp_path)
    assert found == state and remarks == []
    assert {name: each.tolist() for name, each in tensors.items()} == {
        "a": [[0, 1, 2], [3, 4, 5]], "b": [1.5], "turned": [[0, 3], [1, 4], [2, 5]]
    }  # fmt: skip
    checkpoint.save_best(tmp_path, 7, {**WEIGHTS, **turned})
    assert checkpoint.load_best(tmp_path, 7)["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize(
    "record, counters, known",
    [
        ({"step": 8, "loss": 1.0}, {"loss_steps": 3}, True),
        ({"step": 9, "loss": 1.0}, {"loss_steps": 0}, True),
        ({"step": 9, "loss": 1.0}, {"loss_steps": 3}, False),  # written after the checkpoint, at the end of the run
        ({"step": 9, "dev_loss": 1.0}, {"scored": 9}, True),
        ({"step": 9, "dev_loss": 1.0}, {"scored": 6}, False),
        ({"step": 9, "left_out": [1]}, {"loss_steps": 3, "scored": 6}, True),
        ({"step": 10, "left_out": [1]}, {}, False),
        ({"step": 10, "dev_loss": 1.0}, {"scored": 9}, False),
    ],
)
def test_which_records_were_written_before_a_checkpoint(record, counters, known):
    assert checkpoint.knows(State(step=9, **counters), record) is known


def test_a_run_begins_with_nothing_counted():
    fresh = State()
    assert not any((fresh.step, fresh.tokens, fresh.seconds, fresh.stale, fresh.skipped, fresh.loss_sum))
    assert not any((fresh.loss_steps, fresh.log_tokens, fresh.max_tokens, fresh.events))
    assert fresh.best is None and fresh.best_step is None and fresh.scored == -1, "step 0 has not been scored"


def test_what_cannot_be_removed_does_not_keep_the_next_from_being_written(tmp_path, monkeypatch):
    def fail(*args, **named):
        raise PermissionError

    for step in (1, 2, 3):
        checkpoint.save_best(tmp_path, step, WEIGHTS)
        (tmp_path / "step-0000000.tmp").mkdir(exist_ok=True)
        (tmp_path / "step-0000000.tmp" / "file").write_text("")
        with monkeypatch.context() as patch:
            patch.setattr("os.rmdir", fail)
            checkpoint.save(tmp_path, State(step=step, best_step=step), WEIGHTS)
    assert checkpoint.newest(tmp_path)[0].step == 3 and "step-0000001" in names(tmp_path)


def test_where_there_is_none_there_is_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None and checkpoint.newest(tmp_path / "absent") is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_written(tmp_path, value):
    checkpoint.save(tmp_path, State(step=1), WEIGHTS)
    broken = {**WEIGHTS, "c": torch.tensor([0.0, value]), "d": torch.tensor([value])}
    for save in (lambda: checkpoint.save(tmp_path, State(step=2), broken),
                 lambda: checkpoint.save_best(tmp_path, 2, broken)):  # fmt: skip
        with pytest.raises(UserError, match=r"diverged: 2 of 4 tensors are not finite \(c, d\)"):
            save()
    assert names(tmp_path) == ["step-0000001"]


def test_the_last_two_are_kept_and_the_best_weights_that_they_name(tmp_path):
    for step, best in ((10, 5), (20, 15), (30, 15), (40, 35)):
        if best not in (15,) or step == 20:
            checkpoint.save_best(tmp_path, best, WEIGHTS)
        checkpoint.save(tmp_path, State(step=step, best_step=best), WEIGHTS)
        if step == 20:
            assert names(tmp_path) == ["best-0000005", "best-0000015", "step-0000010", "step-0000020"]
    assert names(tmp_path) == ["best-0000015", "best-0000035", "step-0000030", "step-0000040"]


def test_best_weights_newer_than_all_that_are_named_stay(tmp_path):
    """They were written just now: the next checkpoint will name them."""
    checkpoint.save_best(tmp_path, 5, WEIGHTS)
    checkpoint.save_best(tmp_path, 3, WEIGHTS)
    checkpoint.save_best(tmp_path, 9, WEIGHTS)
    checkpoint.save(tmp_path, State(step=8, best_step=5), WEIGHTS)
    assert names(tmp_path) == ["best-0000005", "best-0000009", "step-0000008"]


def test_without_a_score_nothing_is_taken_for_old(tmp_path):
    checkpoint.save_best(tmp_path, 1, WEIGHTS)
    checkpoint.save(tmp_path, State(step=2), WEIGHTS)
    assert names(tmp_path) == ["best-0000001", "step-0000002"]


def test_what_a_killed_save_left_is_cleared_away(tmp_path):
    for name in ("step-0000000.tmp", "best-0000001.tmp"):
        (tmp_path / name / "deep").mkdir(parents=True)
    checkpoint.save(tmp_path, State(step=2), WEIGHTS)
    assert names(tmp_path) == ["step-0000002"]


@pytest.mark.parametrize("text", ["", "[]", "{}", "null"])
def test_a_damaged_checkpoint_does_not_keep_the_next_from_being_written(tmp_path, text):
    checkpoint.save(tmp_path, State(step=1), WEIGHTS)
    (tmp_path / "step-0000001" / "state.json").write_text(text)
    checkpoint.save(tmp_path, State(step=2), WEIGHTS)
    (tmp_path / "step-0000001" / "state.json").unlink()
    checkpoint.save(tmp_path, State(step=3), WEIGHTS)
    assert names(tmp_path) == ["step-0000002", "step-0000003"] and checkpoint.newest(tmp_path)[0].step == 3


def test_a_checkpoint_whose_best_weights_are_gone_is_passed_over(tmp_path):
    checkpoint.save(tmp_path, State(step=1), WEIGHTS)
    checkpoint.save(tmp_path, State(step=2, best_step=2), WEIGHTS)
    state, _, (remark,) = checkpoint.newest(tmp_path)
    assert state.step == 1
    assert remark.startswith("checkpoint step-0000002 is damaged and was passed over: its best weights are damaged: ")
    (tmp_path / "step-0000001" / "state.safetensors").unlink()
    with pytest.raises(UserError, match="no checkpoint is intact") as caught:
        checkpoint.newest(tmp_path)
    assert len(caught.value.details) == 2 and caught.value.where == str(tmp_path)


def test_best_weights_that_are_damaged_are_an_error(tmp_path):
    checkpoint.save_best(tmp_path, 4, WEIGHTS)
    assert checkpoint.load_best(tmp_path, 4)["b"].tolist() == [1.5]
    (tmp_path / "best-0000004").rename(tmp_path / "best-0000005")  # whole, but another
    with pytest.raises(UserError, match="cannot be restored: manifest.json says {'step': 4}") as caught:
        checkpoint.load_best(tmp_path, 5)
    assert caught.value.where.endswith("best-0000005")


def test_only_folders_of_our_names_are_looked_at(tmp_path):
    checkpoint.save(tmp_path, State(step=3), WEIGHTS)
    for name in ("step-unknown", "step-", "notes", "best-of-all"):
        (tmp_path / name).mkdir()
    assert checkpoint.newest(tmp_path)[0].step == 3
    manifest = json.loads((tmp_path / "step-0000003" / files.MANIFEST).read_text())
    assert manifest["step"] == 3 and set(manifest["files"]) == {"state.json", "state.safetensors"}
    checkpoint.save(tmp_path, State(step=4, best_step=4), WEIGHTS)
    assert (tmp_path / "step-unknown").is_dir() and (tmp_path / "best-of-all").is_dir()


def test_steps_of_eight_digits_come_after_those_of_seven(tmp_path):
    far = 9_999_999
    for step in (far - 1, far, far + 1):
        checkpoint.save_best(tmp_path, step, WEIGHTS)
        checkpoint.save(tmp_path, State(step=step, best_step=step), WEIGHTS)
    assert names(tmp_path) == ["best-10000000", "best-9999999", "step-10000000", "step-9999999"]
    assert checkpoint.newest(tmp_path)[0].step == far + 1


def written(folder, name, content):
    """A file of the checkpoint of step 3 with other content, and a manifest that has its sum."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / files.MANIFEST).read_text())
    manifest["files"][name] = {"sha256": files.sha256(folder / name), "bytes": len(content)}
    (folder / files.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("change, says", [
    ({"step": 4}, "state.json is of step 4"), ({"wibble": 1}, "not of this version: .*wibble"),
    ({"step": "3"}, "something other than .*int.* as step"), ({"tokens": True}, "as tokens"),
    ({"stale": 1.0}, "as stale"),
    ({"best": "x"}, "as best"), ({"best": math.nan}, "as best"), ({"loss_sum": math.inf}, "as loss_sum"),
    ({"best_step": 1.5}, "as best_step"), ({"max_tokens": None}, "as max_tokens"), ({"events": "one"}, "as events"),
    ({"events": ["one", 2]}, "as events"), ({"best_step": -1}, "best weights are damaged"),
    ([1], "not of this version"), (7, "not of this version"), (None, "not of this version"),
])  # fmt: skip
def test_counters_that_are_none_although_their_sums_are_right(tmp_path, change, says):
    checkpoint.save(tmp_path, State(step=2), WEIGHTS)
    place = checkpoint.save(tmp_path, State(step=3), WEIGHTS)
    fine = json.loads((place / "state.json").read_bytes())
    written(place, "state.json", json.dumps({**fine, **change} if isinstance(change, dict) else change).encode())
    state, _, (remark,) = checkpoint.newest(tmp_path)
    assert state.step == 2
    assert re.search(says, remark)


def test_counters_of_an_older_version_and_whole_numbers_as_fractions(tmp_path):
    place = checkpoint.save(tmp_path, State(step=3), WEIGHTS)
    written(place, "state.json", b'{"step": 3, "best": 1, "seconds": 2, "events": []}')
    assert checkpoint.newest(tmp_path)[0] == State(step=3, best=1, seconds=2)


def test_weights_that_are_none_although_their_sums_are_right(tmp_path):
    place = checkpoint.save(tmp_path, State(step=3), WEIGHTS)
    written(place, "state.safetensors", b"no weights")
    with pytest.raises(UserError, match="state.safetensors cannot be read"):
        checkpoint.newest(tmp_path)
    checkpoint.save_best(tmp_path, 3, WEIGHTS)
    written(tmp_path / "best-0000003", "weights.safetensors", b"")
    with pytest.raises(UserError, match="best-0000003: weights.safetensors cannot be read"):
        checkpoint.load_best(tmp_path, 3)
