"""Model folders that mean harm: data, not tests. Each is a function that spoils a copy of a good folder.

Whatever would run is aimed at the file that `canary()` names: a test looks whether it is there.
"""

import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

WHERE = "EMBEDTUNE_CANARY"


def canary():
    return Path(os.environ[WHERE])


class Exploit:
    """A pickle of it makes the canary when it is opened."""

    def __reduce__(self):
        return os.mkdir, (str(canary()),)


def code():
    return f"import os\nos.mkdir({str(canary())!r})\n"


def pickled():
    return pickle.dumps(Exploit())


def zipped(name="archive/data.pkl"):
    """As torch.save writes it."""
    path = canary().with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, pickled())
        archive.writestr("archive/version", "3\n")
    content = path.read_bytes()
    path.unlink()
    return content


def objects():
    """As numpy writes an array of objects, and an .npz of one."""
    path = canary().with_suffix(".npy")
    np.save(path, np.array([Exploit()], object), allow_pickle=True)
    content = path.read_bytes()
    path.unlink()
    return content


def changed(name, **values):
    def spoil(folder):
        path = folder / name
        found = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**found, **values}))

    return spoil


def written(name, content):
    def spoil(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        whole = content() if callable(content) else content
        (folder / name).write_bytes(whole.encode() if isinstance(whole, str) else whole)

    return spoil


def modules(*entries):
    """modules.json with the folder's own Transformer before these (type, path), or instead where they begin with it."""

    def spoil(folder):
        own = [("sentence_transformers.models.Transformer", "")]
        rows = [
            {"idx": n, "name": str(n), "type": kind, "path": path} for n, (kind, path) in enumerate([*own, *entries])
        ]
        (folder / "modules.json").write_text(json.dumps(rows))

    return spoil


def linked(name, target):
    def spoil(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.unlink()
        path.symlink_to(target(folder) if callable(target) else target)

    return spoil


def both(*spoils):
    def spoil(folder):
        for each in spoils:
            each(folder)

    return spoil


def removed(*names):
    def spoil(folder):
        for name in names:
            (folder / name).unlink()

    return spoil


def header(text, rest=bytes(64)):
    """A safetensors file with this header."""
    head = text.encode()
    return written("model.safetensors", struct.pack("<Q", len(head)) + head + rest)


def tensor(shape, low, high, kind="F32"):
    return {"dtype": kind, "shape": shape, "data_offsets": [low, high]}


def with_weights(change):
    def spoil(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return spoil


def fill(value):
    def change(weights):
        for each in weights.values():
            each.fill_(value)

    return with_weights(change)


def moved_out(folder):
    """Weights outside of the folder, with a link to them inside."""
    shutil.move(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


SECRET = "secret.txt"  # lies beside the folder; no output may hold what is in it
ST = "sentence_transformers"
REMOTE = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForMaskedLM": "evil.Model"}
DENSE = {"in_features": 32, "out_features": 32, "bias": True, "activation_function": "torch.nn.modules.linear.Identity"}
EVIL = written("evil.py", code)

MODELS = {
    # code of the folder
    "auto_map": both(EVIL, changed("config.json", auto_map=REMOTE)),
    "auto_map without a type": both(EVIL, changed("config.json", auto_map=REMOTE, model_type="evil")),
    "auto_map further in": both(EVIL, changed("config.json", text_config={"auto_map": REMOTE})),
    "auto_map to another repository": changed("config.json", auto_map={"AutoModel": "evil/repo--evil.Model"}),
    "auto_map of the tokenizer": both(
        EVIL, changed("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    ),
    "a tokenizer class of its own": both(EVIL, changed("tokenizer_config.json", tokenizer_class="evil.Tokenizer")),
    "a processor of its own": both(
        EVIL, changed("processor_config.json", processor_class="P", auto_map={"AutoProcessor": "evil.P"})
    ),
    "an attention from the hub": changed("config.json", attn_implementation="evil/kernel"),
    "an attention from the hub, inside": changed("config.json", _attn_implementation_internal="evil/kernel"),
    "an attention with a revision": changed("config.json", _attn_implementation="evil/kernel@main:f"),
    "experts from the hub": changed("config.json", _experts_implementation_internal="evil/kernel"),
    "an attention further in": changed("config.json", vision_config={"attn_implementation": "evil/kernel"}),
    "an attention that is a list": changed("config.json", attn_implementation=["evil/kernel"]),
    "module of its own": both(EVIL, modules(("evil.Module", ""))),
    "module of the standard library": modules(("os.system", "id")),
    "module that is a function": modules((f"{ST}.util.http_get", "")),
    "module that trains": modules((f"{ST}.models.Router", "r")),
    "module with its own tokenizer": both(
        modules((f"{ST}.models.WordEmbeddings", "w")),
        written("w/wordembedding_config.json", json.dumps({"tokenizer_class": "evil.T"})),
    ),
    "activation that is a function": both(
        modules((f"{ST}.models.Dense", "d")),
        written("d/config.json", json.dumps({**DENSE, "activation_function": "os.system"})),
    ),
    "activation that loads": both(
        modules((f"{ST}.models.Dense", "d")),
        written("d/config.json", json.dumps({**DENSE, "activation_function": "torch.hub.load"})),
    ),
    "loader arguments": changed(
        "sentence_bert_config.json", model_args={"trust_remote_code": True, "use_safetensors": False}
    ),
    "loader arguments, newer": changed(
        "sentence_bert_config.json", model_kwargs={"attn_implementation": "evil/kernel"}
    ),
    "a tokenizer from elsewhere": changed("sentence_bert_config.json", tokenizer_name_or_path="evil/tokenizer"),
    "settings by another name": both(
        removed("sentence_bert_config.json"), changed("sentence_roberta_config.json", model_args={"subfolder": ".."})
    ),
    "an adapter": written(
        "adapter_config.json", json.dumps({"base_model_name_or_path": "evil/model", "peft_type": "LORA"})
    ),
    "a template": changed("tokenizer_config.json", chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "a template in a file": written("chat_template.jinja", "{% for x in range(10**9) %}{{ x }}{% endfor %}"),
    # pickles
    "pickle beside": written("pytorch_model.bin", zipped),
    "pickle instead": both(removed("model.safetensors"), written("pytorch_model.bin", zipped)),
    "pickle of old form": both(removed("model.safetensors"), written("pytorch_model.bin", pickled)),
    "pickle by the name of weights": written("model.safetensors", pickled),
    "zip by the name of weights": written("model.safetensors", zipped),
    "pickle beside other weights": both(
        lambda folder: (folder / "model.safetensors").rename(folder / "decoy.safetensors"),
        written("pytorch_model.bin", zipped),
    ),
    "pickle in the index": both(
        removed("model.safetensors"),
        written("x.safetensors", zipped),
        written("model.safetensors.index.json", json.dumps({"weight_map": {"a": "pytorch_model.bin"}})),
    ),
    "pickle of a module": both(
        modules((f"{ST}.models.Dense", "d")),
        written("d/pytorch_model.bin", zipped),
        written("d/config.json", json.dumps(DENSE)),
    ),
    "weights of tensorflow": both(removed("model.safetensors"), written("tf_model.h5", pickled)),
    "weights of flax": both(removed("model.safetensors"), written("flax_model.msgpack", pickled)),
    # ways out of the folder
    "module above": modules((f"{ST}.models.Pooling", "../outside")),
    "module from the root": modules((f"{ST}.models.Pooling", "/etc")),
    "module with a nul": modules((f"{ST}.models.Pooling", "a\0b")),
    "module through a link": both(
        linked("2_Pooling", lambda folder: folder.parent), modules((f"{ST}.models.Pooling", "2_Pooling"))
    ),
    "file of a module through a link": linked("1_Pooling/notes.txt", lambda folder: folder.parent / SECRET),
    "vocabulary through a link": linked("vocab.txt", lambda folder: folder.parent / SECRET),
    "template through a link": linked("chat_template.jinja", lambda folder: folder.parent / SECRET),
    "weights through a link": moved_out,
    "weights in the index from above": both(
        removed("model.safetensors"),
        written("x.safetensors", b""),
        written("model.safetensors.index.json", json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}})),
    ),
    "weights in the index from the root": written(
        "model.safetensors.index.json", json.dumps({"weight_map": {"a": "/etc/passwd"}})
    ),
    "vocabulary by a path": changed("tokenizer_config.json", vocab_file="/etc/passwd", tokenizer_file="/etc/passwd"),
    # sizes, and weights that are none
    "header of 2^63 bytes": written("model.safetensors", b"\xff" * 7 + b"\x7f{}"),
    "header of 200 megabytes": written("model.safetensors", struct.pack("<Q", 200 << 20) + b"{}"),
    "header that is deep": header('{"a":' + "[" * 100_000),
    "header of 100,000 weights": header(json.dumps({f"w{n}": tensor([0], 0, 0) for n in range(100_000)})),
    "weights that overlap": header(json.dumps({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)})),
    "weights beyond the file": header(json.dumps({"a": tensor([2**40], 0, 2**42)})),
    "shape that overflows": header(json.dumps({"a": tensor([2**33, 2**33], 0, 8)})),
    "weights below zero": header('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}'),
    "dtype that is none": header(json.dumps({"a": tensor([2], 0, 8, "OBJ")})),
    "no weights": header("{}", b""),
    "weights of NaN": fill(float("nan")),
    "weights of infinity": fill(float("inf")),
    "hidden size of 10^9": changed("config.json", hidden_size=10**9),
    "vocabulary of 10^12": changed("config.json", vocab_size=10**12),
    "10^9 layers": changed("config.json", num_hidden_layers=10**9),
    "no layers": changed("config.json", num_hidden_layers=-1),
    "heads of zero": changed("config.json", num_attention_heads=0),
    "positions of 10^15": changed("config.json", max_position_embeddings=10**15),
    "sizes that are texts": changed("config.json", hidden_size="{{7*7}}"),
    "a module of 10^12": both(
        modules((f"{ST}.models.Dense", "d")),
        lambda folder: (folder / "d").mkdir(),
        lambda folder: save_file({"linear.weight": torch.ones(2, 2)}, folder / "d" / "model.safetensors"),
        written("d/config.json", json.dumps({**DENSE, "in_features": 10**6, "out_features": 10**6})),
    ),
    "an activation that is none": changed("config.json", hidden_act="__import__('os').getcwd()"),
    "a label for each of 10^7": changed("config.json", num_labels=10**7, id2label=None),
    "layers of another kind": changed("config.json", model_type="gpt2"),
    "quantised": changed("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
    # settings that are not what they should be
    "config that is a list": written("config.json", "[]"),
    "config that is deep": written("config.json", '{"model_type": "bert", "a": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "config of many digits": written("config.json", '{"model_type": "bert", "hidden_size": ' + "9" * 10**6 + "}"),
    "config that is a pipe": both(removed("config.json"), lambda folder: os.mkfifo(folder / "config.json")),
    "weights that are a pipe": both(
        removed("model.safetensors"), lambda folder: os.mkfifo(folder / "model.safetensors")
    ),
    "tokenizer that is a pipe": both(removed("tokenizer.json"), lambda folder: os.mkfifo(folder / "tokenizer.json")),
    "config without an end": linked("config.json", "/dev/zero"),
    "modules that are an object": written("modules.json", "{}"),
    "modules that are deep": written("modules.json", "[" * 100_000 + "]" * 100_000),
    "no modules": written("modules.json", "[]"),
    "settings that are a list": written("sentence_bert_config.json", "[]"),
    "a length below zero": changed("sentence_bert_config.json", max_seq_length=-5),
    "a length of words": changed("sentence_bert_config.json", max_seq_length="many"),
    "a length of 10^18": changed("tokenizer_config.json", model_max_length=10**18),
    "a length of words, of the tokenizer": changed("tokenizer_config.json", model_max_length="many"),
    "prompts that are numbers": changed("config_sentence_transformers.json", prompts={"query": 7}),
    "prompts that are a text": changed("config_sentence_transformers.json", prompts="query: "),
    "a similarity of its own": changed("config_sentence_transformers.json", similarity_fn_name="os.system"),
    "pooling of nothing": written(
        "1_Pooling/config.json", json.dumps({"word_embedding_dimension": 32, "pooling_mode": "evil"})
    ),
    "pooling that is a list": written("1_Pooling/config.json", "[]"),
    "tokenizer that is none": written("tokenizer.json", '{"version": "1.0", "model": {"type": "Evil"}}'),
    "tokenizer that is deep": written("tokenizer.json", '{"version": "1.0", "model": ' + "[" * 100_000),
    "tokenizer with a slow pattern": lambda folder: slow_pattern(folder),
    "tokenizer of ids beyond": lambda folder: ids_beyond(folder),
}


def slow_pattern(folder):
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    found["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(found))


def ids_beyond(folder):
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    found["model"]["vocab"] = {word: number + 2**31 for word, number in found["model"]["vocab"].items()}
    path.write_text(json.dumps(found))
