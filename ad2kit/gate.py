"""The questions of the parity gate, as functions from arrays to checks.

Arrays run over the rows of the labelled validation set; logits have shape [rows, labels].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ad2kit import metrics
from ad2kit.classifier import softmax
from ad2kit.records import Check, VariantParity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from tokenizers import Encoding

    from ad2kit.classifier import OnnxClassifier
    from ad2kit.data import Encoded
    from ad2kit.recipe import ParityRecipe

    Logits = NDArray[np.float32]

Question = Literal["export fidelity", "conversion cost", "distillation quality"]

# Batch 1, extra padding and reversed order are tried on this many texts, from the shortest to
# the longest; the plain batched comparison covers them all.
PROBES = 64


@dataclass(frozen=True)
class Reference:
    """What the artefacts are compared with, over the rows of the validation set."""

    labels: NDArray[np.int64]
    teacher: Logits
    student: Logits
    encoded: Encoded


def export_fidelity(
    classifier: OnnxClassifier,
    encodings: Sequence[Encoding],
    logits: Logits,
    reference: Reference,
    thresholds: ParityRecipe,
) -> tuple[Check, ...]:
    """Question 1: the fp32 graph and its tokenizer against the PyTorch student.

    Args:
        classifier: the fp32 variant.
        encodings: of all validation texts, by the serving tokenizer.
        logits: of all validation texts in batches, shape [rows, labels].
        reference: with the student's own logits and token ids.
        thresholds: of the recipe.
    """
    expected, ids = reference.student, reference.encoded.input_ids
    order = np.argsort([len(row) for row in ids], kind="stable")
    probes = order[np.unique(np.linspace(0, len(order) - 1, PROBES).astype(int))]
    alone = np.concatenate([classifier.run([encodings[row]]) for row in probes])
    # The longest text in every batch pads all others as far as this data can.
    padded = np.concatenate(
        [classifier.run([encodings[row], encodings[order[-1]]])[:1] for row in probes]
    )
    backwards = classifier.run([encodings[row] for row in probes[::-1]])[::-1]

    def gap(found: Logits, rows: NDArray[np.intp] | slice) -> float:
        # A NaN must not hide in a maximum.
        return float(np.nan_to_num(np.abs(found - expected[rows]), nan=np.inf).max())

    gaps = {
        "logit gap, batches": gap(logits, slice(None)),
        "logit gap, one by one": gap(alone, probes),
        "logit gap, padded": gap(padded, probes),
        "logit gap, reversed order": gap(backwards, probes),
    }
    flips = int((logits.argmax(1) != expected.argmax(1)).sum())
    question: Question = "export fidelity"
    return (
        at_most(question, "logits not finite", _not_finite(logits), 0),
        at_most(question, "label flips", flips, thresholds.max_label_flips),
        *(at_most(question, name, value, thresholds.max_logit_gap) for name, value in gaps.items()),
    )


def same_token_ids(encodings: Sequence[Encoding], encoded: Encoded) -> Check:
    """Question 1, for every variant: serving and training tokenizer give the same token ids."""
    pairs = zip(encodings, encoded.input_ids, strict=True)
    mismatches = sum(encoding.ids != ids for encoding, ids in pairs)
    return at_most("export fidelity", "texts with other token ids", mismatches, 0)


def conversion_cost(
    logits: Logits,
    alone: Logits,
    fp32: Logits,
    labels: NDArray[np.int64],
    thresholds: ParityRecipe,
) -> tuple[Check, ...]:
    """Question 2: a converted variant against fp32; all arrays run over the validation rows.

    The activations of a dynamic int8 graph are quantised over the whole batch, so that an answer
    depends a little on its company: the variant is judged in batches and one by one.
    """
    question: Question = "conversion cost"
    agreement = float((logits.argmax(1) == fp32.argmax(1)).mean())
    agreement_alone = float((alone.argmax(1) == fp32.argmax(1)).mean())
    lost = 100 * (
        metrics.accuracy(fp32.argmax(1), labels)
        - min(metrics.accuracy(found.argmax(1), labels) for found in (logits, alone))
    )
    return (
        at_most(question, "converted logits not finite", _not_finite(logits), 0),
        at_least(question, "label agreement with fp32", agreement, thresholds.min_agreement),
        at_least(
            question,
            "label agreement with fp32, one by one",
            agreement_alone,
            thresholds.min_agreement,
        ),
        at_most(question, "accuracy points lost to fp32", lost, thresholds.max_points_lost),
    )


def distillation_quality(
    variant: str, manifest_sha256: str, logits: Logits, reference: Reference,
    names: tuple[str, ...], earlier: tuple[Check, ...], thresholds: ParityRecipe, seed: int,
) -> VariantParity:  # fmt: skip
    """Question 3: a variant against the teacher; ``earlier`` are its answers so far."""
    predicted, teacher = logits.argmax(1), reference.teacher.argmax(1)
    right, teacher_right = predicted == reference.labels, teacher == reference.labels
    retained = float(right.mean() / max(teacher_right.mean(), 1 / len(right)))
    interval = metrics.retained_interval(right, teacher_right, thresholds.bootstrap_samples, seed)
    recall = metrics.recall_by_class(predicted, reference.labels, names)
    teacher_recall = metrics.recall_by_class(teacher, reference.labels, names)
    question: Question = "distillation quality"
    lost = set(teacher.tolist()) - set(predicted.tolist())
    finite = np.nan_to_num(logits, nan=0.0, posinf=0.0, neginf=0.0)
    return VariantParity(
        variant=variant,
        manifest_sha256=manifest_sha256,
        accuracy=float(right.mean()),
        retained=retained,
        retained_interval=interval,
        mcnemar_p=metrics.mcnemar_p(right, teacher_right),
        recall_change_by_class={name: recall[name] - teacher_recall[name] for name in recall},
        ece=metrics.expected_calibration_error(softmax(finite), reference.labels),
        checks=(
            *earlier,
            # Accuracy hardly notices a rare class that is lost.
            at_most(question, "classes that only the teacher answers", len(lost), 0),
            # And where the teacher gives one answer to everything, nobody wants its student.
            at_least(question, "classes predicted", len(np.unique(predicted)), 2),
            at_least(
                question, "accuracy retained", retained, thresholds.min_retained, interval
            ),
            at_least(
                question, "accuracy retained, lower 95 % bound", interval[0],
                thresholds.min_retained_lower,
            ),
        ),
    )  # fmt: skip


def at_most(question: Question, name: str, value: float, threshold: float) -> Check:
    """Return the check ``value <= threshold``; NaN fails."""
    return Check(
        question=question, name=name, value=value, bound="at most", threshold=threshold
    )  # fmt: skip


def at_least(
    question: Question, name: str, value: float, threshold: float,
    interval: tuple[float, float] | None = None,
) -> Check:  # fmt: skip
    """Return the check ``value >= threshold``; NaN fails."""
    return Check(
        question=question, name=name, value=value, bound="at least", threshold=threshold,
        interval=interval,
    )  # fmt: skip


def _not_finite(logits: Logits) -> int:
    return int((~np.isfinite(logits)).sum())
