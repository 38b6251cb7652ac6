r"""Rows of CSV, TSV and JSON lines: the one reader, for training, scoring and prediction.

The reader is strict: if a table can be read in two ways, some program reads it wrongly. In CSV a
quotation mark inside a quoted cell is written twice (RFC 4180); a quotation mark that is never
closed, or is followed by text, is an error. In TSV a quotation mark is an ordinary character (the
GLUE files depend on it). Only ``\n`` and ``\r\n`` end a line; U+2028 and its like belong to the
text. A BOM at the start of a file is dropped.

The caller decides about a wrong row: training refuses the file, scoring lists the row and goes on.
"""

from __future__ import annotations

import csv
import io
import json
import re
from typing import TYPE_CHECKING, Any

from ad2kit.data.texts import SURROGATE
from ad2kit.run.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    Frame = tuple[int, int, Any, str]

BOM = b"\xef\xbb\xbf"
# The limit of a cell: an unclosed quotation mark would turn the rest of the file into one cell.
_CELL_CHARACTERS = 2**20
_JSON_BLANKS = " \t\r\n\x0b\x0c"


def decode(raw: bytes) -> tuple[str, bool]:
    """Return bytes as text, and whether they are UTF-8; other bytes become surrogates."""
    try:
        return raw.decode(), True
    except UnicodeDecodeError:
        return raw.decode("utf-8", "surrogateescape"), False


def split_lines(text: str) -> list[str]:
    r"""Return the lines of a text with their line ends; only ``\n`` ends a line."""
    return list(io.StringIO(text, newline="\n"))


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
            raise bad_row(f"{name}, line {number}", _not_utf8(text), text)
        yield number, text.rstrip("\r\n")


def frames(lines: Iterable[str], suffix: str) -> Iterator[Frame]:
    """Yield the unchecked rows of a file; blank lines are skipped.

    Yields:
        The number of the row's first line, from 0; the number of the line after the row; the cells
        (for JSON lines the text); and the error of the row, or "". After a wrong row the next line
        begins another row.
    """
    if suffix == "csv":
        yield from _csv_frames(lines)
    elif suffix == "tsv":
        for number, line in enumerate(lines):
            if content := line.rstrip("\r\n"):
                error = "not TSV: a carriage return inside of the line" * ("\r" in content)
                yield number, number + 1, content.split("\t"), error
    else:
        for number, line in enumerate(lines):
            if content := line.strip(_JSON_BLANKS):
                yield number, number + 1, content, ""


def is_blank(line: bytes, suffix: str) -> bool:
    """Tell whether :func:`frames` skips a line of TSV or JSON lines."""
    return not (line.strip() if suffix == "jsonl" else line.rstrip(b"\r\n"))


def header(lines: Iterable[str], name: str, suffix: str) -> tuple[tuple[str, ...], int]:
    """Return the names of the columns of a CSV or TSV file, and the number of lines they take.

    Raises:
        DataError: the file is empty, its first row is wrong, two columns have the same name, or
            the names show that the file has another format.
    """
    header_row = next(frames(lines, suffix), None)
    if header_row is None:
        raise DataError(f"{name} is empty", hint="its first line must name its columns")
    first_line, end_line, names, error = header_row
    where = f"{name}, line {first_line + 1}"
    duplicates = [column for column in names if names.count(column) > 1]
    text = "".join(names)
    if not error and SURROGATE.search(text):
        error = _not_utf8(text)
    elif not error and duplicates:
        error = f"the column '{duplicates[0]}' appears twice"
    if error:
        raise bad_row(where, error, text, "correct the line that names the columns")
    _check_format(where, names, suffix)
    return tuple(names), end_line


def _check_format(where: str, names: Sequence[str], suffix: str) -> None:
    """Refuse a CSV file with other separators, and a TSV file whose cells are quoted as in CSV."""
    other_separators = [each for each in ";\t|" if len(names) == 1 and each in names[0]]
    if suffix == "csv" and other_separators:
        separator = other_separators[0]
        reason = f"expected columns between commas, found one column named {names[0]!r}"
    elif suffix == "tsv" and all(name[:1] == name[-1:] == '"' != name for name in names):
        separator = "\t"
        reason = f"expected TSV, which has no quoting, found names in quotation marks: {names[0]}"
    else:
        return
    raise DataError(
        f"{where}: {reason}",
        hint=f"pandas.read_csv(OLD, sep={separator!r}, dtype=str, keep_default_na=False)"
        ".to_csv(NEW, index=False) writes a CSV file that ad2kit reads",
    )


def checked_rows(
    lines: Iterable[str], suffix: str, columns: Sequence[str], *, is_utf8: bool
) -> Iterator[Frame]:
    """Yield the rows below the header like :func:`frames`, checked; for JSON lines the objects.

    Args:
        lines: the lines without the header.
        suffix: the format.
        columns: the columns of CSV and TSV; each row must have as many cells.
        is_utf8: whether :func:`decode` found these lines to be UTF-8.
    """
    for first_line, end_line, cells, frame_error in frames(lines, suffix):
        content = cells
        error = frame_error
        if not is_utf8 and not error and SURROGATE.search(text := "".join(cells)):
            error = _not_utf8(text)
        elif suffix == "jsonl":
            content, error = _object(cells)
        elif not error and len(cells) != len(columns):
            names = f"{', '.join(columns):.80}"
            error = f"expected {len(columns)} fields ({names}), found {len(cells)}"
        yield first_line, end_line, content, error


def bad_row(where: str, reason: str, raw: str, otherwise: str = "correct the line") -> DataError:
    r"""Return the error that refuses a file for one of its rows, with a hint.

    Args:
        where: the file and the line.
        reason: the error of the row.
        raw: the text of the row.
        otherwise: the hint if no better one is known.
    """
    cure = otherwise
    if reason.startswith("not UTF-8"):
        is_utf16 = reason.endswith(("0xff", "0xfe"))
        encoding = "utf-16" if is_utf16 else "latin1"
        cure = f"convert it, for example: iconv -f {encoding} -t utf-8 OLD > NEW"
    elif reason.startswith("not CSV"):
        cure = "close each quotation mark, and write one inside of a quoted cell twice"
        if '\\"' in raw:
            cure += (
                ': pandas.read_csv(OLD, escapechar="\\\\", dtype=str, keep_default_na=False)'
                ".to_csv(NEW, index=False) does it for what Spark wrote"
            )
        elif "field limit" in reason:
            cure += "; cells that long need JSON lines or Parquet"
        elif "new-line character" in reason:
            cure = "end lines with \\n or \\r\\n, and put cells that hold \\r into quotation marks"
    return DataError(f"{where}: {reason}", hint=cure)


def csv_cell(value: str) -> str:
    r"""Return a cell as CSV; ``\r`` is quoted too, which ``csv`` before Python 3.11.9 omits."""
    if not re.search('[",\r\n]', value):
        return value
    return '"' + value.replace('"', '""') + '"'


def _csv_frames(lines: Iterable[str]) -> Iterator[Frame]:
    """Yield the rows of a CSV file; see :func:`frames`."""
    csv.field_size_limit(_CELL_CHARACTERS)
    reader = csv.reader(lines, strict=True)
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


def _not_utf8(text: str) -> str:
    """Return an error that names the first byte which is not UTF-8; "" if there is none."""
    surrogate = SURROGATE.search(text)
    return f"not UTF-8: byte 0x{ord(surrogate[0]) - 0xDC00:02x}" if surrogate else ""
