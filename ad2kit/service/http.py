"""POST /classify as plain ASGI, from the body of a request to the bytes of its answer.

    connections.Bounded    the socket: bytes, headers, time
    Unlink, ErrorContract, Preflight, ApiKeys, Documented    ASGI middleware, in this order
    Direct -> Classify.answer    the body is read, checked and tokenised
    Batcher.submit -> OnnxClassifier    a thread of the engine computes a batch
    Classify -> errors.send_json    the answer

No framework: for a model that computes in a millisecond, the server is the main cost. Between the
socket and the batcher there is only what a request needs: one pass of pydantic over the body, the
tokenizer, and one pass of JSON over the answer. Errors are raised as :class:`Problem`, and
:class:`ad2kit.service.errors.ErrorContract` gives them their shape.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic_core import from_json, to_json

from ad2kit.run.errors import TextTooLong, UserError, nearest
from ad2kit.service.batcher import BatcherClosed, QueueFull, Timing, TooMuch
from ad2kit.service.encodings import Damaged, TooLarge, encoding_of, unpack
from ad2kit.service.errors import Problem, send_json
from ad2kit.service.openapi import TIMING, ClassifyRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection

    from ad2kit.exporting.classifier import OnnxClassifier
    from ad2kit.exporting.tokenise import Tokens
    from ad2kit.service.batcher import Batcher
    from ad2kit.service.errors import App, Message, Receive, Send
    from ad2kit.service.monitoring import ServiceMetrics, Shadow

logger = logging.getLogger(__name__)

T = TypeVar("T")

# The client of a small request is watched for leaving only when its answer takes longer than this.
# Watching costs a task for each request, and in a busy service all requests wait for a while.
_PATIENCE_S = 0.25
# A larger body is read in another thread. Reading it takes about a millisecond, in which everybody
# waits for the event loop; that costs more than the changes of thread.
_LARGE_BYTES = 8192
# Bodies above this size are read one at a time: the cost of tokenising a text grows with its
# length, in memory too.
_HUGE_BYTES = 2**16
# A list is tokenised in pieces of so many texts; between two pieces a request can be cancelled.
_PIECE_TEXTS = 16
_TIMING = TIMING.lower().encode()
# First bytes of a body that is not what its headers say.
_MARKS = {
    b"\xef\xbb\xbf": "a byte order mark",
    b"\xff\xfe": "the mark of UTF-16",
    b"\xfe\xff": "the mark of UTF-16",
    b"\x1f\x8b": "the mark of gzip",
}


class _Lane:
    """Threads that read requests, and the turns of the requests that use them.

    No work is done for a request before its turn. A request that is cancelled in its turn costs no
    more than the piece under way.

    Args:
        threads: how many requests have their turn at once.
        max_wait_s: no request is accepted while the earlier ones need longer, at the recent rate.
    """

    def __init__(self, threads: int, max_wait_s: float) -> None:
        self.threads = ThreadPoolExecutor(threads, "ad2kit-read")
        self._free = asyncio.Semaphore(threads)
        self._max_wait_s = max_wait_s
        self._waiting_bytes = 0
        self._bytes_per_s = math.nan  # before the first request

    @contextlib.asynccontextmanager
    async def turn(self, body: bytes, encoding: bytes, max_bytes: int) -> AsyncIterator[bytes]:
        """Wait for the turn of a request; the turn is the body of the ``with``.

        Args:
            body: the body of the request.
            encoding: how it is compressed; empty for a plain body. It is unpacked in its turn.
            max_bytes: the most bytes of the body after it is unpacked.

        Yields:
            The plain body.

        Raises:
            QueueFull: the turn would come too late.
            Damaged: the body is not in its encoding.
            TooLarge: the body unpacks to too many bytes.
        """
        # NaN before the first request; every comparison with NaN is false, so never too long.
        wait_s = self._waiting_bytes / self._bytes_per_s
        if wait_s > self._max_wait_s:
            raise QueueFull(math.ceil(wait_s))
        # How much a compressed body holds is not known before its turn.
        size_bytes = max_bytes if encoding else len(body)
        self._waiting_bytes += size_bytes
        try:
            async with self._free:
                start = time.perf_counter()
                if encoding:
                    body = await self.run(unpack, body, encoding, max_bytes)
                    # The work grows with the unpacked bytes. A rate of compressed bytes would be
                    # far too low for the plain bodies that wait.
                    self._waiting_bytes += len(body) - size_bytes
                    size_bytes = len(body)
                yield body
                rate = size_bytes / (time.perf_counter() - start)
                if math.isnan(self._bytes_per_s):
                    self._bytes_per_s = rate
                else:
                    self._bytes_per_s = (self._bytes_per_s + rate) / 2
        finally:
            self._waiting_bytes -= size_bytes

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run a function in one of the threads, and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)


class _Here:
    """The lane of small requests, which are read at once in the event loop's own thread."""

    def turn(
        self, body: bytes, _encoding: bytes, _max_bytes: int
    ) -> contextlib.AbstractAsyncContextManager[bytes]:
        """Have a turn at once; a small body is unpacked already."""
        return contextlib.nullcontext(body)

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run a function, and return its result."""
        return work(*arguments)


class Classify:
    """Classifies the texts of requests.

    Args:
        classifier: tokenises texts, and turns logits into predictions.
        batcher: computes logits.
        deadline_s: time after which a request is given up.
        max_texts: the most texts of a request.
        max_text_characters: the most characters of a text or pair.
        max_body_bytes: the most bytes of a body after it is unpacked.
        max_wait_s: how long a large request may wait until it is read.
        metrics: count answers, times and predictions.
        shadow: gets the answered texts and predictions, to compare them with the teacher's.
        access_log: write a log line for each answer; it holds numbers and never texts.
    """

    def __init__(
        self,
        classifier: OnnxClassifier,
        batcher: Batcher,
        *,
        deadline_s: float,
        max_texts: int,
        max_body_bytes: int,
        max_text_characters: int = 2**26,
        max_wait_s: float = math.inf,
        metrics: ServiceMetrics,
        shadow: Shadow | None = None,
        access_log: bool = False,
    ) -> None:
        self.classifier = classifier
        self.batcher = batcher
        self.metrics = metrics
        self.deadline_s = deadline_s
        self.max_texts = max_texts
        self.max_text_characters = max_text_characters
        self.max_body_bytes = max_body_bytes
        self.shadow = shadow
        self.access_log = access_log
        self.model = ""
        self._here = _Here()
        self._large = _Lane(2, max_wait_s)
        self._huge = _Lane(1, max_wait_s)

    def of(self, model: str, classifier: OnnxClassifier) -> Classify:
        """Return the same for another model, or for another version of a model.

        Queue, threads, limits and metrics are shared. Requests that are under way end with the
        version that has read them.

        Args:
            model: its name; the service's own model has none. Only this one has a shadow.
            classifier: the model.
        """
        other = copy.copy(self)
        other.model = model
        other.classifier = classifier
        other.shadow = None if model else self.shadow
        return other

    def close(self) -> None:
        """Shut the threads down."""
        for lane in (self._large, self._huge):
            lane.threads.shutdown(wait=False, cancel_futures=True)

    def check_room(self) -> None:
        """Refuse a request before it is read, if it would wait too long.

        Raises:
            Problem: the queue is full.
        """
        try:
            self.batcher.check_room()
        except QueueFull as full:
            raise Problem(429, str(full), retry_after_s=full.retry_after_s) from full

    async def answer(self, body: bytes, encoding: bytes = b"") -> tuple[bytes, RequestTimes]:
        """Return the JSON answer to a JSON request, and the times of its stages.

        Args:
            body: the request.
            encoding: how the client has compressed it; empty for a plain body.

        Raises:
            Problem: the error that the client is told instead.
        """
        stages = RequestTimes()
        predictions = await self._answer(body, encoding, stages)
        content = to_json({"predictions": predictions})
        stages.total_s = time.perf_counter() - stages.start
        self.metrics.answered(stages.total_s)
        if self.access_log:
            texts = len(predictions)
            truncated = sum(prediction["truncated"] for prediction in predictions)
            facts = {"status": 200, "texts": texts, "truncated": truncated, **stages.ms()}
            if self.model:
                facts["model"] = self.model
            logger.info("answered", extra=facts)
        return content, stages

    async def classify(
        self, request: ClassifyRequest, stages: RequestTimes
    ) -> list[dict[str, Any]]:
        """Return the predictions for a request as plain data.

        Raises:
            Problem: a text that cannot be read, a full queue, or a deadline that passed.
        """
        return await self._answer(request.model_dump_json().encode(), b"", stages)

    async def _answer(
        self, body: bytes, encoding: bytes, stages: RequestTimes
    ) -> list[dict[str, Any]]:
        """Return the predictions for the body of a request; raises :class:`Problem`."""
        try:
            async with asyncio.timeout(self.deadline_s):
                encodings, texts, scores = await self._read(body, encoding)
                stages.tokenise_s = time.perf_counter() - stages.start
                self.metrics.tokenised(stages.tokenise_s)
                logits = await self.batcher.submit(encodings, stages.timing, self.classifier.run)
        except Damaged as error:
            raise Problem(400, f"the body is not valid {encoding.decode()}: {error}") from error
        except TooLarge as error:
            raise Problem(413, str(error)) from error
        except TextTooLong as error:
            raise Problem(413, error.message, hint=error.hint) from error
        except TooMuch as error:
            raise Problem(413, str(error), hint="send fewer texts in one request") from error
        except UserError as error:
            columns = self.classifier.artifact.text_columns
            raise Problem(422, error.message, hint=expected(columns, self.max_texts)) from error
        except QueueFull as full:
            raise Problem(429, str(full), retry_after_s=full.retry_after_s) from full
        except BatcherClosed as error:
            raise Problem(503) from error
        except TimeoutError as error:
            raise Problem(504) from error
        predictions = self.classifier.predictions(encodings, logits)
        self.metrics.predicted(predictions, self.model)
        if self.shadow is not None:
            self.shadow.offer(texts, predictions)
        answers = [prediction.as_dict() for prediction in predictions]
        if not scores:
            for answer in answers:
                answer.pop("scores", None)
        return answers

    async def _read(self, body: bytes, encoding: bytes) -> tuple[list[Tokens], list[Any], bool]:
        """Return the tokens of a request, its texts for a shadow, and whether scores are wanted."""
        lane: _Lane | _Here = self._here
        if encoding and len(body) <= _LARGE_BYTES:
            with contextlib.suppress(TooLarge):
                body = unpack(body, encoding, min(_LARGE_BYTES, self.max_body_bytes))
                encoding = b""
        if encoding:
            lane = self._huge  # only one such body is unpacked and held at a time
        elif len(body) > _LARGE_BYTES:
            lane = self._large if len(body) <= _HUGE_BYTES else self._huge
        async with lane.turn(body, encoding, self.max_body_bytes) as body:
            columns = self.classifier.artifact.text_columns
            texts, scores = await lane.run(parse, body, columns, self.max_texts)
            check_characters(texts, self.max_text_characters)
            encodings = list["Tokens"]()
            with self.batcher.reserved(len(texts)):
                for first in range(0, len(texts), _PIECE_TEXTS):
                    piece = texts[first : first + _PIECE_TEXTS]
                    encodings += await lane.run(self.classifier.encode, piece, first)
        # Texts may be many times larger than their tokens; without a shadow nobody needs them.
        return encodings, [] if self.shadow is None else texts, scores


@dataclass(slots=True)
class RequestTimes:
    """Times of the stages of a request, in seconds, from its body read to its answer written."""

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
        """Return the stages as the value of a Server-Timing header (W3C *Server Timing*)."""
        stages = (f"{name.removesuffix('_ms')};dur={ms}" for name, ms in self.ms().items())
        return ", ".join(stages).encode()


class Direct:
    """ASGI middleware: answers POST requests to ``path`` and ``path/MODEL``, and passes others on.

    Args:
        app: the application for everything else.
        path: the path of the requests that are answered here.
        handler: returns the object that answers a body, by the name of the model. It is called at
            each request, because the service is created after its middleware, and because a model
            may have a new version.
    """

    def __init__(self, app: App, *, path: str, handler: Callable[[str], Classify]) -> None:
        self.app = app
        self.path = path
        self.handler = handler

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on.

        Raises:
            Problem: there is no such model, it has no such method, or its texts are refused.
        """
        model = model_of(scope["path"], self.path) if scope["type"] == "http" else None
        # BentoML knows the path without a name, too, and its other methods.
        if model is None or (model == "" and scope["method"] != "POST"):
            await self.app(scope, receive, send)
            return
        handler = self.handler(model)
        if scope["method"] != "POST":
            raise Problem(405, hint=f"use POST {self.path}/{model}")
        request_headers = dict(scope["headers"])
        body = await _whole(receive)
        if body is None:
            return
        task = asyncio.current_task()
        watcher = None

        async def watch() -> None:
            if (await receive())["type"] == "http.disconnect" and task is not None:
                task.cancel("the client is gone")

        def start_watching() -> None:
            nonlocal watcher
            watcher = asyncio.ensure_future(watch())

        patience_s = 0.0 if len(body) > _LARGE_BYTES else _PATIENCE_S
        timer = asyncio.get_running_loop().call_later(patience_s, start_watching)
        try:
            content, stages = await handler.answer(body, encoding_of(request_headers))
        except asyncio.CancelledError:
            if watcher is None or not watcher.done():
                raise  # the server stops
            # Nobody reads this answer, but the outer middleware waits for one.
            raise Problem(499) from None
        finally:
            timer.cancel()
            if watcher is not None:
                watcher.cancel()
        headers = [(b"server-timing", stages.header())] if _TIMING in request_headers else []
        await send_json(send, 200, content, headers)


