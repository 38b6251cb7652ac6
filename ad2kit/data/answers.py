"""Answers of a teacher that is not run here: from tables to logits for each text of the splits.

AD2 needs of its teacher only a distribution for each text. So the answers are a function of the
text: rows with equal texts must have equal answers, wherever the rows are. Numbers in the tables
are read as they are; nothing is guessed.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ad2kit.data.labels import LabelReader, check_names
from ad2kit.data.sources import open_source, open_unlabelled
from ad2kit.run.errors import DataError, nearest
from ad2kit.statistics.logits import logits_of, scores
from ad2kit.tables.texts import is_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from ad2kit.data.sources import SplitRows
    from ad2kit.data.splits import Data
    from ad2kit.run.sections import AnswersRecipe, DataRecipe
    from ad2kit.tables.rows import Place, SourceLabels

    Logits = NDArray[np.float32]

SPLITS = ("distillation", "select", "validation")
"""The parts of the data that a teacher answers; `distillation` is train, then unlabelled."""

# Probabilities are often rounded. Their sum is 1 within this, or the row is refused.
_SUM_TOLERANCE = 0.01
# Numbers of two answers to one text that differ by no more than this are the same.
_SAME = 1e-3
_NAMED = 5


def read_answers(recipe: DataRecipe, data: Data, given: AnswersRecipe) -> dict[str, Logits]:
    """Return the logits of given answers for the texts of each of :data:`SPLITS`.

    Args:
        recipe: the data section, which names the texts.
        data: the splits that it describes.
        given: tables with answers; not a model.

    Returns:
        For each of :data:`SPLITS`, float32 [rows, outputs]. The softmax of a row (the sigmoid, of
        several labels) is the given distribution; given logits are returned as they are.

    Raises:
        DataError: an answer is malformed, a text has two answers or none, or a label is unknown.
            The message names the lines, and how many there are.
    """
    reader = _Reader(recipe, data, given)
    join = (given.key,) if given.key else given.text_columns or recipe.text_columns
    if len(join) != len(recipe.text_columns) and not given.key:
        raise DataError(
            f"teacher.answers: expected {len(recipe.text_columns)} text columns, found {len(join)}",
            hint="name as many in text_columns as in data.text_columns",
        )
    found = _Found(str(given))
    for table in answer_tables(recipe, (*join, *given.columns), given.files):
        reader.begin(table)
        for place, cells, error in table.cells():
            keys = tuple(cells.get(column) for column in join)
            if error is not None or not all(map(_is_key if given.key else is_text, keys)):
                # A bad row of the data is refused, or left out, where the data are read.
                if given.files:
                    found.refuse(error or _no_key(place, join, keys))
                continue
            try:
                answer = reader.read(place, cells)
            except DataError as refused:
                found.refuse(refused)
                continue
            found.add(place, _joined(keys) if given.key else hash(keys), answer)
    found.check()
    if given.key:
        found = _by_text(recipe, given.key, found)
    return _for_splits(recipe, data, given, found, reader)


def answer_tables(
    recipe: DataRecipe, columns: Sequence[str], files: Sequence[str] = ()
) -> Iterator[SplitRows]:
    """Yield the tables of answers, or those of the data, which then have to have the columns.

    Raises:
        DataError: see :func:`ad2kit.data.sources.open_source`.
    """
    # What a table is read for are its texts: here, all columns that are needed.
    wanted = recipe.model_copy(update={"text_columns": tuple(dict.fromkeys(columns))})
    if files:
        for reference in files:
            yield open_unlabelled(reference, wanted, "teacher.answers")
        return
    source = open_source(wanted)
    for table, file in ((source.train, recipe.train), (source.validation, recipe.validation)):
        # A folder has one file labels.txt for both; open_source has read it.
        beside = Path(file).expanduser() if file and recipe.source is None else None
        yield replace(table, beside=beside)
    for reference in recipe.unlabelled:
        yield replace(open_unlabelled(reference, wanted), labels=source.labels)


def _is_key(cell: object) -> bool:
    return isinstance(cell, (str, int)) and not isinstance(cell, bool) and str(cell).strip() != ""


def _joined(keys: Sequence[Any]) -> int:
    """Return the hash of a key; 12 in one file is "12" in another."""
    return hash(("key", str(keys[0]).strip()))


def _no_key(place: Place, columns: Sequence[str], keys: Sequence[Any]) -> DataError:
    return DataError(
        f"{place}: expected something in {' and '.join(map(repr, columns))} that joins the row to "
        f"a text, found {keys!r:.80}",
        hint="correct or remove the row",
    )


@dataclass
class _Found:
    """The answers that were found: the index of each by the hash of its text, or of its key.

    An answer is the bytes of its float32 numbers. ``at`` is the place of the first row of each, and
    ``refusals`` are the rows that are wrong.
    """

    name: str
    indices: dict[int, int] = field(default_factory=dict)
    answers: list[bytes] = field(default_factory=list)
    at: list[Place] = field(default_factory=list)
    rows: int = 0
    refusals: list[str] = field(default_factory=list)
    hint: str = ""

    def add(self, place: Place, key: int, answer: bytes) -> None:
        """Keep an answer; a second one to the same text must be the same."""
        self.rows += 1
        index = self.indices.setdefault(key, len(self.answers))
        if index == len(self.answers):
            self.answers.append(answer)
            self.at.append(place)
        elif not _alike(self.answers[index], answer):
            self.rows -= 1
            self.refuse(
                DataError(
                    f"{place}: another answer than {self.at[index]} gives to the same text",
                    hint="keep one answer for each text; of several draws give the shares as "
                    "probabilities",
                )
            )

    def refuse(self, error: DataError) -> None:
        """Count a row that is wrong; the message begins with its place."""
        self.rows += 1
        self.refusals.append(error.message)
        self.hint = self.hint or error.hint

    def check(self) -> None:
        """Refuse the answers if a row was wrong, or if there is none."""
        if not self.rows:
            raise DataError(
                f"teacher.answers: {self.name} holds no row", hint="give a table that holds rows"
            )
        if self.refusals:
            raise DataError(
                f"teacher.answers: {len(self.refusals)} of {self.rows} rows of {self.name} cannot "
                f"be used:\n  {_listed(self.refusals)}",
                hint=self.hint,
            )


def _alike(one: bytes, other: bytes) -> bool:
    """Tell whether two answers to a text are the same.

    A model that reads a text in two batches rounds its sums in another order.
    """
    if one == other:
        return True
    first, second = (np.frombuffer(answer, np.float32) for answer in (one, other))
    return bool(np.abs(first - second).max() <= _SAME)


def _listed(lines: Sequence[str]) -> str:
    more = [f"and {len(lines) - _NAMED} more"] if len(lines) > _NAMED else []
    return "\n  ".join([*lines[:_NAMED], *more])


def _by_text(recipe: DataRecipe, key: str, found: _Found) -> _Found:
    """Return answers by text in place of answers by key, which the data's own tables join."""
    joined = _Found(found.name)
    missing: list[str] = []
    for table in answer_tables(recipe, (*recipe.text_columns, key)):
        for place, cells, error in table.cells():
            texts = tuple(cells.get(column) for column in recipe.text_columns)
            if error is not None or not all(map(is_text, texts)):
                continue
            cell = cells.get(key)
            index = found.indices.get(_joined((cell,))) if _is_key(cell) else None
            if index is None:
                missing.append(f"{place}: no answer with {key} {cell!r}")
            else:
                joined.add(place, hash(texts), found.answers[index])
    if missing:
        raise DataError(
            f"teacher.answers: {len(missing)} rows of the data have no answer in {found.name}:"
            f"\n  {_listed(missing)}",
            hint=f"add an answer for each {key}, or leave these rows out of the data",
        )
    joined.check()
    return joined


