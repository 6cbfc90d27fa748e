"""From a recipe to an objective: sentences with a tag for each word, and a stock head to tell them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import softmax
from torch import Tensor

from embedtune import files
from embedtune.data.columns import parse_columns
from embedtune.data.divide import text_groups
from embedtune.data.read import Counts
from embedtune.data.tags import Tagged, check_tags, drop_invalid, read_tagged, scheme_of, to_bio
from embedtune.data.tokens import Tokens
from embedtune.data.words import WordRows, word_rows
from embedtune.encoder import heads, load
from embedtune.encoder.load import DEFAULT, Loaded
from embedtune.errors import UserError, short_list
from embedtune.fit import past, probe, ranks
from embedtune.fit.objectives.heads import HeadObjective
from embedtune.fit.objectives.labelled import (
    FEWEST,
    HeadDev,
    draw,
    held_out,
    make_ready,
    model_name,
    row_length,
    say_leaks,
    start_at_probe,
)
from embedtune.fit.past import Known, Sides
from embedtune.fit.prepared import Prepared, data_profile, identity, name_of, rows_lost, token_profile
from embedtune.recipes import Tag

MEASURES = ["F1", "precision", "recall", "accuracy"]
OUTSIDE = "O"


def prepare_tag(recipe: Tag, home: Path, note: Callable[[str], None]) -> Prepared:
    """Everything before the first step; `home` receives the folder of what is kept of each scoring."""
    ranks.first(lambda: files.make_folder(home / "data"))
    note(f"reading {name_of(recipe.train)}")
    sides = past.sides(recipe, _own_sides, KNOWN)
    train, dev, names, remarks = sides.train, sides.dev, sides.about, sides.remarks
    number = {tag: place for place, tag in enumerate(names)}
    loaded = heads.load_head(load.find(recipe.model or DEFAULT), heads.TOKEN, recipe.loop.seed, names)
    max_length = row_length(loaded, recipe.max_length)
    rows = word_rows([row.tokens for row in (*train, *dev)], loaded.tokenizer, max_length)
    remarks += _said(rows, max_length)
    gold = [np.array([number[tag] for tag in row.tags]) for row in (*train, *dev)]
    targets = _per_row(gold, rows)
    inside = rows.sentence < len(train)
    noise, rate = make_ready(loaded, recipe, remarks)
    loss, weight = _loss(targets, inside, names, recipe)
    objective = HeadObjective(
        loaded, _as_tokens(rows, loaded), np.flatnonzero(inside), loss, weight, noise,
        ["dev_loss", *(f"dev_{name}" for name in MEASURES)], rows.first, frozen=recipe.freeze,
    )  # fmt: skip
    note("fitting the linear probe, the baseline to beat")
    held = _dev(objective, rows, targets, names, dev, len(train), recipe)
    profile = {
        **data_profile(recipe.train, sides.counts, sides.dev_counts),
        "train_rows": len(train),
        "dev_rows": len(dev),
        "tags": len(names),
        "words": sum(map(len, gold)),
        "chunked_sentences": rows.chunked,
        **token_profile(objective.tokens.spread()),
    }
    resolved = dataclasses.replace(recipe, model=recipe.model or DEFAULT, max_length=max_length)
    same = identity(loaded.folder, loaded.tokenizer, sides.counts, sides.dev_counts) | sides.identity()
    return Prepared(
        objective, resolved, model_name(recipe), max_length, profile, same, remarks, rate, "dev_F1",
        loaded.folder, held, sides.old,
    )  # fmt: skip


def _own_sides(recipe: Tag, folder: Path | None) -> Sides:
    """The sentences that a recipe names, parted, and all their tags; of a head that is trained on, those it has."""
    train, dev, tally, remarks = _read(recipe)
    names = (OUTSIDE, *sorted({tag for row in train for tag in row.tags} - {OUTSIDE}))
    if recipe.past.continue_from is not None:
        known = heads.labels_of(Path(recipe.past.continue_from))[0]
        if unknown := [tag for tag in names if tag not in known]:
            what = f"has tags that the run that is continued does not have: {short_list(unknown)}"
            fix = "mend the tags; embedtune fit tag learns all tags anew"
            raise UserError(what, where=name_of(recipe.train), fix=fix)
        names = known
    return Sides(train, dev, *tally, remarks, names)


def _read(recipe: Tag) -> tuple[list[Tagged], list[Tagged], tuple[Counts, Counts | None], list[str]]:
    """Sentences to train and to score on, as BIO, the tallies of both, and what was lost on the way."""
    counts, dev_counts, columns = Counts(), None, parse_columns(recipe.columns)
    train = list(read_tagged(recipe.train, columns=columns, bad_rows=recipe.bad_rows, counts=counts))
    if len(train) < FEWEST:
        raise UserError(f"has {len(train)} sentence(s): too few to learn from", where=name_of(recipe.train))
    dev = None
    if recipe.dev is not None:
        dev_counts = Counts()
        dev = list(read_tagged(recipe.dev, columns=columns, bad_rows=recipe.bad_rows, counts=dev_counts))
    scheme = scheme_of(row.tags for row in (*train, *(dev or [])))
    if recipe.bad_rows == "skip":
        train = drop_invalid(train, scheme, counts)
        dev = drop_invalid(dev, scheme, dev_counts) if dev and dev_counts else dev
    check_tags(train, scheme, name_of(recipe.train))
    if dev:
        check_tags(dev, scheme, name_of(recipe.dev))
    remarks = [*rows_lost(counts), *(rows_lost(dev_counts) if dev_counts else [])]
    if scheme != "BIO":
        remarks.append(f"the tags are {scheme}: read as BIO, which the model and its scores speak")
    train = [dataclasses.replace(row, tags=to_bio(row.tags, scheme)) for row in train]
    if not any(tag != OUTSIDE for row in train for tag in row.tags):
        raise UserError("has no tag but O: there is nothing to learn", where=name_of(recipe.train))
    if dev is None:
        train, dev = _hold_out(train, recipe, remarks)
    else:
        dev = [dataclasses.replace(row, tags=to_bio(row.tags, scheme)) for row in dev]
        known = {tag for row in train for tag in row.tags} | {OUTSIDE}
        unknown = [f"row {row.number:,}: {tag}" for row in dev for tag in row.tags if tag not in known]
        if unknown:
            what = f"{len(unknown):,} tags of the dev data are not in the training data"
            raise UserError(
                what, where=name_of(recipe.dev), details=[short_list(unknown)], fix="mend the tags, or --dev"
            )
    some, scored = draw(train, recipe.train_rows, recipe.loop.seed), draw(dev, recipe.dev_rows, recipe.loop.seed)
    for word, used, there in (("trained", some, train), ("scored", scored, dev)):
        if len(used) < len(there):
            remarks.append(f"{word} on {len(used):,} of {len(there):,} sentences, drawn by the seed")
    if len(scored) < 2:
        raise UserError(f"{len(scored)} sentence(s) to score on: an interval needs at least two", where="--dev")
    say_leaks([" ".join(row.tokens) for row in some], [" ".join(row.tokens) for row in scored], remarks)
    return some, scored, (counts, dev_counts), remarks


def _sentence(row: Tagged) -> str:
    return " ".join(row.tokens)


KNOWN = Known(key=_sentence, held=_sentence)


def _hold_out(rows: list[Tagged], recipe: Tag, remarks: list[str]) -> tuple[list[Tagged], list[Tagged]]:
    """A tenth at most, with about as many sentences that have an entity as the rest."""
    groups = text_groups([" ".join(row.tokens) for row in rows])
    has = np.array([any(tag != OUTSIDE for tag in row.tags) for row in rows], int)
    held = held_out(has, groups, min(recipe.dev_rows, len(rows) // 10) / len(rows), recipe.loop.seed)
    remarks.append(f"held out {held.sum():,} of {len(rows):,} sentences, near-duplicates together")
    return [row for row, h in zip(rows, held) if not h], [row for row, h in zip(rows, held) if h]


def _said(rows: WordRows, max_length: int) -> list[str]:
    said = []
    if rows.chunked:
        said.append(f"{rows.chunked:,} sentences longer than {max_length} tokens were chunked between words, none cut")
    if rows.unknown:
        said.append(f"{rows.unknown:,} words of which the tokenizer keeps nothing stand as its unknown token")
    if rows.cut:
        said.append(f"{rows.cut:,} words of more pieces than a row has room for keep their first ones")
    return said


def _per_row(gold: Sequence[np.ndarray], rows: WordRows) -> list[np.ndarray]:
    """The tag numbers of each row's words."""
    out, place, before = [], 0, -1
    for owner, first in zip(rows.sentence.tolist(), rows.first, strict=True):
        place = place if owner == before else 0
        out.append(gold[owner][place : place + len(first)])
        place, before = place + len(first), owner
    return out


