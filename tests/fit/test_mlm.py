from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM

from conftest import corpus
from embedtune.data.read import read_texts
from embedtune.data.tokens import tokenize
from embedtune.encoder import load, varlen
from embedtune.encoder.heads import only_rows
from embedtune.encoder.vocabulary import continuations
from embedtune.fit.batches import micro_batches
from embedtune.fit.dropout import KeyedDropout, KeyedNoise, key_dropout
from embedtune.fit.objectives.mlm import MaskedLanguageModel, Masker

VOCABULARY = 1000
SPECIAL = np.isin(np.arange(VOCABULARY), [0, 1, 2, 3, 4])
MASKER = Masker(4, np.arange(5, VOCABULARY), SPECIAL, None)


def sentences(count, length, seed=0):
    draw = np.random.default_rng(seed)
    return [np.concatenate([[2], draw.integers(5, VOCABULARY, length), [3]]) for _ in range(count)]


def within(share, expected, trials, deviations=5):
    return abs(share - expected) <= deviations * (expected * (1 - expected) / trials) ** 0.5


@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_the_rate_and_the_shares(rate):
    rows = sentences(2000, 100)
    masked = MASKER.mask(rows, np.arange(2000), rate, 0, 0)
    assert within(len(masked.labels) / 200_000, rate, 200_000)
    new = np.array([masked.rows[o][p] for o, p in zip(masked.owner, masked.position)])
    trials = len(new)
    # A random replacement hits the mask token never, and the token itself once in 995 times.
    assert within((new == 4).mean(), 0.8, trials)
    assert within((new == masked.labels).mean(), 0.1 + 0.1 / 995, trials)
    assert within(((new != 4) & (new != masked.labels)).mean(), 0.1 * 994 / 995, trials)
    replaced = new[(new != 4) & (new != masked.labels)]
    assert not SPECIAL[replaced].any() and len(np.unique(replaced)) > 900


def test_what_is_not_chosen_is_not_changed_and_labels_are_the_truth():
    rows = sentences(50, 40)
    masked = MASKER.mask(rows, np.arange(50), 0.15, 1, 2)
    for number, (before, after) in enumerate(zip(rows, masked.rows)):
        mine = masked.position[masked.owner == number]
        assert np.array_equal(masked.labels[masked.owner == number], before[mine])
        untouched = np.setdiff1d(np.arange(len(before)), mine)
        assert np.array_equal(before[untouched], after[untouched])
    assert np.array_equal(masked.owner, np.sort(masked.owner))


def test_specials_are_never_masked_and_every_row_has_a_mask():
    draw = np.random.default_rng(3)
    rows = [np.where(draw.random(n) < 0.5, draw.integers(0, 5, n), 7) for n in draw.integers(1, 6, 500)]
    masked = MASKER.mask(rows, np.arange(500), 0.01, 0, 0)
    assert not SPECIAL[masked.labels].any()
    assert set(masked.owner) == {n for n, row in enumerate(rows) if (row == 7).any()}


def test_masks_are_a_function_of_seed_epoch_and_row_alone():
    rows = sentences(30, 50)
    together = MASKER.mask(rows, np.arange(30), 0.15, 5, 1)
    turned = MASKER.mask(rows[::-1], np.arange(30)[::-1], 0.15, 5, 1)
    for number in range(30):
        alone = MASKER.mask([rows[number]], np.array([number]), 0.15, 5, 1).rows[0]
        assert np.array_equal(alone, together.rows[number])
        assert np.array_equal(alone, turned.rows[29 - number])
    others = [
        MASKER.mask(rows, np.arange(30) + add, 0.15, *key) for add, key in [(0, (5, 2)), (0, (6, 1)), (1, (5, 1))]
    ]
    for other in others:
        same = [np.array_equal(a, b) for a, b in zip(together.rows, other.rows)]
        assert sum(same) <= 1