def model_of(path: str, prefix: str = "/classify") -> str | None:
    """Return the name of the model in a path; None if the path is not ``prefix`` or below it.

    model_of("/classify/topics")  # "topics"
    model_of("/classify")  # "", the service's own model
    """
    if not path.startswith(prefix):
        return None
    rest = path[len(prefix) :].rstrip("/")
    return rest[1:] if rest[:1] in ("", "/") else None


async def _whole(receive: Receive) -> bytes | None:
    """Return the body of a request; None if its client left before all of it arrived.

    :mod:`ad2kit.service.connections` bounds the time and the bytes of the body.
    """
    parts = list[bytes]()
    incomplete = True
    while incomplete:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        incomplete = message.get("more_body", False)
    return b"".join(parts)


class Unlink:
    """ASGI middleware: removes outer layers from the middleware chain when the server starts.

    BentoML's own limit on the time of a request leaves a timer behind for a minute after each
    request. At two thousand requests a second this wastes memory and time, because a request has
    its deadline here. Its OpenTelemetry layer composes each URL only to find that it is excluded.

    Args:
        app: the application.
        layers: class names of the layers to remove.
    """

    def __init__(self, app: App, *, layers: Collection[str]) -> None:
        self.app = app
        self.layers = layers

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Remove the layers when the server starts (the lifespan scope); pass everything on."""
        layer: Any = scope["app"].middleware_stack if scope["type"] == "lifespan" else self
        while layer is not self:
            if type(layer.app).__name__ in self.layers:
                layer.app = layer.app.app
            else:
                layer = layer.app
        await self.app(scope, receive, send)


def parse(body: bytes, text_columns: int, max_texts: int) -> tuple[list[Any], bool]:
    """Return the texts of a request, and whether the scores of all labels are asked for.

    It accepts the same requests as :class:`ClassifyRequest`. That model lists a fault for each
    item of a list and each type that it tried there, which takes a second and 90 MB for 1 MB of
    such items.

    Raises:
        Problem: the body is not JSON, does not fit a model of one or two ``text_columns``, or has
            more than ``max_texts``.
    """
    request: Any = None
    try:
        request = from_json(body, cache_strings="none")
    except ValueError as error:
        mark = next(
            (f"; it begins with {name}" for mark, name in _MARKS.items() if body.startswith(mark)),
            "",
        )
        status = 400
        fault = f"the body is not valid JSON: {error}{mark}"
    else:
        status, fault = _fault(request, max_texts)
    if fault:
        hint = "" if status == 413 else expected(text_columns, max_texts)
        raise Problem(status, fault, hint=hint)
    texts = request["texts"]
    return texts if isinstance(texts, list) else [texts], request.get("scores", False)


def check_characters(texts: list[Any], limit: int) -> None:
    """Refuse a text or pair of more characters than a limit.

    Raises:
        Problem: names the first of them.
    """
    for row, text in enumerate(texts):
        characters = len(text) if isinstance(text, str) else sum(map(len, text))
        if characters > limit:
            fault = f"texts.{row}: expected at most {limit} characters, found {characters}"
            raise Problem(413, fault, hint="send a shorter text")


def expected(text_columns: int, max_texts: int) -> str:
    """Return a hint: the body to send to a model that reads one text or a pair of texts."""
    example = '"..."' if text_columns == 1 else '["...", "..."]'
    items = "texts" if text_columns == 1 else "pairs of texts"
    return f'send {{"texts": [{example}]}} with 1 to {max_texts} {items} that are not empty'


def _fault(request: Any, max_texts: int) -> tuple[int, str]:
    """Return a status and the fault of some JSON; the fault is empty if it is a valid request."""
    if not isinstance(request, dict):
        return 422, f"expected an object, found {_kind(request)}"
    unknown = [name for name in request if name not in ClassifyRequest.model_fields]
    if unknown:
        name = unknown[0][:50]
        suggestion = nearest(name, ClassifyRequest.model_fields)
        return 422, f"there is no field {name!r}{suggestion}, only texts and scores"
    if "texts" not in request:
        return 422, "texts: the field is missing"
    if not isinstance(request.get("scores", False), bool):
        return 422, f"scores: expected true or false, found {_kind(request['scores'])}"
    texts = request["texts"]
    if isinstance(texts, str):
        return 200, ""
    if not isinstance(texts, list):
        return 422, f"texts: expected a text or a list of texts, found {_kind(texts)}"
    if not texts:
        return 422, "texts: expected at least 1 text, found an empty list"
    if len(texts) > max_texts:
        return 413, f"texts: expected at most {max_texts} texts, found {len(texts)}"
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
    """Return the name of a value's JSON type, as error messages have it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")
