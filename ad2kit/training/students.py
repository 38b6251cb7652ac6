"""Students: made from some layers of a model, and narrower where heads and neurons are cut out.

How much a unit (a head or a neuron) matters is its first-order importance (Michel, Levy and Neubig,
*Are Sixteen Heads Really Better than One?*, NeurIPS 2019, equation 2): multiply what it computes by
a mask variable ξ, and take the expectation over texts x of |∂L(x)/∂ξ| at ξ = 1, with L the task's
loss. For a neuron that is |activation x gradient|, summed over the tokens of a text first.

The cut is physical: smaller weights and a configuration that says so, no mask in the graph.
"""

from __future__ import annotations

import copy
import re
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.pytorch_utils import prune_linear_layer

from ad2kit.data.splits import by_length
from ad2kit.models.text_model import TextModel, padded
from ad2kit.run.errors import ModelError
from ad2kit.run.machine import seeded
from ad2kit.training.losses import supervised

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import transformers
    from accelerate import Accelerator

    from ad2kit.data.splits import Encoded
    from ad2kit.run.sections import StudentRecipe

    Units = Sequence[Sequence[int]]
    """For each layer, the units that stay, in ascending order."""


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
    # A copy and not a new one from its values, which lack the kernels and what must not compile.
    student_config = copy.deepcopy(config)
    student_config.num_hidden_layers = len(layers)
    if stack is not None:
        cut = config.pruned_heads
        kept = {new: cut[old] for new, old in enumerate(layers) if old in cut}
        student_config.pruned_heads = kept
    if config.model_type == "modernbert":
        student_config.global_attn_every_n_layers = _global_every(config, layers)
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


def _global_every(config: transformers.PretrainedConfig, layers: Sequence[int]) -> int:
    """Return the n for which every n-th of these layers of a ModernBERT sees the whole text.

    Its configuration has no other way to say which do, and a layer that was trained on the whole
    text is another one with a window.
    """
    whole = [layer % config.global_attn_every_n_layers == 0 for layer in layers]
    for every in range(1, len(layers) + 1):
        if whole == [place % every == 0 for place in range(len(layers))]:
            return every
    raise ModelError(
        f"in a 'modernbert' every n-th layer from its first on sees the whole text, and layers "
        f"{list(layers)} would not see what they were trained on for any n",
        hint="choose them at equal distances from layer 0, such as [0, 2, 4] or [0, 3, 6]",
    )


# Texts that importance is measured on, at most; the training rows are in random order.
TEXTS = 1_024
_BATCH = 32


class _Names(NamedTuple):
    """What a family calls the parts of a layer, and the width of its feed-forward block.

    ``heads_out`` reads what the heads compute and ``down`` what the neurons do, which ``up`` feeds;
    ``heads_out`` is None where heads cannot be cut.
    """

    heads_out: str | None
    up: str
    down: str
    width: str = "intermediate_size"


_BERT = _Names("attention.output.dense", "intermediate.dense", "output.dense")
_NO_HEADS = _BERT._replace(heads_out=None)
FAMILIES = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "distilbert": _Names("attention.out_lin", "ffn.lin1", "ffn.lin2", "hidden_dim"),
    "albert": _Names("attention.dense", "ffn", "ffn_output"),
    # Their positions are relative, with a bias or a table for each head that stays whole.
    "mpnet": _NO_HEADS,
    "deberta-v2": _NO_HEADS,
    "modernbert": _Names(None, "mlp.Wi", "mlp.Wo"),
}


class Importance(NamedTuple):
    """How much each unit matters: shapes [layers, heads] and [layers, neurons]."""

    heads: torch.Tensor | None
    neurons: torch.Tensor


def check_widths(source: TextModel, settings: StudentRecipe) -> None:
    """Refuse widths that the layers of a model cannot be cut to.

    Raises:
        ModelError: names what the model has, or which families can be cut.
    """
    config, has = source.module.config, widths(source)
    names = FAMILIES.get(config.model_type)
    wanted = {
        "attention_heads": (settings.attention_heads, has[0]),
        "feed_forward": (settings.feed_forward, has[1]),
    }
    for key, (count, most) in wanted.items():
        if count is None:
            continue
        if names is None or (key == "attention_heads" and names.heads_out is None):
            able = [f for f, found in FAMILIES.items() if key == "feed_forward" or found.heads_out]
            raise ModelError(
                f"student.{key}: cannot be cut in a '{config.model_type}', only in "
                f"{', '.join(able)}",
                hint=f"leave student.{key} out" + ("; feed_forward can be cut" if names else ""),
            )
        if key == "attention_heads" and config.pruned_heads:
            raise ModelError(
                f"student.attention_heads: the '{config.model_type}' to copy from has had heads "
                f"cut out of layers {', '.join(map(str, sorted(config.pruned_heads)))} already",
                hint="leave student.attention_heads out: the layers keep the heads that they have",
            )
        if count > most:
            raise ModelError(
                f"student.{key} is {count}, but the layers of the '{config.model_type}' to copy "
                f"from have {most}",
                hint=f"set student.{key} to {most} or less, or leave it out to keep all",
            )


def widths(model: TextModel) -> tuple[int, int]:
    """Return how many heads and how many feed-forward neurons a layer of a model has."""
    config = model.module.config
    names = FAMILIES.get(config.model_type, _BERT)
    return config.num_attention_heads, getattr(config, names.width)


