"""Bounds on connections: bytes, headers, time, and their number. No application sees them.

An ASGI application learns of a request when all of its headers have arrived. Uvicorn's protocol on
httptools bounds neither the bytes of the headers nor their time: 200 connections that sent a byte a
second stayed for ever, and a request with 300 MB of headers was answered. So the bounds are here,
in a subclass of that protocol. They hold for every path, and before any API key is checked.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import math
import re
import resource
import secrets
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from ad2kit.run.errors import UserError
from ad2kit.service.errors import Pace, Problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from ad2kit.service.settings import Settings

# Interval of the search for late connections: one look at all costs less than a timer for each.
_LOOK_S = 0.25
# The first bytes of each request do not count into the bytes that a worker holds, so that many
# large requests leave room for small ones.
_SMALL_BYTES = 4096
# A client may be answered before its request is complete. The rest of the request is then read and
# thrown away, within this time and these bytes. If the connection were closed at once, the client
# might lose the answer: its system throws away unread data when it sends to a closed connection.
_REST_S = 2.0
_REST_BYTES = 4 * 2**20
# So many connections above the maximum get an answer that says so; any more are cut off.
_TOLD = 64
# Most requests of a connection that wait for the answer to an earlier one. Clients rarely do this.
_PIPELINED = 16
# How long the application may take to let go of a request whose client is gone.
_FORGET_S = 1.0
# A request above this size makes us give free memory back to the system, with at least this time
# between two such calls.
_LARGE_BYTES = 2**16
_TIDY_S = 2.0
# Files that a process opens beside its connections: libraries, model, log, metrics, and BentoML's.
_OTHER_FILES = 192
# What log lines say of the request that they belong to, for example its id.
REQUEST: ContextVar[dict[str, str]] = ContextVar("REQUEST")
# An id that a client or a proxy may choose: visible ASCII characters, so that it is safe to repeat.
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
# Ids that are made here: random for the process, then counted, which costs less than a random one.
_PROCESS_ID = secrets.token_hex(8).encode()
_numbers = itertools.count(1)
_HINT = "send HTTP/1.1; for https use the port of the proxy in front of this service"


class _RefusedError(Exception):
    """Stops the parser; raised in one of its callbacks when a request is refused."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.status)
        self.problem = problem


