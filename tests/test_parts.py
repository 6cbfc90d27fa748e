"""What a run trains on, chooses on and is judged on: three parts that share no text."""

import random

import pytest

from conftest import corpus
from embedtune import UserError
from embedtune.data.clean import text_hash
from embedtune.data.divide import leaks
from embedtune.data.pairs import read_pairs
from embedtune.parts import NAMES, PROXIES, TRAIN, _distinct, divide, open_set
from embedtune.recipes import Loop, Run


def documents(count, seed=0):
    """Documents of a title and three paragraphs of sentences, a blank line between them."""
    draw = random.Random(seed)
    lines = [line for line in corpus(40 * count, seed=seed).splitlines() if len(line.split()) > 6]
    made = []
    for number in range(count):
        title = f"{' '.join(draw.choice(lines).split()[:4])} {number}".title()
        paragraphs = [
            " ".join(f"{draw.choice(lines).capitalize()} {number} {part} {k}." for k in range(3)) for part in range(3)
        ]
        made.append([title, *paragraphs])
    return made


def write(path, found):
    path.write_text("\n\n".join("\n".join(lines) for lines in found) + "\n")
    return str(path)


def texts_of(parts):
    sides = {"train": parts.train, "dev": parts.dev}
    found = {name: {row[side] for row in rows for side in ("anchor", "positive")} for name, rows in sides.items()}
    found["test"] = {text for data in parts.tests.values() for text in data.queries.values()}
    return found


@pytest.fixture
def text(tmp_path):
    return write(tmp_path / "data.txt", documents(300))


def test_raw_text_gives_three_parts_of_whole_documents(text):
    notes = []
    parts = divide(Run(data=text, test_rows=40, test_corpus=100), notes.append)
    assert not parts.real and set(parts.tests) == {NAMES[name] for name in PROXIES}
    found = texts_of(parts)
    assert not found["train"] & found["dev"] and not found["train"] & found["test"] and not found["dev"] & found["test"]
    for data in parts.tests.values():
        assert 20 <= len(data.queries) <= 40 and len(data.corpus) <= 100
        assert all(document in data.corpus for judged in data.qrels.values() for document in judged)
    assert parts.profile["documents"] == 300 and len(parts.text) == 240
    assert {pair["generator"] for pair in parts.examples} <= set(TRAIN)
    assert any("near-duplicates together" in remark for remark in parts.remarks) and "raw text" in notes[0]


def test_no_training_anchor_is_nearly_a_query_though_documents_share_sentences(tmp_path):
    made = documents(120)
    for number, lines in enumerate(made):
        lines[1] = made[number % 15][1]  # as boilerplate does
    parts = divide(Run(data=write(tmp_path / "data.txt", made), pairs=4), lambda note: None)
    held = [row["anchor"] for row in parts.dev] + [q for t in parts.tests.values() for q in t.queries.values()]
    found = leaks(held, [row["anchor"] for row in parts.train])
    assert (found.exact, found.near) == (0, 0) and len(parts.train) > 100
    assert any("training pairs left out: their anchor is nearly a query" in remark for remark in parts.remarks)


def test_the_parts_are_a_function_of_data_and_seed(text):
    one, two = (divide(Run(data=text), lambda note: None) for _ in range(2))
    other = divide(Run(data=text, loop=Loop(seed=1)), lambda note: None)
    assert one.train == two.train and one.dev == two.dev and one.tests == two.tests
    assert one.train != other.train


def test_documents_that_nearly_repeat_each_other_are_in_one_part(tmp_path):
    found = documents(120)
    copies = [[f"copy of {lines[0]}", *lines[1:]] for lines in found[:60]]
    parts = divide(Run(data=write(tmp_path / "data.txt", found + copies), test_corpus=400), lambda note: None)
    trained = [" ".join(paragraphs) for paragraphs in parts.text]
    for lines in found[:60]:
        body = " ".join(lines[1:3])
        assert sum(body in text for text in trained) in (0, 2), "one copy is trained on, the other one is not"


def test_repeated_documents_are_left_out_and_counted(tmp_path):
    found = documents(260)
    parts = divide(Run(data=write(tmp_path / "data.txt", found + found[:30])), lambda note: None)
    assert parts.profile["documents"] == 260
    assert any(remark.startswith("30 documents left out") for remark in parts.remarks)