@pytest.mark.parametrize(
    "pieces, words",
    [
        (["[CLS]", "[SEP]", "[MASK]", "un", "##believ", "##able", "cat"], [[1, 2, 3], [4], [5, 6]]),
        (["<s>", "</s>", "<mask>", "Ġun", "believ", "able", "Ġcat"], [[1, 2, 3], [4], [5, 6]]),
        (["<s>", "</s>", "<mask>", "▁un", "believ", "able", "▁cat"], [[1, 2, 3], [4], [5, 6]]),
    ],
    ids=["wordpiece", "bytes", "sentencepiece"],
)
def test_whole_words_are_masked_whole(pieces, words):
    continues = continuations(pieces)
    assert continues[3:].tolist() == [False, True, True, False]
    masker = Masker(2, np.array([3, 4, 5, 6]), np.arange(7) < 3, continues)
    row = np.array([0, 3, 4, 5, 6, 3, 4, 1])  # un believ able cat un believ
    chosen = 0
    for number in range(300):
        position = masker.mask([row], np.array([number]), 0.3, 0, 0).position.tolist()
        whole = [word for word in words if set(word) & set(position)]
        assert sorted(position) == sorted(sum(whole, []))
        chosen += len(whole)
    assert within(chosen / 900, 0.3 + 0.7**3 / 3, 900)  # each word at the rate; a row without any gets one


def test_a_word_at_the_start_of_a_chunk_is_a_unit():
    continues = np.array([False, False, False, False, True, True])
    masker = Masker(2, np.array([3, 4, 5]), np.arange(6) < 3, continues)
    for number in range(50):
        position = masker.mask([np.array([0, 4, 5, 3, 1])], np.array([number]), 0.2, 0, 0).position.tolist()
        assert position in ([1, 2], [3], [1, 2, 3])


def test_micro_batches_hold_every_row_once_and_keep_the_budget():
    draw = np.random.default_rng(0)
    for padded in (False, True):
        for budget in (1, 10, 64, 10_000):
            rows = sorted((np.zeros(n, int) for n in draw.integers(1, 40, 57)), key=len)
            ranges = list(micro_batches([len(row) for row in rows], budget, padded))
            assert [first for first, _ in ranges[1:]] == [last for _, last in ranges[:-1]]
            assert ranges[0][0] == 0 and ranges[-1][1] == 57
            for first, last in ranges:
                part = rows[first:last]
                cost = len(part) * len(part[-1]) if padded else sum(map(len, part))
                assert cost <= budget or len(part) == 1
                if last < 57:  # and none is smaller than it need be
                    grown = rows[first : last + 1]
                    assert (len(grown) * len(grown[-1]) if padded else sum(map(len, grown))) > budget


@pytest.fixture
def objective(tiny_model, tmp_path):
    """objective(kind, **changes) -> an objective on 60 rows of text, dropout keyed as in a run."""

    def make(kind, text=None, head_steps=0, seed=0, packed=True, **changes):
        loaded = load.load_mlm(tiny_model(kind), 0)
        if not packed:
            loaded.padded = "a test asks for it"
        path = tmp_path / "text.txt"
        path.write_text(text or corpus(60, seed=4))
        tokens = tokenize(read_texts(path), loaded.tokenizer, 64, tmp_path / f"{kind}-{packed}")
        noise = KeyedNoise(seed)
        dropping = key_dropout(loaded.model, noise)
        assert dropping > 0
        rows = np.arange(len(tokens))
        fresh = [name for name, _ in loaded.model.named_parameters() if name in set(loaded.fresh)]
        made = MaskedLanguageModel(
            loaded, tokens, rows[10:], tokens, rows[:10], 0.15, seed, head_steps, noise,
            Masker.of(loaded.tokenizer, False), fresh,
        )  # fmt: skip
        return replace(made, **changes)

    return make


def gradients(objective, max_tokens, step=3, rows=None):
    objective.model.zero_grad()
    result = objective.step(step, 0, np.arange(24) if rows is None else rows, max_tokens)
    return result, {n: p.grad.clone() for n, p in objective.model.named_parameters() if p.grad is not None}


def assert_same(one, two, tolerance=1e-5):
    assert one.keys() == two.keys()
    for name in one:
        gap = (one[name] - two[name]).norm()
        assert gap <= tolerance * max(1e-1, float(one[name].norm())), name


