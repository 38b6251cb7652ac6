"""The result of the search for a student that meets a target: as tables, and as a plot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ad2kit.gate.records import BUSY_SPREAD
from ad2kit.run.files import whole_file
from ad2kit.run.markdown import table

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.campaigns.fit.records import Cost, FitReport, Outcome

HEADER = (
    "shape",
    "variant",
    "MB",
    "p50 ms",
    "p99 ms",
    "speed",
    "select",
    "retained",
    "interval",
    "outcome",
)


TRAINED_HEADER = HEADER[1:6]
# Marker, colour and outcomes of each kind of candidate: each outcome has its place.
_GROUPS: dict[str, tuple[str, str, tuple[Outcome, ...]]] = {
    "found": ("o", "#009E73", ("found",)),
    "distilled, failed the gate": ("X", "#D55E00", ("failed the gate",)),
    "distilled, not shown to be good enough": ("D", "#CC79A7", ("not shown",)),
    "distilled, not judged": (
        "|",
        "#E69F00",
        ("diverged", "given up", "below on select", "missed when trained"),
    ),
    "cheap enough, not needed": ("|", "#56B4E9", ("not needed",)),
    "too costly": ("|", "#BBBBBB", ("too costly",)),
}


def rows(report: FitReport) -> list[tuple[str, ...]]:
    """Return a row for the teacher and each candidate under :data:`HEADER`, as text."""

    def share(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    best = min(report.untrained_teacher, key=lambda cost: cost.p50_ms)
    lines = [("teacher", *_figures(best), "", "", "", "")]
    for candidate in report.candidates:
        low, high = candidate.retained_interval or (None, None)
        interval = "" if low is None else f"{low:.2%} to {high:.2%}"
        lines.append(
            (
                str(candidate.shape),
                *_figures(candidate.best(report.target)),
                share(candidate.select_score, ".4f"),
                share(candidate.retained, ".2%"),
                interval,
                candidate.outcome,
            )
        )
    return lines


def trained_rows(report: FitReport) -> list[tuple[str, ...]]:
    """Return a row for each variant of the trained teacher and of the last candidate."""
    return [_figures(cost) for cost in report.trained]


def _figures(cost: Cost) -> tuple[str, ...]:
    """Return variant, size, latency and speed of a cost, as text."""
    low, high = cost.speedup_range or (None, None)
    speed = f"{cost.speedup:.2f}" + ("" if low is None else f" ({low:.2f} to {high:.2f})")
    return (
        cost.variant,
        f"{cost.size_bytes / 1e6:.1f}",
        f"{cost.p50_ms:.2f}",
        f"{cost.p99_ms:.2f}",
        speed,
    )


def tables(report: FitReport) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the rows of each table that has any rows, by its header."""
    all_tables = {HEADER: rows(report), TRAINED_HEADER: trained_rows(report)}
    return {header: lines for header, lines in all_tables.items() if lines}


def caption(report: FitReport) -> str:
    """Return the caption of the tables, with warnings about the measurement and the interval."""
    target = report.target
    text = (
        f"Target: {target}. Retained: {' and '.join(report.metrics)} on {report.rows} validation "
        f"rows, with a 95 % interval. Latency: forward pass of {target.batch_size} text(s) of "
        f"{target.length_tokens} tokens, of untrained students, {report.environment['threads']} "
        f"threads of {report.environment['cpu']}; speed against the teacher's fastest variant, "
        "with the range of the rounds."
    )
    costs = [cost for candidate in report.candidates for cost in candidate.costs]
    spread = max(cost.spread for cost in [*report.untrained_teacher, *costs, *report.trained])
    if spread > BUSY_SPREAD:
        text += (
            f" The machine was busy: rounds of the same calls differ by up to {spread:.1f} times. "
            "Delete .shared/measured.json beside the runs, and search again when it is idle."
        )
    answer = next(
        (candidate for candidate in report.candidates if candidate.outcome == "found"), None
    )
    if answer is not None and (answer.retained_interval or (0.0,))[0] < target.retain:
        text += (
            f" The interval of the answer reaches below {target.retain:.2%}; --margin 0 asks for "
            "one that does not."
        )
    if report.looks > 1:
        text += (
            f" The validation rows were looked at {report.looks} times: the interval of the "
            "first is of 95 %, and each later one halves the error of the one before, so that the "
            "chance that any lower bound lies too high stays below 5 %."
        )
    return text


def markdown(report: FitReport) -> str:
    """Return the report as a page of Markdown."""
    lines = [f"# {report.recipe}"]
    for header, cells in tables(report).items():
        lines += ["", *table(header, cells)]
    notes = [
        f"- {candidate.shape}: {candidate.outcome}: {candidate.reason}"
        for candidate in report.candidates
        if candidate.reason
    ]
    return "\n".join([*lines, "", caption(report), "", *notes, ""])


def plot(report: FitReport, path: Path) -> None:
    """Draw latency and retained score of each candidate, with the teacher and the target."""
    from matplotlib.figure import Figure

    target = report.target
    key = "p50_ms" if target.p99_ms is None else "p99_ms"
    teacher = min(report.untrained_teacher, key=lambda cost: cost.p50_ms)

    def ms(cost: Cost) -> float:
        value: float = getattr(cost, key)
        return value

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(ms(teacher), 1.0, "*", color="black", markersize=12, label="teacher")
    axes.axhline(target.retain, linestyle="--", color="#0072B2", label="target")
    if target.p99_ms is not None:
        axes.axvline(target.p99_ms, linestyle="--", color="#0072B2")
    elif target.speedup:
        axes.axvline(teacher.p50_ms / target.speedup, linestyle="--", color="#0072B2")
    for candidate in report.candidates:
        if candidate.retained is not None and candidate.retained_interval is not None:
            x = ms(candidate.best(target))
            axes.plot([x, x], candidate.retained_interval, color="#888888", zorder=1)
            axes.annotate(
                str(candidate.shape),
                (x, candidate.retained),
                xytext=(7, 5),
                textcoords="offset points",
                fontsize=7,
            )
    # Candidates that were not judged on the validation rows stand at the foot of the axis.
    foot, _ = axes.get_ylim()
    for name, (marker, colour, outcomes) in _GROUPS.items():
        group = [candidate for candidate in report.candidates if candidate.outcome in outcomes]
        latencies = [ms(candidate.best(target)) for candidate in group]
        heights = [
            foot if candidate.retained is None else candidate.retained for candidate in group
        ]
        if group:
            axes.plot(
                latencies,
                heights,
                marker,
                color=colour,
                label=name,
                markersize=9,
                linestyle="none",
            )
    axes.set_xlim(left=0.0)
    axes.set_xlabel(f"{key[:3]} of {target.batch_size} x {target.length_tokens} tokens, ms")
    axes.set_ylabel("retained of the teacher's score")
    axes.legend(fontsize=8)
    with whole_file(path) as new:
        figure.savefig(new, format="svg", metadata={"Date": None})
