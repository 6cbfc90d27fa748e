"""A run that goes on from another: what it trains on, what it is scored on, what it refuses, and that it resumes."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from conftest import corpus
from embedtune import Past, UserError, cli, continued, files, finetune, plots, plots_labels, recipes, schema, tune
from embedtune.data.clean import text_hash
from embedtune.data.divide import leaks
from embedtune.errors import Interrupted
from embedtune.fit import engine, past
from embedtune.fit.engine import Listener
from embedtune.fit.past import Texts, choose

LOOP = {
    "batch": 16,
    "lr": 2e-3,
    "max_tokens": 512,
    "precision": "fp32",
    "log_steps": 1,
    "eval_steps": 4,
    "max_steps": 4,
}
LOOP |= {"checkpoint_steps": 2, "measure": None}
TASKS = ("mlm", "contrastive", "scored", "classify", "regress", "tag")
SAME = ("model.safetensors", "recipe.toml", "scores.json", "README.md")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Drawing and waiting for the disk are most of a tiny run's time; both have tests of their own."""
    monkeypatch.setattr(
        plots, "loss_curve", lambda r, stem, title, unit: files.write_bytes(stem.with_suffix(".png"), b"")
    )
    monkeypatch.setattr(plots_labels, "save_figure", lambda figure, stem: None)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# ---- what is chosen, as a function of texts

WORDS = st.sampled_from(["oak tree bark", "iron ore vein", "salt sea air", "red fox den", "old mill pond", "cold rain"])
ROWS = st.lists(st.tuples(WORDS, WORDS).map(" and ".join), max_size=25)
SIDES = st.builds(lambda train, dev: Texts(train, train, dev), ROWS, ROWS)


@settings(max_examples=100, deadline=None)
@given(SIDES, SIDES, st.floats(0, 3), st.integers(0, 5), st.randoms())
def test_no_row_that_is_scored_on_is_trained_on(new, old, share, seed, shuffle):
    # A run's own sides share nothing: that is tested where they are parted.
    new = Texts(*[[text for text in new.keys if text not in set(new.dev)]] * 2, new.dev)
    found = choose(new, old, share, seed)
    trained = [new.held[n] for n in found.train] + [old.held[n] for n in found.replayed]
    scored = [*old.dev, *(new.dev[n] for n in found.dev)]
    assert not leaks(scored, [old.held[n] for n in found.replayed]).rows.size
    assert not leaks(old.dev, [new.held[n] for n in found.train]).rows.size
    assert not set(trained) & set(scored)
    assert not leaks(old.held, [new.dev[n] for n in found.dev]).rows.size, "the old model was trained on it"
    # As many as asked for, or all there are; none twice, none that is among the new.
    free = {text for text in old.keys if text not in {new.keys[n] for n in found.train}}
    free = [text for text in free if not leaks(scored, [text]).rows.size]
    assert len(found.replayed) == min(len(free), round(share * len(found.train)))
    assert len({old.keys[n] for n in found.replayed}) == len(found.replayed)
    # The order of the old rows does not matter.
    order = list(range(len(old.keys)))
    shuffle.shuffle(order)
    other = dataclasses.replace(old, keys=[old.keys[n] for n in order], held=[old.held[n] for n in order])
    again = choose(new, other, share, seed)
    assert [other.keys[n] for n in again.replayed] == [old.keys[n] for n in found.replayed]


def test_the_sample_is_drawn_by_the_seed():
    old = [f"old text {n} of {n * n}" for n in range(200)]
    new = [f"another {n} with {n * 7}" for n in range(100)]
    drawn = [choose(Texts(new, new, []), Texts(old, old, []), 0.5, seed).replayed for seed in range(20)]
    assert all(len(found) == 50 for found in drawn)
    assert len({tuple(found) for found in drawn}) == 20
    # Every row is as likely as another: 20 draws of a quarter.
    assert 60 < sum(np.bincount(np.concatenate(drawn), minlength=200) >= 5) < 160


# ---- whole runs


