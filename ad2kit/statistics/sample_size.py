"""Sample size: intervals, the number of rows that a check needs, and the test for lost classes.

A check of an estimate has a *target* for the estimate and a *limit* for its interval. The check has
passed if the estimate reaches the target and the interval does not cross the limit. It has failed
if the whole interval misses the target. Otherwise the rows are too few to decide
(:class:`ad2kit.exporting.records.Check`). All functions here treat bounds from below; for a bound
from above the signs change.

scipy is imported inside the functions that need it, see :mod:`ad2kit.statistics.metrics`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from ad2kit.run.sections import Task

    Interval = tuple[float, float]
    RowsFor = Callable[[float, float, float], int | None]

ERROR = 0.05
"""The error rate of an interval, and the false-alarm rate of the test for lost classes."""

POWER = 0.8
"""The share of samples, of the returned number of rows, that show a true value."""

_MOST_ROWS = 10**9


@dataclass(frozen=True)
class Estimate:
    """A value that was measured on ``rows`` rows, its interval, and the rows that a check needs.

    ``rows_for`` takes a true value, a target and a limit. It returns the number of rows that show
    that the value passes, or None if no number does.
    """

    value: float
    interval: Interval
    rows: int
    rows_for: RowsFor


def share(hits: float, rows: int) -> Estimate:
    """Return the share of the rows that are hits, with its exact interval.

    Clopper and Pearson, *The use of confidence or fiducial limits illustrated in the case of the
    binomial*, Biometrika 1934, by quantiles of the beta distribution. If each row is itself a share
    between 0 and 1 (of several labels, for example), ``hits`` is their sum. Such values vary at
    most as much as zeros and ones of the same mean, so the interval is too wide rather than too
    narrow.
    """
    from scipy.stats import beta

    tail = ERROR / 2
    misses = rows - hits
    low = 0.0 if hits <= 0 else float(beta.ppf(tail, hits, misses + 1))
    high = 1.0 if misses <= 0 else float(beta.ppf(1 - tail, hits + 1, misses))
    return Estimate(hits / rows, (low, high), rows, rows_for_share)


def rows_for_share(truth: float, target: float, limit: float) -> int | None:
    """Return the number of rows that show a share, see :func:`share`; None if no number does.

    Exact, by the binomial distribution: the power is the probability of at least the smallest
    number of hits that passes. As a function of the rows it is a sawtooth, with one tooth for each
    further miss that still passes. The result lies on the first tooth whose mean power suffices,
    at its first number of rows with enough power.
    """
    from scipy.stats import binom

    if limit >= 1 or truth < target:
        return None
    tooth = np.arange(math.ceil(1 / max(1 - max(limit, target), 1e-3)) + 1)

    def powers(rows: int) -> NDArray[np.float64]:
        sizes = rows + tooth
        # The interval lies above the limit if a share at the limit makes that many hits unlikely.
        least_hits = binom.isf(ERROR / 2, sizes, limit) + 1 if limit > 0 else np.zeros(len(sizes))
        least_hits = np.maximum(least_hits, np.ceil(target * sizes - 1e-9))
        return np.asarray(binom.sf(least_hits - 1, sizes, truth))

    rows = _smallest(lambda rows: bool(powers(rows).mean() >= POWER))
    if rows is None:
        return None
    return rows + int(np.argmax(powers(rows) >= POWER))


def correlation(value: float, rows: int) -> Estimate:
    """Return a Pearson correlation ``value`` of two answers to ``rows`` rows, with its interval.

    Fisher's transformation: the artanh of a correlation is about normal with the standard deviation
    1 / sqrt(rows - 3) (Fisher, *On the probable error of a coefficient of correlation*, Metron
    1921).
    """
    if rows <= 3 or not math.isfinite(value):
        return Estimate(value, (-1.0, 1.0), rows, rows_for_correlation)
    centre = _artanh(value)
    radius = _quantile(ERROR) / math.sqrt(rows - 3)
    interval = (math.tanh(centre - radius), math.tanh(centre + radius))
    return Estimate(value, interval, rows, rows_for_correlation)


def rows_for_correlation(truth: float, target: float, limit: float) -> int | None:
    """Return the number of rows that show a correlation; None if no number does.

    See :func:`correlation`.
    """
    truth, target, limit = map(_artanh, (truth, target, limit))

    def enough(rows: int) -> bool:
        deviation = 1 / math.sqrt(rows)
        threshold = max(target, limit + _quantile(ERROR) * deviation)
        return truth - threshold >= _power_sd() * deviation

    rows = _smallest(enough)
    return None if rows is None else rows + 3


def about_normal(
    value: float,
    interval: Interval,
    deviation: float,
    rows: int,
    *,
    unit: float = 1.0,
    error: float = ERROR,
) -> Estimate:
    """Return an estimate that is about normal, such as a bootstrapped one.

    The interval is widened by the effect of rows that the sample may have missed. Without this the
    interval would be a point if all rows agree, because then all bootstrap draws are the same.

    Args:
        value: the estimate.
        interval: its interval, with the error rate ``error``.
        deviation: the standard deviation of the estimate.
        rows: the number of rows that it was measured on.
        unit: the change of the estimate if the answers to all rows change.
        error: the probability that the interval misses the true value.
    """
    margin = unit * unseen(rows, error)
    low, high = interval
    widened = (min(low, value - margin), max(high, value + margin))
    row_deviation = deviation * math.sqrt(rows)

    def rows_for(truth: float, target: float, limit: float) -> int | None:
        return rows_for_mean(truth, target, limit, row_deviation, unit=unit, error=error)

    return Estimate(value, widened, rows, rows_for)


def rows_for_mean(
    truth: float,
    target: float,
    limit: float,
    deviation: float,
    *,
    unit: float = 1.0,
    error: float = ERROR,
) -> int | None:
    """Return the number of rows that show a mean, see :func:`about_normal`; None if no number does.

    In the normal approximation. An estimate passes if it reaches both the target and the limit plus
    half the width of its interval; it has to pass with the probability :data:`POWER`.
    ``deviation`` is the standard deviation of one row; the mean of n rows has this over sqrt(n).
    """

    def enough(rows: int) -> bool:
        threshold = max(target, limit + half_width(deviation, rows, unit=unit, error=error))
        return truth - threshold >= _power_sd() * deviation / math.sqrt(rows)

    return _smallest(enough)


def half_width(deviation: float, rows: int, *, unit: float = 1.0, error: float = ERROR) -> float:
    """Return half the width of the interval of :func:`about_normal` on ``rows`` rows."""
    return max(_quantile(error) * deviation / math.sqrt(rows), unit * unseen(rows, error))


def unseen(rows: int, error: float = ERROR) -> float:
    """Return the largest share of a kind of row that a sample without any such row allows.

    This is the upper end of Clopper and Pearson's interval for 0 hits in ``rows`` rows.
    """
    return float(-math.expm1(math.log(error / 2) / rows))


def supposed(value: float, target: float, best: float) -> float:
    """Return the true value that is assumed for the number of rows: the measured or a better one.

    It is at least half way from the target to the best value. No number of rows can show a value at
    the target, and a value near the target needs very many.
    """
    midpoint = (target + best) / 2
    if not math.isfinite(value):
        return midpoint
    return max(value, midpoint) if best >= target else min(value, midpoint)


class LostClasses(NamedTuple):
    """Ids of the classes that a student has lost, and of classes with too few rows to tell.

    ``given`` counts the rows on which the teacher answers each class. ``kept`` counts the rows on
    which both teacher and student answer it. Both have shape [classes].
    """

    lost: tuple[int, ...]
    too_few: tuple[int, ...]
    given: NDArray[np.int64]
    kept: NDArray[np.int64]


def lost_classes(
    task: Task, student: NDArray[Any], teacher: NDArray[Any], classes: int
) -> LostClasses:
    """Return the classes (or labels) that a student no longer answers where its teacher does.

    A class is lost if the student answers it on fewer than half of the rows on which the teacher
    does. This takes a one-sided exact binomial test against one half for each class that the
    teacher answers. Holm's correction (*A simple sequentially rejective multiple test procedure*,
    1979) keeps the probability of any false alarm below :data:`ERROR`, for any number of classes.
    A class has too few rows if not even a student that never answers it would be detected.

    Args:
        task: not a regression.
        student: answers of the student, see :func:`ad2kit.statistics.logits.answers`.
        teacher: answers of the teacher to the same rows.
        classes: number of classes.
    """
    from scipy.stats import binom

    if task == "single_label":
        given = np.bincount(teacher, minlength=classes)
        kept = np.bincount(teacher[student == teacher], minlength=classes)
    else:
        given = (teacher == 1).sum(axis=0)
        kept = ((teacher == 1) & (student == 1)).sum(axis=0)
    tested = np.flatnonzero(given)
    p_values = binom.cdf(kept[tested], given[tested], 0.5)
    lost: list[int] = []
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[index] > ERROR / (len(tested) - rank):
            break
        lost.append(int(tested[index]))
    least_rows = least_rows_of_a_class(len(tested))
    too_few = [int(each) for each in tested if given[each] < least_rows and each not in lost]
    return LostClasses(tuple(sorted(lost)), tuple(too_few), given, kept)


def least_rows_of_a_class(classes: int) -> int:
    """Return the number of rows of a class that show its loss if the student never answers it.

    The smallest p-value of n rows is 2 to the power of -n. The first step of Holm's correction
    compares it with the error rate over the number of classes.
    """
    return math.ceil(math.log2(max(classes, 1) / ERROR))


def _quantile(error: float) -> float:
    """Return half the width of a two-sided normal interval, in standard deviations."""
    return NormalDist().inv_cdf(1 - error / 2)


def _power_sd() -> float:
    """Return the distance, in standard deviations, that gives a one-sided check its power."""
    return NormalDist().inv_cdf(POWER)


def _artanh(value: float) -> float:
    """Return artanh of a correlation, finite for a perfect one that was rounded to 1."""
    return math.atanh(max(-1 + 1e-12, min(value, 1 - 1e-12)))


def _smallest(enough: Callable[[int], bool]) -> int | None:
    """Return the smallest number of rows that is enough, by bisection; None if none is."""
    high = 1
    while not enough(high):
        high *= 2
        if high > _MOST_ROWS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return high
