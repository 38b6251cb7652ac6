"""The questions of the parity gate, as functions from arrays to checks.

Arrays run over the rows of the labelled validation set; logits have shape [rows, outputs].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ad2kit.data import metrics, sample_size
from ad2kit.data.label_order import better_order
from ad2kit.data.labels import answers, counts, softmax
from ad2kit.exporting.conversion import (
    LabelledRows,
    Question,
    at_least,
    at_most,
    estimated,
    not_finite,
)
from ad2kit.gate.records import ClassRecall, LengthSlice, VariantParity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ad2kit.data.sample_size import Estimate, LostClasses
    from ad2kit.data.splits import Encoded
    from ad2kit.exporting.classifier import OnnxClassifier
    from ad2kit.exporting.records import Check
    from ad2kit.exporting.tokenise import Tokens
    from ad2kit.run.sections import Metric, ParityRecipe, Task

    Logits = NDArray[np.float32]
    Texts = tuple[str, ...]


# Batch 1, extra padding, padding on the left and reversed order are tried on this many texts; the
# plain batched comparison covers them all.
PROBES = 64
# So many lost classes are named.
_NAMED = 12
# Of so many texts, and those that follow them, longer ones are made.
_LONGER = 8


@dataclass(frozen=True)
class Reference(LabelledRows):
    """What the artefacts are compared with, over the rows of the validation set.

    ``student_left`` holds the logits of :func:`probe_rows` alone, as one batch that is padded on
    the left.
    """

    teacher: Logits
    student: Logits
    encoded: Encoded
    student_left: Logits

    def of_the_teacher(self) -> dict[str, Any]:
        """Return what a :class:`~ad2kit.gate.records.ParityReport` says of the teacher alone."""
        found = answers(self.task, self.teacher)
        classes = self.task == "single_label"
        return {
            "teacher_score": self.score(self.teacher),
            "teacher_metrics": {
                name: metrics.metric_value(name, found, self.labels) for name in self.metrics
            },
            "teacher_ece": _ece(self.teacher, self.labels) if classes else None,
        }


def probe_rows(encoded: Encoded) -> NDArray[np.intp]:
    """Return the rows of some texts, from the shortest to the longest."""
    order = np.argsort([len(row) for row in encoded.input_ids], kind="stable")
    rows: NDArray[np.intp] = order[np.unique(np.linspace(0, len(order) - 1, PROBES).astype(int))]
    return rows


def export_fidelity(
    classifier: OnnxClassifier,
    encodings: Sequence[Tokens],
    logits: Logits,
    reference: Reference,
    thresholds: ParityRecipe,
) -> tuple[Check, ...]:
    """Question 1: a graph that should compute the same, and its tokenizer, against the student.

    The service never pads on the left; a graph that gets that wrong has lost the attention mask,
    and computes from the length of a text what the student computes from its mask.

    Args:
        classifier: the fp32 variant, or the fused one.
        encodings: of all validation texts, by the serving tokenizer.
        logits: of all validation texts in batches, shape [rows, labels].
        reference: with the student's own logits and token ids.
        thresholds: of the recipe.
    """
    expected, probes = reference.student, probe_rows(reference.encoded)
    longest = encodings[probes[-1]]
    alone = np.concatenate([classifier.run([encodings[row]]) for row in probes])
    # The longest text in every batch pads all others as far as this data can.
    padded = np.concatenate([classifier.run([encodings[row], longest])[:1] for row in probes])
    left = classifier.run([encodings[row] for row in probes], left=True)
    backwards = classifier.run([encodings[row] for row in probes[::-1]])[::-1]

    def gap(found: Logits, wanted: Logits) -> float:
        # A NaN must not hide in a maximum.
        return float(np.nan_to_num(np.abs(found - wanted), nan=np.inf).max())

    gaps = {
        "logit gap, batches": gap(logits, expected),
        "logit gap, one by one": gap(alone, expected[probes]),
        "logit gap, padded": gap(padded, expected[probes]),
        "logit gap, padded on the left": gap(left, reference.student_left),
        "logit gap, reversed order": gap(backwards, expected[probes]),
    }
    question: Question = "export fidelity"
    flips = []
    if reference.task != "regression":
        changed = answers(reference.task, logits) != answers(reference.task, expected)
        flips = [at_most(question, "label flips", int(changed.sum()), thresholds.max_label_flips)]
    return (
        at_most(question, "logits not finite", not_finite(logits), 0),
        *flips,
        *(at_most(question, name, value, thresholds.max_logit_gap) for name, value in gaps.items()),
    )


def same_token_ids(
    encodings: Sequence[Tokens], encoded: Encoded, what: str = "texts"
) -> tuple[Check, ...]:
    """Question 1, for every variant: what serving feeds to the model is what training fed to it.

    Args:
        encodings: of some texts, by the serving tokenizer.
        encoded: the same texts, by the student's tokenizer.
        what: how these texts are called in the report.
    """
    expected = encoded.token_type_ids or [[0] * len(ids) for ids in encoded.input_ids]
    mismatches = {
        "token ids": sum(
            tokens.ids != ids for tokens, ids in zip(encodings, encoded.input_ids, strict=True)
        ),
        "segment ids": sum(
            tokens.type_ids != ids for tokens, ids in zip(encodings, expected, strict=True)
        ),
    }
    return tuple(
        at_most("export fidelity", f"{what} with other {name}", count, 0)
        for name, count in mismatches.items()
    )


def longer_texts(encoded: Encoded, texts: Sequence[Texts], max_length_tokens: int) -> list[Texts]:
    """Return texts that are longer than the model, made of others one behind the other.

    Of pairs the first, the second or both are long. Which side of a text is cut shows in nothing
    else, and there may be no long text among those of the gate.

    Args:
        encoded: the texts that they are made of, for how many tokens these have.
        texts: the same, of one or two columns.
        max_length_tokens: of the model.
    """
    made: list[Texts] = []
    for first in range(min(_LONGER, len(texts))):
        for wanted in (max_length_tokens, 4 * max_length_tokens):
            row, tokens = first, 0
            parts: list[Texts] = []
            while tokens <= wanted:
                parts.append(texts[row])
                # Whatever special tokens there are, and one at least.
                tokens += max(1, len(encoded.input_ids[row]) - 4)
                row = (row + 1) % len(texts)
            long, short = tuple(map(" ".join, zip(*parts, strict=True))), texts[first]
            made += [long] if len(long) == 1 else [long, (long[0], short[1]), (short[0], long[1])]
    return made


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
    """Question 3: a variant against the teacher; ``earlier`` are its answers so far."""
    task, labels = reference.task, reference.labels
    finite = np.nan_to_num(logits, nan=0.0, posinf=0.0, neginf=0.0)
    ours, teacher = answers(task, finite), answers(task, reference.teacher)
    score, teacher_score = reference.score(finite), reference.score(reference.teacher)
    lost = (
        None if task == "regression" else sample_size.lost_classes(task, ours, teacher, len(names))
    )
    draws = metrics.paired_bootstrap(
        reference.metrics, (ours, teacher), labels, thresholds.bootstrap_samples, seed
    )
    kept = retained(score, teacher_score, draws, len(labels))
    recall, teacher_recall = (
        metrics.recall_by_class(task, found, labels, names) for found in (ours, teacher)
    )
    support = counts(task, labels, names)
    single = task == "single_label"
    return VariantParity(
        variant=variant,
        manifest_sha256=manifest_sha256,
        score=score,
        metrics={name: metrics.metric_value(name, ours, labels) for name in reference.metrics},
        retained=kept.value,
        retained_interval=kept.interval,
        smallest_detectable_difference=metrics.smallest_detectable_difference(draws, len(labels)),
        mcnemar_p=metrics.mcnemar_p(ours == labels, teacher == labels) if single else None,
        recall_by_class={
            name: ClassRecall(rows=support[name], teacher=teacher_recall[name], variant=value)
            for name, value in recall.items()
        },
        temperature=temperature,
        ece=_ece(finite / temperature, labels) if single else None,
        ece_unscaled=_ece(finite, labels) if single else None,
        slices=_slices(finite, reference),
        untested_classes={}
        if lost is None
        else {names[index]: int(lost.given[index]) for index in lost.too_few},
        checks=(
            *earlier,
            *_teacher_knows(task, teacher, labels),
            *_order_of_labels(task, teacher, labels, names),
            *_variety(task, ours),
            *_classes_kept(task, lost, names),
            retained_check(reference.metrics, kept, thresholds),
        ),
    )


def retained(
    score: float,
    teacher_score: float,
    draws: NDArray[np.float64],
    rows: int,
    error: float = sample_size.ERROR,
) -> Estimate:
    """Return the student's score over its teacher's, with an interval of the error ``error``.

    Args:
        score: of the student.
        teacher_score: of the teacher; where it is nothing, nothing is retained.
        draws: paired bootstrap scores of student and teacher, shape [samples, 2].
        rows: that they are of.
        error: the chance that the interval misses the truth.
    """
    value = score / teacher_score if teacher_score > 0 else 0.0
    unit = 1 / teacher_score if teacher_score > 0 else 1.0
    teacher = np.where(draws[:, 1] > 0, draws[:, 1], np.inf)
    deviation = float((draws[:, 0] / teacher).std())
    interval = metrics.retained_interval(draws, error)
    return sample_size.about_normal(value, interval, deviation, rows, unit=unit, error=error)


def retained_check(names: tuple[Metric, ...], kept: Estimate, thresholds: ParityRecipe) -> Check:
    """Return the check of what :func:`retained` found; ``names`` are the metrics of the score."""
    name, least = f"{' and '.join(names)} retained", thresholds.min_retained
    return estimated(
        "distillation quality",
        name,
        "at least",
        kept,
        least,
        thresholds.min_retained_lower,
        best=1.0,
    )


def _ece(logits: Logits, labels: NDArray[Any]) -> float:
    return metrics.expected_calibration_error(softmax(logits), labels)


def _slices(logits: Logits, reference: Reference) -> tuple[LengthSlice, ...]:
    """Return the scores on the quarters of the texts by length, the shortest first."""
    lengths = np.array([len(row) for row in reference.encoded.input_ids])
    edges = np.unique(np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1.0], method="higher"))
    quarter = np.maximum(np.searchsorted(edges, lengths, side="left"), 1)
    found = []
    for index in np.unique(quarter):
        rows = np.flatnonzero(quarter == index)
        some = LabelledRows(reference.task, reference.metrics, reference.labels[rows])
        found.append(
            LengthSlice(
                tokens=(int(lengths[rows].min()), int(lengths[rows].max())),
                rows=len(rows),
                score=some.score(logits[rows]),
                teacher_score=some.score(reference.teacher[rows]),
            )
        )
    return tuple(found)


def _teacher_knows(task: Task, teacher: NDArray[Any], labels: NDArray[Any]) -> tuple[Check, ...]:
    """Insist that the teacher is worth imitating: the student of a bad one keeps all of it."""
    if task != "single_label":
        return ()
    # Paired: what is asked is whether it is better than one answer to everything.
    right, often = teacher == labels, labels == np.bincount(labels).argmax()
    rows, accuracy = len(labels), float(right.mean())
    of_one = float((right.astype(int) - often).std())
    half = sample_size.half_width(of_one, rows)
    interval = accuracy - half, accuracy + half
    found = sample_size.about_normal(accuracy, interval, of_one / rows**0.5, rows)
    return (
        estimated(
            "distillation quality",
            "teacher accuracy, against the most frequent label",
            "at least",
            found,
            float(often.mean()),
            None,
            best=1.0,
        ),
    )


def _order_of_labels(
    task: Task, teacher: NDArray[Any], labels: NDArray[Any], names: tuple[str, ...]
) -> tuple[Check, ...]:
    """Insist that no other assignment of the teacher's outputs to the labels fits far better."""
    if task == "regression":
        return ()
    found = better_order(task, teacher, labels, len(names))
    gain = 0.0 if found is None else found.then - found.now
    check = at_most(
        "distillation quality", "teacher's right answers gained by another order of labels", gain, 0
    )
    return (check.model_copy(update={"note": None if found is None else found.words(names)}),)


def _variety(task: Task, ours: NDArray[Any]) -> tuple[Check, ...]:
    """Insist that the student does not give one answer to everything, whatever its teacher does."""
    question: Question = "distillation quality"
    if task == "regression":
        return (at_least(question, "different values predicted", len(np.unique(ours)), 2),)
    if task == "multi_label":
        return ()
    return (at_least(question, "classes predicted", len(np.unique(ours)), 2),)


def _classes_kept(
    task: Task, found: LostClasses | None, names: tuple[str, ...]
) -> tuple[Check, ...]:
    """Insist that the student has not given up on a class, which accuracy hardly notices."""
    if found is None:
        return ()
    what = "labels" if task == "multi_label" else "classes"
    check = at_most("distillation quality", f"{what} that the student lost", len(found.lost), 0)
    if not found.lost:
        return (check,)
    words = [
        f"{names[each]} ({found.kept[each]} of the {found.given[each]} rows of its teacher)"
        for each in found.lost[:_NAMED]
    ]
    if len(found.lost) > _NAMED:
        words.append(f"{len(found.lost) - _NAMED} more")
    return (check.model_copy(update={"note": f"lost: {', '.join(words)}"}),)
