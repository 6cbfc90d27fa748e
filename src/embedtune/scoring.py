"""What a run is scored on while it trains: dev measures of the model as it then is, kept per item on disk.

Training knows nothing of this: it is handed a function. What is kept per item gives the paired interval at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedtune import files
from embedtune.fit.objectives.contrastive import MEASURES as RETRIEVAL
from embedtune.fit.objectives.scored import MEASURES as SIMILARITY
from embedtune.fit.ranking import multiple_negatives
from embedtune.judge import compare
from embedtune.judge.report import Report, from_dict
from embedtune.judge.retrieval import score_vectors
from embedtune.judge.similarity import CORRELATIONS, cosines

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
        return {"mlm": "dev_loss", "contrastive": f"dev_{RETRIEVAL[0]}", "scored": f"dev_{SIMILARITY[0]}"}[self.task]

    def __call__(self, step: int | str) -> dict[str, float]:
        """The dev measures of the model as it is now; `step` names what is kept."""
        return {"mlm": self._mlm, "contrastive": self._retrieval, "scored": self._similarity}[self.task](step)

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
