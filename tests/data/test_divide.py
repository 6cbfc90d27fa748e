"""Splitting: groups are what brute force says, never straddle parts, and the parts have no text in common."""

import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedtune import files
from embedtune.data import divide as divide_module
from embedtune.data import near as near_module
from embedtune.data.clean import shingles, text_hash
from embedtune.data.divide import assign_groups, leaks, pair_groups, split, text_groups
from embedtune.data.divided import Plan
from embedtune.data.pairs import Pair, ScoredPair
from embedtune.data.read import read_rows, read_texts
from embedtune.errors import UserError

WORDS = st.lists(st.sampled_from(["a", "b", "B", "c", "d"]), min_size=1, max_size=9).map(" ".join)
HALVES = {"train": 0.5, "dev": 0.5}
LIMITS = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def near(a, b, threshold=0.8):
    x, y = shingles(a), shingles(b)
    return text_hash(a) == text_hash(b) or len(x & y) / len(x | y) >= threshold


def brute_groups(rows, threshold=0.8):
    """Rows, each a list of texts: joined where any text of one is near any of the other, and so on; ids from 0."""
    label = list(range(len(rows)))
    for i, j in combinations(range(len(rows)), 2):
        if any(near(a, b, threshold) for a in rows[i] for b in rows[j]):
            label = [label[i] if each == label[j] else each for each in label]
    ids: dict[int, int] = {}
    return [ids.setdefault(each, len(ids)) for each in label]


def pair(anchor, positive, negatives=(), group=None):
    return Pair(anchor, positive, negatives, "the list", 1, group)


def texts(count, seed=0):
    draw = np.random.default_rng(seed)
    return [" ".join(f"w{number}" for number in draw.integers(100_000, size=12)) for _ in range(count)]


@LIMITS
@given(st.lists(WORDS, max_size=15), st.sampled_from([0.5, 0.8]))
def test_text_groups_are_those_of_brute_force(found, threshold):
    assert text_groups(found, threshold).tolist() == brute_groups([[text] for text in found], threshold)


@LIMITS
@given(st.lists(st.tuples(WORDS, WORDS), max_size=12))
def test_pair_groups_are_those_of_brute_force(rows):
    assert pair_groups([pair(*row) for row in rows]).tolist() == brute_groups(rows)
    assert pair_groups([ScoredPair(*row, 1.0, "x", 1) for row in rows]).tolist() == brute_groups(rows)


def test_pair_groups_pass_on_what_is_shared():
    a, b, c, d, e = texts(5)
    rows = [(a, b), (c, d), (a.upper(), d + " more"), (e, e)]
    assert pair_groups([pair(*row) for row in rows]).tolist() == [0, 0, 0, 1]
    assert pair_groups([pair(*row) for row in rows], None).tolist() == [0, 1, 0, 2], "only exact repeats"
    assert pair_groups([pair(a, b, (e,)), pair(c, d, (e,))]).tolist() == [0, 1], "negatives do not join"
    named = [pair(a, b, group="x"), pair(c, d), pair(e, e, group="x"), pair(a, c, group="y")]
    assert pair_groups(named).tolist() == [0, 0, 0, 0]
    assert pair_groups(named[:3]).tolist() == [0, 1, 0], "the same group joins what shares no text"
    assert pair_groups([]).tolist() == []


GROUPS = st.lists(st.integers(0, 12), min_size=1, max_size=80)
SHARES = st.sampled_from([[0.8, 0.1, 0.1], [0.5, 0.5], [0.9, 0.1], [0.25] * 4])


@LIMITS
@given(GROUPS, SHARES, st.integers(0, 2**32))
def test_groups_never_straddle_parts(groups, shares, seed):
    groups = np.array(groups)
    part = assign_groups(groups, shares, seed)
    assert len(part) == len(groups) and part.min() >= 0 and part.max() < len(shares)
    assert all(len(set(part[groups == group])) == 1 for group in set(groups.tolist()))
    if len(set(groups.tolist())) >= len(shares):
        assert set(part) == set(range(len(shares))), "no part is empty"
    assert np.array_equal(part, assign_groups(groups, shares, seed))
    assert np.array_equal(part, assign_groups(groups * 7 + 3, shares, seed)), "ids are only names"


