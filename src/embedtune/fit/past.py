"""Training that goes on: a finished run's model on new rows, with a sample of the rows that it was trained on.

The old rows are not copied anywhere. They are read again from where the old recipe says, checked by their hash, and
parted as they were: that is a function of recipe and rows. So what the old run was scored on can be scored on again,
and is never trained on. A run may go on from one that went on from another; then all of this happens once more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedtune import files, keyed, schema
from embedtune.errors import UserError
from embedtune.recipes import MLM, RECIPES, Past, usual

if TYPE_CHECKING:
    import numpy as np

    from embedtune.data.read import Counts

REPLAY = 7  # what a key is for: which old rows are trained on again
FEWEST_DEV = 3  # new rows to score on: a correlation needs three
# What a run derives from the size of its data or from its machine, and the measure, which has another meaning here.
DERIVED = ("eval_steps", "checkpoint_steps", "log_steps", "max_tokens", "precision", "compile", "measure")
# What made the model that training started from, which is there now, and how the size of the data had it read.
MADE = {"scratch": False, "add_words": 0, "head_steps": None, "on_the_fly": None}
WITHOUT = "--replay 0 goes on without it (then nothing shows what is forgotten)"


@dataclass(frozen=True)
class Earlier:
    """A finished run: its folder, its recipe and its account (run.json)."""

    folder: Path
    recipe: Any
    account: dict[str, Any]


def open_run(folder: str | Path, kind: type) -> Earlier:
    """The finished run in `folder`; a UserError where there is none, or one of another task than `kind`."""
    place = Path(folder)
    fix = "name a folder that `embedtune fit` left; another model is tuned with --model"
    if not (place / "recipe.toml").is_file() or not (place / "run.json").is_file():
        raise UserError("is no finished run: it has no recipe.toml or no run.json", where=str(folder), fix=fix)
    table = schema.read_toml(place / "recipe.toml")
    task = next(name for name, each in RECIPES.items() if each is kind)
    if (named := table.get("task")) != task:
        raise UserError(f"its task is {named!r}, not {task!r}", where=str(folder), fix=fix)
    return Earlier(
        place, schema.from_table(kind, table, str(place / "recipe.toml")), files.read_json(place / "run.json")
    )


def continued(run: str | Path, train: Any = "", **changes: Any) -> Any:
    """The recipe that goes on from the finished `run` with new rows: that run's settings, but for `changes`.

    What was derived from the size of the old data, or from the machine, is derived anew. `replay` is a change too.
    """
    stored = Path(run) / "recipe.toml"
    named = schema.read_toml(stored) if stored.is_file() else {}
    kind = RECIPES.get(str(named.get("task")), MLM)
    recipe = open_run(run, kind).recipe
    past = Past(continue_from=str(run), replay=changes.pop("replay", Past.replay))
    loop = dataclasses.replace(recipe.loop, **dict.fromkeys(DERIVED))
    made = {name: value for name, value in MADE.items() if hasattr(recipe, name)}
    fresh = {"train": train, "dev": None, "model": None, "past": past, "loop": loop, **made}
    return dataclasses.replace(recipe, **{**fresh, **changes})


def weights_sha256(folder: Path) -> str:
    """The sha256 of a model folder's weights; of several files, all of them."""
    return "+".join(files.sha256(file) for file in sorted(folder.rglob("*.safetensors")))


def chain(recipe: Any) -> list[Path]:
    """The folders that a recipe goes on from: the run before, the one before that, and so on."""
    found: list[Path] = []
    name = recipe.past.continue_from
    while name is not None and Path(name).resolve() not in found:
        found.append(Path(name).resolve())
        stored = Path(name) / "recipe.toml"
        name = schema.read_toml(stored).get("past", {}).get("continue_from") if stored.is_file() else None
    return found


