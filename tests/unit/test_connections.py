"""The bounds of a connection, over real sockets: a server of uvicorn with a small application."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn

from ad2kit.run.errors import UserError
from ad2kit.service import connections
from ad2kit.service.connections import REQUEST, bounded, check_files
from ad2kit.service.errors import ErrorContract, Pace, Problem, send_json
from ad2kit.service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ad2kit.service.errors import Message, Receive, Send

POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
LARGE = 2**20


class Server:
    """A running server, what its application saw, and the problems that clients were told."""

    def __init__(self, pace: Pace | None = None, **limits: Any) -> None:
        self.seen, self.told = list[Any](), list[tuple[int, str]]()
        self.go_on = threading.Event()
        self.go_on.set()
        self.logged = list[str]()  # the ids of the requests for which something could be logged
        contract = ErrorContract(self.app, max_body_bytes=2**30, observe=self.observe, pace=pace)
        self.full = False
        self.protocol = bounded(Settings(**limits), self.observe, self.admit, pace)
        config = uvicorn.Config(
            contract,
            port=0,
            http=self.protocol,
            log_config=None,
            lifespan="off",
            timeout_keep_alive=30,
        )
        self.server = uvicorn.Server(config)

    def observe(self, *told: Any) -> None:
        """Note a problem that a client was told."""
        self.told.append(told)
        self.logged.append(REQUEST.get()["request_id"])

    def admit(self, method: bytes, path: bytes) -> None:
        """Refuse POSTs to one path while the server is full."""
        if self.full and (method, path) == (b"POST", b"/"):
            raise Problem(429, "full", retry_after_s=7)

    async def app(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer with the size of the body; nothing is read of a body for /unread."""
        self.seen.append(scope)
        if scope["path"] != "/full":
            self.logged.append(REQUEST.get()["request_id"])
        if scope["path"] == "/full":
            raise Problem(429, "no room for so many")
        size, more = 0, scope["path"] != "/unread"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size += len(message["body"])
            more = message["more_body"]
        while not self.go_on.is_set():
            await asyncio.sleep(0.01)
        content = {"size": size} if scope["path"] != "/large" else {"large": "x" * 2**24}
        await send_json(send, 200, json.dumps(content).encode())

    def connect(self) -> socket.socket:
        """Open a connection."""
        address = self.server.servers[0].sockets[0].getsockname()
        return socket.create_connection(address, timeout=20)

    def ask(self, sent: bytes, count: int = 1) -> list[tuple[int, Any]]:
        """Send bytes over a connection of their own; see :func:`ask`."""
        with self.connect() as link:
            return ask(link, sent, count)


def ask(link: socket.socket, sent: bytes, count: int = 1) -> list[tuple[int, Any]]:
    """Send bytes; return status and content of so many answers, or of all until the end."""
    with contextlib.suppress(OSError):  # it was closed meanwhile; what was said is still there
        link.sendall(sent)
    received, found = b"", list[tuple[int, Any]]()
    while len(found) < count:
        head, whole, rest = received.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if whole)
        length = int(fields.get(b"content-length", 0))
        if whole and len(rest) >= length:
            found.append((int(head[9:12]), json.loads(rest[:length])))
            received = rest[length:]
            continue
        try:
            data = link.recv(2**16)
        except ConnectionResetError:
            data = b""
        if not data:
            assert received == b""
            break
        received += data
    return found


@contextlib.contextmanager
def serving(**limits: Any) -> Iterator[Server]:
    made = Server(**limits)
    thread = threading.Thread(target=made.server.run)
    thread.start()
    try:
        wait_for(lambda: made.server.started)
        yield made
    finally:
        made.go_on.set()
        made.server.should_exit = made.server.force_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_for(what: Any) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(max_header_bytes=2048, max_headers=10) as made:
        yield made


