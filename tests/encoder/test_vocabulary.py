import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

from conftest import tiny_tokenizer, tokenizer_text
from embedtune.data import vocabulary
from embedtune.data.read import Row
from embedtune.encoder import load
from embedtune.encoder.vocabulary import add_words, continuations


@pytest.fixture
def loaded(tiny_model):
    return load.load_mlm(tiny_model("bert"), 0)


WORDS = ["zuzazebi", "kikofuma"]


def test_a_new_word_is_one_token_that_starts_as_the_mean_of_its_pieces(loaded):
    tokenizer, model = loaded.tokenizer, loaded.model
    weight, bias = (
        model.get_input_embeddings().weight.detach().clone(),
        model.get_output_embeddings().bias.detach().clone(),
    )
    pieces = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in WORDS]
    assert all(len(p) > 1 for p in pieces)
    assert add_words(loaded, [*WORDS, "[MASK]", WORDS[0]]) == 2
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 202
    new = model.get_input_embeddings().weight
    for word, old in zip(WORDS, pieces):
        (row,) = tokenizer(word, add_special_tokens=False)["input_ids"]
        torch.testing.assert_close(new[row], weight[old].mean(0))
        torch.testing.assert_close(model.get_output_embeddings().bias[row], bias[old].mean())
    assert torch.equal(new[:200], weight)
    assert model.get_output_embeddings().weight is new


def test_other_text_is_split_as_before_and_special_tokens_stay(loaded):
    texts = tokenizer_text().splitlines()[:40]
    before = [loaded.tokenizer(text)["input_ids"] for text in texts]
    add_words(loaded, WORDS)
    assert [loaded.tokenizer(text)["input_ids"] for text in texts] == before
    assert loaded.tokenizer("ZUZAZEBI, [MASK]!")["input_ids"][1] == 200  # normalised like any word
    assert loaded.tokenizer.mask_token_id in loaded.tokenizer("ba [MASK]")["input_ids"]


def test_a_grown_model_saves_and_opens_in_stock_code(loaded, tmp_path):
    add_words(loaded, WORDS)
    load.save(loaded, tmp_path)
    stock, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert stock.config.vocab_size == 202 == len(AutoTokenizer.from_pretrained(tmp_path))
    again = load.load_mlm(tmp_path, 0)
    inputs = again.tokenizer("ba zuzazebi", return_tensors="pt")
    loaded.model.eval(), stock.eval()
    with torch.no_grad():
        packed = loaded.model(**loaded.collate([inputs["input_ids"][0].numpy()])).logits
        torch.testing.assert_close(stock(**inputs).logits, packed, atol=1e-5, rtol=1e-5)


def test_nothing_to_add_changes_nothing(loaded):
    before = loaded.model.get_input_embeddings().weight
    assert add_words(loaded, ["[MASK]"]) == 0
    assert loaded.model.get_input_embeddings().weight.shape == before.shape


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ("[A] un ##able ▁cat Ġcat", [0, 0, 1, 0, 0]),
        ("<s> Ġun able Ġcat", [1, 0, 1, 0]),
        ("<s> ▁un able ▁cat", [1, 0, 1, 0]),
        ("un able cat", [0, 0, 0]),
        ("Ġun " + "able " * 19, [0] * 20),
    ],
    ids=["wordpiece", "bytes", "sentencepiece", "nothing marked", "a mark too rare to be one"],
)
def test_which_tokens_continue_a_word(pieces, expected):
    assert continuations(pieces.split()).tolist() == [bool(each) for each in expected]


def byte_level_tokenizer():
    backend = Tokenizer(models.BPE(unk_token="[UNK]"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    backend.train_from_iterator(tokenizer_text().splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]")


def test_a_vocabulary_of_bytes_gets_whole_word_tokens(loaded):
    loaded.tokenizer = byte_level_tokenizer()
    loaded.model.resize_token_embeddings(len(loaded.tokenizer), mean_resizing=False)
    old = len(loaded.tokenizer)
    inside = loaded.tokenizer("xzuzazebix", add_special_tokens=False)["input_ids"]
    assert add_words(loaded, WORDS) == 2
    assert old in loaded.tokenizer("ba zuzazebi ba", add_special_tokens=False)["input_ids"]
    assert loaded.tokenizer("xzuzazebix", add_special_tokens=False)["input_ids"] == inside


def rows_of(*texts):
    return [Row({"text": text}, "x", n, n) for n, text in enumerate(texts)]


def test_words_that_shatter_are_found_by_what_they_cost():
    tokenizer = tiny_tokenizer()
    text = "zuzazebi " * 6 + "kikofuma " * 20 + "rare" * 1 + " x1y2z3w4 " * 9 + " ba " * 50 + "zuzu " * 4
    words = vocabulary.count_words(rows_of(text, text), tokenizer)
    assert words.counts["zuzazebi"] == 12 and words.counts["ba"] == 100 and words.forgotten == 0
    found = vocabulary.shattered(words, tokenizer, 10)
    assert found[:1] == ["kikofuma"] and "zuzazebi" in found
    assert not {"ba", "x1y2z3w4", "rare"} & set(found)
    assert vocabulary.shattered(words, tokenizer, 1) == ["kikofuma"]


def test_a_new_word_lowers_the_pieces_per_word(loaded):
    words = vocabulary.count_words(rows_of("zuzazebi kikofuma"), loaded.tokenizer)
    before = vocabulary.pieces_per_word(words, loaded.tokenizer)
    add_words(loaded, WORDS)
    assert vocabulary.pieces_per_word(words, loaded.tokenizer) == 1.0 < before


def test_counting_forgets_the_rarest_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(vocabulary, "MOST_WORDS", 10)
    texts = [f"ba ba word{n}" for n in range(60)]
    words = vocabulary.count_words(rows_of(*texts), tiny_tokenizer())
    assert words.counts["ba"] == 120 and len(words.counts) <= 21 and words.forgotten == 61 - len(words.counts)


def test_what_tokenizer_json_says_of_padding_and_cutting_does_not_count(loaded):
    rows = [Row({"text": "ba zuzazebi ba kikofuma ba"}, "t", number, 0) for number in range(9)]
    words = vocabulary.count_words(rows, loaded.tokenizer)

    def measured():
        return vocabulary.pieces_per_word(words, loaded.tokenizer), vocabulary.shattered(words, loaded.tokenizer, 9)

    expected = measured()
    loaded.tokenizer.backend_tokenizer.enable_padding(length=128)
    loaded.tokenizer.backend_tokenizer.enable_truncation(1)
    assert measured() == expected
    assert 1 < expected[0] < 10 and set(expected[1]) <= {"zuzazebi", "kikofuma"}
