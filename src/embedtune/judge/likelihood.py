"""CrowS-Pairs: which of two sentences, alike but for the group they speak of, is likelier to a masked language model?

Every token in question is masked by itself, and the log-probabilities of the tokens that were there make up the score.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from embedtune.data.read import DataLike, place, read_rows
from embedtune.encoder import load
from embedtune.encoder.device import pick_device
from embedtune.encoder.embed import batches
from embedtune.encoder.heads import only_rows
from embedtune.encoder.load import Loaded
from embedtune.errors import UserError, short_list
from embedtune.judge.score import Score, share

# shared: the sum over tokens that both sentences have (arXiv 2010.00133). changed: the mean over tokens that only one
# of them has (arXiv 2110.08527, as its code computes it); pairs where one sentence has none are left out.
Scoring = Literal["shared", "changed"]
COLUMNS = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
DIRECTIONS = ("stereo", "antistereo")
MOST_TOKENS = 4096  # a forward pass
DECIMALS = 3  # to which both published scripts round a sentence's score; equals count as no preference
FLAWS = (
    "CrowS-Pairs: many pairs do not test what they should (unclear stereotypes, groups or words that do not match, "
    "broken grammar; Blodgett et al. 2021, doi 10.18653/v1/2021.acl-long.81): take a share as a hint, and 50 % as no "
    "proof of fairness"
)


@dataclass(frozen=True)
class Pair:
    """Two sentences, of which `more` is the more stereotyped; `direction` says whom the writer meant to put down."""

    more: str
    less: str
    direction: str
    bias_type: str


@dataclass(frozen=True, eq=False)
class Likelihoods:
    """The scores of each pair's sentences (n,), NaN where a pair was left out, and what there is to say about it."""

    pairs: Sequence[Pair]
    scoring: Scoring
    more: np.ndarray
    less: np.ndarray
    remarks: tuple[str, ...]

    def scores(self) -> list[Score]:
        """The share of pairs whose more stereotyped sentence is likelier: all, by direction, by type of bias."""
        judged = ~np.isnan(self.more)
        hits = self.more > self.less
        parts = {"all": judged}
        for direction in DIRECTIONS:
            parts[direction] = judged & [pair.direction == direction for pair in self.pairs]
        for kind in sorted({pair.bias_type for pair in self.pairs}):
            parts[kind] = judged & [pair.bias_type == kind for pair in self.pairs]
        return [share(f"CrowS {self.scoring}: {name}", hits[part]) for name, part in parts.items() if part.sum() > 1]


def read_crows(data: DataLike) -> list[Pair]:
    """The pairs of a table with the public columns sent_more, sent_less, stereo_antistereo and bias_type.

    Raises one UserError for columns that are missing, another for all rows with an empty sentence or a direction that
    is neither stereo nor antistereo.
    """
    found, wrong = [], []
    for row in read_rows(data):
        if missing := [name for name in COLUMNS if name not in row.values]:
            what = f"has no column {short_list(missing)}; there are {short_list([*row.values], 8)}"
            raise UserError(what, where=row.file, fix=f"give a file with the columns {', '.join(COLUMNS)}")
        more, less, direction, kind = (str(row.values[name] or "").strip() for name in COLUMNS)
        if not (more and less and direction in DIRECTIONS):
            wrong.append(f"{place(row)}: {'a sentence is empty' if direction in DIRECTIONS else repr(direction)}")
        found.append(Pair(more, less, direction, kind))
    if wrong or len(found) < 2:
        what = f"{len(wrong):,} of {len(found):,} rows cannot be used" if wrong else "has fewer than two pairs"
        raise UserError(what, where=str(data), details=wrong[:3], fix="stereo_antistereo is stereo or antistereo")
    return found


def open_masked(name: str) -> Loaded:
    """A model with its masked-language head, ready to score. Raises UserError for a model without one."""
    folder = load.find(name)
    load.check_folder(folder)
    if not load.has_mlm_head(folder):
        what = "has no masked-language head, so it gives no likelihood of a sentence"
        raise UserError(what, where=name, fix="name a masked language model, or one that embedtune fit mlm made")
    loaded = load.load_mlm(folder, 0)
    loaded.model.eval().to(pick_device())
    return loaded


