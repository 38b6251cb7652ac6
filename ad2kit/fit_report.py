"""What the search for a student that meets a target found: as a record, a table, and a plot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from ad2kit.errors import GateFailed
from ad2kit.files import whole_file
from ad2kit.markdown import table
from ad2kit.records import Part, Record
from ad2kit.sections import Metric  # noqa: TC001  (pydantic reads them at run time)
from ad2kit.shapes import Grid, Shape  # noqa: TC001

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Outcome = Literal[
    "too costly", "not needed", "given up", "below on select", "failed the gate",
    "missed when trained", "found",
]  # fmt: skip


class Target(Part):
    """What a student has to keep, and what it may cost; a bound that is null is none.

    ``retain`` is a fraction of the teacher's score, and ``margin`` how far below it the interval
    may reach. ``speedup`` is over the fastest variant of the teacher, in medians of the same
    measurement. Latency is of the forward pass of ``batch_size`` texts of ``length_tokens`` tokens.
    """

    retain: float
    margin: float
    p99_ms: float | None
    max_mb: float | None
    speedup: float | None
    batch_size: int
    length_tokens: int

    def __str__(self) -> str:
        bounds = {"p99 at most {:g} ms": self.p99_ms, "at most {:g} MB": self.max_mb,
                  "at least {:g} times the teacher's speed": self.speedup}  # fmt: skip
        words = [text.format(value) for text, value in bounds.items() if value is not None]
        return ", ".join([f"retain {self.retain:.2%}", *words])


class Cost(Part):
    """What a variant takes; ``speedup`` is over the fastest one of the teacher beside it."""

    variant: str
    size_bytes: int
    p50_ms: float
    p99_ms: float
    calls: int
    speedup: float


class Shortfall(NamedTuple):
    """A bound that is missed, in words, and by what part of it."""

    words: str
    share: float


def shortfalls(cost: Cost, target: Target) -> list[Shortfall]:
    """Return the bounds of a target that a variant misses."""
    found = []
    megabytes = cost.size_bytes / 1e6
    for name, unit, value, most in (
        ("p99", " ms", cost.p99_ms, target.p99_ms),
        ("size", " MB", megabytes, target.max_mb),
    ):
        if most is not None and value > most:
            words = f"{name} {value:.2f}{unit}, {value - most:.2f}{unit} above {most:g}{unit}"
            found.append(Shortfall(words, value / most - 1))
    least = target.speedup
    if least is not None and cost.speedup < least:
        words = f"{cost.speedup:.2f} times the teacher's speed, {least - cost.speedup:.2f} below "
        found.append(Shortfall(f"{words}{least:g}", least / cost.speedup - 1))
    return found


class Candidate(Part):
    """A shape, what it costs untrained, and what became of it.

    ``select_score`` is of its last evaluation. ``look`` counts the candidates that were judged on
    the validation rows, this one included; ``retained_interval`` is widened accordingly.
    """

    shape: Shape
    costs: tuple[Cost, ...]
    outcome: Outcome = "not needed"
    reason: str = ""
    run: str | None = None
    select_score: float | None = None
    train_seconds: float | None = None
    look: int | None = None
    variant: str | None = None
    retained: float | None = None
    retained_interval: tuple[float, float] | None = None

    @classmethod
    def measured(cls, shape: Shape, costs: tuple[Cost, ...], target: Target) -> Self:
        """Return a candidate that has been measured, and may be too costly."""
        candidate = cls(shape=shape, costs=costs)
        best = candidate.best(target)
        if not (missed := shortfalls(best, target)):
            return candidate
        words = ", ".join(shortfall.words for shortfall in missed)
        return candidate.ended("too costly", f"{best.variant}: {words}")

    def ended(self, outcome: Outcome, reason: str, **facts: Any) -> Self:
        """Return the candidate with what became of it, and why."""
        return self.model_copy(update={"outcome": outcome, "reason": reason, **facts})

    def best(self, target: Target) -> Cost:
        """Return the fastest variant that meets the target; the nearest to it if none does."""
        return min(self.costs, key=lambda cost: (miss(cost, target), cost.p50_ms))


def miss(cost: Cost, target: Target) -> float:
    """Return by what part of it the bound that is missed most is missed; 0 if none is."""
    return max((shortfall.share for shortfall in shortfalls(cost, target)), default=0.0)


class Measurements(Record):
    """What was measured on this machine, by the fingerprint of what it depends on."""

    costs: dict[str, tuple[Cost, ...]] = {}


class FitReport(Record):
    """The search for the cheapest student that meets a target.

    ``trained`` holds the costs of the teacher's variants and of those of the candidate that came
    last, both trained and exported, measured together. ``package`` is what to ship: the name of a
    run and one of its variants.
    """

    recipe: str
    inputs: str
    target: Target
    grid: Grid
    metrics: tuple[Metric, ...]
    untrained_teacher: tuple[Cost, ...]
    candidates: tuple[Candidate, ...]
    trained: tuple[Cost, ...]
    package: tuple[str, str] | None
    environment: dict[str, str]

    @property
    def looks(self) -> int:
        """How many candidates were judged on the validation rows."""
        return max((each.look or 0 for each in self.candidates), default=0)


HEADER = ("shape", "variant", "MB", "p50 ms", "p99 ms", "speed", "select", "retained", "interval",
          "outcome")  # fmt: skip


def rows(report: FitReport) -> list[tuple[str, ...]]:
    """Return a row for the teacher and each candidate under :data:`HEADER`, as text."""

    def share(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    best = min(report.untrained_teacher, key=lambda cost: cost.p50_ms)
    found = [("teacher", *_figures(best), "", "", "", "")]
    for each in report.candidates:
        low, high = each.retained_interval or (None, None)
        interval = "" if low is None else f"{low:.2%} to {high:.2%}"
        found.append((
            str(each.shape), *_figures(each.best(report.target)), share(each.select_score, ".4f"),
            share(each.retained, ".2%"), interval, each.outcome,
        ))  # fmt: skip
    return found


def trained_rows(report: FitReport) -> list[tuple[str, ...]]:
    """Return a row for each variant of the trained teacher and of the last candidate."""
    return [_figures(cost) for cost in report.trained]


def _figures(cost: Cost) -> tuple[str, ...]:
    return (
        cost.variant, f"{cost.size_bytes / 1e6:.1f}", f"{cost.p50_ms:.2f}", f"{cost.p99_ms:.2f}",
        f"{cost.speedup:.2f}",
    )  # fmt: skip


TRAINED_HEADER = HEADER[1:6]


def caption(report: FitReport) -> str:
    """Return in words what the tables show."""
    target = report.target
    text = (
        f"Target: {target}. Latency: forward pass of {target.batch_size} text(s) of "
        f"{target.length_tokens} tokens, of untrained students, {report.environment['threads']} "
        f"threads of {report.environment['cpu']}; speed against the teacher's fastest variant."
    )
    if report.looks > 1:
        text += (
            f" {report.looks} candidates were judged on the validation rows: the interval of the "
            "first is of 95 %, and each later one halves the error of the one before, so that the "
            "chance that any lower bound lies too high stays below 5 %."
        )
    return text


def markdown(report: FitReport) -> str:
    """Return the report as a page of Markdown."""
    lines = [f"# {report.recipe}", "", *table(HEADER, rows(report))]
    if report.trained:
        lines += ["", *table(TRAINED_HEADER, trained_rows(report))]
    notes = [
        f"- {each.shape}: {each.outcome}: {each.reason}"
        for each in report.candidates
        if each.reason
    ]
    return "\n".join([*lines, "", caption(report), "", *notes, ""])


def insist_found(report: FitReport, folder: Path) -> None:
    """Stop where no student meets the target.

    Raises:
        GateFailed: says which bound fails by how much, and which candidate is the nearest.
    """
    if report.package:
        return
    target = report.target
    cheap = [each for each in report.candidates if each.outcome != "too costly"]
    if cheap:
        nearest = max(cheap, key=lambda each: (each.retained or 0.0, each.select_score or 0.0))
        words = f"{len(cheap)} shapes are cheap enough and none is good enough"
    else:
        nearest = min(report.candidates, key=lambda each: miss(each.best(target), target))
        words = f"none of {len(report.candidates)} shapes is cheap enough, so none was distilled"
    raise GateFailed(
        f"no student meets the target ({target}): {words}\n"
        f"  nearest: {nearest.shape}: {nearest.outcome}: {nearest.reason}",
        hint=f"all are in {folder / 'fit.md'}; ask for less, allow more data or epochs, or name "
        "other shapes with --layers, --heads and --feed-forward",
    )


def plot(report: FitReport, path: Path) -> None:
    """Draw what each candidate takes and retains, with the teacher and the target."""
    from matplotlib.figure import Figure

    target = report.target
    key = "p99_ms" if target.p99_ms is not None else "p50_ms"
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()

    def ms(cost: Cost) -> float:
        value: float = getattr(cost, key)
        return value

    fastest = min(report.untrained_teacher, key=lambda cost: cost.p50_ms)
    axes.plot(ms(fastest), 1.0, "k*", markersize=12, label="teacher")
    judged = [each for each in report.candidates if each.retained is not None]
    for each in judged:
        low, high = each.retained_interval or (each.retained, each.retained)
        cost = each.best(target)
        axes.plot([ms(cost)] * 2, [low, high], color="#888888", zorder=1)
        axes.annotate(str(each.shape), (ms(cost), each.retained or 0.0), fontsize=6,
                      xytext=(4, 4), textcoords="offset points")  # fmt: skip
    groups: dict[str, tuple[str, list[Candidate]]] = {
        "found": ("o", [c for c in judged if c.outcome == "found"]),
        "distilled, did not pass": ("X", [c for c in judged if c.outcome != "found"]),
    }
    for colour, (name, (marker, members)) in zip(
        ("#009E73", "#D55E00"), groups.items(), strict=True
    ):
        points = [(ms(c.best(target)), c.retained or 0.0) for c in members]
        _scatter(axes, points, marker, colour, name)
    axes.axhline(target.retain, linestyle="--", color="#0072B2", label="target")
    bound = target.p99_ms if target.p99_ms is not None else (
        None if target.speedup is None else fastest.p50_ms / target.speedup
    )  # fmt: skip
    if bound is not None:
        axes.axvline(bound, linestyle="--", color="#0072B2")
    # What was not judged on the validation rows has no place on the axis of retention but its foot.
    low, _ = axes.get_ylim()
    feet = {
        "given up or below on select": ("given up", "below on select"),
        "not distilled": ("not needed",),
        "misses latency, size or speed": ("too costly",),
    }
    for colour, (name, outcomes) in zip(
        ("#E69F00", "#56B4E9", "#BBBBBB"), feet.items(), strict=True
    ):
        members = [c for c in report.candidates if c.outcome in outcomes]
        _scatter(axes, [(ms(c.best(target)), low) for c in members], "|", colour, name)
    axes.set_xscale("log")
    axes.set_xlabel(f"{key[:3]} of {target.batch_size} x {target.length_tokens} tokens, ms")
    axes.set_ylabel("retained of the teacher's score")
    axes.legend(fontsize=8)
    with whole_file(path) as new:
        figure.savefig(new, format="svg", metadata={"Date": None})


def _scatter(
    axes: Any, points: Sequence[tuple[float, float]], marker: str, colour: str, name: str
) -> None:
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, marker, color=colour, label=name, markersize=9, linestyle="none")
