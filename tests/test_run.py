"""The whole story on tiny data: what is kept, what is said, what is left when it is stopped."""

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from embedtune import UserError, cli, run_pairs, tune
from embedtune import run as story_of
from embedtune.errors import Interrupted
from embedtune.judge import compare
from embedtune.recipes import Loop, Run
from test_parts import documents, rows, write

LOOP = Loop(batch=16, max_steps=3, eval_steps=2, lr=2e-3, precision="fp32")


@pytest.fixture
def place(tiny_model, tmp_path, monkeypatch):
    """A folder with a data.txt and a tiny model; pictures are not drawn."""
    from embedtune import files, plots

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("embedtune.judge.drift.TEXTS", 40)
    monkeypatch.setattr(plots, "loss_curve", lambda r, stem, *more: files.write_bytes(stem.with_suffix(".png"), b"png"))
    write(tmp_path / "data.txt", documents(300))
    shutil.copytree(tiny_model("minilm"), tmp_path / "model")
    return tmp_path


def go(place, out="out", resume=False, **changes):
    recipe = Run(**{"data": "data.txt", "model": "model", "loop": LOOP, "test_rows": 30, "test_corpus": 80, **changes})
    return story_of.run(recipe, place / out, resume=resume)


def verdicts(monkeypatch, value, low, high):
    """Let every comparison come out as told."""
    found = compare.Difference(value, low, high, 30, 30, 0.01)
    monkeypatch.setattr(compare, "paired", lambda *args, **more: found)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)


def test_raw_text_without_a_win_keeps_the_base(place, monkeypatch):
    verdicts(monkeypatch, 0.01, -0.01, 0.03)
    ended = go(place)
    assert ended.story["verdict"]["word"] == "MARGINAL" and ended.code == 0
    assert "the base is kept" in ended.story["verdict"]["sentence"]
    assert ended.story["verdict"]["queries"] == "proxy"
    assert same(weights(place / "out"), weights(place / "model"))
    left = {path.name for path in (place / "out").iterdir()}
    assert {"report.html", "recipe.toml", "scores.json", "run.json", "README.md", "log.jsonl", "modules.json"} <= left
    assert not (place / "out.running").exists()
    text = "a text of the language"
    stock, base = (
        SentenceTransformer(str(place / "out"), device="cpu"),
        SentenceTransformer(str(place / "model"), device="cpu"),
    )
    assert np.allclose(stock.encode(text), base.encode(text), atol=1e-6)


def test_a_win_keeps_the_tuned_model(place, monkeypatch):
    verdicts(monkeypatch, 0.02, 0.01, 0.03)
    ended = go(place, loop=Loop(batch=32, max_steps=15, eval_steps=5, lr=1e-3, precision="fp32"))
    assert ended.story["averaging"]["coefficient"] > 0
    assert ended.story["verdict"]["word"] == "WIN" and "the tuned model is kept" in ended.story["verdict"]["sentence"]
    assert not same(weights(place / "out"), weights(place / "model"))
    page = (place / "out" / "report.html").read_text()
    assert "WIN" in page and "proxies" in page and "data.txt" in page


def test_a_regression_is_never_shipped_and_has_exit_code_3(place, monkeypatch, capsys):
    verdicts(monkeypatch, -0.02, -0.03, -0.01)
    given = rows(150)
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    code = cli.run(["run", "pairs.jsonl", "--model", "model", "--out", "out", "--max-steps", "2", "--batch", "16",
                    "--test-rows", "20", "--precision", "fp32"])  # fmt: skip
    out = capsys.readouterr().out
    assert code == 3 and "REGRESSION" in out.splitlines()[-1] and "the base is kept" in out.splitlines()[-1]
    assert same(weights(place / "out"), weights(place / "model"))


def test_the_last_line_says_that_queries_were_proxies_and_how_to_give_real_ones(place, monkeypatch, capsys):
    verdicts(monkeypatch, 0.01, -0.01, 0.03)
    words = [
        "run",
        "data.txt",
        "--model",
        "model",
        "--out",
        "out",
        "--max-steps",
        "1",
        "--test-rows",
        "25",
        "--test-corpus",
        "60",
    ]
    assert cli.run(words) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "proxies" in last and "--queries FILE" in last
    assert cli.run(words) == 2
    assert "exists already" in capsys.readouterr().err


def test_real_queries_decide(place):
    queries = [{"query": lines[1].split(". ")[0][:60], "passage": " ".join(lines[1:])} for lines in documents(300)[:40]]
    ended = go(place, queries=queries)
    assert ended.story["verdict"]["queries"] == "real" and [t["name"] for t in ended.story["tables"]] == [
        "real queries"
    ]
    assert ended.story["tables"][0]["queries"] == 40


@pytest.mark.parametrize("stage", ["finetune", "judge"])
def test_a_run_that_was_stopped_goes_on_at_its_stage_and_ends_the_same(place, monkeypatch, stage):
    whole = go(place, "whole")
    inner = tune.finetune if stage == "finetune" else run_pairs._judge
    where = tune if stage == "finetune" else run_pairs
    name = "finetune" if stage == "finetune" else "_judge"

    def stopped(*args, **more):
        if stage == "finetune":
            inner(*args, **more)
        raise Interrupted("stopped by signal 15", 143)

    monkeypatch.setattr(where, name, stopped)
    with pytest.raises(Interrupted):
        go(place, "parts")
    assert (place / "parts.running").is_dir() and not (place / "parts").exists()
    with pytest.raises(UserError, match="not finished"):
        go(place, "parts")
    monkeypatch.setattr(where, name, inner)
    again = go(place, "parts", resume=True)
    assert same(weights(place / "parts"), weights(place / "whole"))
    assert again.story["verdict"]["changes"] == whole.story["verdict"]["changes"]


def test_changed_data_or_recipe_is_refused(place, monkeypatch):
    def stopped(*args, **more):
        raise Interrupted("stopped", 143)

    monkeypatch.setattr(run_pairs, "_judge", stopped)
    with pytest.raises(Interrupted):
        go(place)
    with pytest.raises(UserError, match="its recipe changed"):
        go(place, resume=True, pairs=3)
    write(place / "data.txt", documents(301))
    with pytest.raises(UserError, match="its data changed"):
        go(place, resume=True)


def test_mined_negatives_and_language_first(place):
    ended = go(place, negatives=1, adapt=True, dims=(16, 8), loop=Loop(batch=16, max_steps=2, precision="fp32"))
    assert any(remark.startswith("masked language modelling first") for remark in ended.story["remarks"])
    assert [row["dim"] for row in ended.story["dims"]] == [32, 16, 8]


def test_mistakes_leave_nothing_behind(place):
    for changes, says in (
        ({"data": ""}, "no data is named"),
        ({"data": "absent.txt"}, "absent.txt"),
        ({"test_rows": 0}, "test_rows must be at least 1"),
        ({"model": "absent/model"}, "absent/model"),
        ({"queries": "nowhere.jsonl"}, "nowhere.jsonl"),
    ):
        with pytest.raises(UserError, match=says):
            go(place, **changes)
    assert {path.name for path in place.iterdir()} == {"data.txt", "model"}
