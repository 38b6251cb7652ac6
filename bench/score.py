"""What bulk scoring costs beside the classifier alone, and whether it survives being killed.

    python bench/score.py runs/sst2-minilm-FINGERPRINT --rows 1000000 --kill 2

The texts are those of the run's data, train and validation, again and again in a random order, or
the column that the run reads of a Parquet file (`--input`); they lie in one Parquet file. The limit
is what plain processes with one thread each reach, one for each worker, on the same blocks of rows
in memory: tokenised, sorted by length, in the same batches, nothing read and nothing written. It is
measured before, between and after the engines for `--seconds`, because machines change their speed,
and its median counts. An engine's seconds include the start of its workers. Memory is the largest
sum of the PSS of all processes (what they share is counted once), looked at every second.

With `--kill` a job is started, its first process is killed by SIGKILL, as often as told at moments
that `--seed` decides, by the engines in turns, and then let run to its end: every file must equal
that of the undisturbed job. Exit code 1 if one does not. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pyarrow as pa
from pyarrow import parquet

from ad2kit.data.splits import load_data
from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.gate.shipping import servable_artifact
from ad2kit.run.files import sha256_of
from ad2kit.run.folder import RunDir
from ad2kit.run.machine import available_cpus, environment
from ad2kit.scoring.records import ScoreReport
from ad2kit.scoring.score import BATCH_SIZE, BLOCK_ROWS
from ad2kit.scoring.workers import single_threaded

if TYPE_CHECKING:
    from collections.abc import Sequence

_WARM_UP_BLOCKS = 1


def make_table(run: RunDir, rows: int, seed: int, path: Path) -> None:
    """Write texts of the run's data to a Parquet file."""
    recipe = run.recipe
    data = load_data(recipe.data, recipe.seed)
    texts = data.train.texts + data.validation.texts
    order = np.random.default_rng(seed).integers(len(texts), size=rows)
    columns: dict[str, Any] = {"id": pa.array(range(rows))}
    for place, name in enumerate(recipe.data.text_columns):
        columns[name] = [texts[row][place] for row in order]
    parquet.write_table(pa.table(columns), path, row_group_size=100_000)


def plain_process(folder: Path, table: Path, names: Sequence[str], seconds: float, q: Any) -> None:
    """Put the texts per second that one process with one thread computes into a queue."""
    single_threaded()
    classifier = OnnxClassifier(folder, threads=1)
    some = parquet.ParquetFile(table).iter_batches(BLOCK_ROWS, columns=list(names))
    blocks = [
        list(zip(*(column.to_pylist() for column in batch), strict=True))
        for _, batch in zip(range(25), some, strict=False)
    ]
    done, turn, start = 0, 0, time.perf_counter()
    while turn <= _WARM_UP_BLOCKS or time.perf_counter() < start + seconds:
        if turn == _WARM_UP_BLOCKS:
            done, start = 0, time.perf_counter()
        block = blocks[turn % len(blocks)]
        classifier.run_sorted(classifier.encode(block), BATCH_SIZE)
        done, turn = done + len(block), turn + 1
    q.put(done / (time.perf_counter() - start))


def limit(folder: Path, table: Path, names: Sequence[str], workers: int, seconds: float) -> float:
    """Return the texts per second of plain processes together."""
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    arguments = (folder, table, names, seconds, queue)
    running = [context.Process(target=plain_process, args=arguments) for _ in range(workers)]
    for process in running:
        process.start()
    total = sum(queue.get(timeout=600) for _ in running)
    for process in running:
        process.join()
    return float(total)


def start(options: argparse.Namespace, folder: Path, table: Path, out: Path, engine: str) -> Any:
    """Start a job."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "ad2kit",
            "score",
            str(table),
            str(out),
            "--run",
            str(folder),
            "--prefix",
            "answer_",
            "--engine",
            engine,
            "--workers",
            str(options.workers),
            "--json",
        ],
        stdout=subprocess.PIPE,
        stderr=None if options.verbose else subprocess.DEVNULL,
    )


def memory_mb(process: psutil.Process) -> float:
    """Return the PSS of a process and all that it started."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total / 1e6


def straight(job: Any) -> tuple[ScoreReport, float]:
    """Let a job run to its end; return its report and its largest memory."""
    largest, process = 0.0, psutil.Process(job.pid)
    while job.poll() is None:
        largest = max(largest, memory_mb(process))
        time.sleep(1)
    if job.returncode:
        sys.exit(f"`ad2kit score` ended with exit code {job.returncode}; look with --verbose")
    return ScoreReport.parse(job.stdout.read(), "stdout"), largest


