"""Averaging in weight space: of two folders, and at the end of a run; what is said of it is true of what is saved."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from conftest import corpus
from embedtune import Loop, UserError, files, finetune, plots
from embedtune.average import average
from embedtune.data.pairs import read_pairs, read_scored
from embedtune.data.retrieval import from_pairs
from embedtune.encoder.embedder import load_trainable
from embedtune.encoder.encode import open_encoder
from embedtune.fit import engine, merge
from embedtune.fit.engine import Listener
from embedtune.judge.retrieval import judge_retrieval
from embedtune.judge.similarity import judge_similarity
from embedtune.recipes import Contrastive, Scored

LINES = [words for line in corpus(900, seed=3).splitlines() if len(words := line.split()) > 8]
PAIRS = [{"anchor": " ".join(w[: len(w) // 2]), "positive": " ".join(w[len(w) // 2 :])} for w in LINES]
SCORED = [
    {"sentence1": pair["anchor"], "sentence2": PAIRS[(n + n % 3) % 60]["positive"], "score": (0.9, 0.4, 0.1)[n % 3]}
    for n, pair in enumerate(PAIRS[:60])
]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Drawing and waiting for the disk are most of a tiny run's time; both have tests of their own."""
    monkeypatch.setattr(
        plots, "loss_curve", lambda r, stem, title, unit: files.write_bytes(stem.with_suffix(".png"), b"")
    )
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="session")
def moved(tiny_model, tmp_path_factory):
    """moved(kind) -> a copy of the tiny model of this kind whose every weight has moved."""
    made = {}

    def make(kind="minilm"):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("moved") / kind
            shutil.copytree(tiny_model(kind), made[kind])
            tensors = load_file(made[kind] / "model.safetensors")
            generator = torch.Generator().manual_seed(1)
            for name, tensor in tensors.items():
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
                tensors[name] = tensor.contiguous()
            save_file(tensors, made[kind] / "model.safetensors", {"format": "pt"})
        return made[kind]

    return make


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("coefficient", [0.0, 1.0])
def test_the_ends_are_the_models_bit_for_bit(tiny_model, moved, tmp_path, coefficient):
    found = average([str(tiny_model("minilm")), str(moved())], tmp_path / "out", coefficient=coefficient)
    assert found.folder == tmp_path / "out" and found.coefficient == coefficient and found.tried == {}
    assert same(weights(found.folder), weights(moved() if coefficient else tiny_model("minilm")))
    texts = ["bade fima", "lora"]
    expected = SentenceTransformer(str(moved() if coefficient else tiny_model("minilm")), device="cpu").encode(texts)
    assert np.array_equal(SentenceTransformer(str(found.folder), device="cpu").encode(texts), expected)


@pytest.mark.parametrize("kind, coefficient", [("minilm", 0.5), ("minilm", 0.3), ("modernbert", 0.5)])
def test_between_them_every_weight_is_the_average(tiny_model, moved, tmp_path, kind, coefficient):
    base, tuned = tiny_model(kind), moved(kind)
    found = average([str(base), str(tuned)], tmp_path / "out", coefficient=coefficient)
    one, two, both = (merge.weights(load_trainable(folder).model) for folder in (base, tuned, found.folder))
    assert len(one) >= 20 and any(not torch.equal(one[name], two[name]) for name in one)
    for name in one:
        expected = (1 - coefficient) * one[name] + coefficient * two[name]
        torch.testing.assert_close(both[name], expected, atol=1e-6, rtol=1e-6)
    config = [json.loads((folder / "config.json").read_text()) for folder in (base, found.folder)]
    assert {k: v for k, v in config[0].items() if "dropout" in k} == {
        k: v for k, v in config[1].items() if "dropout" in k
    }
    assert f"{coefficient:g} of the way" in (found.folder / "README.md").read_text()


def test_what_cannot_be_averaged(tiny_model, moved, tmp_path):
    base, tuned, out = str(tiny_model("minilm")), str(moved()), tmp_path / "out"
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps(PAIRS[0]) + "\n")

    def refused(models, where=out, says="", **options):
        with pytest.raises(UserError) as caught:
            average(models, where, **options)
        assert says in str(caught.value), caught.value
        assert not out.exists() and not list(tmp_path.glob("out.*"))

    refused([base], says="1 models are named, not two", coefficient=0.5)
    refused([base, tuned, tuned], says="3 models are named", coefficient=0.5)
    refused([base, tuned], says="either --coefficient or --data")
    refused([base, tuned], says="either --coefficient or --data", coefficient=0.5, data=str(pairs))
    for wrong in (-0.1, 1.5, float("nan")):
        refused([base, tuned], says="must lie between 0 and 1", coefficient=wrong)
    refused([base, str(tiny_model("modernbert"))], says="weights differ in name or shape", coefficient=0.5)
    refused([str(tiny_model("distilbert")), tuned], says="cannot be averaged with the tuned model", coefficient=0.5)
    refused([base, "./nowhere"], says="is not a model folder", coefficient=0.5)
    refused([base, tuned], says="no measure is called 'nDGC@10'", data=str(pairs), measure="nDGC@10")
    refused([base, tuned], tmp_path, says="exists already", coefficient=0.5)


