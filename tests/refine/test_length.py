import json
import shutil
import warnings

import numpy as np
import pytest
import torch

from embedtune.encoder.embed import Embedded
from embedtune.errors import UserError
from embedtune.refine.length import DIRECTION, SIDECAR, fit_length, remove_length_direction, save_length

D = 12


def embeddings(n=4000, seed=0, noise=1.0, spread=1.0):
    """Anisotropic vectors along two of whose directions token length and its logarithm are written."""
    rng = np.random.default_rng(seed)
    tokens = np.clip(rng.lognormal(3.5, 0.8, n), 3, 256).astype(np.int64)
    x = rng.standard_normal((n, D)) * np.logspace(0, -1, D) * noise
    x[:, 3] += tokens / 100
    x[:, 7] += np.log(tokens) / 4
    mixing = np.linalg.qr(np.random.default_rng(9).standard_normal((D, D)))[0]
    return ((x * spread) @ mixing + 2).astype(np.float32), tokens


def chunks(x, tokens, size=500, truncated=0):
    return [Embedded(x[i : i + size], tokens[i : i + size], truncated) for i in range(0, len(x), size)]


def r2(x, z):
    """In-sample R2 of a fresh ordinary least squares of z on all of x, with numpy alone."""
    x, z = x.astype(np.float64) - x.mean(0, dtype=np.float64), z - z.mean()
    return 1 - np.sum((z - x @ np.linalg.lstsq(x, z, rcond=None)[0]) ** 2) / np.sum(z**2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_length(path, fit_length(chunks(*embeddings())))
    return path


def test_read_out_is_least_squares_and_longer_is_positive():
    x, tokens = embeddings()
    report = fit_length(chunks(x, tokens))
    assert report.n_fit + report.n_held_out == len(x)
    assert 0.15 < report.n_held_out / len(x) < 0.25
    for read_out, z in ((report.tokens, tokens), (report.log_tokens, np.log(tokens))):
        assert np.linalg.norm(read_out.direction) == pytest.approx(1)
        assert np.linalg.norm(read_out.g) == pytest.approx(1)
        predicted = read_out.intercept + read_out.scale * (x @ read_out.direction)
        assert np.corrcoef(predicted, z)[0, 1] > 0.5
        assert predicted.mean() == pytest.approx(z.mean(), rel=0.02)
        assert read_out.r2_fit == pytest.approx(r2(x, z), abs=0.02)


def test_held_out_r2_from_moments_equals_the_one_from_predictions():
    x, tokens = embeddings()
    report = fit_length(chunks(x, tokens))
    assert len(report.true) == report.n_held_out  # the sample is everything here
    error, total = np.mean((report.true - report.predicted) ** 2), np.var(report.true)
    assert report.tokens.r2 == pytest.approx(1 - error / total, abs=1e-9)
    low, high = report.tokens.interval
    assert low < report.tokens.r2 < high


def test_chunking_changes_nothing_and_the_seed_does():
    x, tokens = embeddings(20_000)
    a, b = (fit_length(chunks(x, tokens, size), keep=2000) for size in (1000, 77))
    np.testing.assert_allclose(a.tokens.direction, b.tokens.direction, rtol=1e-9)
    np.testing.assert_array_equal(a.true, b.true)
    assert 900 < len(a.true) <= 2000
    assert a.tokens.interval == pytest.approx(b.tokens.interval, rel=1e-6)
    assert not np.array_equal(a.true, fit_length(chunks(x, tokens), keep=2000, seed=1).true)


def test_interval_covers_the_population_r2():
    """95 % nominal; 40 simulations, so fewer than 33 hits would be a fault (probability about 0.001)."""
    truth = r2(*embeddings(400_000, seed=99))
    hits = 0
    for seed in range(40):
        low, high = fit_length(chunks(*embeddings(6000, seed=seed))).tokens.interval
        hits += low - 0.003 <= truth <= high + 0.003  # fitted is a little worse than best
    assert hits >= 33


def test_no_linear_read_out_is_left_on_the_fitted_rows(tmp_path):
    x, tokens = embeddings()
    report = fit_length(chunks(x, tokens))
    save_length(tmp_path, report)
    y = remove_length_direction(x.astype(np.float64), tmp_path)
    # The same stream again: its fitted rows are the same rows.
    again = fit_length(chunks(y, tokens))
    assert report.tokens.r2_fit > 0.5
    assert again.tokens.r2_fit < 1e-12
    assert again.log_tokens.r2_fit == pytest.approx(report.log_r2_left, abs=1e-6)
    assert again.log_tokens.r2_fit < report.log_tokens.r2_fit
    assert r2(remove_length_direction(x, tmp_path), tokens) < 0.01


def test_projecting_out_the_regression_direction_alone_leaves_most():
    x, tokens = embeddings()
    b = fit_length(chunks(x, tokens)).tokens.direction
    assert r2(x - np.outer(x @ b, b), tokens) > 0.1


def test_fresh_rows_get_about_d_over_n_back(tmp_path):
    n, back = 1500, []
    for seed in range(8):
        report = fit_length(chunks(*embeddings(n, seed=seed)))
        save_length(tmp_path, report)
        x, tokens = embeddings(60_000, seed=100 + seed)
        back.append(r2(remove_length_direction(x.astype(np.float64), tmp_path), tokens))
    assert 0.3 < np.mean(back) / ((D - 1) / (0.8 * n)) < 2.5


def test_dead_dimensions_get_no_weight_and_are_guarded(tmp_path):
    x, tokens = embeddings()
    dead = (tokens[:, None] * 1e-9).astype(np.float32)  # knows the length, and is nothing but rounding
    x = np.hstack([x, dead])
    report = fit_length(chunks(x, tokens))
    assert report.live == D
    assert report.tokens.direction[-1] == 0
    save_length(tmp_path, report)
    again = fit_length(chunks(remove_length_direction(x.astype(np.float64), tmp_path), tokens))
    assert again.tokens.r2_fit < 1e-12
    y = remove_length_direction(x.astype(np.float64), tmp_path)[:, -1:]
    assert r2(y, tokens) < 0.01 * r2(dead, tokens)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_type_and_shape_are_kept_and_twice_is_once(folder, dtype):
    x = embeddings(50)[0].astype(dtype)
    y = remove_length_direction(x, folder)
    assert type(y) is np.ndarray and y.dtype == dtype and y.shape == x.shape
    again = remove_length_direction(y, folder)
    np.testing.assert_allclose(again, y, atol=40 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(remove_length_direction(x[4], folder), y[4])
    assert remove_length_direction(x[:0], folder).shape == (0, D)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_torch_gives_what_numpy_gives(folder, dtype):
    x = torch.from_numpy(embeddings(50)[0]).to(dtype)
    y = remove_length_direction(x, folder)
    assert y.dtype == dtype and y.device == x.device and y.shape == x.shape
    expected = remove_length_direction(x.double().numpy(), folder)
    np.testing.assert_allclose(y.double().numpy(), expected, atol=8 * torch.finfo(dtype).eps)
    assert remove_length_direction(x[0], folder).shape == (D,)


def test_torch_gradients_flow(folder):
    x = torch.from_numpy(embeddings(5)[0]).requires_grad_()
    remove_length_direction(x, folder).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.any()


def test_files_and_sidecar(folder):
    names = {p.name for p in folder.iterdir()}
    assert names == {DIRECTION, SIDECAR, "length.png", "length.svg"}
    direction = np.load(folder / DIRECTION, allow_pickle=False)
    about = json.loads((folder / SIDECAR).read_text())
    assert direction.shape == (D,)
    assert about["kind"] == "length" and about["space"] == "raw" and about["dimension"] == D
    np.testing.assert_array_equal(about["tokens"]["direction"], direction)
    assert about["tokens"]["interval"][0] < about["tokens"]["r2"] < about["tokens"]["interval"][1]
    x, tokens = embeddings()
    predicted = about["tokens"]["intercept"] + about["tokens"]["scale"] * (x @ direction)
    assert 1 - np.var(tokens - predicted) / np.var(tokens) == pytest.approx(about["tokens"]["r2"], abs=0.1)


def test_the_same_report_gives_the_same_bytes(tmp_path):
    report = fit_length(chunks(*embeddings()))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_length(tmp_path / name, report)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_a_bare_direction_is_projected_out_with_a_warning(folder, tmp_path):
    shutil.copy(folder / DIRECTION, tmp_path)
    x = embeddings(50)[0]
    with pytest.warns(UserWarning, match="leaves most"):
        y = remove_length_direction(x, tmp_path)
    np.testing.assert_allclose(y @ np.load(tmp_path / DIRECTION), 0, atol=1e-5)


def test_the_space_is_checked(folder, tmp_path):
    x, tokens = embeddings(spread=0.3)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    with pytest.raises(UserError, match="normalised"):
        remove_length_direction(unit, folder)
    save_length(tmp_path, fit_length(chunks(unit, tokens)))
    once = remove_length_direction(unit, tmp_path)
    np.testing.assert_allclose(remove_length_direction(once, tmp_path), once, atol=1e-5)
    with pytest.raises(UserError, match="raw"):
        remove_length_direction(x, tmp_path)


def test_mistakes_are_user_errors(folder, tmp_path):
    x, tokens = embeddings(50)
    broken = x.copy()
    broken[7, 2] = np.nan
    for bad, words in (
        (x[:, :5], "5 dimensions"),
        (broken, "row 7"),
        (tokens, "floating"),
        (x[None], "shape"),
    ):
        with pytest.raises(UserError, match=words):
            remove_length_direction(bad, folder)
    with pytest.raises(UserError, match="refine length"):
        remove_length_direction(x, tmp_path / "nowhere")
    with pytest.raises(UserError, match="no such folder"):
        save_length(tmp_path / "nowhere", fit_length(chunks(*embeddings())))


@pytest.mark.parametrize("damage", ["direction", "sidecar", "g", "objects"])
def test_damaged_files_are_not_believed(folder, tmp_path, damage):
    for name in (DIRECTION, SIDECAR):
        shutil.copy(folder / name, tmp_path)
    if damage == "direction":
        np.save(tmp_path / DIRECTION, np.ones(D))
    elif damage == "objects":
        np.save(tmp_path / DIRECTION, np.array([{}]), allow_pickle=True)
    else:
        about = json.loads((tmp_path / SIDECAR).read_text())
        about["tokens"]["g"] = about["tokens"]["g"][:3]
        (tmp_path / SIDECAR).write_text("{" if damage == "sidecar" else json.dumps(about))
    with warnings.catch_warnings(), pytest.raises(UserError):
        warnings.simplefilter("error")
        remove_length_direction(embeddings(9)[0], tmp_path)


def test_too_little_or_hopeless_data_is_refused():
    x, tokens = embeddings(400)
    for call, words in (
        (lambda: fit_length([]), "0 texts"),
        (lambda: fit_length(chunks(x[:60], tokens[:60])), "60 texts"),
        (lambda: fit_length(chunks(x, np.full(400, 9))), "same number"),
        (lambda: fit_length(chunks(np.ones_like(x), tokens)), "no dimension"),
        (lambda: fit_length(chunks(np.random.default_rng(0).random((400, 500)), tokens)), "cannot determine"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    x[333] = np.inf
    with pytest.raises(UserError, match="row 333"):
        fit_length(chunks(x, tokens, 100))


def test_the_lines_say_what_is_and_is_not_removed():
    text = "\n".join(fit_length(chunks(*embeddings(), truncated=3)).lines())
    for words in ("held-out", "interval", "not linear", "log length", "24 texts", "normalise"):
        assert words in text


def test_a_length_that_is_not_there_has_no_r2():
    x, tokens = embeddings()
    report = fit_length(chunks(np.random.default_rng(5).standard_normal(x.shape).astype(np.float32), tokens))
    assert abs(report.tokens.r2) < 0.02
