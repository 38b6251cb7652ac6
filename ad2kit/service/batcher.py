"""A micro-batcher for serving: bounded queue, token budget, deadlines, fairness. No torch, no HTTP.

Several models may share it: one queue, one thread, and one batch at a time, of texts of one model.

An item is a text, or a window of a long text; all windows of a text are items of one call. The
engine has a thread of its own. As soon as a batch is done, the thread takes the next one: the
texts that arrived meanwhile, sorted by length and cut to a budget of padded tokens. So the engine
never waits for the event loop while there is work, and a lone request never waits for company.
While the engine computes a batch, the event loop tokenises the next one.
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

# Where a token costs the same in any batch, padding is pure loss. A batch takes its first texts
# whatever their padding; after them it takes only texts that keep the ratio of padded to real
# tokens within this bound.
_FREE_TEXTS = 4
_MAX_PADDING_RATIO = 1.2
# A list of texts is divided into parts of this size; texts that came later have their turn between
# two parts.
_TEXTS_PER_TURN = 16


class BatcherClosed(Exception):
    """The batcher accepts no more texts, because its process ends."""


class TooMuch(Exception):
    """The texts of one call are more than the empty queue holds; trying again is of no use."""


class QueueFull(Exception):
    """The queue is full; the caller may try again after ``retry_after_s`` seconds."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the queue is full; retry after {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class BatchFacts:
    """Facts about one computed batch; ``queue_s`` holds the waiting time of each of its items.

    ``texts`` counts the items: the windows of a long text count each.
    """

    texts: int
    tokens: int
    padded_tokens: int
    inference_s: float
    queue_s: tuple[float, ...]


@dataclass(slots=True)
class Timing:
    """Times of one call, in seconds.

    Attributes:
        queue_s: from the call until its last batch began.
        inference_s: in all of its batches together.
    """

    queue_s: float = 0.0
    inference_s: float = 0.0


@dataclass(eq=False, slots=True)
class _Call:
    """One call of ``submit``: its future answer, and the rows of logits that are there so far."""

    infer: Callable[[Sequence[Any]], NDArray[Any]]
    answer: asyncio.Future[NDArray[Any]]
    rows: list[Any]
    missing: int
    timing: Timing
    error: Exception | None = None
    over: bool = False  # answered, failed, or given up by its caller


