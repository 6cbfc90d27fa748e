"""The part of `judge` for models with heads: labels, scores and tags, each model beside the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from embedtune.commands.judge_drift import find_drift, told
from embedtune.commands.shape import Output, Talk, table
from embedtune.errors import UserError

MAIN = {"classification": "F1", "regression": "spearman", "tagging": "F1"}
MOST_CLASSES = 20  # whose measures are listed, the lowest first


def has_heads(names: Sequence[str]) -> bool:
    """Whether the models are such as `fit classify`, `fit regress` and `fit tag` leave; a UserError for a mixture."""
    from embedtune.encoder import heads
    from embedtune.encoder.exported import is_export

    folders = [Path(name) for name in names]
    kinds = [heads.kind_of(each) if each.is_dir() and not is_export(each) else None for each in folders]
    if len(set(kinds)) > 1:
        said = ", ".join(f"{name}: {kind or 'an embedding model'}" for name, kind in zip(names, kinds))
        raise UserError(f"cannot be compared: {said}", where="judge", fix="judge models of one kind at a time")
    return kinds[0] is not None


def judge_heads(command: Any, talk: Talk) -> Output:
    """Predict, measure, compare."""
    from embedtune.encoder import heads, load
    from embedtune.encoder.encode import open_encoder
    from embedtune.judge import compare
    from embedtune.judge.report import table as rows

    opened = [heads.open_head(load.find(name)) for name in command.models]
    lines: list[str] = []
    found: list[dict[str, Any]] = []
    worst, texts = "WIN", dict[str, list[str]]()
    for data in command.data:
        talk.note(f"judging on {data}")
        reports, remarks, texts[data] = _reports(opened, data, command)
        main = MAIN[reports[0].task]
        classes = {name: compare.by_class(report) for name, report in zip(command.models, reports)}
        lines += ["", data, *remarks, *table(*rows(reports)), "", *_intervals(reports, main), *_classes(classes)]
        entry: dict[str, Any] = {"data": data, "reports": list(reports)}
        entry["classes"] = {name: [row._asdict() for row in found] for name, found in classes.items()}
        for name, report in zip(command.models[1:], reports[1:]):
            changes = {measure: compare.paired(reports[0], report, measure) for measure in report.summary}
            word = compare.verdict([changes[main]])
            worst = "REGRESSION" if word == "REGRESSION" else worst
            lines += ["", f"{name} against {command.models[0]}: {word} ({main})", *table(*compare.table(changes))]
            entry[name] = {"verdict": word, "changes": {key: vars(change) for key, change in changes.items()}}
        found.append(entry)
    encoders = [open_encoder(name) for name in command.models] if len(texts) > 1 or len(opened) > 1 else []
    drifts = find_drift(encoders, texts, talk.note)
    return told(command, [*lines[1:], *drifts.lines()], found, drifts, worst == "REGRESSION")


def _reports(opened: Sequence[tuple[Any, str]], data: str, command: Any) -> tuple[list[Any], list[str], list[str]]:
    """A report for each model on data that is read as the first model's kind needs it, what was left out, the texts."""
    from embedtune.data.columns import parse_columns
    from embedtune.data.labels import read_graded, read_labelled
    from embedtune.data.read import Counts
    from embedtune.encoder import heads
    from embedtune.encoder.predict import is_regressor
    from embedtune.judge.heads import judge_classifier, judge_regressor, judge_tagger

    counts = Counts()
    given: Any = {"columns": parse_columns(command.columns), "bad_rows": command.bad_rows, "counts": counts}
    loaded, kind = opened[0]
    rows: list[Any]
    judged: Callable[..., Any]
    if kind == heads.TOKEN:
        rows, judged = _tagged(data, given), judge_tagger
    elif is_regressor(loaded.model.config):
        rows, judged = list(read_graded(data, **given)), judge_regressor
    else:
        rows, judged = list(read_labelled(data, **given)), judge_classifier
    reports = [judged(model, rows, Path(data).name, name) for (model, _), name in zip(opened, command.models)]
    left = [f"{number:,} rows left out: {reason}" for reason, number in counts.rejected.items()]
    texts = [" ".join(row.tokens) if kind == heads.TOKEN else row.text for row in rows]
    return reports, [f"{len(rows):,} rows", *counts.notes, *left], texts


def _tagged(data: str, given: Any) -> list[Any]:
    import dataclasses

    from embedtune.data.tags import check_tags, read_tagged, scheme_of, to_bio

    rows = list(read_tagged(data, **given))
    scheme = scheme_of(row.tags for row in rows)
    check_tags(rows, scheme, data)
    return [dataclasses.replace(row, tags=to_bio(row.tags, scheme)) for row in rows]


def _intervals(reports: Sequence[Any], main: str) -> list[str]:
    from embedtune.judge import compare

    found = [(report, compare.interval(report, main)) for report in reports]
    return [f"{r.model}: {main} {r.summary[main]:.4f} (95 % interval {low:.4f} to {high:.4f})"
            for r, (low, high) in found]  # fmt: skip


def _classes(found: dict[str, list[Any]]) -> list[str]:
    """The measures of single classes or types by each model, those with the lowest F1 first where there are many."""
    lines = []
    for model, classes in found.items():
        shown = classes if len(classes) <= MOST_CLASSES else sorted(classes, key=lambda c: c.F1)[:MOST_CLASSES]
        rows = [[c.name, f"{c.precision:.4f}", f"{c.recall:.4f}", f"{c.F1:.4f}", f"{c.low:.4f} to {c.high:.4f}",
                 f"{c.support:,}"] for c in shown]  # fmt: skip
        if rows:
            lines += ["", *table([f"class ({model})", "precision", "recall", "F1", "95 % interval", "gold"], rows)]
        if len(shown) < len(classes):
            lines.append(f"{len(classes) - len(shown):,} others have a higher F1")
    return lines
