"""Claim: heads that embedtune trains are as good as those of transformers' Trainer, or better, in less time.

Seven data sets, three seeds, all-MiniLM-L6-v2, the same rows, epochs, batch, peak learning rate and linear schedule.
Both choose their best epoch on the same dev rows; the test rows are read once, at the end, by the same code, from the
folders that both saved. The Trainer runs at its best: bf16 where the hardware has it, batches of like length.

    python benchmarks/labels.py                                     # all sets and seeds: hours on two cores
    python benchmarks/labels.py --sets cola wnut17 --seeds 0 --rows 1000 --test-rows 1000

What is finished is kept in --work, so a run that was stopped goes on; the table is of all that is there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from contrastive import DATA
from embedtune import Loop, finetune, keyed
from embedtune.data.labels import read_graded, read_labelled
from embedtune.data.read import read_rows
from embedtune.data.tags import read_tagged
from embedtune.encoder import heads, load
from embedtune.enrich.write import write_rows
from embedtune.judge import compare
from embedtune.judge.heads import judge_classifier, judge_regressor, judge_tagger
from embedtune.recipes import Classify, Regress, Tag

BASE, BATCH, LR = "all-MiniLM-L6-v2", 32, 5e-5
EPOCHS = {"rotten_tomatoes": 3, "imdb": 2, "cola": 4, "banking77": 8, "stsb": 4, "wnut17": 4, "bc5cdr": 3}
MEASURE = {"cola": "MCC", "stsb": "spearman", "wnut17": "F1", "bc5cdr": "F1"}  # accuracy elsewhere
RECIPES: dict[str, Any] = {"stsb": Regress, "wnut17": Tag, "bc5cdr": Tag}  # Classify elsewhere
SYSTEMS = ("embedtune", "trainer")
Rows = list[dict[str, Any]]


def drawn(rows: Iterable[dict[str, Any]], most: int) -> Rows:
    """At most so many rows, the same ones whatever the seed of the training."""
    found = list(rows)
    place = np.argsort(keyed.key(0, np.arange(len(found))), kind="stable")[:most]
    return [found[i] for i in np.sort(place)]


def table(path: Path, **columns: str) -> Rows:
    """Rows of a table, by our names."""
    return [{our: row.values[name] for our, name in columns.items()} for row in read_rows(path)]


def tabbed(path: Path, **columns: int) -> Rows:
    """Rows of a file without a header, in which quotes mean nothing."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{our: line.split("\t")[place] for our, place in columns.items()} for line in lines]


def sentences(path: Path) -> Rows:
    """Tagged sentences."""
    return [{"tokens": list(row.tokens), "tags": list(row.tags)} for row in read_tagged(path)]


def parts(name: str) -> dict[str, Rows]:
    """Training rows, dev rows where the set has some to choose on, and each set of test rows."""
    folder = DATA / name
    match name:
        case "rotten_tomatoes":
            files = {"train": "train.csv", "dev": "validation.csv", "test": "test.csv"}
            return {part: table(folder / file, text="text", label="label") for part, file in files.items()}
        case "imdb":
            return {part: table(folder / f"{part}.csv.gz", text="text", label="label") for part in ("train", "test")}
        case "cola":
            files = {"train": "in_domain_train.tsv", "in domain": "in_domain_dev.tsv",
                     "out of domain": "out_of_domain_dev.tsv"}  # fmt: skip
            return {part: tabbed(folder / file, label=1, text=3) for part, file in files.items()}
        case "banking77":
            return {part: table(folder / f"{part}.csv", text="text", label="category") for part in ("train", "test")}
        case "stsb":
            return {part: [{**row, "score": float(row["score"])}
                           for row in tabbed(folder / f"sts-{part}.csv", score=4, text=5, text_pair=6)]
                    for part in ("train", "dev", "test")}  # fmt: skip
    files = {"train": "train", "dev": "dev" if name == "wnut17" else "devel", "test": "test"}
    ending = "conll" if name == "wnut17" else "tsv"
    return {part: sentences(folder / f"{file}.{ending}") for part, file in files.items()}


