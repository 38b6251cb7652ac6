"""What the terminal says of a training."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from ad2kit.cli import show
from ad2kit.training.records import StepRecord

if TYPE_CHECKING:
    import pytest


def record(step: int, total: int, *, select_score: float | None = None) -> StepRecord:
    return StepRecord(
        phase="student",
        step=step,
        total_steps=total,
        epoch=1,
        lr=1e-3,
        loss=0.5,
        terms={},
        grad_norm=1.0,
        examples=32,
        seconds=1.0,
        select_score=select_score,
    )


def test_the_pace_of_one_student_is_not_that_of_the_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("ad2kit.cli.show.time.monotonic", lambda: now)
    with show.training_progress() as progress:
        # The first is given up after 50 slow updates, as `fit` does; the second is faster.
        for seconds, step in itertools.chain(
            ((8.0, step) for step in range(1, 51)), ((2.0, step) for step in range(1, 12))
        ):
            now += seconds
            progress(record(step, 100, select_score=0.75 if step in (50, 11) else None))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("student 2/100")  # so much was between two lines
    *_, slow, fast = (line for line in lines if "select" in line)
    assert slow == "student 50/100  loss 0.5000  4 examples/s  400 s left  select 0.7500"
    assert fast == "student 11/100  loss 0.5000  16 examples/s  178 s left  select 0.7500"
