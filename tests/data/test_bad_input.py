"""Every bad input: exit by a UserError that says where, what and how to mend it; or a counted rejection."""

import gzip
import io
import json
import os
import re
import zipfile
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from embedtune.data import lines as text_lines
from embedtune.data.read import Counts, read_rows, read_texts
from embedtune.errors import UserError


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def failure(data, **options):
    with pytest.raises(UserError) as caught:
        list(read_texts(data, **options))
    assert caught.value.where and caught.value.fix, str(caught.value)
    return str(caught.value)


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "text")
    return buffer.getvalue()


def parquet_bytes():
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "b"] * 100}), buffer)
    return buffer.getvalue()


FILES = {
    "empty": ("a.txt", b"", "is empty"),
    "blank only": ("a.txt", b" \n\t\n\n", "no usable text: 0 of 3 rows"),
    "mark only": ("a.txt", b"\xef\xbb\xbf", "no usable text"),
    "latin-1": ("a.txt", "ok\ncafé noir\n".encode("latin-1"), r"line 2 \(byte 6\): is not UTF-8 \(0xe9; .*latin-1"),
    "cp1252": ("a.txt", "he said “no”\n".encode("cp1252"), "iconv -f cp1252"),
    "gbk": ("a.txt", "漢字文本\n".encode("gbk"), r"is not UTF-8 .*--bad-rows"),
    "latin-1 gz": ("a.txt.gz", gzip.compress("a café\n".encode("latin-1")), r"gzip -dc .* \| iconv -f latin-1"),
    "overlong": ("a.txt", b"abc\xc0\xafdef\n", r"byte 3\): is not UTF-8 \(0xc0"),
    "surrogate bytes": ("a.txt", b"ab\xed\xa0\x80\n", r"byte 2\): is not UTF-8"),
    "cut character": ("a.txt", b"abc\xe6\xbc", r"byte 3\): is not UTF-8 \(0xe6bc"),
    "utf-16": ("a.txt", "text\n".encode("utf-16"), "is UTF-16, not UTF-8.*iconv -f UTF-16 -t UTF-8"),
    "utf-16-be": ("a.csv", b"\xfe\xff\0a", "is UTF-16, not UTF-8"),
    "utf-32": ("a.txt", "text\n".encode("utf-32"), "is UTF-32, not UTF-8.*iconv -f UTF-32"),
    "utf-16 unmarked": ("a.txt", ("some text\n" * 50).encode("utf-16-le"), "UTF-16 without.*iconv -f UTF-16LE"),
    "nul": ("a.txt", b"ok\na\0b\n", r"a.txt, line 2: has a NUL character"),
    "zip": ("a.txt", zipped(), "is not text: looks like a zip archive"),
    "gzip": ("a.txt", gzip.compress(b"text"), r"looks like gzip data.*ending \.gz"),
    "gzip twice": ("a.txt.gz", gzip.compress(gzip.compress(b"text")), "looks like gzip data"),
    "zstd": ("a.jsonl", zstandard.compress(b"text"), "looks like zstd data"),
    "png": ("a.csv", b"\x89PNG\r\n\x1a\n" + bytes(99), "looks like a PNG image"),
    "pdf": ("a.txt", b"%PDF-1.7\n", "looks like a PDF document"),
    "parquet as text": ("a.txt", parquet_bytes(), "looks like a parquet file"),
    "elf": ("a.txt", b"\x7fELF" + bytes(99), r"looks like a program"),
    "tar": ("a.txt", b"name" + b" " * 253 + b"ustar" + b" " * 99, "looks like a tar archive"),
    "binary": ("a.txt", bytes(range(256)) * 20, "looks like binary data"),
    "no gzip": ("a.txt.gz", b"plain text", "damaged, cut off, or not gz at all"),
    "cut gzip": ("a.txt.gz", gzip.compress(os.urandom(9999))[:-5], r"(damaged|binary)"),
    "corrupt gzip": ("a.txt.gz", gzip.compress(b"text\n" * 999)[:-8] + bytes(8), "damaged"),
    "no zstd": ("a.txt.zst", b"plain text", "damaged, cut off, or not zst at all"),
    "cut zstd": ("a.txt.zst", zstandard.compress(b"text %d\n" * 999)[:-3], "damaged"),
    "zstd and more": ("a.txt.zst", zstandard.compress(b"text\n") + b"more", "damaged"),
    "ending": ("a.docx", b"text", r"unknown ending; known are \.txt"),
    "no parquet": ("a.parquet", b"text", "damaged or no parquet"),
    "cut parquet": ("a.parquet", parquet_bytes()[:-20], "damaged or no parquet"),
    "json": ("a.jsonl", '{"text": "a"}\n{"text": }\n', r"line 2: is not JSON \(Expecting value at column 10\)"),
    "json array": ("a.jsonl", '[{"text": "a"}]\n', r"jq -c '\.\[\]'"),
    "json array, pretty": ("a.jsonl", '[\n {"text": "a"}\n]\n', r"jq -c '\.\[\]'"),
    "json number": ("a.jsonl", "17\n", "is a JSON int, not an object or a string"),
    "json depth": ("a.jsonl", "[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "json depth in object": ("a.jsonl", '{"text": "a", "b": ' + "[" * 900 + "]" * 900 + "}", None),
    "json digits": ("a.jsonl", '{"text": ' + "1" * 1_000_000 + "}", "too many digits"),
    "json surrogate": ("a.jsonl", '{"text": "a\\ud800"}', r"half a surrogate pair \(\\ud800\)"),
    "json nul": ("a.jsonl", '{"text": "a\\u0000"}', "has a NUL"),
    "json number text": ("a.jsonl", '{"text": 7}', "has int where a text must stand"),
    "json typo": ("a.jsonl", '{"text": "a"}\n{"txet": "b"}', r"line 2: has no 'text' \(did you mean 'txet'\?\)"),
    "ragged": ("a.csv", "text,b\n1,2\n1,2,3\n", r"row 2 \(line 3\): has 3 cells, the header has 2"),
    "unclosed": ("a.csv", 'text,b\n1,2\n"open,2\n3,4\n', "line 3: a cell in quotes begins here and does not end"),
    "quote": ("a.csv", 'text,b\n"a"b,2\n', r"row 1 \(line 2\): has a quote out of place"),
    "header twice": ("a.csv", "a,a\n1,2\n", "header: names 'a' more than once"),
    "header alone": ("a.csv", "text\n", "no usable text: 0 of 0 rows"),
    "header blank": ("a.csv", "\ntext\n", "header: is blank"),
    "semicolons": ("a.csv", "id;text\n1;a\n", "are cells parted by semicolons"),
    "csv latin-1": ("a.csv", "id,text\n1,café\n".encode("latin-1"), r"row 1 \(line 2, byte 13\): is not UTF-8.*iconv"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_each_is_one_clear_error(tmp_path, name):
    file, content, message = FILES[name]
    path = write(tmp_path, file, content)
    if message is None:  # either way, never a traceback
        with suppress(UserError):
            list(read_texts(path))
    else:
        assert re.search(message, failure(path), re.DOTALL), failure(path)


@pytest.mark.parametrize("bad_rows", ["skip", "replace"])
@pytest.mark.parametrize("name", [n for n in FILES if FILES[n][2] is not None])
def test_no_policy_gives_another_exception(tmp_path, name, bad_rows):
    file, content, _ = FILES[name]
    counts = Counts()
    with suppress(UserError):
        list(read_texts(write(tmp_path, file, content), bad_rows=bad_rows, counts=counts))
    assert counts.rows == counts.used + sum(counts.rejected.values())


def test_places(tmp_path):
    assert "did you mean 'data.txt'" in failure(write(tmp_path, "data.txt", "a").with_name("dat.txt"))
    (tmp_path / "gone.txt").symlink_to("nowhere.txt")
    assert "is a link to nowhere.txt" in failure(tmp_path / "gone.txt")
    (tmp_path / "a.txt").symlink_to("b.txt")
    (tmp_path / "b.txt").symlink_to("a.txt")
    assert "symbolic links" in failure(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    assert "pipe or a device" in failure(tmp_path / "pipe.txt")
    assert "pipe or a device" in failure("/dev/zero")
    (tmp_path / "folder").mkdir()
    assert "is a folder without a .txt" in failure(tmp_path / "folder")
    write(tmp_path / "folder", "x.docx", "a")
    assert "only x.docx" in failure(tmp_path / "folder")


def test_unreadable_file(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, "a.txt", "a")
    monkeypatch.setattr("builtins.open", refuse)
    assert "a.txt: cannot be read: Permission denied" in failure(path)


def test_file_that_grows_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(text_lines, "CHUNK_BYTES", 1 << 13)
    path = write(tmp_path, "a.txt", "line\n" * 5000)
    rows = read_texts(path)
    next(rows)
    with open(path, "a") as file:
        file.write("more\n")
    with pytest.raises(UserError, match="changed while it was read"):
        list(rows)


def test_lists():
    assert "is empty" in failure([])
    assert "the list, item 2: is neither a string nor a dict, but int" in failure(["a", 7])
    assert "half a surrogate" in failure(["a\ud800"])
    assert "is a dict with a key that is no string" in failure([{1: "a"}])
    circle = {"text": "a"}
    circle["self"] = circle
    assert "circular" in failure([circle])
    with pytest.raises(UserError, match="path or a list"):
        list(read_texts(iter(["a"])))
    with pytest.raises(UserError, match="must be one of fail, skip, replace"):
        list(read_texts(["a"], bad_rows="skp"))


def test_replace_and_skip_are_counted(tmp_path):
    path = write(tmp_path, "a.txt", b"good\nb\xe9d\nn\0l\n")
    counts = Counts()
    rows = list(read_texts(path, bad_rows="replace", counts=counts))
    assert [r.values["text"] for r in rows] == ["good", "b\ufffdd", "n\ufffdl"]
    assert counts.replaced == {"not UTF-8": 1, "NUL": 1} and counts.used == 3
    counts = Counts()
    assert len(list(read_texts(path, bad_rows="skip", counts=counts))) == 1
    assert counts.rejected == {"not UTF-8": 1, "NUL": 1}
    assert counts.examples["NUL"] == [f"{path}, line 3"]


def test_long_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(text_lines, "MAX_LINE_BYTES", 10)
    path = write(tmp_path, "a.txt", "short\n" + "漢" * 7 + "\nend\n")
    assert "line 2 (byte 6): is longer than" in failure(path)
    counts = Counts()
    rows = list(read_texts(path, bad_rows="replace", counts=counts))
    assert [r.values["text"] for r in rows] == ["short", "漢漢漢", "漢漢漢", "漢", "end"]
    assert [r.number for r in rows] == [1, 2, 2, 2, 3] and counts.replaced == {"too long": 3}
    counts = Counts()
    assert len(list(read_texts(path, bad_rows="skip", counts=counts))) == 2
    assert counts.rejected == {"too long": 1} and counts.rows == 3
    long = "b" * 30
    for name, content in (("a.jsonl", f'"a"\n{json.dumps(long)}\n"c"'), ("a.csv", f"text\na\n{long}\nc")):
        counts = Counts()
        assert len(list(read_texts(write(tmp_path, name, content), bad_rows="replace", counts=counts))) == 2
        assert counts.rejected == {"too long": 1}
    unclosed = write(tmp_path, "b.csv", 'text\n"a\n' + "b\n" * 20)
    assert "b.csv, line 2: a cell in quotes begins here" in failure(unclosed, bad_rows="skip")


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gz", "zst"])
def test_decompression_bomb(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(text_lines, "BOMB_BYTES", 4 << 20)
    name = "a.txt.gz" if pack is gzip.compress else "a.txt.zst"
    assert "unpacks to over 200 times its size" in failure(write(tmp_path, name, pack(b"word \n" * (4 << 20))))


def test_parquet_with_bad_cells_and_flipped_bits(tmp_path):
    bad = pa.array([b"good", b"b\xe9d", b"fine"]).cast(pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, bad.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    counts = Counts()
    assert len(list(read_texts(tmp_path / "a.parquet", bad_rows="skip", counts=counts))) == 2
    assert counts.rejected == {"not UTF-8": 1}
    whole = parquet_bytes()
    for i in range(0, len(whole), 7):
        path = write(tmp_path, "b.parquet", whole[:i] + bytes([whole[i] ^ 0x10]) + whole[i + 1 :])
        with suppress(UserError):
            list(read_rows(path, bad_rows="skip"))


def test_real_hostile_files(real_data, tmp_path):
    path = write(tmp_path, "neg.txt", real_data("rotten_tomatoes/rt-polarity.neg").read_bytes())
    message = failure(path)
    assert f"{path}, line 32 (byte " in message and f"iconv -f latin-1 -t UTF-8 {path}" in message
    for file in sorted(real_data("utf8_stress").glob("*.txt")):
        for bad_rows in ("skip", "replace"):
            counts = Counts()
            try:
                list(read_texts(file, bad_rows=bad_rows, counts=counts))
            except UserError as error:
                assert "no usable text" in str(error)
            assert counts.rows and counts.rows == counts.used + sum(counts.rejected.values())


def test_no_message_quotes_the_text(tmp_path):
    """What stands in the data may be confidential, and messages end up in logs."""
    secret = "Jane-Doe-has-gout"
    lines = [f'["{secret}"]', f'{{"text": ["{secret}"]}}', f'{{"text": "{secret}"', f'{{"text": "{secret}\\ud800"}}']
    for line in lines:
        assert secret not in failure(write(tmp_path, "a.jsonl", line))
    assert secret not in failure(write(tmp_path, "a.txt", f"{secret} caf\xe9 of the town".encode("latin-1")))
    assert secret not in failure(write(tmp_path, "a.csv", f'text\n"{secret}"x\n'))
    assert secret not in failure([[secret]])
