import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedtune.fit import order, schedule


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 400), st.integers(1, 50), st.integers(0, 2**32), st.integers(0, 3))
def test_every_row_exactly_once_an_epoch(size, batch, seed, epoch):
    steps = order.steps_per_epoch(size, batch)
    found = [order.batch_rows(epoch * steps + index, batch, size, seed) for index in range(steps)]
    assert all(number == epoch for number, _ in found)
    assert all(len(rows) == batch for _, rows in found[:-1]) and 1 <= len(found[-1][1]) <= batch
    assert np.array_equal(np.sort(np.concatenate([rows for _, rows in found])), np.arange(size))


def test_epochs_and_seeds_differ():
    orders = [order.batch_rows(epoch, 100, 100, seed)[1].tolist() for epoch in range(3) for seed in range(3)]
    assert len({tuple(o) for o in orders}) == 9


def test_a_far_step_is_arithmetic(monkeypatch):
    """Resuming at step 10^6 of a 10^7-row epoch touches one batch of positions, not what came before."""
    touched = []
    inner = order.permutation
    monkeypatch.setattr(order, "permutation", lambda p, *rest: touched.append(len(p)) or inner(p, *rest))
    epoch, rows = order.batch_rows(10**6, 8, 10**7, 1)
    assert epoch == 0 and len(rows) == 8 and touched == [8]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "wsd"])
def test_schedules_rise_then_do_as_they_say(kind):
    total = 100
    values = [schedule.factor(step, total, kind, 0.1) for step in range(total)]
    assert values[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert max(values) == pytest.approx(1.0) and min(values) > 0
    after = values[10:]
    assert all(a >= b for a, b in zip(after, after[1:]))
    match kind:
        case "linear":
            assert after == pytest.approx([(90 - n) / 90 for n in range(90)])
        case "cosine":
            assert after[45] == pytest.approx(0.5) and after[-1] < 0.001
        case "constant":
            assert set(after) == {1.0}
        case "wsd":
            assert after[:80] == [1.0] * 80 and after[-1] == pytest.approx(0.1)


def test_warmup_is_a_fraction_or_a_number_of_steps():
    assert schedule.warmup_steps(0.05, 100) == 5
    assert schedule.warmup_steps(0.001, 100) == 1
    assert schedule.warmup_steps(0, 100) == 0
    assert schedule.warmup_steps(7, 100) == 7
    assert schedule.warmup_steps(700, 100) == 100
    assert schedule.factor(0, 1, "linear", 0.0) == 1.0
