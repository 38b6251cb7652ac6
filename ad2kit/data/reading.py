"""All rows of a recipe, read once into Arrow: in memory, or in files if the tables are large.

    runs/.shared/tables/<key>/      the rows of one recipe's tables
        train.arrow  validation.arrow  unlabelled.arrow      their texts
        labels.npy                  the labels of train, then of validation
        rows.json                   the names of the labels, and the bad rows; written last
        fingerprints/               of splits of these rows, see ad2kit.data.mapped

The key is the fingerprint of the tables, of every setting that decides how they are read, and of
the format of the files.
"""

from __future__ import annotations

import itertools
import logging
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from ad2kit import __version__
from ad2kit.data.labels import LabelReader
from ad2kit.data.mapped import TextRows, damaged, kept, map_table, write_table
from ad2kit.data.sources import open_file, open_source, open_unlabelled
from ad2kit.run.errors import DataError, reading
from ad2kit.run.files import fingerprint, sha256_of, whole_file, write_record
from ad2kit.run.records import Record
from ad2kit.tables.rows import BadRow, BadRows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from ad2kit.data.sources import Source, SplitRows
    from ad2kit.run.sections import DataRecipe

    # Makes the table of a split, by its name, in memory or in a file.
    MakeTable = Callable[[str, pa.Schema, Iterable[pa.RecordBatch]], TextRows]

logger = logging.getLogger(__name__)

LARGE_BYTES = 2**25
"""Tables of this size or more are kept in files; smaller ones are read anew within a second."""
# The format of the files, and how rows are read: a change needs another key, and so a new number.
_FORMAT = 1
_BATCH_ROWS = 10_000
_LABELS = "labels.npy"


class KeptRows(Record):
    """What a folder of kept rows holds beside texts and labels."""

    file_name: ClassVar[str] = "rows.json"
    cure: ClassVar[str] = "delete its folder and run again"

    labels: tuple[str, ...]
    order_given: bool
    bad_rows: tuple[BadRow, ...]


class RecipeRows(NamedTuple):
    """All rows of a recipe; ``row_labels`` are the labels of ``train``, then of ``validation``."""

    train: TextRows
    validation: TextRows
    unlabelled: TextRows
    row_labels: NDArray[Any]
    facts: KeptRows


def read_recipe(recipe: DataRecipe, store: Path | None = None) -> RecipeRows:
    """Read all rows of a recipe.

    Args:
        recipe: the data section.
        store: the folder that keeps the rows of large tables, for all processes and runs.

    Raises:
        DataError: a file, column, row or label does not fit the recipe.
    """
    source = open_source(recipe)
    unlabelled = tuple(open_unlabelled(reference, recipe) for reference in recipe.unlabelled)
    tables = (source.train, source.validation, *unlabelled)
    size_bytes = sum(_size(file) for rows in tables for file in rows.files)
    is_large = size_bytes >= LARGE_BYTES or any(rows.streamed for rows in unlabelled)
    if store is None or not is_large:
        return _read(recipe, source, unlabelled, _in_memory)
    key = fingerprint(
        __version__,
        _FORMAT,
        source.labels,
        recipe.max_unlabelled_rows,
        [[rows.settings, rows.identity or _contents(rows.files)] for rows in tables],
    )
    folder = store / "tables" / key[:16]
    kept(folder, KeptRows.file_name, lambda: _keep(folder, recipe, source, unlabelled))
    train, validation, unlabelled_texts = (
        _mapped(folder, name) for name in ("train", "validation", "unlabelled")
    )
    try:
        row_labels = np.asarray(np.load(folder / _LABELS, mmap_mode="r"))
    except ValueError as error:
        raise damaged(folder / _LABELS, error) from error
    facts = KeptRows.read(folder / KeptRows.file_name)
    return RecipeRows(train, validation, unlabelled_texts, row_labels, facts)


def _contents(files: tuple[Path, ...]) -> list[tuple[str, str]]:
    """Return name and sha256 of files; a bad row is listed with the name of its file."""
    contents = []
    for file in files:
        with reading(str(file)):
            contents.append((str(file), sha256_of(file)))
    return contents


def _size(file: Path) -> int:
    with reading(str(file)):
        return file.stat().st_size


