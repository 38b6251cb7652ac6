"""Students: made from some layers of a model, whatever its family calls them."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING

from ad2kit.errors import ModelError
from ad2kit.models import TextModel
from ad2kit.runtime import seeded

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    import transformers


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
