"""`finetune(Contrastive(...))` from pairs to folder: it learns, repeats to the bit, and stock code opens the result."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from conftest import corpus
from embedtune import Eraser, Loop, UserError, files, finetune, limits, plots, schema, tune
from embedtune.errors import Interrupted
from embedtune.fit import engine, ranking
from embedtune.fit.engine import Listener
from embedtune.fit.objectives import contrastive
from embedtune.fit.objectives.contrastive import MaskedRanking, held_out
from embedtune.fit.objectives.texts import ANCHOR, DOCUMENT, Texts
from embedtune.recipes import Contrastive, Ranking

QUICK = {"batch": 16, "lr": 2e-3, "max_tokens": 1024, "precision": "fp32", "log_steps": 1, "eval_steps": 3}
NAMES = {kind: {f.name for f in dataclasses.fields(kind)} for kind in (Loop, Ranking)}
SAME = ("model.safetensors", "recipe.toml", "scores.json", "README.md", "tokenizer.json", "config.json")


@cache
def long_lines(count, seed):
    lines = [words for line in corpus(12 * count, seed=seed).splitlines() if len(words := line.split()) > 8]
    assert len(lines) > 2 * count
    return lines


def easy(count=60, negatives=0, seed=0):
    """Pairs that can be learned: the two halves of a line, whose words follow each other."""
    lines = long_lines(count, seed)
    rows = []
    for number, words in enumerate(lines[:count]):
        row = {"anchor": " ".join(words[: len(words) // 2]), "positive": " ".join(words[len(words) // 2 :])}
        others = [lines[count + (number * negatives + n) % count] for n in range(negatives)]
        rows.append(row | {f"negative_{n + 1}": " ".join(other) for n, other in enumerate(others)})
    return rows


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Drawing and waiting for the disk are most of a tiny run's time; both have tests of their own."""
    monkeypatch.setattr(
        plots, "loss_curve", lambda r, stem, title, unit: files.write_bytes(stem.with_suffix(".png"), b"")
    )
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@dataclasses.dataclass
class Ran:
    """A run that ended: what it left, said and logged, and what it was prepared from."""

    folder: object
    scores: dict
    notes: list
    prepared: object
    texts: list  # (role, text) by number

    @property
    def log(self):
        return [{k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")}
                for record in engine.read_log(self.folder)]  # fmt: skip

    @property
    def bits(self):
        return {name: hashlib.sha256((self.folder / name).read_bytes()).hexdigest() for name in SAME}

    @property
    def config(self):
        return json.loads((self.folder / "config_sentence_transformers.json").read_text())

    def said(self, words):
        return [note for note in self.notes if words in note]


@pytest.fixture
def fit(tiny_model, tmp_path, monkeypatch):
    """fit(kind, out, train, fields of recipe, ranking and loop...) -> Ran."""
    made, texts, inner = [], [], tune.prepare
    monkeypatch.setattr(tune, "prepare", lambda *given: made.append(inner(*given)) or made[-1])
    monkeypatch.setattr(contrastive, "Texts", lambda: texts.append(Texts()) or texts[-1])

    def run(kind="minilm", out="out", train=None, resume=False, step=None, note=None, force=False, **changes):
        loop = Loop(**{**QUICK, **{k: v for k, v in changes.items() if k in NAMES[Loop]}})
        options = Ranking(**{k: v for k, v in changes.items() if k in NAMES[Ranking]})
        own = {k: v for k, v in changes.items() if k not in NAMES[Loop] | NAMES[Ranking]}
        recipe = Contrastive(**{"train": train if train is not None else easy(), "model": str(tiny_model(kind)),
                                **own}, ranking=options, loop=loop)  # fmt: skip
        notes = []

        def listen(text):
            notes.append(text)
            if note:
                note(text)

        finished = finetune(recipe, tmp_path / out, resume=resume, force=force,
                            listener=Listener(listen, lambda record, total: step and step(record)))  # fmt: skip
        return Ran(finished.folder, finished.scores, notes, made[-1] if made else None, list(texts[-1].numbers))

    return run


def weights(folder):
    return load_file(folder / "model.safetensors")


# ---- it learns, and what is left is what was scored


def test_the_loss_falls_on_32_easy_pairs(fit):
    ran = fit(train=easy(36), epochs=12, lr=3e-3, measure="loss", warmup=0.1)
    losses = [record["loss"] for record in ran.log if "loss" in record]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) / 2
    assert ran.scores["best_step"] > 0 and ran.scores["tuned"]["dev_loss"] < ran.scores["baseline"]["dev_loss"]


