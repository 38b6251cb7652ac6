"""Texts and token ids in Arrow, in memory or in files that are mapped into memory.

The pages of a mapped file belong to the cache of the operating system. All processes of a machine
share them, and the system drops them when it needs memory.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from ad2kit.run.errors import MissingExtra, RunError, no_room_left
from ad2kit.run.files import fingerprint, remove_leftovers, whole_file, write_text, writing

try:
    import pyarrow as pa
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "pyarrow", extra="cpu") from error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from tokenizers import Encoding

    Texts = tuple[str, ...]

# Rows that are turned into Python objects at a time.
_BLOCK_ROWS = 50_000
_TOKEN_IDS = pa.list_(pa.int32())
_TYPE_IDS = pa.list_(pa.int8())

TOKENS = pa.schema(
    {
        "input_ids": _TOKEN_IDS,
        "token_type_ids": _TYPE_IDS,
        "truncated": pa.bool_(),
        "continues": pa.bool_(),
    }
)
"""The columns of tokenised texts, one row for each text, or for each window of a long text.

``truncated`` marks a text that was cut. ``continues`` marks a window that goes on with the text of
the row before it.
"""


class TextRows(Sequence["Texts"]):
    """Rows of one or two texts in an Arrow table; a row becomes a tuple when it is asked for.

    Args:
        table: one column for each text of a row.
        order: the row of the table for each row of this sequence; None for all, in their order.
        files: the files in which the table lies, in one folder; none for a table in memory.
    """

    def __init__(
        self,
        table: pa.Table,
        order: NDArray[np.int64] | None = None,
        files: tuple[Path, ...] = (),
    ) -> None:
        self.table = table
        self.order = order
        self.files = files

    @classmethod
    def of(cls, rows: Iterable[Texts]) -> TextRows:
        """Return the rows in memory."""
        columns = [pa.array(column, pa.large_string()) for column in zip(*rows, strict=True)]
        return cls(pa.table(columns, names=list(map(str, range(len(columns))))))

    def __len__(self) -> int:
        return len(self.table) if self.order is None else len(self.order)

    @overload
    def __getitem__(self, row: int) -> Texts: ...
    @overload
    def __getitem__(self, row: slice) -> tuple[Texts, ...]: ...
    def __getitem__(self, row: int | slice) -> Texts | tuple[Texts, ...]:
        if isinstance(row, slice):
            return tuple(self.take(np.arange(len(self))[row]))
        place = range(len(self))[row]  # counts from the end, and refuses a row that is not there
        if self.order is not None:
            place = int(self.order[place])
        return tuple(column[place].as_py() for column in self.table.columns)

    def __iter__(self) -> Iterator[Texts]:
        for block in self.blocks():
            yield from block

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]  # as equal rows need not lie in equal tables

    def __add__(self, other: TextRows) -> TextRows:
        """Return the rows of both; no text is copied."""
        if not len(self) or not len(other):
            return self if len(self) else other
        orders = [
            np.arange(len(rows)) if rows.order is None else rows.order for rows in (self, other)
        ]
        return TextRows(
            pa.concat_tables([self.table, other.table]),
            np.concatenate([orders[0], orders[1] + len(self.table)]),
            self.files + other.files if self.files and other.files else (),
        )

    def take(self, rows: NDArray[np.int64]) -> TextRows:
        """Return these rows, in this order; no text is copied."""
        order = rows if self.order is None else self.order[rows]
        return TextRows(self.table, order, self.files)

    def blocks(self) -> Iterator[list[Texts]]:
        """Yield the rows in lists of some thousand rows."""
        for start in range(0, len(self), _BLOCK_ROWS):
            if self.order is None:
                yield _tuples(self.table.slice(start, _BLOCK_ROWS))
            else:
                yield self._gathered(self.order[start : start + _BLOCK_ROWS])

    def _gathered(self, places: NDArray[np.int64]) -> list[Texts]:
        """Return these rows of the table.

        Rows are taken from each batch of the table by itself: `Table.take` would first copy all
        batches into one.
        """
        batches, first_rows = self._batches
        batch_of = np.searchsorted(first_rows, places, side="right") - 1
        by_batch = np.argsort(batch_of, kind="stable")
        ends = np.flatnonzero(np.diff(batch_of[by_batch])) + 1
        rows: list[Texts] = [()] * len(places)
        for part in np.split(by_batch, ends):
            number = batch_of[part[0]]
            taken = batches[number].take(pa.array(places[part] - first_rows[number]))
            for row, texts in zip(part.tolist(), _tuples(taken), strict=True):
                rows[row] = texts
        return rows

    @functools.cached_property
    def _batches(self) -> tuple[list[pa.RecordBatch], NDArray[np.int64]]:
        """The batches of the table, and the row of the table with which each begins."""
        batches = self.table.to_batches()
        return batches, np.cumsum([0, *map(len, batches)])[:-1]

    def hashes(self) -> NDArray[np.int64]:
        """Return a hash of 64 bits for each row; equal rows have equal hashes in this process."""
        return np.fromiter(map(hash, self), np.int64, len(self))

    def remembered(self, compute: Callable[[], str], *parts: Any) -> str:
        """Return a fingerprint that depends on the rows and on ``parts``.

        For a table in files the fingerprint is kept beside them: computing it takes seconds for
        each million of rows.
        """
        if not self.files:
            return compute()
        order = None if self.order is None else hashlib.sha256(self.order.data).hexdigest()
        key = fingerprint([file.name for file in self.files], len(self), order, *parts)
        path = self.files[0].parent / "fingerprints" / key[:16]
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)  # the cache may have been cleared
            write_text(path, compute())
        return path.read_text(encoding="ascii")


def _tuples(rows: pa.Table | pa.RecordBatch) -> list[Texts]:
    return list(zip(*(column.to_pylist() for column in rows.columns), strict=True))


class TokenRows(Sequence[list[int]]):
    """Rows of whole numbers in an Arrow column of lists, such as the token ids of each text.

    Attributes:
        lengths: the number of tokens of each row, int32 [rows].
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunks = column.chunks
        # The first row of each chunk; and for each chunk its numbers, and where each row begins.
        self._first_rows = np.cumsum([0, *map(len, chunks)])
        self._values = [chunk.values.to_numpy() for chunk in chunks]
        self._starts = [chunk.offsets.to_numpy() for chunk in chunks]
        lengths = [np.diff(starts) for starts in self._starts]
        self.lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int32)

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> TokenRows:
        """Return the rows in memory."""
        return cls(pa.chunked_array([pa.array(list(rows), _TOKEN_IDS)]))

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, row: int) -> list[int]: ...
    @overload
    def __getitem__(self, row: slice) -> list[list[int]]: ...
    def __getitem__(self, row: int | slice) -> list[int] | list[list[int]]:
        if isinstance(row, slice):
            return [self[place] for place in range(len(self))[row]]
        numbers: list[int] = self.array(range(len(self))[row]).tolist()
        return numbers

    def array(self, row: int) -> NDArray[np.integer]:
        """Return a row without copying it."""
        chunk = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        starts = self._starts[chunk]
        place = row - self._first_rows[chunk]
        values: NDArray[np.integer] = self._values[chunk]
        return values[starts[place] : starts[place + 1]]

    def padded(self, rows: NDArray[np.int64], padding: int) -> NDArray[np.int64]:
        """Return some rows, padded on the right to the longest of them; int64 [rows, longest]."""
        array = np.full((len(rows), int(self.lengths[rows].max())), padding, dtype=np.int64)
        for array_row, row in zip(array, rows, strict=True):
            values = self.array(row)
            array_row[: len(values)] = values
        return array


