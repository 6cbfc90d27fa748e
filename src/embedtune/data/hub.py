"""Datasets of the hub as rows: hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT (train where none is named)."""

from __future__ import annotations

from typing import Any

from embedtune.data.formats import Add, Item, Items, listed
from embedtune.errors import UserError, short_list

HUB = "hub:"


def hub(name: str, add: Add, names: bool = False) -> Items:
    """The rows of a hub dataset, or of one that `datasets` finds in its cache or in a folder; classes by their `names`.

    Raises UserError where `datasets` is missing, or has no such dataset, config or split.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError("hub datasets need another package", where=name, fix="pip install 'embedtune[hub]'") from error
    path, config, split = (name.removeprefix(HUB).split(":") + ["", ""])[:3]
    if not path:
        raise UserError("names no dataset", where=name, fix="hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT")
    try:
        found = datasets.load_dataset(path, config or None)
    except Exception as error:  # noqa: BLE001 - it raises many kinds; all mean that there is no such dataset here
        what = f"cannot be loaded ({type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]})"
        fix = "check the name and the network; or give a local file (.jsonl, .csv, .tsv, .parquet)"
        raise UserError(what, where=name, fix=fix) from error
    wanted = split or "train"
    if wanted not in found:
        what = f"has no split {wanted!r}, only {short_list(sorted(found))}"
        raise UserError(what, where=name, fix=f"hub:{path}:{config}:{sorted(found)[0]}")
    number = 0
    for batch in found[wanted].iter(256):
        if names:
            batch = {column: _named(cells, found[wanted].features[column]) for column, cells in batch.items()}
        rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
        for item in listed(rows, add):
            # `listed` numbers each batch anew, and gives the header again.
            if isinstance(item, Item):
                number += 1
                yield item._replace(number=number)
            elif number == 0:
                yield item


def _named(cells: list[Any], feature: Any) -> list[Any]:
    """Numbers of classes, or lists of them, as names; the -1 of rows without a label as None."""
    if known := getattr(feature, "names", None):
        return [known[cell] if isinstance(cell, int) and 0 <= cell < len(known) else None for cell in cells]
    if inner := getattr(feature, "feature", None):
        return [cell if cell is None or isinstance(cell, dict) else _named(cell, inner) for cell in cells]
    return cells
