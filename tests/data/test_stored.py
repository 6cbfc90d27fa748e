import errno
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedtune.data import stored
from embedtune.data.distinct import distinct, texts_at
from embedtune.data.stored import Stored, StoredIds
from embedtune.errors import UserError

ODD = {"a": "1", "a\0": "2", "": "no id", "ä": "3", "a\u0308": "4", "\U0001f600": "five", "\ud800": "\udfff", " ": "",
       "x\ny": "line\nline", "A": "\0"}  # fmt: skip


def filled(texts) -> Stored:
    out = Stored()
    for key, text in texts.items():
        assert key not in out
        out.add(key, text)
        assert key in out
    return out


@pytest.fixture(params=["in memory", "in the file", "both"])
def sizes(request, monkeypatch):
    """How much is written and read at once."""
    if request.param != "in memory":
        monkeypatch.setattr(stored, "TAIL", 1 if request.param == "in the file" else 100)
        monkeypatch.setattr(stored, "BLOCK", 64)
        monkeypatch.setattr(stored, "FEWEST", 2)


def test_reads_like_the_dict_that_it_was_made_of(sizes):
    texts = {**ODD, **{f"d{n}": f"text {n} " * (n % 7) for n in range(300)}}
    found = filled(texts)
    assert found == texts and texts == found and len(found) == len(texts)
    assert list(found) == list(texts) and list(found.items()) == list(texts.items())
    assert list(found.values()) == list(texts.values())
    for row, key in enumerate(texts):
        assert (found[key], found.row(key), found.id(row), StoredIds(found)[row]) == (texts[key], row, key, key)
    for absent in ("b", "a\0\0", "d300", "D1", None, 7):
        assert absent not in found and found.get(absent) is None
    with pytest.raises(KeyError, match="d300"):
        found["d300"]


def test_nothing_in_it(sizes):
    found = Stored()
    assert found == {} and not found and list(found.items()) == [] and "a" not in found and len(StoredIds(found)) == 0


def test_ids_are_compared_themselves(sizes, monkeypatch):
    """All hashes alike, or all that begin alike; also negative ones."""
    for hash_of in (lambda key: -3, lambda key: hash(key[:1]), len):
        monkeypatch.setattr(stored, "hash_of", hash_of)
        texts = {f"{'abc'[n % 3]}{n}": str(n) for n in range(100)}
        found = filled(texts)
        assert found == texts and "a1" not in found and "d" not in found
        assert [found[key] for key in reversed(texts)] == list(reversed(texts.values()))


def test_several_readers_at_once(sizes):
    texts = {f"d{n}": f"text {n}" for n in range(200)}
    found = filled(texts)
    pairs = zip(found.items(), found.values(), found)
    for row, ((key, text), value, name) in enumerate(pairs):
        assert (key, text, value, name) == (f"d{row}", texts[key], texts[key], key)
        assert found[f"d{199 - row}"] == f"text {199 - row}"
    found.add("later", "1")
    assert found["later"] == "1" and list(found)[-1] == "later"


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), st.text(), max_size=40), st.integers(1, 60))
def test_any_texts(texts, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "TAIL", size)
        patch.setattr(stored, "BLOCK", 20)
        assert list(filled(texts).items()) == list(texts.items())


def test_a_full_disk_is_said(monkeypatch, tmp_path):
    class Full:
        def __getattr__(self, name):
            return lambda *args: None

        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stored, "TAIL", 1)
    monkeypatch.setattr(stored.files, "scratch", lambda folder: Full())
    with pytest.raises(UserError, match="No space left") as error:
        Stored(tmp_path).add("a", "b")
    assert error.value.where == str(tmp_path) and "free some space" in error.value.fix


def test_no_file_has_a_name(monkeypatch, tmp_path):
    monkeypatch.setattr(stored, "TAIL", 1)
    found = Stored(tmp_path)
    found.add("a", "b")
    assert found.scratch is not None and list(tmp_path.iterdir()) == [] and found == {"a": "b"}


def test_distinct_texts():
    texts = ["b", "a", "b", "", "a", "c", ""]
    rows = distinct(texts)
    assert rows.tolist() == [0, 1, 3, 5] and texts_at(texts, rows[::-1]) == ["c", "", "a", "b"]
    assert distinct([]).tolist() == [] and texts_at([], np.zeros(0, np.int64)) == []
    many = [str(n % 97) for n in range(1000)]
    assert texts_at(iter(many), distinct(many)) == list(dict.fromkeys(many))
