"""The files of a table and their rows, in every format: for training, scoring and prediction.

A table is one file, or a folder of parts of one format. The ending of a name gives the format, and
``.gz`` or ``.zst`` after it the compression of a text file:

| ending | format |
|---|---|
| ``csv`` | CSV; its delimiter is the one of ``,`` ``;`` TAB ``|`` that shows the columns |
| ``tsv`` | cells between tabs, without quoting |
| ``jsonl``, ``ndjson``, ``json`` | JSON lines; ``json`` may be one array of objects, too |
| ``parquet``, ``arrow`` | Parquet; Arrow's stream format, as ``datasets`` saves it |
"""

from __future__ import annotations

import glob
import gzip
import io
import itertools
import json
import re
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from ad2kit.run.errors import DataError, reading
from ad2kit.tables import text_files
from ad2kit.tables.rows import Cells, Place, check_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from ad2kit.tables.text_files import Dialect, Quotes

FORMATS = ("tsv", "csv", "jsonl", "ndjson", "json", "parquet", "arrow")
_ARROW = ("parquet", "arrow")
_COMPRESSIONS = ("gz", "zst")
# A file of a data set in numbered files: its split, its number, their number, and the ending.
_SHARD = re.compile(r"(.+)-([0-9]{5,})-of-([0-9]{5,})(\.[^/]+)")
_CHUNK_BYTES = 2**20
# The file in which datasets names the files of a saved data set.
SAVED = "state.json"


class Format(NamedTuple):
    """The format of a file: one of FORMATS, or ``txt`` (a text a line).

    ``compression`` is ``gz``, ``zst`` or empty.
    """

    name: str
    compression: str = ""

    @property
    def is_arrow(self) -> bool:
        """Whether Arrow reads the file."""
        return self.name in _ARROW

    @property
    def is_json(self) -> bool:
        """Whether each row is a JSON object."""
        return self.name in ("jsonl", "ndjson", "json")

    @property
    def of_parts(self) -> str:
        """The format of the parts into which `ad2kit score` writes a file."""
        if self.is_arrow:
            return "parquet"
        return "jsonl" if self.is_json else self.name

    @property
    def has_lines(self) -> bool:
        """Whether the place of a row is a line: the objects of an array may share one."""
        return self.name != "json"

    def dialects(self, quotes: Quotes) -> tuple[Dialect, ...]:
        """Return the dialects that a file may have; none for JSON."""
        if self.name == "tsv":
            return (text_files.TSV,)
        return text_files.csv_dialects(quotes) if self.name == "csv" else ()


def format_of(name: str) -> Format | None:
    """Return the format of a file by its name; None if it is no table."""
    *_, before, ending = ("", *PurePosixPath(name).name.split("."))
    compressed = ending in _COMPRESSIONS
    found = Format(before, ending) if compressed else Format(ending)
    if found.name not in (*FORMATS, "txt") or (compressed and found.is_arrow):
        return None
    return found


def is_table(name: str) -> bool:
    """Tell whether the name of a file is that of a table, and not of one text a line."""
    found = format_of(name)
    return found is not None and found.name in FORMATS