@LIMITS
@given(st.lists(st.integers(1, 10), min_size=1, max_size=40), st.integers(100, 400), SHARES, st.integers(0, 99))
def test_sizes_are_right_to_a_row_where_enough_rows_stand_alone(sizes, alone, shares, seed):
    groups = np.concatenate([np.repeat(np.arange(len(sizes)), sizes), 1000 + np.arange(alone)])
    sizes_of_parts = np.bincount(assign_groups(groups, shares, seed), minlength=len(shares))
    if sum(sizes) <= 0.1 * len(groups) * min(shares):
        assert np.abs(sizes_of_parts - np.array(shares) * len(groups)).max() < 1
    assert np.abs(sizes_of_parts - np.array(shares) * len(groups)).max() <= 10


def test_another_seed_gives_another_division_and_large_groups_are_fair():
    groups = np.repeat(np.arange(200), 5)
    first = assign_groups(groups, [0.8, 0.2], 0)
    assert not np.array_equal(first, assign_groups(groups, [0.8, 0.2], 1))
    with_large = np.concatenate([np.zeros(90, int), 1 + np.arange(910)])
    large = [assign_groups(with_large, [0.8, 0.1, 0.1], seed)[0] for seed in range(300)]
    shares = np.bincount(large, minlength=3) / 300
    assert abs(shares[0] - 0.8) < 0.1 and shares[1] > 0.03 and shares[2] > 0.03
    assert assign_groups(np.zeros(10, int), [0.8, 0.2], 0).tolist() == [0] * 10, "fits nowhere: to the largest"


def test_a_group_goes_where_it_fits():
    groups = np.concatenate([np.repeat(np.arange(12), 7), 100 + np.arange(16)])
    for seed in range(30):
        assert np.bincount(assign_groups(groups, [0.8, 0.1, 0.1], seed)).tolist() == [80, 10, 10]


@LIMITS
@given(st.lists(WORDS, max_size=15), st.lists(WORDS, max_size=15), st.sampled_from([0.5, 0.8]))
def test_leaks_are_those_of_brute_force(train, dev, threshold):
    found = leaks(train, dev, threshold)
    exact = [any(text_hash(a) == text_hash(b) for a in train) for b in dev]
    close = [any(near(a, b, threshold) for a in train) for b in dev]
    assert found.exact == sum(exact) and found.exact + found.near == sum(close)
    assert found.rows.tolist() == [i for i, yes in enumerate(close) if yes]
    assert all(near(train[j], dev[i], threshold) for i, j in zip(found.rows, found.where, strict=True))
    assert len(found.examples) == min(3, len(found.rows))


def test_leaks_stream_the_training_side(monkeypatch):
    monkeypatch.setattr(divide_module, "CHARACTERS", 500)
    train = texts(1000)
    dev = [train[7].upper(), "new words altogether", train[900] + " end", train[999]]
    found = leaks(iter(train), iter(dev))
    assert (found.exact, found.near) == (2, 1)
    assert found.rows.tolist() == [0, 2, 3] and found.where.tolist() == [7, 900, 999]
    assert found.examples == [
        "text 1 of dev is text 8 of train",
        "text 3 of dev is nearly text 901 of train",
        "text 4 of dev is text 1,000 of train",
    ]


def parts_of(folder, names=("train", "dev", "test"), form="jsonl"):
    return [[row.values for row in read_rows(folder / f"{name}.{form}")] for name in names]


@LIMITS
@given(st.lists(st.tuples(WORDS, WORDS), min_size=2, max_size=20), st.integers(0, 5))
def test_parts_by_cluster_have_nothing_in_common_and_lose_nothing(tmp_path, rows, seed):
    data = [{"anchor": a, "positive": b, "number": i} for i, (a, b) in enumerate(rows)]
    plan = Plan(parts=HALVES, seed=seed)
    if len(set(brute_groups(rows))) < 2:
        with pytest.raises(UserError, match=r"hangs together: 1 group\(s\) for 2 parts"):
            split(data, tmp_path / "out", plan, force=True)
        return
    done = split(data, tmp_path / "out", plan, force=True)
    train, dev = parts_of(tmp_path / "out", ("train", "dev"))
    assert sorted(row["number"] for row in train + dev) == list(range(len(rows)))
    assert all(data[row["number"]] == row for row in train + dev)
    for a in train:
        for b in dev:
            assert not any(near(x, y) for x in (a["anchor"], a["positive"]) for y in (b["anchor"], b["positive"]))
    assert done.groups == len(set(brute_groups(rows))) and all(o.exact == o.near == 0 for o in done.overlaps)
    assert done.used == sum(part["rows"] for part in done.parts.values())


