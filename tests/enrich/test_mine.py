"""Hard negatives against a matrix of all scores, and against sentence-transformers' own miner."""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import corpus as made_up
from embedtune.data.clean import text_hash
from embedtune.data.pairs import Pair, read_pairs
from embedtune.enrich import mine as miner
from embedtune.enrich.mine import ABOVE, KNOWN, SECOND, Mining, mine, write_mined
from embedtune.errors import UserError


@dataclass
class Fake:
    """An encoder whose vectors are drawn by the text's hash, or given."""

    name: str = "fake"
    dimension: int = 4
    seed: int = 0
    given: dict = field(default_factory=dict)
    roles: list = field(default_factory=list)

    def encode(self, texts, role="text"):
        self.roles.append((role, len(texts)))
        return np.array([self.vector(text) for text in texts], np.float32).reshape(len(texts), self.dimension)

    def vector(self, text):
        if text in self.given:
            return self.given[text]
        return np.random.default_rng([text_hash(text), self.seed]).normal(size=self.dimension) * 3


def pair(anchor, positive, negatives=(), group=None):
    return Pair(anchor, positive, tuple(negatives), "f", 1, group)


def unit(rows):
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def brute_force(pairs, texts, encoders, how):
    """For each pair its negatives, by a matrix of all scores."""
    positives, groups = {}, {}
    for p in pairs:
        positives.setdefault(text_hash(p.anchor), set()).add(text_hash(p.positive))
        groups.setdefault(p.group, set()).add(text_hash(p.positive))
    chosen = []
    for p in pairs:
        mine_of = positives[text_hash(p.anchor)]
        banned = mine_of | {text_hash(p.anchor)}
        if how.other_groups:
            for q in pairs:
                if text_hash(q.anchor) == text_hash(p.anchor) and q.group is not None:
                    banned |= groups[q.group]
        scores = [unit([e.vector(t) for t in texts]) @ unit([e.vector(p.anchor)])[0] for e in encoders]
        lows = [min(s[i] for i, t in enumerate(texts) if text_hash(t) in mine_of) for s in scores]
        order = [i for i in np.argsort(-scores[0], kind="stable") if text_hash(texts[i]) not in banned]
        good = []
        for i in order[how.skip : how.depth]:
            refused = False
            for score, low in zip(scores, lows):
                if how.margin is not None:
                    refused |= score[i] > low - (1 - how.margin) * abs(low)
                if how.absolute is not None:
                    refused |= score[i] > low - how.absolute
            if not refused:
                good.append(texts[i])
        good = good[: how.negatives]
        chosen.append(good + [None] * (how.negatives - len(good)))
    return chosen


def negatives(row):
    return [value for name, value in row.items() if name.startswith("negative_")]


SETTINGS = st.builds(
    lambda n, skip, more, margin, absolute, other: Mining(
        negatives=n, skip=skip, depth=n + skip + more, margin=margin, absolute=absolute, other_groups=other
    ),
    *(st.integers(1, 4), st.integers(0, 3), st.integers(0, 20)),
    st.sampled_from([None, 0.5, 0.95, 1.0]),
    *(st.sampled_from([None, 0.0, 0.3]), st.booleans()),
)


@settings(max_examples=60, deadline=None)
@given(SETTINGS, st.integers(0, 9999), st.booleans())
def test_negatives_are_those_of_a_matrix_of_all_scores(how, seed, doubted):
    draw = np.random.default_rng(seed)
    corpus = [f"document {i}" for i in range(int(draw.integers(0, 30)))]
    known = [f"positive {i}" for i in range(8)]
    pairs = [
        pair(f"anchor {draw.integers(6)}", known[draw.integers(8)], group=str(draw.integers(4))) for _ in range(10)
    ]
    texts = list(dict.fromkeys(corpus + [p.positive for p in pairs]))
    first, second = Fake(seed=seed), Fake(seed=seed + 1)
    mined = mine(pairs, corpus, first, how, second=second if doubted else None)
    assert [negatives(row) for row in mined.rows()] == brute_force(
        pairs, texts, [first, second] if doubted else [first], how
    )


def test_roles_are_told_and_vectors_are_measured_by_cosine():
    encoder = Fake()
    mine([pair("q", "p")], {"d1": "one", "d2": "two"}, encoder)
    assert encoder.roles == [("document", 3), ("query", 1)]


def at_cosine(*cosines):
    return {f"c{i}": [c, np.sqrt(1 - c * c), 0, 0] for i, c in enumerate(cosines)}


@pytest.mark.parametrize(
    ("positive", "expected"),
    [
        (0.8, ["c2", "c3", "c4", "c5"]),  # 0.95 x 0.8 = 0.76
        (-0.4, ["c5"]),  # -0.4 - 0.05 x 0.4 = -0.42; 0.95 x -0.4 = -0.38 would let c4 in, which is nearer than it
    ],
)
def test_the_margin_lies_below_the_positive_whatever_its_sign(positive, expected):
    candidates = at_cosine(0.9, 0.77, 0.75, 0.1, -0.39, -0.43)
    encoder = Fake(given={"q": [2, 0, 0, 0], "p": [positive, 0, np.sqrt(1 - positive**2), 0], **candidates})
    mined = mine([pair("q", "p")], list(candidates), encoder, Mining(negatives=6, depth=10))
    (row,) = mined.rows()
    assert [text for text in negatives(row) if text] == expected
    assert mined.refused[ABOVE] == 6 - len(expected)
    assert mined.fewer == 1


