"""Labelled rows from a folder, single files, the hub, or the embedded corpus; not yet checked.

A row is ``(where, columns)``: ``where`` names the file and line for error messages.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ad2kit import corpus
from ad2kit.errors import DataError, MissingExtra
from ad2kit.runtime import hub_or_its_cache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ad2kit.sections import DataRecipe

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
    if recipe.source is None:
        return read_file(Path(recipe.train or "")), read_file(Path(recipe.validation or "")), None
    names = (recipe.train or "train", recipe.validation or "validation")
    scheme, separator, rest = recipe.source.partition("://")
    if not separator:
        return _read_folder(Path(recipe.source), names)
    if scheme == "embedded" and rest == "opinions":
        opinions = corpus.opinions(seed=_OPINIONS_SEED)

        def rows(pairs: Sequence[tuple[str, int]], name: str) -> list[Row]:
            columns = (recipe.text_columns[0], recipe.label_column)
            return [
                (f"embedded {name} row {number}", dict(zip(columns, pair, strict=True)))
                for number, pair in enumerate(pairs, 1)
            ]

        return (
            rows(opinions.train, "train"), rows(opinions.validation, "validation"), corpus.LABELS,
        )  # fmt: skip
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
        lines = enumerate(_text(path).split("\n"), 1)
        return [(f"{path}, line {n}", {text_columns[0]: line}) for n, line in lines if line.strip()]
    return read_file(path)


def _read_folder(folder: Path, names: tuple[str, str]) -> Rows:
    if not folder.is_dir():
        raise DataError(
            f"data.source: no folder '{folder}'",
            hint="name a folder with train and validation files, "
            "or write hub://owner/name for a data set on the hub",
        )

    def split_file(stem: str) -> Path:
        found = [folder / f"{stem}.{suffix}" for suffix in FORMATS]
        found = [path for path in found if path.is_file()]
        if len(found) != 1:
            raise DataError(
                f"expected exactly one {stem}.({'|'.join(FORMATS)}) in {folder}, "
                f"found {', '.join(path.name for path in found) or 'none'}",
                hint="rename the files, or name them with data.train and data.validation",
            )
        return found[0]

    train, validation = (read_file(split_file(name)) for name in names)
    label_file = folder / "labels.txt"
    if not label_file.is_file():
        return train, validation, None
    pairs = [line.split("\t") for line in _text(label_file).splitlines() if line]
    if [pair[0] for pair in pairs] != [str(i) for i in range(len(pairs))] or not all(
        len(pair) == 2 for pair in pairs
    ):
        raise DataError(
            f"{label_file}: expected lines 'id<TAB>name' with ids 0, 1, ... in order",
            hint="correct the file, or give data.labels",
        )
    return train, validation, tuple(name for _, name in pairs)


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} in line {line}",
            hint="convert it, for example: iconv -f latin1 -t utf-8",
        ) from error


def read_file(path: Path) -> list[Row]:
    """Read the rows of one file, in the format that its name ends in.

    Raises:
        DataError: the file is missing, not UTF-8 or malformed, or of another format.
    """
    readers = {
        "tsv": _read_delimited,
        "csv": _read_delimited,
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
    }
    reader = readers.get(path.suffix.lstrip("."))
    if reader is None:
        raise DataError(
            f"{path}: expected a file that ends in {', '.join(readers)}",
            hint="convert or rename it",
        )
    if not path.is_file():
        raise DataError(f"no file '{path}'", hint="correct the path in the data section")
    return reader(path)


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet table: {error}", hint="write it again") from error
    return [(f"{path}, row {number}", row) for number, row in enumerate(table, 1)]


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    # Not splitlines(): U+2028 and its like are legal inside a JSON string.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number}: not JSON: {error}", hint="correct the line"
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {number}: expected an object, found {type(row).__name__}",
                hint='write lines like {"text": "...", "label": "..."}',
            )
        rows.append((f"{path}, line {number}", row))
    return rows


def _read_delimited(path: Path) -> list[Row]:
    csv.field_size_limit(sys.maxsize)
    lines = _text(path).replace("\r\n", "\n").split("\n")
    # In TSV a quotation mark is an ordinary character (the GLUE files depend on it).
    reader = (
        csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        if path.suffix == ".tsv"
        else csv.reader(f"{line}\n" for line in lines)
    )
    try:
        parsed = [(f"{path}, line {reader.line_num}", fields) for fields in reader if fields]
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: not {path.suffix[1:].upper()}: {error}",
            hint="end lines with \\n or \\r\\n",
        ) from error
    header = parsed[0][1] if parsed else []
    twice = {name for name in header if header.count(name) > 1}
    if twice:
        raise DataError(
            f"{path}: the column '{min(twice)}' appears twice", hint="rename one of them"
        )
    for where, fields in parsed:
        if len(fields) != len(header):
            raise DataError(
                f"{where}: expected {len(header)} fields ({', '.join(header)}), "
                f"found {len(fields)}",
                hint="correct the line",
            )
    return [(where, dict(zip(header, fields, strict=True))) for where, fields in parsed[1:]]


def _load_hub(rest: str) -> Any:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise MissingExtra("datasets", extra="cpu") from error

    hub_or_its_cache()
    owner, _, config = rest.rpartition("/") if rest.count("/") == 2 else (rest, "", "")
    try:
        return load_dataset(owner, config or None)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot load the data set '{rest}' from the hub: {type(error).__name__}: {error}",
            hint="without a network, put train.tsv and validation.tsv into a folder and give "
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
