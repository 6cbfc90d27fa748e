"""The only module that writes artefacts: temporary name, fsync, manifest, rename.

A reader never sees a half-written file or directory: everything appears under its final name by one `rename`,
after its bytes were flushed to the disk, and the parent directory is flushed after the rename.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from embedtune.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

MANIFEST = "manifest.json"
# What a disk or a place refuses, as against a bug of ours.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)
OS_ERROR = re.compile(r"os error (\d+)")
TEMPORARY = ".tmp"
MOST_BYTES = 1 << 28  # of a file that is read whole
AGAIN = "mend it, or copy or make it again"
LOCK = ".lock"


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that at any instant the old bytes or the new ones are there.

    Raises UserError where the disk is full or the place cannot be written; no temporary file stays behind.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
        _fsync(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> UserError:
    what, fix = f"cannot be written: {error.strerror}", "choose another place, or mend this one"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "free some space"
        with suppress(OSError):
            what += f" ({shutil.disk_usage(path.parent).free:,} bytes free there)"
    return UserError(what, where=str(path), fix=f"{fix}; a run that was going is continued with --resume")


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Inside the block, what the disk refuses is a UserError, whoever did the writing (other packages too)."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Packages written in Rust report what the system refused in words: "... (os error 28)".
        if not isinstance(error, OSError) and not OS_ERROR.search(str(error)):
            raise
        refused = _as_os_error(error)
        if refused.errno not in REFUSALS:
            raise
        raise _cannot_write(Path(refused.filename) if isinstance(refused.filename, str) else place, refused) from error


def scratch_folder() -> Path:
    """Where scratch files go: what TMPDIR names, else the system's place. Raises UserError where there is none."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        what = "there is no folder for temporary files that can be written to"
        raise UserError(what, fix="set TMPDIR to one") from error


