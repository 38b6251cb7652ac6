"""Metrics and paired statistics over arrays of answers. No torch.

GLUE's own metrics (Wang et al., *GLUE: A Multi-Task Benchmark and Analysis Platform*, ICLR 2019):
accuracy, F1 of the positive class, Matthews correlation, Pearson and Spearman correlation. Where a
task has two, GLUE takes their mean, and so does :func:`score`.

scikit-learn and scipy are imported inside the functions that need them: together they would take a
third of the time that `ad2kit distill` needs to start, and accuracy needs neither.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ad2kit.run.sections import Metric, Task

    Array = NDArray[Any]
    Floats = NDArray[np.float64]

# Bootstrap draws for a standard error; its own relative error is then 5 %.
_DRAWS_OF_AN_ERROR = 200
# Four of five samples find a difference of this many standard errors at the two-sided 5 % level.
_DETECTABLE_SE = 1.960 + 0.842
# The number of bootstrap draws in a tail that locates the start of the tail well enough.
_DRAWS_OF_A_TAIL = 25


class Bin(NamedTuple):
    """Rows of similar confidence: their mean confidence, their accuracy and their number."""

    confidence: float
    accuracy: float
    rows: int


def metric_value(metric: Metric, answers: Array, labels: Array) -> float:
    """Return one metric of ``answers`` against ``labels`` (shapes: :mod:`ad2kit.data.labels`).

    ``f1`` is the F1 score of class 1 of two classes. A correlation with a constant is set to 0.
    """
    if metric == "accuracy":
        return float(_right(answers, labels).mean())
    if metric == "matthews":
        from sklearn.metrics import matthews_corrcoef

        return float(matthews_corrcoef(labels, answers))
    if metric in ("pearson", "spearman"):
        from scipy.stats import pearsonr, spearmanr

        if np.ptp(answers) == 0 or np.ptp(labels) == 0:
            return 0.0
        correlate = pearsonr if metric == "pearson" else spearmanr
        return float(correlate(answers, labels).statistic)
    from sklearn.metrics import f1_score

    average = {"f1": "binary", "macro_f1": "macro", "micro_f1": "micro"}[metric]
    return float(f1_score(labels, answers, average=average, zero_division=0.0))


def _right(answers: Array, labels: Array) -> Array:
    """Return which rows are answered right, bool [rows]; with several labels all must be right."""
    equal = answers == labels
    return np.asarray(equal.all(axis=1) if equal.ndim == 2 else equal)


def mean_metric(metrics: Sequence[Metric], answers: Array, labels: Array) -> float:
    """Return the mean of the metrics: the one number that judges a model on a task."""
    return float(np.mean([metric_value(metric, answers, labels) for metric in metrics]))


def recall_by_class(
    task: Task, answers: Array, labels: Array, names: tuple[str, ...]
) -> dict[str, float]:
    """Return the recall of each class that occurs in ``labels``; empty for a regression."""
    if task == "regression":
        return {}
    from sklearn.metrics import recall_score

    present = np.unique(labels) if task == "single_label" else np.flatnonzero(labels.any(axis=0))
    values = recall_score(labels, answers, labels=present, average=None, zero_division=0.0)
    return {names[index]: float(value) for index, value in zip(present, values, strict=True)}


def expected_calibration_error(probabilities: Floats, labels: Array, bins: int = 15) -> float:
    """Return the ECE: the mean gap between confidence and accuracy over equal-width bins.

    Guo, Pleiss, Sun and Weinberger, *On Calibration of Modern Neural Networks*, 2017, equation 3.

    Args:
        probabilities: shape [rows, classes].
        labels: class ids, shape [rows].
        bins: number of bins of the confidence interval (0, 1].
    """
    gaps = [
        abs(each.confidence - each.accuracy) * each.rows
        for each in reliability(probabilities, labels, bins)
    ]
    return sum(gaps) / len(labels)


def reliability(probabilities: Floats, labels: Array, bins: int = 15) -> list[Bin]:
    """Return the bins of :func:`expected_calibration_error` that hold at least one row."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    bin_of_row = np.minimum(np.ceil(confidence * bins).astype(int) - 1, bins - 1)
    return [
        Bin(
            confidence=float(confidence[bin_of_row == index].mean()),
            accuracy=float(right[bin_of_row == index].mean()),
            rows=int((bin_of_row == index).sum()),
        )
        for index in np.unique(bin_of_row)
    ]


