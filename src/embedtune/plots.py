"""Every picture: arrays in, SVG and PNG out. The same numbers give the same bytes."""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedtune import files

BINS = 150  # a curve of more points is drawn as binned means with their spread
INK, ACCENT, SOFT, GRID = "#1f4e79", "#c8501e", "#9db8d2", "#dddddd"
# In a page, a colour is what the page's style says of it (dark mode, print); where it says nothing, the colour itself.
THEME = {INK: "ink", ACCENT: "accent", SOFT: "soft", GRID: "grid", "#ffffff": "paper"}
NARROW = 4.2  # inches: the width of a picture in a page, so that its letters can still be read on a phone
LETTERS = 8.5  # points


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


def new_figure(
    rows: int, heights: Sequence[float], size: tuple[float, float], *, share: bool = True
) -> tuple[Any, list[Any]]:
    """A figure without pyplot's global state, and its axes from top to bottom, which may share one scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False, height_ratios=list(heights), sharex=share and rows > 1)[:, 0]
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


def loss_curve(
    records: Sequence[dict[str, Any]], stem: Path, title: str, unit: str = "loss per masked token (nats)"
) -> None:
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
            word = "baseline" if place == 0 else "lowest"
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
    _mark_overfitting(top, records)
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
    top.set_ylabel(unit)
    top.set_title(title, loc="left", fontsize=11)
    if learned or scored:
        top.legend(frameon=False, fontsize=9)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    save_figure(figure, stem)


def _mark_overfitting(axis: Any, records: Sequence[Mapping[str, Any]]) -> None:
    if (turn := overfits_from(records)) is not None:
        axis.axvline(turn, color="#8a6d3b", linewidth=1, linestyle="--")
        axis.annotate("over-fitting from here", (turn, 1), xycoords=("data", "axes fraction"), xytext=(4, -12),
                      textcoords="offset points", fontsize=8, color="#8a6d3b")  # fmt: skip


def overfits_from(records: Sequence[Mapping[str, Any]]) -> int | None:
    """The step from which the dev loss rises while the training loss falls; None where it does not.

    That is the lowest dev loss, if at least two scorings follow, all worse by more than a hundredth, and the mean
    training loss after it lies below the one before.
    """
    scored = [(r["step"], r["dev_loss"]) for r in records if "dev_loss" in r]
    losses = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    if not scored:
        return None
    turn, lowest = min(scored, key=lambda pair: pair[1])
    after = [loss for step, loss in scored if step > turn]
    before = [loss for step, loss in losses if step <= turn]
    later = [loss for step, loss in losses if step > turn]
    worse = len(after) >= 2 and min(after) > lowest + 0.01 * abs(lowest)
    return turn if worse and before and later and np.mean(later) < np.mean(before) else None


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


def svg(figure: Any, name: str, label: str) -> str:
    """`figure` as an <svg> element for the body of an HTML page; `label` is what a screen reader says of it.

    Ids start with `name`, so that pictures of different names can stand in one page. Text stays text, in the page's
    font; the colours of THEME and black follow the page. There is no prolog, style sheet, metadata or comment.
    """
    import matplotlib

    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the page's fonts are asked, not these
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = re.sub(r"<style.*?</style>|<!--.*?-->", "", buffer.getvalue().decode("utf-8"), flags=re.DOTALL)
    opening, _, rest = text[text.index("<svg") :].partition(">")
    box = re.findall(r'viewBox="[^"]*"', opening)[0]
    attributes = f'{box} role="img" aria-label="{html.escape(label)}" fill="currentColor" stroke-linejoin="round"'
    # matplotlib escapes < and > in texts and in attributes: this meets tags only, never the words of a user.
    return f"<svg {attributes}>" + re.sub(r"<[^>]*>", lambda tag: _for_page(tag[0], name), rest).rstrip()


def _for_page(tag: str, name: str) -> str:
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r'\bxlink:href="#', f'href="#{name}-', tag).replace("url(#", f"url(#{name}-")
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag).replace("#000000", "currentColor")
    for colour, word in THEME.items():
        tag = tag.replace(colour, f"var(--plot-{word}, {colour})")
    return tag


def narrow_figure(rows: int, heights: Sequence[float], height: float) -> tuple[Any, list[Any]]:
    """A figure for a page, and its axes from top to bottom."""
    figure, axes = new_figure(rows, heights, (NARROW, height))
    for axis in axes:
        axis.tick_params(labelsize=LETTERS, length=0)
        axis.spines[["left", "bottom"]].set(color=SOFT, linewidth=0.8)
    return figure, axes


def short_label(text: object, most: int = 30) -> str:
    """A name that came from outside, fit to stand in a picture: one line, clipped, nothing invisible."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(str(text).split()))
    return line if len(line) <= most else line[: most - 1] + "…"


