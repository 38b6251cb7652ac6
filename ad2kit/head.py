"""The head before its first update: regression on what its last linear layer reads.

A random head pulls the features of a pretrained encoder out of shape before it fits them; one that
fits them already does not (linear probing, then fine-tuning: Kumar et al., *Fine-Tuning can Distort
Pretrained Features and Underperform Out-of-Distribution*, ICLR 2022). With many classes and few
rows a random head also needs most of the updates to find its classes at all.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast

from ad2kit import data as datasets
from ad2kit.errors import ModelError
from ad2kit.labels import NO_CLASS
from ad2kit.training import EVALUATION_BATCH, padded

if TYPE_CHECKING:
    from accelerate import Accelerator
    from numpy.typing import NDArray

    from ad2kit.data import Encoded
    from ad2kit.models import TextModel
    from ad2kit.sections import Task

    Floats = NDArray[np.float64]

logger = logging.getLogger(__name__)

MOST_ROWS = 5_000
"""So many of the (shuffled) training rows are read: more rows cost time and change little."""
# Of the squared weights of features whose mean square is 1.
_PENALTY = 10.0
_ITERATIONS = 200


def start_head(
    model: TextModel, encoded: Encoded, targets: NDArray[Any], accelerator: Accelerator
) -> None:
    """Fit the last linear layer of a model; all else stays as it is.

    Logistic regression, of each label against the rest for several labels, ridge regression for a
    number; in float64 and on one thread, so that the same rows give the same bits. Classes that no
    row has keep their weights. Every process calls it, and has what the first one found.

    Args:
        model: on its device.
        encoded: the training rows, shuffled; at most :data:`MOST_ROWS` are read.
        targets: as the labels of ``encoded``; rows without a label are left out.
        accelerator: of the training.

    Raises:
        ModelError: the logits are not the output of a linear layer.
    """
    targets = targets[:MOST_ROWS]
    labelled = targets != NO_CLASS
    if model.task != "single_label":
        labelled = ~np.isnan(targets if targets.ndim == 1 else targets[:, 0])
    rows = np.flatnonzero(labelled)
    layer = last_linear(model, encoded, accelerator.device)
    if accelerator.is_main_process and len(rows):
        read = features(model, layer, encoded, rows, accelerator.device)
        found = fit(model.task, read, targets[rows], len(model.labels))
        with torch.no_grad():
            for index, weights, bias in zip(*found, strict=True):
                layer.weight[index] = torch.from_numpy(weights).to(layer.weight)
                if layer.bias is not None:
                    layer.bias[index] = float(bias)
        logger.info("the head starts from a regression on %d rows", len(rows))
    for parameter in layer.parameters():
        parameter.data.copy_(broadcast(parameter.data))


def last_linear(model: TextModel, encoded: Encoded, device: torch.device) -> torch.nn.Linear:
    """Return the linear layer whose output the logits are."""
    outputs: list[tuple[torch.nn.Linear, torch.Tensor]] = []

    def note(module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        assert isinstance(module, torch.nn.Linear)  # noqa: S101  (for mypy)
        outputs.append((module, output))

    wanted = [
        module for module in model.module.modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == len(model.labels)
    ]  # fmt: skip
    handles = [module.register_forward_hook(note) for module in wanted]
    try:
        with torch.inference_mode():
            inputs = padded(model, encoded, np.arange(1), device)
            logits = model.module.eval()(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()
    for module, output in reversed(outputs):
        if output.shape == logits.shape and torch.equal(output, logits):
            return module
    raise ModelError(
        f"the logits of a '{model.module.config.model_type}' are not the output of a linear layer: "
        "its head cannot be started by regression",
        hint="set start_head=false in teacher.finetune and distill",
    )


def features(
    model: TextModel, layer: torch.nn.Linear, encoded: Encoded, rows: NDArray[np.int64],
    device: torch.device,
) -> Floats:  # fmt: skip
    """Return what a layer reads of some rows, without dropout: float64 [rows, width]."""
    seen: list[torch.Tensor] = []

    def note(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0].double().cpu())

    found = np.empty((len(rows), layer.in_features))
    model.module.eval()
    handle = layer.register_forward_pre_hook(note)
    try:
        with torch.inference_mode():
            lengths = [len(encoded.input_ids[row]) for row in rows]
            for batch in datasets.by_length(lengths, EVALUATION_BATCH):
                model.module(**padded(model, encoded, rows[batch], device))
                found[batch] = seen.pop().numpy()
    finally:
        handle.remove()
    return found


def fit(
    task: Task, read: Floats, targets: NDArray[Any], outputs: int
) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Fit the weights of a linear layer.

    Args:
        task: decides the regression.
        read: what the layer reads, shape [rows, width].
        targets: see :mod:`ad2kit.tasks`.
        outputs: of the layer.

    Returns:
        Which outputs were fitted, their weights [fitted, width] and biases [fitted].
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge
    from threadpoolctl import threadpool_limits

    # Not by the deviation: dropout multiplies what is there, and would shake a feature that is
    # large and hardly varies. A penalty on the size is what dropout itself comes to (Wager, Wang
    # and Liang, *Dropout Training as Adaptive Regularization*, NeurIPS 2013).
    size = np.sqrt((read**2).mean(axis=0))
    size = np.where(size > 0, size, np.inf)  # a feature that is always 0 says nothing
    scaled = read / size
    logistic = LogisticRegression(C=1 / _PENALTY, max_iter=_ITERATIONS)
    with threadpool_limits(1), warnings.catch_warnings():
        # It is a start, and good enough wherever it has come to.
        warnings.simplefilter("ignore", ConvergenceWarning)
        if task == "regression":
            found = Ridge(alpha=_PENALTY).fit(scaled, targets)
            index, weights, bias = [0], found.coef_[None], np.array([found.intercept_])
        elif task == "multi_label":
            index = [i for i in range(outputs) if len(np.unique(targets[:, i])) == 2]
            weights, bias = np.zeros((len(index), read.shape[1])), np.zeros(len(index))
            for place, label in enumerate(index):
                found = logistic.fit(scaled, targets[:, label])
                weights[place], bias[place] = found.coef_[0], found.intercept_[0]
        elif len(np.unique(targets)) == 1:
            return np.zeros(0, np.int64), np.zeros((0, read.shape[1])), np.zeros(0)
        else:
            found = logistic.fit(scaled, targets)
            index, weights, bias = found.classes_.tolist(), found.coef_, found.intercept_
            if len(index) == 2:  # one sigmoid, which is the softmax of its half on either side
                weights, bias = weights * [[-0.5], [0.5]], bias * [-0.5, 0.5]
    return np.array(index, np.int64), weights / size, bias
