"""The model card: what was done to which text, what it brought, and what it does not promise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TASKS = {
    "mlm": "masked language modelling",
    "contrastive": "contrastive pairs",
    "scored": "scored pairs",
    "classify": "labelled texts",
    "regress": "texts with scores",
    "tag": "tagged sentences",
}
LOSSES = {
    "mlm": "loss per masked token (nats)",
    "contrastive": "ranking loss (nats)",
    "scored": "mean squared gap",
    "classify": "log loss (nats)",
    "regress": "mean squared gap",
    "tag": "log loss per word (nats)",
}
LABELS = {
    "dev_perplexity": "pseudo-perplexity",
    "dev_accuracy": "masked-token accuracy",
    "dev_loss_per_character": "loss per character (nats)",
    "dev_spearman": "Spearman",
    "dev_pearson": "Pearson",
    "dev_balanced_accuracy": "balanced accuracy",
    "dev_F1_micro": "F1 (micro)",
    "dev_ROC_AUC": "ROC AUC",
    "dev_ECE": "calibration error (ECE)",
}
# Measures whose name means another thing in another task.
OWN_LABELS = {
    "classify": {"dev_accuracy": "accuracy", "dev_F1": "F1 (macro)"},
    "tag": {"dev_accuracy": "accuracy of words", "dev_F1": "F1 (entities)", "dev_precision": "precision (entities)",
            "dev_recall": "recall (entities)"},
}  # fmt: skip
# Of a run that goes on from another: what that one was scored on, the new rows, and both counted the same.
SIDES = {"old": "old rows", "new": "new rows", "sides": "mean of old and new"}
SCORED_ON = {
    "mlm": "Scored on held-out rows with 15 % of the tokens masked, always the same ones. Pseudo-perplexity is the "
    "exponential of the loss per masked token.",
    "contrastive": "Scored by searching held-out anchors among {dev_corpus:,} texts ({dev_queries:,} queries). These "
    "texts also chose the best step (and the averaging, where there was one), so the scores of the tuned model are a "
    "little flattered; judge it on data of its own with `embedtune judge`.",
    "scored": "Scored on {dev_pairs:,} held-out pairs, which also chose the best step. The loss is the mean squared "
    "difference between cosine similarity and score.",
    "classify": "Scored on {dev_rows:,} held-out texts, which also chose the best step, so the scores of the tuned "
    "model are a little flattered; judge it on data of its own with `embedtune judge`.",
    "regress": "Scored on {dev_rows:,} held-out texts, which also chose the best step.",
    "tag": "Scored on {dev_rows:,} held-out sentences, which also chose the best step. An entity counts as right where "
    "its type and both its ends are.",
}
LIMITS = {
    "mlm": "Lower masked-language loss means that the encoder knows this language better. It does not by itself mean "
    "better retrieval or similarity; published results go both ways. Judge that on a task of yours.",
    "contrastive": "A model that finds these pairs better may have become worse at something else. `embedtune judge "
    "BASE TUNED` with data of another kind shows that.",
    "scored": "A model that follows these scores better may have become worse at something else. `embedtune judge "
    "BASE TUNED` with data of another kind shows that.",
    "classify": "It knows these classes only, and says one of them whatever the text is.",
    "regress": "It gives a number for any text, also for texts of a kind that it has never seen.",
    "tag": "It knows these types of entities only.",
}
USE_MLM = """from sentence_transformers import SentenceTransformer
from transformers import AutoModelForMaskedLM

model = SentenceTransformer("path/to/this/folder")
language_model = AutoModelForMaskedLM.from_pretrained("path/to/this/folder")"""
USE = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
queries, documents = model.encode_query(["a question"]), model.encode_document(["a text"])
print(model.similarity(queries, documents))"""
USE_HEAD = """from transformers import pipeline

predict = pipeline("{pipeline}", model="path/to/this/folder")
print(predict("a text"))

# or: embedtune predict path/to/this/folder texts.txt"""
PIPELINES = {
    "mlm": "fill-mask",
    "classify": "text-classification",
    "regress": "text-classification",
    "tag": "token-classification",
}
LIBRARIES = {"classify": "transformers", "regress": "transformers", "tag": "transformers"}

CARD = """---
library_name: {library}
pipeline_tag: {pipeline}
tags: [{library}, embedtune, {pipeline}]
---

# {title}

Fine-tuned from `{base}` on {task} with embedtune. {verdict}

## Scores

{table}

{scored_on}

![loss](loss.png)

## Text

{text}

## What happened

{facts}

## Limits

- {limits}
- The scores hold for text like the held-out rows.
- Nothing was removed from the embeddings: they encode length, bias and whatever else the base encodes.

## Recipe

```toml
{recipe}
```

## Use

```python
{use}
```
"""


