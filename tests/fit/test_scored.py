"""`finetune(Scored(...))`: similarities come to follow scores, given or drawn; and what is refused."""

import dataclasses
import hashlib
import json
import os
import signal
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import pearsonr, spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses

from conftest import corpus
from embedtune import Loop, UserError, files, finetune, limits, plots, schema, tune
from embedtune.data.pairs import read_scored
from embedtune.encoder.encode import open_encoder
from embedtune.errors import Interrupted
from embedtune.fit import engine
from embedtune.fit.engine import Listener
from embedtune.fit.objectives import scored
from embedtune.judge.similarity import judge_similarity
from embedtune.recipes import Scored

QUICK = {"batch": 16, "lr": 2e-3, "max_tokens": 1024, "precision": "fp32", "log_steps": 1, "eval_steps": 3}
LOOP = {f.name for f in dataclasses.fields(Loop)}
SAME = ("model.safetensors", "recipe.toml", "scores.json", "README.md", "tokenizer.json", "config.json")


@cache
def long_lines(count, seed):
    lines = list(dict.fromkeys(line for line in corpus(9 * count, seed=seed).splitlines() if len(line.split()) > 8))
    assert len(lines) >= 2 * count
    return lines


def graded(count=60, high=1.0, seed=0):
    """Pairs whose score says how many words of the second text are of the first; no two texts are the same."""
    lines = long_lines(count, seed)
    rows = []
    for number in range(count):
        one, other = lines[2 * number].split(), lines[2 * number + 1].split()
        share = number % 5 / 4
        kept = round(0.8 * share * len(one))
        rows.append({"sentence1": " ".join(one), "sentence2": " ".join(one[:kept] + other[: len(one) - kept]),
                     "score": round(high * share, 3)})  # fmt: skip
    return rows


def without_scores(count=60, seed=0):
    return [{k: v for k, v in row.items() if k != "score"} for row in graded(count, seed=seed)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Drawing and waiting for the disk are most of a tiny run's time; both have tests of their own."""
    monkeypatch.setattr(
        plots, "loss_curve", lambda r, stem, title, unit: files.write_bytes(stem.with_suffix(".png"), b"")
    )
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
    """fit(kind, out, train, fields of recipe and loop...) -> Ran."""
    made, inner = [], tune.prepare
    monkeypatch.setattr(tune, "prepare", lambda *given: made.append(inner(*given)) or made[-1])

    def run(kind="minilm", out="out", train=None, resume=False, step=None, **changes):
        loop = Loop(**{**QUICK, **{k: v for k, v in changes.items() if k in LOOP}})
        own = {"train": graded() if train is None else train, "model": str(tiny_model(kind))}
        recipe = Scored(**{**own, **{k: v for k, v in changes.items() if k not in LOOP}}, loop=loop)
        notes = []
        finished = finetune(recipe, tmp_path / out, resume=resume,
                            listener=Listener(notes.append, lambda record, total: step and step(record)))  # fmt: skip
        return Ran(finished.folder, finished.scores, notes, made[-1])

    return run


@pytest.mark.parametrize("loss", ["CoSENTLoss", "AnglELoss", "CosineSimilarityLoss"])
def test_the_loss_falls_on_32_easy_pairs_and_similarities_follow_the_scores(fit, loss):
    ran = fit(train=graded(36), dev=graded(20, seed=3), loss=loss, epochs=9, lr=3e-3, warmup=0.1)
    assert np.mean(ran.losses[-4:]) < 0.8 * np.mean(ran.losses[:4])
    assert ran.scores["tuned"]["dev_spearman"] > ran.scores["baseline"]["dev_spearman"] and ran.scores["best_step"] > 0
    assert ran.scores["difference"]["items"] == 20 and ran.scores["compared"] == "dev_spearman"


STOCK = {
    "CoSENTLoss": losses.CoSENTLoss,
    "AnglELoss": losses.AnglELoss,
    "CosineSimilarityLoss": losses.CosineSimilarityLoss,
    "ContrastiveLoss": losses.ContrastiveLoss,
}


@pytest.mark.filterwarnings("ignore:ContrastiveLoss expects binary labels")
@pytest.mark.parametrize("dims", [(), (32, 16)])
@pytest.mark.parametrize("loss", STOCK)
@pytest.mark.parametrize("budget", [100_000, 60], ids=["one pass", "cached"])
def test_loss_and_gradients_are_those_of_sentence_transformers(fit, tiny_model, loss, dims, budget):
    """Of one batch: the scores reach the loss scaled to 0 to 1, each with its own pair."""
    ran = fit(train=graded(20, high=5.0), dev=graded(9, high=5.0, seed=3), loss=loss, dims=dims, max_steps=1)
    objective, rows = ran.prepared.objective, np.array([7, 2, 11, 4, 19, 0, 9])
    model = objective.model
    model.load_state_dict({**model.state_dict(), **SentenceTransformer(str(tiny_model("minilm"))).state_dict()})
    for module in model.modules():
        if hasattr(module, "noise"):
            module.p = 0.0
    model.zero_grad()
    found = objective.step(0, 0, rows, budget)
    stock = SentenceTransformer(str(tiny_model("minilm")), device="cpu", model_kwargs={"attn_implementation": "eager"})
    stock.eval()
    data = graded(20, high=5.0)
    features = [stock.preprocess([data[row][name] for row in rows]) for name in ("sentence1", "sentence2")]
    made = STOCK[loss](stock)
    made = losses.MatryoshkaLoss(stock, made, list(dims)) if dims else made
    expected = made(features, torch.tensor([data[row]["score"] / 5 for row in rows]))
    expected.backward()
    assert found.loss == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-5)
    ours, theirs = (dict(m.named_parameters()) for m in (model, stock))
    compared = 0
    for name, parameter in theirs.items():
        if parameter.grad is not None and parameter.grad.abs().max() > 0:
            scale = max(1.0, float(parameter.grad.abs().max()))
            assert float((ours[name].grad - parameter.grad).abs().max()) < 1e-5 * scale, name
            compared += 1
    assert compared > 20


