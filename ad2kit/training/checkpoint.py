"""The checkpoint of an unfinished training, and snapshots of its evaluated weights.

Both are exact, whole or absent, and without pickle.

    snapshots/00000088/snapshot.json        the evaluation on `select`, and sha256 of the files
                       logits.safetensors   the logits on `select`
                       weights.safetensors  removed once another update has beaten this one

A checkpoint names the snapshots that existed when it was written. A training that resumes from it
removes later snapshots, and writes them again with the same bits.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file

from ad2kit.run.errors import RunError
from ad2kit.run.files import sha256_of, whole_folder, write_record
from ad2kit.run.machine import DECIDE_BITS
from ad2kit.run.records import Record
from ad2kit.training.records import SelectPoint
from ad2kit.training.selection import beaten

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from ad2kit.models.text_model import TextModel


Weights = dict[str, torch.Tensor]


_FACTS = "snapshot.json"
_LOGITS = "logits.safetensors"
_WEIGHTS = "weights.safetensors"


class CheckpointFacts(Record):
    """``checkpoint.json``: the position of a training, and the conditions for an exact resume.

    ``points`` are the updates evaluated so far; :class:`Snapshots` has their weights.
    ``decay_from`` is the update after which patience made the learning rate fall.
    ``scaler`` is the state of the loss scaler of fp16; empty in other precisions.
    """

    cure: ClassVar[str] = "delete the folder that it lies in, and its training begins again"

    # Version 1 held the best weights itself.
    schema_version: Literal[2] = 2  # type: ignore[assignment]
    inputs: str
    step: int
    points: tuple[SelectPoint, ...]
    decay_from: int | None
    scaler: dict[str, float]
    environment: dict[str, str]
    sha256: str


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a model on ``select``: its score, and its distance from a teacher, if any.

    ``logits`` have shape [rows, outputs], float32. ``constant`` says that all answers are the same.
    ``inner_losses`` come from :func:`ad2kit.training.ad2.inner_losses`; (None, None) without an
    adversary.
    """

    score: float
    logits: torch.Tensor
    distance: float | None = None
    constant: bool = False
    inner_losses: tuple[float, float] | tuple[None, None] = (None, None)

    def point(self, step: int) -> SelectPoint:
        """Return the part of the evaluation that stays in memory."""
        return SelectPoint(
            step=step, score=self.score, distance=self.distance, constant=self.constant
        )

    def recorded(self) -> dict[str, float | None]:
        """Return the fields of the evaluation in the :class:`StepRecord` of its update."""
        before, after = self.inner_losses
        return {
            "select_score": self.score,
            "select_distance": self.distance,
            "inner_loss_before": before,
            "inner_loss_after": after,
        }


@dataclass
class TrainState:
    """A training in progress; it lives as long as the loop that advances it.

    ``evaluation`` belongs to the last update; None if that update was not evaluated.
    """

    model: TextModel
    optimizer: AcceleratedOptimizer
    step: int = 0
    points: list[SelectPoint] = field(default_factory=list)
    decay_from: int | None = None
    evaluation: Evaluation | None = None


def save_checkpoint(
    folder: Path,
    state: TrainState,
    inputs: str,
    environment: dict[str, str],
    accelerator: Accelerator,
) -> None:
    """Write weights, optimiser moments and generator states, whole or not at all.

    Every process calls this function, and the first one writes.
    """
    tensors = {f"model.{key}": value for key, value in state.model.module.state_dict().items()}
    for index, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
    tensors |= _generators(accelerator)
    if not accelerator.is_main_process:
        return
    contiguous = {key: value.contiguous() for key, value in tensors.items()}
    with whole_folder(folder) as temporary:
        state_file = temporary / "state.safetensors"
        save_file(contiguous, state_file)
        facts = CheckpointFacts(
            inputs=inputs,
            step=state.step,
            points=tuple(state.points),
            decay_from=state.decay_from,
            scaler=accelerator.scaler.state_dict() if accelerator.scaler else {},
            environment=environment,
            sha256=sha256_of(state_file),
        )
        write_record(temporary / "checkpoint.json", facts)


def restore_checkpoint(
    folder: Path,
    state: TrainState,
    inputs: str,
    environment: dict[str, str],
    accelerator: Accelerator,
    *,
    allow_inexact: bool,
) -> None:
    """Restore ``state``, and torch's generators, from a checkpoint.

    Raises:
        RunError: the checkpoint is damaged, belongs to other inputs, or was written under another
            number of threads, device or versions (unless ``allow_inexact``), which would change
            the last bits of the result.
    """
    facts = CheckpointFacts.read(folder / "checkpoint.json")
    path = folder / "state.safetensors"
    _check_resumable(folder, facts, inputs, environment, allow_inexact=allow_inexact)
    tensors = load_file(path)

    def part(name: str) -> Weights:
        prefix = f"{name}."
        return {
            key.removeprefix(prefix): tensor
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }

    state.model.module.load_state_dict(part("model"), strict=True)
    moments: dict[int, Weights] = {}
    for key, tensor in part("optimizer").items():
        index, _, name = key.partition(".")
        moments.setdefault(int(index), {})[name] = tensor
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    state.step = facts.step
    state.points = list(facts.points)
    state.decay_from = facts.decay_from
    if accelerator.scaler and facts.scaler:
        accelerator.scaler.load_state_dict(facts.scaler)
    rng_states = part("rng")
    # With --allow-inexact there may be more processes now; the new ones take the last state.
    rank = min(accelerator.process_index, len(rng_states) - 1)
    rng_state = rng_states[f"{rank}"]
    if accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(rng_state, accelerator.device)
    else:
        torch.set_rng_state(rng_state)


