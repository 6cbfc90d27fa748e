"""Drift of data is nothing between two halves of one source, and something where words, length or topic change."""

import re

import numpy as np
import pytest

from conftest import corpus
from embedtune.judge import data_drift as data_drift_module
from embedtune.judge import drift, drift_page
from embedtune.judge.data_drift import data_drift


def letters(texts):
    """A vector for each text: how often it has each letter."""
    return np.array([[text.count(c) + 0.01 for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts], np.float32)


def lines(seed, count=300):
    return [line for line in corpus(3 * count, seed=seed).splitlines() if len(line.split()) > 3][:count]


def test_one_source_does_not_drift():
    """The interval of the difference holds zero in about 95 of 100 divisions of one source."""
    texts = lines(0, 400)
    held = 0
    for seed in range(60):
        order = np.random.default_rng(seed).permutation(len(texts))
        halves = [[texts[n] for n in order[part::2]] for part in range(2)]
        found = data_drift(("old", halves[0]), ("new", halves[1]), None, letters, seed)
        held += found.low <= 0 <= found.high
        assert found.length_gap < 0.25 and abs(found.new_words[0] - found.new_words[1]) < 0.1
    assert held >= 50


def test_what_changed_is_found(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("bert"))
    old = lines(0)
    new = [f"{line} xylophone 語 {'qzx' * 3}" for line in lines(1)]
    found = data_drift(("old", old), ("new", new), tokenizer, letters)
    assert found.new_words[0] > found.new_words[1] and {"xylophone", "qzxqzxqzx"} <= set(found.examples)
    count = sum(len(re.findall(r"[^\W\d_]+", text)) for text in dict.fromkeys(new))
    known = {word for text in old for word in text.split()}
    strange = sum(word not in known for text in dict.fromkeys(new) for word in text.split())
    assert strange / count <= found.new_words[0] < strange / count + 0.01  # some words of the old are not in the rest
    assert found.unknown[0] > found.unknown[1] == 0
    pieces = [tokenizer.tokenize(text) for text in dict.fromkeys(new)]
    assert found.pieces[0] == pytest.approx(sum(map(len, pieces)) / sum(len(t.split()) for t in dict.fromkeys(new)))
    assert found.low > 0 and found.far > 0.25 and found.distance[0] > found.distance[1]
    said = "\n".join(found.sentences())
    assert "xylophone" in said and "are farther from the nearest of" in said
    same = data_drift(("old", old), ("new", [f"{a} {b}" for a, b in zip(old, old[1:])]), tokenizer)
    assert same.length_gap > 0.5 and same.new_words[0] < 0.01 and not same.examples and same.distance is None
    assert data_drift(("old", old[:5]), ("new", new)) is None, "too few to say anything"


def test_alignment_finds_a_rotation_and_nothing_else():
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((200, 8))
    turned = vectors @ np.linalg.qr(generator.standard_normal((8, 8)))[0]
    found = drift.drift(vectors, turned)
    assert found.aligned == pytest.approx(1) and found.cosine < 0.9
    wider = np.pad(turned, ((0, 0), (0, 3)))
    assert drift.drift(vectors, wider).aligned == pytest.approx(1) and drift.drift(vectors, wider).cosine is None
    # Fitted and measured on the same texts, this would be well above zero.
    assert abs(drift.drift(vectors, generator.standard_normal((200, 8))).aligned) < 0.2
    assert drift.drift(vectors[:20], turned[:20]).aligned is None


def test_the_page_shows_hostile_names_as_text_and_asks_for_nothing():
    old, new = lines(0), lines(1)
    found = data_drift(("<b>$old$", old), ("<script>x</script>", new), None, letters)
    html = drift_page.page([found], {"<i>model": ["<u>said"]})
    assert "<script" not in html and "<b>$old$" not in html and "<i>model" not in html and "<u>said" not in html
    assert html.count("<svg") == 1 and not re.search(r"(?:src|href)\s*=\s*[\"']?https?:", html)
    again = drift_page.page([found], {"<i>model": ["<u>said"]})
    assert html == again


def test_new_words_of_one_source_are_as_many_as_those_of_its_own_halves():
    """The yardstick is right: without drift the two shares differ by chance, not to one side."""
    draw = np.random.default_rng(3)
    language = [f"{chr(97 + a)}{chr(97 + b)}{chr(97 + c)}" for a in range(20) for b in range(20) for c in range(5)]
    share = 1 / np.arange(1, len(language) + 1)
    texts = [" ".join(draw.choice(language, 12, p=share / share.sum())) for _ in range(4000)]
    gaps = []
    for seed in range(6):
        order = np.random.default_rng(seed).permutation(4000)
        found = data_drift(("a", [texts[n] for n in order[:1000]]), ("b", [texts[n] for n in order[1000:1500]]))
        gaps.append(found.new_words[0] - found.new_words[1])
    assert abs(np.mean(gaps)) < 0.02 and found.held == 500


def test_of_large_data_a_bounded_number_of_texts_is_read(monkeypatch):
    monkeypatch.setattr(data_drift_module, "MOST_READ", 40)
    found = data_drift(("old", lines(0)), ("new", lines(1)))
    assert found.texts == (40, 40) and found.held == 20
