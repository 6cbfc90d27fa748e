import copy
import gc

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForMaskedLM

from conftest import KINDS, PACKED
from embedtune.encoder import load, rounded, varlen
from embedtune.encoder.embedder import load_embedder

CPU = torch.device("cpu")
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def dense(query, key, value, lengths, scale, window):
    """softmax(q k') v, one sequence and one head at a time."""
    parts = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value))):
        scores = torch.einsum("ihd,jhd->hij", q, k) * scale
        if window is not None:
            at = torch.arange(len(q))
            scores = scores.masked_fill((at[:, None] - at[None, :]).abs() >= window, float("-inf"))
        parts.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v))
    return torch.cat(parts)


def boundaries(lengths):
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def attended(function, inputs, *rest):
    """Output, and the gradients of a fixed random functional of it."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs, *rest)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    (out * weights).sum().backward()
    return [out.detach(), *(x.grad for x in inputs)]


def both_ways(lengths, window, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = [2 * torch.randn(sum(lengths), 2, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    packed = attended(varlen.packed_attention, inputs, boundaries(lengths), max(lengths), 0.4, window)
    naive = attended(dense, inputs, lengths, 0.4, window)
    return packed, naive


@QUICK
@given(st.lists(st.integers(1, 40), min_size=1, max_size=14), st.none() | st.integers(1, 9))
@example([1], None)
@example([1, 1, 1, 40, 40, 1], 1)
@example([40, 1, 39, 2, 17], 3)
@example([34, 40], 4)  # the shorter one's padding sees nothing but padding
def test_packed_attention_is_dense_attention_inside_each_sequence(lengths, window):
    for mine, theirs in zip(*both_ways(lengths, window)):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("window", [None, 1, 9, 64, 256, 257, 600])
def test_sequences_longer_than_long_among_short_ones(window):
    lengths = [1, varlen.LONG + 1, 3, 600, 40, varlen.LONG]
    for mine, theirs in zip(*both_ways(lengths, window)):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)


@QUICK
@given(st.lists(st.integers(1, 40), min_size=1, max_size=10), st.none() | st.integers(1, 20), st.integers(1, 16))
@example([40], 3, 1)
@example([13, 39, 40], 7, 5)  # pieces that do not go up, and a last one that nobody fills
def test_the_mixed_path_is_dense_attention(lengths, window, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "LONG", 12)
        patch.setattr(varlen, "PIECE", piece)
        for mine, theirs in zip(*both_ways(lengths, window)):
            torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)


@QUICK
@given(st.lists(st.integers(1, 700), min_size=1, max_size=60))
def test_a_plan_holds_every_token_once_with_little_padding(lengths):
    blocks = varlen.plan_blocks(np.array(lengths), CPU)
    tokens = torch.cat([block.tokens for block in blocks])
    assert sorted(tokens.tolist()) == list(range(sum(lengths)))
    for block in blocks:
        assert block.rows * block.length <= varlen.SLACK * len(block.tokens)
        assert block.rows == 1 or block.length <= varlen.LONG
        assert torch.equal(block.gather[block.cells], block.tokens)
        assert (block.padding is None) == (block.rows * block.length == len(block.tokens))


def test_a_plan_is_made_once_a_batch_and_dropped_with_it():
    ends = boundaries([3, 4])
    before = len(varlen._plans)
    assert varlen._plan(ends) is varlen._plan(ends)
    assert len(varlen._plans) == before + 1
    del ends
    gc.collect()
    assert len(varlen._plans) == before


def rows_of(lengths, vocabulary, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(5, vocabulary, length) for length in lengths]


@pytest.fixture(scope="session")
def pair(tiny_model):
    """pair(kind) -> (our model, the stock one with eager attention and without any dropout)."""

    def open_both(kind):
        loaded = load.load_mlm(tiny_model(kind), 0)
        stock = AutoModelForMaskedLM.from_pretrained(tiny_model(kind), attn_implementation="eager").eval()
        if loaded.fresh:
            stock.load_state_dict(loaded.model.state_dict())
        loaded.model.eval()
        return loaded, stock

    made = {}
    return lambda kind: made.setdefault(kind, open_both(kind))


def run(model, inputs, keep):
    """Real tokens' hidden states, and the gradients of a fixed functional of them."""
    model.zero_grad()
    hidden = model.base_model(**inputs).last_hidden_state
    hidden = hidden.reshape(-1, hidden.shape[-1])[keep]
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5))
    (hidden * weights).sum().backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_packed_is_padded(loaded, stock, lengths):
    rows = rows_of(lengths, len(loaded.tokenizer))
    padded = varlen.pad(rows, loaded.tokenizer.pad_token_id)
    packed = varlen.pack(rows, varlen.position_offset(loaded.model))
    mine, my_gradients = run(loaded.model, packed, slice(None))
    theirs, their_gradients = run(stock, padded, padded["attention_mask"].reshape(-1).bool())
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert my_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        gap = (my_gradients[name] - gradient).norm()
        # A key's bias has no influence on a softmax: its gradient is rounding noise, far below 1e-3.
        assert gap <= 1e-4 * gradient.norm() + 2e-4, name


