"""Cleaning: what is dropped repeats what is kept, what is kept stays as it was, and every row is accounted for."""

import csv
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedtune.data.clean import shingles, text_hash
from embedtune.data.read import Counts, read_rows, read_texts
from embedtune.data.tidy import clean
from embedtune.errors import UserError

LONG = "one two three four five six seven eight nine ten eleven twelve"
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(["", " ", "\ufeffmark", LONG, LONG.upper(), LONG + " thirteen", "other", "Other "]),
        st.sampled_from(['"quoted", cell', "a\tb", "a\nb", "c\rd"]),
        st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=20),
    ),
    min_size=1,
    max_size=20,
)
LIMITS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows_of(path):
    return [row.values for row in read_rows(path)]


def accounted(cleaned):
    return cleaned.rows == cleaned.kept + sum(cleaned.dropped.values())


def near(a, b):
    x, y = shingles(a), shingles(b)
    return text_hash(a) == text_hash(b) or len(x & y) / len(x | y) >= 0.8


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_text_keeps_its_documents(tmp_path):
    data = write(tmp_path / "a.txt", f"{LONG}\nshort\n\n\nSHORT\n  last \n\n{LONG} 13\n\nend\n")
    cleaned = clean(data, tmp_path / "b.txt")
    assert (tmp_path / "b.txt").read_text() == f"{LONG}\nshort\n\n  last \n\nend\n"
    assert cleaned.dropped == {"blank": 4, "exact repeat": 1, "near repeat": 1}
    assert cleaned.examples["exact repeat"] == [f"{data}, line 5 (as line 2)"]
    assert cleaned.examples["near repeat"] == [f"{data}, line 8 (as line 1)"]
    assert (cleaned.rows, cleaned.kept, cleaned.documents) == (10, 4, 3) and accounted(cleaned)
    assert [row.document for row in read_texts(tmp_path / "b.txt")] == [0, 0, 1, 2]
    assert "4 blank" in "\n".join(cleaned.lines()) and json.dumps(cleaned.as_dict())


@LIMITS
@given(TEXTS)
def test_every_row_is_kept_or_repeats_one_that_is(tmp_path, texts):
    out = tmp_path / "out.jsonl"
    data = [{"text": text, "number": i} for i, text in enumerate(texts)]
    if not any(text.strip() for text in texts):
        with pytest.raises(UserError, match="no usable row"):
            clean(data, out, force=True)
        return
    cleaned = clean(data, out, force=True)
    kept = rows_of(out)
    assert accounted(cleaned) and cleaned.kept == len(kept)
    assert kept == [data[row["number"]] for row in kept], "kept rows are as they were, in their order"
    numbers = {row["number"] for row in kept}
    for row in data:
        earlier = [other["text"] for other in kept if other["number"] < row["number"]]
        if row["number"] in numbers:
            assert not any(near(row["text"], text) for text in earlier)
        elif row["text"].strip():
            assert any(near(row["text"], text) for text in earlier)


@LIMITS
@given(TEXTS, st.sampled_from(["jsonl", "csv", "tsv", "txt"]))
def test_every_format_gives_the_same_texts_back_and_cleaning_again_changes_nothing(tmp_path, texts, form):
    if not any(text.strip() for text in texts):
        return
    out, again = tmp_path / f"out.{form}", tmp_path / f"again.{form}"
    cleaned = clean([{"text": text} for text in texts], out, force=True)
    found = [row.values["text"] for row in read_texts(out)]
    plain = [" ".join(text.split()) for text in found]
    expected = list(dict.fromkeys(text_hash(text) for text in texts if text.strip()))
    assert len(found) == cleaned.kept
    assert [text_hash(text) for text in plain] == [h for h in expected if h in set(map(text_hash, plain))]
    second = clean(out, again, force=True)
    assert second.kept == cleaned.kept and set(second.dropped) <= {"blank"}
    assert [row.values["text"] for row in read_texts(again)] == found


