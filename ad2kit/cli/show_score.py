"""The output of `ad2kit score`: finished rows, their speed, the time left, and a summary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ad2kit.cli.show_progress import Shown

if TYPE_CHECKING:
    from ad2kit.scoring import score
    from ad2kit.scoring.records import ScoreReport


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


def shown(progress: score.Progress) -> Shown:
    """Return what is shown of a progress."""
    rate = progress.scored_here / progress.seconds if progress.seconds else 0.0
    left = f"{(progress.rows - progress.done) / rate:,.0f} s left" if rate else ""
    bad = f"  {progress.bad:,} bad" if progress.bad else ""
    line = f"{progress.done:,}/{progress.rows:,} rows  {rate:,.0f} rows/s  {left}{bad}"
    return Shown(progress.done, progress.rows, line)
