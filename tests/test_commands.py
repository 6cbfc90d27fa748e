"""The commands for pairs: judge, fit contrastive and scored, data pairs and mine, refine merge; and all help."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import corpus
from embedtune import cli, files, plots
from embedtune.data.pairs import read_pairs, read_scored
from embedtune.data.retrieval import from_pairs, read_beir
from embedtune.encoder import shapes
from embedtune.encoder.encode import open_encoder
from embedtune.judge import compare, drift
from embedtune.judge.retrieval import judge_retrieval
from embedtune.judge.similarity import judge_similarity

LINES = [" ".join(words) for line in corpus(700, seed=6).splitlines() if len(words := line.split()) > 8][:120]
# An anchor is a shuffled part of its positive: even random weights find most of them.
PAIRS = [
    {"question": " ".join(line.split()[::2]), "answer": line, "negative": LINES[n - 1]} for n, line in enumerate(LINES)
]
SCORED = [
    {"sentence1": line, "sentence2": " ".join((*line.split()[: n % 4 * 3], *LINES[n - 9].split())), "score": n % 4 / 3}
    for n, line in enumerate(LINES)
]
TRAIN = ["--batch", "16", "--lr", "1e-3", "--precision", "fp32", "--max-steps", "3", "--max-tokens", "512"]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory):
    """A folder with base, worse (its words mean something else), small (16 numbers), and data of every kind."""
    home = tmp_path_factory.mktemp("world")
    shutil.copytree(tiny_model("minilm"), home / "base")
    shutil.copytree(tiny_model("minilm"), home / "worse")
    tensors = load_file(home / "worse" / "model.safetensors")
    words = tensors["embeddings.word_embeddings.weight"]
    words.copy_(words.mean(0) + 0.02 * torch.randn(words.shape, generator=torch.Generator().manual_seed(0)))
    save_file(tensors, home / "worse" / "model.safetensors", {"format": "pt"})
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense

    model = SentenceTransformer(str(home / "base"), device="cpu")
    torch.manual_seed(0)
    narrow = Dense(32, 16, bias=False, activation_function=torch.nn.Identity())
    SentenceTransformer(modules=[model[0], model[1], narrow], device="cpu").save(str(home / "small"))
    jsonl(home / "pairs.jsonl", PAIRS[:40])
    jsonl(home / "dev.jsonl", PAIRS[40:60])
    jsonl(home / "scored.jsonl", SCORED[:60])
    jsonl(home / "scored-dev.jsonl", SCORED[60:90])
    (home / "text.txt").write_text(corpus(60))
    (home / "beir" / "qrels").mkdir(parents=True)
    jsonl(home / "beir" / "corpus.jsonl", [{"_id": f"d{n}", "text": p["answer"]} for n, p in enumerate(PAIRS)])
    jsonl(home / "beir" / "queries.jsonl", [{"_id": f"q{n}", "text": p["question"]} for n, p in enumerate(PAIRS[:60])])
    for split, numbers in (("dev", range(30)), ("test", range(30, 60))):
        lines = "".join(f"q{n}\td{n}\t1\n" for n in numbers)
        (home / "beir" / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return home


@pytest.fixture
def call(world, monkeypatch, capfd, tmp_path):
    """call(words, code) -> (stdout, stderr); runs in a folder of its own where the world is linked."""
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        plots, "loss_curve", lambda r, stem, title, unit: files.write_bytes(stem.with_suffix(".png"), b"")
    )

    monkeypatch.setattr(os, "fsync", lambda handle: None)
    # Finding 400 docstrings takes seconds.
    monkeypatch.setattr(drift, "docstrings", lambda limit: LINES[60:100])

    def run(*argv, code=0):
        capfd.readouterr()
        found = cli.run(list(map(str, argv)))
        out, err = capfd.readouterr()
        assert found == code, err
        assert "Traceback" not in err
        return out, err

    return run


def made(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir() if not path.is_symlink())


# ---- --help


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capfd):
    assert cli.run([*command.split(), "--help"]) == 0
    out, err = capfd.readouterr()
    assert f"embedtune {command}" in out and err == ""
    assert cli.run([*command.split(), "--no-such-flag"]) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_no_help_loads_what_is_slow():
    """All of them in one process of its own."""
    code = f"""
