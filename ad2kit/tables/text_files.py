r"""Rows of CSV, TSV and JSON lines: the one reader, for training, scoring and prediction.

The reader is strict: if a table can be read in two ways, some program reads it wrongly. In CSV a
quotation mark inside a quoted cell is written twice (RFC 4180), or after a backslash if that is
declared; a quotation mark that is never closed, or is followed by text, is an error. In TSV a
quotation mark is an ordinary character (the GLUE files depend on it). Only ``\n`` and ``\r\n`` end
a line; U+2028 and its like belong to the text. A BOM at the start of a file is dropped.

The caller decides about a wrong row: training refuses the file, scoring lists the row and goes on.
"""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Literal

from ad2kit.run.errors import DataError
from ad2kit.tables.texts import SURROGATE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    Frame = tuple[int, int, Any, str]

Quotes = Literal["doubled", "backslash"]
"""How a quotation mark inside a quoted cell of CSV is written; see :class:`Dialect`."""

BOM = b"\xef\xbb\xbf"
_DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
_NAME_COLUMNS = "correct the line that names the columns"
# The limit of a cell: an unclosed quotation mark would turn the rest of the file into one cell.
_CELL_CHARACTERS = 2**20
# The bytes that are decoded at once.
_CHUNK_BYTES = 2**20
_JSON_BLANKS = " \t\r\n\x0b\x0c"


@dataclass(frozen=True, slots=True)
class Dialect:
    r"""The delimiter of the cells, and how a quotation mark inside a quoted cell is written.

    It is ``doubled`` (RFC 4180), or a ``backslash`` stands before it, as Spark writes it: then
    ``\"`` is a quotation mark and ``\\`` a backslash, in quoted cells alone. With ``none`` no cell
    is quoted.
    """

    delimiter: str = ","
    quotes: Literal[Quotes, "none"] = "doubled"


TSV = Dialect("\t", "none")


def csv_dialects(quotes: Quotes) -> tuple[Dialect, ...]:
    """Return the dialects that a CSV file may have; its header shows which."""
    return tuple(Dialect(delimiter, quotes) for delimiter in _DELIMITERS)


@dataclass(frozen=True, slots=True)
class Header:
    """The dialect of a CSV or TSV file, its columns, and the number of lines of its header."""

    dialect: Dialect
    columns: tuple[str, ...]
    lines: int


def decode(raw: bytes) -> tuple[str, bool]:
    """Return bytes as text, and whether they are UTF-8; other bytes become surrogates."""
    try:
        return raw.decode(), True
    except UnicodeDecodeError:
        return raw.decode("utf-8", "surrogateescape"), False


class Lines:
    r"""The lines of a stream of bytes as texts with their line ends; only ``\n`` ends a line.

    ``is_utf8`` says whether all lines so far are UTF-8. A byte order mark is dropped if the first
    line ``begins_file``.
    """

    def __init__(self, stream: IO[bytes], *, begins_file: bool = True) -> None:
        self.is_utf8 = True
        self._stream = stream
        self._begins_file = begins_file

    def __iter__(self) -> Iterator[str]:
        mark = BOM if self._begins_file else b""
        while lines := self._stream.readlines(_CHUNK_BYTES):
            text, is_utf8 = decode(b"".join(lines).removeprefix(mark))
            mark = b""
            self.is_utf8 = self.is_utf8 and is_utf8
            yield from io.StringIO(text, newline="\n")


def text_lines(stream: Iterable[bytes], name: str) -> Iterator[tuple[int, str]]:
    r"""Yield number, from 1, and text of each line of a file that holds one text a line.

    Args:
        stream: the lines as bytes; BOM and line ends (``\n`` or ``\r\n``) are not part of a text.
        name: name of the file, for messages.

    Raises:
        DataError: a line is not UTF-8.
    """
    for number, raw in enumerate(stream, 1):
        text, is_utf8 = decode(raw.removeprefix(BOM) if number == 1 else raw)
        if not is_utf8:
            raise bad_row(f"{name}, line {number}", not_utf8(text))
        yield number, text.rstrip("\r\n")


def frames(lines: Iterable[str], dialect: Dialect | None) -> Iterator[Frame]:
    """Yield the unchecked rows of a file; blank lines are skipped.

    Args:
        lines: the lines of the file.
        dialect: the dialect of CSV or TSV; None for JSON lines.

    Yields:
        The number of the row's first line, from 0; the number of the line after the row; the cells
        (for JSON lines the text); and the error of the row, or "". After a wrong row the next line
        begins another row.
    """
    if dialect is None:
        for number, line in enumerate(lines):
            if content := line.strip(_JSON_BLANKS):
                yield number, number + 1, content, ""
    elif dialect.quotes == "none":
        for number, line in enumerate(lines):
            if content := line.rstrip("\r\n"):
                error = "not TSV: a carriage return inside of the line" * ("\r" in content)
                yield number, number + 1, content.split(dialect.delimiter), error
    else:
        yield from _csv_frames(lines, dialect)


