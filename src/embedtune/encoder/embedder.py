"""Open and save embedding models: stock SentenceTransformers, made padding-free in place."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from embedtune import files
from embedtune.encoder import exported, load, products, varlen
from embedtune.errors import UserError

Precision = Literal["fp32", "bf16"]
DECIDES = (".safetensors", "config.json", "modules.json", "tokenizer.json", "config_sentence_transformers.json")


class Trainable(NamedTuple):
    """An embedding model ready to be trained."""

    model: Any
    padded: str | None  # why it runs padded; None where it runs padding-free
    config_values: dict[str, Any]  # what was changed in the config for training, and is put back when it is saved


def load_embedder(folder: Path, precision: Precision = "fp32") -> tuple[Any, str | None]:
    """A folder as a stock SentenceTransformer made padding-free in place, and why not where it cannot be.

    "bf16" has the encoder's weights and activations in bf16; pooling and what follows it are float32.
    Raises UserError for a folder that is damaged, or that names modules of its own.
    """
    model = _open(folder, {}).float()
    padded = varlen.flatten(model[0])
    products.use_onednn(model[0].model)
    if precision == "bf16":
        model[0].model.bfloat16()
        model[0].register_forward_hook(_as_float)
    return model, padded


def load_stock(folder: Path) -> Any:
    """A folder as the stock SentenceTransformer in float32, padded, with nothing of ours in it."""
    return _open(folder, {}).float().eval()


def _as_float(module: Any, given: Any, features: dict[str, Any]) -> dict[str, Any]:
    return {**features, "token_embeddings": features["token_embeddings"].float()}


def load_trainable(folder: Path) -> Trainable:
    """`load_embedder` in float32, without dropout on attention probabilities, and with all weights finite."""
    load.check_folder(folder)
    changed = load.without_attention_dropout(load.open_config(folder))
    model = _open(folder, dict.fromkeys(changed, 0.0)).float()
    return Trainable(model, varlen.flatten(model[0]), changed)


def _open(folder: Path, config_values: dict[str, Any]) -> Any:
    load.check_folder(folder)
    load.quiet()
    from sentence_transformers import SentenceTransformer

    try:
        # Weights that a folder lacks (a pooler that nothing uses, say) are drawn: the same ones each time.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = SentenceTransformer(
                str(folder), trust_remote_code=False, local_files_only=True, config_kwargs=config_values or None
            )
    except Exception as error:  # noqa: BLE001 - the libraries raise many kinds; all mean the same to the user
        message = f"cannot be opened as an embedding model: {load.first_line(error)}"
        raise UserError(message, where=str(folder)) from error
    if "message" in getattr(model[0], "modality_config", ()):
        what = "puts texts into a chat template, which encoders of texts do not; not opened"
        raise UserError(what, where=str(folder), fix="name an encoder of the BERT family")
    encoder: Any = model[0]
    load.check_vocabulary(model.tokenizer, encoder.model.get_input_embeddings().weight.shape[0], str(folder))
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            what = f"weight {name} has NaN or infinite values"
            raise UserError(what, where=str(folder), fix="download or copy the folder again")
    return model


def identity(folder: Path) -> str:
    """sha256 of all that decides a model's vectors: weights, tokenizer and settings; not of its name or its card."""
    if exported.is_export(folder):
        return files.sha256(folder / files.MANIFEST)
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    kept = sorted(n for n in names if n.endswith(DECIDES) and n.count("/") < 2)
    lines = [f"{name} {files.sha256(folder / name)}" for name in kept]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def set_pooling(model: Any, folder: Path, pooling: str) -> None:
    """Pool as `pooling` says, in place: for an encoder whose folder does not say how its vectors are pooled."""
    if (folder / "modules.json").is_file():
        what = f"says itself how its vectors are pooled ({model[1].pooling_mode})"
        raise UserError(what, where=str(folder), fix="leave out --pooling")
    model[1].pooling_mode = pooling  # the folder has none of its own, so this one was put here when it was opened


def save_embedder(model: Any, folder: Path, config_values: dict[str, Any]) -> None:
    """Write a folder that sentence-transformers and transformers load as it is; weights in float32."""
    for name, value in config_values.items():
        setattr(model[0].model.config, name, value)
    model.save(str(folder), create_model_card=False)