@pytest.mark.parametrize("kind", ["minilm", "bert", "modernbert", "roberta", "mpnet"])
def test_stock_code_opens_the_folder_and_gives_the_scores_that_are_told(fit, monkeypatch, kind):
    monkeypatch.setattr(engine, "better", lambda *scores: True)  # the last step is kept
    dev = graded(12, seed=3)
    ran = fit(kind, dev=dev, max_length=40 if kind == "minilm" else None)
    model = SentenceTransformer(str(ran.folder), device="cpu", model_kwargs={"attn_implementation": "eager"})
    vectors = model.encode([row[name] for name in ("sentence1", "sentence2") for row in dev]).astype(float)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines, gold = (vectors[:12] * vectors[12:]).sum(1), np.array([row["score"] for row in dev])
    told = ran.scores["tuned"]
    assert told["dev_spearman"] == pytest.approx(spearmanr(gold, cosines).statistic, abs=1e-6)
    assert told["dev_pearson"] == pytest.approx(pearsonr(gold, cosines).statistic, abs=1e-5)
    assert told["dev_loss"] == pytest.approx(np.mean((gold - cosines) ** 2), abs=1e-5)
    report = judge_similarity(open_encoder(str(ran.folder)), read_scored(dev), "dev")[0]
    assert report.summary["spearman"] == pytest.approx(told["dev_spearman"], abs=1e-6)


