"""Heads judged: what a classifier, regressor or tagger says of labelled data, as a Report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from embedtune.data.labels import Graded, Labelled
from embedtune.data.tags import Tagged
from embedtune.encoder.load import Loaded
from embedtune.encoder.predict import Given, chances_of, row_outputs, word_logits
from embedtune.errors import UserError, short_list
from embedtune.judge.classification import classification_report
from embedtune.judge.regression import regression_report
from embedtune.judge.report import Report
from embedtune.judge.tagging import tagging_report


def judge_classifier(loaded: Loaded, rows: Sequence[Labelled], data: str, model: str) -> Report:
    """Accuracy, F1, MCC and the rest on labelled texts. Raises UserError for labels that the model does not know."""
    config = loaded.model.config
    names = [config.id2label[number] for number in range(config.num_labels)]
    place = {name: number for number, name in enumerate(names)}
    _refuse_unknown({label for row in rows for label in row.labels} - set(place), names, data, model)
    multi = config.problem_type == "multi_label_classification"
    if not multi and (several := [row for row in rows if len(row.labels) != 1]):
        what = f"{len(several):,} rows have several labels or none, and the model says one of each text"
        raise UserError(what, where=data, details=[f"row {row.number:,}" for row in several[:3]])
    gold = np.zeros((len(rows), len(names)), int)
    for number, row in enumerate(rows):
        gold[number, [place[label] for label in row.labels]] = 1
    logits = np.stack([found for found, _ in row_outputs(loaded, _given(rows))])
    return classification_report(
        gold if multi else gold.argmax(1), chances_of(config, logits), names, items=_items(rows), model=model,
        data=data, multi=multi,
    )  # fmt: skip


def judge_regressor(loaded: Loaded, rows: Sequence[Graded], data: str, model: str) -> Report:
    """Correlations, MAE, RMSE and R2 on texts with scores."""
    said = np.array([found[0] for found, _ in row_outputs(loaded, _given(rows))])
    gold = np.array([row.score for row in rows])
    return regression_report(gold, said, items=_items(rows), model=model, data=data)


def judge_tagger(loaded: Loaded, rows: Sequence[Tagged], data: str, model: str) -> Report:
    """Precision, recall and F1 of entities on tagged sentences, their tags in BIO."""
    names = loaded.model.config.id2label
    _refuse_unknown({tag for row in rows for tag in row.tags} - set(names.values()), list(names.values()), data, model)
    said = [
        [names[int(number)] for number in logits.argmax(1)]
        for logits in word_logits(loaded, [row.tokens for row in rows])
    ]
    return tagging_report([list(row.tags) for row in rows], said, items=_items(rows), model=model, data=data)


def _given(rows: Sequence[Labelled] | Sequence[Graded]) -> list[Given]:
    return [Given(row.text, row.pair) for row in rows]


def _items(rows: Sequence[Labelled] | Sequence[Graded] | Sequence[Tagged]) -> tuple[str, ...]:
    return tuple(f"{Path(row.file).name}:{row.number}" for row in rows)


def _refuse_unknown(unknown: set[str], names: Sequence[str], data: str, model: str) -> None:
    if unknown:
        what = f"{len(unknown):,} label(s) that {model} does not know: {short_list(sorted(map(repr, unknown)))}"
        raise UserError(what, where=data, details=[f"it knows {short_list(list(map(repr, names)), most=20)}"],
                        fix="judge on data with the labels that it was trained for (--columns label=NAME)")  # fmt: skip
