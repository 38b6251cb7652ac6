"""Decides whether a student can still become good enough, and whether it has become so.

The first decision uses ``select`` during the training, the second the validation rows at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ad2kit.exporting.records import QuantisationSearch
from ad2kit.gate.questions import retained, retained_check
from ad2kit.gate.records import RowAnswers
from ad2kit.run.files import read_lines
from ad2kit.run.records import CampaignVerdict
from ad2kit.statistics.logits import answers
from ad2kit.statistics.metrics import mean_metric as score_of
from ad2kit.statistics.metrics import paired_bootstrap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ad2kit.exporting.records import Verdict
    from ad2kit.gate.records import ParityReport
    from ad2kit.run.folder import RunDir

# Chance of error of the first interval, for both of its sides together.
_ERROR = 0.05
# With two standard errors, giving a candidate up is wrong once in forty times, by sampling alone.
_STANDARD_ERRORS = 2.0
# The number of decisions during a training.
_LOOKS_AT_A_CURVE = 6


def thinned(scores: Sequence[float], planned: int) -> Sequence[float]:
    """Return the scores at about six equal distances of a training.

    If there are many evaluations, the difference of two neighbours is mostly chance. It would make
    a training look hopeless that has only begun.

    Args:
        scores: scores on ``select`` of the evaluations so far.
        planned: number of evaluations of the whole training.
    """
    step = math.ceil(planned / _LOOKS_AT_A_CURVE)
    return scores[step - 1 :: step]


def hopeless(scores: Sequence[float], rows: int, needed: float) -> bool:
    """Tell whether a training cannot be expected to reach the score that it needs.

    Learning curves flatten: if each part of a training gains at most half as much as the part
    before, all later parts together gain at most as much as the last one. A training is hopeless if
    its last score plus its last gain is below ``needed`` by more than two standard errors of a
    share of so many rows. A single score is never hopeless.

    Args:
        scores: scores on ``select`` so far, at equal distances, about six in a training.
        rows: number of rows of ``select``.
        needed: the score that the training has to reach.
    """
    if len(scores) < 2:
        return False
    last = scores[-1]
    error = math.sqrt(max(last * (1 - last), 0.0) / rows)
    return last + max(0.0, last - scores[-2]) + _STANDARD_ERRORS * error < needed


def error_of(look: int) -> float:
    """Return the chance of error of the interval at the ``look``-th look, counted from 1.

    The first look at the validation rows has the 5 % of an ordinary run: its lower bound is too
    high once in forty times. Each later look has half of the error of the look before, and all
    later looks together as much as the first. So the chance that any lower bound is too high stays
    below 5 %, however many looks there are (Bonferroni's inequality).
    """
    return _ERROR / 2.0 ** (look - 1)


class Look(NamedTuple):
    """The verdict of the validation rows on a variant; it has passed if ``failures`` is empty.

    ``verdict`` is the verdict of the gate; where the gate has passed, it is the verdict with the
    wider interval. ``number`` counts the looks at these rows and determines the width of
    ``interval``. ``weak`` means that the variant fails only by what it retains, although it
    retained enough on ``select``. The student's other variants would fail too, because their
    answers are nearly the same.
    """

    number: int
    variant: str
    manifest_sha256: str
    retained: float
    interval: tuple[float, float]
    failures: list[str]
    verdict: Verdict
    weak: bool

    def facts(self) -> dict[str, Any]:
        """Return the fields of the :class:`Candidate` that this look determines."""
        return {
            "look": self.number,
            "variant": self.variant,
            "retained": self.retained,
            "retained_interval": self.interval,
        }

    def record(self) -> CampaignVerdict:
        """Return the record of this look that is written into the run."""
        return CampaignVerdict(
            variant=self.variant,
            manifest_sha256=self.manifest_sha256,
            look=self.number,
            error=error_of(self.number),
            interval=self.interval,
            failures=tuple(self.failures),
        )


def lost_on_select(run: RunDir, variant: str) -> float:
    """Return the loss of a variant's score on ``select`` by its conversion, as a fraction.

    It is known for int8 alone, which is chosen on ``select``. It is 0 for the others: they differ
    from fp32 by rounding, or were not measured there (``steady``).
    """
    if variant != "int8":
        return 0.0
    search = QuantisationSearch.read(run.int8_search)
    taken = next(trial for trial in search.trials if trial.way == search.taken)
    return taken.points_lost / 100


@dataclass
class Looks:
    """The looks at the validation rows: who needs one, their number, and what they teach.

    Args:
        retain: the fraction of its teacher's score that a student has to keep.
        labels: labels of the validation rows.
        looks: number of looks so far.
        falls: of each judged candidate, retained on ``select`` minus retained on validation.
    """

    retain: float
    labels: NDArray[Any]
    looks: int = 0
    falls: list[float] = field(default_factory=list)

    def needed(self) -> float:
        """Return the fraction that a candidate has to retain on ``select`` to be judged.

        If earlier candidates retained less on the validation rows than on ``select``, the next one
        has to exceed ``retain`` by a part of that loss. One part of the loss is a difference of the
        rows, the rest is chance. After n candidates the part is n / (n + 1) of the mean loss, the
        expected difference of the rows if both vary equally. This saves looks, each of which makes
        the next one harder to pass.
        """
        return self.retain + max(0.0, sum(self.falls) / (len(self.falls) + 1))

    def learn(self, on_select: float, on_validation: float) -> None:
        """Record what a judged candidate retains on ``select`` and on the validation rows."""
        self.falls.append(on_select - on_validation)

    def look(self, run: RunDir, report: ParityReport, variant: str) -> Look:
        """Look at the validation rows: return the verdict on a variant of a run.

        Args:
            run: a run whose parity has been judged.
            report: the parity report of the run.
            variant: one of the variants of the run.
        """
        self.looks += 1
        recipe = run.recipe
        rows = [RowAnswers.model_validate_json(line) for line in read_lines(run.answers)]
        both_answers = [
            answers(recipe.data.task, np.array([row.logits[name] for row in rows], np.float32))
            for name in (variant, "teacher")
        ]
        draws = paired_bootstrap(
            recipe.data.judged_by,
            both_answers,
            self.labels,
            recipe.parity.bootstrap_samples,
            recipe.seed,
        )
        score, teacher_score = (
            score_of(recipe.data.judged_by, model_answers, self.labels)
            for model_answers in both_answers
        )
        kept = retained(score, teacher_score, draws, len(self.labels), error_of(self.looks))
        check = retained_check(recipe.data.judged_by, kept, recipe.parity)
        (judged,) = (result for result in report.variants if result.variant == variant)
        failures = report.failures(variant)
        verdict = judged.verdict
        if judged.passed and not check.passed:
            failures = [f"{variant}, at look {self.looks}: {check.words}"]
            verdict = check.verdict
        failed_questions = {check.question for check in judged.checks if not check.passed}
        weak = bool(failures) and failed_questions <= {"distillation quality"}
        return Look(
            self.looks,
            variant,
            judged.manifest_sha256,
            judged.retained,
            kept.interval,
            failures,
            verdict,
            weak,
        )
