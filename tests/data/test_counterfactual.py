"""The same text about the other group: grammar, one-to-one pairs, and what is measured on sentences of others."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedtune.data.augment import Augmenting, word_makers
from embedtune.data.counterfactual import GROUPS, counterfactual, lists
from embedtune.errors import UserError

PRONOUN = re.compile(r"\[(he|she|him|her|his|hers|himself|herself)\]")


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("He gave her his book.", "She gave him her book."),
        ("She saw him; the book is hers, not his.", "He saw her; the book is his, not hers."),
        ("I told her that her brother came yesterday.", "I told him that his sister came yesterday."),
        ("I saw her yesterday, and her early train.", "I saw him yesterday, and his early train."),
        ("We met her quickly", "We met him quickly"),
        ("His or her own book; his/her own book", "Her or his own book; her/his own book"),
        ("HE SAID: Mother's here, she's 40.", "SHE SAID: Father's here, he's 40."),
        ("Mrs. Smith is a queen and an heiress", "Mr. Smith is a king and an heir"),
        ("He is an actor, she a waitress", "She is an actress, he a waiter"),
        ("An uncle, a nephew, a monk", "An aunt, a niece, a nun"),
        ("His mother-in-law", "Her father-in-law"),
        ("John said hello; a john did not, and neither did Johnson.", None),
        ("We mentioned the herd, a shed and this. Nothing here.", None),
        ("", None),
    ],
)
def test_grammar(text, swapped):
    found = counterfactual(text, ("gender",))
    assert found == swapped


def test_names_and_groups():
    assert counterfactual("John loves his wife.") == "Jennifer loves her husband."
    assert counterfactual("John loves his wife.", shift=1) == "Linda loves her husband."
    assert counterfactual("john and Johns") is None
    assert counterfactual("An African man, a Muslim, the Bible.", ("religion", "race")) == (
        "A European man, a Christian, the Quran."
    )
    assert counterfactual("Black people drink black coffee", ("race",)) == "White people drink black coffee"
    assert counterfactual("An imam spoke", ("religion",)) == "A pastor spoke"
    with pytest.raises(UserError, match="did you mean 'gender'"):
        counterfactual("he", ("gendr",))


def test_every_word_stands_in_one_pair():
    pairs = [pair for group in (*GROUPS, "race_of_persons") for pair in lists()[group]]
    words = [word.lower() for pair in pairs for word in pair]
    assert all(len(pair) == 2 for pair in pairs) and len(set(words)) == len(words)
    assert not {"his", "her", "him", "hers"} & set(words), "their partner hangs on the grammar"


# Words of the lists and others, with any case and any marks: what has one partner comes back.
ONE_TO_ONE = [word for group in ("gender", "names") for pair in lists()[group] for word in pair]


@given(
    st.lists(st.tuples(st.sampled_from([*ONE_TO_ONE, "table", "green", "MAN", "Woman"]), st.sampled_from(" ,;\n-"))),
    st.integers(0, 99),
)
def test_a_swap_of_a_swap_is_the_text(parts, shift):
    text = "".join(word + (mark if mark != "-" else " - ") for word, mark in parts)
    other = counterfactual(text, shift=shift)
    assert other is None or (other != text and counterfactual(other, shift=shift) == text)


def test_pronouns_of_real_sentences(real_data):
    """WinoBias has each sentence with either pronoun, so the right one is known; a few cannot be told."""
    right = many = 0
    for kind in ("type1", "type2"):
        lines = [
            real_data(f"winobias/{side}_stereotyped_{kind}.txt.dev").read_text().splitlines()
            for side in ("pro", "anti")
        ]
        for pro, anti in zip(*lines):
            found = [PRONOUN.search(line) for line in (pro, anti)]
            for line, mark, other in zip((pro, anti), found, reversed(found)):
                if not mark or not other:
                    continue
                before = line[: mark.start()]
                swapped = counterfactual(line.replace("[", "").replace("]", ""), ("gender",)) or ""
                before = before.replace("[", "").replace("]", "")
                got = re.match(r"\w*", swapped[len(before) :]).group()
                many, right = many + 1, right + (got == other.group(1) and swapped.startswith(before))
    assert many > 1500 and right / many > 0.97


def test_new_training_texts():
    texts = ["John gave her the keys.", "Nothing to swap here.", "She left."]
    made = word_makers(Augmenting(kinds=("counterfactual",), copies=2, seed=1))["counterfactual"](texts)
    assert [len(each.texts) for each in made] == [2, 0, 1]
    assert all(text.endswith(" gave him the keys.") and text.split()[0] != "John" for text in made[0].texts)
    assert made[1].missing == ("no gendered word or name",) * 2
    assert made[2].texts == ("He left.",) and made[2].missing == ("nothing new came out",)
    assert made == word_makers(Augmenting(kinds=("counterfactual",), copies=2, seed=1))["counterfactual"](texts)
