import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from embedtune.errors import UserError
from embedtune.judge.regression import MEASURES, regression_report
from embedtune.judge.report import from_dict

ABOUT = {"model": "m", "data": "d"}


def judged(gold, predicted):
    return regression_report(gold, predicted, items=[f"f.csv:{n}" for n in range(len(gold))], **ABOUT)


def scores(seed: int, n: int):
    draw = np.random.default_rng(seed)
    gold = np.round(draw.uniform(0, 5, n) * 2) / 2
    return gold, gold + draw.standard_normal(n)


@pytest.mark.parametrize("n", [4, 300])
def test_same_as_scipy_and_scikit_learn(n):
    gold, predicted = scores(n, n)
    assert judged(gold, predicted).summary == pytest.approx(
        {
            "pearson": stats.pearsonr(gold, predicted)[0],
            "spearman": stats.spearmanr(gold, predicted)[0],
            "MAE": metrics.mean_absolute_error(gold, predicted),
            "RMSE": metrics.root_mean_squared_error(gold, predicted),
            "R2": metrics.r2_score(gold, predicted),
        },
        abs=1e-12,
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=9))
def test_a_few_scores_with_many_ties(pairs):
    gold, predicted = np.array(pairs, float).T / 4  # without rounding: of that scikit-learn makes a spread
    summary = judged(gold, predicted).summary
    assert summary["R2"] == pytest.approx(metrics.r2_score(gold, predicted), abs=1e-9)
    assert summary["RMSE"] == pytest.approx(metrics.root_mean_squared_error(gold, predicted), abs=1e-12)
    assert np.isfinite(list(summary.values())).all()


def test_scores_that_are_all_the_same():
    flat = np.full(7, 0.1 + 0.2)
    assert judged(flat, flat).summary == {"pearson": 0, "spearman": 0, "MAE": 0, "RMSE": 0, "R2": 1}
    off = judged(flat, flat + 0.5).summary
    assert off["R2"] == 0 and off["RMSE"] == pytest.approx(0.5)
    assert judged([1.0], [3.0]).summary == {"pearson": 0, "spearman": 0, "MAE": 2, "RMSE": 2, "R2": 0}


@pytest.mark.parametrize("name", MEASURES)
def test_weights_are_repetitions(name):
    gold, predicted = scores(1, 60)
    weights = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), 20)
    weights[0] = 0
    weights[0, 7] = 5
    for row, value in zip(weights, MEASURES[name](gold, predicted, weights.astype(float))):
        repeated = judged(np.repeat(gold, row), np.repeat(predicted, row))
        assert value == pytest.approx(repeated.summary[name], abs=1e-12)


def test_goes_through_json():
    report = judged(*scores(2, 20))
    again = from_dict(json.loads(json.dumps(report.as_dict(), allow_nan=False)))
    assert again.as_dict() == report.as_dict() and report.dim == 0 and report.task == "regression"
    np.testing.assert_array_equal(again.predicted, report.predicted)
    assert report.summary["MAE"] == again.values["MAE"].mean()


def test_what_cannot_be_judged():
    with pytest.raises(UserError, match="d: has nothing to judge on"):
        judged([], [])
    with pytest.raises(ValueError, match="3 items, 3 gold, 2 predicted"):
        judged([1, 2, 3], [1, 2])
    for wrong in (np.nan, np.inf):
        with pytest.raises(ValueError, match="not finite"):
            judged([1, 2, 3], [1, 2, wrong])
