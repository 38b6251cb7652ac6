"""What logits mean for each kind of task: answers and probabilities. No torch.

| task | logits | answers | labels |
|---|---|---|---|
| ``single_label`` | [rows, classes] | class ids [rows] | class ids [rows] |
| ``multi_label`` | [rows, labels] | 0 or 1 [rows, labels] | 0 or 1 [rows, labels] |
| ``regression`` | [rows, 1] | values [rows] | values [rows] |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ad2kit.sections import Task


def answers(task: Task, logits: NDArray[Any]) -> NDArray[Any]:
    """Return the answers that the logits, shape [rows, outputs], stand for; see the module."""
    if task == "single_label":
        return np.asarray(logits.argmax(axis=1))
    if task == "multi_label":
        return np.asarray((logits > 0).astype(np.int64))
    return logits[:, 0]


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Return probabilities over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def scores(task: Task, logits: NDArray[Any]) -> NDArray[np.float64]:
    """Return what a label or value gets: probabilities, or the values of a regression themselves.

    Args:
        task: softmax over the classes, a sigmoid for each label, or the logits as they are.
        logits: shape [rows, outputs].

    Returns:
        float64, shape [rows, outputs].
    """
    if task == "single_label":
        return softmax(logits)
    if task == "multi_label":
        # The form of the logistic function that cannot overflow.
        return np.asarray(0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64))))
    return logits.astype(np.float64)
