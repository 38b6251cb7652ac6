"""What `ad2kit score` and `ad2kit ask` show alike: their progress, and rows that were left out."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ad2kit.run.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ad2kit.asking.records import AskReport
    from ad2kit.scoring.records import ScoreReport

_SECONDS_BETWEEN_LINES = 5.0

Step = TypeVar("Step")


class Shown(NamedTuple):
    """A progress: what is done of how much, and a line that says more."""

    done: int
    total: int
    line: str


@contextmanager
def showing(shown: Callable[[Step], Shown]) -> Iterator[Callable[[Step], None]]:
    """Yield the function to call with each step: a bar on a terminal, else lines on stderr.

    ``shown`` says what to show of a step.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(console, shown)
        return
    bar = Progress(BarColumn(), TextColumn("{task.description}"), console=console)
    task = bar.add_task("")

    def update(step: Step) -> None:
        done, total, line = shown(step)
        bar.update(task, total=total, completed=done, description=line)

    with bar:
        yield update


def check_all_rows(report: AskReport | ScoreReport) -> None:
    """Stop with an error if rows were left out.

    Raises:
        DataError: tells the number of these rows, and where their reasons are.
    """
    if report.bad_rows:
        raise DataError(
            f"{report.bad_rows:,} of {report.rows:,} rows got no answer",
            hint=f"{report.output}/_errors names file, row and reason of each; all others are done",
        )


def _lines(console: Console, shown: Callable[[Step], Shown]) -> Callable[[Step], None]:
    """Return a function that prints a line every few seconds, and one at the end."""
    last_s = float("-inf")

    def show(step: Step) -> None:
        nonlocal last_s
        done, total, line = shown(step)
        if done < total and time.monotonic() - last_s < _SECONDS_BETWEEN_LINES:
            return
        last_s = time.monotonic()
        console.print(line, highlight=False)

    return show
