"""How long a training is, when it is evaluated, and its learning rate at each update. No torch.

The rate rises over the warm-up, is constant, and falls to 0 over the last part (Hägele et al.,
*Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations*, NeurIPS 2024); with a
last part of 1 it falls from the warm-up on. The last part can begin early, when `select` has seen
nothing new for a while. A small data set is read more often than the epochs say: what helps on it
is more updates (Mosbach, Andriushchenko and Klakow, *On the Stability of Fine-tuning BERT*, ICLR
2021; Zhang et al., *Revisiting Few-sample BERT Fine-tuning*, ICLR 2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ad2kit.run.sections import TrainRecipe
    from ad2kit.training.records import SelectPoint

_WIDTH_OF_BERT_BASE, _RATE_OF_BERT_BASE = 768, 5e-5
_LOWEST_RATE, _HIGHEST_RATE = 2e-5, 5e-4


def rate_of_width(width: int) -> float:
    """Return the learning rate for an encoder of a hidden size: small ones want more.

    5e-5 at BERT-base's 768, and the square of the ratio: 2e-4 at MiniLM's 384, which was measured,
    and 2.8e-5 at BERT-large's 1024; between 2e-5 and 5e-4.
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
        """Return the schedule of a training on so many rows, if nothing ends it early."""
        steps_per_epoch = math.ceil(rows / settings.batch_size)
        total = max(steps_per_epoch * settings.epochs, settings.min_updates)
        warmup = math.ceil(total * settings.warmup_ratio)
        decay_from = max(warmup, total - math.ceil(total * settings.decay_ratio))
        every = total / settings.evaluations if settings.evaluations else steps_per_epoch
        return cls(steps_per_epoch, warmup, decay_from, total, max(every, 1))

    def decaying_from(self, step: int | None) -> Schedule:
        """Return the schedule whose last part, as long as planned, begins after update ``step``."""
        if step is None:
            return self
        return replace(self, decay_from=step, total=step + self.total - self.decay_from)

    def rate(self, step: int) -> float:
        """Return the share of the full learning rate that update ``step`` (from 0) has."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return min(1.0, (self.total - step) / max(1, self.total - self.decay_from))

    def evaluates(self, step: int) -> bool:
        """Tell whether the model is evaluated after ``step`` updates."""
        return step == self.total or int(step / self.every) > int((step - 1) / self.every)

    def is_stale(self, points: Sequence[SelectPoint], patience: int | None) -> bool:
        """Tell whether the last part should begin now, after the last of ``points``.

        It should if none of the last ``patience`` evaluations had a better score than all before,
        or, of a student, a smaller distance. What comes before the end of the warm-up does not
        count: a started head is disturbed at first, when the encoder begins to move. A training
        that has not learned yet to tell rows apart is not at its end.
        """
        points = [point for point in points if point.step >= self.warmup]
        if patience is None or not points or points[-1].constant:
            return False
        if points[-1].step >= self.decay_from:
            return False
        news = 0
        for index in range(1, len(points)):
            point, before = points[index], points[:index]
            better = point.score > max(each.score for each in before)
            if better or _nearer(point, before):
                news = index
        return len(points) - 1 - news >= patience


def _nearer(point: SelectPoint, before: Sequence[SelectPoint]) -> bool:
    if point.distance is None:
        return False
    return point.distance < min(math.inf if p.distance is None else p.distance for p in before)
