"""Swaps, exposure, WinoBias and recoverability on encoders whose bias is known, and on real sentences."""

import numpy as np
import pytest

from embedtune.errors import UserError
from embedtune.judge.recover import recoverability
from embedtune.judge.score import balanced, difference, mean, score, share
from embedtune.judge.swaps import (
    Reading,
    exposure,
    jobs,
    judge_exposure,
    judge_swaps,
    judge_winobias,
    own_texts,
    read_winobias,
    swapped_texts,
)

OWN = own_texts()
JOBS = dict(jobs())


class Planted:
    """Our own texts get a vector for their sentence and job; the side that they are about adds `strength` to one axis.

    A query about a job that mostly men have adds `stereotype` to that axis.
    """

    name, dimension = "planted", 40

    def __init__(self, strength, stereotype=0.0):
        self.strength, self.stereotype = strength, stereotype
        self.number = {
            text: (n, side) for side, part in ((1, OWN.texts), (-1, OWN.swapped)) for n, text in enumerate(part)
        }

    def encode(self, texts, role="text"):
        out = []
        for text in texts:
            job = next(job for job in JOBS if job in text)
            number, side = self.number.get(text, (9999, 0))
            vector = np.random.default_rng(number).normal(0, 0.1, self.dimension)
            vector[list(JOBS).index(job)] += 3
            vector[-1] = side * self.strength if side else (2 * JOBS[job] - 1) * self.stereotype
            out.append(vector)
        return np.array(out, np.float32)


def by_name(scores):
    return {found.name.split(": ")[1]: found for found in scores}


def test_every_document_of_ours_has_its_counterfactual():
    assert len(OWN.texts) == 12 * 32 == len(set(OWN.texts) | set(OWN.swapped)) / 2
    assert set(OWN.sides) == {1} and len(set(OWN.groups)) == 12
    assert not [text for text in OWN.texts if " a a" in text or " a e" in text or " a o" in text]


def test_without_bias_nothing_moves_and_nothing_can_be_read():
    found = by_name(judge_swaps(Planted(0), OWN, "jobs"))
    assert found["swap distance"].value == found["rank shift"].value == 0
    for probe in ("read by a linear probe", "read by a non-linear probe"):
        assert found[probe].low <= 0.5 <= found[probe].high and abs(found[probe].value - 0.5) < 0.1
    assert found["neighbours of the same side"].value == pytest.approx(0.5, abs=0.02)
    shown = by_name(judge_exposure(Planted(0)))
    assert shown["share of men shown"].value == pytest.approx(0.5, abs=0.03)
    assert abs(shown["men's jobs minus women's"].value) < 0.06


def test_a_planted_bias_is_found_and_compared():
    weak, strong = (by_name(judge_swaps(Planted(s), OWN, "jobs")) for s in (0, 1))
    for name, found in strong.items():
        assert found.low > found.neutral + 0.05, name
        value, low, high = difference(weak[name], found)
        assert value == pytest.approx(found.value - weak[name].value) and 0 < low <= value <= high, name
    assert strong["read by a linear probe"].value == 1
    shown = by_name(judge_exposure(Planted(1, stereotype=1)))
    assert shown["men's jobs minus women's"].value == 1 and shown["share of men shown"].value == 0.5


def test_exposure_counts_the_first_k():
    documents = np.array([[1, 0], [1, 0.1], [1, 0.2], [0, 1], [0.1, 1]], np.float32)
    marked = np.array([1.0, 1, 0, 0, 1])
    queries = np.array([[1, 0], [0, 1]], np.float32)
    np.testing.assert_allclose(exposure(queries, documents, marked, 3), [2 / 3, 1 / 3])
    alike = exposure(queries, np.ones((400, 2), np.float32), np.repeat([1.0, 0.0], 200), 100)
    assert 0.35 < alike[0] < 0.65, "equals must not be shown by where they stand"


def test_probes_read_what_is_linear_and_what_is_not():
    draw = np.random.default_rng(0)
    labels, groups = np.tile([0, 1], 200), np.repeat(np.arange(20), 20)
    noise = draw.normal(size=(400, 12))
    linear = noise + np.outer(labels, np.eye(12)[0] * 4)
    found = by_name(recoverability("x", linear, labels, groups))
    assert found["read by a linear probe"].value > 0.95 and found["neighbours of the same side"].value > 0.6
    # The mean difference of other rows is projected out: fresh rows are told no more.
    apart = (draw.normal(size=(5000, 12)) + np.eye(12)[0] * 4).mean(0) - draw.normal(size=(5000, 12)).mean(0)
    apart /= np.linalg.norm(apart)
    clean = by_name(recoverability("x", linear - np.outer(linear @ apart, apart), labels, groups))
    assert clean["read by a linear probe"].low < 0.5 < clean["read by a linear probe"].high
    # Means and covariances with the label are nil, but one side is further from the middle.
    ring = noise.copy()
    ring[:, 0] = np.where(labels == 1, draw.choice([-4.0, 4.0], 400), 0) + 0.3 * noise[:, 0]
    hidden = by_name(recoverability("x", ring, labels, groups))
    assert hidden["read by a linear probe"].value < 0.62 and hidden["read by a non-linear probe"].low > 0.8


