"""Monitoring of a service: Prometheus metrics, log lines, traces, and a shadow teacher.

A shadow teacher scores a share of the texts once more, in the background. It shows drift of the
texts first, and without labels: the student stops agreeing with the model that it was compared
with. The teacher has a thread of its own with the lowest priority and a short queue. Texts that do
not fit into the queue are not compared, and no answer ever waits for the teacher.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import random
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from bentoml.exceptions import InvalidArgument
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from ad2kit.run.errors import ModelError, UserError
from ad2kit.service.connections import REQUEST

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prometheus_client import CollectorRegistry

    from ad2kit.exporting.classifier import OnnxClassifier, Prediction
    from ad2kit.exporting.records import OnnxArtifact
    from ad2kit.service.batcher import BatchFacts


# Room for two thousand labels; the files grow when there are more.
RESERVED_BYTES = 2**18
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


# Attributes of log records that BentoML's filter adds to format its own lines.
_BENTOML_ATTRIBUTES = ("component", "levelname_bracketed", "trace_msg", "service_name")
logger = logging.getLogger(__name__)
_QUEUE_TEXTS = 64
# Two numbers agree if they differ by at most this, or by this share of a number above 1.
_NUMBER_GAP = 0.1


def metrics_folder() -> Path:
    """Create the folder in which the workers of this server alone keep their metrics.

    BentoML has one folder for all servers of a user, and each server empties it when it starts.
    This folder is chosen once for all workers, because Python chooses another temporary folder
    when the first is full. Folders of servers that have ended are removed.

    Raises:
        ModelError: the folder would lie where another user can write, or there is no room.
    """
    server = psutil.Process()
    # By number: a user may have no name in a container.
    user_folder = Path(tempfile.gettempdir()) / f"ad2kit-metrics-of-{os.getuid()}"
    folder = user_folder / f"{server.pid}-{server.create_time():.0f}"
    try:
        user_folder.mkdir(mode=0o700, exist_ok=True)
        if user_folder.is_symlink() or user_folder.stat().st_uid != os.getuid():
            raise ModelError(
                f"{user_folder}, where the workers would share their metrics, is not this user's "
                "own folder",
                hint="remove it, or set TMPDIR to a folder that is",
            )
        for server_folder in user_folder.glob("*-*"):
            pid = server_folder.name.partition("-")[0]
            if pid.isdigit() and not psutil.pid_exists(int(pid)):
                # Another server may be removing it at the same moment.
                shutil.rmtree(server_folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise _no_room(user_folder, error) from error
    return folder


def _no_room(folder: Path, error: OSError) -> ModelError:
    return ModelError(
        f"the workers cannot leave their metrics in {folder}: {error}",
        hint="make room there, or set TMPDIR to a folder with room",
    )


def _reserve(folder: Path, worker: int) -> None:
    """Create the metric files of a worker with all their blocks; existing files are kept.

    A worker that takes the place of a dead one continues its files. The files are mapped into
    memory; a write to a page for which the disk has no room would kill the process.

    Raises:
        ModelError: the disk has no room.
    """
    for kind in ("counter", "histogram", "gauge_livesum"):
        path = folder / f"{kind}_{worker}.db"
        if not path.is_file():
            new = path.with_suffix(".new")
            try:
                new.write_bytes(bytes(RESERVED_BYTES))
            except OSError as error:
                new.unlink(missing_ok=True)
                raise _no_room(folder, error) from error
            new.replace(path)


class ServiceMetrics:
    """The metrics of one worker; :meth:`exposition` adds up the metrics of all workers.

    Args:
        folder: the folder in which all workers keep their metrics.
        worker: number of this worker. A worker that replaces a dead one continues its counts.

    Raises:
        ModelError: the disk has no room.
    """

    def __init__(self, folder: Path, worker: int) -> None:
        self.folder = folder
        _reserve(folder, worker)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
        import prometheus_client as prometheus
        from prometheus_client import values

        values.ValueClass = values.MultiProcessValue(lambda: worker)  # type: ignore[no-untyped-call]

        def histogram(name: str, description: str, buckets: Sequence[float]) -> Any:
            return prometheus.Histogram(f"ad2kit_{name}", description, buckets=buckets)

        self._requests = prometheus.Counter(
            "ad2kit_requests", "Requests, by the status of their answer", ["status"]
        )
        self._ok = self._requests.labels("200")
        self._request_s = histogram("request_seconds", "From the body read to the answer", _SECONDS)
        self._tokenise_s = histogram("tokenise_seconds", "Tokenising a request", _SECONDS)
        self._queue_s = histogram("queue_seconds", "Waiting of a text for its batch", _SECONDS)
        self._inference_s = histogram("inference_seconds", "Computing a batch", _SECONDS)
        self._texts = histogram("batch_texts", "Texts of a batch", _POWERS)
        self._tokens = histogram("batch_tokens", "Tokens of a batch, without padding", _POWERS)
        self._score = histogram("score", "Probability of the label that was answered", _SHARES)
        self._labels = prometheus.Counter(
            "ad2kit_predictions",
            "Answers by model and label; the service's own model has no name",
            ["model", "label"],
        )
        # Cached, because looking up the counter of a label costs more than counting.
        self._of_label = functools.cache(self._labels.labels)
        self._truncated = prometheus.Counter("ad2kit_truncated_texts", "Texts that were cut")
        self._rejected = prometheus.Counter(
            "ad2kit_rejected", "Requests that were not answered, by reason", ["reason"]
        )
        self._by_key = prometheus.Counter(
            "ad2kit_key_requests", "Requests with a key that has a name, by this name", ["name"]
        )
        self._shadowed = prometheus.Counter(
            "ad2kit_shadow_texts",
            "Texts that the shadow teacher was offered: agreed, disagreed, left_out",
            ["result"],
        )
        self._refused = prometheus.Gauge(
            "ad2kit_refused_versions",
            "New models and keys that are not in force because they cannot be used, in all workers",
            multiprocess_mode="livesum",
        )
        self._waiting = {
            unit: prometheus.Gauge(
                f"ad2kit_queue_{unit}", f"Waiting {unit}", multiprocess_mode="livesum"
            )
            for unit in ("texts", "tokens")
        }
        self.waiting(0, 0)  # the queue of a dead worker was lost with it
        self.refused(0)

    def exposition(self) -> bytes:
        """Return the metrics of all workers together in Prometheus' text format."""
        import prometheus_client

        return prometheus_client.generate_latest(_of_all_workers(self.folder))

    def answered(self, seconds: float) -> None:
        """Count a request that was answered."""
        self._ok.inc()
        self._request_s.observe(seconds)

    def rejected(self, status: int, reason: str) -> None:
        """Count a request that was rejected, by status and reason."""
        self._requests.labels(str(status)).inc()
        self._rejected.labels(reason).inc()

    def asked_with(self, name: str) -> None:
        """Count a request with the key of some name."""
        self._by_key.labels(name).inc()

    def tokenised(self, seconds: float) -> None:
        """Record how long the tokenizer took for a request."""
        self._tokenise_s.observe(seconds)

    def predicted(self, predictions: Sequence[Prediction], model: str = "") -> None:
        """Record labels and scores of some answers of a model; their distributions show drift."""
        for prediction in predictions:
            if prediction.labels:
                for label in prediction.labels:
                    self._of_label(model, label).inc()
            elif prediction.label is not None:
                self._of_label(model, prediction.label).inc()
            if prediction.score is not None:
                self._score.observe(prediction.score)
            if prediction.truncated:
                self._truncated.inc()

    def shadowed(self, agreed: bool | None) -> None:
        """Count a text offered to the shadow teacher; ``agreed`` is None if it was left out."""
        if agreed is None:
            result = "left_out"
        elif agreed:
            result = "agreed"
        else:
            result = "disagreed"
        self._shadowed.labels(result).inc()

    def batch(self, facts: BatchFacts) -> None:
        """Record the facts of a batch; called in the engine's thread."""
        self._texts.observe(facts.texts)
        self._tokens.observe(facts.tokens)
        self._inference_s.observe(facts.inference_s)
        for seconds in facts.queue_s:
            self._queue_s.observe(seconds)

    def refused(self, versions: int) -> None:
        """Record how many new versions of models and keys are refused now."""
        self._refused.set(versions)

    def waiting(self, texts: int, tokens: int) -> None:
        """Record how many texts and tokens wait now."""
        self._waiting["texts"].set(texts)
        self._waiting["tokens"].set(tokens)


