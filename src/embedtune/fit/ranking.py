"""Losses over embeddings: multiple negatives with masks, Matryoshka, and any loss of sentence-transformers by name.

All of them are functions of vectors that are already there, so one gradient cache serves them all
(objectives/embedding.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedtune.data.tokens import Tokens
from embedtune.errors import UserError, did_you_mean

MULTIPLE = "MultipleNegativesRankingLoss"
# Names that are the same loss here: the gradient is cached whenever the batch exceeds the token budget.
OURS = {
    MULTIPLE: {},
    "CachedMultipleNegativesRankingLoss": {},
    "MultipleNegativesSymmetricRankingLoss": {"symmetric": True},
    "CachedMultipleNegativesSymmetricRankingLoss": {"symmetric": True},
    "GISTEmbedLoss": {"guided": True},
    "CachedGISTEmbedLoss": {"guided": True},
}
Loss = Callable[[Sequence[Tensor], Tensor | None], Tensor]
BatchLoss = Callable[[Tensor, np.ndarray, np.ndarray], Tensor]  # of vectors, places and rows: EmbeddingObjective.loss


def multiple_negatives(
    anchors: Tensor,
    candidates: Tensor,
    own: Tensor,
    masked: Tensor | None = None,
    *,
    scale: float = 20.0,
    similarity: str = "cosine",
    symmetric: bool = False,
) -> Tensor:
    """Mean of -log softmax(scale * s(anchor, candidates))[own] (arXiv 1705.00652, 1807.03748).

    anchors (B, D); candidates (C, D), each text once; own (B,) the candidate that is the anchor's positive; masked
    (B, C) bool: candidates that are no negatives of that anchor (other positives of it, likely false negatives).
    `symmetric` averages in the softmax over anchors for each positive (arXiv 2310.19923). `scale` is 1 / temperature.
    """
    if similarity == "cosine":
        anchors, candidates = F.normalize(anchors, dim=-1), F.normalize(candidates, dim=-1)
    scores = anchors @ candidates.T * scale
    if masked is not None:
        scores = scores.masked_fill(masked, -torch.inf)
    right = scores.gather(1, own[:, None])[:, 0]
    away = torch.logsumexp(scores, dim=1)
    if symmetric:
        # Other rows of the same positive are right answers too.
        twins = (own[:, None] == own).fill_diagonal_(False)
        away = (away + torch.logsumexp(scores.T[own].masked_fill(twins, -torch.inf), dim=1)) / 2
    return (away - right).mean()


def matryoshka(loss: Loss, dims: Sequence[int]) -> Loss:
    """The sum of `loss` over prefixes of the vectors, each normalised (MatryoshkaLoss, arXiv 2205.13147)."""

    def summed(embeddings: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        parts = [loss([F.normalize(e[..., :dim], dim=-1) for e in embeddings], labels) for dim in dims]
        return torch.stack(parts).sum()

    return summed


def squared_covariance(vectors: Tensor, z: Tensor) -> Tensor:
    """|Cov(y, z)|^2 of the normalised vectors y, estimated from a batch; squared Frobenius norm, 0 to 1.

    vectors (U, D); z (U,) with mean 0 and variance 1 over all texts. With a = (y - mean y) z it is the mean of a_i'a_j
    over all i != j. The terms i = j are left out: they are no covariance but the noise of a small batch, and shrink
    all vectors. So it may be slightly below zero.
    """
    y = F.normalize(vectors, dim=-1)
    each = (y - y.mean(0)) * z[:, None]
    return (each.sum(0).square().sum() - each.square().sum()) / max(len(z) * (len(z) - 1), 1)


def with_length_penalty(loss: BatchLoss, table: np.ndarray, tokens: Tokens, weight: float) -> BatchLoss:
    """`loss` plus `weight` times the squared covariance of the batch's distinct texts with their log length.

    table (n, c): the texts of each row, as row numbers of `tokens`, negative where there is none.
    """
    if not weight:
        return loss
    log = np.log(np.maximum(tokens.lengths(), 1))
    z = torch.from_numpy((log - log.mean()) / (log.std() or 1.0)).float()

    def summed(vectors: Tensor, place: np.ndarray, rows: np.ndarray) -> Tensor:
        texts = np.zeros(len(vectors), np.int64)
        texts[place[place >= 0]] = table[rows][place >= 0]
        own = z[torch.from_numpy(texts)].to(vectors.device)
        return loss(vectors, place, rows) + weight * squared_covariance(vectors, own)

    return summed


class _Given(nn.Module):
    """Stands in for the model inside a loss of sentence-transformers: the features hold the vectors already."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.dimension = dimension

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The features as they are."""
        return features

    def get_embedding_dimension(self) -> int:
        """D, which some losses ask for when they are made."""
        return self.dimension


def stock_loss(name: str, dimension: int, options: dict[str, Any]) -> Loss:
    """A loss of sentence-transformers by its name; `options` that it does not take are left out.

    Raises UserError for an unknown name, and for losses that bring weights or a second model of their own.
    """
    from sentence_transformers.sentence_transformer import losses

    kinds = {n: kind for n, kind in vars(losses).items() if inspect.isclass(kind) and issubclass(kind, nn.Module)}
    if name not in kinds:
        alike = {known.casefold(): known for known in [*kinds, *OURS]}
        near = f" (did you mean {alike[low]!r}?)" if (low := name.casefold()) in alike else did_you_mean(name, [*kinds])
        what = f"there is no loss {name!r}{near} in sentence-transformers"
        raise UserError(what, where="--loss", fix="use the name of a class of sentence_transformers.losses")
    takes = inspect.signature(kinds[name]).parameters
    # The gradient cache is ours already; a second one inside a loss would only embed the vectors once more.
    options = {**options, "use_mini_batched_version": False}
    try:
        made = kinds[name](model=_Given(dimension), **{k: v for k, v in options.items() if k in takes})
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{name} cannot be made from a model alone: {error}", where="--loss") from error
    if list(made.parameters()):
        raise UserError(f"{name} has weights of its own, which no model folder could hold", where="--loss")

    def applied(embeddings: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        given = labels if labels is not None else torch.arange(len(embeddings[0]), device=embeddings[0].device)
        found = made([{"sentence_embedding": e} for e in embeddings], given)
        # Some give their parts by name.
        return torch.stack(list(found.values())).sum() if isinstance(found, dict) else found

    return applied


def check_loss(loss: Loss, name: str, dimension: int, columns: int, scored: bool) -> None:
    """Try a loss on vectors that mean nothing: a UserError where it does not take such rows, or reads no scores.

    Only this tells whether a loss reads scores, and all texts: sentence-transformers calls each of them alike.
    """
    vectors = torch.randn(columns, 6, dimension, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rows = f"{columns} texts{' and a score' if scored else ''}"
    fix = f"a loss for {'scores, such as CoSENTLoss' if scored else 'pairs; some need negatives, and so many of them'}"
    found, reached = [], torch.zeros(columns, dtype=torch.bool)
    for labels in ([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]):
        try:
            value = loss(list(vectors), torch.tensor(labels))
            reached |= torch.autograd.grad(value, vectors)[0].flatten(1).any(1)
        except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            what = f"{name} does not take rows of {rows}: {(str(error).splitlines() or [''])[0][:200]}".rstrip(": ")
            raise UserError(what, where="--loss", fix=fix) from error
        found.append(float(value.detach()))
    if scored != (found[0] != found[1]):
        reads = "does not read scores" if scored else "learns from scores or labels, which pairs do not have"
        raise UserError(f"{name} {reads}", where="--loss", fix=fix)
    if not reached.all():
        raise UserError(f"{name} does not look at all of {rows}", where="--loss", fix=fix)
