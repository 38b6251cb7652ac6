"""Parquet files and their columns of text: the reader of both training and scoring."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ad2kit.data.texts import SURROGATE
from ad2kit.run.errors import DataError, MissingExtra, no_column

try:
    import pyarrow as pa
    from pyarrow import parquet
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "pyarrow", extra="scale") from error

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

# Size of the read buffer of each column; without it Arrow reads whole column chunks.
_BUFFER_BYTES = 2**20


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn Arrow's errors in the block into :class:`DataError`; ``name`` is the file's.

    Raises:
        DataError: the file is damaged, or is not a Parquet file.
        OSError: the operating system cannot read the file.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        # For a damaged page Arrow raises a plain OSError without an error number.
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno):
            raise
        raise DataError(
            f"{name} is not a readable Parquet file: {error}", hint="write it again"
        ) from error


def open_parquet(stream: Any, name: str) -> Any:
    """Return an open stream as Arrow's ``ParquetFile``; ``name`` is the file's, for errors.

    Raises:
        DataError: it is not a Parquet file, or two of its columns have the same name.
        OSError: see :func:`readable`.
    """
    with readable(name):
        file = parquet.ParquetFile(stream, buffer_size=_BUFFER_BYTES)
    names = file.schema_arrow.names
    duplicates = [column for column in names if names.count(column) > 1]
    if duplicates:
        raise DataError(
            f"{name}: the column '{duplicates[0]}' appears twice", hint="rename one of them"
        )
    return file


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


def read_columns(path: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the named columns of a file, row by row.

    Raises:
        DataError: it is not a Parquet file, lacks a column, or a value cannot be read.
        OSError: the operating system cannot read the file.
    """
    with path.open("rb") as stream:
        file = open_parquet(stream, str(path))
        columns = file.schema_arrow.names
        if missing := [name for name in names if name not in columns]:
            raise no_column(str(path), missing[0], columns)
        with readable(str(path)):
            table = file.read(columns=list(names))
    try:
        return list(table.to_pylist())
    except (ValueError, OverflowError):  # such as bytes that are not UTF-8, or a date in year 9e9
        for name in names:
            _check_values(table.column(name), name, path)
        raise


def _check_values(column: Any, name: str, path: Path) -> None:
    """Refuse a column with a value that Python cannot hold; name its row if it is a text."""
    try:
        column.to_pylist()
    except (ValueError, OverflowError) as error:
        where = str(path)
        if is_text_column(column.type):
            is_broken = [bool(SURROGATE.search(text or "")) for text in texts(column)]
            where += f", row {is_broken.index(True) + 1}"
        raise DataError(
            f"{where}: cannot read the column '{name}' ({column.type}): {error}",
            hint="write texts as UTF-8, and labels as texts, whole numbers or lists",
        ) from error
