"""Models: load, save and predict. Weights are safetensors, checked by sha256."""

from __future__ import annotations

import inspect
import json
import logging
import re
import tempfile
import unicodedata
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer

from ad2kit.data import splits
from ad2kit.models.layers import classifier_class, give_two_outputs
from ad2kit.models.pretrained import (
    RANDOM,
    check_weights,
    find_model,
    read_config,
    read_tokenizer,
    refuse_adapter,
    saved_by,
)
from ad2kit.models.records import ModelManifest, is_given
from ad2kit.models.translate import RUNNING
from ad2kit.run.errors import ModelError
from ad2kit.run.files import check_sha256, sha256_of_folder, whole_folder, write_record
from ad2kit.run.machine import quiet_transformers, seeded
from ad2kit.run.sections import Task, TextLength
from ad2kit.statistics.label_order import check_given_order, numbers_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from ad2kit.data.splits import Data, Encoded


logger = logging.getLogger(__name__)

MANIFEST = "sha256.json"


EVALUATION_BATCH = 64
# Rows whose logits are in memory at a time.
_PREDICTED_ROWS = 2**18


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
        return cast("torch.nn.Embedding", self.module.get_input_embeddings())

    def parameters(self) -> int:
        """Return the number of parameters."""
        return sum(parameter.numel() for parameter in self.module.parameters())


def load_reference(
    reference: str | None, data: Data, *, seed: int, finished: bool, key: str
) -> TextModel:
    """Load a teacher, or a checkpoint that a student starts from.

    Args:
        reference: see :class:`ad2kit.run.sections.TeacherRecipe`; a teacher that is given by its
            answers (None) is refused.
        data: gives labels and task, and the training texts that ``random://`` takes its
            vocabulary from.
        seed: seed of a head that is not in the checkpoint, and of ``random://``.
        finished: the checkpoint must already hold a classifier with these labels.
        key: the key of the recipe that holds ``reference``, for messages.

    Raises:
        ModelError: weights are missing, pickled, or of another architecture, or labels differ.
    """
    if reference is None:
        raise ModelError(
            f"{key} is null: the teacher is given by its answers, and this needs its model",
            hint=f"name a model in {key}",
        )
    if reference == RANDOM:
        parts = random_bert(head_config(data.labels, data.task), seed, data.train.texts)
        return TextModel(*parts, data.labels, data.task)
    folder = find_model(reference, key=key)
    return load_model(
        folder, data.labels, data.task, seed=seed, finished=finished, order_given=data.order_given
    )


def load_model(
    folder: Path,
    labels: tuple[str, ...],
    task: Task = "single_label",
    *,
    seed: int = 0,
    finished: bool = True,
    order_given: bool = False,
) -> TextModel:
    """Load a model from a folder; see :func:`load_reference`.

    A folder that :func:`save` wrote is first compared with its sha256 manifest. A finished
    classifier of two classes may have a single output, whose sigmoid is the probability of one
    class. It gets a second output, which is always 0, so that the softmax of both is that sigmoid.

    Raises:
        ModelError: see :func:`load_reference`.
    """
    refuse_adapter(folder, len(labels))
    check_files(folder)
    config = read_config(folder)
    tokenizer = read_tokenizer(folder)
    sigmoid_of = None
    if finished:
        sigmoid_of = _check_labels(folder, config, labels, task, order_given=order_given)
    head = head_config(labels, task)
    if sigmoid_of is not None:
        head = head_config((labels[sigmoid_of],), task)
        logger.info("%s has one output, the sigmoid of '%s'", folder, labels[sigmoid_of])
    module = _load_module(folder, config, head, seed=seed, finished=finished)
    if sigmoid_of is not None:
        give_two_outputs(module, sigmoid_of)
        for key, value in head_config(labels, task).items():
            setattr(module.config, key, value)
    # Older checkpoints of DistilBERT name BERT's tokenizer, but the model has no segment ids.
    parameters = inspect.signature(module.forward).parameters
    tokenizer.model_input_names = [
        name for name in tokenizer.model_input_names if name in parameters
    ]
    model = TextModel(module, tokenizer, labels, task)
    _check_embeddings(folder, model)
    return model


def _load_module(
    folder: Path,
    config: transformers.PretrainedConfig,
    head: dict[str, Any],
    *,
    seed: int,
    finished: bool,
) -> PreTrainedModel:
    """Load the weights into a classifier with the outputs of ``head``; see :func:`head_config`."""
    for key, value in head.items():
        setattr(config, key, value)
    kernel = None
    if config.model_type == "modernbert":
        # On a GPU ModernBERT would compile its embeddings, or flatten the batch before them. Either
        # would misplace the adversary's hook.
        config.reference_compile = False
        kernel = "sdpa"
    try:
        # transformers would warn about a new head; _check_loaded decides from the missing keys.
        with seeded(seed), quiet_transformers():
            module, info = classifier_class(config).from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
                attn_implementation=kernel,
            )
    except Exception as error:
        # A layer may refuse a value of the configuration with any type of exception.
        raise ModelError(
            f"{folder} is not a text classifier that transformers can load: "
            f"{type(error).__name__}: {error}",
            hint=f"correct {folder / 'config.json'}, or give a folder that save_pretrained() wrote",
        ) from error
    _check_loaded(folder, module, info, finished=finished)
    return cast("PreTrainedModel", module)


