"""The certificate on a tiny model: what it says, what it refuses, and what it writes."""

import json
import os
import random

import numpy as np
import pytest

from conftest import corpus
from embedtune.cli import run
from embedtune.errors import UserError
from embedtune.refine.certify import Fresh, certify, write_certificate
from embedtune.refine.erase import Erasure, Texts, erase


def rows(lines: int, seed: int) -> list[dict]:
    """Texts with a source, which is heard in their words, and a colour, which is not."""
    draw = random.Random(seed)
    found = []
    for text in corpus(lines, seed=seed).split("\n"):
        if text and text not in {row["text"] for row in found[-50:]}:
            source = draw.choice(("book", "book", "web"))
            text = f"{text} {draw.randint(0, 10**6)}" + (" kiri kiri" if source == "web" else "")
            found.append({"text": text, "source": source, "colour": draw.choice(("red", "blue"))})
    return found


FIT, FRESH = rows(700, 0), rows(500, 1)


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory):
    """A folder with the base, two erased models, and the rows as files."""
    folder = tmp_path_factory.mktemp("certify")
    (folder / "base").symlink_to(tiny_model("minilm"))
    for name, data in (("fit", FIT), ("fresh", FRESH)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in data))
    base, texts = str(folder / "base"), Texts(str(folder / "fit.jsonl"), "text=text")
    erase(base, texts, Erasure(length=True), folder / "short")
    erase(base, texts, Erasure(("source",)), folder / "sourceless")
    erase(base, texts, Erasure(("source",), method="direction", strength=0.5), folder / "half")
    return folder


@pytest.fixture(autouse=True)
def one_seed(monkeypatch):
    monkeypatch.setattr("embedtune.refine.nonlinear.SEEDS", 1)  # the tests of the probes have all three


@pytest.fixture
def fresh(place):
    return Fresh(str(place / "fresh.jsonl"), columns="text=text")


def test_length_before_and_after(place, fresh):
    found = certify(str(place / "short"), fresh, base=str(place / "base"))
    assert found.word == "TOO FEW ROWS" and found.concept == "length"
    assert {"log tokens", "tokens", "log tokens, spline 1"} <= {column.name for column in found.after.linear}
    before = {column.name: column for column in found.before.linear}
    for column in found.after.linear:
        assert column.high < 0.28 and column.low <= 2 * found.erasure.floor
    assert before["log tokens"].low > 0.5
    assert found.erasure.rows == len(FIT) and found.erasure.residual < 1e-6 and not found.erasure.changed
    words = " ".join(found.sentences())
    assert "not shown to be guarded, rho2 may be up to 0." in words and "more fresh rows make the interval" in words
    assert "fresh rows" in words and "for 0.01 it needs" in words
    assert "before, it was rho2 = 0." in words
    assert found.cost.moved.cosine_change > 0 and 0 < found.cost.moved.overlap <= 1


def test_a_model_that_was_never_erased(place, fresh, tmp_path):
    found = certify(str(place / "base"), fresh)
    assert found.word == "NOT ERASED" and found.erasure is None and found.before is None
    assert found.sentences()[0].startswith("nothing was erased from this model")
    names = write_certificate(found, tmp_path / "out")
    assert sorted(names) == sorted(path.name for path in (tmp_path / "out").iterdir())
    saved = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert saved["verdict"] == "NOT ERASED" and saved["after"]["linear"][0]["rho2"] == found.after.linear[0].rho2
    html = (tmp_path / "out" / "certificate.html").read_text()
    assert "<svg" in html and "NOT ERASED" in html and "http" not in html.replace("http-equiv", "")
    again = certify(str(place / "base"), fresh)
    assert again.as_dict() == found.as_dict(), "the same seed gives the same certificate"


def test_a_category_and_an_absent_class(place, fresh):
    found = certify(str(place / "sourceless"), fresh, base=str(place / "base"))
    assert found.concept == "source" and [c.name for c in found.after.linear] == ["book / web"]
    assert found.before.accuracy.low > 0.6 and found.after.accuracy.high < found.before.accuracy.low
    assert found.word == "TOO FEW ROWS" and found.after.readings[0].chance == 0.5
    one = [row for row in FRESH if row["source"] == "book"]
    with pytest.raises(UserError, match="every class needs 15 fresh rows: 'web' has 0"):
        certify(str(place / "sourceless"), Fresh(one, columns="text=text"))
    with pytest.raises(UserError, match="no class of the concept"):
        certify(str(place / "sourceless"), Fresh([{**FRESH[0], "source": "radio"}, *FRESH[1:]], columns="text=text"))


