"""The init command: writes an annotated recipe for a user's own table.

It guesses what the columns show, and asks for what they do not show: a wrong column would cost
hours of training. Each guess that could be wrong is a comment in the recipe.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ad2kit.data import tables
from ad2kit.data.labels import balance
from ad2kit.data.tables import FORMATS
from ad2kit.data.texts import is_text
from ad2kit.models.pretrained import find_model, read_config, read_tokenizer
from ad2kit.run.errors import DataError, ModelError, RecipeError, nearest
from ad2kit.run.recipe import from_data, parse_yaml, recipes_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ad2kit.run.sections import Task

# Names of validation tables, without their suffix.
_VALIDATION = ("validation", "valid", "val", "dev")
# Usual names of label columns; they decide if several columns could hold the label.
_LABEL_NAMES = (
    "label",
    "labels",
    "class",
    "category",
    "categories",
    "target",
    "intent",
    "sentiment",
    "score",
    "rating",
    "stars",
    "similarity",
    "tags",
    "topic",
)
# A column with more different values, or with longer values on average, does not hold classes.
_MOST_CLASSES = 1_000
_CLASS_CHARACTERS = 50
# A second column of texts that is shorter than this share of the first may hold titles.
_PAIR = 1 / 3
# The number of texts whose tokens are counted.
_SAMPLE = 5_000
# WordPiece tokens of an English word, rounded up; and the two or three special tokens of a text.
_TOKENS_A_WORD = 1.4
_SPECIAL_TOKENS = 3
# Bounds and multiple of the guessed maximum length, in tokens.
_SHORTEST, _STEP, _LONGEST = 16, 8, 512
# Parts of a table in the hint to hold rows out, as they stand in the names of their files.
_PARTS = ("train", "held-out")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Guess:
    """The guessed ``data`` section of a recipe, and comments on its keys.

    Attributes:
        data: values of the ``data`` section, by key.
        notes: comments by key.
        doubts: comments by key that a person should look at, because the guess could be wrong.
    """

    data: dict[str, Any]
    notes: dict[str, list[str]] = field(default_factory=dict)
    doubts: dict[str, list[str]] = field(default_factory=dict)

    def note(self, key: str, text: str) -> None:
        """Add a comment to a key."""
        self.notes.setdefault(key, []).append(text)

    def doubt(self, key: str, text: str) -> None:
        """Add a comment to a key that a person should look at."""
        self.doubts.setdefault(key, []).append(text)


def init(
    source: Path,
    recipe: Path,
    *,
    validation: Path | None = None,
    text: Sequence[str] = (),
    label: str | None = None,
) -> Guess:
    """Write an annotated recipe for a table.

    Args:
        source: the training table, or a folder of train and validation tables.
        recipe: the .yaml file to write.
        validation: the validation table, if ``source`` has none.
        text: the one or two text columns; guessed if empty.
        label: the label column; guessed if None.

    Raises:
        RecipeError: ``recipe`` exists already, its name is not a valid name of a recipe, or it
            cannot be written.
        DataError: there is no validation table, a table cannot be read, or it does not show which
            columns hold text and label.
    """
    if recipe.exists():
        raise _taken(recipe)
    if _slug(recipe.stem) != recipe.stem:
        raise RecipeError(
            f"'{recipe.stem}' cannot be the name of a recipe: it takes small letters, digits and -",
            hint=f"--name {_slug(recipe.stem)}",
        )
    guess, train = _files(source, validation)
    columns = _columns(train)
    label = _label(columns, text, label, guess)
    texts = _texts(columns, text, label, guess)
    guess.data.update(text_columns=texts, label_column=label, labels=None)
    _task(columns[label], guess)
    _length([columns[name] for name in texts], guess)
    content = _recipe(recipe.stem, source, guess)
    from_data(parse_yaml(content), where=str(recipe))
    try:
        with recipe.open("x", encoding="utf-8") as stream:
            stream.write(content)
    except FileExistsError as error:
        raise _taken(recipe) from error
    except OSError as error:
        raise RecipeError(
            f"cannot write {recipe}: {error.strerror}",
            hint=f"make the folder {recipe.parent}, or give another --name",
        ) from error
    return guess


def guess_words(guess: Guess) -> str:
    """Return a guess as lines for the terminal: values, notes and doubts."""
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in guess.data.items()]
    lines += [f"{key}: {note}" for key, notes in guess.notes.items() for note in notes]
    lines += [f"unsure, {key}: {note}" for key, notes in guess.doubts.items() for note in notes]
    return "\n".join(lines)


def recipe_name(source: Path) -> str:
    """Return the name of the recipe for a table, from its file or from the folder around it."""
    path = source.resolve()
    stem = path.parent.name if path.is_file() and path.stem == "train" else path.stem
    return _slug(stem)


def _slug(name: str) -> str:
    """Return a valid name of a recipe: small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "my-data"


