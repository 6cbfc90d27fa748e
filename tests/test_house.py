"""The rules of the house, held by reading the source: who imports whom, how big things are, what is never called."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "embedtune"

# Rooms are folders, the rest are single modules. Each may import those named here, and a room also itself.
LEAVES = {
    *("errors", "files", "recipes", "schema", "limits", "nearest", "keyed"),
    *("plots", "plots_labels", "plots_refine", "plots_drift"),
}
IMPORTS = {
    "__init__": {"recipes", "errors", "encoder", "fit", "refine", "tune", "run"},  # lazily, by name
    "errors": set(),
    "keyed": set(),
    "files": {"errors"},
    "recipes": {"errors"},
    "limits": {"recipes", "schema"},
    "schema": {"errors", "recipes", "files"},
    "plots": {"errors", "files"},
    "plots_labels": {"plots"},
    "plots_refine": {"plots"},
    "plots_drift": {"plots"},
    "nearest": {"errors"},
    "data": LEAVES,
    "encoder": LEAVES | {"data"},
    "enrich": LEAVES | {"data", "encoder"},
    "fit": LEAVES | {"data", "encoder"},
    "judge": LEAVES | {"data", "encoder"},
    "refine": LEAVES | {"data", "encoder", "judge"},
    "search": LEAVES | {"data", "encoder"},
    "serve": LEAVES | {"encoder", "search"},
    "run": None,  # everything
    "run_pairs": None,
    "run_labels": None,
    "parts": None,
    "parts_labels": None,
    "average": None,
    "finish": None,
    "tune": None,
    "trials": None,
    "track": {"errors", "fit"},
    "scoring": None,
    "commands": None,
    "cli": None,
    "__main__": {"cli"},
}
MOST_LINES, MOST_FUNCTION_LINES, MOST_ARGUMENTS = 400, 60, 8
# Of torch.nn, autograd and pydantic; of what stands in for a dict; of what no `except Exception` may take for an error.
BASES = {"Module", "Protocol", "Function", "Exception", "BaseException", "NamedTuple", "BaseModel", "Mapping"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "yaml.load",
                   "torch.export.load", "torch.jit.load", "torch.hub.load"}  # fmt: skip
FORBIDDEN_TRUE = {"trust_remote_code", "allow_pickle"}
# Who but files.py may write, and why. Keys are "module: call".
WRITERS = {
    "cli.py: open": "the null device, where all but the first of several processes speak",
    "encoder/load.py: loaded.tokenizer.save_pretrained": "the library's own format, into a folder not yet published",
    "encoder/load.py: shutil.copytree": "the base's pooling folder, into a folder not yet published",
    "encoder/load.py: shutil.copyfile": "the base's JSON, into a folder not yet published",
    "data/formats.py: copy.write": "a file that files.scratch opened",
    "data/tokens.py: ids_file.write": "a file that files.growing opened and renames",
    "data/tokens.py: rows_file.write": "a file that files.growing opened and renames",
    "data/tokens.py: types_file.write": "a file that files.growing opened and renames",
    "data/spool.py: texts_file.write": "a file that files.growing opened and renames",
    "data/spool.py: offsets_file.write": "a file that files.growing opened and renames",
    "data/spool.py: places_file.write": "a file that files.growing opened and renames",
    "data/tidy.py: self.file.write": "a file that files.growing or files.write_directory renames",
    "data/kept.py: file.write": "a file that files.scratch opened",
    "run_pairs.py: file.write": "a file that files.growing opened and renames",
    "data/scratch.py: self.file.write": "a file that files.scratch opened",
    "data/stored.py: self.scratch.write": "a file that files.scratch opened",
    "encoder/encode.py: scratch.write": "another one of these",
    "serve/listen.py: connection.transport.write": "a socket",
    "search/bulk.py: file.write": "a file that files.growing opened and renames",
    "search/postings.py: self.scratch.write": "that same scratch space",
    "search/lexical.py: data.write": "a file that files.growing opened, in a folder not yet published",
    "search/lexical.py: indices.write": "another one of these",
    "search/store.py: vectors.write": "a file that files.growing opened, in a segment not yet published",
    "search/store.py: codes.write": "a file that files.growing opened, in a segment not yet published",
    "enrich/write.py: out.write": "a file that files.growing opened and renames",
    "enrich/mine.py: vectors.write": "a file that files.growing opened, in a folder of temporary files",
    "refine/cached.py: x_file.write": "a file that files.growing opened, in a folder of temporary files",
    "refine/cached.py: tokens_file.write": "another one of these",
    "refine/cached.py: z_file.write": "another one of these",
    "plots.py: figure.savefig": "into a buffer in memory",
}
WRITING_METHODS = {"write_text", "write_bytes", "savefig", "save_pretrained", "tofile", "to_parquet", "to_csv", "write"}
WRITING_CALLS = {
    *("np.save", "np.savez", "np.savetxt", "json.dump", "os.open", "os.write", "os.mkfifo", "torch.save"),
    *("shutil.copy", "shutil.copy2", "shutil.copyfile", "shutil.copyfileobj", "shutil.copytree", "shutil.move"),
    *("tempfile.TemporaryFile", "tempfile.NamedTemporaryFile", "tempfile.mkstemp", "tempfile.mkdtemp", "save_file"),
}

MODULES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}


def name(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def unit(path: Path) -> str:
    """The room, or the module where it stands in none."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def dotted(node: ast.AST) -> str:
    """'a.b.c' of a name or an attribute; what is neither is '?'."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)]


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def imported(path: Path) -> set[str]:
    """The full names of all modules (and of names out of them) that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """The rooms and modules of embedtune that a file imports."""
    parts = [full.split(".") for full in imported(path) if full.split(".")[0] == "embedtune"]
    units = {p[1] for p in parts if len(p) > 1 and p[1] in IMPORTS}
    return units - {unit(path)}


