import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedtune.errors import UserError
from embedtune.refine import statistics as module
from embedtune.refine.statistics import Statistics, accumulate, solve

NAMES = tuple(Statistics.__dataclass_fields__)


def rows(n=300, d=7, k=2, seed=0, offset=0.0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + offset
    z = x[:, :k] + rng.standard_normal((n, k))
    return x.astype(dtype), z


def by_hand(x, z, w=None):
    """The definition, in extended precision."""
    x, z = x.astype(np.longdouble), z.astype(np.longdouble)
    w = np.ones(len(x), np.longdouble) if w is None else w.astype(np.longdouble)
    mx, mz = w @ x / w.sum(), w @ z / w.sum()
    x, z = x - mx, z - mz
    wx = w[:, None] * x
    return len(w), w.sum(), w @ w, mx, mz, wx.T @ x, wx.T @ z, (w[:, None] * z).T @ z


def assert_same(a, b, tolerance=1e-12):
    """Equal up to `tolerance` of the natural scale: the standard deviations for moments."""
    expected = [getattr(b, n) for n in NAMES] if isinstance(b, Statistics) else b
    n, weight, weight2, mx, mz, sxx, sxz, szz = (np.asarray(v, float) for v in expected)
    dx, dz = np.sqrt(np.diag(sxx)), np.sqrt(np.diag(szz))
    assert a.n == n
    np.testing.assert_allclose([a.weight, a.weight2], [weight, weight2], rtol=tolerance)
    np.testing.assert_allclose(a.mean_x, mx, rtol=tolerance, atol=1e-300 + tolerance * dx.max(initial=0))
    np.testing.assert_allclose(a.mean_z, mz, rtol=tolerance, atol=1e-300 + tolerance * dz.max(initial=0))
    for ours, theirs, scale in (
        (a.S_xx, sxx, np.outer(dx, dx)),
        (a.S_xz, sxz, np.outer(dx, dz)),
        (a.S_zz, szz, np.outer(dz, dz)),
    ):
        assert np.all(np.abs(ours - theirs) <= tolerance * scale + 1e-300)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_equals_the_definition(dtype):
    x, z = rows(dtype=dtype)
    assert_same(Statistics.of(x, z), by_hand(x, z))


def test_a_mean_of_ten_thousand_deviations_passes():
    x, z = rows(offset=1e4)
    assert_same(Statistics.of(x, z), by_hand(x, z))
    assert_same(accumulate((x[i : i + 1], z[i : i + 1]) for i in range(len(x))), by_hand(x, z))


def test_no_variance_is_below_zero():
    """Of columns without spread many would be, and with NaN for a spread all others would count as dead too."""
    constants = np.random.default_rng(0).normal(size=500)
    for n in (1, 3, 1000):
        x = np.tile(constants, (n, 1))
        found = Statistics.of(x, x[:, :9], np.full(n, 0.7))
        assert found.S_xx.diagonal().min() >= 0 and found.S_zz.diagonal().min() >= 0


def test_float32_with_a_mean_is_centred_in_float64():
    x, z = rows()
    x = (x * 0.1 + 30).astype(np.float32)
    assert_same(Statistics.of(x, z), by_hand(x, z))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.randoms(use_true_random=False), st.sampled_from([0.0, 1e4]), st.booleans())
def test_neither_chunks_nor_their_order_matter(size, random, offset, weighted):
    x, z = rows(offset=offset)
    w = np.random.default_rng(1).lognormal(size=len(x)) if weighted else np.ones(len(x))
    chunks = [(x[i : i + size], z[i : i + size], w[i : i + size]) for i in range(0, len(x), size)]
    random.shuffle(chunks)
    assert_same(accumulate(chunks), by_hand(x, z, w))


def test_64_shards_merge_to_one_pass_and_blocks_do_not_show(monkeypatch):
    x, z = rows(n=6400)
    whole = Statistics.of(x, z)
    parts = [Statistics.of(x[i::64], z[i::64]) for i in range(64)]
    while len(parts) > 1:  # a tree, as workers would merge
        parts = [a + b for a, b in zip(parts[::2], parts[1::2])]
    assert_same(parts[0], whole)
    monkeypatch.setattr(module, "BLOCK", 17)
    assert_same(Statistics.of(x, z), whole)


