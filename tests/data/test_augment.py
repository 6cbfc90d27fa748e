"""Augmentation by words and characters: what changes, what stays, and that each new text depends on its own alone."""

import csv
import json
import re
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedtune.data.augment import (
    KINDS,
    NEIGHBOURS,
    SAME,
    TRIES,
    Augmenting,
    Made,
    characters,
    core_spans,
    crop,
    deletion,
    like,
    maker,
    swap,
    synonyms,
    word_makers,
    wordnet,
)
from embedtune.data.augmented import REPEATS_NEW, REPEATS_ROW, augment, check_out, read_sources, words_changed
from embedtune.data.clean import text_hash
from embedtune.data.labels import read_labelled
from embedtune.data.read import Counts, read_rows
from embedtune.errors import UserError

LIMITS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = st.one_of(
    st.sampled_from(["film", "Film", "the", "good,", "(great)", "don't", "GOOD", "...", "a", "ab", "straße", "日本語"]),
    st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1, max_size=8),
)
BLANKS = st.sampled_from([" ", "  ", "\t", "\n", " \n ", "\u3000"])
TEXTS = st.builds(
    lambda first, parts: first + "".join(word + blank for word, blank in parts),
    st.sampled_from(["", " ", "\n"]),
    st.lists(st.tuples(WORDS, BLANKS), max_size=12),
)
KEYS = st.integers(0, 2**64 - 1)
RATES = st.sampled_from([0.05, 0.1, 0.3, 0.7, 1.0])
LEXICON = {"film": ["movie", "motion picture"], "good": ["fine", "Good"], "great": [" ", "great"], "don't": ["do not"]}


def lexicon(word):
    return LEXICON.get(word, [])


def plain(text):
    return text.casefold().split()


def gaps(text):
    return re.split(r"\S+", text)


def many(words, rate):
    return max(1, round(rate * words))


@LIMITS
@given(TEXTS, KEYS, RATES)
def test_a_swap_moves_words_and_leaves_the_blanks(text, key, rate):
    new, words = swap(text, key, rate), text.split()
    if new is None:
        assert len(set(plain(text))) < 2 or len({word.casefold() for word in words}) < 2
        return
    assert gaps(new) == gaps(text) and sorted(new.split()) == sorted(words) and plain(new) != plain(text)
    moved = sum(a != b for a, b in zip(new.split(), words))
    assert 2 <= moved <= 2 * many(len(words), rate / 2)


@LIMITS
@given(TEXTS, KEYS, RATES)
def test_a_deletion_takes_words_with_the_blanks_before_them(text, key, rate):
    new, words = deletion(text, key, rate), text.split()
    if new is None:
        assert len(words) < 2
        return
    left = new.split()
    assert len(left) == max(1, len(words) - many(len(words), rate))
    rest = iter(words)
    assert all(word in rest for word in left), "what is left is in its order"
    assert (gaps(new)[0], gaps(new)[-1]) == (gaps(text)[0], gaps(text)[-1])
    assert not set(gaps(new)[1:-1]) - set(gaps(text)[1:-1])


@LIMITS
@given(TEXTS, KEYS, RATES)
def test_a_crop_is_a_stretch_of_the_text(text, key, rate):
    new, words = crop(text, key, rate), text.split()
    if new is None:
        assert len(words) < 2
        return
    assert new in text and new == new.strip()
    assert len(new.split()) == max(1, len(words) - many(len(words), rate))


@LIMITS
@given(TEXTS, KEYS, RATES)
def test_a_slip_changes_one_place_inside_a_word(text, key, rate):
    new, words = characters(text, key, rate), text.split()
    able = [word for first, last in core_spans(text) if len(word := text[first:last]) > 3 and word.isalpha()]
    if new is None:
        assert not able
        return
    assert able and gaps(new) == gaps(text) and plain(new) != plain(text)
    changed = [(old, now) for old, now in zip(words, new.split()) if old != now]
    assert len(changed) == min(many(len(words), rate), len(able))
    for old, now in changed:
        assert old[0] == now[0] and old[-1] == now[-1] and one_slip(old, now), (old, now)