def layers_of(model: TextModel) -> list[torch.nn.Module]:
    """Return the layers of a model in their order; one where they share their weights."""
    stack = layer_stack(model.module, model.module.config.num_hidden_layers)
    if stack is None:
        return [model.module.get_submodule("albert.encoder.albert_layer_groups.0.albert_layers.0")]
    return list(model.module.get_submodule(stack.rstrip(".")).children())


def narrow(
    student: TextModel,
    teacher: TextModel,
    settings: StudentRecipe,
    rows: Callable[[], Encoded],
    accelerator: Accelerator,
) -> None:
    """Cut the layers that a student has copied from its teacher as the recipe says, in place.

    Args:
        student: made from the teacher's layers ``settings.layers``.
        teacher: what importance is measured on.
        settings: which layers these are, and how wide they shall be.
        rows: encodes the training rows, if they are needed.
        accelerator: device and processes, which share the measuring.

    Raises:
        ModelError: see :func:`check_widths`.
    """
    if not settings.narrower:
        return
    check_widths(teacher, settings)
    found = importance(teacher, rows(), accelerator)
    # Layers that share their weights are one, in the student and in the teacher.
    places = [layer % len(found.neurons) for layer in settings.layers or ()][
        : len(layers_of(student))
    ]
    if settings.attention_heads is not None and found.heads is not None:
        keep_heads(student, most_important(found.heads[places], settings.attention_heads))
    if settings.feed_forward is not None:
        keep_neurons(student, most_important(found.neurons[places], settings.feed_forward))


def importance(model: TextModel, encoded: Encoded, accelerator: Accelerator) -> Importance:
    """Measure how much each head and neuron matters to a model on the first rows of a split.

    Args:
        model: a classifier that was trained on the task.
        encoded: labelled rows; the first :data:`TEXTS` of them are read.
        accelerator: device and processes, which share the rows and all have the result.
    """
    module, device = model.module, accelerator.device
    module.to(device).eval()
    names = FAMILIES[module.config.model_type]
    heads, neurons = widths(model)
    readers = {"neurons": (names.down, neurons)}
    if names.heads_out is not None:
        readers["heads"] = (names.heads_out, heads)
    layers = layers_of(model)
    totals = {kind: torch.zeros(len(layers), units) for kind, (_, units) in readers.items()}
    lengths = [len(ids) for ids in encoded.input_ids[:TEXTS]]
    batches = by_length(lengths, _BATCH)
    for rows in batches[accelerator.process_index :: accelerator.num_processes]:
        masks = {
            kind: torch.ones(len(layers), len(rows), units, device=device, requires_grad=True)
            for kind, (_, units) in readers.items()
        }
        with ExitStack() as hooks:
            for kind, (name, _) in readers.items():
                for layer, mask in zip(layers, masks[kind], strict=True):
                    hook = _multiply(mask)
                    handle = layer.get_submodule(name).register_forward_pre_hook(hook)
                    hooks.callback(handle.remove)
            logits = module(**padded(model, encoded, rows, device)).logits
        labels = torch.from_numpy(encoded.labels[rows]).to(device)
        # Of the sum and not the mean: the mask of a text then has the gradient of its own loss.
        loss = supervised(model.task, logits, labels) * len(rows)
        found = torch.autograd.grad(loss, list(masks.values()))
        for kind, gradient in zip(masks, found, strict=True):
            totals[kind] += gradient.abs().sum(dim=1).cpu()
    # The same in all processes, or they would cut their students differently.
    means = {
        kind: accelerator.reduce(total.to(device), "sum").cpu() / len(lengths)
        for kind, total in totals.items()
    }
    return Importance(means.get("heads"), means["neurons"])


def most_important(scores: torch.Tensor, count: int) -> list[list[int]]:
    """Return for each layer the ``count`` units with the highest scores [layers, units].

    Of equals the first.
    """
    ranked = torch.argsort(scores, dim=1, descending=True, stable=True)
    return [sorted(row[:count].tolist()) for row in ranked]


def keep_heads(model: TextModel, kept: Units) -> None:
    """Cut all attention heads but those of ``kept`` out of a model, in place."""
    heads, _ = widths(model)
    module: Any = model.module
    module.prune_heads(
        {layer: sorted(set(range(heads)) - set(stay)) for layer, stay in enumerate(kept)}
    )


def keep_neurons(model: TextModel, kept: Units) -> None:
    """Cut all feed-forward neurons but those of ``kept`` out of a model, in place.

    All layers keep equally many: a configuration has one width for all.
    """
    config = model.module.config
    names, (_, neurons) = FAMILIES[config.model_type], widths(model)
    for layer, stay in zip(layers_of(model), kept, strict=True):
        up: Any = layer.get_submodule(names.up)
        down: Any = layer.get_submodule(names.down)
        # Where a gate multiplies the neurons, `up` computes both, one behind the other.
        rows = [first + unit for first in range(0, up.out_features, neurons) for unit in stay]
        layer.set_submodule(names.up, prune_linear_layer(up, torch.LongTensor(rows), dim=0))
        layer.set_submodule(names.down, prune_linear_layer(down, torch.LongTensor(stay), dim=1))
    setattr(config, names.width, len(kept[0]))


def _multiply(mask: torch.Tensor) -> Any:
    """Return a hook that multiplies an input [texts, tokens, width] by a mask [texts, units]."""

    def hook(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        states, *rest = args
        columns = mask.repeat_interleave(states.shape[-1] // mask.shape[-1], dim=-1)
        return (states * columns.unsqueeze(1), *rest)

    return hook
