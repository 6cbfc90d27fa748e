import gzip
import json

import pytest

from embedtune.data import stored
from embedtune.data.pairs import Pair
from embedtune.data.read import Counts
from embedtune.data.retrieval import RetrievalSet, bounded, dev_folder, from_pairs, is_beir, joined, part, read_beir
from embedtune.errors import UserError

CORPUS = [
    {"_id": "a", "title": "Apples", "text": "grow on trees."},
    {"_id": "b", "title": "", "text": "Boats float."},
    {"_id": "c", "title": "Cats", "text": ""},
]
QUERIES = [{"_id": "1", "text": "fruit"}, {"_id": "2", "text": "pets"}, {"_id": "3", "text": "sea"}]
TEST = [("1", "a", 2), ("1", "b", 0), ("2", "c", 1)]
TRAIN = [("3", "b", 1)]
HEADER = "query-id\tcorpus-id\tscore\n"


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def qrels(rows):
    return HEADER + "".join("\t".join(map(str, row)) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path):
    """make(corpus, queries, **qrels) -> a BEIR folder."""

    def make(corpus=CORPUS, queries=QUERIES, **splits):
        home = tmp_path / "things"
        (home / "qrels").mkdir(parents=True, exist_ok=True)
        (home / "corpus.jsonl").write_text(lines(corpus))
        (home / "queries.jsonl").write_text(lines(queries))
        for split, rows in (splits or {"test": TEST, "train": TRAIN}).items():
            (home / "qrels" / f"{split}.tsv").write_text(qrels(rows))
        return home

    return make


def refusal(home, split="test", **more):
    with pytest.raises(UserError) as error:
        read_beir(home, split, **more)
    return error.value


def test_reads_a_folder(folder):
    data = read_beir(folder(), "test")
    assert data.name == "things/test"
    assert data.corpus == {"a": "Apples grow on trees.", "b": "Boats float.", "c": "Cats"}
    assert data.queries == {"1": "fruit", "2": "pets"}, "only those that the split judges, in the file's order"
    assert data.qrels == {"1": {"a": 2, "b": 0}, "2": {"c": 1}}
    assert data.remarks == []


@pytest.mark.parametrize("bad_rows", ["fail", "skip"])
def test_what_is_read_does_not_depend_on_where_it_lies(folder, bad_rows, monkeypatch):
    corpus = [{"_id": f"é{n % 90}" if n % 9 == 0 else f"d{n}", "title": "", "text": "" if n == 77 else f"text {n}"}
              for n in range(200)]  # fmt: skip
    home = folder(corpus, test=[("1", "d1", 2), ("2", "d199", 1), ("3", "é0", 0)])
    (home / "qrels" / "train.tsv").unlink(missing_ok=True)

    def found():
        try:
            return read_beir(home, bad_rows=bad_rows)
        except UserError as error:
            return list(error.details)

    in_memory = found()
    monkeypatch.setattr(stored, "TAIL", 50)
    monkeypatch.setattr(stored, "hash_of", len)
    assert found() == in_memory
    if bad_rows == "fail":
        assert in_memory == [
            "corpus.jsonl: has no text (1 x): line 78 ('d77')",
            "corpus.jsonl: has an id that came before (13 x): line 91 ('é0'), line 100 ('é9'), line 109 ('é18'), ...",
        ]
    else:
        assert in_memory.corpus["é9"] == "text 9" and len(in_memory.corpus) == 186


def test_packed_files(folder):
    home = folder()
    plain = read_beir(home, "test")
    for path in [*home.glob("*.jsonl"), *home.glob("qrels/*.tsv")]:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert is_beir(home)
    assert read_beir(home, "test") == plain


def test_what_a_beir_folder_is(folder, tmp_path):
    home = folder()
    assert is_beir(home) and is_beir(str(home))
    assert not is_beir(home / "corpus.jsonl") and not is_beir(tmp_path) and not is_beir("hub:nothing")


def test_one_split_needs_no_name_and_several_do(folder):
    with pytest.raises(UserError, match="judgements for test, train, and none was chosen"):
        read_beir(folder())
    error = refusal(folder(), "tset")
    assert "did you mean 'test'?" in str(error) and "test.tsv, train.tsv" in str(error)
    home = folder()
    (home / "qrels" / "train.tsv").unlink()
    (home / "queries.jsonl").write_text(lines(QUERIES[:2]))
    assert read_beir(home).name == "things/test"


