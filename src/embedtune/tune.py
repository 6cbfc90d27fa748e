"""One training from data to model folder: prepare, train, score, write. `finetune` is what CLI and Python call."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from embedtune import files, limits, recipes, schema
from embedtune.errors import Interrupted, Parted, UserError, did_you_mean
from embedtune.judge import card

CHECKPOINTS, DATA, BASE = "checkpoints", "data", "base"


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a run left: the folder, and the dev measures of the base, of a fresh head alone (or None), and tuned."""

    folder: Path
    scores: dict[str, Any]


def default_model() -> str:
    """The model that is taken where none is named."""
    from embedtune.encoder.load import DEFAULT

    return DEFAULT


def name_of(data: Any) -> str:
    """Data in words."""
    return str(data) if isinstance(data, str | Path) else "DATA"


def running(out: Path) -> Path:
    """Where a run lives until it is complete."""
    return out.with_name(out.name + ".running")


def finetune(
    recipe: Any,
    out: str | Path = "finetuned-bert",
    *,
    resume: bool = False,
    discard: bool = False,
    force: bool = False,
    profile: bool = False,
    listener: Any = None,
) -> Finished:
    """Fine-tune as `recipe` says and leave a standard model folder at `out`.

    Everything lives in `out.running` until it is complete, then appears as `out` by one rename. `resume` continues a
    run that was stopped or killed there, `discard` removes it, `force` replaces a finished `out`, `profile` tells the
    listener where the time of some steps went. Raises UserError for a user's mistake (nothing is written then),
    Interrupted after SIGINT or SIGTERM with its checkpoint written.
    Under torchrun all processes call this with the same arguments; the first one writes (docs/scale.md). Where one of
    them ends, the others raise Parted.
    """
    from embedtune.fit import ranks
    from embedtune.fit.engine import Listener

    out = Path(out)
    if not out.name:
        raise UserError("is no name for an output folder", where=repr(str(out)), fix="--out finetuned-bert")
    with ranks.started():
        if listener is None or ranks.world()[0]:
            listener = Listener()
        if ranks.first(lambda: resume and not discard and _complete(running(out))):
            listener.note("the run was complete; only its last rename was missing")
            ranks.first(lambda: _publish(running(out), out))
        else:
            _check_recipe(recipe, out)
            existed = ranks.first(lambda: _take(out, resume, discard, force))
            _run(recipe, out, resume, existed, profile, listener)
    return Finished(out, files.read_json(out / "scores.json"))


def _take(out: Path, resume: bool, discard: bool, force: bool) -> bool:
    """Make the place where the run lives; whether it was there before."""
    home = running(out)
    check_places(out, home, resume, discard, force)
    existed = home.exists()
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot be made: {error.strerror}", where=str(home), fix="choose another --out") from error
    return existed


def _run(recipe: Any, out: Path, resume: bool, existed: bool, profile: bool, listener: Any) -> None:
    """Train; a mistake found before anything was learned leaves nothing behind."""
    from embedtune.encoder.device import pick_device, repeatable
    from embedtune.encoder.shapes import TRAINING, bound_memory
    from embedtune.fit import ranks

    bound_memory(TRAINING)
    home, first = running(out), ranks.world()[0] == 0
    try:
        with files.disk_errors(home), files.locked(home) if first else nullcontext(), repeatable(pick_device()):
            _tune(recipe, home, out, resume, profile and first, listener)
    except (UserError, Interrupted, KeyboardInterrupt, Parted):
        if first and not existed and not list(home.glob(f"{CHECKPOINTS}/step-*")):
            shutil.rmtree(home, ignore_errors=True)
        raise


def _check_recipe(recipe: Any, out: Path) -> None:
    from embedtune.fit.past import chain

    found = limits.problems(recipe)
    if out.resolve() in chain(recipe):
        found.append("the run goes on from the folder that it would replace, or that one did: give another --out")
    if isinstance(recipe.train, str | Path) and not str(recipe.train):
        found.insert(0, "no training data is named")
    if found:
        raise UserError(f"{len(found)} problem(s) in the recipe", details=found, fix="mend the values named above")


def check_places(out: Path, home: Path, resume: bool, discard: bool, force: bool) -> None:
    """Refuse where a run or a finished folder is in the way, and remove what `discard` allows."""
    if resume and discard:
        raise UserError("--resume and --discard exclude each other", fix="say one of them")
    if resume and not home.is_dir():
        state = f"{out} is finished" if out.exists() else "no run was started there"
        raise UserError(
            f"there is nothing to resume: {state}", where=str(home), fix="name the --out of the stopped run"
        )
    if home.exists() and not (resume or discard):
        raise UserError(
            "a run was started here and not finished",
            where=str(home),
            fix="--resume continues it, --discard removes it",
        )
    if out.exists() and not force and not resume:
        raise UserError(
            "exists already", where=str(out), fix="another --out, or --force to replace it when the run is done"
        )
    if discard and home.is_dir():
        with files.locked(home):
            files.remove_directory(home)


