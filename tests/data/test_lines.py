"""Files to lines: where each rule begins and ends."""

import gzip

import pytest

from embedtune.data import lines as text_lines
from embedtune.data.lines import CONTROL, Line, decode, ending, find_files, lines, unpacked, unpacked_text
from embedtune.errors import UserError


def refusal(call, *given):
    with pytest.raises(UserError) as caught:
        list(call(*given))
    return caught.value


def head(tmp_path, content):
    """What is wrong with a file that begins so, '' where nothing is."""
    (tmp_path / "a.txt").write_bytes(content)
    try:
        assert b"".join(unpacked_text(tmp_path / "a.txt", lambda chunk: None)) == content
    except UserError as error:
        return error.what
    return ""


HEADS = {
    b"PK\x03\x04": "a zip archive (or .docx, .xlsx)", b"PK\x05\x06": "a zip archive", b"\x1f\x8b": "gzip data",
    b"\x28\xb5\x2f\xfd": "zstd data", b"BZh": "bzip2 data", b"\xfd7zXZ\0": "xz data",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a": "a rar archive", b"\x89PNG": "a PNG image", b"\xff\xd8\xff": "a JPEG image", b"GIF8": "a GIF image",
    b"%PDF-": "a PDF document", b"{\\rtf": "a rich text (.rtf) document", b"PAR1": "a parquet file",
    b"\xd0\xcf\x11\xe0": "an old Microsoft Office document", b"\x7fELF": "a program (ELF)",
    b"SQLite format 3": "an SQLite database",
}  # fmt: skip


@pytest.mark.parametrize("magic", HEADS, ids=HEADS.get)
def test_what_is_no_text_by_its_first_bytes(tmp_path, magic):
    assert head(tmp_path, magic + b" and more") == f"is not text: looks like {HEADS[magic]}"
    assert head(tmp_path, b" " + magic) == "" and head(tmp_path, magic[:-1] + b" ") == ""


def test_archives_of_tar(tmp_path):
    assert "a tar archive" in head(tmp_path, b"x" * 257 + b"ustar") and head(tmp_path, b"x" * 256 + b"ustar") == ""


