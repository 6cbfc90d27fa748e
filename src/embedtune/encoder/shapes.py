"""How many compiled shapes of products a process keeps; it is said before torch computes, and without importing it."""

from __future__ import annotations

import os

# oneDNN, and torch above it, keep what they compiled for each shape of a product: 1,024 each. No two batches have the
# same shapes, which came to 7 MB a batch. The layers of a model repeat them, so as many as one batch has are enough.
ENCODING, TRAINING = 16, 64  # with 16 a training took 1.4 times as long


def few_shapes(most: int = ENCODING) -> dict[str, str]:
    """The environment of a process that keeps so many."""
    return dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), str(most))


def bound_memory(shapes: int = ENCODING) -> None:
    """Keep few compiled shapes, so that memory does not grow with the data; before the process's first product."""
    for name, most in few_shapes(shapes).items():
        os.environ.setdefault(name, most)
