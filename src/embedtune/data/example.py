"""A real data.txt without a network: prose from the docstrings of the Python packages installed here."""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from embedtune import files
from embedtune.data.clean import text_hash
from embedtune.errors import UserError

LINES_PER_PACKAGE = 400
MIN_WORDS = 6
MAX_SOURCE_BYTES = 1 << 20
SKIPPED = re.compile(r"(tests?|testing|conftest|test_.*|.*_test|_vendor|vendored|site-packages|\..*)$")
SIGNS = re.compile(  # of doctests, markup, rules, tables, lists, parameters, code and links
    r">>>|\.\. |::|-{3,}|={3,}|\+-|^[|#@*:\\`<\[({$-]|^\w+ ?(\(.*\))?: |^\w+ : |\w\(|[{}|]|https?:"
)


def docstrings(limit: int | None = 8000) -> Iterator[str]:
    """Lines of prose, each a paragraph, with "" after each docstring, so that a docstring is a document.

    Sources are parsed, never imported. Packages take turns, a docstring each and at most LINES_PER_PACKAGE
    lines, so that the text is mixed; the same installation gives the same lines. `limit` counts lines that
    are not blank.
    """
    seen: set[int] = set()
    given = 0
    turns = [_package_docstrings(package) for package in _packages()]
    while turns:
        going = []
        for turn in turns:
            paragraphs = next(turn, None)
            if paragraphs is None:
                continue
            going.append(turn)
            new = [text for text in paragraphs if text_hash(text) not in seen]
            if limit is not None:
                new = new[: limit - given]
            seen.update(map(text_hash, new))
            given += len(new)
            yield from chain(new, [""] if new else [])
            if given == limit:
                return
        turns = going


def write_example(path: str | Path, limit: int | None = 8000, *, force: bool = False) -> int:
    """Write `docstrings` to `path`, atomically, and return the number of lines that are not blank.

    Raises UserError where the file exists, unless `force`.
    """
    path = Path(path)
    if path.exists() and not force:
        raise UserError("exists already", where=str(path), fix="name another file, or --force")
    lines = list(docstrings(limit))
    if not lines:
        raise UserError("found no docstrings in this Python installation", fix="install some packages")
    files.write_text(path, "\n".join(lines).rstrip("\n") + "\n")
    return sum(map(bool, lines))


def _packages() -> list[Path]:
    """Packages and modules of site-packages and the standard library, by name."""
    found: dict[str, Path] = {}
    for kind in ("purelib", "platlib", "stdlib"):
        folder = Path(sysconfig.get_path(kind))
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if (path.suffix == ".py" or (path / "__init__.py").is_file()) and not SKIPPED.match(path.stem):
                found.setdefault(path.name, path)
    return [found[name] for name in sorted(found)]


def _package_docstrings(package: Path) -> Iterator[list[str]]:
    """The prose of each docstring of a package that has some, until it gave its share."""
    given = 0
    sources = [package] if package.is_file() else sorted(package.rglob("*.py"))
    for source in sources:
        parts = source.relative_to(package.parent).with_suffix("").parts
        if any(SKIPPED.match(part) for part in parts):
            continue
        for docstring in _source_docstrings(source):
            paragraphs = prose(docstring)[: LINES_PER_PACKAGE - given]
            given += len(paragraphs)
            if paragraphs:
                yield paragraphs
            if given == LINES_PER_PACKAGE:
                return


def _source_docstrings(source: Path) -> Iterator[str]:
    try:
        if source.stat().st_size > MAX_SOURCE_BYTES:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def prose(docstring: str) -> list[str]:
    """The paragraphs that are sentences, each on one line; code, tables, parameters and markup go."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = paragraph.strip("\n").split("\n")
        if any(line.startswith((" ", "\t")) or SIGNS.search(line) for line in lines):
            continue
        text = " ".join(paragraph.replace("``", "").replace("`", "").split())
        sound = text.isprintable() and text[:1].isupper() and text.endswith((".", "!", "?"))
        if sound and len(text.split()) >= MIN_WORDS:
            kept.append(text)
    return kept
