"""The part of `judge` that says how far data and models lie apart: each --data and each model against the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from embedtune import files
from embedtune.commands.shape import Output
from embedtune.errors import EXIT_FINE, EXIT_REGRESSION

MOST = 2000  # texts that two models are compared on
GENERAL = "general texts (docstrings)"


@dataclass(frozen=True)
class Drifts:
    """Drift of each data set against the first, and of each model against the first by what it was seen on."""

    data: list[Any] = field(default_factory=list)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)

    def _of_models(self) -> dict[str, list[str]]:
        return {name: [found.line(what) for what, found in seen.items()] for name, seen in self.models.items()}

    def lines(self) -> list[str]:
        """All of it for the terminal; none where there was one model and one data set."""
        said = [f"{name}: {line}" for name, found in self._of_models().items() for line in found]
        for found in self.data:
            said += ["", f"drift from {found.old} to {found.new}", *(f"  {line}" for line in found.sentences())]
        return ["", *said] if said else []

    def as_dict(self) -> dict[str, Any]:
        """The figures for JSON, and the sentences on models."""
        models = {name: {what: asdict(each) for what, each in seen.items()} for name, seen in self.models.items()}
        return {"models": models, "data": [found.as_dict() for found in self.data]}

    def page(self) -> str:
        """The page with its pictures."""
        from embedtune.judge.drift_page import page

        return page(self.data, self._of_models())


def told(command: Any, lines: list[str], found: list[dict[str, Any]], drifts: Drifts, regression: bool) -> Output:
    """The output of `judge`, its files written: `lines` and what was `found` for each data set."""
    if command.out:
        result = {"models": list(command.models), "data": found, "drift": drifts.as_dict()}
        files.write_json_pieces(Path(command.out), result)
    if command.drift:
        files.write_text(Path(command.drift), drifts.page())
    code = EXIT_REGRESSION if regression else EXIT_FINE
    return Output(lines, {"data": found, "drift": drifts.as_dict()}, code)


@dataclass(frozen=True)
class JudgedTexts:
    """The texts of data that is judged on, read anew each time they are iterated."""

    judged: Any

    def __iter__(self) -> Iterator[str]:
        if self.judged.retrieval:
            yield from self.judged.retrieval.queries.values()
            yield from self.judged.retrieval.corpus.values()
        for pair in self.judged.scored:
            yield from (pair.sentence1, pair.sentence2)


def find_drift(
    encoders: Sequence[Any], texts: Mapping[str, Iterable[str]], note: Callable[[str], None], *, models: bool = True
) -> Drifts:
    """Drift between the data sets, `texts` by name, and between the `models`, on these texts and on general ones.

    Texts are iterated only where there is something to compare, and then more than once.
    Hosted models are left out, for their vectors cost money: data is then compared by its words alone.
    """
    from embedtune.encoder.encode import LocalEncoder
    from embedtune.judge.data_drift import data_drift
    from embedtune.judge.drift import drift, model_drift

    local = [encoder for encoder in encoders if isinstance(encoder, LocalEncoder)]
    (first, old), *others = texts.items()
    tokenizer, encode = (local[0].model.tokenizer, local[0].encode) if local else (None, None)
    found = []
    for name, new in others:
        note(f"looking for drift from {first} to {name}")
        found.append(data_drift((first, old), (name, new), tokenizer, encode))
    moved: dict[str, dict[str, Any]] = {}
    if models and len(local) == len(encoders) > 1:
        note("looking for drift of the models")
        few = {f"texts of {name}": _some(some) for name, some in texts.items()}
        for other in local[1:]:
            moved[other.name] = {GENERAL: model_drift(local[0], other)}
            moved[other.name] |= {w: drift(local[0].encode(some), other.encode(some)) for w, some in few.items()}
    return Drifts([each for each in found if each], moved)


def _some(texts: Iterable[str]) -> list[str]:
    """At most MOST of the distinct texts, evenly spread."""
    from embedtune.data.distinct import distinct, texts_at

    numbers = distinct(texts)
    return texts_at(texts, numbers[:: max(1, -(-len(numbers) // MOST))])
