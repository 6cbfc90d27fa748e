"""How much memory a command holds at once, and synthetic texts for it, all different."""

import os
import random
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"
CHILD = """
import sys
from embedtune.cli import run
code = run(sys.argv[1:])
with open("/proc/self/status") as status:
    kib = next(line.split()[1] for line in status if line.startswith("VmHWM"))
print(kib, file=sys.stderr)
sys.exit(code)
"""


def peak(argv: list[str], cwd: Path) -> float:
    """Run a command in a process of its own; the most memory (MB, resident) that it had at once until its end."""
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", CHILD, *argv], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode in (0, 3), done.stderr  # 3: the verdict of a judge may be REGRESSION
    return int(done.stderr.splitlines()[-1]) * 1024 / 1e6


def words(count: int = 5_000) -> list[str]:
    """So many made-up words, the same ones at any time."""
    draw = random.Random("words")
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    made = dict.fromkeys("".join(draw.choices(syllables, k=draw.choice((2, 3, 4)))) for _ in range(2 * count))
    return list(made)[:count]


def texts(count: int, seed: int = 0):
    """Lines of about 80 bytes; no two are alike, for each holds its number in words."""
    known, draw = words(), random.Random(seed)
    for number in range(count):
        own = [known[number // 5_000**place % 5_000] for place in range(2)]
        yield " ".join([*draw.choices(known, k=9), *own])
