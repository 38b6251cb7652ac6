"""The parity stage: is the artefact the student, and is the student as good as the teacher?

Three questions on the labelled validation set, each answered by values beside their thresholds:

1. export fidelity: does the fp32 graph compute what the PyTorch student computes, from the same
   token ids, alone and in a batch, padded and unpadded, in any order?
2. conversion cost: what did another variant lose against fp32?
3. distillation quality: what did each variant keep of the teacher?

The fourth, whether the service answers what the artefact computes, is asked by ``package``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from ad2kit import __version__, metrics, models
from ad2kit import data as datasets
from ad2kit.classifier import OnnxClassifier, softmax
from ad2kit.errors import GateFailed, RunError
from ad2kit.files import fingerprint, sha256_of, write_record
from ad2kit.records import Check, DistillReport, OnnxArtifact, ParityReport, VariantParity
from ad2kit.run_dir import exclusive
from ad2kit.runtime import available_cpus
from ad2kit.training import predict_logits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from tokenizers import Encoding

    from ad2kit.data import Encoded
    from ad2kit.recipe import ParityRecipe
    from ad2kit.run_dir import RunDir

    Logits = NDArray[np.float32]

logger = logging.getLogger(__name__)

BATCH = 32
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


@exclusive
def parity(run: RunDir) -> ParityReport:
    """Ask the questions of every variant of a run, write the report, and return it.

    A report that is not ``passed`` is written all the same; it is for the caller to stop.

    Raises:
        RunError: nothing is exported yet, or the validation data changed since the distillation.
        ModelError: teacher, student or a variant is not the one that was written.
    """
    recipe, distilled = run.recipe, DistillReport.read(run.distill_report)
    folders = [run.onnx(variant) for variant in recipe.export.variants]
    for folder in folders:
        run.require(folder / OnnxArtifact.file_name, command="export")
    data = datasets.load_data(recipe.data, recipe.seed)
    if data.validation.sha256() != distilled.splits["validation"].sha256:
        raise RunError(
            f"the validation data changed since {run.path} was distilled: sha256 expected "
            f"{distilled.splits['validation'].sha256[:12]}…, found "
            f"{data.validation.sha256()[:12]}…",
            hint="restore the data; a gate on other data proves nothing about this run",
        )
    inputs = fingerprint(
        __version__,
        [sha256_of(folder / OnnxArtifact.file_name) for folder in folders],
        distilled.teacher_sha256, distilled.student_sha256, distilled.splits["validation"].sha256,
        recipe.parity.model_dump(mode="json"), recipe.seed,
    )  # fmt: skip
    classifiers = {
        folder.name: OnnxClassifier(folder, threads=recipe.compute.threads) for folder in folders
    }
    for folder in (run.teacher, run.student):
        models.check_files(folder)
    if run.parity_report.is_file():
        report = ParityReport.read(run.parity_report)
        if report.inputs == inputs:
            logger.info("parity is already known: %s", run.parity_report)
            return report

    torch.set_num_threads(recipe.compute.threads or available_cpus())
    cpu = torch.device("cpu")
    teacher = models.load(run.teacher, data.labels)
    student = models.load(run.student, data.labels)
    encoded = datasets.encode(data.validation, student.tokenizer, recipe.data.max_length_tokens)
    teacher_encoded = datasets.encode(
        data.validation, teacher.tokenizer, recipe.data.max_length_tokens
    )
    reference = Reference(
        data.validation.labels,
        predict_logits(teacher, teacher_encoded, cpu).numpy(),
        predict_logits(student, encoded, cpu).numpy(),
        encoded,
    )
    texts = [text if len(text) > 1 else text[0] for text in data.validation.texts]
    encodings = {name: c.encode(texts) for name, c in classifiers.items()}  # type: ignore[arg-type]
    logits = {name: c.run_sorted(encodings[name], BATCH) for name, c in classifiers.items()}
    fidelity = export_fidelity(
        classifiers["fp32"], encodings["fp32"], logits["fp32"], reference, recipe.parity
    )
    verdicts = []
    for folder in folders:
        name = folder.name
        # What is made from an unfaithful fp32 graph, or reads other tokens, is no better than it.
        checks = (*fidelity, same_token_ids(encodings[name], encoded))
        if name != "fp32":
            alone = classifiers[name].run_sorted(encodings[name], batch_size=1)
            checks += conversion_cost(
                logits[name], alone, logits["fp32"], reference.labels, recipe.parity
            )
        verdict = distillation_quality(
            name, sha256_of(folder / OnnxArtifact.file_name), logits[name], reference, data.labels,
            checks, recipe.parity, recipe.seed,
        )  # fmt: skip
        verdicts.append(verdict)
    teacher_right = reference.teacher.argmax(1) == reference.labels
    report = ParityReport(
        inputs=inputs,
        thresholds=recipe.parity,
        rows=len(encoded),
        truncated=encoded.truncated,
        smallest_detectable_difference=metrics.smallest_detectable_difference(
            logits["fp32"].argmax(1) == reference.labels, teacher_right
        ),
        teacher_accuracy=float(teacher_right.mean()),
        teacher_ece=metrics.expected_calibration_error(
            softmax(reference.teacher), reference.labels
        ),
        student_accuracy=metrics.accuracy(reference.student.argmax(1), reference.labels),
        variants=tuple(verdicts),
    )
    write_record(run.parity_report, report)
    return report


def insist_passed(report: ParityReport, run: RunDir) -> None:
    """Stop where a gate said no.

    Raises:
        GateFailed: names every check that failed, with its value and its threshold.
    """
    failed = [
        f"  {verdict.variant}: {check.name} is {check.value:.4g}, expected {check.bound} "
        f"{check.threshold:g}"
        for verdict in report.variants
        for check in verdict.checks
        if not check.passed
    ]
    if failed:
        raise GateFailed(
            f"the parity gate of {run.path} failed:\n" + "\n".join(failed),
            hint=f"the whole report is {run.parity_report}; train longer, change the student, or "
            "leave the variant out (export.variants)",
        )


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
    question: Literal["export fidelity"] = "export fidelity"
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
    question: Literal["conversion cost"] = "conversion cost"
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
    question: Literal["distillation quality"] = "distillation quality"
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
            # As many as the teacher predicts; and nobody wants one answer to everything.
            at_least(
                question, "classes predicted", len(np.unique(predicted)),
                max(2, len(np.unique(teacher))),
            ),
            at_least(
                question, "accuracy retained", retained, thresholds.min_retained, interval
            ),
            at_least(
                question, "accuracy retained, lower 95 % bound", interval[0],
                thresholds.min_retained_lower,
            ),
        ),
    )  # fmt: skip


Question = Literal["export fidelity", "conversion cost", "distillation quality"]


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
