"""The splits of a recipe as streams of rows: from a folder, files, the hub, or the demo's data.

Nothing is read before a split is iterated. Each iteration reads it anew, row by row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ad2kit.data import demo_reviews
from ad2kit.run.errors import DataError, reading
from ad2kit.tables import formats, hub, text_files
from ad2kit.tables.rows import BadRows, Cells, Place, Row, SourceLabels, check_columns
from ad2kit.tables.texts import is_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ad2kit.run.sections import DataRecipe

# Fixed, because the data belong to the recipe: they are the same for every training seed.
_OPINIONS_SEED = 7


@dataclass(frozen=True)
class SplitRows:
    """The rows of one split, or of texts without labels: a stream that can be read several times.

    Attributes:
        name: its name, for messages.
        recipe: the recipe, which names the columns.
        cells: starts to read the rows.
        has_labels: whether it has the label column.
        files: the files that hold it; of a data set of the hub, those in the cache of ``datasets``.
        identity: what identifies its content, if not the content of ``files``: for the hub, the
            fingerprint that ``datasets`` gives it, or its commit.
        streamed: whether each reading downloads it again.
        class_names: returns the names of the classes of a column, if the table holds them.
        labels: the names of the labels that the data set has for all of its tables.
        beside: a table in whose folder a file labels.txt may name the labels.
    """

    name: str
    recipe: DataRecipe
    cells: Callable[[], Iterator[Cells]]
    has_labels: bool = True
    files: tuple[Path, ...] = ()
    identity: str = ""
    streamed: bool = False
    class_names: Callable[[str], tuple[str, ...] | None] = lambda _column: None
    labels: SourceLabels | None = None
    beside: Path | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of the recipe that decide what is read from the content."""
        keys = {"text_columns", "label_column", "label_separator", "missing_labels", "task"}
        keys |= {"labels", "csv_quotes", "bad_rows"}
        return self.recipe.model_dump(mode="json", include=keys)

    def labels_of(self, column: str) -> SourceLabels | None:
        """Return the names that ids in any column stand for: those of the column, else of all."""
        if (names := self.class_names(column)) is not None:
            return SourceLabels(names, only_ids=True)
        labels = (self.beside and labels_beside(self.beside)) or self.labels
        # A column without names of its own may hold the ids of the label column, or names.
        return labels and labels._replace(only_ids=False)

    def rows(self, bad: BadRows) -> Iterator[Row]:
        """Yield the rows whose texts are texts; ``bad`` gets all others.

        Raises:
            DataError: a file is missing, malformed, or lacks a column; or there is no row at all.
        """
        columns = self.recipe.text_columns
        label_columns = self.recipe.label_columns if self.has_labels else ()
        is_empty = True
        for place, cells, error in self.cells():
            is_empty = False
            if error is not None:
                bad.refuse(place, error)
                continue
            texts: tuple[Any, ...] = tuple([cells.get(column) for column in columns])
            if all(map(is_text, texts)):
                labels = [cells.get(column) for column in label_columns]
                yield Row(place, texts, labels if len(labels) > 1 else next(iter(labels), None))
            else:
                bad.refuse(place, _no_text(place, columns, texts))
        if is_empty:
            raise DataError(f"the {self.name} split is empty", hint="give a file that holds rows")


class Source(NamedTuple):
    """The splits of a recipe, and the names of the labels if the source has them."""

    train: SplitRows
    validation: SplitRows
    labels: SourceLabels | None


def _no_text(place: Place, columns: Sequence[str], texts: Sequence[Any]) -> DataError:
    """Return the error for a row with a cell that is no text."""
    column, text = next(
        (column, text) for column, text in zip(columns, texts, strict=True) if not is_text(text)
    )
    return DataError(
        f"{place}: '{column}' must be a text with at least one visible character, "
        f"found {text!r:.80}",
        hint="remove or correct the row, or leave such rows out: data.bad_rows=skip",
    )


def open_source(recipe: DataRecipe) -> Source:
    """Find the splits of a recipe; nothing but what names the labels is read.

    Raises:
        DataError: the source is unknown, a file is missing, or the hub cannot be reached.
        MissingExtra: the package that reads the source is not installed.
    """
    train, validation, labels = _open_source(recipe)
    return Source(replace(train, labels=labels), replace(validation, labels=labels), labels)


