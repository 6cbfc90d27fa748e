"""Ten times the data takes the memory of the data, a tenth and 64 MB: each command, measured in a process of its own.

What a whole process holds is known to some MB, which takes 10^5 rows to see; so the fast tier asks for what the steps
that go over all rows allocate, where a few bytes a row are seen at once.
"""

import json
import shutil
import tracemalloc

import numpy as np
import pytest

from embedtune.data.near import leaders_on_disk
from embedtune.data.shingles import sets_of
from embedtune.data.split import hold_out
from embedtune.data.tidy import clean
from embedtune.data.tokens import Tokens
from embedtune.enrich.candidates import Candidates
from embedtune.parts import divide
from embedtune.recipes import Run
from reliability import ledger
from reliability.peak import DOCUMENT, SHARE, SLACK, lines, peak, write_pairs, write_text

pytestmark = pytest.mark.target("B4")
TRAIN = "--max-steps 6 --batch 16 --eval-steps 3 --dev-rows 64 --max-tokens 1024 --checkpoint-steps 3 --force --discard"
RUNS = "--max-steps 6 --batch 16 --eval-steps 3 --max-tokens 1024 --checkpoint-steps 3 --force --discard"
COMMANDS = {
    "check": "data check text.txt --model model",
    "clean": "data clean text.txt --out cleaned.txt --force",
    "clean, exact": "data clean text.txt --out cleaned.txt --near None --force",
    "mlm": f"fit mlm text.txt --model model --out out {TRAIN}",
    "mlm, a fresh head": f"fit mlm text.txt --model bare --out out {TRAIN}",
    "mlm, on the fly": f"fit mlm text.txt --model model --on-the-fly True --out out {TRAIN}",
    "mine": "data mine pairs.jsonl --corpus text.txt --model bare --out mined.jsonl --force",
    "run": f"run text.txt --model bare --out out {RUNS}",
    "run, adapted": f"run text.txt --model model --out out {RUNS}",
}
OF_TEXT = ("check", "clean", "clean, exact", "mlm")  # where a gigabyte is read in minutes
OF_A_LINE = {
    **COMMANDS,
    "embed": "embed bare text.txt --out vectors.parquet --force",
    "index": "search index text.txt --model bare --out index --force",
}
GIGABYTE = 13_500_000  # lines
LINE = 100_000  # bytes; ten times that is a book without a line break


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
    ledger.count(2)
    ledger.remark(f"B4: {name}: {small:,.0f} MB at {fewer:,} rows, {large:,.0f} MB at {more:,}")
    return small, large


def allocated(work) -> tuple[int, int]:
    """Bytes that `work` holds at its highest, and those that what it gives still holds; it has been done before."""
    work()
    tracemalloc.start()
    try:
        kept = work()
        now, most = tracemalloc.get_traced_memory()
        del kept
    finally:
        tracemalloc.stop()
    return most, now


