import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from test_eraser import covariance, probe
from test_sphere import unit

from conftest import corpus
from embedtune import Eraser, cli
from embedtune.errors import UserError
from embedtune.refine.cached import cache
from embedtune.refine.concepts import encode
from embedtune.refine.erase import Erasure, Texts, erase
from embedtune.refine.reduce import reduce
from embedtune.refine.sidecar import ABOUT, WEIGHTS


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of 600 labelled texts: the label is a word that stands in the text."""
    draw, path = random.Random(1), tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [line for line in corpus(640).splitlines() if line][:600]
    with open(path, "w") as file:
        for i, line in enumerate(lines):
            topic = draw.choice(["mata", "mata", "lodi", "zuka"])
            row = {"text": f"{topic} {topic} {line}", "topic": topic, "year": 2000 + i % 7, "grade": draw.random()}
            file.write(json.dumps(row) + "\n")
    return path


def read(path):
    return [json.loads(line) for line in open(path)]


def topics(rows):
    return np.array([[row["topic"] == name for name in ("lodi", "zuka")] for row in read(rows)], float)


@pytest.fixture(scope="module")
def shapes(tiny_model, rows, tmp_path_factory):
    """The tiny model in its pipelines: with Normalize, without, with a linear Dense before it, for dot products.

    All its raw vectors point one way; a Dense with tanh, which nothing can be folded into, spreads them.
    """
    first = SentenceTransformer(str(tiny_model("minilm")), device="cpu")[0]
    bare = SentenceTransformer(modules=[first, Pooling(32, "mean")], device="cpu")
    vectors = bare.encode([row["text"] for row in read(rows)], convert_to_tensor=True).double()
    _, values, right = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    weight = (right[:24] / (values[:24, None] + values[5] / 10) * 10).float()
    spreading = Dense(32, 24, init_weight=weight, init_bias=-(weight @ vectors.mean(0).float()))
    torch.manual_seed(0)
    linear = Dense(24, 24, bias=False, activation_function=torch.nn.Identity())

    def made(name, *modules, **options):
        modules = [first, Pooling(32, "mean"), spreading, *modules]
        folder = tmp_path_factory.mktemp("shapes") / name
        SentenceTransformer(modules=modules, device="cpu", **options).save(str(folder), create_model_card=False)
        return folder

    return {
        "normalised": made("normalised", Normalize()),
        "cosine": made("cosine"),
        "dot": made("dot", similarity_fn_name="dot"),
        "dense": made("dense", linear, Normalize()),
    }


def encoded(folder, rows):
    """What stock sentence-transformers gives for the texts."""
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode([r["text"] for r in read(rows)])


@pytest.fixture(scope="module")
def baked(shapes, rows, tmp_path_factory):
    """A model with normalised output from which the topic and the length are erased, and what was said."""
    out = tmp_path_factory.mktemp("baked") / "model"
    return out, erase(str(shapes["normalised"]), Texts(rows), Erasure(("topic",), length=True), out)


def test_a_stock_model_gives_vectors_without_the_concepts_after_normalisation(baked, rows, shapes):
    out, erased = baked
    before, after = encoded(shapes["normalised"], rows), encoded(out, rows)
    assert np.allclose(np.linalg.norm(after, axis=1), 1, atol=1e-6)
    tokens = np.array(
        [len(ids) for ids in SentenceTransformer(str(out)).tokenizer([r["text"] for r in read(rows)])["input_ids"]]
    )
    lengths = [each for each in erased.concepts if each.source != "column"]
    z = np.hstack([topics(rows), encode(lengths, {}, tokens)])
    assert covariance(after, z) < 1e-6 and covariance(before, z) > 0.01
    for target in (*topics(rows).T, tokens, np.log(tokens)):
        assert probe(before, target) > 0.1 and abs(probe(after, target)) < 1e-4
    assert erased.method == "sphere" and erased.left < 1e-10 and erased.n == 600
    assert all(a > 0.1 and abs(b) < 1e-9 for a, b in erased.r2)


def test_the_report_and_the_certificate_name_one_floor(baked):
    _, erased = baked
    r = (erased.live - 1) / erased.n
    assert f"finds about {r / (1 + r):.2%} again" in " ".join(erased.lines())


def test_a_sphere_that_did_not_converge_is_noted_last_and_more_variance_is_called_so(
    baked, shapes, rows, tmp_path, monkeypatch
):
    monkeypatch.setattr("embedtune.refine.fitting.SETTLED", 0.0)
    texts = Texts(read(rows)[:40])  # few for 24 dimensions, which is noted as well
    erased = erase(str(shapes["normalised"]), texts, Erasure(("topic",)), tmp_path / "out")
    assert any("few for 24 dimensions" in each for each in erased.remarks)
    assert erased.lines()[-1].startswith(f"note: {erased.passes} passes of the sphere method did not converge: ")
    assert "did not converge" in (tmp_path / "out" / "README.md").read_text()
    grown = " ".join(replace(baked[1], variance=-0.018).lines())
    assert "the variance grew by 1.8%" in grown and "is gone" not in grown


def test_leace_before_a_normalisation_is_no_erasure(shapes, rows, tmp_path):
    erased = erase(str(shapes["normalised"]), Texts(rows), Erasure(length=True, method="leace"), tmp_path / "out")
    assert erased.r2[1][1] > 0.1 and erased.left > 1e-4
    assert covariance(encoded(tmp_path / "out", rows), [[len(row["text"])] for row in read(rows)]) > 1e-3


@pytest.mark.parametrize(
    ("shape", "method", "normalise", "modules", "place"),
    [
        ("normalised", "sphere", True, ["Transformer", "Pooling", "Dense", "Dense", "Normalize"], "own, before"),
        ("cosine", "sphere", True, ["Transformer", "Pooling", "Dense", "Dense", "Normalize"], "own, before"),
        ("dot", "leace", False, ["Transformer", "Pooling", "Dense", "Dense"], "own, at the end"),
        ("dense", "sphere", True, ["Transformer", "Pooling", "Dense", "Dense", "Normalize"], "folded"),
    ],
)
def test_where_the_map_goes_and_that_the_eraser_is_the_model(
    shapes, rows, tmp_path, shape, method, normalise, modules, place
):
    erased = erase(str(shapes[shape]), Texts(rows), Erasure(("topic",)), tmp_path / "out")
    assert erased.method == method and erased.normalised == normalise and place in erased.place
    stock = SentenceTransformer(str(tmp_path / "out"), device="cpu", local_files_only=True, trust_remote_code=False)
    assert [type(module).__name__ for module in stock] == modules
    assert stock.similarity_fn_name == ("dot" if shape == "dot" else "cosine")
    after = encoded(tmp_path / "out", rows)
    assert covariance(after, topics(rows)) < 1e-6
    base = SentenceTransformer(str(shapes[shape]), device="cpu")
    if isinstance(base[-1], Normalize):
        del base[-1]
    raw = base.encode([r["text"] for r in read(rows)])
    eraser = Eraser.load(tmp_path / "out")
    assert eraser.space == ("sphere" if normalise else "raw") and eraser.about["n_fit"] == 600
    for given in (raw, torch.tensor(raw), raw.astype(np.float64)):
        found = eraser(given)
        assert found.dtype == given.dtype and type(found) is type(given)
        assert np.abs(np.asarray(found) - after).max() < 1e-5 * np.abs(after).max()
    assert np.abs(eraser(raw.astype(np.float16)).astype(float) - after).max() < 0.02 * np.abs(after).max()
    assert np.allclose(eraser(raw[3]), after[3], atol=1e-5 * np.abs(after).max())


def test_the_space_the_dimension_and_the_model_are_checked(baked, rows, tmp_path):
    out, _ = baked
    eraser = Eraser.load(out)
    after = encoded(out, rows)
    with pytest.raises(UserError, match="are normalised"):
        eraser(after)  # what was erased once is not taken for raw vectors
    with pytest.raises(UserError, match="5 dimensions"):
        eraser(after[:, :5])
    bad = after.copy()
    bad[3, 3] = np.nan
    with pytest.raises(UserError, match="row 3"):
        eraser(bad)
    changed = tmp_path / "changed"
    shutil.copytree(out, changed)
    model = SentenceTransformer(str(changed), device="cpu")
    with torch.no_grad():
        next(model[0].parameters()).add_(0.01)
    model.save(str(changed))
    with pytest.raises(UserError, match="changed after the erasure.*model.safetensors"):
        Eraser.load(changed)
    with pytest.raises(UserError, match="nothing was erased"):
        Eraser.load(tmp_path)


@pytest.mark.parametrize("name", [ABOUT, WEIGHTS])
def test_a_damaged_record_is_not_believed(baked, tmp_path, name):
    for each in (ABOUT, WEIGHTS):
        shutil.copy(baked[0] / each, tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError):
        Eraser.load(tmp_path)


def test_a_second_erasure_is_refused_and_a_joint_one_takes_both(baked, rows, tmp_path):
    out, erased = baked
    with pytest.raises(UserError, match="length, topic was erased.*\n.*together, from"):
        erase(str(out), Texts(rows), Erasure(("grade",)), tmp_path / "second")
    assert not (tmp_path / "second").exists()
    assert {each.name for each in erased.concepts} == {"length", "topic"}


def test_a_raw_eraser_applied_twice_is_applied_once(shapes, rows, tmp_path):
    erase(str(shapes["dot"]), Texts(rows), Erasure(("topic",)), tmp_path / "out")
    eraser, raw = Eraser.load(tmp_path / "out"), encoded(shapes["dot"], rows).astype(np.float64)
    assert np.allclose(eraser(eraser(raw)), eraser(raw), atol=1e-8)


def test_rows_without_a_value_are_left_out_and_counted(shapes, rows, tmp_path):
    lines = read(rows)
    for i in (3, 50, 51):
        lines[i]["topic"] = None
    erased = erase(str(shapes["dot"]), Texts(lines), Erasure(("topic",)), tmp_path / "out")
    assert erased.n == 597 and "3 rows left out: no value of topic" in erased.remarks


def test_preserve_strength_and_first_rows(shapes, rows, tmp_path):
    half = Erasure(("topic",), preserve="grade", strength=0.5)
    erased = erase(str(shapes["dot"]), Texts(rows, rows=400), half, tmp_path / "out")
    assert erased.n == 400 and [each.name for each in erased.concepts] == ["topic"]
    raw = encoded(shapes["dot"], rows)[:400].astype(np.float64)
    out = Eraser.load(tmp_path / "out")(raw)
    both = np.hstack([topics(rows)[:400], [[r["grade"]] for r in read(rows)[:400]]])
    cross = [(x - x.mean(0)).T @ (both - both.mean(0)) for x in (raw, out)]
    assert np.allclose(cross[1][:, :2], cross[0][:, :2] / 2, atol=1e-4 * np.abs(cross[0]).max())
    assert np.allclose(cross[1][:, 2], cross[0][:, 2], atol=1e-4 * np.abs(cross[0]).max())


def test_the_vectors_are_cached_once_whatever_the_windows(shapes, rows, tmp_path):
    model = SentenceTransformer(str(shapes["dot"]), device="cpu")
    texts = [(row["text"], row) for row in read(rows)]
    found = cache(tmp_path, model, texts)
    assert isinstance(found.x, np.memmap) and found.x.dtype == np.float32 and len(found.x) == 600
    assert np.abs(found.x - encoded(shapes["dot"], rows)).max() < 1e-5
    assert found.z.shape == (600, 0) and found.tokens.min() > 2
    with pytest.raises(UserError, match="no text"):
        cache(tmp_path, model, [])


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (Erasure(), "nothing is named"),
        (Erasure(("topic", "topic")), "named twice"),
        (Erasure(("topic",), preserve="topic"), "named twice"),
        (Erasure(("topic",), preserve="grade", method="inlp"), "cannot preserve"),
        (Erasure(("topic",), strength=2), "between 0 and 1"),
        (Erasure(("topic",), kind="colour=scalar"), "neither a concept"),
        (Erasure(("year",)), "say which"),
        (Erasure(("colour",)), "colour"),
        (Erasure(("topic",), kind="scalar"), "no numbers"),
        (Erasure(length=True, kind="category"), "length is scalar or function, not 'category'"),
        (Erasure(("topic",), kind="topic=category,length=scalar"), "'length' is neither a concept"),
    ],
)
def test_mistakes_are_user_errors_and_write_nothing(shapes, rows, tmp_path, wanted, says):
    with pytest.raises(UserError, match=says):
        erase(str(shapes["dot"]), Texts(rows), wanted, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_one_class_and_an_existing_folder_are_refused(shapes, rows, tmp_path):
    same = [{**row, "topic": "mata"} for row in read(rows)]
    with pytest.raises(UserError, match="one class only"):
        erase(str(shapes["dot"]), Texts(same), Erasure(("topic",)), tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        erase(str(shapes["dot"]), Texts(rows), Erasure(("topic",)), tmp_path / "out")
    assert erase(str(shapes["dot"]), Texts(rows), Erasure(("topic",)), tmp_path / "out", force=True).n == 600


def test_the_commands(shapes, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = str(shapes["normalised"])
    words = ["refine", "erase", model, "--data", str(rows), "--concept", "topic", "year", "--kind", "category"]
    assert cli.run([*words, "--out", "erased", "--also", "length"]) == 0
    said = capsys.readouterr().out
    assert "topic (category of 3): linear R2" in said and "year (category of 7)" in said and "log tokens" in said
    assert cli.run(["refine", "length", model, "--data", str(rows), "--erase", "--out", "short", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [c["source"] for c in told["concepts"]] == ["tokens", "log tokens"] and told["left"] < 1e-9
    assert cli.run(["refine", "length", model, "--data", str(rows), "--erase"]) == 2
    assert "--out" in capsys.readouterr().err
    assert cli.run(["refine", "length", model, "--data", str(rows), "--kind", "scalar"]) == 2
    assert "add --erase" in capsys.readouterr().err
    card = Path("erased/README.md").read_text()
    assert "topic (category of 3)" in card and "not linear" in card
    assert unit(encoded("short", rows)).shape == (600, 24)


def test_of_length_the_logarithm_alone_or_every_function_of_it(shapes, rows, tmp_path):
    ways = {
        "scalar": Erasure(length=True, kind="scalar"),
        "with-topic": Erasure(("topic",), kind="length=scalar", length=True),
        "topic-by-kind": Erasure(("topic",), kind="category", length=True),
        "function": Erasure(length=True),
    }
    found = {
        name: erase(str(shapes["normalised"]), Texts(rows), wanted, tmp_path / name) for name, wanted in ways.items()
    }
    kinds = {name: [(c.source, c.kind) for c in each.concepts if c.name == "length"] for name, each in found.items()}
    assert kinds["scalar"] == kinds["with-topic"] == [("tokens", "scalar"), ("log tokens", "scalar")]
    assert kinds["function"] == kinds["topic-by-kind"] == [("tokens", "scalar"), ("log tokens", "function")]
    assert found["scalar"].rank == 2 < found["function"].rank and found["scalar"].left < 1e-9


def test_a_prefix_that_is_normalised_anew_has_a_model_of_its_own(shapes, rows, tmp_path):
    """One map cannot free all prefixes; cutting the model first frees the one that is used."""
    cut, out = tmp_path / "cut", tmp_path / "out"
    reduce(str(shapes["normalised"]), Texts(rows), 12, "truncate", cut)
    erase(str(cut), Texts(rows), Erasure(("topic",)), out)
    after = encoded(out, rows)
    assert after.shape == (600, 12) and np.allclose(np.linalg.norm(after, axis=1), 1, atol=1e-6)
    assert covariance(after, topics(rows)) < 1e-6
    whole = tmp_path / "whole"
    erase(str(shapes["normalised"]), Texts(rows), Erasure(("topic",)), whole)
    assert covariance(unit(encoded(whole, rows)[:, :12]), topics(rows)) > 1e-5


def test_vectors_that_point_one_way_are_named_as_the_reason(tmp_path, tiny_model):
    found = erase(str(tiny_model("minilm")), Texts(corpus(300).split("\n")), Erasure(length=True), tmp_path / "out")
    assert found.left > 1e-10 and "all point one way" in found.lines()[-1]
    assert "--method top" in (tmp_path / "out" / "README.md").read_text()
