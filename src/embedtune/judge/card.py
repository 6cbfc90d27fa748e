"""The model card: what was done to which text, what it brought, and what it does not promise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LABELS = {
    "dev_loss": "loss per masked token (nats)",
    "dev_perplexity": "pseudo-perplexity",
    "dev_accuracy": "masked-token accuracy",
    "dev_loss_per_character": "loss per character (nats)",
}

CARD = """---
library_name: sentence-transformers
pipeline_tag: fill-mask
tags: [sentence-transformers, embedtune, fill-mask]
---

# {title}

Fine-tuned from `{base}` by masked language modelling with embedtune. {verdict}

## Scores

{table}

Scored on held-out rows with 15 % of the tokens masked, always the same ones. Pseudo-perplexity is the exponential
of the loss per masked token.

![loss](loss.png)

## Text

{text}

## What happened

{facts}

## Limits

- Lower masked-language loss means that the encoder knows this language better. It does not by itself mean better
  retrieval or similarity; published results go both ways. Judge that on a task of yours.
- The scores hold for text like the held-out rows.
- Nothing was removed from the embeddings: they encode length, bias and whatever else the base encodes.

## Recipe

```toml
{recipe}
```

## Use

```python
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForMaskedLM

model = SentenceTransformer("path/to/this/folder")
language_model = AutoModelForMaskedLM.from_pretrained("path/to/this/folder")
```
"""


def score_table(scores: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of base against tuned, as text; the head alone has a column where there was a fresh one."""
    columns = [(name, scores[name]) for name in ("baseline", "head_alone", "tuned") if scores.get(name)]
    header = ["measure", *(name.replace("_", " ") for name, _ in columns)]
    rows = [
        [LABELS[measure], *(f"{values[measure]:,.4f}" for _, values in columns)]
        for measure in LABELS
        if measure in columns[0][1]
    ]
    return header, rows


def verdict(scores: Mapping[str, Any]) -> str:
    """The result in one sentence, with its interval."""
    change = scores.get("difference")
    against = scores["against"]
    if change is None:
        return f"No scoring was better than {against}: the folder holds its weights, nothing was gained."
    interval = f"95 % interval {change['low']:+.4f} to {change['high']:+.4f}, {change['items']:,} rows"
    span = f"{change['value']:+.4f} ({interval})"
    if change["high"] < 0:
        return f"Better than {against}: dev loss {span}."
    if change["low"] > 0:
        return f"Worse than {against}: dev loss {span}."
    return f"No clear difference to {against}: dev loss {span}."


def markdown(
    title: str, scores: Mapping[str, Any], profile: Mapping[str, Any], recipe: str, facts: Sequence[str], base: str
) -> str:
    """README.md of the output folder, with the front matter that sentence-transformers and the hub read."""
    header, rows = score_table(scores)
    table = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    text = [
        f"- {key.replace('_', ' ')}: {f'{value:,}' if isinstance(value, int) else value}"
        for key, value in profile.items()
        if value not in (None, {}, [])
    ]
    return CARD.format(
        title=title,
        base=base,
        verdict=verdict(scores),
        table="\n".join("| " + " | ".join(row) + " |" for row in table),
        text="\n".join(text),
        facts="\n".join(f"- {fact}" for fact in facts),
        recipe=recipe.rstrip(),
    )
