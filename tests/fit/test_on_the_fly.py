"""Masked language modelling on lines that are tokenised when a batch takes them."""

import dataclasses
import hashlib
import json
import os
import signal

import numpy as np
import pytest
import torch

from conftest import corpus
from embedtune import MLM, Loop, UserError, files, finetune, limits, plots, schema
from embedtune.data import split
from embedtune.data.read import Row, read_texts
from embedtune.data.split import AllBut, hold_out, hold_out_lines
from embedtune.data.spool import LazyTokens, spool
from embedtune.data.tokens import Tokens, tokenize
from embedtune.encoder import load
from embedtune.errors import Interrupted
from embedtune.fit import engine
from embedtune.fit.engine import Listener
from embedtune.fit.objectives import raw_text
from embedtune.fit.objectives.prepare import prepare_mlm
from embedtune.fit.past import choose, continued

LOOP = Loop(batch=16, lr=5e-3, max_tokens=256, precision="fp32", log_steps=1, eval_steps=4, max_steps=12)
SAME = ("model.safetensors", "recipe.toml", "scores.json", "README.md")
ODD = "☃ ☃\n\nbi " + "bo bade " * 120 + "\n"  # a line of which nothing is known, and one that is chunked


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(
        plots, "loss_curve", lambda r, stem, title, unit: files.write_bytes(stem.with_suffix(".png"), b"")
    )
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def tune(tiny_model, tmp_path):
    """tune(text, out, step=a function of each logged step, changes of the recipe...) -> (folder, notes)."""

    def run(text, out="out", kind="bert", resume=False, step=None, **changes):
        path = tmp_path / "text.txt"
        path.write_text(text)
        recipe = MLM(train=str(path), model=str(tiny_model(kind)), dev_rows=16, loop=LOOP)
        notes = []
        listener = Listener(notes.append, lambda record, total: step and step(record))
        done = finetune(dataclasses.replace(recipe, **changes), tmp_path / out, resume=resume, listener=listener)
        return done.folder, "\n".join(notes)

    return run


@pytest.fixture
def prepare(tiny_model, tmp_path):
    """prepare(text, name, changes...) -> Prepared, dropout keyed as in a run."""

    def run(text, name, **changes):
        path = tmp_path / "text.txt"
        path.write_text(text)
        recipe = MLM(train=str(path), model=str(tiny_model("bert")), dev_rows=16, loop=LOOP)
        return prepare_mlm(dataclasses.replace(recipe, **changes), tmp_path / name, lambda text: None)

    return run


def without_time(folder):
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in engine.read_log(folder)]


def lines_of(*texts):
    return (Row({"text": text}, "f", number, number) for number, text in enumerate(texts))


# ---- which lines are held out


def test_all_but_is_the_array():
    draw = np.random.default_rng(0)
    for size in (1, 5, 40):
        for count in range(size + 1):
            left_out = np.sort(draw.choice(size, count, replace=False))
            rest, expected = AllBut(size, left_out), np.setdiff1d(np.arange(size), left_out)
            assert len(rest) == len(expected) and np.array_equal(rest[np.arange(len(rest))], expected)
            assert np.array_equal(rest[np.arange(len(rest))[::-2]], expected[::-2])


@pytest.mark.parametrize("block", [1, 7, 10_000])
@pytest.mark.parametrize("document", [1, 9, 500])
def test_the_lines_held_out_are_those_of_token_rows(tiny_model, tmp_path, monkeypatch, document, block):
    """Where nothing is chunked and nothing repeats, whatever the blocks in which places are looked through."""
    monkeypatch.setattr("embedtune.data.spool.LINES", block)
    monkeypatch.setattr(split, "also_in", lambda tokens, train, dev: dev[:0])
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{line}\n" for line in corpus(500, document=document).splitlines()))
    eager = tokenize(read_texts(path), load.load_mlm(tiny_model("bert"), 0).tokenizer, 64, tmp_path / "eager")
    lines = spool(read_texts(path), tmp_path / "lazy")
    monkeypatch.setattr(type(lines), "having", lambda self, texts: iter(()))
    for rows, seed in ((20, 0), (50, 3), (3, 1)):
        found = hold_out_lines(lines, rows, seed)
        assert found == {"held": hold_out(eager, rows, seed).dev.tolist(), "moved": 0}


def test_lines_that_training_has_word_for_word_go_back(tmp_path):
    texts = [f"line {number}" if number % 3 else "the same" for number in range(300)]
    lines = spool(lines_of(*texts), tmp_path / "lines")
    found = hold_out_lines(lines, 30, 0)
    assert found["moved"] > 0 and len(found["held"]) + found["moved"] == 30
    assert not [number for number in found["held"] if texts[number] == "the same"]
    with pytest.raises(UserError, match="every row that could be held out"):
        hold_out_lines(spool(lines_of(*["the same"] * 40), tmp_path / "same"), 4, 0)
    with pytest.raises(UserError, match="too few to hold any out"):
        hold_out_lines(spool(lines_of("a", "b"), tmp_path / "few"), 4, 0)


