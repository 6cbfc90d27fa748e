"""The whole story on labels, scores and tags: how it is parted, what is kept, what is said, how it goes on."""

import csv
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file
from sklearn.metrics import f1_score
from transformers import pipeline

from conftest import corpus
from embedtune import UserError, cli, files, plots, plots_labels, recipes, run_labels, tune
from embedtune import run as story_of
from embedtune.data.clean import text_hash
from embedtune.data.divide import leaks
from embedtune.errors import Interrupted
from embedtune.judge import compare
from embedtune.parts_labels import divide_labels
from embedtune.recipes import Loop, Run, Scored

WORDS = sorted(set(corpus(300, seed=1).split()))
LOOP = Loop(batch=16, max_steps=4, eval_steps=2, lr=1e-3, precision="fp32", max_tokens=512)


def silent(note):
    """Nobody listens."""


def texts(count, seed=0):
    """Texts of two halves of the language, in turn, so that a class can be told by the words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS[n % 2 :: 2], k=draw.choice((6, 9, 14)))) for n in range(count)]


def rows_of(kind, count=120, seed=0):
    found = texts(count, seed)
    if kind == "labelled":
        return [{"text": t, "label": ("good", "bad")[n % 2]} for n, t in enumerate(found)]
    if kind == "several":
        return [{"text": t, "label": [[], ["bad"], ["good", "new"]][n % 3]} for n, t in enumerate(found)]
    if kind == "graded":
        return [{"text": t, "score": 2.5 * (n % 2) + 0.25 * (n % 5)} for n, t in enumerate(found)]
    tags = dict.fromkeys(WORDS, "O") | dict.fromkeys(WORDS[::5], "B-place")
    return [{"tokens": t.split(), "tags": [tags[word] for word in t.split()]} for t in found]


@pytest.fixture
def place(tiny_model, tmp_path, monkeypatch):
    """A folder with a tiny model; pictures in files are not drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "loss_curve", lambda r, stem, *more: files.write_bytes(stem.with_suffix(".png"), b"png"))
    monkeypatch.setattr(plots_labels, "save_figure", lambda figure, stem: None)
    shutil.copytree(tiny_model("bert"), tmp_path / "model")
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def go(place, kind="labelled", out="out", resume=False, count=120, **changes):
    data = write(place / f"{kind}.jsonl", rows_of(kind, count))
    recipe = Run(**{"data": str(data), "model": "model", "loop": LOOP, **changes})
    return story_of.run(recipe, place / out, resume=resume)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)


# ---- parts


def parts_of(rows, kind="labelled", **changes):
    return divide_labels(Run(data=rows, **changes), kind, silent)


def text_of(row):
    return row.get("text") or " ".join(row["tokens"])


@pytest.mark.parametrize("kind", ["labelled", "several", "graded", "tagged"])
def test_no_text_is_in_two_parts_and_repeats_are_left_out(kind):
    rows = rows_of(kind, 200)
    long = [{**row, "text": f"{row['text']} {t} {t[::-1]} {n}"} if "text" in row else
            {"tokens": [*row["tokens"], *t.split(), str(n)], "tags": [*row["tags"], *["O"] * (len(t.split()) + 1)]}
            for n, (row, t) in enumerate(zip(rows, texts(200, 5)))]  # fmt: skip
    near = [{**row, "text": row["text"] + " more"} if "text" in row else
            {"tokens": [*row["tokens"], "more"], "tags": [*row["tags"], "O"]} for row in long[:60]]  # fmt: skip
    found = parts_of([*long, *near, *long[:9]], "labelled" if kind == "several" else kind)
    sides = [[text_of(row) for row in side] for side in (found.train, found.dev, found.test)]
    assert sum(map(len, sides)) == 260 and len({text_hash(text) for side in sides for text in side}) == 260
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert leaks(sides[a], sides[b]).exact == leaks(sides[a], sides[b]).near == 0
    assert any("9 rows left out: they repeat an earlier one" in remark for remark in found.remarks)
    assert 20 <= len(sides[1]) <= 26 and 42 <= len(sides[2]) <= 52