@pytest.fixture
def seen(server: Server) -> list[Message]:
    # The application may hear of a request that was refused already only after its client.
    wait_for(lambda: not server.server.server_state.tasks)
    server.seen.clear()
    server.told.clear()
    server.logged.clear()
    return server.seen


def sized(body: bytes) -> bytes:
    return POST + b"Content-Length: %d\r\n\r\n" % len(body) + body


def error(found: list[tuple[int, Any]], status: int, kind: str) -> str:
    """Check that the only answer is an error in the contract's shape; return its words."""
    ((found_status, content),) = found
    assert (found_status, content["error"]["type"]) == (status, kind), content
    assert set(content["error"]) == {"type", "message", "hint"}
    return str(content["error"]["message"])


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(GET, id="GET"),
        pytest.param(sized(b"x" * LARGE), id="a large body"),
        pytest.param(CHUNKED + b"1\r\nx\r\n" * 5000 + b"0\r\n\r\n", id="many small chunks"),
        pytest.param(CHUNKED + b"1;a=b\r\nx\r\n0\r\nA: b\r\n\r\n", id="extension and trailer"),
        pytest.param(b"\r\n" + GET, id="an empty line before it"),
        pytest.param(GET[:-2] + b"A: b\r\n" * 9 + b"\r\n", id="as many headers as may be"),
        pytest.param(GET[:-2] + b"A: " + b"b" * 1900 + b"\r\n\r\n", id="nearly as many bytes"),
    ],
)
def test_what_is_within_the_bounds_is_answered(
    server: Server, seen: list[Message], sent: bytes
) -> None:
    ((status, _),) = server.ask(sent)
    assert status == 200
    assert len(seen) == 1
    assert server.told == []


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(GET[:-2] + b"A: " + b"b" * 2100 + b"\r\n\r\n", id="one large header"),
        pytest.param(GET[:-2] + (b"A: " + b"b" * 300 + b"\r\n") * 8 + b"\r\n", id="all together"),
        pytest.param(GET[:-2] + b"A: " + b"b" * 3 * LARGE, id="one that never ends"),
        pytest.param(GET[:-2] + b"a" * LARGE, id="a name that never ends"),
        pytest.param(GET[:-2] + b"A: b\r\n" * 10 + b"\r\n", id="too many"),
        pytest.param(b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", id="address"),
        pytest.param(b"GET /?" + b"a" * 3000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", id="query"),
        pytest.param(b"G" + b"\r\n" * 3000, id="a method"),
        pytest.param(b"\r\n" * 3000, id="empty lines"),
        pytest.param(CHUNKED + b"1\r\nx\r\n0\r\nA: " + b"b" * LARGE, id="trailer"),
        pytest.param(CHUNKED + b"1\r\nx\r\n0\r\n" + b"A: b\r\n" * 10 + b"\r\n", id="trailers"),
        pytest.param(CHUNKED + b"1;" + b"a" * LARGE, id="extension of a chunk"),
    ],
)
def test_headers_beyond_the_bounds_are_refused_and_nothing_more_is_read(
    server: Server, seen: list[Message], sent: bytes
) -> None:
    found = server.ask(sent, 9)
    if sent.startswith(b"G\r"):  # it is refused for what it is
        error(found, 400, "malformed_request")
        return
    assert "2048 bytes, 10 headers" in error(found, 431, "headers_too_large")
    assert server.told == [(431, "headers_too_large")]
    # Of what comes behind its body a request only learns that its client is gone.
    assert len(seen) <= sent.startswith(CHUNKED)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        pytest.param(b"\x16\x03\x01\x00\xa5", "Invalid method", id="TLS"),
        pytest.param(b"GET / HTTP/9.9\r\n\r\n", "Invalid HTTP version", id="version"),
        pytest.param(GET[:-2] + b"A b: c\r\n\r\n", "Invalid header token", id="header"),
        pytest.param(
            CHUNKED.replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\n"),
            "Content-Length",
            id="two lengths",
        ),
        pytest.param(CHUNKED + b"zz\r\n", "Invalid character in chunk size", id="chunk"),
        pytest.param(b"CONNECT a:80 HTTP/1.1\r\n\r\n", "address cannot be read", id="CONNECT"),
    ],
)
def test_what_is_no_http_is_told_so_in_the_shape_of_all_errors(
    server: Server, seen: list[Message], sent: bytes, said: str
) -> None:
    assert said in error(server.ask(sent), 400, "malformed_request")
    assert server.told == [(400, "malformed_request")]
    assert len(seen) <= sent.startswith(CHUNKED)


