"""Tags: CoNLL files and lists give the same sentences, schemes are told apart, and entities are never lost."""

import gzip
import json
import math
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedtune.data.read import Counts
from embedtune.data.tags import (
    Tagged,
    check_tags,
    drop_invalid,
    faults,
    is_conll,
    read_tagged,
    scheme_of,
    spans,
    to_bio,
)
from embedtune.errors import UserError

SENTENCES = [
    (("Ada", "Lovelace", "wrote", "."), ("B-person", "I-person", "O", "O")),
    (("In", "New York", "漢字", "#"), ("O", "B-place", "O", "O")),
    (("Fine",), ("O",)),
]
SCHEMES = ["BIO", "BIOES", "IO", "IOB1"]


def conll(sentences, sep="\t", between="", end="\n"):
    """The text of a CoNLL file."""
    lines = [[f"{token}{sep}{between}{tag}" for token, tag in zip(*each)] + [""] for each in sentences]
    return end.join(line for each in lines for line in each)


def write(folder, name, text):
    path = folder / name
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def plain(rows):
    return [(row.tokens, row.tags) for row in rows]


def rows_of(*tags):
    return [Tagged(("x",) * len(each), each, "the list", n) for n, each in enumerate(tags, 1)]


def said(call, *given, **options):
    with pytest.raises(UserError) as caught:
        found = call(*given, **options)
        list(found)
    assert caught.value.where and caught.value.fix
    return str(caught.value)


@pytest.mark.parametrize(
    "name", [*(f"a.{end}" for end in ("conll", "bio", "iob", "iob2", "bioes", "txt", "tsv")), "A.CONLL", "a.tsv.gz"]
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_files_of_tokens_and_tags(tmp_path, name, end):
    path, counts = write(tmp_path, name, conll(SENTENCES, end=end)), Counts()
    assert is_conll(path) and is_conll(str(path))
    found = list(read_tagged(str(path), counts=counts))
    assert plain(found) == SENTENCES
    assert [row.number for row in found] == [1, 6, 11] and found[1].place(2) == f"{path}, line 8"
    assert (counts.rows, counts.used, counts.files, counts.notes) == (3, 3, [str(path)], [])
    assert counts.bytes == len(conll(SENTENCES, end=end).encode())


def test_blanks_other_columns_and_a_file_that_just_ends(tmp_path):
    one_word = [(tuple(token.replace(" ", "") for token in tokens), tags) for tokens, tags in SENTENCES]
    for sep, between in ((" ", ""), ("   ", ""), (" ", "NN I-NP "), ("\t", "NN\t_\t")):
        text = conll(one_word, sep=sep, between=between).rstrip("\n")
        assert plain(read_tagged(write(tmp_path, "a.txt", text))) == one_word
    blank_lines = "\n\n \t\n" + conll(SENTENCES).replace("\n\n", "\n  \n\n") + "\n\n"
    assert plain(read_tagged(write(tmp_path, "b.conll", blank_lines))) == SENTENCES
    marked = "\ufeff" + conll(SENTENCES)
    assert plain(read_tagged(write(tmp_path, "c.conll", marked))) == SENTENCES
    trailing = conll(SENTENCES).replace("\tO", "\tO ")
    assert plain(read_tagged(write(tmp_path, "d.conll", trailing))) == SENTENCES


def test_document_lines_and_comments_are_left_out_and_counted(tmp_path):
    tabs = write(tmp_path, "b.conll", "-DOCSTART-\tO\n\nx\tO\n\n# Vitamin B-12\ny z\tO\n-DOCSTART- O\nx\tO\n")
    assert plain(read_tagged(tabs)) == [(("x",), ("O",)), (("y z",), ("O",)), (("x",), ("O",))]
    text = "-DOCSTART- -X- O O\n\n# id = 1\n# text = Vitamin B-12\nVitamin NN O B-drug\nB-12 NN O I-drug\n\n"
    text += "-DOCSTART- -X- O O\n# O O O\n# NN O B-sign\nx NN O O\n-DOCSTART- -X- O O\nlast NN O O"
    path, counts = write(tmp_path, "a.conll", text), Counts()
    found = list(read_tagged(path, counts=counts))
    assert plain(found) == [
        (("Vitamin", "B-12"), ("B-drug", "I-drug")),
        (("#", "#", "x"), ("O", "B-sign", "O")),
        (("last",), ("O",)),
    ]
    assert [row.number for row in found] == [5, 9, 13]
    assert counts.notes == [f"{path}: left out 3 -DOCSTART- lines and 2 comment lines"]
    assert counts.rows == counts.used == 3


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "list", "jsonl.gz"])
def test_rows_of_lists(tmp_path, ending):
    rows = [{"tokens": list(tokens), "tags": list(tags)} for tokens, tags in SENTENCES]
    path, counts = tmp_path / f"a.{ending}", Counts()
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ending != "list":
        write(tmp_path, path.name, "".join(json.dumps(row) + "\n" for row in rows))
    found = list(read_tagged(rows if ending == "list" else path, counts=counts))
    assert plain(found) == SENTENCES and [row.number for row in found] == [1, 2, 3]
    place = {"list": "the list, item 2", "parquet": f"{path}, row 2"}.get(ending, f"{path}, line 2")
    assert found[1].place(2) == f"{place}, token 3" and counts.notes == []


