"""What a saved model says of the validation set, computed once for all campaigns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ad2kit import data as datasets
from ad2kit import metrics, models, store
from ad2kit.files import fingerprint
from ad2kit.records import ModelManifest
from ad2kit.runtime import accelerator
from ad2kit.tasks import answers
from ad2kit.training import predict_logits

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.data import Data
    from ad2kit.recipe import Recipe

Answers = np.ndarray[Any, np.dtype[Any]]


class Judge:
    """Scores teachers and students on the validation set, by the metrics of the task."""

    def __init__(self, recipe: Recipe, data: Data, runs_dir: Path) -> None:
        self.recipe, self.data, self.runs_dir = recipe, data, runs_dir
        self.metrics, self.labels = recipe.data.judged_by, data.validation.labels

    def answers(self, folder: Path) -> Answers:
        """Return a model's answers on the validation set, computed once."""
        data, length = self.data, self.recipe.data.max_length_tokens
        files = ModelManifest.read(folder / models.MANIFEST).files
        key = fingerprint(files, data.validation.texts, length)
        path = store.logits_file(self.runs_dir / ".shared", key)
        if not path.is_file():
            device = accelerator(self.recipe.compute).device
            model = models.load(folder, data.labels, data.task)
            model.module.to(device)
            encoded = datasets.encode(data.validation, model.tokenizer, length)
            store.write_logits(path, predict_logits(model, encoded, device))
        return answers(data.task, store.read_logits(path).numpy())

    def score(self, found: Answers) -> float:
        """Return the score of some answers."""
        return metrics.score(self.metrics, found, self.labels)
