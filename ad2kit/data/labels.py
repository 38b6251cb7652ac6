"""Labels: from the cells of a file or a hub data set to arrays, by the kind of task.

A class is a text or a whole number. Several labels are a list (also as JSON in a text), names
separated by commas, one cell of 0 or 1 for each label in a list, or one column of 0 or 1 for each
label. The label of a regression is a finite number. A label that is ambiguous, or of any other
form, is an error that names the row.

Logits, answers and labels for each kind of task:

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
from ad2kit.statistics.logits import answers
from ad2kit.tables.rows import SourceLabels

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from ad2kit.run.sections import DataRecipe, Task
    from ad2kit.tables.rows import Place


# The class id of a row without a label, PyTorch's ignore_index; other tasks use NaN.
NO_CLASS = -100
# The code of a cell that holds no label.
_NO_CODE = -1
# A label with less than this part of an equal share of the rows is called rare.
_RARE = 0.2
# Up to this number all labels are named; beyond it, only the least and the most frequent.
_NAMED = 10

# A whole number in its usual form; 07, +7 and 7.0 are other texts for the same number.
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")
_NUMBER = re.compile(
    r"[-+]?([0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})(e[-+]?[0-9]{1,3})?", re.IGNORECASE
)
_DECIMAL = re.compile(r"-?[0-9]+\.[0-9]+")
FLAGS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "False": 0, "True": 1, "false": 0, "true": 1}
"""What a cell may hold that says whether a row has a label."""
_CLOSING = {"[": "]", "(": ")", "{": "}"}
# A list, a tuple, a set or an array of texts or numbers, as Python and numpy print it.
_WRITTEN_LIST = re.compile(
    r"(array|set|frozenset)?[\[({]\s*((['\"\[({0-9+.-]|(True|False|None|nan)\b).*)?[\])}]"
    r"|\[\s*['\"].*",
    re.DOTALL,
)
# What may separate labels in place of the separator of the recipe.
_SEPARATORS = ",;|/\n\t"
# Variation selectors choose between two pictures of one character.
_UNSEEN = {"\ufe0e", "\ufe0f"}
_HOW_TO_WRITE_LISTS = (
    'write a list in JSON: ["a", "b"] in JSON lines, or json.dumps(labels) in a cell'
)


@dataclass(frozen=True)
class LabelSet:
    """The names of the outputs in their order, and the output for each cell of the label column.

    Attributes:
        names: the name of each output.
        given: whether recipe or source gave the order; else the names were sorted.
        outputs: the index of the output for each text that a cell may hold: a name, or an id.
        columns: the index of the output for each cell of a row of 0 and 1.
    """

    names: tuple[str, ...]
    given: bool
    outputs: dict[str, int]
    columns: tuple[int, ...]


class LabelReader:
    """Reads the label cells of a stream of rows, and keeps equal cells once.

    First come the cells of the training rows, then :meth:`fix`, then those of all other rows.
    :meth:`read` turns the codes of the cells into labels.

    Args:
        recipe: names the label column, and perhaps the labels.
        source: the names in the order of their ids, if the source has them (labels.txt, or a class
            column).

    Raises:
        DataError: the names of recipe and source do not fit together.
    """

    def __init__(self, recipe: DataRecipe, source: SourceLabels | None) -> None:
        self._recipe = recipe
        self._column = ", ".join(recipe.label_columns) or "value"
        if len(recipe.label_columns) > 1:
            source = SourceLabels(recipe.label_columns, only_ids=False)
        self._codes: dict[Any, int] = {}
        self._cells: list[tuple[Place, Any]] = []
        self._labels: LabelSet | None = None
        if recipe.task == "regression":
            self._labels = LabelSet((self._column,), given=True, outputs={}, columns=())
        elif recipe.labels or source:
            self._labels = _given_labels(recipe, source)

    @property
    def code_type(self) -> type[np.generic]:
        """The type of the codes of the recipe's task, for arrays of them."""
        return np.float32 if self._recipe.task == "regression" else np.int32

    def code(self, place: Place, cell: Any) -> float:
        """Return the code of a cell: the value of a regression, or a number of the cell.

        A row that lacks its label, if the recipe accepts this, has the code -1 (NaN of a
        regression).

        Raises:
            DataError: the cell is no label, whatever the other rows hold.
        """
        if self._recipe.may_lack_labels and is_empty(cell):
            return math.nan if self._recipe.task == "regression" else _NO_CODE
        if self._recipe.task == "regression":
            return _value(place, cell, self._column)
        # 1, True and 1.0 are equal, and different labels.
        key = cell if isinstance(cell, str) else (type(cell), repr(cell))
        code = self._codes.get(key)
        if code is None:
            self._check(place, cell)
            code = self._codes[key] = len(self._cells)
            self._cells.append((place, cell))
        return code

    def output(self, place: Place, cell: Any) -> int:
        """Return the output of a cell that holds one class of those that recipe or source name.

        Raises:
            DataError: the cell is no class, or none of these.
        """
        return _index(place, _name(place, cell, self._column), self.fix())

    def _check(self, place: Place, cell: Any) -> None:
        """Refuse a cell that is no label; if the labels are known, one that is none of them."""
        if self._recipe.task == "single_label":
            name = _name(place, cell, self._column)
            if self._labels is not None:
                _index(place, name, self._labels)
            return
        if len(self._recipe.label_columns) > 1:
            for column, value in zip(self._recipe.label_columns, cell, strict=True):
                if str(value).strip() not in FLAGS:
                    raise DataError(
                        f"{place}: '{column}' must be 0 or 1, found {value!r:.80}",
                        hint="correct or remove the row",
                    )
            return
        cells = _several(place, cell, self._recipe, self._labels)
        # A row of 0 and 1 may be that, or ids: all rows together decide.
        if _multi_hot_width([cells]) is None:
            for name in _names(place, cells, self._column):
                if self._labels is not None:
                    _index(place, name, self._labels)

    def fix(self) -> LabelSet:
        """Return the labels of the recipe, else of the source, else all that occurred so far.

        Labels that occur are sorted: as numbers if all are whole numbers, else as texts. A
        regression has one output, named after its column.

        Raises:
            DataError: the labels do not fit the task, or two of them look alike.
        """
        if self._labels is None:
            self._labels = _found_labels(self._cells, self._recipe)
        return self._labels

    def read(self, codes: NDArray[Any]) -> NDArray[Any]:
        """Return the labels of rows by their codes.

        All cells together decide whether they hold a cell of 0 or 1 for each label.

        Returns:
            Class ids, int64 [rows]; 0 or 1, float32 [rows, labels]; or values, float32 [rows].

        Raises:
            DataError: a label does not fit; the message names the place of the first one.
        """
        task = self._recipe.task
        if task == "regression":
            return codes.astype(np.float32)
        labels = self.fix()
        row_labels = no_labels(task, len(codes), len(labels.names))
        labelled = codes != _NO_CODE
        if task == "single_label":
            ids = [
                _index(place, _name(place, cell, self._column), labels)
                for place, cell in self._cells
            ]
            row_labels[labelled] = np.asarray(ids, dtype=np.int64)[codes[labelled]]
        elif self._cells:
            indicators = _indicators(self._cells, self._recipe, labels)
            row_labels[labelled] = indicators[codes[labelled]]
        return row_labels


