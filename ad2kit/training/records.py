"""What a training writes to disk: its steps, the update that was kept, and the distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ad2kit.data.splits import SplitFacts
from ad2kit.run.files import read_lines
from ad2kit.run.records import Part, Record
from ad2kit.run.sections import Metric, Task

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ad2kit.run.folder import RunDir
    from ad2kit.run.sections import DistillRecipe, PlanRecipe


class StepRecord(Record):
    """One update of the training loop.

    ``terms`` holds the loss terms in nats, before their weights. ``grad_norm`` is the global
    Euclidean norm before clipping. ``seconds`` is of the update alone. The rest is set where the
    model was evaluated after this update: ``select_score`` and, for a student, ``select_distance``
    (from its teacher); with an adversary ``inner_loss_before`` and ``inner_loss_after``, the
    distance on some rows of ``select`` without and with what the ascent finds, without dropout.
    """

    cure: ClassVar[str] = "delete it, and what is left of its training (`checkpoint` beside it)"

    # 1 had the adversary's gain of each update.
    schema_version: Literal[2] = 2  # type: ignore[assignment]
    phase: Literal["teacher", "student"]
    step: int
    total_steps: int
    epoch: int
    lr: float
    loss: float
    terms: dict[str, float]
    grad_norm: float
    examples: int
    seconds: float
    inner_loss_before: float | None = None
    inner_loss_after: float | None = None
    select_score: float | None = None
    select_distance: float | None = None

    @property
    def adversarial_gain(self) -> float | None:
        """How much the ascent raised the distance."""
        if self.inner_loss_before is None or self.inner_loss_after is None:
            return None
        return self.inner_loss_after - self.inner_loss_before


class SelectPoint(Part):
    """A model on ``select`` after one update: its score, and a student's distance from its teacher.

    ``constant`` says that it gives every row the same answer.
    """

    step: int
    score: float
    distance: float | None = None
    constant: bool = False


class Selection(Part):
    """Which update of a training was kept, and why; see :mod:`ad2kit.training.selection`.

    ``best_step`` has the best score; ``good_enough`` counts the updates that came into question.
    ``points`` holds both curves, and ends with the last update.
    """

    kept_step: int
    best_step: int
    good_enough: int
    points: tuple[SelectPoint, ...]
    reason: str

    @property
    def kept(self) -> SelectPoint:
        """The point of the kept update."""
        return next(point for point in self.points if point.step == self.kept_step)


class DistillReport(Record):
    """What the distill stage did, and on which inputs.

    ``train_seconds`` sums the student's updates; teacher, evaluation and saving are not in it.
    ``learning_rates`` are the highest of teacher and student, those of the recipe or by the width
    of the encoder. ``mean_clean_kl`` and ``mean_adversarial_gain`` are means over the evaluations
    (see :class:`StepRecord`), the first over the updates where there is no adversary.
    ``selection`` is None where there was nothing to train.
    """

    # 1 knew which update was the best, and not why.
    schema_version: Literal[2] = 2  # type: ignore[assignment]
    inputs: str
    labels: tuple[str, ...]
    splits: dict[str, SplitFacts]
    teacher_sha256: str
    student_sha256: str
    teacher_parameters: int
    student_parameters: int
    task: Task
    metrics: tuple[Metric, ...]
    teacher_select_score: float
    student_select_score: float
    learning_rates: dict[str, float]
    selection: Selection | None
    steps: int
    train_seconds: float
    examples_per_s: float
    peak_memory_mb: dict[str, float]
    mean_clean_kl: float
    mean_adversarial_gain: float | None
    verdict: str
    environment: dict[str, str]


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

    See :class:`ad2kit.training.records.DistillReport`.
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
