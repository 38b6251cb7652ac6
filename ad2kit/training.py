"""The training loop, and the objectives that it minimises.

    L(θ) = t²·KL(p_T(x) ‖ p_S(e(x); θ)) + α·t²·KL(p_T(x) ‖ p_S(e(x) + δ*; θ)) + w·CE(y, p_S(x; θ))

AD2 after Zhang, Uma Naresh and He, AAAI 2022 (see :mod:`ad2kit.adversary` for δ*, and for what is
our reading). The teacher is fine-tuned by the same loop with another objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch

from ad2kit import adversary as adv
from ad2kit import data as datasets
from ad2kit.checkpoint import TrainState
from ad2kit.errors import DivergedError
from ad2kit.losses import cross_entropy, soft_target_kl
from ad2kit.models import TextModel
from ad2kit.records import StepRecord

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from accelerate import Accelerator

    from ad2kit.data import Encoded
    from ad2kit.recipe import DistillRecipe, TrainRecipe

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Batch:
    """Padded tensors of some rows, their labels [rows], and the teacher's logits if it has any."""

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


def finetuning(accelerator: Accelerator) -> Objective:
    """Return the objective of plain fine-tuning: cross entropy with the labels."""

    def step(model: TextModel, batch: Batch, share: float) -> StepLosses:
        with accelerator.autocast():
            loss = cross_entropy(model.module(**batch.inputs).logits, batch.labels)
        accelerator.backward(loss * share)
        return StepLosses(loss.item(), {"cross_entropy": loss.item()})

    return step


def ad2(accelerator: Accelerator, settings: DistillRecipe) -> Objective:
    """Return the objective of AD2; with ``alpha`` 0 it is plain distillation, at its cost.

    The clean pass runs with a zero δ that records its gradient, so that the first ascent step
    from a zero start costs no pass of its own. The adversarial passes replay the dropout masks
    of the clean one: the adversary attacks the network that was seen, and
    ``adversarial_gain`` measures δ and not two draws of dropout.
    """

    def step(model: TextModel, batch: Batch, share: float) -> StepLosses:
        assert batch.teacher_logits is not None  # noqa: S101  (a caller's defect, not an input)
        teacher_logits, mask = batch.teacher_logits, batch.inputs["attention_mask"]
        embeddings, alpha = model.word_embeddings, settings.alpha

        def forward(delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with adv.perturbed(embeddings, delta), accelerator.autocast():
                logits = model.module(**batch.inputs).logits
            return logits, soft_target_kl(logits, teacher_logits, settings.temperature)

        dropout = _rng_state(mask.device)
        delta = adv.no_perturbation(mask, embeddings.embedding_dim)
        logits, kd = forward(delta)
        hard = cross_entropy(logits, batch.labels) if settings.hard_label_weight else None
        # KD goes first and alone: the gradient on δ is then that of the inner objective.
        accelerator.backward(kd * share, retain_graph=hard is not None)
        gradient, delta.grad = delta.grad, None
        if hard is not None:
            accelerator.backward(settings.hard_label_weight * hard * share)
        terms = {"kd": kd.item()} | ({"cross_entropy": hard.item()} if hard is not None else {})
        loss = kd.item() + (settings.hard_label_weight * hard.item() if hard is not None else 0.0)
        if alpha == 0:
            return StepLosses(loss, terms)

        def replayed(delta: torch.Tensor) -> torch.Tensor:
            _set_rng_state(mask.device, dropout)
            return forward(delta)[1]

        attack, before, steps = settings.adversary, kd.item(), settings.adversary.steps
        if attack.start == "zero":
            assert gradient is not None  # noqa: S101
            delta, steps = adv.ascend(delta, gradient, mask, attack), steps - 1
        else:
            delta = adv.random_start(mask, embeddings.embedding_dim, attack)
        # Replaying rewinds the generator; the next update must not draw this one's noise again.
        drawn = _rng_state(mask.device)
        for index in range(steps):
            value, gradient = adv.inner_gradient(replayed, delta)
            if attack.start == "random" and index == 0:
                before = value
            delta = adv.ascend(delta, gradient, mask, attack)
        adversarial = replayed(delta)
        accelerator.backward(alpha * adversarial * share)
        _set_rng_state(mask.device, drawn)
        terms["adversarial"] = adversarial.item()
        inner = {
            "inner_loss_before": before,
            "inner_loss_after": adversarial.item(),
            "adversarial_gain": adversarial.item() - kd.item(),
        }
        return StepLosses(loss + alpha * adversarial.item(), terms, inner)

    return step


def learning_rate(step: int, total_steps: int, settings: TrainRecipe) -> float:
    """Return the rate of update ``step`` (from 0): linear warm-up, then linear decay to 0."""
    warmup = math.ceil(total_steps * settings.warmup_ratio)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.lr * (total_steps - step) / max(1, total_steps - warmup)


def new_state(model: TextModel, settings: TrainRecipe, accelerator: Accelerator) -> TrainState:
    """Return the state before the first update: AdamW without decay on biases and norms."""
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for parameter in model.module.parameters():
        (decayed if parameter.ndim > 1 else plain).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=settings.lr,
    )
    module, optimizer = accelerator.prepare(model.module, optimizer)
    return TrainState(replace(model, module=module), optimizer)


