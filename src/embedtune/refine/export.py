"""`refine export`: a model for other runtimes, with pooling, erasure, cut and normalisation inside, behind a gate.

The folder appears only if its vectors, computed from the folder alone, are near enough to the model's.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from embedtune import files
from embedtune.data.columns import parse_columns
from embedtune.data.example import docstrings
from embedtune.data.read import Counts, read_texts
from embedtune.encoder import embedder, heads, load
from embedtune.encoder.encode import LocalEncoder, Role, open_encoder, role_prompt
from embedtune.encoder.exported import FILE, Exported, is_export, need
from embedtune.errors import UserError
from embedtune.refine import graph, parity, sidecar, static
from embedtune.refine.erase import Texts, counted

Target = Literal["onnx", "onnx-int8", "openvino", "static"]
EXPORTERS = ("onnx", "onnxscript")  # of every target with a graph
NEAR = 200  # texts whose vectors are compared
FEWEST = 50  # texts, of which chance keeps a fifth of the neighbours
BLOCK = 2048
ROLES: tuple[Role, ...] = ("query", "document", "text")
PACKAGES = ("torch", "transformers", "sentence-transformers", "tokenizers", "onnx", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Wanted:
    """What is asked for."""

    to: Target
    dims: int | None = None  # the first so many numbers, normalised anew; of `static` the principal components
    loss: float | None = None  # how much of the dev measure may be lost; None: the target's own limit


@dataclass(frozen=True)
class Export:
    """A finished export."""

    folder: Path
    about: dict[str, Any]  # export.json
    parity: parity.Parity
    bytes: int
    remarks: tuple[str, ...]

    def lines(self) -> list[str]:
        """The result in words."""
        about = self.about
        shape = f"{about['dimension']:,} dimensions, {about['pooling']} pooling, at most {about['max_length']} tokens"
        if about["max_length"] is None:
            shape = f"{about['dimension']:,} dimensions, a mean over tokens, of any length"
        made = f"{self.folder}/ holds {about['to']}, {self.bytes / 1e6:,.1f} MB"
        return [f"{about['to']}: {shape}", *self.parity.lines(), *self.remarks, made]


def export(
    model: str,
    wanted: Wanted,
    out: str | Path,
    *,
    texts: Texts | None = None,
    dev: Any = None,
    note: Callable[[str], None] = lambda text: None,
) -> Export:
    """Write `out`, or nothing: a UserError says which figure is beyond its limit.

    `texts`: those that are compared; without them docstrings of this machine. `dev`: data as `parts.open_judged`
    gives it. A folder of that name is replaced.
    """
    source, counts = _source(model, wanted.to), Counts()
    stock = embedder.load_stock(source)
    _check(stock, wanted, str(source))
    few, rest = _texts(texts, counts)
    blocks = None if texts is None else chain([few], rest)
    note(f"exporting {model} to {wanted.to}")
    done: list[tuple[dict[str, Any], parity.Parity]] = []

    def fill(folder: Path) -> None:
        about = _write(stock, source, wanted, blocks, folder) | {"model": model}
        files.write_json(folder / FILE, about)
        note("comparing with the model")
        found = _measure(stock, source, wanted, few, dev, Exported(f"{model} as {wanted.to}", folder))
        if faults := found.faults():
            fix = "tell --loss how much may be lost, if it is the dev measure; else another --to"
            raise UserError(f"the export is refused: {' and '.join(faults)}", where=str(out), details=found.lines(),
                            fix=fix)  # fmt: skip
        about["parity"] = found.as_dict()
        files.write_json(folder / FILE, about)
        files.write_text(folder / "README.md", _card(about, found))
        done.append((about, found))

    with files.disk_errors(Path(out)):
        files.write_directory(Path(out), fill, {"kind": "export"})
    about, found = done[0]
    size = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())
    return Export(Path(out), about, found, size, tuple(counted(counts)))


def _source(model: str, to: Target) -> Path:
    """The folder of the model; a UserError, before anything is loaded, where it cannot be exported."""
    need(to, *(() if to == "static" else EXPORTERS))
    source = load.find(model)
    if is_export(source):
        raise UserError("is an export already", where=str(source), fix="name the model it was made from")
    if kind := heads.kind_of(source):
        what = f"is {heads.WORDS[kind]}; only embedding models are exported"
        raise UserError(what, where=str(source), fix="transformers' own tools export models with a head")
    return source


def _check(stock: Any, wanted: Wanted, where: str) -> None:
    """Refuse what a graph of ids and mask cannot say."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Router

    if any(isinstance(module, Router) for module in stock):
        raise UserError("has different encoders for queries and documents", where=where, fix="export one encoder")
    pooling = [module for module in stock if isinstance(module, Pooling)]
    if not pooling:
        raise UserError("has no pooling, so it is no encoder of whole texts", where=where, fix="name another model")
    if not pooling[0].include_prompt and any(role_prompt(stock, role) for role in ROLES):
        raise UserError("leaves its prompt out of the pooling, which ids and mask cannot tell", where=where,
                        fix="serve it with embedtune")  # fmt: skip
    most = stock.get_embedding_dimension()
    if wanted.dims is not None and not 1 <= wanted.dims <= most:
        raise UserError(f"must be from 1 to {most:,}, the model's own", where="--dims")
    # Every model can compute attention this way, and runtimes fuse it themselves.
    stock[0].model.set_attn_implementation("eager")


