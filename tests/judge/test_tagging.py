import json
import random
import warnings

import numpy as np
import pytest

from embedtune.data.tags import spans
from embedtune.errors import UserError
from embedtune.judge.report import from_dict
from embedtune.judge.tagging import STATISTICS, per_type, tagging_report

TAGS = ["O", "O", *(f"{letter}-{kind}" for letter in "BI" for kind in ("PER", "LOC", "corporation"))]
MORE = [*TAGS, *(f"{letter}-{kind}" for letter in "ES" for kind in ("PER", "LOC"))]


def judged(gold, predicted):
    items = [f"f.conll:{n}" for n in range(len(gold))]
    return tagging_report(gold, predicted, items=items, model="m", data="d")


def sentences(seed: int, count: int, tags=TAGS):
    """Random tags, mostly ill-formed, of sentences of 0 to 12 tokens, and others that differ here and there."""
    draw = random.Random(seed)
    gold = [draw.choices(tags, k=draw.randint(0, 12)) for _ in range(count)]
    predicted = [[tag if draw.random() < 0.8 else draw.choice(tags) for tag in row] for row in gold]
    return gold, predicted


def theirs(gold, predicted):
    """seqeval's report in its default mode, and its accuracy."""
    seqeval = pytest.importorskip("seqeval.metrics")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = seqeval.classification_report(gold, predicted, output_dict=True, zero_division=0)
        return found, seqeval.accuracy_score(gold, predicted)


@pytest.mark.parametrize("tags", [TAGS, MORE], ids=["BIO", "BIOES"])
def test_same_as_seqeval_on_1000_random_sequences(tags):
    gold, predicted = sentences(0, 1000, tags)
    report, (found, accuracy) = judged(gold, predicted), theirs(gold, predicted)
    micro = found["micro avg"]
    wanted = {"precision": micro["precision"], "recall": micro["recall"], "F1": micro["f1-score"]}
    assert report.summary == pytest.approx({**wanted, "accuracy": accuracy}, abs=1e-12)
    assert report.gold.sum() == micro["support"] > 1000
    for row in per_type(report):
        mine = found[row.name]
        assert row[1:] == pytest.approx((mine["precision"], mine["recall"], mine["f1-score"], mine["support"]))
    assert [row.name for row in per_type(report)] == sorted({"PER", "LOC", "corporation"})


def test_same_as_seqeval_one_by_one():
    for gold, predicted in zip(*sentences(1, 300)):
        if gold:
            report, (found, accuracy) = judged([gold], [predicted]), theirs([gold], [predicted])
            assert report.summary["accuracy"] == pytest.approx(accuracy)
            assert report.summary["F1"] == pytest.approx(found["micro avg"]["f1-score"] if len(found) > 3 else 0)


def test_type_and_both_ends():
    gold = [["B-PER", "I-PER", "O", "B-LOC"]]
    for predicted, right in [
        (["B-PER", "I-PER", "O", "B-LOC"], 2),
        (["B-PER", "O", "O", "B-LOC"], 1),
        (["B-LOC", "I-LOC", "O", "B-LOC"], 1),
        (["B-PER", "I-PER", "I-PER", "I-LOC"], 1),
        (["O", "O", "O", "O"], 0),
    ]:
        report = judged(gold, [predicted])
        assert report.gold.tolist() == [2]
        assert report.predicted.tolist() == [[len(spans(predicted)), right]]
        assert report.summary["recall"] == right / 2


def test_nothing_to_divide_by():
    for sentence in (["O", "O"], []):
        report = judged([sentence], [sentence])
        assert report.classes == () and per_type(report) == []
        assert report.summary == {"precision": 0, "recall": 0, "F1": 0, "accuracy": float(bool(sentence))}
    only_predicted = judged([["O"]], [["B-PER"]])
    assert only_predicted.summary["precision"] == only_predicted.summary["recall"] == 0
    assert per_type(only_predicted) == [("PER", 0, 0, 0, 0)]


@pytest.mark.parametrize("name", STATISTICS)
def test_weights_are_repetitions(name):
    gold, predicted = sentences(2, 40)
    report, draw = judged(gold, predicted), np.random.default_rng(0)
    weights = draw.multinomial(40, np.full(40, 1 / 40), 20)
    found = STATISTICS[name](report, weights.astype(float))
    for row, value in zip(weights, found):
        repeated = [[side[n] for n in np.repeat(np.arange(40), row)] for side in (gold, predicted)]
        assert value == pytest.approx(judged(*repeated).summary[name], abs=1e-12)


def test_goes_through_json():
    for gold, predicted in (sentences(3, 30), ([["O"], []], [["O"], []])):
        report = judged(gold, predicted)
        again = from_dict(json.loads(json.dumps(report.as_dict(), allow_nan=False)))
        assert again.as_dict() == report.as_dict() and per_type(again) == per_type(report)
        np.testing.assert_array_equal(again.counts, report.counts)
    assert report.dim == 0 and report.task == "tagging" and report.values == {}


def test_what_cannot_be_judged():
    with pytest.raises(UserError, match="d: has nothing to judge on"):
        judged([], [])
    with pytest.raises(ValueError, match="2 sentences of d have more or fewer predicted tags than gold: f.conll:1"):
        judged([["O"], ["O"], ["O", "O"]], [["O"], [], ["O"]])
