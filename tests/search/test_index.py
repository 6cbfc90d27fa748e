import io
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import corpus
from embedtune import cli, files
from embedtune.data.read import Counts
from embedtune.errors import UserError
from embedtune.nearest import Unit, top_k
from embedtune.search import index as searching
from embedtune.search import store
from embedtune.search.contract import fuse
from embedtune.search.index import Index, create
from embedtune.search.rows import Record, read_records

bm25s = pytest.importorskip("bm25s")
TEXTS = sorted({line for line in corpus(700, seed=5).split("\n") if len(line) > 12})


def records(texts=TEXTS, first=0):
    return [Record(f"t{i}", text, {"kind": i % 3, "name": f"n{i % 7}"}) for i, text in enumerate(texts, first)]


@pytest.fixture(scope="module")
def model(tiny_model):
    return str(tiny_model("minilm"))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """An index of all texts that no test changes."""
    return create(tmp_path_factory.mktemp("whole") / "idx", model, records())


@pytest.fixture
def some(model, tmp_path):
    """An index of 60 texts that a test may change."""
    return create(tmp_path / "idx", model, records(TEXTS[:60]))


def brute(encoder, texts, query, top):
    corpus, asked = encoder.encode(texts, "document").astype(np.float64), encoder.encode([query], "query")[0]
    scores = corpus @ asked.astype(np.float64) / np.linalg.norm(corpus, axis=1) / np.linalg.norm(asked)
    return np.argsort(-scores, kind="stable")[:top], np.sort(scores)[::-1][:top]


def ids(hits):
    return [hit.id for hit in hits]


def test_exact_search_is_brute_force(whole):
    queries = TEXTS[3:40:6]
    for query, hits in zip(queries, whole.search(queries, 12, mode="exact")):
        rows, scores = brute(whole.encoder, TEXTS, query, 12)
        np.testing.assert_allclose([hit.score for hit in hits], scores, atol=1e-6)
        assert ids(hits) == [f"t{row}" for row in rows]
        assert hits[0].text == query and hits[0].columns["name"] == f"n{rows[0] % 7}"


def test_segments_and_deletions_change_nothing_for_what_is_left(model, whole, tmp_path):
    """Built in three parts, some of it deleted: the answers of an index of what is left."""
    built = create(tmp_path / "parts", model, records(TEXTS[:50]))
    built = built.add(records(TEXTS[50:51], 50)).add(records(TEXTS[51:200], 51))
    gone = [f"t{i}" for i in range(0, 200, 7)]
    built = built.delete(gone[:20]).delete(gone[20:])
    left = [record for record in records(TEXTS[:200]) if record.id not in gone]
    fresh = create(tmp_path / "fresh", model, left)
    assert len(built) == len(fresh) == len(left)
    for mode in ("exact", "dense"):
        for a, b in zip(built.search(TEXTS[:30], 9, mode=mode), fresh.search(TEXTS[:30], 9, mode=mode)):
            assert ids(a) == ids(b)
            np.testing.assert_allclose([h.score for h in a], [h.score for h in b], atol=1e-6)
    packed = built.compact()
    assert len(packed.segments) == 1 and not len(packed.deleted) and not list(built.folder.glob("deleted*"))
    for mode in ("exact", "lexical", "hybrid"):
        assert [ids(h) for h in packed.search(TEXTS[:30], 9, mode=mode)] == [
            ids(h) for h in fresh.search(TEXTS[:30], 9, mode=mode)
        ]


def test_update_replaces(some):
    before = len(some)
    some = some.add([Record("t5", "quite another text", {}), Record("new", "and a new one", {})], update=True)
    assert len(some) == before + 1
    assert ids(some.search(["quite another text"], 1)[0]) == ["t5"]
    assert TEXTS[5] not in [hit.text for hit in some.search([TEXTS[5]], len(some))[0]]


