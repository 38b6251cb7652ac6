"""The inner step of AD2: perturb the student's word embeddings where it imitates worst.

    δ* ≈ argmax_{‖δ‖≤ε} KL(p_T(x) ‖ p_S(e(x) + δ))    by K steps    δ ← Π_ε(δ + η · g / ‖g‖)

after Zhang, Uma Naresh and He, *Adversarial Data Augmentation for Task-Specific Knowledge
Distillation of Pre-trained Transformers*, AAAI 2022. The description leaves open the norm, the
start, the dropout of the adversarial pass and where e(x) is taken; our reading: e(x) is the output
of the word-embedding module, before position embeddings and LayerNorm; δ is zero on padding;
``g / ‖g‖`` is ``sign(g)`` for the ℓ∞ ball and g over its Euclidean norm over the real tokens of one
example for the ℓ2 ball; each pass draws dropout of its own.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ad2kit.sections import AdversaryRecipe


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
