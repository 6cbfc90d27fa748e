"""Pairs and scored pairs: found by the names of columns in every format, and what cannot be used said once, counted."""

import csv
import gzip
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedtune.data.pairs import SYNONYMS, Pair, ScoredPair, matches, read_pairs, read_scored
from embedtune.data.read import Counts
from embedtune.errors import UserError

ROWS = [
    {"anchor": "what is it", "positive": "a thing", "negative": "no thing"},
    {"anchor": "where, then", "positive": 'a "place"', "negative": "no\nplace"},
    {"anchor": "wann — schön", "positive": "漢字 when", "negative": "never"},
]
SCORED = [
    {"sentence1": "a cat", "sentence2": "a dog", "score": 0.5},
    {"sentence1": "a cat", "sentence2": "a cat", "score": 1},
    {"sentence1": "rain", "sentence2": "a dog", "score": 0.0},
]


def write(path, rows, names=None):
    """The rows in the format that the file's ending says."""
    names = names or list(rows[0])
    if path.suffix == ".gz":
        inner = write(path.with_suffix(""), rows, names)
        path.write_bytes(gzip.compress(inner.read_bytes()))
        inner.unlink()
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
            writer.writerows([names, *([row.get(name) for name in names] for row in rows)])
    return path


def plain(pairs):
    return [(pair.anchor, pair.positive, pair.negatives) for pair in pairs]


def scores(pairs):
    return [(pair.sentence1, pair.sentence2, pair.score) for pair in pairs]


def refusal(read, data, **options):
    counts = Counts()
    with pytest.raises(UserError) as caught:
        list(read(data, counts=counts, **options))
    assert counts.rows == counts.used + sum(counts.rejected.values())
    return caught.value


EXPECTED = [(row["anchor"], row["positive"], (row["negative"],)) for row in ROWS]
ENDINGS = [".jsonl", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_gives_the_same(tmp_path, ending):
    path, counts = write(tmp_path / f"data{ending}", ROWS), Counts()
    found = list(read_pairs(str(path), counts=counts))
    assert plain(found) == EXPECTED
    assert {pair.file for pair in found} == {str(path)} and [pair.number for pair in found] == [1, 2, 3]
    assert (counts.rows, counts.used, counts.rejected) == (3, 3, {}) and counts.files == [str(path)]
    assert [pair.group for pair in found] == [None] * 3 and counts.notes == []
    path = write(tmp_path / f"scored{ending}", SCORED)
    assert scores(read_scored(str(path))) == [("a cat", "a dog", 0.5), ("a cat", "a cat", 1.0), ("rain", "a dog", 0.0)]


def test_a_list_and_a_folder(tmp_path):
    assert plain(read_pairs(ROWS)) == EXPECTED
    assert list(read_scored(SCORED))[1] == ScoredPair("a cat", "a cat", 1.0, "the list", 2)
    write(tmp_path / "a.csv", ROWS[:2])
    write(tmp_path / "b.jsonl", [{"query": "q", "answer": "a"}])
    counts = Counts()
    assert plain(read_pairs(tmp_path, counts=counts)) == [*EXPECTED[:2], ("q", "a", ())]
    assert counts.notes == [f"{tmp_path}/b.jsonl: took the column {c!r} as {o!r}" for c, o in
                            (("query", "anchor"), ("answer", "positive"))]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("named", ["", ":default", ":default:train", "::train"])
def test_hub_datasets_by_a_local_folder(tmp_path, monkeypatch, kind, named):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / f"train.{kind}", ROWS)
    assert plain(read_pairs(f"hub:{tmp_path}/set{named}")) == EXPECTED
    error = refusal(read_pairs, f"hub:{tmp_path}/set:default:validation")
    assert "has no split 'validation', only train" in str(error)
    assert "cannot be loaded" in str(refusal(read_pairs, f"hub:{tmp_path}/nothing"))


OTHERS = [(our, name) for our in ("anchor", "positive") for name in SYNONYMS[our]]


@pytest.mark.parametrize("our, name", [*OTHERS, ("anchor", "Question"), ("positive", "PASSAGE")])
def test_synonyms_in_any_case_and_said(our, name):
    other = {"anchor": "positive", "positive": "anchor"}[our]
    counts = Counts()
    (found,) = read_pairs([{other: "one text", "id": "7", name: "another"}], counts=counts)
    assert getattr(found, our) == "another" and getattr(found, other) == "one text"
    note = [] if name == our else [f"the list: took the column {name!r} as {our!r}"]
    assert counts.notes == note


@pytest.mark.parametrize("our", ["sentence1", "sentence2", "score"])
def test_synonyms_of_scored_pairs(our):
    for name in SYNONYMS[our]:
        row = {"sentence1": "one", "sentence2": "two", "score": 0.25}
        row[name] = row.pop(our)
        assert scores(read_scored([row])) == [("one", "two", 0.25)]


