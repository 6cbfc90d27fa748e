import numpy as np
import pytest

from embedtune.data.retrieval import RetrievalSet
from embedtune.errors import UserError
from embedtune.judge.measures import Measure, depth, parse, parse_all
from embedtune.judge.retrieval import score_vectors

OURS = ("nDCG@1", "nDCG@10", "nDCG", "MRR", "MRR@10", "recall@1", "recall@30", "precision@5", "precision@300")
OURS += ("MAP", "MAP@3", "MAP@100", "accuracy@1", "accuracy@7")


@pytest.mark.parametrize("text", OURS)
def test_measures_print_and_parse(text):
    assert str(parse(text)) == text
    assert parse(text.upper()) == parse(f" {text.lower()} ") == parse(text)


def test_what_others_call_them():
    assert list(map(str, parse_all(["RR@10, AP", "R@5", "P@5", "Success@1", "rr@10"]))) == [
        *("MRR@10", "MAP", "recall@5", "precision@5", "accuracy@1")
    ]
    assert parse_all([Measure("MAP")]) == [Measure("MAP")]


@pytest.mark.parametrize("text", ["nDGC@10", "foo", "", "@10"])
def test_unknown_measures(text):
    with pytest.raises(UserError, match="no measure is called") as error:
        parse(text)
    assert ("did you mean 'ndcg'" in str(error.value)) == (text == "nDGC@10")


@pytest.mark.parametrize("text", ["recall", "precision@", "nDCG@0", "nDCG@-1", "nDCG@ten", "MAP@", "accuracy"])
def test_measures_need_their_number(text):
    with pytest.raises(UserError, match="whole number of documents"):
        parse(text)


def test_depth():
    assert depth(parse_all(["nDCG@10", "recall@100"])) == 100
    assert depth(parse_all(["nDCG@10", "MAP"])) is None


def random_set(seed: int, queries: int = 25, documents: int = 200, top: int = 3) -> tuple[RetrievalSet, list]:
    """Graded judgements (0 and negative ones, too), most documents unjudged, vectors whose scores are full of ties."""
    draw = np.random.default_rng(seed)
    ids = [f"{'dDü9𝔸'[n % 5]}{n}" for n in draw.permutation(documents)]  # ties go by the bytes of ids
    qrels = {}
    for q in range(queries):
        judged = draw.choice(documents, draw.integers(1, 30), replace=False)
        high = 1 if q % 7 == 0 else top + 1  # every seventh query has nothing relevant
        qrels[f"q{q}"] = {ids[d]: int(draw.integers(0, high)) for d in judged}
    data = RetrievalSet("random", {q: q for q in qrels}, {d: d for d in ids}, qrels)
    vectors = [draw.integers(-2, 3, (n, 4)).astype(np.float32) for n in (queries, documents)]
    return data, vectors


def by_ir_measures(data, scores, names) -> dict[str, list[float]]:
    """ir_measures' value of each measure for each query of the set."""
    ir_measures = pytest.importorskip("ir_measures")
    theirs = {"nDCG": "nDCG", "MRR": "RR", "recall": "R", "precision": "P", "MAP": "AP", "accuracy": "Success"}
    run = {q: dict(zip(data.corpus, map(float, row))) for q, row in zip(data.queries, scores)}
    parsed = {n: ir_measures.parse_measure(theirs[parse(n).name] + n[len(parse(n).name) :]) for n in names}
    found = {(str(x.measure), x.query_id): x.value for x in ir_measures.iter_calc(parsed.values(), data.qrels, run)}
    return {name: [found[str(other), query] for query in data.queries] for name, other in parsed.items()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("measures", [OURS, ("nDCG@10", "MRR@10", "recall@30", "MAP@100", "accuracy@7")])
def test_same_as_trec_eval_for_every_query(seed, measures):
    """Scores are small whole numbers, so ties are ties for both; `measures` without MAP goes another way inside.

    ir_measures takes RR@10 alone from the script of MS MARCO, which orders ties the other way round than trec_eval;
    so RR@10 is trec_eval's RR, 0 where it is less than 1/10.
    """
    data, (queries, corpus) = random_set(seed)
    report = score_vectors(queries, corpus, data, measures, similarity="dot")
    theirs = by_ir_measures(data, queries @ corpus.T, [*(set(measures) - {"MRR@10"}), "MRR"])
    theirs["MRR@10"] = [value if value > 1 / 10.5 else 0 for value in theirs["MRR"]]
    for name in measures:
        np.testing.assert_allclose(report.values[name], theirs[name], atol=1e-6, err_msg=name)
        assert report.summary[name] == pytest.approx(np.mean(theirs[name]), abs=1e-6)
    assert report.values["nDCG@10"][0] == 0 and report.values["nDCG@10"].max() > 0.2


def test_same_as_ir_measures_without_ties():
    data, _ = random_set(9)
    draw = np.random.default_rng(9)
    queries, corpus = (draw.standard_normal((len(side), 8)).astype(np.float32) for side in (data.queries, data.corpus))
    report = score_vectors(queries, corpus, data, OURS, similarity="dot")
    for name, wanted in by_ir_measures(data, queries @ corpus.T, OURS).items():
        np.testing.assert_allclose(report.values[name], wanted, atol=1e-6, err_msg=name)


def test_negative_judgements_are_not_relevant():
    """As trec_eval has it (ir_measures cannot be asked: its parser breaks on some of them)."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    qrels = {"q": {"a": -1, "b": 1, "c": 2}}
    data = RetrievalSet("n", {"q": ""}, dict.fromkeys("abc", ""), qrels)
    corpus = np.array([[3], [2], [1]], np.float32)
    report = score_vectors(np.ones((1, 1), np.float32), corpus, data, ["nDCG@2", "MAP", "MRR@10"], similarity="dot")
    run = {"q": {"a": 3.0, "b": 2.0, "c": 1.0}}
    theirs = {}
    for name in ("ndcg_cut.2", "map", "recip_rank"):
        theirs |= pytrec_eval.RelevanceEvaluator(qrels, {name}).evaluate(run)["q"]
    assert [float(v[0]) for v in report.values.values()] == pytest.approx(
        [theirs["ndcg_cut_2"], theirs["map"], theirs["recip_rank"]], abs=1e-6
    )


def test_by_hand():
    """Relevant documents at places 2 (relevance 3) and 4 (relevance 1), a third one never found."""
    qrels = {"q": {"b": 3, "d": 1, "z": 2, "a": 0}}
    data = RetrievalSet("h", {"q": ""}, {key: "" for key in [*"abcde", *map(str, range(2000)), "z"]}, qrels)
    corpus = -np.arange(len(data.corpus), dtype=np.float32)[:, None]
    one = np.ones((1, 1), np.float32)
    wanted = {
        "nDCG@10": (3 / np.log2(3) + 1 / np.log2(5)) / (3 + 2 / np.log2(3) + 1 / 2),
        "MRR@10": 1 / 2,
        "MRR@1": 0,
        "recall@4": 2 / 3,
        "precision@4": 1 / 2,
        "precision@10": 1 / 5,
        "MAP@10": (1 / 2 + 2 / 4) / 3,
        "MAP": (1 / 2 + 2 / 4 + 3 / 2006) / 3,
        "accuracy@1": 0,
        "accuracy@2": 1,
    }
    for chosen in (wanted, [name for name in wanted if name != "MAP"]):
        report = score_vectors(one, corpus, data, chosen, similarity="dot")
        assert dict(report.summary) == pytest.approx({name: wanted[name] for name in chosen})
