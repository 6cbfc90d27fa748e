"""The vector objective against sentence-transformers' own losses, cached against whole, two ranks against one."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses

from conftest import corpus
from embedtune.encoder.embedder import load_trainable
from embedtune.errors import UserError
from embedtune.fit import ranking
from embedtune.fit.dropout import KeyedNoise, key_dropout
from embedtune.fit.objectives.contrastive import MaskedRanking
from embedtune.fit.objectives.embedding import NONE, EmbeddingObjective
from embedtune.fit.objectives.texts import ANCHOR, DOCUMENT, Texts
from embedtune.recipes import Ranking

TEXTS = list(dict.fromkeys(line for line in corpus(90, seed=9).splitlines() if line))


def rows_of(negatives=1, count=8):
    """`count` rows of (anchor, positive, negative, ...), no text twice."""
    width = 2 + negatives
    return [TEXTS[i * width : (i + 1) * width] for i in range(count)]


@pytest.fixture
def objective(tiny_model, tmp_path):
    """objective(rows, kind, dropout, prompts, **ranking) -> an objective on rows of texts."""

    def make(rows, kind="minilm", dropout=False, prompts=("", ""), padded=False, guide=None, **options):
        opened = load_trainable(tiny_model(kind))
        if not dropout:
            for module in opened.model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        texts = Texts()
        cells = [[texts.number(ANCHOR if c == 0 else DOCUMENT, t) for c, t in enumerate(row)] for row in rows]
        table = np.full((len(cells), max(map(len, cells))), NONE)
        for number, row in enumerate(cells):
            table[number, : len(row)] = row
        prompt = {ANCHOR: prompts[0], DOCUMENT: prompts[1]}
        tokens = texts.tokenize(
            opened.model.tokenizer, prompt, 64, tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"
        )
        noise = KeyedNoise(0)
        key_dropout(opened.model, noise)
        chosen = replace(Ranking(scale=20.0, similarity="cosine"), **options)
        loss = MaskedRanking(chosen, table, guide)
        if chosen.loss != ranking.MULTIPLE:
            stock = ranking.stock_loss(chosen.loss, 32, {"scale": chosen.scale})

            def loss(vectors, place, numbers):
                return stock([vectors[torch.from_numpy(column)] for column in place.T], None)

        return EmbeddingObjective(
            opened.model, tokens, table, loss, lambda step: (0, np.arange(len(table))), noise, [],
            "a test asks for it" if padded else opened.padded, texts.prompt_lengths(opened, prompt),
        )  # fmt: skip

    return make


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(objective, max_tokens=100_000, number=0):
    objective.model.zero_grad()
    result = objective.step(number, 0, np.arange(objective.size), max_tokens)
    return result.loss, gradients(objective.model)


def stock(folder, rows, make_loss, prompts=("", "")):
    """sentence-transformers' own model, padding and loss: the loss of the rows and the gradients."""
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"attn_implementation": "eager"})
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.max_seq_length = 64
    model.train()
    columns = [[(prompts[0] if c == 0 else prompts[1]) + t for t in column] for c, column in enumerate(zip(*rows))]
    features = [model.preprocess(column) for column in columns]
    loss = make_loss(model)(features, torch.arange(len(rows)))
    loss.backward()
    return float(loss.detach()), gradients(model)


def same(a, b, tolerance=1e-5):
    assert set(a) == set(b)
    for name in a:
        scale = max(1.0, float(b[name].abs().max()))
        assert float((a[name] - b[name]).abs().max()) <= tolerance * scale, name


