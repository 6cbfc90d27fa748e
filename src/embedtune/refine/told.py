"""`refine erase --method oracle`: an eraser that is told the concept's value of each vector, in its own folder."""

from __future__ import annotations

import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedtune import files
from embedtune.data.read import Counts
from embedtune.encoder.encode import LocalEncoder, Role
from embedtune.errors import UserError
from embedtune.nearest import unit
from embedtune.refine.cached import Cached, cache
from embedtune.refine.concepts import LENGTH, Encoding, length_encodings
from embedtune.refine.erase import Erasure, Texts, counted, in_words, labelled, read_rows, release, survey
from embedtune.refine.eraser import whitening
from embedtune.refine.fitting import best_r2, cosine_change, largest_covariance
from embedtune.refine.oracle import Round, Transport, cells, fit_transport, with_first
from embedtune.refine.probes import floor
from embedtune.refine.sidecar import ABOUT, WEIGHTS, read_about, write_record
from embedtune.refine.space import check_space, space_of
from embedtune.refine.statistics import accumulate

KIND = "oracle"


@dataclass(frozen=True, eq=False)
class Oracle:
    """`Oracle.load(folder)(embeddings, values)`: vectors without a concept whose value is known for each of them."""

    transport: Transport
    encoding: Encoding
    space: str  # of the vectors that go in, as the model gives them
    norms: tuple[float, float]
    about: Mapping[str, Any]  # all of erasure.json
    where: str = "the oracle"

    def __call__(self, embeddings: Any, values: Sequence[Any] | np.ndarray) -> Any:
        """Erased vectors of (n, d), numpy or torch, same dtype and device out; `values` (n,): of length the tokens.

        Raises UserError for another dimension or space, NaN, and values that are missing or unknown.
        """
        tensor = type(embeddings).__module__.partition(".")[0] == "torch"
        x = embeddings.detach().double().cpu().numpy() if tensor else np.asarray(embeddings, np.float64)
        d = len(self.transport.alive)
        if x.ndim != 2 or x.shape[1] != d or len(values) != len(x):
            what = f"vectors must be (n, {d:,}) and values (n,), found {x.shape} and ({len(values):,},)"
            raise UserError(what, where=self.where)
        check_space(x, self.space, self.norms, self.where)
        out = self.transport(x, _cells(self.encoding, values))
        if tensor:
            import torch

            return torch.from_numpy(out).to(embeddings.device, embeddings.dtype)
        return out.astype(np.asarray(embeddings).dtype)

    @classmethod
    def load(cls, folder: Path | str) -> Oracle:
        """What `refine erase --method oracle` wrote. Raises UserError where there is none, or where it is damaged."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        path = Path(folder)
        about = read_about(path)
        if about.get("kind") != KIND:
            fix = "Eraser.load(folder)(embeddings)"
            raise UserError("holds a map that needs no values, and no oracle", where=str(path), fix=fix)
        try:
            if files.sha256(path / WEIGHTS) != about["erasure_sha256"]:
                raise ValueError(f"{WEIGHTS} and {ABOUT} are not of the same run")
            arrays = load((path / WEIGHTS).read_bytes())
            wide = {name: array.astype(np.float64) for name, array in arrays.items()}
            rounds = [
                Round(wide[f"mean_{k}"], wide[f"centres_{k}"], wide.get(f"maps_{k}")) for k in range(about["rounds"])
            ]
            transport = Transport(arrays["alive"].astype(bool), tuple(rounds), bool(about["normalise"]))
            low, high = about["norms"]
            encoding = Encoding.from_json(about["concepts"][0])
            return cls(transport, encoding, about["space"], (low, high), about, str(path))
        except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
            raise UserError(f"the oracle cannot be read: {error}", where=str(path), fix="make it again") from error


class ToldEncoder:
    """A model whose vectors an oracle of length erases, told the tokens of each text as the model counts them."""

    def __init__(self, encoder: LocalEncoder, oracle: Oracle) -> None:
        self.encoder, self.oracle = encoder, oracle
        self.name, self.dimension = encoder.name, encoder.dimension

    def encode(self, texts: Sequence[str], role: Role = "text") -> np.ndarray:
        """Erased vectors (n, D) float32 of texts in a role."""
        parts = [self.oracle(part.vectors, part.tokens) for part in self.encoder.stream(texts, role)]
        return np.concatenate(parts or [np.zeros((0, self.dimension), np.float32)])


@dataclass(frozen=True)
class Told:
    """The oracle's folder, and what it did to the vectors that it was fitted on."""

    folder: Path
    model: str
    concept: Encoding
    n: int
    live: int
    r2: tuple[float, float]  # of the best linear read-out, before and after
    left: float  # the largest covariance with the concept, in standard deviations of both sides
    cosines: float  # how much the cosine of two texts changes, on average
    remarks: tuple[str, ...]

    def lines(self) -> list[str]:
        """The result in words: what it is not, too."""
        least = floor(self.live, self.n)
        return [
            f"{in_words(self.concept)}: linear R2 {self.r2[0]:.4f} -> {self.r2[1]:.4f}",
            f"method oracle, fitted on {self.n:,} texts; largest covariance {self.left:.1e} (in standard deviations); "
            f"the cosine of two texts changes by {self.cosines:.3f}",
            f"of fresh texts a new linear probe finds {least:.2%} or more again, and other probes find more: "
            "`embedtune refine certify` measures both",
            f"{self.folder}/ holds no model: what has to be told a value cannot be a module of a stock model. Vectors "
            f"of {self.model} go through Oracle.load({str(self.folder)!r})(embeddings, values)",
            *self.remarks,
        ]

    def as_dict(self) -> dict[str, Any]:
        """The figures, for JSON."""
        return {**vars(self), "folder": str(self.folder), "concept": self.concept.as_json()}