@pytest.mark.parametrize("kind", ["bert", "modernbert", "roberta", "distilbert", "mpnet"])
def test_accumulated_is_one_batch_with_dropout_on(objective, kind):
    made = objective(kind)
    whole, expected = gradients(made, 10**6)
    for budget in (1, 40, 200):
        parts, found = gradients(made, budget)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-6) and parts.tokens == whole.tokens
        assert_same(expected, found)
    other, _ = gradients(made, 10**6, step=4)
    assert other.loss != pytest.approx(whole.loss, rel=1e-4)  # another step, other dropout


@pytest.mark.parametrize("kind", ["bert", "modernbert", "roberta", "distilbert"])
def test_padded_is_padding_free_with_dropout_on(objective, kind):
    packed, expected = gradients(objective(kind), 300)
    padded, found = gradients(objective(kind, packed=False), 300)
    assert padded.loss == pytest.approx(packed.loss, rel=1e-6) and padded.tokens == packed.tokens
    assert_same(expected, found, 1e-4)


def test_the_order_of_the_rows_does_not_matter(objective):
    made = objective("bert")
    one, expected = gradients(made, 100)
    two, found = gradients(made, 100, rows=np.arange(24)[::-1].copy())
    assert one.loss == pytest.approx(two.loss, rel=1e-6)
    assert_same(expected, found)


def test_the_gradient_is_that_of_the_plain_loss(objective, tiny_model):
    """Against stock code throughout: padded batch, eager attention, full head, torch's cross-entropy."""
    made = objective("bert")
    for module in made.model.modules():
        if isinstance(module, KeyedDropout):
            module.p = 0.0
    result, found = gradients(made, 100)
    rows = [made.tokens.row(n) for n in made.train[np.arange(24)]]
    masked = made.masker.mask(rows, made.train[np.arange(24)], 0.15, 0, 0)
    stock = AutoModelForMaskedLM.from_pretrained(tiny_model("bert"), attn_implementation="eager").eval()
    logits = stock(**varlen.pad(masked.rows, 0)).logits[masked.owner, masked.position]
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(masked.labels))
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert_same({n: p.grad for n, p in stock.named_parameters()}, found, 1e-4)


@pytest.mark.parametrize("kind", ["bert", "modernbert", "roberta", "distilbert", "mpnet", "minilm"])
def test_only_rows_gives_the_full_heads_logits(objective, kind):
    made = objective(kind)
    made.model.eval()
    inputs = made.loaded.collate([made.tokens.row(n) for n in range(5)])
    index = torch.tensor([1, 4, 17])
    with torch.no_grad():
        full = made.model(**inputs).logits
        with only_rows(made.model.base_model, index):
            some = made.model(**inputs).logits
        after = made.model(**inputs).logits
    torch.testing.assert_close(some[0], full.reshape(-1, full.shape[-1])[index], atol=1e-5, rtol=1e-5)
    assert after.shape == full.shape  # the hook is gone


def test_masks_made_ahead_are_those_of_the_step_and_of_no_other(objective):
    made = objective("bert")
    rows, others = np.arange(8), np.arange(8, 16)
    expected = gradients(made, 10_000, step=3, rows=rows)
    elsewhere = gradients(made, 10_000, step=3, rows=others)
    for prepared in (rows, others):
        made.ahead(3, 0, prepared)
        for wanted, asked in ((expected, rows), (elsewhere, others)):
            found = gradients(made, 10_000, step=3, rows=asked)
            assert found[0] == wanted[0]
            assert_same(wanted[1], found[1])


def test_only_rows_takes_its_hook_off_after_an_error(objective):
    backbone = objective("bert").model.base_model
    before = dict(backbone._forward_hooks)
    with pytest.raises(ZeroDivisionError), only_rows(backbone, torch.tensor([0])):
        assert len(backbone._forward_hooks) == len(before) + 1
        raise ZeroDivisionError
    assert dict(backbone._forward_hooks) == before


def test_a_fresh_head_is_tied_and_trains_alone(objective):
    made = objective("minilm", head_steps=2)
    model = made.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert made.head and all(name.startswith("cls.") for name in made.head)
    _, alone = gradients(made, 100, step=1)
    assert set(alone) == set(made.head)
    _, everything = gradients(made, 100, step=2)
    assert set(everything) > set(made.head) and any(name.startswith("bert.") for name in everything)