def scratch(folder: Path | None = None) -> IO[bytes]:
    """An open file without a name, to write and to read; it is gone with the last that holds it, even after a kill.

    Who writes into it does so within `disk_errors`. Raises UserError where there can be none.
    """
    place = folder or scratch_folder()
    with disk_errors(place):
        return tempfile.TemporaryFile(dir=place)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path`, atomically."""
    write_bytes(path, text.encode("utf-8"))


@contextmanager
def growing(path: Path) -> Iterator[BinaryIO]:
    """A binary file written piece by piece that appears as `path` only when the block ends without an error."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
        _fsync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON (non-finite numbers are refused), atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def json_pieces(value: Any, **how: Any) -> Iterator[str]:
    """The JSON text of `value`, piece by piece; `how` is for json.JSONEncoder.

    What is no plain value has a method `as_json` that gives its parts, and is asked when it is its turn: so what
    stands in arrays is never all there as lists.
    """

    def parts(value: Any) -> Any:
        if not hasattr(value, "as_json"):
            raise TypeError(f"{type(value).__name__} is nothing that JSON knows")
        return value.as_json()

    return json.JSONEncoder(indent=2, default=parts, **how).iterencode(value)


def write_json_pieces(path: Path, value: Any) -> None:
    """Write `value` as `write_json` does, but piece by piece."""
    with growing(path) as file:
        pieces = json_pieces(value, ensure_ascii=False, allow_nan=False)
        file.writelines(piece.encode() for piece in chain(pieces, "\n"))


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a numeric array as .npy (never with objects), atomically."""
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write contiguous CPU tensors as safetensors, atomically and without a copy in memory.

    Tensors must not share memory.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + TEMPORARY)
    try:
        save_file(dict(tensors), temporary, metadata=metadata)
        _fsync(temporary)
        os.rename(temporary, path)
        _fsync(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise _cannot_write(path, _as_os_error(error)) from error


def _as_os_error(error: Exception) -> OSError:
    if isinstance(error, OSError):
        return error
    found = OS_ERROR.search(str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number))


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """Read a small UTF-8 file; a UserError where it is none, is no regular file, or has more than `most` bytes."""
    fix = "check the name, and that you may read it"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError("is no regular file", where=str(path), fix=fix)
        with open(path, "rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise UserError(f"is larger than {most:,} bytes, which no such file is", where=str(path), fix=fix)
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 (byte {error.start:,}: 0x{content[error.start]:02x})"
        raise UserError(what, where=str(path), fix="write it anew as UTF-8") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        what = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise UserError(what, where=str(path), fix=fix) from error


def read_json(path: Path) -> Any:
    """Read JSON; a missing or damaged file is a UserError."""
    try:
        return json.loads(read_text(path).removeprefix("\ufeff"))
    except RecursionError as error:
        raise UserError("cannot be read as JSON: nested too deeply", where=str(path), fix=AGAIN) from error
    except ValueError as error:
        raise UserError(f"cannot be read as JSON: {str(error)[:200]}", where=str(path), fix=AGAIN) from error


def sha256(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_directory(path: Path, fill: Callable[[Path], None], about: Mapping[str, Any]) -> None:
    """Make directory `path` appear complete or not at all.

    `fill(temporary)` writes the files with this module's functions; a manifest with every file's sha256 and size,
    and `about`, is written last; then one rename. What an earlier, killed attempt left behind is removed first, and
    so is a directory of that name: only write what can be made again.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        fill(temporary)
        names = sorted(p.relative_to(temporary).as_posix() for p in temporary.rglob("*") if p.is_file())
        contents = {n: {"sha256": sha256(temporary / n), "bytes": (temporary / n).stat().st_size} for n in names}
        write_json(temporary / MANIFEST, {"files": contents, **about})
        _fsync(temporary)
        if path.exists():
            shutil.rmtree(path)
        os.rename(temporary, path)
        _fsync(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _cannot_write(path, error) from error
    except UserError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_directory(path: Path) -> None:
    """Make a directory disappear at once; a kill leaves its rest under a name that nothing takes for it."""
    gone = path.with_name(path.name + TEMPORARY)
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def make_folder(path: Path) -> None:
    """A folder and its parents, if they are not there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error


def copy(source: Path, target: Path) -> None:
    """Copy a file, if it is there; it appears whole or not at all."""
    if source.is_file():
        with growing(target) as file, open(source, "rb") as opened:
            shutil.copyfileobj(opened, file)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder into a place that is not published yet."""
    try:
        shutil.copytree(source, target)
    except OSError as error:
        raise _cannot_write(target, error if error.errno else OSError(errno.EIO, str(error))) from error


def damage(path: Path, about: Mapping[str, Any] | None = None) -> str | None:
    """What is wrong with a directory made by `write_directory`, in words; None where it is intact.

    With `about`, its manifest must also say exactly this beside the files: so no bit of it is left unread, and no
    directory is taken for another.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files = dict(manifest.pop("files"))
        if about is not None and manifest != about:
            return f"{MANIFEST} says {manifest}, not {dict(about)}"
        for name, entry in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size:,} bytes, not {entry['bytes']:,}"
            if sha256(file) != entry["sha256"]:
                return f"{name} does not match its sha256"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    return None


def flush(folder: Path) -> None:
    """See to it that what was written into a folder (or a file) by others or line by line is on the disk."""
    try:
        for path in [*folder.rglob("*"), folder]:
            _fsync(path)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def move_directory(source: Path, target: Path) -> None:
    """Rename a finished directory to its final name; an existing `target` is replaced, and removed only after."""
    old = target.with_name(target.name + ".old")
    flush(source)
    try:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(target, old)
        os.rename(source, target)
        _fsync(target.parent)
    except OSError as error:
        raise _cannot_write(target, error) from error
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; a second one gets a UserError. A kill frees it, since the system does."""
    try:
        import fcntl
    except ImportError:  # not on Windows, where nothing keeps two runs apart
        yield
        return
    with open(folder / LOCK, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                "another process is at work in it", where=str(folder), fix="wait for it, or stop it"
            ) from error
        yield


def append_line(path: Path, line: str) -> None:
    """Add one line of text to a log; a kill may tear the last line, which readers then leave out."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise _cannot_write(path, error) from error


def need_space(place: Path, needed: int, what: str, fix: str = "choose another --out") -> None:
    """Refuse, before any work, to write `needed` bytes where fewer are free."""
    existing = next(p for p in [place, *place.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(f"{what} needs about {needed:,} bytes, {free:,} are free", where=str(place), fix=fix)
