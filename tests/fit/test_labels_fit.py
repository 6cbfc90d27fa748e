"""`finetune(Classify | Regress | Tag)`: it learns, resumes to the same bits, and leaves what stock code opens."""

import dataclasses
import hashlib
import json
import os
import random
import signal

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, pipeline

from conftest import corpus
from embedtune import Loop, UserError, files, finetune, plots, plots_labels, tune
from embedtune.data.read import Counts
from embedtune.errors import Interrupted
from embedtune.fit import engine
from embedtune.fit.engine import Listener
from embedtune.fit.objectives.labelled import held_out
from embedtune.recipes import Classify, Regress, Tag

QUICK = {"batch": 16, "lr": 3e-3, "max_tokens": 512, "precision": "fp32", "log_steps": 1, "eval_steps": 4, "epochs": 2}
LOOP = {f.name for f in dataclasses.fields(Loop)}
SAME = ("model.safetensors", "recipe.toml", "scores.json", "README.md", "tokenizer.json", "config.json")
WORDS = sorted(set(corpus(300, seed=1).split()))
KINDS = {"classify": Classify, "pairs": Classify, "several": Classify, "regress": Regress, "tag": Tag}


def texts(count, seed=0):
    """Texts of two halves of the language, in turn."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS[n % 2 :: 2], k=draw.choice((3, 8, 20)))) for n in range(count)]


def rows_of(task, count=96, seed=0):
    found, others = texts(count, seed), texts(count, seed + 100)
    match task:
        case "classify":
            return [{"text": t, "label": ("good", "bad")[n % 2]} for n, t in enumerate(found)]
        case "pairs":
            return [{"text": t, "text_pair": o, "label": n % 2} for n, (t, o) in enumerate(zip(found, others))]
        case "several":
            labels = [["good", "new"], ["bad"]]
            return [{"text": t, "label": [] if n % 11 == 0 else labels[n % 2]} for n, t in enumerate(found)]
        case "regress":
            return [{"text": t, "score": 10 * (n % 2) + 0.1 * (n % 7)} for n, t in enumerate(found)]
    tags = {word: "O" for word in WORDS} | dict.fromkeys(WORDS[::5], "B-place")
    sentences = [t.split() for t in found]
    return [{"tokens": s, "tags": [tags[word] for word in s]} for s in sentences]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Drawing and waiting for the disk are most of a tiny run's time; both have tests of their own."""
    monkeypatch.setattr(
        plots, "loss_curve", lambda r, stem, title, unit: files.write_bytes(stem.with_suffix(".png"), b"")
    )
    monkeypatch.setattr(plots_labels, "save_figure", lambda figure, stem: None)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@dataclasses.dataclass
