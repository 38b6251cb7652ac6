"""The parity stage: is the artefact the student, and is the student as good as the teacher?

The stage asks three questions on the validation set, and answers each by values beside
their thresholds:

1. export fidelity: do the fp32 graph and the fused graph compute the same as the PyTorch student,
   from the same token ids, alone and in a batch, padded on either side, in any order?
2. conversion cost: how much did fp16, steady and int8 lose against fp32, and how much does an
   answer depend on the texts beside it?
3. distillation quality: how much of the teacher's quality did each variant keep?

``package`` asks the fourth question: does the service give the same answers as the artefact?
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch

from ad2kit.data import splits
from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.exporting.conversion import (
    company_checks,
    company_of,
    conversion_cost,
    mostly_8_bits,
)
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.gate.questions import (
    Reference,
    distillation_quality,
    export_fidelity,
    longer_texts,
    probe_rows,
    same_token_ids,
)
from ad2kit.gate.records import EXACT, ParityReport, RowAnswers
from ad2kit.models import given, text_model
from ad2kit.models.records import is_given
from ad2kit.models.text_model import predict_logits, predict_windows
from ad2kit.run.errors import RunError
from ad2kit.run.files import fingerprint, sha256_of, write_record, write_text
from ad2kit.run.folder import exclusive
from ad2kit.run.machine import available_cpus, environment, quiet_transformers
from ad2kit.tables.texts import text_of
from ad2kit.training.records import DistillReport

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from ad2kit.exporting.records import Check, Company
    from ad2kit.exporting.tokenise import Tokens
    from ad2kit.gate.records import VariantParity
    from ad2kit.models.text_model import TextModel
    from ad2kit.run.folder import RunDir
    from ad2kit.tables.texts import Text

    Logits = NDArray[np.float32]

logger = logging.getLogger(__name__)

BATCH = 32
# The texts that are answered alone and beside others, and how many share a batch.
_COMPANY_TEXTS, _COMPANY = 500, 16


@exclusive
def judge(run: RunDir) -> ParityReport:
    """Ask the questions of every variant of a run, write the report, and return it.

        passed = ad2kit.judge(run).passed

    A report that is not ``passed`` is written as well; the caller has to stop.

    Raises:
        RunError: nothing is exported yet, or the validation data changed since the distillation.
        ModelError: a file of the teacher, the student or a variant changed since it was written.
    """
    recipe = run.recipe
    distilled = DistillReport.read(run.distill_report)
    folders = [run.onnx(variant) for variant in recipe.export.variants]
    for folder in folders:
        run.require(folder / OnnxArtifact.file_name, command="export")
    data = splits.load_data(recipe.data, recipe.seed, run.shared)
    expected_sha256 = distilled.splits["validation"].sha256
    sha256 = data.validation.sha256
    if sha256 != expected_sha256:
        raise RunError(
            f"the validation data changed since {run.path} was distilled: sha256 expected "
            f"{expected_sha256[:12]}…, found {sha256[:12]}…",
            hint="restore the data; a gate on other data proves nothing about this run",
        )
    inputs = fingerprint(
        environment(recipe.compute.threads or available_cpus()),
        [sha256_of(folder / OnnxArtifact.file_name) for folder in folders],
        distilled.teacher_sha256,
        distilled.student_sha256,
        expected_sha256,
        recipe.parity.model_dump(mode="json"),
        recipe.data.judged_by,
        recipe.seed,
    )
    classifiers = {
        folder.name: OnnxClassifier(folder, threads=recipe.compute.threads) for folder in folders
    }
    text_model.check_files(run.teacher)
    text_model.check_files(run.student)
    report = _existing_report(run, inputs)
    if report is None:
        torch.set_num_threads(recipe.compute.threads or available_cpus())
        report = _judge(run, data, classifiers, inputs)
        write_record(run.parity_report, report)
    # Each variant gets a copy, because its folder may be moved without its run.
    for folder in folders:
        write_record(folder / ParityReport.file_name, report)
    return report


def _existing_report(run: RunDir, inputs: str) -> ParityReport | None:
    """Return the parity report of a run if it was written for the same inputs, else None."""
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
    """Compute the answers of all models to the validation rows, write them, judge each variant."""
    recipe = run.recipe
    student = text_model.load_model(run.student, data.labels, data.task)
    texts = _classifier_texts(data.validation)
    models = classifiers.items()
    encodings = {name: model.encode(texts) for name, model in models}
    reference = _reference(run, data, student, classifiers["fp32"], encodings["fp32"])
    encoded = reference.encoded
    long_split = _long_split(encoded, data.validation, classifiers["fp32"])
    long_encoded = splits.encode(long_split, student.tokenizer, recipe.data.length)
    long_texts = _classifier_texts(long_split)
    windows = {name: model.run_sorted(encodings[name], BATCH) for name, model in models}
    logits = {name: model.by_text(encodings[name], windows[name]) for name, model in models}
    fidelity = {
        name: export_fidelity(model, encodings[name], windows[name], reference, recipe.parity)
        for name, model in models
        if name in EXACT
    }

    def verdict(name: str, classifier: OnnxClassifier) -> VariantParity:
        # A variant that is made from an unfaithful graph is unfaithful, too.
        checks = (
            *(fidelity[name] if name in EXACT else _joined_checks(fidelity)),
            *same_token_ids(encodings[name], encoded),
            *same_token_ids(classifier.encode(long_texts), long_encoded, "long texts"),
        )
        company = None
        if name not in EXACT:
            alone = classifier.run_sorted(encodings[name], batch_size=1)
            company = _company(classifier, encodings[name], alone, reference, recipe.seed)
            by_text = classifier.by_text(encodings[name], alone)
            checks += company_checks(company, data.task, recipe.parity)
            checks += conversion_cost(
                logits[name], by_text, logits["fp32"], reference, recipe.parity, recipe.seed
            )
        if (share := classifier.artifact.weights_in_8_bits) is not None:
            checks += (mostly_8_bits(share),)
        quality = distillation_quality(
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
        return quality.model_copy(update={"company": company})

    variants = tuple(verdict(name, model) for name, model in models)
    _write_answers(run, data.validation, reference, logits)
    return ParityReport(
        inputs=inputs,
        thresholds=recipe.parity,
        rows=len(encoded),
        truncated=int(encoded.truncated.sum()),
        **reference.of_the_models(encoded.average(reference.student)),
        answers_sha256=sha256_of(run.answers),
        variants=variants,
    )


def _company(
    classifier: OnnxClassifier,
    encodings: Sequence[Tokens],
    alone: Logits,
    reference: Reference,
    seed: int,
) -> Company:
    """Ask again for some of the texts, in batches of random others; the longest is in each batch.

    ``alone`` has the logits of all texts one by one, or of their windows.
    """
    generator = np.random.default_rng([seed, 1])
    text_of_window = np.cumsum([not encoding.continues for encoding in encodings]) - 1
    texts = np.sort(generator.permutation(text_of_window[-1] + 1)[:_COMPANY_TEXTS])
    is_chosen = np.isin(text_of_window, texts)
    chosen = [tokens for tokens, taken in zip(encodings, is_chosen, strict=True) if taken]
    longest = max(encodings, key=lambda encoding: len(encoding.ids))
    beside = np.empty((len(chosen), alone.shape[1]), alone.dtype)
    order = generator.permutation(len(chosen))
    for rows in np.split(order, range(_COMPANY - 1, len(order), _COMPANY - 1)):
        beside[rows] = classifier.run([*(chosen[row] for row in rows), longest])[:-1]
    return company_of(
        reference.task,
        classifier.by_text(encodings, alone)[texts],
        classifier.by_text(chosen, beside),
        temperature=classifier.artifact.temperature,
        spread=reference.spread,
    )


def _reference(
    run: RunDir,
    data: splits.Data,
    student: TextModel,
    fp32: OnnxClassifier,
    tokens: Sequence[Tokens],
) -> Reference:
    """Compute the logits of teacher and student in PyTorch, which every variant is compared with.

    ``tokens`` are the validation texts as the tokenizer of ``fp32`` encodes them.
    """
    recipe = run.recipe
    cpu = torch.device("cpu")
    length = recipe.data.length
    encoded = splits.encode(data.validation, student.tokenizer, length)
    if is_given(run.teacher):
        teacher_logits = given.logits(run.teacher, "validation")
    else:
        teacher = text_model.load_model(run.teacher, data.labels, data.task)
        teacher_encoded = splits.encode(data.validation, teacher.tokenizer, length)
        teacher_logits = predict_logits(teacher, teacher_encoded, cpu)
    probes = [tokens[row] for row in probe_rows(encoded)]
    return Reference.of(
        data.task,
        recipe.data.judged_by,
        encoded,
        teacher=teacher_logits.numpy(),
        student=predict_windows(student, encoded, cpu).numpy(),
        student_left=_forward(student, fp32.feed(probes, left=True), fp32.input_names),
    )


def _write_answers(
    run: RunDir, split: splits.Split, reference: Reference, logits: Mapping[str, Logits]
) -> None:
    """Write the logits of each model for each validation row."""
    student = reference.encoded.average(reference.student)
    logits_by_model = {"teacher": reference.teacher, "student": student, **logits}
    lines = [
        RowAnswers(
            texts=split.texts[row],
            tokens=int(reference.encoded.lengths[row]),
            label=label if has_its_own else None,
            logits={
                name: tuple(model_logits[row].tolist())
                for name, model_logits in logits_by_model.items()
            },
        )
        for row, (label, has_its_own) in enumerate(
            zip(reference.labels.tolist(), reference.labelled.tolist(), strict=True)
        )
    ]
    write_text(run.answers, "".join(f"{line.model_dump_json()}\n" for line in lines))


def _long_split(
    encoded: splits.Encoded, split: splits.Split, classifier: OnnxClassifier
) -> splits.Split:
    """Return texts without labels, made from those of ``split`` and longer than the model reads.

    Texts that the classifier refuses are left out.
    """
    texts = longer_texts(encoded, split.texts, classifier.artifact.max_length_tokens)
    refused = dict[int, str]()
    classifier.encode([text_of(row) for row in texts], refuse=refused.__setitem__)
    kept = [row for position, row in enumerate(texts) if position not in refused]
    return splits.Split.of(kept, np.empty(0))


def _classifier_texts(split: splits.Split) -> list[Text]:
    return [text_of(row) for row in split.texts]


def _joined_checks(fidelity: dict[str, tuple[Check, ...]]) -> tuple[Check, ...]:
    """Return the checks of all exact graphs; the names of those of the fused graph say so."""
    return tuple(
        check if name == "fp32" else check.model_copy(update={"name": f"{name}: {check.name}"})
        for name, checks in fidelity.items()
        for check in checks
    )


@torch.inference_mode()
def _forward(model: TextModel, feed: dict[str, NDArray[np.int64]], names: Sequence[str]) -> Logits:
    """Return the logits of a PyTorch model for the inputs of a graph, float32 [texts, outputs].

    The attention is computed step by step, as in the graph. The other kernels answer zeros at a
    position that sees no token, such as padding beyond the window of a layer.
    """
    with quiet_transformers():  # some families have one kernel only, and say so
        model.module.set_attn_implementation("eager")
    inputs = {name: torch.from_numpy(feed[name]) for name in names}
    logits: Logits = model.module.eval()(**inputs).logits.numpy()
    return logits
