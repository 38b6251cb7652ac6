"""Records of a search: the target of a student, the costs and outcomes of the candidates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from ad2kit.campaigns.records import Grid, Shape
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
    """The score that a student has to retain, and the bounds on its costs; null is no bound.

    ``retain`` is a fraction of the teacher's score; the interval may reach below it by ``margin``.
    ``speedup`` is relative to the fastest variant of the teacher, by medians of the same
    measurement. Latency is that of a forward pass of ``batch_size`` texts of ``length_tokens``
    tokens.
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
        quality = f"retain {self.retain:.2%}, its interval above {self.retain - self.margin:.2%}"
        return "; ".join([quality, *words])

    def applied_to(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the target's thresholds in its gate and its shape in the bench.

        Raises:
            RecipeError: there is no bound on latency, size or speed; the recipe has no rows to
                choose students on; or the length is above ``data.max_length_tokens``.
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
    """Latency and size of a variant, with its speed relative to the teacher's fastest variant.

    The systems took turns in rounds. ``speedup`` is the median of the ratios of their rounds, and
    ``speedup_range`` encloses all ratios. ``spread`` is the time of the slowest round over that of
    the fastest. Files of version 0.1.0 do not have the last two.
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
    """A bound that is missed, in words, and by which share of the bound."""

    words: str
    share: float


def shortfalls(cost: Cost, target: Target) -> list[Shortfall]:
    """Return the bounds of a target that a variant misses."""
    missed = []
    megabytes = cost.size_bytes / 1e6
    for name, unit, value, most in (
        ("p99", " ms", cost.p99_ms, target.p99_ms),
        ("size", " MB", megabytes, target.max_mb),
    ):
        if most is not None and value > most:
            words = f"{name} {value:.2f}{unit}, {value - most:.2f}{unit} above {most:g}{unit}"
            missed.append(Shortfall(words, value / most - 1))
    least = target.speedup
    if least is not None and cost.speedup < least:
        words = f"{cost.speedup:.2f} times the teacher's speed, {least - cost.speedup:.2f} below "
        missed.append(Shortfall(f"{words}{least:g}", least / cost.speedup - 1))
    return missed


class Candidate(Part):
    """A shape, its costs untrained, and its outcome.

    ``select_score`` is the score of its last evaluation. ``look`` is the number of variants that
    had been judged on the validation rows, the last one of this candidate included;
    ``retained_interval`` is widened accordingly.
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
        """Return a candidate with its costs, which may be too high for the target."""
        candidate = cls(shape=shape, costs=costs)
        best = candidate.best(target)
        missed = shortfalls(best, target)
        if not missed:
            return candidate
        words = ", ".join(shortfall.words for shortfall in missed)
        return candidate.ended("too costly", f"{best.variant}: {words}")

    def ended(self, outcome: Outcome, reason: str, **facts: Any) -> Self:
        """Return the candidate with its outcome, the reason, and other fields."""
        return self.model_copy(update={"outcome": outcome, "reason": reason, **facts})

    def best(self, target: Target) -> Cost:
        """Return the fastest variant that meets the target; if none does, the nearest to it."""
        return min(self.costs, key=lambda cost: (miss(cost, target), cost.p50_ms))


def miss(cost: Cost, target: Target) -> float:
    """Return the largest shortfall, as a share of its bound; 0 if no bound is missed."""
    return max((shortfall.share for shortfall in shortfalls(cost, target)), default=0.0)


class Measurements(Record):
    """The costs that were measured on this machine, by the fingerprint of their conditions."""

    costs: dict[str, tuple[Cost, ...]]


class FitReport(Record):
    """The search for the cheapest student that meets a target, judged on so many ``rows``.

    ``trained`` holds the costs of the trained teacher's variants and of the last candidate's
    variants, measured together. ``package`` names the run and the variant to ship.
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
        """The number of variants that were judged on the validation rows."""
        return max((candidate.look or 0 for candidate in self.candidates), default=0)


def check_found(report: FitReport, folder: Path) -> None:
    """Stop if no student meets the target.

    Raises:
        GateFailed: names the nearest candidate, and the bound that it misses by how much.
    """
    if report.package:
        return
    target = report.target
    candidates = report.candidates
    cheap = [candidate for candidate in candidates if candidate.outcome != "too costly"]
    outcomes = {candidate.outcome for candidate in cheap}
    if cheap:
        nearest = max(
            cheap,
            key=lambda candidate: (candidate.retained or 0.0, candidate.select_score or 0.0),
        )
        shown = "shown to be " if "not shown" in outcomes else ""
        words = f"{len(cheap)} shapes are cheap enough and none is {shown}good enough"
    else:
        nearest = min(candidates, key=lambda candidate: miss(candidate.best(target), target))
        words = f"none of {len(candidates)} shapes is cheap enough, so none was distilled"
    more_rows = "give more labelled validation rows, " if "not shown" in outcomes else ""
    raise GateFailed(
        f"no student meets the target ({target}): {words}\n"
        f"  nearest: {nearest.shape}: {nearest.outcome}: {nearest.reason}",
        hint=f"all are in {folder / 'fit.md'}; {more_rows}ask for less, allow more data or epochs, "
        "or name other shapes with --layers, --heads and --feed-forward",
    )