def test_an_existing_folder_is_replaced_only_with_force_and_a_stopped_fit_is_left_alone(tiny_model, moved, tmp_path):
    out, stopped = tmp_path / "out", tmp_path / "out.running" / "checkpoints"
    stopped.mkdir(parents=True)
    out.mkdir()
    (out / "old.txt").write_text("old")
    average([str(tiny_model("minilm")), str(moved())], out, coefficient=0.5, force=True)
    assert (out / "model.safetensors").exists() and not (out / "old.txt").exists()
    assert stopped.exists() and {p.name for p in tmp_path.iterdir()} == {"out", "out.running"}


def test_it_chooses_on_pairs_and_is_that_average(tiny_model, moved, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS[:40]))
    base, tuned, notes = str(tiny_model("minilm")), str(moved()), []
    found = average([base, tuned], tmp_path / "out", data=str(path), measure="mrr@10", note=notes.append)
    assert list(found.tried) == [0.0, 0.25, 0.5, 0.75, 1.0] and found.measure == "mrr@10"
    assert len([note for note in notes if "of the way to the tuned model: mrr@10" in note]) == 5
    best = max(found.tried.values())
    assert found.coefficient == max(c for c, value in found.tried.items() if value == best), "the larger of equals"
    data = from_pairs(read_pairs(str(path)), "pairs")
    for coefficient, value in found.tried.items():
        again = average([base, tuned], tmp_path / f"at-{coefficient}", coefficient=coefficient)
        report = judge_retrieval(open_encoder(str(again.folder)), data, ["MRR@10"])[0]
        assert report.summary["MRR@10"] == value, coefficient
        assert same(weights(again.folder), weights(found.folder)) == (coefficient == found.coefficient)
    assert len(set(found.tried.values())) > 1, "a test that cannot tell them apart would say nothing"


def test_it_chooses_on_scored_pairs(tiny_model, moved, tmp_path):
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SCORED))
    found = average([str(tiny_model("minilm")), str(moved())], tmp_path / "out", data=str(path))
    assert found.measure == "spearman" and len(found.tried) == 5
    report = judge_similarity(open_encoder(str(found.folder)), read_scored(str(path)), "x")[0]
    assert report.summary["spearman"] == max(found.tried.values()) == found.tried[found.coefficient]


class Curve:
    """A model of one weight, whose score is a function of it."""

    def __init__(self, weight):
        self.weight = torch.nn.Parameter(torch.tensor([weight]))

    def named_parameters(self):
        return [("weight", self.weight)]


@pytest.mark.parametrize(
    "score, best",
    [
        (lambda c: c, 1.0),
        (lambda c: -c, 0.0),
        (lambda c: -abs(c - 0.5), 0.5),
        (lambda c: -abs(c - 0.3), 0.25),
        (lambda c: 1.0, 1.0),
        (lambda c: float(c < 0.6), 0.5),
    ],
)
def test_the_choice(score, best):
    model = Curve(7.0)
    seen = []

    def at(coefficient):
        seen.append(coefficient)
        assert float(model.weight.detach()[0]) == pytest.approx(3 + 4 * coefficient), "scored with its weights"
        return score(coefficient)

    chosen, tried = merge.choose(
        model, {"weight": torch.tensor([3.0])}, at, lambda a, b: a > b, (score(0.0), score(1.0))
    )
    assert chosen == best and seen == list(merge.GRID) and tried == {c: score(c) for c in (0.0, *merge.GRID, 1.0)}
    assert float(model.weight.detach()[0]) == pytest.approx(3 + 4 * best)
    # Losses are better when they are smaller.
    chosen, _ = merge.choose(Curve(7.0), {"weight": torch.tensor([3.0])}, lambda c: -score(c), lambda a, b: a < b,
                             (-score(0.0), -score(1.0)))  # fmt: skip
    assert chosen == best


LOOP = {"batch": 16, "max_tokens": 1024, "precision": "fp32", "eval_steps": 2, "epochs": 2}


