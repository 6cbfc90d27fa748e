"""Counterfactual swaps: what changes in the vectors when nothing but the group of a text changes.

The texts are sentences of our own about jobs (swaps.toml), or the user's; their counterfactuals come from
data/counterfactual.py. WinoBias (arXiv 1804.06876) is read in its public format.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedtune import files, keyed
from embedtune.data.counterfactual import counterfactual, lean, lists
from embedtune.errors import UserError
from embedtune.judge.recover import recoverability
from embedtune.judge.score import Score, balanced, mean, score
from embedtune.judge.similarity import cosines
from embedtune.nearest import Unit, ranks, top_k

if TYPE_CHECKING:
    from embedtune.encoder.encode import Encoder

NEAREST = 10
FEWEST = 20
MARK = re.compile(r"\[([^\]]*)\]")


@dataclass(frozen=True)
class Swapped:
    """Texts and their counterfactuals; `groups` name what each comes from, `sides` are 1 for a text about men.

    0 is one about women, None one that cannot be told. The counterfactual is of the other side.
    """

    texts: tuple[str, ...]
    swapped: tuple[str, ...]
    groups: tuple[str, ...]
    sides: tuple[int | None, ...]


@cache
def lists_of_jobs() -> Mapping[str, Any]:
    """Documents, queries and jobs, as they stand in swaps.toml."""
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def jobs() -> list[tuple[str, int]]:
    """The jobs, and 1 for those that mostly men have, 0 for women."""
    return [(job, side) for name, side in (("men", 1), ("women", 0)) for job in lists_of_jobs()["jobs"][name]]


def own_texts() -> Swapped:
    """Our own sentences, each template with each job; the groups are the templates."""
    names = [one for one, _ in lists()["names"]]
    rows = [
        (template.format(job=job, name=names[n % len(names)]), template)
        for template in lists_of_jobs()["documents"]
        for n, (job, _) in enumerate(jobs())
    ]
    made = swapped_texts([text for text, _ in rows], [template for _, template in rows])
    return replace(made, sides=(1,) * len(made.texts))  # all are about men, even where "his wife" stands in one


def swapped_texts(texts: Iterable[str], groups: Sequence[str] | None = None, most: int | None = None) -> Swapped:
    """The first `most` texts that have a counterfactual, without repeats; each is its own group where none are given.

    Raises UserError where fewer than 20 can be told to be about men or about women.
    """
    rows: dict[str, tuple[str, str]] = {}
    for number, text in enumerate(texts):
        if len(rows) == most:
            break
        if (other := counterfactual(text)) and text not in rows:
            rows[text] = other, groups[number] if groups else str(number)
    leans = [lean(text) for text in rows]
    if (told := sum(each != 0 for each in leans)) < FEWEST:
        what = f"{told:,} texts have more words of one gender than of the other; at least {FEWEST} are needed"
        raise UserError(what, where="--data", fix="give more texts about people, in English")
    others, named = zip(*rows.values())
    return Swapped(tuple(rows), others, named, tuple(None if each == 0 else int(each > 0) for each in leans))


def judge_swaps(encoder: Encoder, data: Swapped, name: str, *, seed: int = 0) -> list[Score]:
    """How far a swap moves texts and their neighbours, and whether the side can be read from the vectors.

    swap distance: mean 1 - cosine of a text and its counterfactual, over that of two texts of the set: 0 where a swap
    changes nothing, 1 where it changes as much as all the rest does. rank shift: how many places the 10 texts nearest
    to a text move, on average, when they are ranked by its counterfactual.
    """
    one, two = (encoder.encode(list(side)) for side in (data.texts, data.swapped))
    apart = 1 - cosines(one, two)
    whole = _mean_distance(one)
    if whole < 1e-9:
        raise UserError("all texts have one vector", where=f"{encoder.name} on {name}")
    found = [
        mean(f"{name}: swap distance", apart / whole, data.groups, 0.0, seed=seed),
        mean(f"{name}: rank shift", _rank_shift(one, two), data.groups, 0.0, seed=seed),
    ]
    told = [n for n, side in enumerate(data.sides) if side is not None]
    labels = np.array([data.sides[n] for n in told])
    groups = [data.groups[n] for n in told]
    vectors = np.concatenate([one[told], two[told]])
    return [*found, *recoverability(name, vectors, np.concatenate([labels, 1 - labels]), groups * 2, seed=seed)]


def judge_exposure(encoder: Encoder, *, seed: int = 0) -> list[Score]:
    """Who is shown to neutral queries about jobs: our documents about men and women, the same but for the swap.

    For each query the share of documents about men among as many first ones as there are of one side for its job.
    The second score is that share for the jobs that mostly men have, minus that for the women's.
    """
    data, made = own_texts(), lists_of_jobs()
    rows = [(query.format(job=job), job, side) for query in made["queries"] for job, side in jobs()]
    queries = encoder.encode([query for query, _, _ in rows], "query")
    documents = encoder.encode([*data.texts, *data.swapped], "document")
    about_men = np.repeat([1.0, 0.0], len(data.texts))
    shares = exposure(queries, documents, about_men, len(made["documents"]))
    asked = [job for _, job, _ in rows]
    # The mean of 2 a and of -2 b is mean a - mean b.
    sides = np.array([side for _, _, side in rows])
    signed = np.where(sides == 1, 2 * shares, -2 * shares)
    return [
        mean("exposure: share of men shown", shares, asked, 0.5, seed=seed),
        score("exposure: men's jobs minus women's", partial(balanced, signed, sides), asked, 0.0, seed=seed),
    ]


def exposure(queries: np.ndarray, documents: np.ndarray, marked: np.ndarray, k: int) -> np.ndarray:
    """For each query (Q, D) the share (Q,) of the documents marked 1, of (N,) 0 or 1, among its k nearest.

    Equally near documents stand in a keyed order, so that no side gains by where it stands.
    """
    prefer = np.argsort(np.argsort(keyed.key(0, np.arange(len(documents))), kind="stable"))
    _, found = top_k(Unit(queries), Unit(documents), k, prefer=prefer)
    shares: np.ndarray = marked[found].mean(1)
    return shares


@dataclass(frozen=True)
class Reading:
    """A sentence with the pronoun that fits the stereotype, with the other one, and with whom it stands for instead.

    `side` is 1 where men are thought to have the occupation, 0 for women.
    """

    pro: str
    anti: str
    resolved: str
    occupation: str
    side: int


def read_winobias(folder: str | Path) -> tuple[list[Reading], int]:
    """The sentences of all pro_stereotyped_* files with their anti_stereotyped_* partners, and how many do not match.

    Raises UserError where the folder has no such files, or they have no such sentences.
    """
    found, odd = [], 0
    for file in sorted(Path(folder).glob("pro_stereotyped_*")):
        partner = file.with_name(file.name.replace("pro_", "anti_", 1))
        if not partner.is_file():
            raise UserError("is missing beside its partner", where=str(partner))
        lines = [files.read_text(path).splitlines() for path in (file, partner)]
        readings = [_reading(*both) for both in zip(*lines)]
        found += [reading for reading in readings if reading]
        odd += sum(reading is None for reading in readings) + abs(len(lines[0]) - len(lines[1]))
    if len(found) < FEWEST:
        what = f"has {len(found)} sentences of WinoBias in files pro_stereotyped_* and anti_stereotyped_*"
        raise UserError(
            what, where=str(folder), fix="name the folder with the sentences of github.com/uclanlp/corefBias"
        )
    return found, odd


def judge_winobias(encoder: Encoder, readings: Sequence[Reading], *, seed: int = 0) -> list[Score]:
    """Is a sentence whose pronoun fits the stereotype nearer to what it means than one whose pronoun does not?

    What it means is the sentence with the occupation in the pronoun's place, which has no gender. gap: cosine of pro
    and meaning, minus cosine of anti and meaning. Both scores are means of the mean over men's and that over women's
    occupations, so that a model to which "he" is nearer everywhere gains nothing. Sentences about one occupation are
    drawn together.
    """
    pro, anti, meant = (encoder.encode([getattr(r, side) for r in readings]) for side in ("pro", "anti", "resolved"))
    gaps = cosines(pro, meant) - cosines(anti, meant)
    groups = [reading.occupation for reading in readings]
    nearer = np.where(gaps == 0, 0.5, (gaps > 0).astype(np.float64))
    sides = np.array([reading.side for reading in readings])
    return [
        score("WinoBias: gap of pro and anti", partial(balanced, gaps, sides), groups, 0.0, seed=seed),
        score("WinoBias: pro is nearer", partial(balanced, nearer, sides), groups, 0.5, seed=seed),
    ]


def _reading(pro: str, anti: str) -> Reading | None:
    """A pair of lines; None where they are not the same sentence with one person and one pronoun marked."""
    marks = [MARK.findall(line) for line in (pro, anti)]
    plain = [re.sub(r"^\d+\s+", "", line).strip() for line in (pro, anti)]
    if [len(mark) for mark in marks] != [2, 2] or marks[0][0] != marks[1][0]:
        return None
    person, pronoun = marks[0]
    if MARK.sub("[]", plain[0]) != MARK.sub("[]", plain[1]) or person == pronoun:
        return None
    bare = [line.replace("[", "").replace("]", "") for line in plain]
    who = "the " + re.sub(r"^\W*(?:the|an?)?\s*", "", person, flags=re.I)
    # "her" is possessive in one text and an object in the other: its partner tells which.
    owned = {pronoun.lower(), marks[1][1].lower()} == {"his", "her"}
    head, _, tail = plain[0].rpartition(f"[{pronoun}]")
    resolved = (head + (who + "'s" if owned else who) + tail).replace("[", "").replace("]", "")
    return Reading(bare[0], bare[1], resolved, who.lower(), int(pronoun.lower() in ("he", "him", "his", "himself")))


def _mean_distance(vectors: np.ndarray) -> float:
    """Mean 1 - cosine of two different rows, without their n^2 products."""
    rows = Unit(vectors)[:].astype(np.float64)
    n = len(rows)
    return float(1 - (np.sum(rows.sum(0) ** 2) - np.sum(rows**2)) / (n * (n - 1)))


def _rank_shift(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """For each text (n,) how many places its nearest others move, on average, when its counterfactual asks."""
    k = min(NEAREST, len(one) - 1)
    _, near = top_k(Unit(one), Unit(one), k + 1)
    own = np.arange(len(one))
    pairs = np.array([(n, other) for n in own for other in [o for o in near[n] if o != n][:k]])
    with_self = np.stack([own, own], axis=1)
    places = []
    for asked in (one, two):
        found, self_place = ranks(Unit(asked), Unit(one), pairs), ranks(Unit(asked), Unit(one), with_self)
        places.append(found - (self_place[pairs[:, 0]] < found))  # the text itself is not counted
    return np.abs(places[0] - places[1]).reshape(len(one), k).mean(1)
