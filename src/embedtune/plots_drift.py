"""A picture of how new texts differ from old ones: how far the nearest old text is, and how long they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from embedtune.plots import ACCENT, INK, LETTERS, new_figure, short_label

BINS = 30
Sides = tuple[np.ndarray, np.ndarray]  # of the new texts, and of the old ones


def drift_plot(names: tuple[str, str], distances: Sides | None, lengths: Sides) -> Any:
    """A figure of both distributions; `names` are those of the new and the old texts, new in ACCENT, old in INK."""
    panels = [("words a text", [np.log10(np.maximum(side, 1)) for side in lengths])]
    if distances is not None:
        panels.insert(0, ("cosine distance to the nearest old text", list(distances)))
    figure, axes = new_figure(len(panels), [1] * len(panels), (4.2, 0.3 + 1.9 * len(panels)), share=False)
    for axis, (title, sides) in zip(axes, panels, strict=True):
        edges = np.histogram_bin_edges(np.concatenate(sides), BINS)
        _draw(axis, edges, sides, [short_label(name, 24) for name in names])
        axis.set_xlabel(title, fontsize=LETTERS)
        axis.set_ylabel("share of texts", fontsize=LETTERS)
        axis.tick_params(labelsize=LETTERS)
    decades = np.arange(0, np.ceil(max(side.max() for side in panels[-1][1])) + 1)
    axes[-1].set_xticks(decades, labels=[f"{10 ** int(d):,}" for d in decades])
    axes[0].legend(frameon=False, fontsize=LETTERS)
    return figure


def _draw(axis: Any, edges: np.ndarray, sides: Sequence[np.ndarray], names: Sequence[str]) -> None:
    for side, name, colour in zip(sides, names, (ACCENT, INK), strict=True):
        share = np.histogram(side, edges)[0] / max(1, len(side))
        axis.stairs(share, edges, color=colour, linewidth=1.5, label=name.replace("$", r"\$"))
