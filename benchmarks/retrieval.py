"""Claim: what `fit contrastive` and `run` make retrieves better than the base, and never ships a regression.

    python benchmarks/retrieval.py scifact --seeds 0 1 2     # train claims -> dev claims, all 5,183 abstracts searched
    python benchmarks/retrieval.py medquad --rows 3000       # questions -> answers, parted by focus, beside the peer
    python benchmarks/retrieval.py text --corpus scifact     # raw text only, judged on real queries and on proxies

Settings were chosen on parts of the training data. Everything is kept in --work, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from contrastive import DATA
from embedtune import Contrastive, Loop, Ranking, finetune
from embedtune.data.divide import assign_groups, pair_groups
from embedtune.data.pairs import Pair, read_pairs
from embedtune.data.retrieval import RetrievalSet, from_pairs, read_beir
from embedtune.encoder.encode import open_encoder
from embedtune.enrich.mine import Mining, mine, write_mined
from embedtune.enrich.write import write_rows
from embedtune.fit.objectives.contrastive import held_out
from embedtune.judge import compare
from embedtune.judge.report import Report, table
from embedtune.judge.retrieval import DEFAULT, score_vectors

BASE = "all-MiniLM-L6-v2"
DIMS = (384, 256, 128, 64, 32)


def vectors(model: str, data: RetrievalSet, work: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of the queries and the corpus, kept in `work` by the model's name."""
    name = f"{Path(model).name}-{data.name.replace('/', '-')}"
    paths = [work / f"{name}-{side}.npy" for side in ("queries", "corpus")]
    if not all(path.exists() for path in paths):
        encoder = open_encoder(model, note=print)
        np.save(paths[0], encoder.encode(list(data.queries.values()), "query"))
        np.save(paths[1], encoder.encode(list(data.corpus.values()), "document"))
    return np.load(paths[0]), np.load(paths[1])


def report(model: str, data: RetrievalSet, work: Path, dim: int | None = None) -> Report:
    """All measures of a model on data."""
    return score_vectors(*vectors(model, data, work), data, DEFAULT, dim, model=Path(model).name)


def show(base: Report, others: list[Report]) -> None:
    """The table, and each model's change against the base in every measure."""
    header, rows = table([base, *others])
    for line in [header, *rows]:
        print("  ".join(f"{cell:>14}" for cell in line))
    for other in others:
        for measure in base.summary:
            c = compare.paired(base, other, measure)
            print(f"{other.model:>20} {measure:<12} {c.value:+.4f} ({c.low:+.4f} to {c.high:+.4f}) p {c.p:.4f}")


def print_note(text: str) -> None:
    print(f"  {text}", flush=True)


def tuned(out: Path, recipe: Contrastive) -> str:
    """The folder of a finished training; made if it is not there, continued if it was stopped."""
    from embedtune.fit.engine import Listener

    if not out.is_dir():
        finetune(recipe, out, resume=out.with_name(out.name + ".running").is_dir(), listener=Listener(print_note))
    return str(out)


def scifact(args: argparse.Namespace) -> None:
    """Train claims, with mined negatives and the base as guide; dev claims are read once, at the end."""
    folder, work = DATA / "scifact", args.work
    mined = work / f"scifact-mined-{args.negatives}.jsonl"
    if not mined.exists():
        pairs, corpus = list(read_pairs(folder, split="train")), read_beir(folder, "train").corpus
        write_mined(
            mined, mine(pairs, corpus, open_encoder(BASE), Mining(negatives=args.negatives, pool=20), note=print)
        )
    data, models = read_beir(folder, "dev"), []
    train, dev = hard_dev(mined, data, args)
    for seed in args.seeds:
        loop = Loop(seed=seed, epochs=args.epochs, batch=args.batch, lr=args.lr, eval_steps=args.eval_steps,
                    measure=args.measure)  # fmt: skip
        ranking = Ranking(guide="base", scale=args.scale)
        recipe = Contrastive(train=train, dev=dev, ranking=ranking, loop=loop, merge="auto",
                             train_length=args.train_length, dev_rows=args.dev_rows,
                             dev_corpus=7 * args.dev_rows)  # fmt: skip
        models.append(tuned(work / f"scifact-{args.name}-{seed}", recipe))
    show(report(BASE, data, work), [report(model, data, work) for model in models])


