"""New texts by models: tiny ones, with random weights; what is sampled, what stays, and what is refused."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch

from conftest import corpus
from embedtune import keyed
from embedtune.data import augment
from embedtune.data.augment import KINDS, SAME, Augmenting, Made, chosen, core_spans
from embedtune.data.clean import text_hash
from embedtune.encoder import calls
from embedtune.enrich import rewrite
from embedtune.enrich.ask import GIVE_UP, Bill, Chat
from embedtune.enrich.rewrite import FEWER, MOVED, NO_REWRITE, REFUSED, TOP
from embedtune.errors import UserError
from service import serve

TEXTS = [
    f"{line.capitalize()}, ({line.upper()})  1999!\n{line}"
    for line in corpus(400, seed=3).splitlines()
    if line.count(" ") > 4
][:24]
KEY = "sk-test-0123456789abcdefSECRET"


def marks(text):
    """What stands between the words."""
    return re.split(r"[^\W\d_]+", text)


# ---- words that a masked language model guesses


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "mpnet"])
def test_guessed_words_stand_where_words_stood(tiny_model, kind):
    how = Augmenting(kinds=("contextual",), copies=2, rate=0.2)
    make = rewrite.contextual(str(tiny_model(kind)), how)
    made = make(TEXTS)
    assert sum(len(each.texts) for each in made) > 40
    for text, each in zip(TEXTS, made):
        assert len(each.texts) + len(each.missing) == 2
        for new in each.texts:
            assert marks(new) == marks(text)
            old, now = (re.findall(r"[^\W\d_]+", each) for each in (text, new))
            changed = [(a, b) for a, b in zip(old, now) if a != b]
            assert len(changed) == max(1, round(0.2 * len(text.split())))
            for a, b in changed:
                assert a.casefold() != b.casefold() and a[0].isupper() == b[0].isupper()
                assert not (len(a) > 1 and a.isupper()) or b.isupper()


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_a_text_gives_the_same_alone_and_among_others(tiny_model, kind, monkeypatch):
    how = Augmenting(kinds=("contextual",), copies=2, rate=0.2, seed=3)
    make = rewrite.contextual(str(tiny_model(kind)), how)
    every = make(TEXTS)
    assert make(TEXTS[::-1]) == every[::-1] and [make([text])[0] for text in TEXTS[:6]] == every[:6]
    monkeypatch.setattr(rewrite, "MOST_TOKENS", 100)
    assert make(TEXTS) == every
    other = rewrite.contextual(str(tiny_model(kind)), Augmenting(kinds=("contextual",), copies=2, rate=0.2, seed=4))
    assert other(TEXTS) != every


def test_a_guess_is_one_of_the_likeliest_words_of_the_stock_model(tiny_model):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    folder = tiny_model("bert")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    words = {n: piece for piece, n in tokenizer.get_vocab().items() if piece.isalpha()}
    how = Augmenting(kinds=("contextual",), copies=6, rate=0.01)
    line = next(line for line in corpus(50).splitlines() if line.count(" ") > 5)
    (made,) = rewrite.contextual(str(folder), how)([line])
    assert len(made.texts) > 3
    for new in made.texts:
        ((place, old, guess),) = [(n, a, b) for n, (a, b) in enumerate(zip(line.split(), new.split())) if a != b]
        masked = " ".join("[MASK]" if n == place else word for n, word in enumerate(line.split()))
        inputs = tokenizer(masked, return_tensors="pt")
        (at,) = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()
        logits = model(**inputs).logits[0, at[0]]
        best = [words[n] for n in logits.argsort(descending=True).tolist() if words.get(n, old) != old]
        assert guess in best[:TOP]


def test_words_beyond_what_the_model_reads_stay(tiny_model):
    head, tail = " ".join(corpus(12).split()[:40]), " ".join(["kilo"] * 400)
    how = Augmenting(kinds=("contextual",), copies=2, rate=1.0)
    (made,) = rewrite.contextual(str(tiny_model("bert")), how)([f"{head} {tail}"])
    assert len(made.texts) == 2
    for new in made.texts:
        words = new.split()
        changed = [n for n, (a, b) in enumerate(zip(f"{head} {tail}".split(), words)) if a != b]
        assert changed and changed[-1] < 126 and len(words) == 440


def test_a_text_without_words_gives_none(tiny_model):
    make = rewrite.contextual(str(tiny_model("bert")), Augmenting(kinds=("contextual",)))
    assert make(["12 : 30", "..."]) == [Made((), ("no word that can be masked",) * 2)] * 2 and make([]) == []


def test_a_model_without_a_head_cannot_guess(tiny_model):
    with pytest.raises(UserError, match="has no masked-language head"):
        rewrite.contextual(str(tiny_model("minilm")), Augmenting())


def test_whole_words_of_every_kind_of_vocabulary():
    class Pieces:
        all_special_ids = (0,)

        def __init__(self, *pieces):
            self.pieces = pieces

        def __len__(self):
            return len(self.pieces)

        def convert_ids_to_tokens(self, ids):
            return [self.pieces[n] for n in ids]

        def decode(self, ids):
            return self.pieces[ids[0]].replace("Ġ", " ").replace("▁", " ")

    find = rewrite._whole_words
    assert find(Pieces("[A]", "film", "##s", ",", "Film")) == ["", "film", "", "", "Film"]
    assert find(Pieces("<s>", "Ġfilm", "s", "Ġ,", "Ġ7")) == ["", "film", "", "", ""]
    assert find(Pieces("s", "▁film", "s")) == ["", "film", ""] and find(Pieces("s", "film", "s")) == ["", "film", "s"]


# ---- sampling


def test_keyed_samples_follow_the_softmax_of_the_likeliest():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 2
    draws = 20_000
    process = rewrite._sampling(keyed.key(5, np.arange(draws)))
    scores = process(torch.zeros(draws, 3, dtype=torch.long), logits.repeat(draws, 1))
    assert (scores == 0).sum(1).eq(1).all() and (scores == -torch.inf).sum(1).eq(49).all()
    drawn = torch.bincount(scores.argmax(1), minlength=50).double() / draws
    best = logits.topk(TOP).indices
    wanted = torch.zeros(50).double()
    wanted[best] = torch.softmax(logits[best].double(), 0)
    error = (wanted * (1 - wanted) / draws).sqrt()
    assert ((drawn - wanted).abs() <= 4.5 * error).all()
    assert torch.equal(process(torch.zeros(draws, 3, dtype=torch.long), logits.repeat(draws, 1)), scores)
    later = process(torch.zeros(draws, 4, dtype=torch.long), logits.repeat(draws, 1))
    agree = (later.argmax(1) == scores.argmax(1)).double().mean()
    assert agree.item() == pytest.approx((wanted**2).sum().item(), abs=0.02), "each step draws anew"


def test_a_forbidden_token_is_never_drawn():
    scores = torch.full((100, 20), -torch.inf)
    scores[:, 3] = 0.0
    assert (rewrite._sampling(keyed.key(np.arange(100)))(torch.zeros(100, 1), scores).argmax(1) == 3).all()


# ---- models that write a text for a text

WORDS = ["the", "film", "is", "a", "good", "one", "and", "we", "saw", "it", "twice", "with", "much", "joy"]


def tiny_seq2seq(folder, kind, seed=0, end=1.0):
    """A random BART, Marian or T5 of two layers over a vocabulary of words; `end` raises the odds of an end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({w: n for n, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    sizes = {
        "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "initializer_factor": 2.0,
               "tie_word_embeddings": False},
        "bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
                 "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.3,
                 "max_position_embeddings": 64, "forced_eos_token_id": 1, "num_beams": 4},
    }  # fmt: skip
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "decoder_start_token_id": 0}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes["t5" if kind == "t5" else "bart"], **special)
    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(config)
    if kind == "t5":  # it has no biases: with nearly equal odds an end is one word of some
        model.lm_head.weight.data *= 0.1
    else:
        model.get_input_embeddings().weight.data *= 0.5
        model.final_logits_bias[0, 1] = end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    home = tmp_path_factory.mktemp("seq2seq")
    return {kind: tiny_seq2seq(home / kind, kind) for kind in ("bart", "marian", "t5")} | {
        "back": tiny_seq2seq(home / "back", "bart", seed=1),
        "endless": tiny_seq2seq(home / "endless", "bart", end=-1e9),
    }


