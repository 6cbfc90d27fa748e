"""What probes that are not linear find of a concept: each is fitted on one part of the rows and judged on another.

No affine map takes away what is not linear, so these figures stand beside every linear guarantee.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedtune.errors import UserError
from embedtune.refine.probes import DRAWS, Accuracy, accuracy, class_counts, shuffled_squares
from embedtune.refine.statistics import refuse_non_finite

SEEDS = 3
FIT = 20_000  # rows that a probe is fitted on, at most, and half as many that it is judged on
FEWEST = 100  # rows in all
WAVES = 1000  # random Fourier features of the ridge, and for the test of independence at each width
TEST_ROWS, TEST_WAVES, RANK_WAVES = 5000, 128, 8
WIDTHS = (0.5, 1.0, 2.0)  # of the kernel, times the median distance
STRENGTHS = 10.0 ** np.arange(-6, 3)  # of the ridge, times the mean square of a feature
CLASS_ROWS = 5  # of each class, in both parts

Probe = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]  # x fit, target fit, x judge, seed -> told


@dataclass(frozen=True)
class Reading:
    """What one kind of probe reads on rows that it has not seen: R2 (chance 0), or balanced accuracy.

    `value` is the mean of the seeds, `low` to `high` its 95 % interval over the rows, `seeds` the values of each.
    """

    probe: str
    value: float
    low: float
    high: float
    chance: float
    seeds: tuple[float, ...]

    @property
    def found(self) -> bool:
        """Whether the interval lies above chance."""
        return self.low > self.chance


def read_values(x: np.ndarray, z: np.ndarray, seed: int = 0) -> list[Reading]:
    """How well each probe predicts z (m,) from x (m, d): R2 on a third of the rows, best probe first."""
    refuse_non_finite(np.column_stack([x, z]))
    fit, rest = _parts(len(x), seed)
    features = _features(x, fit)
    mean, spread = z[fit].mean(), z[fit].std()
    true = (z[rest] - mean) / (spread or 1)
    if not spread or not true.std():
        raise UserError("the concept is the same in all rows: there is nothing to find", where="the fresh rows")
    readings = []
    for name, (values, probe) in _probes(features, x, classes=0).items():
        told = [probe(values[fit], (z[fit] - mean) / spread, values[rest], seed + k) for k in range(SEEDS)]
        errors = np.stack([(t - true) ** 2 for t in told])
        around = (true - true.mean()) ** 2
        each = 1 - errors.mean(1) / around.mean()
        value = float(each.mean())
        influence = (around * (1 - value) - errors.mean(0)) / around.mean()
        half = 1.96 * float(influence.std()) / np.sqrt(len(true))
        readings.append(Reading(name, value, value - half, value + half, 0.0, tuple(each.tolist())))
    return sorted(readings, key=lambda r: -r.value)


def read_classes(x: np.ndarray, labels: np.ndarray, seed: int = 0) -> list[Reading]:
    """How well each probe tells class numbers (m,) from x (m, d): balanced accuracy on a third of the rows.

    The rows that a probe is fitted on are drawn so that every class has the same share.
    """
    refuse_non_finite(x)
    classes = len(class_counts(labels, 3 * CLASS_ROWS))
    fit, rest = _parts(len(x), seed, labels)
    features = _features(x, fit)
    generator = np.random.default_rng(seed)
    members = [fit[labels[fit] == k] for k in range(classes)]
    even = np.concatenate(
        [generator.choice(rows, len(fit) // classes, len(rows) * classes < len(fit)) for rows in members]
    )
    readings = []
    for name, (values, probe) in _probes(features, x, classes).items():
        found = [
            accuracy(labels[rest], probe(values[even], labels[even], values[rest], seed + k)) for k in range(SEEDS)
        ]
        readings.append(Reading(name, *_middle(found), found[0].chance, tuple(f.value for f in found)))
    return sorted(readings, key=lambda r: -r.value)


def independence(
    x: np.ndarray, z: np.ndarray, labels: np.ndarray | None = None, *, draws: int = DRAWS, seed: int = 0
) -> float:
    """Permutation p of the hypothesis that the vectors x (m, d) say nothing at all of the concept.

    The statistic is HSIC, the squared norm of the cross-covariance of random Fourier features of x (Gaussian kernels
    of three widths) and of the concept: waves of the rank of z (m,), or the classes in `labels` (m,).
    """
    generator = np.random.default_rng(seed)
    rows = np.sort(generator.permutation(len(x))[:TEST_ROWS])
    features = _features(x[rows], np.arange(len(rows)))
    near = _median_distance(features, generator)
    waves = np.concatenate([_waves(features, near * w, TEST_WAVES, generator) for w in WIDTHS], axis=1)
    if labels is not None:
        told = (labels[rows, None] == np.unique(labels)).astype(float)
        told = told[:, told.any(0)]
        told = (told - told.mean(0)) / np.sqrt(np.maximum(told.mean(0), 1e-12))
    else:
        rank = np.argsort(np.argsort(z[rows] + 0.0, kind="stable"), kind="stable")
        _, place = np.unique(z[rows], return_inverse=True)
        even = (np.bincount(place, rank) / np.bincount(place))[place]  # equals share their mean rank
        told = np.cos(np.pi * (even[:, None] + 0.5) / len(rows) * np.arange(1, RANK_WAVES + 1))
        told = told - told.mean(0)
    total = shuffled_squares(waves - waves.mean(0), told, draws, seed).sum(1)
    return float(np.mean(total >= total[0] * (1 - 1e-6)))


def _probes(features: np.ndarray, x: np.ndarray, classes: int) -> dict[str, tuple[np.ndarray, Probe]]:
    norm = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    found: dict[str, tuple[np.ndarray, Probe]] = {
        "boosted trees": (features, _trees(classes)),
        "network": (features, _network(classes)),
        "kernel features": (features, _kernel(classes)),
    }
    # A norm that is the same up to rounding tells nothing, and trees would read the rounding.
    return {**found, "norm alone": (norm, _trees(classes))} if norm.std() > 1e-5 * norm.mean() else found


def _trees(classes: int) -> Probe:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    kind: Any = HistGradientBoostingClassifier if classes else HistGradientBoostingRegressor

    def probe(x: np.ndarray, target: np.ndarray, others: np.ndarray, seed: int) -> np.ndarray:
        model = kind(max_iter=100, early_stopping=True, max_features=0.3, random_state=seed)
        return np.asarray(model.fit(x, target).predict(others))

    return probe


def _network(classes: int) -> Probe:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    kind: Any = MLPClassifier if classes else MLPRegressor

    def probe(x: np.ndarray, target: np.ndarray, others: np.ndarray, seed: int) -> np.ndarray:
        model = kind(hidden_layer_sizes=(128,), alpha=1e-3, early_stopping=True, max_iter=60, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the best of 60 rounds is kept
            return np.asarray(model.fit(x, target).predict(others))

    return probe


def _kernel(classes: int) -> Probe:
    """Ridge on random Fourier features of a Gaussian kernel; width and strength are chosen on a fifth of the rows."""

    def probe(x: np.ndarray, target: np.ndarray, others: np.ndarray, seed: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        y = np.eye(classes)[target] if classes else target[:, None]
        near = _median_distance(x, generator)
        fifth = generator.random(len(x)) < 0.2
        best, told = np.inf, np.zeros((len(others), y.shape[1]))
        for width in WIDTHS:
            waves = _waves(np.concatenate([x, others]), near * width, WAVES, generator)
            mine, theirs = waves[: len(x)], waves[len(x) :]
            middle, mean = mine[~fifth].mean(0), y[~fifth].mean(0)
            values, vectors = np.linalg.eigh((mine[~fifth] - middle).T @ (mine[~fifth] - middle))
            side = vectors.T @ ((mine[~fifth] - middle).T @ (y[~fifth] - mean))
            for strength in STRENGTHS * len(x):
                weights = vectors @ (side / (np.maximum(values, 0) + strength)[:, None])
                error = float(((y[fifth] - mean - (mine[fifth] - middle) @ weights) ** 2).mean())
                if error < best:
                    best, told = error, mean + (theirs - middle) @ weights
        return told.argmax(1) if classes else told[:, 0]

    return probe


def _waves(x: np.ndarray, width: float, count: int, generator: np.random.Generator) -> np.ndarray:
    """(m, count) random Fourier features of the kernel exp(-|a - b|^2 / (2 width^2)), Rahimi and Recht 2007."""
    frequencies = generator.standard_normal((x.shape[1], count)) / width
    waves: np.ndarray = np.sqrt(2) * np.cos(x @ frequencies + generator.uniform(0, 2 * np.pi, count))
    return waves


def _median_distance(x: np.ndarray, generator: np.random.Generator, pairs: int = 2000) -> float:
    one, two = generator.integers(0, len(x), (2, pairs))
    distances = np.linalg.norm(x[one] - x[two], axis=1)
    return float(np.median(distances[distances > 0])) if (distances > 0).any() else 1.0


def _features(x: np.ndarray, fit: np.ndarray) -> np.ndarray:
    """x (m, d) with its norm as one more column, standardised on the `fit` rows; constants become 0."""
    x = np.column_stack([x, np.linalg.norm(x.astype(np.float64), axis=1)]).astype(np.float64)
    mean, spread = x[fit].mean(0), x[fit].std(0)
    flat = spread <= 1e-12 * np.abs(mean)
    flat[-1] |= spread[-1] <= 1e-5 * abs(mean[-1])  # the rounding of vectors of norm one
    out: np.ndarray = np.where(flat, 0.0, (x - mean) / np.where(flat, 1.0, spread))
    return out


def _parts(n: int, seed: int, labels: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers to fit on (two thirds, at most FIT) and to judge on; every class has its share in both."""
    if n < FEWEST:
        raise UserError(
            f"{n:,} rows are too few for probes that are not linear", fix=f"give at least {FEWEST} fresh rows"
        )
    from sklearn.model_selection import train_test_split

    sizes = {"train_size": min(FIT, n * 2 // 3), "test_size": min(FIT // 2, n - n * 2 // 3)}
    fit, rest = train_test_split(np.arange(n), **sizes, random_state=seed, stratify=labels)
    return np.asarray(fit), np.asarray(rest)


def _middle(found: list[Accuracy]) -> tuple[float, float, float]:
    value, low, high = (float(np.mean([getattr(f, name) for f in found])) for name in ("value", "low", "high"))
    return value, low, high