def test_the_answers_to_pipelined_requests_keep_their_order(
    server: Server, seen: list[Message]
) -> None:
    sent = sized(b"one") + sized(b"three") + GET
    assert server.ask(sent, 3) == [(200, {"size": 3}), (200, {"size": 5}), (200, {"size": 0})]
    # What is wrong with a later one is said when the earlier ones have their answers.
    *first, last = server.ask(sized(b"one") + GET + GET[:-2] + b"A: b\r\n" * 10 + b"\r\n" + GET, 9)
    assert first == [(200, {"size": 3}), (200, {"size": 0})]
    error([last], 431, "headers_too_large")
    *first, last = server.ask(sized(b"one") + CHUNKED + b"zz\r\n", 9)
    assert first == [(200, {"size": 3})]
    error([last], 400, "malformed_request")
    assert len(seen) == 3 + 2 + 1


def test_no_more_requests_than_some_wait_for_one_before_them(
    server: Server, seen: list[Message]
) -> None:
    *first, last = server.ask(GET * 1000, 99)
    assert first == [(200, {"size": 0})] * 17
    error([last], 429, "overloaded")
    assert len(seen) == 17


def test_a_query_reaches_neither_application_nor_log(server: Server, seen: list[Message]) -> None:
    ((status, _),) = server.ask(b"GET /?text=secret HTTP/1.1\r\nHost: a\r\n\r\n")
    assert status == 200
    assert (seen[0]["path"], seen[0]["query_string"]) == ("/", b"")
    assert "secret" not in str(seen[0])


def with_id(request_id: bytes) -> bytes:
    return GET.replace(b"\r\n\r\n", b"\r\nX-Request-ID: " + request_id + b"\r\n\r\n")


def ids(server: Server, *requests: bytes) -> list[str]:
    """The ids in the answers to some requests of one connection, which are sent together."""
    with server.connect() as link:
        link.sendall(b"".join(requests))
        received = b""
        while received.count(b"HTTP/1.1") < len(requests) or not received.endswith(b"}"):
            data = link.recv(2**16)
            assert data
            received += data
    return re.findall(r"x-request-id: (.*)\r\n", received.decode())


@pytest.mark.usefixtures("seen")
def test_the_id_of_a_request_is_taken_over_or_made(server: Server) -> None:
    longest = b"x" * 128
    assert ids(server, with_id(b"a-1"), with_id(longest)) == ["a-1", longest.decode()]
    wrong = (b"", b"x" * 129, b"two words", "\u00e9".encode(), b"tab\there")
    made = ids(server, GET, GET, *map(with_id, wrong))
    assert len(set(made)) == 2 + len(wrong)
    assert all(re.fullmatch("[0-9a-f]{16}-[0-9a-f]+", each) for each in made)
    # Requests that wait for one before them log with their own id.
    assert server.logged[-2 - len(wrong) :] == made
    assert server.logged[:2] == ["a-1", longest.decode()]


@pytest.mark.usefixtures("seen")
@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (with_id(b"a-1")[:-2] + b"Large: " + b"x" * 2048 + b"\r\n\r\n", 431),
        (with_id(b"a-1")[:-2] + b"A: b\r\nNo colon\r\n\r\n", 400),
        (with_id(b"a-1").replace(b"GET /", b"GET /full"), 429),
    ],
)
def test_what_is_refused_has_its_id_in_the_answer_and_in_the_log(
    server: Server, sent: bytes, status: int
) -> None:
    assert ids(server, sent) == ["a-1"]
    assert server.told[-1][0] == status
    assert server.logged[-1] == "a-1"


