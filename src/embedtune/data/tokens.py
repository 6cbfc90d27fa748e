"""Text to token rows on disk: larger than memory on the way in, a memory map on the way out.

Four plain files hold a corpus: all token ids end to end, and for every row (a line, or a chunk of a long one) where
it ends, which line of which document it is, and how many characters it came from. A row is read by two look-ups,
so the data order can be any function of the row number.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from embedtune import files
from embedtune.data.read import Row

PIECE = 50_000  # characters handed to the tokenizer at once; longer lines are split at a blank before
LINES = 512  # lines tokenised at once
HEAD = 8  # characters for a token of a row: so much of a text that will be cut is tokenised first
SPARE = 16  # tokens beyond a row, special ones among them, that must come of that beginning
ROWS = 1 << 16  # rows whose places and lengths are looked through at once


@dataclass(frozen=True)
class Tokens:
    """Token rows: `ids` (all tokens), and per row `ends`, `document`, `line` (in its document), `characters`."""

    ids: np.ndarray
    ends: np.ndarray
    document: np.ndarray
    line: np.ndarray
    characters: np.ndarray
    affix: int  # special tokens that every row has
    lines: int
    chunked: int
    types: np.ndarray | None = None  # token type ids, as `ids`, where rows are pairs of texts
    maps: tuple[mmap.mmap, ...] = ()  # of the files that these arrays are views of

    def __len__(self) -> int:
        return len(self.ends)

    def row(self, number: int) -> np.ndarray:
        """Token ids of one row, special tokens included, (length,)."""
        return self.ids[self.ends[number - 1] if number else 0 : self.ends[number]]

    def types_of(self, number: int) -> np.ndarray:
        """Token type ids of one row, (length,): 0, and 1 where the second text of a pair stands."""
        assert self.types is not None
        return self.types[self.ends[number - 1] if number else 0 : self.ends[number]]

    def rows(self, numbers: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Token ids of the rows, and the number that keys each one's noise."""
        self.let_go()
        return [self.row(number) for number in numbers], numbers

    def lengths(self) -> np.ndarray:
        """Tokens per row, (rows,) int64."""
        return np.diff(self.ends, prepend=0)

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of the given rows, (n,) int64."""
        return self.ends[rows] - np.where(rows > 0, self.ends[rows - 1], 0)

    def all_places(self) -> Iterator[np.ndarray]:
        """Of each row its document, and its line in that, (n, 2) int64, block by block."""
        for first in range(0, len(self), ROWS):
            here = slice(first, first + ROWS)
            yield np.stack([self.document[here], self.line[here]], axis=1)
            self.let_go()

    def spread(self) -> np.ndarray:
        """How many rows there are of each length, (longest + 1,) int64."""
        counts = np.zeros(0, np.int64)
        for first in range(0, len(self), ROWS):
            lengths = self.lengths_of(np.arange(first, min(first + ROWS, len(self))))
            more = np.bincount(lengths, minlength=len(counts))
            more[: len(counts)] += counts
            counts = more
            self.let_go()
        return counts

    def let_go(self) -> None:
        """Hand back the mapped pages that were read so far: a pass over all rows would keep the whole files resident.

        They stay in the system's cache, and what is read again comes back by itself.
        """
        for each in self.maps:
            each.madvise(mmap.MADV_DONTNEED)


def affixes(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special token ids that a tokenizer puts before and after one text."""
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    outer = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(outer) - len(inner) + 1):
        if outer[start : start + len(inner)] == inner:
            return outer[:start], outer[start + len(inner) :]
    raise ValueError("the tokenizer changes a text when it adds special tokens")


