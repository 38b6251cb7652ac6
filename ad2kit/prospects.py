"""Whether a student that is still in training can become good enough."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# A candidate is given up where it would be wrong once in forty times, if nothing else were.
_STANDARD_ERRORS = 2.0


def hopeless(scores: Sequence[float], rows: int, needed: float) -> bool:
    """Tell whether a training is not worth its remaining epochs.

    Learning curves flatten: if an epoch brings at most half of what the one before brought, all
    that are to come bring at most what the last did. A training is hopeless if its last score, with
    the last gain once more, lies below ``needed`` by more than two standard errors of a share of so
    many rows. Nothing is said of a single epoch.

    Args:
        scores: on ``select``, at the end of each epoch so far.
        rows: of ``select``.
        needed: the score that it has to reach.
    """
    if len(scores) < 2:
        return False
    last = scores[-1]
    error = math.sqrt(max(last * (1 - last), 0.0) / rows)
    return last + max(0.0, last - scores[-2]) + _STANDARD_ERRORS * error < needed


def error_of(look: int) -> float:
    """Return the chance of error that the interval of the ``look``-th candidate has.

    The first to be judged on the validation rows has the 5 % of an ordinary run: its lower bound
    is too high once in forty times. As much again is shared out among all later ones, halved from
    each to the next, so that the chance that any lower bound is too high stays below 5 % however
    many there are (Bonferroni's inequality).
    """
    return 0.05 / 2 ** (look - 1)
