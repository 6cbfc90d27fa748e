import json

import pytest

from embedtune.cli import run
from embedtune.data.labels import Labelled
from embedtune.data.read import Counts
from embedtune.enrich.classes import class_pairs
from embedtune.errors import UserError


def rows(classes: str) -> list[Labelled]:
    return [Labelled(f"text {n}", None, (name,), "train.csv", n, None) for n, name in enumerate(classes, 1)]


def test_scores_say_whether_the_classes_are_the_same_and_no_pair_comes_twice():
    data, tally = rows("aaabbc"), Counts()
    label = {row.text: row.labels[0] for row in data}
    made = list(class_pairs(data, 8, 0, tally))
    assert all(pair["score"] == float(label[pair["sentence1"]] == label[pair["sentence2"]]) for pair in made)
    keys = [frozenset((pair["sentence1"], pair["sentence2"])) for pair in made]
    assert len(set(keys)) == len(keys) and all(len(key) == 2 for key in keys)
    assert tally.rows == len(made) + sum(tally.rejected.values())
    # Every pair of the 3 + 1 inside classes, and most of the 11 across them, in eight rounds.
    assert sum(pair["score"] for pair in made) == 4 and len(made) > 12


def test_the_seed_decides_and_a_lone_text_gives_only_pairs_across():
    data = rows("aab" * 10 + "c")
    once, again, other = (list(class_pairs(data, 2, seed, Counts())) for seed in (0, 0, 1))
    assert once == again != other
    assert {pair["score"] for pair in once if "text 31" in (pair["sentence1"], pair["sentence2"])} == {0.0}


@pytest.mark.parametrize("classes", ["aaa", "abc", ""])
def test_what_gives_no_pairs_of_both_scores_is_refused(classes):
    with pytest.raises(UserError):
        list(class_pairs(rows(classes), 1, 0, Counts()))


def test_the_command_writes_pairs_that_fit_scored_reads(tmp_path, capsys):
    source, out = tmp_path / "train.csv", tmp_path / "pairs.jsonl"
    source.write_text("text,label\n" + "".join(f"text {n},{n % 2}\n" for n in range(8)))
    assert run(["data", "pairs", str(source), "--generators", "labels", "--out", str(out)]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert {pair["score"] for pair in found} == {0.0, 1.0}
    assert f"{len(found)} scored pairs from 8 labelled texts" in capsys.readouterr().out
    assert run(["data", "pairs", str(source), "--generators", "labels", "crop", "--out", str(out), "--force"]) == 2