@pytest.mark.parametrize("tokens, tags", [("words", "labels"), ("Tokens", "NER_Tags"), ("words", "ner")])
def test_synonyms_and_columns_by_the_users_names(tokens, tags):
    counts = Counts()
    assert plain(read_tagged([{"id": 1, tags: ["O"], tokens: ["a"]}], counts=counts)) == [(("a",), ("O",))]
    assert len(counts.notes) == 2
    assert plain(read_tagged([{tags: [np.str_("O")], tokens: [np.str_("a")]}])) == [(("a",), ("O",))]
    columns = {"tokens": "a", "tags": "b"}
    assert plain(read_tagged([{"b": ["O"], "a": ["x"], "tokens": 1}], columns=columns)) == [(("x",), ("O",))]
    assert "no column 'tags'" in said(read_tagged, [{"tokens": ["a"], "pos": ["O"]}])
    with pytest.raises(UserError, match="'text' is no column of ours; there are tokens, tags"):
        list(read_tagged([{"tokens": ["a"], "tags": ["O"]}], columns={"text": "tokens"}))


def test_hub_datasets_by_a_local_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    rows = [{"tokens": list(tokens), "ner_tags": list(tags)} for tokens, tags in SENTENCES]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set" / "train.parquet")
    assert plain(read_tagged(f"hub:{tmp_path}/set")) == SENTENCES


def test_a_folder_reads_each_file_as_what_it_is(tmp_path):
    write(tmp_path, "a.tsv", conll(SENTENCES[:2]))
    write(tmp_path, "b.jsonl", json.dumps({"tokens": ["Fine"], "tags": ["O"]}))
    write(tmp_path, "README", "x")
    counts = Counts()
    assert plain(read_tagged(tmp_path, counts=counts)) == SENTENCES
    assert counts.ignored == [str(tmp_path / "README")] and counts.rows == 3


