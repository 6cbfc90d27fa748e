import numpy as np
import pytest
from test_eraser import probe

from embedtune.errors import UserError
from embedtune.refine import sphere as module
from embedtune.refine.concepts import encode, length_encodings
from embedtune.refine.eraser import leace
from embedtune.refine.sphere import sphere
from embedtune.refine.statistics import Statistics


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def texts(n=4000, d=24, seed=0):
    """Vectors whose norm falls with the length of the text, as those of mean-pooled encoders do, and the lengths."""
    draw = np.random.default_rng(seed)
    tokens = np.round(draw.lognormal(3.5, 0.7, n)).astype(int) + 2
    log = np.log(tokens) - np.log(tokens).mean()
    x = draw.normal(size=(n, d)) @ draw.normal(size=(d, d)) / 5 + 2 * draw.normal(size=d)
    return (x + 0.3 * log[:, None] * draw.normal(size=d)) * np.exp(-0.3 * log)[:, None], tokens


def fit(x, z, size=1000, **options):
    def chunks():
        return ((x[i : i + size], z[i : i + size]) for i in range(0, len(x), size))

    return sphere(chunks, Statistics.of(x, z), **options)


def covariance(y, z):
    z = (z - z.mean(0)) / z.std(0)
    return np.abs((y - y.mean(0)).T @ z / len(y)).max()


def test_the_normalised_vectors_have_no_covariance_left_while_leace_makes_it_worse():
    x, tokens = texts()
    z = np.log(tokens)[:, None]
    before = probe(unit(x), z[:, 0])
    naive = unit(leace(Statistics.of(x, z))(x))
    found = fit(x, z)
    out = unit(found.affine(x))
    assert covariance(out, z) < 1e-10 and abs(probe(out, z[:, 0])) < 1e-10
    assert probe(naive, z[:, 0]) > 0.3 > 1e-3 and covariance(naive, z) > 1e-3
    assert before > 0.3
    assert found.rank == 1 and found.left == found.found[-1] <= module.ENOUGH


def test_few_passes_are_enough():
    x, tokens = texts()
    found = fit(x, np.log(tokens)[:, None]).found
    assert found[1] < found[0] / 10 and len(found) < 20
    assert all(after < 2 * before for before, after in zip(found, found[1:]))


def test_all_smooth_functions_of_length_at_once():
    x, tokens = texts(d=64)
    z = encode(length_encodings(tokens), {}, tokens)
    out = unit(fit(x, z).affine(x))
    assert covariance(out, z) < 1e-10
    for function in (tokens, np.log(tokens), np.log(tokens) ** 2, np.sqrt(tokens)):
        assert abs(probe(out, function)) < 1e-3


def test_scale_chunks_and_dead_dimensions_change_nothing():
    x, tokens = texts(1500)
    z = np.column_stack([np.log(tokens), tokens])
    one = fit(x, z)
    for other in (fit(x, z * [1e6, 1e-6]), fit(x, z, size=77)):
        assert np.abs(one.affine.weight - other.affine.weight).max() < 1e-9
    dead = np.column_stack([x, 1e-9 * tokens])
    out = fit(dead, z).affine(dead)
    assert abs(probe(unit(dead), z[:, 0], standardise=True)) > 0.9
    assert abs(probe(unit(out), z[:, 0], standardise=True)) < 1e-8


def test_fitted_again_on_its_own_result_it_changes_nothing():
    x, tokens = texts(1500)
    z = np.log(tokens)[:, None]
    once = fit(x, z).affine(x)
    again = fit(once, z)
    assert np.abs(unit(again.affine(once)) - unit(once)).max() < 1e-9
    assert len(again.found) == 1


def test_the_change_is_small():
    x, tokens = texts()
    out = unit(fit(x, np.log(tokens)[:, None]).affine(x))
    pairs = np.einsum("ij,ij->i", unit(x)[::2], unit(x)[1::2]) - np.einsum("ij,ij->i", out[::2], out[1::2])
    assert np.abs(pairs).mean() < 0.15


def test_directions_that_have_nothing_to_do_with_the_concept_stay_as_they_are():
    """Only the span of the covariance goes: LEACE's metric reads the concept from all other directions as well."""
    draw = np.random.default_rng(4)
    z = draw.normal(size=(4000, 1))
    x = draw.normal(size=(4000, 12)) + 3 * np.eye(12)[0]
    x[:, 1] += z[:, 0]
    x[:, 2] += 0.8 * x[:, 1]
    weight = fit(x, z).affine.weight
    taken = np.linalg.svd(np.eye(12) - weight)
    assert (taken[1] > 1e-6).sum() == 1 and taken[1][0] == pytest.approx(1, abs=0.1)  # a projection, nearly orthogonal
    naive = np.eye(12) - leace(Statistics.of(x, z)).weight
    assert np.linalg.norm(np.eye(12) - weight, 2) < 0.8 * np.linalg.norm(naive, 2)


