"""The oracle form: means and covariances of all cells become one, fresh rows included; its folder; its certificate."""

import json
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from test_erase import encoded, read, rows, shapes  # noqa: F401 - fixtures
from test_eraser import probe

from embedtune import Eraser, Oracle, cli
from embedtune.errors import UserError
from embedtune.nearest import unit
from embedtune.refine.certify import Fresh, Judged, certify
from embedtune.refine.concepts import Encoding, Survey
from embedtune.refine.erase import Erasure, Texts
from embedtune.refine.eraser import leace
from embedtune.refine.oracle import cells, fit_transport
from embedtune.refine.statistics import Statistics
from embedtune.refine.told import erase_told

CLASSES = Encoding("c", "category", ("a", "b", "c"))


def chunks(x, w, size=500):
    return lambda: ((x[i : i + size], w[i : i + size]) for i in range(0, len(x), size))


def planted(n, d=6, seed=0):
    """Vectors whose mean and covariance differ between three classes, one of them rare."""
    draw = np.random.default_rng(seed)
    law = np.random.default_rng(99)
    means, roots = law.normal(size=(3, d)), law.normal(size=(3, d, d)) / 2 + np.eye(d)
    labels = draw.choice(3, n, p=[0.6, 0.3, 0.1])
    x = means[labels] + np.einsum("nij,nj->ni", roots[labels], draw.normal(size=(n, d)))
    return x, labels


def test_every_class_gets_the_mean_and_the_covariance_of_all():
    x, labels = planted(60_000)
    w = cells(CLASSES, [CLASSES.classes[k] for k in labels])
    assert w.sum(1) == pytest.approx(1) and (w.argmax(1) == labels).all()
    out = fit_transport(chunks(x, w), normalise=False)(x, w)
    common = sum((labels == k).mean() * np.cov(x[labels == k].T) for k in range(3))
    for k in range(3):
        assert np.abs(out[labels == k].mean(0) - x.mean(0)).max() < 1e-9
        before, after = (np.linalg.norm(np.cov(y[labels == k].T) - common) for y in (x, out))
        assert after < 0.02 * np.linalg.norm(common) < 0.2 * before  # the shrinkage of a class of 6,000 rows is left
    # Quadratic read-outs, which no affine map touches, are gone on fresh rows too.
    fresh, truth = planted(20_000, seed=1)
    told = fit_transport(chunks(x, w), normalise=False)(fresh, np.eye(3)[truth])
    affine = leace(Statistics.of(x, w[:, 1:]))(fresh)
    target = (truth == 1).astype(float)
    squares = [np.einsum("ni,nj->nij", y, y).reshape(len(y), -1) for y in (affine, told)]
    assert probe(squares[0], target) > 0.1 and probe(squares[1], target) < 0.01


def test_the_map_moves_least_of_those_that_make_two_normal_laws_one():
    """Against the closed form of the distance of two normal laws (Bures), every coordinate in standard deviations."""
    x, labels = planted(200_000, d=3)
    w = np.eye(3)[labels]
    made = fit_transport(chunks(x, w, 20_000), normalise=False)
    common = np.cov(made(x, w).T)
    scale = np.sqrt(np.diag(common))
    x, own, common = x / scale, np.cov((x[labels == 0] / scale).T), common / np.outer(scale, scale)
    values = np.linalg.eigvals(own @ common)
    bures = np.trace(own) + np.trace(common) - 2 * np.sqrt(np.maximum(values.real, 0)).sum()
    rest = x[labels == 0] - x[labels == 0].mean(0)
    moved = (made(x * scale, w)[labels == 0] - made.rounds[0].mean) / scale
    assert np.mean(((moved - rest) ** 2).sum(1)) == pytest.approx(bures, rel=0.01)