def is_blank(line: bytes, dialect: Dialect | None) -> bool:
    """Tell whether :func:`frames` skips a line of TSV or JSON lines."""
    return not (line.strip() if dialect is None else line.rstrip(b"\r\n"))


def header(
    stream: IO[bytes], name: str, dialects: Sequence[Dialect], columns: Sequence[str]
) -> Header:
    """Read the names of the columns of a CSV or TSV file, and rewind the file.

    Args:
        stream: the file at its start.
        name: its name, for messages.
        dialects: the dialects that it may have.
        columns: columns that it should have: they decide about the dialect. If it has them in none,
            or if there are none, the dialect is taken that shows the most columns.

    Raises:
        DataError: the file is empty, its first row is wrong, two columns have the same name, or
            it has two dialects.
    """
    found: dict[Dialect, tuple[str, ...]] = {}
    lines: dict[Dialect, tuple[int, int]] = {}
    error = DataError(f"{name} is empty", hint="its first line must name its columns")
    for dialect in reversed(dialects):
        row = next(frames(Lines(stream), dialect), None)
        stream.seek(0)
        if row is not None and row[3]:
            error = bad_row(f"{name}, line {row[0] + 1}", row[3], _NAME_COLUMNS)
        elif row is not None:
            found[dialect] = tuple(row[2])
            lines[dialect] = (row[0], row[1])
    if not found:
        raise error
    dialect = _chosen(found, name, columns)
    first_line, end_line = lines[dialect]
    _check_names(f"{name}, line {first_line + 1}", dialect, found[dialect])
    return Header(dialect, found[dialect], end_line)


def _chosen(found: Mapping[Dialect, tuple[str, ...]], name: str, columns: Sequence[str]) -> Dialect:
    """Return the dialect in which a header holds some columns; see :func:`header`."""
    most = max(map(len, found.values()))
    widest = {each: names for each, names in found.items() if len(names) == most}
    fitting = {each: names for each, names in found.items() if set(columns) <= set(names)}
    if not fitting:
        return list(widest)[-1]
    if not columns:
        fitting = widest
    # The name of a single column has no delimiter: in every dialect it is the same.
    if len(set(fitting.values())) > 1:
        delimiters = " or ".join(sorted(_DELIMITERS[each.delimiter] for each in fitting))
        wanted = f"the columns {', '.join(columns)}" if columns else f"{most} columns"
        raise DataError(
            f"{name}: its first line holds {wanted} with {delimiters} as the delimiter",
            hint="write the file with another delimiter, or give its columns other names",
        )
    return list(fitting)[-1]


def _check_names(where: str, dialect: Dialect, names: Sequence[str]) -> None:
    """Refuse names of columns that are not UTF-8, appear twice, or are quoted in TSV."""
    text = "".join(names)
    duplicates = [column for column in names if names.count(column) > 1]
    if SURROGATE.search(text):
        raise bad_row(where, not_utf8(text), _NAME_COLUMNS)
    if duplicates:
        raise bad_row(where, f"the column '{duplicates[0]}' appears twice", _NAME_COLUMNS)
    if dialect == TSV and all(each[:1] == each[-1:] == '"' != each for each in names):
        raise DataError(
            f"{where}: expected TSV, which has no quoting, found names in quotation marks: "
            f"{names[0]}",
            hint="let the name of the file end in .csv: CSV may have tabs between its cells",
        )


def checked_rows(
    lines: Iterable[str], dialect: Dialect | None, columns: Sequence[str], decoded: Lines
) -> Iterator[Frame]:
    """Yield the rows below the header like :func:`frames`, checked; for JSON lines the objects.

    Args:
        lines: the lines without the header.
        dialect: the dialect of CSV or TSV; None for JSON lines.
        columns: the columns of CSV and TSV; each row must have as many cells.
        decoded: the lines of the stream, which know whether they are UTF-8.
    """
    for first_line, end_line, cells, frame_error in frames(lines, dialect):
        content = cells
        error = frame_error
        if not decoded.is_utf8 and not error and SURROGATE.search(text := "".join(cells)):
            error = not_utf8(text)
        elif dialect is None:
            content, error = _object(cells)
        elif not error and len(cells) != len(columns):
            names = f"{', '.join(columns):.80}"
            error = f"expected {len(columns)} fields ({names}), found {len(cells)}"
        yield first_line, end_line, content, error


