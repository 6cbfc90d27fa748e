"""The doctor for labels: what it counts is right, what it warns of is there, and no data breaks it."""

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedtune.data.label_check import check_labels, kind_of_labels
from embedtune.data.labels import LABEL, SCORE
from embedtune.errors import UserError


def varied(count, seed=0, words=8):
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(9999)}" for _ in range(words)) for _ in range(count)]


def labelled(*labels, **more):
    return [{"text": text, "label": label, **more} for text, label in zip(varied(len(labels)), labels)]


def graded(*scores):
    return [{"text": text, "score": score} for text, score in zip(varied(len(scores)), scores)]


def tagged(count=150):
    tags = ["O", "B-a", "I-a", "O", "B-b", "O", "B-a", "O"]
    return [{"tokens": text.split(), "tags": tags} for text in varied(count)]


def said(found):
    """What the remarks say; after a look at the report."""
    assert json.dumps(found.as_dict())
    text = "\n".join(found.lines())
    assert text.count("verdict") == 1 and found.rows == found.used + sum(found.rejected.values())
    return " | ".join(remark.what for remark in found.remarks)


def test_good_labels_are_ready():
    found = check_labels(labelled(*["b", "a", "a"] * 50), "labelled")
    assert said(found) == "" and found.verdict == "ready"
    assert [(each.name, each.count, round(each.share, 3)) for each in found.classes] == [
        ("a", 100, 0.667),
        ("b", 50, 0.333),
    ]
    assert (found.rows, found.used, found.multi, found.paired, found.without) == (150, 150, False, False, 0)
    assert found.lengths.unit == "words" and found.lengths.mean == 8 and found.scores is None
    text = "\n".join(found.lines())
    assert "list, texts with labels" in text and "classes     2" in text
    assert f"            a       100  66.7% {'#' * 30}" in text and f"b        50  33.3% {'#' * 15}" in text


def test_lists_of_labels():
    found = check_labels(labelled(*[["a", "b"], [], ["b"]] * 50), "labelled")
    assert said(found) == "" and found.multi and found.without == 50
    assert [(each.name, each.count) for each in found.classes] == [("a", 50), ("b", 100)]
    text = "\n".join(found.lines())
    assert "classes     2, any number a row" in text and "50 rows without a label" in text


@pytest.mark.parametrize(
    "labels, says",
    [
        (["a"] * 120, "only one class, 'a'"),
        (["a"] * 90 + ["b"] * 90 + ["c"], "1 class with a single row: 'c' (item 181)"),
        (["a"] * 90 + ["A "] * 90, "differ only by case or blanks: 'a' (90 rows, first item 1), 'A ' (90 rows, first"),
    ],
)
def test_what_training_would_refuse(labels, says):
    found = check_labels(labelled(*labels), "labelled")
    assert says in said(found) and found.verdict == "not usable"


def test_imbalance():
    found = check_labels(labelled(*["a"] * 110 + ["b"] * 10), "labelled")
    text = said(found)
    assert "'a' has 11 times as many rows as 'b' (110 and 10)" in text and "92% of the rows are 'a'" in text
    assert found.verdict == "usable, with remarks"
    assert said(check_labels(labelled(*["a"] * 100 + ["b"] * 10 + ["c"] * 20), "labelled")) == ""
    assert "81% of the rows" in said(check_labels(labelled(*["a"] * 162 + ["b"] * 38), "labelled"))
    rows = [*tagged(), {"tokens": ["x"], "tags": ["B-c"]}]
    assert "'a' has 300 times as many entities as 'c'" in said(check_labels(rows, "tagged"))


def test_few_rows_a_class_and_the_way_to_learn_from_them():
    found = check_labels(labelled(*["a", "b", "c"] * 16), "labelled")
    assert "16 rows a class, in the middle of the classes: few" in said(found)
    assert "embedtune run FILE" in found.remarks[-1].fix
    assert "rows a class" not in said(check_labels(labelled(*["a", "b", "c"] * 17), "labelled"))
    many = [f"class {n}" for n in range(100)]
    assert "10 rows a class" in said(check_labels(labelled(*many * 10), "labelled"))
    assert "rows a class" not in said(check_labels(labelled(*many * 11), "labelled"))


def test_repeats_and_contradictions():
    rows = labelled(*["a", "b"] * 60)
    longer = varied(20, 7, 30)
    rows += [{"text": text, "label": "a"} for text in longer]
    rows += [{"text": text + " x", "label": "b" if n < 4 else "a"} for n, text in enumerate(longer)]  # near
    rows += [{"text": rows[n]["text"].upper() + " ", "label": "a"} for n in range(6)]  # exact; three were "b"
    found = check_labels(rows, "labelled")
    assert (found.exact_duplicates, found.near_duplicates, found.conflicts) == (6, 20, 7)
    assert found.conflict_examples[0] == "the list, item 141 is like item 121"
    text = said(found)
    assert "7 rows repeat an earlier one, exactly or nearly, but not its label: the list, item 141 is like" in text
    assert "6 rows (3.6%) repeat an earlier one" in text and "20 of the first 166 rows nearly repeat" in text


