"""Labelled rows from a folder, single files, the hub, or the embedded corpus, still unchecked.

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

# Fixed, because the data belong to the recipe: they are the same for every training seed.
_OPINIONS_SEED = 7

FORMATS = ("tsv", "csv", "jsonl", "parquet")

Row = tuple[str, dict[str, Any]]
Rows = tuple[list[Row], list[Row], tuple[str, ...] | None]
"""Training rows, validation rows, and the label names if the source has them."""


def read_rows(recipe: DataRecipe) -> Rows:
    """Read both splits of a recipe.

    Raises:
        DataError: the source is unknown, a file is missing, not UTF-8 or malformed, or the hub
            cannot be reached.
        MissingExtra: the package that reads the source is not installed.
    """
    columns = (*recipe.text_columns, recipe.label_column)
    if recipe.source is None:
        train = read_file(Path(recipe.train or ""), columns)
        validation = read_file(Path(recipe.validation or ""), columns)
        return train, validation, None
    names = (recipe.train or "train", recipe.validation or "validation")
    scheme, separator, address = recipe.source.partition("://")
    if not separator:
        return _read_folder(Path(recipe.source), names, columns)
    if scheme == "embedded" and address == "opinions":
        opinions = demo_reviews.opinions(seed=_OPINIONS_SEED)
        train = _embedded_rows(opinions.train, recipe, "train")
        validation = _embedded_rows(opinions.validation, recipe, "validation")
        return train, validation, demo_reviews.LABELS
    if scheme == "hub":
        hub = _load_hub(address)
        train, validation = (_hub_split(hub, address, name) for name in names)
        return train, validation, _hub_label_names(hub[names[0]], recipe.label_column)
    raise DataError(
        f"data.source: expected a folder, hub://owner/name[/config] or embedded://opinions, "
        f"found '{recipe.source}'",
        hint="correct data.source",
    )


def _embedded_rows(pairs: Sequence[tuple[str, int]], recipe: DataRecipe, name: str) -> list[Row]:
    """Return (text, label) pairs of the embedded corpus as rows with the columns of the recipe."""
    columns = (recipe.text_columns[0], recipe.label_column)
    return [
        (f"embedded {name} row {number}", dict(zip(columns, pair, strict=True)))
        for number, pair in enumerate(pairs, 1)
    ]


def read_unlabelled(reference: str, text_columns: tuple[str, ...]) -> list[Row]:
    """Read one entry of ``data.unlabelled``: a file, or ``hub://owner/name[/config]#split``.

    Raises:
        DataError: see :func:`read_rows`; or it is a .txt file, and the task reads two columns.
    """
    if reference.startswith("hub://"):
        address, _, split = reference.removeprefix("hub://").partition("#")
        return _hub_split(_load_hub(address), address, split or "train")
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
    """Read both splits of a folder, and its labels.txt if it has one."""
    if not folder.is_dir():
        raise DataError(
            f"data.source: no folder '{folder}'",
            hint="name a folder with train and validation files, "
            "or write hub://owner/name for a data set on the hub",
        )

    train_name, validation_name = names
    train = read_file(_split_file(folder, train_name, "train"), columns)
    validation = read_file(_split_file(folder, validation_name, "validation"), columns)
    label_file = folder / "labels.txt"
    if not label_file.is_file():
        return train, validation, None
    pairs = [line.split("\t") for _, line in _lines(label_file) if line]
    ids = [pair[0] for pair in pairs]
    expected_ids = [str(number) for number in range(len(pairs))]
    if ids != expected_ids or not all(len(pair) == 2 for pair in pairs):
        raise DataError(
            f"{label_file}: expected lines 'id<TAB>name' with ids 0, 1, ... in order",
            hint="correct the file, or give data.labels",
        )
    return train, validation, tuple(name for _, name in pairs)


def _split_file(folder: Path, stem: str, key: str) -> Path:
    """Return the one file of a split in a folder; ``key`` is its key in the data section."""
    candidates = [folder / f"{stem}.{suffix}" for suffix in FORMATS]
    files = [path for path in candidates if path.is_file() or path.is_symlink()]
    if len(files) != 1:
        raise DataError(
            f"expected exactly one {stem}.({'|'.join(FORMATS)}) in {folder}, "
            f"found {', '.join(path.name for path in files) or 'none'}",
            hint=_conversion_hint(folder, stem)
            or f"rename a file, or give its name without the ending (data.{key}=held-out), or "
            "name both files: data.source=null data.train=FILE data.validation=FILE",
        )
    return files[0]


def _conversion_hint(folder: Path, stem: str) -> str | None:
    """Return a hint that makes one file of a split that another system wrote; None if unknown."""
    if (folder / "dataset_dict.json").is_file():
        return (
            "datasets.save_to_disk() wrote this folder: "
            f"datasets.load_from_disk({str(folder)!r})[{stem!r}]"
            f".to_parquet({f'NEW/{stem}.parquet'!r}) writes what ad2kit reads, for each split"
        )
    folders = [path for path in (folder / f"{stem}.parquet", folder / stem) if path.is_dir()]
    parts: str | list[str] | None = next((str(path) for path in folders if _parquet(path)), None)
    if parts is None:
        parts = [str(path) for path in _parquet(folder) if path.name.startswith(f"{stem}-")]
    if not parts:
        return None
    return (
        f"the split lies in several files: pyarrow.parquet.write_table(pyarrow.parquet.read_table("
        f"{parts!r}), {f'NEW/{stem}.parquet'!r}) makes one of them"
    )


def _parquet(folder: Path) -> list[Path]:
    """Return the Parquet files directly in a folder, sorted."""
    return sorted(folder.glob("*.parquet"))


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return number and text of each line of a UTF-8 file."""
    with path.open("rb") as stream:
        return list(text_files.text_lines(stream, str(path)))