def test_pairs_repeat_each_other_when_both_sides_do(tmp_path):
    pairs = [
        {"question": LONG, "answer": "first answer", "id": 1},
        {"question": LONG, "answer": "second answer", "id": 2},
        {"question": "another question", "answer": "first answer", "id": 3},
        {"question": LONG + " more", "answer": "First  answer", "id": 4},
        {"question": "another question", "answer": "first answer", "id": 5},
    ]
    cleaned = clean(pairs, tmp_path / "out.jsonl")
    assert [row["id"] for row in rows_of(tmp_path / "out.jsonl")] == [1, 2, 3]
    assert cleaned.dropped == {"near repeat": 1, "exact repeat": 1}
    assert cleaned.compared == ["question", "answer"]
    assert "rows are compared by 'question' and 'answer'" in " ".join(cleaned.notes)
    only = clean(pairs, tmp_path / "only.jsonl", near=None)
    assert [row["id"] for row in rows_of(tmp_path / "only.jsonl")] == [1, 2, 3, 4] and only.near is None


def test_rows_that_differ_in_their_negatives_both_stay(tmp_path):
    rows = [{"anchor": "a", "positive": "b", "negative_1": text} for text in ("c", "d", "d")]
    clean(rows, tmp_path / "out.jsonl")
    assert [row["negative_1"] for row in rows_of(tmp_path / "out.jsonl")] == ["c", "d"]


def test_empty_cells_and_pairs_of_one_text(tmp_path):
    rows = [
        {"anchor": "a", "positive": ""},
        {"anchor": "a", "positive": None},
        {"anchor": "b", "positive": "c"},
        {"anchor": " ", "positive": ""},
        {"anchor": "d", "positive": "D "},
        {"anchor": "e", "positive": ["f", "g"]},
    ]
    kept = clean(rows, tmp_path / "kept.jsonl")
    assert kept.dropped == {"blank": 1, "exact repeat": 1}
    assert [note for note in kept.notes if "drop-empty" in note] == [
        "2 rows kept: empty cell; --drop-empty leaves them out",
        "1 rows kept: same text on both sides; --drop-empty leaves them out",
    ]
    dropped = clean(rows, tmp_path / "dropped.jsonl", drop_empty=True)
    assert dropped.dropped == {"empty cell": 2, "blank": 1, "same text on both sides": 1} and accounted(dropped)
    assert [row["anchor"] for row in rows_of(tmp_path / "dropped.jsonl")] == ["b", "e"]
    with pytest.raises(UserError, match="item 2: column 'positive' holds int where a text must stand"):
        clean([{"anchor": "a", "positive": "b"}, {"anchor": "a", "positive": 7}], tmp_path / "x.jsonl")
    skipped = clean(
        [{"anchor": "a", "positive": "b"}, {"anchor": "a", "positive": 7}], tmp_path / "x.jsonl", bad_rows="skip"
    )
    assert skipped.dropped == {"not text": 1} and accounted(skipped)


def test_contrary_labels_are_said(tmp_path):
    rows = [{"text": "same", "label": 1}, {"text": "Same", "label": 0}, {"text": "same", "label": 1}]
    assert "1 of the rows dropped have another label" in " ".join(clean(rows, tmp_path / "a.csv").notes)
    rows = [{"text": "other"}, {"text": "same"}, {"text": "same", "label": 1}, {"text": "other"}]
    assert "1 of the rows dropped have another label" in " ".join(clean(rows, tmp_path / "b.csv").notes)


