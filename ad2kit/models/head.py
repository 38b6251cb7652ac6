"""The last linear layer: what it reads of a text, and its start by a regression on that.

A random head pulls the features of a pretrained encoder out of shape before it fits them; one that
fits them already does not (linear probing, then fine-tuning: Kumar et al., *Fine-Tuning can Distort
Pretrained Features and Underperform Out-of-Distribution*, ICLR 2022). With many classes and few
rows a random head also needs most of the updates to find its classes at all.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import broadcast

from ad2kit.data import splits
from ad2kit.data.labels import NO_CLASS
from ad2kit.models.text_model import EVALUATION_BATCH, padded

if TYPE_CHECKING:
    from accelerate import Accelerator
    from numpy.typing import NDArray

    from ad2kit.data.splits import Encoded
    from ad2kit.models.text_model import TextModel
    from ad2kit.run.sections import Task

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
    """
    targets = targets[:MOST_ROWS]
    labelled = targets != NO_CLASS
    if model.task != "single_label":
        labelled = ~np.isnan(targets if targets.ndim == 1 else targets[:, 0])
    rows = np.flatnonzero(labelled)
    layer = last_linear(model.module)
    if accelerator.is_main_process and len(rows):
        read = read_vectors(model, encoded, accelerator.device, rows)
        found = fit_linear(model.task, read.head_inputs, targets[rows], len(model.labels))
        with torch.no_grad():
            for index, weights, bias in zip(*found, strict=True):
                layer.weight[index] = torch.from_numpy(weights).to(layer.weight)
                if layer.bias is not None:
                    layer.bias[index] = float(bias)
        logger.info("the head starts from a regression on %d rows", len(rows))
    for parameter in layer.parameters():
        parameter.data.copy_(broadcast(parameter.data))


def fit_linear(
    task: Task, read: Floats, targets: NDArray[Any], outputs: int
) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Fit the weights of a linear layer.

    Args:
        task: decides the regression.
        read: what the layer reads, shape [rows, width].
        targets: see :mod:`ad2kit.data.labels`.
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


class Vectors(NamedTuple):
    """Two vectors of each text, float64.

    ``head_inputs`` [rows, width] is what the last linear layer of the classifier reads.
    ``token_means`` [rows, hidden size] is the mean of the encoder's last states over all tokens of
    the text, special ones included.
    """

    head_inputs: Floats
    token_means: Floats


def last_linear(module: torch.nn.Module) -> torch.nn.Linear:
    """Return the layer that computes the logits: the last linear one of a classifier."""
    return [part for part in module.modules() if isinstance(part, torch.nn.Linear)][-1]


@torch.inference_mode()
def read_vectors(
    model: TextModel,
    encoded: Encoded,
    device: torch.device,
    chosen: NDArray[np.int64] | None = None,
) -> Vectors:
    """Return the vectors of rows, without dropout.

    Args:
        model: lies on ``device``; it is in evaluation mode afterwards.
        encoded: texts, by the model's own tokenizer.
        device: where the model lies.
        chosen: the rows to read; all if None.
    """
    module = model.module.eval()
    heads: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    means: list[torch.Tensor] = []
    hooks = (
        last_linear(module).register_forward_pre_hook(lambda _, given: heads.append(given[0])),
        module.base_model.register_forward_hook(lambda _, __, found: states.append(found[0])),
    )
    every = np.arange(len(encoded)) if chosen is None else chosen
    lengths = [len(encoded.input_ids[row]) for row in every]
    batches = splits.by_length(lengths, EVALUATION_BATCH)
    try:
        for rows in batches:
            inputs = padded(model, encoded, every[rows], device)
            module(**inputs)
            mask = inputs["attention_mask"].unsqueeze(-1).double()
            means.append((states.pop().double() * mask).sum(dim=1) / mask.sum(dim=1))
    finally:
        for hook in hooks:
            hook.remove()
    back = np.argsort(np.concatenate(batches))
    head_inputs, token_means = (
        torch.cat(found).double().cpu().numpy()[back] for found in (heads, means)
    )
    return Vectors(head_inputs, token_means)
