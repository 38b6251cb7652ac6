"""The last linear layer: its input vectors for texts, and its start by a regression on them.

While a random head learns, it distorts the features of a pretrained encoder. A head that already
fits the features does not (linear probing, then fine-tuning: Kumar et al., *Fine-Tuning can Distort
Pretrained Features and Underperform Out-of-Distribution*, ICLR 2022). With many classes and few
rows a random head also needs most of the updates to separate its classes at all.
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
from ad2kit.models.layers import last_linear
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
"""The most (shuffled) training rows that are read: more rows cost time and change little."""
# The penalty on the squared weights of features whose mean square is 1.
_PENALTY = 10.0
_ITERATIONS = 200


def start_head(
    model: TextModel, encoded: Encoded, targets: NDArray[Any], accelerator: Accelerator
) -> None:
    """Fit the last linear layer of a model in place; all other weights stay as they are.

    The fit is a logistic regression (one per label for several labels), or a ridge regression for a
    number. It uses float64 and one thread, so that the same rows give the same bits. Classes
    without rows keep their weights. Every process calls this function; the first one fits the
    layer, and the others receive it.

    Args:
        model: the model, on its device.
        encoded: the training rows, shuffled; at most :data:`MOST_ROWS` are read.
        targets: targets in the form of the labels of ``encoded``; rows without one are left out.
        accelerator: the accelerator of the training.
    """
    targets = targets[:MOST_ROWS]
    labelled = targets != NO_CLASS
    if model.task != "single_label":
        labelled = ~np.isnan(targets if targets.ndim == 1 else targets[:, 0])
    rows = np.flatnonzero(labelled)
    layer = last_linear(model.module)
    if accelerator.is_main_process and len(rows):
        vectors = read_vectors(model, encoded, accelerator.device, rows)
        fit = fit_linear(model.task, vectors.head_inputs, targets[rows], len(model.labels))
        with torch.no_grad():
            for index, weights, bias in zip(*fit, strict=True):
                layer.weight[index] = torch.from_numpy(weights).to(layer.weight)
                if layer.bias is not None:
                    layer.bias[index] = float(bias)
        logger.info("the head starts from a regression on %d rows", len(rows))
    for parameter in layer.parameters():
        parameter.data.copy_(broadcast(parameter.data))


def fit_linear(
    task: Task, features: Floats, targets: NDArray[Any], outputs: int
) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Fit the weights of a linear layer.

    Args:
        task: decides between logistic and ridge regression.
        features: the inputs of the layer, shape [rows, width].
        targets: see :mod:`ad2kit.data.labels`.
        outputs: number of outputs of the layer.

    Returns:
        The indices of the fitted outputs [fitted], their weights [fitted, width] and their
        biases [fitted].
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge
    from threadpoolctl import threadpool_limits

    # Scaled by the root mean square and not by the deviation: dropout multiplies a feature, and so
    # disturbs one that is large and hardly varies. Dropout itself amounts to a penalty on the size
    # (Wager, Wang and Liang, *Dropout Training as Adaptive Regularization*, NeurIPS 2013).
    scale = np.sqrt((features**2).mean(axis=0))
    scale = np.where(scale > 0, scale, np.inf)  # a feature that is always 0 gets the weight 0
    scaled = features / scale
    logistic = LogisticRegression(C=1 / _PENALTY, max_iter=_ITERATIONS)
    with threadpool_limits(1), warnings.catch_warnings():
        # The fit is only a start, and good enough even if it has not converged.
        warnings.simplefilter("ignore", ConvergenceWarning)
        if task == "regression":
            ridge = Ridge(alpha=_PENALTY).fit(scaled, targets)
            indices = [0]
            weights = ridge.coef_[None]
            biases = np.array([ridge.intercept_])
        elif task == "multi_label":
            indices = [label for label in range(outputs) if len(np.unique(targets[:, label])) == 2]
            weights = np.zeros((len(indices), features.shape[1]))
            biases = np.zeros(len(indices))
            for row, label in enumerate(indices):
                logistic.fit(scaled, targets[:, label])
                weights[row] = logistic.coef_[0]
                biases[row] = logistic.intercept_[0]
        elif len(np.unique(targets)) == 1:
            return np.zeros(0, np.int64), np.zeros((0, features.shape[1])), np.zeros(0)
        else:
            logistic.fit(scaled, targets)
            indices = logistic.classes_.tolist()
            weights = logistic.coef_
            biases = logistic.intercept_
            if len(indices) == 2:
                # The sigmoid of z is the softmax of (-z/2, z/2).
                weights = weights * [[-0.5], [0.5]]
                biases = biases * [-0.5, 0.5]
    return np.array(indices, np.int64), weights / scale, biases


class Vectors(NamedTuple):
    """Two vectors of each text, float64; those of a long text are the mean over its windows.

    ``head_inputs`` [rows, width] are the inputs of the classifier's last linear layer.
    ``token_means`` [rows, hidden size] are the means of the encoder's last states over all tokens
    of the text, special tokens included.
    """

    head_inputs: Floats
    token_means: Floats


@torch.inference_mode()
def read_vectors(
    model: TextModel,
    encoded: Encoded,
    device: torch.device,
    chosen: NDArray[np.int64] | None = None,
) -> Vectors:
    """Return the vectors of rows, without dropout.

    Args:
        model: the model, on ``device``; it is in evaluation mode afterwards.
        encoded: texts, encoded by the model's own tokenizer.
        device: the device of the model.
        chosen: the rows to read; all if None.
    """
    module = model.module.eval()
    head_inputs: list[torch.Tensor] = []
    last_states: list[torch.Tensor] = []
    token_means: list[torch.Tensor] = []
    hooks = (
        last_linear(module).register_forward_pre_hook(
            lambda _, layer_inputs: head_inputs.append(layer_inputs[0])
        ),
        module.base_model.register_forward_hook(
            lambda _, __, outputs: last_states.append(outputs[0])
        ),
    )
    rows = np.arange(len(encoded)) if chosen is None else chosen
    windows = encoded.windows_of(rows)
    batches = splits.by_length(encoded.input_ids.lengths[windows], EVALUATION_BATCH)
    try:
        for batch in batches:
            inputs = padded(model, encoded, windows[batch], device)
            module(**inputs)
            mask = inputs["attention_mask"].unsqueeze(-1).double()
            token_means.append((last_states.pop().double() * mask).sum(dim=1) / mask.sum(dim=1))
    finally:
        for hook in hooks:
            hook.remove()
    original_order = np.argsort(np.concatenate(batches))
    head_vectors, mean_vectors = (
        torch.cat(vectors).double().cpu().numpy()[original_order]
        for vectors in (head_inputs, token_means)
    )
    return Vectors(
        head_inputs=encoded.average(head_vectors, rows),
        token_means=encoded.average(mean_vectors, rows),
    )
