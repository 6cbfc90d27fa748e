import json
import math

import numpy as np
import pytest
from scipy import stats

from embedtune.data.pairs import ScoredPair
from embedtune.errors import UserError
from embedtune.judge import report as reports
from embedtune.judge.similarity import cosines, judge_similarity, pearson, spearman


class Known:
    """An encoder of seeded vectors that remembers what it was asked for."""

    name, dimension = "known", 16

    def __init__(self) -> None:
        self.asked = []

    def encode(self, texts, role="text"):
        self.asked += [(role, text) for text in texts]
        return np.array([np.random.default_rng(list(t.encode())).standard_normal(16) for t in texts], np.float32)


def scored(scores) -> list[ScoredPair]:
    return [ScoredPair(f"a{n % 9}", f"b{n}", score, "dir/sts.csv", n + 2) for n, score in enumerate(scores)]


def gold(n: int = 60, seed: int = 0) -> np.ndarray:
    """Scores with many ties, as people give them."""
    return np.random.default_rng(seed).integers(0, 6, n).astype(float)


@pytest.mark.parametrize("dim", [None, 16, 3])
def test_same_as_scipy(dim):
    encoder, rows = Known(), scored(gold())
    report = judge_similarity(encoder, rows, "sts", dims=(dim,))[0]
    one, two = (Known().encode(side)[:, :dim] for side in ([r.sentence1 for r in rows], [r.sentence2 for r in rows]))
    predicted = 1 - np.array([_distance(a, b) for a, b in zip(one, two)])
    np.testing.assert_allclose(report.predicted, predicted, atol=1e-6)
    assert report.summary["spearman"] == pytest.approx(stats.spearmanr(gold(), predicted)[0], abs=1e-9)
    assert report.summary["pearson"] == pytest.approx(stats.pearsonr(gold(), predicted)[0], abs=1e-6)
    assert len(encoder.asked) == len(set(encoder.asked)) == 9 + 60, "every text once"
    assert report.dim == (dim or 16) and report.items[0] == "sts.csv:2"


def _distance(a, b):
    from scipy.spatial.distance import cosine

    return cosine(a.astype(np.float64), b.astype(np.float64))


def test_same_as_sentence_transformers(tiny_model):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator

    class Folder:
        def __init__(self, model):
            self.model, self.name, self.dimension = model, "folder", model.get_embedding_dimension()

        def encode(self, texts, role="text"):
            return self.model.encode(list(texts), convert_to_numpy=True)

    model = SentenceTransformer(str(tiny_model("minilm")), device="cpu")
    rows = [ScoredPair("bada fige " * (n + 1), "kolu mane " * (n % 4 + 1), s, "f", n) for n, s in enumerate(gold(12))]
    theirs = EmbeddingSimilarityEvaluator(
        *([r.sentence1 for r in rows], [r.sentence2 for r in rows], [r.score for r in rows]), main_similarity="cosine"
    )(model)
    ours = judge_similarity(Folder(model), rows, "sts")[0].summary
    assert ours == pytest.approx({k: theirs[f"{k}_cosine"] for k in ("spearman", "pearson")}, abs=1e-5)


@pytest.mark.parametrize("ours, theirs", [(spearman, stats.spearmanr), (pearson, stats.pearsonr)])
def test_resamples_are_those_of_scipy(ours, theirs):
    """A weight is how often an item was drawn; ranks are those within the resample."""
    draw = np.random.default_rng(1)
    x, y = gold(40), np.round(gold(40) * 0.3 + draw.standard_normal(40), 1)
    rows = draw.integers(0, 40, (25, 40))
    weights = np.stack([np.bincount(r, minlength=40) for r in rows]).astype(float)
    np.testing.assert_allclose(ours(x, y, weights), [theirs(x[r], y[r])[0] for r in rows], atol=1e-12)


def test_a_constant_predicts_nothing():
    assert pearson(gold(), np.full(60, 0.1 + 0.2))[0] == spearman(gold(), np.full(60, 0.7))[0] == 0
    assert cosines(np.zeros((1, 3)), np.ones((1, 3)))[0] == 0


def test_scores_that_are_no_numbers_are_said_once():
    rows = scored([*gold(), None, math.nan, "4", math.inf, True])
    encoder = Known()
    with pytest.raises(UserError) as error:
        judge_similarity(encoder, rows, "sts")
    assert error.value.what == "the score is no finite number in 5 of 65 pairs"
    assert error.value.details == ("sts.csv, row 62 (None), sts.csv, row 63 (nan), sts.csv, row 64 ('4'), ...",)
    assert encoder.asked == []


def test_what_cannot_be_judged():
    with pytest.raises(UserError, match="all scores are 3"):
        judge_similarity(Known(), scored([3.0] * 9), "sts")
    with pytest.raises(UserError, match="at least 3"):
        judge_similarity(Known(), scored([3.0, 1.0]), "sts")
    with pytest.raises(UserError, match="17 is not between 1 and 16"):
        judge_similarity(Known(), scored(gold()), "sts", dims=(17,))


def test_goes_through_json():
    report = judge_similarity(Known(), scored(gold()), "sts")[0]
    again = reports.from_dict(json.loads(json.dumps(report.as_dict(), allow_nan=False)))
    np.testing.assert_array_equal(again.predicted, report.predicted)
    assert again.summary == report.summary and again.values == {}


def test_pairs_of_identical_texts_are_ties():
    vectors = np.random.default_rng(0).normal(size=(200, 384)).astype(np.float32)
    assert set(cosines(vectors, vectors.copy())) == {1.0}
