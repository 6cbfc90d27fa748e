import os
from pathlib import Path

import pytest

REAL_DATA = Path(os.environ.get("EMBEDTUNE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture
def real_data():
    """real_data("blns/blns.txt") -> Path; skips where the data is absent."""

    def find(name: str) -> Path:
        path = REAL_DATA / name
        if not path.exists():
            pytest.skip(f"{path} is absent (set EMBEDTUNE_TEST_DATA)")
        return path

    return find
