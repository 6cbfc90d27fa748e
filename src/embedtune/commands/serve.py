"""embedtune serve: a model behind an address."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from embedtune import recipes
from embedtune.commands.shape import Command, Output, Talk
from embedtune.errors import EXIT_BUG, EXIT_FINE, UserError

KEY = "EMBEDTUNE_API_KEY"
KEY_BYTES = 1 << 16


@dataclass(frozen=True)
class Serve:
    """OpenAI's /v1/embeddings, text-embeddings-inference's /embed, health, metrics; search and a page over an index.

    A key in the environment variable EMBEDTUNE_API_KEY, or in --key-file, is asked of every request but /livez.
    """

    # Model folder or hub name.
    model: str
    # Further names that clients may ask for, where theirs is fixed: text-embedding-3-small, say.
    names: tuple[str, ...] = ()
    # Folders of indexes that this model made, for /search and the page; a second one, of another model, stands beside.
    index: tuple[str, ...] = ()
    # Where votes on what is found are written, a line each: a file that `fit contrastive` reads.
    feedback: str = "feedback.jsonl"
    # Address to listen at; one that others reach needs a key.
    host: str = "127.0.0.1"
    # Port to listen at.
    port: int = 8000
    # A file with the key, where it does not stand in the environment.
    key_file: str | None = None
    # Arithmetic of the model (derived: bf16 where the hardware has it).
    precision: recipes.Precision | None = None
    # Tokens that are computed at once.
    batch_tokens: int = 6144
    # What would be answered later than in so many seconds is refused at once (429); two batches may always wait.
    queue_seconds: float = 2.0
    # Texts that may wait at most.
    queue_items: int = 8192


def serve(command: Serve, talk: Talk) -> Output:
    """Serve until a signal comes: what is being answered is answered first."""
    key = _key(command)
    _check(command, key)
    try:
        import fastapi  # noqa: F401 - said before the model is loaded
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed", fix="pip install 'embedtune[serve]'") from error
    from embedtune.encoder.device import fast_precision, pick_device
    from embedtune.serve.app import Service
    from embedtune.serve.batcher import Limits
    from embedtune.serve.listen import make_server
    from embedtune.serve.shelf import check_indexes, open_all

    check_indexes(command.model, command.index)  # what is wrong with the names is said now
    precision = command.precision or fast_precision(pick_device())
    limits = Limits(command.batch_tokens, command.queue_seconds, command.queue_items)
    service = Service(lambda: open_all(command.model, command.index, precision, command.batch_tokens), limits,
                      Path(command.feedback), command.names)  # fmt: skip
    server = make_server(service, key, command.host, command.port)
    place, first = f"http://{command.host}:{command.port}", service.loaded

    def loaded() -> None:
        first()
        talk.note(f"{place} serves {command.model} in {precision}"
                  + ("" if key else "; without a key, to this machine alone"))  # fmt: skip

    service.loaded = loaded
    talk.note(f"{place} answers 503 while {command.model} is loaded")
    server.run()
    if service.failed and service.batcher is None:
        raise UserError(service.failed, where=command.model)
    fine = server.started and not service.failed
    return Output([service.failed or "stopped"], {"stopped": True}, EXIT_FINE if fine else EXIT_BUG)


def _key(command: Serve) -> str | None:
    if command.key_file is None:
        return os.environ.get(KEY) or None
    try:
        with open(command.key_file, "rb") as file:  # a pipe of the shell is fine; a device without end is cut
            key = file.read(KEY_BYTES).decode("utf-8").strip()
    except (OSError, ValueError) as error:
        what = f"cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}"
        raise UserError(what, where=command.key_file, fix="name a file that holds nothing but the key") from error
    if not key:
        raise UserError("holds no key", where=command.key_file)
    return key


def _check(command: Serve, key: str | None) -> None:
    """What is wrong with the flags, all at once, and whether the port is free."""
    problems = [
        f"--{name.replace('_', '-')} must be above 0, not {getattr(command, name):g}"
        for name in ("batch_tokens", "queue_seconds", "queue_items")
        if getattr(command, name) <= 0
    ]
    if len(command.index) > 2:
        problems.append(f"--index: two at most stand side by side, not {len(command.index)}")
    if not Path(command.feedback).parent.is_dir():
        problems.append(f"--feedback {command.feedback}: its folder does not exist")
    if not 1 <= command.port <= 65535:
        problems.append(f"--port must be 1 to 65535, not {command.port}")
    if not key and not _is_here(command.host):
        problems.append(f"--host {command.host} is reached by others, and there is no key: set {KEY} or --key-file")
    if key is not None and (len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key):
        problems.append("the key must have 8 printable ASCII characters at least, without blanks")
    if problems:
        raise UserError("cannot serve with these settings", details=problems)
    import socket

    try:
        with socket.create_server((command.host, command.port), reuse_port=False):
            pass
    except OSError as error:
        fix = "stop what listens there, or name another --port"
        raise UserError(f"cannot listen: {error.strerror}", where=f"{command.host}:{command.port}", fix=fix) from error


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


COMMANDS = {"serve": Command("MODEL", "an OpenAI-compatible server over a model", Serve, serve, "--model")}
