"""New texts out of one by its words and characters (arXiv 1901.11196): pure functions of a text, a key and a rate.

A word is what stands between blanks. Blanks, and words that are not touched, stay as they are, letter by letter. What
a function gives is never blank, and differs from its text in more than case and blanks; None: it has nothing to change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from embedtune import keyed
from embedtune.data.clean import text_hash
from embedtune.data.counterfactual import counterfactual, like
from embedtune.errors import UserError, did_you_mean

Change = Callable[[str, int, float], str | None]
Lexicon = Callable[[str], Sequence[str]]
Draw = Callable[[list[str], np.ndarray], Sequence[str | None]]
Maker = Callable[[Sequence[str]], list["Made"]]
Span = tuple[int, int]

# A kind's place here is a part of its keys: new ones go to the end.
KINDS = (
    *("swap", "deletion", "crop", "characters", "synonyms", "contextual", "back-translation", "paraphrase", "llm"),
    "counterfactual",
)
# Why a kind gives nothing for a text, however often it is asked.
NOTHING = {
    "swap": "no two words that differ",
    "deletion": "a single word",
    "crop": "a single word",
    "characters": "no word of four letters",
    "synonyms": "no word with a synonym",
    "contextual": "no word that can be masked",
    "back-translation": "longer than the models read",
    "paraphrase": "longer than the model reads",
    "counterfactual": "no gendered word or name",
}
SAME = "nothing new came out"
TRIES = 4  # more draws than copies, for a text whose draws came out alike
WORD = re.compile(r"\S+")
CORE = re.compile(r"\w(?:[\w'\u2019-]*\w)?")  # of a word, without the marks around it
SHORTEST = 4  # letters of a word in which characters change: its first and last letter stay (arXiv 1905.11268)
ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
# The key to the left and right, and the two above and below.
NEIGHBOURS = {
    letter: "".join(
        ROWS[r + down][c + right]
        for down, right in ((0, -1), (0, 1), (-1, 0), (-1, 1), (1, -1), (1, 0))
        if 0 <= r + down < len(ROWS) and 0 <= c + right < len(ROWS[r + down])
    )
    for r, row in enumerate(ROWS)
    for c, letter in enumerate(row)
}
# WordNet takes them for something else: "a" is an angstrom, "in" is indium, "can" is a tin.
_FUNCTION_WORDS = """a about above across after again against all along am amid among an and any anything are aren't
around as at be because been before behind being below beside besides between beyond both but by can can't could
despite did do does doing don't down during each else even ever everything few for from further had has have having
he her here hers herself him himself his how i if in into is isn't it it's its itself just least less let like may me
might more most much must my myself neither never no none nor not nothing now of off on once one only or other ought
our ours ourselves out over own per quite rather same shall she should since so some something still such than that
the their theirs them themselves then there these they this those though through till to too two under unless until
up upon us very was wasn't we well were what when where whether which while who whom whose why will with within
without would yet you your yours yourself yourselves"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


@dataclass(frozen=True, kw_only=True)
class Augmenting:
    """What is made of each training row."""

    kinds: tuple[str, ...] = ("swap", "deletion")
    copies: int = 2  # new rows of each kind that a row gives at most
    rate: float = 0.1  # share of the words that a new text changes
    seed: int = 0
    pair: bool = False  # whether the second text of a pair changes too
    only_new: bool = False  # whether the rows themselves are left out

    def problems(self) -> list[str]:
        """What is wrong with it, a line each."""
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        found = [
            f"--kinds: {kind!r} is no kind{did_you_mean(kind, KINDS)}; there are {', '.join(KINDS)}" for kind in unknown
        ]
        if not self.kinds:
            found.append(f"--kinds: names none; there are {', '.join(KINDS)}")
        twice = sorted({kind for kind in self.kinds if self.kinds.count(kind) > 1})
        found += [f"--kinds: names {kind!r} more than once" for kind in twice]
        if self.copies < 1:
            found.append(f"--copies: must be 1 or more, not {self.copies}")
        if not 0 < self.rate <= 1:
            found.append(f"--rate: must be above 0 and at most 1, not {self.rate:g}")
        return found


class Made(NamedTuple):
    """The new texts of a text, all different, and for each that is missing the reason."""

    texts: tuple[str, ...]
    missing: tuple[str, ...]