def read_file(path: Path, columns: tuple[str, ...]) -> list[Row]:
    """Read the rows of one file; the ending of its name gives the format.

    Args:
        path: path of a CSV, TSV, JSON-lines or Parquet file.
        columns: the columns to read; text files also return all other columns.

    Raises:
        DataError: the file is missing, not UTF-8, malformed, or of another format.
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
    """Read a CSV, TSV or JSON-lines file, or refuse it for the first wrong row."""
    suffix = path.suffix[1:]
    text, is_utf8 = text_files.decode(path.read_bytes().removeprefix(text_files.BOM))
    lines = text_files.split_lines(text)
    columns: tuple[str, ...] = ()
    start = 0
    if suffix != "jsonl":
        columns, start = text_files.header(lines, str(path), suffix)
    rows: list[Row] = []
    frames = text_files.checked_rows(lines[start:], suffix, columns, is_utf8=is_utf8)
    for first_line, end_line, cells, error in frames:
        where = f"{path}, line {start + first_line + 1}"
        if error:
            raw = "".join(lines[start + first_line : start + end_line])
            raise text_files.bad_row(where, error, raw)
        row = cells if suffix == "jsonl" else dict(zip(columns, cells, strict=True))
        rows.append((where, row))
    return rows


def _load_hub(address: str) -> Any:
    """Load the data set ``owner/name[/config]`` from the hub, or from the hub's cache."""
    try:
        from datasets import exceptions, load_dataset
    except ModuleNotFoundError as error:
        raise MissingExtra("datasets", extra="cpu") from error

    hub_or_its_cache()
    name = address
    config = ""
    if address.count("/") == 2:
        name, _, config = address.rpartition("/")
    try:
        return load_dataset(name, config or None)
    except (exceptions.DatasetsError, OSError, ValueError) as error:
        hint = (
            "without a network, put train.tsv and validation.tsv into a folder and give "
            "data.source=FOLDER"
        )
        # The data set was found but not built: its splits have other sizes than its card says.
        if isinstance(error, exceptions.DatasetsError) and not isinstance(error, OSError):
            hint = (
                "its files and its own card differ, or it changed while it was loaded: download "
                "its files and give data.source=FOLDER"
            )
        raise DataError(
            f"cannot load the data set '{address}' from the hub: {type(error).__name__}: {error}",
            hint=hint,
        ) from error


def _hub_split(hub: Any, address: str, name: str) -> list[Row]:
    """Return the rows of one split of a loaded data set."""
    if name not in hub:
        raise DataError(
            f"hub data set '{address}' has no split '{name}', only {', '.join(hub)}",
            hint="name its splits with data.train and data.validation",
        )
    return [(f"{address} {name} row {number}", row) for number, row in enumerate(hub[name], 1)]


def _hub_label_names(split: Any, column: str) -> tuple[str, ...] | None:
    """Return the class names of a column of classes, or of lists of classes; else None."""
    feature = split.features.get(column)
    feature = getattr(feature, "feature", feature)
    return tuple(feature.names) if hasattr(feature, "names") else None
