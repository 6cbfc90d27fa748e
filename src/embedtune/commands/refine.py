"""embedtune refine: what a finished model encodes and should not, and averages of models."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from embedtune import recipes
from embedtune.commands.shape import Command, Output, Talk, models_first, table
from embedtune.errors import UserError


@dataclass(frozen=True)
class Reading:
    """How the texts are read and embedded."""

    # Which column is the text: text=NAME.
    columns: str | None = None
    # Rows that are not valid UTF-8 text: stop, leave them out, or mend them with U+FFFD.
    bad_rows: recipes.BadRows = "fail"
    # Read the first so many rows only.
    rows: int | None = None
    # Arithmetic of the model.
    precision: recipes.Precision = "fp32"


@dataclass(frozen=True)
class Length:
    """The direction in which a model's embeddings encode the length of a text, measured on held-out rows."""

    # Model folder; length_direction.npy, its sidecar and a plot are added to it.
    model: str
    # The text to measure on: a file or folder, larger than memory if need be.
    data: str
    # How the texts are read and embedded.
    reading: Reading = field(default_factory=Reading)
    # Erase the token count and functions of its logarithm, into a new model folder.
    erase: bool = False
    # With --erase: all smooth functions of the logarithm (derived), or it alone (scalar: 2 dimensions instead of 10).
    kind: Literal["function", "scalar"] | None = None
    # Folder of the model without length, with --erase.
    out: str | None = None
    # Replace a finished folder of that name.
    force: bool = False
    # Print the result as JSON.
    json: bool = False


@dataclass(frozen=True)
class Erase:
    """A new model whose output has no linear read-out of a concept: one affine map, as a stock module."""

    # The model: a folder or a name.
    model: str
    # Texts with the concept in a column: a file or folder, larger than memory if need be.
    data: str
    # Folder of the new model.
    out: str
    # Columns to be erased; all of them go together, by one map.
    concept: tuple[str, ...] = ()
    # What the columns hold: scalar, ordinal, category, multilabel or function; or of each: age=function,topic=category.
    # length=scalar: of the text's length the token count and its logarithm alone.
    kind: str | None = None
    # Erase the length of the text too.
    also: Literal["length"] | None = None
    # A column whose covariance with the vectors is to stay.
    preserve: str | None = None
    # The map (derived: sphere where the output is normalised, leace elsewhere). oracle erases more, has to be told the
    # concept's value of each vector, and is no part of a model; the others are there to compare with.
    method: Literal["sphere", "leace", "oracle", "orthogonal", "inlp", "direction"] | None = None
    # How far to go: 0 leaves all, 1 nothing.
    strength: float = 1.0
    # How the texts are read and embedded.
    reading: Reading = field(default_factory=Reading)
    # Replace a finished folder of that name.
    force: bool = False
    # Print the result as JSON.
    json: bool = False


@dataclass(frozen=True)
class Reduce:
    """A new model with fewer dimensions, or whitened ones, by one map folded into it; with figures of isotropy."""

    # The model: a folder or a name.
    model: str
    # The text to fit on.
    data: str
    # Dimensions to keep.
    to: int
    # Folder of the new model.
    out: str
    # pca keeps dot products best; whiten evens out variances; top drops mean and leading components; truncate cuts.
    method: Literal["pca", "whiten", "truncate", "top"] = "pca"
    # How the texts are read and embedded.
    reading: Reading = field(default_factory=Reading)
    # Replace a finished folder of that name.
    force: bool = False
    # Print the result as JSON.
    json: bool = False


@dataclass(frozen=True)
class Certify:
    """What probes on fresh rows still find of a concept, linear ones and others, and what its erasure costs."""

    # The model: a folder or a name; one from which nothing was erased is measured too.
    model: str
    # Texts that the eraser has not seen: a file or folder; at least ten times as many as the vectors have dimensions.
    data: str
    # The column that holds the concept, or length (derived: what was erased; length where nothing was).
    concept: str | None = None
    # What the column holds, where nothing was erased: scalar, ordinal, category, multilabel or function.
    kind: str | None = None
    # The model before the erasure, to compare with.
    base: str | None = None
    # BEIR folders (or folder:split) or pairs that both models are judged on: nDCG@10.
    retrieval: tuple[str, ...] = ()
    # Scored pairs that both models are judged on: Spearman.
    similarity: tuple[str, ...] = ()
    # Folder that the certificate is added to (derived: the model's).
    out: str | None = None
    # How the texts are read and embedded.
    reading: Reading = field(default_factory=Reading)
    # Of shuffles, parts and probes.
    seed: int = 0
    # Print the result as JSON.
    json: bool = False


@dataclass(frozen=True)
class Merge:
    """Average a tuned model with the base it was tuned from; the coefficient is given, or chosen on dev data."""

    # The base, then the tuned model: two folders or names of one architecture.
    models: tuple[str, ...]
    # Folder of the averaged model.
    out: str
    # How far to go from the base (0) to the tuned model (1).
    coefficient: float | None = None
    # Choose the coefficient on this: a BEIR folder (or folder:split), pairs, or scored pairs.
    data: str | None = None
    # The measure that chooses (derived: nDCG@10, or Spearman).
    measure: str | None = None
    # Which column is which: anchor=question,positive=context.
    columns: str | None = None
    # Replace a finished folder of that name.
    force: bool = False
    # Print the result as JSON.
    json: bool = False


