"""embedtune refine bias: what a model's vectors tell of groups of people, base beside debiased, with intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from embedtune.commands.shape import Command, Output, Talk, models_first, table
from embedtune.errors import UserError
from embedtune.recipes import BadRows, Precision

if TYPE_CHECKING:
    from embedtune.encoder.load import Loaded
    from embedtune.judge.bias import Asked
    from embedtune.judge.bias import Bias as Found
    from embedtune.judge.score import Score

MOST_TEXTS = 2000  # of --data


@dataclass(frozen=True)
class Bias:
    """Bias of embeddings: association tests, swaps of gender, exposure in retrieval, and what a probe can still read.

    Every model is compared with the first, on the same items.
    """

    # Models: folders, hub names, openai:MODEL, vertex:MODEL. The first is the base of all comparisons.
    models: tuple[str, ...]
    # CrowS-Pairs, a .csv in its public format; for models with a masked-language head.
    crows: str | None = None
    # The folder with the sentences of WinoBias (pro_stereotyped_*, anti_stereotyped_*).
    winobias: str | None = None
    # Texts of your own, in English: those with gendered words or names are swapped (the first 2,000 of them).
    data: str | None = None
    # Which column is the text: text=NAME.
    columns: str | None = None
    # Rows of --data that cannot be used: stop, leave them out, or mend them with U+FFFD.
    bad_rows: BadRows = "fail"
    # Seed of the resamples.
    seed: int = 0
    # Arithmetic of the models.
    precision: Precision = "fp32"
    # Print the result as JSON.
    json: bool = False


def bias(command: Bias, talk: Talk) -> Output:
    """Read what is asked for, then embed and measure model by model."""
    from embedtune.encoder.encode import open_encoder
    from embedtune.encoder.shapes import bound_memory
    from embedtune.judge.bias import differences, judge_bias, limits

    bound_memory()
    if not command.models:
        raise UserError("name at least one model", fix="embedtune refine bias MODEL [MODEL ...]")
    remarks: list[str] = []
    asked = _asked(command, remarks)
    masked = _masked(command, remarks)
    found = []
    for name in command.models:
        encoder = open_encoder(name, precision=command.precision, note=talk.note)
        talk.note(f"measuring {name}")
        found.append(judge_bias(encoder, asked, masked.get(name)))
        remarks += [f"{name}: {remark}" for remark in found[-1].remarks]
    changes = [differences(found[0], other) for other in found[1:]]
    said = limits(asked)
    lines = [*_table(found, changes), "", *remarks, "what this does not tell:", *(f"  {line}" for line in said)]
    told = [
        {name: dict(zip(("value", "low", "high"), change)) for name, change in each.items()} for each in [{}, *changes]
    ]
    models = [
        {"model": each.model, "scores": [score.as_dict() for score in each.scores], "changes": change}
        for each, change in zip(found, told)
    ]
    return Output(lines, {"models": models, "remarks": remarks, "limits": said})


def _asked(command: Bias, remarks: list[str]) -> Asked:
    """What is to be measured, read whole before a model is opened."""
    from embedtune.data.columns import parse_columns
    from embedtune.data.read import Counts, read_texts
    from embedtune.judge.bias import Asked
    from embedtune.judge.likelihood import read_crows
    from embedtune.judge.swaps import read_winobias, swapped_texts

    crows = read_crows(command.crows) if command.crows else []
    readings, odd = read_winobias(command.winobias) if command.winobias else ([], 0)
    if odd:
        remarks.append(
            f"{command.winobias}: {odd:,} sentences left out: the two versions differ in more than a pronoun"
        )
    texts = None
    if command.data:
        counts = Counts()
        columns = parse_columns(command.columns)
        rows = read_texts(command.data, columns=columns, bad_rows=command.bad_rows, counts=counts)
        texts = swapped_texts((row.values["text"] for row in rows), most=MOST_TEXTS)
        remarks.append(f"{command.data}: {len(texts.texts):,} texts with gendered words, of {counts.rows:,} rows read")
        remarks += [f"{n:,} rows left out: {reason}" for reason, n in counts.rejected.items()]
        remarks += [f"{n:,} rows mended: {reason}" for reason, n in counts.replaced.items()]
    return Asked(crows=crows, winobias=readings, texts=texts, seed=command.seed)


def _masked(command: Bias, remarks: list[str]) -> dict[str, Loaded]:
    """The models that have a masked-language head; why not, for the others. Raises UserError where none has one."""
    from embedtune.encoder.encode import HOSTED
    from embedtune.judge.likelihood import open_masked

    found: dict[str, Loaded] = {}
    if not command.crows:
        return found
    refused = []
    for name in command.models:
        try:
            if name.startswith(HOSTED):
                raise UserError("gives vectors alone, and no likelihood of a sentence", where=name)
            found[name] = open_masked(name)
        except UserError as error:
            refused.append(error)
    if not found:
        raise UserError("CrowS-Pairs needs a masked-language head", where="--crows",
                        details=[str(e).splitlines()[0] for e in refused], fix="leave --crows out")  # fmt: skip
    remarks += [f"no CrowS-Pairs: {str(error).splitlines()[0]}" for error in refused]
    return found


def _table(found: list[Found], changes: list[dict[str, tuple[float, float, float]]]) -> list[str]:
    names = list(dict.fromkeys(score.name for each in found for score in each.scores))
    scores = [{score.name: score for score in each.scores} for each in found]
    neutral = {score.name: score.neutral for each in found for score in each.scores}
    header = ["measure (95 % interval)", "no bias", *(each.model for each in found)]
    header += [f"change of {each.model}" for each in found[1:]]
    rows = [
        [name, f"{neutral[name]:g}", *(_shown(mine.get(name)) for mine in scores), *(_change(c, name) for c in changes)]
        for name in names
    ]
    return table(header, rows)


def _shown(score: Score | None) -> str:
    if score is None:
        return "-"
    p = "" if score.p is None else f"p {score.p:.4f}  "
    return f"{p}{score.value:.3f} ({score.low:.3f} to {score.high:.3f})"


def _change(changes: dict[str, Any], name: str) -> str:
    if name not in changes:
        return "-"
    value, low, high = changes[name]
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


COMMANDS = {
    "refine bias": Command(
        "MODEL [MODEL ...]", "what vectors tell of groups of people", Bias, bias, None, models_first
    ),
}
