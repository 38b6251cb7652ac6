"""A row of a table, its place, and what happens to a row that cannot be read.

A bad row refuses its table, or is listed and left out (``data.bad_rows: skip``, bulk scoring).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ad2kit.run.errors import no_column
from ad2kit.run.files import write_text
from ad2kit.run.records import Record

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from ad2kit.run.errors import DataError

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """The place of a row, for messages: its file, its number from 1, and its line in a text file.

    The number does not count a header.
    """

    file: str
    row: int
    line: int | None = None

    def __str__(self) -> str:
        if self.line is None:
            return f"{self.file}, row {self.row}"
        return f"{self.file}, line {self.line}"


class Cells(NamedTuple):
    """One row as its file holds it: the cells by column, or the error that makes it a bad row."""

    place: Place
    cells: Mapping[str, Any]
    error: DataError | None = None


class Row(NamedTuple):
    """One row of a split: checked texts, and the cell of the label column.

    ``label`` is any value of a file, which :class:`ad2kit.data.labels.LabelReader` checks; None
    for texts without labels.
    """

    place: Place
    texts: tuple[str, ...]
    label: Any = None


class SourceLabels(NamedTuple):
    """The names of the labels in the order of their ids, as a source gives them.

    ``only_ids`` says that the cells of the label column are ids, even if the names are numbers.
    """

    names: tuple[str, ...]
    only_ids: bool


class BadRow(Record):
    """One bad row in a list of them: its place, and the reason.

    ``row`` counts the rows of its file from 1, without a header. ``line`` is the first line of the
    row in a text file.
    """

    file: str
    row: int
    line: int | None
    reason: str


def bad_rows_words(rows: Sequence[BadRow]) -> str:
    """Return in words how many rows were left out, and the first of them; there is at least one."""
    first = rows[0]
    place = Place(first.file, first.row, first.line)
    return f"{len(rows)} bad rows were left out, such as {place}: {first.reason}"


def write_bad_rows(path: Path, rows: Sequence[BadRow]) -> None:
    """Write the rows that were left out, one JSON line each, and warn; delete the file of none."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    write_text(path, "".join(f"{row.model_dump_json()}\n" for row in rows))
    logger.warning("%s; all are listed in %s", bad_rows_words(rows), path)


@dataclass
class BadRows:
    """What happens to bad rows: the first one is an error, unless ``skip`` lists them instead."""

    skip: bool = False
    listed: list[BadRow] = field(default_factory=list)

    def refuse(self, place: Place, error: DataError) -> None:
        """List a row, or raise its error, whose message begins with the place.

        Raises:
            DataError: bad rows are not skipped.
        """
        if not self.skip:
            raise error
        reason = error.message.removeprefix(f"{place}: ")
        self.listed.append(BadRow(**place._asdict(), reason=reason))


def check_columns(where: str, columns: Iterable[str], found: Iterable[str]) -> None:
    """Insist on columns.

    Raises:
        DataError: one is not among those that were found.
    """
    for column in columns:
        if column not in found:
            raise no_column(where, column, found)