class Bounded(HttpToolsProtocol):
    """One connection within the bounds; :func:`bounded` returns the subclass that sets them."""

    limits: ClassVar[Settings]
    origins: ClassVar[frozenset[bytes]]
    prefix: ClassVar[bytes]
    observe: ClassVar[Callable[[int, str], None]]
    admit: ClassVar[Callable[[bytes, bytes], None]]
    pace: ClassVar[Pace]
    held_bytes: ClassVar[int] = 0  # of the requests of all connections, without their first bytes
    to_tidy: ClassVar[int] = 0  # how many more times to give memory back to the system
    tidied: ClassVar[float] = 0.0  # loop time of the last such call
    looking: ClassVar[bool] = False  # whether the search for late connections is scheduled

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # A WebSocket would be another protocol, without bounds; nothing here speaks it.
        self.ws_protocol_class = None
        self.timeout_keep_alive = self.limits.keep_alive_s  # type: ignore[assignment]
        self._due = math.inf  # loop time at which the client is late with what it has to send
        self._write_due = math.inf  # loop time at which the client is late with reading its answer
        self._reading = False  # a request has begun and is not complete
        self._in_body = False  # its headers are complete
        self._requests = 0  # whose headers have arrived
        self._answer_headers: list[tuple[bytes, bytes]] = []  # of every answer to this request
        self._parsed_headers = 0  # headers and trailers of this request
        self._parsed_bytes = 0  # bytes of its address, headers and trailers
        self._unparsed_bytes = 0  # since the last part of a body or its begin: headers, chunk sizes
        self._body_bytes = 0  # of this request
        self._held = 0  # bytes of this connection in `held_bytes`
        self._rest_bytes = 0  # bytes thrown away after the answer
        self._problem: Problem | None = None  # the last answer to this client; then nothing is read
        self._refused = False  # a request of this connection was refused for want of room
        self._paced = False  # reading is paused because of such a refusal

    # Calls of the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, unless the maximum is reached."""
        others = len(self.connections)
        most = self.limits.max_connections
        super().connection_made(transport)
        self._due = self.loop.time() + self.limits.header_timeout_s
        if others >= most + _TOLD:
            self._problem = Problem(503)
            transport.abort()
        elif others >= most:
            self._refuse(Problem(503, f"{most} connections are open, the most that a worker has"))
        if not type(self).looking:
            type(self).looking = True
            self.loop.call_later(_LOOK_S, self._look_at_all)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection; the application lets go of its request a little later."""
        super().connection_lost(exc)
        self.pipeline.clear()
        if self._held:
            self.loop.call_later(_FORGET_S, self._let_go)

    def data_received(self, data: bytes) -> None:
        """Parse the bytes of one read of the transport, which may be more than a bound allows."""
        if self._problem is not None:
            self._throw_away(len(data))
            return
        self._unparsed_bytes += len(data)
        try:
            self.parser.feed_data(data)
            if self._unparsed_bytes > self.limits.max_header_bytes:
                self._refuse(self._too_large())
        except httptools.HttpParserUpgrade:
            pass  # it is answered like a request without an upgrade
        except httptools.HttpParserError as error:
            cause = error.__context__
            if isinstance(cause, _RefusedError):
                self._refuse(cause.problem)
            else:  # an error of the parser itself, or of uvicorn's reading of the address
                detail = "its address cannot be read" if cause else f"it is not HTTP/1.1: {error}"
                self._refuse(Problem(400, detail, hint=_HINT))

    def pause_writing(self) -> None:
        """Wait for a client that does not read its answer, but not for ever."""
        super().pause_writing()
        self._write_due = self.loop.time() + self.limits.write_timeout_s

    def resume_writing(self) -> None:
        """Stop the clock for the client: it has read its answer."""
        super().resume_writing()
        self._write_due = math.inf

    # Callbacks of the parser

    def on_message_begin(self) -> None:
        """Start the time for the headers of a request."""
        super().on_message_begin()
        self._reading = True
        self._in_body = False
        self._answer_headers = []
        self._parsed_headers = self._parsed_bytes = self._body_bytes = self._rest_bytes = 0
        self._due = self.loop.time() + self.limits.header_timeout_s

    def on_url(self, url: bytes) -> None:
        """Count the bytes of the address."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header or a trailer; the application gets the headers only."""
        self._parsed_headers += 1
        self._count(len(name) + len(value) + 4)
        if not self._in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin a request without its query, which may hold texts and would go to logs and spans.

        Raises:
            _RefusedError: too many requests wait, or the request is refused and must end its
                connection.
        """
        self._unparsed_bytes = 0
        if len(self.pipeline) >= _PIPELINED:
            raise _RefusedError(Problem(429, f"{_PIPELINED} requests wait for one before them"))
        self.url = self.url.partition(b"?")[0]
        if self.prefix and (self.url + b"/").startswith(self.prefix + b"/"):
            self.url = self.url[len(self.prefix) :] or b"/"
        self._requests += 1
        is_last = self._requests >= self.limits.max_connection_requests
        previous: Any = self.cycle  # None before the first request
        if previous is None or previous.response_complete:
            try:
                type(self).admit(self.parser.get_method(), self.url)
            except Problem as problem:
                # A client whose reading is paused sent this one without waiting for an answer.
                if self._paced or is_last:
                    raise _RefusedError(problem) from None
                self._answer_at_once(problem)
                return
        answer_headers = self._headers_of_answers()
        self.scope["state"]["request_id"] = answer_headers[0][1].decode()
        super().on_headers_complete()
        if is_last:
            self.cycle.keep_alive = False  # the answer says so
        self.cycle.default_headers = [*self.cycle.default_headers, *answer_headers]
        self._in_body = True
        self._due = self.loop.time() + self.limits.body_timeout_s

    def on_body(self, body: bytes) -> None:
        """Count a part of a body into the bytes that this worker holds.

        Raises:
            _RefusedError: the worker would hold too many bytes.
        """
        self._unparsed_bytes = 0
        if self.cycle.response_complete:
            self._throw_away(len(body))
            return
        self._body_bytes += len(body)
        counted = min(len(body), self._body_bytes - _SMALL_BYTES)
        if counted > 0:
            if type(self).held_bytes + counted > self.limits.max_held_bytes:
                raise _RefusedError(Problem(429, "the requests that wait are as large as may be"))
            self._held += counted
            type(self).held_bytes += counted
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Stop the clock for the client: from here the application takes the time."""
        self._reading = self._in_body = False
        self._unparsed_bytes = 0
        if self.cycle.response_complete:  # the request was answered before it was complete
            self._due = self.loop.time() + self.timeout_keep_alive
        else:
            self._due = math.inf
        super().on_message_complete()

    # Calls of the application

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Start the task of a request; its log lines have the id of the request."""
        REQUEST.set({"request_id": cycle.scope["state"]["request_id"]})
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Begin the next request, or set the time until which the client may send one.

        This replaces uvicorn's method, which starts a timer for each connection.
        """
        self.server_state.total_requests += 1
        now = self.loop.time()
        if self.transport.is_closing():
            self._due = now + self.limits.write_timeout_s
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
            return
        self._let_go()
        if self._problem is not None:
            self._leave(self._problem)
        elif not self._reading:
            self._due = now + self.timeout_keep_alive
        elif self._in_body:
            self._due = min(self._due, now + _REST_S)
        else:  # the headers of the next request are on their way; the client had to wait
            self._due = now + self.limits.header_timeout_s

    # The bounds

    def _answer_at_once(self, problem: Problem) -> None:
        """Answer a request before its body arrives and without a task, which costs almost nothing.

        The connection stays open; the rest of the body is thrown away.

        Raises:
            _RefusedError: the connection does not stay open after this request.
        """
        if self.parser.get_http_version() == "1.0" or not self.parser.should_keep_alive():
            raise _RefusedError(problem)
        self.cycle = RequestResponseCycle(
            self.scope,
            self.transport,
            self.flow,
            self.logger,
            self.access_logger,
            access_log=False,
            default_headers=[],
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=True,
            on_response=self.on_response_complete,
        )
        self.cycle.response_started = self.cycle.response_complete = self._in_body = True
        self._say(problem)
        self.on_response_complete()
        # The first refusal causes no pause, so that a client that then closes its connection is
        # noticed, and nothing of it stays behind.
        if self._refused and self.pace.wait(self._read_again):
            self._paced = True
            self.flow.pause_reading()
        self._refused = True

    def _read_again(self) -> None:
        """Resume reading from a client whose requests were refused."""
        self._paced = False
        self._due = max(self._due, self.loop.time() + _REST_S)
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _count(self, size: int) -> None:
        """Count bytes of the address and headers, and refuse the request if they are too many."""
        self._parsed_bytes += size
        limits = self.limits
        if (
            self._parsed_bytes > limits.max_header_bytes
            or self._parsed_headers > limits.max_headers
        ):
            raise _RefusedError(self._too_large())

    def _too_large(self) -> Problem:
        limits = self.limits
        return Problem(
            431, f"at most {limits.max_header_bytes} bytes, {limits.max_headers} headers"
        )

    def _refuse(self, problem: Problem) -> None:
        """Answer the request that is being read with a problem, and read no more."""
        self._problem = problem
        self._due = math.inf
        if self._in_body and self.pipeline:
            self.pipeline.popleft()  # the application has not seen it
        elif self._in_body:
            if self.cycle.response_started:  # a second answer is not possible
                self._close()
                return
            # The application waits for the body; tell it that the client is gone.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            # Soon, because the application was only reading.
            self.loop.call_later(_FORGET_S / 20, self._let_go)
            self._leave(problem)
            return
        cycle: Any = self.cycle  # None before the first request
        if cycle is None or (cycle.response_complete and not self.pipeline):
            self._leave(problem)
        # Else `on_response_complete` does so when the earlier requests are answered.

    def _leave(self, problem: Problem) -> None:
        """Send a problem as the last answer; the connection is closed by the client, or soon."""
        self._due = self.loop.time() + _REST_S
        if self.transport.is_closing():
            return
        self._say(problem, (b"connection", b"close"))
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _headers_of_answers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that every answer to this request has; the first is its id."""
        if not self._answer_headers:
            given = dict(self.headers or ())
            request_id = given.get(b"x-request-id", b"")
            if not _REQUEST_ID.fullmatch(request_id):
                request_id = b"%b-%x" % (_PROCESS_ID, next(_numbers))
            self._answer_headers = [(b"x-request-id", request_id)]
            if self.origins:
                self._answer_headers += _cross_origin(self.origins, given.get(b"origin", b""))
        return self._answer_headers

    def _say(self, problem: Problem, *extra_headers: tuple[bytes, bytes]) -> None:
        """Write a whole answer that tells the client of a problem, and count it."""
        answer_headers = self._headers_of_answers()
        REQUEST.set({"request_id": answer_headers[0][1].decode()})
        type(self).observe(problem.status, problem.kind)
        content = problem.content()
        headers = [
            *self.server_state.default_headers,
            *answer_headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(content)),
            *problem.headers(),
            *extra_headers,
        ]
        lines = (b"%b: %b\r\n" % header for header in headers)
        self.transport.write(b"".join([STATUS_LINE[problem.status], *lines, b"\r\n", content]))

    def _close(self) -> None:
        """Close the connection when all is written, or when writing takes too long."""
        self.transport.close()
        self._due = self.loop.time() + self.limits.write_timeout_s

    def _throw_away(self, size: int) -> None:
        """Count bytes that nobody reads, and cut the connection off when they are too many."""
        self._rest_bytes += size
        if self._rest_bytes > _REST_BYTES:
            self.transport.abort()

    def _let_go(self) -> None:
        """Take the bytes of this connection's requests out of the bytes that the worker holds."""
        type(self).held_bytes -= self._held
        if self._held > _LARGE_BYTES:
            type(self).to_tidy = 2  # twice: a body that is still read may be freed after the first
        self._held = 0

    def _look_at_all(self) -> None:
        """Handle the late connections, tidy memory if it is due, and schedule the next look."""
        now = self.loop.time()
        for connection in list(self.connections):
            if isinstance(connection, Bounded):
                connection.look(now)
        if self.to_tidy and now > self.tidied + _TIDY_S:
            type(self).to_tidy = self.to_tidy - 1
            type(self).tidied = now
            self.loop.run_in_executor(None, give_back)
        type(self).looking = bool(self.connections or self.held_bytes or self.to_tidy)
        if self.looking:
            self.loop.call_later(_LOOK_S, self._look_at_all)

    def look(self, now: float) -> None:
        """Close or refuse this connection if its client is late at the loop time ``now``."""
        closing = self.transport.is_closing()
        if closing and math.isinf(self._due):
            self._due = now + self.limits.write_timeout_s
        if (now < self._due or self._paced) and now < self._write_due:
            return
        if closing or now >= self._write_due or self._problem is not None:
            self.transport.abort()
        elif not self._reading or (self._in_body and self.cycle.response_complete):
            self._close()  # no request came, or the rest of an answered one did not
        elif self.flow.read_paused:
            self._due = now + self.limits.header_timeout_s  # we are late, not the client
        else:
            part, seconds = "headers", self.limits.header_timeout_s
            if self._in_body:
                part, seconds = "body", self.limits.body_timeout_s
            self._refuse(Problem(408, f"the {part} took longer than {seconds:g} s"))