@pytest.mark.also_gpu
@pytest.mark.parametrize("changes", [{}, {"merge": "auto", "loss": "AnglELoss", "dims": (32, 8)}])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(fit, changes):
    runs = [fit("bert", out, seed=seed, **changes) for out, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert runs[0].bits == runs[1].bits and runs[0].log == runs[1].log != runs[2].log


@pytest.mark.also_gpu
def test_the_recipe_that_is_left_repeats_the_run(fit, tmp_path):
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in graded(60, high=5.0)))
    first = fit(train=str(path), lr=None, max_tokens=None, eval_steps=None, log_steps=None, dims=(16,), merge="auto")
    stored = first.folder / "recipe.toml"
    again = schema.from_table(Scored, schema.read_toml(stored), str(stored))
    assert limits.problems(again) == [] and (again.low, again.high, again.dims) == (0.0, 5.0, (16,))
    finished = finetune(again, tmp_path / "second")
    for name in SAME:
        assert (finished.folder / name).read_bytes() == (first.folder / name).read_bytes(), name


@pytest.mark.also_gpu
def test_a_stopped_run_ends_as_one_that_was_not(fit):
    options = {"epochs": 2, "checkpoint_steps": 2, "merge": "auto"}
    whole = fit(out="whole", **options)
    for kind, resumed_at in (("signal", 5), ("raise", 4)):

        def step(record, kind=kind):
            if "loss" in record and record["step"] == 5:
                if kind == "raise":
                    raise KeyboardInterrupt
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(Interrupted if kind == "signal" else KeyboardInterrupt):
            fit(out=kind, step=step, **options)
        if kind == "raise":
            with pytest.raises(UserError, match=r"recipe: pseudo_mean = 0.5 \(was 0.9\)"):
                fit(out=kind, resume=True, pseudo_mean=0.5, **options)
            with pytest.raises(UserError, match="training data: "):
                fit(out=kind, resume=True, train=graded(61), **options)
        resumed = fit(out=kind, resume=True, **options)
        assert resumed.said(f"resumed at step {resumed_at} of 8")
        assert resumed.bits == whole.bits and resumed.log == whole.log


# ---- scores: their scale, and those that are drawn


@pytest.mark.parametrize(
    "values, scale",
    [
        ([0, 0.5, 1], (0, 1)),
        ([-0.2, 0.5, 1], (-1, 1)),
        ([0, 3, 5], (0, 5)),
        ([1, 4.8, 2], (0, 5)),
        ([0, 7], (0, 10)),
        ([11, 90], (0, 100)),
    ],
)
def test_the_scale_is_the_first_known_one_that_holds_the_scores(values, scale):
    pairs = list(read_scored([{"sentence1": "a", "sentence2": "b", "score": v} for v in values]))
    assert scored._range(pairs, None, None) == scale
    low, high = scale
    expected = [v if low < 0 else (v - low) / (high - low) for v in values]
    assert [scored._scaled(pair.score, low, high) for pair in pairs] == pytest.approx(expected)
    assert scored._range(pairs, -200.0, 200.0) == (-200, 200)


