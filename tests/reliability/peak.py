"""How much memory a command takes at its highest, and rows for it to read: what "flat in the size of the data" means.

A command runs in a process of its own, which says at its end what the kernel counted: VmHWM, the most that was ever
resident, mapped pages of files included. (ru_maxrss would begin at what the parent had.)
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).parents[2] / "src"
WORDS, LONGEST = 5_000, 11  # of the vocabulary; of a line, before the words that number it
DOCUMENT = 8  # lines between two blank ones
BLOCK = 10_000  # lines drawn at once
RUN = """
import sys
from embedtune.cli import run
code = run(sys.argv[1:])
if code not in (0, 3):  # 3: the verdict of a tiny run may be REGRESSION
    sys.exit(f"exit code {code}")
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
SHARE, SLACK = 1.10, 64.0  # what ten times the data may take: so many times as much, and so many MB


def peak(argv: list[str], cwd: Path) -> float:
    """The most memory, in MB, that `embedtune` with these arguments holds."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
        # Each thread has a pool of its own, and how many there are is a matter of the machine, not of the data.
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
    }
    done = subprocess.run([sys.executable, "-c", RUN, *argv], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return int(done.stdout.split()[-2]) / 1024


def lines(count: int, seed: int = 0):
    """So many sentences of 60 to 100 bytes, all different, the first ones the same whatever the count."""
    draw = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.choice((2, 3, 3, 4)))) for _ in range(WORDS)]
    for first in range(0, count, BLOCK):
        drawn = np.random.default_rng((seed, first)).integers(0, WORDS, (BLOCK, LONGEST)).tolist()
        for number in range(first, min(first + BLOCK, count)):
            own = [words[number % WORDS], words[number // WORDS % WORDS]]
            yield " ".join([*own, *(words[n] for n in drawn[number - first][: 7 + number % 5])]).capitalize() + "."


def write_text(path: Path, count: int) -> None:
    """Lines in documents, as .txt."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(lines(count)):
            file.write(("\n" if number and number % DOCUMENT == 0 else "") + line + "\n")


def write_pairs(path: Path, count: int) -> None:
    """Pairs of two lines each, as .jsonl."""
    found = lines(2 * count, seed=1)
    with path.open("w", encoding="utf-8") as file:
        for anchor, positive in zip(found, found):
            file.write(json.dumps({"anchor": anchor, "positive": positive}) + "\n")