def test_what_is_not_admitted_has_its_id() -> None:
    with serving() as server:
        server.full = True
        request = with_id(b"a-1").replace(b"GET", b"POST")
        assert ids(server, request[:-2] + b"Content-Length: 0\r\n\r\n") == ["a-1"]
        assert server.logged == ["a-1"]


def head_of(server: Server, sent: bytes) -> dict[str, str]:
    """The headers of an answer that ends its connection or not; names in small letters."""
    with server.connect() as link:
        link.sendall(sent)
        received = b""
        while b"\r\n\r\n" not in received:
            data = link.recv(2**16)
            assert data
            received += data
    lines = received.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


def of_origin(origin: str, request: bytes = GET) -> bytes:
    return request[:-2] + f"Origin: {origin}\r\nA: b\r\n\r\n".encode()


ALLOW = "access-control-allow-origin"
TOO_LARGE = GET[:-2] + b"Large: " + b"x" * 2048 + b"\r\n\r\n"


def test_pages_of_some_origins_read_every_answer_and_no_others_do() -> None:
    given = {"cors_origins": "https://a.example, http://b:8080", "max_header_bytes": 2048}
    with serving(**given) as server:
        refusal = of_origin("http://b:8080")[:-2] + b"Large: " + b"x" * 2048 + b"\r\n\r\n"
        for request in (GET, GET.replace(b"/", b"/full", 1)):
            answer = head_of(server, of_origin("https://a.example", request))
            assert (answer[ALLOW], answer["vary"]) == ("https://a.example", "Origin")
            assert "X-Request-ID" in answer["access-control-expose-headers"]
        assert head_of(server, refusal)[ALLOW] == "http://b:8080"  # the application is not asked
        for origin in ("https://a.example.evil", "http://a.example", "null", "*"):
            answer = head_of(server, of_origin(origin))
            assert ALLOW not in answer
            assert answer["vary"] == "Origin"
        server.full = True
        post = of_origin("https://a.example", GET.replace(b"GET", b"POST"))
        assert head_of(server, post)[ALLOW] == "https://a.example"


def test_pages_of_all_origins_or_of_none() -> None:
    with serving(cors_origins="*") as server:
        for request in (GET, of_origin("null")):
            answer = head_of(server, request)
            assert (answer[ALLOW], "vary" in answer) == ("*", False)
    with serving() as server:
        assert not {ALLOW, "vary"} & set(head_of(server, of_origin("https://a.example")))


def test_the_prefix_of_a_proxy_is_taken_off() -> None:
    with serving(root_path="/ad2/kit") as server:
        for sent, path in (
            ("/ad2/kit/info", "/info"),
            ("/info", "/info"),
            ("/ad2/kit/?text=a", "/"),
            ("/ad2/kit", "/"),
            ("/ad2/kit?text=a", "/"),
            ("/ad2/kitten", "/ad2/kitten"),
            ("/ad2/kit//metrics", "//metrics"),
            ("/ad2/kit/ad2/kit/x", "/ad2/kit/x"),
        ):
            server.ask(GET.replace(b"/", sent.encode(), 1))
            assert server.seen[-1]["path"] == path
        server.full = True
        (refused,) = server.ask(POST.replace(b"/", b"/ad2/kit/", 1) + b"Content-Length: 0\r\n\r\n")
        assert refused[0] == 429


def test_an_upgrade_to_another_protocol_is_answered_as_none(
    server: Server, seen: list[Message]
) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    ((status, _),) = server.ask(GET[:-2] + upgrade + b"Sec-WebSocket-Key: YQ==\r\n\r\n")
    assert status == 200
    assert seen[0]["type"] == "http"


