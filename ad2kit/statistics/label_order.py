"""The label of each output of a teacher: checked by the teacher's names and by its answers.

If the outputs of a teacher have no names of their own, only its maker knows their order. After a
wrong guess every student is as wrong as its teacher, and still retains 100 % of it.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ad2kit.run.errors import ModelError
from ad2kit.statistics.metrics import mcnemar_p

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ad2kit.run.sections import Task

    Array = NDArray[Any]

# By chance alone another order is taken for the right one in fewer than one of a thousand data
# sets. The other order also has to be far better: right this many times as often where the two
# orders differ, and better for this share of the labels that it moves.
_LEVEL = 1e-3
_TIMES_AS_OFTEN = 2.0
_LEAST_GAINING = 0.9
LABEL_FILE = "a file labels.txt in the folder of data.source (a line 'id<TAB>name' for each output)"


class BetterOrder(NamedTuple):
    """Another assignment of outputs to labels, which fits the rows far better.

    ``labels`` holds the index of the label for each output. ``now`` and ``then`` are the shares of
    right answers in the order of the data and in the other order, on ``rows`` rows. ``p`` is the
    probability of such a difference if neither order were better.
    """

    labels: tuple[int, ...]
    now: float
    then: float
    rows: int
    p: float

    def names(self, names: Sequence[str]) -> list[str]:
        """Return the names of the outputs in this order, given the names of the labels."""
        return [names[index] for index in self.labels]

    def words(self, names: Sequence[str]) -> str:
        """Return a message with both orders and the evidence for the other one."""
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

    The assignment is searched on every other row of each label, and tested on the remaining rows
    by two paired tests, both at 0.001: the two-sided exact McNemar test over the rows, and a bound
    on the sign test that weighs each label the same. The second test protects weak teachers. A
    teacher that ignores its texts gets more rows right if its favourite output has the name of the
    most frequent label, but it gets no more labels right. A teacher that has not learnt some labels
    yet answers others in their place: then a few of the moved labels gain by another order, and the
    others do not. In a task of several labels the rows are independent but the cells are not, so a
    row counts for the order that gets more of its cells right.

    Args:
        task: a regression has one output, and so no order.
        answers: as :func:`ad2kit.statistics.logits.answers` returns them.
        labels: labels of the same rows, in the same form.
        outputs: number of outputs.
    """
    if task == "regression" or outputs < 2 or not len(labels):
        return None
    search_rows, test_rows = _halves(task, labels)
    order = _assignment(task, answers[search_rows], labels[search_rows], outputs)
    data_order = np.arange(outputs)
    if (order == data_order).all() or len(test_rows) == 0:
        return None
    test_answers = answers[test_rows]
    test_labels = labels[test_rows]
    gains, weighted_gains = _gains(task, test_answers, test_labels, order)
    mcnemar = mcnemar_p(gains > 0, gains < 0)
    won = weighted_gains[weighted_gains > 0].sum()
    lost = -weighted_gains[weighted_gains < 0].sum()
    # Hoeffding's bound for a sum of terms that are as likely to have one sign as the other.
    squares = (weighted_gains**2).sum()
    bound = np.exp(-(max(won - lost, 0.0) ** 2) / (2 * max(squares, 1e-300)))
    p_value = max(mcnemar, bound)
    if gains.sum() <= 0 or p_value >= _LEVEL or won < _TIMES_AS_OFTEN * lost:
        return None
    full_order = _assignment(task, answers, labels, outputs)
    if _share_of_gaining_labels(task, answers, labels, full_order) < _LEAST_GAINING:
        return None
    return BetterOrder(
        labels=tuple(map(int, full_order)),
        now=float(_right(task, test_answers, test_labels, data_order).mean()),
        then=float(_right(task, test_answers, test_labels, order).mean()),
        rows=len(test_rows),
        p=float(p_value),
    )


def _halves(task: Task, labels: Array) -> tuple[Array, Array]:
    """Return the even and the odd rows, in an order in which rows of one label are neighbours."""
    order = np.argsort(labels, kind="stable") if task == "single_label" else np.lexsort(labels.T)
    return order[::2], order[1::2]


def _assignment(task: Task, answers: Array, labels: Array, outputs: int) -> Array:
    """Return the best label for each output, each label once; ties keep the given order.

    A cell of the table is the share of a label's rows that an output answers. For several labels
    the share of the rows without the label is subtracted. So all labels weigh the same, however
    frequent they are, and the outputs of a teacher that ignores its texts fit every label equally.
    """
    from scipy.optimize import linear_sum_assignment

    if task == "single_label":
        counts = np.zeros((outputs, outputs))
        np.add.at(counts, (answers, labels), 1.0)
        table = _shares(counts, counts.sum(axis=0), counts.sum(axis=1) / len(labels))
    else:
        answered = answers.T.astype(float)
        present = labels.astype(float)
        absent = 1 - present
        answered_share = answered.mean(axis=1)
        share_present = _shares(answered @ present, present.sum(axis=0), answered_share)
        share_absent = _shares(answered @ absent, absent.sum(axis=0), answered_share)
        table = share_present - share_absent
    return np.asarray(linear_sum_assignment(table + 1e-9 * np.eye(outputs), maximize=True)[1])


