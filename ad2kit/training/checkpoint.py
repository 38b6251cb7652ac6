"""The state of an unfinished training on disk, and its evaluated weights until one is kept.

Both are exact, whole or absent, and without pickle.

    snapshots/00000088/snapshot.json        what `select` said, and what the files are
                       logits.safetensors   the answers on `select`
                       weights.safetensors  gone once another update has beaten this one

A checkpoint names the snapshots that were there when it was written. A training that goes on from
it removes later ones, and writes them again with the same bits.
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


class CheckpointFacts(Record):
    """``checkpoint.json``: where the training stood, and what a resume must share with it.

    ``points`` are the updates evaluated so far; :class:`Snapshots` has their weights.
    ``decay_from`` is the update after which patience has begun the last part of the training.
    ``scaler`` is the state of the loss scaler of fp16; empty in other precisions.
    """

    cure: ClassVar[str] = "delete the folder that it lies in, and its training begins again"

    # 1 held the best weights itself.
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
    """A model on the ``select`` split: its score, and its distance from its teacher if it has one.

    ``logits`` are its answers, float32 [rows, outputs]; ``constant`` says that all are the same.
    ``inner_losses`` are those of :func:`ad2kit.training.ad2.inner_losses`; None without an
    adversary.
    """

    score: float
    logits: torch.Tensor
    distance: float | None = None
    constant: bool = False
    inner_losses: tuple[float, float] | tuple[None, None] = (None, None)

    def point(self, step: int) -> SelectPoint:
        """Return what stays in memory of it."""
        return SelectPoint(
            step=step, score=self.score, distance=self.distance, constant=self.constant
        )

    def recorded(self) -> dict[str, float | None]:
        """Return what stands of it in the :class:`StepRecord` of its update."""
        before, after = self.inner_losses
        return {
            "select_score": self.score,
            "select_distance": self.distance,
            "inner_loss_before": before,
            "inner_loss_after": after,
        }


@dataclass
class TrainState:
    """A training under way; it lives as long as the loop that advances it.

    ``evaluation`` is that of the present update, None if there was none after it.
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
    """Write weights, optimiser moments and generator states, atomically.

    Every process calls it, and the first one writes.
    """
    tensors = {f"model.{key}": value for key, value in state.model.module.state_dict().items()}
    for index, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
    tensors |= _generators(accelerator)
    if not accelerator.is_main_process:
        return
    with whole_folder(folder) as new:
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, new / "state.safetensors"
        )
        facts = CheckpointFacts(
            inputs=inputs,
            step=state.step,
            points=tuple(state.points),
            decay_from=state.decay_from,
            scaler=accelerator.scaler.state_dict() if accelerator.scaler else {},
            environment=environment,
            sha256=sha256_of(new / "state.safetensors"),
        )
        write_record(new / "checkpoint.json", facts)


def restore_checkpoint(
    folder: Path,
    state: TrainState,
    inputs: str,
    environment: dict[str, str],
    accelerator: Accelerator,
    *,
    allow_inexact: bool,
) -> None:
    """Put ``state``, and torch's generators, back to where the checkpoint was written.

    Raises:
        RunError: the checkpoint is damaged, belongs to other inputs, or was written under another
            number of threads, device or versions (unless ``allow_inexact``), which would change
            the result in its last bits.
    """
    facts = CheckpointFacts.read(folder / "checkpoint.json")
    again = f"delete {folder} to train from the start"
    path = folder / "state.safetensors"
    found = sha256_of(path) if path.is_file() else "no file"
    if found != facts.sha256:
        raise RunError(
            f"{path} is damaged: sha256 expected {facts.sha256[:12]}…, found {found[:12]}",
            hint=again,
        )
    if facts.inputs != inputs:
        raise RunError(
            f"{folder} was written for other data, model or settings than this run has now",
            hint=again,
        )
    ours = {key: environment.get(key) for key in facts.environment}
    changed = [
        f"{key}: {theirs} then, {ours[key]} now"
        for key, theirs in facts.environment.items()
        if key in DECIDE_BITS and theirs != ours[key]
    ]
    if changed and not allow_inexact:
        raise RunError(
            f"{folder} cannot be resumed exactly; changed since: {'; '.join(changed)}",
            hint=f"restore them, or accept another result with --allow-inexact, or {again}",
        )
    tensors = load_file(path)

    def part(name: str) -> Weights:
        prefix = f"{name}."
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    state.model.module.load_state_dict(part("model"), strict=True)
    moments: dict[int, Weights] = {}
    for key, value in part("optimizer").items():
        index, _, name = key.partition(".")
        moments.setdefault(int(index), {})[name] = value
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    state.step, state.points = facts.step, list(facts.points)
    state.decay_from = facts.decay_from
    if accelerator.scaler and facts.scaler:
        accelerator.scaler.load_state_dict(facts.scaler)
    generators = part("rng")
    # Under another number of processes (--allow-inexact) some have no state of their own to resume.
    mine = f"{min(accelerator.process_index, len(generators) - 1)}"
    if accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(generators[mine], accelerator.device)
    else:
        torch.set_rng_state(generators[mine])