def test_every_module_has_a_place_in_the_import_table():
    assert {unit(path) for path in MODULES} <= set(IMPORTS)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_run_one_way(path):
    allowed = IMPORTS[unit(path)]
    if allowed is not None:
        assert ours(path) <= allowed


def test_the_table_has_no_circle_and_keeps_training_from_judging():
    assert "judge" not in IMPORTS["fit"] and "fit" not in IMPORTS["judge"]
    done: set[str] = set()
    while left := {k for k, v in IMPORTS.items() if k not in done and (v is None or v <= done)}:
        done |= left
    assert done == set(IMPORTS)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_sizes(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MOST_LINES, f"{lines} lines"
    for f in functions(TREES[path]):
        first = min([f.lineno, *(d.lineno for d in f.decorator_list)])
        assert f.end_lineno - first + 1 <= MOST_FUNCTION_LINES, f"{f.name}: {f.end_lineno - first + 1} lines"
        arguments = [a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)]
        count = len([a for a in arguments if a not in ("self", "cls")])
        assert count <= MOST_ARGUMENTS, f"{f.name}: {count} arguments"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_classes_inherit_at_most_once(path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ClassDef):
            plain = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
            bases = {dotted(base).rpartition(".")[2] for base in plain}
            assert len(bases) <= 1 and bases <= BASES, f"{node.name} inherits from {bases}"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_nothing_prints_but_the_command_line(path):
    if name(path) != "cli.py":
        assert not [c.lineno for c in calls(path) if dotted(c.func) in ("print", "sys.stdout.write", "sys.exit")]


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_nothing_runs_code_from_files(path):
    assert not {full for full in imported(path) if full.split(".")[0] in FORBIDDEN_MODULES}
    for call in calls(path):
        assert dotted(call.func) not in FORBIDDEN_CALLS, f"line {call.lineno} calls {dotted(call.func)}"
        for keyword in call.keywords:
            safe = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            assert keyword.arg not in FORBIDDEN_TRUE or safe, f"line {call.lineno}: {keyword.arg} is not False"
        if dotted(call.func) == "np.load":
            assert "allow_pickle" in {k.arg for k in call.keywords}, f"line {call.lineno}: say allow_pickle=False"
        if dotted(call.func).endswith(".from_pretrained"):
            assert "trust_remote_code" in {k.arg for k in call.keywords}, f"line {call.lineno}: say trust_remote_code"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_every_public_name_has_a_docstring(path):
    tree = TREES[path]
    assert ast.get_docstring(tree), "the module has none"
    inside_functions = {id(inner) for f in functions(tree) for inner in ast.walk(f) if inner is not f}
    private_classes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name.startswith("_")]
    hidden = inside_functions | {id(inner) for c in private_classes for inner in ast.walk(c)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or id(node) in hidden:
            continue
        assert node.name.startswith("_") or ast.get_docstring(node), f"{node.name}, line {node.lineno}"


def writes(call: ast.Call) -> bool:
    """Whether a call writes a file, as far as its name tells."""
    called = dotted(call.func)
    if called in ("open", "gzip.open") or called.endswith(".open"):
        given = [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "mode")]
        if called == "os.open":
            return "O_RDONLY" not in ast.unparse(call) and "devnull" not in ast.unparse(call)
        return any(not isinstance(m, ast.Constant) or set(str(m.value)) & set("wax+") for m in given)
    if called in ("np.memmap", "numpy.memmap"):
        return not any(k.arg == "mode" and ast.literal_eval(k.value) == "r" for k in call.keywords)
    ends = called.rpartition(".")[2]
    return called in WRITING_CALLS or (ends in WRITING_METHODS and called.split(".")[0] != "files")


