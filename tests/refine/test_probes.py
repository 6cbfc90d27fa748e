"""The linear probe on fresh rows: coverage of its interval, size of its test, and the floor of an erasure."""

import math

import numpy as np
import pytest

from embedtune.errors import UserError
from embedtune.refine import probes
from embedtune.refine.eraser import leace
from embedtune.refine.probes import (
    accuracy,
    basis,
    chance_below,
    excess,
    floor,
    interval,
    linear_accuracy,
    linear_probe,
    rows_for,
    shuffled_squares,
    unbiased,
)
from embedtune.refine.statistics import Statistics


def rows(n, d, rho2, kind, draw):
    """x (n, d) and z (n,) whose population rho2 is known."""
    x = draw.standard_normal((n, d))
    e = draw.standard_normal(n)
    if kind == "heavy vectors and errors":  # Student's t with five degrees of freedom
        x, e = (draw.standard_t(5, shape) / math.sqrt(5 / 3) for shape in ((n, d), n))
    elif kind == "heavy errors":
        e = draw.standard_t(5, n) / math.sqrt(5 / 3)
    elif kind == "errors that grow":
        e = e * np.exp(0.5 * x[:, 0]) / math.exp(0.25)
    return x, math.sqrt(rho2 / d) * x.sum(1) + math.sqrt(1 - rho2) * e


def covered(n, d, rho2, kind, sims, seed=0):
    """Shares of simulations whose interval lies above rho2 and below it, and the mean estimate."""
    draw = np.random.default_rng(seed)
    above = below = 0
    estimates = []
    for _ in range(sims):
        x, z = rows(n, d, rho2, kind, draw)
        q = basis(x)
        z = (z - z.mean()) / np.linalg.norm(z - z.mean())
        fitted = q @ (q.T @ z)
        r2 = float(fitted @ z)
        low, high = interval(r2, n, d, excess(z - fitted, z, np.einsum("ij,ij->i", q, q)))
        above, below = above + (low > rho2), below + (high < rho2)
        estimates.append(unbiased(r2, n, d))
    return above / sims, below / sims, float(np.mean(estimates))


def test_the_interval_holds_the_population_value_in_95_of_100_cases():
    for rho2, kind in ((0.1, "gaussian"), (0.3, "heavy vectors and errors")):
        above, below, mean = covered(400, 12, rho2, kind, 500)
        assert 0.93 <= 1 - above - below <= 0.97
        assert abs(mean - rho2) < 0.01


def test_at_zero_only_the_upper_tail_can_miss():
    above, below, mean = covered(250, 10, 0.0, "gaussian", 500)
    assert below == 0 and above <= 0.045 and abs(mean) < 0.005


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gaussian", "heavy errors", "heavy vectors and errors", "errors that grow"])
@pytest.mark.parametrize(("n", "d"), [(400, 20), (1000, 50)])
@pytest.mark.parametrize("rho2", [0.0, 0.02, 0.2, 0.7])
def test_coverage(n, d, rho2, kind):
    above, below, mean = covered(n, d, rho2, kind, 500)
    held = 1 - above - below
    print(f"{kind}, n={n}, d={d}, rho2={rho2}: {held:.3f}, above {above:.3f}, below {below:.3f}, mean {mean:.4f}")
    if rho2:
        assert 0.93 - 0.02 <= held <= 0.97 + 0.01  # 95 +- 2 %, and two standard errors of 500 simulations
    else:
        assert 0.945 <= held <= 0.99  # there is no lower tail: 97.5 %
    assert abs(mean - rho2) < 0.01


def test_the_distribution_of_r2_is_that_of_simulated_rows():
    draw = np.random.default_rng(0)
    n, d, rho2 = 60, 5, 0.4
    found = []
    for _ in range(2000):
        x, z = rows(n, d, rho2, "gaussian", draw)
        x, z = x - x.mean(0), z - z.mean()
        found.append(float(z @ x @ np.linalg.solve(x.T @ x, x.T @ z) / (z @ z)))
    for part in (0.025, 0.2, 0.5, 0.8, 0.975):
        assert chance_below(float(np.quantile(found, part)), n, d, rho2) == pytest.approx(part, abs=0.025)
    assert chance_below(0.3, 100_000, 300, 0.0) == 1.0


