import numpy as np
import pytest

pytest.importorskip("fastapi")

from embedtune.errors import UserError  # noqa: E402
from embedtune.serve.batcher import Answer, BadIds, Given, NotFinite  # noqa: E402
from embedtune.serve.model import open_served  # noqa: E402

TEXTS = ["bade fima", "lora", "bade " * 30, "fima lora bade", "x"]


@pytest.fixture
def served(tiny_model):
    return open_served(str(tiny_model("bert")), "fp32", 64)


def test_answers_are_those_of_stock_encode_whoever_shares_the_batch(served):
    from sentence_transformers import SentenceTransformer

    stock = SentenceTransformer(served.name).encode(TEXTS)
    answers = served.compute([Given(text) for text in TEXTS])
    assert np.allclose([answer.vector for answer in answers], stock, atol=1e-6)
    for text, vector in zip(TEXTS, stock, strict=True):
        assert np.allclose(served.compute([Given(text)])[0].vector, vector, atol=1e-6)


def test_token_ids_and_texts_and_prompts_share_a_batch(served):
    tokenizer = served.encoder.model.tokenizer
    rows = [tuple(tokenizer(text)["input_ids"][: served.max_length]) for text in TEXTS]
    mixed = [Given(TEXTS[0]), Given(rows[1]), Given(TEXTS[3], "lora "), Given(rows[0])]
    first, ids, prompted, same = served.compute(mixed)
    assert np.allclose(first.vector, same.vector, atol=1e-6) and first.tokens == same.tokens == len(rows[0])
    assert np.allclose(ids.vector, served.compute([Given(TEXTS[1])])[0].vector, atol=1e-6)
    assert np.allclose(prompted.vector, served.compute([Given("lora " + TEXTS[3])])[0].vector, atol=1e-6)


def test_what_is_wrong_with_one_is_its_own(served):
    size = len(served.encoder.model.tokenizer)
    answers = served.compute([Given("bade"), Given((size,)), Given("lora")])
    assert [type(answer) for answer in answers] == [Answer, BadIds, Answer]
    long = served.compute([Given("bade " * 600), Given(tuple([5] * 600))])
    assert [answer.cut for answer in long] == [True, True] and {a.tokens for a in long} == {served.max_length}


def test_nan_is_found(served):
    import torch

    with torch.no_grad():
        served.encoder.model[0].model.embeddings.word_embeddings.weight[7] = float("nan")
    answers = served.compute([Given((5, 6)), Given((5, 7))])
    assert [type(answer) for answer in answers] == [Answer, NotFinite]


def test_hosted_models_are_not_served_again(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with pytest.raises(UserError):
        open_served("openai:text-embedding-3-small", "fp32", 64)
