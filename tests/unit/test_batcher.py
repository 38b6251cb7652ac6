"""The micro-batcher, with an engine whose answers give away which text they belong to."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ad2kit.service.batcher import Batcher, BatcherClosed, BatchFacts, QueueFull

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

    from numpy.typing import NDArray

POISON = -1


@dataclass(frozen=True)
class Item:
    ids: tuple[int, ...]


def item(number: int, length: int = 1) -> Item:
    return Item((number,) * length)


def answer(text: Item) -> NDArray[np.float64]:
    """A value that no other item of a test shares: the number and the length."""
    return np.array([text.ids[0], len(text.ids)], dtype=np.float64)


class Engine:
    """Stands in for the classifier; records its batches, and stops before each while held."""

    def __init__(self) -> None:
        self.batches: list[list[Item]] = []
        self.entered = threading.Event()
        self.released = threading.Event()
        self.released.set()
        self.seconds_per_token = 0.0

    def __call__(self, batch: Sequence[Item]) -> NDArray[np.float64]:
        self.batches.append(list(batch))
        self.entered.set()
        assert self.released.wait(10)
        time.sleep(self.seconds_per_token * sum(len(each.ids) for each in batch))
        if any(POISON in each.ids for each in batch):
            raise ValueError("poison")
        return np.stack([answer(each) for each in batch])

    @property
    def seen(self) -> list[Item]:
        return [each for batch in self.batches for each in batch]

    async def busy(self) -> None:
        """Wait until a batch is being computed."""
        assert await asyncio.to_thread(self.entered.wait, 10)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    # A hang is the likeliest defect of a queue; it must not take the whole suite's timeout.
    asyncio.run(asyncio.wait_for(test(), 20))


@asynccontextmanager
async def batching(
    engine: Engine, *, max_batch_tokens: int = 64, max_queue_texts: int = 1000, **more: Any
) -> AsyncIterator[Batcher]:
    batcher = Batcher(
        engine, max_batch_tokens=max_batch_tokens, max_queue_texts=max_queue_texts, **more
    )
    try:
        yield batcher
    finally:
        engine.released.set()
        await batcher.close()


async def submitted(
    batcher: Batcher, *requests: Sequence[Item]
) -> list[asyncio.Task[NDArray[Any]]]:
    """Start one call per request and return when all of them wait in the queue, in this order."""
    tasks = [asyncio.create_task(batcher.submit(request)) for request in requests]
    await asyncio.sleep(0)
    return tasks


async def occupied(batcher: Batcher, engine: Engine) -> asyncio.Task[NDArray[Any]]:
    """Hold the engine at a first request, so that what comes next has to queue."""
    engine.released.clear()
    (first,) = await submitted(batcher, [item(1000)])
    await engine.busy()
    return first


def check_budget(engine: Engine, max_batch_tokens: int) -> None:
    for batch in engine.batches:
        padded = len(batch) * max(len(each.ids) for each in batch)
        assert len(batch) == 1 or padded <= max_batch_tokens, batch


def test_many_concurrent_requests_get_their_own_answers() -> None:
    async def test() -> None:
        rng = np.random.default_rng(5)
        lengths = [rng.integers(1, 40, size=size) for size in rng.integers(1, 9, size=80)]
        numbers = iter(range(1_000_000))
        requests = [[item(next(numbers), int(n)) for n in request] for request in lengths]
        engine = Engine()
        async with batching(engine) as batcher:
            results = await asyncio.gather(*map(batcher.submit, requests))
        for request, result in zip(requests, results, strict=True):
            np.testing.assert_array_equal(result, np.stack([answer(each) for each in request]))
        assert len(engine.batches) < len(engine.seen) / 2  # it did gather them
        check_budget(engine, 64)

    run(test)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    requests=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=8),
    budget=st.integers(1, 100),
)
def test_any_load_is_answered_once_in_order_and_within_budget(
    requests: list[list[int]], budget: int
) -> None:
    async def test() -> None:
        numbers = iter(range(1_000_000))
        items = [[item(next(numbers), length) for length in request] for request in requests]
        engine = Engine()
        engine.released.clear()
        async with batching(engine, max_batch_tokens=budget) as batcher:
            tasks = await submitted(batcher, *items)
            engine.released.set()
            results = await asyncio.gather(*tasks)
        for request, result in zip(items, results, strict=True):
            np.testing.assert_array_equal(result, np.stack([answer(each) for each in request]))
        every = [each for request in items for each in request]
        assert sorted(engine.seen, key=lambda each: each.ids[0]) == every  # each exactly once
        check_budget(engine, budget)

    run(test)


def test_models_share_a_queue_and_no_batch() -> None:
    async def test() -> None:
        one, two = Engine(), Engine()
        async with batching(one, max_queue_texts=9) as batcher:
            held = await occupied(batcher, one)
            calls = [
                batcher.submit([item(number)], infer=two if number % 2 else None)
                for number in range(8)
            ]
            answers = asyncio.gather(*calls)
            await asyncio.sleep(0)
            with pytest.raises(QueueFull):
                await batcher.submit([item(1), item(2)], infer=two)
            one.released.set()
            assert [list(found[0]) for found in await answers] == [[n, 1] for n in range(8)]
            await held
        assert [len(batch) for batch in one.batches] == [1, 4]
        assert [[each.ids[0] for each in batch] for batch in two.batches] == [[1, 3, 5, 7]]

    run(test)


def test_a_list_keeps_its_order_although_its_texts_go_in_several_batches() -> None:
    async def test() -> None:
        request = [item(0, 9), item(1, 1), item(2, 20), item(3, 2), item(4, 8), item(5, 1)]
        engine = Engine()
        async with batching(engine, max_batch_tokens=18) as batcher:
            result = await batcher.submit(request)
        np.testing.assert_array_equal(result, np.stack([answer(each) for each in request]))
        assert len(engine.batches) > 1

    run(test)


def test_what_arrives_while_the_engine_works_goes_as_one_batch_nearest_in_length() -> None:
    async def test() -> None:
        engine = Engine()
        async with batching(engine, max_batch_tokens=30) as batcher:
            first = await occupied(batcher, engine)
            short, long = [item(n, 3) for n in range(4)], [item(n, 10) for n in range(4, 7)]
            mixed = [[short[0]], [long[0]], [short[1], long[1]], [long[2], short[2]], [short[3]]]
            tasks = await submitted(batcher, *mixed)
            engine.released.set()
            await asyncio.gather(first, *tasks)
        assert [set(batch) for batch in engine.batches[1:]] == [set(short), set(long)]

    run(test)


def test_the_oldest_text_is_in_the_next_batch_whatever_its_length() -> None:
    async def test() -> None:
        engine = Engine()
        async with batching(engine, max_batch_tokens=16) as batcher:
            first = await occupied(batcher, engine)
            oldest = item(0, 16)
            tasks = await submitted(batcher, [oldest], *([item(n, 2)] for n in range(1, 9)))
            engine.released.set()
            await asyncio.gather(first, *tasks)
        assert engine.batches[1] == [oldest]

    run(test)


def test_a_text_over_the_budget_goes_alone() -> None:
    async def test() -> None:
        engine, long = Engine(), item(1, 50)
        async with batching(engine, max_batch_tokens=8) as batcher:
            first = await occupied(batcher, engine)
            tasks = await submitted(batcher, [item(0, 2)], [long], [item(2, 2)])
            engine.released.set()
            await asyncio.gather(first, *tasks)
        assert [long] in engine.batches
        check_budget(engine, 8)

    run(test)


def test_a_lone_request_does_not_wait_for_company(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        engine = Engine()

        def no_timer(*_: object, **__: object) -> None:
            pytest.fail("a timer was started although nobody else is there")

        async with batching(engine) as batcher:
            with monkeypatch.context() as patch:
                # Any wait for company, however short, needs a timer of the loop.
                patch.setattr(asyncio.get_running_loop(), "call_at", no_timer)
                result = await batcher.submit([item(7, 3)])
        np.testing.assert_array_equal(result, [[7, 3]])
        assert engine.batches == [[item(7, 3)]]

    run(test)


def test_a_full_queue_refuses_a_request_whole() -> None:
    async def test() -> None:
        engine = Engine()
        async with batching(engine, max_queue_texts=4) as batcher:
            first = await occupied(batcher, engine)
            tasks = await submitted(batcher, [item(0), item(1), item(2)])
            refused = [item(77), item(78)]  # only one of them would fit
            with pytest.raises(QueueFull) as full:
                await batcher.submit(refused)
            assert full.value.retry_after_s == 1
            tasks += await submitted(batcher, [item(3)])  # exactly full is not too full
            with pytest.raises(QueueFull):
                await batcher.submit([item(79)])
            engine.released.set()
            results = await asyncio.gather(first, *tasks)
            np.testing.assert_array_equal(results[1], [[0, 1], [1, 1], [2, 1]])
            np.testing.assert_array_equal(await batcher.submit([item(5)]), [[5, 1]])
        assert {each.ids[0] for each in engine.seen} == {1000, 0, 1, 2, 3, 5}

    run(test)


def test_the_queue_is_bounded_in_tokens_too_and_says_when_it_will_be_empty() -> None:
    async def test() -> None:
        engine = Engine()
        async with batching(engine, max_queue_tokens=10) as batcher:
            first = await occupied(batcher, engine)
            tasks = await submitted(batcher, [item(0, 6)], [item(1, 4)])
            assert batcher.waiting == (2, 10)
            with pytest.raises(QueueFull) as full:
                await batcher.submit([item(2)])
            assert full.value.retry_after_s == 1  # nothing is known of the rate yet
            engine.released.set()
            await asyncio.gather(first, *tasks)
            assert batcher.waiting == (0, 0)

    run(test)


def test_nothing_is_accepted_that_would_wait_too_long_at_the_rate_of_late() -> None:
    async def test() -> None:
        engine = Engine()
        engine.seconds_per_token = 0.001
        async with batching(engine, max_batch_tokens=1000, max_wait_s=1.0) as batcher:
            await batcher.submit([item(0, 100)])
            first = await occupied(batcher, engine)
            tasks = await submitted(batcher, [item(1, 800)])  # needs 0.8 s
            batcher.check_room()
            tasks += await submitted(batcher, [item(2, 900)])
            with pytest.raises(QueueFull) as full:
                batcher.check_room()
            assert 2 <= full.value.retry_after_s <= 4  # 1.7 s, on a machine of any mood
            for task in tasks:
                task.cancel()
            engine.seconds_per_token = 0.0
            engine.released.set()
            await first
            batcher.check_room()

    run(test)


def test_single_texts_do_not_wait_for_all_of_a_list_that_came_before() -> None:
    async def test() -> None:
        engine = Engine()
        async with batching(engine, max_batch_tokens=32) as batcher:
            first = await occupied(batcher, engine)
            long = [item(n, 4) for n in range(64)]  # eight batches
            tasks = await submitted(batcher, long, [item(500, 2)], [item(501, 9)])
            engine.released.set()
            await asyncio.gather(first, *tasks)
        place = {each.ids[0]: at for at, batch in enumerate(engine.batches) for each in batch}
        assert max(place.values()) >= 8
        assert max(place[500], place[501]) <= 4

    run(test)


def test_long_texts_do_not_pad_short_ones() -> None:
    async def test() -> None:
        engine = Engine()
        async with batching(engine, max_batch_tokens=1000) as batcher:
            first = await occupied(batcher, engine)
            short, long = [item(n, 5) for n in range(8)], [item(n, 50) for n in range(8, 12)]
            tasks = await submitted(batcher, *([each] for each in [*short, *long]))
            engine.released.set()
            await asyncio.gather(first, *tasks)
        assert [set(batch) for batch in engine.batches[1:]] == [set(short), set(long)]

    run(test)


def test_what_happened_to_a_batch_is_told() -> None:
    async def test() -> None:
        engine, told = Engine(), list[BatchFacts]()
        async with batching(engine, observe=told.append) as batcher:
            first = await occupied(batcher, engine)
            tasks = await submitted(batcher, [item(1, 3)], [item(2, 5)])
            engine.released.set()
            await asyncio.gather(first, *tasks)
        assert [(facts.texts, facts.tokens, facts.padded_tokens) for facts in told] == [
            (1, 1, 1),
            (2, 8, 10),
        ]
        assert all(
            0 <= seconds < 20 for facts in told for seconds in (facts.inference_s, *facts.queue_s)
        )

    run(test)


def test_an_observer_that_fails_costs_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_facts: BatchFacts) -> None:
        raise OSError("disk full")

    async def test() -> None:
        async with batching(Engine(), observe=fail) as batcher:
            for number in range(3):
                result = await batcher.submit([item(number, 2), item(number, 9)])
                np.testing.assert_array_equal(result, [[number, 2], [number, 9]])

    run(test)
    assert "a batch of 2 texts failed" in caplog.text


def test_an_engine_that_loses_rows_fails_and_does_not_mix_them_up() -> None:
    class Losing(Engine):
        def __call__(self, batch: Sequence[Item]) -> NDArray[np.float64]:
            return super().__call__(batch)[: 1 if len(batch) > 1 else 0]

    async def test() -> None:
        async with batching(Losing()) as batcher:
            with pytest.raises(RuntimeError, match="0 rows of logits for 1 texts"):
                await batcher.submit([item(1), item(2)])

    run(test)


def test_a_cancelled_request_is_never_computed_and_frees_its_place_at_once() -> None:
    async def test() -> None:
        engine = Engine()
        async with batching(engine, max_queue_texts=3) as batcher:
            first = await occupied(batcher, engine)
            (gone,) = await submitted(batcher, [item(1), item(2), item(3)])
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            # The engine is still held: only the cancellation can have made room.
            (kept,) = await submitted(batcher, [item(4), item(5), item(6)])
            engine.released.set()
            await first
            np.testing.assert_array_equal(await kept, [[4, 1], [5, 1], [6, 1]])
        assert engine.batches == [[item(1000)], [item(4), item(5), item(6)]]

    run(test)


def test_a_request_past_its_deadline_is_never_computed() -> None:
    async def test() -> None:
        engine = Engine()
        async with batching(engine) as batcher:
            first = await occupied(batcher, engine)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await batcher.submit([item(1), item(2)])
            engine.released.set()
            await first
            np.testing.assert_array_equal(await batcher.submit([item(3)]), [[3, 1]])
        assert engine.seen == [item(1000), item(3)]

    run(test)


def test_a_request_cancelled_while_it_is_computed_harms_nobody() -> None:
    async def test() -> None:
        engine = Engine()
        async with batching(engine) as batcher:
            first = await occupied(batcher, engine)
            (mate,) = await submitted(batcher, [item(2)])
            first.cancel()
            engine.released.set()
            np.testing.assert_array_equal(await mate, [[2, 1]])
            np.testing.assert_array_equal(await batcher.submit([item(3)]), [[3, 1]])

    run(test)


def test_a_poisonous_text_fails_alone() -> None:
    async def test() -> None:
        engine = Engine()
        async with batching(engine) as batcher:
            first = await occupied(batcher, engine)
            good, bad = [item(1), item(2)], [item(POISON)]
            tasks = await submitted(batcher, good, bad, [item(3)])
            engine.released.set()
            left, failed, right = await asyncio.gather(*tasks, return_exceptions=True)
            await first
            np.testing.assert_array_equal(np.asarray(left), [[1, 1], [2, 1]])
            np.testing.assert_array_equal(np.asarray(right), [[3, 1]])
            assert isinstance(failed, ValueError)
            assert {*good, *bad, item(3)} == set(engine.batches[1])  # they did share a batch
            np.testing.assert_array_equal(await batcher.submit([item(4)]), [[4, 1]])

    run(test)


def test_a_request_with_one_poisonous_text_fails_as_a_whole() -> None:
    async def test() -> None:
        engine, rest = Engine(), [item(n, 4) for n in range(20)]
        async with batching(engine, max_batch_tokens=4) as batcher:
            with pytest.raises(ValueError, match="poison"):
                await batcher.submit([item(POISON, 4), item(POISON, 4), *rest])
        assert len(engine.batches) < 10  # one or two may be under way already, no more

    run(test)


@pytest.mark.parametrize("waiting", [0, 1, 30])
def test_close_answers_what_is_computed_and_what_waits_and_then_refuses(waiting: int) -> None:
    async def test() -> None:
        engine = Engine()
        async with batching(engine, max_batch_tokens=4) as batcher:
            first = await occupied(batcher, engine)
            tasks = await submitted(batcher, *([item(n)] for n in range(waiting)))
            closing = asyncio.create_task(batcher.close())
            await asyncio.sleep(0)
            assert not closing.done()
            engine.released.set()
            await closing
            np.testing.assert_array_equal(await first, [[1000, 1]])
            for number, result in enumerate(await asyncio.gather(*tasks)):
                np.testing.assert_array_equal(result, [[number, 1]])
            with pytest.raises(BatcherClosed):
                await batcher.submit([item(1)])
        assert not any(t.name.startswith("ad2kit-infer") for t in threading.enumerate())

    run(test)


def test_close_of_an_unused_batcher_returns() -> None:
    async def test() -> None:
        async with batching(Engine()):
            pass

    run(test)


def test_a_call_without_texts_is_refused_and_does_not_wait_for_ever() -> None:
    async def test() -> None:
        async with batching(Engine()) as batcher:
            with pytest.raises(ValueError, match="at least one text"):
                await asyncio.wait_for(batcher.submit([]), timeout=10)

    run(test)


def test_room_is_held_for_what_is_tokenised_and_given_back() -> None:
    async def test() -> None:
        async with batching(Engine(), max_queue_texts=10) as batcher:
            with batcher.reserved(6):
                with pytest.raises(QueueFull), batcher.reserved(5):
                    raise AssertionError("there was no room")
                with pytest.raises(QueueFull):
                    await batcher.submit([item(1)] * 5)
                with batcher.reserved(4):
                    pass
            with pytest.raises(ValueError, match="mine"), batcher.reserved(10):
                raise ValueError("mine")
            with batcher.reserved(10):
                pass
            assert len(await batcher.submit([item(1)] * 10)) == 10

    run(test)
