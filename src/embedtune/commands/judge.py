"""embedtune judge: models on data, each beside the first, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedtune import recipes
from embedtune.commands.judge_drift import JudgedTexts, find_drift, told
from embedtune.commands.judge_heads import has_heads, judge_heads
from embedtune.commands.shape import Command, Output, Talk, models_first, refuse_existing, table
from embedtune.errors import UserError

CLIP = 100  # characters of a text that is shown


@dataclass(frozen=True)
class Judge:
    """Retrieval on BEIR folders and pairs, similarity on scored pairs, and labels where the models have heads.

    Every model is compared with the first.
    """

    # Models: folders, hub names, openai:MODEL, vertex:MODEL. The first is the base of all comparisons.
    models: tuple[str, ...]
    # What to judge on: a BEIR folder (or folder:split), pairs, or scored pairs; for models with heads labelled texts,
    # texts with scores, or tagged sentences. Several are judged one by one.
    data: tuple[str, ...]
    # Data of another kind that watches for forgetting.
    exam: str | None = None
    # Measures of retrieval: nDCG@k, MRR@k, recall@k, precision@k, MAP, accuracy@k.
    measures: tuple[str, ...] = ("nDCG@10", "MRR@10", "recall@10", "recall@100", "precision@10", "MAP", "accuracy@1")
    # Dimensions to cut the vectors to (Matryoshka); the full one always stands first.
    dims: tuple[int, ...] = ()
    # How vectors are compared.
    similarity: recipes.Similarity = "cosine"
    # Queries shown that changed most, each way.
    examples: int = 3
    # Which column is which: anchor=question,positive=context, or sentence1=...,sentence2=...,score=...
    columns: str | None = None
    # Rows that cannot be used: stop, or leave them out.
    bad_rows: recipes.BadRows = "fail"
    # Arithmetic of the models.
    precision: recipes.Precision = "fp32"
    # Where vectors of hosted models are kept, so that none is paid for twice (default: EMBEDTUNE_CACHE or ~/.cache).
    cache: str | None = None
    # What a hosted model costs per million tokens, for the count of the cost.
    price: float | None = None
    # Write everything, with the values of every query, to this .json file.
    out: str | None = None
    # Write how the data and the models drifted, with pictures, to this .html file: each --data against the first, each
    # model against the first.
    drift: str | None = None
    # Replace files of these names.
    force: bool = False
    # Print the result as JSON.
    json: bool = False


def judge(command: Judge, talk: Talk) -> Output:
    """Embed, measure, compare."""
    from embedtune.data.columns import parse_columns
    from embedtune.encoder.encode import open_encoder
    from embedtune.encoder.shapes import bound_memory
    from embedtune.judge import compare
    from embedtune.judge import measures as m
    from embedtune.parts import open_judged

    bound_memory()
    if not command.models or not command.data:
        raise UserError("name at least one model, and --data", fix="embedtune judge MODEL [MODEL ...] --data PATH")
    for path in filter(None, (command.out, command.drift)):
        refuse_existing(path, command.force)
    if has_heads(command.models):
        return judge_heads(command, talk)
    measures = [str(m.parse(name)) for name in command.measures]
    names = [*command.data, *([command.exam] if command.exam else [])]
    columns = parse_columns(command.columns)
    sets = [open_judged(name, columns=columns, bad_rows=command.bad_rows) for name in names]
    cache = Path(command.cache) if command.cache else None
    encoders = [
        open_encoder(name, precision=command.precision, cache=cache, price=command.price, note=talk.note)
        for name in command.models
    ]
    lines: list[str] = []
    found: list[dict[str, Any]] = []
    worst = "WIN"
    for number, data in enumerate(sets):
        talk.note(f"judging on {data.name}")
        reports = [_reports(encoder, data, measures, command) for encoder in encoders]
        exam = number >= len(command.data)
        lines += ["", f"{data.name}{' (exam: watches for forgetting)' if exam else ''}"]
        lines += _remarks(data)
        shown = [r for mine in reports for r in mine if r is mine[0] or r.dim != mine[0].dim]
        lines += _table(shown)
        entry = {"data": data.name, "exam": exam, **_written(shown, command)}
        main = measures[0] if data.retrieval else "spearman"
        for encoder, mine in zip(encoders[1:], reports[1:], strict=True):
            changes = {
                f"{name}{f' at {dim}' if dim else ''}": compare.paired(a, b, name)
                for dim, a, b in zip(_dims(command), reports[0], mine, strict=True)
                for name in (a.summary if dim is None else (main,))
            }
            word = compare.verdict([changes[main]])
            worst = "REGRESSION" if word == "REGRESSION" and not exam else worst
            lines += [
                "",
                f"{encoder.name} against {encoders[0].name}: {word} ({main})",
                *table(*compare.table(changes)),
            ]
            if data.retrieval and command.examples:
                lines += _changed(reports[0][0], mine[0], main, data.retrieval, command.examples)
            entry[encoder.name] = {"verdict": word, "changes": {k: vars(c) for k, c in changes.items()}}
        found.append(entry)
    texts = {name: JudgedTexts(data) for name, data in zip(command.data, sets)}
    drifts = find_drift(encoders, texts, talk.note, models=not command.exam)
    lines += drifts.lines()
    lines += [f"{e.name}: {usage}" for e in encoders if (usage := getattr(e, "usage", None))]
    return told(command, lines[1:], found, drifts, worst == "REGRESSION")


def _dims(command: Judge) -> list[int | None]:
    """None stands for all of a model's numbers; models may have more or less of them than each other."""
    return [None, *command.dims]


def _reports(encoder: Any, data: Any, measures: Sequence[str], command: Judge) -> list[Any]:
    from embedtune.judge.retrieval import judge_retrieval
    from embedtune.judge.similarity import judge_similarity

    dims = _dims(command)
    if data.retrieval:
        return judge_retrieval(encoder, data.retrieval, measures, dims=dims, similarity=command.similarity)
    return judge_similarity(encoder, data.scored, data.name, dims=dims)


def _written(reports: Sequence[Any], command: Judge) -> dict[str, Any]:
    """The reports with every query's values, which take much room as lists: only for --out and --json."""
    return {"reports": reports} if command.out or command.json else {}


def _remarks(data: Any) -> list[str]:
    sizes = f"{len(data.scored):,} scored pairs"
    if data.retrieval:
        sizes = f"{len(data.retrieval.queries):,} queries, {len(data.retrieval.corpus):,} documents"
    return [sizes, *data.remarks]


def _table(reports: Sequence[Any]) -> list[str]:
    from embedtune.judge.report import table as rows

    return table(*rows(reports))


def _changed(before: Any, after: Any, measure: str, data: Any, many: int) -> list[str]:
    from embedtune.judge.compare import changed_most

    lines = []
    for word, changes in zip(("gained", "lost"), changed_most(before, after, measure, many, data=data), strict=True):
        for c in (c for c in changes if c.after != c.before):
            lines.append(f"  {word} {c.after - c.before:+.4f}: {_clip(c.text)}")
            for name, shown in (("before", c.found_before), ("after", c.found_after)):
                for place, document in enumerate(shown[:1], 1):
                    mark = "right" if document.relevance else "wrong"
                    lines.append(f"    {name:<6} {place}. {mark}: {_clip(document.text)}")
    return ["", f"queries that changed most ({measure})", *lines] if lines else []


def _clip(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= CLIP else plain[: CLIP - 1] + "…"


COMMANDS = {
    "judge": Command(
        "MODEL [MODEL ...] --data PATH", "models side by side, with intervals", Judge, judge, None, models_first
    ),
}
