"""The vector objective against sentence-transformers' own losses, cached against whole, two ranks against one."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import two_ranks
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
        loss = MaskedRanking(chosen, table, guide, texts.same(ANCHOR, DOCUMENT))
        if chosen.loss != ranking.MULTIPLE:
            stock = ranking.stock_loss(chosen.loss, 32, {"scale": chosen.scale})

            def loss(vectors, place, numbers):
                return stock([vectors[torch.from_numpy(column)] for column in place.T], None)

        made = EmbeddingObjective(
            opened.model, tokens, table, loss, lambda step: (0, np.arange(len(table))), noise, [],
            "a test asks for it" if padded else opened.padded, texts.prompt_lengths(opened, prompt),
        )  # fmt: skip
        made.names = [text for _, text in texts.numbers]
        return made

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
    "matryoshka, dot": (
        1,
        {"dims": (32, 8), "similarity": "dot"},
        lambda m: losses.MatryoshkaLoss(
            m, losses.MultipleNegativesRankingLoss(m, scale=20.0, similarity_fct=lambda a, b: a @ b.T), [32, 8]
        ),
    ),
    "triplet": (1, {"loss": "TripletLoss"}, losses.TripletLoss),
    "mega": (
        0,
        {"loss": "MegaBatchMarginLoss"},
        lambda m: losses.MegaBatchMarginLoss(m, use_mini_batched_version=False),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
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


def plain(made, no_negatives):
    """The loss by the definition: each row's positive among all documents of the batch but its `no_negatives`."""
    made.model.eval()
    vectors = made.vectors(np.arange(len(made.tokens))).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    documents = {n for row in made.columns[:, 1:].tolist() for n in row if n != NONE}
    total = 0.0
    for anchor, positive, *_ in made.columns.tolist():
        apart = no_negatives.get(made.names[anchor], ())
        there = [d for d in documents if d == positive or made.names[d] not in apart]
        scores = {d: 20 * vectors[anchor] @ vectors[d] for d in there}
        total += np.log(sum(map(np.exp, scores.values()))) - scores[positive]
    return total / len(made.columns)


a, p, q, b, r, c, t = TEXTS[:7]
BATCHES = {
    "two positives": ([[a, p], [a, q], [b, r]], {a: {p, q}}),
    "three positives": ([[a, p], [a, q], [a, r], [b, t]], {a: {p, q, r}}),
    "a negative that is another anchor's positive": ([[a, p, r], [a, q], [b, r, p]], {a: {p, q}}),
    "a negative that is the anchor's other positive": ([[a, p, q], [a, q], [b, r]], {a: {p, q}}),
    "an anchor that is a positive": ([[a, p], [p, q], [b, r]], {p: {p}}),
    "an anchor that is a negative": ([[a, p, b], [b, r], [c, t]], {b: {b}}),
    "nothing to mask": ([[a, p, t], [b, r, t], [c, q]], {}),
    "one positive of two anchors": ([[a, p], [b, p], [c, q]], {}),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("budget", [100_000, 30], ids=["one pass", "cached"])
def test_what_is_no_negative(objective, name, budget):
    """Other positives of an anchor, and its own text, for that anchor only; all else is one. Each text counts once."""
    rows, no_negatives = BATCHES[name]
    made = objective(rows)
    found = step(made, budget)[0]
    assert found == pytest.approx(plain(made, no_negatives), abs=1e-5)
    if no_negatives:
        assert found < plain(made, {}) - 1e-3, "the mask matters here"


def test_a_masked_text_gets_no_gradient_from_that_anchor():
    """In two rows of one anchor nothing is a negative: the loss is 0, and so is its gradient."""
    table = np.array([[0, 1], [0, 2]])
    vectors = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = MaskedRanking(Ranking(scale=20.0, similarity="cosine"), table, None)(vectors, table, np.arange(2))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6) and float(vectors.grad.abs().max()) < 1e-6


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


KNOWN = [name for name in vars(losses) if name.endswith("Loss")]
FOR_PAIRS = {"MultipleNegativesRankingLoss", "MultipleNegativesSymmetricRankingLoss", "MegaBatchMarginLoss",
             "GlobalOrthogonalRegularizationLoss"}  # fmt: skip
FOR_TRIPLETS = FOR_PAIRS - {"MegaBatchMarginLoss"} | {"TripletLoss"}
FOR_SCORES = {"CoSENTLoss", "AnglELoss", "CosineSimilarityLoss", "ContrastiveLoss", "OnlineContrastiveLoss",
              "ContrastiveTensionLoss"}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_every_loss_is_taken_for_what_it_is_or_refused(name):
    """By trying it. Those with weights or a model of their own cannot be made, and are ours or nobody's."""
    for columns, scored, taken in ((2, False, FOR_PAIRS), (3, False, FOR_TRIPLETS), (2, True, FOR_SCORES)):
        try:
            ranking.check_loss(ranking.stock_loss(name, 8, {"scale": 20.0}), name, 8, columns, scored)
            assert name in taken
        except UserError as error:
            assert name not in taken and error.where == "--loss" and name in str(error)


