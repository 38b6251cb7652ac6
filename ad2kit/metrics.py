"""Metrics and paired statistics over arrays of predictions. No torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, recall_score

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]
    Floats = NDArray[np.float64]


def accuracy(predicted: Ids, labels: Ids) -> float:
    """Return the fraction of ``predicted``, shape [rows], that equals ``labels``."""
    return float(accuracy_score(labels, predicted))


def recall_by_class(predicted: Ids, labels: Ids, names: tuple[str, ...]) -> dict[str, float]:
    """Return recall for each class that occurs in ``labels``."""
    present = np.unique(labels)
    values = recall_score(labels, predicted, labels=present, average=None, zero_division=0.0)
    return {names[index]: float(value) for index, value in zip(present, values, strict=True)}


def expected_calibration_error(probabilities: Floats, labels: Ids, bins: int = 15) -> float:
    """Return the ECE: the mean gap between confidence and accuracy over equal-width bins.

    Guo, Pleiss, Sun and Weinberger, *On Calibration of Modern Neural Networks*, 2017, equation 3.

    Args:
        probabilities: shape [rows, classes].
        labels: class ids, shape [rows].
        bins: number of bins of the confidence interval (0, 1].
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    index = np.minimum(np.ceil(confidence * bins).astype(int) - 1, bins - 1)
    gaps = [
        abs(confidence[index == b].mean() - right[index == b].mean()) * (index == b).mean()
        for b in np.unique(index)
    ]
    return float(sum(gaps))


def retained_interval(
    student_right: NDArray[np.bool_], teacher_right: NDArray[np.bool_], samples: int, seed: int
) -> tuple[float, float]:
    """Return the 95 % percentile interval of student accuracy over teacher accuracy.

    Paired bootstrap: rows are drawn with replacement and both models judged on the same draw.

    Args:
        student_right: whether the student was right, shape [rows].
        teacher_right: whether the teacher was right, shape [rows].
        samples: number of draws.
        seed: of the draws.
    """
    # Only the four joint outcomes matter, so a draw of all rows is one multinomial.
    joint = np.array([
        (student_right & teacher_right).sum(), (student_right & ~teacher_right).sum(),
        (~student_right & teacher_right).sum(), (~student_right & ~teacher_right).sum(),
    ])  # fmt: skip
    rows = int(joint.sum())
    draws = np.random.default_rng(seed).multinomial(rows, joint / rows, size=samples)
    student, teacher = draws[:, 0] + draws[:, 1], draws[:, 0] + draws[:, 2]
    low, high = np.percentile(student / np.maximum(teacher, 1), [2.5, 97.5])
    return float(low), float(high)


def mcnemar_p(first_right: NDArray[np.bool_], second_right: NDArray[np.bool_]) -> float:
    """Return the exact two-sided p-value of McNemar's test (1947) for two paired classifiers."""
    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second, 0.5).pvalue)


def smallest_detectable_difference(
    first_right: NDArray[np.bool_], second_right: NDArray[np.bool_]
) -> float:
    """Return the accuracy difference that McNemar's test finds in four of five such samples.

    Two-sided at 5 % with 80 % power, in the normal approximation, for as many discordant pairs as
    were seen (at least one).
    """
    discordant = max(1, int((first_right != second_right).sum()))
    return (1.960 + 0.842) * math.sqrt(discordant) / len(first_right)
