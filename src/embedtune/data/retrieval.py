"""Retrieval data: queries, a corpus, and who judged what relevant to what; from a BEIR folder or from pairs.

What is wrong in a folder is collected over all its files and said once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedtune import keyed
from embedtune.data.kept import Texts
from embedtune.data.lines import SKIP, Problem, ending
from embedtune.data.read import BadRows, Counts, Row, read_rows
from embedtune.data.stored import Stored
from embedtune.errors import UserError, did_you_mean, short_list

if TYPE_CHECKING:
    from embedtune.data.pairs import Pair

QRELS = ("query-id", "corpus-id", "score")
PACKINGS = ("", ".gz", ".zst")
WHOLE = re.compile(r"[+-]?[0-9]{1,9}")
SHOWN = 3
HOLD, FILL = 1, 2  # what a key is for: which queries are kept, which texts fill the corpus
UNKNOWN_QUERY = "names a query that queries.jsonl does not have"
UNKNOWN_DOCUMENT = "names a document that corpus.jsonl does not have"
UNJUDGED = "has a query that no qrels file judges"
UNUSABLE = "has a query whose judgements were all left out"


@dataclass(frozen=True)
class RetrievalSet:
    """Queries and corpus by id, and relevance by query and document; every query has at least one judgement.

    Relevance above 0 is relevant, and larger is more so; a document without a judgement counts as not relevant.
    `remarks` say what was left out. Plain dicts will do; the corpus of a BEIR folder is a `Stored`, which is not in
    memory.
    """

    name: str
    queries: Mapping[str, str]
    corpus: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]
    remarks: list[str] = field(default_factory=list)


@dataclass
class _Wrong:
    """What is wrong, by file and kind: how often, and some places."""

    tally: Counts
    places: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    many: dict[tuple[str, str], int] = field(default_factory=dict)

    def add(self, file: Path, what: str, place: str) -> None:
        """Count it; the row was counted as used and is not any more."""
        key = (file.name if file.parent.name != "qrels" else f"qrels/{file.name}", what)
        self.many[key] = self.many.get(key, 0) + 1
        if len(places := self.places.setdefault(key, [])) <= SHOWN:
            places.append(place)
        self.tally.used -= 1
        self.tally.note(self.tally.rejected, Problem(what, what), f"{file}, {place}")

    def lines(self) -> list[str]:
        """One line for each kind."""
        return [f"{key[0]}: {key[1]} ({n:,} x): {short_list(self.places[key])}" for key, n in self.many.items()]


def is_beir(path: str | Path) -> bool:
    """Whether `path` is a folder with corpus.jsonl and queries.jsonl (also .gz or .zst)."""
    folder = Path(path)
    return os.path.isdir(folder) and all(_packed(folder / name) for name in ("corpus.jsonl", "queries.jsonl"))


def read_beir(
    folder: str | Path, split: str | None = None, *, bad_rows: BadRows = "fail", counts: Counts | None = None
) -> RetrievalSet:
    """Read corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv; without `split` there must be one qrels file.

    The text of a document is its title and text, joined by a space; the corpus is a `Stored`. Only the queries that
    the split judges are kept. Unknown ids, ids that come twice, empty texts, relevance that is no whole number, and
    queries that no qrels file judges are one UserError; with bad_rows="skip" they are left out and counted in
    `remarks`. Raises UserError, too, where the disk has no room for the corpus.
    """
    folder = Path(folder)
    tally = counts if counts is not None else Counts()
    wrong = _Wrong(tally)
    file, others = _qrels_file(folder, split)
    corpus = _read_texts(_only(folder, "corpus.jsonl"), bad_rows, wrong)
    queries = _read_texts(_only(folder, "queries.jsonl"), bad_rows, wrong)
    remarks: list[str] = []
    qrels, named = _read_qrels(file, queries, corpus, bad_rows, wrong, remarks)
    judged = set(named) if bad_rows == "fail" else set(qrels)
    if left := [query for query in queries if query not in judged]:
        elsewhere = {row.values["query-id"] for other in others for row in _qrels_rows(other, "skip", Counts())}
        for query in left:
            if query not in elsewhere:
                wrong.add(_only(folder, "queries.jsonl"), UNUSABLE if query in named else UNJUDGED, repr(query[:40]))
    if wrong.many and bad_rows == "fail":
        total = sum(wrong.many.values())
        what = f"problems in this retrieval data: {total:,}"
        raise UserError(what, where=str(folder), details=wrong.lines(), fix=SKIP)
    kept = {query: text for query, text in queries.items() if query in qrels}
    ordered = {query: qrels[query] for query in kept}
    remarks += [f"left out, {line}" for line in wrong.lines()]
    return RetrievalSet(f"{folder.resolve().name}/{_split_of(file)}", kept, corpus, ordered, remarks)


def from_pairs(pairs: Iterable[Pair], name: str) -> RetrievalSet:
    """Every distinct anchor is a query, every distinct positive and negative a document; positives are relevant.

    A text that is positive and negative for one anchor counts as positive, which is remarked. Raises UserError where
    there are no pairs.
    """
    queries: dict[str, str] = {}
    documents: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    refused: set[tuple[str, str]] = set()
    for pair in pairs:
        query = queries.setdefault(pair.anchor, f"q{len(queries)}")
        document = documents.setdefault(pair.positive, f"d{len(documents)}")
        qrels.setdefault(query, {})[document] = 1
        refused |= {(query, documents.setdefault(text, f"d{len(documents)}")) for text in pair.negatives}
    if not queries:
        raise UserError("there are no pairs to judge with", where=name, fix="give a file with at least one pair")
    both = sum(document in qrels[query] for query, document in refused)
    remarks = [f"texts that are positive and negative for one anchor, and count as positive: {both:,}"] if both else []
    texts = {key: text for text, key in queries.items()}
    return RetrievalSet(name, texts, {key: text for text, key in documents.items()}, qrels, remarks)


def dev_folder(dev: Any) -> tuple[str, str | None] | None:
    """BEIR folder and split of FOLDER or FOLDER:SPLIT; None for data of another kind.

    Training takes the judgements of `train`; where there is just one other split, scoring takes that.
    """
    path, _, split = str(dev).rpartition(":") if isinstance(dev, str | Path) else ("", "", "")
    if path and is_beir(path):
        return path, split
    if not isinstance(dev, str | Path) or not is_beir(dev):
        return None
    splits = {file.name.split(".")[0] for file in (Path(dev) / "qrels").glob("*.tsv*")} - {"train"}
    return str(dev), splits.pop() if len(splits) == 1 else None


def bounded(data: RetrievalSet, queries: int, corpus: int, others: Texts, seed: int) -> RetrievalSet:
    """At most `queries` of the queries, and `corpus` texts to search: the judged ones, the data's, then `others`.

    Those of one kind come in keyed order. The data's own come before `others` because hard negatives are among them:
    between random texts the right one is found too easily to tell one checkpoint from the next.
    """
    names = list(data.qrels)
    chosen = np.sort(np.argsort(keyed.key(seed, HOLD, np.arange(len(names))), kind="stable")[:queries])
    qrels = {names[i]: data.qrels[names[i]] for i in chosen}
    judged = dict.fromkeys(document for each in qrels.values() for document in each)
    have = {data.corpus[document] for document in judged}
    texts = {name: data.corpus[name] for name in judged}
    for name, text in _filling(data, judged, others, seed):
        if len(texts) >= corpus:
            break
        if text not in have:
            texts[name] = text
            have.add(text)
    note = f"scored on {len(qrels):,} queries, searching {len(texts):,} texts"
    if left := len(data.qrels) - len(qrels):
        note += f"; {left:,} left out"
    return RetrievalSet(data.name, {q: data.queries[q] for q in qrels}, texts, qrels, [*data.remarks, note])


def _filling(data: RetrievalSet, judged: Container[str], others: Texts, seed: int) -> Iterator[tuple[str, str]]:
    """Texts that nothing chosen is judged by: the data's own in keyed order, then `others`."""
    own = [name for name in data.corpus if name not in judged]
    for number in np.argsort(keyed.key(seed, FILL, np.arange(len(own))), kind="stable"):
        yield own[number], data.corpus[own[number]]
    for number in np.argsort(keyed.key(seed, FILL, np.arange(len(others))), kind="stable"):
        yield f"train-{number}", others[int(number)]


