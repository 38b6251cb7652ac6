"""Metrics against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ad2kit import metrics


def test_accuracy_and_recall() -> None:
    predicted, labels = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])
    assert metrics.accuracy(predicted, labels) == 0.75
    recall = metrics.recall_by_class(predicted, labels, ("a", "b", "never"))
    assert recall == {"a": pytest.approx(2 / 3), "b": 1.0}


def test_ece_of_a_worked_example() -> None:
    # Confidences 0.9, 0.9 (one right) and 0.6 (right), in two of ten bins.
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
    labels = np.array([0, 1, 0])
    expected = 2 / 3 * abs(0.9 - 0.5) + 1 / 3 * abs(0.6 - 1.0)
    assert metrics.expected_calibration_error(probabilities, labels, bins=10) == pytest.approx(
        expected
    )


def test_mcnemar_of_a_worked_example() -> None:
    # Ten discordant pairs, nine one way: 2 * (1 + 10) / 2**10.
    first = np.array([True] * 9 + [False] + [True] * 5)
    second = np.array([False] * 9 + [True] + [True] * 5)
    assert metrics.mcnemar_p(first, second) == pytest.approx(22 / 1024)
    assert metrics.mcnemar_p(first, first) == 1.0


def test_the_interval_of_identical_models_is_a_point_and_grows_with_disagreement() -> None:
    right = np.arange(500) % 10 != 0
    assert metrics.retained_interval(right, right, 500, seed=1) == (1.0, 1.0)
    other = np.roll(right, 3)
    low, high = metrics.retained_interval(other, right, 2000, seed=1)
    assert low < 1.0 < high
    # Delta method: sd of (a - b) / b with 100 discordant of 500 rows, accuracy 0.9.
    sd = np.sqrt(100) / 500 / 0.9
    assert high - low == pytest.approx(2 * 1.96 * sd, rel=0.1)
    assert metrics.retained_interval(other, right, 2000, seed=1) == (low, high)


def test_the_smallest_detectable_difference_shrinks_with_rows() -> None:
    first = np.ones(100, dtype=bool)
    second = first.copy()
    second[:4] = False
    assert metrics.smallest_detectable_difference(first, second) == pytest.approx(2.802 * 2 / 100)
    four_times = metrics.smallest_detectable_difference(np.tile(first, 4), np.tile(second, 4))
    assert four_times == pytest.approx(2.802 * 4 / 400)
