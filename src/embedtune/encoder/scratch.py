"""A model from nothing: a WordPiece tokenizer trained on the text, and a small BERT or ModernBERT from a config."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from embedtune import files
from embedtune.encoder import load, varlen
from embedtune.errors import UserError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 512}
KINDS: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", "intermediate_size": 1024, **SMALL},
    "modernbert": {"model_type": "modernbert", "intermediate_size": 512, **SMALL},
}


def make(kind: str, texts: Iterable[str], vocab_size: int, seed: int, folder: Path) -> None:
    """Write a fresh model folder: `kind` is bert, modernbert or the path of a config.json; `texts` is read twice.

    Raises UserError where the config cannot be used.
    """
    tokenizer = train_wordpiece(texts, vocab_size)
    config = _config(kind, tokenizer)
    varlen.register()
    load.quiet()
    from transformers import AutoModelForMaskedLM

    torch.manual_seed(seed)
    try:
        model = AutoModelForMaskedLM.from_config(config)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"no masked language model can be made of it: {error}", where=kind) from error
    folder.mkdir(parents=True, exist_ok=True)
    load.save(load.Loaded(model, tokenizer, folder, config.max_position_embeddings), folder)


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> Any:
    """A lower-casing WordPiece tokenizer (BERT's) trained on a stream of texts; the same texts give the same one.

    The library numbers the characters that continue a word in the order of a hash table that differs from run to
    run, and breaks ties by these numbers. So it trains twice: the second time these characters are numbered by us.
    """
    if iter(texts) is texts:
        raise TypeError("texts are read twice: a list, or an object whose __iter__ starts anew")
    from tokenizers import Tokenizer, decoders, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = _train(texts, vocab_size, []).get_vocab()
    inner = sorted(piece for piece in vocabulary if piece.startswith("##") and len(piece) == 3)
    state = json.loads(_train(texts, vocab_size, inner).to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=512,
    )


def _train(texts: Iterable[str], vocab_size: int, first: list[str]) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=[*SPECIAL, *first], show_progress=False),
    )
    return backend


def _config(kind: str, tokenizer: Any) -> Any:
    from transformers import AutoConfig

    if kind in KINDS:
        values = dict(KINDS[kind])
    else:
        path = Path(kind) / "config.json" if Path(kind).is_dir() else Path(kind)
        if not path.is_file():
            raise UserError("with --scratch, --model names bert, modernbert or a config.json", where=kind)
        values = files.read_json(path)
        if not isinstance(values, dict) or "auto_map" in values or "model_type" not in values:
            raise UserError("is not a config that can be used: no model_type, or code of its own", where=kind)
    values.update(
        vocab_size=len(tokenizer), pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3
    )
    known = {k: v for k, v in json.loads(json.dumps(values)).items() if k not in ("model_type", "architectures")}
    try:
        return AutoConfig.for_model(values["model_type"], **known)
    except Exception as error:  # noqa: BLE001 - the library raises many kinds; all mean the same to the user
        raise UserError(f"is not a config that can be used: {str(error)[:200]}", where=kind) from error