def _check_resumable(
    folder: Path,
    facts: CheckpointFacts,
    inputs: str,
    environment: dict[str, str],
    *,
    allow_inexact: bool,
) -> None:
    """Refuse a checkpoint that cannot be resumed; see :func:`restore_checkpoint`."""
    hint = f"delete {folder} to train from the start"
    path = folder / "state.safetensors"
    sha256 = sha256_of(path) if path.is_file() else "no file"
    if sha256 != facts.sha256:
        raise RunError(
            f"{path} is damaged: sha256 expected {facts.sha256[:12]}…, found {sha256[:12]}",
            hint=hint,
        )
    if facts.inputs != inputs:
        raise RunError(
            f"{folder} was written for other data, model or settings than this run has now",
            hint=hint,
        )
    changes = [
        f"{key}: {value} then, {environment.get(key)} now"
        for key, value in facts.environment.items()
        if key in DECIDE_BITS and value != environment.get(key)
    ]
    if changes and not allow_inexact:
        raise RunError(
            f"{folder} cannot be resumed exactly; changed since: {'; '.join(changes)}",
            hint=f"restore them, or accept another result with --allow-inexact, or {hint}",
        )


def _generators(accelerator: Accelerator) -> Weights:
    """Return the state of each process's generator, which draws dropout on its device."""
    on_cuda = accelerator.device.type == "cuda"
    rng_state = torch.cuda.get_rng_state(accelerator.device) if on_cuda else torch.get_rng_state()
    # Gathered as wide integers, because not every backend can send bytes.
    rng_states = accelerator.gather(rng_state.to(accelerator.device, torch.int64)[None])
    return {f"rng.{rank}": state.to("cpu", torch.uint8) for rank, state in enumerate(rng_states)}


class SnapshotFacts(Record):
    """``snapshot.json``: one evaluated update, and the sha256 of its files."""

    inputs: str
    point: SelectPoint
    files: dict[str, str]


@dataclass(frozen=True)
class Snapshots:
    """The snapshots of one training.

    Args:
        folder: the folder that holds the snapshots.
        inputs: fingerprint of everything that the training depends on.
        cure: the remedy for a damaged snapshot, for messages.
    """

    folder: Path
    inputs: str
    cure: str

    def write(self, point: SelectPoint, logits: torch.Tensor, weights: Weights) -> None:
        """Write a snapshot, whole or not at all.

        Args:
            point: the evaluation on ``select``.
            logits: logits on ``select``, shape [rows, outputs].
            weights: the state dict of the model.
        """
        with whole_folder(self._of(point.step)) as temporary:
            save_file({"logits": logits.contiguous()}, temporary / _LOGITS)
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in weights.items()},
                temporary / _WEIGHTS,
            )
            files = {name: sha256_of(temporary / name) for name in (_LOGITS, _WEIGHTS)}
            facts = SnapshotFacts(inputs=self.inputs, point=point, files=files)
            write_record(temporary / _FACTS, facts)

    def restore(self, points: Sequence[SelectPoint]) -> None:
        """Remove all snapshots except those of ``points``, and insist on these.

        Raises:
            RunError: a snapshot of ``points`` is missing, or belongs to another training.
        """
        kept_names = {self._of(point.step).name for point in points}
        folders = self.folder.iterdir() if self.folder.is_dir() else ()
        for folder in folders:
            if folder.name not in kept_names:
                shutil.rmtree(folder)
        for point in points:
            facts = self._facts(point.step)
            if (facts.inputs, facts.point) != (self.inputs, point):
                raise self._damaged(self._of(point.step), "it belongs to another training")

    def prune(self, points: Sequence[SelectPoint]) -> None:
        """Remove the weights that cannot be kept any more; their logits are still needed.

        A checkpoint must name all of ``points``, because later points may be lost.
        """
        for step in beaten(points):
            (self._of(step) / _WEIGHTS).unlink(missing_ok=True)

    def logits(self, step: int) -> torch.Tensor:
        """Return the logits of an update on ``select``, shape [rows, outputs]."""
        return self._load(step, _LOGITS)["logits"]

    def weights(self, step: int) -> Weights:
        """Return the weights of an update that no other update has beaten."""
        return self._load(step, _WEIGHTS)

    def _load(self, step: int, name: str) -> Weights:
        """Read one file of a snapshot.

        Raises:
            RunError: it is not the file that was written.
        """
        path = self._of(step) / name
        expected = self._facts(step).files[name]
        actual = sha256_of(path) if path.is_file() else "no file"
        if actual != expected:
            raise self._damaged(path, f"sha256 expected {expected[:12]}…, found {actual[:12]}")
        return load_file(path)

    def _facts(self, step: int) -> SnapshotFacts:
        path = self._of(step) / _FACTS
        if not path.is_file():
            raise self._damaged(path, "it is missing")
        return SnapshotFacts.read(path)

    def _of(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def _damaged(self, path: Path, reason: str) -> RunError:
        return RunError(f"{path} is damaged: {reason}", hint=self.cure)
