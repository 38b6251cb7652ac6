"""One shape for every error of the service, and a bound on what it reads. Plain ASGI."""

from __future__ import annotations

import json
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[Message, Receive, Send], Awaitable[None]]

logger = logging.getLogger(__name__)

# status: type, message, hint
ERRORS: dict[int, tuple[str, str, str]] = {
    400: ("malformed_request", "the body is not valid JSON", "send JSON"),
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
        "the body is not declared as JSON",
        "send the header Content-Type: application/json",
    ),
    422: (
        "invalid_input",
        "the body does not fit",
        "see /docs.json for what is expected",
    ),
    429: ("overloaded", "too many texts are waiting", "retry after the time in Retry-After"),
    499: ("client_gone", "the client left before its answer", "wait longer, or send less"),
    500: ("internal", "the service failed on this request", "see the server's log"),
    503: ("not_ready", "the service is not ready", "retry; see GET /readyz"),
    504: ("deadline", "no answer in time", "retry, or send fewer texts"),
}


class Problem(Exception):
    """What a client is told instead of an answer: a status of :data:`ERRORS`, and what of it."""

    def __init__(self, status: int, detail: str = "", *, retry_after_s: int = 1) -> None:
        super().__init__(status, detail)
        self.status, self.detail, self.retry_after_s = status, detail, retry_after_s


class ErrorContract:
    """ASGI middleware: bounds the body while it is read, and gives every error one shape.

    BentoML answers 400 for each kind of invalid body, in several shapes and partly as a list;
    clients get ``{"error": {"type", "message", "hint"}}`` instead, from here alone. 4xx keep the
    text that the application gave, 5xx say nothing of its insides.

    Args:
        app: the application to wrap.
        max_body_bytes: the largest request body.
        hints: what the client should do instead, by status, where it is more than the default.
        observe: is told the status and the type of each error.
    """

    def __init__(
        self,
        app: App,
        *,
        max_body_bytes: int,
        hints: Mapping[int, str] | None = None,
        observe: Callable[[int, str], None] = lambda _status, _kind: None,
    ) -> None:
        self.app = app
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
            media_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if media_type != b"application/json":
                await self._reply(send, 415)
                return
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > self.max_body_bytes:
                await self._reply(send, 413)
                return
        received, answer, status, allow = 0, b"", 200, b""

        async def bounded_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise Problem(413)
            return message

        async def typed_send(message: Message) -> None:
            nonlocal answer, status, allow
            if message["type"] == "http.response.start":
                allow = dict(message["headers"]).get(b"allow", b"")
                status = 413 if received > self.max_body_bytes else message["status"]
            if status < 400:
                await send(message)
            elif message["type"] == "http.response.body":
                answer += message.get("body", b"")
                if not message.get("more_body"):
                    await self._reply(send, status, answer, allow)

        try:
            await self.app(scope, bounded_receive, typed_send)
        except Problem as problem:
            await self._send(send, problem.status, problem.detail, problem.retry_after_s)
        except Exception:
            # Not what it was about: texts of clients stay out of the log.
            logger.exception("%s %s failed", scope["method"], scope["path"])
            await self._send(send, 500, "")

    async def _reply(
        self, send: Send, status: int, answer: bytes = b"", allow: bytes = b""
    ) -> None:
        """Send one error, with what can be learnt from the application's own answer."""
        detail = ""
        if status < 500 and status != HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            status, detail = _understand(status, answer)
        await self._send(send, status, detail, allow=allow)

    async def _send(
        self, send: Send, status: int, detail: str, retry_after_s: int = 1, allow: bytes = b""
    ) -> None:
        kind, message, hint = ERRORS.get(status, ERRORS[500 if status >= 500 else 400])
        if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE and not detail:
            detail = f"at most {self.max_body_bytes} bytes"
        error = {
            "type": kind,
            "message": f"{message}: {detail}" if detail else message,
            "hint": self.hints.get(status, hint),
        }
        headers = list[tuple[bytes, bytes]]()
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            headers.append((b"retry-after", str(retry_after_s).encode()))
        elif status == HTTPStatus.UNAUTHORIZED:
            headers.append((b"www-authenticate", b"Bearer"))
        if status == HTTPStatus.METHOD_NOT_ALLOWED and allow:
            headers.append((b"allow", allow))
        self.observe(status, kind)
        await send_json(send, status, json.dumps({"error": error}).encode(), headers)


async def send_json(
    send: Send, status: int, content: bytes, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Send a whole answer of JSON."""
    length = (b"content-length", str(len(content)).encode())
    whole = [(b"content-type", b"application/json"), length, *headers]
    await send({"type": "http.response.start", "status": status, "headers": whole})
    await send({"type": "http.response.body", "body": content})


def _understand(status: int, answer: bytes) -> tuple[int, str]:
    """Return the status that was meant, and the text, of one of BentoML's 4xx answers.

    It answers 400 both for what is no JSON and for JSON that does not fit the schema.
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
    lines = [
        ": ".join(filter(None, (".".join(map(str, p.get("loc", ()))), p.get("msg"))))
        for p in problems[:3]
    ]
    return status, "; ".join(lines)
