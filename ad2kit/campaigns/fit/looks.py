"""Whether a student can become good enough, and how sure it is that it has.

The one is asked of ``select`` while it trains, the other of the validation rows at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ad2kit.data.labels import answers
from ad2kit.data.metrics import mean_metric as score_of
from ad2kit.data.metrics import paired_bootstrap
from ad2kit.exporting.records import QuantisationSearch
from ad2kit.gate.questions import retained, retained_check
from ad2kit.gate.records import RowAnswers
from ad2kit.run.files import read_lines
from ad2kit.run.records import CampaignVerdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ad2kit.exporting.records import Verdict
    from ad2kit.gate.records import ParityReport
    from ad2kit.run.folder import RunDir

_ERROR = 0.05
# A candidate is given up where it would be wrong once in forty times, if nothing else were.
_STANDARD_ERRORS = 2.0
_LOOKS_AT_A_CURVE = 6


def thinned(scores: Sequence[float], planned: int) -> Sequence[float]:
    """Return the scores at about six equal distances of a training.

    From one of many evaluations to the next little happens, and chance decides what: it would make
    a training hopeless that has only begun.

    Args:
        scores: on ``select``, of the evaluations so far.
        planned: how many evaluations the whole training has.
    """
    apart = math.ceil(planned / _LOOKS_AT_A_CURVE)
    return scores[apart - 1 :: apart]


def hopeless(scores: Sequence[float], rows: int, needed: float) -> bool:
    """Tell whether a training is not worth the rest of its updates.

    Learning curves flatten: if a part brings at most half of what the one before brought, all
    that are to come bring at most what the last did. A training is hopeless if its last score, with
    the last gain once more, lies below ``needed`` by more than two standard errors of a share of so
    many rows. Nothing is said of a single score.

    Args:
        scores: on ``select``, at equal distances so far, some six in a training.
        rows: of ``select``.
        needed: the score that it has to reach.
    """
    if len(scores) < 2:
        return False
    last = scores[-1]
    error = math.sqrt(max(last * (1 - last), 0.0) / rows)
    return last + max(0.0, last - scores[-2]) + _STANDARD_ERRORS * error < needed


def error_of(look: int) -> float:
    """Return the chance of error that the interval of the ``look``-th candidate has.

    The first to be judged on the validation rows has the 5 % of an ordinary run: its lower bound
    is too high once in forty times. As much again is shared out among all later ones, halved from
    each to the next, so that the chance that any lower bound is too high stays below 5 % however
    many there are (Bonferroni's inequality).
    """
    return _ERROR / 2.0 ** (look - 1)


class Look(NamedTuple):
    """What the validation rows say of a variant; it has passed if nothing speaks against it.

    ``verdict`` is that of the gate, with the wider interval where the gate has passed it.
    ``number`` counts the looks at these rows; the interval is as wide as that demands. With
    ``weak`` only what it retains speaks against it, of which ``select`` had promised enough: the
    answers of the student's other variants are nearly the same.
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
        """Return what is noted of the candidate."""
        return {
            "look": self.number,
            "variant": self.variant,
            "retained": self.retained,
            "retained_interval": self.interval,
        }

    def record(self) -> CampaignVerdict:
        """Return what is written into the run."""
        return CampaignVerdict(
            variant=self.variant,
            manifest_sha256=self.manifest_sha256,
            look=self.number,
            error=error_of(self.number),
            interval=self.interval,
            failures=tuple(self.failures),
        )


def lost_on_select(run: RunDir, variant: str) -> float:
    """Return what a variant of a run lost of its student's score on ``select`` by its conversion.

    It is known of int8, which was chosen there; the others may differ from fp32 by rounding alone.
    """
    if variant != "int8":
        return 0.0
    search = QuantisationSearch.read(run.int8_search)
    return next(t.points_lost for t in search.trials if t.way == search.taken) / 100


@dataclass
class Looks:
    """Decides who is judged on the validation rows, counts the looks at them, and learns from them.

    Args:
        retain: what a student has to keep of its teacher's score.
        labels: of the validation rows.
    """

    retain: float
    labels: NDArray[Any]
    looks: int = 0
    falls: list[float] = field(default_factory=list)

    def needed(self) -> float:
        """Return what a candidate has to retain on ``select`` to be judged.

        If those before it have lost on the way to the validation rows, it has to bring a part of
        that loss: the rows may differ in kind, and the rest was luck. Of one that is half, of n
        n / (n + 1) of the mean, which is what to expect if kind and luck differ equally. It saves
        looks, each of which makes the next one harder to pass.
        """
        return self.retain + max(0.0, sum(self.falls) / (len(self.falls) + 1))

    def learn(self, on_select: float, on_validation: float) -> None:
        """Take note of what a judged candidate retains on the one and on the other."""
        self.falls.append(on_select - on_validation)

    def look(self, run: RunDir, report: ParityReport, variant: str) -> Look:
        """Return the verdict on a variant of a run, which counts as a look.

        Args:
            run: its parity has been judged.
            report: what was found.
            variant: one of its variants.
        """
        self.looks += 1
        recipe = run.recipe
        rows = [RowAnswers.model_validate_json(line) for line in read_lines(run.answers)]
        found = [
            answers(recipe.data.task, np.array([row.logits[name] for row in rows], np.float32))
            for name in (variant, "teacher")
        ]
        draws = paired_bootstrap(
            recipe.data.judged_by, found, self.labels, recipe.parity.bootstrap_samples, recipe.seed
        )
        score, teacher_score = (
            score_of(recipe.data.judged_by, each, self.labels) for each in found
        )
        kept = retained(score, teacher_score, draws, len(self.labels), error_of(self.looks))
        check = retained_check(recipe.data.judged_by, kept, recipe.parity)
        (judged,) = (each for each in report.variants if each.variant == variant)
        failures, verdict = report.failures(variant), judged.verdict
        if judged.passed and not check.passed:
            failures, verdict = [f"{variant}, at look {self.looks}: {check.words}"], check.verdict
        weak = bool(failures) and {
            check.question for check in judged.checks if not check.passed
        } <= {"distillation quality"}
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
