"""The gate for a model that others exported: an ONNX folder against a teacher, on labelled rows.

Without the PyTorch student there is nothing to compare the graph with but itself: a text must get
the same answer alone, in company, and behind padding. What was lost on the way, by a wrong
tokenizer or a wrong order of the labels, shows against the teacher.
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
from ad2kit.data.label_order import numbers_of
from ad2kit.exporting.classifier import MODEL_FILE, OnnxClassifier
from ad2kit.exporting.conversion import agreement, agrees, at_most, not_finite
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.exporting.tokenise import tokenisation, write_tokenizer
from ad2kit.gate.questions import Reference, distillation_quality
from ad2kit.gate.records import ParityReport
from ad2kit.models import text_model
from ad2kit.models.pretrained import find_model
from ad2kit.models.text_model import predict_logits
from ad2kit.run.errors import ModelError
from ad2kit.run.files import fingerprint, sha256_of_folder, write_record
from ad2kit.run.machine import available_cpus

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
    """Judge an ONNX model against its teacher.

    Args:
        folder: with model.onnx, config.json and tokenizer.json, as optimum writes it.
        teacher_reference: written like ``teacher.model`` of a recipe; a finished classifier.
        rows: a labelled file that neither model was trained on.
        recipe: its sections data, parity and compute, and its seed.

    Raises:
        ModelError: a file is missing, or the labels of model and teacher differ.
        DataError: the rows are not what the recipe says.
    """
    task, length = recipe.data.task, recipe.data.max_length_tokens
    labels = _labels(folder, recipe.data.labels)
    teacher_folder = find_model(teacher_reference, key="--teacher")
    teacher = text_model.load_model(
        teacher_folder, labels, task, finished=True, order_given=recipe.data.labels is not None
    )
    text_model.check_length(teacher, length, key="data.max_length_tokens")
    split = splits.load_split(rows, recipe.data, labels)
    torch.set_num_threads(recipe.compute.threads or available_cpus())
    encoded = splits.encode(split, teacher.tokenizer, length)
    texts = [text if len(text) > 1 else text[0] for text in split.texts]
    with tempfile.TemporaryDirectory(prefix="ad2kit-parity-") as temporary:
        adopted = _adopt(folder, Path(temporary), labels, recipe)
        classifier = _open(adopted, folder, recipe)
        teacher_logits = predict_logits(teacher, encoded, torch.device("cpu")).numpy()
        encodings = classifier.encode(texts)  # type: ignore[arg-type]
        logits = classifier.run_sorted(encodings, BATCH)
        checks = _consistency(classifier, encodings, logits, task, recipe.parity)
    reference = Reference(
        task,
        recipe.data.judged_by,
        split.labels,
        teacher=teacher_logits,
        student=logits,
        encoded=encoded,
        student_left=np.empty((0, len(labels)), dtype=np.float32),
    )
    files = sha256_of_folder(folder)
    verdict = distillation_quality(
        folder.name,
        fingerprint(files),
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
            files, sha256_of_folder(teacher_folder), split.sha256(), recipe.model_dump(mode="json")
        ),
        thresholds=recipe.parity,
        rows=len(split),
        truncated=int(encoded.truncated.sum()),
        **reference.of_the_teacher(),
        student_score=verdict.score,
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
    """Compare a graph with itself, where no student is at hand: company must change no answer.

    Args:
        classifier: any.
        encodings: of all texts, by its tokenizer.
        logits: of all texts in batches, shape [rows, outputs].
        task: what the logits mean.
        thresholds: of the recipe; agreement leaves room for what int8 does by itself.
    """
    question: Literal["export fidelity"] = "export fidelity"
    longest = max(encodings, key=lambda encoding: len(encoding.ids))
    alone = classifier.run_sorted(encodings, batch_size=1)
    padded = np.concatenate([classifier.run([encoding, longest])[:1] for encoding in encodings])
    finite, batched, behind = (np.nan_to_num(found) for found in (alone, logits, padded))
    return (
        at_most(question, "logits not finite", not_finite(logits) + not_finite(alone), 0),
        *(
            agrees(question, f"answers kept {where}", agreement(task, found, finite), thresholds)
            for where, found in (("in batches", batched), ("behind padding", behind))
        ),
    )


def _labels(folder: Path, given: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the labels of the model: the recipe's, or those of its config.json by their ids.

    Raises:
        ModelError: there are none; or the recipe gives others, and the model's say more than
            numbers.
    """
    names: Any = _config(folder).get("id2label")
    ids = [str(index) for index in range(len(names))] if isinstance(names, dict) else []
    if not ids or sorted(names) != sorted(ids):
        raise ModelError(
            f"{folder / 'config.json'}: expected id2label with ids from 0 on, found {names!r:.80}",
            hint="write the label names of the model into it",
        )
    found = tuple(str(names[index]) for index in ids)
    if given is None or given == found:
        return found
    if len(given) != len(found) or set(given) == set(found) or numbers_of(found) is None:
        raise ModelError(
            f"data.labels differs from the labels of the model:\n"
            f"  model {folder}: {dict(enumerate(found))}\n"
            f"  data.labels: {dict(enumerate(given))}",
            hint="leave data.labels out, or correct id2label in the model's config.json",
        )
    return given


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing"
        raise ModelError(
            f"--model: expected a folder at '{folder}', found {what}",
            hint="give a folder that optimum's exporter wrote, one graph and its tokenizer",
        )
    for name in (MODEL_FILE, "config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            there = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
            raise ModelError(
                f"{folder} has no {name}; there is {there}",
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
        # Without its settings, what config.json makes transformers guess may be another tokenizer:
        # of a cased BERT one that writes all letters small.
        found = (
            transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            if (folder / "tokenizer_config.json").is_file()
            else transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
        )
    except Exception as error:
        # The tokenizers library raises bare exceptions for a file that is none of its own.
        raise ModelError(
            f"{file} is not a tokenizer: {error}",
            hint="save it again with the tokenizer's save_pretrained()",
        ) from error
    if not isinstance(found, transformers.PreTrainedTokenizerFast):
        raise ModelError(
            f"{folder}: expected a tokenizer of the tokenizers library, found "
            f"{type(found).__name__}",
            hint="save a fast one beside the model: AutoTokenizer.from_pretrained(MODEL)"
            ".save_pretrained(FOLDER)",
        )
    return found


def _open(adopted: Path, folder: Path, recipe: Recipe) -> OnnxClassifier:
    """Open the model before the teacher has read anything; messages name the user's folder."""
    try:
        classifier = OnnxClassifier(adopted, threads=recipe.compute.threads)
    except ModelError as error:
        raise ModelError(
            error.message.replace(str(adopted), str(folder)), hint="export it again with optimum"
        ) from error
    _insist_on_inputs_and_outputs(classifier, folder)
    return classifier


def _insist_on_inputs_and_outputs(classifier: OnnxClassifier, folder: Path) -> None:
    """Refuse a graph that we cannot feed, or whose outputs are not one for each label."""
    for item in classifier.session.get_inputs():
        if any(isinstance(axis, int) for axis in item.shape):
            raise ModelError(
                f"{folder / MODEL_FILE}: the axes of {item.name} are fixed to "
                f"{' x '.join(map(str, item.shape))}, but batches have any number of texts, and "
                "texts any number of tokens",
                hint=_DYNAMIC,
            )
    known = {"input_ids", "attention_mask", "token_type_ids"}
    outputs = {item.name: item.shape[-1] for item in classifier.session.get_outputs()}
    wanted = len(classifier.labels)
    width = outputs.get("logits")
    if (
        set(classifier.input_names) - known
        or (isinstance(width, int) and width != wanted)
        or ("logits" not in outputs)
    ):
        raise ModelError(
            f"{folder / MODEL_FILE}: expected inputs among {', '.join(sorted(known))} and an "
            f"output 'logits' of {wanted} columns, found {', '.join(classifier.input_names)} and "
            f"{outputs}",
            hint="export it with optimum for the task text-classification, and look at id2label",
        )
    # Axes may be fixed inside of the graph, too, whatever its inputs say.
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
    if shape != (len(texts), wanted):
        raise ModelError(
            f"{folder / MODEL_FILE}: expected logits of shape {(len(texts), wanted)} for two "
            f"texts, found {shape}",
            hint=_DYNAMIC,
        )


def _adopt(folder: Path, scratch: Path, labels: tuple[str, ...], recipe: Recipe) -> Path:
    """Return a copy of the model's files with a manifest of ours.

    Copied and not linked: onnxruntime reads no external data through links.
    """
    for file in folder.iterdir():
        if file.is_file() and file.name != OnnxArtifact.file_name:
            shutil.copy2(file, scratch / file.name)
    tokenizer, config = _tokenizer(folder), _config(folder)
    write_tokenizer(tokenizer, scratch)
    settings = tokenisation(tokenizer)
    if tokenizer.pad_token_id is None:
        settings = settings.model_copy(update={"pad_token_id": config.get("pad_token_id") or 0})
    files, ours = sha256_of_folder(scratch), folder / OnnxArtifact.file_name
    manifest = OnnxArtifact(
        variant=folder.name,
        inputs=fingerprint(files),
        task=recipe.data.task,
        labels=labels,
        max_length_tokens=recipe.data.max_length_tokens,
        tokenisation=settings,
        text_columns=len(recipe.data.text_columns),
        provider=recipe.export.provider,
        nodes={},
        temperature=OnnxArtifact.read(ours).temperature if ours.is_file() else 1.0,
        files=files,
        model_bytes=(scratch / MODEL_FILE).stat().st_size,
        lineage={},
    )
    write_record(scratch / OnnxArtifact.file_name, manifest)
    return scratch
