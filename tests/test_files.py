import errno
import json
import os
import random

import numpy as np
import pytest
import torch

from embedtune import files
from embedtune.errors import UserError


def fill(place):
    files.write_text(place / "a.txt", "some text\n" * 20)
    files.write_tensors(place / "b.safetensors", {"w": torch.arange(50.0)}, {})
    (place / "inner").mkdir()
    files.write_json(place / "inner" / "c.json", {"x": 1})


@pytest.fixture
def made(tmp_path):
    path = tmp_path / "made"
    files.write_directory(path, fill, {"step": 3})
    return path


def test_a_directory_is_whole_and_its_manifest_says_what_is_in_it(made):
    assert files.damage(made) is None
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["step"] == 3 and set(manifest["files"]) == {"a.txt", "b.safetensors", "inner/c.json"}
    assert manifest["files"]["a.txt"]["bytes"] == 200
    assert [p.name for p in made.parent.iterdir()] == ["made"]


def test_a_directory_that_is_whole_but_another_is_found(made):
    assert files.damage(made, {"step": 3}) is None
    for about in ({"step": 4}, {}, {"step": 3, "kind": "x"}):
        assert "says {'step': 3}, not" in files.damage(made, about)


def test_a_directory_disappears_at_once(made, monkeypatch):
    rest = made.with_name("made.tmp")
    rest.mkdir()
    (rest / "of an earlier time").write_text("")
    inner, calls = files.shutil.rmtree, []

    def cut_short(path, **more):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        inner(path, **more)

    monkeypatch.setattr(files.shutil, "rmtree", cut_short)
    with pytest.raises(KeyboardInterrupt):
        files.remove_directory(made)
    assert not made.exists() and (rest / "a.txt").exists() and not (rest / "of an earlier time").exists()
    monkeypatch.undo()
    made.mkdir()
    files.remove_directory(made)
    assert not made.exists() and not rest.exists()


def test_every_single_bit_flip_and_truncation_is_found(made):
    draw = random.Random(0)
    paths = [made / "a.txt", made / "b.safetensors", made / "inner" / "c.json", made / "manifest.json"]
    for _ in range(300):
        path = draw.choice(paths)
        data = path.read_bytes()
        changed = bytearray(data)
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        harmless = path.name == "manifest.json" and _same_manifest(data, bytes(changed))
        assert (files.damage(made) is None) == harmless, (path.name, changed)
        path.write_bytes(data)
    for _ in range(60):
        path = draw.choice(paths)
        data = path.read_bytes()
        path.write_bytes(data[: draw.randrange(len(data) - 1)])
        assert files.damage(made) is not None
        path.write_bytes(data)
    assert files.damage(made) is None


def _same_manifest(before: bytes, after: bytes) -> bool:
    """A flip in what the manifest says beside the files, or in white space, damages no file."""
    try:
        return json.loads(before)["files"] == json.loads(after)["files"]
    except (ValueError, KeyError, TypeError):
        return False


@pytest.mark.parametrize("name", ["a.txt", "b.safetensors", "inner/c.json", "manifest.json"])
def test_a_missing_file_is_found(made, name):
    (made / name).unlink()
    assert name in files.damage(made)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"files": 3}', '{"files": {"a.txt": 3}}', '{"files": {"a.txt": {}}}', "\0"]
)
def test_a_manifest_that_is_none_is_damage_not_an_error(made, text):
    (made / "manifest.json").write_text(text)
    assert (files.damage(made) is None) == (text == '{"files": {}}')


def test_what_a_killed_attempt_left_is_cleared_away(tmp_path):
    path = tmp_path / "made"
    leftover = tmp_path / "made.tmp" / "half"
    leftover.mkdir(parents=True)
    files.write_directory(path, fill, {})
    assert not leftover.exists() and files.damage(path) is None
    files.write_directory(path, lambda place: files.write_text(place / "new.txt", "new"), {})
    assert not (path / "a.txt").exists() and files.damage(path) is None


