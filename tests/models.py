"""Tiny real models and batches for the tests of the maths."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ad2kit.data.splits import Data, Encoded, Split, encode
from ad2kit.models import text_model
from ad2kit.models.pretrained import RANDOM
from ad2kit.models.text_model import padded
from ad2kit.run.machine import accelerator
from ad2kit.run.recipe import load_recipe
from ad2kit.run.sections import ComputeRecipe, DistillRecipe, TextLength
from ad2kit.training.ad2 import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ad2kit.models.text_model import TextModel
    from ad2kit.run.sections import Task

TEXTS = (
    "never dull",
    "hardly a disappointment, all told",
    "bad",
    "not at all a convincing film",
    "a slow start but a fine end",
    "dull",
    "fine, fine, fine",
    "the film is not bad at all",
)
LABELS = ("negative", "positive")


def cpu() -> Accelerator:
    return accelerator(ComputeRecipe(device="cpu", threads=1))


def split(task: Task = "single_label") -> Split:
    classes = np.array([1, 1, 0, 0, 1, 0, 1, 1])
    labels = {
        "single_label": classes,
        "multi_label": np.stack([classes, classes[::-1]], axis=1).astype(np.float32),
        "regression": np.linspace(0, 5, len(TEXTS), dtype=np.float32),
    }[task]
    return Split.of(((text,) for text in TEXTS), labels)


def data(task: Task = "single_label") -> Data:
    rows, labels = split(task), ("value",) if task == "regression" else LABELS
    return Data(task, labels, rows, rows, rows, rows.take(np.arange(0)))


def tiny_bert(seed: int = 3, *, dropout: bool = False, task: Task = "single_label") -> TextModel:
    """A random BERT over the words of TEXTS, in evaluation mode unless with dropout."""
    rows = data(task)
    model = text_model.load_reference(RANDOM, rows, seed=seed, finished=False, key="teacher.model")
    if not dropout:
        for module in model.module.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.module.config.attention_probs_dropout_prob = 0.0
        for layer in model.module.bert.encoder.layer:  # type: ignore[union-attr]
            layer.attention.self.dropout_prob = 0.0
    return model


def encoded(model: TextModel) -> Encoded:
    return encode(split(model.task), model.tokenizer, TextLength(32))


def batch(model: TextModel, rows: slice = slice(None)) -> Batch:
    texts = encoded(model)
    chosen = np.arange(len(texts))[rows]
    return Batch(
        padded(model, texts, chosen, torch.device("cpu")),
        torch.from_numpy(texts.labels[chosen]),
        teacher_logits(len(model.labels))[torch.from_numpy(chosen)],
    )


def teacher_logits(outputs: int = 2) -> torch.Tensor:
    """What a decided teacher says of TEXTS, shape [texts, outputs]."""
    return 2 * torch.randn(len(TEXTS), outputs, generator=torch.Generator().manual_seed(11))


def settings(**changes: object) -> DistillRecipe:
    """The distill section of the smoke recipe with some values changed."""
    plain = load_recipe("smoke").distill.model_dump()
    adversary = plain["adversary"] | {
        key: changes.pop(key) for key in list(changes) if key in plain["adversary"]
    }
    return DistillRecipe.model_validate(plain | changes | {"adversary": adversary})


def gradients(model: TextModel) -> torch.Tensor:
    """All gradients in one vector."""
    return torch.cat(
        [
            (p.grad if p.grad is not None else torch.zeros_like(p)).flatten()
            for p in model.module.parameters()
        ]
    )
