"""Malformed files through every command that reads one: a result, or exit 2, a short message and nothing left behind.

The catalogue is that of tests/data/malformed.py. What a reader makes of each file is tested there; here it is whether
a command lets the reader's word through, before it has worked or written. The fast tier draws a dozen files for each
command, the long one takes them all.
"""

import os
import random
import shutil
from pathlib import Path

import pytest

from conftest import corpus
from data.malformed import FILES, TOML
from embedtune import cli, plots, plots_labels
from reliability import ledger
from test_mistakes import PROGRESS, jsonl

pytestmark = pytest.mark.target("B1")
FEW = 12
MOST = 21  # details of a message, the line that says how many more there are among them
SHORT = "--max-steps 2 --batch 4 --max-tokens 256 --eval-steps 1 --precision fp32 --out new"
COMMANDS = {  # {} is the malformed file
    "data check": "data check {} --model model",
    "data clean": "data clean {} --out new.jsonl",
    "data split": "data split {} --out new",
    "data pairs": "data pairs {} --out new.jsonl",
    "data pairs, of labels": "data pairs {} --generators labels --out new.jsonl",
    "data mine": "data mine {} --model model --out new.jsonl",
    "data mine, the corpus": "data mine pairs.jsonl --corpus {} --model model --out new.jsonl",
    "data augment": "data augment {} --out new.jsonl",
    "fit mlm": f"fit mlm {{}} --model model {SHORT}",
    "fit mlm, rows left out": f"fit mlm {{}} --model model --bad-rows skip {SHORT}",
    "fit mlm, dev": f"fit mlm text.txt --dev {{}} --model model {SHORT}",
    "fit contrastive": f"fit contrastive {{}} --model model {SHORT}",
    "fit contrastive, dev": f"fit contrastive pairs.jsonl --dev {{}} --model model {SHORT}",
    "fit scored": f"fit scored {{}} --model model {SHORT}",
    "fit classify": f"fit classify {{}} --model model {SHORT}",
    "fit classify, dev": f"fit classify labels.csv --dev {{}} --model model {SHORT}",
    "fit regress": f"fit regress {{}} --model model {SHORT}",
    "fit tag": f"fit tag {{}} --model model {SHORT}",
    "run": "run {} --model model --max-steps 2 --batch 4 --out new",
    "run, queries": "run text.txt --queries {} --model model --max-steps 2 --batch 4 --out new",
    "judge": "judge model --data {}",
    "judge, rows left out": "judge model --data {} --bad-rows skip",
    "judge, exam": "judge model --data pairs.jsonl --exam {}",
    "judge, labels": "judge head --data {}",
    "judge, tags": "judge tagger --data {}",
    "predict": "predict head {}",
    "predict, tags": "predict tagger {} --out new.jsonl",
    "refine length": "refine length model --data {}",
    "refine erase": "refine erase model --data {} --concept label --out new",
    "refine reduce": "refine reduce model --data {} --to 4 --out new",
    "refine certify": "refine certify model --data {} --out new",
    "refine certify, pairs": "refine certify model --data text.txt --retrieval {} --out new",
    "refine certify, scored": "refine certify model --data text.txt --similarity {} --out new",
    "refine merge": "refine merge model model --data {} --out new",
    "refine export": "refine export model --to static --data {} --out new",
    "refine export, dev": "refine export model --to static --data text.txt --dev {} --out new",
    "refine bias": "refine bias model --data {}",
    "refine bias, crows": "refine bias masked --crows {}",
    "embed": "embed model {} --out new.npy",
    "embed, rows mended": "embed model {} --text --bad-rows replace --out new.parquet",
    "search index": "search index {} --model model --out new",
    "search add": "search add idx {}",
    "search update": "search update idx {}",
    "search query": "search query idx --queries {}",
}
TASKS = ("fit mlm", "fit contrastive", "fit scored", "fit classify", "fit regress", "fit tag", "run")
SETTINGS = {task: f"{task} {{}} --out new" for task in TASKS}  # {} is a malformed TOML file
NO_FILES = {"data example", "search delete", "search compact", "serve"}