def test_the_own_name_wins_over_synonyms_and_order_never_decides():
    row = {"answer": "no", "positive": "yes", "query": "no", "anchor": "the anchor", "document": "no"}
    assert plain(read_pairs([row])) == [("the anchor", "yes", ())]
    assert plain(read_pairs([dict(reversed(row.items()))])) == [("the anchor", "yes", ())]


def test_columns_by_the_users_names(tmp_path):
    path = write(tmp_path / "d.csv", [{"a": "what", "b": "this", "c": "that", "d": "g1", "anchor": "not this one"}])
    columns = {"anchor": "a", "positive": "b", "negative": "c", "group": "d"}
    assert list(read_pairs(path, columns=columns)) == [Pair("what", "this", ("that",), str(path), 1, "g1")]
    path = write(tmp_path / "s.csv", [{"a": "what", "b": "this", "c": "0.5"}])
    assert scores(read_scored(path, columns={"sentence1": "a", "sentence2": "b"})) == [("what", "this", None)]
    assert scores(read_scored(path, columns={"sentence1": "a", "sentence2": "b", "score": "c"}))[0][2] == 0.5


@pytest.mark.parametrize(
    "row, columns, says",
    [
        ({"anchr": "a", "positive": "b"}, {}, "found 'anchr', 'positive' (did you mean 'anchr'?): no column 'anchor'"),
        ({"anchor": "a", "postive": "b"}, {}, "(did you mean 'postive'?): no column 'positive'"),
        ({"anchor": "a", "thing": "b"}, {}, "--columns positive=NAME, for example --columns positive=thing"),
        ({"anchor": "a", "positive": "b"}, {"anchor": "anker"}, "(did you mean 'anchor'?): no column 'anker'"),
        ({"anchor": "a", "positive": "b"}, {"negative": "negs"}, "found 'anchor', 'positive': no column 'negs'"),
        ({"anchor": "a", "positive": "b"}, {"ancor": "a"}, "'ancor' is no column of ours (did you mean 'anchor'?)"),
        ({"anchor": "a", "positive": "b"}, {"score": "a"}, "there are anchor, positive, negative, group"),
        ({"answer": "a", "context": "b"}, {"anchor": "nothing"}, "no column 'nothing'"),
        ({"answer": "a", "label": "b"}, {"anchor": "answer"}, "no column 'positive'"),  # given away
        ({"text": "only a text"}, {}, "expected columns 'anchor', 'positive', found 'text'"),
    ],
)  # fmt: skip
def test_columns_that_are_not_there(row, columns, says):
    assert says in str(refusal(read_pairs, [row], columns=columns))


def test_many_columns_are_not_all_listed():
    error = str(refusal(read_pairs, [{f"column{n}": "x" for n in range(50)}]))
    assert "'column19', ..." in error and "column20" not in error


def test_scored_columns_that_are_not_there():
    assert "expected columns 'sentence1', 'sentence2', found 'sentence1', 'other'" in str(
        refusal(read_scored, [{"sentence1": "a", "other": "b"}])
    )
    assert "(did you mean 'score'?): no column 'scor'" in str(
        refusal(read_scored, [{"sentence1": "a", "sentence2": "b", "score": 1}], columns={"score": "scor"})
    )
    assert "no column 'sentence2'" in str(refusal(read_scored, [{"sentence1": "a", "answer": "b"}])), "of one kind"
    # A file of pairs without scores is one of those too, under the names of pairs.
    assert scores(read_scored([{"query": "a", "passage": "b"}])) == [("a", "b", None)]


def test_several_positives_give_a_pair_each(tmp_path):
    rows = [
        {"anchor": "q", "positives": ["p1", "p2", "p3"], "negatives": ["n1", "n2"]},
        {"anchor": "r", "positives": ["p4"]},
    ]
    expected = [*(("q", p, ("n1", "n2")) for p in ("p1", "p2", "p3")), ("r", "p4", ())]
    counts = Counts()
    assert plain(read_pairs(rows, counts=counts)) == expected
    assert (counts.rows, counts.used) == (2, 2), "rows are counted, not pairs"
    for ending in ("jsonl", "parquet"):
        assert plain(read_pairs(write(tmp_path / f"d.{ending}", rows))) == expected


