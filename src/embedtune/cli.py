"""The command line: the only module that prints or exits. Results go to stdout, progress to stderr."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedtune import __version__, recipes
from embedtune.errors import EXIT_BUG, EXIT_FINE, EXIT_USER, Interrupted, UserError, did_you_mean

HELP = """embedtune: turn your own text into an embedding model, and prove that it got better

usage: embedtune COMMAND ... [--flags]       every command has --help

  data check FILE                  the doctor: what is in it, what would be cut or dropped, is it ready
  data example                     write a real data.txt from the docstrings of the Python packages installed here
  fit mlm DATA|RECIPE.toml         masked language modelling on raw lines -> a standard model folder
  refine length MODEL --data FILE  find the direction in which embeddings encode the length of a text

exit codes: 0 fine, 1 a bug of ours, 2 something for you to mend, 130/143 stopped with a checkpoint
"""


@dataclass(frozen=True)
class Place:
    """Where the model goes."""

    # Folder of the finished model; while it is made, everything lives in OUT.running.
    out: str = "finetuned-bert"
    # Continue the run that was stopped or killed (also: --resume OUT).
    resume: bool = False
    # Remove what an unfinished run left and start anew.
    discard: bool = False
    # Replace a finished folder of that name, once the new one is complete.
    force: bool = False
    # Print the result as JSON.
    json: bool = False


@dataclass(frozen=True)
class FitMLM:
    """Masked language modelling on raw lines: the encoder learns the language of your text."""

    recipe: recipes.MLM
    place: Place


@dataclass(frozen=True)
class Check:
    """The doctor: format, encoding, rows, lengths in tokens, what would be cut or dropped and why, duplicates."""

    # The file or folder to look at.
    data: str
    # Model whose tokenizer counts the tokens.
    model: str = "all-MiniLM-L6-v2"
    # Tokens per row beyond which a line is chunked (derived from the model).
    max_length: int | None = None
    # Which column is the text: text=NAME.
    columns: str | None = None
    # Print the result as JSON.
    json: bool = False


@dataclass(frozen=True)
class Example:
    """A real data.txt from the docstrings of the Python packages installed here; a blank line between documents."""

    # Where to write it.
    out: str = "data.txt"
    # Lines at most.
    lines: int = 8000
    # Replace a file of that name.
    force: bool = False


@dataclass(frozen=True)
class Length:
    """The direction in which a model's embeddings encode the length of a text, measured on held-out rows."""

    # Model folder; length_direction.npy, its sidecar and a plot are added to it.
    model: str
    # The text to measure on: a file or folder, larger than memory if need be.
    data: str
    # Which column is the text: text=NAME.
    columns: str | None = None
    # Rows that are not valid UTF-8 text: stop, leave them out, or mend them with U+FFFD.
    bad_rows: recipes.BadRows = "fail"
    # Measure on the first so many rows only.
    rows: int | None = None
    # Arithmetic of the model.
    precision: recipes.Precision = "fp32"
    # Print the result as JSON.
    json: bool = False


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code."""
    signal.signal(signal.SIGTERM, _terminated)
    raise SystemExit(run(list(sys.argv[1:] if argv is None else argv)))


def _terminated(number: int, frame: object) -> None:
    """SIGTERM outside the training loop (which catches it itself): unwind, so that nothing half-made stays."""
    raise Interrupted("stopped by signal 15", 128 + number)


def run(argv: list[str]) -> int:
    """Run a command; returns the exit code. A user's mistake is one message, never a traceback."""
    # Waiting OpenMP threads that spin slow down every other process on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # File names and texts may hold what the terminal's encoding does not.
            stream.reconfigure(errors="backslashreplace")
    try:
        return _dispatch(argv)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER
    except Interrupted as error:
        print(error, file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("stopped by signal 2", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away; keep the interpreter from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FINE
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else EXIT_USER
    except Exception:  # noqa: BLE001 - the last resort: a bug of ours, shown whole
        import traceback

        traceback.print_exc()
        print("this is a bug of embedtune; please report it with the lines above", file=sys.stderr)
        return EXIT_BUG


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return EXIT_FINE if argv else EXIT_USER
    if argv[0] in ("-V", "--version"):
        print(f"embedtune {__version__}")
        return EXIT_FINE
    words, rest = " ".join(argv[:2]), argv[2:]
    if words not in COMMANDS:
        rooms = [name for name in COMMANDS if name.split()[0] == argv[0]]
        if rooms and (len(argv) == 1 or argv[1] in ("-h", "--help")):
            print("\n".join(line for line in HELP.splitlines() if line.startswith(f"  {argv[0]} ")))
            return EXIT_FINE if len(argv) > 1 else EXIT_USER
        raise UserError(
            f"there is no command {words!r}{did_you_mean(words, list(COMMANDS))}",
            fix="embedtune --help lists them",
        )
    COMMANDS[words](rest)
    return EXIT_FINE


def _parse(kind: Any, words: str, argv: list[str], default: Any = None) -> Any:
    import tyro

    options: dict[str, Any] = {} if default is None else {"default": default}
    flat = tyro.conf.configure(tyro.conf.OmitArgPrefixes)(kind)
    return tyro.cli(flat, prog=f"embedtune {words}", args=argv, **options)


def _name_first(argv: list[str], flag: str) -> list[str]:
    """A first word without dashes is the value of `flag`."""
    return [flag, *argv] if argv and not argv[0].startswith("-") else argv


def _fit_mlm(argv: list[str]) -> None:
    argv = _resume_takes_out(argv)
    place, recipe = Place(), recipes.MLM()
    resuming = "--resume" in argv and (not argv or argv[0].startswith("-"))
    split = [part for word in argv for part in (word.split("=", 1) if word.startswith("--out=") else [word])]
    out = Path(split[split.index("--out") + 1] if "--out" in split[:-1] else place.out)
    source = out.with_name(out.name + ".running") / "start.json" if resuming and out.name else None
    if source and source.is_file():
        recipe = recipes.from_table(recipes.MLM, _stored_recipe(source), str(source))
    elif argv and argv[0].endswith(".toml"):
        recipe = recipes.from_table(recipes.MLM, recipes.read_toml(Path(argv[0])), argv[0])
        argv = argv[1:]
    command = _parse(FitMLM, "fit mlm DATA|RECIPE.toml", _name_first(argv, "--train"), FitMLM(recipe, place))
    from embedtune.run import finetune

    where = command.place
    with Terminal() as terminal:
        finished = finetune(command.recipe, where.out, resume=where.resume, discard=where.discard, force=where.force,
                            listener=terminal.listener())  # fmt: skip
    if where.json:
        print(json.dumps({"folder": str(finished.folder), **finished.scores}, indent=2))
        return
    from embedtune.judge import card

    header, rows = card.score_table(finished.scores)
    print_table(header, rows)
    print(finished.scores["verdict"])
    print(f"{finished.folder}/ holds the model, README.md, loss.png, recipe.toml, run.json, log.jsonl")


def _stored_recipe(start: Path) -> dict[str, Any]:
    import tomllib

    from embedtune import files

    return tomllib.loads(files.read_json(start)["recipe"])


def _resume_takes_out(argv: list[str]) -> list[str]:
    """`--resume OUT` is `--resume --out OUT`."""
    if "--resume" in argv:
        at = argv.index("--resume") + 1
        if at < len(argv) and not argv[at].startswith("-"):
            return [*argv[:at], "--out", *argv[at:]]
    return argv


def _check(argv: list[str]) -> None:
    command = _parse(Check, "data check FILE", _name_first(argv, "--data"))
    from embedtune.data.check import check
    from embedtune.data.columns import parse_columns
    from embedtune.encoder import load

    load.quiet()
    folder = load.find(command.model)
    tokenizer = load.load_tokenizer(folder)
    length = command.max_length or load.stated_length(folder, tokenizer)
    diagnosis = check(command.data, tokenizer=tokenizer, max_length=length, columns=parse_columns(command.columns))
    print(json.dumps(diagnosis.as_dict(), indent=2) if command.json else "\n".join(diagnosis.lines()))
    if diagnosis.verdict == "not usable":
        raise SystemExit(EXIT_USER)


def _example(argv: list[str]) -> None:
    command = _parse(Example, "data example", argv)
    from embedtune.data.example import write_example

    count = write_example(command.out, command.lines, force=command.force)
    print(f"{command.out}: {count:,} lines")


def _length(argv: list[str]) -> None:
    command = _parse(Length, "refine length MODEL", _name_first(argv, "--model"))
    from embedtune.refine.measure import measure_length

    with Terminal() as terminal:
        report = measure_length(command.model, command.data, columns=command.columns, bad_rows=command.bad_rows,
                                rows=command.rows, precision=command.precision, note=terminal.note)  # fmt: skip
    print(json.dumps(report.as_dict(), indent=2) if command.json else "\n".join(report.lines()))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "data check": _check,
    "data example": _example,
    "fit mlm": _fit_mlm,
    "refine length": _length,
}


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A table on stdout: the first column to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    for line in [header, *rows]:
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
        )