SENTENCES = [" ".join(WORDS[n : n + 3 + n % 7]) for n in range(8)]


@pytest.mark.parametrize("kind", ["bart", "marian", "t5"])
def test_a_paraphrase_is_a_function_of_its_text_and_the_seed(writers, kind, monkeypatch):
    monkeypatch.setattr(augment, "TRIES", 1)
    how = Augmenting(kinds=("paraphrase",), copies=2, seed=2)
    make = rewrite.rewritten([rewrite.open_seq2seq(writers[kind])], "paraphrase", how)
    every = make(SENTENCES)
    assert sum(len(each.texts) for each in every) > 3
    for text, each in zip(SENTENCES, every):
        assert len({text_hash(new) for new in (text, *each.texts)}) == 1 + len(each.texts)
        assert set(" ".join(each.texts).split()) <= {*WORDS}, "no special token is left in it"
    assert make(SENTENCES[::-1]) == every[::-1] and make(SENTENCES[:1]) == every[:1]
    monkeypatch.setattr(rewrite, "MOST_TOKENS", 40)
    assert make(SENTENCES) == every
    other = Augmenting(kinds=("paraphrase",), copies=2, seed=3)
    assert rewrite.rewritten([rewrite.open_seq2seq(writers[kind])], "paraphrase", other)(SENTENCES) != every