def _taken(recipe: Path) -> RecipeError:
    """Return the error for a recipe that exists already."""
    return RecipeError(
        f"{recipe} exists already, and init overwrites no recipe",
        hint=f"give another name with --name {recipe.stem}-2, or delete {recipe}",
    )


def _files(source: Path, validation: Path | None) -> tuple[Guess, Path]:
    """Return a guess that names the files, and the path of the training table.

    Raises:
        DataError: a table is missing, or there are several.
    """
    if validation is not None and not validation.is_file():
        raise DataError(f"no file '{validation}'", hint="correct --validation")
    if not source.is_dir():
        if validation is None and source.is_file():
            raise DataError(
                f"{source} has no validation table beside it, and a gate needs rows that no "
                "training sees",
                hint="hold some rows out, and name both files:\n" + _hold_out(source),
            )
        return Guess({"source": None, "train": str(source), "validation": str(validation)}), source
    train = _split(source, "train")
    if not train:
        raise DataError(
            f"{source} holds no train.({'|'.join(FORMATS)})",
            hint="name the training table itself: ad2kit init FILE --validation FILE",
        )
    tables = [path for stem in _VALIDATION for path in _split(source, stem)]
    if validation is None and len(tables) == 1:
        stem = None if tables[0].stem == "validation" else tables[0].stem
        return Guess({"source": str(source), "train": None, "validation": stem}), train[0]
    if len(train) > 1 or validation is None:
        names = ", ".join(path.name for path in (*train, *tables))
        hint = "name the files: ad2kit init FILE --validation FILE"
        if not tables:
            hint += f"; to hold rows out:\n{_hold_out(train[0])}"
        raise DataError(
            f"{source}: expected one train.({'|'.join(FORMATS)}) and one "
            f"({'|'.join(_VALIDATION)}).(…), found {names}",
            hint=hint,
        )
    paths = {"train": str(train[0]), "validation": str(validation)}
    return Guess({"source": None, **paths}), train[0]


def _split(folder: Path, stem: str) -> list[Path]:
    """Return the tables of a name in a folder, in any format."""
    paths = [folder / f"{stem}.{suffix}" for suffix in FORMATS]
    return [path for path in paths if path.is_file()]


def _hold_out(path: Path) -> str:
    """Return the commands that hold a fifth of a table out for validation."""
    cells = "dtype=str, keep_default_na=False"
    to_csv = "to_csv({}, index=False)"
    to_json = 'to_json({}, orient="records", lines=True, force_ascii=False)'
    reader, writer, suffix = {
        ".tsv": (f'read_csv({{}}, sep="\\t", quoting=3, {cells})', to_csv, "csv"),
        ".jsonl": ("read_json({}, lines=True, dtype=False, convert_dates=False)", to_json, "jsonl"),
        ".parquet": ("read_parquet({})", "to_parquet({}, index=False)", "parquet"),
    }.get(path.suffix, (f"read_csv({{}}, {cells})", to_csv, "csv"))
    train, held_out = (path.with_name(f"{path.stem}-{part}.{suffix}") for part in _PARTS)
    code = (
        f"import pandas; rows = pandas.{reader.format(json.dumps(str(path)))}; "
        "held_out = rows.sample(frac=0.2, random_state=17); "
        f"held_out.{writer.format(json.dumps(str(held_out)))}; "
        f"rows.drop(held_out.index).{writer.format(json.dumps(str(train)))}"
    )
    files = f"{shlex.quote(str(train))} --validation {shlex.quote(str(held_out))}"
    return f"    python -c {shlex.quote(code)}\n    ad2kit init {files}"


