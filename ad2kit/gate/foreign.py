"""The gate for a model that others exported: an ONNX folder against a teacher, on labelled rows.

There is no PyTorch student here, so the graph is compared with itself: a text must get the same
answer alone, in a batch, and behind padding. The comparison with the teacher shows what a wrong
tokenizer or a wrong order of the labels has cost.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import transformers

from ad2kit.data import splits
from ad2kit.exporting.classifier import MODEL_FILE, OnnxClassifier
from ad2kit.exporting.conversion import agreement, agrees, at_most, not_finite
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.exporting.tokenise import tokenisation, write_tokenizer
from ad2kit.gate.questions import Reference, distillation_quality
from ad2kit.gate.records import ParityReport
from ad2kit.models import text_model
from ad2kit.models.pretrained import find_model, load_tokenizer
from ad2kit.models.text_model import predict_logits
from ad2kit.run.errors import ModelError
from ad2kit.run.files import fingerprint, sha256_of_folder, write_record
from ad2kit.run.machine import available_cpus
from ad2kit.statistics.label_order import numbers_of
from ad2kit.tables.texts import text_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ad2kit.exporting.records import Check
    from ad2kit.exporting.tokenise import Tokens
    from ad2kit.run.recipe import Recipe
    from ad2kit.run.sections import ParityRecipe, Task

BATCH = 32
_DYNAMIC = (
    "export it with dynamic axes: `optimum-cli export onnx` does, and torch.onnx.export with "
    "dynamic_axes={'input_ids': {0: 'batch', 1: 'tokens'}, ...} for each input"
)


def judge_model(folder: Path, teacher_reference: str, rows: Path, recipe: Recipe) -> ParityReport:
    """Judge an ONNX model against its teacher, and return the report.

    Args:
        folder: a folder with model.onnx, config.json and tokenizer.json, as optimum writes it.
        teacher_reference: a finished classifier, written like ``teacher.model`` of a recipe.
        rows: a labelled file that neither model was trained on.
        recipe: the sections data, parity and compute, and the seed, are used.

    Raises:
        ModelError: a file is missing, or the labels of model and teacher differ.
        DataError: the rows do not fit the recipe.
    """
    task = recipe.data.task
    length = recipe.data.max_length_tokens
    labels = _labels(folder, recipe.data.labels)
    teacher_folder = find_model(teacher_reference, key="--teacher")
    teacher = text_model.load_model(
        teacher_folder, labels, task, finished=True, order_given=recipe.data.labels is not None
    )
    text_model.check_length(teacher, length, key="data.max_length_tokens")
    split = splits.load_split(rows, recipe.data, labels)
    torch.set_num_threads(recipe.compute.threads or available_cpus())
    encoded = splits.encode(split, teacher.tokenizer, recipe.data.length)
    texts = [text_of(row) for row in split.texts]
    with tempfile.TemporaryDirectory(prefix="ad2kit-parity-") as temporary:
        model_copy = _adopt(folder, Path(temporary), labels, recipe)
        classifier = _open(model_copy, folder, recipe)
        teacher_logits = predict_logits(teacher, encoded, torch.device("cpu")).numpy()
        encodings = classifier.encode(texts)
        windows = classifier.run_sorted(encodings, BATCH)
        checks = _consistency(classifier, encodings, windows, task, recipe.parity)
        logits = classifier.by_text(encodings, windows)
    reference = Reference.of(
        task,
        recipe.data.judged_by,
        encoded,
        teacher=teacher_logits,
        student=windows,
        student_left=np.empty((0, len(labels)), dtype=np.float32),
    )
    file_hashes = sha256_of_folder(folder)
    verdict = distillation_quality(
        folder.name,
        fingerprint(file_hashes),
        logits,
        reference,
        labels,
        checks,
        recipe.parity,
        recipe.seed,
        classifier.artifact.temperature,
    )
    return ParityReport(
        inputs=fingerprint(
            file_hashes,
            sha256_of_folder(teacher_folder),
            split.sha256,
            recipe.model_dump(mode="json"),
        ),
        thresholds=recipe.parity,
        rows=len(split),
        truncated=int(encoded.truncated.sum()),
        **reference.of_the_models(logits),
        answers_sha256=None,
        variants=(verdict,),
    )


def _consistency(
    classifier: OnnxClassifier,
    encodings: Sequence[Tokens],
    logits: NDArray[np.float32],
    task: Task,
    thresholds: ParityRecipe,
) -> tuple[Check, ...]:
    """Compare a graph with itself: the other texts of a batch must change no answer.

    Args:
        classifier: the graph and its tokenizer.
        encodings: the windows of all texts, made by its tokenizer.
        logits: their logits, computed in batches, shape [windows, outputs].
        task: the task, which says what the logits mean.
        thresholds: those of the recipe. The agreement need not be perfect, because int8 itself
            changes some answers.
    """
    question: Literal["export fidelity"] = "export fidelity"
    longest = max(encodings, key=lambda encoding: len(encoding.ids))
    alone = classifier.run_sorted(encodings, batch_size=1)
    padded = np.concatenate([classifier.run([encoding, longest])[:1] for encoding in encodings])
    reference = np.nan_to_num(alone)
    logits_by_setting = {
        "in batches": np.nan_to_num(logits),
        "behind padding": np.nan_to_num(padded),
    }
    return (
        at_most(question, "logits not finite", not_finite(logits) + not_finite(alone), 0),
        *(
            agrees(
                question,
                f"answers kept {setting}",
                agreement(task, setting_logits, reference),
                thresholds,
            )
            for setting, setting_logits in logits_by_setting.items()
        ),
    )


def _labels(folder: Path, recipe_labels: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the labels of the recipe if it has any, else those of config.json in order of id.

    Raises:
        ModelError: the model has no labels; or the labels of the recipe differ from them, although
            the model has id2label and not mere numbers.
    """
    id2label: Any = _config(folder).get("id2label")
    ids = [str(index) for index in range(len(id2label))] if isinstance(id2label, dict) else []
    if not ids or sorted(id2label) != sorted(ids):
        raise ModelError(
            f"{folder / 'config.json'}: expected id2label with ids from 0 on, found "
            f"{id2label!r:.80}",
            hint="write the label names of the model into it",
        )
    model_labels = tuple(str(id2label[index]) for index in ids)
    if recipe_labels is None or recipe_labels == model_labels:
        return model_labels
    if (
        len(recipe_labels) != len(model_labels)
        or set(recipe_labels) == set(model_labels)
        or numbers_of(model_labels) is None
    ):
        raise ModelError(
            f"data.labels differs from the labels of the model:\n"
            f"  model {folder}: {dict(enumerate(model_labels))}\n"
            f"  data.labels: {dict(enumerate(recipe_labels))}",
            hint="leave data.labels out, or correct id2label in the model's config.json",
        )
    return recipe_labels


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        entry = "a file" if folder.exists() else "nothing"
        raise ModelError(
            f"--model: expected a folder at '{folder}', found {entry}",
            hint="give a folder that optimum's exporter wrote, one graph and its tokenizer",
        )
    for name in (MODEL_FILE, "config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            entries = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
            raise ModelError(
                f"{folder} has no {name}; there is {entries}",
                hint="give a folder that optimum's exporter wrote, one graph and its tokenizer",
            )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            f"{folder / 'config.json'} is not JSON: {error}", hint="copy the file again"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("pad_token_id", 0), int | None):
        raise ModelError(
            f"{folder / 'config.json'}: expected an object with a pad_token_id, found "
            f"{config!r:.80}",
            hint="copy the file again, or write it with the model's save_pretrained()",
        )
    return config