def part(data: RetrievalSet, rows: Iterable[int]) -> RetrievalSet:
    """The queries at these places, with the same corpus."""
    names = list(data.queries)
    kept = [names[row] for row in rows]
    queries = {name: data.queries[name] for name in kept}
    return RetrievalSet(data.name, queries, data.corpus, {name: data.qrels[name] for name in kept}, data.remarks)


def joined(first: RetrievalSet, second: RetrievalSet) -> RetrievalSet:
    """The queries of both, those of `first` first, over one corpus in which a text that both have stands once."""
    sides = (("old-", first), ("new-", second))
    places: dict[str, str] = {}
    for prefix, data in sides:
        for name, text in data.corpus.items():
            places.setdefault(text, prefix + name)
    queries = {prefix + name: text for prefix, data in sides for name, text in data.queries.items()}
    qrels: dict[str, dict[str, int]] = {}
    for prefix, data in sides:
        for name, judged in data.qrels.items():
            ascending = sorted(judged.items(), key=lambda item: item[1])  # of equal texts the more relevant counts
            qrels[prefix + name] = {places[data.corpus[document]]: relevance for document, relevance in ascending}
    remarks = [*first.remarks, *second.remarks]
    return RetrievalSet(second.name, queries, {name: text for text, name in places.items()}, qrels, remarks)


def _packed(path: Path) -> list[Path]:
    return [found for packing in PACKINGS if os.path.isfile(found := path.with_name(path.name + packing))]


