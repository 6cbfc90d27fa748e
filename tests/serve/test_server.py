import asyncio
import base64
import json

import numpy as np
import pytest

pytest.importorskip("fastapi")

from serving import Client, FakeModel, serving  # noqa: E402

from embedtune.serve.app import Service, make_app  # noqa: E402
from embedtune.serve.batcher import Limits  # noqa: E402
from embedtune.serve.guard import BODY, DEPTH, Guard, too_deep  # noqa: E402

ROUTES = [
    *(("GET", path) for path in ("/v1/models", "/info", "/readyz", "/health", "/metrics", "/about", "/map")),
    *(("POST", path) for path in ("/v1/embeddings", "/embed", "/search", "/feedback")),
    *(("GET", path) for path in ("/", "/page.js", "/openapi.json", "/nothing")), ("DELETE", "/embed"),
]  # fmt: skip


def served(test, model=None, **given):
    """Run an async test with a client."""

    async def go():
        async with serving(model or FakeModel(), **given) as (client, service):
            await test(client, service)

    asyncio.run(go())


def test_float_and_base64_are_the_same_vectors_in_the_order_of_the_texts():
    async def test(client, service):
        texts = ["a", "b c", "a", ""[:0] + "d"]
        _, _, plain = await client("POST", "/v1/embeddings", {"input": texts, "model": "fake"})
        _, _, packed = await client("POST", "/v1/embeddings", {"input": texts, "encoding_format": "base64"})
        vectors = np.array([row["embedding"] for row in plain["data"]])
        unpacked = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in packed["data"]]
        assert np.allclose(vectors, unpacked, atol=1e-7) and np.allclose(vectors[0], vectors[2])
        assert not np.allclose(vectors[0], vectors[1])
        assert [row["index"] for row in plain["data"]] == [0, 1, 2, 3]
        assert plain["usage"] == {"prompt_tokens": 3 + 4 + 3 + 3, "total_tokens": 13} and plain["model"] == "fake"

    served(test)


def test_another_models_name_is_not_answered_and_errors_say_what_to_do():
    async def test(client, service):
        status, _, body = await client("POST", "/v1/embeddings", {"input": "a", "model": "text-embedding-3-small"})
        assert status == 404 and "there is fake" in body["error"]["message"]
        service.also = ("text-embedding-3-small",)
        assert (await client("POST", "/v1/embeddings", {"input": "a", "model": "text-embedding-3-small"}))[0] == 200
        for raw, said in (
            (b"{bad", "not JSON, from character 1"), (b'{"input": []}', "at least 1 item"), (b'"a"', "JSON object"),
            (b'{"input": "a", "imput": 1}', "imput: Extra inputs"),
        ):  # fmt: skip
            status, _, body = await client("POST", "/v1/embeddings", raw=raw)
            assert status == 422 and said in body["error"]["message"]

    served(test)


def test_a_text_alone_a_row_of_ids_and_rows_of_ids():
    async def test(client, service):
        for given, count in (("a", 1), ([1, 2], 1), ([[1, 2], [3]], 2)):
            status, _, body = await client("POST", "/v1/embeddings", {"input": given})
            assert status == 200 and len(body["data"]) == count
        status, _, body = await client("POST", "/v1/embeddings", {"input": [[1], [5000]]})
        assert status == 422 and "token id" in body["error"]["message"]

    served(test)


def test_dimensions_and_roles():
    async def test(client, service):
        _, _, short = await client("POST", "/v1/embeddings", {"input": "a", "dimensions": 3})
        _, _, full = await client("POST", "/v1/embeddings", {"input": "a"})
        vector = np.array(full["data"][0]["embedding"])[:3]
        assert np.allclose(short["data"][0]["embedding"], vector / np.linalg.norm(vector))
        status, _, body = await client("POST", "/v1/embeddings", {"input": "a", "dimensions": 9})
        assert status == 422 and "the model has 8" in body["error"]["message"]
        _, _, query = await client("POST", "/v1/embeddings", {"input": "a", "role": "query"})
        assert not np.allclose(query["data"][0]["embedding"], full["data"][0]["embedding"])

    served(test)


