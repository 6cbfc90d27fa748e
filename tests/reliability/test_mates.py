"""What shares a text's batch does not change its vector: random batches through what the server computes with."""

import math
import random

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi")

from conftest import corpus  # noqa: E402
from embedtune.serve.batcher import Answer, Given, NotFinite  # noqa: E402
from embedtune.serve.model import open_served  # noqa: E402
from reliability import ledger  # noqa: E402

MODELS = [(kind, precision) for kind in ("bert", "modernbert", "minilm") for precision in ("fp32", "bf16")]
MOST = {"fp32": 1e-6, "bf16": 1e-4}  # how far a vector may be from the one alone, by `far`
BLOCK, BLOCKS = 2500, 4
BATCH = 32
FIRST = 5  # of the tiny tokenizers' ids, behind the special ones


@pytest.fixture(scope="module")
def models(tiny_model):
    made = {}

    def get(kind, precision):
        if (kind, precision) not in made:
            made[kind, precision] = open_served(str(tiny_model(kind)), precision, 8192)
        return made[kind, precision]

    return get


def ids(served, draw, length):
    """So many token ids; the last one of the tokenizer is left out."""
    return Given(tuple(draw.randrange(FIRST, len(served.encoder.model.tokenizer) - 1) for _ in range(length)))


def texts(served, draw, count):
    """Token ids and texts by turns, from one token to all that the model reads."""
    words = corpus(200).split()
    lengths = [1, served.max_length, 1, served.max_length, *(draw.randint(1, served.max_length) for _ in range(count))]
    found = []
    for number, length in enumerate(lengths):
        some = Given(" ".join(draw.choices(words, k=max(1, length // 3))))  # a word has about three tokens
        found.append(some if number % 2 else ids(served, draw, length))
    return found


def vectors(served, given):
    return np.stack([answer.vector for answer in served.compute(given)]).astype(np.float64)


def far(found, alone, precision):
    """The largest difference of a number in fp32; how much of a cosine is missing in bf16."""
    if precision == "fp32":
        return float(np.abs(found - alone).max())
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(alone, axis=1)
    return float(1 - ((found * alone).sum(1) / norms).min())


@pytest.mark.target("D5")
@pytest.mark.parametrize(("kind", "precision"), MODELS)
@pytest.mark.parametrize("block", [None, *(pytest.param(n, marks=pytest.mark.slow) for n in range(BLOCKS))])
def test_a_vector_is_the_one_that_its_text_has_alone(models, kind, precision, block):
    """For each model 200 batches in the fast tier, 10,000 in the long one."""
    served, draw = models(kind, precision), random.Random(f"{kind} {precision} {block}")
    pool = texts(served, draw, 100 if block is None else 500)
    alone = np.concatenate([vectors(served, [each]) for each in pool])
    worst = 0.0
    for _ in range(200 if block is None else BLOCK):
        rows = [draw.randrange(len(pool)) for _ in range(draw.randint(1, BATCH))]
        now = far(vectors(served, [pool[row] for row in rows]), alone[rows], precision)
        assert now <= MOST[precision], (now, rows)
        worst = max(worst, now)
        ledger.count()
    ledger.remark(f"D5: {kind} in {precision}: at most {worst:.1e} from the vector alone")


@pytest.mark.target("D5")
@pytest.mark.parametrize(("kind", "precision"), MODELS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_text_that_is_not_finite_leaves_its_neighbours_theirs(tiny_model, kind, precision, value):
    """Also those of its own length, which its attention is computed with."""
    served, draw = open_served(str(tiny_model(kind)), precision, 8192), random.Random(f"{kind} {precision}")
    table = next(m for m in served.encoder.model.modules() if isinstance(m, torch.nn.Embedding))
    bad = len(served.encoder.model.tokenizer) - 1
    with torch.no_grad():
        table.weight[bad] = value
    for _ in range(6):
        length = draw.randint(1, served.max_length)
        good = [ids(served, draw, length), *(ids(served, draw, draw.randint(1, served.max_length)) for _ in range(7))]
        poison = Given((*ids(served, draw, length - 1).content, bad))
        at = draw.randrange(len(good) + 1)
        answers = served.compute([*good[:at], poison, *good[at:]])
        assert isinstance(answers.pop(at), NotFinite) and all(isinstance(answer, Answer) for answer in answers)
        alone = np.concatenate([vectors(served, [each]) for each in good])
        assert far(np.stack([answer.vector for answer in answers]), alone, precision) <= MOST[precision]
        ledger.count()
