"""Near-duplicates against brute force: same pairs, same clusters, same components, whatever the blocks."""

import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedtune.data import near as near_module
from embedtune.data import scratch
from embedtune.data import shingles as shingles_module
from embedtune.data.clean import shingles, text_hash
from embedtune.data.near import components, leaders, repeated
from embedtune.data.shingles import sets_of

WORDS = st.lists(st.sampled_from(["a", "b", "B", "c"]), max_size=14).map(" ".join)
THRESHOLDS = st.sampled_from([0.3, 0.5, 0.6, 0.8, 1.0])


def overlap(a, b):
    """The least Jaccard overlap over the columns."""
    both = [(shingles(x), shingles(y)) for x, y in zip(a, b, strict=True)]
    return min(len(x & y) / len(x | y) for x, y in both)


def same(a, b):
    return [text_hash(x) for x in a] == [text_hash(y) for y in b]


def is_near(a, b, threshold):
    return same(a, b) or overlap(a, b) >= threshold


def brute_leaders(rows, threshold):
    label = []
    for i, row in enumerate(rows):
        label.append(next((j for j in range(i) if label[j] == j and is_near(row, rows[j], threshold)), i))
    return label


def brute_components(rows, threshold):
    label = list(range(len(rows)))
    for i, j in combinations(range(len(rows)), 2):
        if is_near(rows[i], rows[j], threshold):
            a, b = sorted((label[i], label[j]))
            label = [a if each == b else each for each in label]
    return label


@pytest.fixture(params=[5, 250_000], ids=["small blocks", "one block"], scope="module")
def block(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shingles_module, "BLOCK", request.param)
        if request.param == 5:
            for module, name, value in ((scratch, "READ", 2), (scratch, "PART", 3), (near_module, "TOUCHED", 4)):
                patch.setattr(module, name, value)
        yield


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(WORDS, max_size=25), threshold=THRESHOLDS)
def test_texts_against_brute_force(block, rows, threshold):
    rows = [(row,) for row in rows]
    sets = sets_of(rows)
    assert components(sets, threshold).tolist() == brute_components(rows, threshold)
    assert leaders(sets, threshold).tolist() == brute_leaders(rows, threshold)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(WORDS, WORDS), max_size=20), threshold=THRESHOLDS)
def test_rows_of_two_columns_are_near_when_both_are(block, rows, threshold):
    assert components(sets_of(rows), threshold).tolist() == brute_components(rows, threshold)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(WORDS, max_size=15), others=st.lists(WORDS, max_size=15), threshold=THRESHOLDS, at=st.integers(0, 15)
)
def test_repeated_against_brute_force(block, rows, others, threshold, at):
    found = repeated(
        sets_of([row] for row in rows),
        [sets_of([[other] for other in part], disk=False) for part in (others[:at], others[at:])],
        threshold,
    )
    for i, row in enumerate(rows):
        exact = any(same([row], [other]) for other in others)
        assert found.exact[i] == exact
        assert found.near[i] == (not exact and any(overlap([row], [other]) >= threshold for other in others))
        if exact or found.near[i]:
            assert is_near([row], [others[found.where[i]]], 1.1 if exact else threshold)


def test_without_a_threshold_only_exact_repeats_count():
    rows = [["a b c d e f"], ["A  b c d e f"], ["a b c d e f g h i j k l m n"]]
    sets = sets_of(rows)
    assert leaders(sets, None).tolist() == components(sets, None).tolist() == [0, 0, 2]
    assert repeated(sets, [sets], None).exact.all() and not repeated(sets, [sets], None).near.any()


def many(count, words=40, changed=0, seed=0):
    draw = random.Random(seed)
    base = [f"w{i}" for i in range(words)]
    for _ in range(count):
        text = list(base) if changed else [f"w{draw.randrange(100_000)}" for _ in base]
        for _ in range(changed):
            text[draw.randrange(words)] = f"x{draw.randrange(10**9)}"
        yield [" ".join(text)]


def test_planted_pairs_are_all_found_among_many():
    """Every pair at the threshold or just above it: MinHash would miss one in twenty of them."""
    rows = list(many(4000))
    for i in range(500):
        words = rows[i][0].split()
        rows.append([" ".join(["other", *words[1:-3], "ends", "so", "here"])])  # 34 shared of 42: Jaccard 0.8095
        assert 0.8 <= overlap(rows[i], rows[-1]) < 0.85
    expected = list(range(4000)) + list(range(500))
    assert components(sets_of(rows), 0.8).tolist() == leaders(sets_of(rows), 0.8).tolist() == expected


def test_form_letters_end_in_time_and_are_never_joined_wrongly(monkeypatch):
    """More rows share their rarest shingles than are followed: then pairs may be missed, but none is invented."""
    monkeypatch.setattr(near_module, "CROWD", 3)
    rows = list(many(300, changed=1)) + [[f"{i} something else altogether {i} of its own"] for i in range(50)]
    label = components(sets_of(rows), 0.8)
    expected = np.array(brute_components(rows, 0.8))
    for i, j in combinations(range(len(rows)), 2):
        assert expected[i] == expected[j] or label[i] != label[j]
    assert len(set(label[:300])) < 30
    found = repeated(sets_of(rows[:50]), [sets_of(rows[50:])], 0.8)
    assert found.near.all(), "the check of leaks knows no crowd"


def test_results_do_not_depend_on_shared_places_in_the_table_of_counts(monkeypatch):
    monkeypatch.setattr(near_module, "TABLE_BITS", 2)
    rows = list(many(200)) + [[row[0] + " more"] for row in many(200)]
    assert components(sets_of(rows), 0.8).tolist() == [*range(200), *range(200)]


def test_hostile_rows():
    rows = [
        [""],
        [" \u3000\n"],
        ["\ud800"],
        ["\ud800 "],
        ["\0"],
        ["a" * 100_000],
        ["x " * 100_000],
        [""] * 20,
        ["", "a"],
    ]
    sets = sets_of(rows)
    assert leaders(sets, 0.8).tolist() == [0, 0, 2, 2, 4, 5, 6, 7, 8]
    assert components(sets_of([]), 0.8).tolist() == [] == leaders(sets_of([]), 0.8).tolist()
    assert len(repeated(sets_of([]), [sets], 0.8).exact) == 0
    assert not repeated(sets, [sets_of([], disk=False)], 0.8).exact.any()
