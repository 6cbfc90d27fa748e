"""kill -9 and signals in runs on pairs, scores and labels: resumed, they end as the uninterrupted run, bit for bit."""

import json
import random
import shlex
import shutil
import signal

import pytest

from conftest import corpus
from reliability.conftest import assert_clean, at_line, place, result

SHARED = (
    "--model model --epochs 2 --batch 16 --checkpoint-steps 3 --eval-steps 4 --log-steps 1 --max-tokens 512 --seed 3"
)
RUNS = {
    # Gradient cache, keyed dropout, negatives, a guide, prefixes, averaging: everything that could keep a state.
    "contrastive": f"fit contrastive pairs.jsonl {SHARED} --lr 1e-3 --dims 32 16 --guide base --merge auto "
    "--measure loss",
    "scored": f"fit scored scored.jsonl {SHARED} --lr 1e-3 --loss CosineSimilarityLoss --merge auto --measure loss",
    "pseudo": f"fit scored unscored.jsonl {SHARED} --lr 1e-3",
    "classify": f"fit classify labels.jsonl {SHARED} --lr 1e-3 --weights balanced --label-smoothing 0.1",
    "regress": f"fit regress scored.jsonl {SHARED} --lr 1e-3",
    "tag": f"fit tag tags.jsonl {SHARED} --lr 1e-3 --measure loss",
}
KINDS = [
    ("contrastive", "minilm", "fp32"),
    ("contrastive", "bert", "bf16"),
    ("scored", "modernbert", "fp32"),
    ("pseudo", "bert", "fp32"),
    ("classify", "bert", "fp32"),
    ("regress", "minilm", "fp32"),
    ("tag", "modernbert", "fp32"),
]


def write_pairs(folder):
    """Pairs, some anchors with two positives, some with negatives; scored pairs, with their scores and without."""
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
    tables = {"pairs": rows, "scored": scored, "unscored": unscored, "labels": labels, "tags": tags}
    for name, found in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


@pytest.fixture(scope="module")
def whole(zygote, tiny_model, tmp_path_factory):
    """whole(task, kind, precision) -> (folder to run in, arguments, result of the uninterrupted run)."""
    made = {}

    def run(task, kind="minilm", precision="fp32"):
        if (task, kind, precision) not in made:
            folder = place(tmp_path_factory.mktemp("pairs"), tiny_model(kind))
            write_pairs(folder)
            argv = [*shlex.split(RUNS[task]), "--precision", precision]
            ended = zygote.run([*argv, "--out", "whole"], folder)
            assert ended.status == 0, ended.said
            found = result(folder / "whole")
            averaged = "averaging" in json.loads((folder / "whole" / "scores.json").read_text())
            assert len(found.log) >= 15 and averaged == ("--merge" in argv), ended.said
            made[task, kind, precision] = folder, argv, found
        return made[task, kind, precision]

    return run


def killed(zygote, made, out, kills, draw):
    """Kill one run at random instants, resume it each time, then let it end. Returns how many kills struck."""
    folder, argv, expected = made
    home, struck = folder / f"{out}.running", 0
    for _ in range(kills):
        resumed = ["--resume"] if home.exists() else []
        now = (home / "log.jsonl").read_bytes().count(b"\n") if (home / "log.jsonl").exists() else 0
        lines = draw.randrange(min(now, len(expected.log) - 2), len(expected.log) - 1)
        ended = zygote.run([*argv, "--out", out, *resumed], folder,
                           strike=at_line(home / "log.jsonl", lines, draw.random() * 0.03, signal.SIGKILL))  # fmt: skip
        assert ended.status in (0, -signal.SIGKILL), ended.said
        if ended.status == 0:
            break
        struck += 1
        assert not (folder / out).exists()
    if not (folder / out).exists():
        ended = zygote.run([*argv, "--out", out, *(["--resume"] if home.exists() else [])], folder)
        assert ended.status == 0, ended.said
    found = result(folder / out)
    assert found.log == expected.log and found.files == expected.files
    assert_clean(folder / out)
    shutil.rmtree(folder / out)
    return struck