def test_a_probe_is_judged_on_groups_that_it_has_not_seen():
    """Labels that hang on the group alone are chance: a probe judged on its own groups would have them all."""
    draw = np.random.default_rng(1)
    groups = np.repeat(np.arange(30), 10)
    vectors = draw.normal(size=(30, 16))[groups] + 0.01 * draw.normal(size=(300, 16))
    found = by_name(recoverability("x", vectors, (draw.permutation(30) % 2)[groups], groups))
    assert found["read by a linear probe"].low < 0.5 < found["read by a linear probe"].high


def test_intervals_draw_groups_together():
    values = np.repeat(np.random.default_rng(0).normal(size=20), 50)
    alone, together = mean("x", values, range(1000), 0), mean("x", values, np.repeat(np.arange(20), 50), 0)
    assert (together.high - together.low) > 4 * (alone.high - alone.low) and together.units == 20
    assert share("s", np.arange(10) < 7).value == 0.7
    np.testing.assert_allclose(balanced(np.array([1.0, 0, 0, 0]), np.array([0, 1, 1, 1]), np.ones((1, 4))), [0.5])
    with pytest.raises(ValueError, match="items"):
        difference(alone, mean("x", values[:10], range(10), 0))
    with pytest.raises(UserError, match="an interval needs at least two"):
        score("x", lambda w: w.sum(1), ["a", "a"], 0)


def test_texts_of_the_user():
    texts = [f"He likes number {n}" for n in range(25)] + ["A stone", "He likes number 3", "He met her"]
    found = swapped_texts(texts)
    assert len(found.texts) == 26 and found.swapped[0] == "She likes number 0" and found.sides.count(None) == 1
    assert len(swapped_texts(texts, most=22).texts) == 22
    with pytest.raises(UserError, match="19 texts have more words of one gender"):
        swapped_texts(texts[:19])
    with pytest.raises(UserError, match="too few"):
        recoverability("x", np.ones((30, 2)), np.arange(30) % 2, np.arange(30))


def test_winobias_is_read_and_measured(real_data, tmp_path):
    readings, odd = read_winobias(real_data("winobias"))
    assert len(readings) + odd == 4 * 396 and len(readings) > 1500
    assert readings[0] == Reading(
        "The developer argued with the designer because he did not like the design.",
        "The developer argued with the designer because she did not like the design.",
        "The developer argued with the designer because the developer did not like the design.",
        "the developer",
        1,
    )
    assert readings[1].resolved == (
        "The developer argued with the designer because the designer's idea cannot be implemented."
    )
    assert readings[1].side == 0 and len({reading.occupation for reading in readings}) == 40

    class Stereotyped:
        name, dimension = "stereotyped", 2

        def encode(self, texts, role="text"):
            near = {r.resolved: 0 for r in readings} | {r.pro: 0.1 for r in readings} | {r.anti: 0.5 for r in readings}
            return np.array([[np.cos(near[text]), np.sin(near[text])] for text in texts], np.float32)

    gap, nearer = judge_winobias(Stereotyped(), readings)
    assert gap.value == pytest.approx(np.cos(0.1) - np.cos(0.5), abs=1e-5) and gap.low > 0.1 and nearer.value == 1

    class HeIsNearer(Stereotyped):
        def encode(self, texts, role="text"):
            words = [set(text.lower().replace(".", "").split()) for text in texts]
            angles = [0.1 if w & {"he", "his", "him"} else 0.5 if w & {"she", "her"} else 0 for w in words]
            return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)

    gap, nearer = judge_winobias(HeIsNearer(), readings)
    assert abs(gap.value) < 0.01 and abs(nearer.value - 0.5) < 0.05, (
        "a pronoun that is nearer everywhere is no stereotype"
    )
    with pytest.raises(UserError, match="has 0 sentences"):
        read_winobias(tmp_path)
    (tmp_path / "pro_stereotyped_type1.txt.dev").write_text("1 [The cook] sings because [she] can.\n")
    with pytest.raises(UserError, match="missing beside its partner"):
        read_winobias(tmp_path)
