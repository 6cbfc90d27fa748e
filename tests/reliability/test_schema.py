"""Requests made from the server's own OpenAPI document: no 5xx, and nothing that the document does not say."""

import pytest

pytest.importorskip("fastapi")
schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402

from embedtune.search.index import create  # noqa: E402
from embedtune.search.rows import Record  # noqa: E402
from embedtune.serve.app import Service  # noqa: E402
from embedtune.serve.batcher import Limits  # noqa: E402
from embedtune.serve.shelf import open_all  # noqa: E402
from reliability import ledger  # noqa: E402
from serve.serving import listening  # noqa: E402

BLOCK, BLOCKS = 1000, 20
CHECKS = [
    *(not_a_server_error, checks.status_code_conformance, checks.content_type_conformance),
    *(checks.response_schema_conformance, checks.response_headers_conformance, checks.unsupported_method),
]


@pytest.fixture(scope="module")
def address(tiny_model, tmp_path_factory):
    home = tmp_path_factory.mktemp("fuzz")
    texts = ["bade fima", "lora bade", "fima lora bade. lora"]
    records = [Record(f"t{n}", text, {"kind": text[:4], "n": n}) for n, text in enumerate(texts * 5)]
    create(home / "idx", str(tiny_model("bert")), records)
    service = Service(lambda: open_all(str(tiny_model("bert")), [str(home / "idx")], "fp32", 2048), Limits(),
                      home / "votes.jsonl")  # fmt: skip
    with listening(service) as port:
        yield f"http://127.0.0.1:{port}"


def attack(address, cases, number):
    """The statuses of `cases` requests with a body, as many for each operation, well-formed and malformed ones by
    turns; and of the requests without one, of which there is one each. Which they are follows from `number`.
    """
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    with_body = [operation for operation in operations if operation.body]
    sent = []
    for operation in operations:
        modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE) if operation.body else (GenerationMode.POSITIVE,)
        for mode in modes:
            asked(operation.as_strategy(generation_mode=mode), cases // (2 * len(with_body)), number, sent)
    return sent


def asked(strategy, count, number, sent):
    @seed(number)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck),
              phases=[Phase.generate, Phase.shrink])  # fmt: skip
    @given(case=strategy)
    def one(case):
        response = case.call()
        # A body that is too large is refused unread (413), and whether it was well-formed is not known.
        wrong = () if response.status_code == 413 else (checks.negative_data_rejection,)
        case.validate_response(response, checks=[*CHECKS, *wrong])
        sent.append(response.status_code)
        ledger.count()

    one()


@pytest.mark.target("D7")
@pytest.mark.parametrize("block", [None, *(pytest.param(n, marks=pytest.mark.slow) for n in range(BLOCKS))])
def test_requests_made_from_the_schema(address, block):
    """100 in the fast tier, 20,000 in the long one."""
    cases = 100 if block is None else BLOCK
    statuses = attack(address, cases, -1 if block is None else block)
    assert len(statuses) >= cases and {200, 422} <= set(statuses)
