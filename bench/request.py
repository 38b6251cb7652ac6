"""Where the time of a request goes: each part alone, in this process, and the whole in a worker.

    python -m bench.request BENTO-TAG --run runs/sst2-minilm-FINGERPRINT

Microseconds of a request with one validation text. The parts are the code that the service calls,
each in a loop of its own; what is left of a worker's CPU time is the HTTP server, the event loop,
the changes of thread between it and the engine, and the kernel. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
from pydantic_core import to_json

# As in the service.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.run.folder import RunDir
from ad2kit.run.machine import available_cpus, environment
from ad2kit.service.http import parse
from ad2kit.service.monitoring import ServiceMetrics, metrics_folder
from bench.load import closed_loop
from bench.serve import BARE, OURS, drive, requests, serving, sure_texts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ROUNDS, CONNECTIONS = 5, 64


def us_each(calls: Callable[[], Iterable[object]]) -> float:
    """Return the microseconds of one of many calls, in the best of some rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        start, count = time.perf_counter(), 0
        for _ in calls():
            count += 1
        best = min(best, (time.perf_counter() - start) / count)
    return 1e6 * best


def parts(classifier: OnnxClassifier, texts: list[str]) -> dict[str, float]:
    """Return the microseconds of each part of a request."""
    bodies = [json.dumps({"texts": [text]}).encode() for text in texts]
    encoded = [classifier.encode([text]) for text in texts]
    flat = [encoding for (encoding,) in encoded]
    by_length = sorted(flat, key=lambda encoding: len(encoding.ids))
    batches = [by_length[start : start + 16] for start in range(0, len(flat), 16)]
    logits = [classifier.run(encodings) for encodings in encoded]
    answers = [classifier.predictions(e, row) for e, row in zip(encoded, logits, strict=True)]
    plain = [[{"label": a.label, "score": a.score} for a in each] for each in answers]
    metrics = ServiceMetrics(metrics_folder(), os.getpid())

    def counted() -> Iterable[object]:
        for each in answers:
            metrics.tokenised(0.001)
            metrics.predicted(each)
            metrics.answered(0.01)
            yield each

    return {
        "read and check the JSON": us_each(
            lambda: (parse(body, text_columns=1, max_texts=1) for body in bodies)
        ),
        "tokenise": us_each(lambda: (classifier.encode([text]) for text in texts)),
        "engine, in batches of 16 of a length": us_each(
            lambda: (row for batch in batches for row in classifier.run(batch))
        ),
        "engine, alone": us_each(lambda: (classifier.run(each) for each in encoded)),
        "predictions": us_each(
            lambda: (classifier.predictions(e, row) for e, row in zip(encoded, logits, strict=True))
        ),
        "count for Prometheus": us_each(counted),
        "write the JSON": us_each(lambda: (to_json({"predictions": each}) for each in plain)),
    }


def cpu_us(name: str, tag: str, folder: Path, texts: list[str], labels: list[str]) -> float:
    """Return the CPU microseconds of a request in the workers of a server under load."""
    with serving(name, tag, folder, available_cpus()) as (port, _):
        sent = requests(name, texts, labels)
        drive(closed_loop(port, sent, CONNECTIONS, 2.0))
        workers = psutil.Process().children(recursive=True)
        before = [worker.cpu_times() for worker in workers]
        load = drive(closed_loop(port, sent, CONNECTIONS, 5.0))
        after = [worker.cpu_times() for worker in workers]
        spent = np.sum(
            [(a.user + a.system) - (b.user + b.system) for a, b in zip(after, before, strict=True)]
        )
    return float(1e6 * spent / len(load.ms))


def main() -> None:
    """Print both tables, and a last line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tag")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--variant", default="int8")
    options = parser.parse_args()
    folder = RunDir(options.run).onnx(options.variant)
    texts, labels = sure_texts(RunDir(options.run), folder)
    found = parts(OnnxClassifier(folder, threads=1), texts)
    whole = {name: cpu_us(name, options.tag, folder, texts, labels) for name in (OURS, BARE)}
    for name, us in found.items():
        print(f"{name:<40}{us:>8.1f} us")
    for name, us in whole.items():
        print(f"{'a request in the workers of ' + name:<40}{us:>8.1f} us of CPU")
    print(json.dumps({"parts_us": found, "cpu_us": whole, "environment": environment(1)}))


if __name__ == "__main__":
    main()
