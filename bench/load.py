"""A load generator for small HTTP services: closed loops for capacity, open loops for latency.

A closed loop keeps a number of connections busy: each sends its next request when the last was
answered, which finds the capacity and hides how long requests would have queued. An open loop sends
at random times of a given rate whatever the answers do, and counts a request's time from when it
was due, so that waiting for a late answer counts too. An answer that is not right is an error.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class Request:
    """The bytes to send, and what says whether the body of the answer is right."""

    content: bytes
    is_right: Callable[[bytes], bool]


@dataclass
class Load:
    """What a load saw: milliseconds of right answers, and how often each error came.

    ``ms`` count from when a request was due, ``sent_ms`` from when it was written.
    """

    seconds: float = 0.0
    ms: list[float] = field(default_factory=list)
    sent_ms: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def per_s(self) -> float:
        """Right answers per second."""
        return len(self.ms) / self.seconds

    def served_ms(self, share: float) -> float:
        """Return a quantile of the milliseconds since the request was written."""
        return float(np.quantile(self.sent_ms, share)) if self.sent_ms else float("nan")

    def quantile(self, share: float) -> float:
        """Return a quantile of the milliseconds; NaN if nothing was answered."""
        return float(np.quantile(self.ms, share)) if self.ms else float("nan")


def post(path: str, body: bytes, is_right: Callable[[bytes], bool]) -> Request:
    """Return a request that POSTs JSON."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return Request(head.encode() + body, is_right)


class Connection(asyncio.Protocol):
    """One kept-alive HTTP/1.1 connection; answers need a Content-Length."""

    def __init__(self) -> None:
        self.received = b""
        self.answer: asyncio.Future[tuple[int, bytes]] | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what requests are written to."""
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Gather an answer."""
        self.received += data
        head, found, body = self.received.partition(b"\r\n\r\n")
        if not found or self.answer is None:
            return
        _, _, rest = head.lower().partition(b"content-length:")
        if len(body) >= int(rest.partition(b"\r\n")[0]):
            self.received = b""
            if b"connection: close" in head.lower():
                self.transport.close()
            if not self.answer.done():
                self.answer.set_result((int(head[9:12]), body))

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who waits."""
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(exc or ConnectionResetError("closed"))

    async def ask(self, content: bytes) -> tuple[int, bytes]:
        """Send a request and return status and body."""
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(content)
        return await self.answer


async def connect(port: int) -> Connection:
    """Open a connection."""
    _, connection = await asyncio.get_running_loop().create_connection(
        Connection, "127.0.0.1", port
    )
    return connection


async def _one(
    port: int, link: Connection, request: Request, start: float, load: Load
) -> Connection:
    """Ask once and take down what came; return a connection that works."""
    if link.transport.is_closing():  # the server keeps an idle one for some seconds
        link = await connect(port)
    sent = time.perf_counter()
    try:
        status, body = await asyncio.wait_for(link.ask(request.content), 30)
    except (OSError, TimeoutError) as error:
        load.errors[type(error).__name__] += 1
        link.transport.close()
        return await connect(port)
    if status == 200 and request.is_right(body):
        now = time.perf_counter()
        load.ms.append(1e3 * (now - start))
        load.sent_ms.append(1e3 * (now - sent))
    else:
        load.errors["wrong answer" if status == 200 else str(status)] += 1
    if link.transport.is_closing():
        return await connect(port)
    return link


async def closed_loop(
    port: int,
    requests: Sequence[Request],
    connections: int,
    seconds: float,
    links: Sequence[Connection] = (),
) -> Load:
    """Keep some connections busy for some seconds: those that are given, or new ones."""
    load, start = Load(), time.perf_counter()

    async def client(first: int) -> None:
        link = links[first] if links else await connect(port)
        for number in range(first, 10**9, connections):
            now = time.perf_counter()
            if now > start + seconds:
                break
            try:
                link = await _one(port, link, requests[number % len(requests)], now, load)
            except ConnectionRefusedError:  # nobody listens any more
                break
        link.transport.close()

    await asyncio.gather(*map(client, range(connections)))
    load.seconds = time.perf_counter() - start
    return load


async def open_loop(
    port: int, requests: Sequence[Request], per_s: float, seconds: float, connections: int = 256
) -> Load:
    """Send at random times of a rate, over as many connections as are free and may be."""
    load, start, source = Load(), time.perf_counter(), random.Random(0)  # noqa: S311
    free = deque([await connect(port) for _ in range(connections)])
    due, tasks = start, set[asyncio.Task[None]]()
    waiting = asyncio.Semaphore(connections)

    async def send(request: Request, when: float) -> None:
        async with waiting:
            free.append(await _one(port, free.popleft(), request, when, load))

    number = 0
    while due < start + seconds:
        due += source.expovariate(per_s)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.create_task(send(requests[number % len(requests)], due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        number += 1
    await asyncio.gather(*tasks)
    load.seconds = time.perf_counter() - start
    for link in free:
        link.transport.close()
    return load
