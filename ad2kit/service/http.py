"""POST /classify as plain ASGI: from the bytes of a request to those of its answer. No framework.

For a model of a millisecond the server is the cost. Between the socket and the batcher there is
only what a request needs: one pass of pydantic over the body, the tokenizer, and one pass of JSON
over the answer. Errors leave here as :class:`Problem`; `error_contract` gives them their shape.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic_core import from_json, to_json

from ad2kit.run.errors import UserError, nearest
from ad2kit.service.batcher import BatcherClosed, QueueFull, Timing
from ad2kit.service.errors import Problem, send_json
from ad2kit.service.openapi import MAX_TEXTS, TIMING, ClassifyRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection

    from ad2kit.exporting.classifier import OnnxClassifier
    from ad2kit.exporting.tokenise import Tokens
    from ad2kit.service.batcher import Batcher
    from ad2kit.service.errors import App, Message, Receive, Send
    from ad2kit.service.monitoring import ServiceMetrics, Shadow

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Clients of small requests are watched for leaving only when their answer takes longer than this:
# it costs a task for each request, and a busy service keeps all of them waiting for a while.
_PATIENCE_S = 0.25
# A body is read in another thread if it is larger: at about a millisecond the loop, which everybody
# waits for, costs more than the changes of thread.
_LARGE_BYTES = 8192
# Larger ones are read one at a time: what a text costs to tokenise grows with it, in memory too.
_HUGE_BYTES = 2**16
# Between so many texts of a list it is seen whether its client still waits.
_PIECE_TEXTS = 16
_TIMING = TIMING.lower().encode()
# How a body begins that is not what its headers say.
_MARKS = {
    b"\xef\xbb\xbf": "a byte order mark",
    b"\xff\xfe": "the mark of UTF-16",
    b"\xfe\xff": "the mark of UTF-16",
    b"\x1f\x8b": "the mark of gzip",
}


class _Lane:
    """Threads that read requests, and the turn of each request that uses one.

    For a request that waits for its turn nothing has been done yet, and one that is given up costs
    no more than the piece that is under way.

    Args:
        threads: how many requests have their turn at once.
        max_wait_s: no request is taken while those before it need longer, at the rate of late.
    """

    def __init__(self, threads: int, max_wait_s: float) -> None:
        self.threads = ThreadPoolExecutor(threads, "ad2kit-read")
        self._free, self._max_wait_s = asyncio.Semaphore(threads), max_wait_s
        self._waiting_bytes, self._bytes_per_s = 0, math.nan

    @contextlib.asynccontextmanager
    async def turn(self, size_bytes: int) -> AsyncIterator[None]:
        """Wait for a turn, and have it.

        Raises:
            QueueFull: it would take too long.
        """
        wait_s = self._waiting_bytes / self._bytes_per_s  # NaN, and so never too long, at first
        if wait_s > self._max_wait_s:
            raise QueueFull(math.ceil(wait_s))
        self._waiting_bytes += size_bytes
        try:
            async with self._free:
                start = time.perf_counter()
                yield
                rate = size_bytes / (time.perf_counter() - start)
                known = not math.isnan(self._bytes_per_s)
                self._bytes_per_s = (self._bytes_per_s + rate) / 2 if known else rate
        finally:
            self._waiting_bytes -= size_bytes

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Return what some work returns, done in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)


_AT_ONCE = contextlib.nullcontext()


class _Here:
    """In place of a lane for what is small: at once, in the event loop's own thread."""

    def turn(self, _size_bytes: int) -> contextlib.AbstractAsyncContextManager[None]:
        """Have a turn at once."""
        return _AT_ONCE

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Return what some work returns."""
        return work(*arguments)


class Classify:
    """Classifies what requests hold.

    Args:
        classifier: tokenises, and turns logits into predictions.
        batcher: computes logits.
        deadline_s: after how long a request is given up.
        max_wait_s: how long a large request may wait until it is read.
        metrics: are told of all that happens.
        shadow: is offered what was answered, to compare it with the teacher.
        access_log: write a line for each answer; of numbers, never of texts.
    """

    def __init__(
        self,
        classifier: OnnxClassifier,
        batcher: Batcher,
        *,
        deadline_s: float,
        max_wait_s: float = math.inf,
        metrics: ServiceMetrics,
        shadow: Shadow | None = None,
        access_log: bool = False,
    ) -> None:
        self.classifier, self.batcher, self.metrics = classifier, batcher, metrics
        self.deadline_s, self.shadow, self.access_log = deadline_s, shadow, access_log
        self._here = _Here()
        self._large, self._huge = _Lane(2, max_wait_s), _Lane(1, max_wait_s)

    def close(self) -> None:
        """Let go of the threads."""
        for lane in (self._large, self._huge):
            lane.threads.shutdown(wait=False, cancel_futures=True)

    def insist_on_room(self) -> None:
        """Refuse a request before it is read, if it would wait too long.

        Raises:
            Problem: the queue is full.
        """
        try:
            self.batcher.insist_on_room()
        except QueueFull as full:
            raise Problem(429, str(full), retry_after_s=full.retry_after_s) from full

    async def answer(self, body: bytes) -> tuple[bytes, Stages]:
        """Return the JSON answer to a JSON request, and where its time went.

        Raises:
            Problem: what the client is told instead.
        """
        stages = Stages()
        predictions = await self._answer(body, stages)
        content = to_json({"predictions": predictions})
        stages.total_s = time.perf_counter() - stages.start
        self.metrics.answered(stages.total_s)
        if self.access_log:
            cut = sum(each["truncated"] for each in predictions)
            facts = {"status": 200, "texts": len(predictions), "truncated": cut, **stages.ms()}
            logger.info("answered", extra=facts)
        return content, stages

    async def classify(self, request: ClassifyRequest, stages: Stages) -> list[dict[str, Any]]:
        """Return the predictions for a request as plain data.

        Raises:
            Problem: a text that cannot be read, a full queue, or a deadline that passed.
        """
        return await self._answer(request.model_dump_json().encode(), stages)

    async def _answer(self, body: bytes, stages: Stages) -> list[dict[str, Any]]:
        try:
            async with asyncio.timeout(self.deadline_s):
                encodings, texts, scores = await self._read(body)
                stages.tokenise_s = time.perf_counter() - stages.start
                self.metrics.tokenised(stages.tokenise_s)
                logits = await self.batcher.submit(encodings, stages.timing)
        except UserError as error:
            columns = self.classifier.artifact.text_columns
            raise Problem(422, error.message, hint=expected(columns)) from error
        except QueueFull as full:
            raise Problem(429, str(full), retry_after_s=full.retry_after_s) from full
        except BatcherClosed as error:
            raise Problem(503) from error
        except TimeoutError as error:
            raise Problem(504) from error
        predictions = self.classifier.predictions(encodings, logits)
        self.metrics.predicted(predictions)
        if self.shadow is not None:
            self.shadow.offer(texts, predictions)
        answers = [each.as_dict() for each in predictions]
        if not scores:
            for answer in answers:
                answer.pop("scores", None)
        return answers

    async def _read(self, body: bytes) -> tuple[list[Tokens], list[Any], bool]:
        """Return the tokens of a request, its texts for a shadow, and whether scores are wanted."""
        lane: _Lane | _Here = self._here
        if len(body) > _LARGE_BYTES:
            lane = self._large if len(body) <= _HUGE_BYTES else self._huge
        async with lane.turn(len(body)):
            texts, scores = await lane.run(parse, body, self.classifier.artifact.text_columns)
            encodings = list["Tokens"]()
            with self.batcher.room(len(texts)):
                for first in range(0, len(texts), _PIECE_TEXTS):
                    piece = texts[first : first + _PIECE_TEXTS]
                    encodings += await lane.run(self.classifier.encode, piece, first)
        # Texts may be many times larger than their tokens, and would wait with them.
        return encodings, [] if self.shadow is None else texts, scores


@dataclass(slots=True)
class Stages:
    """Where the time of a request went, in seconds, from its body read to its answer written."""

    start: float = field(default_factory=time.perf_counter)
    tokenise_s: float = 0.0
    total_s: float = 0.0
    timing: Timing = field(default_factory=Timing)

    def ms(self) -> dict[str, float]:
        """Return the stages in milliseconds."""
        return {
            "tokenise_ms": round(1e3 * self.tokenise_s, 3),
            "queue_ms": round(1e3 * self.timing.queue_s, 3),
            "inference_ms": round(1e3 * self.timing.inference_s, 3),
            "total_ms": round(1e3 * self.total_s, 3),
        }

    def header(self) -> bytes:
        """Return them as the value of a Server-Timing header (W3C *Server Timing*)."""
        stages = (f"{name.removesuffix('_ms')};dur={ms}" for name, ms in self.ms().items())
        return ", ".join(stages).encode()


class Direct:
    """ASGI middleware: POSTs to one path are answered here, and everything else is passed on.

    Args:
        app: the application for everything else.
        path: of the requests that are answered here.
        handler: returns what answers a body; asked for at each request, because the service is
            made after its middleware.
    """

    def __init__(self, app: App, *, path: str, handler: Callable[[], Classify]) -> None:
        self.app, self.path, self.handler = app, path, handler

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        if (
            scope["type"] != "http"
            or scope["path"].rstrip("/") != self.path
            or scope["method"] != "POST"
        ):
            await self.app(scope, receive, send)
            return
        handler = self.handler()
        body = await _whole(receive)
        if body is None:
            return
        task, gone = asyncio.current_task(), None

        async def watch() -> None:
            if (await receive())["type"] == "http.disconnect" and task is not None:
                task.cancel("the client is gone")

        def start_watching() -> None:
            nonlocal gone
            gone = asyncio.ensure_future(watch())

        patience_s = 0.0 if len(body) > _LARGE_BYTES else _PATIENCE_S
        timer = asyncio.get_running_loop().call_later(patience_s, start_watching)
        try:
            content, stages = await handler.answer(body)
        except asyncio.CancelledError:
            if gone is None or not gone.done():
                raise  # the server stops
            # Nobody reads it, but what wraps this waits for an answer.
            raise Problem(499) from None
        finally:
            timer.cancel()
            if gone is not None:
                gone.cancel()
        asked = any(name == _TIMING for name, _ in scope["headers"])
        await send_json(send, 200, content, [(b"server-timing", stages.header())] if asked else [])


async def _whole(receive: Receive) -> bytes | None:
    """Return the body of a request; None if its client left before all of it was here.

    How long this may take, and how much may come, is bounded by :mod:`ad2kit.service.connections`.
    """
    parts, more = list[bytes](), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


class Unlink:
    """ASGI middleware: at the start it takes layers that lie outside of it out of their chain.

    BentoML's own limit on the time of a request leaves a timer behind for a minute after each one,
    which at two thousand requests a second is memory and time for nothing: a request has its
    deadline here. Its OpenTelemetry layer spells out each URL to find that it is excluded.

    Args:
        app: the application.
        layers: names of their classes.
    """

    def __init__(self, app: App, *, layers: Collection[str]) -> None:
        self.app, self.layers = app, layers

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Do so when the server starts; pass everything on."""
        layer: Any = scope["app"].middleware_stack if scope["type"] == "lifespan" else self
        while layer is not self:
            if type(layer.app).__name__ in self.layers:
                layer.app = layer.app.app
            else:
                layer = layer.app
        await self.app(scope, receive, send)


