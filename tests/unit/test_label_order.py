"""A permuted teacher is caught, and a weak one is not called permuted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ad2kit.run.errors import ModelError
from ad2kit.statistics.label_order import better_order, check_given_order, check_order, numbers_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

SEEDS = range(100)


def told(labels: Array, outputs: int, accuracy: float, bias: float, seed: int) -> Array:
    """Answers that are right on a share of the rows; the others do not depend on the text.

    The smaller ``bias`` is, the fewer outputs do these fall on.
    """
    generator = np.random.default_rng([seed, 1])
    chances = generator.dirichlet(np.full(outputs, bias))
    guesses = generator.choice(outputs, len(labels), p=chances)
    return np.where(generator.random(len(labels)) < accuracy, labels, guesses)


def classes(outputs: int, rows: int, seed: int, skew: float = 100.0) -> Array:
    generator = np.random.default_rng([seed, 0])
    return generator.choice(outputs, rows, p=generator.dirichlet(np.full(outputs, skew)))


@pytest.mark.parametrize(("outputs", "rows"), [(2, 100), (3, 100), (12, 200), (150, 600)])
@pytest.mark.parametrize("accuracy", [0.8, 1.0])
def test_a_permuted_teacher_is_caught(outputs: int, rows: int, accuracy: float) -> None:
    for seed in range(20):
        labels = classes(outputs, rows, seed)
        answers = told(labels, outputs, accuracy, 100.0, seed)
        assert better_order("single_label", answers, labels, outputs) is None
        cycle, order = np.random.default_rng(seed).permutation(outputs), np.empty(outputs, int)
        order[cycle] = np.roll(cycle, 1)  # no output keeps its label
        found = better_order("single_label", order[answers], labels, outputs)
        assert found is not None
        assert found.then > accuracy - 0.25 > found.now
        assert found.p < 0.001
        if outputs <= 12:  # else some labels have no row, and any output may be theirs
            assert found.labels == tuple(np.argsort(order).tolist())


@pytest.mark.parametrize(("rows", "outputs", "swapped"), [(200, 12, (3, 9)), (1000, 150, (7, 70))])
def test_two_outputs_that_are_swapped_are_caught(
    rows: int, outputs: int, swapped: tuple[int, int]
) -> None:
    labels = np.arange(rows) % outputs
    order = np.arange(outputs)
    order[list(swapped)] = swapped[::-1]
    found = better_order("single_label", order[labels], labels, outputs)
    # Of 1000 rows 14 have these labels, and 7 of them judge: too few for 0.001.
    assert (found is not None) == (rows == 200)
    if found is not None:
        assert found.labels == tuple(order.tolist())


@pytest.mark.parametrize("outputs", [2, 3, 5, 12, 150])
@pytest.mark.parametrize("accuracy", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("bias", [0.3, 100.0])
def test_a_weak_teacher_is_not_called_permuted(outputs: int, accuracy: float, bias: float) -> None:
    """However biased it is, and however unequal the classes are."""
    for seed in SEEDS:
        for rows, skew in ((100, 0.5), (400, 100.0)):
            labels = classes(outputs, rows, seed, skew)
            answers = told(labels, outputs, accuracy, bias, seed)
            assert better_order("single_label", answers, labels, outputs) is None


def test_a_teacher_that_has_not_learnt_all_labels_yet_is_not_called_permuted() -> None:
    """It answers 0 for 0 to 3, 4 for 4 and 5, and 7 for what is 6 or 8: some gain, most do not."""
    labels = np.repeat(np.arange(9), 40)
    answers = np.array([0, 0, 0, 0, 4, 4, 7, 0, 7])[labels]
    answers[:40] = 4  # and 0 itself is read as 4
    assert better_order("single_label", answers, labels, 9) is None


def several(rows: int, outputs: int, noise: float, seed: int) -> tuple[Array, Array]:
    """Labels of very unequal frequency, and answers whose wrong cells do not depend on the text."""
    generator = np.random.default_rng(seed)
    rates = np.clip(generator.dirichlet(np.ones(outputs)) * outputs * 0.3, 0.05, 0.9)
    labels = (generator.random((rows, outputs)) < rates).astype(np.float32)
    favoured = generator.random((rows, outputs)) < generator.dirichlet(np.full(outputs, 0.5))
    wrong = generator.random((rows, outputs)) < noise
    return labels, np.where(wrong, favoured, labels).astype(np.int64)


@pytest.mark.parametrize("outputs", [3, 12, 40])
def test_permuted_outputs_of_several_labels_are_caught_and_weak_ones_are_not(outputs: int) -> None:
    for seed in range(20):
        labels, answers = several(400, outputs, 0.1, seed)
        order = np.roll(np.arange(outputs), 1)
        found = better_order("multi_label", answers[:, order], labels, outputs)
        assert found is not None
        assert found.labels == tuple(order.tolist())
    for seed in SEEDS:
        labels, answers = several(200, outputs, (0.5, 0.8, 1.0)[seed % 3], seed)
        assert better_order("multi_label", answers, labels, outputs) is None


def test_a_regression_has_no_order() -> None:
    values = np.linspace(0, 1, 50)
    assert better_order("regression", 1 - values, values, 1) is None


def test_the_error_shows_both_orders_and_the_way_to_give_one() -> None:
    labels = np.arange(300) % 3
    names = ("bad", "fine", "mêlé")
    with pytest.raises(ModelError) as caught:
        check_order("single_label", (labels + 1) % 3, labels, names, finished=True)
    assert 'order of the data:  ["bad", "fine", "mêlé"]' in caught.value.message
    assert 'order that fits:    ["mêlé", "bad", "fine"]' in caught.value.message
    assert """'data.labels=["mêlé", "bad", "fine"]'""" in caught.value.hint
    assert "labels.txt" in caught.value.hint
    with pytest.raises(ModelError) as caught:
        check_order("single_label", (labels + 1) % 3, labels, names, finished=False)
    assert "data.labels" not in caught.value.hint
    check_order("single_label", labels, labels, names, finished=True)


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("0", "1", "2")),
        (("0", "1"), ("0", "1")),
        (tuple(f"class {i}" for i in range(1, 12)), tuple(map(str, range(1, 12)))),
        (("LABEL_1", "LABEL_0"), None),
        (("LABEL_0", "label_1"), None),
        (("2", "3"), None),
        (("LABEL_00", "LABEL_01"), None),
        (("negative", "positive"), None),
        (("1 star", "2 stars"), None),
        (("a1", "b2"), None),
    ],
)
def test_names_that_are_only_numbers_are_known(
    names: tuple[str, ...], numbers: tuple[str, ...] | None
) -> None:
    assert numbers_of(names) == numbers


@pytest.mark.parametrize(
    ("theirs", "labels", "given", "accepted"),
    [
        (("LABEL_0", "LABEL_1"), ("0", "1"), False, True),
        (("LABEL_0", "LABEL_1"), ("1", "2"), False, False),
        (("LABEL_0", "LABEL_1"), ("-1", "1"), False, False),
        (("LABEL_0", "LABEL_1"), ("negative", "positive"), False, False),
        (("LABEL_0", "LABEL_1"), ("negative", "positive"), True, True),
        (("class1", "class2"), ("1", "2"), False, True),
        (("class1", "class2"), ("0", "1"), False, False),
        (("LABEL_0",), ("0", "1"), False, True),
        (("LABEL_0",), ("ham", "spam"), False, False),
        (("LABEL_0",), ("ham", "spam"), True, True),
    ],
)
def test_numbered_outputs_need_numbers_for_classes_or_a_given_order(
    theirs: tuple[str, ...], labels: tuple[str, ...], given: bool, accepted: bool
) -> None:
    if accepted:
        check_given_order(Path("teacher"), theirs, labels, order_given=given)
        return
    with pytest.raises(ModelError, match="which output is which label") as caught:
        check_given_order(Path("teacher"), theirs, labels, order_given=given)
    assert "data.labels=" in caught.value.hint
    assert "labels.txt" in caught.value.hint
