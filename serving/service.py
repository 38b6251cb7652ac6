"""The BentoML service of an ad2kit student: ``bentoml serve``.

It serves the artefact that is packed beside this file in a Bento; in a checkout, the most recent
run that passed its parity gate, or what ``--arg model=FOLDER`` names. Neither torch nor
transformers is imported.
"""

from __future__ import annotations

import asyncio
import json
import os
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

# Vendors' telemetry is off unless the operator says otherwise; read when bentoml is imported.
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")

import bentoml
from bentoml.exceptions import BentoMLException
from pydantic import BaseModel, ConfigDict, Field
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from ad2kit import __version__
from ad2kit.batcher import Batcher, QueueFull
from ad2kit.classifier import OnnxClassifier, servable_artifact
from ad2kit.error_contract import ErrorContract
from ad2kit.errors import UserError
from ad2kit.shipping import latest_passed_run

if TYPE_CHECKING:
    from starlette.requests import Request

MAX_TEXTS = 128
MAX_BODY_BYTES = 2**20
MAX_QUEUE_TEXTS = 1024
MAX_BATCH_TOKENS = 4096
DEADLINE_S = 10.0
EXPECTED = f'send {{"texts": ["..."]}} with 1 to {MAX_TEXTS} texts that are not empty'


class Arguments(BaseModel):
    """What ``bentoml serve --arg name=value`` may set."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    runs_dir: str | None = None
    threads: int | None = None


arguments = bentoml.use_arguments(Arguments)

Text = str | tuple[str, str]
# A field that another task has is left out and not null.
Optional: Any = Field(None, exclude_if=lambda value: value is None)


class ClassifyRequest(BaseModel):
    """One text, or a list; for a sentence-pair model each text is a list of two."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"example": {"texts": ["the plot is weak, but the acting is superb"]}},
    )

    texts: str | Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]


class Prediction(BaseModel):
    """The answer for one text, and whether it was cut.

    Which fields there are depends on the model's task (see /info): label and score; labels; or
    value. All probabilities are in scores.
    """

    label: str | None = Optional
    score: float | None = Optional
    labels: list[str] | None = Optional
    value: float | None = Optional
    scores: dict[str, float] | None = Optional
    tokens: int
    truncated: bool


class ClassifyResponse(BaseModel):
    """One prediction per text, in order."""

    predictions: list[Prediction]


class Unprocessable(BentoMLException):
    """A text that the model cannot read."""

    error_code = HTTPStatus.UNPROCESSABLE_ENTITY


class Overloaded(BentoMLException):
    """The queue is full."""

    error_code = HTTPStatus.TOO_MANY_REQUESTS


class DeadlineExceeded(BentoMLException):
    """The answer was not ready in time."""

    error_code = HTTPStatus.GATEWAY_TIMEOUT


def artifact_folder() -> Path:
    """Return the folder of the artefact to serve; see the module's docstring."""
    packed = Path(__file__).parent / "artifact"
    if arguments.model is not None:
        return servable_artifact(arguments.model)
    if packed.is_dir():
        return packed
    here = Path(arguments.runs_dir or "runs")
    if arguments.runs_dir is None and not here.is_dir():
        here = Path(__file__).parent.parent / "runs"
    return servable_artifact(latest_passed_run(here).path)


async def info(_request: Request) -> JSONResponse:
    """Answer GET /info; a BentoML API could only be POSTed to."""
    return JSONResponse(bentoml.get_current_service().info())


@bentoml.service(name="ad2kit-classifier", traffic={"timeout": 60}, workers=1)
@bentoml.asgi_app(Starlette(routes=[Route("/info", info)]), path="/")
class Ad2kitClassifier:
    """Text classification by a distilled student."""

    def __init__(self) -> None:
        folder = artifact_folder()
        self.classifier = OnnxClassifier(folder, threads=arguments.threads)
        lineage = Path(__file__).parent / "lineage.json"
        report = folder.parent.parent / "parity.json"  # of the run that the artefact lies in
        self.parity = None
        if lineage.is_file():
            self.parity = json.loads(lineage.read_text())["parity"]
        elif report.is_file():
            self.parity = json.loads(report.read_text())
        # The first inference allocates and compiles; no user should wait for it.
        columns = self.classifier.artifact.text_columns
        self.classifier.predict(["warm up" if columns == 1 else ("warm", "up")])
        self.batcher = Batcher(
            self.classifier.run,
            max_batch_tokens=MAX_BATCH_TOKENS,
            max_queue_texts=MAX_QUEUE_TEXTS,
        )

    @bentoml.api(route="/classify")
    async def classify(self, request: ClassifyRequest, /) -> ClassifyResponse:
        """Return label and probabilities for each text."""
        texts = [request.texts] if isinstance(request.texts, str) else request.texts
        try:
            encodings = self.classifier.encode(texts)
            async with asyncio.timeout(DEADLINE_S):
                logits = await self.batcher.submit(encodings)
        except UserError as error:
            raise Unprocessable(f"{error.message}; {error.hint}") from error
        except QueueFull as error:
            raise Overloaded(str(error)) from error
        except TimeoutError as error:
            raise DeadlineExceeded("no answer in time") from error
        predictions = self.classifier.predictions(encodings, logits)
        return ClassifyResponse(
            predictions=[Prediction.model_validate(each.as_dict()) for each in predictions]
        )

    def info(self) -> dict[str, Any]:
        """Return the model, where it comes from, what it passed, and the limits of the service."""
        artifact = self.classifier.artifact
        return {
            "ad2kit": __version__,
            "variant": artifact.variant,
            "task": artifact.task,
            "labels": list(artifact.labels),
            "max_length_tokens": artifact.max_length_tokens,
            "limits": {
                "texts": MAX_TEXTS,
                "body_bytes": MAX_BODY_BYTES,
                "queue_texts": MAX_QUEUE_TEXTS,
                "deadline_s": DEADLINE_S,
            },
            "lineage": artifact.lineage,
            "parity": self.parity,
        }

    @bentoml.on_shutdown
    async def drain(self) -> None:
        """Answer what is queued before the process ends."""
        await self.batcher.close()


Ad2kitClassifier.add_asgi_middleware(  # type: ignore[attr-defined]
    ErrorContract,
    max_body_bytes=MAX_BODY_BYTES,
    hints={
        413: f"send at most {MAX_TEXTS} texts per request",
        422: EXPECTED,
        400: EXPECTED,
        504: f"the deadline is {DEADLINE_S:g} s; retry, or send fewer texts",
    },
)
