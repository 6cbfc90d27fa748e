"""From a recipe to an objective: pairs read, split, tokenised, and the loss with all that is no negative masked."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from embedtune import keyed, recipes
from embedtune.data.columns import parse_columns
from embedtune.data.divide import leaks, pair_groups
from embedtune.data.pairs import Pair, read_pairs
from embedtune.data.read import Counts
from embedtune.data.retrieval import RetrievalSet, bounded, dev_folder, from_pairs, joined, part, read_beir
from embedtune.encoder import load
from embedtune.encoder.device import pick_device
from embedtune.encoder.embedder import Trainable, load_trainable
from embedtune.encoder.load import DEFAULT
from embedtune.errors import UserError
from embedtune.fit import past, ranking
from embedtune.fit.batches import DistinctOrder
from embedtune.fit.dropout import KeyedNoise, key_dropout
from embedtune.fit.objectives.embedding import NONE, EmbeddingObjective
from embedtune.fit.objectives.texts import ANCHOR, DOCUMENT, Texts, row_length, set_prompts, tokens_of
from embedtune.fit.order import batch_rows
from embedtune.fit.past import Known, Sides
from embedtune.fit.prepared import Prepared, data_profile, identity, name_of, rows_lost, token_profile
from embedtune.nearest import unit
from embedtune.recipes import Contrastive

RATE = 2e-5  # peak learning rate, as most published recipes for models of these sizes
MEASURES = ["nDCG@10", "MRR@10", "recall@10", "accuracy@1"]  # of the dev data, beside the loss
SCALES = {"cosine": 20.0, "dot": 1.0}
HOLD = 1  # what a key is for: which groups are held out
FEWEST = 8
KNOWN = Known(
    key=lambda pair: f"{pair.anchor}\n{pair.positive}",
    held=lambda pair: pair.anchor,
    texts=lambda data: list(data.queries.values()),
    part=part,
    join=joined,
)


@dataclass(frozen=True)
class Dev:
    """What a contrastive run is scored on, and where its texts stand among the token rows."""

    data: RetrievalSet
    queries: np.ndarray  # (q,) token rows, in the order of data.queries
    corpus: np.ndarray  # (c,) token rows, in the order of data.corpus
    similarity: str


def prepare_contrastive(recipe: Contrastive, home: Path, note: Callable[[str], None]) -> Prepared:
    """Everything before the first step; `home` receives the tokenised texts."""
    folder = load.find(recipe.model or DEFAULT)
    opened = load_trainable(folder)
    note(f"reading {name_of(recipe.train)}")
    sides = past.sides(recipe, _own_sides, KNOWN)
    pairs, data, remarks = sides.train, _searched(sides, recipe), sides.remarks
    prompts = set_prompts(opened.model, recipe.query_prompt, recipe.document_prompt)
    texts, rows = Texts(), [[pair.anchor, pair.positive, *pair.negatives] for pair in pairs]
    cells = [[texts.number(ANCHOR if c == 0 else DOCUMENT, text) for c, text in enumerate(row)] for row in rows]
    table = np.full((len(cells), max(map(len, cells))), NONE)
    for number, row in enumerate(cells):
        table[number, : len(row)] = row
    queries = np.array([texts.number(ANCHOR, text) for text in data.queries.values()])
    corpus = np.array([texts.number(DOCUMENT, text) for text in data.corpus.values()])
    max_length = row_length(opened, folder, recipe.max_length)
    longer, tokens = tokens_of(texts, opened.model.tokenizer, prompts, (max_length, recipe.train_length), home, remarks)
    chosen = _resolve_ranking(recipe.ranking, opened)
    guide = _guide_vectors(chosen, recipe, texts, note)
    opened.model.to(pick_device())
    plain = _loss(chosen, opened, table, guide, texts.same(ANCHOR, DOCUMENT), remarks)
    loss = ranking.with_length_penalty(plain, table, tokens, chosen.length_penalty)
    order = _order(table, chosen, tokens.lengths(), recipe.loop, remarks)
    noise = KeyedNoise(recipe.loop.seed)
    key_dropout(opened.model, noise)
    measures = ["dev_loss", *(f"dev_{name}" for name in MEASURES)]
    objective = EmbeddingObjective(
        opened.model, tokens, table, loss, order, noise, measures, opened.padded,
        texts.prompt_lengths(opened, prompts), opened.config_values, longer=longer,
    )  # fmt: skip
    remarks += _remarks(opened, table, prompts)
    profile = {
        **data_profile(recipe.train, sides.counts, sides.dev_counts),
        "pairs": len(table),
        "anchors": len(np.unique(table[:, 0])),
        "positives": len(np.unique(table[:, 1])),
        "negatives": int((table[:, 2:] != NONE).sum()),
        "dev_queries": len(data.queries),
        "dev_corpus": len(data.corpus),
        "cut_texts": longer.chunked,
        **token_profile(tokens.spread()),
    }
    resolved = dataclasses.replace(
        recipe, model=recipe.model or DEFAULT, max_length=max_length, ranking=chosen,
        query_prompt=prompts[ANCHOR], document_prompt=prompts[DOCUMENT],
    )  # fmt: skip
    same = identity(folder, opened.model.tokenizer, sides.counts, sides.dev_counts) | sides.identity()
    if guide is not None:
        same["guide vectors"] = hashlib.sha256(guide.tobytes()).hexdigest()
    return Prepared(
        objective, resolved, Path(str(resolved.model)).name, max_length, profile, same, remarks, RATE,
        f"dev_{MEASURES[0]}", folder, Dev(data, queries, corpus, chosen.similarity or "cosine"), sides.old,
        tuple(text for _, text in texts.numbers),
    )  # fmt: skip


def _own_sides(recipe: Contrastive, folder: Path | None) -> Sides:
    """The pairs that a recipe names, parted."""
    counts, columns = Counts(), parse_columns(recipe.columns)
    pairs = list(read_pairs(recipe.train, columns=columns, bad_rows=recipe.bad_rows, counts=counts))
    _check_pairs(pairs, recipe)
    remarks = rows_lost(counts)
    pairs, data, dev_counts = _dev_data(pairs, recipe, columns, remarks)
    return Sides(pairs, data, counts, dev_counts, remarks)


def _searched(sides: Sides, recipe: Contrastive) -> RetrievalSet:
    """What is scored on; where two runs' texts to search in came together, as many as for one."""
    data: RetrievalSet = sides.dev
    if not sides.old:
        return data
    found = bounded(data, len(data.queries), recipe.dev_corpus, [], recipe.loop.seed)
    sides.remarks.append(found.remarks[-1])
    return found


