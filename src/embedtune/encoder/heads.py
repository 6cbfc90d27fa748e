"""Stock models with a head for labels: opened, run padding-free, saved.

The backbone runs on packed rows. What the head needs of it (each row's first token, the mean of its tokens, or single
tokens) is gathered, and the stock model's own forward runs on that alone, with a stand-in for its backbone: so any
stock head works as it is, and does no work on padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedtune.encoder import averaging, load
from embedtune.encoder.load import Loaded
from embedtune.errors import UserError

SEQUENCE, TOKEN = "sequence", "token"  # a head reads a whole row, or each of its tokens
WORDS = {SEQUENCE: "a classifier or regressor", TOKEN: "a tagger"}
HEAD_PLACE = -1  # the position that the head's own dropout is keyed by
TOLERANCE = 1e-4
# Names the tokens that the next layers work on: (owner row, position in it), in the shape of the layers' input.
Key = Callable[[np.ndarray, np.ndarray], None]


def load_head(
    folder: Path, kind: str, seed: int, labels: Sequence[str], problem: str | None = None, pooling: str | None = None
) -> Loaded:
    """A folder with a stock head of `kind` for `labels` in float32; a head that does not fit is made fresh.

    problem: "single_label_classification", "multi_label_classification" or "regression", as stock code names them.
    pooling: "cls" or "mean" (None: as the stock class does); where that has no choice, the mean is a layer more.
    Raises UserError where the stock head cannot pool as `pooling` says, or cannot be run on what was gathered.
    """
    config = load.open_config(folder)
    pooling = _checked(config, pooling, folder)
    settings: dict[str, Any] = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        **({"problem_type": problem} if problem else {}),
        **({"classifier_pooling": pooling} if pooling and hasattr(config, "classifier_pooling") else {}),
    }
    loaded = load.load_stock(folder, _auto(kind), seed, settings, WORDS[kind])
    if kind == TOKEN:
        averaging.drop_mean_layer(loaded.model)
    elif pooling == "mean" and averaging.can_average(config) and not getattr(config, averaging.MARK, False):
        averaging.add_mean_layer(loaded.model, seed)
    prefix = loaded.model.base_model_prefix + "."
    loaded.carried = {name: tensor for name, tensor in loaded.carried.items() if name.startswith(prefix)}
    _check_gathering(loaded, kind)
    return loaded


def kind_of(folder: Path) -> str | None:
    """The kind of head that a folder was saved with, by its config; None where it has none for labels."""
    made = load.check_folder(folder).get("architectures") or [""]
    kinds = {"ForSequenceClassification": SEQUENCE, "ForTokenClassification": TOKEN}
    return next((kind for ending, kind in kinds.items() if str(made[0]).endswith(ending)), None)


def labels_of(folder: Path) -> tuple[tuple[str, ...], bool]:
    """The labels of a folder's head in their order, and whether several may apply to one text."""
    config = load.open_config(folder)
    names = tuple(str(config.id2label[number]) for number in range(config.num_labels))
    return names, config.problem_type == "multi_label_classification"


def open_head(folder: Path) -> tuple[Loaded, str]:
    """A folder that was saved with a head, and the kind of it. Raises UserError where there is none."""
    kind = kind_of(folder)
    fix = "name a folder that `embedtune fit classify`, `fit regress` or `fit tag` made"
    if kind is None:
        raise UserError("has no head for labels", where=str(folder), fix=fix)
    loaded = load.load_stock(folder, _auto(kind), 0, {}, WORDS[kind])
    if loaded.fresh:
        raise UserError(f"lacks weights of its head: {loaded.fresh[0]}", where=str(folder), fix=fix)
    _check_gathering(loaded, kind)
    return loaded, kind


def _auto(kind: str) -> Any:
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    return {SEQUENCE: AutoModelForSequenceClassification, TOKEN: AutoModelForTokenClassification}[kind]


def usual_pooling(folder: Path) -> str | None:
    """What a fresh head should read of this folder's encoder: "mean" where its vectors are means, else None."""
    config = load.open_config(folder)
    able = hasattr(config, "classifier_pooling") or averaging.can_average(config)
    return "mean" if able and kind_of(folder) is None and averaging.means(folder) else None