def _as_tokens(rows: WordRows, loaded: Loaded) -> Tokens:
    """The rows in the form that training reads; tagged data fits into memory."""
    ends = np.cumsum([len(row) for row in rows.rows])
    nothing = np.zeros(len(ends), np.int64)
    affix = len(rows.rows[0]) and loaded.tokenizer.num_special_tokens_to_add()
    return Tokens(np.concatenate(rows.rows), ends, rows.sentence, nothing, nothing, affix, len(ends), rows.chunked)


def _loss(
    targets: list[np.ndarray], inside: np.ndarray, names: Sequence[str], recipe: Tag
) -> tuple[Callable[[Tensor, np.ndarray], Tensor], Callable[[np.ndarray], float]]:
    """The sum of the words' cross-entropies, and the weight that makes the batch's mean of it."""
    sizes = np.bincount(np.concatenate([t for t, i in zip(targets, inside) if i]), minlength=len(names))
    balanced = recipe.weights == "balanced"
    share = sizes.sum() / (len(names) * np.maximum(sizes, 1)) if balanced else np.ones(len(names))
    weights = torch.tensor(share, dtype=torch.float32)

    def loss(logits: Tensor, rows: np.ndarray) -> Tensor:
        wanted = torch.from_numpy(np.concatenate([targets[row] for row in rows])).to(logits.device)
        return F.cross_entropy(
            logits, wanted, weights.to(logits.device), reduction="sum", label_smoothing=recipe.label_smoothing
        )

    return loss, lambda rows: float(sum(share[targets[row]].sum() for row in rows))


