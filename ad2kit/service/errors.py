"""One shape for every error of the service, and a bound on the body that it reads. Plain ASGI."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections import deque
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from ad2kit.service.encodings import encoding_of, fault_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[Message, Receive, Send], Awaitable[None]]

logger = logging.getLogger(__name__)

# status: type, message, hint
ERRORS: dict[int, tuple[str, str, str]] = {
    400: ("malformed_request", "the request cannot be read", "send JSON over HTTP/1.1"),
    401: (
        "unauthorized",
        "no valid key came with the request",
        "send the header Authorization: Bearer KEY",
    ),
    404: ("not_found", "there is no such path", "see POST /classify and GET /info"),
    405: ("method_not_allowed", "this path has another method", "use POST /classify, GET /info"),
    408: (
        "too_slow",
        "the request did not arrive in time",
        "send it again; over a slow line send less at once",
    ),
    413: (
        "too_large",
        "this is more than the service reads at once",
        "send less at once",
    ),
    415: (
        "unsupported_media_type",
        "the body is not declared as plain JSON in UTF-8",
        "send the header Content-Type: application/json, and no Content-Encoding other than gzip",
    ),
    422: (
        "invalid_input",
        "the body does not fit",
        "see /docs.json for what is expected",
    ),
    429: ("overloaded", "too much is waiting", "retry after the time in Retry-After"),
    431: (
        "headers_too_large",
        "the headers are more than the service reads",
        "send fewer and shorter headers, and a shorter address",
    ),
    499: ("client_gone", "the client left before its answer", "wait longer, or send less"),
    500: ("internal", "the service failed on this request", "see the server's log"),
    503: ("not_ready", "the service is not ready", "retry; see GET /readyz"),
    504: ("deadline", "no answer in time", "retry, or send fewer texts"),
}


# Names of UTF-8 and of ASCII, which is a subset of it.
_CHARSETS = (b"utf-8", b"utf8", b"us-ascii", b"ascii")


class Problem(Exception):
    """An error that a client is told instead of an answer: a status of :data:`ERRORS` and details.

    Args:
        status: HTTP status of the answer.
        detail: text that follows the message of its status.
        hint: what the client should do; the hint of its status if empty.
        retry_after_s: seconds after which a client may ask an overloaded service again.
    """

    def __init__(
        self, status: int, detail: str = "", *, hint: str = "", retry_after_s: int = 1
    ) -> None:
        super().__init__(status, detail)
        self.status = status
        self.detail = detail
        self.hint = hint
        self.retry_after_s = retry_after_s

    @property
    def kind(self) -> str:
        """The type of the error."""
        return self._words[0]

    @property
    def _words(self) -> tuple[str, str, str]:
        """Type, message and hint of the status."""
        return ERRORS.get(self.status, ERRORS[500 if self.status >= 500 else 400])

    def content(self) -> bytes:
        """Return the body of the answer, as JSON."""
        kind, message, hint = self._words
        error = {
            "type": kind,
            "message": f"{message}: {self.detail}" if self.detail else message,
            "hint": self.hint or hint,
        }
        return json.dumps({"error": error}).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the additional headers that the status requires."""
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            return [(b"retry-after", str(self.retry_after_s).encode())]
        if self.status == HTTPStatus.UNAUTHORIZED:
            return [(b"www-authenticate", b"Bearer")]
        return []


class Pace:
    """Spaces out refusals, so that the event loop has time for the accepted requests.

    Some clients ignore Retry-After and send again at once. Each is refused in almost no time, and
    then again; hundreds of them would keep all others waiting. So refusals go out at a fixed rate.
    Each answered request lets one more go out: it has left room, which a client that waits here
    may need.

    Args:
        per_second: rate of the refusals, without those that answered requests let out.
        at_once: how many refusals may go out together after a calm moment.
    """

    def __init__(self, per_second: float = 200.0, at_once: int = 64) -> None:
        self._interval_s = 1 / per_second
        self._at_once = at_once
        self._waiting: deque[Callable[[], object]] = deque()
        self._free = float(at_once)  # refusals that may go out at once
        self._since = -math.inf  # loop time at which `_free` was computed

    def wait(self, go_on: Callable[[], object]) -> bool:
        """Call ``go_on`` when one more refusal may go out; return False if it may do so now."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            now = loop.time()
            self._free = min(self._at_once, self._free + (now - self._since) / self._interval_s)
            self._since = now
            if self._free >= 1:
                self._free -= 1
                return False
            loop.call_later(self._interval_s, self._tick)
        self._waiting.append(go_on)
        return True

    def answered(self) -> None:
        """Let the next refusal go out, because a request was answered."""
        if len(self._waiting) > 1:  # the last one is left for the scheduled tick
            self._waiting.popleft()()

    def _tick(self) -> None:
        """Let the refusals go out that are due, also those that a late event loop has missed."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        due = max(1, int((now - self._since) / self._interval_s))
        self._free = 0.0
        self._since = now
        for _ in range(min(due, len(self._waiting))):
            self._waiting.popleft()()
        if self._waiting:
            loop.call_later(self._interval_s, self._tick)


