"""What a run is scored on: dev measures and losses against a second reckoning, kept per item for the interval."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr

from embedtune import files
from embedtune.data.pairs import ScoredPair
from embedtune.data.retrieval import RetrievalSet
from embedtune.fit.objectives.contrastive import Dev
from embedtune.fit.objectives.scored import ScoredDev
from embedtune.judge import compare
from embedtune.recipes import Contrastive, Ranking
from embedtune.scoring import CHUNK, Scorer, _dev_loss


class Fake:
    """An objective whose vectors are given."""

    def __init__(self, vectors):
        self.table = vectors.astype(np.float32)

    def vectors(self, rows):
        return self.table[rows]


def retrieval(seed=0, queries=9, texts=20, most=3, size=8):
    """(vectors, dev): each query has one to `most` right texts, and a judged wrong one."""
    generator = np.random.default_rng(seed)
    names = [f"d{n}" for n in range(texts)]
    qrels = {}
    for n in range(queries):
        chosen = generator.permutation(texts)[: generator.integers(1, most + 1) + 1]
        grades = [int(g) for g in generator.integers(1, 3, len(chosen))]
        qrels[f"q{n}"] = {names[c]: g for c, g in zip(chosen, [*grades[:-1], 0])}
    data = RetrievalSet("dev", {q: f"text {q}" for q in qrels}, {d: f"text {d}" for d in names}, qrels)
    vectors = generator.standard_normal((queries + texts, size))
    return vectors, Dev(data, np.arange(queries), queries + np.arange(texts), "cosine")


def scorer(tmp_path, task, vectors, dev, ranking=None):
    recipe = Contrastive(ranking=ranking or Ranking(scale=20.0))
    return Scorer(SimpleNamespace(objective=Fake(vectors), dev=dev, recipe=recipe, old=None), task, tmp_path)


@pytest.fixture
def home(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path


def ranked(vectors, dev):
    """For each query its documents by descending cosine, by a plain sort."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = unit[dev.queries] @ unit[dev.corpus].T
    names = list(dev.data.corpus)
    return [[names[i] for i in np.argsort(-line, kind="stable")] for line in scores]


@pytest.mark.parametrize("seed", range(4))
def test_the_measures_of_retrieval(home, seed):
    vectors, dev = retrieval(seed)
    found = scorer(home, "contrastive", vectors, dev)(5)
    assert list(found) == ["dev_loss", "dev_nDCG@10", "dev_MRR@10", "dev_recall@10", "dev_accuracy@1"]
    reciprocal, recall, first, gain = [], [], [], []
    for line, judged in zip(ranked(vectors, dev), dev.data.qrels.values()):
        right = [judged.get(name, 0) > 0 for name in line]
        reciprocal.append(1 / (right.index(True) + 1) if any(right[:10]) else 0)
        recall.append(sum(right[:10]) / sum(right))
        first.append(right[0])
        discount = 1 / np.log2(np.arange(2, 12))
        ideal = sorted(judged.values(), reverse=True)[:10]
        gains = [judged.get(name, 0) for name in line[:10]]
        gain.append(np.dot(gains, discount) / np.dot(ideal, discount[: len(ideal)]))
    expected = {"nDCG@10": gain, "MRR@10": reciprocal, "recall@10": recall, "accuracy@1": first}
    for name, values in expected.items():
        assert found[f"dev_{name}"] == pytest.approx(np.mean(values), abs=1e-7), name
    report = scorer(home, "contrastive", vectors, dev).report(5)
    assert report.values["nDCG@10"].tolist() == pytest.approx(gain, abs=1e-7)
    assert report.items == tuple(dev.data.queries)


