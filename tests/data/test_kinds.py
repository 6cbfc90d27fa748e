"""Data goes to the doctor of its kind."""

import json

import pytest

from embedtune import cli
from embedtune.data.kinds import check_data, kind_of_data
from embedtune.data.label_check import candidates


@pytest.mark.parametrize(
    "row, kind",
    [
        ({"text": "a"}, "text"),
        ("a text", "text"),
        ({"text": "a", "label": "x"}, "labelled"),
        ({"review": "a", "sentiment": 1}, "labelled"),
        ({"text": "a", "score": 0.5}, "graded"),
        ({"tokens": ["a"], "tags": ["O"]}, "tagged"),
        ({"question": "a", "answer": "b"}, "pairs"),
        ({"anchor": "a", "positive": "b", "label": 1}, "pairs"),
        ({"sentence1": "a", "sentence2": "b", "score": 3}, "scored pairs"),
        ({"sentence1": "a", "sentence2": "b", "score": 0.5}, "scored pairs"),
        ({"sentence1": "a", "sentence2": "b"}, "scored pairs"),
        ({"premise": "a", "hypothesis": "b", "label": "entailment"}, "labelled"),
        ({"sentence1": "a", "sentence2": "b", "label": 0.25}, "scored pairs"),
    ],
)
def test_kinds(row, kind):
    assert kind_of_data([row] * 3) == kind


@pytest.mark.parametrize(
    "columns, kind",
    [
        ({"text": "body"}, "graded"),
        ({"text": "body", "label": "stars"}, "labelled"),
        ({"text": "body", "score": "stars"}, "graded"),
        ({"score": "stars"}, "graded"),
        ({"anchor": "title", "positive": "body"}, "pairs"),
        ({"sentence1": "title", "sentence2": "body"}, "scored pairs"),
    ],
)
def test_what_the_user_names_decides(columns, kind):
    assert kind_of_data([{"title": "a", "body": "b", "stars": 3}] * 3, columns) == kind


def test_conll_files_are_tagged(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("x\tO\ny\tB-z\n\n" * 3)
    assert kind_of_data(path) == "tagged"


@pytest.mark.parametrize(
    "rows, columns, names",
    [
        ([{"text": "a", "label": "x", "stars": 3}], None, ["label", "stars"]),
        ([{"text": "a", "Topic": "x", "sentiment": "y"}], None, ["Topic", "sentiment"]),
        ([{"text": "a", "label": "x", "value": "no number"}], None, ["label"]),
        ([{"text": "a", "topic": "x", "sentiment": "y"}], {"label": "topic"}, ["topic"]),
        ([{"tokens": ["a"], "tags": ["O"], "topic": "x"}], None, ["tags"]),
        ([{"tokens": ["a"], "tags": ["O"], "ner_tags": ["O"]}], None, ["tags", "ner_tags"]),
        ([{"title": "a"}], None, []),
    ],
)
def test_candidates(rows, columns, names):
    assert candidates(rows * 3, columns) == names


def test_the_command_says_what_is_wrong_with_labels(tmp_path, capsys):
    texts = [f"{n} a film of number {n * 7} and more {n % 13}" for n in range(150)]
    path = tmp_path / "r.csv"
    path.write_text("text,label\n" + "".join(f"{t},{('good', 'bad')[n % 2]}\n" for n, t in enumerate(texts)))
    assert cli.run(["data", "check", str(path)]) == 0
    out = capsys.readouterr().out
    assert "texts with labels" in out and "classes     2" in out and out.rstrip().endswith("verdict     ready")
    with path.open("a") as file:
        file.write("one more,Good\nagain one,once\n")
    assert cli.run(["data", "check", str(path), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "labelled" and found["verdict"] == "not usable"
    said = " ".join(remark["what"] for remark in found["remarks"])
    assert "differ only by case or blanks" in said and "2 classes with a single row" in said


def test_the_command_says_what_is_wrong_with_tags(tmp_path, capsys):
    path = tmp_path / "t.conll"
    path.write_text("".join(f"x{n}\tB-a\ny{n}\tI-a\nz\tO\n\n" for n in range(120)) + "z\tO\nw\tI-a\n")
    assert cli.run(["data", "check", str(path)]) == 2
    assert "'I-a' after 'O'" in capsys.readouterr().out


def test_repeats_across_files_and_doubtful_columns_are_said(tmp_path):
    def rows(first, last):
        return "".join(f"{n} a film of number {n * 7} and more {n % 13},{n % 2},{n % 3}\n" for n in range(first, last))

    for name, part in (("test", rows(100, 130)), ("train", rows(0, 110))):
        (tmp_path / f"{name}.csv").write_text("text,label,topic\n" + part)
    said = " ".join(remark.what for remark in check_data(tmp_path).remarks)
    assert "10 rows repeat a row of another file" in said
    said = " ".join(remark.what for remark in check_data(tmp_path / "train.csv").remarks)
    assert "2 columns could hold the labels or scores: 'label', 'topic'" in said and "another file" not in said
