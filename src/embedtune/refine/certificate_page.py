"""The certificate as a page and a picture."""

from __future__ import annotations

from importlib import resources
from typing import Any

from embedtune import plots
from embedtune.plots_refine import Bar, Panel, probes_plot
from embedtune.refine.certificate import Certificate, Found
from embedtune.refine.probes import Linear

MOST = 6  # linear columns in the picture, worst first


def picture(certificate: Certificate) -> Any:
    """A figure of what each probe finds, before and after."""
    after, before = certificate.after, certificate.before
    share = "share of the variance that is read"
    old = {column.name: column for column in before.linear} if before else {}
    linear = {c.name: (_rho2(old[c.name]) if c.name in old else None, _rho2(c)) for c in after.linear[:MOST]}
    panels = [Panel("linear probe, population", share, 0.0, linear)]
    chance = after.readings[0].chance
    others = _others(after)
    olds = _others(before) if before else {}
    scale = "balanced accuracy on unseen rows (line: chance)" if chance else f"{share} on unseen rows (R²)"
    title = f"other probes, {after.told}" if not chance else f"{after.told}, told by a probe"
    panels.append(Panel(title, scale, chance, {name: (olds.get(name), bar) for name, bar in others.items()}))
    return probes_plot(panels, f"{certificate.concept} in {certificate.model}")


def page(certificate: Certificate) -> str:
    """The certificate as one HTML file that asks the network for nothing."""
    from jinja2 import Environment
    from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["capital"] = lambda words: words[:1].upper() + words[1:]
    template = resources.files("embedtune.refine").joinpath("certificate.html").read_text(encoding="utf-8")
    drawn = plots.svg(picture(certificate), "probes", "What each probe finds; the numbers are in the table.")
    repeat = {"seed": certificate.seed, **{f"sha256, {name}": v for name, v in certificate.digests.items() if v}}
    return environment.from_string(template).render(
        word=certificate.word,
        concept=certificate.concept,
        model=certificate.model,
        sentences=certificate.sentences(),
        figures=certificate.figures(),
        costs=certificate.costs(),
        picture=Markup(drawn),
        repeat=repeat,
    )


def _others(found: Found) -> dict[str, Bar]:
    bars = {reading.probe: _bar(reading.value, reading.low, reading.high) for reading in found.readings}
    if classes := found.accuracy:
        return {"linear discriminants": _bar(classes.value, classes.low, classes.high), **bars}
    return bars


def _rho2(column: Linear) -> Bar:
    return _bar(column.shown, column.low, column.high)


def _bar(value: float, low: float, high: float) -> Bar:
    return value, low, high