def test_normalised_vectors_keep_no_linear_trace_and_all_smooth_functions_of_a_number_go():
    draw = np.random.default_rng(0)
    length = draw.uniform(-1, 1, 12_000)
    x = np.sin(3 * length)[:, None] * draw.normal(size=20) + np.exp(length)[:, None] * draw.normal(size=(12_000, 20))
    x = unit(x + 2)
    survey = Survey("length")
    for value in length:
        survey.add(float(value))
    w = cells(survey.encoding("function"), length)
    assert (w >= 0).all() and w.sum(1) == pytest.approx(1)
    fit, rest = slice(0, 8000), slice(8000, None)
    out = fit_transport(chunks(x[fit], w[fit]), normalise=True)(x[rest], w[rest])
    assert np.linalg.norm(out, axis=1) == pytest.approx(1)
    affine = leace(Statistics.of(x[fit], w[fit, 1:]))(x[rest])
    for target in (length[rest], np.sin(3 * length[rest])):
        assert probe(x[rest], target) > 0.3 and probe(out, target) < 0.01
    squares = [np.einsum("ni,nj->nij", y, y).reshape(len(y), -1)[:, ::3] for y in (affine, out)]
    assert probe(squares[0], length[rest]) > 0.3 and probe(squares[1], length[rest]) < 0.08


def test_a_coordinate_of_next_to_no_spread_is_erased_like_the_others():
    """Normalised, a constant tells the norm of the raw vector; a tree finds that at any scale."""
    x, labels = planted(20_000)
    x = np.column_stack([x, 1e-5 * np.exp(0.5 * (labels + 1) * np.random.default_rng(1).normal(size=len(x)))])
    w = np.eye(3)[labels]
    out = fit_transport(chunks(x, w), normalise=False)(x, w)[:, -1]
    spreads = [[each[labels == k].std() for k in range(3)] for each in (x[:, -1], out)]
    assert max(spreads[0]) > 3 * min(spreads[0]) and max(spreads[1]) < 1.5 * min(spreads[1])


def test_what_is_dead_becomes_zero():
    x, labels = planted(2000)
    x = np.column_stack([x, 5 + 1e-9 * labels, 1e-33 * labels])
    out = fit_transport(chunks(x, np.eye(3)[labels]), normalise=True)(x, np.eye(3)[labels])
    assert not out[:, -2:].any() and np.linalg.norm(out, axis=1) == pytest.approx(1)


def test_a_missing_value_and_an_unknown_class_are_refused():
    with pytest.raises(UserError, match="1 values are missing"):
        cells(CLASSES, ["a", None])
    with pytest.raises(UserError, match="'d' is no class"):
        cells(CLASSES, ["a", "d"])


# ---- the folder


@pytest.fixture(scope="module")
def oracles(shapes, rows, tmp_path_factory):  # noqa: F811
    """Oracles of length and of the topic, fitted on the first 400 rows."""
    folder, some = tmp_path_factory.mktemp("oracles"), read(rows)[:400]
    made = {
        "length": erase_told(str(shapes["normalised"]), Texts(some), Erasure(length=True), folder / "length"),
        "topic": erase_told(str(shapes["normalised"]), Texts(some), Erasure(("topic",)), folder / "topic"),
    }
    return folder, made


def tokens_of(folder, texts):
    return np.array([len(ids) for ids in SentenceTransformer(str(folder)).tokenizer(texts)["input_ids"]])


def test_vectors_from_elsewhere_are_told_their_values(oracles, shapes, rows):  # noqa: F811
    folder, made = oracles
    vectors, some = encoded(shapes["normalised"], rows)[:400], read(rows)[:400]
    tokens = tokens_of(shapes["normalised"], [row["text"] for row in some])
    out = Oracle.load(folder / "length")(vectors, tokens)
    assert out.dtype == np.float32 and np.linalg.norm(out, axis=1) == pytest.approx(1, abs=1e-6)
    for target in (tokens, np.log(tokens)):
        assert probe(vectors, target) > 0.3 and probe(out, target) < 0.02
    same = Oracle.load(folder / "length")(torch.from_numpy(vectors).double(), tokens)
    assert same.dtype == torch.float64 and np.abs(same.numpy() - out).max() < 1e-5
    topics = [row["topic"] for row in some]
    out = Oracle.load(folder / "topic")(vectors, topics)
    assert probe(vectors, np.array(topics) == "lodi") > 0.3 > 1e-3 > probe(out, np.array(topics) == "lodi")
    assert made["topic"].r2[1] < 1e-3 < 0.3 < made["topic"].r2[0]


