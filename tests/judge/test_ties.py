import random

import numpy as np
import pytest

from embedtune.judge import ties

LETTERS = ["a", "b", "\0", "é", "\uffff", "\U0001f600", "\n", '"', "\ud800"]


@pytest.mark.parametrize("run", [1, 7, 100, 1000])
def test_the_order_of_ids_is_that_of_python(run, monkeypatch):
    """Code points, not UTF-16 or words: in one run, in many, and where the last is not full."""
    monkeypatch.setattr(ties, "RUN", run)
    draw = random.Random(0)
    ids = list(dict.fromkeys("".join(draw.choices(LETTERS, k=draw.randint(0, 5))) for _ in range(200)))[:100]
    found = ties.descending(iter(ids), len(ids))
    assert found.dtype == np.int32
    assert [ids[n] for n in np.argsort(found)] == sorted(ids, reverse=True) and len(ids) == 100


def test_no_ids():
    assert len(ties.descending([], 0)) == 0
