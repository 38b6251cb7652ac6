"""What so many rows can show: intervals, rows that a check needs, the test for lost classes.

A check of an estimate has a *target* for the estimate and a *limit* for its interval. It is passed
if the estimate reaches the target and the interval does not cross the limit; it has failed if the
whole interval misses the target; otherwise so many rows do not show which of the two it is
(:class:`ad2kit.exporting.records.Check`). All functions here speak of bounds from below; for a
bound from above the signs change.

scipy is imported where it is needed, see :mod:`ad2kit.data.metrics`.
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
"""The chance that an interval misses the truth, and that the test for lost classes finds one."""

POWER = 0.8
"""So many of the samples of the named number of rows show what is true."""

_MOST_ROWS = 10**9


@dataclass(frozen=True)
class Estimate:
    """A value that was measured on so many rows, its interval, and what more rows would show.

    ``rows_for`` takes a true value, a target and a limit, and returns the rows that show it.
    """

    value: float
    interval: Interval
    rows: int
    rows_for: RowsFor


def share(hits: float, rows: int) -> Estimate:
    """Return the share of the rows that are hits, with the exact interval.

    Clopper and Pearson, *The use of confidence or fiducial limits illustrated in the case of the
    binomial*, Biometrika 1934, by quantiles of the beta distribution. Where each row is itself a
    share between 0 and 1 (of several labels, say), ``hits`` is their sum: no such values vary more
    than zeros and ones of the same mean, so that the interval is too wide rather than too narrow.
    """
    from scipy.stats import beta

    tail, missed = ERROR / 2, rows - hits
    low = 0.0 if hits <= 0 else float(beta.ppf(tail, hits, missed + 1))
    high = 1.0 if missed <= 0 else float(beta.ppf(1 - tail, hits + 1, missed))
    return Estimate(hits / rows, (low, high), rows, rows_for_share)


def rows_for_share(truth: float, target: float, limit: float) -> int | None:
    """Return how many rows show a share, see :func:`share`; None if no number does.

    Exact, by the binomial distribution: the least number of hits that passes, and the chance of as
    many. The chance rises in teeth, one for each further miss that passes; the answer lies on the
    first tooth on which it is large enough in the mean, where it is large enough itself.
    """
    from scipy.stats import binom

    if limit >= 1 or truth < target:
        return None
    tooth = np.arange(math.ceil(1 / max(1 - max(limit, target), 1e-3)) + 1)

    def chances(rows: int) -> NDArray[np.float64]:
        several = rows + tooth
        # The lower end of the interval reaches the limit where so many hits are too many for it.
        least = binom.isf(ERROR / 2, several, limit) + 1 if limit > 0 else np.zeros(len(several))
        least = np.maximum(least, np.ceil(target * several - 1e-9))
        return np.asarray(binom.sf(least - 1, several, truth))

    rows = _smallest(lambda rows: bool(chances(rows).mean() >= POWER))
    if rows is None:
        return None
    return rows + int(np.argmax(chances(rows) >= POWER))


def correlation(value: float, rows: int) -> Estimate:
    """Return Pearson's correlation of two answers to ``rows`` rows, with its interval.

    Fisher's transformation: artanh of it is normal with the standard deviation 1 / sqrt(rows - 3)
    (Fisher, *On the probable error of a coefficient of correlation*, Metron 1921).
    """
    if rows <= 3 or not math.isfinite(value):
        return Estimate(value, (-1.0, 1.0), rows, rows_for_correlation)
    middle, half = _artanh(value), _quantile(ERROR) / math.sqrt(rows - 3)
    return Estimate(
        value, (math.tanh(middle - half), math.tanh(middle + half)), rows, rows_for_correlation
    )


def rows_for_correlation(truth: float, target: float, limit: float) -> int | None:
    """Return how many rows show a correlation, see :func:`correlation`; None if no number does."""
    truth, target, limit = map(_artanh, (truth, target, limit))

    def enough(rows: int) -> bool:
        sd = 1 / math.sqrt(rows)
        return truth - max(target, limit + _quantile(ERROR) * sd) >= _power_sd() * sd

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

    Its interval is widened to what could hide behind so few rows: where no row speaks against
    a value, all draws of a bootstrap are the same, and their interval is a point.

    Args:
        value: the estimate.
        interval: of the error ``error``.
        deviation: the standard deviation of the estimate.
        rows: that it was measured on.
        unit: by how much the estimate changes if the answers to all rows change.
        error: the chance that the interval misses the truth.
    """
    hidden = unit * unseen(rows, error)
    low, high = interval
    widened = min(low, value - hidden), max(high, value + hidden)
    of_one = deviation * math.sqrt(rows)

    def rows_for(truth: float, target: float, limit: float) -> int | None:
        return rows_for_mean(truth, target, limit, of_one, unit=unit, error=error)

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
    """Return how many rows show a mean, see :func:`about_normal`; None if no number does.

    In the normal approximation: the estimate passes from the target, or the limit and half of its
    interval, on, whichever is more, and has to lie there with the chance :data:`POWER`.
    ``deviation`` is that of one row: of n rows it is this over the square root of n.
    """

    def enough(rows: int) -> bool:
        least = max(target, limit + half_width(deviation, rows, unit=unit, error=error))
        return truth - least >= _power_sd() * deviation / math.sqrt(rows)

    return _smallest(enough)


