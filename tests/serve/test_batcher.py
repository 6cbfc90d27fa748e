import asyncio

import numpy as np
import pytest

pytest.importorskip("fastapi")

from serving import FakeModel, serving  # noqa: E402

from embedtune.serve.batcher import Batcher, Busy, Given, Late, Limits  # noqa: E402


def run(test, model=None, **limits):
    """Run an async test with a batcher."""

    async def go():
        batcher = Batcher((model or FakeModel()).compute, Limits(**limits))
        batcher.start()
        await test(batcher)
        await batcher.stop()

    asyncio.run(go())


def test_what_waits_together_is_computed_together_under_the_budget():
    model = FakeModel()

    async def test(batcher):
        model.gate.clear()
        first = asyncio.ensure_future(batcher.ask([Given("first")]))
        await asyncio.sleep(0.05)
        others = [asyncio.ensure_future(batcher.ask([Given("a" * 40)])) for _ in range(10)]  # 12 tokens each
        await asyncio.sleep(0.05)
        model.gate.set()
        answers = await asyncio.gather(first, *others)
        assert [len(found) for found in answers] == [1] * 11

    run(test, model, batch_tokens=36)
    assert model.batches == [1, 3, 3, 3, 1]


def test_a_vector_does_not_depend_on_its_batch_mates():
    async def test(batcher):
        alone = {text: (await batcher.ask([Given(text)]))[0].vector for text in "abcdefgh"}
        together = await asyncio.gather(*(batcher.ask([Given(text) for text in "abcdefgh"[n:]]) for n in range(8)))
        for n, answers in enumerate(together):
            for text, answer in zip("abcdefgh"[n:], answers, strict=True):
                assert np.array_equal(answer.vector, alone[text])

    run(test)


def test_a_full_queue_says_so_at_once_and_when_to_come_back():
    model = FakeModel()

    async def test(batcher):
        model.gate.clear()
        batcher.rate = 0.5  # so that 30 tokens fill the minute
        going = [asyncio.ensure_future(batcher.ask([Given("x" * 40)]))]
        await asyncio.sleep(0.05)  # this one is computed, the next two wait: 24 tokens of 30
        going += [asyncio.ensure_future(batcher.ask([Given("x" * 40)])) for _ in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(Busy) as busy:
            await batcher.ask([Given("x" * 40)])
        assert busy.value.seconds >= 1 and batcher.items == 2
        model.gate.set()
        await asyncio.gather(*going)
        await batcher.ask([Given("x" * 40)])

    run(test, model, batch_tokens=30, queue_seconds=60.0)


def test_items_are_bounded_too():
    model = FakeModel()

    async def test(batcher):
        model.gate.clear()
        batcher.rate = 1e9
        going = asyncio.ensure_future(batcher.ask([Given("x")]))
        await asyncio.sleep(0.05)
        more = asyncio.ensure_future(batcher.ask([Given("x")] * 4))
        await asyncio.sleep(0.05)
        with pytest.raises(Busy):
            await batcher.ask([Given("x")])
        model.gate.set()
        await asyncio.gather(going, more)

    run(test, model, queue_items=4)


def test_a_request_larger_than_the_queue_is_taken_when_nothing_waits():
    async def test(batcher):
        assert len(await batcher.ask([Given("x" * 40)] * 100)) == 100

    run(test, batch_tokens=30, queue_seconds=0.1, queue_items=10)


def test_what_nobody_waits_for_is_not_computed():
    model = FakeModel()

    async def test(batcher):
        model.gate.clear()
        first = asyncio.ensure_future(batcher.ask([Given("first")]))
        await asyncio.sleep(0.05)
        dropped = [asyncio.ensure_future(batcher.ask([Given("x")] * 5)) for _ in range(20)]
        kept = asyncio.ensure_future(batcher.ask([Given("kept")]))
        await asyncio.sleep(0.05)
        for task in dropped:
            task.cancel()
        model.gate.set()
        await asyncio.gather(first, kept)
        assert batcher.items == 0 and batcher.waiting == 0

    run(test, model)
    assert sum(model.batches) == 2


def test_what_waited_too_long_is_late_and_costs_nothing():
    model = FakeModel()

    async def test(batcher):
        model.gate.clear()
        batcher.rate = 1000.0
        first = asyncio.ensure_future(batcher.ask([Given("first")]))
        await asyncio.sleep(0.05)
        second = asyncio.ensure_future(batcher.ask([Given("second")]))
        await asyncio.sleep(0.5)
        model.gate.set()
        await first
        with pytest.raises(Late):
            await second

    run(test, model, queue_seconds=0.1)
    assert sum(model.batches) == 1


def test_clients_that_go_away_leave_nothing_behind():
    model = FakeModel()

    async def go():
        async with serving(model, batch_tokens=64) as (client, service):
            before = len(asyncio.all_tasks())
            model.gate.clear()
            gone = asyncio.Event()
            going = [asyncio.ensure_future(client("POST", "/v1/embeddings", {"input": ["x"] * 3}, gone=gone))
                     for _ in range(200)]  # fmt: skip
            await asyncio.sleep(0.2)
            gone.set()
            statuses = {status for status, _, _ in await asyncio.gather(*going)}
            assert statuses <= {499, 429}
            model.gate.set()
            assert (await client("POST", "/v1/embeddings", {"input": "x"}))[0] == 200
            assert len(asyncio.all_tasks()) == before and service.batcher.items == 0

    asyncio.run(go())
    assert sum(model.batches) <= 8 + 32 + 1  # the warm-up, one batch of theirs at most, and the last one


def test_overload_gives_answers_in_full_batches_and_429_for_the_rest():
    model = FakeModel(seconds=0.01)

    async def go():
        async with serving(model, batch_tokens=100) as (client, service):
            statuses = []

            async def user():
                for _ in range(4):
                    status, headers, _ = await client("POST", "/v1/embeddings", {"input": "x" * 40})
                    statuses.append(status)
                    if status == 429:
                        assert int(headers[b"retry-after"]) >= 1
                        await asyncio.sleep(0.01)

            model.gate.clear()
            service.batcher.rate = 1000.0  # 2,000 tokens may wait, 12 each: fewer than there are users
            users = [asyncio.ensure_future(user()) for _ in range(400)]
            while statuses.count(429) < 200:
                await asyncio.sleep(0.01)
            model.gate.set()
            await asyncio.gather(*users)
            assert set(statuses) == {200, 429} and service.batcher.items == service.batcher.waiting == 0
            refused = statuses.count(429)
            _, _, text = await client("GET", "/metrics")
            assert f'embedtune_requests_total{{path="/v1/embeddings",status="429"}} {refused}.0' in text
            assert sum(size == 8 for size in model.batches[2:-2]) >= 0.5 * len(model.batches[2:-2]), "full batches"

    asyncio.run(go())
