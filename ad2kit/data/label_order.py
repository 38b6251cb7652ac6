"""Which label each output of a teacher stands for: by its names, and by what it answers.

A teacher whose outputs have no names of their own has them in an order that nothing but its maker
knows. If it is guessed wrong, every student of it is as wrong, and retains 100 % of its teacher.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ad2kit.data.metrics import mcnemar_p
from ad2kit.run.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ad2kit.run.sections import Task

    Array = NDArray[Any]

# By chance alone another order is taken for the right one in fewer than one of a thousand data
# sets. It has to be far better, too: right so many times as often where the two orders differ, and
# for so many of the labels that it moves.
_LEVEL = 1e-3
_TIMES_AS_OFTEN = 2.0
_LEAST_GAINING = 0.9
LABEL_FILE = "a file labels.txt in the folder of data.source (a line 'id<TAB>name' for each output)"


class BetterOrder(NamedTuple):
    """Another assignment of outputs to labels, which fits the rows far better.

    ``labels`` holds the index of the label that each output stands for. ``now`` and ``then`` are
    the shares of the answers that are right in the order of the data and in the other, on ``rows``
    rows; ``p`` is the chance of such a difference if neither order were better.
    """

    labels: tuple[int, ...]
    now: float
    then: float
    rows: int
    p: float

    def names(self, names: Sequence[str]) -> list[str]:
        """Return what the outputs are called in this order."""
        return [names[index] for index in self.labels]

    def words(self, names: Sequence[str]) -> str:
        """Return both orders and what speaks for the other one."""
        return (
            f"the teacher's outputs are the labels in another order: {self.then:.1%} of its "
            f"answers to {self.rows} rows are right then, and {self.now:.1%} as it is "
            f"(p = {self.p:.1g})\n"
            f"  order of the data:  {_listed(names)}\n"
            f"  order that fits:    {_listed(self.names(names))}"
        )


def _listed(names: Sequence[str]) -> str:
    return json.dumps(list(names), ensure_ascii=False)


def better_order(task: Task, answers: Array, labels: Array, outputs: int) -> BetterOrder | None:
    """Return another assignment of outputs to labels if one fits far better; None if none does.

    It is found on every other row of each label, and judged on the rest by two paired tests, both
    at 0.001: the two-sided exact McNemar test over the rows, and a bound on the sign test that
    weighs each label the same. The second is for teachers that are merely weak: one that gives the
    same answers whatever the text says gets more rows right if its favourite output is called after
    the most frequent label, but no more labels. And one that has not learnt some labels yet answers
    others in their place: then a few labels gain by another order and the rest of the moved do not.
    Of several labels the rows are independent and not the cells: a row speaks for the order that
    gets more of its cells right.

    Args:
        task: a regression has one output, and so no order.
        answers: as :func:`ad2kit.data.labels.answers` returns them.
        labels: of the same rows, in the same form.
        outputs: how many there are.
    """
    if task == "regression" or outputs < 2:
        return None
    finding, judging = _halves(task, labels)
    order = _assignment(task, answers[finding], labels[finding], outputs)
    if (order == np.arange(outputs)).all() or len(judging) == 0:
        return None
    gains, weighted = _gains(task, answers[judging], labels[judging], order)
    p = mcnemar_p(gains > 0, gains < 0)
    won, lost = weighted[weighted > 0].sum(), -weighted[weighted < 0].sum()
    # Hoeffding's bound for a sum of terms that are as likely to have one sign as the other.
    bound = np.exp(-(max(won - lost, 0.0) ** 2) / (2 * max((weighted**2).sum(), 1e-300)))
    if gains.sum() <= 0 or max(p, bound) >= _LEVEL or won < _TIMES_AS_OFTEN * lost:
        return None
    every = _assignment(task, answers, labels, outputs)
    if _labels_that_gain(task, answers, labels, every) < _LEAST_GAINING:
        return None
    now, then = (
        float(_right(task, answers[judging], labels[judging], each).mean())
        for each in (np.arange(outputs), order)
    )
    return BetterOrder(tuple(map(int, every)), now, then, len(judging), float(max(p, bound)))


def _halves(task: Task, labels: Array) -> tuple[Array, Array]:
    """Return every other row, in an order in which rows of one label are neighbours."""
    order = np.argsort(labels, kind="stable") if task == "single_label" else np.lexsort(labels.T)
    return order[::2], order[1::2]


def _assignment(task: Task, answers: Array, labels: Array, outputs: int) -> Array:
    """Return the best label for each output, each label once; of equals the order as it is.

    The table holds, of the rows with a label, the share that an output answers; of several labels
    less the share of the rows without it. So all labels weigh the same, however frequent, and the
    outputs of a teacher that does not read its texts fit every label alike.
    """
    from scipy.optimize import linear_sum_assignment

    if task == "single_label":
        both = np.zeros((outputs, outputs))
        np.add.at(both, (answers, labels), 1.0)
        table = _shares(both, both.sum(axis=0), both.sum(axis=1) / len(labels))
    else:
        given, have = answers.T.astype(float), labels.astype(float)
        with_it, without = (
            _shares(given @ each, each.sum(axis=0), given.mean(axis=1)) for each in (have, 1 - have)
        )
        table = with_it - without
    return np.asarray(linear_sum_assignment(table + 1e-9 * np.eye(outputs), maximize=True)[1])


def _shares(both: Array, have: Array, answered: Array) -> Array:
    """Return for each output and label which share of the label's rows the output answers.

    Each label gets one more row, which is answered as all rows are on average: what a label with
    few rows says is noise.

    Args:
        both: number of rows that have the label and that the output answers, [outputs, labels].
        have: number of rows that have the label, [labels].
        answered: share of all rows that the output answers, [outputs].
    """
    return np.asarray((both + answered[:, None]) / (have + 1))


def _right(task: Task, answers: Array, labels: Array, order: Array) -> Array:
    """Return which answers are right in an order: bool [rows], or [rows, labels]."""
    if task == "single_label":
        return np.asarray(order[answers] == labels)
    named = np.empty_like(answers)
    named[:, order] = answers
    return np.asarray(named == labels)


def _gains(task: Task, answers: Array, labels: Array, order: Array) -> tuple[Array, Array]:
    """Return what each row gains in another order: answers, and with all labels weighing alike.

    The second array goes on with the row that :func:`_shares` gives to each label.
    """
    outputs = np.arange(len(order))
    before, after = (_right(task, answers, labels, each).astype(int) for each in (outputs, order))
    gains, first = after - before, np.argsort(order)
    if task == "single_label":
        weights = 1 / (np.bincount(labels, minlength=len(order)) + 1)
        answered = np.bincount(answers, minlength=len(order)) / len(answers)
        more = (answered[first] - answered) * weights
        return gains, np.concatenate([gains * weights[labels], more])
    with_it = labels.sum(axis=0)
    with_weight, without_weight = 1 / (with_it + 1), 1 / (len(labels) - with_it + 1)
    answered = answers.mean(axis=0)
    more = (answered[first] - answered) * (with_weight - without_weight)
    weighted = gains * np.where(labels == 1, with_weight, without_weight)
    return gains.sum(axis=1), np.concatenate([weighted.sum(axis=1), more])


def _labels_that_gain(task: Task, answers: Array, labels: Array, order: Array) -> float:
    """Return which share of the labels that have another output in an order gain right answers."""
    before, after = (
        _right(task, answers, labels, each).astype(int) for each in (np.arange(len(order)), order)
    )
    moved = order != np.arange(len(order))
    if task == "single_label":
        gains = np.bincount(labels, after - before, minlength=len(order))
        moved &= np.isin(np.arange(len(order)), labels)
    else:
        gains = (after - before).sum(axis=0)
    return float((gains[moved] > 0).mean()) if moved.any() else 0.0


def insist_on_order(
    task: Task, answers: Array, labels: Array, names: Sequence[str], *, finished: bool
) -> None:
    """Refuse a teacher whose outputs stand for the labels in another order than the data's.

    Args:
        task: of the data.
        answers: of the teacher, as :func:`better_order` takes them.
        labels: of the same rows.
        names: of the labels, in the order of the data.
        finished: the teacher came as a classifier, and was not fine-tuned on these data.

    Raises:
        ModelError: shows both orders and how to give the right one.
    """
    found = better_order(task, answers, labels, len(names))
    if found is None:
        return
    order = _listed(found.names(names))
    hint = (
        f"if the second order is the teacher's, give it: 'data.labels={order}', or {LABEL_FILE} in "
        "that order. Rows that hold ids need names in their place, or this file for the ids and "
        "data.labels for the teacher. A teacher with names of its own has them wrong in id2label "
        "of its config.json"
    )
    if not finished:
        hint = (
            "the training rows taught it other labels than the rows that choose the checkpoint "
            "hold: look at how the two files name or number them"
        )
    raise ModelError(found.words(names), hint=hint)


def numbers_of(names: Sequence[str]) -> tuple[str, ...] | None:
    """Return the numbers in names that say no more than that: LABEL_0, LABEL_1, ..., or 1, 2, ...

    None for other names: what is before the numbers differs, or they do not count from 0 or 1.
    """
    found = [re.fullmatch(r"(.*?)([0-9]+)", name, re.DOTALL) for name in names]
    parts = [match.groups() for match in found if match is not None]
    numbers = tuple(number for _, number in parts)
    counted = [tuple(str(start + i) for i in range(len(names))) for start in (0, 1)]
    return numbers if len({prefix for prefix, _ in parts}) == 1 and numbers in counted else None


def insist_on_given_order(
    folder: Path, theirs: Sequence[str], labels: Sequence[str], *, order_given: bool
) -> None:
    """Refuse a finished teacher with numbered outputs where the order of the labels is a guess.

    Args:
        folder: of the teacher.
        theirs: the names of its outputs, of which :func:`numbers_of` knows the numbers. One alone
            is the sigmoid of class 1.
        labels: of the data.
        order_given: whether recipe or source gave their order.

    Raises:
        ModelError: it was not given, and the labels are not these numbers.
    """
    numbers = numbers_of(theirs) if len(theirs) > 1 else ("0", "1")
    if order_given or tuple(labels) == numbers:
        return
    raise ModelError(
        f"the outputs of {folder} have no names but numbers ({', '.join(theirs)}), and the labels "
        f"of the rows were only sorted ({', '.join(labels)}): which output is which label?",
        hint="give all labels in the order of the outputs, for example "
        f"'data.labels={_listed(labels)}' if that is the order; or {LABEL_FILE}",
    )