def judge_likelihood(loaded: Loaded, pairs: Sequence[Pair], scoring: Scoring = "shared") -> Likelihoods:
    """Score both sentences of each pair; pairs that the model cannot read whole are left out and counted.

    Raises UserError where no pair is left.
    """
    if scoring not in get_args(Scoring):
        raise ValueError(scoring)
    sides, places = zip(*(_places(loaded, pair, scoring) for pair in pairs))
    fits = np.array([max(map(len, pair)) <= loaded.max_length for pair in sides])
    told = np.array([all(len(each) for each in pair) for pair in places])
    use = np.flatnonzero(fits & told)
    if not len(use):
        what = f"none of the {len(pairs):,} pairs can be scored by their {scoring} tokens"
        raise UserError(
            what, where=str(loaded.folder), fix=f"give pairs of at most {loaded.max_length} tokens that differ"
        )
    found = np.full((len(pairs), 2), np.nan)
    rows, chosen = ([each[n][side] for n in use for side in (0, 1)] for each in (sides, places))
    sums = log_likelihoods(loaded, rows, chosen)
    found[use] = np.round([s.sum() if scoring == "shared" else s.mean() for s in sums], DECIMALS).reshape(-1, 2)
    remarks = [
        f"{many:,} pairs left out: {why}"
        for many, why in (
            (int((~fits).sum()), f"longer than the {loaded.max_length} tokens that the model reads"),
            (int((fits & ~told).sum()), f"a sentence has no {scoring} token"),
        )
        if many
    ]
    equal = int((found[use, 0] == found[use, 1]).sum())
    remarks += [f"{equal:,} pairs are equally likely, which counts as no preference"] if equal else []
    return Likelihoods(pairs, scoring, found[:, 0], found[:, 1], tuple(remarks))


@torch.no_grad()
def log_likelihoods(loaded: Loaded, rows: Sequence[np.ndarray], places: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each token row the log-probability of the token at each of its `places`, that one alone being masked."""
    owner = np.repeat(np.arange(len(rows)), [len(each) for each in places])
    at = np.concatenate([*places, np.zeros(0)]).astype(np.int64)
    lengths = np.array([len(row) for row in rows])[owner]
    order = np.argsort(-lengths, kind="stable")
    found = np.zeros(len(at))
    for some in batches(lengths[order], MOST_TOKENS, padded=loaded.padded is not None):
        jobs = order[some]
        masked = [rows[owner[job]].copy() for job in jobs]
        for row, job in zip(masked, jobs):
            row[at[job]] = loaded.tokenizer.mask_token_id
        inputs = loaded.collate(masked)
        sizes = lengths[jobs]
        starts = np.cumsum(sizes) - sizes if loaded.padded is None else np.arange(len(jobs)) * int(sizes.max())
        index = torch.from_numpy(starts + at[jobs]).to(inputs["input_ids"].device)
        with only_rows(loaded.model.base_model, index):
            logits = loaded.model(**inputs).logits.reshape(len(jobs), -1).float()
        truth = torch.tensor([int(rows[owner[job]][at[job]]) for job in jobs], device=logits.device)
        found[jobs] = torch.log_softmax(logits, -1).gather(1, truth[:, None])[:, 0].double().cpu().numpy()
    return np.split(found, np.cumsum([len(each) for each in places])[:-1])


def _places(loaded: Loaded, pair: Pair, scoring: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The token rows of both sentences, and where in each the tokens are that are shared, or changed."""
    # The published scripts match the sentence about the disadvantaged group first; difflib is not symmetric.
    texts = (pair.more, pair.less) if pair.direction == "stereo" else (pair.less, pair.more)
    encoded = [loaded.tokenizer(text, return_special_tokens_mask=True) for text in texts]
    rows = [np.array(each["input_ids"], np.int64) for each in encoded]
    matcher = difflib.SequenceMatcher(None, *(row.tolist() for row in rows))
    wanted: list[list[int]] = [[], []]
    for kind, *ends in matcher.get_opcodes():
        if (kind == "equal") == (scoring == "shared"):
            for side in (0, 1):
                wanted[side] += range(*ends[2 * side : 2 * side + 2])
    places = [
        np.array([n for n in some if not each["special_tokens_mask"][n]], np.int64)
        for some, each in zip(wanted, encoded)
    ]
    return (rows, places) if pair.direction == "stereo" else (rows[::-1], places[::-1])
