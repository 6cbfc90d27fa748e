"""What a run is scored on while it trains: dev measures of the model as it then is, kept per item on disk.

Training knows nothing of this: it is handed a function. What is kept per item gives the paired interval at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import expit, softmax

from embedtune import files, plots_labels
from embedtune.fit.objectives.contrastive import MEASURES as RETRIEVAL
from embedtune.fit.objectives.scored import MEASURES as SIMILARITY
from embedtune.fit.ranking import multiple_negatives
from embedtune.judge import card, compare
from embedtune.judge.classification import classification_report, confusion, reliability
from embedtune.judge.regression import regression_report
from embedtune.judge.report import Report, from_dict
from embedtune.judge.retrieval import score_vectors
from embedtune.judge.similarity import CORRELATIONS, cosines
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

    def __call__(self, step: int | str) -> dict[str, float]:
        """The dev measures of the model as it is now; `step` names what is kept."""
        found = {"mlm": self._mlm, "contrastive": self._retrieval, "scored": self._similarity}
        return found.get(self.task, self._head)(step)

    def difference(self, before: int | str, after: int | str) -> compare.Difference:
        """The change of the main measure between two scorings, with its interval."""
        if self.task == "mlm":
            a, b = (np.load(self._rows(name), allow_pickle=False) for name in (before, after))
            return compare.ratio_difference(a, b, self.prepared.objective.dev_groups())
        return compare.paired(self.report(before), self.report(after), self.main.removeprefix("dev_"))

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