def test_lexical_is_bm25s(whole):
    words = bm25s.tokenize(TEXTS, stopwords=None, show_progress=False)
    direct = bm25s.BM25()
    direct.index(words, show_progress=False)
    for query in TEXTS[:20]:
        asked = bm25s.tokenize([query], stopwords=None, return_ids=False, show_progress=False)
        rows, scores = direct.retrieve(asked, k=10, show_progress=False)
        hits = whole.search([query], 10, mode="lexical")[0]
        np.testing.assert_allclose([hit.score for hit in hits], scores[0], rtol=1e-6)
        assert set(ids(hits)[:1]) <= {f"t{row}" for row, s in zip(rows[0], scores[0]) if s == scores[0][0]}
    assert whole.search(["nowhere xyzzy"], 10, mode="lexical") == [[]]


def test_hybrid_is_reciprocal_rank_fusion(whole):
    query = TEXTS[17]
    dense, words = (whole.search([query], 100, mode=mode)[0] for mode in ("dense", "lexical"))
    sums = {}
    for hits in (dense, words):
        for rank, hit in enumerate(hits, 1):
            sums[hit.id] = sums.get(hit.id, 0) + 1 / (60 + rank)
    hits = whole.search([query], 10, mode="hybrid")[0]
    np.testing.assert_allclose([hit.score for hit in hits], sorted(sums.values(), reverse=True)[:10])
    assert all(hit.score == pytest.approx(sums[hit.id]) for hit in hits)
    assert fuse([[(1, 9.0), (2, 8.0)], [(2, 0.5)]]) == [(2, 1 / 62 + 1 / 61), (1, 1 / 61)]


@pytest.mark.parametrize("mode", ["exact", "lexical", "hybrid"])
def test_filters(whole, mode):
    (hits,) = whole.search([TEXTS[4]], 500, mode=mode, where={"kind": "1", "name": "n4"})
    kept = {record.id for record in records() if record.columns == {"kind": 1, "name": "n4"}}
    assert hits and set(ids(hits)) <= kept and (mode != "exact" or set(ids(hits)) == kept)
    assert ids(hits)[0] == "t4"
    assert whole.search(["ba"], where={"kind": "none"}, mode=mode) == [[]]


@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_codes_with_rescoring(model, whole, tmp_path, dtype):
    made = create(tmp_path / dtype, model, records(), dtype=dtype)
    codes = made.segments[0].codes
    assert codes.dtype == np.int8 and codes.shape == (len(TEXTS), 32 if dtype == "int8" else 4)
    queries = TEXTS[::9]
    exact, dense = (made.search(queries, 10, mode=mode) for mode in ("exact", "dense"))
    assert [ids(h) for h in exact] == [ids(h) for h in whole.search(queries, 10)]
    recall = np.mean([len(set(ids(a)) & set(ids(b))) / 10 for a, b in zip(exact, dense)])
    assert recall >= (0.999 if dtype == "int8" else 0.98)
    scores = {hit.id: hit.score for hits in exact[:1] for hit in hits}
    assert all(hit.score == scores[hit.id] for hit in dense[0] if hit.id in scores)


def test_a_graph_finds_what_exact_search_finds(model, tmp_path):
    pytest.importorskip("faiss")
    said = []
    made = create(tmp_path / "idx", model, records(), ann=True, note=said.append)
    assert "recall@10" in said[-1] and float(said[-1].split()[3]) > 0.99
    made = made.add([Record("x", "quite another text", {"kind": 9})]).delete(["t3"])
    queries = [*TEXTS[::9], TEXTS[3], "quite another text"]
    exact, dense = (made.search(queries, 10, mode=mode) for mode in ("exact", "dense"))
    assert np.mean([len(set(ids(a)) & set(ids(b))) / 10 for a, b in zip(exact, dense)]) > 0.99
    assert ids(dense[-1])[0] == "x" and "t3" not in ids(dense[-2])
    (few,) = made.search(["ba"], 10, where={"kind": "9"})  # too few among the candidates: all are looked at
    assert ids(few) == ["x"]


