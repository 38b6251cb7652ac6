"""The schedule of a training: its rate, its length, its evaluations, and its early end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ad2kit.run.errors import RecipeError
from ad2kit.run.recipe import load_recipe
from ad2kit.training.ad2 import distillation
from ad2kit.training.checkpoint import Evaluation
from ad2kit.training.loop import new_state, train
from ad2kit.training.records import SelectPoint
from ad2kit.training.schedule import Schedule, rate_of_width
from tests.models import cpu, encoded, settings, teacher_logits, tiny_bert


def planned(rows: int = 320, **changes: Any) -> Schedule:
    plain = {"epochs": 10, "batch_size": 32, "warmup_ratio": 0.1}
    return Schedule.planned(rows, settings(**{**plain, **changes}))


def test_the_rate_warms_up_and_decays_to_zero() -> None:
    rates = [planned().rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[99] == pytest.approx(1 / 90)
    assert rates[100] == 0.0
    assert planned(warmup_ratio=0.0).rate(0) == 1.0


def test_the_rate_is_constant_before_the_last_part() -> None:
    rates = [planned(decay_ratio=0.2).rate(step) for step in range(101)]
    assert set(rates[9:81]) == {1.0}
    assert rates[81:84] == pytest.approx([0.95, 0.90, 0.85])
    assert rates[100] == 0.0


def test_a_last_part_that_begins_early_is_as_long_as_planned() -> None:
    early = planned(decay_ratio=0.2).decaying_from(40)
    assert early.total == 60
    assert [early.rate(step) for step in (39, 40, 50, 60)] == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_a_small_set_has_the_least_number_of_updates_and_a_large_one_its_epochs() -> None:
    assert planned(min_updates=250).total == 250
    assert planned(3200, min_updates=250).total == 1000
    assert planned(min_updates=250).steps_per_epoch == 10


def evaluated(schedule: Schedule) -> list[int]:
    return [step for step in range(1, schedule.total + 1) if schedule.evaluates(step)]


def test_evaluations_are_at_equal_distances_and_always_at_the_end() -> None:
    assert evaluated(planned()) == list(range(10, 101, 10))
    assert evaluated(planned(evaluations=4)) == [25, 50, 75, 100]
    assert evaluated(planned(evaluations=3)) == [34, 67, 100]
    assert evaluated(planned(evaluations=20, epochs=1)) == list(range(1, 11))
    # Epochs that end before the last update, and a last part that began early.
    assert evaluated(planned(min_updates=105)) == [*range(10, 101, 10), 105]
    assert evaluated(planned(evaluations=4, decay_ratio=0.2).decaying_from(50)) == [25, 50, 70]


def points(*values: tuple[float, float | None]) -> list[SelectPoint]:
    return [
        SelectPoint(step=10 * i, score=score, distance=distance)
        for i, (score, distance) in enumerate(values, start=1)
    ]


def test_patience_waits_for_a_better_score_or_a_nearer_student() -> None:
    schedule = planned(decay_ratio=0.2)
    flat = points((0.5, None), (0.7, None), (0.7, None), (0.6, None))
    assert schedule.is_stale(flat, 2)
    assert not schedule.is_stale(flat, 3)
    assert not schedule.is_stale(flat, None)
    nearer = points((0.5, 0.4), (0.7, 0.3), (0.7, 0.3), (0.6, 0.2))
    assert not schedule.is_stale(nearer, 2)
    assert schedule.is_stale(points((0.5, 0.4), (0.7, 0.3), (0.7, 0.3), (0.6, 0.3)), 2)
    # A started head is better than what the warm-up leaves of it.
    started = [SelectPoint(step=0, score=0.8), *points((0.5, None), (0.6, None), (0.7, None))]
    assert not schedule.is_stale(started, 2)
    assert schedule.is_stale(
        [*started, *points(*[(0.0, None)] * 3, (0.7, None), (0.7, None))[3:]], 2
    )
    # Not in the last part, which has begun, nor for one that has not learned anything yet.
    assert not schedule.is_stale(points(*[(0.5, None)] * 8), 2)
    same = SelectPoint(step=50, score=0.5, constant=True)
    assert not schedule.is_stale([*flat, same], 2)


def test_patience_needs_a_last_part() -> None:
    with pytest.raises(RecipeError, match="'patience' begins the last part early"):
        load_recipe("smoke", ["distill.patience=2"])


def test_small_encoders_learn_faster() -> None:
    rates = [rate_of_width(width) for width in (64, 384, 768, 1024, 4096)]
    assert rates == pytest.approx([5e-4, 2e-4, 5e-5, 2.8125e-5, 2e-5])


def test_the_loop_ends_early_and_goes_on_from_where_it_was() -> None:
    """The decision is in the state: a loop that was stopped after it ends at the same update."""
    accelerator = cpu()
    recipe = settings(
        epochs=40, batch_size=8, decay_ratio=0.25, evaluations=20, patience=3, warmup_ratio=0.0
    )
    evaluation = Evaluation(0.5, torch.zeros(1, 2))

    def updates(state: Any) -> Any:
        return train(
            state,
            encoded(state.model),
            teacher_logits(),
            distillation(accelerator, recipe),
            recipe,
            lambda _model: evaluation,
            accelerator,
            phase="student",
            seed=1,
        )

    state = new_state(tiny_bert(), recipe, accelerator)
    records = []
    for record in updates(state):
        records.append(record)
        if record.step == 11:
            break
    # Evaluated at 2, 4, 6 and 8, where three had brought nothing: ten more updates.
    assert state.decay_from == 8
    records += updates(state)
    assert [record.step for record in records] == list(range(1, 19))
    assert {record.total_steps for record in records} == {40, 18}
    assert records[7].lr == recipe.rate
    assert records[-1].lr == pytest.approx(recipe.rate / 10)
