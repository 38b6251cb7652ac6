"""Logits, and what they say: probabilities and answers, by the kind of task.

The shapes stand in :mod:`ad2kit.data.labels`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ad2kit.run.sections import Task

_LEAST_PROBABILITY = 1e-8


def answers(task: Task, logits: NDArray[Any]) -> NDArray[Any]:
    """Return the answers for logits of shape [rows, outputs]; see the module docstring."""
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


def logits_of(task: Task, probabilities: NDArray[Any]) -> NDArray[np.float32]:
    """Return logits whose :func:`scores` are these probabilities; the inverse of that function.

    A probability below 1e-8 becomes 1e-8, because 0 has no finite logit.

    Args:
        task: see :func:`scores`.
        probabilities: shape [rows, outputs]; of a class they have the sum 1.
    """
    values = np.asarray(probabilities, np.float64)
    if task == "regression":
        return values.astype(np.float32)
    if task == "single_label":
        return np.log(np.maximum(values, _LEAST_PROBABILITY)).astype(np.float32)
    values = np.clip(values, _LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY)
    return (np.log(values) - np.log1p(-values)).astype(np.float32)


def scores(task: Task, logits: NDArray[Any]) -> NDArray[np.float64]:
    """Return the probability of each class or label, or the values of a regression.

    Args:
        task: decides between softmax over the classes, a sigmoid for each label, and the logits.
        logits: shape [rows, outputs].

    Returns:
        float64, shape [rows, outputs].
    """
    if task == "single_label":
        return softmax(logits)
    if task == "multi_label":
        # The logistic function, in a form that cannot overflow.
        return np.asarray(0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64))))
    return logits.astype(np.float64)