def test_everything_that_is_wrong_is_said_once(folder):
    corpus = [*CORPUS, {"_id": "a", "text": "again"}, {"_id": "d", "title": " ", "text": ""}, {"_id": "e", "text": 7}]
    queries = [*QUERIES, {"_id": "1", "text": "again"}, {"_id": "4", "text": "asked by nobody"}, {"text": "no id"}]
    test = [*TEST, ("9", "a", 1), ("2", "zzz", 1), ("2", "b", "1.5"), ("1", "a", 3), ("1", "d", 1), ("2", "c", 1)]
    error = refusal(folder(corpus, queries, test=test, train=TRAIN))
    assert error.what == "problems in this retrieval data: 10"
    assert set(error.details) == {
        "corpus.jsonl: has an id that came before (1 x): line 4 ('a')",
        "corpus.jsonl: has no text (1 x): line 5 ('d')",
        "corpus.jsonl: has something other than a text as 'text' or 'title' (1 x): line 6",
        "queries.jsonl: has an id that came before (1 x): line 4 ('1')",
        "queries.jsonl: has no '_id' that is a text or a whole number (1 x): line 6",
        "qrels/test.tsv: names a query that queries.jsonl does not have (1 x): row 4 ('9')",
        "qrels/test.tsv: names a document that corpus.jsonl does not have (1 x): row 5 ('zzz')",
        "qrels/test.tsv: has a relevance that is no whole number (1 x): row 6 ('1.5')",
        "qrels/test.tsv: judges a document again, differently (1 x): row 7 (2, then 3)",
        "queries.jsonl: has a query that no qrels file judges (1 x): '4'",
    }
    assert "--bad-rows skip" in error.fix


def test_skipping_leaves_out_and_counts(folder):
    corpus = [*CORPUS, {"_id": "a", "text": "again"}, {"_id": "d", "text": ""}]
    queries = [*QUERIES, {"_id": "4", "text": "asked by nobody"}, {"_id": "5", "text": "judged on d only"}]
    test = [*TEST, ("9", "a", 1), ("5", "d", 1), ("2", "c", 1)]
    counts = Counts()
    data = read_beir(folder(corpus, queries, test=test, train=TRAIN), "test", bad_rows="skip", counts=counts)
    assert data.corpus["a"] == "Apples grow on trees." and "d" not in data.corpus
    assert set(data.queries) == {"1", "2"}
    assert data.qrels == {"1": {"a": 2, "b": 0}, "2": {"c": 1}}
    assert data.remarks == [
        "qrels/test.tsv: judgements that repeat another: 1",
        "left out, corpus.jsonl: has an id that came before (1 x): line 4 ('a')",
        "left out, corpus.jsonl: has no text (1 x): line 5 ('d')",
        "left out, qrels/test.tsv: names a query that queries.jsonl does not have (1 x): row 4 ('9')",
        "left out, qrels/test.tsv: names a document that corpus.jsonl does not have (1 x): row 5 ('d')",
        "left out, queries.jsonl: has a query that no qrels file judges (1 x): '4'",
        "left out, queries.jsonl: has a query whose judgements were all left out (1 x): '5'",
    ]
    assert counts.rows == counts.used + sum(counts.rejected.values()) and sum(counts.rejected.values()) == 6


def test_places_are_cut_at_three(folder):
    error = refusal(folder(test=[*TEST, *[("1", f"x{i}", 1) for i in range(2000)]], train=TRAIN))
    assert len(error.details) == 1
    assert error.details[0].endswith("(2,000 x): row 4 ('x0'), row 5 ('x1'), row 6 ('x2'), ...")


def test_qrels_without_their_header(folder):
    home = folder()
    (home / "qrels" / "test.tsv").write_text("1\t0\ta\t2\n2\t0\tc\t1\n")
    error = refusal(home)
    assert "expected the header query-id corpus-id score, found '1', '0', 'a'" in error.what


def test_missing_parts(folder):
    home = folder()
    (home / "corpus.jsonl").rename(home / "corpus.json")
    assert "has no corpus.jsonl" in refusal(home).what
    home = folder()
    for path in (home / "qrels").iterdir():
        path.unlink()
    assert "nothing says what is relevant" in refusal(home, None).what


def test_numbers_as_ids(folder):
    home = folder([{"_id": 7, "text": "seven"}], [{"_id": 1, "text": "one"}], test=[(1, 7, 1)])
    (home / "qrels" / "train.tsv").unlink(missing_ok=True)
    assert read_beir(home).qrels == {"1": {"7": 1}}


def test_a_query_whose_judgements_are_all_zero_stays(folder):
    home = folder(test=[*TEST, ("3", "a", 0), ("3", "b", -1)])
    (home / "qrels" / "train.tsv").unlink(missing_ok=True)
    assert read_beir(home).qrels["3"] == {"a": 0, "b": -1}


def pair(anchor, positive, *negatives):
    return Pair(anchor, positive, negatives, "f", 1, None)