LOSSES = {
    "pairs": (0, {}, losses.MultipleNegativesRankingLoss),
    "triplets": (1, {}, losses.MultipleNegativesRankingLoss),
    "three negatives, scale": (3, {"scale": 50.0}, lambda m: losses.MultipleNegativesRankingLoss(m, scale=50.0)),
    "symmetric": (0, {"symmetric": True}, losses.MultipleNegativesSymmetricRankingLoss),
    "dot": (
        1,
        {"similarity": "dot", "scale": 1.0},
        lambda m: losses.MultipleNegativesRankingLoss(m, scale=1.0, similarity_fct=lambda a, b: a @ b.T),
    ),
    "matryoshka": (
        1,
        {"dims": (32, 16, 8)},
        lambda m: losses.MatryoshkaLoss(m, losses.MultipleNegativesRankingLoss(m), [32, 16, 8]),
    ),
    "triplet": (1, {"loss": "TripletLoss"}, losses.TripletLoss),
    "mega": (
        0,
        {"loss": "MegaBatchMarginLoss"},
        lambda m: losses.MegaBatchMarginLoss(m, use_mini_batched_version=False),
    ),
}


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "mega"])
@pytest.mark.parametrize("budget", [100_000, 40], ids=["one pass", "cached"])
def test_loss_and_gradients_are_those_of_sentence_transformers_on_padded_rows(objective, tiny_model, name, budget):
    negatives, options, make_loss = LOSSES[name]
    rows = rows_of(negatives)
    loss, grads = step(objective(rows, **options), budget)
    expected, expected_grads = stock(tiny_model("minilm"), rows, make_loss)
    assert loss == pytest.approx(expected, abs=1e-5)
    same(grads, expected_grads)


@pytest.mark.parametrize("kind", ["roberta", "modernbert", "distilbert", "mpnet"])
def test_other_architectures(objective, tiny_model, kind):
    rows = rows_of(1)
    loss, grads = step(objective(rows, kind), 60)
    expected, expected_grads = stock(tiny_model(kind), rows, losses.MultipleNegativesRankingLoss)
    assert loss == pytest.approx(expected, abs=2e-5)
    same(grads, expected_grads, 1e-4)


def test_prompts_stand_before_their_role(objective, tiny_model):
    rows, prompts = rows_of(1), ("bafe ", "dulo ")
    loss, grads = step(objective(rows, prompts=prompts))
    expected, expected_grads = stock(tiny_model("minilm"), rows, losses.MultipleNegativesRankingLoss, prompts)
    assert loss == pytest.approx(expected, abs=1e-5)
    same(grads, expected_grads)
    assert loss != pytest.approx(step(objective(rows))[0], abs=1e-4)


@pytest.mark.parametrize("dropout", [False, True])
def test_cached_is_uncached_whatever_the_budget(objective, dropout):
    """With dropout too: the second forward pass sees the noise of the first."""
    rows = rows_of(2, 10)
    whole = step(objective(rows, dropout=dropout))
    for budget in (1, 25, 120):
        loss, grads = step(objective(rows, dropout=dropout), budget)
        assert loss == pytest.approx(whole[0], abs=1e-5)
        same(grads, whole[1])


def test_dropout_is_there_and_follows_the_step(objective):
    rows = rows_of(1)
    quiet, first = step(objective(rows))[0], step(objective(rows, dropout=True))[0]
    assert first != quiet
    assert first == step(objective(rows, dropout=True))[0]
    assert first != step(objective(rows, dropout=True), number=1)[0]


def test_padded_is_packed(objective):
    rows = rows_of(1)
    packed, padded = step(objective(rows)), step(objective(rows, padded=True), 80)
    assert packed[0] == pytest.approx(padded[0], abs=1e-5)
    same(packed[1], padded[1])


def test_matryoshka_is_the_sum_over_its_dims(objective):
    rows = rows_of(1)
    parts = [step(objective(rows, dims=(dim,)))[0] for dim in (32, 8)]
    assert step(objective(rows, dims=(32, 8)))[0] == pytest.approx(sum(parts), abs=1e-5)


