"""What a connection may cost: bytes, headers, time, and how many there are. No application sees it.

An ASGI application is told of a request when all of its headers are there, and uvicorn's protocol
on httptools bounds neither how many bytes they are nor how long they take; 200 connections with a
byte a second stayed for ever, and one of 300 MB of headers was answered. So the bounds are here, in
a subclass of that protocol: for every path, and before any key is looked at.
"""

from __future__ import annotations

import asyncio
import ctypes
import math
import resource
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

# How often late connections are looked for: one look at all costs less than a timer for each.
_LOOK_S = 0.25
# The first bytes of each request are not counted into what a worker holds, so that many large
# requests leave room for small ones.
_SMALL_BYTES = 4096
# A client is not waited for, once it was answered before its request was complete, beyond this
# time and these bytes. Closed at once, it might lose the answer: its system throws away what it
# has not read yet when bytes arrive at a closed connection.
_REST_S, _REST_BYTES = 2.0, 4 * 2**20
# Connections above the most that may be are told so, as long as there are no more of them.
_TOLD = 64
# Requests that were sent before the one before them was answered. Nearly no client does so.
_PIPELINED = 16
# How long the application may take to let go of a request whose client is gone.
_FORGET_S = 1.0
# After requests of so many bytes memory is given back to the system, at most this often.
_LARGE_BYTES, _TIDY_S = 2**16, 2.0
# Of a process beside its connections: its libraries, model, log, metrics, and those of BentoML.
_OTHER_FILES = 192
_HINT = "send HTTP/1.1; for https use the port of the proxy in front of this service"


