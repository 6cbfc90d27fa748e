"""Claim: the fast path learns what the slow path learns: loss curves within the noise of bf16, dev measures alike.

Fast: flattened, our attention, bf16 where the hardware has it. Slow: the same objective on the same rows, masks and
dropout (its noise is keyed, so both see the same), but padded, with the stock attention, in fp32. Masked language
modelling on medical sentences, and pairs of medical questions and answers, from all-MiniLM-L6-v2; every training is a
process of its own. What two slow runs differ by whose seeds differ says how much is little.

    python benchmarks/curves.py --plot curves.svg          # an hour on two quiet cores
    python benchmarks/curves.py --slow-on-cpu              # where there is a GPU: the fast path there, the slow one not
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from embedtune.judge.compare import Difference, ratio_difference

TASKS = {"mlm": "dev loss", "contrastive": "dev nDCG@10"}
WAYS = ("fast", "slow")
BATCH, DEV = 32, 300
SOURCE = Path(__file__).resolve()


class Curve(NamedTuple):
    """What a training gave: the loss of each step, and of each dev item numerator, denominator and group."""

    losses: np.ndarray
    dev: np.ndarray  # (n, 3)
    precision: str


class Gap(NamedTuple):
    """How far two trainings are from each other."""

    largest: float
    mean: float
    dev: Difference


# ---------------------------------------------------------------- one training


def prepared(args: argparse.Namespace, home: Path) -> Any:
    """The recipe of a task, prepared; rows to score are the same whatever the seed."""
    from embedtune.encoder.load import quiet
    from embedtune.recipes import MLM, Contrastive, Loop

    quiet()
    dev = min(DEV, args.rows)
    loop = Loop(
        seed=args.seed, batch=BATCH, max_steps=args.steps, epochs=10_000, max_tokens=8192,
        precision="fp32" if args.one == "slow" else None,
    )  # fmt: skip
    if args.task == "mlm":
        from embedtune.fit.objectives.prepare import prepare_mlm
        from mlm import lines_of

        lines = list(lines_of("medical", args.rows + dev))
        recipe = MLM(train=lines[dev:], dev=lines[:dev], model=args.model, max_length=args.max_length, loop=loop)
        return prepare_mlm(recipe, home, lambda text: None)
    from contrastive import pairs_of
    from embedtune.fit.objectives.contrastive import prepare_contrastive

    pairs = pairs_of("medquad", args.rows + dev)
    return prepare_contrastive(
        Contrastive(train=pairs[dev:], dev=pairs[:dev], allow_leaks=True, model=args.model,
                    max_length=args.max_length, loop=loop),
        home, lambda text: None,
    )  # fmt: skip


def made_slow(objective: Any, task: str) -> None:
    """Padded from now on, with torch's own attention."""
    holder, model = (objective.loaded, objective.model) if task == "mlm" else (objective, objective.model[0].model)
    holder.padded = "asked for"
    model.set_attn_implementation("sdpa")


def one(args: argparse.Namespace) -> dict[str, Any]:
    """Train, and score the float32 weights."""
    from embedtune.scoring import Scorer
    from steps import engine_run

    losses = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        ready = prepared(args, home)
        objective = ready.objective
        if args.one == "slow":
            made_slow(objective, args.task)
        run = engine_run(ready, home)
        while run.state.step < run.total:
            before = run.state.loss_sum
            run._step()
            losses.append(run.state.loss_sum - before)
        run.optimizer.release()
        scorer = Scorer(ready, args.task, home)
        scorer("end")
        if args.task == "mlm":
            dev = np.column_stack([objective.row_losses, objective.dev_groups()])
        else:
            found = scorer.report("end").values["nDCG@10"]
            dev = np.column_stack([found, np.ones(len(found)), np.arange(len(found))])
    return {"losses": losses, "dev": dev.tolist(), "precision": run.loop.precision}


# ---------------------------------------------------------------- the parent


