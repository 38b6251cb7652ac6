"""The insides of teacher and student, read in the forward pass and compared layer by layer."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ad2kit import losses
from ad2kit.errors import ModelError
from ad2kit.runtime import quiet_transformers

if TYPE_CHECKING:
    from ad2kit.models import TextModel
    from ad2kit.sections import IntermediateRecipe

# What the projection to values is called: BERT and its like, DistilBERT, MPNet, DeBERTa.
_VALUE_NAMES = ("value", "v_lin", "v", "value_proj")
# ModernBERT has one projection to queries, keys and values side by side.
_FUSED_NAME = "Wqkv"


@dataclass(frozen=True)
class Insides:
    """What one forward pass left: states of embeddings and layers, attentions, last values."""

    hidden_states: tuple[torch.Tensor, ...]
    attentions: tuple[torch.Tensor, ...]
    values: torch.Tensor | None


@dataclass(frozen=True)
class Comparison:
    """The intermediate terms of one distillation.

    Args:
        teacher: in evaluation mode, on the device.
        layers: for each layer of the student, the zero-based layer of the teacher it imitates.
        weights: of the terms.
    """

    teacher: TextModel
    layers: tuple[int, ...]
    weights: IntermediateRecipe

    def read(
        self, model: TextModel, inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, Insides]:
        """Run a forward pass; return the logits and those insides that a term needs."""
        weights, values = self.weights, list[torch.Tensor]()
        with ExitStack() as stack:
            # A family that cannot be told which kernel to use falls back, ALBERT in so many words
            # for every layer.
            stack.enter_context(quiet_transformers())
            if weights.value_relations:
                projection, fused = _value_projection(model)

                def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
                    values.append(output.chunk(3, dim=-1)[2] if fused else output)

                stack.callback(projection.register_forward_hook(keep).remove)
            output = model.module(
                **inputs,
                output_hidden_states=bool(weights.pkd or weights.hidden_states),
                output_attentions=bool(weights.attentions),
            )
        return output.logits, Insides(
            output.hidden_states or (), output.attentions or (), values[-1] if values else None
        )

    def terms(
        self, student: Insides, teacher: Insides, mask: torch.Tensor
    ) -> dict[str, tuple[float, torch.Tensor]]:
        """Return weight and value of each term that has a weight."""
        weights = self.weights
        states = [
            teacher.hidden_states[layer + 1] for layer in self.layers if teacher.hidden_states
        ]
        found = {}
        if weights.pkd:
            found["pkd"] = losses.pkd(student.hidden_states[1:-1], states[:-1], mask)
        if weights.hidden_states:
            found["hidden_states"] = losses.hidden_states(
                student.hidden_states, [teacher.hidden_states[0], *states], mask
            )
        if weights.attentions:
            chosen = [teacher.attentions[layer] for layer in self.layers]
            found["attentions"] = losses.attentions(student.attentions, chosen, mask)
        if student.values is not None and teacher.values is not None:
            heads = self.teacher.module.config.num_attention_heads
            found["value_relations"] = losses.value_relations(
                student.values, teacher.values, mask, heads
            )
        return {name: (getattr(weights, name), value) for name, value in found.items()}


def check_terms(teacher: TextModel, student: TextModel, weights: IntermediateRecipe) -> None:
    """Refuse a term that a pair cannot have: other token ids, widths or heads.

    Args:
        teacher: the model to imitate.
        student: the model to train.
        weights: of the terms.

    Raises:
        ModelError: names the term.
    """
    if not weights.any:
        return
    ours, theirs = student.module.config, teacher.module.config
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise ModelError(
            "distill.intermediate compares token by token, but the student has a tokenizer of its "
            "own",
            hint="set these weights to 0, or make the student from a model with the teacher's "
            "vocabulary",
        )

    def same(term: str, name: str) -> None:
        if getattr(weights, term) and getattr(ours, name) != getattr(theirs, name):
            raise ModelError(
                f"distill.intermediate.{term} compares equal {name}: the teacher has "
                f"{getattr(theirs, name)}, the student {getattr(ours, name)}",
                hint=f"set distill.intermediate.{term}=0; value_relations lets widths differ",
            )

    same("pkd", "hidden_size")
    same("hidden_states", "hidden_size")
    same("attentions", "num_attention_heads")
    if weights.pkd and ours.num_hidden_layers < 2:
        raise ModelError(
            "distill.intermediate.pkd compares the layers below the last, and the student has none",
            hint="set distill.intermediate.pkd=0, or give the student more layers",
        )
    if weights.value_relations and ours.hidden_size % theirs.num_attention_heads:
        raise ModelError(
            f"distill.intermediate.value_relations divides the width by the teacher's "
            f"{theirs.num_attention_heads} heads, but the student's width is {ours.hidden_size}",
            hint="choose a student of a width that they divide, or set the weight to 0",
        )
    if weights.value_relations:
        _value_projection(teacher)
        _value_projection(student)


def comparison(
    teacher: TextModel, student: TextModel, weights: IntermediateRecipe
) -> Comparison | None:
    """Return the comparison that the weights ask for, or None if they ask for none.

    The student's layers imitate evenly spaced layers of the teacher, the last one its last,
    whichever they were copied from: that is where they start, and this is where they shall go.

    Args:
        teacher: the model to imitate.
        student: the model to train.
        weights: of the terms.

    Raises:
        ModelError: see :func:`check_terms`.
    """
    if not weights.any:
        return None
    check_terms(teacher, student, weights)
    if weights.attentions:
        for model in (teacher, student):
            # The faster kernels never form the distributions; families that cannot be told fall
            # back by themselves, and say so at length.
            with quiet_transformers():
                model.module.set_attn_implementation("eager")
    depth, most = (model.module.config.num_hidden_layers for model in (student, teacher))
    layers = ((j + 1) * most // depth - 1 for j in range(depth))
    return Comparison(teacher, tuple(layers), weights)


def _value_projection(model: TextModel) -> tuple[torch.nn.Module, bool]:
    """Return the last layer's projection to values, and whether queries and keys are in it."""
    found = [
        (module, name.endswith(_FUSED_NAME))
        for name, module in model.module.named_modules()
        if name.rpartition(".")[2] in (*_VALUE_NAMES, _FUSED_NAME)
        and isinstance(module, torch.nn.Linear)
    ]
    if not found:
        raise ModelError(
            f"a '{model.module.config.model_type}' has no projection to values that we know",
            hint="set distill.intermediate.value_relations=0",
        )
    return found[-1]
