import asyncio
import threading
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("fastapi")

from serving import FakeModel, serving  # noqa: E402

from embedtune.serve import batcher as batching  # noqa: E402
from embedtune.serve.batcher import Batcher, Busy, Dead, Given, Hangs, Limits, NotFinite  # noqa: E402


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
        batcher.rate = 1.0  # so that 60 tokens fill the minute
        going = [asyncio.ensure_future(batcher.ask([Given("x" * 40)]))]
        await asyncio.sleep(0.05)  # this one is computed, the next four wait: 60 tokens
        going += [asyncio.ensure_future(batcher.ask([Given("x" * 40)])) for _ in range(4)]
        await asyncio.sleep(0.05)
        with pytest.raises(Busy) as busy:
            await batcher.ask([Given("x" * 40)])
        assert busy.value.seconds == 12 and batcher.items == 4
        model.gate.set()
        await asyncio.gather(*going)
        await batcher.ask([Given("x" * 40)])

    run(test, model, batch_tokens=30, queue_seconds=90.0)


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


def test_where_nobody_waits_any_more_nothing_is_computed():
    model = FakeModel()

    async def test(batcher):
        model.gate.clear()
        first = asyncio.ensure_future(batcher.ask([Given("first")]))
        await asyncio.sleep(0.05)
        dropped = asyncio.ensure_future(batcher.ask([Given("x")] * 5))
        await asyncio.sleep(0.05)
        dropped.cancel()
        await asyncio.sleep(0.05)
        model.gate.set()
        await first
        while batcher.items:
            await asyncio.sleep(0.01)
        assert len(await batcher.ask([Given("next")])) == 1
        assert batcher.waiting == batcher.items == 0

    run(test, model)
    assert sum(model.batches) == 2


def test_what_was_let_in_is_answered_even_where_the_model_has_become_slow():
    model = FakeModel()

    async def test(batcher):
        model.gate.clear()
        batcher.rate = 1000.0
        first = asyncio.ensure_future(batcher.ask([Given("first")]))
        await asyncio.sleep(0.05)
        second = asyncio.ensure_future(batcher.ask([Given("second")]))
        await asyncio.sleep(0.5)
        model.gate.set()
        assert len(await first) == len(await second) == 1

    run(test, model, queue_seconds=0.01)
    assert sum(model.batches) == 2


class Broken:
    """A model whose process has ended; what asks while it computes waits for `gate`."""

    def __init__(self):
        self.gate = threading.Event()

    def compute(self, given):
        self.gate.wait(20)
        raise EOFError


def test_a_model_that_ends_answers_everyone_and_says_so_once(caplog):
    model, died = Broken(), []

    async def go():
        batcher = Batcher(model.compute, Limits(batch_tokens=3), died=lambda: died.append(1))
        batcher.start()
        assert batcher.alive
        going = [asyncio.ensure_future(batcher.ask([Given("x"), Given("y")])) for _ in range(3)]
        await asyncio.sleep(0.05)
        model.gate.set()
        for each in going:
            with pytest.raises(Dead, match="can answer no more"):
                await each
        assert (batcher.items, batcher.waiting, batcher.batch, batcher.alive) == (0, 0, 0, False)
        with pytest.raises(Dead):
            await batcher.ask([Given("x")])
        await batcher.stop()

    asyncio.run(go())
    assert died == [1]
    (record,) = [each for each in caplog.records if each.name == "embedtune"]
    assert record.getMessage() == "the model can answer no more: EOFError"


def test_a_model_that_hangs_is_late(monkeypatch):
    monkeypatch.setattr(batching, "HUNG", 0.05)
    model = FakeModel()

    async def test(batcher):
        model.gate.clear()
        batcher.rate = 1e9
        with pytest.raises(Hangs, match="does not answer"):
            await batcher.ask([Given("x")])
        model.gate.set()

    run(test, model, queue_seconds=0.01)


def test_what_is_wrong_with_one_text_is_not_wrong_with_another():
    async def test(batcher):
        found = await asyncio.gather(
            *(batcher.ask([Given(text)]) for text in ("a", "nan", "b")), return_exceptions=True
        )
        assert [type(each) for each in found] == [list, NotFinite, list]
        with pytest.raises(NotFinite):
            await batcher.ask([Given("a"), Given("nan")])
        assert len(await batcher.ask([Given("a")])) == 1

    run(test)


def test_stopping_answers_what_is_queued_and_ends_the_thread():
    model = FakeModel()

    async def go():
        batcher = Batcher(model.compute, Limits(batch_tokens=3))
        batcher.start()
        going = [asyncio.ensure_future(batcher.ask([Given(text)])) for text in "abc"]
        await asyncio.sleep(0)
        await batcher.stop()
        assert [len(await each) for each in going] == [1, 1, 1] and not batcher.alive
        assert batcher.worked > 0 and not batcher._thread.is_alive()
        with pytest.raises(Dead):
            await batcher.ask([Given("late")])

    asyncio.run(go())


def test_what_a_text_costs():
    batcher = Batcher(FakeModel().compute, Limits(max_length=10))
    costs = {Given(""): 2, Given("abc"): 2, Given("abcd"): 3, Given("ab", "cd"): 3, Given("x" * 31): 9,
             Given("x" * 32): 10, Given("x" * 99): 10, Given((1, 2, 3)): 5, Given((1,) * 9): 10}  # fmt: skip
    assert {given: batcher.cost(given) for given in costs} == costs


def test_how_long_until_there_is_room():
    batcher = Batcher(FakeModel().compute, Limits(batch_tokens=50, queue_seconds=15.0, queue_items=3), rate=10.0)
    assert batcher.room == 100 and batcher.over(10**6, 10**6) == 0, "nothing waits"
    batcher._queue.append(None)
    batcher.waiting = 60
    assert batcher.over(40, 2) == 0 and batcher.items == 1
    assert batcher.over(41, 2) == 1 and batcher.over(40, 3) == 1, "a second at the least"
    assert batcher.over(80, 1) == 4, "(60 + 80 - 100) tokens at 10 a second"
    batcher.computing = 30
    assert batcher.over(10, 1) == 0 and batcher.over(30, 1) == 2, "what is being computed is waited for too"
    batcher.rate = 1.0
    assert batcher.room == 100, "a whole batch fits, beside the one that is being computed"


def test_the_rate_is_measured_from_answer_to_answer(monkeypatch):
    clock = iter([0.0, 12.0, *[20.0] * 99])  # the thread begins, with a text that waits; its answer comes
    monkeypatch.setattr(batching, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    batcher = Batcher(FakeModel().compute, Limits(batch_tokens=100), rate=100.0)
    batcher.alive, batcher._tell = True, lambda told: setattr(batcher, "alive", False)
    batcher._queue.append(batching._Item(Given("x" * 32), 10, SimpleNamespace(done=lambda: False)))
    batcher.waiting = 10
    batcher._work()
    assert batcher.rate == pytest.approx(0.7 * 100 + 0.3 * 10 / 12) and batcher.worked == 12.0
    assert batcher.waiting == 0 and batcher.batch == 0


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
