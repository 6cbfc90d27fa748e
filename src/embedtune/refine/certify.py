"""`refine certify`: embed fresh rows, probe them, compare with the base, and write the certificate into a folder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from embedtune import files
from embedtune.data.columns import parse_columns
from embedtune.data.pairs import ScoredPair
from embedtune.data.read import BadRows, Counts, DataLike, read_texts
from embedtune.data.retrieval import RetrievalSet
from embedtune.errors import UserError, short_list
from embedtune.plots import save_figure
from embedtune.refine.bake import weight_sums
from embedtune.refine.certificate import Certificate, Erasure, Target, find
from embedtune.refine.certificate_page import page, picture
from embedtune.refine.concepts import LENGTH, Encoding, Survey, length_encodings, missing
from embedtune.refine.cost import Cost, movement, tasks
from embedtune.refine.probes import ASKED, FEWEST, basis, chance_below
from embedtune.refine.sidecar import ABOUT, digest, fitted_texts, read_about
from embedtune.refine.told import KIND, Oracle, ToldEncoder

CERTIFICATE = "certificate"
LEAST = 5 * 3  # rows of a class, which probes part three times
TOO_GOOD = 1e-9  # chance of an R2 so small on rows that an eraser has not seen
Note = Callable[[str], None]


@dataclass(frozen=True)
class Fresh:
    """Where the fresh rows come from, and which concept is looked for in them (derived: the one that was erased)."""

    data: DataLike
    concept: str | None = None
    kind: str | None = None
    columns: str | None = None
    bad_rows: BadRows = "fail"
    rows: int | None = None


@dataclass(frozen=True)
class Judged:
    """What both models are judged on besides."""

    retrieval: Sequence[RetrievalSet] = ()
    similarity: Sequence[tuple[str, Sequence[ScoredPair]]] = ()


def certify(
    model: str,
    fresh: Fresh,
    *,
    base: str | None = None,
    judged: Judged = Judged(),  # noqa: B008 - frozen
    precision: Any = "fp32",
    seed: int = 0,
    note: Note = lambda text: None,
) -> Certificate:
    """Certify what probes find of a concept in `model`, and before in `base`.

    Raises UserError for rows that the eraser was fitted on, too few rows, a class without rows, a concept that was
    not erased or is not in the data.
    """
    from embedtune.encoder import load
    from embedtune.encoder.encode import open_encoder

    folder = load.find(model)
    about = read_about(folder) if (folder / ABOUT).is_file() else None
    oracle = Oracle.load(folder) if about and about["kind"] == KIND else None
    home = load.find(oracle.about["model"]) if oracle else folder  # where the weights are
    if (judged.retrieval or judged.similarity) and base is None:
        raise UserError("a task is judged against the base", where="--retrieval, --similarity", fix="give --base")
    encodings = _erased(about, fresh.concept)
    name = encodings[0].name if encodings else fresh.concept or LENGTH
    fitted = fitted_texts(folder) if about else ()
    texts, values, counts, remarks = _read(fresh, None if _is_length(name, encodings) else name, fitted or ())
    if about and counts.sha256 == about.get("data_sha256"):
        raise _not_fresh(fresh.data)
    if about and len(texts) < FEWEST * (live := about["live_dimensions"]) + 2:
        what = f"{len(texts):,} rows cannot judge {live:,} dimensions"
        fix = f"give fresh rows: at least {ASKED * live:,}"
        raise UserError("; ".join([what, *remarks]), where="the fresh rows", fix=fix)
    if fitted is None:
        remarks.append("rows of the fit were not looked for: the folder is of an older version, which kept no digests")
    note(f"embedding {len(texts):,} texts")
    encoder = open_encoder(oracle.about["model"] if oracle else model, precision=precision, note=note)
    x, tokens, truncated = _embed(encoder, texts)
    if oracle:
        x, encoder = oracle(x, tokens if values is None else values), _told(encoder, oracle, judged)
    if not encodings:
        encodings = length_encodings(tokens) if values is None else (_survey(name, values, fresh.kind),)
    target = _target(encodings, values, tokens)
    if about:
        _refuse_fitted(x, target, fresh.data)
    note("probing")
    after, before, cost = find(x, target, tokens, seed), None, None
    if base:
        other = open_encoder(base, precision=precision, note=note)
        note(f"the same for {base}")
        old = _embed(other, texts)[0]
        before = find(old, target, tokens, seed)
        cost = Cost(movement(old, x, seed), tasks(other, encoder, judged.retrieval, judged.similarity))
    if truncated:
        remarks.append(f"{truncated:,} texts were cut at the model's limit: they count as cut")
    digests = {"data": counts.sha256, "erasure": about["erasure_sha256"] if about else None, **weight_sums(home)}
    return Certificate(model, base, name, after, before, _erasure(about, home), cost, digests, seed, tuple(remarks))


def _told(encoder: Any, oracle: Oracle, judged: Judged) -> ToldEncoder:
    """The encoder of an oracle of length; a UserError where a task's texts would need a value that nothing tells."""
    if oracle.encoding.source == "column" and (judged.retrieval or judged.similarity):
        what = f"nothing tells the oracle {oracle.encoding.name!r} of the texts of a task"
        raise UserError(
            what, where="--retrieval, --similarity", fix="leave them out; an oracle of length counts tokens"
        )
    return ToldEncoder(encoder, oracle)


