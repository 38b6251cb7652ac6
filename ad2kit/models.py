"""Teachers and students: load, derive, save. Weights are safetensors, checked by sha256."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import transformers
from safetensors import safe_open

from ad2kit.errors import ModelError
from ad2kit.files import check_sha256, sha256_of_folder, whole_folder, write_record
from ad2kit.random_bert import random_bert
from ad2kit.records import ModelManifest
from ad2kit.references import find_model
from ad2kit.runtime import seeded

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from ad2kit.data import Split

MANIFEST = "sha256.json"


@dataclass(frozen=True)
class TextModel:
    """A sequence classifier with its tokenizer; ``labels`` are in the order of the logits."""

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    labels: tuple[str, ...]

    @property
    def word_embeddings(self) -> torch.nn.Embedding:
        """The module that looks up token ids; its width may differ from the hidden size."""
        return cast(torch.nn.Embedding, self.module.get_input_embeddings())

    def parameters(self) -> int:
        """Return the number of parameters."""
        return sum(parameter.numel() for parameter in self.module.parameters())


def load_teacher(reference: str, labels: tuple[str, ...], *, seed: int, train: Split,
                 finished: bool) -> TextModel:  # fmt: skip
    """Load the teacher.

    Args:
        reference: see :class:`ad2kit.recipe.TeacherRecipe`.
        labels: the names of the data's labels, in the order of their ids.
        seed: for a classification head that is not in the checkpoint, and for ``random://``.
        train: the training texts, from which ``random://`` makes its vocabulary.
        finished: the checkpoint must already hold a classifier with these labels.

    Raises:
        ModelError: no weights, pickled weights only, weights of something else, or other labels.
    """
    if reference == "random://bert":
        return TextModel(*random_bert(labels, seed, train.texts), labels)
    return load(find_model(reference), labels, seed=seed, finished=finished)


def load(folder: Path, labels: tuple[str, ...], *, seed: int = 0, finished: bool = True
         ) -> TextModel:  # fmt: skip
    """Load a classifier from a folder; see :func:`load_teacher`.

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
            _check_labels(folder, config, labels)
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
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
    return TextModel(module, tokenizer, labels)


def most_tokens(model: TextModel) -> int | None:
    """Return for how many tokens the model has positions; None if for any number."""
    positions: int | None = getattr(model.module.config, "max_position_embeddings", None)
    # RoBERTa and its like start counting positions after the padding id.
    offset = 2 if "roberta" in model.module.config.model_type else 0
    return None if positions is None else positions - offset


def check_length(model: TextModel, length_tokens: int, *, key: str) -> None:
    """Refuse a length beyond the model's position embeddings; ``key`` names it in the recipe."""
    most = most_tokens(model)
    if most is not None and length_tokens > most:
        raise ModelError(
            f"{key} is {length_tokens}, but the model has positions for {most} tokens",
            hint=f"set {key} to {most} or less",
        )


def check_layers(teacher: TextModel, layers: Sequence[int]) -> None:
    """Refuse layer indices that the teacher does not have."""
    depth = teacher.module.config.num_hidden_layers
    wrong = [layer for layer in layers if layer >= depth]
    if wrong:
        raise ModelError(
            f"student.layers names layer {wrong[0]}, but the teacher's layers are 0 to {depth - 1}",
            hint=f"choose from 0 to {depth - 1}",
        )


def build_student(teacher: TextModel, layers: Sequence[int]) -> TextModel:
    """Build a student from some of the teacher's layers, with its embeddings and its head.

    Args:
        teacher: the model to copy weights from.
        layers: zero-based indices of the teacher's layers, in the student's order.

    Raises:
        ModelError: a layer that the teacher does not have, or layers that share their weights.
    """
    config = teacher.module.config
    depth = config.num_hidden_layers
    check_layers(teacher, layers)
    weights = teacher.module.state_dict()
    # The one place in a state dict where an index runs over the layers, whatever the family
    # calls it: encoder.layer.3.…, transformer.layer.3.…, layers.3.…
    stacks = {
        match[1]
        for match in (re.match(r"(.*?\.layers?\.)(\d+)\.", key) for key in weights)
        if match
    }
    stacks = {
        stack for stack in stacks
        if {int(k[len(stack):].split(".")[0]) for k in weights if k.startswith(stack)}
        == set(range(depth))
    }  # fmt: skip
    if len(stacks) != 1:
        raise ModelError(
            f"the layers of a '{config.model_type}' teacher cannot be told apart: expected one "
            f"stack of {depth} layers in its weights, found {len(stacks)}",
            hint="families that share weights between layers (ALBERT) are not supported",
        )
    (stack,) = stacks
    chosen = {key: value for key, value in weights.items() if not key.startswith(stack)}
    for new, old in enumerate(layers):
        source = f"{stack}{old}."
        for key, value in weights.items():
            if key.startswith(source):
                chosen[f"{stack}{new}.{key.removeprefix(source)}"] = value
    student_config = type(config).from_dict(config.to_dict())
    student_config.num_hidden_layers = len(layers)
    with seeded(0):
        module = type(teacher.module)(student_config)
    # Strict: nothing of the student is left at its random initial value.
    module.load_state_dict(chosen, strict=True)
    return TextModel(module, teacher.tokenizer, teacher.labels)


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
    folder: Path, config: transformers.PretrainedConfig, labels: tuple[str, ...]
) -> None:
    id2label = config.id2label or {}
    theirs = tuple(id2label[index] for index in sorted(id2label))
    generic = tuple(f"LABEL_{index}" for index in range(len(labels)))
    if theirs not in (labels, generic):
        raise ModelError(
            f"the teacher's labels differ from the data's:\n"
            f"  teacher {folder}: {dict(enumerate(theirs))}\n"
            f"  data: {dict(enumerate(labels))}",
            hint="give data.labels in the teacher's order, or set teacher.finetune",
        )