def _for_splits(
    recipe: DataRecipe, data: Data, given: AnswersRecipe, found: _Found, reader: _Reader
) -> dict[str, Logits]:
    """Return the logits for the texts of each split; refuse texts without an answer."""
    hashes = np.fromiter(found.indices, np.int64, len(found.indices))
    order = np.argsort(hashes)
    hashes = hashes[order]
    logits = reader.logits(found.answers)[order]
    splits = dict(zip(SPLITS, (data.distillation(), data.select, data.validation), strict=True))
    by_split = {}
    missing: dict[str, NDArray[np.int64]] = {}
    for name, split in splits.items():
        wanted = split.texts.hashes()
        places = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
        absent = np.flatnonzero(hashes[places] != wanted)
        if len(absent):
            missing[name] = wanted[absent]
        by_split[name] = logits[places]
    if missing:
        counts = ", ".join(
            f"{len(absent)} of {len(splits[name])} of {name}" for name, absent in missing.items()
        )
        raise DataError(
            f"teacher.answers: texts without an answer in {given}: {counts}; the first:\n  "
            + "\n  ".join(_places(recipe, set(np.concatenate([*missing.values()]).tolist()))),
            hint="add their answers, or leave these rows out of the data; a text is joined by all "
            "of its characters",
        )
    return by_split


