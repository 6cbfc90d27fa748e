import csv
import gzip
import hashlib
import io
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from embedtune.data import lines as text_lines
from embedtune.data.columns import parse_columns
from embedtune.data.read import Counts, read_rows, read_texts, stored_bytes
from embedtune.errors import UserError

PIECES = st.sampled_from(
    [b"a", b"word ", b"\n", b"\r", b"\r\n", "é".encode(), "漢".encode(), "😀".encode(), b"\xff", b"\xe6\xbc"]
    + [b"\0", b" ", b"\xef\xbb\xbf", "\u2028".encode(), "\x85".encode(), b"\x0b", b"\x0c", b"\x1c", b'"', b","]
)
BYTES = st.lists(PIECES, max_size=60).map(b"".join)


def write(folder, name, content):
    path = Path(folder) / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(data, **options):
    return [row.values["text"] for row in read_texts(data, **options)]


def outcome(path, bad_rows, reader=read_texts):
    """All that a read gives, errors included."""
    counts, rows, error = Counts(), [], ""
    try:
        rows.extend(reader(path, bad_rows=bad_rows, counts=counts))
    except UserError as e:
        error = str(e)
    return rows, counts, error


@settings(max_examples=200, deadline=None)
@given(
    content=BYTES,
    bad_rows=st.sampled_from(["fail", "skip", "replace"]),
    ending=st.sampled_from([".txt", ".jsonl", ".csv"]),
    limit=st.sampled_from([8, 1 << 24]),
)
def test_chunk_size_changes_nothing(content, bad_rows, ending, limit):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_lines, "MAX_LINE_BYTES", limit)
        path = write(folder, "data" + ending, content)
        results = []
        for chunk in (1, 3, 1 << 20):
            patch.setattr(text_lines, "CHUNK_BYTES", chunk)
            rows, counts, error = outcome(path, bad_rows, read_rows)
            results.append((rows, counts, error, "" if error else counts.sha256))
        if bad_rows == "fail" and results[0][2]:  # how much was read ahead of the error differs
            results = [(rows, error) for rows, _, error, _ in results]
        assert results[0] == results[1] == results[2]


@settings(max_examples=200, deadline=None)
@given(content=BYTES, bad_rows=st.sampled_from(["skip", "replace"]))
def test_row_accounting_is_exact(content, bad_rows):
    with tempfile.TemporaryDirectory() as folder:
        rows, counts, error = outcome(write(folder, "data.txt", content), bad_rows)
    assert counts.rows == counts.used + sum(counts.rejected.values())
    assert counts.used == len(rows)
    assert counts.bytes == len(content) and counts.sha256 == hashlib.sha256(content).hexdigest()
    whole = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    assert counts.rows == whole.count(b"\n") + (not whole.endswith(b"\n") and whole != b"")
    assert bool(error) == (not rows)
    if bad_rows == "replace":
        assert set(counts.rejected) <= {"blank"}


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(CELLS.filter(lambda s: s.strip()), CELLS), min_size=1, max_size=10))
def test_what_is_written_is_read(pairs):
    """Line ends within a CSV cell become LF; everything else comes back as it was."""
    rows = [{"text": a, "other": b} for a, b in pairs]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, ["text", "other"])
    writer.writeheader()
    writer.writerows(rows)
    with tempfile.TemporaryDirectory() as folder:
        jsonl = write(folder, "a.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        pq.write_table(pa.Table.from_pylist(rows), f"{folder}/a.parquet")
        assert [row.values for row in read_texts(jsonl)] == rows
        assert [row.values for row in read_texts(f"{folder}/a.parquet")] == rows
        assert [row.values for row in read_texts(rows)] == rows
        same = [{k: v.replace("\r\n", "\n").replace("\r", "\n") for k, v in row.items()} for row in rows]
        if "\r" not in json.dumps(rows).replace("\\r", "\r"):
            assert [row.values for row in read_texts(write(folder, "a.csv", table.getvalue()))] == same


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_only_where_they_should(tmp_path, end):
    lines = ["one\u2028two", "three\x85four", "five\x0bsix\x0cseven\x1ceight", "last"]
    assert texts(write(tmp_path, "a.txt", end.join(lines))) == lines
    assert texts(write(tmp_path, "b.txt", end.join(lines) + end)) == lines


def test_documents_end_at_blank_lines_and_files(tmp_path):
    write(tmp_path, "a.txt", "\n\na\nb\n \n\nc\n\n")
    write(tmp_path, "b.txt", "d\n")
    write(tmp_path, "c.jsonl", '{"text": "e"}\n"f"\n')
    counts = Counts()
    rows = list(read_texts(tmp_path, counts=counts))
    assert [(r.values["text"], r.number, r.document) for r in rows] == [
        ("a", 3, 0), ("b", 4, 0), ("c", 7, 1), ("d", 1, 2), ("e", 1, 3), ("f", 2, 4)
    ]  # fmt: skip
    assert counts.rejected == {"blank": 5} and len(counts.files) == 3
    assert [r.document for r in read_texts(["x", "y"])] == [0, 1]


def test_bad_row_at_a_document_start_does_not_join_documents(tmp_path):
    path = write(tmp_path, "a.txt", b"a\n\n\xff\nb\n")
    assert [row.document for row in read_texts(path, bad_rows="skip")] == [0, 1]


def test_byte_order_mark_is_taken_off(tmp_path):
    assert texts(write(tmp_path, "a.txt", b"\xef\xbb\xbfa\nb")) == ["a", "b"]
    assert texts(write(tmp_path, "a.csv", b"\xef\xbb\xbftext\na\n")) == ["a"]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=[".gz", ".zst"])
