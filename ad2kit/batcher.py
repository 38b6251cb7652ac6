"""An asyncio micro-batcher for serving: bounded queue, token budget, deadlines. No torch.

Requests that arrive while a batch is being computed wait together and form the next one, sorted
by length and cut to a budget of padded tokens. A lone request never waits for company.
"""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray


class Tokenised(Protocol):
    """What the batcher needs to know of an item: its token ids."""

    @property
    def ids(self) -> Sequence[int]:
        """Token ids, without padding."""


class QueueFull(Exception):
    """The queue holds as many texts as it may; try again after ``retry_after_s``."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the queue is full; retry after {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class _Item:
    tokenised: Tokenised
    answer: asyncio.Future[NDArray[Any]] = field(default_factory=asyncio.Future)


class Batcher:
    """Gathers concurrent requests into batches for one engine.

    Args:
        infer: computes the logits [items, labels] of a batch; runs in a thread of its own.
        max_batch_tokens: the most padded tokens (items x longest) in one batch; a single item
            may be longer and then goes alone.
        max_queue_texts: the most items that may wait.
    """

    def __init__(
        self,
        infer: Callable[[Sequence[Any]], NDArray[Any]],
        *,
        max_batch_tokens: int,
        max_queue_texts: int,
    ) -> None:
        self._infer = infer
        self._max_batch_tokens = max_batch_tokens
        self._max_queue_texts = max_queue_texts
        self._waiting: deque[_Item] = deque()
        self._wake = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._closing = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ad2kit-infer")

    async def submit(self, tokenised: Sequence[Any]) -> NDArray[Any]:
        """Return the logits of some texts, shape [texts, labels], in order.

        Cancelling the call (a deadline, a client that left) takes what still waits out of the
        queue.

        Raises:
            QueueFull: too many texts are waiting; none of these was accepted.
            RuntimeError: the batcher is closed.
            Exception: whatever ``infer`` raised for one of these texts alone.
        """
        if self._closing:
            raise RuntimeError("the batcher is closed")
        if len(self._waiting) + len(tokenised) > self._max_queue_texts:
            raise QueueFull(retry_after_s=1)
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        items = [_Item(each) for each in tokenised]
        self._waiting.extend(items)
        self._wake.set()
        try:
            return np.stack(await asyncio.gather(*(item.answer for item in items)))
        finally:
            for item in items:
                item.answer.cancel()
            # What nobody waits for must not fill the queue.
            self._waiting = deque(item for item in self._waiting if not item.answer.done())

    async def close(self) -> None:
        """Answer what is waiting or being computed, then stop."""
        self._closing = True
        self._wake.set()
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()

    def _next_batch(self) -> list[_Item]:
        """Take the oldest item that is still wanted, and the waiting items nearest in length."""
        while self._waiting and self._waiting[0].answer.done():
            self._waiting.popleft()
        if not self._waiting:
            return []
        first = self._waiting.popleft()
        length = len(first.tokenised.ids)
        others = sorted(
            (item for item in self._waiting if not item.answer.done()),
            key=lambda item: abs(len(item.tokenised.ids) - length),
        )
        batch, longest = [first], length
        for item in others:
            longest = max(longest, len(item.tokenised.ids))
            if longest * (len(batch) + 1) > self._max_batch_tokens:
                break
            batch.append(item)
        taken = set(map(id, batch))
        self._waiting = deque(
            item for item in self._waiting if id(item) not in taken and not item.answer.done()
        )
        return batch

    async def _work(self) -> None:
        while True:
            batch = self._next_batch()
            if not batch:
                if self._closing:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            await self._answer(batch)

    async def _answer(self, batch: list[_Item]) -> None:
        """Compute one batch; if it fails, its items go alone, so that only the culprit fails."""
        loop = asyncio.get_running_loop()
        try:
            logits = await loop.run_in_executor(
                self._thread, self._infer, [item.tokenised for item in batch]
            )
        except Exception as error:  # whatever the engine raises belongs to the caller
            if len(batch) > 1:
                for item in batch:
                    await self._answer([item])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        for item, row in zip(batch, logits, strict=True):
            if not item.answer.done():
                item.answer.set_result(row)
