"""Parquet files and their columns of text: what training and scoring read alike."""

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

# Read through a buffer of this size for each column, not by whole column chunks.
_BUFFER_BYTES = 2**20


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn what Arrow cannot read of a file into an error of the user's.

    Raises:
        DataError: the file is damaged, or no Parquet file.
        OSError: it cannot be read at all.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        # For a damaged page Arrow raises OSError too: itself, and without a number.
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno):
            raise
        raise DataError(
            f"{name} is not a readable Parquet file: {error}", hint="write it again"
        ) from error


def open_parquet(stream: Any, name: str) -> Any:
    """Return an open file as Arrow's ``ParquetFile``; see :func:`readable`.

    Raises:
        DataError: it is none, or two of its columns have one name.
    """
    with readable(name):
        file = parquet.ParquetFile(stream, buffer_size=_BUFFER_BYTES)
    names = file.schema_arrow.names
    twice = [each for each in names if names.count(each) > 1]
    if twice:
        raise DataError(f"{name}: the column '{twice[0]}' appears twice", hint="rename one of them")
    return file


def is_text_column(kind: Any) -> bool:
    """Tell whether a column of this type holds texts."""
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(
        pa.types.is_string(value)
        or pa.types.is_large_string(value)
        or pa.types.is_string_view(value)
    )


def texts(column: Any) -> list[str | None]:
    """Return a column of texts; bytes that are not UTF-8, which Arrow lets be, as surrogates."""
    binary = column.cast(pa.large_string()).cast(pa.large_binary())
    return [
        None if value is None else value.decode("utf-8", "surrogateescape")
        for value in binary.to_pylist()
    ]


def read_columns(path: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return some columns of a file, row by row.

    Raises:
        DataError: it is no Parquet file, lacks a column, or a value cannot be read.
        OSError: it cannot be read at all.
    """
    with path.open("rb") as stream:
        file = open_parquet(stream, str(path))
        if absent := [name for name in names if name not in file.schema_arrow.names]:
            raise no_column(str(path), absent[0], file.schema_arrow.names)
        with readable(str(path)):
            table = file.read(columns=list(names))
    try:
        return list(table.to_pylist())
    except (ValueError, OverflowError):  # such as bytes that are no text, or a date in the year 9e9
        for name in names:
            _insist_on_values(table.column(name), name, path)
        raise


def _insist_on_values(column: Any, name: str, path: Path) -> None:
    try:
        column.to_pylist()
    except (ValueError, OverflowError) as error:
        where = str(path)
        if is_text_column(column.type):
            wrong = [bool(SURROGATE.search(text or "")) for text in texts(column)]
            where += f", row {wrong.index(True) + 1}"
        raise DataError(
            f"{where}: cannot read the column '{name}' ({column.type}): {error}",
            hint="write texts as UTF-8, and labels as texts, whole numbers or lists",
        ) from error
