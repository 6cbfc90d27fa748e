"""The contract of `finetune` over every tiny architecture: it learns, repeats to the bit, and stock code opens it."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForMaskedLM

from conftest import KINDS, corpus
from embedtune import MLM, Loop, UserError, finetune, schema
from embedtune.fit import checkpoint, engine
from embedtune.fit.engine import Listener
from embedtune.fit.objectives.mlm import MaskedLanguageModel

QUICK = {"batch": 16, "lr": 5e-3, "max_tokens": 256, "precision": "fp32", "log_steps": 1, "eval_steps": 5}
SAME = (
    "model.safetensors",
    "tokenizer.json",
    "config.json",
    "recipe.toml",
    "scores.json",
    "README.md",
    "loss.png",
    "loss.svg",
)


@pytest.fixture(autouse=True)
def plain_plot(monkeypatch, request):
    """Drawing is most of a tiny run's time; one test draws."""
    if "draws" not in request.keywords.get("usefixtures", []) and "draw" not in request.node.name:
        from embedtune import files, plots

        def stub(records, stem, title, unit):
            for suffix in (".png", ".svg"):
                files.write_bytes(stem.with_suffix(suffix), b"picture")

        monkeypatch.setattr(plots, "loss_curve", stub)


@pytest.fixture
def tune(tiny_model, text_file, tmp_path):
    """tune(kind, out, own fields..., loop fields...) -> (Finished, log, notes)."""

    def run(kind="bert", out="out", train=None, resume=False, model=None, **changes):
        names = {f.name for f in dataclasses.fields(Loop)}
        loop = Loop(**{**QUICK, **{k: v for k, v in changes.items() if k in names}})
        own = {k: v for k, v in changes.items() if k not in names}
        recipe = MLM(train=train or str(text_file), model=str(model or tiny_model(kind)), dev_rows=16, loop=loop, **own)
        notes = []
        finished = finetune(recipe, tmp_path / out, resume=resume, listener=Listener(notes.append))
        return finished, engine.read_log(finished.folder), notes

    return run


def without_time(log):
    return [{k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")} for record in log]


def digests(folder):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in SAME}


@pytest.mark.parametrize("kind", KINDS)
def test_the_contract(tune, tiny_model, kind):
    finished, log, notes = tune(kind, epochs=4, head_steps=4 if kind == "minilm" else None)
    folder, scores = finished.folder, finished.scores
    # Loss falls, in training and on rows that were held out.
    losses = [r["loss"] for r in log if "loss" in r]
    assert np.mean(losses[-8:]) < np.mean(losses[:8]) - 0.1
    assert scores["tuned"]["dev_loss"] < scores["baseline"]["dev_loss"] - 0.1
    assert scores["difference"]["value"] < 0 and scores["best_step"] > 0
    # The saved folder is what was scored, and stock code opens it with nothing missing.
    language, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert not info["unexpected_keys"] or kind == "minilm"
    encoder, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not {name for name in info["missing_keys"] if kind == "minilm" or "pooler" not in name}
    vectors = SentenceTransformer(str(folder), device="cpu").encode(["bade fima", "lora"])
    assert vectors.shape == (2, 32) and np.isfinite(vectors).all()
    before, after = (load_file(f / "model.safetensors") for f in (tiny_model(kind), folder))
    assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in after.values())
    moved = [n for n in before if n in after and not torch.equal(before[n], after[n])]
    assert kind == "minilm" or len(moved) > 10
    if kind == "minilm":
        assert torch.equal(after["bert.pooler.dense.weight"], before["pooler.dense.weight"])
        assert any("fresh one" in note for note in notes)
        assert [r["step"] for r in log if r.get("head_only")] == [1, 2, 3, 4]
        assert scores["head_alone"]["dev_loss"] < scores["baseline"]["dev_loss"]
        assert (folder / "2_Normalize").exists()
    assert any("runs padded" in note for note in notes) == (kind == "mpnet")
    # Nothing of the run's own is left.
    left = {p.name for p in folder.iterdir()}
    assert {"model.safetensors", "README.md", "recipe.toml", "run.json", "log.jsonl", "scores.json", "loss.png"} <= left
    assert not left & {"checkpoints", "data", "base", "start.json"} and not [
        n for n in left if n.endswith(".tmp") or n.startswith(".")
    ]
    assert not folder.with_name("out.running").exists()