def _check_loaded(
    folder: Path, module: PreTrainedModel, info: dict[str, Any], *, finished: bool
) -> None:
    """Refuse weights that do not fit the architecture in config.json.

    If the head will be trained (``finished`` is false), the stored head may be missing or have
    another size.
    """
    prefix = f"{module.base_model_prefix}."
    missing = [
        key
        for key in info["missing_keys"]
        if finished or (key.startswith(prefix) and "pooler" not in key)
    ]
    model_kind = "classifier" if finished else "encoder"
    family = module.config.model_type
    if missing:
        raise ModelError(
            f"{folder} does not hold a whole {model_kind}: {len(missing)} tensors are missing, "
            f"first {min(missing)}",
            hint="set teacher.finetune to train a head on it"
            if finished
            else "give an encoder checkpoint of the architecture that its config.json names",
        )
    # Version 5 gives the two shapes with each key.
    other_shapes = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    mismatched = [key for key in other_shapes if finished or key.startswith(prefix)]
    if mismatched:
        key = min(mismatched)
        raise ModelError(
            f"{folder} does not hold the '{family}' that its config.json describes: expected {key} "
            f"of shape {list(module.state_dict()[key].shape)}, found another",
            hint="give config.json and model.safetensors of the same model",
        )
    unused = sorted(key for key in info["unexpected_keys"] if re.search(r"\.layers?\.\d+\.", key))
    if unused:
        raise ModelError(
            f"{folder} holds {len(unused)} tensors of layers that the '{family}' of its "
            f"config.json does not have, first {unused[0]}",
            hint="give config.json and model.safetensors of the same model",
        )


def _check_embeddings(folder: Path, model: TextModel) -> None:
    """Refuse a tokenizer with token ids for which the model has no embedding."""
    rows = model.word_embeddings.num_embeddings
    vocabulary = model.tokenizer.get_vocab()
    unembedded = {token: index for token, index in vocabulary.items() if index >= rows}
    if unembedded:
        tokens = max(unembedded.values()) + 1
        examples = sorted(unembedded, key=unembedded.__getitem__)[:5]
        raise ModelError(
            f"the tokenizer of {folder} knows {tokens} tokens, the model {rows}: no embedding for "
            f"{', '.join(map(repr, examples))}",
            hint=f"call model.resize_token_embeddings({tokens}), train it on texts with these "
            "tokens, and save it again; or save the tokenizer without them",
        )


def head_config(labels: tuple[str, ...], task: Task) -> dict[str, Any]:
    """Return the entries of transformers' configuration for a head with these outputs."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": task if task == "regression" else f"{task}_classification",
    }


_TASK_OF: dict[str, Task] = {head_config((), each)["problem_type"]: each for each in get_args(Task)}


def most_tokens(model: TextModel) -> int | None:
    """Return the number of tokens that the model has positions for; None if there is no limit."""
    config = model.module.config
    positions: int | None = getattr(config, "max_position_embeddings", None)
    # Some families number positions from the padding id + 1; in MPNet the padding id is always 1.
    offset = 0
    if config.model_type == "mpnet":
        offset = 2
    elif config.model_type in ("roberta", "xlm-roberta", "camembert"):
        offset = cast("int", config.pad_token_id) + 1
    return None if positions is None else positions - offset


def check_length(model: TextModel, length_tokens: int, *, key: str) -> None:
    """Refuse a length beyond the model's positions; ``key`` is its key in the recipe."""
    limit = most_tokens(model)
    if limit is not None and length_tokens > limit:
        raise ModelError(
            f"{key} is {length_tokens}, but the model has positions for {limit} tokens",
            hint=f"set {key} to {limit} or less",
        )