@pytest.mark.parametrize(
    "cells, expected",
    [
        ({"negative": "n"}, ("n",)),
        ({"negative_1": "n1", "negative_2": "n2", "negative_10": "n3"}, ("n1", "n2", "n3")),
        ({"negative1": "n1", "neg-2": "n2", "Negative 3": "n3", "hard_negative_4": "n4"}, ("n1", "n2", "n3", "n4")),
        ({"negatives": ["n1", "n2"]}, ("n1", "n2")),
        ({"negative": "n0", "negatives": ["n1"]}, ("n0", "n1")),
        ({"negative_1": None, "negative_2": "n2", "negative_3": "  "}, ("n2",)),
        ({"negatives": [None, "n"]}, ("n",)),
        ({"negatives": []}, ()),
        ({"negative_answer": "n", "nonnegative": "x", "negative_id": "7"}, ()),
    ],
)
def test_any_number_of_negatives(cells, expected):
    (found,) = read_pairs([{"anchor": "q", "positive": "p", **cells}])
    assert found.negatives == expected


def test_what_only_later_records_have_is_read(tmp_path):
    """JSON records need not all have the same keys: the first one does not decide for the others."""
    rows = [
        {"anchor": "q1", "positive": "p1"},
        {"anchor": "q2", "positive": "p2", "negatives": ["n1", "n2"]},
        {"group": "g", "positive": "p3", "anchor": "q3", "negative_1": "n3"},
        {"query": "q4", "positive": "p4"},
    ]
    expected = [("q1", "p1", ()), ("q2", "p2", ("n1", "n2")), ("q3", "p3", ("n3",)), ("q4", "p4", ())]
    for data in (rows, write(tmp_path / "d.jsonl", rows)):
        found = list(read_pairs(data))
        assert plain(found) == expected and [pair.group for pair in found] == [None, None, "g", None]
    scored = [{"sentence1": "a", "sentence2": "b"}, {"sentence1": "c", "sentence2": "d", "score": 0.5}]
    assert scores(read_scored(scored)) == [("a", "b", None), ("c", "d", 0.5)]
    error = refusal(read_pairs, [rows[0], {"anchor": "q"}, {"positive": "p"}])
    assert set(error.details) == {
        "column 'positive' is empty (1): item 2",
        "column 'anchor' is empty (1): item 3",
    }


def test_groups_that_are_empty_are_none():
    rows = [{"anchor": "a", "positive": "b", "group": g} for g in (None, 7, "x")]
    assert [pair.group for pair in read_pairs(rows)] == [None, "7", "x"]


BAD = [
    ({"anchor": "", "positive": "p"}, "column 'anchor' is empty"),
    ({"anchor": "q", "positive": " \t "}, "column 'positive' is empty"),
    ({"anchor": "q", "positive": None}, "column 'positive' is empty"),
    ({"anchor": "q", "positive": []}, "column 'positive' is empty"),
    ({"anchor": "q", "positive": ["p", ""]}, "column 'positive' is empty"),
    ({"anchor": "q", "positive": 3}, "column 'positive' holds int where a text must stand"),
    ({"anchor": "q", "positive": "p", "negative": {"a": 1}}, "column 'negative' holds dict where a text must stand"),
    ({"anchor": ["q", "r"], "positive": "p"}, "column 'anchor' holds a list"),
    ({"anchor": "same", "positive": "same"}, "the anchor is one of its own positives or negatives"),
    ({"anchor": "same", "positive": "p", "negative": "same"}, "the anchor is one of its own positives or negatives"),
]


@pytest.mark.parametrize("row, what", BAD)
def test_what_makes_a_row_unusable(row, what):
    good = {"anchor": "a", "positive": "b", "negative": "c"}
    error = refusal(read_pairs, [good, row, good])
    assert error.what == "1 of 3 rows cannot be used" and error.where == "the list"
    assert error.details == (f"{what} (1): item 2",)
    assert "--bad-rows skip" in error.fix
    counts = Counts()
    assert len(list(read_pairs([good, row, good], bad_rows="skip", counts=counts))) == 2
    assert (counts.rows, counts.used, counts.rejected) == (3, 2, {what: 1})


def test_all_that_is_wrong_is_said_once_with_counts_and_three_rows(tmp_path):
    rows = [{"anchor": f"q{n}", "positive": "" if n % 2 else "p", "negative": "n"} for n in range(20)]
    rows[4]["anchor"] = "p"
    path = write(tmp_path / "d.csv", rows)
    error = refusal(read_pairs, path)
    assert error.where == str(path) and error.what == "11 of 20 rows cannot be used"
    assert error.details == (
        "column 'positive' is empty (10): row 2, row 4, row 6, ...",
        "the anchor is one of its own positives or negatives (1): row 5",
    )
    # In a folder the file is named too.
    write(tmp_path / "e.csv", [{"anchor": "q", "positive": ""}, {"anchor": "q", "positive": "p"}])
    error = refusal(read_pairs, tmp_path)
    assert error.where == str(tmp_path) and f"{tmp_path}/d.csv, row 2" in error.details[0]
    assert error.what == "12 of 22 rows cannot be used" and "is empty (11): " in error.details[0]


