"""Models behind an address: OpenAI-compatible services and Vertex, with retries, a cache on disk and a cost count."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from embedtune import files
from embedtune.encoder import calls
from embedtune.encoder.calls import Note, Refused
from embedtune.errors import UserError

if TYPE_CHECKING:
    from embedtune.encoder.encode import Encoder, Role

SHORTEST = 500  # characters: a text that is refused for its length is cut by halves, but not below this
LENGTH = re.compile(r"too (?:large|long|many)|length|token|context|limit|maximum|exceed|batch|size", re.I)
BATCH = re.compile(r"batch|inputs|items|array|instances", re.I)
TASKS = {"query": "RETRIEVAL_QUERY", "document": "RETRIEVAL_DOCUMENT", "text": "SEMANTIC_SIMILARITY"}


class Answer(NamedTuple):
    """One list of numbers per text, the tokens the service counted, and how many texts it cut by itself."""

    vectors: list[Any]
    tokens: int
    cut: int = 0


class Service(NamedTuple):
    """How to ask a model: (texts, role) -> Answer; its address for the cache; the most that one call may hold."""

    ask: Callable[[Sequence[str], str], Answer]
    address: str
    roles: bool  # whether the service is told the role, so that vectors differ by it
    items: int
    characters: int


def open_hosted(
    name: str,
    *,
    base_url: str | None = None,
    cache: Path | None = None,
    note: Note = lambda text: None,
    price: float | None = None,
) -> Encoder:
    """`openai:MODEL` (any compatible service: `base_url`, or OPENAI_BASE_URL) or `vertex:MODEL` as an Encoder.

    Keys come from the environment: OPENAI_API_KEY; for Vertex GOOGLE_CLOUD_PROJECT with the machine's Google
    credentials, or GOOGLE_API_KEY. `cache` is a folder in which vectors are kept: what is there is never asked for
    again. `price`, per million tokens, makes `usage["cost"]`. One short text is asked for at once, to learn the
    dimension and to fail early.
    Raises UserError where the name, a package, a key or the network is missing.
    """
    kind, _, model = name.partition(":")
    if kind not in ("openai", "vertex") or not model.strip():
        raise UserError("is no hosted model", where=name, fix="openai:MODEL or vertex:MODEL")
    service = _openai(model, base_url, name, note) if kind == "openai" else _vertex(model, base_url, name)
    kept = None
    if cache is not None:
        mark = hashlib.sha256(f"{kind} {service.address} {model}".encode()).hexdigest()[:8]
        kept = Cache(Path(cache) / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', model)}-{mark}", note)
    return HostedEncoder(name, service, kept, note, price)


class HostedEncoder:
    """An Encoder that asks a service; `usage` counts what was asked for, and what it cost; `dimension` is D."""

    def __init__(self, name: str, service: Service, cache: Cache | None, note: Note, price: float | None) -> None:
        self.name, self.service, self.cache, self.note, self.price = name, service, cache, note, price
        self.items = service.items
        self.usage: dict[str, Any] = dict.fromkeys(
            ("texts", "cached", "blank", "cut", "requests", "retries", "characters", "tokens"), 0
        )
        self.usage["cost"] = None if price is None else 0.0
        self.dimension = 0
        self.encode(["dimension"])
        self.usage |= {"texts": 0, "cached": 0}

    @property
    def truncated(self) -> int:
        """Texts that were longer than the model reads, so far."""
        return self.usage["cut"]

    def encode(self, texts: Sequence[str], role: Role = "text") -> np.ndarray:
        """Vectors (n, D) float32, as the service gives them (not normalised by us); a blank text is all zeros.

        Each distinct text is asked for once. A text that is refused for its length is cut by halves until it is
        taken, and counted in `usage["cut"]`. Raises UserError where the service fails for good, or answers with
        another number of vectors, another dimension, or numbers that are not finite.
        """
        keys = [self._key(text, role) if text.strip() else None for text in texts]
        wanted = {key: text for key, text in zip(keys, texts) if key is not None}
        known = self.cache.get(wanted) if self.cache is not None else {}
        self.usage["texts"] += len(texts)
        self.usage["cached"] += len(known)
        self.usage["blank"] += keys.count(None)
        for vector in known.values():
            self._check(vector[None])
        for batch in self._batches([key for key in wanted if key not in known], wanted):
            vectors = self._vectors([wanted[key] for key in batch], role)
            if self.cache is not None:
                self.cache.put(batch, vectors)
            known.update(zip(batch, vectors))
        out = np.zeros((len(texts), self.dimension), np.float32)
        for row, key in enumerate(keys):
            if key is not None:
                out[row] = known[key]
        return out

    def _key(self, text: str, role: str) -> bytes:
        told = role if self.service.roles else ""
        try:
            return hashlib.sha256("\0".join((self.name, told, text)).encode()).digest()
        except UnicodeEncodeError as error:
            what = f"a text has half a surrogate pair, which is no character: {ascii(text[:40])}"
            raise UserError(what, where=self.name, fix="mend or leave out that text") from error

    def _batches(self, keys: list[bytes], texts: dict[bytes, str]) -> Iterator[list[bytes]]:
        batch: list[bytes] = []
        characters = 0
        for key in keys:
            length = len(texts[key])
            if batch and (len(batch) >= self.items or characters + length > self.service.characters):
                yield batch
                batch, characters = [], 0
            batch.append(key)
            characters += length
        if batch:
            yield batch

    def _vectors(self, texts: list[str], role: str, *, whole: bool = True) -> np.ndarray:
        """Vectors of one call's texts; what is refused for its size is asked for in halves."""
        try:
            answer = calls.call(lambda: self.service.ask(texts, role), self.name, self.note, self.usage)
        except Refused as refused:
            words = str(refused)
        else:
            self.usage["characters"] += sum(map(len, texts))
            self.usage["tokens"] += answer.tokens
            self.usage["cut"] += answer.cut
            if self.price is not None:
                self.usage["cost"] = self.usage["tokens"] * self.price / 1e6
            return self._matrix(answer.vectors, len(texts))
        half = len(texts) // 2
        if LENGTH.search(words) and half:
            if BATCH.search(words):
                self.items = min(self.items, len(texts) - half)
            return np.concatenate([self._vectors(texts[:half], role), self._vectors(texts[half:], role)])
        if LENGTH.search(words) and len(texts[0]) >= 2 * SHORTEST:
            if whole:
                self.usage["cut"] += 1
                self.note(f"{self.name}: a text of {len(texts[0]):,} characters is too long for the model and was cut")
            return self._vectors([texts[0][: len(texts[0]) // 2]], role, whole=False)
        raise UserError(words, where=self.name, fix="check the model's name and what it takes")

    def _matrix(self, vectors: list[Any], count: int) -> np.ndarray:
        try:
            with np.errstate(over="ignore"):  # becomes infinite, which `_check` refuses
                matrix = np.array(vectors, np.float32)
        except (TypeError, ValueError, OverflowError):
            matrix = np.zeros(0, np.float32)
        if matrix.ndim != 2 or len(matrix) != count or not matrix.shape[1]:
            found = f"{len(vectors):,} vectors" if len(vectors) != count else "vectors of unequal or no length"
            raise UserError(
                f"answered {count:,} texts with {found}", where=self.name, fix="is this an embedding model?"
            )
        self._check(matrix)
        return matrix

    def _check(self, matrix: np.ndarray) -> None:
        if not np.isfinite(matrix).all():
            raise UserError("answered with numbers that are not finite", where=self.name, fix="tell whoever runs it")
        self.dimension = self.dimension or matrix.shape[1]
        if matrix.shape[1] != self.dimension:
            what = f"answered with {matrix.shape[1]} numbers a text where it had {self.dimension} before"
            fix = "the model behind the name changed: remove the cache folder" if self.cache else "run it again"
            raise UserError(what, where=self.name, fix=fix)


class Cache:
    """Vectors on disk by key: one .npy per call, complete or not there, so that any stop can be continued.

    Each file is an array of (key: 32 bytes, vector: D float32), named by its keys; nothing is ever changed.
    """

    def __init__(self, folder: Path, note: Note) -> None:
        self.folder = folder
        self.places: dict[bytes, tuple[Path, int]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot be made: {error.strerror}", where=str(folder)) from error
        damaged = []
        for path in sorted(folder.glob("*.npy")):
            try:
                self._index(path, _load(path)["key"])
            except (OSError, ValueError, IndexError, KeyError, EOFError):
                damaged.append(path.name)
        if damaged:
            note(f"{folder}: {len(damaged):,} damaged files are left out and their texts asked for again")

    def get(self, keys: Sequence[bytes] | dict[bytes, str]) -> dict[bytes, np.ndarray]:
        """The vectors ((D,) float32) of those keys that are kept."""
        by_file: dict[Path, list[tuple[bytes, int]]] = {}
        for key in keys:
            if place := self.places.get(key):
                by_file.setdefault(place[0], []).append((key, place[1]))
        found = {}
        for path, rows in by_file.items():
            with suppress(OSError, ValueError):  # gone since it was listed: asked for again
                vectors = _load(path)["vector"]
                found.update({key: np.array(vectors[row]) for key, row in rows})
        return found

    def put(self, keys: Sequence[bytes], vectors: np.ndarray) -> None:
        """Keep vectors (n, D), atomically."""
        block = np.zeros(len(keys), [("key", "u1", (32,)), ("vector", "<f4", (vectors.shape[1],))])
        block["key"] = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)
        block["vector"] = vectors
        path = self.folder / (hashlib.sha256(b"".join(keys)).hexdigest()[:32] + ".npy")
        files.write_array(path, block)
        self._index(path, block["key"])

    def _index(self, path: Path, keys: np.ndarray) -> None:
        self.places.update({key.tobytes(): (path, row) for row, key in enumerate(keys)})


def _load(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _openai(model: str, base_url: str | None, where: str, note: Note) -> Service:
    client, address = calls.openai_client(base_url, where, note)

    def ask(texts: Sequence[str], role: str) -> Answer:
        # "float", not the client's own base64, which not every compatible service knows.
        raw = client.embeddings.with_raw_response.create(model=model, input=list(texts), encoding_format="float")
        answer = calls.body(raw, where)
        data, used = answer.get("data"), answer.get("usage")
        if not isinstance(data, list) or not all(isinstance(item, dict) for item in data):
            raise UserError("the answer holds no embeddings", where=where, fix="is this an embedding model?")
        order = [item.get("index", row) for row, item in enumerate(data)]
        if not all(isinstance(row, int) for row in order) or sorted(order) != list(range(len(data))):
            raise UserError("the answer does not say which vector is whose", where=where, fix="tell whoever runs it")
        by_index = dict(zip(order, data))
        used = used if isinstance(used, dict) else {}
        tokens = calls.whole_number(used.get("prompt_tokens")) or calls.whole_number(used.get("total_tokens"))
        return Answer([by_index[row].get("embedding") for row in range(len(data))], tokens)

    return Service(ask, address, roles=False, items=128, characters=200_000)


def _vertex(model: str, base_url: str | None, where: str) -> Service:
    project = os.environ.get("GOOGLE_CLOUD_PROJECT", "").strip()
    keys = [calls.environment_key(name, where) for name in ("GOOGLE_API_KEY", "GEMINI_API_KEY")]
    if not project and not any(keys):
        fix = "export GOOGLE_CLOUD_PROJECT=... (and GOOGLE_APPLICATION_CREDENTIALS), or GOOGLE_API_KEY=..."
        raise UserError("neither GOOGLE_CLOUD_PROJECT nor GOOGLE_API_KEY is set", where=where, fix=fix)
    try:
        from google import genai
        from google.genai import types
    except ImportError as error:
        raise UserError("needs another package, google-genai", where=where, fix="pip install google-genai") from error
    address = calls.check_address(base_url, where) if base_url else None
    options = types.HttpOptions(base_url=address, timeout=int(calls.TIMEOUT * 1000))
    usage = {"requests": 0, "retries": 0}
    client = calls.call(lambda: genai.Client(vertexai=True, http_options=options), where, lambda text: None, usage)

    def ask(texts: Sequence[str], role: str) -> Answer:
        config = types.EmbedContentConfig(task_type=TASKS[role])
        answer = client.models.embed_content(model=model, contents=list(texts), config=config)
        found = answer.embeddings or []
        said = list(chain.from_iterable([item.statistics] if item.statistics else [] for item in found))
        tokens = sum(int(each.token_count or 0) for each in said)
        return Answer([item.values for item in found], tokens, sum(bool(each.truncated) for each in said))

    # The gemini models take one text a call on Vertex.
    items = 1 if "gemini" in model else 100
    return Service(ask, calls.scrub(address or project or "key"), roles=True, items=items, characters=40_000)