def text_lines(stream: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
    """Yield number, from 1, and text of each line of a file; it may be compressed.

    Raises:
        DataError: a line is not UTF-8.
    """
    format_ = format_of(name) or Format("txt")
    yield from text_files.text_lines(open_text(stream, name, format_), name)


def open_text(stream: IO[bytes], name: str, format_: Format) -> IO[bytes]:
    """Return a text file as its lines: decompressed, and a JSON array as JSON lines.

    Args:
        stream: the file, which can be rewound.
        name: its name, for messages.
        format_: its format.

    Raises:
        MissingExtra: zstd is read by pyarrow, which is not installed.
    """
    if format_.compression:
        decompress = _gunzip if format_.compression == "gz" else _unzstd
        compressed = stream
        stream = _made(lambda: decompress(compressed, name))
    if format_.name != "json" or not _is_array(stream):
        return stream
    text = stream
    return _made(lambda: _array_lines(text, name))


def read(
    path: Path,
    columns: Sequence[str] = (),
    quotes: Quotes = "doubled",
    *,
    every: bool = False,
) -> Iterator[Cells]:
    """Yield the rows of a table, which is a file or a folder of parts, as a stream.

    Args:
        path: the file or the folder.
        columns: the columns to read; without them, all. They show the delimiter of CSV.
        quotes: how CSV files write a quotation mark.
        every: read all columns, whether or not ``columns`` are among them.

    Raises:
        DataError: there is no such table, it lacks a column, or a file of it is damaged or cannot
            be read.
        MissingExtra: pyarrow reads the format, and is not installed.
    """
    for file in files_of(path):
        format_ = known_format(file.name)
        if format_.name == "txt" and len(columns) != 1:
            raise DataError(
                f"{file}: a .txt file holds one text a line, but this task reads "
                f"{', '.join(columns) or 'a table'}",
                hint="give a tsv, csv, jsonl or parquet file with these columns",
            )
        with reading(str(file)), file.open("rb") as stream:
            if format_.is_arrow:
                from ad2kit.tables import arrow_files

                yield from arrow_files.read(stream, str(file), () if every else columns)
            else:
                yield from _read_text(stream, str(file), format_, columns, quotes, every=every)


def files_of(path: Path) -> tuple[Path, ...]:
    """Return the files of a table in their order.

    In a folder, names that begin with ``_`` or ``.`` are ignored, as in other readers of tables. A
    folder that ``save_to_disk()`` of ``datasets`` wrote names its files itself.

    Raises:
        DataError: there is no such table, it cannot be read, or its files have several formats.
    """
    with reading(str(path)):
        return _files_of(path.expanduser())


def _files_of(path: Path) -> tuple[Path, ...]:
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path} is a link to nothing", hint="put back what it links to")
    if path.is_file():
        return (path,)
    if glob.has_magic(path.name) and (files := sorted(path.parent.glob(path.name))):
        check_shards(str(path), [each.name for each in files])
        return tuple(part for each in files for part in files_of(each))
    if not path.is_dir():
        raise DataError(f"no file '{path}'", hint="correct the path")
    if (path / SAVED).is_file():
        return tuple(path / name for name in saved_files((path / SAVED).read_bytes(), str(path)))
    files = [each for each in path.iterdir() if not each.name.startswith(("_", "."))]
    if folders := [each for each in files if each.is_dir()]:
        raise DataError(
            f"{path} is no table: it holds the folder {min(folders).name}",
            hint="name one folder of files that have the same columns",
        )
    if len({format_of(each.name) for each in files}) != 1:
        names = ", ".join(sorted(each.name for each in files)) or "none"
        raise DataError(
            f"{path}: expected files of one format, found {names:.200}",
            hint="name one of the files, or move the others away",
        )
    check_shards(str(path), [each.name for each in files])
    return tuple(part for each in sorted(files) for part in files_of(each))


def check_shards(where: str, names: Iterable[str]) -> None:
    """Insist on all of the files that are numbered, such as ``train-00000-of-00003.parquet``.

    Args:
        where: the folder or the pattern that named them, for messages.
        names: the names of all files that are read together; folders may stand before them.

    Raises:
        DataError: one of them is missing.
    """
    numbers: dict[tuple[str, int, str], set[int]] = {}
    for match in filter(None, map(_SHARD.fullmatch, names)):
        numbers.setdefault((match[1], int(match[3]), match[4]), set()).add(int(match[2]))
    for (name, expected, ending), found in numbers.items():
        if found == set(range(1, expected + 1)):
            continue  # numbered from 1
        if missing := sorted(set(range(expected)) - found):
            raise DataError(
                f"{where}: expected {expected} files, found {len(found)}; number {missing[0]} is "
                f"missing ({PurePosixPath(name).name}-{missing[0]:05}-of-{expected:05}{ending})",
                hint="bring the missing file, write the data set again, or name one file alone",
            )


def split_of(folder: Path, stem: str, key: str) -> Path:
    """Return the one table of a split in a folder: a file, a folder of parts, or a glob of shards.

    Args:
        folder: the folder.
        stem: the name of the split: ``train`` of ``train.csv`` or ``train-00000-of-00002.csv``.
        key: its key in the data section, for messages.

    Raises:
        DataError: there is no such table, there are several, or a shard is missing.
    """
    found = named(folder, stem)
    if len(found) != 1:
        raise DataError(
            f"expected exactly one {stem}.({'|'.join(FORMATS)}) in {folder}, "
            f"found {', '.join(each.name for each in found) or 'none'}",
            hint=f"rename a file, or give its name without the ending (data.{key}=held-out), or "
            "name both files: data.source=null data.train=FILE data.validation=FILE",
        )
    return found[0]


