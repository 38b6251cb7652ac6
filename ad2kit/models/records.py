"""Records of models: the manifest of a saved model, and the comparison of a teacher."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import computed_field

from ad2kit.run.errors import GateFailed
from ad2kit.run.records import Part, Record
from ad2kit.run.sections import Metric, TrainRecipe

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

# A teacher this many paired standard errors below a baseline is not worth imitating.
_TOO_FAR_BELOW_SE = 2.0
# With fewer rows a standard error is too uncertain to stop a run.
FEWEST_ROWS = 30
# Labels that the teacher never answers are named if together they have this many rows of `select`:
# with many classes a good teacher misses a few classes of one row each.
_ROWS_UNANSWERED = 5
# Above this share of cut texts a bag of words may be better only because it reads the whole texts.
_CUT = 0.1
_NAMED = 10
BAG_OF_WORDS = "bag of words"

ANSWERS = "answers.safetensors"
"""The file in the folder of a teacher that is given by its answers; see models/given.py."""


def is_given(teacher: Path) -> bool:
    """Tell whether the folder of a teacher holds its answers in place of a model."""
    return (teacher / ANSWERS).is_file()


class Baseline(Part):
    """A simpler model that is compared with the teacher, trained on rows of ``train``.

    ``difference`` is the teacher's score on ``select`` minus the baseline's score.
    ``standard_error`` is the standard error of this difference, paired over the rows. The teacher
    should not be below a baseline that is a ``bar``; the other baselines are for information.
    """

    name: str
    bar: bool
    select_score: float
    validation_score: float
    difference: float
    standard_error: float


class TeacherReport(Record):
    """``teacher.json``: the comparison of the teacher with simpler models, before distillation.

    ``score`` and ``standard_error`` are the teacher's on the ``rows`` rows of ``select``. The
    baselines were trained on ``train_rows`` rows; their ``validation_score`` decides nothing.
    ``unanswered`` maps each label of ``select`` that the teacher never answers to its rows there.
    ``curve`` holds the teacher's scores on ``select`` during its fine-tuning, before the learning
    rate fell, if this run fine-tuned it. ``cut`` is the share of rows whose texts are longer than
    the maximum length. A teacher is ``given`` if only its answers are known.
    """

    file_name: ClassVar[str] = "teacher.json"

    inputs: str
    teacher: str
    given: bool = False
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
        """The baselines with a ``bar`` that score more than the teacher, the best first."""
        winners = [each for each in self.baselines if each.bar and each.difference < 0]
        return tuple(sorted(winners, key=lambda each: each.difference))

    @property
    def far_better(self) -> tuple[Baseline, ...]:
        """The better baselines that are more than two paired standard errors above the teacher."""
        if self.rows < FEWEST_ROWS:
            return ()
        return tuple(
            each
            for each in self.better
            if each.difference < -_TOO_FAR_BELOW_SE * each.standard_error
        )

    @property
    def still_rises(self) -> bool:
        """Whether the curve ends at its maximum, a standard error above an earlier evaluation.

        The earlier evaluation is the one after three quarters of the training, or the last but one.
        """
        if len(self.curve) < 2:
            return False
        earlier = min(len(self.curve) - 2, math.ceil(0.75 * len(self.curve)) - 1)
        last = self.curve[-1]
        return last == max(self.curve) and last - self.curve[earlier] > self.standard_error

    @computed_field  # type: ignore[prop-decorator]
    @property
    def findings(self) -> tuple[str, ...]:
        """The reasons against the teacher, in words; empty if it is worth imitating."""
        metric = " and ".join(self.metrics)
        teacher = f"the teacher {self.teacher}"
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
        """The settings that make a better teacher, for a hint."""
        advice = []
        if self.cut > _CUT and any(each.name == BAG_OF_WORDS for each in self.better):
            windows = (
                ""
                if self.given
                else (
                    ", or, if the student has the teacher's tokenizer, set data.long_texts=windows"
                )
            )
            advice.append(
                f"{self.cut:.0%} of its texts are cut, and a bag of words reads on: raise "
                f"data.max_length_tokens{windows}"
            )
        if self.given:
            advice.append(
                "look at some of its wrong answers, and see that their labels are those of the "
                "data; ask a better model, or with a better prompt"
            )
        elif self.finetune is None:
            advice.append(
                "the teacher came as a finished classifier: see that data.labels has its order and "
                "that it was made for such rows, or train a new head on them: 'teacher.finetune="
                "{epochs: 5, batch_size: 32, lr: 1e-4}'"
            )
        else:
            settings = self.finetune
            overrides = f"teacher.finetune.epochs={3 * settings.epochs}"
            if settings.min_updates:
                overrides += f" teacher.finetune.min_updates={3 * settings.min_updates}"
            if settings.lr is not None:
                overrides += f" teacher.finetune.lr={2 * settings.lr:g}"
            advice.append(
                f"train the teacher longer: {overrides}; or take an encoder that knows such texts "
                "(teacher.model)"
            )
        return "; ".join(advice)

    def check_worth_imitating(self, *, accepted: bool) -> None:
        """Log the findings against the teacher; stop the run if a simpler model is far better.

        Args:
            accepted: the recipe accepts the teacher as it is.

        Raises:
            GateFailed: a simpler model is far better, and the teacher is not accepted; the message
                names the teacher and the better models, the hint a remedy.
        """
        far_better = self.far_better
        if far_better and not accepted:
            raise GateFailed(
                "the teacher is not worth imitating:\n  " + "\n  ".join(self.findings),
                hint=f"{self.remedy}; or go on with it as it is: teacher.accept=true",
            )
        for line in self.findings:
            logger.warning("%s", line)
        if self.findings:
            acceptance = "; teacher.accept lets it pass" if far_better else ""
            logger.warning("a better teacher: %s%s", self.remedy, acceptance)


class ModelManifest(Record):
    """``sha256.json`` of a saved model: the fingerprint of its inputs, and name -> sha256."""

    inputs: str
    files: dict[str, str]