class _RefusedError(Exception):
    """Ends the work of the parser, in one of whose callbacks a request was refused."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.status)
        self.problem = problem


class Bounded(HttpToolsProtocol):
    """One connection within the bounds; :func:`bounded` returns the class that has them."""

    limits: ClassVar[Settings]
    observe: ClassVar[Callable[[int, str], None]]
    admit: ClassVar[Callable[[bytes, bytes], None]]
    pace: ClassVar[Pace]
    held_bytes: ClassVar[int] = 0  # of requests of all connections, without their first bytes
    to_tidy: ClassVar[int] = 0  # how often memory is to be given back to the system
    tidied: ClassVar[float] = 0.0  # when this was last done
    looking: ClassVar[bool] = False

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        # A WebSocket would be another protocol, without bounds; nothing here speaks it.
        self.ws_protocol_class = None
        self._due = self._write_due = math.inf  # when what is waited for is late
        self._reading = self._in_body = False  # a request; its body
        self._parsed_headers = self._parsed_bytes = 0  # of the headers and trailers of a request
        self._unparsed_bytes = 0  # since the last of the body, or its begin: headers, chunk sizes
        self._body_bytes = self._held = self._rest_bytes = 0
        self._problem: Problem | None = None  # what the client is told last; then nothing is read
        self._refused = self._paced = False  # for want of room; and it is read again in a moment

    # What the transport says

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, unless there are as many as may be."""
        found, most = len(self.connections), self.limits.max_connections
        super().connection_made(transport)
        self._due = self.loop.time() + self.limits.header_timeout_s
        if found >= most + _TOLD:
            self._problem = Problem(503)
            transport.abort()
        elif found >= most:
            self._refuse(Problem(503, f"{most} connections are open, the most that a worker has"))
        if not type(self).looking:
            type(self).looking = True
            self.loop.call_later(_LOOK_S, self._look_at_all)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection; what it holds is let go by the application a little later."""
        super().connection_lost(exc)
        self.pipeline.clear()
        if self._held:
            self.loop.call_later(_FORGET_S, self._let_go)

    def data_received(self, data: bytes) -> None:
        """Parse what arrived: what the transport reads at once, which may be more than a bound."""
        if self._problem is not None:
            self._throw_away(len(data))
            return
        self._unparsed_bytes += len(data)
        try:
            self.parser.feed_data(data)
            if self._unparsed_bytes > self.limits.max_header_bytes:
                self._refuse(self._too_large())
        except httptools.HttpParserUpgrade:
            pass  # it is answered as a request that asked for no upgrade
        except httptools.HttpParserError as error:
            found = error.__context__
            if isinstance(found, _RefusedError):
                self._refuse(found.problem)
            else:  # of the parser itself, or of what reads the address that it found
                said = "its address cannot be read" if found else f"it is not HTTP/1.1: {error}"
                self._refuse(Problem(400, said, hint=_HINT))

    def pause_writing(self) -> None:
        """Wait for a client that does not read its answer, but not for ever."""
        super().pause_writing()
        self._write_due = self.loop.time() + self.limits.write_timeout_s

    def resume_writing(self) -> None:
        """Go on: it has read."""
        super().resume_writing()
        self._write_due = math.inf

    # What the parser finds

    def on_message_begin(self) -> None:
        """Give the headers of a request their time."""
        super().on_message_begin()
        self._reading, self._in_body = True, False
        self._parsed_headers = self._parsed_bytes = self._body_bytes = self._rest_bytes = 0
        self._due = self.loop.time() + self.limits.header_timeout_s

    def on_url(self, url: bytes) -> None:
        """Count the address."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header; trailers too, of which nobody reads any."""
        self._parsed_headers += 1
        self._count(len(name) + len(value) + 4)
        if not self._in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin a request, without its query: it may hold texts, and would go to logs and spans."""
        self._unparsed_bytes = 0
        if len(self.pipeline) >= _PIPELINED:
            raise _RefusedError(Problem(429, f"{_PIPELINED} requests wait for one before them"))
        self.url = self.url.partition(b"?")[0]
        before: Any = self.cycle  # None before the first request
        if before is None or before.response_complete:
            try:
                type(self).admit(self.parser.get_method(), self.url)
            except Problem as problem:
                if self._paced:  # it had sent this one along, without waiting for an answer
                    raise _RefusedError(problem) from None
                self._answer_at_once(problem)
                return
        super().on_headers_complete()
        self._in_body = True
        self._due = self.loop.time() + self.limits.body_timeout_s

    def on_body(self, body: bytes) -> None:
        """Count a part of a body into what is held of all requests."""
        self._unparsed_bytes = 0
        if self.cycle.response_complete:
            self._throw_away(len(body))
            return
        self._body_bytes += len(body)
        more = min(len(body), self._body_bytes - _SMALL_BYTES)
        if more > 0:
            if type(self).held_bytes + more > self.limits.max_held_bytes:
                raise _RefusedError(Problem(429, "the requests that wait are as large as may be"))
            self._held += more
            type(self).held_bytes += more
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Leave the rest of the time to the application."""
        self._reading = self._in_body = False
        self._unparsed_bytes = 0
        if self.cycle.response_complete:  # the rest of what was answered before it was here
            self._due = self.loop.time() + self.timeout_keep_alive
        else:
            self._due = math.inf
        super().on_message_complete()

    # What the application says

    def on_response_complete(self) -> None:
        """Begin the next request, or wait for one; in place of a timer for each connection."""
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
        else:  # the next request, whose client was kept waiting
            self._due = now + self.limits.header_timeout_s

    # The bounds

    def _answer_at_once(self, problem: Problem) -> None:
        """Answer a request before its body is here, and without a task: it costs next to nothing.

        The connection lives on; what still comes of the body is thrown away.
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
        # The first refusal costs nobody a pause: who closes the connection then is seen to do so,
        # and leaves nothing behind.
        if self._refused and self.pace.wait(self._read_again):
            self._paced = True
            self.flow.pause_reading()
        self._refused = True

    def _read_again(self) -> None:
        """Read what came while nothing was read from a client that had been refused."""
        self._paced = False
        self._due = max(self._due, self.loop.time() + _REST_S)
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _count(self, size: int) -> None:
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
        self._problem, self._due = problem, math.inf
        if self._in_body and self.pipeline:
            self.pipeline.popleft()  # the application has not seen it
        elif self._in_body:
            if self.cycle.response_started:  # an answer is an answer
                self._close()
                return
            # For the application, which waits for its body, the client is gone.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self.loop.call_later(_FORGET_S / 20, self._let_go)  # it was only reading
            self._leave(problem)
            return
        cycle: Any = self.cycle  # None before the first request
        if cycle is None or (cycle.response_complete and not self.pipeline):
            self._leave(problem)
        # Else when those before it are answered.

    def _leave(self, problem: Problem) -> None:
        """Say what the problem is; the connection is closed when the client does so, or soon."""
        self._due = self.loop.time() + _REST_S
        if self.transport.is_closing():
            return
        self._say(problem, (b"connection", b"close"))
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _say(self, problem: Problem, *more: tuple[bytes, bytes]) -> None:
        type(self).observe(problem.status, problem.kind)
        content = problem.content()
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(content)),
            *problem.headers(),
            *more,
        ]
        lines = (b"%b: %b\r\n" % header for header in headers)
        self.transport.write(b"".join([STATUS_LINE[problem.status], *lines, b"\r\n", content]))

    def _close(self) -> None:
        """Close when all is written, or when that takes too long."""
        self.transport.close()
        self._due = self.loop.time() + self.limits.write_timeout_s

    def _throw_away(self, size: int) -> None:
        self._rest_bytes += size
        if self._rest_bytes > _REST_BYTES:
            self.transport.abort()

    def _let_go(self) -> None:
        type(self).held_bytes -= self._held
        if self._held > _LARGE_BYTES:
            type(self).to_tidy = 2  # what is being read yet may be let go after the first time
        self._held = 0

    def _look_at_all(self) -> None:
        now = self.loop.time()
        for connection in list(self.connections):
            if isinstance(connection, Bounded):
                connection.look(now)
        if self.to_tidy and now > self.tidied + _TIDY_S:
            type(self).to_tidy, type(self).tidied = self.to_tidy - 1, now
            self.loop.run_in_executor(None, give_back)
        type(self).looking = bool(self.connections or self.held_bytes or self.to_tidy)
        if self.looking:
            self.loop.call_later(_LOOK_S, self._look_at_all)

    def look(self, now: float) -> None:
        """Do something about this connection if it is late."""
        closing = self.transport.is_closing()
        if closing and math.isinf(self._due):
            self._due = now + self.limits.write_timeout_s
        if (now < self._due or self._paced) and now < self._write_due:
            return
        if closing or now >= self._write_due or self._problem is not None:
            self.transport.abort()
        elif not self._reading or (self._in_body and self.cycle.response_complete):
            self._close()  # nothing came, or not the rest of what is answered
        elif self.flow.read_paused:
            self._due = now + self.limits.header_timeout_s  # we are late, not it
        else:
            what, seconds = "headers", self.limits.header_timeout_s
            if self._in_body:
                what, seconds = "body", self.limits.body_timeout_s
            self._refuse(Problem(408, f"the {what} took longer than {seconds:g} s"))


def bounded(
    limits: Settings,
    observe: Callable[[int, str], None],
    admit: Callable[[bytes, bytes], None] = lambda _method, _path: None,
    pace: Pace | None = None,
) -> type[Bounded]:
    """Return the protocol for the connections of one worker.

    Args:
        limits: the bounds.
        observe: is told the status and the type of each problem that a client is told here.
        admit: is asked about each request, by method and path, when its headers are here; raises
            what its client is told if it need not come any further.
        pace: of such refusals: a client is read again when its turn has come.
    """

    class Within(Bounded):
        """A connection of this worker."""

    Within.limits, Within.pace = limits, pace or Pace()
    Within.observe, Within.admit = staticmethod(observe), staticmethod(admit)
    return Within


def give_back() -> None:
    """Give memory that is free to the system: glibc keeps what lies below something in use.

    After 24 texts of 1 MB that is 60 MB to 300 MB; it takes some milliseconds, in a thread.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def insist_on_files(connections: int) -> None:
    """Raise this process's limit of open files, if need be, to what the connections take.

    Raises:
        UserError: the system does not let it.
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