def finite(*values: object) -> bool:
    """Whether all `values` are numbers that can be drawn and printed."""
    return all(isinstance(v, int | float | np.number) and math.isfinite(v) for v in values)


def changes_plot(rows: Sequence[Mapping[str, Any]], span: tuple[float, float] | None = None) -> Any:
    """A figure of changes with their 95 % intervals, one line for each measure; None where no change is finite.

    `rows` have measure, change, low, high. An interval above zero is drawn in INK with a full circle, one below in
    ACCENT with a square, any other in grey with a hollow circle. `span` sets the ends of the axis, to compare pictures.
    """
    rows = [row for row in rows if finite(row.get("change"))]
    if not rows:
        return None
    figure, (axis,) = narrow_figure(1, (1,), 0.62 + 0.25 * len(rows))
    axis.axvline(0, color="black", linewidth=0.8)
    for place, row in enumerate(rows):
        known = finite(row.get("low"), row.get("high"))
        low, high = (row["low"], row["high"]) if known else (0, 0)
        colour, marker, face = "black", "o", "white"
        if low > 0:
            colour, face = INK, INK
        elif high < 0:
            colour, marker, face = ACCENT, "s", ACCENT
        if known:
            axis.plot([low, high], [place, place], color=colour, linewidth=1.6, solid_capstyle="butt")
        axis.plot([row["change"]], [place], color=colour, marker=marker, markersize=5, markerfacecolor=face)
    names = [short_label(row["measure"]) for row in rows]
    axis.set_yticks(range(len(rows)), labels=names, parse_math=False)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(visible=False, axis="y")
    axis.locator_params(axis="x", nbins=5)
    axis.ticklabel_format(axis="x", style="plain", useOffset=False)
    if span:
        axis.set_xlim(span)
    axis.set_xlabel("worse ← change → better", fontsize=LETTERS)
    return figure


def dims_plot(dims: Sequence[Mapping[str, Any]], measure: str) -> Any:
    """A figure of `measure` at each dimension, base against tuned; None where nothing is finite.

    `dims` have dim, base, tuned, and low and high: the 95 % interval of tuned - base, drawn from the base's value.
    """
    dims = sorted((d for d in dims if finite(d.get("base"), d.get("tuned"))), key=lambda d: d["dim"])
    if not dims:
        return None
    figure, (axis,) = narrow_figure(1, (1,), 2.5)
    places = range(len(dims))
    for place, row in zip(places, dims, strict=True):
        if finite(row.get("low"), row.get("high")):
            ends = [row["base"] + row["low"], row["base"] + row["high"]]
            axis.plot([place, place], ends, color=SOFT, linewidth=5, solid_capstyle="butt")
    axis.plot(places, [d["base"] for d in dims], color=ACCENT, linewidth=1.4, linestyle="--", marker="s", label="base")
    axis.plot(places, [d["tuned"] for d in dims], color=INK, linewidth=1.8, marker="o", label="tuned")
    for line in axis.lines:
        line.set_markersize(4.5)
    axis.set_xticks(places, labels=[f"{d['dim']:,}" for d in dims])
    axis.set_xlim(-0.4, len(dims) - 0.6)
    axis.set_xlabel("dimension of the vectors", fontsize=LETTERS)
    axis.set_ylabel(short_label(measure), fontsize=LETTERS, parse_math=False)
    axis.legend(frameon=False, fontsize=LETTERS, loc="lower right")
    return figure


