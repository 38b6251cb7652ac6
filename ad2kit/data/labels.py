"""Labels: from what a file or a hub set holds to arrays, by the kind of task.

A class is a text or a whole number. Several labels are a list (also as JSON in a text), names
separated by commas, or a cell of 0 or 1 for each label. The label of a regression is a finite
number. What can be read in two ways is an error that names the row, like anything else.

What logits mean, for each kind of task:

| task | logits | answers | labels |
|---|---|---|---|
| ``single_label`` | [rows, classes] | class ids [rows] | class ids [rows] |
| ``multi_label`` | [rows, labels] | 0 or 1 [rows, labels] | 0 or 1 [rows, labels] |
| ``regression`` | [rows, 1] | values [rows] | values [rows] |
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from ad2kit.run.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from ad2kit.data.sources import Row
    from ad2kit.run.sections import DataRecipe, Task


# What a row without a label holds: PyTorch's ignore_index for class ids, NaN for the others.
NO_CLASS = -100
# A label with less than this part of an equal share of the rows is called rare.
_RARE = 0.2
# So many labels are named one by one; of more, the least and the most frequent.
_NAMED = 10

# A whole number as it is usually written; 07, +7 and 7.0 are other texts for the same number.
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")
_NUMBER = re.compile(
    r"[-+]?([0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})(e[-+]?[0-9]{1,3})?", re.IGNORECASE
)
_DECIMAL = re.compile(r"-?[0-9]+\.[0-9]+")
_CELLS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "False": 0, "True": 1, "false": 0, "true": 1}
_CLOSING = {"[": "]", "(": ")", "{": "}"}
# How Python and numpy write a list, a tuple, a set or an array of texts or numbers.
_WRITTEN_LIST = re.compile(
    r"(array|set|frozenset)?[\[({]\s*((['\"\[({0-9+.-]|(True|False|None|nan)\b).*)?[\])}]"
    r"|\[\s*['\"].*",
    re.DOTALL,
)
_OTHER_SEPARATOR = re.compile(r"[;|/\n\t]")
# Variation selectors choose between two pictures of one character.
_UNSEEN = {"\ufe0e", "\ufe0f"}
_HOW_TO_WRITE_LISTS = (
    'write a,b or a list in JSON: ["a", "b"] in JSON lines, or json.dumps(labels) in a cell'
)


@dataclass(frozen=True)
class LabelSet:
    """The names of the outputs in their order, and what a cell of the label column stands for.

    Attributes:
        names: one for each output.
        given: whether recipe or source gave the order; else the names were sorted.
        outputs: the index of the output for each text that a cell may hold: a name, or an id.
        columns: the index of the output for each cell of a row of 0 and 1.
    """

    names: tuple[str, ...]
    given: bool
    outputs: dict[str, int]
    columns: tuple[int, ...]


def label_set(rows: Sequence[Row], recipe: DataRecipe, source: tuple[str, ...] | None) -> LabelSet:
    """Return the labels of the recipe, of the source, or all that occur.

    Those that occur are sorted: as numbers if all are whole numbers, else as texts. A regression
    has one output, named after its column.

    Args:
        rows: of the training data.
        recipe: which column holds the labels, and perhaps their names.
        source: the names by their ids, where the source has them (labels.txt, or a class column).

    Raises:
        DataError: the labels cannot be read as the task says, or two of them look alike.
    """
    column = recipe.label_column
    if recipe.task == "regression":
        return LabelSet((column,), given=True, outputs={}, columns=())
    if recipe.labels or source:
        # The cells of a class column of the hub are ids, even where the names are numbers too.
        hub = (recipe.source or "").startswith("hub://")
        return _given_labels(recipe, source, only_ids=source is not None and hub)
    where: dict[str, str] = {}
    if recipe.task == "single_label":
        for place, row in rows:
            where.setdefault(_name(place, row.get(column), column), place)
        _insist_on_classes(where, column)
    else:
        several = [_several(place, row, column) for place, row in rows]
        if (width := _multi_hot_width(several)) is not None:
            raise DataError(
                f"{rows[0][0]}: every row of '{column}' holds {width} cells of 0 or 1, and nothing "
                "says which label each of them is",
                hint=f"give the {width} names in the order of the cells: data.labels=[...]",
            )
        for (place, _), cells in zip(rows, several, strict=True):
            for name in _names(place, cells, column):
                where.setdefault(name, place)
        _insist_on_commas(where, column)
    _insist_that_names_differ(where, column)
    whole = all(_WHOLE.fullmatch(name) for name in where)
    names = tuple(sorted(where, key=int) if whole else sorted(where))
    return LabelSet(names, False, {name: i for i, name in enumerate(names)}, ())


def _given_labels(
    recipe: DataRecipe, source: tuple[str, ...] | None, *, only_ids: bool
) -> LabelSet:
    """Return the labels where recipe or source name them.

    An id of the source is called as the source says. The recipe's names may be the same in another
    order, some of them, or, if none is the same, new names for all of them.
    """
    if source is not None:
        source = tuple(name.strip() for name in source)
        if "" in source or len(set(source)) < len(source):
            raise DataError(
                f"{recipe.source}: a name of its labels is empty or appears twice: {source}",
                hint="correct labels.txt, or give the names in data.labels",
            )
    names = recipe.labels or source or ()
    outputs = {name: output for output, name in enumerate(names)}
    by_look = {_look(name): output for output, name in enumerate(names)}
    ids: tuple[int | None, ...] = tuple(range(len(names)))
    if source is not None and any(_look(name) in by_look for name in source):
        ids = tuple(outputs.get(name, by_look.get(_look(name))) for name in source)
    elif source is not None and len(source) != len(names):
        raise DataError(
            f"data.labels holds {len(names)} names ({', '.join(names)}), and {recipe.source} "
            f"{len(source)} others ({', '.join(source)})",
            hint="give data.labels a name for each of them, or names that are among them",
        )
    by_id = {str(number): output for number, output in enumerate(ids) if output is not None}
    columns = tuple(by_id.values()) if None not in ids else ()
    if only_ids:
        return LabelSet(names, True, by_id, columns)
    if source is not None:
        named = zip(source, ids, strict=True)
        outputs = {name: output for name, output in named if output is not None} | outputs
    if not any(_NUMBER.fullmatch(name) for name in outputs):
        outputs = by_id | outputs
    return LabelSet(names, True, outputs, columns)


def read_labels(rows: Sequence[Row], recipe: DataRecipe, labels: LabelSet) -> NDArray[Any]:
    """Return the labels of some rows.

    Whether rows of 0 and 1 hold a cell for each label is a matter of all of them: give those of
    all splits together.

    Returns:
        Class ids, int64 [rows]; 0 or 1, float32 [rows, labels]; or values, float32 [rows].

    Raises:
        DataError: the first row whose label does not fit, with its file and line.
    """
    column = recipe.label_column
    if recipe.task == "regression":
        return np.asarray([_value(where, row, column) for where, row in rows], dtype=np.float32)
    if recipe.task == "single_label":
        ids = [_index(where, _name(where, row.get(column), column), labels) for where, row in rows]
        return np.asarray(ids, dtype=np.int64)
    several = [_several(where, row, column, labels) for where, row in rows]
    found = np.zeros((len(rows), len(labels.names)), dtype=np.float32)
    if (width := _multi_hot_width(several)) is not None:
        if width != len(labels.columns):
            raise DataError(
                f"{rows[0][0]}: every row of '{column}' holds {width} cells of 0 or 1, expected "
                f"one for each label ({', '.join(labels.names)})",
                hint="give data.labels a name for each cell, in their order",
            )
        found[:, labels.columns] = [[_CELLS[str(cell)] for cell in cells] for cells in several]
        return found
    for row_labels, (where, _), cells in zip(found, rows, several, strict=True):
        row_labels[[_index(where, name, labels) for name in _names(where, cells, column)]] = 1.0
    return found


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
    return f"{words}; rare (see class_weights): {', '.join(rare[:_NAMED])}{more}"


def _name(where: str, value: object, column: str) -> str:
    """Return a cell as text: 1, "1" and 1.0 (a Parquet column with a gap) are the same."""
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


def _several(
    where: str, row: dict[str, Any], column: str, labels: LabelSet | None = None
) -> list[Any]:
    """Return the cells of a row of several labels, which may have none; texts are stripped.

    With ``labels``, a text that looks like a list may still be the name of one of them.
    """
    value = row.get(column)
    if isinstance(value, str):
        value = _split(where, value.strip(), column, {} if labels is None else labels.outputs)
    if not isinstance(value, list):
        raise DataError(
            f"{where}: '{column}' must be a list of labels, or names separated by commas, "
            f"found {value!r}",
            hint="remove or correct the row; a row without labels has [] or an empty text",
        )
    return [cell.strip() if isinstance(cell, str) else cell for cell in value]


def _split(where: str, text: str, column: str, known: dict[str, int]) -> list[Any]:
    """Return what a text of several labels holds: a JSON list, or names between commas."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if all(part in known for part in parts) and not ("," in text and text in known):
        return parts
    closing = _CLOSING.get(text[:1])
    if closing == "]":
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, list):
            return found
    opened = closing and text.endswith(closing) and closing not in parts[0]
    if opened or _WRITTEN_LIST.fullmatch(text):
        raise DataError(
            f"{where}: '{column}' holds a list as Python writes it, which is no list here: {text}",
            hint=_HOW_TO_WRITE_LISTS,
        )
    if any("," in name for name in known) and "," in text:
        raise DataError(
            f"{where}: '{column}' holds {text!r}, where a comma may separate two labels or be part "
            "of one",
            hint=_HOW_TO_WRITE_LISTS,
        )
    return parts


