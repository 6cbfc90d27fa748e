from functools import partial

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from embedtune.errors import UserError
from embedtune.refine import eraser
from embedtune.refine.affine import Affine
from embedtune.refine.concepts import Survey
from embedtune.refine.eraser import canonical_correlations, direction, inlp, leace, orthogonal
from embedtune.refine.statistics import Statistics

EXACT = (leace, orthogonal)


def rows(n=2000, d=24, k=2, seed=0):
    """Vectors with a full covariance, of which k concepts move several dimensions."""
    draw = np.random.default_rng(seed)
    z = draw.normal(size=(n, k))
    x = draw.normal(size=(n, d)) @ draw.normal(size=(d, d)) + z @ draw.normal(size=(k, d)) + draw.normal(size=d)
    return x, z


def covariance(x, z):
    """The largest covariance of standardised z with x, in standard deviations of x's widest direction."""
    x, z = np.asarray(x, np.float64), np.asarray(z, np.float64)
    z = (z - z.mean(0)) / z.std(0)
    return np.abs((x - x.mean(0)).T @ z / len(x)).max() / x.std(0).max()


def probe(x, z, standardise=False):
    """In-sample R2 of a least-squares read-out of z, its features standardised as probes do."""
    # Directions below the rounding of float32 are no features: as many of them as there are read out by chance.
    smallest = 1e-5 if np.asarray(x).dtype == np.float32 else None
    x = np.asarray(x, np.float64)
    x = x - x.mean(0)
    if standardise:
        spread = x.std(0)
        x = x[:, spread > 0] / spread[spread > 0]
    x, z = np.column_stack([np.ones(len(x)), x]), np.asarray(z, np.float64)
    left = z - x @ np.linalg.lstsq(x, z, rcond=smallest)[0]
    return 1 - left.var() / z.var()


def textbook(x, z):
    """LEACE as its paper writes it: I - W^+ U U' W with W the symmetric root of the inverse covariance."""
    x, z = x - x.mean(0), z - z.mean(0)
    root = np.real(sqrtm(x.T @ x / len(x)))
    U = np.linalg.svd(np.linalg.solve(root, x.T @ z / len(x)), full_matrices=False)[0]
    return np.eye(x.shape[1]) - root @ U @ U.T @ np.linalg.inv(root)


def test_it_is_leace():
    x, z = rows()
    found = leace(Statistics.of(x, z))
    assert np.abs(found.weight - textbook(x, z)).max() < 1e-10
    assert np.allclose(found(x).mean(0), x.mean(0), atol=1e-10)


@pytest.mark.parametrize("method", EXACT)
def test_no_covariance_is_left_and_twice_is_once(method):
    x, z = rows()
    found = method(Statistics.of(x, z))
    once = found(x)
    assert covariance(once, z) < 1e-12
    assert all(abs(probe(once, z[:, i])) < 1e-10 for i in range(2))
    assert np.allclose(found(once), once, atol=1e-10)
    assert np.linalg.matrix_rank(found.weight, tol=1e-8) == 24 - 2


def test_leace_changes_the_vectors_least_of_all_that_erase():
    x, z = rows()
    statistics = Statistics.of(x, z)
    best = leace(statistics)
    least = ((best(x) - x) ** 2).sum()
    assert least < ((orthogonal(statistics)(x) - x) ** 2).sum()
    # Stationary: no small change of the map that keeps P C = 0 comes nearer.
    left = np.linalg.svd(statistics.S_xz)[0][:, 2:]  # what is orthogonal to C
    for seed in range(5):
        weight = best.weight + 1e-3 * np.random.default_rng(seed).normal(size=(24, 22)) @ left.T
        other = Affine(weight, best.bias + (best.weight - weight) @ statistics.mean_x)
        assert covariance(other(x), z) < 1e-12
        assert ((other(x) - x) ** 2).sum() > least


@pytest.mark.parametrize("method", [*EXACT, partial(inlp, rounds=3), direction])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_the_scale_of_a_concept_changes_nothing(method, scale):
    x, z = rows()
    one, other = (method(Statistics.of(x, z * s)) for s in (1.0, np.array([scale, 1.0])))
    assert np.abs(one.weight - other.weight).max() < 1e-9
    assert np.abs(one.bias - other.bias).max() < 1e-9


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_a_coordinate_changes_nothing(scale):
    x, z = rows()
    factor = np.where(np.arange(24) < 12, scale**0.5, 1.0)  # within what lives
    one, other = leace(Statistics.of(x, z)), leace(Statistics.of(x * factor, z))
    assert np.abs(one(x) * factor - other(x * factor)).max() / factor.max() < 1e-8


