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

from ad2kit.data import splits
from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.exporting.conversion import conversion_cost, mostly_8_bits
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.gate.questions import (
    Reference,
    distillation_quality,
    export_fidelity,
    longer_texts,
    probe_rows,
    same_token_ids,
)
from ad2kit.gate.records import ParityReport, RowAnswers
from ad2kit.models import text_model
from ad2kit.models.text_model import predict_logits
from ad2kit.run.errors import RunError
from ad2kit.run.files import fingerprint, sha256_of, write_record, write_text
from ad2kit.run.folder import exclusive
from ad2kit.run.machine import available_cpus, environment
from ad2kit.training.records import DistillReport

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from ad2kit.exporting.classifier import Text
    from ad2kit.exporting.records import Check
    from ad2kit.exporting.tokenise import Tokens
    from ad2kit.gate.records import VariantParity
    from ad2kit.models.text_model import TextModel
    from ad2kit.run.folder import RunDir

    Logits = NDArray[np.float32]

logger = logging.getLogger(__name__)

BATCH = 32
# The variants that only compute in another order what the student computes.
EXACT = ("fp32", "fused")


@exclusive
def judge(run: RunDir) -> ParityReport:
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
    data = splits.load_data(recipe.data, recipe.seed)
    expected, found = distilled.splits["validation"].sha256, data.validation.sha256()
    if found != expected:
        raise RunError(
            f"the validation data changed since {run.path} was distilled: sha256 expected "
            f"{expected[:12]}…, found {found[:12]}…",
            hint="restore the data; a gate on other data proves nothing about this run",
        )
    inputs = fingerprint(
        environment(recipe.compute.threads or available_cpus()),
        [sha256_of(folder / OnnxArtifact.file_name) for folder in folders],
        distilled.teacher_sha256,
        distilled.student_sha256,
        expected,
        recipe.parity.model_dump(mode="json"),
        recipe.data.judged_by,
        recipe.seed,
    )
    classifiers = {
        folder.name: OnnxClassifier(folder, threads=recipe.compute.threads) for folder in folders
    }
    for folder in (run.teacher, run.student):
        text_model.check_files(folder)
    report = _known(run, inputs)
    if report is None:
        torch.set_num_threads(recipe.compute.threads or available_cpus())
        report = _judge(run, data, classifiers, inputs)
        write_record(run.parity_report, report)
    # A copy lies beside each variant, which may be moved without its run.
    for folder in folders:
        write_record(folder / ParityReport.file_name, report)
    return report


def _known(run: RunDir, inputs: str) -> ParityReport | None:
    """Return the report of a run if it was written for the same inputs."""
    if not (run.parity_report.is_file() and run.answers.is_file()):
        return None
    report = ParityReport.read(run.parity_report)
    if (report.inputs, report.answers_sha256) != (inputs, sha256_of(run.answers)):
        return None
    logger.info("parity is already known: %s", run.parity_report)
    return report