def earlier(folder: Path) -> list[str]:
    """What is to be said where a folder has a certificate already, which the next one replaces."""
    path = folder / f"{CERTIFICATE}.json"
    if not path.is_file():
        return []
    return [f"replaced the certificate of {datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M}"]


def write_certificate(certificate: Certificate, folder: Path) -> list[str]:
    """Write certificate.html, .png, .svg and, last, .json, each by one rename; their names."""
    if not folder.is_dir():
        files.make_folder(folder)
    files.write_text(folder / f"{CERTIFICATE}.html", page(certificate))
    save_figure(picture(certificate), folder / CERTIFICATE)
    files.write_json(folder / f"{CERTIFICATE}.json", certificate.as_dict())
    return [f"{CERTIFICATE}.{ending}" for ending in ("json", "html", "png", "svg")]


def _erased(about: Mapping[str, Any] | None, concept: str | None) -> tuple[Encoding, ...]:
    """The encodings of the concept that was erased; none where nothing was, or a new concept is asked for."""
    found: dict[str, list[Encoding]] = {}
    for fields in about["concepts"] if about else ():
        encoding = Encoding.from_json(fields)
        found.setdefault(encoding.name, []).append(encoding)
    if about and concept is None and len(found) > 1:
        names = short_list(list(found), most=9)
        raise UserError(f"several concepts were erased: {names}", where=str(about["model"]), fix="--concept NAME")
    if about and concept is not None and concept not in found:
        what = f"{concept!r} was not erased from this model; {short_list(list(found), most=9)} was"
        raise UserError(what, where="--concept", fix="name one of these, or certify a model without an erasure")
    return tuple(found[concept] if concept else next(iter(found.values()))) if found else ()


def _is_length(name: str, encodings: Sequence[Encoding]) -> bool:
    return encodings[0].source != "column" if encodings else name == LENGTH


def _read(
    fresh: Fresh, column: str | None, fitted: Collection[int]
) -> tuple[list[str], list[Any] | None, Counts, list[str]]:
    """Distinct texts that are not among the `fitted`, the values of the column, the tally, and what was left out."""
    counts = Counts()
    columns = {**parse_columns(fresh.columns), **({column: column} if column else {})}
    found: dict[str, Any] = {}
    twice = empty = known = 0
    rows = read_texts(fresh.data, columns=columns, bad_rows=fresh.bad_rows, counts=counts)
    for row in islice(rows, fresh.rows):
        value = row.values.get(column) if column else 0
        if missing(value):
            empty += 1
        elif row.values["text"] in found:
            twice += 1
        elif digest(row.values["text"]) in fitted:
            known += 1
        else:
            found[row.values["text"]] = value
    remarks = [f"{twice:,} rows left out: the same text again"] if twice else []
    remarks += [f"{known:,} rows left out: the eraser was fitted on them"] if known else []
    remarks += [f"{empty:,} rows left out: no value of {column!r}"] if empty else []
    remarks += [f"{n:,} rows left out: {reason}" for reason, n in counts.rejected.items() if reason != "blank"]
    remarks += [f"{n:,} rows mended: {reason}" for reason, n in counts.replaced.items()]
    return list(found), list(found.values()) if column else None, counts, remarks