def _tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """Return the tokenizer of the model as transformers reads it."""
    file = folder / "tokenizer.json"
    try:
        # Without tokenizer_config.json, AutoTokenizer guesses the settings from config.json. For a
        # cased BERT it guesses a tokenizer that lower-cases all letters.
        if (folder / "tokenizer_config.json").is_file():
            tokenizer = load_tokenizer(folder)
        else:
            tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
    except Exception as error:
        # The tokenizers library raises bare exceptions for a file that it cannot read.
        raise ModelError(
            f"{file} is not a tokenizer: {error}",
            hint="save it again with the tokenizer's save_pretrained()",
        ) from error
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
        raise ModelError(
            f"{folder}: expected a tokenizer of the tokenizers library, found "
            f"{type(tokenizer).__name__}",
            hint="save a fast one beside the model: AutoTokenizer.from_pretrained(MODEL)"
            ".save_pretrained(FOLDER)",
        )
    return tokenizer


def _open(model_copy: Path, folder: Path, recipe: Recipe) -> OnnxClassifier:
    """Open the copy of the model before the teacher runs; messages name the user's folder."""
    try:
        classifier = OnnxClassifier(model_copy, threads=recipe.compute.threads)
    except ModelError as error:
        raise ModelError(
            error.message.replace(str(model_copy), str(folder)), hint="export it again with optimum"
        ) from error
    _check_inputs_and_outputs(classifier, folder)
    return classifier


