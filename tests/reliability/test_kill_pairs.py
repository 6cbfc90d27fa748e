"""kill -9 and signals in runs on pairs, scores and labels: resumed, they end as the uninterrupted run, bit for bit."""

import json
import random
import shlex
import shutil
import signal

import pytest

from conftest import corpus
from reliability import ledger
from reliability.conftest import (
    assert_clean,
    at_line,
    interrupted,
    place,
    result,
    strike_at_random,
    uninterrupted,
)
from test_parts import documents, write

SHARED = (
    "--model model --epochs 2 --batch 16 --checkpoint-steps 3 --eval-steps 4 --log-steps 1 --max-tokens 512 --seed 3"
)
STORY = f"{SHARED} --lr 1e-3 --test-rows 20"
GONE_ON = SHARED.replace("--model model", "--continue-from old --replay 0.5 --max-steps 12")
RUNS = {
    # Gradient cache, keyed dropout, negatives, a guide, prefixes, averaging: everything that could keep a state.
    "contrastive": f"fit contrastive pairs.jsonl {SHARED} --lr 1e-3 --dims 32 16 --guide base --merge auto "
    "--measure loss",
    "scored": f"fit scored scored.jsonl {SHARED} --lr 1e-3 --loss CosineSimilarityLoss --merge auto --measure loss",
    "pseudo": f"fit scored unscored.jsonl {SHARED} --lr 1e-3",
    "classify": f"fit classify labels.jsonl {SHARED} --lr 1e-3 --weights balanced --label-smoothing 0.1",
    "lora": f"fit classify labels.jsonl {SHARED} --lr 1e-3 --lora 4",
    "regress": f"fit regress scored.jsonl {SHARED} --lr 1e-3",
    "tag": f"fit tag tags.jsonl {SHARED} --lr 1e-3 --measure loss",
    # With a sample of the rows that the run before was trained on.
    "mlm-on": f"fit mlm more.txt {GONE_ON}",
    "contrastive-on": f"fit contrastive more.jsonl {GONE_ON}",
    "classify-on": f"fit classify more.jsonl {GONE_ON}",
    # The whole story: part, adapt, tune, average, judge, report.
    "run-text": f"run documents.txt {STORY} --test-corpus 60 --max-steps 12 --adapt True",
    "run-pairs": f"run pairs.jsonl {STORY} --test-corpus 60 --negatives 1",
    "run-labels": f"run labels.jsonl {STORY}",
    "run-few": f"run few.jsonl {STORY} --max-steps 12",
}
BEFORE = {  # what `old` is made by
    "mlm-on": f"fit mlm text.txt {SHARED} --max-steps 4",
    "contrastive-on": f"fit contrastive pairs.jsonl {SHARED} --max-steps 4",
    "classify-on": f"fit classify labels.jsonl {SHARED} --max-steps 4",
}
KINDS = [
    ("contrastive", "minilm", "fp32"),
    ("contrastive", "bert", "bf16"),
    ("scored", "modernbert", "fp32"),
    ("pseudo", "bert", "fp32"),
    ("classify", "bert", "fp32"),
    ("lora", "bert", "bf16"),
    ("regress", "minilm", "fp32"),
    ("tag", "modernbert", "fp32"),
    ("mlm-on", "bert", "fp32"),
    ("contrastive-on", "minilm", "bf16"),
    ("classify-on", "minilm", "fp32"),
    ("run-text", "bert", "fp32"),
    ("run-pairs", "minilm", "bf16"),
    ("run-labels", "bert", "fp32"),
    ("run-few", "minilm", "fp32"),
]
LATER = ("pseudo", "contrastive-on", "classify-on", "run-few")
QUICK = [kind for kind in KINDS if kind[0] not in LATER]
STOPPED = [kind for kind in KINDS if kind[0] in ("scored", "classify", "tag", "run-labels")]
TWICE = [kind for kind in KINDS if kind[0] in ("lora", "regress", "mlm-on")]


