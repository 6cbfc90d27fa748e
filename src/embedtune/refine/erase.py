"""`refine erase`: read texts with their concepts, embed them once, fit the map, bake it into a new model folder."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from embedtune.data.columns import parse_columns
from embedtune.data.read import BadRows, Counts, DataLike, Row, read_texts
from embedtune.errors import UserError, short_list
from embedtune.refine.affine import Affine
from embedtune.refine.cached import Cached, cache
from embedtune.refine.concepts import LENGTH, NUMBERS, Encoding, Survey, length_encodings, missing
from embedtune.refine.fitting import fit_map
from embedtune.refine.probes import floor
from embedtune.refine.sidecar import digest, write_erasure
from embedtune.refine.space import space_of

Method = Literal["sphere", "leace", "orthogonal", "inlp", "direction"]
PRESERVING = ("sphere", "leace")


@dataclass(frozen=True)
class Texts:
    """Where the texts come from: the arguments of every reader."""

    data: DataLike
    columns: str | None = None
    bad_rows: BadRows = "fail"
    rows: int | None = None


@dataclass(frozen=True)
class Erasure:
    """What is to be erased, and how; all concepts are erased by one map."""

    concepts: tuple[str, ...] = ()  # columns
    kind: str | None = None  # of all columns, or of each: age=function,topic=category,length=scalar
    length: bool = False  # the token count with its logarithm, and all smooth functions of that unless kind is scalar
    preserve: str | None = None  # a column whose covariance is to stay
    method: Method | None = None  # derived: sphere where the output is normalised, leace elsewhere
    strength: float = 1.0

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        return (*self.concepts, *([self.preserve] if self.preserve else []))

    def check(self) -> None:
        """Raise UserError for what contradicts itself."""
        if not self.concepts and not self.length:
            raise UserError("nothing is named that is to be erased", fix="--concept COLUMN, or --also length")
        if twice := [name for name in set(self.columns) if self.columns.count(name) > 1]:
            raise UserError(f"column {twice[0]!r} is named twice: it can be erased or preserved, once")
        if self.preserve and self.method not in (None, *PRESERVING):
            raise UserError(f"--method {self.method} cannot preserve a column", fix=f"--method {PRESERVING[1]}")
        if not 0 <= self.strength <= 1:
            raise UserError(f"must lie between 0 and 1, not {self.strength:g}", where="--strength")
        if self.length and (kind := self.kinds().get(LENGTH)) not in (None, "scalar", "function"):
            raise UserError(f"length is scalar or function, not {kind!r}", where="--kind")

    def kinds(self) -> dict[str, Any]:
        """The kind that was given for each column, and for length; a bare kind is of the columns, if there are any."""
        names = (*self.columns, *([LENGTH] if self.length else []))
        if self.kind is None or "=" not in self.kind:
            return dict.fromkeys(names) | dict.fromkeys(self.columns or names, self.kind)
        given = parse_columns(self.kind)
        if strange := [name for name in given if name not in names]:
            raise UserError(f"{strange[0]!r} is neither a concept nor preserved", where="--kind")
        return {name: given.get(name) for name in names}


@dataclass(frozen=True)
class Erased:
    """The baked model, and what the erasure did to the vectors it was fitted on."""

    folder: Path
    concepts: tuple[Encoding, ...]
    method: str
    place: str  # where the map stands in the model
    normalised: bool  # whether a Normalize follows it
    n: int
    live: int  # dimensions that carry anything
    rank: int  # dimensions that were taken away
    r2: tuple[tuple[float, float], ...]  # of the best linear read-out of each concept, before and after
    left: float  # the largest covariance with a standardised concept, of the model's output
    passes: int
    cosines: float  # how much the cosine of two texts changes, on average
    variance: float  # share of the output's variance that is gone
    remarks: tuple[str, ...]

    def lines(self) -> list[str]:
        """The result in words, and last what is to be noted."""
        where = f"{self.folder}/ holds the model: {self.place}; erasure.json says what was done"
        return [*self.figures(), where, *self.remarks]

    def figures(self) -> list[str]:
        """What the erasure did to the fitted texts, with what it does and does not promise."""
        after = "the normalised output" if self.normalised else "the output"
        gone = self.variance
        change = f"{gone:.1%} of the variance is gone" if gone >= 0 else f"the variance grew by {-gone:.1%}"
        out = [f"{in_words(each)}: linear R2 {a:.4f} -> {b:.4f}" for each, (a, b) in zip(self.concepts, self.r2)]
        return [
            *out,
            f"method {self.method}: {self.rank:,} of {self.live:,} live dimensions, fitted on {self.n:,} texts"
            + (f" in {self.passes} passes" if self.passes > 1 else ""),
            f"largest covariance of {after} with a concept: {self.left:.1e} (in standard deviations); "
            f"{change}; the cosine of two texts changes by {self.cosines:.3f}",
            "these figures are of the fitted texts; of fresh ones a new linear probe finds about "
            f"{floor(self.live, self.n):.2%} again (r / (1 + r), r = (d - 1) / n)",
            "what is not linear stays: a network may still tell the concept",
        ]

    def as_dict(self) -> dict[str, Any]:
        """The figures, for JSON."""
        concepts = [each.as_json() for each in self.concepts]
        return {**vars(self), "folder": str(self.folder), "concepts": concepts}


def erase(
    model: str,
    texts: Texts,
    wanted: Erasure,
    out: str | Path,
    *,
    force: bool = False,
    precision: Any = "fp32",
    note: Callable[[str], None] = lambda text: None,
) -> Erased:
    """Write `out`: the model with the concepts erased from its output by one affine map, as a stock module.

    The vectors are cached in a temporary folder, so memory is flat in the number of texts. Raises UserError for
    concepts that cannot be erased, a model from which something was erased already, texts that cannot be read.
    """
    from embedtune.encoder import embedder
    from embedtune.refine import bake

    wanted.check()
    kinds = wanted.kinds()
    source = bake.source_of(model, out, force)
    encodings, remarks = survey(texts, wanted, kinds)
    opened = embedder.load_trainable(source)
    normalised = bake.take_normalize(opened.model)
    counts, read = Counts(), array("Q")
    with tempfile.TemporaryDirectory() as scratch:
        rows = labelled(read_rows(texts, wanted, counts), wanted.columns, read)
        cached = cache(Path(scratch), bake.embedding(source, precision), rows, encodings, note=note)
        applied = apply(opened.model, normalised, cached, wanted, encodings, Path(out))
        del cached  # the memory maps go before their files
    said = (*remarks, *counted(counts), *applied.erased.remarks)
    applied = replace(applied, erased=replace(applied.erased, remarks=said))
    bake.write_model(
        opened,
        Path(out),
        lambda folder, weights: applied.record(folder, model, counts.sha256, weights, read),
        _card(model, applied.erased),
    )
    return applied.erased


@dataclass(frozen=True, eq=False)
class Applied:
    """An erasure that is in a model, and is not written yet."""

    erased: Erased
    affine: Affine
    about: Mapping[str, Any]

    def record(self, folder: Path, model: str, data: str, weights: Mapping[str, str], texts: Any) -> None:
        """Add the sidecar to the model's folder; `texts` are the digests of the fit."""
        about = {**self.about, "model": model, "data_sha256": data, "weights": weights, "embedtune": release()}
        write_erasure(folder, self.affine, about, texts)


