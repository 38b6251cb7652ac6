"""Which weights of a training are kept: the rule, and what is said of it. No torch.

Of the updates that were evaluated on ``select``, those are good enough whose score is within one
standard error of the best (the rule of Breiman, Friedman, Olshen and Stone, *Classification and
Regression Trees*, 1984, section 3.4.3; here the error of the paired difference). Of these the
nearest to the teacher is kept: so few rows cannot tell their scores apart, and the distance, which
needs no labels and uses the whole of each answer, can. The distance alone would keep a student that
has learned little from a teacher that is not sure of itself. Where there is no teacher to be near
to, the best score is kept, and of equals the longer trained.

An update that gives every row the same answer is kept only if all do.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ad2kit.data.metrics import paired_standard_errors
from ad2kit.training.records import Selection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ad2kit.data.metrics import Array, Floats
    from ad2kit.run.sections import Metric
    from ad2kit.training.records import SelectPoint


def good_enough(scores: Floats, errors: Floats) -> Array:
    """Return which scores are within their standard error of the best, bool [models].

    What scores no less than one of these is good enough too, whatever its own error is.

    Args:
        scores: shape [models].
        errors: of each model's difference from the best, which has 0; shape [models].
    """
    lowest = scores[scores.max() - scores <= errors].min()
    return np.asarray(scores >= lowest)


def keep(
    points: Sequence[SelectPoint],
    answers: Sequence[Array],
    labels: Array,
    metrics: Sequence[Metric],
) -> Selection:
    """Choose one of the evaluated updates of a training; see the module.

    Args:
        points: in the order of the updates, at least one. All have a distance, or none has.
        answers: on ``select``, of each point.
        labels: of ``select``.
        metrics: their mean is the score.
    """
    pool = [i for i, point in enumerate(points) if not point.constant] or list(range(len(points)))
    best = max(pool, key=lambda i: (points[i].score, points[i].step))
    near = [best]
    if points[best].distance is not None:
        scores = np.array([points[i].score for i in pool])
        models = [answers[i] for i in pool]
        errors = paired_standard_errors(metrics, models, labels, pool.index(best))
        enough = good_enough(scores, errors)
        near = [i for i, good in zip(pool, enough, strict=True) if good]
    kept = min(near, key=lambda i: (_distance(points[i]), -points[i].step))
    return Selection(
        kept_step=points[kept].step,
        best_step=points[best].step,
        good_enough=len(near),
        points=tuple(points),
        reason=_reason(points, kept, best, len(near), " and ".join(metrics)),
    )


def beaten(points: Sequence[SelectPoint]) -> set[int]:
    """Return the updates that :func:`keep` cannot choose, whatever is evaluated after them."""
    return {point.step for point in points if any(_beats(other, point) for other in points)}


def _beats(one: SelectPoint, other: SelectPoint) -> bool:
    """Tell whether ``one`` is good enough wherever ``other`` is, and comes first then."""
    if one.constant != other.constant:
        return other.constant
    if one.distance is None or other.distance is None:
        return (one.score, one.step) > (other.score, other.step)
    nearer = (one.distance, -one.step) < (other.distance, -other.step)
    return one.score >= other.score and nearer


def _distance(point: SelectPoint) -> float:
    return math.inf if point.distance is None else point.distance


def _reason(points: Sequence[SelectPoint], kept: int, best: int, near: int, score: str) -> str:
    """Return in words what was kept, why, and what the best and the last had."""
    ours, last = points[kept], points[-1]
    text = f"kept update {ours.step} of {last.step}"
    if all(point.constant for point in points):
        return f"{text}: every update that was evaluated gives all rows the same answer"
    if ours.distance is None:
        text += f": the best {score} on select, {ours.score:.4f}"
    else:
        text += (
            f": the nearest to the teacher (distance {ours.distance:.4g}) of the {near} whose "
            f"{score} on select is within one standard error of the best, "
            f"{points[best].score:.4f} (update {points[best].step}); it has {ours.score:.4f}"
        )
    if last.step != ours.step:
        far = "" if last.distance is None else f" (distance {last.distance:.4g})"
        text += f"; the last has {last.score:.4f}{far}"
        text += ", and gives all rows the same answer" * last.constant
    return text
