"""Teachers and students: load, derive, save. Weights are safetensors, checked by sha256."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from safetensors import safe_open

from ad2kit.errors import ModelError
from ad2kit.files import check_sha256, sha256_of_folder, whole_folder, write_record
from ad2kit.random_bert import random_bert
from ad2kit.records import ModelManifest
from ad2kit.references import RANDOM, find_model
from ad2kit.runtime import seeded

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from ad2kit.data import Data
    from ad2kit.sections import Task

MANIFEST = "sha256.json"


@dataclass(frozen=True)
class TextModel:
    """A sequence classifier with its tokenizer; ``labels`` are in the order of the logits."""

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    labels: tuple[str, ...]
    task: Task = "single_label"

    @property
    def word_embeddings(self) -> torch.nn.Embedding:
        """The module that looks up token ids; its width may differ from the hidden size."""
        return cast(torch.nn.Embedding, self.module.get_input_embeddings())

    def parameters(self) -> int:
        """Return the number of parameters."""
        return sum(parameter.numel() for parameter in self.module.parameters())


def load_reference(reference: str, data: Data, *, seed: int, finished: bool, key: str
                   ) -> TextModel:  # fmt: skip
    """Load a teacher, or a checkpoint to make a student from.

    Args:
        reference: see :class:`ad2kit.sections.TeacherRecipe`.
        data: its labels and task; and its training texts, from which ``random://`` makes its
            vocabulary.
        seed: for a classification head that is not in the checkpoint, and for ``random://``.
        finished: the checkpoint must already hold a classifier with these labels.
        key: the key of the recipe that holds ``reference``, for messages.

    Raises:
        ModelError: no weights, pickled weights only, weights of something else, or other labels.
    """
    if reference == RANDOM:
        parts = random_bert(head_config(data.labels, data.task), seed, data.train.texts)
        return TextModel(*parts, data.labels, data.task)
    folder = find_model(reference, key=key)
    return load(folder, data.labels, data.task, seed=seed, finished=finished)


def load(folder: Path, labels: tuple[str, ...], task: Task = "single_label", *, seed: int = 0,
         finished: bool = True) -> TextModel:  # fmt: skip
    """Load a model from a folder; see :func:`load_reference`.

    A folder that :func:`save` wrote is compared with its sha256 manifest first.
    """
    check_files(folder)
    quiet = transformers.utils.logging
    verbosity = quiet.get_verbosity()
    # What it would warn about, a new head, is decided below from what was missing.
    quiet.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if finished:
            _check_labels(folder, config, labels, task)
        for key, value in head_config(labels, task).items():
            setattr(config, key, value)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        with seeded(seed):
            module, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                dtype=torch.float32,
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"{folder} is not a text classifier that transformers can load: {error}",
            hint="give a folder with config.json, model.safetensors and tokenizer.json",
        ) from error
    finally:
        quiet.set_verbosity(verbosity)
    prefix = f"{module.base_model_prefix}."
    missing = [
        key
        for key in info["missing_keys"]
        if finished or (key.startswith(prefix) and "pooler" not in key)
    ]
    if missing:
        what = "classifier" if finished else "encoder"
        raise ModelError(
            f"{folder} does not hold a whole {what}: {len(missing)} tensors are missing, "
            f"first {min(missing)}",
            hint="set teacher.finetune to train a head on it"
            if finished
            else "give an encoder checkpoint of the architecture that its config.json names",
        )
    return TextModel(module, tokenizer, labels, task)


def head_config(labels: tuple[str, ...], task: Task) -> dict[str, Any]:
    """Return what transformers' configuration says of a head with these outputs."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": task if task == "regression" else f"{task}_classification",
    }


def most_tokens(model: TextModel) -> int | None:
    """Return for how many tokens the model has positions; None if for any number."""
    positions: int | None = getattr(model.module.config, "max_position_embeddings", None)
    # These start counting positions after the padding id.
    offset = 2 if model.module.config.model_type in ("roberta", "xlm-roberta", "mpnet") else 0
    return None if positions is None else positions - offset


def check_length(model: TextModel, length_tokens: int, *, key: str) -> None:
    """Refuse a length beyond the model's position embeddings; ``key`` names it in the recipe."""
    most = most_tokens(model)
    if most is not None and length_tokens > most:
        raise ModelError(
            f"{key} is {length_tokens}, but the model has positions for {most} tokens",
            hint=f"set {key} to {most} or less",
        )


def check_layers(source: TextModel, layers: Sequence[int]) -> None:
    """Refuse layer indices that the model to copy from does not have."""
    depth = source.module.config.num_hidden_layers
    wrong = [layer for layer in layers if layer >= depth]
    if wrong:
        raise ModelError(
            f"student.layers names layer {wrong[0]}, but the layers of the "
            f"'{source.module.config.model_type}' to copy from are 0 to {depth - 1}",
            hint=f"choose from 0 to {depth - 1}",
        )


