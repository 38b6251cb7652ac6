"""What clients can make the served process hold, and that others do not notice."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import psutil
import pytest
import tokenizers
from packaging.version import Version

from tests.http_client import (
    JSON,
    Reply,
    call,
    check_error,
    classify,
    command_of,
    metrics_of,
    serving,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ad2kit.run.folder import RunDir

pytestmark = pytest.mark.slow

KEY = {**JSON, "Authorization": "Bearer a-key"}
BODY = json.dumps({"texts": "fine"}).encode()
HEAD = b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
WORST_MB = 350.0


@pytest.fixture(scope="module")
def tight(finished_run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One worker with little patience, which asks for a key."""
    given = (
        "workers=1",
        "max_header_bytes=2048",
        "max_headers=20",
        "header_timeout_s=0.5",
        "body_timeout_s=0.5",
        "max_connections=24",
        f"model={finished_run.onnx('int8')}",
    )
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # of this server alone
            patch.setenv("AD2KIT_API_KEYS", "a-key")
            address = stack.enter_context(serving(tmp_path_factory.mktemp("tight"), *given))
        yield address


@contextlib.contextmanager
def connected(address: str) -> Iterator[socket.socket]:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as link:
        yield link


def told(link: socket.socket, sent: bytes = b"") -> Reply:
    """Send bytes, and return the answer before the server closes the connection."""
    received = b""
    with contextlib.suppress(OSError):
        link.sendall(sent)
    with contextlib.suppress(ConnectionResetError):
        while data := link.recv(2**16):
            received += data
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return Reply(int(status.split()[1]), headers, body)


def rejected(address: str) -> dict[str, float]:
    found = metrics_of(address)
    return {
        name.split('"')[1]: count
        for name, count in found.items()
        if name.startswith("ad2kit_rejected_total")
    }


@pytest.mark.parametrize("line", [b"GET /livez", b"GET /info", b"POST /classify", b"GET /nowhere"])
@pytest.mark.parametrize(
    ("sent", "status", "kind"),
    [
        pytest.param(b"A: " + b"b" * 5000, 431, "headers_too_large", id="header"),
        pytest.param(b"A: b\r\n" * 30, 431, "headers_too_large", id="headers"),
        pytest.param(b"\0: b\r\n", 400, "malformed_request", id="no header"),
    ],
)
def test_headers_are_bounded_on_every_path_without_a_key_and_counted(
    tight: str, line: bytes, sent: bytes, status: int, kind: str
) -> None:
    before = rejected(tight).get(kind, 0.0)
    with connected(tight) as link:
        check_error(told(link, line + b" HTTP/1.1\r\nHost: a\r\n" + sent + b"\r\n"), status, kind)
    assert rejected(tight)[kind] == before + 1


def test_slow_clients_are_closed_and_nobody_else_notices(tight: str) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connected(tight)) for _ in range(12)]
        firsts = [b"GET /livez HTTP/1.1\r\nA: ", HEAD + b"Content-Length: 999\r\n\r\n"]
        for number, link in enumerate(slow):
            link.sendall(firsts[number % 2])
        done = threading.Event()

        def trickle() -> None:
            while not done.wait(0.05):
                for link in slow:
                    with contextlib.suppress(OSError):
                        link.sendall(b"a")

        thread = threading.Thread(target=trickle)
        thread.start()
        for _ in range(20):
            assert call(tight, "POST", "/classify", BODY, KEY).status == 200
        found = [told(link) for link in slow]
        done.set()
        thread.join()
    # Whose headers were there is told that it has no key, and then waited for no longer.
    assert sorted(each.status for each in found) == [401] * 6 + [408] * 6
    for each in found:
        check_error(each, each.status, "too_slow" if each.status == 408 else "unauthorized")


def test_a_body_that_trickles_in_is_given_up(tight: str) -> None:
    with connected(tight) as link:
        link.sendall(HEAD + b"Authorization: Bearer a-key\r\nContent-Length: 999\r\n\r\n{")
        assert "body" in check_error(told(link), 408, "too_slow")["message"]


def test_more_connections_than_may_be_are_told_so(tight: str) -> None:
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(connected(tight)) for _ in range(30)]
        check_error(told(links[-1]), 503, "not_ready")
    wait_for(lambda: call(tight, "POST", "/classify", BODY, KEY).status == 200)


