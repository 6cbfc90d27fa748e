"""`refine merge`: average two models in weight space, the coefficient given or chosen on dev data, and save."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from embedtune import files
from embedtune.data.columns import parse_columns
from embedtune.encoder import embedder, load
from embedtune.encoder.encode import LocalEncoder
from embedtune.errors import UserError
from embedtune.fit import merge
from embedtune.judge.retrieval import judge_retrieval
from embedtune.parts import open_set

MAIN = "nDCG@10"


@dataclass(frozen=True)
class Averaged:
    """The folder, the coefficient in it, and what was tried (empty where the coefficient was given)."""

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
    name = measure or MAIN
    tried: dict[float, float] = {}
    if coefficient is None:
        dev = open_set(data, columns=parse_columns(columns))

        def score(value: float) -> float:
            encoder = LocalEncoder(models[1], opened.model, "fp32")
            report = judge_retrieval(encoder, dev, [name])[0]
            found = float(report.summary[report.measure(name)])
            note(f"{value:g} of the way to the tuned model: {name} {found:.4f}")
            return found

        merge.set_average(opened.model, base, tuned, 0.0)
        ends = [score(0.0)]
        merge.set_average(opened.model, base, tuned, 1.0)
        ends.append(score(1.0))
        coefficient, tried = merge.choose(opened.model, base, score, lambda a, b: a > b, (ends[0], ends[1]))
    else:
        merge.set_average(opened.model, base, tuned, coefficient)
    temporary = folder.with_name(folder.name + ".running")
    shutil.rmtree(temporary, ignore_errors=True)
    with files.disk_errors(temporary):
        files.make_folder(temporary)
        embedder.save_embedder(opened.model, temporary, opened.config_values)
        about = f"{coefficient:g} of the way from `{models[0]}` to `{models[1]}`"
        files.write_text(temporary / "README.md", f"# Averaged model\n\n{about}, weights averaged with embedtune.\n")
        files.move_directory(temporary, folder)
    return Averaged(folder, coefficient, name, tried)