class Ran:
    """A run that ended: what it left and said, and what it was prepared from."""

    folder: object
    scores: dict
    notes: list
    prepared: object

    @property
    def log(self):
        return [{k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")}
                for record in engine.read_log(self.folder)]  # fmt: skip

    @property
    def losses(self):
        return [record["loss"] for record in self.log if "loss" in record]

    @property
    def bits(self):
        return {name: hashlib.sha256((self.folder / name).read_bytes()).hexdigest() for name in SAME}

    def said(self, words):
        return [note for note in self.notes if words in note]


@pytest.fixture
def fit(tiny_model, tmp_path, monkeypatch):
    """fit(task, kind of model, out, train, fields of recipe and loop...) -> Ran."""
    made, inner = [], tune.prepare
    monkeypatch.setattr(tune, "prepare", lambda *given: made.append(inner(*given)) or made[-1])

    def run(task, kind="bert", out="out", train=None, resume=False, step=None, **changes):
        loop = Loop(**{**QUICK, **{k: v for k, v in changes.items() if k in LOOP}})
        own = {"train": rows_of(task) if train is None else train, "model": str(tiny_model(kind))}
        recipe = KINDS[task](**{**own, **{k: v for k, v in changes.items() if k not in LOOP}}, loop=loop)
        notes = []
        finished = finetune(recipe, tmp_path / out, resume=resume,
                            listener=Listener(notes.append, lambda record, total: step and step(record)))  # fmt: skip
        return Ran(finished.folder, finished.scores, notes, made[-1])

    return run


# ---- a fresh head starts at a linear probe of what it reads


def test_a_fresh_head_starts_at_the_probe_and_says_of_training_rows_what_is_right(fit):
    """39 classes, four rows each: a random head would need hundreds of steps to tell them apart at all."""
    names = [f"c{n}" for n in range(39)]
    rows = [{"text": " ".join([WORDS[n]] * 4 + [WORDS[n + 40 + k]]), "label": name}
            for k in range(4) for n, name in enumerate(names)]  # fmt: skip
    dev = [{"text": " ".join([WORDS[n]] * 5), "label": name} for n, name in enumerate(names)]
    ran = fit("classify", train=rows, dev=dev, lr=1e-9, max_steps=2)
    assert ran.log[0]["step"] == 0 and ran.log[0]["dev_accuracy"] > 0.8


def test_the_start_is_the_probe_where_the_head_is_one_linear_layer(fit):
    ran = fit("tag", lr=1e-9, max_steps=1)
    assert ran.log[0]["dev_loss"] == pytest.approx(ran.scores["baselines"]["linear probe"]["dev_loss"], rel=2e-3)


def test_a_head_that_the_folder_has_is_left_as_it_is(fit):
    first = fit("classify", out="first")
    second = fit("classify", out="second", model=str(first.folder), lr=1e-9, max_steps=1)
    assert second.log[0]["dev_loss"] == pytest.approx(first.scores["tuned"]["dev_loss"], rel=1e-4)


# ---- the contract that every task keeps


@pytest.mark.also_gpu
@pytest.mark.parametrize("task", KINDS)
def test_the_loss_falls_on_easy_rows_and_the_same_seed_gives_the_same_log(fit, task):
    options = {
        "epochs": 12,
        "eval_steps": 12,
        "measure": "loss",
        "lr": 1e-3 if task == "regress" else 3e-3,
        "train": rows_of(task, 48),
        "dev": rows_of(task, 24, seed=5),
    }
    one, again = (fit(task, out=out, **options) for out in ("one", "again"))
    assert np.mean(one.losses[-4:]) < 0.85 * np.mean(one.losses[:4])
    assert one.log == again.log and one.bits == again.bits
    assert one.scores["best_step"] > 0 and np.isfinite(one.scores["tuned"]["dev_loss"])
    other = fit(task, out="other", seed=1, **options)
    assert other.losses != one.losses


@pytest.mark.also_gpu
@pytest.mark.parametrize("task", ["pairs", "several", "regress", "tag"])
def test_a_stopped_run_ends_as_one_that_was_not(fit, task):
    options = {"checkpoint_steps": 2, "kind": "minilm", "layer_decay": 1.0 if task == "pairs" else 0.7}
    whole = fit(task, out="whole", **options)

    def step(record):
        if "loss" in record and record["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        fit(task, out="cut", step=step, **options)
    resumed = fit(task, out="cut", resume=True, **options)
    assert resumed.said("resumed at step 5") and resumed.bits == whole.bits and resumed.log == whole.log


def test_with_a_small_decay_the_embeddings_hardly_move(fit, tiny_model, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.setattr(engine, "better", lambda *scores: True)  # the last step is kept
    before = load_file(tiny_model("bert") / "model.safetensors")
    after = load_file(fit("classify", layer_decay=0.1).folder / "model.safetensors")
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before if name in after}
    low, bottom, top = (max(gap for name, gap in moved.items() if word in name)
                        for word in ("word_embeddings", "layer.0.", "layer.1."))  # fmt: skip
    assert 0 < low < 0.2 * bottom < 0.04 * top


@pytest.mark.parametrize("weights", ["none", "balanced"])
@pytest.mark.parametrize("task", KINDS)
def test_micro_batches_leave_the_gradients_of_the_whole_batch(fit, task, weights):
    changes = {} if task == "regress" else {"weights": weights, "label_smoothing": 0.1}
    objective = fit(task, max_steps=1, train=rows_of(task, 60)[:-7], **changes).prepared.objective
    rows, found = np.arange(0, objective.size, 2), []
    for budget in (10_000, 40):
        objective.model.zero_grad()
        step = objective.step(3, 0, rows, budget)
        found.append((step, {n: p.grad.clone() for n, p in objective.model.named_parameters() if p.grad is not None}))
    assert found[0][0].loss == pytest.approx(found[1][0].loss, rel=1e-5) and found[0][0].tokens == found[1][0].tokens
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-5, rtol=1e-4)


def test_the_loss_is_that_of_torch_on_stock_logits(fit):
    ran = fit(
        "classify",
        max_steps=1,
        weights="balanced",
        label_smoothing=0.1,
        train=rows_of("classify", 60)[:-9] + rows_of("classify", 8)[::2],
    )
    objective = ran.prepared.objective
    objective.model.eval()
    rows = np.arange(20)
    right = torch.tensor([int(label == "good") for label in _labels(ran, objective)])
    sizes = torch.bincount(right)
    weight = len(right) / (2 * sizes)
    logits = objective.logits(rows, None)
    ours = objective.loss(logits, rows) / objective.weight(rows)
    theirs = torch.nn.functional.cross_entropy(logits, right[:20], weight.float(), label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs)


def _labels(ran, objective):
    """The labels of the training rows, found by their text."""
    known = {tuple(objective.loaded.tokenizer(r["text"])["input_ids"]): r["label"] for r in rows_of("classify", 60)}
    return [known[tuple(objective.tokens.row(n).tolist())] for n in range(objective.size)]


# ---- what is left


@pytest.mark.parametrize("kind", ["minilm", "roberta", "distilbert", "modernbert"])
def test_stock_pipelines_open_the_folder_and_say_what_we_scored(fit, kind):
    ran = fit("classify", kind=kind, dev=rows_of("classify", 20, seed=3), out="c")
    stock = pipeline("text-classification", model=str(ran.folder), device="cpu")
    dev = rows_of("classify", 20, seed=3)
    said = [stock(row["text"])[0]["label"] for row in dev]
    accuracy = np.mean([label == row["label"] for label, row in zip(said, dev)])
    assert accuracy == pytest.approx(ran.scores["tuned"]["dev_accuracy"])
    model, info = AutoModelForSequenceClassification.from_pretrained(ran.folder, output_loading_info=True)
    assert model.config.id2label == {0: "bad", 1: "good"} and not info["missing_keys"]
    assert model.config.problem_type == "single_label_classification"
    assert np.isfinite(SentenceTransformer(str(ran.folder), device="cpu").encode(["da bo"])).all()
    tagger = fit("tag", kind=kind, out="t")
    model, info = AutoModelForTokenClassification.from_pretrained(tagger.folder, output_loading_info=True)
    assert model.config.label2id == {"O": 0, "B-place": 1} and not info["missing_keys"]
    assert pipeline("token-classification", model=str(tagger.folder), device="cpu")("da bo " + WORDS[0]) is not None


def test_the_folder_tells_what_ran_against_which_baselines(fit):
    ran = fit("classify", epochs=4)
    assert list(ran.scores["baselines"]) == ["majority class", "linear probe"]
    assert ran.scores["baselines"]["majority class"]["dev_accuracy"] == pytest.approx(0.5, abs=0.15)
    card = (ran.folder / "README.md").read_text()
    assert "text-classification" in card and "| F1 (macro) |" in card and "linear probe" in card
    assert "held out" in card and ran.scores["verdict"] in card
    assert ran.scores["difference"]["items"] == len(ran.prepared.dev.items)
    assert fit("regress", out="r").scores["baselines"].keys() == {"mean score", "linear probe"}
    assert fit("tag", out="t").scores["baselines"].keys() == {"most common tag", "linear probe"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_frozen_encoder_keeps_its_weights_and_lora_changes_few(fit, tiny_model, precision):
    from safetensors.torch import load_file

    before = load_file(tiny_model("bert") / "model.safetensors")
    frozen = load_file(fit("classify", out="frozen", freeze=True, precision=precision).folder / "model.safetensors")
    inside = [name for name in before if name.startswith("bert.") and "pooler" not in name]
    assert len(inside) > 20 and all(torch.equal(before[name], frozen[name]) for name in inside)
    pytest.importorskip("peft")
    ran = fit("classify", out="lora", lora=2, epochs=3, precision=precision)
    adapted = load_file(ran.folder / "model.safetensors")
    assert set(adapted) == set(frozen)
    changed = [name for name in inside if not torch.equal(before[name], adapted[name])]
    assert changed and all(before[name].ndim == 2 and "embeddings" not in name for name in changed)
    assert ran.said("LoRA of rank 2 beside 12 linear layers")


# ---- data: drawn, held out, cut, chunked


@pytest.mark.parametrize("seed", range(3))
def test_a_tenth_of_each_class_is_held_out_in_whole_groups(seed):
    draw = np.random.default_rng(seed)
    classes, groups = draw.integers(0, 5, 400), draw.integers(0, 300, 400)
    held = held_out(classes, groups, 0.1, seed)
    assert not set(groups[held]) & set(groups[~held])
    for number in range(5):
        assert 1 <= (held & (classes == number)).sum() <= max(1, round((classes == number).sum() * 0.1))


def test_rows_are_drawn_by_the_seed_and_it_is_said(fit):
    ran = fit(
        "classify", train=rows_of("classify", 96), dev=rows_of("classify", 40, seed=7), train_rows=30, dev_rows=10
    )
    assert ran.prepared.objective.size == 30 and len(ran.prepared.dev.rows) == 10
    assert ran.said("trained on 30 of 96 rows, drawn by the seed") and ran.said("scored on 10 of 40 rows")


def test_shared_texts_are_warned_of_and_long_ones_counted(fit):
    rows = rows_of("classify", 60)
    ran = fit("classify", train=rows, dev=rows[:8] + rows_of("classify", 12, seed=9), max_length=12)
    assert ran.said("8 of 20 dev texts stand in the training data too")
    assert ran.said("longer than 12 tokens: cut to them")


def test_no_word_loses_its_tag_in_a_long_sentence(fit):
    rows = rows_of("tag", 60)
    long = [token for row in rows for token in row["tokens"]][:400]
    tags = [tag for row in rows for tag in row["tags"]][:400]
    ran = fit("tag", train=[*rows, {"tokens": long, "tags": tags}], dev=[{"tokens": long, "tags": tags}] * 2)
    assert ran.said("sentences longer than 128 tokens were chunked between words, none cut")
    objective, dev = ran.prepared.objective, ran.prepared.dev
    joined = dev.join(objective.predict(dev.rows))
    assert [len(part) for part in joined] == [400, 400] == [len(gold) for gold in dev.gold]
    np.testing.assert_allclose(joined[0], joined[1], atol=1e-5)


# ---- mistakes


@pytest.mark.parametrize(
    "task, changes, says",
    [
        ("classify", {"train": rows_of("classify")[::2]}, "one class"),
        ("classify", {"train": rows_of("classify", 6)}, "6 row(s): too few to learn from"),
        ("classify", {"train": [*rows_of("classify", 40), {"text": "da bo", "label": "Good "}]}, "Good"),
        ("classify", {"train": [*rows_of("classify", 40), {"text": "da bo", "label": "once"}]}, "once"),
        ("classify", {"dev": [*rows_of("classify", 10, seed=4), {"text": "da", "label": "new"}]}, "new"),
        ("classify", {"pooling": "mean", "kind": "distilbert"}, "--pooling: the stock distilbert head reads the first"),
        ("classify", {"max_length": 999}, "--max-length: 999 tokens are more than the 128 positions"),
        ("classify", {"freeze": True, "lora": 4}, "lora and freeze exclude each other"),
        ("classify", {"label_smoothing": 1.0}, "label_smoothing must be"),
        ("classify", {"train": [{"text": "da bo", "label": 0.5}] * 20}, "embedtune fit regress"),
        ("regress", {"train": [{"text": t, "score": 3} for t in texts(30)]}, "all scores are 3"),
        ("regress", {"train": [{"text": t, "score": "nan"} for t in texts(30)]}, "no finite number"),
        ("tag", {"train": [{"tokens": t.split(), "tags": ["O"] * len(t.split())} for t in texts(30)]}, "no tag but O"),
        (
            "tag",
            {"train": [*rows_of("tag", 30), {"tokens": ["da", "bo"], "tags": ["O"]}]},
            "numbers of tokens and tags",
        ),
        ("tag", {"dev": [{"tokens": ["da", "bo"], "tags": ["O", "B-new"]}] * 4}, "B-new"),
    ],
)
def test_mistakes_are_said_before_anything_is_learned(fit, tmp_path, task, changes, says):
    with pytest.raises(UserError) as caught:
        fit(task, **changes)
    assert says in str(caught.value)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_rows_that_are_left_out_are_counted(fit):
    rows = [*rows_of("classify", 60), {"text": "", "label": "good"}, {"text": "da bo", "label": "once"}]
    ran = fit("classify", train=rows, bad_rows="skip")
    assert ran.said("1 rows left out: a class with a single row")
    assert ran.said("1 rows left out") and len(ran.said("rows left out")) == 2
    assert Counts().used == 0 and json.loads((ran.folder / "run.json").read_text())["data"]["left_out"]
