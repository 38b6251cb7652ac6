"""Selection of the weights that a training keeps: the rule, and its reason in words. No torch.

An update that was evaluated on ``select`` is good enough if its score is within one standard error
of the best score (the rule of Breiman, Friedman, Olshen and Stone, *Classification and Regression
Trees*, 1984, section 3.4.3; here the error of the paired difference). Among the good enough updates
the nearest to the teacher is kept. So few rows cannot distinguish their scores, but they can
distinguish the distances, which need no labels and use the whole logits. The distance alone could
keep a student that has learned little from an unsure teacher. Without a teacher the update with the
best score is kept; of equal scores the last one.

An update that answers every row alike is kept only if all updates do so.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ad2kit.statistics.metrics import paired_standard_errors
from ad2kit.training.records import Selection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ad2kit.run.sections import Metric
    from ad2kit.statistics.metrics import Array, Floats
    from ad2kit.training.records import SelectPoint


def good_enough(scores: Floats, errors: Floats) -> Array:
    """Return which scores are within their standard error of the best, bool [models].

    A score that is no less than one of these is good enough too, whatever its own error is.

    Args:
        scores: shape [models].
        errors: standard error of each model's difference from the best; shape [models].
    """
    lowest = scores[scores.max() - scores <= errors].min()
    return np.asarray(scores >= lowest)


def keep(
    points: Sequence[SelectPoint],
    answers: Sequence[Array],
    labels: Array,
    metrics: Sequence[Metric],
) -> Selection:
    """Choose one of the evaluated updates of a training; see the module docstring.

    Args:
        points: the evaluations in the order of the updates, at least one. Either all of them have
            a distance, or none has.
        answers: the answers of each point on ``select``.
        labels: the labels of ``select``.
        metrics: their mean is the score.
    """
    candidates = [index for index, point in enumerate(points) if not point.constant]
    if not candidates:
        candidates = list(range(len(points)))
    best = max(candidates, key=lambda index: (points[index].score, points[index].step))
    finalists = [best]
    if points[best].distance is not None:
        scores = np.array([points[index].score for index in candidates])
        models = [answers[index] for index in candidates]
        errors = paired_standard_errors(metrics, models, labels, candidates.index(best))
        is_enough = good_enough(scores, errors)
        finalists = [index for index, good in zip(candidates, is_enough, strict=True) if good]
    kept = min(finalists, key=lambda index: (_distance(points[index]), -points[index].step))
    return Selection(
        kept_step=points[kept].step,
        best_step=points[best].step,
        good_enough=len(finalists),
        points=tuple(points),
        reason=_reason(points, kept, best, len(finalists), " and ".join(metrics)),
    )


def beaten(points: Sequence[SelectPoint]) -> set[int]:
    """Return the updates that :func:`keep` cannot choose, whatever later evaluations bring."""
    return {point.step for point in points if any(_beats(other, point) for other in points)}


def _beats(one: SelectPoint, other: SelectPoint) -> bool:
    """Tell whether ``one`` is good enough whenever ``other`` is, and is then preferred to it."""
    if one.constant != other.constant:
        return other.constant
    if one.distance is None or other.distance is None:
        return (one.score, one.step) > (other.score, other.step)
    nearer = (one.distance, -one.step) < (other.distance, -other.step)
    return one.score >= other.score and nearer


def _distance(point: SelectPoint) -> float:
    """Return the distance from the teacher; infinity without a teacher."""
    return math.inf if point.distance is None else point.distance


def _reason(
    points: Sequence[SelectPoint], kept: int, best: int, finalists: int, metrics: str
) -> str:
    """Return the reason for the kept update, in words, with the scores of the best and the last.

    Args:
        points: the evaluations.
        kept: index of the kept point.
        best: index of the point with the best score.
        finalists: number of the good enough points.
        metrics: names of the metrics.
    """
    kept_point = points[kept]
    best_point = points[best]
    last_point = points[-1]
    text = f"kept update {kept_point.step} of {last_point.step}"
    if all(point.constant for point in points):
        return f"{text}: every update that was evaluated gives all rows the same answer"
    if kept_point.distance is None:
        text += f": the best {metrics} on select, {kept_point.score:.4f}"
    else:
        text += (
            f": the nearest to the teacher (distance {kept_point.distance:.4g}) of the {finalists} "
            f"whose {metrics} on select is within one standard error of the best, "
            f"{best_point.score:.4f} (update {best_point.step}); it has {kept_point.score:.4f}"
        )
    if last_point.step != kept_point.step:
        text += f"; the last has {last_point.score:.4f}"
        if last_point.distance is not None:
            text += f" (distance {last_point.distance:.4g})"
        if last_point.constant:
            text += ", and gives all rows the same answer"
    return text
