"""The init stage: from a table of anybody's to an annotated recipe.

What the columns show is guessed, and what they do not show is asked for: a wrong column would cost
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

from ad2kit.data.labels import balance
from ad2kit.data.sources import FORMATS, read_file
from ad2kit.data.texts import is_text
from ad2kit.models.pretrained import find_model, read_config, read_tokenizer
from ad2kit.run.errors import DataError, ModelError, RecipeError, nearest
from ad2kit.run.recipe import from_data, parse_yaml, recipes_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ad2kit.run.sections import Task

_VALIDATION = ("validation", "valid", "val", "dev")
# What columns of labels are called; it decides where several columns could be one.
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
# A column with more different values, or with longer ones on average, holds no classes.
_MOST_CLASSES, _CLASS_CHARACTERS = 1_000, 50
# A second column of texts with less than this part of the first one's length may be a title.
_PAIR = 1 / 3
_SAMPLE = 5_000  # texts that are measured
# Of English in WordPiece, rounded up; and the two or three special tokens.
_TOKENS_A_WORD, _SPECIAL = 1.4, 3
_SHORTEST, _STEP, _LONGEST = 16, 8, 512
_PARTS = ("train", "held-out")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Guess:
    """What a recipe for a table says, and what could be wrong with it.

    Attributes:
        data: keys of the recipe's ``data`` section.
        notes: comments for some of these keys; ``doubts`` are those that a person should look at.
        doubts: see ``notes``.
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
        text: the columns of the text, one or two; guessed if there are none.
        label: the column of the label; guessed if None.

    Raises:
        RecipeError: ``recipe`` is there already, or cannot be the name of a recipe.
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
    """Return what was guessed as lines for the terminal."""
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in guess.data.items()]
    lines += [f"{key}: {note}" for key, notes in guess.notes.items() for note in notes]
    lines += [f"unsure, {key}: {note}" for key, notes in guess.doubts.items() for note in notes]
    return "\n".join(lines)


def recipe_name(source: Path) -> str:
    """Return the name of the recipe for a table: of its file, or of the folder around it."""
    path = source.resolve()
    stem = path.parent.name if path.is_file() and path.stem == "train" else path.stem
    return _slug(stem)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "my-data"


def _taken(recipe: Path) -> RecipeError:
    return RecipeError(
        f"{recipe} exists already, and init overwrites no recipe",
        hint=f"give another name with --name {recipe.stem}-2, or delete {recipe}",
    )


def _files(source: Path, validation: Path | None) -> tuple[Guess, Path]:
    """Return what a recipe says of the files, and the training table."""
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
    found = [path for stem in _VALIDATION for path in _split(source, stem)]
    if validation is None and len(found) == 1:
        stem = None if found[0].stem == "validation" else found[0].stem
        return Guess({"source": str(source), "train": None, "validation": stem}), train[0]
    if len(train) > 1 or validation is None:
        names = ", ".join(path.name for path in (*train, *found))
        raise DataError(
            f"{source}: expected one train.({'|'.join(FORMATS)}) and one "
            f"({'|'.join(_VALIDATION)}).(…), found {names}",
            hint="name the files: ad2kit init FILE --validation FILE"
            + ("" if found else f"; to hold rows out:\n{_hold_out(train[0])}"),
        )
    paths = {"train": str(train[0]), "validation": str(validation)}
    return Guess({"source": None, **paths}), train[0]


def _split(folder: Path, stem: str) -> list[Path]:
    return [path for each in FORMATS if (path := folder / f"{stem}.{each}").is_file()]