def test_what_is_no_file_of_tokens_and_tags(tmp_path):
    for name, text in {
        "a.txt": "A line of text\nand another one\nAnd so did I\n",
        "b.tsv": "text\tlabel\nfine\tO\n" + "a whole sentence\tB\n" * 50,
        "c.tsv": "tokens\ttags\n" + "x\ty\n" * 9,
        "d.txt": "",
        "e.jsonl": "{}",
    }.items():
        assert not is_conll(write(tmp_path, name, text))
    assert not is_conll([("a", "O")]) and not is_conll("hub:a.conll") and not is_conll(tmp_path)
    assert not is_conll(tmp_path / "missing.txt")
    assert "expected columns 'tokens', 'tags', found 'text'" in said(read_tagged, tmp_path / "a.txt")
    assert "cannot be read: No such file" in said(read_tagged, tmp_path / "missing.conll")
    assert "is empty" in said(read_tagged, tmp_path / "d.txt")
    assert "has no sentences" in said(read_tagged, write(tmp_path, "f.conll", "\n\n-DOCSTART- O\n"))
    (tmp_path / "g.conll").write_bytes("a\tO\n".encode("utf-16"))
    assert "is UTF-16, not UTF-8" in said(read_tagged, tmp_path / "g.conll")


def test_lines_that_cannot_be_used_are_said_together(tmp_path):
    bad = "good\tO\n\nB-12 B-12\nx\t\n\tO\n \tB-a\n\ny\tPER\nz\tb-per\nx\tO\n\nend\tO-x\n"
    path = write(tmp_path, "a.conll", bad)
    text = said(read_tagged, path)
    assert "3 of 4 rows cannot be used" in text
    assert "a token without a tag (2): line 3, line 4" in text and "an empty token (2): line 5, line 6" in text
    assert "a tag of no known form (3): line 8: 'PER', line 9: 'b-per', line 12: 'O-x'" in text
    counts = Counts()
    assert plain(read_tagged(path, bad_rows="skip", counts=counts)) == [(("good",), ("O",))]
    assert counts.rows == 4 and counts.rejected == {"a token without a tag": 1, "a tag of no known form": 2}
    assert counts.examples["a token without a tag"] == [f"{path}, line 3"]


BAD = [
    ("the numbers of tokens and tags differ", {"tokens": ["a", "b"], "tags": ["O"]}, "item 2: 2 and 1"),
    ("column 'tokens' is empty", {"tokens": [], "tags": []}, "item 4"),
    ("column 'tags' is empty", {"tokens": ["a"], "tags": None}, "item 6"),
    ("column 'tokens' holds str where a list must stand", {"tokens": "a b", "tags": ["O"]}, "item 8"),
    ("an empty token", {"tokens": ["a", " "], "tags": ["O", "O"]}, "item 10, token 2"),
    ("an empty token", {"tokens": [None], "tags": ["O"]}, "item 12, token 1"),
    ("int where a token must stand", {"tokens": [7], "tags": ["O"]}, "item 14, token 1"),
    ("a token without a tag", {"tokens": ["a"], "tags": [""]}, "item 16, token 1"),
    ("tags that are numbers", {"tokens": ["a", "b"], "tags": [0, np.int64(3)]}, "item 18, token 1, item 18, token 2"),
    ("a tag of no known form", {"tokens": ["a"], "tags": ["B_x"]}, "item 20, token 1: 'B_x'"),
]


def test_rows_that_cannot_be_used_are_said_together():
    rows = [row for _, bad, _ in BAD for row in ({"tokens": ["good"], "tags": ["O"]}, bad)]
    text = said(read_tagged, rows)
    for what, _, spot in BAD:
        (line,) = [line for line in text.splitlines() if what in line]
        assert spot in line
    assert "10 of 20 rows cannot be used" in text and "names of the tags" in text
    counts = Counts()
    assert len(list(read_tagged(rows, bad_rows="skip", counts=counts))) == 10
    assert sum(counts.rejected.values()) == 10


def test_bad_bytes_are_those_of_any_read(tmp_path):
    path = tmp_path / "a.conll"
    path.write_bytes("fine\tO\n\nun\tO\ncafé\tO\n\nlast\tO\n".encode("latin-1") + b"nul\0\tB-x\n")
    assert "line 3 (line 4, byte " in said(read_tagged, path) and "looks like latin-1" in said(read_tagged, path)
    counts = Counts()
    assert plain(read_tagged(path, bad_rows="skip", counts=counts)) == [(("fine",), ("O",))]
    assert counts.rejected == {"not UTF-8": 1, "NUL": 1}
    counts = Counts()
    found = plain(read_tagged(path, bad_rows="replace", counts=counts))
    assert [tokens for tokens, _ in found] == [("fine",), ("un", "caf\ufffd"), ("last", "nul\ufffd")]
    assert counts.replaced == {"not UTF-8": 1, "NUL": 1} and counts.used == counts.rows == 3