def plain_loss(vectors, dev, ranking):
    """The loss in a double loop: each query's best text against those of its chunk that are not right for it."""
    names = list(dev.data.corpus)
    if dev.similarity == "cosine":
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    scale = ranking.scale
    place = {name: dev.corpus[n] for n, name in enumerate(names)}
    queries = list(dev.data.qrels)
    best = [max(judged, key=judged.get) for judged in dev.data.qrels.values()]
    total = 0.0
    for start in range(0, len(queries), CHUNK):
        chunk = range(start, min(start + CHUNK, len(queries)))
        for i in chunk:
            judged = dev.data.qrels[queries[i]]
            others = {best[j] for j in chunk if judged.get(best[j], 0) <= 0}
            score = {name: scale * vectors[dev.queries[i]] @ vectors[place[name]] for name in {best[i], *others}}
            forward = np.log(sum(np.exp(s) for s in score.values())) - score[best[i]]
            backward = 0.0
            if ranking.symmetric:
                rivals = [j for j in chunk if j == i or dev.data.qrels[queries[j]].get(best[i], 0) <= 0]
                there = [scale * vectors[dev.queries[j]] @ vectors[place[best[i]]] for j in rivals]
                backward = np.log(np.sum(np.exp(there))) - score[best[i]]
            total += (forward + backward) / 2 if ranking.symmetric else forward
    return total / len(queries)


