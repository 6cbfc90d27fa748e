"""Recipes as tables: TOML in and out, and what type every value must have. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from embedtune import files
from embedtune.errors import UserError, did_you_mean
from embedtune.recipes import RECIPES, Run, task_of

MOST_BYTES = 1 << 22  # of a recipe


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file; a syntax error is a UserError with its line."""
    fix = "mend it; --help of the command lists every key"
    try:
        return tomllib.loads(files.read_text(path, MOST_BYTES).removeprefix("\ufeff"))
    except RecursionError as error:
        raise UserError("is not valid TOML: nested too deeply", where=str(path), fix=fix) from error
    except ValueError as error:  # also of a number with too many digits, which is no TOMLDecodeError
        raise UserError(f"is not valid TOML: {str(error)[:200]}", where=str(path), fix=fix) from error


def from_table(kind: type, table: Mapping[str, Any], where: str) -> Any:
    """Build a recipe from a TOML table: unknown keys and wrong types are collected and reported together."""
    problems: list[str] = []
    task = next(name for name, each in RECIPES.items() if each is kind)
    if (named := table.get("task", task)) != task:
        problems.append(f"its task is {named!r}, not {task!r}")
    recipe = _build(kind(), {key: value for key, value in table.items() if key != "task"}, "", problems)
    if problems:
        fix = f"embedtune {'' if kind is Run else 'fit '}{task} --help lists every key"
        raise UserError(f"{len(problems)} problem(s) in the recipe", where=where, details=problems, fix=fix)
    return recipe


def changed(part: Any, table: Mapping[str, Any], where: str) -> Any:
    """A recipe, or a part of one, with the values of a table; a UserError for those of the wrong type."""
    problems: list[str] = []
    built = _build(part, table, "", problems)
    if problems:
        raise UserError(problems[0], where=where)
    return built


def _build(part: Any, table: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    """`part`, a recipe or a part of one, with the table's values in place of its own."""
    hints = get_type_hints(type(part))
    values = {}
    for key, value in table.items():
        if key not in hints:
            problems.append(f"unknown key {prefix + key!r}{did_you_mean(key, list(hints))}")
        elif dataclasses.is_dataclass(hints[key]):
            if isinstance(value, Mapping):
                values[key] = _build(getattr(part, key), value, f"{key}.", problems)
            else:
                problems.append(f"{prefix + key!r} must be a table [{key}]")
        elif not fits(value, hints[key]):
            problems.append(f"{prefix + key!r} must be {describe(hints[key])}, not {value!r}")
        elif get_origin(hints[key]) is tuple:
            values[key] = tuple(value)
        else:
            values[key] = float(value) if hints[key] in (float, float | None) and value is not None else value
    return dataclasses.replace(part, **values)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value read from TOML suits a field's type (an int suits a float; a bool suits neither)."""
    if hint is Any:
        return True
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (typing.Union, types.UnionType):
        return any(fits(value, member) for member in get_args(hint))
    if get_origin(hint) in (tuple, list):
        return isinstance(value, list | tuple) and all(fits(member, get_args(hint)[0]) for member in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def wrong_types(recipe: Any) -> list[str]:
    """Values of a recipe made in Python that its fields do not take; data may be a list there."""
    found = []
    for name, hint in get_type_hints(type(recipe)).items():
        value = getattr(recipe, name)
        if dataclasses.is_dataclass(hint):
            kind = typing.cast(type, hint)
            found += wrong_types(value) if isinstance(value, kind) else [f"{name} must be a {kind.__name__}"]
        elif name not in ("train", "dev", "data", "queries") and not fits(value, hint):
            found.append(f"{name} must be {describe(hint)}, not {value!r}")
    return found


def describe(hint: Any) -> str:
    """A type in a user's words."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(describe(member) for member in get_args(hint) if member is not type(None))
    if get_origin(hint) is tuple:
        return "a list of whole numbers"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(hint, str(hint))


def to_toml(recipe: Any) -> str:
    """The recipe as TOML; `None` is left out (TOML has no null and the default is None in those fields)."""
    own, parts = [f'task = "{task_of(recipe)}"'], []
    for item in dataclasses.fields(recipe):
        value = getattr(recipe, item.name)
        if dataclasses.is_dataclass(value):
            parts += ["", f"[{item.name}]"]
            parts += [line for f in dataclasses.fields(value) if (line := _line(value, f.name))]
        elif line := _line(recipe, item.name):
            own.append(line)
    return "\n".join([*own, *parts]) + "\n"


def _line(table: Any, name: str) -> str:
    """`name = value`; a whole number in a field of numbers is written as one (2.0), as it is read again."""
    value = getattr(table, name)
    if value is None:
        return ""
    hint = get_type_hints(type(table))[name]
    value = float(value) if hint in (float, float | None) else tuple(value) if get_origin(hint) is tuple else value
    return f"{name} = {_toml(value)}"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float | int):
        return repr(value)
    if isinstance(value, str | Path):
        # JSON's escapes are TOML's, except that TOML wants DEL escaped too.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(f"<{len(value)} rows given in Python>")
