"""The length of a training, its evaluations, and its learning rate at each update. No torch.

The rate rises over the warm-up, is constant, and falls to 0 over the last part (Hägele et al.,
*Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations*, NeurIPS 2024). With a
``decay_ratio`` of 1 it falls from the warm-up on. The last part can begin early, if the scores on
`select` have not improved for a while. A small data set is read more often than the epochs say,
because more updates help on it (Mosbach, Andriushchenko and Klakow, *On the Stability of
Fine-tuning BERT*, ICLR 2021; Zhang et al., *Revisiting Few-sample BERT Fine-tuning*, ICLR 2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ad2kit.run.sections import TrainRecipe
    from ad2kit.training.records import SelectPoint

_WIDTH_OF_BERT_BASE = 768
_RATE_OF_BERT_BASE = 5e-5
_LOWEST_RATE = 2e-5
_HIGHEST_RATE = 5e-4


def rate_of_width(width: int) -> float:
    """Return the learning rate for an encoder by its hidden size: small encoders need a higher one.

    The rate is 5e-5 at BERT-base's width 768, and is multiplied by the square of 768 over the
    width. This gives 2e-4 at MiniLM's 384, which was measured, and 2.8e-5 at BERT-large's 1024. The
    result lies between 2e-5 and 5e-4.
    """
    rate = _RATE_OF_BERT_BASE * (_WIDTH_OF_BERT_BASE / width) ** 2
    return min(max(rate, _LOWEST_RATE), _HIGHEST_RATE)


@dataclass(frozen=True)
class Schedule:
    """The updates of one training: warm-up, constant until ``decay_from``, 0 after ``total``.

    ``every`` is the distance in updates from one evaluation to the next; there is always one after
    the last update.
    """

    steps_per_epoch: int
    warmup: int
    decay_from: int
    total: int
    every: float

    @classmethod
    def planned(cls, rows: int, settings: TrainRecipe) -> Schedule:
        """Return the schedule of a training on ``rows`` rows that does not end early."""
        steps_per_epoch = math.ceil(rows / settings.batch_size)
        total = max(steps_per_epoch * settings.epochs, settings.min_updates)
        warmup = math.ceil(total * settings.warmup_ratio)
        decay_from = max(warmup, total - math.ceil(total * settings.decay_ratio))
        every = total / settings.evaluations if settings.evaluations else steps_per_epoch
        return cls(steps_per_epoch, warmup, decay_from, total, max(every, 1))

    def decaying_from(self, step: int | None) -> Schedule:
        """Return a schedule whose last part begins after update ``step`` and keeps its length.

        None returns this schedule.
        """
        if step is None:
            return self
        return replace(self, decay_from=step, total=step + self.total - self.decay_from)

    def rate(self, step: int) -> float:
        """Return the learning rate of update ``step`` (from 0) as a share of the peak rate."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return min(1.0, (self.total - step) / max(1, self.total - self.decay_from))

    def evaluates(self, step: int) -> bool:
        """Tell whether the model is evaluated after ``step`` updates."""
        return step == self.total or int(step / self.every) > int((step - 1) / self.every)

    def is_stale(self, points: Sequence[SelectPoint], patience: int | None) -> bool:
        """Tell whether the last part should begin now, after the last of ``points``.

        It should if none of the last ``patience`` evaluations had a better score, or for a student
        a smaller distance, than all evaluations before it. Evaluations before the end of the
        warm-up do not count: a head that was started by regression is disturbed when the encoder
        begins to change. A training whose answers are still constant is not at its end.
        """
        counted = [point for point in points if point.step >= self.warmup]
        if patience is None or not counted or counted[-1].constant:
            return False
        if counted[-1].step >= self.decay_from:
            return False
        last_improvement = 0
        for index in range(1, len(counted)):
            point = counted[index]
            earlier = counted[:index]
            better = point.score > max(each.score for each in earlier)
            if better or _nearer(point, earlier):
                last_improvement = index
        return len(counted) - 1 - last_improvement >= patience


def _nearer(point: SelectPoint, earlier: Sequence[SelectPoint]) -> bool:
    """Tell whether a point is nearer to the teacher than all earlier points."""
    if point.distance is None:
        return False
    return point.distance < min(
        math.inf if each.distance is None else each.distance for each in earlier
    )