@pytest.mark.parametrize("similarity, scale", [("cosine", 20.0), ("dot", 1.0)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("queries", [2, 9, CHUNK, CHUNK + 1, 3 * CHUNK - 5])
def test_the_dev_loss_is_the_ranking_loss_of_fixed_chunks(similarity, scale, symmetric, queries):
    vectors, dev = retrieval(queries, queries, 40, 4)
    dev = Dev(dev.data, dev.queries, dev.corpus, similarity)
    ranking = Ranking(scale=scale, similarity=similarity, symmetric=symmetric)
    vectors = vectors.astype(np.float32)
    found = _dev_loss(vectors[dev.queries], vectors[dev.corpus], dev, ranking)
    assert found == pytest.approx(plain_loss(vectors.astype(np.float64), dev, ranking), rel=1e-5, abs=1e-6)


def test_the_dev_loss_of_perfect_and_of_meaningless_vectors(home):
    data = RetrievalSet("d", {f"q{n}": f"q {n}" for n in range(8)}, {f"d{n}": f"d {n}" for n in range(8)},
                        {f"q{n}": {f"d{n}": 1} for n in range(8)})  # fmt: skip
    dev = Dev(data, np.arange(8), 8 + np.arange(8), "cosine")
    perfect = scorer(home, "contrastive", np.tile(np.eye(8), (2, 1)), dev)(0)
    assert perfect["dev_loss"] == pytest.approx(np.log(1 + 7 * np.exp(-20)), abs=1e-6)
    assert {v for k, v in perfect.items() if k != "dev_loss"} == {1.0}
    alike = scorer(home, "contrastive", np.ones((16, 8)), dev)(0)
    assert alike["dev_loss"] == pytest.approx(np.log(8))


def scored_dev(seed=0, size=12, texts=9, dimension=6):
    generator = np.random.default_rng(seed)
    left, right = generator.integers(0, texts, size), generator.integers(0, texts, size)
    gold = generator.random(size)
    pairs = [ScoredPair(f"{a}", f"{b}", float(g), "f", n) for n, (a, b, g) in enumerate(zip(left, right, gold), 1)]
    return generator.standard_normal((texts, dimension)), ScoredDev(pairs, left, right, gold)


@pytest.mark.parametrize("seed", range(3))
def test_the_measures_of_scored_pairs(home, seed):
    vectors, dev = scored_dev(seed)
    found = scorer(home, "scored", vectors, dev)(3)
    unit = vectors.astype(np.float32).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = (unit[dev.left] * unit[dev.right]).sum(1)
    # Pairs of a text with itself are all at 1, to rounding.
    away = dev.left != dev.right
    if (~away).sum() < 2:
        assert found["dev_spearman"] == pytest.approx(spearmanr(dev.gold, cosines).statistic, abs=1e-9)
    assert found["dev_pearson"] == pytest.approx(pearsonr(dev.gold, cosines).statistic, abs=1e-9)
    assert found["dev_loss"] == pytest.approx(np.mean((cosines - dev.gold) ** 2))
    report = scorer(home, "scored", vectors, dev).report(3)
    assert report.gold.tolist() == dev.gold.tolist() and report.predicted == pytest.approx(cosines)
    assert report.items == tuple(str(pair.number) for pair in dev.pairs)


def test_each_text_is_embedded_once(home):
    vectors, dev = scored_dev()
    made = scorer(home, "scored", vectors, dev)
    asked = []
    made.prepared.objective.vectors = lambda rows: asked.append(rows.tolist()) or vectors[rows].astype(np.float32)
    made(0)
    assert asked == [sorted({*dev.left.tolist(), *dev.right.tolist()})]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_the_difference_is_the_paired_one_of_what_was_kept(tmp_path_factory, seed):
    home = tmp_path_factory.mktemp("kept")
    (home / "data").mkdir()
    for task, made in (("contrastive", retrieval(seed, 12)), ("scored", scored_dev(seed, 20))):
        vectors, dev = made
        before, after = (
            scorer(home, task, v, dev)
            for v in (vectors, vectors + np.random.default_rng(seed).normal(size=vectors.shape))
        )
        measures = [before(0), after("average-0.5")]
        found = before.difference(0, "average-0.5")
        assert before.main == {"contrastive": "dev_nDCG@10", "scored": "dev_spearman"}[task]
        assert found.value == pytest.approx(measures[1][before.main] - measures[0][before.main], abs=1e-9)
        again = compare.paired(before.report(0), after.report("average-0.5"), before.main.removeprefix("dev_"))
        assert (found.low, found.high, found.items) == (again.low, again.high, len(before.report(0).items))
        assert found.low <= found.value <= found.high


def test_masked_language_models_are_compared_by_their_rows(home):
    rows = {0: np.array([[4.0, 2], [3, 1], [2, 2]]), 7: np.array([[3.0, 2], [2, 1], [2, 2]])}
    objective = SimpleNamespace(dev_groups=lambda: np.array([0, 0, 1]))
    made = Scorer(SimpleNamespace(objective=objective, old=None), "mlm", home)
    assert made.main == "dev_loss"
    for step, values in rows.items():
        made.prepared.objective.score = lambda: {"dev_loss": 1.0}
        made.prepared.objective.row_losses = values
        assert made(step) == {"dev_loss": 1.0}
    assert made.difference(0, 7).value == pytest.approx(7 / 5 - 9 / 5)


def test_what_is_kept_is_whole_or_not_there(home, monkeypatch):
    """A report is written under another name first: a kill leaves the old one."""
    vectors, dev = scored_dev()
    made = scorer(home, "scored", vectors, dev)
    made(1)
    before = made.report(1).as_dict()
    monkeypatch.setattr(files.os, "rename", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(Exception, match="No space left"):
        made(1)
    assert made.report(1).as_dict() == before


def test_a_run_that_goes_on_is_scored_on_both_sides(home):
    """Each side by itself, the mean of both whatever their sizes, and a verdict that one side alone can spoil."""
    objective = SimpleNamespace(dev_groups=lambda: np.arange(100), score=lambda: {"dev_loss": 1.0})
    made = Scorer(SimpleNamespace(objective=objective, old=90), "mlm", home)
    noise = np.random.default_rng(0).normal(0, 0.1, 100)
    for step, (old, new) in {0: (2.0, 3.0), 1: (2.0, 1.0), 2: (2.5, 1.0)}.items():
        objective.row_losses = np.stack([np.repeat([old, new], [90, 10]) + noise, np.ones(100)], axis=1)
        rows = objective.row_losses[:, 0]
        sides = {"dev_old_loss": rows[:90].mean(), "dev_new_loss": rows[90:].mean()}
        assert made(step) == pytest.approx({"dev_loss": 1.0, **sides, "dev_sides_loss": sum(sides.values()) / 2})
    found = made.verdict(0, 1)
    assert found["word"] == "WIN" and found["sides"]["old"]["value"] == 0
    assert found["sides"]["new"]["items"] == 10 and found["sides"]["new"]["high"] < 0
    assert made.verdict(0, 2)["word"] == "REGRESSION" and made.verdict(0, 0) == {"sides": None, "word": None}
