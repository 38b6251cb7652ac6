"""What `ad2kit score` shows: rows done, their speed, the time that is left, and the end."""

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
        yield lambda now: bar.update(
            task, total=now.rows, completed=now.done, description=_facts(now)
        )


def summary(report: ScoreReport) -> str:
    """Return a finished job in words."""
    text = f"{report.rows:,} rows in {report.parts} parts in {report.output}"
    if not report.scored_here:
        return f"{text}; all of them were there already"
    already = report.rows - report.scored_here
    before = f", {already:,} rows were there already" if already else ""
    limit = report.limit_rows_per_s_per_core
    alone = f", of {limit:,.0f} that the classifier alone does" if limit else ""
    return (
        f"{text}{before}\n{report.scored_here:,} rows in {report.seconds:.1f} s by "
        f"{report.workers} worker(s): {report.rows_per_s:,.0f} rows/s, "
        f"{report.rows_per_s_per_core:,.0f} rows/s per core{alone}"
    )


def insist_on_all_rows(report: ScoreReport) -> None:
    """Stop with an error if rows were left out.

    Raises:
        DataError: names how many, and where their reasons are.
    """
    if report.bad_rows:
        raise DataError(
            f"{report.bad_rows:,} of {report.rows:,} rows got no answer",
            hint=f"{report.output}/_errors names file, row and reason of each; all others are done",
        )


def _facts(now: score.Progress) -> str:
    rate = now.scored_here / now.seconds if now.seconds else 0.0
    left = f"{(now.rows - now.done) / rate:,.0f} s left" if rate else ""
    bad = f"  {now.bad:,} bad" if now.bad else ""
    return f"{now.done:,}/{now.rows:,} rows  {rate:,.0f} rows/s  {left}{bad}"


def _lines(console: Console) -> Callable[[score.Progress], None]:
    """A line now and then, and one at the end."""
    last = float("-inf")

    def show(now: score.Progress) -> None:
        nonlocal last
        if now.done < now.rows and time.monotonic() - last < _SECONDS_BETWEEN_LINES:
            return
        last = time.monotonic()
        console.print(_facts(now), highlight=False)

    return show