def _check_inputs_and_outputs(classifier: OnnxClassifier, folder: Path) -> None:
    """Refuse a graph with unknown inputs, with fixed axes, or without one output for each label."""
    for graph_input in classifier.session.get_inputs():
        if any(isinstance(axis, int) for axis in graph_input.shape):
            raise ModelError(
                f"{folder / MODEL_FILE}: the axes of {graph_input.name} are fixed to "
                f"{' x '.join(map(str, graph_input.shape))}, but batches have any number of texts, "
                "and texts any number of tokens",
                hint=_DYNAMIC,
            )
    known_inputs = {"input_ids", "attention_mask", "token_type_ids"}
    output_widths = {output.name: output.shape[-1] for output in classifier.session.get_outputs()}
    label_count = len(classifier.labels)
    width = output_widths.get("logits")
    has_unknown_input = not known_inputs.issuperset(classifier.input_names)
    has_other_width = isinstance(width, int) and width != label_count
    if has_unknown_input or has_other_width or "logits" not in output_widths:
        raise ModelError(
            f"{folder / MODEL_FILE}: expected inputs among {', '.join(sorted(known_inputs))} and "
            f"an output 'logits' of {label_count} columns, found "
            f"{', '.join(classifier.input_names)} and {output_widths}",
            hint="export it with optimum for the task text-classification, and look at id2label",
        )
    # The graph may also fix an axis inside, although its inputs declare a dynamic one.
    columns = classifier.artifact.text_columns
    texts: Any = [(text, text) if columns == 2 else text for text in ("a", "a b c d e")]
    try:
        shape = classifier.run(classifier.encode(texts)).shape
    except Exception as error:
        # onnxruntime's exceptions share no base class of their own.
        raise ModelError(
            f"{folder / MODEL_FILE} cannot read two texts of different lengths: {error}",
            hint=_DYNAMIC,
        ) from error
    if shape != (len(texts), label_count):
        raise ModelError(
            f"{folder / MODEL_FILE}: expected logits of shape {(len(texts), label_count)} for two "
            f"texts, found {shape}",
            hint=_DYNAMIC,
        )


def _adopt(folder: Path, scratch: Path, labels: tuple[str, ...], recipe: Recipe) -> Path:
    """Copy the model's files to ``scratch``, add a manifest of ad2kit, and return ``scratch``.

    The files are copied and not linked, because onnxruntime reads no external data through links.
    """
    for file in folder.iterdir():
        if file.is_file() and file.name != OnnxArtifact.file_name:
            shutil.copy2(file, scratch / file.name)
    tokenizer = _tokenizer(folder)
    config = _config(folder)
    write_tokenizer(tokenizer, scratch)
    settings = tokenisation(tokenizer)
    if tokenizer.pad_token_id is None:
        settings = settings.model_copy(update={"pad_token_id": config.get("pad_token_id") or 0})
    file_hashes = sha256_of_folder(scratch)
    temperature = 1.0
    own_manifest = folder / OnnxArtifact.file_name
    if own_manifest.is_file():
        temperature = OnnxArtifact.read(own_manifest).temperature
    manifest = OnnxArtifact(
        variant=folder.name,
        inputs=fingerprint(file_hashes),
        task=recipe.data.task,
        labels=labels,
        **recipe.data.length._asdict(),
        tokenisation=settings,
        text_columns=len(recipe.data.text_columns),
        provider=recipe.export.provider,
        nodes={},
        temperature=temperature,
        files=file_hashes,
        model_bytes=(scratch / MODEL_FILE).stat().st_size,
        lineage={},
    )
    write_record(scratch / OnnxArtifact.file_name, manifest)
    return scratch