def one_slip(old, now):
    """Whether one exchange, drop, doubling or neighbouring key makes `now` of `old`."""
    same = next(i for i, (a, b) in enumerate(zip(old + " ", now + "  ")) if a != b)
    if len(now) == len(old) - 1:
        return old[same + 1 :] == now[same:]
    if len(now) == len(old) + 1:
        return old[same:] == now[same + 1 :] and now[same] == now[same - 1]
    swapped = now[same : same + 2] == old[same : same + 2][::-1] and now[same + 2 :] == old[same + 2 :]
    beside = now[same].lower() in NEIGHBOURS.get(old[same].lower(), "") and now[same + 1 :] == old[same + 1 :]
    return swapped or beside


def test_every_kind_of_slip_happens_and_the_keyboard_is_one():
    slips = {characters("keyboard", key, 0.1) for key in range(300)}
    assert {"kyeboard", "keboard", "keeyboard", "kryboard"} <= slips
    assert set(NEIGHBOURS["g"]) == set("fhtyvb") and set(NEIGHBOURS["q"]) == set("wa")
    assert all(a in NEIGHBOURS[b] for a, others in NEIGHBOURS.items() for b in others)


@LIMITS
@given(TEXTS, KEYS, RATES)
def test_synonyms_come_from_the_lexicon_and_marks_and_capitals_stay(text, key, rate):
    new, words = synonyms(text, key, rate, lexicon), text.split()
    cores = [text[slice(*span)].casefold() for span in core_spans(text)]
    able = [n for n, core in enumerate(cores) if core in ("film", "good", "don't")]
    if new is None:
        assert not able
        return
    assert plain(new) != plain(text) and (gaps(new)[0], gaps(new)[-1]) == (gaps(text)[0], gaps(text)[-1])
    one_word = new.replace("otion picture", "otion_picture").replace("OTION PICTURE", "OTION_PICTURE")
    one_word = re.sub("do not", "do_not", one_word, flags=re.I)
    changed = [n for n, (old, now) in enumerate(zip(words, one_word.split())) if old != now]
    assert set(changed) <= set(able) and len(changed) == min(many(len(words), rate), len(able))


def test_a_synonym_takes_the_place_of_the_word_alone():
    assert synonyms('A "Good" thing', 3, 0.1, lexicon) == 'A "Fine" thing'
    assert synonyms("GOOD, bad", 3, 0.1, lexicon) == "FINE, bad"
    assert synonyms("great", 3, 0.1, lexicon) is None, "itself and blanks are no synonyms"
    assert {synonyms("film!", key, 0.1, lexicon) for key in range(20)} == {"movie!", "motion picture!"}
    assert (like("I", "we"), like("", "x"), like("aB", "xy")) == ("We", "x", "xy")


class Lemma:
    def __init__(self, name, count):
        self.name, self.count = lambda: name, lambda: count


class Synset:
    def __init__(self, **counts):
        self.lemmas = lambda: [Lemma(name, n) for name, n in counts.items()]
        self.lemma_names = lambda: list(counts)


def test_wordnet_gives_the_words_of_the_most_frequent_sense(monkeypatch):
    class Reader:
        senses = {
            "film": [Synset(coating=9, film=1), Synset(film=5, motion_picture=2, Film=0, Cinema=1)],
            "segal": [Synset(Segal=3, actor=2)],
            "movies": [Synset(movie=3, film=5)],
            "and": [Synset(conjunction=1)],
            "r": [Synset(r=1, roentgen=0)],
        }
        asked = []

        def ensure_loaded(self):
            pass

        def synsets(self, word):
            self.asked.append(word)
            return self.senses.get(word, [])

    corpus = type(sys)("nltk.corpus")
    corpus.wordnet = Reader()
    monkeypatch.setitem(sys.modules, "nltk", type(sys)("nltk"))
    monkeypatch.setitem(sys.modules, "nltk.corpus", corpus)
    known = wordnet()
    assert known("film") == ["motion picture"] and known("film") == ["motion picture"]
    assert known("movies") == [], "its synonyms would not be plural"
    assert known("segal") == [], "a name is no word"
    assert known("and") == known("r") == known("absent") == []
    assert Reader.asked == ["film", "movies", "segal", "absent"]


