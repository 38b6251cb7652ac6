"""What a training minimises: fine-tuning, distillation, and AD2.

    L(θ) = w_kd·D(x) + α·D(x + δ*) + w_hard·S(x) + Σ w·intermediate terms

D is the distance between the student's and the teacher's answers (t²·KL; MSE for a regression),
S the task's own loss with hard labels. With w_kd = 1 and the last two left out this is AD2, after
Zhang, Uma Naresh and He, AAAI 2022 (see :mod:`ad2kit.adversary` for δ*, and for what is our
reading); with α = 0 it is plain distillation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ad2kit import adversary as adv
from ad2kit.losses import soft_targets, supervised
from ad2kit.models import TextModel

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ad2kit.intermediate import Comparison
    from ad2kit.sections import DistillRecipe


@dataclass(frozen=True)
class Batch:
    """Padded tensors of some rows, their labels, and the teacher's logits if it has any."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    teacher_logits: torch.Tensor | None


@dataclass
class StepLosses:
    """What one (micro-)batch contributed: the loss, its terms, and the inner problem."""

    loss: float
    terms: dict[str, float]
    inner: dict[str, float] = field(default_factory=dict)


Objective = Callable[[TextModel, Batch, float], StepLosses]
"""Runs the forward and backward passes of a (micro-)batch and leaves gradients on the parameters,
scaled by the batch's share of the rows of its update."""


def finetuning(accelerator: Accelerator, weights: torch.Tensor | None = None) -> Objective:
    """Return the objective of plain fine-tuning: the task's own loss.

    Args:
        accelerator: precision and backward pass.
        weights: of the classes; see :func:`ad2kit.losses.balanced_weights`.
    """

    def step(model: TextModel, batch: Batch, share: float) -> StepLosses:
        with accelerator.autocast():
            logits = model.module(**batch.inputs).logits
            loss = supervised(model.task, logits, batch.labels, weights)
        accelerator.backward(loss * share)
        return StepLosses(loss.item(), {"supervised": loss.item()})

    return step


def distillation(
    accelerator: Accelerator, settings: DistillRecipe, insides: Comparison | None = None,
    weights: torch.Tensor | None = None,
) -> Objective:  # fmt: skip
    """Return the objective of a distillation; a term of weight 0 costs nothing.

    ``weights`` of the classes are those of the hard labels; see :func:`finetuning`.

    With an adversary the clean pass runs with a zero δ that records its gradient, so that the
    first ascent step from a zero start needs no pass of its own. The adversarial passes replay
    the dropout masks of the clean one: the adversary attacks the network that was seen, and
    ``adversarial_gain`` measures δ and not two draws of dropout.
    """

    def step(model: TextModel, batch: Batch, share: float) -> StepLosses:
        assert batch.teacher_logits is not None  # noqa: S101  (a caller's defect, not an input)
        teacher_logits, mask = batch.teacher_logits, batch.inputs["attention_mask"]
        attack, width = settings.adversary, model.word_embeddings.embedding_dim
        dropout = _rng_state(mask.device)

        delta = adv.no_perturbation(mask, width) if settings.alpha else None
        with adv.perturbed(model.word_embeddings, delta), accelerator.autocast():
            if insides is None:
                logits, inner = model.module(**batch.inputs).logits, None
            else:
                logits, inner = insides.read(model, batch.inputs)
        kd = soft_targets(model.task, logits, teacher_logits, settings.temperature)
        weighted = {"kd": (settings.kd_weight, kd)}
        if settings.hard_label_weight:
            hard = supervised(model.task, logits, batch.labels, weights)
            weighted["supervised"] = (settings.hard_label_weight, hard)
        if insides is not None and inner is not None:
            with torch.no_grad(), accelerator.autocast():
                _, theirs = insides.read(insides.teacher, batch.inputs)
            weighted |= insides.terms(inner, theirs, mask)
        parts = {name: weight * term for name, (weight, term) in weighted.items() if weight}

        gradient = None
        if delta is not None and attack.start == "zero" and list(parts) != ["kd"]:
            # The inner objective is KD alone; another term's gradient must not leak into δ's.
            (gradient,) = torch.autograd.grad(
                _scaled(kd, accelerator), delta, retain_graph=bool(parts)
            )
        loss = 0.0
        if parts:
            clean = torch.stack(list(parts.values())).sum()
            accelerator.backward(clean * share)
            loss = clean.item()
        terms = {name: term.item() for name, (_, term) in weighted.items()}
        if delta is None:
            return StepLosses(loss, terms)
        if gradient is None:
            gradient = delta.grad

        def replayed(delta: torch.Tensor) -> torch.Tensor:
            _set_rng_state(mask.device, dropout)
            with adv.perturbed(model.word_embeddings, delta), accelerator.autocast():
                logits = model.module(**batch.inputs).logits
            return soft_targets(model.task, logits, teacher_logits, settings.temperature)

        before, steps = kd.item(), attack.steps
        if attack.start == "zero":
            assert gradient is not None  # noqa: S101
            delta, steps = adv.ascend(delta, gradient, mask, attack), steps - 1
        else:
            delta = adv.random_start(mask, width, attack)
        # Replaying rewinds the generator; the next update must not draw this one's noise again.
        drawn = _rng_state(mask.device)
        for index in range(steps):
            value, gradient = adv.inner_gradient(
                replayed, delta, lambda inner_loss: _scaled(inner_loss, accelerator)
            )
            if attack.start == "random" and index == 0:
                before = value
            delta = adv.ascend(delta, gradient, mask, attack)
        adversarial = replayed(delta)
        accelerator.backward(settings.alpha * adversarial * share)
        _set_rng_state(mask.device, drawn)
        terms["adversarial"] = adversarial.item()
        return StepLosses(
            loss + settings.alpha * adversarial.item(),
            terms,
            {
                "inner_loss_before": before,
                "inner_loss_after": adversarial.item(),
                "adversarial_gain": adversarial.item() - kd.item(),
            },
        )

    return step


def _scaled(loss: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Keep an inner gradient within the range of fp16; an ascent step ignores its scale."""
    return loss if accelerator.scaler is None else accelerator.scaler.scale(loss)


def _rng_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_rng_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
