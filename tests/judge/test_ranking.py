import json
import random
from types import SimpleNamespace

import numpy as np
import pytest

from embedtune.data import stored
from embedtune.data.retrieval import RetrievalSet, read_beir
from embedtune.data.stored import Stored
from embedtune.encoder import encode
from embedtune.encoder.encode import open_encoder
from embedtune.errors import UserError
from embedtune.judge import report as reports
from embedtune.judge import ties
from embedtune.judge.retrieval import judge_retrieval, score_vectors

WORDS = ("bada", "fige", "kolu", "mane", "pora", "sitevo", "zuba", "dilo", "gemu", "tirano", "vone", "lisu")


class Known:
    """An encoder of seeded vectors that remembers what it was asked for."""

    def __init__(self, dimension: int = 16) -> None:
        self.name, self.dimension, self.asked = "known", dimension, []

    def encode(self, texts, role="text"):
        self.asked.append((role, len(texts)))
        rows = [np.random.default_rng(list(text.encode())).standard_normal(self.dimension) for text in texts]
        return np.array(rows, np.float32).reshape(len(texts), self.dimension)


class Folder:
    """A sentence-transformers folder as an encoder."""

    def __init__(self, folder) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(str(folder), device="cpu")
        self.name, self.dimension = "folder", self.model.get_embedding_dimension()

    def encode(self, texts, role="text"):
        return self.model.encode(list(texts), convert_to_numpy=True)


def texts(count: int, words: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, words))) for _ in range(count)]


def word_set(queries: int = 20, documents: int = 120, seed: int = 0) -> RetrievalSet:
    """Distinct texts; each query has one to four relevant documents among those that share most of its words."""
    draw = random.Random(seed)
    corpus = {f"doc{n}": text for n, text in enumerate(dict.fromkeys(texts(documents, 12, seed)))}
    asked = {f"q{n}": text for n, text in enumerate(dict.fromkeys(texts(queries, 5, seed + 1)))}

    def near(query: str) -> list[str]:
        words = set(asked[query].split())
        shared = {key: len(words & set(text.split())) / len(words | set(text.split())) for key, text in corpus.items()}
        return sorted(corpus, key=lambda key: (-shared[key], key))[:12]

    qrels = {q: dict.fromkeys(draw.sample(near(q), draw.randint(1, 4)), 1) for q in asked}
    return RetrievalSet("words", asked, corpus, qrels)


def test_embeds_once_and_truncates_the_same_vectors():
    encoder, data = Known(), word_set()
    full, small, again = judge_retrieval(encoder, data, ["nDCG@10", "MAP"], dims=(None, 4, 16))
    assert encoder.asked == [("query", len(data.queries)), ("document", len(data.corpus))]
    assert (full.dim, small.dim, again.dim) == (16, 4, 16)
    assert full.items == tuple(data.queries) and full.summary == again.summary != small.summary
    queries, corpus = (Known().encode(list(side.values())) for side in (data.queries, data.corpus))
    cut = score_vectors(queries[:, :4], corpus[:, :4], data, ["nDCG@10", "MAP"])
    assert cut.summary == small.summary and list(cut.found) == list(small.found)


def test_cosine_and_dot():
    data = RetrievalSet("d", {"q": ""}, {"long": "", "near": ""}, {"q": {"near": 1}})
    queries, corpus = np.array([[1, 0]], np.float32), np.array([[2, 3], [1, 0.1]], np.float32)
    assert score_vectors(queries, corpus, data, ["MRR"]).summary == {"MRR": 1}
    assert score_vectors(queries, corpus, data, ["MRR"], similarity="dot").summary == {"MRR": 0.5}
    with pytest.raises(UserError, match="cosine or dot"):
        score_vectors(queries, corpus, data, similarity="euclid")


def test_the_best_documents_are_kept():
    data = word_set()
    report = judge_retrieval(Known(), data)[0]
    queries, corpus = (Known().encode(list(side.values())) for side in (data.queries, data.corpus))
    queries, corpus = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, corpus))
    scores = queries @ corpus.T
    for row, best in enumerate(report.found):
        order = np.argsort(-scores[row])[:10]
        assert [key for key, _ in best] == [list(data.corpus)[i] for i in order]
        np.testing.assert_allclose([score for _, score in best], scores[row][order], atol=1e-6)


