"""A target for a student, what candidates cost and what became of them, as written to disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from ad2kit.campaigns.shapes import Grid, Shape
from ad2kit.run.errors import GateFailed, RecipeError
from ad2kit.run.recipe import Recipe, from_data
from ad2kit.run.records import Part, Record
from ad2kit.run.sections import Metric

if TYPE_CHECKING:
    from pathlib import Path

Outcome = Literal[
    "too costly",
    "not needed",
    "diverged",
    "given up",
    "below on select",
    "missed when trained",
    "failed the gate",
    "not shown",
    "found",
]


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
        bounds = {
            "p99 at most {:g} ms": self.p99_ms,
            "at most {:g} MB": self.max_mb,
            "at least {:g} times the teacher's speed": self.speedup,
        }
        words = [text.format(value) for text, value in bounds.items() if value is not None]
        kept = f"retain {self.retain:.2%}, its interval above {self.retain - self.margin:.2%}"
        return "; ".join([kept, *words])

    def applied_to(self, recipe: Recipe) -> Recipe:
        """Return the recipe with what to retain as the gate's threshold, and the bench's shape.

        Raises:
            RecipeError: there is no bound on latency, size or speed, or nothing to choose on.
        """
        if (self.p99_ms, self.max_mb, self.speedup) == (None, None, None):
            raise RecipeError(
                "a target without a bound on latency, size or speed is met by the teacher itself",
                hint="add --p99-ms, --max-mb or --speedup",
            )
        if recipe.data.select_from == "validation":
            raise RecipeError(
                "data.select_from is 'validation': students would be chosen on the rows that judge "
                "them, and the interval would mean nothing",
                hint="set data.select_from=train",
            )
        if self.length_tokens > recipe.data.max_length_tokens:
            raise RecipeError(
                f"--length is {self.length_tokens}, but every text is cut to "
                f"{recipe.data.max_length_tokens} tokens, data.max_length_tokens",
                hint=f"give --length {recipe.data.max_length_tokens} or less",
            )
        plain = recipe.model_dump(mode="json")
        plain["parity"] |= {
            "min_retained": self.retain,
            "min_retained_lower": max(0.0, self.retain - self.margin),
        }
        plain["bench"] |= {
            "batch_sizes": [self.batch_size],
            "lengths_tokens": [self.length_tokens],
        }
        return from_data(plain, where=f"the recipe for the target ({self})")


class Cost(Part):
    """What a variant takes; ``speedup`` is over the fastest one of the teacher beside it.

    The systems took turns in rounds: ``speedup`` is the median of the ratios of their rounds,
    ``speedup_range`` encloses them all, and ``spread`` is the slowest round over the fastest.
    Files of 0.1.0 do not know these two.
    """

    variant: str
    size_bytes: int
    p50_ms: float
    p99_ms: float
    calls: int
    speedup: float
    speedup_range: tuple[float, float] | None = None
    spread: float = 1.0


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

    ``select_score`` is of its last evaluation. ``look`` counts the variants of candidates that were
    judged on the validation rows, the last of this one included; ``retained_interval`` is widened
    accordingly.
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

    costs: dict[str, tuple[Cost, ...]]


class FitReport(Record):
    """The search for the cheapest student that meets a target, judged on so many ``rows``.

    ``trained`` holds the costs of the teacher's variants and of those of the candidate that came
    last, both trained and exported, measured together. ``package`` is what to ship: the name of a
    run and one of its variants.
    """

    recipe: str
    inputs: str
    target: Target
    grid: Grid
    metrics: tuple[Metric, ...]
    rows: int
    untrained_teacher: tuple[Cost, ...]
    candidates: tuple[Candidate, ...]
    trained: tuple[Cost, ...]
    package: tuple[str, str] | None
    environment: dict[str, str]

    @property
    def looks(self) -> int:
        """How many variants of candidates were judged on the validation rows."""
        return max((each.look or 0 for each in self.candidates), default=0)


def insist_found(report: FitReport, folder: Path) -> None:
    """Stop where no student meets the target.

    Raises:
        GateFailed: says which bound fails by how much, and which candidate is the nearest.
    """
    if report.package:
        return
    target = report.target
    cheap = [each for each in report.candidates if each.outcome != "too costly"]
    outcomes = {each.outcome for each in cheap}
    if cheap:
        nearest = max(cheap, key=lambda each: (each.retained or 0.0, each.select_score or 0.0))
        shown = "shown to be " if "not shown" in outcomes else ""
        words = f"{len(cheap)} shapes are cheap enough and none is {shown}good enough"
    else:
        nearest = min(report.candidates, key=lambda each: miss(each.best(target), target))
        words = f"none of {len(report.candidates)} shapes is cheap enough, so none was distilled"
    raise GateFailed(
        f"no student meets the target ({target}): {words}\n"
        f"  nearest: {nearest.shape}: {nearest.outcome}: {nearest.reason}",
        hint=f"all are in {folder / 'fit.md'}; "
        + ("give more labelled validation rows, " if "not shown" in outcomes else "")
        + "ask for less, allow more data or epochs, or name other shapes with --layers, --heads "
        "and --feed-forward",
    )