def swap(text: str, key: int, rate: float) -> str | None:
    """Words change places, two and two, until `rate` of them stand elsewhere (two at least)."""
    at = _spans(text)
    words = [text[first:last] for first, last in at]
    plain = [word.casefold() for word in words]
    left = _drawn(key, len(words))
    new: dict[int, str] = {}
    while left and len(new) < 2 * _share(len(words), rate / 2):
        one = left.pop(0)
        other = next((place for place, two in enumerate(left) if plain[two] != plain[one]), None)
        if other is None:
            break  # all that are left are the same word
        two = left.pop(other)
        new[one], new[two] = words[two], words[one]
    return replaced(text, at, new) if new else None


def deletion(text: str, key: int, rate: float) -> str | None:
    """`rate` of the words are gone (one at least, never all), each with the blanks before it."""
    at = _spans(text)
    if len(at) < 2:
        return None
    gone = set(_drawn(key, len(at))[: min(len(at) - 1, _share(len(at), rate))])
    first, *others = (number for number in range(len(at)) if number not in gone)
    kept = [text[: at[0][0]], text[slice(*at[first])], *(text[at[n - 1][1] : at[n][1]] for n in others)]
    return "".join(kept) + text[at[-1][1] :]


def crop(text: str, key: int, rate: float) -> str | None:
    """A stretch of the text that lacks `rate` of the words (one at least, never all)."""
    at = _spans(text)
    if len(at) < 2:
        return None
    gone = min(len(at) - 1, _share(len(at), rate))
    first = _choice(key, gone + 1)
    return text[at[first][0] : at[first + len(at) - gone - 1][1]]


def characters(text: str, key: int, rate: float) -> str | None:
    """`rate` of the words (one at least) have a slip of the keyboard inside, between their first and last letter.

    Two letters exchanged, one dropped, one doubled, or the key beside it.
    """
    return _by_word(text, key, rate, lambda core, number: _slip(core, int(keyed.key(key, number)[0])))


def synonyms(text: str, key: int, rate: float, lexicon: Lexicon) -> str | None:
    """`rate` of the words (one at least) are replaced by others that `lexicon` gives for them in lower case."""

    def other(core: str, number: int) -> str | None:
        plain = core.casefold()
        found = [each for each in lexicon(plain) if each.strip() and each.casefold().split() != [plain]]
        return like(core, found[_choice(int(keyed.key(key, number)[0]), len(found))]) if found else None

    return _by_word(text, key, rate, other)


def other_gender(text: str, key: int, rate: float) -> str | None:
    """All gendered words and names swapped (a half of them would make no sense); the key chooses the new names."""
    return counterfactual(text, shift=key)


def wordnet() -> Lexicon:
    """Synonyms by WordNet: those of a word's most frequent sense, for words in their base form.

    A word in another form (plural, past) is left alone, as its synonym would not fit in; and so are names, words of
    one or two letters, and those that hold a sentence together: WordNet takes most for something else. Raises
    UserError where nltk or its data is not on the machine.
    """
    where = "--kinds synonyms"
    try:
        from nltk.corpus import wordnet as reader
    except ImportError as error:
        fix = "pip install nltk, then python -m nltk.downloader wordnet"
        raise UserError("synonyms need another package, nltk, and its WordNet", where=where, fix=fix) from error
    try:
        reader.ensure_loaded()
    except (LookupError, OSError) as error:  # it is not there, or a file of it is missing
        what = "WordNet, the list of synonyms, is not on this machine, or not all of it"
        fix = "python -m nltk.downloader wordnet (it is found in NLTK_DATA or ~/nltk_data)"
        raise UserError(what, where=where, fix=fix) from error
    known: dict[str, list[str]] = {}

    def lexicon(word: str) -> list[str]:
        if word not in known:
            known[word] = [] if len(word) < 3 or word in FUNCTION_WORDS else _of_best_sense(reader, word)
        return known[word]

    return lexicon


def _of_best_sense(reader: Any, word: str) -> list[str]:
    """The other words of the sense that `word` has most often in the texts WordNet counted; the first of equals."""
    senses = [
        (own.count(), synset)
        for synset in reader.synsets(word)
        if (own := next((each for each in synset.lemmas() if each.name() == word), None))
    ]
    if not senses:
        return []
    _, best = max(senses, key=lambda sense: sense[0])
    return [name.replace("_", " ") for name in best.lemma_names() if name.islower() and name != word]


def core_spans(text: str) -> list[Span]:
    """For each word where it begins and ends without the marks around it; (n, n) for one that is marks alone."""
    found = ((first, CORE.search(text, first, last)) for first, last in _spans(text))
    return [match.span() if match else (first, first) for first, match in found]