def hard_dev(mined: Path, data: RetrievalSet, args: argparse.Namespace) -> tuple[str, str]:
    """Training pairs without some claims; these with the texts that the base puts next to them, as hard as it gets.

    One split for all seeds, and a big one: 110 claims cannot tell a gain of 0.04 from chance.
    """
    pairs = list(read_pairs(mined))
    held = held_out(pair_groups(pairs), args.dev_rows, 0)
    names = [str(args.work / f"scifact-{side}-{args.dev_rows}.jsonl") for side in ("train", "dev")]
    dev = [pair for pair, h in zip(pairs, held) if h]
    texts, corpus = list(data.corpus.values()), vectors(BASE, data, args.work)[1]
    near = open_encoder(BASE).encode([pair.anchor for pair in dev], "query") @ corpus.T
    rows = []
    for pair, order in zip(dev, np.argsort(-near, axis=1, kind="stable")[:, :10]):
        others = [texts[i] for i in order if texts[i] != pair.positive][:8]
        rows.append({"anchor": pair.anchor, "positive": pair.positive,
                     **{f"negative_{n}": text for n, text in enumerate(others)}})  # fmt: skip
    write_rows(Path(names[1]), rows)
    kept = [pair for pair, h in zip(pairs, held) if not h]
    write_rows(Path(names[0]), [
        {"anchor": p.anchor, "positive": p.positive, **{f"negative_{n}": t for n, t in enumerate(p.negatives)}}
        for p in kept
    ])  # fmt: skip
    return names[0], names[1]


