"""A micro-batcher for serving: bounded queue, token budget, deadlines, fairness. No torch, no HTTP.

The engine has a thread of its own, which takes its next batch the moment that it is done with the
last: what arrived meanwhile goes together, sorted by length and cut to a budget of padded tokens.
So the engine never waits for the event loop while there is work, a lone request never waits for
company, and while a batch is computed the loop tokenises the next.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

# Where a token costs the same in any batch, padding is pure loss: after so many texts, a batch
# takes those alone that keep it below this share of padded over real tokens.
_FREE, _MAX_PADDED = 4, 1.2
# A list takes part in a batch with so many texts before those that came later have their turn.
_SHARE = 16


class BatcherClosed(Exception):
    """The batcher takes no more; its process ends."""


class QueueFull(Exception):
    """The queue holds as much as it may; try again after ``retry_after_s``."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the queue is full; retry after {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class BatchFacts:
    """What happened to one batch; ``queue_s`` is how long each of its texts had waited."""

    texts: int
    tokens: int
    padded_tokens: int
    inference_s: float
    queue_s: tuple[float, ...]


@dataclass(slots=True)
class Timing:
    """Where the time of one call went: until its last batch began, and in all of its batches."""

    queue_s: float = 0.0
    inference_s: float = 0.0


@dataclass(eq=False, slots=True)
class _Call:
    """One call of ``submit``: its answer, and what is still missing of it."""

    answer: asyncio.Future[NDArray[Any]]
    rows: list[Any]
    missing: int
    timing: Timing
    failed: Exception | None = None
    over: bool = False  # answered, failed, or given up by its caller