def chosen(many: int, key: int, rate: float) -> tuple[list[int], int]:
    """The numbers 0 to `many` - 1 in a keyed order, and how many of them make up `rate` (one at least)."""
    return _drawn(key, many), _share(many, rate)


def replaced(text: str, at: Sequence[Span], new: Mapping[int, str]) -> str:
    """`text` with the stretches whose numbers are in `new` replaced."""
    out, last = [], 0
    for number in sorted(new):
        first, end = at[number]
        out += [text[last:first], new[number]]
        last = end
    return "".join([*out, text[last:]])


def word_makers(how: Augmenting, lexicon: Lexicon | None = None) -> dict[str, Maker]:
    """Makers of the kinds that work on words and characters; synonyms come from `lexicon`, or WordNet."""
    changes: dict[str, Change] = {
        "swap": swap,
        "deletion": deletion,
        "crop": crop,
        "characters": characters,
        "counterfactual": other_gender,
    }
    if "synonyms" in how.kinds:
        known = lexicon or wordnet()
        changes["synonyms"] = lambda text, key, rate: synonyms(text, key, rate, known)

    def drawing(change: Change) -> Draw:
        return lambda texts, keys: [change(text, key, how.rate) for text, key in zip(texts, keys.tolist())]

    return {kind: maker(drawing(changes[kind]), kind, how) for kind in how.kinds if kind in changes}


def maker(draw: Draw, kind: str, how: Augmenting) -> Maker:
    """Draws for each text until it has `how.copies` new ones, or TRIES more draws than that are spent.

    `draw` takes texts and their keys, (n,) uint64, and gives a new text for each, or None where there never is one.
    The keys are a function of seed, kind, text and number of the draw, so no text changes what another one gives.
    """

    def make(texts: Sequence[str]) -> list[Made]:
        own = np.array([text_hash(text) for text in texts], np.uint64)
        found: list[dict[int, str]] = [{} for _ in texts]
        why = [SAME] * len(texts)
        for number in range(how.copies + TRIES):
            left = [n for n in range(len(texts)) if len(found[n]) < how.copies and why[n] == SAME]
            if not left:
                break
            keys = keyed.key(how.seed, KINDS.index(kind), own[left], number)
            for place, new in zip(left, draw([texts[n] for n in left], keys)):
                if new is None:
                    why[place] = NOTHING[kind]
                elif new.strip() and (plain := text_hash(new)) != own[place]:
                    found[place].setdefault(plain, new)
        return [Made(tuple(new.values()), (reason,) * (how.copies - len(new))) for new, reason in zip(found, why)]

    return make


def _spans(text: str) -> list[Span]:
    return [match.span() for match in WORD.finditer(text)]


def _share(many: int, rate: float) -> int:
    return max(1, round(rate * many))


def _drawn(key: int, many: int) -> list[int]:
    """0 to many - 1 in a keyed order."""
    return np.argsort(keyed.key(key, np.arange(many)), kind="stable").tolist()


def _choice(key: int, many: int) -> int:
    """One of 0 to many - 1."""
    return int(keyed.uniform(keyed.key(key))[0] * many)


def _by_word(text: str, key: int, rate: float, change: Callable[[str, int], str | None]) -> str | None:
    """The text with its words changed one by one in a keyed order, until there are enough."""
    at = core_spans(text)
    order, enough = chosen(len(at), key, rate)
    new: dict[int, str] = {}
    for number in order:
        if len(new) == enough:
            break
        core = text[slice(*at[number])]
        other = change(core, number) if core else None
        if other is not None:
            new[number] = other
    return replaced(text, at, new) if new else None


def _slip(word: str, key: int) -> str | None:
    """The word with one slip inside; None for one that is short or not of letters alone."""
    if len(word) < SHORTEST or not word.isalpha():
        return None
    inner = range(1, len(word) - 1)
    kinds = [
        [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in inner[:-1]],
        [word[:i] + word[i + 1 :] for i in inner],
        [word[: i + 1] + word[i:] for i in inner],
        [
            word[:i] + like(word[i], beside) + word[i + 1 :]
            for i in inner
            for beside in NEIGHBOURS.get(word[i].lower(), "")
        ],
    ]
    differ = [[new for new in slips if new.casefold() != word.casefold()] for slips in kinds]
    able = [slips for slips in differ if slips]
    slips = able[_choice(int(keyed.key(key, 0)[0]), len(able))]
    return slips[_choice(int(keyed.key(key, 1)[0]), len(slips))]