class ApiKeys:
    """ASGI middleware: without one of the keys nothing but the public paths answers.

    Args:
        app: the application to guard.
        keys: those that are valid now, several while they are changed; none leaves all open.
        public: paths that need no key.
    """

    def __init__(self, app: App, *, keys: Collection[str], public: Collection[str]) -> None:
        self.app, self.public = app, frozenset(public)
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass one request on if it may."""
        if self.keys and scope["type"] == "http" and scope["path"] not in self.public:
            given = dict(scope["headers"]).get(b"authorization", b"")
            scheme, _, key = given.partition(b" ")
            # All are compared, each in constant time, so that time says nothing of a key.
            found = sum([hmac.compare_digest(key.strip(), known) for known in self.keys])
            if scheme.lower() != b"bearer" or not found:
                raise Problem(401)
        await self.app(scope, receive, send)


def parse(body: bytes, text_columns: int) -> tuple[list[Any], bool]:
    """Return the texts of a request, and whether the scores of all labels are asked for.

    It is what :class:`ClassifyRequest` reads too, which names a fault in each place of a list, and
    each type that was tried there: for 1 MB of them that takes a second and 90 MB.

    Raises:
        Problem: it is no JSON, or not the right one for a model of one or two ``text_columns``.
    """
    found: Any = None
    try:
        found = from_json(body, cache_strings="none")
    except ValueError as error:
        mark = next(
            (f"; it begins with {name}" for mark, name in _MARKS.items() if body.startswith(mark)),
            "",
        )
        found, status = None, 400
        fault = f"the body is not valid JSON: {error}{mark}"
    else:
        status, fault = _fault(found)
    if fault:
        raise Problem(status, fault, hint="" if status == 413 else expected(text_columns))
    texts = found["texts"]
    return texts if isinstance(texts, list) else [texts], found.get("scores", False)


def expected(text_columns: int) -> str:
    """Return what to send to a model that reads one text, or two."""
    one = '"..."' if text_columns == 1 else '["...", "..."]'
    many = "texts" if text_columns == 1 else "pairs of texts"
    return f'send {{"texts": [{one}]}} with 1 to {MAX_TEXTS} {many} that are not empty'


def _fault(found: Any) -> tuple[int, str]:
    """Return the status and the reason for JSON that is no request; no reason if it is one."""
    if not isinstance(found, dict):
        return 422, f"expected an object, found {_kind(found)}"
    unknown = [name for name in found if name not in ClassifyRequest.model_fields]
    if unknown:
        name = unknown[0][:50]
        like = nearest(name, ClassifyRequest.model_fields)
        return 422, f"there is no field {name!r}{like}, only texts and scores"
    if "texts" not in found:
        return 422, "texts: the field is missing"
    if not isinstance(found.get("scores", False), bool):
        return 422, f"scores: expected true or false, found {_kind(found['scores'])}"
    texts = found["texts"]
    if isinstance(texts, str):
        return 200, ""
    if not isinstance(texts, list):
        return 422, f"texts: expected a text or a list of texts, found {_kind(texts)}"
    if not texts:
        return 422, "texts: expected at least 1 text, found an empty list"
    if len(texts) > MAX_TEXTS:
        return 413, f"texts: expected at most {MAX_TEXTS} texts, found {len(texts)}"
    for row, text in enumerate(texts):
        if isinstance(text, str):
            continue
        if not isinstance(text, list):
            return 422, f"texts.{row}: expected a text, found {_kind(text)}"
        if len(text) != 2:
            return 422, f"texts.{row}: expected a text or a pair of texts, found {len(text)} texts"
        for column, value in enumerate(text):
            if not isinstance(value, str):
                return 422, f"texts.{row}.{column}: expected a text, found {_kind(value)}"
    return 200, ""


def _kind(value: Any) -> str:
    """Return what JSON calls a value."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")
