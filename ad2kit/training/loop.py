"""The training loop, and the trainer that resumes it after an interruption.

There is one loop for every training: the teacher's fine-tuning and the student's distillation
differ only in their objective (see :mod:`ad2kit.training.ad2`). They share checkpoints, the curve
on disk and the handling of Ctrl-C.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from ad2kit.data import splits
from ad2kit.models.layers import layer_stack
from ad2kit.models.translate import recompute_activations
from ad2kit.run.errors import DivergedError, ModelError
from ad2kit.run.files import write_text
from ad2kit.run.machine import deferred_interrupt
from ad2kit.training.ad2 import Batch, StepLosses
from ad2kit.training.checkpoint import (
    Evaluation,
    Snapshots,
    TrainState,
    restore_checkpoint,
    save_checkpoint,
)
from ad2kit.training.records import StepRecord, read_curve
from ad2kit.training.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from ad2kit.data.splits import Encoded
    from ad2kit.models.text_model import TextModel
    from ad2kit.run.folder import RunDir
    from ad2kit.run.sections import ComputeRecipe, TrainRecipe
    from ad2kit.training.ad2 import Objective
    from ad2kit.training.records import Selection, SelectPoint

    Choose = Callable[[Sequence[SelectPoint], Sequence[torch.Tensor]], Selection]


logger = logging.getLogger(__name__)


def new_state(model: TextModel, settings: TrainRecipe, accelerator: Accelerator) -> TrainState:
    """Return the state before the first update: AdamW without weight decay on biases and norms.

    The module is moved to the device but not wrapped: the loop sums the gradients of several
    processes once per update, and not once per backward pass.
    """
    model.module.to(accelerator.device)
    decayed = [parameter for parameter in model.module.parameters() if parameter.ndim > 1]
    undecayed = [parameter for parameter in model.module.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
        ],
        lr=settings.rate,
        fused=True,
    )
    return TrainState(replace(model), accelerator.prepare_optimizer(optimizer))


def train(
    state: TrainState,
    encoded: Encoded,
    teacher_logits: torch.Tensor | None,
    objective: Objective,
    settings: TrainRecipe,
    evaluate: Callable[[TextModel], Evaluation],
    accelerator: Accelerator,
    *,
    phase: Literal["teacher", "student"],
    seed: int,
) -> Iterator[StepRecord]:
    """Advance ``state`` to its last update; the loop of every training in ad2kit.

    After each update it yields a record, and ``state`` is consistent: the caller logs, saves a
    checkpoint, or stops. The schedule says after which updates the model is evaluated;
    ``state.evaluation`` then holds the evaluation, for the caller to store. Several processes share
    the rows of each update, and keep equal weights.

    Args:
        state: the training to advance, in place.
        encoded: the training rows.
        teacher_logits: logits of their windows, shape [windows, outputs]; None without a teacher.
        objective: computes losses and gradients of a batch.
        settings: settings of the training.
        evaluate: evaluates the model on ``select``.
        accelerator: gives device, precision and processes.
        phase: the model that is trained, for records and messages.
        seed: seeds the order of the batches.

    Raises:
        DivergedError: a loss or gradient norm is not finite; the optimiser has not stepped.
        ModelError: one row alone does not fit into the memory of the GPU.
    """
    model = state.model
    optimizer = state.optimizer
    plan = Schedule.planned(len(encoded), settings)
    parts = settings.accumulation_steps
    batches: list[np.ndarray] = []
    while state.step < (schedule := plan.decaying_from(state.decay_from)).total:
        start = time.perf_counter()
        epoch, index = divmod(state.step, plan.steps_per_epoch)
        if index == 0 or not batches:
            batches = splits.epoch_batches(encoded.lengths, settings.batch_size, seed, epoch)
        rows = batches[index]
        lr = settings.rate * schedule.rate(state.step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.module.train()
        sums, parts = _accumulate_in_memory(
            model, optimizer, encoded, teacher_logits, objective, rows, parts, accelerator, phase
        )
        sums = _sum_over_processes(model, sums, accelerator)
        _check_finite(sums.loss, "loss", phase, state.step, lr)
        norm = float(accelerator.clip_grad_norm_(model.module.parameters(), settings.max_grad_norm))
        # In fp16 such gradients are normal: the loss scaler then skips the step itself.
        if accelerator.mixed_precision != "fp16":
            _check_finite(norm, "gradient norm", phase, state.step, lr)
        optimizer.step()
        state.step += 1
        record = StepRecord(
            phase=phase,
            step=state.step,
            total_steps=schedule.total,
            epoch=epoch,
            lr=lr,
            loss=sums.loss,
            terms=sums.terms,
            grad_norm=norm,
            examples=len(rows),
            seconds=time.perf_counter() - start,
        )
        state.evaluation = evaluate(model) if schedule.evaluates(state.step) else None
        if state.evaluation is not None:
            state.points.append(state.evaluation.point(state.step))
            if state.decay_from is None and plan.is_stale(state.points, settings.patience):
                state.decay_from = state.step
            record = record.model_copy(update=state.evaluation.recorded())
        yield record


def _accumulate_in_memory(
    model: TextModel,
    optimizer: AcceleratedOptimizer,
    encoded: Encoded,
    teacher_logits: torch.Tensor | None,
    objective: Objective,
    rows: np.ndarray,
    parts: int,
    accelerator: Accelerator,
    phase: str,
) -> tuple[StepLosses, int]:
    """Compute the gradients of an update in parts; double their number until they fit in memory.

    Returns:
        The losses of the update, and the number of parts.
    """
    while True:
        optimizer.zero_grad()
        try:
            losses = _accumulate(
                model, encoded, teacher_logits, objective, rows, parts, accelerator
            )
        except torch.OutOfMemoryError as error:
            if parts >= len(rows):
                longest = encoded.lengths[rows].max()
                limit = "a smaller data.max_length_tokens"
                if encoded.first_windows is not None:
                    limit = "data.long_texts=cut"
                raise ModelError(
                    f"{phase}: one text of {longest} tokens does not fit into the memory of the "
                    "GPU",
                    hint="set compute.gradient_checkpointing=true, compute.precision=bf16, "
                    f"or {limit}",
                ) from error
            parts *= 2
        else:
            return losses, parts


def _accumulate(
    model: TextModel,
    encoded: Encoded,
    teacher_logits: torch.Tensor | None,
    objective: Objective,
    rows: np.ndarray,
    parts: int,
    accelerator: Accelerator,
) -> StepLosses:
    """Compute this process's share of an update in parts; gradients and losses are summed.

    A part reads at most as many windows as it has texts when each text is one window: its memory is
    that of a batch of texts of the model's length, or of one text.
    """
    process_rows = rows[accelerator.process_index :: accelerator.num_processes]
    most_windows = math.ceil(len(process_rows) / parts)
    chunks = [
        batch
        for chunk in np.array_split(process_rows, parts)
        for batch in encoded.batches(chunk, most_windows)
    ]
    weight = 1.0
    if not chunks:
        # With fewer rows than processes this process takes a row with weight 0, because all
        # processes have to take part in the update.
        chunks = [rows[:1]]
        weight = 0.0
    device = accelerator.device
    sums = StepLosses(0.0, {})
    for chunk in chunks:
        share = weight * len(chunk) / len(rows)
        batch = Batch.of(model, encoded, chunk, teacher_logits, device)
        losses = objective(model, batch, share)
        sums.loss += share * losses.loss
        for name, value in losses.terms.items():
            sums.terms[name] = sums.terms.get(name, 0.0) + share * value
    return sums


def _sum_over_processes(model: TextModel, sums: StepLosses, accelerator: Accelerator) -> StepLosses:
    """Sum gradients and losses, which each process has scaled by its share of the rows."""
    if accelerator.num_processes == 1:
        return sums
    # All processes run the same graph, so a parameter has a gradient in all of them or in none.
    # AdamW skips a parameter without one.
    gradients = [
        parameter.grad for parameter in model.module.parameters() if parameter.grad is not None
    ]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    totals = accelerator.reduce(flat, "sum").split([gradient.numel() for gradient in gradients])
    for gradient, total in zip(gradients, totals, strict=True):
        gradient.copy_(total.view_as(gradient))
    values = torch.tensor([sums.loss, *sums.terms.values()], device=accelerator.device)
    loss, *terms = accelerator.reduce(values, "sum").tolist()
    return StepLosses(loss, dict(zip(sums.terms, terms, strict=True)))


def check_compute(model: TextModel, compute: ComputeRecipe) -> None:
    """Refuse settings of speed and memory that the family of a model does not support."""
    module = model.module
    family = module.config.model_type
    if compute.gradient_checkpointing and not module.supports_gradient_checkpointing:
        raise ModelError(
            f"compute.gradient_checkpointing: '{family}' does not support it",
            hint="leave it out, and lower distill.batch_size or raise accumulation_steps",
        )
    if compute.compile and layer_stack(module, module.config.num_hidden_layers) is None:
        raise ModelError(
            f"compute.compile: the layers of a '{family}' share their weights, or cannot be found",
            hint="set compute.compile=false",
        )


def prepare(model: TextModel, compute: ComputeRecipe) -> None:
    """Apply the settings of speed and memory to a model before its training, in place.

    Layers are compiled one by one, because the word embeddings and their hook must not be compiled.

    Raises:
        ModelError: see :func:`check_compute`.
    """
    check_compute(model, compute)
    module = model.module
    if compute.gradient_checkpointing:
        recompute_activations(module)
    if compute.compile:
        stack = layer_stack(module, module.config.num_hidden_layers) or ""
        for layer in module.get_submodule(stack.rstrip(".")).children():
            layer.compile(dynamic=True)


def _check_finite(value: float, quantity: str, phase: str, step: int, lr: float) -> None:
    """Refuse a loss or a gradient norm that is not a finite number."""
    if not math.isfinite(value):
        section = "teacher.finetune" if phase == "teacher" else "distill"
        raise DivergedError(
            f"{phase}: the {quantity} is {value} at update {step + 1} (learning rate {lr:.2e}); "
            f"the weights were not updated with it",
            hint=f"lower {section}.lr, or the adversary's radius",
        )


@dataclass(frozen=True)
class Trainer:
    """Trains the models of one run, and resumes a training after any number of interruptions.

    Args:
        run: the run folder, which holds checkpoints and curves.
        accelerator: gives device, precision and processes.
        surroundings: the environment that an exact resume must find unchanged.
        on_step: called after each update.
        allow_inexact: also resume in another environment.
    """

    run: RunDir
    accelerator: Accelerator
    surroundings: dict[str, str]
    on_step: Callable[[StepRecord], None]
    allow_inexact: bool

    def train(
        self,
        model: TextModel,
        encoded: Encoded,
        teacher_logits: torch.Tensor | None,
        objective: Objective,
        settings: TrainRecipe,
        evaluate: Callable[[TextModel], Evaluation],
        choose: Choose,
        *,
        phase: Literal["teacher", "student"],
        seed: int,
        inputs: str,
        start: Callable[[TextModel], None] | None = None,
    ) -> tuple[TrainState, Selection, torch.Tensor]:
        """Train a model; at the end it has the weights of one of its updates.

        The other arguments and the errors are those of :func:`ad2kit.training.loop.train`.
        ``choose`` chooses the update to keep, given all evaluations and their logits on ``select``.
        ``inputs`` is the fingerprint of everything that the result depends on, except the
        surroundings; a checkpoint of other inputs is refused. ``start`` changes the model before
        the first update; the result is evaluated.

        Returns:
            The state at the end, the selection, and the kept update's logits on ``select``.
        """
        accelerator = self.accelerator
        curve = self.run.curve(phase)
        checkpoint = self.run.checkpoint(phase)
        cure = f"delete {checkpoint} to train from the start"
        snapshots = Snapshots(self.run.snapshots(phase), inputs, cure=cure)
        # Each process draws its own dropout masks.
        torch.manual_seed(seed + accelerator.process_index)
        state = new_state(model, settings, accelerator)
        if accelerator.scaler:
            # A fresh state: the previous training has changed the scaler.
            accelerator.scaler.load_state_dict(torch.amp.GradScaler().state_dict())
        self._resume(state, snapshots, phase)
        if start is not None and not state.points and state.step == 0:
            start(state.model)
            evaluation = evaluate(state.model)
            state.points.append(evaluation.point(0))
            self._write(snapshots, state, evaluation)
        with deferred_interrupt() as interrupted:
            for record in train(
                state,
                encoded,
                teacher_logits,
                objective,
                settings,
                evaluate,
                accelerator,
                phase=phase,
                seed=seed,
            ):
                if state.evaluation is not None:
                    self._write(snapshots, state, state.evaluation)
                if accelerator.is_main_process:
                    with curve.open("a", encoding="utf-8") as lines:
                        lines.write(f"{record.model_dump_json()}\n")
                    self.on_step(record)
                if state.decay_from == state.step:
                    message = "%s: %d evaluations brought nothing new, the rate falls from here on"
                    logger.info(message, phase, settings.patience)
                stopping = self._any_process(interrupted.is_set())
                if stopping or record.step % settings.checkpoint_every_steps == 0:
                    self._save(checkpoint, snapshots, state)
                if stopping:
                    logger.info("%s: stopped after update %d, saved", phase, record.step)
                    raise KeyboardInterrupt
        accelerator.wait_for_everyone()  # until the first process has written the snapshots
        selection = choose(state.points, [snapshots.logits(point.step) for point in state.points])
        logger.info("%s: %s", phase, selection.reason)
        kept_weights = snapshots.weights(selection.kept_step)
        state.model.module.load_state_dict(kept_weights, strict=True)
        # Else the next training would keep these moments, and unscale these gradients in fp16.
        accelerator.free_memory()
        return state, selection, snapshots.logits(selection.kept_step)

    def _resume(self, state: TrainState, snapshots: Snapshots, phase: str) -> None:
        """Resume from the checkpoint, if any; remove the snapshots and records after it."""
        checkpoint = self.run.checkpoint(phase)
        curve = self.run.curve(phase)
        if checkpoint.is_dir():
            restore_checkpoint(
                checkpoint,
                state,
                snapshots.inputs,
                self.surroundings,
                self.accelerator,
                allow_inexact=self.allow_inexact,
            )
            logger.info("%s: resumed after update %d", phase, state.step)
        if self.accelerator.is_main_process:
            snapshots.restore(state.points)
            records = [record for record in read_curve(curve) if record.step <= state.step]
            write_text(curve, "".join(f"{record.model_dump_json()}\n" for record in records))

    def _save(self, checkpoint: Path, snapshots: Snapshots, state: TrainState) -> None:
        """Write a checkpoint; then the weights that can no longer be kept are removed."""
        save_checkpoint(checkpoint, state, snapshots.inputs, self.surroundings, self.accelerator)
        if self.accelerator.is_main_process:
            snapshots.prune(state.points)

    def _write(self, snapshots: Snapshots, state: TrainState, evaluation: Evaluation) -> None:
        """Write a snapshot of the last point; only the first process writes."""
        if self.accelerator.is_main_process:
            snapshots.write(state.points[-1], evaluation.logits, state.model.module.state_dict())

    def clean_up(self, phase: str) -> None:
        """Remove checkpoint and snapshots of a training whose result is saved."""
        if self.accelerator.is_main_process:
            for folder in (self.run.checkpoint(phase), self.run.snapshots(phase)):
                shutil.rmtree(folder, ignore_errors=True)

    def _any_process(self, flag: bool) -> bool:
        """Tell whether the flag of any process is set: all processes have to stop together."""
        if self.accelerator.num_processes == 1:
            return flag
        count = torch.tensor(int(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(count, "sum").item())