def _shares(counts: Array, label_rows: Array, answered_share: Array) -> Array:
    """Return the share of each label's rows that each output answers, [outputs, labels].

    Each label gets one extra row, answered at the average rate of all rows. This damps the noise of
    labels with few rows.

    Args:
        counts: number of rows that have the label and that the output answers, [outputs, labels].
        label_rows: number of rows that have the label, [labels].
        answered_share: share of all rows that the output answers, [outputs].
    """
    return np.asarray((counts + answered_share[:, None]) / (label_rows + 1))


def _right(task: Task, answers: Array, labels: Array, order: Array) -> Array:
    """Return which answers are right in an order: bool [rows], or [rows, labels]."""
    if task == "single_label":
        return np.asarray(order[answers] == labels)
    reordered = np.empty_like(answers)
    reordered[:, order] = answers
    return np.asarray(reordered == labels)


def _right_answers_gained(task: Task, answers: Array, labels: Array, order: Array) -> Array:
    """Return the right answers in another order less those in the data's: -1, 0 or 1 per cell."""
    data_order = np.arange(len(order))
    before = _right(task, answers, labels, data_order).astype(int)
    after = _right(task, answers, labels, order).astype(int)
    return np.asarray(after - before)


def _gains(task: Task, answers: Array, labels: Array, order: Array) -> tuple[Array, Array]:
    """Return the gains by another order: in right answers, and weighted so that labels are equal.

    Returns:
        The right answers that each row gains, [rows]; and the weighted gains, [rows + labels],
        which end with the extra row that :func:`_shares` gives to each label.
    """
    gains = _right_answers_gained(task, answers, labels, order)
    output_of_label = np.argsort(order)
    if task == "single_label":
        weights = 1 / (np.bincount(labels, minlength=len(order)) + 1)
        answered_share = np.bincount(answers, minlength=len(order)) / len(answers)
        extra_rows = (answered_share[output_of_label] - answered_share) * weights
        return gains, np.concatenate([gains * weights[labels], extra_rows])
    label_rows = labels.sum(axis=0)
    weight_present = 1 / (label_rows + 1)
    weight_absent = 1 / (len(labels) - label_rows + 1)
    answered_share = answers.mean(axis=0)
    share_gained = answered_share[output_of_label] - answered_share
    extra_rows = share_gained * (weight_present - weight_absent)
    weighted_gains = gains * np.where(labels == 1, weight_present, weight_absent)
    return gains.sum(axis=1), np.concatenate([weighted_gains.sum(axis=1), extra_rows])


def _share_of_gaining_labels(task: Task, answers: Array, labels: Array, order: Array) -> float:
    """Return the share of the labels moved by an order that gain right answers; 0 if none moves."""
    gains = _right_answers_gained(task, answers, labels, order)
    indices = np.arange(len(order))
    moved = order != indices
    if task == "single_label":
        label_gains = np.bincount(labels, gains, minlength=len(order))
        moved &= np.isin(indices, labels)
    else:
        label_gains = gains.sum(axis=0)
    return float((label_gains[moved] > 0).mean()) if moved.any() else 0.0


def check_order(
    task: Task, answers: Array, labels: Array, names: Sequence[str], *, finished: bool
) -> None:
    """Refuse a teacher whose outputs have the labels in another order than the data.

    Args:
        task: task of the data.
        answers: answers of the teacher, as :func:`better_order` takes them.
        labels: labels of the same rows.
        names: names of the labels, in the order of the data.
        finished: the teacher came as a classifier, and was not fine-tuned on these data.

    Raises:
        ModelError: another order fits far better; the message shows both orders, and the hint says
            how to give the right one.
    """
    candidate = better_order(task, answers, labels, len(names))
    if candidate is None:
        return
    order = _listed(candidate.names(names))
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
    raise ModelError(candidate.words(names), hint=hint)


def numbers_of(names: Sequence[str]) -> tuple[str, ...] | None:
    """Return the numbers of names that only count: LABEL_0, LABEL_1, ..., or 1, 2, ...

    Return None if the prefixes before the numbers differ, or the numbers do not count from 0 or 1.
    """
    matches = [re.fullmatch(r"(.*?)([0-9]+)", name, re.DOTALL) for name in names]
    parts = [match.groups() for match in matches if match is not None]
    prefixes = {prefix for prefix, _ in parts}
    numbers = tuple(number for _, number in parts)
    sequences = [tuple(str(start + i) for i in range(len(names))) for start in (0, 1)]
    return numbers if len(prefixes) == 1 and numbers in sequences else None


def check_given_order(
    folder: Path, output_names: Sequence[str], labels: Sequence[str], *, order_given: bool
) -> None:
    """Refuse a finished teacher with numbered outputs if the order of the labels is a guess.

    Args:
        folder: folder of the teacher.
        output_names: names of its outputs, which :func:`numbers_of` reads as numbers. A single
            output is the sigmoid of class 1.
        labels: labels of the data.
        order_given: whether recipe or source gave the order of the labels.

    Raises:
        ModelError: the order was not given, and the labels are not the numbers of the outputs.
    """
    numbers = numbers_of(output_names) if len(output_names) > 1 else ("0", "1")
    if order_given or tuple(labels) == numbers:
        return
    raise ModelError(
        f"the outputs of {folder} have no names but numbers ({', '.join(output_names)}), and the "
        f"labels of the rows were only sorted ({', '.join(labels)}): which output is which label?",
        hint="give all labels in the order of the outputs, for example "
        f"'data.labels={_listed(labels)}' if that is the order; or {LABEL_FILE}",
    )
