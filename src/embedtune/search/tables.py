"""The SQL of an index in PostgreSQL. Names are quoted and values are parameters, all of them, always."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from embedtune.encoder.embedder import Precision
from embedtune.errors import UserError, did_you_mean
from embedtune.search.contract import Found
from embedtune.search.database import Address
from embedtune.search.quantise import Dtype
from embedtune.search.rows import Record

VERSION = 1
MARK = "embedtune"  # the one key of the JSON in a table's comment
NAME_BYTES = 48  # PostgreSQL cuts names at 63, and says so in a whisper
NEW = ".new"
# The type of the vectors for each --dtype, how many numbers it holds, and how many with a graph.
TYPES: dict[str, tuple[str, int, int]] = {"float32": ("vector", 16_000, 2_000), "float16": ("halfvec", 16_000, 4_000)}
# How pgvector spells a similarity: the operator of the distance (the score is minus that), and its name in a graph.
OPERATORS = {"cosine": ("<#>", "ip"), "dot": ("<#>", "ip"), "euclidean": ("<->", "l2"), "manhattan": ("<+>", "l1")}
NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")

TABLE = """
CREATE TABLE {table} (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id text NOT NULL UNIQUE,
    text text NOT NULL,
    columns json NOT NULL,
    vector {type}({dimension}) NOT NULL,
    words tsvector GENERATED ALWAYS AS (to_tsvector('simple', text)) STORED
)"""
NEAREST = """
SELECT number, vector {operator} %(vector)s::{type} AS distance FROM {table} WHERE {where}
ORDER BY distance, number LIMIT %(top)s"""
# ts_rank knows nothing of how rare a word is; BM25's weight of each word does. A word of the query in the form that
# tsquery takes: in quotes, with quotes and backslashes doubled.
WORDS = r"""
WITH asked AS (
    SELECT ('''' || replace(replace(lexeme, '\', '\\'), '''', '''''') || '''')::tsquery AS word
    FROM unnest(to_tsvector('simple', %(query)s))
), total AS (SELECT count(*) AS texts FROM {table}),
weighed AS MATERIALIZED (
    SELECT word, ln(1 + (texts - found + 0.5)::float8 / (found + 0.5)) AS weight
    FROM asked, total, LATERAL (SELECT count(*) AS found FROM {table} WHERE words @@ word) AS counted
)
SELECT number, sum(weight * ts_rank(words, word, 1)) AS score FROM weighed JOIN {table} ON words @@ word WHERE {where}
GROUP BY number ORDER BY score DESC, number LIMIT %(top)s"""
# A text as it is, everything else as JSON writes it.
FILTER = "coalesce(columns ->> {name}::text, (columns -> {name}::text)::text) = {value}"


@dataclass(frozen=True)
class About:
    """What the comment of a table says."""

    model: str
    identity: str
    dimension: int
    dtype: Dtype
    precision: Precision
    similarity: str
    graph: bool
    columns: tuple[str, ...] = ()
    version: int = VERSION

    @property
    def type(self) -> str:
        """The type of its vectors."""
        return TYPES[self.dtype][0]


def sql(query: str, *, table: str, **parts: Any) -> Any:
    """A statement about a table; {table} is its name, quoted."""
    from psycopg.sql import SQL, Identifier

    return SQL(query).format(table=Identifier(table), **parts)


def words(text: str) -> Any:
    """A part of a statement that is ours, never a user's."""
    from psycopg.sql import SQL

    return SQL(text)


def check_name(name: str) -> None:
    """A UserError for what cannot be the name of an index."""
    if not name or "\0" in name or len(name.encode(errors="replace")) > NAME_BYTES:
        what = f"the name of an index in a database has 1 to {NAME_BYTES} bytes, without NUL"
        raise UserError(what, where=name[:80].replace("\0", "?") or "--out", fix="--out texts")


def check_size(about: About) -> None:
    """A UserError where pgvector has no such vectors."""
    if about.dtype not in TYPES:
        what = f"an index in PostgreSQL keeps {' or '.join(TYPES)}, not {about.dtype}"
        raise UserError(what, where="--dtype", fix="--dtype float16 halves the vectors")
    kind, most, most_in_graph = TYPES[about.dtype]
    if about.dimension > (most_in_graph if about.graph else most):
        holds = f"{kind} holds {most:,} numbers, {most_in_graph:,} with --ann"
        raise UserError(f"the model gives {about.dimension:,} numbers a text, and {holds}", where="--dtype",
                        fix="--dtype float16, no --ann, or fewer numbers: embedtune refine reduce")  # fmt: skip


def hold(connection: Any, store: Address, name: str) -> None:
    """Keep the table from being replaced until the transaction ends."""
    from psycopg.errors import UndefinedTable

    try:
        connection.execute(sql("LOCK TABLE {table} IN ACCESS SHARE MODE", table=name))
    except UndefinedTable as error:
        raise UserError(f"there is no index {name!r} any more", where=store.shown) from error


def _comment(connection: Any, name: str) -> tuple[bool, dict[str, Any] | None]:
    """Whether there is a table of that name, and what its comment says where embedtune made it."""
    from psycopg.sql import Identifier

    find = "SELECT table_oid, obj_description(table_oid, 'pg_class') FROM to_regclass(%s) AS table_oid"
    oid, comment = connection.execute(find, [Identifier(name).as_string(connection)]).fetchone()
    try:
        found = json.loads(comment or "")[MARK]
    except (ValueError, KeyError, TypeError):
        return oid is not None, None
    return True, found if isinstance(found, dict) else None


def read(connection: Any, store: Address, name: str) -> About:
    """What the comment of a table says; a UserError where there is none of embedtune's, or it is of a newer version."""
    there, found = _comment(connection, name)
    if not there:
        listed = "SELECT relname FROM pg_class WHERE relkind = 'r' AND pg_table_is_visible(oid) AND \
                  obj_description(oid, 'pg_class') LIKE %s ORDER BY 1"
        names = [row[0] for row in connection.execute(listed, [f'{{"{MARK}"%'])]
        what = f"there is no index {name!r}{did_you_mean(name, names)}; there are: {', '.join(names) or 'none'}"
        fix = "make one: embedtune search index DATA --model M --out NAME --store ..."
        raise UserError(what, where=store.shown, fix=fix)
    if found is None:
        raise UserError(f"the table {name!r} is not an index that embedtune made", where=store.shown)
    version = found.get("version")
    if isinstance(version, int) and version > VERSION:
        what = f"was made by a newer embedtune (version {version} of the table, this one reads {VERSION})"
        raise UserError(what, where=f"{name} in {store.shown}", fix="update embedtune, or build the index anew")
    try:
        about = About(**{**found, "columns": tuple(found["columns"])})
        _ = OPERATORS[about.similarity], TYPES[about.dtype]
    except (TypeError, KeyError) as error:
        raise UserError("the comment of the table is damaged", where=f"{name} in {store.shown}",
                        fix="build the index anew, with --force") from error  # fmt: skip
    return about


def refuse_existing(connection: Any, store: Address, name: str, force: bool) -> None:
    """A UserError where a new index would take the place of a table that was not given up, or is no index."""
    there, found = _comment(connection, name)
    if there and found is None:
        what = f"the table {name!r} is not an index that embedtune made, and is not replaced"
        raise UserError(what, where=store.shown, fix="another --out")
    if there and not force:
        raise UserError("exists already", where=f"{name} in {store.shown}", fix="another --out, or --force")


def new(connection: Any, name: str, about: About) -> str:
    """An empty table, and its name until `finish`."""
    made = name + NEW
    connection.execute(sql(TABLE, table=made, type=words(about.type), dimension=words(str(about.dimension))))
    return made


def finish(connection: Any, made: str, name: str, about: About) -> None:
    """Index the new table, describe it, and let it take the place of the old one."""
    from psycopg.sql import Identifier

    connection.execute(sql("CREATE INDEX ON {table} USING gin (words)", table=made))
    if about.graph:
        kind = words(f"{about.type}_{OPERATORS[about.similarity][1]}_ops")
        connection.execute(sql("CREATE INDEX ON {table} USING hnsw (vector {kind})", table=made, kind=kind))
    describe(connection, made, about)
    connection.execute(sql("ANALYZE {table}", table=made))
    connection.execute(sql("DROP TABLE IF EXISTS {table}", table=name))
    connection.execute(sql("ALTER TABLE {table} RENAME TO {name}", table=made, name=Identifier(name)))


def describe(connection: Any, table: str, about: About) -> None:
    """Write the comment of a table."""
    from psycopg.sql import Literal

    said = Literal(json.dumps({MARK: asdict(about)}))
    connection.execute(sql("COMMENT ON TABLE {table} IS {said}", table=table, said=said))


def copy(connection: Any, table: str, about: About, records: Sequence[Record], vectors: np.ndarray) -> None:
    """Copy records with their vectors (B, D) into a table."""
    from pgvector import HalfVector, Vector
    from psycopg.types.json import Json

    if vectors.shape[1] != about.dimension:
        what = f"the model gives {vectors.shape[1]} numbers a text, the index has {about.dimension}"
        raise UserError(what, where="the model", fix="use the model that the index was made with")
    kind = Vector if about.dtype == "float32" else HalfVector
    into = sql("COPY {table} (id, text, columns, vector) FROM STDIN (FORMAT BINARY)", table=table)
    rows = [(record.id, record.text, Json(_cells(record), dumps=str), kind(vector))
            for record, vector in zip(records, vectors, strict=True)]  # fmt: skip
    with connection.cursor() as cursor, cursor.copy(into) as out:
        out.set_types(["text", "text", "json", about.type])
        for row in rows:
            out.write_row(row)


def _cells(record: Record) -> str:
    """The other columns as JSON, with NaN and infinities as texts; a UserError for what cannot be kept."""
    written = json.dumps(record.columns, ensure_ascii=False, default=str)
    if any(word in written for word in ("NaN", "Infinity")):
        written = json.dumps(json.loads(written, parse_constant=str), ensure_ascii=False)
    try:
        kept = not ("\0" in record.id + record.text or NUL.search(written))
        (record.id + record.text + written).encode()
    except UnicodeEncodeError:
        kept = False
    if not kept:
        what = f"the text with the id {record.id[:80]!r} or a column of it has a NUL or half a surrogate pair"
        raise UserError(what, where="PostgreSQL keeps no such characters", fix="--bad-rows replace, or take them out")
    return written


def known(connection: Any, table: str, ids: Sequence[str]) -> set[str]:
    """Which of these ids are there."""
    found = connection.execute(sql("SELECT id FROM {table} WHERE id = ANY(%s)", table=table), [_plain(ids)])
    return {row[0] for row in found}


def _plain(ids: Iterable[str]) -> list[str]:
    """The ids that a database can hold; no other one is there."""
    return [key for key in ids if "\0" not in key]


def some_ids(connection: Any, table: str) -> list[str]:
    """Some ids, to guess from which one was meant."""
    return [row[0] for row in connection.execute(sql("SELECT id FROM {table} LIMIT 10000", table=table))]


def remove(connection: Any, table: str, ids: Sequence[str]) -> None:
    """Delete rows by their ids."""
    connection.execute(sql("DELETE FROM {table} WHERE id = ANY(%s)", table=table), [_plain(ids)])


def nearest(
    connection: Any, table: str, about: About, vector: np.ndarray, top: int, where: Mapping[str, str]
) -> list[Found]:
    """The `top` rows nearest to a vector (D,), with their scores; of equal ones the older row first."""
    from pgvector import HalfVector, Vector

    given = (Vector if about.dtype == "float32" else HalfVector)(vector)
    query, values = _filtered(NEAREST, table, where, type=words(about.type),
                              operator=words(OPERATORS[about.similarity][0]))  # fmt: skip
    found = connection.execute(query, {"vector": given, "top": top, **values})
    return [(number, -distance) for number, distance in found]


def by_words(connection: Any, table: str, query: str, top: int, where: Mapping[str, str]) -> list[Found]:
    """The `top` rows with words of the query, best first."""
    statement, values = _filtered(WORDS, table, where)
    found = connection.execute(statement, {"query": query.replace("\0", " "), "top": top, **values})
    return [(number, score) for number, score in found]


def _filtered(query: str, table: str, where: Mapping[str, str], **parts: Any) -> tuple[Any, dict[str, str]]:
    """A query with {where} filled in, and the values of its parameters."""
    from psycopg.sql import SQL, Placeholder

    tests: list[Any] = [SQL("true")]
    values: dict[str, str] = {}
    for number, (name, value) in enumerate(where.items()):
        values |= {f"name{number}": name, f"value{number}": value.replace("\0", "\ufffd")}
        tests.append(SQL(FILTER).format(name=Placeholder(f"name{number}"), value=Placeholder(f"value{number}")))
    return sql(query, table=table, where=SQL(" AND ").join(tests), **parts), values


def rows(connection: Any, table: str, numbers: Collection[int]) -> dict[int, tuple[str, str, dict[str, Any]]]:
    """Id, text and other columns of rows, by their numbers."""
    query = sql("SELECT number, id, text, columns FROM {table} WHERE number = ANY(%s)", table=table)
    return {number: (key, text, columns) for number, key, text, columns in connection.execute(query, [list(numbers)])}


def sample(connection: Any, table: str, many: int) -> np.ndarray:
    """Vectors (many, D) of rows that are spread evenly over a new table, whose numbers have no gaps."""
    (last,) = connection.execute(sql("SELECT max(number) FROM {table}", table=table)).fetchone()
    numbers = np.linspace(1, last, many).astype(np.int64).tolist()
    query = sql("SELECT vector FROM unnest(%s::bigint[]) AS wanted JOIN {table} ON number = wanted", table=table)
    return np.stack([row[0].to_numpy() for row in connection.execute(query, [numbers])]).astype(np.float32)
