import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedtune import nearest
from embedtune.errors import UserError
from embedtune.nearest import Cut, Scratch, Unit, ranks, top_k


def exact(queries, corpus, k, prefer=None):
    """All scores in float64, rounded once, and a full sort."""
    scores = (np.asarray(queries, np.float64) @ np.asarray(corpus, np.float64).T).astype(np.float32)
    prefer = np.arange(scores.shape[1]) if prefer is None else prefer
    order = np.array([np.lexsort((np.arange(len(prefer)), prefer, -row)) for row in scores]).reshape(len(scores), -1)
    order = order[:, :k]
    return np.take_along_axis(scores, order, 1), order


def vectors(seed, n, d=16):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


@pytest.mark.parametrize("block", [1, 7, 100, 5000])
@pytest.mark.parametrize("k", [1, 10, 300, 1000])
def test_same_as_a_full_sort(block, k, monkeypatch):
    monkeypatch.setattr(nearest, "SCORES", 900)  # several blocks of queries, too
    queries, corpus = vectors(0, 23), vectors(1, 300)
    scores, found = top_k(queries, corpus, k, block=block)
    wanted_scores, wanted = exact(queries, corpus, k)
    assert scores.dtype == np.float32 and found.dtype == np.int64 and scores.shape == (23, min(k, 300))
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(scores, wanted_scores)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ties_go_by_preference_whatever_the_blocks(data):
    """Small integers: nearly every score is a tie, and all of them are exact."""
    seed = data.draw(st.integers(0, 10_000))
    draw = np.random.default_rng(seed)
    n, q, k = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 70))
    queries = draw.integers(-1, 2, (q, 3)).astype(np.float32)
    corpus = draw.integers(-1, 2, (n, 3)).astype(np.float32)
    prefer = data.draw(st.sampled_from([None, draw.permutation(n), draw.integers(0, 3, n)]))
    block = data.draw(st.integers(1, 80))
    scores, found = top_k(queries, corpus, k, prefer=prefer, block=block)
    wanted_scores, wanted = exact(queries, corpus, k, prefer)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(scores, wanted_scores)
    pairs = np.stack([draw.integers(0, q, 40), draw.integers(0, n, 40)], 1)
    _, whole = exact(queries, corpus, n, prefer)
    places = np.array([int(np.flatnonzero(whole[a] == b)[0]) + 1 for a, b in pairs])
    np.testing.assert_array_equal(ranks(queries, corpus, pairs, prefer=prefer, block=block), places)


def test_equal_vectors_have_equal_scores_wherever_they_stand():
    """The float32 product alone gives copies different last bits, by where they stand in a block."""
    corpus = np.repeat(vectors(2, 37, 384), 11, axis=0)[np.random.default_rng(0).permutation(407)]
    queries = vectors(3, 5, 384)
    answers = [top_k(queries, corpus, 50, block=block) for block in (50, 64, 97, 407)]
    for scores, found in answers:
        np.testing.assert_array_equal(scores, answers[0][0])
        np.testing.assert_array_equal(found, answers[0][1])
    for scores, found in zip(*answers[0]):
        for value in np.unique(scores):
            assert (np.diff(found[scores == value]) > 0).all()
    assert len(np.unique(answers[0][0][0])) == 5  # 50 places are 4 groups of 11 and 6 of a fifth


def test_all_the_same():
    scores, found = top_k(np.ones((3, 4), np.float32), np.ones((100, 4), np.float32), 5, block=10)
    assert (found == np.arange(5)).all() and (scores == 4).all()


def test_ranks_are_places_in_the_whole_order():
    queries, corpus = vectors(4, 11), vectors(5, 200)
    prefer = np.random.default_rng(1).permutation(200)
    _, whole = top_k(queries, corpus, 200, prefer=prefer)
    pairs = np.stack([np.repeat(np.arange(11), 200), whole.ravel()], 1)
    shuffled = np.random.default_rng(2).permutation(len(pairs))
    got = ranks(queries, corpus, pairs[shuffled], prefer=prefer, block=33)
    np.testing.assert_array_equal(got, np.tile(np.arange(1, 201), 11)[shuffled])
    assert ranks(queries, corpus, pairs[:0]).shape == (0,)