def medquad(args: argparse.Namespace) -> None:
    """Pairs parted by focus and by shared text; a Matryoshka model beside sentence-transformers' trainer."""
    work = args.work
    columns = {"anchor": "question", "positive": "answer", "group": "focus"}
    pairs = list(read_pairs(DATA / "medquad" / "medquad.jsonl", columns=columns, bad_rows="skip"))
    part = assign_groups(pair_groups(pairs), (0.8, 0.1, 0.1), 0)
    train, dev, test = ([p for p, n in zip(pairs, part) if n == number] for number in range(3))
    train = train[:: max(1, len(train) // args.rows)][: args.rows]
    for name, side in (("train", train), ("dev", dev[:300])):
        write_rows(work / f"medquad-{name}.jsonl", [{"anchor": p.anchor, "positive": p.positive} for p in side])
    data = from_pairs(test[: args.test_rows], f"medquad-{args.test_rows}")
    steps = -(-len(train) // args.batch)
    loop = Loop(epochs=1, batch=args.batch, lr=args.lr, eval_steps=max(1, steps // 2))
    recipe = Contrastive(train=str(work / "medquad-train.jsonl"), dev=str(work / "medquad-dev.jsonl"),
                         ranking=Ranking(dims=DIMS), loop=loop, dev_rows=300, dev_corpus=600)  # fmt: skip
    ours = tuned(work / f"medquad-{args.name}", recipe)
    models = [ours, *([peer(train, args, steps)] if args.peer else [])]
    show(report(BASE, data, work), [report(model, data, work) for model in models])
    for dim in DIMS:
        reports = [report(model, data, work, dim) for model in (BASE, *models)]
        line = ", ".join(f"{r.model} {r.summary['nDCG@10']:.4f}" for r in reports)
        changes = [compare.paired(reports[0], r, "nDCG@10") for r in reports[1:]]
        print(
            f"{dim:>5} dimensions: {line}; "
            + "; ".join(f"{c.value:+.4f} ({c.low:+.4f} to {c.high:+.4f})" for c in changes)
        )
    if args.peer:
        c = compare.paired(report(models[1], data, work), report(ours, data, work), "nDCG@10")
        print(f"ours less the peer: {c.value:+.4f} ({c.low:+.4f} to {c.high:+.4f})")


def peer(train: list[Pair], args: argparse.Namespace, steps: int) -> str:
    """A plain SentenceTransformerTrainer run at the same settings and steps."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import BatchSamplers
    from sentence_transformers.sentence_transformer import losses

    from embedtune.encoder.load import find

    out = args.work / f"medquad-peer-{args.name}"
    if out.is_dir():
        return str(out)
    model = SentenceTransformer(str(find(BASE)), device="cpu")
    inner = losses.MultipleNegativesRankingLoss(model)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(args.work / "peer-out"), per_device_train_batch_size=args.batch, max_steps=steps,
        learning_rate=args.lr, warmup_steps=int(0.05 * steps), weight_decay=0.01, save_strategy="no",
        batch_sampler=BatchSamplers.NO_DUPLICATES, report_to="none", logging_steps=5, seed=0,
    )  # fmt: skip
    rows = [{"anchor": p.anchor, "positive": p.positive} for p in train]
    SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows),
        loss=losses.MatryoshkaLoss(model, inner, list(DIMS)),
    ).train()  # fmt: skip
    model.save(str(out), create_model_card=False)
    return str(out)


def text(args: argparse.Namespace) -> None:
    """`embedtune run` on raw text alone, then what it made on real queries that nothing of it has seen."""
    from embedtune.fit.engine import Listener
    from embedtune.recipes import Run
    from embedtune.run import run
    from embedtune.tune import running

    documents, real = CORPORA[args.corpus](args.rows, args.real_corpus)
    work = args.work / f"text-{args.corpus}-{args.name}"
    work.mkdir(exist_ok=True)
    path, out, tuned = work / "data.txt", work / "run", work / f"tuned-{args.corpus}-{args.name}"
    path.write_text("\n\n".join("\n".join(lines) for lines in documents) + "\n", encoding="utf-8")

    def listen(words: str) -> None:
        print_note(words)
        if words.startswith("judging"):  # the last moment at which the tuned model stands beside the base
            shutil.copytree(running(out) / "tuned", tuned, dirs_exist_ok=True)

    if not out.is_dir():
        loop = Loop(batch=args.batch, lr=args.lr, eval_steps=args.eval_steps)
        recipe = Run(data=str(path), pairs=1, most_pairs=args.most_pairs, loop=loop, test_rows=args.test_rows,
                     test_corpus=args.test_corpus)  # fmt: skip
        run(recipe, out, resume=running(out).is_dir(), listener=Listener(listen))
    story = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    print(f"{args.corpus}, proxies: {story['verdict']['sentence']} {story['verdict']['changes']}; {story['averaging']}")
    base, after = report(BASE, real, args.work), report(str(tuned), real, args.work)
    show(base, [after])
    word = compare.verdict([compare.paired(base, after, "nDCG@10")])
    print(f"{args.corpus}, real queries: the tuned model is a {word}; shipped was {story['model']}")


def _scifact_text(rows: int, most: int) -> tuple[list[list[str]], RetrievalSet]:
    with open(DATA / "scifact" / "corpus.jsonl", encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    documents = [[" ".join(d[part].split()) for part in ("title", "text") if d[part].strip()] for d in found]
    return documents[:rows], read_beir(DATA / "scifact", "dev")


def _medquad_text(rows: int, most: int) -> tuple[list[list[str]], RetrievalSet]:
    columns = {"anchor": "question", "positive": "answer"}
    pairs = list(read_pairs(DATA / "medquad" / "medquad.jsonl", columns=columns, bad_rows="skip"))
    pairs = list({pair.positive: pair for pair in reversed(pairs)}.values())[::-1]
    pairs = pairs[:: max(1, len(pairs) // max(rows, most))]
    answers = [[line for line in map(" ".join, map(str.split, p.positive.splitlines())) if line] for p in pairs]
    return answers[:rows], from_pairs(pairs[:most], f"medquad-text-{most}")


def _docstring_text(rows: int, most: int) -> tuple[list[list[str]], RetrievalSet]:
    from itertools import groupby

    from embedtune.data.example import docstrings

    found = [list(lines) for full, lines in groupby(docstrings(None), bool) if full]
    found = list({tuple(lines[1:]): lines for lines in reversed(found) if len(lines) > 2}.values())[::-1]
    found = found[:: max(1, len(found) // max(rows, most))]
    pairs = [Pair(lines[0], " ".join(lines[1:]), (), "docstrings", n, None) for n, lines in enumerate(found, 1)]
    return [lines[1:] for lines in found[:rows]], from_pairs(pairs[:most], f"docstrings-text-{most}")


CORPORA = {"scifact": _scifact_text, "medquad": _medquad_text, "docstrings": _docstring_text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scifact", "medquad", "text"), nargs="?", default="scifact")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work"))
    parser.add_argument("--name", default="run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--corpus", choices=CORPORA, default="scifact")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--negatives", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--scale", type=float, default=20.0)
    parser.add_argument("--eval-steps", type=int)
    parser.add_argument("--train-length", type=int)
    parser.add_argument("--measure", help="scifact: what the best step is chosen by (default nDCG@10)")
    parser.add_argument("--dev-rows", type=int, default=80)
    parser.add_argument("--most-pairs", type=int, default=3000)
    parser.add_argument("--real-corpus", type=int, default=1500, help="text: texts that the real queries search")
    parser.add_argument("--test-rows", type=int, default=500)
    parser.add_argument("--test-corpus", type=int, default=5200)
    parser.add_argument("--peer", action="store_true", help="medquad: also train sentence-transformers' own trainer")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    {"scifact": scifact, "medquad": medquad, "text": text}[args.what](args)


if __name__ == "__main__":
    main()
