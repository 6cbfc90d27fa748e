"""Tags in: sentences as tokens with a tag each, out of CoNLL files or rows of lists; and the schemes of such tags.

A tag is O, or a letter and a type: B-person begins an entity, I- goes on, E- ends it, S- is all of it. Schemes differ
in the letters that they use: IO; BIO; IOB1, where B- stands only between two entities of one type; BIOES, of which
BILOU and BMES are other spellings. One reading serves them all (`spans`), so that any can be turned into BIO.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from embedtune.data import lines as text_lines
from embedtune.data.formats import Item
from embedtune.data.hub import HUB
from embedtune.data.lines import SKIP, Problem, decode, ending, find_files, unpacked, unpacked_text
from embedtune.data.named import Named, Wrong, name_of, named, refuse, unusable, usable
from embedtune.data.read import (
    BadRows,
    Counts,
    DataLike,
    Row,
    inspect,
    nothing_usable,
    place,
    place_of,
    read_rows,
    settle,
)
from embedtune.errors import UserError

Scheme = Literal["BIO", "BIOES", "IO", "IOB1"]
LETTERS: dict[str, str] = {"BIO": "BIO", "BIOES": "BIOES", "IO": "IO", "IOB1": "BIO"}
SAME_AS = {"L": "E", "U": "S", "M": "I"}  # BILOU and BMES
TAG = re.compile(r"O|[BIESLUM](-.+)?", re.DOTALL)
NAMELESS = "_"  # the type of a tag that is a letter only

TAGGED = {"tokens": ("tokens", "words", "token"), "tags": ("tags", "ner_tags", "labels", "tag", "ner", "label")}
CONLL = (".conll", ".bio", ".iob", ".iob2", ".bioes")
PERHAPS = (".txt", ".tsv")  # where the content decides
HEAD_LINES, HEAD_BYTES = 1000, 1 << 20
DOCUMENT, COMMENT = "-DOCSTART-", "# "

NO_TAG = unusable("a token without a tag")
NO_TOKEN = unusable("an empty token")
NUMBERS = unusable("tags that are numbers", "write the names of the tags, such as B-person")
STRANGE = unusable(
    "a tag of no known form", "tags are O, or B-TYPE, I-TYPE and the like (E, S; L, U; M) within an entity"
)
DIFFER = unusable("the numbers of tokens and tags differ")
RULES = {
    "BIO": "each entity begins with B-TYPE and goes on with I-TYPE",
    "BIOES": "B-TYPE, I-TYPE, E-TYPE are an entity's first, inner and last token, S-TYPE is the only one",
    "IO": "all tokens of an entity have I-TYPE",
    "IOB1": "B-TYPE stands only right after an entity of the same TYPE",
}


@dataclass(frozen=True, slots=True)
class Tagged:
    """A sentence; `number` is its row in `file`, or the line of its first token in a CoNLL file."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...]
    file: str
    number: int

    def place(self, token: int) -> str:
        """Where a token (from 0) stands, in words."""
        return place_in(self.file, self.number, token)


def place_in(file: str, number: int, token: int | None = None) -> str:
    """Where a sentence stands, or its token (from 0), in words."""
    if ending(Path(file))[0] in (*CONLL, *PERHAPS):
        return f"{file}, line {number + (token or 0):,}"
    return place_of(file, number) + (f", token {token + 1:,}" if token is not None else "")


