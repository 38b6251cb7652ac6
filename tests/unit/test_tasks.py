"""What logits mean, task by task."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ad2kit.statistics.logits import answers, scores

LOGITS = np.array([[math.log(3.0), 0.0], [-1000.0, 1000.0]], dtype=np.float32)


def test_a_single_label_is_the_largest_and_its_probabilities_sum_to_one() -> None:
    assert answers("single_label", LOGITS).tolist() == [0, 1]
    assert scores("single_label", LOGITS) == pytest.approx(np.array([[0.75, 0.25], [0.0, 1.0]]))


def test_several_labels_are_those_above_one_half_each_by_itself() -> None:
    assert answers("multi_label", LOGITS).tolist() == [[1, 0], [0, 1]]
    assert scores("multi_label", LOGITS) == pytest.approx(np.array([[0.75, 0.5], [0.0, 1.0]]))


def test_the_answer_of_a_regression_is_its_output() -> None:
    values = np.array([[2.5], [-1.0]], dtype=np.float32)
    assert answers("regression", values).tolist() == [2.5, -1.0]
    assert scores("regression", values).tolist() == [[2.5], [-1.0]]
