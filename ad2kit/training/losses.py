"""Loss terms: of the answers, and of the insides of teacher and student, layer by layer.

Those of the answers are pure functions of tensors. All return the mean over the rows of the batch.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from ad2kit.data.labels import NO_CLASS
from ad2kit.run.errors import ModelError
from ad2kit.run.machine import quiet_transformers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from numpy.typing import NDArray

    from ad2kit.models.text_model import TextModel
    from ad2kit.run.sections import IntermediateRecipe, Task


def balanced_weights(task: Task, labels: NDArray[Any], outputs: int) -> torch.Tensor:
    """Return the weights with which all classes count alike, whatever their rows.

    Of n rows and k classes that occur, a row of class c with n_c rows gets ``n / (k n_c)``
    (King and Zeng, *Logistic Regression in Rare Events Data*, 2001; scikit-learn's "balanced"). Of
    several labels each is a choice between two classes: rows that have label j get
    ``n / (2 n_j)``, those without it ``n / (2 (n - n_j))``. The mean weight of the rows is 1.

    Args:
        task: not a regression.
        labels: of all rows that train and have labels.
        outputs: number of classes or labels.

    Returns:
        float32 [classes]; for several labels [2, labels], without and with the label. What has no
        row, or every one, has the weight 1.
    """
    if task == "single_label":
        rows = np.bincount(labels, minlength=outputs)
        found = np.where(rows > 0, len(labels) / ((rows > 0).sum() * np.maximum(rows, 1)), 1.0)
    else:
        have = labels.sum(axis=0)
        both = np.stack([len(labels) - have, have])
        found = np.where(both.min(axis=0) > 0, len(labels) / (2 * np.maximum(both, 1)), 1.0)
    return torch.from_numpy(found).float()


def supervised(
    task: Task, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The task's own loss: cross entropy, binary cross entropy (mean over labels), or MSE.

    A row without a label adds 0 and still counts, so that the terms of a batch keep their
    proportions however it is divided. Weights do not change by what the sum is divided.

    Args:
        task: decides the form.
        logits: shape [batch, outputs].
        labels: as :func:`ad2kit.data.labels.read_labels` returns them; without a label
            :data:`~ad2kit.data.labels.NO_CLASS` or NaN.
        weights: see :func:`balanced_weights`; all alike if None.
    """
    logits = logits.float()
    weights = None if weights is None else weights.to(logits.device)
    if task == "single_label":
        total = functional.cross_entropy(
            logits, labels, weights, ignore_index=NO_CLASS, reduction="sum"
        )
        return total / len(labels)
    labelled = ~torch.isnan(labels)
    target = torch.where(labelled, labels, torch.zeros_like(labels))
    if task == "multi_label":
        each = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        if weights is not None:
            each = each * torch.where(target == 1, weights[1], weights[0])
    else:
        each = (logits[:, 0] - target) ** 2
    return (each * labelled).mean()


def soft_targets(
    task: Task, student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
) -> torch.Tensor:
    """How far the student is from its teacher's answers; both terms of AD2 are this.

    KL between classes, KL between the Bernoulli distributions of each label (mean over labels), or,
    for a regression, where there is no distribution, the squared error.
    """
    if task == "single_label":
        return soft_target_kl(student_logits, teacher_logits, temperature)
    if task == "multi_label":
        # A label is a choice between its logit and 0.
        student, teacher = (
            torch.stack([logits, torch.zeros_like(logits)], dim=-1).flatten(0, 1)
            for logits in (student_logits, teacher_logits)
        )
        return soft_target_kl(student, teacher, temperature)
    return functional.mse_loss(student_logits.float(), teacher_logits.float())


def soft_target_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
) -> torch.Tensor:
    """``t² · KL(softmax(teacher / t) ‖ softmax(student / t))`` in nats.

    The factor t² keeps the size of the gradient when the temperature changes (Hinton, Vinyals
    and Dean, *Distilling the Knowledge in a Neural Network*, 2015, section 2).

    Args:
        student_logits: shape [batch, classes].
        teacher_logits: shape [batch, classes].
        temperature: t > 0.
    """
    teacher = functional.log_softmax(teacher_logits.float() / temperature, dim=-1)
    student = functional.log_softmax(student_logits.float() / temperature, dim=-1)
    kl = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return temperature**2 * kl