KINDS = ("minilm", "bert", "modernbert", "roberta", "mpnet")
ODD = ["  two spaces before", "and after \t", "UPPER Case", "漢字 ☃ 🙂", "\nline\nends\n", "x"]
ENCODE = """
import json, sys, numpy as np, torch
torch.set_num_threads(1)
from sentence_transformers import SentenceTransformer
for folder, texts, out in json.load(sys.stdin):
    model = SentenceTransformer(folder, device="cpu")
    assert type(model[0].model).__module__.startswith("transformers."), type(model[0].model)
    np.savez(out, query=model.encode_query(texts["query"]), document=model.encode_document(texts["document"]),
             length=model.max_seq_length)
assert "embedtune" not in sys.modules
"""


def elsewhere(jobs):
    """Vectors by stock sentence-transformers in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-c", ENCODE], input=json.dumps(jobs), text=True, env=environment,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [np.load(out, allow_pickle=False) for _, _, out in jobs]


def test_stock_code_opens_every_folder_and_gives_the_vectors_that_were_scored(fit, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "better", lambda *scores: True)  # the last step is kept
    rows = easy(40)
    for number, odd in enumerate(ODD):
        rows[number]["anchor"] += odd
        rows[number + 10]["positive"] = odd + rows[number + 10]["positive"]
    rows[7]["positive"] = " ".join(corpus(60).split())  # far longer than is read
    runs, numbers, jobs = {}, {}, []
    for kind in KINDS:
        ran = runs[kind] = fit(kind, kind, train=rows, max_length=48 if kind == "bert" else None,
                               query_prompt="fi: " if kind in ("minilm", "roberta") else None)  # fmt: skip
        numbers[kind] = {role: [n for n, (r, _) in enumerate(ran.texts) if r == role] for role in (ANCHOR, DOCUMENT)}
        texts = {role: [ran.texts[n][1] for n in found] for role, found in numbers[kind].items()}
        jobs.append((str(ran.folder), texts, str(tmp_path / f"{kind}.npz")))
    for (kind, ran), found in zip(runs.items(), elsewhere(jobs)):
        for role, rows in numbers[kind].items():
            gap = np.abs(ran.prepared.objective.vectors(np.array(rows)) - found[role]).max()
            assert gap < 2e-5, (kind, role)
        assert found["length"] == ran.prepared.max_length == {"bert": 48, "minilm": 96}.get(kind, 128)
        assert bool(ran.said("runs padded")) == (kind == "mpnet")
        assert ran.said(f"1 of {len(ran.texts)} texts are longer than {ran.prepared.max_length} tokens: cut to them")
        before, after = weights(tiny_model(kind)), weights(ran.folder)
        shared = {n: next((m for m in after if m.endswith(n) or n.endswith(m)), None) for n in before}
        assert sum(m is not None and not torch.equal(before[n], after[m]) for n, m in shared.items()) > 10
        assert all(tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in after.values())
        left = {path.name for path in ran.folder.iterdir()}
        assert left >= {"modules.json", "README.md", "run.json", "scores.json", "recipe.toml", "log.jsonl", "loss.png"}
        assert not left & {"checkpoints", "data", "start.json"} and not [n for n in left if n.endswith(".tmp")]


def test_training_may_read_less_of_a_text_than_the_saved_model(fit):
    rows = [row | {"positive": row["positive"] + " and then" * 30} for row in easy()]
    full, cut, less = (
        fit(out=name, train=rows, max_steps=2, eval_steps=1, **given)
        for name, given in (("full", {}), ("cut", {"max_length": 12}), ("less", {"train_length": 12}))
    )
    losses = [[r["loss"] for r in ran.log if "loss" in r] for ran in (full, cut, less)]
    assert losses[2] == losses[1] != losses[0], "trained on the beginnings"
    assert less.log[0]["dev_loss"] == full.log[0]["dev_loss"] != cut.log[0]["dev_loss"], "scored on all"
    assert SentenceTransformer(str(less.folder), device="cpu").max_seq_length == 96
    assert less.said("training reads the first 12 tokens of a text") and less.said("the saved model read 96")
    assert schema.read_toml(less.folder / "recipe.toml")["train_length"] == 12


def test_prompts_are_the_models_own_unless_given_and_are_saved(fit, tiny_model, tmp_path):
    given = fit(out="given", max_steps=2, query_prompt="ask: ", document_prompt="")
    assert (given.config["prompts"]["query"], given.config["prompts"]["document"]) == ("ask: ", "")
    assert given.said("prompts: 'ask: ' before anchors, '' before the other texts")
    own = fit(out="own", model=str(given.folder), max_steps=2)
    assert own.config["prompts"] == given.config["prompts"] and own.said("prompts: 'ask: ' before anchors")
    stored = schema.read_toml(own.folder / "recipe.toml")
    assert (stored["query_prompt"], stored["document_prompt"]) == ("ask: ", "")
    plain = fit(out="plain", max_steps=2)
    assert not plain.said("prompts:") and plain.log != given.log
    # A prompt is a text like any other: putting it before the anchors by hand trains the same.
    rows = [row | {"anchor": "ask: " + row["anchor"]} for row in easy()]
    by_hand = fit(out="hand", train=rows, max_steps=2)
    assert [r.get("loss") for r in by_hand.log] == [r.get("loss") for r in given.log]


# ---- it repeats


@pytest.mark.also_gpu
@pytest.mark.parametrize("kind, changes", [("minilm", {}), ("mpnet", {}), ("bert", {"guide": "base", "merge": "auto"})])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(fit, kind, changes):
    runs = [fit(kind, out, seed=seed, train=easy(60, 1), **changes) for out, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert runs[0].bits == runs[1].bits and runs[0].log == runs[1].log
    assert runs[0].log != runs[2].log and runs[0].bits["recipe.toml"] != runs[2].bits["recipe.toml"]


@pytest.mark.also_gpu
def test_the_recipe_that_is_left_repeats_the_run(fit, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in easy(60, 1)))
    first = fit(train=str(path), measure=None, lr=None, max_tokens=None, eval_steps=None, log_steps=None, dims=(32, 8),
                guide="base", guide_margin=0.1, merge="auto", query_prompt="q: ")  # fmt: skip
    stored = first.folder / "recipe.toml"
    again = schema.from_table(Contrastive, schema.read_toml(stored), str(stored))
    assert limits.problems(again) == []
    for part in (again.loop, again.ranking, again):
        unset = {f.name for f in dataclasses.fields(part) if getattr(part, f.name) is None}
        optional = "max_steps minutes patience checkpoint_steps dev columns guide train_length"
        assert unset <= set(optional.split())
    assert again.ranking.dims == (32, 8) and again.ranking.guide == "base"
    finished = finetune(again, tmp_path / "second")
    for name in SAME:
        assert (finished.folder / name).read_bytes() == (first.folder / name).read_bytes(), name


def test_dims_given_as_a_list_are_written_as_numbers():
    written = schema.to_toml(Contrastive(train=easy(3), ranking=Ranking(dims=[16, 8])))
    assert "dims = [16, 8]" in written and 'train = "<3 rows given in Python>"' in written


# ---- it can be stopped


def stop(kind, number):
    def step(record):
        if "loss" in record and record["step"] == number:
            if kind == "term":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                raise KeyboardInterrupt

    return step


def stop_averaging(text):
    if text.startswith("averaged 0.5"):
        raise KeyboardInterrupt


RESUMED = {"train": easy(50, 2), "epochs": 2, "checkpoint_steps": 2, "merge": "auto", "measure": "loss"}


@pytest.mark.also_gpu
def test_a_stopped_run_ends_as_one_that_was_not(fit):
    """By a signal, by an exception between two checkpoints and before the first, and while it averages."""
    whole = fit(out="whole", **RESUMED)
    for kind, number, resumed_at in (("term", 3, 3), ("raise", 3, 2), ("raise", 1, None), ("averaging", None, 6)):
        how = {"note": stop_averaging} if kind == "averaging" else {"step": stop(kind, number)}
        with pytest.raises(Interrupted if kind == "term" else KeyboardInterrupt):
            fit(out=f"{kind}-{number}", **how, **RESUMED)
        resumed = fit(out=f"{kind}-{number}", resume=resumed_at is not None, **RESUMED)
        assert bool(resumed.said(f"resumed at step {resumed_at} of 6")) == (resumed_at is not None)
        assert resumed.bits == whole.bits and resumed.log == whole.log, kind


def test_what_changed_is_named_and_refused(fit, tiny_model):
    with pytest.raises(Interrupted):
        fit(out="cut", step=stop("term", 3), **RESUMED)
    other = [*RESUMED["train"][:-1], RESUMED["train"][0]]
    for changes, says in [
        ({"train": other}, ["1 thing(s)", "training data: "]),
        ({"scale": 30.0}, ["1 thing(s)", "recipe: scale = 30.0 (was not set)"]),
        ({"merge": "none", "symmetric": True}, ["2 thing(s)", 'merge = "none" (was "auto")', "symmetric = true"]),
        ({"dev": easy(20, seed=4)}, ["dev data: "]),
        ({"kind": "bert"}, ["model weights: "]),
    ]:
        with pytest.raises(UserError) as caught:
            fit(**{"out": "cut", "resume": True, **RESUMED, **changes})
        assert all(words in str(caught.value) for words in says), caught.value
    assert fit(out="cut", resume=True, **RESUMED).said("resumed at step 3")


def test_another_guide_of_the_same_name_is_refused(fit, tiny_model, tmp_path):
    guide = tmp_path / "guide"
    shutil.copytree(tiny_model("minilm"), guide)
    with pytest.raises(Interrupted):
        fit(out="cut", step=stop("term", 3), guide=str(guide), **RESUMED)
    tensors = weights(guide)
    tensors["embeddings.word_embeddings.weight"] += 0.1
    save_file(tensors, guide / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="guide vectors: "):
        fit(out="cut", resume=True, guide=str(guide), **RESUMED)


# ---- length

LENGTH = {"train": easy(60, 1), "epochs": 4, "lr": 3e-3, "length_penalty": 30.0, "like_lengths": True}


def length_covariance(folder, texts):
    """|Cov(vectors, log tokens)| of stock vectors of the texts, tokens in standard deviations."""
    model = SentenceTransformer(str(folder), device="cpu")
    y = model.encode(texts)
    log = np.log([len(ids) for ids in model.tokenizer(texts, truncation=True)["input_ids"]])
    return float(np.linalg.norm((y - y.mean(0)).T @ ((log - log.mean()) / log.std()) / len(y)))


def test_the_penalty_lowers_the_covariance_with_length_and_the_closed_form_ends_it(fit, monkeypatch):
    monkeypatch.setattr(engine, "better", lambda *scores: True)
    plain = fit(out="plain", **{**LENGTH, "length_penalty": 0.0})
    ran = fit(out="penalty", **LENGTH)
    texts = [ran.texts[n][1] for n in np.unique(ran.prepared.objective.columns) if n >= 0]
    left, without = (length_covariance(folder, texts) for folder in (ran.folder, plain.folder))
    model = SentenceTransformer(str(ran.folder), device="cpu")
    del model[-2]  # the eraser, a Dense of its own
    model.save(str(ran.folder.parent / "trained"))
    trained = length_covariance(ran.folder.parent / "trained", texts)
    # The tiny model's vectors point one way, where the closed form stops short of zero.
    assert 5 * left < trained < without / 2, (left, trained, without)
    assert Eraser.load(ran.folder).about["n_fit"] == len(texts)
    found = ran.scores
    assert found["before_erasure"] != found["tuned"] and "linear R2" in found["erasure"][0]
    assert found["erasure"][0] in (ran.folder / "README.md").read_text()


@pytest.mark.also_gpu
def test_with_the_penalty_a_stopped_run_ends_as_one_that_was_not(fit):
    how = {**LENGTH, "epochs": 2, "checkpoint_steps": 2, "measure": "loss"}
    whole = fit(out="whole", **how)
    with pytest.raises(Interrupted):
        fit(out="cut", step=stop("term", 3), **how)
    resumed = fit(out="cut", resume=True, **how)
    assert resumed.bits["model.safetensors"] == whole.bits["model.safetensors"] and resumed.log == whole.log
    assert (resumed.folder / "erasure.safetensors").read_bytes() == (whole.folder / "erasure.safetensors").read_bytes()


def test_a_penalty_that_is_no_weight_is_refused(fit):
    with pytest.raises(UserError, match="length_penalty must not be negative"):
        fit(length_penalty=-1.0)


# ---- what it learns from, and what it is scored on


def test_what_is_held_out_shares_no_text_with_what_is_learned(fit):
    rows = easy(60)
    for number in range(0, 20, 2):
        rows[number + 1]["positive"] = rows[number]["positive"]
    ran = fit(train=rows, max_steps=1)
    dev, table = ran.prepared.dev, ran.prepared.objective.columns
    texts = [text for _, text in ran.texts]
    learned = {texts[n] for n in table[:, :2].ravel()}
    judged = {dev.data.corpus[d] for q in dev.data.qrels.values() for d in q} | set(dev.data.queries.values())
    assert not learned & judged
    assert len(table) + sum(map(len, dev.data.qrels.values())) >= 58
    assert ran.said(f"held out {60 - len(table)} of 60 pairs, in whole groups")
    # All else there is fills the texts to search in, once each.
    assert len(set(dev.data.corpus.values())) == len(dev.data.corpus)
    assert set(dev.data.corpus.values()) == judged - set(dev.data.queries.values()) | {texts[n] for n in table[:, 1]}
    assert ran.said(f"scored on {len(dev.data.queries)} queries, searching {len(dev.data.corpus)} texts")
    assert [texts[n] for n in dev.queries] == list(dev.data.queries.values())
    assert [texts[n] for n in dev.corpus] == list(dev.data.corpus.values())


def test_held_out_groups_are_whole_and_drawn_by_the_seed():
    groups = np.repeat(np.arange(40), np.random.default_rng(0).integers(1, 5, 40))
    drawn = [held_out(groups, 20, seed) for seed in range(30)]
    for held in drawn:
        assert all(len(set(held[groups == g])) == 1 for g in range(40)) and 20 <= held.sum() <= 23
    assert len({tuple(held) for held in drawn}) > 25
    assert not held_out(np.zeros(50, int), 5, 0).any(), "a group larger than what is wanted is never taken"
    assert held_out(np.arange(10), 0, 0).sum() == 0


def test_rows_of_your_own_to_score_on(fit, tmp_path):
    dev = [{"question": row["anchor"], "answer": row["positive"]} for row in easy(20, seed=5)]
    ran = fit(dev=[*dev, {"question": "no answer", "answer": ""}], bad_rows="skip", dev_rows=6, max_steps=2)
    assert len(ran.prepared.objective.columns) == 60 and len(ran.prepared.dev.queries) == 6
    assert ran.said("took the column 'question' as 'anchor'") and ran.said("1 rows left out: column 'answer' is empty")
    assert ran.said("scored on 6 queries, searching 80 texts; 14 left out")


def test_leaks_are_refused_with_their_count_and_allowed_by_name(fit, tmp_path):
    rows = easy(60)
    dev = [*rows[:3], rows[3] | {"anchor": rows[3]["anchor"].upper()}, *easy(10, seed=5)]
    with pytest.raises(UserError) as caught:
        fit(train=rows, dev=dev)
    assert "4 of 14 dev anchors stand in the training data too, 0 nearly" in str(caught.value)
    assert "text 1 of dev is text 1 of train" in str(caught.value) and "--allow-leaks" in caught.value.fix
    assert not list(tmp_path.iterdir())
    ran = fit(train=rows, dev=dev, allow_leaks=True, max_steps=1)
    assert ran.said("4 of 14 dev anchors stand in the training data too, 0 nearly: their scores flatter")
    assert ran.said("4 texts to search in are also positives in training")
    # Another anchor of a known positive is usual: it is said, and no error.
    ran = fit(
        train=rows,
        out="shared",
        dev=[d | {"positive": r["positive"]} for d, r in zip(easy(9, seed=5), rows)],
        max_steps=1,
    )
    assert ran.said("9 texts to search in are also positives in training")


@pytest.fixture
def beir(tmp_path):
    """A BEIR folder with train, dev and test, of 30 pairs each."""
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    rows = easy(90)
    write = lambda name, lines: (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))  # noqa: E731
    write("corpus.jsonl", [{"_id": f"d{n}", "text": row["positive"]} for n, row in enumerate(rows)])
    write("queries.jsonl", [{"_id": f"q{n}", "text": row["anchor"]} for n, row in enumerate(rows)])
    for number, split in enumerate(("train", "dev", "test")):
        lines = [f"q{n}\td{n}\t1" for n in range(30 * number, 30 * number + 30)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    return folder


def test_beir_folders_train_on_train_and_score_on_the_split_that_is_named(fit, beir):
    ran = fit(train=str(beir), dev=f"{beir}:dev", max_steps=2)
    assert len(ran.prepared.objective.columns) == 30 and list(ran.prepared.dev.data.queries) == [
        f"q{n}" for n in range(30, 60)
    ]
    assert len(ran.prepared.dev.data.corpus) == 90
    with pytest.raises(UserError, match="judgements for dev, test, train, and none was chosen"):
        fit(out="two", train=str(beir), dev=str(beir))
    (beir / "qrels" / "dev.tsv").unlink()
    lines = [line for n, line in enumerate((beir / "queries.jsonl").read_text().splitlines()) if not 30 <= n < 60]
    (beir / "queries.jsonl").write_text("\n".join(lines) + "\n")
    ran = fit(out="one", train=str(beir), dev=str(beir), max_steps=2)
    assert set(ran.prepared.dev.data.queries) == {f"q{n}" for n in range(60, 90)}


def test_pairs_that_meet_their_like_in_every_batch_are_said(fit):
    words = ["ba", "be", "bi", "bo", "bu", "da", "de", "di", "do", "du"]
    rows = easy(40) + [{"anchor": f"{word} {word}", "positive": "mabu lado kide"} for word in words]
    dev = easy(9, seed=5)
    ran = fit(train=rows, dev=dev, epochs=2)
    # 50 pairs make 4 batches of 16; ten of them share a positive.
    assert ran.said("6 of 50 pairs are left out of the first epoch")
    assert any("left out of the first epoch" in line for line in (ran.folder / "README.md").read_text().splitlines())
    assert not fit(out="all", train=rows, dev=dev, duplicates=True, epochs=2).said("left out of")


# ---- mistakes


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"train": easy(7)}, "has 7 pair(s): too few to learn from"),
        ({"train": easy(15)}, "too few of the 15 pairs can be held out for scoring"),
        ({"train": [r | {"positive": "yes"} for r in easy(20)]}, "has one distinct positive for all anchors"),
        ({"train": [r | {"anchor": "why"} for r in easy(40)]}, "too few of the 40 pairs can be held out for scoring"),
        (
            {"train": [{"anchor": f"q {n}", "positive": "" if n % 2 else "p"} for n in range(20)]},
            "10 of 20 rows cannot be used",
        ),
        ({"dev": easy(1, seed=5)}, "1 anchor to score on: an interval needs at least two"),
        ({"dev_rows": 1}, "too few of the 60 pairs can be held out"),
        ({"dims": (64, 32)}, "--dims: 64 dimensions are more than the model's 32"),
        ({"loss": "MultipleNegativeRankingLoss"}, "did you mean 'MultipleNegativesRankingLoss'?"),
        ({"loss": "TripletLoss"}, "TripletLoss does not take rows of 2 texts"),
        ({"loss": "CoSENTLoss"}, "CoSENTLoss learns from scores or labels, which pairs do not have"),
        ({"loss": "BatchHardTripletLoss"}, "learns from scores or labels"),
        ({"loss": "SoftmaxLoss"}, "SoftmaxLoss cannot be made from a model alone"),
        ({"loss": "MegaBatchMarginLoss", "symmetric": True}, "--symmetric: is for MultipleNegativesRankingLoss only"),
        ({"loss": "MegaBatchMarginLoss", "guide": "base"}, "--guide: is for MultipleNegativesRankingLoss only"),
        ({"guide": "./nowhere"}, "is not a model folder"),
        ({"measure": "nDCG@5"}, "there is no dev measure 'nDCG@5'; there are dev_loss, dev_nDCG@10, dev_MRR@10"),
        ({"train_length": 200}, "--train-length: 200 tokens are more than the 96 that the model reads"),
        ({"train_length": 2}, "train_length must be at least 3, not 2"),
        ({"max_length": 500}, "500 tokens are more than the 128 positions of the model"),
        ({"columns": "anchor=nothing"}, "no column 'nothing'"),
        ({"model": "./nowhere"}, "./nowhere: is not a model folder"),
    ],
)
def test_mistakes_are_said_before_anything_is_learned(fit, tmp_path, changes, says):
    with pytest.raises(UserError) as caught:
        fit(**changes)
    assert says in str(caught.value)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize(
    "recipe, says",
    [
        (Contrastive(), "no training data is named"),
        (Contrastive(train="x", loop=Loop(batch=1)), "batch must be at least 2"),
        (Contrastive(train="x", ranking=Ranking(dims=(8, 8))), "dims must differ"),
        (Contrastive(train="x", ranking=Ranking(dims=(0,))), "dims must be positive"),
        (Contrastive(train="x", ranking=Ranking(scale=0.0)), "scale must be positive"),
        (Contrastive(train="x", ranking=Ranking(similarity="euclid")), "similarity must be one of cosine, dot"),
        (Contrastive(train="x", ranking=Ranking(guide_margin=-0.1)), "guide_margin must lie between 0 and 2"),
        (Contrastive(train="x", merge="yes"), "merge must be one of none, auto"),
        (Contrastive(train="x", dev_corpus=0), "dev_corpus must be at least 1"),
        (Contrastive(train="x", ranking=Loop()), "ranking must be a Ranking"),
    ],
)
def test_values_that_cannot_be(recipe, says, tmp_path):
    with pytest.raises(UserError) as caught:
        finetune(recipe, tmp_path / "out")
    assert says in str(caught.value) and not list(tmp_path.iterdir())


# ---- losses


@pytest.mark.parametrize("name", ["dev_recall@10", "accuracy@1", "ndcg@10", "Loss"])
def test_the_measure_that_chooses_is_any_dev_measure(name):
    known = ["dev_loss", "dev_nDCG@10", "dev_MRR@10", "dev_recall@10", "dev_accuracy@1"]
    prepared = SimpleNamespace(objective=SimpleNamespace(measures=known), measure="dev_nDCG@10")
    found = tune._measure(name, prepared)
    assert found in known and found.casefold().endswith(name.casefold().removeprefix("dev_"))
    assert tune._measure(None, prepared) == "dev_nDCG@10"


@pytest.mark.parametrize(
    "name, dims",
    [
        ("TripletLoss", ()),
        ("TripletLoss", (16, 8)),
        ("MegaBatchMarginLoss", (16, 8)),
        ("GlobalOrthogonalRegularizationLoss", ()),
    ],
)
def test_stock_losses_by_name(fit, name, dims):
    """With the gradient cache, too: its numbers are those of one pass."""
    rows = easy(60, 0 if name == "MegaBatchMarginLoss" else 1)
    rows[5]["negative_2"] = "an extra one"
    many = 1 if name != "MegaBatchMarginLoss" else 0
    logs = []
    for out, budget in (("cached", 60), ("whole", 100_000)):
        ran = fit(out=out, train=rows, loss=name, dims=dims, epochs=1, max_tokens=budget, measure="loss")
        logs.append([record["loss"] for record in ran.log if "loss" in record])
        assert ran.said(f"{name} takes the {many} negative(s) that every row has; the others are not used")
        assert schema.read_toml(ran.folder / "recipe.toml")["ranking"]["loss"] == name
    assert np.isfinite(logs[0]).all() and len(set(logs[0])) > 1
    assert logs[0] == pytest.approx(logs[1], rel=1e-3)


def test_triplets_are_learned(fit):
    ran = fit(train=easy(36, 1), loss="TripletLoss", epochs=10, lr=3e-3, measure="loss")
    losses = [record["loss"] for record in ran.log if "loss" in record]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.5


def resolved(**options):
    """The ranking that a run with these options has, with the tiny model's 32 dimensions."""
    model = SimpleNamespace(get_embedding_dimension=lambda: 32, similarity_fn_name=options.pop("model_says", "cosine"))
    return contrastive._resolve_ranking(Ranking(**options), SimpleNamespace(model=model))