def half_width(deviation: float, rows: int, *, unit: float = 1.0, error: float = ERROR) -> float:
    """Return how far the interval of :func:`about_normal` will reach on so many rows."""
    return max(_quantile(error) * deviation / math.sqrt(rows), unit * unseen(rows, error))


def unseen(rows: int, error: float = ERROR) -> float:
    """Return the largest share of a kind of rows that so many rows can be expected to show one of.

    The upper end of Clopper and Pearson's interval for no row of ``rows``.
    """
    return float(-math.expm1(math.log(error / 2) / rows))


def supposed(value: float, target: float, best: float) -> float:
    """Return the true value for which rows are counted: what was measured, or a better one.

    At least half way from the target to the best value: a value at the target is shown by no
    number of rows, and one near to it only by a great many.
    """
    half_way = (target + best) / 2
    if not math.isfinite(value):
        return half_way
    return max(value, half_way) if best >= target else min(value, half_way)


class LostClasses(NamedTuple):
    """Ids of classes that a student has lost, and of those with too few rows to say so.

    ``given`` counts the rows on which the teacher gives each class, ``kept`` those of them on which
    the student gives it too; both of shape [classes].
    """

    lost: tuple[int, ...]
    too_few: tuple[int, ...]
    given: NDArray[np.int64]
    kept: NDArray[np.int64]


def lost_classes(
    task: Task, ours: NDArray[Any], teacher: NDArray[Any], classes: int
) -> LostClasses:
    """Return the classes (or labels) that a student no longer gives where its teacher does.

    A class is lost if the student gives it on fewer than half of the rows on which the teacher
    gives it: one-sided exact binomial tests against one half, one for each class that the teacher
    gives. Holm's correction (*A simple sequentially rejective multiple test procedure*, 1979) keeps
    the chance to call any class lost that is not below :data:`ERROR`, however many there are.
    A class has too few rows if not even a student that never gives it would be found.

    Args:
        task: not a regression.
        ours: answers of the student, see :func:`ad2kit.data.labels.answers`.
        teacher: of the teacher, to the same rows.
        classes: how many there are.
    """
    from scipy.stats import binom

    if task == "single_label":
        given = np.bincount(teacher, minlength=classes)
        kept = np.bincount(teacher[ours == teacher], minlength=classes)
    else:
        given = (teacher == 1).sum(axis=0)
        kept = ((teacher == 1) & (ours == 1)).sum(axis=0)
    tested = np.flatnonzero(given)
    p = binom.cdf(kept[tested], given[tested], 0.5)
    lost = list[int]()
    for place, index in enumerate(np.argsort(p, kind="stable")):
        if p[index] > ERROR / (len(tested) - place):
            break
        lost.append(int(tested[index]))
    least = least_rows_of_a_class(len(tested))
    too_few = [int(each) for each in tested if given[each] < least and each not in lost]
    return LostClasses(tuple(sorted(lost)), tuple(too_few), given, kept)


def least_rows_of_a_class(classes: int) -> int:
    """Return how many rows of a class show that it is lost, if the student never gives it.

    The smallest p-value of n rows is 2 to the power of -n, and the first step of Holm's correction
    compares it with the error over the number of classes.
    """
    return math.ceil(math.log2(max(classes, 1) / ERROR))


def _quantile(error: float) -> float:
    """Return how many standard deviations a two-sided interval reaches to either side."""
    return NormalDist().inv_cdf(1 - error / 2)


def _power_sd() -> float:
    return NormalDist().inv_cdf(POWER)


def _artanh(value: float) -> float:
    """Return artanh of a correlation, finite for a perfect one that was rounded to 1."""
    return math.atanh(max(-1 + 1e-12, min(value, 1 - 1e-12)))


def _smallest(enough: Callable[[int], bool]) -> int | None:
    """Return the smallest number of rows that is enough; None if none is."""
    high = 1
    while not enough(high):
        high *= 2
        if high > _MOST_ROWS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
