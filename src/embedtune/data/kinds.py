"""What data is, by the names of its columns, and the doctor that looks at data of its kind."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

from embedtune.data.check import Diagnosis, check
from embedtune.data.label_check import check_labels, kind_of_labels
from embedtune.data.label_report import LabelDiagnosis
from embedtune.data.pair_check import check_pairs, kind_of
from embedtune.data.pair_report import PairDiagnosis
from embedtune.data.read import DataLike
from embedtune.data.tags import is_conll
from embedtune.errors import UserError

Kind = Literal["text", "pairs", "scored pairs", "labelled", "graded", "tagged"]
LABELS: tuple[Kind, ...] = ("labelled", "graded", "tagged")
WORDS: dict[Kind, str] = {
    "text": "raw text", "pairs": "pairs", "scored pairs": "scored pairs", "labelled": "texts with labels",
    "graded": "texts with scores", "tagged": "sentences with tags",
}  # fmt: skip


def kind_of_data(data: DataLike, columns: Mapping[str, str] | None = None) -> Kind:
    """The kind of data; UserError where it cannot be read at all.

    What the user names in `columns` decides. Else anchors with positives are pairs; two sentences are scored pairs
    where they have a score, or nothing, and texts with labels where they have a label; and text is all the rest.
    """
    given = set(columns or ())
    if is_conll(data) or given & {"text_pair", "label", "tokens", "tags"}:
        return kind_of_labels(data, columns) or "text"
    unscored = {our: name for our, name in (columns or {}).items() if our != "score"}
    pair = None if "text" in given else kind_of(data, unscored)
    if pair == "pairs":
        return pair
    label = kind_of_labels(data, columns)
    return label or "text" if pair is None or label == "labelled" else pair


def check_data(
    data: DataLike,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> Diagnosis | PairDiagnosis | LabelDiagnosis:
    """The diagnosis of data of whatever kind (see `check`, `check_pairs`, `check_labels`)."""
    given: dict[str, Any] = {"tokenizer": tokenizer, "max_length": max_length, "columns": columns}
    kind: Kind = "text"
    with suppress(UserError):  # what cannot be read is said by the doctor
        kind = kind_of_data(data, columns)
    if kind == "text":
        return check(data, **given)
    if kind == "pairs" or kind == "scored pairs":
        return check_pairs(data, **given)
    return check_labels(data, kind, **given)
