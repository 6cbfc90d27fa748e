"""Hosted models against a service on this machine that is busy, broken, torn, wrong and talkative by turns."""

import sys
import traceback
import types

import numpy as np
import pytest

from embedtune.encoder import calls
from embedtune.encoder.hosted import open_hosted
from embedtune.errors import UserError
from service import serve, vector

pytest.importorskip("openai")
KEY = "sk-test-0123456789abcdefSECRET"
TEXTS = ["one", "two words", "and three words"]


@pytest.fixture
def service(monkeypatch):
    for name in ("OPENAI_BASE_URL", "GOOGLE_CLOUD_PROJECT", "GOOGLE_API_KEY", "GEMINI_API_KEY", "OPENAI_ORG_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serve() as running:
        yield running


@pytest.fixture
def waits(monkeypatch):
    """The waits, in seconds, that would have been."""
    found = []
    monkeypatch.setattr(calls, "sleep", found.append)
    return found


def expected(texts):
    return np.array([vector(text) for text in texts], np.float32)


def asked(service):
    return [request["input"] for request in service.requests if request["input"] != ["dimension"]]


def refusal(call):
    with pytest.raises(UserError) as caught:
        call()
    whole = "".join(traceback.format_exception(caught.value))
    assert KEY not in whole + repr(caught.value.args) and KEY[3:20] not in whole
    return str(caught.value)


def test_vectors_come_in_the_order_of_the_texts_as_float32(service):
    model = open_hosted("openai:small", base_url=service.address)
    got = model.encode(TEXTS, "query")
    assert got.dtype == np.float32 and model.dimension == 8 and model.name == "openai:small"
    np.testing.assert_array_equal(got, expected(TEXTS))
    assert service.requests[-1]["model"] == "small" and service.requests[-1]["path"] == "/v1/embeddings"
    assert service.requests[-1]["headers"]["authorization"] == f"Bearer {KEY}"
    assert model.encode([]).shape == (0, 8)


def test_the_address_may_come_from_the_environment_and_needs_no_key(service, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", service.address + "/")
    monkeypatch.delenv("OPENAI_API_KEY")
    np.testing.assert_array_equal(open_hosted("openai:small").encode(TEXTS), expected(TEXTS))


def test_repeats_are_asked_for_once_and_blanks_never(service):
    model = open_hosted("openai:small", base_url=service.address)
    got = model.encode(["one", " ", "one", "two", ""])
    assert asked(service) == [["one", "two"]]
    np.testing.assert_array_equal(got, [*expected(["one"]), [0] * 8, *expected(["one", "two"]), [0] * 8])
    assert model.usage["blank"] == 2 and model.usage["texts"] == 5


def test_a_busy_service_is_asked_again_when_it_says(service, waits):
    said = []
    model = open_hosted("openai:small", base_url=service.address, note=said.append)
    service.script = [(429, {"retry-after": "7"}, {}), (429, {"retry-after-ms": "250"}, {}), None]
    np.testing.assert_array_equal(model.encode(TEXTS), expected(TEXTS))
    assert waits == [7.0, 0.25]
    assert model.usage["retries"] == 2 and model.usage["requests"] == 4
    assert len(said) == 2 and "HTTP 429" in said[0] and "7 s" in said[0]


def test_waits_double_and_are_capped(service, waits):
    model = open_hosted("openai:small", base_url=service.address)
    service.script = [(500, {}, "oops"), (503, {}, {}), (429, {"retry-after": "86400"}, {}), (502, {}, ""), None]
    np.testing.assert_array_equal(model.encode(TEXTS), expected(TEXTS))
    assert waits == [1.0, 2.0, 60.0, 8.0]


def test_a_service_that_stays_busy_is_given_up(service, waits):
    model = open_hosted("openai:small", base_url=service.address)
    service.script = [(503, {}, {"error": {"message": KEY}})] * 99
    assert "HTTP 503) (6 attempts)" in refusal(lambda: model.encode(TEXTS))
    assert len(waits) == calls.ATTEMPTS - 1


def test_a_torn_answer_is_asked_for_again(service, waits):
    model = open_hosted("openai:small", base_url=service.address)
    service.script = ["torn", None]
    np.testing.assert_array_equal(model.encode(TEXTS), expected(TEXTS))
    service.script = ["torn"] * 99
    assert "broke off" in refusal(lambda: model.encode(["new"]))
    assert len(waits) == 1 + calls.ATTEMPTS_GONE - 1


def test_no_service_at_all_is_one_clear_message(waits):
    with serve() as running:
        address = running.address
    message = refusal(lambda: open_hosted("openai:small", base_url=address))
    assert message.startswith("openai:small: cannot be reached") and "fix: check the network" in message


def test_no_credit_is_not_waited_for(service, waits):
    service.script = [(429, {}, {"error": {"message": "You exceeded", "code": "insufficient_quota"}})]
    assert "no credit left" in refusal(lambda: open_hosted("openai:small", base_url=service.address))
    assert waits == []


@pytest.mark.parametrize("status", [400, 401, 403, 404, 418, 422])
def test_a_key_that_the_service_says_is_not_said_again(service, waits, status, caplog, capfd):
    said = []
    service.script = [(status, {}, {"error": {"message": f"Incorrect API key: {KEY}, sk-test****CRET"}})]
    message = refusal(lambda: open_hosted("openai:small", base_url=service.address, note=said.append))
    output = message + "".join(said) + caplog.text + "".join(capfd.readouterr())
    assert KEY not in output and "sk-" not in output and f"HTTP {status}" in message
    assert len(service.requests) == 1


def test_passwords_in_an_address_are_not_said(service, waits):
    address = service.address.replace("http://", "http://user:hunter2@")
    service.script = [(500, {}, {})] * 99
    assert "hunter2" not in refusal(lambda: open_hosted("openai:small", base_url=address))
    said = []
    calls.openai_client("http://user:hunter2@models.example/v1", "x", said.append)
    assert said == ["x: the key in OPENAI_API_KEY goes to http://***@models.example/v1 unencrypted"]


def answered(change):
    """A request's good answer, changed."""

    def reply(request):
        data = [{"index": i, "embedding": vector(text)} for i, text in enumerate(request["input"])]
        return change(data)

    return reply


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: {"data": data[:-1]}, "answered 3 texts with 2 vectors"),
        (lambda data: {"data": [{**each, "embedding": [1.0]} for each in data]}, "1 numbers a text where it had 8"),
        (lambda data: {"data": [data[0], {"index": 1, "embedding": [1.0]}, data[2]]}, "unequal or no length"),
        (lambda data: {"data": [{**each, "embedding": "abc"} for each in data]}, "unequal or no length"),
        (lambda data: {"data": [{**each, "embedding": None} for each in data]}, "unequal or no length"),
        (lambda data: {"data": [{**each, "embedding": []} for each in data]}, "unequal or no length"),
        (lambda data: {"data": [{**each, "index": 0} for each in data]}, "which vector is whose"),
        (lambda data: {"data": [{**each, "index": [0]} for each in data]}, "which vector is whose"),
        (lambda data: {"data": "none"}, "holds no embeddings"),
        (lambda data: {"data": [*data[:2], {"index": 2, "embedding": [float("nan")] * 8}]}, "not finite"),
        (lambda data: {"data": [*data[:2], {"index": 2, "embedding": [1e39] * 8}]}, "not finite"),
        (lambda data: [], "no JSON object"),
        (lambda data: (200, {"content-type": "text/html"}, "<html>Log in</html>"), "JSON"),
        (lambda data: '{"data": [', "JSON"),
    ],
)
def test_a_wrong_answer_is_refused_and_not_kept(service, waits, tmp_path, change, words):
    model = open_hosted("openai:small", base_url=service.address, cache=tmp_path)
    kept = sorted(tmp_path.rglob("*.npy"))
    service.script = [answered(change)] * 9
    message = refusal(lambda: model.encode(TEXTS))
    assert words in message and message.startswith("openai:small: ")
    assert sorted(tmp_path.rglob("*.npy")) == kept
    service.script = []
    np.testing.assert_array_equal(model.encode(TEXTS), expected(TEXTS))


