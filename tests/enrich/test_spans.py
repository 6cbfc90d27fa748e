"""Pairs from raw text: what each generator must and must not do, on made-up documents of any shape."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedtune.data.read import Counts, Row, read_texts
from embedtune.enrich import documents as docs
from embedtune.enrich.documents import Document, documents
from embedtune.enrich.sentences import count, plain, sentences
from embedtune.enrich.spans import GENERATORS, Refusal, Sizes, make_pairs, write_pairs
from embedtune.errors import UserError

SIZES = Sizes(5, 180)
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lamda mu nu omicron pi rho"
WORD = st.sampled_from(WORDS.split())
SENTENCE = st.lists(WORD, min_size=1, max_size=30).map(lambda words: " ".join(words).capitalize() + ".")
PARAGRAPH = st.lists(SENTENCE, min_size=1, max_size=6).map(" ".join)
DOCUMENT = st.builds(
    Document,
    st.just("file:1"),
    st.sampled_from(["", "Alpha", "Alpha beta", "Of things that are told in no text here"]),
    st.lists(PARAGRAPH, min_size=1, max_size=5).map(tuple),
)
SIZE = st.integers(1, 8).flatmap(lambda low: st.builds(Sizes, st.just(low), st.integers(4 * low, 200)))


def rows(*texts, file="the list", **values):
    return [Row({"text": text, **values}, file, number, number) for number, text in enumerate(texts, 1)]


def article(number: int, paragraphs: int = 3) -> str:
    """A text whose every sentence names itself, so that what came from where can be told."""
    lines = []
    for p in range(paragraphs):
        lines.append(" ".join(f"In part {p} the claim s{number}x{p}x{s} holds for all we know." for s in range(6)))
    return "\n\n".join(lines)


@settings(max_examples=150, deadline=None)
@given(DOCUMENT, SIZE, st.integers(0, 2**63), st.integers(0, 5))
def test_every_pair_keeps_the_promises_of_its_generator(document, sizes, seed, number):
    text = plain(document.text)
    for name, generator in GENERATORS.items():
        made = generator(document, sizes, seed, number)
        assert made == generator(document, sizes, seed, number), "not a pure function"
        if made is None or isinstance(made, Refusal):
            continue
        anchor, positive = made
        assert anchor.strip() == anchor != "" and positive.strip() == positive != ""
        assert 2 * sizes.min_words <= count(positive) <= sizes.max_words
        if name == "title":
            assert plain(anchor) in plain(document.title)
        else:
            assert count(anchor) >= sizes.min_words
            assert plain(anchor) in text
        if name != "crop":
            assert plain(anchor) not in plain(positive)
            assert all(plain(s) in text for s in sentences(positive))
        else:
            assert plain(positive) in text
            assert count(anchor) <= 3 * sizes.min_words


def test_a_cloze_is_its_sentence_and_the_neighbours():
    made = list(make_pairs(rows(article(1, 1)), ["cloze"], per_document=9))
    assert len(made) == 6, "each sentence once, in some order"
    whole = sentences(article(1, 1))
    assert sorted(pair.anchor for pair in made) == sorted(whole)
    for pair in made:
        assert sentences(pair.positive) == [s for s in whole if s != pair.anchor]


def test_a_cloze_leaves_out_repeats_of_its_sentence():
    text = "The cat sat on the mat. " * 3 + "A dog came in and lay down there. Nobody said a word about it at all."
    made = list(make_pairs(rows(text), ["cloze"], per_document=9))
    assert "The cat sat on the mat." in {pair.anchor for pair in made}
    assert all(pair.anchor not in pair.positive for pair in made)


def test_a_long_context_is_cut_around_the_sentence():
    text = " ".join(f"Here stands the sentence x{i} of a long text." for i in range(100))
    for pair in make_pairs(rows(text), ["cloze"], per_document=8, max_words=40):
        own = int(pair.anchor.split(" x")[1].split()[0])
        near = [int(part.split()[0]) for part in pair.positive.split(" x")[1:] if part.split()[0].isdigit()]
        assert near and all(abs(n - own) <= 6 for n in near)


def test_title_next_and_lead_say_what_they_say():
    text = article(7)
    first, second, third = text.split("\n\n")
    made = list(make_pairs(rows(text, title="A title of note"), ["title", "next", "lead"], per_document=9))
    by_kind = {}
    for pair in made:
        by_kind.setdefault(pair.generator, []).append((pair.anchor, pair.positive))
    assert by_kind["title"] == [("A title of note", " ".join(text.split())[: len(by_kind["title"][0][1])])]
    assert sorted(by_kind["next"]) == sorted([(first, second), (second, third)])
    leads = dict(by_kind["lead"])
    assert set(leads) == {sentences(part)[0] for part in (first, second, third)}
    assert leads[sentences(second)[0]] == " ".join(sentences(second)[1:])


def test_sentences_that_hold_the_title_are_left_out():
    text = "Blue whales are large. They eat krill and little else all day. " + "The sea is wide and deep and cold. " * 2
    (pair,) = make_pairs(rows(text, title="Blue Whales"), ["title"])
    assert "Blue whales" not in pair.positive and pair.positive.startswith("They eat krill")


def test_one_long_line_has_next_parts_of_whole_sentences():
    made = list(make_pairs(rows(article(3, 1) + " " + article(4, 1)), ["next"], max_words=90))
    whole = sentences(article(3, 1) + " " + article(4, 1))
    assert made
    for pair in made:
        after = whole.index(sentences(pair.anchor)[-1])
        assert sentences(pair.positive)[0] == whole[after + 1]


def test_lengths_of_crops_vary_and_both_spans_are_near_each_other():
    text = " ".join(f"w{i}" for i in range(5000))
    made = list(make_pairs(rows(text), ["crop"], per_document=200))
    anchors = {count(pair.anchor) for pair in made}
    positives = [count(pair.positive) for pair in made]
    assert anchors == set(range(5, 16))
    assert min(positives) < 30 and max(positives) > 160
    for pair in made:
        a, p = (int(text.split()[0][1:]) for text in (pair.anchor, pair.positive))
        assert abs(a - p) < 360
    assert max(int(pair.anchor.split()[0][1:]) for pair in made) > 4000, "all of the text is drawn from"


def test_same_pairs_whatever_the_order_and_other_pairs_for_another_seed():
    texts = [article(i) for i in range(5)]
    kinds = list(GENERATORS)

    def pairs(texts, seed):
        return {(p.anchor, p.positive) for p in make_pairs(rows(*texts), kinds, 3, seed)}

    assert pairs(texts, 1) == pairs(texts[::-1], 1)
    assert pairs(texts, 1) != pairs(texts, 2)
    assert pairs(texts[:2], 1) < pairs(texts, 1)


def test_what_gives_no_pair_is_counted():
    counts = Counts()
    texts = ["too short", article(1), article(1), "Short one. " + "But then it goes on for quite a while longer here."]
    made = list(make_pairs(rows(*texts), ["crop", "title", "lead"], 2, counts=counts))
    assert counts.used == len(made)
    assert counts.rows == counts.used + sum(counts.rejected.values())
    assert counts.rejected["crop: too short"] == 1
    assert counts.rejected["title: no title"] == 3
    assert counts.rejected["repeated document"] == 1
    assert counts.rejected["lead: first sentence too short"] == 2
    assert counts.examples["crop: too short"] == ["the list:1"]


def test_settings_that_cannot_be_are_said_together():
    with pytest.raises(UserError) as caught:
        list(make_pairs(rows("x"), ["clone"], 0, min_words=10, max_words=20))
    assert "did you mean 'cloze'" in str(caught.value)
    assert len(caught.value.details) == 3


def test_pairs_are_written_as_read_pairs_reads_them(tmp_path):
    from embedtune.data.pairs import read_pairs

    made = list(make_pairs(rows(article(1), article(2)), list(GENERATORS)))
    assert write_pairs(tmp_path / "pairs.jsonl", made) == len(made)
    back = list(read_pairs(tmp_path / "pairs.jsonl"))
    assert [(p.anchor, p.positive, p.group) for p in back] == [(p.anchor, p.positive, p.group) for p in made]
    assert json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])["generator"] == "crop"


def test_no_pairs_is_an_error_and_no_file(tmp_path):
    counts = Counts()
    with pytest.raises(UserError, match="too short"):
        write_pairs(tmp_path / "pairs.jsonl", make_pairs(rows("x"), counts=counts), counts)
    assert list(tmp_path.iterdir()) == []


def test_lines_between_blank_lines_are_one_document(tmp_path):
    file = tmp_path / "data.txt"
    file.write_text("A Fine Title\nFirst line of the text that follows here.\nSecond line.\n\nOther text.\n")
    one, two = documents(read_texts(file))
    assert one.title == "A Fine Title" and one.group == "data.txt:1"
    assert one.paragraphs == ("First line of the text that follows here.", "Second line.")
    assert two.title == "" and two.paragraphs == ("Other text.",) and two.group == "data.txt:5"


@pytest.mark.parametrize("line", ["Ends in a point.", "- a list item here", "lower case", "One", "w " * 30 + "w"])
def test_what_does_not_look_like_a_title_is_none(line):
    body = "Here is the text that would follow it, long enough to be one. " * 3
    (found,) = documents(rows(f"{line}\n{body}"))
    assert found.title == ""


def test_a_file_without_blank_lines_has_a_text_in_each_line(tmp_path):
    file = tmp_path / "data.txt"
    file.write_text("".join(f"Line {i} stands alone.\n" for i in range(docs.APART + 1)))
    counts = Counts()
    assert len(list(documents(read_texts(file), counts=counts))) == docs.APART + 1
    assert "text of its own" in counts.notes[0]
    assert len(list(documents(read_texts(file), "together"))) == 1
    file.write_text("".join(f"Line {i} stands alone.\n" for i in range(docs.APART)))
    assert len(list(documents(read_texts(file)))) == 1
    assert len(list(documents(read_texts(file), "apart"))) == docs.APART
    with pytest.raises(UserError, match="--lines"):
        list(documents(read_texts(file), "sideways"))


def test_a_later_document_may_be_long_and_an_endless_one_comes_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "MOST_LINES", 50)
    file = tmp_path / "data.txt"
    file.write_text("First.\n\n" + "".join(f"Line {i} of the second.\n" for i in range(120)))
    assert [len(document.paragraphs) for document in documents(read_texts(file))] == [1, 50, 50, 20]


def test_wrapped_lines_are_joined():
    text = "The cat sat on\nthe mat and\nslept there.\nThen it woke\nand went."
    (found,) = documents(rows(text))
    assert found.paragraphs == ("The cat sat on the mat and slept there.", "Then it woke and went.")
    (found,) = documents(rows("- apples\n- pears\n- plums"))
    assert len(found.paragraphs) == 3


def test_other_scripts_give_pairs():
    text = "".join(f"これは長い文章の第{i}番目の文であり意味がある。" for i in "一二三四五六七八")
    kinds = {pair.generator for pair in make_pairs(rows(text), ["crop", "cloze", "lead", "next"], 2, max_words=60)}
    assert kinds == {"crop", "cloze", "lead", "next"}


def test_real_abstracts_give_pairs_of_every_kind(real_data):
    from itertools import islice

    counts = Counts()
    texts = islice(read_texts(real_data("scifact/corpus.jsonl")), 200)
    made = list(make_pairs(texts, list(GENERATORS), 2, counts=counts))
    kinds = [pair.generator for pair in made]
    assert kinds.count("title") > 190 and kinds.count("lead") > 190 and kinds.count("cloze") > 390
    assert counts.rows == counts.used + sum(counts.rejected.values())
