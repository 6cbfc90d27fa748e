"""Retrieval: the corpus ranked for each query by exact search, at every Matryoshka dimension of the same vectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from embedtune.data.retrieval import RetrievalSet
from embedtune.errors import UserError
from embedtune.judge import measures as m
from embedtune.judge.report import Ranked, Report
from embedtune.nearest import Rows, Unit, ranks, top_k

if TYPE_CHECKING:
    from embedtune.encoder.encode import Encoder

Similarity = Literal["cosine", "dot"]
DEFAULT = ("nDCG@10", "MRR@10", "recall@100", "MAP@100", "accuracy@1")
SHOWN = 10  # documents kept for each query
DEEPEST = 1_000  # below this place the judged documents are counted, not sorted


def judge_retrieval(
    encoder: Encoder,
    data: RetrievalSet,
    measures: Iterable[str | m.Measure] = DEFAULT,
    *,
    dims: Sequence[int | None] = (None,),
    similarity: Similarity = "cosine",
) -> list[Report]:
    """Embed queries and corpus once, and report on each of `dims`, None being all of the model's numbers.

    A smaller dimension takes the first numbers of the same vectors, scaled anew for cosine. Raises UserError for
    unknown measures and for dimensions that the model does not have, before anything is embedded.
    """
    chosen = m.parse_all(measures)
    check_dims(dims, encoder.dimension, encoder.name)
    queries = encoder.encode(list(data.queries.values()), "query")
    corpus = encoder.encode(list(data.corpus.values()), "document")
    return [
        score_vectors(queries, corpus, data, chosen, dim, similarity=similarity, model=encoder.name) for dim in dims
    ]


def score_vectors(
    query_vectors: np.ndarray,
    corpus_vectors: np.ndarray,
    data: RetrievalSet,
    measures: Iterable[str | m.Measure] = DEFAULT,
    dim: int | None = None,
    *,
    similarity: Similarity = "cosine",
    model: str = "",
) -> Report:
    """The report on vectors that are there already: (Q, D) and (N, D), in the order of `data.queries` and `.corpus`.

    Documents with equal scores stand in descending order of their ids, as in trec_eval.
    """
    if similarity not in get_args(Similarity):
        raise UserError(f"must be cosine or dot, not {similarity!r}", where="--similarity")
    if len(query_vectors) != len(data.queries) or len(corpus_vectors) != len(data.corpus):
        raise ValueError(f"{query_vectors.shape}, {corpus_vectors.shape}: not a vector for each text of {data.name}")
    check_dims([dim], query_vectors.shape[1], model)
    chosen = m.parse_all(measures)
    queries, corpus = _view(query_vectors, dim, similarity), _view(corpus_vectors, dim, similarity)
    ids = list(data.corpus)
    prefer = np.empty(len(ids), np.int64)
    prefer[sorted(range(len(ids)), key=ids.__getitem__, reverse=True)] = np.arange(len(ids))
    depth = m.depth(chosen)
    counted = depth is None or depth > DEEPEST
    scores, found = top_k(queries, corpus, SHOWN if counted else max(SHOWN, depth or 0), prefer=prefer)
    judged = _judged(data, found)
    if counted:
        relevant = judged.gain > 0
        pairs = np.stack([judged.query, _documents(data)], 1)[relevant]
        judged.rank[relevant] = ranks(queries, corpus, pairs, prefer=prefer)
    values = {str(measure): measure.values(judged) for measure in chosen}
    return Report(
        task="retrieval",
        data=data.name,
        model=model,
        dim=queries.shape[1],
        items=tuple(data.queries),
        summary={name: float(each.mean()) for name, each in values.items()},
        values=values,
        found=Ranked(ids, found[:, :SHOWN].astype(np.int32), scores[:, :SHOWN].copy()),  # not views of all
        remarks=tuple(data.remarks),
    )


def check_dims(dims: Iterable[int | None], dimension: int, model: str) -> None:
    """Raise one UserError for all dimensions that are not between 1 and the model's."""
    if wrong := [dim for dim in dims if dim is not None and not 1 <= dim <= dimension]:
        numbers = ", ".join(f"{dim:,}" for dim in wrong)
        what = f"{numbers} is not between 1 and {dimension:,}, the dimension of {model or 'the vectors'}"
        raise UserError(what, where="--dims", fix=f"give dimensions up to {dimension}")


def _view(vectors: np.ndarray, dim: int | None, similarity: Similarity) -> Rows:
    return Unit(vectors, dim) if similarity == "cosine" else vectors[:, :dim]


def _documents(data: RetrievalSet) -> np.ndarray:
    """The corpus row of each judgement: (J,) int64."""
    row = {document: number for number, document in enumerate(data.corpus)}
    return np.array([row[document] for query in data.queries for document in data.qrels[query]], np.int64)


def _judged(data: RetrievalSet, found: np.ndarray) -> m.Judged:
    """Where the judged documents stand among those found (Q, k), corpus rows, best first."""
    sizes = [len(data.qrels[query]) for query in data.queries]
    query = np.repeat(np.arange(len(sizes)), sizes)
    gain = np.array([relevance for key in data.queries for relevance in data.qrels[key].values()], np.float64)
    rank = np.full(len(query), m.NOT_FOUND, np.int64)
    key = query * len(data.corpus) + _documents(data)
    order = np.argsort(key)
    seen = (np.arange(len(sizes))[:, None] * len(data.corpus) + found).ravel()
    at = np.searchsorted(key[order], seen)
    hit = np.flatnonzero(key[order[np.minimum(at, len(key) - 1)]] == seen)
    rank[order[at[hit]]] = hit % found.shape[1] + 1
    return m.Judged(len(sizes), query, gain, rank)
