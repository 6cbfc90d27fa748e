"""What is refused in a model folder before any library reads it: code, pickles, ways out of it, sizes without end.

The libraries have guards of their own; these do not depend on them, and say what is wrong in words of ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedtune import files
from embedtune.encoder import varlen
from embedtune.errors import UserError, did_you_mean, short_list

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".pkl", ".pickle", ".joblib", ".msgpack")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
READ = (".json", ".txt", ".safetensors", ".model", ".spm", ".jinja", ".md")  # what is ever read of a folder
ATTENTIONS = (None, "", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", varlen.ATTENTION)
MODULES = ("Transformer", "Pooling", "Normalize", "Dense", "LayerNorm", "Dropout")
# Of sentence-transformers' settings; others name places to load from, or arguments of its loaders.
SETTINGS = {
    *("max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name"),
    *("unpad_inputs", "query_length", "document_length", "query_expansion"),
}
ARGUMENTS = ("model_args", "tokenizer_args", "config_args", "model_kwargs", "processor_kwargs", "config_kwargs")
# The first of these lists is bounded by the widest weight there is, the second by the number of weights.
WIDTHS = ("hidden_size", "dim", "intermediate_size", "hidden_dim", "vocab_size", "type_vocab_size", "embedding_size")
WIDTHS_OF_MODULES = ("in_features", "out_features", "dimension")
DEPTHS = ("num_hidden_layers", "n_layers", "num_attention_heads", "n_heads", "num_hidden_groups")
LABELS = ("id2label", "label2id", "added_tokens_decoder")  # whose keys are the user's words
MOST_POSITIONS = 1 << 20
MOST_HEADS = 1 << 12
MOST_LABELS = 1 << 17
AGAIN = "download or copy the folder again"


def check_folder(folder: Path) -> dict[str, Any]:
    """The config of a model folder that is safe and whole enough to open; else a UserError that says why not."""
    if not (folder / "config.json").is_file():
        raise UserError(
            "has no config.json, so it is not a model folder",
            where=str(folder),
            fix="name a folder saved by transformers or sentence-transformers",
        )
    config = check_texts(folder)
    shapes = _check_files(folder)
    _check_sizes(config, shapes, folder / "config.json")
    _check_settings(folder)
    for module in _modules(folder):
        _check_module(folder, module)
    return config


def check_texts(folder: Path) -> dict[str, Any]:
    """The config, after a look at all but the weights: what a tokenizer alone is opened from."""
    _check_links(folder)
    config = files.read_json(folder / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError("names no model_type", where=str(folder / "config.json"), fix=AGAIN)
    _check_code(folder, config)
    labels = config.get("num_labels")
    if not isinstance(labels, int | None) or (labels or 0) > MOST_LABELS:
        what = f"num_labels is {str(labels)[:20]}, and must be a whole number up to {MOST_LABELS:,}"
        raise UserError(what, where=str(folder / "config.json"), fix=AGAIN)
    return config


def _check_links(folder: Path) -> None:
    """Refuse links that lead out of the folder: what they name would be read, and copied into what is made of it.

    In the hub's cache a snapshot's files are links to the blobs beside it, and these are the model's own.
    """
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    inner = [path for path in folder.iterdir() if path.is_dir() and path.name[:1].isdigit()]
    for path in [*folder.iterdir(), *(below for each in inner for below in each.rglob("*"))]:
        if path.is_symlink() and (path.suffix in READ or path in inner or path.parent in inner):
            target = Path(os.path.realpath(path))
            if not any(target.is_relative_to(each) for each in homes):
                what = f"{path.relative_to(folder)} is a link that leads out of the folder"
                raise UserError(what, where=str(folder), fix="copy what it leads to into the folder, if you trust it")


def _check_code(folder: Path, config: dict[str, Any]) -> None:
    """Refuse what would load code: of the folder (auto_map), of the hub (kernels), or another model (adapters)."""
    for key, value in _entries(config):
        if key == "auto_map":
            raise UserError("wants to run code of its own (auto_map); such models are not opened", where=str(folder))
        if "attn_implementation" in key or "experts_implementation" in key:
            _check_attention(value, key, folder / "config.json")
    name = folder / "tokenizer_config.json"
    tokenizer = files.read_json(name) if name.is_file() else {}
    if not isinstance(tokenizer, dict) or any(key == "auto_map" for key, _ in _entries(tokenizer)):
        what = "wants to run code of its own (auto_map)" if isinstance(tokenizer, dict) else "is no JSON object"
        raise UserError(f"{what}; not opened", where=str(name), fix="name another model")
    if (folder / "adapter_config.json").exists():
        what = "holds an adapter (adapter_config.json), which would load another model; not opened"
        raise UserError(what, where=str(folder), fix="merge it into its model first, and name that folder")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys of nested JSON objects, with their values; without recursion, since depth is the maker's to choose."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            yield from each.items()
            waiting += [inner for key, inner in each.items() if key not in LABELS]
        elif isinstance(each, list):
            waiting += each


def _check_attention(value: Any, key: str, where: Path) -> None:
    for each in value.values() if isinstance(value, dict) else [value]:
        if not isinstance(each, str | None) or each not in ATTENTIONS:
            if isinstance(each, bool):
                continue  # "_attn_implementation_autoset", which older versions wrote
            what = f"names an attention of its own ({key}: {str(each)[:40]!r}), which would be code; not opened"
            raise UserError(what, where=str(where), fix=f"remove {key!r} from it")


def _check_files(folder: Path) -> dict[str, list[int]]:
    """The shapes of all weights, once it is sure that they are safetensors that lie in the folder."""
    weights = sorted(folder.glob("*.safetensors"))
    index = folder / INDEX
    if not weights or not ((folder / WEIGHTS).is_file() or index.is_file()):
        _refuse_pickles(folder)
        what = f"has no {WEIGHTS}" + (f", only {short_list([p.name for p in weights])}" if weights else "")
        raise UserError(what, where=str(folder), fix=AGAIN)
    if index.is_file():
        table = files.read_json(index)
        names = table.get("weight_map") if isinstance(table, dict) else None
        there = {path.name for path in weights}
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise UserError("has no weight_map", where=str(index), fix=AGAIN)
        if outside := sorted(set(names.values()) - there):
            what = f"names weights that are no .safetensors of this folder: {short_list(outside)}"
            raise UserError(what, where=str(index), fix=AGAIN)
    return {f"{file.name}/{name}": shape for file in weights for name, shape in check_weights(file).items()}


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise UserError(
            f"has its weights only as {short_list(pickles)}, a format that can run code when opened",
            where=str(folder),
            fix="have its maker save it as model.safetensors (save_pretrained does) on a machine you trust",
        )


def check_weights(file: Path) -> dict[str, list[int]]:
    """The shape of each weight of a file; a UserError where it is no whole safetensors file."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise UserError("is no regular file", where=str(file), fix=AGAIN)
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"is damaged: {error}", where=str(file), fix="download or copy the file again") from error