def test_memory_maps_and_halves(tmp_path):
    corpus, queries = vectors(6, 500).astype(np.float16), vectors(7, 4)
    np.save(tmp_path / "corpus.npy", corpus)
    mapped = np.load(tmp_path / "corpus.npy", mmap_mode="r", allow_pickle=False)
    scores, found = top_k(queries, mapped, 7, block=64)
    wanted_scores, wanted = exact(queries, corpus.astype(np.float32), 7)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(scores, wanted_scores)


def test_unit_is_cosine_of_the_first_numbers():
    corpus, queries = vectors(8, 90) * 7, vectors(9, 6)
    corpus[13] = 0
    scores, _ = top_k(Unit(queries, 5), Unit(corpus, 5), 90, block=16)
    a, b = queries[:, :5].astype(np.float64), corpus[:, :5].astype(np.float64)
    lengths = np.linalg.norm(b, axis=1)
    cosines = a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.where(lengths > 0, lengths, 1)
    np.testing.assert_allclose(scores, -np.sort(-cosines, axis=1), atol=2e-7)
    assert Unit(corpus, 5).shape == (90, 5) and Unit(corpus).shape == (90, 16)


def test_nothing_to_find():
    scores, found = top_k(vectors(0, 3), vectors(0, 0), 5)
    assert scores.shape == found.shape == (3, 0)
    assert top_k(vectors(0, 0), vectors(0, 9), 5)[1].shape == (0, 5)


def test_vectors_that_are_not_finite_are_refused():
    corpus = vectors(1, 50)
    corpus[17, 3] = np.nan
    with pytest.raises(UserError, match="row 17 is not finite"):
        top_k(vectors(0, 3), corpus, 5, block=10)
    with pytest.raises(UserError, match="query: the vector of row 0"):
        top_k(np.full((1, 16), np.inf, np.float32), vectors(1, 9), 5)


def test_memory_is_bounded_by_the_block(monkeypatch):
    """No matrix product is larger than the limit."""
    monkeypatch.setattr(nearest, "SCORES", 4096)
    sizes, partition = [], np.partition

    def watched(array, *rest, **more):
        sizes.append(array.size)
        return partition(array, *rest, **more)

    monkeypatch.setattr(np, "partition", watched)
    top_k(vectors(0, 1000), vectors(1, 3000), 3, block=256)
    assert sizes and max(sizes) <= 4096


def test_a_matrix_in_a_file_reads_like_one_in_memory():
    whole = vectors(0, 50)
    kept = Scratch(io.BytesIO(whole.tobytes()), whole.shape)
    for rows in (slice(None), slice(3, 9), slice(40, 99), slice(9, 3), np.array([4, 5, 6, 49, 0, 0, 7]), [3], []):
        wanted = whole[np.array(rows, np.int64) if isinstance(rows, list) else rows]
        for view in (kept, Cut(kept), Cut(whole)):
            np.testing.assert_array_equal(view[rows], wanted)
        np.testing.assert_array_equal(Cut(kept, 5)[rows], wanted[:, :5])
        np.testing.assert_array_equal(Unit(kept, 5)[rows], Unit(whole, 5)[np.arange(50)[rows]])
    assert Cut(kept, 5).shape == (50, 5) and Unit(kept, 99).shape == (50, 16)
    pairs = np.array([[3, 1], [0, 49], [3, 2]])
    for dim in (None, 5):
        in_file, in_memory = Unit(kept, dim), Unit(whole, dim)
        for mine, theirs in zip(top_k(in_file, in_file, 9, block=16), top_k(in_memory, in_memory, 9)):
            np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(ranks(in_file, in_file, pairs, block=16), ranks(in_memory, in_memory, pairs))
