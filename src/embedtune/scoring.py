"""What a run is scored on while it trains: dev measures of the model as it then is, kept per item on disk.

Training knows nothing of this: it is handed a function. What is kept per item gives the paired interval at the end.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import expit, softmax

from embedtune import files, plots_labels
from embedtune.fit.engine import read_log
from embedtune.fit.objectives.contrastive import MEASURES as RETRIEVAL
from embedtune.fit.objectives.scored import MEASURES as SIMILARITY
from embedtune.fit.ranking import multiple_negatives
from embedtune.judge import card, compare
from embedtune.judge.classification import classification_report, confusion, reliability
from embedtune.judge.regression import regression_report
from embedtune.judge.report import Report, from_dict
from embedtune.judge.retrieval import score_vectors
from embedtune.judge.similarity import CORRELATIONS, cosines
from embedtune.judge.statistics import part
from embedtune.judge.tagging import tagging_report

MAIN = {
    "mlm": "dev_loss", "contrastive": f"dev_{RETRIEVAL[0]}", "scored": f"dev_{SIMILARITY[0]}",
    "classify": "dev_F1", "regress": "dev_spearman", "tag": "dev_F1",
}  # fmt: skip
HEADS = ("classify", "regress", "tag")
CURVES = {
    "classify": ("dev_accuracy", "dev_F1"), "regress": ("dev_spearman", "dev_pearson"),
    "tag": ("dev_F1", "dev_precision", "dev_recall"),
}  # fmt: skip
CHUNK = 64  # queries whose dev loss is computed against each other


@dataclass(frozen=True)
class Scorer:
    """Scores the model of a prepared run, and compares two scorings; `home` keeps what belongs to each."""

    prepared: Any
    task: str
    home: Path

    @property
    def main(self) -> str:
        """The measure whose change has an interval."""
        return MAIN[self.task]

    @property
    def sides(self) -> dict[str, slice]:
        """Where the dev items of the run before and the new ones are, where this run goes on from another."""
        old = self.prepared.old
        return {"old": slice(0, old), "new": slice(old, None)} if old else {}

    def __call__(self, step: int | str) -> dict[str, float]:
        """The dev measures of the model as it is now; `step` names what is kept."""
        found = {"mlm": self._mlm, "contrastive": self._retrieval, "scored": self._similarity}
        measures = found.get(self.task, self._head)(step)
        if self.sides:
            values = [self._value(step, rows) for rows in self.sides.values()]
            names = side_measures(self.prepared, self.task)
            measures |= zip(names, [*values, float(np.mean(values))], strict=True)
        return measures

    def _value(self, name: int | str, rows: slice) -> float:
        """The main measure on some of the dev items."""
        if self.task == "mlm":
            loss, tokens = np.load(self._rows(name), allow_pickle=False)[rows].sum(0)
            return float(loss / tokens)
        return float(part(self.report(name), rows).summary[self.main.removeprefix("dev_")])

    def difference(self, before: int | str, after: int | str, rows: slice = slice(None)) -> compare.Difference:
        """The change of the main measure between two scorings, with its interval; on some of the items only."""
        if self.task == "mlm":
            a, b = (np.load(self._rows(name), allow_pickle=False)[rows] for name in (before, after))
            return compare.ratio_difference(a, b, self.prepared.objective.dev_groups()[rows])
        a, b = (part(self.report(name), rows) for name in (before, after))
        return compare.paired(a, b, self.main.removeprefix("dev_"))

    def verdict(self, before: int | str, after: int | str) -> dict[str, Any]:
        """Of a run that goes on from another: the change on each side, and the word for both; else nothing."""
        if not self.sides or before == after:
            return {"sides": None, "word": None} if self.sides else {}
        lower = "loss" in self.main
        found = {side: replace(self.difference(before, after, rows), lower=lower) for side, rows in self.sides.items()}
        word = compare.verdict(list(found.values()))
        return {"sides": {side: asdict(change) for side, change in found.items()}, "word": word}

    def report(self, name: int | str) -> Report:
        """The report of a scoring."""
        return from_dict(files.read_json(self.home / "data" / f"report-{name}.json"))

    def _rows(self, name: int | str) -> Path:
        return self.home / "data" / f"rows-{name}.npy"

    def _keep(self, name: int | str, report: Report) -> None:
        files.write_json(self.home / "data" / f"report-{name}.json", report.as_dict())

    def _mlm(self, name: int | str) -> dict[str, float]:
        measures: dict[str, float] = self.prepared.objective.score()
        files.write_array(self._rows(name), self.prepared.objective.row_losses)
        return measures

    def _retrieval(self, name: int | str) -> dict[str, float]:
        dev, objective = self.prepared.dev, self.prepared.objective
        queries, corpus = objective.vectors(dev.queries), objective.vectors(dev.corpus)
        report = score_vectors(queries, corpus, dev.data, RETRIEVAL, similarity=dev.similarity)
        self._keep(name, report)
        loss = _dev_loss(queries, corpus, dev, self.prepared.recipe.ranking)
        return {"dev_loss": loss, **{f"dev_{measure}": float(report.summary[measure]) for measure in RETRIEVAL}}

    def _head(self, name: int | str) -> dict[str, float]:
        dev, objective = self.prepared.dev, self.prepared.objective
        logits = objective.predict(dev.rows)
        return self._head_measures(name, predictions(self.task, dev, logits))

    def baselines(self) -> dict[str, dict[str, float]]:
        """The dev measures of what a tuned head has to beat, by name; none for the other tasks."""
        made = self.prepared.dev.baselines if self.task in HEADS else {}
        return {name: self._head_measures(name, predicted) for name, predicted in made.items()}

    def _head_measures(self, name: int | str, predicted: Any) -> dict[str, float]:
        dev = self.prepared.dev
        report = head_report(self.task, dev, predicted)
        self._keep(name, report)
        names = (measure.removeprefix("dev_") for measure in self.prepared.objective.measures)
        summary = {f"dev_{name}": float(report.summary[name]) for name in names if name != "loss"}
        return {"dev_loss": head_loss(self.task, dev, predicted, report), **summary}

    def _similarity(self, name: int | str) -> dict[str, float]:
        dev, objective = self.prepared.dev, self.prepared.objective
        texts, place = np.unique(np.stack([dev.left, dev.right]), return_inverse=True)
        left, right = objective.vectors(texts)[place.reshape(2, -1)]
        predicted = cosines(left, right)
        summary = {measure: float(CORRELATIONS[measure](dev.gold, predicted)[0]) for measure in SIMILARITY}
        items = tuple(str(pair.number) for pair in dev.pairs)
        report = Report("similarity", "dev", "", left.shape[1], items, summary, gold=dev.gold, predicted=predicted)
        self._keep(name, report)
        # The mean squared gap is no training loss, but means the same in every run.
        loss = float(np.mean((predicted - dev.gold) ** 2))
        return {"dev_loss": loss, **{f"dev_{measure}": float(report.summary[measure]) for measure in SIMILARITY}}


def side_measures(prepared: Any, task: str) -> list[str]:
    """The main measure on the dev rows of the run before, on the new ones, and the mean of both, which chooses.

    The mean counts both sides the same, whatever their sizes: else the larger one would choose.
    """
    name = MAIN[task].removeprefix("dev_")
    return [f"dev_{side}_{name}" for side in ("old", "new", "sides")] if prepared.old else []


def _measured(home: Path) -> dict[int, dict[str, float]]:
    """The dev measures of every scoring, by step."""
    scored = [r for r in read_log(home) if "dev_loss" in r]
    return {r["step"]: {k: v for k, v in r.items() if k.startswith("dev_")} for r in scored}


def scores_of(home: Path, scorer: Scorer, best_step: int, measure: str) -> dict[str, Any]:
    """Dev measures of the base, of the fresh head alone and of the best step, and the paired change between them."""
    objective, recipe = scorer.prepared.objective, scorer.prepared.recipe
    measured = _measured(home)
    going_on = scorer.prepared.old is not None
    if not going_on and (baselines := scorer.baselines()):
        return _head_scores(measured[best_step], baselines, scorer, best_step, measure)
    start = min(objective.head_steps, best_step)  # less where the time was over before the head was trained
    against = "the base with its head trained alone" if start else "the base"
    against = "the run that this one goes on from" if going_on else against
    difference = scorer.difference(start, best_step) if best_step != start else None
    return {
        "task": scorer.task,
        "measure": measure,
        "compared": scorer.main,
        "baseline": measured[0],
        "head_alone": measured[start] if start else None,
        "tuned": measured[best_step],
        "best_step": best_step,
        "difference": asdict(difference) if difference else None,
        "against": "the untrained model" if getattr(recipe, "scratch", False) else against,
        **scorer.verdict(0, best_step),
    }


def _head_scores(
    tuned: dict[str, float], baselines: dict[str, dict[str, float]], scorer: Scorer, best_step: int, measure: str
) -> dict[str, Any]:
    """Dev measures of the baselines and of the best step, and the paired change from the last, strongest baseline."""
    *_, strongest = baselines
    return {
        "task": scorer.task,
        "measure": measure,
        "compared": scorer.main,
        "baselines": baselines,
        "baseline": baselines[strongest],
        "tuned": tuned,
        "best_step": best_step,
        "difference": asdict(scorer.difference(strongest, best_step)),
        "against": f"the {strongest} on the untuned encoder",
    }


def predictions(task: str, dev: Any, logits: list[np.ndarray]) -> Any:
    """What a head says of the dev rows: probabilities (n, C), scores (n,), or probabilities (words, C) a sentence."""
    if task == "tag":
        return [softmax(part, axis=1) for part in dev.join(logits)]
    table = np.stack(logits).astype(np.float64)
    if task == "regress":
        return table[:, 0]
    return expit(table) if dev.multi else softmax(table, axis=1)


def head_report(task: str, dev: Any, predicted: Any) -> Report:
    """The report of predictions."""
    about = {"items": dev.items, "model": "", "data": "dev"}
    if task == "classify":
        return classification_report(dev.gold, predicted, dev.classes, multi=dev.multi, **about)
    if task == "regress":
        return regression_report(dev.gold, predicted, **about)
    tags = [[dev.classes[number] for number in part.argmax(1)] for part in predicted]
    return tagging_report(dev.gold, tags, **about)


def head_loss(task: str, dev: Any, predicted: Any, report: Report) -> float:
    """Log loss a row, mean squared gap, or log loss a word."""
    if task == "classify":
        return float(report.summary["log_loss"])
    if task == "regress":
        return float(np.mean((predicted - dev.gold) ** 2))
    place = {name: number for number, name in enumerate(dev.classes)}
    right = np.array([place[tag] for tags in dev.gold for tag in tags])
    picked = np.concatenate(predicted)[np.arange(len(right)), right]
    return float(-np.log(np.maximum(picked, np.finfo(np.float64).tiny)).mean())


def draw_scores(records: list[dict[str, Any]], task: str, home: Path, title: str) -> None:
    """The curve of a head's main measures over the epochs; the other tasks have their loss curve."""
    if task in HEADS:
        measures = {name: card.label(name, task) for name in CURVES[task]}
        plots_labels.scores_curve(records, measures, home / "scores", f"{title}: {card.TASKS[task]}")


