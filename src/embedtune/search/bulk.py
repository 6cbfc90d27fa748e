"""Bulk embedding: rows in, a file of vectors out, in the order of the rows; memory is flat, and a kill costs a block.

A block of rows is embedded, written to OUT.running and flushed; when all are there they are joined to OUT, which
appears by one rename. A block's vectors depend on nothing but its texts, so a run that was killed and resumed ends
with the bytes of one that was not. A file OUT.json beside it says how the vectors were made.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from embedtune import files
from embedtune.encoder.embed import WINDOW, Embedded
from embedtune.errors import UserError, did_you_mean
from embedtune.search.quantise import Dtype, check_dtype, outside, quantise, ranges_of

FORMATS = (".parquet", ".npy")
BLOCK = WINDOW  # rows that are finished together
CALIBRATION = 1024  # the first texts of the data, from which every shard takes the ranges of int8
START, RANGES = "start.json", "ranges.npy"
SAY_SECONDS = 10

Note = Callable[[str], None]
Stream = Callable[[Iterable[str]], Iterator[Embedded]]


class Text(NamedTuple):
    """A row to embed."""

    id: str
    text: str


@dataclass(frozen=True)
class Job:
    """What comes out: the file, the type of its numbers, how many of each vector, which share of the rows."""

    out: Path
    dtype: Dtype = "float32"
    dims: int | None = None
    shard: tuple[int, int] = (1, 1)  # the i-th of n: rows i, i + n, i + 2n, ...
    keep_text: bool = False

    def check(self) -> None:
        """A UserError where no such file can be made."""
        check_dtype(self.dtype)
        if self.keep_text and self.out.suffix == ".npy":
            raise UserError("only .parquet has a place for texts", where="--text", fix="end --out in .parquet")
        if self.out.suffix not in FORMATS:
            what = f"must end in {' or '.join(FORMATS)}{did_you_mean(self.out.suffix, FORMATS)}"
            raise UserError(what, where=str(self.out), fix="--out vectors.parquet")
        if not 1 <= self.shard[0] <= self.shard[1]:
            raise UserError("must be i/n with i from 1 to n, for example 2/4", where="--shard")


@dataclass
class Done:
    """What was embedded; tokens and seconds are of this process, the rest of the whole file."""

    rows: int = 0
    resumed: int = 0  # blocks
    fresh: int = 0  # rows of this process
    cut: int = 0
    tokens: int = 0
    seconds: float = 0.0
    dimension: int = 0
    outside: int = 0  # numbers beyond the ranges of int8
    about: dict[str, Any] = field(default_factory=dict)


def running(out: Path) -> Path:
    """Where the blocks are until they are joined."""
    return out.with_name(out.name + ".running")


def parse_shard(shard: str) -> tuple[int, int]:
    """'2/4' as (2, 4); a UserError where it is not of that form."""
    part, _, parts = shard.partition("/")
    if not (part.isdecimal() and parts.isdecimal()):
        raise UserError(f"{shard!r} is not of the form i/n", where="--shard", fix="--shard 1/4 is the first quarter")
    return int(part), int(parts)


def bulk(
    stream: Stream, rows: Iterable[Text], job: Job, about: dict[str, Any], *, resume: bool = False, note: Note
) -> Done:
    """Embed `rows` with `stream` and publish `job.out`; `about` is what may not change between a stop and a resume.

    Raises UserError where there is nothing to resume, or where the texts or `about` are not those of the first start.
    """
    job.check()
    home = running(job.out)
    asked = {**about, "dtype": job.dtype, "dims": job.dims, "shard": list(job.shard), "text": job.keep_text}
    _begin(home, asked, resume)
    done = Done(about=asked)
    with files.locked(home):
        try:
            ranges = _fill(home, stream, iter(rows), job, done, note)
        except BaseException:
            if any(home.glob("block-*")):
                note(f"{home} holds what is finished: --resume goes on from there")
            else:
                shutil.rmtree(home)
            raise
        _publish(home, job, ranges, done)
    (home / START).unlink()
    shutil.rmtree(home)
    return done


def _begin(home: Path, asked: dict[str, Any], resume: bool) -> None:
    if not resume:
        if (home / START).is_file():
            what = "an unfinished run is here"
            raise UserError(what, where=str(home), fix="--resume continues it, --discard removes it")
        shutil.rmtree(home, ignore_errors=True)  # what was left by a kill before the start or after the end
        files.make_folder(home)
        files.write_json(home / START, asked)
        return
    if not (home / START).is_file():
        raise UserError("there is no unfinished run to resume", where=str(home), fix="leave out --resume")
    before = files.read_json(home / START)
    changed = [f"{key} = {asked.get(key)!r} (was {old!r})" for key, old in before.items() if asked.get(key) != old]
    if changed:
        fix = "ask for the same again, or start anew with --discard"
        raise UserError("cannot be resumed: something differs", where=str(home), details=changed, fix=fix)


def _fill(home: Path, stream: Stream, rows: Iterator[Text], job: Job, done: Done, note: Note) -> np.ndarray | None:
    """Embed what is not on the disk yet; returns the ranges of int8."""
    head = list(islice(rows, CALIBRATION)) if job.dtype == "int8" else []
    ranges = _ranges(home, stream, head, job) if head else None
    shard = islice(chain(head, rows), job.shard[0] - 1, None, job.shard[1])
    blocks = _unfinished(home, _blocks(shard), done)
    _embed(home, stream, blocks, job, ranges, done, note)
    if not done.rows:
        raise UserError("there is nothing to embed: not one row", where=f"shard {job.shard[0]}/{job.shard[1]}")
    return ranges


def _ranges(home: Path, stream: Stream, head: list[Text], job: Job) -> np.ndarray:
    if not (home / RANGES).is_file():
        vectors = np.concatenate([part.vectors for part in stream(row.text for row in head)])
        files.write_array(home / RANGES, ranges_of(vectors[:, : job.dims]))
    found: np.ndarray = np.load(home / RANGES, allow_pickle=False)
    return found


def _blocks(rows: Iterable[Text]) -> Iterator[list[Text]]:
    rest = iter(rows)
    while block := list(islice(rest, BLOCK)):
        yield block


def _digest(block: list[Text]) -> str:
    return hashlib.sha256(json.dumps(block).encode()).hexdigest()


def _place(home: Path, number: int) -> Path:
    return home / f"block-{number:08d}.json"


def _unfinished(home: Path, blocks: Iterator[list[Text]], done: Done) -> Iterator[list[Text]]:
    """The blocks that are not on the disk yet, after a check that those that are belong to the same rows."""
    while (place := _place(home, number := done.resumed)).is_file():
        block, found = next(blocks, []), files.read_json(place)
        if found["sha256"] != _digest(block):
            first = number * BLOCK
            what = f"rows {first + 1:,} to {first + len(found['ids']):,} are not those of the first start"
            raise UserError(what, where=str(home), fix="give the same data again, or start anew with --discard")
        done.resumed += 1
        done.rows, done.cut, done.outside = done.rows + len(block), done.cut + found["cut"], found["outside"]
    return blocks


def _embed(
    home: Path, stream: Stream, blocks: Iterator[list[Text]], job: Job, ranges: Any, done: Done, note: Note
) -> None:
    """Embed the blocks; each is whole on the disk before the next is begun."""
    ahead: deque[list[Text]] = deque()
    start = said = time.monotonic()

    def texts() -> Iterator[str]:
        for block in blocks:
            ahead.append(block)
            yield from (row.text for row in block)

    for number, part in enumerate(stream(texts()), done.resumed):
        block, vectors = ahead.popleft(), part.vectors[:, : job.dims]
        done.outside += 0 if ranges is None else outside(vectors, ranges)
        files.write_array(_place(home, number).with_suffix(".npy"), quantise(vectors, job.dtype, ranges))
        kept = {"texts": [row.text for row in block]} if job.keep_text else {}
        entry = {
            "sha256": _digest(block),
            "cut": part.truncated,
            "outside": done.outside,
            "dimension": vectors.shape[1],
        }
        files.write_json(_place(home, number), {**entry, "ids": [row.id for row in block], **kept})
        done.rows, done.cut = done.rows + len(block), done.cut + part.truncated
        done.fresh += len(block)
        done.tokens += int(part.tokens.sum())
        done.seconds = time.monotonic() - start
        if time.monotonic() - said > SAY_SECONDS:
            said = time.monotonic()
            note(f"{done.rows:,} texts, {rate(done)}")


def rate(done: Done) -> str:
    """Texts and tokens per second of this process, in words."""
    seconds = max(done.seconds, 1e-9)
    return f"{done.fresh / seconds:,.1f} texts/s, {done.tokens / seconds:,.0f} tokens/s"


def _publish(home: Path, job: Job, ranges: np.ndarray | None, done: Done) -> None:
    """Join the blocks; the description first, so that no vectors stand without one."""
    entries = sorted(home.glob("block-*.json"))
    done.dimension = files.read_json(entries[0])["dimension"]
    about = {**done.about, "dimension": done.dimension, "rows": done.rows, "cut": done.cut}
    if ranges is not None:
        about |= {"low": ranges[0].tolist(), "high": ranges[1].tolist(), "outside": done.outside}
    files.write_json(job.out.with_name(job.out.name + ".json"), about)
    with files.growing(job.out) as file:
        (_join_npy if job.out.suffix == ".npy" else _join_parquet)(file, entries, done.rows)


def _load(entry: Path) -> np.ndarray:
    found: np.ndarray = np.load(entry.with_suffix(".npy"), allow_pickle=False)
    return found


def _join_npy(file: Any, entries: list[Path], rows: int) -> None:
    first = _load(entries[0])
    header = {
        "descr": np.lib.format.dtype_to_descr(first.dtype),
        "fortran_order": False,
        "shape": (rows, first.shape[1]),
    }
    np.lib.format.write_array_header_1_0(file, header)
    for entry in entries:
        file.write(_load(entry).tobytes())


def _join_parquet(file: Any, entries: list[Path], rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    for entry in entries:
        vectors, found = _load(entry), files.read_json(entry)
        columns = {"id": pa.array(found["ids"], pa.string())}
        if "texts" in found:
            columns["text"] = pa.array(found["texts"], pa.string())
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()