def files_of(name: str, args: argparse.Namespace) -> dict[str, Path]:
    """A file for each part, at most as many rows as asked for; without dev rows, a tenth of the training rows."""
    found = parts(name)
    train = drawn(found.pop("train"), args.rows + (0 if "dev" in found else args.rows // 9))
    dev = found.pop("dev", None)
    if dev is None:
        held = keyed.key(1, np.arange(len(train))) % np.uint64(10) == 0
        dev = [row for row, h in zip(train, held) if h]
        train = [row for row, h in zip(train, held) if not h]
    sides = {"train": train, "dev": drawn(dev, args.dev_rows)}
    sides |= {part: drawn(rows, args.test_rows) for part, rows in found.items()}
    if RECIPES.get(name) is Tag:  # a tag that training does not have cannot be said
        known = {tag for row in train for tag in row["tags"]} | {"O"}
        sides = {part: [row for row in rows if set(row["tags"]) <= known] for part, rows in sides.items()}
    paths = {part: args.work / f"{name}-{args.rows}-{part.replace(' ', '-')}.jsonl" for part in sides}
    for part, rows in sides.items():
        write_rows(paths[part], rows)
    return paths


def embedtune(name: str, paths: dict[str, Path], out: Path, seed: int) -> None:
    """Our own training."""
    count = sum(1 for _ in paths["train"].open())
    loop = Loop(seed=seed, epochs=EPOCHS[name], batch=BATCH, lr=LR, eval_steps=-(-count // BATCH))
    recipe = RECIPES.get(name, Classify)(train=str(paths["train"]), dev=str(paths["dev"]), model=BASE, loop=loop,
                                         dev_rows=10**6)  # fmt: skip
    finetune(recipe, out, discard=True)


def trainer(name: str, paths: dict[str, Path], out: Path, seed: int) -> None:
    """transformers' own trainer: the best epoch on dev is kept."""
    from transformers import (
        AutoTokenizer,
        DataCollatorForTokenClassification,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    from embedtune.encoder.device import has_bf16, pick_device

    kind, folder = RECIPES.get(name, Classify), load.find(BASE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sides = {part: [json.loads(line) for line in paths[part].open()] for part in ("train", "dev")}
    labels = _labels(kind, [*sides["train"], *sides["dev"]])
    encoded = {part: [_encoded(row, tokenizer, labels) for row in rows] for part, rows in sides.items()}
    arguments = TrainingArguments(
        output_dir=str(out) + "-steps", per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH,
        num_train_epochs=EPOCHS[name], learning_rate=LR, lr_scheduler_type="linear", warmup_steps=0.05,
        weight_decay=0.01, bf16=has_bf16(pick_device()), use_cpu=pick_device().type == "cpu",
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch", save_strategy="epoch", save_total_limit=1, load_best_model_at_end=True,
        metric_for_best_model="value", greater_is_better=True, report_to="none", disable_tqdm=True, seed=seed,
        logging_strategy="no",
    )  # fmt: skip
    collate = (DataCollatorForTokenClassification if kind is Tag else DataCollatorWithPadding)(tokenizer)
    made = Trainer(
        model=_model(folder, kind, labels, seed), args=arguments, train_dataset=encoded["train"],
        eval_dataset=encoded["dev"], data_collator=collate, processing_class=tokenizer,
        compute_metrics=lambda found: {"value": _value(name, found, labels)},
    )  # fmt: skip
    made.train()
    made.save_model(str(out))
    shutil.rmtree(str(out) + "-steps")


def _labels(kind: Any, rows: Rows) -> list[str]:
    if kind is Regress:
        return ["score"]
    if kind is Tag:
        return ["O", *sorted({tag for row in rows for tag in row["tags"]} - {"O"})]
    return sorted({str(row["label"]) for row in rows})


def _model(folder: Path, kind: Any, labels: list[str], seed: int) -> Any:
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, set_seed

    set_seed(seed)
    made = AutoModelForTokenClassification if kind is Tag else AutoModelForSequenceClassification
    problem = (
        {} if kind is Tag else {"problem_type": "regression" if kind is Regress else "single_label_classification"}
    )
    return made.from_pretrained(
        folder, num_labels=len(labels), id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)}, **problem,
    )  # fmt: skip


def _encoded(row: dict[str, Any], tokenizer: Any, labels: list[str]) -> dict[str, Any]:
    given = {"truncation": True, "max_length": 256}
    if "tokens" in row:
        found = tokenizer(row["tokens"], is_split_into_words=True, **given)
        words: list[int | None] = found.word_ids()
        firsts = [word is not None and word != before for word, before in zip(words, [None, *words])]
        tags = [labels.index(row["tags"][word]) if first else -100 for word, first in zip(words, firsts)]
        return {**found, "labels": tags}
    found = tokenizer(row["text"], row.get("text_pair"), **given)
    return {**found, "labels": float(row["score"]) if "score" in row else labels.index(str(row["label"]))}


def _value(name: str, found: Any, labels: list[str]) -> float:
    """The measure that the best epoch is chosen by: the same as ours."""
    from scipy.stats import spearmanr
    from sklearn.metrics import f1_score

    from embedtune.judge.tagging import tagging_report

    gold = found.label_ids
    if RECIPES.get(name) is Regress:
        return float(spearmanr(found.predictions[:, 0], gold).statistic)
    said = found.predictions.argmax(-1)
    if RECIPES.get(name) is not Tag:
        return float(f1_score(gold, said, average="macro"))
    right = [[labels[g] for g in row[row >= 0]] for row in gold]
    ours = [[labels[s] for s in row[mask]] for row, mask in zip(said, gold >= 0)]
    report = tagging_report(right, ours, items=tuple(map(str, range(len(right)))), model="", data="")
    return float(report.summary["F1"])


def judged(name: str, path: Path, folder: Path, system: str) -> Any:
    """The report of a saved folder on test rows."""
    loaded, _ = heads.open_head(folder)
    kind = RECIPES.get(name, Classify)
    read: Callable[..., Any] = {Classify: read_labelled, Regress: read_graded, Tag: read_tagged}[kind]
    judge: Callable[..., Any] = {Classify: judge_classifier, Regress: judge_regressor, Tag: judge_tagger}[kind]
    return judge(loaded, list(read(path)), path.stem, system)


def one(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Both systems with one seed: seconds, measures on each test set, and our change against the peer."""
    kept = args.work / f"labels-{name}-{args.rows}-{seed}.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    paths, seconds = files_of(name, args), {}
    folders = {system: args.work / f"labels-{name}-{args.rows}-{seed}-{system}" for system in SYSTEMS}
    for system, train in ((SYSTEMS[0], embedtune), (SYSTEMS[1], trainer)):
        clock = Path(f"{folders[system]}.seconds")
        if not clock.exists():
            shutil.rmtree(folders[system], ignore_errors=True)
            start = time.perf_counter()
            train(name, paths, folders[system], seed)
            clock.write_text(str(time.perf_counter() - start))
        seconds[system] = float(clock.read_text())
    measure, tests = MEASURE.get(name, "accuracy"), {}
    for part in [part for part in paths if part not in ("train", "dev")]:
        ours, peer = (judged(name, paths[part], folders[system], system) for system in SYSTEMS)
        change = compare.paired(peer, ours, measure)
        tests[part] = {"embedtune": ours.summary[measure], "trainer": peer.summary[measure],
                       "change": [change.value, change.low, change.high]}  # fmt: skip
    found = {"seconds": seconds, "measure": measure, "tests": tests}
    kept.write_text(json.dumps(found))
    for folder in folders.values():
        shutil.rmtree(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work"))
    parser.add_argument("--sets", nargs="+", choices=EPOCHS, default=list(EPOCHS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--dev-rows", type=int, default=500)
    parser.add_argument("--test-rows", type=int, default=10**6)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    load.quiet()
    for name in args.sets:
        runs = [one(name, seed, args) for seed in args.seeds]
        faster = [run["seconds"]["trainer"] / run["seconds"]["embedtune"] for run in runs]
        for part in runs[0]["tests"]:
            found = [run["tests"][part] for run in runs]
            changes = "; ".join("{:+.4f} ({:+.4f} to {:+.4f})".format(*f["change"]) for f in found)
            print(f"{name} {part}, {runs[0]['measure']}: embedtune {mean(f['embedtune'] for f in found):.4f}, "
                  f"trainer {mean(f['trainer'] for f in found):.4f}; by seed {changes}; "
                  f"{mean(faster):.2f} times as fast", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
