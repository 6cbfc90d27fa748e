import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedtune import keyed
from embedtune.data import split
from embedtune.data import tokens as tokens_module
from embedtune.data.split import AllBut, also_in, hold_out
from embedtune.data.tokens import Tokens
from embedtune.errors import UserError


def tokens_of(rows, document=None, line=None):
    ends = np.cumsum([len(row) for row in rows])
    count = len(rows)
    document = np.arange(count) if document is None else np.asarray(document)
    line = np.zeros(count, int) if line is None else np.asarray(line)
    return Tokens(np.concatenate(rows), ends, document, line, np.ones(count, int), 0, count, 0)


def random_rows(count, seed=0, low=1, high=30, vocabulary=10_000):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, vocabulary, n) for n in draw.integers(low, high, count)]


def naive_leaks(train, dev):
    """Dev rows with at least 80 % of their shingles in one training row."""

    def shingles(row):
        return {tuple(row[i : i + 5]) for i in range(max(1, len(row) - 4))}

    known = [shingles(row) for row in train]
    return [n for n, row in enumerate(dev) if any(len(shingles(row) & k) >= 0.8 * len(shingles(row)) for k in known)]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(1, 50))
def test_also_in_is_the_definition(seed, vocabulary, block):
    """Rows over a tiny alphabet share many shingles; compared with sets, in blocks of any size."""
    rows = random_rows(70, seed, 1, 14, vocabulary)
    tokens = tokens_of(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "ROWS", block)
        found = also_in(tokens, np.arange(30, 70), np.arange(30))
    assert found.tolist() == naive_leaks(rows[30:], rows[:30])


def test_whole_documents_stay_together_where_they_are_short():
    document = np.repeat(np.arange(300), 5)
    tokens = tokens_of(random_rows(1500, low=8), document, np.tile(np.arange(5), 300))
    sides = hold_out(tokens, 100, 3)
    assert not set(document[sides.train.whole()]) & set(document[sides.dev])
    assert 100 <= len(sides.dev) <= 105 and sides.moved == 0


def test_neighbouring_lines_of_a_long_document_stay_together():
    tokens = tokens_of(random_rows(2000, low=8), np.zeros(2000, int), np.arange(2000))
    sides = hold_out(tokens, 200, 0)
    run = 200 // 8
    assert not set(sides.train.whole() // run) & set(sides.dev // run)
    assert len(sides.dev) == 200


def test_chunks_of_one_line_stay_together():
    line = np.repeat(np.arange(400), 3)
    tokens = tokens_of(random_rows(1200, low=8), np.zeros(1200, int), line)
    sides = hold_out(tokens, 8, 1)  # runs of a single line
    assert len(sides.dev) and not set(line[sides.train.whole()]) & set(line[sides.dev])


def test_what_is_moved_really_is_near_and_nothing_near_remains():
    rows = random_rows(400, 5, 12, 30)
    draw = np.random.default_rng(1)
    for number in range(0, 400, 5):  # a fifth are copies of another row with one token changed at the end
        rows[number] = rows[(number * 7 + 3) % 400].copy()
        rows[number][-1] = draw.integers(10_000)
    tokens = tokens_of(rows)
    sides = hold_out(tokens, 40, 2)
    assert sides.moved > 0
    assert len(sides.dev) + sides.moved == 40
    assert naive_leaks([rows[n] for n in sides.train.whole()], [rows[n] for n in sides.dev]) == []


def test_exact_repeats_never_stand_on_both_sides_however_many_there_are():
    """Also where a line is repeated so often that its shingles are boilerplate (more than COMMON held-out rows)."""
    rows = random_rows(2000, 1, 8)
    for number in range(0, 2000, 2):
        rows[number] = np.arange(6)
    tokens = tokens_of(rows)
    sides = hold_out(tokens, 200, 0)
    train = {rows[n].tobytes() for n in sides.train.whole()}
    assert not [n for n in sides.dev if rows[n].tobytes() in train]
    assert len(sides.dev) > 50


def test_the_split_is_whole_and_a_function_of_the_seed():
    tokens = tokens_of(random_rows(500, low=8))
    one, same, other = (hold_out(tokens, 30, seed) for seed in (1, 1, 2))
    assert np.array_equal(np.sort(np.concatenate([one.train, one.dev])), np.arange(500))
    assert np.array_equal(one.dev, same.dev) and not np.array_equal(one.dev, other.dev)


def test_at_most_a_tenth_is_held_out():
    assert len(hold_out(tokens_of(random_rows(100, low=8)), 2000, 0).dev) == 10


def test_the_best_spread_is_not_the_beginning():
    dev = hold_out(tokens_of(random_rows(1000, low=8)), 100, 0).dev
    assert dev.min() < 200 and dev.max() > 800


def test_too_little_text_is_a_users_error():
    with pytest.raises(UserError, match="too few to hold any out"):
        hold_out(tokens_of(random_rows(9)), 5, 0)
    with pytest.raises(UserError, match="every row that could be held out"):
        hold_out(tokens_of([np.arange(9)] * 40), 5, 0)


def split_at_once(tokens, rows, seed):
    """What `hold_out` does, of arrays of all rows."""
    wanted = min(rows, len(tokens) // 10)
    places = np.stack([tokens.document, tokens.line // max(1, min(split.RUN, wanted // 8))], axis=1)
    groups = np.cumsum((np.diff(places, axis=0, prepend=[[-1, -1]]) != 0).any(axis=1)) - 1
    keys = keyed.key(seed, groups)
    held = keys <= np.sort(keys)[wanted - 1]
    found = also_in(tokens, np.flatnonzero(~held), np.flatnonzero(held))
    held[found] = False
    return np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist(), len(found)


@pytest.mark.parametrize("seed", range(6))
def test_taken_block_by_block_it_is_the_same_split(monkeypatch, seed):
    """Rows that repeat each other, documents of all sizes, and blocks that end anywhere in them."""
    draw = np.random.default_rng(seed)
    pool = random_rows(900, seed=seed, low=6)
    rows = [pool[n] for n in draw.integers(0, len(pool), 1000)]
    document = np.sort(draw.integers(0, 40, 1000))
    line = np.arange(1000) - np.searchsorted(document, document)
    tokens = tokens_of(rows, document, line)
    monkeypatch.setattr(tokens_module, "ROWS", 37)
    monkeypatch.setattr(split, "ROWS", 53)
    found = hold_out(tokens, 100, seed)
    assert (list(found.train), found.dev.tolist(), found.moved) == split_at_once(tokens, 100, seed)
    assert found.moved > 0


def test_all_rows_but_some_are_counted_through():
    assert list(AllBut(7, np.array([0, 3, 4]))) == [1, 2, 5, 6] == AllBut(7, np.array([0, 3, 4])).whole().tolist()
