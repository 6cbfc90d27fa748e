"""Retrieval: the corpus ranked for each query by exact search, at every Matryoshka dimension of the same vectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from embedtune.data.retrieval import RetrievalSet
from embedtune.data.stored import Stored, StoredIds
from embedtune.errors import UserError
from embedtune.judge import measures as m
from embedtune.judge.report import Ids, Ranked, Report
from embedtune.judge.ties import descending
from embedtune.nearest import Cut, Rows, Unit, ranks, top_k

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
    unknown measures and for dimensions that the model does not have, before anything is embedded. The vectors
    lie in a scratch file where they are many, as the corpus of a BEIR folder does.
    """
    from embedtune.encoder.encode import vectors_of

    chosen = m.parse_all(measures)
    check_dims(dims, encoder.dimension, encoder.name)
    queries = vectors_of(encoder, data.queries.values(), "query")
    corpus = vectors_of(encoder, data.corpus.values(), "document")
    documents = _Documents.of(data)
    return [
        _report(_view(queries, dim, similarity), _view(corpus, dim, similarity), data, documents, chosen, encoder.name)
        for dim in dims
    ]


def score_vectors(
    query_vectors: Rows,
    corpus_vectors: Rows,
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
    check_dims([dim], query_vectors.shape[1], model)
    chosen = m.parse_all(measures)
    queries, corpus = _view(query_vectors, dim, similarity), _view(corpus_vectors, dim, similarity)
    return _report(queries, corpus, data, _Documents.of(data), chosen, model)


@dataclass(frozen=True, eq=False)
class _Documents:
    """What is known of a corpus of N documents beside its texts."""

    ids: Ids
    prefer: np.ndarray  # (N,) int32: which comes first of documents with equal scores
    judged: np.ndarray  # (J,) int64: the corpus row of each judgement, query by query

    @classmethod
    def of(cls, data: RetrievalSet) -> _Documents:
        wanted = {document for judged in data.qrels.values() for document in judged}
        row = {document: number for number, document in enumerate(data.corpus) if document in wanted}
        judged = (row[document] for query in data.queries for document in data.qrels[query])
        ids: Ids = StoredIds(data.corpus) if isinstance(data.corpus, Stored) else list(data.corpus)
        return cls(ids, descending(data.corpus, len(data.corpus)), np.fromiter(judged, np.int64))


def _report(
    queries: Rows, corpus: Rows, data: RetrievalSet, documents: _Documents, chosen: list[m.Measure], model: str
) -> Report:
    if queries.shape[0] != len(data.queries) or corpus.shape[0] != len(data.corpus):
        raise ValueError(f"{queries.shape}, {corpus.shape}: not a vector for each text of {data.name}")
    depth = m.depth(chosen)
    counted = depth is None or depth > DEEPEST
    scores, found = top_k(queries, corpus, SHOWN if counted else max(SHOWN, depth or 0), prefer=documents.prefer)
    judged = _judged(data, found, documents.judged)
    if counted:
        relevant = judged.gain > 0
        pairs = np.stack([judged.query, documents.judged], 1)[relevant]
        judged.rank[relevant] = ranks(queries, corpus, pairs, prefer=documents.prefer)
    values = {str(measure): measure.values(judged) for measure in chosen}
    return Report(
        task="retrieval",
        data=data.name,
        model=model,
        dim=queries.shape[1],
        items=tuple(data.queries),
        summary={name: float(each.mean()) for name, each in values.items()},
        values=values,
        found=Ranked(documents.ids, found[:, :SHOWN].astype(np.int32), scores[:, :SHOWN].copy()),  # not views of all
        remarks=tuple(data.remarks),
    )


def check_dims(dims: Iterable[int | None], dimension: int, model: str) -> None:
    """Raise one UserError for all dimensions that are not between 1 and the model's."""
    if wrong := [dim for dim in dims if dim is not None and not 1 <= dim <= dimension]:
        numbers = ", ".join(f"{dim:,}" for dim in wrong)
        what = f"{numbers} is not between 1 and {dimension:,}, the dimension of {model or 'the vectors'}"
        raise UserError(what, where="--dims", fix=f"give dimensions up to {dimension}")


def _view(vectors: Rows, dim: int | None, similarity: Similarity) -> Rows:
    if similarity not in get_args(Similarity):
        raise UserError(f"must be cosine or dot, not {similarity!r}", where="--similarity")
    return Unit(vectors, dim) if similarity == "cosine" else Cut(vectors, dim)


def _judged(data: RetrievalSet, found: np.ndarray, documents: np.ndarray) -> m.Judged:
    """Where the judged `documents` (J,) stand among those found (Q, k), corpus rows, best first."""
    count = len(data.queries)
    sizes = np.fromiter((len(data.qrels[query]) for query in data.queries), np.int64, count)
    query = np.repeat(np.arange(count), sizes)
    gains = (relevance for key in data.queries for relevance in data.qrels[key].values())
    gain = np.fromiter(gains, np.float64, len(query))
    rank = np.full(len(query), m.NOT_FOUND, np.int64)
    key = query * len(data.corpus) + documents
    order = np.argsort(key)
    seen = (np.arange(count)[:, None] * len(data.corpus) + found).ravel()
    at = np.searchsorted(key[order], seen)
    hit = np.flatnonzero(key[order[np.minimum(at, len(key) - 1)]] == seen)
    rank[order[at[hit]]] = hit % found.shape[1] + 1
    return m.Judged(count, query, gain, rank)
