"""The inner step of AD2: the hook, the ball, the ascent, and what they leave alone."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ad2kit.run.sections import AdversaryRecipe
from ad2kit.training import ad2
from ad2kit.training.losses import soft_target_kl
from tests.models import batch, teacher_logits, tiny_bert

if TYPE_CHECKING:
    from ad2kit.models.text_model import TextModel

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
WIDTH = 5


def test_the_hook_adds_what_it_is_given_and_is_removed_by_an_exception() -> None:
    embedding = torch.nn.Embedding(10, WIDTH)
    delta = torch.randn(1, 2, WIDTH)
    ids = torch.tensor([[3, 4]])
    with ad2.perturbed(embedding, delta):
        assert torch.equal(embedding(ids), embedding.weight[ids] + delta)
    with pytest.raises(RuntimeError, match="inside"), ad2.perturbed(embedding, delta):
        raise RuntimeError("inside")
    assert torch.equal(embedding(ids), embedding.weight[ids])


def test_the_sum_is_float32_where_half_precision_would_lose_the_perturbation() -> None:
    embedding = torch.nn.Embedding.from_pretrained(torch.full((2, 1), 0.05)).bfloat16()
    ids = torch.tensor([[0]])
    with ad2.perturbed(embedding, torch.full((1, 1, 1), 1e-5)):
        perturbed = embedding(ids)
    assert perturbed.dtype == torch.float32
    assert perturbed.item() != embedding(ids).item()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["zero", "random"])
def test_delta_stays_in_the_ball_and_off_the_padding(norm: Any, start: Any) -> None:
    settings = AdversaryRecipe(norm=norm, radius=0.3, step_size=0.2, steps=1, start=start)
    torch.manual_seed(4)
    delta = (
        ad2.random_start(MASK, WIDTH, settings)
        if start == "random"
        else ad2.no_perturbation(MASK, WIDTH)
    )
    for _ in range(6):
        delta = ad2.ascend(delta, torch.randn(3, 4, WIDTH), MASK, settings)
        size = delta.abs().amax() if norm == "linf" else delta.flatten(1).norm(dim=1).max()
        assert size <= 0.3 * (1 + 1e-6)
        assert (delta[MASK == 0] == 0).all()
        assert not delta.requires_grad
    # Six steps of 0.2 reach the boundary.
    assert (delta.abs().amax() if norm == "linf" else delta.flatten(1).norm(dim=1).max()) > 0.29


@hypothesis_settings(max_examples=50, deadline=None, derandomize=True)
@given(
    norm=st.sampled_from(["linf", "l2"]),
    radius=st.floats(0, 10),
    size=st.floats(1e-12, 1e6),
    seed=st.integers(0, 1000),
)
def test_projection_is_idempotent_and_keeps_what_is_inside(
    norm: Any, radius: float, size: float, seed: int
) -> None:
    settings = AdversaryRecipe(norm=norm, radius=radius)
    point = size * torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(seed))
    once = ad2.project(point, MASK, settings)
    assert torch.isfinite(once).all()
    torch.testing.assert_close(ad2.project(once, MASK, settings), once, rtol=1e-5, atol=1e-12)
    inside = 0.5 * once
    torch.testing.assert_close(ad2.project(inside, MASK, settings), inside, rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_zero_gradient_moves_nothing(norm: Any) -> None:
    settings = AdversaryRecipe(norm=norm, radius=1.0, step_size=0.5)
    delta = ad2.ascend(torch.zeros(3, 4, WIDTH), torch.zeros(3, 4, WIDTH), MASK, settings)
    assert (delta == 0).all()


def test_the_l2_step_has_the_length_of_the_step_size_per_example() -> None:
    settings = AdversaryRecipe(norm="l2", radius=10.0, step_size=0.5)
    delta = ad2.ascend(torch.zeros(3, 4, WIDTH), torch.randn(3, 4, WIDTH), MASK, settings)
    torch.testing.assert_close(delta.flatten(1).norm(dim=1), torch.full((3,), 0.5))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["zero", "random"])
def test_the_ascent_never_lowers_a_smooth_inner_loss(norm: Any, start: Any) -> None:
    """On a convex quadratic any ascent step that is not cut by the ball raises the loss."""
    settings = AdversaryRecipe(norm=norm, radius=0.5, step_size=0.1, start=start)
    torch.manual_seed(0)
    target = torch.randn(3, 4, WIDTH)

    def inner(delta: torch.Tensor) -> torch.Tensor:
        return ((delta - target) ** 2 * MASK.unsqueeze(-1)).sum()

    delta = (
        ad2.random_start(MASK, WIDTH, settings)
        if start == "random"
        else ad2.no_perturbation(MASK, WIDTH)
    )
    values = []
    for _ in range(8):
        value, gradient = ad2.inner_gradient(inner, delta)
        values.append(value)
        delta = ad2.ascend(delta, gradient, MASK, settings)
    assert all(later >= earlier - 1e-5 for earlier, later in itertools.pairwise(values))
    assert values[-1] > values[0]


def test_the_inner_gradient_leaves_nothing_on_the_parameters() -> None:
    model: TextModel = tiny_bert()
    data = batch(model)

    def inner(delta: torch.Tensor) -> torch.Tensor:
        with ad2.perturbed(model.word_embeddings, delta):
            return soft_target_kl(model.module(**data.inputs).logits, teacher_logits(), 1.0)

    mask = data.inputs["attention_mask"]
    value, gradient = ad2.inner_gradient(inner, ad2.no_perturbation(mask, 64))
    assert value > 0
    assert gradient.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.module.parameters())