def test_calls_are_bounded_by_items_and_characters(service):
    model = open_hosted("openai:small", base_url=service.address)
    texts = [f"text {i}" for i in range(300)]
    np.testing.assert_array_equal(model.encode(texts), expected(texts))
    assert [len(batch) for batch in asked(service)] == [128, 128, 44]
    service.requests.clear()
    texts = [str(i) * 90_000 for i in range(5)]
    np.testing.assert_array_equal(model.encode(texts), expected(texts))
    assert [len(batch) for batch in asked(service)] == [2, 2, 1]


def test_a_service_that_takes_fewer_texts_gets_fewer(service):
    model = open_hosted("openai:small", base_url=service.address)
    service.most = 32
    texts = [f"text {i}" for i in range(300)]
    np.testing.assert_array_equal(model.encode(texts), expected(texts))
    assert model.items == 32 and len(asked(service)) < 16
    assert model.usage["cut"] == 0


def test_a_text_that_is_too_long_is_cut_and_counted(service):
    said = []
    model = open_hosted("openai:small", base_url=service.address, note=said.append)
    service.longest = 3000
    long = "word " * 2000
    np.testing.assert_array_equal(model.encode(["one", long, "two"]), expected(["one", long[:2500], "two"]))
    assert model.usage["cut"] == model.truncated == 1
    assert said == ["openai:small: a text of 10,000 characters is too long for the model and was cut"]
    service.longest = 10
    assert "HTTP 400" in refusal(lambda: model.encode(["x" * 400]))