def _multi_hot_width(several: Iterable[list[Any]]) -> int | None:
    """Return how many cells of 0 or 1 every row holds; None if the rows hold anything else."""
    width = None
    for cells in several:
        width = len(cells) if width is None else width
        if width < 2 or len(cells) != width or any(str(cell) not in _CELLS for cell in cells):
            return None
    return width


def _names(where: str, cells: list[Any], column: str) -> list[str]:
    """Return cells as the names or ids that they are, or refuse what looks like 0 and 1."""
    texts = [_name(where, cell, column) for cell in cells]
    numbers = [text for text in texts if _NUMBER.fullmatch(text)]
    if len(set(numbers)) < len(numbers) or any(isinstance(cell, bool) for cell in cells):
        raise DataError(
            f"{where}: '{column}' holds {cells!r}, neither labels (a number is there twice, or "
            "true or false) nor, as every row would have to, 0 or 1 for each label",
            hint=f"{_HOW_TO_WRITE_LISTS}; or give data.labels, and as many cells in every row",
        )
    return texts


def _index(where: str, name: str, labels: LabelSet) -> int:
    index = labels.outputs.get(name)
    if index is not None:
        return index
    hint = "correct the row, or list all labels in data.labels"
    alike = [each for each in labels.names if _look(each) == _look(name)]
    if alike:
        hint = f"write {alike[0]!a} in place of {name!a}; or list all labels in data.labels"
    elif _WHOLE.fullmatch(name) and int(name) < 0:
        hint = "some sets mark rows without a label so: remove them, or name a split with labels"
    elif _WHOLE.fullmatch(name) and not any(map(_NUMBER.fullmatch, labels.names)):
        hint = "list the labels in the order of their ids in data.labels, or write names everywhere"
    raise DataError(
        f"{where}: label {name!r} is not in the label set ({', '.join(labels.names)})", hint=hint
    )


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


