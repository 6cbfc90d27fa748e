"""Mistakes put into the core modules one at a time: do their own tests notice?

    make coverage                  writes .coverage, with the tests that run each line
    make mutants SAMPLE=40         so many mistakes a module, drawn by a fixed seed; stopped, it goes on where it was

A mutant is one change of one module's syntax tree: another comparison, operator, constant or connective, a condition
turned round, `return None`, a call or `raise` left out. Words of messages, docstrings and annotations are left alone.
Of the tests those are run that reach its line, in a child forked from a process that has imported all other packages.
The tests of SLOW are not run, and data from outside is not there: a mutant that only they would notice survives.
What was noticed once is not tried again as long as the module is the same; what survived is.
"""

import argparse
import ast
import copy
import hashlib
import importlib
import importlib.abc
import importlib.util
import json
import os
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "embedtune"
WARM = ("hypothesis", "pytest", "numpy", "torch", "safetensors.torch", "pyarrow.parquet", "pyarrow.ipc", "zstandard",
        "fastapi", "uvicorn", "prometheus_client", "asyncio", "multiprocessing.connection", "concurrent.futures",
        "importlib.metadata")  # fmt: skip
SLOW = ("test_decompression_bomb", "test_memory_is_flat", "test_commands_end_in_words", "test_the_doctor_has_a_word",
        "test_most_of_them_are_refused", "test_overload_gives_answers", "test_import_is_cheap")  # fmt: skip
PYTEST = ("-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin", "--hypothesis-seed=0")  # and no other plugin
# A mutant that takes more has been noticed: it hangs. POLL: seconds between two looks at it.
CPU_SECONDS, IDLE_SECONDS, BYTES, POLL = 240, 120, 16 << 30, 0.05

OTHER: dict[type, list[type]] = {
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.In: [ast.NotIn],
    ast.NotIn: [ast.In], ast.And: [ast.Or], ast.Or: [ast.And], ast.Add: [ast.Sub], ast.Sub: [ast.Add],
    ast.Mult: [ast.FloorDiv], ast.Div: [ast.Mult], ast.FloorDiv: [ast.Mult], ast.Mod: [ast.Mult],
    ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd], ast.LShift: [ast.RShift], ast.RShift: [ast.LShift],
}  # fmt: skip
LEFT_OUT = {"annotation", "returns", "decorator_list", "format_spec"}  # fields


@dataclass(frozen=True)
class Mutant:
    """`path` leads from the module to the node that `new` takes the place of; `lines` are of its statement."""

    path: tuple[tuple[str, int | None], ...]
    new: ast.AST
    lines: range
    words: str


def inside(node: ast.AST) -> Iterator[tuple[tuple[str, int | None], ast.AST]]:
    """The nodes right below one, and how to get there."""
    for field, value in ast.iter_fields(node):
        if field in LEFT_OUT:
            continue
        for place, each in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(each, ast.AST):
                yield (field, place if isinstance(value, list) else None), each


def instead(node: ast.AST, field: str) -> Iterator[ast.AST]:
    """What may stand in the place of a node."""
    yield from (other() for other in OTHER.get(type(node), ()))
    if field in ("test", "ifs"):
        yield ast.UnaryOp(ast.Not(), node)
    match node:
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(value=bytes(value)):
            yield ast.Constant(value + b"x")
        case ast.Constant(value=str(value)) if " " not in value:
            yield ast.Constant(value + "x")
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) != "None":
            yield ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call() | ast.Yield() | ast.YieldFrom() | ast.Await()) | ast.Raise() | ast.Break():
            yield ast.Pass()
        case ast.Continue():
            yield ast.Pass()


def mutants(node: ast.AST, path: tuple = (), lines: range = range(0)) -> Iterator[Mutant]:
    """All mutants below a node."""
    for step, below in inside(node):
        if isinstance(below, ast.stmt):
            body = getattr(below, "body", None)
            lines = range(below.lineno, body[0].lineno if body else below.end_lineno + 1)
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        is_message = isinstance(node, ast.JoinedStr) and isinstance(below, ast.Constant)
        if is_text or is_message or ast.unparse(getattr(below, "test", below)) == "TYPE_CHECKING":
            continue
        for new in instead(below, step[0]):
            shown = node if isinstance(below, ast.operator | ast.cmpop | ast.boolop) else below
            after = put(copy.deepcopy(node), (step,), new) if shown is node else new
            words = " -> ".join(ast.unparse(each).split("\n")[0][:70] for each in (shown, after))
            yield Mutant((*path, step), new, lines, f"{lines.start}: {words}")
        yield from mutants(below, (*path, step), lines)


def put(tree: ast.AST, path: tuple, new: ast.AST) -> ast.AST:
    """The tree with another node at the end of the path."""
    place: Any = tree
    for field, number in path[:-1]:
        place = getattr(place, field) if number is None else getattr(place, field)[number]
    field, number = path[-1]
    if number is None:
        setattr(place, field, new)
    else:
        getattr(place, field)[number] = new
    return ast.fix_missing_locations(tree)


