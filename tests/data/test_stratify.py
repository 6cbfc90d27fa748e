"""Parts of each class that do not cut a group."""

import numpy as np
import pytest

from embedtune.data.stratify import stratified, take


def one_hot(classes):
    return np.eye(max(classes) + 1, dtype=np.int64)[classes]


@pytest.mark.parametrize("seed", range(4))
def test_no_group_is_cut_and_no_class_passes_its_share(seed):
    draw = np.random.default_rng(seed)
    classes, groups = draw.integers(0, 6, 500), draw.integers(0, 400, 500)
    counts = one_hot(classes)
    part = stratified(counts, groups, (0.1, 0.2), seed)
    for group in set(groups.tolist()):
        assert len(set(part[groups == group])) == 1
    total = counts.sum(0)
    for number, share in ((1, 0.1), (2, 0.2)):
        held = counts[part == number].sum(0)
        assert (held <= np.maximum(1, np.round(total * share))).all() and (held >= 0.6 * total * share).all()
    assert (part == stratified(counts, groups, (0.1, 0.2), seed)).all()
    assert (part != stratified(counts, groups, (0.1, 0.2), seed + 1)).any()


def test_single_rows_meet_their_shares_to_a_row():
    counts = one_hot(np.repeat([0, 1, 2], (100, 50, 10)))
    part = stratified(counts, np.arange(160), (0.1, 0.2), 0)
    assert [counts[part == number].sum(0).tolist() for number in (1, 2)] == [[10, 5, 1], [20, 10, 2]]


def test_a_rare_class_stays_where_it_is_learned():
    classes = np.repeat([0, 1, 2, 3], (40, 2, 3, 4))
    counts = one_hot(classes)
    part = stratified(counts, np.arange(len(classes)), (0.1, 0.2), 0)
    assert [(part[classes == c] == 0).sum() for c in (1, 2, 3)] == [2, 2, 2]
    assert sorted(part[classes == 3]) == [0, 0, 1, 2]


def test_rows_may_count_for_several_classes_or_none():
    draw = np.random.default_rng(0)
    counts = np.hstack([draw.integers(0, 3, (300, 4)) * (draw.random((300, 4)) < 0.3), np.ones((300, 1))]).astype(int)
    part = stratified(counts, np.arange(300), (0.1, 0.2), 0)
    for number, share in ((1, 0.1), (2, 0.2)):
        assert (counts[part == number].sum(0) <= np.round(counts.sum(0) * share)).all()
        assert (part == number).sum() >= 0.7 * share * 300


def test_nothing_is_taken_beyond_the_quota():
    counts = one_hot([0] * 10)
    assert take(counts, np.zeros(10, int), np.array([9]), 0, 1).sum() == 0
    assert take(counts, np.arange(10), np.array([9]), 0, 1).sum() == 9