def test_a_class_of_one_row_in_a_hundred_thousand_is_erased():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(200_000, 6)).astype(np.float32)
    labels = np.array(["usual"] * len(x), dtype=object)
    labels[[5, 70_000]] = "rare"
    labels[::3] = "other"
    x[labels == "rare", 0] += 3
    x[labels == "other", 1] += 1
    survey = Survey("c")
    for label in ("usual", "other", "rare", "usual"):
        survey.add(label)
    z = survey.encoding()(labels)
    assert z.mean(0).min() == pytest.approx(1e-5, rel=0.01)
    for method in EXACT:
        out = method(Statistics.of(x, z))(x.astype(np.float64))
        assert covariance(out, z) < 1e-10
        means = [out[labels == name].mean(0) for name in ("usual", "rare", "other")]
        assert np.ptp(means, axis=0).max() < 1e-8
    assert np.abs(leace(Statistics.of(x, z)).weight - textbook(x.astype(float), z)).max() < 1e-9


def test_dead_dimensions_are_mapped_to_their_mean_and_give_a_standardising_probe_nothing():
    x, z = rows(4000, k=1)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    x[:, [3, 17]] = 1e-9 * (z + 0.1 * norm[:, :1])  # what a LayerNorm gain near zero leaves: it still tells
    x[:, 5] = x[:, 6] + x[:, 7]  # and an eigen-direction without variance
    x = x.astype(np.float32)
    assert probe(x, z[:, 0], standardise=True) > 0.5
    out = leace(Statistics.of(x, z))(x.astype(np.float64))
    assert np.abs(probe(out, z[:, 0], standardise=True)) < 1e-8
    assert np.ptp(out[:, [3, 17]], axis=0).max() == 0
    assert np.allclose(out[0, [3, 17]], x[:, [3, 17]].mean(0), rtol=1e-5)
    assert np.ptp(out[:, 5] - out[:, 6] - out[:, 7]) < 1e-6  # float32 says no more about it


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_mean_of_thirty_and_a_spread_of_a_tenth(dtype):
    draw = np.random.default_rng(0)
    z = draw.normal(size=3000)
    x = (30 + 0.1 * (draw.normal(size=(3000, 32)) + z[:, None] * draw.normal(size=32))).astype(dtype)
    out = leace(Statistics.of(x, z))(x.astype(np.float64))
    assert covariance(out, z[:, None]) < 1e-10 and abs(probe(out, z)) < 1e-10


