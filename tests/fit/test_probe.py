"""Linear probes: their weights are for the vectors as they are, and nothing blows up."""

import numpy as np
from scipy.special import softmax

from embedtune.fit import probe


def drawn(count=300, size=12, classes=3, seed=0):
    """Vectors of uneven scales, one dimension with nothing but rounding in it, and classes that they tell."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, count)
    vectors = draw.normal(size=(count, size)) * 10.0 ** draw.integers(-2, 3, size)
    vectors[:, 0] = (labels - 1) * 3 + draw.normal(size=count) * 0.3
    vectors[:, 1] = 0.7 + 1e-17 * draw.normal(size=count)
    vectors[:, 2] = 1e-30 * draw.normal(size=count)
    return vectors, labels


def test_logistic_is_scikit_learns_own_on_standardised_vectors():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    vectors, labels = drawn()
    weights, biases = probe.logistic(vectors, labels, 3, 0)
    found = softmax(vectors @ weights.T + biases, axis=1)
    alive = np.delete(vectors, [1, 2], axis=1)
    peers = [
        make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=300)).fit(alive, labels).predict_proba(alive)
        for c in probe.STRENGTHS
    ]
    assert min(np.abs(found - peer).max() for peer in peers) < 1e-6
    assert not weights[:, [1, 2]].any() and np.abs(weights).max() < 1e3


def test_two_classes_and_a_class_without_rows():
    vectors, labels = drawn(classes=2)
    weights, biases = probe.logistic(vectors, labels, 4, 0)
    found = softmax(vectors @ weights.T + biases, axis=1)
    assert (found[:, 2:] == 0).all() and (found.argmax(1) == labels).mean() > 0.95
    weights, biases = probe.logistic(vectors, np.full(len(labels), 3), 4, 0)
    assert not weights.any() and biases.tolist() == [-np.inf, -np.inf, -np.inf, 0.0]


def test_labels_that_always_or_never_apply():
    vectors, labels = drawn(classes=2)
    several = np.stack([labels, np.ones_like(labels), np.zeros_like(labels)], 1)
    weights, biases = probe.each(vectors, several)
    assert (((vectors @ weights.T + biases)[:, 0] > 0) == labels).mean() > 0.95
    assert biases[1] == np.inf and biases[2] == -np.inf


def test_ridge_finds_a_line():
    vectors, _ = drawn()
    scores = 2 * vectors[:, 3] / vectors[:, 3].std() + 5
    weights, biases = probe.ridge(vectors, scores)
    assert np.abs(vectors @ weights[0] + biases[0] - scores).max() < 0.05