class Terminal:
    """Progress on stderr: a bar on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.task: Any = None
        self.last = 0.0

    def __enter__(self) -> Terminal:
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = [progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeRemainingColumn()]
            self.bar = progress.Progress(
                *columns, progress.TextColumn("{task.description}"), console=Console(stderr=True)
            )
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def listener(self) -> Any:
        """What the loop speaks to."""
        from embedtune.fit.engine import Listener

        return Listener(self.note, self.step)

    def note(self, text: str) -> None:
        """One line."""
        if self.bar:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def step(self, record: dict[str, Any], total: int) -> None:
        """A logged step: every scoring is a line; training moves the bar, or is a line every ten seconds."""
        if "dev_loss" in record:
            self.note(f"step {record['step']:,} of {total:,}: " + ", ".join(
                f"{k.replace('_', ' ')} {v:.4f}" for k, v in record.items() if k.startswith("dev_")))  # fmt: skip
            return
        loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"
        text = f"loss {loss}  {record['tokens_per_second']:,} tokens/s"
        if self.bar:
            with suppress(Exception):
                self.task = self.bar.add_task(text, total=total) if self.task is None else self.task
                self.bar.update(self.task, completed=record["step"], description=text)
        elif time.monotonic() - self.last > 10:
            self.last = time.monotonic()
            left = record["seconds"] / max(1, record["step"]) * (total - record["step"])
            clock = time.strftime("%H:%M:%S", time.gmtime(left))
            print(f"step {record['step']:,} of {total:,}: {text}  {clock} left", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