# Schemes.


def written(entities, length, scheme):
    """Tags that a scheme has for entities (type, start, stop)."""
    tags = ["O"] * length
    for number, (kind, start, stop) in enumerate(entities):
        after_same = number and entities[number - 1][0] == kind and entities[number - 1][2] == start
        for place in range(start, stop):
            letter = "I"
            if scheme == "BIOES":
                letter = "S" if stop - start == 1 else "B" if place == start else "E" if place == stop - 1 else "I"
            elif place == start and (scheme == "BIO" or (scheme == "IOB1" and after_same)):
                letter = "B"
            tags[place] = f"{letter}-{kind}"
    return tags


@st.composite
def annotations(draw):
    """Entities in order, and the length of their sentence."""
    entities, place = [], 0
    for _ in range(draw(st.integers(0, 6))):
        start = place + draw(st.integers(0, 2))
        place = start + draw(st.integers(1, 4))
        entities.append((draw(st.sampled_from(["per", "loc", "a-b"])), start, place))
    return entities, place + draw(st.integers(0, 2))


def merged(entities):
    """IO cannot tell neighbours of one type apart."""
    out = []
    for kind, start, stop in entities:
        if out and out[-1][0] == kind and out[-1][2] == start:
            out[-1] = (kind, out[-1][1], stop)
        else:
            out.append((kind, start, stop))
    return out


@given(annotations(), st.sampled_from(SCHEMES))
def test_every_scheme_has_the_same_entities(annotation, scheme):
    entities, length = annotation
    tags = written(entities, length, scheme)
    if scheme == "IO":
        entities = merged(entities)
    assert spans(tags) == entities and faults(tags, scheme) == []
    bio = to_bio(tags, scheme)
    assert bio == tuple(written(entities, length, "BIO")) and faults(bio, "BIO") == []


@given(annotations())
def test_other_spellings_of_bioes(annotation):
    entities, length = annotation
    tags = written(entities, length, "BIOES")
    bilou = [tag.replace("E-", "L-", 1).replace("S-", "U-", 1) if tag[0] in "ES" else tag for tag in tags]
    bmes = [tag.replace("I-", "M-", 1) if tag[0] == "I" else tag for tag in tags]
    for other in (bilou, bmes):
        assert spans(other) == entities and faults(other, "BIOES") == []
        assert to_bio(other, "BIOES") == to_bio(tags, "BIOES")
        assert scheme_of([other]) == scheme_of([tags])


def test_reading_says_that_other_spellings_are_bioes(tmp_path):
    counts = Counts()
    rows = [{"tokens": ["a", "b", "c"], "tags": ["B-x", "L-x", "U-y"]}]
    (row,) = read_tagged(rows, counts=counts)
    assert row.tags == ("B-x", "L-x", "U-y") and to_bio(row.tags, "BIOES") == ("B-x", "I-x", "B-y")
    assert counts.notes == ["the list: tags are read as BIOES (L as E, U as S)"]


@settings(max_examples=60)
@given(st.lists(annotations(), min_size=20, max_size=30), st.sampled_from(SCHEMES))
def test_the_scheme_is_found(annotations, scheme):
    tags = [written(*annotation, scheme) for annotation in annotations]
    letters = {tag[0] for each in tags for tag in each}
    if scheme == "IOB1" and "B" not in letters:
        scheme = "IO"  # which is read in the same way
    if letters <= {"O"} or (scheme == "BIOES" and not letters & {"E", "S"}):
        scheme = "BIO"
    assert scheme_of(tags) == scheme


