"""The official clients, over a real socket."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from serving import FakeModel, free_port, listening  # noqa: E402

from embedtune.serve.app import Service  # noqa: E402
from embedtune.serve.batcher import Limits  # noqa: E402

TEXTS = ["a text", "another one", "a text"]


@pytest.fixture(scope="module")
def address():
    with listening(Service(lambda: (FakeModel(), ()), Limits()), "secret-key") as port:
        yield f"http://127.0.0.1:{port}"


def test_openais_client(address):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret-key", max_retries=0)
    packed = client.embeddings.create(model="fake", input=TEXTS)  # this client asks for base64
    plain = client.embeddings.create(model="fake", input=TEXTS, encoding_format="float", dimensions=4)
    vectors = np.array([row.embedding for row in packed.data])
    assert vectors.shape == (3, 8) and np.allclose(vectors[0], vectors[2]) and packed.usage.prompt_tokens == 12
    short = vectors[:, :4] / np.linalg.norm(vectors[:, :4], axis=1, keepdims=True)
    assert np.allclose([row.embedding for row in plain.data], short, atol=1e-6)
    assert len(client.embeddings.create(model="fake", input=[[1, 2], [3]]).data) == 2
    assert [model.id for model in client.models.list()] == ["fake"]
    for wrong, error, said in (
        ({"input": [""]}, openai.UnprocessableEntityError, "at least 1 character"),
        ({"input": [[999_999]]}, openai.UnprocessableEntityError, "token id"),
        ({"input": "a", "dimensions": 9}, openai.UnprocessableEntityError, "the model has 8"),
        ({"input": "a", "model": "another"}, openai.NotFoundError, "there is fake"),
        ({"input": "nan"}, openai.InternalServerError, "NaN"),
        ({"input": "x" * 3_000_000}, openai.APIStatusError, "larger than"),
    ):
        with pytest.raises(error) as found:
            client.embeddings.create(**{"model": "fake", **wrong})
        assert said in found.value.body["message"]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()


def test_openais_asynchronous_client_and_a_full_queue(address):
    openai = pytest.importorskip("openai")

    async def ask(port, count):
        async with openai.AsyncOpenAI(base_url=f"{port}/v1", api_key="secret-key", max_retries=0) as client:
            asked = (client.embeddings.create(model="fake", input=f"text {n}") for n in range(count))
            return await asyncio.gather(*asked, return_exceptions=True)

    answers = asyncio.run(ask(address, 40))
    vectors = np.array([answer.data[0].embedding for answer in answers])
    assert vectors.shape == (40, 8) and len(np.unique(vectors.round(6), axis=0)) == 40

    model = FakeModel()
    service = Service(lambda: (model, ()), Limits(queue_items=4))
    with listening(service, "secret-key") as port:
        model.gate.clear()
        threading.Timer(2.0, model.gate.set).start()
        answers = asyncio.run(ask(f"http://127.0.0.1:{port}", 40))
        refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
        assert refused and len(refused) + sum(hasattr(answer, "data") for answer in answers) == 40
        assert all(int(answer.response.headers["retry-after"]) >= 1 for answer in refused)


def test_huggingface_hubs_client(address, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)  # it calls its own address offline
    client = hub.InferenceClient(model=f"{address}/embed", token="secret-key")
    found = client.feature_extraction("a text")
    assert np.asarray(found).shape == (1, 8)
    with pytest.raises(hub.errors.HfHubHTTPError) as wrong:
        client.feature_extraction("a text", prompt_name="nope")
    assert wrong.value.response.status_code == 422
    assert np.asarray(client.feature_extraction("a text", normalize=True, truncate=True)).shape == (1, 8)


def ask(url, key=None):
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.status, answer.read()


def test_the_command_serves_answers_and_stops_on_a_signal(tiny_model, tmp_path):
    port, key = free_port(), "a-secret-key"
    words = ["serve", str(tiny_model("bert")), "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-c", "from embedtune.cli import main; main()", *words],
        env={**os.environ, "EMBEDTUNE_API_KEY": key}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        for _ in range(1200):
            try:
                assert ask(f"http://127.0.0.1:{port}/readyz", key)[0] == 200
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, server.stderr.read()
                time.sleep(0.1)
        assert ask(f"http://127.0.0.1:{port}/livez")[0] == 200
        with pytest.raises(urllib.error.HTTPError):
            ask(f"http://127.0.0.1:{port}/metrics")
    finally:
        server.send_signal(signal.SIGTERM)
        out, said = server.communicate(timeout=60)
    assert server.returncode in (0, 143) and "Traceback" not in said and key not in said + out