def test_the_estimate_is_olkin_and_pratts_at_any_size():
    """Against the integral of Euler: F(1, 1; c; x) = (c - 1) times the integral of (1 - t)^(c - 2) / (1 - x t)."""
    from scipy.integrate import quad

    for r2, n, p in ((0.008, 8000, 381), (0.0, 6000, 381), (0.5, 400, 20), (0.999, 90, 40), (0.1, 100_000, 768)):
        c, x = (n - p + 1) / 2, 1 - r2
        value = quad(lambda t: (1 - t) ** (c - 2) / (1 - x * t), 0, min(1.0, 60 / c), epsabs=0)[0]  # noqa: B023
        wanted = 1 - (n - 3) / (n - p - 1) * x * (c - 1) * value
        assert unbiased(r2, n, p) == pytest.approx(wanted, abs=1e-6)


def test_the_bound_is_never_below_what_chance_would_give():
    q = basis(np.random.default_rng(0).standard_normal((500, 10)))
    z = np.random.default_rng(1).standard_normal(500)
    z -= z.mean()
    z -= q @ (q.T @ z)  # no covariance at all: the interval ends at zero
    (found,) = linear_probe(q, z[:, None], ["z"], draws=19)
    assert found.r2 < 1e-12 and found.high == 0.0 and found.bound > 0.005
    assert found.rho2 == pytest.approx(unbiased(1e-9, 500, 10), abs=1e-6) and found.rho2 < 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gaussian", "heavy vectors and errors"])
def test_the_permutation_test_rejects_5_of_100_true_hypotheses(kind):
    draw = np.random.default_rng(0)
    sims, rejected = 4000, 0
    for s in range(sims):
        x, z = rows(60, 5, 0.0, kind, draw)
        rejected += linear_probe(basis(x), z[:, None], ["z"], draws=999, seed=s)[0].p <= 0.05
    print(f"{kind}: {rejected / sims:.4f}")
    assert 0.04 <= rejected / sims <= 0.06  # a standard error is 0.0034


def test_the_permutation_test_quickly():
    draw = np.random.default_rng(0)
    z = draw.standard_exponential((50, 1))
    rejected = []
    for s in range(1000):
        squares = shuffled_squares(basis(draw.standard_t(5, (50, 4))), z - z.mean(), 99, s)[:, 0]
        rejected.append(np.mean(squares >= squares[0]) <= 0.05)
    assert 0.035 <= np.mean(rejected) <= 0.065


def test_p_is_the_share_of_shuffles_that_reach_the_rows_as_they_are():
    draw = np.random.default_rng(0)
    q, z = basis(draw.standard_normal((40, 3))), draw.standard_normal((40, 2))
    squares = shuffled_squares(q, z - z.mean(0), 99, 3)
    assert squares.shape == (100, 2)
    assert squares[0] == pytest.approx((((z - z.mean(0)).T @ q) ** 2).sum(1), rel=1e-5)
    planted = linear_probe(q, q[:, :1] * 5, ["z"], draws=99)[0]
    assert planted.r2 == pytest.approx(1) and planted.p == 0.01


def test_a_planted_linear_concept_is_found_with_its_size():
    x, z = rows(4000, 30, 0.1, "gaussian", np.random.default_rng(0))
    found, nothing = linear_probe(
        basis(x), np.stack([z, np.random.default_rng(1).standard_normal(4000)], 1), ["z", "o"]
    )
    assert found.low < 0.1 < found.high and found.high - found.low < 0.05 and found.p == 0.001
    assert nothing.low == 0 and nothing.high < 0.02 and nothing.p > 0.05


def test_a_dead_dimension_is_in_the_probe():
    """A LayerNorm gain of 1e-9: scaled up, what is left of the concept in it is read."""
    draw = np.random.default_rng(0)
    x, z = draw.standard_normal((1000, 8)), draw.standard_normal(1000)
    x[:, 3] = 0.5 + 1e-9 * (z + 0.1 * draw.standard_normal(1000))
    (found,) = linear_probe(basis(x), z[:, None], ["z"], draws=19)
    assert found.low > 0.95


def test_constant_and_doubled_dimensions_count_for_nothing():
    x = np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32)
    wide = np.column_stack([x, x[:, 0], np.full(200, 0.1, np.float32), np.zeros(200, np.float32)])
    assert basis(wide).shape == (200, 4)
    assert basis(wide).T @ basis(wide) == pytest.approx(np.eye(4), abs=1e-12)


def test_neither_scale_nor_offset_of_vectors_and_concept_matters():
    x, z = rows(500, 6, 0.3, "gaussian", np.random.default_rng(0))
    one = linear_probe(basis(x), z[:, None], ["z"], draws=19)[0]
    two = linear_probe(basis(1e5 + 1e-3 * x), 1e3 + 1e-6 * z[:, None], ["z"], draws=19)[0]
    assert two.rho2 == pytest.approx(one.rho2, rel=1e-6) and two.high == pytest.approx(one.high, rel=1e-6)


