"""Ten times the rows, and the same memory: `embed`, an index, and what `judge` keeps of a query."""

import json
import shutil
import tracemalloc
from functools import partial

import numpy as np
import pytest

from embedtune.data import lines as reading
from embedtune.data import stored
from embedtune.data.distinct import distinct, texts_at
from embedtune.data.retrieval import RetrievalSet, read_beir
from embedtune.encoder import encode
from embedtune.judge import retrieval, ties
from embedtune.search import lexical, postings
from embedtune.search.contract import checked
from embedtune.search.rows import Record
from reliability import ledger
from reliability.peak import SHARE, SLACK, lines, peak

pytestmark = pytest.mark.target("B4")
pytest.importorskip("bm25s")
FEW = 10**5


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """A folder with a model that reads eight tokens of a text, for vectors do not matter here."""
    folder = tmp_path_factory.mktemp("flat")
    shutil.copytree(tiny_model("minilm"), folder / "model")
    about = folder / "model" / "tokenizer_config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"model_max_length": 8}))
    return folder


def held(work) -> int:
    """The most bytes that Python and numpy hold at once during `work`, which has been done once before."""
    work()
    tracemalloc.start()
    work()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def test_the_scores_of_words_are_made_a_part_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(postings, "BLOCK", 1 << 16)
    monkeypatch.setattr(postings, "PART", 1 << 12)
    texts = list(lines(30_000))
    few, many = (held(lambda n=n: lexical.build(tmp_path / str(n), texts[:n])) for n in (3_000, 30_000))
    assert many <= 1.1 * few + 300_000, (few, many)  # held whole they are 16 MB more
    ledger.remark(f"B4: scores by words: {few / 1e6:.1f} MB for 3,000 texts, {many / 1e6:.1f} for 30,000")


def test_ids_are_not_kept_as_texts():
    def work(count):
        for _ in checked((Record(f"document-{i}", "", {}) for i in range(count)), lambda ids: (), "idx", False):
            pass

    few, many = (held(lambda n=n: work(n)) for n in (10_000, 100_000))
    assert many - few <= 90_000 * 50, (few, many)  # 16 bytes each, twice while runs are merged; as texts 110


def test_what_a_judge_keeps_of_a_query_is_numbers():
    def work(count):
        draw = np.random.default_rng(0)
        corpus = {f"d{i}": "" for i in range(50)}
        qrels = {f"q{i}": {"d1": 1} for i in range(count)}
        data = RetrievalSet("d", dict.fromkeys(qrels, ""), corpus, qrels)
        vectors = draw.standard_normal((count, 8), np.float32), draw.standard_normal((50, 8), np.float32)
        tracemalloc.start()
        report = retrieval.score_vectors(*vectors, data, ["nDCG@10"])
        kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return kept, report

    work(10)
    (few, _), (many, report) = work(200), work(2_000)
    assert len(report.found) == 2_000 and many - few <= 1_800 * 150, (few, many)  # as tuples ten times as much


class Letters:
    """An encoder of the first letters."""

    name, dimension = "letters", 16

    def encode(self, texts, role="text"):
        return np.array([list(text.encode()[:16]) for text in texts], np.float32)


def test_neither_documents_nor_their_vectors_are_in_memory(tmp_path, monkeypatch):
    sizes = {(stored, "TAIL"): 1 << 16, (stored, "BLOCK"): 1 << 16, (reading, "CHUNK_BYTES"): 1 << 16,
             (encode, "MEMORY"): 1 << 16, (encode, "AT_ONCE"): 500, (ties, "RUN"): 500}  # fmt: skip
    for place, size in sizes.items():
        monkeypatch.setattr(*place, size)
    for search in (retrieval.top_k, retrieval.ranks):
        monkeypatch.setattr(retrieval, search.__name__, partial(search, block=500))
    for count in (2_000, 8_000):
        write_beir(tmp_path / str(count), count, 50)

    def work(count):
        data = read_beir(tmp_path / str(count))
        retrieval.judge_retrieval(Letters(), data, ["nDCG@10", "MAP"], dims=(None, 8))
        texts = data.corpus.values()
        texts_at(texts, distinct(texts)[::100])

    few, many = (held(lambda n=n: work(n)) for n in (2_000, 8_000))
    assert many - few <= 6_000 * 80, (few, many)  # as texts and vectors many times as much
    ledger.remark(f"B4: judge: {few / 1e6:.1f} MB for 2,000 documents, {many / 1e6:.1f} for 8,000")


def asked_for(folder, command, count):
    """What is measured, on so many rows."""
    match command:
        case "embed":
            return ["embed", "model", f"{count}.txt", "--out", f"{count}.parquet"]
        case "index":
            return ["search", "index", f"{count}.txt", "--model", "model", "--out", f"idx-{count}"]
        case "delete":
            return ["search", "delete", f"idx-{count}", "77", "78"]
        case "add" | "update":
            rows = [{"id": str(5 * i) if command == "update" else f"n{i}", "text": t}
                    for i, t in enumerate(lines(2_000, seed=2), 1)]  # fmt: skip
            (folder / f"{command}.jsonl").write_text("\n".join(map(json.dumps, rows)))
            return ["search", command, f"idx-{count}", f"{command}.jsonl"]
    raise ValueError(command)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["embed", "index", "delete", "add", "update"])
def test_ten_times_the_rows_take_the_same_memory(folder, command):
    found = []
    for count in (FEW, 10 * FEW):
        if not (path := folder / f"{count}.txt").exists():
            path.write_text("".join(f"{text}\n" for text in lines(count)))
        if command not in ("embed", "index") and not (folder / f"idx-{count}").exists():
            peak(asked_for(folder, "index", count), folder)
        found.append(peak(asked_for(folder, command, count), folder))
        ledger.count()
    few, many = found
    ledger.remark(f"B4: {command}: {few:,.0f} MB for {FEW:,} rows, {many:,.0f} for {10 * FEW:,}")
    assert many <= SHARE * few + SLACK, found


def write_beir(folder, documents, queries):
    """Queries that each have one of the documents, in the files that `judge` reads."""
    (folder / "qrels").mkdir(parents=True)
    for name, count, seed in (("corpus", documents, 3), ("queries", queries, 4)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for number, text in enumerate(lines(count, seed)):
                file.write(json.dumps({"_id": f"{name[0]}{number}", "text": text}) + "\n")
    with (folder / "qrels" / "test.tsv").open("w") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for number in range(queries):
            file.write(f"q{number}\tc{number % documents}\t1\n")


@pytest.mark.slow
@pytest.mark.parametrize("few, what, more", [
    ((1_000, 10**4), "queries", []), ((1_000, 10**4), "queries", ["--out", "report.json", "--force"]),
    ((10**5, 1_000), "documents", []),
])  # fmt: skip
def test_ten_times_as_many_take_a_judge_the_same_memory(folder, few, what, more):
    found, many = [], (few[0], 10 * few[1]) if what == "queries" else (10 * few[0], few[1])
    for documents, queries in (few, many):
        data = folder / f"beir-{documents}-{queries}"
        if not data.exists():
            write_beir(data, documents, queries)
        found.append(peak(["judge", "model", "model", "--data", data.name, *more], folder))
        ledger.count()
    few, many = found
    ledger.remark(f"B4: judge {' '.join(more[:1])}: {few:,.0f} MB, {many:,.0f} for ten times the {what}")
    assert many <= SHARE * few + SLACK, found
