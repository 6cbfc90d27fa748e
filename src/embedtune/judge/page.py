"""The report of a run as one HTML file: verdict first, then the evidence, what was dropped, and how to repeat it.

The page asks the network for nothing and runs no script; a content security policy in its head holds it to that.
Every text in it comes from someone's data: the template escapes all, only the pictures of plots.svg go in as they are.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from embedtune import plots, plots_labels

if TYPE_CHECKING:
    from markupsafe import Markup

CLIP = 280  # characters of a text that are shown at once; the rest is one click away
LONGEST = 20_000  # characters of a text that the page carries at all
TONES = {"WIN": "win", "MARGINAL": "marginal", "REGRESSION": "regression"}
NONE = "-"
# What a story may lack; the page then leaves the part out.
PARTS: dict[str, Any] = {
    **dict.fromkeys(("profile", "machine", "changed"), {}),
    **dict.fromkeys(("remarks", "log", "tables", "dims", "examples_of_pairs", "repeat"), ()),
    **dict.fromkeys(("measure", "recipe", "kind", "task"), ""),
    **dict.fromkeys(("averaging", "drift"), None),
    # Of labels only.
    **dict.fromkeys(("models", "classes", "mistakes"), ()),
    **dict.fromkeys(("confusion", "reliability", "scatter"), None),
}


def page(story: Mapping[str, Any]) -> str:
    """The whole HTML page; the same story gives the same bytes.

    `story` has title, base, model, verdict, and what there is of PARTS. Of a table's row, low and high are the 95 %
    interval of the change; of an entry of `dims` they are the interval of tuned - base at that dimension.
    """
    from jinja2 import Environment, FunctionLoader

    folder = resources.files("embedtune.judge")
    loader = FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8"))
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        **{"number": number, "signed": signed, "chance": chance, "percent": percent, "plain": plain},
        **{"clip": clip, "whole": whole},
    }
    told = {key: value for key, value in _clean(story).items() if value is not None}
    told = {**PARTS, **told}
    measure = told["measure"] or next((row["measure"] for table in told["tables"] for row in table["rows"]), "")
    verdict = told["verdict"]
    sentence = verdict["sentence"].removeprefix(f"{verdict['word']}: ")  # the word stands above it
    view = {
        "sentence": sentence[:1].upper() + sentence[1:],
        "tone": TONES.get(verdict["word"], "marginal"),
        "main": [(table, row) for table in told["tables"] for row in table["rows"] if row["measure"] == measure],
        "pictures": _pictures(told, measure),
        "widest": max(told["dims"], key=lambda d: d["dim"], default=None),
        "tried": _tried(told["averaging"]),
        "pace": _pace(told["log"]),
        "sides": [(way, told["changed"].get(way) or ()) for way in ("better", "worse")],
        "clip_at": CLIP,
        "constant": told["models"][0]["name"] if told["models"] else "constant",
    }
    return environment.get_template("page.html").render({**told, **view, "measure": measure})


def _pictures(told: Mapping[str, Any], measure: str) -> dict[str, Any]:
    """Inline SVG: "changes" has one for each table (None where nothing can be drawn), the others are single."""
    shown = [[row for row in table["rows"] if not row.get("lower")] for table in told["tables"]]
    ends = [row.get(key) for rows in shown for row in rows for key in ("low", "high", "change")]
    known = [0.0, *(end for end in ends if plots.finite(end))]
    room = 0.06 * (max(known) - min(known)) or 0.01
    span = (min(known) - room, max(known) + room)
    changes = [
        _inline(
            plots.changes_plot(shown[place], span),
            f"changes-{place}",
            f"Changes of the measures on {table['name']} with their intervals; the numbers are in the table.",
        )
        for place, table in enumerate(told["tables"])
    ]
    dims = plots.dims_plot(told["dims"], measure)
    log = plots.measures_curve(told["log"], measure)
    return {
        "changes": changes,
        "dims": _inline(dims, "dims", f"{measure} at each dimension, base and tuned; the numbers are in the table."),
        "log": _inline(log, "log", "Loss, dev measure and learning rate over the steps of the training."),
        **_answers(told),
    }


def _answers(told: Mapping[str, Any]) -> dict[str, Any]:
    """What the tuned model said against what is right, where the story has it."""
    drawn: dict[str, Any] = {}
    if (found := told["confusion"]) and len(found["names"]) <= plots_labels.NUMBERED:
        drawn["confusion"] = plots_labels.confusion_figure(np.array(found["counts"]), found["names"])
    if found := told["reliability"]:
        drawn["reliability"] = plots_labels.reliability_figure([np.array(part) for part in found["bins"]], found["ECE"])
    if found := told["scatter"]:
        drawn["scatter"] = plots_labels.scatter_figure(np.array(found["right"]), np.array(found["said"]))
    words = {"confusion": "How often each class was taken for each.", "reliability": "Confidence against accuracy.",
             "scatter": "Predicted scores over the right ones."}  # fmt: skip
    return {name: _inline(figure, name, words[name]) for name, figure in drawn.items()}


def _inline(figure: Any, name: str, label: str) -> Markup | None:
    from markupsafe import Markup

    return None if figure is None else Markup(plots.svg(figure, name, label))


def _tried(averaging: Mapping[str, Any] | None) -> list[tuple[str, Any, bool]]:
    """(coefficient, value on dev, whether it was taken) by coefficient."""
    if not averaging:
        return []
    found = sorted((float(key), value) for key, value in (averaging.get("tried") or {}).items())
    return [(number(key, 2), value, key == averaging["coefficient"]) for key, value in found]


def _pace(log: list[Mapping[str, Any]]) -> list[str]:
    """Steps, epochs, seconds and speed of the training, in words."""
    learned = [r for r in log if plots.finite(r.get("step"), r.get("loss"))]
    if not learned:
        return []
    seconds = [r["seconds"] for r in log if plots.finite(r.get("seconds"))]
    rates = sorted(r["tokens_per_second"] for r in learned if plots.finite(r.get("tokens_per_second")))
    words = [f"{plain(learned[-1]['step'])} steps"]
    if plots.finite(learned[-1].get("epoch")):
        words.append(f"{learned[-1]['epoch']:.2f} epochs")
    if seconds:
        words.append(f"{max(seconds):,.0f} seconds")
    if rates:
        words.append(f"{rates[len(rates) // 2]:,.0f} tokens a second in the median")
    return words


def _clean(value: Any) -> Any:
    """A copy in which no string has what cannot stand in a page: halves of surrogate pairs and control characters."""
    if isinstance(value, str):
        kinds = {character: unicodedata.category(character) for character in set(value)}
        wrong = {
            ord(c): "\N{REPLACEMENT CHARACTER}"
            for c, kind in kinds.items()
            if kind in ("Cc", "Cs") and c not in "\n\t\r"
        }
        return value.translate(wrong)
    if isinstance(value, Mapping):
        return {_clean(key): _clean(inner) for key, inner in value.items()}
    if isinstance(value, Iterable):
        return [_clean(inner) for inner in value]
    return value


def number(value: object, decimals: int = 4) -> str:
    """A measure with a fixed number of decimals; "-" where it is missing or not finite."""
    return f"{value:,.{decimals}f}".replace("-", "\N{MINUS SIGN}") if plots.finite(value) else NONE


def signed(value: Any) -> str:
    """A change with its sign and four decimals; what rounds to zero has no sign."""
    if not plots.finite(value):
        return NONE
    return number(0.0) if round(value, 4) == 0 else f"{value:+,.4f}".replace("-", "\N{MINUS SIGN}")


def chance(value: Any) -> str:
    """A p-value with four decimals."""
    return "< 0.0001" if plots.finite(value) and value < 0.0001 else number(value)


def percent(value: Any) -> str:
    """A share as percent with one decimal."""
    return f"{100 * value:.1f} %" if plots.finite(value) else NONE


def plain(value: Any) -> str:
    """Any other value in words: counts with their thousands, lists with commas, "-" for what is missing."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(inner)}" for key, inner in value.items()) or NONE
    if isinstance(value, list):
        return ", ".join(plain(inner) for inner in value) or NONE
    if value is None or not isinstance(value, int | float):
        return NONE if value is None else str(value)
    if not plots.finite(value):
        return NONE
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def clip(text: str, most: int = CLIP) -> str:
    """The beginning of a text on one line, cut between words where there are any."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    cut = line[:most]
    return (cut[: cut.rfind(" ")] if cut.rfind(" ") > most // 2 else cut) + " …"


def whole(text: str) -> str:
    """The text itself, up to LONGEST characters; a cut is said."""
    more = len(text) - LONGEST
    return text if more <= 0 else f"{text[:LONGEST]} … [{more:,} more characters are not shown]"