@pytest.mark.parametrize(
    "tags, scheme",
    [
        ([], "BIO"), ([["O", "O"]], "BIO"), ([["B-a", "O"]], "BIO"), ([["I-a", "O"]], "IO"), ([["S-a"]], "BIOES"),
        ([["B", "I", "O", "B"]], "BIO"), ([["I-a", "B-a", "I-b"]], "IOB1"),
        ([["B-a", "I-a"]] * 9 + [["O", "I-a"]] * 2, "BIO"),  # a mistake or two
        ([["I-a", "B-a"]] * 9 + [["O", "B-a"]] * 2, "IOB1"),
    ],
)  # fmt: skip
def test_schemes(tags, scheme):
    assert scheme_of(tags) == scheme


@pytest.mark.parametrize(
    "scheme, tags, expected",
    [
        ("BIO", "O I-a I-a B-b I-a", [(1, "'I-a' after 'O'"), (4, "'I-a' after 'B-b'")]),
        ("BIO", "I-a", [(0, "'I-a' at the start of a sentence")]),
        ("BIO", "S-a O", [(0, "'S-a' is no tag of BIO")]),
        ("BIO", "B-a B-a I-a O B-b I-b", []),
        ("IO", "I-a I-b B-b", [(2, "'B-b' is no tag of IO")]),
        ("IOB1", "B-a I-a B-a B-b O B-b", [(0, "'B-a' at the start of a sentence"), (3, "'B-b' after 'B-a'"),
                                           (5, "'B-b' after 'O'")]),
        ("BIOES", "B-a O", [(1, "'O' after 'B-a'")]),
        ("BIOES", "B-a I-a", [(1, "'I-a' at the end of a sentence")]),
        ("BIOES", "E-a S-a I-a", [(0, "'E-a' at the start of a sentence"), (2, "'I-a' after 'S-a'"),
                                  (2, "'I-a' at the end of a sentence")]),
        ("BIOES", "B-a E-b B-a S-a", [(1, "'E-b' after 'B-a'"), (3, "'S-a' after 'B-a'")]),
        ("BIOES", "B-a I-a E-a S-b S-b O B-a E-a", []),
    ],
)  # fmt: skip
def test_what_a_scheme_does_not_allow(scheme, tags, expected):
    assert faults(tags.split(), scheme) == expected


def test_invalid_tags_are_said_together(tmp_path):
    path = write(tmp_path, "a.conll", "a\tO\nb\tI-x\n\nc\tB-x\nd\tI-y\n\ne\tO\nf\tI-x\n")
    rows = list(read_tagged(path))
    text = said(check_tags, rows, "BIO", str(path))
    assert "3 tags break the rules of BIO" in text and "each entity begins with B-TYPE" in text
    assert "'I-x' after 'O' (2): line 2, line 8" in text and "'I-y' after 'B-x' (1): line 5" in text
    check_tags(rows[:0], "BIO", "a")
    counts = Counts(rows=4, used=4)
    kept = drop_invalid([*rows, *rows_of(("O", "B-x"))], "BIO", counts)
    assert plain(kept) == [(("x", "x"), ("O", "B-x"))] and counts.used == 1
    assert counts.rejected == {"tags that break the rules of BIO": 3}
    assert counts.examples["tags that break the rules of BIO"][0] == f"{path}, line 2"
    many = [(f"I-{n}",) for n in range(30)]
    assert "and 20 more" in said(check_tags, rows_of(*many), "BIO", "a")


# Entities as the reference reads them.