@pytest.mark.parametrize("error", [LookupError, OSError])
def test_without_wordnet_the_commands_to_get_it_are_said(monkeypatch, error):
    class Reader:
        def ensure_loaded(self):
            raise error("a long text")

    monkeypatch.setitem(sys.modules, "nltk", None)
    monkeypatch.setitem(sys.modules, "nltk.corpus", None)
    with pytest.raises(UserError, match="pip install nltk, then python -m nltk.downloader wordnet"):
        word_makers(Augmenting(kinds=("synonyms",)))
    corpus = type(sys)("nltk.corpus")
    corpus.wordnet = Reader()
    monkeypatch.setitem(sys.modules, "nltk.corpus", corpus)
    with pytest.raises(UserError, match="fix: python -m nltk.downloader wordnet"):
        word_makers(Augmenting(kinds=("synonyms",)))


def test_the_rate_is_the_share_of_words_that_change():
    text = " ".join(f"word{n}" for n in range(200))
    for kind in (swap, deletion, crop):
        for rate in (0.05, 0.1, 0.5):
            new = kind(text, 7, rate).split()
            moved = sum(a != b for a, b in zip(new, text.split())) if kind is swap else 200 - len(new)
            assert moved == 200 * rate


@pytest.mark.parametrize("kind", ["swap", "deletion", "crop", "characters", "synonyms"])
def test_what_a_text_gives_depends_on_it_and_the_seed_alone(kind):
    texts = [f"A good film number {n} that is {'very ' * (n % 3)}long and worth the while" for n in range(12)]

    def made(seed, order, copies=3):
        how = Augmenting(kinds=(kind,), copies=copies, seed=seed, rate=0.3)
        ordered = [texts[n] for n in order]
        return dict(zip(ordered, word_makers(how, lexicon)[kind](ordered)))

    every = made(0, range(12))
    assert made(0, range(11, -1, -1)) == every
    assert made(0, [5]) == {texts[5]: every[texts[5]]}
    assert made(1, range(12)) != every or kind == "synonyms"
    for text, each in every.items():
        assert len(each.texts) + len(each.missing) == 3 and set(each.missing) <= {SAME}
        assert len({text_hash(new) for new in (text, *each.texts)}) == 1 + len(each.texts)
    fewer = made(0, range(12), copies=1)
    assert all(each.texts == every[text].texts[:1] for text, each in fewer.items()), "more copies change no other"


def test_a_text_is_drawn_again_while_nothing_new_comes_and_never_where_nothing_can():
    asked = []

    def draw(texts, keys):
        asked.append(list(texts))
        return [
            {"never": None, "blank": " ", "alike": " ALIKE"}.get(text, f"new {key}") for text, key in zip(texts, keys)
        ]

    made = maker(draw, "swap", Augmenting(copies=2))(["never", "blank", "alike", "good"])
    assert [len(each.texts) for each in made] == [0, 0, 0, 2]
    assert made[0].missing == ("no two words that differ",) * 2 and made[2].missing == made[1].missing == (SAME,) * 2
    assert asked == [["never", "blank", "alike", "good"], ["blank", "alike", "good"], *[["blank", "alike"]] * TRIES]


def test_settings_that_cannot_be_are_collected():
    assert Augmenting().problems() == []
    found = Augmenting(kinds=("swap", "swap", "crp"), copies=0, rate=1.5).problems()
    assert len(found) == 4 and "did you mean 'crop'?" in found[0] and all(kind in found[0] for kind in KINDS)
    assert len(Augmenting(kinds=(), rate=float("nan")).problems()) == 2


# ---- files


