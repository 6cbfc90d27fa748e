"""Cases of the targets of docs/reliability.md: counted where they happen, kept as JSON lines, shown as one table.

Lines are kept only where RELIABILITY_RESULTS names a file, as `make reliability` does: one for each test that ended.
A test that has a line is not run again while the source is the same, so a long run can be stopped and taken up again;
RELIABILITY_PART=i/n takes every n-th of the tests, so several machines can share it.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TARGETS = {
    "A1": "killed at a random instant, resumed: as if uninterrupted",
    "A2": "stopped and resumed many times in one run",
    "A3": "killed at every call that changes the disk",
    "A4": "a disk that is full or fails, at every call",
    "A6": "damaged checkpoints: found, passed over, said",
    "A7": "the order in which things reach the disk",
    "A9": "something changed: resuming is refused and says what",
    "A10": "resuming far into the data touches one batch",
    "A12": "the same command twice: the same bytes",
    "A13": "NaN and Inf: found in the step, never written",
    "A14": "out of memory: smaller micro-batches, the same result",
    "A15": "SIGTERM and SIGINT: a checkpoint, then as if uninterrupted",
    "A16": "several processes: as one, whatever befalls one of them",
    "B1": "malformed files through every command that reads one",
    "B4": "memory: ten times the rows, and the same peak",
    "C3": "inputs changed at random: read, or refused with the right error",
    "D1": "connections that send slowly hold up nobody",
    "D2": "more requests than can be answered: 200, or 429 with a time to come back",
    "D4": "clients that hang up: what they had waiting is not computed, and nothing of them is left",
    "D5": "a text's vector is the one that it has alone, whatever shares its batch",
    "D7": "requests that are broken, or made from the schema: answered as it says, or hung up on",
    "D8": "many requests: memory, open files and threads stay level",
    "E1": "bulk embedding and an index, killed at every call",
}
NOW = {"cases": 0, "remarks": []}  # of the test that is running


def count(cases: int = 1) -> None:
    """So many more cases of the running test have passed."""
    NOW["cases"] += cases


def remark(text: str) -> None:
    """A figure that is reported, and asserted by nobody."""
    NOW["remarks"].append(text)


def results() -> Path | None:
    """Where lines are kept."""
    name = os.environ.get("RELIABILITY_RESULTS")
    return Path(name) if name else None


def part() -> tuple[int, int]:
    """Which of how many parts is run."""
    number, of = map(int, os.environ.get("RELIABILITY_PART", "1/1").split("/"))
    assert 1 <= number <= of, "PART=i/n with i from 1 to n"
    return number, of


def code() -> str:
    """What the source and these tests are, so that results of another one do not count."""
    paths = [*(ROOT / "src").rglob("*.py"), *Path(__file__).parent.glob("*.py")]
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:12]


def lines(path: Path) -> list[dict]:
    """The results of the source as it is; a line torn by a kill is left out."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    now = code()
    return [record for record in found if record["code"] == now]


def note(target: str, test: str, failed: bool, seconds: float) -> None:
    """Write down a test that ended; one that counted nothing was one case."""
    path = results()
    if path is None:
        return
    cases = (NOW["cases"] + failed) or 1
    record = {"target": target, "test": test, "cases": cases, "failed": failed, "seconds": round(seconds, 1)}
    with path.open("a") as file:
        file.write(json.dumps({**record, "remarks": NOW["remarks"], "code": code()}) + "\n")


def table(records: list[dict]) -> str:
    """Targets, cases, failures; a test that failed and later passed is a failure all the same."""
    rows = ["| target | what | cases | failures | seconds |", "|---|---|---|---|---|"]
    for target in sorted({r["target"] for r in records}, key=lambda name: (name[0], int(name[1:]))):
        mine = [r for r in records if r["target"] == target]
        cases, failed, seconds = (sum(r[name] for r in mine) for name in ("cases", "failed", "seconds"))
        rows.append(f"| {target} | {TARGETS[target]} | {cases:,} | {failed:,} | {seconds:,.0f} |")
    return "\n".join([*rows, *(text for r in records for text in r["remarks"])])


if __name__ == "__main__":
    print(table(lines(Path(sys.argv[1]))))