# ---- what is trained on


def test_small_text_is_tokenised_before_and_large_text_on_the_fly(prepare, monkeypatch):
    made = prepare(corpus(200), "small")
    assert isinstance(made.objective.tokens, Tokens) and made.recipe.on_the_fly is False
    monkeypatch.setattr(raw_text, "MOST_BYTES", 100)
    made = prepare(corpus(200), "large")
    assert isinstance(made.objective.tokens, LazyTokens) and made.recipe.on_the_fly is True
    assert isinstance(made.objective.train, AllBut) and made.identity["tokenised"] == "on the fly"
    assert isinstance(prepare(corpus(200), "asked", on_the_fly=False).objective.tokens, Tokens)


def test_a_step_is_that_of_the_rows_tokenised_before(prepare):
    """Masks and dropout are keyed by the line, so loss and gradients are the same to rounding."""
    made = [prepare(corpus(120, seed=7), name, on_the_fly=name == "lazy").objective for name in ("eager", "lazy")]
    rows = np.arange(40)
    steps = []
    for objective in made:
        # Nothing is chunked here, so a row's number is its line's.
        objective = dataclasses.replace(objective, train=np.arange(100))
        result = objective.step(3, 0, rows, 200)
        steps.append((result, {n: p.grad.clone() for n, p in objective.model.named_parameters()}))
    (eager, expected), (lazy, found) = steps
    assert lazy.tokens == eager.tokens and lazy.weight == eager.weight
    assert lazy.loss == pytest.approx(eager.loss, rel=1e-6)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-6, rtol=1e-4), name


def test_a_batch_of_lines_that_say_nothing_does_no_harm(prepare):
    made = prepare(corpus(100) + "☃\n" * 8, "lazy", on_the_fly=True).objective
    barren = np.arange(len(made.tokens) - 8, len(made.tokens))
    alone = dataclasses.replace(made, train=barren)
    assert alone.step(0, 0, np.arange(8), 100) == engine.Step(0.0, 0, 0.0)
    assert all(p.grad is None for p in made.model.parameters())
    mixed = dataclasses.replace(made, train=np.concatenate([barren, [3, 4]])).step(0, 0, np.arange(10), 100)
    plain = dataclasses.replace(made, train=np.array([3, 4])).step(0, 0, np.arange(2), 100)
    assert mixed.tokens == plain.tokens and mixed.loss == pytest.approx(plain.loss, rel=1e-6)