ROWS = [
    {"text": f"A good film number {n}, worth the while", "label": n % 2, "id": f"x{n}", "tags": ["a", n]}
    for n in range(8)
]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def grown(data, out, *, columns=None, bad_rows="fail", makers=None, **how):
    """The rows that were written, and the report."""
    plan, counts = Augmenting(**how), Counts()
    check_out(data, out, force=True)
    sources = read_sources(data, columns=columns, pair=plan.pair, bad_rows=bad_rows, counts=counts)
    found = augment(sources, out, plan, makers or word_makers(plan, lexicon), counts)
    return [row.values for row in read_rows(out)], found


@pytest.mark.parametrize("form", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_only_the_text_changes(tmp_path, form):
    rows = [
        {key: value for key, value in row.items() if key != "tags" or form in (".jsonl", ".parquet")} for row in ROWS
    ]
    if form == ".parquet":
        rows = [row | {"tags": ["a", "b"]} for row in rows]
    data = jsonl(tmp_path / "in.jsonl", rows)
    written, found = grown(data, tmp_path / f"out{form}", kinds=("swap", "crop"))
    assert found.rows == found.train == 8 and found.written == len(written) == 8 + found.new
    text = form in (".csv", ".tsv")
    originals = [row for row in written if not row["augmented"]]
    assert [row["source_row"] for row in originals] == [str(n) if text else n for n in range(1, 9)]
    for row, old in zip(originals, rows):
        assert {name: row[name] for name in old} == {name: str(cell) if text else cell for name, cell in old.items()}
    for row in written:
        source = originals[int(row["source_row"]) - 1]
        same = {name: row[name] for name in row if name not in ("text", "augmented")}
        assert same == {name: source[name] for name in same}
        assert row["augmented"] in (*("swap", "crop"), "" if text else None)
        assert row is source or plain(row["text"]) != plain(source["text"])
    assert sorted(tried.made for tried in found.kinds.values()) and found.new == sum(
        tried.made for tried in found.kinds.values()
    )
    assert len({text_hash(row["text"]) for row in written}) == len(written)


def test_a_file_of_labels_is_one_afterwards(tmp_path):
    lines = [["sentence", "class", "note"], *(['Good, new; "film"', "pos", "x, y"], ["two\nlines of it", "neg", ""])]
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    written, found = grown(tmp_path / "in.csv", tmp_path / "out.csv", kinds=("swap", "deletion", "characters"))
    notes = {"1": "x, y", "2": ""}
    assert len(written) > 6 and all(row["note"] == notes[row["source_row"]] for row in written)
    labels = {row.text: row.labels[0] for row in read_labelled(tmp_path / "out.csv")}
    assert all(labels[row["sentence"]] == {"1": "pos", "2": "neg"}[row["source_row"]] for row in written)
    assert any("took the column 'sentence' as 'text'" in note for note in found.notes)


@settings(LIMITS, max_examples=40)
@given(st.lists(TEXTS.filter(str.strip), min_size=2, max_size=8), st.integers(0, 5), st.randoms())
def test_every_new_text_is_new_and_the_order_of_rows_means_nothing(tmp_path, texts, seed, draw):
    rows = [{"text": text, "label": f"{n % 2}", "id": n} for n, text in enumerate(texts)]
    other = draw.sample(rows, len(rows))
    made = []
    for some in (rows, other):
        try:
            written, found = grown(some, tmp_path / "o.jsonl", seed=seed, kinds=("deletion", "characters", "crop"))
        except UserError as error:
            assert "not one new text came out" in str(error) and not made
            return
        new = [row for row in written if row["augmented"]]
        hashes = [text_hash(row["text"]) for row in new]
        assert len(set(hashes)) == len(hashes) and not set(hashes) & {text_hash(text) for text in texts}
        assert [row["id"] for row in written if not row["augmented"]] == [row["id"] for row in some]
        for tried in found.kinds.values():
            assert tried.asked == 2 * len(rows) == tried.made + sum(tried.refused.values())
        made.append(sorted((row["text"], row["label"], row["id"], row["augmented"]) for row in new))
    assert made[0] == made[1]


def test_the_same_seed_gives_the_same_file_and_another_one_another(tmp_path):
    data = jsonl(tmp_path / "in.jsonl", ROWS)
    names = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for out, seed in zip(names, (4, 4, 5)):
        grown(data, out, seed=seed)
    a, b, c = (out.read_bytes() for out in names)
    assert a == b != c


def test_repeats_are_refused_and_counted(tmp_path):
    rows = [{"text": "one two", "label": "a"}, {"text": "TWO  one", "label": "b"}, {"text": "three two", "label": "a"}]

    def fixed(texts):
        return [Made(("Two three", "new"), ()) for _ in texts]

    written, found = grown(rows, tmp_path / "o.jsonl", kinds=("swap", "crop"), makers={
        "swap": word_makers(Augmenting())["swap"], "crop": fixed})  # fmt: skip
    assert found.kinds["swap"].refused == {REPEATS_ROW: 2, SAME: 3} and found.kinds["swap"].made == 1
    assert found.kinds["crop"].refused == {REPEATS_NEW: 5} and found.kinds["crop"].made == 1
    assert [row["text"] for row in written if row["augmented"] == "swap"] == ["two three"]


def test_only_training_rows_are_augmented(tmp_path):
    rows = [row | {"split": name} for row, name in zip(ROWS, ["train", "Train ", "dev", "test", None, "training"])]
    written, found = grown(rows, tmp_path / "o.jsonl")
    assert {row["source_row"] for row in written if row["augmented"]} == {1, 2, 6}
    assert [row["split"] for row in written if not row["augmented"]] == [
        "train",
        "Train ",
        "dev",
        "test",
        None,
        "training",
    ]
    assert found.train == 3 and found.rows == 6
    assert any("3 rows of 'dev', 'none', 'test' are kept as they are" in note for note in found.notes)
    with pytest.raises(UserError, match="has no training row: its column 'split' holds 'dev', 'test'"):
        read_sources(rows[2:4])


def test_held_out_files_are_named(tmp_path):
    for name, told in (("test.jsonl", True), ("my-dev.jsonl", True), ("latest.jsonl", False), ("train.jsonl", False)):
        _, found = grown(jsonl(tmp_path / name, ROWS), tmp_path / "o.jsonl")
        assert any("held-out data" in note for note in found.notes) is told, name
        assert "only training rows may be augmented" in found.notes[-1]


def test_only_the_new_rows(tmp_path):
    whole, _ = grown(ROWS, tmp_path / "a.jsonl")
    new, found = grown(ROWS, tmp_path / "b.jsonl", only_new=True)
    assert new == [row for row in whole if row["augmented"]] and found.written == found.new == len(new)


def test_pairs_change_in_one_text_or_in_both(tmp_path):
    rows = [
        {"premise": f"one two {n}", "hypothesis": h, "label": "x"}
        for n, h in enumerate(["three four", "five", "six seven"])
    ]
    written, _ = grown(rows, tmp_path / "a.jsonl", kinds=("swap",))
    assert len(written) > 3 and {row["hypothesis"] for row in written} == {"three four", "five", "six seven"}
    written, found = grown(rows, tmp_path / "b.jsonl", kinds=("swap",), copies=1, pair=True)
    assert [row["hypothesis"] for row in written if row["augmented"]] == ["four three", "five", "seven six"]
    assert all(row["premise"] not in {r["premise"] for r in rows} for row in written if row["augmented"])
    assert found.kinds["swap"].made == 3
    with pytest.raises(UserError, match="no column 'text_pair'"):
        read_sources(ROWS, pair=True)


def test_one_text_of_a_pair_may_stand_in_several_rows(tmp_path):
    rows = [{"text": "one two", "text_pair": pair, "label": "x"} for pair in ("a b c", "d e f")]
    written, found = grown(rows, tmp_path / "a.jsonl", kinds=("swap",), copies=1)
    assert [row["text"] for row in written] == ["one two", "two one"] * 2 and found.new == 2


def test_rows_without_a_text_are_named_or_left_out(tmp_path):
    rows = [*ROWS, {"text": " ", "label": 1}, {"text": 5, "label": 1}, {"label": 0}]
    with pytest.raises(UserError) as caught:
        read_sources(rows)
    said = str(caught.value)
    assert "3 of 11 rows cannot be used" in said and "column 'text' is empty (2): item 9, item 11" in said
    assert "holds int where a text must stand (1): item 10" in said
    written, found = grown(rows, tmp_path / "o.jsonl", bad_rows="skip")
    assert found.rows == 8 and "2 rows left out: column 'text' is empty" in found.notes


@pytest.mark.parametrize(
    ("rows", "columns", "says"),
    [
        ([{"txet": "a b", "label": 1}], None, "expected columns 'text', found 'txet', 'label'"),
        ([{"a": "a b", "label": 1}], {"text": "b"}, "no column 'b'"),
        ([{"text": "a b"}], {"txt": "b"}, "'txt' is no column of ours"),
        ([{"tokens": ["a"], "tags": ["O"]}], None, "has tokens, and tags would not fit"),
        ([{"text": "a b", "augmented": None}], None, "was it augmented before?"),
    ],
)
def test_files_of_another_kind(rows, columns, says):
    with pytest.raises(UserError, match=re.escape(says)):
        read_sources(rows, columns=columns)


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "there.csv").touch()
    for name, says in (
        ("o.txt", "known are"),
        ("o.csv.gz", "known are"),
        ("there.csv", "exists"),
        ("x/o.csv", "folder"),
    ):
        with pytest.raises(UserError, match=says):
            check_out(ROWS, tmp_path / name, force=False)
    with pytest.raises(UserError, match="lies in the folder that is read"):
        check_out(tmp_path, tmp_path / "o.csv", force=False)
    (tmp_path / "qrels").mkdir()
    for name in ("corpus.jsonl", "queries.jsonl"):
        jsonl(tmp_path / name, ROWS)
    with pytest.raises(UserError, match="is a BEIR folder"):
        read_sources(tmp_path)


