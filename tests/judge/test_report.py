import json
import tracemalloc

import numpy as np
import pytest

from embedtune import files
from embedtune.errors import UserError
from embedtune.judge.report import Ranked, Report, from_dict, table

OLD = {  # as it was saved before there were classes
    "task": "similarity",
    "data": "sts",
    "model": "m",
    "dim": 384,
    "summary": {"spearman": 0.5, "pearson": None},
    "items": ["a", "b", "c"],
    "values": {},
    "gold": [1.0, 2.0, 5.0],
    "predicted": [0.1, 0.3, 0.2],
    "found": [],
    "remarks": ["small"],
}


def test_older_reports_open():
    report = from_dict(json.loads(json.dumps(OLD)))
    assert report.classes == () and report.counts is None
    assert report.gold.dtype == report.predicted.dtype == np.float64 and report.remarks == ("small",)
    assert report.as_dict() == {**OLD, "classes": [], "counts": None}


def test_whole_numbers_stay_whole():
    arrays = {"gold": np.array([0, 1]), "predicted": np.array([[0.0, 1], [1, 0]]), "counts": np.array([[1, 2], [3, 4]])}
    report = Report("classification", "d", "m", 0, ("a", "b"), {"F1": 1.0}, **arrays, classes=("no", "yes"))
    again = from_dict(json.loads(json.dumps(report.as_dict())))
    for name, array in arrays.items():
        found = getattr(again, name)
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype
    assert again.classes == ("no", "yes")


def test_what_is_not_finite_is_not_saved():
    report = Report("regression", "d", "m", 0, ("a",), {}, gold=np.array([1.0]), predicted=np.array([np.nan]))
    with pytest.raises(ValueError, match="not finite"):
        report.as_dict()


def test_predictions_that_are_not_kept():
    report = Report("retrieval", "d", "m", 8, ("a",), {"MAP": 1.0})
    with pytest.raises(UserError, match="m on d: the report keeps no predictions"):
        report.judged()


def test_a_table_shows_dimensions_of_vectors_only():
    labels = Report("classification", "d", "m", 0, ("a", "b"), {"F1": 0.5})
    vectors = Report("similarity", "d", "m", 384, ("a", "b"), {"spearman": 0.5})
    assert table([labels]) == (["model", "items", "F1"], [["m", "2", "0.5000"]])
    header, rows = table([labels, vectors])
    assert header == ["model", "dim", "items", "F1", "spearman"]
    assert [row[1] for row in rows] == ["-", "384"]


def test_ranked_documents_read_as_the_lists_that_they_stand_for():
    rows, scores = np.array([[2, 0], [1, 2]], np.int32), np.array([[0.5, 0.25], [1, 0.125]], np.float32)
    found = Ranked(["a", "b", "c"], rows, scores)
    lists = [[("c", 0.5), ("a", 0.25)], [("b", 1.0), ("c", 0.125)]]
    assert list(found) == lists and found[1] == found[-1] == lists[1] and len(found) == 2
    assert list(found[1:]) == lists[1:] and isinstance(found[0][0][1], float)
    with pytest.raises(IndexError):
        found[2]


def many(queries):
    draw = np.random.default_rng(0)
    ids = [f"d{n}" for n in range(100)]
    found = Ranked(ids, draw.integers(0, 100, (queries, 10), np.int32), draw.random((queries, 10), np.float32))
    values = {name: draw.random(queries) for name in ("nDCG@10", "MRR@10")}
    items = tuple(f"q{n}" for n in range(queries))
    return Report("retrieval", "d", "m", 8, items, {"nDCG@10": 0.5}, values, found=found)


@pytest.mark.parametrize("queries", [1, 30])
def test_a_report_that_is_written_piece_by_piece_is_the_one_that_is_written_whole(tmp_path, queries):
    report = many(queries)
    files.write_json(tmp_path / "whole.json", {"reports": [report.as_dict()]})
    files.write_json_pieces(tmp_path / "pieces.json", {"reports": (report,)})
    assert (tmp_path / "pieces.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    again = from_dict(files.read_json(tmp_path / "pieces.json")["reports"][0])
    assert again.as_dict() == report.as_dict() and len(again.found) == queries


def test_writing_a_report_takes_a_list_at_a_time(tmp_path):
    def work(report):
        files.write_json_pieces(tmp_path / "a.json", {"reports": [report]})  # once, so that what is imported is there
        tracemalloc.start()
        files.write_json_pieces(tmp_path / "a.json", {"reports": [report]})
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    few, more = work(many(100)), work(many(4_000))
    assert more - few < 3_900 * 300, "as lists and text a query of ten documents takes 3,000 bytes"
