"""`fit ... --try lr=5e-5,3e-5`: short trainings that differ in one setting; the best on dev is trained in full."""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from embedtune import files, schema, tune
from embedtune.errors import UserError, did_you_mean
from embedtune.fit import ranks
from embedtune.fit.engine import better

TRIAL_EPOCHS = 1.0


@dataclasses.dataclass(frozen=True)
class Tried:
    """The recipe with the value that was best, the setting's name, and what each value gave by which measure."""

    recipe: Any
    name: str
    measure: str
    found: dict[str, float]


def parse(recipe: Any, text: str) -> tuple[str, list[tuple[str, Any]]]:
    """The setting that `text` (name=value,value,...) names, and the recipe for each value.

    Raises UserError for a setting that the recipe does not have, for one value, and for a value of the wrong kind.
    """
    name, _, values = text.partition("=")
    given = list(dict.fromkeys(value.strip() for value in values.split(",") if value.strip()))
    fix = "for example --try lr=5e-5,3e-5,2e-5"
    if len(given) < 2:
        raise UserError(f"{text!r} is not of the form name=value,value", where="--try", fix=fix)
    parts = {"": recipe, **{name: part for name, part in vars(recipe).items() if dataclasses.is_dataclass(part)}}
    known = {f.name: section for section, part in parts.items() for f in dataclasses.fields(part)}
    known = {name: section for name, section in known.items() if name not in (*parts, "train", "dev", "seed")}
    if name not in known:
        what = f"there is no setting {name!r}{did_you_mean(name, list(known))}"
        raise UserError(what, where="--try", fix=fix)
    made = []
    for value in given:
        table = {name: _read(value)}
        part = schema.changed(parts[known[name]], table, "--try")
        made.append((value, part if not known[name] else dataclasses.replace(recipe, **{known[name]: part})))
    return name, made


def _read(value: str) -> Any:
    """A value as TOML has it: a number, true or false, a list, else a text."""
    import tomllib

    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


def try_out(recipe: Any, text: str, out: Path, listener: Any) -> Tried:
    """Train an epoch (or what the recipe asks for, if that is less) with each value, and choose by the dev measure.

    Trials live in OUT.trials until the choice is made; finished ones are not repeated by a second call.
    """
    name, values = parse(recipe, text)
    home = out.with_name(out.name + ".trials")
    ranks.first(lambda: files.make_folder(home))
    found: dict[str, float] = {}
    measure = ""
    for number, (value, changed) in enumerate(values):
        folder = home / str(number)
        if not ranks.first(folder.is_dir):
            listener.note(f"trying {name} = {value}")
            loop = dataclasses.replace(changed.loop, epochs=min(changed.loop.epochs or TRIAL_EPOCHS, TRIAL_EPOCHS))
            tune.finetune(dataclasses.replace(changed, loop=loop), folder, listener=listener,
                          resume=tune.running(folder).is_dir())  # fmt: skip
        scores = ranks.first(partial(files.read_json, folder / "scores.json"))
        measure = scores["measure"]
        found[value] = scores["tuned"][measure]
        listener.note(f"{name} = {value}: {measure.replace('_', ' ')} {found[value]:.4f}")
    best, chosen = values[0]
    for value, changed in values[1:]:
        if better(measure, found[value], found[best]):
            best, chosen = value, changed
    ranks.first(lambda: shutil.rmtree(home, ignore_errors=True))
    return Tried(chosen, name, measure, found)