def test_where_projections_do_not_settle_the_least_change_is_tried_and_the_better_kept():
    x, tokens = texts(700, d=16)
    z = encode(length_encodings(tokens), {}, tokens)
    found = fit(x, z)
    assert not found.projects and found.left == min(found.found) and found.rank == 10
    statistics = Statistics.of(x, z)
    frame = module._even(module.whitening(statistics))
    alone = module._settled(lambda: [(x, z)], statistics, frame, True, 0, 60)
    assert found.left < alone.best.size > module.SETTLED
    assert fit(x, np.log(tokens)[:, None]).projects


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_the_scale_of_the_vectors_changes_nothing(scale):
    x, tokens = texts(1500)
    z = np.log(tokens)[:, None]
    one, other = fit(x, z), fit(scale * x, z)
    assert other.projects and other.rank == 1
    assert np.abs(one.affine.weight - other.affine.weight).max() < 1e-9


def test_what_is_to_be_preserved_stays_nearer():
    draw = np.random.default_rng(5)
    x, tokens = texts()
    log = (np.log(tokens) - np.log(tokens).mean())[:, None]
    task = log + draw.normal(size=log.shape)
    x = x + 0.3 * task * draw.normal(size=x.shape[1])
    z = np.hstack([log, task])
    kept, free = (unit(fit(x, z[:, : 1 + keep], keep=keep).affine(x)) for keep in (1, 0))
    for out in (kept, free):
        assert covariance(out, z[:, :1]) < 1e-10
    want = (unit(x) - unit(x).mean(0)).T @ task / len(x)
    far = [np.linalg.norm((out - out.mean(0)).T @ task / len(x) - want) for out in (kept, free)]
    assert far[0] < far[1]


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_a_part_of_the_way_leaves_a_part(strength):
    x, tokens = texts(1500)
    z = np.log(tokens)[:, None]
    out = unit(fit(x, z, strength=strength).affine(x))
    assert 0.2 * (1 - strength) < covariance(out, z) / covariance(unit(x), z) < 1.5 * (1 - strength)


def test_fewer_rows_than_dimensions():
    x, tokens = texts(30, d=50)
    z = np.log(tokens)[:, None]
    found = fit(x, z)
    assert covariance(unit(found.affine(x)), z) < 1e-10
    fresh = np.random.default_rng(1).normal(size=(40, 50))
    assert np.linalg.norm(found.affine(fresh) - fresh) < np.linalg.norm(fresh)


def test_a_vector_that_would_vanish_is_refused_with_its_row():
    x, tokens = texts(300)
    x[123] = 0
    with pytest.raises(UserError, match="row 123"):
        fit(x, np.log(tokens)[:, None])


def test_a_concept_that_takes_all_dimensions_is_refused():
    z = np.random.default_rng(0).normal(size=(400, 3))
    with pytest.raises(UserError, match="nothing would be left"):
        fit(z @ np.random.default_rng(1).normal(size=(3, 3)), z)


def test_a_step_that_makes_it_worse_is_damped_and_the_best_map_is_kept(monkeypatch):
    x, tokens = texts(800)
    z = np.log(tokens)[:, None]
    mixed, calls = module._mixed, []

    def wild(history):
        calls.append(len(history))
        T = mixed(history)
        return 40 * T - 39 * history[-1][0] if len(calls) == 3 else T

    monkeypatch.setattr(module, "_mixed", wild)
    found = fit(x, z)
    assert found.found[3] > found.found[2] and calls[3] == 1  # worse: begun anew, from the best
    assert found.left == min(found.found) <= module.ENOUGH
    assert covariance(unit(found.affine(x)), z) < 1e-10
    few = fit(x, z, passes=4)
    assert few.left == min(few.found) == pytest.approx(covariance(unit(few.affine(x)), z), rel=10)


def test_a_constant_concept_changes_nothing():
    x, _ = texts(300)
    found = fit(x, np.ones((300, 1)))
    assert np.abs(found.affine(x) - x).max() < 1e-9 and found.rank == 0


def test_a_strength_that_is_none():
    with pytest.raises(UserError, match="between 0 and 1"):
        fit(np.eye(3), np.arange(3.0)[:, None], strength=-1)