@pytest.mark.parametrize("form", [".txt", ".JSONL", ".csv", ".tsv", ".parquet"])
def test_every_format_packed(tmp_path, form, pack):
    plain = {".txt": b"a b\nc\n", ".JSONL": b'{"text": "a b"}\n"c"\n', ".csv": b"id,text\n1,a b\n2,c\n"}
    plain[".tsv"] = plain[".csv"].replace(b",", b"\t")
    if form == ".parquet":
        pq.write_table(pa.table({"text": ["a b", "c"]}), tmp_path / "p.parquet")
        plain[form] = (tmp_path / "p.parquet").read_bytes()
    ending = ".GZ" if pack is gzip.compress else ".zst"
    counts = Counts()
    twice = pack(plain[form][:3]) + pack(plain[form][3:])  # two members, or frames
    assert texts(write(tmp_path, f"data{form}{ending}", twice), counts=counts) == ["a b", "c"]
    assert counts.sha256 == hashlib.sha256(plain[form]).hexdigest()


def test_how_much_text_is_stored(tmp_path):
    """Packed files hold about three times as much as they take; what is no file is not asked for its size."""
    (tmp_path / "a.txt").write_bytes(b"x" * 100)
    (tmp_path / "b.jsonl.gz").write_bytes(b"x" * 10)
    (tmp_path / "c.parquet").write_bytes(b"x" * 20)
    assert stored_bytes(tmp_path) == 100 + 3 * 30 and stored_bytes(str(tmp_path / "a.txt")) == 100
    assert stored_bytes(["one text", "another"]) == 0 == stored_bytes("hub:some/texts")


def test_quoted_cells_hold_line_ends(tmp_path):
    rows = list(read_texts(write(tmp_path, "a.csv", 'text,n\r\n"one\r\n""two""",1\r\n\r\nthree,2')))
    assert [(r.values["text"], r.number) for r in rows] == [('one\n"two"', 1), ("three", 3)]


def test_columns(tmp_path):
    path = write(tmp_path, "a.csv", "id,body,text\n1,a,b\n")
    assert next(read_rows(path)).values == {"id": "1", "body": "a", "text": "b"}
    assert next(read_rows(path, columns={"text": "body"})).values == {"id": "1", "text": "a"}
    with pytest.raises(UserError, match="expected columns 'bdy', found 'id', 'body', 'text'.*mean 'body'"):
        next(read_rows(path, columns={"text": "bdy"}))
    with pytest.raises(UserError, match="(?s)expected a column 'text', found 'a', 'b'.*--columns text="):
        next(read_texts(write(tmp_path, "b.csv", "a,b\n1,2\n")))
    counts = Counts()
    assert texts(write(tmp_path, "c.jsonl", '{"id": 1, "review": "good"}\n'), counts=counts) == ["good"]
    assert "'review'" in counts.notes[0]
    assert texts([{"review": "good", "stars": 5}]) == ["good"]


