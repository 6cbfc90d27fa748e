import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import corpus, tiny_tokenizer
from embedtune.data import tokens as module
from embedtune.data.read import Row, read_texts
from embedtune.data.tokens import affixes, encode_cut, even_chunks, open_tokens, pieces, tokenize, uncut
from embedtune.fit.prepared import token_profile


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def rows_of(texts, documents=None):
    numbers = documents or range(len(texts))
    return [Row({"text": text}, "x", n, d) for n, (text, d) in enumerate(zip(texts, numbers))]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(), min_size=1, max_size=300), st.integers(1, 40))
def test_chunks_cover_everything_once_as_evenly_as_can_be(ids, most):
    chunks = even_chunks(np.array(ids, object), most)
    assert [n for chunk in chunks for n in chunk] == ids
    sizes = [len(chunk) for chunk in chunks]
    assert max(sizes) <= most and max(sizes) - min(sizes) <= 1
    assert len(chunks) == -(-len(ids) // most)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab cé", max_size=200), st.integers(1, 20))
def test_pieces_are_the_text_cut_at_blanks(text, limit):
    parts = list(pieces(text, limit))
    assert "".join(parts) == text
    assert all(len(part) <= limit for part in parts)
    for part in parts[:-1]:
        assert part.endswith(" ") or " " not in part[max(0, limit // 2) : limit]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.text(alphabet="badefiko lm", max_size=200), min_size=1, max_size=12), st.integers(4, 30))
def test_every_token_is_in_exactly_one_row(tokenizer, tmp_path_factory, texts, max_length):
    """The rows without their special tokens, end to end, are what the tokenizer says of the text."""
    found = tokenize(rows_of(texts), tokenizer, max_length, tmp_path_factory.mktemp("t"))
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    bare = [found.row(n)[1:-1].tolist() for n in range(len(found))]
    assert sum(bare, []) == sum(expected, [])
    for number in range(len(found)):
        row = found.row(number)
        assert (row[0], row[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert 3 <= len(row) <= max_length
    assert found.lengths().tolist() == [len(found.row(n)) for n in range(len(found))]
    assert found.lines == sum(map(bool, expected))
    assert found.chunked == sum(len(ids) > max_length - 2 for ids in expected)
    assert found.characters.sum() == sum(len(t) for t, ids in zip(texts, expected) if ids)


def test_documents_and_lines_are_numbered(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("ba\nbe\n\nbi " + "bo " * 40 + "\nbu\n")
    found = tokenize(read_texts(path), tokenizer, 24, tmp_path / "t")
    table = list(zip(found.document.tolist(), found.line.tolist()))
    assert table[:2] == [(0, 0), (0, 1)] and table[-1] == (1, 1)
    assert set(table[2:-1]) == {(1, 0)} and len(table) > 4 and found.chunked == 1
    assert np.array_equal(open_tokens(tmp_path / "t").ids, found.ids)


def test_a_line_longer_than_a_piece_loses_nothing(tokenizer, tmp_path, monkeypatch):
    text = corpus(40).replace("\n", " ").strip()
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(module, "PIECE", 100)
    found = tokenize(rows_of([text, "ba"]), tokenizer, 50, tmp_path)
    assert sum((found.row(n)[1:-1].tolist() for n in range(len(found) - 1)), []) == whole
    assert found.lines == 2


def test_rows_of_nothing_that_is_known_are_left_out(tokenizer, tmp_path):
    """Only unknown characters or literal special tokens: there is nothing in them that could be masked."""
    texts = ["ba", "\u200b", "☃ ☃", "[SEP]", "☃ ba", "[PAD] ☃"]
    found = tokenize(rows_of(texts), tokenizer, 20, tmp_path)
    assert found.lines == len(found) == 2
    assert found.document.tolist() == [0, 4]


def test_truncation_and_padding_of_the_tokenizer_are_not_obeyed(tokenizer, tmp_path):
    limited = tiny_tokenizer()
    limited.backend_tokenizer.enable_truncation(4)
    limited.backend_tokenizer.enable_padding(length=9)
    found = tokenize(rows_of(["ba be bi bo bu", "ba"]), limited, 64, tmp_path)
    expected = [2 + len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("ba be bi bo bu", "ba")]
    assert found.lengths().tolist() == expected


def test_affixes(tokenizer):
    assert affixes(tokenizer) == ([2], [3])


def test_large_vocabularies_take_four_bytes(tokenizer, tmp_path):
    large = tiny_tokenizer()
    large.add_tokens([f"word{n}" for n in range(2**16)])
    found = tokenize(rows_of([f"word{2**16 - 1} ba"]), large, 20, tmp_path)
    assert found.ids.dtype == np.uint32 and found.row(0).max() == len(large) - 1


def test_lengths_are_counted_block_by_block(tokenizer, tmp_path, monkeypatch):
    """With the median and the 95th percentile that numpy finds in the lengths themselves."""
    monkeypatch.setattr(module, "ROWS", 7)
    lines = corpus(200).splitlines()
    for number, count in enumerate((1, 2, 7, 8, 99, 150)):
        found = tokenize(rows_of([line for line in lines if line][:count]), tokenizer, 30, tmp_path / str(number))
        lengths = found.lengths()
        assert found.spread().tolist() == np.bincount(lengths).tolist()
        assert token_profile(found.spread()) == {
            "tokens": lengths.sum(),
            "tokens_per_row_median": np.median(lengths),
            "tokens_per_row_p95": np.quantile(lengths, 0.95),
        }
        places = np.concatenate(list(found.all_places()))
        assert np.array_equal(places, np.stack([found.document, found.line], axis=1))


def resident(path) -> int:
    """KB of a file that are mapped and resident in this process."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)
    return sum(int(re.search(r"Rss: +([0-9]+)", part)[1]) for part in parts if str(path) in part)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the kernel does not say what is resident")
def test_pages_that_are_let_go_are_resident_no_more_and_read_as_before(tokenizer, tmp_path):
    found = tokenize(rows_of(corpus(3000).split("\n") * 4), tokenizer, 30, tmp_path)
    ids, view = found.ids.copy(), found.row(5)
    assert resident(tmp_path) * 1024 > found.ids.nbytes
    found.let_go()
    assert resident(tmp_path) == 0
    assert np.array_equal(found.ids, ids) and np.array_equal(view, found.row(5))
    del found
    assert view.tolist()  # a view keeps its map


def byte_pairs():
    """A byte-level tokenizer as GPT-2's, whose words take the blank before them along."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(corpus(200).splitlines(), trained)
    return backend


WORD = st.text(st.sampled_from("abcdefg.é日 "), min_size=1, max_size=30)


@pytest.fixture(scope="module", params=["wordpiece", "byte pairs"])
def cutting(request, tokenizer):
    backend = uncut(tokenizer) if request.param == "wordpiece" else byte_pairs()
    backend.enable_truncation(20)
    return backend


@settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=200)
@given(st.lists(st.lists(WORD, max_size=120).map(" ".join), min_size=1, max_size=5))
def test_a_beginning_gives_the_tokens_of_the_whole(cutting, texts):
    given = [*texts, ("a pair", texts[0]), "x" * 1000, "word " * 400, " " * 500 + "end"]
    whole = cutting.encode_batch(given)
    found = encode_cut(cutting.encode_batch, given, 20)
    assert [e.ids for e in found] == [e.ids for e in whole]
    assert [bool(e.overflowing) for e in found] == [bool(e.overflowing) for e in whole]
    assert encode_cut(cutting.encode_batch, given, None)[0].ids == whole[0].ids


def test_of_a_book_the_beginning_is_tokenised(cutting):
    asked = []

    def encode(texts):
        asked.extend(map(len, texts))
        return cutting.encode_batch(texts)

    encode_cut(encode, ["word " * 10_000, "short", "x" * 170 + " y" * 1000], 20)
    assert asked[:3] == [8 * 20 - 1, 5, 2170], "up to a blank; whole where it is short or has no blank"
