"""New texts by a model: words it guesses, there and back between two languages, paraphrases, a chat model's rewrites.

Models are sampled by keyed noise (the token with the highest logit plus Gumbel noise is a sample of the softmax), so a
new text is a function of its text, the seed and the model, whatever else is in the batch.
"""

from __future__ import annotations

import re
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from embedtune import keyed
from embedtune.data.augment import Augmenting, Made, Maker, Span, chosen, core_spans, maker, replaced
from embedtune.data.clean import text_hash
from embedtune.data.counterfactual import like
from embedtune.encoder import load
from embedtune.encoder.calls import Note
from embedtune.encoder.device import pick_device
from embedtune.encoder.encode import Encoder
from embedtune.encoder.load import Loaded
from embedtune.encoder.vocabulary import continuations
from embedtune.enrich.ask import Bill, Chat, ask, in_json
from embedtune.errors import UserError
from embedtune.nearest import unit

TOP = 10  # most likely tokens that are sampled from (arXiv 1808.09381)
MOST_TOKENS = 1024  # of texts, padding included, that a model takes at once
PROMPT = """\
Below is a text out of a data set whose texts have labels. Rewrite it in {count} different way(s). Keep its language, \
its meaning and its tone, so that whoever labels it would give it the label it has now; use other words and another \
order of them where you can, and add nothing. Answer with a JSON list of strings and nothing else.

Text:
{text}"""
NO_REWRITE, FEWER, REFUSED = "no rewrite in the answer", "fewer rewrites than asked for", "refused by the service"
MOVED = "its meaning is too far from the row's"


def contextual(name: str, how: Augmenting) -> Maker:
    """Words guessed by a masked language model, a folder or hub name, from what stands around them (arXiv 1805.06201).

    `how.rate` of the words (one at least) are masked at once; each is replaced by one of the TOP whole words, itself
    excepted, that the model thinks likeliest there. Words beyond what the model reads stay. Raises UserError for a
    model without a masked-language head.
    """
    folder = load.find(name)
    load.check_folder(folder)
    if not load.has_mlm_head(folder):
        what = "has no masked-language head, so it cannot guess words"
        raise UserError(what, where=name, fix="name a model that embedtune fit mlm made, or another masked one")
    loaded = load.load_mlm(folder, how.seed)
    loaded.model.eval().to(pick_device())
    words = _whole_words(loaded.tokenizer)
    return maker(lambda texts, keys: _guess(loaded, words, texts, keys, how.rate), "contextual", how)


class _Gaps(NamedTuple):
    """A text with masked words: its tokens, where the masks stand, and which word each of them is."""

    ids: np.ndarray
    masks: list[int]
    words: list[int]
    at: list[Span]


