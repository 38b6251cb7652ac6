"""POST /classify as plain ASGI: from the bytes of a request to those of its answer. No framework.

For a model of a millisecond the server is the cost. Between the socket and the batcher there is
only what a request needs: one pass of pydantic over the body, the tokenizer, and one pass of JSON
over the answer. Errors leave here as :class:`Problem`; `error_contract` gives them their shape.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_core import to_json

from ad2kit.batcher import BatcherClosed, QueueFull, Timing
from ad2kit.error_contract import Problem, send_json
from ad2kit.errors import UserError
from ad2kit.openapi import TIMING, ClassifyRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from ad2kit.batcher import Batcher
    from ad2kit.classifier import OnnxClassifier
    from ad2kit.error_contract import App, Message, Receive, Send
    from ad2kit.service_metrics import ServiceMetrics
    from ad2kit.shadow import Shadow

logger = logging.getLogger(__name__)

# Clients are watched for leaving only when their answer takes longer than this: it costs a task for
# each request, and a busy service keeps all of them waiting for a while.
_PATIENCE_S = 0.25
# A body is tokenised in another thread if it is larger: at about a millisecond the loop, which
# everybody waits for, costs more than the two changes of thread.
_LARGE_BYTES = 8192
_TIMING = TIMING.lower().encode()


class Classify:
    """Classifies what requests hold.

    Args:
        classifier: tokenises, and turns logits into predictions.
        batcher: computes logits.
        deadline_s: after how long a request is given up.
        metrics: are told of all that happens.
        shadow: is offered what was answered, to compare it with the teacher.
        access_log: write a line for each answer; of numbers, never of texts.
    """

    def __init__(
        self, classifier: OnnxClassifier, batcher: Batcher, *, deadline_s: float,
        metrics: ServiceMetrics, shadow: Shadow | None = None, access_log: bool = False,
    ) -> None:  # fmt: skip
        self.classifier, self.batcher, self.metrics = classifier, batcher, metrics
        self.deadline_s, self.shadow, self.access_log = deadline_s, shadow, access_log

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
        try:
            request = ClassifyRequest.model_validate_json(body)
            predictions = await self.classify(request, stages, large=len(body) > _LARGE_BYTES)
        except ValidationError as error:
            raise _misfit(error) from error
        content = to_json({"predictions": predictions})
        stages.total_s = time.perf_counter() - stages.start
        self.metrics.answered(stages.total_s)
        if self.access_log:
            cut = sum(each["truncated"] for each in predictions)
            facts = {"status": 200, "texts": len(predictions), "truncated": cut, **stages.ms()}
            logger.info("answered", extra=facts)
        return content, stages

    async def classify(
        self, request: ClassifyRequest, stages: Stages, *, large: bool = True
    ) -> list[dict[str, Any]]:
        """Return the predictions for a request as plain data; ``large`` ones leave the loop.

        Raises:
            Problem: a text that cannot be read, a full queue, or a deadline that passed.
        """
        texts: list[Any] = request.as_list()
        start = time.perf_counter()
        try:
            async with asyncio.timeout(self.deadline_s):
                encode = self.classifier.encode
                encodings = await asyncio.to_thread(encode, texts) if large else encode(texts)
                stages.tokenise_s = time.perf_counter() - start
                self.metrics.tokenised(stages.tokenise_s)
                logits = await self.batcher.submit(encodings, stages.timing)
        except UserError as error:
            raise Problem(422, f"{error.message}; {error.hint}") from error
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
        if not request.scores:
            for answer in answers:
                answer.pop("scores", None)
        return answers


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
        read_s: how long a body may take to arrive.
    """

    def __init__(
        self, app: App, *, path: str, handler: Callable[[], Classify], read_s: float
    ) -> None:
        self.app, self.path, self.handler, self.read_s = app, path, handler, read_s

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
        handler.insist_on_room()
        parts, more = list[bytes](), True
        try:
            async with asyncio.timeout(self.read_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    parts.append(message.get("body", b""))
                    more = message.get("more_body", False)
        except TimeoutError:
            raise Problem(408, f"the body took longer than {self.read_s:g} s") from None
        task, gone = asyncio.current_task(), None

        async def watch() -> None:
            if (await receive())["type"] == "http.disconnect" and task is not None:
                task.cancel("the client is gone")

        def start_watching() -> None:
            nonlocal gone
            gone = asyncio.ensure_future(watch())

        timer = asyncio.get_running_loop().call_later(_PATIENCE_S, start_watching)
        try:
            content, stages = await handler.answer(b"".join(parts))
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


def _misfit(error: ValidationError) -> Problem:
    """Return what a client is told about a body that is no JSON, or not the right one."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    too_long = [each for each in found if each["type"] == "too_long"]
    malformed = any(each["type"] == "json_invalid" for each in found)
    lines = [
        ": ".join(filter(None, (_place(each["loc"]), each["msg"])))
        for each in (too_long or found)[:3]
    ]
    return Problem(400 if malformed else 413 if too_long else 422, "; ".join(lines))


def _place(loc: tuple[int | str, ...]) -> str:
    """Return the field and the position in its list, without the types that were tried there."""
    return ".".join(str(part) for n, part in enumerate(loc) if n == 0 or isinstance(part, int))
