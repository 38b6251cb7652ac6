"""The BentoML service of an ad2kit student: ``bentoml serve``.

In a Bento it serves the artefact that is packed beside this file. In a checkout it serves the most
recent run that passed its parity gate, or the model that ``AD2KIT_MODEL`` or ``--arg
model=FOLDER`` names. Its settings are :class:`ad2kit.service.settings.Settings`. Neither torch nor
transformers is imported.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

# Vendors' telemetry is off unless the operator says otherwise; read when bentoml is imported.
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")
# The tokenizer's own threads would compete with the engine's threads for the same cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import bentoml
from starlette.applications import Starlette
from starlette.requests import Request  # noqa: TC002  (Starlette reads the annotation)
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.config import HTTP_PROTOCOLS

from ad2kit import __version__
from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.run.machine import available_cpus
from ad2kit.service.access import ApiKeys, Keys, Preflight, Rate
from ad2kit.service.batcher import Batcher, BatchFacts
from ad2kit.service.connections import bounded, check_files
from ad2kit.service.errors import ErrorContract, Pace, Problem
from ad2kit.service.http import Classify, Direct, RequestTimes, Unlink
from ad2kit.service.models import Loaded, Model
from ad2kit.service.monitoring import ServiceMetrics, Shadow, log_as_json, metrics_folder, tracing
from ad2kit.service.openapi import (
    ClassifyPrediction,
    ClassifyRequest,
    ClassifyResponse,
    Documented,
    document,
)
from ad2kit.service.process import Server, end_with_parent, errors_of_bentoml, follow, this_server

logger = logging.getLogger("ad2kit.service")

# Shorter than the deadline: accepted requests must be answered in time, also when the machine
# becomes slower meanwhile.
WAIT_PER_DEADLINE = 1 / 4
# How long Python lets the event loop run before the engine's thread may go on (default 5 ms).
SWITCH_S = 0.0005
PUBLIC = ("/", "/livez", "/readyz", "/healthz", "/metrics")


# Looked up once: bentoml looks its names up at each use, which takes longer than the call.
this_service = bentoml.get_current_service
WORKER: int | None = bentoml.server_context.worker_index  # None in the parent process
with errors_of_bentoml():
    server = this_server(
        Path(__file__).parent, vars(bentoml.use_arguments()), worker=WORKER is not None
    )
    settings = server.settings
    keys = Keys(settings.keys())
    check_files(settings.max_connections)
WORKERS = settings.workers or max(1, available_cpus() // (settings.threads or 1))


async def info(_request: Request) -> JSONResponse:
    """Answer GET /info; a BentoML API could answer POST only."""
    return JSONResponse(this_service().info())


async def page(_request: Request) -> Response:
    """Answer GET / with a page for people; the page sends requests to this service only."""
    content = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    if settings.root_path:  # its addresses are relative, and /ad2kit may come without a slash
        base = f'<base href="{settings.root_path}/">'
        content = content.replace("<title>", f"{base}\n<title>", 1)
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    headers = {
        "Content-Security-Policy": f"{policy}connect-src 'self'; form-action 'none'",
        "Referrer-Policy": "no-referrer",  # the address of the page may hold texts
    }
    return Response(content, media_type="text/html; charset=utf-8", headers=headers)


async def metrics(_request: Request) -> Response:
    """Answer GET /metrics with the metrics of all workers."""
    content = this_service().metrics.exposition()
    return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")


ROUTES = [Route("/", page), Route("/info", info)]
if settings.metrics_port is None:
    ROUTES.append(Route("/metrics", metrics))


@bentoml.service(
    name="ad2kit-classifier",
    workers=WORKERS,
    traffic={"timeout": 60},
    # With these on, the service answers over a quarter fewer requests, see
    # docs/measurements/serving.md.
    # An operator's BENTOML_CONFIG turns the log on again; BentoML's metrics would hide ours.
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
    tracing=tracing(),
)
@bentoml.asgi_app(Starlette(routes=ROUTES), path="/")
class Ad2kitClassifier:
    """Text classification by a distilled student."""

    def __init__(self) -> None:
        log_as_json()
        if server.pid != os.getpid():
            end_with_parent(server.pid, drain_s=settings.body_timeout_s + settings.deadline_s)
        sys.setswitchinterval(SWITCH_S)
        self.threads = settings.threads or max(1, available_cpus() // WORKERS)
        start = time.perf_counter()
        self.loaded = Loaded(server.models, server.refused, self.threads, self.exchange)
        seconds = time.perf_counter() - start
        classifier = self.model.classifier
        shared = server.metrics or metrics_folder()
        self.metrics = ServiceMetrics(shared, WORKER or 0)
        self.rate = None
        if settings.max_key_requests_per_s is not None:
            self.rate = Rate(shared / "rates", settings.max_key_requests_per_s)
        max_wait_s = settings.deadline_s * WAIT_PER_DEADLINE
        self.batcher = Batcher(
            self.infer,
            max_batch_tokens=settings.max_batch_tokens,
            max_queue_texts=settings.max_queue_texts,
            max_queue_tokens=settings.max_queue_tokens,
            max_wait_s=max_wait_s,
            observe=self.observe,
        )
        self.shadow = None
        if server.shadow is not None:
            teacher = OnnxClassifier(server.shadow.folder, threads=1)
            self.shadow = Shadow(teacher, classifier, settings.shadow_share, self.metrics.shadowed)
        own = Classify(
            classifier,
            self.batcher,
            deadline_s=settings.deadline_s,
            max_texts=settings.max_texts,
            max_body_bytes=settings.max_body_bytes,
            max_text_characters=settings.max_text_characters,
            max_wait_s=max_wait_s,
            metrics=self.metrics,
            shadow=self.shadow,
            access_log=settings.access_log,
        )
        self.apis = {
            name: own.of(name, model.classifier) for name, model in self.loaded.models.items()
        }
        facts = {
            "variant": classifier.artifact.variant,
            "model": str(self.model.version.folder),
            "models": sorted(name for name in self.apis if name),
            "threads": self.threads,
            "golden_answers": self.model.golden_answers,
            "load_ms": round(1e3 * seconds, 1),
        }
        # These objects live as long as the process; the garbage collector need not search them.
        gc.collect()
        gc.freeze()
        logger.info("ready", extra=facts)
        self.keys_sha256 = server.keys_sha256
        self.metrics.refused(len(server.refused))
        if settings.is_watched:
            follow(server, self.take)

    @bentoml.on_deployment
    def hand_on() -> None:
        """Hand the decisions of the parent process on to the workers before it starts them."""
        with errors_of_bentoml():
            server.hand_on()

    @property
    def model(self) -> Model:
        """The service's own model."""
        return self.loaded.models[""]

    def take(self, decided: Server) -> None:
        """Put new decisions of the parent process into force; called in another thread."""
        if decided.keys_sha256 != self.keys_sha256:
            keys.change(decided.settings.keys())
            self.keys_sha256 = decided.keys_sha256
        self.metrics.refused(len(decided.refused))
        self.loaded.take(decided.models, decided.refused)

    def exchange(self, name: str, classifier: OnnxClassifier) -> None:
        """Let requests from now on have a new version of a model; called in another thread.

        Only requests under way hold the old version, so that its memory is given back.
        """
        self.apis[name] = self.apis[name].of(name, classifier)

    def infer(self, items: Any) -> Any:
        """Compute a batch of the service's own model."""
        return self.model.classifier.run(items)

    def api_of(self, name: str) -> Classify:
        """Return what answers the requests to a model.

        Raises:
            Problem: there is no such model.
        """
        if name not in self.apis:
            paths = [f"/classify/{each}".rstrip("/") for each in sorted(self.apis)]
            raise Problem(404, f"/classify/{name}", hint=f"POST to {' or '.join(paths)}")
        return self.apis[name]

    def observe(self, facts: BatchFacts) -> None:
        """Record the facts of a batch and the length of the queue behind it."""
        self.metrics.batch(facts)
        self.metrics.waiting(*self.batcher.waiting)

    @bentoml.api(route="/classify")
    async def classify(self, request: ClassifyRequest, /) -> ClassifyResponse:
        """Return label and probabilities for each text.

        HTTP never comes here: :class:`ad2kit.service.http.Direct` answers POST /classify before.
        This method is for BentoML's clients and schema.
        """
        predictions = await self.apis[""].classify(request, RequestTimes())
        return ClassifyResponse(
            predictions=[ClassifyPrediction.model_validate(row) for row in predictions]
        )

    def info(self) -> dict[str, Any]:
        """Return the model, its lineage, its parity report, and the limits of the service."""
        models = self.loaded.models
        return {
            "ad2kit": __version__,
            **self.model.facts(),
            "limits": settings.limits(),
            "settings": settings.public() | {"workers": WORKERS, "threads": self.threads},
            "models": {name: models[name].facts() for name in models if name},
            "refused": sorted(self.loaded.refused),  # the reasons stand in the log
        }

    @bentoml.on_shutdown
    async def drain(self) -> None:
        """Answer the queued texts before the process ends."""
        texts, _ = self.batcher.waiting
        logger.info("draining", extra={"waiting_texts": texts})
        await self.batcher.close()
        self.apis[""].close()
        if self.rate is not None:
            self.rate.close()
        if self.shadow is not None:
            await asyncio.to_thread(self.shadow.close)


