"""The output of `ad2kit score`: finished rows, their speed, the time left, and a summary."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ad2kit.run.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ad2kit.scoring import score
    from ad2kit.scoring.records import ScoreReport

_SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def scoring_progress() -> Iterator[Callable[[score.Progress], None]]:
    """Yield the function to call with each :class:`~ad2kit.scoring.score.Progress`."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(console)
        return
    bar = Progress(BarColumn(), TextColumn("{task.description}"), console=console)
    task = bar.add_task("")
    with bar:
        yield lambda progress: bar.update(
            task, total=progress.rows, completed=progress.done, description=_facts(progress)
        )


def summary(report: ScoreReport) -> str:
    """Return a summary of a finished job in words."""
    text = f"{report.rows:,} rows in {report.parts} parts in {report.output}"
    if not report.scored_here:
        return f"{text}; all of them were there already"
    rows_before = report.rows - report.scored_here
    before_words = f", {rows_before:,} rows were there already" if rows_before else ""
    limit = report.limit_rows_per_s_per_core
    limit_words = f", of {limit:,.0f} that the classifier alone does" if limit else ""
    return (
        f"{text}{before_words}\n{report.scored_here:,} rows in {report.seconds:.1f} s by "
        f"{report.workers} worker(s): {report.rows_per_s:,.0f} rows/s, "
        f"{report.rows_per_s_per_core:,.0f} rows/s per core{limit_words}"
    )


def check_all_rows(report: ScoreReport) -> None:
    """Stop with an error if rows were left out.

    Raises:
        DataError: tells the number of these rows, and where their reasons are.
    """
    if report.bad_rows:
        raise DataError(
            f"{report.bad_rows:,} of {report.rows:,} rows got no answer",
            hint=f"{report.output}/_errors names file, row and reason of each; all others are done",
        )


def _facts(progress: score.Progress) -> str:
    """Return a progress as one line."""
    rate = progress.scored_here / progress.seconds if progress.seconds else 0.0
    left = f"{(progress.rows - progress.done) / rate:,.0f} s left" if rate else ""
    bad = f"  {progress.bad:,} bad" if progress.bad else ""
    return f"{progress.done:,}/{progress.rows:,} rows  {rate:,.0f} rows/s  {left}{bad}"


def _lines(console: Console) -> Callable[[score.Progress], None]:
    """Return a function that prints a line every few seconds, and one at the end."""
    last_s = float("-inf")

    def show(progress: score.Progress) -> None:
        nonlocal last_s
        incomplete = progress.done < progress.rows
        if incomplete and time.monotonic() - last_s < _SECONDS_BETWEEN_LINES:
            return
        last_s = time.monotonic()
        console.print(_facts(progress), highlight=False)

    return show