def erase_told(
    model: str,
    texts: Texts,
    wanted: Erasure,
    out: str | Path,
    *,
    force: bool = False,
    precision: Any = "fp32",
    note: Callable[[str], None] = lambda text: None,
) -> Told:
    """Fit the oracle of one concept on the model's output for the texts, and write its folder.

    Raises UserError for several concepts, a column to preserve, a part of the way, labels that hold together.
    """
    from embedtune.encoder import embedder
    from embedtune.refine import bake

    _check(wanted)
    source, folder = bake.source_of(model, out, force), Path(out)
    encodings, remarks = survey(texts, wanted, wanted.kinds(), smooth=True)
    opened, _ = embedder.load_embedder(source, precision)
    counts, read = Counts(), array("Q")
    with tempfile.TemporaryDirectory() as scratch:
        rows = labelled(read_rows(texts, wanted, counts), wanted.columns, read)
        cached = cache(Path(scratch), opened, rows, encodings, note=note)
        encoding = encodings[0] if encodings else length_encodings(cached.tokens)[1]
        normalise = opened.similarity_fn_name == "cosine"
        note("fitting the oracle")
        transport, figures = _fit(cached, encoding, normalise)
        norms = cached.norms
        del cached  # the memory maps go before their files
    told = Told(folder, model, encoding, remarks=(*remarks, *counted(counts)), **figures)
    about = {
        "kind": KIND, "method": KIND, "model": model, "concepts": [encoding.as_json()], "space": space_of(norms),
        "norms": norms, "normalise": normalise, "rounds": len(transport.rounds), "dimension": len(transport.alive),
        "live_dimensions": told.live, "n_fit": told.n, "covariance_left": told.left, "r2": [told.r2],
        "data_sha256": counts.sha256, "weights": bake.weight_sums(source), "embedtune": release(),
    }  # fmt: skip
    temporary = folder.with_name(folder.name + files.TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    with files.disk_errors(temporary):
        files.make_folder(temporary)
        files.write_text(
            temporary / "README.md", "# Oracle\n\n" + "\n".join(f"- {line}" for line in told.lines()) + "\n"
        )
        write_record(temporary, _arrays(transport), about, read)
        files.move_directory(temporary, folder)
    return told


def _check(wanted: Erasure) -> None:
    wanted.check()
    if len(wanted.concepts) + wanted.length != 1:
        what = "--method oracle takes one concept: each cell of several would have too few texts"
        raise UserError(what, fix="--concept COLUMN or --also length; a column may hold combinations of values")
    if wanted.length and wanted.kinds()[LENGTH] == "scalar":
        what = "--method oracle takes all smooth functions of length, not the count and its logarithm alone"
        raise UserError(what, where="--kind", fix="leave it out")
    if wanted.preserve or wanted.strength != 1:
        raise UserError("--method oracle knows neither --preserve nor --strength", fix="--method leace")


def _cells(encoding: Encoding, values: Sequence[Any] | np.ndarray) -> np.ndarray:
    return cells(encoding, values if encoding.source == "column" else np.log(np.maximum(values, 1)))


def _fit(cached: Cached, encoding: Encoding, normalise: bool) -> tuple[Transport, dict[str, Any]]:
    """The map, and the figures of `Told` on the rows that it was fitted on."""

    def inside(rows: slice | np.ndarray) -> np.ndarray:
        if encoding.source != "column":
            return _cells(encoding, cached.tokens[rows])
        return with_first(cached.z[rows])

    def vectors() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return ((cached.x[rows].astype(np.float64), inside(rows)) for rows in cached.blocks())

    transport = fit_transport(vectors, normalise)
    before = accumulate((unit(x) if normalise else x, w[:, 1:]) for x, w in vectors())
    after = accumulate((transport(x, w), w[:, 1:]) for x, w in vectors())
    everything = slice(None)
    return transport, {
        "n": before.n,
        "live": len(whitening(before).back.T),
        "r2": (best_r2(before, everything), best_r2(after, everything)),
        "left": largest_covariance(after, everything),
        "cosines": cosine_change(cached.x, lambda x, rows: transport(x, inside(rows))),
    }


def _arrays(transport: Transport) -> dict[str, np.ndarray]:
    """For safetensors; the maps are large, and float32 is what vectors are."""
    parts = {
        f"{name}_{k}": np.ascontiguousarray(getattr(each, name), np.float32)
        for k, each in enumerate(transport.rounds)
        for name in ("mean", "centres", "maps")
        if getattr(each, name) is not None
    }
    return {**parts, "alive": transport.alive.astype(np.uint8)}