import contextlib, io, sys
from embedtune import cli
for command in {list(cli.COMMANDS)!r}:
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.run([*command.split(), "--help"]) == 0
assert not {{"torch", "transformers", "sentence_transformers", "datasets", "matplotlib", "scipy"}} & set(sys.modules)
"""
    environment = {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


# ---- judge


def table_row(out, model):
    return next(line for line in out.splitlines() if line.startswith(f"{model} ")).split()


def test_one_model_on_pairs(call, world):
    out, err = call("judge", "base", "--data", "dev.jsonl", "--measures", "nDCG@10", "mrr@5")
    report = judge_retrieval(open_encoder("base"), from_pairs(read_pairs("dev.jsonl"), "x"), ["nDCG@10", "MRR@5"])[0]
    assert out.startswith("dev.jsonl\n20 queries, 21 documents\n")
    assert table_row(out, "base") == ["base", "32", "20", *(f"{report.summary[m]:.4f}" for m in ("nDCG@10", "MRR@5"))]
    assert "took the column 'question' as 'anchor'" in out and "judging on dev.jsonl" in err
    assert "against" not in out and "drift" not in out


def test_two_models_side_by_side_and_exit_code_3_where_the_second_is_worse(call, world):
    out, _ = call("judge", "base", "worse", "--data", "dev.jsonl", code=3)
    assert "worse against base: REGRESSION (nDCG@10)" in out
    data = from_pairs(read_pairs("dev.jsonl"), "x")
    reports = [judge_retrieval(open_encoder(name), data, ["nDCG@10"])[0] for name in ("base", "worse")]
    change = compare.paired(*reports, "nDCG@10")
    assert change.high < 0 and f"{change.value:+.4f}  {change.low:+.4f} to {change.high:+.4f}  {change.p:.4f}" in out
    assert "queries that changed most (nDCG@10)" in out and out.count("  lost ") == 3
    assert any(row["question"][:40] in out for row in PAIRS[40:60])
    assert "worse: drift on 40 general texts" in out
    out, _ = call("judge", "worse", "base", "--data", "dev.jsonl")
    assert "base against worse: WIN (nDCG@10)" in out and out.count("  gained ") == 3
    out, _ = call("judge", "base", "base", "--data", "dev.jsonl", "--examples", "0")
    assert "base against base: MARGINAL" in out and "+0.0000 to +0.0000" in out and "changed most" not in out


def test_drift_of_data_and_models_is_said_and_drawn(call, world):
    argv = ["judge", "base", "worse", "--data", "dev.jsonl", "beir:test", "--drift", "d.html", "--out", "d.json"]
    out, _ = call(*argv, code=3)
    assert "drift on 41 texts of dev.jsonl" in out and "drift from dev.jsonl to beir:test" in out
    found = json.loads(Path("d.json").read_text())["drift"]
    assert set(found["models"]["worse"]) == {"general texts (docstrings)", "texts of dev.jsonl", "texts of beir:test"}
    assert 0 <= found["models"]["worse"]["texts of dev.jsonl"]["overlap"] < 1
    (data,) = found["data"]
    assert data["old"] == "dev.jsonl" and data["low"] <= data["distance"][0] - data["distance"][1] <= data["high"]
    assert "beir:test against dev.jsonl" in Path("d.html").read_text() and "<svg" in Path("d.html").read_text()
    _, err = call("judge", "base", "--data", "dev.jsonl", "--drift", "d.html", code=2)
    assert "exists already" in err


def test_drift_is_none_between_a_model_and_itself_and_knows_no_scale():
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((30, 8))
    same = drift.drift(vectors, 3 * vectors)
    assert (same.overlap, same.texts) == (1.0, 30) and same.rank_correlation == pytest.approx(1)
    turned = drift.drift(vectors, vectors @ np.linalg.qr(generator.standard_normal((8, 8)))[0])
    assert turned.overlap == 1.0 and turned.rank_correlation == pytest.approx(1)
    other = drift.drift(vectors, generator.standard_normal((30, 5)))
    assert other.overlap < 0.6 and abs(other.rank_correlation) < 0.3


def test_an_exam_watches_and_does_not_decide(call, tmp_path):
    out, _ = call("judge", "worse", "base", "--data", "dev.jsonl", "--exam", "scored-dev.jsonl")
    assert "scored-dev.jsonl (exam: watches for forgetting)" in out and "drift" not in out
    assert "WIN (nDCG@10)" in out
    out, _ = call("judge", "base", "base", "--data", "dev.jsonl", "--exam", "scored-dev.jsonl", "--json")
    assert [entry["exam"] for entry in json.loads(out)["data"]] == [False, True]
    # A loss in the exam alone is told, and is no regression of the task.
    jsonl(tmp_path / "three.jsonl", SCORED[:3])
    out, _ = call("judge", "base", "worse", "--data", "three.jsonl", "--exam", "dev.jsonl")
    assert "REGRESSION (nDCG@10)" in out and "worse against base: MARGINAL (spearman)" in out


def test_beir_folders_by_split(call, world):
    out, _ = call("judge", "base", "--data", "beir:test", "beir:dev", "--json")
    found = json.loads(out)
    assert [entry["data"] for entry in found["data"]] == ["beir/test", "beir/dev"]
    for entry, split in zip(found["data"], ("test", "dev")):
        report = judge_retrieval(open_encoder("base"), read_beir("beir", split), ["nDCG@10", "MAP"])[0]
        (told,) = entry["reports"]
        assert told["summary"]["nDCG@10"] == pytest.approx(report.summary["nDCG@10"])
        assert told["items"] == list(report.items) and told["values"]["MAP"] == pytest.approx(
            report.values["MAP"].tolist()
        )
    _, err = call("judge", "base", "--data", "beir", code=2)
    assert "has judgements for dev, test, and none was chosen" in err
    _, err = call("judge", "base", "--data", "beir:tset", code=2)
    assert "did you mean 'test'?" in err


def test_scored_pairs(call):
    out, _ = call("judge", "base", "worse", "--data", "scored-dev.jsonl", "--json", code=3)
    (entry,) = json.loads(out)["data"]
    for name, told in zip(("base", "worse"), entry["reports"]):
        report = judge_similarity(open_encoder(name), read_scored("scored-dev.jsonl"), "x")[0]
        assert told["summary"] == pytest.approx(report.summary) and set(told["summary"]) == {"spearman", "pearson"}
    change = entry["worse"]["changes"]["spearman"]
    assert change["low"] <= change["value"] <= change["high"] and change["items"] == 30
    assert entry["worse"]["verdict"] == "REGRESSION" and change["high"] < 0


def test_dims_of_models_of_different_sizes(call):
    out, _ = call("judge", "base", "small", "--data", "dev.jsonl", "--dims", "16", "8", "--json")
    (entry,) = json.loads(out)["data"]
    assert [(r["model"], r["dim"]) for r in entry["reports"]] == [
        ("base", 32),
        ("base", 16),
        ("base", 8),
        ("small", 16),
        ("small", 8),
    ]
    assert {"nDCG@10", "nDCG@10 at 16", "nDCG@10 at 8"} <= set(entry["small"]["changes"])
    data = from_pairs(read_pairs("dev.jsonl"), "x")
    one, two = (
        judge_retrieval(open_encoder(m), data, ["nDCG@10"], dims=[d])[0] for m, d in (("base", 16), ("small", 16))
    )
    change = entry["small"]["changes"]["nDCG@10 at 16"]
    assert change["value"] == pytest.approx(two.summary["nDCG@10"] - one.summary["nDCG@10"])
    _, err = call("judge", "base", "small", "--data", "dev.jsonl", "--dims", "20", code=2)
    assert "20 is not between 1 and 16, the dimension of small" in err
    out, _ = call("judge", "base", "--data", "dev.jsonl", "--dims", "32", "8")
    assert [line.split()[1] for line in out.splitlines() if line.startswith("base ")] == ["32", "8"]


def test_judge_writes_what_it_found(call, tmp_path):
    out, _ = call("judge", "base", "worse", "--data", "dev.jsonl", "--out", "found.json", "--json", code=3)
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["models"] == ["base", "worse"] and written["data"] == json.loads(out)["data"]
    assert len(written["data"][0]["reports"][0]["values"]["nDCG@10"]) == 20


def test_rows_left_out_when_judging_are_said(call, tmp_path):
    jsonl(tmp_path / "holes.jsonl", [*PAIRS[:20], {"question": "", "answer": "x"}])
    _, err = call("judge", "base", "--data", "holes.jsonl", code=2)
    assert "1 of 21 rows cannot be used" in err and "column 'question' is empty (1): line 21" in err
    out, _ = call("judge", "base", "--data", "holes.jsonl", "--bad-rows", "skip")
    assert "1 rows left out: column 'question' is empty" in out
    jsonl(tmp_path / "odd.jsonl", [*SCORED[:20], {"sentence1": "a", "sentence2": "b", "score": "high"}])
    out, _ = call("judge", "base", "--data", "odd.jsonl", "--bad-rows", "skip")
    assert "20 scored pairs" in out and "1 rows left out: the score is no finite number" in out


@pytest.mark.parametrize(
    "argv, says",
    [
        (["judge", "base"], "--data"),
        (["judge", "--data", "dev.jsonl"], "--models"),
        (["judge", "base", "--data", "absent.jsonl"], "absent.jsonl"),
        (["judge", "./absent", "--data", "dev.jsonl"], "is not a model folder"),
        (["judge", "base", "--data", "text.txt"], "expected columns 'anchor', 'positive', found 'text'"),
        (["judge", "base", "--data", "dev.jsonl", "--measures", "nDGC@10"], "did you mean"),
        (["judge", "base", "--data", "dev.jsonl", "--columns", "query=question"], "'query' is no column of ours"),
        (["judge", "base", "--data", "dev.jsonl", "--similarity", "euclid"], "euclid"),
        (["refine", "merge", "base", "--out", "m", "--coefficient", "0.5"], "1 models are named, not two"),
        (["refine", "merge", "base", "worse", "--out", "m"], "either --coefficient or --data"),
        (["refine", "merge", "base", "worse", "--out", "base", "--coefficient", "1"], "exists already"),
        (["data", "mine", "pairs.jsonl", "--out", "pairs.jsonl", "--model", "base"], "exists already"),
        (["judge", "base", "--data", "pairs.jsonl", "--out", "pairs.jsonl"], "exists already"),
        (["data", "mine", "absent.jsonl", "--model", "base"], "absent.jsonl"),
        (["data", "mine", "pairs.jsonl", "--model", "base", "--margin", "2"], "--margin: must be above 0"),
        (["data", "pairs", "text.txt", "--out", "pairs.jsonl"], "exists already"),
        (["data", "pairs", "text.txt", "--out", "new", "--generators", "corp"], "crop"),
        (["data", "pairs", "text.txt", "--out", "new", "--generators", "questions"], "need an address and a model"),
        (["data", "pairs", "text.txt", "--out", "new", "--generators", "crop", "questions"], "are made alone"),
        (["fit", "contrastive"], "no training data is named"),
        (["fit", "contrastive", "pairs.jsonl", "--model", "base", "--dims", "64"], "more than the model's 32"),
        (["fit", "contrastive", "pairs.jsonl", "--model", "base", "--loss", "tripletloss"], "'TripletLoss'?"),
        (["fit", "contrastive", "scored.jsonl", "--model", "base"], "expected columns 'anchor', 'positive'"),
        (["fit", "scored", "dev.jsonl", "--model", "base", "--low", "1", "--high", "0"], "low must lie below"),
        (["fit", "contrastive", "--resume", "nothing"], "no training data is named"),
    ],
)  # fmt: skip
def test_mistakes(call, tmp_path, argv, says):
    before = made(tmp_path)
    out, err = call(*argv, code=2)
    assert says in err and out == "" and made(tmp_path) == before
    assert len(err.splitlines()) < 25


# ---- fit


def test_fit_contrastive(call, tmp_path):
    out, err = call("fit", "contrastive", "pairs.jsonl", "--model", "base", "--out", "tuned", "--dims", "32", "8",
                    "--query-prompt", "q: ", "--merge", "auto", *TRAIN)  # fmt: skip
    assert out.startswith("measure") and "tuned/ holds the model" in out and "nDCG@10" in out and "step 3 of 3" in err
    stored = (tmp_path / "tuned" / "recipe.toml").read_text()
    assert "dims = [32, 8]" in stored and 'query_prompt = "q: "' in stored and 'merge = "auto"' in stored
    out, _ = call("fit", "contrastive", "pairs.jsonl", "--model", "base", "--out", "tuned", "--force", "--json", *TRAIN)
    found = json.loads(out)
    assert found == {"folder": "tuned", **json.loads((tmp_path / "tuned" / "scores.json").read_text())}
    out, _ = call("judge", "base", "tuned", "--data", "dev.jsonl", "--json")
    assert len(json.loads(out)["data"][0]["reports"]) == 2


def test_fit_scored_and_from_a_recipe(call, tmp_path):
    (tmp_path / "r.toml").write_text('task = "scored"\ntrain = "scored.jsonl"\nmodel = "base"\n[loop]\nseed = 4\n')
    out, _ = call("fit", "scored", "r.toml", "--out", "tuned", "--dev", "scored-dev.jsonl", *TRAIN)
    assert "Spearman" in out and "seed = 4" in (tmp_path / "tuned" / "recipe.toml").read_text()
    _, err = call("fit", "contrastive", "r.toml", "--out", "other", code=2)
    assert "its task is 'scored', not 'contrastive'" in err


def test_fit_goes_on_with_the_stored_recipe(call, tmp_path, monkeypatch):
    from embedtune.fit import engine

    step = engine.Run._step

    def stopped(self):
        step(self)
        if self.state.step == 2 and not (tmp_path / "again").exists():
            (tmp_path / "again").touch()
            raise KeyboardInterrupt

    monkeypatch.setattr(engine.Run, "_step", stopped)
    flags = ["--model", "base", "--dims", "16", "8", "--checkpoint-steps", "1", *TRAIN]
    call("fit", "contrastive", "pairs.jsonl", "--out", "cut", *flags, code=130)
    _, err = call("fit", "scored", "--resume", "cut", code=2)
    assert "its task is 'contrastive', not 'scored'" in err
    _, err = call("fit", "contrastive", "--resume", "cut")
    assert "resumed at step 1 of 3" in err
    call("fit", "contrastive", "pairs.jsonl", "--out", "whole", *flags)
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


# ---- data


def test_pairs_from_text(call, tmp_path):
    out, _ = call("data", "pairs", "text.txt", "--out", "grown.jsonl", "--generators", "crop", "--seed", "3")
    found = list(read_pairs("grown.jsonl"))
    assert out.startswith(f"grown.jsonl: {len(found):,} pairs from 60 rows") and len(found) > 5
    words = set(corpus(60).split())
    assert all(set(f"{p.anchor} {p.positive}".split()) <= words for p in found)
    first = (tmp_path / "grown.jsonl").read_bytes()
    _, err = call("data", "pairs", "text.txt", "--out", "grown.jsonl", code=2)
    assert "exists already" in err and (tmp_path / "grown.jsonl").read_bytes() == first
    out, _ = call(
        "data", "pairs", "text.txt", "--out", "grown.jsonl", "--generators", "crop", "--seed", "3", "--force", "--json"
    )
    assert json.loads(out)["pairs"] == len(found) and (tmp_path / "grown.jsonl").read_bytes() == first
    call("data", "pairs", "text.txt", "--out", "other.jsonl", "--generators", "crop", "--seed", "4")
    assert (tmp_path / "other.jsonl").read_bytes() != first
    call("fit", "contrastive", "grown.jsonl", "--dev", "dev.jsonl", "--model", "base", "--out", "tuned", *TRAIN)


def test_mined_negatives_are_near_and_no_positives(call, tmp_path):
    out, _ = call(
        "data", "mine", "pairs.jsonl", "--out", "mined.jsonl", "--model", "base", "--negatives", "2", "--json"
    )
    found = json.loads(out)
    pairs = list(read_pairs("mined.jsonl"))
    assert found["rows"] == len(pairs) == 40 and found["file"] == "mined.jsonl"
    right = {row["question"]: row["answer"] for row in PAIRS[:40]}
    texts = {text for row in PAIRS[:40] for text in (row["answer"], row["negative"])}
    full = [pair for pair in pairs if len(pair.negatives) == 2]
    assert len(pairs) - len(full) == found["fewer"] and len(full) > 10
    encoder = open_encoder("base")
    for pair in pairs:
        assert pair.positive == right[pair.anchor] and set(pair.negatives) <= texts - {pair.positive}
        query, *others = encoder.encode([pair.anchor, pair.positive, *pair.negatives])
        scores = np.array(others) @ query
        assert all(scores[1:] <= scores[0] - 0.05 * abs(scores[0]) + 1e-5)
    call("data", "mine", "pairs.jsonl", "--out", "mined.jsonl", "--model", "base", code=2)
    call("data", "mine", "beir", "--out", "more.jsonl", "--model", "base", code=2)  # it has no train.tsv
    out, _ = call("data", "mine", "pairs.jsonl", "--corpus", "beir", "--out", "more.jsonl", "--model", "base")
    assert "40 rows with up to 5 negatives, out of 120 texts" in out and "took the column 'question' as 'anchor'" in out
    holes = [*PAIRS[:40], {"question": "", "answer": "x"}]
    jsonl(tmp_path / "holes.jsonl", holes)
    (tmp_path / "more.txt").write_bytes(corpus(30).encode() + b"\xff\xfe\n")
    out, _ = call("data", "mine", "holes.jsonl", "--corpus", "more.txt", "--out", "more.jsonl", "--model", "base",
                  "--bad-rows", "skip", "--force")  # fmt: skip
    assert "1 rows left out: column 'question' is empty" in out and "1 rows left out: not UTF-8" in out
    call("fit", "contrastive", "mined.jsonl", "--model", "base", "--out", "tuned", *TRAIN)


# ---- refine merge


def test_refine_merge(call, tmp_path):
    out, _ = call("refine", "merge", "base", "worse", "--out", "half", "--coefficient", "0.5")
    assert out == "half/ holds the average at 0.5\n"
    one, two, half = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "worse", "half"))
    assert all(torch.allclose(half[name], (one[name] + two[name]) / 2, atol=1e-6) for name in one)
    out, err = call("refine", "merge", "base", "worse", "--out", "best", "--data", "dev.jsonl")
    assert out.splitlines()[-1] == "best/ holds the average at 0" and err.count("of the way to the tuned model") == 5
    assert (tmp_path / "best" / "model.safetensors").exists()
    out, _ = call("refine", "merge", "worse", "base", "--out", "best", "--data", "beir:dev", "--force", "--json")
    found = json.loads(out)
    assert found["coefficient"] == 1.0 and list(found["tried"]) == ["0.0", "0.25", "0.5", "0.75", "1.0"]
    assert found["folder"] == "best" and found["measure"] == "nDCG@10"
    best = load_file(tmp_path / "best" / "model.safetensors")
    assert all(torch.equal(best[name], one[name]) for name in one)
    out, _ = call("refine", "merge", "base", "worse", "--out", "third", "--data", "scored-dev.jsonl")
    assert "of the way to the tuned model: spearman" in out


@pytest.mark.parametrize(
    "words",
    [
        "refine erase nosuch --data x --concept c --out o", "refine reduce nosuch --data x --to 8 --out o",
        "refine length nosuch --data x", "refine certify nosuch --data x --out o", "refine bias nosuch",
        "judge nosuch --data x", "embed nosuch x --out v.npy", "predict nosuch x", "data mine x --out o",
        "fit mlm nosuch --out o", "fit contrastive nosuch --out o", "run nosuch --out o",
    ],
)  # fmt: skip
def test_commands_keep_few_compiled_shapes(words, tmp_path, monkeypatch, capsys):
    """Else memory grows with the data; they ask for it before anything else."""
    monkeypatch.chdir(tmp_path)
    for name in shapes.few_shapes():
        monkeypatch.delenv(name, raising=False)
    assert cli.run(words.split()) == 2
    trains = words.startswith(("fit", "run"))
    wanted = shapes.few_shapes(shapes.TRAINING if trains else shapes.ENCODING)
    assert {name: os.environ[name] for name in wanted} == wanted