def test_a_scale_of_your_own(fit):
    rows = [row | {"score": row["score"] * 300 - 100} for row in graded(40)]
    ran = fit(train=rows, low=-400, high=200, max_steps=1)
    assert set(ran.prepared.dev.gold.tolist()) <= {-0.25, -0.0625, 0.125, 0.3125, 0.5}
    ran = fit(out="two", train=[row | {"score": row["score"] + 1} for row in graded(40)], low=1, high=3, max_steps=1)
    assert set(ran.prepared.dev.gold.tolist()) <= {0, 0.125, 0.25, 0.375, 0.5}


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"train": [r | {"score": 100 * r["score"] + 5} for r in graded()]}, "scores run from 5 to 105, on no scale"),
        ({"train": [r | {"score": -5 * r["score"]} for r in graded()]}, "say the scale with --low and --high"),
        ({"low": 0.0, "high": 0.6}, "24 of 60 scores lie outside of 0 to 0.6"),
        ({"train": graded(60, high=5.0), "high": 4.0, "low": 0.0}, "row 5: 5, row 10: 5, row 15: 5, ..."),
        ({"low": 0.5, "high": 0.5}, "low must lie below high"),
        ({"low": float("-inf"), "high": 1.0}, "low must lie below high"),
        ({"train": [r | {"score": 0.5} for r in graded()]}, "all 60 scores are 0.5: there is nothing to learn"),
        ({"dev": graded(9, high=5.0, seed=3), "high": 1.0, "low": 0.0}, "scores lie outside of 0 to 1"),
        ({"train": [r | {"score": "good"} for r in graded(40)]}, "40 x the score is no finite number"),
        ({"train": [*graded(40), graded(1, seed=9)[0] | {"score": "nan"}]}, "no finite number (1): item 41"),
        ({"train": [*graded(40), *without_scores(3, seed=9)]}, "the score is no finite number (3): item 41"),
        ({"train": [*without_scores(3, seed=9), *graded(40)]}, "3 of 43 pairs have no score, the others have one"),
        ({"dev": without_scores(9, seed=3)}, "has pairs without a score: there is nothing to score on"),
        ({"dev": graded(2, seed=3)}, "2 pair(s) to score on"),
        ({"train": graded(20)}, "2 pair(s) to score on, of 20: a correlation needs 3"),
        ({"train": graded(7)}, "has 7 pair(s): too few to learn from"),
        ({"dims": (33,)}, "--dims: 33 dimensions are more than the model's 32"),
        ({"loss": "CosentLoss"}, "did you mean 'CoSENTLoss'?"),
        ({"loss": "TripletLoss"}, "TripletLoss does not take rows of 2 texts and a score"),
        ({"loss": "MultipleNegativesRankingLoss"}, "MultipleNegativesRankingLoss does not read scores"),
        ({"loss": "SoftmaxLoss"}, "SoftmaxLoss cannot be made from a model alone"),
        ({"loss": "MarginMSELoss"}, "MarginMSELoss does not take rows of 2 texts and a score"),
        ({"loss": "MSELoss"}, "MSELoss does not take rows of 2 texts and a score"),
        ({"loss": "BatchHardTripletLoss"}, "BatchHardTripletLoss does not look at all of 2 texts and a score"),
        ({"measure": "speerman"}, "(did you mean 'dev_spearman'?); there are dev_loss, dev_spearman, dev_pearson"),
        ({"batch": 1}, "batch must be at least 2"),
        ({"pseudo_mean": 1.5}, "pseudo_mean must lie between -1 and 1"),
        ({"pseudo_spread": -0.1}, "pseudo_spread must lie between 0 and 1"),
        ({"train": without_scores(), "pseudo_spread": 0.0}, "all 60 scores are 0.9"),
    ],
)  # fmt: skip
def test_mistakes_are_said_before_anything_is_learned(fit, tmp_path, changes, says):
    with pytest.raises(UserError) as caught:
        fit(**changes)
    assert says in str(caught.value), caught.value
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_leaks_either_way_round(fit, tmp_path):
    rows, dev = graded(40), graded(9, seed=3)
    turned = {"sentence1": rows[0]["sentence2"], "sentence2": rows[0]["sentence1"], "score": 0.2}
    with pytest.raises(UserError) as caught:
        fit(train=rows, dev=[*dev, rows[1], turned])
    assert "2 of 11 dev pairs stand in the training data too, 0 nearly" in str(caught.value)
    ran = fit(train=rows, dev=[*dev, rows[1], turned], allow_leaks=True, max_steps=1)
    assert ran.said("2 of 11 dev pairs stand in the training data too, 0 nearly: their scores flatter")
    assert len(ran.prepared.objective.columns) == 40 and len(ran.prepared.dev.pairs) == 11


def test_dev_rows_of_your_own_are_bounded_and_rows_left_out_are_said(fit):
    dev = [{"s1": row["sentence1"], "s2": row["sentence2"], "label": row["score"]} for row in graded(12, seed=3)]
    ran = fit(dev=[*dev, {"s1": "a", "s2": "b", "label": "?"}], dev_rows=5, bad_rows="skip", max_steps=1)
    assert ran.said("scored on the first 5 of 12 dev pairs") and len(ran.prepared.dev.pairs) == 5
    assert ran.said("took the column 'label' as 'score'") and ran.said("1 rows left out: the score is no finite number")


