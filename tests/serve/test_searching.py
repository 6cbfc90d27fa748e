import asyncio
import json

import numpy as np
import pytest

pytest.importorskip("fastapi")

from serving import Client, in_process  # noqa: E402

from embedtune.data.pairs import read_pairs  # noqa: E402
from embedtune.errors import UserError  # noqa: E402
from embedtune.search.index import Index, create  # noqa: E402
from embedtune.search.rows import Record  # noqa: E402
from embedtune.serve.app import Service, make_app  # noqa: E402
from embedtune.serve.batcher import Batcher, Hangs, Limits  # noqa: E402
from embedtune.serve.guard import Guard  # noqa: E402
from embedtune.serve.shelf import PASSAGE, flat, open_all, passages  # noqa: E402

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>"
WORDS = ["bade", "fima", "lora"]


@pytest.fixture(autouse=True)
def no_process(monkeypatch):
    monkeypatch.setattr("embedtune.serve.shelf.open_remote", in_process)


def records(count=40):
    texts = [f"{WORDS[n % 3]} {WORDS[n // 3 % 3]} number {n}" for n in range(count)]
    return [Record(f"t{n}", text, {"kind": WORDS[n % 3], "n": n}) for n, text in enumerate([*texts, HOSTILE])]


@pytest.fixture
def indexes(tiny_model, tmp_path):
    for kind in ("bert", "distilbert"):
        create(tmp_path / kind, str(tiny_model(kind)), records(), precision="fp32")
    return tmp_path


def served(test, model, folders, feedback):
    async def go():
        service = Service(lambda: open_all(str(model), [str(f) for f in folders], "fp32", 512), Limits(), feedback)
        app = make_app(service)
        async with app.router.lifespan_context(app):
            while service.library is None and not service.failed:
                await asyncio.sleep(0.01)
            assert not service.failed, service.failed
            await test(Client(Guard(app)))

    asyncio.run(go())


def test_search_gives_what_the_index_gives(indexes, tiny_model, tmp_path):
    wanted = Index.load(indexes / "bert").search(["lora bade"], 5, where={"kind": "fima"})[0]

    async def test(client):
        body = {"query": " lora bade ", "top": 5, "where": {"kind": "fima"}}
        status, _, found = await client("POST", "/search", body)
        hits = found["results"][0]["hits"]
        assert status == 200 and [hit["id"] for hit in hits] == [hit.id for hit in wanted]
        assert np.allclose([hit["score"] for hit in hits], [hit.score for hit in wanted], atol=1e-5)
        assert all(hit["columns"]["kind"] == "fima" and hit["moved"] is None for hit in hits)
        _, _, about = await client("GET", "/about")
        assert about["texts"] == 41 and about["filters"]["kind"] == sorted(WORDS) and "n" not in about["filters"]

    served(test, tiny_model("bert"), [indexes / "bert"], tmp_path / "votes.jsonl")


def test_two_indexes_stand_side_by_side_and_what_moved_is_said(indexes, tiny_model, tmp_path):
    async def test(client):
        _, _, found = await client("POST", "/search", {"query": "lora", "top": 10})
        tuned, base = ([hit["id"] for hit in one["hits"]] for one in found["results"])
        assert tuned != base and len(tuned) == len(base) == 10
        for place, hit in enumerate(found["results"][0]["hits"]):
            assert hit["new"] == (hit["id"] not in base)
            assert hit["moved"] == (None if hit["new"] else base.index(hit["id"]) - place)

    served(test, tiny_model("bert"), [indexes / "bert", indexes / "distilbert"], tmp_path / "votes.jsonl")


def test_a_passage_that_comes_too_late_costs_no_hits(indexes, tiny_model, tmp_path, monkeypatch):
    asked = []
    inner = Batcher.ask

    async def ask(self, given):
        asked.append(len(given))
        if len(given) > 1 and given[0].content != "a text to warm up":
            raise Hangs("the model does not answer")
        return await inner(self, given)

    monkeypatch.setattr(Batcher, "ask", ask)

    async def test(client):
        status, _, found = await client("POST", "/search", {"query": "lora", "top": 41})
        assert status == 200 and len(found["results"][0]["hits"]) == 41
        assert all(hit["passage"] == [0, 0] for hit in found["results"][0]["hits"])

    create(
        tmp_path / "long", str(tiny_model("bert")), [Record(f"t{n}", "lora bade fima. " * 40, {}) for n in range(41)]
    )
    served(test, tiny_model("bert"), [tmp_path / "long"], tmp_path / "votes.jsonl")
    assert max(asked[1:]) <= 10 * 16, "passages of the first ten texts alone"