def _columns(path: Path) -> dict[str, list[Any]]:
    """Return the cells of each column of a table; a key that a JSON object lacks gives None."""
    rows = [cells for _, cells in tables.read_rows(path)]
    if not rows:
        raise DataError(f"{path} holds no rows", hint="give a table that holds rows")
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def _label(
    columns: dict[str, list[Any]], text: Sequence[str], label: str | None, guess: Guess
) -> str:
    """Return the label column, named by the user or guessed.

    Raises:
        DataError: named columns are missing or cannot hold text and label, or no column or several
            columns look like the label.
    """
    for name in (*text, *([] if label is None else [label])):
        if name not in columns:
            raise DataError(
                f"no column '{name}'{nearest(name, columns)}; columns: {', '.join(columns)}",
                hint="name columns of the table with --text A[,B] and --label C",
            )
    if len(text) > 2:
        raise DataError(
            f"expected one or two columns of text, found {len(text)}: {', '.join(text)}",
            hint="name one with --text A, or the two of a pair with --text A,B",
        )
    if label in text:
        raise DataError(
            f"'{label}' is both text and label", hint="name two columns, or leave --label out"
        )
    if label is not None:
        cells = columns[label]
        different = len(set(map(str, cells)))
        are_numbers = _are_numbers(cells)
        if label_task(cells) is None and not are_numbers and different > len(cells) / 2:
            raise DataError(
                f"'{label}' holds {different} different values in {len(cells)} rows, which are no "
                "classes",
                hint=f"name another column with --label; the columns are\n{_table(columns)}",
            )
        return label
    candidates = [name for name, cells in columns.items() if name not in text and label_task(cells)]
    usual = [name for name in candidates if name.lower() in _LABEL_NAMES]
    if len(candidates) == 1:
        return candidates[0]
    if len(usual) == 1:
        others = ", ".join(name for name in candidates if name != usual[0])
        guess.doubt("label_column", f"Taken for its name; {others} could be labels too.")
        return usual[0]
    fault = "no column looks like a label"
    if candidates:
        fault = f"the label could be in {' or '.join(candidates)}"
    raise DataError(fault, hint=f"name it with --label; the columns are\n{_table(columns)}")


def _texts(
    columns: dict[str, list[Any]], text: Sequence[str], label: str, guess: Guess
) -> list[str]:
    """Return the text columns, named by the user or guessed.

    Raises:
        DataError: no column holds sentences, or it is not clear which columns are the text.
    """
    if text:
        return list(text)
    lengths = {
        name: float(np.mean([len(cell) for cell in cells]))
        for name, cells in columns.items()
        if name != label and _holds_sentences(cells)
    }
    candidates = sorted(lengths, key=lambda name: -lengths[name])
    if len(candidates) == 2 and lengths[candidates[1]] >= _PAIR * lengths[candidates[0]]:
        pair = [name for name in columns if name in candidates]
        guess.doubt(
            "text_columns",
            "Two columns hold sentences: they are read as a pair. If the "
            "label is a matter of one of them alone, delete the other.",
        )
        return pair
    if len(candidates) == 1:
        return candidates
    fault = "no column holds sentences"
    if candidates:
        fault = f"the text could be in {' or '.join(candidates)}"
    raise DataError(
        fault,
        hint="name one column with --text, or the two of a pair with --text A,B; the columns are\n"
        + _table(columns),
    )


def _table(columns: dict[str, list[Any]]) -> str:
    """Return a line for each column: its name, its number of values, and its first value."""
    lines = []
    for name, cells in columns.items():
        first = next((str(cell) for cell in cells if cell is not None), "")
        short = textwrap.shorten(first, 60, placeholder="…")
        lines.append(f"    {name}: {len(set(map(str, cells)))} different values, such as {short!r}")
    return "\n".join(lines)


def _holds_sentences(cells: Sequence[Any]) -> bool:
    """Tell whether all cells are texts, and most have several words and consist of letters."""
    if not all(map(is_text, cells)):
        return False
    sentences = sum(len(cell.split()) > 1 for cell in cells)
    letters = sum(sum(map(str.isalpha, cell)) for cell in cells)
    return sentences >= len(cells) / 2 and letters >= sum(map(len, cells)) / 2