@pytest.mark.parametrize("mark, name", [
    (b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"),
])  # fmt: skip
def test_marks_of_other_encodings(tmp_path, mark, name):
    assert head(tmp_path, mark + b"a\0") == f"is {name}, not UTF-8 (it starts with 0x{mark.hex()})"
    assert name in refusal(unpacked_text, tmp_path / "a.txt", lambda chunk: None).fix


def test_how_many_control_characters_make_binary_data(tmp_path):
    assert head(tmp_path, b"\x01" * 31) == "" and "looks like binary data (32 of its" in head(tmp_path, b"\x01" * 32)
    assert "binary data (32 of its first 640 bytes" in head(tmp_path, b"\x01" * 32 + b"a" * 608)
    assert head(tmp_path, b"\x01" * 32 + b"a" * 609) == "", "one in twenty at the least"
    assert head(tmp_path, b"a" * 8192 + b"\x01" * 9000) == "", "only the head is looked at"
    allowed = bytes(set(range(32)) - set(CONTROL))
    assert allowed == b"\t\n\x0b\x0c\r\x1b\x1c\x1d\x1e\x1f" and head(tmp_path, allowed * 40) == ""


def test_utf_16_without_a_mark(tmp_path):
    for encoding in ("utf-16-le", "utf-16-be"):
        assert "UTF-16 without a byte order mark" in head(tmp_path, ("some text " * 20).encode(encoding))
    assert "binary data" in head(tmp_path, bytes(200)), "as many zeros at even places as at odd ones"
    assert "binary data" in head(tmp_path, b"\0a\0abbbb" * 20), "a quarter of zeros is too few"


def test_endings():
    from pathlib import Path

    found = {"a.TXT": (".txt", ""), "a.jsonl.GZ": (".jsonl", ".gz"), "a.b.csv.zst": (".csv", ".zst"), "gz": ("", ""),
             "a.gz": ("", ".gz"), "a.zip.txt": (".txt", ""), ".txt": ("", "")}  # fmt: skip
    assert {name: ending(Path("folder.csv") / name) for name in found} == found


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_lines_and_where_they_begin(size):
    content = b"one\r\n\ntwo\r\rthree\n\r\nfour"
    chunks = [content[at : at + size] for at in range(0, len(content), size)]
    assert list(lines(chunks)) == [
        Line(1, 0, b"one"), Line(2, 5, b""), Line(3, 6, b"two"), Line(4, 10, b""), Line(5, 11, b"three"),
        Line(6, 17, b""), Line(7, 19, b"four"),
    ]  # fmt: skip


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_over_long_lines_come_in_pieces(monkeypatch, size, end):
    monkeypatch.setattr(text_lines, "MAX_LINE_BYTES", 6)

    def found(content):
        content += end
        return list(lines([content[at : at + size] for at in range(0, len(content), size)]))

    assert found(b"123456") == [Line(1, 0, b"123456")]
    assert found(b"1234567") == [Line(1, 0, b"123456", 1), Line(1, 6, b"7", 2)]
    assert found(b"a\n" + b"x" * 13) == [Line(1, 0, b"a"), Line(2, 2, b"x" * 6, 1), Line(2, 8, b"x" * 6, 2),
                                         Line(2, 14, b"x", 3)]  # fmt: skip
    assert [line.data for line in found("123é45".encode())] == ["123é4".encode(), b"5"]
    assert [line.data for line in found("12345é".encode())] == [b"12345", "é".encode()]
    assert [line.data for line in found("123😀".encode())] == [b"123", "😀".encode()]
    cut = [line.data for line in found(b"1" + b"\x80" * 9)]
    assert cut == [b"1\x80\x80", b"\x80\x80\x80", b"\x80\x80\x80\x80"], "no character has more than four bytes"


def test_what_a_line_says(tmp_path):
    path = tmp_path / "a.txt"
    assert decode(Line(1, 0, b"\xef\xbb\xbfa"), path) == ("a", None)
    assert decode(Line(2, 4, b"\xef\xbb\xbfa"), path) == ("\ufeffa", None)
    text, problem = decode(Line(1, 0, b"\xef\xbb\xbfab\xff"), path)
    assert text == "ab\ufffd" and problem.at == "byte 5" and problem.what == "is not UTF-8 (0xff)"
    assert decode(Line(3, 1000, b"ab\xe2\x82"), path)[1].at == "byte 1,002"
    text, problem = decode(Line(1, 2000, b"ab", 2), path)
    assert text == "ab" and (problem.reason, problem.at) == ("too long", "byte 2,000") and "16 MiB" in problem.what


@pytest.mark.parametrize("data, guess", [
    (b"abc\xe9", "latin-1"), (b"ab\xe9", ""), (b"abc\xa0", "latin-1"), (b"abc\x9f", "cp1252"),
    (b"abcdefg\xe9\x80", "cp1252"),
    ("漢字文 ascii ascii ascii".encode() + b"\xe9", ""),
])  # fmt: skip
def test_which_encoding_it_may_be(tmp_path, data, guess):
    """A quarter of other bytes at the most, and none that are good UTF-8."""
    problem = decode(Line(1, 0, data), tmp_path / "a b.txt.gz")[1]
    assert ("looks like" in problem.what) == bool(guess)
    if guess:
        assert problem.what.endswith(f"; looks like {guess})")
        assert problem.fix.startswith(f"gzip -dc '{tmp_path}/a b.txt.gz' | iconv -f {guess} -t UTF-8 > FIXED.txt; or ")


def test_what_unpacks_to_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(text_lines, "BOMB_BYTES", 10_000)
    monkeypatch.setattr(text_lines, "CHUNK_BYTES", 1000)
    path = tmp_path / "a.txt.gz"

    def size(content):
        path.write_bytes(gzip.compress(content))
        return sum(map(len, unpacked(path, lambda chunk: None)))

    assert size(bytes(10_000)) == 10_000, "small things may be as dense as they like"
    assert size(bytes(range(256)) * 100) == 25_600, "and large ones as large, where they are not"
    path.write_bytes(gzip.compress(bytes(20_000)))
    assert "to over 200 times its size (11,000 bytes so far)" in refusal(unpacked, path, lambda chunk: None).what


def test_every_block_is_counted_and_none_is_larger_than_it_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(text_lines, "CHUNK_BYTES", 10)
    (tmp_path / "a.txt").write_bytes(b"x" * 25)
    added = []
    assert list(unpacked(tmp_path / "a.txt", added.append)) == added == [b"x" * 10, b"x" * 10, b"x" * 5]


def test_which_files_a_folder_has(tmp_path):
    for name in ("b.txt", "a.csv.gz", "z/c.txt", "m/d.txt", ".hidden.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "linked").symlink_to(tmp_path / "z")
    found, ignored = find_files(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.csv.gz", "b.txt", "m/d.txt", "z/c.txt"]
    assert sorted(ignored) == [f"{tmp_path}/{name}" for name in (".hidden.txt", "linked", "notes.md")]
    assert find_files(tmp_path / "b.txt") == ([tmp_path / "b.txt"], [])


def test_names_that_are_none(tmp_path):
    assert refusal(find_files, "").what == "no file or folder is named"
    assert "cannot be read: embedded null byte" in refusal(find_files, tmp_path / "a\0.txt").what
    assert refusal(find_files, tmp_path / "a\udcff.txt").what == "has a name that is not UTF-8"
    assert "File name too long" in refusal(find_files, tmp_path / ("x" * 300 + ".txt")).what
    assert refusal(find_files, tmp_path / "no" / "a.txt").what == "cannot be read: No such file or directory"