def apply(
    model: Any, normalised: bool, cached: Cached, wanted: Erasure, encodings: tuple[Encoding, ...], out: Path
) -> Applied:
    """Fit the map on cached vectors and put it into a SentenceTransformer, whose Normalize (if any) was taken off."""
    from embedtune.refine import bake

    method, normalise, said = _way(wanted.method, normalised, model.similarity_fn_name)
    lengths = length_encodings(cached.tokens, wanted.kinds()[LENGTH]) if wanted.length else ()
    concepts = (*lengths, *encodings)
    concepts, preserve = (concepts[:-1], concepts[-1:]) if wanted.preserve else (concepts, ())
    found = fit_map(cached, concepts, preserve, method, wanted.strength, normalise)
    place = bake.attach(model, found.affine, normalise)
    if cached.truncated:
        said.insert(0, f"{cached.truncated:,} texts ({cached.truncated / found.n:.1%}) were cut at the model's limit")
    erased = Erased(out, concepts, method, place, normalise, found.n, found.live, found.rank, found.r2, found.left,
                    found.passes, found.cosines, found.variance, (*said, *found.remarks))  # fmt: skip
    about = {
        "kind": "erasure", "concepts": [each.as_json() for each in concepts],
        "preserve": [each.as_json() for each in preserve], "method": method, "strength": wanted.strength,
        "place": place, "space": "sphere" if method == "sphere" else space_of(cached.norms), "normalise": normalise,
        "norms": cached.norms, "dimension": found.affine.weight.shape[1], "live_dimensions": found.live,
        "n_fit": found.n, "rank": found.rank, "canonical_correlations": found.correlations,
        "covariance_left": found.left, "r2": found.r2, "passes": found.passes,
    }  # fmt: skip
    return Applied(erased, found.affine, about)