def _found_labels(cells_of_rows: Sequence[tuple[Place, Any]], recipe: DataRecipe) -> LabelSet:
    """Return the labels that occur in cells, sorted."""
    column = recipe.label_columns[0]
    first_seen: dict[str, Place] = {}
    if recipe.task == "single_label":
        for place, cell in cells_of_rows:
            first_seen.setdefault(_name(place, cell, column), place)
        _check_classes(first_seen, column)
    else:
        split_cells = [_several(place, cell, recipe) for place, cell in cells_of_rows]
        if (width := _multi_hot_width(split_cells)) is not None:
            raise DataError(
                f"{cells_of_rows[0][0]}: every row of '{column}' holds {width} cells of 0 or 1, "
                "and nothing says which label each of them is",
                hint=f"give the {width} names in the order of the cells: data.labels=[...]",
            )
        for (place, _), cells in zip(cells_of_rows, split_cells, strict=True):
            for name in _names(place, cells, column):
                first_seen.setdefault(name, place)
        _check_separators(first_seen, recipe)
    _check_names_differ(first_seen, column)
    are_numbers = all(_WHOLE.fullmatch(name) for name in first_seen)
    names = tuple(sorted(first_seen, key=int) if are_numbers else sorted(first_seen))
    outputs = {name: output for output, name in enumerate(names)}
    return LabelSet(names, given=False, outputs=outputs, columns=())


