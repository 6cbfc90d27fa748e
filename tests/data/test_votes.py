import json

from embedtune.data.pairs import read_pairs
from embedtune.data.read import Counts


def votes(path, rows):
    keys = ("query", "id", "text", "verdict")
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    return path


def test_votes_become_pairs_the_last_word_on_a_text_counts(tmp_path):
    file = votes(tmp_path / "feedback.jsonl", [
        ("heart", "a", "about hearts", "up"), ("lung", "b", "about lungs", "up"), ("heart", "c", "about feet", "down"),
        ("heart", "d", "about hands", "up"), ("heart", "d", "about hands", "down"), ("foot", "e", "about ears", "down"),
        ("lung", "f", "more on lungs", "up"), ("lung", "f", "more on lungs", "maybe"),
    ])  # fmt: skip
    counts = Counts()
    pairs = list(read_pairs(file, counts=counts))
    assert [(p.anchor, p.positive, p.negatives) for p in pairs] == [
        ("heart", "about hearts", ("about feet", "about hands")),
        ("lung", "about lungs", ()), ("lung", "more on lungs", ()),
    ]  # fmt: skip
    assert counts.rejected == {
        "a query of which no text was said to fit": 1,
        "the verdict is neither 'up' nor 'down'": 1,
    }
    assert counts.rows == counts.used + sum(counts.rejected.values()) == 8


def test_a_file_of_pairs_stays_what_it_is(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"query": "a", "text": "b", "positive": "c"}\n')
    assert [(p.anchor, p.positive) for p in read_pairs(file)] == [("a", "c")]
    (tmp_path / "empty.jsonl").write_text("")
