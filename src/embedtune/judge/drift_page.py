"""Drift of data and of models as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources

from embedtune import plots
from embedtune.judge.data_drift import DataDrift
from embedtune.plots_drift import drift_plot


def page(data: Sequence[DataDrift], models: Mapping[str, Sequence[str]]) -> str:
    """The page, which asks the network for nothing; `models` has sentences by the name of a model."""
    from jinja2 import Environment
    from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = resources.files("embedtune.judge").joinpath("drift.html").read_text(encoding="utf-8")
    parts = []
    for number, found in enumerate(data):
        if found.lengths is None:
            continue
        figure = drift_plot((found.new, found.old), found.distances, found.lengths)
        label = f"How far texts of {found.new} lie from old ones, and how long they are; the figures are in the text."
        parts.append((found, Markup(plots.svg(figure, f"drift-{number}", label))))
    return environment.from_string(template).render(parts=parts, models=models)