def test_what_is_drawn_to_judge_on_is_said_and_enough_to_search_in(text):
    parts = divide(Run(data=text, test_rows=25, test_corpus=5), lambda note: None)
    (said,) = [remark for remark in parts.remarks if "drawn to judge on" in remark and NAMES["next"] in remark]
    assert " of " in said and len(parts.tests[NAMES["next"]].queries) == 25
    whole = divide(Run(data=text, test_rows=25, test_corpus=500), lambda note: None)
    assert not any("drawn to judge on" in remark for remark in whole.remarks)


def test_whole_queries_are_drawn_so_that_no_right_answer_counts_as_wrong(tmp_path):
    rows = [{"anchor": f"which things are of kind {g} asked by {a}", "positive": f"thing {g} {p} is one of these"}
            for g in range(120) for a in range(4) for p in range(4)]  # fmt: skip
    (data,) = divide(Run(data=rows, test_rows=10, test_corpus=20), lambda note: None).tests.values()
    assert len(data.queries) == 10
    for query, text in data.queries.items():
        right = {key for key, document in data.corpus.items() if document.split()[1] == text.split()[5]}
        assert set(data.qrels[query]) == right and len(right) == 4


def test_pairs_that_repeat_stand_where_the_last_of_them_stood(tmp_path):
    given = [{"anchor": f"what is thing {n}", "positive": f"thing {n} is of kind {n * n}"} for n in range(60)]
    pairs, positives, repeated = _distinct(read_pairs([*given, given[0], given[0]]), tmp_path)
    assert repeated == 2 and len(pairs) == 60
    assert [pair.anchor for pair in pairs] == [row["anchor"] for row in [*given[1:], given[0]]]
    assert pairs[-1].number == 1, "and are the first of them"
    assert list(positives) == [pair.positive for pair in pairs]


def test_text_that_gives_no_proxies_is_refused(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("\n".join(f"word{n} word word" for n in range(300)) + "\n")
    with pytest.raises(UserError, match="fewer than two kinds of proxy queries|too little data"):
        divide(Run(data=str(path)), lambda note: None)


def rows(count, copies=0):
    lines = list(dict.fromkeys(line for line in corpus(8 * count, seed=3).splitlines() if len(line.split()) > 5))
    pairs = [{"question": f"{lines[2 * n]} {n}", "answer": lines[2 * n + 1]} for n in range(count)]
    return pairs + pairs[:copies]


def test_pairs_are_parted_so_that_no_text_is_in_two_parts():
    given = rows(150, copies=10)
    parts = divide(Run(data=given, test_rows=50), lambda note: None)
    found = texts_of(parts)
    assert parts.real and not found["train"] & found["test"] and not found["dev"] & (found["train"] | found["test"])
    assert len(parts.train) + len(parts.dev) + len(parts.tests["held-out pairs"].queries) == 150
    assert any("10 pairs left out" in remark for remark in parts.remarks)
    (data,) = parts.tests.values()
    assert len(data.corpus) == 150, "all positives are searched, those of other parts too"


def test_real_queries_search_the_text_of_the_run(text):
    queries = [{"query": f"what is {n}", "passage": f"it is number {n} of the passages"} for n in range(25)]
    parts = divide(Run(data=text, queries=queries, test_corpus=60), lambda note: None)
    (data,) = parts.tests.values()
    assert parts.real and len(data.queries) == 25 and len(data.corpus) == 60
    asked = {text_hash(q["query"]) for q in queries}
    assert not asked & {text_hash(row["anchor"]) for row in parts.train + parts.dev}
    few = divide(Run(data=text, queries=queries[:5]), lambda note: None)
    assert any("only 5 real queries" in remark for remark in few.remarks)


def test_a_beir_folder_is_judged_on_its_other_split(real_data):
    folder = real_data("scifact")
    parts = divide(Run(data=str(folder), test_corpus=400, test_rows=20), lambda note: None)
    assert list(parts.tests) == ["dev"] and len(parts.tests["dev"].queries) == 20
    trained = {row["anchor"] for row in parts.train + parts.dev}
    assert not trained & set(parts.tests["dev"].queries.values())
    assert open_set(f"{folder}:dev").name == parts.tests["dev"].name


def test_too_little_and_the_wrong_kind(tmp_path):
    with pytest.raises(UserError, match="too little data"):
        divide(Run(data=rows(12)), lambda note: None)
    scored = [{"sentence1": f"a {n}", "sentence2": f"b {n}", "score": 0.5} for n in range(30)]
    with pytest.raises(UserError, match="scored pairs"):
        divide(Run(data=scored), lambda note: None)
