"""Lines on disk: what was read comes back by its number, and memory grows with nothing."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import corpus, tiny_tokenizer
from embedtune.data import spool as module
from embedtune.data.read import Counts, Row, read_texts, stored_bytes
from embedtune.data.spool import CHUNK, LazyTokens, open_spool, spool
from embedtune.data.tokens import Chunker, numbered, tokenize

TXT = "ba be\r\nüber 日本 🙂\n\n\n  spaced \nbi\x85bo\u2028bu\n" + "long " * 300 + "\n\nlast"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def same_as_read(path, folder):
    rows = list(numbered(read_texts(path)))
    made = spool(read_texts(path), folder)
    everything = np.arange(len(made))
    assert made.texts(everything) == [row.values["text"] for row, _ in rows]
    assert made.places(everything).tolist() == [list(place) for _, place in rows]
    assert np.concatenate(list(made.all_places())).tolist() == made.places(everything).tolist()
    assert open_spool(folder) == made
    return made


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
@pytest.mark.parametrize("size", [1, 100, 1 << 20])
def test_lines_come_back_whatever_is_in_them(tmp_path, monkeypatch, ending, size):
    """For every size of the blocks that are written and looked through."""
    monkeypatch.setattr(module, "BYTES", size)
    monkeypatch.setattr(module, "LINES", 2)
    path = tmp_path / f"a{ending}"
    texts = [line for line in TXT.split("\n") if line.strip()]
    path.write_bytes((TXT if ending == ".txt" else "\n".join(json.dumps(text) for text in texts)).encode())
    made = same_as_read(path, tmp_path / "lines")
    assert len(made) == 6 and made.texts(np.array([4, 1, 1])) == ["long " * 300, "über 日本 🙂", "über 日本 🙂"]


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.booleans()), min_size=1), st.data())
def test_any_text_comes_back(tmp_path_factory, lines, data):
    documents = np.cumsum([fresh for _, fresh in lines]) - lines[0][1]
    rows = [Row({"text": text}, "f", n, int(document)) for n, ((text, _), document) in enumerate(zip(lines, documents))]
    made = spool(rows, tmp_path_factory.mktemp("lines"))
    numbers = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=9))
    assert made.texts(np.array(numbers, np.int64)) == [lines[number][0] for number in numbers]


def test_lines_of_a_text_are_found_wherever_they_stand(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LINES", 4)
    texts = [f"text {number % 7}" for number in range(23)]
    made = spool((Row({"text": text}, "f", 0, 0) for text in texts), tmp_path)
    wanted = {"text 3", "text 6", "text 77", "nothing"}
    assert list(made.having(wanted)) == [(n, text) for n, text in enumerate(texts) if text in wanted]
    assert list(made.having(set())) == []


def test_the_counts_are_those_of_reading(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(TXT.encode() + b"\nbad \xff\n")
    plain, counts = Counts(), Counts()
    list(read_texts(path, bad_rows="skip", counts=plain))
    spool(read_texts(path, bad_rows="skip", counts=counts), tmp_path / "lines")
    assert counts == plain and counts.sha256 == plain.sha256 and counts.rejected["not UTF-8"] == 1


def test_lazy_rows_are_the_eager_ones(tokenizer, tmp_path):
    """The same token rows for the same lines; long lines give all their chunks, barren ones none."""
    path = tmp_path / "a.txt"
    path.write_text(corpus(60) + "☃ ☃\n\nbi " + "bo " * 90 + "\n\u200b\nba\n")
    eager = tokenize(read_texts(path), tokenizer, 24, tmp_path / "eager")
    lazy = LazyTokens(spool(read_texts(path), tmp_path / "lazy"), Chunker.of(tokenizer, 24))
    places = lazy.spool.places(np.arange(len(lazy))).tolist()
    assert len(lazy) == eager.lines + 2 and eager.chunked
    seen = 0
    for line, (document, number) in enumerate(places):
        rows, ids = lazy.rows(np.array([line]))
        mine = np.flatnonzero((eager.document == document) & (eager.line == number))
        by_chunk = [rows[at].tolist() for at in np.argsort(ids)]
        assert by_chunk == [eager.row(n).tolist() for n in mine]
        assert np.sort(ids).tolist() == [line + CHUNK * chunk for chunk in range(len(mine))]
        seen += len(mine)
    assert seen == len(eager)


def test_rows_and_their_ids_do_not_depend_on_the_batch(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(corpus(40) + "bo " * 200 + "\n☃\n")
    lazy = LazyTokens(spool(read_texts(path), tmp_path / "lazy"), Chunker.of(tokenizer, 24))
    rows, ids = lazy.rows(np.arange(len(lazy))[::-1])
    assert len(set(ids.tolist())) == len(ids) > len(lazy)
    assert [len(row) for row in rows] == sorted(len(row) for row in rows)
    together = {number: row.tolist() for number, row in zip(ids.tolist(), rows)}
    alone = {n: r.tolist() for line in range(len(lazy)) for r, n in zip(*lazy.rows(np.array([line])))}
    assert together == alone
    none, ids = lazy.rows(np.array([len(lazy) - 1]))
    assert none == [] and len(ids) == 0
    assert lazy.lengths_of(np.array([3, 0])).tolist() == [len(t.encode()) for t in lazy.spool.texts(np.array([3, 0]))]


def test_memory_does_not_grow_with_the_lines(tmp_path, monkeypatch):
    """Writing, looking through and reading some; counted in bytes that Python holds at most."""
    monkeypatch.setattr(module, "LINES", 1 << 10)
    monkeypatch.setattr(module, "BYTES", 1 << 16)

    def most(count):
        tracemalloc.start()
        made = spool((Row({"text": f"{number:060}"}, "f", number, number // 9) for number in range(count)), tmp_path)
        assert [n for n, _ in made.having({f"{5:060}"})] == [5] and sum(map(len, made.all_places())) == count
        made.texts(np.arange(0, count, count // 100))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    most(4_000)
    assert most(40_000) < 1.2 * most(4_000)


def test_how_much_text_files_hold(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 100)
    (tmp_path / "b.txt.gz").write_bytes(b"x" * 10)
    (tmp_path / "c.pdf").write_bytes(b"x" * 1000)
    assert stored_bytes(tmp_path) == 130 and stored_bytes(str(tmp_path / "a.txt")) == 100
    assert stored_bytes(["a text"]) == stored_bytes("hub:some/name") == 0