def kill(job: Any, out: Path, parts: int) -> bool:
    """Kill the first process of a job once there are some parts; tell whether it was running."""
    while job.poll() is None and len(list(out.glob("part-*"))) < parts:
        time.sleep(0.01)
    running = job.poll() is None
    children = psutil.Process(job.pid).children(recursive=True) if running else []
    job.kill()
    job.wait()
    psutil.wait_procs(children, timeout=60)
    print(f"  {'killed' if running else 'had ended'} at {parts} parts", flush=True)
    return running


def contents(out: Path) -> dict[str, str]:
    """Return the sha256 of each file of an output folder."""
    return {
        str(path.relative_to(out)): sha256_of(path)
        for path in out.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def main() -> None:
    """Print a table, and a last line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--variant", help="default: the one that the run ships")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--input", type=Path, help="a Parquet file instead")
    parser.add_argument("--engines", default="process,ray")
    parser.add_argument("--workers", type=int, default=available_cpus())
    parser.add_argument("--seconds", type=float, default=20.0, help="of each look at the limit")
    parser.add_argument("--kill", type=int, default=0, help="how often")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="show what the jobs say")
    options = parser.parse_args()
    run, engines = RunDir(options.run), options.engines.split(",")
    folder = run.onnx(options.variant) if options.variant else servable_artifact(options.run)
    names = run.recipe.data.text_columns
    found: dict[str, dict[str, float]] = {}
    identical = None
    with tempfile.TemporaryDirectory(prefix="ad2kit-score-") as temporary:
        table = options.input or Path(temporary) / "in.parquet"
        if options.input is None:
            make_table(run, options.rows, options.seed, table)

        def look() -> float:
            rate = limit(folder, table, names, options.workers, options.seconds)
            print(f"  {options.workers} plain processes: {rate:,.0f} texts/s", flush=True)
            return rate

        limits = [look()]
        for engine in engines:
            report, mb = straight(start(options, folder, table, Path(temporary) / engine, engine))
            found[engine] = {
                "rows_per_s": report.rows_per_s,
                "seconds": report.seconds,
                "peak_mb": mb,
                "rows": report.rows,
                "parts": report.parts,
            }
            print(f"  {engine}: {report.rows_per_s:,.0f} rows/s", flush=True)
            limits.append(look())
        if options.kill:
            generator = random.Random(options.seed)  # noqa: S311  (no secret)
            out, parts = Path(temporary) / "killed", int(found[engines[0]]["parts"])
            for turn in range(options.kill):
                share = (turn + generator.uniform(0.2, 0.8)) / (options.kill + 1)
                job = start(options, folder, table, out, engines[turn % len(engines)])
                kill(job, out, int(share * parts))
            straight(start(options, folder, table, out, engines[0]))
            expected = contents(Path(temporary) / engines[0])
            identical = all(
                contents(Path(temporary) / name) == expected for name in (*engines, "killed")
            )
    median = statistics.median(limits)
    print(f"\n{options.workers} workers with one thread each, {folder.name} of {options.run}\n")
    print(f"| engine | rows | s | rows/s | per core | of the limit | peak MB |\n{'|---' * 7}|")
    print(f"| plain processes (limit) | | | {median:,.0f} | {median / options.workers:,.0f} | | |")
    for engine, facts in found.items():
        rate = facts["rows_per_s"]
        facts["of_the_limit"] = rate / median
        print(
            f"| {engine} | {facts['rows']:,} | {facts['seconds']:,.0f} | {rate:,.0f} "
            f"| {rate / options.workers:,.0f} | {rate / median:.3f} "
            f"| {facts['peak_mb']:,.0f} |"
        )
    if identical is not None:
        print(f"killed {options.kill} times: {'identical' if identical else 'DIFFERENT'}")
    print(
        json.dumps(
            {
                "limit_texts_per_s": median,
                "limits": limits,
                "engines": found,
                "workers": options.workers,
                "killed": options.kill,
                "identical": identical,
                "variant": folder.name,
                "environment": environment(1),
                "load": os.getloadavg(),
            }
        )
    )
    sys.exit(1 if identical is False else 0)


if __name__ == "__main__":
    main()
