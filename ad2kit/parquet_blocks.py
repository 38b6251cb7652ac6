"""Blocks of Parquet: found by the footers, read without what lies after them, kept as Arrow."""

from __future__ import annotations

import io
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ad2kit.blocks import Block, Rows, Survey, filesystem
from ad2kit.errors import DataError, MissingExtra

try:
    import pyarrow as pa
    from pyarrow import parquet
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "pyarrow", extra="scale") from error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from ad2kit.blocks import Layout
    from ad2kit.score_records import InputFile

# Read through a buffer of this size for each column, not by whole column chunks.
_BUFFER_BYTES = 2**20
# Of the answers, by the kind of their array; a block without any has types too.
_TYPES = {
    "U": pa.string(), "O": pa.list_(pa.string()), "f": pa.float64(),
    "b": pa.bool_(),
}  # fmt: skip


def survey(file: InputFile, block_rows: int) -> Survey:
    """Read the footer of a file and count its rows off.

    Raises:
        DataError: it is no Parquet file, or two of its columns have one name.
        OSError: it cannot be read at all.
    """
    with _open(file.url) as stream:
        footer = parquet.ParquetFile(stream)
        schema, rows = footer.schema_arrow, footer.metadata.num_rows
    twice = [name for name in schema.names if schema.names.count(name) > 1]
    if twice:
        raise DataError(
            f"{file.url}: the column '{twice[0]}' appears twice", hint="rename one of them"
        )
    blocks = [
        Block(file.url, first + 1, min(block_rows, rows - first))
        for first in range(0, rows, block_rows)
    ]
    kind = ", ".join(f"{field.name} ({field.type})" for field in schema)
    texts = tuple(field.name for field in schema if _is_text(field.type))
    return Survey(tuple(schema.names), texts, kind, blocks)


def read(block: Block, layout: Layout) -> Rows:
    """Read a block.

    Raises:
        DataError: a page is damaged, or the file has become shorter.
        OSError: it cannot be read at all.
    """
    with _open(block.url) as stream:
        table = _slice(stream, block.first_row - 1, block.rows)
    rows = Rows(block, table)
    rows.places = [(block.first_row + position, None) for position in range(table.num_rows)]
    columns = [_texts(table.column(name)) for name in layout.text_columns]
    rows.texts = list(zip(*columns, strict=True))
    return rows


def write(
    rows: Rows, good: Sequence[int], layout: Layout, answers: Mapping[str, NDArray[Any]]
) -> bytes:
    """Return the rows at the positions ``good`` with their answers, types and all."""
    table = (
        rows.kept if len(good) == rows.kept.num_rows else rows.kept.take(pa.array(good, pa.int64()))
    )
    for name in layout.added:
        values = answers[name]
        table = table.append_column(name, pa.array(values.tolist(), _TYPES[values.dtype.kind]))
    out = io.BytesIO()
    parquet.write_table(table, out)
    return out.getvalue()


@contextmanager
def _open(url: str) -> Iterator[Any]:
    """Open a file; what Arrow cannot read of it is the user's to mend."""
    store, path = filesystem(url)
    try:
        with store.open(path, "rb") as stream:
            yield stream
    except (pa.ArrowException, OSError) as error:
        # For a damaged page Arrow raises OSError too: itself, and without a number.
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno):
            raise
        raise DataError(
            f"{url} is not a readable Parquet file: {error}", hint="write it again"
        ) from error


def _slice(stream: Any, first: int, rows: int) -> Any:
    """Return ``rows`` rows from ``first`` on; of the row groups before them nothing is read."""
    file = parquet.ParquetFile(stream, buffer_size=_BUFFER_BYTES)
    groups: list[int] = []
    before = place = 0
    for number in range(file.num_row_groups):
        end = place + file.metadata.row_group(number).num_rows
        if end <= first:
            before = end
        elif place < first + rows:
            groups.append(number)
        place = end
    skip, missing, found = first - before, rows, []
    for batch in file.iter_batches(batch_size=rows, row_groups=groups):
        wanted = batch.slice(skip, missing)
        skip, missing = max(0, skip - len(batch)), missing - len(wanted)
        found.append(wanted)
        if not missing:
            break
    return pa.Table.from_batches(found, file.schema_arrow)


def _texts(column: Any) -> list[str | None]:
    """Return a column of strings; bytes that are not UTF-8, which Arrow lets be, as surrogates."""
    binary = column.cast(pa.large_string()).cast(pa.large_binary())
    return [
        None if value is None else value.decode("utf-8", "surrogateescape")
        for value in binary.to_pylist()
    ]


def _is_text(kind: Any) -> bool:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(value) or pa.types.is_large_string(value))
