"""A key stands nowhere but in the request it is for; a sentence of the data only in what was asked for."""

import json
import logging
import os
import shutil
import socket

import pytest

from conftest import corpus
from embedtune import cli, files, plots
from service import serve

KEY = "sk-SENTINEL-7c1f0e9b2a5d4836"
SENTENCE = "zebra quartz sentinel nobody else writes this"
LINES = [line for line in corpus(160, document=1000).splitlines() if len(line.split()) > 3]


def holds(home, words):
    """The files below a folder that hold the words, in UTF-8 or in base64, or have them in their name."""
    import base64

    forms = [words.encode(), base64.b64encode(words.encode()).rstrip(b"=")[:-1]]
    return [
        str(path.relative_to(home))
        for path in sorted(home.rglob("*"))
        if words in path.name or (path.is_file() and any(form in path.read_bytes() for form in forms))
    ]


@pytest.fixture
def heard(capfd, caplog):
    """heard() -> all that was printed and logged, down to the lowest level."""
    caplog.set_level(0)
    for name in ("httpx", "httpcore", "openai", "uvicorn", "urllib3", "asyncio"):
        caplog.set_level(0, logger=name)

    def text():
        return "".join(capfd.readouterr()) + "\n".join(
            f"{record.getMessage()} {record.__dict__}" for record in caplog.records
        )

    assert logging.getLogger().level == 0
    return text


@pytest.fixture
def place(tiny_model, tmp_path, monkeypatch):
    """A folder with a model and data in which the sentence stands among others."""
    shutil.copytree(tiny_model("minilm"), tmp_path / "model")
    lines = [*LINES[:41], SENTENCE, *LINES[41:]]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    rows = [{"anchor": a, "positive": b} for a, b in zip(lines[::2], lines[1::2])]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "labels.csv").write_text("text,label\n" + "".join(f"{t},{'ab'[n % 2]}\n" for n, t in enumerate(lines)))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(files, "_fsync", lambda path: None)
    monkeypatch.setattr(
        plots, "loss_curve", lambda r, stem, title, unit: files.write_bytes(stem.with_suffix(".png"), b"")
    )
    return tmp_path / "work"


# ---- keys of services that are asked

