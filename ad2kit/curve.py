"""The training curve of a run: one step record a line, and what it says in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ad2kit.files import read_lines
from ad2kit.records import StepRecord

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ad2kit.run_dir import RunDir
    from ad2kit.sections import DistillRecipe, PlanRecipe

# Below this share of the clean loss, the adversary has changed nothing that training could feel.
IDLE_GAIN = 0.01


def read_curve(path: Path) -> list[StepRecord]:
    """Return the step records of a curve; a last line that a kill cut short is left out.

    Raises:
        RunError: another version of ad2kit has written it.
    """
    if not path.is_file():
        return []
    return [StepRecord.parse(line.encode(), str(path)) for line in read_lines(path)]


def select_scores(path: Path) -> list[float]:
    """Return the scores on ``select`` of a training so far, in the order of its evaluations."""
    return [r.select_score for r in read_curve(path) if r.select_score is not None]


def scores_before_decay(path: Path) -> tuple[float, ...]:
    """Return the scores on ``select`` while the learning rate of a training was constant.

    When it falls every score rises, whether or not a longer training would be better. All scores
    are returned where the rate falls from the warm-up on.
    """
    evaluated = [r for r in read_curve(path) if r.select_score is not None]
    highest = max((r.lr for r in evaluated), default=0.0)
    constant = [r for r in evaluated if r.lr == highest]
    return tuple(r.select_score or 0.0 for r in (constant if len(constant) > 1 else evaluated))


def overrun(run: RunDir, plan: PlanRecipe | None) -> str:
    """Return in words by how much the updates of a run took longer than planned; "" if not.

    A teacher that another run has made took no time here.
    """
    if plan is None:
        return ""
    took = {
        name: sum(record.seconds for record in read_curve(run.curve(name))) for name in plan.updates
    }
    planned = {name: plan.updates[name] * plan.seconds_per_update[name] for name in plan.updates}
    if sum(took.values()) <= sum(planned.values()):
        return ""
    parts = ", ".join(f"{name} {took[name] / 60:.1f} of {planned[name] / 60:.1f}" for name in took)
    return (
        f"the training took longer than --max-minutes {plan.max_minutes:g} has planned: minutes of "
        f"updates, {parts}; nothing was cut"
    )


def verdict(
    records: Sequence[StepRecord], settings: DistillRecipe
) -> tuple[float, float | None, str]:
    """Return mean clean distance to the teacher, mean adversarial gain, and what they mean.

    See :class:`ad2kit.records.DistillReport`.
    """
    kd = float(np.mean([record.terms["kd"] for record in records]))
    gains = [r.adversarial_gain for r in records if r.adversarial_gain is not None]
    if not gains:
        if settings.imitates:
            return kd, None, "no adversary: alpha is 0, this was plain distillation"
        return kd, None, "no teacher: only hard labels have a weight, this was fine-tuning"
    kd = float(np.mean([r.inner_loss_before for r in records if r.inner_loss_before is not None]))
    gain, attack = float(np.mean(gains)), settings.adversary
    facts = (
        f"radius {attack.radius:g} ({attack.norm}) raised the distance to the teacher by "
        f"{gain:.2e} on average, {gain / kd:.2%} of the clean {kd:.2e}"
    )
    if gain < IDLE_GAIN * kd:
        return kd, gain, f"the adversary was idle: {facts}; a larger distill.adversary.radius bites"
    return kd, gain, f"the adversary was at work: {facts}"
