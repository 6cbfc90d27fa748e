"""What an index keeps of all texts: words and ids, in little memory, and as if all were held at once."""

import filecmp
import random

import numpy as np
import pytest

from conftest import corpus
from embedtune.errors import UserError
from embedtune.search import contract, lexical, postings
from embedtune.search.ids import Known, Places
from embedtune.search.rows import Record

bm25s = pytest.importorskip("bm25s")
TEXTS = [*corpus(300, seed=5).split("\n"), "", "a", "Über dem \u0130stanbul, the the the", "babe " * 400, "babe"]


@pytest.mark.parametrize("block, part", [(postings.BLOCK, postings.PART), (2_000, 50), (1, 1), (10**4, 10**4)])
def test_scores_are_saved_as_bm25s_saves_them(tmp_path, monkeypatch, block, part):
    """Whatever is taken at a time: a word may fill many parts, and a part may hold many words."""
    monkeypatch.setattr(postings, "BLOCK", block)
    monkeypatch.setattr(postings, "PART", part)
    made = bm25s.BM25()
    made.index(bm25s.tokenize(TEXTS, stopwords=None, show_progress=False), show_progress=False)
    made.save(tmp_path / "bm25s", show_progress=False)
    lexical.build(tmp_path / "ours", iter(TEXTS))
    names = sorted(path.name for path in (tmp_path / "bm25s").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names and len(names) == 5
    assert filecmp.cmpfiles(tmp_path / "bm25s", tmp_path / "ours", names, shallow=False)[0] == names
    assert {path.name for path in tmp_path.iterdir()} == {"bm25s", "ours"}


def test_texts_without_a_word_leave_nothing(tmp_path):
    lexical.build(tmp_path / "ours", ["", "a", "- !"])
    assert not (tmp_path / "ours").exists()


def test_the_parts_are_no_larger_than_asked_for_and_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(postings, "BLOCK", 500)
    monkeypatch.setattr(postings, "PART", 64)
    with (tmp_path / "scratch").open("w+b") as file:
        found = postings.Postings(file)
        for block in postings.blocks(TEXTS):
            found.add(block)
        parts = list(found.parts())
    assert len(found.sizes) > 5 and max(map(len, parts)) <= 64
    whole = np.concatenate(parts)
    order = np.lexsort((whole["text"], whole["word"]))
    assert np.array_equal(order, np.arange(len(whole))) and whole["times"].sum() == found.length


def test_known_ids_are_those_of_a_set():
    draw, known, true = random.Random(1), Known(), set()
    for _ in range(60):
        asked = [str(draw.randrange(3_000)) for _ in range(draw.randrange(1, 90))]
        assert known.among(asked) == true & set(asked)
        known.add(sorted(set(asked) - true))
        true |= set(asked)
    assert len(known.runs) < 12 and sum(map(len, known.runs)) == len(true)


def test_places_are_those_of_the_rows_that_are_left():
    ids = ["a", "ü", "b", "a", "\udc80", "c"]
    live = np.array([False, True, True, True, True, False])
    places = Places([ids[:2], ids[2:]], live)
    assert places.rows_of(["c", "a", "b", "\udc80", "ü", "d"]).tolist() == [-1, 3, 2, 4, 1, -1]
    assert places.among(["c", "a", "d"]) == {"a"}
    nothing = Places([], np.zeros(0, bool))
    assert nothing.rows_of(["a"]).tolist() == [-1] and nothing.among(["a"]) == set()


@pytest.mark.parametrize("first, again", [(0, 1), (0, 6), (2, 3), (5, 6)])
def test_an_id_that_comes_again_is_refused_however_far_away(monkeypatch, first, again):
    monkeypatch.setattr(contract, "WINDOW", 3)
    ids = [f"t{i}" for i in range(7)]
    ids[again] = ids[first]
    records = (Record(key, "text", {}) for key in ids)
    passed = []
    with pytest.raises(UserError, match=f"two of the new texts have the id 't{first}'"):
        passed.extend(record.id for record in contract.checked(records, lambda ids: (), "idx", False))
    assert passed == ids[:again]
