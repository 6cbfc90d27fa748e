"""Training in several processes: it ends as one process does, and nothing that befalls one of them hangs the others."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from conftest import corpus
from reliability import ledger
from reliability.conftest import RUN, SOURCE, Whole, assert_clean, place, result, witnessed
from reliability.test_kill_pairs import write_pairs
from serve.serving import free_port

SAME = 1e-5
SOON = 20  # seconds in which all processes have ended after one of them has; a machine with other work is slow
SHARED = "--model model --lr 5e-5 --checkpoint-steps 4 --eval-steps 99 --log-steps 1 --precision fp32 --seed 3"
# Of each: the model, the processes, the rows of the smallest batch, and the command. Batches are odd, and in some the
# last is too small for all processes to have a part: a row of labels or text goes to one, a pair's two texts to two.
# The rate is the usual one: where a gradient is near zero Adam makes 2e-5 of rounding at 3e-4, in one process as well.
TASKS = {
    "mlm": ("bert", 2, 1, "fit mlm text.txt --batch 13 --max-tokens 64 --dev-rows 16 --max-steps 12"),
    "lines": ("bert", 2, 1, "fit mlm text.txt --batch 13 --max-tokens 64 --dev-rows 16 --max-steps 12"
              " --on-the-fly True"),
    "fresh head": ("minilm", 2, 13, "fit mlm text.txt --batch 13 --max-tokens 64 --dev-rows 16 --max-steps 6"),
    "contrastive": ("minilm", 3, 1, "fit contrastive plain.jsonl --batch 53 --epochs 2 --symmetric"),
    "negatives": ("modernbert", 2, 3, "fit contrastive pairs.jsonl --batch 17 --max-tokens 256 --length-penalty 1"),
    "scored": ("mpnet", 2, 12, "fit scored scored.jsonl --batch 13 --max-tokens 128"),
    "classify": ("bert", 2, 1, "fit classify labels.jsonl --batch 10 --epochs 1 --weights balanced"),
    "regress": ("minilm", 2, 2, "fit regress scored.jsonl --batch 11 --epochs 1 --max-tokens 128"),
    "tag": ("modernbert", 3, 2, "fit tag tags.jsonl --batch 11 --epochs 1 --max-tokens 64 --weights balanced"),
}  # fmt: skip


def files_of(folder, model):
    """A folder to run in, with data for every task."""
    place(folder, model)
    write_pairs(folder)
    tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    tokenizer.enable_truncation(64)  # as many models have it; their tokenizer forgets it when it is called
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    pairs = [json.loads(line) for line in (folder / "more.jsonl").read_text().splitlines()]
    plain = [{"anchor": row["anchor"], "positive": row["positive"]} for row in pairs]
    (folder / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    return folder


def gap(one, other):
    """The largest difference of two folders' weights."""
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    # The gradient of a key's bias is zero but for rounding, which Adam scales up; nothing depends on that bias.
    return max(float(np.abs(a[name] - b[name]).max()) for name in a if "key.bias" not in name)


def said_once(ended, *words):
    """All processes end alike, and the first one says why, in words."""
    assert len({each.status for each in ended}) == 1, ended
    for word in words:
        assert word in ended[0].said, ended[0].said
    assert "Traceback" not in ended[0].said and not any(each.said for each in ended[1:]), ended