@pytest.mark.parametrize(
    "made, kills",
    [(kind, 2 if kind is KINDS[0] else 1) for kind in KINDS if kind[0] != "pseudo"],
    ids=lambda it: str(it),
)
def test_killed_at_random_instants(zygote, whole, made, kills):
    """A handful here; many more of every kind in test_killed_200_times."""
    draw = random.Random(str(made))
    struck, chain = 0, 0
    while struck < kills:
        struck += killed(zygote, whole(*made), f"killed-{chain}", kills - struck, draw)
        chain += 1
        assert chain < 12


@pytest.mark.slow
def test_killed_200_times(zygote, whole):
    draw = random.Random(200)
    struck, chain = 0, 0
    while struck < 200:
        struck += killed(zygote, whole(*KINDS[chain % len(KINDS)]), f"long-{chain}", min(10, 200 - struck), draw)
        chain += 1


@pytest.mark.parametrize(
    "task, watch, at",
    [("contrastive", "save:6", 4), ("contrastive", "finish", 9), ("scored", "finish", 1), ("tag", "finish", 3)],
)
def test_killed_while_it_writes(zygote, whole, task, watch, at):
    """In a checkpoint, while the averages are scored, and while the finished folder is written."""
    folder, argv, expected = whole(task)
    ended = zygote.run([*argv, "--out", "cut"], folder, fault={"kind": "kill", "at": at, "watch": watch})
    assert ended.status == -signal.SIGKILL and not (folder / "cut").exists(), ended.said
    ended = zygote.run([*argv[:2], "--resume", "cut"], folder)
    assert ended.status == 0 and "resumed at step" in ended.said, ended.said
    assert result(folder / "cut") == expected
    assert_clean(folder / "cut")
    shutil.rmtree(folder / "cut")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["contrastive", "scored"])
def test_killed_at_every_write_of_the_end(zygote, whole, task):
    folder, argv, expected = whole(task)
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
        at += 1
    assert at > 20


def test_a_signal_leaves_a_checkpoint(zygote, whole):
    number, code = signal.SIGTERM, 143
    folder, argv, expected = whole("contrastive")
    home = folder / "stopped.running"
    ended = zygote.run([*argv, "--out", "stopped"], folder, strike=at_line(home / "log.jsonl", 6, 0, number))
    assert ended.status == code and "Traceback" not in ended.said, ended.said
    last = int(sorted((home / "checkpoints").glob("step-*"))[-1].name.removeprefix("step-"))
    assert f"checkpoint stopped.running/checkpoints/step-{last:07d}" in ended.said
    ended = zygote.run([*argv[:2], "--resume", "stopped"], folder)
    assert ended.status == 0 and f"resumed at step {last}" in ended.said, ended.said
    assert result(folder / "stopped") == expected
    shutil.rmtree(folder / "stopped")


def test_what_changed_is_refused_with_a_list(zygote, whole):
    folder, argv, _ = whole("contrastive")
    ended = zygote.run([*argv, "--out", "part"], folder, fault={"kind": "kill", "at": 3, "watch": "save:6"})
    assert ended.status == -signal.SIGKILL
    data = folder / "pairs.jsonl"
    before = data.read_bytes()

    def refused(*flags, says):
        ended = zygote.run([*argv, "--out", "part", "--resume", *flags], folder)
        assert ended.status == 2 and "cannot be resumed" in ended.said and "Traceback" not in ended.said, ended.said
        assert all(words in ended.said for words in says), ended.said

    refused("--lr", "2e-3", says=["1 thing(s)", "recipe: lr = 0.002 (was 0.001)"])
    refused("--dims", "32", "--symmetric", says=["2 thing(s)", "dims = [32] (was [32, 16])", "symmetric = true"])
    data.write_bytes(before + b'{"anchor": "one", "positive": "more"}\n')
    refused(says=["training data: "])
    data.write_bytes(before)
    ended = zygote.run(["fit", "scored", "--resume", "part"], folder)
    assert ended.status == 2 and "its task is 'contrastive', not 'scored'" in ended.said
    ended = zygote.run(["fit", "contrastive", "--resume", "part"], folder)
    assert ended.status == 0, ended.said
    assert result(folder / "part") == result(folder / "whole")
