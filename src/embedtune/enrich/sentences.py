"""Text to sentences and to words, by rules that hold for many scripts and need no model."""

from __future__ import annotations

import re

# After these a point never ends a sentence; a name, a number or a reference follows.
_NEVER_LAST = """mr mrs ms mx dr prof st mt rev hon gen col capt lt sgt sen rep gov fr messrs mme mlle hr fig figs eq
eqs ref refs sec sect ch chap vol no nos pp p ed eds vs cf viz approx ca e.g i.e eg ie resp incl art nr bzw z.b d.h u.a
vgl p.ex sp"""
# After these a point may end a sentence; what follows decides.
_MAYBE_LAST = """etc al inc ltd corp co bros jr sr ph.d m.d u.s u.k u.n a.m p.m a.d b.c dept univ est jan feb mar apr
jun jul aug sep sept oct nov dec mon tue wed thu fri sat sun min max avg spp var"""
# Words that mostly begin a sentence where they are capitalised.
_STARTERS = """a an the this that these those it its he she we they there here in on at for from to by with as if when
while where what who why how however moreover furthermore thus therefore hence although because since after before our
their his her my your i you all both each some many most more such no not but and or so then yet also during between
under over overall finally first second once one two using based compared"""
NEVER_LAST, MAYBE_LAST, STARTERS = (frozenset(each.split()) for each in (_NEVER_LAST, _MAYBE_LAST, _STARTERS))
CLOSERS = "\"'\u2019\u201d\u00bb\u203a)\\]}\u300d\u300f\u3011\uff09\u300b\u3009"
WIDE = "\u3002\uff01\uff1f\uff61"  # these end a sentence with or without a space after them
NARROW = "!?\u2026\u203d\u061f\u06d4\u0964\u0965\u1362\u104b\u17d4\u0589"  # these, and ".", only before a space
END = re.compile(rf"[{WIDE}]++[{CLOSERS}]*+\s*+|(?<![.{NARROW}])[.{NARROW}]++[{CLOSERS}]*+\s++")
OPENERS = "\"'\u2018\u201c\u00ab([{\u00bf\u00a1"
NEAR = 64  # characters looked at on either side of a mark, so that time stays linear in the text
# Scripts written without spaces; two of their letters count as one word.
JOINED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[{JOINED}]{{1,2}}|[^\s{JOINED}]+")
ITEM = re.compile(r"[(\[]?(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,5})[.)\]]+|[-*\u2022\u2013]")


def words(text: str) -> list[tuple[int, int]]:
    """Where each word of `text` begins and ends; two letters of a script without spaces are one word."""
    return [match.span() for match in WORD.finditer(text)]


def count(text: str) -> int:
    """How many words `words` finds."""
    return len(text.split()) if text.isascii() else len(WORD.findall(text))


def sentences(text: str) -> list[str]:
    """The sentences of one paragraph, in order; joined by spaces they hold every word of it.

    A point after an abbreviation, an initial, "et al." or a list's number ends no sentence unless the next word is
    one that begins sentences; nor does any mark before a small letter. Decimals have no space and so are safe.
    """
    found, start = [], 0
    for match in END.finditer(text):
        if _ends(text, start, match):
            found.append(text[start : match.end()].strip())
            start = match.end()
    found.append(text[start:].strip())
    return [sentence for sentence in found if sentence]


def _ends(text: str, start: int, match: re.Match[str]) -> bool:
    """Whether the marks of `match` end the sentence that began at `start`."""
    marks = match[0]
    following = text[match.end() : match.end() + NEAR].lstrip(OPENERS)
    if marks[0] in WIDE:
        # A quotation that goes on: its bracket is closed and a particle follows.
        return not (marks[-1] in "\u300d\u300f" and "\u3041" <= following[:1] <= "\u309f")
    if not following or following[0].islower():
        return False
    before = text[max(start, match.start() - NEAR) : match.start()]
    if ITEM.fullmatch(before + "."):
        return False  # "1." or "a." at the start of a sentence numbers it
    if marks[0] != "." or marks.startswith(".."):
        return True
    last = before.rpartition(" ")[2].lstrip(OPENERS).casefold()
    next_word = re.match(r"[^\W\d_]*", following)
    starts = next_word is not None and next_word[0].casefold() in STARTERS
    if last in NEVER_LAST:
        return last in ("no", "p") and starts
    initial = len(last) == 1 and last.isalpha()
    return starts if initial or last in MAYBE_LAST else True


def plain(text: str) -> str:
    """Casefolded, whitespace collapsed: two texts that differ in nothing else are the same text."""
    return " ".join(text.casefold().split())
