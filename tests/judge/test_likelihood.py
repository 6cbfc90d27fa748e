"""CrowS-Pairs: the batched arithmetic against a slow one on stock models, what is counted, and what is refused."""

import difflib

import numpy as np
import pytest
import torch

from conftest import tokenizer_text
from embedtune.errors import UserError
from embedtune.judge.likelihood import Pair, judge_likelihood, open_masked, read_crows
from embedtune.judge.score import wilson

LINES = [line for line in tokenizer_text().splitlines() if 4 < len(line.split()) < 12][:12]


def pairs():
    """Each line against itself with another word in the middle; every third with one more word at its end."""
    made = []
    for number, line in enumerate(LINES):
        words = line.split()
        other = words[:2] + [LINES[number - 1].split()[0]] + words[3:] + (["bado"] if number % 3 == 0 else [])
        made.append(
            Pair(line, " ".join(other), ("stereo", "antistereo")[number % 2], ("age", "gender")[number % 4 // 2])
        )
    return made


def slow(folder, pair, scoring):
    """Both sentences' scores, as the published scripts compute them: one masked token a forward pass, stock model."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    texts = [pair.more, pair.less] if pair.direction == "stereo" else [pair.less, pair.more]
    ids = [tokenizer.encode(text) for text in texts]
    codes = difflib.SequenceMatcher(None, *[[str(i) for i in row] for row in ids]).get_opcodes()
    found = []
    for side, row in enumerate(ids):
        logs = []
        for kind, *ends in codes:
            if (kind == "equal") != (scoring == "shared"):
                continue
            for place in range(ends[2 * side], ends[2 * side + 1]):
                if place in (0, len(row) - 1):
                    continue
                masked = torch.tensor([row])
                masked[0, place] = tokenizer.mask_token_id
                with torch.no_grad():
                    logits = model(masked).logits[0, place]
                logs.append(torch.log_softmax(logits, 0)[row[place]].item())
        found.append(np.nan if not logs else sum(logs) if scoring == "shared" else np.mean(logs))
    return found if pair.direction == "stereo" else found[::-1]


@pytest.mark.parametrize("scoring", ["shared", "changed"])
@pytest.mark.parametrize("kind", ["bert", "modernbert", "mpnet"])
def test_scores_are_those_of_one_masked_token_at_a_time(tiny_model, kind, scoring):
    found = judge_likelihood(open_masked(str(tiny_model(kind))), pairs(), scoring)
    wanted = np.array([slow(tiny_model(kind), pair, scoring) for pair in pairs()])
    judged = ~np.isnan(wanted).any(1)
    assert judged.sum() >= 10
    np.testing.assert_array_equal(~np.isnan(found.more), judged)
    np.testing.assert_allclose(np.stack([found.more, found.less], 1)[judged], wanted[judged], atol=6e-4)


def test_shares_by_direction_and_type(tiny_model):
    found = judge_likelihood(open_masked(str(tiny_model("bert"))), pairs())
    scores = {score.name: score for score in found.scores()}
    assert set(scores) == {f"CrowS shared: {name}" for name in ("all", "stereo", "antistereo", "age", "gender")}
    hits = found.more > found.less
    whole = scores["CrowS shared: all"]
    assert (whole.value, whole.items, whole.neutral) == (hits.mean(), len(hits), 0.5)
    assert (whole.low, whole.high) == wilson(int(hits.sum()), len(hits))
    antistereo = hits[[pair.direction == "antistereo" for pair in found.pairs]]
    assert scores["CrowS shared: antistereo"].value == antistereo.mean()


def test_what_cannot_be_scored_is_counted(tiny_model):
    long = " ".join(["bado"] * 200)
    same = Pair("bado", "bado", "stereo", "age")
    model = open_masked(str(tiny_model("bert")))
    found = judge_likelihood(model, [*pairs()[:2], Pair(long, long, "stereo", "age"), same])
    assert np.isnan(found.more).tolist() == [False, False, True, False]
    assert found.remarks[0] == "1 pairs left out: longer than the 128 tokens that the model reads"
    assert found.remarks[1].startswith("1 pairs are equally likely")
    changed = judge_likelihood(model, [*pairs()[1:3], same], "changed")
    assert changed.remarks == ("1 pairs left out: a sentence has no changed token",)
    with pytest.raises(UserError, match="none of the 2 pairs"):
        judge_likelihood(model, [same, same], "changed")


def test_wilson():
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)  # Wilson 1927's formula, as scipy has it
    from scipy.stats import binomtest

    for hits, many in ((5, 10), (0, 3), (3, 3), (917, 1508)):
        interval = binomtest(hits, many).proportion_ci(method="wilson")
        assert wilson(hits, many) == pytest.approx((interval.low, interval.high))


def test_refused(tiny_model, tmp_path):
    with pytest.raises(UserError, match="no masked-language head"):
        open_masked(str(tiny_model("minilm")))
    file = tmp_path / "pairs.csv"
    file.write_text("sent_more,sent_less,bias_type\na,b,age\n")
    with pytest.raises(UserError, match="no column stereo_antistereo"):
        read_crows(file)
    head = "sent_more,sent_less,stereo_antistereo,bias_type\n"
    file.write_text(head + "a,b,stereo,age\n,b,stereo,age\na,b,both,age\n")
    with pytest.raises(UserError, match="2 of 3 rows cannot be used") as error:
        read_crows(file)
    assert "row 2: a sentence is empty" in str(error.value) and "'both'" in str(error.value)
    file.write_text(head + "a,b,stereo,age\n")
    with pytest.raises(UserError, match="fewer than two pairs"):
        read_crows(file)


def test_the_public_file(real_data, tiny_model):
    found = read_crows(real_data("crows_pairs/crows_pairs_anonymized.csv"))
    assert len(found) == 1508 and sum(pair.direction == "stereo" for pair in found) == 1290
    assert len({pair.bias_type for pair in found}) == 9 and found[1].more.startswith("The poor are really ignorant")
    judged = judge_likelihood(open_masked(str(tiny_model("bert"))), found[:30])
    assert not np.isnan(judged.more).all()
