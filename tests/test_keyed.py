import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from embedtune import keyed

U64 = st.integers(0, 2**64 - 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(-(2**63), 2**64 - 1), st.integers(0, 100))
def test_a_permutation_is_a_bijection(size, seed, epoch):
    found = keyed.permutation(np.arange(size), size, seed, epoch)
    assert np.array_equal(np.sort(found), np.arange(size))


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 10**12), U64)
def test_any_position_is_evaluated_alone(data, size, seed):
    """In a space that no table could hold; distinct positions go to distinct places inside it."""
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    together = keyed.permutation(np.array(positions), size, seed, 3)
    alone = [int(keyed.permutation(np.array([p]), size, seed, 3)[0]) for p in positions]
    assert together.tolist() == alone
    assert len(set(alone)) == len(alone) and all(0 <= place < size for place in alone)


def test_a_permutation_mixes():
    """Over many keys every value comes first about equally often, and neighbours do not stay neighbours."""
    size, keys = 16, 4000
    first = [int(keyed.permutation(np.array([0]), size, seed, 0)[0]) for seed in range(keys)]
    counts = np.bincount(first, minlength=size)
    expected = keys / size
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi-square, 15 degrees of freedom: p < 1e-4
    order = keyed.permutation(np.arange(10_000), 10_000, 1, 0)
    assert (np.abs(np.diff(order)) == 1).mean() < 0.002
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05


@given(st.lists(U64, min_size=2, max_size=50, unique=True))
def test_mix_is_a_bijection(values):
    assert len(np.unique(keyed.mix(np.array(values, np.uint64)))) == len(values)


def test_keys_depend_on_every_part_and_its_place():
    parts = np.arange(2000)
    keys = keyed.key(parts[:40, None], parts[None, :50])
    assert keys.shape == (40, 50) and len(np.unique(keys)) == 2000
    assert keyed.key(1, 2)[0] != keyed.key(2, 1)[0]
    assert keyed.key(1)[0] != keyed.key(1, 0)[0]
    assert keyed.key(-1)[0] == keyed.key(2**64 - 1)[0]


def test_keys_never_change():
    """Runs that were started by an older version must resume: these numbers are a file format."""
    assert [int(k) for k in keyed.key(7, np.array([0, 1]))] == [int(keyed.key(7, 0)[0]), int(keyed.key(7, 1)[0])]
    assert int(keyed.key(1, 2, 3)[0]) == 4988087647507490487
    assert keyed.permutation(np.arange(8), 8, 5, 1).tolist() == [1, 2, 3, 6, 7, 0, 4, 5]


def test_uniform_is_uniform():
    numbers = keyed.uniform(keyed.key(3, np.arange(100_000)))
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 95  # 49 degrees of freedom: p < 1e-4
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02
    assert keyed.uniform(np.array([2**64 - 1], np.uint64))[0] < 1