def test_back_translation_goes_through_both_models(writers):
    how = Augmenting(kinds=("back-translation",), copies=1)
    there, back = (rewrite.open_seq2seq(writers[name]) for name in ("marian", "back"))
    made = rewrite.rewritten([there, back], "back-translation", how)(SENTENCES)
    assert sum(len(each.texts) for each in made) > 4
    # Step by step, with the keys that the maker draws by.
    own = np.array([text_hash(text) for text in SENTENCES], np.uint64)
    keys = keyed.key(how.seed, KINDS.index("back-translation"), own, 0)
    middle = rewrite._write(there, SENTENCES, keyed.key(keys, 0))
    whole = [n for n, text in enumerate(middle) if text]
    last = rewrite._write(back, [middle[n] for n in whole], keyed.key(keys[whole], 1))
    first = {n: text for n, text in zip(whole, last) if text and text_hash(text) != own[n]}
    assert len(first) > 2 and all(made[n].texts == (text,) for n, text in first.items())


def test_a_text_that_is_too_long_or_comes_to_no_end_is_not_used(writers):
    how = Augmenting(kinds=("paraphrase",), copies=2)
    long = " ".join(WORDS * 5)
    make = rewrite.rewritten([rewrite.open_seq2seq(writers["marian"])], "paraphrase", how)
    assert make([long])[0] == Made((), ("longer than the model reads",) * 2)
    assert [len(each.missing) for each in make([SENTENCES[0], long])] == [0, 2]
    endless = rewrite.rewritten([rewrite.open_seq2seq(writers["endless"])], "paraphrase", how)
    assert endless(SENTENCES[:3]) == [Made((), (SAME,) * 2)] * 3, "an end that was forced is none"


def test_what_a_model_wants_before_each_text(writers):
    how = Augmenting(kinds=("paraphrase",), copies=2)
    plain, told = (
        rewrite.rewritten([rewrite.open_seq2seq(writers["t5"], prefix)], "paraphrase", how)(SENTENCES)
        for prefix in ("", "much joy with ")
    )
    assert plain != told
    model = rewrite.open_seq2seq(writers["t5"])
    keys = np.arange(4, dtype=np.uint64)
    texts = [f"much joy with {text}" for text in SENTENCES[:4]]
    assert rewrite._write(model._replace(prefix="much joy with "), SENTENCES[:4], keys) == rewrite._write(
        model, texts, keys
    )