def read_tagged(
    data: DataLike,
    *,
    columns: Mapping[str, str] | None = None,
    bad_rows: BadRows = "fail",
    counts: Counts | None = None,
) -> Iterator[Tagged]:
    """Stream tagged sentences out of a CoNLL file, or of rows with `tokens` and `tags` (lists) of any other data.

    A line of a CoNLL file is a token and, after a tab or blanks and maybe other columns, its tag; a blank line ends
    the sentence. Lines of -DOCSTART- and comments (`# ...` before a sentence) are left out, and `counts.notes` says how
    many. Files are CoNLL by their ending (.conll, .bio, .iob, .iob2, .bioes), .txt and .tsv by their content. With
    bad_rows="fail" the sentences that cannot be used are named together in one UserError after the last; "skip" and
    "replace" leave them out and count them.
    """
    tally = counts if counts is not None else Counts()
    rows = named(_rows(data, bad_rows, tally), TAGGED, ("tokens", "tags"), columns, tally)
    seen: set[str] = set()
    for sentence in usable(map(_tagged, rows), name_of(data), bad_rows, tally):
        seen.update(tag[:1] for tag in sentence.tags)
        yield sentence
    if mapped := sorted(seen & SAME_AS.keys()):
        said = ", ".join(f"{letter} as {SAME_AS[letter]}" for letter in mapped)
        tally.notes.append(f"{name_of(data)}: tags are read as BIOES ({said})")


def is_conll(data: DataLike) -> bool:
    """Whether data is a CoNLL file: by its ending, or a .txt or .tsv that begins with lines of tokens and tags."""
    if not isinstance(data, (str, Path)) or str(data).startswith(HUB):
        return False
    form = ending(Path(data))[0]
    return form in CONLL or (form in PERHAPS and os.path.isfile(data) and _looks_tagged(Path(data)))


def _looks_tagged(path: Path) -> bool:
    """Whether most of the first lines are a token without blanks and a tag."""
    head = b""
    for chunk in unpacked(path, lambda content: None):
        head += chunk
        if len(head) >= HEAD_BYTES:
            break
    head_text = head[:HEAD_BYTES].decode(errors="replace")
    rows = [_fields(text) for text in re.split("\r\n|\n|\r", head_text)[:HEAD_LINES] if text.strip()]
    rows = [fields for fields in rows if not _left_out(fields)]
    tagged = sum(len(row) > 1 and " " not in row[0] and bool(TAG.fullmatch(row[-1])) for row in rows)
    return 2 * tagged > len(rows)


def _fields(text: str, tabs: bool = False) -> list[str]:
    """A line's columns: parted by tabs where there are any or must be, else by blanks."""
    if tabs or "\t" in text:
        *others, last = text.split("\t")
        return [*others, last.strip(" ")]
    return [field for field in text.split(" ") if field] or [""]


def _left_out(fields: Sequence[str]) -> str:
    """What a line is that is no token, '' for a token; a comment is one by its "# " and for want of a tag."""
    if fields[0].split(" ")[0] == DOCUMENT:
        return DOCUMENT
    comment = fields[0].startswith(COMMENT) or (fields[0] == COMMENT.strip() and len(fields) > 1)
    return COMMENT if comment and (fields[2:3] == ["="] or not TAG.fullmatch(fields[-1])) else ""


def _rows(data: DataLike, bad_rows: BadRows, tally: Counts) -> Iterator[Row]:
    """The rows of all files, each read as what it is."""
    sources: list[Any] = [data]
    if isinstance(data, (str, Path)) and os.path.isdir(data):
        sources, ignored = find_files(data)
        tally.ignored += ignored
    for source in sources:
        if is_conll(source):
            yield from _sentences(Path(source), bad_rows, tally)
        else:
            yield from read_rows(source, bad_rows=bad_rows, counts=tally, names=True)


def _sentences(path: Path, bad_rows: BadRows, tally: Counts) -> Iterator[Row]:
    """The sentences of a CoNLL file as rows; bad bytes fail, are left out or mended, as everywhere."""
    rows, used, left_out = tally.rows, tally.used, Counter[str]()
    tally.files.append(str(path))
    for document, item in enumerate(_blocks(path, tally, left_out)):
        tally.rows += 1
        values, problem = inspect(item.values or {}, {}, text=False)
        if problems := [each for each in (item.problem, problem) if each]:
            values = settle(values, problems, bad_rows, f"{path}, line {item.number:,}", tally)
        if values is not None:
            tally.used += 1
            yield Row(values, str(path), item.number, document)
    if left_out:
        said = " and ".join(f"{n:,} {'comment' if what == COMMENT else what} lines" for what, n in left_out.items())
        tally.notes.append(f"{path}: left out {said}")
    if tally.used == used:
        if tally.rows == rows:
            raise UserError("has no sentences", where=str(path), fix="give lines of a token, a tab and its tag")
        raise nothing_usable(str(path), tally, tally.rows - rows, "sentence")