@dataclass(eq=False, slots=True)
class _Item:
    """One text or window that waits: its call, its row in the answer, and its turn."""

    call: _Call
    row: int
    tokenised: Any
    length: int
    turn: int
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """Gathers concurrent requests into batches for one engine.

    Args:
        infer: computes the logits [items, labels] of a batch, unless a call brings its own model;
            runs in a thread of its own.
        max_batch_tokens: the most padded tokens (items x longest) in one batch; a single item
            may be longer and then goes alone.
        max_queue_texts: the most items that may wait.
        max_queue_tokens: the most tokens that may wait; no limit if None.
        max_wait_s: nothing is accepted while the waiting tokens need longer than this, at the
            recent rate of the engine; no limit if None.
        observe: is called with the facts of each batch, in the engine's thread.
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
        # Guards the state that both threads change: the queue, and whether to stop.
        self._changed = threading.Condition()
        self._waiting: list[_Item] = []
        self._tokens = 0
        self._promised = 0  # texts being tokenised now; changed only in the event loop's thread
        self._turn = 0
        self._tokens_per_s = math.nan
        self._closing = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop

    @property
    def waiting(self) -> tuple[int, int]:
        """The number of texts that wait, and the number of their tokens."""
        with self._changed:
            return len(self._waiting), self._tokens

    @contextmanager
    def reserved(self, texts: int) -> Iterator[None]:
        """Keep a place for some texts while they are tokenised, so that this work is not wasted.

        A caller that leaves this context and calls :meth:`submit` without an ``await`` in between
        keeps the place of its texts; their tokens may still be too many. To be used only in the
        event loop's thread.

        Raises:
            QueueFull: too many texts wait or are about to wait.
        """
        self.check_room(texts)
        self._promised += texts
        try:
            yield
        finally:
            self._promised -= texts

    def check_room(self, texts: int = 1, tokens: int = 0) -> None:
        """Refuse some texts that would wait too long, before any work is spent on them.

        Raises:
            QueueFull: too many texts or tokens wait.
        """
        # NaN before the first batch; every comparison with NaN is false, so it is never too long.
        wait_s = self._tokens / self._tokens_per_s
        if (
            len(self._waiting) + self._promised + texts > self._max_queue_texts
            or self._tokens + tokens > self._max_queue_tokens
            or wait_s > self._max_wait_s
        ):
            raise QueueFull(1 if math.isnan(wait_s) else max(1, math.ceil(wait_s)))

    async def submit(
        self,
        tokenised: Sequence[Any],
        timing: Timing | None = None,
        infer: Callable[[Sequence[Any]], NDArray[Any]] | None = None,
    ) -> NDArray[Any]:
        """Return the logits of some texts or windows, shape [items, labels], in order.

        Cancelling the call (a deadline, a client that left) takes its texts out of the queue.

        Args:
            tokenised: the texts or windows, each with its token ids, without padding, in ``ids``.
            timing: receives the times of this call.
            infer: computes these texts; if None, what the batcher was made with. Only texts with
                the same function share a batch.

        Raises:
            TooMuch: the empty queue does not hold so many texts, windows or tokens.
            QueueFull: too much is waiting; none of these texts was accepted.
            BatcherClosed: the batcher accepts no more texts.
            ValueError: there is no text, so that nothing would ever answer the call.
            Exception: the error that ``infer`` raised for one of these texts alone.
        """
        if not tokenised:
            raise ValueError("expected at least one text, found none")
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._work, name="ad2kit-infer", daemon=True)
            self._thread.start()
        texts = len(tokenised)
        call = _Call(
            infer or self._infer,
            self._loop.create_future(),
            [None] * texts,
            texts,
            timing or Timing(),
        )
        lengths = [len(tokens.ids) for tokens in tokenised]
        if texts > self._max_queue_texts or sum(lengths) > self._max_queue_tokens:
            raise TooMuch(
                f"expected at most {self._max_queue_texts} texts or windows with "
                f"{self._max_queue_tokens} tokens in all, found {texts} with {sum(lengths)}"
            )
        with self._changed:
            if self._closing:
                raise BatcherClosed
            self.check_room(texts, sum(lengths))
            self._tokens += sum(lengths)
            self._waiting += [
                _Item(call, row, tokens, length, self._turn + row // _TEXTS_PER_TURN)
                for row, (tokens, length) in enumerate(zip(tokenised, lengths, strict=True))
            ]
            self._changed.notify()
        try:
            return await call.answer
        finally:
            if not call.over:
                # Texts whose caller has gone must not fill the queue.
                call.over = True
                with self._changed:
                    self._keep(lambda item: not item.call.over)

    async def close(self) -> None:
        """Answer the texts that wait or are being computed, then stop the engine's thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _keep(self, predicate: Callable[[_Item], bool]) -> None:
        """Drop the waiting items for which the predicate is false; the caller holds the lock."""
        self._waiting = [item for item in self._waiting if predicate(item)]
        self._tokens = sum(item.length for item in self._waiting)

    def _work(self) -> None:
        """Compute batch after batch until the batcher is closed; the engine's thread runs this."""
        start = time.perf_counter()
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                    start = time.perf_counter()
                if not self._waiting:
                    return
                batch = self._next_batch()
            # Texts whose call is over take no time, and do not count into the rate.
            tokens = sum(item.length for item in batch if not item.call.over)
            finished = list[_Call]()
            try:
                self._compute(batch, finished)
            except Exception as error:
                # Not an error of the engine. It must neither end this thread nor leave callers
                # without an answer.
                logger.exception("a batch of %d texts failed", len(batch))
                for call in {item.call for item in batch if item.call.missing}:
                    call.error = error
                    finished.append(call)
            self._loop.call_soon_threadsafe(_answer_calls, finished)
            # Measured from batch to batch, so that it includes the time that the event loop takes
            # from this thread.
            end = time.perf_counter()
            if tokens:
                rate = tokens / (end - start)
                if math.isnan(self._tokens_per_s):
                    self._tokens_per_s = rate
                else:
                    # Smoothed: one batch of short texts says little about the queue.
                    self._tokens_per_s = 0.9 * self._tokens_per_s + 0.1 * rate
            start = end
            # While nothing waits, they would keep a version of a model that is no longer served.
            del batch, finished

    def _next_batch(self) -> list[_Item]:
        """Take the item whose turn it is, and the items of its model nearest in length."""
        first = min(self._waiting, key=lambda item: item.turn)  # among equals the oldest
        infer = first.call.infer
        self._turn += 1
        batch = list[_Item]()
        longest = first.length
        tokens = 0
        for item in sorted(  # the first item, then the nearest lengths; among equals by turn
            [item for item in self._waiting if item.call.infer == infer],
            key=lambda item: (item is not first, abs(item.length - first.length), item.turn),
        ):
            width = max(longest, item.length)
            padded = width * (len(batch) + 1)
            if batch and padded > self._max_batch_tokens:
                break
            real = tokens + item.length
            if len(batch) >= _FREE_TEXTS and padded > _MAX_PADDING_RATIO * real:
                break
            batch.append(item)
            longest = width
            tokens = real
        batch_ids = set(map(id, batch))
        self._keep(lambda item: id(item) not in batch_ids)
        return batch

    def _compute(self, batch: list[_Item], finished: list[_Call]) -> None:
        """Compute one batch, and append the calls that it finishes to ``finished``.

        If the batch fails, each of its items is computed alone, so that only the culprit fails.
        """
        batch = [item for item in batch if not item.call.over and item.call.error is None]
        if not batch:
            return
        start = time.perf_counter()
        try:
            logits = batch[0].call.infer([item.tokenised for item in batch])
            if len(logits) != len(batch):
                raise RuntimeError(f"{len(logits)} rows of logits for {len(batch)} texts")
        except Exception as error:  # whatever the engine raises belongs to the caller
            if len(batch) > 1:
                for item in batch:
                    self._compute([item], finished)
                return
            batch[0].call.error = error
            finished.append(batch[0].call)
            with self._changed:  # nobody needs the other texts of the failed call
                self._keep(lambda item: item.call.error is None)
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
                finished.append(call)
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


def _answer_calls(finished: list[_Call]) -> None:
    """Answer calls that are finished; runs in the event loop's thread."""
    for call in finished:
        call.over = True
        if call.answer.done():
            continue  # cancelled while it was computed
        if call.error is not None:
            call.answer.set_exception(call.error)
        else:
            call.answer.set_result(np.stack(call.rows))