def _whole_words(tokenizer: Any) -> list[str]:
    """For each token the word it is; '' for a part of one, for marks and for special tokens."""
    parts = continuations(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    special = set(tokenizer.all_special_ids)
    words = [
        "" if part or number in special else tokenizer.decode([number]).strip() for number, part in enumerate(parts)
    ]
    return [word if word.isalpha() else "" for word in words]


@torch.no_grad()
def _guess(loaded: Loaded, words: list[str], texts: list[str], keys: np.ndarray, rate: float) -> list[str | None]:
    gaps = [_mask(loaded, text, key, rate) for text, key in zip(texts, keys.tolist())]
    known = torch.tensor([bool(word) for word in words])
    new: list[str | None] = [None] * len(texts)
    able = [number for number, each in enumerate(gaps) if each]
    for some in _batches(able, [len(each.ids) if each else 0 for each in gaps]):
        batch = [each for number in some if (each := gaps[number])]
        inputs = loaded.collate([each.ids for each in batch])
        logits = loaded.model(**inputs).logits.float().cpu()
        starts = np.cumsum([0] + [len(each.ids) for each in batch])
        for row, (number, each) in enumerate(zip(some, batch)):
            own = logits[row] if loaded.padded else logits[0, starts[row] :]
            # A model may have more rows than its tokenizer has tokens.
            scores = own[each.masks, : len(words)].masked_fill(~known, -torch.inf)
            new[number] = _fill(texts[number], each, scores, words, int(keys[number]))
    return new


def _mask(loaded: Loaded, text: str, key: int, rate: float) -> _Gaps | None:
    """The text with `rate` of its words masked, each by one token; None where no word of letters is within reach."""
    encoded = loaded.tokenizer(text, truncation=True, max_length=loaded.max_length, return_offsets_mapping=True)
    pieces = [_trim(text, *span) for span in encoded["offset_mapping"]]
    real = [n for n, (first, last) in enumerate(pieces) if first < last]
    starts, ends = [pieces[n][0] for n in real], [pieces[n][1] for n in real]
    at = core_spans(text)
    order, enough = chosen(len(at), key, rate)
    found: dict[int, list[int]] = {}  # the tokens of each masked word
    for word in order:
        first, last = at[word]
        inside = real[bisect_right(ends, first) : bisect_left(starts, last)]
        # Not a word that was cut off, nor one whose tokens hold more than it.
        if inside and (pieces[inside[0]][0], pieces[inside[-1]][1]) == at[word] and text[first:last].isalpha():
            found[word] = inside
        if len(found) == enough:
            break
    heads = {inside[0]: word for word, inside in found.items()}
    gone = {n for inside in found.values() for n in inside[1:]}
    kept = [n for n in range(len(pieces)) if n not in gone]
    mask = loaded.tokenizer.mask_token_id
    ids = np.array([mask if n in heads else encoded["input_ids"][n] for n in kept], np.int64)
    masks = [place for place, n in enumerate(kept) if n in heads]
    return _Gaps(ids, masks, [heads[kept[place]] for place in masks], at) if found else None


def _trim(text: str, first: int, last: int) -> Span:
    """A token's stretch of the text without blanks at its ends."""
    piece = text[first:last]
    return first + len(piece) - len(piece.lstrip()), last - len(piece) + len(piece.rstrip())


def _fill(text: str, gaps: _Gaps, scores: Tensor, words: list[str], key: int) -> str:
    """The text with a word sampled for each gap; `scores` (gaps, V) are -inf where a token is no word."""
    new = {}
    for place, row in zip(gaps.words, scores):
        old = text[slice(*gaps.at[place])]
        # A word may be in the vocabulary in several spellings.
        best = row.topk(min(len(row), TOP + 4))
        able = [
            (logit, token)
            for logit, token in zip(best.values.tolist(), best.indices.tolist())
            if logit > -np.inf and words[token].casefold() != old.casefold()
        ][:TOP]
        if able:
            logits, tokens = (np.array(side) for side in zip(*able))
            noise = _gumbel(keyed.key(key, place, tokens))
            new[place] = like(old, words[int(tokens[np.argmax(logits + noise)])])
    return replaced(text, gaps.at, new)


class Seq2Seq(NamedTuple):
    """A model that writes one text for another, its tokenizer, the tokens it reads, and what it wants before a text."""

    model: Any
    tokenizer: Any
    most_tokens: int
    prefix: str


def open_seq2seq(name: str, prefix: str = "") -> Seq2Seq:
    """An encoder-decoder model by its folder or hub name, from safetensors alone.

    Raises UserError where there is none, or it cannot be opened as one, or a package is missing for its tokenizer.
    """
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    load.quiet()
    folder = load.find(name)
    load.check_folder(folder)
    try:
        with warnings.catch_warnings():  # that a tokenizer would like one more package
            warnings.simplefilter("ignore")
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, info = AutoModelForSeq2SeqLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except ImportError as error:
        fix = "pip install sentencepiece"
        raise UserError(
            f"its tokenizer needs another package: {load.first_line(error)}", where=name, fix=fix
        ) from error
    except Exception as error:  # noqa: BLE001 - transformers raises many kinds; all mean the same to the user
        what = f"cannot be opened as a model that writes a text for a text: {load.first_line(error)}"
        raise UserError(
            what, where=name, fix="name a translation or paraphrase model (T5, BART, Marian ...)"
        ) from error
    if info["missing_keys"]:
        what = f"its weights do not fit its config: {len(info['missing_keys'])} missing"
        raise UserError(what, where=name, details=sorted(info["missing_keys"])[:3], fix="copy the folder again")
    if bad := next((key for key, weight in model.named_parameters() if not torch.isfinite(weight).all()), None):
        raise UserError(f"weight {bad} has NaN or infinite values", where=name)
    most = min(load.stated_length(folder, tokenizer), getattr(model.config, "max_position_embeddings", 10**6))
    return Seq2Seq(model.eval().to(pick_device()), tokenizer, most, prefix)


def rewritten(models: Sequence[Seq2Seq], kind: str, how: Augmenting) -> Maker:
    """Each text through the models in turn: a paraphraser, or two that translate there and back (arXiv 1511.06709).

    A text that a model cannot read to its end, and one that it does not bring to an end, is not used.
    """

    def draw(texts: list[str], keys: np.ndarray) -> list[str | None]:
        new: list[str | None] = list(texts)
        for step, model in enumerate(models):
            able = [number for number, text in enumerate(new) if text]
            written = _write(model, [str(new[number]) for number in able], keyed.key(keys[able], step))
            for number, text in zip(able, written):
                new[number] = text
        return new

    return maker(draw, kind, how)


@torch.no_grad()
def _write(writer: Seq2Seq, texts: list[str], keys: np.ndarray) -> list[str | None]:
    """What the model writes for each text: None where that is too long for it, '' where it comes to no end."""
    rows = [writer.tokenizer(writer.prefix + text)["input_ids"] for text in texts]
    new: list[str | None] = [None] * len(texts)
    lengths = [len(row) for row in rows]
    # Of its own length, so that no other text of the batch decides whether one comes to an end.
    room = [min(2 * length + 16, writer.most_tokens - 1) for length in lengths]
    able = sorted((n for n in range(len(rows)) if lengths[n] <= writer.most_tokens), key=lambda n: lengths[n])
    config = writer.model.generation_config
    ends = np.atleast_1d(config.eos_token_id if config.eos_token_id is not None else writer.tokenizer.eos_token_id)
    for some in _batches(able, lengths):
        padded = writer.tokenizer.pad({"input_ids": [rows[n] for n in some]}, return_tensors="pt").to(pick_device())
        out = writer.model.generate(
            input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], max_new_tokens=room[some[-1]],
            do_sample=False, num_beams=1, logits_processor=[_sampling(keys[some])],
        ).cpu()  # fmt: skip
        said = writer.tokenizer.batch_decode(out, skip_special_tokens=True)
        for number, row, text in zip(some, out.numpy(), said):
            # The first token starts every text, and an end at the last there is room for may have been forced.
            new[number] = text.strip() if np.isin(row[1 : room[number]], ends).any() else ""
    return new