def test_a_body_in_an_encoding_that_is_not_read_is_told_so(tight: str) -> None:
    packed = call(
        tight, "POST", "/classify", gzip.compress(BODY), {**KEY, "Content-Encoding": "gzip"}
    )
    assert packed.status == 200
    packed = call(tight, "POST", "/classify", BODY, {**KEY, "Content-Encoding": "br"})
    assert "br is not read" in check_error(packed, 415, "unsupported_media_type")["message"]
    latin = {**KEY, "Content-Type": "application/json; charset=latin-1"}
    reply = call(tight, "POST", "/classify", '{"texts": "é"}'.encode("latin-1"), latin)
    assert "latin-1" in check_error(reply, 415, "unsupported_media_type")["message"]


def worker(address: str) -> psutil.Process:
    """The worker that listens at an address; its parent process listens there too."""
    port = int(address.rpartition(":")[2])
    (found,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if "_bentoml_impl" in " ".join(command_of(process))
        and any(link.laddr.port == port for link in process.net_connections("tcp"))
    ]
    return found


def resident_mb(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 1e6


@pytest.fixture(scope="module")
def roomy(finished_run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One worker with the bounds that a service has by itself."""
    given = ("workers=1", "threads=1", f"model={finished_run.onnx('int8')}")
    with serving(tmp_path_factory.mktemp("roomy"), *given) as address:
        yield address


MEGABYTE = 2**20 - 64
# After its first text of a megabyte, tokenizers 0.23 keeps 40 MB, and 0.22 keeps 7. The next ones
# add nothing.
LEFT_MB = 40 if Version(tokenizers.__version__) < Version("0.23") else 60
HEAVY = {
    # They become few tokens, so that all of each has to be read.
    "spaces": {"texts": [" " * MEGABYTE + "fine"]},
    "one word": {"texts": ["a" * MEGABYTE]},
    "accents": {"texts": ["a" + "\u0301" * (MEGABYTE // 2 - 8) + " fine"]},
    "four bytes a character": {"texts": ["🎉" + "\0" * (MEGABYTE // 6 - 8)]},
    "a list": {"texts": ["fine " * 10] * 15_000},
    "of lists": {"texts": [["a"]] * 100_000},
}


@pytest.mark.parametrize("kind", HEAVY)
def test_the_worst_that_is_accepted_fits_and_leaves_nothing_behind(roomy: str, kind: str) -> None:
    body = json.dumps(HEAVY[kind], ensure_ascii=False).encode()
    assert len(body) <= 2**20
    assert classify(roomy, "fine").status == 200
    process = worker(roomy)
    before = resident_mb(process)
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, resident_mb(process))

    thread = threading.Thread(target=watch)
    thread.start()

    def ask(_number: int) -> int:
        try:
            return call(roomy, "POST", "/classify", body, JSON).status
        except OSError:  # refused while it was sending
            return 429

    with ThreadPoolExecutor(64) as pool:
        statuses = set(pool.map(ask, range(64)))
        assert statuses <= {200, 413, 429, 504}
    done.set()
    thread.join()
    assert peak < WORST_MB
    wait_for(lambda: resident_mb(process) < before + LEFT_MB)
    assert classify(roomy, "fine").status == 200


def test_bodies_that_wait_to_be_complete_are_bounded_together(roomy: str) -> None:
    """Each of 200 clients sends all of its body but the last byte."""
    process = worker(roomy)
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(connected(roomy)) for _ in range(200)]
        for link in links:
            with contextlib.suppress(OSError):
                link.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n" + b" " * 999_999)
        assert resident_mb(process) < WORST_MB
        assert classify(roomy, "fine").status == 200  # small ones have room
    body = json.dumps({"texts": ["fine " * 20_000]}).encode()
    wait_for(lambda: call(roomy, "POST", "/classify", body, JSON).status == 200)


def test_an_answer_that_nobody_reads_does_not_stay(finished_run: RunDir, tmp_path: Path) -> None:
    given = ("workers=1", "write_timeout_s=0.5", f"model={finished_run.onnx('int8')}")
    with serving(tmp_path, *given) as address, connected(address) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        process, mine = worker(address), deaf.getsockname()

        def held() -> bool:
            return any(link.raddr == mine for link in process.net_connections("tcp"))

        wait_for(held)
        with contextlib.suppress(OSError):
            for _ in range(2000):
                deaf.sendall(b"GET /docs.json HTTP/1.1\r\nHost: a\r\n\r\n" * 8)
        wait_for(lambda: not held())
        assert classify(address, "fine").status == 200
