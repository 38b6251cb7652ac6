"""What serving costs: ad2kit's Bento, plain uvicorn, and peers, with one artefact and one load.

    pip install litserve mosec fastapi
    python -m bench.serve BENTO-TAG --run runs/sst2-minilm-FINGERPRINT

The texts are the validation texts of the run, with their lengths; `--long` puts 2 % of 300 words
among them. The in-process limit is the best of a printed grid of processes, threads, batch size and
sorting, tokenisation included. Each server has one worker for each core (stock BentoML the one that
it starts by itself), one thread for each worker, and shares the cores with the load generator. An
answer counts if its label is the artefact's for that text; texts that it is not sure of are left
out, because int8 quantises a batch together, and then the label of a close call depends on its
company. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import psutil
import uvloop

from ad2kit.data import splits
from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.run.folder import RunDir
from ad2kit.run.machine import available_cpus, environment
from bench.load import Load, Request, closed_loop, open_loop, post

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence

T = TypeVar("T")
OURS, BARE, STOCK, FITTED = "ad2kit", "uvicorn", "stock BentoML", "BentoML, fitted"
PEERS = (BARE, FITTED, STOCK, "FastAPI + pipeline", "LitServe", "mosec")
LISTS = (OURS, BARE, FITTED, STOCK)  # they take a list of texts
CONNECTIONS = (1, 8, 32, 128)
SHARES = (0.5, 0.8, 1.2)
SURE = 0.8


def measure_process(
    folder: Path, texts: list[str], threads: int, batch: int, sort: bool, seconds: float, queue: Any
) -> None:
    """Count the texts that one process classifies in some seconds."""
    classifier, done, start = OnnxClassifier(folder, threads=threads), 0, 0.0
    chunk = 8 * batch if sort else batch
    for place in range(0, 10**9, chunk):
        if place == 2 * chunk:
            start, done = time.perf_counter(), 0  # the first two warm up
        if place > 2 * chunk and time.perf_counter() > start + seconds:
            break
        rows = [texts[(place + row) % len(texts)] for row in range(chunk)]
        classifier.predict(rows, batch_size=batch)
        done += chunk
    queue.put(done / (time.perf_counter() - start))


def in_process_limit(folder: Path, texts: list[str], seconds: float) -> dict[str, float]:
    """Return texts per second of every way to use the cores without a server."""
    cores, context, found = available_cpus(), multiprocessing.get_context("spawn"), {}
    shapes = {(1, cores), (cores, 1)}
    for processes, threads in sorted(shapes):
        for batch in (8, 32):
            for sort in (False, True):
                queue = context.Queue()
                running = [
                    context.Process(
                        target=measure_process,
                        args=(folder, texts, threads, batch, sort, seconds, queue),
                    )
                    for _ in range(processes)
                ]
                for process in running:
                    process.start()
                total = sum(queue.get(timeout=120) for _ in running)
                for process in running:
                    process.join()
                name = (
                    f"{processes} processes x {threads} threads, batch {batch}"
                    f"{', sorted' if sort else ''}"
                )
                found[name] = total
                print(f"in process, {name}: {total:.0f} texts/s", flush=True)
    return found


class Ended(RuntimeError):
    """A server ended before it was ready."""


def free_port() -> int:
    """Return a port of this machine that nobody holds now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(
    command: Sequence[str],
    env: Mapping[str, str],
    log: Path,
    is_ready: Callable[[], bool],
    *,
    cwd: Path | None = None,
    patience_s: float = 120.0,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, in a session of its own; in the end neither it nor its children are left.

    Raises:
        Ended: before it was ready; with the end of its log.
        RuntimeError: it was not ready in time.
    """
    start, family = time.monotonic(), list[psutil.Process]()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdout=file, stderr=file, start_new_session=True
        )
        try:
            while not is_ready():
                if process.poll() is not None:
                    raise Ended(f"exit code {process.returncode}: {_end_of(log)}")
                if time.monotonic() > start + patience_s:
                    raise RuntimeError(f"not ready after {patience_s:g} s: {_end_of(log)}")
                time.sleep(0.02)
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                family += psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            for left in (process, *family):
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()
            process.wait()


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


@contextlib.contextmanager
def serving(name: str, tag: str, folder: Path, workers: int) -> Iterator[tuple[int, float]]:
    """Start a server; yield its port and the seconds that it took to answer."""
    port, start = free_port(), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        env = {
            **os.environ,
            "AD2KIT_BENCH_MODEL": str(folder.resolve()),
            "OMP_NUM_THREADS": "1",
            "AD2KIT_BENCH_WORKERS": str(workers),
            "AD2KIT_BENCH_SCRATCH": scratch,
        }
        command = [sys.executable, str(Path(__file__).parent / "servers.py"), name, "--port"]
        if name == OURS:
            command = [sys.executable, "-m", "bentoml", "serve", tag, "--port"]
        log = Path(scratch) / "log"
        with started([*command, str(port)], env, log, lambda: listening(port, name)):
            yield port, time.monotonic() - start


def listening(port: int, name: str) -> bool:
    """Whether a server classifies a text."""
    body = b'{"texts": ["fine"]}' if name in LISTS else b'{"text": "fine"}'
    with contextlib.suppress(OSError):
        return bool(drive(closed_loop(port, [post("/classify", body, bool)], 1, 0.001)).ms)
    return False


def sure_texts(run: RunDir, folder: Path, *, long: bool = False) -> tuple[list[str], list[str]]:
    """Return the validation texts that the artefact is sure of, and what it says of them."""
    rows = splits.load_data(run.recipe.data, run.recipe.seed).validation.texts
    texts = [row[0] for row in rows]
    if long:
        texts = ["word " * 299 + text if row % 50 == 0 else text for row, text in enumerate(texts)]
    found = OnnxClassifier(folder, threads=1).predict(texts, batch_size=1)
    sure = [
        (text, str(answer.label))
        for text, answer in zip(texts, found, strict=True)
        if (answer.score or 0) > SURE
    ]
    print(f"{len(sure)} of {len(texts)} texts, those with a score above {SURE}")
    return [text for text, _ in sure], [label for _, label in sure]


def requests(name: str, texts: Sequence[str], labels: Sequence[str]) -> list[Request]:
    """Return one request for each text; right is the label that the artefact gives it alone."""
    found = []
    for text, label in zip(texts, labels, strict=True):
        body = {"texts": [text]} if name in LISTS else {"text": text}

        def is_right(answer: bytes, label: str = label) -> bool:
            content = json.loads(answer)
            content = content.get("predictions", content) if isinstance(content, dict) else content
            content = content[0] if isinstance(content, list) else content
            return bool(content["label"] == label)

        found.append(post("/classify", json.dumps(body).encode(), is_right))
    return found


def drive(load: Coroutine[Any, Any, T]) -> T:
    """Run one load on uvloop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(load)


def holders(port: int) -> list[psutil.Process]:
    """Return the processes that listen on a port, but not this one."""
    owners = {c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port}
    return [psutil.Process(pid) for pid in owners - {None, os.getpid()}]


def memory_mb(port: int) -> float:
    """Return the largest resident memory of a process that serves a port."""
    found = [process.memory_info().rss / 1e6 for process in holders(port)]
    return max(found, default=float("nan"))


def main() -> None:
    """Print tables of capacity and latency, and a last line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tag")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--variant", default="int8")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each load")
    parser.add_argument("--long", action="store_true", help="2 %% of texts with 300 words")
    parser.add_argument("--only", nargs="*", default=[OURS, *PEERS])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--results", type=Path, help="write serve.json and serve.svg there")
    options = parser.parse_args()
    run = RunDir(options.run)
    folder, workers = run.onnx(options.variant), available_cpus()
    texts, labels = sure_texts(run, folder, long=options.long)
    engine = OnnxClassifier(folder, threads=1)  # as the workers of the servers have it
    ms = []
    for text in texts[:300]:
        start = time.perf_counter()
        engine.predict([text])
        ms.append(1e3 * (time.perf_counter() - start))
    alone_ms = float(np.median(ms))
    del engine
    limit = in_process_limit(folder, texts, options.seconds)
    best = max(limit.values())
    print(f"in process: at most {best:.0f} texts/s; one text alone p50 {alone_ms:.2f} ms")
    result: dict[str, dict[str, Any]] = {}
    for _ in range(options.rounds):
        for name in options.only:
            try:
                with serving(name, options.tag, folder, workers) as (port, start_s):
                    found = result.setdefault(name, {"closed": {}, "open": {}})
                    sent = requests(name, texts, labels)
                    drive(closed_loop(port, sent, 32, 2.0))
                    for connections in CONNECTIONS:
                        load = drive(closed_loop(port, sent, connections, options.seconds))
                        report(name, f"{connections} connections", load)
                        found["closed"].setdefault(connections, []).append(told(load))
                    capacity = max(
                        cell["per_s"] for cells in found["closed"].values() for cell in cells
                    )
                    for share in SHARES:
                        load = drive(open_loop(port, sent, share * capacity, options.seconds))
                        report(name, f"{share:.0%} of capacity", load)
                        found["open"].setdefault(share, []).append(told(load))
                    found["start_s"], found["memory_mb"] = start_s, memory_mb(port)
            except (RuntimeError, OSError) as error:
                print(f"{name} failed: {error}")
                result.pop(name, None)
    capacity_of = {
        name: max(
            float(np.median([cell["per_s"] for cell in cells]))
            for cells in found["closed"].values()
        )
        for name, found in result.items()
    }
    print(
        f"\n{'server':<20}{'capacity/s':>11}{'of limit':>10}{'p50 ms':>8}{'p99 ms':>8}"
        f"{'start s':>9}{'MB':>6}"
    )
    for name, capacity in sorted(capacity_of.items(), key=lambda item: -item[1]):
        one = result[name]["closed"][1][0]
        print(
            f"{name:<20}{capacity:>11.0f}{capacity / best:>10.2f}{one['p50_ms']:>8.2f}"
            f"{one['p99_ms']:>8.2f}{result[name]['start_s']:>9.1f}"
            f"{result[name]['memory_mb']:>6.0f}"
        )
    ours = capacity_of.get(OURS, math.nan)
    facts = {
        "capacity_over_in_process": ours / best,
        "capacity_over_uvicorn": ours / capacity_of.get(BARE, math.nan),
        "capacity_over_stock_bentoml": ours / capacity_of.get(STOCK, math.nan),
        "capacity_over_fitted_bentoml": ours / capacity_of.get(FITTED, math.nan),
        "p50_minus_in_process_ms": result.get(OURS, {})
        .get("closed", {})
        .get(1, [{}])[0]
        .get("p50_ms", math.nan)
        - alone_ms,
        "in_process": limit,
        "in_process_p50_ms": alone_ms,
        "servers": result,
        "environment": environment(1, processes=workers),
    }
    if options.results is not None:
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "serve.json").write_text(json.dumps(facts, indent=1) + "\n")
        plot(result, best, options.results / "serve.svg")
    print(json.dumps(facts))


def plot(result: dict[str, dict[str, Any]], limit: float, target: Path) -> None:
    """Draw answers per second by connections, and latency by load."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, found in result.items():
        width = 2.5 if name == OURS else 1.2
        per_s = [np.median([c["per_s"] for c in found["closed"][n]]) for n in CONNECTIONS]
        left.plot(CONNECTIONS, per_s, marker="o", linewidth=width, label=name)
        p99 = [np.median([c["p99_ms"] for c in found["open"][share]]) for share in SHARES]
        right.plot([100 * s for s in SHARES], p99, marker="o", linewidth=width, label=name)
    left.axhline(limit, linestyle=":", color="grey", label="in process")
    left.set(
        xscale="log",
        xticks=CONNECTIONS,
        xticklabels=CONNECTIONS,
        ylim=(0, None),
        xlabel="connections, each asking again when it is answered",
        ylabel="right answers per second",
    )
    right.set(yscale="log", xlabel="load, % of the server's own capacity", ylabel="p99, ms")
    left.legend()
    figure.savefig(target)


def told(load: Load) -> dict[str, Any]:
    """Return a load as plain numbers."""
    return {
        "per_s": load.per_s,
        "p50_ms": load.quantile(0.5),
        "p99_ms": load.quantile(0.99),
        "errors": dict(load.errors),
    }


def report(name: str, what: str, load: Load) -> None:
    """Print a load on one line."""
    errors = ", ".join(f"{count} {error}" for error, count in load.errors.items())
    print(
        f"{name:<20}{what:<20}{load.per_s:>8.0f}/s  p50 {load.quantile(0.5):8.2f}  "
        f"p99 {load.quantile(0.99):8.2f} ms  {errors}",
        flush=True,
    )


if __name__ == "__main__":
    main()
