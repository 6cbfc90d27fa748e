"""embedtune run: the whole story in one command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from embedtune import recipes, schema
from embedtune.commands.fit import Place, resume_takes_out
from embedtune.commands.shape import Command, Flags, Output, Talk, table

PROXY = "The queries were proxies made from the text: --queries FILE judges on real ones, fifty are a beginning."


@dataclass(frozen=True)
class Whole:
    """Raw text, pairs or labels in, a verdict out: clean, split, tune, average, judge, report."""

    recipe: recipes.Run
    place: Place


def whole(command: Whole, talk: Talk) -> Output:
    """Run it all; the exit code is 3 where the verdict is REGRESSION."""
    from embedtune.encoder.shapes import TRAINING, bound_memory
    from embedtune.run import run

    bound_memory(TRAINING)
    place = command.place
    ended = run(command.recipe, place.out, resume=place.resume, discard=place.discard, force=place.force,
                listener=talk.listener())  # fmt: skip
    story, lines = ended.story, []
    for found in story["tables"]:
        if "constant" in found["rows"][0]:
            lines += _of_labels(found, story["models"])
            continue
        lines += [f"{found['name']}: {found['queries']:,} queries, {found['corpus']:,} texts"]
        rows = [[r["measure"], *(f"{r[k]:.4f}" for k in ("base", "tuned")), f"{r['change']:+.4f}",
                 f"{r['low']:+.4f} to {r['high']:+.4f}"] for r in found["rows"]]  # fmt: skip
        lines += [*table(["measure", "base", "tuned", "change", "95 % interval"], rows), ""]
    verdict = story["verdict"]
    lines += [f"{ended.folder}/ holds the model and report.html", verdict["changes"], verdict["sentence"]]
    if verdict["queries"] == "proxy":
        lines[-1] += " " + PROXY
    return Output(lines, {"folder": str(ended.folder), **{k: v for k, v in story.items() if k != "log"}}, ended.code)


def _of_labels(found: dict[str, Any], models: list[dict[str, Any]]) -> list[str]:
    """The table of a run on labels."""

    def shown(value: float | None, form: str = ".4f") -> str:
        return "-" if value is None else format(value, form)

    rows = [[r["measure"], *(shown(r[k]) for k in ("constant", "base", "tuned")), shown(r["change"], "+.4f"),
             f"{shown(r['low'], '+.4f')} to {shown(r['high'], '+.4f')}"] for r in found["rows"]]  # fmt: skip
    header = ["measure", models[0]["name"] if len(models) > 3 else "constant", "linear probe", "tuned", "change",
              "95 % interval"]  # fmt: skip
    return [f"{found['items']:,} test rows", *table(header, rows), ""]


def _defaults(argv: list[str]) -> Flags:
    from pathlib import Path

    argv, recipe = resume_takes_out(argv), recipes.Run()
    if argv and argv[0].endswith(".toml"):
        recipe = schema.from_table(recipes.Run, schema.read_toml(Path(argv[0])), argv[0])
        argv = argv[1:]
    return argv, Whole(recipe, Place(out="embedtune-run"))


COMMANDS = {
    "run": Command("DATA|RECIPE.toml", "text, pairs or labels in, a verdict out", Whole, whole, "--data", _defaults),
}
