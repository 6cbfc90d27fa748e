"""What a run trains on, chooses on and is judged on: three parts that share no text, exactly or nearly.

Raw text has no queries. Training pairs are then made by two generators, and the dev and test queries by others that
training does not use: they are proxies, and are called so everywhere.

The data is read into a file without a name, where its rows are known by number: in memory stand a few numbers for each
document and pair, and the texts of those that are drawn.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embedtune import keyed
from embedtune.data.check import check
from embedtune.data.columns import parse_columns
from embedtune.data.divide import assign_groups, leaks, pair_groups, text_groups
from embedtune.data.kept import Kept, Texts, keep
from embedtune.data.pair_check import check_pairs, kind_of
from embedtune.data.pairs import Pair, ScoredPair, read_pairs, read_scored
from embedtune.data.read import Counts, read_texts
from embedtune.data.retrieval import RetrievalSet, bounded, from_pairs, is_beir, read_beir
from embedtune.enrich.documents import Document, documents
from embedtune.enrich.spans import Grown, pairs_of
from embedtune.errors import UserError
from embedtune.fit.prepared import data_profile, name_of, rows_lost
from embedtune.recipes import Run

TRAIN, PROXIES = ("crop", "cloze"), ("title", "lead", "next")
NAMES = {"title": "title to body", "lead": "first sentence to the rest", "next": "paragraph to the next"}
SHARES = (0.8, 0.1, 0.1)
FEWEST = 20  # queries without which a test set tells nothing
SHOWN = (0, 1, -2, -1)  # training pairs that the report shows
DRAW = 4  # what a key is for: which pairs are kept where there are too many


@dataclass(frozen=True)
class Parts:
    """Pairs to train and choose on, and the sets that are judged once, at the end."""

    train: list[dict[str, Any]]
    dev: list[dict[str, Any]]
    tests: dict[str, RetrievalSet]
    real: bool  # whether the test queries are real ones
    profile: dict[str, Any]
    remarks: list[str]
    sha256: str
    text: Kept | None = None  # training documents as paragraphs, where there was raw text
    examples: list[dict[str, str]] = field(default_factory=list)


def divide(recipe: Run, note: Callable[[str], None], folder: Path | None = None) -> Parts:
    """Read the data and part it. Raises UserError where it is too little, or of another kind.

    `folder` is where texts are kept that do not fit into memory (the system's place for temporary files).
    """
    columns = parse_columns(recipe.columns)
    kind = kind_of(recipe.data, columns) or "raw text"
    note(f"reading {name_of(recipe.data)} as {kind}")
    if kind == "scored pairs":
        fix = "embedtune fit scored FILE; embedtune judge BASE TUNED --data FILE"
        raise UserError("holds scored pairs, which `run` does not know yet", where=name_of(recipe.data), fix=fix)
    found = _of_pairs(recipe, columns, folder) if kind == "pairs" else _of_text(recipe, columns, note, folder)
    diagnosis = (check_pairs if kind == "pairs" else check)(recipe.data, columns=columns)
    found.remarks.extend(f"the doctor says: {remark.what}" for remark in diagnosis.remarks)
    return found


def _of_pairs(recipe: Run, columns: dict[str, str], folder: Path | None) -> Parts:
    counts, seed = Counts(), recipe.loop.seed
    given = read_pairs(recipe.data, columns=columns, bad_rows=recipe.bad_rows, counts=counts)
    pairs, positives, repeated = _distinct(given, folder)
    remarks = rows_lost(counts)
    if repeated:
        remarks.append(f"{repeated:,} pairs left out: they repeat an earlier one")
    part = assign_groups(pair_groups(pairs), SHARES, seed)
    rows = [np.flatnonzero(part == number) for number in range(3)]
    if recipe.queries is not None:
        tests = real_queries(recipe, [], remarks)
        rows = [np.concatenate([rows[0], rows[2]]), rows[1], rows[2][:0]]
    elif isinstance(recipe.data, str | Path) and is_beir(recipe.data) and (split := _other_split(recipe.data)):
        judged = read_beir(recipe.data, split, bad_rows=recipe.bad_rows)
        tests = {split: bounded(judged, recipe.test_rows, recipe.test_corpus, [], seed)}
        rows = [np.concatenate([rows[0], rows[2]]), rows[1], rows[2][:0]]
    else:
        name = "held-out pairs"
        held = _to_judge(pairs.pick(rows[2]), name, recipe, remarks)
        tests = {name: bounded(from_pairs(held, name), recipe.test_rows, recipe.test_corpus, positives, seed)}
    train, dev, test = map(pairs.pick, rows)
    remarks.append(
        f"{len(pairs):,} pairs parted by groups that share a text, exactly or nearly: {len(train):,} to train on, "
        f"{len(dev):,} to choose on, {len(test):,} to judge on; no group is in two parts"
    )
    kept = [_row(pair) for pair in _at_most(train, recipe.most_pairs, seed)]
    chosen = [_row(pair) for pair in _at_most(dev, recipe.test_rows, seed)]
    profile = {
        **data_profile(recipe.data, counts, None),
        "pairs": len(pairs),
        "train_pairs": len(kept),
        "dev_pairs": len(chosen),
    }
    _need(kept, chosen, tests)
    return Parts(kept, chosen, tests, True, profile, remarks, counts.sha256)


def _of_text(recipe: Run, columns: dict[str, str], note: Callable[[str], None], folder: Path | None) -> Parts:
    counts, grouping, seed = Counts(), Counts(), recipe.loop.seed
    lines = read_texts(recipe.data, columns=columns, bad_rows=recipe.bad_rows, counts=counts)
    found, repeated = _distinct_documents(documents(lines, counts=grouping), folder)
    remarks = rows_lost(counts)
    if repeated:
        remarks.append(f"{repeated:,} documents left out: they repeat an earlier one")
    note(f"{len(found):,} documents; looking for those that nearly repeat each other")
    part = assign_groups(text_groups(document.text for document in found), SHARES, seed)
    rows = [np.flatnonzero(part == number) for number in range(3)]
    sides, grown = [found.pick(side) for side in rows], Counts()
    train = _grown(sides[0], TRAIN, recipe, grown, folder)
    dev, test = ({name: _grown(side, (name,), recipe, Counts(), folder) for name in PROXIES} for side in sides[1:])
    remarks.append(
        f"{len(found):,} documents parted whole, near-duplicates together: {len(sides[0]):,} to train on, "
        f"{len(sides[1]):,} to choose on, {len(sides[2]):,} to judge on"
    )
    refused = ", ".join(f"{n:,} x {reason}" for reason, n in grown.rejected.items())
    remarks.append(
        f"{len(train):,} training pairs by {' and '.join(TRAIN)}" + (f" (none: {refused})" if refused else "")
    )
    others = found.pick(np.concatenate(rows[::-1])).read_as(lambda *values: _document(*values).text)
    chosen = [_row(pair) for pairs in dev.values() for pair in _at_most(pairs, recipe.test_rows, seed)]
    if recipe.queries is not None:
        tests = real_queries(recipe, others, remarks)
    else:
        drawn = {name: _to_judge(pairs, NAMES[name], recipe, remarks) for name, pairs in test.items()}
        usable = {name: pairs for name, pairs in drawn.items() if len({p.anchor for p in pairs}) >= FEWEST}
        if len(usable) < 2:
            made = ", ".join(f"{name}: {len(pairs):,}" for name, pairs in test.items())
            raise UserError(
                f"the text gives fewer than two kinds of proxy queries ({made}; {FEWEST} of a kind are needed)",
                where=name_of(recipe.data),
                fix="give more text, documents parted by blank lines; or real queries with --queries FILE",
            )  # fmt: skip
        tests = {
            NAMES[name]: bounded(_as_set(pairs, NAMES[name]), recipe.test_rows, recipe.test_corpus, others, seed)
            for name, pairs in usable.items()
        }
        remarks.append(
            f"proxy queries of kinds that training does not use: {', '.join(NAMES[name] for name in usable)}"
        )
    train = _unlike(train, [row["anchor"] for row in chosen], tests, remarks)
    kept = [_row(pair) for pair in _at_most(train, recipe.most_pairs, seed)]
    profile = {
        **data_profile(recipe.data, counts, None),
        "documents": len(found),
        "train_pairs": len(kept),
        "dev_pairs": len(chosen),
    }
    _need(kept, chosen, tests)
    examples = [
        {"anchor": p.anchor, "positive": p.positive, "generator": p.generator} for p in map(train.__getitem__, SHOWN)
    ]
    text = sides[0].read_as(lambda group, title, paragraphs: paragraphs)
    return Parts(kept, chosen, tests, recipe.queries is not None, profile, remarks, counts.sha256, text, examples)


def _unlike(train: Kept, dev: Sequence[str], tests: Mapping[str, RetrievalSet], remarks: list[str]) -> Kept:
    """The training pairs whose anchor is no dev or test query, exactly or nearly: documents may share sentences."""
    held = [*dev, *(query for test in tests.values() for query in test.queries.values())]
    shared = leaks(held, (pair.anchor for pair in train)).rows
    if len(shared):
        remarks.append(f"{len(shared):,} training pairs left out: their anchor is nearly a query to choose or judge on")
    return train.pick(np.delete(np.arange(len(train)), shared))


def real_queries(recipe: Run, others: Texts, remarks: list[str]) -> dict[str, RetrievalSet]:
    """The set of the user's own queries, with the run's texts to search among."""
    given: Any = recipe.queries
    found = open_set(given, bad_rows=recipe.bad_rows)
    remarks += found.remarks
    if len(found.queries) < FEWEST:
        remarks.append(f"only {len(found.queries)} real queries: the interval will be wide; fifty are a beginning")
    return {"real queries": bounded(found, 10**9, recipe.test_corpus, others, recipe.loop.seed)}


def open_set(data: Any, *, columns: Mapping[str, str] | None = None, bad_rows: Any = "fail") -> RetrievalSet:
    """A BEIR folder, `folder:split`, or pairs, as queries with a corpus."""
    path, _, split = str(data).rpartition(":") if isinstance(data, str | Path) else ("", "", "")
    if path and is_beir(path):
        return read_beir(path, split, bad_rows=bad_rows)
    if isinstance(data, str | Path) and is_beir(data):
        return read_beir(data, bad_rows=bad_rows)
    counts = Counts()
    found = from_pairs(read_pairs(data, columns=columns, bad_rows=bad_rows, counts=counts), name_of(data))
    found.remarks.extend(rows_lost(counts))
    return found


@dataclass(frozen=True)
class Judged:
    """Data to judge on: a RetrievalSet, or scored pairs; `remarks` say what was left out."""

    name: str
    retrieval: RetrievalSet | None
    scored: list[ScoredPair]
    remarks: list[str]


def open_judged(data: str, *, columns: Mapping[str, str] | None = None, bad_rows: Any = "fail") -> Judged:
    """Data by what it looks like: scored pairs where there are two sentences, else what `open_set` opens."""
    if not is_beir(data.rpartition(":")[0] or data) and kind_of(data, columns) == "scored pairs":
        counts = Counts()
        pairs = list(read_scored(data, columns=columns, bad_rows=bad_rows, counts=counts))
        return Judged(Path(data).name, None, pairs, rows_lost(counts))
    found = open_set(data, columns=columns, bad_rows=bad_rows)
    return Judged(found.name, found, [], found.remarks)


def _other_split(folder: str | Path) -> str | None:
    names = sorted(path.name.split(".")[0] for path in (Path(folder) / "qrels").glob("*.tsv*"))
    return next((name for name in ("test", "dev", "validation") if name in names), None)


def _need(train: Sequence[Any], dev: Sequence[Any], tests: Mapping[str, RetrievalSet]) -> None:
    few = [f"{len(train):,} pairs to train on"] if len(train) < 2 * FEWEST else []
    few += [f"{len(dev):,} pairs to choose on"] if len(dev) < FEWEST // 2 else []
    few += [
        f"{len(test.queries):,} queries to judge on ({name})" for name, test in tests.items() if len(test.queries) < 2
    ]
    if few:
        raise UserError(f"too little data to prove anything: {'; '.join(few)}", fix="give more; some hundreds at least")


def _distinct(found: Iterable[Pair], folder: Path | None) -> tuple[Kept, Kept, int]:
    """The pairs without repeats, the distinct positives, and how many pairs repeat another."""
    keys, positives = array("Q"), array("Q")

    def rows() -> Iterator[tuple[Any, ...]]:
        for pair in found:
            keys.append(_hash(pair.anchor, pair.positive))
            positives.append(_hash(pair.positive))
            yield pair.anchor, pair.positive, pair.negatives, pair.file, pair.number, pair.group

    kept = keep(
        rows(), lambda anchor, positive, negatives, *rest: Pair(anchor, positive, tuple(negatives), *rest), folder
    )
    _, first, inverse = np.unique(np.asarray(keys), return_index=True, return_inverse=True)
    last = np.zeros(len(first), np.int64)
    last[inverse] = np.arange(len(kept))
    order = np.argsort(last)  # where a pair comes last says where it stands, as it always has
    pairs = kept.pick(first[order])
    each = np.sort(np.unique(np.asarray(positives)[first[order]], return_index=True)[1])
    return pairs, pairs.pick(each).read_as(lambda anchor, positive, *rest: positive), len(kept) - len(pairs)


def _hash(*texts: str) -> int:
    """64 bits that differ, but for one case in 2^64, where the texts do; no text that was read has a NUL in it."""
    plain = "\0".join(texts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), "big")


def _document(group: str, title: str, paragraphs: Iterable[str]) -> Document:
    return Document(group, title, tuple(paragraphs))


def _distinct_documents(found: Iterable[Document], folder: Path | None) -> tuple[Kept, int]:
    """The documents without those that repeat an earlier one, and how many these are."""
    keys = array("Q")

    def rows() -> Iterator[tuple[Any, ...]]:
        for document in found:
            keys.append(document.key)
            yield document.group, document.title, document.paragraphs

    kept = keep(rows(), _document, folder)
    first = np.sort(np.unique(np.asarray(keys), return_index=True)[1])
    return kept.pick(first), len(kept) - len(first)


def _grown(side: Kept, generators: Sequence[str], recipe: Run, counts: Counts, folder: Path | None) -> Kept:
    """The pairs that these documents give."""
    made = pairs_of(side, generators, recipe.pairs, recipe.loop.seed, counts=counts)
    return keep(((pair.anchor, pair.positive, pair.group, pair.generator) for pair in made), Grown, folder)


def _to_judge(pairs: Kept, name: str, recipe: Run, remarks: list[str]) -> list[Any]:
    """All pairs of as many anchors as queries and the texts to search in can need.

    All of an anchor's, or its right answers that were not drawn would be wrong where another pair brings them along.
    """
    anchors = np.fromiter((_hash(pair.anchor) for pair in pairs), np.uint64, len(pairs))
    _, first, which = np.unique(anchors, return_index=True, return_inverse=True)
    drawn = np.argsort(keyed.key(recipe.loop.seed, DRAW, first), kind="stable")[: recipe.test_rows + recipe.test_corpus]
    kept = np.isin(which, drawn)
    if not kept.all():
        remarks.append(f"{name}: {kept.sum():,} of {len(pairs):,} pairs drawn to judge on, whole queries")
    return list(pairs.pick(kept))


def _at_most(items: Kept, most: int, seed: int) -> list[Any]:
    """At most so many, drawn by key, in their own order."""
    drawn = np.arange(len(items))
    if len(items) > most:
        drawn = np.sort(np.argsort(keyed.key(seed, DRAW, drawn), kind="stable")[:most])
    return list(items.pick(drawn))


def _row(pair: Any) -> dict[str, Any]:
    row = {"anchor": pair.anchor, "positive": pair.positive}
    if getattr(pair, "negatives", ()):
        row["negatives"] = list(pair.negatives)
    return {**row, "group": pair.group} if pair.group else row


def _as_set(pairs: Sequence[Any], name: str) -> RetrievalSet:
    return from_pairs((Pair(p.anchor, p.positive, (), name, n, p.group) for n, p in enumerate(pairs, 1)), name)
