"""The recipes: frozen dataclasses that say everything about a run (schema.py: TOML in and out). Imports no torch.

A field's comment is its help text on the command line. `None` means "derived from the model, the data or the
machine"; what it was derived to is written into the output's `recipe.toml`, so that file repeats the run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Data = str | Path | Sequence[str | Mapping[str, Any]]
else:
    # On the command line and in TOML data is always a path; in Python, lists of texts or dicts as well.
    Data = str
BadRows = Literal["fail", "skip", "replace"]
Precision = Literal["bf16", "fp32"]
Schedule = Literal["linear", "cosine", "constant", "wsd"]
Similarity = Literal["cosine", "dot"]
Merge = Literal["none", "auto"]
Track = Literal["none", "tensorboard"]
Weights = Literal["none", "balanced"]
Pooling = Literal["cls", "mean"]
EPOCHS, BATCH = 1.0, 32  # where a loop names none


@dataclass(frozen=True, kw_only=True)
class Loop:
    """How long, how fast, how careful: the part that every objective shares."""

    # Seed of the data order, the masks, the dropout and every fresh weight.
    seed: int = 0
    # Peak learning rate of AdamW (derived: what the task and a fresh head call for).
    lr: float | None = None
    # Passes over the training data (derived: 1; on labels, scores and tags 3).
    epochs: float | None = None
    # Stop after this many optimizer steps, if that comes before the epochs end.
    max_steps: int | None = None
    # Stop after this many minutes of training (the schedule is not stretched to fit).
    minutes: float | None = None
    # Rows per optimizer step (derived: 32; a run on text or pairs 64).
    batch: int | None = None
    # Tokens per forward pass; a batch is split to fit (derived from free memory).
    max_tokens: int | None = None
    # Arithmetic of the model: bf16 where the hardware has it; weights and optimizer stay fp32.
    precision: Precision | None = None
    # Compile the layers, which takes half a minute (derived: on a GPU, for a thousand steps and more).
    compile: bool | None = None
    # Shape of the learning rate after the warm-up.
    schedule: Schedule = "linear"
    # Warm-up: below 1 a fraction of the steps, else steps.
    warmup: float = 0.05
    # AdamW's weight decay (none on biases and norms).
    weight_decay: float = 0.01
    # Each layer learns so many times as fast as the one above it, the embeddings slowest; 1: all at one rate.
    layer_decay: float = 1.0
    # Gradients are scaled down to this norm.
    clip: float = 1.0
    # Score the dev rows every so many steps (derived: about ten times a run).
    eval_steps: int | None = None
    # Stop after this many scorings without a better one.
    patience: int | None = None
    # What "better" means: the dev measure that picks the best checkpoint and stops early (derived from the task).
    measure: str | None = None
    # Write a checkpoint every so many steps (None: by the clock, every half a minute or fiftieth of the time).
    checkpoint_steps: int | None = None
    # Log the training loss every so many steps (derived: at most about 1,000 lines).
    log_steps: int | None = None
    # Write the log for a tracker too: tensorboard, or none.
    track: Track = "none"


@dataclass(frozen=True, kw_only=True)
class Past:
    """The run that a training goes on from."""

    # Folder of a finished run: start at its model, with its settings, and do not forget what it learned.
    continue_from: str | None = None
    # That run's training rows to train on again, as a share of the new ones.
    replay: float = 0.5
    # sha256 of that run's weights (derived); a recipe that says it goes on from no others.
    weights_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class MLM:
    """Masked language modelling on raw lines: the encoder learns the language of your text."""

    # The text: .txt, .jsonl, .csv, .tsv, .parquet (also .gz, .zst), a folder of them; in Python also a list.
    train: Data = ""
    # Text to score on; without it, whole documents are held out of the training text.
    dev: Data | None = None
    # Model folder or hub name; with --scratch: bert, modernbert or a config.json (default all-MiniLM-L6-v2 or bert).
    model: str | None = None
    # Which column is the text: text=NAME.
    columns: str | None = None
    # Rows that are not valid UTF-8 text: stop, leave them out, or mend them with U+FFFD.
    bad_rows: BadRows = "fail"
    # Tokens per row; longer lines are chunked, never cut (derived from the model).
    max_length: int | None = None
    # Tokenise lines when a batch takes them, not before training (derived: for more than 500 MB of text).
    on_the_fly: bool | None = None
    # Share of tokens masked in training (derived: 0.15, ModernBERT 0.30); scoring always masks 0.15.
    mask_rate: float | None = None
    # Mask whole words instead of single tokens.
    whole_words: bool = False
    # Rows held out for scoring, at most a tenth of the data.
    dev_rows: int = 2000
    # New vocabulary: this many words of the text that shatter into pieces become tokens of their own.
    add_words: int = 0
    # Steps in which a fresh head is trained alone, the encoder frozen (derived; 0 where the model has a head).
    head_steps: int | None = None
    # Start from no weights at all: train a WordPiece tokenizer and a small model.
    scratch: bool = False
    # Vocabulary of the tokenizer that --scratch trains.
    vocab_size: int = 8000
    # The run before.
    past: Past = field(default_factory=Past)
    # The shared part.
    loop: Loop = field(default_factory=Loop)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The loss of `Contrastive`."""

    # The loss: MultipleNegativesRankingLoss, or another of sentence-transformers by its name.
    loss: str = "MultipleNegativesRankingLoss"
    # Factor on the similarities, 1 / temperature (derived: 20 for cosine, 1 for dot).
    scale: float | None = None
    # How vectors are compared (derived from the model).
    similarity: Similarity | None = None
    # Let each positive also find its anchor among all anchors of the batch.
    symmetric: bool = False
    # Matryoshka: prefixes of the vectors that must work on their own, such as 384 256 128 64.
    dims: tuple[int, ...] = ()
    # A model that masks likely false negatives (GIST); "base" takes the model as it was before training.
    guide: str | None = None
    # A candidate that the guide finds nearer than the positive less this margin is no negative.
    guide_margin: float = 0.0
    # Let rows that share an anchor or a positive stand in one batch (they are masked, never negatives).
    duplicates: bool = False
    # Fill batches with positives of like length, so that length tells no negative of the batch from the positive.
    like_lengths: bool = False
    # Weight of the covariance of vectors and text length in the loss; above 0 length is also erased from the result.
    length_penalty: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Contrastive:
    """Pairs, triplets or any number of negatives: anchors come to lie near their positives."""

    # Pairs: .jsonl, .csv, .tsv, .parquet, a BEIR folder, hub:NAME; in Python also a list of dicts.
    train: Data = ""
    # Pairs or a BEIR folder to score on; without it, whole clusters of pairs are held out.
    dev: Data | None = None
    # Model folder or hub name (default all-MiniLM-L6-v2).
    model: str | None = None
    # Which column is which: anchor=question,positive=context.
    columns: str | None = None
    # Rows that cannot be used: stop, leave them out, or mend them with U+FFFD.
    bad_rows: BadRows = "fail"
    # Tokens of a text that are read; longer texts are cut, and counted (derived from the model).
    max_length: int | None = None
    # Tokens of a text that training reads: less is faster; scoring and the saved model read --max-length.
    train_length: int | None = None
    # What is put before anchors (derived: the model's own query prompt); saved with the model.
    query_prompt: str | None = None
    # What is put before positives and negatives (derived: the model's own document prompt).
    document_prompt: str | None = None
    # Pairs held out for scoring, at most a tenth of the data.
    dev_rows: int = 1000
    # Texts to search in when scoring: the right ones, filled up with others to this number.
    dev_corpus: int = 2000
    # Let anchors of the dev data stand in the training data too.
    allow_leaks: bool = False
    # Average with the base at the end, with the coefficient that is best on dev: auto or none.
    merge: Merge = "none"
    # The loss.
    ranking: Ranking = field(default_factory=Ranking)
    # The run before.
    past: Past = field(default_factory=Past)
    # The shared part.
    loop: Loop = field(default_factory=Loop)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Pairs of texts with a score: similarities come to follow the scores."""

    # sentence1, sentence2, score: .jsonl, .csv, .tsv, .parquet, hub:NAME; in Python also a list of dicts.
    train: Data = ""
    # Scored pairs to score on; without it, whole clusters of pairs are held out.
    dev: Data | None = None
    # Model folder or hub name (default all-MiniLM-L6-v2).
    model: str | None = None
    # Which column is which: sentence1=left,sentence2=right,score=grade.
    columns: str | None = None
    # Rows that cannot be used: stop, leave them out, or mend them with U+FFFD.
    bad_rows: BadRows = "fail"
    # Tokens of a text that are read; longer texts are cut, and counted (derived from the model).
    max_length: int | None = None
    # The loss: CoSENTLoss, AnglELoss, CosineSimilarityLoss, or another of sentence-transformers by its name.
    loss: str = "CoSENTLoss"
    # Matryoshka: prefixes of the vectors that must work on their own, such as 384 256 128 64.
    dims: tuple[int, ...] = ()
    # Scores run from here (derived: -1 or 0) ...
    low: float | None = None
    # ... to here (derived: 1, 5, 10 or 100).
    high: float | None = None
    # Pairs without scores get pseudo-scores around this mean ...
    pseudo_mean: float = 0.9
    # ... with this standard deviation.
    pseudo_spread: float = 0.02
    # Weight of the covariance of vectors and text length in the loss; above 0 length is also erased from the result.
    length_penalty: float = 0.0
    # Pairs held out for scoring, at most a tenth of the data.
    dev_rows: int = 1000
    # Let pairs of the dev data stand in the training data too.
    allow_leaks: bool = False
    # Average with the base at the end, with the coefficient that is best on dev: auto or none.
    merge: Merge = "none"
    # The run before.
    past: Past = field(default_factory=Past)
    # The shared part.
    loop: Loop = field(default_factory=Loop)


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Labels: one class a text, or several."""

    # text, label (text_pair too): .csv, .tsv, .jsonl, .parquet, hub:NAME; in Python also a list of dicts.
    train: Data = ""
    # Labelled texts to score on; without it, a tenth of each class is held out.
    dev: Data | None = None
    # Model folder or hub name (default all-MiniLM-L6-v2).
    model: str | None = None
    # Which column is which: text=review,label=stars,text_pair=title.
    columns: str | None = None
    # Rows that cannot be used: stop, leave them out, or mend them with U+FFFD.
    bad_rows: BadRows = "fail"
    # Tokens of a text that are read; longer texts are cut, and counted (derived from the model).
    max_length: int | None = None
    # Train on so many rows at most, drawn by the seed (default: all).
    train_rows: int | None = None
    # Score on so many rows at most.
    dev_rows: int = 1000
    # Weigh classes by how rare they are: balanced, or none.
    weights: Weights = "none"
    # Share of each label that is spread over all classes (arXiv 1512.00567).
    label_smoothing: float = 0.0
    # What the head reads: cls (the first token) or mean (derived: what the model's vectors are made of).
    pooling: Pooling | None = None
    # Train the head alone, the encoder frozen (a linear probe).
    freeze: bool = False
    # Rank of LoRA adapters (arXiv 2106.09685), merged when saved; 0 tunes all weights.
    lora: int = 0
    # The run before.
    past: Past = field(default_factory=Past)
    # The shared part.
    loop: Loop = field(default_factory=Loop)


