"""Blocks of rows, the units of bulk scoring; tables may be at any fsspec address.

A block depends on the files and the number of rows per block only. So the number of a block means
the same rows in every process, also after a restart. ``text_blocks`` and ``arrow_blocks`` survey,
read and write one family of formats each, with the same three functions.
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from ad2kit.run.errors import DataError, MissingExtra, nearest, reading
from ad2kit.scoring.records import InputFile
from ad2kit.tables.formats import FORMATS, SAVED, check_shards, format_of, saved_files
from ad2kit.tables.rows import BadRow

try:
    import fsspec
except ModuleNotFoundError as error:
    raise MissingExtra("fsspec", extra="scale") from error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ad2kit.tables.text_files import Dialect


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of one file; ``first_row`` counts from 1.

    In a text file they take the bytes from ``first_byte`` to ``end_byte``, and ``lines_before`` is
    the number of lines before them.
    """

    url: str
    first_row: int
    rows: int
    first_byte: int = 0
    end_byte: int = 0
    lines_before: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of a job: those of the files, those to read, and those to add.

    ``dialect`` is that of CSV and TSV.
    """

    columns: tuple[str, ...]
    text_columns: tuple[str, ...]
    added: tuple[str, ...]
    dialect: Dialect | None = None


@dataclass(frozen=True, slots=True)
class Survey:
    """The columns and the blocks of one file; JSON lines have the columns of their first row.

    ``texts`` holds the columns that can hold texts. Two files can be scored together only if they
    have the same ``kind``.
    """

    columns: tuple[str, ...]
    texts: tuple[str, ...]
    kind: str
    blocks: list[Block]
    dialect: Dialect | None = None


@dataclass(slots=True)
class Rows:
    """The rows of a block: their ``texts``, their ``places``, and the ``bad`` rows.

    A place is the number of the row and, in a text file, its line. The texts are not checked yet:
    they may be any value of a file. ``kept`` belongs to the module that read the block, and holds
    the rows for writing.
    """

    block: Block
    kept: Any
    texts: list[tuple[Any, ...]] = field(default_factory=list)
    places: list[tuple[int, int | None]] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)

    def refuse(self, place: tuple[int, int | None], reason: str) -> None:
        """Add a bad row, which gets no answer."""
        row, line = place
        self.bad.append(BadRow(file=self.block.url, row=row, line=line, reason=reason))


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of an address, and the path in it.

    Raises:
        DataError: the kind of address is unknown, or its driver is not installed.
    """
    try:
        store, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise DataError(
            f"cannot use the address '{url}': {error}",
            hint="give a path, file://..., or an address whose fsspec driver is installed",
        ) from error
    return store, path


def address_of(store: Any, path: str) -> str:
    """Return the address of a path: a plain path on this machine, else with its protocol."""
    return path if is_local(store) else str(store.unstrip_protocol(path))


def is_local(store: Any) -> bool:
    """Tell whether a file system is this machine's own."""
    return "file" in store.protocol


def find_inputs(reference: str) -> tuple[InputFile, ...]:
    """Return the files of a path, folder or glob, sorted by name; all have one format.

    In a folder, names that begin with ``_`` or ``.`` are ignored, as in other readers of tables.

    Raises:
        DataError: there are no files, or they have several formats or an unknown one, or one of
            several that are numbered is missing.
    """
    store, path = filesystem(reference)
    try:
        names = sorted(_file_names(store, path))
        for name in names:
            if is_local(store) and store.islink(name) and not store.exists(name):
                raise DataError(f"{name} is a link to nothing", hint="remove it, or mend it")
    except OSError as error:
        raise DataError(
            f"cannot look for '{reference}': {error}", hint="correct INPUT, or its access rights"
        ) from error
    if not names:
        raise DataError(
            f"no file '{reference}'",
            hint="give a file, a folder, a quoted glob such as 'data/*.parquet', or a URL",
        )
    formats = {name: format_of(name) for name in reversed(names)}
    of_parts = {found.of_parts: name for name, found in formats.items() if found is not None}
    if None in formats.values() or len(of_parts) > 1 or "txt" in of_parts:
        examples = ", ".join(PurePosixPath(name).name for name in names)
        raise DataError(
            f"{reference}: expected files of one format among {', '.join(FORMATS)}, "
            f"found {examples:.200}",
            hint="score the formats one after the other, by a glob such as 'data/*.csv'",
        )
    if names != [path]:
        check_shards(reference, names)
    with reading(reference):
        return tuple(_describe(store, name) for name in names)