@pytest.mark.parametrize("kind", ["bert", "minilm", "mpnet"])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(tune, kind):
    runs = [tune(kind, out, seed=seed) for out, seed in (("a", 1), ("b", 1), ("c", 2))]
    (one, log, _), (two, same, _), (three, other, _) = runs
    assert digests(one.folder) == digests(two.folder)
    assert without_time(log) == without_time(same) != without_time(other)
    assert digests(one.folder)["model.safetensors"] != digests(three.folder)["model.safetensors"]


def test_the_recipe_that_is_left_repeats_the_run(tune, tiny_model, tmp_path):
    finished, log, _ = tune("minilm", "first", epochs=2, seed=7, eval_steps=None, log_steps=None, max_tokens=None,
                            precision=None, lr=None)  # fmt: skip
    path = finished.folder / "recipe.toml"
    again = schema.from_table(MLM, schema.read_toml(path), str(path))
    loop = again.loop
    derived = (loop.precision, loop.max_tokens, loop.eval_steps, loop.log_steps, loop.lr)
    assert None not in (*derived, again.max_length, again.mask_rate, again.head_steps, again.model)
    repeated = finetune(again, tmp_path / "second")
    assert digests(repeated.folder) == digests(finished.folder)
    assert without_time(engine.read_log(repeated.folder)) == without_time(log)


