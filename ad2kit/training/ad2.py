"""AD2 and its baselines: what a training minimises, and the perturbation of AD2.

    L(θ) = w_kd·D(x) + α·D(x + δ*) + w_hard·S(x) + Σ w·intermediate terms

D is the distance between the student's and the teacher's answers (t²·KL; MSE for a regression),
S the task's own loss with hard labels. With w_kd = 1 and the last two left out this is AD2, after
Zhang, Uma Naresh and He, *Adversarial Data Augmentation for Task-Specific Knowledge Distillation of
Pre-trained Transformers*, AAAI 2022, doi 10.1609/aaai.v36i10.21423; with α = 0 it is plain
distillation. The perturbation δ* of the student's word embeddings is the one it imitates worst:

    δ* ≈ argmax_{‖δ‖≤ε} KL(p_T(x) ‖ p_S(e(x) + δ))    by K steps    δ ← Π_ε(δ + η · g / ‖g‖)

The paper's description leaves open the norm, the start, the dropout of the adversarial pass and
where e(x) is taken. Our reading: e(x) is the output of the word-embedding module, before position
embeddings and LayerNorm; δ is zero on padding;
``g / ‖g‖`` is ``sign(g)`` for the ℓ∞ ball and g over its Euclidean norm over the real tokens of one
example for the ℓ2 ball; each pass draws dropout of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ad2kit.models.text_model import TextModel
from ad2kit.training.losses import soft_targets, supervised

if TYPE_CHECKING:
    from collections.abc import Iterator

    from accelerate import Accelerator

    from ad2kit.run.sections import AdversaryRecipe, DistillRecipe
    from ad2kit.training.losses import Comparison


@dataclass(frozen=True)
class Batch:
    """Padded tensors of some rows, their labels, and the teacher's logits.

    Where there is no teacher, its logits have shape [rows, 0].
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    teacher_logits: torch.Tensor


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
        weights: of the classes; see :func:`ad2kit.training.losses.balanced_weights`.
    """

    def step(model: TextModel, batch: Batch, share: float) -> StepLosses:
        with accelerator.autocast():
            logits = model.module(**batch.inputs).logits
            loss = supervised(model.task, logits, batch.labels, weights)
        accelerator.backward(loss * share)
        return StepLosses(loss.item(), {"supervised": loss.item()})

    return step


def distillation(
    accelerator: Accelerator,
    settings: DistillRecipe,
    insides: Comparison | None = None,
    weights: torch.Tensor | None = None,
) -> Objective:
    """Return the objective of a distillation; a term of weight 0 costs nothing.

    ``weights`` of the classes are those of the hard labels; see :func:`finetuning`.

    With an adversary the clean pass runs with a zero δ that records its gradient, so that the
    first ascent step from a zero start needs no pass of its own. Each adversarial pass draws
    dropout of its own, or replays the masks of the clean one (``adversary.dropout``). The published
    description does not say which; with masks of its own the student came out better.
    """

    def step(model: TextModel, batch: Batch, share: float) -> StepLosses:
        mask, attack = batch.inputs["attention_mask"], settings.adversary
        clean_masks = _rng_state(mask.device)
        delta = None
        if settings.alpha:
            delta = no_perturbation(mask, model.word_embeddings.embedding_dim)
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
    model: TextModel,
    batch: Batch,
    delta: torch.Tensor | None,
    accelerator: Accelerator,
    settings: DistillRecipe,
    insides: Comparison | None,
    weights: torch.Tensor | None,
) -> dict[str, tuple[float, torch.Tensor]]:
    """Run the clean pass; return the weight and the value of each term, ``kd`` always."""
    with perturbed(model.word_embeddings, delta), accelerator.autocast():
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
    model: TextModel,
    batch: Batch,
    accelerator: Accelerator,
    settings: DistillRecipe,
    masks: torch.Tensor | None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the distance from the teacher as a function of δ.

    ``masks`` is the state of the generator to draw the same dropout from each time; with None each
    call draws its own.
    """
    teacher_logits = batch.teacher_logits

    def inner(delta: torch.Tensor) -> torch.Tensor:
        drawn = _rng_state(delta.device)
        if masks is not None:
            _set_rng_state(delta.device, masks)
        with perturbed(model.word_embeddings, delta), accelerator.autocast():
            logits = model.module(**batch.inputs).logits
        if masks is not None:  # the next update must not draw this one's noise again
            _set_rng_state(delta.device, drawn)
        return soft_targets(model.task, logits, teacher_logits, settings.temperature)

    return inner