def test_half_precision_in_half_precision_out():
    x, z = rows(k=1)
    found = leace(Statistics.of(x.astype(np.float16), z))
    assert found(x.astype(np.float16)).dtype == np.float16
    half = found(torch.tensor(x, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16 and abs(probe(half.float().numpy(), z[:, 0])) < 1e-3


def test_64_shards_give_the_map_of_one_pass():
    draw = np.random.default_rng(0)
    z = draw.normal(size=(6400, 2))
    x = draw.normal(size=(6400, 24)) + z @ draw.normal(size=(2, 24)) + 5
    merged = sum((Statistics.of(a, b) for a, b in zip(np.split(x, 64), np.split(z, 64))), Statistics.empty(24, 2))
    one, other = leace(Statistics.of(x, z)), leace(merged)
    assert np.abs(one.weight - other.weight).max() < 1e-12 and np.abs(one.bias - other.bias).max() < 1e-12


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_strength_leaves_that_part_of_the_covariance(strength):
    x, z = rows()
    for method in EXACT:
        left = Statistics.of(method(Statistics.of(x, z), strength=strength)(x), z).S_xz
        assert np.allclose(left, (1 - strength) * Statistics.of(x, z).S_xz, atol=1e-8)
    with pytest.raises(UserError, match="between 0 and 1"):
        leace(Statistics.of(x, z), strength=1.5)


def test_what_is_to_be_preserved_keeps_its_covariance():
    x, z = rows(k=3)
    z[:, 1] += 0.5 * z[:, 0]
    both = Statistics.of(x, z)
    out = leace(both, keep=2)(x)
    assert covariance(out, z[:, :1]) < 1e-12
    assert np.allclose(Statistics.of(out, z).S_xz[:, 1:], both.S_xz[:, 1:], atol=1e-7)
    plain = Statistics.of(leace(Statistics.of(x, z[:, :1]))(x), z).S_xz[:, 1:]
    assert np.abs(plain - both.S_xz[:, 1:]).max() > 1  # which LEACE alone does not do


def test_the_same_thing_cannot_both_go_and_stay():
    x, z = rows(k=1)
    with pytest.raises(UserError, match="both go"):
        leace(Statistics.of(x, np.hstack([z, 2 * z + 1])), keep=1)


def test_concepts_are_erased_jointly_while_a_chain_brings_the_first_back():
    x, z = rows(k=2)
    z[:, 1] = z[:, 1] + z[:, 0]
    joint = leace(Statistics.of(x, z))(x)
    assert covariance(joint, z) < 1e-12
    draw = np.random.default_rng(1)
    first = orthogonal(Statistics.of(x, z[:, :1]))(x)
    x2 = first + z[:, 1:] * draw.normal(size=24)
    chained = orthogonal(Statistics.of(x2, z[:, 1:]))(x2)
    assert covariance(chained, z[:, :1]) > 0.01


def test_inlp_needs_many_rounds_and_the_naive_direction_leaves_most():
    # The read-out leans on directions of little variance, so projecting it out leaves the loud ones.
    draw = np.random.default_rng(0)
    z = draw.normal(size=5000)
    x = draw.normal(size=(5000, 30)) * np.logspace(0.5, -1.5, 30) + z[:, None] * np.logspace(0, -1.2, 30)
    moments = Statistics.of(x, z)
    before = probe(x, z)
    left = [probe(inlp(moments, rounds=r)(x), z) for r in (1, 3, 10)]
    assert left[0] == pytest.approx(probe(direction(moments)(x), z), abs=1e-9)
    assert before > left[0] > left[1] > left[2] and left[0] > before / 2
    assert abs(probe(leace(moments)(x), z)) < 1e-10


def test_fewer_rows_than_dimensions_still_leave_nothing_and_keep_most():
    x, z = rows(n=40, d=100, k=1)
    moments = Statistics.of(x, z)
    assert 0 < eraser.whitening(moments).shrinkage <= 1
    for method in EXACT:
        found = method(moments)
        assert covariance(found(x), z) < 1e-10
        fresh = np.random.default_rng(9).normal(size=(50, 100))
        moved = found(fresh) - fresh
        assert np.linalg.matrix_rank(moved - moved.mean(0), tol=1e-6) == 1  # unseen directions pass


def test_shrinkage_is_that_of_scikit_learn_up_to_its_simpler_formula():
    from sklearn.covariance import oas

    x = np.random.default_rng(0).normal(size=(60, 40)) @ np.diag(np.logspace(0, -1, 40))
    x = (x - x.mean(0)) / x.std(0)
    assert eraser.whitening(Statistics.of(x, x[:, :1])).shrinkage == pytest.approx(oas(x)[1], rel=0.1)
    many = np.random.default_rng(0).normal(size=(600, 40))
    assert eraser.whitening(Statistics.of(many, many[:, :1])).shrinkage == 0


def test_a_constant_concept_changes_nothing_but_what_is_dead():
    x, z = rows(k=1)
    z[:] = 0.1
    for method in (*EXACT, inlp, direction):
        assert np.abs(method(Statistics.of(x, z))(x) - x).max() < 1e-9
    assert len(canonical_correlations(Statistics.of(x, z))) == 0


def test_collinear_concepts_and_duplicates_count_once():
    x, z = rows()
    more = np.hstack([z, z[:, :1] - 3 * z[:, 1:], z[:, :1], np.full((len(z), 1), 7.0)])
    one, other = leace(Statistics.of(x, z)), leace(Statistics.of(x, more))
    assert np.abs(one.weight - other.weight).max() < 1e-9
    assert len(canonical_correlations(Statistics.of(x, more))) == 2


def test_a_concept_that_the_vectors_hold_exactly():
    x, _ = rows()
    z = x @ np.random.default_rng(3).normal(size=(24, 1))
    assert canonical_correlations(Statistics.of(x, z))[0] == pytest.approx(1, abs=1e-9)
    assert covariance(leace(Statistics.of(x, z))(x), z) < 1e-12


def test_duplicate_and_zero_dimensions():
    x, z = rows()
    x = np.hstack([x, x[:, :2], np.zeros((len(x), 1))])
    out = leace(Statistics.of(x, z))(x)
    assert covariance(out, z) < 1e-11
    assert np.allclose(out[:, :2], out[:, 24:26], atol=1e-9) and not out[:, 26].any()


def test_no_rows_one_row_and_equal_rows_are_refused():
    with pytest.raises(UserError, match="no rows"):
        leace(Statistics.empty(3, 1))
    for n in (1, 5):
        with pytest.raises(UserError, match="all vectors are the same"):
            leace(Statistics.of(np.ones((n, 3)), np.arange(n)))


def test_weights_and_canonical_correlations():
    x, z = rows(k=1)
    doubled = Statistics.of(x, z, np.where(np.arange(len(x)) < 500, 2.0, 1.0))
    repeated = Statistics.of(np.vstack([x, x[:500]]), np.vstack([z, z[:500]]))
    assert np.abs(leace(doubled).weight - leace(repeated).weight).max() < 1e-10
    assert canonical_correlations(Statistics.of(x, z))[0] ** 2 == pytest.approx(probe(x, z[:, 0]), abs=1e-9)


@pytest.mark.parametrize("n", [40, 90, 150])
def test_few_rows_are_measured_as_they_are(n):
    x, z = np.hsplit(np.random.default_rng(n).normal(size=(n, 101)), [100])
    centred = x - x.mean(0)
    best = np.linalg.lstsq(centred, z - z.mean(0), rcond=None)[0]
    r2 = 1 - (((z - z.mean(0)) - centred @ best) ** 2).sum() / ((z - z.mean(0)) ** 2).sum()
    found = canonical_correlations(Statistics.of(x, z))[0]
    assert found**2 == pytest.approx(r2, abs=1e-6) and found <= 1