def measure(way: str, task: str, seed: int, args: argparse.Namespace) -> Curve:
    """A process of its own, unless asked otherwise."""
    if args.in_process:
        found = one(argparse.Namespace(**{**vars(args), "one": way, "task": task, "seed": seed}))
        return Curve(np.array(found["losses"]), np.array(found["dev"]), found["precision"])
    words = [sys.executable, SOURCE, "--one", way, "--task", task, "--seed", seed, "--steps", args.steps]
    words += ["--rows", args.rows, "--model", args.model, "--max-length", args.max_length]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    if way == "slow" and args.slow_on_cpu:
        env["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([str(word) for word in words], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{task}, {way}, seed {seed} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Curve(np.array(found["losses"]), np.array(found["dev"]), found["precision"])


def smoothed(losses: np.ndarray, window: int) -> np.ndarray:
    """Means of `window` steps in a row; a short curve's mean."""
    window = min(window, len(losses))
    return np.convolve(losses, np.full(window, 1 / window), "valid")


def gap(a: Curve, b: Curve, window: int) -> Gap:
    """How far `b` is from `a`: the smoothed losses, and the dev measure with its paired interval."""
    apart = np.abs(smoothed(a.losses, window) - smoothed(b.losses, window))
    return Gap(float(apart.max()), float(apart.mean()), ratio_difference(a.dev[:, :2], b.dev[:, :2], a.dev[:, 2]))


def compare(task: str, args: argparse.Namespace) -> dict[tuple[str, int], Curve]:
    """Train both ways with each seed, and tell how far they are from each other."""
    curves = {(way, seed): measure(way, task, seed, args) for seed in range(args.seeds) for way in WAYS}

    def tell(name: str, a: Curve, b: Curve) -> None:
        found = gap(a, b, args.window)
        ends = [curve.dev[:, 0].sum() / curve.dev[:, 1].sum() for curve in (a, b)]
        inside = "holds zero" if not found.dev.clear else "DOES NOT hold zero"
        print(f"  {name}: smoothed losses differ by {found.largest:.4f} at most, {found.mean:.4f} on average; "
              f"{TASKS[task]} {ends[0]:.4f} and {ends[1]:.4f}, difference {found.dev.value:+.5f} "
              f"[{found.dev.low:+.5f}, {found.dev.high:+.5f}], which {inside}", flush=True)  # fmt: skip

    first = curves["fast", 0]
    print(f"{task}: {len(first.losses)} steps of {BATCH} rows, fast in {first.precision}, mean of {args.window} steps")
    for seed in range(args.seeds):
        tell(f"seed {seed}, slow and fast", curves["slow", seed], curves["fast", seed])
    for seed in range(1, args.seeds):
        tell(f"slow, seeds {seed - 1} and {seed}", curves["slow", seed - 1], curves["slow", seed])
    return curves


def draw(found: dict[str, dict[tuple[str, int], Curve]], window: int, path: Path) -> None:
    """Smoothed losses, a panel for each task."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(6 * len(found), 4), squeeze=False)
    for panel, (task, curves) in zip(panels[0], found.items()):
        for (way, seed), curve in curves.items():
            style = {"linestyle": "--" if way == "slow" else "-", "color": f"C{seed}", "linewidth": 1}
            panel.plot(smoothed(curve.losses, window), label=f"{way}, seed {seed}", **style)
        panel.set(title=task, xlabel="step", ylabel=f"training loss, mean of {window} steps")
        panel.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=4000, help="to train on")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--window", type=int, default=20, help="steps whose mean loss is compared")
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument("--slow-on-cpu", action="store_true", help="the slow path sees no GPU")
    parser.add_argument("--in-process", action="store_true", help="all trainings in this process")
    parser.add_argument("--plot", type=Path, help="an svg of the curves")
    parser.add_argument("--one", choices=WAYS, help="one training in this process")
    parser.add_argument("--task", choices=TASKS, help="with --one")
    parser.add_argument("--seed", type=int, default=0, help="with --one")
    args = parser.parse_args()
    if args.one:
        print("\n" + json.dumps(one(args)))
        return
    from mlm import hardware

    print(hardware())
    found = {task: compare(task, args) for task in args.tasks}
    if args.plot:
        draw(found, args.window, args.plot)


if __name__ == "__main__":
    main()
