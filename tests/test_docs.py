"""The README and the docs are executed: every bash, python and toml block that is not marked `<!-- no-run: reason -->`.

Three substitutions, and no more: each page runs in a folder of its own with a small data.txt; the base model
all-MiniLM-L6-v2 is a tiny one; a line that starts with `embedtune` runs in this process instead of a new one.
"""

import contextlib
import dataclasses
import io
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import get_type_hints

import pytest

from embedtune import cli, limits, recipes, schema
from embedtune.data.example import docstrings
from embedtune.encoder import load, scratch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- no-run: (?P<reason>[^\n]+) -->\n)?```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.S | re.M)
RUN = ("bash", "python", "toml")
OTHER_FLAGS = {"--help", "--version", "--try"}  # of the command tree itself; --try is --trials
OTHER_FLAGS |= {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}  # of torchrun


def blocks(page: Path) -> list[re.Match]:
    return list(BLOCK.finditer(page.read_text(encoding="utf-8")))


def runnable(page: Path) -> list[re.Match]:
    return [block for block in blocks(page) if block["kind"] in RUN and not block["reason"]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(lines of text, tiny model folder)."""
    folder = tmp_path_factory.mktemp("tiny")
    lines = list(docstrings(1200))
    config = '{"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,'
    (folder / "config.json").write_text(config + '"intermediate_size": 64, "max_position_embeddings": 64}')
    scratch.make(str(folder / "config.json"), [text for text in lines if text], 400, 0, folder / "model")
    return lines, folder / "model"


@pytest.fixture
def place(tiny, tmp_path, monkeypatch):
    """An empty folder with a small data.txt, in which all-MiniLM-L6-v2 is a tiny model."""
    lines, model = tiny
    (tmp_path / "data.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "_offline", lambda package, digest: model)
    return tmp_path


def run_bash(body: str) -> None:
    for line in body.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] != "embedtune":
            subprocess.run(["bash", "-euo", "pipefail", "-c", line], check=True)
            continue
        said, complained = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            code = cli.run(words[1:])
        assert code == 0, f"{line}\nexit code {code}\n{said.getvalue()}\n{complained.getvalue()}"


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page, place):
    names: dict = {"__name__": "__main__"}
    for block in runnable(page):
        if block["kind"] == "bash":
            run_bash(block["body"])
        elif block["kind"] == "python":
            exec(compile(block["body"], page.name, "exec"), names)
        else:
            table = tomllib.loads(block["body"])
            recipe = schema.from_table(recipes.RECIPES[table.get("task", "mlm")], table, page.name)
            assert limits.problems(recipe) == []


def test_the_main_pages_have_something_to_run():
    assert {page.stem for page in PAGES if runnable(page)} >= {"README", "data", "encoder", "fit", "judge", "refine"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_says_what_it_is(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(blocks(page)), "a fence that the pattern does not see"
    assert text.count("no-run:") == sum(block["reason"] is not None for block in blocks(page)), "a mark without a block"
    assert all(block["kind"] in ("", *RUN) for block in blocks(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, target
    if page.parent.name == "docs" and page.stem != "index":
        assert f"({page.name})" in (ROOT / "docs" / "index.md").read_text(), "the map does not name this page"


def flags() -> set[str]:
    """Every flag of every command, as tyro spells it."""

    def names(kind: type) -> set[str]:
        hints = get_type_hints(kind)
        nested = [hint for hint in hints.values() if dataclasses.is_dataclass(hint)]
        own = {name for name, hint in hints.items() if not dataclasses.is_dataclass(hint)}
        return own.union(*map(names, nested))

    found = set().union(*(names(command.kind) for command in cli.COMMANDS.values()))
    return {"--" + name.replace("_", "-") for name in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_flags_and_commands_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z](?![\w-])", text)) <= flags() | OTHER_FLAGS
    rooms = "|".join({command.split()[0] for command in cli.COMMANDS})
    named = {(f"{a} {b}", a) for a, b in re.findall(rf"embedtune ({rooms}) (\w+)", text)}
    assert {both for both, first in named if first not in cli.COMMANDS} <= set(cli.COMMANDS)


def test_the_file_tree_of_the_readme_is_the_real_one():
    tree = blocks(ROOT / "README.md")[-1]["body"]
    inside = tree.split("src/embedtune/\n")[1]
    named = re.findall(r"── (\w+)(?:\.py|/)", inside)
    source = ROOT / "src" / "embedtune"
    real = {path.stem for path in source.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert set(named) == real - {"__init__", "__main__"}
    outside = re.findall(r"── ([\w./]+?)/? ", tree.split("src/embedtune/\n")[0])
    assert outside and all((ROOT / path).exists() for path in outside if path != "src/embedtune")


def test_the_output_folder_of_the_readme_is_the_real_one(place):
    run_bash("embedtune fit mlm data.txt --max-steps 2\nembedtune refine length finetuned-bert --data data.txt")
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## What is in the output folder")[1].split("```")[1]
    named = {
        word.rstrip("/")
        for word in re.findall(r"[\w.]+\.(?:json|jsonl|md|toml|png|svg|npy|safetensors)\b|1_Pooling", text)
    }
    real = {path.name for path in (place / "finetuned-bert").iterdir()}
    assert named <= real
    assert real - named <= {"sentence_bert_config.json", "config_sentence_transformers.json"}


def test_exit_codes_of_the_readme(place, capsys):
    assert cli.run(["fit", "mlm", "missing.txt"]) == 2
    assert cli.run(["data", "nonsense"]) == 2
    assert "fix:" in capsys.readouterr().err


def test_nothing_written_names_a_private_place():
    written = [*PAGES, ROOT / "Makefile", ROOT / "constraints.txt", ROOT / ".ci" / "run", *(ROOT / "recipes").iterdir()]
    for path in written:
        assert not re.search(r"(?<![\w.])/(tmp|work|home|root|Users)/", path.read_text(encoding="utf-8")), path