def _open_source(recipe: DataRecipe) -> Source:
    if recipe.source is None:
        return _from_files(recipe, Path(recipe.train or ""), Path(recipe.validation or ""))
    names = (recipe.train or "train", recipe.validation or "validation")
    scheme, separator, address = recipe.source.partition("://")
    if not separator:
        return _from_folder(recipe, Path(recipe.source).expanduser(), names)
    if scheme == "embedded" and address == "opinions":
        opinions = demo_reviews.opinions(seed=_OPINIONS_SEED)
        train = _embedded(opinions.train, recipe, "train")
        validation = _embedded(opinions.validation, recipe, "validation")
        return Source(train, validation, SourceLabels(demo_reviews.LABELS, only_ids=False))
    if scheme == "hub":
        loaded = hub.load(recipe.source, key="data.source")
        train, validation = (
            _hub_split(loaded, address, name, recipe, "data.source") for name in names
        )
        columns = recipe.label_columns
        return Source(train, validation, train.labels_of(columns[0]) if len(columns) == 1 else None)
    raise DataError(
        "data.source: expected a folder, hub://owner/name[/config][@revision] or "
        f"embedded://opinions, found '{recipe.source}'",
        hint="correct data.source",
    )


def open_file(path: Path, recipe: DataRecipe, name: str) -> tuple[SplitRows, SourceLabels | None]:
    """Find the labelled rows of one table, and the names of its labels if it has them.

    ``name`` is the name of the split, for messages.

    Raises:
        DataError: see :func:`open_source`.
    """
    columns = (*recipe.text_columns, *recipe.label_columns)
    cells = partial(formats.read, path, columns, recipe.csv_quotes)
    files = formats.files_of(path)
    rows = SplitRows(name, recipe, cells, files=files, class_names=_class_names_of(path))
    columns = recipe.label_columns
    return rows, rows.labels_of(columns[0]) if len(columns) == 1 else None


def open_unlabelled(reference: str, recipe: DataRecipe, key: str = "data.unlabelled") -> SplitRows:
    """Find one table whose labels are not read, or ``hub://owner/name[/config]#split``.

    ``key`` is the key of the recipe that names it, for messages.

    Raises:
        DataError: see :func:`open_source`.
    """
    columns = recipe.text_columns
    if reference.startswith("hub://"):
        address, _, split = reference.removeprefix("hub://").partition("#")
        if recipe.max_unlabelled_rows is not None:
            return _hub_stream(reference, split or "train", recipe, key)
        loaded = hub.load(reference, key=key)
        return _hub_split(loaded, address, split or "train", recipe, key)
    path = Path(reference).expanduser()
    cells = partial(formats.read, path, columns, recipe.csv_quotes)
    return SplitRows(
        reference,
        recipe,
        cells,
        has_labels=False,
        files=formats.files_of(path),
        class_names=_class_names_of(path),
        beside=path,
    )


def _class_names_of(path: Path) -> Callable[[str], tuple[str, ...] | None]:
    return lambda column: formats.class_names(path, (column,))


def labels_beside(path: Path) -> SourceLabels | None:
    """Return the labels that the file labels.txt in the folder of a table names; None without it.

    Raises:
        DataError: its lines are not ids and names.
    """
    label_file = path.parent / "labels.txt"
    if not label_file.is_file():
        return None
    with reading(str(label_file)), label_file.open("rb") as stream:
        lines = [line for _, line in text_files.text_lines(stream, str(label_file))]
    pairs = [line.split("\t") for line in lines if line]
    ids = [pair[0] for pair in pairs]
    expected_ids = [str(number) for number in range(len(pairs))]
    if ids != expected_ids or not all(len(pair) == 2 for pair in pairs):
        raise DataError(
            f"{label_file}: expected lines 'id<TAB>name' with ids 0, 1, ... in order",
            hint=f"correct {label_file}, or move it away",
        )
    return SourceLabels(tuple(name for _, name in pairs), only_ids=False)


def _embedded(pairs: Sequence[tuple[str, int]], recipe: DataRecipe, name: str) -> SplitRows:
    """Return (text, label) pairs of the embedded corpus as rows with the columns of the recipe."""
    # Without a label column the labels stay unread.
    columns = (recipe.text_columns[0], next(iter(recipe.label_columns), ""))

    def cells() -> Iterator[Cells]:
        for number, pair in enumerate(pairs, 1):
            yield Cells(Place(f"embedded {name}", number), dict(zip(columns, pair, strict=True)))

    return SplitRows(name, recipe, cells, identity=f"embedded opinions {_OPINIONS_SEED} {name}")