def _generators(accelerator: Accelerator) -> Weights:
    """Return the state of each process's generator: the one that draws dropout on its device."""
    cuda = accelerator.device.type == "cuda"
    mine = torch.cuda.get_rng_state(accelerator.device) if cuda else torch.get_rng_state()
    # Collected as wide integers: not every backend sends bytes.
    states = accelerator.gather(mine.to(accelerator.device, torch.int64)[None])
    return {f"rng.{rank}": state.to("cpu", torch.uint8) for rank, state in enumerate(states)}


_FACTS, _LOGITS, _WEIGHTS = "snapshot.json", "logits.safetensors", "weights.safetensors"


class SnapshotFacts(Record):
    """``snapshot.json``: one evaluated update, and the sha256 of its files."""

    inputs: str
    point: SelectPoint
    files: dict[str, str]


@dataclass(frozen=True)
class Snapshots:
    """The snapshots of one training.

    Args:
        folder: holds them.
        inputs: fingerprint of all that the training depends on.
        cure: what to do about one that is damaged, for messages.
    """

    folder: Path
    inputs: str
    cure: str

    def write(self, point: SelectPoint, logits: torch.Tensor, weights: Weights) -> None:
        """Write a snapshot, whole or not at all.

        Args:
            point: what ``select`` said.
            logits: on ``select``, shape [rows, outputs].
            weights: the state dict of the model.
        """
        with whole_folder(self._of(point.step)) as new:
            save_file({"logits": logits.contiguous()}, new / _LOGITS)
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in weights.items()},
                new / _WEIGHTS,
            )
            files = {name: sha256_of(new / name) for name in (_LOGITS, _WEIGHTS)}
            write_record(new / _FACTS, SnapshotFacts(inputs=self.inputs, point=point, files=files))

    def restore(self, points: Sequence[SelectPoint]) -> None:
        """Remove all snapshots but those of ``points``, and insist on these.

        Raises:
            RunError: one is missing, or is of another training.
        """
        wanted = {self._of(point.step).name for point in points}
        for folder in self.folder.iterdir() if self.folder.is_dir() else ():
            if folder.name not in wanted:
                shutil.rmtree(folder)
        for point in points:
            facts = self._facts(point.step)
            if (facts.inputs, facts.point) != (self.inputs, point):
                raise self._damaged(self._of(point.step), "it belongs to another training")

    def prune(self, points: Sequence[SelectPoint]) -> None:
        """Remove the weights that cannot be kept any more; their answers still count.

        Only what a checkpoint names may be in ``points``: what comes after it may be lost.
        """
        for step in beaten(points):
            (self._of(step) / _WEIGHTS).unlink(missing_ok=True)

    def logits(self, step: int) -> torch.Tensor:
        """Return the answers of an update on ``select``, shape [rows, outputs]."""
        return self._load(step, _LOGITS)["logits"]

    def weights(self, step: int) -> Weights:
        """Return the weights of an update that was not beaten."""
        return self._load(step, _WEIGHTS)

    def _load(self, step: int, name: str) -> Weights:
        """Read one file of a snapshot.

        Raises:
            RunError: it is not the file that was written.
        """
        path = self._of(step) / name
        expected = self._facts(step).files[name]
        found = sha256_of(path) if path.is_file() else "no file"
        if found != expected:
            raise self._damaged(path, f"sha256 expected {expected[:12]}…, found {found[:12]}")
        return load_file(path)

    def _facts(self, step: int) -> SnapshotFacts:
        path = self._of(step) / _FACTS
        if not path.is_file():
            raise self._damaged(path, "it is missing")
        return SnapshotFacts.read(path)

    def _of(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def _damaged(self, path: Path, why: str) -> RunError:
        return RunError(f"{path} is damaged: {why}", hint=self.cure)
