"""The score command: run a classifier over a table of any size, part by part.

The input is cut into blocks of rows, and each block becomes one part of the output, which is
written whole or not at all. A job that was stopped in any way continues with the blocks without a
part. The output has the same bytes after any interruption, on one process, many, or a cluster.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ad2kit.exporting.classifier import read_artifact
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.gate.shipping import servable_artifact, table_settings
from ad2kit.run.errors import UserError
from ad2kit.run.files import sha256_of
from ad2kit.run.machine import available_cpus, versions
from ad2kit.scoring.output import OutputFolder
from ad2kit.scoring.parts import open_tables
from ad2kit.scoring.records import ScoreJob, ScoreReport
from ad2kit.scoring.workers import (
    ADDED,
    Work,
    score_here,
    score_in_processes,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from ad2kit.scoring.parts import Done, Numbered, Tables
    from ad2kit.tables.text_files import Quotes

Engine = Literal["process", "ray"]

# A block has enough rows to sort them by length, and few enough to hold their tokens several times.
BLOCK_ROWS, BATCH_SIZE = 4096, 32
# The version of the format of parts; see ScoreJob.
_FORM = 2
# The packages whose versions the bytes of a part depend on, beside the artefact.
_VERSIONED = ("ad2kit", "numpy", "onnxruntime", "onnxruntime-gpu", "pyarrow", "tokenizers")


@dataclass(frozen=True)
class Progress:
    """The progress of a job: all its rows, the done and the bad ones, and those scored here."""

    rows: int
    done: int
    bad: int
    scored_here: int
    seconds: float


def score(
    model: str | Path,
    input_url: str | Path,
    output_url: str | Path,
    *,
    text_columns: tuple[str, ...] | None = None,
    csv_quotes: Quotes | None = None,
    prefix: str = "",
    engine: Engine = "process",
    address: str | None = None,
    workers: int | None = None,
    block_rows: int = BLOCK_ROWS,
    batch_size: int = BATCH_SIZE,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> ScoreReport:
    """Add the answers of a model to every row of a table; return the report of the job.

        report = ad2kit.score(run.path, "reviews.csv", "scored", text_columns=("sentence",))

    Several workers are new processes that import the calling script. So the script needs the usual
    ``if __name__ == "__main__":`` around the call.

    Args:
        model: a run, whose variant to ship is used, or the folder of one variant.
        input_url: a file, folder or glob of tables in any format of :mod:`ad2kit.tables.formats`,
            at any fsspec address.
        output_url: a folder for parts, new or of the same job: of the same format, but not
            compressed; JSON lines for JSON, and Parquet for Arrow streams.
        text_columns: the columns that the model reads; if None, those that its run was trained on.
        csv_quotes: how CSV writes a quotation mark inside of a quoted cell: ``doubled``, or with a
            ``backslash`` before it, as Spark does; if None, as in the recipe of its run.
        prefix: the prefix of the names of the added columns.
        engine: processes of this machine, or Ray Data.
        address: the address of a Ray cluster; if None, Ray is started on this machine.
        workers: the number of workers, with one thread each; if None, the cores of this machine.
        block_rows: the rows of a part, among which texts of similar length share a batch.
        batch_size: the number of texts that are computed at once.
        on_progress: called at the start and after each block.

    Raises:
        ModelError, RunError: there is no model to use; or ``output_url`` holds something else.
        DataError: an input or a column is missing, would occur twice, or cannot be read.
        UserError: the engine cannot be used with these arguments.
    """
    folder = servable_artifact(model)
    artifact = read_artifact(folder)
    input_url = str(input_url)
    output_url = str(output_url)
    output = OutputFolder(output_url)
    text_columns, csv_quotes = table_settings(folder, artifact, text_columns, csv_quotes)
    added = tuple(f"{prefix}{name}" for name in ADDED[artifact.task])
    tables = open_tables(
        input_url, output, text_columns, csv_quotes, added, artifact.labels, block_rows
    )
    workers = _usable_workers(workers, engine, address, (input_url, output_url))
    job = ScoreJob(
        form=_FORM,
        artifact_sha256=sha256_of(folder / OnnxArtifact.file_name),
        versions=versions(_VERSIONED),
        text_columns=text_columns,
        csv_quotes=csv_quotes,
        prefix=prefix,
        block_rows=block_rows,
        batch_size=batch_size,
        inputs=tables.files,
    )
    work = Work(str(folder.resolve()), output.url, tables.layout, batch_size)
    with output.claimed(job):
        finished = output.names() & {tables.part(number) for number, _ in tables.blocks}
        remaining = [
            (number, block)
            for number, block in tables.blocks
            if tables.part(number) not in finished
        ]
        workers = min(workers, max(1, len(remaining)))
        rows_done = tables.rows - sum(block.rows for _, block in remaining)
        report = _report_before(tables, output, finished, engine, workers)
        results = _run(engine, work, remaining, workers, address)
        return _watched(results, report, rows_done, on_progress)


def _report_before(
    tables: Tables, output: OutputFolder, finished: set[str], engine: Engine, workers: int
) -> ScoreReport:
    """Return the report of a job before this call scores anything; ``finished`` names its parts."""
    return ScoreReport(
        output=output.url,
        rows=tables.rows,
        bad_rows=output.count_bad(finished),
        parts=len(tables.blocks),
        engine=engine,
        workers=workers,
        scored_here=0,
        seconds=0.0,
        answered_here=0,
        classifier_seconds=0.0,
    )


def _watched(
    results: Iterable[Done],
    initial_report: ScoreReport,
    rows_done: int,
    on_progress: Callable[[Progress], None],
) -> ScoreReport:
    """Add up the results of the blocks, report the progress, and return the final report.

    Args:
        results: the result of each block, as soon as it is done.
        initial_report: the report without these results.
        rows_done: the number of rows that were scored earlier.
        on_progress: called at the start and after each block.
    """
    start = time.monotonic()
    rows, bad_rows = initial_report.rows, initial_report.bad_rows
    scored = answered = 0
    classifier_seconds = 0.0
    on_progress(Progress(rows, rows_done, bad_rows, 0, 0.0))
    for result in results:
        scored += result.rows
        bad_rows += result.bad
        answered += result.rows - result.bad
        classifier_seconds += result.seconds
        seconds = time.monotonic() - start
        on_progress(Progress(rows, rows_done + scored, bad_rows, scored, seconds))
    return initial_report.model_copy(
        update={
            "bad_rows": bad_rows,
            "scored_here": scored,
            "answered_here": answered,
            "classifier_seconds": classifier_seconds,
            "seconds": time.monotonic() - start,
        }
    )


def _run(
    engine: Engine, work: Work, blocks: list[Numbered], workers: int, address: str | None
) -> Iterator[Done]:
    """Score blocks by the engine; without blocks, start nothing."""
    if not blocks:
        return iter(())
    if engine == "ray":
        from ad2kit.scoring.workers import score_on_ray

        return score_on_ray(work, blocks, workers, address)
    if workers > 1:
        return score_in_processes(work, blocks, workers)
    return score_here(work, blocks)


def _usable_workers(
    workers: int | None, engine: Engine, address: str | None, urls: tuple[str, str]
) -> int:
    """Return the number of workers; None means all cores, and memory:// allows one only."""
    if address is not None and engine != "ray":
        raise UserError(
            f"found --address {address} without the engine that it is for",
            hint="add --engine ray, or leave --address out",
        )
    if not any(url.startswith("memory://") for url in urls):
        return workers or available_cpus()
    if engine == "ray" or (workers or 1) > 1:
        raise UserError(
            "memory:// is seen by this process alone, and not by several workers",
            hint="leave --engine and --workers out, or give files",
        )
    return 1