def test_an_erasure_that_is_none_leaks(place, fresh):
    found = certify(str(place / "half"), fresh)
    assert found.word == "LEAKS" and found.sentences()[0].startswith("not linearly guarded: a linear probe on")


def test_guarded_asks_for_rows_enough_of_the_fit():
    from embedtune.refine import certificate, eraser
    from embedtune.refine.statistics import Statistics

    draw = np.random.default_rng(0)
    x = draw.standard_normal((6000, 10))
    z = x[:, :1] + draw.standard_normal((6000, 1)) / 3
    words = {}
    for n, strength in ((4000, 1.0), (40, 1.0), (4000, 0.5)):
        out = eraser.leace(Statistics.of(x[:n], z[:n]), strength=strength)(x[4000:])
        found = certificate.find(out, certificate.Target(("age",), z[4000:]), draw.integers(3, 99, 2000))
        erasure = certificate.Erasure("leace", n, 10, 0.0, False)
        seen = certificate.Certificate("m", None, "age", found, None, erasure, None, {}, 0)
        words[n, strength] = seen.word
        if n == 40:
            said = "with 40 fit rows a fresh linear probe finds about 0.1837 by chance alone; fit on at least 171 rows"
            assert found.linear[0].bound > 0.05 and any(each.startswith(said) for each in seen.sentences())
        elif strength == 1:
            assert found.linear[0].bound <= 0.05 and seen.sentences()[0].startswith("linearly guarded up to rho2 <= 0.")
    assert words == {(4000, 1.0): "GUARDED", (40, 1.0): "TOO FEW ROWS", (4000, 0.5): "LEAKS"}


def test_an_estimate_below_zero_is_shown_as_zero():
    from dataclasses import replace

    from embedtune.refine.certificate import Certificate, Target, find

    draw = np.random.default_rng(0)
    x, z = draw.standard_normal((200, 6)), draw.standard_normal((200, 1))
    found = find(x, Target(("age",), z), draw.integers(3, 99, 200))
    column = replace(found.linear[0], rho2=-0.4958, low=0.0, high=0.0)
    seen = Certificate("m", None, "age", replace(found, linear=(column,)), None, None, None, {}, 0)
    assert "rho2 = 0.0000 of age (95 % interval 0.0000 to 0.0000)" in seen.sentences()[0]
    assert seen.figures()[0][2] == "0.0000 (0.0000 to 0.0000)"


def test_rows_of_the_fit_are_refused_in_any_form(place, tmp_path):
    with pytest.raises(UserError, match="these are the rows that the eraser was fitted on"):
        certify(str(place / "short"), Fresh(str(place / "fit.jsonl"), columns="text=text"))
    turned = [{"text": row["text"], "n": n} for n, row in enumerate(FIT[::-1])]  # another digest of the data
    other = [{"text": row["text"] + "\u200b"} for row in FIT]  # other texts too, with the same tokens
    for data in (turned, other):
        with pytest.raises(UserError, match="the eraser was fitted on"):
            certify(str(place / "short"), Fresh(data, columns="text=text"))


def test_rows_of_the_fit_among_fresh_ones_are_left_out_and_counted(place, tmp_path):
    clean = certify(str(place / "short"), Fresh(FRESH, columns="text=text"))
    mixed = certify(str(place / "short"), Fresh([*FIT[:300], *FRESH], columns="text=text"))
    assert mixed.after == clean.after and "300 rows left out: the eraser was fitted on them" in mixed.remarks
    with pytest.raises(UserError, match=r"20 rows cannot judge \d+ dimensions; \d+ rows left out: the eraser was"):
        certify(str(place / "short"), Fresh([*FIT, *FRESH[:20]], columns="text=text"))


def test_a_folder_without_the_texts_of_the_fit_still_opens(place, fresh, tmp_path):
    import shutil

    from safetensors.numpy import load_file, save_file

    shutil.copytree(place / "short", tmp_path / "old")
    arrays = load_file(tmp_path / "old" / "erasure.safetensors")
    assert arrays.pop("texts").dtype == np.uint64
    save_file(arrays, tmp_path / "old" / "erasure.safetensors")
    found = certify(str(tmp_path / "old"), fresh)
    assert found.word != "NOT ERASED" and any("rows of the fit were not looked for" in each for each in found.remarks)


