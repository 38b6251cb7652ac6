"""The questions of the parity gate, as functions from arrays to checks.

Arrays run over the rows of the validation set; logits have shape [rows, outputs].

A row without a label has the teacher's answer in its place: a student is then judged by how often
it answers as its teacher, with the exact interval of that share. An agreement of a bounds what is
lost: the scores of student and teacher on the missing labels differ by 1 - a at most (accuracy). If
some rows have labels, what these show against the student counts. "Retained" has to reach its
target on them, and need not be shown only if they are too few to show it of a perfect student.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from ad2kit.data.labels import counts, filled, has_label
from ad2kit.exporting.conversion import (
    LabelledRows,
    Question,
    agreement,
    at_least,
    at_most,
    estimated,
    not_finite,
)
from ad2kit.gate.records import (
    ClassAgreement,
    ClassRecall,
    LengthSlice,
    SliceAgreement,
    TeacherAgreement,
    VariantParity,
)
from ad2kit.statistics import metrics, sample_size
from ad2kit.statistics.label_order import better_order
from ad2kit.statistics.logits import answers, softmax

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ad2kit.data.splits import Encoded
    from ad2kit.exporting.classifier import OnnxClassifier
    from ad2kit.exporting.records import Check
    from ad2kit.exporting.tokenise import Tokens
    from ad2kit.run.sections import Metric, ParityRecipe, Task
    from ad2kit.statistics.sample_size import Estimate, LostClasses

    Logits = NDArray[np.float32]
    Texts = tuple[str, ...]


# Batch 1, extra padding, padding on the left and reversed order are tried on this many texts; the
# plain batched comparison covers them all.
PROBES = 64
# At most this many lost classes are named.
_NAMED = 12
# Longer texts are made from this many texts, each joined with the texts that follow it.
_LONGER = 8


@dataclass(frozen=True)
class Reference(LabelledRows):
    """The logits that the artefacts are compared with, over the rows of the validation set.

    ``teacher`` holds the logits of the PyTorch teacher, float32 [rows, outputs], and ``student``
    those of the PyTorch student for all windows of the texts, [windows, outputs]; see
    :class:`~ad2kit.data.splits.Encoded`. ``student_left`` holds the student's logits of
    :func:`probe_rows` alone, computed as one batch with padding on the left. ``own_label``
    says which rows have a label of their own, bool [rows]; the others have the teacher's answer.
    None stands for all rows.
    """

    teacher: Logits
    student: Logits
    encoded: Encoded
    student_left: Logits
    own_label: NDArray[np.bool_] | None = None

    @classmethod
    def of(
        cls,
        task: Task,
        metrics: tuple[Metric, ...],
        encoded: Encoded,
        *,
        teacher: Logits,
        student: Logits,
        student_left: Logits,
    ) -> Reference:
        """Return the reference of encoded rows, some of which may lack their label."""
        labels = encoded.labels
        return cls(
            task,
            metrics,
            filled(task, labels, teacher),
            teacher,
            student,
            encoded,
            student_left,
            own_label=has_label(task, labels),
        )

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """Which rows have a label of their own, bool [rows]."""
        return np.ones(len(self.labels), bool) if self.own_label is None else self.own_label

    @property
    def judged(self) -> NDArray[np.intp]:
        """The rows that are scored: those with labels, or all if none has one."""
        return np.flatnonzero(self.labelled if self.labelled.any() else ~self.labelled)

    def on_labels(self) -> LabelledRows:
        """Return the labels of the :attr:`judged` rows."""
        return LabelledRows(self.task, self.metrics, self.labels[self.judged])

    def of_the_models(self, student: Logits) -> dict[str, Any]:
        """Return the fields of a :class:`~ad2kit.gate.records.ParityReport` about the models.

        ``student`` are the logits whose score is that of the student.
        """
        rows = self.on_labels()
        teacher = self.teacher[self.judged]
        predictions = answers(self.task, teacher)
        has_calibration = self.task == "single_label" and self.labelled.any()
        return {
            "labelled_rows": None if self.labelled.all() else int(self.labelled.sum()),
            "teacher_score": rows.score(teacher),
            "teacher_metrics": {
                name: metrics.metric_value(name, predictions, rows.labels) for name in self.metrics
            },
            "teacher_ece": _ece(teacher, rows.labels) if has_calibration else None,
            "student_score": rows.score(student[self.judged]),
        }


def probe_rows(encoded: Encoded) -> NDArray[np.intp]:
    """Return at most :data:`PROBES` windows, evenly spaced in the order of all by length."""
    order = np.argsort(encoded.input_ids.lengths, kind="stable")
    rows: NDArray[np.intp] = order[np.unique(np.linspace(0, len(order) - 1, PROBES).astype(int))]
    return rows


def export_fidelity(
    classifier: OnnxClassifier,
    encodings: Sequence[Tokens],
    logits: Logits,
    reference: Reference,
    thresholds: ParityRecipe,
) -> tuple[Check, ...]:
    """Question 1: compare a graph that should compute the same as the student with the student.

    The service never pads on the left. But a graph that gets padding on the left wrong has lost the
    attention mask: it derives the masked positions from the length of a text.

    Args:
        classifier: the fp32 variant, or the fused one.
        encodings: the windows of all validation texts, made by the serving tokenizer.
        logits: the logits of these windows, computed in batches, shape [windows, labels].
        reference: the student's own logits and token ids.
        thresholds: those of the recipe.
    """
    expected = reference.student
    probes = probe_rows(reference.encoded)
    longest = encodings[probes[-1]]
    alone = np.concatenate([classifier.run([encodings[row]]) for row in probes])
    # The longest text in every batch pads all others as far as this data can.
    padded = np.concatenate([classifier.run([encodings[row], longest])[:1] for row in probes])
    left = classifier.run([encodings[row] for row in probes], left=True)
    backwards = classifier.run([encodings[row] for row in probes[::-1]])[::-1]

    def gap(actual: Logits, target: Logits) -> float:
        # A NaN counts as an infinite gap.
        return float(np.nan_to_num(np.abs(actual - target), nan=np.inf).max())

    gaps = {
        "logit gap, batches": gap(logits, expected),
        "logit gap, one by one": gap(alone, expected[probes]),
        "logit gap, padded": gap(padded, expected[probes]),
        "logit gap, padded on the left": gap(left, reference.student_left),
        "logit gap, reversed order": gap(backwards, expected[probes]),
    }
    question: Question = "export fidelity"
    flip_checks = []
    if reference.task != "regression":
        changed = answers(reference.task, logits) != answers(reference.task, expected)
        flip_checks = [
            at_most(question, "label flips", int(changed.sum()), thresholds.max_label_flips)
        ]
    return (
        at_most(question, "logits not finite", not_finite(logits), 0),
        *flip_checks,
        *(at_most(question, name, value, thresholds.max_logit_gap) for name, value in gaps.items()),
    )


def same_token_ids(
    encodings: Sequence[Tokens], encoded: Encoded, what: str = "texts"
) -> tuple[Check, ...]:
    """Question 1, for every variant: serving feeds the same token ids to the model as training.

    Args:
        encodings: the tokens of some texts, made by the serving tokenizer.
        encoded: the same texts, encoded by the student's tokenizer.
        what: the name of these texts in the report.
    """
    expected_types = encoded.token_type_ids or [[0] * len(ids) for ids in encoded.input_ids]
    # A text may have another number of windows.
    mismatches = {
        "token ids": sum(
            found != ids
            for found, ids in zip_longest([each.ids for each in encodings], encoded.input_ids)
        ),
        "segment ids": sum(
            found != ids
            for found, ids in zip_longest([each.type_ids for each in encodings], expected_types)
        ),
    }
    return tuple(
        at_most("export fidelity", f"{what} with other {name}", count, 0)
        for name, count in mismatches.items()
    )


def longer_texts(encoded: Encoded, texts: Sequence[Texts], max_length_tokens: int) -> list[Texts]:
    """Return texts that are longer than the model reads, joined from consecutive texts.

    For pairs, the first text, the second text or both are long. Only long texts show which side of
    a text is cut, and there may be none among the texts of the gate.

    Args:
        encoded: the encoded texts, for their lengths in tokens.
        texts: the same texts, of one or two columns.
        max_length_tokens: the maximum length of the model.
    """
    long_texts: list[Texts] = []
    for first in range(min(_LONGER, len(texts))):
        for length in (max_length_tokens, 4 * max_length_tokens):
            row = first
            tokens = 0
            parts: list[Texts] = []
            while tokens <= length:
                parts.append(texts[row])
                # There are up to 4 special tokens; count one token at least, so that this ends.
                tokens += max(1, int(encoded.lengths[row]) - 4)
                row = (row + 1) % len(texts)
            short = texts[first]
            long = tuple(map(" ".join, zip(*parts, strict=True)))
            long_texts.append(long)
            if len(long) > 1:
                long_texts += [(long[0], short[1]), (short[0], long[1])]
    return long_texts


def distillation_quality(
    variant: str,
    manifest_sha256: str,
    logits: Logits,
    reference: Reference,
    names: tuple[str, ...],
    earlier: tuple[Check, ...],
    thresholds: ParityRecipe,
    seed: int,
    temperature: float = 1.0,
) -> VariantParity:
    """Question 3: compare a variant with the teacher, and return all that the gate says of it.

    Args:
        variant: its name.
        manifest_sha256: the sha256 of its manifest.
        logits: its logits, shape [rows, outputs].
        reference: the teacher's logits and the labels of the same rows.
        names: the names of the labels.
        earlier: the checks of questions 1 and 2.
        thresholds: those of the recipe.
        seed: the seed of the bootstrap.
        temperature: the divisor of the logits that are served.
    """
    task = reference.task
    all_finite = np.nan_to_num(logits, nan=0.0, posinf=0.0, neginf=0.0)
    lost = _lost_classes(all_finite, reference, names)
    # From here on: the rows that have labels.
    scored = reference.on_labels()
    labels = scored.labels
    finite, teacher = all_finite[reference.judged], reference.teacher[reference.judged]
    predictions = answers(task, finite)
    teacher_predictions = answers(task, teacher)
    score, teacher_score = scored.score(finite), scored.score(teacher)
    draws = metrics.paired_bootstrap(
        reference.metrics,
        (predictions, teacher_predictions),
        labels,
        thresholds.bootstrap_samples,
        seed,
    )
    retention = retained(score, teacher_score, draws, len(labels))
    has_classes = task == "single_label" and bool(reference.labelled.any())
    right, teacher_right = predictions == labels, teacher_predictions == labels
    return VariantParity(
        variant=variant,
        manifest_sha256=manifest_sha256,
        score=score,
        metrics={
            name: metrics.metric_value(name, predictions, labels) for name in reference.metrics
        },
        retained=retention.value,
        retained_interval=retention.interval,
        smallest_detectable_difference=metrics.smallest_detectable_difference(draws, len(labels)),
        mcnemar_p=metrics.mcnemar_p(right, teacher_right) if has_classes else None,
        recall_by_class=_recalls(task, predictions, teacher_predictions, labels, names),
        temperature=temperature,
        ece=_ece(finite / temperature, labels) if has_classes else None,
        ece_unscaled=_ece(finite, labels) if has_classes else None,
        slices=_slices(all_finite, reference),
        untested_classes=_untested_classes(lost, names),
        agreement=_agreement(all_finite, reference, names),
        checks=(
            *earlier,
            *_by_labels(
                reference,
                (
                    *_teacher_beats_majority(task, teacher_predictions, labels),
                    *_order_of_labels(task, teacher_predictions, labels, names),
                    retained_check(reference.metrics, retention, thresholds),
                ),
            ),
            *_variety(task, answers(task, all_finite)),
            *_classes_kept(task, lost, names),
            *_by_answers(all_finite, reference, thresholds),
        ),
    )


def _lost_classes(
    logits: Logits, reference: Reference, names: tuple[str, ...]
) -> LostClasses | None:
    """Return the classes that the teacher gives and the variant does not; None of a regression."""
    task = reference.task
    if task == "regression":
        return None
    teacher_answers = answers(task, reference.teacher)
    return sample_size.lost_classes(task, answers(task, logits), teacher_answers, len(names))


def _recalls(
    task: Task,
    predictions: NDArray[Any],
    teacher_predictions: NDArray[Any],
    labels: NDArray[Any],
    names: tuple[str, ...],
) -> dict[str, ClassRecall]:
    """Return the share of the rows of each class that the variant and its teacher find."""
    recall = metrics.recall_by_class(task, predictions, labels, names)
    teacher_recall = metrics.recall_by_class(task, teacher_predictions, labels, names)
    support = counts(task, labels, names)
    return {
        name: ClassRecall(rows=support[name], teacher=teacher_recall[name], variant=value)
        for name, value in recall.items()
    }


def _by_labels(reference: Reference, checks: tuple[Check, ...]) -> tuple[Check, ...]:
    """Return the checks that labels decide; if rows lack labels, without what few cannot show."""
    if reference.labelled.all():
        return checks
    if not reference.labelled.any():
        return ()
    return tuple(
        check
        for check in checks
        if check.verdict != "not shown" or not check.reached or _could_be_shown(check)
    )


def _could_be_shown(check: Check) -> bool:
    """Tell whether an interval as wide, around a student as good as its teacher, would pass."""
    if check.interval is None or check.limit is None:
        return True
    return 1.0 - (check.value - check.interval[0]) >= check.limit


def _by_answers(
    logits: Logits, reference: Reference, thresholds: ParityRecipe
) -> tuple[Check, ...]:
    """Check that the student answers as its teacher, if rows lack labels."""
    if reference.labelled.all():
        return ()
    kind = "correlation" if reference.task == "regression" else "agreement"
    return (
        estimated(
            "distillation quality",
            f"{kind} with its teacher",
            "at least",
            agreement(reference.task, logits, reference.teacher),
            thresholds.min_teacher_agreement,
            thresholds.min_teacher_agreement_lower,
            best=1.0,
        ),
    )


def _agreement(
    logits: Logits, reference: Reference, names: tuple[str, ...]
) -> TeacherAgreement | None:
    """Return the comparison with the teacher on all rows; None if all rows have labels."""
    if reference.labelled.all():
        return None
    task = reference.task
    whole = agreement(task, logits, reference.teacher)
    said = answers(task, reference.teacher)
    kept = metrics.recall_by_class(task, answers(task, logits), said, names)
    given = counts(task, said, names)
    slices = [
        SliceAgreement(
            tokens=tokens,
            rows=len(rows),
            agreement=agreement(task, logits[rows], reference.teacher[rows]).value,
        )
        for tokens, rows in _quarters(reference, np.arange(len(logits)))
    ]
    return TeacherAgreement(
        rows=whole.rows,
        value=whole.value,
        interval=whole.interval,
        by_class={
            name: ClassAgreement(rows=given[name], agreement=share) for name, share in kept.items()
        },
        slices=tuple(slices),
    )


def _untested_classes(lost: LostClasses | None, names: tuple[str, ...]) -> dict[str, int]:
    """Return how many rows the teacher gives each class that has too few rows to be tested."""
    if lost is None:
        return {}
    return {names[index]: int(lost.given[index]) for index in lost.too_few}


def retained(
    score: float,
    teacher_score: float,
    draws: NDArray[np.float64],
    rows: int,
    error: float = sample_size.ERROR,
) -> Estimate:
    """Return the ratio of the student's score to the teacher's score, with an interval.

    Args:
        score: the score of the student.
        teacher_score: the score of the teacher; if it is 0 or less, nothing is retained.
        draws: paired bootstrap scores of student and teacher, shape [samples, 2].
        rows: the number of rows behind the scores.
        error: the probability that the interval misses the true ratio.
    """
    value = score / teacher_score if teacher_score > 0 else 0.0
    unit = 1 / teacher_score if teacher_score > 0 else 1.0
    teacher = np.where(draws[:, 1] > 0, draws[:, 1], np.inf)
    deviation = float((draws[:, 0] / teacher).std())
    interval = metrics.retained_interval(draws, error)
    return sample_size.about_normal(value, interval, deviation, rows, unit=unit, error=error)


def retained_check(
    names: tuple[Metric, ...], retention: Estimate, thresholds: ParityRecipe
) -> Check:
    """Return the check of the ratio of :func:`retained`; ``names`` are the metrics of the score."""
    return estimated(
        "distillation quality",
        f"{' and '.join(names)} retained",
        "at least",
        retention,
        thresholds.min_retained,
        thresholds.min_retained_lower,
        best=1.0,
    )


def _ece(logits: Logits, labels: NDArray[Any]) -> float:
    return metrics.expected_calibration_error(softmax(logits), labels)


def _slices(logits: Logits, reference: Reference) -> tuple[LengthSlice, ...]:
    """Return the scores on each quarter of the texts by length, the shortest texts first."""
    slices = []
    for tokens, rows in _quarters(reference, reference.judged):
        labelled_rows = LabelledRows(reference.task, reference.metrics, reference.labels[rows])
        slices.append(
            LengthSlice(
                tokens=tokens,
                rows=len(rows),
                score=labelled_rows.score(logits[rows]),
                teacher_score=labelled_rows.score(reference.teacher[rows]),
            )
        )
    return tuple(slices)


def _quarters(
    reference: Reference, rows: NDArray[np.intp]
) -> list[tuple[tuple[int, int], NDArray[np.intp]]]:
    """Return each quarter of some rows by length: the range of tokens, and the rows."""
    lengths = reference.encoded.lengths[rows]
    edges = np.unique(np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1.0], method="higher"))
    quarters = np.maximum(np.searchsorted(edges, lengths, side="left"), 1)
    parts = []
    for quarter in np.unique(quarters):
        inside = quarters == quarter
        tokens = int(lengths[inside].min()), int(lengths[inside].max())
        parts.append((tokens, rows[inside]))
    return parts


def _teacher_beats_majority(
    task: Task, teacher_predictions: NDArray[Any], labels: NDArray[Any]
) -> tuple[Check, ...]:
    """Check that the teacher is better than the most frequent label as the answer to all rows.

    A student of a bad teacher can retain all of its score.
    """
    if task != "single_label":
        return ()
    is_right = teacher_predictions == labels
    is_majority = labels == np.bincount(labels).argmax()
    rows = len(labels)
    accuracy = float(is_right.mean())
    # The differences are paired, row by row.
    deviation = float((is_right.astype(int) - is_majority).std())
    half_width = sample_size.half_width(deviation, rows)
    interval = accuracy - half_width, accuracy + half_width
    estimate = sample_size.about_normal(accuracy, interval, deviation / rows**0.5, rows)
    return (
        estimated(
            "distillation quality",
            "teacher accuracy, against the most frequent label",
            "at least",
            estimate,
            float(is_majority.mean()),
            None,
            best=1.0,
        ),
    )


def _order_of_labels(
    task: Task, teacher_predictions: NDArray[Any], labels: NDArray[Any], names: tuple[str, ...]
) -> tuple[Check, ...]:
    """Check that no other assignment of the teacher's outputs to the labels fits far better."""
    if task == "regression":
        return ()
    order = better_order(task, teacher_predictions, labels, len(names))
    gain = 0.0 if order is None else order.then - order.now
    note = None if order is None else order.words(names)
    check = at_most(
        "distillation quality", "teacher's right answers gained by another order of labels", gain, 0
    )
    return (check.model_copy(update={"note": note}),)


def _variety(task: Task, predictions: NDArray[Any]) -> tuple[Check, ...]:
    """Check that the student gives at least two different answers, whatever its teacher does."""
    question: Question = "distillation quality"
    if task == "multi_label":
        return ()
    name = "different values predicted" if task == "regression" else "classes predicted"
    return (at_least(question, name, len(np.unique(predictions)), 2),)


def _classes_kept(
    task: Task, classes: LostClasses | None, names: tuple[str, ...]
) -> tuple[Check, ...]:
    """Check that the student has not lost a class; accuracy hardly shows the loss of a rare one."""
    if classes is None:
        return ()
    kind = "labels" if task == "multi_label" else "classes"
    check = at_most("distillation quality", f"{kind} that the student lost", len(classes.lost), 0)
    if not classes.lost:
        return (check,)
    words = [
        f"{names[index]} ({classes.kept[index]} of the {classes.given[index]} rows of its teacher)"
        for index in classes.lost[:_NAMED]
    ]
    if len(classes.lost) > _NAMED:
        words.append(f"{len(classes.lost) - _NAMED} more")
    return (check.model_copy(update={"note": f"lost: {', '.join(words)}"}),)