def _indicators(
    cells_of_rows: Sequence[tuple[Place, Any]], recipe: DataRecipe, labels: LabelSet
) -> NDArray[np.float32]:
    """Return 0 or 1 for each cell and label."""
    column = ", ".join(recipe.label_columns)
    split_cells = [_several(place, cell, recipe, labels) for place, cell in cells_of_rows]
    indicators = np.zeros((len(cells_of_rows), len(labels.names)), dtype=np.float32)
    if (width := _multi_hot_width(split_cells)) is not None:
        if width != len(labels.columns):
            raise DataError(
                f"{cells_of_rows[0][0]}: every row of '{column}' holds {width} cells of 0 or 1, "
                f"expected one for each label ({', '.join(labels.names)})",
                hint="give data.labels a name for each cell, in their order",
            )
        indicators[:, labels.columns] = [
            [FLAGS[str(cell)] for cell in cells] for cells in split_cells
        ]
        return indicators
    for row_indicators, (place, _), cells in zip(
        indicators, cells_of_rows, split_cells, strict=True
    ):
        present = [_index(place, name, labels) for name in _names(place, cells, column)]
        row_indicators[present] = 1.0
    return indicators


def _given_labels(recipe: DataRecipe, given: SourceLabels | None) -> LabelSet:
    """Return the labels that the recipe or the source names.

    The source names its ids. The recipe may list the same names in another order, or some of them;
    if it shares no name with the source, it renames all of them.
    """
    source = None
    if given is not None:
        source = tuple(name.strip() for name in given.names)
        if "" in source or len(set(source)) < len(source):
            raise DataError(
                f"{recipe.source}: a name of its labels is empty or appears twice: {source}",
                hint="correct labels.txt, or give the names in data.labels",
            )
    names = recipe.labels or source or ()
    outputs = {name: output for output, name in enumerate(names)}
    output_by_form = {_plain_form(name): output for output, name in enumerate(names)}
    output_of_id: tuple[int | None, ...] = tuple(range(len(names)))
    if source is not None and any(_plain_form(name) in output_by_form for name in source):
        output_of_id = tuple(
            outputs.get(name, output_by_form.get(_plain_form(name))) for name in source
        )
    elif source is not None and len(source) != len(names):
        raise DataError(
            f"data.labels holds {len(names)} names ({', '.join(names)}), and {recipe.source} "
            f"{len(source)} others ({', '.join(source)})",
            hint="give data.labels a name for each of them, or names that are among them",
        )
    output_by_id = {
        str(number): output for number, output in enumerate(output_of_id) if output is not None
    }
    columns = tuple(output_by_id.values()) if None not in output_of_id else ()
    if given is not None and given.only_ids:
        return LabelSet(names, given=True, outputs=output_by_id, columns=columns)
    if source is not None:
        pairs = zip(source, output_of_id, strict=True)
        outputs = {name: output for name, output in pairs if output is not None} | outputs
    if not any(_NUMBER.fullmatch(name) for name in outputs):
        outputs = output_by_id | outputs
    return LabelSet(names, given=True, outputs=outputs, columns=columns)


def check_names(given: SourceLabels | None, labels: Sequence[str], table: str) -> None:
    """Refuse a table of another source that names its labels, and none of them as the data do.

    Only the data's own source may be renamed by ``data.labels``: its order is known.

    Raises:
        DataError: shows both lists.
    """
    if given is None:
        return
    known = {_plain_form(name) for name in labels}
    if known.isdisjoint(map(_plain_form, given.names)):
        raise DataError(
            f"{table} names its labels {', '.join(given.names)}, and none of them is a label of "
            f"the data: {', '.join(labels)}",
            hint="write the names of the data into that table or its labels.txt, or correct "
            "data.labels",
        )


def is_empty(cell: Any) -> bool:
    """Tell whether a label cell, or the cells of all label columns, hold nothing."""
    if isinstance(cell, list) and cell:
        return all(map(is_empty, cell))
    return cell is None or (isinstance(cell, str) and not cell.strip())


