"""The direction of token length: find it, judge it on texts it has not seen, save it, remove it.

Two vectors matter (erasure.md 3.3). b, the regression vector, *predicts* length best: it is what
`length_direction.npy` holds. g = Cov(x, length) is what has to be *killed*: x - g b'(x - mu) / b'g leaves no
covariance with length and hence no linear read-out of it, while projecting out b alone leaves most of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedtune import files
from embedtune.errors import UserError
from embedtune.keyed import key, uniform
from embedtune.plots import length_plot
from embedtune.refine.probes import floor
from embedtune.refine.space import check_space, space_of
from embedtune.refine.statistics import Statistics, refuse_non_finite, solve

if TYPE_CHECKING:
    from embedtune.encoder.embed import Embedded

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]  # vectors (m, d), targets (m, 2), groups (m,)
DIRECTION, SIDECAR = "length_direction.npy", "length_direction.json"
GROUP = 64  # consecutive texts that stay on one side of the split: neighbours are often near-copies
FOLD = 5  # one group in five is held out
NORMALISING = {
    "raw": "do not normalise the vectors afterwards (a cosine does): their norm tells the length, and "
    "dividing by it can make length easier to read than it was at first",
    "normalised": "the vectors lose their norm of one; normalising again (a cosine does) brings some back",
}


@dataclass(frozen=True, eq=False)
class ReadOut:
    """A linear read-out of one target: z ~ intercept + scale * direction'x."""

    direction: np.ndarray  # (d,) b, of norm one; longer is positive
    g: np.ndarray  # (d,) Cov(x, z), of norm one
    scale: float
    intercept: float
    r2_fit: float  # on the rows it was fitted on
    r2: float  # on held-out rows
    interval: tuple[float, float] | None  # 95 % of r2; None where the groups are too few


@dataclass(frozen=True, eq=False)
class LengthReport:
    """What `fit_length` found; `tokens` is the read-out whose direction is saved and removed."""

    tokens: ReadOut
    log_tokens: ReadOut
    log_r2_left: float  # in-sample R2 of log tokens that remains when `tokens` is removed
    mean: np.ndarray  # (d,) of the fitted rows
    live: int  # dimensions that carry anything; the rest gets no weight
    n_fit: int
    n_held_out: int
    truncated: int  # texts cut at the model's limit
    space: str  # "normalised" where every vector had norm one, else "raw"
    norms: tuple[float, float]  # smallest and largest
    predicted: np.ndarray  # (m,) tokens, on a sample of the held-out rows
    true: np.ndarray  # (m,)

    def lines(self) -> list[str]:
        """The result in words, with what it does and does not promise."""
        n = self.n_fit + self.n_held_out
        back = floor(self.live, self.n_fit)
        out = [
            f"length read out of {len(self.mean):,} dimensions ({self.live:,} live, {self.space} vectors): "
            f"fitted on {self.n_fit:,} texts, judged on {self.n_held_out:,} others",
            f"  tokens      {_r2(self.tokens)}",
            f"  log tokens  {_r2(self.log_tokens)}",
        ]
        if self.truncated:
            out.append(f"  {self.truncated:,} texts ({self.truncated / n:.1%}) were cut: they count as cut")
        return [
            *out,
            "removing it takes away every linear read-out of the token count, from vectors used as they are; "
            f"a probe of fresh texts finds about {back:.2%} of the variance again (r / (1 + r), r = (d - 1) / n)",
            "it does not take away what is not linear, nor all of log length (in-sample linear R2 "
            f"{self.log_tokens.r2_fit:.3f} -> {self.log_r2_left:.3f})",
            NORMALISING[self.space],
        ]


