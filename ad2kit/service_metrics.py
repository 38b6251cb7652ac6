"""What the service counts, for Prometheus: load, waiting, batches, rejects, and drift."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ad2kit.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ad2kit.batcher import BatchFacts
    from ad2kit.classifier import Prediction

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