def test_what_is_refused_for_another_reason_is_asked_once(service):
    model = open_hosted("openai:small", base_url=service.address)
    service.requests.clear()
    service.script = [(400, {}, {"error": {"message": "I do not like this."}})]
    assert "I do not like this." in refusal(lambda: model.encode(TEXTS))
    assert len(service.requests) == 1


def test_half_a_surrogate_pair_is_refused(service):
    model = open_hosted("openai:small", base_url=service.address)
    assert "surrogate" in refusal(lambda: model.encode(["\ud800"]))


def test_kept_vectors_are_not_asked_for_again(service, tmp_path):
    first = open_hosted("openai:small", base_url=service.address, cache=tmp_path)
    first.encode(TEXTS)
    service.requests.clear()
    again = open_hosted("openai:small", base_url=service.address, cache=tmp_path)
    np.testing.assert_array_equal(again.encode([*TEXTS, "new"], "document"), expected([*TEXTS, "new"]))
    assert [request["input"] for request in service.requests] == [["new"]]
    assert again.usage["cached"] == 3 and again.usage["texts"] == 4
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    for path in tmp_path.rglob("*.npy"):
        assert not np.load(path, allow_pickle=False).dtype.hasobject


def test_vectors_of_another_model_or_service_are_not_taken(service, tmp_path):
    open_hosted("openai:small", base_url=service.address, cache=tmp_path).encode(TEXTS)
    with serve() as other:
        open_hosted("openai:small", base_url=other.address, cache=tmp_path).encode(TEXTS)
        assert asked(other) == [TEXTS]
    service.requests.clear()
    open_hosted("openai:large", base_url=service.address, cache=tmp_path).encode(TEXTS)
    assert asked(service) == [TEXTS]


def test_a_failed_run_goes_on_where_it_was(service, waits, tmp_path):
    texts = [f"text {i}" for i in range(300)]
    model = open_hosted("openai:small", base_url=service.address, cache=tmp_path)
    service.script = [None, None, *[(500, {}, {})] * 99]
    refusal(lambda: model.encode(texts))
    service.script, service.requests = [], []
    model = open_hosted("openai:small", base_url=service.address, cache=tmp_path)
    np.testing.assert_array_equal(model.encode(texts), expected(texts))
    assert asked(service) == [texts[256:]]


def test_damaged_files_are_left_out_and_said(service, tmp_path):
    open_hosted("openai:small", base_url=service.address, cache=tmp_path).encode(TEXTS)
    (folder,) = tmp_path.iterdir()
    path = max(folder.glob("*.npy"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-30])
    np.save(folder / "other.npy", np.zeros(3))
    (folder / "torn.npy.tmp").write_bytes(b"x")
    said = []
    model = open_hosted("openai:small", base_url=service.address, cache=tmp_path, note=said.append)
    assert "2 damaged files" in said[0]
    np.testing.assert_array_equal(model.encode(TEXTS), expected(TEXTS))


def test_a_changed_model_behind_the_name_is_noticed(service, tmp_path):
    open_hosted("openai:small", base_url=service.address, cache=tmp_path)
    model = open_hosted("openai:small", base_url=service.address, cache=tmp_path)
    service.script = [answered(lambda data: {"data": [{**each, "embedding": [1.0, 2.0]} for each in data]})]
    assert "remove the cache folder" in refusal(lambda: model.encode(TEXTS))


def test_tokens_and_cost_are_counted(service):
    model = open_hosted("openai:small", base_url=service.address, price=0.5)
    model.encode(TEXTS)
    assert model.usage["tokens"] == 1 + 6 and model.usage["cost"] == pytest.approx(7 * 0.5e-6)
    assert open_hosted("openai:small", base_url=service.address).usage["cost"] is None


def test_what_is_missing_is_said_before_anything_is_sent(service, monkeypatch):
    assert "openai:MODEL" in refusal(lambda: open_hosted("openai:"))
    assert "openai:MODEL" in refusal(lambda: open_hosted("azure:x"))
    for address in ("localhost:8000", "ftp://x", "http://", "http://x:port", "http://a\nb"):
        assert "is no address" in refusal(lambda address=address: open_hosted("openai:small", base_url=address))
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\nX: y")
    assert "the key in OPENAI_API_KEY" in refusal(lambda: open_hosted("openai:small", base_url=service.address))
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "OPENAI_API_KEY is not set" in refusal(lambda: open_hosted("openai:small"))
    assert "GOOGLE_CLOUD_PROJECT" in refusal(lambda: open_hosted("vertex:text-embedding-005"))
    monkeypatch.setitem(sys.modules, "openai", None)
    message = refusal(lambda: open_hosted("openai:small", base_url=service.address))
    assert message.endswith("fix: pip install openai")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "p")
    monkeypatch.setitem(sys.modules, "google.genai", None)
    assert refusal(lambda: open_hosted("vertex:gemini-x")).endswith("fix: pip install google-genai")
    assert service.requests == []


