"""How a training shows itself: a bar on a terminal, plain lines elsewhere. Always on stderr."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console
    from rich.progress import TaskID

    from ad2kit.records import StepRecord

_SECONDS_BETWEEN_LINES = 15.0


@contextmanager
def training_progress(console: Console) -> Iterator[Callable[[StepRecord], None]]:
    """Yield the function to call with each :class:`~ad2kit.records.StepRecord`."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[facts]}"), TimeRemainingColumn(), console=console,
    )  # fmt: skip
    tasks: dict[str, TaskID] = {}
    speed, metric = _Speed(), ""

    def show(record: StepRecord) -> None:
        nonlocal metric
        if record.phase not in tasks:
            tasks[record.phase] = bar.add_task(
                record.phase, total=record.total_steps, completed=record.step - 1, facts=""
            )
            metric = ""
        if record.select_metric is not None:
            metric = f"select {record.select_metric:.4f}"
        facts = f"loss {record.loss:.4f}  {speed.update(record):.0f} examples/s  {metric}"
        bar.update(tasks[record.phase], completed=record.step, facts=facts)

    with bar:
        yield show


class _Speed:
    """Examples per second since the phase began, its first update left out."""

    def __init__(self) -> None:
        self.phase, self.start, self.examples = "", 0.0, 0

    def update(self, record: StepRecord) -> float:
        now = time.monotonic()
        if record.phase != self.phase:
            self.phase, self.start, self.examples = record.phase, now, 0
            return 0.0
        self.examples += record.examples
        return self.examples / max(now - self.start, 1e-9)


class _Lines:
    """A line after each evaluation, and now and then between."""

    def __init__(self, console: Console) -> None:
        self.console, self.speed, self.last = console, _Speed(), time.monotonic()
        self.first_step = 0

    def __call__(self, record: StepRecord) -> None:
        if record.phase != self.speed.phase:
            self.first_step = record.step
        rate = self.speed.update(record)
        now = time.monotonic()
        if record.select_metric is None and now - self.last < _SECONDS_BETWEEN_LINES:
            return
        self.last = now
        done = record.step - self.first_step
        left = (now - self.speed.start) / max(done, 1) * (record.total_steps - record.step)
        metric = "" if record.select_metric is None else f"  select {record.select_metric:.4f}"
        self.console.print(
            f"{record.phase} {record.step}/{record.total_steps}  loss {record.loss:.4f}  "
            f"{rate:.0f} examples/s  {left:.0f} s left{metric}",
            highlight=False,
        )