def has_label(task: Task, labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which rows have a label, bool [rows]."""
    if task == "single_label":
        return np.asarray(labels != NO_CLASS)
    return np.asarray(~np.isnan(labels if labels.ndim == 1 else labels[:, 0]))


def filled(task: Task, labels: NDArray[Any], logits: NDArray[Any]) -> NDArray[Any]:
    """Return labels with the teacher's answers, from its logits, for the rows that lack a label."""
    labelled = has_label(task, labels)
    if labelled.all():
        return labels
    if task == "multi_label":
        labelled = labelled[:, None]
    return np.where(labelled, labels, answers(task, logits)).astype(labels.dtype)


def no_labels(task: Task, rows: int, outputs: int) -> NDArray[Any]:
    """Return an array of missing labels in the form of :meth:`LabelReader.read`."""
    if task == "single_label":
        return np.full(rows, NO_CLASS, dtype=np.int64)
    shape = (rows,) if task == "regression" else (rows, outputs)
    return np.full(shape, np.nan, dtype=np.float32)


def counts(task: Task, labels: NDArray[Any], names: tuple[str, ...]) -> dict[str, int]:
    """Return the number of rows with each label; empty for a regression."""
    if task == "regression":
        return {}
    labels = labels[has_label(task, labels)]
    if task == "single_label":
        per_label = np.bincount(labels, minlength=len(names))
    else:
        per_label = labels.sum(axis=0)
    return {name: int(count) for name, count in zip(names, per_label, strict=True)}


def balance(label_counts: dict[str, int], rows: int) -> str:
    """Return the shares of the labels in the rows, in words, and the labels that are rare.

    Args:
        label_counts: the number of rows with each label.
        rows: the number of rows that have a label.
    """

    def share(name: str) -> str:
        return f"{name} {label_counts[name]} ({label_counts[name] / rows:.1%})"

    if not rows:
        return "no row has a label"
    names = sorted(label_counts, key=lambda name: label_counts[name])
    if len(label_counts) <= _NAMED:
        words = ", ".join(map(share, label_counts))
    else:
        words = f"{len(label_counts)} labels, from {share(names[0])} to {share(names[-1])}"
    total = sum(label_counts.values())
    rare = [name for name in names if label_counts[name] < _RARE * total / len(label_counts)]
    if not rare:
        return words
    more = f" and {len(rare) - _NAMED} more" if len(rare) > _NAMED else ""
    return f"{words}; rare (see class_weights): {', '.join(rare[:_NAMED])}{more}"


def _name(where: Place, value: object, column: str) -> str:
    """Return a cell as text: 1, "1" and 1.0 (from a Parquet column with gaps) are the same."""
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
    where: Place, value: Any, recipe: DataRecipe, labels: LabelSet | None = None
) -> list[Any]:
    """Return the stripped cells of a row of several labels; the row may have no label.

    If ``labels`` is given, a text that looks like a list may still be the name of one label.
    """
    if isinstance(value, str):
        value = _split(where, value.strip(), recipe, {} if labels is None else labels.outputs)
    if not isinstance(value, list):
        raise DataError(
            f"{where}: '{', '.join(recipe.label_columns)}' must be a list of labels, or names "
            f"separated by {_in_words(recipe.label_separator)}, found {value!r}",
            hint="remove or correct the row; a row without labels has [] or an empty text",
        )
    return [cell.strip() if isinstance(cell, str) else cell for cell in value]


def _split(where: Place, text: str, recipe: DataRecipe, outputs: dict[str, int]) -> list[Any]:
    """Return the labels in a text of several labels: a JSON list, or names between separators.

    ``outputs`` holds the texts that are labels already, if the labels are known.
    """
    column = recipe.label_columns[0]
    separator = recipe.label_separator
    parts = [part.strip() for part in text.split(separator) if part.strip()]
    if all(part in outputs for part in parts) and not (separator in text and text in outputs):
        return parts
    closing = _CLOSING.get(text[:1])
    if closing == "]":
        try:
            json_value = json.loads(text)
        except (ValueError, RecursionError):
            json_value = None
        if isinstance(json_value, list):
            return json_value
    in_brackets = closing and text.endswith(closing) and closing not in parts[0]
    if in_brackets or _WRITTEN_LIST.fullmatch(text):
        raise DataError(
            f"{where}: '{column}' holds a list as Python writes it, which is no list here: {text}",
            hint=_HOW_TO_WRITE_LISTS,
        )
    if any(separator in name for name in outputs) and separator in text:
        raise DataError(
            f"{where}: '{column}' holds {text!r}, where {_in_words(separator)} may separate two "
            "labels or be part of one",
            hint=_HOW_TO_WRITE_LISTS,
        )
    return parts


def _in_words(separator: str) -> str:
    return "a comma" if separator == "," else repr(separator)


