"""Labelled rows from a folder, single files, the hub, or the embedded corpus; not yet checked.

A row is ``(where, columns)``: ``where`` names the file and line for error messages.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ad2kit.data import demo_reviews, text_files
from ad2kit.run.errors import DataError, MissingExtra
from ad2kit.run.machine import hub_or_its_cache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ad2kit.run.sections import DataRecipe

# The data are part of the recipe: the same for every seed of the training.
_OPINIONS_SEED = 7

FORMATS = ("tsv", "csv", "jsonl", "parquet")

Row = tuple[str, dict[str, Any]]
Rows = tuple[list[Row], list[Row], tuple[str, ...] | None]
"""Training rows, validation rows, and the label names if the source has them."""


def read_rows(recipe: DataRecipe) -> Rows:
    """Read both splits of a recipe.

    Raises:
        DataError: a file is missing, not UTF-8 or malformed, or the hub cannot be reached.
    """
    columns = (*recipe.text_columns, recipe.label_column)
    if recipe.source is None:
        paths = Path(recipe.train or ""), Path(recipe.validation or "")
        return read_file(paths[0], columns), read_file(paths[1], columns), None
    names = (recipe.train or "train", recipe.validation or "validation")
    scheme, separator, rest = recipe.source.partition("://")
    if not separator:
        return _read_folder(Path(recipe.source), names, columns)
    if scheme == "embedded" and rest == "opinions":
        opinions = demo_reviews.opinions(seed=_OPINIONS_SEED)

        def rows(pairs: Sequence[tuple[str, int]], name: str) -> list[Row]:
            named = (recipe.text_columns[0], recipe.label_column)
            return [
                (f"embedded {name} row {number}", dict(zip(named, pair, strict=True)))
                for number, pair in enumerate(pairs, 1)
            ]

        train, validation = rows(opinions.train, "train"), rows(opinions.validation, "validation")
        return train, validation, demo_reviews.LABELS
    if scheme == "hub":
        hub = _load_hub(rest)
        train, validation = (_hub_split(hub, rest, name) for name in names)
        return train, validation, _hub_label_names(hub[names[0]], recipe.label_column)
    raise DataError(
        f"data.source: expected a folder, hub://owner/name[/config] or embedded://opinions, "
        f"found '{recipe.source}'",
        hint="correct data.source",
    )


def read_unlabelled(reference: str, text_columns: tuple[str, ...]) -> list[Row]:
    """Read one entry of ``data.unlabelled``: a file, or ``hub://owner/name[/config]#split``.

    Raises:
        DataError: as :func:`read_rows`; or a .txt file where the task reads two columns.
    """
    if reference.startswith("hub://"):
        rest, _, split = reference.removeprefix("hub://").partition("#")
        return _hub_split(_load_hub(rest), rest, split or "train")
    path = Path(reference)
    if path.suffix == ".txt" and path.is_file():
        if len(text_columns) != 1:
            raise DataError(
                f"{path}: a .txt file holds one text a line, but this task reads "
                f"{', '.join(text_columns)}",
                hint="give a tsv, csv, jsonl or parquet file with these columns",
            )
        return [
            (f"{path}, line {number}", {text_columns[0]: line})
            for number, line in _lines(path)
            if line.strip()
        ]
    return read_file(path, text_columns)


def _read_folder(folder: Path, names: tuple[str, str], columns: tuple[str, ...]) -> Rows:
    if not folder.is_dir():
        raise DataError(
            f"data.source: no folder '{folder}'",
            hint="name a folder with train and validation files, "
            "or write hub://owner/name for a data set on the hub",
        )

    def split_file(stem: str, key: str) -> Path:
        found = [folder / f"{stem}.{suffix}" for suffix in FORMATS]
        found = [path for path in found if path.is_file() or path.is_symlink()]
        if len(found) != 1:
            raise DataError(
                f"expected exactly one {stem}.({'|'.join(FORMATS)}) in {folder}, "
                f"found {', '.join(path.name for path in found) or 'none'}",
                hint=_cure(folder, stem)
                or f"rename a file, or give its name without the ending (data.{key}=held-out), or "
                "name both files: data.source=null data.train=FILE data.validation=FILE",
            )
        return found[0]

    train, validation = (
        read_file(split_file(name, key), columns)
        for name, key in zip(names, ("train", "validation"), strict=True)
    )
    label_file = folder / "labels.txt"
    if not label_file.is_file():
        return train, validation, None
    pairs = [line.split("\t") for _, line in _lines(label_file) if line]
    if [pair[0] for pair in pairs] != [str(i) for i in range(len(pairs))] or not all(
        len(pair) == 2 for pair in pairs
    ):
        raise DataError(
            f"{label_file}: expected lines 'id<TAB>name' with ids 0, 1, ... in order",
            hint="correct the file, or give data.labels",
        )
    return train, validation, tuple(name for _, name in pairs)


def _cure(folder: Path, stem: str) -> str | None:
    """Return what makes one file of what other systems leave for a split, if that is seen."""
    if (folder / "dataset_dict.json").is_file():
        return (
            "datasets.save_to_disk() wrote this folder: "
            f"datasets.load_from_disk({str(folder)!r})[{stem!r}]"
            f".to_parquet({f'NEW/{stem}.parquet'!r}) writes what ad2kit reads, for each split"
        )
    folders = [path for path in (folder / f"{stem}.parquet", folder / stem) if path.is_dir()]
    parts: Path | list[str] | None = next((path for path in folders if _parquet(path)), None)
    if parts is None:
        parts = [str(path) for path in _parquet(folder) if path.name.startswith(f"{stem}-")]
    if not parts:
        return None
    return (
        f"the split lies in several files: pyarrow.parquet.write_table(pyarrow.parquet.read_table("
        f"{parts if isinstance(parts, list) else str(parts)!r}), {f'NEW/{stem}.parquet'!r}) makes "
        "one of them"
    )


def _parquet(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def _lines(path: Path) -> list[tuple[int, str]]:
    with path.open("rb") as stream:
        return list(text_files.text_lines(stream, str(path)))


def read_file(path: Path, columns: tuple[str, ...]) -> list[Row]:
    """Read the rows of one file, in the format that its name ends in.

    Args:
        path: of a CSV, TSV, JSON-lines or Parquet file.
        columns: those that are wanted; text files give the others too.

    Raises:
        DataError: the file is missing, not UTF-8 or malformed, or of another format.
    """
    if path.suffix.lstrip(".") not in FORMATS:
        raise DataError(
            f"{path}: expected a file that ends in {', '.join(FORMATS)}",
            hint="convert or rename it",
        )
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path} is a link to nothing", hint="put back what it links to")
    if not path.is_file():
        raise DataError(f"no file '{path}'", hint="correct the path in the data section")
    if path.suffix != ".parquet":
        return _read_text(path)
    from ad2kit.data import parquet_files

    rows = parquet_files.read_columns(path, columns)
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]


def _read_text(path: Path) -> list[Row]:
    """Read a CSV, TSV or JSON-lines file, or refuse it for the first row that is wrong."""
    suffix, columns, start = path.suffix[1:], tuple[str, ...](), 0
    text, is_utf8 = text_files.decode(path.read_bytes().removeprefix(text_files.BOM))
    lines = text_files.split_lines(text)
    if suffix != "jsonl":
        columns, start = text_files.header(lines, str(path), suffix)
    found = []
    every = text_files.checked_rows(lines[start:], suffix, columns, is_utf8=is_utf8)
    for first, end, cells, error in every:
        where = f"{path}, line {start + first + 1}"
        if error:
            raise text_files.bad_row(where, error, "".join(lines[start + first : start + end]))
        found.append(
            (where, cells if suffix == "jsonl" else dict(zip(columns, cells, strict=True)))
        )
    return found


def _load_hub(rest: str) -> Any:
    try:
        from datasets import exceptions, load_dataset
    except ModuleNotFoundError as error:
        raise MissingExtra("datasets", extra="cpu") from error

    hub_or_its_cache()
    owner, _, config = rest.rpartition("/") if rest.count("/") == 2 else (rest, "", "")
    try:
        return load_dataset(owner, config or None)
    except (exceptions.DatasetsError, OSError, ValueError) as error:
        # What is found and cannot be built, such as splits of other sizes than their card says.
        built = isinstance(error, exceptions.DatasetsError) and not isinstance(error, OSError)
        raise DataError(
            f"cannot load the data set '{rest}' from the hub: {type(error).__name__}: {error}",
            hint="its files and its own card differ, or it changed while it was loaded: download "
            "its files and give data.source=FOLDER"
            if built
            else "without a network, put train.tsv and validation.tsv into a folder and give "
            "data.source=FOLDER",
        ) from error


def _hub_split(hub: Any, rest: str, name: str) -> list[Row]:
    if name not in hub:
        raise DataError(
            f"hub data set '{rest}' has no split '{name}', only {', '.join(hub)}",
            hint="name its splits with data.train and data.validation",
        )
    return [(f"{rest} {name} row {number}", row) for number, row in enumerate(hub[name], 1)]


def _hub_label_names(split: Any, column: str) -> tuple[str, ...] | None:
    """Return the names of a class column, or of a column of lists of classes."""
    feature = split.features.get(column)
    feature = getattr(feature, "feature", feature)
    return tuple(feature.names) if hasattr(feature, "names") else None
