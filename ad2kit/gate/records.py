"""The records of the gate: its verdicts, the measured latency, and the published Bento."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import computed_field

from ad2kit.exporting.records import Check, Company, Verdict
from ad2kit.run.errors import GateFailed
from ad2kit.run.records import Part, Record
from ad2kit.run.sections import ParityRecipe

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.models.records import TeacherReport


logger = logging.getLogger(__name__)
_NAMED = 10
# These variants compute the same as the student, in another order of operations.
EXACT = ("fp32", "fused")
# The largest change of a probability in company that is a rounding of floats.
_STEADY = 1e-3


P99_TARGET_MS = 50.0
"""The default target of the p99, in ms, for which capacity is stated."""
BUSY_SPREAD = 1.3
"""If rounds of the same calls differ by a larger factor, other programs used the machine."""


class LengthSlice(Part):
    """The scores on the validation texts of one range of lengths, in tokens."""

    tokens: tuple[int, int]
    rows: int
    score: float
    teacher_score: float


class ClassRecall(Part):
    """The number of rows of a class (or label), and the recall of teacher and variant on them."""

    rows: int
    teacher: float
    variant: float


class ClassAgreement(Part):
    """The number of rows to which the teacher gives a class, and the share that a variant does."""

    rows: int
    agreement: float


class SliceAgreement(Part):
    """The agreement on the validation texts of one range of lengths, in tokens."""

    tokens: tuple[int, int]
    rows: int
    agreement: float


class TeacherAgreement(Part):
    """How often a variant answers as its teacher, on all validation rows, with or without labels.

    ``value`` is the share of equal answers with its exact interval (the correlation of a
    regression). ``slices`` begin with the shortest texts.
    """

    rows: int
    value: float
    interval: tuple[float, float]
    by_class: dict[str, ClassAgreement]
    slices: tuple[SliceAgreement, ...]


class VariantParity(Part):
    """The comparison of one variant with the PyTorch student, with fp32 and with the teacher.

    ``score`` is the mean of ``metrics``. Only single-label tasks have McNemar's test and the
    expected calibration error: ``ece`` is that of the served probabilities, ``ece_unscaled`` that
    of the probabilities without the temperature. ``slices`` begin with the shortest texts.
    ``untested_classes`` holds each class that the teacher gives on too few rows to show its loss,
    with the number of these rows.

    If rows lack labels, ``agreement`` compares the variant with the teacher on all rows. The other
    fields are then of the rows that have labels. If no row has one, the answers of the teacher are
    the labels, and the teacher's own score is 1.

    ``company`` says how much the answers depend on the texts beside them; None for the variants
    that compute the same as the student, and in reports of older versions.
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
    agreement: TeacherAgreement | None = None
    company: Company | None = None
    checks: tuple[Check, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Verdict:
        """FAILED if a check failed; passed if all checks passed; otherwise not shown."""
        verdicts = {check.verdict for check in self.checks}
        if "FAILED" in verdicts:
            return "FAILED"
        return "not shown" if "not shown" in verdicts else "passed"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Whether every check of this variant passed."""
        return self.verdict == "passed"

    @property
    def is_steady(self) -> bool:
        """Whether it is shown that no answer depends on the texts that share a batch."""
        if self.variant in EXACT:
            return True
        return self.company is not None and not self.company.flips and self.company.shift <= _STEADY

    @property
    def words(self) -> str:
        """What the variant keeps of its teacher, with the interval."""
        if self.agreement is not None:
            low, high = self.agreement.interval
            interval = f"({low:.2%} to {high:.2%})"
            if not self.agreement.by_class:  # a regression
                return f"correlates with its teacher by {self.agreement.value:.2%} {interval}"
            return (
                f"agrees with its teacher on {self.agreement.value:.2%} {interval} of "
                f"{self.agreement.rows:,} rows"
            )
        low, high = self.retained_interval
        return f"retains {self.retained:.2%} ({low:.2%} to {high:.2%}) of its teacher"

    def reasons(self) -> list[str]:
        """Return a sentence for each check that did not pass, the failed checks first."""
        failed_first = sorted(self.checks, key=lambda check: check.verdict != "FAILED")
        return [check.words for check in failed_first if not check.passed]


class ParityReport(Record):
    """The verdict of the gate on the validation set.

    ``labelled_rows`` is the number of rows that have labels; None stands for all.
    ``student_score`` is the score of the PyTorch student, or of the graph if there is no student.
    ``answers_sha256`` is the sha256 of the file of :class:`RowAnswers` beside the report, if there
    is one. The folder of each judged variant holds a copy of the report, which moves with it.
    """

    file_name: ClassVar[str] = "parity.json"
    cure: ClassVar[str] = "delete it and run `ad2kit parity` on its run again"

    # Version 1 had no limits for intervals, and called a class lost because of a single row.
    schema_version: Literal[2] = 2  # type: ignore[assignment]
    inputs: str
    thresholds: ParityRecipe
    rows: int
    labelled_rows: int | None = None
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
        """The best verdict of all variants, because one variant is enough to ship."""
        verdicts = {variant.verdict for variant in self.variants}
        if "passed" in verdicts:
            return "passed"
        return "not shown" if "not shown" in verdicts else "FAILED"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Whether there is a variant to ship."""
        return self.verdict == "passed"

    @property
    def judged_against(self) -> str:
        """What the variants were judged against, in words."""
        teacher = f"the teacher's answers to {self.rows:,} validation rows"
        if self.labelled_rows is None:
            return f"the labels of {self.rows:,} validation rows"
        if not self.labelled_rows:
            return f"{teacher}, which have no labels"
        return f"{teacher}, and the labels of {self.labelled_rows:,} of them"

    def words(self) -> list[str]:
        """Return a line for each variant: its verdict, and every reason if it did not pass."""
        return [
            "; ".join([f"{variant.variant}: {variant.verdict}", *variant.reasons()])
            for variant in self.variants
        ]

    def rows_that_would_do(self) -> int | None:
        """Return the least number of validation rows that would show that a variant passes.

        None if no variant fails by a lack of rows alone.
        """
        rows_by_variant: list[int] = []
        for variant in self.variants:
            if variant.verdict != "not shown":
                continue
            needs = [
                check.needed
                for check in variant.checks
                if check.verdict == "not shown" and check.needed
            ]
            rows = [need.rows for need in needs if need.rows and need.rows > need.present]
            if needs and len(rows) == len(needs):
                rows_by_variant.append(max(rows))
        return min(rows_by_variant, default=None)

    def failures(self, variant: str | None = None) -> list[str]:
        """Return a line for each check that did not pass, of one variant or of all."""
        return [
            f"{verdict.variant}: {reason}"
            for verdict in self.variants
            if variant in (None, verdict.variant)
            for reason in verdict.reasons()
        ]


class RowAnswers(Record):
    """One line of ``answers.jsonl``: a validation row, and the logits of each model for it.

    ``label`` depends on the task: an id, a list of zeros and ones, or a number; None without one.
    """

    texts: tuple[str, ...]
    tokens: int
    label: int | float | tuple[int, ...] | None
    logits: dict[str, tuple[float, ...]]


def check_passed(
    verdict: ParityReport,
    what: Path,
    *,
    report: Path | None = None,
    teacher: TeacherReport | None = None,
) -> None:
    """Log the verdict on each variant, and raise an error if none passed.

    Args:
        verdict: the report of the gate.
        what: the run or the model that was judged.
        report: the file of the whole report, if it was written.
        teacher: the comparison of the teacher with simpler models, if there is one.

    Raises:
        GateFailed: no variant passed. The message names every check that did not pass, with its
            value and its threshold.
    """
    if verdict.passed:
        for line in verdict.words():
            logger.info("parity: %s", line)
        return
    details = "--json shows all checks" if report is None else f"the whole report is {report}"
    reason = _reason(verdict, teacher, report)
    statement = f"the parity gate of {what} failed"
    if verdict.verdict == "not shown":
        statement = (
            f"the parity gate of {what} is not shown to be passed by {verdict.rows:,} validation "
            "rows, and what is not shown does not ship"
        )
        rows = verdict.rows_that_would_do()
        labelled = "" if verdict.labelled_rows == 0 else "labelled "
        if rows is None:
            reason = f"more validation rows alone will hardly do; {reason}"
        else:
            reason = (
                f"the reason is too few rows: give about {rows:,} {labelled}validation rows, or "
                "lower the bound in `parity`"
            )
    failures = "\n  ".join(verdict.failures())
    raise GateFailed(f"{statement}:\n  {failures}", hint=f"{reason}; {details}")


def _reason(verdict: ParityReport, teacher: TeacherReport | None, report: Path | None) -> str:
    """Return the cause of a failed gate (conversion, teacher or student), and a remedy."""
    failed = [
        [check for check in variant.checks if not check.passed] for variant in verdict.variants
    ]
    if any(check.question == "export fidelity" for checks in failed for check in checks):
        remedy = "look at tokenizer, labels and export"
        if report is not None:
            remedy = f"export again (delete {report.parent / 'onnx'}, then `ad2kit export`)"
        return (
            "the reason is the conversion: the artefact computes something else than the student "
            "that was trained, which no training mends; look at the first of these checks, and "
            f"{remedy}"
        )
    if teacher is not None and teacher.far_better:
        return (
            f"the reason is the teacher, before the student: {teacher.findings[0]}. "
            f"{teacher.remedy}"
        )
    if any(check.name.startswith("teacher") for checks in failed for check in checks):
        return (
            "the reason is the teacher: a student of it can be no better than it is; see that "
            "data.labels has its order, and train it longer (teacher.finetune) or take another one"
        )
    if any(all(check.question == "conversion cost" for check in checks) for checks in failed):
        return (
            "the reason is the conversion: the student is good enough, and what was made from it "
            "is not; add fused, steady or int8 to export.variants, or raise export.search_seconds"
        )
    best = max(verdict.variants, key=lambda variant: variant.retained)
    return (
        f"the reason is the student: the best variant, {best.variant}, {best.words}; train it "
        "longer (distill.epochs, distill.lr), give it more layers (student.layers) or texts "
        "without labels (data.unlabelled)"
    )


class LatencyCell(Part):
    """The timed calls of one system at one shape; the percentiles are those of whole calls.

    ``p99_ms`` is None if fewer than 100 calls were timed: it would be the slowest call, ``max_ms``.
    ``rounds_ms`` holds the median of each round; the systems took turns in rounds.
    """

    system: str
    batch_size: int
    length_tokens: int
    calls: int
    p50_ms: float
    p90_ms: float
    p99_ms: float | None
    max_ms: float | None = None
    rounds_ms: tuple[float, ...] = ()
    texts_per_s: float

    @property
    def tail_ms(self) -> float:
        """The p99; the slowest call if fewer than 100 were timed; infinity if neither is known."""
        if self.p99_ms is not None:
            return self.p99_ms
        return math.inf if self.max_ms is None else self.max_ms

    @property
    def spread(self) -> float:
        """The ratio of the slowest round to the fastest; 1 if the rounds are not known."""
        return max(self.rounds_ms, default=1.0) / min(self.rounds_ms, default=1.0)


class Capacity(Part):
    """The throughput that one system sustains at one length within the target of its p99.

    ``batch_size`` is the measured batch size with the most texts/s whose tail latency keeps within
    the target. A single caller sends the next batch when the last one is answered; the system uses
    all threads of the report. Tokenising, HTTP and queues are not included. Batch size, rate and
    cost are None if no measured batch size keeps within the target. ``cost_per_million_texts`` is
    in the currency of the price, for a machine that is never idle.
    """

    system: str
    length_tokens: int
    batch_size: int | None = None
    texts_per_s: float | None = None
    cost_per_million_texts: float | None = None


class LatencyReport(Record):
    """The latency of the PyTorch models and of every ONNX variant, measured in one run.

    ``artifacts`` holds the sha256 of each variant's manifest. ``price_per_hour`` is the user's
    price of this machine.
    """

    inputs: str
    artifacts: dict[str, str]
    threads: int
    environment: dict[str, str]
    sizes_bytes: dict[str, int]
    cells: tuple[LatencyCell, ...]
    p99_target_ms: float = P99_TARGET_MS
    price_per_hour: float | None = None

    @property
    def spread(self) -> float:
        """The largest ratio of the slowest round to the fastest over all cells."""
        return max((cell.spread for cell in self.cells), default=1.0)

    @property
    def busy(self) -> bool:
        """Whether other programs used the machine: rounds of the same calls differ too much."""
        return self.spread > BUSY_SPREAD

    @computed_field  # type: ignore[prop-decorator]
    @property
    def capacity(self) -> tuple[Capacity, ...]:
        """The capacity of every system at every measured length."""
        lengths = sorted({cell.length_tokens for cell in self.cells})
        return tuple(
            self._capacity(system, length) for length in lengths for system in self.sizes_bytes
        )

    def _capacity(self, system: str, length: int) -> Capacity:
        cells_within_target = [
            cell
            for cell in self.cells
            if (cell.system, cell.length_tokens) == (system, length)
            and cell.tail_ms <= self.p99_target_ms
        ]
        if not cells_within_target:
            return Capacity(system=system, length_tokens=length)
        best = max(cells_within_target, key=lambda cell: cell.texts_per_s)
        cost = self.price_per_hour
        if cost:
            cost = cost / (best.texts_per_s * 3600) * 1e6
        return Capacity(
            system=system,
            length_tokens=length,
            batch_size=best.batch_size,
            texts_per_s=best.texts_per_s,
            cost_per_million_texts=cost,
        )


class BentoRecord(Record):
    """The published Bento, and the check of its service's answers before it was published."""

    inputs: str
    tag: str
    variant: str
    forced: bool
    service_texts: int
    service_label_flips: int
    service_score_gap: float