def _most_different(
    inner: Callable[[torch.Tensor], torch.Tensor],
    batch: Batch,
    model: TextModel,
    attack: AdversaryRecipe,
    accelerator: Accelerator,
    gradient: torch.Tensor | None,
) -> torch.Tensor:
    """Return δ*, by the ascent that the recipe says.

    ``gradient`` is that of the inner loss at a start from zero, where it is known already.
    """
    mask, width = batch.inputs["attention_mask"], model.word_embeddings.embedding_dim
    if attack.start == "random":
        delta = random_start(mask, width, attack)
    else:
        delta = no_perturbation(mask, width)
    for _ in range(attack.steps):
        if gradient is None:
            _, gradient = inner_gradient(inner, delta, lambda loss: _scaled(loss, accelerator))
        delta = ascend(delta, gradient, mask, attack)
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


@contextmanager
def perturbed(word_embeddings: torch.nn.Module, delta: torch.Tensor | None) -> Iterator[None]:
    """Add ``delta`` to the output of the word-embedding module inside the block; None adds nothing.

    A hook and not ``inputs_embeds``: several families compute position ids from the token ids,
    and go wrong without them under left padding. The sum is kept in float32, where a radius of
    1e-5 beside an embedding of 0.05 still exists; in half precision it would be rounded away.

    Args:
        word_embeddings: the module that looks up token ids.
        delta: shape [batch, tokens, embedding width].
    """
    if delta is None:
        yield
        return

    def add(
        _module: torch.nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        return output.float() + delta

    handle = word_embeddings.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def no_perturbation(attention_mask: torch.Tensor, width: int) -> torch.Tensor:
    """Return a float32 zero δ of shape [batch, tokens, width] that records its gradient."""
    shape = (*attention_mask.shape, width)
    return torch.zeros(shape, dtype=torch.float32, device=attention_mask.device, requires_grad=True)


def project(
    delta: torch.Tensor, attention_mask: torch.Tensor, adversary: AdversaryRecipe
) -> torch.Tensor:
    """Π_ε: the nearest point of the ball of ``adversary.radius``, zero on padding.

    Args:
        delta: shape [batch, tokens, width].
        attention_mask: 1 for real tokens, 0 for padding; shape [batch, tokens].
        adversary: its norm and radius.
    """
    delta = delta * attention_mask.unsqueeze(-1)
    if adversary.norm == "linf":
        return delta.clamp(-adversary.radius, adversary.radius)
    norms = delta.flatten(1).norm(dim=1)
    # Divided only where it is outside, so that an interior point is returned unchanged.
    scale = torch.where(norms > adversary.radius, adversary.radius / norms, torch.ones_like(norms))
    return delta * scale[:, None, None]


def ascend(
    delta: torch.Tensor,
    gradient: torch.Tensor,
    attention_mask: torch.Tensor,
    adversary: AdversaryRecipe,
) -> torch.Tensor:
    """One step ``Π_ε(δ + η · g / ‖g‖)``; an example whose gradient is zero stays where it is.

    Args:
        delta: the current perturbation, shape [batch, tokens, width].
        gradient: of the inner loss with respect to ``delta``; same shape. Its scale is irrelevant.
        attention_mask: shape [batch, tokens].
        adversary: norm, radius and step size.
    """
    gradient = gradient.float() * attention_mask.unsqueeze(-1)
    if adversary.norm == "linf":
        direction = gradient.sign()
    else:
        norms = gradient.flatten(1).norm(dim=1)[:, None, None]
        # In fp16 a gradient may overflow; the loss scaler then skips the update.
        usable = norms.isfinite() & (norms > 0)
        direction = torch.where(usable, gradient / torch.where(usable, norms, 1.0), 0.0)
    return project(delta.detach() + adversary.step_size * direction, attention_mask, adversary)


def random_start(
    attention_mask: torch.Tensor, width: int, adversary: AdversaryRecipe
) -> torch.Tensor:
    """Return a random point: uniform in the box for ℓ∞, uniform in direction for ℓ2.

    The ℓ2 point has a uniform radius, not a uniform volume: in hundreds of dimensions the latter
    would always lie on the sphere.
    """
    noise = torch.rand((*attention_mask.shape, width), device=attention_mask.device) * 2 - 1
    if adversary.norm == "linf":
        return project(noise * adversary.radius, attention_mask, adversary)
    noise = torch.randn_like(noise) * attention_mask.unsqueeze(-1)
    lengths = torch.rand(len(noise), device=noise.device) * adversary.radius
    scale: torch.Tensor = lengths / noise.flatten(1).norm(dim=1)
    return noise * scale[:, None, None]


def inner_gradient(
    inner_loss: Callable[[torch.Tensor], torch.Tensor],
    delta: torch.Tensor,
    scaled: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
) -> tuple[float, torch.Tensor]:
    """Return the inner loss at ``delta`` and its gradient there.

    The gradient is taken with respect to δ alone: nothing accumulates on the parameters.
    ``scaled`` multiplies the loss before it, for half precision; :func:`ascend` does not mind.
    """
    delta = delta.detach().requires_grad_(True)
    loss = inner_loss(delta)
    gradient: torch.Tensor
    (gradient,) = torch.autograd.grad(scaled(loss), delta)
    return loss.item(), gradient
