"""Records of a training: its updates, the selection of the kept one, and the distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from ad2kit.data.records import SplitFacts
from ad2kit.run.files import read_lines
from ad2kit.run.records import Part, Record
from ad2kit.run.sections import Metric, Task

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ad2kit.run.folder import RunDir
    from ad2kit.run.sections import DistillRecipe, PlanRecipe


# With a gain below this share of the clean loss, the adversary has no effect on the training.
IDLE_GAIN = 0.01


class StepRecord(Record):
    """One update of the training loop.

    ``terms`` holds the loss terms in nats, before their weights. ``grad_norm`` is the global
    Euclidean norm before clipping. ``seconds`` is the time of the update, without an evaluation.
    The other fields are set if the model was evaluated after this update: ``select_score``; for a
    student ``select_distance``, its distance from the teacher; and with an adversary
    ``inner_loss_before`` and ``inner_loss_after``, the distance on some rows of ``select`` without
    and with the perturbation of the ascent, without dropout.
    """

    cure: ClassVar[str] = "delete it, and what is left of its training (`checkpoint` beside it)"

    # Version 1 had the adversary's gain of each update.
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
        """The increase of the distance by the ascent; None without an adversary."""
        if self.inner_loss_before is None or self.inner_loss_after is None:
            return None
        return self.inner_loss_after - self.inner_loss_before


class SelectPoint(Part):
    """The evaluation on ``select`` after one update: the score, and a student's distance.

    ``distance`` is from the teacher; None without one. ``constant`` says that the model gives every
    row the same answer.
    """

    step: int
    score: float
    distance: float | None = None
    constant: bool = False


class Selection(Part):
    """The update of a training that was kept; see :mod:`ad2kit.training.selection`.

    ``best_step`` has the best score. ``good_enough`` is the number of updates that were good
    enough. ``points`` holds the scores and distances, and ends with the last update.
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
    """The report of the distill stage: its inputs and its result.

    ``train_seconds`` is the sum over the student's updates, without teacher, evaluation and saving.
    ``learning_rates`` holds the peak rates of teacher and student, from the recipe or by the width
    of the encoder. ``mean_clean_kl`` and ``mean_adversarial_gain`` are means over the evaluations
    (see :class:`StepRecord`); without an adversary ``mean_clean_kl`` is a mean over the updates.
    ``selection`` is None if nothing was trained. ``hub`` holds the references to the hub, with the
    commits that were read, by their keys in the recipe. ``bad_rows`` is the number of rows that
    ``data.bad_rows: skip`` left out; `bad-rows.jsonl` lists them.
    ``encoder_sha256`` holds the sha256 of the files of ``student.model``.
    """

    # Version 1 had the best update, but no reason for it.
    schema_version: Literal[2] = 2  # type: ignore[assignment]
    inputs: str
    labels: tuple[str, ...]
    splits: dict[str, SplitFacts]
    bad_rows: int = 0
    teacher_sha256: str
    student_sha256: str
    teacher_parameters: int | None
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
    hub: dict[str, str] = Field(default_factory=dict)
    encoder_sha256: dict[str, str] | None = None


def read_curve(path: Path) -> list[StepRecord]:
    """Return the step records of a curve; a last line that a kill cut short is left out.

    Raises:
        RunError: another version of ad2kit has written the file.
    """
    if not path.is_file():
        return []
    return [StepRecord.parse(line.encode(), str(path)) for line in read_lines(path)]


def select_scores(path: Path) -> list[float]:
    """Return the scores on ``select`` of a training so far, in the order of its evaluations."""
    return [record.select_score for record in read_curve(path) if record.select_score is not None]


def scores_before_decay(path: Path) -> tuple[float, ...]:
    """Return the scores on ``select`` while the learning rate of a training was constant.

    While the rate falls every score rises, whether or not a longer training would be better. All
    scores are returned if the rate falls from the warm-up on.
    """
    evaluated = [record for record in read_curve(path) if record.select_score is not None]
    peak_rate = max((record.lr for record in evaluated), default=0.0)
    records = [record for record in evaluated if record.lr == peak_rate]
    if len(records) <= 1:
        records = evaluated
    return tuple(record.select_score or 0.0 for record in records)


def overrun(run: RunDir, plan: PlanRecipe | None) -> str:
    """Return in words how much longer than planned the updates of a run took; "" if they did not.

    A teacher that another run has made took no time here.
    """
    if plan is None:
        return ""
    actual_s = {
        name: sum(record.seconds for record in read_curve(run.curve(name))) for name in plan.updates
    }
    planned_s = {name: plan.updates[name] * plan.seconds_per_update[name] for name in plan.updates}
    if sum(actual_s.values()) <= sum(planned_s.values()):
        return ""
    comparison = ", ".join(
        f"{name} {actual_s[name] / 60:.1f} of {planned_s[name] / 60:.1f}" for name in actual_s
    )
    return (
        f"the training took longer than --max-minutes {plan.max_minutes:g} has planned: minutes of "
        f"updates, {comparison}; nothing was cut"
    )


def verdict(
    records: Sequence[StepRecord], settings: DistillRecipe
) -> tuple[float, float | None, str]:
    """Return mean clean distance to the teacher, mean adversarial gain, and a verdict in words.

    See :class:`ad2kit.training.records.DistillReport`.
    """
    gains = [record.adversarial_gain for record in records if record.adversarial_gain is not None]
    if not gains:
        distance = float(np.mean([record.terms["kd"] for record in records]))
        if settings.imitates:
            return distance, None, "no adversary: alpha is 0, this was plain distillation"
        return distance, None, "no teacher: only hard labels have a weight, this was fine-tuning"
    distances = [
        record.inner_loss_before for record in records if record.inner_loss_before is not None
    ]
    distance = float(np.mean(distances))
    gain = float(np.mean(gains))
    adversary = settings.adversary
    effect = (
        f"radius {adversary.radius:g} ({adversary.norm}) raised the distance to the teacher by "
        f"{gain:.2e} on average, {gain / distance:.2%} of the clean {distance:.2e}"
    )
    if gain < IDLE_GAIN * distance:
        advice = "a larger distill.adversary.radius bites"
        return distance, gain, f"the adversary was idle: {effect}; {advice}"
    return distance, gain, f"the adversary was at work: {effect}"