def reject(status: int, reason: str) -> None:
    """Count a rejected request, and log it if there is an access log."""
    this_service().metrics.rejected(status, reason)
    if settings.access_log:
        logger.info("refused", extra={"status": status, "reason": reason})


def count_key(name: str) -> None:
    """Count a request by the name of its key."""
    this_service().metrics.asked_with(name)


def admit(method: bytes, path: bytes) -> None:
    """Refuse a POST to /classify while the queue is full, before any work is spent on it.

    Raises:
        Problem: the queue is full.
    """
    if method == b"POST" and path.startswith(b"/classify"):
        this_service().apis[""].check_room()


def openapi() -> dict[str, Any]:
    """Return the OpenAPI document of this service and its model."""
    models = this_service().loaded.models
    text_columns = {name: model.classifier.artifact.text_columns for name, model in models.items()}
    found = document(text_columns, keys=bool(keys.pairs), max_texts=settings.max_texts)
    if settings.metrics_port is not None:
        del found["paths"]["/metrics"]
    return found


# BentoML builds uvicorn's configuration itself, without a way to choose a protocol. The
# configuration takes its default from this table, which may hold a class instead of its name.
PACE = Pace()
HTTP_PROTOCOLS["auto"] = bounded(settings, reject, admit, PACE)  # type: ignore[assignment]
TRACING = tracing()
# The middleware, from the outermost layer to the innermost.
Ad2kitClassifier.add_asgi_middleware(  # type: ignore[attr-defined]
    Unlink,
    layers={"TimeoutMiddleware"}
    | (set() if "exporter_type" in TRACING else {"OpenTelemetryMiddleware"}),
)
Ad2kitClassifier.add_asgi_middleware(  # type: ignore[attr-defined]
    ErrorContract,
    max_body_bytes=settings.max_body_bytes,
    observe=reject,
    pace=PACE,
    hints={
        413: f"send at most {settings.max_texts} texts, and {settings.max_body_bytes} bytes, "
        "per request",
        504: f"the deadline is {settings.deadline_s:g} s; retry, or send fewer texts",
    },
)
if settings.cors_origins:
    Ad2kitClassifier.add_asgi_middleware(Preflight)  # type: ignore[attr-defined]
Ad2kitClassifier.add_asgi_middleware(  # type: ignore[attr-defined]
    ApiKeys,
    keys=keys,
    public=PUBLIC,
    count=count_key,
    rate=lambda: this_service().rate,
)
Ad2kitClassifier.add_asgi_middleware(  # type: ignore[attr-defined]
    Documented, path="/docs.json", document=openapi
)
Ad2kitClassifier.add_asgi_middleware(  # type: ignore[attr-defined]
    Direct, path="/classify", handler=lambda name: this_service().api_of(name)
)
