import os

# Before anything imports a library that reads them: no test may ask the hub, and waiting threads must not spin.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What the tests hold numbers against was computed on a CPU; `make gpu` runs those that are for a GPU on one.
if "EMBEDTUNE_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import random
import socket
from functools import cache
from pathlib import Path

import pytest

REAL_DATA = Path(os.environ.get("EMBEDTUNE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
KINDS = ("bert", "modernbert", "roberta", "distilbert", "mpnet", "minilm")
PACKED = ("bert", "modernbert", "roberta", "distilbert", "minilm")  # those that run padding-free
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@pytest.fixture
def real_data():
    """real_data("blns/blns.txt") -> Path; skips where the data is absent."""

    def find(name: str) -> Path:
        path = REAL_DATA / name
        if not path.exists():
            pytest.skip(f"{path} is absent (set EMBEDTUNE_TEST_DATA)")
        return path

    return find


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """A test that reaches for the network fails."""
    connect = socket.socket.connect

    def refuse(self, address):
        if isinstance(address, tuple) and address[0] not in LOOPBACK:
            raise AssertionError(f"a test wanted to connect to {address}")
        return connect(self, address)

    socket.socket.connect = refuse
    yield
    socket.socket.connect = connect


def corpus(lines: int, seed: int = 0, document: int = 8) -> str:
    """Text that can be learned: every word has four possible successors; a blank line between documents."""
    draw = random.Random(seed)
    language = random.Random("language")
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(language.choices(syllables, k=language.choice((1, 2, 2, 3)))) for _ in range(150)]
    after = {word: language.sample(words, 4) for word in words}
    out = []
    for number in range(lines):
        if number and number % document == 0:
            out.append("")
        line = [draw.choice(words)]
        for _ in range(draw.choice((0, 3, 5, 8, 12, 20))):
            line.append(draw.choice(after[line[-1]]))
        out.append(" ".join(line))
    return "\n".join(out) + "\n"


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """200 lines of the corpus."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(corpus(200))
    return path


@cache
def tokenizer_text() -> str:
    """What the tiny tokenizers were trained on: other lines of the same language."""
    return corpus(300, seed=1)


def tiny_tokenizer(pad_first: bool = True):
    """A WordPiece tokenizer of about 200 tokens; padding is 0, or 1 as in the RoBERTa family."""
    from embedtune.encoder import scratch

    special = scratch.SPECIAL
    if not pad_first:
        scratch.SPECIAL = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    try:
        return scratch.train_wordpiece(tokenizer_text().splitlines(), 200)
    finally:
        scratch.SPECIAL = special


def tiny_config(kind: str, vocabulary: int):
    """A config of two or three layers whose attention is far from uniform (large initial weights)."""
    from transformers import AutoConfig

    shared = {"vocab_size": vocabulary, "initializer_range": 0.2, "cls_token_id": 2, "sep_token_id": 3}
    bert = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        **shared,
    }
    after_padding = {"max_position_embeddings": 130, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    match kind:
        case "bert" | "minilm":
            return AutoConfig.for_model("bert", **bert)
        case "roberta" | "mpnet":
            return AutoConfig.for_model(kind, **{**bert, **after_padding})
        case "distilbert":
            sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 128}
            return AutoConfig.for_model(kind, **shared, **sizes, pad_token_id=0)
        case "modernbert":
            local = {"local_attention": 8, "global_attn_every_n_layers": 3, "num_hidden_layers": 3}
            noise = {"embedding_dropout": 0.1, "mlp_dropout": 0.1, "initializer_cutoff_factor": 2.0}
            return AutoConfig.for_model(kind, **{**bert, **local, **noise}, bos_token_id=2, eos_token_id=3)
    raise ValueError(kind)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """tiny_model("bert") -> a model folder that is made once; a test that changes it copies it first.

    minilm is a bare encoder with a pooler and sentence-transformers' files, and no masked-language head.
    """

    @cache
    def make(kind: str) -> Path:
        import torch
        from transformers import AutoModelForMaskedLM, BertModel

        tokenizer = tiny_tokenizer(pad_first=kind not in ("roberta", "mpnet"))
        tokenizer.model_max_length = 128
        config = tiny_config(kind, len(tokenizer))
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("models") / kind
        model = BertModel(config) if kind == "minilm" else AutoModelForMaskedLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases of zero and norms of one would hide mistakes
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if kind == "minilm":
            _as_sentence_transformer(folder)
        return folder

    return make


def _as_sentence_transformer(folder: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    encoder = Transformer(str(folder), max_seq_length=96)
    SentenceTransformer(modules=[encoder, Pooling(32, "mean"), Normalize()], device="cpu").save(str(folder))
