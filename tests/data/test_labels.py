"""Labels and scores: found by the names of columns in every format, strings in the end, what is wrong said once."""

import csv
import gzip
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedtune.data.labels import (
    LABEL,
    PAIR,
    SCORE,
    TEXT,
    Classes,
    Graded,
    Labelled,
    check_known,
    classes_of,
    drop_singles,
    read_graded,
    read_labelled,
)
from embedtune.data.read import Counts, read_rows
from embedtune.errors import UserError

ROWS = [{"text": "fine, really", "label": 1}, {"text": 'a "bore"', "label": 0}, {"text": "漢字\nschön", "label": 1}]
EXPECTED = [(row["text"], (str(row["label"]),)) for row in ROWS]
ENDINGS = [".jsonl", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz"]


def write(path, rows):
    """The rows in the format that the file's ending says."""
    if path.suffix == ".gz":
        inner = write(path.with_suffix(""), rows)
        path.write_bytes(gzip.compress(inner.read_bytes()))
        inner.unlink()
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
            writer.writerows([list(rows[0]), *(row.values() for row in rows)])
    return path


def plain(rows):
    return [(row.text, row.labels) for row in rows]


def labelled(labels):
    """Rows of a list with those labels; a list is several."""
    return list(read_labelled([{"text": f"text {n}", "label": label} for n, label in enumerate(labels)]))


def refusal(read, data, **options):
    """The error, after a look at the counts."""
    counts = Counts()
    with pytest.raises(UserError) as caught:
        list(read(data, counts=counts, **options))
    assert counts.rows == counts.used + sum(counts.rejected.values())
    assert caught.value.where and caught.value.fix
    return caught.value


def said(call, *given, **options):
    with pytest.raises(UserError) as caught:
        call(*given, **options)
    assert caught.value.fix
    return str(caught.value)


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_gives_the_same(tmp_path, ending):
    path, counts = write(tmp_path / f"data{ending}", ROWS), Counts()
    found = list(read_labelled(str(path), counts=counts))
    assert plain(found) == EXPECTED and {row.multi for row in found} == {False}
    assert {row.file for row in found} == {str(path)} and [row.number for row in found] == [1, 2, 3]
    assert (counts.rows, counts.used, counts.rejected, counts.notes) == (3, 3, {}, [])
    scores = [{"text": row["text"], "score": row["label"] / 4} for row in ROWS]
    found = list(read_graded(write(tmp_path / f"scores{ending}", scores)))
    assert [(row.text, row.score) for row in found] == [(row["text"], row["score"]) for row in scores]


def test_a_list_a_folder_and_columns_by_the_users_names(tmp_path):
    assert list(read_labelled(ROWS))[0] == Labelled("fine, really", None, ("1",), "the list", 1, None)
    write(tmp_path / "a.csv", ROWS[:1])
    write(tmp_path / "b.jsonl", [{"review": "so so", "sentiment": "neutral"}])
    counts = Counts()
    assert plain(read_labelled(tmp_path, counts=counts)) == [EXPECTED[0], ("so so", ("neutral",))]
    assert counts.notes == [f"{tmp_path}/b.jsonl: took the column {theirs!r} as {ours!r}" for theirs, ours in
                            (("review", "text"), ("sentiment", "label"))]  # fmt: skip
    path = write(tmp_path / "c.csv", [{"a": "one", "b": "two", "c": "3", "d": "g1", "text": "no", "label": "no"}])
    columns = {"text": "a", "text_pair": "b", "label": "c", "group": "d"}
    assert list(read_labelled(path, columns=columns)) == [Labelled("one", "two", ("3",), str(path), 1, "g1")]
    columns = {"text": "a", "text_pair": "b", "score": "c"}
    assert list(read_graded(path, columns=columns)) == [Graded("one", "two", 3.0, str(path), 1, None)]
    columns = {"text": "text", "label": "sentence"}  # the one that was given away is nobody else's
    assert plain(read_labelled([{"text": "t", "sentence": "s"}], columns=columns)) == [("t", ("s",))]


@pytest.mark.parametrize("ending, signs", [(".csv", "\t;|"), (".tsv", ",;|")])
@pytest.mark.parametrize(
    "read, columns",
    [
        (read_labelled, {"text": "1", "label": "0"}),
        (read_labelled, {"text": "0"}),
        (read_graded, {"text": "1", "text_pair": "2", "score": "0"}),
    ],
)
def test_rows_of_one_cell_that_looks_like_several(tmp_path, ending, signs, read, columns):
    path, names = tmp_path / f"a{ending}", {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas"}
    for sign in signs:
        path.write_text(sign.join(("1", "a text", "its pair")) + "\n")
        error = refusal(read, path, columns=columns)
        assert f"is one column: are cells parted by {names[sign]}?" in error.what and error.where == f"{path}, row 1"
        path.write_text(sign.join(("score", "text", "pair")) + "\n" + path.read_text())
        same = refusal(read, path)  # where that row is a header
        assert f"are cells parted by {names[sign]}?" in same.what
        assert same.where == f"{path}, header" and same.fix == error.fix


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_one_column_without_a_header_may_hold_any_text(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    path.write_text('"well, fine; so | so"\nfine\n'.replace('"', '"' if ending == ".csv" else ""))
    expected = ["well, fine; so | so", "fine"]
    assert [row.values for row in read_rows(path, header=False)] == [{"0": text} for text in expected]
    found = list(read_labelled(path, columns={"text": "0", "label": "0"}))
    assert plain(found) == [(text, (text,)) for text in expected]
    path.write_text("fine\nbad\n")
    assert "found '0': no column '1'" in str(refusal(read_labelled, path, columns={"text": "0", "label": "1"}))


def test_hub_datasets_by_a_local_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.parquet", ROWS)
    assert plain(read_labelled(f"hub:{tmp_path}/set")) == EXPECTED


@pytest.mark.parametrize("name", [*TEXT, "Review"])
def test_synonyms_of_the_text(name):
    counts = Counts()
    assert plain(read_labelled([{"label": "x", "id": 7, name: "a text"}], counts=counts)) == [("a text", ("x",))]
    assert counts.notes == ([] if name == "text" else [f"the list: took the column {name!r} as 'text'"])


@pytest.mark.parametrize("name", LABEL)
def test_synonyms_of_the_label(name):
    assert plain(read_labelled([{name: "x", "id": 7, "text": "a text"}])) == [("a text", ("x",))]


@pytest.mark.parametrize("name", SCORE)
def test_synonyms_of_the_score(name):
    assert [row.score for row in read_graded([{name: "0.5", "text": "a text"}])] == [0.5]
    if name not in ("label", "value"):
        (row,) = read_graded([{"label": "bad", "text": "a text", name: 2}])
        assert row.score == 2, "what can only be a score comes before what may be a class"


@pytest.mark.parametrize(
    "first, second",
    [("sentence1", "sentence2"), ("premise", "hypothesis"), ("text1", "text2"), ("question1", "question2")],
)
def test_pairs_by_their_usual_names(first, second):
    (row,) = read_labelled([{"label": 1, second: "b", first: "a", "sentence": "c"}])
    assert (row.text, row.pair) == ("a", "b")
    (row,) = read_graded([{"score": 1, second: "b", first: "a", "text": "c"}])
    assert (row.text, row.pair) == ("c", "b"), "the own name wins"


@pytest.mark.parametrize("name", PAIR)
def test_synonyms_of_the_second_text(name):
    (row,) = read_labelled([{"text": "a", "label": 1, name: "b"}])
    assert row.pair == "b"


@pytest.mark.parametrize(
    "row, columns, says",
    [
        ({"txt": "a", "label": 1}, {}, "expected columns 'text', 'label', found 'txt', 'label' (did you mean 'txt'?)"),
        ({"text": "a", "lable": 1}, {}, "(did you mean 'lable'?): no column 'label'"),
        ({"text": "a", "y": 1}, {}, "--columns label=NAME, for example --columns label=y"),
        ({"text": "a", "label": 1}, {"label": "lab"}, "(did you mean 'label'?): no column 'lab'"),
        ({"text": "a", "label": 1}, {"text_pair": "second"}, "no column 'second'"),
        ({"text": "a", "label": 1}, {"labl": "label"}, "'labl' is no column of ours (did you mean 'label'?)"),
        ({"text": "a", "label": 1}, {"score": "label"}, "there are text, text_pair, group, label"),
    ],
)
def test_columns_that_are_not_there(row, columns, says):
    with pytest.raises(UserError) as caught:
        list(read_labelled([row], columns=columns))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "value, expected",
    [
        ("spam", "spam"), (" spam", " spam"), (7, "7"), (7.0, "7"), (-1.0, "-1"), (True, "true"), (False, "false"),
        ("1.0", "1.0"), ("0.5", "0.5"), ("007", "007"), (np.int64(3), "3"), (np.float32(2), "2"),
        (1e20, "1" + "0" * 20),
    ],
)  # fmt: skip
def test_labels_are_strings_in_the_end(value, expected):
    (row,) = labelled([value])
    assert row.labels == (expected,) and not row.multi
    several = labelled([[value, "other"], []])
    assert [row.labels for row in several] == [(expected, "other"), ()] and all(row.multi for row in several)


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_cells_without_a_type_that_look_like_decimals(tmp_path, ending):
    rows = [{"text": "t", "label": label} for label in ("1.0", " 2.", "-3.00", "1", "1.0.0", "v1.5", "1e5")]
    found = list(read_labelled(write(tmp_path / f"a{ending}", rows)))
    assert [row.labels[0] for row in found] == ["1", "2", "-3", "1", "1.0.0", "v1.5", "1e5"]
    rows = [*rows, {"text": "t", "label": "4.5"}]
    error = refusal(read_labelled, write(tmp_path / f"b{ending}", rows))
    assert "1 of 8 rows cannot be used" in str(error) and "must stand (1): row 8" in str(error)
    assert "embedtune fit regress" in error.fix


BAD = [
    ("no label", {"text": "t", "label": None}),
    ("no label", {"text": "t", "label": "  "}),
    ("no label", {"text": "t", "label": math.nan}),
    ("no label", {"text": "t"}),
    ("column 'text' is empty", {"text": " ", "label": 1}),
    ("column 'text' is empty", {"text": None, "label": 1}),
    ("column 'text' holds int where a text must stand", {"text": 5, "label": 1}),
    ("column 'text' holds list where a text must stand", {"text": ["t"], "label": 1}),
    ("a fraction where a label must stand", {"text": "t", "label": 0.5}),
    ("a fraction where a label must stand", {"text": "t", "label": math.inf}),
    ("dict where a label must stand", {"text": "t", "label": {"a": 1}}),
    ("ndarray where a label must stand", {"text": "t", "label": np.zeros(2)}),
    ("a list of labels, where the first row has one label", {"text": "t", "label": ["a"]}),
    ("a list of labels, where the first row has one label", {"text": "t", "label": []}),
    ("a second text, where the first row has none", {"text": "t", "label": 1, "text_pair": "u"}),
]


def test_rows_that_cannot_be_used_are_said_together():
    rows = [row for _, bad in BAD for row in ({"text": "good", "label": 1}, bad)]
    error = refusal(read_labelled, rows)
    assert error.what == f"{len(BAD)} of {2 * len(BAD)} rows cannot be used"
    for what in {what for what, _ in BAD}:
        places = [f"item {2 * n + 2}" for n, (reason, _) in enumerate(BAD) if reason == what]
        told = ", ".join(places[:3]) + (", ..." if len(places) > 3 else "")
        assert f"{what} ({len(places)}): {told}" in error.details
    assert "embedtune fit regress" in error.fix and "embedtune data clean" in error.fix
    for policy in ("skip", "replace"):
        counts = Counts()
        assert plain(read_labelled(rows, bad_rows=policy, counts=counts)) == [("good", ("1",))] * len(BAD)
        assert counts.used == len(BAD) and counts.rows == 2 * len(BAD)
        assert counts.rejected == {what: sum(what == other for other, _ in BAD) for what, _ in BAD}
        assert counts.examples["dict where a label must stand"] == [f"the list, item {2 * 10 + 2}"]


def test_rows_that_are_unlike_the_first():
    rows = [{"text": "a", "text_pair": "b", "labels": ["x"]}, {"text": "a", "text_pair": "b", "labels": "x"}]
    rows += [{"text": "a", "labels": ["y"]}, {"text": "a", "text_pair": " ", "labels": []}]
    error = refusal(read_labelled, rows)
    assert set(error.details) == {
        "one label, where the first row has a list of labels (1): item 2",
        "column 'text_pair' is empty (2): item 3, item 4",
    }
    assert "make all of them lists, or none" in error.fix
    assert "a label twice in one list (1): item 2" in str(
        refusal(read_labelled, [{"text": "a", "label": ["x"]}, {"text": "a", "label": ["x", "x"]}])
    )
    assert "no label (1): item 2" in str(
        refusal(read_labelled, [{"text": "a", "label": ["x"]}, {"text": "a", "label": ["x", None]}])
    )


def test_a_record_with_other_keys_is_read_by_their_names():
    rows = [{"text": "a", "label": 1}, {"label": 0, "review": "b"}, {"sentence": "c", "class": "1"}]
    assert plain(read_labelled(rows)) == [("a", ("1",)), ("b", ("0",)), ("c", ("1",))]


def test_nothing_but_bad_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a", "label": n + 0.5} for n in range(9)])
    error = refusal(read_labelled, path)
    assert "0 of 9 rows" in str(error) and "embedtune fit regress" in error.fix


@pytest.mark.parametrize("value", [None, "", "four", math.nan, math.inf, "-inf", "nan", [1], True, {}])
def test_scores_that_are_none(value):
    rows = [{"text": "a", "stars": 1}, {"text": "a", "stars": value}]
    error = refusal(read_graded, rows)
    assert "column 'stars' holds no finite number (1): item 2" in str(error)
    counts = Counts()
    assert [row.score for row in read_graded(rows, bad_rows="skip", counts=counts)] == [1.0]
    assert counts.rejected == {"column 'stars' holds no finite number": 1}


def test_bad_bytes_are_those_of_any_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\nfine,1\ncafé,0\n".encode("latin-1"))
    with pytest.raises(UserError, match="row 2 .*looks like latin-1"):
        list(read_labelled(path))
    assert plain(read_labelled(path, bad_rows="skip")) == [("fine", ("1",))]
    assert plain(read_labelled(path, bad_rows="replace")) == [("fine", ("1",)), ("caf\ufffd", ("0",))]


# Classes of all rows together.


@given(st.lists(st.integers(-(10**6), 10**6) | st.floats(-99, 99).map(round), min_size=2, max_size=8, unique=True))
def test_whole_numbers_are_in_their_order(numbers):
    rows = labelled([number for number in numbers for _ in range(2)])
    found = classes_of(rows, "data")
    assert [int(name) for name in found.names] == sorted(numbers) and set(found.counts) == {2} and not found.multi


def test_names_and_counts():
    assert classes_of(labelled(["b", "10", "9", "b", "10", "9", "b"]), "data") == Classes(
        ("10", "9", "b"), (2, 2, 3), False
    )
    assert classes_of(labelled([10, 9, 10, "9", "-1", -1]), "data").names == ("-1", "9", "10")
    assert classes_of(labelled([["a", "b"], [], ["b"], ["a"]]), "data") == Classes(("a", "b"), (2, 2), True)
    assert classes_of(labelled([["a"], ["b"], ["b"], ["a"]]), "data").multi, "a list of one is a list"


def test_what_is_wrong_with_the_classes_is_said_together():
    text = said(classes_of, labelled(["spam"] * 5 + ["Spam"] * 2 + ["ham "] * 3 + ["ham"] * 2 + ["egg", "bean"]), "a")
    assert "2 classes with a single row: 'egg' (the list, item 13), 'bean' (the list, item 14)" in text
    assert "'spam' (5 rows, first the list, item 1), 'Spam' (2 rows, first the list, item 6)" in text
    assert "'ham ' (3 rows, first the list, item 8), 'ham' (2 rows, first the list, item 11)" in text
    assert "--bad-rows skip" in text and "write each label in one way" in text
    assert "only one class, 'x'" in said(classes_of, labelled(["x"] * 4), "a")
    assert "no class at all" in said(classes_of, labelled([[], []]), "a")
    assert "a: has no rows" in said(classes_of, [], "a")
    text = said(classes_of, labelled(["x", "y" * 999]), "the list")
    assert "y" * 50 not in text and "'x' (item 1)" in text, "a column of texts is not poured out"


def test_many_problems_are_cut():
    text = said(classes_of, labelled([f"{case}{n}" for n in range(30) for case in "xX"]), "the list")
    assert "60 classes with a single row: 'x0' (item 1), 'X0' (item 2), 'x1' (item 3), ..." in text
    assert text.count("differ only") == 10 and "and 20 more labels" in text


@settings(max_examples=50)
@given(st.lists(st.sampled_from("abcdef"), min_size=2), st.booleans())
def test_rows_of_single_classes_are_left_out_and_counted(labels, several):
    rows = labelled([[a, b] if a != b else [a] for a, b in zip(labels, labels[1:])] if several else labels)
    counts = Counts(rows=len(rows), used=len(rows))
    kept = drop_singles(rows, counts)
    assert counts.used == len(kept) and sum(counts.rejected.values()) == len(rows) - len(kept)
    many = [label for row in kept for label in row.labels]
    assert all(many.count(label) > 1 for label in many)
    if not several:
        assert [row.labels[0] for row in kept] == [label for label in labels if labels.count(label) > 1]
    again = Counts(rows=len(rows), used=len(rows))
    if len(set(many)) > 1:
        found = classes_of(rows, "data", drop=True, counts=again)
        assert (again.used, again.rejected, again.examples) == (counts.used, counts.rejected, counts.examples)
        assert dict(zip(found.names, found.counts)) == {name: many.count(name) for name in set(many)}
        assert [row for row in rows if set(row.labels) <= set(found.names)] == kept, "as the caller will filter"
    elif kept:
        assert "only one class" in said(classes_of, rows, "data", drop=True)


def test_leaving_one_out_may_leave_another_alone():
    counts = Counts(rows=4, used=4)
    kept = drop_singles(labelled([["rare", "b"], ["b", "c"], ["c"], ["c"]]), counts)
    assert [row.labels for row in kept] == [("c",), ("c",)]
    assert counts.rejected == {"a class with a single row": 2} and counts.used == 2


def test_labels_that_training_does_not_have():
    classes = classes_of(labelled(["positive", "negative"] * 2), "train")
    check_known(labelled(["negative", "positive"]), classes, "dev")
    text = said(check_known, labelled(["positiv", "negative", "neutral", "neutral", 1]), classes, "the list")
    assert "4 rows have labels that the training data does not have" in text
    assert "'positiv' (did you mean 'positive'?) (1): item 1" in text and "'neutral' (2): item 3, item 4" in text
    assert "a list of labels" in said(check_known, labelled([["positive"], []]), classes, "the list")
    several = classes_of(labelled([["a", "b"]] * 2), "train")
    check_known(labelled([["a"], []]), several, "dev")
    assert "'c' (1): item 2" in said(check_known, labelled([["a"], ["b", "c"]]), several, "the list")
    assert "and 20 more" in said(check_known, labelled(list(range(30))), classes, "dev")


HOSTILE = [None, "", " ", "\0", "\ud800", "x" * 10_000, 5, -1.5, math.nan, math.inf, True, [], ["a"], [None], {}, b"x"]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"text": st.sampled_from(HOSTILE), "label": st.sampled_from(HOSTILE)},
            optional={"text_pair": st.sampled_from(HOSTILE), "score": st.sampled_from(HOSTILE)},
        ),
        max_size=10,
    ),
    st.sampled_from([read_labelled, read_graded]),
)
def test_no_row_is_lost_or_breaks_the_reading(rows, read):
    counts, found = Counts(), []
    try:
        found = list(read([{"text": "good", "label": 1}, *rows], bad_rows="skip", counts=counts))
    except UserError:
        assert read is read_graded
    assert counts.rows == len(rows) + 1 and counts.used == len(found)
    assert counts.rows == counts.used + sum(counts.rejected.values())
    for row in found:
        assert row.text.strip() and (read is read_graded or all(isinstance(each, str) for each in row.labels))


