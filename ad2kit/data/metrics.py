"""Metrics and paired statistics over arrays of answers. No torch.

GLUE's own metrics (Wang et al., *GLUE: A Multi-Task Benchmark and Analysis Platform*, ICLR 2019):
accuracy, F1 of the positive class, Matthews correlation, Pearson and Spearman correlation. Where a
task has two, GLUE takes their mean, and so does :func:`score`.

scikit-learn and scipy are imported where they are needed: together they would take a third of the
time that `ad2kit distill` needs to start, and accuracy needs neither.
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

# For a standard error alone, whose own error is then 5 %.
_DRAWS_OF_AN_ERROR = 200
# Four of five samples find a difference of this many standard errors at the two-sided 5 % level.
_DETECTABLE_SE = 1.960 + 0.842
# Of bootstrap draws: as many of them say with some certainty where a tail begins.
_DRAWS_OF_A_TAIL = 25


class Bin(NamedTuple):
    """Rows of similar confidence: its mean, the accuracy on them, and how many they are."""

    confidence: float
    accuracy: float
    rows: int


def metric_value(metric: Metric, answers: Array, labels: Array) -> float:
    """Return one metric of ``answers`` against ``labels`` (shapes: :mod:`ad2kit.data.labels`).

    ``f1`` is of class 1 of two. A correlation with a constant is 0: no answer follows the labels.
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
    """Return which rows are answered right, bool [rows]; of several labels all have to be."""
    same = answers == labels
    return np.asarray(same.all(axis=1) if same.ndim == 2 else same)


def mean_metric(metrics: Sequence[Metric], answers: Array, labels: Array) -> float:
    """Return the mean of the metrics: the one number that judges a model on a task."""
    return float(np.mean([metric_value(metric, answers, labels) for metric in metrics]))


def recall_by_class(
    task: Task, answers: Array, labels: Array, names: tuple[str, ...]
) -> dict[str, float]:
    """Return recall for each class or label that occurs in ``labels``; none for a regression."""
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
    found = reliability(probabilities, labels, bins)
    return sum(abs(b.confidence - b.accuracy) * b.rows for b in found) / len(labels)


def reliability(probabilities: Floats, labels: Array, bins: int = 15) -> list[Bin]:
    """Return the bins of :func:`expected_calibration_error` that hold anything."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    index = np.minimum(np.ceil(confidence * bins).astype(int) - 1, bins - 1)
    return [
        Bin(
            float(confidence[index == b].mean()),
            float(right[index == b].mean()),
            int((index == b).sum()),
        )
        for b in np.unique(index)
    ]


def fit_temperature(task: Task, logits: Array, labels: Array) -> float:
    """Return the temperature that logits are divided by for the likeliest labels.

    Guo et al. 2017, section 4.2. It moves probabilities and no answer. For several labels the
    likelihood is that of all of them.

    Args:
        task: not a regression, which has no probabilities.
        logits: shape [rows, outputs], of rows that nothing was trained on.
        labels: see :mod:`ad2kit.data.labels`.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_expit, log_softmax

    def loss(log_temperature: float) -> float:
        scaled = logits.astype(np.float64) / np.exp(log_temperature)
        if task == "single_label":
            return -float(log_softmax(scaled, axis=1)[np.arange(len(labels)), labels].mean())
        return -float(np.where(labels == 1, log_expit(scaled), log_expit(-scaled)).mean())

    # Between a tenth and ten: beyond lies what a few rows without a single error ask for.
    found = minimize_scalar(loss, bounds=(np.log(0.1), np.log(10.0)), method="bounded")
    return float(np.exp(found.x))


def paired_bootstrap(
    metrics: Sequence[Metric], models: Sequence[Array], labels: Array, samples: int, seed: int
) -> Floats:
    """Return the scores of several models on the same bootstrap draws of the rows.

    Args:
        metrics: their mean is the score.
        models: the answers of each model.
        labels: of the rows.
        samples: number of draws, each of all rows with replacement.
        seed: of the draws.

    Returns:
        Shape [samples, models].
    """
    generator = np.random.default_rng(seed)
    found = np.empty((samples, len(models)))
    for sample in found:
        rows = generator.integers(len(labels), size=len(labels))
        sample[:] = [mean_metric(metrics, answers[rows], labels[rows]) for answers in models]
    return found


def paired_standard_errors(
    metrics: Sequence[Metric], models: Sequence[Array], labels: Array, reference: int
) -> Floats:
    """Return the standard error of the difference in score between each model and one of them.

    Of accuracy, a mean over rows, it is that of the mean difference per row; of all else the
    standard deviation over a paired bootstrap of 200 draws, always the same.

    Args:
        metrics: their mean is the score.
        models: the answers of each model.
        labels: of the rows.
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
    """Return the percentile interval of student over teacher, of bootstrap scores [n, 2].

    ``error`` is the chance that it misses the truth, half of it on either side. A tail that
    would hold too few of the draws begins where the normal distribution has it, measured by a
    larger tail that holds enough, and never nearer than the draws say: so the interval grows with
    every smaller error, also beyond what so many draws can show.

    Where the teacher scores nothing there is nothing to retain: such a draw counts as 0.
    """
    student, teacher = draws.T
    safe = np.where(teacher > 0, teacher, 1.0)
    retained, tail = np.where(teacher > 0, student / safe, 0.0), error / 2
    # With the fewest draws that a recipe may ask for, a quarter of them.
    known = max(tail, min(_DRAWS_OF_A_TAIL / len(draws), 0.25))
    shares = np.array([tail, known, 0.5, 1 - known, 1 - tail])
    least, low, middle, high, most = np.percentile(retained, 100 * shares).tolist()
    further = NormalDist().inv_cdf(tail) / NormalDist().inv_cdf(known)
    return min(least, middle - further * (middle - low)), max(
        most, middle + further * (high - middle)
    )


def smallest_detectable_difference(draws: Floats, rows: int) -> float:
    """Return the difference between two models that four of five such samples would find.

    Two-sided at 5 % with 80 % power, in the normal approximation, from the standard deviation of
    the difference over paired bootstrap scores [n, 2]; never finer than one of the ``rows``.
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
        second: of the other, for the same seeds.
        labels: of the rows.
        samples: number of random swaps.
        seed: of the swaps.
    """

    def difference(ours: Sequence[Array], theirs: Sequence[Array]) -> float:
        scores = [[mean_metric(metrics, a, labels) for a in method] for method in (ours, theirs)]
        return float(np.mean(scores[0]) - np.mean(scores[1]))

    observed = abs(difference(first, second))
    generator, at_least = np.random.default_rng(seed), 0
    for _ in range(samples):
        swap = generator.random(len(labels)) < 0.5
        mask = swap[:, None] if first[0].ndim == 2 else swap
        pairs = [
            (np.where(mask, b, a), np.where(mask, a, b)) for a, b in zip(first, second, strict=True)
        ]
        ours, theirs = zip(*pairs, strict=True)
        # A hair's breadth, so that a swap that changes nothing counts whatever the rounding.
        at_least += abs(difference(ours, theirs)) >= observed - 1e-12
    return (at_least + 1) / (samples + 1)


def mcnemar_p(first_right: NDArray[np.bool_], second_right: NDArray[np.bool_]) -> float:
    """Return the exact two-sided p-value of McNemar's test (1947) for two paired classifiers."""
    from scipy.stats import binomtest

    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second, 0.5).pvalue)