def uncut(tokenizer: Any) -> Any:
    """A copy of a fast tokenizer's inner one that neither cuts nor pads, whatever its tokenizer.json says."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def pieces(text: str, limit: int = PIECE) -> Iterator[str]:
    """`text` in pieces of at most `limit` characters, split at a blank where there is one."""
    while len(text) > limit:
        cut = text.rfind(" ", limit // 2, limit) + 1 or limit
        yield text[:cut]
        text = text[cut:]
    yield text


def encode_cut(encode: Callable[[list[Any]], Sequence[Any]], texts: Sequence[Any], most: int | None) -> list[Any]:
    """Encodings of texts (or pairs of them) by a tokenizer that cuts them at `most` tokens, on the right.

    Of a long text the beginning is tokenised first, and the whole only where that does not fill a row and SPARE tokens
    more: else a book would become a million tokens, of a hundred bytes each, to use a few hundred of them. So for
    tokenizers that take words apart, as nearly all do: what stands behind a blank does not change what is before it,
    or a few tokens of it. Pairs are tokenised whole, and so are texts without blanks.
    """
    heads = [text if most is None else _head(text, HEAD * most) for text in texts]
    found = list(encode(heads))
    again = [n for n, head in enumerate(heads) if head is not texts[n] and _spare(found[n]) < SPARE]
    for number, encoding in zip(again, encode([texts[n] for n in again]) if again else ()):
        found[number] = encoding
    return found


def _spare(encoding: Any) -> int:
    """How many tokens did not go into the row."""
    return sum(len(part.ids) for part in encoding.overflowing)


def _head(text: Any, limit: int) -> Any:
    """The beginning of a text up to a blank; the text itself where it is short, or has none there."""
    if not isinstance(text, str) or len(text) <= limit:
        return text
    cut = max(text.rfind(blank, limit // 2, limit) for blank in " \n\t")
    return text if cut < 0 else text[:cut].rstrip()


def even_chunks(ids: np.ndarray, most: int) -> list[np.ndarray]:
    """`ids` in the fewest chunks of at most `most`, as equal as they can be (no stub of one token at the end)."""
    return np.array_split(ids, -(-len(ids) // most))


@dataclass(frozen=True)
class Chunker:
    """Texts to token rows of at most a length: long texts in chunks, special tokens around each."""

    backend: Any
    before: list[int]
    after: list[int]
    room: int  # tokens of a row beside the special ones
    barren: np.ndarray  # (V,) bool: tokens that say nothing
    dtype: type

    @classmethod
    def of(cls, tokenizer: Any, max_length: int) -> Chunker:
        """Of a fast Hugging Face tokenizer, which is not changed."""
        before, after = affixes(tokenizer)
        barren = np.zeros(len(tokenizer), bool)
        barren[tokenizer.all_special_ids] = True  # the unknown token is one of them
        dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
        return cls(uncut(tokenizer), before, after, max_length - len(before) - len(after), barren, dtype)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, whole and without special tokens."""
        return _encode(self.backend, texts)

    def rows(self, ids: np.ndarray) -> list[np.ndarray]:
        """The rows of one text's ids; none where the tokenizer knows nothing of it."""
        return [] if self.barren[ids].all() else [self.row(chunk) for chunk in even_chunks(ids, self.room)]

    def row(self, chunk: np.ndarray) -> np.ndarray:
        """A chunk with the special tokens around it."""
        return np.concatenate([self.before, chunk, self.after]).astype(self.dtype)


def tokenize(rows: Iterable[Row], tokenizer: Any, max_length: int, folder: Path, *, cut: bool = False) -> Tokens:
    """Tokenise a stream of text rows into `folder`, and map what was written.

    Rows of more than `max_length` tokens (special tokens counted) are chunked; rows of which the tokenizer
    knows nothing (control characters, or a script that it has never seen) are left out. With `cut` every row stays
    one row, as an embedding model reads it: its first tokens, the count of such rows in `chunked`. `tokenizer` is a
    fast Hugging Face tokenizer; it is not changed.
    """
    chunker = Chunker.of(tokenizer, max_length)
    end, lines, chunked = 0, 0, 0
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        ids_file, rows_file = (stack.enter_context(files.growing(folder / n)) for n in ("ids.bin", "rows.bin"))
        document, line = -1, 0
        for batch in _batches(rows, LINES):
            found = chunker.encode([row.values["text"] for row in batch])
            record = []
            for row, ids in zip(batch, found, strict=True):
                document, line = row.document, (line + 1 if row.document == document else 0)
                wholes = [chunker.row(ids[: chunker.room])] if cut else chunker.rows(ids)
                lines, chunked = lines + bool(wholes), chunked + (len(wholes) > 1 or (cut and len(ids) > chunker.room))
                for number, whole in enumerate(wholes):
                    ids_file.write(whole.tobytes())
                    end += len(whole)
                    record.append((end, document, line, len(row.values["text"]) if number == 0 else 0))
            rows_file.write(np.array(record, np.int64).reshape(-1, 4).tobytes())
    files.write_json(
        folder / "tokens.json",
        {
            "dtype": np.dtype(chunker.dtype).name,
            "affix": len(chunker.before) + len(chunker.after),
            "lines": lines,
            "chunked": chunked,
        },
    )
    return open_tokens(folder)


