"""What the gate writes to disk: its verdicts, the latency that it measures, and the Bento."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import computed_field

from ad2kit.exporting.records import Check, Verdict
from ad2kit.run.errors import GateFailed
from ad2kit.run.records import Part, Record
from ad2kit.run.sections import ParityRecipe

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.models.records import TeacherReport


logger = logging.getLogger(__name__)
_NAMED = 10


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


class RowAnswers(Record):
    """One line of ``answers.jsonl``: a validation row, and the logits that each model gave it.

    ``label`` is an id, a list of zeros and ones, or a number, as the task has it.
    """

    texts: tuple[str, ...]
    tokens: int
    label: int | float | tuple[int, ...]
    logits: dict[str, tuple[float, ...]]


def insist_passed(
    verdict: ParityReport,
    what: Path,
    *,
    report: Path | None = None,
    teacher: TeacherReport | None = None,
) -> None:
    """Say the verdict on each variant, and stop where none passed.

    Args:
        verdict: of the gate.
        what: was judged.
        report: where the whole verdict lies.
        teacher: what is known of the teacher beside simpler models.

    Raises:
        GateFailed: names every check that did not pass, with its value and its threshold.
    """
    if verdict.passed:
        for line in verdict.words():
            logger.info("parity: %s", line)
        return
    whole = "--json shows all checks" if report is None else f"the whole report is {report}"
    reason = _reason(verdict, teacher, report)
    said = f"the parity gate of {what} failed"
    if verdict.verdict == "not shown":
        said = (
            f"the parity gate of {what} is not shown to be passed by {verdict.rows:,} validation "
            "rows, and what is not shown does not ship"
        )
        rows = verdict.rows_that_would_do()
        reason = (
            f"more validation rows alone will hardly do; {reason}"
            if rows is None
            else f"the reason is too few rows: give about {rows:,} labelled validation rows, or "
            "lower the bound in `parity`"
        )
    raise GateFailed(f"{said}:\n  " + "\n  ".join(verdict.failures()), hint=f"{reason}; {whole}")


def _reason(verdict: ParityReport, teacher: TeacherReport | None, report: Path | None) -> str:
    """Return what a failed gate is due to, conversion, teacher or student, and a remedy."""
    failed = [[check for check in found.checks if not check.passed] for found in verdict.variants]
    if any(check.question == "export fidelity" for checks in failed for check in checks):
        again = (
            "look at tokenizer, labels and export"
            if report is None
            else (f"export again (delete {report.parent / 'onnx'}, then `ad2kit export`)")
        )
        return (
            "the reason is the conversion: the artefact computes something else than the student "
            "that was trained, which no training mends; look at the first of these checks, and "
            f"{again}"
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
            "is not; raise export.search_seconds, or ship another variant (export.variants)"
        )
    best = max(verdict.variants, key=lambda found: found.retained)
    low, high = best.retained_interval
    return (
        f"the reason is the student: the best variant, {best.variant}, retains {best.retained:.2%} "
        f"({low:.2%} to {high:.2%}) of its teacher; train it longer "
        "(distill.epochs, distill.lr), give it more layers (student.layers) or texts without "
        "labels (data.unlabelled)"
    )


P99_TARGET_MS = 50.0
"""For which capacity is stated where nothing else was asked for."""

BUSY_SPREAD = 1.3
"""Rounds of the same calls that differ by more than this were not alone on the machine."""


class LatencyCell(Part):
    """Timed calls of one system at one shape; the percentiles are of whole calls.

    ``p99_ms`` is None where fewer than 100 calls were timed: it would be the slowest of them, which
    is ``max_ms``. ``rounds_ms`` holds the median of each round, in which the systems took turns.
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
        """What 99 of 100 calls keep within; the slowest call where there are fewer than 100."""
        known = self.p99_ms if self.p99_ms is not None else self.max_ms
        return math.inf if known is None else known

    @property
    def spread(self) -> float:
        """The slowest round over the fastest; 1 where the rounds are not known."""
        return max(self.rounds_ms, default=1.0) / min(self.rounds_ms, default=1.0)


class Capacity(Part):
    """What one system sustains at one length within the target of its p99.

    Of the measured batch sizes whose calls keep within the target, the one with the most texts/s:
    those of a single caller that sends the next batch when the last one is answered, on all threads
    of the report. Tokenising, HTTP and queues are not in it. Batch size, rate and cost are None if
    no measured batch size keeps within the target. ``cost_per_million_texts`` is in the currency
    of the price, of a machine that is never idle.
    """

    system: str
    length_tokens: int
    batch_size: int | None = None
    texts_per_s: float | None = None
    cost_per_million_texts: float | None = None


class LatencyReport(Record):
    """Latency of the PyTorch models and of every ONNX variant, measured in one run.

    ``artifacts`` holds the sha256 of each variant's manifest. ``price_per_hour`` is what the user
    pays for this machine.
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
        """The slowest round over the fastest of the cell where they are furthest apart."""
        return max((cell.spread for cell in self.cells), default=1.0)

    @property
    def busy(self) -> bool:
        """Whether others used the machine meanwhile: rounds of the same calls differ too much."""
        return self.spread > BUSY_SPREAD

    @computed_field  # type: ignore[prop-decorator]
    @property
    def capacity(self) -> tuple[Capacity, ...]:
        """What every system sustains at every measured length."""
        lengths = sorted({cell.length_tokens for cell in self.cells})
        return tuple(
            self._capacity(system, length) for length in lengths for system in self.sizes_bytes
        )

    def _capacity(self, system: str, length: int) -> Capacity:
        within = [
            cell
            for cell in self.cells
            if (cell.system, cell.length_tokens) == (system, length)
            and cell.tail_ms <= self.p99_target_ms
        ]
        if not within:
            return Capacity(system=system, length_tokens=length)
        best = max(within, key=lambda cell: cell.texts_per_s)
        cost = self.price_per_hour and self.price_per_hour / (best.texts_per_s * 3600) * 1e6
        return Capacity(
            system=system,
            length_tokens=length,
            batch_size=best.batch_size,
            texts_per_s=best.texts_per_s,
            cost_per_million_texts=cost,
        )


class BentoRecord(Record):
    """The published Bento and what its service answered before it was published."""

    inputs: str
    tag: str
    variant: str
    forced: bool
    service_texts: int
    service_label_flips: int
    service_score_gap: float