@dataclass(frozen=True, kw_only=True)
class Regress:
    """Scores: one number a text."""

    # text, score (text_pair too): .csv, .tsv, .jsonl, .parquet, hub:NAME; in Python also a list of dicts.
    train: Data = ""
    # Scored texts to score on; without it, a tenth is held out.
    dev: Data | None = None
    # Model folder or hub name (default all-MiniLM-L6-v2).
    model: str | None = None
    # Which column is which: text=essay,score=grade.
    columns: str | None = None
    # Rows that cannot be used: stop, leave them out, or mend them with U+FFFD.
    bad_rows: BadRows = "fail"
    # Tokens of a text that are read; longer texts are cut, and counted (derived from the model).
    max_length: int | None = None
    # Train on so many rows at most, drawn by the seed (default: all).
    train_rows: int | None = None
    # Score on so many rows at most.
    dev_rows: int = 1000
    # What the head reads: cls (the first token) or mean (derived: what the model's vectors are made of).
    pooling: Pooling | None = None
    # Train the head alone, the encoder frozen (a linear probe).
    freeze: bool = False
    # Rank of LoRA adapters (arXiv 2106.09685), merged when saved; 0 tunes all weights.
    lora: int = 0
    # The run before.
    past: Past = field(default_factory=Past)
    # The shared part.
    loop: Loop = field(default_factory=Loop)


