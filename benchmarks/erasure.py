"""LEACE beside EleutherAI's concept-erasure: the same map where that one is right, and cases where it erases nothing.

    pip install -c constraints.txt -e '.[bench]'
    python benchmarks/erasure.py

Prints the largest difference of the two maps, and the linear R2 (or gap of class means) that is left after each.
"""

import numpy as np
import torch
from concept_erasure import LeaceEraser

from embedtune.refine.eraser import leace
from embedtune.refine.sphere import sphere
from embedtune.refine.statistics import Statistics


def r2(x: np.ndarray, z: np.ndarray) -> float:
    """In-sample R2 of a least-squares read-out of z (n,) from x (n, d)."""
    x, z = x.astype(np.float64) - x.mean(0, dtype=np.float64), z - z.mean()
    return float(1 - ((z - x @ np.linalg.lstsq(x, z, rcond=None)[0]) ** 2).sum() / (z**2).sum())


def data(n: int, d: int, k: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors that k concepts move."""
    draw = np.random.default_rng(seed)
    z = draw.normal(size=(n, k))
    return draw.normal(size=(n, d)) + z @ draw.normal(size=(k, d)), z


def theirs(x: np.ndarray, z: np.ndarray, **options) -> LeaceEraser:
    return LeaceEraser.fit(torch.from_numpy(x), torch.from_numpy(z.astype(x.dtype)), **options)


def row(name: str, before: float, other: float, ours: float) -> None:
    print(f"| {name} | {before:.2g} | {other:.2g} | {ours:.2g} |")


def main() -> None:
    x, z = data(2048, 128, k=3)
    gap = np.abs(theirs(x, z, shrinkage=False).P.numpy() - leace(Statistics.of(x, z)).weight).max()
    print(f"where it is right: n 2,048, d 128, 3 concepts, float64, no shrinkage: maps differ by {gap:.1e}\n")
    print("| what is left | before | concept-erasure | embedtune |\n|---|---|---|---|")

    def both(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ours = leace(Statistics.of(a, b))(a.astype(np.float64))
        return theirs(a, b)(torch.from_numpy(a)).double().numpy(), ours

    x, z = data(5000, 64)
    row("R2, concept as it is", r2(x, z[:, 0]), *(r2(out, z[:, 0]) for out in both(x, z)))
    row("R2, concept x 0.01", r2(x, z[:, 0]), *(r2(out, z[:, 0]) for out in both(x, z * 0.01)))

    draw = np.random.default_rng(1)
    rare = (np.arange(200_000) % 966 == 0).astype(float)[:, None]  # 208 rows
    x = draw.normal(size=(200_000, 32)) + 3 * rare * np.eye(32)[0]

    def means(out: np.ndarray) -> float:
        return float(np.linalg.norm(out[rare[:, 0] == 1].mean(0) - out[rare[:, 0] == 0].mean(0)))

    row("gap of class means, class of 1 in 966", means(x), *map(means, both(x, rare)))

    z = draw.normal(size=(5000, 1))
    x = (30 + 0.1 * (draw.normal(size=(5000, 64)) + z * draw.normal(size=64))).astype(np.float32)
    row("R2, float32, mean 30, spread 0.1", r2(x, z[:, 0]), *(r2(out, z[:, 0]) for out in both(x, z)))

    length = draw.normal(size=(5000, 1))
    x = (draw.normal(size=(5000, 64)) + 2 + 0.3 * length * draw.normal(size=64)) * np.exp(-0.3 * length)
    other, ours = both(x, length)
    fitted = sphere(lambda: [(x, length)], Statistics.of(x, length)).affine(x)
    sides = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (x, other, ours, fitted)]
    before, other, ours, fitted = (r2(each, length[:, 0]) for each in sides)
    row("R2 after normalisation, LEACE", before, other, ours)
    row("R2 after normalisation, sphere", before, other, fitted)


if __name__ == "__main__":
    main()