def _order(
    table: np.ndarray, chosen: recipes.Ranking, lengths: np.ndarray, loop: recipes.Loop, remarks: list[str]
) -> Callable[[int], tuple[int, np.ndarray]]:
    """The rows of each step; what cannot stand in an epoch without meeting its like is said."""
    batch, seed = loop.batch or recipes.BATCH, loop.seed
    if chosen.duplicates and not chosen.like_lengths:
        return lambda step: batch_rows(step, batch, len(table), seed)
    keys = np.repeat(np.arange(len(table))[:, None], 2, 1) if chosen.duplicates else table[:, :2]
    order = DistinctOrder(keys, batch, seed, lengths[table[:, 1]] if chosen.like_lengths else None)
    if lost := order.left_out_of(0):
        remarks.append(
            f"{lost:,} of {len(table):,} pairs are left out of the first epoch, about as many others of each later "
            "one: their anchor or positive is in more pairs than there are batches (a smaller --batch, or "
            "--duplicates, takes them in)"
        )
    return order.rows


def _check_pairs(pairs: list[Pair], recipe: Contrastive) -> None:
    if len(pairs) < FEWEST:
        fix = "give some hundreds of pairs; `embedtune data pairs` makes them from raw text"
        raise UserError(f"has {len(pairs)} pair(s): too few to learn from", where=name_of(recipe.train), fix=fix)
    if len({pair.positive for pair in pairs}) == 1:
        raise UserError(
            "has one distinct positive for all anchors: there is nothing to tell apart",
            where=name_of(recipe.train),
            fix="check --columns",
        )