def cases(quick, blocks):
    """(kind, block): block 0 of the quick kinds in every run, as many more blocks of every kind in the long one."""
    long = [pytest.param(kind, block, marks=pytest.mark.slow) for block in range(1, blocks + 1) for kind in KINDS]
    return pytest.mark.parametrize("made, block", [*((kind, 0) for kind in quick), *long], ids=str)


def write_pairs(folder):
    """Pairs, some anchors with two positives, some with negatives; scored pairs, with their scores and without.

    And labels, tags, documents, and more rows for runs that go on from another.
    """
    lines = list(dict.fromkeys(line for line in corpus(700, seed=2).splitlines() if len(line.split()) > 8))[:200]
    rows, scored = [], []
    for number in range(100):
        words, others = lines[number].split(), lines[199 - number].split()
        second = [lines[150 + number // 7]] if number % 7 == 0 else []
        row = {"anchor": " ".join(words[:4]), "positive": [" ".join(words[4:]), *second]}
        rows.append(row | {"negatives": [" ".join(others)] if number % 3 else []})
        kept = number % 4 * 2
        mixed = " ".join([*words[:kept], *others[kept:]])
        scored.append({"sentence1": " ".join(words), "sentence2": mixed, "score": number % 4})
    unscored = [{"sentence1": r["sentence1"], "sentence2": r["sentence2"]} for r in scored]
    labels = [{"text": " ".join(r["positive"]), "label": n % 3} for n, r in enumerate(rows)]
    tags = [{"tokens": r["sentence1"].split(), "tags": ["B-x" if len(w) > 4 else "O" for w in r["sentence1"].split()]}
            for r in scored]  # fmt: skip
    fresh = [line.split() for line in corpus(400, seed=6).splitlines() if len(line.split()) > 8][:60]
    more = [{"anchor": " ".join(words[:4]), "positive": " ".join(words[4:]), "text": " ".join(words), "label": n % 3}
            for n, words in enumerate(fresh)]  # fmt: skip
    # Of labels a run takes 40 rows at the least.
    tables = {"pairs": rows, "scored": scored, "unscored": unscored, "labels": labels, "tags": tags, "more": more,
              "few": labels[:60]}  # fmt: skip
    for name, found in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (folder / "more.txt").write_text(corpus(120, seed=4))
    write(folder / "documents.txt", documents(200))


@pytest.fixture(scope="module")
def whole(zygote, tiny_model, tmp_path_factory):
    """whole(task, kind, precision) -> the uninterrupted run."""
    made = {}

    def run(task, kind="minilm", precision="fp32"):
        if (task, kind, precision) not in made:
            folder = place(tmp_path_factory.mktemp("pairs"), tiny_model(kind))
            write_pairs(folder)
            if task in BEFORE:
                ended = zygote.run([*shlex.split(BEFORE[task]), "--out", "old"], folder)
                assert ended.status == 0, ended.said
            argv = [*shlex.split(RUNS[task]), "--precision", precision]
            done = made[task, kind, precision] = uninterrupted(zygote, folder, argv)
            assert len(done.left.log) >= 8 and done.witnessed[0] and done.witnessed[1], done.ended.said
            averaged = "averaging" in json.loads((folder / "whole" / "scores.json").read_text())
            assert averaged or "--merge" not in argv
        return made[task, kind, precision]

    return run


@pytest.mark.target("A1")
@cases(QUICK, 5)
def test_killed_at_random_instants(zygote, whole, made, block):
    """A kill of most kinds here, fifty of each in the long run: weights, moments, rows and logs are the same."""
    strike_at_random(zygote, whole(*made), f"{'-'.join(made)}-{block}", 10 if block else 1)


@pytest.mark.target("A15")
@cases(STOPPED, 2)
def test_stopped_at_random_instants(zygote, whole, made, block):
    """The same with the signals that leave a checkpoint."""
    number = signal.SIGINT if block == 2 else signal.SIGTERM
    strike_at_random(zygote, whole(*made), f"{'-'.join(made)}-{number}-{block}", 5 if block else 1, number)


@pytest.mark.target("A12")
@cases(TWICE, 1)
def test_the_same_command_twice(zygote, whole, made, block):
    """The same weights, tokenizer, recipe, scores, rows and log; every kill is a case of this too."""
    assert interrupted(zygote, whole(*made), f"again-{block}", 0, random.Random(), signal.SIGKILL) == 0


@pytest.mark.target("A3")
@pytest.mark.parametrize(
    "task, watch, at",
    [("contrastive", "save:6", 4), ("contrastive", "finish", 9), ("scored", "finish", 1), ("tag", "finish", 3)],
)
def test_killed_while_it_writes(zygote, whole, task, watch, at):
    """In a checkpoint, while the averages are scored, and while the finished folder is written."""
    folder, argv, expected = whole(task).folder, whole(task).argv, whole(task).left
    ended = zygote.run([*argv, "--out", "cut"], folder, fault={"kind": "kill", "at": at, "watch": watch})
    assert ended.status == -signal.SIGKILL and not (folder / "cut").exists(), ended.said
    ended = zygote.run([*argv[:2], "--resume", "cut"], folder)
    assert ended.status == 0 and "resumed at step" in ended.said, ended.said
    assert result(folder / "cut") == expected
    assert_clean(folder / "cut")
    shutil.rmtree(folder / "cut")


@pytest.mark.target("A3")
def test_killed_where_a_story_ends(zygote, whole):
    """The model is there; what only the run needed goes at once, or not at all."""
    made = whole("run-labels", "bert")
    fault = {"kind": "kill", "watch": "start", "from": "rename cut.running"}
    for at in (1, 2, 6):
        ended = zygote.run([*made.argv, "--out", "cut"], made.folder, fault={**fault, "at": at})
        assert ended.status == -signal.SIGKILL and result(made.folder / "cut") == made.left, ended.said
        again = zygote.run([*made.argv, "--out", "cut", "--resume"], made.folder)
        assert again.status == (made.ended.status if at == 1 else 2), again.said
        assert at == 1 or "there is nothing to resume: cut is finished" in again.said
        assert result(made.folder / "cut") == made.left
        shutil.rmtree(made.folder / "cut")
        ledger.count()


@pytest.mark.slow
@pytest.mark.target("A3")
@pytest.mark.parametrize("task", ["contrastive", "scored"])
def test_killed_at_every_write_of_the_end(zygote, whole, task):
    folder, argv, expected = whole(task).folder, whole(task).argv, whole(task).left
    ended = zygote.run([*argv, "--out", "base"], folder, fault={"kind": "kill", "at": 1, "watch": "finish"})
    assert ended.status == -signal.SIGKILL
    at = 1
    while True:
        shutil.copytree(folder / "base.running", folder / "cut.running")
        ended = zygote.run([*argv[:2], "--resume", "cut"], folder, fault={"kind": "kill", "at": at, "watch": "finish"})
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL, ended.said
        if not (folder / "cut").exists():
            ended = zygote.run([*argv[:2], "--resume", "cut"], folder)
            assert ended.status == 0, ended.said
        assert result(folder / "cut") == expected, at
        assert_clean(folder / "cut")
        shutil.rmtree(folder / "cut")
        ledger.count()
        at += 1
    assert at > 20


@pytest.mark.target("A15")
def test_a_signal_leaves_a_checkpoint(zygote, whole):
    number, code = signal.SIGTERM, 143
    made = whole("contrastive")
    folder, argv, expected = made.folder, made.argv, made.left
    home = folder / "stopped.running"
    ended = zygote.run([*argv, "--out", "stopped"], folder, strike=at_line(home / "log.jsonl", 6, 0, number))
    assert ended.status == code and "Traceback" not in ended.said, ended.said
    last = int(sorted((home / "checkpoints").glob("step-*"))[-1].name.removeprefix("step-"))
    assert f"checkpoint stopped.running/checkpoints/step-{last:07d}" in ended.said
    ended = zygote.run([*argv[:2], "--resume", "stopped"], folder)
    assert ended.status == 0 and f"resumed at step {last}" in ended.said, ended.said
    assert result(folder / "stopped") == expected
    shutil.rmtree(folder / "stopped")
