"""Every reader over every file of the catalogue: it is read, with all rows accounted for, or refused in words."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from malformed import ARRAYS, FILES, JSONL, LISTS, PLACES, QRELS, TABLE, TOML

from embedtune import cli, files, schema
from embedtune.data.kinds import check_data, kind_of_data
from embedtune.data.labels import read_graded, read_labelled
from embedtune.data.pairs import read_pairs, read_scored
from embedtune.data.read import Counts, read_rows, read_texts
from embedtune.data.retrieval import read_beir
from embedtune.data.tags import read_tagged
from embedtune.encoder import load
from embedtune.errors import UserError
from embedtune.judge.likelihood import read_crows
from embedtune.recipes import RECIPES
from embedtune.refine import length
from embedtune.refine.statistics import Statistics
from embedtune.search import store

READERS = {
    "rows": read_rows,
    "texts": read_texts,
    "pairs": read_pairs,
    "scored pairs": read_scored,
    "labelled": read_labelled,
    "graded": read_graded,
    "tagged": read_tagged,
}
MOST_LINES, MOST_LETTERS = 23, 1010  # of a message, the longest: it is clipped, and so is what it quotes


def unclear(error):
    """Why a message would not help, '' where it does."""
    lines = str(error).splitlines()
    if not error.where or not error.fix:
        return f"no place or no fix: {error}"
    if len(lines) > MOST_LINES or max(map(len, lines)) > MOST_LETTERS:
        return f"{len(lines)} lines, the longest of {max(map(len, lines))} characters"
    return "" if str(error).isprintable() or "\n" in str(error) else "cannot be printed"


def tried(call):
    """What is wrong with how a call ended, '' where nothing is; and its UserError."""
    try:
        call()
    except UserError as error:
        return unclear(error), error
    except BaseException as error:  # noqa: BLE001 - whatever it is, that is the finding
        return f"{type(error).__name__}: {str(error)[:200]}", None
    return "", None


def text(content):
    return content if isinstance(content, bytes) else content.encode()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The path of each file of the catalogue, each in a folder of its own."""
    home, paths = tmp_path_factory.mktemp("malformed"), {}
    for number, (name, (file, content)) in enumerate(FILES.items()):
        (home / str(number)).mkdir()
        paths[name] = home / str(number) / file
        paths[name].write_bytes(content)
    return paths


def test_the_catalogue_is_large():
    assert len(FILES) + len(PLACES) + len(TOML) + len(ARRAYS) >= 350 and len(FILES) >= 220
    assert len({content for _, content in FILES.values()}) >= 220


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("bad_rows", ["fail", "skip", "replace"])
def test_files_are_read_or_refused_in_words(world, reader, bad_rows):
    wrong = {}
    for name, path in world.items():
        counts = Counts()

        def read(path=path, counts=counts):
            for _ in READERS[reader](path, bad_rows=bad_rows, counts=counts):
                pass

        found, error = tried(read)
        if not found and bad_rows != "fail" and counts.rows != counts.used + sum(counts.rejected.values()):
            found = f"{counts.rows} rows are not {counts.used} used and {counts.rejected}"
        if not found and error and path.name not in str(error):
            found = f"does not name the file: {error}"
        if found:
            wrong[name] = found
    assert not wrong


def test_most_of_them_are_refused(world):
    """The catalogue is one of malformed files: for each of three in four some reader says that it is."""
    refused = set()
    for name, path in world.items():
        for reader in (read_texts, read_labelled):
            counts = Counts()
            if tried(lambda reader=reader, path=path, counts=counts: list(reader(path, counts=counts)))[1]:
                refused.add(name)
    assert len(refused) > 0.75 * len(world)


def test_what_only_looks_odd_is_read(world):
    for name in ("separators that split nothing", "right to left", "combining 10,000", "no final end", "million a"):
        assert list(read_texts(world[f"txt: {name}"])), name
    (row,) = read_texts(world["txt: separators that split nothing"])
    assert row.values["text"] == "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x1dh\x1ei"


@pytest.mark.parametrize("call", [check_data, kind_of_data, read_crows], ids=lambda call: call.__name__)
def test_the_doctor_has_a_word_on_every_file(world, call):
    wrong = {name: found for name, path in world.items() if (found := tried(lambda path=path: call(path))[0])}
    assert not wrong


@pytest.mark.parametrize("bad_rows", ["fail", "skip"])
def test_retrieval_folders(tmp_path, bad_rows):
    good = {"corpus.jsonl": b'{"_id": "a", "text": "x"}\n', "queries.jsonl": b'{"_id": "q", "text": "y"}\n',
            "qrels/test.tsv": b"query-id\tcorpus-id\tscore\nq\ta\t1\n"}  # fmt: skip
    rows, table = {**JSONL, **LISTS}, {k: v.replace(",", "\t") for k, v in TABLE.items() if isinstance(v, str)}
    table |= QRELS
    wrong, number = {}, 0
    for file, cases in (("corpus.jsonl", rows), ("queries.jsonl", rows), ("qrels/test.tsv", table)):
        for name, content in cases.items():
            number += 1
            folder = tmp_path / str(number)
            for each, whole in {**good, file: text(content)}.items():
                (folder / each).parent.mkdir(parents=True, exist_ok=True)
                (folder / each).write_bytes(whole)
            if found := tried(lambda folder=folder: read_beir(folder, bad_rows=bad_rows))[0]:
                wrong[f"{file}: {name}"] = found
    assert not wrong and number > 150


