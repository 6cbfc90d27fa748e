"""Parts that share no text: rows that repeat each other, exactly or nearly, are a group, and groups stay whole.

`split` writes the parts of a file; `text_groups`, `pair_groups` and `assign_groups` do the same for rows in memory, and
`leaks` says what stands on both sides of a division that somebody else made.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from embedtune import files, keyed
from embedtune.data.clean import text_hash
from embedtune.data.divided import Divided, Overlap, Plan
from embedtune.data.lines import ending
from embedtune.data.near import components, repeated
from embedtune.data.pairs import Pair, ScoredPair
from embedtune.data.read import EXAMPLES, BadRows, Counts, DataLike, Row, place, place_of
from embedtune.data.shingles import Sets, Shingler, sets_of
from embedtune.data.sides import Source, outside, same_again
from embedtune.data.tidy import WRITTEN, Writer
from embedtune.errors import UserError, did_you_mean, short_list

NEAR = 0.8
CHARACTERS = 2_000_000  # of texts that are compared at once
MADE_BY = "data split"


def assign_groups(groups: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """(n,) int64: for each row its part, 0 to len(shares) - 1; `groups` (n,) are ids, and a group is never cut.

    Large groups choose first, each by keyed noise among the parts that still have room for it, in proportion to that
    room; one that fits nowhere goes where most room is. Rows that stand alone fill up what is left, so that with
    enough of them the sizes are right to a row. No part stays empty where there are groups enough.
    """
    _, first, inverse, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    number = np.argsort(np.argsort(first))  # groups by first appearance, whatever their ids are
    noise, choice = (keyed.uniform(keyed.key(seed, kind, number)) for kind in range(2))
    left = _whole(np.array(shares, float), len(groups)).astype(np.int64)
    part = np.zeros(len(sizes), np.int64)
    alone = sizes == 1
    large = np.flatnonzero(~alone)
    for group in large[np.lexsort((noise[large], -sizes[large]))].tolist():
        room = np.where(left >= sizes[group], left, 0)
        if room.sum():
            part[group] = np.searchsorted(np.cumsum(room), choice[group] * room.sum(), "right")
        else:
            part[group] = np.argmax(left)
        left[part[group]] -= sizes[group]
    single = np.flatnonzero(alone)
    if len(single):
        part[single[np.argsort(noise[single], kind="stable")]] = np.repeat(
            np.arange(len(shares)), _whole(np.maximum(left, 0).astype(float), len(single))
        )
    _fill_empty(part, sizes, noise, len(shares))
    return part[inverse]


def _whole(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers with sum `total`, in proportion to `shares`: the largest remainders are rounded up."""
    exact = shares / shares.sum() * total
    down = np.floor(exact).astype(np.int64)
    down[np.argsort(down - exact, kind="stable")[: total - int(down.sum())]] += 1
    return down


def _fill_empty(part: np.ndarray, sizes: np.ndarray, noise: np.ndarray, parts: int) -> None:
    """Give each empty part the smallest group of the part that has most groups."""
    for empty in range(parts):
        many = np.bincount(part, minlength=parts)
        if many[empty] == 0 and many.max() > 1:
            there = np.flatnonzero(part == np.argmax(many))
            part[there[np.lexsort((noise[there], sizes[there]))[0]]] = empty


def text_groups(texts: Iterable[str], near: float | None = NEAR) -> np.ndarray:
    """(n,) int64 group ids from 0: texts that repeat each other, exactly or nearly, have the same one."""
    return _numbered(components(sets_of([text] for text in texts), near))


def pair_groups(pairs: Iterable[Pair | ScoredPair], near: float | None = NEAR) -> np.ndarray:
    """(n,) int64 group ids from 0: pairs that share a text on whichever side, exactly or nearly, or a `group`.

    Sharing is passed on: if A shares a text with B and B one with C, all three are one group. Negatives do not count,
    for all pairs may take theirs from one corpus.
    """
    shingler, owner = Shingler(), array("q")
    named: dict[str, int] = {}
    edges: list[tuple[int, int]] = []
    number = -1
    for number, pair in enumerate(pairs):
        sides = (pair.anchor, pair.positive) if isinstance(pair, Pair) else (pair.sentence1, pair.sentence2)
        for side in sides:
            shingler.add([side])
            owner.append(number)
        if isinstance(pair, Pair) and pair.group is not None:
            edges.append((named.setdefault(pair.group, number), number))
    return _row_groups(shingler.done(), np.array(owner, np.int64), number + 1, near, edges)


