"""embedtune predict: labels, scores and entities of texts, as a stream."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedtune import recipes
from embedtune.commands.shape import Command, Flags, Output, Talk, refuse_existing
from embedtune.errors import UserError, short_list


@dataclass(frozen=True)
class Predict:
    """Labels, scores or entities of texts, one JSON object a line, by a folder that `fit classify|regress|tag` made."""

    # Folder of the model.
    model: str = ""
    # Texts: .txt (one a line), .jsonl, .csv, .tsv, .parquet (also .gz, .zst); without it, lines from stdin.
    data: str | None = None
    # Which column is which: text=review,text_pair=title, or tokens=words.
    columns: str | None = None
    # Rows that cannot be read: stop, leave them out, or mend them with U+FFFD.
    bad_rows: recipes.BadRows = "fail"
    # So many of the most probable labels of each text.
    top: int = 1
    # Write to this .jsonl file, which appears when it is complete, instead of stdout.
    out: str | None = None
    # Replace a file of that name.
    force: bool = False


def predict(command: Predict, talk: Talk) -> Output:
    """Open the model, and let texts stream through it."""
    from embedtune.data.read import Counts
    from embedtune.encoder import heads, load
    from embedtune.encoder.predict import predict as run
    from embedtune.encoder.shapes import bound_memory
    from embedtune.enrich.write import write_rows

    bound_memory()
    if not command.model:
        raise UserError("name the folder of a model", fix="embedtune predict MODEL FILE")
    if command.top < 1:
        raise UserError(f"must be at least 1, not {command.top}", where="--top")
    if command.out:
        refuse_existing(command.out, command.force)
    loaded, kind = heads.open_head(load.find(command.model))
    counts, cut = Counts(), 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal cut
        for found in run(loaded, kind, _given(command, kind, counts), top=command.top):
            cut += found.cut
            yield found.values
        if cut:
            talk.note(f"{cut:,} texts are longer than {loaded.max_length} tokens: only their beginning was read")
        for reason, number in {**counts.rejected, **counts.replaced}.items():
            talk.note(f"{number:,} x {reason}: {'left out' if reason in counts.rejected else 'mended'}")

    if command.out:
        written = write_rows(Path(command.out), rows(), counts)
        return Output([f"{written:,} predictions in {command.out}"], {"out": command.out, "rows": written})
    return Output(json.dumps(values, ensure_ascii=False) for values in rows())


def _given(command: Predict, kind: str, counts: Any) -> Iterator[Any]:
    """What stands in the rows, as the model takes it."""
    from embedtune.data.columns import parse_columns
    from embedtune.data.labels import PAIR, TEXT
    from embedtune.data.named import named
    from embedtune.data.read import read_rows
    from embedtune.data.tags import TAGGED, is_conll, read_tagged
    from embedtune.encoder import heads
    from embedtune.encoder.predict import Given

    if command.data is None:
        # A prediction a line, blank ones too, so that line n of the output is of line n of the input.
        yield from (Given(line.rstrip("\r\n")) for line in sys.stdin)
        return
    columns = parse_columns(command.columns)
    if kind == heads.TOKEN and is_conll(command.data):
        sentences = read_tagged(command.data, columns=columns, bad_rows=command.bad_rows, counts=counts)
        yield from (Given("", None, sentence.tokens) for sentence in sentences)
        return
    known = {"text": TEXT, "text_pair": PAIR, "tokens": TAGGED["tokens"]}
    rows = read_rows(command.data, bad_rows=command.bad_rows, counts=counts)
    for row, cells, _ in named(rows, known, (), columns, counts):
        text, pair, words = (cells.get(name) for name in known)
        if kind == heads.TOKEN and isinstance(words, list | tuple) and all(isinstance(word, str) for word in words):
            yield Given("", None, tuple(words))
        elif isinstance(text, str):
            yield Given(text, pair if isinstance(pair, str) and kind != heads.TOKEN else None)
        else:
            listed = short_list([repr(name[:40]) for name in row.values], most=20)
            what = f"row {row.number:,} has no text; found columns {listed}"
            raise UserError(what, where=row.file, fix="say which column is the text: --columns text=NAME")


def _words(argv: list[str]) -> Flags:
    """The first word is the model, the second the data."""
    words = [word for word in argv[:2] if not word.startswith("-")]
    if words != argv[: len(words)]:
        return argv, None
    named = [part for flag, word in zip(("--model", "--data"), words) for part in (flag, word)]
    return named + argv[len(words) :], None


COMMANDS = {
    "predict": Command("MODEL [FILE]", "labels, scores, entities: as a stream", Predict, predict, None, _words),
}