def test_the_same_fresh_head_for_the_same_seed(tiny_model):
    heads = [
        load.load_mlm(tiny_model("minilm"), seed).model.cls.predictions.transform.dense.weight for seed in (1, 1, 2)
    ]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_scoring_is_fixed_and_masks_15_percent_whatever_the_training_rate(objective):
    made = objective("bert")
    other = replace(made, rate=0.6, seed=9)
    first = made.score()
    rows = made.row_losses.copy()
    gradients(made, 200)  # training in between moves nothing
    assert made.score() == first == other.score()
    assert np.array_equal(made.row_losses, rows)
    assert list(first) == made.measures
    tokens = sum(len(made.tokens.row(n)) - 2 for n in made.dev)
    assert rows[:, 1].min() >= 1 and within(rows[:, 1].sum() / tokens, 0.15, tokens, 4)
    assert first["dev_loss"] == pytest.approx(rows[:, 0].sum() / rows[:, 1].sum())
    assert first["dev_perplexity"] == pytest.approx(np.exp(first["dev_loss"]))
    characters = made.tokens.characters[made.dev].sum()
    assert first["dev_loss_per_character"] == pytest.approx(first["dev_loss"] * tokens / characters)
    assert 0 <= first["dev_accuracy"] <= 1


def test_row_losses_stand_in_the_order_of_the_dev_rows(objective):
    made = objective("bert")
    made.score()
    together = made.row_losses
    for place in range(len(made.dev)):
        alone = replace(made, dev=made.dev[place : place + 1])
        alone.score()
        assert alone.row_losses[0] == pytest.approx(together[place], rel=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_rows_without_anything_to_guess_do_no_harm(objective, packed):
    """Characters that the tokenizer does not know are never masked; a batch may hold nothing else."""
    made = objective("bert", packed=packed)
    unknown = np.array([2, 1, 3])
    tokens = made.tokens
    ids, ends = np.concatenate([unknown, tokens.ids]), np.concatenate([[3], tokens.ends + 3])
    columns = {name: np.concatenate([[0], getattr(tokens, name)]) for name in ("document", "line", "characters")}
    made = replace(made, tokens=replace(tokens, ids=ids, ends=ends, **columns), train=np.array([0, 1, 2]))
    alone, _ = gradients(made, 100, rows=np.array([0]))
    assert alone.loss == 0
    with_it, expected = gradients(made, 3, rows=np.array([0, 1, 2]))
    without, found = gradients(made, 3, rows=np.array([1, 2]))
    assert with_it.loss == pytest.approx(without.loss, rel=1e-6)
    assert_same(expected, found)


def test_keyed_dropout_drops_at_its_rate_and_keeps_the_mean():
    noise = KeyedNoise(1)
    layers = [KeyedDropout(0.1, number, noise) for number in range(3)]
    noise.set(5, np.repeat(np.arange(200), 20), np.tile(np.arange(20), 200))
    x = torch.ones(4000, 64)
    one, two, three = (layer(x) for layer in layers)
    share = (one == 0).float().mean().item()
    assert within(share, 0.1, 100_000)  # drawn from a table of 4,096 rows
    assert one.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    assert within(((one == 0) & (two == 0)).float().mean().item(), 0.01, 30_000)
    assert within(((two == 0) & (three == 0)).float().mean().item(), 0.01, 30_000)
    layers[0].eval()
    assert torch.equal(layers[0](x), x)
    with pytest.raises(RuntimeError, match="KeyedNoise.set"):
        KeyedDropout(0.1, 0, KeyedNoise(0))(x)


def test_keyed_dropout_is_a_function_of_seed_step_sample_and_position():
    def mask(seed, step, sample, position, layer=0):
        noise = KeyedNoise(seed)
        noise.set(step, np.array([sample]), np.array([position]))
        ones = torch.ones(1, 64)
        return noise.mask(noise.salt(layer), noise.table(0.5, ones), ones)

    base = mask(1, 2, 3, 4)
    assert torch.equal(base, mask(1, 2, 3, 4))
    for other in [(2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5), (1, 2, 3, 4, 1)]:
        assert not torch.equal(base, mask(*other))