def measures_curve(records: Sequence[Mapping[str, Any]], measure: str) -> Any:
    """A figure of loss, dev `measure` and learning rate over the steps; None where the log has none of them.

    `records` are those of log.jsonl; where they lack `measure`, the first other dev measure is drawn.
    """
    others = dict.fromkeys(key for r in records for key in r if key.startswith("dev_") and key != "dev_loss")
    wanted = f"dev_{measure}" if f"dev_{measure}" in others else next(iter(others), "")
    learned, losses = _series(records, "loss"), _series(records, "dev_loss")
    shown = {
        "loss": learned if len(learned[0]) else losses,
        wanted: _series(records, wanted),
        "lr": _series(records, "lr"),
    }
    panels = [name for name, (steps, _) in shown.items() if len(steps)]
    if not panels:
        return None
    heights = [0.8 if name == "lr" else 1.5 for name in panels]
    figure, axes = narrow_figure(len(panels), heights, 0.4 + sum(heights))
    for name, axis in zip(panels, axes, strict=True):
        title = {"loss": "loss", "lr": "learning rate"}.get(name, f"dev {name.removeprefix('dev_')}")
        axis.set_title(short_label(title, 50), loc="left", fontsize=LETTERS, parse_math=False)
        if name == "loss":
            _loss_panel(axis, learned, losses)
        elif name == wanted:
            _score_panel(axis, *shown[name])
        else:
            axis.plot(*shown[name], color=INK, linewidth=1.2)
            axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
            axis.yaxis.get_offset_text().set_fontsize(LETTERS)
    axes[-1].set_xlabel("step", fontsize=LETTERS)
    axes[-1].xaxis.set_major_formatter("{x:,.0f}")
    axes[-1].locator_params(axis="x", nbins=5, integer=True)
    return figure


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values (n,), (n,) of the records that have a finite `key`."""
    found = [(r["step"], r[key]) for r in records if finite(r.get("step"), r.get(key))]
    both = np.array(found, float).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _loss_panel(axis: Any, learned: tuple[np.ndarray, np.ndarray], scored: tuple[np.ndarray, np.ndarray]) -> None:
    if len(learned[0]) > 4 * (bins := BINS // 3):  # a narrow picture has room for fewer points
        x, mean, low, high = binned(*learned, bins)
        axis.fill_between(x, low, high, color=SOFT, alpha=0.5, linewidth=0, label="training, 10–90 %")
        axis.plot(x, mean, color=INK, linewidth=1.4, label="training, mean")
    elif len(learned[0]):
        axis.plot(*learned, color=INK, linewidth=1.2, label="training")
    if len(scored[0]):
        axis.plot(*scored, color=ACCENT, linewidth=1.4, linestyle="--", marker="s", markersize=3, label="dev")
    axis.legend(frameon=False, fontsize=LETTERS, loc="upper right")


def _score_panel(axis: Any, steps: np.ndarray, values: np.ndarray) -> None:
    axis.plot(steps, values, color=ACCENT, linewidth=1.4, marker="s", markersize=3)
    axis.margins(y=0.12)
    if steps[0] == 0:
        axis.axhline(values[0], color="black", linewidth=0.8, linestyle=":", label=f"base {values[0]:.4f}")
    best = int(np.argmax(values))
    axis.plot(
        steps[best : best + 1],
        values[best : best + 1],
        linestyle="none",
        marker="o",
        markersize=8,
        label=f"best {values[best]:.4f}",
        markerfacecolor="none",
        color=INK,
    )
    axis.legend(frameon=False, fontsize=LETTERS, loc="lower right")
