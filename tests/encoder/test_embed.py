from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from conftest import corpus
from embedtune.encoder.embed import batches, embed
from embedtune.encoder.embedder import load_embedder
from embedtune.encoder.varlen import flatten
from embedtune.errors import UserError

LIMIT = 16
WORDS = [f"w{i}" for i in range(50)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A two-layer BERT with a word tokenizer: one word is one token."""
    path = tmp_path_factory.mktemp("tiny")
    names = ["PAD", "UNK", "CLS", "SEP", "MASK"]
    vocabulary = {t: i for i, t in enumerate([*(f"[{n}]" for n in names), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {f"{n.lower()}_token": f"[{n}]" for n in names}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LIMIT, **special)
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model(folder):
    return SentenceTransformer(modules=[Transformer(folder), Pooling(32), Normalize()], device="cpu")


def texts(n=300, longest=24, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(0, longest + 1))) for _ in range(n)]


def gathered(blocks):
    blocks = list(blocks)
    return np.concatenate([b.vectors for b in blocks]), np.concatenate([b.tokens for b in blocks]), blocks


@pytest.mark.parametrize("max_tokens, window", [(8192, 2048), (64, 50), (1, 7)])
def test_equals_encode_in_order_with_tokens_and_truncation_counted(model, max_tokens, window):
    data = texts()
    vectors, tokens, blocks = gathered(embed(model, iter(data), max_tokens=max_tokens, window=window))
    full = np.array([len(text.split()) + 2 for text in data])
    assert vectors.dtype == np.float32 and tokens.dtype == np.int64
    np.testing.assert_allclose(vectors, model.encode(data), atol=1e-5)
    np.testing.assert_array_equal(tokens, np.minimum(full, LIMIT))
    assert sum(b.truncated for b in blocks) == (full > LIMIT).sum() > 0
    assert [len(b.vectors) for b in blocks[:-1]] == [window] * (len(blocks) - 1)


def test_a_padding_free_model_gives_the_same(folder, model):
    packed = SentenceTransformer(modules=[Transformer(folder), Pooling(32), Normalize()], device="cpu")
    assert flatten(packed[0]) is None
    data = texts()
    expected = gathered(embed(model, data))
    vectors, tokens, blocks = gathered(embed(packed, data, max_tokens=100, window=128))
    np.testing.assert_allclose(vectors, expected[0], atol=1e-5)
    np.testing.assert_array_equal(tokens, expected[1])
    assert sum(b.truncated for b in blocks) == sum(b.truncated for b in expected[2])


def test_the_stream_is_read_at_most_a_window_ahead(model):
    read = []
    blocks = embed(model, (read.append(t) or t for t in texts(100)), window=10)
    for number, _ in enumerate(blocks, 1):
        assert len(read) == min(10 * (number + 1), 100)


def test_default_prompt_and_truncated_dimensions_are_those_of_encode(folder):
    model = SentenceTransformer(
        modules=[Transformer(folder), Pooling(32)],
        prompts={"query": "w1 w2 "},
        default_prompt_name="query",
        truncate_dim=8,
        device="cpu",
    )
    data = texts(20, longest=5)
    vectors, tokens, _ = gathered(embed(model, data))
    assert vectors.shape == (20, 8)
    np.testing.assert_allclose(vectors, model.encode(data), atol=1e-5)
    np.testing.assert_array_equal(tokens, [len(text.split()) + 4 for text in data])


@pytest.mark.parametrize("kind", ["minilm", "modernbert", "mpnet"])
def test_bf16_is_near_and_pools_in_float32(tiny_model, kind):
    exact, _ = load_embedder(tiny_model(kind))
    half, _ = load_embedder(tiny_model(kind), "bf16")
    data = corpus(120).split("\n")
    wanted, vectors = (gathered(embed(model, data))[0] for model in (exact, half))
    assert vectors.dtype == np.float32 and half[0].model.dtype == torch.bfloat16
    if kind != "minilm":  # which scales them
        assert (torch.from_numpy(vectors).bfloat16().float().numpy() != vectors).any()
    cosines = (wanted * vectors).sum(1) / np.linalg.norm(wanted, axis=1) / np.linalg.norm(vectors, axis=1)
    assert 0.999 < cosines.min() < 1


@pytest.mark.parametrize("kind", ["minilm", "modernbert"])
def test_products_by_onednn_are_used_and_give_the_stock_vectors(tiny_model, kind, monkeypatch):
    stock = SentenceTransformer(str(tiny_model(kind)), device="cpu", local_files_only=True)
    made, _ = load_embedder(tiny_model(kind))
    assert all(type(m) is not nn.Linear or isinstance(m.forward, partial) for m in made[0].model.modules())
    data = corpus(60).split("\n")
    wanted = stock.encode(data)
    np.testing.assert_allclose(gathered(embed(made, data))[0], wanted, atol=1e-6 * np.abs(wanted).max())
    features = made.preprocess(data[:3])
    assert made(features)["sentence_embedding"].requires_grad  # outside of inference nothing has changed


def test_one_row_is_computed_as_among_others(tiny_model):
    """By oneDNN; a row alone takes another way through it, and its sums are others in the last places."""
    layer = next(m for m in load_embedder(tiny_model("bert"))[0].modules() if type(m) is nn.Linear)
    rows = torch.randn(1, 9, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for row in rows[0]:
            two, one, alone = layer(torch.stack([row, row])), layer(row[None, None]), layer(row)
            assert torch.equal(one[0, 0], two[0]) and torch.equal(alone, two[0])
            assert one.shape == (1, 1, layer.out_features) and alone.shape == (layer.out_features,)


def test_the_model_is_left_as_it_was(model):
    model.train()
    gathered(embed(model, texts(30)))
    assert model.training
    model.eval()


def test_prompts_that_pooling_leaves_out(folder):
    model = SentenceTransformer(modules=[Transformer(folder), Pooling(32, include_prompt=False)], device="cpu")
    packed = SentenceTransformer(modules=[Transformer(folder), Pooling(32, include_prompt=False)], device="cpu")
    assert flatten(packed[0]) is None
    data, prompt = texts(40, longest=20), "w1 w2 w3 "
    wanted = model.encode(data, prompt=prompt)
    for each in (model, packed):
        np.testing.assert_allclose(gathered(embed(each, data, prompt=prompt))[0], wanted, atol=1e-5)


def test_nothing_in_nothing_out_and_a_number_is_no_text(model):
    assert list(embed(model, [])) == []
    with pytest.raises(UserError, match="text 12"):
        list(embed(model, ["w1"] * 12 + [7], window=5))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 200), st.booleans())
def test_batches_cover_everything_once_under_the_budget(sizes, budget, padded):
    sizes = np.sort(np.array(sizes, dtype=np.int64))[::-1]
    runs = list(batches(sizes, budget, padded=padded))
    assert [i for run in runs for i in range(run.start, run.stop)] == list(range(len(sizes)))
    for run in runs:
        part = sizes[run]
        cost = len(part) * part[0] if padded else part.sum()
        assert cost <= budget or len(part) == 1