@pytest.mark.target("A16")
@pytest.mark.parametrize("task", TASKS)
def test_several_processes_end_as_one_does(zygote, tiny_model, tmp_path, task):
    """The same rows in the same order, the same log, and weights that are the same to rounding."""
    kind, count, fewest, command = TASKS[task]
    folder = files_of(tmp_path / "run", tiny_model(kind))
    argv = shlex.split(f"{command} {SHARED}")
    one = zygote.run([*argv, "--out", "one"], folder)
    ended = zygote.run_in(count, [*argv, "--out", "several"], folder)
    assert one.status in (0, 3), one.said
    said_once(ended, "several/ holds the model")
    assert ended[0].status == one.status
    rows, several = witnessed(folder, "one")[0], witnessed(folder, "several")[0]
    assert list(rows.values()) == list(several.values())
    assert min(len(each["rows"]) for each in rows.values()) == fewest
    assert gap(folder / "one", folder / "several") <= SAME
    for a, b in zip(result(folder / "one").log, result(folder / "several").log, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=SAME)
    assert json.loads((folder / "several" / "run.json").read_text())["processes"] == str(count)
    assert_clean(folder / "several")
    ledger.count()


# ---- kills and signals


@pytest.fixture(scope="module")
def pair(zygote, tiny_model, tmp_path_factory):
    """The uninterrupted run in two processes."""
    folder, argv = place(tmp_path_factory.mktemp("pair"), tiny_model("bert"), lines=120), [*RUN, "--precision", "fp32"]
    ended = zygote.run_in(2, [*argv, "--out", "whole"], folder)
    said_once(ended, "whole/ holds the model")
    return Whole(folder, argv, ended[0], result(folder / "whole"), witnessed(folder, "whole"))


def struck(zygote, pair, out, ranks, number, lines):
    """Go on with a run until the log has so many lines, then signal these processes; how all ended, and how soon."""
    log, at = pair.folder / f"{out}.running" / "log.jsonl", []
    resumed = ["--resume"] if log.parent.exists() else []

    def strike(pids, gone):
        while not gone.is_set():
            if log.is_file() and log.read_bytes().count(b"\n") >= lines:
                at.append(time.monotonic())
                for rank in ranks:
                    with suppress(ProcessLookupError):
                        os.kill(pids[rank], number)
                return
            time.sleep(0.001)

    ended = zygote.run_in(2, [*pair.argv, "--out", out, *resumed], pair.folder, strike=strike)
    assert at and time.monotonic() - at[0] < SOON
    assert not any("Traceback" in each.said for each in ended), ended
    return ended


@pytest.mark.target("A16")
def test_killed_or_stopped_and_resumed_as_if_uninterrupted(zygote, pair):
    """SIGKILL to one, to the first, to both; SIGTERM to one, SIGINT to both: none hangs, and the end is the same."""
    for ranks, lines in (([1], 3), ([0], 12), ([0, 1], 18)):
        ended = struck(zygote, pair, "struck", ranks, signal.SIGKILL, lines)
        for rank, each in enumerate(ended):
            if rank in ranks:
                assert each.status == -signal.SIGKILL
            else:  # it says that the other is gone, and how to go on
                assert each.status == 2 and f"process {rank} of 2: cannot reach the others any more" in each.said
                assert "--resume" in each.said
        ledger.count()
    for ranks, number, code, lines in (([1], signal.SIGTERM, 143, 22), ([0, 1], signal.SIGINT, 130, 28)):
        ended = struck(zygote, pair, "struck", ranks, number, lines)
        said_once(ended, f"stopped by signal {int(number)}; checkpoint struck.running/checkpoints/step-")
        assert ended[0].status == code
        ledger.count()
    ended = zygote.run_in(2, [*pair.argv, "--out", "struck", "--resume"], pair.folder)
    said_once(ended, "resumed at step", "struck/ holds the model")
    assert result(pair.folder / "struck") == pair.left
    assert witnessed(pair.folder, "struck") == pair.witnessed
    assert_clean(pair.folder / "struck")


@pytest.mark.slow
@pytest.mark.target("A16")
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_random_lines(zygote, pair, seed):
    """One process or both, four times in one run."""
    draw, out = np.random.default_rng(seed), f"random-{seed}"
    for lines in np.sort(draw.integers(1, 30, 4)):
        ranks = [[0], [1], [0, 1]][draw.integers(3)]
        struck(zygote, pair, out, ranks, signal.SIGKILL, int(lines))
        ledger.count()
    said_once(zygote.run_in(2, [*pair.argv, "--out", out, "--resume"], pair.folder), "resumed at step")
    assert result(pair.folder / out) == pair.left and witnessed(pair.folder, out) == pair.witnessed


