"""Loss terms: on the logits, and on intermediate states of teacher and student, layer by layer.

The terms are pure functions of tensors. All return the mean over the rows of the batch. If long
texts are read in windows, a row of the terms that imitate the teacher is a window, and ``weights``,
which add up to 1, are those of the windows in the mean.
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

    from numpy.typing import NDArray

    from ad2kit.models.text_model import TextModel
    from ad2kit.run.sections import IntermediateRecipe, Task


# The names of the projection to values: BERT and its like, DistilBERT, MPNet, DeBERTa.
_VALUE_NAMES = ("value", "v_lin", "v", "value_proj")
# ModernBERT has one projection to queries, keys and values side by side.
_FUSED_NAME = "Wqkv"


def balanced_weights(task: Task, labels: NDArray[Any], outputs: int) -> torch.Tensor:
    """Return the weights that make all classes count alike, whatever their number of rows.

    With n rows and k classes that occur, a row of class c with n_c rows gets ``n / (k n_c)``
    (King and Zeng, *Logistic Regression in Rare Events Data*, 2001; scikit-learn's "balanced").
    With several labels each label is a choice between two classes: rows with label j get
    ``n / (2 n_j)``, rows without it ``n / (2 (n - n_j))``. The mean weight of the rows is 1.

    Args:
        task: not a regression.
        labels: labels of all training rows that have labels.
        outputs: number of classes or labels.

    Returns:
        float32 [classes]; for several labels [2, labels], without and with the label. A class
        without rows, and a label that no row or every row has, gets the weight 1.
    """
    rows = len(labels)
    if task == "single_label":
        class_rows = np.bincount(labels, minlength=outputs)
        classes = (class_rows > 0).sum()
        weights = np.where(class_rows > 0, rows / (classes * np.maximum(class_rows, 1)), 1.0)
    else:
        present = labels.sum(axis=0)
        class_rows = np.stack([rows - present, present])
        varies = class_rows.min(axis=0) > 0
        weights = np.where(varies, rows / (2 * np.maximum(class_rows, 1)), 1.0)
    return torch.from_numpy(weights).float()


def supervised(
    task: Task, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the task's own loss: cross entropy, binary cross entropy (mean over labels), or MSE.

    A row without a label adds 0 to the sum but counts in the mean, so that the terms keep their
    proportions if a batch is divided into parts. The weights do not change the divisor.

    Args:
        task: decides between the losses.
        logits: shape [batch, outputs].
        labels: as :class:`ad2kit.data.labels.LabelReader` reads them;
            :data:`~ad2kit.data.labels.NO_CLASS` or NaN for a row without a label.
        weights: see :func:`balanced_weights`; None for equal weights.
    """
    logits = logits.float()
    weights = None if weights is None else weights.to(logits.device)
    if task == "single_label":
        total = functional.cross_entropy(
            logits, labels, weights, ignore_index=NO_CLASS, reduction="sum"
        )
        return total / len(labels)
    labelled = ~torch.isnan(labels)
    targets = torch.where(labelled, labels, torch.zeros_like(labels))
    if task == "multi_label":
        losses = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        if weights is not None:
            losses = losses * torch.where(targets == 1, weights[1], weights[0])
    else:
        losses = (logits[:, 0] - targets) ** 2
    return (losses * labelled).mean()


def soft_targets(
    task: Task,
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the distance of the student's logits from the teacher's; both terms of AD2 use it.

    This is the KL divergence over the classes, or over the Bernoulli distribution of each label
    (mean over labels), or, for a regression, which has no distribution, the mean squared error.

    Args:
        task: decides between the distances.
        student_logits: shape [batch, outputs].
        teacher_logits: shape [batch, outputs].
        temperature: t > 0; a regression ignores it.
        weights: weights of the rows, which add up to 1; None for equal weights.
    """
    if task == "single_label":
        return soft_target_kl(student_logits, teacher_logits, temperature, weights)
    if task == "multi_label":
        # The probability of a label is the softmax of its logit and 0.
        student_pairs, teacher_pairs = (
            torch.stack([logits, torch.zeros_like(logits)], dim=-1).flatten(0, 1)
            for logits in (student_logits, teacher_logits)
        )
        if weights is not None:
            labels = student_logits.shape[1]
            weights = weights.repeat_interleave(labels) / labels
        return soft_target_kl(student_pairs, teacher_pairs, temperature, weights)
    if weights is None:
        return functional.mse_loss(student_logits.float(), teacher_logits.float())
    squared_error = (student_logits.float() - teacher_logits.float()) ** 2
    return _mean(squared_error.mean(dim=-1), weights)


def soft_target_kl(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``t² · KL(softmax(teacher / t) ‖ softmax(student / t))`` in nats, mean over the batch.

    The factor t² keeps the size of the gradient if the temperature changes (Hinton, Vinyals
    and Dean, *Distilling the Knowledge in a Neural Network*, 2015, section 2).

    Args:
        student_logits: shape [batch, classes].
        teacher_logits: shape [batch, classes].
        temperature: t > 0.
        weights: as in :func:`soft_targets`.
    """
    teacher = functional.log_softmax(teacher_logits.float() / temperature, dim=-1)
    student = functional.log_softmax(student_logits.float() / temperature, dim=-1)
    if weights is None:
        kl = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    else:
        each = functional.kl_div(student, teacher, reduction="none", log_target=True)
        kl = _mean(each.sum(dim=-1), weights)
    return temperature**2 * kl


def _mean(rows: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of a value for each row; None means equal weights."""
    return rows.mean() if weights is None else (rows * weights).sum()


def pkd(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    mask: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``Σ over layers ‖s / ‖s‖ - t / ‖t‖‖²`` of the first real token, such as [CLS].

    Sun, Cheng, Gan and Liu, *Patient Knowledge Distillation for BERT Model Compression*,
    EMNLP 2019, equation 7.

    Args:
        student: hidden states of the student's layers below the last, [batch, tokens, width] each.
        teacher: hidden states of the teacher's layers that they imitate; same widths.
        mask: 1 for real tokens, shape [batch, tokens].
        weights: as in :func:`soft_targets`.
    """
    first_token = mask.argmax(dim=1)
    rows = torch.arange(len(mask), device=mask.device)
    total = mask.new_zeros((), dtype=torch.float32)
    for student_states, teacher_states in zip(student, teacher, strict=True):
        student_cls = functional.normalize(student_states[rows, first_token].float(), dim=-1)
        teacher_cls = functional.normalize(teacher_states[rows, first_token].float(), dim=-1)
        total = total + _mean(((student_cls - teacher_cls) ** 2).sum(dim=-1), weights)
    return total


def hidden_states(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    mask: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the mean squared error of the states of all real tokens, averaged over the layers.

    Jiao et al., *TinyBERT: Distilling BERT for Natural Language Understanding*, Findings of EMNLP
    2020, equations 8 and 9, without the projection, because the widths are equal.

    Args:
        student: states of the embeddings and of each layer, [batch, tokens, width] each.
        teacher: the teacher's states that they imitate; same shapes.
        mask: 1 for real tokens, shape [batch, tokens].
        weights: as in :func:`soft_targets`.
    """
    layer_losses = []
    for student_states, teacher_states in zip(student, teacher, strict=True):
        squared_error = (student_states.float() - teacher_states.float()) ** 2
        layer_losses.append(_row_mean(squared_error.mean(dim=-1), mask, weights))
    return torch.stack(layer_losses).mean()


def attentions(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    mask: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the KL of the attention distributions of each real token, mean over heads and layers.

    TinyBERT (equation 7) fits the scores before the softmax. transformers returns the distributions
    after the softmax, so this is the form of MobileBERT (Sun et al., ACL 2020, equation 6).

    Args:
        student: attention of each layer, [batch, heads, tokens, tokens]; rows sum to 1.
        teacher: attention of the teacher's layers that they imitate; as many heads.
        mask: 1 for real tokens, shape [batch, tokens].
        weights: as in :func:`soft_targets`.
    """
    layer_losses = [
        _row_mean(_kl_of_rows(student_attention, teacher_attention).mean(dim=1), mask, weights)
        for student_attention, teacher_attention in zip(student, teacher, strict=True)
    ]
    return torch.stack(layer_losses).mean()


def value_relations(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor,
    heads: int,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the KL of the value-value relations ``softmax(V Vᵀ / √d)`` of real tokens.

    Wang, Bao, Huang, Dong and Wei, *MiniLMv2: Multi-Head Self-Attention Relation Distillation for
    Compressing Pretrained Transformers*, Findings of ACL 2021, equations 2 to 5, for the values.

    Args:
        student: values of one layer of the student, [batch, tokens, width].
        teacher: values of one layer of the teacher, likewise; the width may differ.
        mask: 1 for real tokens, shape [batch, tokens].
        heads: number of relation heads; divides both widths.
        weights: as in :func:`soft_targets`.
    """
    padding = (mask == 0)[:, None, None, :]

    def relations(values: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = values.shape
        split = values.float().view(batch, tokens, heads, width // heads).transpose(1, 2)
        products = split @ split.transpose(-1, -2) / (width // heads) ** 0.5
        masked: torch.Tensor = products.masked_fill(padding, torch.finfo(products.dtype).min)
        return masked.softmax(dim=-1)

    kl = _kl_of_rows(relations(student), relations(teacher)).mean(dim=1)
    return _row_mean(kl, mask, weights)


def _kl_of_rows(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher ‖ student) over the last axis; a teacher's probability of 0 adds 0."""
    tiny = torch.finfo(torch.float32).tiny
    log_ratio = teacher.float().clamp_min(tiny).log() - student.float().clamp_min(tiny).log()
    kl: torch.Tensor = (teacher.float() * log_ratio).sum(dim=-1)
    return kl


def _row_mean(
    per_token: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """Return the mean of [batch, tokens] over the real tokens of each row, then over the rows."""
    return _mean((per_token * mask).sum(dim=1) / mask.sum(dim=1), weights)


@dataclass(frozen=True)
class Insides:
    """Intermediate states of one forward pass: hidden states, attentions, values of the last layer.

    ``hidden_states`` starts with the embeddings. A field that no term needs is empty or None.
    """

    hidden_states: tuple[torch.Tensor, ...]
    attentions: tuple[torch.Tensor, ...]
    values: torch.Tensor | None


@dataclass(frozen=True)
class Comparison:
    """The intermediate terms of one distillation.

    Args:
        teacher: the teacher, in evaluation mode, on the device.
        layers: for each layer of the student the zero-based layer of the teacher that it imitates.
        weights: weights of the terms.
    """

    teacher: TextModel
    layers: tuple[int, ...]
    weights: IntermediateRecipe

    def read(
        self, model: TextModel, inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, Insides]:
        """Run a forward pass; return the logits, and the intermediate states that a term needs."""
        weights = self.weights
        values: list[torch.Tensor] = []
        with ExitStack() as stack:
            # A family whose kernel cannot be set falls back by itself; ALBERT then warns for every
            # layer.
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
        insides = Insides(
            hidden_states=output.hidden_states or (),
            attentions=output.attentions or (),
            values=values[-1] if values else None,
        )
        return output.logits, insides

    def terms(
        self,
        student: Insides,
        teacher: Insides,
        mask: torch.Tensor,
        row_weights: torch.Tensor | None = None,
    ) -> dict[str, tuple[float, torch.Tensor]]:
        """Return weight and value of each term whose weight is not 0.

        ``row_weights`` are the ``weights`` of :func:`soft_targets`.
        """
        weights = self.weights
        teacher_states = [
            teacher.hidden_states[layer + 1] for layer in self.layers if teacher.hidden_states
        ]
        terms = {}
        if weights.pkd:
            terms["pkd"] = pkd(student.hidden_states[1:-1], teacher_states[:-1], mask, row_weights)
        if weights.hidden_states:
            terms["hidden_states"] = hidden_states(
                student.hidden_states,
                [teacher.hidden_states[0], *teacher_states],
                mask,
                row_weights,
            )
        if weights.attentions:
            teacher_attentions = [teacher.attentions[layer] for layer in self.layers]
            terms["attentions"] = attentions(
                student.attentions, teacher_attentions, mask, row_weights
            )
        if student.values is not None and teacher.values is not None:
            heads = self.teacher.module.config.num_attention_heads
            terms["value_relations"] = value_relations(
                student.values, teacher.values, mask, heads, row_weights
            )
        return {name: (getattr(weights, name), value) for name, value in terms.items()}


def check_terms(teacher: TextModel, student: TextModel, weights: IntermediateRecipe) -> None:
    """Refuse a term that teacher and student cannot have: other token ids, widths or heads.

    Args:
        teacher: the model to imitate.
        student: the model to train.
        weights: weights of the terms.

    Raises:
        ModelError: a term does not fit; the message names it.
    """
    if not weights.any:
        return
    student_config = student.module.config
    teacher_config = teacher.module.config
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise ModelError(
            "distill.intermediate compares token by token, but the student has a tokenizer of its "
            "own",
            hint="set these weights to 0, or make the student from a model with the teacher's "
            "vocabulary",
        )

    def check_equal(term: str, name: str) -> None:
        if not getattr(weights, term):
            return
        teacher_size = getattr(teacher_config, name)
        student_size = getattr(student_config, name)
        if student_size != teacher_size:
            raise ModelError(
                f"distill.intermediate.{term} compares equal {name}: the teacher has "
                f"{teacher_size}, the student {student_size}",
                hint=f"set distill.intermediate.{term}=0; value_relations lets widths differ",
            )

    check_equal("pkd", "hidden_size")
    check_equal("hidden_states", "hidden_size")
    check_equal("attentions", "num_attention_heads")
    if weights.pkd and student_config.num_hidden_layers < 2:
        raise ModelError(
            "distill.intermediate.pkd compares the layers below the last, and the student has none",
            hint="set distill.intermediate.pkd=0, or give the student more layers",
        )
    if weights.value_relations:
        heads = teacher_config.num_attention_heads
        if student_config.hidden_size % heads:
            raise ModelError(
                f"distill.intermediate.value_relations divides the width by the teacher's "
                f"{heads} heads, but the student's width is {student_config.hidden_size}",
                hint="choose a student of a width that they divide, or set the weight to 0",
            )
        _value_projection(teacher)
        _value_projection(student)


def comparison(
    teacher: TextModel, student: TextModel, weights: IntermediateRecipe
) -> Comparison | None:
    """Return the comparison for the terms with a weight, or None if no term has one.

    The student's layers imitate evenly spaced layers of the teacher, and the last layer the
    teacher's last. The layers that they were copied from make no difference: a copy is only the
    start of a layer, and the imitated layer is its target.

    Args:
        teacher: the model to imitate.
        student: the model to train.
        weights: weights of the terms.

    Raises:
        ModelError: see :func:`check_terms`.
    """
    if not weights.any:
        return None
    check_terms(teacher, student, weights)
    if weights.attentions:
        for model in (teacher, student):
            # The faster kernels never compute the distributions. Families whose kernel cannot be
            # set fall back by themselves, with many warnings.
            with quiet_transformers():
                model.module.set_attn_implementation("eager")
    student_depth = student.module.config.num_hidden_layers
    teacher_depth = teacher.module.config.num_hidden_layers
    layers = ((index + 1) * teacher_depth // student_depth - 1 for index in range(student_depth))
    return Comparison(teacher, tuple(layers), weights)


def _value_projection(model: TextModel) -> tuple[torch.nn.Module, bool]:
    """Return the last layer's projection to values, and whether it also projects to keys.

    A fused projection computes queries, keys and values side by side.
    """
    projections = [
        (module, name.endswith(_FUSED_NAME))
        for name, module in model.module.named_modules()
        if name.rpartition(".")[2] in (*_VALUE_NAMES, _FUSED_NAME)
        and isinstance(module, torch.nn.Linear)
    ]
    if not projections:
        raise ModelError(
            f"a '{model.module.config.model_type}' has no projection to values that we know",
            hint="set distill.intermediate.value_relations=0",
        )
    return projections[-1]
