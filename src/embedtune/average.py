"""`refine merge`: average two models in weight space, the coefficient given or chosen on dev data, and save."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from embedtune import files
from embedtune.data.columns import parse_columns
from embedtune.encoder import embedder, load
from embedtune.encoder.encode import LocalEncoder
from embedtune.errors import UserError
from embedtune.fit import merge
from embedtune.judge.retrieval import judge_retrieval
from embedtune.judge.similarity import judge_similarity
from embedtune.parts import Judged, open_judged
from embedtune.recipes import Similarity

MAIN = {"retrieval": "nDCG@10", "similarity": "spearman"}


@dataclass(frozen=True)
class Averaged:
    """The folder, the coefficient in it, and what was tried by which measure (none where it was given)."""

    folder: Path
    coefficient: float
    measure: str
    tried: dict[float, float]


def average(
    models: Sequence[str],
    out: str | Path,
    *,
    coefficient: float | None = None,
    data: str | None = None,
    measure: str | None = None,
    columns: str | None = None,
    force: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Averaged:
    """Write base + coefficient (tuned - base) to `out`; without a coefficient the best one on `data`.

    Raises UserError where the models are of different shapes, or neither coefficient nor data is given.
    """
    folder = Path(out)
    if len(models) != 2:
        raise UserError(f"{len(models)} models are named, not two", fix="embedtune refine merge BASE TUNED --out DIR")
    if (coefficient is None) == (data is None):
        raise UserError("give either --coefficient or --data, not both, not neither")
    if coefficient is not None and not 0 <= coefficient <= 1:
        raise UserError(f"must lie between 0 and 1, not {coefficient:g}", where="--coefficient")
    if folder.exists() and not force:
        raise UserError("exists already", where=str(out), fix="another --out, or --force")
    opened = embedder.load_trainable(load.find(models[1]))
    tuned = merge.weights(opened.model)
    base = merge.base_weights(load.find(models[0]), tuned)
    chosen, name, tried = coefficient or 0.0, "", dict[float, float]()
    if data is not None:
        dev = open_judged(data, columns=parse_columns(columns))
        chosen, name, tried = _best(opened.model, base, dev, measure, note)
    else:
        merge.set_average(opened.model, base, tuned, chosen)
    temporary = folder.with_name(folder.name + files.TEMPORARY)  # not the place of a fit that was stopped
    shutil.rmtree(temporary, ignore_errors=True)
    with files.disk_errors(temporary):
        files.make_folder(temporary)
        embedder.save_embedder(opened.model, temporary, opened.config_values)
        about = f"{chosen:g} of the way from `{models[0]}` to `{models[1]}`"
        files.write_text(temporary / "README.md", f"# Averaged model\n\n{about}, weights averaged with embedtune.\n")
        files.move_directory(temporary, folder)
    return Averaged(folder, chosen, name, tried)


def _best(
    model: Any, base: Mapping[str, Tensor], dev: Judged, measure: str | None, note: Callable[[str], None]
) -> tuple[float, str, dict[float, float]]:
    """The coefficient that is best on dev, the measure, and all its values; `model` comes tuned and leaves averaged."""
    encoder, tuned = LocalEncoder("the average", model), merge.weights(model)
    name = measure or MAIN["retrieval" if dev.retrieval else "similarity"]
    similarity: Similarity = "dot" if model.similarity_fn_name == "dot" else "cosine"

    def score(coefficient: float) -> float:
        if dev.retrieval:
            report = judge_retrieval(encoder, dev.retrieval, [name], similarity=similarity)[0]
        else:
            report = judge_similarity(encoder, dev.scored, dev.name)[0]
        found = float(report.summary[report.measure(name)])
        note(f"{coefficient:g} of the way to the tuned model: {name} {found:.4f}")
        return found

    merge.set_average(model, base, tuned, 0.0)
    at_base = score(0.0)
    merge.set_average(model, base, tuned, 1.0)
    coefficient, tried = merge.choose(model, base, score, lambda a, b: a > b, (at_base, score(1.0)))
    return coefficient, name, tried