def _blocks(path: Path, tally: Counts, left_out: Counter[str]) -> Iterator[Item]:
    """The sentences of a CoNLL file, numbered by the lines of their first tokens; a missing tag is ''."""
    tokens: list[str] = []
    tags: list[str] = []
    start, problem, tabs = 0, None, False
    for line in text_lines.lines(unpacked_text(path, tally.add)):
        if line.part > 1:
            continue  # the first piece stands for the whole line
        text, wrong = decode(line, path)
        fields = _fields(text, tabs)
        other = _left_out(fields)
        if other == DOCUMENT or (other and not tokens) or not text.strip():
            left_out.update([other] if other else [])
            if tokens:
                yield Item(start, {"tokens": tokens, "tags": tags}, problem)
            tokens, tags, problem = [], [], None
            continue
        start, tabs = start if tokens else line.number, tabs or "\t" in text
        tokens.append(fields[0])
        tags.append(fields[-1] if len(fields) > 1 else "")
        if wrong:
            problem = problem or wrong._replace(at=f"line {line.number:,}, {wrong.at}")
    if tokens:
        yield Item(start, {"tokens": tokens, "tags": tags}, problem)


def _tagged(found: Named) -> tuple[Row, Tagged | list[Problem]]:
    """The sentence that a row holds, or all that is wrong with it."""
    row, cells, names = found
    for our, value in cells.items():
        if not isinstance(value, list | tuple) or not value:
            what = f"column {names[our]!r} holds {type(value).__name__} where a list must stand"
            if not value:
                what = f"column {names[our]!r} is empty"
            return row, [unusable(what)]
    tokens, tags = cells["tokens"], cells["tags"]
    if len(tokens) != len(tags):
        return row, [DIFFER._replace(at=f"{place(row)}: {len(tokens):,} and {len(tags):,}")]
    wrong: list[Problem] = []
    for number, (token, tag) in enumerate(zip(tokens, tags)):
        for problem in (_token_problem(token), _tag_problem(tag)):
            if problem is not None:
                quoted = f": {str(tag)[:20]!r}" if problem is STRANGE else ""
                wrong.append(problem._replace(at=f"{place_in(row.file, row.number, number)}{quoted}"))
    return row, wrong or Tagged(tuple(tokens), tuple(sys.intern(str(tag)) for tag in tags), row.file, row.number)


def _token_problem(token: Any) -> Problem | None:
    if token is None or (isinstance(token, str) and not token.strip()):
        return NO_TOKEN
    return None if isinstance(token, str) else unusable(f"{type(token).__name__} where a token must stand")


def _tag_problem(tag: Any) -> Problem | None:
    if tag is None or (isinstance(tag, str) and not tag.strip()):
        return NO_TAG
    if isinstance(tag, str):
        return None if TAG.fullmatch(tag) else STRANGE
    return NUMBERS if isinstance(tag, Real) else STRANGE


def _parts(tag: str) -> tuple[str, str]:
    """The letter, one of B, I, O, E, S, and the type."""
    letter, _, kind = tag.partition("-")
    return SAME_AS.get(letter, letter), kind or NAMELESS