@pytest.mark.parametrize(
    "name, says",
    [
        ("TripletLos", "did you mean 'TripletLoss'?"),
        ("cosentloss", "did you mean 'CoSENTLoss'?"),
        ("nonsense", "there is no loss 'nonsense' in sentence-transformers"),
        ("SoftmaxLoss", "SoftmaxLoss cannot be made from a model alone"),
        ("losses", "there is no loss"),
    ],
)
def test_losses_that_are_none(name, says):
    with pytest.raises(UserError) as caught:
        ranking.stock_loss(name, 8, {})
    assert says in str(caught.value)


def test_a_loss_with_weights_of_its_own_is_refused(monkeypatch):
    class WithWeights(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.classifier = torch.nn.Linear(8, 2)

    monkeypatch.setattr(losses, "WithWeights", WithWeights, raising=False)
    with pytest.raises(UserError, match="WithWeights has weights of its own, which no model folder could hold"):
        ranking.stock_loss("WithWeights", 8, {})


def test_two_ranks_are_one_with_the_union(tiny_model, tmp_path):
    """Two processes with gathered vectors leave the same loss and gradients as one, dropout and cache included."""
    two_ranks.main(str(tiny_model("minilm")), str(tmp_path), 0, 1)
    script = Path(two_ranks.__file__)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(tiny_model("minilm")), str(tmp_path), str(rank), "2"],
            env=environment, stderr=subprocess.PIPE,
        )
        for rank in range(2)
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


# ---- the penalty on length


def pairwise(vectors, z):
    """The mean of a_i'a_j over i != j, a = (y - mean y) z: term by term."""
    y = torch.nn.functional.normalize(vectors, dim=-1)
    a = (y - y.mean(0)) * z[:, None]
    n = len(z)
    return sum(a[i] @ a[j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))


def test_the_penalty_and_its_gradient_are_those_of_the_sum_over_pairs():
    torch.manual_seed(0)
    vectors, z = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64)
    found, wanted = ranking.squared_covariance(vectors, z), pairwise(vectors, z)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), abs=1e-12)
    gaps = [a - b for a, b in zip(torch.autograd.grad(found, vectors), torch.autograd.grad(wanted, vectors))]
    assert float(gaps[0].abs().max()) < 1e-12


def test_batches_estimate_the_squared_covariance_of_all_texts_while_the_plain_square_is_mostly_noise():
    torch.manual_seed(0)
    z = torch.randn(4000, dtype=torch.float64)
    z = (z - z.mean()) / z.std(correction=0)
    vectors = torch.randn(4000, 40, dtype=torch.float64) + 0.3 * z[:, None] * torch.eye(40)[0] + 1.0
    y = torch.nn.functional.normalize(vectors, dim=-1)
    whole = float(((y * z[:, None]).mean(0) - y.mean(0) * z.mean()).square().sum())
    parts = [torch.randperm(4000)[:32] for _ in range(600)]
    mean = np.mean([float(ranking.squared_covariance(vectors[i], z[i])) for i in parts])
    plain = np.mean([float(((y[i] - y[i].mean(0)) * z[i, None]).mean(0).square().sum()) for i in parts])
    assert abs(mean - whole) < 0.2 * whole and plain > 3 * whole


@pytest.mark.parametrize("budget", [100_000, 40], ids=["one pass", "cached"])
def test_the_penalty_through_the_model_is_that_of_one_backward_pass(objective, budget):
    """Whatever the micro-batches: the gradient of the loss plus the weighted penalty of the whole batch's texts."""
    made = objective(rows_of(1), dropout=False)
    plain = made.loss
    made.loss = ranking.with_length_penalty(plain, made.columns, made.tokens, 50.0)
    found, gradient = step(made, budget)
    made.loss = plain
    alone, _ = step(made, budget)
    texts = np.arange(len(made.tokens))
    log = np.log(made.tokens.lengths())
    z = torch.from_numpy((log - log.mean()) / log.std()).float()
    made.model.zero_grad()
    vectors = made._embed(made.tokens, texts, 0)
    penalty = 50.0 * pairwise(vectors, z)
    (plain(vectors, made.columns, np.arange(made.size)) + penalty).backward()
    assert found - alone == pytest.approx(float(penalty.detach()), abs=1e-4) and abs(float(penalty.detach())) > 0.01
    same(gradient, gradients(made.model), 1e-4)


def test_a_weight_of_zero_is_the_loss_itself(objective):
    made = objective(rows_of(1))
    assert ranking.with_length_penalty(made.loss, made.columns, made.tokens, 0.0) is made.loss
