"""Rows in are rows used and rows rejected, by reason; and how a stream is cut into blocks changes nothing."""

import csv
import io
import itertools
import json
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedtune.data import lines as text_lines
from embedtune.data.labels import read_graded, read_labelled
from embedtune.data.pairs import read_pairs, read_scored
from embedtune.data.read import Counts, read_rows, read_texts
from embedtune.data.tags import read_tagged
from embedtune.errors import UserError

READERS = {
    read_rows: ("text", "label"),
    read_texts: ("text", "label"),
    read_pairs: ("anchor", "positive", "negative"),
    read_scored: ("sentence1", "sentence2", "score"),
    read_labelled: ("text", "label"),
    read_graded: ("text", "score"),
    read_tagged: ("tokens", "tags"),
}
STRINGS = st.sampled_from(
    ["good", "two words", "", "  ", "a\0b", "\ud800", "1", "nan", "1e999", "O", "B-x", "I-y", "é\u2028x", '"']
)
NUMBERS = st.sampled_from([0, 1, -1, 0.5, float("nan"), float("inf"), True, None, 10**400, 2**63])
CELLS = st.one_of(STRINGS, NUMBERS, st.lists(st.one_of(STRINGS, NUMBERS), max_size=3), st.just({"a": 1}))


def rows_of(columns):
    whole = st.fixed_dictionaries({name: CELLS for name in columns})
    good = st.fixed_dictionaries(
        {
            name: st.just(0.5 if name == "score" else ["x"] if name == "tokens" else ["O"] if name == "tags" else name)
            for name in columns
        }
    )
    return st.lists(st.one_of(good, whole, st.dictionaries(st.sampled_from([*columns, "other"]), CELLS)), max_size=12)


def read(reader, data, bad_rows):
    counts, found, error = Counts(), [], ""
    try:
        found.extend(reader(data, bad_rows=bad_rows, counts=counts))
    except UserError as refused:
        error = str(refused)
    return counts, found, error


def check_rows(reader, columns, rows, bad_rows, ending):
    """In = used + rejected, and what is used is what comes out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{ending}"
        if ending == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            table = io.StringIO(newline="")
            writer = csv.DictWriter(table, [*columns, "other"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            path.write_bytes(table.getvalue().encode(errors="surrogatepass"))
        counts, found, error = read(reader, path, bad_rows)
    if "expected columns" in error or "expected a column" in error:
        return  # of the file, before any row
    assert counts.rows == counts.used + sum(counts.rejected.values()), (counts, error)
    assert sum(len(places) for places in counts.examples.values()) >= len(counts.rejected)
    if ending == ".jsonl":
        assert counts.rows == len(rows)
    if reader is read_pairs:
        assert len({pair.number for pair in found}) == counts.used or error
    else:
        assert len(found) == counts.used or error
    assert set(counts.replaced) <= {"NUL", "lone surrogate", "not UTF-8"} and (
        bad_rows == "replace" or not counts.replaced
    )


def check_drawn(reader, data):
    rows = data.draw(rows_of(READERS[reader]))
    bad_rows = data.draw(st.sampled_from(["skip", "replace"]))
    check_rows(reader, READERS[reader], rows, bad_rows, data.draw(st.sampled_from([".jsonl", ".csv"])))


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_row_is_used_or_rejected_for_a_reason(reader, data):
    check_drawn(reader, data)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
@settings(max_examples=1500, deadline=None)
@given(data=st.data())
def test_every_row_of_10_000_corpora(reader, data):
    check_drawn(reader, data)


PIECES = [
    b"a",
    b"word\tO",
    b"\n",
    b"\r",
    b"\r\n",
    b"\n\n",
    "é".encode(),
    b"\xff",
    b"\xe6\xbc",
    b"\0",
    b" ",
    b"\xef\xbb\xbf",
]
PIECES += [
    "\u2028".encode(),
    b'"',
    b",",
    b"\t",
    b"-DOCSTART-",
    b"# c",
    b'{"text": "a"}',
    b'"s"',
    b"text,label",
    b"B-x",
    b"\\u0000",
]


def some_bytes(draw):
    return b"".join(draw.choices(PIECES, k=draw.randrange(40)))


def check_chunks(content, reader, ending, bad_rows, limit):
    """The same rows, counts, places and errors, whether the file is read by the byte or whole."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_lines, "MAX_LINE_BYTES", limit)
        path = Path(folder) / f"a{ending}"
        path.write_bytes(content)
        results = []
        for chunk in (1, 7, 1 << 20):
            patch.setattr(text_lines, "CHUNK_BYTES", chunk)
            counts, found, error = read(reader, path, bad_rows)
            results.append(
                (found, error, counts.rejected, counts.replaced, counts.examples) if not error else (found, error)
            )
    assert results[0] == results[1] == results[2], content


CASES = list(
    itertools.product(
        (read_texts, read_labelled, read_tagged), (".txt", ".jsonl", ".csv", ".conll"), ("fail", "skip", "replace")
    )
)


def attack(count):
    draw = random.Random(0)
    for number in range(count):
        reader, ending, bad_rows = CASES[number % len(CASES)]
        if ending == ".conll" and reader is not read_tagged:
            continue
        check_chunks(some_bytes(draw), reader, ending, bad_rows, draw.choice((8, 1 << 24)))


def test_blocks_change_nothing_in_600_strings():
    attack(600)


@pytest.mark.slow
def test_blocks_change_nothing_in_50_000_strings():
    attack(50_000)
