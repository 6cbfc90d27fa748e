"""Which vectors a map was fitted on: raw ones or normalised ones. The other kind is refused, not mapped wrongly."""

from __future__ import annotations

import numpy as np

from embedtune.errors import UserError
from embedtune.refine.statistics import refuse_non_finite

UNIT = 5e-3  # a norm this near to one counts as one, in half precision too


def space_of(norms: tuple[float, float]) -> str:
    """The space of vectors whose smallest and largest norms these are: "raw" or "normalised"."""
    low, high = norms
    return "normalised" if max(1 - low, high - 1) < UNIT else "raw"


def check_space(x: np.ndarray, space: str, norms: tuple[float, float], where: str) -> None:
    """Refuse non-finite rows (n, d), and vectors that cannot be of `space`, where norms lay between `norms`."""
    refuse_non_finite(x)
    if not len(x):
        return
    found = np.linalg.norm(x, axis=1)
    unit = bool((np.abs(found - 1) < UNIT).all())
    low, high = norms
    # One raw vector may happen to have norm one if that is a norm raw vectors have; two hardly do.
    if space == "raw" and unit and (len(x) > 1 or not low <= 1 <= high):
        is_, wanted = "normalised", "raw"
    # Vectors that were mapped once are no longer of norm exactly one, but near it.
    elif space == "normalised" and not 0.5 < np.median(found) < 2:
        is_, wanted = "raw", "normalised"
    else:
        return
    raise UserError(
        f"the embeddings are {is_}, the map was fitted on {wanted} ones",
        where=where,
        fix=f"pass {wanted} embeddings of this model",
    )