def _judge(
    run: RunDir, data: splits.Data, classifiers: Mapping[str, OnnxClassifier], inputs: str
) -> ParityReport:
    """Compute all answers to the validation rows, write them down, and judge each variant."""
    recipe, length = run.recipe, run.recipe.data.max_length_tokens
    student = text_model.load_model(run.student, data.labels, data.task)
    encodings = {name: c.encode(_typed(data.validation)) for name, c in classifiers.items()}
    reference = _reference(run, data, student, classifiers["fp32"], encodings["fp32"])
    encoded = reference.encoded
    long_texts = splits.Split(
        tuple(longer_texts(encoded, data.validation.texts, length)), np.empty(0)
    )
    long_encoded = splits.encode(long_texts, student.tokenizer, length)
    logits = {name: c.run_sorted(encodings[name], BATCH) for name, c in classifiers.items()}
    fidelity = {
        name: export_fidelity(c, encodings[name], logits[name], reference, recipe.parity)
        for name, c in classifiers.items()
        if name in EXACT
    }

    def verdict(name: str, classifier: OnnxClassifier) -> VariantParity:
        # What is made from an unfaithful graph, or reads other tokens, is no better than it.
        checks = (
            *(fidelity[name] if name in EXACT else _all_of(fidelity)),
            *same_token_ids(encodings[name], encoded),
            *same_token_ids(classifier.encode(_typed(long_texts)), long_encoded, "long texts"),
        )
        if name not in EXACT:
            alone = classifier.run_sorted(encodings[name], batch_size=1)
            checks += conversion_cost(
                logits[name], alone, logits["fp32"], reference, recipe.parity, recipe.seed
            )
        if (share := classifier.artifact.weights_in_8_bits) is not None:
            checks += (mostly_8_bits(share),)
        return distillation_quality(
            name,
            sha256_of(run.onnx(name) / OnnxArtifact.file_name),
            logits[name],
            reference,
            data.labels,
            checks,
            recipe.parity,
            recipe.seed,
            classifier.artifact.temperature,
        )

    variants = tuple(verdict(name, classifier) for name, classifier in classifiers.items())
    _write_answers(run, data.validation, reference, logits)
    return ParityReport(
        inputs=inputs,
        thresholds=recipe.parity,
        rows=len(encoded),
        truncated=int(encoded.truncated.sum()),
        **reference.of_the_teacher(),
        student_score=reference.score(reference.student),
        answers_sha256=sha256_of(run.answers),
        variants=variants,
    )


def _reference(
    run: RunDir,
    data: splits.Data,
    student: TextModel,
    fp32: OnnxClassifier,
    tokens: Sequence[Tokens],
) -> Reference:
    """Compute what every variant is held against: the answers of teacher and student in PyTorch.

    ``tokens`` are those that ``fp32`` makes of the validation texts.
    """
    recipe, cpu = run.recipe, torch.device("cpu")
    teacher = text_model.load_model(run.teacher, data.labels, data.task)
    encoded, teacher_encoded = (
        splits.encode(data.validation, model.tokenizer, recipe.data.max_length_tokens)
        for model in (student, teacher)
    )
    probes = [tokens[row] for row in probe_rows(encoded)]
    return Reference(
        data.task,
        recipe.data.judged_by,
        data.validation.labels,
        teacher=predict_logits(teacher, teacher_encoded, cpu).numpy(),
        student=predict_logits(student, encoded, cpu).numpy(),
        encoded=encoded,
        student_left=_forward(student, fp32.feed(probes, left=True), fp32.input_names),
    )


def _write_answers(
    run: RunDir, split: splits.Split, reference: Reference, logits: Mapping[str, Logits]
) -> None:
    """Write what each model says of each validation row."""
    every = {"teacher": reference.teacher, "student": reference.student, **logits}
    lines = [
        RowAnswers(
            texts=split.texts[row],
            tokens=len(reference.encoded.input_ids[row]),
            label=label,
            logits={name: tuple(each[row].tolist()) for name, each in every.items()},
        )
        for row, label in enumerate(reference.labels.tolist())
    ]
    write_text(run.answers, "".join(f"{line.model_dump_json()}\n" for line in lines))


def _typed(split: splits.Split) -> list[Text]:
    """Return the texts of a split as a classifier takes them."""
    return [(text[0], text[1]) if len(text) > 1 else text[0] for text in split.texts]


def _all_of(fidelity: dict[str, tuple[Check, ...]]) -> tuple[Check, ...]:
    """Return the checks of every exact graph; those of the fused one say so in their names."""
    return tuple(
        check if name == "fp32" else check.model_copy(update={"name": f"{name}: {check.name}"})
        for name, checks in fidelity.items()
        for check in checks
    )


@torch.inference_mode()
def _forward(model: TextModel, feed: dict[str, NDArray[np.int64]], names: Sequence[str]) -> Logits:
    """Return the logits of a PyTorch model for the inputs of a graph."""
    inputs = {name: torch.from_numpy(feed[name]) for name in names}
    logits: Logits = model.module.eval()(**inputs).logits.numpy()
    return logits