def _of_all_workers(folder: Path) -> CollectorRegistry:
    """Return a registry of the metrics that the workers keep in a folder."""
    import prometheus_client
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = prometheus_client.CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]
    return registry


def serve_metrics(folder: Path, port: int) -> None:
    """Serve the metrics of all workers on a port of its own, in a thread, on all interfaces.

    Raises:
        UserError: the port cannot be had.
    """
    import prometheus_client

    try:
        prometheus_client.start_http_server(port, registry=_of_all_workers(folder))
    except OSError as error:
        raise UserError(
            f"AD2KIT_METRICS_PORT={port}: the metrics cannot be served there: {error}",
            hint="give a free port, another one than that of the service",
        ) from error


def log_as_json() -> None:
    """Give the handlers that BentoML has set up for this process a formatter of JSON lines."""
    formatter = JsonFormatter(
        "{asctime}{levelname}{name}{process}{message}",
        style="{",
        datefmt="%Y-%m-%dT%H:%M:%S%z",
        rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        reserved_attrs=[*RESERVED_ATTRS, *_BENTOML_ATTRIBUTES],
    )
    for name in (None, "bentoml", "uvicorn.error"):
        for handler in logging.getLogger(name).handlers:
            handler.setFormatter(formatter)
            handler.addFilter(_add_request)
    logging.getLogger("ad2kit").setLevel(logging.INFO)


