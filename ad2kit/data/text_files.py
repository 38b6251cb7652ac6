r"""Rows of CSV, TSV and JSON lines: the one reader, for training, scoring and prediction.

It is strict, because a table that can be read in two ways is read wrongly by one of them. In CSV a
quotation mark inside of a quoted cell is written twice (RFC 4180); one that is never closed, or
followed by text, is an error. In TSV a quotation mark is an ordinary character (the GLUE files
depend on it). Lines end with ``\n`` or ``\r\n``, and with nothing else: U+2028 and its like belong
to the text. A BOM at the start of a file is no part of it.

What to do with a row that is wrong is the caller's to say: training refuses the file, scoring lists
the row and goes on.
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
# A quotation mark that is never closed would make one cell of the rest of the file.
_CELL_CHARACTERS = 2**20
_JSON_BLANKS = " \t\r\n\x0b\x0c"


def decode(raw: bytes) -> tuple[str, bool]:
    """Return bytes as text, and whether they are UTF-8; those that are not become surrogates."""
    try:
        return raw.decode(), True
    except UnicodeDecodeError:
        return raw.decode("utf-8", "surrogateescape"), False


def split_lines(text: str) -> list[str]:
    r"""Return the lines of a text with their ends; only ``\n`` ends a line."""
    return list(io.StringIO(text, newline="\n"))


def text_lines(stream: Iterable[bytes], name: str) -> Iterator[tuple[int, str]]:
    r"""Yield number and text of each line of a file that holds a text a line.

    Args:
        stream: its lines as bytes; BOM and line ends (``\n`` or ``\r\n``) are no part of a text.
        name: of the file, for messages.

    Raises:
        DataError: a line is not UTF-8.
    """
    for number, raw in enumerate(stream, 1):
        text, is_utf8 = decode(raw.removeprefix(BOM) if number == 1 else raw)
        if not is_utf8:
            raise bad_row(f"{name}, line {number}", _not_utf8(text), text)
        yield number, text.rstrip("\r\n")


def frames(lines: Iterable[str], suffix: str) -> Iterator[Frame]:
    """Yield the rows of a file as they lie there; blank lines are none.

    Yields:
        The number of the first line of the row from 0, that of the line after it, its cells (of
        JSON lines the text), and what is wrong with it. After a row that is wrong the next line
        begins another.
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
    """Tell whether a line of TSV or JSON lines is no row for :func:`frames`."""
    return not (line.strip() if suffix == "jsonl" else line.rstrip(b"\r\n"))


def header(lines: Iterable[str], name: str, suffix: str) -> tuple[tuple[str, ...], int]:
    """Return the names of the columns of a CSV or TSV file, and how many lines they take.

    Raises:
        DataError: the file is empty, its first row is wrong, two columns have one name, or the
            names show that it is a table of another kind.
    """
    found = next(frames(lines, suffix), None)
    if found is None:
        raise DataError(f"{name} is empty", hint="its first line must name its columns")
    first, end, names, error = found
    twice = [each for each in names if names.count(each) > 1]
    if SURROGATE.search(text := "".join(names)):
        error = error or _not_utf8(text)
    elif twice:
        error = error or f"the column '{twice[0]}' appears twice"
    if error:
        raise bad_row(
            f"{name}, line {first + 1}", error, text, "correct the line that names the columns"
        )
    _insist_on_format(f"{name}, line {first + 1}", names, suffix)
    return tuple(names), end


def _insist_on_format(where: str, names: Sequence[str], suffix: str) -> None:
    """Refuse a CSV file with other separators, and a TSV file whose cells are quoted as in CSV."""
    separator = next((each for each in ";\t|" if len(names) == 1 and each in names[0]), None)
    if suffix == "csv" and separator:
        found = f"expected columns between commas, found one column named {names[0]!r}"
    elif suffix == "tsv" and all(name[:1] == name[-1:] == '"' != name for name in names):
        separator = "\t"
        found = f"expected TSV, which has no quoting, found names in quotation marks: {names[0]}"
    else:
        return
    raise DataError(
        f"{where}: {found}",
        hint=f"pandas.read_csv(OLD, sep={separator!r}, dtype=str, keep_default_na=False)"
        ".to_csv(NEW, index=False) writes a CSV file that ad2kit reads",
    )


def checked_rows(
    lines: Iterable[str], suffix: str, columns: Sequence[str], *, is_utf8: bool
) -> Iterator[Frame]:
    """Yield the rows below the header as :func:`frames`, checked; of JSON lines the objects.

    Args:
        lines: without those of the header.
        suffix: the format.
        columns: of CSV and TSV, where each row must have as many cells.
        is_utf8: what :func:`decode` said of these lines.
    """
    for first, end, cells, error in frames(lines, suffix):
        wrong = error
        if not is_utf8 and not wrong and SURROGATE.search(text := "".join(cells)):
            wrong = _not_utf8(text)
        elif suffix == "jsonl":
            cells, wrong = _object(cells)  # noqa: PLW2901
        elif not wrong and len(cells) != len(columns):
            names = f"{', '.join(columns):.80}"
            wrong = f"expected {len(columns)} fields ({names}), found {len(cells)}"
        yield first, end, cells, wrong


def bad_row(where: str, reason: str, raw: str, otherwise: str = "correct the line") -> DataError:
    r"""Return the refusal of a file for one of its rows, with the cure.

    Args:
        where: the file and the line.
        reason: what is wrong with the row.
        raw: the row as it lies there.
        otherwise: the cure where no other is known.
    """
    cure = otherwise
    if reason.startswith("not UTF-8"):
        utf16 = reason.endswith(("0xff", "0xfe"))
        source = "utf-16" if utf16 else "latin1"
        cure = f"convert it, for example: iconv -f {source} -t utf-8 OLD > NEW"
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
    r"""Return a cell as CSV; also ``\r`` is quoted, which ``csv`` before Python 3.11.9 is not."""
    if not re.search('[",\r\n]', value):
        return value
    return '"' + value.replace('"', '""') + '"'


def _csv_frames(lines: Iterable[str]) -> Iterator[Frame]:
    csv.field_size_limit(_CELL_CHARACTERS)
    reader, first = csv.reader(lines, strict=True), 0
    while True:
        try:
            for cells in reader:
                if cells:
                    yield first, reader.line_num, cells, ""
                first = reader.line_num
            return
        except csv.Error as error:
            reason, several = f"not CSV: {error}", reader.line_num > first + 1
            if several:
                reason += f", {reader.line_num - first} lines long"
            if several or "end of data" in reason:
                reason += ": is a quotation mark never closed?"
            yield first, reader.line_num, [], reason
            first = reader.line_num


def _object(line: str) -> tuple[dict[str, Any], str]:
    """Return the object that a line of JSON holds, or what is wrong with it."""
    try:
        row = _JSON.decode(line)
    except (ValueError, RecursionError) as error:
        return {}, str(error) if isinstance(error, _Twice) else f"not JSON: {error}"
    if not isinstance(row, dict):
        return {}, f"expected a JSON object, found {type(row).__name__}"
    if "\\u" in line and SURROGATE.search(json.dumps(row, ensure_ascii=False)):
        return {}, "holds half a surrogate pair, which is no character"
    return row, ""


class _Twice(ValueError):
    """A key that an object has twice: readers differ in which value they take."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Twice(f"the key '{twice}' appears twice")
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_once)


def _not_utf8(text: str) -> str:
    found = SURROGATE.search(text)
    return f"not UTF-8: byte 0x{ord(found[0]) - 0xDC00:02x}" if found else ""
