"""The doctor: reads all of the data, lists all that is wrong with it, and says whether it can be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embedtune.data.clean import Duplicates, exact_duplicates, near_duplicates
from embedtune.data.lines import ending, find_files
from embedtune.data.read import Counts, DataLike, read_texts
from embedtune.data.tokens import uncut
from embedtune.errors import UserError

NEAR_ROWS, NEAR_CHARACTERS = 20_000, 2000  # compared for near-duplicates: the first rows, their starts
PIECE = 50_000  # characters given to the tokenizer as one text; longer rows go in pieces
BATCH_ROWS, BATCH_CHARACTERS = 1000, 500_000
FEW_ROWS = 100
MANY_DUPLICATES, MANY_NEAR, MANY_UNKNOWN, MANY_LONG = 0.01, 0.05, 0.01, 0.2  # shares that earn a remark


@dataclass(frozen=True)
class Remark:
    """Something the user should know or mend."""

    what: str
    fix: str


@dataclass(frozen=True)
class Lengths:
    """How long the rows are, in tokens (special ones included) or, without a tokenizer, in words."""

    unit: str
    mean: float
    median: int
    p95: int
    max: int
    limit: int | None  # max_length
    longer: int  # rows longer than that
    pieces: int  # chunks these would give


@dataclass(frozen=True)
class Diagnosis:
    """What `check` found; `verdict` is "ready", "usable, with remarks" or "not usable"."""

    verdict: str
    remarks: list[Remark]
    formats: list[str]
    encoding: str
    files: int
    bytes: int
    sha256: str
    rows: int
    used: int
    rejected: dict[str, int]
    examples: dict[str, list[str]]
    documents: int
    characters: int
    lengths: Lengths | None
    unknown_share: float | None
    exact_duplicates: int
    exact_duplicates_estimated: bool
    near_duplicates: int
    near_duplicates_rows: int
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for a terminal."""
        formats = ", ".join(self.formats) or "none"
        lines = [
            f"format      {formats}, {self.encoding}",
            f"size        {self.bytes:,} bytes in {self.files:,} file(s), sha256 {self.sha256[:16]}",
            f"rows        {self.rows:,} read, {self.used:,} used",
        ]
        lines += rejected_lines(self.rejected, self.examples)
        lines.append(f"documents   {self.documents:,}, {self.characters:,} characters")
        if self.lengths:
            n = self.lengths
            lines += [f"{n.unit:<11} mean {n.mean:,.1f}, median {n.median:,}, p95 {n.p95:,}, max {n.max:,}"]
            if n.limit:
                long = f"{n.longer:,} rows ({n.longer / self.used:.1%}) are longer than {n.limit:,}"
                lines.append(f"            {long}" + (f", would be {n.pieces:,} chunks" if n.longer else ""))
        if self.unknown_share is not None:
            lines.append(f"unknown     {self.unknown_share:.2%} of the tokens")
        about = "about " if self.exact_duplicates_estimated else ""
        lines.append(f"duplicates  {about}{self.exact_duplicates:,} exact, {self.near_duplicates:,} near")
        if self.near_duplicates_rows < self.used:
            lines[-1] += f" (near ones looked for in the first {self.near_duplicates_rows:,} rows only)"
        return lines + verdict_lines(self.notes, self.verdict, self.remarks)


def rejected_lines(rejected: Mapping[str, int], examples: Mapping[str, list[str]]) -> list[str]:
    """Rows that were rejected, by reason, with their first places."""
    lines = []
    for reason, count in rejected.items():
        more = "; ..." if count > len(examples[reason]) else ""
        lines.append(f"            {count:,} {reason}: {'; '.join(examples[reason])}{more}")
    return lines


def verdict_lines(notes: list[str], verdict: str, remarks: list[Remark]) -> list[str]:
    """How every report ends: notes, the verdict, and the remarks with their fixes."""
    lines = [*(f"note        {note}" for note in notes), f"verdict     {verdict}"]
    for remark in remarks:
        lines += [f"  - {remark.what}"] + ([f"    fix: {remark.fix}"] if remark.fix else [])
    return lines