@pytest.mark.parametrize("kind", PACKED)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(lengths=st.lists(st.one_of(st.just(1), st.just(128), st.integers(1, 128)), min_size=1, max_size=8))
@example(lengths=[1, 128, 1, 17, 128, 5])
@example(lengths=[1])
@example(lengths=[110, 128])
def test_padding_free_gives_the_padded_hidden_states_and_gradients(pair, kind, lengths):
    assert_packed_is_padded(*pair(kind), lengths)


@pytest.mark.parametrize("kind", PACKED)
def test_padding_free_is_padded_on_the_mixed_path(pair, kind, monkeypatch):
    monkeypatch.setattr(varlen, "LONG", 20)
    assert_packed_is_padded(*pair(kind), [128, 3, 1, 40, 20, 21, 19])


def test_modernbert_has_local_and_global_layers_and_both_bite(pair, tiny_model):
    """Without windows the states differ, so the equality above says something about them."""
    loaded, _ = pair("modernbert")
    kinds = set(loaded.model.config.layer_types)
    assert kinds == {"sliding_attention", "full_attention"}
    rows = rows_of([60], len(loaded.tokenizer))
    with torch.no_grad():
        near = loaded.model.base_model(**varlen.pack(rows, 0)).last_hidden_state
        with pytest.MonkeyPatch.context() as patch:
            inner = varlen.packed_attention
            patch.setattr(varlen, "packed_attention", lambda *args: inner(*args[:-1], None))
            everywhere = loaded.model.base_model(**varlen.pack(rows, 0)).last_hidden_state
    assert (near - everywhere).abs().max() > 1e-2