def test_it_says_that_it_is_no_model(oracles, tmp_path):
    folder, made = oracles
    assert "holds no model: what has to be told a value cannot be a module" in " ".join(made["length"].lines())
    assert "cannot be a module" in (folder / "length" / "README.md").read_text()
    assert sorted(path.name for path in (folder / "length").iterdir()) == [
        "README.md",
        "erasure.json",
        "erasure.safetensors",
    ]
    with pytest.raises(UserError, match=r"(?s)has to be told.*Oracle.load"):
        Eraser.load(folder / "length")


def test_wrong_input_of_an_oracle_is_refused(oracles, shapes, rows, tmp_path):  # noqa: F811
    folder, _ = oracles
    vectors, topics = encoded(shapes["normalised"], rows)[:9], [row["topic"] for row in read(rows)[:9]]
    told = Oracle.load(folder / "topic")
    for given, values, words in (
        (vectors[:, :5], topics, r"must be \(n, 24\)"),
        (vectors, topics[:-1], r"and \(8,\)"),
        (3 * vectors, topics, "the embeddings are raw"),
        (vectors, ["nothing", *topics[1:]], "is no class"),
        (np.full_like(vectors, np.nan), topics, "NaN"),
    ):
        with pytest.raises(UserError, match=words):
            told(given, values)
    shutil.copytree(folder / "topic", tmp_path / "torn")
    (tmp_path / "torn" / "erasure.safetensors").write_bytes(b"0")
    with pytest.raises(UserError, match="cannot be read"):
        Oracle.load(tmp_path / "torn")


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Erasure(("topic",), length=True), "takes one concept"),
        (Erasure(("topic",), preserve="year", kind="category"), "knows neither"),
        (Erasure(("topic",), strength=0.5), "knows neither"),
        (Erasure(length=True, kind="scalar"), "all smooth functions of length"),
    ],
)
def test_what_an_oracle_cannot_do_is_refused(shapes, rows, tmp_path, wanted, words):  # noqa: F811
    with pytest.raises(UserError, match=words):
        erase_told(str(shapes["normalised"]), Texts(rows), wanted, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_certify_knows_it(oracles, rows, shapes):  # noqa: F811
    folder, made = oracles
    found = certify(str(folder / "topic"), Fresh(read(rows)), base=str(shapes["normalised"]))
    assert found.after.rows < 200 and any("the eraser was fitted on them" in line for line in found.remarks)
    assert found.erasure.method == "oracle" and found.erasure.rows == made["topic"].n and not found.erasure.changed
    assert max(c.rho2 for c in found.after.linear) < 0.3 < max(c.rho2 for c in found.before.linear)
    judged = Judged(similarity=[("sts", [])])
    with pytest.raises(UserError, match="nothing tells the oracle 'topic'"):
        certify(str(folder / "topic"), Fresh(read(rows)), base=str(shapes["normalised"]), judged=judged)


def test_the_command_writes_it(shapes, rows, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "told"
    flags = ["--data", str(rows), "--concept", "year", "--kind", "scalar", "--method", "oracle", "--out", str(out)]
    assert cli.run(["refine", "erase", str(shapes["normalised"]), *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["concept"]["kind"] == "function"
    assert Oracle.load(out).encoding.name == "year"
    assert cli.run(["refine", "erase", str(shapes["normalised"]), *flags]) == 2
