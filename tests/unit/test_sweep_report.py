"""How trials are summed up: medians by hand, losses as the worst, and a ledger that was cut."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ad2kit.campaigns.sweep.report import (
    ConfigurationResult,
    Ledger,
    Spread,
    Trial,
    by_configuration,
    select,
)
from ad2kit.run.errors import RunError
from ad2kit.run.sweep_section import Configuration

if TYPE_CHECKING:
    from pathlib import Path

FAST, SLOW = (Configuration(batch_size=16, lr=lr, radius=0.0, alpha=1.0) for lr in (1e-3, 1e-5))


def trial(configuration: Configuration, seed: int, distance: float | None, **more: Any) -> Trial:
    criterion = -math.inf if distance is None else -distance
    score = None if distance is None else 1 - distance
    return Trial(
        configuration=configuration,
        seed=seed,
        run=f"run-{seed}",
        criterion=criterion,
        select_score=score,
        select_distance=distance,
        **more,
    )


def test_the_best_configuration_has_the_best_median_and_a_loss_counts_as_the_worst() -> None:
    fast = [
        trial(FAST, 1, 0.125, state="finished"),
        trial(FAST, 2, 0.25, state="finished"),
        trial(FAST, 3, 0.5, state="stopped"),
    ]
    slow = [
        trial(SLOW, 1, 0.0625, state="finished"),
        trial(SLOW, 2, None, state="diverged"),
        trial(SLOW, 3, 0.375, state="finished"),
    ]
    best, other = by_configuration([*slow, *fast])
    assert (best.configuration, best.criterion) == (FAST, -0.25)
    assert (best.trials, best.finished) == (3, 2)
    assert best.select_score == Spread(median=0.75, lowest=0.5, highest=0.875)
    assert best.select_distance == 0.25
    # Without the one that was lost the median would be -0.21875 and win.
    assert (other.configuration, other.criterion) == (SLOW, -0.375)
    lost = by_configuration([trial(SLOW, 1, None, state="failed")])[0]
    assert (lost.criterion, lost.select_score, lost.select_distance) == (-math.inf, None, None)


def test_of_configurations_that_are_as_good_the_nearest_is_taken() -> None:
    """One that is near and worse is not taken, one that is near and as good is."""
    labels = np.arange(200) % 2
    medium = Configuration(batch_size=16, lr=1e-4, radius=0.0, alpha=1.0)

    def right_on(count: int, first: int = 0) -> Any:
        rows = np.arange(first, first + count)
        return np.where(np.isin(np.arange(200), rows), labels, 1 - labels)

    found = {FAST: [right_on(150)], medium: [right_on(149, 8)], SLOW: [right_on(110)]}
    distances = {FAST: 0.5, medium: 0.4, SLOW: 0.1}
    results = [
        ConfigurationResult(
            configuration=each,
            trials=1,
            finished=1,
            criterion=float((found[each][0] == labels).mean()),
            select_score=None,
            select_distance=distances[each],
        )
        for each in (FAST, medium, SLOW)
    ]

    def selected(changed: dict[Configuration, list[Any]]) -> Configuration:
        return select(results, found | changed, labels, ("accuracy",)).configuration

    assert selected({}) == medium
    # What was stopped early has no answers: only as the best of all is it taken.
    assert selected({medium: []}) == FAST
    assert selected({FAST: []}) == FAST
    # A student that imitates nobody is near to nobody.
    alone = results[1].model_copy(update={"select_distance": None})
    assert select([results[0], alone], found, labels, ("accuracy",)).configuration == FAST
    # Without distances, the best score.
    results = [each.model_copy(update={"select_distance": None}) for each in results]
    assert selected({}) == FAST


def test_a_ledger_keeps_the_last_word_on_each_trial_and_forgets_a_line_cut_short(
    tmp_path: Path,
) -> None:
    path = tmp_path / "trials.jsonl"
    ledger = Ledger(path)
    ledger.add(trial(FAST, 1, None))
    # What ends a line for str.splitlines() and lies in JSON as it is: a path or a text may hold it.
    ledger.add(trial(FAST, 2, None, state="diverged", message="a\u2028b\u2029c\u0085d is nan"))
    ledger.add(trial(FAST, 1, 0.5, state="finished"))
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    again = Ledger(path)
    assert again.trials == ledger.trials
    assert [each.state for each in again.trials.values()] == ["finished", "diverged"]
    assert again.trials[FAST, 2].criterion == -math.inf
    again.add(trial(SLOW, 1, None))
    assert len(Ledger(path).trials) == 3


def test_a_ledger_with_a_damaged_line_names_it(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    path.write_text('{"nothing": 1}\n')
    with pytest.raises(RunError, match=r"trials\.jsonl, line 1 is not a Trial"):
        Ledger(path)