def recipe(task, model, lr, merge_="auto", measure="loss"):
    loop = Loop(**LOOP, lr=lr, measure=measure)
    if task == "contrastive":
        return Contrastive(train=PAIRS[:60], model=str(model), merge=merge_, loop=loop)
    return Scored(train=SCORED, model=str(model), merge=merge_, loop=loop)


@pytest.mark.parametrize(
    "task, kind, precision, wanted",
    [
        ("contrastive", "minilm", "fp32", 0.25),
        ("contrastive", "minilm", "fp32", 0.0),
        ("contrastive", "bert", "bf16", 0.5),
        ("scored", "bert", "bf16", 0.75),
        ("scored", "minilm", "fp32", 1.0),
    ],
)
def test_a_run_averages_at_its_end(tiny_model, tmp_path, monkeypatch, task, kind, precision, wanted):
    """The coefficient is among those tried, the weights are really that average, the scores are those of the result."""
    monkeypatch.setattr(engine, "better", lambda *scores: True)  # the last step is kept
    tuned, inner = {}, merge.choose

    def choose(model, base, score, better, ends, grid=merge.GRID):
        tuned.update(merge.weights(model))

        def scripted(coefficient):
            score(coefficient)
            return -abs(coefficient - wanted)

        return inner(model, base, scripted, lambda a, b: a > b, (-abs(wanted), -abs(1 - wanted)), grid)

    monkeypatch.setattr(merge, "choose", choose)
    made = recipe(task, tiny_model(kind), 3e-3)
    made = dataclasses.replace(made, loop=dataclasses.replace(made.loop, precision=precision))
    notes = []
    finished = finetune(made, tmp_path / "out", listener=Listener(notes.append))
    scores = finished.scores
    found = scores["averaging"]
    assert found["coefficient"] == wanted and list(found["tried"]) == ["0", "0.25", "0.5", "0.75", "1"]
    base, saved = (merge.weights(load_trainable(f).model) for f in (tiny_model(kind), finished.folder))
    for name in base:
        assert torch.equal(saved[name], torch.lerp(base[name], tuned[name], wanted)), name
    said = dict(
        note.removeprefix("averaged ").split(" with the base: dev loss ") for note in notes if "averaged" in note
    )
    assert list(said) == ["0.25", "0.5", "0.75"] and len(set(said.values())) == 3, "each was measured, and differs"
    expected = {"0": scores["baseline"]["dev_loss"], "1": found["last"]["dev_loss"], **said}[f"{wanted:g}"]
    assert scores["tuned"]["dev_loss"] == pytest.approx(float(expected), abs=1e-4)
    assert (scores["difference"] is None) == (wanted == 0)
    line = f"{wanted:g} of the way from the base to the tuned weights was best on dev"
    assert line in (finished.folder / "README.md").read_text()


def test_the_scores_of_the_average_are_measured_on_it(tiny_model, tmp_path, monkeypatch):
    """Judged anew from the folder, the dev measures are those that scores.json tells."""
    kept = {}
    from embedtune import tune

    inner = tune.prepare
    monkeypatch.setattr(tune, "prepare", lambda *given: kept.setdefault("prepared", inner(*given)))
    monkeypatch.setattr(engine, "better", lambda measure, a, b: a > b or measure != "dev_MRR@10")
    finished = finetune(recipe("contrastive", tiny_model("minilm"), 1e-2, measure="MRR@10"), tmp_path / "out")
    report = judge_retrieval(open_encoder(str(finished.folder)), kept["prepared"].dev.data, ["nDCG@10", "MRR@10"])[0]
    for name, value in report.summary.items():
        assert finished.scores["tuned"][f"dev_{name}"] == pytest.approx(value, abs=1e-9)
    base = judge_retrieval(open_encoder(str(tiny_model("minilm"))), kept["prepared"].dev.data, ["nDCG@10"])[0]
    if finished.scores["best_step"]:
        change = finished.scores["difference"]["value"]
        assert change == pytest.approx(report.summary["nDCG@10"] - base.summary["nDCG@10"], abs=1e-9)


def test_where_nothing_was_better_there_is_nothing_to_average(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "better", lambda *scores: False)
    finished = finetune(recipe("contrastive", tiny_model("minilm"), 1e-3), tmp_path / "out")
    assert finished.scores["best_step"] == 0 and "averaging" not in finished.scores
    assert same(weights(finished.folder), weights(tiny_model("minilm")))
    assert finished.scores["difference"] is None and "nothing was gained" in finished.scores["verdict"]


def test_without_merge_there_is_no_average(tiny_model, tmp_path):
    finished = finetune(recipe("contrastive", tiny_model("minilm"), 1e-3, "none"), tmp_path / "out")
    assert "averaging" not in finished.scores
