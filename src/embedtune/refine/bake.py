"""Put an affine map into a sentence-transformers model as a stock `Dense`, and write the new model folder.

Where the pipeline ends in a Normalize the map stands before it. A last Dense that is linear takes the map into itself.
Pooling by mean, by first or by last token lets an affine map through, so it may as well be applied to every token.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from embedtune import files
from embedtune.encoder import embedder, load
from embedtune.encoder.embedder import Precision, Trainable
from embedtune.errors import UserError
from embedtune.refine.affine import Affine
from embedtune.refine.sidecar import refuse_second

SENTENCE = "sentence_embedding"


def source_of(model: str, out: str | Path, force: bool) -> Path:
    """The folder of a model that a map may be put into. Raises UserError where `out` is there, or one is in already."""
    if Path(out).exists() and not force:
        raise UserError("exists already", where=str(out), fix="another --out, or --force")
    source = load.find(model)
    refuse_second(source)
    return source


def take_normalize(model: Any) -> bool:
    """Take a final Normalize off a SentenceTransformer, in place; whether there was one.

    Raises UserError for a model with a Router: its two sides are two encoders, which one map does not fit.
    """
    from sentence_transformers.sentence_transformer.modules import Normalize, Router

    if any(isinstance(module, Router) for module in model):
        raise UserError(
            "has different encoders for queries and documents, so one map fits neither",
            fix="erase from a model with one encoder",
        )
    model.truncate_dim = None
    if not isinstance(model[-1], Normalize):
        return False
    del model[-1]
    return True


@torch.no_grad()
def attach(model: Any, affine: Affine, normalise: bool) -> str:
    """Put the map at the end of a SentenceTransformer without Normalize, then a Normalize if wanted; where it went."""
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize

    last, folded = model[-1], affine
    into = isinstance(last, Dense) and isinstance(last.activation_function, torch.nn.Identity) and not last.use_residual
    into = into and last.module_input_name == last.module_output_name == SENTENCE
    if into:
        bias = last.linear.bias if last.bias else torch.zeros(last.out_features)
        own = Affine(*(tensor.double().cpu().numpy() for tensor in (last.linear.weight, bias)))
        folded = own.then(affine)
        del model[-1]
    out, width = folded.weight.shape
    dense = Dense(width, out, bias=True, activation_function=torch.nn.Identity())
    dense.linear.weight.copy_(torch.from_numpy(folded.weight.copy()))
    dense.linear.bias.copy_(torch.from_numpy(folded.bias))
    model.append(dense.to(model.device))
    if normalise:
        model.append(Normalize())
    place = "folded into the last Dense" if into else "a Dense of its own"
    return f"{place}, {'before the Normalize' if normalise else 'at the end'}"


def embedding(source: Path, precision: Precision) -> Any:
    """What embeds the texts of a fit: the model without its Normalize. The one that is saved is another, all stock."""
    model, _ = embedder.load_embedder(source, precision)
    take_normalize(model)
    return model


def write_model(opened: Trainable, folder: Path, fill: Callable[[Path, Mapping[str, str]], None], readme: str) -> None:
    """Write the model to a folder that appears whole, by one rename; an existing one is replaced.

    `fill(temporary, weights)` adds files of its own; `weights` are the sha256 sums of all the model's weights.
    """
    temporary = folder.with_name(folder.name + files.TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    with files.disk_errors(temporary):
        files.make_folder(temporary)
        embedder.save_embedder(opened.model, temporary, opened.config_values)
        fill(temporary, weight_sums(temporary))
        files.write_text(temporary / "README.md", readme)
        files.move_directory(temporary, folder)


def weight_sums(folder: Path, but: str = "erasure.safetensors") -> dict[str, str]:
    """sha256 of every weight file below a model folder, by its path there; without the sidecar's own."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))
    return {name: files.sha256(folder / name) for name in found if name != but}