def test_nothing_is_written_where_nothing_comes_out_or_a_column_has_no_type(tmp_path):
    with pytest.raises(UserError, match="not one new text came out") as caught:
        grown([{"text": "one"}], tmp_path / "o.jsonl")
    assert "swap: 2 x no two words that differ" in str(caught.value)
    mixed = [row | {"id": n if n else "x"} for n, row in enumerate(ROWS)]
    with pytest.raises(UserError, match="'tags'|'id'"):
        grown(mixed, tmp_path / "o.parquet")
    assert list(tmp_path.iterdir()) == []


def test_the_share_of_words_that_changed():
    assert words_changed("a b c d", "a b c d") == 0 and words_changed("a b", "c d") == 1
    assert words_changed("a b c d", "a c d") == 0.25
    before = " ".join(map(str, range(10)))
    assert words_changed(before, before.replace("3", "x")) == pytest.approx(0.1)
    assert words_changed(before, before.replace("3", "x y")) == pytest.approx(2 / 11)
    assert words_changed("a b c d", "d b c a") == 0.5
    long = "word " * 100_000  # compared whole it would take an hour
    assert words_changed(long, long) == 0 and words_changed(long, "x " + long) == pytest.approx(0.002)


def test_examples_and_report_are_plain_values(tmp_path):
    _, found = grown(ROWS, tmp_path / "o.jsonl", kinds=("deletion",))
    told = json.loads(json.dumps(found.as_dict()))
    assert told["kinds"]["deletion"]["asked"] == 16 and len(told["kinds"]["deletion"]["examples"]) == 3
    tried = found.kinds["deletion"]
    assert tried.changed == pytest.approx(1 / 8) and tried.measured == tried.made
    before, after = tried.examples[0]
    assert before in {row["text"] for row in ROWS} and len(after.split()) == len(before.split()) - 1
