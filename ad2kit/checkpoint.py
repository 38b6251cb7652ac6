"""The state of an unfinished training, on disk: exact, whole or absent, and without pickle."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from ad2kit.errors import RunError
from ad2kit.files import sha256_of, whole_folder, write_record
from ad2kit.records import Record

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate.optimizer import AcceleratedOptimizer

    from ad2kit.models import TextModel

Weights = dict[str, torch.Tensor]


class CheckpointFacts(Record):
    """``checkpoint.json``: where the training stood, and what a resume must share with it."""

    inputs: str
    step: int
    best_step: int
    best_metric: float
    environment: dict[str, str]
    sha256: str


@dataclass
class TrainState:
    """A training under way; it lives as long as the loop that advances it."""

    model: TextModel
    optimizer: AcceleratedOptimizer
    step: int = 0
    best_step: int = 0
    best_metric: float = -math.inf
    best_weights: Weights = field(default_factory=dict)

    def keep_if_best(self, metric: float) -> None:
        """Keep a copy of the weights if ``metric`` is above every earlier one."""
        if metric > self.best_metric:
            self.best_step, self.best_metric = self.step, metric
            self.best_weights = {
                key: value.detach().cpu().clone()
                for key, value in self.model.module.state_dict().items()
            }


def save_checkpoint(
    folder: Path, state: TrainState, inputs: str, environment: dict[str, str]
) -> None:
    """Write weights, best weights, optimiser moments and generator states, atomically."""
    tensors = {f"model.{key}": value for key, value in state.model.module.state_dict().items()}
    tensors |= {f"best.{key}": value for key, value in state.best_weights.items()}
    for index, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    with whole_folder(folder) as new:
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, new / "state.safetensors"
        )
        facts = CheckpointFacts(
            inputs=inputs,
            step=state.step,
            best_step=state.best_step,
            best_metric=state.best_metric,
            environment=environment,
            sha256=sha256_of(new / "state.safetensors"),
        )
        write_record(new / "checkpoint.json", facts)


def restore_checkpoint(
    folder: Path, state: TrainState, inputs: str, environment: dict[str, str], *,
    allow_inexact: bool,
) -> None:  # fmt: skip
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
        if theirs != ours[key]
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
    state.step = facts.step
    state.best_step, state.best_metric = facts.best_step, facts.best_metric
    state.best_weights = part("best")
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])