def test_an_integer_weight_is_a_repeated_row():
    x, z = rows(n=50)
    w = np.random.default_rng(2).integers(0, 4, 50)
    weighted, repeated = Statistics.of(x, z, w), Statistics.of(np.repeat(x, w, 0), np.repeat(z, w, 0))
    np.testing.assert_allclose(weighted.S_xx, repeated.S_xx, rtol=1e-11)
    np.testing.assert_allclose(weighted.S_xz, repeated.S_xz, rtol=1e-9, atol=1e-9)
    assert weighted.weight == repeated.weight
    assert repeated.n_effective == repeated.n
    assert weighted.n_effective == w.sum() ** 2 / (w**2).sum()


def test_rows_without_weight_and_no_rows_are_neutral():
    x, z = rows(n=40)
    whole = Statistics.of(x, z)
    assert_same(Statistics.empty(7, 2) + whole, whole)
    nothing = Statistics.of(x, z, np.zeros(40))
    assert (nothing + whole).n == 80
    np.testing.assert_array_equal((whole + nothing).S_xx, whole.S_xx)
    assert Statistics.of(x[:0], z[:0]).n == 0
    np.testing.assert_array_equal(Statistics.of(x[:1], z[:1]).S_xx, np.zeros((7, 7)))


def test_the_second_moments_are_symmetric_to_the_bit():
    whole = Statistics.of(*rows(n=9000))
    np.testing.assert_array_equal(whole.S_xx, whole.S_xx.T)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_named(bad):
    x, z = rows(n=5000)
    x[4321, 3] = bad
    with pytest.raises(UserError, match=r"row 4,321"):
        accumulate([(x[:3000], z[:3000]), (x[3000:], z[3000:])])
    x, z = rows(n=20)
    z[7, 1] = bad
    with pytest.raises(UserError, match="row 7"):
        Statistics.of(x, z)


def test_mistakes_are_user_errors():
    x, z = rows(n=20)
    for call in (
        lambda: Statistics.of(x, z[:3]),
        lambda: Statistics.of(x, z, np.full(20, -1.0)),
        lambda: Statistics.of(x, z, np.full(20, np.nan)),
        lambda: Statistics.of(x, z, np.ones(3)),
        lambda: Statistics.of(x, z) + Statistics.of(x[:, :3], z),
        lambda: Statistics.of(np.full((20, 2), 1e308), z),
        lambda: accumulate([]),
    ):
        with pytest.raises(UserError):
            call()


def test_saved_and_loaded_is_the_same_to_the_bit(tmp_path):
    whole = Statistics.of(*rows(), np.random.default_rng(3).random(300))
    whole.save(tmp_path / "s.safetensors")
    again = Statistics.load(tmp_path / "s.safetensors")
    for name in NAMES:
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
    (tmp_path / "s.safetensors").write_bytes(b"broken")
    for name in ("s.safetensors", "missing"):
        with pytest.raises(UserError, match="statistics"):
            Statistics.load(tmp_path / name)


def test_solve_is_least_squares_and_does_not_care_for_scale():
    x, z = rows(n=500)
    weights, live = solve(Statistics.of(x, z))
    expected = np.linalg.lstsq(x - x.mean(0), z - z.mean(0), rcond=None)[0]
    np.testing.assert_allclose(weights, expected, rtol=1e-8)
    assert live == 7
    scale = np.logspace(-2, 2, 7)
    np.testing.assert_allclose(solve(Statistics.of(x * scale, z))[0] * scale[:, None], weights, rtol=1e-7)


def test_dead_and_duplicate_dimensions_get_no_weight():
    x, z = rows(n=500)
    noise = z[:, :1] * 1e-9 + 5  # a LayerNorm gain near zero, which happens to know the answer
    weights, live = solve(Statistics.of(np.hstack([x, noise, x[:, :1], np.zeros((500, 1))]), z))
    assert live == 7
    assert not weights[[7, 9]].any()
    np.testing.assert_allclose(weights[0], weights[8], rtol=1e-6)
    assert solve(Statistics.of(np.ones((9, 3)), z[:9]))[1] == 0
