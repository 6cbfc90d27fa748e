"""What people said of search results, as pairs: a query, a text that fits it, and texts that do not.

`embedtune serve` writes a line for each answer (query, id, text, verdict: up or down). The last answer to a result
counts; a query without a text that fits gives no pair, and is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

from embedtune.data.named import unusable
from embedtune.data.read import Counts, Row, place

COLUMNS = {"query", "text", "verdict"}
FITS, FAILS = "up", "down"
NO_VERDICT = unusable(f"the verdict is neither {FITS!r} nor {FAILS!r}")
NONE_FITS = unusable("a query of which no text was said to fit")


def votes_as_pairs(rows: Iterable[Row], tally: Counts) -> Iterator[Row]:
    """Rows of votes as rows of pairs (anchor, positive, negative), in the order of the queries; others as they are."""
    stream = iter(rows)
    first = next(stream, None)
    if first is None or not set(first.values) >= COLUMNS:
        yield from chain([] if first is None else [first], stream)
        return
    last: dict[str, dict[str, Row]] = {}  # the last vote on each text of a query
    for row in chain([first], stream):
        verdict = row.values.get("verdict")
        if verdict not in (FITS, FAILS):
            tally.used -= 1
            tally.note(tally.rejected, NO_VERDICT, place(row))
            continue
        last.setdefault(str(row.values.get("query")), {})[str(row.values.get("text"))] = row
    for query, found in last.items():
        said = {verdict: [text for text, row in found.items() if row.values["verdict"] == verdict]
                for verdict in (FITS, FAILS)}  # fmt: skip
        where = next(iter(found.values()))
        if not said[FITS]:
            tally.used -= len(found)
            for row in found.values():
                tally.note(tally.rejected, NONE_FITS, place(row))
            continue
        yield where._replace(values={"anchor": query, "positive": said[FITS], "negative": said[FAILS]})