def test_text_embeddings_inference():
    async def test(client, service):
        _, _, one = await client("POST", "/embed", {"inputs": "a"})
        _, _, many = await client("POST", "/embed", {"inputs": ["a", "b"], "normalize": True, "truncate": True})
        assert len(one) == 1 and len(many) == 2 and np.allclose(one[0], many[0])
        status, _, body = await client("POST", "/embed", {"inputs": "a", "prompt_name": "nope"})
        assert status == 422 and "query, document" in body["error"]["message"]
        status, _, body = await client("POST", "/embed", {"inputs": "w " * 40, "truncate": False})
        assert status == 413 and "32 tokens" in body["error"]["message"]
        # What it cannot do is refused, not ignored: this model normalises, and texts are cut at their end.
        for wrong in ({"normalize": False}, {"truncation_direction": "left"}):
            assert (await client("POST", "/embed", {"inputs": "a", **wrong}))[0] == 422
        _, _, info = await client("GET", "/info")
        assert info["model_id"] == "fake" and info["max_input_length"] == 32

    served(test)


@pytest.mark.parametrize(("body", "status"), [
    ({"input": []}, 422), ({"input": ""}, 422), ({"input": ["a", ""]}, 422), ({"input": [1, "a"]}, 422),
    ({"input": [1.5]}, 422), ({"input": None}, 422), ({"input": True}, 422), ({"input": {"a": 1}}, 422),
    ({"input": [-1]}, 422), ({"input": [[]]}, 422), ({"input": "a", "imput": 1}, 422), ({}, 422), ([], 422),
    ({"input": "a", "dimensions": 0}, 422), ({"input": "a", "dimensions": "3"}, 422), ({"input": ["a"] * 2049}, 422),
    ({"input": "a", "encoding_format": "hex"}, 422), ({"input": "x" * 200_001}, 422),
])  # fmt: skip
def test_what_is_asked_wrongly_is_an_error_in_openais_form(body, status):
    async def test(client, service):
        found, _, answer = await client("POST", "/v1/embeddings", body)
        assert found == status and set(answer) == {"error"}
        assert set(answer["error"]) == {"message", "type", "param", "code"} and answer["error"]["message"]

    served(test)


def test_bodies_that_are_no_json_too_large_or_too_deep():
    async def test(client, service):
        for raw, status in ((b"{", 422), (b"", 422), (b'{"input": "\xff"}', 400), (b"x" * (BODY + 1), 413),
                            (b"[" * 50, 400), (b'{"input": ' + b"[" * 40 + b"]" * 40 + b"}", 400)):  # fmt: skip
            found, _, answer = await client("POST", "/v1/embeddings", raw=raw)
            assert found == status and answer["error"]["message"], raw[:20]
        lying = [(b"content-length", b"3")]
        app = client.app.app
        parts = [b"x" * 2**20] * 4

        async def receive():
            return {"type": "http.request", "body": parts.pop(), "more_body": bool(parts)}

        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": lying}
        await Guard(app)(scope, receive, send)
        assert sent[0]["status"] == 413 and parts, "it is refused before all of it is read"

    served(test)


def test_depth_counts_brackets_outside_of_strings_only():
    deep = "[" * (DEPTH + 1)
    assert too_deep(deep.encode()) and not too_deep(json.dumps({"input": deep}).encode())
    assert not too_deep(b"[" * DEPTH + b"]" * DEPTH) and not too_deep(b"[]" * 1000)
    assert too_deep(b'"\\"' + b'"' + b"[" * (DEPTH + 1)) and not too_deep(b'"\\\\\\"' + b"[" * 100 + b'"')


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("header", [
    None, b"Bearer wrong-key", b"Bearer secret-ke", b"Bearer secret-key-and-more", b"bearer secret-key",
    b"Bearer  secret-key", "Bearer sécret".encode(), b"Basic !!", b"secret-key", b"",
    b"Basic " + base64.b64encode(b"user:wrong"),
])  # fmt: skip
def test_without_the_key_there_is_nothing_but_life(method, path, header):
    async def test(client, service):
        headers = [] if header is None else [(b"authorization", header)]
        status, found, body = await client(method, path, {"input": "a"}, headers)
        assert status == 401 and body["error"]["type"] == "authentication_error" and b"www-authenticate" in found
        twice = [(b"authorization", b"Bearer secret-key")] * 2
        assert (await client(method, path, {"input": "a"}, twice))[0] == 401
        assert (await client("GET", "/livez", headers=headers))[0] == 200

    served(test, key="secret-key")


