"""embedtune embed: vectors of many texts, to a file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from embedtune import recipes
from embedtune.commands.shape import Command, Flags, Output, Talk, refuse_existing
from embedtune.errors import UserError

if TYPE_CHECKING:
    from embedtune.encoder.encode import Encoder
    from embedtune.search import bulk, spread


@dataclass(frozen=True)
class Embed:
    """Vectors of the texts of a file, in their order: .parquet with ids, or .npy. Memory does not grow with the data.

    What is finished when a run is killed stays in OUT.running, and --resume goes on from there.
    """

    # Model: a folder, a hub name, openai:MODEL, vertex:MODEL.
    model: str = ""
    # Texts: .txt (one a line), .jsonl, .csv, .tsv, .parquet (also .gz, .zst), a folder of them; "-" is lines of stdin.
    data: str = ""
    # The file to write, .parquet (columns id and vector) or .npy; OUT.json beside it says how it was made.
    out: str = ""
    # Type of the numbers. int8: 255 steps a dimension, whose ranges are in OUT.json; binary: signs, packed.
    dtype: Literal["float32", "float16", "int8", "binary"] = "float32"
    # Only so many first numbers of each vector (Matryoshka models); not scaled anew.
    dims: int | None = None
    # Texts are queries or documents, for models that have prompts for them.
    role: Literal["query", "document"] | None = None
    # Stands before each text, instead of the model's own prompt.
    prompt: str | None = None
    # How an encoder pools that does not say so itself (one with a head for labels).
    pooling: recipes.Pooling | None = None
    # The i-th of n shares, i/n: rows i, i+n, i+2n, ...
    shard: str = "1/1"
    # Who computes: this process, or Ray's workers, here or on other machines (RAY_ADDRESS), each with its own model.
    engine: Literal["local", "ray"] = "local"
    # So many of Ray's workers (derived: one for each GPU of the cluster, else one for each CPU).
    workers: int | None = None
    # Which column is the text: text=NAME.
    columns: str | None = None
    # Keep the texts in the .parquet file.
    text: bool = False
    # Rows that cannot be read: stop, leave them out, or mend them with U+FFFD.
    bad_rows: recipes.BadRows = "fail"
    # Arithmetic of the model (derived: bf16 where the hardware has it, else fp32).
    precision: recipes.Precision | None = None
    # Go on with what a stopped run left in OUT.running.
    resume: bool = False
    # Remove what a stopped run left, and start anew.
    discard: bool = False
    # Replace a file of that name.
    force: bool = False
    # Print the result as JSON.
    json: bool = False


def embed(command: Embed, talk: Talk) -> Output:
    """Open the model, let the rows stream through it, publish the file."""
    import torch

    from embedtune.data.columns import parse_columns
    from embedtune.data.read import Counts
    from embedtune.encoder.encode import identity, open_encoder, usual_precision
    from embedtune.encoder.shapes import bound_memory
    from embedtune.search import bulk, spread
    from embedtune.search.rows import read_records

    if not (command.model and command.data and command.out):
        raise UserError("name a model, data and --out", fix="embedtune embed MODEL DATA --out vectors.parquet")
    job = bulk.Job(Path(command.out), command.dtype, command.dims, bulk.parse_shard(command.shard), command.text)
    job.check()
    bound_memory()
    if command.workers is not None and command.engine != "ray":
        raise UserError("is for --engine ray", where="--workers", fix="add --engine ray, or leave it out")
    if command.engine == "ray":
        spread.check(command.model, command.workers)
    home = bulk.running(job.out)
    if command.resume and command.discard:
        raise UserError("--resume and --discard exclude each other", fix="say one of them")
    if not command.resume:
        refuse_existing(command.out, command.force)
    if command.discard and home.is_dir():
        shutil.rmtree(home)
    precision = command.precision or usual_precision(command.model)
    encoder = open_encoder(command.model, precision=precision, pooling=command.pooling, note=talk.note)
    if command.dims is not None and not 1 <= command.dims <= encoder.dimension:
        raise UserError(f"must be from 1 to {encoder.dimension}, the model's own", where="--dims")
    counts = Counts()
    records = read_records(command.data, parse_columns(command.columns), command.bad_rows, counts)
    role = command.role or "text"
    folder = Path(command.model)  # workers have another working folder
    name = str(folder.resolve()) if folder.is_dir() else command.model
    model = spread.Model(name, identity(name), role, command.prompt, command.pooling, precision)
    about = {"model": command.model, "identity": model.identity, "role": role, "prompt": command.prompt,
             "pooling": command.pooling, "precision": precision, "torch": torch.__version__}  # fmt: skip
    texts = (bulk.Text(record.id, record.text) for record in records)
    with _engine(command, encoder, model, talk) as stream:
        done = bulk.bulk(stream, texts, job, about, resume=command.resume, note=talk.note)
    talk.note(f"{done.fresh:,} texts in {done.seconds:,.1f} s: {bulk.rate(done)}")
    lines = [f"{done.rows:,} vectors of {done.dimension} x {command.dtype} in {command.out}"]
    if done.cut:
        lines.append(f"{done.cut:,} texts are longer than the model reads: only their beginning was embedded")
    lines += counts.notes
    for reason, number in {**counts.rejected, **counts.replaced}.items():
        lines.append(f"{number:,} rows {'left out' if reason in counts.rejected else 'mended'}: {reason}")
    if done.outside:
        lines.append(f"{done.outside:,} numbers lie outside of the ranges of int8 and went to their ends")
    return Output(lines, {"out": command.out, "rows": done.rows, "dimension": done.dimension, "cut": done.cut,
                          "rejected": counts.rejected, "replaced": counts.replaced})  # fmt: skip


@contextmanager
def _engine(command: Embed, encoder: Encoder, model: spread.Model, talk: Talk) -> Iterator[bulk.Stream]:
    """Who turns texts into vectors."""
    from embedtune.encoder import encode
    from embedtune.search import spread

    if command.engine == "local":
        yield lambda texts: encode.stream(encoder, texts, model.role, model.prompt)
        return
    with spread.cluster() as ray:
        workers = spread.start(ray, model, command.workers, talk.note)
        yield lambda texts: spread.spread(ray, workers, texts)


def words(argv: list[str]) -> Flags:
    """The first word is the model, the second the data."""
    given = [word for word in argv[:2] if not word.startswith("-") or word == "-"]
    if given != argv[: len(given)]:
        return argv, None
    named = [f"{flag}={word}" for flag, word in zip(("--model", "--data"), given)]
    return named + argv[len(given) :], None


COMMANDS = {
    "embed": Command("MODEL DATA --out FILE", "vectors of many texts, to a file", Embed, embed, None, words),
}