def _dev_data(
    pairs: list[Pair], recipe: Contrastive, columns: dict[str, str], remarks: list[str]
) -> tuple[list[Pair], RetrievalSet, Counts | None]:
    """The pairs to train on, what to score on, and the tally of the dev file where there is one."""
    seed = recipe.loop.seed
    if recipe.dev is None:
        groups = pair_groups(pairs)
        held = held_out(groups, min(recipe.dev_rows, len(pairs) // 10), seed)
        if len({pair.anchor for pair, h in zip(pairs, held) if h}) < 2:
            fix = "give more and more varied pairs, or a file of its own to score on with --dev FILE"
            what = f"too few of the {len(pairs):,} pairs can be held out for scoring: a tenth at most, in whole groups"
            raise UserError(f"{what} that share a text, exactly or nearly", where="--dev", fix=fix)
        dev_pairs = [pair for pair, h in zip(pairs, held) if h]
        pairs = [pair for pair, h in zip(pairs, held) if not h]
        remarks.append(
            f"held out {len(dev_pairs):,} of {len(dev_pairs) + len(pairs):,} pairs, in whole groups that share a text, "
            "exactly or nearly"
        )
        found = from_pairs(dev_pairs, "held out")
        counts = None
    else:
        counts = Counts()
        if folder := dev_folder(recipe.dev):
            found = read_beir(*folder, bad_rows=recipe.bad_rows, counts=counts)
        else:
            dev_pairs = list(read_pairs(recipe.dev, columns=columns, bad_rows=recipe.bad_rows, counts=counts))
            found = from_pairs(dev_pairs, name_of(recipe.dev))
            remarks += rows_lost(counts)
        _refuse_leaks(pairs, found, recipe, remarks)
    others = dict.fromkeys(text for pair in pairs for text in (pair.positive, *pair.negatives))
    dev = bounded(found, recipe.dev_rows, recipe.dev_corpus, list(others), seed)
    if len(dev.queries) < 2:
        what = f"{len(dev.queries)} anchor to score on: an interval needs at least two"
        raise UserError(what, where="--dev", fix="give more pairs to score on, or more --dev-rows")
    remarks += dev.remarks
    return pairs, dev, counts


def held_out(groups: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """(n,) bool: whole groups, in keyed order, until about `wanted` rows; a group larger than that is never taken."""
    sizes = np.bincount(groups)
    place = np.argsort(keyed.key(seed, HOLD, np.arange(len(sizes))), kind="stable")
    place = place[(sizes[place] <= max(1, wanted)) & (sizes[place] > 0)]
    before = np.cumsum(sizes[place]) - sizes[place]
    return np.isin(groups, place[before < wanted])


def _refuse_leaks(pairs: list[Pair], dev: RetrievalSet, recipe: Contrastive, remarks: list[str]) -> None:
    """Anchors of the dev data that training has too are an error; shared positives are usual, and said."""
    found = leaks([pair.anchor for pair in pairs], list(dev.queries.values()))
    shared = len({pair.positive for pair in pairs} & set(dev.corpus.values()))
    if shared:
        remarks.append(f"{shared:,} texts to search in are also positives in training (their queries are others)")
    if not found.exact and not found.near:
        return
    what = f"{found.exact:,} of {len(dev.queries):,} dev anchors stand in the training data too, {found.near:,} nearly"
    if recipe.allow_leaks:
        remarks.append(f"{what}: their scores flatter (--allow-leaks)")
        return
    raise UserError(
        what,
        where=name_of(recipe.dev),
        details=list(map(str, found.examples))[:3],
        fix="embedtune data split FILE --by cluster makes clean parts; --allow-leaks goes on all the same",
    )


def _resolve_ranking(ranking_: recipes.Ranking, opened: Trainable) -> recipes.Ranking:
    name, dimension = ranking_.loss, int(opened.model.get_embedding_dimension())
    if too_big := [dim for dim in ranking_.dims if dim > dimension]:
        raise UserError(f"{too_big[0]} dimensions are more than the model's {dimension}", where="--dims")
    similarity = ranking_.similarity or ("dot" if opened.model.similarity_fn_name == "dot" else "cosine")
    wish = ranking.OURS.get(name, {})
    return dataclasses.replace(
        ranking_,
        loss=ranking.MULTIPLE if name in ranking.OURS else name,
        similarity=similarity,
        # Prefixes are normalised (see ranking.matryoshka), so their dot products are cosines.
        scale=ranking_.scale or SCALES["cosine" if ranking_.dims else similarity],
        symmetric=ranking_.symmetric or bool(wish.get("symmetric")),
        guide=ranking_.guide or ("base" if wish.get("guided") else None),
    )


def _guide_vectors(
    chosen: recipes.Ranking, recipe: Contrastive, texts: Texts, note: Callable[[str], None]
) -> np.ndarray | None:
    """Normalised vectors (U, D) of all texts by the guide; computed once, so that a step only looks them up."""
    if chosen.guide is None:
        return None
    from embedtune.encoder.encode import open_encoder

    name = (recipe.model or DEFAULT) if chosen.guide == "base" else chosen.guide
    note(f"embedding {len(texts.numbers):,} texts with the guide {name}")
    encoder, found = open_encoder(name, note=note), None
    for role in (ANCHOR, DOCUMENT):
        numbers = [number for (r, _), number in texts.numbers.items() if r == role]
        vectors = encoder.encode([text for r, text in texts.numbers if r == role], role)  # type: ignore[arg-type]
        if found is None:
            found = np.zeros((len(texts.numbers), vectors.shape[1]), np.float32)
        found[numbers] = unit(vectors)
    return found


def _loss(
    chosen: recipes.Ranking,
    opened: Trainable,
    table: np.ndarray,
    guide: np.ndarray | None,
    same: dict[int, int],
    remarks: list[str],
) -> Callable[[Tensor, np.ndarray, np.ndarray], Tensor]:
    if chosen.loss == ranking.MULTIPLE:
        return MaskedRanking(chosen, table, guide, same)
    for flag, given in (("--guide", chosen.guide), ("--symmetric", chosen.symmetric)):
        if given:
            raise UserError(f"is for {ranking.MULTIPLE} only, not for {chosen.loss}", where=flag)
    dimension = int(opened.model.get_embedding_dimension())
    stock = ranking.stock_loss(chosen.loss, dimension, {"scale": chosen.scale})
    full = int((table != NONE).all(0).sum())  # columns that every row has: these losses know no gaps
    ranking.check_loss(stock, chosen.loss, dimension, full, scored=False)
    loss = ranking.matryoshka(stock, chosen.dims) if chosen.dims else stock
    if full < table.shape[1]:
        remarks.append(f"{chosen.loss} takes the {full - 2} negative(s) that every row has; the others are not used")

    def applied(vectors: Tensor, place: np.ndarray, rows: np.ndarray) -> Tensor:
        columns = [vectors.index_select(0, torch.from_numpy(column).to(vectors.device)) for column in place.T[:full]]
        return loss(columns, None)

    return applied


class MaskedRanking:
    """Multiple negatives over the distinct texts of a batch, less those that are known or likely positives."""

    def __init__(
        self,
        chosen: recipes.Ranking,
        table: np.ndarray,
        guide: np.ndarray | None,
        same: Mapping[int, int] | None = None,
    ) -> None:
        """`same`: anchor -> the candidate of the very same text, which is never its negative."""
        self.chosen, self.table, self.guide = chosen, table, guide
        self.known = {anchor: [candidate] for anchor, candidate in (same or {}).items()}  # and all its positives
        for anchor, positive in table[:, :2].tolist():
            self.known.setdefault(anchor, []).append(positive)

    def __call__(self, vectors: Tensor, place: np.ndarray, rows: np.ndarray) -> Tensor:
        """The batch's mean loss from vectors (U, D) of its texts; `place` (m, c) says which is whose."""
        texts = self.table[rows]
        inside = place[:, 1:] != NONE
        candidates, first = np.unique(texts[:, 1:][inside], return_index=True)
        where = place[:, 1:][inside][first]
        own = np.searchsorted(candidates, texts[:, 1])
        masked = self._masked(texts[:, 0], candidates, own)

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(vectors.device)

        hidden = put(masked) if masked.any() else None

        def loss(embeddings: Sequence[Tensor], labels: Tensor | None) -> Tensor:
            return ranking.multiple_negatives(
                embeddings[0], embeddings[1], put(own), hidden,
                scale=self.chosen.scale or 1.0, similarity=self.chosen.similarity or "cosine",
                symmetric=self.chosen.symmetric,
            )  # fmt: skip

        whole = ranking.matryoshka(loss, self.chosen.dims) if self.chosen.dims else loss
        return whole([vectors.index_select(0, put(place[:, 0])), vectors.index_select(0, put(where))], None)

    def _masked(self, anchors: np.ndarray, candidates: np.ndarray, own: np.ndarray) -> np.ndarray:
        """(m, C) bool: other positives of an anchor, and what the guide finds as near as its own (arXiv 2402.16829)."""
        masked = np.zeros((len(anchors), len(candidates)), bool)
        for number, anchor in enumerate(anchors.tolist()):
            if len(known := self.known[anchor]) > 1:
                masked[number] = np.isin(candidates, known)
        if self.guide is not None:
            scores = self.guide[anchors] @ self.guide[candidates].T
            bound = np.take_along_axis(scores, own[:, None], 1) - self.chosen.guide_margin
            masked |= scores > bound
        masked[np.arange(len(anchors)), own] = False
        return masked


def _remarks(opened: Trainable, table: np.ndarray, prompts: dict[str, str]) -> list[str]:
    out = []
    anchors = len(np.unique(table[:, 0]))
    if anchors < len(table):
        out.append(f"{len(table):,} pairs of {anchors:,} anchors: other positives of an anchor are never its negatives")
    if any(prompts.values()):
        out.append(f"prompts: {prompts[ANCHOR]!r} before anchors, {prompts[DOCUMENT]!r} before the other texts")
    if opened.config_values:
        out.append(
            "dropout on attention probabilities is off (docs/why.md); hidden dropout is as the model's config says"
        )
    if opened.padded:
        out.append(f"this architecture runs padded, sorted by length: {opened.padded}")
    return out