ECHO = {"error": {"message": f"Incorrect API key provided: {KEY}", "type": "x", "code": "y", "param": f"Bearer {KEY}"}}
ANSWERS = {
    "good": [],
    "refused": [(401, {}, ECHO)] * 40,
    "forbidden": [(403, {}, ECHO)] * 40,
    "wrong": [(400, {}, ECHO)] * 40,
    "broken": [(500, {}, f"<html>{KEY}</html>")] * 40,
    "no json": [(200, {}, f"not json {KEY}")] * 40,
    "no vectors": [(200, {}, {"data": KEY, "model": KEY})] * 40,
    "torn": ["torn"] * 40,
}
HOSTED = {
    "embed": ["embed", "openai:small", "../text.txt", "--out", "v.npy"],
    "judge": ["judge", "openai:small", "--data", "../pairs.jsonl", "--out", "j.json"],
    "index": ["search", "index", "../text.txt", "--model", "openai:small", "--out", "idx"],
    "questions": ["data", "pairs", "../text.txt", "--out", "q.jsonl", "--generators", "questions", "--model", "m"],
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("command", HOSTED)
def test_a_key_of_a_service_is_sent_there_and_said_nowhere(place, monkeypatch, heard, command, answer):
    pytest.importorskip("openai")
    from embedtune.encoder import calls

    monkeypatch.setattr(calls, "sleep", lambda seconds: None)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("EMBEDTUNE_CACHE", str(place / "cache"))
    with serve() as service:
        service.script = list(ANSWERS[answer])
        if command == "questions":
            service.reply = lambda asked: {"choices": [{"message": {"content": "What is it?"}}], "usage": {}}
        monkeypatch.setenv("OPENAI_BASE_URL", service.address)
        argv = [*HOSTED[command], *(["--address", service.address] if command == "questions" else [])]
        code = cli.run(argv)
        assert service.requests and all(
            each["headers"]["authorization"] == f"Bearer {KEY}" for each in service.requests
        )
    said = heard()
    assert code in (0, 2) and "Traceback" not in said
    assert KEY not in said and KEY[3:] not in said and not holds(place, KEY) and not holds(place, KEY[3:])


# ---- the key of our own server

REQUESTS = [
    ("GET", "/livez"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/info"),
    ("GET", "/"),
    ("GET", "/docs"),
    ("GET", "/health"),
    ("GET", "/v1/models"),
    ("GET", "/about"),
    ("GET", "/map"),
    ("GET", "/nowhere"),
    ("PUT", "/embed"),
    ("DELETE", "/v1/embeddings"),
    ("POST", "/v1/embeddings"),
    ("POST", "/embed"),
    ("POST", "/search"),
    ("POST", "/feedback"),
    ("GET", f"/{KEY}"),
    ("GET", f"/livez?key={KEY}"),
]
BODIES = [b"", b"{", b'{"input": "a"}', b'{"input": "boom"}', b'{"input": "nan"}', b'{"inputs": 7, "wibble": 1}']


@pytest.mark.parametrize("given", ["Bearer {}", "Bearer {}x", "Basic {}", "bearer  {}", "{}", ""])
def test_the_key_of_the_server_is_in_no_answer_and_no_log(monkeypatch, heard, tmp_path, given):
    pytest.importorskip("fastapi")
    from serving import FakeModel, listening

    from embedtune.serve.app import Service
    from embedtune.serve.batcher import Limits

    answers = []
    with listening(Service(lambda: (FakeModel(), ()), Limits(), tmp_path / "votes.jsonl"), KEY) as port:
        for method, path in REQUESTS:
            for body in BODIES if method == "POST" else [b""]:
                head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
                head += f"Authorization: {given.format(KEY)}\r\n" if given else ""
                with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
                    found = b""
                    while part := connection.recv(65536):
                        found += part
                answers.append((path, found.decode(errors="replace")))
    assert len(answers) >= 40 and all(found.startswith("HTTP/1.1 ") for _, found in answers)
    assert not [path for path, found in answers if KEY in found.replace(path, "")]
    said = heard()
    for path, _ in answers:  # what a client puts into an address is its own doing
        said = said.replace(path, "")
    assert KEY not in said
    assert not holds(tmp_path, KEY)


@pytest.mark.parametrize("how", ["environment", "file"])
@pytest.mark.parametrize(
    "wrong", [["--port", "0"], ["--queue-seconds", "-1"], ["--index", "absent"], ["--feedback", "no/x"], []]
)
def test_settings_that_cannot_be_do_not_say_the_key(place, monkeypatch, heard, how, wrong):
    monkeypatch.delenv("EMBEDTUNE_API_KEY", raising=False)
    key = KEY if wrong else f"{KEY} and a blank"
    words = []
    if how == "file":
        (place.parent / "key").write_text(key)
        words = ["--key-file", "../key"]
    else:
        monkeypatch.setenv("EMBEDTUNE_API_KEY", key)
    assert cli.run(["serve", "../model", *words, *wrong]) == 2
    said = heard()
    assert said and KEY not in said and not holds(place, KEY)


# ---- the data

TRAIN = ["--max-steps", "2", "--dev-rows", "20", "--precision", "fp32", "--batch", "8"]
# Words typed, what they write, and which of these may hold the sentence, for it is what was asked for.
RUNS = {
    "check": (["data", "check", "../text.txt", "--model", "../model"], set()),
    "check pairs": (["data", "check", "../pairs.jsonl", "--model", "../model", "--json"], set()),
    "check labels": (["data", "check", "../labels.csv", "--model", "../model"], set()),
    "clean": (["data", "clean", "../text.txt", "--out", "new.txt"], {"new.txt"}),
    "mlm": (["fit", "mlm", "../text.txt", "--model", "../model", "--out", "out", *TRAIN], set()),
    "contrastive": (["fit", "contrastive", "../pairs.jsonl", "--model", "../model", "--out", "out", *TRAIN], set()),
    "classify": (["fit", "classify", "../labels.csv", "--model", "../model", "--out", "out", *TRAIN], set()),
    "embed": (["embed", "../model", "../text.txt", "--out", "v.npy"], set()),
    "length": (["refine", "reduce", "../model", "--data", "../text.txt", "--to", "4", "--out", "small"], set()),
    "index": (
        ["search", "index", "../text.txt", "--model", "../model", "--out", "idx"],
        {"rows.arrow", "vocab.index.json"},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_sentence_of_the_data_is_only_where_it_was_asked_for(place, heard, name):
    argv, asked = RUNS[name]
    assert cli.run(argv) in (0, 3), heard()
    said = heard()
    for words in (SENTENCE, "zebra quartz"):
        assert words not in said
        assert {os.path.basename(path) for path in holds(place, words)} <= asked


SPOILED = {
    "latin.txt": SENTENCE.encode() + b" caf\xe9\n",
    "nul.txt": SENTENCE.encode() + b" \0\n",
    "cut.jsonl": json.dumps({"text": SENTENCE})[:-3].encode() + b"\n",
    "surrogate.jsonl": json.dumps({"text": SENTENCE + "\ud800"}).encode() + b"\n",
    "list.jsonl": json.dumps({"text": [SENTENCE]}).encode() + b"\n",
    "quote.csv": f'text\n"{SENTENCE}"x\n'.encode(),
    "open.csv": f'text\n"{SENTENCE}\n'.encode(),
    "ragged.csv": f"text,b\n{SENTENCE}\n".encode(),
    "pair.jsonl": json.dumps({"anchor": SENTENCE, "positive": SENTENCE}).encode() + b"\n",
    "score.jsonl": json.dumps({"sentence1": SENTENCE, "sentence2": SENTENCE, "score": [SENTENCE]}).encode() + b"\n",
    "label.jsonl": json.dumps({"text": SENTENCE, "label": {"a": SENTENCE}}).encode() + b"\n",
    "tags.conll": f"{SENTENCE.replace(' ', '-')}\tXYZ\n".encode(),
    "tokens.jsonl": json.dumps({"tokens": [SENTENCE, 7], "tags": ["O"]}).encode() + b"\n",
}


@pytest.mark.parametrize("name", SPOILED)
def test_no_refusal_says_what_stands_in_the_data(place, heard, name):
    (place.parent / name).write_bytes(SPOILED[name])
    for argv in (
        ["data", "check", f"../{name}", "--model", "../model"],
        ["data", "clean", f"../{name}", "--out", "new.jsonl"],
        ["fit", "mlm", f"../{name}", "--model", "../model"],
        ["fit", "contrastive", f"../{name}", "--model", "../model"],
        ["fit", "scored", f"../{name}", "--model", "../model"],
        ["fit", "classify", f"../{name}", "--model", "../model"],
        ["fit", "tag", f"../{name}", "--model", "../model"],
        ["judge", "../model", "--data", f"../{name}"],
    ):
        cli.run(argv)
        said = heard()
        assert SENTENCE not in said and "zebra-quartz" not in said and "Traceback" not in said, said
        (place / "new.jsonl").unlink(missing_ok=True)