def layout_of(
    surveys: Mapping[str, Survey],
    text_columns: tuple[str, ...],
    added: tuple[str, ...],
    naming: str = "--text-columns a, or a,b for a pair",
) -> Layout:
    """Return the common layout of the files with rows.

    Args:
        surveys: the survey of each file, by its address.
        text_columns: the columns to read.
        added: the columns to add.
        naming: how the command names the columns to read, for hints.

    Raises:
        DataError: there are no rows; a column is missing or would occur twice; the files differ.
    """
    surveys_with_rows = {url: survey for url, survey in surveys.items() if survey.blocks}
    if not surveys_with_rows:
        raise DataError(f"no rows in {', '.join(surveys)}", hint="give files that hold rows")
    first_url, first = next(iter(surveys_with_rows.items()))
    for url, survey in surveys_with_rows.items():
        if survey.kind != first.kind:
            raise DataError(
                f"{url} has other columns than {first_url}: expected {first.kind}, "
                f"found {survey.kind}",
                hint="score them one after the other, each into a folder of its own",
            )
        for column in text_columns:
            if column not in survey.columns:
                raise DataError(
                    f"{url}: no column '{column}'{nearest(column, survey.columns)}; "
                    f"columns: {', '.join(survey.columns)}",
                    hint=f"name the columns to read: {naming}",
                )
            if column not in survey.texts:
                raise DataError(
                    f"{url}: expected texts in the column '{column}', found {survey.kind}",
                    hint=f"name the columns to read: {naming}",
                )
        for column in added:
            if column in survey.columns:
                raise DataError(
                    f"{url} has a column '{column}' already, which is what the answers go into",
                    hint="name the columns of the answers otherwise, such as --prefix student_",
                )
    return Layout(first.columns, text_columns, added, first.dialect)


def check_partition_columns(reference: str, surveys: Mapping[str, Survey]) -> None:
    """Refuse files below folders such as ``dt=2026-01-01``, whose column would be lost.

    Raises:
        DataError: the name of a folder below ``reference`` holds a column that the file lacks.
    """
    store, root = filesystem(reference)
    if not store.exists(root) and glob.has_magic(root):
        root = re.split(r"[*?[]", root)[0].rpartition("/")[0]
    for url, survey in surveys.items():
        if not survey.blocks:
            continue
        inside = PurePosixPath(filesystem(url)[1].removeprefix(root).lstrip("/"))
        for folder in inside.parents[:-1]:
            column, equals, _ = folder.name.partition("=")
            if equals and column not in survey.columns:
                first = address_of(store, f"{root.rstrip('/')}/{inside.parent}")
                raise DataError(
                    f"{url} lies in a folder {folder.name}, and has no column '{column}', which "
                    "would be lost",
                    hint="score folder by folder, into folders of the same names: "
                    f"`ad2kit score {first} OUTPUT/{inside.parent}`",
                )


def _file_names(store: Any, path: str) -> list[str]:
    if store.isdir(path):
        folder = path.rstrip("/") + "/"
        if store.exists(folder + SAVED):
            return [folder + name for name in saved_files(store.cat_file(folder + SAVED), path)]
        relative_names = {name: name.removeprefix(folder) for name in store.find(path)}
        return [
            name
            for name, relative_name in relative_names.items()
            if not any(part.startswith(("_", ".")) for part in relative_name.split("/"))
        ]
    if store.exists(path):
        return [path]
    if glob.has_magic(path):
        return [name for name in store.glob(path) if not store.isdir(name)]
    return []


def _describe(store: Any, name: str) -> InputFile:
    info = store.info(name)
    tags = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "created")
    versions = [str(info[tag]) for tag in tags if info.get(tag) is not None]
    return InputFile(
        url=address_of(store, name),
        size_bytes=info["size"],
        version=versions[0] if versions else "",
    )
