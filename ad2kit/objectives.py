"""What a training minimises: fine-tuning, distillation, and AD2.

    L(θ) = w_kd·D(x) + α·D(x + δ*) + w_hard·S(x) + Σ w·intermediate terms

D is the distance between the student's and the teacher's answers (t²·KL; MSE for a regression),
S the task's own loss with hard labels. With w_kd = 1 and the last two left out this is AD2, after
Zhang, Uma Naresh and He, AAAI 2022 (see :mod:`ad2kit.adversary` for δ*, and for what is our
reading); with α = 0 it is plain distillation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ad2kit import adversary as adv
from ad2kit.losses import soft_targets, supervised
from ad2kit.models import TextModel

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ad2kit.intermediate import Comparison
    from ad2kit.sections import AdversaryRecipe, DistillRecipe


@dataclass(frozen=True)
class Batch:
    """Padded tensors of some rows, their labels, and the teacher's logits if it has any."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    teacher_logits: torch.Tensor | None


@dataclass
class StepLosses:
    """What one (micro-)batch contributed: the loss, and its terms before their weights."""

    loss: float
    terms: dict[str, float]


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
    first ascent step from a zero start needs no pass of its own. Each adversarial pass draws
    dropout of its own, or replays the masks of the clean one (``adversary.dropout``). The published
    description does not say which; with masks of its own the student came out better.
    """

    def step(model: TextModel, batch: Batch, share: float) -> StepLosses:
        assert batch.teacher_logits is not None  # noqa: S101  (a caller's defect, not an input)
        mask, attack = batch.inputs["attention_mask"], settings.adversary
        clean_masks = _rng_state(mask.device)
        delta = None
        if settings.alpha:
            delta = adv.no_perturbation(mask, model.word_embeddings.embedding_dim)
        weighted = _clean_terms(model, batch, delta, accelerator, settings, insides, weights)
        kd = weighted["kd"][1]
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

        masks = clean_masks if attack.dropout == "replayed" else None
        inner = _inner_loss(model, batch, accelerator, settings, masks)
        if attack.start == "random":
            gradient = None
        delta = _most_different(inner, batch, model, attack, accelerator, gradient)
        adversarial = inner(delta)
        accelerator.backward(settings.alpha * adversarial * share)
        terms["adversarial"] = adversarial.item()
        return StepLosses(loss + settings.alpha * adversarial.item(), terms)

    return step


def inner_losses(
    model: TextModel, batch: Batch, accelerator: Accelerator, settings: DistillRecipe
) -> tuple[float, float]:
    """Return the distance from the teacher before and after the ascent, without dropout.

    It is what the adversary does to the network that is served, and not to one draw of dropout. No
    gradient is left behind, and no random number is taken from the training.
    """
    device = batch.inputs["attention_mask"].device
    state = _rng_state(device)
    model.module.eval()
    inner = _inner_loss(model, batch, accelerator, settings, None)
    delta = _most_different(inner, batch, model, settings.adversary, accelerator, None)
    with torch.no_grad():
        before, after = inner(torch.zeros_like(delta)).item(), inner(delta).item()
    _set_rng_state(device, state)
    return before, after


def _clean_terms(
    model: TextModel, batch: Batch, delta: torch.Tensor | None, accelerator: Accelerator,
    settings: DistillRecipe, insides: Comparison | None, weights: torch.Tensor | None,
) -> dict[str, tuple[float, torch.Tensor]]:  # fmt: skip
    """Run the clean pass; return the weight and the value of each term, ``kd`` always."""
    assert batch.teacher_logits is not None  # noqa: S101  (a caller's defect, not an input)
    with adv.perturbed(model.word_embeddings, delta), accelerator.autocast():
        if insides is None:
            logits, inner = model.module(**batch.inputs).logits, None
        else:
            logits, inner = insides.read(model, batch.inputs)
    kd = soft_targets(model.task, logits, batch.teacher_logits, settings.temperature)
    weighted = {"kd": (settings.kd_weight, kd)}
    if settings.hard_label_weight:
        hard = supervised(model.task, logits, batch.labels, weights)
        weighted["supervised"] = (settings.hard_label_weight, hard)
    if insides is not None and inner is not None:
        with torch.no_grad(), accelerator.autocast():
            _, theirs = insides.read(insides.teacher, batch.inputs)
        weighted |= insides.terms(inner, theirs, batch.inputs["attention_mask"])
    return weighted


def _inner_loss(
    model: TextModel, batch: Batch, accelerator: Accelerator, settings: DistillRecipe,
    masks: torch.Tensor | None,
) -> Callable[[torch.Tensor], torch.Tensor]:  # fmt: skip
    """Return the distance from the teacher as a function of δ.

    ``masks`` is the state of the generator to draw the same dropout from each time; with None each
    call draws its own.
    """
    teacher_logits = batch.teacher_logits
    assert teacher_logits is not None  # noqa: S101  (a caller's defect, not an input)

    def inner(delta: torch.Tensor) -> torch.Tensor:
        drawn = _rng_state(delta.device)
        if masks is not None:
            _set_rng_state(delta.device, masks)
        with adv.perturbed(model.word_embeddings, delta), accelerator.autocast():
            logits = model.module(**batch.inputs).logits
        if masks is not None:  # the next update must not draw this one's noise again
            _set_rng_state(delta.device, drawn)
        return soft_targets(model.task, logits, teacher_logits, settings.temperature)

    return inner


def _most_different(
    inner: Callable[[torch.Tensor], torch.Tensor], batch: Batch, model: TextModel,
    attack: AdversaryRecipe, accelerator: Accelerator, gradient: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Return δ*, by the ascent that the recipe says.

    ``gradient`` is that of the inner loss at a start from zero, where it is known already.
    """
    mask, width = batch.inputs["attention_mask"], model.word_embeddings.embedding_dim
    if attack.start == "random":
        delta = adv.random_start(mask, width, attack)
    else:
        delta = adv.no_perturbation(mask, width)
    for _ in range(attack.steps):
        if gradient is None:
            _, gradient = adv.inner_gradient(inner, delta, lambda loss: _scaled(loss, accelerator))
        delta = adv.ascend(delta, gradient, mask, attack)
        gradient = None
    return delta


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
