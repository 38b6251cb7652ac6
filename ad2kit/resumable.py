"""A training that outlives its process: checkpoints, the curve on disk, and Ctrl-C."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ad2kit.checkpoint import restore_checkpoint, save_checkpoint
from ad2kit.curve import read_curve
from ad2kit.files import write_text
from ad2kit.runtime import deferred_interrupt
from ad2kit.training import new_state, train

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    from accelerate import Accelerator

    from ad2kit.checkpoint import Evaluation, TrainState
    from ad2kit.data import Encoded
    from ad2kit.models import TextModel
    from ad2kit.objectives import Objective
    from ad2kit.records import StepRecord
    from ad2kit.run_dir import RunDir
    from ad2kit.sections import TrainRecipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trainer:
    """Trains the models of one run, each to its end through any number of interruptions.

    Args:
        run: holds checkpoints and curves.
        accelerator: device, precision and processes.
        surroundings: what an exact resume must find unchanged.
        on_step: called after each update.
        allow_inexact: resume under other surroundings.
    """

    run: RunDir
    accelerator: Accelerator
    surroundings: dict[str, str]
    on_step: Callable[[StepRecord], None]
    allow_inexact: bool

    def train(
        self, model: TextModel, encoded: Encoded, teacher_logits: torch.Tensor | None,
        objective: Objective, settings: TrainRecipe, evaluate: Callable[[TextModel], Evaluation], *,
        phase: Literal["teacher", "student"], seed: int, inputs: str,
    ) -> TrainState:  # fmt: skip
        """Train a model, and leave its best weights in it; see :func:`ad2kit.training.train`.

        ``inputs`` is the fingerprint of all that the result depends on beside the surroundings:
        a checkpoint of other inputs is refused.
        """
        accelerator, curve = self.accelerator, self.run.curve(phase)
        checkpoint = self.run.checkpoint(phase)
        # Each process draws dropout of its own.
        torch.manual_seed(seed + accelerator.process_index)
        state = new_state(model, settings, accelerator)
        if accelerator.scaler:
            # Not where the training before this one has left it.
            accelerator.scaler.load_state_dict(torch.amp.GradScaler().state_dict())
        if checkpoint.is_dir():
            restore_checkpoint(
                checkpoint, state, inputs, self.surroundings, accelerator,
                allow_inexact=self.allow_inexact,
            )  # fmt: skip
            logger.info("%s: resumed after update %d", phase, state.step)
        if accelerator.is_main_process:
            records = [r for r in read_curve(curve) if r.step <= state.step]
            write_text(curve, "".join(f"{record.model_dump_json()}\n" for record in records))
        with deferred_interrupt() as interrupted:
            for record in train(
                state, encoded, teacher_logits, objective, settings, evaluate, accelerator,
                phase=phase, seed=seed,
            ):  # fmt: skip
                if accelerator.is_main_process:
                    with curve.open("a", encoding="utf-8") as lines:
                        lines.write(f"{record.model_dump_json()}\n")
                    self.on_step(record)
                stopping = self._any_process(interrupted.is_set())
                if stopping or record.step % settings.checkpoint_every_steps == 0:
                    save_checkpoint(checkpoint, state, inputs, self.surroundings, accelerator)
                if stopping:
                    logger.info("%s: stopped after update %d, saved", phase, record.step)
                    raise KeyboardInterrupt
        state.model.module.load_state_dict(state.best_weights, strict=True)
        # Else the next training would hold this one's moments, and unscale its gradients in fp16.
        accelerator.free_memory()
        return state

    def clean_up(self, phase: str) -> None:
        """Remove the checkpoint of a training whose result is saved."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.run.checkpoint(phase), ignore_errors=True)

    def _any_process(self, flag: bool) -> bool:
        """Agree on a flag, because an update needs all processes."""
        if self.accelerator.num_processes == 1:
            return flag
        found = torch.tensor(int(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(found, "sum").item())