def draw_answers(scorer: Scorer, step: int | str, home: Path, title: str) -> None:
    """What a head says against what is right: confusion matrix and reliability diagram, or a scatter of scores."""
    if scorer.task not in ("classify", "regress"):
        return
    report = scorer.report(step)
    if scorer.task == "regress":
        plots_labels.scatter_plot(np.array(report.gold), np.array(report.predicted), home / "scatter", title)
    elif not scorer.prepared.dev.multi:
        plots_labels.confusion_plot(confusion(report), report.classes, home / "confusion", title)
        plots_labels.reliability_plot(reliability(report), report.summary["ECE"], home / "reliability", title)


def _dev_loss(queries: np.ndarray, corpus: np.ndarray, dev: Any, ranking: Any) -> float:
    """The multiple-negatives loss of the dev queries against their best-judged text, in fixed batches of CHUNK."""
    names = list(dev.data.corpus)
    place = {name: number for number, name in enumerate(names)}
    judged = [dev.data.qrels[query] for query in dev.data.queries]
    best = [max(j, key=lambda name: j[name]) for j in judged]
    known = [{place[name] for name, relevance in j.items() if relevance > 0} for j in judged]
    total = 0.0
    for first in range(0, len(queries), CHUNK):
        rows = range(first, min(first + CHUNK, len(queries)))
        candidates = np.unique([place[best[row]] for row in rows])
        own = np.searchsorted(candidates, [place[best[row]] for row in rows])
        masked = np.array([[c in known[row] for c in candidates.tolist()] for row in rows])
        masked[np.arange(len(rows)), own] = False
        loss = multiple_negatives(
            torch.from_numpy(queries[rows.start : rows.stop]), torch.from_numpy(corpus[candidates]),
            torch.from_numpy(own), torch.from_numpy(masked),
            scale=ranking.scale or 20.0, similarity=dev.similarity, symmetric=ranking.symmetric,
        )  # fmt: skip
        total += float(loss) * len(rows)
    return total / max(1, len(queries))