@dataclass(eq=False, slots=True)
class _Item:
    call: _Call
    row: int
    tokenised: Any
    length: int
    turn: int
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """Gathers concurrent requests into batches for one engine.

    Args:
        infer: computes the logits [items, labels] of a batch; runs in a thread of its own.
        max_batch_tokens: the most padded tokens (items x longest) in one batch; a single item
            may be longer and then goes alone.
        max_queue_texts: the most items that may wait.
        max_queue_tokens: the most tokens that may wait; any number if None.
        max_wait_s: nothing is accepted while what waits needs longer than this, at the rate of
            late; any time if None.
        observe: is told of each batch, in the engine's thread.
    """

    def __init__(
        self,
        infer: Callable[[Sequence[Any]], NDArray[Any]],
        *,
        max_batch_tokens: int,
        max_queue_texts: int,
        max_queue_tokens: int | None = None,
        max_wait_s: float | None = None,
        observe: Callable[[BatchFacts], None] = lambda _facts: None,
    ) -> None:
        self._infer = infer
        self._max_batch_tokens = max_batch_tokens
        self._max_queue_texts = max_queue_texts
        self._max_queue_tokens = max_queue_tokens or math.inf
        self._max_wait_s = max_wait_s or math.inf
        self._observe = observe
        # Guards what both threads change: the queue, and whether to stop.
        self._changed = threading.Condition()
        self._waiting: list[_Item] = []
        self._tokens = 0
        self._promised = 0  # texts that are tokenised now, in the event loop's thread alone
        self._turn = 0
        self._tokens_per_s = math.nan
        self._closing = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop

    @property
    def waiting(self) -> tuple[int, int]:
        """How many texts wait, and how many tokens they have."""
        with self._changed:
            return len(self._waiting), self._tokens

    @contextmanager
    def room(self, texts: int) -> Iterator[None]:
        """Hold room for some texts while they are tokenised, so that this is not done in vain.

        Who leaves this without an ``await`` before :meth:`submit` has the room for its texts then;
        how many tokens they have may still be too much. In the event loop's thread alone.

        Raises:
            QueueFull: too much is waiting, or is about to.
        """
        self.insist_on_room(texts)
        self._promised += texts
        try:
            yield
        finally:
            self._promised -= texts

    def insist_on_room(self, texts: int = 1, tokens: int = 0) -> None:
        """Refuse some texts that would wait too long, before anything is spent on them.

        Raises:
            QueueFull: too much is waiting.
        """
        waits_s = self._tokens / self._tokens_per_s  # NaN, and so never too long, at first
        if (
            len(self._waiting) + self._promised + texts > self._max_queue_texts
            or self._tokens + tokens > self._max_queue_tokens
            or waits_s > self._max_wait_s
        ):
            raise QueueFull(1 if math.isnan(waits_s) else max(1, math.ceil(waits_s)))

    async def submit(self, tokenised: Sequence[Any], timing: Timing | None = None) -> NDArray[Any]:
        """Return the logits of some texts, shape [texts, labels], in order.

        Cancelling the call (a deadline, a client that left) takes what waits out of the queue.

        Args:
            tokenised: the texts, each with its token ids, without padding, in ``ids``.
            timing: is told where the time of this call went.

        Raises:
            QueueFull: too much is waiting; none of these texts was accepted.
            BatcherClosed: it takes no more.
            ValueError: there is no text, so that nothing would ever answer the call.
            Exception: whatever ``infer`` raised for one of these texts alone.
        """
        if not tokenised:
            raise ValueError("expected at least one text, found none")
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._work, name="ad2kit-infer", daemon=True)
            self._thread.start()
        missing = len(tokenised)
        call = _Call(self._loop.create_future(), [None] * missing, missing, timing or Timing())
        lengths = [len(each.ids) for each in tokenised]
        with self._changed:
            if self._closing:
                raise BatcherClosed
            self.insist_on_room(len(tokenised), sum(lengths))
            self._tokens += sum(lengths)
            self._waiting += [
                _Item(call, row, each, length, self._turn + row // _SHARE)
                for row, (each, length) in enumerate(zip(tokenised, lengths, strict=True))
            ]
            self._changed.notify()
        try:
            return await call.answer
        finally:
            if not call.over:
                # What nobody waits for must not fill the queue.
                call.over = True
                with self._changed:
                    self._keep(lambda item: not item.call.over)

    async def close(self) -> None:
        """Answer what is waiting or being computed, then stop."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _keep(self, wanted: Callable[[_Item], bool]) -> None:
        self._waiting = [item for item in self._waiting if wanted(item)]
        self._tokens = sum(item.length for item in self._waiting)

    def _work(self) -> None:
        start = time.perf_counter()
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                    start = time.perf_counter()
                if not self._waiting:
                    return
                batch = self._next_batch()
            # What is given up takes no time, and says nothing of the rate.
            tokens = sum(item.length for item in batch if not item.call.over)
            done = list[_Call]()
            try:
                self._compute(batch, done)
            except Exception as error:
                # Not the engine's: it must end neither this thread nor the waiting of its callers.
                logger.exception("a batch of %d texts failed", len(batch))
                for call in {item.call for item in batch if item.call.missing}:
                    call.failed = error
                    done.append(call)
            self._loop.call_soon_threadsafe(_tell, done)
            # From batch to batch, so that what the event loop takes from this thread counts too.
            end = time.perf_counter()
            if tokens:
                rate, known = tokens / (end - start), not math.isnan(self._tokens_per_s)
                # Smoothed: one batch of short texts says little of the queue.
                self._tokens_per_s = 0.9 * self._tokens_per_s + 0.1 * rate if known else rate
            start = end

    def _next_batch(self) -> list[_Item]:
        """Take the item whose turn it is, and the waiting items nearest in length."""
        first = min(self._waiting, key=lambda item: item.turn)  # the oldest of equals
        self._turn += 1
        batch, longest, tokens = list[_Item](), first.length, 0
        for item in sorted(  # the first itself is nearest; of equals the one whose turn is first
            self._waiting,
            key=lambda item: (item is not first, abs(item.length - first.length), item.turn),
        ):
            width = max(longest, item.length)
            padded = width * (len(batch) + 1)
            if batch and padded > self._max_batch_tokens:
                break
            if len(batch) >= _FREE and padded > _MAX_PADDED * (tokens + item.length):
                break
            batch.append(item)
            longest, tokens = width, tokens + item.length
        taken = set(map(id, batch))
        self._keep(lambda item: id(item) not in taken)
        return batch

    def _compute(self, batch: list[_Item], done: list[_Call]) -> None:
        """Compute one batch; if it fails, its items go alone, so that only the culprit fails."""
        batch = [item for item in batch if not item.call.over and item.call.failed is None]
        if not batch:
            return
        start = time.perf_counter()
        try:
            logits = self._infer([item.tokenised for item in batch])
            if len(logits) != len(batch):
                raise RuntimeError(f"{len(logits)} rows of logits for {len(batch)} texts")
        except Exception as error:  # whatever the engine raises belongs to the caller
            if len(batch) > 1:
                for item in batch:
                    self._compute([item], done)
                return
            batch[0].call.failed = error
            done.append(batch[0].call)
            with self._changed:  # the rest of its call is wanted no more
                self._keep(lambda item: item.call.failed is None)
            return
        seconds = time.perf_counter() - start
        for call in {item.call for item in batch}:
            call.timing.inference_s += seconds
        for item, row in zip(batch, logits, strict=True):
            call = item.call
            call.rows[item.row] = row
            call.timing.queue_s = start - item.since
            call.missing -= 1
            if not call.missing:
                done.append(call)
        tokens = sum(item.length for item in batch)
        self._observe(
            BatchFacts(
                texts=len(batch),
                tokens=tokens,
                padded_tokens=len(batch) * max(item.length for item in batch),
                inference_s=seconds,
                queue_s=tuple(start - item.since for item in batch),
            )
        )


def _tell(done: list[_Call]) -> None:
    """Answer calls; in the event loop's thread."""
    for call in done:
        call.over = True
        if call.answer.done():
            continue  # given up while it was computed
        if call.failed is not None:
            call.answer.set_exception(call.failed)
        else:
            call.answer.set_result(np.stack(call.rows))