def _add_request(record: logging.LogRecord) -> bool:
    """Add the id of the request to a log line; BentoML's filter has set the number of a span."""
    vars(record).pop("request_id", None)
    vars(record).update(REQUEST.get({}))
    return True


def tracing() -> dict[str, Any]:
    """Return BentoML's tracing settings, from the environment variables of OpenTelemetry.

    Without an endpoint in these variables, all URLs are excluded from tracing: spans cost a fifth
    of the event loop's time even where nobody collects them.

    Raises:
        InvalidArgument: the share of traced requests is not a number in [0, 1].
    """
    base = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").rstrip("/")
    default = f"{base}/v1/traces" if base else ""
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", default)
    if not endpoint:
        return {"excluded_urls": [".*"]}
    share = os.environ.get("OTEL_TRACES_SAMPLER_ARG", "1")
    try:
        rate = float(share)
    except ValueError:
        rate = -1.0
    if not 0 <= rate <= 1:
        raise InvalidArgument(
            f"OTEL_TRACES_SAMPLER_ARG is the share of requests that is traced, expected a number "
            f"from 0 to 1, found {share!r}"
        )
    collector = {"protocol": "http", "endpoint": endpoint}
    return {"exporter_type": "otlp", "sample_rate": rate, "otlp": collector}


def check_shadow(student: OnnxArtifact, teacher: OnnxArtifact, folder: Path) -> None:
    """Refuse a shadow teacher, in ``folder``, that answers something else than its student.

    Raises:
        ModelError: the two differ in their task, labels or text columns.
    """
    student_task, teacher_task = (
        (artifact.task, artifact.labels, artifact.text_columns) for artifact in (student, teacher)
    )
    if student_task != teacher_task:
        raise ModelError(
            f"the shadow in {folder} answers {teacher_task} (task, labels, texts), and the student "
            f"{student_task}",
            hint="give the artefact of the student's own teacher",
        )


class Shadow:
    """Compares some of a student's answers with its teacher's.

    Args:
        teacher: the teacher's artefact, for the same labels.
        student: the classifier whose answers are compared.
        share: share of the texts to compare, in (0, 1].
        observe: called with whether the two agree about a text; with None for a text that was left
            out because the teacher was busy or failed on it.

    Raises:
        ModelError: the two differ in their task, labels or text columns.
    """

    def __init__(
        self,
        teacher: OnnxClassifier,
        student: OnnxClassifier,
        share: float,
        observe: Callable[[bool | None], None],
    ) -> None:
        check_shadow(student.artifact, teacher.artifact, teacher.folder)
        self._teacher = teacher
        self._share = share
        self._observe = observe
        self._random = random.Random()  # noqa: S311  (which texts are compared is no secret)
        self._waiting: queue.Queue[tuple[Any, Prediction] | None] = queue.Queue(_QUEUE_TEXTS)
        self._thread = threading.Thread(target=self._work, name="ad2kit-shadow", daemon=True)
        self._thread.start()

    def offer(self, texts: Sequence[Any], predictions: Sequence[Prediction]) -> None:
        """Queue a random share of some texts, if there is room; never waits."""
        for pair in zip(texts, predictions, strict=True):
            if self._random.random() < self._share:
                try:
                    self._waiting.put_nowait(pair)
                except queue.Full:
                    self._observe(None)

    def close(self) -> None:
        """Leave out the texts that wait, and stop after the text that is being scored."""
        while not self._waiting.empty():
            self._waiting.get_nowait()
            self._observe(None)
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        """Compare text after text until None comes; runs in the shadow's own thread."""
        if sys.platform == "linux":  # where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while (pair := self._waiting.get()) is not None:
            text, prediction = pair
            try:
                (expected,) = self._teacher.predict([text])
            except Exception:
                # The text itself is not logged: texts of clients stay out of the log.
                logger.exception("the shadow teacher failed on a text")
                self._observe(None)
            else:
                self._observe(_agree(prediction, expected))


def _agree(prediction: Prediction, expected: Prediction) -> bool:
    """Tell whether the student's prediction has the teacher's labels, or nearly its number."""
    if prediction.value is not None and expected.value is not None:
        return abs(prediction.value - expected.value) <= _NUMBER_GAP * max(1, abs(expected.value))
    return (prediction.label, prediction.labels) == (expected.label, expected.labels)
