"""Blocks of CSV, TSV and JSON lines: found by one pass over the bytes, read by a seek."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

from ad2kit.data import text_files
from ad2kit.data.text_files import BOM
from ad2kit.run.errors import DataError
from ad2kit.scoring.blocks import Block, Rows, Survey, filesystem, suffix_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from ad2kit.scoring.blocks import Layout
    from ad2kit.scoring.records import InputFile

# A block ends here too, so that long rows do not fill the memory.
_BLOCK_BYTES = 32 * 2**20


class _Lines:
    """The lines of a stream, counted while they are taken."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.byte, self.line = stream, 0, 0

    def raw(self) -> Iterator[bytes]:
        for raw in self.stream:
            first = self.byte == 0
            self.byte, self.line = self.byte + len(raw), self.line + 1
            yield raw.removeprefix(BOM) if first else raw

    def __iter__(self) -> Iterator[str]:
        for raw in self.raw():
            yield text_files.decode(raw)[0]


def survey(file: InputFile, block_rows: int) -> Survey:
    """Read a file once and cut it where rows end.

    Raises:
        DataError: there is no header, or no row that shows the columns.
    """
    suffix, blocks, rows = suffix_of(file.url), [], 0
    with _open(file.url) as stream:
        lines, columns = _Lines(stream), tuple[str, ...]()
        if suffix != "jsonl":
            columns, _ = text_files.header(lines, file.url, suffix)
        start = Block(file.url, first_row=1, rows=0, first_byte=lines.byte, lines_before=lines.line)
        for found in _row_by_row(lines, suffix):
            columns = columns or found
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
    # Objects may lack keys and order them at will; the rows of one table may not.
    kind = "JSON lines" if suffix == "jsonl" else ", ".join(columns)
    return Survey(columns, columns, kind, blocks)


def _row_by_row(lines: _Lines, suffix: str) -> Iterator[tuple[str, ...]]:
    """Yield once for each row, when its lines are counted: the keys of the first objects."""
    if suffix == "csv":
        for _ in text_files.frames(lines, suffix):
            yield ()
        return
    keys: tuple[str, ...] = ("",) if suffix == "tsv" else ()
    for raw in lines.raw():
        if not text_files.is_blank(raw, suffix):
            keys = keys or _keys(raw)
            yield keys


def _keys(raw: bytes) -> tuple[str, ...]:
    text, is_utf8 = text_files.decode(raw)
    (found,) = text_files.checked_rows([text], "jsonl", (), is_utf8=is_utf8)
    return tuple(found[2])


class Reader:
    """Reads blocks of one file, which is open until :meth:`close`.

    Raises:
        OSError: it cannot be read at all.
    """

    def __init__(self, url: str, layout: Layout) -> None:
        self._suffix, self._layout = suffix_of(url), layout
        self._stream = _open(url)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def read(self, block: Block) -> Rows:
        """Read a block; a row that is not UTF-8, not JSON, or of another width is bad."""
        suffix, layout, kept = self._suffix, self._layout, list[str]()
        self._stream.seek(block.first_byte)
        raw = self._stream.read(block.end_byte - block.first_byte)
        text, is_utf8 = text_files.decode(raw if block.first_byte else raw.removeprefix(BOM))
        lines, found = text_files.split_lines(text), Rows(block, kept)
        columns = _columns_of(suffix, layout)
        added = set(layout.added) if suffix == "jsonl" else set()
        every = text_files.checked_rows(lines, suffix, layout.columns, is_utf8=is_utf8)
        for number, (first, end, row, error) in enumerate(every, block.first_row):
            place, wrong = (number, block.lines_before + first + 1), error
            if added and not added.isdisjoint(row):
                wrong = f"has a '{min(added.intersection(row))}' already"
            if wrong:
                found.refuse(place, wrong)
                continue
            kept.append(lines[first] if end == first + 1 else "".join(lines[first:end]))
            found.places.append(place)
            found.texts.append(columns(row))
        return found


def write(
    rows: Rows, good: Sequence[int], layout: Layout, answers: Mapping[str, NDArray[Any]]
) -> bytes:
    """Return the rows at the positions ``good`` with their answers, in the format they came in.

    A row goes out as it lay there: nothing of it is quoted, rounded or ordered anew.
    """
    suffix = suffix_of(rows.block.url)
    old = [rows.kept[position].rstrip("\r\n") for position in good]
    added = zip(*(_in_words(values, suffix) for values in answers.values()), strict=True)
    if suffix == "jsonl":
        names = [json.dumps(name, ensure_ascii=False) for name in answers]
        form = ", ".join(f"{name.replace('%', '%%')}: %s" for name in names) + "}\n"
        # A \r between tokens would end the line for many.
        heads = [row.rstrip().removesuffix("}").rstrip().replace("\r", " ") for row in old]
        new = [f"{head}, {form % values}" for head, values in zip(heads, added, strict=True)]
        return "".join(new).encode()
    separator = "," if suffix == "csv" else "\t"
    names = [*layout.columns, *answers]
    new = [separator.join(map(text_files.csv_cell, names) if suffix == "csv" else names)]
    new += [separator.join((row, *values)) for row, values in zip(old, added, strict=True)]
    return "".join(f"{line}\n" for line in new).encode()


def _columns_of(suffix: str, layout: Layout) -> Callable[[Any], tuple[Any, ...]]:
    """Return the function that takes the text columns out of a row."""
    if suffix == "jsonl":
        return lambda row: tuple([row.get(name) for name in layout.text_columns])
    places = [layout.columns.index(name) for name in layout.text_columns]
    return lambda row: tuple([row[place] for place in places])


def _in_words(values: NDArray[Any], suffix: str) -> list[str]:
    """Return a column of answers as it is written; all but labels of CSV and TSV as JSON."""
    found, escaped = values.tolist(), suffix != "jsonl"
    if values.dtype.kind == "f":
        return [repr(value) if math.isfinite(value) else json.dumps(value) for value in found]
    if values.dtype.kind == "U" and suffix == "tsv":
        return list(found)
    # What is not a number is the same in many rows.
    keys = [tuple(value) for value in found] if values.dtype.kind == "O" else found
    words = {key: json.dumps(key, ensure_ascii=escaped) for key in set(keys)}
    if suffix == "csv":
        plain = values.dtype.kind == "U"
        words = {key: text_files.csv_cell(key if plain else word) for key, word in words.items()}
    return [words[key] for key in keys]


def _open(url: str) -> Any:
    store, path = filesystem(url)
    return store.open(path, "rb")
