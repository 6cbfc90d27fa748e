import itertools
import sys

import pytest

from embedtune.data import example
from embedtune.data.clean import text_hash
from embedtune.data.example import docstrings, prose, write_example
from embedtune.errors import UserError


def test_prose_keeps_sentences_only():
    docstring = """Return the nearest rows of `index`, and
    their scores, in descending order.

    Too short.

    Parameters
    ----------
    index : Index
        Where the rows of the matrix are looked for.

    >>> nearest(index, [1, 2]) is the way to call it here.

        An indented block is code, even if it looks like words.

    .. note:: This is markup which nobody wants to read as text.

    query: The vector that is compared with all of the others.
    """
    import inspect

    expected = ["Return the nearest rows of index, and their scores, in descending order."]
    assert prose(inspect.cleandoc(docstring)) == expected


def test_lines_are_sentences_from_many_packages():
    lines = list(docstrings(600))
    texts = [line for line in lines if line]
    assert len(texts) == 600 and lines[-1] == "" and "" in lines[:10]
    assert len({text_hash(text) for text in texts}) == 600
    assert all(len(text.split()) >= 6 and text == " ".join(text.split()) for text in texts)
    assert lines == list(docstrings(600))


def test_nothing_is_imported(tmp_path, monkeypatch):
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "__init__.py").write_text('"""This package must be parsed and never run."""\nraise SystemExit')
    (tmp_path / "broken.py").write_text('"""This file is no Python at all, sadly."""\ndef (')
    (tmp_path / "test_it.py").write_text('"""Tests are left out, as they say so little."""')
    monkeypatch.setattr(example.sysconfig, "get_path", lambda kind: str(tmp_path))
    assert list(docstrings()) == ["This package must be parsed and never run.", ""]
    assert "evil" not in sys.modules


def test_packages_take_turns_and_have_a_share(tmp_path, monkeypatch):
    for name in "ab":
        functions = [f'def f{i}():\n    """Function {i} of the package {name} does it."""\n' for i in range(9)]
        (tmp_path / f"{name}.py").write_text("".join(functions))
    monkeypatch.setattr(example.sysconfig, "get_path", lambda kind: str(tmp_path))
    monkeypatch.setattr(example, "LINES_PER_PACKAGE", 3)
    packages = [line.split()[5] for line in docstrings() if line]
    assert packages == ["a", "b", "a", "b", "a", "b"]


def test_write_example(tmp_path):
    path = tmp_path / "data.txt"
    assert write_example(path, 50) == 50
    lines = path.read_text(encoding="utf-8").split("\n")
    assert sum(map(bool, lines)) == 50 and lines[-1] == "" and lines[-2]
    with pytest.raises(UserError, match="exists already"):
        write_example(path, 5)
    assert write_example(path, 5, force=True) == 5


def test_there_are_several_thousand_lines():
    pytest.importorskip("transformers")
    assert sum(map(bool, itertools.islice(docstrings(3000), 20_000))) == 3000
