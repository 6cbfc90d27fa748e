"""embedtune data augment: more training rows out of the ones that are there, with the same labels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedtune.commands.shape import Command, Output, Talk, table
from embedtune.errors import UserError
from embedtune.recipes import BadRows

if TYPE_CHECKING:
    from embedtune.data.augment import Augmenting, Maker
    from embedtune.data.augmented import Augmented
    from embedtune.enrich.ask import Bill

# What each kind that works by a model needs to be told.
NEEDS = {
    "contextual": ("model",),
    "back-translation": ("translate",),
    "paraphrase": ("paraphraser",),
    "llm": ("address", "llm_model"),
}
SHOWN = 100  # characters of an example


@dataclass(frozen=True)
class Augment:
    """More training rows: each with the label of the row it comes from, and a text that is changed a little.

    Only the text changes. Training rows only: never give it a dev or test file.
    """

    # Training rows: .jsonl, .csv, .tsv, .parquet, hub:NAME. Of a file with a column "split" the rows of train.
    data: str
    # Where to write the rows and the new ones: .jsonl, .csv, .tsv or .parquet.
    out: str
    # How texts change: swap, deletion, crop, characters, synonyms, counterfactual, contextual, back-translation,
    # paraphrase, llm.
    kinds: tuple[str, ...] = ("swap", "deletion")
    # New rows of each kind that a row gives at most.
    copies: int = 2
    # Share of the words that swap, deletion, crop, characters, synonyms and contextual change (one word at least).
    rate: float = 0.1
    # Change the second text (text_pair) as well.
    pair: bool = False
    # Write the new rows without the ones they come from.
    only_new: bool = False
    # Another seed gives other texts.
    seed: int = 0
    # For contextual: a masked language model, a folder (of fit mlm, say) or a hub name.
    model: str | None = None
    # For back-translation: two models, there and back; folders or hub names.
    translate: tuple[str, str] | None = None
    # For paraphrase: a model that writes a text for a text, a folder or a hub name.
    paraphraser: str | None = None
    # What the paraphraser wants before each text, "paraphrase: " for example.
    prefix: str = ""
    # For llm: an OpenAI-compatible address, such as http://localhost:8000/v1 (its key in OPENAI_API_KEY).
    address: str | None = None
    # For llm: the model's name there.
    llm_model: str | None = None
    # For llm: what a million tokens read and a million written cost, for the count of the cost.
    prices: tuple[float, float] | None = None
    # Refuse new texts that an embedding model finds far from the text they come from.
    guard: bool = False
    # The embedding model that guards: a folder, a hub name, openai:MODEL.
    guard_model: str = "all-MiniLM-L6-v2"
    # Cosine below which a new text is far.
    guard_least: float = 0.7
    # Which column is which: text=body, or text=question,text_pair=context.
    columns: str | None = None
    # Rows that cannot be used: stop, leave them out, or mend them with U+FFFD.
    bad_rows: BadRows = "fail"
    # Replace a file of that name.
    force: bool = False
    # Print the result as JSON.
    json: bool = False


def augment(command: Augment, talk: Talk) -> Output:
    """Augment a file; all that is wrong with what was asked for is said at once, before a model is opened."""
    from embedtune.data.augment import Augmenting
    from embedtune.data.augmented import augment as grow
    from embedtune.data.augmented import check_out, read_sources
    from embedtune.data.columns import parse_columns
    from embedtune.data.read import Counts
    from embedtune.enrich.ask import Bill

    how = Augmenting(kinds=command.kinds, copies=command.copies, rate=command.rate, seed=command.seed,
                     pair=command.pair, only_new=command.only_new)  # fmt: skip
    problems, counts = [*how.problems(), *_problems(command)], Counts()
    try:
        check_out(command.data, command.out, command.force)
        sources = read_sources(command.data, columns=parse_columns(command.columns), pair=command.pair,
                               bad_rows=command.bad_rows, counts=counts)  # fmt: skip
    except UserError as error:
        if not problems:
            raise
        problems += str(error).splitlines()
    if problems:
        raise UserError("cannot augment with these settings", details=problems)
    bill = Bill(command.prices)
    found = grow(sources, command.out, how, _makers(command, how, bill, talk), counts)
    return Output([*_lines(found), *_spent(command, bill)], found.as_dict() | _bill(command, bill))


def _problems(command: Augment) -> list[str]:
    """What a kind needs and was not told, and what was told for no kind."""
    found = []
    for kind, needs in NEEDS.items():
        flags = {f"--{name.replace('_', '-')}": getattr(command, name) for name in needs}
        without, given = [flag for flag, value in flags.items() if not value], [f for f, v in flags.items() if v]
        if kind in command.kinds and without:
            found.append(f"--kinds {kind}: needs {' and '.join(without)}")
        if kind not in command.kinds and given:
            found.append(f"{' and '.join(given)}: is for {kind}, which --kinds does not name")
    if command.guard and not -1 <= command.guard_least <= 1:
        found.append(f"--guard-least: must be between -1 and 1, not {command.guard_least:g}")
    return found


def _makers(command: Augment, how: Augmenting, bill: Bill, talk: Talk) -> dict[str, Maker]:
    """What makes the texts of each kind; models are opened here."""
    from embedtune.data.augment import word_makers

    makers = word_makers(how)
    if set(command.kinds) & set(NEEDS) or command.guard:
        makers |= _by_models(command, how, bill, talk)
    if command.guard:
        from embedtune.encoder.encode import open_encoder
        from embedtune.encoder.shapes import bound_memory
        from embedtune.enrich.rewrite import guarded

        bound_memory()
        encoder = open_encoder(command.guard_model, note=talk.note)
        makers = {kind: guarded(make, encoder, command.guard_least) for kind, make in makers.items()}
    return makers


def _by_models(command: Augment, how: Augmenting, bill: Bill, talk: Talk) -> dict[str, Maker]:
    from embedtune.enrich import rewrite
    from embedtune.enrich.ask import Chat

    makers: dict[str, Maker] = {}
    if "contextual" in command.kinds and command.model:
        makers["contextual"] = rewrite.contextual(command.model, how)
    if "back-translation" in command.kinds and command.translate:
        there_and_back = [rewrite.open_seq2seq(name) for name in command.translate]
        makers["back-translation"] = rewrite.rewritten(there_and_back, "back-translation", how)
    if "paraphrase" in command.kinds and command.paraphraser:
        writer = rewrite.open_seq2seq(command.paraphraser, command.prefix)
        makers["paraphrase"] = rewrite.rewritten([writer], "paraphrase", how)
    if "llm" in command.kinds and command.address and command.llm_model:
        chat = Chat(address=command.address, model=command.llm_model)
        makers["llm"] = rewrite.chat_rewrites(chat, _journal(command), how, bill=bill, note=talk.note)
    return makers


def _journal(command: Augment) -> Path:
    return Path(command.out + ".journal")


def _lines(found: Augmented) -> list[str]:
    """The report for a terminal."""
    kinds = found.kinds.items()
    whole = f"{found.out}: {found.new:,} new rows from {found.train:,} training rows, {found.written:,} rows in all"
    rows = [
        [kind, f"{tried.asked:,}", f"{tried.made:,}", f"{tried.asked - tried.made:,}", f"{tried.changed:.1%}"]
        for kind, tried in kinds
    ]
    lines = [whole, *table(["kind", "asked for", "made", "refused", "words changed"], rows)]
    lines += [f"{kind}: {n:,} refused: {reason}" for kind, tried in kinds for reason, n in tried.refused.items()]
    for kind, tried in kinds:
        for before, after in tried.examples[:1]:
            lines += [f"{kind}:", f"  before  {_short(before)}", f"  after   {_short(after)}"]
    return [*lines, *(f"note: {note}" for note in found.notes)]


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _spent(command: Augment, bill: Bill) -> list[str]:
    if "llm" not in command.kinds:
        return []
    return [bill.line("texts", _journal(command))]


def _bill(command: Augment, bill: Bill) -> dict[str, Any]:
    return {"bill": asdict(bill) | {"cost": bill.cost}} if "llm" in command.kinds else {}


COMMANDS = {
    "data augment": Command("FILE --out NEW", "more training rows, with the same labels", Augment, augment, "--data"),
}