def train(
    state: TrainState,
    encoded: Encoded,
    teacher_logits: torch.Tensor | None,
    objective: Objective,
    settings: TrainRecipe,
    evaluate: Callable[[TextModel], float],
    accelerator: Accelerator,
    *,
    phase: Literal["teacher", "student"],
    seed: int,
) -> Iterator[StepRecord]:
    """Advance ``state`` to its last update; the loop of every training in ad2kit.

    Yields a record after each update, with ``state`` consistent: the caller logs, saves a
    checkpoint, or stops. At the end of each epoch the model is evaluated and the best kept.

    Raises:
        DivergedError: a loss or gradient norm is not finite; the optimiser has not stepped.
    """
    model, optimizer = state.model, state.optimizer
    lengths = [len(ids) for ids in encoded.input_ids]
    steps_per_epoch = math.ceil(len(encoded) / settings.batch_size)
    total = steps_per_epoch * settings.epochs
    micro = settings.batch_size // settings.accumulation_steps
    device = accelerator.device
    batches: list[np.ndarray] = []
    while state.step < total:
        epoch, index = divmod(state.step, steps_per_epoch)
        if index == 0 or not batches:
            batches = datasets.epoch_batches(lengths, settings.batch_size, seed, epoch)
        rows = batches[index]
        lr = learning_rate(state.step, total, settings)
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.module.train()
        optimizer.zero_grad()
        loss, terms, inner = 0.0, dict[str, float](), dict[str, float]()
        for start in range(0, len(rows), micro):
            part = rows[start : start + micro]
            share = len(part) / len(rows)
            batch = Batch(
                padded(model, encoded, part, device),
                torch.from_numpy(encoded.labels[part]).to(device),
                None if teacher_logits is None else teacher_logits[part].to(device),
            )
            losses = objective(model, batch, share)
            loss += share * losses.loss
            for sums, values in ((terms, losses.terms), (inner, losses.inner)):
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + share * value
        _insist_finite(loss, "loss", phase, state.step, lr)
        norm = float(accelerator.clip_grad_norm_(model.module.parameters(), settings.max_grad_norm))
        # In fp16 the loss scaler meets such gradients by design, and skips the step itself.
        if accelerator.mixed_precision != "fp16":
            _insist_finite(norm, "gradient norm", phase, state.step, lr)
        optimizer.step()
        state.step += 1
        metric = None
        if state.step % steps_per_epoch == 0:
            metric = evaluate(model)
            state.keep_if_best(metric)
        yield StepRecord(
            phase=phase, step=state.step, total_steps=total, epoch=epoch, lr=lr, loss=loss,
            terms=terms, grad_norm=norm, examples=len(rows), select_metric=metric,
            inner_loss_before=inner.get("inner_loss_before"),
            inner_loss_after=inner.get("inner_loss_after"),
            adversarial_gain=inner.get("adversarial_gain"),
        )  # fmt: skip


@torch.inference_mode()
def predict_logits(model: TextModel, encoded: Encoded, device: torch.device) -> torch.Tensor:
    """Return the logits of all rows on clean text, without dropout, as float32 [rows, classes]."""
    model.module.eval()
    logits = torch.empty(len(encoded), len(model.labels))
    for rows in datasets.by_length([len(ids) for ids in encoded.input_ids], EVALUATION_BATCH):
        inputs = padded(model, encoded, rows, device)
        logits[rows] = model.module(**inputs).logits.float().cpu()
    return logits


def padded(
    model: TextModel, encoded: Encoded, rows: np.ndarray, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return some rows as padded tensors on a device; see :func:`ad2kit.data.collate`."""
    arrays = datasets.collate(encoded, rows, model.tokenizer)
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def _insist_finite(value: float, what: str, phase: str, step: int, lr: float) -> None:
    if not math.isfinite(value):
        raise DivergedError(
            f"{phase}: the {what} is {value} at update {step + 1} (learning rate {lr:.2e}); "
            f"the weights were not updated with it",
            hint=f"lower {'teacher.finetune' if phase == 'teacher' else 'distill'}.lr, or the "
            "adversary's radius",
        )


def _rng_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_rng_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
