"""The judge of bench/attack.py: what it calls broken, and what its attackers take down."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections import Counter
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client import Counter as Counted

from bench.attack import (
    CLOSED,
    KEY,
    PUBLIC,
    counters,
    doors,
    faults,
    fell,
    read,
    refusal_faults,
    table,
    ways,
)
from bench.attackers import STILL_THERE, Aim, Attack, answer, held_open
from bench.victim import Outcome, hurt

if TYPE_CHECKING:
    from collections.abc import Callable


async def nothing(_aim: Aim) -> Counter[str]:
    return Counter()


HELD = Outcome("headers", {"431": 3}, [160.0, 200.0, 170.0], [10.0, 30.0, 40.0], {"429": 1}, 20.0)
LOAD = Attack(nothing, allowed=("429",), refused=True, sent_away=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"mb": [160.0, 351.0, 170.0]}, ["a worker above 350 MB"]),
        ({"mb": [160.0, 300.0, 241.0]}, ["memory is kept"]),
        ({"mb": [160.0, float("nan"), 170.0]}, ["a worker above 350 MB"]),
        ({"got": {"200": 1}}, ["answered with 200"]),
        ({"got": {f"408, {STILL_THERE}": 5, f"no answer, {STILL_THERE}": 2}}, [f"7 {STILL_THERE}"]),
        ({"got": {"500": 2}}, ["2 x 500"]),
        ({"honest_ms": [10.0, 2001.0, 3000.0]}, ["honest p99 above 2000 ms"]),
        ({"honest_ms": [float("nan")] * 3}, ["honest p99 above 2000 ms"]),
        ({"honest_errors": {"429": 1, "503": 2}}, ["2 honest requests: 503"]),
        ({"ready_ms": 2001.0}, ["/readyz above 2000 ms"]),
        ({"ready_ms": float("nan")}, ["/readyz above 2000 ms"]),
        ({"ready_errors": {"TimeoutError": 1}}, ["/readyz: 1 x TimeoutError"]),
    ],
)
def test_each_bound_is_judged(change: dict[str, object], words: list[str]) -> None:
    assert faults(LOAD, replace(HELD, **change)) == words  # type: ignore[arg-type]


def test_what_a_load_may_do_is_no_fault() -> None:
    got = replace(HELD, got={"200": 9, STILL_THERE: 1})
    assert faults(Attack(nothing, allowed=("429",)), got) == []
    assert hurt(got, ()) == ["1 honest requests: 429"]


def test_counters_that_fall_are_found_and_gauges_are_not() -> None:
    def exposition(requests: int, waiting: int) -> str:
        registry = CollectorRegistry()
        asked = Counted("asked", "Requests", ["status"], registry=registry)
        asked.labels("200").inc(requests)
        Histogram("seconds", "Time", buckets=[1], registry=registry).observe(requests)
        Gauge("waiting", "Texts", registry=registry).set(waiting)
        return generate_latest(registry).decode()

    earlier, later = counters(exposition(5, 3)), counters(exposition(4, 1))
    assert earlier == {
        "asked_total[('status', '200')]": 5.0,
        "seconds_bucket[('le', '1.0')]": 0.0,
        "seconds_bucket[('le', '+Inf')]": 1.0,
        "seconds_count[]": 1.0,
        "seconds_sum[]": 5.0,
    }
    assert fell(earlier, earlier) == []
    assert fell(earlier, later) == ["asked_total[('status', '200')]", "seconds_sum[]"]
    assert fell({"gone[]": 1.0}, {}) == ["gone[]"]
    assert fell({}, earlier) == []


def test_an_earlier_run_stands_above_the_later_one(tmp_path: Path) -> None:
    path = tmp_path / "before.json"
    broken = replace(HELD, broken=["answered with 200"], got={"200": 1200})
    path.write_text(json.dumps({"outcomes": [asdict(broken)]}))
    before = read(path)
    assert before == [broken]
    _, _, *rows = table([HELD, Outcome("new", skipped="no user namespaces")], before).splitlines()
    honest = "160 → 200 → 170 | 10 / 30 / 40 | 1 × 429 | 20"
    assert rows == [
        f"| headers: before | 1,200 × 200 | {honest} | broken: answered with 200 |",
        f"| headers: now | 3 × 431 | {honest} | held |",
        "| new |  |  |  |  |  | skipped: no user namespaces |",
    ]


def test_a_way_that_has_to_serve_holds_the_key(tmp_path: Path) -> None:
    names = [way.name for way in ways(tmp_path)]
    assert len(names) == len(set(names))
    for way in ways(tmp_path):
        if way.serves:
            given = "".join(way.env.values())
            if "FILE" in "".join(way.env):
                given = Path(given).read_text(encoding="utf-8")
            assert KEY in given


@pytest.mark.parametrize(
    ("reply", "closes", "word"),
    [
        (b"HTTP/1.1 431 Too Large\r\n\r\n", True, "431"),
        (b"", True, "connection closed"),
        (b"", False, "no answer in 0.2 s"),
        (b"HTTP/1.1 408 Too Slow\r\n\r\n", False, "408"),
    ],
)
def test_an_attacker_takes_down_how_it_ended(reply: bytes, closes: bool, word: str) -> None:
    stays = f"{word if reply else 'no answer'}, {'closed' if closes else STILL_THERE}"

    handlers = list[Any]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.append(asyncio.current_task())
        await reader.readline()
        writer.write(reply)
        with contextlib.suppress(ConnectionError):
            if not closes:
                await reader.read()  # until the attacker leaves
            writer.close()
            await writer.wait_closed()

    async def act() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        assert await answer(port, [b"GET / HTTP/1.1\r\n\r\n"], 0.2) == word
        got = await held_open(Aim(port, 1.0, 1), connections=3, first=b"GET\r\n", patience_s=0.2)
        assert got == {stays: 3}
        server.close()
        await asyncio.gather(*handlers)

    asyncio.run(act())


def test_nobody_there_is_no_error() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        assert asyncio.run(answer(port, [b""], 0.2)) == "connection closed"


def key_or(elsewhere: Callable[[str], int]) -> Callable[[str, str], int]:
    """The status of a path with a header: 200 with the key and of public paths."""
    public = {door.split()[1] for door in PUBLIC}
    shut = f"Bearer {KEY}"
    return lambda path, key: 200 if key == shut or path in public else elsewhere(path)


@pytest.mark.parametrize(
    ("status", "broken"),
    [
        (key_or(lambda _path: 401), []),
        (key_or(lambda _path: 200), ["open to everybody"]),
        (key_or(lambda path: 200 if path == "/%69nfo" else 401), ["open: GET /%69nfo"]),
        (key_or(lambda path: 404 if path == "/info" else 401), ["open: GET /info"]),
        (
            key_or(lambda path: 307 if path == "/classify/" else 401),
            ["open: POST /classify/"],
        ),
        (
            lambda path, key: 200 if KEY in key or path == "/" else 401,
            ["open to everybody"] + [f"401 of the public {door}" for door in PUBLIC[:-1]],
        ),
        (
            lambda path, _key: 200 if f"GET {path}" in PUBLIC else 401,
            [f"401 with the key: {door}" for door in CLOSED],
        ),
    ],
)
def test_an_open_door_is_found(status: Callable[[str, str], int], broken: list[str]) -> None:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status(self.path, self.headers.get("Authorization", "")))
            self.end_headers()

        do_GET = do_POST = do_HEAD = do_OPTIONS = answer  # noqa: N815  (the base class asks so)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            assert doors(server.server_port)[1] == broken
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("log", "serves", "broken"),
    [
        ("Error: cannot read the API keys in x: give a text file with one key a line", False, []),
        ("Error: no keys", True, ["refused to start with a key"]),
        ("Traceback (most recent call last):\nE: api_keys", False, ["refused with a traceback"]),
        (
            "Error: failed to load\nKeyError: 'x'\n",
            False,
            ["says nothing of keys (KeyError: 'x')"],
        ),
        ("Error: failed to load", False, ["says nothing of keys (Error: failed to load)"]),
        ("", False, ["says nothing of keys (no word)"]),
    ],
)
def test_a_refusal_has_to_be_one_of_keys(log: str, serves: bool, broken: list[str]) -> None:
    assert refusal_faults(log, serves=serves) == broken
