"""Hard negatives: texts that a model finds near an anchor though they are not its positives.

Exact, and in blocks: the corpus and its vectors lie on disk, and a matrix of all anchors by all texts never exists.
In memory stand the pairs, and 16 bytes for each text.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedtune import files, keyed, nearest
from embedtune.data.clean import text_hash
from embedtune.data.pairs import Pair
from embedtune.enrich.candidates import Candidates, Vectors
from embedtune.enrich.write import write_rows
from embedtune.errors import UserError

if TYPE_CHECKING:
    from embedtune.encoder.encode import Encoder, Role

Note = Callable[[str], None]

ENCODED = 8192  # texts encoded between two writes
ANCHORS = 16_384  # searched for in one pass over the corpus, at most
ANSWERS = 1 << 23  # neighbours held at once
KNOWN, ABOVE, SECOND = "known positive or the same text", "above the margin", "above the second model's margin"


@dataclass(frozen=True, kw_only=True)
class Mining:
    """Which of an anchor's neighbours become its negatives.

    Rows with fewer negatives than asked are kept (`allow_fewer`): they belong to the anchors whose positive the model
    ranks low, so that the margin refuses all that is near; those are the pairs that teach most, with or without
    negatives of their own.
    """

    negatives: int = 5  # for each anchor
    skip: int = 0  # the nearest so many are passed over, known positives not counted
    depth: int = 100  # and none is taken from beyond this rank
    pool: int | None = None  # drawn from the so many hardest that are not refused; None takes the hardest themselves
    seed: int = 0  # of the draw
    margin: float | None = 0.95  # refused above this share of the positive's score: likely an unlabelled positive
    absolute: float | None = None  # refused above the positive's score less this
    other_groups: bool = False  # never from the positives of pairs of the anchor's own group (of one document, say)
    allow_fewer: bool = True  # keep rows with fewer negatives than asked, else leave them out


DEFAULT = Mining()


@dataclass(eq=False)
class Mined:
    """Pairs with their mined negatives, and how many candidates and rows fell to what."""

    pairs: list[Pair]
    candidates: int  # distinct texts: the corpus, then positives and negatives that were not in it
    anchor_of: np.ndarray  # (pairs,) int64: which distinct anchor a pair has
    chosen: np.ndarray  # (anchors, negatives) int64: numbers of candidates, hardest first; valid up to `found`
    scores: np.ndarray  # (anchors, negatives) float32: cosine with the anchor
    found: np.ndarray  # (anchors,) int64
    allow_fewer: bool
    texts: dict[int, str] = field(default_factory=dict)  # of the candidates that were chosen, by number
    refused: dict[str, int] = field(default_factory=lambda: {KNOWN: 0, ABOVE: 0, SECOND: 0})  # before the last taken
    blank: int = 0  # texts of the corpus that are blank and were left out

    @property
    def fewer(self) -> int:
        """Rows with fewer negatives than asked; left out unless `allow_fewer`."""
        return int((self.found < self.chosen.shape[1])[self.anchor_of].sum())

    @property
    def without(self) -> int:
        """Rows without any negative."""
        return int((self.found == 0)[self.anchor_of].sum())

    def rows(self) -> Iterator[dict[str, Any]]:
        """{anchor, positive, negative_1, ..., negative_n, group}; a negative that was not found is None."""
        most = self.chosen.shape[1]
        for pair, anchor in zip(self.pairs, self.anchor_of):
            count = int(self.found[anchor])
            if count < most and not self.allow_fewer:
                continue
            row: dict[str, Any] = {"anchor": pair.anchor, "positive": pair.positive}
            for n in range(most):
                row[f"negative_{n + 1}"] = self.texts[int(self.chosen[anchor, n])] if n < count else None
            if pair.group is not None:
                row["group"] = pair.group
            yield row


def mine(
    pairs: Iterable[Pair],
    corpus: Mapping[str, str] | Iterable[str] | None,
    encoder: Encoder,
    how: Mining = DEFAULT,
    *,
    second: Encoder | None = None,
    scratch: Path | None = None,
    note: Note = lambda text: None,
) -> Mined:
    """Find hard negatives for each anchor among the corpus and all positives (without a corpus: among those).

    The score is the cosine of a query's and a document's vector. A candidate is refused above
    s - (1 - margin) |s| (which is margin x s where s > 0, and below s also where it is not) and above s - absolute,
    where s is the smallest score of the anchor's positives (2407.15831); with `second`, also where that model's
    scores say so. All positives of an anchor are known, and what differs from them, or from the anchor, only in case
    and whitespace is the same text. Texts and vectors lie in `scratch` (default: the system's place for temporary
    files) while it runs. Raises UserError for settings that cannot be, no pairs, or no disk space.
    """
    _check(how)
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        folder = Path(place)
        work = _gather(list(pairs), corpus, how, folder)
        models = [(encoder, _on_disk(folder / "first", work.texts, encoder, note))]
        if second is not None:
            models.append((second, _on_disk(folder / "second", work.texts, second, note)))
        done = 0
        for block in _blocks([len(each) for each in work.excluded], how.depth):
            _mine_block(block, work, models, how)
            done += len(block)
            note(f"mined {done:,} of {len(work.anchors):,} anchors")
        work.keep_chosen()
    return work.mined


def write_mined(path: Path, mined: Mined) -> int:
    """Write the rows as .jsonl and return how many. Raises UserError where there are none, or no space."""
    return write_rows(path, mined.rows())


@dataclass(eq=False)
class _Work:
    """The distinct anchors, what each must not get, and what comes out."""

    anchors: list[str]
    texts: Candidates
    positives: list[np.ndarray]  # for each anchor: its positives, as indices of texts
    excluded: list[np.ndarray]  # for each anchor: what is no negative for it
    mined: Mined

    def keep_chosen(self) -> None:
        """Read the texts that were chosen, before the files go."""
        mined = self.mined
        valid = np.arange(mined.chosen.shape[1]) < mined.found[:, None]
        chosen = np.unique(mined.chosen[valid])
        mined.texts.update(zip(chosen.tolist(), self.texts.texts(chosen)))


def _check(how: Mining) -> None:
    problems = []
    if how.negatives < 1:
        problems.append(f"--negatives: must be 1 or more, not {how.negatives}")
    if how.pool is not None and how.pool < how.negatives:
        problems.append(
            f"--pool: must be at least the {how.negatives} negatives that are drawn from it, not {how.pool}"
        )
    if how.skip < 0:
        problems.append(f"--skip: must be 0 or more, not {how.skip}")
    if how.depth < how.skip + how.negatives:
        problems.append(f"--depth: must be at least skip + negatives = {how.skip + how.negatives}, not {how.depth}")
    if how.margin is not None and not 0 < how.margin <= 1:
        problems.append(f"--margin: must be above 0 and at most 1, not {how.margin}")
    if how.absolute is not None and not 0 <= how.absolute <= 2:
        problems.append(f"--absolute: must be 0 to 2, not {how.absolute}")
    if problems:
        raise UserError("negatives cannot be mined with these settings", details=problems)


def _gather(pairs: list[Pair], corpus: Mapping[str, str] | Iterable[str] | None, how: Mining, folder: Path) -> _Work:
    """Number the distinct texts and anchors, and collect what is no negative for whom."""
    if not pairs:
        raise UserError("there are no pairs to mine negatives for")
    blank = 0

    def everything() -> Iterator[str]:
        nonlocal blank
        for text in corpus.values() if isinstance(corpus, Mapping) else corpus or ():
            if text.strip():
                yield text
            else:
                blank += 1
        for pair in pairs:
            yield pair.positive
            yield from pair.negatives

    texts = Candidates.gather(everything(), folder)
    seen: dict[int, int] = {}
    anchors: list[str] = []
    positives: list[set[int]] = []
    groups: list[set[str]] = []
    members: dict[str, set[int]] = {}
    anchor_of = np.zeros(len(pairs), np.int64)
    for i, pair in enumerate(pairs):
        at = anchor_of[i] = seen.setdefault(text_hash(pair.anchor), len(anchors))
        if at == len(anchors):
            anchors.append(pair.anchor)
            positives.append(set())
            groups.append(set())
        positive = texts.number(text_hash(pair.positive))
        assert positive is not None
        positives[at].add(positive)
        if pair.group is not None and how.other_groups:
            groups[at].add(pair.group)
            members.setdefault(pair.group, set()).add(positive)
    excluded = []
    for key, own, its_groups in zip(seen, positives, groups):
        itself = texts.number(key)  # an anchor that stands among the texts is no negative for itself
        others = (members[group] for group in its_groups)
        excluded.append(own.union(*others, () if itself is None else (itself,)))
    shape = (len(anchors), how.negatives)
    empty = np.zeros(shape, np.int64), np.zeros(shape, np.float32), np.zeros(len(anchors), np.int64)
    mined = Mined(pairs, len(texts), anchor_of, *empty, allow_fewer=how.allow_fewer, blank=blank)
    return _Work(
        anchors, texts, [np.array(sorted(p)) for p in positives], [np.array(sorted(e)) for e in excluded], mined
    )


def _on_disk(path: Path, texts: Candidates, encoder: Encoder, note: Note) -> Vectors:
    """The unit vectors of all texts, (N, D) float32 in a file."""
    files.need_space(path.parent, len(texts) * encoder.dimension * 4, "mining")
    with files.growing(path) as vectors:
        for start in range(0, len(texts), ENCODED):
            stop = min(start + ENCODED, len(texts))
            some = texts.texts(np.arange(start, stop))
            vectors.write(_unit(encoder, some, "document").tobytes())
            note(f"{encoder.name}: encoded {stop:,} of {len(texts):,} texts")
    return Vectors(path, (len(texts), encoder.dimension))


def _unit(encoder: Encoder, texts: Sequence[str], role: Role) -> np.ndarray:
    vectors = np.ascontiguousarray(nearest.Unit(encoder.encode(texts, role))[:], np.float32)
    if not np.isfinite(vectors).all():
        raise UserError("gives vectors that are not finite", where=encoder.name, fix="the model is damaged")
    return vectors


def _blocks(excluded: Sequence[int], depth: int) -> Iterator[np.ndarray]:
    """Anchors in blocks whose answers fit into memory: those with few exclusions first, as they need few neighbours."""
    order = np.argsort(excluded, kind="stable")
    start = 0
    while start < len(order):
        size = min(ANCHORS, len(order) - start)
        while size > 1 and size * (depth + excluded[order[start + size - 1]]) > ANSWERS:
            size //= 2
        yield order[start : start + size]
        start += size


def _mine_block(block: np.ndarray, work: _Work, models: list[tuple[Encoder, Vectors]], how: Mining) -> None:
    """Choose the negatives of some anchors."""
    positives, excluded = ([each[at] for at in block] for each in (work.positives, work.excluded))
    vectors = [_unit(encoder, [work.anchors[at] for at in block], "query") for encoder, _ in models]
    limits = [_limits(own, corpus, positives, how) for own, (_, corpus) in zip(vectors, models)]
    most = how.depth + max(map(len, excluded))
    scores, index = nearest.top_k(vectors[0], models[0][1], most)
    mined = work.mined
    for row, at in enumerate(block):
        known = np.isin(index[row], excluded[row])
        rank = np.cumsum(~known)  # from 1, among those that are not known
        candidate = ~known & (rank > how.skip) & (rank <= how.depth)
        above = candidate & (scores[row] > limits[0][row])
        good = candidate & ~above
        doubted = np.zeros_like(good)
        if len(models) > 1:
            doubted[good] = _scores(vectors[1][row], models[1][1][index[row][good]]) > limits[1][row]
            good &= ~doubted
        taken = _drawn(np.flatnonzero(good), text_hash(work.anchors[at]), how)
        mined.chosen[at, : len(taken)] = index[row][taken]
        mined.scores[at, : len(taken)] = scores[row][taken]
        mined.found[at] = len(taken)
        # Counted are those that were in the way: up to the last one taken, or all where they did not suffice.
        end = taken[-1] if len(taken) == how.negatives else len(good)
        for reason, which in ((KNOWN, known & (rank < how.depth)), (ABOVE, above), (SECOND, doubted)):
            mined.refused[reason] += int(which[:end].sum())


def _drawn(good: np.ndarray, anchor: int, how: Mining) -> np.ndarray:
    """The negatives among the good candidates (hardest first): the first ones, or a draw from the first `pool`."""
    if how.pool is None:
        return good[: how.negatives]
    pool = good[: max(how.pool, how.negatives)]
    return np.sort(pool[np.argsort(keyed.key(how.seed, anchor, np.arange(len(pool))), kind="stable")[: how.negatives]])


def _scores(anchor: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Inner products in float64, rounded as `nearest` rounds them, so that equal texts have equal scores."""
    return (vectors.astype(np.float64) @ anchor.astype(np.float64)).astype(np.float32)


def _limits(anchors: np.ndarray, corpus: Vectors, positives: list[np.ndarray], how: Mining) -> np.ndarray:
    """The score above which a candidate is refused, for each anchor: (B,) float64."""
    lowest = np.array([_scores(a, corpus[p]).min() for a, p in zip(anchors, positives)], np.float64)
    limits = np.full(len(anchors), np.inf)
    if how.margin is not None:
        # Not margin x s, which lies above s where s is negative.
        limits = lowest - (1 - how.margin) * np.abs(lowest)
    if how.absolute is not None:
        limits = np.minimum(limits, lowest - how.absolute)
    return limits