def _dev(
    objective: HeadObjective, rows: WordRows, targets: list[np.ndarray], names: tuple[str, ...], dev: list[Tagged],
    first: int, recipe: Tag,
) -> HeadDev:  # fmt: skip
    """What the model is scored on, with the baselines: no entity at all, and a linear probe on word vectors."""
    mine = np.flatnonzero(rows.sentence >= first)
    sentence = rows.sentence[mine] - first

    def join(logits: list[np.ndarray]) -> list[np.ndarray]:
        """Logits of rows to those of sentences, in order."""
        parts: list[list[np.ndarray]] = [[] for _ in dev]
        for owner, part in zip(sentence.tolist(), logits, strict=True):
            parts[owner].append(part)
        return [np.concatenate(part) for part in parts]

    some = objective.train[probe.some(len(objective.train), recipe.loop.seed)]
    fewer = some[np.cumsum([len(targets[row]) for row in some]) <= probe.MOST]
    fewer = fewer if len(fewer) else some[:1]
    labels = np.concatenate([targets[row] for row in fewer])

    layer = heads.fresh_layer(objective.loaded)
    seen, read = objective.features(fewer, layer)
    weights, biases = linear = probe.logistic(seen, labels, len(names), recipe.loop.seed)
    flat = softmax(objective.features(mine)[0] @ weights.T + biases, axis=1)
    if layer is not None:  # most read the hidden states as they are, which the probe has been fitted on already
        same = np.array_equal(seen, read)
        start_at_probe(layer, linear if same else probe.logistic(read, labels, len(names), recipe.loop.seed))
    probed = join(np.split(flat, np.cumsum([len(targets[row]) for row in mine])[:-1]))
    shares = np.bincount(np.concatenate([targets[row] for row in objective.train]), minlength=len(names))
    nothing = [np.tile(shares / shares.sum(), (len(row.tags), 1)) for row in dev]
    gold = [list(row.tags) for row in dev]
    items = tuple(f"{Path(row.file).name}:{row.number}" for row in dev)
    return HeadDev(mine, gold, items, names, False, {"most common tag": nothing, "linear probe": probed}, join)