def _checked(config: Any, pooling: str | None, folder: Path) -> str | None:
    """`pooling`, where this folder's stock class can do it; else a UserError."""
    if hasattr(config, "classifier_pooling") or pooling in (None, "cls"):
        return pooling
    what = f"the stock {config.model_type} head reads the first token (cls); it cannot pool by {pooling}"
    if not averaging.can_average(config):
        raise UserError(what, where="--pooling", fix="leave --pooling out, or take a BERT, RoBERTa or ModernBERT model")
    if kind_of(folder) == SEQUENCE and not getattr(config, averaging.MARK, False):
        what = "already has a head, which was trained on the first token (cls)"
        raise UserError(what, where=str(folder), fix="leave --pooling out")
    return pooling


def parameters(loaded: Loaded) -> list[str]:
    """Names of the head's parameters: all that lie outside of the backbone, and the pooler that only a head reads."""
    prefix = loaded.model.base_model_prefix + "."
    names = [name for name, _ in loaded.model.named_parameters()]
    return [name for name in names if not name.startswith(prefix) or name.startswith(prefix + "pooler.")]


def fresh_layer(loaded: Loaded) -> torch.nn.Linear | None:
    """The linear layer that gives the logits (weight (C, D)), where the folder did not have it; None where it did."""
    fresh, config, prefix = set(loaded.fresh), loaded.model.config, loaded.model.base_model_prefix + "."
    found = [
        module for name, module in loaded.model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == config.num_labels
        and module.bias is not None and f"{name}.weight" in fresh and not name.startswith(prefix)
    ]  # fmt: skip
    return found[-1] if found else None


def tells_texts_apart(loaded: Loaded) -> bool:
    """Whether tokenizer and model tell the two texts of a pair apart by token type ids."""
    named = "token_type_ids" in loaded.tokenizer.model_input_names
    return named and getattr(loaded.model.config, "type_vocab_size", 0) > 1


def hidden_states(loaded: Loaded, rows: list[np.ndarray], types: list | None = None, key: Key | None = None) -> Tensor:
    """Hidden states of all tokens of `rows`, end to end: (T, D)."""
    inputs = loaded.collate(rows, types)
    lengths = np.array([len(row) for row in rows])
    if key is not None:
        key(*_places(lengths, loaded.padded is not None))
    hidden = loaded.model.base_model(**inputs).last_hidden_state
    if loaded.padded is None:
        return hidden[0]
    real = torch.from_numpy(np.arange(hidden.shape[1]) < lengths[:, None]).to(hidden.device)
    return hidden[real]


def _places(lengths: np.ndarray, padded: bool) -> tuple[np.ndarray, np.ndarray]:
    """Owner and position of each token: (T,) packed, (n, L) padded."""
    if padded:
        shape = (len(lengths), int(lengths.max()))
        owner, position = np.indices(shape)
        return owner, position
    owner = np.repeat(np.arange(len(lengths)), lengths)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def row_logits(loaded: Loaded, rows: list[np.ndarray], types: list | None = None, key: Key | None = None) -> Tensor:
    """Logits (n, C) of whole rows; `key` names the tokens for the dropout, None where the model is in eval mode."""
    _, pooled = row_states(loaded, rows, types, key)
    if key is not None:
        key(np.arange(len(rows)), np.full(len(rows), HEAD_PLACE))
    return _head(loaded, pooled[:, None])


def row_states(
    loaded: Loaded, rows: list[np.ndarray], types: list | None = None, key: Key | None = None
) -> tuple[Tensor, Tensor]:
    """Mean hidden states of whole rows, and what the head is given of them: (n, D) each."""
    lengths, layer = np.array([len(row) for row in rows]), averaging.layer_of(loaded.model)
    if layer is None:
        hidden = hidden_states(loaded, rows, types, key)
    else:  # of its work on all tokens, that on each row's first is enough
        with _standing_in(layer, lambda states, *args, **kwargs: states):
            hidden = hidden_states(loaded, rows, types, key)
    mean = row_means(hidden, lengths)
    if getattr(loaded.model.config, "classifier_pooling", "cls") == "mean":
        return mean, mean
    first = hidden.index_select(0, torch.from_numpy(np.cumsum(lengths) - lengths).to(hidden.device))
    if layer is None:
        return mean, first
    if key is not None:
        key(np.arange(len(rows)), np.zeros(len(rows), int))
    return mean, averaging.first_token(layer, mean, first)


def token_logits(loaded: Loaded, rows: list[np.ndarray], wanted: np.ndarray, key: Key | None = None) -> Tensor:
    """Logits (m, C) of the tokens at `wanted` (m,), places among all tokens of `rows` laid end to end."""
    hidden = hidden_states(loaded, rows, None, key).index_select(0, torch.from_numpy(wanted).to(loaded.model.device))
    if key is not None:
        owner, position = _places(np.array([len(row) for row in rows]), False)
        key(owner[wanted], position[wanted])
    return _head(loaded, hidden[None])[0]


