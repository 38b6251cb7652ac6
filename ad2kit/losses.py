"""Loss terms, each a pure function of logits. All return the mean over the batch, in nats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

if TYPE_CHECKING:
    import torch


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy with hard labels.

    Args:
        logits: shape [batch, classes].
        labels: int64 class ids, shape [batch].
    """
    return functional.cross_entropy(logits.float(), labels)


def soft_target_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
) -> torch.Tensor:
    """``t² · KL(softmax(teacher / t) ‖ softmax(student / t))``, averaged over the batch.

    The factor t² keeps the size of the gradient when the temperature changes (Hinton, Vinyals
    and Dean, *Distilling the Knowledge in a Neural Network*, 2015, section 2). In AD2 it is both
    the clean and the adversarial term (Zhang, Uma Naresh and He, AAAI 2022).

    Args:
        student_logits: shape [batch, classes].
        teacher_logits: shape [batch, classes].
        temperature: t > 0.
    """
    teacher = functional.log_softmax(teacher_logits.float() / temperature, dim=-1)
    student = functional.log_softmax(student_logits.float() / temperature, dim=-1)
    kl = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return temperature**2 * kl