def test_only_one_module_writes_files():
    found = {
        f"{name(path)}: {dotted(call.func)}"
        for path in MODULES
        for call in calls(path)
        if name(path) != "files.py" and writes(call)
    }
    assert found - set(WRITERS) == set()
    assert set(WRITERS) - found == set(), "the allow-list names what is no longer there"


def test_docstrings_and_help_say_nothing_of_commands_that_do_not_exist():
    """A fix that names a command must name one that can be typed."""
    from embedtune.cli import COMMANDS

    rooms = "data|fit|judge|refine|search|enrich"
    for path in MODULES:
        for words in re.findall(rf"embedtune ((?:{rooms}) [a-z]+)", path.read_text(encoding="utf-8")):
            assert words in COMMANDS, f"{name(path)} names 'embedtune {words}'"


@pytest.mark.parametrize(
    "code",
    [
        "import embedtune",
        "import embedtune; embedtune.MLM; embedtune.Loop; embedtune.UserError; dir(embedtune)",
        "from embedtune.cli import run; assert run(['--help']) == 0",
        "from embedtune.cli import run; assert run(['fit', 'mlm', '--nonsense']) == 2",
    ],
)
def test_torch_is_not_loaded_before_it_is_needed(code):
    heavy = "('torch', 'transformers', 'sentence_transformers', 'numpy', 'matplotlib', 'datasets')"
    check = f"{code}\nimport sys\nassert not [m for m in {heavy} if m in sys.modules]"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_dependencies_have_their_floors_and_pins():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = {re.match(r"[\w-]+", need)[0]: need for need in project["dependencies"]}
    for package, floor in {
        "torch": ">=2.11",
        "transformers": ">=5.3",
        "safetensors": ">=0.8",
        "sentence-transformers": ">=6.2",
    }.items():
        assert floor in needs[package]
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), "exact pins without a local tag"
    pinned = {re.match(r"[\w.-]+", pin)[0].lower().replace("_", "-") for pin in pins}
    extras = project["optional-dependencies"]
    wanted = [
        need
        for extra in (
            *("offline", "hub", "hosted", "search", "ann", "postgres", "ray", "onnx", "openvino", "static"),
            *("dev", "parity", "bench"),
        )
        for need in extras[extra]
    ]
    named = {re.match(r"[\w-]+", need)[0] for need in [*project["dependencies"], *wanted]} - {"embedtune"}
    assert named <= pinned


@pytest.mark.parametrize(
    "package, floor",
    [
        ("transformers", "5.3"),  # before it, a model's files chose code to run in ways that were mended since
        ("torch", "2.10"),  # before it, weights_only could be led to write outside of its memory
        ("safetensors", "0.8"),
        ("starlette", "1.3.1"),  # before it, the limits of forms did not hold for all of them
    ],
)
def test_no_version_with_known_holes_is_let_in(package, floor):
    """Neither by the ranges, nor by the pins, nor here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = map(Requirement, [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])])
    ranges = [need.specifier for need in needs if need.name == package]
    lowest = [Version(each.version) for found in ranges for each in found if each.operator == ">="]
    assert len(lowest) == len(ranges) >= 1 and min(lowest) >= Version(floor)
    pin = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert Version(pin[1]) >= Version(floor) and Version(metadata.version(package)) >= Version(floor)


def test_public_names_exist():
    import embedtune

    for public in embedtune.__all__:
        assert getattr(embedtune, public) is not None
        assert public in dir(embedtune)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = embedtune.nonsense
    taken = {path.stem for path in MODULES} | {unit(path) for path in MODULES}
    assert not taken & set(embedtune.__all__), "a public name may not be the name of a module"
