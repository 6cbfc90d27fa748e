"""Ten times the data takes the memory of the data, a tenth and 64 MB: each command, measured in a process of its own.

The fast tier is held to far less, in proportion to its rows: what grew by 64 MB from 100,000 rows to 1,000,000 grows
by 1.3 from 2,000 to 20,000, which no process can be measured to; so it finds what takes some hundred bytes a row.
"""

import shutil

import pytest

from reliability import ledger
from reliability.peak import SHARE, SLACK, peak, write_pairs, write_text

pytestmark = pytest.mark.target("B4")
QUICK = 12.0  # MB that 18,000 rows more may take, in the fast tier
TRAIN = "--max-steps 6 --batch 16 --eval-steps 3 --dev-rows 64 --max-tokens 1024 --checkpoint-steps 3 --force --discard"
COMMANDS = {
    "check": "data check text.txt --model model",
    "clean": "data clean text.txt --out cleaned.txt --force",
    "clean, exact": "data clean text.txt --out cleaned.txt --near None --force",
    "mlm": f"fit mlm text.txt --model model --out out {TRAIN}",
    "mlm, a fresh head": f"fit mlm text.txt --model bare --out out {TRAIN}",
    "mlm, on the fly": f"fit mlm text.txt --model model --on-the-fly True --out out {TRAIN}",
    "mine": "data mine pairs.jsonl --corpus text.txt --model bare --out mined.jsonl --force",
    "run": "run text.txt --model bare --out out --max-steps 6 --batch 16 --eval-steps 3 --force --discard",
}


def place(folder, tiny_model, rows):
    """A folder with so many rows of text, pairs and the models."""
    folder.mkdir()
    write_text(folder / "text.txt", rows)
    write_pairs(folder / "pairs.jsonl", 200)
    shutil.copytree(tiny_model("bert"), folder / "model")
    shutil.copytree(tiny_model("minilm"), folder / "bare")
    return folder


@pytest.fixture(scope="module")
def places(tiny_model, tmp_path_factory):
    made = {}

    def get(rows):
        if rows not in made:
            made[rows] = place(tmp_path_factory.mktemp("flat") / str(rows), tiny_model, rows)
        return made[rows]

    return get


def grown(places, name, fewer, more):
    """MB at the one size and at the other."""
    small, large = (peak(COMMANDS[name].split(), places(rows)) for rows in (fewer, more))
    ledger.remark(f"B4: {name}: {small:,.0f} MB at {fewer:,} rows, {large:,.0f} MB at {more:,}")
    return small, large


@pytest.mark.parametrize("name", COMMANDS)
def test_some_thousand_rows(places, name):
    small, large = grown(places, name, 2_000, 20_000)
    assert large <= small + QUICK


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_ten_times_the_data(places, name):
    small, large = grown(places, name, 10**5, 10**6)
    assert large <= SHARE * small + SLACK
