"""The report of a run on labels: all of it there, and nothing of the data alive in it."""

import numpy as np
import pytest
from test_page import Reader, assert_harmless, replaced

from embedtune import plots_labels
from embedtune.judge.page import page
from payloads import PAYLOADS

NAMES = ["good", "bad", "middling"]
ORDER = ["scores", "answers", "changed", "training", "data", "limits", "repeat"]
STANDS_ON = {"scores": ["tables"], "answers": ["classes", "confusion", "mistakes", "reliability"],
             "changed": ["changed"], "training": ["log"], "data": ["profile", "remarks"],
             "repeat": ["repeat", "recipe", "machine"]}  # fmt: skip


@pytest.fixture
def story():
    row = {"measure": "F1", "constant": 0.2, "base": 0.71, "tuned": 0.76, "change": 0.05, "low": 0.01, "high": 0.09}
    rows = [
        {**row, "p": 0.01, "lower": False},
        {**row, "measure": "log_loss", "constant": None, "p": 0.2, "lower": True},
    ]
    change = {"query": "a text that changed", "change": 0.4, "right": "good", "base": "bad", "tuned": "good"}
    each = {"name": "good", "precision": 0.8, "recall": 0.7, "F1": 0.75, "support": 40, "low": 0.6, "high": 0.86}
    return {
        "kind": "labels", "task": "classify", "title": "minilm on reviews.csv", "base": "minilm", "model": "tuned",
        "verdict": {"word": "WIN", "sentence": "WIN: better; kept.", "queries": "real", "kept": "kept", "changes": ""},
        "profile": {"rows": 600, "class good": 200}, "remarks": ["9 rows left out: they repeat an earlier one"],
        "log": [{"step": s, "loss": 1 / (s + 1), "lr": 1e-5, "dev_F1": 0.5, "dev_loss": 0.9} for s in range(9)],
        "tables": [{"name": "test", "items": 120, "rows": rows}], "measure": "F1",
        "models": [{"name": name, "value": 0.5, "low": 0.4, "high": 0.6} for name in ("majority class", "tuned")],
        "classes": [{**each, "name": name, "base": 0.7, "base_low": 0.5, "base_high": 0.8} for name in NAMES],
        "confusion": {"counts": [[30, 5, 5], [4, 30, 6], [9, 1, 30]], "names": list(NAMES)},
        "mistakes": [{"right": "middling", "said": "good", "rows": 9, "of": 40}],
        "reliability": {"bins": [[0.0] * 12 + [0.85, 0.9, 0.98], [0.0] * 12 + [0.8, 0.9, 1.0], [0] * 12 + [10, 20, 90]],
                        "ECE": 0.03},
        "changed": {"better": [change], "worse": [{**change, "change": -0.3, "query": "a text that lost"}]},
        "repeat": ["embedtune run reviews.csv"], "recipe": 'task = "run"\n', "machine": {"torch": "2.13.0"},
    }  # fmt: skip


def test_all_of_it_is_there_in_order_and_speaks_of_rows_not_of_queries(story):
    read = assert_harmless(page(story))
    assert [i for i in read.ids if i in ORDER] == ORDER == [a["href"][1:] for a in read.of("a")]
    for words in ("majority class", "linear probe to tuned (120 test rows)", "0.7100 to 0.7600", "+0.0100 to +0.0900",
                  "log loss (less is better)", "0.6000 to 0.8600", "a text that lost", "9 rows left out"):  # fmt: skip
        assert words in read.text, words
    assert "quer" not in read.text and "document" not in read.text and "Vectors" not in read.text
    assert len(read.of("svg")) == 4  # changes, confusion, reliability, training


@pytest.mark.parametrize("section", STANDS_ON)
def test_a_missing_part_leaves_no_heading(story, section):
    for part in STANDS_ON[section]:
        del story[part]
    read = assert_harmless(page(story))
    left = [name for name in ORDER if name != section]
    assert [i for i in read.ids if i in ORDER] == left == [a["href"][1:] for a in read.of("a")]


@pytest.mark.parametrize("payload", PAYLOADS[::8])
def test_no_text_of_the_data_comes_alive(story, payload):
    hurt = replaced(story, str, lambda _: payload)
    hurt |= {"kind": "labels", "task": "classify", "measure": "F1"}
    hurt["verdict"]["queries"] = "real"
    assert_harmless(page(hurt))


def test_scores_have_a_scatter_and_many_classes_no_matrix(story):
    story["scatter"] = {"right": [1.0, 2.0, 3.0], "said": [1.1, 1.9, 3.2]}
    many = [f"class {n}" for n in range(plots_labels.NUMBERED + 1)]
    story["confusion"] = {"counts": np.eye(len(many), dtype=int).tolist(), "names": many}
    read = Reader(page(story))
    labels = " ".join(a["aria-label"] for a in read.of("svg"))
    assert "Predicted scores" in labels and "taken for" not in labels and "Most frequent mistakes" in read.text
