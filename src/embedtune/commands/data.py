"""embedtune data: look at text and pairs, clean and split them, grow pairs out of text, mine negatives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from embedtune.commands.shape import Command, Output, Talk, refuse_existing
from embedtune.errors import EXIT_FINE, EXIT_USER, UserError
from embedtune.recipes import BadRows


@dataclass(frozen=True)
class Check:
    """The doctor for text, pairs, labels, scores and tags: what would be cut or dropped and why, what repeats."""

    # The file or folder to look at.
    data: str
    # Model whose tokenizer counts the tokens.
    model: str = "all-MiniLM-L6-v2"
    # Tokens per row beyond which a line is chunked or cut (derived from the model).
    max_length: int | None = None
    # Which column is which: text=NAME; anchor=NAME,positive=NAME for pairs; text=NAME,label=NAME, or score=, tags=.
    columns: str | None = None
    # Print the result as JSON.
    json: bool = False


@dataclass(frozen=True)
class Example:
    """A real data.txt from the docstrings of the Python packages installed here; a blank line between documents."""

    # Where to write it.
    out: str = "data.txt"
    # Lines at most.
    lines: int = 8000
    # Replace a file of that name.
    force: bool = False
    # Print the result as JSON.
    json: bool = False


@dataclass(frozen=True)
class Clean:
    """A file without rows that repeat an earlier one, exactly or nearly; every dropped row is counted."""

    # The file or folder to clean: text, pairs, anything with columns of text.
    data: str
    # Where to write the rest: .txt, .jsonl, .csv or .tsv.
    out: str
    # Overlap of 3-word shingles from which two texts are near; None leaves near repeats in.
    near: float | None = 0.8
    # Leave out rows with an empty cell, and pairs of a text with itself.
    drop_empty: bool = False
    # Which column is which: text=body, or anchor=question,positive=context.
    columns: str | None = None
    # Rows that cannot be used: stop, leave them out, or mend them with U+FFFD.
    bad_rows: BadRows = "fail"
    # Replace a file of that name.
    force: bool = False
    # Print the result as JSON.
    json: bool = False


@dataclass(frozen=True)
class Split:
    """Parts that share no text, exactly or nearly: rows that hang together stay together."""

    # The file or folder to part: text, pairs, anything with columns of text.
    data: str
    # The folder for train, dev and test.
    out: str
    # What stays together: rows that repeat each other (cluster), a document, or rows with one value in a COLUMN.
    by: str = "cluster"
    # The parts and their shares, which add up to 1.
    parts: str = "train=0.8,dev=0.1,test=0.1"
    # Another seed gives another division.
    seed: int = 0
    # Overlap of 3-word shingles from which two texts are near; None: only exact repeats count.
    near: float | None = 0.8
    # Write the parts though texts of one stand in another.
    allow_leaks: bool = False
    # Which column is which: text=body, or anchor=question,positive=context.
    columns: str | None = None
    # Rows that cannot be used: stop, leave them out, or mend them with U+FFFD.
    bad_rows: BadRows = "fail"
    # Replace a folder of that name that an earlier split wrote.
    force: bool = False
    # Print the result as JSON.
    json: bool = False


@dataclass(frozen=True)
class Pairs:
    """Pairs out of raw text, by spans of each document or questions of a model you name; or out of labelled texts."""

    # The text: .txt (one text a line, a blank line between documents), or any file with a text column.
    data: str
    # Where to write the pairs (.jsonl).
    out: str = "pairs.jsonl"
    # How pairs are made: crop, cloze, title, lead, next; questions; or labels (text, label in; scored pairs out).
    generators: tuple[str, ...] = ("crop", "cloze")
    # Pairs of each kind that a document gives at most; for labels, of each score that a text gives.
    per_document: int = 4
    # Fewest words of an anchor.
    min_words: int = 5
    # Most words of a positive.
    max_words: int = 180
    # Whether the lines between two blank lines are one document, or each line is one.
    lines: Literal["auto", "apart", "together"] = "auto"
    # For questions: an OpenAI-compatible address, such as http://localhost:8000/v1 (its key in OPENAI_API_KEY).
    address: str | None = None
    # For questions: the model's name there.
    model: str | None = None
    # For questions: passages asked about at most.
    most: int = 1000
    # For questions: what a million tokens read and a million written cost, for the count of the cost.
    prices: tuple[float, float] | None = None
    # Seed of what is drawn.
    seed: int = 0
    # Which column is which: text=body,title=headline.
    columns: str | None = None
    # Rows that are not valid UTF-8 text: stop, leave them out, or mend them with U+FFFD.
    bad_rows: BadRows = "fail"
    # Replace a file of that name.
    force: bool = False
    # Print the result as JSON.
    json: bool = False


@dataclass(frozen=True)
class Mine:
    """Hard negatives: texts that a model finds near an anchor though they are not its positives."""

    # Pairs: .jsonl, .csv, .tsv, .parquet, a BEIR folder, hub:NAME.
    data: str
    # Where to write the rows with their negatives (.jsonl).
    out: str = "mined.jsonl"
    # Where to look for negatives beside the pairs' own positives: a file of texts, or a BEIR folder's corpus.
    corpus: str | None = None
    # The model that looks: a folder, a hub name, openai:MODEL.
    model: str = "all-MiniLM-L6-v2"
    # A second model, whose scores must agree.
    second: str | None = None
    # Negatives for each anchor.
    negatives: int = 5
    # Negatives are drawn from the so many hardest that are not refused; None takes the hardest themselves.
    pool: int | None = 20
    # Seed of the draw.
    seed: int = 0
    # The nearest so many are passed over.
    skip: int = 0
    # None is taken from beyond this rank.
    depth: int = 100
    # Refused above this share of the positive's score: likely a positive that nobody marked.
    margin: float | None = 0.95
    # Refused above the positive's score less this.
    absolute: float | None = None
    # Never from the positives of an anchor's own group (of one document, say: the column "group").
    other_groups: bool = False
    # Keep rows that got fewer negatives than asked.
    allow_fewer: bool = True
    # Which column is which: anchor=question,positive=context.
    columns: str | None = None
    # Rows that cannot be used: stop, or leave them out.
    bad_rows: BadRows = "fail"
    # Replace a file of that name.
    force: bool = False
    # Print the result as JSON.
    json: bool = False


def clean(command: Clean, talk: Talk) -> Output:
    """Clean a file."""
    from embedtune.data.columns import parse_columns
    from embedtune.data.tidy import clean as tidy

    found = tidy(command.data, command.out, columns=parse_columns(command.columns), bad_rows=command.bad_rows,
                 near=command.near, drop_empty=command.drop_empty, force=command.force)  # fmt: skip
    return Output(found.lines(), found.as_dict())


def split(command: Split, talk: Talk) -> Output:
    """Part a file."""
    from embedtune.data.columns import parse_columns
    from embedtune.data.divide import split as part
    from embedtune.data.divided import Plan

    plan = Plan(by=command.by, parts=_shares(command.parts), seed=command.seed, near=command.near)
    found = part(command.data, command.out, plan, columns=parse_columns(command.columns), bad_rows=command.bad_rows,
                  allow_leaks=command.allow_leaks, force=command.force)  # fmt: skip
    return Output(found.lines(), found.as_dict())


def _shares(text: str) -> dict[str, float]:
    try:
        return {name.strip(): float(share) for name, share in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        what = f"{text!r} is not of the form train=0.8,dev=0.1,test=0.1"
        raise UserError(what, where="--parts") from error


def pairs(command: Pairs, talk: Talk) -> Output:
    """Make pairs."""
    from embedtune.data.columns import parse_columns
    from embedtune.data.read import Counts, read_texts
    from embedtune.enrich.documents import documents
    from embedtune.enrich.spans import once, pairs_of, write_pairs

    refuse_existing(command.out, command.force)
    if "labels" in command.generators:
        return _of_labels(command)
    read, made = Counts(), Counts()
    columns = parse_columns(command.columns)
    rows = read_texts(command.data, columns=columns, bad_rows=command.bad_rows, counts=read)
    found = documents(rows, command.lines, read)
    lines: list[str] = []
    if "questions" in command.generators:
        many, lines = _questions(command, found, made, talk)
    else:
        grown = pairs_of(once(found, made), command.generators, command.per_document, command.seed, command.min_words,
                         command.max_words, made)  # fmt: skip
        many = write_pairs(Path(command.out), grown, made)
    lines = [f"{command.out}: {many:,} pairs from {read.used:,} rows", *lines, *_refusals(made), *read.notes]
    lines += [f"{n:,} rows left out: {reason}" for reason, n in read.rejected.items() if reason != "blank"]
    return Output(lines, {"file": command.out, "pairs": many, "rows": read.used, "none": made.rejected})


def _of_labels(command: Pairs) -> Output:
    """Scored pairs: texts of one class, and of two."""
    from embedtune.data.columns import parse_columns
    from embedtune.data.labels import read_labelled
    from embedtune.data.read import Counts
    from embedtune.enrich.classes import class_pairs
    from embedtune.enrich.write import write_rows

    if len(command.generators) > 1:
        raise UserError("pairs of labels are made alone, not with other generators", where="--generators")
    read, made = Counts(), Counts()
    rows = list(read_labelled(command.data, columns=parse_columns(command.columns), bad_rows=command.bad_rows,
                              counts=read))  # fmt: skip
    many = write_rows(Path(command.out), class_pairs(rows, command.per_document, command.seed, made), made)
    lines = [f"{command.out}: {many:,} scored pairs from {len(rows):,} labelled texts", *_refusals(made), *read.notes]
    lines += [f"{n:,} rows left out: {reason}" for reason, n in read.rejected.items() if reason != "blank"]
    lines.append(f"next: embedtune fit scored {command.out} --loss CosineSimilarityLoss, then fit classify --model")
    return Output(lines, {"file": command.out, "pairs": many, "rows": len(rows), "none": made.rejected})


def _questions(command: Pairs, found: Any, made: Any, talk: Talk) -> tuple[int, list[str]]:
    """Questions by a model behind an address; what was answered stays in a journal beside the output."""
    from embedtune.enrich.ask import Bill, Chat
    from embedtune.enrich.questions import Asking, passages, write_questions
    from embedtune.enrich.spans import write_pairs

    if len(command.generators) > 1:
        raise UserError("questions are made alone, not with other generators", where="--generators")
    if not command.address or not command.model:
        fix = "--generators questions --address http://localhost:8000/v1 --model NAME"
        raise UserError("questions need an address and a model", where="--generators questions", fix=fix)
    chat = Chat(address=command.address, model=command.model)
    asking = Asking(most=command.most, max_words=command.max_words, per_passage=command.per_document,
                    seed=command.seed)  # fmt: skip
    journal, bill = Path(command.out + ".journal"), Bill(command.prices)
    wanted = passages(found, asking, made)
    grown = write_questions(wanted, chat, asking, journal, bill=bill, counts=made, note=talk.note)
    many = write_pairs(Path(command.out), grown, made)
    return many, [bill.line("passages", journal)]


def mine(command: Mine, talk: Talk) -> Output:
    """Mine negatives."""
    from embedtune.data.columns import parse_columns
    from embedtune.data.pairs import read_pairs
    from embedtune.data.read import Counts
    from embedtune.encoder.encode import open_encoder
    from embedtune.encoder.shapes import bound_memory
    from embedtune.enrich.mine import Mining, write_mined
    from embedtune.enrich.mine import mine as look
    from embedtune.fit.prepared import rows_lost

    bound_memory()
    refuse_existing(command.out, command.force)
    read = Counts()
    found = list(
        read_pairs(command.data, columns=parse_columns(command.columns), bad_rows=command.bad_rows, counts=read)
    )
    how = Mining(negatives=command.negatives, pool=command.pool, seed=command.seed, skip=command.skip,
                 depth=command.depth, margin=command.margin,
                 absolute=command.absolute, other_groups=command.other_groups,
                 allow_fewer=command.allow_fewer)  # fmt: skip
    encoder = open_encoder(command.model, note=talk.note)
    second = open_encoder(command.second, note=talk.note) if command.second else None
    # Vectors go beside the output: the system's place for temporary files may be memory.
    scratch = Path(command.out).absolute().parent
    mined = look(found, _corpus(command, read), encoder, how, second=second, scratch=scratch, note=talk.note)
    many = write_mined(Path(command.out), mined)
    lines = [
        f"{command.out}: {many:,} rows with up to {command.negatives} negatives, out of {mined.candidates:,} texts",
        *(f"{n:,} candidates refused: {reason}" for reason, n in mined.refused.items() if n),
        f"{mined.fewer:,} rows have fewer negatives than asked, {mined.without:,} of them none"
        + ("" if command.allow_fewer else "; they were left out"),
    ]
    lines += [f"{mined.blank:,} blank texts of the corpus left out"] if mined.blank else []
    lines += rows_lost(read)
    return Output(lines, {"file": command.out, "rows": many, "refused": mined.refused, "fewer": mined.fewer})


def _corpus(command: Mine, counts: Any) -> Mapping[str, str] | Iterator[str] | None:
    from embedtune.data.read import read_texts
    from embedtune.data.retrieval import is_beir, read_beir

    where = command.corpus or command.data
    if is_beir(where):
        splits = sorted(path.name.split(".")[0] for path in (Path(where) / "qrels").glob("*.tsv*"))
        # Whichever is read, the corpus is the same; what is wrong in it is known already where the pairs are its own.
        split = "train" if "train" in splits or not splits else splits[0]
        found = read_beir(where, split, bad_rows=command.bad_rows)
        counts.notes += found.remarks if command.corpus else []
        return found.corpus
    if command.corpus is None:
        return None
    return (row.values["text"] for row in read_texts(command.corpus, bad_rows=command.bad_rows, counts=counts))


def _refusals(made: Any) -> list[str]:
    return [
        f"{n:,} times none: {reason} ({', '.join(made.examples.get(reason, []))})"
        for reason, n in made.rejected.items()
    ]


def check(command: Check, talk: Talk) -> Output:
    """Diagnose a file."""
    from embedtune.data.columns import parse_columns
    from embedtune.data.kinds import check_data
    from embedtune.encoder import load

    load.quiet()
    folder = load.find(command.model)
    tokenizer = load.load_tokenizer(folder)
    length = command.max_length or load.stated_length(folder, tokenizer)
    columns = parse_columns(command.columns)
    found = check_data(command.data, tokenizer=tokenizer, max_length=length, columns=columns)
    return Output(found.lines(), found.as_dict(), EXIT_USER if found.verdict == "not usable" else EXIT_FINE)


def example(command: Example, talk: Talk) -> Output:
    """Write a data.txt."""
    from embedtune.data.example import write_example

    count = write_example(command.out, command.lines, force=command.force)
    return Output([f"{command.out}: {count:,} lines"], {"file": command.out, "lines": count})


DOCTOR = "the doctor: what is in it, what would be cut or dropped, is it ready"
DOCSTRINGS = "a real data.txt from the docstrings of the packages installed here"
COMMANDS = {
    "data check": Command("FILE", DOCTOR, Check, check, "--data"),
    "data example": Command("", DOCSTRINGS, Example, example),
    "data clean": Command("FILE --out NEW", "without repeats, exact and near", Clean, clean, "--data"),
    "data split": Command("FILE --out DIR", "train, dev and test that share no text", Split, split, "--data"),
    "data pairs": Command("FILE", "pairs out of raw text, or questions by a model you name", Pairs, pairs, "--data"),
    "data mine": Command("PAIRS", "hard negatives for pairs, found by a model", Mine, mine, "--data"),
}
