"""The pictures of classifiers, regressors and taggers: arrays in, SVG and PNG out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedtune.plots import ACCENT, INK, LETTERS, SOFT, narrow_figure, new_figure, save_figure, short_label

NUMBERED = 12  # classes up to which every cell of a confusion matrix has its count
PAPER = "#ffffff"
CLIP = 22  # characters of a class name


def scores_curve(records: Sequence[Mapping[str, Any]], measures: Mapping[str, str], stem: Path, title: str) -> None:
    """Dev measures (name in the log -> words) over the epochs; `records` are those of log.jsonl."""
    figure, (axis,) = new_figure(1, (1,), (8, 4.2))
    epochs = {record["step"]: record["epoch"] for record in records if "epoch" in record}
    scored = [record for record in records if any(name in record for name in measures)]
    for (name, words), colour in zip(measures.items(), (ACCENT, INK, SOFT), strict=False):
        found = [(epochs.get(r["step"], 0.0), r[name]) for r in scored if name in r]
        if found:
            x, y = zip(*found)
            # The best values stand in the legend: beside their points they would cover each other.
            words = f"{words}, best {max(y):.3f}"
            axis.plot(x, y, color=colour, marker="o", markersize=4, linewidth=1.6, label=words)
    axis.set_xlabel("epoch")
    axis.set_ylabel("on the dev rows")
    axis.set_title(title, loc="left", fontsize=11)
    axis.margins(y=0.15)
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    save_figure(figure, stem)


def confusion_plot(counts: np.ndarray, names: Sequence[str], stem: Path, title: str) -> None:
    """Rows are right classes, columns what was said: (C, C) counts, coloured by the share of the row.

    Many classes get a larger picture with smaller letters, and the most frequent mistakes written below it.
    """
    count = len(names)
    side = max(4.5, 0.16 * count + 3.2)
    figure, (axis,) = new_figure(1, (1,), (side + 0.6, side))
    axis.grid(False)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="equal")
    letters = 9 if count <= NUMBERED else max(6.5, 9 - 0.06 * count)
    shown = [name if len(name) <= CLIP else name[: CLIP - 1] + "…" for name in names]
    axis.set_xticks(range(count), shown, rotation=90 if count > 4 else 0, fontsize=letters)
    axis.set_yticks(range(count), shown, fontsize=letters)
    if count <= NUMBERED:
        for row, column in np.ndindex(count, count):
            colour = "white" if share[row, column] > 0.55 else "black"
            text = f"{counts[row, column]:,}"
            axis.text(column, row, text, ha="center", va="center", fontsize=letters, color=colour)
    figure.colorbar(image, ax=axis, shrink=0.7, label="share of the right class's rows")
    worst = _mistakes(counts, shown) if count > NUMBERED else ""
    axis.set_xlabel("said" + (f"\n\nmost frequent mistakes (right → said): {worst}" if worst else ""), fontsize=9)
    axis.set_ylabel("right")
    axis.set_title(title, loc="left", fontsize=11)
    save_figure(figure, stem)


def _mistakes(counts: np.ndarray, names: Sequence[str], most: int = 3) -> str:
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    places = [np.unravel_index(place, wrong.shape) for place in order]
    return "; ".join(f"{names[r]} → {names[c]} {wrong[r, c]:,}" for r, c in places if wrong[r, c])


def confusion_figure(counts: np.ndarray, names: Sequence[str]) -> Any:
    """The matrix for a page: (C, C) counts, each cell as dark as its share of the row."""
    from matplotlib.patches import Rectangle

    count = len(names)
    figure, (axis,) = narrow_figure(1, (1,), min(4.2, 1.6 + 0.45 * count))
    axis.grid(False)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    for row, column in np.ndindex(count, count):
        cell = Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=INK, alpha=float(share[row, column]), linewidth=0)
        axis.add_patch(cell)
        colour = PAPER if share[row, column] > 0.55 else "black"
        axis.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", fontsize=LETTERS, color=colour)
    shown = [short_label(name, CLIP) for name in names]
    axis.set_xticks(range(count), shown, rotation=90 if count > 3 else 0, parse_math=False)
    axis.set_yticks(range(count), shown, parse_math=False)
    axis.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5))
    axis.set_xlabel("said", fontsize=LETTERS)
    axis.set_ylabel("right", fontsize=LETTERS)
    return figure


def reliability_plot(bins: Sequence[np.ndarray], error: float, stem: Path, title: str) -> None:
    """Accuracy over confidence in equal bins ((B,) each, and the rows in them), with the calibration error."""
    figure, axes = new_figure(2, (3, 1), (5.2, 5.6))
    _reliability(axes, bins, error)
    axes[0].set_title(title, loc="left", fontsize=11)
    save_figure(figure, stem)


def reliability_figure(bins: Sequence[np.ndarray], error: float) -> Any:
    """The same for a page."""
    figure, axes = narrow_figure(2, (3, 1), 3.6)
    _reliability(axes, bins, error)
    return figure


def _reliability(axes: Sequence[Any], bins: Sequence[np.ndarray], error: float) -> None:
    confidence, accuracy, count = (array[bins[2] > 0] for array in bins)
    top, bottom = axes
    top.plot([0, 1], [0, 1], color=SOFT, linewidth=1.2, linestyle="--", label="as sure as right")
    top.plot(confidence, accuracy, color=INK, marker="o", markersize=5, linewidth=1.4, label=f"model (ECE {error:.3f})")
    top.set_ylabel("share that is right", fontsize=9)
    top.set_xlim(0, 1)
    top.set_ylim(0, 1.02)
    top.legend(frameon=False, fontsize=LETTERS, loc="upper left")
    bottom.bar(confidence, count, width=0.05, color=SOFT)
    bottom.set_ylabel("rows", fontsize=9)
    bottom.set_xlabel("probability of what was said", fontsize=9)


def scatter_plot(right: np.ndarray, said: np.ndarray, stem: Path, title: str) -> None:
    """Scores that were predicted over those that are right, (n,) each."""
    figure, (axis,) = new_figure(1, (1,), (5.2, 5.2))
    _scatter(axis, right, said)
    axis.set_title(title, loc="left", fontsize=11)
    save_figure(figure, stem)


def scatter_figure(right: np.ndarray, said: np.ndarray) -> Any:
    """The same for a page."""
    figure, (axis,) = narrow_figure(1, (1,), 3.6)
    _scatter(axis, right, said)
    return figure


def _scatter(axis: Any, right: np.ndarray, said: np.ndarray) -> None:
    ends = [float(min(right.min(), said.min())), float(max(right.max(), said.max()))]
    axis.plot(ends, ends, color=SOFT, linewidth=1.2, linestyle="--")
    axis.plot(right, said, linestyle="none", marker="o", markersize=3, alpha=0.5, color=INK)
    axis.set_xlabel("right score", fontsize=9)
    axis.set_ylabel("predicted score", fontsize=9)