def _embed(encoder: Any, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, int]:
    """Vectors (m, d), tokens (m,), and how many texts were cut. Raises UserError for a hosted model."""
    from embedtune.encoder.embed import embed

    if not hasattr(encoder, "model"):
        raise UserError("is a hosted model, whose tokens cannot be counted", where=encoder.name, fix="a model folder")
    blocks = list(embed(encoder.model, texts, max_tokens=encoder.max_tokens))
    x, tokens = (np.concatenate([getattr(block, name) for block in blocks]) for name in ("vectors", "tokens"))
    return x, tokens, sum(block.truncated for block in blocks)


def _survey(name: str, values: Sequence[Any], kind: Any) -> Encoding:
    survey = Survey(name)
    for value in values:
        survey.add(value)
    return survey.encoding(kind)


def _target(encodings: Sequence[Encoding], values: Sequence[Any] | None, tokens: np.ndarray) -> Target:
    """What is to be found: the value itself first, then what else of it was erased."""
    names: list[str] = []
    parts: list[np.ndarray] = []
    for encoding in reversed(encodings):  # log tokens before tokens
        log = encoding.source == "log tokens"
        raw: Any = (np.log(np.maximum(tokens, 1)) if log else tokens) if values is None else values
        z = encoding(raw)
        label = encoding.name if encoding.source == "column" else encoding.source
        if encoding.kind in ("category", "multilabel"):
            return _classes(encoding, z)
        if encoding.kind == "function":
            names.append(label)
            parts.append(np.array(raw, float)[:, None])
            z = z[:, z.std(0) > 0]  # a spline that no fresh value reaches
        names += [label] if z.shape[1] == 1 else [f"{label}, spline {i + 1}" for i in range(z.shape[1])]
        parts.append(z)
    return Target(tuple(names), np.hstack(parts))


def _classes(encoding: Encoding, z: np.ndarray) -> Target:
    """Every class against the others; of two it is the same, so once. Raises UserError for a class of too few rows."""
    several = encoding.kind == "multilabel"
    if not several:
        z = np.column_stack([1 - z.sum(1), z])
    counts = z.sum(0) if not several else np.minimum(z.sum(0), len(z) - z.sum(0))
    if few := [f"{name!r} has {int(n):,}" for name, n in zip(encoding.classes, counts) if n < LEAST]:
        raise UserError(
            f"every class needs {LEAST} fresh rows: {short_list(few)}",
            where=f"concept {encoding.name!r}",
            fix="give more rows of these classes",
        )
    if several:
        return Target(encoding.classes, z, None, several)
    names = encoding.classes if len(encoding.classes) > 2 else (" / ".join(encoding.classes),)
    return Target(names, z[:, : len(names)], z.argmax(1))


def _refuse_fitted(x: np.ndarray, target: Target, data: DataLike) -> None:
    """Raise UserError where a probe finds far less than chance would: then the eraser has seen these very rows.

    Chance finds sum_i h_i z_i^2, h_i the leverage of row i: less than r / (m - 1) for a class of rows near the mean.
    """
    q = basis(x)
    z = target.z - target.z.mean(0)
    z = z[:, z.any(0)]
    z /= np.linalg.norm(z, axis=0)
    (m, r), k = q.shape, z.shape[1]
    by_chance = (q**2).sum(1) @ z**2 * (m - 1) / r
    r2 = ((q.T @ z) ** 2).sum(0) / by_chance
    if any(chance_below(min(1.0, float(each)), m, r, 0.0) < TOO_GOOD / k for each in r2):
        raise _not_fresh(data)


def _not_fresh(data: DataLike) -> UserError:
    where = str(data) if isinstance(data, str | Path) else "the list"
    what = "these are the rows that the eraser was fitted on: on them it is perfect, and that says nothing of others"
    return UserError(what, where=where, fix="give rows that it has not seen")


def _erasure(about: Mapping[str, Any] | None, folder: Path) -> Erasure | None:
    if about is None:
        return None
    changed = weight_sums(folder) != dict(about["weights"])
    numbers = (about["n_fit"], about["live_dimensions"], about["covariance_left"])
    return Erasure(about["method"], *numbers, changed)