def test_models_that_cannot_be_opened(writers, tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(UserError, match="cannot be opened as a model that writes a text for a text"):
        rewrite.open_seq2seq(str(tiny_model("bert")))
    with pytest.raises(UserError, match="is not a model folder"):
        rewrite.open_seq2seq("./absent")
    for name in ("pickled", "holes", "broken"):
        shutil.copytree(writers["bart"], tmp_path / name)
    (tmp_path / "pickled/model.safetensors").rename(tmp_path / "pickled/pytorch_model.bin")
    with pytest.raises(UserError, match="a format that can run code"):
        rewrite.open_seq2seq(str(tmp_path / "pickled"))
    tensors = load_file(tmp_path / "holes/model.safetensors")
    name = next(name for name in tensors if name.endswith("fc1.weight"))
    save_file(
        {key: value for key, value in tensors.items() if key != name},
        tmp_path / "holes/model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match="1 missing"):
        rewrite.open_seq2seq(str(tmp_path / "holes"))
    save_file(tensors | {name: tensors[name] * np.nan}, tmp_path / "broken/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="NaN"):
        rewrite.open_seq2seq(str(tmp_path / "broken"))


def test_a_package_that_a_tokenizer_needs_is_named(writers, monkeypatch):
    from transformers import AutoTokenizer

    def refuse(*args, **more):
        raise ImportError("MarianTokenizer requires the SentencePiece library\nand more")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(UserError, match="requires the SentencePiece library\n  fix: pip install sentencepiece"):
        rewrite.open_seq2seq(writers["bart"])


# ---- a chat model


def chat(content, tokens=(10, 5)):
    used = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    return {"choices": [{"message": {"role": "assistant", "content": content}}], "usage": used}


def shouted(request):
    """Two rewrites of the text that was sent."""
    text = request["messages"][0]["content"].rpartition("Text:\n")[2]
    return chat(json.dumps([f"Surely {text}", f"{text} indeed"]))


@pytest.fixture
def service(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serve() as running:
        running.reply = shouted
        yield running


def rewrites(service, tmp_path, texts, bill=None, **more):
    asked = Chat(address=service.address, model=more.pop("model", "chat"), concurrency=more.pop("concurrency", 1))
    how = Augmenting(kinds=("llm",), copies=more.pop("copies", 2))
    return rewrite.chat_rewrites(asked, tmp_path / "j", how, bill=bill or Bill(), **more)(texts)


def prompts(service):
    return [request["messages"][0]["content"] for request in service.requests]


ASKED = [f"text number {n}" for n in range(6)]


def test_rewrites_are_asked_for_and_counted(service, tmp_path):
    bill = Bill(prices=(1.0, 2.0))
    made = rewrites(service, tmp_path, ASKED, bill)
    assert made == [Made((f"Surely {text}", f"{text} indeed"), ()) for text in ASKED]
    assert (bill.answered, bill.requests, bill.tokens_in, bill.tokens_out) == (6, 6, 60, 30)
    assert bill.cost == pytest.approx(120e-6) and Bill().cost is None
    asked = prompts(service)[0]
    assert "in 2 different way(s)" in asked and "the label it has now" in asked and asked.endswith(ASKED[0])
    assert rewrites(service, tmp_path / ".", ASKED, concurrency=5) == made


def test_a_stopped_run_goes_on_and_nothing_is_paid_twice(service, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(calls, "sleep", waits.append)
    service.script = [None, None, (429, {"retry-after": "2"}, {}), None, *[(500, {}, {})] * 99]
    with pytest.raises(UserError, match="HTTP 500"):
        rewrites(service, tmp_path, ASKED)
    assert waits[0] == 2.0
    lines = (tmp_path / "j").read_text().splitlines()
    assert len(lines) == 3
    (tmp_path / "j").write_text("\n".join(lines)[:-7])  # as a kill in the middle of a write leaves it
    service.script, service.requests, bill, said = [], [], Bill(), []
    made = rewrites(service, tmp_path, ASKED, bill, note=said.append)
    assert [prompt.split()[-1] for prompt in prompts(service)] == ["2", "3", "4", "5"]
    assert (bill.resumed, bill.answered, bill.tokens_in) == (2, 4, 40) and "2 of 6 prompts" in said[0]
    service.requests = []
    assert rewrites(service, tmp_path, ASKED) == made and service.requests == []
    for changed in ({"copies": 1}, {"model": "other"}, {"prompt": "Say {text}"}):
        rewrites(service, tmp_path, ASKED[:1], **changed)
    assert len(service.requests) == 3, "another number, model or prompt is asked anew"


def test_a_refused_text_is_counted_and_asked_again(service, tmp_path):
    service.script = [None, (400, {}, {"error": {"message": "content filter"}})]
    made = rewrites(service, tmp_path, ASKED)
    assert [each.missing for each in made[:3]] == [(), (REFUSED, REFUSED), ()]
    assert not rewrites(service, tmp_path, ASKED)[1].missing
    service.script = [(400, {}, {"error": {"message": f"unknown model, {KEY}"}})] * 99
    with pytest.raises(UserError, match="unknown model") as caught:
        rewrites(service, tmp_path, [f"other {n}" for n in range(20)])
    assert KEY not in str(caught.value) and len(service.requests) <= 6 + 1 + GIVE_UP + 1


@pytest.mark.parametrize(
    ("content", "texts", "reasons"),
    [
        (None, (), (NO_REWRITE,) * 2),
        ("Here is one:\nA nice text", (), (NO_REWRITE,) * 2),
        ("[1, 2]", (), (NO_REWRITE,) * 2),
        ('["TEXT  number 0"]', (), (FEWER,) * 2),
        ('```json\n["One.", " Two. ", "Three."]\n```', ("One.", "Two."), ()),
        ('{"rewrites": ["One."]}', ("One.",), (FEWER,)),
        ('<think>["No."]</think>[1]: ["One.", "one.", "\\ud800", "\\u0000", " "]', ("One.",), (FEWER,)),
        ("[" * 5000, (), (NO_REWRITE,) * 2),
    ],
)
def test_answers_of_every_kind(service, tmp_path, content, texts, reasons):
    service.script = [lambda request: chat(content)]
    assert rewrites(service, tmp_path, ASKED[:1]) == [Made(texts, reasons)]


def test_braces_are_left_alone(service, tmp_path):
    rewrites(service, tmp_path, ["{count} {0}"], prompt='{"x": {text}}')
    assert prompts(service) == ['{"x": {count} {0}}']


# ---- the guard


def test_the_guard_refuses_texts_that_moved_away():
    class Letters:
        name, dimension = "letters", 26

        def encode(self, texts, role="text"):
            return np.array([[text.count(chr(97 + n)) for n in range(26)] for text in texts], np.float32).reshape(
                -1, 26
            )

    def make(texts):
        return [Made((text + "a", "z" * 9, text * 2), ("why",)) for text in texts]

    guarded = rewrite.guarded(make, Letters(), 0.9)
    assert guarded(["bbbb", "zz"]) == [
        Made(("bbbba", "bbbb" * 2), ("why", MOVED)),
        Made(("z" * 9, "zzzz"), ("why", MOVED)),
    ]
    assert guarded([]) == []


def test_what_the_masks_hide(tiny_model):
    """Each masked word is one mask, whatever its pieces, and the rest of the tokens are the text's."""
    from embedtune.encoder import load

    loaded = load.load_mlm(tiny_model("bert"), 0)
    text = TEXTS[0]
    for key in range(20):
        gaps = rewrite._mask(loaded, text, key, 0.3)
        order, enough = chosen(len(core_spans(text)), key, 0.3)
        assert len(gaps.words) == len(gaps.masks) == enough and set(gaps.words) <= set(order)
        assert (gaps.ids[gaps.masks] == loaded.tokenizer.mask_token_id).all()
        shown = text
        for word in sorted(gaps.words, reverse=True):
            first, last = gaps.at[word]
            shown = f"{shown[:first]}[MASK]{shown[last:]}"
        assert loaded.tokenizer(shown)["input_ids"] == gaps.ids.tolist()


def test_a_word_that_is_cut_off_is_not_masked(tiny_model):
    from embedtune.encoder import load

    loaded = load.load_mlm(tiny_model("bert"), 0)
    line = max(TEXTS, key=len).splitlines()[1]
    pieces = loaded.tokenizer(line, add_special_tokens=False).word_ids()
    assert len(pieces) > len(set(pieces)), "some words are of several pieces"
    for room in range(1, len(pieces)):
        shorter = dataclasses.replace(loaded, max_length=room + 2)
        gaps = rewrite._mask(shorter, line, 5, 1.0)
        whole = set(pieces[:room]) - set(pieces[room:])
        assert (set(gaps.words) if gaps else set()) == whole


def test_each_gap_is_filled_by_noise_of_its_own():
    words = ["aa", "bb", "cc", "dd"]
    gaps = rewrite._Gaps(np.zeros(0), [], [0, 1], [(0, 2), (3, 5)])
    filled = [rewrite._fill("xx yy", gaps, torch.zeros(2, 4), words, key).split() for key in range(2000)]
    same = np.mean([a == b for a, b in filled])
    assert same == pytest.approx(1 / 4, abs=0.05) and {a for a, _ in filled} == set(words)
