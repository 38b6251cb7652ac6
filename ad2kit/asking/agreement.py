"""Agreement of a language model's answers: with labels of the table, and with another pass.

The labels say whether the teacher is good enough. Another pass, with another prompt, seed or model,
says how far the teacher agrees with itself: no student can be expected to agree with it more often.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ad2kit.asking.records import Agreement, AskJob
from ad2kit.asking.results import label_column
from ad2kit.data.labels import LabelReader, check_names, is_empty
from ad2kit.data.sources import labels_beside, open_unlabelled
from ad2kit.run.errors import DataError, RunError
from ad2kit.scoring.blocks import filesystem, is_local
from ad2kit.statistics import sample_size
from ad2kit.tables.formats import known_format, read_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ad2kit.run.sections import DataRecipe
    from ad2kit.scoring.parts import Tables
    from ad2kit.tables.rows import Place, SourceLabels
    from ad2kit.tables.text_files import Quotes


class Other(NamedTuple):
    """The answers of another job: the cell of the label by the texts of a row."""

    folder: Path
    column: str
    cells: dict[tuple[Any, ...], Any]


def other_answers(folder: Path, job: AskJob) -> Other:
    """Read the answers of another job.

    Raises:
        RunError: it is no job of `ad2kit ask`, or has other labels or columns.
    """
    if not (folder / AskJob.file_name).is_file():
        raise RunError(
            f"--against: expected the output of `ad2kit ask`, found no {AskJob.file_name} in "
            f"{folder}",
            hint="name the OUTPUT of another `ad2kit ask` that has ended",
        )
    other = AskJob.read(folder / AskJob.file_name)
    for name in ("labels", "text_columns", "task"):
        there, here = getattr(other, name), getattr(job, name)
        if there != here and (name != "labels" or set(there) != set(here)):
            raise RunError(
                f"{folder} has other {name}: {there!r} there, {here!r} here",
                hint="compare with a folder of the same task",
            )
    column = label_column(other.task, other.prefix)
    rows = _rows(folder, (*other.text_columns, column), other.csv_quotes)
    return Other(folder, column, {tuple(texts): answer for _, (*texts, answer) in rows})


def agreements(
    data: DataRecipe, job: AskJob, tables: Tables, folder: Path, other: Other | None
) -> Iterator[Agreement]:
    """Yield the agreement with the columns of labels, if the table has them, and with another job.

    Args:
        data: names the columns of the labels.
        job: the job.
        tables: its input.
        folder: its parts.
        other: the answers of another job to the same texts.
    """
    answered = label_column(job.task, job.prefix)
    columns = data.label_columns
    has_labels = bool(columns) and set(columns) <= set(tables.layout.columns)
    # The columns of JSON are those of its first row, and any other row may hold more.
    is_json = known_format(tables.part(0)).is_json
    if has_labels or (columns and is_json):
        rows = _rows(folder, (*columns, answered), job.csv_quotes, every=is_json)
        pairs = (
            (place, cells[0] if len(columns) == 1 else cells, answer)
            for place, (*cells, answer) in rows
        )
        labels = _labels_of(data, tables, folder) if len(columns) == 1 else None
        found = _agreement(data, ", ".join(columns), columns, answered, pairs, labels)
        if has_labels or found.rows or found.left_out:
            yield found
    if other is not None:
        rows = _rows(folder, (*job.text_columns, answered), job.csv_quotes)
        pairs = (
            (place, other.cells[tuple(texts)], answer)
            for place, (*texts, answer) in rows
            if tuple(texts) in other.cells
        )
        yield _agreement(data, str(other.folder), (other.column,), answered, pairs)


def _labels_of(data: DataRecipe, tables: Tables, folder: Path) -> SourceLabels | None:
    """Return the names that the ids in the label column of a table stand for, if it has them."""
    parts = open_unlabelled(str(folder), data)  # they keep the names of classes
    store, path = filesystem(tables.files[0].url)
    beside = labels_beside(Path(path)) if is_local(store) else None
    return replace(parts, labels=beside).labels_of(data.label_columns[0])


def _rows(
    folder: Path, columns: tuple[str, ...], quotes: Quotes, *, every: bool = False
) -> Iterator[tuple[Place, list[Any]]]:
    """Yield the place and some cells of each row of the parts of a job; None for a missing key."""
    for place, cells in read_rows(folder, columns, quotes, every=every):
        yield place, [cells.get(column) for column in columns]


def _agreement(
    data: DataRecipe,
    with_what: str,
    given_columns: tuple[str, ...],
    answered_column: str,
    pairs: Iterable[tuple[Place, Any, Any]],
    labels: SourceLabels | None = None,
) -> Agreement:
    """Compare the labels in two columns of cells, as a training would read them.

    Args:
        data: names the labels.
        with_what: the name of the given labels.
        given_columns: the columns of the given labels.
        answered_column: the column of the answers.
        pairs: the place of each row, its given cell or cells, and its answered cell.
        labels: the names of the ids in the given column, if its table has them.
    """
    given_column = given_columns if len(given_columns) > 1 else given_columns[0]
    if data.labels:
        check_names(labels, data.labels, f"the table of {with_what}")
    readers = [
        LabelReader(data.model_copy(update={"label_column": column}), names)
        for column, names in ((given_column, labels), (answered_column, None))
    ]
    codes: list[list[float]] = []
    reasons: list[str] = []
    for place, *cells in pairs:
        if is_empty(cells[0]):
            continue
        try:
            row = [reader.code(place, cell) for reader, cell in zip(readers, cells, strict=True)]
        except DataError as error:
            reasons.append(error.message)
        else:
            codes.append(row)
    equal = 0
    if codes:
        both = np.array(codes, dtype=readers[0].code_type).T
        given, answered = (r.read(column) for r, column in zip(readers, both, strict=True))
        equal = int((given == answered).reshape(len(codes), -1).all(axis=1).sum())
    return Agreement(
        with_what=with_what,
        rows=len(codes),
        equal=equal,
        interval=sample_size.share(equal, len(codes)).interval if codes else (0.0, 1.0),
        left_out=len(reasons),
        reason=reasons[0] if reasons else "",
    )