def test_a_search_whose_client_leaves_is_dropped(indexes, tiny_model, tmp_path, monkeypatch):
    dropped, gone, inner = [], asyncio.Event(), Batcher.ask

    async def ask(self, given):
        if given[0].content != "lora":
            return await inner(self, given)
        gone.set()
        try:
            return await asyncio.sleep(60)
        except asyncio.CancelledError:
            dropped.append(given)
            raise

    monkeypatch.setattr(Batcher, "ask", ask)

    async def test(client):
        status, _, _ = await client("POST", "/search", {"query": "lora"}, gone=gone)
        assert status == 499 and len(dropped) == 1
        assert (await client("POST", "/search", {"query": "bade"}))[0] == 200

    served(test, tiny_model("bert"), [indexes / "bert"], tmp_path / "votes.jsonl")


def test_votes_are_kept_with_their_texts_and_train(indexes, tiny_model, tmp_path):
    votes = tmp_path / "votes.jsonl"

    async def test(client):
        for key, verdict in (("t1", "up"), ("t40", "down"), ("t2", "up")):
            status, _, _ = await client("POST", "/feedback", {"query": "lora", "id": key, "verdict": verdict})
            assert status == 200
        status, _, body = await client("POST", "/feedback", {"query": "lora", "id": "nope", "verdict": "up"})
        assert status == 404 and "nope" in body["error"]["message"]

    served(test, tiny_model("bert"), [indexes / "bert"], votes)
    assert [json.loads(line)["verdict"] for line in votes.read_text().splitlines()] == ["up", "down", "up"]
    assert {(p.anchor, p.positive, p.negatives) for p in read_pairs(votes)} == {
        ("lora", records()[1].text, (HOSTILE,)), ("lora", records()[2].text, (HOSTILE,)),
    }  # fmt: skip


@pytest.mark.parametrize(("body", "status"), [
    ({"query": ""}, 422), ({"query": "  "}, 422), ({"query": "x" * 10_001}, 422), ({"query": "a", "top": 0}, 422),
    ({"query": " " + "x" * 10_000}, 422), ({"query": " \x1c\u2028"}, 422),
    ({"query": "a", "top": 101}, 422), ({"query": "a", "mode": "magic"}, 422), ({"query": "a", "limit": 3}, 422),
    ({"query": "a", "where": {"colour": "red"}}, 422), ({"query": "a", "where": {"kind": 3}}, 422), ({}, 422),
])  # fmt: skip
def test_searches_that_cannot_be(indexes, tiny_model, tmp_path, body, status):
    async def test(client):
        found, _, answer = await client("POST", "/search", body)
        assert found == status and answer["error"]["message"]

    served(test, tiny_model("bert"), [indexes / "bert"], tmp_path / "votes.jsonl")


def test_the_map_and_the_page(indexes, tiny_model, tmp_path):
    async def test(client):
        _, _, atlas = await client("GET", "/map")
        assert atlas["total"] == len(atlas["points"]) == 41 and atlas["columns"] == ["kind", "cluster"]
        assert all(0 <= point["x"] <= 1 and 0 <= point["y"] <= 1 for point in atlas["points"])
        for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
            status, headers, text = await client("GET", path)
            assert status == 200 and headers[b"content-type"].startswith(kind.encode()) and len(text) > 1000
            assert b"default-src 'none'" in headers[b"content-security-policy"]
            # Nothing of it comes from elsewhere.
            assert "http:" not in text and "https:" not in text

    served(test, tiny_model("bert"), [indexes / "bert"], tmp_path / "votes.jsonl")


def test_an_index_of_another_model_is_refused(indexes, tiny_model):
    with pytest.raises(UserError, match="is not the model"):
        open_all(str(tiny_model("bert")), [str(indexes / "distilbert")], "fp32", 512)
    with pytest.raises(UserError, match="not an index"):
        open_all(str(tiny_model("bert")), [str(indexes)], "fp32", 512)


def test_passages_are_whole_sentences_that_cover_the_start_of_a_text():
    text = " ".join(f"This is sentence number {n} of a text." for n in range(60))
    spans = passages(text)
    assert spans[0][0] == 0 and all(a[1] == b[0] for a, b in zip(spans, spans[1:]))
    assert all(text[a:b].strip().startswith("This") and text[a:b].strip().endswith(".") for a, b in spans)
    assert passages("short.") == [] and passages("x" * (3 * PASSAGE)) == [(0, 3 * PASSAGE)]


def test_the_plane_shows_the_two_widest_directions():
    random = np.random.default_rng(0)
    hidden = random.normal(size=(500, 2)) * [5, 3]
    basis = np.linalg.qr(random.normal(size=(8, 8)))[0][:2]
    spots, explained = flat(hidden @ basis + 0.1 * random.normal(size=(500, 8)) + 7)
    assert explained > 0.98
    assert abs(np.corrcoef(spots[:, 0], hidden[:, 0])[0, 1]) > 0.97
    assert abs(np.corrcoef(spots[:, 1], hidden[:, 1])[0, 1]) > 0.97
    same, nothing = flat(np.ones((5, 4)))
    assert nothing == 0 and np.isfinite(same).all()