def token_batch(encodings: Sequence[Encoding], max_length_tokens: int) -> pa.RecordBatch:
    """Return the tokens of some texts, which were cut, as a batch of :data:`TOKENS`."""
    ids = [encoding.ids for encoding in encodings]
    truncated = [
        # What was cut off is copied when it is asked for.
        len(tokens) >= max_length_tokens and bool(encoding.overflowing)
        for tokens, encoding in zip(ids, encodings, strict=True)
    ]
    return _batch(ids, [encoding.type_ids for encoding in encodings], truncated, [False] * len(ids))


def window_batch(texts: Sequence[Sequence[Encoding]]) -> pa.RecordBatch:
    """Return the windows of some texts, which were not cut, as a batch of :data:`TOKENS`."""
    ids = [window.ids for windows in texts for window in windows]
    type_ids = [
        _segments(windows[0], window) if place else window.type_ids
        for windows in texts
        for place, window in enumerate(windows)
    ]
    continues = [place > 0 for windows in texts for place in range(len(windows))]
    return _batch(ids, type_ids, [False] * len(ids), continues)


def _segments(first: Encoding, window: Encoding) -> list[int]:
    """Return the segment ids of a window, as in the first window of its text.

    The tokenizers library gives the other windows usual segments, whatever the post-processor says:
    for example segment 1 to the second text of a pair, which RoBERTa does not have.
    """
    segments: list[int] = first.type_ids
    behind = first.sequence_ids[::-1]  # the special tokens behind the last text
    end = len(segments) - next(place for place, text in enumerate(behind) if text is not None)
    return segments[: len(window.ids) - len(segments) + end] + segments[end:]


def _batch(
    ids: list[list[int]], type_ids: list[list[int]], truncated: list[bool], continues: list[bool]
) -> pa.RecordBatch:
    columns = [
        pa.array(ids, _TOKEN_IDS),
        pa.array(type_ids, _TYPE_IDS),
        pa.array(truncated, pa.bool_()),
        pa.array(continues, pa.bool_()),
    ]
    return pa.record_batch(columns, schema=TOKENS)


def kept(folder: Path, last_file: str, write: Callable[[], None]) -> None:
    """Write the files of a folder unless they are there; ``write`` ends with ``last_file``.

    The first process writes them, others wait for it. After a kill they are written again.

    Raises:
        RunError: the folder cannot be written.
    """
    try:
        if (folder / last_file).is_file():
            return
        with writing(folder):
            if not (folder / last_file).is_file():
                try:
                    write()
                finally:
                    remove_leftovers(folder)  # a table that was refused at its last row is large
    except OSError as error:
        if no_room_left(error):
            raise
        raise RunError(
            f"cannot write to {folder}: {error}",
            hint="correct its access rights, or give another folder for runs",
        ) from error


def write_table(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write a table, whole or not at all, without having all of it in memory."""
    with whole_file(path) as temporary, pa.ipc.new_file(temporary, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def map_table(path: Path) -> pa.Table:
    """Return a table that :func:`write_table` wrote, mapped into memory.

    Raises:
        RunError: the file is damaged.
    """
    try:
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).read_all()
    except pa.ArrowInvalid as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> RunError:
    """Return the error for a damaged file of a folder that :func:`kept` writes."""
    return RunError(f"{path} is damaged: {error}", hint=f"delete {path.parent} and run again")