def test_each_class_has_its_share_and_training_knows_them_all():
    rows = rows_of("labelled", 200) + [{"text": t, "label": "rare"} for t in texts(2, 8)]
    found = parts_of(rows)
    labels = [[row["label"] for row in side] for side in (found.train, found.dev, found.test)]
    assert [labels[2].count(name) for name in ("good", "bad", "rare")] == [20, 20, 0]
    assert set(labels[1]) | set(labels[2]) <= set(labels[0]) and labels[0].count("rare") == 2
    assert any("1 classes are too rare to be judged" in remark for remark in found.remarks)


def test_scores_are_spread_over_the_parts():
    found = parts_of(rows_of("graded", 300), "graded")
    means = [np.mean([row["score"] for row in side]) for side in (found.train, found.dev, found.test)]
    assert max(means) - min(means) < 0.2


def test_rows_that_say_something_else_of_the_same_text_are_counted():
    rows = rows_of("labelled", 100)
    found = parts_of([*rows, {**rows[0], "label": "bad"}, rows[1]])
    assert any("2 rows left out: they repeat an earlier one; 1 of them have another label" in r for r in found.remarks)


@pytest.mark.parametrize(
    "changes, rows, says",
    [
        ({}, [{**row, "stars": n % 3, "topic": "x"} for n, row in enumerate(rows_of("labelled"))],
         "3 columns could hold the labels or scores: 'label', 'stars', 'topic'"),
        ({}, rows_of("labelled", 20), "20 rows: too little data"),
        ({"negatives": 2, "dims": (8,)}, rows_of("labelled"), "negatives, dims: of no use for data with labels"),
        ({}, [{**row, "text": "always the same text of seven words " * 3 + str(n % 5)}
              for n, row in enumerate(rows_of("labelled"))], "too little data"),
        ({}, [*rows_of("labelled"), {"text": "da bo", "label": "once"}], "a single row"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_said(changes, rows, says):
    with pytest.raises(UserError, match=says):
        parts_of(rows, **changes)


def test_the_flag_that_settles_it(place):
    rows = [{**row, "stars": n % 3} for n, row in enumerate(rows_of("labelled"))]
    path = write(place / "two.jsonl", rows)
    with pytest.raises(UserError, match="--columns label=label"):
        story_of.run(Run(data=str(path), model="model"), place / "out")
    assert not (place / "out.running").exists()
    assert len(parts_of(rows, columns="label=stars").train[0]) == 2
    with pytest.raises(UserError, match="no column of labels"):
        story_of.run(
            Run(data=str(write(place / "t.jsonl", [{"text": t} for t in texts(60)])), labels=True), place / "out"
        )


# ---- the story


@pytest.mark.parametrize("kind, task", [("labelled", "classify"), ("several", "classify"), ("graded", "regress"),
                                        ("tagged", "tag")])  # fmt: skip
def test_a_run_leaves_a_model_a_verdict_and_a_report(place, kind, task):
    ended = go(place, kind)
    story = ended.story
    assert story["task"] == task and story["verdict"]["word"] in ("WIN", "MARGINAL", "REGRESSION")
    assert [each["name"] for each in story["models"]][-3:] == ["linear probe", "start", "tuned"]
    rows = {row["measure"]: row for row in story["tables"][0]["rows"]}
    main = rows[story["measure"]]
    assert main["low"] <= main["high"] and main["tuned"] is not None and main["base"] is not None
    page = (place / "out" / "report.html").read_text()
    assert story["verdict"]["word"] in page and "linear probe" in page and "left out" not in story["title"]
    assert ("confusion-" in page) == (kind == "labelled") == ("reliability-" in page)
    assert ("scatter-" in page) == (kind == "graded")
    left = {path.name for path in (place / "out").iterdir()}
    assert {"report.html", "recipe.toml", "scores.json", "run.json", "README.md", "log.jsonl", "config.json"} <= left
    card = (place / "out" / "README.md").read_text()
    assert f"# {story['title']}\n" in card and story["verdict"]["sentence"] in card
    assert story["model"] == "base" or (story["recipe"].strip() in card and "out.running" not in card)
    assert not (place / "out.running").exists() and json.loads((place / "out" / "scores.json").read_text())
    assert (kind == "graded") == (not story["classes"])
    kind_of = "token-classification" if task == "tag" else "text-classification"
    assert pipeline(kind_of, model=str(place / "out"), device="cpu")(texts(1)[0]) is not None


def test_the_test_scores_are_those_that_judge_gives(place, monkeypatch):
    kept = {}
    inner = run_labels._judge
    monkeypatch.setattr(run_labels, "_judge", lambda recipe, found, *more: (
        kept.update(test=found.test), inner(recipe, found, *more))[1])  # fmt: skip
    ended = go(place)
    write(place / "test.jsonl", kept["test"])
    assert cli.run(["judge", "out", "--data", "test.jsonl", "--out", "j.json"]) == 0
    judged = json.loads((place / "j.json").read_text())["data"][0]["reports"][0]["summary"]
    rows = {row["measure"]: row["tuned"] for row in ended.story["tables"][0]["rows"]}
    assert ended.story["model"] == "tuned" and rows == pytest.approx(judged, abs=1e-6)


def verdicts(monkeypatch, probe, start):
    """Let the comparisons with the probe and with the start come out as told."""
    told = {"linear probe": probe, "start": start}

    def found(a, b, measure, **more):
        return compare.Difference(*told.get(a.model, probe), 24, 24, 0.01)

    monkeypatch.setattr(compare, "paired", found)


WON, LOST, SAME = (0.02, 0.01, 0.03), (-0.02, -0.03, -0.01), (0.0, -0.01, 0.01)


@pytest.mark.parametrize("probe, start, word, keeps", [(WON, WON, "WIN", "tuned"), (SAME, WON, "MARGINAL", "tuned"),
                                                       (LOST, WON, "REGRESSION", "base"),
                                                       (SAME, LOST, "REGRESSION", "base")])  # fmt: skip
def test_what_is_kept_follows_the_verdict(place, monkeypatch, probe, start, word, keeps):
    verdicts(monkeypatch, probe, start)
    monkeypatch.setattr("embedtune.fit.engine.better", lambda *scores: True)  # the last step is kept on dev
    ended = go(place)
    assert ended.story["verdict"]["word"] == word and ended.story["model"] == keeps
    assert ended.code == (3 if word == "REGRESSION" else 0)
    base, out = weights(place / "model"), weights(place / "out")
    untouched = all(np.array_equal(base[name], out[name]) for name in base if name in out and "pooler" not in name)
    assert untouched == (keeps == "base")


def test_a_tuning_that_hurts_is_not_shipped(place, monkeypatch):
    """Planted: a model that says the opposite of what it has learned, after it was chosen on dev."""
    inner, judged, kept = tune.finetune, run_labels._judge, {}

    def hurt(recipe, out, **more):
        done = inner(recipe, out, **more)
        path = done.folder / "model.safetensors"
        turned = {n: -tensor if n.startswith("classifier") else tensor for n, tensor in load_torch(path).items()}
        save_file(turned, path, metadata={"format": "pt"})
        return done

    monkeypatch.setattr(tune, "finetune", hurt)
    monkeypatch.setattr(run_labels, "_judge", lambda recipe, found, *more: (
        kept.update(test=found.test), judged(recipe, found, *more))[1])  # fmt: skip
    rows = rows_of("labelled", 300)
    ended = story_of.run(Run(data=rows, model="model", loop=LOOP), place / "out")
    sentence = ended.story["verdict"]["sentence"]
    assert ended.code == 3 and sentence.startswith("REGRESSION") and "the untuned encoder is kept" in sentence
    base, out = weights(place / "model"), weights(place / "out")
    assert all(np.array_equal(base[name], out[name]) for name in base if name in out)
    predict = pipeline("text-classification", model=str(place / "out"), device="cpu")
    said = [predict(row["text"])[0]["label"] for row in kept["test"]]
    scores = {each["name"]: each["value"] for each in ended.story["models"]}
    assert f1_score([row["label"] for row in kept["test"]], said, average="macro") == pytest.approx(scores["start"])
    assert scores["start"] > scores["tuned"] + 0.1


def test_with_few_rows_the_encoder_is_tuned_on_pairs_first_and_then_the_head_alone(place, monkeypatch):
    inner, adapted = tune.finetune, {}

    def watched(recipe, out, **more):
        done = inner(recipe, out, **more)
        if isinstance(recipe, Scored):
            rows = [json.loads(line) for line in Path(recipe.train).read_text().splitlines()]
            adapted.update(weights=weights(done.folder), scores={row["score"] for row in rows}, rows=len(rows))
        return done

    monkeypatch.setattr(tune, "finetune", watched)
    ended = go(place, count=44)
    assert any("rows a class: the encoder is tuned on pairs of the labels first" in r for r in ended.story["remarks"])
    assert adapted["scores"] == {0.0, 1.0} and adapted["rows"] > 200
    kept, base = weights(place / "out"), weights(place / "model")
    names = [name for name in base if "encoder.layer" in name]
    assert names and all(np.array_equal(kept[n], adapted["weights"][n.removeprefix("bert.")]) for n in names)
    assert not all(np.array_equal(kept[n], base[n]) for n in names)


@pytest.mark.parametrize("kind, count", [("labelled", 120), ("graded", 44), ("several", 44), ("tagged", 44)])
def test_pairs_come_first_only_for_few_rows_of_single_labels(place, kind, count):
    assert not any("tuned on pairs" in remark for remark in go(place, kind, count=count).story["remarks"])


@pytest.mark.parametrize("stage, count", [("finetune", 120), ("judge", 120), ("finetune", 44)])
def test_a_run_that_was_stopped_goes_on_and_ends_the_same(place, monkeypatch, stage, count):
    whole = go(place, out="whole", count=count)
    where, name = (tune, "finetune") if stage == "finetune" else (run_labels, "_judge")
    inner = getattr(where, name)

    def stopped(*args, **more):
        if stage == "finetune":
            inner(*args, **more)
        raise Interrupted("stopped by signal 15", 143)

    monkeypatch.setattr(where, name, stopped)
    with pytest.raises(Interrupted):
        go(place, out="parts", count=count)
    assert (place / "parts.running").is_dir() and not (place / "parts").exists()
    monkeypatch.setattr(where, name, inner)
    again = go(place, out="parts", resume=True, count=count)
    assert same(weights(place / "parts"), weights(place / "whole"))
    assert again.story["verdict"] == whole.story["verdict"] and again.story["tables"] == whole.story["tables"]


@pytest.mark.parametrize(
    ("said", "epochs", "batch"), [({}, 3.0, 32), ({"epochs": 1.0, "batch": 64}, 1.0, 64), ({"lr": 1e-4}, 3.0, 32)]
)
def test_the_loop_is_that_of_fit_but_for_what_the_user_says(place, monkeypatch, said, epochs, batch):
    seen = []

    def stop(recipe, folder, listener):
        seen.append(recipes.usual(recipe))
        raise Interrupted("stopped by signal 15", 143)

    monkeypatch.setattr(run_labels, "_stage", stop)
    with pytest.raises(Interrupted):
        go(place, loop=Loop(**said))
    assert (seen[0].epochs, seen[0].batch) == (epochs, batch)
    assert recipes.usual(Run()).batch == 64


def test_csv_and_conll_by_name(place):
    with (place / "r.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([["review", "stars"], *([row["text"], n % 2] for n, row in enumerate(rows_of("labelled")))])
    found = divide_labels(Run(data="r.tsv", columns="label=stars"), "labelled", silent)
    assert found.task == "classify" and set(found.train[0]) == {"text", "label"}
    lines = ["\n".join(f"{w}\t{t}" for w, t in zip(row["tokens"], row["tags"])) for row in rows_of("tagged")]
    (place / "n.conll").write_text("\n\n".join(lines) + "\n")
    assert story_of._kind(Run(data="n.conll")) == "tagged" and story_of._kind(Run(data="r.tsv")) == "graded"
    assert story_of._kind(Run(data="r.tsv", columns="label=stars")) == "labelled"
    assert story_of._kind(Run(data="r.tsv", labels=False)) == "text"


@pytest.mark.parametrize("name, rows", [("rotten_tomatoes/train.csv", 200), ("banking77/train.csv", 240)])
def test_real_data(real_data, tmp_path, name, rows):
    with real_data(name).open(newline="") as file:
        table = list(csv.DictReader(file))
    if "banking" in name:
        names = sorted({row["category"] for row in table})[:8]
        table = [row for row in table if row["category"] in names]
    random.Random(0).shuffle(table)
    ended = story_of.run(Run(data=table[:rows], loop=Loop(max_steps=3, batch=16)), tmp_path / "out")
    main = next(row for row in ended.story["tables"][0]["rows"] if row["measure"] == "F1")
    assert main["base"] > 2 * main["constant"] - 0.1 and ended.story["model"] in ("tuned", "base")