def _complete(home: Path) -> bool:
    return (home / "run.json").is_file() and bool(files.read_json(home / "run.json").get("finished"))


def _publish(home: Path, out: Path) -> None:
    """Drop what only the run needed, and give the folder its final name."""
    torn = [path.name for path in home.glob(".tmp*")]  # what safetensors was writing when it was killed
    for name in (CHECKPOINTS, DATA, BASE, "start.json", files.LOCK, *torn):
        path = home / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for path in home.glob(f"*{files.TEMPORARY}"):  # of a write that a kill cut short and nothing repeated
        path.unlink()
    files.move_directory(home, out)


def prepare(recipe: Any, home: Path, note: Any) -> Any:
    """Everything before the first step, as `Prepared`; `home` receives the tokenised data."""
    from embedtune.fit.past import settled

    recipe = settled(recipe)
    match recipes.task_of(recipe):
        case "mlm":
            from embedtune.fit.objectives.prepare import prepare_mlm

            return prepare_mlm(recipe, home, note)
        case "contrastive":
            from embedtune.fit.objectives.contrastive import prepare_contrastive

            return prepare_contrastive(recipe, home, note)
        case "scored":
            from embedtune.fit.objectives.scored import prepare_scored

            return prepare_scored(recipe, home, note)
        case "tag":
            from embedtune.fit.objectives.tag import prepare_tag

            return prepare_tag(recipe, home, note)
        case task:
            from embedtune.fit.objectives.classify import prepare_classify, prepare_regress

            return (prepare_classify if task == "classify" else prepare_regress)(recipe, home, note)


def _tune(recipe: Any, home: Path, out: Path, resume: bool, profile: bool, listener: Any) -> None:
    from embedtune import plots
    from embedtune.fit import ranks
    from embedtune.fit.engine import read_log, train
    from embedtune.fit.merge import weights
    from embedtune.fit.profiled import Blind, Watch
    from embedtune.scoring import Scorer, draw_scores
    from embedtune.track import followed

    task = recipes.task_of(recipe)
    prepared = ranks.together(lambda: prepare(recipe, home, listener.note))
    _check_same(prepared.identity, ranks.first(lambda: prepared.identity))
    objective = prepared.objective
    loop = recipes.Loop(**ranks.first(lambda: dataclasses.asdict(_start(recipe, prepared, home, resume))))
    final = dataclasses.replace(prepared.recipe, loop=loop)
    for line in prepared.remarks:
        listener.note(line)
    title = f"{prepared.name} on {prepared.profile['name']}"

    def draw() -> None:
        plots.loss_curve(read_log(home), home / "loss", f"{title}: {card.TASKS[task]}", card.LOSSES[task])
        draw_scores(read_log(home), task, home, title)

    scorer = Scorer(prepared, task, home)
    before = weights(objective.model) if prepared.old else {}
    heard = listener if ranks.world()[0] else followed(listener, recipe.loop.track, home)
    watch = Watch(objective, str(loop.precision), listener.note) if profile else Blind()
    outcome = train(objective, loop, watch.apart(scorer), home, watch.apart(draw), heard)
    watch.end()

    def write() -> None:
        draw()
        listener.note(f"training ended: {outcome.why}")
        _write(Trained(final, title, scorer, outcome, before), home, out, listener)
        _publish(home, out)

    ranks.first(write)


def _check_same(mine: Mapping[str, str], firsts: Mapping[str, str]) -> None:
    """Processes that read other data, or run on other software, would not train one model."""
    if differs := [f"{key}: {value}, not {firsts.get(key)}" for key, value in mine.items() if firsts.get(key) != value]:
        what = "this process has not what the first one has"
        raise UserError(what, details=differs, fix="give all machines the same files and packages")


def _start(recipe: Any, prepared: Any, home: Path, resume: bool) -> recipes.Loop:
    """The loop with all that is derived: that of the run which is resumed, else a new one, which is written down."""
    from embedtune.fit.derive import resolve
    from embedtune.scoring import side_measures

    start = {"recipe": schema.to_toml(recipe), **prepared.identity}
    loop, of_sides = _agree(home, start, resume), side_measures(prepared, recipes.task_of(recipe))
    if loop is None:
        loop = dataclasses.replace(prepared.recipe.loop, measure=_measure(recipe.loop.measure, prepared, of_sides))
        loop = resolve(loop, prepared.objective, prepared.max_length, prepared.lr)
        size = sum(p.numel() for p in prepared.objective.model.parameters()) * 4
        files.need_space(home, 3 * 3 * size + 3 * size, "three checkpoints and the model")
        files.write_json(home / "start.json", {**start, "loop": dataclasses.asdict(loop)})
    files.write_text(home / "recipe.toml", schema.to_toml(dataclasses.replace(prepared.recipe, loop=loop)))
    return loop