def test_with_the_key_there_is_everything():
    async def test(client, service):
        for header in (b"Bearer secret-key", b"Basic " + base64.b64encode(b"anyone:secret-key")):
            status, _, _ = await client("POST", "/v1/embeddings", {"input": "a"}, [(b"authorization", header)])
            assert status == 200

    served(test, key="secret-key")


def test_unknown_paths_and_methods_have_the_same_form_of_error():
    async def test(client, service):
        for method, path, status in (
            ("GET", "/nope", 404), ("GET", "/embed", 405), ("DELETE", "/v1/models", 405), ("GET", "/../x", 404),
            ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404), ("GET", "/page.js/../../app.py", 404), ("GET", "/about", 404),
        ):  # fmt: skip
            found, _, body = await client(method, path)
            assert found == status and body["error"]["message"]

    served(test)


def test_nan_and_a_crash_are_errors_of_their_own_text_alone():
    async def test(client, service):
        both = await asyncio.gather(
            client("POST", "/v1/embeddings", {"input": "nan"}), client("POST", "/v1/embeddings", {"input": "fine"}),
            client("POST", "/v1/embeddings", {"input": "boom"}), client("POST", "/v1/embeddings", {"input": "good"}),
        )  # fmt: skip
        assert [status for status, _, _ in both] == [500, 200, 500, 200]
        assert "NaN" in both[0][2]["error"]["message"] and "boom" not in json.dumps(both[2][2])
        _, _, text = await client("GET", "/metrics")
        assert "embedtune_not_finite_total 1.0" in text
        assert 'embedtune_requests_total{path="/v1/embeddings",status="500"} 2.0' in text

    served(test)


def test_while_it_loads_and_while_it_stops_it_says_503_and_when_to_come_back():
    async def go():
        loading = asyncio.Event()
        loop = asyncio.get_running_loop()

        def load():
            asyncio.run_coroutine_threadsafe(loading.wait(), loop).result(20)
            return FakeModel(), ()

        service = Service(load, Limits())
        app = make_app(service)
        client = Client(app)
        async with app.router.lifespan_context(app):
            for path in ("/readyz", "/health", "/v1/models", "/info"):
                status, headers, _ = await client("GET", path)
                assert status == 503 and int(headers[b"retry-after"]) > 0
            assert (await client("GET", "/livez"))[0] == 200
            loading.set()
            while (await client("GET", "/readyz"))[0] != 200:
                await asyncio.sleep(0.01)
            assert (await client("POST", "/embed", {"inputs": "a"}))[0] == 200
            service.draining = True
            assert (await client("POST", "/embed", {"inputs": "a"}))[0] == 503

    asyncio.run(go())


def test_a_model_that_cannot_be_loaded_ends_the_server():
    async def go():
        def load():
            raise ValueError("no weights here")

        ended = []
        service = Service(load, Limits())
        service.give_up = lambda: ended.append(True)
        app = make_app(service)
        async with app.router.lifespan_context(app):
            while not service.failed:
                await asyncio.sleep(0.01)
            status, _, body = await Client(app)("GET", "/readyz")
            assert status == 503 and "no weights here" in body["error"]["message"] and ended

    asyncio.run(go())


def test_the_openapi_document_names_every_route():
    async def test(client, service):
        _, _, found = await client("GET", "/openapi.json")
        assert {path for method, path in ROUTES if path not in ("/openapi.json", "/nothing", "/", "/page.js")} <= set(
            found["paths"]
        )

    served(test)


def test_a_full_queue_from_which_nothing_comes_is_not_ready():
    async def test(client, service):
        service.model.gate.clear()
        service.batcher.limits = Limits(queue_items=1)
        asked = []
        for _ in range(2):  # one is computed, without an end, and one waits
            asked.append(asyncio.ensure_future(client("POST", "/embed", {"inputs": "a"})))
            await asyncio.sleep(0.1)
        service.batcher.worked -= 20
        assert (await client("GET", "/readyz"))[0] == 200  # a long batch may be
        service.batcher.worked -= 20
        assert (await client("GET", "/readyz"))[0] == 503
        service.model.gate.set()
        assert [status for status, _, _ in await asyncio.gather(*asked)] == [200, 200]

    served(test)