def _hold_out(path: Path) -> str:
    """Return the commands that take a fifth of a table for validation."""
    cells, to_csv = "dtype=str, keep_default_na=False", "to_csv({}, index=False)"
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
    """Return the cells of each column of a table; what a JSON object lacks is None."""
    names: tuple[str, ...] = ()
    if path.suffix == ".parquet" and path.is_file():
        from ad2kit.data.parquet_files import open_parquet

        with path.open("rb") as stream:
            names = tuple(open_parquet(stream, str(path)).schema_arrow.names)
    rows = [row for _, row in read_file(path, names)]
    if not rows:
        raise DataError(f"{path} holds no rows", hint="give a table that holds rows")
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def _label(
    columns: dict[str, list[Any]], text: Sequence[str], label: str | None, guess: Guess
) -> str:
    """Return the column of the label, as it was named or guessed."""
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
        different, numbers = len(set(map(str, cells))), _are_numbers(cells)
        if label_task(cells) is None and not numbers and different > len(cells) / 2:
            raise DataError(
                f"'{label}' holds {different} different values in {len(cells)} rows, which are no "
                "classes",
                hint=f"name another column with --label; the columns are\n{_table(columns)}",
            )
        return label
    found = [name for name, cells in columns.items() if name not in text and label_task(cells)]
    named = [name for name in found if name.lower() in _LABEL_NAMES]
    if len(found) == 1:
        return found[0]
    if len(named) == 1:
        others = ", ".join(name for name in found if name != named[0])
        guess.doubt("label_column", f"Taken for its name; {others} could be labels too.")
        return named[0]
    raise DataError(
        f"the label could be in {' or '.join(found)}" if found else "no column looks like a label",
        hint=f"name it with --label; the columns are\n{_table(columns)}",
    )


def _texts(
    columns: dict[str, list[Any]], text: Sequence[str], label: str, guess: Guess
) -> list[str]:
    """Return the columns of the text, as they were named or guessed."""
    if text:
        return list(text)
    lengths = {
        name: float(np.mean([len(cell) for cell in cells]))
        for name, cells in columns.items()
        if name != label and _holds_sentences(cells)
    }
    found = sorted(lengths, key=lambda name: -lengths[name])
    if len(found) == 2 and lengths[found[1]] >= _PAIR * lengths[found[0]]:
        pair = [name for name in columns if name in found]
        guess.doubt(
            "text_columns",
            "Two columns hold sentences: they are read as a pair. If the "
            "label is a matter of one of them alone, delete the other.",
        )
        return pair
    if len(found) == 1:
        return found
    raise DataError(
        f"the text could be in {' or '.join(found)}" if found else "no column holds sentences",
        hint="name one column with --text, or the two of a pair with --text A,B; the columns are\n"
        + _table(columns),
    )


def _table(columns: dict[str, list[Any]]) -> str:
    """Return a line for each column: its name, its number of values, and the first of them."""
    lines = []
    for name, cells in columns.items():
        first = next((str(cell) for cell in cells if cell is not None), "")
        short = textwrap.shorten(first, 60, placeholder="…")
        lines.append(f"    {name}: {len(set(map(str, cells)))} different values, such as {short!r}")
    return "\n".join(lines)


def _holds_sentences(cells: Sequence[Any]) -> bool:
    """Tell whether these cells are texts of several words, and mostly letters."""
    if not all(map(is_text, cells)):
        return False
    several = sum(len(cell.split()) > 1 for cell in cells)
    letters = sum(sum(map(str.isalpha, cell)) for cell in cells)
    return several >= len(cells) / 2 and letters >= sum(map(len, cells)) / 2