@pytest.mark.parametrize(
    ("first", "told"),
    [
        pytest.param(b"GET /", "the headers took longer than 0.3 s", id="method"),
        pytest.param(GET[:-2] + b"A: ", "the headers took longer than 0.3 s", id="headers"),
        pytest.param(
            POST + b"Content-Length: 9999\r\n\r\n", "the body took longer than 0.4 s", id="body"
        ),
        pytest.param(CHUNKED + b"1;", "the body took longer than 0.4 s", id="chunk"),
    ],
)
def test_a_client_that_sends_a_byte_at_a_time_is_closed_and_others_are_not(
    first: bytes, told: str
) -> None:
    with serving(header_timeout_s=0.3, body_timeout_s=0.4) as server, server.connect() as slow:
        slow.sendall(first)
        try:
            while not server.told:
                slow.sendall(b"a")
                assert server.ask(GET) == [(200, {"size": 0})]
                time.sleep(0.02)
        except OSError:
            pass  # it was closed
        assert told in error(ask(slow, b""), 408, "too_slow")
        assert server.told == [(408, "too_slow")]


@pytest.mark.parametrize("sent", [b"", b"\r\n"])
def test_a_connection_without_a_request_is_closed(sent: bytes) -> None:
    with serving(header_timeout_s=0.2) as server, server.connect() as idle:
        idle.sendall(sent)
        assert idle.recv(1) == b""
        assert server.told == []


def test_a_body_that_is_answered_before_it_is_here_keeps_nobody_waiting() -> None:
    with serving() as server, server.connect() as link:
        link.sendall(POST.replace(b" / ", b" /unread ") + b"Content-Length: 999\r\n\r\nx")
        assert ask(link, b"", count=2) == [(200, {"size": 0})]  # until it is closed
        # One that comes in time leaves the connection open for the next request.
        body = b"x" * 2**17
        unread = sized(body).replace(b" / ", b" /unread ")
        assert server.ask(unread + sized(b"ab"), 2) == [(200, {"size": 0}), (200, {"size": 2})]


def test_a_client_that_does_not_read_is_closed() -> None:
    with serving(write_timeout_s=0.3) as server, server.connect() as deaf:
        deaf.sendall(GET.replace(b" / ", b" /large "))
        wait_for(lambda: server.seen)
        wait_for(lambda: not server.server.server_state.connections)
        assert server.ask(GET) == [(200, {"size": 0})]


def test_a_connection_that_is_closed_with_an_answer_unread_does_not_stay() -> None:
    """The answer fits into what the transport takes, but not into the socket."""
    with serving(write_timeout_s=0.3) as server, server.connect() as deaf:
        deaf.sendall(GET.replace(b" / ", b" /large ")[:-2] + b"Connection: close\r\n\r\n")
        wait_for(lambda: server.seen)
        wait_for(lambda: not server.server.server_state.connections)


def test_connections_above_the_most_are_told_and_the_others_live_on() -> None:
    with serving(max_connections=3) as server:
        held = [server.connect() for _ in range(3)]
        wait_for(lambda: len(server.server.server_state.connections) == 3)
        assert "3 connections" in error(server.ask(GET), 503, "not_ready")
        assert server.seen == []
        # They are told no more when there are very many; some of these are closed at once.
        many = [server.connect() for _ in range(connections._TOLD + 20)]
        wait_for(lambda: len(server.server.server_state.connections) <= 3)
        for link in [*held, *many]:
            link.close()
        wait_for(lambda: not server.server.server_state.connections)
        assert server.ask(GET) == [(200, {"size": 0})]