def test_an_error_while_filling_leaves_nothing(tmp_path):
    def fails(place):
        fill(place)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="No space left"):
        files.write_directory(tmp_path / "made", fails, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strike", ["open", "fsync", "rename"])
def test_an_atomic_write_leaves_old_or_new_and_no_temporary(tmp_path, monkeypatch, strike):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open" if strike == "open" else f"os.{strike}", fail)
        with pytest.raises(UserError, match=r"a\.txt: cannot be written: No space left .*bytes free there"):
            files.write_text(path, "new")
        with pytest.raises(UserError, match="No space left"), files.growing(tmp_path / "b.bin") as file:
            file.write(b"x")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("strike", ["fsync", "rename"])
def test_weights_are_written_whole_or_not_at_all(tmp_path, monkeypatch, strike):
    path = tmp_path / "w.safetensors"
    files.write_tensors(path, {"w": torch.zeros(3)}, {})
    old = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(f"os.{strike}", fail)
        with pytest.raises(UserError, match="No space left"):
            files.write_tensors(path, {"w": torch.ones(3)}, {})
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    with pytest.raises(UserError, match="cannot be written"):
        files.write_tensors(tmp_path / "absent" / "w.safetensors", {"w": torch.ones(3)}, {})


def test_a_growing_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "a.bin"
    with pytest.raises(ZeroDivisionError), files.growing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with files.growing(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"


def test_writers_and_readers_agree(tmp_path):
    files.write_json(tmp_path / "a.json", {"ä": [1, None, 2.5]})
    assert files.read_json(tmp_path / "a.json") == {"ä": [1, None, 2.5]}
    files.write_array(tmp_path / "a.npy", np.arange(3))
    assert np.load(tmp_path / "a.npy", allow_pickle=False).tolist() == [0, 1, 2]
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "nan.json", {"x": float("nan")})
    with pytest.raises(ValueError):
        files.write_array(tmp_path / "b.npy", np.array([object()]))
    assert not (tmp_path / "nan.json").exists() and not (tmp_path / "b.npy").exists()
    for text, says in (("", "cannot be read as JSON"), ("{", "cannot be read as JSON"), ("\xff", "is not UTF-8")):
        (tmp_path / "bad.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=says):
            files.read_json(tmp_path / "bad.json")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        files.read_json(tmp_path / "absent.json")


def test_moving_a_directory_replaces_the_old_one_whole(tmp_path):
    source, target = tmp_path / "s", tmp_path / "t"
    for place, name in ((source, "new"), (target, "old"), (tmp_path / "t.old", "older")):
        place.mkdir()
        (place / name).write_text(name)
    files.move_directory(source, target)
    assert [p.name for p in tmp_path.iterdir()] == ["t"] and [p.name for p in target.iterdir()] == ["new"]


def test_a_log_line_that_cannot_be_written_is_a_users_error(tmp_path):
    files.append_line(tmp_path / "log", "one")
    files.append_line(tmp_path / "log", "two")
    assert (tmp_path / "log").read_text() == "one\ntwo\n"
    with pytest.raises(UserError, match="No space left"):
        files.append_line(type(tmp_path)("/dev/full"), "line")


def test_disk_errors_turns_refusals_into_users_errors_and_nothing_else(tmp_path):
    with pytest.raises(UserError, match="No space left"), files.disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")
    for other in (BrokenPipeError(errno.EPIPE, "pipe"), FileNotFoundError(errno.ENOENT, "gone"), ValueError("v")):
        with pytest.raises(type(other)), files.disk_errors(tmp_path):
            raise other


def test_too_little_space_is_said_before_any_work(tmp_path):
    files.need_space(tmp_path / "not" / "there", 1, "it")
    with pytest.raises(UserError, match=r"it needs about 1,000,000,000,000,000,000 bytes, [\d,]+ are free"):
        files.need_space(tmp_path / "not" / "there", 10**18, "it")