def test_real_data(real_data):
    counts = Counts()
    rows = list(read_labelled(real_data("rotten_tomatoes/train.csv"), counts=counts))
    assert classes_of(rows, "train") == Classes(("0", "1"), (4265, 4265), False) and counts.notes == []
    rows = list(read_labelled(real_data("banking77/train.csv")))
    found = classes_of(rows, "train")
    assert len(rows) == sum(found.counts) == 10_003 and len(found.names) == 77 and min(found.counts) == 35
    check_known(read_labelled(real_data("banking77/test.csv")), found, "test")
    path = real_data("imdb/test.csv.gz")
    assert classes_of(read_labelled(path), "test") == Classes(("neg", "pos"), (12_500, 12_500), False)
    assert {row.score for row in read_graded(path)} == {1, 2, 3, 4, 7, 8, 9, 10}


def test_real_files_without_a_header(real_data, tmp_path):
    for name, wrong, right in (
        ("in_domain_train", 2528, 6023),
        ("in_domain_dev", 162, 365),
        ("out_of_domain_dev", 162, 354),
    ):
        counts = Counts()
        rows = list(read_labelled(real_data(f"cola/{name}.tsv"), columns={"text": "3", "label": "1"}, counts=counts))
        assert classes_of(rows, name) == Classes(("0", "1"), (wrong, right), False)
        assert (counts.rows, counts.used, counts.rejected, counts.notes) == (len(rows), len(rows), {}, [])
    columns = {"text": "5", "text_pair": "6", "score": "4"}
    for name, many in (("train", 5749), ("dev", 1500), ("test", 1379)):
        file = real_data(f"stsb/sts-{name}.csv")
        assert "are cells parted by tabs?" in str(refusal(read_graded, file, columns=columns)), "not what it says"
        path = tmp_path / f"{name}.tsv"
        path.write_bytes(file.read_bytes())
        rows, lines = list(read_graded(path, columns=columns)), file.read_text(encoding="utf-8").split("\n")
        assert len(rows) == many and all(row.pair and 0 <= row.score <= 5 for row in rows)
        for row, line in zip(rows, lines, strict=False):
            cells = line.split("\t")
            assert (row.text, row.pair, row.score) == (cells[5], cells[6], float(cells[4]))
