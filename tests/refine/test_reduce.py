import json

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from conftest import corpus
from embedtune import cli
from embedtune.errors import UserError
from embedtune.refine.erase import Texts
from embedtune.refine.reduce import fit_reduction, isotropy, reduce
from embedtune.refine.statistics import Statistics

METHODS = ("pca", "whiten", "truncate", "top")


def vectors(n=500, d=12):
    draw = np.random.default_rng(0)
    return draw.normal(size=(n, d)) @ np.diag(np.logspace(0.5, -1, d)) @ np.linalg.qr(draw.normal(size=(d, d)))[0] + 1


def moments(x):
    return Statistics.of(x, np.zeros((len(x), 0)))


def test_pca_keeps_dot_products_best():
    x = vectors()
    y = fit_reduction(moments(x), 4, "pca")(x)
    values = np.linalg.svd(x, compute_uv=False)
    assert ((x @ x.T - y @ y.T) ** 2).sum() == pytest.approx((values[4:] ** 4).sum(), rel=1e-6)  # Eckart-Young


def test_whitened_vectors_have_the_identity_as_covariance():
    x = vectors()
    y = fit_reduction(moments(x), 5, "whiten")(x)
    assert np.allclose(np.cov(y.T, bias=True), np.eye(5), atol=1e-9) and np.allclose(y.mean(0), 0, atol=1e-9)
    assert isotropy(moments(y), np.zeros(5)).isoscore == pytest.approx(1)


def test_top_drops_the_mean_and_the_leading_component_and_truncate_cuts():
    x = vectors()
    y = fit_reduction(moments(x), 11, "top")(x)
    assert np.allclose(y.mean(0), 0, atol=1e-9)
    spread = np.linalg.eigvalsh(np.cov(x.T, bias=True))
    assert np.allclose(np.linalg.eigvalsh(np.cov(y.T, bias=True)), spread[:-1], rtol=1e-6)
    assert np.array_equal(fit_reduction(moments(x), 3, "truncate")(x), x[:, :3])


def test_isoscore_at_its_ends_and_what_mean_cosine_does_not_see():
    draw = np.random.default_rng(0)
    flat = moments(np.vstack([np.eye(6), -np.eye(6)]))
    line = moments(np.outer(draw.normal(size=50), np.eye(6)[0]))
    assert isotropy(flat, np.zeros(6)).isoscore == pytest.approx(1)
    assert isotropy(line, np.zeros(6)).isoscore == pytest.approx(0, abs=1e-9)
    # Half of the dimensions used evenly: a half, though the mean cosine is that of the isotropic cloud.
    half = np.hstack([np.vstack([np.eye(50), -np.eye(50)]), np.zeros((100, 50))])
    assert isotropy(moments(half), np.zeros(100)).isoscore == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_more_dimensions_than_live_are_refused(method):
    x = vectors()
    x[:, 3] = x[:, 4]
    for to in (0, 13 if method == "truncate" else 12 + (method == "pca")):
        with pytest.raises(UserError, match="cannot be kept"):
            fit_reduction(moments(x), to, method)
    with pytest.raises(UserError, match="must be one of"):
        fit_reduction(moments(x), 3, "tsne")


@pytest.mark.parametrize("method", METHODS)
def test_a_stock_model_gives_the_reduced_vectors(tiny_model, tmp_path, method):
    lines = [line for line in corpus(150).splitlines() if line]
    reduced = reduce(str(tiny_model("minilm")), Texts(lines), 6, method, tmp_path / "out")
    stock = SentenceTransformer(str(tmp_path / "out"), device="cpu", local_files_only=True)
    assert stock.get_embedding_dimension() == 6 and reduced.dimensions == (32, 6)
    small, full = stock.encode(lines), SentenceTransformer(str(tiny_model("minilm")), device="cpu").encode(lines)
    assert np.allclose(np.linalg.norm(small, axis=1), 1, atol=1e-5)
    assert reduced.after.mean_cosine == pytest.approx(np.mean(small @ small.T), abs=1e-4)
    assert reduced.before.mean_cosine == pytest.approx(np.mean(full @ full.T), abs=1e-4)
    if method == "pca":
        best = np.linalg.svd(full.astype(float), full_matrices=False)[2][:6]
        wanted = full @ best.T
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
        assert np.allclose(small @ small.T, wanted @ wanted.T, atol=1e-4)


def test_the_command(tiny_model, text_file, tmp_path, capsys):
    words = ["refine", "reduce", str(tiny_model("minilm")), "--data", str(text_file), "--to", "5", "--rows", "90"]
    assert cli.run([*words, "--out", str(tmp_path / "a")]) == 0
    assert "IsoScore" in capsys.readouterr().out
    assert cli.run([*words, "--out", str(tmp_path / "b"), "--method", "whiten", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["n"] == 90 and told["after"]["isoscore"] > told["before"]["isoscore"]
    assert cli.run([*words, "--out", str(tmp_path / "a")]) == 2
    assert "--force" in capsys.readouterr().err
