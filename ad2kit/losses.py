"""Loss terms, each a pure function of tensors. All return the mean over the rows of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from ad2kit.labels import NO_CLASS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from numpy.typing import NDArray

    from ad2kit.sections import Task


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
        labels: as :func:`ad2kit.labels.read_labels` returns them; without a label
            :data:`~ad2kit.labels.NO_CLASS` or NaN.
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