def named(folder: Path, stem: str) -> list[Path]:
    """Return the tables of a name in a folder; see :func:`split_of`."""
    with reading(str(folder)):
        paths = sorted(folder.iterdir())
    found = [each for each in paths if _is_named(each, stem)]
    patterns = [
        f"{glob.escape(stem)}-{'[0-9]' * len(match[2])}-of-{match[3]}{match[4]}"
        for each in paths
        if (match := _SHARD.fullmatch(each.name)) and match[1] == stem and is_table(match[4])
    ]
    return found + [folder / pattern for pattern in dict.fromkeys(patterns)]


def _is_named(path: Path, stem: str) -> bool:
    """Tell whether a path is a folder of a name, or a name with the ending of a table."""
    found = format_of(path.name)
    if found is None or found.name not in FORMATS:
        return path.name == stem and path.is_dir()
    endings = (f".{found.name}", f".{found.name}.{found.compression}")
    return path.name.removeprefix(stem) in endings


def saved_files(state: bytes, folder: str) -> tuple[str, ...]:
    """Return the names of the files of a data set, in their order, from its ``state.json``.

    Raises:
        DataError: it does not name them, or the rows of the files are in another order.
    """
    try:
        content = json.loads(state)
        names = tuple(str(each["filename"]) for each in content["_data_files"])
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{folder}/{SAVED} does not name the files of a data set: {error!r}",
            hint="write the folder again with datasets.Dataset.save_to_disk()",
        ) from error
    if content.get("_indices_data_files") or not names:
        raise DataError(
            f"{folder}: the rows of its files are in another order, or it has no file",
            hint=f"datasets.load_from_disk({folder!r}).to_parquet(NEW) writes a table",
        )
    return names


def class_names(path: Path, columns: Sequence[str]) -> tuple[str, ...] | None:
    """Return the names of the classes of a column, if the files of a table hold them; else None.

    Several columns have no such names.

    Raises:
        DataError: the files hold different names.
    """
    if len(columns) != 1:
        return None
    column = columns[0]
    found = {}
    for file in files_of(path):
        if known_format(file.name).is_arrow:
            from ad2kit.tables import arrow_files

            with reading(str(file)), file.open("rb") as stream:
                schema = arrow_files.open_table(stream, str(file)).schema
                found[arrow_files.class_names(schema, column)] = file
    if len(found) > 1:
        raise DataError(
            f"{' and '.join(map(str, found.values()))} hold different names of the classes of "
            f"'{column}'",
            hint="write all files of the table with one ClassLabel feature",
        )
    return next(iter(found), None)


def known_format(name: str) -> Format:
    """Return the format of a table by its name.

    Raises:
        DataError: it has none.
    """
    found = format_of(name)
    if found is None:
        raise DataError(
            f"{name}: expected a file that ends in {', '.join(FORMATS)}, or in one of the first "
            "five and .gz or .zst",
            hint="convert or rename it",
        )
    return found


def _read_text(
    stream: IO[bytes],
    name: str,
    format_: Format,
    columns: Sequence[str],
    quotes: Quotes,
    *,
    every: bool,
) -> Iterator[Cells]:
    """Yield the rows of a text file; see :func:`read`."""
    text = open_text(stream, name, format_)
    if format_.name == "txt":
        for number, line in text_files.text_lines(text, name):
            if line.strip():
                yield Cells(Place(name, number, number), dict.fromkeys(columns, line))
        return
    dialect = None
    names: tuple[str, ...] = ()
    start = 0
    if dialects := format_.dialects(quotes):
        header = text_files.header(text, name, dialects, columns)
        dialect, names, start = header.dialect, header.columns, header.lines
        check_columns(f"{name}, line {start}", () if every else columns, names)
    decoded = text_files.Lines(text)
    lines = itertools.islice(decoded, start, None)
    rows = text_files.checked_rows(lines, dialect, names, decoded)
    for number, (first_line, _, cells, reason) in enumerate(rows, 1):
        place = Place(name, number, start + first_line + 1 if format_.has_lines else None)
        if reason:
            yield Cells(place, {}, text_files.bad_row(str(place), reason))
            continue
        if dialect is None and number == 1 and not every:
            check_columns(str(place), columns, cells)
        yield Cells(place, cells if dialect is None else dict(zip(names, cells, strict=True)))


