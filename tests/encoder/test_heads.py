"""Stock heads on packed rows: the same logits as the stock model gives on padded ones."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from conftest import KINDS
from embedtune import UserError
from embedtune.data.tokens import tokenize_texts
from embedtune.data.words import word_rows
from embedtune.encoder import averaging, heads, load

NAMES = ("bad", "good", "so so")
PAIRS = [
    ("ba bo be", "du da"),
    ("da", "ba bo be du da ba"),
    ("lo li la " * 9, "mi mo"),
    ("ta", "ta"),
    ("be " * 140, "ko " * 90),
]


def spread(loaded):
    """Fresh heads are so small that mistakes would not show."""
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if name in set(heads.parameters(loaded)):
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    loaded.model.eval()
    return loaded


def stock(loaded, texts):
    """Logits of the stock forward on what the stock tokenizer makes of the texts, padded."""
    features = loaded.tokenizer(
        *texts, padding=True, truncation=True, max_length=loaded.max_length, return_tensors="pt"
    )
    if loaded.model.config.model_type in ("distilbert", "roberta", "mpnet", "modernbert"):
        features.pop("token_type_ids", None)
    with torch.no_grad():
        return loaded.model(**features).logits, features


def packed(tokens, loaded):
    rows = [tokens.row(n) for n in range(len(tokens))]
    if tokens.types is None or not heads.tells_texts_apart(loaded):
        return rows, None
    return rows, [tokens.types_of(n) for n in range(len(tokens))]


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_rows_are_those_of_the_padded_stock_model(tiny_model, tmp_path, kind, pairs):
    loaded = spread(heads.load_head(tiny_model(kind), heads.SEQUENCE, 0, NAMES, "single_label_classification"))
    if kind in ("bert", "minilm"):  # as BERT's own tokenizers do
        loaded.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        with torch.no_grad():
            loaded.model.base_model.embeddings.token_type_embeddings.weight[1] += 1
    given = [(a, b if pairs else None) for a, b in PAIRS]
    tokens = tokenize_texts(given, loaded.tokenizer, loaded.max_length, tmp_path / "t")
    wanted, features = stock(loaded, tuple(map(list, zip(*PAIRS))) if pairs else ([a for a, _ in PAIRS],))
    assert [tokens.row(n).tolist() for n in range(len(tokens))] == [
        ids[mask == 1].tolist() for ids, mask in zip(features["input_ids"], features["attention_mask"])
    ], "tokens as the stock tokenizer joins and cuts them"
    assert tokens.chunked == sum(len(row) == loaded.max_length for row in map(tokens.row, range(len(tokens)))) > 0
    if pairs and kind in ("bert", "minilm"):
        assert features["token_type_ids"].any() and any(tokens.types_of(n).any() for n in range(len(tokens)))
    with torch.no_grad():
        found = heads.row_logits(loaded, *packed(tokens, loaded))
    assert (loaded.padded is not None) == (kind == "mpnet")
    assert wanted.std() > 0.05
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_modernbert_pools_as_it_is_told(tiny_model, tmp_path):
    found = {}
    for pooling in ("cls", "mean"):
        loaded = heads.load_head(tiny_model("modernbert"), heads.SEQUENCE, 0, NAMES, pooling=pooling)
        tokens = tokenize_texts(PAIRS, spread(loaded).tokenizer, 128, tmp_path / pooling)
        with torch.no_grad():
            found[pooling] = heads.row_logits(loaded, *packed(tokens, loaded))
        torch.testing.assert_close(
            found[pooling], stock(loaded, tuple(map(list, zip(*PAIRS))))[0], atol=1e-5, rtol=1e-5
        )
    assert (found["cls"] - found["mean"]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_words_are_those_of_the_padded_stock_model(tiny_model, kind):
    loaded = spread(heads.load_head(tiny_model(kind), heads.TOKEN, 0, NAMES))
    sentences = [text.split() for pair in PAIRS[:4] for text in pair]
    found = word_rows(sentences, loaded.tokenizer, loaded.max_length)
    starts = np.cumsum([len(row) for row in found.rows]) - [len(row) for row in found.rows]
    flat = np.concatenate([first + start for first, start in zip(found.first, starts)])
    with torch.no_grad():
        ours = heads.token_logits(loaded, found.rows, flat)
        theirs = []
        for row, first in zip(found.rows, found.first):
            ids = torch.from_numpy(row)[None]
            theirs.append(loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0][first])
    torch.testing.assert_close(ours, torch.cat(theirs), atol=1e-5, rtol=1e-5)
    assert len(ours) == sum(map(len, sentences))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folders_open_in_stock_code(tiny_model, tmp_path, kind):
    for what, auto in (
        (heads.SEQUENCE, AutoModelForSequenceClassification),
        (heads.TOKEN, AutoModelForTokenClassification),
    ):
        loaded = spread(heads.load_head(tiny_model(kind), what, 0, NAMES))
        folder = tmp_path / what
        folder.mkdir()
        heads.save_head(loaded, folder)
        model, info = auto.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"]
        assert model.config.id2label == dict(enumerate(NAMES))
        again, found = heads.open_head(folder)
        assert found == what and again.model.config.label2id == {name: n for n, name in enumerate(NAMES)}
        ids = torch.tensor([[2, 9, 8, 7, 3]])
        with torch.no_grad():
            one, other = (
                m.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for m in (model, again.model)
            )
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_what_cannot_be_done_is_said(tiny_model, tmp_path):
    with pytest.raises(UserError, match="reads the first token .cls.; it cannot pool by mean"):
        heads.load_head(tiny_model("distilbert"), heads.SEQUENCE, 0, NAMES, pooling="mean")
    with pytest.raises(UserError, match="has no head for labels"):
        heads.open_head(tiny_model("bert"))


def test_a_head_for_other_labels_is_made_anew_and_the_encoder_kept(tiny_model, tmp_path):
    first = spread(heads.load_head(tiny_model("bert"), heads.SEQUENCE, 0, NAMES))
    folder = tmp_path / "m"
    folder.mkdir()
    heads.save_head(first, folder)
    second = heads.load_head(folder, heads.SEQUENCE, 0, ("a", "b"))
    assert second.model.classifier.weight.shape == (2, 32) and "classifier.weight" in second.fresh
    for name, weight in first.model.bert.state_dict().items():
        torch.testing.assert_close(second.model.bert.state_dict()[name], weight)


def test_lora_adds_nothing_at_first_and_merges_into_stock_weights(tiny_model, tmp_path):
    pytest.importorskip("peft")
    loaded = spread(heads.load_head(tiny_model("bert"), heads.SEQUENCE, 0, NAMES))
    rows = [np.array([2, 9, 8, 3]), np.array([2, 7, 3])]
    with torch.no_grad():
        before = heads.row_logits(loaded, rows)
        assert heads.add_lora(loaded, 4, seed=1) == 12
        torch.testing.assert_close(heads.row_logits(loaded, rows), before, atol=1e-6, rtol=1e-6)
        for name, parameter in loaded.model.named_parameters():
            if ".lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        adapted = heads.row_logits(loaded, rows)
    assert (adapted - before).abs().max() > 0.05
    folder = tmp_path / "m"
    folder.mkdir()
    heads.save_head(loaded, folder)
    stock_model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        found = [stock_model.eval()(input_ids=torch.from_numpy(row)[None]).logits[0] for row in rows]
    torch.testing.assert_close(torch.stack(found), adapted, atol=1e-5, rtol=1e-5)
    assert load.check_folder(folder)["architectures"] == ["BertForSequenceClassification"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_that_gives_the_logits_is_found_where_it_is_fresh(tiny_model, tmp_path, kind):
    """Also where a layer of the encoder has as many outputs as there are classes."""
    names = [f"c{n}" for n in range(load.open_config(tiny_model(kind)).hidden_size)]
    loaded = heads.load_head(tiny_model(kind), heads.SEQUENCE, 0, names, "single_label_classification")
    layer = heads.fresh_layer(loaded)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.arange(len(names)))
        logits = heads.row_logits(loaded, [np.array([2, 5, 3])])
    assert logits[0].tolist() == list(range(len(names)))
    (tmp_path / "saved").mkdir()
    heads.save_head(loaded, tmp_path / "saved")
    again = heads.load_head(tmp_path / "saved", heads.SEQUENCE, 0, names, "single_label_classification")
    assert heads.fresh_layer(again) is None


# ---- the mean for heads that read the first token


@pytest.mark.parametrize("kind", ["minilm", "roberta"])
def test_a_layer_more_lets_the_first_token_mean_all(tiny_model, kind):
    folder = tiny_model(kind)
    plain = heads.load_head(folder, heads.SEQUENCE, 0, NAMES)
    loaded = heads.load_head(folder, heads.SEQUENCE, 0, NAMES, pooling="mean")
    loaded.model.eval(), plain.model.eval()
    assert len(loaded.model.base_model.encoder.layer) == len(plain.model.base_model.encoder.layer) + 1
    features = loaded.tokenizer(
        [a for a, _ in PAIRS], padding=True, truncation=True, max_length=128, return_tensors="pt"
    )
    features.pop("token_type_ids", None)
    with torch.no_grad():
        states = plain.model.base_model(**features).last_hidden_state
        mask = features["attention_mask"][..., None]
        mean = torch.nn.functional.layer_norm((states * mask).sum(1) / mask.sum(1), states.shape[-1:])
        first = loaded.model.base_model(**features).last_hidden_state[:, 0]
    torch.testing.assert_close(first, mean, atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", ["minilm", "roberta"])
def test_the_layer_that_means_is_stock_code(tiny_model, tmp_path, kind):
    loaded = spread(heads.load_head(tiny_model(kind), heads.SEQUENCE, 0, NAMES, pooling="mean"))
    layer = averaging.layer_of(loaded.model)
    with torch.no_grad():  # as after training: nothing of it is still the identity but queries and keys, still zero
        for name, parameter in layer.named_parameters():
            if "query" not in name and "key" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    texts = [a for a, _ in PAIRS]
    wanted, features = stock(loaded, [texts])
    tokens = tokenize_texts(((a, None) for a in texts), loaded.tokenizer, loaded.max_length, tmp_path / "texts")
    rows, types = packed(tokens, loaded)
    with torch.no_grad():
        torch.testing.assert_close(heads.row_logits(loaded, rows, types), wanted, atol=1e-4, rtol=1e-4)
    (tmp_path / "saved").mkdir()
    heads.save_head(loaded, tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    opened, kind_of = heads.open_head(tmp_path / "saved")
    opened.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**features).logits, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(heads.row_logits(opened, rows, types), wanted, atol=1e-4, rtol=1e-4)
    assert kind_of == heads.SEQUENCE and heads.usual_pooling(tmp_path / "saved") is None


def test_queries_and_keys_of_the_layer_that_means_learn_nothing(tiny_model):
    loaded = heads.load_head(tiny_model("minilm"), heads.SEQUENCE, 0, NAMES, pooling="mean")
    layer = averaging.layer_of(loaded.model)
    features = loaded.tokenizer(["ba bo be", "du da"], return_tensors="pt", padding=True)
    loaded.model(**features, labels=torch.tensor([0, 1])).loss.backward()
    for part in (layer.attention.self.query, layer.attention.self.key):
        assert not part.weight.grad.any() and not part.bias.grad.any()
    assert layer.attention.self.value.weight.grad.any() and layer.output.dense.weight.grad.any()


def test_the_mean_is_usual_where_the_folder_says_that_its_vectors_are_means(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("minilm"), tmp_path / "model")
    for settings, wanted in (
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "cls"}, None),
        (None, None),
    ):
        shutil.rmtree(folder / "1_Pooling", ignore_errors=True)
        if settings:
            (folder / "1_Pooling").mkdir()
            (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
        assert heads.usual_pooling(folder) == wanted


@pytest.mark.parametrize("opener", [lambda folder: heads.load_head(folder, heads.TOKEN, 0, NAMES),
                                    lambda folder: load.load_mlm(folder, 0)], ids=["tags", "mlm"])  # fmt: skip
def test_tasks_of_single_tokens_take_the_layer_that_means_away(tiny_model, tmp_path, opener):
    folder = tiny_model("minilm")
    heads.save_head(heads.load_head(folder, heads.SEQUENCE, 0, NAMES, pooling="mean"), tmp_path)
    opened, plain = opener(tmp_path), opener(folder)
    assert opened.model.config.num_hidden_layers == plain.model.config.num_hidden_layers
    assert averaging.layer_of(opened.model) is None
    row = {"input_ids": torch.tensor([[2, 5, 6, 7, 3]])}
    with torch.no_grad():
        ours, wanted = (each.model.eval().base_model(**row).last_hidden_state for each in (opened, plain))
    torch.testing.assert_close(ours, wanted)