def merge(command: Merge, talk: Talk) -> Output:
    """Write the average."""
    from embedtune.average import average

    found = average(command.models, command.out, coefficient=command.coefficient, data=command.data,
                    measure=command.measure, columns=command.columns, force=command.force, note=talk.note)  # fmt: skip
    lines = [f"{c:g} of the way to the tuned model: {found.measure} {v:.4f}" for c, v in found.tried.items()]
    lines.append(f"{found.folder}/ holds the average at {found.coefficient:g}")
    return Output(lines, {**vars(found), "folder": str(found.folder)})


def erase(command: Erase, talk: Talk) -> Output:
    """Write the model without the concepts, or the folder of an oracle."""
    from embedtune.encoder.shapes import bound_memory
    from embedtune.refine.erase import Erasure, Texts
    from embedtune.refine.erase import erase as erase_concepts

    bound_memory()
    told, method = command.method == "oracle", None if command.method == "oracle" else command.method
    wanted = Erasure(command.concept, command.kind, command.also == "length", command.preserve, method,
                     command.strength)  # fmt: skip
    texts = Texts(command.data, command.reading.columns, command.reading.bad_rows, command.reading.rows)
    if told:
        from embedtune.refine.told import erase_told

        oracle = erase_told(command.model, texts, wanted, command.out, force=command.force,
                            precision=command.reading.precision, note=talk.note)  # fmt: skip
        return Output(oracle.lines(), oracle.as_dict())
    erased = erase_concepts(command.model, texts, wanted, command.out, force=command.force,
                            precision=command.reading.precision, note=talk.note)  # fmt: skip
    return Output(erased.lines(), erased.as_dict())


def reduce(command: Reduce, talk: Talk) -> Output:
    """Write the smaller model."""
    from embedtune.encoder.shapes import bound_memory
    from embedtune.refine.erase import Texts
    from embedtune.refine.reduce import reduce as reduce_dimensions

    bound_memory()
    texts = Texts(command.data, command.reading.columns, command.reading.bad_rows, command.reading.rows)
    found = reduce_dimensions(command.model, texts, command.to, command.method, command.out, force=command.force,
                              precision=command.reading.precision, note=talk.note)  # fmt: skip
    figures = {"before": vars(found.before), "after": vars(found.after)}
    return Output(found.lines(), {**vars(found), **figures, "folder": str(found.folder)})


def length(command: Length, talk: Talk) -> Output:
    """Measure, and add the direction to the folder; or erase length into a new one."""
    if command.erase != (command.out is not None):
        raise UserError("--erase and --out go together: length is erased into a new folder")
    if command.kind and not command.erase:
        raise UserError("says what is erased", where="--kind", fix="add --erase --out FOLDER, or leave it out")
    if command.out is not None:
        shared = {f.name: getattr(command, f.name) for f in fields(Erase) if hasattr(command, f.name)}
        return erase(Erase(**shared, also="length"), talk)
    from embedtune.encoder.shapes import bound_memory
    from embedtune.refine.measure import measure_length

    bound_memory()
    report = measure_length(command.model, command.data, columns=command.reading.columns,
                            bad_rows=command.reading.bad_rows, rows=command.reading.rows,
                            precision=command.reading.precision, note=talk.note)  # fmt: skip
    return Output(report.lines(), report.as_dict())


def certify(command: Certify, talk: Talk) -> Output:
    """Probe, compare, and add the certificate to a folder."""
    from embedtune.encoder.shapes import bound_memory
    from embedtune.parts import open_judged
    from embedtune.refine import certify as work

    bound_memory()
    folder = Path(command.out or command.model)
    if not command.out and not folder.is_dir():
        raise UserError(f"give --out DIR: {command.model} is not a folder to write into")
    reading = command.reading
    retrieval = [open_judged(name, bad_rows=reading.bad_rows).retrieval for name in command.retrieval]
    similarity = [open_judged(name, bad_rows=reading.bad_rows) for name in command.similarity]
    wrong = [n for n, found in zip(command.retrieval, retrieval) if found is None]
    wrong += [n for n, found in zip(command.similarity, similarity) if not found.scored]
    if wrong:
        fix = "--retrieval takes BEIR folders and pairs, --similarity scored pairs"
        raise UserError("holds data of the other kind", where=wrong[0], fix=fix)
    fresh = work.Fresh(command.data, command.concept, command.kind, reading.columns, reading.bad_rows, reading.rows)
    judged = work.Judged([data for data in retrieval if data], [(data.name, data.scored) for data in similarity])
    found = work.certify(command.model, fresh, base=command.base, judged=judged, precision=command.reading.precision,
                         seed=command.seed, note=talk.note)  # fmt: skip
    earlier = work.earlier(folder)
    names = work.write_certificate(found, folder)
    lines = [found.word, *found.sentences(), *found.costs(), "", *table(["probe", "before", "after"], found.figures())]
    return Output([*lines, "", f"{folder}/ now holds {', '.join(names)}", *earlier], found.as_dict())


COMMANDS = {
    "refine merge": Command(
        "BASE TUNED --out DIR", "average a tuned model with its base", Merge, merge, None, models_first
    ),
    "refine erase": Command(
        "MODEL --data FILE --concept COLUMN --out DIR",
        "a model from whose output concepts cannot be read linearly",
        Erase,
        erase,
        "--model",
    ),
    "refine reduce": Command(
        "MODEL --data FILE --to DIM --out DIR", "fewer dimensions, or whitened ones", Reduce, reduce, "--model"
    ),
    "refine certify": Command(
        "MODEL --data FRESH",
        "what probes still find of a concept, and what erasing it costs",
        Certify,
        certify,
        "--model",
    ),
    "refine length": Command(
        "MODEL --data FILE", "the direction in which embeddings encode length", Length, length, "--model"
    ),
}
