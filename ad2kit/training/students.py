"""Students: built from some layers of a model, and made narrower by cutting heads and neurons.

The importance of a unit (a head or a neuron) is its first-order importance (Michel, Levy and
Neubig, *Are Sixteen Heads Really Better than One?*, NeurIPS 2019, equation 2): the output of the
unit is multiplied by a mask variable ξ, and the importance is the expectation over texts x of
|∂L(x)/∂ξ| at ξ = 1, where L is the task's loss. For a neuron this is |activation x gradient|, where
the product is first summed over the tokens of a text.

The cut is physical: the weights and the configuration get smaller, and the graph has no mask.
"""

from __future__ import annotations

import copy
import logging
import re
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.pytorch_utils import prune_linear_layer

from ad2kit.data.labels import filled
from ad2kit.data.splits import by_length
from ad2kit.models.layers import (
    LAYER_PARTS,
    classifier_class,
    cut_heads,
    layer_stack,
    layers_of,
    pruned_heads,
)
from ad2kit.models.pretrained import reference_sha256
from ad2kit.models.text_model import TextModel
from ad2kit.models.translate import choose_layers
from ad2kit.run.errors import ModelError
from ad2kit.run.machine import seeded
from ad2kit.training.ad2 import Batch
from ad2kit.training.losses import supervised
from ad2kit.training.records import DistillReport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from accelerate import Accelerator

    from ad2kit.data.splits import Encoded
    from ad2kit.run.folder import RunDir
    from ad2kit.run.sections import StudentRecipe, Task

    Units = Sequence[Sequence[int]]
    """For each layer, the units that stay, in ascending order."""


logger = logging.getLogger(__name__)

# The most texts that importance is measured on; the training rows are in random order.
IMPORTANCE_TEXTS = 1_024
_BATCH = 32


def encoder_sha256(run: RunDir) -> dict[str, str] | None:
    """Return the sha256 of each file of ``student.model``; None if the student has no such files.

    A finished run does not need the files any more: its report tells what they were.

    Raises:
        ModelError: the folder is missing, and the run is not finished.
    """
    try:
        return reference_sha256(run.recipe.student.model, key="student.model")
    except ModelError:
        if not run.distill_report.is_file():
            raise
        files = DistillReport.read(run.distill_report).encoder_sha256
        if files is None:
            raise
        logger.warning("student.model is not there any more; the student of it is complete")
        return files


def check_layers(source: TextModel, layers: Sequence[int]) -> None:
    """Refuse layer indices that ``source``, the model to copy from, does not have."""
    depth = source.module.config.num_hidden_layers
    missing = [layer for layer in layers if layer >= depth]
    if missing:
        raise ModelError(
            f"student.layers names layer {missing[0]}, but the layers of the "
            f"'{source.module.config.model_type}' to copy from are 0 to {depth - 1}",
            hint=f"choose from 0 to {depth - 1}",
        )


def build_student(source: TextModel, layers: Sequence[int]) -> TextModel:
    """Build a student from some layers of a model, with its embeddings and its head.

    If all layers share their weights (ALBERT), the student keeps these weights and applies them
    once for each of its layers.

    Args:
        source: the model to copy weights from: the teacher, or another checkpoint.
        layers: zero-based indices of its layers, in the student's order.

    Raises:
        ModelError: a layer is missing, or the layers cannot be told apart or do not fit in their
            new places.
    """
    config = source.module.config
    depth = config.num_hidden_layers
    check_layers(source, layers)
    weights = dict(source.module.state_dict())
    stack = layer_stack(source.module, depth)
    if stack is not None:
        weights = _renumbered(weights, stack, layers)
    elif getattr(config, "num_hidden_groups", None) != 1:
        raise ModelError(
            f"the layers of a '{config.model_type}' cannot be told apart: expected one stack of "
            f"{depth} layers in its weights",
            hint="leave student.layers out and name an encoder to start from in student.model",
        )
    # A copy, because a configuration built from its values would lack the attention kernel and the
    # setting that prevents compilation.
    student_config = copy.deepcopy(config)
    student_config.num_hidden_layers = len(layers)
    if stack is not None:
        pruned = pruned_heads(config)
        student_config.pruned_heads = {
            new: pruned[old] for new, old in enumerate(layers) if old in pruned
        }
    if config.model_type == "modernbert":
        choose_layers(student_config, layers)
    with seeded(0):
        module = classifier_class(student_config)(student_config)
    try:
        # Strict: no weight of the student stays at its random initial value.
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ModelError(
            f"layers {list(layers)} of a '{config.model_type}' do not fit in these places: {error}",
            hint="keep its first layer first: in ModernBERT it lacks a norm that the others have",
        ) from error
    return TextModel(module, source.tokenizer, source.labels, source.task)