def test_rows_may_have_different_numbers_of_negatives(objective):
    rows = rows_of(2, 6)
    ragged = [row[: 2 + number % 3] for number, row in enumerate(rows)]
    made = objective(ragged)
    made.model.eval()
    vectors = {n: v for n, v in enumerate(torch.from_numpy(made.vectors(np.arange(len(made.tokens)))))}
    table = made.columns
    documents = sorted({d for row in table[:, 1:].tolist() for d in row if d != NONE})
    matrix = torch.stack([vectors[d] for d in documents])
    expected = np.mean([
        float(-torch.log_softmax(20 * matrix @ vectors[row[0]], 0)[documents.index(row[1])]) for row in table.tolist()
    ])  # fmt: skip
    assert step(made)[0] == pytest.approx(expected, abs=1e-5)


def test_other_positives_of_an_anchor_are_no_negatives(objective):
    a, p, q, b, r = TEXTS[:5]
    both = [[a, p], [a, q], [b, r]]
    made = objective(both)
    masked = made.loss._masked(made.columns[:, 0], np.unique(made.columns[:, 1]), np.arange(3))
    assert masked.tolist() == [[False, True, False], [True, False, False], [False, False, False]]
    # The anchor's negatives are then those of the third row alone, as in batches of two rows.
    one, two = (step(objective([[a, x], [b, r]]))[0] for x in (p, q))
    third = step(objective(both))[0]
    assert third < (one + two) / 2 + step(objective([[b, r], [a, p], [a, q]][:3]))[0]


def test_a_mined_negative_that_is_a_positive_elsewhere_is_masked_for_that_anchor_only(objective):
    a, p, q, b, r = TEXTS[:5]
    made = objective([[a, p, r], [a, q], [b, r, p]])
    candidates = np.unique(made.columns[:, 1:][made.columns[:, 1:] != NONE])
    own = np.searchsorted(candidates, made.columns[:, 1])
    masked = made.loss._masked(made.columns[:, 0], candidates, own)
    names = {number: text for (_, text), number in []}
    assert not names and masked.sum() == 2  # p and q for the other row of `a`; r is a's negative, p is b's


def test_the_guide_masks_what_it_finds_nearer_than_the_positive(objective, tiny_model):
    rows = rows_of(1, 6)
    made = objective(rows)
    made.model.eval()
    guide = made.vectors(np.arange(len(made.tokens)))
    guide /= np.linalg.norm(guide, axis=1, keepdims=True)
    ours = step(objective(rows, guide=guide))[0]

    def gist(model):
        guide_model = SentenceTransformer(str(tiny_model("minilm")), device="cpu")
        guide_model.max_seq_length = 64
        return losses.GISTEmbedLoss(
            model, guide_model, temperature=1 / 20, contrast_anchors=False, contrast_positives=False
        )

    assert ours == pytest.approx(stock(tiny_model("minilm"), rows, gist)[0], abs=1e-4)
    assert ours < step(objective(rows))[0]


@pytest.mark.parametrize(
    "name, word",
    [("TripletLos", "TripletLoss"), ("SoftmaxLoss", "cannot be made"), ("nonsense", "no loss"), ("MSELoss", "")],
)
def test_losses_by_name(name, word):
    if name == "MSELoss":
        assert callable(ranking.stock_loss(name, 8, {}))
        return
    with pytest.raises(UserError, match=word):
        ranking.stock_loss(name, 8, {})


def test_two_ranks_are_one_with_the_union(tiny_model, tmp_path):
    """Two processes with gathered vectors leave the same loss and gradients as one, dropout and cache included."""
    script = Path(__file__).with_name("two_ranks.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    for world in (1, 2):
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), str(tiny_model("minilm")), str(tmp_path), str(rank), str(world)],
                env=environment, stderr=subprocess.PIPE,
            )
            for rank in range(world)
        ]  # fmt: skip
        for process in processes:
            error = process.communicate(timeout=300)[1]
            assert process.returncode == 0, error.decode()[-2000:]
    one = np.load(tmp_path / "1-0.npz", allow_pickle=False)
    for rank in range(2):
        two = np.load(tmp_path / f"2-{rank}.npz", allow_pickle=False)
        assert set(one) == set(two) and len(one) > 20
        for name in one:
            assert np.abs(one[name] - two[name]).max() <= 1e-5 * max(1.0, np.abs(one[name]).max()), name
