"""Question 2 of parity: how much does a variant lose to the fp32 graph that it was made from?

The search for int8 asks the question on ``select``, and the gate on the validation rows. Logits
have shape [rows, outputs].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ad2kit.exporting.records import Check, Company, RowsNeeded
from ad2kit.statistics import metrics, sample_size
from ad2kit.statistics.logits import answers, scores

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ad2kit.run.sections import Metric, ParityRecipe, Task
    from ad2kit.statistics.sample_size import Estimate

    Logits = NDArray[np.float32]
    Texts = tuple[str, ...]


Question = Literal["export fidelity", "conversion cost", "distillation quality"]
# An int8 variant with a smaller share of its weights in 8 bits is mostly a float model.
LEAST_8_BITS = 0.5
POINTS_LOST = "points lost to fp32"
# In standard deviations: the most that company may move the answer of a regression by default.
_MOST_OF_A_VALUE = 0.5


@dataclass(frozen=True)
class LabelledRows:
    """Labelled rows, with the task and the metrics that judge answers to them."""

    task: Task
    metrics: tuple[Metric, ...]
    labels: NDArray[Any]

    @property
    def spread(self) -> float:
        """The standard deviation of the labels of a regression; 1 for other tasks."""
        return float(np.std(self.labels)) if self.task == "regression" else 1.0

    def score(self, logits: Logits) -> float:
        """Return the mean of the metrics for logits of shape [rows, outputs]."""
        return metrics.mean_metric(self.metrics, answers(self.task, logits), self.labels)


def conversion_cost(
    logits: Logits,
    alone: Logits,
    fp32: Logits,
    reference: LabelledRows,
    thresholds: ParityRecipe,
    seed: int | None = None,
) -> tuple[Check, ...]:
    """Question 2: compare a converted variant with fp32; all arrays have the same rows.

    A dynamic int8 graph quantises the activations of a whole batch together, so an answer depends
    a little on the other texts of its batch. So the variant is judged in batches and one by one.

    Args:
        logits: the logits of the variant, computed in batches, shape [rows, outputs].
        alone: the logits of the variant, computed one by one.
        fp32: the logits of the fp32 graph.
        reference: the labels of the same rows.
        thresholds: those of the recipe.
        seed: the seed of a bootstrap. If None, the points lost have no interval; a comparison of
            candidates needs none.
    """
    question: Question = "conversion cost"
    finite = np.nan_to_num(logits)
    finite_alone = np.nan_to_num(alone)
    worse = min(finite, finite_alone, key=reference.score)
    lost = 100 * (reference.score(fp32) - reference.score(worse))
    agreement_name = "label agreement with fp32"
    if reference.task == "regression":
        agreement_name = "correlation with fp32"  # there are no labels to agree on
    logits_by_check = {agreement_name: finite, f"{agreement_name}, one by one": finite_alone}
    if seed is None:
        points_lost = at_most(question, POINTS_LOST, lost, thresholds.max_points_lost)
    else:
        points_lost = estimated(
            question,
            POINTS_LOST,
            "at most",
            _points_lost(lost, worse, fp32, reference, thresholds.bootstrap_samples, seed),
            thresholds.max_points_lost,
            thresholds.max_points_lost_upper,
            best=0.0,
        )
    return (
        at_most(question, "converted logits not finite", not_finite(logits) + not_finite(alone), 0),
        *(
            agrees(question, name, agreement(reference.task, converted, fp32), thresholds)
            for name, converted in logits_by_check.items()
        ),
        points_lost,
    )


def company_of(
    task: Task, alone: Logits, beside: Logits, *, temperature: float = 1.0, spread: float = 1.0
) -> Company:
    """Compare the answers to texts alone with those in batches of others.

    A text whose logits are not finite counts as one whose answer changed.

    Args:
        task: the task, which says what the logits mean.
        alone: the logits of the texts one by one, shape [texts, outputs].
        beside: the logits of the same texts in batches of others.
        temperature: the divisor of the logits that are served.
        spread: the standard deviation of the values of a regression.
    """
    unknown = ~(np.isfinite(alone) & np.isfinite(beside)).all(axis=1)
    alone, beside = np.nan_to_num(alone), np.nan_to_num(beside)
    served = [scores(task, logits / temperature) for logits in (alone, beside)]
    moved = np.abs(served[0] - served[1])
    changed = unknown
    if task == "regression":
        moved = moved / spread
    else:
        differs = answers(task, alone) != answers(task, beside)
        changed = unknown | differs.reshape(len(alone), -1).any(axis=1)
    return Company(texts=len(alone), flips=float(changed.mean()), shift=float(moved.max()))


def company_checks(company: Company, task: Task, thresholds: ParityRecipe) -> tuple[Check, ...]:
    """Question 2: return the checks of answers that depend on the texts beside them."""
    question: Question = "conversion cost"
    most = thresholds.max_company_shift
    if task == "regression":
        name = "answer moved by company, in standard deviations"
        moved = at_most(question, name, company.shift, _MOST_OF_A_VALUE if most is None else most)
        if not company.flips:
            return (moved,)
        return (at_most(question, "answers that company makes no number", company.flips, 0), moved)
    flips = at_most(
        question, "answers changed by company", company.flips, thresholds.max_company_flips
    )
    if most is None:
        return (flips,)
    return (flips, at_most(question, "probability moved by company", company.shift, most))


def _points_lost(
    lost: float, converted: Logits, fp32: Logits, reference: LabelledRows, samples: int, seed: int
) -> Estimate:
    """Return ``lost``, the points lost to fp32, with the interval of a paired bootstrap."""
    predictions = [answers(reference.task, logits) for logits in (fp32, converted)]
    draws = metrics.paired_bootstrap(
        reference.metrics, predictions, reference.labels, samples, seed
    )
    differences = 100 * (draws[:, 0] - draws[:, 1])
    tail = 100 * sample_size.ERROR / 2
    low, high = np.percentile(differences, [tail, 100 - tail]).tolist()
    rows = len(reference.labels)
    return sample_size.about_normal(lost, (low, high), float(differences.std()), rows, unit=100.0)


def agrees(question: Question, name: str, estimate: Estimate, thresholds: ParityRecipe) -> Check:
    """Return the check that enough answers stayed the same; ``estimate`` is their agreement."""
    return estimated(
        question,
        name,
        "at least",
        estimate,
        thresholds.min_agreement,
        thresholds.min_agreement_lower,
        best=1.0,
    )


def mostly_8_bits(share: float) -> Check:
    """Question 2, for int8: return the check of the ``share`` of weights in 8 bits."""
    return at_least("conversion cost", "share of weights in 8 bits", share, LEAST_8_BITS)


def agreement(task: Task, logits: Logits, fp32: Logits) -> Estimate:
    """Return the share of equal answers; for a regression, Pearson's correlation.

    Args:
        task: the task, which says what the logits mean.
        logits: the logits of a variant, shape [rows, outputs].
        fp32: the logits of the fp32 graph, of the same shape.
    """
    predictions = answers(task, logits)
    fp32_predictions = answers(task, fp32)
    rows = len(predictions)
    if task == "regression":
        pearson = metrics.metric_value("pearson", predictions, fp32_predictions)
        return sample_size.correlation(pearson, rows)
    is_equal = (predictions == fp32_predictions).reshape(rows, -1)
    # A row with several labels counts as a share, because the labels of one text are dependent.
    return sample_size.share(float(is_equal.mean(axis=1).sum()), rows)


def estimated(
    question: Question,
    name: str,
    bound: Literal["at most", "at least"],
    estimate: Estimate,
    threshold: float,
    limit: float | None,
    *,
    best: float,
) -> Check:
    """Return the check of an estimate, with the number of rows that would show it.

    Args:
        question: the question that the check belongs to.
        name: the name of the check.
        bound: the side of ``threshold`` on which the value has to be.
        estimate: the estimate: the value, its interval, and the rows that other values need.
        threshold: the threshold for the value.
        limit: the limit for the interval; None means no limit.
        best: the value of a perfect model.
    """
    stricter = max if bound == "at least" else min
    target = threshold if limit is None else stricter(threshold, limit)
    truth = sample_size.supposed(estimate.value, target, best)
    # With this sign a larger value is better, for both bounds.
    sign = 1 if bound == "at least" else -1
    lower_limit = -np.inf if limit is None else sign * limit
    rows = estimate.rows_for(sign * truth, sign * threshold, lower_limit)
    needed = RowsNeeded(truth=truth, rows=rows, present=estimate.rows)
    return Check(
        question=question,
        name=name,
        value=estimate.value,
        bound=bound,
        threshold=threshold,
        interval=estimate.interval,
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
    """Return the number of logits that are NaN or infinite."""
    return int((~np.isfinite(logits)).sum())