@pytest.fixture(scope="module")
def home(tiny_model, tmp_path_factory):
    """A folder with models, an index, good data of every kind; a copy of it stands beside it, and the bad files."""
    home = tmp_path_factory.mktemp("commands") / "home"
    home.mkdir()
    for name, kind in (("model", "minilm"), ("masked", "bert")):
        shutil.copytree(tiny_model(kind), home / name)
    lines = [line for line in corpus(120).splitlines() if len(line.split()) > 3]
    (home / "text.txt").write_text("\n".join(lines))
    jsonl(home / "pairs.jsonl", [{"anchor": a, "positive": b} for a, b in zip(lines, lines[1:])])
    jsonl(home / "tags.jsonl", [{"tokens": t.split(), "tags": ["B-x", *["O"] * (len(t.split()) - 1)]} for t in lines])
    (home / "labels.csv").write_text("text,label\n" + "\n".join(f"{t},{'ab'[n % 2]}" for n, t in enumerate(lines)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        quiet(patch)
        for words in (
            "fit classify labels.csv --model model --max-steps 1 --precision fp32 --out head",
            "fit tag tags.jsonl --model model --max-steps 1 --precision fp32 --out tagger",
            "search index labels.csv --model model --out idx",
        ):
            assert cli.run(words.split()) in (0, 3)
    shutil.copytree(home, home.with_name("copy"))
    for number, (file, content) in enumerate(FILES.values()):
        (home.parent / str(number)).mkdir()
        (home.parent / str(number) / file).write_bytes(content)
    for number, content in enumerate(TOML.values()):
        (home.parent / f"{number}.toml").write_bytes(content if isinstance(content, bytes) else content.encode())
    return home


def quiet(patch):
    """Without flushes and pictures, which are most of a tiny command's time and have tests of their own."""
    patch.setattr(os, "fsync", lambda handle: None)
    patch.setattr(plots, "loss_curve", lambda *given: None)
    patch.setattr(plots, "svg", lambda figure, name, label: f'<svg id="{name}" role="img"></svg>')
    patch.setattr(plots_labels, "save_figure", lambda figure, stem: None)


@pytest.fixture
def place(home, monkeypatch):
    monkeypatch.chdir(home)
    quiet(monkeypatch)
    return home


def listing():
    """Every file with its size and time; but not the lock of an index, which stays."""
    found = {path: path.stat() for path in Path().rglob("*") if path.is_file() and path.name != ".lock"}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def restored(before):
    """Make the folder what it was; returns what was in it that is new or changed."""
    changed = sorted(
        {name for name, _ in listing().items() ^ before.items()} | {*os.listdir()} - {*os.listdir("../copy")}
    )
    for name in {name.split("/")[0] for name in changed}:
        if os.path.isdir(name):
            shutil.rmtree(name)
        elif os.path.exists(name):
            os.unlink(name)
        if os.path.exists(f"../copy/{name}"):
            (shutil.copytree if os.path.isdir(f"../copy/{name}") else shutil.copy2)(f"../copy/{name}", name)
    return changed


def wrong_with(argv, capfd, before):
    """What is wrong with how a command ended, '' where nothing is."""
    capfd.readouterr()
    code = cli.run(argv)
    out, err = capfd.readouterr()
    changed = restored(before)
    if argv[0] == "embed" and "--resume goes on" in err:  # finished blocks stay, and that is said
        changed = [name for name in changed if not name.startswith(f"{argv[4]}.running")]
    if "Traceback" in out + err or code not in (0, 2, 3):
        return f"exit {code}: {err[-900:]}"
    if code != 2:
        return "" if out else "a result without a word"
    said = [line for line in (err or out).splitlines() if not line.startswith(PROGRESS)]
    details = [line for line in said if line.startswith("  ") and not line.startswith("  fix:")]
    if not said or argv[:2] != ["data", "check"] and (len(said) - len(details) > 3 or len(details) > MOST):
        return f"not a short message: {(err or out)[:900]!r}"
    return f"left {changed[:5]}" if changed else ""


def attack(command, paths, capfd):
    before, wrong = listing(), {}
    for name, path in paths.items():
        argv = [word.replace("{}", str(path)) for word in command.split()]
        if found := wrong_with(argv, capfd, before):
            wrong[name] = found
        else:
            ledger.count()
    assert not wrong


def drawn(name, paths):
    """The same dozen in every run, others for each command."""
    return {key: paths[key] for key in random.Random(name).sample(sorted(paths), FEW)}


def test_every_command_that_reads_a_file_is_here():
    named = {command for command in cli.COMMANDS for call in COMMANDS.values() if call.startswith(command)}
    assert named == {*cli.COMMANDS} - NO_FILES
    assert len(FILES) >= 220


@pytest.mark.parametrize("tier", ["few", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", COMMANDS)
def test_malformed_data(place, capfd, name, tier):
    paths = {key: place.parent / str(number) / file for number, (key, (file, _)) in enumerate(FILES.items())}
    attack(COMMANDS[name], drawn(name, paths) if tier == "few" else paths, capfd)


@pytest.mark.parametrize("tier", ["few", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SETTINGS)
def test_malformed_settings(place, capfd, name, tier):
    paths = {key: place.parent / f"{number}.toml" for number, key in enumerate(TOML)}
    attack(SETTINGS[name], drawn(name, paths) if tier == "few" else paths, capfd)