def _places(recipe: DataRecipe, hashes: set[int]) -> list[str]:
    """Return the places of the first texts that have these hashes, with their beginning."""
    lines: list[str] = []
    for table in answer_tables(recipe, recipe.text_columns):
        for place, cells, _ in table.cells():
            texts = tuple(cells.get(column) for column in recipe.text_columns)
            if all(map(is_text, texts)) and hash(texts) in hashes:
                lines.append(f"{place}: {' | '.join(map(str, texts))!r:.80}")
                if len(lines) == _NAMED:
                    return lines
    return lines


class _Reader:
    """Reads one kind of answer: the cells of a row to numbers, and the numbers of all to logits."""

    def __init__(self, recipe: DataRecipe, data: Data, given: AnswersRecipe) -> None:
        self._task = data.task
        self._labels = data.labels
        self._given = given
        columns = given.probabilities or given.logits or ()
        if columns and len(columns) not in (1, len(data.labels)):
            kind = "probabilities" if given.probabilities else "logits"
            raise DataError(
                f"teacher.answers: {kind} names {len(columns)} columns: expected one, or one for "
                f"each of the {len(data.labels)} labels ({', '.join(data.labels[:_NAMED])}, ...)",
                hint="name them in the order of data.labels",
            )
        labels = None if data.task == "regression" else data.labels
        # The teacher's label: an empty cell is no answer, whatever the data may lack.
        update = {"label_column": given.label or "", "labels": labels, "missing_labels": "refuse"}
        self._recipe = recipe.model_copy(update=update)
        self._label_readers: dict[SourceLabels | None, LabelReader] = {}
        self._table = 0

    def begin(self, table: SplitRows) -> None:
        """Go on with another table, in which an id may stand for another label.

        Raises:
            DataError: the labels of the table do not fit those of the data.
        """
        if self._given.label is None:
            return
        labels = table.labels_of(self._given.label)
        if self._given.files and self._task != "regression":
            check_names(labels, self._labels, table.name)
        if labels not in self._label_readers:
            named = self._recipe.model_copy(update={"source": table.name})
            self._label_readers[labels] = LabelReader(named, labels)
        self._table = list(self._label_readers).index(labels)
        self._label_reader = self._label_readers[labels]

    def read(self, place: Place, cells: Any) -> bytes:
        """Return the numbers of an answer as float32: of each output, or those of a label.

        Those of a label are its output, value or code, its confidence, and which reader gave the
        code.

        Raises:
            DataError: the cells hold no such answer; the message begins with the place.
        """
        given = self._given
        if given.label is not None:
            cell, table = cells.get(given.label), 0
            if self._task == "single_label":  # equal labels are equal answers, however written
                code: float = self._label_reader.output(place, cell)
            else:
                code = self._label_reader.code(place, cell)
                table = self._table if self._task == "multi_label" else 0
            return np.array([code, self._confidence(place, cells), table], np.float32).tobytes()
        columns = given.probabilities or given.logits or ()
        if len(columns) == 1 and len(self._labels) > 1:
            numbers = self._from_one_cell(place, columns[0], cells.get(columns[0]))
        else:
            numbers = [_number(place, column, cells.get(column)) for column in columns]
        if given.probabilities:
            numbers = self._distribution(place, columns, numbers)
        return np.array(numbers, np.float32).tobytes()

    def _confidence(self, place: Place, cells: Any) -> float:
        column = self._given.confidence
        cell = None if column is None else cells.get(column)
        if column is None or cell is None or cell == "":
            return 1.0
        value = _number(place, column, cell)
        least = 1 / len(self._labels)
        if not least <= value <= 1:
            raise DataError(
                f"{place}: '{column}' must be from {least:.3g} (an equal share of "
                f"{len(self._labels)} labels) to 1, found {value:g}",
                hint="give the probability of the label, or leave the cell empty",
            )
        return value

    def _from_one_cell(self, place: Place, column: str, cell: Any) -> list[float]:
        """Return the numbers in a list, or in an object of labels; NaN for labels left out."""
        content = _json(place, column, cell) if isinstance(cell, str) else cell
        if isinstance(content, (list, tuple)):
            if len(content) != len(self._labels):
                raise DataError(
                    f"{place}: '{column}' holds {len(content)} numbers, expected "
                    f"{len(self._labels)}, one for each label",
                    hint="give the numbers in the order of data.labels, or an object of labels",
                )
            return [_number(place, column, each) for each in content]
        if not isinstance(content, dict) or not content:
            raise DataError(
                f"{place}: '{column}' must hold a list or an object in JSON, found {cell!r:.80}",
                hint='write [0.9, 0.1] or {"good": 0.9, "bad": 0.1}',
            )
        for name in content:
            if name not in self._labels:
                raise DataError(
                    f"{place}: '{column}' has the unknown label {name!r}"
                    f"{nearest(str(name), self._labels)}; labels: "
                    f"{', '.join(self._labels[:_NAMED])}"
                    f"{', ...' if len(self._labels) > _NAMED else ''}",
                    hint="correct the row, or list all labels in data.labels",
                )
        left_out = [name for name in self._labels if name not in content]
        if left_out and (self._task != "single_label" or self._given.logits):
            raise DataError(
                f"{place}: '{column}' leaves out {', '.join(map(repr, left_out[:_NAMED]))}",
                hint="give a number for each label",
            )
        return [
            _number(place, column, content[name]) if name in content else math.nan
            for name in self._labels
        ]

    def _distribution(
        self, place: Place, columns: Sequence[str], numbers: Sequence[float]
    ) -> list[float]:
        """Return the probabilities of a row, whole and with the sum 1 if there is one class."""
        where = f"{place}: the probabilities in {_column_words(columns)}"
        present = [number for number in numbers if not math.isnan(number)]
        if min(present) < 0 or max(present) > 1 + _SUM_TOLERANCE:
            wrong = min(present) if min(present) < 0 else max(present)
            raise DataError(
                f"{where} must be from 0 to 1, found {wrong:g}",
                hint="if these are logits, name the columns in 'logits'",
            )
        if self._task != "single_label":
            return [min(number, 1.0) for number in numbers]
        total = math.fsum(present)
        left_out = len(numbers) - len(present)
        if total > 1 + _SUM_TOLERANCE or (not left_out and total < 1 - _SUM_TOLERANCE):
            at_most = "at most " if left_out else ""
            raise DataError(
                f"{where} must have the sum {at_most}1, found {total:g}",
                hint="correct the rows; if these are logits, name the columns in 'logits'",
            )
        if not left_out:
            return [number / total for number in numbers]
        total = max(total, 1.0)
        rest = (1 - math.fsum(present) / total) / left_out
        return [rest if math.isnan(number) else number / total for number in numbers]

    def logits(self, answers: Sequence[bytes]) -> Logits:
        """Return the logits of all answers, float32 [answers, outputs]."""
        numbers = np.frombuffer(b"".join(answers), np.float32).reshape(len(answers), -1)
        given = self._given
        if given.logits:
            return numbers
        if given.probabilities:
            return logits_of(self._task, numbers)
        if self._task == "regression":
            return np.asarray(numbers[:, :1])
        if self._task == "multi_label":
            indicators = np.zeros((len(answers), len(self._labels)), np.float32)
            for table, reader in enumerate(self._label_readers.values()):
                rows = numbers[:, 2] == table
                indicators[rows] = reader.read(numbers[rows, 0].astype(reader.code_type))
            return logits_of(self._task, indicators)
        labels = numbers[:, 0].astype(np.int64)
        confidence = numbers[:, 1].astype(np.float64)
        shares = (1 - confidence) / (len(self._labels) - 1)
        distribution = np.repeat(shares[:, None], len(self._labels), axis=1)
        distribution[np.arange(len(labels)), labels] = confidence
        return logits_of(self._task, distribution)


