"""The index on the disk: segments that never change, and one manifest that names them and is replaced by one rename.

    index.json        version, model, dimension, segments, tombstones; sha256 and size of every file
    segment-000001/   vectors.f32 (N, D), rows.arrow (id, text, columns), codes.i8 and ranges.npy where asked for
    deleted-000002.npy    numbers of the rows that are deleted

A reader takes the manifest and what it names. A writer first writes new files, then the manifest, then removes what
the manifest does not name. So a kill at any point leaves the old index or the new one.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from embedtune import files
from embedtune.encoder.embedder import Precision
from embedtune.errors import UserError
from embedtune.nearest import unit
from embedtune.search import graph
from embedtune.search.quantise import Dtype, quantise
from embedtune.search.rows import Record

VERSION = 1
MANIFEST = "index.json"
ROWS = ["id", "text", "columns"]
LONGEST = 255  # bytes of a name in the folder
BLOCK = 16_384  # vectors that are quantised at a time
REBUILD = "build the index anew: embedtune search index DATA --model M --out DIR --force"


@dataclass(frozen=True)
class Manifest:
    """What an index consists of."""

    model: str
    identity: str
    dimension: int
    dtype: Dtype = "float32"
    precision: Precision = "fp32"
    version: int = VERSION
    serial: int = 0  # counts the changes; names of files are made of it
    rows: int = 0
    columns: tuple[str, ...] = ()
    segments: tuple[str, ...] = ()
    deleted: str = ""
    lexical: str = ""
    graph: bool = False
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def name(self, kind: str) -> str:
        """The name of something that the next change makes."""
        return f"{kind}-{self.serial + 1:06d}"


@dataclass(frozen=True, eq=False)
class Segment:
    """Rows that were added together; all of it is mapped, nothing is read before it is used."""

    vectors: np.ndarray  # (N, D) float32, each of length one
    table: Any  # id, text, columns (JSON)
    codes: np.ndarray | None = None  # (N, D) or (N, ceil(D / 8)) int8
    ranges: np.ndarray | None = None
    graph: Any = None  # of faiss


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an index; a UserError where there is none, it is damaged, or of a newer version."""
    path = folder / MANIFEST
    if not path.is_file():
        fix = "make one: embedtune search index DATA --model M --out DIR"
        raise UserError("is not an index: it has no index.json", where=str(folder), fix=fix)
    try:
        found = files.read_json(path)
    except UserError as error:
        raise UserError(error.what, where=str(path), fix=REBUILD) from error
    version = found.get("version") if isinstance(found, dict) else None
    if isinstance(version, int) and version > VERSION:
        what = f"was made by a newer embedtune (index version {version}, this one reads {VERSION})"
        raise UserError(what, where=str(folder), fix="update embedtune, or build the index anew")
    try:
        lists = {name: tuple(found[name]) for name in ("columns", "segments")}
        manifest = Manifest(**{**found, **lists})
        _check(manifest)
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"is damaged ({error})", where=str(path), fix=REBUILD) from error
    return manifest


