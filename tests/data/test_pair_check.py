"""The doctor for pairs: what it counts is right, what it warns of is there, and no text breaks it."""

import json
import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedtune.data.clean import text_hash
from embedtune.data.doctors import scale_of
from embedtune.data.pair_check import check_pairs, kind_of, meetings
from embedtune.errors import UserError


def varied(count, seed=0, words=8):
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(9999)}" for _ in range(words)) for _ in range(count)]


def pairs(count=200, **more):
    return [{"anchor": a, "positive": b, **more} for a, b in zip(varied(count), varied(count, 1), strict=True)]


def said(diagnosis):
    assert json.dumps(diagnosis.as_dict())
    text = "\n".join(diagnosis.lines())
    assert text.count("verdict") == 1
    return " | ".join(remark.what for remark in diagnosis.remarks)


def test_good_pairs_are_ready():
    found = check_pairs(pairs())
    assert found.verdict == "ready" and found.kind == "pairs" and not found.remarks
    assert (found.pairs, found.rows, found.used, found.batch) == (200, 200, 200, 32)
    assert [(side.name, side.texts, side.distinct) for side in found.sides] == [
        ("anchors", 200, 200),
        ("positives", 200, 200),
    ]
    assert found.sides[0].lengths.unit == "words" and found.sides[0].lengths.mean == 8
    assert found.meet == found.couples == 0


def test_counts_of_anchors_positives_and_negatives():
    rows = [
        {"anchor": a, "positive": [a + " p", a + " q"], "negative_1": "n", "negative_2": a + " m"} for a in varied(60)
    ]
    found = check_pairs(rows)
    assert (found.rows, found.pairs) == (60, 120)
    assert {side.name: (side.texts, side.distinct) for side in found.sides} == {
        "anchors": (120, 60),
        "positives": (120, 120),
        "negatives": (240, 61),
    }
    assert found.positives_per_anchor == {"mean": 2.0, "max": 2} and found.negatives_per_pair == 2
    assert "2.00 positives, at most 2" in "\n".join(found.lines())


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=9), st.integers(2, 6))
def test_meetings_are_those_of_all_batches(rows, batch):
    anchors, positives = np.array(rows).T
    batches = list(combinations(range(len(rows)), min(batch, len(rows))))
    shares = [
        [i != j and (rows[i][0] == rows[j][0] or rows[i][1] == rows[j][1]) for j in range(len(rows))]
        for i in range(len(rows))
    ]
    meet = [sum(any(shares[i][j] for j in drawn) for i in drawn) / len(drawn) for drawn in batches]
    couples = [sum(shares[i][j] for i, j in combinations(drawn, 2)) for drawn in batches]
    expected = (np.mean(meet), np.mean(couples)) if len(rows) > 1 else (0, 0)
    assert np.allclose(meetings(anchors, positives, batch), expected)


def test_texts_that_would_be_their_own_negatives_are_said():
    rows = [{"anchor": a, "positive": f"label {i % 5}"} for i, a in enumerate(varied(200))]
    found = check_pairs(rows)
    assert "100% of the pairs of a random batch of 32 meet their own anchor or positive" in said(found)
    assert found.verdict == "usable, with remarks" and found.couples == pytest.approx(496 * 39 / 199)


def test_swapped_columns():
    questions = [f"What is {text} about?" for text in varied(100, 2, 2)]
    answers = varied(100, 3, 60)
    good = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]
    assert check_pairs(good).verdict == "ready"
    swapped = check_pairs(good, columns={"anchor": "answer", "positive": "question"})
    assert "the columns look swapped: anchors have 60 words on average, positives 5, 100% of the positives" in said(
        swapped
    )
    assert "--columns anchor=" in swapped.remarks[0].fix
    without_marks = [{"anchor": a, "positive": q.rstrip("?")} for q, a in zip(questions, answers, strict=True)]
    assert "look swapped" in said(check_pairs(without_marks)), "a first word such as what is enough"
    titles = [{"anchor": a, "positive": q} for q, a in zip(varied(100, 4, 3), answers, strict=True)]
    assert check_pairs(titles).verdict == "ready", "short positives alone are no sign"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"anchor": a, "positive": "same"} for a in varied(100)], "one distinct positive for all anchors"),
        (pairs(5), "only 5 pairs: too few to learn from"),
        ([{"text": "a"}], "expected columns 'anchor', 'positive', found 'text'"),
        ([{"anchor": "", "positive": "a"}], "has no usable row: 0 of 1 rows"),
        ([{"sentence1": a, "sentence2": a[::-1], "score": 3} for a in varied(100)], "all scores are 3"),
        ([{"sentence1": a, "sentence2": "b", "score": 9 * i} for i, a in enumerate(varied(100))], "on no scale"),
    ],
    ids=["one positive", "few", "columns", "empty", "constant", "scale"],
)  # fmt: skip
def test_what_training_would_refuse(rows, message):
    found = check_pairs(rows)
    assert message in said(found) and found.verdict == "not usable"
    assert all(remark.fix for remark in found.remarks)