def test_nothing_but_unusable_rows():
    for bad_rows in ("fail", "skip"):
        error = str(refusal(read_pairs, [{"anchor": "q", "positive": ""}] * 3, bad_rows=bad_rows))
        assert "has no usable row: 0 of 3 rows" in error and "3 x column 'positive' is empty" in error


@pytest.mark.parametrize(
    "score", ["high", None, "", "nan", math.nan, math.inf, "-inf", "1e999", True, [1], {"a": 1}, "0,5"]
)
def test_scores_that_are_none(score):
    good = {"sentence1": "a", "sentence2": "b", "score": "0.5"}
    rows = [good, {**good, "score": score}, good]
    error = refusal(read_scored, rows)
    assert error.details == ("the score is no finite number (1): item 2",)
    counts = Counts()
    assert [p.score for p in read_scored(rows, bad_rows="skip", counts=counts)] == [0.5, 0.5]
    assert counts.rejected == {"the score is no finite number": 1} and counts.examples == {
        "the score is no finite number": ["the list, item 2"]
    }


def test_scored_pairs_may_be_alike_on_both_sides_but_not_empty():
    assert len(list(read_scored([{"sentence1": "a", "sentence2": "a", "score": 1}]))) == 1
    error = refusal(read_scored, [SCORED[0], {"sentence1": "a", "sentence2": " ", "score": 1}])
    assert error.details == ("column 'sentence2' is empty (1): item 2",)


text = st.sampled_from(["a", "b", "c", "", "  ", "\n"]) | st.none() | st.integers(0, 3)
cell = text | st.lists(text, max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.fixed_dictionaries({"anchor": cell, "positive": cell, "negatives": cell}), min_size=1, max_size=8))
def test_the_account_is_right_whatever_the_rows(rows):
    """Against a second reading of the rules: what is used, what is not, and that nothing is lost between."""

    def texts(value):
        return value if isinstance(value, list) else [value]

    def good(row):
        sides = [texts(row[name]) for name in ("anchor", "positive")]
        if not all(side and all(isinstance(t, str) and t.strip() for t in side) for side in sides):
            return None
        if any(isinstance(t, int) for t in texts(row["negatives"])) or len(sides[0]) > 1:
            return None
        negatives = tuple(t for t in texts(row["negatives"]) if t and t.strip())
        return None if sides[0][0] in (*sides[1], *negatives) else [(sides[0][0], p, negatives) for p in sides[1]]

    usable = [found for row in rows if (found := good(row))]
    counts, found, error = Counts(), [], None
    try:
        found = plain(read_pairs(rows, bad_rows="skip", counts=counts))
    except UserError as caught:
        error = caught
    assert (counts.rows, counts.used) == (len(rows), len(usable))
    assert sum(counts.rejected.values()) == len(rows) - len(usable)
    assert found == [pair for pairs in usable for pair in pairs] and (error is None) == bool(usable)
    if len(usable) == len(rows):
        assert plain(read_pairs(rows)) == found
    else:
        refusal(read_pairs, rows)


@pytest.fixture
def beir(tmp_path):
    folder = tmp_path / "things"
    (folder / "qrels").mkdir(parents=True)
    write(folder / "corpus.jsonl", [{"_id": "a", "title": "Apples", "text": "grow"}, {"_id": "b", "text": "sail"}])
    write(folder / "queries.jsonl", [{"_id": n, "text": t} for n, t in (("1", "fruit"), ("2", "boats"), ("3", "sail"))])
    for split, rows in {"train": [("1", "a", 1), ("1", "b", 0)], "dev": [("2", "b", 2), ("3", "b", 1)]}.items():
        lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in rows)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_beir_folders(beir):
    counts = Counts()
    (pair,) = read_pairs(beir, counts=counts)
    assert pair == Pair("fruit", "Apples grow", (), str(beir / "qrels" / "train.tsv"), 1, "1")
    assert counts.rows == counts.used and counts.rejected == {}
    assert "no qrels file for 'tset'" in str(refusal(read_pairs, beir, split="tset"))


def test_queries_that_are_their_own_answer(beir):
    error = refusal(read_pairs, beir, split="dev")
    assert error.details == ("the anchor is one of its own positives or negatives (1): query 3",)
    assert error.what == "1 of 2 judgements cannot be used"
    counts = Counts()
    (pair,) = read_pairs(beir, split="dev", bad_rows="skip", counts=counts)
    assert pair.anchor == "boats" and counts.rows == counts.used + 1


def test_which_columns_hold_what():
    there = ["neg_2", "Negative", "answers", "Query", "POSITIVE", "neg 10", "negation", "n" * 50]
    assert matches("anchor", "", there) == ["Query"] and matches("positive", "", there) == ["POSITIVE"]
    assert matches("negative", "", there) == ["neg_2", "Negative", "neg 10"]
    assert matches("negative", "answers", there) == ["answers"] and matches("negative", "absent", there) == []
    assert matches("sentence1", "", there) == []
