"""Batches without look-alikes: what the order promises, against brute force and a matching theorem."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from embedtune.fit import batches, order
from embedtune.fit.batches import DistinctOrder, micro_batches


def epoch_of(made, epoch=0):
    """The batches of an epoch, and what was left out of it."""
    plans, lost = [], 0
    for index in range(made.steps):
        found, rows = made.rows(epoch * made.steps + index)
        assert found == epoch
        plans.append(rows.tolist())
        if index % batches.WINDOW == 0:
            lost += made.left_out
    return plans, lost


def draw(seed, size, anchors, positives):
    generator = np.random.default_rng(seed)
    return np.stack([generator.integers(0, anchors, size), generator.integers(0, positives, size)], 1)


def most_frequent(keys, rows):
    return max(np.bincount(column).max() for column in keys[rows].T)


def windows(made, epoch):
    """For each window: its rows in the order without keys, and how many batches it has."""
    steps = range(epoch * made.steps, (epoch + 1) * made.steps)
    natural = [order.batch_rows(step, made.batch, len(made.keys), made.seed)[1] for step in steps]
    for start in range(0, len(natural), batches.WINDOW):
        part = natural[start : start + batches.WINDOW]
        yield np.concatenate(part), len(part)


def check(made, epoch=0):
    """Everything that must hold of any epoch."""
    keys, plans, lost = made.keys, *epoch_of(made, epoch)
    flat = [row for plan in plans for row in plan]
    assert len(set(flat)) == len(flat) and set(flat) <= set(range(len(keys)))
    assert len(flat) + lost == len(keys), "left_out counts what is not there"
    assert made.left_out_of(epoch) == lost
    for plan in plans:
        assert 1 <= len(plan) <= made.batch
        for column in keys[plan].T:
            assert len(set(column.tolist())) == len(plan), "no two alike"
    for number, (rows, many) in enumerate(windows(made, epoch)):
        part = plans[number * batches.WINDOW :][:many]
        placed = {row for plan in part for row in plan}
        assert placed <= set(rows.tolist()), "rows move inside their window only"
        missing = set(rows.tolist()) - placed
        assert not missing or most_frequent(keys, rows) > many
        for row in missing:  # one of its texts stands in every batch: it could only come in if another went out
            assert any(all(keys[row, c] in keys[plan, c] for plan in part) for c in (0, 1))
    return plans, lost


pairs = st.integers(1, 40).flatmap(
    lambda n: st.lists(st.tuples(st.integers(0, n), st.integers(0, n)), min_size=1, max_size=60)
)


@settings(max_examples=150, deadline=None)
@given(pairs, st.integers(1, 20), st.integers(-3, 3), st.integers(1, 5))
@example([(0, 0), (0, 0), (1, 1), (2, 2)], 2, 0, 1)
@example([(0, 0)] * 5, 3, 0, 5)
@example([(0, 0), (0, 1), (1, 0), (1, 1)], 2, 0, 5)
def test_what_holds_of_every_epoch(keys, batch, seed, window):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "WINDOW", window)  # so that small data has several windows
        for epoch in (0, 1):
            check(DistinctOrder(np.array(keys), batch, seed), epoch)


@pytest.mark.parametrize("size, batch", [(6, 2), (6, 3), (7, 3), (8, 2), (5, 4)])
def test_nothing_is_left_out_where_it_need_not_be(size, batch):
    """Against brute force: a row is left out exactly where no arrangement at all has place for every row."""
    tried = 0
    for seed in range(60):
        keys = draw(seed, size, 4, 4)
        made = DistinctOrder(keys, batch, seed)
        plans, lost = check(made)
        needs = best(keys, batch, made.steps) < size
        assert (lost > 0) == needs, (seed, keys.tolist())
        tried += needs
    assert 5 < tried < 55


def best(keys, batch, many):
    """The most rows that can stand in `many` batches of `batch` without meeting their like, by trying all."""

    def free(held, row):
        return all(a != keys[row][0] and p != keys[row][1] for a, p, _ in held)

    def search(row, state):
        if row == len(keys):
            return 0
        found, seen = search(row + 1, state), set()
        for number, held in enumerate(state):
            if len(held) < batch and held not in seen and free(held, row):
                seen.add(held)
                grown = held | {(*map(int, keys[row]), row)}
                found = max(found, 1 + search(row + 1, (*state[:number], grown, *state[number + 1 :])))
        return found

    return search(0, (frozenset(),) * many)


def test_as_many_rows_as_fit_in_a_full_epoch():
    """No slack at all: each batch full, each anchor in as many pairs as there are batches."""
    keys = np.array(list(itertools.product(range(8), range(8))))  # 64 pairs, 8 batches of 8: a Latin square
    for seed in range(20):
        plans, lost = check(DistinctOrder(keys, 8, seed))
        assert lost == 0 and [len(plan) for plan in plans] == [8] * 8


@pytest.mark.parametrize(
    "size, batch, anchors, positives", [(640, 64, 80, 300), (3000, 32, 300, 3000), (900, 7, 60, 90)]
)
def test_larger_data(size, batch, anchors, positives):
    made = DistinctOrder(draw(0, size, anchors, positives), batch, 3)
    for epoch in range(2):
        check(made, epoch)


def test_any_step_asked_first_gives_the_same_rows():
    keys = draw(1, 1500, 200, 700)
    in_turn = DistinctOrder(keys, 10, 5)
    steps = range(3 * in_turn.steps)
    expected = [in_turn.rows(step) for step in steps]
    jumping = DistinctOrder(keys, 10, 5)
    generator = np.random.default_rng(0)
    for step in generator.permutation(len(expected))[:120].tolist():
        for made in (jumping, DistinctOrder(keys, 10, 5)):
            epoch, rows = made.rows(step)
            assert epoch == expected[step][0] and rows.tolist() == expected[step][1].tolist()
    jumping.left_out_of(1)
    assert jumping.rows(0)[1].tolist() == expected[0][1].tolist(), "counting does not disturb the order"


def test_seeds_and_epochs_differ():
    keys = draw(2, 400, 60, 400)
    one, two = DistinctOrder(keys, 16, 0), DistinctOrder(keys, 16, 1)
    plans = [epoch_of(one, 0)[0], epoch_of(one, 1)[0], epoch_of(two, 0)[0]]
    assert plans[0] != plans[1] and plans[0] != plans[2]
    assert plans[0] == epoch_of(DistinctOrder(keys, 16, 0), 0)[0]


def test_without_look_alikes_it_is_the_plain_order():
    keys = np.stack([np.arange(500), 500 - np.arange(500)], 1)
    made = DistinctOrder(keys, 12, 7)
    for step in range(2 * made.steps):
        plain = order.batch_rows(step, 12, 500, 7)
        assert made.rows(step)[0] == plain[0] and made.rows(step)[1].tolist() == plain[1].tolist()


def test_most_rows_stay_in_their_batch():
    """Moving is the exception: a batch stays a random sample."""
    keys = draw(3, 2000, 400, 2000)
    made = DistinctOrder(keys, 20, 1)
    stayed = sum(
        len(set(made.rows(step)[1].tolist()) & set(order.batch_rows(step, 20, 2000, 1)[1].tolist()))
        for step in range(made.steps)
    )
    assert stayed > 0.8 * 2000


def test_a_batch_larger_than_the_data():
    distinct = DistinctOrder(np.array([[0, 0], [1, 1], [2, 2]]), 64, 0)
    assert distinct.steps == 1 and sorted(distinct.rows(0)[1].tolist()) == [0, 1, 2] and distinct.left_out == 0
    shared = DistinctOrder(np.array([[0, 0], [0, 1], [2, 2]]), 64, 0)
    seen = [set(shared.rows(step)[1].tolist()) for step in range(20)]
    assert all(len(rows) == 2 and 2 in rows for rows in seen) and shared.left_out == 1
    assert {0, 1} <= set().union(*seen), "not always the same one is left out"


def test_one_row_and_one_key():
    assert DistinctOrder(np.array([[4, 9]]), 1, 0).rows(5) == (5, 0)
    alike = DistinctOrder(np.zeros((10, 2), int), 3, 0)
    plans, lost = check(alike)
    assert [len(plan) for plan in plans] == [1] * 4 and lost == 6


@pytest.mark.parametrize("padded", [False, True])
def test_micro_batches_hold_the_budget_and_every_row_once(padded):
    generator = np.random.default_rng(0)
    for _ in range(50):
        lengths = np.sort(generator.integers(1, 40, generator.integers(1, 60)))
        budget = int(generator.integers(1, 200))
        found = list(micro_batches(lengths, budget, padded))
        assert [a for a, _ in found] == [0, *(b for _, b in found[:-1])] and found[-1][1] == len(lengths)
        for a, b in found:
            cost = (b - a) * lengths[b - 1] if padded else lengths[a:b].sum()
            assert cost <= budget or b - a == 1
        for (a, b), (_, c) in itertools.pairwise(found):  # no batch could have taken the next row
            cost = (b + 1 - a) * lengths[b] if padded else lengths[a : b + 1].sum()
            assert cost > budget
            assert c > b
    assert list(micro_batches([], 10, padded)) == []


# ---- negatives of like length


@settings(max_examples=60, deadline=None)
@given(pairs, st.integers(1, 20), st.integers(-3, 3), st.integers(1, 5))
def test_with_lengths_the_same_holds_of_every_epoch(keys, batch, seed, window):
    lengths = np.random.default_rng(len(keys)).integers(3, 60, len(keys))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "WINDOW", window)
        for epoch in (0, 1):
            check(DistinctOrder(np.array(keys), batch, seed, lengths), epoch)


def test_the_rows_of_a_batch_have_like_lengths_and_short_batches_do_not_come_first():
    keys, lengths = draw(0, 4000, 3000, 3000), np.random.default_rng(1).lognormal(3.5, 0.8, 4000).round()
    natural, alike = DistinctOrder(keys, 32, 0), DistinctOrder(keys, 32, 0, lengths)
    spreads = [np.mean([np.log(lengths[rows]).std() for rows in epoch_of(made)[0]]) for made in (natural, alike)]
    assert spreads[1] < spreads[0] / 5
    means = [lengths[rows].mean() for rows in epoch_of(alike)[0]]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.3
    assert [rows.tolist() for rows in map(np.sort, epoch_of(alike, 1)[0])] != [
        rows.tolist() for rows in map(np.sort, epoch_of(alike, 0)[0])
    ]


def test_a_step_of_like_lengths_is_a_function_of_seed_and_step():
    """So a resumed run goes on with the very batches of one that was not stopped."""
    keys, lengths = draw(0, 500, 90, 90), np.arange(500) % 37
    one = DistinctOrder(keys, 4, 3, lengths)
    steps = list(range(one.steps + 20))
    found = {step: one.rows(step)[1].tolist() for step in steps}
    for step in steps[::-7]:
        assert DistinctOrder(keys, 4, 3, lengths).rows(step)[1].tolist() == found[step]
    assert any(DistinctOrder(keys, 4, 4, lengths).rows(step)[1].tolist() != found[step] for step in steps)
