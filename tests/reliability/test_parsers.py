"""Every parser of ours, given a million inputs: it reads them, or refuses them with the error it is said to raise."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embedtune import files
from embedtune.data.labels import read_labelled
from embedtune.data.pairs import read_pairs
from embedtune.data.read import Counts, read_rows, read_texts
from embedtune.data.tags import is_conll, read_tagged
from embedtune.errors import UserError
from embedtune.fit import checkpoint
from embedtune.fit.checkpoint import State
from embedtune.search import store
from reliability import ledger
from reliability.fuzz import fuzzed

FEW, BLOCK, BLOCKS = 1000, 50_000, 20
LONG = [pytest.param(block, marks=pytest.mark.slow) for block in range(BLOCKS)]
POLICIES = ("fail", "skip", "replace")

JSON_WORDS = [
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-0", b"0.5"),
    *(b"[" * 40, b"[" * 5000, b'{"a":' * 40, b"9" * 400, b"9" * 5000, b'"\\ud800"', b'"\\u0000"', b"\xef\xbb\xbf"),
    *(b"\xed\xa0\x80", b"../x", b"/etc/passwd", b"\0", b"\n", b"\r", "é漢😀".encode(), "\u2028".encode()),
    b"18446744073709551616",
]  # fmt: skip
TEXT_WORDS = [
    *(b"\n", b"\r\n", b"\r", b"\n\n", b"\t", b",", b'"', b'""', b'","', b" ", b"\0", b"\x1a", b"\x85"),
    *("\u2028".encode(), b"\xff", b"\xfe", b"\xc3", b"\xe2\x80", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xff\xfe"),
    *(b"O", b"B-", b"I-x", b"S-x", b"-DOCSTART- O", b"# ", b"x" * 300, b"PK\x03\x04", b"PAR1", b"text", b"label"),
]  # fmt: skip
HTTP_WORDS = [
    *(b"\r\n", b"\r\n\r\n", b"\n", b": ", b":", b" ", b"\t", b"POST", b"GET", b"HTTP/1.1", b"HTTP/1.0", b"?", b"%00"),
    *(b"content-length: 14\r\n", b"Content-Length: 3\r\n", b"Content-Length: +14\r\n", b"Content-Length: 014\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"Upgrade: h2c\r\n"),
    *(b"Host: y\r\n", b" folded\r\n", b"x" * 70_000, b"\xff", b"\0", b"0\r\n\r\n", b"Connection: keep-alive\r\n"),
]  # fmt: skip

LINES = [{"text": "a b", "label": "x", "n": 1}, {"text": "c", "label": ["x", "y"]}, {"anchor": "q", "positive": ["p"]}]
SEEDS = {
    ".txt": [b"one\ntwo\n\nthree\r\nfour", "é 漢 😀\n".encode() * 4, b"\xef\xbb\xbfa\rb\r\n",
             b"a\tO\nb\tB-x\n\nc\tO\n"],
    ".jsonl": ["\n".join(map(json.dumps, LINES)).encode(), b'"a"\n"b"\n', b'{"tokens": ["a"], "tags": ["O"]}\n' * 3,
               b'{"sentence1": "a", "sentence2": "b", "score": 0.5}\n' * 2],
    ".csv": [b"text,label\na,x\nb,y\n", b'id,text\r\n1,"a\r\nb ""c"""\r\n2,d\r\n', b"text\n", b"text,score\na,1.5\n"],
    ".tsv": [b"text\tlabel\na\tx\nb\ty\n", b"query-id\tcorpus-id\tscore\nq\ta\t1\n", b'text\t"n"\n"a\t1"\t2\n'],
    ".conll": [b"-DOCSTART- O\n\nEU B-ORG\nrejects O\n\nPeter B-PER\nB I-PER\n", b"# c\na\tX\tS-x\nb\tY\tE-x\n",
               b"a O\r\nb O"],
}  # fmt: skip


