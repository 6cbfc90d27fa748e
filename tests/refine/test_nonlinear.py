"""Probes that are not linear: each finds what it is for, and nothing where there is nothing."""

import numpy as np
import pytest

from embedtune.errors import UserError
from embedtune.refine.nonlinear import independence, read_classes, read_values
from embedtune.refine.probes import basis, linear_probe


def vectors(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


def test_a_bent_concept_is_found_by_these_probes_and_not_by_a_linear_one():
    x = vectors(1500, 8)
    z = x[:, 0] ** 2 + 0.2 * vectors(1500, 1, 1)[:, 0]
    q = basis(x)
    z -= q @ (q.T @ z)  # what chance makes linear in these rows
    (linear,) = linear_probe(q, z[:, None], ["z"], draws=199)
    assert linear.low == 0 and linear.bound < 0.1 and linear.p > 0.9  # wide: the errors grow with x
    readings = read_values(x, z)
    assert [r.value for r in readings] == sorted([r.value for r in readings], reverse=True)
    found = {reading.probe: reading for reading in readings}
    assert set(found) == {"boosted trees", "network", "kernel features", "norm alone"}
    for name in ("boosted trees", "network", "kernel features"):
        assert found[name].low > 0.5 and len(found[name].seeds) == 3
        assert found[name].low < found[name].value < found[name].high
    assert found["norm alone"].value < 0.3
    assert independence(x, z, draws=199) <= 0.01


def test_the_norm_alone_is_read_where_it_tells():
    direction = vectors(900, 5)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    size = np.random.default_rng(1).uniform(1, 3, 900)
    readings = {r.probe: r for r in read_values(direction * size[:, None], np.log(size))}
    assert readings["norm alone"].low > 0.95
    assert "norm alone" not in {r.probe for r in read_values(direction.astype(np.float32), size)}


def test_independent_values_are_found_by_none():
    readings = read_values(vectors(900, 6), vectors(900, 1, 7)[:, 0])
    assert not any(reading.found for reading in readings)


def test_classes_that_differ_in_spread_only():
    """The mean of each class is the same, so that a linear probe has nothing to read."""
    labels = (np.random.default_rng(2).random(1500) < 0.2).astype(int)
    x = vectors(1500, 6) * np.where(labels, 2.0, 1.0)[:, None]
    readings = read_classes(x, labels)
    assert readings[0].chance == 0.5 and readings[0].low > 0.7
    assert independence(x, labels, labels, draws=199) <= 0.01
    none = read_classes(vectors(1500, 6), labels)
    assert not any(reading.found for reading in none) and all(abs(r.value - 0.5) < 0.08 for r in none)


def test_few_rows_one_class_and_nan_are_refused():
    x = vectors(300, 3)
    with pytest.raises(UserError, match="too few for probes"):
        read_values(x[:50], x[:50, 0])
    with pytest.raises(UserError, match="of one class"):
        read_classes(x, np.zeros(300, int))
    with pytest.raises(UserError, match="class number 1 has 4 rows"):
        read_classes(x, np.r_[np.zeros(296, int), np.ones(4, int)])
    with pytest.raises(UserError, match="the same in all rows"):
        read_values(x, np.ones(300))
    x[7, 1] = np.nan
    with pytest.raises(UserError, match="row 7"):
        read_values(x, vectors(300, 1)[:, 0])


def rejected(sims: int, draws: int, classes: bool) -> float:
    draw = np.random.default_rng(0)
    found = []
    for s in range(sims):
        x, z = draw.standard_t(5, (80, 3)), draw.standard_exponential(80)
        labels = np.digitize(z, (0.5, 1.5)) if classes else None
        found.append(independence(x, z, labels, draws=draws, seed=s) <= 0.05)
    return float(np.mean(found))


def test_the_test_of_independence_quickly():
    assert rejected(200, 39, False) < 0.09


@pytest.mark.slow
@pytest.mark.parametrize("classes", [False, True])
def test_the_test_of_independence_rejects_5_of_100_true_hypotheses(classes):
    share = rejected(3000, 99, classes)
    print(f"classes {classes}: {share:.4f}")
    assert 0.04 <= share <= 0.06  # a standard error is 0.004
