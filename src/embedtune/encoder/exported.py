"""Models that `refine export` wrote, as encoders: tokenizers and one runtime, without the stock model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from embedtune import files
from embedtune.data.tokens import encode_cut
from embedtune.encoder.embed import WINDOW, Embedded, batches
from embedtune.errors import UserError
from embedtune.nearest import unit

FILE = "export.json"
GRAPH, IR, TABLE = "model.onnx", "model.xml", "model.safetensors"
STATIC = "static"
# What a target needs: packages by their import names, and the extra that brings them.
NEEDS = {
    "onnx": ("onnx", ("onnxruntime",)),
    "onnx-int8": ("onnx", ("onnxruntime",)),
    "openvino": ("openvino", ("openvino",)),
    STATIC: ("", ()),
}
INPUTS = ("input_ids", "attention_mask")
Run = Callable[[list[list[int]]], np.ndarray]  # token rows in, vectors (B, D) out


class Exported:
    """An exported folder as an `Encoder`. Rows are sorted by length and padded under a budget of `max_tokens`."""

    def __init__(self, name: str, folder: Path, max_tokens: int = 8192) -> None:
        about = read_about(folder)
        self.name, self.max_tokens, self.truncated = name, max_tokens, 0
        self.dimension, self.prompts = int(about["dimension"]), dict(about["prompts"])
        self.special = about["to"] != STATIC
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        pad = (self.tokenizer.padding or {"pad_id": 0})["pad_id"]
        cuts = self.tokenizer.truncation
        self.read = cuts["max_length"] if cuts and cuts["direction"] == "right" else None  # tokens of a text
        self.tokenizer.no_padding()  # rows are padded here, once they are sorted
        self.run = _runtime(about["to"], folder, pad)

    def encode(self, texts: Sequence[str], role: str = "text") -> np.ndarray:
        """Vectors (n, D) float32 of texts in a role, each after the role's prompt."""
        parts = [part.vectors for part in self.stream(texts, role)]
        return np.concatenate(parts or [np.zeros((0, self.dimension), np.float32)])

    def stream(self, texts: Iterable[str], role: str = "text", prompt: str | None = None) -> Iterator[Embedded]:
        """The same as a stream; `prompt`, where it is given, stands in place of the role's."""
        prompt, rest = self.prompts.get(role, "") if prompt is None else prompt, iter(texts)
        while some := [prompt + text for text in islice(rest, WINDOW)]:
            rows = encode_cut(partial(self.tokenizer.encode_batch, add_special_tokens=self.special), some, self.read)
            sizes = np.array([len(row.ids) for row in rows], np.int64)
            order = np.argsort(-sizes, kind="stable")
            vectors = np.zeros((len(rows), self.dimension), np.float32)
            for part in batches(sizes[order], self.max_tokens, padded=True):
                vectors[order[part]] = self.run([rows[i].ids for i in order[part]])
            cut = sum(bool(row.overflowing) for row in rows)
            self.truncated += cut
            yield Embedded(vectors, sizes, cut)


def is_export(folder: Path) -> bool:
    """Whether a folder is the work of `refine export`."""
    return (folder / FILE).is_file()


def read_about(folder: Path) -> dict[str, Any]:
    """export.json. Raises UserError where it is not what this version writes."""
    about = files.read_json(folder / FILE)
    wanted = {"to", "dimension", "prompts"}
    if not isinstance(about, dict) or not wanted <= about.keys() or about["to"] not in NEEDS:
        raise UserError("is not an export that this version reads", where=str(folder / FILE), fix="export it again")
    return about


def open_exported(name: str, folder: Path) -> Exported:
    """An exported folder as an encoder. Raises UserError where it is damaged or its runtime is missing."""
    if wrong := files.damage(folder):
        raise UserError(f"is damaged: {wrong}", where=str(folder), fix="export it again")
    return Exported(name, folder)


def need(to: str, *others: str) -> None:
    """Raise UserError, with the line that installs it, where a package that a target needs is not there."""
    from importlib.util import find_spec

    extra, packages = NEEDS[to]
    if missing := [package for package in (*packages, *others) if find_spec(package) is None]:
        what = f"{to} needs {'another package' if len(missing) == 1 else 'other packages'}: {', '.join(missing)}"
        raise UserError(what, fix=f"pip install 'embedtune[{extra}]'")


def _runtime(to: str, folder: Path, pad: int) -> Run:
    need(to)
    if to == STATIC:
        return _table(folder / TABLE)
    call = _openvino(folder / IR) if to == "openvino" else _onnxruntime(folder / GRAPH)

    def run(rows: list[list[int]]) -> np.ndarray:
        longest = max(map(len, rows))
        ids = np.array([row + [pad] * (longest - len(row)) for row in rows], np.int64)
        mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows], np.int64)
        return call(dict(zip(INPUTS, (ids, mask), strict=True)))

    return run


def _onnxruntime(graph: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return lambda given: session.run(None, given)[0]


def _openvino(graph: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    import openvino

    # Without the hint OpenVINO computes in bf16 where the processor has it.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(str(graph), "CPU", settings)
    return lambda given: compiled(given)[0]


def _table(weights: Path) -> Run:
    from safetensors.numpy import load

    table = load(weights.read_bytes())["embeddings"]

    def run(rows: list[list[int]]) -> np.ndarray:
        return unit(np.stack([table[row].sum(axis=0) for row in rows]))

    return run
