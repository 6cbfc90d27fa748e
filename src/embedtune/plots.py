"""Every picture: arrays in, SVG and PNG out. The same numbers give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedtune import files

BINS = 150  # a curve of more points is drawn as binned means with their spread
INK, ACCENT, SOFT, GRID = "#1f4e79", "#c8501e", "#9db8d2", "#dddddd"


def save_figure(figure: Any, stem: Path) -> None:
    """Write `figure` as stem.png and stem.svg, atomically and without dates or random ids."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "embedtune", "svg.fonttype": "path"}):
        for suffix, options in (
            (".png", {"dpi": 150, "metadata": {"Software": None}}),
            (".svg", {"metadata": {"Date": None}}),
        ):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix[1:], **options)
            files.write_bytes(stem.with_name(stem.name + suffix), buffer.getvalue())


def new_figure(rows: int, heights: Sequence[float], size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """A figure without pyplot's global state, and its axes from top to bottom."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False, height_ratios=list(heights), sharex=rows > 1)[:, 0]
    for axis in axes:
        axis.grid(color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def binned(x: np.ndarray, y: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(x, mean, 10 % quantile, 90 % quantile) of y over `bins` equal runs of points ordered by x, each (bins,)."""
    parts = np.array_split(np.argsort(x, kind="stable"), bins)
    stats = [(x[p].mean(), y[p].mean(), *np.quantile(y[p], [0.1, 0.9])) for p in parts if len(p)]
    columns = np.array(stats).T
    return columns[0], columns[1], columns[2], columns[3]


def loss_curve(records: Sequence[dict[str, Any]], stem: Path, title: str) -> None:
    """Training loss (binned with its spread when there are many points), dev loss and learning rate over the steps.

    `records` are those of log.jsonl.
    """
    figure, (top, bottom) = new_figure(2, (4, 1), (8, 5.5))
    learned = [r for r in records if r.get("loss") is not None]
    alone = [r["step"] for r in learned if r.get("head_only")]
    if learned:
        step, loss = (np.array([r[name] for r in learned], float) for name in ("step", "loss"))
        if len(step) > 2 * BINS:
            x, mean, low, high = binned(step, loss)
            top.fill_between(x, low, high, color=SOFT, alpha=0.5, linewidth=0, label="training, 10–90 %")
            top.plot(x, mean, color=INK, linewidth=1.4, label="training loss, mean")
        else:
            top.plot(step, loss, color=INK, linewidth=1.2, label="training loss")
        bottom.plot(step, [r["lr"] for r in learned], color=INK, linewidth=1.2)
    scored = [r for r in records if "dev_loss" in r]
    if scored:
        at, y = [r["step"] for r in scored], [r["dev_loss"] for r in scored]
        top.plot(at, y, color=ACCENT, linewidth=1.6, marker="o", markersize=4, label="dev loss")
        best = int(np.argmin(y))
        places = sorted({0, best})
        for place in places:
            word = "baseline" if place == 0 else "best"
            late = at[place] > 0.8 * at[-1]
            top.annotate(
                f"{word} {y[place]:.3f}",
                (at[place], y[place]),
                textcoords="offset points",
                xytext=(-4 if late else 8, 8),
                ha="right" if late else "left",
                fontsize=9,
                color=ACCENT,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )
    if alone:
        for axis in (top, bottom):
            axis.axvspan(0, max(alone), color="#f2e6d8", zorder=0, linewidth=0)
        top.annotate(
            "fresh head alone",
            (max(alone), 0),
            xycoords=("data", "axes fraction"),
            fontsize=8,
            xytext=(4, 6),
            textcoords="offset points",
            color="#8a6d3b",
        )
    top.set_ylabel("loss per masked token (nats)")
    top.set_title(title, loc="left", fontsize=11)
    if learned or scored:
        top.legend(frameon=False, fontsize=9)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    save_figure(figure, stem)


def length_plot(
    stem: Path,
    predicted: np.ndarray,
    true: np.ndarray,
    r2: float,
    interval: tuple[float, float] | None = None,
) -> None:
    """Held-out predicted (m,) against true (m,) token length, with the mean and 10-90 % spread per length."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import NullFormatter

    figure, (axis,) = new_figure(1, (1,), (7, 5.2))
    # A few extreme predictions would squeeze all others: they are left outside the frame, and counted.
    low, high = np.quantile(predicted, [0.001, 0.999])
    right = 1.03 * float(true.max())
    bottom, top = min(0.0, float(low)), max(1.15 * float(high), 0.6 * right)
    outside = int(((predicted < bottom) | (predicted > top)).sum())
    cells = axis.hexbin(true, predicted, gridsize=(48, 28), extent=(0, right, bottom, top), cmap="Blues", mincnt=1)
    cells.set(linewidth=0, norm=LogNorm(vmin=0.4))  # below one, so that a single text can be seen
    bar = figure.colorbar(cells, ax=axis, label="texts per cell (log scale)", pad=0.02)
    bar.ax.set_ylim(bottom=0.9)
    bar.ax.yaxis.set_major_formatter("{x:,.0f}")
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    axis.plot([0, right], [0, right], color="#7b8794", linestyle="--", label="predicted = true")
    x, mean, tenth, ninetieth = binned(true, predicted, 20)
    axis.plot(x, mean, color=ACCENT, linewidth=2, marker="o", markersize=3.5, label="mean")
    axis.plot(x, tenth, color=ACCENT, linewidth=1.2, linestyle=":", label="10 % and 90 %")
    axis.plot(x, ninetieth, color=ACCENT, linewidth=1.2, linestyle=":")
    within = f" (95 % interval {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    title = f"Token length, read linearly from the embedding\nheld-out R² {r2:.3f}{within}"
    axis.set_title(title, loc="left", fontsize=11)
    note = f"; {outside:,} outside the frame" if outside else ""
    axis.set_xlabel(f"true length (tokens; {len(true):,} texts the read-out has not seen{note})")
    axis.set_ylabel("predicted length (tokens)")
    axis.set(xlim=(0, right), ylim=(bottom, top))
    axis.legend(frameon=False, fontsize=9, loc="upper left")
    save_figure(figure, stem)
