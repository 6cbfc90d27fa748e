"""A PostgreSQL database with pgvector: how it is reached, and what its refusals become. No message holds a password."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from embedtune.errors import UserError

SCHEMES = ("postgresql://", "postgres://")
FIX = "pip install 'embedtune[postgres]'"
OLDEST = (0, 8)  # of pgvector: a graph goes on looking where a filter leaves too few (hnsw.iterative_scan)
# A database that is silent is given up after about a minute; what the address says comes first.
SETTINGS = {"application_name": "embedtune", "connect_timeout": "10", "keepalives_idle": "30",
            "keepalives_interval": "10", "keepalives_count": "3", "tcp_user_timeout": "60000"}  # fmt: skip
# Of the errors of a statement itself (class 42) these are not bugs of ours: no right, not there, there already.
MENDABLE = ("42501", "42P01", "42P07")


@dataclass(frozen=True)
class Address:
    """Where a database is; only `shown` may be said."""

    settings: dict[str, str] = field(repr=False)
    shown: str = ""


HINTS = {
    "password": "PGPASSWORD or ~/.pgpass hold the password, or --store does",
    "does not exist": "check the names of the database and of the user in --store",
    "permission denied": "an administrator grants it; CREATE EXTENSION vector is needed once for a database",
}


def parse(store: str) -> Address:
    """The address of a database; a UserError where it is none, or a package is missing."""
    psycopg = packages()
    fix = "--store postgresql://USER@HOST/DATABASE; the password can stand in PGPASSWORD or in ~/.pgpass"
    if not store.startswith(SCHEMES):
        raise UserError(f"must begin with {SCHEMES[0]}", where="--store", fix=fix)
    try:
        found = {name: str(value) for name, value in psycopg.conninfo.conninfo_to_dict(store).items()}
    except psycopg.Error:
        raise UserError("is not an address of a database", where="--store", fix=fix) from None  # it quotes the address
    port = f":{found['port']}" if "port" in found else ""
    return Address({**SETTINGS, **found}, f"{SCHEMES[0]}{found.get('host', '')}{port}/{found.get('dbname', '')}")


def packages() -> Any:
    """The package psycopg, after a look whether pgvector is there too."""
    try:
        import pgvector  # noqa: F401
        import psycopg
    except ImportError as error:
        what = f"needs another package, {error.name or 'psycopg'}"
        raise UserError(what, where="an index in PostgreSQL", fix=FIX) from error
    return psycopg


@contextmanager
def connected(store: Address) -> Iterator[Any]:
    """A connection that commits each statement; what is going on when it ends is undone by the database.

    Inside the block whatever the database refuses is a UserError, and so is that it went away.
    """
    psycopg = packages()
    logging.getLogger("psycopg").setLevel(logging.ERROR)  # what it warns of is an error of ours soon
    try:
        # No prepared statements: an address may be that of a pool of connections, which does not keep them.
        with psycopg.connect(**store.settings, autocommit=True, prepare_threshold=None) as connection:
            yield connection
    except psycopg.Error as error:
        raise _said(error, store) from error


def _said(error: Any, store: Address) -> Exception:
    """The UserError for what the database said; the error itself where it is a bug of ours."""
    state: str = error.sqlstate or ""
    away = not state or state[:2] in ("08", "28", "3D") or state[:3] == "57P"
    said = str(error.diag.message_primary or error).strip().split("\n")[0].strip()
    if password := store.settings.get("password"):
        said = said.replace(password, "***")
    if away and isinstance(error, packages().OperationalError | packages().InterfaceError):
        if fix := _hint(said):
            return UserError(f"the database refused: {said}", where=store.shown, fix=fix)
        what, fix = f"cannot be reached, or went away: {said}", "see to the database and ask again; no index is harmed"
        return UserError(what, where=store.shown, fix=fix)
    if (state[:2] == "42" and state not in MENDABLE) or not state:
        return error
    return UserError(f"the database refused: {said}", where=store.shown, fix=_hint(said))


def _hint(said: str) -> str:
    """What mends a refusal, by its words: refused connections have no code."""
    return next((fix for mark, fix in HINTS.items() if mark in said), "")


@contextmanager
def writing(connection: Any, name: str) -> Iterator[None]:
    """One transaction that alone may change the index `name`: all of it is kept, or nothing."""
    with connection.transaction():
        # Between two blocks the model computes, and the database waits.
        connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
        key = f"embedtune {name}"
        if not connection.execute("SELECT pg_try_advisory_xact_lock(hashtextextended(%s, 0))", [key]).fetchone()[0]:
            raise UserError("another process is at work in it", where=name, fix="wait for it, or stop it")
        yield


def with_vectors(connection: Any, store: Address, make: bool = False) -> None:
    """See to it that the connection knows the types of pgvector; `make`: put them into the database if need be."""
    from pgvector.psycopg import register_vector

    if make:
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    found = connection.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()
    if found is None:
        raise UserError("has no index: the extension vector (pgvector) is not in this database", where=store.shown)
    if tuple(int(part) for part in found[0].split(".")[:2]) < OLDEST:
        what, fix = f"has pgvector {found[0]}, and 0.8 or later is needed", "ALTER EXTENSION vector UPDATE"
        raise UserError(what, where=store.shown, fix=fix)
    register_vector(connection)