@pytest.mark.parametrize("name", ranking.OURS)
def test_names_of_the_same_loss(name):
    """Cached losses of sentence-transformers are ours with its options: the cache is there whenever it is needed."""
    plain = {"symmetric": "Symmetric" in name, "guide": "base" if "GIST" in name else None}
    assert resolved(loss=name) == resolved(**plain) and resolved(loss=name).loss == "MultipleNegativesRankingLoss"


def test_dot_products_have_another_scale_and_prefixes_are_cosines():
    assert resolved().scale == 20 and resolved().similarity == "cosine"
    assert resolved(similarity="dot").scale == 1 and resolved(model_says="dot") == resolved(similarity="dot")
    assert resolved(similarity="dot", dims=(16,)).scale == 20 and resolved(similarity="dot", scale=3.0).scale == 3


def test_the_guide_masks_and_a_larger_margin_masks_more(fit):
    losses = []
    for number, changes in enumerate([{}, {"guide": "base"}, {"guide": "base", "guide_margin": 0.3}]):
        ran = fit(out=f"{number}", train=easy(60, 2), max_steps=1, **changes)
        assert bool(ran.said("with the guide")) == bool(changes)
        losses.append(next(record["loss"] for record in ran.log if "loss" in record))
    assert losses[0] > losses[1] > losses[2], "fewer candidates, smaller loss"


