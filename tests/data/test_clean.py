import random
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from embedtune.data import clean
from embedtune.data.clean import exact_duplicates, near_duplicates, shingles, text_hash


def sentences(n, words=30, seed=0):
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(5000)}" for _ in range(words)) for _ in range(n)]


def test_text_hash_ignores_case_and_whitespace():
    assert text_hash("A  b\n") == text_hash("a b") == text_hash("a\u00a0B")
    assert text_hash("ab") != text_hash("a b")
    assert 0 <= text_hash("half a pair: \ud800") < 1 << 64


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["a", "A ", "b", "c d", "C  D", "e"])))
def test_exact_duplicates_below_the_limit(texts):
    found = exact_duplicates(texts)
    assert found.exact
    assert found.count == len(texts) - len({" ".join(text.casefold().split()) for text in texts})


def test_exact_duplicates_are_estimated_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(clean, "HASHES", 1000)
    texts = sentences(20_000, words=4) * 2
    found = exact_duplicates(texts)
    assert not found.exact and len(found.counts) <= 1000
    assert abs(found.count - 20_000) < 4000


def test_near_duplicates_finds_the_planted():
    texts = sentences(300)
    planted = {}
    for i in range(0, 100, 10):
        planted[i] = len(texts)
        texts.append(texts[i] + " and one more")  # Jaccard 28 / 31
    texts += ["w1 w2 changed " + text for text in texts[100:105]]
    texts.append(texts[0].upper())
    clusters = near_duplicates(texts)
    together = {i: cluster for cluster in clusters for i in cluster}
    assert all(planted[i] in together[i] for i in planted)
    assert len(texts) - 1 in together[0]
    for cluster in clusters:
        assert cluster == sorted(cluster) and len(cluster) > 1
        first = shingles(texts[cluster[0]])
        for i in cluster[1:]:
            other = shingles(texts[i])
            assert len(first & other) / len(first | other) >= 0.8


def test_near_duplicates_where_all_are_the_same_or_nothing():
    assert near_duplicates(["same text here now"] * 5000) == [list(range(5000))]
    assert near_duplicates([]) == [] and near_duplicates(["", "a", "b"]) == []


def test_near_duplicates_do_not_depend_on_the_process():
    code = (
        "from embedtune.data.clean import near_duplicates as n; import random; d = random.Random(1);"
        "print(n([' '.join(str(d.randrange(4)) for _ in range(9)) for _ in range(400)], 0.5))"
    )
    runs = []
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        command = [sys.executable, "-c", code]
        runs.append(subprocess.run(command, capture_output=True, check=True, env=environment).stdout)
    assert runs[0] == runs[1] and len(runs[0]) > 10
