"""Teachers and students: load, derive, save. Weights are safetensors, checked by sha256."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from safetensors import safe_open

from ad2kit.errors import ModelError
from ad2kit.files import check_sha256, sha256_of_folder, whole_folder, write_record
from ad2kit.label_order import insist_on_given_order, numbers_of
from ad2kit.random_bert import random_bert
from ad2kit.records import ModelManifest
from ad2kit.references import RANDOM, find_model
from ad2kit.runtime import quiet_transformers, seeded

if TYPE_CHECKING:
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
    return load(folder, data.labels, data.task, seed=seed, finished=finished,
                order_given=data.order_given)  # fmt: skip


def load(folder: Path, labels: tuple[str, ...], task: Task = "single_label", *, seed: int = 0,
         finished: bool = True, order_given: bool = False) -> TextModel:  # fmt: skip
    """Load a model from a folder; see :func:`load_reference`.

    A folder that :func:`save` wrote is compared with its sha256 manifest first.
    """
    check_files(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if finished:
            _check_labels(folder, config, labels, task, order_given=order_given)
        for key, value in head_config(labels, task).items():
            setattr(config, key, value)
        kernel = None
        if config.model_type == "modernbert":
            # On a GPU it would compile its embeddings or flatten the batch before them; either way
            # the adversary's hook would not be where it has to be.
            config.reference_compile, kernel = False, "sdpa"
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # What it would warn about, a new head, is decided below from what was missing.
        with seeded(seed), quiet_transformers():
            module, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                dtype=torch.float32,
                attn_implementation=kernel,
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"{folder} is not a text classifier that transformers can load: {error}",
            hint="give a folder with config.json, model.safetensors and tokenizer.json",
        ) from error
    # Older checkpoints of DistilBERT name BERT's tokenizer, whose segments it does not read.
    reads = inspect.signature(module.forward).parameters
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in reads]
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
    folder: Path, config: transformers.PretrainedConfig, labels: tuple[str, ...], task: Task, *,
    order_given: bool,
) -> None:  # fmt: skip
    id2label = config.id2label or {}
    theirs = tuple(id2label[index] for index in sorted(id2label))
    numbered = numbers_of(theirs) is not None and len(theirs) == len(labels)
    # A regression has one output, and nobody agrees on its name.
    fits = len(theirs) == 1 if task == "regression" else theirs == labels
    if not fits and numbered and set(theirs) != set(labels):
        insist_on_given_order(folder, theirs, labels, order_given=order_given)
        fits = True
    if not fits:
        raise ModelError(
            f"the teacher's labels differ from the data's:\n"
            f"  teacher {folder}: {dict(enumerate(theirs))}\n"
            f"  data ({task}): {dict(enumerate(labels))}",
            hint="give data.labels in the teacher's order, or set teacher.finetune",
        )
