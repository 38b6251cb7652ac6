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

Verdict = Literal["passed", "FAILED", "not shown"]
"""Not shown: the validation rows are too few to say that it passed, or that it failed."""


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


class RowsNeeded(Part):
    """How many rows show a check, where there are ``present`` ones; no number does if null.

    Of samples of so many rows, four of five pass if the true value is ``truth``.
    """

    truth: float
    rows: int | None
    present: int

    @property
    def words(self) -> str:
        """What more rows would do."""
        if self.rows is None:
            return f"no number of validation rows would show a true value of {self.truth:.4g}"
        show = f"about {self.rows:,} validation rows show a true value of {self.truth:.4g}"
        if self.rows > self.present:
            return f"{show} (with 80 % power), and these are {self.present:,}"
        return (
            f"{show} (with 80 % power), and these are {self.present:,}: more rows alone will "
            "hardly show it"
        )


class Check(Part):
    """One threshold of the gate beside the value that was measured, and what it may be due to.

    An estimate from validation rows has a 95 % ``interval`` too. It is passed if the value keeps
    within the threshold and the interval within the ``limit``; it has failed if the whole interval
    misses the threshold; else so many rows do not show which, and ``needed`` says how many would.
    What was not sampled has no interval, and is passed or has failed.
    """

    question: Literal["export fidelity", "conversion cost", "distillation quality"]
    name: str
    value: float
    bound: Literal["at most", "at least"]
    threshold: float
    interval: tuple[float, float] | None = None
    limit: float | None = None
    needed: RowsNeeded | None = None
    note: str | None = None

    @property
    def reached(self) -> bool:
        """Whether the value keeps within its threshold, whatever its interval; NaN never does."""
        return self._within(self.value, self.threshold)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Verdict:
        """What so many rows say."""
        if self.interval is None:
            return "passed" if self.reached else "FAILED"
        low, high = self.interval
        worst, best = (low, high) if self.bound == "at least" else (high, low)
        if self.reached and (self.limit is None or self._within(worst, self.limit)):
            return "passed"
        return "not shown" if self._within(best, self.threshold) else "FAILED"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Whether it is shown that the value keeps within its threshold."""
        return self.verdict == "passed"

    def _within(self, value: float, threshold: float) -> bool:
        return value <= threshold if self.bound == "at most" else value >= threshold

    @property
    def measured(self) -> str:
        """The value and its interval."""
        if self.interval is None:
            return f"{self.value:.4g}"
        low, high = self.interval
        return f"{self.value:.4g} [{low:.4g}, {high:.4g}]"

    @property
    def expected(self) -> str:
        """The threshold, and how far the interval may reach beyond it."""
        words = f"{self.bound} {self.threshold:g}"
        if self.limit is None:
            return words
        side = "from" if self.bound == "at least" else "up to"
        return f"{words}, its interval {side} {self.limit:g}"

    @property
    def words(self) -> str:
        """The check as a sentence: what was measured, what was expected, what would show it."""
        notes = [] if self.note is None else [self.note]
        if self.verdict == "not shown" and self.needed is not None:
            notes.insert(0, f"not shown: {self.needed.words}")
        return "; ".join([f"{self.name} is {self.measured}, expected {self.expected}", *notes])


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
    the temperature. ``slices`` begin with the shortest texts. ``untested_classes`` are those that
    the teacher gives on so few rows (their number) that none could be shown to be lost.
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
    untested_classes: dict[str, int]
    checks: tuple[Check, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Verdict:
        """FAILED if a check has; passed if all have; otherwise not shown."""
        found = {check.verdict for check in self.checks}
        return "FAILED" if "FAILED" in found else "not shown" if "not shown" in found else "passed"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Whether every check of this variant passed."""
        return self.verdict == "passed"

    def reasons(self) -> list[str]:
        """Return in words why this variant did not pass, those that failed first."""
        found = sorted(self.checks, key=lambda check: check.verdict != "FAILED")
        return [check.words for check in found if not check.passed]


class ParityReport(Record):
    """The verdict of the gate on the labelled validation set.

    ``student_score`` is of the PyTorch student, or of the graph where that is all there is;
    ``answers_sha256`` is of the file of :class:`RowAnswers` beside the report, if there is one. A
    copy lies in the folder of each variant that was judged, and goes where the variant goes.
    """

    file_name: ClassVar[str] = "parity.json"
    cure: ClassVar[str] = "delete it and run `ad2kit parity` on its run again"

    # 1 knew no limits, and called a class lost on a single row.
    schema_version: Literal[2] = 2  # type: ignore[assignment]
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
    def verdict(self) -> Verdict:
        """The best verdict of a variant: a verdict belongs to a variant, and one may ship."""
        found = {variant.verdict for variant in self.variants}
        return "passed" if "passed" in found else "not shown" if "not shown" in found else "FAILED"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Whether there is a variant to ship."""
        return self.verdict == "passed"

    def words(self) -> list[str]:
        """Return a line for each variant: that it passed, or every reason why it did not."""
        return [
            "; ".join([f"{found.variant}: {found.verdict}", *found.reasons()])
            for found in self.variants
        ]

    def rows_that_would_do(self) -> int | None:
        """Return how many validation rows would show the variant that is nearest to it.

        None if there is none that lacks rows alone.
        """
        found = list[int]()
        for variant in self.variants:
            if variant.verdict != "not shown":
                continue
            needed = [c.needed for c in variant.checks if c.verdict == "not shown" and c.needed]
            rows = [each.rows for each in needed if each.rows and each.rows > each.present]
            if needed and len(rows) == len(needed):
                found.append(max(rows))
        return min(found, default=None)

    def failures(self, variant: str | None = None) -> list[str]:
        """Return a line for each check that did not pass, of one variant or of all."""
        return [
            f"{found.variant}: {reason}"
            for found in self.variants
            if variant in (None, found.variant)
            for reason in found.reasons()
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
        GateFailed: names every check that did not pass, with its value and its threshold.
    """
    if verdict.passed:
        for line in verdict.words():
            logger.info("parity: %s", line)
        return
    where = "" if report is None else f"the whole report is {report}; "
    if verdict.verdict == "not shown":
        rows = verdict.rows_that_would_do()
        cure = (
            "train longer, change the student or the teacher, or lower the bound in `parity`: "
            "more validation rows alone will hardly do"
            if rows is None
            else f"give about {rows:,} labelled validation rows, or lower the bound in `parity`"
        )
        raise GateFailed(
            f"the parity gate of {what} is not shown to be passed by {verdict.rows:,} validation "
            "rows, and what is not shown does not ship:\n  " + "\n  ".join(verdict.failures()),
            hint=f"{where}{cure}",
        )
    if report is None:
        hint = "look at tokenizer, labels and export; --json shows all checks"
    elif any(_is_unfaithful(check) for found in verdict.variants for check in found.checks):
        hint = (
            f"{where}the artefact computes something else than the student "
            "that was trained, which no training mends: look at the first of these checks, and "
            f"export again (delete {report.parent / 'onnx'}, then `ad2kit export`)"
        )
    else:
        hint = (
            f"{where}train longer, change the student, or leave the variant out (export.variants)"
        )
    raise GateFailed(
        f"the parity gate of {what} failed:\n  " + "\n  ".join(verdict.failures()), hint=hint
    )


def _is_unfaithful(check: Check) -> bool:
    return check.question == "export fidelity" and not check.passed