def test_from_pairs():
    pairs = [pair("q", "yes", "no"), pair("q", "also", "yes"), pair("r", "no"), pair("q", "yes")]
    data = from_pairs(pairs, "mine")
    texts = {data.queries[q]: {data.corpus[d]: r for d, r in judged.items()} for q, judged in data.qrels.items()}
    assert texts == {"q": {"yes": 1, "also": 1}, "r": {"no": 1}}
    assert sorted(data.corpus.values()) == ["also", "no", "yes"]
    assert data.remarks == ["texts that are positive and negative for one anchor, and count as positive: 1"]
    with pytest.raises(UserError, match="no pairs"):
        from_pairs([], "nothing")


def test_a_file_that_is_there_twice(folder):
    home = folder()
    (home / "corpus.jsonl.gz").write_bytes(b"")
    assert "has corpus.jsonl more than once: corpus.jsonl, corpus.jsonl.gz" in refusal(home).what
    home = folder()
    (home / "corpus.jsonl.gz").unlink()
    (home / "qrels" / "test.tsv.gz").write_bytes(b"")
    assert "has more than one qrels file for 'test'; there are test.tsv, test.tsv.gz, train.tsv" in refusal(home).what


def test_nothing_left_to_judge_with(folder):
    home = folder(test=[("9", "a", 1)], train=TRAIN)
    for bad_rows in ("fail", "skip"):
        error = refusal(home, bad_rows=bad_rows)
        assert error.what == "has no usable row: 0 of 1 rows" and error.where.endswith("test.tsv")


def test_where_to_score_a_training(folder, tmp_path):
    home = folder()
    assert dev_folder(home) == (str(home), "test") == dev_folder(str(home)), "not the split that is trained on"
    assert dev_folder(f"{home}:train") == (str(home), "train") and dev_folder(f"{home}:") == (str(home), "")
    (home / "qrels" / "dev.tsv.gz").write_bytes(b"")
    assert dev_folder(home) == (str(home), None), "which of two is for the user to say"
    for other in (tmp_path, f"{tmp_path}:test", "hub:x:y", ["a"], None):
        assert dev_folder(other) is None


def test_a_part_and_two_joined():
    first = RetrievalSet(
        "a", {"1": "x", "2": "y"}, {"d": "same", "e": "other"}, {"1": {"d": 1}, "2": {"e": 2}}, ["one"]
    )
    some = part(first, [1])
    assert (some.queries, some.qrels, some.corpus) == ({"2": "y"}, {"2": {"e": 2}}, first.corpus)
    assert (some.name, some.remarks) == ("a", ["one"])
    second = RetrievalSet(
        "b", {"1": "z"}, {"d": "same", "f": "same", "g": "new"}, {"1": {"d": 2, "f": 1, "g": 0}}, ["2"]
    )
    both = joined(first, second)
    assert both.queries == {"old-1": "x", "old-2": "y", "new-1": "z"} and list(both.queries)[0] == "old-1"
    assert both.corpus == {"old-d": "same", "old-e": "other", "new-g": "new"}
    assert both.qrels == {"old-1": {"old-d": 1}, "old-2": {"old-e": 2}, "new-1": {"old-d": 2, "new-g": 0}}
    assert (both.name, both.remarks) == ("b", ["one", "2"])


def test_scifact(real_data):
    data = read_beir(real_data("scifact"), "dev")
    assert (len(data.queries), len(data.corpus), sum(map(len, data.qrels.values()))) == (300, 5183, 339)


def test_the_texts_to_search_in_are_bounded_and_hold_the_right_ones():
    queries = {f"q{n}": f"query {n}" for n in range(30)}
    corpus_ = {f"d{n}": f"text {n}" for n in range(100)}
    qrels = {f"q{n}": {f"d{n}": 1, f"d{n + 30}": 0} for n in range(30)}
    data = RetrievalSet("x", queries, corpus_, qrels, ["before"])
    found = bounded(data, 10, 50, ["text 1", "a new one", "a new one"], 0)
    assert len(found.queries) == 10 and list(found.queries) == [q for q in queries if q in found.queries]
    assert all(set(found.qrels[q]) <= set(found.corpus) for q in found.queries) and len(found.corpus) == 50
    assert found.remarks == ["before", "scored on 10 queries, searching 50 texts; 20 left out"]
    assert len(set(found.corpus.values())) == 50 and set(found.qrels) == set(found.queries)
    assert bounded(data, 10, 50, [], 1).queries != found.queries
    assert len(bounded(data, 30, 5, [], 0).corpus) == 60, "the judged texts are always there"
    everything = bounded(data, 99, 999, ["text 1", "a new one", "a new one"], 0)
    assert sorted(everything.corpus.values()) == sorted([*corpus_.values(), "a new one"])
    own = bounded(data, 30, 100, [f"of training {n}" for n in range(500)], 0)
    assert sorted(own.corpus.values()) == sorted(corpus_.values()), "hard negatives of the dev data come first"
