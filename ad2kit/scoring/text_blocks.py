"""Blocks of CSV, TSV and JSON lines: located by one pass over the bytes, read by a seek.

The bytes of a block are counted in the decompressed file: what lies before them is decompressed
again by every process that reads it.
"""

from __future__ import annotations

import io
import itertools
import json
import math
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

from ad2kit.run.errors import DataError
from ad2kit.scoring.blocks import Block, Rows, Survey, filesystem
from ad2kit.tables import text_files
from ad2kit.tables.formats import known_format, open_text
from ad2kit.tables.text_files import BOM, TSV, Lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from ad2kit.scoring.blocks import Layout
    from ad2kit.scoring.records import InputFile
    from ad2kit.tables.formats import Format
    from ad2kit.tables.text_files import Dialect, Quotes

# The size that ends a block before it has all its rows, so that long rows do not fill the memory.
_BLOCK_BYTES = 32 * 2**20


class _Lines:
    """The lines of a stream; ``byte`` and ``line`` count what was read so far."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.byte = 0
        self.line = 0

    def raw(self) -> Iterator[bytes]:
        """Yield the lines as bytes, without a byte order mark."""
        for raw in self.stream:
            is_first = self.byte == 0
            self.byte += len(raw)
            self.line += 1
            yield raw.removeprefix(BOM) if is_first else raw

    def skip(self, lines: int) -> None:
        """Read some lines."""
        for _ in itertools.islice(self.raw(), lines):
            pass

    def __iter__(self) -> Iterator[str]:
        for raw in self.raw():
            yield text_files.decode(raw)[0]


def survey(
    file: InputFile, block_rows: int, text_columns: Sequence[str] = (), quotes: Quotes = "doubled"
) -> Survey:
    """Read a file once, and divide its rows into blocks.

    Args:
        file: the file.
        block_rows: the most rows of a block.
        text_columns: the columns to read; they show the delimiter of CSV.
        quotes: how CSV writes a quotation mark.

    Raises:
        DataError: there is no header, or no row that shows the columns.
    """
    blocks: list[Block] = []
    rows = 0
    with _open(file.url) as (stream, format_):
        dialect = None
        columns: tuple[str, ...] = ()
        lines = _Lines(stream)
        if dialects := format_.dialects(quotes):
            header = text_files.header(stream, file.url, dialects, text_columns)
            dialect, columns = header.dialect, header.columns
            lines.skip(header.lines)
        start = Block(file.url, first_row=1, rows=0, first_byte=lines.byte, lines_before=lines.line)
        for keys in _row_by_row(lines, dialect):
            columns = columns or keys
            rows += 1
            if rows == block_rows or lines.byte - start.first_byte >= _BLOCK_BYTES:
                blocks.append(replace(start, rows=rows, end_byte=lines.byte))
                start = replace(
                    start,
                    first_row=start.first_row + rows,
                    first_byte=lines.byte,
                    lines_before=lines.line,
                )
                rows = 0
        if rows:
            blocks.append(replace(start, rows=rows, end_byte=lines.byte))
    if blocks and not columns:
        raise DataError(
            f"{file.url}: none of its lines is a JSON object with a key",
            hint='write lines like {"text": "...", "id": 1}',
        )
    # JSON objects may lack keys and have them in any order; the rows of a table may not.
    kind = "JSON lines"
    if dialect is not None:
        kind = f"{',' if dialect == TSV else dialect.delimiter} ".join(columns)
    return Survey(columns, columns, kind, blocks, dialect)


def _row_by_row(lines: _Lines, dialect: Dialect | None) -> Iterator[tuple[str, ...]]:
    """Yield once for each row, after its lines are counted: the keys of the first JSON object.

    CSV and TSV have no such keys; their columns are those of the header.
    """
    if dialect is not None and dialect != TSV:
        for _ in text_files.frames(lines, dialect):
            yield ()
        return
    keys: tuple[str, ...] = () if dialect is None else ("",)
    for raw in lines.raw():
        if not text_files.is_blank(raw, dialect):
            keys = keys or _keys(raw)
            yield keys


def _keys(raw: bytes) -> tuple[str, ...]:
    """Return the keys of the JSON object in a line; none if the line is bad."""
    lines = Lines(io.BytesIO(raw), begins_file=False)
    ((_, _, row, _),) = text_files.checked_rows(lines, None, (), lines)
    return tuple(row)


class Reader:
    """Reads blocks of one file, which is open until :meth:`close`.

    Raises:
        OSError: the file cannot be read.
    """

    def __init__(self, url: str, layout: Layout) -> None:
        self._layout = layout
        self._open = _open(url)
        self._stream, self._format = self._open.__enter__()

    def close(self) -> None:
        """Close the file."""
        self._open.__exit__(None, None, None)

    def read(self, block: Block) -> Rows:
        """Read a block; a row is bad if it is not UTF-8, not JSON, or has another width."""
        layout = self._layout
        self._stream.seek(block.first_byte)
        raw = self._stream.read(block.end_byte - block.first_byte)
        decoded = Lines(io.BytesIO(raw), begins_file=block.first_byte == 0)
        lines = list(decoded)
        kept_lines: list[str] = []
        rows = Rows(block, kept_lines)
        texts_of = _text_columns(layout)
        added = set(layout.added) if layout.dialect is None else set()
        checked_rows = text_files.checked_rows(lines, layout.dialect, layout.columns, decoded)
        for number, (first, end, row, error) in enumerate(checked_rows, block.first_row):
            line = block.lines_before + first + 1 if self._format.has_lines else None
            place = (number, line)
            reason = error
            if added and not added.isdisjoint(row):
                reason = f"has a '{min(added.intersection(row))}' already"
            if reason:
                rows.refuse(place, reason)
                continue
            kept_lines.append(lines[first] if end == first + 1 else "".join(lines[first:end]))
            rows.places.append(place)
            rows.texts.append(texts_of(row))
        return rows


def write(
    rows: Rows, good: Sequence[int], layout: Layout, answers: Mapping[str, NDArray[Any]]
) -> bytes:
    """Return the rows at the positions ``good`` with their answers, in the format of the input.

    The cells or keys of a row are copied: nothing of it is quoted, rounded or ordered anew.

    Args:
        rows: the block as it was read.
        good: the positions of the rows that have answers.
        layout: the columns of the job.
        answers: the answers to these rows, by the names of the added columns.
    """
    dialect = layout.dialect
    input_rows = [rows.kept[position].rstrip("\r\n") for position in good]
    added_cells = zip(*(_cells(values, dialect) for values in answers.values()), strict=True)
    if dialect is None:
        names = [json.dumps(name, ensure_ascii=False) for name in answers]
        template = ", ".join(f"{name.replace('%', '%%')}: %s" for name in names) + "}\n"
        # Many readers would end the line at a \r between tokens.
        heads = [row.rstrip().removesuffix("}").rstrip().replace("\r", " ") for row in input_rows]
        objects = [
            f"{head}, {template % cells}" for head, cells in zip(heads, added_cells, strict=True)
        ]
        return "".join(objects).encode()
    names = [*layout.columns, *answers]
    if dialect != TSV:
        names = [text_files.csv_cell(name, dialect) for name in names]
    lines = [dialect.delimiter.join(names)]
    lines += [
        dialect.delimiter.join((row, *cells))
        for row, cells in zip(input_rows, added_cells, strict=True)
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def _text_columns(layout: Layout) -> Callable[[Any], tuple[Any, ...]]:
    """Return the function that returns the values of the text columns of a row."""
    if layout.dialect is None:
        return lambda row: tuple([row.get(name) for name in layout.text_columns])
    indices = [layout.columns.index(name) for name in layout.text_columns]
    return lambda row: tuple([row[index] for index in indices])


def _cells(column: NDArray[Any], dialect: Dialect | None) -> list[str]:
    """Return the cells of a column of answers: JSON, except for single labels in CSV and TSV.

    Bytes are JSON already.
    """
    values = column.tolist()
    if column.dtype.kind == "S":
        texts = [value.decode() for value in values]
        if dialect is None or dialect == TSV:
            return texts
        return [text_files.csv_cell(text, dialect) for text in texts]
    if column.dtype.kind == "f":
        return [repr(value) if math.isfinite(value) else json.dumps(value) for value in values]
    is_label = column.dtype.kind == "U"
    if is_label and dialect == TSV:
        return list(values)
    # Labels and flags repeat in many rows, so each distinct value is converted once.
    keys = [tuple(value) for value in values] if column.dtype.kind == "O" else values
    cells = {key: json.dumps(key, ensure_ascii=dialect is not None) for key in set(keys)}
    if dialect is not None and dialect != TSV:
        cells = {
            key: text_files.csv_cell(key if is_label else cell, dialect)
            for key, cell in cells.items()
        }
    return [cells[key] for key in keys]


@contextmanager
def _open(url: str) -> Iterator[tuple[IO[bytes], Format]]:
    """Open a file as its lines, and return its format, too."""
    store, path = filesystem(url)
    format_ = known_format(url)
    with store.open(path, "rb") as stream:
        yield open_text(stream, url, format_), format_