def _check_sizes(config: dict[str, Any], shapes: dict[str, list[int]], where: Path) -> None:
    """Refuse sizes that no weight has: memory is taken for them before anything is compared."""
    widest = max((side for shape in shapes.values() for side in shape), default=0)
    limits = dict.fromkeys(WIDTHS + WIDTHS_OF_MODULES, max(widest, 1))
    limits |= dict.fromkeys(DEPTHS, max(len(shapes), MOST_HEADS if "model_type" in config else 1))
    limits |= {"num_hidden_layers": len(shapes), "n_layers": len(shapes), "max_position_embeddings": MOST_POSITIONS}
    for key, value in config.items():
        most = limits.get(key)
        if most is None or value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"cannot be used: {key} is no whole number", where=str(where), fix=AGAIN)
        if not 0 < value <= most:
            what = f"its weights do not fit its config: {key} is {str(value)[:20]}, and must be 1 to {most:,} for these"
            raise UserError(what, where=str(where), fix=AGAIN)


def _check_settings(folder: Path) -> None:
    """Refuse sentence-transformers' settings that reach beyond the folder, or are not of the types they should be."""
    for path in sorted(folder.glob("sentence_*_config.json")):
        settings = files.read_json(path)
        if not isinstance(settings, dict):
            raise UserError("is no JSON object", where=str(path), fix=AGAIN)
        known = {*SETTINGS, *ARGUMENTS}
        if unknown := [key for key in settings if key not in known]:
            what = (
                f"has a setting that is not known to be safe: {unknown[0][:40]!r}{did_you_mean(unknown[0], [*known])}"
            )
            raise UserError(what, where=str(path), fix="remove it")
        if given := [key for key in ARGUMENTS if settings.get(key)]:
            raise UserError(f"hands arguments to the loaders ({given[0]}); not opened", where=str(path), fix="empty it")
        most = settings.get("max_seq_length")
        if not isinstance(most, int | None) or (most is not None and not 0 < most <= MOST_POSITIONS):
            what = f"max_seq_length is {str(most)[:20]}, and must be 1 to {MOST_POSITIONS:,}"
            raise UserError(what, where=str(path), fix="correct it, or remove it")
    path = folder / "config_sentence_transformers.json"
    about = files.read_json(path) if path.is_file() else {}
    prompts = about.get("prompts") if isinstance(about, dict) else 0
    if not isinstance(prompts, dict | None) or not all(isinstance(p, str | None) for p in (prompts or {}).values()):
        raise UserError("has prompts that are no texts", where=str(path), fix=AGAIN)


