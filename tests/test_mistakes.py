"""What users get wrong, command by command: exit 2, a short message that says how to mend it, and nothing left behind.

mistakes.txt has a mistake a line: the words typed, then, after =>, words that the message must have.
"""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import corpus
from embedtune import cli

LINES = Path(__file__).with_name("mistakes.txt").read_text(encoding="utf-8").splitlines()
MISTAKES = dict((line + " => ").split(" => ")[:2] for line in LINES)
USAGE = 40  # lines of a usage message, which the parser of flags frames
PROGRESS = ("reading", "judging on", "the model runs", "embedding", "model runs padded")


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory):
    """A folder with good data of every kind, some that is bad, and models."""
    home = tmp_path_factory.mktemp("world")
    for name in ("model", "model2", "nan", "pickled"):
        shutil.copytree(tiny_model("minilm"), home / name)
    weights = load_file(home / "nan" / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][0, 0] = torch.nan
    save_file(weights, home / "nan" / "model.safetensors", {"format": "pt"})
    (home / "pickled" / "model.safetensors").rename(home / "pickled" / "pytorch_model.bin")
    (home / "empty").mkdir()
    (home / "folder").mkdir()
    (home / "folder" / "notes.docx").write_text("notes")
    lines = corpus(60).splitlines()
    (home / "text.txt").write_text("\n".join(lines))
    (home / "text.docx").write_text("text")
    (home / "one.txt").write_text("a single line\n")
    (home / "latin.txt").write_bytes("sch\u00f6n und gut\n".encode("latin-1") * 20)
    (home / "ragged.csv").write_text("text,b\n1,2\n1,2,3\n")
    words = [line for line in lines if len(line.split()) > 3]
    jsonl(home / "pairs.jsonl", [{"anchor": a, "positive": b} for a, b in zip(words, words[1:])])
    jsonl(home / "scored.jsonl", [{"sentence1": a, "sentence2": b, "score": 0.5} for a, b in zip(words, words[1:])])
    jsonl(home / "oddscores.jsonl", [{"sentence1": "a", "sentence2": "b", "score": "high"}] * 3)
    rows = [f"{text},{'ab'[n % 2]}" for n, text in enumerate(words)]
    (home / "labels.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    (home / "labels2.csv").write_text("text,topic,tone\n" + "\n".join(f"{row},{'xy'[len(row) % 2]}" for row in rows))
    (home / "onelabel.csv").write_text("text,label\n" + "\n".join(f"{text},a" for text in words) + "\n")
    (home / "badtags.conll").write_text("EU\tXYZ\n\n")
    (home / "broken.toml").write_text("train = ")
    (home / "unknown.toml").write_text('trian = "text.txt"\nwibble = 3\n')
    (home / "other.toml").write_text('task = "scored"\ntrain = "text.txt"\n')
    (home / "beir" / "qrels").mkdir(parents=True)
    jsonl(home / "beir" / "corpus.jsonl", [{"_id": "d", "text": "bade"}])
    jsonl(home / "beir" / "queries.jsonl", [{"_id": "q", "text": "fima"}])
    (home / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    from embedtune.search.index import create
    from embedtune.search.rows import Record

    create(
        home / "idx", str(home / "model"), [Record(str(n), text, {"kind": "a"}) for n, text in enumerate(words[:9], 1)]
    )
    return home


def listing(home):
    return {
        str(path.relative_to(home)): path.stat().st_mtime_ns
        for path in sorted(home.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def place(world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.delenv("EMBEDTUNE_API_KEY", raising=False)
    return world


def test_there_are_many_and_of_every_command():
    assert len(MISTAKES) == len(LINES) >= 150
    assert {name for name in cli.COMMANDS if any(line.startswith(name) for line in MISTAKES)} == set(cli.COMMANDS)


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_one_short_message_that_says_how_to_mend_it(place, capfd, typed):
    before = {**listing(place)} if typed.startswith(("search add", "search delete")) else set(os.listdir())
    capfd.readouterr()
    code = cli.run(shlex.split(typed))
    out, err = capfd.readouterr()
    assert code == 2, err or out
    assert MISTAKES[typed] in err + out
    assert "Traceback" not in err and "bug of embedtune" not in err
    said = [line for line in err.splitlines() if not line.startswith(PROGRESS)]
    framed = any(line.startswith("\u256d") for line in said)  # the parser's own frame around flags that it cannot read
    details = [line for line in said if line.startswith("  ") and not line.startswith("  fix:")]
    assert len(said) <= USAGE if framed else len(said) - len(details) <= 3 and len(details) <= 15, err
    after = {**listing(place)} if isinstance(before, dict) else set(os.listdir())
    assert after == before, "something was left behind"
