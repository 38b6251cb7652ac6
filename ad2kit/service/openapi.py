"""Pydantic models of the service's requests and answers, and their OpenAPI document.

BentoML's own document is wrong in three ways: it allows one text but no list of texts, its errors
are not those of :mod:`ad2kit.service.errors`, and half of the paths are missing.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool
from pydantic.json_schema import models_json_schema

from ad2kit import __version__
from ad2kit.exporting.golden import TEXTS
from ad2kit.service.errors import ERRORS, send_json
from ad2kit.tables.texts import VISIBLE, Text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ad2kit.service.errors import App, Message, Receive, Send

TIMING = "X-Server-Timing"

# A field that belongs to another task is left out of an answer; it is not null.
_Optional: Any = Field(None, exclude_if=lambda value: value is None)
_TEXT = {"type": "string", "minLength": 1, "pattern": VISIBLE}
_REFUSALS = (400, 401, 408, 413, 415, 422, 429, 431, 500, 503, 504)


class ClassifyRequest(BaseModel):
    """One text, or a list; for a sentence-pair model each text is a list of two.

    ``scores`` asks for the probabilities of all labels as well.
    """

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"example": {"texts": ["the plot is weak, but the acting is superb"]}},
    )

    texts: str | Annotated[list[Text], Field(min_length=1)]
    scores: StrictBool = False

    def as_list(self) -> list[Text]:
        """Return the texts as a list, also for a single text."""
        return [self.texts] if isinstance(self.texts, str) else self.texts


class ClassifyPrediction(BaseModel):
    """The answer for one text, the number of its tokens, and whether it was cut.

    A model that reads long texts in windows gives their number, too. Which other fields there are
    depends on the model's task (see /info): label and score; labels; or value. The probabilities of
    all labels are in scores, if they were asked for.
    """

    label: str | None = _Optional
    score: float | None = _Optional
    labels: list[str] | None = _Optional
    value: float | None = _Optional
    scores: dict[str, float] | None = _Optional
    tokens: int
    truncated: bool
    windows: int | None = _Optional


class ClassifyResponse(BaseModel):
    """One prediction per text, in order."""

    predictions: list[ClassifyPrediction]


class Error(BaseModel):
    """What went wrong, and what to do about it."""

    type: str
    message: str
    hint: str


class ErrorResponse(BaseModel):
    """The body of every answer whose status is 400 or more."""

    error: Error


def document(text_columns: Mapping[str, int], *, keys: bool, max_texts: int) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of the service.

    Args:
        text_columns: how many texts each model reads for each example, 1 or 2, by its name; the
            service's own model has the name "".
        keys: whether clients need an API key.
        max_texts: the most texts of a request.
    """
    refusals = {str(status): _refusal(status) for status in _REFUSALS if keys or status != 401}
    locked = {"401": _refusal(401)} if keys else {}
    own_columns = text_columns[""]
    requests = {own_columns: "ClassifyRequest"}
    for columns in set(text_columns.values()) - {own_columns}:
        requests[columns] = "ClassifyTextsRequest" if columns == 1 else "ClassifyPairsRequest"
    paths: dict[str, Any] = {
        **{
            f"/classify/{name}".rstrip("/"): {
                "post": _classify(columns, requests[columns], refusals)
            }
            for name, columns in sorted(text_columns.items())
        },
        "/info": {
            "get": {
                "summary": "The model, where it comes from, what it passed, and the limits",
                "responses": {
                    "200": {
                        "description": "All of it",
                        "content": {"application/json": {"schema": {"type": "object"}}},
                    }
                }
                | locked,
            }
        },
        "/metrics": {"get": _plain("What was counted, for Prometheus") | {"security": []}},
        "/livez": {"get": _plain("The process lives") | {"security": []}},
        "/readyz": {"get": _plain("A worker has given its golden answers") | {"security": []}},
    }
    components: dict[str, Any] = {"schemas": _schemas(requests, max_texts)}
    root: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "ad2kit classifier",
            "version": __version__,
            "description": "A distilled text classifier. Errors have one shape.",
        },
        "servers": [{"url": "."}],
        "paths": paths,
        "components": components,
    }
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        root["security"] = [{"key": []}]
    return root