def scheme_of(tags: Iterable[Sequence[str]]) -> Scheme:
    """The scheme that the tags of some sentences are written in; BIO where nothing tells.

    E or S make it BIOES, the lack of B makes it IO. Otherwise BIO and IOB1 differ in how an entity begins that follows
    no other of its type: with B, or with I. What most of them do decides, for single ones may be mistakes.
    """
    letters: set[str] = set()
    with_b = with_i = 0
    for sentence in tags:
        before = ("O", NAMELESS)
        for tag in map(_parts, sentence):
            apart = before[0] == "O" or before[1] != tag[1]
            letters.add(tag[0])
            with_b += apart and tag[0] == "B"
            with_i += apart and tag[0] == "I"
            before = tag
    if letters & {"E", "S"}:
        return "BIOES"
    if "B" not in letters:
        return "IO" if "I" in letters else "BIO"
    return "IOB1" if with_i > with_b else "BIO"


def faults(tags: Sequence[str], scheme: Scheme) -> list[tuple[int, str]]:
    """The tags that the scheme does not allow where they stand: their numbers (from 0), and what is wrong in words."""
    found = []
    before = ""
    for number, tag in enumerate([*tags, ""]):
        if tag and _parts(tag)[0] not in LETTERS[scheme]:
            found.append((number, f"{tag!r} is no tag of {scheme}"))
        elif not _follows(scheme, _parts(before or "O"), _parts(tag or "O")):
            after = f"after {before!r}" if before else "at the start of a sentence"
            found.append((number, f"{tag!r} {after}") if tag else (number - 1, f"{before!r} at the end of a sentence"))
        before = tag
    return found


def _follows(scheme: Scheme, before: tuple[str, str], tag: tuple[str, str]) -> bool:
    """Whether the scheme lets a tag stand after another; O stands for what is beyond the sentence."""
    same = before[0] != "O" and before[1] == tag[1]
    if scheme == "BIOES":
        inside = tag[0] in ("I", "E")
        return inside and same if before[0] in ("B", "I") else not inside
    needs_same = {"BIO": "I", "IOB1": "B", "IO": ""}[scheme]
    return tag[0] != needs_same or same


def check_tags(rows: Iterable[Tagged], scheme: Scheme, where: str) -> None:
    """Raise one UserError for all tags that break the scheme; `drop_invalid` leaves such sentences out."""
    wrong = Wrong()
    for row in rows:
        for token, what in faults(row.tags, scheme):
            wrong.add(what, row.place(token).removeprefix(f"{where}, "))
    what = f"{sum(wrong.many.values()):,} tags break the rules of {scheme}"
    refuse(wrong, what, where, [f"in {scheme} {RULES[scheme]}: {SKIP}"])


def drop_invalid(rows: Iterable[Tagged], scheme: Scheme, counts: Counts) -> list[Tagged]:
    """The sentences whose tags keep to the scheme; the others are counted as rejected."""
    kept, problem = [], unusable(f"tags that break the rules of {scheme}")
    for row in rows:
        if found := faults(row.tags, scheme):
            counts.used -= 1
            counts.note(counts.rejected, problem, row.place(found[0][0]))
        else:
            kept.append(row)
    return kept


def spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The entities: (type, first token, one past the last), in order; no sequence is refused.

    As conlleval and seqeval's default mode read it: an entity ends before O, B, S or another type and after E or S;
    whatever but O stands next begins one. So it is right for all schemes, and lenient with what is ill-formed.
    """
    found = []
    start, before = -1, ("O", NAMELESS)
    for number, tag in enumerate([*map(_parts, tags), ("O", NAMELESS)]):
        if start >= 0 and (before[0] in ("E", "S") or tag[0] in ("B", "S", "O") or tag[1] != before[1]):
            found.append((before[1], start, number))
            start = -1
        if start < 0 and tag[0] != "O":
            start = number
        before = tag
    return found


def to_bio(tags: Sequence[str], scheme: Scheme) -> tuple[str, ...]:
    """The same entities in BIO; tags that are BIO stay as they are."""
    if scheme == "BIO":
        return tuple(tags)
    out = ["O"] * len(tags)
    for kind, start, stop in spans(tags):
        suffix = "" if kind == NAMELESS else f"-{kind}"
        out[start:stop] = [f"B{suffix}", *[f"I{suffix}"] * (stop - start - 1)]
    return tuple(map(sys.intern, out))