def test_the_account_of_the_run(tune, text_file):
    finished, log, _ = tune(epochs=2)
    run = json.loads((finished.folder / "run.json").read_text())
    assert run["finished"] and run["steps"] == run["of"] == log[-1]["step"]
    assert run["training data"] == hashlib.sha256(text_file.read_bytes()).hexdigest()
    assert run["data"]["train_rows"] + run["data"]["dev_rows"] == run["data"]["rows"] == 200
    assert (run["data"]["lines"], run["data"]["lines_used"], run["data"]["blank_lines"]) == (224, 200, 24)
    per_epoch = -(-run["data"]["train_rows"] // 16)
    assert [r["epoch"] for r in log if "epoch" in r][per_epoch - 1] == 1.0
    assert run["tokens"] > 1000 and run["torch"] == torch.__version__
    scores = json.loads((finished.folder / "scores.json").read_text())
    assert scores["verdict"] in (finished.folder / "README.md").read_text()
    steps = [r["step"] for r in log if "loss" in r]
    assert steps == list(range(1, 2 * per_epoch + 1))


def test_every_row_is_learned_from_once_an_epoch(tune, monkeypatch):
    seen = []
    inner = MaskedLanguageModel.step
    monkeypatch.setattr(MaskedLanguageModel, "step", lambda self, step, epoch, rows, budget: (
        seen.append((epoch, self.train[rows].tolist())), inner(self, step, epoch, rows, budget))[1])  # fmt: skip
    finished, _, _ = tune(epochs=2)
    rows = json.loads((finished.folder / "run.json").read_text())["data"]["train_rows"]
    orders = [sum((r for e, r in seen if e == epoch), []) for epoch in (0, 1)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    assert len(set(orders[0])) == len(orders[0]) == rows


def test_max_steps(tune):
    finished, log, _ = tune(max_steps=3, epochs=5)
    assert log[-1]["step"] == 3
    assert json.loads((finished.folder / "run.json").read_text())["ended"] == "all steps done"
    rates = [r["lr"] for r in log if "lr" in r]
    assert rates[0] == pytest.approx(5e-3) and rates[-1] == pytest.approx(5e-3 / 2)  # the schedule fits the three steps


@pytest.mark.parametrize("kind", ["bert", "minilm"])
def test_a_tiny_budget_of_minutes(tune, kind):
    """Over after one step, for minilm while its fresh head is still trained alone; what was learned is scored."""
    finished, log, notes = tune(kind, minutes=1e-9, epochs=3, head_steps=5 if kind == "minilm" else None, eval_steps=7)
    run = json.loads((finished.folder / "run.json").read_text())
    assert run["steps"] == 1 and run["ended"].endswith("minutes are over")
    assert [r["step"] for r in log if "dev_loss" in r] == [0, 1]
    assert finished.scores["verdict"]
    assert not AutoModelForMaskedLM.from_pretrained(finished.folder, output_loading_info=True)[1]["missing_keys"]


def scripted(monkeypatch, values, measure="dev_loss"):
    """Scores that follow a script, so that what is best is known."""
    left = list(values)
    inner = MaskedLanguageModel.score

    def score(self):
        return {**inner(self), measure: left.pop(0)}

    monkeypatch.setattr(MaskedLanguageModel, "score", score)


def test_patience_stops_early(tune, monkeypatch):
    scripted(monkeypatch, [5.0, 4.0, 4.5, 4.0, 3.0])
    finished, log, _ = tune(epochs=9, eval_steps=2, patience=2)
    assert log[-1]["step"] == 6  # scored at 0, 2, 4 and 6; a tie is not better
    run = json.loads((finished.folder / "run.json").read_text())
    assert run["ended"] == "dev_loss did not get better in 2 scorings"
    assert finished.scores["best_step"] == 2


@pytest.mark.parametrize("measure, values", [("dev_loss", [5, 3, 4, 6]), ("dev_accuracy", [0.1, 0.5, 0.2, 0.4])])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_best_weights_are_the_ones_that_are_left(tune, monkeypatch, measure, values, precision):
    scripted(monkeypatch, values, measure)
    best = {}
    inner = checkpoint.save_best

    def save_best(folder, step, tensors):
        best[step] = {name: tensor.clone() for name, tensor in tensors.items()}
        inner(folder, step, tensors)

    monkeypatch.setattr(checkpoint, "save_best", save_best)
    finished, log, _ = tune(max_steps=6, eval_steps=2, measure=measure, precision=precision)
    assert finished.scores["best_step"] == 2 and log[-1]["step"] == 6
    left = load_file(finished.folder / "model.safetensors")
    assert sorted(best) == [0, 2] and len(best[2]) > 20
    for name, tensor in best[2].items():
        assert torch.equal(left[name], tensor)
    assert any(not torch.equal(best[0][name], best[2][name]) for name in best[2])


def test_nothing_gained_leaves_the_base(tune, monkeypatch, tiny_model):
    scripted(monkeypatch, [1.0, 2.0, 3.0])
    finished, _, _ = tune(max_steps=4, eval_steps=2)
    assert finished.scores["best_step"] == 0 and finished.scores["difference"] is None
    before, after = (load_file(f / "model.safetensors") for f in (tiny_model("bert"), finished.folder))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_unknown_measure_is_an_error_before_any_step(tune, tmp_path):
    says = r"no dev measure 'dev_los' \(did you mean 'dev_loss'\?\); there are dev_loss, "
    with pytest.raises(UserError, match=says):
        tune(measure="dev_los")
    assert list(tmp_path.iterdir()) == []


def break_steps(monkeypatch, bad, value=float("nan")):
    """Gradients of the named steps hold NaN."""
    inner = MaskedLanguageModel.step

    def step(self, number, epoch, rows, budget):
        result = inner(self, number, epoch, rows, budget)
        if number in bad:
            next(p for p in self.model.parameters() if p.grad is not None).grad.view(-1)[0] = value
        return result

    monkeypatch.setattr(MaskedLanguageModel, "step", step)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_steps_that_are_not_finite_are_left_out_and_said(tune, monkeypatch, value):
    break_steps(monkeypatch, {2, 4}, value)
    finished, log, notes = tune(max_steps=6)
    events = [n for n in notes if "not finite" in n]
    assert [e.split(":")[0] for e in events] == ["step 2", "step 4"] and all("rows [" in e for e in events)
    assert [r["step"] for r in log if "loss" in r and r["loss"] is None] == [3, 5]
    assert all(torch.isfinite(t).all() for t in load_file(finished.folder / "model.safetensors").values())
    assert "not finite" in (finished.folder / "README.md").read_text()


def test_an_update_that_is_left_out_changes_nothing(tune, monkeypatch):
    states = {}
    inner = checkpoint.save

    def save(folder, state, tensors):
        states[state.step] = {name: tensor.clone() for name, tensor in tensors.items()}
        return inner(folder, state, tensors)

    monkeypatch.setattr(checkpoint, "save", save)
    break_steps(monkeypatch, {2})
    tune(max_steps=4, checkpoint_steps=1)
    assert all(torch.equal(states[2][name], states[3][name]) for name in states[2])
    assert any(not torch.equal(states[3][name], states[4][name]) for name in states[3])


def test_divergence_stops_the_run(tune, monkeypatch, tmp_path):
    break_steps(monkeypatch, range(3, 99))
    with pytest.raises(UserError, match="training diverged: 3 steps in a row") as caught:
        tune(epochs=3, checkpoint_steps=2)
    assert "--lr" in caught.value.fix
    assert not (tmp_path / "out").exists()
    state, tensors, _ = checkpoint.newest(tmp_path / "out.running" / "checkpoints")
    assert state.step <= 4 and all(torch.isfinite(t).all() for t in tensors.values())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])  # fmt: skip
