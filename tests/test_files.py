import errno
import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from embedtune import files
from embedtune.data.stored import Stored
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
    "text",
    ["", "[]", "{}", '{"files": 3}', '{"files": {"a.txt": 3}}', '{"files": {"a.txt": {}}}', "\0", '{"files":' * 9999],
    ids=lambda text: text[:30],
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


@pytest.fixture
def disk(monkeypatch):
    """What reaches the disk, in order: ("fsync", name) and ("rename", from, to)."""
    seen = []
    fsync, rename = os.fsync, os.rename

    def fsynced(handle):
        seen.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def renamed(source, target):
        seen.append(("rename", os.path.basename(source), os.path.basename(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsynced)
    monkeypatch.setattr(os, "rename", renamed)
    return seen


def once(folder, name):
    """A file's bytes, then its name, then the folder that has the name."""
    return [("fsync", f"{name}.tmp"), ("rename", f"{name}.tmp", name), ("fsync", folder.name)]


def test_each_writer_flushes_the_bytes_before_the_name_and_the_name_before_it_returns(tmp_path, disk):
    files.write_text(tmp_path / "a", "a")
    with files.growing(tmp_path / "b") as file:
        file.write(b"b")
        assert disk == once(tmp_path, "a")
    files.write_tensors(tmp_path / "c", {"w": torch.zeros(1)}, {})
    assert disk == [*once(tmp_path, "a"), *once(tmp_path, "b"), *once(tmp_path, "c")]


def test_what_was_written_is_flushed_from_the_buffer_before_the_disk_is(tmp_path, monkeypatch):
    """fsync knows nothing of what Python still holds."""
    sizes, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (sizes.append(os.fstat(handle).st_size), fsync(handle)))
    files.write_bytes(tmp_path / "a", b"12345")
    with files.growing(tmp_path / "b") as file:
        file.write(b"123")
    assert sizes[0] == 5 and sizes[2] == 3


def test_a_directory_is_flushed_and_then_named(tmp_path, disk):
    files.write_directory(tmp_path / "made", lambda place: files.write_text(place / "a", "a"), {})
    inner = tmp_path / "made.tmp"
    named = [("rename", "made.tmp", "made"), ("fsync", tmp_path.name)]
    assert disk == [*once(inner, "a"), *once(inner, "manifest.json"), ("fsync", "made.tmp"), *named]


def test_a_directory_is_moved_when_all_of_it_is_on_the_disk(made, tmp_path, disk):
    files.move_directory(made, tmp_path / "there")
    flushed, after = disk[:-2], disk[-2:]
    names = ["a.txt", "b.safetensors", "c.json", "inner", "made", "manifest.json"]
    assert sorted(flushed) == [("fsync", name) for name in names]
    assert after == [("rename", "made", "there"), ("fsync", tmp_path.name)]
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    files.flush(tmp_path / "there" / "a.txt")
    assert disk[len(names) + 2 :] == [("fsync", "a.txt")]


def test_a_move_that_fails_says_so_and_loses_nothing(made, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(UserError, match="there: cannot be written: Input/output error"):
            files.move_directory(made, tmp_path / "there")
    assert files.damage(made) is None and (tmp_path / "there").is_dir()
    with pytest.raises(UserError, match="absent: cannot be written: No such file"):
        files.flush(tmp_path / "absent")


def test_a_users_error_while_filling_stays_as_it_is_and_leaves_nothing(tmp_path):
    error = UserError("of its own, (os error 28)")

    def fails(place):
        fill(place)
        raise error

    with pytest.raises(UserError) as caught, files.disk_errors(tmp_path):
        files.write_directory(tmp_path / "deep" / "made", fails, {})
    assert caught.value is error and list((tmp_path / "deep").iterdir()) == []


def test_refusals_told_by_other_packages_in_words(tmp_path):
    for number, words in ((28, "No space left"), (5, "Input/output error"), (13, "Permission denied")):
        says = f"{tmp_path.name}: cannot be written: {words}"
        with pytest.raises(UserError, match=says), files.disk_errors(tmp_path):
            raise ValueError(f"I/O error: something (os error {number})")
    with pytest.raises(UserError, match="/there/it: cannot be written"), files.disk_errors(tmp_path):
        raise OSError(errno.EROFS, "read-only", "/there/it")
    with pytest.raises(ValueError), files.disk_errors(tmp_path):
        raise ValueError("gone (os error 2)")  # nothing that a disk refuses: a bug of ours


def test_weights_that_safetensors_cannot_write(tmp_path, monkeypatch):
    """It tells what the system refused in words, and other things without a number."""
    import safetensors.torch
    from safetensors import SafetensorError

    for words, says in (("I/O error (os error 28)", "No space left.*free there"), ("header", "Input/output error")):

        def refused(*args, words=words, **named):
            raise SafetensorError(words)

        monkeypatch.setattr(safetensors.torch, "save_file", refused)
        with pytest.raises(UserError, match=f"w: cannot be written: {says}"):
            files.write_tensors(tmp_path / "w", {"w": torch.zeros(1)}, {})
    assert list(tmp_path.iterdir()) == []


def test_what_is_said_about_a_full_disk_and_about_others(tmp_path, monkeypatch):
    def failing(number):
        def fail(*args, **named):
            raise OSError(number, os.strerror(number))

        return fail

    for number, advice in ((errno.ENOSPC, "free some space"), (errno.EDQUOT, "free some space"),
                           (errno.EACCES, "choose another place, or mend this one")):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", failing(number))
            with pytest.raises(UserError) as caught:
                files.write_text(tmp_path / "a", "a")
        assert caught.value.fix == f"{advice}; a run that was going is continued with --resume"
        assert ("bytes free there" in caught.value.what) == (number != errno.EACCES)


def test_folders_are_made_with_their_parents(tmp_path):
    for _ in range(2):
        files.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="b: cannot be written: Not a directory"):
        files.make_folder(tmp_path / "file" / "b")


def test_copies_appear_whole_or_not_at_all(tmp_path, disk):
    (tmp_path / "a").write_bytes(b"bytes")
    files.copy(tmp_path / "absent", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    files.copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"bytes" and disk == once(tmp_path, "b")


def test_copies_of_folders(made, tmp_path):
    files.copy_folder(made, tmp_path / "copy")
    assert files.damage(tmp_path / "copy") is None
    with pytest.raises(UserError, match="copy: cannot be written: File exists"):
        files.copy_folder(made, tmp_path / "copy")
    (made / "dangling").symlink_to(tmp_path / "nowhere")  # its errors come in a list, without a number
    with pytest.raises(UserError, match="other: cannot be written: .*dangling"):
        files.copy_folder(made, tmp_path / "other")


HOLD = """
import sys
from pathlib import Path
from embedtune import files
with files.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_by_one_process_until_it_ends(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process is at work in it"), files.locked(tmp_path):
        raise AssertionError("held twice")
    holder.kill()
    holder.communicate()
    for _ in range(2):
        with files.locked(tmp_path):
            assert (tmp_path / files.LOCK).is_file()


def test_where_nothing_can_be_held_work_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with files.locked(tmp_path), files.locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_reading_is_bounded_and_refuses_what_is_no_file(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert files.read_text(tmp_path / "a", most=5) == "12345"
    with pytest.raises(UserError, match="a: is larger than 4 bytes"):
        files.read_text(tmp_path / "a", most=4)
    with pytest.raises(UserError, match="is no regular file"):
        files.read_text(tmp_path)
    (tmp_path / "a").write_bytes(b"abc\xffd")
    with pytest.raises(UserError, match=r"is not UTF-8 \(byte 3: 0xff\)"):
        files.read_text(tmp_path / "a")
    with pytest.raises(UserError, match="cannot be read: embedded null byte"):
        files.read_text(tmp_path / "a\0b")
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf[1]")
    assert files.read_json(tmp_path / "a") == [1]
    (tmp_path / "a").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        files.read_json(tmp_path / "a")


def test_exactly_as_much_space_as_is_needed_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    files.need_space(tmp_path, 1000, "it")
    with pytest.raises(UserError, match="it needs about 1,001 bytes, 1,000 are free") as caught:
        files.need_space(tmp_path, 1001, "it")
    assert caught.value.where == str(tmp_path)


def test_no_place_for_temporary_files_is_a_users_error(monkeypatch):
    def none():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none)
    with pytest.raises(UserError, match="TMPDIR"):
        files.scratch()
    corpus = Stored()
    corpus.add("a", "a text")
    assert corpus["a"] == "a text", "what is small never meets the disk"


def test_what_is_nothing_for_json_leaves_no_file(tmp_path):
    with pytest.raises(TypeError, match="set is nothing that JSON knows"):
        files.write_json_pieces(tmp_path / "a.json", {"a": {1}})
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json_pieces(tmp_path / "a.json", {"a": [float("nan")]})
    assert not list(tmp_path.iterdir())


def test_json_in_pieces_is_json_and_asks_parts_when_it_is_their_turn(tmp_path):
    class Half:
        def as_json(self):
            return {"é": [0.5, None]}

    files.write_json_pieces(tmp_path / "a.json", {"halves": [Half(), Half()]})
    files.write_json(tmp_path / "b.json", {"halves": [{"é": [0.5, None]}] * 2})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert "".join(files.json_pieces(Half())) == json.dumps({"é": [0.5, None]}, indent=2)


def test_a_scratch_file_has_no_name(tmp_path):
    with files.scratch(tmp_path) as file:
        file.write(b"a")
        assert not list(tmp_path.iterdir())