def rows_of(task, count, seed):
    """Rows of a task: different texts for different seeds."""
    lines = list(dict.fromkeys(line for line in corpus(6 * count, seed=seed).splitlines() if len(line.split()) > 8))
    draw, out = random.Random(seed), []
    for n, line in enumerate(lines[:count]):
        words = line.split()
        half, grade = len(words) // 2, n % 3
        mixed = words[: half * grade // 2] + draw.choices(words, k=half)
        out.append({
            "mlm": {"text": line},
            "contrastive": {"anchor": " ".join(words[:half]), "positive": " ".join(words[half:])},
            "scored": {"sentence1": line, "sentence2": " ".join(mixed), "score": float(grade)},
            "classify": {"text": f"{3 * ('ba ', 'de ', 'fi ')[grade]}{line}", "label": ("good", "bad", "odd")[grade]},
            "regress": {"text": line, "score": len(words) + n % 2},
            "tag": {"tokens": words, "tags": ["B-x" if len(word) > 4 else "O" for word in words]},
        }[task])  # fmt: skip
    return out


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """finished(task) -> the folder of a run on old.jsonl, beside that file and new.jsonl."""
    made = {}

    def run(task):
        if task not in made:
            place = tmp_path_factory.mktemp(task)
            old = write(place / "old.jsonl", rows_of(task, 80, 0))
            write(place / "new.jsonl", [*rows_of(task, 60, 1), *rows_of(task, 80, 0)[:40]])
            kind = "minilm" if task in ("contrastive", "scored") else "bert"
            recipe = recipes.RECIPES[task](train=old, model=str(tiny_model(kind)), loop=recipes.Loop(**LOOP))
            made[task] = finetune(recipe, place / "run").folder
        return made[task]

    return run


@pytest.fixture
def go_on(tmp_path, monkeypatch):
    """go_on(run, out, changes of the recipe...) -> (finished, prepared, notes)."""
    made, inner = [], tune.prepare
    monkeypatch.setattr(tune, "prepare", lambda *given: made.append(inner(*given)) or made[-1])

    def run(folder, out="out", resume=False, step=None, **changes):
        train = changes.pop("train", str(folder.parent / "new.jsonl"))
        loop = {name: changes.pop(name) for name in list(changes) if name in LOOP}
        recipe = continued(folder, train, **changes)
        recipe = dataclasses.replace(recipe, loop=dataclasses.replace(recipe.loop, **{**LOOP, **loop}))
        notes = []
        done = finetune(recipe, tmp_path / out, resume=resume,
                        listener=Listener(notes.append, lambda record, total: step and step(record)))  # fmt: skip
        return done, made[-1], notes

    return run


def identities(task, prepared):
    """Hashes of token rows trained on, and scored on (old, new), as sets."""
    objective, dev, old = prepared.objective, prepared.dev, prepared.old

    def of(tokens, rows):
        return {hashlib.sha256(tokens.row(int(n)).astype(np.int64).tobytes()).hexdigest() for n in rows}

    if task == "mlm":
        return of(objective.tokens, objective.train.whole()), of(objective.dev_tokens, objective.dev[:old])
    if task == "contrastive":
        return of(objective.tokens, objective.columns[:, 0]), of(objective.tokens, dev.queries[:old])
    if task == "scored":
        return of(objective.tokens, objective.columns[:, 0]), of(objective.tokens, dev.left[:old])
    return of(objective.tokens, objective.train), of(objective.tokens, dev.rows[:old])


@pytest.mark.parametrize("task", TASKS)
def test_a_run_goes_on(task, finished, go_on):
    """What the old run was scored on stays what is scored on, and is never trained on; step 0 is the old model."""
    run = finished(task)
    before = json.loads((run / "scores.json").read_text())
    done, prepared, notes = go_on(run)
    trained, scored = identities(task, prepared)
    assert scored and not trained & scored
    said = "\n".join(notes)
    assert "old training rows are trained on again" in said and "new rows left out: the run before is scored on" in said
    # The first scoring is of the old model, on the rows that it was scored on when it ended.
    name = {"contrastive": None, "scored": "spearman", "mlm": "loss", "regress": "spearman"}.get(task, "F1")
    if name:
        near = 0.1 if task == "mlm" else 1e-5  # masks are keyed by the place of a row
        assert done.scores["baseline"][f"dev_old_{name}"] == pytest.approx(before["tuned"][f"dev_{name}"], abs=near)
    assert set(done.scores["sides"] or {"old": 0, "new": 0}) == {"old", "new"}
    table = schema.read_toml(done.folder / "recipe.toml")
    assert table["past"]["continue_from"] == table["model"] == str(run)
    assert table["past"]["weights_sha256"] == files.sha256(run / "model.safetensors")
    assert json.loads((done.folder / "run.json").read_text())["old data"]


def stop_at(number):
    def step(record):
        if "loss" in record and record["step"] == number:
            os.kill(os.getpid(), signal.SIGTERM)

    return step


@pytest.mark.also_gpu
@pytest.mark.parametrize("task", TASKS)
def test_a_stopped_run_ends_as_one_that_was_not(task, finished, go_on):
    run = finished(task)
    whole = go_on(run, "whole")[0].folder
    with pytest.raises(Interrupted):
        go_on(run, "cut", step=stop_at(3))
    cut, _, notes = go_on(run, "cut", resume=True)
    assert "resumed at step 3 of 4" in "\n".join(notes)
    logs = [[{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in engine.read_log(f)]
            for f in (whole, cut.folder)]  # fmt: skip
    assert logs[0] == logs[1]
    assert all((whole / name).read_bytes() == (cut.folder / name).read_bytes() for name in SAME)


def test_a_run_goes_on_from_one_that_went_on(finished, go_on, tmp_path):
    """All dev rows of the chain stay dev rows, and rows of the first run can come back in the third."""
    run = finished("classify")
    second, between, _ = go_on(run, "second")
    newer = write(tmp_path / "newer.jsonl", rows_of("classify", 60, 2))
    _, third, notes = go_on(second.folder, "third", train=newer, replay=2.0)
    assert third.old == len(between.dev.rows)
    trained, scored = identities("classify", third)
    assert identities("classify", between)[1] <= scored and not trained & scored
    assert identities("classify", between)[0] & trained


def test_replay_is_a_share_of_the_new_rows(finished, go_on):
    run = finished("regress")
    for share in (0.0, 0.25, 0.5):
        _, prepared, _ = go_on(run, f"share-{share}", train=rows_of("regress", 60, 1), replay=share)
        new = 60 - (len(prepared.dev.rows) - prepared.old)
        assert len(prepared.objective.train) == new + round(share * new)


# ---- what is judged


def test_what_got_worse_on_the_old_rows_is_not_handed_out(finished, go_on):
    """Labels turned round: the new side gains, the old one loses; the old weights are kept, and the code is 3."""
    run = finished("classify")
    turned = {"good": "bad", "bad": "odd", "odd": "good"}
    rows = [row | {"label": turned[row["label"]]} for row in rows_of("classify", 200, 3)]
    done, _, _ = go_on(run, train=rows, replay=0.0, max_steps=60, lr=5e-3, measure="new_F1")
    assert done.scores["sides"]["new"]["value"] > 0 > done.scores["sides"]["old"]["value"]
    assert done.scores["word"] == "REGRESSION"
    assert done.scores["verdict"].startswith("REGRESSION: worse than the run")
    old, kept = (load_file(folder / "model.safetensors") for folder in (run, done.folder))
    assert all(torch.equal(old[name], kept[name]) for name in {*old, *kept})


def test_the_command_takes_the_settings_of_the_run_and_flags_win(finished, tmp_path, capsys):
    """And a side that got worse is exit code 3."""
    run = finished("classify")
    turned = {"good": "bad", "bad": "odd", "odd": "good"}
    rows = [row | {"label": turned[row["label"]]} for row in rows_of("classify", 200, 3)]
    command = ["fit", "classify", write(tmp_path / "turned.jsonl", rows), "--continue-from", str(run)]
    out = tmp_path / "out"
    flags = ["--replay", "0.25", "--lr", "1e-6", "--max-steps", "1", "--out", str(out)]
    assert cli.run([*command, *flags]) == 0
    table = schema.read_toml(out / "recipe.toml")
    assert (table["past"]["replay"], table["loop"]["lr"], table["loop"]["batch"]) == (0.25, 1e-6, LOOP["batch"])
    flags = ["--replay", "0", "--lr", "5e-3", "--max-steps", "60", "--measure", "new_F1", "--out", f"{out}-2"]
    assert cli.run([*command, *flags]) == 3 and "REGRESSION: worse than the run" in capsys.readouterr().out
    assert cli.run(["fit", "regress", *command[2:], "--out", f"{out}-3"]) == 2
    assert "its task is 'classify', not 'regress'" in capsys.readouterr().err


# ---- what is refused


def test_old_data_that_changed_is_refused_with_a_way_on(finished, go_on, tmp_path):
    place = tmp_path / "moved"
    shutil.copytree(finished("regress").parent, place)
    run = place / "run"
    recipe = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(recipe.replace(str(finished("regress").parent), str(place)))
    for spoil in ("changed", "gone"):
        old = place / "old.jsonl"
        before = old.read_text()
        old.write_text(before.replace("\n", " \n", 1)) if spoil == "changed" else old.unlink()
        with pytest.raises(UserError, match="cannot be used again") as caught:
            go_on(run)
        assert "--replay 0" in caught.value.fix and not (tmp_path / "out.running").exists()
        done, prepared, notes = go_on(run, f"without-{spoil}", replay=0.0)
        assert "nothing shows what is forgotten" in "\n".join(notes) and prepared.old == 0
        assert done.scores["against"] == "the run that this one goes on from" and "sides" not in done.scores
        old.write_text(before)


def test_labels_that_the_head_does_not_know_are_refused(finished, go_on):
    with pytest.raises(UserError, match="rows have labels that the run that is continued does not have") as caught:
        go_on(finished("classify"), train=[*rows_of("classify", 40, 1), {"text": "one more", "label": "strange"}])
    assert "'strange'" in str(caught.value)
    tags = [*rows_of("tag", 40, 1), {"tokens": ["one"], "tags": ["B-strange"]}]
    with pytest.raises(UserError, match="has tags that the run that is continued does not have: B-strange"):
        go_on(finished("tag"), train=tags)


def test_new_rows_of_few_classes_keep_the_head(finished, go_on):
    """A head of three classes goes on with rows of one of them."""
    rows = [row for row in rows_of("classify", 90, 1) if row["label"] == "odd"]
    done, prepared, _ = go_on(finished("classify"), train=rows)
    assert prepared.dev.classes == ("bad", "good", "odd")
    assert json.loads((done.folder / "config.json").read_text())["id2label"] == {"0": "bad", "1": "good", "2": "odd"}


def test_what_is_no_finished_run_or_another_is_refused(finished, go_on, tmp_path, tiny_model):
    with pytest.raises(UserError, match="is no finished run"):
        past.open_run(tiny_model("bert"), recipes.MLM)
    run = finished("regress")
    with pytest.raises(UserError, match="its task is 'regress', not 'mlm'"):
        past.open_run(run, recipes.MLM)
    with pytest.raises(UserError, match="give another --out"):
        finetune(continued(run, rows_of("regress", 40, 1)), run, force=True)
    with pytest.raises(UserError, match="replay is for a run that goes on"):
        finetune(dataclasses.replace(continued(run, rows_of("regress", 40, 1)), past=Past(replay=2.0)), tmp_path / "x")
    with pytest.raises(UserError, match="model and continue_from exclude each other"):
        finetune(continued(run, rows_of("regress", 40, 1), model="another"), tmp_path / "x")
    recipe = continued(run, rows_of("regress", 40, 1))
    other = dataclasses.replace(recipe, past=Past(continue_from=str(run), weights_sha256="0" * 64))
    with pytest.raises(UserError, match="has other weights than the recipe says"):
        finetune(other, tmp_path / "x")
    everything = rows_of("regress", 80, 0)
    with pytest.raises(UserError, match="to score on") as caught:
        go_on(run, train=everything)
    assert "give more new rows" in caught.value.fix


def test_settings_of_the_run_are_the_defaults(finished):
    run = finished("contrastive")
    recipe = continued(run, "new.jsonl", merge="auto")
    before = schema.from_table(recipes.Contrastive, schema.read_toml(run / "recipe.toml"), "x")
    assert recipe.merge == "auto" and recipe.loop.lr == before.loop.lr == 2e-3 and recipe.ranking == before.ranking
    assert (recipe.train, recipe.dev, recipe.model, recipe.loop.eval_steps) == ("new.jsonl", None, None, None)
    assert text_hash("A  b") == text_hash("a b")


def test_a_chain_of_runs_is_what_it_was(finished, tmp_path):
    from safetensors.torch import save_file

    first = shutil.copytree(finished("regress"), tmp_path / "first")
    second = finetune(continued(first, str(finished("regress").parent / "new.jsonl")), tmp_path / "second").folder
    with pytest.raises(UserError, match="give another --out"):
        finetune(continued(second, rows_of("regress", 60, 2)), first, force=True)
    tensors = load_file(first / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, first / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"{first}: has other weights"):
        finetune(continued(second, rows_of("regress", 60, 2)), tmp_path / "third")
