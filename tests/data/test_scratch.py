"""Arrays in files without a name against arrays in memory, whatever is read at once; what a full disk says."""

import errno

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedtune.data import scratch
from embedtune.data.scratch import Column, Parted, blocks, parts_for, records, zeros
from embedtune.errors import UserError

PAIR = np.dtype([("key", np.uint64), ("row", np.uint32)])
LISTS = st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=9), max_size=5)


@pytest.fixture(params=[(2, 3, 4), (1 << 16, 512, 1 << 18)], ids=["small", "as it is"], scope="module", autouse=True)
def sizes(request):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(("READ", "PAGE", "PART"), request.param, strict=True):
            patch.setattr(scratch, name, value)
        yield


@settings(max_examples=100, deadline=None)
@given(added=LISTS, data=st.data())
def test_a_column_reads_as_the_array_does(added, data):
    column, array = Column(np.uint32), np.array(sum(added, []), np.uint32)
    for values in added:
        column.append(np.array(values, np.uint32))
    start, stop = sorted(data.draw(st.tuples(st.integers(0, 50), st.integers(0, 50))))
    assert len(column) == len(array) and column[start:stop].tolist() == array[start:stop].tolist()
    rows = np.array(data.draw(st.lists(st.integers(0, len(array) - 1), max_size=30)) if len(array) else [], np.int64)
    for kind in (np.int64, np.uint32):
        assert column.take(rows.astype(kind)).tolist() == array[rows].tolist()
    for row in rows.tolist():
        column[row] = array[row] = row
    assert np.asarray(column).tolist() == array.tolist() and np.asarray(column).dtype == np.uint32
    assert [(first, value) for first, block in blocks(column) for value in block[:1].tolist()] == [
        (first, int(array[first])) for first in range(0, len(array), scratch.READ)
    ]


def test_a_column_is_added_to_after_it_was_read():
    column = zeros(np.int64, 7)
    column[3] = -1
    assert np.asarray(column).tolist() == [0, 0, 0, -1, 0, 0, 0]
    column.append(np.array([5, 6]))
    assert column[6:9].tolist() == [0, 5, 6]
    mapped = np.frombuffer(column.mapped(), np.int64)
    mapped[0] = 9
    assert column[0:1].tolist() == [9]


@settings(max_examples=100, deadline=None)
@given(added=LISTS, parts=st.integers(1, 5))
def test_parts_keep_the_order_of_what_was_added(added, parts):
    parted, everything = Parted(PAIR, parts), []
    for values in added:
        keys = np.array(values, np.uint64)
        parted.add(records(PAIR, key=keys, row=np.arange(len(keys))), keys % np.uint64(parts))
        everything += [(key, row) for row, key in enumerate(values)]
    for part in range(parts):
        found = list(parted.part(part))
        assert all(len(block) >= 2 * scratch.PART for block in found[:-1])
        assert [pair for block in found for pair in block.tolist()] == [p for p in everything if p[0] % parts == part]


def test_one_part_where_records_are_few():
    assert [parts_for(n) for n in (0, 1, scratch.PART, scratch.PART + 1)] == [1, 1, 1, 2]


def test_a_full_disk_is_an_error_in_words(tmp_path, monkeypatch):
    column = Column(np.uint64, tmp_path)
    column.append(np.arange(3))

    def full(*_, **_more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(UserError, match="No space left"):
        column[1] = 5
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(UserError, match="No space left"):
        Column(np.uint64, tmp_path)