def _modules(folder: Path) -> list[dict[str, Any]]:
    """The entries of modules.json, each with a `path` inside of the folder and a `type` that is known."""
    where = folder / "modules.json"
    if not where.is_file():
        return []
    modules = files.read_json(where)
    for module in modules if isinstance(modules, list) and modules else [None]:
        path = module.get("path") if isinstance(module, dict) else None
        if not isinstance(path, str) or "\0" in path or Path(path).is_absolute() or ".." in Path(path).parts:
            raise UserError("names no module folder inside the model's", where=str(where))
        kind = str(module.get("type", "")) if isinstance(module, dict) else ""
        if not kind.startswith("sentence_transformers."):
            raise UserError(f"wants to run modules of its own ({kind[:60]}); not opened", where=str(folder))
        if kind.rpartition(".")[2] not in MODULES:
            what = f"is made of a module that is not used here ({kind[:60]}); known are {', '.join(MODULES)}"
            raise UserError(what, where=str(where), fix="name an encoder of the BERT family")
    kinds = [(module["type"].rpartition(".")[2], module["path"]) for module in modules]
    if kinds[0] != ("Transformer", "") or "Transformer" in [kind for kind, _ in kinds[1:]]:
        what = "does not begin with one Transformer, at the path ''"
        raise UserError(what, where=str(where), fix="name an encoder of the BERT family")
    return modules


def _check_module(folder: Path, module: dict[str, Any]) -> None:
    """Refuse a module whose weights are a pickle, or whose sizes are not those of its weights."""
    place = folder / module["path"]
    if not module["path"] or not place.is_dir():
        return
    if not (place / WEIGHTS).is_file():
        _refuse_pickles(place)
    shapes = check_weights(place / WEIGHTS) if (place / WEIGHTS).is_file() else {}
    config = files.read_json(place / "config.json") if (place / "config.json").is_file() else {}
    if not isinstance(config, dict):
        raise UserError("is no JSON object", where=str(place / "config.json"), fix=AGAIN)
    if shapes:
        _check_sizes(config, shapes, place / "config.json")
