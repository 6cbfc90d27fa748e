"""Files to lines: finds data files, unpacks, refuses what is no text, splits, decodes; memory stays flat.

Nothing here knows of formats or of what becomes of a bad row; `read` does.
"""

from __future__ import annotations

import gzip
import os
import shlex
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from embedtune.errors import UserError, did_you_mean, short_list

FORMATS = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")
CHUNK_BYTES = 1 << 20
HEAD_BYTES = 1 << 13
MAX_LINE_BYTES = 16 << 20
BOMB_RATIO, BOMB_BYTES = 200, 1 << 30
SKIP = "mend the row, or leave such rows out with --bad-rows skip"
BYTE_ORDER_MARKS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
UTF8_MARK = b"\xef\xbb\xbf"
MAGIC = (
    (b"PK\x03\x04", "a zip archive (or .docx, .xlsx)"),
    (b"PK\x05\x06", "a zip archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"\x28\xb5\x2f\xfd", "zstd data"),
    (b"BZh", "bzip2 data"),
    (b"\xfd7zXZ\0", "xz data"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a", "a rar archive"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"%PDF-", "a PDF document"),
    (b"{\\rtf", "a rich text (.rtf) document"),
    (b"\xd0\xcf\x11\xe0", "an old Microsoft Office document"),
    (b"PAR1", "a parquet file"),
    (b"\x7fELF", "a program (ELF)"),
    (b"SQLite format 3", "an SQLite database"),
)
ENDINGS = {
    "gzip data": "give the file the ending .gz; or unpack it once more, if it has it",
    "zstd data": "give the file the ending .zst; or unpack it once more, if it has it",
    "a parquet file": "give the file the ending .parquet",
}
CONTROL = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b\x1c\x1d\x1e\x1f"))


class Line(NamedTuple):
    """One line without its end; `part` is 1, 2, ... for the pieces of an over-long line, else 0."""

    number: int
    byte: int  # offset in the (decompressed) file
    data: bytes
    part: int = 0


class Problem(NamedTuple):
    """What is wrong with a row; `reason` is its short name, under which it is counted."""

    reason: str
    what: str
    at: str = ""  # the byte or line, where that says more than the row's number
    fix: str = SKIP


def find_files(path: str | Path) -> tuple[list[Path], list[str]]:
    """The data files that `path` stands for, sorted: itself, or those in the folder and its subfolders.

    Second come those left out: hidden files, other endings, linked folders (which could go in circles).
    Raises UserError where there is none, or one is no regular file.
    """
    if not str(path):
        raise UserError("no file or folder is named", where="the data", fix="name one")
    path = Path(path)
    _refuse_unreadable(path)
    if not path.is_dir():
        if ending(path)[0] not in FORMATS:
            what = f"has an unknown ending; known are {', '.join(FORMATS)}, each also with .gz or .zst"
            raise UserError(what, where=str(path), fix="give plain text, one text a line, the ending .txt")
        return [path], []
    found: list[Path] = []
    ignored: list[str] = []
    for folder, folders, names in os.walk(path):
        folders.sort()
        ignored += [os.path.join(folder, name) for name in folders if (Path(folder) / name).is_symlink()]
        for file in sorted(Path(folder) / name for name in names):
            if ending(file)[0] in FORMATS and not file.name.startswith("."):
                _refuse_unreadable(file)
                found.append(file)
            else:
                ignored.append(str(file))
    if not found:
        others = f", only {short_list([Path(name).name for name in ignored])}" if ignored else ""
        what = f"is a folder without a {', '.join(FORMATS)} file{others}"
        raise UserError(what, where=str(path), fix="name another file or folder")
    return found, ignored


def ending(path: Path) -> tuple[str, str]:
    """('.jsonl', '.gz'): the format and the packing, in lower case."""
    name, packing = path.name.lower(), ""
    if name.endswith((".gz", ".zst")):
        name, packing = os.path.splitext(name)
    return os.path.splitext(name)[1], packing


def _refuse_unreadable(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # the name goes into reports and recipes, which are UTF-8
        raise UserError("has a name that is not UTF-8", where=ascii(str(path)), fix="rename the file") from error
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        what = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        if os.path.islink(path):
            what = f"is a link to {os.readlink(path)}, which {what}"
        elif os.path.isdir(path.parent):  # unlike Path.is_dir, it has an answer for a name that is too long
            what += did_you_mean(path.name, os.listdir(path.parent))
        fix = "name a file or folder that exists and that you may read"
        raise UserError(what, where=str(path), fix=fix) from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        fix = "write what it gives to a file first"
        raise UserError("is a pipe or a device, not a regular file", where=str(path), fix=fix)


def unpacked(path: Path, add: Callable[[bytes], None]) -> Iterator[bytes]:
    """The decompressed content in blocks of at most CHUNK_BYTES, each also given to `add`.

    Raises UserError for damage, for bombs, and where the file changes while it is read.
    """
    packing, where = ending(path)[1], str(path)
    try:
        with open(path, "rb") as raw:
            before, size, stream = os.fstat(raw.fileno()), 0, _stream(raw, packing)
            while chunk := stream.read(CHUNK_BYTES):
                size += len(chunk)
                if size > BOMB_BYTES and size > BOMB_RATIO * raw.tell():
                    what = f"unpacks to over {BOMB_RATIO} times its size ({size:,} bytes so far): refused"
                    raise UserError(what, where=where, fix="unpack it yourself if you trust it")
                add(chunk)
                yield chunk
            after = os.fstat(raw.fileno())
    except (OSError, EOFError, zlib.error) as error:
        if packing and getattr(error, "errno", None) is None:
            fix = f"copy it again; {_tool(packing)} -t {shlex.quote(where)} tests it"
            what = f"is damaged, cut off, or not {packing[1:]} at all ({str(error).splitlines()[0]})"
            raise UserError(what, where=where, fix=fix) from error
        what = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise UserError(what, where=where, fix="check that it is there and that you may read it") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError("changed while it was read", where=where, fix="run again when it is complete")


def _stream(raw: IO[bytes], packing: str) -> Any:
    if packing == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if packing == ".zst":
        import pyarrow as pa  # not zstandard: its stream reader takes a file that was cut off for a whole one

        return pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")
    return raw


def unpacked_text(path: Path, add: Callable[[bytes], None]) -> Iterator[bytes]:
    """`unpacked`, after a look at the head: other encodings, and things that are no text, are a UserError."""
    chunks = unpacked(path, add)
    held: list[bytes] = []
    while sum(len(chunk) for chunk in held) < HEAD_BYTES and (chunk := next(chunks, b"")):
        held.append(chunk)
    head, where = b"".join(held)[:HEAD_BYTES], str(path)
    for mark, name in BYTE_ORDER_MARKS:
        if head.startswith(mark):
            what = f"is {name}, not UTF-8 (it starts with 0x{mark.hex()})"
            raise UserError(what, where=where, fix=_convert(path, name))
    if kind := _binary_kind(head):
        fix = ENDINGS.get(kind) or "give the text in it, UTF-8, one text a line"
        if kind.startswith("UTF-16"):
            fix = _convert(path, "UTF-16LE") + " (or UTF-16BE)"
        raise UserError(f"is not text: looks like {kind}", where=where, fix=fix)
    return chain(held, chunks)


def _binary_kind(head: bytes) -> str:
    """What the first bytes of a file show it to be, '' for text."""
    for magic, name in MAGIC:
        if head.startswith(magic):
            return name
    if head[257:262] == b"ustar":
        return "a tar archive"
    control = len(head) - len(head.translate(None, CONTROL))
    if control < 32 or control * 20 < len(head):
        return ""
    nuls = sorted((head[::2].count(0), head[1::2].count(0)))
    if nuls[1] * 4 > len(head) and nuls[0] * 4 < nuls[1]:
        return "UTF-16 without a byte order mark"
    return f"binary data ({control:,} of its first {len(head):,} bytes are control characters)"


def lines(chunks: Iterable[bytes]) -> Iterator[Line]:
    """Lines that end in LF, CRLF or CR, and in nothing else; the same for every division into chunks.

    A line over MAX_LINE_BYTES comes in pieces (part = 1, 2, ...): no more than that and a chunk is ever held.
    """
    held, byte, number, part, after_cr = b"", 0, 1, 0, False
    for chunk in chunks:
        if after_cr and chunk.startswith(b"\n"):
            chunk, byte = chunk[1:], byte + 1
        after_cr = chunk.endswith(b"\r")
        whole = (held + chunk).splitlines(keepends=True)
        held = whole.pop() if whole and not chunk.endswith((b"\n", b"\r")) else b""
        for line in whole:
            body = line.rstrip(b"\r\n")
            if part or len(body) > MAX_LINE_BYTES:
                pieces, rest = _cut(Line(number, byte, body, part))
                yield from pieces
                yield Line(number, byte + len(body) - len(rest), rest, part + len(pieces) + 1)
            else:
                yield Line(number, byte, body)
            number, byte, part = number + 1, byte + len(line), 0
        pieces, rest = _cut(Line(number, byte, held, part))
        yield from pieces
        held, byte, part = rest, byte + len(held) - len(rest), part + len(pieces)
    if held:
        yield Line(number, byte, held, part and part + 1)


def _cut(line: Line) -> tuple[list[Line], bytes]:
    """The pieces of an over-long line, cut between characters, and the rest, which is short enough."""
    pieces, (number, byte, data, part) = [], line
    while len(data) > MAX_LINE_BYTES:
        at = MAX_LINE_BYTES
        while at > MAX_LINE_BYTES - 3 and data[at] & 0xC0 == 0x80:
            at -= 1
        part += 1
        pieces.append(Line(number, byte, data[:at], part))
        byte, data = byte + at, data[at:]
    return pieces, data


def decode(line: Line, path: Path) -> tuple[str, Problem | None]:
    """The line's text; where it is over-long or no UTF-8, the problem, and the text with U+FFFD in it."""
    mark = len(UTF8_MARK) if line.byte == 0 and line.data.startswith(UTF8_MARK) else 0
    data = line.data[mark:]
    if line.part:
        what = f"is longer than {MAX_LINE_BYTES / 2**20:g} MiB: is it one text a line?"
        fix = "put each text on its own line; or --bad-rows replace (cuts long lines) or skip (drops them)"
        return data.decode(errors="replace"), Problem("too long", what, f"byte {line.byte:,}", fix)
    try:
        return data.decode(), None
    except UnicodeDecodeError as error:
        bad, guess = data[error.start : error.end].hex(), _guess_encoding(data)
        fix = "--bad-rows replace (puts U+FFFD for each) or --bad-rows skip (leaves such rows out)"
        if guess:
            fix = f"{_convert(path, guess)}; or {fix}"
            bad += f"; looks like {guess}"
        at = f"byte {line.byte + mark + error.start:,}"
        return data.decode(errors="replace"), Problem("not UTF-8", f"is not UTF-8 (0x{bad})", at, fix)


def _convert(path: Path, encoding: str) -> str:
    """The shell line that writes a UTF-8 copy of the file."""
    name, (form, packing) = shlex.quote(str(path)), ending(path)
    if packing:
        return f"{_tool(packing)} -dc {name} | iconv -f {encoding} -t UTF-8 > FIXED{form}"
    return f"iconv -f {encoding} -t UTF-8 {name} > FIXED{form}"


def _tool(packing: str) -> str:
    return "gzip" if packing == ".gz" else "zstd"


def _guess_encoding(data: bytes) -> str:
    """'latin-1' or 'cp1252' where the line is mostly ASCII and has no multibyte character, else ''."""
    high = [byte for byte in data if byte > 127]
    if len(high) * 4 > len(data) or not data.decode(errors="ignore").isascii():
        return ""
    return "cp1252" if min(high) < 0xA0 else "latin-1"
