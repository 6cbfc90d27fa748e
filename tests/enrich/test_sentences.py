"""Sentences and words."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedtune.enrich.sentences import count, plain, sentences, words


@pytest.mark.parametrize(
    "expected",
    [
        ["Dr. Smith et al. showed that p < 0.05.", "The J. Doe study, e.g. Fig. 3, agrees."],
        ["It rose by 3.14 per cent.", "Version 2.0 is out."],
        ["We lack vitamin C.", "The U.S. Army came at 5 p.m. on Monday.", "They left."],
        ["1. First item.", "2. Second item.", "B. Third item."],
        ["Is it so?", '"Yes!" he said.', '"No."', "She left... and then?", "(So) it was."],
        ["See No. 5 for more.", "I said no.", "The end."],
        ["The drugs (see Smith et al.) work.", "Why?", "Nobody knows."],
        ["Wait!!!", "What?!", "(Nothing.)", "Good."],
        ["今日は晴れです。", "「そうですか？」と彼は言った。", "明日は雨！"],
        ["यह एक वाक्य है।", "यह दूसरा है।"],
        ["هل هذا صحيح؟", "نعم هو كذلك.", "شكرا"],
        ["no mark at all"],
    ],
)
def test_sentences_end_where_a_reader_ends_them(expected):
    space = "" if "。" in expected[0] else " "
    assert sentences(space.join(expected)) == expected


def test_an_ellipsis_before_a_capital_is_an_end():
    assert sentences("She left... And then it rained.") == ["She left...", "And then it rained."]


TEXT = st.text(alphabet=st.sampled_from("aB1 .!?。\n\"')(…, é漢"), max_size=80)


@given(TEXT)
def test_no_character_is_lost(text):
    found = sentences(text)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(sentence == sentence.strip() != "" for sentence in found)


@given(TEXT)
def test_words_cover_all_but_the_spaces_and_are_counted_alike(text):
    spans = words(text)
    assert "".join(text[a:b] for a, b in spans) == "".join(text.split())
    assert count(text) == len(spans)


def test_scripts_without_spaces_have_words():
    assert count("今日は晴れです") == 4
    assert count("two words") == 2


@pytest.mark.parametrize("unit", [".", "A. B. ", "a. b. ", ".)", "word ", "。", "?! "])
def test_time_is_linear_in_the_text(unit):
    def cpu(text):
        start = time.process_time()
        sentences(text)
        return time.process_time() - start

    # Quadratic time would make this ratio 64.
    small = min(cpu(unit * 10_000) for _ in range(3))
    assert cpu(unit * 80_000) < 30 * small + 0.2


def test_plain_texts_are_the_same_but_for_case_and_space():
    assert plain(" The  CAT\n") == "the cat"
