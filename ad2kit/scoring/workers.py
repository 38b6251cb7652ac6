"""The scoring of one block of rows, and the workers that score blocks.

The workers are processes of this machine with one thread each, or actors of Ray Data. A block has
the same rows and batches for any number and kind of workers, so its part has the same bytes. Ray
assigns the blocks, starts the actors, and gives the blocks of a dead actor to another one. On a
cluster every machine needs ad2kit, and the addresses of input, output and artefact must be valid on
every machine.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.exporting.tokenise import stop_at_long_text
from ad2kit.run.errors import MissingExtra, UserError
from ad2kit.run.ray_cluster import ray_cluster
from ad2kit.scoring.blocks import Block
from ad2kit.scoring.parts import BlockWorker, Done
from ad2kit.statistics.logits import answers, scores

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from ad2kit.exporting.tokenise import Refuse, Tokens
    from ad2kit.run.sections import LongTexts, Task
    from ad2kit.scoring.blocks import Layout

    Numbered = tuple[int, Block]


ADDED: dict[Task, tuple[str, ...]] = {
    "single_label": ("label", "score", "truncated"),
    "multi_label": ("labels", "truncated"),
    "regression": ("value", "truncated"),
}
"""The columns of the answers for each task; see :class:`ad2kit.exporting.classifier.Prediction`."""


# A block of long texts may have many windows for each row.
_PIECE_CHARACTERS = 2**22
# One block in work and one that waits: no worker is idle, and the last blocks are shared evenly.
_BLOCKS_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class Work:
    """The settings of a worker beside its blocks: plain values that can be sent to any machine."""

    artifact: str
    output: str
    layout: Layout
    batch_size: int


class Scorer(BlockWorker):
    """A loaded classifier that turns blocks into parts.

    Raises:
        ModelError: the artefact is damaged or absent on the machine of the worker.
    """

    def __init__(self, work: Work) -> None:
        super().__init__(work.output, work.layout)
        self.work = work
        self.classifier = OnnxClassifier(work.artifact, threads=1)

    def answers(
        self, texts: Sequence[Any], refuse: Refuse = stop_at_long_text
    ) -> dict[str, NDArray[Any]]:
        """Return the columns of the answers by name; the texts must be checked.

        A text that is too long has no answer: ``refuse`` is called with its index and the reason.
        """
        classifier = self.classifier
        found = []
        for first, piece in _pieces(texts, classifier.artifact.long_texts):
            encodings = classifier.encode(piece, first, refuse)
            logits = classifier.run_sorted(encodings, self.work.batch_size)
            found.append(columns(classifier, encodings, logits))
        values = [np.concatenate(column) for column in zip(*found, strict=True)]
        return dict(zip(self.work.layout.added, values, strict=True))


def _pieces(texts: Sequence[Any], long_texts: LongTexts) -> Iterator[tuple[int, Sequence[Any]]]:
    """Yield the texts of a block with the index of the first, in pieces if they have windows.

    Only the tokens of a piece are in memory at a time.
    """
    first = 0
    characters = 0
    if long_texts == "windows":
        for index, text in enumerate(texts):
            characters += sum(map(len, text))
            if characters >= _PIECE_CHARACTERS:
                yield first, texts[first : index + 1]
                first = index + 1
                characters = 0
    if first < len(texts) or not texts:
        yield first, texts[first:]


def columns(
    classifier: OnnxClassifier, encodings: Sequence[Tokens], logits: NDArray[np.float32]
) -> list[NDArray[Any]]:
    """Return the columns of :data:`ADDED` for logits of shape [rows or windows, outputs].

    The values are those of :meth:`OnnxClassifier.predictions`. The arrays have the types str, float
    and bool; those of a multi-label model are objects, which are lists of labels.
    """
    task = classifier.artifact.task
    names = np.array(classifier.labels)
    logits = classifier.by_text(encodings, logits)
    predictions = answers(task, logits)
    truncated = np.array(
        [encoding.truncated for encoding in encodings if not encoding.continues], dtype=bool
    )
    if task == "regression":
        return [predictions.astype(np.float64), truncated]
    if task == "multi_label":
        label_lists = np.empty(len(predictions), dtype=object)
        label_lists[:] = [names[row.astype(bool)].tolist() for row in predictions]
        return [label_lists, truncated]
    probabilities = scores(task, logits / classifier.artifact.temperature)
    label_scores = np.take_along_axis(probabilities, predictions[:, None], axis=1)[:, 0]
    return [names[predictions], label_scores, truncated]


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
        with interrupts_blocked():
            futures = [pool.submit(_score, *block) for block in blocks]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a scoring process ended before its time: it was killed, or the machine is out of "
            "memory",
            hint="run the same command again, if need be with fewer --workers: finished parts stay",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Block Ctrl-C in this thread: it comes afterwards, and never to processes started meanwhile.

    A process that is still importing has no handler yet, and would print a traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def single_threaded() -> None:
    """Limit the tokenizer of this process to one thread; by default it uses all cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _start(work: Work) -> None:
    global _work  # noqa: PLW0603  (an initializer can pass values to its process only so)
    single_threaded()
    # Only the parent handles Ctrl-C, see interrupts_blocked. If it ends, this process ends, too.
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _work = work


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _score(index: int, block: Block) -> Done:
    global _scorer  # noqa: PLW0603
    if _scorer is None:  # the errors of an initializer would not reach the caller
        _scorer = Scorer(_work)
    return _scorer(index, block)


class RayScorer:
    """A :class:`~ad2kit.scoring.workers.Scorer` whose inputs and results are rows of Ray Data."""

    def __init__(self, work: Work) -> None:
        single_threaded()
        self.work = work
        # The model is loaded later, because Ray restarts an actor without end if this fails.
        self.scorer: Scorer | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score the block that a row describes."""
        self.scorer = self.scorer or Scorer(self.work)
        block = Block(**{field.name: row[field.name] for field in dataclasses.fields(Block)})
        return dataclasses.asdict(self.scorer(row["index"], block))


def score_on_ray(
    work: Work, blocks: list[Numbered], workers: int, address: str | None
) -> Iterator[Done]:
    """Score blocks by actors with one core each, in no order.

    Raises:
        UserError: there is no cluster at the address, or the cluster has too few cores.
        MissingExtra: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtra("ray", extra="scale")
    with ray_cluster(address):
        # Ray reads its settings from the environment at import, so it is imported here.
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
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised instead
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