def parquet_bytes(**options):
    table = pa.table(
        {"text": ["a", None, "é" * 40], "label": [1, 2, None], "tags": [["O"], [], None], "d": [b"x", b"", b"\xff"]}
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


SEEDS[".parquet"] = [
    parquet_bytes(),
    parquet_bytes(compression="none", use_dictionary=False),
    parquet_bytes(row_group_size=1),
]
READERS = (read_rows, read_texts, read_labelled, read_pairs, read_tagged)


@pytest.fixture
def tried(request):
    """tried(name, seeds, words, call): the fast tier's inputs, or in the long tier those of one block."""

    def go(name, seeds, words, call, few=FEW):
        block = getattr(request.node, "callspec", None) and request.node.callspec.params.get("block")
        numbers = range(-few, 0) if block is None else range(block * BLOCK, (block + 1) * BLOCK)
        fuzzed(seeds, words, name, numbers, call)
        ledger.count(len(numbers))

    return go


blocks = pytest.mark.parametrize("block", [None, *LONG], ids=lambda block: "few" if block is None else str(block))
pytestmark = [pytest.mark.target("C3")]


def read_all(path, data, number):
    """One reader under one policy: rows, all accounted for, or a UserError that names the file."""
    path.write_bytes(data)
    reader, policy, counts = READERS[number % 5], POLICIES[number // 5 % 3], Counts()
    if path.suffix == ".conll":
        assert is_conll(path)
        reader = read_tagged
    options = {"header": number // 15 % 2 == 0} if reader is read_rows else {}
    try:
        for _ in reader(path, bad_rows=policy, counts=counts, **options):
            pass
    except UserError as error:
        assert path.name in str(error) and str(error).count("\n") < 23
        if policy == "fail":
            return
    assert reader is read_pairs or counts.rows == counts.used + sum(counts.rejected.values())
    assert counts.bytes <= len(data) or path.suffix == ".gz"


@blocks
@pytest.mark.parametrize("form", [form for form in SEEDS if form != ".parquet"])
def test_readers(tmp_path, tried, form, block):
    path = tmp_path / f"data{form}"
    words = JSON_WORDS + TEXT_WORDS if form == ".jsonl" else TEXT_WORDS
    tried(form, SEEDS[form], words, lambda data, number: read_all(path, data, number))


@blocks
def test_parquet(tmp_path, tried, block):
    """Its footer above all: it says where everything else is."""
    path = tmp_path / "data.parquet"
    tried(".parquet", SEEDS[".parquet"], TEXT_WORDS, lambda data, number: read_all(path, data, number), few=400)


@pytest.fixture
def saved(tmp_path):
    return checkpoint.save(tmp_path, State(step=3, best=0.5, events=["one"]), {"w": torch.ones(2)})


def found_or_refused(folder):
    """The newest checkpoint is the whole one of step 3, or there is none and it is said."""
    try:
        state, tensors, remarks = checkpoint.newest(folder)
    except UserError as error:
        assert error.what == "no checkpoint is intact" and len(error.details) == 1
        return
    assert state.step == 3 and math.isfinite(state.loss_sum) and tensors["w"].tolist() == [1, 1] and not remarks
    assert all(isinstance(each, str) for each in state.events)


@blocks
def test_manifests_of_checkpoints(saved, tried, block):
    place = saved / files.MANIFEST
    more = json.dumps({"files": {"state.json": {"sha256": "0", "bytes": 1}, "../x": {}}, "step": 3}).encode()

    def read(data, number):
        place.write_bytes(data)
        found_or_refused(saved.parent)
        files.damage(saved)

    words = [*JSON_WORDS, b'"step"', b'"files"', b"state.json", b'"bytes"', more]
    tried("manifest", [place.read_bytes(), b'{"files": {}, "step": 3}'], words, read)


@blocks
def test_checkpoints_whose_sums_are_right(saved, tried, block):
    """Written by something else than this version: what is in them is looked at all the same."""
    seeds = [(saved / "state.json").read_bytes(), b'{"step": 3}']
    names = [f'"{name}"'.encode() for name in ("step", "best_step", "events", "max_tokens", "wibble")]
    manifest = json.loads((saved / files.MANIFEST).read_bytes())

    def read(data, number):
        (saved / "state.json").write_bytes(data)
        manifest["files"]["state.json"] = {"sha256": files.sha256(saved / "state.json"), "bytes": len(data)}
        (saved / files.MANIFEST).write_text(json.dumps(manifest))
        found_or_refused(saved.parent)

    tried("state", seeds, [*JSON_WORDS, *names], read)


@blocks
def test_headers_of_indexes(tmp_path, tried, block):
    place = tmp_path / store.MANIFEST
    fine = {"model": "m", "identity": "0", "dimension": 4, "dtype": "int8", "precision": "fp32", "version": 1,
            "serial": 2, "rows": 0, "columns": ["a"], "segments": [], "deleted": "", "lexical": "", "graph": False,
            "files": {}}  # fmt: skip
    seeds = [
        json.dumps(fine, indent=2).encode(),
        json.dumps({**fine, "segments": ["s"], "files": {"s/a": {}}}).encode(),
    ]

    def read(data, number):
        place.write_bytes(data)
        try:
            segments, deleted = store.open_segments(tmp_path, store.read_manifest(tmp_path))
        except UserError:
            return
        assert segments == [] and deleted.dtype == np.int64

    tried("index", seeds, [*JSON_WORDS, *(f'"{name}"'.encode() for name in fine), b'"bf16"', b'"binary"'], read)


@blocks
def test_bodies_of_requests(tried, block):
    pytest.importorskip("fastapi")
    from pydantic import ValidationError

    from embedtune.serve import guard, schemas

    kinds = (schemas.EmbeddingsRequest, schemas.EmbedRequest, schemas.SearchRequest, schemas.Feedback)
    seeds = [b'{"input": "a", "encoding_format": "float", "dimensions": 3, "role": "query"}',
             b'{"input": [[1, 2], [3]]}', b'{"inputs": ["a", "b"], "normalize": true, "truncation_direction": "right"}',
             b'{"input": ["a", "b"]}',
             b'{"query": "a", "top": 3, "mode": "hybrid", "where": {"kind": "x"}}',
             b'{"query": "a", "id": "7", "verdict": "up", "model": null}']  # fmt: skip

    def read(data, number):
        if guard.too_deep(data):
            return
        try:  # as FastAPI does; the guard has seen to it that nothing nests too deeply
            found = json.loads(data)
        except ValueError:
            return
        try:
            asked = kinds[number % 4].model_validate(found)
        except ValidationError as error:
            json.dumps(error.errors(include_url=False, include_context=False, include_input=False))
            return
        assert set(asked.model_fields_set) <= set(found)

    tried("body", seeds, [*JSON_WORDS, b'"input"', b'"inputs"', b'"top"', b"2147483648", b'"base64"'], read)


@blocks
def test_whole_requests(tried, block):
    """What is taken for a request here, uvicorn's parser takes for the same one, and for nothing more."""
    httptools = pytest.importorskip("httptools")
    from embedtune.serve import quick

    class Heard:
        def __init__(self):
            self.url, self.body, self.done, self.fields = b"", b"", 0, {}

        def on_url(self, part):
            self.url += part

        def on_header(self, name, value):
            self.fields[name.lower()] = value

        def on_body(self, part):
            self.body += part

        def on_message_complete(self):
            self.done += 1

    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 14\r\n"
    body = b'{"input": "a"}'
    seeds = [head + b"\r\n" + body, head + b"Authorization: Bearer k\r\nConnection: keep-alive\r\n\r\n" + body,
             b"POST /embed?a=b HTTP/1.1\r\nContent-Length: 0\r\n\r\n"]  # fmt: skip
    seen = []

    def read(data, number):
        found = quick.whole(data)
        if found is None:
            return
        seen.append(number)
        heard = Heard()
        parser = httptools.HttpRequestParser(heard)
        try:
            parser.feed_data(data)
        except httptools.HttpParserError:
            return  # it answers 400; a refusal before that harms nobody
        assert heard.done == 1 and parser.should_keep_alive()
        assert heard.url.partition(b"?")[0] == found.path.encode("latin-1") and data.endswith(b"\r\n\r\n" + heard.body)
        assert len(heard.body) == int(found.fields[b"content-length"])
        assert {name: value.strip(b" \t") for name, value in heard.fields.items()} == found.fields

    tried("request", seeds, HTTP_WORDS, read)
    assert len(seen) > len(seeds)