def tokenize_texts(texts: Iterable[tuple[str, str | None]], tokenizer: Any, max_length: int, folder: Path) -> Tokens:
    """One row for each text or pair of texts, joined and cut (the longer first) as the tokenizer itself does.

    Rows that were cut are counted in `chunked`. Token type ids are kept where there are pairs.
    """
    backend = uncut(tokenizer)
    backend.enable_truncation(max_length)
    before, after = affixes(tokenizer)
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    folder.mkdir(parents=True, exist_ok=True)
    end, number, cut, pairs = 0, 0, 0, False
    with ExitStack() as stack:
        ids_file, types_file, rows_file = (
            stack.enter_context(files.growing(folder / name)) for name in ("ids.bin", "types.bin", "rows.bin")
        )
        for some in _some(texts, LINES):
            given = [text if pair is None else (text, pair) for text, pair in some]
            found = encode_cut(backend.encode_batch, given, max_length)
            pairs = pairs or any(pair is not None for _, pair in some)
            for encoding, (text, pair) in zip(found, some, strict=True):
                end += len(encoding.ids)
                cut += bool(encoding.overflowing)
                ids_file.write(np.array(encoding.ids, dtype).tobytes())
                types_file.write(np.array(encoding.type_ids, np.uint8).tobytes())
                rows_file.write(np.array([end, number, 0, len(text) + len(pair or "")], np.int64).tobytes())
                number += 1
    files.write_json(
        folder / "tokens.json",
        {"dtype": np.dtype(dtype).name, "affix": len(before) + len(after), "lines": number, "chunked": cut,
         "pairs": pairs},
    )  # fmt: skip
    return open_tokens(folder)


def numbered(rows: Iterable[Row]) -> Iterator[tuple[Row, tuple[int, int]]]:
    """Each row with the document and the line by which `tokenize` knows it."""
    document, line = -1, 0
    for row in rows:
        document, line = row.document, (line + 1 if row.document == document else 0)
        yield row, (document, line)


def open_tokens(folder: Path) -> Tokens:
    """Map the files that `tokenize` wrote."""
    about = files.read_json(folder / "tokens.json")

    maps = []

    def mapped(name: str, dtype: Any) -> np.ndarray:
        if not (folder / name).stat().st_size:
            return np.zeros(0, dtype)
        with open(folder / name, "rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return np.frombuffer(maps[-1], dtype)

    table = mapped("rows.bin", np.int64).reshape(-1, 4)
    ids = mapped("ids.bin", about["dtype"])
    types = mapped("types.bin", np.uint8) if about.get("pairs") else None
    return Tokens(
        ids,
        table[:, 0],
        table[:, 1],
        table[:, 2],
        table[:, 3],
        about["affix"],
        about["lines"],
        about["chunked"],
        types,
        tuple(maps),
    )


def _some(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


def _batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row.values["text"])
        if len(batch) == size or characters > 20 * PIECE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(backend: Any, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text without special tokens; long texts go through the tokenizer in pieces."""
    owners, parts = [], []
    for number, text in enumerate(texts):
        for piece in pieces(text):
            owners.append(number)
            parts.append(piece)
    found: list[list[np.ndarray]] = [[] for _ in texts]
    # The fast form leaves out where in the text each token stands, a seventh of the time.
    for owner, encoding in zip(owners, backend.encode_batch_fast(parts, add_special_tokens=False), strict=True):
        found[owner].append(np.array(encoding.ids, np.int64))
    return [np.concatenate(arrays) for arrays in found]