def mean_answers(
    members: Sequence[dict[str, Logits]], weights: Sequence[float], data: Data
) -> dict[str, Logits]:
    """Return the logits of the weighted mean of the probabilities of several teachers.

    The numbers of a regression are averaged. One member alone is returned as it is.
    """
    if len(members) == 1:
        return members[0]
    shares = np.asarray(weights) / np.sum(weights)
    return {
        name: logits_of(
            data.task,
            sum(
                share * scores(data.task, member[name])
                for share, member in zip(shares, members, strict=True)
            ),
        )
        for name in SPLITS
    }


def _column_words(columns: Sequence[str]) -> str:
    words = ", ".join(map(repr, columns[:_NAMED]))
    return f"{words}, ..." if len(columns) > _NAMED else words


def _number(place: Place, column: str, cell: Any) -> float:
    """Return a finite number; it may be written as a text."""
    try:
        number = math.nan if cell is None or isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or abs(number) > float(np.finfo(np.float32).max):
        raise DataError(
            f"{place}: '{column}' must hold a finite number, found {cell!r:.80}",
            hint="correct or remove the row",
        )
    return number


def _json(place: Place, column: str, cell: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            msg = "a label is there twice"
            raise ValueError(msg)
        return dict(pairs)

    try:
        return json.loads(cell, object_pairs_hook=once)
    except ValueError as error:
        raise DataError(
            f"{place}: '{column}' is not JSON ({error}): {cell!r:.80}",
            hint='write [0.9, 0.1] or {"good": 0.9, "bad": 0.1}',
        ) from error
