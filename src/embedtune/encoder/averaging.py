"""The mean for stock heads that read the first token: one layer more, after which that token holds the mean of all.

Most embedding models were trained to mean the average of their tokens; BERT's and RoBERTa's stock heads read the first
token alone. A layer whose queries and keys are zero attends to all tokens alike, on real ones only. With the identity
as its values and a large multiple of it as its output, the layer norm gives the normalised mean, beside which the
residual vanishes; its feed-forward part starts at zero. The saved folder stays one of the stock class, a layer deeper.
Queries and keys have no gradient while both are zero, so what is averaged stays the mean; all else is trained.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embedtune import files
from embedtune.errors import UserError

# Architectures with BERT's layers, whose head reads the first token by a linear layer and a tanh: where that one is.
DENSE = {
    "bert": "bert.pooler.dense",
    "roberta": "classifier.dense",
    "xlm-roberta": "classifier.dense",
    "camembert": "classifier.dense",
}
MARK = "mean_layer"  # in config.json, so that no second one is added
LARGE = 1000.0  # times the mean, beside the residual
LINEAR = 0.4  # times a value of spread 1: tanh keeps most of it
SPREAD = 0.02  # of the feed-forward part's first half; its second half is zero


def can_average(config: Any) -> bool:
    """Whether a model of this config can be given the layer."""
    return config.model_type in DENSE


def means(folder: Path) -> bool:
    """Whether a folder says that its vectors are the means of its tokens' (sentence-transformers' files)."""
    settings = folder / "1_Pooling" / "config.json"
    found = files.read_json(settings) if settings.is_file() else {}
    if not isinstance(found, dict):
        raise UserError("is no JSON object", where=str(settings), fix="copy the folder again")
    return found.get("pooling_mode") == "mean" or found.get("pooling_mode_mean_tokens") is True


@torch.no_grad()
def add_mean_layer(model: Any, seed: int) -> None:
    """Add the layer to a stock model with a head, in place, and let the head read it unchanged."""
    layers = model.base_model.encoder.layer
    layer = copy.deepcopy(layers[-1])
    attention, output = layer.attention.self, layer.attention.output
    _set(attention.query, 0.0)
    _set(attention.key, 0.0)
    _set(attention.value, 1.0)
    _set(output.dense, LARGE)
    layer.intermediate.dense.weight.normal_(0.0, SPREAD, generator=torch.Generator().manual_seed(seed))
    layer.intermediate.dense.bias.zero_()
    _set(layer.output.dense, 0.0)
    for norm in (output.LayerNorm, layer.output.LayerNorm):
        norm.weight.fill_(1.0)
        norm.bias.zero_()
    _set(model.get_submodule(DENSE[model.config.model_type]), LINEAR)
    layers.append(layer)
    model.config.num_hidden_layers += 1
    setattr(model.config, MARK, True)


def drop_mean_layer(model: Any) -> None:
    """Take the layer away again, in place: after it all tokens of a row are alike, of no use to a task of tokens."""
    if getattr(model.config, MARK, False):
        del model.base_model.encoder.layer[-1]
        model.config.num_hidden_layers -= 1
        setattr(model.config, MARK, False)


def layer_of(model: Any) -> Any:
    """The layer that means, where a stock model with a head has one, else None."""
    return model.base_model.encoder.layer[-1] if getattr(model.config, MARK, False) else None


def first_token(layer: Any, mean: Tensor, first: Tensor) -> Tensor:
    """What the layer gives at the first token of n rows (n, D), without the work on all the others.

    mean: the mean of the states below it over each row's tokens (n, D): values are linear, so theirs is the value of
    it. first: the states below it at the first tokens (n, D).
    """
    attended = layer.attention.output(layer.attention.self.value(mean)[None], first[None])
    found: Tensor = layer.output(layer.intermediate(attended), attended)
    return found[0]


def _set(layer: nn.Linear, diagonal: float) -> None:
    layer.weight.zero_()
    layer.weight.fill_diagonal_(diagonal)
    layer.bias.zero_()