def fit_length(chunks: Iterable[Embedded], *, seed: int = 0, keep: int = 50_000) -> LengthReport:
    """Fit the length direction on four fifths of a stream of embeddings and judge it on the rest.

    Memory is flat: d x d moments of both parts, and at most `keep` held-out rows for interval and picture.
    The held-out R2 itself is exact over all held-out rows, since the squared error of a linear read-out is a
    quadratic form of their moments. Raises UserError for too few texts, one length only, vectors with NaN.
    """
    parts = _Parts(seed, keep)
    for chunk in chunks:
        parts.add(chunk)
    fit, held = parts.fit, parts.held
    if fit is None or held is None:
        raise UserError(
            f"a length direction cannot be judged on {parts.n:,} texts",
            fix=f"give more text: at least {FOLD * GROUP} texts, better ten times the model's dimensions",
        )
    weights, live = solve(fit)
    if fit.n < 2 * live:  # near n = d a read-out fits anything, and what it says of new texts is noise
        raise UserError(
            f"{fit.n:,} texts cannot determine a direction in {len(weights):,} dimensions",
            fix=f"give more text: at least {10 * len(weights):,} texts",
        )
    if min(fit.S_zz[0, 0], held.S_zz[0, 0]) == 0:
        raise UserError("all texts have the same number of tokens: there is no length to find")
    x, z, _ = sample = parts.sample()
    tokens, log_tokens = (_read_out(k, weights[:, k], fit, held, sample) for k in (0, 1))
    # Among read-outs v with v'g = 0 (all that survive), the best one for log tokens has this R2.
    shared = (weights[:, 0] @ fit.S_xz[:, 1]) ** 2 / (weights[:, 0] @ fit.S_xz[:, 0]) / fit.S_zz[1, 1]
    low, high = parts.norms
    return LengthReport(
        tokens=tokens,
        log_tokens=log_tokens,
        log_r2_left=max(0.0, log_tokens.r2_fit - float(shared)),
        mean=fit.mean_x,
        live=live,
        n_fit=fit.n,
        n_held_out=held.n,
        truncated=parts.truncated,
        space=space_of((low, high)),
        norms=(low, high),
        predicted=tokens.intercept + tokens.scale * (x @ tokens.direction),
        true=z[:, 0],
    )


def _read_out(k: int, b: np.ndarray, fit: Statistics, held: Statistics, sample: Rows) -> ReadOut:
    """Judge target `k`'s regression vector b (d,) on the held-out moments; the sample gives the interval."""
    scale, covariance = float(np.linalg.norm(b)), fit.S_xz[:, k]
    if not scale:
        raise UserError("no dimension of the vectors moves with token length: there is nothing to find")
    intercept = float(fit.mean_z[k] - b @ fit.mean_x)
    miss = held.mean_z[k] - intercept - b @ held.mean_x
    error = held.S_zz[k, k] - 2 * b @ held.S_xz[:, k] + b @ held.S_xx @ b + held.weight * miss**2
    r2 = float(1 - error / held.S_zz[k, k])
    x, z, group = sample[0], sample[1][:, k], sample[2]
    spread = _bootstrap(z - intercept - x @ b, z, group)
    # The sample is a share of the held-out rows: over all of them the error of r2 is smaller by its root.
    share = np.sqrt(len(z) / held.n)
    return ReadOut(
        direction=b / scale,
        g=covariance / np.linalg.norm(covariance),
        scale=scale,
        intercept=intercept,
        r2_fit=float(b @ covariance / fit.S_zz[k, k]),
        r2=r2,
        interval=None if spread is None else (r2 + share * spread[0], r2 + share * spread[1]),
    )


def _bootstrap(
    error: np.ndarray, z: np.ndarray, group: np.ndarray, draws: int = 2000, fewest: int = 10
) -> tuple[float, float] | None:
    """2.5 and 97.5 % of R2(groups drawn anew) - R2; None below `fewest` groups (then it means nothing)."""
    member = np.unique(group, return_inverse=True)[1]
    groups = int(member.max(initial=-1)) + 1
    if groups < fewest:
        return None
    z = z - z.mean()
    sums = np.stack([np.bincount(member, w) for w in (np.ones_like(z), z, z**2, error**2)])  # (4, groups)
    counts = np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), size=draws)
    n, first, second, squared = sums @ counts.T.astype(np.float64)
    r2 = 1 - squared / (second - first**2 / n)
    low, high = np.quantile(r2 - (1 - sums[3].sum() / sums[2].sum()), [0.025, 0.975])
    return float(low), float(high)


