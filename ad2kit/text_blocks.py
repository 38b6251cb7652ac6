"""Blocks of CSV, TSV and JSON lines: found by one pass over the bytes, read by a seek."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass, field, replace
from typing import IO, TYPE_CHECKING, Any

from ad2kit.blocks import Block, Rows, Survey, filesystem, suffix_of
from ad2kit.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from ad2kit.blocks import Layout
    from ad2kit.score_records import InputFile

# A block ends here too, so that long rows do not fill the memory.
_BLOCK_BYTES = 32 * 2**20
# A quotation mark that is never closed would make one field of the rest of the file.
_FIELD_CHARACTERS = 2**20
_BOM = b"\xef\xbb\xbf"
# What is not UTF-8 is decoded to lone surrogates, which no text may hold and no file can be given.
_NOT_TEXT = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class _Frame:
    """A row as it lies there: its first line, the byte after it, its fields or its JSON."""

    line: int
    end_byte: int
    fields: list[str] = field(default_factory=list)
    raw: bytes = b""
    error: str = ""


class _Lines:
    """The lines of a stream, counted while a csv.reader takes them."""

    def __init__(self, stream: IO[bytes], byte: int = 0, line: int = 0) -> None:
        self.stream, self.byte, self.line = stream, byte, line

    def raw(self) -> Iterator[bytes]:
        for raw in self.stream:
            first = self.byte == 0
            self.byte, self.line = self.byte + len(raw), self.line + 1
            yield raw.removeprefix(_BOM) if first else raw

    def __iter__(self) -> Iterator[str]:
        for raw in self.raw():
            yield raw.decode("utf-8", "surrogateescape").replace("\r\n", "\n")


def survey(file: InputFile, block_rows: int) -> Survey:
    """Read a file once and cut it where rows end.

    Raises:
        DataError: there is no header, or no row that shows the columns.
    """
    suffix, blocks, rows = suffix_of(file.url), [], 0
    with _open(file.url) as stream:
        lines = _Lines(stream)
        header = () if suffix == "jsonl" else _header(lines, file.url, suffix)
        start = Block(file.url, first_row=1, rows=0, first_byte=lines.byte, lines_before=lines.line)
        for frame in _frames(lines, suffix):
            if not header:
                row = _parsed(frame, suffix, ())
                header = tuple(row) if isinstance(row, dict) else ()
            rows += 1
            if rows == block_rows or frame.end_byte - start.first_byte >= _BLOCK_BYTES:
                blocks.append(replace(start, rows=rows, end_byte=frame.end_byte))
                start = replace(start, first_row=start.first_row + rows, first_byte=frame.end_byte,
                                lines_before=lines.line)  # fmt: skip
                rows = 0
        if rows:
            blocks.append(replace(start, rows=rows, end_byte=lines.byte))
    if blocks and not header:
        raise DataError(
            f"{file.url}: none of its lines is a JSON object with a key",
            hint='write lines like {"text": "...", "id": 1}',
        )
    # Objects may lack keys and order them at will; the rows of one table may not.
    kind = "JSON lines" if suffix == "jsonl" else ", ".join(header)
    return Survey(header, header, kind, blocks)


def read(block: Block, layout: Layout) -> Rows:
    """Read a block; a row that is not UTF-8, not JSON, or of another width is bad."""
    suffix, kept = suffix_of(block.url), list[dict[str, Any] | bytes]()
    with _open(block.url) as stream:
        stream.seek(block.first_byte)
        content = io.BytesIO(stream.read(block.end_byte - block.first_byte))
    rows = Rows(block, kept)
    frames = _frames(_Lines(content, block.first_byte, block.lines_before), suffix)
    for number, frame in enumerate(frames, block.first_row):
        row = _parsed(frame, suffix, layout.columns)
        taken = [] if isinstance(row, str) else [name for name in layout.added if name in row]
        if isinstance(row, str) or taken:
            reason = row if isinstance(row, str) else f"has a '{taken[0]}' already"
            rows.refuse((number, frame.line), reason)
            continue
        kept.append(frame.raw if suffix == "jsonl" else row)
        rows.places.append((number, frame.line))
        rows.texts.append(tuple(row.get(column) for column in layout.text_columns))
    return rows


def write(
    rows: Rows, good: Sequence[int], layout: Layout, answers: Mapping[str, NDArray[Any]]
) -> bytes:
    """Return the rows at the positions ``good`` with their answers, in the format they came in."""
    suffix, out = suffix_of(rows.block.url), io.StringIO(newline="")
    added = zip(*(values.tolist() for values in answers.values()), strict=True)
    if suffix == "jsonl":
        for position, values in zip(good, added, strict=True):
            # Not parsed and written again: numbers keep their digits, and keys their order.
            row = rows.kept[position].decode().rstrip().removesuffix("}").rstrip()
            row = row.replace("\r", " ")  # between tokens, where it would end the line for many
            new = json.dumps(dict(zip(answers, values, strict=True)), ensure_ascii=False)
            out.write(f"{row}, {new.removeprefix('{')}\n")
        return out.getvalue().encode()
    table = [[*layout.columns, *answers]]
    for position, values in zip(good, added, strict=True):
        plain = [value if isinstance(value, str) else json.dumps(value) for value in values]
        table.append([*rows.kept[position].values(), *plain])
    if suffix == "csv":
        csv.writer(out, lineterminator="\n").writerows(table)
    else:
        out.writelines("\t".join(fields) + "\n" for fields in table)
    return out.getvalue().encode()


def _open(url: str) -> Any:
    store, path = filesystem(url)
    return store.open(path, "rb")


def _frames(lines: _Lines, suffix: str) -> Iterator[_Frame]:
    """Yield the rows of a file one by one; blank lines are none."""
    if suffix == "jsonl":
        for raw in lines.raw():
            if raw.strip():
                yield _Frame(lines.line, lines.byte, raw=raw.rstrip(b"\r\n"))
    elif suffix == "tsv":
        for text in lines:
            if line := text.rstrip("\n"):
                # A quotation mark is an ordinary character here (the GLUE files depend on it).
                yield _Frame(lines.line, lines.byte, line.split("\t"))
    else:
        yield from _csv_frames(lines)


def _csv_frames(lines: _Lines) -> Iterator[_Frame]:
    csv.field_size_limit(_FIELD_CHARACTERS)
    reader = csv.reader(lines, strict=True)
    while True:
        first = lines.line + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # The reader begins anew with the next line, in the survey as in the block.
            reason = f"not CSV: {error}"
            reason += f", up to line {lines.line}" if lines.line > first else ""
            # The others are ended by it too early: "a quotation" like this.
            if "expected after" not in str(error):
                reason += ": is a quotation mark never closed?"
            yield _Frame(first, lines.byte, error=reason)
            continue
        if fields:
            yield _Frame(first, lines.byte, fields)


def _parsed(frame: _Frame, suffix: str, columns: tuple[str, ...]) -> dict[str, Any] | str:
    """Return a row by column, or what is wrong with it."""
    if frame.error:
        return frame.error
    if suffix == "jsonl":
        return _object(frame.raw)
    if len(frame.fields) != len(columns):
        return f"expected {len(columns)} fields, found {len(frame.fields)}"
    if any(_NOT_TEXT.search(value) for value in frame.fields):
        return "not UTF-8"
    return dict(zip(columns, frame.fields, strict=True))


def _object(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if not isinstance(row, dict):
        return f"expected a JSON object, found {type(row).__name__}"
    if b"\\u" in line and _NOT_TEXT.search(json.dumps(row, ensure_ascii=False)):
        return "holds half a surrogate pair, which is no character"
    return row


def _header(lines: _Lines, url: str, suffix: str) -> tuple[str, ...]:
    frame = next(_frames(lines, suffix), None)
    if frame is None:
        raise DataError(f"{url} is empty", hint="its first line must name its columns")
    names = tuple(frame.fields)
    twice = [name for name in names if names.count(name) > 1]
    wrong = frame.error or (f"the column '{twice[0]}' appears twice" if twice else "")
    if wrong or any(_NOT_TEXT.search(name) for name in names):
        raise DataError(
            f"{url}, line {frame.line}: {wrong or 'not UTF-8'}",
            hint="correct the line that names the columns",
        )
    return names
