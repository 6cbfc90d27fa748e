"""embedtune fit: a recipe from flags or TOML, then one training."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any

from embedtune import recipes, schema
from embedtune.commands.shape import Command, Flags, Output, Talk, table
from embedtune.errors import EXIT_FINE, EXIT_REGRESSION


@dataclass(frozen=True)
class Place:
    """Where the model goes."""

    # Folder of the finished model; while it is made, everything lives in OUT.running.
    out: str = "finetuned-bert"
    # Continue the run that was stopped or killed (also: --resume OUT).
    resume: bool = False
    # Remove what an unfinished run left and start anew.
    discard: bool = False
    # Replace a finished folder of that name, once the new one is complete.
    force: bool = False
    # Say where the time goes: some of the training's steps are watched.
    profile: bool = False
    # Print the result as JSON.
    json: bool = False


@dataclass(frozen=True)
class Trials:
    """What is tried first."""

    # Short trainings with each of some values, the best on dev then in full: --try lr=5e-5,3e-5,2e-5.
    trials: str | None = None


def fit(command: Any, talk: Talk) -> Output:
    """Train, and show base against tuned."""
    from embedtune.fit import ranks
    from embedtune.judge import card
    from embedtune.trials import try_out
    from embedtune.tune import check_places, finetune, running

    place, recipe, lines, out = command.place, command.recipe, [], Path(command.place.out)
    if command.trials.trials and not place.resume:
        ranks.first(lambda: check_places(out, running(out), False, place.discard, place.force))
        tried = try_out(recipe, command.trials.trials, out, talk.listener())
        recipe, measure = tried.recipe, card.label(tried.measure, recipes.task_of(recipe))
        rows = [[value, f"{score:.4f}"] for value, score in tried.found.items()]
        lines += [*table([f"tried: {tried.name}", measure], rows), ""]
    finished = finetune(recipe, place.out, resume=place.resume, discard=place.discard, force=place.force,
                        profile=place.profile, listener=talk.listener())  # fmt: skip
    lines += [
        *table(*card.score_table(finished.scores)),
        *card.averaging(finished.scores),
        finished.scores["verdict"],
        f"{finished.folder}/ holds the model, README.md, loss.png, recipe.toml, run.json, log.jsonl",
    ]
    code = EXIT_REGRESSION if finished.scores.get("word") == "REGRESSION" else EXIT_FINE
    return Output(lines, {"folder": str(finished.folder), **finished.scores}, code)


def _defaults(kind: type, recipe_kind: type) -> Any:
    def find(argv: list[str]) -> Flags:
        """The recipe that flags change: of the run to be resumed, a TOML file, the run before, or the defaults."""
        argv = ["--trials" if word == "--try" else word for word in resume_takes_out(argv)]
        place, recipe = Place(), recipe_kind()
        run = flag(argv, "--continue-from")
        resuming = "--resume" in argv and (not argv or argv[0].startswith("-"))
        out = Path(flag(argv, "--out") or place.out)
        source = out.with_name(out.name + ".running") / "start.json" if resuming and out.name else None
        if source and source.is_file():
            recipe = schema.from_table(recipe_kind, _stored_recipe(source), str(source))
        elif argv and argv[0].endswith(".toml"):
            recipe = schema.from_table(recipe_kind, schema.read_toml(Path(argv[0])), argv[0])
            argv = argv[1:]
        elif run:
            from embedtune.fit.past import continued, open_run

            open_run(run, recipe_kind)
            recipe = continued(run)
        return argv, kind(recipe, place)

    return find


def flag(argv: list[str], name: str) -> str | None:
    """The value of a flag among words that are not parsed yet; None where it is not there."""
    split = [part for word in argv for part in (word.split("=", 1) if word.startswith(f"{name}=") else [word])]
    return split[split.index(name) + 1] if name in split[:-1] else None


def _stored_recipe(start: Path) -> dict[str, Any]:
    import tomllib

    from embedtune import files

    return tomllib.loads(files.read_json(start)["recipe"])


def resume_takes_out(argv: list[str]) -> list[str]:
    """`--resume OUT` is `--resume --out OUT`."""
    if "--resume" in argv:
        at = argv.index("--resume") + 1
        if at < len(argv) and not argv[at].startswith("-"):
            return [*argv[:at], "--out", *argv[at:]]
    return argv


def _command(recipe_kind: type, summary: str, about: str) -> Command:
    """The command of a recipe; its --help begins with `about`."""
    fields: list[Any] = [("recipe", recipe_kind), ("place", Place), ("trials", Trials, Trials())]
    kind = make_dataclass(f"Fit{recipe_kind.__name__}", fields, frozen=True, namespace={"__doc__": about})
    return Command("DATA|RECIPE.toml", summary, kind, fit, "--train", _defaults(kind, recipe_kind))


COMMANDS = {
    "fit mlm": _command(
        recipes.MLM,
        "masked language modelling on raw lines",
        "Masked language modelling on raw lines: the encoder learns the language of your text.",
    ),
    "fit contrastive": _command(
        recipes.Contrastive,
        "pairs in, better retrieval out",
        "Pairs, triplets or any number of negatives: anchors come to lie near their positives.",
    ),
    "fit scored": _command(
        recipes.Scored,
        "scored pairs: similarities follow the scores",
        "Pairs of texts with a score: similarities come to follow the scores.",
    ),
    "fit classify": _command(
        recipes.Classify,
        "labels in, a classifier out",
        "Labels in, a classifier out: one class a text, or several.",
    ),
    "fit regress": _command(
        recipes.Regress,
        "scores in, a regressor out",
        "Scores in, a regressor out: one number a text.",
    ),
    "fit tag": _command(
        recipes.Tag,
        "tagged sentences in, a tagger out",
        "Tagged sentences in, a tagger out.",
    ),
}