def fit_temperature(task: Task, logits: Array, labels: Array) -> float:
    """Return the temperature that maximises the likelihood of the labels; logits are divided by it.

    Guo et al. 2017, section 4.2. A temperature changes probabilities but no answer. For several
    labels the likelihood is the product over all labels.

    Args:
        task: not a regression, which has no probabilities.
        logits: shape [rows, outputs], of rows that no model was trained on.
        labels: see :mod:`ad2kit.data.labels`.

    Returns:
        A temperature between 0.1 and 10.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_expit, log_softmax

    def loss(log_temperature: float) -> float:
        scaled = logits.astype(np.float64) / np.exp(log_temperature)
        if task == "single_label":
            return -float(log_softmax(scaled, axis=1)[np.arange(len(labels)), labels].mean())
        return -float(np.where(labels == 1, log_expit(scaled), log_expit(-scaled)).mean())

    # Between 0.1 and 10: only a few rows without a single error would ask for more.
    optimum = minimize_scalar(loss, bounds=(np.log(0.1), np.log(10.0)), method="bounded")
    return float(np.exp(optimum.x))


def paired_bootstrap(
    metrics: Sequence[Metric], models: Sequence[Array], labels: Array, samples: int, seed: int
) -> Floats:
    """Return the scores of several models on the same bootstrap draws of the rows.

    Args:
        metrics: their mean is the score.
        models: the answers of each model.
        labels: labels of the rows.
        samples: number of draws; each draws as many rows as there are, with replacement.
        seed: seed of the draws.

    Returns:
        Shape [samples, models].
    """
    generator = np.random.default_rng(seed)
    scores = np.empty((samples, len(models)))
    for sample_scores in scores:
        rows = generator.integers(len(labels), size=len(labels))
        sample_scores[:] = [mean_metric(metrics, answers[rows], labels[rows]) for answers in models]
    return scores


def paired_standard_errors(
    metrics: Sequence[Metric], models: Sequence[Array], labels: Array, reference: int
) -> Floats:
    """Return the standard error of the difference in score between each model and a reference.

    For accuracy, a mean over rows, it is the standard error of the mean difference per row. For
    other metrics it is the standard deviation over a paired bootstrap of 200 draws with a fixed
    seed.

    Args:
        metrics: their mean is the score.
        models: the answers of each model.
        labels: labels of the rows.
        reference: the index of the model that the others are compared with.

    Returns:
        Shape [models]; 0 for the reference.
    """
    if set(metrics) == {"accuracy"}:
        right = np.stack([_right(answers, labels) for answers in models]).astype(np.float64)
        return np.asarray((right - right[reference]).std(axis=1) / np.sqrt(len(labels)))
    draws = paired_bootstrap(metrics, models, labels, _DRAWS_OF_AN_ERROR, seed=0)
    return np.asarray((draws - draws[:, [reference]]).std(axis=0))


def retained_interval(draws: Floats, error: float = 0.05) -> tuple[float, float]:
    """Return the percentile interval of the student's score over the teacher's score.

    A tail with too few draws is extrapolated: the normal distribution gives its start from the
    start of a larger tail that holds enough draws, but never nearer to the median than the draws
    say. So the interval grows with every smaller error, also where the draws are too few to show
    it.

    A draw in which the teacher scores 0 counts as 0, because there is nothing to retain.

    Args:
        draws: bootstrap scores of student and teacher, shape [n, 2].
        error: the probability that the interval misses the true value, half of it on either side.
    """
    student, teacher = draws.T
    divisor = np.where(teacher > 0, teacher, 1.0)
    retained = np.where(teacher > 0, student / divisor, 0.0)
    tail = error / 2
    # With the fewest draws that a recipe may ask for, a quarter of them.
    known_tail = max(tail, min(_DRAWS_OF_A_TAIL / len(draws), 0.25))
    shares = np.array([tail, known_tail, 0.5, 1 - known_tail, 1 - tail])
    lowest, low, median, high, highest = np.percentile(retained, 100 * shares).tolist()
    extension = NormalDist().inv_cdf(tail) / NormalDist().inv_cdf(known_tail)
    lower = min(lowest, median - extension * (median - low))
    upper = max(highest, median + extension * (high - median))
    return lower, upper


def smallest_detectable_difference(draws: Floats, rows: int) -> float:
    """Return the difference between two models that four of five such samples would detect.

    The test is two-sided at 5 % with 80 % power, in the normal approximation. The standard error is
    the standard deviation of the difference over paired bootstrap scores [n, 2], and at least the
    share of one of the ``rows``.
    """
    deviation = float((draws[:, 0] - draws[:, 1]).std())
    return _DETECTABLE_SE * max(deviation, 1 / rows)


def randomisation_p(
    metrics: Sequence[Metric],
    first: Sequence[Array],
    second: Sequence[Array],
    labels: Array,
    samples: int,
    seed: int,
) -> float:
    """Return the two-sided p-value of an approximate randomisation test of two methods.

    Yeh, *More accurate tests for the statistical significance of result differences*, COLING
    2000: if the methods were the same, swapping their answers on any row would change nothing.

    Args:
        metrics: their mean is the score.
        first: answers of one method, for each seed.
        second: answers of the other method, for the same seeds.
        labels: labels of the rows.
        samples: number of random swaps.
        seed: seed of the swaps.
    """

    def mean_score(method: Sequence[Array]) -> Any:
        return np.mean([mean_metric(metrics, answers, labels) for answers in method])

    observed = abs(float(mean_score(first) - mean_score(second)))
    generator = np.random.default_rng(seed)
    at_least_observed = 0
    for _ in range(samples):
        swapped_rows = generator.random(len(labels)) < 0.5
        mask = swapped_rows[:, None] if first[0].ndim == 2 else swapped_rows
        pairs = list(zip(first, second, strict=True))
        swapped_first = [np.where(mask, other, one) for one, other in pairs]
        swapped_second = [np.where(mask, one, other) for one, other in pairs]
        swapped = abs(float(mean_score(swapped_first) - mean_score(swapped_second)))
        # The tolerance makes a swap that changes nothing count in spite of rounding.
        at_least_observed += swapped >= observed - 1e-12
    return (at_least_observed + 1) / (samples + 1)


def mcnemar_p(first_right: NDArray[np.bool_], second_right: NDArray[np.bool_]) -> float:
    """Return the exact two-sided p-value of McNemar's test (1947) for two paired classifiers."""
    from scipy.stats import binomtest

    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second, 0.5).pvalue)
