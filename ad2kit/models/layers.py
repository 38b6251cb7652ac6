"""The layers of a model: where they are, the names of their parts, what is cut out, the last one.

Heads that are cut out stand in the configuration as ``pruned_heads`` (layer -> heads). transformers
4 cuts them when it makes the model; version 5 knows the key no more, and :func:`classifier_class`
does it there.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import transformers
from transformers.pytorch_utils import prune_linear_layer

from ad2kit.models.translate import CUTS_PRUNED_HEADS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


class LayerNames(NamedTuple):
    """The names of a family for the parts of a layer, and for the width of its feed-forward block.

    The input of ``heads_out`` is the output of the heads, and ``heads_in`` computes their queries,
    keys and values. ``attention`` counts the heads. ``up`` computes the neurons, and ``down`` reads
    them. ``heads_out`` is None if heads cannot be cut. ``width`` is a configuration key.
    """

    heads_out: str | None
    up: str
    down: str
    width: str = "intermediate_size"
    attention: str = "attention.self"
    heads_in: tuple[str, ...] = ("query", "key", "value")


_BERT = LayerNames("attention.output.dense", "intermediate.dense", "output.dense")
_NO_HEADS = _BERT._replace(heads_out=None)
LAYER_PARTS = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "distilbert": LayerNames(
        "attention.out_lin",
        "ffn.lin1",
        "ffn.lin2",
        "hidden_dim",
        "attention",
        ("q_lin", "k_lin", "v_lin"),
    ),
    "albert": LayerNames("attention.dense", "ffn", "ffn_output", attention="attention"),
    # Their relative positions have a bias or a table for each head, which cannot be cut.
    "mpnet": _NO_HEADS,
    "deberta-v2": _NO_HEADS,
    "modernbert": LayerNames(None, "mlp.Wi", "mlp.Wo"),
}


def layer_stack(module: torch.nn.Module, depth: int) -> str | None:
    """Return the prefix of the layers in a state dict; None if the layers share their weights.

    It is the only prefix whose index runs over all ``depth`` layers. Its name depends on the
    family: ``bert.encoder.layer.``, ``distilbert.transformer.layer.``, ``model.layers.``.
    """
    indices: dict[str, set[int]] = {}
    for key in module.state_dict():
        match = re.match(r"(.*?\.layers?\.)(\d+)\.", key)
        if match:
            indices.setdefault(match[1], set()).add(int(match[2]))
    all_layers = set(range(depth))
    stacks = [stack for stack, layers in indices.items() if layers == all_layers]
    return stacks[0] if len(stacks) == 1 else None


def layers_of(module: transformers.PreTrainedModel) -> list[torch.nn.Module]:
    """Return the layers of a model in their order; a single one if they share their weights."""
    stack = layer_stack(module, module.config.num_hidden_layers)
    if stack is None:
        return [module.get_submodule("albert.encoder.albert_layer_groups.0.albert_layers.0")]
    return list(module.get_submodule(stack.rstrip(".")).children())


def pruned_heads(config: transformers.PretrainedConfig) -> dict[int, list[int]]:
    """Return the heads that are cut out, by the number of their layer."""
    heads: dict[Any, list[int]] = getattr(config, "pruned_heads", None) or {}
    return {int(layer): sorted(cut) for layer, cut in heads.items()}


def cut_heads(module: transformers.PreTrainedModel, heads: Mapping[int, Collection[int]]) -> None:
    """Cut attention heads out of a whole model, in place, and write it down in its configuration.

    Args:
        module: a model of a family whose heads can be cut, with all its heads.
        heads: for some layers the heads to cut, counted from 0.
    """
    config = module.config
    names = LAYER_PARTS[config.model_type]
    count = config.num_attention_heads
    size = config.hidden_size // count
    for index, cut in heads.items():
        layer = layers_of(module)[index]
        attention: Any = layer.get_submodule(names.attention)
        kept = [head for head in range(count) if head not in cut]
        rows = [head * size + row for head in kept for row in range(size)]
        units = torch.LongTensor(rows)
        for name in names.heads_in:
            part = attention.get_submodule(name)
            attention.set_submodule(name, prune_linear_layer(part, units, dim=0))
        out: Any = layer.get_submodule(str(names.heads_out))
        layer.set_submodule(str(names.heads_out), prune_linear_layer(out, units, dim=1))
        # Version 4 splits the states by these numbers, and version 5 by the size of a head.
        for name in ("num_attention_heads", "n_heads"):
            if hasattr(attention, name):
                setattr(attention, name, len(kept))
        for name in ("all_head_size", "dim"):
            if hasattr(attention, name):
                setattr(attention, name, len(rows))
    config.pruned_heads = {index: sorted(cut) for index, cut in heads.items()}


def classifier_class(
    config: transformers.PretrainedConfig,
) -> type[transformers.PreTrainedModel]:
    """Return the class of the classifiers of a configuration, which lack its ``pruned_heads``."""
    classes: Any = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    plain: type[transformers.PreTrainedModel] = classes[type(config)]
    if CUTS_PRUNED_HEADS or not pruned_heads(config):
        return plain

    def make(self: Any, config: transformers.PretrainedConfig, *args: Any, **settings: Any) -> None:
        cast("Any", plain).__init__(self, config, *args, **settings)
        cut_heads(self, pruned_heads(config))

    narrow: type[transformers.PreTrainedModel] = type(
        plain.__name__, (plain,), {"__init__": make, "__module__": plain.__module__}
    )
    return narrow


def last_linear(module: torch.nn.Module) -> torch.nn.Linear:
    """Return the last linear layer of a classifier, which computes the logits.

    It is outside of the encoder, which some families of transformers 5 hold behind their head.
    """
    encoder = set(cast("Any", module).base_model.modules())
    linear = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    return [layer for layer in linear if layer not in encoder][-1]


def give_two_outputs(module: transformers.PreTrainedModel, sigmoid_of: int) -> None:
    """Give a head of one output a second output that is always 0, in place.

    The old output becomes the one of the label ``sigmoid_of``. The softmax of (0, z) is the sigmoid
    of z.
    """
    head = last_linear(module)
    for name, value in list(head.named_parameters()):
        widened = value.new_zeros((2, *value.shape[1:]))
        widened[sigmoid_of] = value.data[0]
        setattr(head, name, torch.nn.Parameter(widened))
    head.out_features = 2
    setattr(module, "num_labels", 2)  # noqa: B010  (torch types module attributes as tensors)