def test_folder_says_what_it_leaves_out(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", "notes.docx", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path, name, name)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    counts = Counts()
    assert texts(tmp_path, counts=counts) == ["a.txt", "b.txt", "sub/c.txt"]
    assert len(counts.ignored) == 3 and "3 files" in counts.notes[0] and "empty.txt: is empty" in counts.notes[1]


def test_import_is_cheap():
    code = "import sys, embedtune.data.read, embedtune.data.check, embedtune.data.example; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "pyarrow", "zstandard", "transformers"} & set(run.stdout.split())


MEMORY = """
import resource, sys
import pyarrow
from embedtune.data.read import Counts, read_texts
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
counts = Counts()
try:
    for row in read_texts(sys.argv[1], bad_rows=sys.argv[2], counts=counts):
        if counts.used == 100_000: break
except Exception as error:
    print(error, file=sys.stderr)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base, counts.rows, counts.used)
"""


def memory(path, bad_rows):
    command = [sys.executable, "-c", MEMORY, str(path), bad_rows]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [*map(int, result.stdout.split()), result.stderr]


def test_memory_is_flat_on_a_line_of_100_mb(tmp_path):
    path = tmp_path / "one.txt"
    with open(path, "wb") as file:
        for _ in range(100):
            file.write(b"word " * 200_000)
        file.write(b"\nlast\n")
    for bad_rows, rows, used in (("fail", 1, 0), ("skip", 2, 1), ("replace", 7, 7)):
        kilobytes, *numbers, error = memory(path, bad_rows)
        assert kilobytes < 250_000 and numbers == [rows, used]
        assert ("longer than 16 MiB" in error) == (bad_rows == "fail")


def test_memory_is_flat_on_900k_lines(real_data):
    kilobytes, rows, used, _ = memory(real_data("general_900k/data.txt.zst"), "fail")
    assert kilobytes < 64_000 and rows == used == 100_000


def test_real_files(real_data, tmp_path):
    lines = list(itertools.islice(read_texts(real_data("medical/data.txt")), 1000))
    assert len(lines) == 1000 and lines[-1].number == 1000
    counts = Counts()
    for _ in read_texts(real_data("imdb/test.csv.gz"), counts=counts):
        pass
    assert counts.rows == counts.used == 25_000
    counts = Counts()
    for _ in read_texts(real_data("medquad/medquad.jsonl"), columns={"text": "answer"}, counts=counts):
        pass
    assert counts.used == 16_407
    blns = real_data("blns/blns.txt").read_bytes()
    for _ in read_texts(real_data("blns/blns.txt"), counts=(counts := Counts())):
        pass
    assert counts.rows == blns.count(b"\n") + (not blns.endswith(b"\n"))
    naughty = [text for text in json.loads(real_data("blns/blns.json").read_bytes()) if text.strip()]
    assert texts(naughty) == naughty


def test_classes_of_hub_datasets_by_their_names(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    kind = datasets.ClassLabel(names=["bad", "good"])
    cells = {
        "text": ["a", "b", "c", "d"],
        "label": [1, 0, None, -1],  # -1: a test set without labels
        "tags": [[0, 1], [], None, [1, None, -1]],
        "nested": [[[0], [1, 1]], [], None, [None, []]],
        "records": [[{"kind": 1}], [], None, [{"kind": None}]],
        "number": [1, 0, None, -1],
    }
    features = {
        "text": datasets.Value("string"),
        "label": kind,
        "tags": datasets.Sequence(kind),
        "nested": datasets.Sequence(datasets.Sequence(kind)),
        "records": datasets.List({"kind": kind}),
        "number": datasets.Value("int32"),
    }
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(cells, datasets.Features(features)).to_parquet(str(tmp_path / "set" / "train.parquet"))

    def columns(**options):
        rows = list(read_rows(f"hub:{tmp_path}/set", **options))
        assert [row.number for row in rows] == [1, 2, 3, 4]
        return {name: [row.values[name] for row in rows] for name in cells}

    assert columns() == cells, "numbers, unless names are asked for"
    assert columns(names=True) == cells | {
        "label": ["good", "bad", None, None],
        "tags": [["bad", "good"], [], None, ["good", None, None]],
        "nested": [[["bad"], ["good", "good"]], [], None, [None, []]],
    }, "records are left as they are"


def hub_folder(datasets, tmp_path, monkeypatch, rows):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "set" / "train.parquet"))
    return f"hub:{tmp_path}/set"