@pytest.mark.parametrize("place", PLACES)
def test_places_are_refused(tmp_path, place):
    """None of them is read: a device without an end, or a pipe that nobody writes to, would hold this up forever."""
    path = PLACES[place](tmp_path)
    for name, reader in READERS.items():
        wrong, error = tried(lambda reader=reader: list(reader(path)))
        assert not wrong and error, name
    for call in (check_data, kind_of_data, read_crows):
        assert not tried(lambda call=call: call(path))[0]


@pytest.mark.parametrize("place", [name for name in PLACES if "utf-8" not in name])
def test_small_files_are_no_devices_either(tmp_path, place):
    path = Path(PLACES[place](tmp_path) or "absent.json")
    for read in (files.read_text, files.read_json, schema.read_toml):
        wrong, error = tried(lambda read=read: read(path))
        assert not wrong and error, read.__name__


@pytest.mark.parametrize("task", RECIPES)
def test_recipes(tmp_path, task):
    wrong = {}
    for name, content in TOML.items():
        (tmp_path / "r.toml").write_bytes(text(content))

        def read():
            schema.from_table(RECIPES[task], schema.read_toml(tmp_path / "r.toml"), "r.toml")

        found, error = tried(read)
        if error and "problem(s)" in str(error) and "characters" not in found:
            found = ""  # one line for each problem is as it should be
        if found:
            wrong[name] = found
    assert not wrong


def test_manifests_of_indexes(tmp_path):
    fine = {"model": "m", "identity": "0", "dimension": 4, "columns": [], "segments": ["s"], "rows": 1, "files": {}}
    values = (None, True, -1, 2**64, 1.5, "x", "../x", "/etc", [], ["../x"], [7], [None], {}, {"../x": {}}, {"a": 7})
    cases = [text(content) for content in JSONL.values()] + [
        json.dumps({**fine, key: value}).encode()
        for key in (*fine, "deleted", "lexical", "version", "wibble")
        for value in values
    ]
    wrong = {}
    for content in cases:
        (tmp_path / "index.json").write_bytes(content)

        def read():
            store.open_segments(tmp_path, store.read_manifest(tmp_path))

        found, error = tried(read)
        if found or not error:
            wrong[content[:100]] = found or "was opened"
    assert not wrong


def test_arrays(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    wrong = {}
    for name, content in ARRAYS.items():
        (tmp_path / "a").write_bytes(content)
        (tmp_path / length.DIRECTION).write_bytes(content)
        for read in (lambda: Statistics.load(tmp_path / "a"), lambda: length._load(tmp_path)):
            found, error = tried(read)
            if found or (not error and name != "whole numbers"):
                wrong[name] = found or "was read"
    assert not wrong


@pytest.fixture
def quick(tiny_model, monkeypatch, tmp_path):
    """The tiny tokenizer, opened once for all calls."""
    tokenizer = load.load_tokenizer(tiny_model("minilm"))
    monkeypatch.setattr(load, "load_tokenizer", lambda folder: tokenizer)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.chdir(tmp_path)
    return str(tiny_model("minilm"))


COMMANDS = {
    "check": ["data", "check", "{}", "--model", "{model}"],
    "clean": ["data", "clean", "{}", "--out", "new.jsonl"],
    "split": ["data", "split", "{}", "--out", "new"],
    "pairs": ["data", "pairs", "{}", "--out", "new.jsonl"],
    "clean, skipping": ["data", "clean", "{}", "--out", "new.jsonl", "--bad-rows", "skip", "--near", "None"],
}


def check_command(paths, command, model, capfd):
    """Exit 0 with the result, or 2 with a message and nothing beside it."""
    wrong = {}
    for name, path in paths.items():
        argv = [word.replace("{}", str(path)).replace("{model}", model) for word in COMMANDS[command]]
        code = cli.run(argv)
        out, err = capfd.readouterr()
        made = os.listdir()
        if code not in (0, 2) or "Traceback" in out + err:
            wrong[name] = f"exit {code}: {err[-300:]}"
        elif code == 2 and (made or (not err.strip() and command != "check")):
            wrong[name] = f"exit 2 and left {made}, said {err[:200]!r}"
        for each in made:
            _remove(Path(each))
    assert not wrong


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_end_in_words_and_leave_nothing(world, quick, capfd, command):
    """Over every fourth file; `data check` over all."""
    some = world if command == "check" else dict(list(world.items())[1::4])
    check_command(some, command, quick, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_end_in_words_over_all_files(world, quick, capfd, command):
    check_command(world, command, quick, capfd)


def _remove(path):
    import shutil

    shutil.rmtree(path) if path.is_dir() else path.unlink()


BOMB = """
import resource, sys
from embedtune.errors import UserError
from embedtune.data import lines
from embedtune.data.read import read_texts
import pyarrow.parquet
lines.BOMB_BYTES = 64 << 20
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    for row in read_texts(sys.argv[1], bad_rows="skip"): pass
except UserError as error:
    print(str(error).replace("\\n", " "))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
"""


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".csv", ".parquet"])
def test_a_bomb_is_refused_before_it_fills_memory_or_disk(tmp_path, packing, ending):
    import gzip

    import zstandard

    path, block = tmp_path / f"a{ending}{packing}", (b" " * 16_383 + b"\n") * 64
    with (gzip if packing == ".gz" else zstandard).open(path, "wb") as file:
        for _ in range(96):
            file.write(block)
    assert path.stat().st_size < (1 << 20)
    limit = 256 << 20  # of what it may write: packed parquet is unpacked on the disk

    def bounded():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run([sys.executable, "-c", BOMB, str(path)], capture_output=True, text=True, preexec_fn=bounded)
    assert done.returncode == 0, done.stderr
    said, kilobytes = done.stdout.strip().rsplit("\n", 1)
    assert "unpacks to over 200 times its size" in said and int(kilobytes) < 200_000