@pytest.mark.target("A16")
def test_another_number_of_processes_is_refused(zygote, pair):
    struck(zygote, pair, "other", [0, 1], signal.SIGKILL, 4)
    for count in (1, 3):
        ended = zygote.run_in(count, [*pair.argv, "--out", "other", "--resume"], pair.folder)
        said_once(ended, "cannot be resumed: 1 thing(s) changed", f"processes: {count} (was 2)")
        assert ended[0].status == 2
        ledger.count()
    shutil.rmtree(pair.folder / "other.running")


@pytest.mark.target("A16")
@pytest.mark.parametrize(
    "flags, says",
    [
        ("--minutes 0.001 --epochs 999", "training ended: 0.001 minutes are over"),
        ("--patience 1 --eval-steps 2 --lr 1e-12 --epochs 9", "did not get better in 1 scorings"),
    ],
)
def test_what_the_clock_and_the_scores_decide_holds_for_all(zygote, pair, flags, says):
    """From a recipe's file; and checkpoints by the clock."""
    recipe = 'task = "mlm"\ntrain = "text.txt"\nmodel = "model"\ndev_rows = 16\n[loop]\nbatch = 16\n'
    (pair.folder / "recipe.toml").write_text(recipe)
    ended = zygote.run_in(2, ["fit", "mlm", "recipe.toml", *flags.split(), "--out", "short", "--force"], pair.folder)
    said_once(ended, says, "short/ holds the model")
    ledger.count()


VARIANTS = {  # what else a training can be: each to the same end as one process
    "lora": "fit classify labels.jsonl --lora 4 --batch 10 --epochs 1",
    "freeze": "fit classify labels.jsonl --freeze --batch 10 --epochs 1",
    "scratch": "fit mlm text.txt --scratch --vocab-size 250 --batch 13 --dev-rows 16 --max-steps 6",
    "words": "fit mlm text.txt --add-words 5 --batch 13 --dev-rows 16 --max-steps 6",
    "merge": "fit contrastive pairs.jsonl --dims 32 16 --guide base --merge auto --batch 15 --max-steps 6",
    "pseudo": "fit scored unscored.jsonl --batch 13 --max-steps 6",
    "on": "fit classify more.jsonl --continue-from old --replay 0.5 --max-steps 6",
    "try": "fit classify labels.jsonl --try lr=3e-4,1e-4 --batch 10 --epochs 1",
}


@pytest.mark.slow
@pytest.mark.target("A16")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_training_ends_as_in_one_process(zygote, tiny_model, tmp_path, name):
    folder = files_of(tmp_path / "run", tiny_model("bert"))
    (folder / "small.json").write_text('{"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, '
                                       '"num_attention_heads": 2, "intermediate_size": 64}')  # fmt: skip
    shared = shlex.split(SHARED)
    if name == "on":
        before = ["fit", "classify", "labels.jsonl", *shared, "--max-steps", "4", "--out", "old"]
        assert zygote.run(before, folder).status in (0, 3)
        shared = shared[2:]
    if name == "scratch":
        shared[1] = "small.json"
    argv = [*shlex.split(VARIANTS[name]), *(shared if name != "try" else shared[:2] + shared[4:])]
    one = zygote.run([*argv, "--out", "one"], folder)
    ended = zygote.run_in(2, [*argv, "--out", "several"], folder)
    assert one.status in (0, 3), one.said
    said_once(ended, "several/ holds the model")
    assert ended[0].status == one.status and gap(folder / "one", folder / "several") <= SAME
    assert_clean(folder / "several")
    ledger.count()


# ---- memory and numbers


