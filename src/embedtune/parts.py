"""What a run trains on, chooses on and is judged on: three parts that share no text, exactly or nearly.

Raw text has no queries. Training pairs are then made by two generators, and the dev and test queries by others that
training does not use: they are proxies, and are called so everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embedtune import keyed
from embedtune.data.check import check
from embedtune.data.columns import parse_columns
from embedtune.data.divide import assign_groups, leaks, pair_groups, text_groups
from embedtune.data.pair_check import check_pairs, kind_of
from embedtune.data.pairs import Pair, ScoredPair, read_pairs, read_scored
from embedtune.data.read import Counts, read_texts
from embedtune.data.retrieval import RetrievalSet, from_pairs, is_beir, read_beir
from embedtune.enrich.documents import Document, documents
from embedtune.enrich.spans import pairs_of
from embedtune.errors import UserError
from embedtune.fit.objectives.contrastive import bounded
from embedtune.fit.prepared import data_profile, name_of, rows_lost
from embedtune.recipes import Run

TRAIN, PROXIES = ("crop", "cloze"), ("title", "lead", "next")
NAMES = {"title": "title to body", "lead": "first sentence to the rest", "next": "paragraph to the next"}
SHARES = (0.8, 0.1, 0.1)
FEWEST = 20  # queries without which a test set tells nothing
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
    text: list[list[str]] = field(default_factory=list)  # training documents as paragraphs, where there was raw text
    examples: list[dict[str, str]] = field(default_factory=list)


def divide(recipe: Run, note: Callable[[str], None]) -> Parts:
    """Read the data and part it. Raises UserError where it is too little, or of another kind."""
    columns = parse_columns(recipe.columns)
    kind = kind_of(recipe.data, columns) or "raw text"
    note(f"reading {name_of(recipe.data)} as {kind}")
    if kind == "scored pairs":
        fix = "embedtune fit scored FILE; embedtune judge BASE TUNED --data FILE"
        raise UserError("holds scored pairs, which `run` does not know yet", where=name_of(recipe.data), fix=fix)
    found = _of_pairs(recipe, columns) if kind == "pairs" else _of_text(recipe, columns, note)
    diagnosis = (check_pairs if kind == "pairs" else check)(recipe.data, columns=columns)
    found.remarks.extend(f"the doctor says: {remark.what}" for remark in diagnosis.remarks)
    return found


def _of_pairs(recipe: Run, columns: dict[str, str]) -> Parts:
    counts, seed = Counts(), recipe.loop.seed
    pairs = list(read_pairs(recipe.data, columns=columns, bad_rows=recipe.bad_rows, counts=counts))
    remarks, tests = rows_lost(counts), {}
    pairs, repeated = _distinct(pairs)
    if repeated:
        remarks.append(f"{repeated:,} pairs left out: they repeat an earlier one")
    part = assign_groups(pair_groups(pairs), SHARES, seed)
    train, dev, test = ([pair for pair, p in zip(pairs, part) if p == number] for number in range(3))
    if recipe.queries is not None:
        tests = real_queries(recipe, [], remarks)
        train, test = train + test, []
    elif isinstance(recipe.data, str | Path) and is_beir(recipe.data) and (split := _other_split(recipe.data)):
        found = read_beir(recipe.data, split, bad_rows=recipe.bad_rows)
        tests = {split: bounded(found, recipe.test_rows, recipe.test_corpus, [], seed)}
        train, test = train + test, []
    else:
        others = list(dict.fromkeys(pair.positive for pair in pairs))
        tests = {
            "held-out pairs": bounded(
                from_pairs(test, "held-out pairs"), recipe.test_rows, recipe.test_corpus, others, seed
            )
        }
    remarks.append(
        f"{len(pairs):,} pairs parted by groups that share a text, exactly or nearly: {len(train):,} to train on, "
        f"{len(dev):,} to choose on, {len(test):,} to judge on; no group is in two parts"
    )
    train, dev = _at_most(train, recipe.most_pairs, seed), _at_most(dev, recipe.test_rows, seed)
    profile = {
        **data_profile(recipe.data, counts, None),
        "pairs": len(pairs),
        "train_pairs": len(train),
        "dev_pairs": len(dev),
    }
    rows = [[_row(pair) for pair in side] for side in (train, dev)]
    _need(rows[0], rows[1], tests)
    return Parts(rows[0], rows[1], tests, True, profile, remarks, counts.sha256)


def _of_text(recipe: Run, columns: dict[str, str], note: Callable[[str], None]) -> Parts:
    counts, grouping, seed = Counts(), Counts(), recipe.loop.seed
    rows = read_texts(recipe.data, columns=columns, bad_rows=recipe.bad_rows, counts=counts)
    found, repeated = _distinct_documents(documents(rows, counts=grouping))
    remarks = rows_lost(counts)
    if repeated:
        remarks.append(f"{repeated:,} documents left out: they repeat an earlier one")
    note(f"{len(found):,} documents; looking for those that nearly repeat each other")
    part = assign_groups(text_groups([document.text for document in found]), SHARES, seed)
    sides = [[document for document, p in zip(found, part) if p == number] for number in range(3)]
    grown = Counts()
    train = list(pairs_of(sides[0], TRAIN, recipe.pairs, seed, counts=grown))
    dev, test = (
        {name: list(pairs_of(side, (name,), recipe.pairs, seed, counts=Counts())) for name in PROXIES}
        for side in sides[1:]
    )
    remarks.append(
        f"{len(found):,} documents parted whole, near-duplicates together: {len(sides[0]):,} to train on, "
        f"{len(sides[1]):,} to choose on, {len(sides[2]):,} to judge on"
    )
    refused = ", ".join(f"{n:,} x {reason}" for reason, n in grown.rejected.items())
    remarks.append(
        f"{len(train):,} training pairs by {' and '.join(TRAIN)}" + (f" (none: {refused})" if refused else "")
    )
    others = [document.text for side in (sides[2], sides[1], sides[0]) for document in side]
    chosen = [_row(pair) for pairs in dev.values() for pair in _at_most(pairs, recipe.test_rows, seed)]
    if recipe.queries is not None:
        tests = real_queries(recipe, others, remarks)
    else:
        usable = {name: pairs for name, pairs in test.items() if len({p.anchor for p in pairs}) >= FEWEST}
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
    examples = [{"anchor": p.anchor, "positive": p.positive, "generator": p.generator} for p in train[:2] + train[-2:]]
    text = [list(document.paragraphs) for document in sides[0]]
    return Parts(kept, chosen, tests, recipe.queries is not None, profile, remarks, counts.sha256, text, examples)


def _unlike(train: list[Any], dev: Sequence[str], tests: Mapping[str, RetrievalSet], remarks: list[str]) -> list[Any]:
    """The training pairs whose anchor is no dev or test query, exactly or nearly: documents may share sentences."""
    held = [*dev, *(query for test in tests.values() for query in test.queries.values())]
    shared = set(leaks(held, [pair.anchor for pair in train]).rows.tolist())
    if shared:
        remarks.append(f"{len(shared):,} training pairs left out: their anchor is nearly a query to choose or judge on")
    return [pair for number, pair in enumerate(train) if number not in shared]


def real_queries(recipe: Run, others: Sequence[str], remarks: list[str]) -> dict[str, RetrievalSet]:
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


def _distinct(pairs: Sequence[Pair]) -> tuple[list[Pair], int]:
    kept = list({(pair.anchor, pair.positive): pair for pair in reversed(pairs)}.values())[::-1]
    return kept, len(pairs) - len(kept)


def _distinct_documents(found: Iterable[Document]) -> tuple[list[Document], int]:
    kept: dict[int, Document] = {}
    count = 0
    for document in found:
        count += 1
        kept.setdefault(document.key, document)
    return list(kept.values()), count - len(kept)


def _at_most(items: list[Any], most: int, seed: int) -> list[Any]:
    """At most so many, drawn by key, in their own order."""
    if len(items) <= most:
        return items
    drawn = np.sort(np.argsort(keyed.key(seed, DRAW, np.arange(len(items))), kind="stable")[:most])
    return [items[number] for number in drawn]


def _row(pair: Any) -> dict[str, Any]:
    row = {"anchor": pair.anchor, "positive": pair.positive}
    if getattr(pair, "negatives", ()):
        row["negatives"] = list(pair.negatives)
    return {**row, "group": pair.group} if pair.group else row


def _as_set(pairs: Sequence[Any], name: str) -> RetrievalSet:
    return from_pairs((Pair(p.anchor, p.positive, (), name, n, p.group) for n, p in enumerate(pairs, 1)), name)
