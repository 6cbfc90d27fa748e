"""The commands for labels: predict, judge, --try and --track, typed as a user types them."""

import io
import json
import random

import numpy as np
import pytest
from transformers import pipeline

from conftest import corpus
from embedtune import Classify, Loop, Regress, Tag, UserError, cli, finetune, trials
from embedtune.fit import engine
from embedtune.fit.engine import Listener

WORDS = sorted(set(corpus(300, seed=1).split()))
LOOP = Loop(batch=8, lr=3e-3, epochs=8, max_tokens=512, precision="fp32", measure="loss")


KINDS = ((Classify, "labels"), (Regress, "grades"), (Tag, "tags"))
BASES = {"labels": "bert", "grades": "minilm", "tags": "modernbert"}


def texts(count, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS[n % 2 :: 2], k=draw.choice((3, 8, 20)))) for n in range(count)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory):
    """A folder with labels.jsonl, grades.jsonl, tags.jsonl, and a model that was tuned on each."""
    folder = tmp_path_factory.mktemp("labels")
    write(folder / "labels.jsonl", [{"text": t, "label": ("bad", "good")[n % 2]} for n, t in enumerate(texts(80))])
    write(folder / "grades.jsonl", [{"text": t, "score": n % 2 + 0.1 * (n % 5)} for n, t in enumerate(texts(80))])
    tags = dict.fromkeys(WORDS, "O") | dict.fromkeys(WORDS[::5], "B-place")
    sentences = [t.split() for t in texts(80)]
    write(folder / "tags.jsonl", [{"tokens": s, "tags": [tags[w] for w in s]} for s in sentences])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "better", lambda *scores: True)  # the last step is kept: it knows the rows by heart
        for kind, name in KINDS:
            recipe = kind(train=str(folder / f"{name}.jsonl"), model=str(tiny_model(BASES[name])), loop=LOOP)
            finetune(recipe, folder / name)
    return folder


def run(capsys, *argv):
    """(exit code, stdout, stderr) of a command."""
    code = cli.run([str(word) for word in argv])
    said = capsys.readouterr()
    return code, said.out, said.err


# ---- predict


def test_predictions_are_those_of_the_stock_pipeline(place, capsys):
    code, out, _ = run(capsys, "predict", place / "labels", place / "labels.jsonl")
    found = [json.loads(line) for line in out.splitlines()]
    stock = pipeline("text-classification", model=str(place / "labels"), device="cpu")
    expected = [stock(text)[0] for text in texts(80)]
    assert code == 0 and [f["label"] for f in found] == [e["label"] for e in expected]
    np.testing.assert_allclose([f["score"] for f in found], [e["score"] for e in expected], atol=1e-5)
    _, out, _ = run(capsys, "predict", place / "labels", place / "labels.jsonl", "--top", 2)
    two = json.loads(out.splitlines()[0])
    assert sorted(two["labels"]) == ["bad", "good"] and sum(two["scores"]) == pytest.approx(1)


def test_lines_go_from_stdin_to_stdout_one_for_one(place, capsys, monkeypatch):
    lines = ["da bo", "", "  ", texts(3)[2]]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    code, out, _ = run(capsys, "predict", place / "grades")
    assert code == 0 and len(out.splitlines()) == 4
    assert all(np.isfinite(json.loads(line)["score"]) for line in out.splitlines())


def test_entities_have_the_characters_they_stand_at(place, capsys, tmp_path):
    given = [f"{WORDS[0]}, ({WORDS[1]})  {WORDS[5]}!", *texts(20)]
    file = tmp_path / "t.txt"
    file.write_text("\n".join(given) + "\n")
    _, out, _ = run(capsys, "predict", place / "tags", file)
    found = [json.loads(line)["entities"] for line in out.splitlines()]
    assert len(found) == 21 and sum(map(len, found)) > 5
    for text, entities in zip(given, found):
        for entity in entities:
            assert text[entity["start"] : entity["end"]] == entity["text"] and entity["type"] == "place"
            assert 0 < entity["score"] <= 1
    _, out, _ = run(capsys, "predict", place / "tags", place / "tags.jsonl")
    rows = [json.loads(line) for line in (place / "tags.jsonl").read_text().splitlines()]
    for row, line in zip(rows, out.splitlines(), strict=True):
        for entity in json.loads(line)["entities"]:
            assert " ".join(row["tokens"])[entity["start"] : entity["end"]] == entity["text"]
            assert row["tokens"][entity["word"]] in entity["text"]


def test_a_file_of_predictions_appears_when_it_is_complete_and_nothing_is_replaced(place, capsys, tmp_path):
    out = tmp_path / "p.jsonl"
    code, said, _ = run(capsys, "predict", place / "labels", place / "labels.jsonl", "--out", out)
    assert code == 0 and "80 predictions" in said and len(out.read_text().splitlines()) == 80
    code, _, complaint = run(capsys, "predict", place / "labels", place / "labels.jsonl", "--out", out)
    assert code == 2 and "exists already" in complaint


