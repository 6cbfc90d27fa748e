"""Every recipe that is shipped loads, says what it claims, and runs."""

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest

from embedtune import finetune, limits, recipes
from embedtune.data.example import docstrings
from embedtune.encoder import scratch

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "recipes").glob("*.toml"))


def read(path: Path):
    return recipes.from_table(recipes.MLM, recipes.read_toml(path), str(path))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(text file, model folder, config of a model that --scratch can start from), all tiny."""
    folder = tmp_path_factory.mktemp("tiny")
    texts = [text for text in docstrings(400) if text]
    (folder / "data.txt").write_text("\n".join(texts) + "\n")
    config = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"intermediate_size": 64, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    # Few pieces, so that words shatter and --add-words has something to do.
    scratch.make(str(folder / "config.json"), texts, 300, 0, folder / "model")
    return folder / "data.txt", folder / "model", folder / "config.json"


def test_the_recipes_are_there():
    assert {"mlm", "mlm-domain", "mlm-scratch"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_recipe_loads_and_has_no_problems(path):
    recipe = read(path)
    assert limits.problems(recipe) == []
    assert tomllib.loads(path.read_text())["task"] == recipes.task_of(recipe)
    again = recipes.from_table(recipes.MLM, tomllib.loads(recipes.to_toml(recipe)), "again")
    assert again == recipe


def test_the_demo_recipe_spells_out_the_defaults():
    assert read(ROOT / "recipes" / "mlm.toml") == recipes.MLM(train="data.txt")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_recipe_runs(path, tiny, tmp_path):
    data, model, config = tiny
    recipe = read(path)
    recipe = dataclasses.replace(
        recipe,
        train=str(data),
        model=str(config if recipe.scratch else model),
        vocab_size=400,
        add_words=min(recipe.add_words, 5),
        loop=dataclasses.replace(recipe.loop, max_steps=3, batch=8),
    )
    finished = finetune(recipe, tmp_path / "out")
    assert finished.folder == tmp_path / "out"
    for file in ("model.safetensors", "config.json", "tokenizer.json", "recipe.toml", "README.md", "loss.png"):
        assert (finished.folder / file).stat().st_size > 0
    written = read(finished.folder / "recipe.toml")
    assert dataclasses.replace(written, loop=recipe.loop) == dataclasses.replace(
        recipe, max_length=written.max_length, mask_rate=written.mask_rate, head_steps=written.head_steps
    )
    assert None not in (written.loop.max_tokens, written.loop.precision, written.loop.eval_steps)
