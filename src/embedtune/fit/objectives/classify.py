"""From a recipe to an objective: texts with classes, or with a score, and a stock head to tell them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit, softmax
from torch import Tensor

from embedtune.data.columns import parse_columns
from embedtune.data.divide import text_groups
from embedtune.data.labels import Classes, Graded, Labelled, check_known, classes_of, read_graded, read_labelled
from embedtune.data.read import Counts
from embedtune.data.tokens import tokenize_texts
from embedtune.encoder import heads, load
from embedtune.encoder.load import DEFAULT, Loaded
from embedtune.errors import UserError
from embedtune.fit import past, probe
from embedtune.fit.objectives.heads import HeadObjective
from embedtune.fit.objectives.labelled import (
    FEWEST,
    HeadDev,
    draw,
    held_out,
    make_ready,
    model_name,
    row_length,
    say_leaks,
    start_at_probe,
)
from embedtune.fit.past import Known, Sides
from embedtune.fit.prepared import Prepared, data_profile, identity, name_of, rows_lost, token_profile, tokenised
from embedtune.recipes import Classify, Regress

# Of the dev data, beside the loss (which is the log loss, or the mean squared gap).
MEASURES = ["accuracy", "balanced_accuracy", "F1", "F1_micro", "MCC", "ROC_AUC", "ECE"]
MULTI = ["accuracy", "F1", "F1_micro", "ROC_AUC"]
REGRESSION = ["spearman", "pearson", "MAE", "RMSE", "R2"]


def prepare_classify(recipe: Classify, home: Path, note: Callable[[str], None]) -> Prepared:
    """Everything before the first step; `home` receives the tokenised texts."""
    note(f"reading {name_of(recipe.train)}")
    sides = past.sides(recipe, _own_labelled, KNOWN)
    train, dev, classes = sides.train, sides.dev, sides.about
    gold = [_numbers(side, classes) for side in (train, dev)]
    problem = "multi_label_classification" if classes.multi else "single_label_classification"
    recipe, folder = _pooled(recipe, train)
    loaded = heads.load_head(folder, heads.SEQUENCE, recipe.loop.seed, classes.names, problem, recipe.pooling)
    share = gold[0].mean(0) if classes.multi else np.bincount(gold[0], minlength=len(classes.names)) / len(train)

    def fitted(vectors: np.ndarray, rows: np.ndarray) -> probe.Linear:
        if classes.multi:
            return probe.each(vectors, gold[0][rows])
        return probe.logistic(vectors, gold[0][rows], len(classes.names), recipe.loop.seed)

    labels = _Labels(
        train, dev, gold[1], *_class_loss(gold[0], classes, recipe), np.tile(share, (len(dev), 1)), fitted,
        expit if classes.multi else partial(softmax, axis=1), classes, MULTI if classes.multi else MEASURES, "dev_F1",
        {f"class {name}": n for name, n in zip(classes.names, classes.counts)},
    )  # fmt: skip
    return _ready(recipe, home, loaded, labels, sides, note)


def prepare_regress(recipe: Regress, home: Path, note: Callable[[str], None]) -> Prepared:
    """Everything before the first step; `home` receives the tokenised texts."""
    note(f"reading {name_of(recipe.train)}")
    sides = past.sides(recipe, _own_graded, KNOWN)
    train, dev = sides.train, sides.dev
    gold = [np.array([row.score for row in side]) for side in (train, dev)]
    mean, spread = float(gold[0].mean()), float(gold[0].std())
    if not spread:
        raise UserError(f"all scores are {mean:g}: there is nothing to learn", where=name_of(recipe.train))
    recipe, folder = _pooled(recipe, train)
    loaded = heads.load_head(folder, heads.SEQUENCE, recipe.loop.seed, ["score"], "regression", recipe.pooling)
    right = torch.tensor(gold[0], dtype=torch.float32)

    def loss(logits: Tensor, rows: np.ndarray) -> Tensor:
        # In units of the scores' variance: the same learning rate suits grades of 0 to 1 and of 0 to 100.
        return ((logits[:, 0] - right[torch.from_numpy(rows)].to(logits.device)) / spread).square().sum()

    def fitted(vectors: np.ndarray, rows: np.ndarray) -> probe.Linear:
        return probe.ridge(vectors, gold[0][rows])

    labels = _Labels(
        train, dev, gold[1], loss, len, np.full(len(dev), mean), fitted, np.ravel,
        Classes(("score",), (), False), REGRESSION, "dev_spearman",
        {"score_mean": mean, "score_low": float(gold[0].min()), "score_high": float(gold[0].max())},
    )  # fmt: skip
    return _ready(recipe, home, loaded, labels, sides, note)


def _own_labelled(recipe: Classify, folder: Path | None) -> Sides:
    """The labelled texts that a recipe names, parted, and their classes."""
    train, dev, tally = _read(recipe, read_labelled)
    classes = _classes(train, recipe, tally[0])
    remarks, known = _lost(tally), set(classes.names)
    train = [row for row in train if set(row.labels) <= known]
    if dev is None:
        first = np.array([classes.names.index(row.labels[0]) if row.labels else 0 for row in train])
        train, dev = _hold_out(train, first, recipe, remarks)
    else:
        check_known(dev, classes, name_of(recipe.dev))
    return Sides(*_some(train, dev, recipe, remarks), *tally, remarks, classes)


def _own_graded(recipe: Regress, folder: Path | None) -> Sides:
    """The texts with scores that a recipe names, parted."""
    train, dev, tally = _read(recipe, read_graded)
    remarks = _lost(tally)
    if dev is None:
        train, dev = _hold_out(train, np.zeros(len(train), int), recipe, remarks)
    return Sides(*_some(train, dev, recipe, remarks), *tally, remarks)


def _classes(train: list[Labelled], recipe: Classify, counts: Counts) -> Classes:
    """The classes of the rows; of a head that is trained on, those that it has, which the rows must keep to."""
    where = name_of(recipe.train)
    if recipe.past.continue_from is None:
        return classes_of(train, where, drop=recipe.bad_rows == "skip", counts=counts)
    names, multi = heads.labels_of(Path(recipe.past.continue_from))
    many = Counter(label for row in train for label in row.labels)
    known = Classes(names, tuple(many[name] for name in names), multi)
    check_known(train, known, where, "the run that is continued", "embedtune fit classify learns all classes anew")
    return known


def _pooled(recipe: Any, train: list) -> tuple[Any, Path]:
    """The recipe with what the head reads, and the model's folder: the mean for single texts, where the model means.

    Two texts in a row are told apart by attention, which the first token sums up as well.
    """
    folder = load.find(recipe.model or DEFAULT)
    if recipe.pooling is None and all(row.pair is None for row in train):
        recipe = dataclasses.replace(recipe, pooling=heads.usual_pooling(folder))
    return recipe, folder


@dataclasses.dataclass(frozen=True)
class _Labels:
    """Rows with what is right about them, and what is made of it: the loss, the baselines, the measures."""

    train: list
    dev: list
    gold: np.ndarray  # of dev
    loss: Callable[[Tensor, np.ndarray], Tensor]
    weight: Callable[[np.ndarray], float]
    constant: np.ndarray  # what is predicted for the dev rows without looking at them
    fitted: Callable[[np.ndarray, np.ndarray], probe.Linear]  # from vectors of training rows, and their numbers
    link: Callable[[np.ndarray], np.ndarray]  # from logits to predictions
    classes: Classes
    measures: list[str]
    measure: str
    counted: dict[str, Any]


Tally = tuple[Counts, Counts | None]


def _read(recipe: Any, read: Callable[..., Any]) -> tuple[list, list | None, Tally]:
    """Training rows, dev rows (None where none are named), and the tallies of both."""
    counts, columns = Counts(), parse_columns(recipe.columns)
    train = list(read(recipe.train, columns=columns, bad_rows=recipe.bad_rows, counts=counts))
    if len(train) < FEWEST:
        raise UserError(f"has {len(train)} row(s): too few to learn from", where=name_of(recipe.train))
    if recipe.dev is None:
        return train, None, (counts, None)
    dev_counts = Counts()
    dev = list(read(recipe.dev, columns=columns, bad_rows=recipe.bad_rows, counts=dev_counts))
    return train, dev, (counts, dev_counts)


def _lost(tally: Tally) -> list[str]:
    return [line for counts in tally if counts is not None for line in rows_lost(counts)]


def _joined(row: Labelled | Graded) -> str:
    return row.text if row.pair is None else f"{row.text}\n{row.pair}"


KNOWN = Known(key=_joined, held=_joined)


def _hold_out(rows: list, classes: np.ndarray, recipe: Any, remarks: list[str]) -> tuple[list, list]:
    groups = text_groups([_joined(row) for row in rows])
    share = min(recipe.dev_rows, len(rows) // 10) / len(rows)
    held = held_out(classes, groups, max(share, 1 / len(rows)), recipe.loop.seed)
    if held.sum() < 2:
        what = f"too few of the {len(rows):,} rows can be held out for scoring: a tenth at most, in whole groups"
        raise UserError(f"{what} of near-duplicates", where="--dev", fix="give more rows, or a file with --dev FILE")
    remarks.append(
        f"held out {held.sum():,} of {len(rows):,} rows, a tenth of each class at most, in whole groups of "
        "near-duplicates"
    )
    return [row for row, h in zip(rows, held) if not h], [row for row, h in zip(rows, held) if h]


def _some(train: list, dev: list, recipe: Any, remarks: list[str]) -> tuple[list, list]:
    """The rows that are used, drawn where there are more than asked for; what both sides share is said."""
    some, scored = draw(train, recipe.train_rows, recipe.loop.seed), draw(dev, recipe.dev_rows, recipe.loop.seed)
    for word, used, there in (("trained", some, train), ("scored", scored, dev)):
        if len(used) < len(there):
            remarks.append(f"{word} on {len(used):,} of {len(there):,} rows, drawn by the seed")
    if len(scored) < 2:
        raise UserError(f"{len(scored)} row(s) to score on: an interval needs at least two", where="--dev")
    say_leaks([_joined(row) for row in some], [_joined(row) for row in scored], remarks)
    return some, scored


def _numbers(rows: Sequence[Labelled], classes: Classes) -> np.ndarray:
    """Class numbers (n,), or 0/1 (n, C) where several labels apply."""
    place = {name: number for number, name in enumerate(classes.names)}
    if not classes.multi:
        return np.array([place[row.labels[0]] for row in rows])
    out = np.zeros((len(rows), len(place)), int)
    for number, row in enumerate(rows):
        out[number, [place[label] for label in row.labels]] = 1
    return out


def _class_loss(
    gold: np.ndarray, classes: Classes, recipe: Classify
) -> tuple[Callable[[Tensor, np.ndarray], Tensor], Callable[[np.ndarray], float]]:
    """The sum of losses of rows, and the weight of rows that makes a batch's mean of it (torch's own definitions)."""
    right, smooth, count = torch.from_numpy(gold), recipe.label_smoothing, len(classes.names)
    balanced = recipe.weights == "balanced"
    if classes.multi:
        positive = gold.sum(0)
        rare = torch.tensor((len(gold) - positive) / np.maximum(positive, 1), dtype=torch.float32) if balanced else None

        def several(logits: Tensor, rows: np.ndarray) -> Tensor:
            wanted = right[torch.from_numpy(rows)].to(logits) * (1 - smooth) + smooth / 2
            weight = None if rare is None else rare.to(logits.device)
            return F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weight, reduction="sum")

        return several, lambda rows: float(len(rows) * count)
    sizes = np.bincount(gold, minlength=count)
    share = len(gold) / (count * np.maximum(sizes, 1)) if balanced else np.ones(count)
    weights = torch.tensor(share, dtype=torch.float32)

    def one(logits: Tensor, rows: np.ndarray) -> Tensor:
        wanted = right[torch.from_numpy(rows)].to(logits.device)
        return F.cross_entropy(logits, wanted, weights.to(logits.device), reduction="sum", label_smoothing=smooth)

    return one, lambda rows: float(share[gold[rows]].sum())


def _ready(
    recipe: Any, home: Path, loaded: Loaded, labels: _Labels, sides: Sides, note: Callable[[str], None]
) -> Prepared:  # fmt: skip
    """The objective over both sides' token rows, its baselines, and all that the run's story needs."""
    train, dev, remarks = labels.train, labels.dev, sides.remarks
    max_length = row_length(loaded, recipe.max_length)
    texts = ((row.text, row.pair) for row in (*train, *dev))
    tokens = tokenised(tokenize_texts, texts, loaded.tokenizer, max_length, home / "data" / "texts")
    if tokens.chunked:
        remarks.append(f"{tokens.chunked:,} of {len(tokens):,} texts are longer than {max_length} tokens: cut to them")
    noise, rate = make_ready(loaded, recipe, remarks)
    objective = HeadObjective(
        loaded, tokens, np.arange(len(train)), labels.loss, labels.weight, noise,
        ["dev_loss", *(f"dev_{name}" for name in labels.measures)], frozen=recipe.freeze,
    )  # fmt: skip
    rows, some = np.arange(len(train), len(tokens)), probe.some(len(train), recipe.loop.seed)
    note("fitting the linear probe, the baseline to beat")
    layer = heads.fresh_layer(loaded)
    seen, read = objective.features(some, layer)
    weights, biases = labels.fitted(seen, some)
    probed = labels.link(objective.features(rows)[0] @ weights.T + biases)
    if layer is not None:
        start_at_probe(layer, labels.fitted(read, some))
    constant = "mean score" if isinstance(recipe, Regress) else "majority class"
    items = tuple(f"{Path(row.file).name}:{row.number}" for row in dev)
    baselines = {constant: labels.constant, "linear probe": probed}
    held = HeadDev(rows, labels.gold, items, labels.classes.names, labels.classes.multi, baselines)
    profile = {
        **data_profile(recipe.train, sides.counts, sides.dev_counts),
        "train_rows": len(train),
        "dev_rows": len(dev),
        **labels.counted,
        "cut_texts": tokens.chunked,
        **token_profile(tokens.spread()),
    }
    resolved = dataclasses.replace(recipe, model=recipe.model or DEFAULT, max_length=max_length)
    same = identity(loaded.folder, loaded.tokenizer, sides.counts, sides.dev_counts) | sides.identity()
    return Prepared(
        objective, resolved, model_name(recipe), max_length, profile, same, remarks, rate, labels.measure,
        loaded.folder, held, sides.old,
    )  # fmt: skip