def test_hub_datasets_of_several_batches_are_numbered_through(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    name = hub_folder(datasets, tmp_path, monkeypatch, [{"text": f"text {n}"} for n in range(600)])
    rows = list(read_texts(name))
    assert [row.number for row in rows] == list(range(1, 601)) and rows[-1].values == {"text": "text 599"}
    with pytest.raises(UserError, match="has no split 'test', only train") as caught:
        next(read_rows(f"{name}::test"))
    assert caught.value.fix == f"{name}::train"


def test_hub_datasets_that_are_not_there(monkeypatch):
    pytest.importorskip("datasets")
    for name, says in (("hub:", "names no dataset"), ("hub::config", "names no dataset"),
                       ("hub:/nowhere/at/all", r"cannot be loaded \(\w+: ")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            next(read_rows(name))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="(?s)need another package.*pip install 'embedtune.hub.'"):
        next(read_rows("hub:some/name"))


def test_items_of_a_list_that_are_no_rows():
    circle = []
    circle.append(circle)
    for item, says in ((7, "is neither a string nor a dict, but int"), ({1: "a"}, "is a dict with a key that is no st"),
                       (circle, "is circular or nested too deeply"), (["a"], "is neither .* but list")):  # fmt: skip
        with pytest.raises(UserError, match=rf"the list, item 2: {says}"):
            texts(["a", item])
        counts = Counts()
        assert texts(["a", item, "b"], bad_rows="skip", counts=counts) == ["a", "b"]
        assert counts.rejected == {"no data": 1} and counts.examples == {"no data": ["the list, item 2"]}


def test_columns_on_the_command_line():
    assert parse_columns(None) == {} and parse_columns("") == {}
    assert parse_columns("text=body, label = stars") == {"text": "body", "label": "stars"}
    for columns in ("text", "text=", "=body", "text=a=b", "text=a,", "text=a,label"):
        with pytest.raises(UserError, match=f"'{columns}' is not of the form text=NAME") as caught:
            parse_columns(columns)
        assert caught.value.where == "--columns"


def test_rows_without_a_header_are_counted_by_what_is_wrong_with_them(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"a\tb\n\nc\xff\td\ne\tf\n")
    counts = Counts()
    rows = list(read_rows(tmp_path / "a.tsv", header=False, bad_rows="skip", counts=counts))
    assert [list(row.values.values()) for row in rows] == [["a", "b"], ["e", "f"]]
    assert counts.rejected == {"blank": 1, "not UTF-8": 1} and counts.rows == 4
    with pytest.raises(UserError, match="row 3.*is not UTF-8"):
        list(read_rows(tmp_path / "a.tsv", header=False))
    (tmp_path / "b.csv").write_text("text,n\na,1\nb,1,2\nc\n")
    counts = Counts()
    assert len(list(read_rows(tmp_path / "b.csv", bad_rows="skip", counts=counts))) == 1
    assert counts.rejected == {"ragged": 2}


def test_of_several_problems_the_one_that_decides_is_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"txt": "b\xff"}\n')
    for bad_rows, reason in (("skip", "not UTF-8"), ("replace", "no column")):
        counts = Counts()
        assert len(list(read_texts(tmp_path / "a.jsonl", bad_rows=bad_rows, counts=counts))) == 1
        assert counts.rejected == {reason: 1} and not counts.replaced


def test_the_first_column_of_texts_is_the_example(tmp_path):
    (tmp_path / "a.csv").write_text("one,two\na,b\n")
    with pytest.raises(UserError, match="for example --columns text=one"):
        list(read_texts(tmp_path / "a.csv"))
