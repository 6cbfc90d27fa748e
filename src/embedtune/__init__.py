"""embedtune: turn your own text into an embedding model, and prove that it got better.

Names are loaded when they are first used, so importing the package loads no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "finetune": "embedtune.tune",
    "Finished": "embedtune.tune",
    "MLM": "embedtune.recipes",
    "Contrastive": "embedtune.recipes",
    "Scored": "embedtune.recipes",
    "Classify": "embedtune.recipes",
    "Regress": "embedtune.recipes",
    "Tag": "embedtune.recipes",
    "Ranking": "embedtune.recipes",
    "Loop": "embedtune.recipes",
    "Past": "embedtune.recipes",
    "continued": "embedtune.fit.past",
    "UserError": "embedtune.errors",
    "open_encoder": "embedtune.encoder.encode",
    "Index": "embedtune.search.index",
    "Hit": "embedtune.search.index",
    "remove_length_direction": "embedtune.refine.length",
    "Eraser": "embedtune.refine.sidecar",
    "Oracle": "embedtune.refine.told",
}
__all__ = [
    "MLM",
    "Classify",
    "Contrastive",
    "Eraser",
    "Finished",
    "Hit",
    "Index",
    "Loop",
    "Oracle",
    "Past",
    "Ranking",
    "Regress",
    "Scored",
    "Tag",
    "UserError",
    "continued",
    "finetune",
    "open_encoder",
    "remove_length_direction",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'embedtune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