def _check(manifest: Manifest) -> None:
    """ValueError for what no index has: names that lead out of the folder are among it."""
    for name in ("dimension", "rows", "serial"):
        value = getattr(manifest, name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**48:
            raise ValueError(f"{name} is no whole number that can be")
    for name in ("model", "identity", "dtype", "precision", "deleted", "lexical"):
        if not isinstance(getattr(manifest, name), str):
            raise ValueError(f"{name} is no text")
    if manifest.dtype not in get_args(Dtype) or manifest.precision not in get_args(Precision):
        raise ValueError("dtype or precision is not known")
    if not isinstance(manifest.files, dict) or not all(isinstance(entry, dict) for entry in manifest.files.values()):
        raise ValueError("files is no table of tables")
    for name in (*manifest.columns, *manifest.segments):
        if not isinstance(name, str):
            raise ValueError("a column or segment has no name")
    for name in (*manifest.segments, manifest.deleted, manifest.lexical, *manifest.files):
        if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts or len(name.encode()) > LONGEST:
            raise ValueError("a name leads out of the folder, or is longer than any here")


def open_segments(folder: Path, manifest: Manifest) -> tuple[list[Segment], np.ndarray]:
    """The segments, checked against their sums, and the numbers of deleted rows: (deleted,) int64, ascending."""
    from pyarrow.lib import ArrowException

    _check_sums(folder, manifest)
    try:
        segments = [_open_segment(folder / name, manifest) for name in manifest.segments]
        deleted = _loaded(folder / manifest.deleted) if manifest.deleted else np.zeros(0, np.int64)
        _check_rows(segments, deleted, manifest)
    except (ValueError, TypeError, KeyError, EOFError, RuntimeError, OSError, ArrowException) as error:
        what = f"is damaged ({(str(error).splitlines() or [''])[0][:200]})"
        raise UserError(what, where=str(folder), fix=REBUILD) from error
    return segments, deleted


def _check_sums(folder: Path, manifest: Manifest) -> None:
    """UserError where a file is not what it was; one that cannot be read is another thing than one that is damaged."""
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{name} is missing", where=str(folder), fix=REBUILD)
        try:
            same = path.stat().st_size == entry.get("bytes") and files.sha256(path) == entry.get("sha256")
        except OSError as error:
            what = f"cannot be read: {error.strerror or error}"
            raise UserError(what, where=str(path), fix="make the file readable") from error
        if not same:
            raise UserError(f"{name} is damaged: it does not match its sha256", where=str(folder), fix=REBUILD)


def _check_rows(segments: list[Segment], deleted: np.ndarray, manifest: Manifest) -> None:
    """ValueError where the sums are right, but the files do not fit each other."""
    rows = sum(segment.table.num_rows for segment in segments)
    if rows != manifest.rows or any(segment.table.schema.names != ROWS for segment in segments):
        raise ValueError("its rows are not those that index.json names")
    if (
        deleted.dtype != np.int64
        or deleted.ndim != 1
        or (len(deleted) and not 0 <= deleted.min() <= deleted.max() < rows)
    ):
        raise ValueError("its deleted rows are none that it has")


def _open_segment(path: Path, manifest: Manifest) -> Segment:
    import pyarrow as pa

    table = pa.ipc.open_file(pa.memory_map(str(path / "rows.arrow"))).read_all()
    rows, width = table.num_rows, manifest.dimension
    vectors = _mapped(path / "vectors.f32", np.float32, (rows, width))
    if manifest.dtype == "float32":
        return Segment(vectors, table, graph=graph.load(path) if manifest.graph else None)
    width = width if manifest.dtype == "int8" else (width + 7) // 8
    codes = _mapped(path / "codes.i8", np.int8, (rows, width))
    return Segment(vectors, table, codes, _loaded(path / "ranges.npy"))


def column(path: Path, name: str) -> Iterator[list[str]]:
    """One of ROWS of a segment, a block at a time; pages of a mapped file would stay in memory once they are read."""
    import pyarrow as pa

    options = pa.ipc.IpcReadOptions(included_fields=[ROWS.index(name)])
    with pa.OSFile(str(path / "rows.arrow")) as file:
        reader = pa.ipc.open_file(file, options=options)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number).column(0).to_pylist()


def _loaded(path: Path) -> np.ndarray:
    found = np.load(path, allow_pickle=False)
    if not isinstance(found, np.ndarray):  # a zip file is read as several arrays
        raise ValueError(f"{path.name} is no array")
    return found


def _mapped(path: Path, kind: Any, shape: tuple[int, int]) -> np.ndarray:
    found = np.memmap(path, kind, mode="r")
    if found.size != shape[0] * shape[1]:
        raise ValueError(f"{path.name} has {found.size:,} numbers, not {shape[0]:,} rows of {shape[1]:,}")
    return found.reshape(shape)


Embed = Callable[[Iterable[str]], Iterator[Any]]  # a stream of texts to `Embedded` blocks
Block = tuple[list[Record], np.ndarray]


def embedded(
    embed: Embed, records: Iterable[Record], scale: Callable[[np.ndarray], np.ndarray] = unit
) -> Iterator[Block]:
    """Records with their vectors, a block at a time."""
    waiting: deque[Record] = deque()

    def texts() -> Iterator[str]:
        for record in records:
            waiting.append(record)
            yield record.text

    for part in embed(texts()):
        yield [waiting.popleft() for _ in range(len(part.vectors))], scale(part.vectors)