def test_a_key_with_a_newline_at_its_end_works(service, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    open_hosted("openai:small", base_url=service.address)
    assert service.requests[-1]["headers"]["authorization"] == f"Bearer {KEY}"


class ApiError(Exception):
    """As google.genai.errors.APIError: the status is `code`."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code, self.message = code, message


@pytest.fixture
def vertex(monkeypatch):
    """A google.genai that answers by itself; what it is asked is in `asked`, what it is to raise in `script`."""
    module = types.ModuleType("google.genai")
    module.asked, module.script = [], []

    def embed_content(*, model, contents, config):
        module.asked.append((model, contents, config["task_type"]))
        if module.script and (step := module.script.pop(0)):
            raise step
        said = types.SimpleNamespace(token_count=2.0, truncated=False)
        numbers = [vector(config["task_type"] + text) for text in contents]
        return types.SimpleNamespace(embeddings=[types.SimpleNamespace(values=n, statistics=said) for n in numbers])

    client = types.SimpleNamespace(models=types.SimpleNamespace(embed_content=embed_content))
    module.Client = lambda **settings: client
    module.types = types.SimpleNamespace(HttpOptions=dict, EmbedContentConfig=dict)
    package = types.ModuleType("google")
    package.genai = module
    monkeypatch.setitem(sys.modules, "google", package)
    monkeypatch.setitem(sys.modules, "google.genai", module)
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "project")
    return module


def test_vertex_is_told_the_role_and_keeps_roles_apart(vertex, tmp_path):
    model = open_hosted("vertex:text-embedding-005", cache=tmp_path)
    query, document = model.encode(TEXTS, "query"), model.encode(TEXTS, "document")
    np.testing.assert_array_equal(query, expected(["RETRIEVAL_QUERY" + text for text in TEXTS]))
    np.testing.assert_array_equal(document, expected(["RETRIEVAL_DOCUMENT" + text for text in TEXTS]))
    assert model.usage["tokens"] == 2 + 6 + 6
    count = len(vertex.asked)
    model.encode(TEXTS, "query")
    assert len(vertex.asked) == count
    gemini = open_hosted("vertex:gemini-embedding-001")
    gemini.encode(TEXTS)
    assert [contents for _, contents, _ in vertex.asked[-3:]] == [[text] for text in TEXTS]


def test_vertex_is_asked_again_when_busy_and_errors_are_clear(vertex, waits, monkeypatch):
    monkeypatch.setenv("GOOGLE_API_KEY", KEY)
    model = open_hosted("vertex:text-embedding-005")
    vertex.script = [ApiError(429, "slow down"), None]
    assert model.encode(TEXTS).shape == (3, 8) and waits == [1.0]
    vertex.script = [ApiError(404, f"no model for {KEY}")]
    assert "no such model" in refusal(lambda: model.encode(["new"]))
    vertex.script = [type("RefreshError", (type("GoogleAuthError", (Exception,), {}),), {})(KEY)]
    assert "credentials" in refusal(lambda: model.encode(["new"]))


def test_the_real_vertex_client_against_a_service(service, waits, monkeypatch):
    pytest.importorskip("google.genai")
    monkeypatch.setenv("GOOGLE_API_KEY", KEY)

    def predict(request):
        texts = [each["content"] for each in request["instances"]]
        said = {"token_count": 2, "truncated": len(texts) == 3}
        return {"predictions": [{"embeddings": {"values": vector(text), "statistics": said}} for text in texts]}

    service.reply = predict
    model = open_hosted("vertex:text-embedding-005", base_url=service.address.removesuffix("/v1"))
    service.script = [(429, {"retry-after": "3"}, {"error": {"message": "slow", "code": 429}}), None]
    np.testing.assert_array_equal(model.encode(TEXTS, "query"), expected(TEXTS))
    assert waits == [3.0] and model.usage["tokens"] == 8 and model.usage["cut"] == 3
    assert {each["task_type"] for each in service.requests[-1]["instances"]} == {"RETRIEVAL_QUERY"}
    service.script = ["torn"] * 9
    assert "broke off" in refusal(lambda: model.encode(["new"]))
    service.script = [(403, {}, {"error": {"message": f"bad {KEY}", "code": 403, "status": "DENIED"}})]
    assert "key is not accepted" in refusal(lambda: model.encode(["new"]))
