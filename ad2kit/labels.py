"""Labels: from what a file or a hub set holds to arrays, by the kind of task.

A class is a text or a whole number; several labels are a list or names separated by commas; the
label of a regression is a finite number. Anything else is an error that names the row.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ad2kit.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ad2kit.sections import DataRecipe, Task
    from ad2kit.sources import Row

# What a row without a label holds: PyTorch's ignore_index for class ids, NaN for the others.
NO_CLASS = -100
# A label with less than this part of an equal share of the rows is called rare.
_RARE = 0.2
# So many labels are named one by one; of more, the least and the most frequent.
_NAMED = 10


def label_names(
    rows: Sequence[Row], recipe: DataRecipe, names: tuple[str, ...] | None
) -> tuple[str, ...]:
    """Return the names of the outputs: the recipe's, the source's, or all that occur, sorted.

    A regression has one output, named after its column.

    Raises:
        DataError: the labels cannot be read as the task says.
    """
    column = recipe.label_column
    if recipe.task == "regression":
        return (column,)
    if recipe.labels or names:
        return recipe.labels or names or ()
    if recipe.task == "multi_label":
        seen = {name for where, row in rows for name in _several(where, row, column)}
    else:
        seen = {_class(where, row, column) for where, row in rows}
        if all(_is_decimal(name) for name in seen) and len(seen) > 2:
            raise DataError(
                f"{rows[0][0]}: '{column}' holds decimal numbers such as {min(seen)}, not classes",
                hint="set data.task=regression, or list the classes in data.labels",
            )
    return tuple(sorted(seen))


def read_labels(rows: Sequence[Row], recipe: DataRecipe, names: tuple[str, ...]) -> NDArray[Any]:
    """Return the labels of some rows.

    Returns:
        Class ids, int64 [rows]; 0 or 1, float32 [rows, labels]; or values, float32 [rows].

    Raises:
        DataError: the first row whose label does not fit, with its file and line.
    """
    column, ids = recipe.label_column, {name: index for index, name in enumerate(names)}
    if recipe.task == "regression":
        return np.asarray([_value(where, row, column) for where, row in rows], dtype=np.float32)
    if recipe.task == "single_label":
        return np.asarray(
            [_index(where, _class(where, row, column), ids) for where, row in rows], dtype=np.int64
        )
    labels = np.zeros((len(rows), len(names)), dtype=np.float32)
    for found, (where, row) in zip(labels, rows, strict=True):
        found[[_index(where, name, ids) for name in _several(where, row, column)]] = 1.0
    return labels


def no_labels(task: Task, rows: int, outputs: int) -> NDArray[Any]:
    """Return the labels of rows that have none, in the form of :func:`read_labels`."""
    if task == "single_label":
        return np.full(rows, NO_CLASS, dtype=np.int64)
    shape = (rows,) if task == "regression" else (rows, outputs)
    return np.full(shape, np.nan, dtype=np.float32)


def counts(task: Task, labels: NDArray[Any], names: tuple[str, ...]) -> dict[str, int]:
    """Return how many rows carry each label; empty for a regression."""
    if task == "regression":
        return {}
    per_label = (
        np.bincount(labels, minlength=len(names)) if task == "single_label" else labels.sum(axis=0)
    )
    return {name: int(count) for name, count in zip(names, per_label, strict=True)}


def balance(found: dict[str, int], rows: int) -> str:
    """Return in words how the labels are shared out over the rows, and who comes short."""

    def share(name: str) -> str:
        return f"{name} {found[name]} ({found[name] / rows:.1%})"

    names = sorted(found, key=lambda name: found[name])
    if len(found) <= _NAMED:
        words = ", ".join(map(share, found))
    else:
        words = f"{len(found)} labels, from {share(names[0])} to {share(names[-1])}"
    rare = [name for name in names if found[name] < _RARE * sum(found.values()) / len(found)]
    if not rare:
        return words
    more = f" and {len(rare) - _NAMED} more" if len(rare) > _NAMED else ""
    return f"{words}; rare, and left as they are: {', '.join(rare[:_NAMED])}{more}"


def _class(where: str, row: dict[str, Any], column: str) -> str:
    """Return a row's class as text: 1, "1" and 1.0 (a Parquet column with a gap) are the same."""
    return _name(where, row.get(column), column)


def _name(where: str, value: object, column: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise DataError(
        f"{where}: '{column}' must be a label, a text or a whole number, found {value!r}",
        hint="remove or correct the row",
    )


def _several(where: str, row: dict[str, Any], column: str) -> list[str]:
    """Return the names (or ids, as text) of all labels of a row, which may have none."""
    value = row.get(column)
    if isinstance(value, str):
        value = [name for name in value.split(",") if name.strip()]
    if not isinstance(value, list):
        raise DataError(
            f"{where}: '{column}' must be a list of labels, or names separated by commas, "
            f"found {value!r}",
            hint="remove or correct the row; a row without labels has [] or an empty text",
        )
    return [_name(where, each, column) for each in value]


def _index(where: str, name: str, ids: dict[str, int]) -> int:
    # A name wins over an id, so that labels called "1" and "0" keep their meaning.
    index = ids.get(name)
    if index is None and name.isdecimal() and int(name) < len(ids):
        index = int(name)
    if index is None:
        raise DataError(
            f"{where}: label {name!r} is not in the label set ({', '.join(ids)})",
            hint="correct the row, or list all labels in data.labels",
        )
    return index


def _value(where: str, row: dict[str, Any], column: str) -> float:
    value = row.get(column)
    try:
        number = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"{where}: '{column}' of a regression must be a finite number, found {value!r}",
            hint="correct or remove the row, or set data.task=single_label if these are classes",
        )
    return number


def _is_decimal(name: str) -> bool:
    """Whether a class name is written like 3.75 or 5.0, which no list of classes is."""
    whole, point, fraction = name.removeprefix("-").partition(".")
    return bool(point) and whole.isdecimal() and fraction.isdecimal()
