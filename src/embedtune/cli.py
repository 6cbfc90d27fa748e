"""The command line: the only module that prints or exits. Results go to stdout, progress to stderr."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from typing import Any

from embedtune import __version__, files
from embedtune.commands import augment, bias, data, embed, export, fit, judge, predict, refine, search, serve, whole
from embedtune.commands.shape import Command
from embedtune.errors import EXIT_BUG, EXIT_FINE, EXIT_USER, Interrupted, Parted, UserError, did_you_mean
from embedtune.fit import ranks

# What the system refuses because of a name or a place, as against a bug of ours.
REFUSALS = (*files.REFUSALS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EMFILE)
COMMANDS: dict[str, Command] = {
    **whole.COMMANDS, **data.COMMANDS, **augment.COMMANDS, **fit.COMMANDS, **judge.COMMANDS, **predict.COMMANDS,
    **refine.COMMANDS, **bias.COMMANDS, **export.COMMANDS, **embed.COMMANDS, **search.COMMANDS, **serve.COMMANDS,
}  # fmt: skip


def usage() -> str:
    """What `embedtune --help` prints."""
    calls = {f"{words} {command.usage}".rstrip(): command.summary for words, command in COMMANDS.items()}
    wide = min(44, max(map(len, calls)))
    return "\n".join([
        "embedtune: turn your own text into an embedding model, and prove that it got better",
        "",
        "usage: embedtune COMMAND ... [--flags]       every command has --help",
        "",
        *(f"  {call:<{wide}}  {summary}" for call, summary in calls.items()),
        "",
        "exit codes: 0 fine, 1 a bug of ours, 2 something for you to mend, 3 the verdict is REGRESSION,",
        "            130/143 stopped with a checkpoint",
        "",
    ])  # fmt: skip


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
        with _silent() if ranks.launched()[0] else nullcontext():
            return _dispatch(argv)
    except UserError as error:
        _say(error)
        return EXIT_USER
    except Interrupted as error:
        _say(error)
        return error.code
    except KeyboardInterrupt:
        _say("stopped by signal 2")
        return 130
    except Parted as error:
        print(error, file=sys.stderr)
        return EXIT_USER
    except BrokenPipeError:
        # The reader of our output went away; keep the interpreter from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FINE
    except OSError as error:
        if error.filename is None or error.errno not in REFUSALS:
            return _bug()
        fix = "name another place, or see to it that this one can be read and written"
        print(UserError(f"cannot be used: {error.strerror}", where=str(error.filename)[:200], fix=fix), file=sys.stderr)
        return EXIT_USER
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else EXIT_USER
    except Exception:  # noqa: BLE001 - the last resort: a bug of ours, shown whole
        return _bug()


@contextmanager
def _silent() -> Iterator[None]:
    """Of several processes the first one speaks for all."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _say(message: object) -> None:
    """What all processes of a run have to say is said once."""
    if ranks.launched()[0] == 0:
        print(message, file=sys.stderr)


def _bug() -> int:
    import traceback

    traceback.print_exc()
    print("this is a bug of embedtune; please report it with the lines above", file=sys.stderr)
    return EXIT_BUG


def _dispatch(argv: list[str]) -> int:
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError as error:  # it would go into a recipe, which is UTF-8
            raise UserError("is not UTF-8", where=ascii(word), fix="rename the file, or write it in UTF-8") from error
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return EXIT_FINE if argv else EXIT_USER
    if argv[0] in ("-V", "--version"):
        print(f"embedtune {__version__}")
        return EXIT_FINE
    words = next((w for w in (" ".join(argv[:2]), argv[0]) if w in COMMANDS), None)
    if words is None:
        rooms = [name for name in COMMANDS if name.split()[0] == argv[0]]
        if rooms and (len(argv) == 1 or argv[1] in ("-h", "--help")):
            print("\n".join(line for line in usage().splitlines() if line.startswith(f"  {argv[0]} ")))
            return EXIT_FINE if len(argv) > 1 else EXIT_USER
        asked = " ".join(argv[:2])
        raise UserError(
            f"there is no command {asked!r}{did_you_mean(asked, list(COMMANDS))}",
            fix="embedtune --help lists them",
        )
    return _run(words, argv[len(words.split()) :])


def _run(words: str, argv: list[str]) -> int:
    count = ranks.launched()[1]
    if count > 1 and not words.startswith("fit "):
        raise UserError(
            f"runs in one process, not in {count}", where=f"embedtune {words}", fix="call it without torchrun"
        )
    with ranks.started():
        return _together(words, argv)


def _together(words: str, argv: list[str]) -> int:
    command = COMMANDS[words]
    default = None
    if command.defaults:
        argv, default = command.defaults(argv)
    if command.first and argv and not argv[0].startswith("-"):
        argv = [command.first, *argv]
    parsed = _parse(command.kind, f"{words} {command.usage}", argv, default)
    as_json = getattr(parsed, "json", False) or getattr(getattr(parsed, "place", None), "json", False)
    with Terminal() as terminal:
        output = command.run(parsed, terminal)
        if isinstance(output.lines, Iterator) and not as_json:
            for line in output.lines:  # a stream: each line as it comes
                print(line)
            return output.code
    if as_json:
        sys.stdout.writelines(files.json_pieces(output.data))
        print()
    else:
        print("\n".join(output.lines))
    return output.code


def _parse(kind: Any, words: str, argv: list[str], default: Any = None) -> Any:
    import tyro

    options: dict[str, Any] = {} if default is None else {"default": default}
    flat = tyro.conf.configure(tyro.conf.OmitArgPrefixes)(kind)
    return tyro.cli(flat, prog=f"embedtune {words}", args=argv, **options)


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