@pytest.mark.parametrize(
    ("x", "z", "words"),
    [
        (np.full((50, 2), np.nan), np.arange(50.0), "NaN"),
        (np.random.default_rng(0).standard_normal((50, 2)), np.r_[np.nan, np.arange(49.0)], "NaN"),
        (np.random.default_rng(0).standard_normal((50, 2)), np.full(50, 0.1), "is the same in all 50 rows"),
        (np.random.default_rng(0).standard_normal((50, 40)), np.arange(50.0), "50 rows cannot judge 40 dimensions"),
        (np.ones((50, 2)), np.arange(50.0), "are all the same"),
    ],
)
def test_what_cannot_be_probed_is_refused(x, z, words):
    with pytest.raises(UserError, match=words):
        linear_probe(basis(x), z[:, None], ["z"], draws=19)


def test_the_interval_of_a_balanced_accuracy_holds_it():
    draw = np.random.default_rng(0)
    share, counts = np.array([0.55, 0.95, 0.7]), (30, 20, 200)
    labels = np.repeat(np.arange(3), counts)
    held = []
    for _ in range(2000):
        right = draw.random(len(labels)) < share[labels]
        found = accuracy(labels, np.where(right, labels, (labels + 1) % 3))
        held.append(found.low <= share.mean() <= found.high)
    assert 0.93 <= np.mean(held) <= 0.97 and found.chance == pytest.approx(1 / 3)


def test_classes_are_told_by_fits_that_did_not_see_them():
    draw = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], (300, 60, 40))
    x = draw.standard_normal((400, 5))
    chance = linear_accuracy(basis(x), labels)
    assert chance.low <= chance.chance <= chance.high
    x[:, 1] += 3 * (labels == 1)
    x[:, 2] += 3 * (labels == 2)
    assert linear_accuracy(basis(x), labels).low > 0.8


def test_one_class_and_an_absent_class_are_refused():
    q = basis(np.random.default_rng(0).standard_normal((60, 3)))
    with pytest.raises(UserError, match="of one class"):
        linear_accuracy(q, np.zeros(60, int))
    with pytest.raises(UserError, match="class number 1 has 0 rows"):
        linear_accuracy(q, np.repeat([0, 2], 30))


def test_rows_for_a_floor():
    assert floor(768, 76_700) == pytest.approx(0.0099, abs=1e-4)
    assert floor(381, rows_for(381, 0.01)) <= 0.01 < floor(381, rows_for(381, 0.01) - 1)


def test_directions_that_hold_only_the_rounding_of_float32_are_left_out():
    """What a projection leaves of a direction is rounding, which is no chance and no information."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((600, 8))
    g = np.ones(8) / math.sqrt(8)
    assert basis((x - np.outer(x @ g, g)).astype(np.float32)).shape == (600, 7)
    assert basis(x - (1 - 1e-5) * np.outer(x @ g, g)).shape == (600, 8)  # small, but no rounding


@pytest.mark.parametrize(("n", "shares"), [(400, (0.5, 0.9)), (1500, (0.5, 0.9))])
def test_the_floor_is_what_an_erasure_on_few_rows_leaves(n, shares):
    """rho2 of a Gaussian concept on the mapped vectors is known exactly, so no second sample is needed."""
    draw, d = np.random.default_rng(0), 32
    mix = draw.standard_normal((d, d))
    for rho2 in shares:
        left = []
        for _ in range(40):
            w = draw.standard_normal((n, d))
            z = math.sqrt(rho2) * w[:, 0] + math.sqrt(1 - rho2) * draw.standard_normal(n)
            weight = leace(Statistics.of(w @ mix.T, z)).weight
            covariance, spread = weight @ mix[:, 0] * math.sqrt(rho2), weight @ mix
            left.append(covariance @ np.linalg.pinv(spread @ spread.T, rcond=1e-9) @ covariance)
        assert np.mean(left) == pytest.approx(floor(d, n), rel=0.25)


def test_the_sum_over_points_is_that_over_all(monkeypatch):
    few = [chance_below(r2, 20_000, 300, rho2) for r2, rho2 in ((0.21, 0.2), (0.904, 0.9), (0.016, 0.002))]
    monkeypatch.setattr(probes, "POINTS", 10_000_000)
    every = [chance_below(r2, 20_000, 300, rho2) for r2, rho2 in ((0.21, 0.2), (0.904, 0.9), (0.016, 0.002))]
    assert few == pytest.approx(every, rel=1e-4)
