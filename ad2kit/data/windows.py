"""Windows: the parts in which a model reads a text of more tokens than its maximum length.

The windows of several texts stand in one flat list. The logits of a text are the mean of the logits
of its windows, each weighted by its number of tokens. Training, gate, service and bulk scoring all
use these functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Counts = Sequence[int] | NDArray[np.integer]


def window_count(tokens: int, room: int, overlap: int) -> int:
    """Return the number of windows of a text.

    Args:
        tokens: the number of tokens of the text, without special tokens.
        room: the number of tokens of a window, without special tokens.
        overlap: the number of tokens that a window shares with the window before; below ``room``.
    """
    return 1 + max(0, -(-(tokens - room) // (room - overlap)))


def cut(ids: list[int], room: int, overlap: int) -> list[list[int]]:
    """Cut the tokens of a text into windows; only the last window may be shorter than ``room``.

    These are the windows of the tokenizers library with ``stride=overlap``. The arguments are those
    of :func:`window_count`.
    """
    step = room - overlap
    starts = range(0, step * window_count(len(ids), room, overlap), step)
    return [ids[start : start + room] for start in starts]


def shares(tokens: Counts, first_windows: Counts) -> NDArray[np.float32]:
    """Return the weight of each window in the logits of its text, float32 [windows].

    The weights of the windows of one text add up to 1.

    Args:
        tokens: the number of tokens of each window, with its special tokens.
        first_windows: the position of the first window of each text, in ascending order.
    """
    counts = np.asarray(tokens)
    totals = np.add.reduceat(counts, first_windows)
    windows = np.diff(np.append(first_windows, len(counts)))
    weights: NDArray[np.float32] = (counts / np.repeat(totals, windows)).astype(np.float32)
    return weights


def averaging(tokens: Counts, first_windows: Counts) -> NDArray[np.float32]:
    """Return the matrix whose product with the logits of windows is the logits of texts.

    The arguments are those of :func:`shares`; the shape is [texts, windows].
    """
    windows = len(tokens)
    texts = np.repeat(np.arange(len(first_windows)), np.diff(np.append(first_windows, windows)))
    matrix = np.zeros((len(first_windows), windows), np.float32)
    matrix[texts, np.arange(windows)] = shares(tokens, first_windows)
    return matrix


def average(logits: NDArray[Any], tokens: Counts, first_windows: Counts) -> NDArray[Any]:
    """Return the logits of texts, [texts, outputs], from those of windows, [windows, outputs].

    The other arguments are those of :func:`shares`. A text of one window has the logits of that
    window.
    """
    if len(logits) == len(first_windows):
        return logits
    weighted: NDArray[Any] = logits * shares(tokens, first_windows)[:, None]
    return np.add.reduceat(weighted, first_windows)