def test_pairs_repeat_only_on_both_sides():
    rows = [{"text": "the same premise again", "text_pair": text, "label": n % 2} for n, text in enumerate(varied(100))]
    found = check_labels(rows, "labelled")
    assert found.paired and (found.exact_duplicates, found.near_duplicates, found.conflicts) == (0, 0, 0)
    assert "pairs of texts with labels" in found.lines()[0] and found.lengths.mean == 12
    found = check_labels([*rows, {**rows[0], "label": 1}], "labelled")
    assert found.conflicts == found.exact_duplicates == 1


def test_scores():
    found = check_labels(graded(*[n % 6 for n in range(120)]), "graded")
    assert said(found) == "" and found.scores.scale == (0, 5) and found.classes == []
    assert "120, 0 to 5, mean 2.5; a scale of 0 to 5" in "\n".join(found.lines())
    rows = graded(*[n % 6 for n in range(120)], 50, None, "x")
    found = check_labels(rows, "graded")
    text = said(found)
    assert (
        "1 score(s) lie outside of 0 to 5: the list, item 121: 50" in text and found.verdict == "usable, with remarks"
    )
    assert sum(found.rejected.values()) == 2 and "holds no finite number" in text
    rows = [*graded(*[n % 6 for n in range(120)]), {**graded(0)[0], "score": 0.9}, {**graded(0)[0], "score": 1.1}]
    found = check_labels(rows, "graded")
    assert found.exact_duplicates == 2 and found.conflict_examples == ["the list, item 122 is like item 1"]
    found = check_labels(graded(*[1] * 120), "graded")
    assert found.verdict == "not usable" and "nothing to learn" in said(found)


def test_tags(tmp_path):
    found = check_labels(tagged(), "tagged")
    assert said(found) == "" and found.scheme == "BIO" and found.without == 0
    assert [(each.name, each.count, round(each.share, 2)) for each in found.classes] == [
        ("a", 300, 0.67),
        ("b", 150, 0.33),
    ]
    assert "texts with tags (BIO)" in found.lines()[0] and found.lengths.mean == 8
    assert "types       2" in "\n".join(found.lines())
    path = tmp_path / "a.conll"
    path.write_text(
        "\n".join(f"{word}\t{tag}" for word, tag in [("x", "B-a"), ("y", "I-a")] * 60).replace("y\tI-a", "y\tI-a\n")
    )
    with path.open("a") as file:
        file.write("\nz\tO\nz\tI-a\n\nx\tO\ny\tI-a\n\nbad\n")
    found = check_labels(path, "tagged")
    text = said(found)
    assert (
        found.verdict == "not usable" and f"{path}: 2 tags break the rules of BIO; 'I-a' after 'O' (2): line 1" in text
    )
    assert found.rejected == {"a token without a tag": 1} and f"{path}, line 187" in text
    assert found.conflict_examples == [f"{path}, line 184 is like line 1"] and found.conflicts == 1
    found = check_labels([{"tokens": text.split(), "tags": ["O"] * 8} for text in varied(120)], "tagged")
    assert found.verdict == "not usable" and "no tag but O" in said(found) and found.without == 120


def test_lengths_in_tokens_and_what_would_be_cut(tiny_model):
    from embedtune.encoder import load

    tokenizer = load.load_tokenizer(tiny_model("minilm"))
    rows = [
        {"text": "ba " * (n % 30) + text, "text_pair": "ba " * 40, "label": n % 2} for n, text in enumerate(varied(120))
    ]
    lengths = [len(tokenizer(row["text"], row["text_pair"], truncation=False)["input_ids"]) for row in rows]
    limit = int(np.median(lengths))
    found = check_labels(rows, "labelled", tokenizer=tokenizer, max_length=limit)
    assert found.lengths.mean == pytest.approx(np.mean(lengths)) and found.lengths.max == max(lengths)
    assert found.lengths.longer == sum(length > limit for length in lengths) > 24
    assert found.cut == pytest.approx(sum(max(0, length - limit) for length in lengths) / sum(lengths))
    assert f"are longer than {limit} tokens" in said(found) and found.unknown_share is not None
    for kind, rows in (("tagged", tagged()), ("labelled", labelled(*"ab" * 60))):
        found = check_labels(rows, kind, tokenizer=tokenizer, max_length=100)
        texts = [row.get("text") or " ".join(row["tokens"]) for row in rows]
        assert found.lengths.mean == pytest.approx(np.mean([len(tokenizer(text)["input_ids"]) for text in texts]))
    with pytest.raises(UserError, match="no fast tokenizer"):
        check_labels(labelled("a", "b"), "labelled", tokenizer=object())


def test_one_unreadable_file_hides_no_other(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled(*"ab" * 60)))
    (tmp_path / "b.jsonl").write_text('{"text": "no labels here"}\n')
    found = check_labels(tmp_path, "labelled")
    assert [each.count for each in found.classes] == [60, 60] and found.verdict == "not usable"
    assert "b.jsonl: expected columns 'text', 'label'" in said(found)
    with pytest.raises(UserError, match="cannot be read"):
        check_labels(tmp_path / "missing.csv", "labelled")