class _Parts:
    """The fitted and the held-out moments of a stream, and a bounded sample of its held-out rows."""

    def __init__(self, seed: int, keep: int) -> None:
        self.seed, self.keep = seed, keep
        self.fit: Statistics | None = None
        self.held: Statistics | None = None
        self.n = self.truncated = 0
        self.norms = (np.inf, 0.0)
        self.threshold = 1.0  # held-out groups whose own random number lies below it are in the sample
        self.rows: list[Rows] = []

    def add(self, chunk: Embedded) -> None:
        x, tokens = chunk.vectors, np.asarray(chunk.tokens, dtype=np.float64)
        refuse_non_finite(x, self.n)
        norms = np.sqrt(np.einsum("ij,ij->i", x, x, dtype=np.float64)) if len(x) else np.ones(1)
        self.norms = min(self.norms[0], float(norms.min())), max(self.norms[1], float(norms.max()))
        group = np.arange(self.n, self.n + len(x)) // GROUP
        z = np.stack([tokens, np.log(np.maximum(tokens, 1))], axis=1)
        held = uniform(key(self.seed, 0, group // FOLD)) * FOLD // 1 == group % FOLD
        self.fit = _plus(self.fit, x[~held], z[~held])
        self.held = _plus(self.held, x[held], z[held])
        self.rows.append(self._below((x[held], z[held], group[held])))
        while sum(len(rows[0]) for rows in self.rows) > self.keep:
            self.threshold /= 2
            self.rows = [self._below(rows) for rows in self.rows]
        self.n += len(x)
        self.truncated += chunk.truncated

    def sample(self) -> Rows:
        """Vectors (m, d), targets (m, 2) and groups (m,) of the sampled rows, m <= keep."""
        x, z, group = (np.concatenate(column) for column in zip(*self.rows))
        return x, z, group

    def _below(self, rows: Rows) -> Rows:
        """The rows of sampled groups: which they are depends on a group's number alone, not on the chunks."""
        x, z, group = rows
        inside = uniform(key(self.seed, 1, group)) < self.threshold
        return x[inside], z[inside], group[inside]


def _plus(total: Statistics | None, x: np.ndarray, z: np.ndarray) -> Statistics | None:
    if not len(x):
        return total
    part = Statistics.of(x, z)
    return part if total is None else total + part


def _r2(read_out: ReadOut) -> str:
    words = f"R2 {read_out.r2_fit:.4f} in-sample, {read_out.r2:.4f} held-out"
    if read_out.interval is None:
        return words + " (too few texts for an interval)"
    return words + f" (95 % interval {read_out.interval[0]:.4f} to {read_out.interval[1]:.4f})"


def save_length(model_dir: Path | str, report: LengthReport) -> None:
    """Add `length_direction.npy` (d,) float64, the picture and, last, the sidecar to a finished model folder.

    Every file appears by one rename. The sidecar names the array's sha256, so that a run that is killed
    between the two leaves nothing that would be believed.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        raise UserError("no such folder", where=str(folder), fix="name the folder of a saved model")
    files.write_array(folder / DIRECTION, report.tokens.direction)
    tokens = report.tokens
    length_plot(folder / "length", report.predicted, report.true, r2=tokens.r2, interval=tokens.interval)
    weights = folder / "model.safetensors"
    files.write_json(
        folder / SIDECAR,
        {
            "kind": "length",
            "space": report.space,
            "norms": report.norms,
            "dimension": len(report.mean),
            "live_dimensions": report.live,
            "n_fit": report.n_fit,
            "n_held_out": report.n_held_out,
            "truncated": report.truncated,
            "direction_sha256": files.sha256(folder / DIRECTION),
            "model_sha256": files.sha256(weights) if weights.is_file() else None,
            "embedtune": _version(),
            "mean": report.mean.tolist(),
            "tokens": _as_json(tokens),
            "log_tokens": {**_as_json(report.log_tokens), "r2_fit_left": report.log_r2_left},
        },
    )


def remove_length_direction(embeddings: Any, model_dir: Path | str) -> Any:
    """Embeddings (d,) or (n, d) without a linear read-out of token length; same type, dtype and device.

    numpy or torch, any float type, computed in float64: x - g b'(x - mu) / b'g; twice is the same as once.
    It holds for the vectors as they are: normalising them afterwards brings length back, and what is not
    linear in them stays. Torch gradients flow through. Raises UserError for a missing or damaged file,
    another dimension, normalised vectors where raw ones were fitted (or the reverse), non-finite values.
    """
    eraser = _load(Path(model_dir))
    constants: Any = eraser.b, eraser.g, eraser.mean
    x: Any  # float64, of the caller's own library, as the constants
    tensor = type(embeddings).__module__.partition(".")[0] == "torch"
    if tensor:
        import torch

        place = "cpu" if embeddings.device.type == "mps" else embeddings.device  # mps has no float64
        x = embeddings.to(place, torch.float64) if embeddings.is_floating_point() else None
        constants = [torch.from_numpy(a).to(place) for a in constants]
    else:
        array = np.asarray(embeddings)
        x = array.astype(np.float64) if array.dtype.kind == "f" else None
    b, g, mean = constants
    if x is None or x.ndim not in (1, 2):
        raise UserError("embeddings must be floating-point numbers of shape (d,) or (n, d)")
    if x.shape[-1] != len(b):
        what = f"embeddings have {x.shape[-1]:,} dimensions, the length direction has {len(b):,}"
        raise UserError(what, where=str(model_dir), fix="use the embeddings of this very model")
    rows = (x.detach().cpu().numpy() if tensor else x).reshape(-1, len(b))
    check_space(rows, eraser.space, eraser.norms, str(model_dir))
    out = x - ((x - mean) @ b)[..., None] * (g / (b @ g))
    return out.to(embeddings.device, embeddings.dtype) if tensor else out.astype(array.dtype)


@dataclass(frozen=True, eq=False)
class _Eraser:
    b: np.ndarray  # (d,)
    g: np.ndarray  # (d,)
    mean: np.ndarray  # (d,)
    space: str  # raw, normalised or unknown
    norms: tuple[float, float]


def _load(folder: Path) -> _Eraser:
    """Read the direction and its sidecar; a bare direction gives the orthogonal projection, and a warning."""
    try:
        b = np.load(folder / DIRECTION, allow_pickle=False)
        if not isinstance(b, np.ndarray):
            raise ValueError("it holds several arrays")
        if b.ndim != 1 or b.dtype.kind != "f" or not np.isfinite(b).all() or not b.any():
            raise ValueError(f"a non-zero direction of shape (d,) was expected, found {b.dtype} {b.shape}")
        b = b.astype(np.float64)
        if not (folder / SIDECAR).exists():
            warnings.warn(
                f"{folder / SIDECAR} is missing: the direction is projected out, which leaves most of length "
                "readable (R2 0.72 -> 0.69 where it was measured); `embedtune refine length` writes it",
                stacklevel=3,
            )
            return _Eraser(b, b, np.zeros_like(b), "unknown", (0.0, np.inf))
        about = files.read_json(folder / SIDECAR)
        if about["direction_sha256"] != files.sha256(folder / DIRECTION):
            raise ValueError(f"{DIRECTION} and {SIDECAR} are not of the same run")
        low, high = about["norms"]
        g, mean = np.array(about["tokens"]["g"], float), np.array(about["mean"], float)
        fits = g.shape == mean.shape == b.shape and np.isfinite([*g, *mean, low, high]).all()
        if not fits or b @ g <= 0 or about["space"] not in NORMALISING:
            raise ValueError(f"{SIDECAR} does not fit {DIRECTION}")
        return _Eraser(b, g, mean, about["space"], (low, high))
    except (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError) as error:
        raise UserError(
            f"the length direction cannot be read: {error}",
            where=str(folder),
            fix=f"embedtune refine length {folder} --data FILE",
        ) from error


def _as_json(read_out: ReadOut) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(read_out).items()}


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("embedtune")
    except PackageNotFoundError:
        return "unknown"