@pytest.mark.target("A16")
@pytest.mark.parametrize("task, at", [("mlm", [2]), ("contrastive", [1, 2]), ("negatives", [2])])
def test_one_process_out_of_memory(zygote, tiny_model, tmp_path, task, at):
    """It halves its budget, and the others theirs after it; the result is the same. After the gathering too."""
    kind, count, _, command = TASKS[task]
    folder = files_of(tmp_path / "run", tiny_model(kind))
    argv = shlex.split(f"{command} {SHARED} --max-steps 4")
    whole = zygote.run_in(count, [*argv, "--out", "whole"], folder)
    said_once(whole, "whole/ holds")
    fault = {"kind": "memory", "step": 1, "at": at, "rank": 1}
    ended = zygote.run_in(count, [*argv, "--out", "halved"], folder, fault=fault)
    said_once(ended, "step 1: out of memory in another process, token budget cut to")
    assert gap(folder / "whole", folder / "halved") <= SAME
    assert "out of memory in another process" in (folder / "halved" / "README.md").read_text()
    ledger.count()


@pytest.mark.target("A16")
@pytest.mark.parametrize("task", ["classify", "contrastive"])
def test_one_process_for_which_a_row_is_too_much(zygote, tiny_model, tmp_path, task):
    """It says so and ends; the others say that they cannot go on. The checkpoint before stays."""
    kind, count, _, command = TASKS[task]
    folder = files_of(tmp_path / "run", tiny_model(kind))
    argv = shlex.split(f"{command} {SHARED} --checkpoint-steps 1 --out out")
    ended = zygote.run_in(count, argv, folder, fault={"kind": "memory", "step": 2, "rank": 1})
    assert [each.status for each in ended] == [2] * count and ended[0].seconds < SOON
    assert f"process 1 of {count}: step 2: out of memory, though the batch is taken row by row" in ended[1].said
    assert "cannot reach the others any more" in ended[0].said
    assert not any("Traceback" in each.said for each in ended)
    assert [path.name for path in (folder / "out.running" / "checkpoints").glob("step-*")][-1] == "step-0000002"
    ledger.count()


@pytest.mark.target("A16")
def test_what_is_not_finite_in_one_process_is_left_out_by_all(zygote, tiny_model, tmp_path):
    kind, count, _, command = TASKS["classify"]
    folder = files_of(tmp_path / "run", tiny_model(kind))
    argv = shlex.split(f"{command} {SHARED} --max-steps 4")
    ends = []
    for out, rank in (("first", 0), ("second", 1)):
        ended = zygote.run_in(count, [*argv, "--out", out], folder, fault={"kind": "nan", "step": 2, "rank": rank})
        said_once(ended, "step 2: loss", "is not finite", "update left out")
        ends.append(load_file(folder / out / "model.safetensors"))
        ledger.count()
    assert all(np.array_equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.target("A16")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_weight_that_is_not_finite_in_one_process_is_heard_of_by_all(zygote, tiny_model, tmp_path, rank):
    """No row reads it, so the others have it from that process alone; they stop together, their checkpoint is sound."""
    kind, count, _, command = TASKS["classify"]
    folder = files_of(tmp_path / "run", tiny_model(kind))
    argv = shlex.split(f"{command} {SHARED} --checkpoint-steps 1 --out out")
    ended = zygote.run_in(count, argv, folder, fault={"kind": "weight", "step": 2, "rank": rank})
    said_once(ended, "step 2: loss nan (or a weight)", "training diverged")
    assert ended[0].status == 2 and max(each.seconds for each in ended) < 3 * SOON
    newest = sorted((folder / "out.running" / "checkpoints").glob("step-*"))[-1]
    weights = load_file(newest / "state.safetensors")
    assert all(np.isfinite(each).all() for each in weights.values())
    ledger.count()


# ---- mistakes


@pytest.mark.target("A16")
@pytest.mark.parametrize(
    "command, says",
    [
        ("fit mlm nothing.txt --model model", "nothing.txt"),
        ("fit mlm nothing.toml", "nothing.toml"),
        ("fit classify plain.jsonl --model model", "plain.jsonl"),
        ("fit mlm text.txt --model model --batch 0", "batch must be at least 1"),
        ("fit mlm text.txt --model model --resume", "there is nothing to resume"),
        ("fit mlm text.txt --nonsense 1", "nonsense"),
        ("run text.txt --model model", "runs in one process, not in 2"),
        ("embed model text.txt", "runs in one process, not in 2"),
    ],
)
def test_a_mistake_is_said_once_and_nothing_is_written(zygote, tiny_model, tmp_path, command, says):
    folder = files_of(tmp_path / "run", tiny_model("bert"))
    before = sorted(path.name for path in folder.iterdir())
    ended = zygote.run_in(2, [*shlex.split(command), "--out", "out"], folder)
    said_once(ended, says)
    assert ended[0].status == 2
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith("said-")) == before
    ledger.count()