def test_of_several_positives_the_lowest_sets_the_margin_and_none_is_a_negative():
    given = {"q": [1, 0, 0, 0], "p1": [0.9, 0.4359, 0, 0], "p2": [0.5, 0.866, 0, 0], **at_cosine(0.6, 0.4)}
    mined = mine([pair("q", "p1"), pair("q", "p2")], ["c0", "c1"], Fake(given=given), Mining(negatives=2, depth=9))
    assert [negatives(row) for row in mined.rows()] == [["c1", None], ["c1", None]]
    assert mined.refused == {KNOWN: 2, ABOVE: 1, SECOND: 0}


def test_the_same_text_in_another_case_is_no_negative():
    given = {text: [1, i / 50, 0, 0] for i, text in enumerate(["q", "p", "Q ", "P", "  p\n", "far"])}
    given["far"] = [0, 1, 0, 0]
    pairs = [pair("q", "p")]
    mined = mine(pairs, ["Q ", "P", "  p\n", "far"], Fake(given=given), Mining(negatives=1, depth=5, margin=None))
    assert [negatives(row) for row in mined.rows()] == [["far"]]
    assert mined.candidates == 3 and mined.texts == {2: "far"}


def test_a_second_model_can_refuse():
    first = {"q": [1, 0, 0, 0], "p": [0.9, 0.4359, 0, 0], **at_cosine(0.8, 0.7)}
    second = first | {"c0": [0.95, 0.3122, 0, 0]}
    pairs, corpus, how = [pair("q", "p")], ["c0", "c1"], Mining(negatives=2, depth=9)
    alone = mine(pairs, corpus, Fake(given=first), how)
    both = mine(pairs, corpus, Fake(given=first), how, second=Fake(given=second))
    assert [negatives(row) for row in alone.rows()] == [["c0", "c1"]]
    assert [negatives(row) for row in both.rows()] == [["c1", None]]
    assert both.refused[SECOND] == 1 and alone.refused[SECOND] == 0


def test_without_a_corpus_other_pairs_positives_and_negatives_are_candidates():
    pairs = [pair("q1", "p1", ["n1"]), pair("q2", "p2")]
    mined = mine(pairs, None, Fake(), Mining(negatives=2, depth=9, margin=None))
    rows = [set(negatives(row)) for row in mined.rows()]
    assert rows == [{"p2", "n1"}, {"p1", "n1"}]


def test_negatives_can_be_kept_to_other_groups():
    pairs = [pair("a", "p1", group="x"), pair("b", "p2", group="x"), pair("c", "p3", group="y")]
    how = Mining(negatives=1, depth=9, margin=None, other_groups=True)
    assert [negatives(row) for row in mine(pairs, None, Fake(), how).rows()][:2] == [["p3"], ["p3"]]


def test_rows_with_fewer_are_kept_or_left_out_and_counted(tmp_path):
    # p is far from its anchor, and all but s are nearer; s is near to its own.
    given = {"q": [1, 0, 0, 0], "r": [0, 0, 1, 0], "p": [0.1, 0.7, 0.7, 0], "s": [0, 0.1, 0.995, 0]}
    given |= at_cosine(0.5, 0.4)
    pairs, corpus = [pair("q", "p"), pair("r", "s")], ["c0", "c1"]
    kept = mine(pairs, corpus, Fake(given=given), Mining(negatives=2, depth=9))
    strict = mine(pairs, corpus, Fake(given=given), Mining(negatives=2, depth=9, allow_fewer=False))
    assert kept.fewer == strict.fewer == 1 and kept.without == 0
    assert write_mined(tmp_path / "kept.jsonl", kept) == 2
    assert write_mined(tmp_path / "strict.jsonl", strict) == 1
    first = json.loads((tmp_path / "kept.jsonl").read_text().splitlines()[0])
    assert first == {"anchor": "q", "positive": "p", "negative_1": "s", "negative_2": None}
    assert [p.negatives for p in read_pairs(tmp_path / "kept.jsonl")] == [("s",), ("p", "c0")]


def test_nothing_to_write_is_an_error(tmp_path):
    mined = mine([pair("q", "p")], None, Fake(), Mining(allow_fewer=False))
    with pytest.raises(UserError, match="nothing to write"):
        write_mined(tmp_path / "mined.jsonl", mined)
    assert list(tmp_path.iterdir()) == []