@dataclass(frozen=True)
class About:
    """What a card tells: `profile` of the data, `facts` that happened, `recipe` as TOML."""

    task: str
    title: str
    base: str
    scores: Mapping[str, Any]
    profile: Mapping[str, Any]
    facts: Sequence[str]
    recipe: str


def _both_sides(scores: Mapping[str, Any], unit: str) -> str:
    """The result of a run that went on from another: on what that one was scored on, and on the new rows."""
    said = {
        "WIN": "WIN: better than the run that this one goes on from, and on neither side worse",
        "MARGINAL": "MARGINAL: no clear difference to the run that this one goes on from, on both sides together",
        "REGRESSION": "REGRESSION: worse than the run that this one goes on from, whose weights are kept",
    }[scores["word"]]
    name = scores["compared"].replace("_", " ")
    changes = [
        f"{SIDES[side]} {change['value']:+.4f} (95 % interval {change['low']:+.4f} to {change['high']:+.4f}, "
        f"{change['items']:,} {unit})"
        for side, change in scores["sides"].items()
    ]
    return f"{said}. {name}: {'; '.join(changes)}."


def score_table(scores: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of base against tuned, as text; the head alone has a column where there was a fresh one."""
    plain = {name.replace("_", " "): scores[name] for name in ("baseline", "head_alone") if scores.get(name)}
    columns = [*(scores.get("baselines") or plain).items(), ("tuned", scores["tuned"])]
    header = ["measure", *(name for name, _ in columns)]
    rows = [
        [label(measure, scores["task"]), *(f"{values[measure]:,.4f}" for _, values in columns)]
        for measure in columns[0][1]
    ]
    return header, rows


def label(measure: str, task: str) -> str:
    """A dev measure in words."""
    side, _, name = measure.removeprefix("dev_").partition("_")
    if side in SIDES:
        return f"{label(f'dev_{name}', task)}, {SIDES[side]}"
    known = {**LABELS, **OWN_LABELS.get(task, {}), "dev_loss": LOSSES[task]}
    return known.get(measure, measure.removeprefix("dev_"))


def verdict(scores: Mapping[str, Any]) -> str:
    """The result in a sentence or two, with its interval."""
    if scores["task"] in LIBRARIES and scores.get("best_step") == 0:
        return f"{_change(scores)} No step was better on dev than the head's start: the folder holds that."
    return _change(scores)


def _change(scores: Mapping[str, Any]) -> str:
    change, against = scores.get("difference"), scores["against"]
    if change is None:
        return f"No scoring was better than {against}: the folder holds its weights, nothing was gained."
    unit = {"contrastive": "queries", "scored": "pairs", "tag": "sentences"}.get(scores["task"], "rows")
    if scores.get("sides"):
        return _both_sides(scores, unit)
    interval = f"95 % interval {change['low']:+.4f} to {change['high']:+.4f}, {change['items']:,} {unit}"
    name = scores["compared"]
    what = f"{name.replace('_', ' ')} {change['value']:+.4f} ({interval})"
    falls = bool(change.get("lower")) or "loss" in name
    if (change["high"] < 0) if falls else (change["low"] > 0):
        return f"Better than {against}: {what}."
    if (change["low"] > 0) if falls else (change["high"] < 0):
        return f"Worse than {against}: {what}."
    return f"No clear difference to {against}: {what}."


def averaging(scores: Mapping[str, Any]) -> list[str]:
    """What averaging with the base did, in a line; none where there was none."""
    found = scores.get("averaging")
    if not found:
        return []
    tried = ", ".join(f"{c}: {value:.4f}" for c, value in found["tried"].items())
    share = f"{found['coefficient']:g} of the way from the base to the tuned weights"
    return [f"averaged with the base: {share} was best on dev ({scores['measure']} at {tried})"]


def markdown(about: About) -> str:
    """README.md of the output folder, with the front matter that sentence-transformers and the hub read."""
    header, rows = score_table(about.scores)
    pipeline = PIPELINES.get(about.task, "sentence-similarity")
    use = {"mlm": USE_MLM, **dict.fromkeys(LIBRARIES, USE_HEAD.replace("{pipeline}", pipeline))}.get(about.task, USE)
    table = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    text = [
        f"- {key.replace('_', ' ')}: {f'{value:,}' if isinstance(value, int) else value}"
        for key, value in about.profile.items()
        if value not in (None, {}, [])
    ]
    return CARD.format(
        pipeline=pipeline,
        library=LIBRARIES.get(about.task, "sentence-transformers"),
        title=about.title,
        base=about.base,
        task=TASKS[about.task],
        verdict=verdict(about.scores),
        table="\n".join("| " + " | ".join(row) + " |" for row in table),
        scored_on=SCORED_ON[about.task].format(**about.profile),
        text="\n".join(text),
        facts="\n".join(f"- {fact}" for fact in about.facts),
        limits=LIMITS[about.task],
        recipe=about.recipe.rstrip(),
        use=use,
    )
