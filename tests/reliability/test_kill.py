"""kill -9 at any instant, resume, and the end is that of the uninterrupted run, bit for bit."""

import random
import shutil
import signal

import pytest

from reliability import ledger
from reliability.conftest import (
    RUN,
    assert_clean,
    at_line,
    interrupted,
    place,
    result,
    strike_at_random,
    uninterrupted,
)  # fmt: skip

KINDS = [("bert", "fp32"), ("bert", "bf16"), ("minilm", "bf16"), ("modernbert", "fp32")]
LONG = [pytest.param(block, marks=pytest.mark.slow) for block in range(1, 11)]


@pytest.mark.target("A1")
@pytest.mark.parametrize("kind, precision", KINDS)
@pytest.mark.parametrize("block", [0, *LONG])
def test_killed_at_random_instants(zygote, reference, kind, precision, block):
    """Five kills of each kind, 20 in all: log, scores and weights are the same. A hundred more in the long run."""
    strike_at_random(zygote, reference(kind, precision), f"{kind}-{precision}-{block}", 10 if block else 5)


@pytest.mark.target("A1")
def test_killed_while_lines_are_tokenised_on_the_fly(zygote, tiny_model, tmp_path):
    folder = place(tmp_path / "run", tiny_model("minilm"))
    whole = uninterrupted(zygote, folder, [*RUN, "--precision", "fp32", "--on-the-fly", "True"])
    assert "tokenised on the fly" in whole.ended.said
    strike_at_random(zygote, whole, "on-the-fly", 3)


@pytest.mark.slow
@pytest.mark.target("A15")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_at_random_instants(zygote, reference, number):
    strike_at_random(zygote, reference(), f"stopped-{number}", 20, number)


@pytest.mark.target("A15")
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_checkpoint(zygote, reference, number, code):
    folder, argv, whole = reference().folder, reference().argv, reference().left
    for lines in (2, 30):
        out = f"stopped-{number}-{lines}"
        home = folder / f"{out}.running"
        ended = zygote.run([*argv, "--out", out], folder, strike=at_line(home / "log.jsonl", lines, 0, number))
        assert ended.status == code, ended.said
        assert "Traceback" not in ended.said
        assert f"stopped by signal {int(number)}; checkpoint {out}.running/checkpoints/step-" in ended.said
        assert "--resume" in ended.said
        # The step that was running is in the checkpoint: nothing was lost.
        last = int(sorted((home / "checkpoints").glob("step-*"))[-1].name.removeprefix("step-"))
        assert f"step-{last:07d}" in ended.said
        ended = zygote.run(["fit", "mlm", "--resume", out], folder)
        assert ended.status == 0 and f"resumed at step {last}" in ended.said, ended.said
        assert result(folder / out) == whole
        assert_clean(folder / out)
        ledger.count()


@pytest.mark.target("A15")
def test_a_second_signal_leaves_at_once(zygote, reference):
    folder, argv = reference().folder, reference().argv
    fault = {"kind": "signal-twice", "at": 5, "watch": "save:6"}
    ended = zygote.run([*argv, "--out", "twice"], folder, fault=fault)
    assert ended.status == 143 and "checkpoint" not in ended.said, ended.said
    assert not (folder / "twice.running/checkpoints/step-0000006").exists()
    ended = zygote.run([*argv, "--out", "twice", "--resume"], folder)
    assert ended.status == 0, ended.said


@pytest.mark.target("A2")
def test_ten_resumes_of_one_run(zygote, reference):
    """Stopped again and again, several times inside one epoch, some right after resuming."""
    folder, argv, whole = reference().folder, reference().argv, reference().left
    log = folder / "often.running/log.jsonl"
    resumes, lines = 0, 0
    for more in (1, 1, 1, 2, 5, 1, 7, 6, 1, 9):
        resumed = ["--resume"] if log.exists() else []
        lines = more + (log.read_bytes().count(b"\n") if resumed else 0)
        ended = zygote.run([*argv, "--out", "often", *resumed], folder, strike=at_line(log, lines, 0, signal.SIGTERM))
        if ended.status == 0:
            break
        assert ended.status == 143, ended.said
        resumes += 1
    if ended.status:
        ended = zygote.run([*argv, "--out", "often", "--resume"], folder)
    assert ended.status == 0 and resumes >= 6, ended.said
    assert result(folder / "often") == whole


@pytest.mark.slow
@pytest.mark.target("A2")
@pytest.mark.parametrize("times", range(1, 11))
def test_so_many_kills_in_one_run(zygote, reference, times):
    for kind in KINDS:
        interrupted(zygote, reference(*kind), f"many-{times}", times, random.Random(times), signal.SIGKILL)
        ledger.count()


@pytest.mark.target("A1")
def test_a_run_from_scratch_resumes_with_the_base_it_was_started_from(zygote, reference):
    """Killed in its first step, when its own tokenizer and first weights lie in OUT.running, and at the very end."""
    folder, argv = reference().folder, reference().argv
    config = '{"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, '
    (folder / "small.json").write_text(config + '"intermediate_size": 64, "max_position_embeddings": 64}')
    argv = [*argv, "--scratch", "--model", "small.json", "--vocab-size", "250", "--epochs", "2"]
    assert zygote.run([*argv, "--out", "scratch"], folder).status == 0
    whole = result(folder / "scratch")
    for watch in ("save:3", "save:9", "finish"):
        ended = zygote.run([*argv, "--out", "cut"], folder, fault={"kind": "kill", "at": 2, "watch": watch})
        assert ended.status == -signal.SIGKILL, ended.said
        ended = zygote.run(["fit", "mlm", "--resume", "cut"], folder)
        assert ended.status == 0, ended.said
        assert result(folder / "cut") == whole
        assert_clean(folder / "cut")
        shutil.rmtree(folder / "cut")
        ledger.count()