def pkd(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], mask: torch.Tensor
) -> torch.Tensor:
    """``Σ over layers ‖s / ‖s‖ - t / ‖t‖‖²`` of the first real token, the [CLS] of its family.

    Sun, Cheng, Gan and Liu, *Patient Knowledge Distillation for BERT Model Compression*,
    EMNLP 2019, equation 7.

    Args:
        student: hidden states of its layers below the last, each [batch, tokens, width].
        teacher: those of the layers that they imitate; same widths.
        mask: 1 for real tokens, shape [batch, tokens].
    """
    first = mask.argmax(dim=1)
    rows = torch.arange(len(mask), device=mask.device)
    total = mask.new_zeros((), dtype=torch.float32)
    for ours, theirs in zip(student, teacher, strict=True):
        s, t = (functional.normalize(h[rows, first].float(), dim=-1) for h in (ours, theirs))
        total = total + ((s - t) ** 2).sum(dim=-1).mean()
    return total


def hidden_states(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], mask: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of the states of all real tokens, averaged over the layers.

    Jiao et al., *TinyBERT: Distilling BERT for Natural Language Understanding*, Findings of EMNLP
    2020, equations 8 and 9, without the projection: widths are equal.

    Args:
        student: states of the embeddings and of each layer, [batch, tokens, width] each.
        teacher: those that they imitate.
        mask: 1 for real tokens, shape [batch, tokens].
    """
    terms = [
        _row_mean(((ours.float() - theirs.float()) ** 2).mean(dim=-1), mask)
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(terms).mean()


def attentions(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], mask: torch.Tensor
) -> torch.Tensor:
    """KL between the attention distributions of each real token, averaged over heads and layers.

    TinyBERT (equation 7) fits the scores before the softmax. transformers returns the
    distributions after it, so this is the form that MobileBERT (Sun et al., ACL 2020, equation 6)
    gave to the same idea.

    Args:
        student: attention of each layer, [batch, heads, tokens, tokens], rows sum to 1.
        teacher: of the layers that they imitate; as many heads.
        mask: 1 for real tokens, shape [batch, tokens].
    """
    terms = [
        _row_mean(_kl_of_rows(ours, theirs).mean(dim=1), mask)
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(terms).mean()


def value_relations(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, heads: int
) -> torch.Tensor:
    """KL between the value-value relations ``softmax(V Vᵀ / √d)`` of real tokens.

    Wang, Bao, Huang, Dong and Wei, *MiniLMv2: Multi-Head Self-Attention Relation Distillation for
    Compressing Pretrained Transformers*, Findings of ACL 2021, equations 2 to 5, for the values.

    Args:
        student: values of one layer, [batch, tokens, width].
        teacher: the same; its width may differ.
        mask: 1 for real tokens, shape [batch, tokens].
        heads: relation heads; divides both widths.
    """
    padding = (mask == 0)[:, None, None, :]

    def relations(values: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = values.shape
        split = values.float().view(batch, tokens, heads, width // heads).transpose(1, 2)
        products = split @ split.transpose(-1, -2) / (width // heads) ** 0.5
        masked: torch.Tensor = products.masked_fill(padding, torch.finfo(products.dtype).min)
        return masked.softmax(dim=-1)

    return _row_mean(_kl_of_rows(relations(student), relations(teacher)).mean(dim=1), mask)


def _kl_of_rows(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ student) over the last axis; what the teacher gives 0 adds 0."""
    tiny = torch.finfo(torch.float32).tiny
    logs = teacher.float().clamp_min(tiny).log() - student.float().clamp_min(tiny).log()
    total: torch.Tensor = (teacher.float() * logs).sum(dim=-1)
    return total


def _row_mean(per_token: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Average [batch, tokens] over the real tokens of each row, then over the rows."""
    return ((per_token * mask).sum(dim=1) / mask.sum(dim=1)).mean()


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
            found["pkd"] = pkd(student.hidden_states[1:-1], states[:-1], mask)
        if weights.hidden_states:
            found["hidden_states"] = hidden_states(
                student.hidden_states, [teacher.hidden_states[0], *states], mask
            )
        if weights.attentions:
            chosen = [teacher.attentions[layer] for layer in self.layers]
            found["attentions"] = attentions(student.attentions, chosen, mask)
        if student.values is not None and teacher.values is not None:
            heads = self.teacher.module.config.num_attention_heads
            found["value_relations"] = value_relations(student.values, teacher.values, mask, heads)
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
