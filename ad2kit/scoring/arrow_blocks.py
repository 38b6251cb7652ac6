"""Blocks of Parquet files and Arrow streams: read group by group of rows, and kept as Arrow."""

from __future__ import annotations

import io
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from ad2kit.run.errors import MissingExtra
from ad2kit.scoring.blocks import Block, Rows, Survey, filesystem
from ad2kit.tables.arrow_files import is_text_column, open_table, texts

try:
    import pyarrow as pa
    from pyarrow import parquet
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "pyarrow", extra="scale") from error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from ad2kit.scoring.blocks import Layout
    from ad2kit.scoring.records import InputFile
    from ad2kit.tables.text_files import Quotes

# The types of the answer columns by the kind of their array, also for a block without answers.
_TYPES = {
    "U": pa.string(),
    "S": pa.string(),
    "O": pa.list_(pa.string()),
    "f": pa.float64(),
    "b": pa.bool_(),
}


def survey(
    file: InputFile, block_rows: int, text_columns: Sequence[str] = (), quotes: Quotes = "doubled"
) -> Survey:
    """Read the footer of a file, and divide its rows into blocks; see :mod:`.text_blocks`.

    Raises:
        DataError: it is no such file, or two of its columns have one name.
        OSError: the file cannot be read.
    """
    del text_columns, quotes  # the schema names the columns
    store, path = filesystem(file.url)
    with store.open(path, "rb") as stream:
        table = open_table(stream, file.url)
        schema = table.schema
        rows = sum(table.sizes)
    blocks = [
        Block(file.url, first + 1, min(block_rows, rows - first))
        for first in range(0, rows, block_rows)
    ]
    kind = ", ".join(f"{field.name} ({field.type})" for field in schema)
    texts_of = tuple(field.name for field in schema if is_text_column(field.type))
    return Survey(tuple(schema.names), texts_of, kind, blocks)


class Reader:
    """Reads blocks of one file, which is open until :meth:`close`.

    A group of rows can be decoded only from its start. If the blocks are read in their order, each
    read continues after the previous block and skips the rows between, so that each row of the file
    is decoded once at most. The bytes of a part depend on the pieces of an Arrow column, and these
    must not depend on the blocks that a worker has read before: the pieces are those that
    ``batches`` yields, for any size of the blocks.

    Raises:
        DataError: it is no Parquet file and no Arrow stream.
        OSError: the file cannot be read.
    """

    def __init__(self, url: str, layout: Layout) -> None:
        store, path = filesystem(url)
        self._layout = layout
        self._stream = store.open(path, "rb")
        try:
            self._table = open_table(self._stream, url)
            self._bounds = list(pairwise(accumulate(self._table.sizes, initial=0)))
        except BaseException:
            self._stream.close()
            raise
        self._group = -1
        self._first = 0
        self._batches: Iterator[Any] = iter(())
        self._batch: Any = None

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def read(self, block: Block) -> Rows:
        """Read a block.

        Raises:
            DataError: a page is damaged.
            OSError: the file cannot be read.
        """
        first = block.first_row - 1
        batches = list(self._slices(first, first + block.rows))
        table = pa.Table.from_batches(batches, self._table.schema)
        rows = Rows(block, table)
        rows.places = [(block.first_row + position, None) for position in range(table.num_rows)]
        columns = [texts(table.column(name)) for name in self._layout.text_columns]
        rows.texts = list(zip(*columns, strict=True))
        return rows

    def _slices(self, row: int, end: int) -> Iterator[Any]:
        """Yield the rows from ``row`` to ``end`` in pieces; fewer if the file was shortened."""
        for group, (start, stop) in enumerate(self._bounds):
            while start <= row < min(stop, end):
                batch = self._batch_with(row, group, start)
                if batch is None:
                    return
                piece = batch.slice(row - self._first, end - row)
                row += len(piece)
                yield piece

    def _batch_with(self, row: int, group: int, start: int) -> Any:
        """Return the batch with a row of a group that begins at ``start``; None after its end."""
        if group != self._group or row < self._first:
            self._group, self._first = group, start
            self._batches = self._table.batches(group)
            self._batch = next(self._batches, None)
        while self._batch is not None and row >= self._first + len(self._batch):
            self._first += len(self._batch)
            self._batch = next(self._batches, None)
        return self._batch


def write(
    rows: Rows, good: Sequence[int], layout: Layout, answers: Mapping[str, NDArray[Any]]
) -> bytes:
    """Return the content of a Parquet file: the rows at ``good`` with their answers.

    Args:
        rows: the block as it was read; its columns keep their types.
        good: the positions of the rows that have answers.
        layout: the columns of the job.
        answers: the answers to these rows, by the names of the added columns.
    """
    table = rows.kept
    if len(good) != table.num_rows:
        table = _rows_at(table, good)
    for name in layout.added:
        values = answers[name]
        table = table.append_column(name, pa.array(values.tolist(), _TYPES[values.dtype.kind]))
    out = io.BytesIO()
    parquet.write_table(table, out)
    return out.getvalue()


def _rows_at(table: Any, good: Sequence[int]) -> Any:
    """Return the rows at some positions by slices, because ``take`` does not support every type."""
    if not good:
        return table.slice(0, 0)
    dropped = sorted(set(range(table.num_rows)).difference(good))
    bounds = pairwise([-1, *dropped, table.num_rows])
    pieces = [table.slice(before + 1, after - before - 1) for before, after in bounds]
    return pa.concat_tables(piece for piece in pieces if len(piece))