def test_a_sequence_does_not_see_its_neighbours(pair):
    loaded, _ = pair("bert")
    first, second, other = rows_of([9, 30, 30], len(loaded.tokenizer))
    with torch.no_grad():
        states = [
            loaded.model.base_model(**varlen.pack([first, mate], 0)).last_hidden_state[0, :9]
            for mate in (second, other)
        ]
    torch.testing.assert_close(*states, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_why_padded(pair, kind):
    loaded, _ = pair(kind)
    assert loaded.padded == varlen.why_padded(loaded.model)
    assert (loaded.padded is None) == (kind in PACKED)
    if loaded.padded:
        assert "packed" in loaded.padded


def test_why_padded_keeps_the_mode_of_the_model(pair):
    loaded, _ = pair("bert")
    loaded.model.train()
    varlen.why_padded(loaded.model)
    assert loaded.model.training
    loaded.model.eval()


def test_what_cannot_be_packed_runs_padded_and_right(pair):
    loaded, stock = pair("mpnet")
    rows = rows_of([1, 70, 12, 128], len(loaded.tokenizer))
    inputs = loaded.collate(rows)
    assert inputs["input_ids"].shape == (4, 128)
    assert inputs["input_ids"][0, 1:].eq(loaded.tokenizer.pad_token_id).all()
    with torch.no_grad():
        together = loaded.model.base_model(**inputs).last_hidden_state
        for number, row in enumerate(rows):
            alone = stock.base_model(input_ids=torch.from_numpy(row)[None]).last_hidden_state[0]
            torch.testing.assert_close(together[number, : len(row)], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "kind, offset", [("bert", 0), ("modernbert", 0), ("distilbert", 0), ("roberta", 2), ("mpnet", 2)]
)
def test_position_offset(pair, kind, offset):
    loaded, _ = pair(kind)
    assert varlen.position_offset(loaded.model) == offset
    # The longest row that the model states it takes does run.
    rows = rows_of([loaded.max_length], len(loaded.tokenizer))
    with torch.no_grad():
        assert torch.isfinite(loaded.model(**loaded.collate(rows)).logits).all()


def test_pack_and_pad_lay_rows_out_as_documented():
    rows = [np.array([7, 8, 9]), np.array([5])]
    packed = varlen.pack(rows, 2)
    assert packed["input_ids"].tolist() == [[7, 8, 9, 5]]
    assert packed["position_ids"].tolist() == [[2, 3, 4, 2]]
    assert packed["cu_seq_lens_q"].tolist() == [0, 3, 4] and packed["cu_seq_lens_q"].dtype == torch.int32
    assert packed["max_length_q"] == packed["max_length_k"] == 3
    padded = varlen.pad(rows, 1)
    assert padded["input_ids"].tolist() == [[7, 8, 9], [5, 1, 1]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_attention_probabilities_are_not_dropped_out(tiny_model):
    loaded = load.load_mlm(tiny_model("bert"), 0)
    assert loaded.config_values == {"attention_probs_dropout_prob": 0.1}
    for module in loaded.model.modules():
        if isinstance(module, torch.nn.Dropout) and module is not None:
            module.p = 0.0
    loaded.model.train()
    rows = rows_of([20, 3], len(loaded.tokenizer))
    with torch.no_grad():
        once, again = (loaded.model(**loaded.collate(rows)).logits for _ in range(2))
        padded, same = (loaded.model(**varlen.pad(rows, 0)).logits for _ in range(2))
    assert torch.equal(once, again) and torch.equal(padded, same)


TEXTS = ["", "ba", "bade fima " * 60, "lora", "kuto bade", "tine " * 20]


@pytest.mark.parametrize("kind", KINDS)
def test_a_flattened_sentence_transformer_encodes_as_before(tiny_model, kind):
    plain = SentenceTransformer(str(tiny_model(kind)), device="cpu", local_files_only=True)
    before = plain.encode(TEXTS)
    reason = varlen.flatten(plain[0])
    assert (reason is None) == (kind in PACKED)
    seen = []
    hook = plain[0].model.register_forward_pre_hook(lambda m, a, kw: seen.append(kw), with_kwargs=True)
    after = plain.encode(TEXTS)
    hook.remove()
    np.testing.assert_allclose(after, before, atol=1e-5)
    assert all(("cu_seq_lens_q" in kwargs) == (reason is None) for kwargs in seen)


def test_registering_twice_does_no_harm(tiny_model):
    varlen.register()
    varlen.register()
    assert load.load_mlm(tiny_model("bert"), 0).padded is None


@pytest.mark.parametrize("more", [1, 5, 200])
@pytest.mark.parametrize("kind", PACKED)
def test_rows_beyond_the_tokens_change_nothing(pair, kind, more, monkeypatch):
    """As on a GPU, where the number of tokens is rounded up inside of the encoder."""
    monkeypatch.setattr(rounded, "beyond", lambda tokens, device: more)
    loaded, stock = pair(kind)
    assert_packed_is_padded(loaded, stock, [17, 3, 1, 40])
    computed = []
    layer = loaded.model.base_model.get_submodule("embeddings")
    hook = layer.register_forward_hook(lambda module, inputs, output: computed.append(output.shape[1]))
    packed = varlen.pack(rows_of([17, 3], len(loaded.tokenizer)), varlen.position_offset(loaded.model))
    with torch.no_grad():
        states = loaded.model.base_model(**packed, output_hidden_states=True).hidden_states
        logits = loaded.model(**packed).logits  # whatever way the stock head calls its backbone
    hook.remove()
    assert computed == [20 + more] * 2 and logits.shape[1] == 20 and {s.shape[1] for s in states} == {20}


def test_rows_beyond_the_tokens_reach_sentence_transformers_and_copies(tiny_model, monkeypatch):
    """They call `forward` of the encoder, and not the encoder."""
    model, padded = load_embedder(tiny_model("minilm"))
    computed = []
    model[0].model.embeddings.register_forward_hook(lambda module, inputs, output: computed.append(output.shape[1]))
    before = model.encode(TEXTS)
    monkeypatch.setattr(rounded, "beyond", lambda tokens, device: 9)
    np.testing.assert_allclose(model.encode(TEXTS), before, atol=1e-5)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model[0].model.parameters():
            weight.zero_()
    np.testing.assert_allclose(other.encode(TEXTS), before, atol=1e-5)
    assert padded is None and computed[1:] == [computed[0] + 9] * 2


@QUICK
@given(st.lists(st.integers(1, 40), min_size=1, max_size=14), st.none() | st.integers(1, 9))
def test_the_larger_blocks_of_a_gpu_are_dense_attention(lengths, window):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(varlen.CELLS, "cpu", varlen.CELLS["cuda"])
        for mine, theirs in zip(*both_ways(lengths, window)):
            torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)


def test_the_shapes_of_a_training_on_a_gpu_are_few():
    gpu = torch.device("cuda")
    for tokens in (1, 7, 8, 9, 63, 65, 100, 1000, 19_365, 39_062, 131_072):
        more = rounded.beyond(tokens, gpu)
        assert 0 <= more <= max(7, tokens / 32) and (tokens + more) % 8 == 0
        assert rounded.beyond(tokens + more, gpu) == 0 and rounded.beyond(tokens, torch.device("cpu")) == 0
    assert len({n + rounded.beyond(n, gpu) for n in range(16_384, 32_768)}) <= 33


@pytest.mark.parametrize("more", [0, 3])
def test_what_is_given_by_place_goes_where_it_went(tiny_model, monkeypatch, more):
    monkeypatch.setattr(rounded, "beyond", lambda tokens, device: more)
    loaded = load.load_mlm(tiny_model("bert"), 0)
    rows = varlen.pad(rows_of([5, 3], len(loaded.tokenizer)), 0)
    backbone = loaded.model.base_model
    with torch.no_grad():
        named, placed = backbone(**rows), backbone(rows["input_ids"], rows["attention_mask"])
        one = backbone(rows["input_ids"], rows["attention_mask"], None).last_hidden_state
    assert torch.equal(named.last_hidden_state, placed.last_hidden_state) and torch.equal(one, placed.last_hidden_state)
