"""The processes of this machine that score: this one, or some with one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from typing import TYPE_CHECKING

from ad2kit.errors import UserError
from ad2kit.scoring import Scorer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ad2kit.blocks import Block
    from ad2kit.scoring import Done, Work

    Numbered = tuple[int, Block]

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