def row_means(hidden: Tensor, lengths: np.ndarray) -> Tensor:
    """The mean of each row's hidden states: (T, D) to (n, D)."""
    owner = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(hidden.device)
    total = hidden.new_zeros(len(lengths), hidden.shape[-1]).index_add(0, owner, hidden)
    return total / torch.from_numpy(lengths).to(hidden)[:, None]


def read_by(loaded: Loaded, layer: torch.nn.Module, states: Tensor) -> Tensor:
    """What `layer` of the head reads (m, D) of hidden states (n, L, D)."""
    caught: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    try:
        _head(loaded, states)
    finally:
        hook.remove()
    return caught[0].flatten(0, -2)


def _head(loaded: Loaded, states: Tensor) -> Tensor:
    """The stock head on hidden states (n, L, D) that stand for the backbone's output."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    model = loaded.model
    pooler = getattr(model.base_model, "pooler", None)
    output = BaseModelOutputWithPooling(
        last_hidden_state=states, pooler_output=pooler(states) if pooler is not None else None
    )
    shape = states.shape[:2]
    ids = torch.zeros(shape, dtype=torch.long, device=states.device)
    with _standing_in(model.base_model, lambda *args, **kwargs: output):
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits


@contextmanager
def _standing_in(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While this holds, `forward` runs in the place of what `module` does."""
    before = vars(module).get("forward")  # something else may stand in for it already (compiled layers)
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _check_gathering(loaded: Loaded, kind: str) -> None:
    """Tried, not guessed: the stock forward on one row, and the head on what was gathered, give the same logits."""
    row = np.array([loaded.tokenizer.cls_token_id or 1, 5, 6, 7, loaded.tokenizer.sep_token_id or 2])
    was_training = loaded.model.training
    loaded.model.eval()
    try:
        with torch.no_grad():
            ids = torch.from_numpy(row)[None].to(loaded.model.device)
            stock = loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
            ours = (
                row_logits(loaded, [row])[0] if kind == SEQUENCE else token_logits(loaded, [row], np.arange(len(row)))
            )
        gap = (stock - ours).abs().max().item()
        fits = gap <= TOLERANCE * max(1.0, stock.abs().max().item())
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        fits = False
    finally:
        loaded.model.train(was_training)
    if not fits:
        kind_of = loaded.model.config.model_type
        what = f"the stock {kind_of} head reads more than the pooled token: it cannot be trained here"
        raise UserError(
            what, where=str(loaded.folder), fix="take a BERT, RoBERTa, DistilBERT, MPNet, ELECTRA or ModernBERT model"
        )


def merged(model: torch.nn.Module) -> dict[str, Tensor]:
    """The state of `model` under its stock names, LoRA adapters added to the weights they adapt."""
    state = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            state[f"{name}.base_layer.weight"] = module.base_layer.weight + module.get_delta_weight("default")
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}


def add_lora(loaded: Loaded, rank: int, seed: int) -> int:
    """Put LoRA adapters (arXiv 2106.09685; alpha = 2 rank) beside the backbone's linear layers, and freeze those.

    Returns how many layers have one. Raises UserError without peft, or where there is no linear layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("needs the package peft", where="--lora", fix="pip install 'embedtune[lora]'") from error
    backbone = loaded.model.base_model
    names = [
        name for name, module in backbone.named_modules()
        if isinstance(module, torch.nn.Linear) and "pooler" not in name
    ]  # fmt: skip
    if not names:
        raise UserError("finds no linear layers to adapt", where="--lora")
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, lora_dropout=0.0), backbone)
    return len(names)


def save_head(loaded: Loaded, folder: Path) -> None:
    """Write a folder that transformers' Auto classes and pipelines open as it is, and sentence-transformers too."""
    load.save(loaded, folder, merged(loaded.model))


@contextmanager
def only_rows(backbone: torch.nn.Module, index: Tensor) -> Iterator[None]:
    """While this holds, `backbone` hands on only the hidden states at `index` ((m,) into its flattened positions)."""

    def gather(module: torch.nn.Module, args: tuple, output: Any) -> Any:
        hidden = output.last_hidden_state
        output["last_hidden_state"] = hidden.reshape(-1, hidden.shape[-1]).index_select(0, index)[None]
        return output

    handle = backbone.register_forward_hook(gather)
    try:
        yield
    finally:
        handle.remove()