def write_segment(folder: Path, manifest: Manifest, blocks: Iterable[Block]) -> tuple[Manifest, int]:
    """A new segment of these rows, and the manifest that names it; nothing changes before that is published."""
    name, columns, rows = manifest.name("segment"), set(manifest.columns), 0

    def fill(place: Path) -> None:
        nonlocal rows
        with files.growing(place / "vectors.f32") as vectors, files.growing(place / "rows.arrow") as table:
            rows = _write_rows(vectors, table, blocks, columns, manifest.dimension)
        if not rows:
            raise UserError("there is nothing to add: not one row", where=str(folder))
        if manifest.dtype != "float32":
            _write_codes(place, manifest, rows)
        if manifest.graph:
            shape = (rows, manifest.dimension)
            graph.build(place, np.memmap(place / "vectors.f32", np.float32, mode="r", shape=shape), BLOCK)

    files.write_directory(folder / name, fill, {})
    sums = files.read_json(folder / name / files.MANIFEST)["files"]
    found = {f"{name}/{file}": entry for file, entry in sums.items()}
    return replace(
        manifest,
        rows=manifest.rows + rows,
        columns=tuple(sorted(columns)),
        segments=(*manifest.segments, name),
        files={**manifest.files, **found},
    ), rows


def _write_rows(vectors: Any, file: Any, blocks: Iterable[Block], columns: set[str], dimension: int) -> int:
    import pyarrow as pa

    schema = pa.schema([("id", pa.string()), ("text", pa.large_string()), ("columns", pa.large_string())])
    rows = 0
    with pa.ipc.new_file(file, schema) as writer:
        for records, block in blocks:
            if block.shape[1] != dimension:
                what = f"the model gives {block.shape[1]} numbers a text, the index has {dimension}"
                raise UserError(what, where="the model", fix="use the model that the index was made with")
            vectors.write(block.tobytes())
            cells = [json.dumps(record.columns, ensure_ascii=False, default=str) for record in records]
            texts = [[record.id for record in records], [record.text for record in records], cells]
            writer.write_batch(pa.record_batch([pa.array(c, f.type) for c, f in zip(texts, schema)], schema=schema))
            columns.update(*(record.columns for record in records))
            rows += len(records)
    return rows


def _write_codes(place: Path, manifest: Manifest, rows: int) -> None:
    vectors = np.memmap(place / "vectors.f32", np.float32, mode="r", shape=(rows, manifest.dimension))
    starts = range(0, rows, BLOCK)
    low = np.min([vectors[start : start + BLOCK].min(0) for start in starts], axis=0)
    high = np.max([vectors[start : start + BLOCK].max(0) for start in starts], axis=0)
    ranges = np.stack([low, high]).astype(np.float32)
    files.write_array(place / "ranges.npy", ranges)
    with files.growing(place / "codes.i8") as codes:
        for start in starts:
            codes.write(quantise(np.asarray(vectors[start : start + BLOCK]), manifest.dtype, ranges).tobytes())


def with_file(folder: Path, manifest: Manifest, kind: str, name: str) -> Manifest:
    """The manifest with a new file, or folder of files, in the place of the last one of its kind."""
    kept = {n: e for n, e in manifest.files.items() if n.split("/")[0] != getattr(manifest, kind)}
    paths = [p for p in ([folder / name] if (folder / name).is_file() else (folder / name).rglob("*")) if p.is_file()]
    new = {
        p.relative_to(folder).as_posix(): {"sha256": files.sha256(p), "bytes": p.stat().st_size} for p in sorted(paths)
    }
    changed: dict[str, Any] = {kind: name if paths else ""}
    return replace(manifest, files={**kept, **new}, **changed)


def with_deleted(folder: Path, manifest: Manifest, numbers: np.ndarray) -> Manifest:
    """The manifest with these rows (global numbers) as the deleted ones."""
    name = manifest.name("deleted") + ".npy"
    files.write_array(folder / name, np.unique(numbers).astype(np.int64))
    return with_file(folder, manifest, "deleted", name)


def publish(folder: Path, manifest: Manifest) -> None:
    """Make the manifest the index by one rename, then remove what it does not name."""
    manifest = replace(manifest, serial=manifest.serial + 1)
    files.write_json(folder / MANIFEST, asdict(manifest))
    named = {*manifest.segments, manifest.deleted, manifest.lexical, MANIFEST, files.LOCK}
    for path in folder.iterdir():
        if path.name not in named:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