def survey(
    texts: Texts, wanted: Erasure, kinds: Mapping[str, Any], *, smooth: bool = False
) -> tuple[tuple[Encoding, ...], list[str]]:
    """The encodings of the columns, the preserved one last, and what was missing; one pass over the data.

    `smooth`: of a number all smooth functions are taken.
    """
    surveys = {name: Survey(name) for name in wanted.columns}
    if not surveys:
        return (), []
    left_out = 0
    for row in read_rows(texts, wanted, Counts()):
        left_out += not all([survey.add(row.values.get(name)) for name, survey in surveys.items()])
    remarks = [f"{left_out:,} rows left out: no value of {short_list(list(surveys))}"] if left_out else []
    found = {name: each.encoding(kinds[name]) for name, each in surveys.items()}
    if smooth:
        numbers = [name for name, each in found.items() if each.kind in NUMBERS]
        found |= {name: surveys[name].encoding("function") for name in numbers}
    return tuple(found.values()), remarks


def read_rows(texts: Texts, wanted: Erasure, counts: Counts) -> Iterator[Row]:
    """The rows of the data, with the columns of the concepts."""
    columns = {**parse_columns(texts.columns), **{name: name for name in wanted.columns}}
    return islice(read_texts(texts.data, columns=columns, bad_rows=texts.bad_rows, counts=counts), texts.rows)


def labelled(rows: Iterable[Row], names: tuple[str, ...], read: array[int]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Texts with the values of all concepts; the digest of each goes to `read`."""
    for row in rows:
        values = {name: row.values.get(name) for name in names}
        if not any(map(missing, values.values())):
            read.append(digest(row.values["text"]))
            yield row.values["text"], values


def _way(method: Method | None, normalised: bool, similarity: str) -> tuple[str, bool, list[str]]:
    """The method, whether a Normalize follows the map, and what is to be said about it."""
    if normalised:
        return method or "sphere", True, []
    if method == "sphere" or (method is None and similarity == "cosine"):
        why = f"the model compares by {similarity}, and its vectors are not normalised"
        return "sphere", True, [f"{why}: a Normalize was added, since the map guards directions"]
    said = []
    if similarity == "cosine":
        said = [
            "the vectors are guarded as they are; a cosine divides by their norms, which can bring the concept back"
        ]
    return method or "leace", False, said


def counted(counts: Counts) -> list[str]:
    """What was left out and mended while reading."""
    out = [f"{n:,} rows left out: {reason}" for reason, n in counts.rejected.items() if reason != "blank"]
    return out + [f"{n:,} rows mended: {reason}" for reason, n in counts.replaced.items()]


def in_words(concept: Encoding) -> str:
    """A concept's name and kind."""
    name = concept.name if concept.source == "column" else concept.source
    classes = f" of {len(concept.classes):,}" if concept.classes else ""
    return f"{name} ({concept.kind}{classes})"


def _card(model: str, erased: Erased) -> str:
    """The model card."""
    lines = "\n".join(f"- {line}" for line in (*erased.figures(), *erased.remarks))
    return f"# Model with concepts erased\n\nMade from `{model}` with embedtune: {erased.place}.\n\n{lines}\n"


def release() -> str:
    """The version of embedtune."""
    try:
        return version("embedtune")
    except PackageNotFoundError:
        return "unknown"
