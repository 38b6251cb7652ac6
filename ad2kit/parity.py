"""The parity stage: is the artefact the student, and is the student as good as the teacher?

Three questions on the labelled validation set, each answered by values beside their thresholds:

1. export fidelity: do the fp32 graph and the fused one compute what the PyTorch student computes,
   from the same token ids, alone and in a batch, padded on either side, in any order?
2. conversion cost: what did fp16 and int8 lose against fp32?
3. distillation quality: what did each variant keep of the teacher?

The fourth, whether the service answers what the artefact computes, is asked by ``package``.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch

from ad2kit import data as datasets
from ad2kit import metrics, models
from ad2kit.classifier import OnnxClassifier
from ad2kit.errors import RunError
from ad2kit.files import fingerprint, sha256_of, write_record, write_text
from ad2kit.gate import (
    Reference,
    conversion_cost,
    distillation_quality,
    export_fidelity,
    longer_texts,
    mostly_8_bits,
    probe_rows,
    same_token_ids,
)
from ad2kit.records import DistillReport, OnnxArtifact
from ad2kit.run_dir import exclusive
from ad2kit.runtime import available_cpus, environment
from ad2kit.tasks import answers, softmax
from ad2kit.training import predict_logits
from ad2kit.verdicts import ParityReport, RowAnswers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ad2kit.classifier import Text
    from ad2kit.models import TextModel
    from ad2kit.run_dir import RunDir
    from ad2kit.verdicts import Check

logger = logging.getLogger(__name__)

BATCH = 32
# The variants that only compute in another order what the student computes.
EXACT = ("fp32", "fused")


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
        environment(recipe.compute.threads or available_cpus()),
        [sha256_of(folder / OnnxArtifact.file_name) for folder in folders],
        distilled.teacher_sha256, distilled.student_sha256, distilled.splits["validation"].sha256,
        recipe.parity.model_dump(mode="json"), recipe.data.judged_by, recipe.seed,
    )  # fmt: skip
    classifiers = {
        folder.name: OnnxClassifier(folder, threads=recipe.compute.threads) for folder in folders
    }
    for folder in (run.teacher, run.student):
        models.check_files(folder)
    if run.parity_report.is_file() and run.answers.is_file():
        report = ParityReport.read(run.parity_report)
        if (report.inputs, report.answers_sha256) == (inputs, sha256_of(run.answers)):
            logger.info("parity is already known: %s", run.parity_report)
            return _beside_variants(report, folders)

    torch.set_num_threads(recipe.compute.threads or available_cpus())
    cpu = torch.device("cpu")
    teacher = models.load(run.teacher, data.labels, data.task)
    student = models.load(run.student, data.labels, data.task)
    encoded = datasets.encode(data.validation, student.tokenizer, recipe.data.max_length_tokens)
    teacher_encoded = datasets.encode(
        data.validation, teacher.tokenizer, recipe.data.max_length_tokens
    )
    texts = _typed(data.validation)
    encodings = {name: c.encode(texts) for name, c in classifiers.items()}
    long = datasets.Split(
        tuple(longer_texts(encoded, data.validation.texts, recipe.data.max_length_tokens)),
        np.empty(0),
    )
    long_encoded = datasets.encode(long, student.tokenizer, recipe.data.max_length_tokens)
    fp32, probes = classifiers["fp32"], [encodings["fp32"][row] for row in probe_rows(encoded)]
    reference = Reference(
        data.task,
        recipe.data.judged_by,
        data.validation.labels,
        teacher=predict_logits(teacher, teacher_encoded, cpu).numpy(),
        student=predict_logits(student, encoded, cpu).numpy(),
        encoded=encoded,
        student_left=_forward(student, fp32.feed(probes, left=True), fp32.input_names),
    )
    logits = {name: c.run_sorted(encodings[name], BATCH) for name, c in classifiers.items()}
    fidelity = {
        name: export_fidelity(c, encodings[name], logits[name], reference, recipe.parity)
        for name, c in classifiers.items()
        if name in EXACT
    }
    verdicts = []
    for folder in folders:
        name = folder.name
        # What is made from an unfaithful graph, or reads other tokens, is no better than it.
        checks = (
            *(fidelity[name] if name in EXACT else _all_of(fidelity)),
            *same_token_ids(encodings[name], encoded),
            *same_token_ids(classifiers[name].encode(_typed(long)), long_encoded, "long texts"),
        )
        if name not in EXACT:
            alone = classifiers[name].run_sorted(encodings[name], batch_size=1)
            checks += conversion_cost(
                logits[name], alone, logits["fp32"], reference, recipe.parity, recipe.seed
            )
        if (share := classifiers[name].artifact.weights_in_8_bits) is not None:
            checks += (mostly_8_bits(share),)
        verdict = distillation_quality(
            name, sha256_of(folder / OnnxArtifact.file_name), logits[name], reference, data.labels,
            checks, recipe.parity, recipe.seed, classifiers[name].artifact.temperature,
        )  # fmt: skip
        verdicts.append(verdict)
    found = answers(data.task, reference.teacher)
    if data.task == "single_label":
        ignored = set(reference.labels.tolist()) - set(found.tolist())
        if ignored:
            names = ", ".join(data.labels[index] for index in sorted(ignored))
            logger.warning("the teacher never answers %s; no student of it will", names)
    told = {"teacher": reference.teacher, "student": reference.student, **logits}
    lines = [
        RowAnswers(
            texts=data.validation.texts[row],
            tokens=len(encoded.input_ids[row]),
            label=label,
            logits={name: tuple(found[row].tolist()) for name, found in told.items()},
        )
        for row, label in enumerate(reference.labels.tolist())
    ]
    write_text(run.answers, "".join(f"{line.model_dump_json()}\n" for line in lines))
    report = ParityReport(
        inputs=inputs,
        thresholds=recipe.parity,
        rows=len(encoded),
        truncated=int(encoded.truncated.sum()),
        teacher_score=reference.score(reference.teacher),
        teacher_metrics={
            name: metrics.measure(name, found, reference.labels) for name in reference.metrics
        },
        teacher_ece=metrics.expected_calibration_error(softmax(reference.teacher), reference.labels)
        if data.task == "single_label"
        else None,
        student_score=reference.score(reference.student),
        answers_sha256=sha256_of(run.answers),
        variants=tuple(verdicts),
    )
    write_record(run.parity_report, report)
    return _beside_variants(report, folders)


def _typed(split: datasets.Split) -> list[Text]:
    """Return the texts of a split as a classifier takes them."""
    return [(text[0], text[1]) if len(text) > 1 else text[0] for text in split.texts]


def _beside_variants(report: ParityReport, folders: Sequence[Path]) -> ParityReport:
    """Put a copy of a report into the variants that it judges, and return it."""
    for folder in folders:
        write_record(folder / ParityReport.file_name, report)
    return report


def _all_of(fidelity: dict[str, tuple[Check, ...]]) -> tuple[Check, ...]:
    """Return the checks of every exact graph; those of the fused one say so in their names."""
    return tuple(
        check if name == "fp32" else check.model_copy(update={"name": f"{name}: {check.name}"})
        for name, checks in fidelity.items()
        for check in checks
    )


@torch.inference_mode()
def _forward(
    model: TextModel, feed: dict[str, NDArray[np.int64]], names: Sequence[str]
) -> NDArray[np.float32]:
    """Return the logits of a PyTorch model for the inputs of a graph."""
    inputs = {name: torch.from_numpy(feed[name]) for name in names}
    logits: NDArray[np.float32] = model.module.eval()(**inputs).logits.numpy()
    return logits