class _Made(io.RawIOBase):
    """The bytes that a generator makes, as a stream that can be read from any byte on.

    To go back, it starts the generator again.
    """

    def __init__(self, start: Callable[[], Iterator[bytes]]) -> None:
        self._start = start
        self._rewind()

    def _rewind(self) -> None:
        self._chunks = self._start()
        self._left = memoryview(b"")
        self._byte = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._byte

    def readinto(self, buffer: Any) -> int:
        size = self._take(len(buffer))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size

    def _take(self, most: int) -> int:
        """Return the number of bytes that are ready, at most so many; count them as read."""
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        size = min(most, len(self._left))
        self._byte += size
        return size

    def seek(self, byte: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            byte += self._byte
        if byte < self._byte:
            self._rewind()
        while self._byte < byte and (size := self._take(byte - self._byte)):
            self._left = self._left[size:]
        return self._byte


def _made(start: Callable[[], Iterator[bytes]]) -> IO[bytes]:
    """Return the bytes that a generator makes as a buffered stream."""
    return io.BufferedReader(_Made(start), _CHUNK_BYTES)


def _gunzip(compressed: IO[bytes], name: str) -> Iterator[bytes]:
    """Yield the content of a gzip file in chunks."""
    compressed.seek(0)
    try:
        with gzip.GzipFile(fileobj=compressed) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{name} is not a readable gzip file: {error}", hint="write it again"
        ) from error


def _unzstd(compressed: IO[bytes], name: str) -> Iterator[bytes]:
    """Yield the content of a zstd file in chunks."""
    from ad2kit.tables.arrow_files import decompressed

    compressed.seek(0)
    yield from decompressed(compressed, name, "zstd")


def _is_array(stream: IO[bytes]) -> bool:
    """Tell whether JSON begins with a bracket; rewind the stream."""
    start = b""
    while not start.strip() and (line := stream.readline(_CHUNK_BYTES)):
        start = line.removeprefix(text_files.BOM)
    stream.seek(0)
    return start.lstrip().startswith(b"[")


# The marks that show where an element of an array ends; a string is one mark.
_MARK = re.compile(rb'"(?:[^"\\]|\\.)*+"|[][{},"]', re.DOTALL)


def _array_lines(stream: IO[bytes], name: str) -> Iterator[bytes]:
    r"""Yield the elements of a JSON array as lines, some at once.

    A line end inside of an element becomes ``\r``, which JSON allows in the same places: nowhere in
    a string. What stands for no element, as after a last comma, becomes a line that is no JSON.

    Raises:
        DataError: the array does not end, or something follows it.
    """
    stream.seek(0)
    buffer = stream.read(_CHUNK_BYTES)
    start = position = buffer.index(b"[") + 1
    depth = count = 0
    ended = False
    while not ended:
        lines: list[bytes] = []
        for mark in _MARK.finditer(buffer, position):
            if mark[0] == b'"':  # a string that the buffer does not hold whole
                break
            position = mark.end()
            if mark[0] in b"[{":
                depth += 1
            elif depth and mark[0] in b"]}":
                depth -= 1
            elif not depth and mark[0] in b",]":
                ended = mark[0] == b"]"
                element = buffer[start : mark.start()].strip().replace(b"\n", b"\r")
                if element or count or not ended:
                    lines.append(element or b",")
                count += 1
                start = position
                if ended:
                    break
        else:
            position = len(buffer)
        yield b"".join(line + b"\n" for line in lines)
        if not ended:
            more = stream.read(max(_CHUNK_BYTES, len(buffer) - start))
            if not more:
                raise DataError(
                    f"{name}: the array of objects does not end",
                    hint="it was cut off: write it again",
                )
            buffer, position, start = buffer[start:] + more, position - start, 0
    while rest := buffer[start:].strip() or stream.read(_CHUNK_BYTES):
        if rest.strip():
            raise DataError(
                f"{name}: found {rest[:20]!r} after the array of objects",
                hint="write one array of objects, or JSON lines: one object a line",
            )
        start = len(buffer)


def read_rows(
    path: Path,
    columns: Sequence[str] = (),
    quotes: Quotes = "doubled",
    *,
    every: bool = False,
) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """Yield the place and the cells of each row of a table, like :func:`read`.

    Raises:
        DataError: see :func:`read`; or a row is bad.
    """
    for place, cells, error in read(path, columns, quotes, every=every):
        if error is not None:
            raise error
        yield place, cells