def test_out_of_memory_halves_the_budget_and_changes_nothing_else(tune, monkeypatch, error):
    whole, log, _ = tune(out="whole", max_steps=5)
    inner, struck = torch.Tensor.backward, []

    def backward(self, *args, **kwargs):
        struck.append(1)
        if len(struck) == 4:  # in the middle of a batch: some of its gradients are there already
            raise error
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    halved, same, notes = tune(out="halved", max_steps=5)
    assert [n for n in notes if "out of memory, token budget halved to 128" in n]
    assert "halved to 128" in (halved.folder / "README.md").read_text()
    before, after = (load_file(f.folder / "model.safetensors") for f in (whole, halved))
    for name in before:
        if "key.bias" not in name:  # its gradient is rounding noise, which Adam scales up
            torch.testing.assert_close(after[name], before[name], atol=1e-5, rtol=1e-4)
    losses = [[r["loss"] for r in records if "loss" in r] for records in (log, same)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_other_errors_are_not_taken_for_a_lack_of_memory(tune, monkeypatch):
    def step(*args):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(MaskedLanguageModel, "step", step)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        tune(max_steps=2)


@pytest.mark.parametrize("kind", ["bert", "minilm", "modernbert"])
def test_bf16_runs_and_keeps_float32_masters(tune, kind):
    finished, log, _ = tune(kind, precision="bf16", epochs=4, head_steps=3 if kind == "minilm" else None)
    assert finished.scores["tuned"]["dev_loss"] < finished.scores["baseline"]["dev_loss"] - 0.1
    left = load_file(finished.folder / "model.safetensors")
    bert, modern = "bert.encoder.layer.0.attention.self.query.weight", "model.layers.0.attn.Wqkv.weight"
    moved = left[modern if kind == "modernbert" else bert]
    assert moved.dtype == torch.float32 and not torch.equal(moved, moved.bfloat16().float())


def test_rows_of_your_own_to_score_on(tune, text_file, tmp_path):
    dev = tmp_path / "dev.txt"
    new = [line for line in corpus(60, seed=8).splitlines() if len(line.split()) > 8]
    dev.write_text("\n".join(new[:20] + text_file.read_text().splitlines()[:5]) + "\n")
    finished, _, notes = tune(dev=str(dev), max_steps=3)
    data = json.loads((finished.folder / "run.json").read_text())["data"]
    assert data["train_rows"] == 200 and data["dev_rows"] == 16
    assert any("scored on the first 16 of" in note for note in notes)
    assert not any("flatter" in note for note in notes)
    dev.write_text("\n".join(text_file.read_text().splitlines()[:8]) + "\n")
    _, _, notes = tune(out="leaky", dev=str(dev), max_steps=3)
    assert any("8 of 8 dev rows also stand in the training text" in note for note in notes)


def test_texts_given_in_python(tune):
    lines = [line for line in corpus(60).splitlines() if line]
    finished, _, _ = tune(train=lines, max_steps=2)
    assert "rows given in Python" in (finished.folder / "recipe.toml").read_text()


def test_new_words_end_in_the_saved_model(tune, tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(corpus(80).replace("\n", " zuzazebiko\n"))
    finished, _, notes = tune(train=str(path), add_words=1, max_steps=3)
    assert any("new vocabulary: 1 words" in note for note in notes)
    vocabulary = json.loads((finished.folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert vocabulary["zuzazebiko"] == 200
    assert json.loads((finished.folder / "config.json").read_text())["vocab_size"] == 201


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_rows_as_long_as_the_model_allows_and_no_longer(tune, kind, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("\n".join(" ".join(corpus(40, seed=n).split()) for n in range(12)) + "\n")
    finished, _, notes = tune(kind, train=str(path), max_steps=2, max_length=128)
    assert any("12 rows longer than 128 tokens were chunked, none cut" in note for note in notes)
    with pytest.raises(UserError, match="129 tokens are more than the 128 positions of the model"):
        tune(kind, "longer", train=str(path), max_length=129)
    assert not (tmp_path / "longer.running").exists()


def test_whole_words_and_mask_rate_change_the_training_not_the_scoring(tune):
    one, _, _ = tune(out="one", max_steps=2)
    two, _, _ = tune(out="two", max_steps=2, whole_words=True, mask_rate=0.5)
    assert one.scores["baseline"]["dev_accuracy"] >= 0
    assert digests(one.folder)["model.safetensors"] != digests(two.folder)["model.safetensors"]


def test_the_mask_rate_of_the_architecture(tune):
    for kind, rate in (("bert", 0.15), ("modernbert", 0.3)):
        finished, _, _ = tune(kind, kind, max_steps=1)
        assert schema.read_toml(finished.folder / "recipe.toml")["mask_rate"] == rate


def test_scratch_makes_its_own_tokenizer_and_model(tune, tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, '
                      '"intermediate_size": 64, "max_position_embeddings": 64}')  # fmt: skip
    finished, _, notes = tune(model=config, scratch=True, vocab_size=200, max_steps=20, epochs=9)
    assert finished.scores["tuned"]["dev_loss"] < finished.scores["baseline"]["dev_loss"]
    assert not AutoModelForMaskedLM.from_pretrained(finished.folder, output_loading_info=True)[1]["missing_keys"]
    assert not any("fresh one" in note for note in notes)
    again, _, _ = tune(out="again", model=config, scratch=True, vocab_size=200, max_steps=20, epochs=9)
    assert digests(again.folder) == digests(finished.folder)


def test_a_run_draws_its_loss(tune):
    finished, _, _ = tune(max_steps=2)
    assert (finished.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (finished.folder / "loss.svg").read_bytes()


def test_a_name_that_is_none(tmp_path):
    with pytest.raises(UserError, match="no name for an output folder"):
        finetune(MLM(train="x"), "/")


def test_nothing_is_left_after_an_early_mistake(tune, tmp_path):
    with pytest.raises(UserError, match="too few to hold any out"):
        tune(train=["only one line"])
    with pytest.raises(UserError):
        tune(train=str(tmp_path / "absent.txt"))
    assert not list(tmp_path.glob("out*"))


def test_a_log_torn_by_a_kill_ends_at_the_tear(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [r["step"] for r in engine.read_log(tmp_path)] == [1, 2]
    assert engine.read_log(tmp_path / "absent") == []


def test_a_model_folder_inside_the_output_is_not_harmed(tune, tiny_model, tmp_path):
    """Fine-tuning a finished folder again, under the same name, works from the old one and replaces it whole."""
    finished, _, _ = tune(max_steps=2)
    first = digests(finished.folder)
    lines = [line for line in corpus(60).splitlines() if line][:45]
    recipe = MLM(train=lines, model=str(finished.folder), dev_rows=8, loop=Loop(**QUICK, max_steps=2))
    again = finetune(recipe, finished.folder, force=True)
    run = json.loads((again.folder / "run.json").read_text())
    assert run["model weights"] == first["model.safetensors"] and run["data"]["lines"] == 45
    assert not (tmp_path / "out.old").exists()