@dataclass(frozen=True, kw_only=True)
class Tag:
    """Tags: one for each word of a sentence, such as named entities."""

    # CoNLL files (a word and its tag a line, a blank line between sentences), or rows of tokens and tags.
    train: Data = ""
    # Tagged sentences to score on; without it, a tenth is held out.
    dev: Data | None = None
    # Model folder or hub name (default all-MiniLM-L6-v2).
    model: str | None = None
    # Which column is which: tokens=words,tags=ner_tags.
    columns: str | None = None
    # Rows that cannot be used: stop, leave them out, or mend them with U+FFFD.
    bad_rows: BadRows = "fail"
    # Tokens of a row; longer sentences are chunked between words, no tag is lost (derived from the model).
    max_length: int | None = None
    # Train on so many sentences at most, drawn by the seed (default: all).
    train_rows: int | None = None
    # Score on so many sentences at most.
    dev_rows: int = 1000
    # Weigh tags by how rare they are: balanced, or none.
    weights: Weights = "none"
    # Share of each tag that is spread over all tags (arXiv 1512.00567).
    label_smoothing: float = 0.0
    # Train the head alone, the encoder frozen (a linear probe).
    freeze: bool = False
    # Rank of LoRA adapters (arXiv 2106.09685), merged when saved; 0 tunes all weights.
    lora: int = 0
    # The run before.
    past: Past = field(default_factory=Past)
    # The shared part.
    loop: Loop = field(default_factory=Loop)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Raw text, pairs or labels in, a verdict out: clean, split, tune, average, judge."""

    # Raw text (one text a line, a blank line between documents), pairs, a BEIR folder; or texts with labels or scores,
    # sentences with tags.
    data: Data = ""
    # Learn the column of labels, scores or tags (derived: where there is one).
    labels: bool | None = None
    # Real queries to judge on: pairs of a query and its passage, or BEIR folder[:split]; fifty are a beginning.
    queries: Data | None = None
    # Model folder or hub name (default all-MiniLM-L6-v2).
    model: str | None = None
    # Which column is which: text=body; anchor=question,positive=context; text=review,label=stars.
    columns: str | None = None
    # Rows that cannot be used: stop, leave them out, or mend them with U+FFFD.
    bad_rows: BadRows = "fail"
    # Learn the language of the text first (derived: where the model has its masked-language head).
    adapt: bool | None = None
    # Raw text: pairs of each kind that a document gives at most.
    pairs: int = 2
    # Pairs to train on at most.
    most_pairs: int = 20_000
    # Mined hard negatives for each pair.
    negatives: int = 0
    # Matryoshka: prefixes of the vectors that must work on their own, such as 384 256 128 64.
    dims: tuple[int, ...] = ()
    # Queries of each kind (or rows with labels) to judge on at most, and as many again to choose on.
    test_rows: int = 500
    # Texts to search in when judging: the right ones, filled up with others to this number.
    test_corpus: int = 5000
    # The shared part.
    loop: Loop = field(default_factory=Loop)


RECIPES: dict[str, type] = {
    "mlm": MLM, "contrastive": Contrastive, "scored": Scored, "classify": Classify, "regress": Regress, "tag": Tag,
    "run": Run,
}  # fmt: skip


def task_of(recipe: Any) -> str:
    """The task's name of a recipe, the word after `embedtune fit`."""
    return next(name for name, kind in RECIPES.items() if isinstance(recipe, kind))


def usual(recipe: Any) -> Loop:
    """The loop of a recipe with the epochs and the batch that its task usually has, where it says none."""
    loop: Loop = recipe.loop
    epochs = 3.0 if isinstance(recipe, Classify | Regress | Tag) else EPOCHS
    return replace(loop, epochs=loop.epochs or epochs, batch=loop.batch or (64 if isinstance(recipe, Run) else BATCH))


def length_penalty(recipe: Any) -> float:
    """The weight of the penalty on length; 0 for recipes that have none."""
    return float(getattr(getattr(recipe, "ranking", recipe), "length_penalty", 0.0))
