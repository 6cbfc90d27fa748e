import dataclasses
import math
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedtune import limits, schema
from embedtune.errors import UserError
from embedtune.recipes import MLM, Loop

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
WHOLE, REAL = st.integers(1, 10**9), st.floats(1e-300, 1e300)


def maybe(strategy):
    return st.none() | strategy


LOOPS = st.builds(
    Loop,
    seed=st.integers(-(2**63), 2**63 - 1),
    lr=maybe(REAL),
    epochs=REAL,
    max_steps=maybe(WHOLE),
    minutes=maybe(REAL),
    batch=WHOLE,
    precision=maybe(st.sampled_from(["bf16", "fp32"])),
    schedule=st.sampled_from(["linear", "cosine", "constant", "wsd"]),
    warmup=REAL,
    patience=maybe(WHOLE),
    measure=TEXT,
)
RECIPES = st.builds(
    MLM,
    train=TEXT,
    dev=maybe(TEXT),
    model=maybe(TEXT),
    columns=maybe(TEXT),
    bad_rows=st.sampled_from(["fail", "skip", "replace"]),
    max_length=maybe(WHOLE),
    on_the_fly=maybe(st.booleans()),
    mask_rate=maybe(REAL),
    whole_words=st.booleans(),
    scratch=st.booleans(),
    loop=LOOPS,
)


@settings(max_examples=150, deadline=None)
@given(RECIPES)
def test_a_recipe_survives_toml(recipe):
    text = schema.to_toml(recipe)
    assert schema.from_table(MLM, tomllib.loads(text), "x") == recipe
    assert tomllib.loads(text)["task"] == "mlm"


def problems_of(table):
    with pytest.raises(UserError) as caught:
        schema.from_table(MLM, table, "r.toml")
    assert str(caught.value).startswith(f"r.toml: {len(caught.value.details)} problem(s) in the recipe")
    return caught.value.details


def test_unknown_keys_and_wrong_types_are_reported_together():
    found = problems_of(
        {"trian": "a", "whole_words": 1, "dev_rows": 2.5, "loop": {"learning_rate": 1, "sede": 3, "epochs": "two"}}
    )
    assert found == (
        "unknown key 'trian' (did you mean 'train'?)",
        "'whole_words' must be true or false, not 1",
        "'dev_rows' must be a whole number, not 2.5",
        "unknown key 'loop.learning_rate'",
        "unknown key 'loop.sede' (did you mean 'seed'?)",
        "'loop.epochs' must be a number, not 'two'",
    )


@pytest.mark.parametrize(
    "table, words",
    [
        ({"loop": 3}, "'loop' must be a table [loop]"),
        ({"loop": {"lr": True}}, "'loop.lr' must be a number, not True"),
        ({"loop": {"max_steps": True}}, "'loop.max_steps' must be a whole number, not True"),
        (
            {"loop": {"schedule": "linaer"}},
            "'loop.schedule' must be one of linear, cosine, constant, wsd, not 'linaer'",
        ),
        ({"loop": {"precision": "fp16"}}, "'loop.precision' must be one of bf16, fp32, not 'fp16'"),
        ({"model": ["a"]}, "'model' must be a text, not ['a']"),
    ],
)
def test_each_wrong_type_is_named_in_a_users_words(table, words):
    assert problems_of(table) == (words,)


def test_a_whole_number_is_a_number():
    loop = schema.from_table(MLM, tomllib.loads("[loop]\nepochs = 3\nminutes = 2\nlr = 2e-5"), "x").loop
    assert (loop.epochs, loop.minutes, loop.lr) == (3.0, 2.0, 2e-5)
    assert all(isinstance(value, float) for value in (loop.epochs, loop.minutes))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"lr": 0.0}, "lr must"),
        ({"lr": 1.0}, "lr must"),
        ({"lr": math.nan}, "lr must"),
        ({"epochs": 0.0}, "epochs must"),
        ({"epochs": math.inf}, "epochs must"),
        ({"epochs": math.nan}, "epochs must"),
        ({"batch": 0}, "batch must"),
        ({"warmup": -0.1}, "warmup must"),
        ({"warmup": math.inf}, "warmup must"),
        ({"clip": 0.0}, "clip must"),
        ({"weight_decay": -1.0}, "weight_decay must"),
        ({"max_steps": 0}, "max_steps must"),
        ({"max_tokens": -5}, "max_tokens must"),
        ({"eval_steps": 0}, "eval_steps must"),
        ({"patience": 0}, "patience must"),
        ({"checkpoint_steps": 0}, "checkpoint_steps must"),
        ({"log_steps": 0}, "log_steps must"),
        ({"minutes": 0.0}, "minutes must"),
        ({"seed": 2**63}, "seed must"),
        ({"precision": "fp16"}, "precision must be one of bf16, fp32"),
        ({"schedule": "flat"}, "schedule must be one of"),
        ({"epochs": "3"}, "epochs must be a number"),
    ],
)
def test_values_out_of_range(changes, words):
    (found,) = limits.problems(MLM(train="x", loop=Loop(**changes)))
    assert words in found


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"mask_rate": 0.0}, "mask_rate"),
        ({"mask_rate": 1.0}, "mask_rate"),
        ({"max_length": 3}, "max_length"),
        ({"dev_rows": 0}, "dev_rows"),
        ({"add_words": -1}, "add_words"),
        ({"vocab_size": 10}, "vocab_size"),
        ({"scratch": True, "add_words": 5}, "add_words makes no sense with scratch"),
        ({"bad_rows": "keep"}, "bad_rows must be one of"),
        ({"loop": {"lr": 1e-5}}, "loop must be a Loop"),
    ],
)
def test_own_values_out_of_range(changes, words):
    (found,) = limits.problems(MLM(train="x", **changes))
    assert words in found


def test_the_defaults_have_no_problems_and_data_may_be_a_list():
    assert limits.problems(MLM(train="x")) == []
    assert limits.problems(MLM(train=["a", {"text": "b"}], dev=["c"])) == []
    assert limits.problems(MLM(train=Path("x"))) == []


def test_all_problems_are_found_at_once():
    loop = Loop(lr=3.0, batch=0, clip=-1.0)
    assert len(limits.problems(MLM(train="x", mask_rate=2.0, loop=loop))) == 4


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"a = ", "valid TOML"), (b"[loop\n", "valid TOML"), (b"\xff = 1", "UTF-8"), (b"a = 1\na = 2", "valid TOML")],
)
def test_bad_toml_names_the_file(tmp_path, content, says):
    path = tmp_path / "r.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"r\.toml: is not {says}"):
        schema.read_toml(path)


def test_a_missing_toml_file_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        schema.read_toml(tmp_path / "absent.toml")


def test_recipes_are_small_and_frozen():
    assert len(dataclasses.fields(MLM)) - 1 <= 15 and len(dataclasses.fields(Loop)) <= 20
    with pytest.raises(dataclasses.FrozenInstanceError):
        MLM().train = "x"
    with pytest.raises(TypeError):
        MLM("x")


def test_data_given_in_python_is_named_not_copied():
    text = schema.to_toml(MLM(train=["a secret text", "b"]))
    assert 'train = "<2 rows given in Python>"' in text and "secret" not in text