def test_a_corpus_smaller_than_the_cutoff():
    data = RetrievalSet("s", {"q": "a"}, {"x": "b", "y": "c"}, {"q": {"x": 1}})
    report = judge_retrieval(Known(), data, ["recall@100", "precision@100", "nDCG@100"])[0]
    assert report.summary["recall@100"] == 1 and report.summary["precision@100"] == 0.01
    assert len(report.found[0]) == 2


def test_a_dimension_that_the_model_lacks_is_said_before_anything_is_embedded():
    encoder = Known()
    with pytest.raises(UserError, match="17, 99 is not between 1 and 16, the dimension of known"):
        judge_retrieval(encoder, word_set(), dims=(None, 17, 8, 99))
    with pytest.raises(UserError, match="0 is not between"):
        judge_retrieval(encoder, word_set(), dims=(0,))
    with pytest.raises(UserError, match="no measure"):
        judge_retrieval(encoder, word_set(), ["nothing"])
    assert encoder.asked == []
    with pytest.raises(UserError, match="not between"):
        score_vectors(np.ones((20, 4)), np.ones((120, 4)), word_set_of(20, 120), dim=5)


def word_set_of(queries: int, documents: int) -> RetrievalSet:
    asked, corpus = {f"q{n}": "" for n in range(queries)}, {f"d{n}": "" for n in range(documents)}
    return RetrievalSet("n", asked, corpus, {q: {"d0": 1} for q in asked})


def test_reports_go_through_json():
    report = judge_retrieval(Known(), word_set(), ["nDCG@10", "MAP"], dims=(8,))[0]
    saved = json.dumps(report.as_dict(), allow_nan=False)
    again = reports.from_dict(json.loads(saved))
    assert json.dumps(again.as_dict()) == saved
    assert again.items == report.items and again.summary == report.summary
    np.testing.assert_array_equal(again.values["MAP"], report.values["MAP"])
    with pytest.raises(UserError, match="has no 'gold'"):
        reports.from_dict({})


def test_table_of_reports():
    found = judge_retrieval(Known(), word_set(), ["nDCG@10"], dims=(None, 4))
    other = judge_retrieval(Known(), word_set(), ["MAP"])
    header, rows = reports.table([*found, *other])
    assert header == ["model", "dim", "items", "nDCG@10", "MAP"]
    assert rows[0] == ["known", "16", str(len(word_set().queries)), f"{found[0].summary['nDCG@10']:.4f}", "-"]
    assert rows[1][1] == "4" and rows[2][3:] == ["-", f"{other[0].summary['MAP']:.4f}"]
    assert found[0].measure("ndcg@10") == "nDCG@10"
    with pytest.raises(UserError, match=r"'MAP' was not measured.*nDCG@10"):
        found[0].measure("MAP")


def test_same_as_sentence_transformers(tiny_model):
    """On binary judgements. Its MAP@k divides by min(k, relevant): the same up to k relevant documents."""
    from sentence_transformers.evaluation import InformationRetrievalEvaluator

    data, model = word_set(40, 300, 3), Folder(tiny_model("minilm"))
    for dim in (None, 8):
        ours = judge_retrieval(
            *(model, data),
            ["nDCG@10", "MRR@10", "recall@1", "recall@100", "precision@5", "MAP@100", "accuracy@1", "accuracy@10"],
            dims=(dim,),
        )[0]
        theirs = InformationRetrievalEvaluator(
            *(data.queries, data.corpus, {q: set(judged) for q, judged in data.qrels.items()}),
            precision_recall_at_k=[1, 5, 100],
            truncate_dim=dim,
        )(model.model)
        assert len(ours.summary) == 8
        for name, value in ours.summary.items():
            assert value == pytest.approx(theirs[f"cosine_{name.lower()}"], abs=1e-6), name
        assert 0.02 < ours.summary["nDCG@10"] < 0.9