def settled(recipe: Any) -> Any:
    """The recipe with its usual loop and what it starts from filled in; a UserError where that is not what it was."""
    recipe, past = dataclasses.replace(recipe, loop=usual(recipe)), recipe.past
    if past.continue_from is None:
        return recipe
    folder = open_run(past.continue_from, type(recipe)).folder
    found = weights_sha256(folder)
    if past.weights_sha256 not in (None, found):
        what = f"has other weights than the recipe says (sha256 {found[:12]}, not {str(past.weights_sha256)[:12]})"
        raise UserError(what, where=str(folder), fix="put that run back, or leave weights_sha256 out of the recipe")
    return dataclasses.replace(recipe, model=past.continue_from, past=dataclasses.replace(past, weights_sha256=found))


@dataclass(frozen=True)
class Sides:
    """Rows to train on and to score on, and how they were read; the first `old` to score on are of the run before."""

    train: list[Any]
    dev: Any
    counts: Counts
    dev_counts: Counts | None
    remarks: list[str]
    about: Any = None  # what else a task found out about its rows
    old: int | None = None
    old_sha256: str | None = None  # of the old data, where it was read

    def identity(self) -> dict[str, str]:
        """What must be the same when the run is resumed, beside the new data."""
        return {} if self.old is None else {"old data": self.old_sha256 or "not there"}


@dataclass(frozen=True)
class Known:
    """What rows are known by. `key`: all of a training row; `held`: the part that dev must not share with training.

    The others read, cut and join what is scored on; they are for tasks whose dev is no list of such rows.
    """

    key: Callable[[Any], str]
    held: Callable[[Any], str]
    texts: Callable[[Any], list[str]] | None = None
    part: Callable[[Any, Sequence[int]], Any] = lambda dev, rows: [dev[row] for row in rows]
    join: Callable[[Any, Any], Any] = lambda old, new: [*old, *new]

    def of(self, sides: Sides) -> Texts:
        """The texts of both sides."""
        dev = self.texts(sides.dev) if self.texts else [self.held(row) for row in sides.dev]
        return Texts([self.key(row) for row in sides.train], [self.held(row) for row in sides.train], dev)


@dataclass(frozen=True)
class Texts:
    """Of each training row its key and its held part; and the held part of each row that is scored on."""

    keys: Sequence[str]
    held: Sequence[str]
    dev: Sequence[str]


@dataclass(frozen=True)
class Chosen:
    """Row numbers: of the new rows to train and to score on, of the old rows to replay; and why others are not."""

    train: np.ndarray
    dev: np.ndarray
    replayed: np.ndarray
    remarks: list[str]


def choose(new: Texts, old: Texts, share: float, seed: int) -> Chosen:
    """Which rows a continued run trains on and is scored on.

    Nothing that the old run was scored on is trained on, exactly or nearly, and nothing that it was trained on is
    scored on as new. Of the old rows that are left, without repeats, those with the smallest keyed hashes are
    replayed: as many as `share` of the new ones. So the sample depends on the rows and the seed, not on their order.
    """
    import numpy as np

    from embedtune.data.clean import text_hash
    from embedtune.data.divide import leaks

    train, dev = np.arange(len(new.keys)), np.arange(len(new.dev))
    scored = leaks(old.dev, new.held).rows
    scored_too = leaks(old.dev, new.dev).rows
    train, dev = np.setdiff1d(train, scored), np.setdiff1d(dev, scored_too)
    seen = np.intersect1d(leaks(old.held, new.dev).rows, dev)
    dev = np.setdiff1d(dev, seen)
    hashes, first = np.unique(np.array([text_hash(key) for key in old.keys], np.uint64), return_index=True)
    mine = np.array([text_hash(new.keys[row]) for row in train.tolist()], np.uint64)
    first, hashes = first[~np.isin(hashes, mine)], hashes[~np.isin(hashes, mine)]
    guarded = leaks([*old.dev, *(new.dev[row] for row in dev.tolist())], [old.held[row] for row in first.tolist()]).rows
    free = np.setdiff1d(np.arange(len(first)), guarded)
    order = np.argsort(keyed.key(seed, REPLAY, hashes[free]), kind="stable")[: round(share * len(train))]
    replayed = first[free[order]]
    dropped = len(scored) + len(scored_too)
    remarks = [
        f"replay: {len(replayed):,} of {len(old.keys):,} old training rows are trained on again, drawn by the seed "
        f"({len(old.keys) - len(first):,} repeats and {len(guarded):,} like rows to score on were left out before)"
    ]
    if dropped:
        remarks.append(f"{dropped:,} new rows left out: the run before is scored on them, exactly or nearly")
    if len(seen):
        remarks.append(f"{len(seen):,} new rows are not scored on: the run before was trained on them")
    return Chosen(train, dev, replayed, remarks)