def test_a_long_line_is_taken_whole(prepare):
    made = prepare(corpus(100) + ODD, "lazy", on_the_fly=True, max_length=32).objective
    last = dataclasses.replace(made, train=np.array([len(made.tokens) - 1]))
    bare = made.loaded.tokenizer(made.tokens.spool.texts(last.train)[0], add_special_tokens=False)["input_ids"]
    chunks = -(-len(bare) // 30)
    assert chunks > 5 and last.step(0, 0, np.array([0]), 64).tokens == len(bare) + 2 * chunks


def test_held_out_rows_know_their_documents(prepare):
    made = prepare(corpus(300) + ODD, "lazy", on_the_fly=True).objective
    lines, dev = made.tokens.spool, made.dev_tokens
    held = made.train.left_out
    assert sorted(set(zip(dev.document.tolist(), dev.line.tolist()))) == sorted(map(tuple, lines.places(held).tolist()))
    assert not set(made.train[np.arange(len(made.train))].tolist()) & set(held.tolist())
    assert np.array_equal(made.dev, np.arange(len(dev)))


def test_what_is_estimated_says_so(prepare, monkeypatch):
    text = corpus(400, seed=3) + ODD * 20
    monkeypatch.setattr(raw_text, "SAMPLE", 200)
    made = prepare(text, "lazy", on_the_fly=True)
    exact = prepare(text, "eager")
    profile, said = made.profile, "\n".join(made.remarks)
    assert profile["tokens_estimated_from_lines"] == 200 and "tokens_estimated_from_lines" not in exact.profile
    assert profile["tokens"] == pytest.approx(exact.profile["tokens"], rel=0.3)
    assert exact.profile["chunked_lines"] > 12
    assert profile["chunked_lines"] == pytest.approx(exact.profile["chunked_lines"], abs=12)
    for name in ("sha256", "bytes", "lines", "lines_used", "blank_lines"):
        assert profile[name] == exact.profile[name]
    assert "estimates from 200 of them" in said and "chunked, none cut" in said and "left out when they are met" in said
    assert "Near-duplicates were not looked for" in said and "embedtune data split" in said


def test_a_fresh_head_starts_at_the_frequencies_of_the_sample(prepare, tiny_model):
    """The sample is all lines here, so they are those of the training rows."""
    changes = {"model": str(tiny_model("minilm")), "dev_rows": 12}
    lazy, eager = (prepare(corpus(200), n, on_the_fly=n == "lazy", **changes).objective for n in ("lazy", "eager"))
    bias = [made.model.get_output_embeddings().bias for made in (lazy, eager)]
    assert torch.allclose(*bias, atol=0.05) and bias[0].std() > 0.5


def test_a_given_dev_text_is_scored_on(prepare, tmp_path):
    text = corpus(200)
    known = [line for line in text.splitlines() if line][:3]
    dev = [*known, *filter(None, corpus(20, seed=9).splitlines())]
    (tmp_path / "dev.txt").write_text("\n".join(dev))
    made = prepare(text, "lazy", on_the_fly=True, dev=str(tmp_path / "dev.txt"))
    assert len(made.objective.train) == 200 and len(made.objective.dev) == 16
    said = "\n".join(made.remarks)
    repeats = sum(line in text.splitlines() for line in dev[:16])
    assert repeats >= 3
    assert f"{repeats} of 16 dev lines also stand in the training text word for word: their scores flatter" in said
    assert "Near-duplicates of dev rows in the training text were not looked for" in said


def test_text_of_nothing_that_is_known_is_a_users_error(prepare):
    with pytest.raises(UserError, match="no text that the tokenizer turns into tokens"):
        prepare("".join("☃" * n + "\n" for n in range(1, 40)), "none", on_the_fly=True)


# ---- whole runs


def stop_at(number):
    def step(record):
        if "loss" in record and record["step"] == number:
            os.kill(os.getpid(), signal.SIGTERM)

    return step


@pytest.mark.also_gpu
@pytest.mark.parametrize("kind", ["bert", "minilm"])
def test_it_learns_repeats_and_resumes_to_the_bit(tune, kind, monkeypatch):
    monkeypatch.setattr(raw_text, "MOST_BYTES", 100)
    text = corpus(200) + ODD
    whole, notes = tune(text, "whole", kind)
    losses = [record["loss"] for record in without_time(whole) if "loss" in record]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) and "tokenised on the fly" in notes
    assert schema.read_toml(whole / "recipe.toml")["on_the_fly"] is True
    again, _ = tune(text, "again", kind)
    with pytest.raises(Interrupted):
        tune(text, "cut", kind, step=stop_at(7))
    cut, notes = tune(text, "cut", kind, resume=True)
    assert "resumed at step 7 of" in notes
    for folder in (again, cut):
        assert without_time(folder) == without_time(whole)
        for name in SAME:
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert json.loads((cut / "run.json").read_text())["tokenised"] == "on the fly"
    assert not (whole / "data").exists()


def test_a_run_is_not_resumed_the_other_way(tune, monkeypatch):
    monkeypatch.setattr(raw_text, "MOST_BYTES", 100)
    with pytest.raises(Interrupted):
        tune(corpus(200), step=stop_at(3))
    monkeypatch.setattr(raw_text, "MOST_BYTES", 10**9)
    with pytest.raises(UserError, match="cannot be resumed") as caught:
        tune(corpus(200), resume=True)
    assert "tokenised: None (was on the fly)" in caught.value.details


def test_a_run_goes_on_from_one_on_the_fly(tune, tmp_path, monkeypatch):
    """The old text is parted as it was, by lines; then both are held in memory and tokenised before."""
    first, _ = tune(corpus(200), "first", on_the_fly=True)
    recipe = continued(first, str(tmp_path / "new.txt"))
    (tmp_path / "new.txt").write_text(corpus(150, seed=8))
    assert recipe.on_the_fly is None and limits.problems(recipe) == []
    recipe = dataclasses.replace(recipe, loop=dataclasses.replace(LOOP, max_steps=2))
    made = []
    monkeypatch.setattr("embedtune.fit.past.choose", lambda *given, inner=choose: made.append(given) or inner(*given))
    second = finetune(recipe, tmp_path / "second").folder
    assert schema.read_toml(second / "recipe.toml")["on_the_fly"] is False
    text = corpus(200).splitlines()
    held = hold_out_lines(spool(read_texts(tmp_path / "text.txt"), tmp_path / "lines"), 16, 0)["held"]
    old = [line for line in text if line]
    assert sorted(made[0][1].dev) == sorted(old[number] for number in held)
    assert limits.problems(dataclasses.replace(recipe, on_the_fly=True))


def test_the_text_of_a_hash_is_the_same_either_way(tune):
    """What identifies the data does not depend on the way."""
    accounts = []
    for way in (True, False):
        folder, _ = tune(corpus(200), f"way-{way}", on_the_fly=way)
        accounts.append(json.loads((folder / "run.json").read_text())["training data"])
    text = corpus(200).encode()
    assert accounts == [hashlib.sha256(text).hexdigest()] * 2