@pytest.mark.parity
def test_same_as_mteb(tiny_model, tmp_path, monkeypatch):
    """A third-party harness, on a saved folder, with a task of its own kind made offline; graded judgements."""
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "cache"))
    mteb = pytest.importorskip("mteb")
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    draw, data = random.Random(1), word_set(40, 300, 7)
    for judged in data.qrels.values():
        judged.update({key: draw.randint(0, 3) for key in judged})
        judged[next(iter(judged))] = 2
    home = tmp_path / "words"
    (home / "qrels").mkdir(parents=True)
    for name, side in (("corpus", data.corpus), ("queries", data.queries)):
        cut = [(key, *text.split(" ", 1)) if name == "corpus" else (key, "", text) for key, text in side.items()]
        rows = [{"_id": key, "title": title, "text": text} for key, title, text in cut]
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judgements = [f"{q}\t{d}\t{r}\n" for q, judged in data.qrels.items() for d, r in judged.items()]
    (home / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judgements))

    class Words(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Words",
            description="made here",
            dataset={"path": "none", "revision": "none"},
            type="Retrieval",
            category="t2t",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, **rest) -> None:
            raw = [json.loads(line) for line in (home / "corpus.jsonl").read_text().splitlines()]
            self.corpus = {"test": {row["_id"]: {"title": row["title"], "text": row["text"]} for row in raw}}
            self.queries, self.relevant_docs = {"test": data.queries}, {"test": data.qrels}
            self.data_loaded = True

    model = Folder(tiny_model("minilm"))
    result = mteb.evaluate(model.model, Words(), cache=None, co2_tracker=False, show_progress_bar=False)
    scores = result.task_results[0].scores["test"][0]
    ours = judge_retrieval(model, read_beir(home), ["nDCG@10", "MAP@100", "recall@100", "MRR@10", "precision@5"])[0]
    assert ours.summary["nDCG@10"] > 0.02
    for name, theirs in {"nDCG@10": "ndcg_at_10", "MAP@100": "map_at_100", "recall@100": "recall_at_100"}.items():
        assert ours.summary[name] == pytest.approx(scores[theirs], abs=1e-5), name  # mteb rounds to five places
    assert ours.summary["precision@5"] == pytest.approx(scores["precision_at_5"], abs=1e-5)
    assert ours.summary["MRR@10"] == pytest.approx(scores["mrr_at_10"], abs=1e-5)


def test_on_the_disk_the_same_as_in_memory(tiny_model, tmp_path, monkeypatch):
    """Also where nearly all is tied, so that ids decide: of a model, and of an encoder that does not stream."""
    base = word_set(30, 500)
    twins = {f"{key}{end}": text for key, text in base.corpus.items() for end in ("", "é", "\U0001f600")}
    data = RetrievalSet("twins", base.queries, twins, base.qrels)
    measures, dims = ["nDCG@10", "MAP", "recall@100", "MRR@10"], (None, 5)
    model = open_encoder(str(tiny_model("minilm")))
    whole = [judge_retrieval(each, data, measures, dims=dims) for each in (model, Known())]
    dot = judge_retrieval(model, data, measures, dims=dims, similarity="dot")
    monkeypatch.setattr(encode, "MEMORY", 0)
    monkeypatch.setattr(encode, "AT_ONCE", 100)
    monkeypatch.setattr(ties, "RUN", 77)
    monkeypatch.setattr(stored, "TAIL", 1000)
    monkeypatch.setattr(stored, "BLOCK", 300)
    corpus = Stored()
    for key, text in twins.items():
        corpus.add(key, text)
    data = RetrievalSet("twins", base.queries, corpus, base.qrels)
    parts = [judge_retrieval(each, data, measures, dims=dims) for each in (model, Known())]
    parts.append(judge_retrieval(model, data, measures, dims=dims, similarity="dot"))
    for mine, theirs in zip(parts, [*whole, dot], strict=True):
        assert [each.as_dict() for each in mine] == [each.as_dict() for each in theirs]


def test_vectors_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "AT_ONCE", 7)
    some, encoder = texts(40, 9, 0), Known()
    kept = encode.vectors_of(encoder, some, "document")
    assert isinstance(kept, np.ndarray) and encoder.asked == [("document", 7)] * 5 + [("document", 5)]
    monkeypatch.setattr(encode, "MEMORY", 0)
    in_file = encode.vectors_of(Known(), dict.fromkeys(some).keys(), "document")
    np.testing.assert_array_equal(in_file[:], Known().encode(list(dict.fromkeys(some))))
    assert encode.vectors_of(Known(), [], "query").shape == (0, 16)
    monkeypatch.setattr(encode.files.shutil, "disk_usage", lambda place: SimpleNamespace(free=2000))
    with pytest.raises(UserError, match="embedding 40 texts needs about 2,560 bytes, 2,000 are free") as error:
        encode.vectors_of(encoder, some, "document")
    assert "TMPDIR" in error.value.fix and len(encoder.asked) == 6, "before anything is embedded"