def _insist_on_classes(where: dict[str, str], column: str) -> None:
    """Refuse names of classes that are something else; ``where`` says where each occurs first."""
    if len(where) > 2 and all(_DECIMAL.fullmatch(name) for name in where):
        raise DataError(
            f"{next(iter(where.values()))}: '{column}' holds decimal numbers such as {min(where)}, "
            "not classes",
            hint="set data.task=regression, or list the classes in data.labels",
        )
    for name, place in where.items():
        if _WRITTEN_LIST.fullmatch(name) and (len(name) == 2 or set(name) & set("'\", ")):
            raise DataError(
                f"{place}: '{column}' holds a list and not one class: {name}",
                hint="set data.task=multi_label, or list the classes in data.labels",
            )


def _insist_on_commas(where: dict[str, str], column: str) -> None:
    """Refuse several labels that something else than a comma separates."""
    for name, place in where.items():
        parts = [part.strip() for part in _OTHER_SEPARATOR.split(name)]
        if len(parts) > 1 and all(part in where for part in parts):
            raise DataError(
                f"{place}: '{column}' holds {name!r}, and {', '.join(map(repr, parts))} are labels "
                "too",
                hint=f"{_HOW_TO_WRITE_LISTS}; if it is one label, list all labels in data.labels",
            )


def _insist_that_names_differ(where: dict[str, str], column: str) -> None:
    """Refuse two labels that nobody could tell apart, or that are one number."""
    seen: dict[str | Decimal, str] = {}
    for name, place in where.items():
        other = seen.setdefault(_look(name), name)
        if other != name:
            raise DataError(
                f"{place}: label {name!r} of '{column}' looks like {other!r} ({where[other]}); "
                f"they are {name!a} and {other!a}",
                hint="write them alike; if they are two labels, list all labels in data.labels",
            )


def _look(name: str) -> str | Decimal:
    """Return what a reader takes a name for: no case, no blanks, one form of each character."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    seen = (each for each in text if each not in _UNSEEN and unicodedata.category(each) != "Cf")
    plain = " ".join("".join(seen).split())
    return Decimal(plain) if _NUMBER.fullmatch(plain) else plain


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