@pytest.mark.target("A16")
def test_processes_that_read_other_data_are_refused(zygote, tiny_model, tmp_path):
    """As on machines that do not share a disk."""
    folder, apart = (files_of(tmp_path / name, tiny_model("bert")) for name in ("here", "there"))
    (apart / "text.txt").write_text(corpus(160, seed=9))
    out = tmp_path / "out"
    argv = shlex.split(f"fit mlm text.txt --model model --max-steps 4 --out {out}")
    ended = zygote.run_in(2, argv, folder, fault={"kind": "elsewhere", "to": str(apart), "rank": 1})
    said_once(ended, "this process has not what the first one has", "training data: ")
    assert ended[0].status == 2 and not list(tmp_path.glob("out*"))
    ledger.count()


# ---- torchrun itself


@pytest.mark.target("A16")
def test_torchrun_starts_them_and_passes_a_signal_on(zygote, pair):
    """Started by torchrun, stopped by its SIGTERM with a checkpoint, gone on with to the same end."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*launch, "embedtune", *pair.argv, "--out", "launched"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(command, cwd=pair.folder, env=environment, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)  # fmt: skip
    log = pair.folder / "launched.running" / "log.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_bytes().count(b"\n") >= 4):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert said.count("stopped by signal 15; checkpoint launched.running/checkpoints/step-") == 1, said
    ended = zygote.run_in(2, [*pair.argv, "--out", "launched", "--resume"], pair.folder)
    said_once(ended, "resumed at step", "launched/ holds the model")
    assert result(pair.folder / "launched") == pair.left
    ledger.count()


# ---- how long they wait

ALONE = """
import sys, time
from datetime import timedelta
import torch.distributed  # before the clock runs
from embedtune.errors import Parted
from embedtune.fit import ranks
ranks.START = timedelta(seconds=6)
try:
    with ranks.started():
        time.sleep(8 if ranks.launched()[0] == 0 else 0)  # the first one scores, longer than a start may take
        print(ranks.most([ranks.world()[0]]))
except Parted as error:
    sys.exit(str(error))
"""


@pytest.mark.target("A16")
@pytest.mark.parametrize("there", [[0], [1], [0, 1]])
def test_who_does_not_come_is_waited_for_a_while_and_who_is_there_for_long(there):
    port = free_port()
    given = {**os.environ, "PYTHONPATH": str(SOURCE), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    given |= {"MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    running = [subprocess.Popen([sys.executable, "-c", ALONE], env={**given, "RANK": str(rank)}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in there]  # fmt: skip
    for rank, process in zip(there, running):
        out, err = process.communicate(timeout=300)
        if len(there) == 2:
            assert (process.returncode, out) == (0, "[1.0]\n"), err
        else:
            assert process.returncode == 1 and f"process {rank} of 2: cannot reach the others any more" in err
    ledger.count()