def layer_stack(module: torch.nn.Module, depth: int) -> str | None:
    """Return the prefix of the layers in a state dict; None if the layers share their weights.

    It is the one place where an index runs over all layers, whatever the family calls it:
    ``bert.encoder.layer.``, ``distilbert.transformer.layer.``, ``model.layers.``.
    """
    indices: dict[str, set[int]] = {}
    for key in module.state_dict():
        match = re.match(r"(.*?\.layers?\.)(\d+)\.", key)
        if match:
            indices.setdefault(match[1], set()).add(int(match[2]))
    stacks = [stack for stack, found in indices.items() if found == set(range(depth))]
    return stacks[0] if len(stacks) == 1 else None


def build_student(source: TextModel, layers: Sequence[int]) -> TextModel:
    """Build a student from some layers of a model, with its embeddings and its head.

    Where all layers share their weights (ALBERT) the student keeps them, and goes through them
    as often as it has layers.

    Args:
        source: the model to copy weights from: the teacher, or another checkpoint.
        layers: zero-based indices of its layers, in the student's order.

    Raises:
        ModelError: a layer that it does not have, or layers that cannot be told apart.
    """
    config = source.module.config
    depth = config.num_hidden_layers
    check_layers(source, layers)
    chosen = dict(source.module.state_dict())
    stack = layer_stack(source.module, depth)
    if stack is not None:
        layer_of = re.compile(rf"{re.escape(stack)}(\d+)\.(.*)")
        copies = {key: layer_of.fullmatch(key) for key in chosen}
        weights = {key: value for key, value in chosen.items() if not copies[key]}
        for new, old in enumerate(layers):
            for key, match in copies.items():
                if match and int(match[1]) == old:
                    weights[f"{stack}{new}.{match[2]}"] = chosen[key]
        chosen = weights
    elif getattr(config, "num_hidden_groups", None) != 1:
        raise ModelError(
            f"the layers of a '{config.model_type}' cannot be told apart: expected one stack of "
            f"{depth} layers in its weights",
            hint="leave student.layers out and name an encoder to start from in student.model",
        )
    student_config = type(config).from_dict(config.to_dict())
    student_config.num_hidden_layers = len(layers)
    with seeded(0):
        module = type(source.module)(student_config)
    try:
        # Strict: nothing of the student is left at its random initial value.
        module.load_state_dict(chosen, strict=True)
    except RuntimeError as error:
        raise ModelError(
            f"layers {list(layers)} of a '{config.model_type}' do not fit in these places: {error}",
            hint="keep its first layer first: in ModernBERT it lacks a norm that the others have",
        ) from error
    return TextModel(module, source.tokenizer, source.labels, source.task)


def save(model: TextModel, folder: Path, *, inputs: str) -> None:
    """Write the model as safetensors, with its tokenizer and a sha256 manifest, atomically."""
    with whole_folder(folder) as new:
        model.module.save_pretrained(new, safe_serialization=True)
        model.tokenizer.save_pretrained(new)
        manifest = ModelManifest(inputs=inputs, files=sha256_of_folder(new))
        write_record(new / MANIFEST, manifest)


def saved_inputs(folder: Path) -> str:
    """Return the fingerprint of what a saved model was made from."""
    return ModelManifest.read(folder / MANIFEST).inputs


def check_files(folder: Path) -> None:
    """Insist on safetensors, and on the sha256 manifest where there is one."""
    if not folder.is_dir() or not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is not a model folder: it has no config.json",
            hint="give a folder that save_pretrained() wrote",
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = sorted(p.name for s in ("*.bin", "*.pt", "*.pth") for p in folder.glob(s))
        found = f"only {', '.join(pickled)}, which may run code" if pickled else "no weights at all"
        raise ModelError(
            f"{folder}: expected model.safetensors, found {found}",
            hint="load it once in a place you trust and call save_pretrained(folder, "
            "safe_serialization=True)",
        )
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except Exception as error:
            # safetensors raises its own untyped error for a truncated or foreign file.
            raise ModelError(
                f"{path} is damaged: {error}", hint="copy the file again, or run its stage again"
            ) from error
    if (folder / MANIFEST).is_file():
        again = f"delete {folder} and run `ad2kit distill` again"
        check_sha256(folder, ModelManifest.read(folder / MANIFEST).files, hint=again)


def _check_labels(
    folder: Path, config: transformers.PretrainedConfig, labels: tuple[str, ...], task: Task
) -> None:
    id2label = config.id2label or {}
    theirs = tuple(id2label[index] for index in sorted(id2label))
    generic = tuple(f"LABEL_{index}" for index in range(len(labels)))
    # A regression has one output, and nobody agrees on its name.
    fits = len(theirs) == 1 if task == "regression" else theirs in (labels, generic)
    if not fits:
        raise ModelError(
            f"the teacher's labels differ from the data's:\n"
            f"  teacher {folder}: {dict(enumerate(theirs))}\n"
            f"  data ({task}): {dict(enumerate(labels))}",
            hint="give data.labels in the teacher's order, or set teacher.finetune",
        )