def try_out(
    model: TextModel, texts: Sequence[tuple[str, ...]], length_tokens: int, *, key: str
) -> None:
    """Run a model on some texts, and on one of the maximum length, before it is trained.

    Args:
        model: the model to try.
        texts: some texts of its data, at least one.
        length_tokens: the maximum length of a text in tokens.
        key: the key of the recipe that names the model, for messages.

    Raises:
        ModelError: the model cannot read the texts, or its logits are not finite numbers.
    """
    longest = tuple(" ".join([text.strip()[:100]] * length_tokens) for text in texts[0])
    split = splits.Split.of((*texts, longest), np.zeros(len(texts) + 1))
    module = model.module
    was_training = module.training
    try:
        encoded = splits.encode(split, model.tokenizer, TextLength(length_tokens))
        arrays = splits.collate(encoded, range(len(encoded)), model.tokenizer)
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
        with torch.no_grad():
            logits = module.eval()(**inputs).logits
    except Exception as error:
        # An index beyond a table, or any error of a forward pass with a wrong configuration.
        raise ModelError(
            f"{key}: the model cannot read the first training texts: "
            f"{type(error).__name__}: {error}",
            hint="give config.json, tokenizer and weights of the same model",
        ) from error
    module.train(was_training)
    if logits.shape != (len(encoded), len(model.labels)) or not torch.isfinite(logits).all():
        raise ModelError(
            f"{key}: expected {len(model.labels)} finite logits for each text, found "
            f"{logits[0].tolist()!r:.80} for the first training text",
            hint="give the weights of a model that was trained to its end",
        )


def save(model: TextModel, folder: Path, *, inputs: str) -> None:
    """Write the model as safetensors, with its tokenizer and a sha256 manifest, atomically."""
    with whole_folder(folder) as new, quiet_transformers():
        model.module.save_pretrained(new, safe_serialization=True)
        model.tokenizer.save_pretrained(new)
        manifest = ModelManifest(inputs=inputs, files=sha256_of_folder(new))
        write_record(new / MANIFEST, manifest)


def load_saved(folder: Path) -> TextModel:
    """Load a model that :func:`save` wrote, with the labels and the task that it says itself.

    Raises:
        ModelError: see :func:`load_model`.
    """
    config = read_config(folder)
    task = _TASK_OF.get(config.problem_type or "", "single_label")
    return load_model(folder, _output_names(config), task)


@contextmanager
def saved_by_this_version(folder: Path) -> Iterator[Path]:
    """Give a folder of a model that the running version of transformers reads exactly by itself.

    It is ``folder``, or a copy for the time of the block if another major version saved it.
    """
    if saved_by(folder) == RUNNING:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="ad2kit-model-") as temporary:
        save(load_saved(folder), Path(temporary) / "model", inputs="")
        yield Path(temporary) / "model"


def saved_inputs(folder: Path) -> str:
    """Return the fingerprint of the inputs of a saved model."""
    return ModelManifest.read(folder / MANIFEST).inputs


def check_files(folder: Path) -> None:
    """Insist on safetensors weights, and compare files with the sha256 manifest if there is one.

    The folder of a teacher that is given by its answers has no weights.
    """
    if not is_given(folder):
        check_weights(folder)
    if (folder / MANIFEST).is_file():
        hint = f"delete {folder} and run `ad2kit distill` again"
        check_sha256(folder, ModelManifest.read(folder / MANIFEST).files, hint=hint)


def _check_labels(
    folder: Path,
    config: transformers.PretrainedConfig,
    labels: tuple[str, ...],
    task: Task,
    *,
    order_given: bool,
) -> int | None:
    """Refuse a finished classifier for another task, or with other labels than the data.

    Names are compared without regard to case.

    Returns:
        The index of the label whose probability is the sigmoid of a single output; None if each
        label has its own output.
    """
    output_names = _output_names(config)
    one_of_two = task == "single_label" and len(output_names) == 1 and len(labels) == 2
    _check_task(folder, config.problem_type, task, one_of_two=one_of_two)
    as_many = one_of_two or len(output_names) == len(labels)
    numbered = numbers_of(output_names) is not None and as_many
    if task == "regression":  # a regression has one output, with any name
        fits = len(output_names) == 1
    elif one_of_two:
        fits = not numbered and _plain(output_names)[0] in _plain(labels)
    else:
        fits = _plain(output_names) == _plain(labels)
    if not fits and numbered and task != "regression" and set(output_names) != set(labels):
        check_given_order(folder, output_names, labels, order_given=order_given)
        fits = True
    if not fits:
        raise ModelError(
            f"the teacher's labels differ from the data's:\n"
            f"  teacher {folder}: {dict(enumerate(output_names))}\n"
            f"  data ({task}): {dict(enumerate(labels))}",
            hint=_label_hint(folder, output_names, labels),
        )
    if not one_of_two:
        return None
    if numbered:
        return 1  # a sigmoid with a number and no name is the probability of class 1
    return _plain(labels).index(_plain(output_names)[0])


def _output_names(config: transformers.PretrainedConfig) -> tuple[str, ...]:
    """Return the names that a configuration has for its outputs, in their order."""
    id2label = config.id2label or {}
    return tuple(id2label[index] for index in sorted(id2label))