@pytest.mark.parametrize("full", [False, True], ids=["answered", "refused before a body arrives"])
def test_the_last_answer_of_a_connection_says_that_it_ends(full: bool) -> None:
    with serving(max_connection_requests=3) as server, server.connect() as link:
        server.full = full
        for number in range(3):
            link.sendall(sized(b"x"))
            received = b""
            while not received.endswith(b"}"):
                received += link.recv(2**16)
            head = received.lower().partition(b"\r\n\r\n")[0]
            assert head.startswith(b"http/1.1 429" if full else b"http/1.1 200")
            assert (b"connection: close" in head) == (number == 2)
        assert link.recv(1) == b""


def test_of_requests_sent_at_once_those_after_the_last_are_not_begun() -> None:
    with serving(max_connection_requests=3) as server:
        assert server.ask(5 * GET, 5) == 3 * [(200, {"size": 0})]
        assert len(server.seen) == 3


def test_bodies_of_all_connections_together_are_bounded() -> None:
    """What waits is counted, what was answered is not, and small requests always have room."""
    with serving(max_held_bytes=3 * LARGE) as server:
        server.go_on.clear()
        held = [server.connect() for _ in range(3)]
        for link in held:
            link.sendall(sized(b"x" * (LARGE - 1)))
        wait_for(lambda: server.protocol.held_bytes >= 3 * (LARGE - 1 - 4096))
        assert len(server.seen) == 3
        refused = server.ask(sized(b"x" * LARGE))
        assert "large" in error(refused, 429, "overloaded")
        assert server.told == [(429, "overloaded")]
        with server.connect() as small:
            small.sendall(sized(b"x" * 4000))
            wait_for(lambda: len(server.seen) == 5)
            server.go_on.set()
            assert ask(small, b"") == [(200, {"size": 4000})]
        for link in held:
            assert ask(link, b"") == [(200, {"size": LARGE - 1})]
            link.close()
        wait_for(lambda: server.protocol.held_bytes == 0)
        assert server.ask(sized(b"x" * LARGE)) == [(200, {"size": LARGE})]


def test_what_a_client_that_left_had_sent_is_let_go() -> None:
    with serving() as server:
        with server.connect() as leaving:
            leaving.sendall(sized(b"x" * 100_000)[:-1])
            wait_for(lambda: server.protocol.held_bytes > 90_000)
        wait_for(lambda: server.protocol.held_bytes == 0)


def test_more_connections_than_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, changed = [(1024, 2000)], list[Any]()
    monkeypatch.setattr("resource.getrlimit", lambda _what: limits[0])
    monkeypatch.setattr("resource.setrlimit", lambda _what, given: changed.append(given))
    check_files(500)
    assert changed == []  # there is room for them
    check_files(1500)
    ((soft, hard),) = changed
    assert 1500 < soft <= hard == 2000
    with pytest.raises(
        UserError, match=r"max_connections=4096 needs \d+ open files, .* 2000"
    ) as no:
        check_files(4096)
    check_files(int(no.value.hint.partition("AD2KIT_MAX_CONNECTIONS=")[2].partition(",")[0]))


def test_what_is_not_admitted_is_told_so_and_the_connection_lives_on() -> None:
    with serving() as server, server.connect() as link:
        server.full = True
        for size in (10, LARGE):  # twice as many bytes as are thrown away of one request
            for _ in range(8):
                assert "full" in error(ask(link, sized(b"x" * size)), 429, "overloaded")
        assert server.told == [(429, "overloaded")] * 16
        assert server.seen == []
        assert ask(link, GET) == [(200, {"size": 0})]  # others are
        server.full = False
        assert ask(link, sized(b"x" * 99)) == [(200, {"size": 99})]
        wait_for(lambda: server.protocol.held_bytes == 0)
        server.full = True
        # A client that asks for no more is answered before it is closed.
        assert "full" in error(
            ask(link, sized(b"x").replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1), 9),
            429,
            "overloaded",
        )


