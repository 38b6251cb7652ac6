"""POST /classify as plain ASGI: from the bytes of a request to those of its answer. No framework.

For a model of a millisecond the server is the cost. Between the socket and the batcher there is
only what a request needs: one pass of pydantic over the body, the tokenizer, and one pass of JSON
over the answer. Errors leave here as :class:`Problem`; `error_contract` gives them their shape.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json

from ad2kit.batcher import BatcherClosed, QueueFull
from ad2kit.error_contract import Problem
from ad2kit.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from ad2kit.batcher import Batcher
    from ad2kit.classifier import OnnxClassifier
    from ad2kit.error_contract import App, Message, Receive, Send
    from ad2kit.service_metrics import ServiceMetrics

# Clients are watched for leaving only when their answer takes longer than this.
_PATIENCE_S = 0.05
MAX_TEXTS = 128
Text = str | tuple[str, str]


class ClassifyRequest(BaseModel):
    """One text, or a list; for a sentence-pair model each text is a list of two."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"example": {"texts": ["the plot is weak, but the acting is superb"]}},
    )

    texts: str | Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]

    def as_list(self) -> list[Text]:
        """Return the texts as a list, also if there is one."""
        return [self.texts] if isinstance(self.texts, str) else self.texts


class Classify:
    """Classifies what requests hold.

    Args:
        classifier: tokenises, and turns logits into predictions.
        batcher: computes logits.
        deadline_s: after how long a request is given up.
        metrics: are told of all that happens.
    """

    def __init__(
        self, classifier: OnnxClassifier, batcher: Batcher, *, deadline_s: float,
        metrics: ServiceMetrics,
    ) -> None:  # fmt: skip
        self.classifier, self.batcher, self.metrics = classifier, batcher, metrics
        self.deadline_s = deadline_s

    def insist_on_room(self) -> None:
        """Refuse a request before it is read, if it would wait too long.

        Raises:
            Problem: the queue is full.
        """
        try:
            self.batcher.insist_on_room()
        except QueueFull as full:
            raise Problem(429, str(full), retry_after_s=full.retry_after_s) from full

    async def answer(self, body: bytes) -> bytes:
        """Return the JSON answer to a JSON request.

        Raises:
            Problem: what the client is told instead.
        """
        start = time.perf_counter()
        try:
            request = ClassifyRequest.model_validate_json(body)
            predictions = await self.classify(request.as_list())
        except ValidationError as error:
            raise _misfit(error) from error
        self.metrics.answered(time.perf_counter() - start)
        return to_json({"predictions": predictions})

    async def classify(self, texts: list[Any]) -> list[dict[str, Any]]:
        """Return the predictions of texts as plain data.

        Raises:
            Problem: a text that cannot be read, a full queue, or a deadline that passed.
        """
        start = time.perf_counter()
        try:
            encodings = self.classifier.encode(texts)
            self.metrics.tokenised(time.perf_counter() - start)
            async with asyncio.timeout(self.deadline_s):
                logits = await self.batcher.submit(encodings)
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
        return [each.as_dict() for each in predictions]


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
        handler.insist_on_room()
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        task, gone = asyncio.current_task(), None

        async def watch() -> None:
            if (await receive())["type"] == "http.disconnect" and task is not None:
                task.cancel("the client is gone")

        def start_watching() -> None:
            nonlocal gone
            gone = asyncio.ensure_future(watch())

        timer = asyncio.get_running_loop().call_later(_PATIENCE_S, start_watching)
        try:
            content = await handler.answer(body)
        except asyncio.CancelledError:
            if gone is None or not gone.done():
                raise  # the server stops
            # Nobody reads it, but what wraps this waits for an answer.
            raise Problem(499) from None
        finally:
            timer.cancel()
            if gone is not None:
                gone.cancel()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})


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
