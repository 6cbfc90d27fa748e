"""The seam between models and all that uses vectors: texts in, one matrix out, whoever computes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from embedtune import files
from embedtune.encoder import embedder, exported, load
from embedtune.encoder.device import fast_precision, pick_device
from embedtune.encoder.embed import WINDOW, Embedded, embed
from embedtune.encoder.embedder import Precision
from embedtune.errors import UserError
from embedtune.nearest import Rows, Scratch

Role = Literal["query", "document", "text"]
# What sentence-transformers' encode_query and encode_document look for among a model's prompts.
PROMPT_NAMES: dict[str, tuple[str, ...]] = {"query": ("query",), "document": ("document", "passage", "corpus")}
HOSTED = ("openai:", "vertex:")
MEMORY = 1 << 26  # bytes of vectors that are kept in memory; more of them lie on the disk
AT_ONCE = 1 << 14  # texts that an encoder which does not stream is given for them
Note = Callable[[str], None]


class Encoder(Protocol):
    """Anything that turns texts into vectors."""

    name: str
    dimension: int

    def encode(self, texts: Sequence[str], role: Role = "text") -> np.ndarray:
        """Vectors (n, D) float32 of texts in a role; a query may have another prompt than a document."""


class LocalEncoder:
    """A sentence-transformers model on this machine, padding-free where its architecture allows it."""

    def __init__(self, name: str, model: Any, max_tokens: int | None = None) -> None:
        self.name, self.model, self.max_tokens = name, model, max_tokens
        self.dimension = int(model.get_embedding_dimension())
        self.truncated = 0  # texts longer than the model reads, so far

    def encode(self, texts: Sequence[str], role: Role = "text") -> np.ndarray:
        """Vectors (n, D) float32, as encode_query or encode_document of the model gives them."""
        parts = [part.vectors for part in self.stream(texts, role)]
        return np.concatenate(parts or [np.zeros((0, self.dimension), np.float32)])

    def stream(self, texts: Iterable[str], role: Role = "text", prompt: str | None = None) -> Iterator[Embedded]:
        """The same as a stream; `prompt`, where it is given, stands in place of the role's."""
        prompt = role_prompt(self.model, role) if prompt is None else prompt
        for part in embed(self.model, texts, max_tokens=self.max_tokens, prompt=prompt):
            self.truncated += part.truncated
            yield part


def role_prompt(model: Any, role: Role) -> str:
    """The prompt that a model puts before texts of this role; '' where it has none.

    As in sentence-transformers the first name that is there decides, even where its prompt is empty.
    """
    names = [*PROMPT_NAMES.get(role, ()), model.default_prompt_name]
    return next((model.prompts[name] or "" for name in names if name in model.prompts), "")


def stream(
    encoder: Encoder, texts: Iterable[str], role: Role = "text", prompt: str | None = None, window: int = WINDOW
) -> Iterator[Embedded]:
    """Vectors of a stream of texts by any encoder, one `Embedded` per WINDOW texts; memory is flat.

    `prompt`, where it is given, stands before each text instead of what the model has for the role. An encoder that
    does not stream is given `window` texts at once.
    """
    if isinstance(encoder, LocalEncoder | exported.Exported):
        yield from encoder.stream(texts, role, prompt)
        return
    if prompt is not None:
        raise UserError("takes no prompt of ours", where=encoder.name, fix="leave out --prompt")
    rest = iter(texts)
    while some := list(islice(rest, window)):
        yield Embedded(encoder.encode(some, role), np.zeros(len(some), np.int64))


def vectors_of(encoder: Encoder, texts: Collection[str], role: Role) -> Rows:
    """The vectors (N, D) float32 of many texts; above MEMORY bytes they lie in a scratch file that has no name.

    They are the same numbers wherever they lie. Raises UserError where the disk has no room for them.
    """
    parts = (part.vectors for part in stream(encoder, texts, role, window=AT_ONCE))
    size = 4 * len(texts) * encoder.dimension
    if size <= MEMORY:
        return np.concatenate([*parts] or [np.zeros((0, encoder.dimension), np.float32)])
    place, rows, width = files.scratch_folder(), 0, encoder.dimension
    files.need_space(place, size, f"embedding {len(texts):,} texts", "set TMPDIR to a place with more room")
    scratch = files.scratch(place)
    for part in parts:
        with files.disk_errors(place):
            scratch.write(np.asarray(part, np.float32).tobytes())
        rows, width = rows + len(part), part.shape[1]
    with files.disk_errors(place):
        scratch.flush()
    return Scratch(scratch, (rows, width))


def identity(name: str) -> str:
    """What tells models apart whose vectors may not be mixed: a sha256, or the name of a hosted model."""
    return name if name.startswith(HOSTED) else embedder.identity(load.find(name))


def hosted_cache() -> Path:
    """Where vectors of hosted models are kept: EMBEDTUNE_CACHE, else the user's cache folder."""
    return Path(os.environ.get("EMBEDTUNE_CACHE") or Path.home() / ".cache" / "embedtune")


def is_local(name: str) -> bool:
    """Whether a name is that of weights to be run here: of no hosted model and no export."""
    return not name.startswith(HOSTED) and not exported.is_export(load.find(name))


def usual_precision(name: str) -> Precision:
    """What many texts are embedded in: the faster of the device's own; exports and hosted models have theirs."""
    return fast_precision(pick_device()) if is_local(name) else "fp32"


def open_encoder(
    name: str,
    *,
    precision: Precision = "fp32",
    pooling: str | None = None,
    cache: Path | None = None,
    price: float | None = None,
    note: Note = lambda text: None,
) -> Encoder:
    """A model folder, an exported one, a hub name, the offline package's name, `openai:MODEL` or `vertex:MODEL`.

    Vectors of hosted models are kept in `cache` (default: `hosted_cache()`), and their cost is counted at `price` per
    million tokens. `pooling` ("cls" or "mean") is for a folder that does not say how its vectors are pooled.
    Raises UserError where there is no such model, or its key, package or network is missing.
    """
    if name.startswith(HOSTED):
        from embedtune.encoder.hosted import open_hosted

        return open_hosted(name, cache=cache or hosted_cache(), price=price, note=note)
    folder = load.find(name)
    if exported.is_export(folder):
        if precision != "fp32" or pooling:
            fix = "leave out --precision and --pooling"
            raise UserError("is an export: its arithmetic and its pooling are fixed", where=name, fix=fix)
        return exported.open_exported(name, folder)
    model, padded = embedder.load_embedder(folder, precision)
    if pooling:
        embedder.set_pooling(model, folder, pooling)
    if padded:
        note(f"{name} runs padded, sorted by length: {padded}")
    return LocalEncoder(name, model)
