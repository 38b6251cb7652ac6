"""AD2 and its baselines: the objective of a training, and the perturbation of AD2.

    L(θ) = w_kd·D(x) + α·D(x + δ*) + w_hard·S(x) + Σ w·intermediate terms

D is the distance of the student's answers from the teacher's (t²·KL; MSE for a regression). S is
the task's own loss with hard labels. With w_kd = 1 and without the last two terms this is AD2,
after Zhang, Uma Naresh and He, *Adversarial Data Augmentation for Task-Specific Knowledge
Distillation of Pre-trained Transformers*, AAAI 2022, doi 10.1609/aaai.v36i10.21423. With α = 0 it
is plain distillation. δ* is the perturbation of the student's word embeddings that maximises the
distance:

    δ* ≈ argmax_{‖δ‖≤ε} KL(p_T(x) ‖ p_S(e(x) + δ))    by K steps    δ ← Π_ε(δ + η · g / ‖g‖)

The paper does not specify the norm, the start, the dropout of the adversarial pass, and the place
of e(x). Our reading is as follows. e(x) is the output of the word-embedding module, before position
embeddings and LayerNorm. δ is zero on padding. ``g / ‖g‖`` is ``sign(g)`` for the ℓ∞ ball; for the
ℓ2 ball it is g over its Euclidean norm over the real tokens of one example. Each pass draws its own
dropout masks.

If long texts are read in windows, each window is an example x of its own: it imitates the teacher's
answer to that window, and has its own δ. S is of the mean of the logits of a text's windows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ad2kit.models.text_model import TextModel, padded
from ad2kit.training.losses import soft_targets, supervised

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from accelerate import Accelerator

    from ad2kit.data.splits import Encoded
    from ad2kit.run.sections import AdversaryRecipe, DistillRecipe
    from ad2kit.training.losses import Comparison


@dataclass(frozen=True)
class Batch:
    """Padded tensors of the windows of some texts, the labels, and the teacher's logits.

    ``inputs`` and ``teacher_logits`` have a row for each window, and ``labels`` one for each text.
    A text that is not long is one window. Without a teacher the logits have shape [windows, 0].
    ``averaging``, [texts, windows], turns the logits of windows into those of texts; None if long
    texts are not read in windows.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    teacher_logits: torch.Tensor
    averaging: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        model: TextModel,
        encoded: Encoded,
        rows: np.ndarray,
        teacher_logits: torch.Tensor | None,
        device: torch.device,
    ) -> Batch:
        """Return the batch of some texts, with all their windows.

        ``teacher_logits`` has the logits of all windows of ``encoded``, [windows, outputs].
        """
        windows = encoded.windows_of(rows)
        if teacher_logits is None:
            window_logits = torch.empty(len(windows), 0)
        else:
            window_logits = teacher_logits[windows]
        averaging = encoded.averaging(rows)
        return cls(
            inputs=padded(model, encoded, windows, device),
            labels=torch.from_numpy(encoded.labels[rows]).to(device),
            teacher_logits=window_logits.to(device),
            averaging=None if averaging is None else torch.from_numpy(averaging).to(device),
        )

    def by_text(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits of texts, [texts, outputs], from those of windows."""
        if self.averaging is None:
            return logits
        # Not a product of matrices, which autocast would compute in half precision.
        return (self.averaging.unsqueeze(-1) * logits.float()).sum(dim=1)

    @property
    def weights(self) -> torch.Tensor | None:
        """The weights of the windows in a mean over the texts, [windows]; None for equal weights.

        They add up to 1. So each text counts alike, whatever the number of its windows, and a batch
        may be divided into parts.
        """
        return None if self.averaging is None else self.averaging.mean(dim=0)


@dataclass
class StepLosses:
    """The losses of one (micro-)batch: the weighted sum, and the terms before their weights."""

    loss: float
    terms: dict[str, float]


Objective = Callable[[TextModel, Batch, float], StepLosses]
"""Runs the forward and backward passes of a (micro-)batch and leaves gradients on the parameters,
scaled by the batch's share of the rows of its update."""


def finetuning(accelerator: Accelerator, weights: torch.Tensor | None = None) -> Objective:
    """Return the objective of plain fine-tuning: the task's own loss.

    Args:
        accelerator: gives the precision and the backward pass.
        weights: weights of the classes; see :func:`ad2kit.training.losses.balanced_weights`.
    """

    def step(model: TextModel, batch: Batch, share: float) -> StepLosses:
        with accelerator.autocast():
            logits = batch.by_text(model.module(**batch.inputs).logits)
            loss = supervised(model.task, logits, batch.labels, weights)
        accelerator.backward(loss * share)
        return StepLosses(loss.item(), {"supervised": loss.item()})

    return step


def distillation(
    accelerator: Accelerator,
    settings: DistillRecipe,
    comparison: Comparison | None = None,
    weights: torch.Tensor | None = None,
) -> Objective:
    """Return the objective of a distillation; a term of weight 0 costs nothing.

    With an adversary the clean pass runs with a zero δ that records its gradient, so that the
    first ascent step from a zero start needs no pass of its own. Each adversarial pass draws its
    own dropout masks, or replays the masks of the clean pass (``adversary.dropout``). The paper
    does not specify this; which is better depends on the data (docs/measurements/methods.md).

    Args:
        accelerator: gives the precision and the backward pass.
        settings: weights, temperature and adversary.
        comparison: the comparison for the intermediate terms; None if there are none.
        weights: weights of the classes in the loss of the hard labels; see :func:`finetuning`.
    """

    def step(model: TextModel, batch: Batch, share: float) -> StepLosses:
        attention_mask = batch.inputs["attention_mask"]
        adversary = settings.adversary
        clean_rng_state = _rng_state(attention_mask.device)
        delta = None
        if settings.alpha:
            delta = no_perturbation(attention_mask, model.word_embeddings.embedding_dim)
        weighted_terms = _clean_terms(
            model, batch, delta, accelerator, settings, comparison, weights
        )
        kd = weighted_terms["kd"][1]
        summands = {
            name: weight * term for name, (weight, term) in weighted_terms.items() if weight
        }
        gradient = None
        if delta is not None and adversary.start == "zero" and list(summands) != ["kd"]:
            # The inner objective is KD alone: no other term may contribute to the gradient of δ.
            (gradient,) = torch.autograd.grad(
                _scaled(kd, accelerator), delta, retain_graph=bool(summands)
            )
        loss = 0.0
        if summands:
            clean_loss = torch.stack(list(summands.values())).sum()
            accelerator.backward(clean_loss * share)
            loss = clean_loss.item()
        terms = {name: term.item() for name, (_, term) in weighted_terms.items()}
        if delta is None:
            return StepLosses(loss, terms)
        if gradient is None:
            gradient = delta.grad

        rng_state = clean_rng_state if adversary.dropout == "replayed" else None
        inner_loss = _inner_loss(model, batch, accelerator, settings, rng_state)
        if adversary.start == "random":
            gradient = None
        delta = _worst_delta(inner_loss, batch, model, adversary, accelerator, gradient)
        adversarial = inner_loss(delta)
        accelerator.backward(settings.alpha * adversarial * share)
        terms["adversarial"] = adversarial.item()
        return StepLosses(loss + settings.alpha * adversarial.item(), terms)

    return step


def inner_losses(
    model: TextModel, batch: Batch, accelerator: Accelerator, settings: DistillRecipe
) -> tuple[float, float]:
    """Return the distance from the teacher before and after the ascent, without dropout.

    This measures the effect of the adversary on the network that is served, not on one draw of
    dropout. The parameters get no gradient, and the state of the random generator is restored. The
    model is in evaluation mode afterwards.
    """
    device = batch.inputs["attention_mask"].device
    rng_state = _rng_state(device)
    model.module.eval()
    inner_loss = _inner_loss(model, batch, accelerator, settings, None)
    delta = _worst_delta(inner_loss, batch, model, settings.adversary, accelerator, None)
    with torch.no_grad():
        before = inner_loss(torch.zeros_like(delta)).item()
        after = inner_loss(delta).item()
    _set_rng_state(device, rng_state)
    return before, after


def _clean_terms(
    model: TextModel,
    batch: Batch,
    delta: torch.Tensor | None,
    accelerator: Accelerator,
    settings: DistillRecipe,
    comparison: Comparison | None,
    weights: torch.Tensor | None,
) -> dict[str, tuple[float, torch.Tensor]]:
    """Run the clean pass; return the weight and the value of each term, always with ``kd``."""
    student_states = None
    with perturbed(model.word_embeddings, delta), accelerator.autocast():
        if comparison is None:
            logits = model.module(**batch.inputs).logits
        else:
            logits, student_states = comparison.read(model, batch.inputs)
    kd = soft_targets(model.task, logits, batch.teacher_logits, settings.temperature, batch.weights)
    weighted_terms = {"kd": (settings.kd_weight, kd)}
    if settings.hard_label_weight:
        hard_label_loss = supervised(model.task, batch.by_text(logits), batch.labels, weights)
        weighted_terms["supervised"] = (settings.hard_label_weight, hard_label_loss)
    if comparison is not None and student_states is not None:
        with torch.no_grad(), accelerator.autocast():
            _, teacher_states = comparison.read(comparison.teacher, batch.inputs)
        mask = batch.inputs["attention_mask"]
        weighted_terms |= comparison.terms(student_states, teacher_states, mask, batch.weights)
    return weighted_terms


def _inner_loss(
    model: TextModel,
    batch: Batch,
    accelerator: Accelerator,
    settings: DistillRecipe,
    rng_state: torch.Tensor | None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the distance from the teacher as a function of δ.

    ``rng_state`` is the generator state from which each call draws the same dropout masks; with
    None each call draws its own masks.
    """
    teacher_logits = batch.teacher_logits

    def inner_loss(delta: torch.Tensor) -> torch.Tensor:
        current_state = _rng_state(delta.device)
        if rng_state is not None:
            _set_rng_state(delta.device, rng_state)
        with perturbed(model.word_embeddings, delta), accelerator.autocast():
            logits = model.module(**batch.inputs).logits
        if rng_state is not None:  # else the next update would draw the same masks again
            _set_rng_state(delta.device, current_state)
        return soft_targets(model.task, logits, teacher_logits, settings.temperature, batch.weights)

    return inner_loss


def _worst_delta(
    inner_loss: Callable[[torch.Tensor], torch.Tensor],
    batch: Batch,
    model: TextModel,
    adversary: AdversaryRecipe,
    accelerator: Accelerator,
    gradient: torch.Tensor | None,
) -> torch.Tensor:
    """Return δ*, by projected gradient ascent with the settings of ``adversary``.

    ``gradient`` is the gradient of the inner loss at a zero start, if it is already known.
    """
    mask = batch.inputs["attention_mask"]
    width = model.word_embeddings.embedding_dim
    if adversary.start == "random":
        delta = random_start(mask, width, adversary)
    else:
        delta = no_perturbation(mask, width)
    for _ in range(adversary.steps):
        if gradient is None:
            _, gradient = inner_gradient(inner_loss, delta, lambda loss: _scaled(loss, accelerator))
        delta = ascend(delta, gradient, mask, adversary)
        gradient = None
    return delta


def _scaled(loss: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Scale a loss so that its gradient fits into fp16; an ascent step ignores the scale."""
    return loss if accelerator.scaler is None else accelerator.scaler.scale(loss)


def _rng_state(device: torch.device) -> torch.Tensor:
    """Return the state of the generator that draws dropout masks on a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_rng_state(device: torch.device, state: torch.Tensor) -> None:
    """Set the state of the generator that draws dropout masks on a device."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@contextmanager
def perturbed(word_embeddings: torch.nn.Module, delta: torch.Tensor | None) -> Iterator[None]:
    """Add ``delta`` to the output of the word-embedding module inside the block; None adds nothing.

    This uses a hook and not ``inputs_embeds``, because several families compute position ids from
    the token ids, and go wrong without them under left padding. The sum is kept in float32: half
    precision would round a radius of 1e-5 away beside an embedding of 0.05.

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
    """Return Π_ε(δ): the nearest point of the ball of ``adversary.radius``, zero on padding.

    Args:
        delta: shape [batch, tokens, width].
        attention_mask: 1 for real tokens, 0 for padding; shape [batch, tokens].
        adversary: gives norm and radius.
    """
    delta = delta * attention_mask.unsqueeze(-1)
    if adversary.norm == "linf":
        return delta.clamp(-adversary.radius, adversary.radius)
    norms = delta.flatten(1).norm(dim=1)
    # Only a point outside the ball is divided, so that an interior point is returned unchanged.
    scale = torch.where(norms > adversary.radius, adversary.radius / norms, torch.ones_like(norms))
    return delta * scale[:, None, None]


def ascend(
    delta: torch.Tensor,
    gradient: torch.Tensor,
    attention_mask: torch.Tensor,
    adversary: AdversaryRecipe,
) -> torch.Tensor:
    """Return ``Π_ε(δ + η · g / ‖g‖)``, one ascent step; an example with zero gradient stays.

    Args:
        delta: the current perturbation, shape [batch, tokens, width].
        gradient: gradient of the inner loss with respect to ``delta``; same shape. Its scale is
            irrelevant.
        attention_mask: shape [batch, tokens].
        adversary: gives norm, radius and step size.
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
    """Return a random δ [batch, tokens, width]: uniform in the box for ℓ∞, in direction for ℓ2.

    The radius of the ℓ2 point is uniform. A point that is uniform in volume would almost always lie
    on the sphere in hundreds of dimensions.
    """
    noise = torch.rand((*attention_mask.shape, width), device=attention_mask.device) * 2 - 1
    if adversary.norm == "linf":
        return project(noise * adversary.radius, attention_mask, adversary)
    noise = torch.randn_like(noise) * attention_mask.unsqueeze(-1)
    radii = torch.rand(len(noise), device=noise.device) * adversary.radius
    scale: torch.Tensor = radii / noise.flatten(1).norm(dim=1)
    return noise * scale[:, None, None]


def inner_gradient(
    inner_loss: Callable[[torch.Tensor], torch.Tensor],
    delta: torch.Tensor,
    scaled: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
) -> tuple[float, torch.Tensor]:
    """Return the inner loss at ``delta`` and its gradient there.

    The gradient is taken with respect to δ alone: nothing accumulates on the parameters.
    ``scaled`` multiplies the loss before the backward pass, for half precision; the scale of the
    gradient has no effect on :func:`ascend`.
    """
    delta = delta.detach().requires_grad_(True)
    loss = inner_loss(delta)
    gradient: torch.Tensor
    (gradient,) = torch.autograd.grad(scaled(loss), delta)
    return loss.item(), gradient