def test_documents_stay_whole_in_text(tmp_path):
    lines = texts(300)
    data = tmp_path / "a.txt"
    data.write_text("\n\n".join("\n".join(lines[i : i + 3]) for i in range(0, 300, 3)) + "\n")
    done = split(data, tmp_path / "out", Plan(by="document"))
    assert [part["rows"] for part in done.parts.values()] == [240, 30, 30] and done.groups == 100
    seen = []
    for name in ("train", "dev", "test"):
        documents: dict[int, list[str]] = {}
        for row in read_texts(tmp_path / "out" / f"{name}.txt"):
            documents.setdefault(row.document, []).append(row.values["text"])
        assert all(document == lines[(at := lines.index(document[0])) : at + 3] for document in documents.values())
        seen += [text for document in documents.values() for text in document]
    assert sorted(seen) == sorted(lines)
    assert files.damage(tmp_path / "out") is None
    assert "train       240 rows (80.0%), 80 groups" in "\n".join(done.lines()) and json.dumps(done.as_dict())


def test_leakage_is_an_error_unless_allowed(tmp_path):
    lines = texts(40)
    data = tmp_path / "a.csv"
    rows = [f"{i % 20},{text}" for i, text in enumerate(lines + [text + " end" for text in lines[:20]])]
    rows += [f"30,{lines[0].upper()}", *(f",{text}" for text in texts(2, 9))]
    data.write_text("topic,text\n" + "\n".join(rows) + "\n")
    plan = Plan(by="topic", parts=HALVES)
    good = split(data, tmp_path / "good", Plan(by="cluster", parts=HALVES))
    assert [(o.exact, o.near) for o in good.overlaps] == [(0, 0)]
    by_row = Plan(by="document", parts=HALVES)
    with pytest.raises(UserError) as caught:
        split(data, tmp_path / "out", by_row)
    message = str(caught.value)
    assert "rows repeat a text of another part" in message and "--by cluster" in message and "--allow-leaks" in message
    assert message.count(f"{data}, row ") >= 6, "three examples, each with both places"
    assert not (tmp_path / "out").exists()
    allowed = split(data, tmp_path / "out", by_row, allow_leaks=True)
    train, dev = parts_of(tmp_path / "out", ("train", "dev"), "csv")
    close = [any(near(a["text"], b["text"]) for a in train) for b in dev]
    exact = [any(text_hash(a["text"]) == text_hash(b["text"]) for a in train) for b in dev]
    assert allowed.overlaps[0].exact == sum(exact) and allowed.overlaps[0].near == sum(close) - sum(exact) > 0
    topics = split(data, tmp_path / "topics", plan, allow_leaks=True)
    train, dev = parts_of(tmp_path / "topics", ("train", "dev"), "csv")
    assert not {row["topic"] for row in train if row["topic"]} & {row["topic"] for row in dev}
    assert "2 rows without a value in 'topic'" in " ".join(topics.notes) and topics.groups == 23


def test_a_row_counts_as_what_is_worst_in_it(tmp_path):
    a, b = texts(2)
    rows = [{"anchor": a, "positive": b}, {"anchor": a + " end", "positive": b.upper()}]
    done = split(rows, tmp_path / "out", Plan(by="document", parts=HALVES), allow_leaks=True)
    assert (done.overlaps[0].rows, done.overlaps[0].exact, done.overlaps[0].near) == (1, 1, 0)


def test_a_column_is_compared_as_texts_are(tmp_path):
    found = texts(4)
    rows = [{"text": text, "topic": topic} for text, topic in zip(found, ["Asthma", " asthma", 5, "5"], strict=True)]
    done = split(rows, tmp_path / "out", Plan(by="topic", parts=HALVES))
    assert done.groups == 2
    with pytest.raises(UserError, match=r"has no column 'tpic' \(did you mean 'topic'\?\)"):
        split(rows, tmp_path / "other", Plan(by="tpic"))