@dataclass
class Tally:
    """What one pass over the texts gathers; its size does not grow with the data."""

    documents: int = 0
    characters: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    unknown: int = 0
    duplicates: Duplicates = field(default_factory=Duplicates)
    first: list[str] = field(default_factory=list)


def check(
    data: DataLike,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> Diagnosis:
    """Examine texts without stopping at bad ones; `tokenizer` is a Hugging Face fast tokenizer.

    max_length: in tokens, special ones included (words without a tokenizer). Raises UserError only where
    there is nothing to examine: no such file, no known ending, no fast tokenizer.
    """
    measure = Measure(tokenizer)
    counts, tally = Counts(), Tally()
    fatal: list[UserError] = []
    batch: list[str] = []
    size = 0
    for text in _texts(data, columns, counts, tally, fatal):
        tally.characters += len(text)
        tally.duplicates.add(text)
        if len(tally.first) < NEAR_ROWS:
            tally.first.append(text[:NEAR_CHARACTERS])
        batch.append(text)
        size += len(text)
        if len(batch) == BATCH_ROWS or size > BATCH_CHARACTERS:
            measure.add(batch, tally)
            batch, size = [], 0
    measure.add(batch, tally)
    return _diagnose(counts, tally, fatal, measure, max_length)


def _texts(
    data: DataLike, columns: Mapping[str, str] | None, counts: Counts, tally: Tally, fatal: list[UserError]
) -> Iterator[str]:
    """All usable texts; each file is read by itself, so that one that cannot be read hides no other."""
    sources: list[Any] = [data]
    if isinstance(data, (str, Path)):
        sources, counts.ignored = find_files(data)
    for source in sources:
        document = -1
        try:
            for row in read_texts(source, columns=columns, bad_rows="skip", counts=counts):
                tally.documents += row.document != document
                document = row.document
                yield row.values["text"]
        except UserError as error:
            fatal.append(error)


class Measure:
    """Counts tokens, or words where there is no tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.unit, self.special, self.unknown = "words", 0, None
        self.backend: Any = None
        if tokenizer is None:
            return
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if not hasattr(backend, "encode_batch"):
            raise UserError("has no fast tokenizer", where="model", fix="give one with a tokenizer.json")
        self.unit, self.special = "tokens", tokenizer.num_special_tokens_to_add()
        self.unknown = tokenizer.unk_token_id
        self.backend = uncut(tokenizer)

    def add(self, texts: list[str], tally: Tally) -> None:
        """Tally the lengths of the texts."""
        if self.backend is None:
            tally.lengths.update(len(text.split()) for text in texts)
            return
        lengths = np.full(len(texts), self.special)
        for rows, pieces in _groups(texts):
            encoded = self.backend.encode_batch_fast(pieces, add_special_tokens=False)
            np.add.at(lengths, rows, list(map(len, encoded)))
            if self.unknown is not None:
                tally.unknown += sum(each.ids.count(self.unknown) for each in encoded)
        tally.lengths.update(lengths.tolist())


def _groups(texts: list[str]) -> Iterator[tuple[list[int], list[str]]]:
    """(row numbers, pieces of their texts), so many at once that BATCH_CHARACTERS are not passed by much."""
    rows: list[int] = []
    pieces: list[str] = []
    size = 0
    for row, text in enumerate(texts):
        for piece in _pieces(text):
            rows.append(row)
            pieces.append(piece)
            size += len(piece)
            if size > BATCH_CHARACTERS:
                yield rows, pieces
                rows, pieces, size = [], [], 0
    if rows:
        yield rows, pieces


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most PIECE characters, cut at blanks where there are any."""
    start = 0
    while len(text) - start > PIECE:
        blank = text.rfind(" ", start + 1, start + PIECE)
        end = blank if blank > 0 else start + PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def _diagnose(counts: Counts, tally: Tally, fatal: list[UserError], measure: Measure, limit: int | None) -> Diagnosis:
    lengths = lengths_of(tally.lengths, measure.unit, measure.special, limit)
    tokens = sum(length * rows for length, rows in tally.lengths.items()) - measure.special * counts.used
    near = near_duplicates(tally.first)
    repeats = sum(len(cluster) - 1 for cluster in near) - exact_duplicates(tally.first).count
    share = tally.unknown / max(tokens, 1) if measure.backend is not None else None
    remarks = [Remark(*error_parts(error)) for error in fatal] + row_remarks(counts)
    near_share = repeats / max(len(tally.first), 1)
    remarks += _text_remarks(counts.used, tally.duplicates.count, near_share, share, lengths)
    verdict = "usable, with remarks" if remarks else "ready"
    return Diagnosis(
        verdict="not usable" if fatal or not counts.used else verdict,
        remarks=remarks,
        formats=sorted({"".join(ending(Path(file))) for file in counts.files}) or ["list"],
        encoding="not UTF-8 throughout" if "not UTF-8" in counts.rejected else "UTF-8",
        files=len(counts.files),
        bytes=counts.bytes,
        sha256=counts.sha256,
        rows=counts.rows,
        used=counts.used,
        rejected=counts.rejected,
        examples={reason: counts.examples[reason] for reason in counts.rejected},
        documents=tally.documents,
        characters=tally.characters,
        lengths=lengths,
        unknown_share=share,
        exact_duplicates=tally.duplicates.count,
        exact_duplicates_estimated=not tally.duplicates.exact,
        near_duplicates=repeats,
        near_duplicates_rows=len(tally.first),
        notes=counts.notes,
    )


def error_parts(error: UserError) -> tuple[str, str]:
    """What is wrong and where, in one line, and the fix."""
    head = f"{error.where}: {error.what}" if error.where else error.what
    return "; ".join([head, *error.details]), error.fix


def lengths_of(tally: Counter[int], unit: str, special: int, limit: int | None) -> Lengths | None:
    """The spread of lengths (`tally`: rows by length) and what a limit would do to them; None where there are none."""
    if not tally:
        return None
    values = np.array(sorted(tally))
    rows = np.array([tally[int(value)] for value in values])
    upto, total = np.cumsum(rows), rows.sum()
    at = [int(values[np.searchsorted(upto, share * total)]) for share in (0.5, 0.95)]
    long = values > limit if limit else np.zeros(len(values), dtype=bool)
    room = max(1, limit - special) if limit else 1
    pieces = int((-((special - values[long]) // room) * rows[long]).sum())
    mean = float(values @ rows / total)
    return Lengths(unit, mean, at[0], at[1], int(values[-1]), limit, int(rows[long].sum()), pieces)


def row_remarks(counts: Counts) -> list[Remark]:
    """A remark for each reason for which rows were rejected; blank ones are harmless."""
    remarks = []
    for reason, count in counts.rejected.items():
        if reason != "blank":
            places = "; ".join(counts.examples[reason])
            what = f"{count:,} of {counts.rows:,} rows cannot be used ({reason}): {places}"
            remarks.append(Remark(what, counts.fixes[reason]))
    return remarks


def _text_remarks(used: int, exact: int, near: float, unknown: float | None, lengths: Lengths | None) -> list[Remark]:
    remarks = []
    if 0 < used < FEW_ROWS:
        remarks.append(Remark(f"only {used:,} rows: too few to learn from", "give some thousands of rows"))
    if exact > MANY_DUPLICATES * used:
        what = f"{exact:,} rows ({exact / used:.1%}) repeat an earlier one"
        remarks.append(Remark(what, "sort -u FILE > NEW drops the repeats; repeated text is learned repeatedly"))
    if near > MANY_NEAR:
        what = f"{near:.1%} of the rows nearly repeat an earlier one"
        remarks.append(Remark(what, "remove boilerplate such as headers, footers and signatures"))
    if unknown is not None and unknown > MANY_UNKNOWN:
        what = f"{unknown:.1%} of the tokens are unknown to the model's vocabulary"
        remarks.append(Remark(what, "choose a model for this language with --model"))
    if lengths and lengths.longer > MANY_LONG * used:
        share = f"{lengths.longer:,} rows ({lengths.longer / used:.1%})"
        what = f"{share} are longer than {lengths.limit:,} {lengths.unit}: cut into {lengths.pieces:,} chunks"
        fix = "nothing, if that is right; else put one paragraph on each line"
        remarks.append(Remark(what, fix))
    return remarks
