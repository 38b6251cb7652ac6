"""One block of rows through a classifier and into its part, and the workers that do it.

A block knows nothing of how many workers there are: processes of this machine with one thread
each, or actors of Ray Data. A block has the same rows and batches whoever scores it, so that its
part has the same bytes. Ray hands out the blocks, starts the actors, and gives the blocks of one
that died to another. On a cluster every machine has ad2kit installed, and reads input, output and
artefact at one address.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ad2kit.data.labels import answers, scores
from ad2kit.data.texts import is_text
from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.run.errors import DataError, MissingExtra, UserError
from ad2kit.run.ray_cluster import ray_cluster
from ad2kit.scoring import text_blocks
from ad2kit.scoring.blocks import Block, suffix_of
from ad2kit.scoring.output import OutputFolder, part_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from ad2kit.exporting.tokenise import Tokens
    from ad2kit.run.sections import Task
    from ad2kit.scoring.blocks import Layout, Rows, Survey
    from ad2kit.scoring.records import InputFile

    Numbered = tuple[int, Block]


ADDED: dict[Task, tuple[str, ...]] = {
    "single_label": ("label", "score", "truncated"),
    "multi_label": ("labels", "truncated"),
    "regression": ("value", "truncated"),
}
"""The columns of the answers for each task; see :class:`ad2kit.exporting.classifier.Prediction`."""


class BlockReader(Protocol):
    """Reads blocks of one file, the faster the more they are in order."""

    def read(self, block: Block) -> Rows:
        """Read a block."""

    def close(self) -> None:
        """Close the file."""


class BlockFormat(Protocol):
    """What a module that reads and writes blocks of one family of formats has."""

    def survey(self, file: InputFile, block_rows: int) -> Survey:
        """Cut a file into blocks."""

    def Reader(self, url: str, layout: Layout) -> BlockReader:  # noqa: N802  (a class there)
        """Open a file for reading."""

    def write(
        self, rows: Rows, good: Sequence[int], layout: Layout, answers: Mapping[str, NDArray[Any]]
    ) -> bytes:
        """Return some rows of a block with their answers as the content of a file."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker has to know beside its blocks: plain values, to be sent anywhere."""

    artifact: str
    output: str
    layout: Layout
    batch_size: int


@dataclass(frozen=True, slots=True)
class Done:
    """What became of one block; ``seconds`` are those of the classifier alone."""

    rows: int
    bad: int
    seconds: float


def format_of(suffix: str) -> BlockFormat:
    """Return the module that reads and writes a format.

    Raises:
        MissingExtra: it needs pyarrow, which is not installed.
    """
    if suffix != "parquet":
        return text_blocks
    from ad2kit.scoring import parquet_blocks

    return parquet_blocks


def cannot_read(url: str, error: OSError) -> DataError:
    """Return what to say of a file that was found and cannot be read."""
    return DataError(
        f"cannot read {url}: {error}",
        hint="put it back, or correct its access rights, then run the same command again",
    )


class Scorer:
    """A loaded classifier that turns blocks into parts.

    Raises:
        ModelError: the artefact is damaged or absent where the worker runs.
    """

    def __init__(self, work: Work) -> None:
        self.work, self.output = work, OutputFolder(work.output)
        self.classifier = OnnxClassifier(work.artifact, threads=1)
        self._url = ""
        self._reader: BlockReader | None = None

    def __call__(self, index: int, block: Block) -> Done:
        """Score one block and write its part.

        Raises:
            DataError: the file is gone, or has changed since it was surveyed.
        """
        suffix, layout = suffix_of(block.url), self.work.layout
        tables = format_of(suffix)
        rows = self._read(tables, block)
        good = []
        for position, (texts, place) in enumerate(zip(rows.texts, rows.places, strict=True)):
            if wrong := _wrong(texts, layout.text_columns):
                rows.refuse(place, wrong)
            else:
                good.append(position)
        start = time.perf_counter()
        found = self.answers([rows.texts[position] for position in good])
        seconds = time.perf_counter() - start
        content = tables.write(rows, good, layout, found)
        bad = sorted(rows.bad, key=lambda row: row.row)
        self.output.write_part(part_name(index, suffix), content, bad)
        return Done(block.rows, len(bad), seconds)

    def close(self) -> None:
        """Close the file of the last block."""
        if self._reader is not None:
            self._reader.close()
        self._url, self._reader = "", None

    def _read(self, tables: BlockFormat, block: Block) -> Rows:
        """Read a block, and insist that it is the one of the survey."""
        try:
            if self._reader is None or block.url != self._url:
                self.close()
                self._url, self._reader = block.url, tables.Reader(block.url, self.work.layout)
            rows = self._reader.read(block)
        except OSError as error:
            raise cannot_read(block.url, error) from error
        if (found := len(rows.places) + len(rows.bad)) != block.rows:
            raise DataError(
                f"{block.url} has changed while it was scored: expected {block.rows} rows from row "
                f"{block.first_row} on, found {found}",
                hint="score it into a new folder once it is complete",
            )
        return rows

    def answers(self, texts: Sequence[Any]) -> dict[str, NDArray[Any]]:
        """Return the columns of the answers, by name, for texts that are texts."""
        classifier = self.classifier
        encodings = classifier.encode(texts)
        logits = classifier.run_sorted(encodings, self.work.batch_size)
        values = columns(classifier, encodings, logits)
        return dict(zip(self.work.layout.added, values, strict=True))


