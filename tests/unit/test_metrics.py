"""Metrics against values worked out by hand."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ad2kit.statistics import metrics
from ad2kit.statistics.logits import softmax

if TYPE_CHECKING:
    from ad2kit.run.sections import Metric


def test_recall_by_class() -> None:
    predicted, labels = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])
    recall = metrics.recall_by_class("single_label", predicted, labels, ("a", "b", "never"))
    assert recall == {"a": pytest.approx(2 / 3), "b": 1.0}
    several = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0]])
    truth = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 0]])
    recall = metrics.recall_by_class("multi_label", several, truth, ("a", "b", "never"))
    assert recall == {"a": pytest.approx(2 / 3), "b": 1.0}
    assert metrics.recall_by_class("regression", np.ones(2), np.ones(2), ("x",)) == {}


# Four right of six: tp 2, fn 1, fp 1, tn 2.
ANSWERS, LABELS = np.array([1, 1, 0, 1, 0, 0]), np.array([1, 1, 1, 0, 0, 0])


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("accuracy", 4 / 6),
        ("f1", 2 * 2 / (2 * 2 + 1 + 1)),
        ("macro_f1", 2 / 3),
        ("matthews", (2 * 2 - 1 * 1) / (3 * 3 * 3 * 3) ** 0.5),
    ],
)
def test_classification_metrics_of_a_worked_example(metric: Metric, expected: float) -> None:
    assert metrics.metric_value(metric, ANSWERS, LABELS) == pytest.approx(expected)


def test_matthews_and_f1_of_an_uneven_example() -> None:
    # tp 5, fn 1, fp 2, tn 12.
    labels = np.repeat([1, 0], [6, 14])
    found = np.repeat([1, 0, 1, 0], [5, 1, 2, 12])
    expected = (5 * 12 - 2 * 1) / (7 * 6 * 14 * 13) ** 0.5
    assert metrics.metric_value("matthews", found, labels) == pytest.approx(expected)
    assert metrics.metric_value("f1", found, labels) == pytest.approx(10 / 13)
    both = metrics.mean_metric(("f1", "accuracy"), found, labels)
    assert both == pytest.approx((10 / 13 + 17 / 20) / 2)


def test_correlations_of_a_worked_example() -> None:
    answers, labels = np.array([1.0, 2.0, 3.0, 5.0]), np.array([1.0, 3.0, 2.0, 4.0])
    # Deviations (-1.75, -0.75, 0.25, 2.25) and (-1.5, 0.5, -0.5, 1.5).
    covariance = 1.75 * 1.5 - 0.75 * 0.5 - 0.25 * 0.5 + 2.25 * 1.5
    expected = covariance / (8.75 * 5.0) ** 0.5
    assert metrics.metric_value("pearson", answers, labels) == pytest.approx(expected)
    # Ranks 1 2 3 4 and 1 3 2 4: 1 - 6 * 2 / (4 * 15).
    assert metrics.metric_value("spearman", answers, labels) == pytest.approx(0.8)
    assert metrics.metric_value("pearson", np.ones(4), labels) == 0.0


def test_several_labels_are_judged_label_by_label_or_whole() -> None:
    labels = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]])
    answers = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0]])
    # Over all labels tp 2, fp 1, fn 1; per label F1 1, 2/3 and 0.
    assert metrics.metric_value("micro_f1", answers, labels) == pytest.approx(4 / 6)
    assert metrics.metric_value("macro_f1", answers, labels) == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert metrics.metric_value("accuracy", answers, labels) == pytest.approx(1 / 3)


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


def draws(student: Any, teacher: Any, labels: Any, samples: int = 2000) -> Any:
    return metrics.paired_bootstrap(("accuracy",), (student, teacher), labels, samples, seed=1)


def test_the_interval_of_identical_models_is_a_point_and_grows_with_disagreement() -> None:
    labels = np.ones(500, dtype=int)
    right = (np.arange(500) % 10 != 0).astype(int)
    assert metrics.retained_interval(draws(right, right, labels)) == (1.0, 1.0)
    other = np.roll(right, 3)
    low, high = metrics.retained_interval(draws(other, right, labels))
    assert low < 1.0 < high
    # Delta method: sd of (a - b) / b with 100 discordant of 500 rows, accuracy 0.9.
    sd = np.sqrt(100) / 500 / 0.9
    assert high - low == pytest.approx(2 * 1.96 * sd, rel=0.1)
    assert metrics.retained_interval(draws(other, right, labels)) == (low, high)


def drawn_shares(samples: int, seed: int, *cells: int) -> Any:
    """Bootstrap scores of a student and a teacher: right both, only the one, the other, neither."""
    rows = sum(cells)
    counts = np.random.default_rng(seed).multinomial(rows, np.array(cells) / rows, size=samples)
    return np.stack([counts[:, 0] + counts[:, 1], counts[:, 0] + counts[:, 2]], axis=1) / rows


def test_the_interval_grows_with_every_smaller_error_whatever_the_number_of_draws() -> None:
    for samples in (100, 200, 2000):
        few = drawn_shares(samples, 1, 740, 35, 45, 52)
        errors = [0.05 / 2**halvings for halvings in range(20)]
        found = [metrics.retained_interval(few, error) for error in errors]
        for (low, high), (lower, higher) in itertools.pairwise(found):
            assert lower < low < high < higher


@pytest.mark.parametrize("cells", [(740, 35, 45, 52), (779, 5, 10, 78), (595, 19, 15, 11)])
def test_a_tail_beyond_the_draws_lies_where_many_more_draws_put_it(cells: Any) -> None:
    many = drawn_shares(1_000_000, 2, *cells)
    retained = many[:, 0] / many[:, 1]
    for error in (0.05, 0.05 / 2**6, 0.05 / 2**9):  # the first look, the seventh, the tenth
        low, high = np.percentile(retained, [50 * error, 100 - 50 * error])
        found = np.array(
            [
                metrics.retained_interval(drawn_shares(2000, seed, *cells), error)
                for seed in range(20)
            ]
        )
        assert found.mean(axis=0) == pytest.approx([low, high], abs=0.06 * (high - low))
    # The control: for the tenth, the most extreme of 2,000 draws ends too early.
    few = drawn_shares(2000, 3, *cells)
    assert (few[:, 0] / few[:, 1]).min() > np.percentile(retained, 50 * 0.05 / 2**9)


def test_a_teacher_that_scores_nothing_leaves_nothing_to_retain() -> None:
    assert metrics.retained_interval(np.array([[0.5, 0.0]] * 100)) == (0.0, 0.0)


def test_the_smallest_detectable_difference_shrinks_with_rows() -> None:
    labels = np.ones(100, dtype=int)
    second = labels.copy()
    second[:4] = 0
    # The difference has the standard deviation sqrt(p (1 - p) / n) with p = 4 %.
    for times in (1, 4):
        found = metrics.smallest_detectable_difference(
            draws(np.tile(labels, times), np.tile(second, times), np.tile(labels, times)),
            100 * times,
        )
        assert found == pytest.approx(2.802 * (0.04 * 0.96 / (100 * times)) ** 0.5, rel=0.06)
    assert metrics.smallest_detectable_difference(np.ones((50, 2)), 100) == pytest.approx(0.02802)


def test_the_temperature_of_overconfident_logits_is_found() -> None:
    generator = np.random.default_rng(0)
    honest = generator.normal(size=(20_000, 3)) * 2
    probabilities = softmax(honest)
    labels = np.array([generator.choice(3, p=row) for row in probabilities])
    for factor in (0.5, 1.0, 4.0):
        found = metrics.fit_temperature("single_label", factor * honest, labels)
        assert found == pytest.approx(factor, rel=0.05)
    before = metrics.expected_calibration_error(softmax(4 * honest), labels)
    after = metrics.expected_calibration_error(softmax(4 * honest / 4), labels)
    assert after < 0.02 < before


def test_the_temperature_of_several_labels_is_that_of_all() -> None:
    generator = np.random.default_rng(0)
    honest = generator.normal(size=(20_000, 2)) * 2
    labels = (generator.random(honest.shape) < 1 / (1 + np.exp(-honest))).astype(np.int64)
    assert metrics.fit_temperature("multi_label", 3 * honest, labels) == pytest.approx(3, rel=0.05)


def test_rows_without_an_error_do_not_ask_for_certainty() -> None:
    logits = np.array([[3.0, 0.0], [0.0, 3.0]])
    assert metrics.fit_temperature("single_label", logits, np.array([0, 1])) >= 0.1


def test_reliability_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.45, 0.55], [0.4, 0.6]])
    (only,) = metrics.reliability(probabilities, np.array([0, 1, 1, 1]), bins=2)
    assert only.confidence == pytest.approx((0.9 + 0.8 + 0.55 + 0.6) / 4)
    assert (only.accuracy, only.rows) == (0.75, 4)
