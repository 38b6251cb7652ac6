"""What attackers send to a service: too much, too slowly, and never to the end. See attack.py.

Everything here goes to 127.0.0.1, stops by itself, and runs in a process of its own, so that what
an attacker costs is not taken for what the service costs.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.load import closed_loop, post
from bench.serve import drive

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator

HOST, MIB = "127.0.0.1", 2**20
BODY = MIB - 2**10  # the service reads a body of one MiB
# Whoever is slow has been sent away after so long.
SLOW_S = 40.0
STILL_THERE = "still there in the end"
READY = b"GET /readyz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True)
class Aim:
    """Where to attack, and for how long; ``columns`` is how many texts the model reads at once."""

    port: int
    seconds: float
    columns: int


@dataclass(frozen=True)
class Attack:
    """A load of an attacker.

    Args:
        act: attacks, and returns what came; in the attackers' process.
        seconds: how long it goes on.
        allowed: statuses that an honest client may get meanwhile.
        refused: whether an answer of 200 is a fault.
        sent_away: whether an attacker who is still connected in the end is a fault.
    """

    act: Callable[[Aim], Coroutine[Any, Any, Counter[str]]]
    seconds: float = 15.0
    allowed: tuple[str, ...] = ()
    refused: bool = False
    sent_away: bool = False


async def answer(port: int, parts: Iterable[bytes], patience_s: float = 30.0) -> str:
    """Send the parts of a request; return the status of the answer, or how the connection ended."""
    line = b""
    try:
        async with asyncio.timeout(patience_s):
            reader, writer = await asyncio.open_connection(HOST, port)
            try:
                reading = asyncio.ensure_future(reader.readline())
                with contextlib.suppress(ConnectionError):  # the answer may have come before
                    for part in parts:
                        writer.write(part)
                        await writer.drain()
                        if reading.done():
                            break
                line = await reading
            finally:
                writer.transport.abort()
    except TimeoutError:
        return f"no answer in {patience_s:g} s"
    except OSError:
        pass
    return line[9:12].decode() or "connection closed"


async def again_and_again(
    aim: Aim, at_once: int, one: Callable[[], Awaitable[str]]
) -> Counter[str]:
    """Let some attackers do one thing after another, until the time is over."""
    got, end = Counter[str](), time.monotonic() + aim.seconds

    async def attacker() -> None:
        while time.monotonic() < end:
            got[await one()] += 1
            await asyncio.sleep(0.02)

    await asyncio.gather(*(attacker() for _ in range(at_once)))
    return got


def classify(texts: list[Any]) -> bytes:
    """Return a request to classify texts."""
    return post(
        "/classify", json.dumps({"texts": texts}, ensure_ascii=False).encode(), bool
    ).content


async def texts(
    aim: Aim, *, at_once: int, make: Callable[[int], str], many: int = 1, pairs: bool = False
) -> Counter[str]:
    """Ask for ``many`` texts at a time that fill a body; ``make`` gets the bytes of each."""
    columns = 2 if pairs else aim.columns
    text = make(BODY // columns // many - 8 * columns)
    request = classify([text if columns == 1 else [text] * columns] * many)
    return await again_and_again(aim, at_once, lambda: answer(aim.port, [request]))


async def heads(aim: Aim, *, make: Callable[[], Iterable[bytes]]) -> Counter[str]:
    """Ask, two at once, in ways that make the service read much before it knows what it is."""
    return await again_and_again(aim, 2, lambda: answer(aim.port, make()))


def head(*lines: bytes, start: bytes = b"GET /readyz HTTP/1.1") -> bytes:
    """Return the beginning of a request."""
    return b"\r\n".join([start, b"Host: a", *lines]) + b"\r\n"


def large_header() -> Iterator[bytes]:
    """Yield a request with a header of 64 MB."""
    yield head() + b"x: "
    yield from [b"a" * MIB] * 64
    yield b"\r\n\r\n"


def large_headers() -> Iterator[bytes]:
    """Yield 64 headers of 1 MB, and the end of the headers."""
    for number in range(64):
        yield b"x-%d: " % number + b"a" * MIB + b"\r\n"
    yield b"\r\n"


def many_headers() -> Iterator[bytes]:
    """Yield a request with 10,000 headers."""
    yield head(*(b"x-%d: a" % number for number in range(10_000))) + b"\r\n"


def long_line() -> Iterator[bytes]:
    """Yield a request with a path of 10 MB."""
    yield b"GET /readyz?"
    yield from [b"a" * MIB] * 10
    yield b" HTTP/1.1\r\nHost: a\r\n\r\n"


def trailers() -> Iterator[bytes]:
    """Yield a request with 64 MB of headers behind its chunked body."""
    body = json.dumps({"texts": ["fine"]}).encode()
    yield head(
        b"Content-Type: application/json",
        b"Transfer-Encoding: chunked",
        start=b"POST /classify HTTP/1.1",
    )
    yield b"\r\n%x\r\n%s\r\n0\r\n" % (len(body), body)
    yield from large_headers()


async def held_open(
    aim: Aim, *, connections: int, first: bytes, drip: bytes = b"", patience_s: float = 5.0
) -> Counter[str]:
    """Open connections and never finish; of an answer only the status is read until the end."""

    async def one() -> str:
        over = time.monotonic() + aim.seconds
        try:
            reader, writer = await asyncio.open_connection(HOST, aim.port, limit=2**10)
        except OSError:
            return "not accepted"
        status = asyncio.ensure_future(reader.read(12))
        writer.write(first)
        while time.monotonic() < over and not (reader.at_eof() or writer.is_closing()):
            writer.write(drip)
            await asyncio.sleep(1.0)
        line, end = b"", "closed"
        try:
            async with asyncio.timeout(patience_s):
                line = await status
                while await reader.read(2**16):
                    pass
        except TimeoutError:
            end = STILL_THERE
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()
        return f"{line[9:].decode() or 'no answer'}, {end}"

    return Counter(await asyncio.gather(*(one() for _ in range(connections))))


async def lists(aim: Aim) -> Counter[str]:
    """Ask for 64 texts at a time over 400 connections."""
    text = "neither long nor dull, and told with so much care that nobody left before its end"
    row = text if aim.columns == 1 else [text] * aim.columns
    sent = [post("/classify", json.dumps({"texts": [row] * 64}).encode(), bool)]
    load = await closed_loop(aim.port, sent, 400, aim.seconds)
    return load.errors + Counter({"200": len(load.ms)})


async def abandoned(aim: Aim) -> Counter[str]:
    """Send lists of 128 long texts, and leave before the answer; 16 at once."""
    text = words(BODY // aim.columns // 128 - 8 * aim.columns)
    request = classify([text if aim.columns == 1 else [text] * aim.columns] * 128)

    async def one() -> str:
        try:
            _, writer = await asyncio.open_connection(HOST, aim.port)
            writer.write(request)
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.transport.abort()
        except OSError:
            return "connection closed"
        return "left"

    return await again_and_again(aim, 16, one)


def spaces(size: int) -> str:
    """Return 200,000 spaces and two words."""
    return " " * min(size - 10, 200_000) + "fine film"


def accents(size: int) -> str:
    """Return a letter below combining accents; two bytes each."""
    return "e" + "\u0301" * (size // 2 - 1)


def controls(size: int) -> str:
    """Return control characters and two words."""
    return "\x7f" * (size - 10) + "fine film"


def bangs(size: int) -> str:
    """Return exclamation marks, each of which is a token."""
    return "!" * size


def words(size: int) -> str:
    """Return words."""
    return "film " * (size // 5)


_SLOW_HEAD = head() + b"x: "
_SLOW_BODY = post("/classify", b" " * 999, bool).content.removesuffix(b" " * 999)
_MANY = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 2000
ATTACKS = {
    "memory: a text of 1 MB of !": Attack(partial(texts, at_once=1, make=bangs)),
    "memory: the same, 24 at once": Attack(partial(texts, at_once=24, make=bangs)),
    "memory: 200,000 spaces, then two words, 8 at once": Attack(
        partial(texts, at_once=8, make=spaces)
    ),
    "memory: 1 MB of accents, 8 at once": Attack(partial(texts, at_once=8, make=accents)),
    "memory: 1 MB of control characters, 8 at once": Attack(
        partial(texts, at_once=8, make=controls)
    ),
    "memory: 128 texts of 8 KB, 8 at once": Attack(
        partial(texts, at_once=8, make=words, many=128), allowed=("429",)
    ),
    "memory: pairs of 0.5 MB of !, 8 at once": Attack(
        partial(texts, at_once=8, make=bangs, pairs=True)
    ),
    "headers: one of 64 MB": Attack(partial(heads, make=large_header), refused=True),
    "headers: 64 of 1 MB": Attack(
        partial(heads, make=lambda: itertools.chain([head()], large_headers())), refused=True
    ),
    "headers: 10,000": Attack(partial(heads, make=many_headers), refused=True),
    "headers: a path of 10 MB": Attack(partial(heads, make=long_line), refused=True),
    "headers: 64 MB of trailers": Attack(partial(heads, make=trailers), refused=True),
    "slow clients: a header's byte a second, 200 connections": Attack(
        partial(held_open, connections=200, first=_SLOW_HEAD, drip=b"a"), SLOW_S, sent_away=True
    ),
    "slow clients: a body's byte a second, 200 connections": Attack(
        partial(held_open, connections=200, first=_SLOW_BODY, drip=b" "), SLOW_S, sent_away=True
    ),
    "slow clients: 2,000 connections that say nothing": Attack(
        partial(held_open, connections=2000, first=b""), SLOW_S, sent_away=True
    ),
    "slow clients: 50 that ask 2,000 times and read nothing": Attack(
        partial(held_open, connections=50, first=_MANY), SLOW_S, sent_away=True
    ),
    "lists: 400 connections, 64 texts each": Attack(lists, allowed=("429",)),
    "lists: 128 long texts, and gone": Attack(abandoned, allowed=("429",)),
}


def attack(name: str, aim: Aim) -> Counter[str]:
    """Make an attack; in the attackers' process."""
    return drive(ATTACKS[name].act(aim))
