"""Every recipe that is shipped loads, says what it claims, and runs."""

import dataclasses
import json
import re
import tomllib
from pathlib import Path
from typing import get_type_hints

import pytest

from embedtune import finetune, limits, recipes, schema
from embedtune.data.example import docstrings
from embedtune.encoder import scratch

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "recipes").glob("*.toml"))
DEFAULTS = {  # task: the file it names
    "mlm": "data.txt",
    "contrastive": "pairs.jsonl",
    "scored": "scored.jsonl",
    "classify": "labels.jsonl",
    "regress": "grades.jsonl",
    "tag": "tags.jsonl",
}


def read(path: Path):
    """The recipe in a file, of the task that it names."""
    table = schema.read_toml(path)
    return schema.from_table(recipes.RECIPES[table["task"]], table, str(path))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """({task: data}, model folder, config of a model that --scratch can start from), all tiny."""
    folder = tmp_path_factory.mktemp("tiny")
    texts = [text for text in docstrings(400) if text]
    (folder / "data.txt").write_text("\n".join(texts) + "\n")
    words = [text.split() for text in texts if len(text.split()) > 9][:80]
    pairs = [{"anchor": " ".join(w[:4]), "positive": " ".join(w[4:])} for w in words]
    scored = [{"sentence1": p["anchor"], "sentence2": p["positive"], "score": n % 5} for n, p in enumerate(pairs)]
    labels = [{"text": " ".join(w), "label": ("bad", "good")[n % 2]} for n, w in enumerate(words)]
    grades = [{"text": " ".join(w), "score": len(w)} for w in words]
    tags = [{"tokens": w, "tags": ["B-long" if len(t) > 7 else "O" for t in w]} for w in words]
    tables = zip(list(DEFAULTS.values())[1:], (pairs, scored, labels, grades, tags))
    for name, rows in tables:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"intermediate_size": 64, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    # Few pieces, so that words shatter and --add-words has something to do.
    scratch.make(str(folder / "config.json"), texts, 300, 0, folder / "model")
    data = {task: folder / name for task, name in DEFAULTS.items()}
    return data, folder / "model", folder / "config.json"


def test_the_recipes_are_there():
    assert {*DEFAULTS, "mlm-domain", "mlm-scratch"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_recipe_loads_and_has_no_problems(path):
    recipe = read(path)
    assert limits.problems(recipe) == []
    assert tomllib.loads(path.read_text())["task"] == recipes.task_of(recipe)
    again = schema.from_table(type(recipe), tomllib.loads(schema.to_toml(recipe)), "again")
    assert again == recipe


@pytest.mark.parametrize("task", DEFAULTS)
def test_the_recipe_of_each_task_spells_out_every_default(task):
    """What has a default is set to it; what is derived is there as a comment, with a value that suits it."""
    path = ROOT / "recipes" / f"{task}.toml"
    kind = recipes.RECIPES[task]
    assert read(path) == kind(train=DEFAULTS[task])
    text = path.read_text()
    table = tomllib.loads(text)
    for section, part in (
        ("", kind),
        *((n, h) for n, h in get_type_hints(kind).items() if dataclasses.is_dataclass(h)),
    ):
        lines = text.split(f"[{section}]")[1] if section else text
        lines = lines.split("\n[")[0]
        for item in dataclasses.fields(part):
            if dataclasses.is_dataclass(get_type_hints(part)[item.name]):
                continue
            if item.default is None:
                assert re.search(rf"^# {item.name}\b", lines, re.M), f"{section}.{item.name} is not mentioned"
                if found := re.search(rf"^# ({item.name} = [^#\n]+)", lines, re.M):
                    value = tomllib.loads(found[1])[item.name]
                    assert schema.fits(value, get_type_hints(part)[item.name]), found[0]
            else:
                assert item.name in (table[section] if section else table), f"{section}.{item.name} is not set"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_recipe_runs(path, tiny, tmp_path):
    data, model, config = tiny
    recipe = read(path)
    task = recipes.task_of(recipe)
    changes = {"model": str(model)}
    if task == "mlm":
        changes = {
            "model": str(config if recipe.scratch else model),
            "vocab_size": 400,
            "add_words": min(recipe.add_words, 5),
        }
    loop = dataclasses.replace(recipe.loop, max_steps=3, batch=8)
    recipe = dataclasses.replace(recipe, train=str(data[task]), loop=loop, **changes)
    finished = finetune(recipe, tmp_path / "out")
    assert finished.folder == tmp_path / "out"
    for file in ("model.safetensors", "config.json", "tokenizer.json", "recipe.toml", "README.md", "loss.png"):
        assert (finished.folder / file).stat().st_size > 0
    written = read(finished.folder / "recipe.toml")
    derived = {name for name, value in vars(recipe).items() if value is None or name == "ranking"}
    same = {name: getattr(written, name) for name in derived}
    assert dataclasses.replace(written, loop=recipe.loop) == dataclasses.replace(recipe, **same)
    assert None not in (written.loop.max_tokens, written.loop.precision, written.loop.eval_steps, written.max_length)
    if task == "contrastive":
        filled = dataclasses.replace(written.ranking, scale=None, similarity=None)
        assert filled == recipe.ranking and None not in (written.ranking.scale, written.ranking.similarity)
