"""Parquet files, Arrow streams and their columns: the reader of both training and scoring.

``datasets`` saves data sets as Arrow streams. It writes the names of classes into the schema of
both formats.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from ad2kit.run.errors import DataError, MissingExtra
from ad2kit.tables.rows import Cells, Place, check_columns
from ad2kit.tables.text_files import bad_row, not_utf8

try:
    import pyarrow as pa
    from pyarrow import parquet
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "pyarrow", extra="scale") from error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

# Size of the read buffer of each column; without it Arrow reads whole column chunks.
_BUFFER_BYTES = 2**20
# The rows that are decoded at once.
BATCH_ROWS = 1024
_STREAM = "Arrow stream"
_AS_UTF8 = "write texts as UTF-8"


@contextmanager
def readable(name: str, kind: str = "Parquet file") -> Iterator[None]:
    """Turn Arrow's errors in the block into :class:`DataError`; ``name`` is the file's.

    Raises:
        DataError: the file is damaged, or is not a file of this kind.
        OSError: the operating system cannot read the file.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        # For a damaged page Arrow raises a plain OSError without an error number.
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno):
            raise
        raise DataError(
            f"{name} is not a readable {kind}: {error}", hint="write it again"
        ) from error


class ParquetTable:
    """An open Parquet file: its ``schema``, and the rows of its groups.

    Raises:
        DataError: it is not a Parquet file, or two of its columns have the same name.
        OSError: see :func:`readable`.
    """

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._name = name
        with readable(name):
            self._file = parquet.ParquetFile(stream, buffer_size=_BUFFER_BYTES)
        self.schema = self._file.schema_arrow
        _check_names(self.schema, name)

    @property
    def sizes(self) -> list[int]:
        """The number of rows of each group."""
        footer = self._file.metadata
        return [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]

    def batches(
        self, group: int | None = None, columns: Sequence[str] | None = None
    ) -> Iterator[Any]:
        """Yield the rows of one group or of all as record batches, of some columns or of all."""
        groups = None if group is None else [group]
        with readable(self._name):
            yield from self._file.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns)


class StreamTable:
    """An open Arrow stream: like :class:`ParquetTable`, with its batches as groups.

    A batch can be read only after those before it.
    """

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream = stream
        self._name = name
        self._rewind()
        self.schema = self._reader.schema
        _check_names(self.schema, name)

    def _rewind(self) -> None:
        self._stream.seek(0)
        self._next = 0
        with readable(self._name, _STREAM):
            self._reader = pa.ipc.open_stream(pa.PythonFile(_Kept(self._stream), "r"))

    @property
    def sizes(self) -> list[int]:
        """The number of rows of each batch."""
        return [len(batch) for batch in self.batches()]

    def batches(
        self, group: int | None = None, columns: Sequence[str] | None = None
    ) -> Iterator[Any]:
        """Yield one batch or all, with some columns or all."""
        if group is None or group < self._next:
            self._rewind()
        with readable(self._name, _STREAM):
            for batch in self._reader:
                number = self._next
                self._next += 1
                if group in (None, number):
                    yield batch if columns is None else batch.select(columns)
                if group == number:
                    return


ArrowTable = ParquetTable | StreamTable


def open_table(stream: IO[bytes], name: str) -> ArrowTable:
    """Return an open stream as a table of Arrow's; ``name`` is the file's, for errors.

    Raises:
        DataError: it is neither a Parquet file nor an Arrow stream, or two of its columns have the
            same name.
        OSError: see :func:`readable`.
    """
    return StreamTable(stream, name) if name.endswith(".arrow") else ParquetTable(stream, name)


def _check_names(schema: Any, name: str) -> None:
    """Refuse two columns with one name."""
    names = schema.names
    duplicates = [column for column in names if names.count(column) > 1]
    if duplicates:
        raise DataError(
            f"{name}: the column '{duplicates[0]}' appears twice", hint="rename one of them"
        )


def class_names(schema: Any, column: str) -> tuple[str, ...] | None:
    """Return the names of the classes of a column, as ``datasets`` writes them into a schema.

    The cells of such a column, or of its lists, are positions in these names.
    """
    try:
        metadata = json.loads((schema.metadata or {})[b"huggingface"])
        feature = metadata["info"]["features"][column]
    except (LookupError, TypeError, ValueError):
        return None
    while isinstance(feature, list) or (isinstance(feature, dict) and "feature" in feature):
        feature = feature[0] if isinstance(feature, list) else feature["feature"]
    is_class = isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    return tuple(feature["names"]) if is_class else None


def is_text_column(kind: Any) -> bool:
    """Tell whether a column of the Arrow type ``kind`` holds texts."""
    value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(
        pa.types.is_string(value_type)
        or pa.types.is_large_string(value_type)
        or pa.types.is_string_view(value_type)
    )


def texts(column: Any) -> list[str | None]:
    """Return the texts of an Arrow column; bytes that are not UTF-8 become surrogates.

    Arrow itself does not check that a text is UTF-8.
    """
    binary = column.cast(pa.large_string()).cast(pa.large_binary())
    return [
        None if value is None else value.decode("utf-8", "surrogateescape")
        for value in binary.to_pylist()
    ]


def read(stream: IO[bytes], name: str, columns: Sequence[str]) -> Iterator[Cells]:
    """Yield the rows of an open file; see :func:`ad2kit.tables.formats.read`."""
    table = open_table(stream, name)
    names = columns or table.schema.names
    check_columns(name, names, table.schema.names)
    yield from rows(table.batches(columns=list(names)), name)


def rows(batches: Iterable[Any], name: str) -> Iterator[Cells]:
    """Yield the rows of record batches; ``name`` is that of their table, for places."""
    number = 0
    for batch in batches:
        columns: dict[str, list[Any]] = {}
        broken: list[str] = []
        for column in batch.schema.names:
            values = batch.column(column)
            try:
                columns[column] = values.to_pylist()
            except (ValueError, OverflowError) as error:  # bytes that are not UTF-8; a year 9e9
                if not is_text_column(values.type):
                    raise DataError(
                        f"{name}: cannot read the column '{column}' ({values.type}): {error}",
                        hint="write texts as UTF-8, and labels as texts, whole numbers or lists",
                    ) from error
                columns[column] = texts(values)
                broken.append(column)
        for cells in zip(*columns.values(), strict=True):
            number += 1
            place = Place(name, number)
            row = dict(zip(columns, cells, strict=True))
            reasons = [not_utf8(row[column] or "") for column in broken]
            reason = next(filter(None, reasons), "")
            yield Cells(place, row, bad_row(str(place), reason, _AS_UTF8) if reason else None)


def decompressed(stream: IO[bytes], name: str, compression: str) -> Iterator[bytes]:
    """Yield the content of a compressed file in chunks.

    Raises:
        DataError: it is damaged.
    """
    with readable(name, f"{compression} file"):
        content = pa.CompressedInputStream(pa.PythonFile(_Kept(stream), "r"), compression)
        while chunk := content.read(_BUFFER_BYTES):
            yield chunk


class _Kept:
    """A stream that stays open when Arrow closes it: its owner may read it again."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.closed = False
        self.read = stream.read
        self.readable = stream.readable
        self.seek = stream.seek
        self.seekable = stream.seekable
        self.tell = stream.tell

    def close(self) -> None:
        self.closed = True
