"""The story of a run on labels, scores or tags: tune, then judge against the majority class and a linear probe."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedtune import files, schema, tune
from embedtune.data.label_check import few
from embedtune.recipes import BATCH, RECIPES, Run, Scored

EXAMPLES = 5  # rows that changed, each way
CONFUSED = 10  # mistakes that are listed
PROBE, START, TUNED = "linear probe", "start", "tuned"
MAIN = {"classify": "F1", "regress": "spearman", "tag": "F1"}
ROUNDS, MOST_PAIRS, LEAST_STEPS = 10, 6_400, 100  # of pairs for each row; in all, or one round; and of tuning on them
UNCHANGED = "The base encoder, unchanged, and a head fitted on it as a linear probe."


def tell_labels(recipe: Run, found: Any, home: Path, out: Path, listener: Any) -> tuple[dict[str, Any], Callable]:
    """The story, and a function that saves the untuned encoder with its head at a probe, for where that is kept."""
    from embedtune.enrich.write import write_rows

    files.make_folder(home / "data")
    for name in ("train", "dev", "test"):
        write_rows(home / "data" / f"{name}.jsonl", getattr(found, name))
    train, dev, test = (str(home / "data" / f"{name}.jsonl") for name in ("train", "dev", "test"))
    label = RECIPES[found.task](
        train=train, dev=dev, model=recipe.model or tune.default_model(), dev_rows=10**6, loop=recipe.loop
    )
    ready = label
    if few := _few(found):
        found.remarks.append(few)
        ready = dataclasses.replace(label, model=str(_adapted(label, found, home, listener)), freeze=True)
    _stage(ready, home / "tuned", listener)
    listener.note("judging on the test rows, which nothing has seen")
    # The start of a tuning with the test rows in the place of dev has it all: the untuned encoder, and the baselines.
    prepared = tune.prepare(dataclasses.replace(label, dev=test), home / "start", lambda text: None)
    return _judge(recipe, found, prepared, home, out), prepared.objective.save


def _few(found: Any) -> str | None:
    """Why the encoder is tuned on pairs of the labels first (arXiv 2209.11055); None where the rows are enough."""
    if found.task != "classify" or isinstance(found.train[0]["label"], list) or "text_pair" in found.train[0]:
        return None
    rows = list(Counter(row["label"] for row in found.train).values())
    if not few(rows):
        return None
    return (
        f"{np.median(rows):g} rows a class: the encoder is tuned on pairs of the labels first, then the head alone, "
        "which was the best of four ways with so few (docs/labels.md)"
    )


def _adapted(label: Any, found: Any, home: Path, listener: Any) -> Path:
    """The folder of the encoder, tuned on pairs of the training rows: of one class alike, of two classes not."""
    from embedtune.data.labels import read_labelled
    from embedtune.data.read import Counts
    from embedtune.enrich.classes import class_pairs
    from embedtune.enrich.write import write_rows

    rows, path, loop = list(read_labelled(label.train)), home / "data" / "pairs.jsonl", label.loop
    pairs = list(class_pairs(rows, min(ROUNDS, max(1, MOST_PAIRS // len(rows))), loop.seed, Counts()))
    write_rows(path, pairs)
    steps = loop.max_steps or max(LEAST_STEPS, -(-len(pairs) // (loop.batch or BATCH)))
    recipe = Scored(
        train=str(path), dev=str(path), allow_leaks=True, model=label.model, loss="CosineSimilarityLoss",
        loop=dataclasses.replace(loop, epochs=10**6, max_steps=steps, measure=None, layer_decay=1.0),
    )  # fmt: skip
    _stage(recipe, home / "adapted", listener)
    return home / "adapted"


def _stage(recipe: Any, folder: Path, listener: Any) -> None:
    """Train, or go on where a run that was stopped is, or leave what is finished as it is."""
    if not folder.is_dir():
        tune.finetune(recipe, folder, resume=tune.running(folder).is_dir(), listener=listener)


def _judge(recipe: Run, found: Any, prepared: Any, home: Path, out: Path) -> dict[str, Any]:
    """Read the test rows once, and decide."""
    from embedtune.fit.engine import read_log
    from embedtune.judge import compare
    from embedtune.scoring import head_report, predictions

    tuned, task, dev = home / "tuned", found.task, prepared.dev
    start = predictions(task, dev, prepared.objective.predict(dev.rows))
    said = {**dev.baselines, START: start, TUNED: _said(task, tuned, found.test)}
    reports = {
        name: dataclasses.replace(head_report(task, dev, answer), model=name, data="test")
        for name, answer in said.items()
    }
    main = MAIN[task]
    change, own = (compare.paired(reports[name], reports[TUNED], main) for name in (PROBE, START))
    word = compare.verdict([change])
    word = "REGRESSION" if compare.verdict([own]) == "REGRESSION" else word
    scores = files.read_json(tuned / "scores.json")
    keep_base = word == "REGRESSION"
    table = _table(reports, compare)
    return {
        "kind": "labels",
        "task": task,
        "title": f"{prepared.name} on {found.profile['name']}",
        "base": str(prepared.recipe.model),
        "model": "base" if keep_base else "tuned",
        "unchanged": UNCHANGED,
        "verdict": _verdict(word, {PROBE: change, START: own}, main, scores["best_step"], keep_base),
        "profile": {k: v for k, v in found.profile.items() if v not in (None, {}, [])},
        "remarks": [*found.remarks, *files.read_json(tuned / "run.json")["remarks"], f"on dev: {scores['verdict']}"],
        "log": read_log(tuned),
        "tables": [{"name": "test", "rows": table, "items": len(dev.items)}],
        "measure": main,
        "models": _models(reports, main, compare),
        "classes": _classes(reports, compare),
        **_pictures(reports[TUNED], dev),
        "changed": _changed(task, dev, found.test, said[PROBE], said[TUNED]),
        "repeat": [f"embedtune run {tune.name_of(recipe.data)} --out {out}", "embedtune run recipe.toml"],
        "recipe": schema.to_toml(dataclasses.replace(recipe, model=str(prepared.recipe.model))),
        "machine": tune.machine(tuned),
    }  # fmt: skip


def _said(task: str, folder: Path, rows: Sequence[dict[str, Any]]) -> Any:
    """What a saved model says of rows, in the form of `scoring.predictions`."""
    from scipy.special import softmax

    from embedtune.encoder import heads, load
    from embedtune.encoder.predict import Given, chances_of, row_outputs, word_logits

    loaded, _ = heads.open_head(load.find(str(folder)))
    if task == "tag":
        return [softmax(logits, axis=1) for logits in word_logits(loaded, [row["tokens"] for row in rows])]
    logits = np.stack([found for found, _ in row_outputs(loaded, [Given(r["text"], r.get("text_pair")) for r in rows])])
    return logits[:, 0] if task == "regress" else chances_of(loaded.model.config, logits)


def _verdict(word: str, changes: dict[str, Any], main: str, best_step: int, keep_base: bool) -> dict[str, Any]:
    """The verdict in one sentence, and the intervals that it rests on."""
    change, own = changes[PROBE], changes[START]
    spans = "; ".join(
        f"against the {name}: {main} {c.value:+.4f} (95 % interval {c.low:+.4f} to {c.high:+.4f}, {c.items:,} rows)"
        for name, c in ((PROBE, change), ("head's start", own))
    )
    kept = "the tuned model is kept" if best_step else "the head's start is kept, since nothing was better on dev"
    if keep_base:
        kept = "the untuned encoder is kept, its head at its start"
    found = {
        "WIN": "better than a linear probe on the untuned encoder",
        "MARGINAL": "no clear difference to a linear probe on the untuned encoder",
        "REGRESSION": "worse than a linear probe on the untuned encoder",
    }[word]
    if word == "REGRESSION" and change.high >= 0:
        found = "worse than the head was before the encoder was tuned"
    return {"word": word, "sentence": f"{word}: {found}; {kept}.", "queries": "real", "kept": kept, "changes": spans}


def _table(reports: dict[str, Any], compare: Any) -> list[dict[str, Any]]:
    """A row for each measure: the constant, the probe and the tuned model, and its paired change from the probe."""
    constant = next(iter(reports))
    rows = []
    for measure in reports[TUNED].summary:
        change = compare.paired(reports[PROBE], reports[TUNED], measure)
        rows.append({
            "measure": measure, "constant": _finite(reports[constant].summary[measure]),
            "base": _finite(reports[PROBE].summary[measure]), "tuned": _finite(reports[TUNED].summary[measure]),
            "change": _finite(change.value), "low": _finite(change.low), "high": _finite(change.high),
            "p": change.p, "lower": change.lower,
        })  # fmt: skip
    return rows


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _models(reports: dict[str, Any], main: str, compare: Any) -> list[dict[str, Any]]:
    """The main measure of each model with its own interval; none of what is no number (scores that do not vary)."""
    found = []
    for name, report in reports.items():
        if math.isfinite(report.summary[main]):
            low, high = compare.interval(report, main)
            found.append({"name": name, "value": float(report.summary[main]), "low": low, "high": high})
    return found


def _classes(reports: dict[str, Any], compare: Any) -> list[dict[str, Any]]:
    """Each class or type: the probe's and the tuned model's F1 with its interval, and how many there are in gold."""
    probe = {row.name: row for row in compare.by_class(reports[PROBE])}
    found = []
    for row in compare.by_class(reports[TUNED]):
        before = probe.get(row.name)
        found.append({**row._asdict(), "base": before and before.F1, "base_low": before and before.low,
                      "base_high": before and before.high})  # fmt: skip
    return found


def _pictures(report: Any, dev: Any) -> dict[str, Any]:
    """What the pictures of the tuned model are drawn from, as plain lists."""
    from embedtune.judge.classification import confusion, reliability

    if report.task == "regression":
        return {"scatter": {"right": report.gold.tolist(), "said": report.predicted.tolist()}}
    if report.task != "classification" or dev.multi:
        return {}
    counts, names = confusion(report), list(report.classes)
    wrong = counts - np.diag(np.diag(counts))
    order = [np.unravel_index(place, wrong.shape) for place in np.argsort(-wrong, axis=None, kind="stable")[:CONFUSED]]
    mistakes = [{"right": names[r], "said": names[c], "rows": int(wrong[r, c]), "of": int(counts[r].sum())}
                for r, c in order if wrong[r, c]]  # fmt: skip
    bins = [part.tolist() for part in reliability(report)]
    return {
        "confusion": {"counts": counts.tolist(), "names": names},
        "mistakes": mistakes,
        "reliability": {"bins": bins, "ECE": float(report.summary["ECE"])},
    }


def _changed(task: str, dev: Any, rows: Sequence[dict[str, Any]], before: Any, after: Any) -> dict[str, Any]:
    """The rows that the tuned model gains or loses most on, against the probe."""
    shown, gains = (_tags if task == "tag" else _scores if task == "regress" else _labels)(dev, rows, before, after)
    order = np.argsort(-gains, kind="stable")
    sides = {"better": order[:EXAMPLES], "worse": order[::-1][:EXAMPLES]}
    return {
        side: [{"query": _text(rows[row]), "change": float(gains[row]), **shown(row)} for row in places.tolist()
               if (gains[row] > 0) == (side == "better") and gains[row]]
        for side, places in sides.items()
    }  # fmt: skip


def _text(row: dict[str, Any]) -> str:
    return " ".join(row["tokens"]) if "tokens" in row else "\n".join(filter(None, (row["text"], row.get("text_pair"))))


Shown = tuple[Callable[[int], dict[str, str]], np.ndarray]  # what to show of a row, and the gain of each


def _labels(dev: Any, rows: Sequence[dict[str, Any]], before: np.ndarray, after: np.ndarray) -> Shown:
    """Rows whose answer became right or wrong, by the probability of what is right."""
    right = dev.gold if dev.multi else np.eye(len(dev.classes), dtype=int)[dev.gold]
    chance = [
        np.where(right, said, 1 - said).mean(1) if dev.multi else (right * said).sum(1) for said in (before, after)
    ]
    told = [(said >= 0.5).astype(int) if dev.multi else np.eye(len(dev.classes), dtype=int)[said.argmax(1)]
            for said in (before, after)]  # fmt: skip
    turned = (told[0] == right).all(1) != (told[1] == right).all(1)

    def words(row: np.ndarray) -> str:
        return ", ".join(dev.classes[number] for number in np.flatnonzero(row)) or "none"

    def shown(row: int) -> dict[str, str]:
        said = [f"{words(t[row])} (right at {c[row]:.2f})" for t, c in zip(told, chance)]
        return {"right": words(right[row]), "base": said[0], "tuned": said[1]}

    return shown, np.where(turned, chance[1] - chance[0], 0.0)


def _scores(dev: Any, rows: Sequence[dict[str, Any]], before: np.ndarray, after: np.ndarray) -> Shown:
    gains = np.abs(before - dev.gold) - np.abs(after - dev.gold)
    return lambda row: {
        "right": f"{dev.gold[row]:g}",
        "base": f"{before[row]:.3g}",
        "tuned": f"{after[row]:.3g}",
    }, gains


def _tags(dev: Any, rows: Sequence[dict[str, Any]], before: list[np.ndarray], after: list[np.ndarray]) -> Shown:
    """Sentences by how many entities fewer are missed or made up."""
    from embedtune.data.tags import spans

    tags = [[[dev.classes[number] for number in part.argmax(1)] for part in side] for side in (before, after)]
    gold, *told = [[set(spans(row)) for row in side] for side in (dev.gold, *tags)]
    wrong = [np.array([len(a ^ b) for a, b in zip(gold, side)]) for side in told]

    def words(row: int, found: set[tuple[str, int, int]]) -> str:
        tokens = rows[row]["tokens"]
        said = [f"{' '.join(tokens[a:b])} ({kind})" for kind, a, b in sorted(found, key=lambda span: span[1])]
        return ", ".join(said) or "none"

    def shown(row: int) -> dict[str, str]:
        named = {"right": gold, "base": told[0], "tuned": told[1]}
        return {name: words(row, side[row]) for name, side in named.items()}

    return shown, (wrong[0] - wrong[1]).astype(float)