def read_labelled(
    path: Path, recipe: DataRecipe, names: tuple[str, ...]
) -> tuple[TextRows, NDArray[Any]]:
    """Read the labelled rows of one table; ``names`` are the labels that it may hold.

    Raises:
        DataError: see :func:`read_recipe`.
    """
    rows, source_labels = open_file(path, recipe, path.name)
    if recipe.task != "regression":
        recipe = recipe.model_copy(update={"labels": names})
    reader = LabelReader(recipe, source_labels)
    codes: list[NDArray[Any]] = []
    bad = BadRows(skip=recipe.bad_rows == "skip")
    texts = _in_memory("", _schema(recipe), _batches(rows, bad, reader, codes))
    return texts, reader.read(np.concatenate(codes))


def _read(
    recipe: DataRecipe, source: Source, unlabelled: tuple[SplitRows, ...], make_table: MakeTable
) -> RecipeRows:
    """Read all tables; ``make_table`` says where the texts go."""
    bad = BadRows(skip=recipe.bad_rows == "skip")
    reader = LabelReader(recipe, source.labels)
    codes: list[NDArray[Any]] = []
    schema = _schema(recipe)
    train = make_table("train", schema, _batches(source.train, bad, reader, codes))
    labels = reader.fix()
    validation = make_table("validation", schema, _batches(source.validation, bad, reader, codes))
    row_labels = reader.read(np.concatenate(codes))
    texts = _first_rows(
        itertools.chain.from_iterable(_batches(rows, bad) for rows in unlabelled),
        recipe.max_unlabelled_rows,
    )
    return RecipeRows(
        train,
        validation,
        make_table("unlabelled", schema, texts),
        row_labels,
        KeptRows(labels=labels.names, order_given=labels.given, bad_rows=tuple(bad.listed)),
    )


def _batches(
    split: SplitRows,
    bad: BadRows,
    reader: LabelReader | None = None,
    codes: list[NDArray[Any]] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Yield the texts of a split in batches; the codes of their label cells are appended."""
    texts: list[tuple[str, ...]] = []
    batch_codes: list[float] = []
    is_empty = True

    def batch() -> pa.RecordBatch:
        if reader is not None and codes is not None:
            codes.append(np.asarray(batch_codes, reader.code_type))
        columns = [pa.array(column, pa.large_string()) for column in zip(*texts, strict=True)]
        return pa.record_batch(columns, schema=_schema(split.recipe))

    for place, row_texts, cell in split.rows(bad):
        if reader is not None:
            try:
                batch_codes.append(reader.code(place, cell))
            except DataError as error:
                bad.refuse(place, error)
                continue
        texts.append(row_texts)
        is_empty = False
        if len(texts) == _BATCH_ROWS:
            yield batch()
            texts.clear()
            batch_codes.clear()
    if is_empty:
        raise DataError(
            f"no row of the {split.name} split can be read; the first one: "
            f"{bad.listed[0].reason if bad.listed else 'there is none'}",
            hint="correct the table, or the columns in the data section",
        )
    if texts:
        yield batch()


def _first_rows(batches: Iterable[pa.RecordBatch], count: int | None) -> Iterator[pa.RecordBatch]:
    """Yield so many rows, or all if ``count`` is None; no further batch is read."""
    rows = 0
    for batch in batches:
        if count is not None and rows + len(batch) >= count:
            yield batch.slice(0, count - rows)
            return
        rows += len(batch)
        yield batch


def _schema(recipe: DataRecipe) -> pa.Schema:
    """Return the columns of a table of texts; both texts of a pair may be the same column."""
    return pa.schema([(str(n), pa.large_string()) for n in range(len(recipe.text_columns))])


def _in_memory(_name: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> TextRows:
    return TextRows(pa.Table.from_batches(batches, schema))


def _in_file(
    folder: Path, name: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]
) -> TextRows:
    write_table(folder / f"{name}.arrow", schema, batches)
    return _mapped(folder, name)


def _mapped(folder: Path, name: str) -> TextRows:
    file = folder / f"{name}.arrow"
    return TextRows(map_table(file), files=(file,))


def _keep(
    folder: Path, recipe: DataRecipe, source: Source, unlabelled: tuple[SplitRows, ...]
) -> None:
    """Read all tables into the files of a folder."""
    logger.info("reading the tables; they are large, and are kept in %s", folder)
    rows = _read(recipe, source, unlabelled, partial(_in_file, folder))
    with whole_file(folder / _LABELS) as temporary, temporary.open("wb") as file:
        np.save(file, rows.row_labels)
    write_record(folder / KeptRows.file_name, rows.facts)