def test_a_group_larger_than_a_part_is_said(tmp_path):
    rows = [{"anchor": "the same", "positive": text} for text in texts(50)] + [
        {"anchor": text, "positive": text + " x"} for text in texts(50, 1)
    ]
    done = split(rows, tmp_path / "out")
    assert done.largest == 50
    assert [note for note in done.notes if "largest" in note] == [
        "the largest group, 50 rows, is more than the share of dev (10%)",
        "the largest group, 50 rows, is more than the share of test (10%)",
    ]


def test_form_letters_do_not_leak_either(tmp_path, monkeypatch):
    """Where more rows share their rarest shingles than are followed, what the check finds is joined after all."""
    monkeypatch.setattr(near_module, "CROWD", 1)
    draw, base = np.random.default_rng(0), [f"w{i}" for i in range(40)]
    rows = []
    for i in range(60):
        words = list(base)
        words[draw.integers(40)] = f"x{i}"
        rows.append(" ".join(words))
    rows += texts(60)
    assert len(set(text_groups(rows))) > 80, "some of the letters were not followed"
    done = split(rows, tmp_path / "out", Plan(parts=HALVES))
    assert all(o.exact == o.near == 0 for o in done.overlaps) and done.groups < 80
    train, dev = parts_of(tmp_path / "out", ("train", "dev"))
    assert not any(near(a["text"], b["text"]) for a in train for b in dev)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(parts={"train": 1.0}), "two parts at least"),
        (Plan(parts={"train": 0.5, "dev": 0.6}), "must add up to 1, not 1.1"),
        (Plan(parts={"train": 1.2, "dev": -0.2}), "between 0 and 1"),
        (Plan(parts={"../train": 0.5, "dev": 0.5}), "cannot be the name of a file"),
        (Plan(parts={"manifest": 0.5, "dev": 0.5}), "cannot be the name of a file"),
        (Plan(near=1.5), "must be above 0"),
    ],
)
def test_plans_that_cannot_be_meant(tmp_path, plan, message):
    with pytest.raises(UserError, match=message):
        split(["a", "b"], tmp_path / "out", plan)


def test_folders_that_are_not_replaced(tmp_path):
    data = texts(20)
    out = tmp_path / "out"
    split(data, out)
    with pytest.raises(UserError, match="exists already"):
        split(data, out)
    before = (out / "train.jsonl").read_bytes()
    split(data, out, force=True)
    assert (out / "train.jsonl").read_bytes() == before, "the same seed gives the same parts"
    split(data, out, Plan(seed=1), force=True)
    assert (out / "train.jsonl").read_bytes() != before
    with pytest.raises(UserError, match="holds the data itself"):
        split(out / "train.jsonl", out, force=True)
    with pytest.raises(UserError, match="lies in the folder that is read"):
        split(out, out / "inner")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "precious.txt").write_text("keep me")
    with pytest.raises(UserError, match="was not made by"):
        split(data, mine, force=True)
    assert [path.name for path in mine.iterdir()] == ["precious.txt"]


def test_bad_rows_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(20)) + '{"text": ""}\n{"text": }\n')
    with pytest.raises(UserError, match="line 22: is not JSON"):
        split(path, tmp_path / "out")
    done = split(path, tmp_path / "out", bad_rows="skip")
    assert done.dropped == {"blank": 1, "not JSON": 1} and (done.rows, done.used) == (22, 20)
    assert "1 not JSON" in "\n".join(done.lines())


def test_real_pairs(real_data, tmp_path):
    done = split(real_data("medquad/medquad.jsonl"), tmp_path / "out")
    assert [part["rows"] for part in done.parts.values()] == [13_125, 1641, 1641]
    assert all(o.exact == o.near == 0 for o in done.overlaps)
    with pytest.raises(UserError, match="by focus: 429 rows repeat a text of another part"):
        split(real_data("medquad/medquad.jsonl"), tmp_path / "focus", Plan(by="focus"))
