"""Claim: a concept erased from all-MiniLM-L6-v2 cannot be read linearly from fresh texts, and tasks lose nothing.

    python benchmarks/erasure_real.py                              # all of them
    python benchmarks/erasure_real.py length --fit 2000 --fresh 900 --queries 20      # does it run at all?
    python benchmarks/erasure_real.py length source --oracle                          # told the concept's value

length: fitted on lines of general_900k and SciFact abstracts, certified on other lines and abstracts; all smooth
functions of it, or (length-scalar) tokens and log tokens alone.
source: film reviews or medical sentences. role: question or answer, parted by what the question is about.
Each is judged on all claims of SciFact and STS-B test. What is finished in --work is kept, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from contrastive import DATA
from embedtune.data.pairs import read_scored
from embedtune.data.read import read_texts
from embedtune.data.retrieval import RetrievalSet, read_beir
from embedtune.enrich.sentences import sentences
from embedtune.refine.certify import Fresh, Judged, certify, write_certificate
from embedtune.refine.erase import Erasure, Texts, erase
from embedtune.refine.told import erase_told

BASE = "all-MiniLM-L6-v2"
BLOCK = 100  # lines that stay on one side: neighbours tell of one thing
MARGIN = -0.005  # what a task may lose
Row = dict[str, Any]


def write(path: Path, rows: Iterable[Row]) -> Path:
    """Rows as JSON lines; a file that is there is kept."""
    if not path.exists():
        path.with_suffix(".part").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path.with_suffix(".part").rename(path)
    return path


def lines(name: str) -> Iterator[str]:
    return (row.values["text"] for row in read_texts(DATA / name, bad_rows="skip"))


def sides(texts: Iterable[str], fit: int, fresh: int) -> tuple[list[str], list[str]]:
    """The first texts of each side, a block for the one or for the other in their proportion; none stands twice.

    Both sides are spread over the same books and topics: a file has an order.
    """
    wanted, found, seen = (fit, fresh), ([], []), set()
    block, every = min(BLOCK, max(1, fresh // 4)), (fit + fresh) // fresh
    for number, text in enumerate(texts):
        side = int(number // block % every == every // 2)
        if len(found[side]) < wanted[side] and text not in seen:
            found[side].append(text)
            seen.add(text)
        if all(len(f) >= w for f, w in zip(found, wanted, strict=True)):
            break
    return found


def length_rows(args: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    fit, fresh = sides(lines("general_900k/data.txt.zst"), args.fit, args.fresh)
    corpus = list(read_beir(DATA / "scifact", "dev").corpus.values())
    # Abstracts in both, in one proportion: rows of another kind have another relation of length and vector.
    every = (args.fit + args.fresh) // args.fresh
    fresh += corpus[::every]
    fit += [text for number, text in enumerate(corpus) if number % every]
    return [{"text": text} for text in fit], [{"text": text} for text in fresh]


def source_rows(args: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    both: tuple[list[Row], list[Row]] = ([], [])
    reviews = (text for review in lines("imdb/train.csv.gz") for text in sentences(review.replace("<br />", " ")))
    for name, texts in (("review", reviews), ("medical", lines("medical/data.txt"))):
        for side, found in zip(both, sides(texts, args.fit // 2, args.fresh // 2), strict=True):
            side.extend({"text": text, "source": name} for text in found)
    return both


def role_rows(args: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    rows = [json.loads(line) for line in (DATA / "medquad" / "medquad.jsonl").read_text("utf-8").splitlines()]
    topics = sorted({row["focus"] for row in rows})
    random.Random(0).shuffle(topics)
    fresh = set(topics[: len(topics) * args.fresh // (args.fit + args.fresh)])
    both: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        for role in ("question", "answer"):
            if row[role].strip():
                both[row["focus"] in fresh].append({"text": row[role], "role": role})
    return both[0][: args.fit], both[1][: args.fresh]


CLAIMS = {
    "length": (length_rows, Erasure(length=True)),
    "length-scalar": (length_rows, Erasure(length=True, kind="scalar")),
    "source": (source_rows, Erasure(("source",))),
    "role": (role_rows, Erasure(("role",))),
}


def tasks(args: argparse.Namespace) -> Judged:
    """All SciFact claims (nothing here learns from any) and STS-B test, or the beginnings of them."""
    data, more = (read_beir(DATA / "scifact", part) for part in ("dev", "train"))
    data = RetrievalSet("SciFact", data.queries | more.queries, data.corpus, data.qrels | more.qrels)
    if args.queries:
        queries = dict(itertools.islice(data.queries.items(), args.queries))
        qrels = {key: data.qrels[key] for key in queries}
        judged = {document for each in qrels.values() for document in each}
        corpus = {key: text for key, text in data.corpus.items() if key in judged}
        data = RetrievalSet(data.name, queries, corpus, qrels)
    with open(DATA / "stsb" / "sts-test.csv", encoding="utf-8", newline="") as file:
        cells = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = [{"sentence1": c[5], "sentence2": c[6], "score": float(c[4])} for c in cells]
    scored = write(args.work / f"stsb-{args.queries}.jsonl", rows[: 5 * args.queries or None])
    return Judged([data], [("STS-B test", list(read_scored(scored)))])


def one_sided(task: Any) -> float:
    """The lower limit of a one-sided interval of 95 %, from the two-sided one as for a normal variable."""
    return task.difference.value - 1.645 / 1.96 * (task.difference.value - task.difference.low)


def claim(name: str, args: argparse.Namespace) -> None:
    """Erase, certify, show; what is there already is not made again."""
    make, wanted = CLAIMS[name]
    form, make_model = ("oracle-", erase_told) if args.oracle else ("", erase)
    model, out = args.work / f"without-{form}{name}", args.work / f"certificate-{form}{name}"
    fit, fresh = args.work / f"{name}-fit.jsonl", args.work / f"{name}-fresh.jsonl"
    if not (fit.exists() and fresh.exists()):
        for path, rows in zip((fit, fresh), make(args), strict=True):
            write(path, rows)
    if not model.is_dir():
        print("\n".join(make_model(BASE, Texts(str(fit)), wanted, model, note=print).lines()), flush=True)
    if (out / "certificate.json").is_file():
        print(f"{name}: {out}/certificate.json is there already")
        return
    # Nothing tells the source of a task's texts to an oracle; their length is counted.
    judged = Judged() if args.oracle and not wanted.length else tasks(args)
    found = certify(str(model), Fresh(str(fresh)), base=BASE, judged=judged, note=print)
    write_certificate(found, out)
    print("\n".join([f"{name}: {found.word}", *found.sentences(), *found.costs()]))
    for row in found.figures():
        print("  ".join(cell.rjust(28) for cell in row))
    for task in found.cost.tasks if found.cost else ():
        bound = one_sided(task)
        print(f"{task.measure} on {task.data}: one-sided 95 % bound of the change {bound:+.4f}, "
              f"{'not' if bound >= MARGIN else 'maybe'} worse than {MARGIN:+.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", choices=[*CLAIMS, []], default=list(CLAIMS))
    parser.add_argument("--work", type=Path, default=Path("erasure-real"))
    parser.add_argument("--fit", type=int, default=100_000, help="lines that the eraser is fitted on")
    parser.add_argument("--fresh", type=int, default=10_000, help="lines that it is certified on")
    parser.add_argument("--oracle", action="store_true", help="the form that is told the concept's value")
    parser.add_argument("--queries", type=int, default=0, help="SciFact queries, and a fifth of the STS pairs (0: all)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for name in args.claims:
        claim(name, args)