def test_values_survive_in_csv(tmp_path):
    rows = [{"text": 'a "b", c\nd', "n": 1, "deep": {"x": [1, None]}}, {"text": "e", "more": "ü"}]
    cleaned = clean(rows, tmp_path / "a.csv")
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert found == [
        {"text": 'a "b", c\nd', "n": "1", "deep": '{"x": [1, null]}', "more": ""},
        {"text": "e", "n": "", "deep": "", "more": "ü"},
    ]
    assert cleaned.bytes == (tmp_path / "a.csv").stat().st_size
    text = clean(rows, tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == 'a "b", c d\n\ne\n'
    assert "1 texts had line ends" in " ".join(text.notes) and "no room for columns" in " ".join(text.notes)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.parquet", "a", "a.docx"])
def test_endings_that_are_not_written(tmp_path, name):
    with pytest.raises(UserError, match=r"cannot be written; known are \.txt"):
        clean(["a"], tmp_path / name)


def test_refusals_leave_nothing_behind(tmp_path):
    data = write(tmp_path / "a.txt", "a\nb\n")
    before = sorted(path.name for path in tmp_path.iterdir())
    for out, options, message in (
        (data, {}, "exists already"),
        (tmp_path / "no" / "b.txt", {}, "its folder does not exist"),
        (tmp_path, {"force": True}, "known are"),
        (tmp_path / "b.txt", {"near": 0.0}, "must be above 0 and at most 1"),
        (tmp_path / "b.txt", {"columns": {"text": "txt"}}, "has no column 'txt'.*did you mean 'text'"),
        (tmp_path / "b.txt", {"columns": {"txet": "text"}}, "no column of ours.*did you mean 'text'"),
        (tmp_path / "b.jsonl", {"columns": {"anchor": "text"}}, "no column is called 'positive' or the like"),
    ):
        with pytest.raises(UserError, match=message):
            clean(data, out, **options)
    with pytest.raises(UserError, match="holds one text a line"):
        clean([{"anchor": "a", "positive": "b"}], tmp_path / "b.txt")
    with pytest.raises(UserError, match="has no column of texts"):
        clean([{"a": 1}], tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="line 2: has a NUL"):
        clean(write(tmp_path / "a.txt", "a\nb\0\n"), tmp_path / "b.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_file_may_be_cleaned_in_place_but_not_into_the_folder_that_is_read(tmp_path):
    data = write(tmp_path / "a.txt", "a\nA\nb\n")
    clean(data, data, force=True)
    assert data.read_text() == "a\nb\n"
    with pytest.raises(UserError, match="lies in the folder that is read"):
        clean(tmp_path, tmp_path / "b.txt")
    with pytest.raises(UserError, match="lies in the folder that is read"):
        clean(tmp_path, tmp_path / "." / "b.txt")


def test_data_that_changes_between_the_two_readings(tmp_path, monkeypatch):
    from embedtune.data import tidy

    data = write(tmp_path / "a.txt", "a\nb\n")
    real = tidy._survey

    def then_change(*args):
        found = real(*args)
        write(data, "a\nb\nc\n")
        return found

    monkeypatch.setattr(tidy, "_survey", then_change)
    with pytest.raises(UserError, match="changed while it was read"):
        clean(data, tmp_path / "b.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path, monkeypatch):
    import errno

    from embedtune.data.tidy import Writer

    def full(self, line):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Writer, "_put", full)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        clean(["a", "b"], tmp_path / "b.txt")
    assert not list(tmp_path.iterdir())


def test_several_files_of_different_kinds(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "a.txt", "a\nb\n")
    write(folder / "b.jsonl", '{"text": "B"}\n"c"\n')
    clean(folder, tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text() == "a\nb\n\nc\n"
    write(folder / "c.csv", "question,answer\nq,a\n")
    with pytest.raises(UserError, match="has 2 columns of texts, the files before it 1"):
        clean(folder, tmp_path / "out.jsonl")


def test_hostile_texts(tmp_path):
    rows = [
        {"text": "\ufefftext", "\ud800": 1},
        {"text": "a\u2028b\u0085c\x0bd"},
        {"text": "=1+1\r\n;" * 3},
        {"text": "x" * 1_000_000},
        {"text": "\u202e right to left"},
    ]
    for form in ("jsonl", "csv", "tsv", "txt"):
        cleaned = clean(rows, tmp_path / f"a.{form}")
        found = [row.values["text"] for row in read_texts(tmp_path / f"a.{form}", bad_rows="skip")]
        assert cleaned.kept == 5 == len(found) and found[0] == "\ufefftext" and found[3] == "x" * 1_000_000


def test_beir_folders_are_named(tmp_path):
    for name in ("corpus", "queries"):
        write(tmp_path / f"{name}.jsonl", '{"_id": "1", "text": "a"}\n')
    with pytest.raises(UserError, match="is a BEIR folder"):
        clean(tmp_path, tmp_path.parent / "x.jsonl")


def test_real_hostile_files(real_data, tmp_path):
    for source, options in (
        ("blns/blns.txt", {}),
        ("utf8_stress", {"bad_rows": "skip"}),
        ("utf8_stress", {"bad_rows": "replace"}),
    ):
        for form in ("jsonl", "csv", "tsv", "txt"):
            cleaned = clean(real_data(source), tmp_path / f"a.{form}", force=True, **options)
            counts = Counts()
            assert accounted(cleaned) and cleaned.kept == len(list(read_texts(tmp_path / f"a.{form}", counts=counts)))


def test_no_message_quotes_the_text(tmp_path):
    secret = "Jane-Doe-has-gout"
    cleaned = clean([secret, secret, f"{LONG} {secret}", f"{LONG} {secret} "], tmp_path / "a.jsonl")
    assert secret not in "\n".join(cleaned.lines())