def test_rows_that_cannot_be_used_are_collected(tmp_path):
    path = tmp_path / "a.jsonl"
    bad = [
        '{"anchor": "", "positive": "x"}',
        '{"anchor": "x", "positive": null}',
        "{",
        '{"anchor": 3, "positive": "x"}',
    ]
    path.write_text("\n".join([json.dumps(row) for row in pairs(100)] + bad) + "\n")
    found = check_pairs(path)
    assert sum(found.rejected.values()) == 4 and found.rows == 104 and found.used == found.pairs == 100
    assert found.verdict == "usable, with remarks"
    text = said(found)
    assert "(column 'anchor' is empty)" in text and "(column 'positive' is empty)" in text and "(not JSON)" in text
    assert str(path) in "\n".join(found.lines()) and f"{path.stat().st_size:,} bytes in 1 file" in "\n".join(
        found.lines()
    )


def test_repeats():
    rows = pairs(200)
    rows += [{"anchor": row["anchor"].upper(), "positive": row["positive"] + " "} for row in rows[:10]]
    longer = [{"anchor": a, "positive": b} for a, b in zip(varied(40, 5, 30), varied(40, 6, 30), strict=True)]
    rows += longer + [{"anchor": row["anchor"] + " x", "positive": "y " + row["positive"]} for row in longer]
    rows += [{"anchor": row["anchor"], "positive": row["anchor"].upper()} for row in rows[:3]]
    found = check_pairs(rows)
    assert (found.exact_duplicates, found.near_duplicates, found.identical_sides) == (10, 40, 3)
    text = said(found)
    assert "10 pairs (3.4%) repeat an earlier one" in text and "40 of the first 293 pairs nearly repeat" in text
    assert "3 pair(s) have the same text on both sides" in text


def scored(scores):
    return [{"sentence1": a, "sentence2": a[::-1], "score": score} for a, score in zip(varied(len(scores)), scores)]


@pytest.mark.parametrize(
    ("scores", "scale"),
    [
        ([0, 0.5, 1], (0, 1)),
        ([-0.01, 0.5, 1], (-1, 1)),
        ([0, 2.5, 5], (0, 5)),
        ([3, 7], (0, 10)),
        ([50, 100], (0, 100)),
        ([*np.linspace(0, 1, 100), 37], (0, 1)),
        ([*np.linspace(0, 1, 500), -0.3, -0.2], (-1, 1)),
        ([*np.linspace(0, 5, 100), -4], (0, 5)),
        ([0, 0.5, 37], (0, 100)),
        ([-50, 50], None),
    ],
)
def test_scales(scores, scale):
    assert scale_of(np.array(scores, float)) == scale


def test_scored_pairs():
    found = check_pairs(scored([i % 6 for i in range(120)]))
    assert found.kind == "scored pairs" and found.verdict == "ready"
    assert found.scores.scale == (0, 5) and found.scores.histogram == [20, 0, 20, 0, 20, 0, 20, 0, 20, 20]
    assert (found.scores.low, found.scores.high, found.scores.mean) == (0, 5, 2.5)
    assert "120, 0 to 5, mean 2.5; a scale of 0 to 5" in "\n".join(found.lines())


def test_scores_beyond_the_scale_and_scores_that_are_none(tmp_path):
    rows = scored([*(i / 400 for i in range(400)), 37, "x", None, "nan", -0.5])
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = check_pairs(path)
    assert found.scores.scale == (0, 1) and found.scores.beyond == 2 and found.verdict == "not usable"
    assert f"2 score(s) lie outside of 0 to 1: {path}, line 401: 37; {path}, line 405: -0.5" in said(found)
    assert sum(found.rejected.values()) == 3 and "finite number" in said(found)
    without = check_pairs([{"sentence1": a, "sentence2": a[::-1]} for a in varied(100)])
    assert without.scores is None and "no scores" in said(without) and without.verdict == "usable, with remarks"


