"""The evaluated weights of a training, on disk until one of them is kept.

    snapshots/00000088/snapshot.json        what `select` said, and what the files are
                       logits.safetensors   the answers on `select`
                       weights.safetensors  gone once another update has beaten this one

A checkpoint names the snapshots that were there when it was written. A training that goes on from
it removes later ones, and writes them again with the same bits.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file

from ad2kit.errors import RunError
from ad2kit.files import sha256_of, whole_folder, write_record
from ad2kit.records import Record, SelectPoint
from ad2kit.selection import beaten

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    Weights = dict[str, torch.Tensor]

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
