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

from ad2kit.data.labels import FLAGS, balance
from ad2kit.models.pretrained import find_model, read_config, read_tokenizer
from ad2kit.run.errors import DataError, ModelError, RecipeError, nearest
from ad2kit.run.recipe import from_data, parse_yaml, recipes_folder
from ad2kit.tables import formats
from ad2kit.tables.formats import FORMATS
from ad2kit.tables.texts import is_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ad2kit.run.sections import Task
    from ad2kit.tables.text_files import Quotes

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
# What may separate labels in a cell.
_SEPARATORS = ",;|"
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
    label: Sequence[str] = (),
    csv_quotes: Quotes = "doubled",
) -> Guess:
    """Write an annotated recipe for a table.

    Args:
        source: the training table, or a folder of train and validation tables.
        recipe: the .yaml file to write.
        validation: the validation table, if ``source`` has none.
        text: the one or two text columns; guessed if empty.
        label: the label column, or a column of 0 and 1 for each label; guessed if empty.
        csv_quotes: how CSV writes a quotation mark inside of a quoted cell.

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
    guess, train = _files(source, validation, csv_quotes)
    columns = _columns(train, (*text, *label), csv_quotes)
    labels = _labels(columns, text, label, guess)
    texts = _texts(columns, text, labels, guess)
    guess.data.update(text_columns=texts, label_column=labels, labels=None, csv_quotes=csv_quotes)
    if len(labels) > 1:
        guess.data["task"] = "multi_label"
        guess.note("label_column", "One column of 0 and 1 for each label.")
    else:
        guess.data["label_column"] = labels[0]
        _task(columns[labels[0]], formats.class_names(train, labels), guess)
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


def _files(source: Path, validation: Path | None, quotes: Quotes) -> tuple[Guess, Path]:
    """Return a guess that names the files, and the path of the training table.

    Raises:
        DataError: a table is missing, or there are several.
    """
    if validation is not None:
        formats.files_of(validation)
    train = formats.named(source, "train") if source.is_dir() else []
    if not train:
        _check_is_table(source)
        if validation is None:
            raise DataError(
                f"{source} has no validation table beside it, and a gate needs rows that no "
                "training sees",
                hint="hold some rows out, and name both tables:\n" + _hold_out(source, quotes),
            )
        return Guess({"source": None, "train": str(source), "validation": str(validation)}), source
    others = [(stem, path) for stem in _VALIDATION for path in formats.named(source, stem)]
    if validation is None and len(train) == len(others) == 1:
        stem = None if others[0][0] == "validation" else others[0][0]
        return Guess({"source": str(source), "train": None, "validation": stem}), train[0]
    if len(train) > 1 or validation is None:
        names = ", ".join(path.name for path in (*train, *(path for _, path in others)))
        hint = "name the tables: ad2kit init FILE --validation FILE"
        if not others:
            hint += f"; to hold rows out:\n{_hold_out(train[0], quotes)}"
        raise DataError(
            f"{source}: expected one train.({'|'.join(FORMATS)}) and one "
            f"({'|'.join(_VALIDATION)}).(…), found {names}",
            hint=hint,
        )
    paths = {"train": str(train[0]), "validation": str(validation)}
    return Guess({"source": None, **paths}), train[0]


def _check_is_table(source: Path) -> None:
    """Insist that a folder without a train table is a table itself."""
    try:
        formats.files_of(source)
    except DataError as error:
        if not source.is_dir():
            raise
        raise DataError(
            f"{source} holds no train.({'|'.join(FORMATS)}), and is no table: {error.message}",
            hint="name the training table itself: ad2kit init FILE --validation FILE",
        ) from error


def _hold_out(path: Path, quotes: Quotes) -> str:
    """Return the commands that hold a fifth of a table out for validation, as JSON lines."""
    stem = path.name.split(".")[0].partition("-[")[0]
    train, held_out = (str(path.with_name(f"{stem}-{part}.jsonl")) for part in _PARTS)
    code = (
        "import json, random; from pathlib import Path; "
        "from ad2kit.tables.formats import read_rows; "
        f"rows = [dict(cells) for _, cells in read_rows(Path({json.dumps(str(path))}), "
        f"quotes={quotes!r})]; "
        "random.Random(17).shuffle(rows); part = round(len(rows) / 5); "
        "[Path(name).write_text(''.join(json.dumps(row, default=str) + chr(10) for row in some)) "
        f"for name, some in (({json.dumps(held_out)}, rows[:part]), "
        f"({json.dumps(train)}, rows[part:]))]"
    )
    files = f"{shlex.quote(train)} --validation {shlex.quote(held_out)}"
    return f"    python -c {shlex.quote(code)}\n    ad2kit init {files}"


def _columns(path: Path, names: Sequence[str], csv_quotes: Quotes) -> dict[str, list[Any]]:
    """Return the cells of each column of a table; a key that a JSON object lacks gives None.

    ``names`` are columns that it should have; they show the delimiter of CSV.
    """
    rows = [cells for _, cells in formats.read_rows(path, names, csv_quotes, every=True)]
    if not rows:
        raise DataError(f"{path} holds no rows", hint="give a table that holds rows")
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in columns}


def _labels(
    columns: dict[str, list[Any]], text: Sequence[str], labels: Sequence[str], guess: Guess
) -> list[str]:
    """Return the label column or the columns of labels, named by the user or guessed.

    Raises:
        DataError: named columns are missing or cannot hold text and label, or no column or several
            columns look like the label.
    """
    for name in (*text, *labels):
        if name not in columns:
            raise DataError(
                f"no column '{name}'{nearest(name, columns)}; columns: {', '.join(columns)}",
                hint="name columns of the table with --text A[,B] and --label C[,D...]",
            )
    if len(text) > 2:
        raise DataError(
            f"expected one or two columns of text, found {len(text)}: {', '.join(text)}",
            hint="name one with --text A, or the two of a pair with --text A,B",
        )
    if both := sorted(set(labels) & set(text)):
        raise DataError(
            f"'{both[0]}' is both text and label", hint="name two columns, or leave --label out"
        )
    if labels:
        for name in labels:
            _check_labels(name, columns, one_of_several=len(labels) > 1)
        return list(labels)
    candidates = [name for name, cells in columns.items() if name not in text and label_task(cells)]
    usual = [name for name in candidates if name.lower() in _LABEL_NAMES]
    if len(candidates) == 1:
        return candidates
    if len(usual) == 1:
        others = ", ".join(name for name in candidates if name != usual[0])
        guess.doubt("label_column", f"Taken for its name; {others} could be labels too.")
        return usual
    if candidates and all(_are_flags(columns[name]) for name in candidates):
        guess.doubt(
            "label_column",
            "Several columns hold 0 or 1: each is taken for one of several labels. If one of "
            "them is the label, name it with --label.",
        )
        return candidates
    fault = "no column looks like a label"
    if candidates:
        fault = f"the label could be in {' or '.join(candidates)}"
    raise DataError(fault, hint=f"name it with --label; the columns are\n{_table(columns)}")


def _check_labels(name: str, columns: dict[str, list[Any]], *, one_of_several: bool) -> None:
    """Refuse a column that the user named, and that can be no label."""
    cells = columns[name]
    if one_of_several:
        if not _are_flags(cells):
            raise DataError(
                f"'{name}' is one of several columns of labels, and does not hold 0 or 1 alone",
                hint=f"name other columns with --label; the columns are\n{_table(columns)}",
            )
        return
    different = len(set(map(str, cells)))
    if label_task(cells) is None and not _are_numbers(cells) and different > len(cells) / 2:
        raise DataError(
            f"'{name}' holds {different} different values in {len(cells)} rows, which are no "
            "classes",
            hint=f"name another column with --label; the columns are\n{_table(columns)}",
        )


def _are_flags(cells: Sequence[Any]) -> bool:
    """Tell whether all cells are 0 or 1."""
    return {str(cell).strip() for cell in cells} <= FLAGS.keys()


def _texts(
    columns: dict[str, list[Any]], text: Sequence[str], labels: Sequence[str], guess: Guess
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
        if name not in labels and _holds_sentences(cells)
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
    if _separator(texts):
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


def _separator(texts: Sequence[str]) -> str | None:
    """Return what separates several labels: most of the parts between it occur in other cells."""
    for separator in _SEPARATORS:
        cells_of: dict[str, set[str]] = {}
        for text in set(texts):
            for part in text.split(separator):
                cells_of.setdefault(part.strip(), set()).add(text)
        separated = [
            cells for cells in cells_of.values() if any(separator in text for text in cells)
        ]
        # The part "New York" of "New York, NY" occurs in this cell only.
        if sum(len(cells) > 1 for cells in separated) > len(separated) / 2:
            return separator
    return None


def _task(cells: list[Any], names: tuple[str, ...] | None, guess: Guess) -> None:
    """Add the task to the guess, with notes and doubts about its labels.

    ``names`` are the names of the classes if the table holds them.
    """
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
    if names is not None:
        guess.note("labels", f"The table names its classes: {', '.join(names)}.")
    elif are_numbered and not (Path(guess.data["source"] or "") / "labels.txt").is_file():
        guess.doubt(
            "labels",
            "Nothing says what the numbers are called: give the names in their "
            "order, and answers will have names.",
        )


def _labels_of(cell: Any, separator: str) -> list[Any]:
    """Return the labels of a multi-label cell: a list, a JSON list, or a text with separators."""
    if isinstance(cell, list):
        return cell
    if _is_json_list(cell):
        labels: list[Any] = json.loads(cell)
        return labels
    return [part.strip() for part in cell.split(separator)]


def _multi_label(cells: list[Any], guess: Guess) -> None:
    """Add the labels of a multi-label column to the guess, with notes and doubts about them."""
    texts = [cell for cell in cells if isinstance(cell, str) and not _is_json_list(cell)]
    separator = _separator(texts) or ","
    guess.data["label_separator"] = separator
    rows = [_labels_of(cell, separator) for cell in cells]
    width = len(rows[0])
    if width > 1 and all(
        len(row) == width and {str(cell) for cell in row} <= FLAGS.keys() for row in rows
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
    if texts:
        guess.doubt(
            "task",
            f"{separator!r} is taken to separate labels. If it is part of a name, set the task to "
            "single_label.",
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