def _multi_hot_width(cells_of_rows: Iterable[list[Any]]) -> int | None:
    """Return the number of cells of 0 or 1 in every row; None if the rows hold anything else."""
    width = None
    for cells in cells_of_rows:
        width = len(cells) if width is None else width
        if width < 2 or len(cells) != width or any(str(cell) not in FLAGS for cell in cells):
            return None
    return width


def _names(where: Place, cells: list[Any], column: str) -> list[str]:
    """Return cells as names or ids; refuse cells that look like 0 or 1 for each label."""
    texts = [_name(where, cell, column) for cell in cells]
    numbers = [text for text in texts if _NUMBER.fullmatch(text)]
    if len(set(numbers)) < len(numbers) or any(isinstance(cell, bool) for cell in cells):
        raise DataError(
            f"{where}: '{column}' holds {cells!r}, neither labels (a number is there twice, or "
            "true or false) nor, as every row would have to, 0 or 1 for each label",
            hint=f"{_HOW_TO_WRITE_LISTS}; or give data.labels, and as many cells in every row",
        )
    return texts


def _index(where: Place, name: str, labels: LabelSet) -> int:
    """Return the index of the output for a name or id, or refuse the row with a fitting hint."""
    index = labels.outputs.get(name)
    if index is not None:
        return index
    hint = "correct the row, or list all labels in data.labels"
    similar = [label for label in labels.names if _plain_form(label) == _plain_form(name)]
    if similar:
        hint = f"write {similar[0]!a} in place of {name!a}; or list all labels in data.labels"
    elif _WHOLE.fullmatch(name) and int(name) < 0:
        hint = "some sets mark rows without a label so: remove them, or name a split with labels"
    elif _WHOLE.fullmatch(name) and not any(map(_NUMBER.fullmatch, labels.names)):
        hint = "list the labels in the order of their ids in data.labels, or write names everywhere"
    raise DataError(
        f"{where}: label {name!r} is not in the label set ({', '.join(labels.names)})", hint=hint
    )


def _value(where: Place, value: Any, column: str) -> float:
    """Return the label of a regression as a finite number."""
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


def _check_classes(first_seen: dict[str, Place], column: str) -> None:
    """Refuse names that are not classes; ``first_seen`` maps each name to its first row."""
    if len(first_seen) > 2 and all(_DECIMAL.fullmatch(name) for name in first_seen):
        raise DataError(
            f"{next(iter(first_seen.values()))}: '{column}' holds decimal numbers such as "
            f"{min(first_seen)}, not classes",
            hint="set data.task=regression, or list the classes in data.labels",
        )
    for name, where in first_seen.items():
        if _WRITTEN_LIST.fullmatch(name) and (len(name) == 2 or set(name) & set("'\", ")):
            raise DataError(
                f"{where}: '{column}' holds a list and not one class: {name}",
                hint="set data.task=multi_label, or list the classes in data.labels",
            )


def _check_separators(first_seen: dict[str, Place], recipe: DataRecipe) -> None:
    """Refuse several labels whose separator is another one than in the recipe."""
    others = _SEPARATORS.replace(recipe.label_separator, "")
    for name, where in first_seen.items():
        parts = [part.strip() for part in re.split(f"[{re.escape(others)}]", name)]
        if len(parts) > 1 and all(part in first_seen for part in parts):
            separator = next(character for character in name if character in others)
            raise DataError(
                f"{where}: '{recipe.label_columns[0]}' holds {name!r}, and "
                f"{', '.join(map(repr, parts))} are labels too",
                hint=f"if {separator!r} separates labels, give "
                f"data.label_separator={json.dumps(separator)}; if it is one label, list all "
                "labels in data.labels",
            )


def _check_names_differ(first_seen: dict[str, Place], column: str) -> None:
    """Refuse two labels that look alike, or that are the same number."""
    name_by_form: dict[str | Decimal, str] = {}
    for name, where in first_seen.items():
        other = name_by_form.setdefault(_plain_form(name), name)
        if other != name:
            raise DataError(
                f"{where}: label {name!r} of '{column}' looks like {other!r} "
                f"({first_seen[other]}); they are {name!a} and {other!a}",
                hint="write them alike; if they are two labels, list all labels in data.labels",
            )


def _plain_form(name: str) -> str | Decimal:
    """Return the form by which names look alike: NFKC, no case, single blanks, or a number."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    visible = (
        character
        for character in text
        if character not in _UNSEEN and unicodedata.category(character) != "Cf"
    )
    plain = " ".join("".join(visible).split())
    return Decimal(plain) if _NUMBER.fullmatch(plain) else plain