def test_bf16_runs_and_keeps_float32_masters(fit):
    ran = fit("bert", precision="bf16", epochs=3, measure="loss", merge="auto")
    losses = [record["loss"] for record in ran.log if "loss" in record]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    moved = weights(ran.folder)["encoder.layer.0.attention.self.query.weight"]
    assert moved.dtype == torch.float32 and not torch.equal(moved, moved.bfloat16().float())
    assert ran.bits == fit("bert", out="again", precision="bf16", epochs=3, measure="loss", merge="auto").bits


def test_texts_of_the_same_words_are_never_an_anchors_negatives():
    """A text that is an anchor here and a positive there is not pushed away from itself."""
    texts = Texts()
    rows = [("one", "two"), ("two", "three"), ("four", "five")]
    table = np.array([[texts.number(ANCHOR, a), texts.number(DOCUMENT, p)] for a, p in rows])
    assert texts.same(ANCHOR, DOCUMENT) == {table[1, 0]: table[0, 1]}
    masked = MaskedRanking(Ranking(), table, None, texts.same(ANCHOR, DOCUMENT))._masked(
        table[:, 0], np.unique(table[:, 1]), np.arange(3)
    )
    assert masked.tolist() == [[False] * 3, [True, False, False], [False] * 3]


def test_the_symmetric_half_knows_every_anchor_of_a_positive():
    """Two anchors with the same positive in one batch: neither is a wrong answer for it."""
    generator = torch.Generator().manual_seed(0)
    anchors, candidates = torch.randn(3, 8, generator=generator), torch.randn(2, 8, generator=generator)
    own = torch.tensor([0, 0, 1])
    found = ranking.multiple_negatives(anchors, candidates, own, scale=3.0, similarity="dot", symmetric=True)
    scores = 3 * anchors @ candidates.T
    forward = [torch.logsumexp(scores[i], 0) - scores[i, own[i]] for i in range(3)]
    others = {0: [0, 2], 1: [1, 2], 2: [0, 1, 2]}
    backward = [torch.logsumexp(scores[others[i], own[i]], 0) - scores[i, own[i]] for i in range(3)]
    assert float(found) == pytest.approx(float(sum(forward) + sum(backward)) / 6, abs=1e-6)


def test_it_draws_from_its_seed_and_nothing_else(fit):
    """Global random states are neither used nor changed, not even for weights that the folder lacks (a pooler)."""
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    one = fit("bert", out="one", max_steps=3, train=easy(60, 1))
    random.seed(2), np.random.seed(2), torch.manual_seed(2)  # noqa: NPY002
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    two = fit("bert", out="two", max_steps=3, train=easy(60, 1))
    assert one.bits == two.bits
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