def short_rows(count):
    """Token rows of 8 tokens, 20 of them a document."""
    ids = np.random.default_rng(0).integers(5, 5000, 8 * count, np.uint16)
    row = np.arange(count)
    return Tokens(ids, 8 * (row + 1), row // 20, row % 20, row, 2, count, 0)


def test_a_split_allocates_what_its_blocks_and_the_held_out_rows_take(monkeypatch):
    monkeypatch.setattr("embedtune.data.tokens.ROWS", 4096)
    few, many = short_rows(20_000), short_rows(80_000)
    found = [allocated(lambda rows=rows: (hold_out(rows, 100, 0), rows.spread()))[0] for rows in (few, many)]
    assert found[1] - found[0] < 60_000, "not one byte a row"


def test_texts_to_mine_in_keep_16_bytes_each(tmp_path):
    most, kept = allocated(lambda: Candidates.gather(lines(30_000), tmp_path))
    assert kept < 30_000 * 16 + 60_000, "what a text itself takes is four times that"


def small_parts(monkeypatch):
    """What is handled at once when repeats are looked for, so small that 1,000 lines are many."""
    for name, value in (
        ("scratch.READ", 256),
        ("scratch.PART", 512),
        ("tidy.READ", 256),
        ("lines.CHUNK_BYTES", 1 << 13),
        ("shingles.BLOCK", 2048),
        ("shingles.ROWS", 256),
        ("shingles.KNOWN_WORDS", 500),
        ("near.TABLE_BITS", 10),  # so that every shingle seems to stand in several rows, as it does among 10^7
        ("near.TOUCHED", 64),
    ):
        monkeypatch.setattr(f"embedtune.data.{name}", value)


def with_repeats(count):
    """Lines of which every other one comes twice, a tenth of these with a word more."""
    for number, line in enumerate(lines(count)):
        yield line
        if number % 2:
            yield line if number % 20 > 1 else line + " more"


@pytest.mark.parametrize("near", [0.8, None])
def test_finding_repeats_allocates_what_its_blocks_take(monkeypatch, tmp_path, near):
    small_parts(monkeypatch)

    found = []
    for count in (1_000, 4_000):
        rows = [[line] for line in with_repeats(count)]
        found.append(allocated(lambda rows=rows: leaders_on_disk(sets_of(rows, tmp_path), near))[0])
    assert found[1] - found[0] < 25_000, "of 4,500 rows more not six bytes each"


def test_a_cleaned_file_allocates_what_blocks_take(monkeypatch, tmp_path):
    small_parts(monkeypatch)
    found = []
    for count in (500, 2_000):
        with (tmp_path / f"{count}.jsonl").open("w", encoding="utf-8") as file:
            for number, line in enumerate(with_repeats(count)):
                file.write(json.dumps({"text": line, "label": number % 2}) + "\n")
        paths = tmp_path / f"{count}.jsonl", tmp_path / "cleaned.jsonl"
        found.append(allocated(lambda paths=paths: clean(*paths, force=True))[0])
    assert found[1] - found[0] < 12_500, "of 2,250 rows more not six bytes each"


@pytest.mark.filterwarnings("ignore")
def test_what_a_run_keeps_of_a_document_is_numbers(tmp_path):
    few = {"most_pairs": 100, "test_rows": 20, "test_corpus": 50}

    def work(count):
        write_text(tmp_path / "text.txt", count)
        recipe = Run(data=str(tmp_path / "text.txt"), **few)
        return allocated(lambda: divide(recipe, lambda text: None, tmp_path))[1]

    held = [work(count) for count in (4_000, 12_000)]
    assert held[1] - held[0] < 8_000 / DOCUMENT * 100, "a document has 8 lines of 79 bytes, and gives ten pairs"


def test_the_most_of_a_process_is_its_own(tmp_path):
    """The parent's memory does not count; a command that fails gives no figure."""
    write_text(tmp_path / "text.txt", 500)
    ballast = np.ones(40_000_000)  # 320 MB
    assert 20 < peak(["data", "clean", "text.txt", "--out", "cleaned.txt"], tmp_path) < ballast.nbytes / 2**20
    with pytest.raises(AssertionError, match="exists already"):
        peak(["data", "clean", "text.txt", "--out", "cleaned.txt"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_TEXT)
def test_a_gigabyte_takes_the_memory_of_a_tenth_of_it(places, name):
    sizes = [(places(rows) / "text.txt").stat().st_size for rows in (GIGABYTE // 10, GIGABYTE)]
    assert sizes[0] > 1e8 and sizes[1] > 1e9
    small, large = grown(places, name, GIGABYTE // 10, GIGABYTE)
    assert large <= SHARE * small + SLACK


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_A_LINE)
def test_ten_times_the_longest_line(places, name):
    found = []
    for size in (LINE, 10 * LINE):
        folder = places(10_000)
        write_text(folder / "text.txt", 10_000)
        with (folder / "text.txt").open("a", encoding="utf-8") as file:
            file.write("\n" + " ".join(lines(size // 60, seed=5))[:size] + "\n")
        found.append(peak(OF_A_LINE[name].split(), folder))
        ledger.count()
    ledger.remark(
        f"B4: {name}: {found[0]:,.0f} MB with a line of {LINE:,} bytes, {found[1]:,.0f} with one of {10 * LINE:,}"
    )
    assert found[1] <= SHARE * found[0] + SLACK


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_ten_times_the_data(places, name):
    small, large = grown(places, name, 10**5, 10**6)
    assert large <= SHARE * small + SLACK