def _schemas(requests: Mapping[int, str], max_texts: int) -> dict[str, Any]:
    """Return the JSON schemas of response, error and requests, which have names by columns."""
    models: list[type[BaseModel]] = [ClassifyRequest, ClassifyResponse, ErrorResponse]
    _, definitions = models_json_schema(
        [
            (model, "serialization" if model is not ClassifyRequest else "validation")
            for model in models
        ],
        ref_template="#/components/schemas/{model}",
    )
    schemas: dict[str, Any] = definitions["$defs"]
    request = schemas.pop("ClassifyRequest")
    request.pop("example")
    for columns, name in requests.items():
        item: dict[str, Any] = _TEXT
        if columns != 1:
            item = {"type": "array", "prefixItems": [_TEXT, _TEXT], "minItems": 2, "maxItems": 2}
        items = {"type": "array", "items": item, "minItems": 1, "maxItems": max_texts}
        texts = {"anyOf": [item, items]} if columns == 1 else items
        properties = request["properties"] | {"texts": texts}
        schemas[name] = request | {"properties": properties}
    return dict(sorted(schemas.items()))


def _classify(text_columns: int, request: str, refusals: dict[str, Any]) -> dict[str, Any]:
    """Return the OpenAPI operation of ``POST /classify``: its parameters, bodies and responses."""
    example: Any = TEXTS[0] if text_columns == 1 else [TEXTS[1], TEXTS[0]]
    bodies: dict[str, Any] = {
        "several": {"value": {"texts": [example, example]}},
        "with the scores of all labels": {"value": {"texts": [example], "scores": True}},
    }
    if text_columns == 1:
        bodies["one"] = {"value": {"texts": example}}
    timing_header = {
        "description": "Where the time went, in ms; if it was asked for",
        "schema": {"type": "string"},
    }
    id_header = {
        "description": "The id of the request, in every answer; the log has it, too",
        "schema": {"type": "string"},
    }
    return {
        "summary": "Classify texts",
        "parameters": [
            {
                "name": "X-Request-ID",
                "in": "header",
                "schema": {"type": "string"},
                "description": "An id of 1 to 128 visible ASCII characters; otherwise one is made",
            },
            {
                "name": TIMING,
                "in": "header",
                "schema": {"type": "string"},
                "description": "Any value asks for Server-Timing",
            },
        ],
        "requestBody": {
            "required": True,
            "description": "It may be compressed with gzip, which Content-Encoding then says",
            "content": _json(request, examples=bodies),
        },
        "responses": {
            "200": {
                "description": "One prediction per text, in order",
                "headers": {"Server-Timing": timing_header, "X-Request-ID": id_header},
                "content": _json("ClassifyResponse"),
            },
            **refusals,
        },
    }


def _json(model: str, **fields: Any) -> dict[str, Any]:
    """Return the content of a JSON body that has the schema of a model, with more fields."""
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model}"}, **fields}}


def _plain(description: str) -> dict[str, Any]:
    """Return an operation that has a description and the one status 200."""
    responses: dict[str, Any] = {"200": {"description": description}}
    return {"summary": description, "responses": responses}


def _refusal(status: int) -> dict[str, Any]:
    """Return the response for a status of :data:`ad2kit.service.errors.ERRORS`."""
    kind, message, hint = ERRORS[status]
    example = {"error": {"type": kind, "message": message, "hint": hint}}
    response: dict[str, Any] = {
        "description": f"{kind}: {message}",
        "content": _json("ErrorResponse", example=example),
    }
    if status == 429:
        seconds = {"description": "Seconds", "schema": {"type": "integer", "minimum": 1}}
        response["headers"] = {"Retry-After": seconds}
    return response


class Documented:
    """ASGI middleware: answers GET on one path with a document that replaces the application's.

    Args:
        app: the application for everything else.
        path: the path of the document.
        document: returns the document. It is called at each request, because the service is
            created after its middleware.
    """

    def __init__(self, app: App, *, path: str, document: Callable[[], dict[str, Any]]) -> None:
        self.app = app
        self.path = path
        self.document = document

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        is_http = scope["type"] == "http"
        if not (is_http and scope["method"] == "GET" and scope["path"] == self.path):
            await self.app(scope, receive, send)
            return
        await send_json(send, 200, json.dumps(self.document()).encode())
