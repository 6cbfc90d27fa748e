import json

import numpy as np
import pytest
from scipy.interpolate import BSpline

from embedtune.errors import UserError
from embedtune.refine import concepts
from embedtune.refine.concepts import Encoding, Survey, encode, length_encodings


def survey(values, name="c"):
    found = Survey(name)
    for value in values:
        found.add(value)
    return found


def encoding(values, kind=None):
    return survey(values).encoding(kind)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a", "b", "a"], "category"),
        ([True, False, True], "category"),
        ([0.5, 1.0, 2.0], "scalar"),
        (["0.5", "1", "2"], "scalar"),
        ([["a"], ["a", "b"], []], "multilabel"),
    ],
)
def test_the_kind_is_found_where_there_is_one_choice(values, kind):
    assert encoding(values).kind == kind


@pytest.mark.parametrize("values", [[1, 2, 3], ["1", "2", "3"], [1.0, 2.0, None]])
def test_whole_numbers_need_a_kind(values):
    with pytest.raises(UserError, match="category.*scalar.*ordinal.*function"):
        encoding(values)
    assert encoding(values, "category").classes == tuple("123"[: len({v for v in values if v is not None})])


def test_a_category_is_one_hot_without_its_most_frequent_class():
    z = encoding(["b", "a", "b", "c"])(["a", "b", "c", None])
    assert np.array_equal(z[:3], [[1, 0], [0, 0], [0, 1]])
    assert np.isnan(z[3]).all()


def test_several_labels_ranks_and_amounts():
    labels = encoding([["x"], ["x", "y"], []])
    assert np.array_equal(labels([["y"], [], ["y", "x"]]), [[0, 1], [0, 0], [1, 1]])
    ranks = encoding([1, 10, 100, 10], "ordinal")
    assert np.allclose(ranks([1, 10, 100, "10"])[:, 0], [0, 1, 2, 1])
    assert np.isnan(ranks([None])).all()
    amounts = encoding([1, 10, 100], "scalar")
    assert np.array_equal(amounts([3, 2.5])[:, 0], [3, 2.5])


def test_a_function_spans_every_cubic_spline_on_its_knots():
    values = np.random.default_rng(0).lognormal(size=3000)
    basis = encoding(values.tolist(), "function")
    assert len(basis.knots) == concepts.KNOTS
    z = np.column_stack([np.ones(len(values)), basis(values)])
    assert z.shape[1] == basis.width + 1 == np.linalg.matrix_rank(z)
    t = np.r_[[basis.knots[0]] * 3, basis.knots, [basis.knots[-1]] * 3]
    spline = BSpline(t, np.random.default_rng(1).normal(size=len(t) - 4), 3)
    for wanted in (values, values**2, values**3, spline(values)):
        left = wanted - z @ np.linalg.lstsq(z, wanted, rcond=None)[0]
        assert np.abs(left).max() < 1e-8 * np.abs(wanted).max()


def test_values_outside_the_knots_count_as_the_ends():
    basis = encoding(np.linspace(0, 1, 50).tolist(), "function")
    assert np.array_equal(basis([-5.0, 9.0]), basis([0.0, 1.0]))


def test_chunks_and_json_change_nothing():
    values = np.random.default_rng(0).normal(size=200).tolist()
    for kind in ("scalar", "ordinal", "function"):
        whole = encoding(values, kind)
        again = Encoding.from_json(json.loads(json.dumps(whole.as_json())))
        assert again == whole
        assert np.array_equal(np.vstack([again(values[:70]), again(values[70:])]), whole(values))


def test_missing_values_are_counted():
    found = survey(["a", None, "b", float("nan"), "  "])
    assert (found.rows, found.missing) == (5, 3)
    assert found.add("a") and not found.add(None)


def test_memory_is_flat(monkeypatch):
    monkeypatch.setattr(concepts, "SAMPLE", 100)
    monkeypatch.setattr(concepts, "MOST_CLASSES", 50)
    found = survey(np.random.default_rng(0).permutation(5000) / 7)
    assert len(found.sample) <= 100 and len(found.counts) <= 51
    assert np.allclose(found.encoding("function").knots, np.linspace(0, 4999 / 7, 8), rtol=0.2, atol=5)
    for kind in ("category", "ordinal"):
        with pytest.raises(UserError, match="more than 50"):
            found.encoding(kind)


@pytest.mark.parametrize(
    ("values", "kind", "says"),
    [
        (["a", "a"], None, "one class only"),
        ([3.5, 3.5], None, "3.5 in every row"),
        ([3, 3], "function", "3 in every row"),
        ([None, float("nan")], "scalar", "no value in any row"),
        ([[], []], None, "no label in any row"),
        ([["a"], "a"], None, "lists in 1 of 2"),
        ([["a"], ["b"]], "category", "multilabel"),
        (["a", "1"], "scalar", "1 of 2 values are no numbers"),
        (["a", "b"], "colour", "must be one of"),
        ([1, 10**400], "scalar", "is no finite number"),
        (["1", "9" * 400], "scalar", "is no finite number"),
    ],
)
def test_mistakes_name_what_is_wrong(values, kind, says):
    with pytest.raises(UserError, match=says):
        encoding(values, kind)


def test_what_is_not_of_the_kind_is_refused_on_fresh_data():
    with pytest.raises(UserError, match="'z' is no class of the concept 'c'"):
        encoding(["a", "b"])(["a", "z"])
    with pytest.raises(UserError, match="no finite number"):
        encoding([0.5, 1.0])(["x"])
    with pytest.raises(UserError, match=r"no finite number|inf"):
        survey([0.5, float("inf")])


def test_length_is_the_count_and_every_smooth_function_of_its_logarithm():
    tokens = np.random.default_rng(0).integers(3, 200, 2000)
    both = length_encodings(tokens)
    z = encode(both, {}, tokens)
    assert z.shape == (2000, sum(each.width for each in both))
    full = np.column_stack([np.ones(2000), z])
    for wanted in (tokens, np.log(tokens), np.log(tokens) ** 2):
        assert np.allclose(full @ np.linalg.lstsq(full, wanted, rcond=None)[0], wanted, atol=1e-8)
    assert np.array_equal(encode(length_encodings(tokens, "scalar"), {}, tokens).T, [tokens, np.log(tokens)])
