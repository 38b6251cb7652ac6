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
from ad2kit.snapshots import Snapshots
from ad2kit.training import new_state, train

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Literal

    from accelerate import Accelerator

    from ad2kit.checkpoint import Evaluation, TrainState
    from ad2kit.data import Encoded
    from ad2kit.models import TextModel
    from ad2kit.objectives import Objective
    from ad2kit.records import Selection, SelectPoint, StepRecord
    from ad2kit.run_dir import RunDir
    from ad2kit.sections import TrainRecipe

    Choose = Callable[[Sequence[SelectPoint], Sequence[torch.Tensor]], Selection]

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
        objective: Objective, settings: TrainRecipe, evaluate: Callable[[TextModel], Evaluation],
        choose: Choose, *, phase: Literal["teacher", "student"], seed: int, inputs: str,
        start: Callable[[TextModel], None] | None = None,
    ) -> tuple[TrainState, Selection, torch.Tensor]:  # fmt: skip
        """Train a model, and leave the weights of one of its updates in it.

        See :func:`ad2kit.training.train`. ``choose`` says which update, given all that were
        evaluated and their logits on ``select``. ``inputs`` is the fingerprint of all that the
        result depends on beside the surroundings: a checkpoint of other inputs is refused.
        ``start`` changes the model before the first update, and what it makes is evaluated.

        Returns:
            The state at its end, what was kept, and its logits on ``select``.
        """
        accelerator, curve = self.accelerator, self.run.curve(phase)
        checkpoint = self.run.checkpoint(phase)
        again = f"delete {checkpoint} to train from the start"
        snapshots = Snapshots(self.run.snapshots(phase), inputs, cure=again)
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
            snapshots.restore(state.points)
            records = [r for r in read_curve(curve) if r.step <= state.step]
            write_text(curve, "".join(f"{record.model_dump_json()}\n" for record in records))
        if start is not None and not state.points and state.step == 0:
            start(state.model)
            found = evaluate(state.model)
            state.points.append(found.point(0))
            self._write(snapshots, state, found)
        with deferred_interrupt() as interrupted:
            for record in train(
                state, encoded, teacher_logits, objective, settings, evaluate, accelerator,
                phase=phase, seed=seed,
            ):  # fmt: skip
                if state.evaluation is not None:
                    self._write(snapshots, state, state.evaluation)
                if accelerator.is_main_process:
                    with curve.open("a", encoding="utf-8") as lines:
                        lines.write(f"{record.model_dump_json()}\n")
                    self.on_step(record)
                if state.decay_from == state.step:
                    logger.info(
                        "%s: %d evaluations brought nothing new, the rate falls from here on",
                        phase, settings.patience,
                    )  # fmt: skip
                stopping = self._any_process(interrupted.is_set())
                if stopping or record.step % settings.checkpoint_every_steps == 0:
                    save_checkpoint(checkpoint, state, inputs, self.surroundings, accelerator)
                    if accelerator.is_main_process:
                        snapshots.prune(state.points)
                if stopping:
                    logger.info("%s: stopped after update %d, saved", phase, record.step)
                    raise KeyboardInterrupt
        accelerator.wait_for_everyone()  # the first has written what all read now
        selection = choose(state.points, [snapshots.logits(point.step) for point in state.points])
        logger.info("%s: %s", phase, selection.reason)
        kept = snapshots.weights(selection.kept_step)
        state.model.module.load_state_dict(kept, strict=True)
        # Else the next training would hold this one's moments, and unscale its gradients in fp16.
        accelerator.free_memory()
        return state, selection, snapshots.logits(selection.kept_step)

    def _write(self, snapshots: Snapshots, state: TrainState, found: Evaluation) -> None:
        if self.accelerator.is_main_process:
            snapshots.write(state.points[-1], found.logits, state.model.module.state_dict())

    def clean_up(self, phase: str) -> None:
        """Remove what is left of a training whose result is saved."""
        if self.accelerator.is_main_process:
            for folder in (self.run.checkpoint(phase), self.run.snapshots(phase)):
                shutil.rmtree(folder, ignore_errors=True)

    def _any_process(self, flag: bool) -> bool:
        """Agree on a flag, because an update needs all processes."""
        if self.accelerator.num_processes == 1:
            return flag
        found = torch.tensor(int(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(found, "sum").item())