def test_blocks_change_nothing(monkeypatch, tmp_path):
    draw = np.random.default_rng(0)
    pairs = [pair(f"anchor {i % 40}", f"positive {draw.integers(30)}") for i in range(60)]
    corpus = [f"document {i}" for i in range(50)] + ["", "  "]
    whole = mine(pairs, iter(corpus), Fake())
    monkeypatch.setattr(miner, "ENCODED", 7)
    monkeypatch.setattr(miner, "ANCHORS", 9)
    monkeypatch.setattr(miner, "ANSWERS", 400)
    said = []
    parts = mine(pairs, corpus, Fake(), scratch=tmp_path, note=said.append)
    assert list(parts.rows()) == list(whole.rows()) and parts.refused == whole.refused
    assert parts.blank == 2 and said[-1] == "mined 40 of 40 anchors"
    assert list(tmp_path.iterdir()) == [], "the texts and vectors are gone"


def test_an_anchor_with_very_many_positives_goes_alone(monkeypatch):
    monkeypatch.setattr(miner, "ANSWERS", 64)
    excluded = [1, 500, 1, 2, 1]
    blocks = [block.tolist() for block in miner._blocks(excluded, 10)]
    assert sorted(sum(blocks, [])) == [0, 1, 2, 3, 4] and blocks[-1] == [1]
    assert all(len(b) == 1 or len(b) * (10 + max(excluded[i] for i in b)) <= 64 for b in blocks)


def test_settings_that_cannot_be_are_said_together():
    how = Mining(negatives=0, skip=-1, depth=-2, margin=1.5, absolute=-1.0)
    with pytest.raises(UserError) as caught:
        mine([pair("q", "p")], None, Fake(), how)
    assert [detail.split(":")[0] for detail in caught.value.details] == [
        *("--negatives", "--skip", "--depth", "--margin", "--absolute")
    ]
    with pytest.raises(UserError, match="no pairs"):
        mine([], ["text"], Fake())


def test_vectors_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="not finite"):
        mine([pair("q", "p")], None, Fake(given={"p": [np.nan, 0, 0, 0]}))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (dict(margin=None, negatives=3, depth=8), dict(num_negatives=3, range_max=8)),
        (dict(margin=None, negatives=3, depth=9, skip=2), dict(num_negatives=3, range_max=9, range_min=2)),
        # Deeper than the corpus: theirs goes deeper than asked for anchors with fewer positives than others have.
        (dict(margin=0.95, negatives=2, depth=99), dict(num_negatives=2, range_max=99, relative_margin=0.05)),
        (dict(margin=0.98, negatives=1, depth=99), dict(num_negatives=1, range_max=99, relative_margin=0.02)),
        (
            dict(margin=None, absolute=0.02, negatives=2, depth=99),
            dict(num_negatives=2, range_max=99, absolute_margin=0.02),
        ),
    ],
)
@pytest.mark.parametrize("separate", [False, True])
def test_the_same_negatives_as_sentence_transformers(tiny_model, ours, theirs, separate):
    datasets = pytest.importorskip("datasets")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    from embedtune.encoder.encode import open_encoder

    lines = [line for line in dict.fromkeys(made_up(200, seed=5).splitlines()) if len(line.split()) > 4]
    anchors = [lines[i // 2] if i < 10 else lines[i] for i in range(40)]  # the first five have two positives
    positives = [" ".join(line.split()[i % 3 :]) + f" {i}" for i, line in enumerate(anchors)]
    others = lines[60:100] if separate else None
    folder = str(tiny_model("minilm"))
    found = mine_hard_negatives(
        datasets.Dataset.from_dict({"anchor": anchors, "positive": positives}),
        SentenceTransformer(folder, device="cpu"),
        corpus=others,
        output_format="n-tuple",
        verbose=False,
        **theirs,
    )
    expected = {(row["anchor"], row["positive"], *negatives(row)) for row in found}
    pairs = [pair(anchor, positive) for anchor, positive in zip(anchors, positives)]
    mined = mine(pairs, others, open_encoder(folder), Mining(allow_fewer=False, **ours))
    got = {(row["anchor"], row["positive"], *negatives(row)) for row in mined.rows()}
    assert got == expected
    assert got and bool(mined.refused[ABOVE]) == ("relative_margin" in theirs or "absolute_margin" in theirs)


def test_negatives_may_be_drawn_from_the_hardest():
    """A draw by key: from the pool only, another with another seed, the pool of the size asked for is all of it."""
    draw = np.random.default_rng(0)
    corpus = [f"c{n}" for n in range(40)]
    given = {name: draw.normal(size=4) for name in ("q", "p", *corpus)}
    given["p"] = given["q"]
    pairs, encoder = [pair("q", "p")], Fake(given=given)

    def chosen(**how):
        mined = mine(pairs, corpus, encoder, Mining(depth=40, margin=None, **how))
        return [mined.texts[i] for i in mined.chosen[0, : mined.found[0]]]

    hardest = chosen(negatives=12)
    drawn = [chosen(negatives=4, pool=12, seed=seed) for seed in range(20)]
    assert all(set(found) <= set(hardest) and found == sorted(found, key=hardest.index) for found in drawn)
    assert drawn[0] == chosen(negatives=4, pool=12, seed=0) and len({tuple(found) for found in drawn}) > 10
    assert set().union(*drawn) == set(hardest), "every one of the pool is drawn at some time"
    assert chosen(negatives=12, pool=12) == hardest
    with pytest.raises(UserError, match="--pool"):
        chosen(negatives=4, pool=3)
