"""The record of an erasure in a model folder, and the same erasure for vectors that were computed without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from embedtune import files
from embedtune.errors import UserError
from embedtune.nearest import unit
from embedtune.refine.affine import Affine
from embedtune.refine.space import check_space

WEIGHTS, ABOUT = "erasure.safetensors", "erasure.json"
SPACES = ("raw", "normalised", "sphere")


@dataclass(frozen=True, eq=False)
class Eraser:
    """What a baked model does to a vector, as a callable: `Eraser.load(folder)(embeddings)`.

    The space says what goes in: "raw" and "sphere" take vectors as they are before any normalisation, "normalised"
    those of norm one. `normalise`: the model has a Normalize after the map, so vectors of norm one come out.
    """

    affine: Affine
    space: str
    norms: tuple[float, float]  # smallest and largest of the rows it was fitted on
    normalise: bool
    about: Mapping[str, Any] = field(default_factory=dict)  # all of erasure.json
    where: str = "the eraser"

    def __call__(self, embeddings: Any) -> Any:
        """Erased vectors of (d,) or (n, d): numpy or torch, same dtype and device out, float64 inside.

        Raises UserError for another dimension, vectors of another space, non-finite values.
        """
        out = self.affine(embeddings)
        tensor = type(embeddings).__module__.partition(".")[0] == "torch"
        rows = embeddings.detach().double().cpu().numpy() if tensor else np.asarray(embeddings, np.float64)
        space = "normalised" if self.space == "normalised" else "raw"
        check_space(np.atleast_2d(rows), space, self.norms, self.where)
        if not self.normalise:
            return out
        if tensor:
            from torch.nn.functional import normalize

            wide = out if out.dtype.itemsize > 4 else out.float()
            return normalize(wide, dim=-1).to(out.dtype)
        return unit(out.astype(np.float64)).astype(out.dtype)

    @classmethod
    def load(cls, folder: Path | str) -> Eraser:
        """The erasure of a baked model, for embeddings of the model it was made from.

        Raises UserError where there is none, where it is damaged, or where the model was changed after the erasure:
        then its vectors are others, and nothing is known of what they tell.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        path = Path(folder)
        about = read_about(path)
        if about.get("kind") == "oracle":
            what = "holds an oracle, which has to be told the concept's value of every vector"
            raise UserError(what, where=str(path), fix="Oracle.load(folder)(embeddings, values)")
        try:
            if files.sha256(path / WEIGHTS) != about["erasure_sha256"]:
                raise ValueError(f"{WEIGHTS} and {ABOUT} are not of the same run")
            arrays = load((path / WEIGHTS).read_bytes())
            low, high = about["norms"]
            affine = Affine(arrays["weight"], arrays["bias"])
            if about["space"] not in SPACES or affine.weight.shape[1] != about["dimension"]:
                raise ValueError(f"{ABOUT} does not fit {WEIGHTS}")
            found = cls(affine, about["space"], (low, high), bool(about["normalise"]), about, str(path))
            changed = [n for n, digest in about["weights"].items() if _sum(path / n) != digest]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise UserError(
                f"the erasure cannot be read: {error}", where=str(path), fix="make the folder again"
            ) from error
        if changed:
            raise UserError(
                f"the model was changed after the erasure ({changed[0]} has other weights): what it guarded is no "
                "longer known to be gone",
                where=str(path),
                fix="erase again, from the changed model",
            )
        return found


def read_about(folder: Path) -> dict[str, Any]:
    """erasure.json of a baked model; a UserError where the folder has none."""
    if not (folder / ABOUT).is_file():
        raise UserError(f"has no {ABOUT}: nothing was erased from it", where=str(folder))
    about = files.read_json(folder / ABOUT)
    if not isinstance(about, dict):
        raise UserError("is no record of an erasure", where=str(folder / ABOUT))
    return about


def write_erasure(folder: Path, affine: Affine, about: Mapping[str, Any], texts: Any = ()) -> None:
    """Add erasure.safetensors, weight and bias in float64, and erasure.json: see `write_record`."""
    arrays = {"weight": np.ascontiguousarray(affine.weight), "bias": np.ascontiguousarray(affine.bias)}
    write_record(folder, arrays, about, texts)


def write_record(folder: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any], texts: Any) -> None:
    """Add erasure.safetensors and, last, erasure.json, which names its sha256.

    The first also holds the `digest` of every text of the fit in uint64, sorted.
    """
    from safetensors.numpy import save

    files.write_bytes(folder / WEIGHTS, save({**arrays, "texts": np.unique(np.array(texts, np.uint64))}))
    files.write_json(folder / ABOUT, {**about, "erasure_sha256": files.sha256(folder / WEIGHTS)})


def digest(text: str) -> int:
    """8 bytes that tell one text from another: of 100,000 texts two are alike with a chance of 3e-10."""
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def fitted_texts(folder: Path) -> frozenset[int] | None:
    """The `digest` of every text that the eraser of a folder was fitted on; None in a folder without them."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load((folder / WEIGHTS).read_bytes())
    except (OSError, SafetensorError) as error:
        raise UserError(f"the erasure cannot be read: {error}", where=str(folder), fix="make it again") from error
    return frozenset(arrays["texts"].tolist()) if "texts" in arrays else None


def refuse_second(folder: Path) -> None:
    """A UserError where something was erased from this model already: a second map can bring the first back."""
    if not (folder / ABOUT).is_file():
        return
    about = read_about(folder)
    names = ", ".join(dict.fromkeys(concept["name"] for concept in about["concepts"]))
    raise UserError(
        f"{names} was erased from it already, and another map after that one can bring back what it took away",
        where=str(folder),
        fix=f"erase all concepts together, from {about['model']}: --concept takes several columns, --also length",
    )


def _sum(path: Path) -> str | None:
    return files.sha256(path) if path.is_file() else None