def columns(
    classifier: OnnxClassifier, encodings: Sequence[Tokens], logits: NDArray[np.float32]
) -> list[NDArray[Any]]:
    """Return the columns of :data:`ADDED` for logits of shape [rows, outputs].

    They hold what :meth:`OnnxClassifier.predictions` says: str, float and bool, and of several
    labels objects, which are lists.
    """
    task, names = classifier.artifact.task, np.array(classifier.labels)
    found = answers(task, logits)
    cut = np.array([each.truncated for each in encodings], dtype=bool)
    if task == "regression":
        return [found.astype(np.float64), cut]
    if task == "multi_label":
        named = np.empty(len(found), dtype=object)
        named[:] = [names[row.astype(bool)].tolist() for row in found]
        return [named, cut]
    probabilities = scores(task, logits / classifier.artifact.temperature)
    taken = np.take_along_axis(probabilities, found[:, None], axis=1)[:, 0]
    return [names[found], taken, cut]


def _wrong(texts: tuple[Any, ...], names: tuple[str, ...]) -> str:
    for name, text in zip(names, texts, strict=True):
        if not is_text(text):
            return f"'{name}': expected at least one visible character, found {text!r:.60}"
    return ""


_work: Work
_scorer: Scorer | None = None


def score_here(work: Work, blocks: list[Numbered]) -> Iterator[Done]:
    """Score blocks one after the other in this process."""
    with closing(Scorer(work)) as scorer:
        for block in blocks:
            yield scorer(*block)


def score_in_processes(work: Work, blocks: list[Numbered], workers: int) -> Iterator[Done]:
    """Score blocks in processes of this machine, in no order.

    Raises:
        UserError: a process was killed.
    """
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(work,)
    )
    try:
        for done in as_completed([pool.submit(_score, *block) for block in blocks]):
            yield done.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a scoring process ended before its time: it was killed, or the machine is out of "
            "memory",
            hint="run the same command again, if need be with fewer --workers: finished parts stay",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def single_threaded() -> None:
    """Keep this process to one thread; the tokenizer would take all cores otherwise."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _start(work: Work) -> None:
    global _work  # noqa: PLW0603  (what an initializer leaves for its process has no other place)
    single_threaded()
    # The parent alone hears Ctrl-C; and when it is gone, nobody waits for what is scored here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _work = work


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _score(index: int, block: Block) -> Done:
    global _scorer  # noqa: PLW0603
    if _scorer is None:  # and not in the initializer, whose errors do not reach the caller
        _scorer = Scorer(_work)
    return _scorer(index, block)


# One block under way and one that waits: no worker idles, and none hoards the last ones.
_BLOCKS_IN_FLIGHT = 2


class RayScorer:
    """A :class:`~ad2kit.scoring.workers.Scorer` that takes and gives rows of a Ray data set."""

    def __init__(self, work: Work) -> None:
        single_threaded()
        self.work = work
        # Not yet loaded: Ray would start an actor that fails here again and again.
        self.scorer: Scorer | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score the block that a row names."""
        self.scorer = self.scorer or Scorer(self.work)
        block = Block(**{field.name: row[field.name] for field in dataclasses.fields(Block)})
        return dataclasses.asdict(self.scorer(row["index"], block))


def score_on_ray(
    work: Work, blocks: list[Numbered], workers: int, address: str | None
) -> Iterator[Done]:
    """Score blocks by actors with one core each, in no order.

    Raises:
        UserError: there is no cluster at the address, or it has too few cores.
        MissingExtra: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtra("ray", extra="scale")
    with ray_cluster(address):
        # Only now: Ray reads its settings from the environment when it is imported.
        import ray
        from ray import data

        cores = int(ray.cluster_resources().get("CPU", 0))
        if workers > cores:
            raise UserError(
                f"expected a core for each of {workers} workers, found {cores} in the cluster",
                hint=f"give --workers {cores} or fewer, or a larger cluster",
            )
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.raise_original_map_exception = True
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised, and told once
        rows = [{"index": index, **dataclasses.asdict(block)} for index, block in blocks]
        pool = data.ActorPoolStrategy(
            size=min(workers, len(rows)), max_tasks_in_flight_per_actor=_BLOCKS_IN_FLIGHT
        )
        scored = data.from_items(rows, override_num_blocks=len(rows)).map(
            RayScorer, fn_constructor_args=(work,), compute=pool, num_cpus=1
        )
        try:
            for row in scored.iter_rows():
                yield Done(**row)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
