"""What the judges write to disk: of the teacher, of the search for int8, and of the gate."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import computed_field

from ad2kit.errors import GateFailed
from ad2kit.records import Part, Record
from ad2kit.sections import (  # noqa: TC001  (pydantic reads them at run time)
    Metric,
    ParityRecipe,
    TrainRecipe,
)

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

Verdict = Literal["passed", "FAILED", "not shown"]
"""Not shown: the validation rows are too few to say that it passed, or that it failed."""

# A teacher this many paired standard errors below a baseline is not worth imitating.
_TOO_FAR_BELOW_SE = 2.0
# With fewer rows a standard error says too little to stop a run for.
_FEWEST_ROWS = 30
# Labels without any answer are named if they have as many rows of `select` together: with many
# classes a good teacher misses a few that have one row each.
_ROWS_UNANSWERED = 5
_NAMED = 10
# From this share of cut texts on, a bag of words may know more than a teacher only by reading on.
_CUT = 0.1
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


class QuantisationTrial(Part):
    """One way to quantise, tried on ``select``; all its figures are of those rows.

    ``agreement`` is with the labels of fp32 (a correlation for a regression), in batches or one by
    one, whichever is less; ``rms_error`` is the root of the mean square of what the logits differ
    by, whichever is more. ``batch_ms`` is of a text in batches of 32, ``alone_ms`` of one alone.
    """

    way: str
    agreement: float
    rms_error: float
    points_lost: float
    failures: tuple[str, ...]
    size_bytes: int
    batch_ms: float
    alone_ms: float


class QuantisationSearch(Record):
    """All that was tried for int8, in order, and what was taken."""

    # 1 did not say how far the logits were moved.
    schema_version: Literal[2] = 2  # type: ignore[assignment]
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


def insist_passed(
    verdict: ParityReport, what: Path, *, report: Path | None = None,
    teacher: TeacherReport | None = None,
) -> None:  # fmt: skip
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
    failed = [
        [check for check in found.checks if not check.passed] for found in verdict.variants
    ]  # fmt: skip
    if any(check.question == "export fidelity" for checks in failed for check in checks):
        again = "look at tokenizer, labels and export" if report is None else (
            f"export again (delete {report.parent / 'onnx'}, then `ad2kit export`)"
        )  # fmt: skip
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
