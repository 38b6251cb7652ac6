"""The score stage: a table of any size through a classifier, part by part, to its end.

The input is cut into blocks of rows, and each block becomes one part of the output, which is
written whole or not at all. A job that was stopped, however, goes on with the blocks that have no
part; what it ends with has the same bytes whatever was killed, on one process, many, or a cluster.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ad2kit.exporting.classifier import read_artifact
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.gate.shipping import servable_artifact
from ad2kit.run.errors import DataError, UserError
from ad2kit.run.files import sha256_of
from ad2kit.run.folder import RunDir
from ad2kit.run.machine import available_cpus, versions
from ad2kit.scoring.blocks import (
    filesystem,
    find_inputs,
    insist_on_partition_columns,
    layout_of,
    suffix_of,
)
from ad2kit.scoring.output import OutputFolder, part_name
from ad2kit.scoring.records import ScoreJob, ScoreReport
from ad2kit.scoring.workers import (
    ADDED,
    Work,
    cannot_read,
    format_of,
    score_here,
    score_in_processes,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from ad2kit.scoring.blocks import Survey
    from ad2kit.scoring.records import InputFile
    from ad2kit.scoring.workers import Done, Numbered

Engine = Literal["process", "ray"]

# Enough rows to sort by length, few enough to hold their tokens several times.
BLOCK_ROWS, BATCH_SIZE = 4096, 32
# How parts are written; see ScoreJob.
_FORM = 2
# What the bytes of a part depend on beside the artefact.
_VERSIONED = ("ad2kit", "numpy", "onnxruntime", "onnxruntime-gpu", "pyarrow", "tokenizers")


@dataclass(frozen=True)
class Progress:
    """How far a job is: its rows, those that have their part, and those of them scored here."""

    rows: int
    done: int
    bad: int
    scored_here: int
    seconds: float


def score(
    model: str | Path,
    input_url: str,
    output_url: str,
    *,
    text_columns: tuple[str, ...] | None = None,
    prefix: str = "",
    engine: Engine = "process",
    address: str | None = None,
    workers: int | None = None,
    block_rows: int = BLOCK_ROWS,
    batch_size: int = BATCH_SIZE,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> ScoreReport:
    """Add the answers of a model to every row of a table; return what was done.

    Several workers are started anew, so that a script that calls this needs the usual
    ``if __name__ == "__main__":`` around it.

    Args:
        model: a run, of which the variant to ship is taken, or the folder of one variant.
        input_url: a file, folder or glob of Parquet, CSV, TSV or JSON lines, at any fsspec address.
        output_url: a folder for parts of the same format, new or of the same job.
        text_columns: what the model reads; what its run was trained on if None.
        prefix: put before the names of the columns that are added.
        engine: processes of this machine, or Ray Data.
        address: of a Ray cluster; Ray is started on this machine if None.
        workers: with one thread each; the cores of this machine if None.
        block_rows: rows of a part, among which texts of similar length share a batch.
        batch_size: texts that are computed at once.
        on_progress: called at the start and after each block.

    Raises:
        ModelError, RunError: no model to use; or ``output_url`` holds something else.
        DataError: an input or a column is missing, would be there twice, or cannot be read.
        UserError: the engine cannot be used as asked.
    """
    folder = servable_artifact(model)
    artifact = read_artifact(folder)
    _insist_apart(input_url, output := OutputFolder(output_url))
    files = find_inputs(input_url)
    for file in files:
        _insist_apart(file.url, output)
    suffix, surveys = suffix_of(files[0].url), _survey(files, block_rows)
    insist_on_partition_columns(input_url, surveys)
    added = tuple(f"{prefix}{name}" for name in ADDED[artifact.task])
    _insist_on_writable(suffix, (*added, *artifact.labels))
    layout = layout_of(surveys, _columns_to_read(folder, artifact, text_columns), added)
    blocks = list(enumerate(block for each in surveys.values() for block in each.blocks))
    workers = _usable_workers(workers, engine, address, (input_url, output_url))
    job = ScoreJob(
        form=_FORM,
        artifact_sha256=sha256_of(folder / OnnxArtifact.file_name),
        versions=versions(_VERSIONED),
        text_columns=layout.text_columns,
        prefix=prefix,
        block_rows=block_rows,
        batch_size=batch_size,
        inputs=files,
    )
    work = Work(str(folder.resolve()), output.url, layout, batch_size)
    with output.claimed(job):
        finished = output.names() & {part_name(index, suffix) for index, _ in blocks}
        left = [each for each in blocks if part_name(each[0], suffix) not in finished]
        workers = min(workers, max(1, len(left)))
        rows = sum(block.rows for _, block in blocks)
        done, bad = rows - sum(block.rows for _, block in left), output.count_bad(finished)
        before = ScoreReport(
            output=output.url,
            rows=rows,
            bad_rows=bad,
            parts=len(blocks),
            engine=engine,
            workers=workers,
            scored_here=0,
            seconds=0.0,
            answered_here=0,
            classifier_seconds=0.0,
        )
        return _watched(_run(engine, work, left, workers, address), before, done, on_progress)


def _watched(
    blocks: Iterable[Done],
    before: ScoreReport,
    done: int,
    on_progress: Callable[[Progress], None],
) -> ScoreReport:
    """Add up what is said of each block, tell of it, and return the report of all.

    Args:
        blocks: comes as they are done.
        before: what is known without them.
        done: rows that were scored earlier.
        on_progress: called at the start and after each block.
    """
    rows, bad, start = before.rows, before.bad_rows, time.monotonic()
    scored, answered, classifier_seconds = 0, 0, 0.0
    on_progress(Progress(rows, done, bad, 0, 0.0))
    for each in blocks:
        scored, bad = scored + each.rows, bad + each.bad
        answered += each.rows - each.bad
        classifier_seconds += each.seconds
        on_progress(Progress(rows, done + scored, bad, scored, time.monotonic() - start))
    return before.model_copy(
        update={
            "bad_rows": bad,
            "scored_here": scored,
            "answered_here": answered,
            "classifier_seconds": classifier_seconds,
            "seconds": time.monotonic() - start,
        }
    )


def _survey(files: tuple[InputFile, ...], block_rows: int) -> dict[str, Survey]:
    tables, found = format_of(suffix_of(files[0].url)), {}
    for file in files:
        try:
            found[file.url] = tables.survey(file, block_rows)
        except OSError as error:
            raise cannot_read(file.url, error) from error
    return found


def _run(
    engine: Engine, work: Work, left: list[Numbered], workers: int, address: str | None
) -> Iterator[Done]:
    """Score the blocks that are left, if there are any."""
    if not left:
        return iter(())
    if engine == "ray":
        from ad2kit.scoring.workers import score_on_ray

        return score_on_ray(work, left, workers, address)
    return score_in_processes(work, left, workers) if workers > 1 else score_here(work, left)


def _columns_to_read(
    folder: Path, artifact: OnnxArtifact, given: tuple[str, ...] | None
) -> tuple[str, ...]:
    """Return the text columns that were named, or those that the run of a variant trained on."""
    run = RunDir(folder.resolve().parent.parent)
    if given is None and not run.recipe_file.is_file():
        raise DataError(
            f"{folder} is not part of a run, so that no recipe says which columns to read",
            hint="name them with --text-columns a or --text-columns a,b",
        )
    columns = run.recipe.data.text_columns if given is None else given
    if len(columns) != artifact.text_columns:
        raise DataError(
            f"this model reads {artifact.text_columns} text column(s), found {len(columns)}: "
            f"{', '.join(columns)}",
            hint="name one column, or two of a pair, with --text-columns a,b",
        )
    return columns


def _insist_apart(input_url: str, output: OutputFolder) -> None:
    """Refuse an output inside of an input folder, and a file inside of the output as input."""
    store, path = filesystem(input_url)
    inside = f"{output.path}/".startswith(f"{path.rstrip('/')}/") and store.isdir(path)
    if store.protocol == output.store.protocol and (inside or path.startswith(f"{output.path}/")):
        raise DataError(
            f"{output.url} and the input {input_url} lie in one another: parts would be read as "
            "input",
            hint="give an OUTPUT beside it",
        )


def _insist_on_writable(suffix: str, words: Iterable[str]) -> None:
    """Refuse names of labels or columns that TSV cannot hold."""
    for word in words:
        if suffix == "tsv" and any(each in word for each in "\t\r\n"):
            raise DataError(
                f"TSV has no quoting, and cannot hold {word!r}, which the answers need",
                hint="convert INPUT to CSV, JSON lines or Parquet",
            )


def _usable_workers(
    workers: int | None, engine: Engine, address: str | None, urls: tuple[str, str]
) -> int:
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