def bad_row(where: str, reason: str, otherwise: str = "correct the line") -> DataError:
    r"""Return the error that refuses a file for one of its rows, with a hint.

    Args:
        where: the file and the line.
        reason: the error of the row.
        otherwise: the hint if no better one is known.
    """
    cure = otherwise
    if reason.startswith("not UTF-8"):
        is_utf16 = reason.endswith(("0xff", "0xfe"))
        encoding = "utf-16" if is_utf16 else "latin1"
        cure = f"convert it, for example: iconv -f {encoding} -t utf-8 OLD > NEW"
    elif "field limit" in reason:
        cure = "close each quotation mark; cells that long need JSON lines or Parquet"
    elif "new-line character" in reason:
        cure = "end lines with \\n or \\r\\n, and put cells that hold \\r into quotation marks"
    elif reason.startswith("not CSV"):
        cure = (
            "close each quotation mark, and write one inside of a quoted cell twice; if a "
            "backslash stands before it, as Spark writes it, give data.csv_quotes=backslash in "
            "the recipe, or --csv-quotes backslash on the command line"
        )
    return DataError(f"{where}: {reason}", hint=cure)


def csv_cell(value: str, dialect: Dialect) -> str:
    r"""Return a cell as CSV; ``\r`` is quoted too, which ``csv`` before Python 3.11.9 omits."""
    if not any(character in value for character in ('"', "\r", "\n", dialect.delimiter)):
        return value
    if dialect.quotes == "backslash":
        return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
    return '"' + value.replace('"', '""') + '"'


def _csv_frames(lines: Iterable[str], dialect: Dialect) -> Iterator[Frame]:
    """Yield the rows of a CSV file; see :func:`frames`."""
    csv.field_size_limit(_CELL_CHARACTERS)
    doubled = _DoubledQuotes(lines, dialect.delimiter)
    source = doubled if dialect.quotes == "backslash" else lines
    reader = csv.reader(source, delimiter=dialect.delimiter, strict=True)
    first_line = 0
    while True:
        try:
            for cells in reader:
                if cells:
                    yield first_line, reader.line_num, cells, ""
                first_line = reader.line_num
            return
        except csv.Error as error:
            reason = f"not CSV: {error}"
            length_lines = reader.line_num - first_line
            if length_lines > 1:
                reason += f", {length_lines} lines long"
            if length_lines > 1 or "end of data" in reason:
                reason += ": is a quotation mark never closed?"
            yield first_line, reader.line_num, [], reason
            first_line = reader.line_num
            doubled.in_quotes = False


class _DoubledQuotes:
    r"""The lines of a CSV file with ``""`` for ``\"``, and ``\`` for ``\\``, in its quoted cells.

    ``in_quotes`` says whether the next line begins inside a quoted cell.
    """

    _MARKS = re.compile(r'\\["\\]|"')

    def __init__(self, lines: Iterable[str], delimiter: str) -> None:
        self.in_quotes = False
        self._lines = lines
        self._delimiter = delimiter

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            yield self._doubled(line) if '"' in line or self.in_quotes else line

    def _doubled(self, line: str) -> str:
        parts: list[str] = []
        start = 0
        while start < len(line):
            if not self.in_quotes and line[start] != '"':
                # An unquoted cell ends at the delimiter; a backslash in it is a backslash.
                end = line.find(self._delimiter, start) + 1 or len(line)
                parts.append(line[start:end])
            elif not self.in_quotes:
                self.in_quotes = True
                end = start + 1
                parts.append('"')
            elif (mark := self._MARKS.search(line, start)) is None:
                end = len(line)
                parts.append(line[start:])
            else:
                end = mark.end()
                parts.append(line[start : mark.start()])
                if mark[0] == '"':
                    self.in_quotes = False
                    # A second mark would be read as a mark inside the cell: here it is an error.
                    parts.append('" ' if line[end : end + 1] == '"' else '"')
                else:
                    parts.append('""' if mark[0] == '\\"' else "\\")
            start = end
        return "".join(parts)


def _object(line: str) -> tuple[dict[str, Any], str]:
    """Return the object in a line of JSON and "", or an empty object and the error."""
    try:
        row = _JSON.decode(line)
    except _DuplicateKey as error:
        return {}, str(error)
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON: {error}"
    if not isinstance(row, dict):
        return {}, f"expected a JSON object, found {type(row).__name__}"
    if "\\u" in line and SURROGATE.search(json.dumps(row, ensure_ascii=False)):
        return {}, "holds half a surrogate pair, which is no character"
    return row, ""


class _DuplicateKey(ValueError):
    """An object has a key twice: readers differ in which value they take."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dict; refuse duplicate keys."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for key in keys if keys.count(key) > 1)
        raise _DuplicateKey(f"the key '{duplicate}' appears twice")
    return row


_JSON = json.JSONDecoder(object_pairs_hook=_unique_keys)


def not_utf8(text: str) -> str:
    """Return an error that names the first byte which is not UTF-8; "" if there is none."""
    surrogate = SURROGATE.search(text)
    return f"not UTF-8: byte 0x{ord(surrogate[0]) - 0xDC00:02x}" if surrogate else ""
