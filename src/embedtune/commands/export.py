"""embedtune refine export: a model for onnxruntime, OpenVINO, or as a table of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from embedtune import recipes
from embedtune.commands.shape import Command, Output, Talk, refuse_existing
from embedtune.errors import UserError


@dataclass(frozen=True)
class Export:
    """A model for other runtimes: ids and mask in, final vectors out. An export that is not near enough is refused."""

    # The model: a folder or a name.
    model: str
    # The form: onnx (float32), onnx-int8, openvino (float32), or static, a table of tokens for model2vec.
    to: Literal["onnx", "onnx-int8", "openvino", "static"]
    # Folder of the export.
    out: str
    # Numbers to keep of each vector: the first ones, for Matryoshka models; of static the principal components (256).
    dims: int | None = None
    # Texts of yours that the vectors are compared on (the first 200); static counts its tokens in all of them.
    data: str | None = None
    # Judge model and export on this: a BEIR folder (or folder:split), pairs, or scored pairs.
    dev: str | None = None
    # How much nDCG@10 (or Spearman) may be lost on --dev (derived: 0.001; int8 0.005; static any).
    loss: float | None = None
    # Which column is the text: text=NAME.
    columns: str | None = None
    # Rows that cannot be used: stop, leave them out, or mend them with U+FFFD.
    bad_rows: recipes.BadRows = "fail"
    # Replace a finished folder of that name.
    force: bool = False
    # Print the result as JSON.
    json: bool = False


def export(command: Export, talk: Talk) -> Output:
    """Write the export, unless the gate refuses it."""
    from embedtune.parts import open_judged
    from embedtune.refine.erase import Texts
    from embedtune.refine.export import Wanted
    from embedtune.refine.export import export as work

    refuse_existing(command.out, command.force)
    if command.loss is not None and not command.dev:
        raise UserError("is about what --dev measures, and there is none", where="--loss", fix="give --dev too")
    texts = Texts(command.data, command.columns, command.bad_rows) if command.data else None
    dev = open_judged(command.dev, bad_rows=command.bad_rows) if command.dev else None
    found = work(command.model, Wanted(command.to, command.dims, command.loss), command.out, texts=texts, dev=dev,
                 note=talk.note)  # fmt: skip
    remarks = dev.remarks if dev else []
    return Output([*remarks, *found.lines()], {**found.about, "folder": str(found.folder), "bytes": found.bytes})


COMMANDS = {
    "refine export": Command(
        "MODEL --to FORM --out DIR", "a model for onnxruntime, OpenVINO or model2vec", Export, export, "--model"
    ),
}
