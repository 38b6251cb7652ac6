"""Each loss against values worked out by hand, and against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from ad2kit.losses import soft_target_kl, supervised


def test_cross_entropy_of_a_known_distribution() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])  # p = 3/4, 1/4 and 1/2, 1/2
    expected = (math.log(4 / 3) + math.log(2)) / 2
    found = supervised("single_label", logits, torch.tensor([0, 1]))
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_soft_target_kl_of_known_distributions() -> None:
    teacher = torch.tensor([[math.log(3.0), 0.0]])  # 3/4, 1/4
    student = torch.tensor([[0.0, 0.0]])  # 1/2, 1/2
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert soft_target_kl(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-6)


def test_soft_target_kl_is_divided_and_multiplied_by_the_temperature() -> None:
    teacher = torch.tensor([[2 * math.log(3.0), 0.0]])  # at t = 2: 3/4, 1/4
    student = torch.tensor([[0.0, 0.0]])
    at_one = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert soft_target_kl(student, teacher, 2.0).item() == pytest.approx(4 * at_one, rel=1e-6)


def test_soft_target_kl_is_a_mean_over_the_batch_and_zero_at_the_teacher() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])
    assert soft_target_kl(logits, logits, 1.0).item() == pytest.approx(0.0, abs=1e-7)
    other = torch.zeros_like(logits)
    each = [soft_target_kl(other[i : i + 1], logits[i : i + 1], 1.0).item() for i in range(2)]
    assert soft_target_kl(other, logits, 1.0).item() == pytest.approx(sum(each) / 2, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient_is_the_known_one(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 4, generator=generator) for _ in range(2))
    student.requires_grad_()
    (found,) = torch.autograd.grad(soft_target_kl(student, teacher, temperature), student)
    # In closed form: t * (softmax(s/t) - softmax(p/t)) / batch.
    expected = (
        temperature
        * (torch.softmax(student / temperature, 1) - torch.softmax(teacher / temperature, 1))
        / len(student)
    )
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-7)


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    student = torch.randn(2, 3, generator=generator, dtype=torch.float64, requires_grad=True)

    def double_kl(logits: torch.Tensor) -> torch.Tensor:
        # The loss computes in float32, so the perturbation must be large and the bounds loose.
        return soft_target_kl(logits, teacher, 2.0).double()

    assert torch.autograd.gradcheck(double_kl, student, eps=1e-2, atol=1e-3, rtol=1e-2)
    labels = torch.tensor([0, 2])
    assert torch.autograd.gradcheck(
        lambda logits: supervised("single_label", logits, labels).double(), student,
        eps=1e-2, atol=1e-3, rtol=1e-2,
    )  # fmt: skip
