"""What a service tells its operators: metrics for Prometheus, log lines, traces, a shadow teacher.

A shadow teacher scores a share of the texts once more, in the background. What drifts away from
training shows there first, without a label: the student stops agreeing with
the model that it was proven against. The teacher has a thread of its own with the lowest priority
and a short queue; what does not fit is not compared, and no answer ever waits for it.
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

from ad2kit.run.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ad2kit.exporting.classifier import OnnxClassifier, Prediction
    from ad2kit.service.batcher import BatchFacts


# Room for two thousand labels; the files grow when there are more.
RESERVED_BYTES = 2**18
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


def metrics_folder() -> Path:
    """Make the folder where the workers of this server, and no others, leave their numbers.

    BentoML has one for all servers of a user, and each that starts empties it for all. It is
    chosen once for all workers: Python chooses another temporary folder when the first is full.

    Raises:
        ModelError: it would lie where somebody else can write, or there is no room.
    """
    server = psutil.Process()
    # By number: a user may have no name in a container.
    ours = Path(tempfile.gettempdir()) / f"ad2kit-metrics-of-{os.getuid()}"
    folder = ours / f"{server.pid}-{server.create_time():.0f}"
    try:
        ours.mkdir(mode=0o700, exist_ok=True)
        if ours.is_symlink() or ours.stat().st_uid != os.getuid():
            raise ModelError(
                f"{ours}, where the workers would share their metrics, is not this user's own "
                "folder",
                hint="remove it, or set TMPDIR to a folder that is",
            )
        for left in ours.glob("*-*"):
            pid = left.name.partition("-")[0]
            if pid.isdigit() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(left, ignore_errors=True)  # another server may be sweeping too
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise _no_room(ours, error) from error
    return folder


def _no_room(folder: Path, error: OSError) -> ModelError:
    return ModelError(
        f"the workers cannot leave their metrics in {folder}: {error}",
        hint="make room there, or set TMPDIR to a folder with room",
    )


def _reserve(folder: Path, worker: int) -> None:
    """Make the files of a worker with all their blocks; those of one that died go on.

    The files are mapped into memory, and to write where the disk has no room for a page would
    kill the process.

    Raises:
        ModelError: there is no room.
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
    """The metrics of one worker; :meth:`exposition` adds those of all up.

    Args:
        folder: where all workers leave their numbers.
        worker: its number among them. The one that takes the place of one that died counts on.

    Raises:
        ModelError: there is no room.
    """

    def __init__(self, folder: Path, worker: int) -> None:
        self.folder = folder
        _reserve(folder, worker)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
        import prometheus_client as prometheus
        from prometheus_client import values

        values.ValueClass = values.MultiProcessValue(lambda: worker)  # type: ignore[no-untyped-call]

        def histogram(name: str, what: str, buckets: Sequence[float]) -> Any:
            return prometheus.Histogram(f"ad2kit_{name}", what, buckets=buckets)

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
        self._labels = prometheus.Counter("ad2kit_predictions", "Answers by label", ["label"])
        # To find the counter of a label costs more than to count.
        self._of_label = functools.cache(self._labels.labels)
        self._truncated = prometheus.Counter("ad2kit_truncated_texts", "Texts that were cut")
        self._rejected = prometheus.Counter(
            "ad2kit_rejected", "Requests that were not answered, by reason", ["reason"]
        )
        self._shadowed = prometheus.Counter(
            "ad2kit_shadow_texts",
            "Texts that the shadow teacher was offered: agreed, disagreed, left_out",
            ["result"],
        )
        self._waiting = {
            unit: prometheus.Gauge(
                f"ad2kit_queue_{unit}", f"Waiting {unit}", multiprocess_mode="livesum"
            )
            for unit in ("texts", "tokens")
        }
        self.waiting(0, 0)  # what one that died had waiting went with it

    def exposition(self) -> bytes:
        """Return the metrics of all workers in Prometheus' text format."""
        import prometheus_client
        from prometheus_client.multiprocess import MultiProcessCollector

        registry = prometheus_client.CollectorRegistry()
        MultiProcessCollector(registry, path=str(self.folder))  # type: ignore[no-untyped-call]
        return prometheus_client.generate_latest(registry)

    def answered(self, seconds: float) -> None:
        """Count a request that was answered."""
        self._ok.inc()
        self._request_s.observe(seconds)

    def rejected(self, status: int, reason: str) -> None:
        """Count a request that was not."""
        self._requests.labels(str(status)).inc()
        self._rejected.labels(reason).inc()

    def tokenised(self, seconds: float) -> None:
        """Record how long the tokenizer took for a request."""
        self._tokenise_s.observe(seconds)

    def predicted(self, predictions: Sequence[Prediction]) -> None:
        """Record what was answered: the distribution of labels and scores is what drifts."""
        for each in predictions:
            for label in each.labels or ((each.label,) if each.label is not None else ()):
                self._of_label(label).inc()
            if each.score is not None:
                self._score.observe(each.score)
            if each.truncated:
                self._truncated.inc()

    def shadowed(self, agreed: bool | None) -> None:
        """Count a text that the shadow teacher was offered; None if it had no time for it."""
        result = "left_out" if agreed is None else "agreed" if agreed else "disagreed"
        self._shadowed.labels(result).inc()

    def batch(self, facts: BatchFacts) -> None:
        """Record a batch; in the engine's thread."""
        self._texts.observe(facts.texts)
        self._tokens.observe(facts.tokens)
        self._inference_s.observe(facts.inference_s)
        for seconds in facts.queue_s:
            self._queue_s.observe(seconds)

    def waiting(self, texts: int, tokens: int) -> None:
        """Record what waits now."""
        self._waiting["texts"].set(texts)
        self._waiting["tokens"].set(tokens)