def test_lengths_in_tokens_and_what_would_be_cut(tiny_model):
    from embedtune.encoder import load

    tokenizer = load.load_tokenizer(tiny_model("minilm"))
    rows = [{"anchor": "ba " * 4 + text, "positive": "ba " * 40 + text} for text in varied(50)]
    found = check_pairs(rows, tokenizer=tokenizer, max_length=30)
    expected = [
        [len(tokenizer(row[name], truncation=False)["input_ids"]) for row in rows] for name in ("anchor", "positive")
    ]
    for side, lengths in zip(found.sides, expected, strict=True):
        assert side.lengths.mean == pytest.approx(np.mean(lengths)) and side.lengths.max == max(lengths)
        assert side.lengths.longer == sum(length > 30 for length in lengths)
        assert side.cut == pytest.approx(sum(max(0, length - 30) for length in lengths) / sum(lengths))
    assert "50 positives (100%) are longer than 30 tokens" in said(found)
    assert found.unknown_share is not None
    with pytest.raises(UserError, match="no fast tokenizer"):
        check_pairs(rows, tokenizer=object())


def test_kinds(tmp_path):
    assert kind_of([{"Query": "a", "Passage": "b"}]) == "pairs"
    assert kind_of([{"sentence1": "a", "sentence2": "b", "label": 1}]) == "scored pairs"
    assert kind_of([{"text": "a"}]) is None and kind_of(["a"]) is None
    assert kind_of(["a"], {"anchor": "text", "positive": "text"}) == "pairs"
    assert kind_of(["a"], {"score": "text"}) == "scored pairs"
    with pytest.raises(UserError, match="is empty"):
        kind_of([])
    with pytest.raises(UserError, match="cannot be read"):
        check_pairs(tmp_path / "missing.jsonl")


def test_one_unreadable_file_hides_no_other(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(100)))
    (tmp_path / "b.jsonl").write_text('{"text": "no pairs here"}\n')
    found = check_pairs(tmp_path)
    assert found.pairs == 100 and found.verdict == "not usable" and "b.jsonl: expected columns" in said(found)


HOSTILE = [
    *("\ud800", "\0", "", " ", "\u3000", "x" * 300_000, "?" * 1000, "\u202e?", "a\u2028b", "\ufeff", "¿", "'"),
    *("'?", "NaN", None, 7, ["a", "b"], [], [None], {"a": 1}, float("nan"), True, b"bytes"),
]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {name: st.sampled_from(HOSTILE) for name in ("anchor", "positive")},
            optional={"negative": st.sampled_from(HOSTILE), "score": st.sampled_from(HOSTILE)},
        ),
        min_size=1,
        max_size=12,
    ),
    st.booleans(),
)
def test_hostile_cells(rows, as_scores):
    if as_scores:
        rows = [{"sentence1": r["anchor"], "sentence2": r["positive"], "score": r.get("score")} for r in rows]
    found = check_pairs(rows)
    assert found.rows == found.used + sum(found.rejected.values())
    assert "\n".join(found.lines()) and found.verdict in ("ready", "usable, with remarks", "not usable")
    assert np.isfinite([found.meet, found.couples]).all()


def test_no_message_quotes_the_text():
    secret = "Jane-Doe-has-gout"
    rows = [{"anchor": f"{secret} {i}", "positive": secret} for i in range(20)] + [{"anchor": secret, "positive": None}]
    assert secret not in "\n".join(check_pairs(rows).lines())
    assert secret not in str(check_pairs([{"sentence1": secret, "sentence2": secret, "score": secret}] * 9).as_dict())


def test_real_pairs(real_data):
    found = check_pairs(real_data("medquad/medquad.jsonl"))
    assert found.pairs == 16_407 and found.verdict in ("ready", "usable, with remarks")
    lines = real_data("medquad/medquad.jsonl").read_text(encoding="utf-8").splitlines()
    assert len({text_hash(json.loads(line)["question"]) for line in lines}) == 14_345
    assert found.sides[0].distinct == 14_345 and found.sides[0].questions > 0.99
    folder = check_pairs(real_data("scifact"))
    assert folder.pairs == 919 and "the judgements of 'train'" in " ".join(folder.notes)