def bounded(
    limits: Settings,
    observe: Callable[[int, str], None],
    admit: Callable[[bytes, bytes], None] = lambda _method, _path: None,
    pace: Pace | None = None,
) -> type[Bounded]:
    """Return the protocol for the connections of one worker.

    Args:
        limits: the bounds.
        observe: called with the status and the type of each problem that is sent from here.
        admit: called with method and path of each request when its headers are complete; raises
            the :class:`Problem` that its client is told if the request is refused.
        pace: the pace of such refusals; it decides when a refused client is read again.
    """

    class Within(Bounded):
        """A connection of this worker."""

    Within.limits = limits
    Within.origins = frozenset(origin.encode() for origin in limits.origins())
    Within.prefix = (limits.root_path or "").encode()
    Within.pace = pace or Pace()
    Within.observe = staticmethod(observe)
    Within.admit = staticmethod(admit)
    return Within


def _cross_origin(origins: frozenset[bytes], origin: bytes) -> list[tuple[bytes, bytes]]:
    """Return the headers that let a browser show an answer to a page of ``origin``, if it may."""
    exposed = (b"access-control-expose-headers", b"Retry-After, Server-Timing, X-Request-ID")
    if b"*" in origins:
        return [(b"access-control-allow-origin", b"*"), exposed]
    vary = (b"vary", b"Origin")  # for caches: the answer to another origin has other headers
    if origin in origins:
        return [(b"access-control-allow-origin", origin), vary, exposed]
    return [vary]


def give_back() -> None:
    """Give free memory back to the system: glibc keeps free blocks that lie below a used one.

    After 24 texts of 1 MB these are 60 MB to 300 MB. The call takes some milliseconds, in a thread.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def check_files(connections: int) -> None:
    """Raise this process's limit of open files, if it is too low for so many connections.

    Raises:
        UserError: the system does not allow it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + _TOLD + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"max_connections={connections} needs {needed} open files, and this process may have "
            f"{hard}",
            hint=f"set AD2KIT_MAX_CONNECTIONS={max(1, hard - needed + connections)}, or raise the "
            "limit (`ulimit -Hn`, LimitNOFILE of systemd, --ulimit of docker)",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