def test_recall_on_real_texts(real_data, tmp_path):
    lines = real_data("scifact/corpus.jsonl").read_text().splitlines()[:2500]
    texts = [json.loads(line)["title"] for line in lines]
    asked = [json.loads(line)["text"] for line in real_data("scifact/queries.jsonl").read_text().splitlines()[:60]]
    rows = [Record(str(i), text, {}) for i, text in enumerate(texts)]
    made = create(tmp_path / "int8", "all-MiniLM-L6-v2", rows, dtype="int8")
    empty = replace(made.manifest, dtype="binary", rows=0, segments=(), files={}, lexical="")
    (tmp_path / "binary").mkdir()
    store.publish(tmp_path / "binary", store.write_segment(tmp_path / "binary", empty, made._blocks())[0])
    exact = made.search(asked, 10, mode="exact")
    for opened, least in ((made, 0.999), (searching.open_with(tmp_path / "binary", made.encoder), 0.98)):
        found = opened.search(asked, 10)
        assert np.mean([len(set(ids(a)) & set(ids(b))) / 10 for a, b in zip(exact, found)]) >= least


def test_a_reader_beside_a_writer_sees_an_index_at_every_moment(some):
    errors, seen, done = [], set(), threading.Event()

    def read():
        while not done.is_set():
            try:
                opened = searching.open_with(some.folder, some.encoder)
                seen.add(len(opened))
                assert opened.search(["ba"], 3)[0]
            except BaseException as error:  # noqa: BLE001 - any is a failure
                errors.append(error)
                return

    reader = threading.Thread(target=read)
    reader.start()
    writer = some
    for number in range(12):
        writer = writer.add([Record(f"more{number}", f"ba be {number}", {})])
        writer = writer.compact() if number % 4 == 3 else writer.delete([f"t{number}"])
    done.set()
    reader.join()
    assert not errors and len(seen) > 1