def _row_groups(
    sets: Sets, owner: np.ndarray, rows: int, near: float | None, edges: Iterable[tuple[int, int]] = ()
) -> np.ndarray:
    """(rows,) group ids: rows joined by texts (`owner` has the row of each) that repeat each other, and by `edges`."""
    label = components(sets, near)
    one = np.zeros(len(sets), np.int64)  # of the rows with each kind of text; any of them will do
    one[label] = owner
    more = np.array(list(edges), np.int64).reshape(-1, 2)
    return joined(np.arange(rows), np.concatenate([np.stack([owner, one[label]], axis=1), more]))


def joined(groups: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """(rows,) group ids after rows that `edges` (n, 2) name have become one group."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    a, b = groups[edges].T
    graph = coo_matrix((np.ones(len(a), bool), (a, b)), shape=(len(groups), len(groups)))
    return _numbered(connected_components(graph, directed=False)[1][groups])


def _numbered(labels: np.ndarray) -> np.ndarray:
    """The same division with ids 0, 1, ... in the order of first appearance."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int64)


@dataclass(frozen=True)
class Leaks:
    """Texts of the dev side that also stand on the training side: so many exactly, so many others nearly.

    `rows` are their numbers in dev and `where` the numbers in train, both from 0; `examples` are three in words.
    """

    exact: int
    near: int
    rows: np.ndarray
    where: np.ndarray
    examples: list[str]


def leaks(train_texts: Iterable[str], dev_texts: Iterable[str], near: float | None = NEAR) -> Leaks:
    """Which texts of dev stand in train too, exactly (but for case and whitespace) or by `near` of their shingles.

    Streams train; memory is bounded by dev. Every pair that is near enough is found.
    """
    found = repeated(sets_of([text] for text in dev_texts), _blocks(train_texts), near)
    rows = np.flatnonzero(found.exact | found.near)
    examples = [
        f"text {row + 1:,} of dev {'is' if found.exact[row] else 'is nearly'} text {found.where[row] + 1:,} of train"
        for row in rows[:EXAMPLES].tolist()
    ]
    return Leaks(int(found.exact.sum()), int(found.near.sum()), rows, found.where[rows], examples)


def _blocks(texts: Iterable[str]) -> Iterator[Sets]:
    some: list[list[str]] = []
    size = 0
    for text in texts:
        some.append([text])
        size += len(text)
        if size > CHARACTERS:
            yield sets_of(some, disk=False)
            some, size = [], 0
    yield sets_of(some, disk=False)


@dataclass
class _Table:
    """All that is kept of the rows between the two readings: shingles on disk, and a few numbers for each."""

    sets: Sets  # of all texts
    owner: np.ndarray  # (texts,) the row of each
    keys: np.ndarray  # (rows,) uint64: the document, or the hash of the column that the rows are grouped by
    names: list[str]  # of files
    files: array[int]  # which of these a row is of
    numbers: array[int]  # and its number there
    alone: int  # rows without a value in that column

    def place(self, row: int) -> str:
        return place_of(self.names[self.files[row]], self.numbers[row])

    def texts(self, rows: np.ndarray) -> np.ndarray:
        """The numbers of the texts of the rows that `rows` (bool) selects."""
        return np.flatnonzero(rows[self.owner])


def split(
    data: DataLike,
    out_folder: str | Path,
    plan: Plan | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    bad_rows: BadRows = "fail",
    allow_leaks: bool = False,
    force: bool = False,
) -> Divided:
    """Write the parts of `data` into a new folder, train.jsonl and so on, in the format of the data (not parquet).

    Rows that the plan groups stay together. Then the parts are compared, all texts of one with all of another; a text
    that stands in two parts, exactly or nearly, is a UserError unless `allow_leaks`. By cluster there is none. The
    folder appears whole or not at all, with a manifest of sha256 sums.
    """
    plan, folder = plan or Plan(), Path(out_folder)
    plan.check()
    _check_folder(data, folder, force)
    source, counts = Source(data, columns or {}, bad_rows), Counts()
    table = _read(source, counts, plan.by, folder)
    notes = list(counts.notes) + _about(table, plan)
    groups, part, overlaps = _divide(table, plan)
    if any(each.exact or each.near for each in overlaps) and not allow_leaks:
        raise UserError(
            f"{sum(each.exact + each.near for each in overlaps):,} rows repeat a text of another part",
            where=f"{_name(data)}, by {plan.by}",
            details=[line for each in overlaps if each.exact or each.near for line in each.lines()],
            fix="--by cluster keeps repeats together; --allow-leaks goes on all the same",
        )
    form = _form(counts)
    about = {"made_by": MADE_BY, "by": plan.by, "near": plan.near, "seed": plan.seed, "shares": dict(plan.parts)}
    files.write_directory(folder, lambda place: _write(place, source, counts, part, list(plan.parts), form), about)
    sizes = np.bincount(groups)
    for name, share in plan.parts.items():
        if sizes.max() > share * len(groups):
            notes.append(f"the largest group, {sizes.max():,} rows, is more than the share of {name} ({share:.0%})")
    return Divided(
        folder=str(folder),
        by=plan.by,
        near=plan.near,
        seed=plan.seed,
        rows=counts.rows,
        used=counts.used,
        groups=len(sizes),
        largest=int(sizes.max()),
        parts={name: _part(groups[part == n], folder / f"{name}{form}") for n, name in enumerate(plan.parts)},
        overlaps=overlaps,
        dropped=counts.rejected,
        replaced=counts.replaced,
        examples={reason: counts.examples[reason] for reason in (*counts.rejected, *counts.replaced)},
        compared=source.names,
        notes=notes,
    )


def _part(groups: np.ndarray, file: Path) -> dict[str, Any]:
    return {"rows": len(groups), "groups": len(np.unique(groups)), "file": str(file)}


def _name(data: DataLike) -> str:
    return str(data) if isinstance(data, (str, Path)) else "the list"


def _form(counts: Counts) -> str:
    form = ending(Path(counts.files[0]))[0] if counts.files else ""
    return form if form in WRITTEN else ".jsonl"


def _check_folder(data: DataLike, folder: Path, force: bool) -> None:
    """Refuse a place where something is that we did not make, or that is the data itself."""
    outside(data, folder)
    if not folder.exists():
        return
    if not force:
        raise UserError("exists already", where=str(folder), fix="name another folder, or --force")
    manifest = folder / files.MANIFEST
    made = files.read_json(manifest) if manifest.is_file() else {}
    if not isinstance(made, dict) or made.get("made_by") != MADE_BY:
        what = f"was not made by `embedtune {MADE_BY}`, so it is not replaced"
        raise UserError(what, where=str(folder), fix="name another folder, or remove this one yourself")
    if isinstance(data, (str, Path)) and folder.resolve() in Path(data).resolve().parents:
        raise UserError("holds the data itself", where=str(folder), fix="name another folder")


def _read(source: Source, counts: Counts, by: str, folder: Path) -> _Table:
    shingler = Shingler(next(place for place in folder.absolute().parents if place.is_dir()))
    owner, keys, file, number = array("q"), array("Q"), array("I"), array("q")
    names: dict[str, int] = {}
    alone = 0
    for place_in, judged in enumerate(source.rows(counts)):
        row = judged.row
        for side in judged.sides:
            for text in side:
                shingler.add([text])
                owner.append(place_in)
        file.append(names.setdefault(row.file, len(names)))
        number.append(row.number)
        key = row.document
        if by not in ("cluster", "document"):
            value = _value(row, by)
            alone += value is None
            # Rows without a value are groups of their own; the even numbers are theirs.
            key = 2 * place_in if value is None else value | 1
        keys.append(key)
    array_of = np.array(owner, np.int64)
    return _Table(shingler.done(), array_of, np.array(keys, np.uint64), list(names), file, number, alone)


def _value(row: Row, by: str) -> int | None:
    """A hash of the row's cell in the column `by`, None where it is empty."""
    if by not in row.values:
        found = short_list([repr(name[:40]) for name in row.values], most=20)
        what = f"has no column {by!r}{did_you_mean(by, [*row.values, 'cluster', 'document'])}, found {found}"
        raise UserError(what, where=place(row), fix="--by cluster, --by document, or --by NAME of a column")
    value = row.values[by]
    return None if value is None or not str(value).strip() else text_hash(str(value))


def _about(table: _Table, plan: Plan) -> list[str]:
    """What the user should know of the grouping."""
    notes = []
    if table.alone:
        notes.append(f"{table.alone:,} rows without a value in {plan.by!r} are groups of their own")
    if plan.by == "document" and len(np.unique(table.keys)) == len(table.keys):
        notes.append("each row is a document of its own here")
    return notes


def _divide(table: _Table, plan: Plan) -> tuple[np.ndarray, np.ndarray, list[Overlap]]:
    """(rows,) group ids and (rows,) parts, and what the parts have in common."""
    shares, rows = list(plan.parts.values()), len(table.keys)
    if plan.by == "cluster":
        groups = _row_groups(table.sets, table.owner, rows, plan.near)
    else:
        groups = _numbered(table.keys)
    while True:
        if groups.max() + 1 < len(shares):
            what = f"hangs together: {groups.max() + 1:,} group(s) for {len(shares)} parts"
            raise UserError(what, where=f"by {plan.by}", fix="give more varied data, or fewer --parts")
        part = assign_groups(groups, shares, plan.seed)
        overlaps, edges = _compare(table, part, list(plan.parts), plan.near)
        if plan.by != "cluster" or not len(edges):
            return groups, part, overlaps
        # Only where CROWD was reached: what the comparison found is one group after all.
        groups = joined(groups, edges)


def _compare(table: _Table, part: np.ndarray, names: list[str], near: float | None) -> tuple[list[Overlap], np.ndarray]:
    """The overlaps of all parts, and (n, 2) the rows of which they consist."""
    overlaps, edges = [], [np.zeros((0, 2), np.int64)]
    for a, b in combinations(range(len(names)), 2):
        there, here = table.texts(part == a), table.texts(part == b)
        others = (table.sets.part(block) for block in table.sets.blocks(there))
        found = repeated(table.sets.part(here), others, near)
        hits = np.flatnonzero(found.exact | found.near)
        # Exact ones first, so that a row with several texts counts as what is worst in it.
        hits = hits[np.argsort(~found.exact[hits], kind="stable")]
        mine, first = np.unique(table.owner[here[hits]], return_index=True)
        theirs = table.owner[there[found.where[hits[first]]]]
        exact = int(found.exact[hits[first]].sum())
        examples = [f"{table.place(i)} = {table.place(j)}" for i, j in zip(mine[:EXAMPLES].tolist(), theirs.tolist())]
        rows = int((part == b).sum())
        overlaps.append(Overlap(names[b], names[a], rows, exact, len(mine) - exact, examples))
        edges.append(np.stack([mine, theirs], axis=1))
    return overlaps, np.concatenate(edges)


def _write(folder: Path, source: Source, counts: Counts, part: np.ndarray, names: list[str], form: str) -> None:
    """Read the data again and write each row to its part."""
    again = Counts()
    with ExitStack() as stack:
        opened = [stack.enter_context(files.growing(folder / f"{name}{form}")) for name in names]
        writers = [Writer(form, list(source.others), file) for file in opened]
        for number, judged in enumerate(source.rows(again)):
            if number < len(part):
                writers[part[number]].add(judged)
        same_again(source.data, counts, again)