@pytest.mark.parametrize(
    "argv, says",
    [
        (["predict"], "name the folder of a model"),
        (["predict", "{model}", "x.txt"], "has no head for labels"),
        (["predict", "{labels}", "{odd}"], "row 1 has no text; found columns 'number'"),
        (["predict", "{labels}", "{odd}", "--top", "0"], "--top: must be at least 1"),
        (["judge", "{labels}", "{tags}", "--data", "{odd}"], "cannot be compared"),
        (["judge", "{labels}", "--data", "{other}"], "1 label(s) that"),
    ],
)
def test_mistakes_are_said(place, tiny_model, capsys, tmp_path, argv, says):
    odd = write(tmp_path / "odd.jsonl", [{"number": 3}])
    other = write(tmp_path / "other.jsonl", [{"text": "da", "label": "new"}, {"text": "bo", "label": "good"}])
    names = {name: place / name for name in ("labels", "grades", "tags")}
    names |= {"model": tiny_model("bert"), "odd": odd, "other": other}
    code, _, complaint = run(capsys, *(word.format(**names) for word in argv))
    assert code == 2 and says in complaint


# ---- judge


@pytest.mark.parametrize("name, measure", [("labels", "F1"), ("grades", "spearman"), ("tags", "F1")])
def test_judge_measures_heads_and_compares_them(place, capsys, tmp_path, name, measure, tiny_model):
    kind = {name: kind for kind, name in KINDS}[name]
    worse = tmp_path / "worse"
    loop = Loop(max_steps=1, lr=1e-6, batch=8, precision="fp32")
    rows = [json.loads(line) for line in (place / f"{name}.jsonl").read_text().splitlines()]
    if name == "labels":  # a linear probe knows these by heart: so let the worse one have learned others
        rows = [{**row, "label": other["label"]} for row, other in zip(rows, [*rows[1:], rows[0]])]
    finetune(kind(train=rows, model=str(tiny_model(BASES[name])), loop=loop), worse)
    data, saved = place / f"{name}.jsonl", tmp_path / "j.json"
    code, out, _ = run(capsys, "judge", worse, place / name, "--data", data, "--out", saved)
    assert code == 0 and f": WIN ({measure})" in out and "95 % interval" in out
    code, out, _ = run(capsys, "judge", place / name, worse, "--data", data)
    assert code == 3 and f": REGRESSION ({measure})" in out
    story = json.loads(saved.read_text())["data"][0]
    assert len(story["reports"]) == 2 and story[str(place / name)]["verdict"] == "WIN"
    changes = story[str(place / name)]["changes"]
    assert all(c["low"] <= c["value"] <= c["high"] for key, c in changes.items() if key not in ("F1", "ECE"))
    classes = [row for found in story["classes"].values() for row in found]
    assert (name == "grades") == (not classes)
    assert all(0 <= row["low"] <= row["F1"] <= row["high"] <= 1 or row["F1"] == 1 for row in classes)
    assert name == "grades" or "95 % interval" in out.split(f"class ({worse})")[1].splitlines()[0]


# ---- settings that are tried, and a tracker


def test_the_best_of_some_values_is_trained_in_full(place, capsys, tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["fit", "classify", place / "labels.jsonl", "--model", tiny_model("bert"), "--epochs", 2, "--batch", 8]
    code, out, _ = run(capsys, *argv, "--try", "lr=1e-4,3e-3", "--measure", "loss", "--out", "tried")
    tried = dict(line.split() for line in out.splitlines()[1:3])
    assert code == 0 and out.startswith("tried: lr") and list(tried) == ["1e-4", "3e-3"]
    best = min(tried, key=lambda value: float(tried[value]))
    assert f"lr = {float(best)!r}" in (tmp_path / "tried" / "recipe.toml").read_text()
    assert "epochs = 2.0" in (tmp_path / "tried" / "recipe.toml").read_text()
    assert not (tmp_path / "tried.trials").exists()


@pytest.mark.parametrize(
    "text, says",
    [
        ("lr", "is not of the form name=value,value"),
        ("lr=1e-5", "is not of the form"),
        ("rate=1,2", "there is no setting 'rate'"),
        ("lr=a,b", "'lr' must be a number"),
        ("seed=1,2", "there is no setting 'seed'"),
    ],
)
def test_what_cannot_be_tried_is_said(text, says):
    with pytest.raises(UserError, match=says):
        trials.parse(Classify(train="x"), text)


def test_values_reach_the_part_of_the_recipe_that_has_them():
    name, made = trials.parse(Classify(train="x"), "weights=none,balanced")
    assert name == "weights" and [recipe.weights for _, recipe in made] == ["none", "balanced"]
    _, made = trials.parse(Classify(train="x"), "schedule=cosine,linear")
    assert [recipe.loop.schedule for _, recipe in made] == ["cosine", "linear"]
    _, made = trials.parse(Classify(train="x"), "layer_decay=0.8,1")
    assert [recipe.loop.layer_decay for _, recipe in made] == [0.8, 1.0]


def test_tensorboard_shows_what_the_log_says(place, tiny_model, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = Classify(train=str(place / "labels.jsonl"), model=str(tiny_model("bert")),
                      loop=Loop(batch=16, epochs=1, precision="fp32", track="tensorboard"))  # fmt: skip
    done = finetune(recipe, tmp_path / "out", listener=Listener())
    found = events.EventAccumulator(str(done.folder / "tensorboard")).Reload()
    log = engine.read_log(done.folder)
    for name, key in (("train/loss", "loss"), ("dev/F1", "dev_F1")):
        shown = [(event.step, event.value) for event in found.Scalars(name)]
        assert shown == [(r["step"], pytest.approx(r[key], rel=1e-5)) for r in log if r.get(key) is not None]