def _from_folder(recipe: DataRecipe, folder: Path, names: tuple[str, str]) -> Source:
    """Find both splits of a folder, and its labels.txt if it has one."""
    if not folder.is_dir():
        raise DataError(
            f"data.source: no folder '{folder}'",
            hint="name a folder with train and validation files, "
            "or write hub://owner/name for a data set on the hub",
        )
    train_name, validation_name = names
    train = formats.split_of(folder, train_name, "train")
    validation = formats.split_of(folder, validation_name, "validation")
    source = _from_files(recipe, train, validation)
    beside = labels_beside(train)
    if source.labels and beside and source.labels.names != beside.names:
        label_file = folder / "labels.txt"
        raise DataError(
            f"{label_file} names other labels than the column '{recipe.label_columns[0]}' of "
            f"{train}: {', '.join(beside.names)}; {', '.join(source.labels.names)}",
            hint=f"delete {label_file}, or write the same names into it",
        )
    return source._replace(labels=source.labels or beside)


def _from_files(recipe: DataRecipe, train: Path, validation: Path) -> Source:
    """Find the rows of two tables; if their schemas name classes, these must be the same."""
    train_rows, labels = open_file(train, recipe, "train")
    validation_rows, others = open_file(validation, recipe, "validation")
    if labels and others and labels != others:
        raise DataError(
            f"the column '{recipe.label_columns[0]}' has other classes in {train} than in "
            f"{validation}: {', '.join(labels.names)}; {', '.join(others.names)}",
            hint="write both tables with one ClassLabel feature, or with names in their cells",
        )
    if labels is None or others is None:
        # The cells of the other table may be ids or names.
        found = labels or others
        labels = found and found._replace(only_ids=False)
    return Source(train_rows, validation_rows, labels)


def _hub_split(loaded: Any, address: str, name: str, recipe: DataRecipe, key: str) -> SplitRows:
    """Return the rows of one split of a loaded data set; those of ``data.source`` have labels."""
    has_labels = key == "data.source"
    if name not in loaded:
        at_end = f"write the split at the end of its address in {key}: #{next(iter(loaded))}"
        raise DataError(
            f"hub data set '{address}' has no split '{name}', only {', '.join(loaded)}",
            hint="name its splits with data.train and data.validation" if has_labels else at_end,
        )
    columns = [*recipe.text_columns, *(recipe.label_columns if has_labels else ())]

    def cells() -> Iterator[Cells]:
        from ad2kit.tables import arrow_files

        check_columns(f"{address} {name}", columns, loaded[name].column_names)
        split = loaded[name].select_columns(list(dict.fromkeys(columns))).with_format("arrow")
        parts = split.iter(batch_size=arrow_files.BATCH_ROWS)
        yield from arrow_files.rows(parts, f"{address} {name}")

    def class_names(column: str) -> tuple[str, ...] | None:
        from ad2kit.tables import arrow_files

        return arrow_files.class_names(loaded[name].features.arrow_schema, column)

    files = tuple(Path(file["filename"]) for file in loaded[name].cache_files)
    identity = loaded[name]._fingerprint  # noqa: SLF001
    return SplitRows(
        name, recipe, cells, has_labels, files, identity=identity, class_names=class_names
    )


def _hub_stream(reference: str, split: str, recipe: DataRecipe, key: str) -> SplitRows:
    """Return the texts of one split of a data set that is read as a stream."""
    most = recipe.max_unlabelled_rows or 0
    identity, batches, schema = hub.stream(reference, split, recipe.text_columns, most, key=key)

    def cells() -> Iterator[Cells]:
        from ad2kit.tables import arrow_files

        yield from arrow_files.rows(batches(), reference)

    def class_names(column: str) -> tuple[str, ...] | None:
        from ad2kit.tables import arrow_files

        found = schema()
        return None if found is None else arrow_files.class_names(found, column)

    return SplitRows(
        reference,
        recipe,
        cells,
        has_labels=False,
        identity=identity,
        streamed=True,
        class_names=class_names,
    )