def test_refusals_go_out_at_a_pace_and_one_more_for_each_answer() -> None:
    async def out_after(seconds: float, answers: int) -> list[int]:
        pace, out = Pace(per_second=20, at_once=3), list[int]()
        at_once = [number for number in range(40) if not pace.wait(partial(out.append, number))]
        assert at_once == [0, 1, 2]
        for _ in range(answers):
            pace.answered()
        await asyncio.sleep(seconds)
        return out

    async def late() -> list[int]:
        pace, out = Pace(per_second=20, at_once=1), list[int]()
        for number in range(40):
            pace.wait(partial(out.append, number))
        time.sleep(0.5)  # whoever holds the loop
        await asyncio.sleep(0.01)
        return out

    # Never more than the rate allows; a slow machine may have had less.
    slow = asyncio.run(out_after(0.5, 0))
    assert slow == list(range(3, 3 + len(slow)))
    assert 1 <= len(slow) <= 10
    assert asyncio.run(out_after(0.0, 30)) == list(range(3, 33))
    # A loop that was late makes up for it.
    assert len(asyncio.run(late())) >= 8
    # What answers let through is not counted twice, and the last one waits for its tick.
    assert asyncio.run(out_after(0.0, 1000)) == list(range(3, 39))
    assert asyncio.run(out_after(0.3, 1000)) == list(range(3, 40))


@pytest.mark.parametrize("path", [b"/", b"/full"], ids=["at the door", "by the application"])
def test_who_does_not_wait_when_it_is_refused_is_kept_waiting_and_nobody_else(path: bytes) -> None:
    with serving(pace=Pace(per_second=10, at_once=2)) as server, server.connect() as link:
        server.full = True
        start, request = time.monotonic(), sized(b"x" * 10).replace(b"POST /", b"POST " + path, 1)
        for number in range(12):
            error(ask(link, request), 429, "overloaded")
            if number == 6:
                before = time.monotonic()
                assert server.ask(GET) == [(200, {"size": 0})]
                # Behind the refusals so far it would take their time too.
                assert time.monotonic() - before < before - start
        # The answer to the last one went out at its turn, or its request was read then; the first
        # one at the door has none.
        assert time.monotonic() - start >= (12 - 1 - 2 - 1) / 10
        server.full = False
        assert ask(link, sized(b"x" * 99)) == [(200, {"size": 99})]


def test_who_closes_when_it_is_refused_leaves_nothing_behind() -> None:
    """Clients without keep-alive: each refusal has a connection of its own."""
    pace = Pace(per_second=0.1, at_once=1)
    with serving(pace=pace, max_connections=20) as server:
        server.full = True
        for _ in range(60):
            assert "full" in error(server.ask(sized(b"x" * 10)), 429, "overloaded")
        assert server.ask(GET) == [(200, {"size": 0})]
        wait_for(lambda: not server.server.server_state.connections)


def test_requests_that_are_sent_along_are_not_refused_one_by_one_for_ever() -> None:
    with serving(pace=Pace(per_second=1, at_once=2)) as server, server.connect() as link:
        server.full = True
        found = ask(link, sized(b"x") * 1000, 1000)
        assert 3 <= len(found) < 10
        assert {status for status, _ in found} == {429}


def test_a_client_that_is_read_later_keeps_the_connection() -> None:
    """Its keep-alive ends while nothing is read of it, and the rest of its body comes then."""
    with (
        serving(pace=Pace(per_second=0.5, at_once=1), header_timeout_s=0.5) as server,
        server.connect() as link,
    ):
        server.full = True
        error(ask(link, sized(b"x")), 429, "overloaded")
        error(ask(link, sized(b"x" * LARGE)), 429, "overloaded")  # not read to its end now
        server.full = False
        assert ask(link, sized(b"x" * 5)) == [(200, {"size": 5})]


def test_who_is_not_admitted_and_sends_no_body_is_closed() -> None:
    with serving() as server, server.connect() as link:
        server.full = True
        link.sendall(POST + b"Content-Length: 999\r\n\r\n")
        assert "full" in error(ask(link, b"", 9), 429, "overloaded")
