"""Association tests: exact p against brute force, type I errors, planted bias found and erased, mistakes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedtune.errors import UserError
from embedtune.judge import association as module
from embedtune.judge.association import (
    AssociationTest,
    association,
    judge_association,
    lists,
    permutation_p,
    unit,
)

VALUES = st.integers(1, 6).flatmap(
    lambda m: st.tuples(*[st.lists(st.integers(-3, 3).map(lambda n: n / 7), min_size=m, max_size=m)] * 2)
)


def brute(x, y):
    """The share of all divisions whose X has at least the sum that it has."""
    values = [*x, *y]
    sums = [sum(values[i] for i in some) for some in itertools.combinations(range(len(values)), len(x))]
    return sum(each >= sum(x) - 1e-9 for each in sums) / len(sums)


@settings(max_examples=100, deadline=None)
@given(VALUES)
def test_exact_p_is_that_of_all_divisions_ties_included(sides):
    assert permutation_p(*map(np.array, sides)) == (pytest.approx(brute(*sides), abs=1e-12), 0.0)


def test_exact_p_of_groups_of_unequal_size():
    x, y = np.array([3.0, 1.0, 2.5]), np.array([0.5, 2.0, 1.5, 0.1, 2.7])
    assert permutation_p(x, y)[0] == pytest.approx(brute(x, y))


def test_many_values_are_drawn_and_agree_with_the_exact_p():
    draw = np.random.default_rng(0)
    x, y = draw.normal(0.4, 1, 20), draw.normal(0, 1, 20)
    exact, none = permutation_p(x, y)
    more = np.concatenate([y, [y.mean()]])  # a value more than can be counted, which changes little
    drawn, error = permutation_p(x, more, seed=3)
    assert none == 0 and 0 < error < 0.002
    assert drawn == pytest.approx(exact, abs=0.02) and drawn == permutation_p(x, more, seed=3)[0]
    assert permutation_p(np.full(30, 9.0) + draw.normal(0, 1, 30), np.zeros(30), draws=999)[0] == 1 / 1000


@pytest.mark.parametrize("m", [2, 3, 5])
def test_type_one_error_is_never_above_its_level(m):
    """Drawing divisions with replacement, as WEFE 1.0 does, rejects 13 % of true nulls at 5 % where m = 2."""
    draw = np.random.default_rng(m)
    ours = theirs = 0
    trials = 400
    for _ in range(trials):
        values = draw.normal(size=2 * m)
        ours += permutation_p(values[:m], values[m:])[0] <= 0.05
        resampled = draw.choice(values, (2000, 2 * m))
        drawn = resampled[:, :m].mean(1) - resampled[:, m:].mean(1)
        theirs += np.mean(drawn > values[:m].mean() - values[m:].mean()) <= 0.05
    assert ours / trials <= 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / trials)
    if m == 2:
        assert ours == 0 and theirs / trials > 0.08


def planted(strength, seed=0):
    """X and Y, A and B on the two sides of one direction of noise."""
    draw = np.random.default_rng(seed)
    side = np.repeat([1, -1, 1, -1], 8)
    noise = draw.normal(size=(32, 24))
    noise[:, 0] = strength * side + 0.1 * draw.normal(size=32)
    return np.split(noise, 4)


def test_a_planted_bias_is_found_and_gone_where_its_direction_is_removed():
    found = association("planted", *planted(2.0))
    assert found.value > 1.5 and found.low > 1 and found.p == 1 / 12870 and found.p_error == 0
    sides = planted(2.0)
    gone = sides[0].mean(0) - sides[1].mean(0)
    gone /= np.linalg.norm(gone)
    clean = association("planted", *[side - np.outer(side @ gone, gone) for side in sides])
    assert abs(clean.value) < 1 and clean.p > 0.05 and clean.low < 0 < clean.high


def test_the_effect_size_is_the_papers():
    x, y, a, b = planted(0.5, seed=4)
    x, y = x[:6], y[:5]
    ux, uy, ua, ub = map(unit, (x, y, a, b))
    s = np.array([np.mean(ua @ w) - np.mean(ub @ w) for w in (*ux, *uy)])
    for ddof in (0, 1):
        wanted = (s[:6].mean() - s[6:].mean()) / s.std(ddof=ddof)
        assert association("d", x, y, a, b, ddof=ddof).value == pytest.approx(wanted)
    assert association("d", y, x, a, b).value == pytest.approx(-association("d", x, y, a, b).value)
    assert association("d", x * 7, y, a, b).value == pytest.approx(association("d", x, y, a, b).value)


def test_words_that_are_all_alike_have_no_effect():
    same = np.ones((8, 4))
    found = association("same", same, same, same, same)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


class Words:
    """An encoder to which a text is the word of it that it knows, on one axis."""

    name, dimension = "words", 3

    def __init__(self, sides):
        self.sides = sides

    def encode(self, texts, role="text"):
        draw = np.random.default_rng(len(texts))
        near = [next((s for word, s in self.sides.items() if f" {word}." in f" {text}."), 0) for text in texts]
        return np.stack([np.array(near), *draw.normal(size=(2, len(texts)))], 1).astype(np.float32)


def test_tests_of_ones_own():
    x, y, a, b = (("red", "rose"), ("blue", "sky"), ("warm", "hot"), ("cold", "icy"))
    test = AssociationTest("mine", "colours", (x, y), (a, b))
    (found,) = judge_association(Words(dict.fromkeys((*x, *a), 9) | dict.fromkeys((*y, *b), -9)), [test])
    assert found.name == "mine: colours" and found.value > 1.5 and found.p == 1 / 6


def test_the_lists_of_the_paper():
    known = module.tests()
    sizes = {name: [len(side) for side in (*test.targets, *test.attributes)] for name, test in known.items()}
    assert sizes["WEAT-3"] == [32, 32, 25, 25] and sizes["WEAT-5"] == [16, 16, 8, 8]
    assert all(sizes[name] == [8] * 4 for name in ("WEAT-6", "WEAT-6b", "WEAT-7", "WEAT-7b", "WEAT-8", "WEAT-8b"))
    assert all(sentence.count("{}") == 1 for kind in lists()["sentences"].values() for sentence in kind)


@pytest.mark.parametrize(
    ("targets", "attributes", "says"),
    [
        ((("a",), ("b", "c")), (("d", "e"), ("f", "g")), "a list has 1 words"),
        (((), ("b", "c")), (("d", "e"), ("f", "g")), "a list has 0 words"),
        ((("a", "b"), ("c", "c")), (("d", "e"), ("f", "g")), "more than once in its lists: c"),
        ((("a", "b"), ("c", "d")), (("x", "y"), ("y", "z")), "more than once in its lists: y"),
    ],
)
def test_lists_that_cannot_be_used(targets, attributes, says):
    with pytest.raises(UserError, match=says):
        AssociationTest("bad", "lists", targets, attributes)


def test_too_few_vectors():
    with pytest.raises(UserError, match="fewer than two words"):
        association("one", np.ones((1, 3)), *[np.ones((2, 3))] * 3)
