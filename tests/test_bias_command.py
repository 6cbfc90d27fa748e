"""embedtune refine bias: one table, two models side by side, and what is refused before a model is opened."""

import json

import pytest

from embedtune import cli

HEAD = "sent_more,sent_less,stereo_antistereo,bias_type\n"
PAIRS = "".join(
    f"bado {a} lita,bado {b} lita,{way},age\n"
    for a, b, way in [("mona", "ripe", "stereo"), ("fogo", "beda", "antistereo")] * 4
)
WINO = [f"{n} [The cook] met the nurse because {{}} can sing number {n}." for n in range(24)]


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """call(words, code) -> (stdout, stderr), in a folder with CrowS-Pairs, WinoBias and texts, all tiny."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "crows.csv").write_text(HEAD + PAIRS)
    (tmp_path / "wino").mkdir()
    for side, who in (("pro", "[she]"), ("anti", "[he]")):
        lines = [line.format(who) for line in WINO]
        lines += [line.format("[he]" if side == "pro" else "[she]").replace("cook", "guard") for line in WINO]
        (tmp_path / "wino" / f"{side}_stereotyped_type1.txt.dev").write_text("\n".join(lines))
    (tmp_path / "texts.txt").write_text("".join(f"He found {n} of her books\n\nA stone\n" for n in range(30)))
    known = [
        "bado",
        "lita",
        "mona",
        "ripe",
        "fogo",
        "beda",
    ]  # the tiny model knows these words
    people = (f"He found {known[n % 6]} of the {known[n // 6]} {n}\n" for n in range(30))
    (tmp_path / "people.txt").write_text("".join(people))

    def run(*argv, code=0):
        capfd.readouterr()
        found = cli.run(["refine", "bias", *map(str, argv)])
        out, err = capfd.readouterr()
        assert found == code, err
        assert "Traceback" not in err
        return out, err

    return run


def test_two_models_side_by_side(call, tiny_model):
    models = [tiny_model("minilm"), tiny_model("bert")]
    out, _ = call(*models, "--crows", "crows.csv", "--winobias", "wino", "--data", "people.txt")
    lines = out.splitlines()
    assert lines[0].startswith("measure (95 % interval)") and f"change of {models[1]}" in lines[0]
    rows = {line.split("  ")[0]: line for line in lines}
    for name in ("WEAT-6: male names, career", "exposure: share of men shown", "jobs: read by a linear probe",
                 "data: swap distance", "WinoBias: pro is nearer"):  # fmt: skip
        assert rows[name].count(" to ") == 3, "an interval for each model, and one for the change"
    assert rows["CrowS shared: all"].split()[4] == "-", "the first model has no head"
    assert f"no CrowS-Pairs: {models[0]}: has no masked-language head" in out
    assert "people.txt: 30 texts with gendered words, of 30 rows read" in out
    for words in ("2012.15859", "1903.03862", "50 % as no proof of fairness"):
        assert words in out


def test_json_and_the_same_again(call, tiny_model):
    first, again = (json.loads(call(tiny_model("bert"), "--json")[0]) for _ in range(2))
    assert first == again
    (model,) = first["models"]
    scores = {score["name"]: score for score in model["scores"]}
    assert (
        scores["WEAT-7: math, male words"]["p_error"]
        == 0
        < scores["WEAT-3: European American names, pleasant"]["p_error"]
    )
    assert not [name for name in scores if "CrowS" in name] and model["changes"] == {}
    assert all(score["low"] <= score["high"] and score["units"] <= score["items"] for score in model["scores"])


def test_a_model_beside_itself_has_not_changed(call, tiny_model):
    told = json.loads(call(tiny_model("bert"), tiny_model("bert"), "--crows", "crows.csv", "--json")[0])
    changes = told["models"][1]["changes"]
    assert "CrowS shared: all" in changes and "CrowS changed: all" in changes
    assert all(change == {"value": 0, "low": 0, "high": 0} for change in changes.values())


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--models"], "name at least one model"),
        (["MINILM", "--crows", "crows.csv"], "CrowS-Pairs needs a masked-language head"),
        (["MINILM", "--crows", "people.txt"], "has no column sent_more"),
        (["MINILM", "--winobias", "."], "has 0 sentences of WinoBias"),
        (["MINILM", "--data", "texts.txt"], "0 texts have more words of one gender"),
        (["MINILM", "--data", "absent.txt"], "absent.txt"),
        (["./absent"], "is not a model folder"),
    ],
)
def test_refused(call, tiny_model, argv, says):
    out, err = call(*(tiny_model("minilm") if word == "MINILM" else word for word in argv), code=2)
    assert out == "" and says in err and "fix:" in err
