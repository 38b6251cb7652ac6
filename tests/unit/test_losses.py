"""Each loss against values worked out by hand, and against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ad2kit.training import losses
from ad2kit.training.losses import balanced_weights, soft_target_kl, soft_targets, supervised


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
        lambda logits: supervised("single_label", logits, labels).double(),
        student,
        eps=1e-2,
        atol=1e-3,
        rtol=1e-2,
    )


def test_a_row_without_a_label_adds_nothing_and_still_counts() -> None:
    logits = torch.tensor([[1.0, -1.0], [0.5, 0.0], [2.0, 1.0]])
    labelled = supervised("single_label", logits[:2], torch.tensor([0, 1]))
    mixed = supervised("single_label", logits, torch.tensor([0, 1, -100]))
    assert mixed.item() == pytest.approx(labelled.item() * 2 / 3, rel=1e-6)
    nothing = supervised("single_label", logits, torch.tensor([-100] * 3))
    assert nothing.item() == 0.0
    values = supervised("regression", logits[:, :1], torch.tensor([0.0, math.nan, 4.0]))
    assert values.item() == pytest.approx((1.0 + 4.0) / 3)
    several = torch.tensor([[1.0, 0.0], [math.nan] * 2, [1.0, 1.0]])
    found = supervised("multi_label", logits, several).item()
    each = [-math.log(1 / (1 + math.exp(-x))) for x in (1.0, 1.0, 2.0, 1.0)]
    assert found == pytest.approx(sum(each) / 6, rel=1e-6)


def test_balanced_weights_let_classes_count_alike() -> None:
    classes = np.array([0, 0, 0, 0, 0, 0, 2, 2])  # nobody has class 1
    weights = balanced_weights("single_label", classes, 3)
    assert weights.tolist() == pytest.approx([8 / (2 * 6), 1.0, 8 / (2 * 2)])
    assert weights[classes].mean().item() == pytest.approx(1.0)
    # The first label is in one row of four, nobody has the second and everybody the third.
    several = np.array([[1, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1]], dtype=np.float32)
    found = balanced_weights("multi_label", several, 3)
    assert found.tolist() == [pytest.approx([4 / (2 * 3), 1, 1]), pytest.approx([4 / 2, 1, 1])]


def test_weights_multiply_the_loss_of_their_rows() -> None:
    logits = torch.tensor([[1.0, -1.0], [0.5, 0.0], [2.0, 1.0]])
    labels, weights = torch.tensor([0, 1, -100]), torch.tensor([0.5, 3.0])
    first = math.log(1 + math.exp(-2.0))
    second = math.log(1 + math.exp(0.5))
    found = supervised("single_label", logits, labels, weights).item()
    assert found == pytest.approx((0.5 * first + 3.0 * second) / 3, rel=1e-6)
    several, pairs = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 2.0], [3.0, 7.0]])
    each = [math.log(1 + math.exp(-1.0)), math.log(1 + math.exp(-1.0))]
    found = supervised("multi_label", logits[:1], several, pairs).item()
    assert found == pytest.approx((3.0 * each[0] + 2.0 * each[1]) / 2, rel=1e-6)
    plain = supervised("single_label", logits, labels).item()
    assert plain == pytest.approx((first + second) / 3, rel=1e-6)


def test_the_soft_targets_of_several_labels_are_a_mean_of_bernoulli_kls() -> None:
    teacher = torch.tensor([[math.log(3.0), 0.0]])  # 3/4 and 1/2
    student = torch.tensor([[0.0, math.log(3.0)]])  # 1/2 and 3/4
    first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    second = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    found = soft_targets("multi_label", student, teacher, 1.0).item()
    assert found == pytest.approx((first + second) / 2, rel=1e-6)


def test_the_soft_target_of_a_regression_is_the_squared_error() -> None:
    found = soft_targets(
        "regression", torch.tensor([[1.0], [4.0]]), torch.tensor([[2.0], [2.0]]), 3
    )
    assert found.item() == pytest.approx((1 + 4) / 2)


MASK = torch.tensor([[1, 1, 0], [0, 1, 1]])


def states(seed: int, width: int = 4) -> torch.Tensor:
    return torch.randn(2, 3, width, generator=torch.Generator().manual_seed(seed))


def test_pkd_compares_the_directions_of_the_first_real_token() -> None:
    ours, theirs = torch.zeros(2, 3, 2), torch.zeros(2, 3, 2)
    ours[0, 0], theirs[0, 0] = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.1])  # orthogonal: 2
    ours[1, 1], theirs[1, 1] = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])  # the same: 0
    assert losses.pkd([ours], [theirs], MASK).item() == pytest.approx((2 + 0) / 2)
    # Two layers add up; other tokens do not matter.
    ours[:, 2] = 9.0
    assert losses.pkd([ours] * 2, [theirs] * 2, MASK).item() == pytest.approx(2.0)


def test_hidden_states_average_over_real_tokens_of_each_row() -> None:
    ours, theirs = torch.zeros(2, 3, 2), torch.zeros(2, 3, 2)
    ours[0, 0], ours[1, 2] = 1.0, 3.0
    ours[0, 2] = 100.0  # padding
    assert losses.hidden_states([ours], [theirs], MASK).item() == pytest.approx((1 / 2 + 9 / 2) / 2)


def test_attentions_are_a_kl_over_the_rows_of_real_tokens() -> None:
    ours = torch.full((2, 1, 3, 3), 1 / 3)
    theirs = ours.clone()
    theirs[0, 0, 0] = torch.tensor([1.0, 0.0, 0.0])
    theirs[0, 0, 2] = torch.tensor([0.0, 1.0, 0.0])  # the row of a padding token
    found = losses.attentions([ours], [theirs], MASK).item()
    assert found == pytest.approx(math.log(3) / 2 / 2, rel=1e-5)


def test_value_relations_need_no_equal_widths_and_ignore_padding() -> None:
    values = states(1)
    assert losses.value_relations(values, values, MASK, 2).item() == pytest.approx(0.0, abs=1e-7)
    doubled = torch.cat([values, values], dim=-1)  # products over the root: √2 as large
    assert losses.value_relations(values, doubled, MASK, 1).item() > 1e-3
    padded = values.clone()
    padded[MASK == 0] = 50.0
    found = losses.value_relations(padded, states(2), MASK, 2)
    assert found.item() == pytest.approx(
        losses.value_relations(values, states(2), MASK, 2).item(), rel=1e-5
    )


def test_the_gradients_of_the_intermediate_terms_are_those_of_finite_differences() -> None:
    ours, theirs = states(3).double().requires_grad_(), states(4).double()
    terms = (
        lambda x: losses.pkd([x], [theirs], MASK).double(),
        lambda x: losses.hidden_states([x], [theirs], MASK).double(),
        lambda x: losses.value_relations(x, theirs, MASK, 2).double(),
        lambda x: losses.attentions(
            [x[..., :3].softmax(-1)[:, None]], [theirs[..., :3].softmax(-1)[:, None]], MASK
        ).double(),
    )
    for term in terms:
        # float32 inside: a step that rounding leaves alone.
        torch.autograd.gradcheck(term, ours, eps=1e-2, atol=2e-3, rtol=2e-2)