# What BentoML's filter adds to format its own lines with.
_THEIRS = ("component", "levelname_bracketed", "trace_msg", "service_name")


def log_as_json() -> None:
    """Give the handlers that BentoML has set up for this process a formatter of JSON lines."""
    formatter = JsonFormatter(
        "{asctime}{levelname}{name}{process}{message}",
        style="{",
        datefmt="%Y-%m-%dT%H:%M:%S%z",
        rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        reserved_attrs=[*RESERVED_ATTRS, *_THEIRS],
    )
    for name in (None, "bentoml", "uvicorn.error"):
        for handler in logging.getLogger(name).handlers:
            handler.setFormatter(formatter)
    logging.getLogger("ad2kit").setLevel(logging.INFO)


def tracing() -> dict[str, Any]:
    """Return BentoML's tracing: to the collector that OpenTelemetry's own variables name, or none.

    Spans cost a fifth of the event loop's time even where nobody collects them.

    Raises:
        InvalidArgument: a share of requests that is no number in [0, 1].
    """
    base = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").rstrip("/")
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", base and f"{base}/v1/traces")
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


logger = logging.getLogger(__name__)

_QUEUE_TEXTS = 64
# Numbers agree that differ by at most this, or by this share of one that is larger than 1.
_NUMBER_GAP = 0.1


class Shadow:
    """Compares some of a student's answers with its teacher's.

    Args:
        teacher: the teacher's artefact, for the same labels.
        student: whose answers are compared.
        share: of the texts, in (0, 1].
        observe: is told whether the two agree about a text; None for one that was left out because
            the teacher was busy, or failed on it.

    Raises:
        ModelError: the two do not answer the same question.
    """

    def __init__(
        self,
        teacher: OnnxClassifier,
        student: OnnxClassifier,
        share: float,
        observe: Callable[[bool | None], None],
    ) -> None:
        ours, theirs = (
            (each.artifact.task, each.labels, each.artifact.text_columns)
            for each in (student, teacher)
        )
        if ours != theirs:
            raise ModelError(
                f"the shadow in {teacher.folder} answers {theirs} (task, labels, texts), and the "
                f"student {ours}",
                hint="give the artefact of the student's own teacher",
            )
        self._teacher, self._share, self._observe = teacher, share, observe
        self._random = random.Random()  # noqa: S311  (which texts are compared is no secret)
        self._waiting: queue.Queue[tuple[Any, Prediction] | None] = queue.Queue(_QUEUE_TEXTS)
        self._thread = threading.Thread(target=self._work, name="ad2kit-shadow", daemon=True)
        self._thread.start()

    def offer(self, texts: Sequence[Any], predictions: Sequence[Prediction]) -> None:
        """Take a share of some texts, if there is room; never waits."""
        for pair in zip(texts, predictions, strict=True):
            if self._random.random() < self._share:
                try:
                    self._waiting.put_nowait(pair)
                except queue.Full:
                    self._observe(None)

    def close(self) -> None:
        """Leave out what waits, and stop after the text that is being scored."""
        while not self._waiting.empty():
            self._waiting.get_nowait()
            self._observe(None)
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while (pair := self._waiting.get()) is not None:
            text, said = pair
            try:
                (expected,) = self._teacher.predict([text])
            except Exception:
                # Not what it was about: texts of clients stay out of the log.
                logger.exception("the shadow teacher failed on a text")
                self._observe(None)
            else:
                self._observe(_agree(said, expected))


def _agree(said: Prediction, expected: Prediction) -> bool:
    if said.value is not None and expected.value is not None:
        return abs(said.value - expected.value) <= _NUMBER_GAP * max(1, abs(expected.value))
    return (said.label, said.labels) == (expected.label, expected.labels)