def test_one_column_below_chance_is_enough_and_a_rare_class_is_not_below_it():
    from embedtune.refine.certificate import Target
    from embedtune.refine.certify import _refuse_fitted

    draw = np.random.default_rng(0)
    x = draw.standard_normal((2000, 200)) * np.exp(draw.standard_normal((2000, 1)))
    rare = np.isin(np.arange(2000), np.argsort((x**2).sum(1))[:40])  # near the mean, of low leverage
    free = draw.standard_normal(2000)
    _refuse_fitted(x, Target(("rare", "free"), np.column_stack([rare, free])), "rows")
    centred = x - x.mean(0)
    unread = free - centred @ np.linalg.lstsq(centred, free, rcond=None)[0]
    with pytest.raises(UserError, match="these are the rows"):
        _refuse_fitted(x, Target(("free", "unread"), np.column_stack([free, unread])), "rows")


def test_changed_weights_are_said(place, fresh, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(place / "short", tmp_path / "changed")
    weights = load_file(tmp_path / "changed" / "model.safetensors")
    name = next(name for name in weights if name.endswith("output.dense.weight"))
    weights[name] = weights[name] * 1.5
    save_file(weights, tmp_path / "changed" / "model.safetensors", metadata={"format": "pt"})
    found = certify(str(tmp_path / "changed"), fresh)
    assert found.erasure.changed and any("the weights changed after the erasure" in s for s in found.sentences())


def test_what_cannot_be_certified_is_refused(place, fresh):
    with pytest.raises(UserError, match="rows cannot judge"):
        certify(str(place / "short"), Fresh(FRESH[:40], columns="text=text"))
    with pytest.raises(UserError, match="'source' was not erased from this model; length was"):
        certify(str(place / "short"), Fresh(FRESH, "source", columns="text=text"))
    with pytest.raises(UserError, match="class"):
        certify(str(place / "base"), Fresh([{**row, "source": "book"} for row in FRESH], "source", columns="text=text"))
    few = [{**row, "source": row["source"] if n % 5 else None} for n, row in enumerate(FRESH)]
    found = certify(str(place / "base"), Fresh([*few, few[1]], "source", columns="text=text"))
    left = len([row for row in few if row["source"]])
    assert found.after.rows == left
    assert f"{len(FRESH) - left} rows left out: no value of 'source'" in found.remarks
    assert "1 rows left out: the same text again" in found.remarks


def test_the_command(place, tmp_path, capsys):
    pairs = [{"query": row["text"].split()[0], "positive": row["text"]} for row in FRESH[:60]]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in pairs))
    scored = [
        {"sentence1": a["text"], "sentence2": b["text"], "score": n % 5}
        for n, (a, b) in enumerate(zip(FRESH, FRESH[1:]))
    ]
    (tmp_path / "scored.jsonl").write_text("\n".join(json.dumps(row) for row in scored[:40]))
    words = ["refine", "certify", str(place / "short"), "--data", str(place / "fresh.jsonl"), "--columns", "text=text"]
    tasks = ["--retrieval", str(tmp_path / "pairs.jsonl"), "--similarity", str(tmp_path / "scored.jsonl")]
    assert run([*words, *tasks, "--out", str(tmp_path / "out")]) == 2
    assert "--base" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert run([*words, *tasks, "--base", str(place / "base"), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("TOO FEW ROWS\n") and "\nnDCG@10 on " in out and "\nspearman on scored.jsonl: " in out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        f"certificate.{e}" for e in ("json", "html", "png", "svg")
    }
    assert "replaced" not in out
    os.utime(tmp_path / "out" / "certificate.json", (1e9, 1e9))
    assert run([*words, "--out", str(tmp_path / "out")]) == 0
    assert "replaced the certificate of 2001-09-" in capsys.readouterr().out
    assert run(["refine", "certify", "all-MiniLM-L6-v2", *words[3:]]) == 2
    assert "give --out DIR: all-MiniLM-L6-v2 is not a folder to write into" in capsys.readouterr().err
    swapped = ["--retrieval", str(tmp_path / "scored.jsonl"), "--base", str(place / "base")]
    assert run([*words, *swapped]) == 2 and "holds data of the other kind" in capsys.readouterr().err


def test_vectors_without_a_trace_are_the_only_ones_without_information():
    from embedtune.refine.certificate import Certificate, Target, find

    draw = np.random.default_rng(0)
    x, z, tokens = draw.standard_normal((1200, 6)), draw.standard_normal(1200), draw.integers(3, 99, 1200)
    nothing = find(x, Target(("age",), z[:, None]), tokens, seed=1)
    bent = find(x, Target(("age",), x[:, :1] ** 2), tokens, seed=1)
    certificates = [Certificate("m", None, "age", found, None, None, None, {}, 1) for found in (nothing, bent)]
    assert nothing.nothing and "no information on age was found" in " ".join(certificates[0].sentences())
    assert not bent.nothing and "no information" not in " ".join(certificates[1].sentences())
    assert bent.linear[0].high < 0.05 and bent.readings[0].low > 0.7 and bent.independence < 0.01
