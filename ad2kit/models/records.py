"""What is written to disk of a model: its manifest, and a teacher beside simpler models."""

from __future__ import annotations

import logging
import math
from typing import ClassVar

from pydantic import computed_field

from ad2kit.run.errors import GateFailed
from ad2kit.run.records import Part, Record
from ad2kit.run.sections import Metric, TrainRecipe

logger = logging.getLogger(__name__)

# A teacher this many paired standard errors below a baseline is not worth imitating.
_TOO_FAR_BELOW_SE = 2.0
# With fewer rows a standard error says too little to stop a run for.
_FEWEST_ROWS = 30
# Labels without any answer are named if they have as many rows of `select` together: with many
# classes a good teacher misses a few that have one row each.
_ROWS_UNANSWERED = 5
# From this share of cut texts on, a bag of words may know more than a teacher only by reading on.
_CUT = 0.1
_NAMED = 10
BAG_OF_WORDS = "bag of words"


class Baseline(Part):
    """A simpler model beside the teacher, trained on rows of ``train``.

    ``difference`` is the teacher's score on ``select`` minus its own, and ``standard_error`` that
    of this difference, paired over the rows. The teacher should not be below one that is a ``bar``;
    the others are for the reader.
    """

    name: str
    bar: bool
    select_score: float
    validation_score: float
    difference: float
    standard_error: float


class TeacherReport(Record):
    """``teacher.json``: the teacher beside simpler models, before anybody imitates it.

    ``score`` and its ``standard_error`` are of the teacher on the ``rows`` of ``select``. The
    baselines were trained on ``train_rows`` rows, and their ``validation_score`` decides nothing.
    ``unanswered`` holds the labels of ``select`` that the teacher never gives, with their rows
    there. ``curve`` holds its scores on ``select`` while it was fine-tuned, before the rate fell,
    if this run saw it. ``cut`` is the share of the rows whose texts are longer than the teacher may
    read.
    """

    file_name: ClassVar[str] = "teacher.json"

    inputs: str
    teacher: str
    teacher_sha256: str
    finetune: TrainRecipe | None
    metrics: tuple[Metric, ...]
    rows: int
    train_rows: int
    score: float
    standard_error: float
    baselines: tuple[Baseline, ...]
    labels: int
    unanswered: dict[str, int]
    curve: tuple[float, ...]
    cut: float

    @property
    def better(self) -> tuple[Baseline, ...]:
        """The baselines that score more than the teacher and should not, the best first."""
        found = (each for each in self.baselines if each.bar and each.difference < 0)
        return tuple(sorted(found, key=lambda each: each.difference))

    @property
    def far_better(self) -> tuple[Baseline, ...]:
        """Those of them that are more than two paired standard errors above the teacher."""
        if self.rows < _FEWEST_ROWS:
            return ()
        return tuple(
            each
            for each in self.better
            if each.difference < -_TOO_FAR_BELOW_SE * each.standard_error
        )

    @property
    def still_rises(self) -> bool:
        """Whether its curve ends at its best, a standard error above where it was before.

        That is the evaluation after three quarters of the training, or the last but one.
        """
        if len(self.curve) < 2:
            return False
        before = min(len(self.curve) - 2, math.ceil(0.75 * len(self.curve)) - 1)
        last = self.curve[-1]
        return last == max(self.curve) and last - self.curve[before] > self.standard_error

    @computed_field  # type: ignore[prop-decorator]
    @property
    def findings(self) -> tuple[str, ...]:
        """What speaks against the teacher, in words; nothing if it is worth imitating."""
        metric, teacher = " and ".join(self.metrics), f"the teacher {self.teacher}"
        lines = [
            f"{teacher} is below a simpler model on {self.rows} rows of select: {metric} "
            f"{self.score:.4f}, {each.name} {each.select_score:.4f} ({100 * each.difference:.1f} "
            f"points, standard error {100 * each.standard_error:.1f})"
            for each in self.better
        ]
        rows = sum(self.unanswered.values())
        if rows >= _ROWS_UNANSWERED:
            names = sorted(self.unanswered, key=lambda name: -self.unanswered[name])
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            lines.append(
                f"{teacher} never answers {len(names)} of {self.labels} labels, which {rows} of "
                f"{self.rows} rows of select have: {', '.join(names[:_NAMED])}{more}; no student "
                "of it will"
            )
        if self.still_rises:
            lines.append(
                f"{teacher} was still getting better when its learning rate fell: {metric} "
                f"{', '.join(f'{score:.4f}' for score in self.curve[-4:])}"
            )
        return tuple(lines)

    @property
    def remedy(self) -> str:
        """What makes a better teacher, as settings to type."""
        ways = []
        if self.cut > _CUT and any(each.name == BAG_OF_WORDS for each in self.better):
            ways.append(
                f"{self.cut:.0%} of its texts are cut, and a bag of words reads on: raise "
                "data.max_length_tokens"
            )
        if self.finetune is None:
            ways.append(
                "the teacher came as a finished classifier: see that data.labels has its order and "
                "that it was made for such rows, or train a new head on them: 'teacher.finetune="
                "{epochs: 5, batch_size: 32, lr: 1e-4}'"
            )
        else:
            settings = self.finetune
            longer = f"teacher.finetune.epochs={3 * settings.epochs}"
            if settings.min_updates:
                longer += f" teacher.finetune.min_updates={3 * settings.min_updates}"
            if settings.lr is not None:
                longer += f" teacher.finetune.lr={2 * settings.lr:g}"
            ways.append(
                f"train the teacher longer: {longer}; or take an encoder that knows such texts "
                "(teacher.model)"
            )
        return "; ".join(ways)

    def insist_worth_imitating(self, *, accepted: bool) -> None:
        """Say what speaks against the teacher, and stop where a simpler model is far better.

        Args:
            accepted: the recipe says to go on with it as it is.

        Raises:
            GateFailed: names the teacher, the models that are better, and a remedy.
        """
        far = self.far_better
        if far and not accepted:
            raise GateFailed(
                "the teacher is not worth imitating:\n  " + "\n  ".join(self.findings),
                hint=f"{self.remedy}; or go on with it as it is: teacher.accept=true",
            )
        for line in self.findings:
            logger.warning("%s", line)
        if self.findings:
            accepted_words = "; teacher.accept lets it pass" if far else ""
            logger.warning("a better teacher: %s%s", self.remedy, accepted_words)


class ModelManifest(Record):
    """``sha256.json`` of a saved teacher or student: what it was made from, and its files."""

    inputs: str
    files: dict[str, str]