def _sampling(keys: np.ndarray) -> Callable[[Tensor, Tensor], Tensor]:
    """For generate: leaves of the scores (B, V) one token a row, sampled from the TOP by the row's key."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        best = scores.topk(min(TOP, scores.shape[-1]))
        noise = _gumbel(keyed.key(keys[:, None], ids.shape[1], best.indices.cpu().numpy()))
        choice = (best.values + torch.from_numpy(noise).to(scores)).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, best.indices.gather(-1, choice), 0.0)

    return process


def chat_rewrites(
    chat: Chat, journal: Path, how: Augmenting, *, bill: Bill, prompt: str = PROMPT, note: Note = lambda text: None
) -> Maker:
    """Rewrites that a chat model is asked for, `how.copies` of each text at once; what it says is kept in `journal`.

    The seed has no part in it. `prompt` has {text}, and {count} if wanted. See `ask.ask` for what is raised.
    """

    def make(texts: Sequence[str]) -> list[Made]:
        # Not str.format: both the text and the prompt may hold braces.
        prompts = [prompt.replace("{count}", str(how.copies)).replace("{text}", text) for text in texts]
        answers = ask(prompts, chat, parse, journal, bill=bill, note=note)
        return [_made(text, a.texts, bool(a.refused), how.copies) for text, a in zip(texts, answers, strict=True)]

    return make


def _made(text: str, said: list[str], refused: bool, copies: int) -> Made:
    found: dict[int, str] = {}
    for new in said:
        if (plain := text_hash(new)) != text_hash(text):
            found.setdefault(plain, new)
    new_texts = tuple(found.values())[:copies]
    why = REFUSED if refused else FEWER if said else NO_REWRITE
    return Made(new_texts, (why,) * (copies - len(new_texts)))


def parse(text: str) -> list[str]:
    """The first list of strings in a model's answer; [] where there is none.

    Strings that are blank, or that no file can hold, are left out. Nothing but a list is taken: a word to the user
    ("Here you are:") must not end up in training data.
    """

    def strings(value: list[Any]) -> list[str] | None:
        if not value or not all(isinstance(each, str) for each in value):
            return None
        return [each.strip() for each in value if each.strip() and not re.search("[\0\ud800-\udfff]", each)]

    return in_json(text, "[", strings)


def guarded(make: Maker, encoder: Encoder, least: float) -> Maker:
    """A maker whose new texts have a cosine of `least` or more with their text, by an embedding model."""

    def kept(texts: Sequence[str]) -> list[Made]:
        made = make(texts)
        new = [text for each in made for text in each.texts]
        vectors = unit(encoder.encode([*texts, *new]).astype(np.float64))
        owner = np.repeat(np.arange(len(texts)), [len(each.texts) for each in made])
        near = iter(((vectors[owner] * vectors[len(texts) :]).sum(1) >= least).tolist())
        out = []
        for each in made:
            stay = [text for text in each.texts if next(near)]
            out.append(Made(tuple(stay), each.missing + (MOVED,) * (len(each.texts) - len(stay))))
        return out

    return kept


def _gumbel(keys: np.ndarray) -> np.ndarray:
    """Gumbel noise by keys: -log(-log(u)) with u in (0, 1)."""
    return -np.log(-np.log(np.clip(keyed.uniform(keys), 1e-300, 1 - 2.0**-53)))


def _batches(numbers: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """`numbers`, in order of length as they come, in runs of about MOST_TOKENS tokens, one of them at least."""
    some: list[int] = []
    longest = 0
    for number in numbers:
        longest = max(longest, lengths[number])
        if some and longest * (len(some) + 1) > MOST_TOKENS:
            yield some
            some, longest = [], lengths[number]
        some.append(number)
    if some:
        yield some