def test_few_rows_and_many_classes():
    assert "only 20 rows" in said(check_labels(labelled(*"ab" * 10), "labelled"))
    found = check_labels(labelled(*[f"class {n}" for n in range(50) for _ in range(n + 2)]), "labelled")
    text = "\n".join(found.lines())
    assert "classes     50" in text and "... 30 more ..." in text
    assert all(f"class {n} " in text for n in (0, 9, 40, 49)) and "class 20 " not in text


@pytest.mark.parametrize(
    "row, kind",
    [
        *(({"text": "a", name: "x"}, "labelled") for name in LABEL),
        *(({"text": "a", name: 0.5}, "graded") for name in SCORE),
        *(({"text": "a", name: 3}, "labelled" if name == "label" else "graded") for name in SCORE),
        ({"Review": "a", "Sentiment": ["x", "y"]}, "labelled"),
        ({"text": "a", "label": "neg", "stars": 3}, "labelled"),
        ({"premise": "a", "hypothesis": "b", "label": "entailment"}, "labelled"),
        ({"sentence1": "a", "sentence2": "b", "score": "0.5"}, "graded"),
        ({"text": "a", "grade": "B+"}, None),
        ({"tokens": ["a"], "ner_tags": ["O"]}, "tagged"),
        ({"words": ["a"], "labels": ["O"]}, "tagged"),
        ({"tokens": "a b", "tags": "O O"}, None),
        ({"text": "a"}, None), ({"label": "a"}, None), ({"question": "a", "answer": "b"}, None), ("a text", None),
    ],
)  # fmt: skip
def test_kinds(row, kind):
    assert kind_of_labels([row]) == kind


def test_kinds_by_content_and_by_what_the_user_says(tmp_path):
    assert kind_of_labels(labelled(*[n / 7 for n in range(50)])) == "graded"
    assert kind_of_labels(labelled(*[float(n) for n in range(50)])) == "labelled"
    assert kind_of_labels(labelled(*[1.0] * 50, 0.5)) == "labelled", "one fraction is a mistake"
    assert kind_of_labels(labelled(*[0.5] * 50, "x")) == "labelled"
    assert kind_of_labels(labelled(*[0.5] * 50, None, "")) == "graded"
    assert kind_of_labels([{"text": "a", "x": 1}], {"score": "x"}) == "graded"
    assert kind_of_labels([{"text": "a", "score": 1}], {"label": "score"}) == "labelled"
    assert kind_of_labels([{"a": ["a"], "b": ["O"]}], {"tokens": "a", "tags": "b"}) == "tagged"
    assert kind_of_labels([{"a": "a", "label": "O"}], {"text": "a"}) == "labelled"
    for name in ("a.conll", "b.tsv", "c.txt"):
        (tmp_path / name).write_text("x\tO\ny\tB-z\n")
        assert kind_of_labels(tmp_path / name) == "tagged"
    (tmp_path / "a.conll").unlink()
    assert kind_of_labels(tmp_path) == "tagged"
    with pytest.raises(UserError, match="is empty"):
        kind_of_labels([])


HOSTILE = [None, "", " ", "\0", "\ud800", "x" * 9999, "a", "b", 1, 2, 0.5, math.nan, True, ["a"], [], ["O"], {}, b"x"]


@settings(max_examples=120, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries({name: st.sampled_from(HOSTILE) for name in ("text", "label", "tokens", "tags")}),
        min_size=1,
        max_size=10,
    ),
    st.sampled_from(["labelled", "graded", "tagged"]),
)
def test_hostile_cells(rows, kind):
    if kind == "graded":
        rows = [{"text": row["text"], "score": row["label"]} for row in rows]
    found = check_labels(rows, kind)
    said(found)
    assert found.verdict in ("ready", "usable, with remarks", "not usable")


def test_no_message_quotes_the_text():
    secret = "Jane-Doe-has-gout"
    rows = [{"text": secret, "label": n % 3} for n in range(20)] + [{"text": secret, "label": None}]
    for kind in ("labelled", "graded"):
        assert secret not in "\n".join(check_labels(rows, kind).lines())
    rows = [{"tokens": [secret, secret], "tags": ["O", "I-a"]}, {"tokens": [secret], "tags": []}]
    assert secret not in "\n".join(check_labels(rows, "tagged").lines())


@pytest.mark.parametrize(
    "name, kind, classes",
    [
        ("rotten_tomatoes/train.csv", "labelled", 2),
        ("banking77/train.csv", "labelled", 77),
        ("wnut17/train.conll", "tagged", 6),
        ("bc5cdr/train.tsv", "tagged", 2),
    ],
)
def test_real_data(real_data, name, kind, classes):
    path = real_data(name)
    assert kind_of_labels(path) == kind
    found = check_labels(path, kind)
    assert len(found.classes) == classes and found.verdict != "not usable" and not found.rejected
    assert found.conflicts == (13 if "wnut17" in name else 0)
