"""Rows on disk: what was kept comes back by its number, whatever is in it."""

import errno

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedtune.data.kept import keep
from embedtune.errors import UserError

ROWS = [["a", 1, None], ["line\nfeed \u2028 \x00", 2, ["x", "y"]], ["", 3, []], ["日本 🙂", 4, None]]


def test_rows_come_back_by_number_in_any_order(tmp_path):
    found = keep(ROWS, lambda *values: list(values), tmp_path)
    assert len(found) == 4 and list(found) == ROWS and found[-1] == ROWS[-1] and found[0] == ROWS[0]
    assert not list(tmp_path.iterdir()), "the file has no name"


def test_picked_rows_are_numbered_anew_and_can_be_taken_for_something_else(tmp_path):
    found = keep(ROWS, lambda *values: values, tmp_path)
    picked = found.pick(np.array([3, 1]))
    assert [row[1] for row in picked] == [4, 2] and len(found) == 4
    assert list(found.pick(np.array([True, False, False, True])).read_as(lambda text, *rest: text)) == ["a", "日本 🙂"]
    walking = iter(found)
    assert next(walking)[1] == 1 and found[3][1] == 4 and next(walking)[1] == 2, "who walks does not lose the place"
    with pytest.raises(IndexError):
        found[4]


@given(st.lists(st.tuples(st.text(), st.integers(), st.lists(st.text(), max_size=3))))
def test_any_text_comes_back(rows):
    assert list(keep(rows, lambda *values: tuple(values))) == rows


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", lambda **how: Full())
    with pytest.raises(UserError, match="space"):
        keep(ROWS, list, tmp_path)


def test_what_stops_the_rows_is_not_taken_for_the_disk(tmp_path):
    def rows():
        yield ["a"]
        raise OSError(errno.ENOSPC, "somebody else's")

    with pytest.raises(OSError, match="somebody else's"):
        keep(rows(), list, tmp_path)