def damage(folder, name, change):
    (path,) = folder.glob(name)
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def flip(data):
    data[len(data) // 2] ^= 1


@pytest.mark.parametrize("name", ["segment-*/vectors.f32", "segment-*/rows.arrow", "lexical-*/vocab.index.json"])
def test_damage_is_noticed(some, name):
    for change in (flip, lambda data: data.pop()):
        copy = some.folder.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(some.folder, copy)
        damage(copy, name, change)
        with pytest.raises(UserError, match="is damaged: it does not match its sha256"):
            Index.load(copy)
    for text in ('{"version": 1, "rows": 3}', (some.folder / "index.json").read_text().replace(".f32", "9" * 5000)):
        (copy / "index.json").write_text(text)  # the second: no name of a file can be so long
        with pytest.raises(UserError, match="is damaged"):
            Index.load(copy)


def test_what_cannot_be_read_is_not_called_damaged(some, monkeypatch):
    sha256 = files.sha256

    def refused(path):
        if some.folder in Path(path).parents:
            raise OSError(5, "Input/output error")
        return sha256(path)

    monkeypatch.setattr(files, "sha256", refused)
    with pytest.raises(UserError, match="cannot be read: Input/output error"):
        Index.load(some.folder)


def test_another_model_is_refused(some, tiny_model, tmp_path):
    with pytest.raises(UserError, match="is not that model any more"):
        Index.load(some.folder, str(tiny_model("roberta")))
    moved = tmp_path / "moved"
    shutil.copytree(some.manifest.model, moved)
    assert len(Index.load(some.folder, str(moved))) == 60  # the same model, elsewhere
    config = json.loads((moved / "1_Pooling" / "config.json").read_text())
    (moved / "1_Pooling" / "config.json").write_text(json.dumps({**config, "pooling_mode": "cls"}))
    with pytest.raises(UserError, match="is not that model any more"):
        Index.load(some.folder, str(moved))


def test_other_dimensions_are_refused(some):
    manifest = json.loads((some.folder / "index.json").read_text())
    manifest |= {"files": {}, "segments": [], "rows": 0, "dimension": 31}
    (some.folder / "index.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has 31 numbers a vector, the model gives 32"):
        Index.load(some.folder)


def test_a_newer_version_is_refused(some):
    manifest = json.loads((some.folder / "index.json").read_text())
    (some.folder / "index.json").write_text(json.dumps({**manifest, "version": store.VERSION + 1, "more": 1}))
    with pytest.raises(UserError, match="newer embedtune"):
        Index.load(some.folder)


def test_an_old_index_still_shows_what_it_showed_by_words_too(some):
    pytest.importorskip("bm25s")
    before = [hit.id for hit in some.search([TEXTS[3]], 5, mode="lexical")[0]]
    some.add([Record("new", TEXTS[3], {})])
    assert [hit.id for hit in some.search([TEXTS[3]], 5, mode="lexical")[0]] == before
    assert "new" in [hit.id for hit in Index.load(some.folder).search([TEXTS[3]], 5, mode="lexical")[0]]


def test_rows_without_ids_never_replace_others(some):
    some.add([Record("1", "bade", {}, True)])
    for update in (False, True):
        with pytest.raises(UserError, match="no ids of their own"):
            some.add([Record("1", "fima", {}, True)], update=update)


def test_a_filter_finds_lists_and_numbers_as_json_writes_them(some):
    added = some.add([Record("l", "bade", {"tags": ["a", "b"], "year": 2020, "name": 'say "a"'})])
    for where in ({"tags": '["a", "b"]'}, {"year": "2020"}, {"name": 'say "a"'}):
        assert [hit.id for hit in added.search(["bade"], 3, where=where)[0]] == ["l"]


def test_refused_changes_change_nothing(some):
    before = (some.folder / "index.json").read_bytes()
    for change, says in (
        (lambda: some.add(records(TEXTS[:3], 58)), "'t58' already"),
        (lambda: some.add([Record("x", "a", {}), Record("x", "b", {})]), "two of the new texts have the id 'x'"),
        (lambda: some.add([]), "nothing to add"),
        (lambda: some.delete(["t1", "t9999"]), "no text with the id t9999"),
    ):
        with pytest.raises(UserError, match=says):
            change()
    assert (some.folder / "index.json").read_bytes() == before
    assert not list(some.folder.glob("*.tmp"))
    assert len(Index.load(some.folder)) == 60


@pytest.mark.parametrize(
    "options, says",
    [
        ({"queries": [" \n"]}, "a query is empty"),
        ({"queries": ["a " * 500_000]}, "1,000,000 characters"),
        ({"queries": ["a"], "where": {"knid": "1"}}, "column 'knid' .did you mean 'kind'"),
        ({"queries": ["a"], "top": 0}, "at least 1"),
    ],
)
def test_wrong_questions(whole, options, says):
    with pytest.raises(UserError, match=says):
        whole.search(**options)


def test_without_the_package_there_is_no_lexical_search(model, tmp_path, monkeypatch):
    monkeypatch.setattr(searching.lexical, "is_there", lambda: False)
    made = create(tmp_path / "idx", model, records(TEXTS[:20]))
    with pytest.raises(UserError, match="without the package"):
        made.search(["ba"], mode="lexical")
    assert made.search(["ba"])[0]
    monkeypatch.undo()
    assert made.compact().search([TEXTS[3]], mode="lexical")[0][0].text == TEXTS[3]


def test_a_column_whose_name_is_no_text_is_refused(tmp_path):
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": "a", "k\\u00e9": 1}\n{"text": "b", "k\\udfff": 1}\n')
    read = read_records(str(rows), {}, "fail", Counts())
    assert next(read).columns == {"k\u00e9": 1}
    with pytest.raises(UserError, match=r"line 2: half a surrogate pair .*name of the column 'k.udfff'"):
        next(read)


def test_the_commands(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"_id": r.id, "text": r.text, **r.columns} for r in records(TEXTS[:80])]
    Path("a.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:60]))
    Path("b.jsonl").write_text("\n".join(json.dumps(row) for row in rows[60:]))

    def run(*words, code=0):
        assert cli.run(["search", *words]) == code
        return capsys.readouterr()

    assert "60 texts in idx/" in run("index", "a.jsonl", "--model", model, "--out", "idx", "--dtype", "int8").out
    assert "exists already" in run("index", "a.jsonl", "--model", model, "--out", "idx", code=2).err
    assert "texts added: 20; 80 in idx/" in run("add", "idx", "b.jsonl").out
    assert "already" in run("add", "idx", "b.jsonl", code=2).err
    assert "texts added: 20, 20 of them in place of older ones; 80 in idx/" in run("update", "idx", "b.jsonl").out
    Path("long.jsonl").write_text(json.dumps({"id": "long", "text": "bade fima " * 900}))
    assert "1 texts are longer than the model reads" in run("update", "idx", "long.jsonl").out
    run("delete", "idx", "long")
    Path("long.jsonl").unlink()
    assert "2 texts deleted: 78" in run("delete", "idx", "t3", "t4").out
    assert "78 texts" in run("compact", "idx").out
    said = run("query", "idx", TEXTS[70], "--top", "2", "--beside", model).out.splitlines()
    assert said[1].split()[0] == "t70" and said[1].split()[1] == said[1].split()[2] == "1.0000" and len(said) == 3
    Path("q.txt").write_text("\n".join(TEXTS[10:13]))
    found = json.loads(run("query", "idx", "--queries", "q.txt", "--hybrid", "--top", "3", "--json").out)
    assert [entry["hits"][0]["id"] for entry in found] == ["t10", "t11", "t12"]
    found = json.loads(run("query", "idx", TEXTS[70], "--where", "kind=1", "name=n0", "--json").out)
    assert found[0]["hits"][0]["id"] == "t70" and all(hit["columns"]["kind"] == 1 for hit in found[0]["hits"])
    assert "nothing was found" in run("query", "idx", "xyzzy", "--lexical").out
    for words, says in (
        (["query", "idx", ""], "a query cannot be empty"),
        (["query", "idx", "a", "--exact", "--hybrid"], "exclude each other"),
        (["query", "idx", "a", "--where", "kind"], "not of the form column=value"),
        (["query", "nowhere", "a"], "is not an index"),
        (["delete", "idx", "zzz"], "no text with the id zzz"),
        (["index", "none.txt", "--model", model, "--out", "other"], "cannot be read"),
    ):
        assert says in run(*words, code=2).err
    monkeypatch.setattr("sys.stdin", io.StringIO("ba be\n\nbi bo\n"))
    assert "1 rows left out: blank" in run("index", "-", "--model", model, "--out", "lines").out
    shutil.rmtree("lines")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "idx", "q.txt"]


def test_top_k_over_views_is_top_k_over_arrays():
    from embedtune.search.views import Chosen, Restored, Stacked, signs

    draw = np.random.default_rng(0)
    parts = [draw.standard_normal((n, 12)).astype(np.float32) for n in (5, 0, 40, 17)]
    matrix, queries = np.concatenate(parts), draw.standard_normal((6, 12)).astype(np.float32)
    stacked = Stacked(parts, 12)
    rows = np.sort(draw.permutation(62)[:30])
    for view, array in ((stacked, matrix), (Chosen(stacked, rows), matrix[rows])):
        for block in (1, 7, 100):
            for a, b in zip(top_k(queries, view, 9, block=block), top_k(queries, array, 9)):
                np.testing.assert_array_equal(a, b)
    bits = (np.packbits(matrix > 0, axis=-1) - 128).astype(np.int8)
    restored = Restored(bits, lambda codes: signs(codes, 12), 12)
    np.testing.assert_allclose(restored[3:20], Unit(np.where(matrix > 0, 1, -1))[3:20], atol=1e-6)