def _texts(texts: Texts | None, counts: Counts) -> tuple[list[str], Iterator[list[str]]]:
    """The texts that are compared, and the rest of them in blocks."""
    if texts is None:
        return [text for text in docstrings(NEAR) if text], iter(())
    rows = read_texts(texts.data, columns=parse_columns(texts.columns), bad_rows=texts.bad_rows, counts=counts)
    stream = (row.values["text"] for row in islice(rows, texts.rows))
    few = list(islice(stream, NEAR))
    if len(few) < FEWEST:
        what = f"{len(few)} texts are too few to tell a good export from a bad one: {FEWEST} at least"
        raise UserError(what, where=str(texts.data), fix="give some hundreds, or leave --data out")
    return few, iter(lambda: list(islice(stream, BLOCK)), [])


def _write(
    stock: Any, source: Path, wanted: Wanted, blocks: Iterator[list[str]] | None, folder: Path
) -> dict[str, Any]:
    """Write the model and its tokenizer; what export.json says of them."""
    tokenizer = Tokenizer.from_str(stock.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    is_static = wanted.to == "static"
    if is_static:
        shares = None if blocks is None else static.frequencies(tokenizer, blocks)
        rows, coefficient = static.table(static.token_vectors(stock, tokenizer), shares, wanted.dims)
        static.write_static(rows, coefficient, str(source.name), folder)
        dimension = rows.shape[1]
    else:
        _write_graph(stock, wanted, tokenizer, folder)
        dimension = wanted.dims or stock.get_embedding_dimension()
    files.write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    erased = sidecar.read_about(source)["concepts"] if (source / sidecar.ABOUT).is_file() else []
    return {
        "to": wanted.to,
        "model_sha256": embedder.identity(source),
        "architecture": stock[0].model.config.model_type,
        "dimension": dimension,
        "pooling": "mean" if is_static else _pooling(stock),
        "normalised": is_static or graph.ends_normalised(stock),
        "max_length": None if is_static else stock.max_seq_length,
        "prompts": {role: "" if is_static else role_prompt(stock, role) for role in ROLES},
        "erased": [concept["name"] for concept in erased],
        "inputs": [] if is_static else list(graph.INPUTS),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _write_graph(stock: Any, wanted: Wanted, tokenizer: Tokenizer, folder: Path) -> None:
    """The graph; and the tokenizer made to cut and pad as the model does."""
    graph.write_onnx(graph.Pipeline(stock, wanted.dims), folder)
    if wanted.to == "onnx-int8":
        graph.quantise(folder)
    if wanted.to == "openvino":
        graph.write_openvino(folder)
    own = stock.tokenizer
    if stock.max_seq_length is not None:
        tokenizer.enable_truncation(stock.max_seq_length, direction=own.truncation_side)
    tokenizer.enable_padding(pad_id=own.pad_token_id or 0, pad_token=own.pad_token or "[PAD]",
                             direction=own.padding_side)  # fmt: skip


def _measure(stock: Any, source: Path, wanted: Wanted, few: list[str], dev: Any, made: Exported) -> parity.Parity:
    """Held against sentence-transformers' own vectors; the dev set against ours, which are the same, faster."""
    texts = [*few, " ".join(few)]  # the last one is longer than what the model reads
    is_static = wanted.to == "static"
    cut = {} if is_static or wanted.dims is None else {"truncate_dim": wanted.dims}
    again = bool(cut) and graph.ends_normalised(stock)
    stored = stock.encode(texts, prompt=role_prompt(stock, "text"), normalize_embeddings=again, show_progress_bar=False,
                          **cut)  # fmt: skip
    limits = parity.LIMITS[wanted.to]
    if wanted.loss is not None:
        limits = replace(limits, loss=wanted.loss)
    near = parity.nearness(stored, made.encode(texts))
    if is_static:  # numbers of other axes
        near = replace(near, difference=None, cosine=None)
    if dev is None:
        return parity.Parity(near, None, limits)
    reference = open_encoder(str(source))
    if cut and isinstance(reference, LocalEncoder):
        reference.model.truncate_dim = wanted.dims
        reference.dimension = wanted.dims or reference.dimension
    return parity.Parity(near, parity.judge_dev(reference, made, dev), limits)


def _pooling(stock: Any) -> str:
    modes = next(module.pooling_mode for module in stock if hasattr(module, "pooling_mode"))
    return modes if isinstance(modes, str) else "+".join(modes)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _card(about: dict[str, Any], found: parity.Parity) -> str:
    lines = "\n".join(f"- {line}" for line in found.lines())
    return (
        f"# {about['model']} as {about['to']}\n\nMade with embedtune. `export.json` says what was exported; how to use "
        f"it with its runtime and `tokenizers` alone stands in embedtune's docs/export.md.\n\n{lines}\n"
    )