def _renumbered(
    weights: dict[str, torch.Tensor], stack: str, layers: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Return a state dict that holds only ``layers`` of the stack, renumbered from 0."""
    layer_key = re.compile(rf"{re.escape(stack)}(\d+)\.(.*)")
    matches = {key: layer_key.fullmatch(key) for key in weights}
    student_weights = {key: tensor for key, tensor in weights.items() if not matches[key]}
    for new, old in enumerate(layers):
        for key, match in matches.items():
            if match and int(match[1]) == old:
                student_weights[f"{stack}{new}.{match[2]}"] = weights[key]
    return student_weights


class Importance(NamedTuple):
    """The importance of each unit: shapes [layers, heads] and [layers, neurons]."""

    heads: torch.Tensor | None
    neurons: torch.Tensor


def check_widths(source: TextModel, settings: StudentRecipe) -> None:
    """Refuse widths that the layers of a model cannot be cut to.

    Raises:
        ModelError: the family cannot be cut, or the model has fewer heads or neurons.
    """
    config = source.module.config
    names = LAYER_PARTS.get(config.model_type)
    heads, neurons = widths(source)
    counts = {
        "attention_heads": (settings.attention_heads, heads),
        "feed_forward": (settings.feed_forward, neurons),
    }
    for key, (count, limit) in counts.items():
        if count is None:
            continue
        if names is None or (key == "attention_heads" and names.heads_out is None):
            families = [
                family
                for family, parts in LAYER_PARTS.items()
                if key == "feed_forward" or parts.heads_out
            ]
            raise ModelError(
                f"student.{key}: cannot be cut in a '{config.model_type}', only in "
                f"{', '.join(families)}",
                hint=f"leave student.{key} out" + ("; feed_forward can be cut" if names else ""),
            )
        if key == "attention_heads" and (pruned := pruned_heads(config)):
            raise ModelError(
                f"student.attention_heads: the '{config.model_type}' to copy from has had heads "
                f"cut out of layers {', '.join(map(str, sorted(pruned)))} already",
                hint="leave student.attention_heads out: the layers keep the heads that they have",
            )
        if count > limit:
            raise ModelError(
                f"student.{key} is {count}, but the layers of the '{config.model_type}' to copy "
                f"from have {limit}",
                hint=f"set student.{key} to {limit} or less, or leave it out to keep all",
            )


def widths(model: TextModel) -> tuple[int, int]:
    """Return the number of heads and the number of feed-forward neurons of a layer."""
    config = model.module.config
    names = LAYER_PARTS.get(config.model_type, LAYER_PARTS["bert"])
    return config.num_attention_heads, getattr(config, names.width)


def narrow(
    student: TextModel,
    teacher: TextModel,
    settings: StudentRecipe,
    rows: Callable[[], Encoded],
    accelerator: Accelerator,
) -> None:
    """Cut heads and neurons out of the student's layers as the recipe says, in place.

    Args:
        student: the student, with the teacher's layers ``settings.layers``.
        teacher: the model that importance is measured on.
        settings: gives the layers and their new widths.
        rows: encodes the training rows; called only if they are needed.
        accelerator: gives device and processes; the processes share the measurement.

    Raises:
        ModelError: see :func:`check_widths`.
    """
    if not settings.narrower:
        return
    check_widths(teacher, settings)
    scores = importance(teacher, rows(), accelerator)
    # Layers that share their weights count as one layer, in the student and in the teacher.
    sources = [layer % len(scores.neurons) for layer in settings.layers or ()]
    sources = sources[: len(layers_of(student.module))]
    if settings.attention_heads is not None and scores.heads is not None:
        keep_heads(student, most_important(scores.heads[sources], settings.attention_heads))
    if settings.feed_forward is not None:
        keep_neurons(student, most_important(scores.neurons[sources], settings.feed_forward))


def importance(model: TextModel, encoded: Encoded, accelerator: Accelerator) -> Importance:
    """Measure the importance of each head and neuron of a model on the first rows of a split.

    Args:
        model: a classifier that was trained on the task.
        encoded: rows of which the first :data:`IMPORTANCE_TEXTS` are read. One without a label has
            the model's answer in its place.
        accelerator: gives device and processes; they share the rows, and all get the result.
    """
    module = model.module
    device = accelerator.device
    module.to(device).eval()
    names = LAYER_PARTS[module.config.model_type]
    heads, neurons = widths(model)
    # For each kind of unit the part of a layer that reads the units, and their number.
    readers = {"neurons": (names.down, neurons)}
    if names.heads_out is not None:
        readers["heads"] = (names.heads_out, heads)
    layers = layers_of(model.module)
    totals = {kind: torch.zeros(len(layers), units) for kind, (_, units) in readers.items()}
    lengths = encoded.lengths[:IMPORTANCE_TEXTS]
    batches = [
        batch for rows in by_length(lengths, _BATCH) for batch in encoded.batches(rows, _BATCH)
    ]
    for rows in batches[accelerator.process_index :: accelerator.num_processes]:
        batch = Batch.of(model, encoded, rows, None, device)
        windows = len(batch.teacher_logits)
        masks = {
            kind: torch.ones(len(layers), windows, units, device=device, requires_grad=True)
            for kind, (_, units) in readers.items()
        }
        with ExitStack() as hooks:
            for kind, (name, _) in readers.items():
                for layer, mask in zip(layers, masks[kind], strict=True):
                    hook = _multiply(mask)
                    handle = layer.get_submodule(name).register_forward_pre_hook(hook)
                    hooks.callback(handle.remove)
            logits = batch.by_text(module(**batch.inputs).logits)
        labels = _own_or_said(model.task, batch.labels, logits)
        # The sum and not the mean, so that the mask of a text has the gradient of its own loss.
        loss = supervised(model.task, logits, labels) * len(rows)
        gradients = torch.autograd.grad(loss, list(masks.values()))
        for kind, gradient in zip(masks, gradients, strict=True):
            totals[kind] += gradient.abs().sum(dim=1).cpu()
    # All processes need the same means, or they would cut their students differently.
    means = {
        kind: accelerator.reduce(total.to(device), "sum").cpu() / len(lengths)
        for kind, total in totals.items()
    }
    return Importance(means.get("heads"), means["neurons"])


def _own_or_said(task: Task, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return labels, with the answers of the model, from its logits, for the rows without one.

    The squared error of a number is flat at the model's own answer. So the label is half a unit
    off: then the slope of the loss is that of the answer.
    """
    given = labels.cpu().numpy()
    logits = logits.detach().float()
    answer = logits - 0.5 if task == "regression" else logits
    return torch.from_numpy(filled(task, given, answer.cpu().numpy())).to(labels.device)


def most_important(scores: torch.Tensor, count: int) -> list[list[int]]:
    """Return for each layer the ``count`` units with the highest scores, in ascending order.

    ``scores`` has shape [layers, units]; of equal scores the first units are taken.
    """
    ranked = torch.argsort(scores, dim=1, descending=True, stable=True)
    return [sorted(row[:count].tolist()) for row in ranked]


def keep_heads(model: TextModel, kept: Units) -> None:
    """Cut all attention heads except ``kept`` out of a model, in place."""
    heads, _ = widths(model)
    cut = [sorted(set(range(heads)) - set(kept_heads)) for kept_heads in kept]
    cut_heads(model.module, dict(enumerate(cut)))


def keep_neurons(model: TextModel, kept: Units) -> None:
    """Cut all feed-forward neurons except ``kept`` out of a model, in place.

    All layers keep the same number of neurons, because a configuration has one width for all.
    """
    config = model.module.config
    names = LAYER_PARTS[config.model_type]
    _, neurons = widths(model)
    for layer, units in zip(layers_of(model.module), kept, strict=True):
        up: Any = layer.get_submodule(names.up)
        down: Any = layer.get_submodule(names.down)
        # If a gate multiplies the neurons, `up` computes neurons and gate one after the other.
        rows = [first + unit for first in range(0, up.out_features, neurons) for unit in units]
        layer.set_submodule(names.up, prune_linear_layer(up, torch.LongTensor(rows), dim=0))
        layer.set_submodule(names.down, prune_linear_layer(down, torch.LongTensor(units), dim=1))
    setattr(config, names.width, len(kept[0]))


def _multiply(mask: torch.Tensor) -> Any:
    """Return a hook that multiplies an input [texts, tokens, width] by a mask [texts, units]."""

    def hook(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        states, *rest = args
        columns = mask.repeat_interleave(states.shape[-1] // mask.shape[-1], dim=-1)
        return (states * columns.unsqueeze(1), *rest)

    return hook
