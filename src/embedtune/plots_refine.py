"""Pictures of what probes find in a model's vectors, before and after an erasure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from embedtune.plots import ACCENT, INK, LETTERS, new_figure, short_label

Bar = tuple[float, float, float]  # a value and its interval
WIDTH, LINE, ROOM = 7.0, 0.36, 0.85  # inches: of the picture, of a line of it, and of a panel's title and axis


@dataclass(frozen=True)
class Panel:
    """Values on one scale, a line for each name: before (where it is known) and after; `chance` is marked."""

    title: str
    scale: str
    chance: float
    rows: Mapping[str, tuple[Bar | None, Bar]]


def probes_plot(panels: Sequence[Panel], title: str) -> Any:
    """A figure of one panel below the other; after is drawn in INK with circles, before in ACCENT with squares."""
    heights = [ROOM + LINE * len(panel.rows) for panel in panels]
    figure, axes = new_figure(len(panels), heights, (WIDTH, 0.5 + sum(heights)), share=False)
    for axis, panel in zip(axes, panels, strict=True):
        _draw(axis, panel)
    both = any(before for panel in panels for before, _ in panel.rows.values())
    if both:
        axes[0].legend(*_handles(), frameon=False, fontsize=LETTERS, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    figure.suptitle(short_label(title, 80), x=0.01, ha="left", fontsize=11, parse_math=False)
    return figure


def _draw(axis: Any, panel: Panel) -> None:
    axis.axvline(panel.chance, color="black", linewidth=0.8)
    ends = [panel.chance]
    for place, (before, after) in enumerate(panel.rows.values()):
        for bar, colour, marker, shift in ((before, ACCENT, "s", -0.14), (after, INK, "o", 0.14 if before else 0.0)):
            if bar:
                value, low, high = bar
                y = place + shift
                axis.plot([low, high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
                axis.plot([value], [y], color=colour, marker=marker, markersize=5)
                ends += [low, high]
    room = 0.04 * max(max(ends) - min(ends), 0.05)
    axis.set_xlim(min(ends) - room, max(*ends, panel.chance + 0.05) + room)
    axis.set_yticks(range(len(panel.rows)), labels=[short_label(name, 34) for name in panel.rows], parse_math=False)
    axis.set_ylim(len(panel.rows) - 0.5, -0.5)
    axis.grid(visible=False, axis="y")
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.tick_params(labelsize=LETTERS + 0.5, length=0)
    axis.set_title(panel.title, loc="left", fontsize=LETTERS + 1)
    axis.set_xlabel(panel.scale, fontsize=LETTERS)


def _handles() -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    kinds = {"before": (ACCENT, "s"), "after": (INK, "o")}
    return [Line2D([], [], color=c, marker=m, markersize=5) for c, m in kinds.values()], list(kinds)
