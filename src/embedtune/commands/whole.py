"""embedtune run: the whole story in one command."""

from __future__ import annotations

from dataclasses import dataclass

from embedtune import recipes, schema
from embedtune.commands.fit import Place, resume_takes_out
from embedtune.commands.shape import Command, Flags, Output, Talk

PROXY = "The queries were proxies made from the text: --queries FILE judges on real ones, fifty are a beginning."


@dataclass(frozen=True)
class Whole:
    """Raw text or pairs in, a verdict out: clean, split, tune, average, judge, report."""

    recipe: recipes.Run
    place: Place


def whole(command: Whole, talk: Talk) -> Output:
    """Run it all; the exit code is 3 where the verdict is REGRESSION."""
    from embedtune.commands.shape import table
    from embedtune.run import run

    place = command.place
    ended = run(command.recipe, place.out, resume=place.resume, discard=place.discard, force=place.force,
                listener=talk.listener())  # fmt: skip
    story, lines = ended.story, []
    for found in story["tables"]:
        lines += [f"{found['name']}: {found['queries']:,} queries, {found['corpus']:,} texts"]
        rows = [[r["measure"], *(f"{r[k]:.4f}" for k in ("base", "tuned")), f"{r['change']:+.4f}",
                 f"{r['low']:+.4f} to {r['high']:+.4f}"] for r in found["rows"]]  # fmt: skip
        lines += [*table(["measure", "base", "tuned", "change", "95 % interval"], rows), ""]
    verdict = story["verdict"]
    lines += [f"{ended.folder}/ holds the model and report.html", verdict["changes"], verdict["sentence"]]
    if verdict["queries"] == "proxy":
        lines[-1] += " " + PROXY
    return Output(lines, {"folder": str(ended.folder), **{k: v for k, v in story.items() if k != "log"}}, ended.code)


def _defaults(argv: list[str]) -> Flags:
    from pathlib import Path

    argv, recipe = resume_takes_out(argv), recipes.Run()
    if argv and argv[0].endswith(".toml"):
        recipe = schema.from_table(recipes.Run, schema.read_toml(Path(argv[0])), argv[0])
        argv = argv[1:]
    return argv, Whole(recipe, Place(out="embedtune-run"))


COMMANDS = {
    "run": Command("DATA|RECIPE.toml", "raw text or pairs in, a verdict out", Whole, whole, "--data", _defaults),
}