def test_pseudo_scores_are_drawn_around_their_mean(fit):
    rows = without_scores(400)
    ran = fit(train=rows, max_steps=1, pseudo_mean=0.7, pseudo_spread=0.05)
    labels = np.array(
        [p.score for p in scored._with_scores(list(read_scored(rows)), Scored(pseudo_mean=0.7, pseudo_spread=0.05), [])]
    )
    assert labels.mean() == pytest.approx(0.7, abs=0.01) and labels.std() == pytest.approx(0.05, abs=0.006)
    assert ran.prepared.profile["score_mean"] == pytest.approx(0.7, abs=0.01)
    (note,) = ran.said("pseudo-scores around 0.7 (standard deviation 0.05) were drawn")
    assert "dev measures mean little" in note and "embedtune fit contrastive" in note
    assert note in (ran.folder / "README.md").read_text()
    default = fit(out="default", train=rows, max_steps=1)
    assert default.prepared.profile["score_mean"] == pytest.approx(0.9, abs=0.005)
    assert np.abs(default.prepared.dev.gold).max() <= 1


def test_pseudo_scores_are_keyed_by_the_seed(fit):
    rows = list(read_scored(without_scores(50)))

    def drawn(seed, **options):
        found = scored._with_scores(rows, Scored(**options, loop=Loop(seed=seed)), [])
        return [pair.score for pair in found]

    assert drawn(1) == drawn(1) != drawn(2)
    assert all(-1 <= score <= 1 for score in drawn(1, pseudo_mean=0.95, pseudo_spread=0.5))
    runs = [fit(out=out, train=without_scores(), seed=seed) for out, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert runs[0].bits == runs[1].bits and runs[0].log != runs[2].log


def test_pseudo_scores_with_real_ones_to_score_on(fit):
    """The drawn ones are cosines; the real ones have a scale of their own."""
    ran = fit(train=without_scores(), dev=graded(12, high=5.0, seed=3), max_steps=2)
    assert sorted(set(ran.prepared.dev.gold.tolist())) == [0, 0.25, 0.5, 0.75, 1]
    assert ran.prepared.profile["score_mean"] == pytest.approx(0.9, abs=0.02)


def test_the_models_own_prompt_stands_before_both_sides(fit, tiny_model, tmp_path):
    model = SentenceTransformer(str(tiny_model("minilm")), prompts={"text": "fima: "}, default_prompt_name="text")
    model.save(str(tmp_path / "prompted"))
    prompted = fit(model=str(tmp_path / "prompted"), max_steps=2)
    rows = [{**r, "sentence1": "fima: " + r["sentence1"], "sentence2": "fima: " + r["sentence2"]} for r in graded()]
    by_hand = fit(out="hand", train=rows, max_steps=2)
    assert prompted.losses == by_hand.losses != fit(out="plain", max_steps=2).losses
    assert (
        json.loads((prompted.folder / "config_sentence_transformers.json").read_text())["default_prompt_name"] == "text"
    )


def test_bf16_runs_and_keeps_float32_masters(fit):
    ran = fit("bert", precision="bf16", epochs=4, merge="auto", dev=graded(20, seed=3))
    assert np.mean(ran.losses[-4:]) < np.mean(ran.losses[:4])
    moved = load_file(ran.folder / "model.safetensors")["encoder.layer.0.attention.self.query.weight"]
    assert moved.dtype == torch.float32 and not torch.equal(moved, moved.bfloat16().float())


def test_a_batch_larger_than_the_data_and_rows_once_an_epoch(fit):
    ran = fit(train=graded(40), batch=500, epochs=3)
    assert len(ran.losses) == 3
    seen = []
    for step in range(6):
        seen += ran.prepared.objective.rows(step, 500, 0)[1].tolist()
    assert sorted(seen) == sorted(list(range(len(ran.prepared.objective.columns))) * 6)
