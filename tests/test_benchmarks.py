"""The arithmetic that benchmarks decide by, and that the script for GPUs runs."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))  # the guard sets it when imported
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    return importlib.import_module


def test_the_guard_takes_the_middle_turn(script):
    guard = script("guard")
    turns = [(1.0, 3.0), (3.0, 3.0), (1.5, 9.0)]
    assert guard.ratio_of(turns) == 3.0
    assert guard.judge(turns, recorded=3.0) == guard.Verdict(3.0, 0.0, True)


@pytest.mark.parametrize(("ours", "ok"), [(0.8, True), (1.0, True), (1.149, True), (1.151, False), (1.25, False)])
def test_more_than_fifteen_percent_slower_fails(script, ours, ok):
    guard = script("guard")
    verdict = guard.judge([(ours, 3.0), (2 * ours, 6.0)], recorded=3.0)
    assert verdict.ok is ok
    assert verdict.slower == pytest.approx(ours - 1)


def test_a_machine_that_is_slower_as_a_whole_passes(script):
    assert script("guard").judge([(10.0, 30.0)], recorded=3.0).ok


def test_work_is_slowed_by_a_quarter_of_its_own_time(script, monkeypatch):
    guard = script("guard")
    clock = iter([0.0, 0.0, 8.0, 9.0, 9.9, 10.0, 10.0])
    monkeypatch.setattr(guard.time, "process_time", lambda: next(clock))
    assert guard.seconds(guard.slowed(lambda: None)) == 10.0


def test_a_slow_turn_is_measured_once_more(script, monkeypatch, capsys):
    guard = script("guard")
    given = iter([[(1.3, 3.0)], [(1.0, 3.1)]])
    monkeypatch.setattr(guard, "measured", lambda pair, turns: next(given))
    assert guard.check("mlm", (None, None), 3.0, 9)
    monkeypatch.setattr(guard, "measured", lambda pair, turns: [(1.3, 3.0)])
    assert not guard.check("mlm", (None, None), 3.0, 9)
    assert "FAILED mlm" in capsys.readouterr().out


def test_without_a_record_the_guard_warns_and_lets_pass(script, tmp_path, monkeypatch, capsys):
    guard = script("guard")
    monkeypatch.setattr(sys, "argv", ["guard.py", "--file", str(tmp_path / "none.json")])
    monkeypatch.setattr(guard, "hardware_class", lambda: "abacus")
    assert guard.main() == 0
    assert "no ratios are recorded for abacus" in capsys.readouterr().err


def test_the_gap_of_curves(script):
    curves = script("curves")
    dev = np.column_stack([np.arange(40.0), np.full(40, 2.0), np.arange(40)])
    a = curves.Curve(np.array([4.0, 2.0, 0.0]), dev, "fp32")
    assert curves.smoothed(a.losses, 2).tolist() == [3.0, 1.0]
    assert curves.smoothed(a.losses, 20).tolist() == [2.0]
    found = curves.gap(a, a._replace(losses=np.array([4.0, 2.5, 0.5]), dev=dev + [0.1, 0, 0]), 2)
    assert (found.largest, found.mean) == (0.5, 0.375)
    assert found.dev.value == pytest.approx(0.05) and found.dev.clear


@pytest.mark.slow
def test_the_script_for_gpus_runs_at_tiny_sizes(real_data):
    data = real_data("medquad/medquad.jsonl").parents[1]
    real_data("medical/data.txt")
    env = {**os.environ, "EMBEDTUNE_TEST_DATA": str(data)}
    command = [sys.executable, str(FOLDER / "gpu.py"), "--tiny"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("bert-base, mlm", "modernbert, contrastive", "compiled", "seed 0, slow and fast"):
        assert name in done.stdout