def sides(recipe: Any, own: Callable[[Any, Path | None], Sides], known: Known) -> Sides:
    """What `own(recipe, None)` gives, or where the recipe goes on from a run, its new rows together with the old ones.

    `own(recipe, folder)` reads and parts the rows that a recipe names; `folder` is the model that a finished run left.
    """
    return _sides(recipe, None, own, known)


def _sides(recipe: Any, folder: Path | None, own: Callable[[Any, Path | None], Sides], known: Known) -> Sides:
    new, past = own(recipe, folder), recipe.past
    if past.continue_from is None:
        return new
    run = open_run(past.continue_from, type(recipe))
    try:
        old = _read_again(run, own, known)
    except UserError as error:
        if past.replay:
            what = f"the data of this run cannot be used again: {_first(error)}"
            fix = f"put it back as it was, in the folder that it was read from; {WITHOUT}"
            raise UserError(what, where=str(run.folder), details=error.details, fix=fix) from error
        lost = f"the data of {run.folder} is not used ({_first(error)}): nothing shows what is forgotten"
        return dataclasses.replace(new, remarks=[*new.remarks, lost], old=0)
    chosen = choose(known.of(new), known.of(old), past.replay, recipe.loop.seed)
    if not len(chosen.train) or len(chosen.dev) < FEWEST_DEV:
        what = f"{len(chosen.train):,} new rows are left to train on and {len(chosen.dev):,} to score on"
        raise UserError(what, where="--continue-from", details=chosen.remarks, fix="give more new rows")
    dev, count = known.part(new.dev, chosen.dev.tolist()), len(known.of(old).dev)
    train = [new.train[row] for row in chosen.train.tolist()] + [old.train[row] for row in chosen.replayed.tolist()]
    scored = f"scored on {count:,} rows that {run.folder} was scored on, and on {len(chosen.dev):,} new ones"
    remarks = [*new.remarks, *chosen.remarks, scored]
    return dataclasses.replace(new, train=train, dev=known.join(old.dev, dev), remarks=remarks, old=count,
                               old_sha256=_both(old))  # fmt: skip


def _first(error: UserError) -> str:
    """What and where, without the hints for one who named the file himself."""
    return f"{error.where}: {error.what}" if error.where else error.what


def _read_again(run: Earlier, own: Callable[[Any, Path | None], Sides], known: Known) -> Sides:
    """The rows of a finished run, parted as they were; a UserError where they are not what they were."""
    if str(run.recipe.train).startswith("<"):
        raise UserError("its rows were given in Python")
    settled(run.recipe)  # the run that this one went on from is still what it was
    found = _sides(run.recipe, run.folder, own, known)
    for what, counts in (("training data", found.counts), ("dev data", found.dev_counts)):
        before = run.account.get(what)
        if counts is not None and counts.sha256 != before:
            size = run.account["data"]["bytes"]
            sizes = f" ({counts.bytes:,} bytes, {size:,} then)" if what == "training data" else ""
            raise UserError(f"its {what} has changed{sizes}", details=list(counts.files))
    return found


def _both(old: Sides) -> str:
    return "+".join(
        [old.counts.sha256, *([old.dev_counts.sha256] if old.dev_counts else []), *filter(None, [old.old_sha256])]
    )
