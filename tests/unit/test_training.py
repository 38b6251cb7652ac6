"""The objectives and the loop: the identities that AD2 must satisfy, and exactness."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ad2kit.models.pretrained import RANDOM
from ad2kit.run.errors import DivergedError, ModelError
from ad2kit.run.recipe import load_recipe
from ad2kit.training import ad2
from ad2kit.training.ad2 import distillation, finetuning, inner_losses
from ad2kit.training.checkpoint import Evaluation
from ad2kit.training.loop import new_state, train
from ad2kit.training.losses import soft_target_kl, soft_targets, supervised
from ad2kit.training.students import build_student
from tests.models import batch, cpu, encoded, gradients, settings, teacher_logits, tiny_bert

if TYPE_CHECKING:
    from ad2kit.run.sections import Task
    from ad2kit.training.records import StepRecord

GOLDEN = Path(__file__).parents[1] / "golden" / "smoke.json"
EVALUATION = Evaluation(0.5, torch.zeros(1, 2))


def hand_written_kd(seed: int = 3) -> torch.Tensor:
    model = tiny_bert(seed)
    data = batch(model)
    loss = soft_target_kl(model.module(**data.inputs).logits, teacher_logits(), 1.0)
    loss.backward()
    return gradients(model)


def run_ad2(**changes: Any) -> tuple[torch.Tensor, Any]:
    model = tiny_bert()
    model.module.train()
    losses = distillation(cpu(), settings(**changes))(model, batch(model), 1.0)
    return gradients(model), losses


def test_alpha_zero_is_plain_distillation() -> None:
    found, losses = run_ad2(alpha=0.0)
    torch.testing.assert_close(found, hand_written_kd(), rtol=1e-6, atol=1e-9)
    assert set(losses.terms) == {"kd"}


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("start", ["zero", "random"])
def test_radius_zero_gives_one_plus_alpha_times_the_clean_gradient(
    alpha: float, start: str
) -> None:
    found, losses = run_ad2(alpha=alpha, radius=0.0, start=start)
    expected = (1 + alpha) * hand_written_kd()
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert losses.terms["adversarial"] == pytest.approx(losses.terms["kd"], abs=1e-7)


def test_the_zero_start_ascent_uses_the_gradient_of_the_clean_kl() -> None:
    """The gradient that the clean backward pass leaves on δ equals a separately computed one."""
    model = tiny_bert()
    data = batch(model)
    mask = data.inputs["attention_mask"]

    def inner(delta: torch.Tensor) -> torch.Tensor:
        with ad2.perturbed(model.word_embeddings, delta):
            return soft_target_kl(model.module(**data.inputs).logits, teacher_logits(), 1.0)

    seen: list[torch.Tensor] = []
    original = ad2.ascend

    def spy(delta: Any, gradient: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(gradient.clone())
        return original(delta, gradient, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ad2, "ascend", spy)
        # With a hard-label term: it must not leak into the inner gradient.
        distillation(cpu(), settings(radius=1e-2, hard_label_weight=0.7))(model, data, 1.0)
    _, separate = ad2.inner_gradient(inner, ad2.no_perturbation(mask, 64))
    (used,) = seen
    torch.testing.assert_close(used, separate, rtol=1e-5, atol=1e-9)


def test_the_ascent_raises_the_kl_and_the_gain_says_so() -> None:
    _, losses = run_ad2(radius=1e-2, step_size=1e-2)
    assert losses.terms["adversarial"] > losses.terms["kd"]
    more = run_ad2(radius=1e-2, step_size=4e-3, steps=3)[1]
    assert more.terms["adversarial"] > more.terms["kd"]


def zero_radius(dropout: str) -> dict[str, float]:
    model = tiny_bert(dropout=True)
    model.module.train()
    torch.manual_seed(0)
    return distillation(cpu(), settings(radius=0.0, dropout=dropout))(
        model, batch(model), 1.0
    ).terms


def test_the_adversarial_pass_draws_masks_of_its_own_or_replays_those_of_the_clean_one() -> None:
    """At radius 0 the passes differ by their masks alone."""
    own, replayed = zero_radius("own"), zero_radius("replayed")
    assert own["kd"] == replayed["kd"]
    assert replayed["adversarial"] == replayed["kd"]
    assert own["adversarial"] != own["kd"]
    assert settings().adversary.dropout == "own"
    assert zero_radius("own") == own


@pytest.mark.parametrize("dropout", ["own", "replayed"])
def test_the_next_update_draws_other_masks(dropout: str) -> None:
    model = tiny_bert(dropout=True)
    model.module.train()
    torch.manual_seed(0)
    step = distillation(cpu(), settings(radius=0.0, dropout=dropout))
    first, second = (step(model, batch(model), 1.0).terms for _ in range(2))
    assert first["kd"] != second["kd"]
    assert first["adversarial"] != second["adversarial"]


@pytest.mark.parametrize("start", ["zero", "random"])
def test_what_the_adversary_does_is_measured_without_dropout(start: str) -> None:
    model = tiny_bert(dropout=True)
    model.module.train()
    recipe = settings(radius=1e-2, step_size=1e-2, start=start)
    torch.manual_seed(0)
    before, after = inner_losses(model, batch(model), cpu(), recipe)
    assert after > before
    quiet = model.module.eval()(**batch(model).inputs).logits
    assert before == pytest.approx(soft_target_kl(quiet, teacher_logits(), 1.0).item(), rel=1e-5)
    none, same = inner_losses(model, batch(model), cpu(), settings(radius=0.0, start=start))
    assert none == same == before
    # Nothing was taken from the training: no number of the generator, and no gradient left.
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.rand(1) == drawn
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_a_random_start_draws_anew_at_each_update() -> None:
    """Replaying the dropout must not rewind the generator over the noise of the start."""
    seen: list[torch.Tensor] = []
    original = ad2.random_start

    def spy(*arguments: Any) -> torch.Tensor:
        seen.append(original(*arguments))
        return seen[-1]

    model = tiny_bert(dropout=True)
    model.module.train()
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ad2, "random_start", spy)
        step = distillation(cpu(), settings(radius=1.0, start="random", dropout="replayed"))
        step(model, batch(model), 1.0)
        drawn = torch.rand(seen[0].numel())
    # In the box, the start is 2u - 1 of the draws: the next ones must be others.
    assert not torch.allclose(drawn[:64], (seen[0].flatten()[:64] + 1) / 2)


def test_the_hard_label_term_adds_its_gradient() -> None:
    model = tiny_bert()
    data = batch(model)
    (0.7 * supervised(model.task, model.module(**data.inputs).logits, data.labels)).backward()
    expected = hand_written_kd() + gradients(model)
    found, losses = run_ad2(alpha=0.0, hard_label_weight=0.7)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert losses.loss == pytest.approx(losses.terms["kd"] + 0.7 * losses.terms["supervised"])


def trained(accumulation_steps: int, norm: str) -> tuple[torch.Tensor, list[StepRecord]]:
    model = tiny_bert()
    accelerator = cpu()
    recipe = settings(
        epochs=3, batch_size=8, accumulation_steps=accumulation_steps, norm=norm, radius=1e-2
    )
    state = new_state(model, recipe, accelerator)
    records = list(
        train(
            state,
            encoded(model),
            teacher_logits(),
            distillation(accelerator, recipe),
            recipe,
            lambda _model: EVALUATION,
            accelerator,
            phase="student",
            seed=1,
        )
    )
    weights = torch.cat([p.detach().flatten() for p in state.model.module.parameters()])
    return weights, records


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_batch_of_eight_is_two_of_four_accumulated(norm: str) -> None:
    whole, records = trained(1, norm)
    halves, accumulated = trained(2, norm)
    for one, two in zip(records, accumulated, strict=True):
        assert two.loss == pytest.approx(one.loss, rel=1e-4)
        assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-3)
    torch.testing.assert_close(halves, whole, rtol=1e-3, atol=2e-4)


def first_update(objective: Any, recipe: Any) -> torch.Tensor:
    """Train one update over all texts and return the weights."""
    accelerator = cpu()
    state = new_state(tiny_bert(), recipe, accelerator)
    next(
        train(
            state,
            encoded(state.model),
            teacher_logits(),
            objective,
            recipe,
            lambda _model: EVALUATION,
            accelerator,
            phase="student",
            seed=1,
        )
    )
    return torch.cat([p.detach().flatten() for p in state.model.module.parameters()])


def test_a_batch_that_does_not_fit_is_split_with_the_same_result() -> None:
    recipe = settings(epochs=2, batch_size=8, radius=1e-2)
    whole = distillation(cpu(), recipe)
    seen: list[int] = []

    def small(model: Any, batch: Any, share: float) -> Any:
        seen.append(len(batch.labels))
        losses = whole(model, batch, share)
        if len(batch.labels) > 2:
            raise torch.OutOfMemoryError  # with gradients already there
        return losses

    torch.testing.assert_close(
        first_update(small, recipe), first_update(whole, recipe), rtol=1e-3, atol=2e-4
    )
    assert seen == [8, 4, 2, 2, 2, 2]


def test_a_single_text_that_does_not_fit_is_an_error_with_ways_out() -> None:
    def never(_model: Any, _batch: Any, _share: float) -> Any:
        raise torch.OutOfMemoryError

    with pytest.raises(ModelError, match=r"student: one text of \d+ tokens does not fit") as caught:
        first_update(never, settings(batch_size=8))
    assert "compute.gradient_checkpointing=true" in caught.value.hint


@pytest.mark.parametrize("start", ["zero", "random"])
def test_the_scale_of_half_precision_does_not_reach_the_perturbation(start: str) -> None:
    """Gradients times 2**16, as an fp16 scaler makes them, leave the same δ."""
    plain = run_ad2(radius=1e-2, steps=2, step_size=6e-3, norm="l2", start=start)

    class Scaler:
        def scale(self, loss: torch.Tensor) -> torch.Tensor:
            return loss * 2.0**16

    accelerator = cpu()
    accelerator.scaler = Scaler()
    model = tiny_bert()
    model.module.train()
    recipe = settings(radius=1e-2, steps=2, step_size=6e-3, norm="l2", start=start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerator, "backward", lambda loss: loss.backward())
        torch.manual_seed(0)
        losses = distillation(accelerator, recipe)(model, batch(model), 1.0)
    if start == "zero":
        assert losses.terms["adversarial"] == pytest.approx(plain[1].terms["adversarial"])
    assert losses.terms["adversarial"] > losses.terms["kd"]


def test_a_kd_weight_of_zero_leaves_the_adversarial_term_alone() -> None:
    both, alone = run_ad2(radius=1e-2)[0], run_ad2(radius=1e-2, kd_weight=0.0)[0]
    torch.testing.assert_close(alone, both - hand_written_kd(), rtol=1e-3, atol=1e-6)


def test_an_unlabelled_row_teaches_through_the_teacher_alone() -> None:
    model = tiny_bert()
    data = batch(model)
    unlabelled = replace(data, labels=torch.full_like(data.labels, -100))
    losses = distillation(cpu(), settings(alpha=0.0, hard_label_weight=0.7))(model, unlabelled, 1.0)
    torch.testing.assert_close(gradients(model), hand_written_kd(), rtol=1e-5, atol=1e-8)
    assert losses.terms["supervised"] == 0.0


@pytest.mark.parametrize("task", ["multi_label", "regression"])
def test_the_adversary_raises_the_distance_of_every_task(task: Task) -> None:
    model = tiny_bert(task=task)
    data = batch(model)
    losses = distillation(cpu(), settings(radius=1e-2, step_size=1e-2))(model, data, 1.0)
    assert losses.terms["adversarial"] > losses.terms["kd"]
    told = teacher_logits(len(model.labels))
    hand = soft_targets(task, model.module(**data.inputs).logits, told, 1.0)
    assert losses.terms["kd"] == pytest.approx(hand.item(), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_before_the_optimiser() -> None:
    model = tiny_bert()
    accelerator = cpu()
    recipe = settings(epochs=1, batch_size=8)
    state = new_state(model, recipe, accelerator)
    before = [p.detach().clone() for p in state.model.module.parameters()]
    logits = teacher_logits()
    logits[3, 0] = float("nan")
    with pytest.raises(DivergedError, match=r"student: the loss is nan at update 1") as caught:
        list(
            train(
                state,
                encoded(model),
                logits,
                distillation(accelerator, recipe),
                recipe,
                lambda _model: EVALUATION,
                accelerator,
                phase="student",
                seed=1,
            )
        )
    assert "lower distill.lr" in caught.value.hint
    after = state.model.module.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_biases_and_norms_do_not_decay() -> None:
    state = new_state(tiny_bert(), settings(weight_decay=0.1), cpu())
    groups = state.optimizer.param_groups
    assert {p.ndim for p in groups[1]["params"]} == {1}
    assert min(p.ndim for p in groups[0]["params"]) == 2
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def twenty_steps() -> dict[str, list[dict[str, float]]]:
    """The first 20 updates of teacher and student of the smoke recipe, on its own data."""
    from ad2kit.data.splits import encode, load_data
    from ad2kit.models import text_model
    from ad2kit.models.text_model import predict_logits

    recipe = load_recipe("smoke", ["data.max_train_rows=400"])
    data = load_data(recipe.data, recipe.seed)
    accelerator = cpu()
    teacher = text_model.load_reference(
        RANDOM, data, seed=recipe.seed, finished=False, key="teacher.model"
    )
    split = encode(data.train, teacher.tokenizer, recipe.data.length)
    curves: dict[str, list[dict[str, float]]] = {}

    def follow(phase: Any, model: Any, logits: Any, objective: Any, part: Any) -> None:
        torch.manual_seed(recipe.seed)
        state = new_state(model, part, accelerator)
        steps = train(
            state,
            split,
            logits,
            objective,
            part,
            lambda _m: EVALUATION,
            accelerator,
            phase=phase,
            seed=recipe.seed,
        )
        curves[phase] = []
        for record in steps:
            curves[phase].append(
                {"loss": record.loss, "grad_norm": record.grad_norm, **record.terms}
            )
            if record.step == 20:
                break

    follow("teacher", teacher, None, finetuning(accelerator), recipe.teacher.finetune)
    logits = predict_logits(teacher, split, torch.device("cpu"))
    student = build_student(replace(teacher), recipe.student.layers or ())
    follow("student", student, logits, distillation(accelerator, recipe.distill), recipe.distill)
    return curves


@pytest.mark.transformers5
def test_twenty_steps_of_smoke_are_the_golden_ones() -> None:
    """Pins loss terms and gradient norms; to renew: `python -m tests.unit.test_training`."""
    golden = json.loads(GOLDEN.read_text())
    for phase, records in twenty_steps().items():
        assert len(records) == 20
        for step, (found, expected) in enumerate(zip(records, golden[phase], strict=True), 1):
            assert found == pytest.approx(expected, rel=2e-3, abs=1e-6), f"{phase} step {step}"


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(twenty_steps(), indent=1) + "\n")