def _only(folder: Path, name: str) -> Path:
    """The file of this name, packed or not."""
    found = _packed(folder / name)
    if len(found) > 1:
        raise UserError(f"has {name} more than once: {short_list([p.name for p in found])}", where=str(folder))
    if not found:
        fix = "a retrieval folder has corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv"
        raise UserError(f"has no {name}", where=str(folder), fix=fix)
    return found[0]


def _split_of(file: Path) -> str:
    return file.name[: -len("".join(ending(file)))]


def _qrels_file(folder: Path, split: str | None) -> tuple[Path, list[Path]]:
    """The qrels file of the split, and the others."""
    there = sorted((folder / "qrels").iterdir()) if (folder / "qrels").is_dir() else []
    there = [path for path in there if ending(path)[0] == ".tsv" and path.is_file()]
    names = [_split_of(path) for path in there]
    if not there:
        fix = f"add qrels/test.tsv, tab-separated, with the header {' '.join(QRELS)}"
        raise UserError("has no qrels/SPLIT.tsv, so nothing says what is relevant", where=str(folder), fix=fix)
    if split is None and len(there) > 1:
        raise UserError(
            f"has judgements for {', '.join(names)}, and none was chosen",
            where=str(folder),
            fix=f"name the split, for example {names[0]!r}",
        )
    wanted = names[0] if split is None else split
    if names.count(wanted) != 1:
        how_many = "more than one" if wanted in names else "no"
        near = "" if wanted in names else did_you_mean(wanted, names)
        what = f"has {how_many} qrels file for {wanted!r}{near}; there are {', '.join(path.name for path in there)}"
        raise UserError(what, where=str(folder), fix="name one of these splits")
    file = there[names.index(wanted)]
    return file, [path for path in there if path != file]


def _read_texts(file: Path, bad_rows: BadRows, wrong: _Wrong) -> Stored:
    """Texts by id, in the order of the file."""
    out = Stored()
    for row in read_rows(file, bad_rows=bad_rows, counts=wrong.tally):
        key, text = _id(row.values), _text(row.values)
        place = f"line {row.number:,}"
        if key is None:
            wrong.add(file, "has no '_id' that is a text or a whole number", place)
        elif key in out:
            wrong.add(file, "has an id that came before", f"{place} ({key[:40]!r})")
        elif text is None:
            wrong.add(file, "has something other than a text as 'text' or 'title'", place)
        elif not text:
            wrong.add(file, "has no text", f"{place} ({key[:40]!r})")
            # Known all the same, so that its judgements are not a second complaint where all is refused anyway.
            if bad_rows == "fail":
                out.add(key, text)
        else:
            out.add(key, text)
    return out


def _id(values: dict[str, Any]) -> str | None:
    value = values.get("_id", values.get("id"))
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value else None


def _text(values: dict[str, Any]) -> str | None:
    parts = [values.get("title") or "", values.get("text") or ""]
    if not all(isinstance(part, str) for part in parts):
        return None
    return " ".join(parts).strip()


def _qrels_rows(file: Path, bad_rows: BadRows, tally: Counts) -> Iterator[Row]:
    header = False
    for row in read_rows(file, bad_rows=bad_rows, counts=tally):
        if not header and any(name not in row.values for name in QRELS):
            found = short_list([repr(name[:40]) for name in row.values], most=6)
            fix = "begin the file with that line, cells parted by tabs"
            raise UserError(f"expected the header {' '.join(QRELS)}, found {found}", where=str(file), fix=fix)
        header = True
        yield row


def _read_qrels(
    file: Path,
    queries: Mapping[str, str],
    corpus: Mapping[str, str],
    bad_rows: BadRows,
    wrong: _Wrong,
    remarks: list[str],
) -> tuple[dict[str, dict[str, int]], set[str]]:
    """Relevance by query and document, and all query ids that the file names."""
    qrels: dict[str, dict[str, int]] = {}
    named: set[str] = set()
    again = 0
    for row in _qrels_rows(file, bad_rows, wrong.tally):
        query, document, score = (row.values[name] for name in QRELS)
        named.add(query)
        place = f"row {row.number:,}"
        if query not in queries:
            wrong.add(file, UNKNOWN_QUERY, f"{place} ({query[:40]!r})")
        elif document not in corpus:
            wrong.add(file, UNKNOWN_DOCUMENT, f"{place} ({document[:40]!r})")
        elif not WHOLE.fullmatch(score):
            wrong.add(file, "has a relevance that is no whole number", f"{place} ({score[:40]!r})")
        elif document not in (judged := qrels.setdefault(query, {})):
            judged[document] = int(score)
        elif judged[document] == int(score):
            again += 1
        else:
            wrong.add(file, "judges a document again, differently", f"{place} ({judged[document]}, then {score})")
    if again:
        remarks.append(f"qrels/{file.name}: judgements that repeat another: {again:,}")
    return qrels, named