def _check_task(folder: Path, problem_type: str | None, task: Task, *, one_of_two: bool) -> None:
    """Refuse a classifier that was trained with the loss of another task."""
    teacher_task = _TASK_OF.get(problem_type or "", task)
    if teacher_task == task:
        return
    if one_of_two and teacher_task == "multi_label":  # its one label has a sigmoid
        return
    raise ModelError(
        f"{folder / 'config.json'} says problem_type {problem_type}, but data.task is {task}",
        hint=f"set data.task={teacher_task} if the rows are labelled so, or teacher.finetune to "
        "train a new head; if config.json is wrong, delete problem_type there",
    )


def _label_hint(folder: Path, output_names: tuple[str, ...], labels: tuple[str, ...]) -> str:
    """Return the hint for output names that differ from the labels of the data."""
    finetune = "or set teacher.finetune to train a new head"
    label_of = dict(zip(_plain(labels), labels, strict=True))
    if sorted(_plain(output_names)) == sorted(label_of):
        order = json.dumps([label_of[name] for name in _plain(output_names)], ensure_ascii=False)
        return f"give the labels in the teacher's order, 'data.labels={order}', {finetune}"
    are_ids = sorted(labels) == sorted(map(str, range(len(labels))))
    if len(output_names) == len(labels) and are_ids:
        order = json.dumps(output_names, ensure_ascii=False)
        return f"if your ids are the teacher's, give 'data.labels={order}', {finetune}"
    return (
        f"name them alike: in your rows, or in id2label of {folder / 'config.json'} in the order "
        f"of the outputs; {finetune}"
    )


def _plain(names: Sequence[str]) -> tuple[str, ...]:
    """Return names in lower case; unchanged if two names would become equal."""
    plain = tuple(unicodedata.normalize("NFC", name).casefold().strip() for name in names)
    return plain if len(set(plain)) == len(plain) else tuple(names)


def random_bert(
    head: Mapping[str, Any], seed: int, texts: Sequence[tuple[str, ...]]
) -> tuple[transformers.BertForSequenceClassification, transformers.BertTokenizerFast]:
    """Return a random four-layer classifier, and a tokenizer with the words of ``texts``.

    ``head`` holds the outputs of the classifier; see :func:`head_config`.
    """
    words = sorted(
        {
            word
            for columns in texts
            for text in columns
            for word in re.findall(r"\w+|[^\w\s]", text.lower())
        }
    )
    letters = sorted({letter for word in words for letter in word})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *words, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    backend = BertWordPieceTokenizer(vocabulary, lowercase=True)
    tokenizer = transformers.BertTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend.to_str())
    )
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
        **head,
    )
    with seeded(seed):
        return transformers.BertForSequenceClassification(config), tokenizer


def predict_logits(
    model: TextModel, encoded: Encoded, device: torch.device, accelerator: Accelerator | None = None
) -> torch.Tensor:
    """Return the logits of all texts on clean text, without dropout, as float32 [rows, outputs].

    If the accelerator has several processes, they share the windows and all get the result.
    """
    logits = predict_windows(model, encoded, device, accelerator)
    return torch.from_numpy(encoded.average(logits.numpy()))


def predict_windows(
    model: TextModel, encoded: Encoded, device: torch.device, accelerator: Accelerator | None = None
) -> torch.Tensor:
    """Return the logits of all windows, float32 [windows, outputs]; see :func:`predict_logits`."""
    blocks = predict_in_blocks(model, encoded, device, accelerator)
    return torch.cat([torch.zeros(0, len(model.labels)), *blocks])


@torch.inference_mode()
def predict_in_blocks(
    model: TextModel, encoded: Encoded, device: torch.device, accelerator: Accelerator | None = None
) -> Iterator[torch.Tensor]:
    """Yield what :func:`predict_windows` returns in blocks of consecutive windows.

    All processes have to read all blocks.
    """
    model.module.eval()
    for start in range(0, len(encoded.input_ids), _PREDICTED_ROWS):
        lengths = encoded.input_ids.lengths[start : start + _PREDICTED_ROWS]
        logits = torch.zeros(len(lengths), len(model.labels))
        batches = splits.by_length(lengths, EVALUATION_BATCH)
        if accelerator is not None:
            batches = batches[accelerator.process_index :: accelerator.num_processes]
        for windows in batches:
            inputs = padded(model, encoded, start + windows, device)
            logits[windows] = model.module(**inputs).logits.float().cpu()
        if accelerator is not None and accelerator.num_processes > 1:
            logits = accelerator.reduce(logits.to(device), "sum").cpu()
        yield logits


def padded(
    model: TextModel, encoded: Encoded, windows: np.ndarray, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return windows as padded tensors on a device; see :func:`ad2kit.data.splits.collate`."""
    arrays = splits.collate(encoded, windows, model.tokenizer)
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
