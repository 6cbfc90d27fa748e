"""Counterfactual texts (arXiv 1807.11714): the same text about the other group, word by word and with its grammar.

"He gave her his book" becomes "She gave him her book". Pairs of words change places in both directions, so that a swap
of a swap is the text again; the exceptions are words that have no single partner ("Mrs" becomes "Mr", which becomes
"Ms") and a pronoun whose grammar was guessed wrong. The words are English.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from embedtune.errors import UserError, did_you_mean

Group = Literal["gender", "names", "religion", "race"]
GROUPS: tuple[str, ...] = get_args(Group)
WORDS = re.compile(r"\w+(?:-\w+)*")
ARTICLE = re.compile(r"\b(an?)\s+$", re.I)
NEXT = re.compile(r"[ \t\n]+(\w+)")
# "his or her book": whether a book follows is seen behind the second pronoun.
TWINS = re.compile(r"(?:\s*/\s*|\s+(?:or|and)\s+)(?:his|her|hers|him)\b", re.I)
ONE_WAY = {"mrs": "mr", "miss": "mr"}  # titles; "miss" only with a capital, before a name


@cache
def lists() -> Mapping[str, Any]:
    """The lists of words, as they stand in counterfactual.toml."""
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def counterfactual(text: str, groups: Iterable[str] = ("gender", "names"), shift: int = 0) -> str | None:
    """`text` with the words of `groups` swapped; None where it has none of them.

    `shift` pairs the names anew: name n with name n + shift of the other side. "a" and "an" follow the new word. Raises
    UserError for an unknown group.
    """
    chosen = tuple(groups)
    partner = _partners(chosen, shift % len(lists()["names"]))
    out: list[str] = []
    last = 0
    for match in WORDS.finditer(text):
        old = match.group()
        new = _partner(old, text, match.end(), partner, chosen)
        if new is None:
            continue
        before = text[last : match.start()]
        if (article := ARTICLE.search(before)) and _an(old) != _an(new):
            a = article.group(1)
            before = before[: article.start(1)] + like(a, "an" if _an(new) else "a") + before[article.end(1) :]
        out += [before, new]
        last = match.end()
    return "".join([*out, text[last:]]) if out else None


def like(word: str, new: str) -> str:
    """`new` in capitals where `word` is, or with a capital first letter where `word` has one."""
    if len(word) > 1 and word.isupper():
        return new.upper()
    return new[:1].upper() + new[1:] if word[:1].isupper() else new


@cache
def _partners(groups: tuple[str, ...], shift: int) -> Mapping[str, str]:
    """Each word and what it becomes: names with their capital, all others in lower case."""
    for group in groups:
        if group not in GROUPS:
            raise UserError(f"no group is called {group!r}{did_you_mean(group, GROUPS)}", fix=", ".join(GROUPS))
    found: dict[str, str] = {}
    for group in groups:
        pairs = lists()[group]
        if group == "names":
            pairs = [(one, pairs[(n + shift) % len(pairs)][1]) for n, (one, _) in enumerate(pairs)]
        for one, two in pairs:
            found |= {one: two, two: one}
    return found


def _partner(word: str, text: str, end: int, partner: Mapping[str, str], groups: tuple[str, ...]) -> str | None:
    """What `word` of `text`, which ends at `end`, becomes."""
    plain = word.lower()
    if word in partner and word[:1].isupper():  # a name
        return partner[word]
    if plain in partner:
        return like(word, partner[plain])
    if "gender" in groups:
        if plain in ("his", "her", "him", "hers"):
            return like(word, _pronoun(plain, text, end))
        if plain in ONE_WAY and word[:1].isupper():
            return like(word, ONE_WAY[plain]) if plain != "miss" or _before_a_name(text, end) else None
    if "race" in groups and _next(text, end) in lists()["persons"]:
        colours = {a: b for one, two in lists()["race_of_persons"] for a, b in ((one, two), (two, one))}
        return like(word, colours[plain]) if plain in colours else None
    return None


def _pronoun(plain: str, text: str, end: int) -> str:
    match plain:
        case "him":
            return "her"
        case "hers":
            return "his"
        case "her":
            return "his" if _owns(text, end) else "him"
        case _:
            return "her" if _owns(text, end) else "hers"


def _owns(text: str, end: int) -> bool:
    """Whether a pronoun that ends at `end` stands before what its person has: a guess by the next word."""
    if twin := TWINS.match(text, end):
        end = twin.end()
    after = _next(text, end)
    if after is None or after in lists()["after_alone"] or after[0].isdigit():
        return False
    return not after.endswith("ly") or after in lists()["no_adverbs"]


def _next(text: str, end: int) -> str | None:
    """The next word in lower case, where nothing but blanks stands before it."""
    found = NEXT.match(text, end)
    return found.group(1).lower() if found else None


def _before_a_name(text: str, end: int) -> bool:
    found = NEXT.match(text, end)
    return bool(found) and found.group(1)[0].isupper()  # type: ignore[union-attr]


def _an(word: str) -> bool:
    """Whether "an" stands before a word."""
    plain = word.lower()
    if plain in lists()["an_before"]:
        return True
    return plain[0] in "aeiou" and plain not in lists()["a_before"]


def lean(text: str) -> int:
    """How many more words of the first side of the gender and name pairs `text` has (men's) than of the second."""
    first = {one for group in ("gender", "names") for one, _ in lists()[group]} | {"his", "him"}
    partner = _partners(("gender", "names"), 0)
    count = 0
    for match in WORDS.finditer(text):
        word = match.group() if match.group() in partner else match.group().lower()
        if word in partner or word in ("his", "him", "her", "hers"):
            count += 1 if word in first else -1
    return count