def label_task(cells: Sequence[Any]) -> Task | None:
    """Return the task whose labels these cells may be; None if they do not look like labels.

    A column does not look like labels if it has gaps, if it has only one value or another value in
    each row, or if it has so many whole numbers that they seem to count something.
    """
    if all(isinstance(cell, list) for cell in cells) or all(map(_is_json_list, cells)):
        return "multi_label"
    texts = [str(cell).strip() for cell in cells if isinstance(cell, str | int | float)]
    if len(texts) < len(cells) or "" in texts or len(set(texts)) < 2:
        return None
    different = len(set(texts))
    few = different <= min(_MOST_CLASSES, max(2, len(texts) // 2))
    if all(map(_NUMBER.fullmatch, texts)):
        if any(not float(text).is_integer() for text in texts):
            return "regression"
        return "single_label" if few else None
    if sum(map(len, texts)) > _CLASS_CHARACTERS * len(texts):
        return None
    if _is_several(texts):
        return "multi_label"
    return "single_label" if few else None


def _are_numbers(cells: Sequence[Any]) -> bool:
    return all(_NUMBER.fullmatch(str(cell).strip()) for cell in cells)


def _is_json_list(cell: Any) -> bool:
    if not (isinstance(cell, str) and cell.strip().startswith("[")):
        return False
    try:
        return isinstance(json.loads(cell), list)
    except (ValueError, RecursionError):
        return False


def _is_several(texts: Sequence[str]) -> bool:
    """Tell whether commas separate labels: most of the parts between them occur in other cells."""
    cells_of: dict[str, set[str]] = {}
    for text in set(texts):
        for part in text.split(","):
            cells_of.setdefault(part.strip(), set()).add(text)
    separated = [cells for cells in cells_of.values() if any("," in text for text in cells)]
    # The part "New York" of "New York, NY" occurs in this cell only.
    return sum(len(cells) > 1 for cells in separated) > len(separated) / 2


def _task(cells: list[Any], guess: Guess) -> None:
    """Add the task to the guess, with notes and doubts about its labels."""
    task = label_task(cells)
    if task is None:
        task = "regression" if _are_numbers(cells) else "single_label"
    guess.data["task"] = task
    are_numbered = task == "single_label" and _are_numbers(cells)
    if task == "regression":
        values = [float(cell) for cell in cells]
        guess.note("task", f"Numbers from {min(values):g} to {max(values):g}.")
    elif task == "multi_label":
        _multi_label(cells, guess)
    else:
        rows_by_label = Counter(str(cell).strip() for cell in cells)
        shares = balance(dict(sorted(rows_by_label.items())), len(cells))
        guess.note("labels", f"In the training table: {shares}.")
        if "rare" in shares:
            guess.doubt("labels", "Accuracy hardly sees rare classes: metrics: [macro_f1] does.")
        if len(rows_by_label) == 1:
            guess.doubt(
                "labels",
                "All rows have the same, and check will refuse that: name the "
                "right column by --label.",
            )
        if len(rows_by_label) > 2 and are_numbered:
            guess.doubt(
                "task",
                f"{len(rows_by_label)} whole numbers are taken for classes. If 3 is more "
                "than 2, set it to regression.",
            )
    if are_numbered and not (Path(guess.data["source"] or "") / "labels.txt").is_file():
        guess.doubt(
            "labels",
            "Nothing says what the numbers are called: give the names in their "
            "order, and answers will have names.",
        )


def _labels_of(cell: Any) -> list[Any]:
    """Return the labels of a multi-label cell: a list, a JSON list, or a text with commas."""
    if isinstance(cell, list):
        return cell
    if _is_json_list(cell):
        labels: list[Any] = json.loads(cell)
        return labels
    return [part.strip() for part in cell.split(",")]


def _multi_label(cells: list[Any], guess: Guess) -> None:
    """Add the labels of a multi-label column to the guess, with notes and doubts about them."""
    rows = [_labels_of(cell) for cell in cells]
    width = len(rows[0])
    if width > 1 and all(
        len(row) == width
        and {str(cell) for cell in row} <= {"0", "1", "0.0", "1.0", "True", "False"}
        for row in rows
    ):
        guess.data["labels"] = [f"label-{number}" for number in range(width)]
        guess.doubt(
            "labels",
            f"Each row has {width} cells of 0 or 1, and nothing says what they "
            "are called: put their names here, in the order of the cells.",
        )
        return
    rows_by_label = Counter(str(name) for row in rows for name in row)
    guess.note("task", "Any number of labels a row.")
    guess.note("labels", f"In the training table: {balance(dict(rows_by_label), len(rows))}.")
    if any(isinstance(cell, str) and not _is_json_list(cell) for cell in cells):
        guess.doubt(
            "task",
            "Commas are taken to separate labels. If they are part of a name, set "
            "it to single_label.",
        )


def _length(columns: list[list[Any]], guess: Guess) -> None:
    """Add a maximum length that cuts at most one text of 100 and that the packaged model reads."""
    rows = np.linspace(0, len(columns[0]) - 1, min(len(columns[0]), _SAMPLE)).astype(int)
    sample = [[str(column[row]) for row in rows] for column in columns]
    try:
        folder = find_model(_teacher())
        lengths = [len(ids) for ids in read_tokenizer(folder)(*sample)["input_ids"]]
        limit = min(_LONGEST, read_config(folder).max_position_embeddings)
        method = f"by the tokenizer of {_teacher()}"
    except ModelError as error:
        words = [sum(len(text.split()) for text in row) for row in zip(*sample, strict=True)]
        lengths = [math.ceil(_TOKENS_A_WORD * count) + _SPECIAL_TOKENS for count in words]
        limit = _LONGEST
        method = f"estimated from the words, because {error.message}"
    p99 = int(np.quantile(lengths, 0.99, method="higher"))
    max_length = max(_SHORTEST, _STEP * math.ceil(p99 / _STEP))
    guess.data["max_length_tokens"] = min(max_length, limit)
    guess.note("max_length_tokens", f"99 of 100 texts have at most {p99} tokens, {method}.")
    if max_length > limit:
        cut = sum(length > limit for length in lengths) / len(lengths)
        guess.doubt(
            "max_length_tokens", f"The model reads {limit} tokens: {cut:.0%} of the texts are cut."
        )


def _teacher() -> str:
    """Return the teacher in the shipped recipe for a user's own data."""
    data = parse_yaml((recipes_folder() / "custom.yaml").read_text(encoding="utf-8"))
    return str(data["teacher"]["model"])


def _recipe(name: str, source: Path, guess: Guess) -> str:
    """Return the text of the shipped recipe for a user's own data, with the guesses filled in."""
    lines = (recipes_folder() / "custom.yaml").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("seed:"))
    head = [
        *_comment(
            f"Made by `ad2kit init {source}`. Lines that begin with UNSURE are guesses that "
            f"you should look at. Try it with `ad2kit check {name}.yaml`.",
            "",
        ),
        f"name: {name}",
        f"description: {json.dumps(f'Made for {source} by ad2kit init.', ensure_ascii=False)}",
    ]
    return "\n".join([*head, *_filled(lines[start:], guess)]) + "\n"


def _filled(lines: list[str], guess: Guess) -> Iterator[str]:
    """Yield the lines of a recipe, with the guessed values and comments in its data section."""
    section = ""
    for line in lines:
        if line[:1].isalpha():
            section = line.partition(":")[0]
        key = line.strip().partition(":")[0]
        if section == "data" and key in guess.data and line.startswith(f"  {key}:"):
            for note in guess.notes.get(key, []):
                yield from _comment(note, "  ")
            for doubt in guess.doubts.get(key, []):
                yield from _comment(f"UNSURE: {doubt}", "  ")
            yield f"  {key}: {json.dumps(guess.data[key], ensure_ascii=False)}"
        else:
            yield line


def _comment(text: str, indent: str) -> list[str]:
    """Return a text as lines of a YAML comment."""
    prefix = f"{indent}# "
    return textwrap.wrap(text, 100, initial_indent=prefix, subsequent_indent=prefix)