@pytest.mark.parametrize("letters", ["BIO", "BIOES", "IO"])
def test_entities_are_those_of_seqeval(letters):
    labelling = pytest.importorskip("seqeval.metrics.sequence_labeling", reason="seqeval is not installed")
    draw = random.Random(0)
    ill_formed = 0
    for _ in range(1000):
        types = draw.sample(["per", "loc", "a-b", "misc"], draw.randint(1, 4))
        tags = [
            "O" if draw.random() < 0.3 else f"{draw.choice(letters)}-{draw.choice(types)}".replace("O-", "B-")
            for _ in range(draw.randint(0, 20))
        ]
        ill_formed += bool(faults(tags, "BIOES" if "E" in letters else "BIO"))
        expected = [(kind, start, end + 1) for kind, start, end in labelling.get_entities(tags)]
        assert spans(tags) == expected, tags
    assert ill_formed > 500


def test_bare_letters_have_no_type():
    tags = ["B", "I", "O", "B", "B"]
    assert spans(tags) == [("_", 0, 2), ("_", 3, 4), ("_", 4, 5)]
    assert to_bio(["I", "I", "O", "I"], "IO") == ("B", "I", "O", "B")


TAGS = st.lists(st.sampled_from(["O", "B-a", "I-a", "E-a", "S-a", "B-b", "I-b", "L-b", "U-a", "M-a", "I"]), max_size=12)


@given(TAGS)
def test_any_tags_become_valid_bio_with_the_same_entities(tags):
    found = spans(tags)
    assert all(0 <= start < stop <= len(tags) for _, start, stop in found)
    assert all(a[2] <= b[1] for a, b in zip(found, found[1:])), "in order, apart"
    assert sum(stop - start for _, start, stop in found) == sum(tag != "O" for tag in tags), "no tag is lost"
    bio = to_bio(tags, "BIOES")
    assert spans(bio) == found and faults(bio, "BIO") == []


HOSTILE = [None, "", " ", "\0", "\ud800", "O", "B-a", "I-", "x" * 9999, 3, math.nan, [], ["O"], {}, b"O"]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                name: st.sampled_from(HOSTILE) | st.lists(st.sampled_from(HOSTILE), max_size=3)
                for name in ("tokens", "tags")
            }
        ),
        max_size=8,
    )
)
def test_no_row_is_lost_or_breaks_the_reading(rows):
    counts = Counts()
    found = list(read_tagged([{"tokens": ["a"], "tags": ["O"]}, *rows], bad_rows="skip", counts=counts))
    assert counts.rows == len(rows) + 1 and counts.used == len(found)
    assert counts.rows == counts.used + sum(counts.rejected.values())
    assert all(len(row.tokens) == len(row.tags) > 0 for row in found)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="a#\t \nOB-x\r\0é\u2028", max_size=60))
def test_no_text_breaks_the_reading(tmp_path_factory, text):
    path, counts, found = tmp_path_factory.mktemp("t") / "a.conll", Counts(), []
    path.write_text(text, newline="")
    try:
        found = list(read_tagged(path, bad_rows="skip", counts=counts))
    except UserError as error:
        assert error.where and error.fix
    assert counts.used == len(found) and counts.rows == counts.used + sum(counts.rejected.values())
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for row in found:
        for place, token in enumerate(row.tokens):
            assert lines[row.number - 1 + place].startswith(token), "a token's line is known"


@pytest.mark.parametrize(
    "name, sentences, entities",
    [("wnut17/train.conll", 3394, 1975), ("bc5cdr/train.tsv", 4560, 9385), ("bc5cdr/test.tsv", 4797, 9809)],
)
def test_real_data(real_data, name, sentences, entities):
    path, counts = real_data(name), Counts()
    rows = list(read_tagged(path, counts=counts))
    assert is_conll(path) and len(rows) == counts.rows == sentences and counts.notes == []
    assert scheme_of(row.tags for row in rows) == "BIO"
    check_tags(rows, "BIO", name)
    assert sum(len(spans(row.tags)) for row in rows) == entities
    lines = path.read_text(encoding="utf-8").split("\n")
    assert all(
        lines[row.number - 1 + n] == f"{row.tokens[n]}\t{row.tags[n]}" for row in rows for n in (0, -1 % len(row.tags))
    )