class ErrorContract:
    """ASGI middleware: bounds the body while it is read, and gives every error one shape.

    BentoML answers 400 for each kind of invalid body, in several shapes and partly as a list.
    Clients get ``{"error": {"type", "message", "hint"}}`` instead, for every error of the wrapped
    application. Errors 4xx keep the application's text; errors 5xx say nothing about its internals.

    Args:
        app: the application to wrap.
        max_body_bytes: the largest request body.
        hints: what the client should do, by status, where the default hint is not enough.
        observe: called with the status and the type of each error.
        pace: the pace of refusals for want of room.
    """

    def __init__(
        self,
        app: App,
        *,
        max_body_bytes: int,
        hints: Mapping[int, str] | None = None,
        observe: Callable[[int, str], None] = lambda _status, _kind: None,
        pace: Pace | None = None,
    ) -> None:
        self.app = app
        self.pace = pace or Pace()
        self.max_body_bytes = max_body_bytes
        self.hints = hints or {}
        self.observe = observe

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass one request through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope["method"] == "POST":
            if mismatch := _not_plain_json(headers):
                await self._send(send, Problem(415, mismatch))
                return
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > self.max_body_bytes:
                await self._send(send, Problem(413))
                return
        received_bytes = 0
        answer = b""
        status = 200
        allow = b""

        async def bounded_receive() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > self.max_body_bytes:
                raise Problem(413)
            return message

        async def typed_send(message: Message) -> None:
            nonlocal answer, status, allow
            if message["type"] == "http.response.start":
                allow = dict(message["headers"]).get(b"allow", b"")
                status = 413 if received_bytes > self.max_body_bytes else message["status"]
            if status < 400:
                if message["type"] == "http.response.start":
                    self.pace.answered()
                await send(message)
            elif message["type"] == "http.response.body":
                answer += message.get("body", b"")
                if not message.get("more_body"):
                    await self._reply(send, status, answer, allow)

        try:
            await self.app(scope, bounded_receive, typed_send)
        except Problem as problem:
            await self._send(send, problem)
        except Exception:
            # The request itself is not logged: texts of clients stay out of the log.
            logger.exception("%s %s failed", scope["method"], scope["path"])
            await self._send(send, Problem(500))

    async def _reply(
        self, send: Send, status: int, answer: bytes = b"", allow: bytes = b""
    ) -> None:
        """Send one error, with the detail that the application's own answer gives."""
        detail = ""
        if status < 500 and status != HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            status, detail = _understand(status, answer)
        await self._send(send, Problem(status, detail), allow)

    async def _send(self, send: Send, problem: Problem, allow: bytes = b"") -> None:
        """Complete, count and send one error; a refusal for want of room waits for its turn."""
        if problem.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE and not problem.detail:
            problem.detail = f"at most {self.max_body_bytes} bytes"
        problem.hint = problem.hint or self.hints.get(problem.status, "")
        headers = problem.headers()
        if problem.status == HTTPStatus.METHOD_NOT_ALLOWED and allow:
            headers.append((b"allow", allow))
        self.observe(problem.status, problem.kind)
        if problem.status == HTTPStatus.TOO_MANY_REQUESTS:
            turn = asyncio.Event()
            if self.pace.wait(turn.set):
                await turn.wait()
        await send_json(send, problem.status, problem.content(), headers)


async def send_json(
    send: Send, status: int, content: bytes, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Send a whole answer of JSON, with some headers beside its type and length."""
    length = (b"content-length", str(len(content)).encode())
    all_headers = [(b"content-type", b"application/json"), length, *headers]
    await send({"type": "http.response.start", "status": status, "headers": all_headers})
    await send({"type": "http.response.body", "body": content})


def _understand(status: int, answer: bytes) -> tuple[int, str]:
    """Return the right status and the text for one of BentoML's 4xx answers.

    BentoML answers 400 both for invalid JSON and for JSON that does not fit the schema.
    """
    try:
        body = json.loads(answer)
    except ValueError:
        return status, ""
    body = body[0] if isinstance(body, list) and body else body
    if not isinstance(body, dict):
        return status, ""
    problems = body.get("detail")
    if status != HTTPStatus.BAD_REQUEST or not isinstance(problems, list):
        error = body.get("error")
        return status, error if isinstance(error, str) else ""
    if not any("json_invalid" in str(problem.get("type")) for problem in problems):
        status = 422
    lines = []
    for problem in problems[:3]:
        place = ".".join(map(str, problem.get("loc", ())))
        lines.append(": ".join(filter(None, (place, problem.get("msg")))))
    return status, "; ".join(lines)


def _not_plain_json(headers: Mapping[bytes, bytes]) -> str | None:
    """Return why the headers do not declare JSON in UTF-8, or None if they declare it."""
    if fault := fault_of(encoding_of(headers)):
        return f"Content-Encoding {_shown(headers[b'content-encoding'])} {fault}"
    transfer = headers.get(b"transfer-encoding", b"chunked")
    if transfer.strip().lower() != b"chunked":
        return f"Transfer-Encoding {_shown(transfer)} is not read"
    media_type, *parameters = headers.get(b"content-type", b"").lower().split(b";")
    if media_type.strip() != b"application/json":
        return f"found Content-Type {_shown(media_type)}" if media_type else "found no Content-Type"
    for parameter in parameters:
        name, _, value = parameter.partition(b"=")
        charset = value.strip().strip(b'"')
        if name.strip() == b"charset" and charset not in _CHARSETS:
            return f"charset {_shown(charset)} is not read, only utf-8"
    return None


def _shown(value: bytes) -> str:
    """Return a header's value as printable ASCII, cut to 50 characters."""
    return ascii(value.strip().decode("latin-1"))[1:-1][:50]