class Imported(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives the module another tree when it is imported."""

    def __init__(self, path: Path, tree: ast.AST) -> None:
        self.path, self.code = path, compile(tree, str(path), "exec")
        self.name = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)

    def find_spec(self, name, path, target=None):
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def exec_module(self, module):
        exec(self.code, module.__dict__)


def reached(path: Path) -> tuple[dict[int, set[str]], set[str]]:
    """The tests that run each line, as `make coverage` found; and all tests of the files that these stand in."""
    from coverage import CoverageData

    data = CoverageData(str(ROOT / ".coverage"))
    data.read()
    known: dict[str, list[str]] = {}
    for file in {*ROOT.glob("tests/test_*.py"), *ROOT.glob("tests/*/test_*.py")}:
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M):
            if not name.startswith(SLOW):
                known.setdefault(f"{file.stem}.{name}", []).append(f"{file.relative_to(ROOT)}::{name}")
    ends = {context: ".".join(context.split(".")[-2:]) for context in data.measured_contexts()}
    by_line = data.contexts_by_lineno(str(path))
    lines = {line: {test for each in found for test in known.get(ends[each], ())} for line, found in by_line.items()}
    files = {test.split("::")[0] for found in lines.values() for test in found}
    return lines, {test for found in known.values() for test in found if test.split("::")[0] in files}


def noticed(path: Path, tree: ast.AST, tests: list[str]) -> str:
    """'killed' or 'hung', or 'survived'."""
    sys.stdout.flush()
    if not (pid := os.fork()):
        code = 1
        try:
            os.setsid()
            silent = os.open(os.devnull, os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(silent, number)
            sys.meta_path.insert(0, Imported(path, tree))
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
            resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            import pytest

            code = pytest.main(["-x", "-q", *PYTEST, *tests])
        finally:
            os._exit(bool(code))
    status = ended(pid)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what its tests started
    return "survived" if status == 0 else "killed" if os.WIFEXITED(status) else "hung"


def ended(pid: int) -> int:
    """How a child ended. One that works is waited for, however slow the machine; one that only waits is killed.

    Looking again and again whether something has come is waiting too: that is asleep nearly whenever it is looked at.
    """
    import psutil

    process, asleep = psutil.Process(pid), 0.0
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        asleep += POLL if process.status() == psutil.STATUS_SLEEPING else 0
        if asleep > IDLE_SECONDS:
            process.kill()
        time.sleep(POLL)


def try_module(path: Path, sample: int, results: Path) -> tuple[int, list[dict]]:
    """How many mutants a module has, and what became of those of the sample."""
    tree = ast.parse(path.read_text())
    lines, everything = reached(path)  # what runs on import has no line of its own in a test
    code = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    width = {test: sum(test in found for found in lines.values()) for test in everything}
    name = str(path.relative_to(SOURCE))
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    before = {(each["code"], each["place"]): each for each in known if each["outcome"] != "survived"}
    found = list(mutants(tree))
    drawn = random.Random(name).sample(range(len(found)), len(found))[:sample]  # a larger sample has the smaller in it
    tried = []
    for place in drawn:
        mutant = found[place]
        record = before.get((code, place))
        if record is None:
            tests = set().union(*(lines.get(line, ()) for line in mutant.lines)) or everything
            changed = put(copy.deepcopy(tree), mutant.path, mutant.new)
            outcome = noticed(path, changed, sorted(tests, key=lambda test: (width[test], test)))
            record = {"module": name, "code": code, "place": place, "mutant": mutant.words, "outcome": outcome}
            with results.open("a") as file:
                file.write(json.dumps(record) + "\n")
        tried.append(record)
    return len(found), tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", help="files.py, data/read.py, ...; all that were measured if none")
    parser.add_argument("--sample", type=int, default=40)
    parser.add_argument("--results", type=Path, default=ROOT / "mutants-results.jsonl")
    asked = parser.parse_args()
    os.environ |= {"EMBEDTUNE_TEST_DATA": os.devnull, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    os.chdir(ROOT)
    for name in WARM:
        importlib.import_module(name)
    from coverage import Coverage

    measured = Coverage(config_file=str(ROOT / "pyproject.toml")).get_option("run:include")
    paths = [SOURCE / name for name in asked.modules] or [ROOT / name for name in measured]
    rows = ["| module | mutants | tried | noticed | score |", "|---|---|---|---|---|"]
    for path in paths:
        total, tried = try_module(path, asked.sample, asked.results)
        left = [each["mutant"] for each in tried if each["outcome"] == "survived"]
        score = 100 * (len(tried) - len(left)) / len(tried)
        rows.append(
            f"| {tried[0]['module']} | {total:,} | {len(tried):,} | {len(tried) - len(left):,} | {score:.0f} % |"
        )
        print("\n".join([rows[-1], *(f"  survived {words}" for words in left)]), flush=True)
    print("\n" + "\n".join(rows))


if __name__ == "__main__":
    main()
