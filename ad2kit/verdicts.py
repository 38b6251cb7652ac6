"""What the judges write to disk: the search for int8, the checks of the gate, and its report."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import computed_field

from ad2kit.errors import GateFailed
from ad2kit.records import Part, Record
from ad2kit.sections import ParityRecipe  # noqa: TC001  (pydantic reads it at run time)

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)


class QuantisationTrial(Part):
    """One way to quantise, tried on ``select``; all its figures are of those rows.

    ``agreement`` is with the labels of fp32 (a correlation for a regression), in batches or one by
    one, whichever is less. ``batch_ms`` is of a text in batches of 32, ``alone_ms`` of one alone.
    """

    way: str
    agreement: float
    points_lost: float
    failures: tuple[str, ...]
    size_bytes: int
    batch_ms: float
    alone_ms: float


class QuantisationSearch(Record):
    """All that was tried for int8, in order, and what was taken."""

    inputs: str
    rows: int
    seconds: float
    taken: str
    trials: tuple[QuantisationTrial, ...]


class Check(Part):
    """One threshold of the gate beside the value that was measured, and what it may be due to."""

    question: Literal["export fidelity", "conversion cost", "distillation quality"]
    name: str
    value: float
    bound: Literal["at most", "at least"]
    threshold: float
    interval: tuple[float, float] | None = None
    note: str | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Whether the value keeps within its threshold; NaN never does."""
        if self.bound == "at most":
            return self.value <= self.threshold
        return self.value >= self.threshold

    @property
    def words(self) -> str:
        """The check as a sentence: what was measured, and what was expected."""
        note = "" if self.note is None else f"; {self.note}"
        return f"{self.name} is {self.value:.4g}, expected {self.bound} {self.threshold:g}{note}"


class LengthSlice(Part):
    """The validation texts of a range of lengths, and the scores on them."""

    tokens: tuple[int, int]
    rows: int
    score: float
    teacher_score: float


class ClassRecall(Part):
    """The rows of a class (or of a label), and the shares of them that teacher and variant find."""

    rows: int
    teacher: float
    variant: float


class VariantParity(Part):
    """One variant against the PyTorch student, fp32 and the teacher.

    ``score`` is the mean of ``metrics``. McNemar's test and calibration (ECE) are of single-label
    tasks alone; ``ece`` is of the probabilities that are served, ``ece_unscaled`` of those without
    the temperature. ``slices`` begin with the shortest texts.
    """

    variant: str
    manifest_sha256: str
    score: float
    metrics: dict[str, float]
    retained: float
    retained_interval: tuple[float, float]
    smallest_detectable_difference: float
    mcnemar_p: float | None
    recall_by_class: dict[str, ClassRecall]
    temperature: float
    ece: float | None
    ece_unscaled: float | None
    slices: tuple[LengthSlice, ...]
    checks: tuple[Check, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Whether every check of this variant passed."""
        return all(check.passed for check in self.checks)


class ParityReport(Record):
    """The verdict of the gate on the labelled validation set.

    ``student_score`` is of the PyTorch student, or of the graph where that is all there is;
    ``answers_sha256`` is of the file of :class:`RowAnswers` beside the report, if there is one. A
    copy lies in the folder of each variant that was judged, and goes where the variant goes.
    """

    file_name: ClassVar[str] = "parity.json"

    inputs: str
    thresholds: ParityRecipe
    rows: int
    truncated: int
    teacher_score: float
    teacher_metrics: dict[str, float]
    teacher_ece: float | None
    student_score: float
    answers_sha256: str | None
    variants: tuple[VariantParity, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Whether there is a variant to ship: a verdict belongs to a variant."""
        return any(variant.passed for variant in self.variants)

    def words(self) -> list[str]:
        """Return a line for each variant: that it passed, or every reason why it did not."""
        return [
            f"{verdict.variant}: passed"
            if verdict.passed
            else f"{verdict.variant}: FAILED; "
            + "; ".join(check.words for check in verdict.checks if not check.passed)
            for verdict in self.variants
        ]

    def failures(self, variant: str | None = None) -> list[str]:
        """Return a line for each check that failed, of one variant or of all."""
        return [
            f"{verdict.variant}: {check.words}"
            for verdict in self.variants
            for check in verdict.checks
            if not check.passed and variant in (None, verdict.variant)
        ]


class CampaignVerdict(Part):
    """What the rule of a campaign said of a variant, at the ``look``-th look at validation rows.

    The ``interval`` of what the variant retains misses the truth with the chance ``error``.
    """

    variant: str
    manifest_sha256: str
    look: int
    error: float
    interval: tuple[float, float]
    failures: tuple[str, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the variant."""
        return not self.failures


class CampaignRecord(Record):
    """``campaign.json``: which campaign made a run, and what its own rule said of the variants.

    A command takes the run of a campaign only if it is named. Where the campaign has a ``rule``,
    a variant may be shipped if this rule and the gate have passed it.
    """

    file_name: ClassVar[str] = "campaign.json"

    command: str
    rule: str | None = None
    verdicts: tuple[CampaignVerdict, ...] = ()

    def refusals(self, variant: str, manifest_sha256: str) -> list[str]:
        """Return what the rule has against shipping a variant; nothing if it has passed."""
        if self.rule is None:
            return []
        rule = f"by the rule of `{self.command}` ({self.rule})"
        for verdict in self.verdicts:
            if (verdict.variant, verdict.manifest_sha256) == (variant, manifest_sha256):
                return [f"{failure}, {rule}" for failure in verdict.failures]
        return [f"{variant}: not passed {rule}: it was not judged as it lies there"]


class RowAnswers(Record):
    """One line of ``answers.jsonl``: a validation row, and the logits that each model gave it.

    ``label`` is an id, a list of zeros and ones, or a number, as the task has it.
    """

    texts: tuple[str, ...]
    tokens: int
    label: int | float | tuple[int, ...]
    logits: dict[str, tuple[float, ...]]


def insist_passed(verdict: ParityReport, what: Path, *, report: Path | None = None) -> None:
    """Say the verdict on each variant, and stop where none passed.

    Args:
        verdict: of the gate.
        what: was judged.
        report: where the whole verdict lies.

    Raises:
        GateFailed: names every check that failed, with its value and its threshold.
    """
    if verdict.passed:
        for line in verdict.words():
            logger.info("parity: %s", line)
        return
    if report is None:
        hint = "look at tokenizer, labels and export; --json shows all checks"
    elif any(_is_unfaithful(check) for found in verdict.variants for check in found.checks):
        hint = (
            f"the whole report is {report}; the artefact computes something else than the student "
            "that was trained, which no training mends: look at the first of these checks, and "
            f"export again (delete {report.parent / 'onnx'}, then `ad2kit export`)"
        )
    else:
        hint = (
            f"the whole report is {report}; train longer, change the student, or leave the variant "
            "out (export.variants)"
        )
    raise GateFailed(
        f"the parity gate of {what} failed:\n  " + "\n  ".join(verdict.failures()), hint=hint
    )


def _is_unfaithful(check: Check) -> bool:
    return check.question == "export fidelity" and not check.passed
