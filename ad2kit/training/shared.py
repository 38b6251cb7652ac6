"""The store that runs in one folder share: fine-tuned teachers, their reports and their logits.

    runs/.shared/teachers/<key>/        as in a run folder
    runs/.shared/teacher-reports/<key>.json
    runs/.shared/logits/<key>.safetensors
    runs/.shared/tables/<key>/          rows of large tables, see ad2kit.data.reading
    runs/.shared/tokens/<key>/          token ids of large splits, see ad2kit.data.splits.encode
    runs/.shared/plans/<key>.json       recipes that --max-minutes has planned
    runs/.shared/measured.json          measured costs of systems, see ad2kit.campaigns.fit.costs

A key is the fingerprint of everything that the content depends on, so that a change of any of it
leads to another entry. Only `measured.json` is updated. A run keeps its own teacher (by hard links
if the file system has them), so that deleting this folder costs time but no result of a run. There
is one exception: a plan depends on the speed of the machine when it was made. Without it the same
command with `--max-minutes` may plan, and so train, another run.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np

from ad2kit.data import splits
from ad2kit.models import given, text_model
from ad2kit.models.records import ModelManifest, is_given
from ad2kit.models.text_model import predict_logits
from ad2kit.run.files import (
    fingerprint,
    whole_file,
    whole_folder,
    write_record,
    writing,
)
from ad2kit.run.machine import accelerator
from ad2kit.statistics import metrics
from ad2kit.statistics.logits import answers

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import torch

    from ad2kit.data.splits import Data
    from ad2kit.models.records import TeacherReport
    from ad2kit.run.recipe import Recipe


def data_sha256(recipe: Recipe, data: Data) -> str:
    """Return the fingerprint of the labelled data and of the settings that read them."""
    return fingerprint(
        data.labels,
        data.train.sha256,
        data.select.sha256,
        data.validation.sha256,
        *recipe.data.length.facts,
        recipe.data.judged_by,
    )


def take_teacher(store: Path, key: str, target: Path) -> bool:
    """Link a stored teacher to ``target``; return False if there is none."""
    source = store / "teachers" / key[:16]
    if not source.is_dir():
        return False
    link_folder(source, target)
    return True


def give_teacher(store: Path, key: str, source: Path) -> None:
    """Store a finished teacher for other runs."""
    target = store / "teachers" / key[:16]
    with writing(store):
        if not target.is_dir():
            link_folder(source, target)


def teacher_report_file(store: Path, key: str) -> Path:
    """Return the path of the report on a teacher, whether or not it exists."""
    return store / "teacher-reports" / f"{key[:16]}.json"


def write_teacher_report(path: Path, report: TeacherReport) -> None:
    """Store a report at a path from :func:`teacher_report_file`, for this run and others."""
    with writing(path.parent.parent):
        path.parent.mkdir(exist_ok=True)
        write_record(path, report)


def plan_file(store: Path, key: str) -> Path:
    """Return the path of the recipe planned for a recipe and its minutes, existing or not."""
    return store / "plans" / f"{key[:16]}.json"


def logits_file(store: Path, key: str) -> Path:
    """Return the path of the logits of a key, whether or not it exists."""
    return store / "logits" / f"{key[:16]}.safetensors"


def read_logits(path: Path) -> torch.Tensor:
    """Return stored logits, shape [rows, outputs]; the file is mapped into memory.

    Raises:
        RunError: the file is damaged.
    """
    return given.stored_tensor(path, "logits", hint=f"delete {path} and run again")


def write_logits(path: Path, shape: tuple[int, int], blocks: Iterable[torch.Tensor]) -> None:
    """Store logits at a path from :func:`logits_file`, for this run and others.

    Args:
        path: path of the file.
        shape: number of rows and outputs.
        blocks: the logits of consecutive rows, float32; they may take hours to compute.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The store is locked only for the copy. Until then the file has no name, and so a killed
    # process leaves nothing.
    with tempfile.TemporaryFile(dir=path.parent) as unfinished:
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}
        header = json.dumps({"logits": entry}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # as the format asks: the data begin at a multiple of 8
        unfinished.write(len(header).to_bytes(8, "little") + header)
        for block in blocks:
            unfinished.write(block.numpy().astype("<f4", copy=False).tobytes())
        with writing(path.parent.parent), whole_file(path) as temporary:
            unfinished.seek(0)
            with temporary.open("wb") as file:
                shutil.copyfileobj(unfinished, file)


def link_folder(source: Path, target: Path) -> None:
    """Copy a folder to ``target``, by hard links if the file system has them."""

    def link(old: str, new: str) -> None:
        try:
            os.link(old, new)
        except OSError:  # another file system, or one without hard links
            shutil.copy2(old, new)

    with whole_folder(target) as temporary:
        shutil.copytree(source, temporary, copy_function=link, dirs_exist_ok=True)


Answers = np.ndarray[Any, np.dtype[Any]]


class ValidationScores:
    """Scores teachers and students on the validation set, by the metrics of the task."""

    def __init__(self, recipe: Recipe, data: Data, runs_dir: Path) -> None:
        self.recipe = recipe
        self.data = data
        self.runs_dir = runs_dir
        self.metrics = recipe.data.judged_by
        self.labels = data.validation.labels

    def answers(self, folder: Path) -> Answers:
        """Return the answers on the validation set of the model in ``folder``, computed once."""
        data = self.data
        if is_given(folder):
            return answers(data.task, given.logits(folder, "validation").numpy())
        length = self.recipe.data.length
        files = ModelManifest.read(folder / text_model.MANIFEST).files
        key = fingerprint(files, data.validation.texts.blocks(), *length.facts)
        path = logits_file(self.runs_dir / ".shared", key)
        if not path.is_file():
            device = accelerator(self.recipe.compute).device
            model = text_model.load_model(folder, data.labels, data.task)
            model.module.to(device)
            encoded = splits.encode(data.validation, model.tokenizer, length)
            logits = predict_logits(model, encoded, device)
            write_logits(path, (len(encoded), len(data.labels)), [logits])
        return answers(data.task, read_logits(path).numpy())

    def score(self, model_answers: Answers) -> float:
        """Return the score of answers to the validation set."""
        return metrics.mean_metric(self.metrics, model_answers, self.labels)
