"""Which update of a training is kept: values by hand, and students that must not be kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from ad2kit.run.errors import RunError
from ad2kit.statistics import metrics
from ad2kit.training import selection
from ad2kit.training.checkpoint import Snapshots
from ad2kit.training.records import Selection, SelectPoint

if TYPE_CHECKING:
    from pathlib import Path

ROWS = 200
LABELS = np.arange(ROWS) % 4


def right_on(count: int, *, first: int = 0) -> Any:
    """Answers that are right on ``count`` rows, from row ``first`` on."""
    found = (LABELS + 1) % 4
    rows = np.arange(first, first + count) % ROWS
    found[rows] = LABELS[rows]
    return found


def points(*values: tuple[int, float | None], constant: tuple[int, ...] = ()) -> list[SelectPoint]:
    """Points of (right rows, distance), at updates 10, 20, ..."""
    return [
        SelectPoint(step=10 * i, score=right / ROWS, distance=distance, constant=i in constant)
        for i, (right, distance) in enumerate(values, start=1)
    ]


def kept(found: list[SelectPoint], answers: list[Any] | None = None) -> Selection:
    answers = answers or [right_on(round(point.score * ROWS)) for point in found]
    return selection.keep(found, answers, LABELS, ("accuracy",))


def test_a_timid_early_student_is_not_kept_however_near_it_is() -> None:
    """The nearest of all has learned little; of those that have learned, the nearest is kept."""
    found = kept(points((28, 0.1), (90, 0.5), (100, 0.3), (98, 0.4)))
    assert (found.kept_step, found.best_step, found.good_enough) == (30, 30, 1)
    # 98 of 200 are within one standard error of 100 where two rows differ each way or more.
    found = kept(
        points((28, 0.1), (100, 0.5), (98, 0.4)),
        [right_on(28), right_on(100), right_on(98, first=10)],
    )
    assert (found.kept_step, found.best_step, found.good_enough) == (30, 20, 2)
    assert found.kept.distance == 0.4
    assert "kept update 30 of 30: the nearest to the teacher (distance 0.4) of the 2" in (
        found.reason
    )


def test_one_standard_error_is_that_of_the_paired_difference() -> None:
    """Ten rows against six: a mean of 4 / 200 and a deviation of sqrt(16/200 - 0.02²)."""
    best, other = right_on(100), right_on(96, first=10)
    expected = np.sqrt((10 + 6) / ROWS - 0.02**2) / np.sqrt(ROWS)
    errors = metrics.paired_standard_errors(("accuracy",), [best, other], LABELS, 0)
    assert errors.tolist() == pytest.approx([0.0, expected])
    # The bootstrap of other metrics agrees with it, where they say nearly the same.
    drawn = metrics.paired_standard_errors(("accuracy", "macro_f1"), [best, other], LABELS, 0)
    assert drawn[0] == 0.0
    assert drawn[1] == pytest.approx(expected, rel=0.2)


def test_what_scores_more_than_a_good_enough_one_is_good_enough() -> None:
    scores, errors = np.array([0.90, 0.88, 0.87, 0.80]), np.array([0.0, 0.01, 0.04, 0.05])
    assert selection.good_enough(scores, errors).tolist() == [True, True, True, False]


def test_of_equals_the_later_is_kept_and_without_a_distance_the_best_score() -> None:
    assert kept(points((100, 0.2), (100, 0.2), (100, 0.3))).kept_step == 20
    found = kept(points((160, None), (180, None), (180, None), (140, None)))
    assert found.kept_step == 30
    assert found.reason == (
        "kept update 30 of 40: the best accuracy on select, 0.9000; the last has 0.7000"
    )


def test_a_constant_answer_is_kept_only_if_all_are_and_is_called_so() -> None:
    same = np.zeros(ROWS, dtype=int)
    found = kept(points((50, 0.1), (44, 0.9), constant=(1,)), [same, right_on(44)])
    assert found.kept_step == 20
    found = kept(points((50, 0.1), (50, 0.2), constant=(1, 2)), [same, same])
    assert found.kept_step == 10
    assert "every update that was evaluated gives all rows the same answer" in found.reason
    found = kept(points((44, 0.9), (50, 0.1), constant=(2,)), [right_on(44), same])
    assert found.reason.endswith("and gives all rows the same answer")


def test_what_is_removed_early_would_not_have_been_kept() -> None:
    """At every moment of random trainings, the later choice is not among what was removed."""
    generator = np.random.default_rng(5)
    removed = 0
    for _ in range(200):
        length = int(generator.integers(2, 9))
        answers = [
            right_on(int(generator.integers(60, 80)), first=int(generator.integers(40)))
            for _ in range(length)
        ]
        with_distance = generator.random() < 0.8
        every = [
            SelectPoint(
                step=i,
                score=float((answer == LABELS).mean()),
                distance=float(generator.integers(6)) if with_distance else None,
                constant=bool(generator.random() < 0.15),
            )
            for i, answer in enumerate(answers)
        ]
        choice = selection.keep(every, answers, LABELS, ("accuracy",)).kept_step
        for end in range(1, length + 1):
            gone = selection.beaten(every[:end])
            removed += len(gone)
            assert choice not in gone
    assert removed > 1000


def snapshots(folder: Path, inputs: str = "a") -> Snapshots:
    return Snapshots(folder / "snapshots", inputs, cure="delete it")


def test_snapshots_come_back_and_those_after_a_checkpoint_are_removed(tmp_path: Path) -> None:
    store, found = snapshots(tmp_path), points((28, 0.1), (100, 0.3), (98, 0.4))
    for point in found:
        logits = torch.full((ROWS, 4), float(point.step))
        store.write(point, logits, {"w": torch.full((2,), float(point.step))})
    assert store.logits(20).unique().tolist() == [20.0]
    assert store.weights(30)["w"].tolist() == [30.0, 30.0]
    store.restore(found[:2])
    assert [path.name for path in sorted(store.folder.iterdir())] == ["00000010", "00000020"]
    store.prune(found[:2])  # neither beats the other: one is nearer, one is better
    assert store.weights(10)["w"].tolist() == [10.0, 10.0]
    store.restore([])
    assert list(store.folder.iterdir()) == []


def test_a_beaten_snapshot_keeps_its_answers_alone(tmp_path: Path) -> None:
    store, found = snapshots(tmp_path), points((28, 0.4), (100, 0.3))
    for point in found:
        store.write(point, torch.zeros(ROWS, 4), {"w": torch.zeros(2)})
    store.prune(found)
    assert store.logits(10).shape == (ROWS, 4)
    with pytest.raises(RunError, match=r"weights\.safetensors is damaged: .* found no file"):
        store.weights(10)
    assert store.weights(20)["w"].tolist() == [0.0, 0.0]


def test_a_snapshot_that_is_gone_damaged_or_of_another_training_is_refused(tmp_path: Path) -> None:
    store, found = snapshots(tmp_path), points((28, 0.1))
    with pytest.raises(RunError, match="it is missing") as caught:
        store.restore(found)
    assert caught.value.hint == "delete it"
    store.write(found[0], torch.zeros(ROWS, 4), {"w": torch.zeros(2)})
    with pytest.raises(RunError, match="belongs to another training"):
        snapshots(tmp_path, "b").restore(found)
    path = store.folder / "00000010" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(RunError, match="is damaged: sha256 expected"):
        store.weights(10)