@dataclasses.dataclass(frozen=True)
class Trained:
    """A training that has ended, and what is needed to tell of it; `before` are the weights of the run before."""

    recipe: Any  # with every field resolved
    title: str
    scorer: Any
    outcome: Any
    before: Mapping[str, Any]


def _write(trained: Trained, home: Path, out: Path, listener: Any) -> None:
    """Scores, model, pictures and account of a training that has ended, into `home`."""
    from embedtune import finish
    from embedtune.fit.merge import set_average
    from embedtune.scoring import draw_answers, scores_of

    final, scorer, outcome, title = trained.recipe, trained.scorer, trained.outcome, trained.title
    prepared, measure = scorer.prepared, final.loop.measure or ""
    scores = scores_of(home, scorer, outcome.best_step, measure)
    if getattr(final, "merge", "none") == "auto":
        finish.average(scores, scorer, outcome.best_step, measure, listener)
    if scores.get("sides") and scores["word"] == "REGRESSION":
        # What got worse is not handed out.
        set_average(prepared.objective.model, trained.before, trained.before, 0.0)
        scores |= {"refused": scores["tuned"], "tuned": scores["baseline"]}
    erased = finish.without_length(scores, scorer, out) if recipes.length_penalty(final) else None
    scores["verdict"] = card.verdict(scores)
    prepared.objective.save(home)
    if erased:
        erased(home)
    draw_answers(scorer, 0 if "refused" in scores else outcome.best_step, home, title)
    files.write_json(home / "scores.json", scores)
    facts = [
        *prepared.remarks,
        f"training ended after step {outcome.state.step:,}: {outcome.why}",
        *outcome.state.events,
        *card.averaging(scores),
        *scores.get("erasure", []),
    ]
    toml = schema.to_toml(final)
    about = card.About(scorer.task, title, str(final.model), scores, prepared.profile, facts, toml)
    files.write_text(home / "README.md", card.markdown(about))
    files.write_json(home / "run.json", _account(prepared, outcome, facts))


def _account(prepared: Any, outcome: Any, facts: list[str]) -> dict[str, Any]:
    """run.json: enough to say later what ran where on what."""
    import torch

    import embedtune

    state = outcome.state
    return {
        "finished": True,
        "embedtune": embedtune.__version__,
        "python": platform.python_version(),
        **prepared.identity,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "torch_build": torch.__version__,
        "steps": state.step,
        "of": outcome.total,
        "tokens": state.tokens,
        "seconds": round(state.seconds, 3),
        "tokens_per_second": round(state.tokens / state.seconds) if state.seconds else None,
        "ended": outcome.why,
        "remarks": facts,
        "data": prepared.profile,
    }


def machine(folder: Path) -> dict[str, Any]:
    """Where the run that left `folder` ran, out of its account."""
    names = ("cpu", "cores", "device", "threads", "torch", "transformers", "python", "embedtune", "tokens_per_second")
    account = files.read_json(folder / "run.json")
    return {name: account[name] for name in names if account.get(name)}


def _cpu() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return platform.processor()


def _measure(asked: str | None, prepared: Any, of_sides: Sequence[str] = ()) -> str:
    """The dev measure that decides: the one asked for, with or without its dev_, or the task's own."""
    known = [*prepared.objective.measures, *of_sides]
    if asked is None:
        return of_sides[-1] if of_sides else str(prepared.measure)
    names = {name.casefold(): name for name in known}
    found = names.get(asked.casefold()) or names.get(f"dev_{asked}".casefold())
    if found is None:
        raise UserError(
            f"there is no dev measure {asked!r}{did_you_mean(asked, known)}; there are {', '.join(known)}",
            where="--measure",
        )
    return found


def _agree(home: Path, start: Mapping[str, Any], resume: bool) -> recipes.Loop | None:
    """The resolved loop of the run that is resumed; a UserError that lists what differs from how it was started."""
    path = home / "start.json"
    if not resume or not path.is_file():
        return None
    before = files.read_json(path)
    differs = []
    for key in dict.fromkeys([*start, *before]):  # also what only one of them says
        value = start.get(key)
        if key == "loop" or before.get(key) == value:
            continue
        if key == "recipe":
            old, new = str(before.get(key, "")).splitlines(), str(value).splitlines()
            differs += [f"recipe: {line} (was {_was(line, old)})" for line in new if line not in old]
            differs += [
                f"recipe: {line} is gone" for line in old if line.split(" =")[0] not in {x.split(" =")[0] for x in new}
            ]
        else:
            differs.append(f"{key}: {value} (was {before.get(key)})")
    if differs:
        raise UserError(
            f"the run in {home} cannot be resumed: {len(differs)} thing(s) changed since it was started",
            details=differs[:10],
            fix="put them back, or start anew with --discard",
        )
    return recipes.Loop(**before["loop"])


def _was(line: str, old: list[str]) -> str:
    name = line.split(" =")[0]
    return next((o.partition(" = ")[2] for o in old if o.split(" =")[0] == name), "not set")