def label_task(cells: Sequence[Any]) -> Task | None:
    """Return the task whose labels these cells may be; None if they look like something else.

    Columns with gaps are none, nor are those with one value, with another one in each row, or with
    so many whole numbers that they count something.
    """
    if all(isinstance(cell, list) for cell in cells) or all(map(_is_json_list, cells)):
        return "multi_label"
    texts = [str(cell).strip() for cell in cells if isinstance(cell, str | int | float)]
    if len(texts) < len(cells) or "" in texts or len(set(texts)) < 2:
        return None
    different = len(set(texts))
    few = different <= min(_MOST_CLASSES, max(2, len(texts) // 2))
    if all(map(_NUMBER.fullmatch, texts)):
        fractions = any(not float(text).is_integer() for text in texts)
        return "regression" if fractions else "single_label" if few else None
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
    """Tell whether commas separate labels here: most of what they separate comes in other cells."""
    cells_of: dict[str, set[str]] = {}
    for text in set(texts):
        for part in text.split(","):
            cells_of.setdefault(part.strip(), set()).add(text)
    separated = [cells for cells in cells_of.values() if any("," in text for text in cells)]
    # "New York" of "New York, NY" comes in this cell alone.
    return sum(len(cells) > 1 for cells in separated) > len(separated) / 2


def _task(cells: list[Any], guess: Guess) -> None:
    """Add the task, and what is known of its labels."""
    task = label_task(cells)
    if task is None:
        task = "regression" if _are_numbers(cells) else "single_label"
    guess.data["task"] = task
    numbers = task == "single_label" and _are_numbers(cells)
    if task == "regression":
        values = [float(cell) for cell in cells]
        guess.note("task", f"Numbers from {min(values):g} to {max(values):g}.")
    elif task == "multi_label":
        _multi_label(cells, guess)
    else:
        found = Counter(str(cell).strip() for cell in cells)
        shares = balance(dict(sorted(found.items())), len(cells))
        guess.note("labels", f"In the training table: {shares}.")
        if "rare" in shares:
            guess.doubt("labels", "Accuracy hardly sees rare classes: metrics: [macro_f1] does.")
        if len(found) == 1:
            guess.doubt(
                "labels",
                "All rows have the same, and check will refuse that: name the "
                "right column by --label.",
            )
        if len(found) > 2 and numbers:
            guess.doubt(
                "task",
                f"{len(found)} whole numbers are taken for classes. If 3 is more "
                "than 2, set it to regression.",
            )
    if numbers and not (Path(guess.data["source"] or "") / "labels.txt").is_file():
        guess.doubt(
            "labels",
            "Nothing says what the numbers are called: give the names in their "
            "order, and answers will have names.",
        )


def _multi_label(cells: list[Any], guess: Guess) -> None:
    rows: list[list[Any]] = [
        cell
        if isinstance(cell, list)
        else json.loads(cell)
        if _is_json_list(cell)
        else [part.strip() for part in cell.split(",")]
        for cell in cells
    ]
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
    found = Counter(str(name) for row in rows for name in row)
    guess.note("task", "Any number of labels a row.")
    guess.note("labels", f"In the training table: {balance(dict(found), len(rows))}.")
    if any(isinstance(cell, str) and not _is_json_list(cell) for cell in cells):
        guess.doubt(
            "task",
            "Commas are taken to separate labels. If they are part of a name, set "
            "it to single_label.",
        )


def _length(columns: list[list[Any]], guess: Guess) -> None:
    """Add the maximum length: that of 99 of 100 texts, at most what the packaged model reads."""
    rows = np.linspace(0, len(columns[0]) - 1, min(len(columns[0]), _SAMPLE)).astype(int)
    sample = [[str(column[row]) for row in rows] for column in columns]
    try:
        folder = find_model(_teacher())
        lengths = [len(ids) for ids in read_tokenizer(folder)(*sample)["input_ids"]]
        most = min(_LONGEST, read_config(folder).max_position_embeddings)
        how = f"by the tokenizer of {_teacher()}"
    except ModelError as error:
        words = [sum(len(text.split()) for text in row) for row in zip(*sample, strict=True)]
        lengths, most = [math.ceil(_TOKENS_A_WORD * n) + _SPECIAL for n in words], _LONGEST
        how = f"estimated from the words, because {error.message}"
    longest = int(np.quantile(lengths, 0.99, method="higher"))
    wanted = max(_SHORTEST, _STEP * math.ceil(longest / _STEP))
    guess.data["max_length_tokens"] = min(wanted, most)
    guess.note("max_length_tokens", f"99 of 100 texts have at most {longest} tokens, {how}.")
    if wanted > most:
        cut = sum(length > most for length in lengths) / len(lengths)
        guess.doubt(
            "max_length_tokens", f"The model reads {most} tokens: {cut:.0%} of the texts are cut."
        )


def _teacher() -> str:
    """Return the teacher of the recipe that is filled in."""
    data = parse_yaml((recipes_folder() / "custom.yaml").read_text(encoding="utf-8"))
    return str(data["teacher"]["model"])


def _recipe(name: str, source: Path, guess: Guess) -> str:
    """Return the shipped recipe for one's own data with the guesses filled in."""
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
    """Yield the lines of a recipe, with the keys of its data section as they were guessed."""
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
    prefix = f"{indent}# "
    return textwrap.wrap(text, 100, initial_indent=prefix, subsequent_indent=prefix)
