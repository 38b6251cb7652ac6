"""Question 2 of parity: what does a variant lose to the fp32 graph that it was made from?

The search for int8 asks it on ``select``, and the gate on the validation rows. Logits have shape
[rows, outputs].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ad2kit.data import metrics, sample_size
from ad2kit.data.labels import answers
from ad2kit.exporting.records import Check, RowsNeeded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ad2kit.data.sample_size import Estimate
    from ad2kit.run.sections import Metric, ParityRecipe, Task

    Logits = NDArray[np.float32]
    Texts = tuple[str, ...]


Question = Literal["export fidelity", "conversion cost", "distillation quality"]
# What keeps less than this share of its weights in 8 bits is a float model by another name.
LEAST_8_BITS = 0.5
POINTS_LOST = "points lost to fp32"


@dataclass(frozen=True)
class LabelledRows:
    """Labelled rows, and how answers to them are judged."""

    task: Task
    metrics: tuple[Metric, ...]
    labels: NDArray[Any]

    def score(self, logits: Logits) -> float:
        """Return the score of some logits by the metrics of the task."""
        return metrics.mean_metric(self.metrics, answers(self.task, logits), self.labels)


def conversion_cost(
    logits: Logits,
    alone: Logits,
    fp32: Logits,
    reference: LabelledRows,
    thresholds: ParityRecipe,
    seed: int | None = None,
) -> tuple[Check, ...]:
    """Question 2: a converted variant against fp32; all arrays run over the same rows.

    The activations of a dynamic int8 graph are quantised over the whole batch, so that an answer
    depends a little on its company: the variant is judged in batches and one by one.

    Without the ``seed`` of a bootstrap the points lost have no interval: what only compares
    candidates does without.
    """
    question: Question = "conversion cost"
    finite, finite_alone = (np.nan_to_num(found) for found in (logits, alone))
    worse = min(finite, finite_alone, key=reference.score)
    lost = 100 * (reference.score(fp32) - reference.score(worse))
    what = "label agreement with fp32"
    if reference.task == "regression":
        what = "correlation with fp32"  # there are no labels to agree on
    agreements = {what: finite, f"{what}, one by one": finite_alone}
    most, limit = thresholds.max_points_lost, thresholds.max_points_lost_upper
    return (
        at_most(question, "converted logits not finite", not_finite(logits) + not_finite(alone), 0),
        *(
            agrees(question, name, agreement(reference.task, found, fp32), thresholds)
            for name, found in agreements.items()
        ),
        at_most(question, POINTS_LOST, lost, most)
        if seed is None
        else estimated(
            question,
            POINTS_LOST,
            "at most",
            _points_lost(lost, worse, fp32, reference, thresholds.bootstrap_samples, seed),
            most,
            limit,
            best=0.0,
        ),
    )


def _points_lost(
    lost: float, converted: Logits, fp32: Logits, reference: LabelledRows, samples: int, seed: int
) -> Estimate:
    found = [answers(reference.task, each) for each in (fp32, converted)]
    draws = metrics.paired_bootstrap(reference.metrics, found, reference.labels, samples, seed)
    differences = 100 * (draws[:, 0] - draws[:, 1])
    tail = 100 * sample_size.ERROR / 2
    low, high = np.percentile(differences, [tail, 100 - tail]).tolist()
    rows = len(reference.labels)
    return sample_size.about_normal(lost, (low, high), float(differences.std()), rows, unit=100.0)


def agrees(question: Question, name: str, found: Estimate, thresholds: ParityRecipe) -> Check:
    """Return the check that so many answers stayed the same."""
    least, limit = thresholds.min_agreement, thresholds.min_agreement_lower
    return estimated(question, name, "at least", found, least, limit, best=1.0)


def mostly_8_bits(share: float) -> Check:
    """Question 2, for int8: ``share`` of the weights are stored in 8 bits."""
    return at_least("conversion cost", "share of weights in 8 bits", share, LEAST_8_BITS)


def agreement(task: Task, logits: Logits, fp32: Logits) -> Estimate:
    """Return the share of equal answers; for a regression, Pearson's correlation."""
    ours, theirs = answers(task, logits), answers(task, fp32)
    if task == "regression":
        return sample_size.correlation(metrics.metric_value("pearson", ours, theirs), len(ours))
    same = (ours == theirs).reshape(len(ours), -1)
    # Of several labels each row is a share: labels of one text are not independent.
    return sample_size.share(float(same.mean(axis=1).sum()), len(ours))


def estimated(
    question: Question,
    name: str,
    bound: Literal["at most", "at least"],
    found: Estimate,
    threshold: float,
    limit: float | None,
    *,
    best: float,
) -> Check:
    """Return the check of an estimate, and how many rows would show it.

    Args:
        question: that it belongs to.
        name: of the check.
        bound: on which side of ``threshold`` the value has to be.
        found: the value, its interval, and what more rows would show.
        threshold: for the value.
        limit: for the interval; None is none.
        best: the value of a perfect model.
    """
    stricter = max if bound == "at least" else min
    aim = threshold if limit is None else stricter(threshold, limit)
    truth = sample_size.supposed(found.value, aim, best)
    sign = 1 if bound == "at least" else -1
    least = -np.inf if limit is None else sign * limit
    needed = RowsNeeded(
        truth=truth, rows=found.rows_for(sign * truth, sign * threshold, least), present=found.rows
    )
    return Check(
        question=question,
        name=name,
        value=found.value,
        bound=bound,
        threshold=threshold,
        interval=found.interval,
        limit=limit,
        needed=needed,
    )


def at_most(question: Question, name: str, value: float, threshold: float) -> Check:
    """Return the check ``value <= threshold``; NaN fails."""
    return Check(question=question, name=name, value=value, bound="at most", threshold=threshold)


def at_least(question: Question, name: str, value: float, threshold: float) -> Check:
    """Return the check ``value >= threshold``; NaN fails."""
    return Check(question=question, name=name, value=value, bound="at least", threshold=threshold)


def not_finite(logits: Logits) -> int:
    """Return how many values are no number."""
    return int((~np.isfinite(logits)).sum())
