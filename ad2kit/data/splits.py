"""Labelled texts: read, checked row by row, split three ways, tokenised, batched by length.

``train`` trains, ``select`` (carved from the training rows by seed, unless the recipe says
otherwise) makes every choice, and ``validation`` is read by the gate alone.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ad2kit.data.labels import counts, label_set, no_labels, read_labels
from ad2kit.data.sources import Row, read_file, read_rows, read_unlabelled
from ad2kit.data.texts import is_text
from ad2kit.run.errors import DataError, no_column
from ad2kit.run.files import fingerprint
from ad2kit.run.records import Part

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    from ad2kit.run.sections import DataRecipe, Task

logger = logging.getLogger(__name__)

_SELECT_FRACTION, _SELECT_LEAST, _SELECT_MOST = 0.1, 200, 2_000
# Of a single_label task: so that `select` sees something of each class.
_SELECT_ROWS_PER_CLASS = 4
# A tiny training set must not lose more than a fifth of its rows to `select`.
_SELECT_SHARE_LIMIT = 0.2
_BUCKET_BATCHES = 32
_CHUNK_CHARACTERS = 65_536


class SplitFacts(Part):
    """What one split holds: its size, its class counts, and how many texts were truncated."""

    rows: int
    class_counts: dict[str, int]
    truncated: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """Texts (one or two columns each) and their labels; see :mod:`ad2kit.data.labels`."""

    texts: tuple[tuple[str, ...], ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: np.ndarray) -> Split:
        """Return the split of these rows, in this order."""
        return Split(tuple(self.texts[row] for row in rows), self.labels[rows])

    def sha256(self) -> str:
        """Return the fingerprint of texts and labels, in order."""
        return fingerprint(self.texts, self.labels.tolist())


@dataclass(frozen=True)
class Data:
    """The splits, the kind of task, and the names of the label ids.

    ``unlabelled`` holds texts for the student alone; its labels say that there are none.
    ``order_given`` says whether recipe or source gave the order of ``labels``; else it is the order
    of sorting, which a teacher's outputs need not have.
    """

    task: Task
    labels: tuple[str, ...]
    train: Split
    select: Split
    validation: Split
    unlabelled: Split
    order_given: bool = False

    def splits(self) -> dict[str, Split]:
        """Return the splits that hold anything, by name."""
        splits = {
            "train": self.train,
            "select": self.select,
            "validation": self.validation,
            "unlabelled": self.unlabelled,
        }
        return {name: split for name, split in splits.items() if len(split)}

    def distillation(self) -> Split:
        """Return what the student reads: the training rows, then the unlabelled ones."""
        return Split(
            self.train.texts + self.unlabelled.texts,
            np.concatenate([self.train.labels, self.unlabelled.labels]),
        )


@dataclass(frozen=True)
class Encoded:
    """A tokenised split: ragged ``input_ids`` (and ``token_type_ids`` for the families that read
    them), labels as in the split, and which texts were cut to the maximum length, bool [rows].
    """  # noqa: D205

    input_ids: list[list[int]]
    token_type_ids: list[list[int]] | None
    labels: np.ndarray
    truncated: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)


def load_data(recipe: DataRecipe, seed: int) -> Data:
    """Read, check and split the data of a recipe.

    Raises:
        DataError: a file, column, row or label is not what the recipe says, a split is empty or
            holds one class only, or the hub cannot be reached.
    """
    train_rows, validation_rows, names = read_rows(recipe)
    columns = (*recipe.text_columns, recipe.label_column)
    for name, rows in (("train", train_rows), ("validation", validation_rows)):
        _check_columns(rows, columns, name)
    found = label_set(train_rows, recipe, names)
    texts = (_texts(train_rows, recipe), _texts(validation_rows, recipe))
    every = read_labels([*train_rows, *validation_rows], recipe, found)
    parts = np.split(every, [len(train_rows)])
    train, validation = (Split(*each) for each in zip(texts, parts, strict=True))
    labels = found.names
    order = np.random.default_rng([seed, 0]).permutation(len(train))[: recipe.max_train_rows]
    own = recipe.select_from == "validation"
    wanted = max(round(len(order) * _SELECT_FRACTION), _SELECT_LEAST)
    if recipe.task == "single_label":
        wanted = max(wanted, _SELECT_ROWS_PER_CLASS * len(labels))
    wanted = min(wanted, _SELECT_MOST)
    select_rows = 0 if own else max(1, min(wanted, int(len(order) * _SELECT_SHARE_LIMIT)))
    unlabelled = tuple(text for each in recipe.unlabelled for text in _unlabelled(each, recipe))
    data = Data(
        task=recipe.task,
        labels=labels,
        train=train.take(order[select_rows:]),
        select=validation if own else train.take(order[:select_rows]),
        validation=validation,
        unlabelled=Split(unlabelled, no_labels(recipe.task, len(unlabelled), len(labels))),
        order_given=found.given,
    )
    for name, split in (("train", data.train), ("validation", data.validation)):
        _insist_on_variety(split, recipe, labels, name)
    seen = {*data.train.texts, *data.unlabelled.texts} | (
        {*data.select.texts} if not own else set()
    )
    known = sum(text in seen for text in data.validation.texts)
    share = known / len(data.validation)
    if share > recipe.max_leakage:
        raise DataError(
            f"{known} of {len(data.validation)} validation texts ({share:.1%}) are also training "
            f"texts; expected at most {recipe.max_leakage:.1%}, data.max_leakage: a gate on texts "
            "that were learned by heart proves nothing",
            hint="give a validation file that training does not see, or accept it with "
            f"data.max_leakage={math.ceil(100 * share) / 100:g}",
        )
    if known:
        logger.warning(
            "%d of %d validation texts are also training texts", known, len(data.validation)
        )
    return data


def load_split(path: Path, recipe: DataRecipe, labels: tuple[str, ...]) -> Split:
    """Read the labelled rows of one file; ``recipe`` says what its columns are.

    ``labels`` are the names of a model, in the order of the ids that the rows may hold.

    Raises:
        DataError: see :func:`load_data`.
    """
    columns = (*recipe.text_columns, recipe.label_column)
    rows = read_file(path, columns)
    _check_columns(rows, columns, path.name)
    named = recipe if recipe.task == "regression" else recipe.model_copy(update={"labels": labels})
    found = label_set(rows, named, None)
    split = Split(_texts(rows, recipe), read_labels(rows, recipe, found))
    _insist_on_variety(split, recipe, labels, path.name)
    return split


def _unlabelled(reference: str, recipe: DataRecipe) -> tuple[tuple[str, ...], ...]:
    rows = read_unlabelled(reference, recipe.text_columns)
    _check_columns(rows, recipe.text_columns, reference)
    return _texts(rows, recipe)


def facts(
    data: Data, *, train: Encoded, select: Encoded, validation: Encoded
) -> dict[str, SplitFacts]:
    """Return what the splits hold; ``train`` also encodes the unlabelled texts, after its own."""
    rows = len(data.train)
    truncated = {
        "train": train.truncated[:rows],
        "select": select.truncated,
        "validation": validation.truncated,
        "unlabelled": train.truncated[rows:],
    }
    return {
        name: SplitFacts(
            rows=len(split),
            class_counts=(
                {} if name == "unlabelled" else counts(data.task, split.labels, data.labels)
            ),
            truncated=int(truncated[name].sum()),
            sha256=split.sha256(),
        )
        for name, split in data.splits().items()
    }


def encode(split: Split, tokenizer: PreTrainedTokenizerFast, max_length_tokens: int) -> Encoded:
    """Tokenise a split; longer texts are truncated and counted.

    Some texts at a time: the tokenizer keeps all pieces of a text that is longer than the model,
    300 times its bytes, until it is done.
    """
    ids, types, truncated = list[list[int]](), list[list[int]](), list[bool]()
    for texts in _chunks(split.texts):
        columns = [list(column) for column in zip(*texts, strict=True)]
        batch = tokenizer(*columns, truncation=True, max_length=max_length_tokens)
        ids += batch["input_ids"]
        types += batch.get("token_type_ids", [])
        truncated += [bool(encoding.overflowing) for encoding in batch.encodings or ()]
    segments = "token_type_ids" in tokenizer.model_input_names
    return Encoded(ids, types if segments else None, split.labels, np.asarray(truncated, bool))


def _chunks(texts: Sequence[tuple[str, ...]]) -> Iterator[Sequence[tuple[str, ...]]]:
    """Yield the texts in parts of about so many characters, or of one that is longer."""
    start = characters = 0
    for place, columns in enumerate(texts):
        characters += sum(map(len, columns))
        if characters >= _CHUNK_CHARACTERS:
            yield texts[start : place + 1]
            start, characters = place + 1, 0
    if start < len(texts):
        yield texts[start:]


def epoch_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """Return the batches of one epoch: every row once, in batches of similar length.

    Rows are shuffled, sorted by length inside buckets of some batches, and the batches shuffled
    again, so that padding is small and the order still random. A pure function of its arguments:
    a resumed run sees the batches of the interrupted one.
    """
    generator = np.random.default_rng([seed, 1, epoch])
    order = generator.permutation(len(lengths))
    length_of = np.asarray(lengths)
    batches: list[np.ndarray] = []
    bucket = batch_size * _BUCKET_BATCHES
    for start in range(0, len(order), bucket):
        rows = order[start : start + bucket]
        rows = rows[np.argsort(length_of[rows], kind="stable")]
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[index] for index in generator.permutation(len(batches))]


def by_length(lengths: Sequence[int], batch_size: int) -> list[np.ndarray]:
    """Return batches of rows sorted by length, for evaluation."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def collate(
    encoded: Encoded, rows: Iterable[int], tokenizer: PreTrainedTokenizerFast
) -> dict[str, np.ndarray]:
    """Pad some rows to the longest of them, on the right: the heads read the first position.

    Returns:
        ``input_ids``, ``attention_mask`` and, where the family has them, ``token_type_ids``:
        int64 arrays of shape [rows, longest].
    """
    chosen = [int(row) for row in rows]
    ids = [encoded.input_ids[row] for row in chosen]
    fields = {
        "input_ids": (ids, tokenizer.pad_token_id),
        "attention_mask": ([[1] * len(row) for row in ids], 0),
    }
    if encoded.token_type_ids is not None:
        types = [encoded.token_type_ids[row] for row in chosen]
        fields["token_type_ids"] = (types, tokenizer.pad_token_type_id)
    width = max(map(len, ids))
    padded = {}
    for name, (values, fill) in fields.items():
        array = np.full((len(ids), width), fill, dtype=np.int64)
        for row, value in zip(array, values, strict=True):
            row[: len(value)] = value
        padded[name] = array
    return padded


def _check_columns(rows: list[Row], columns: tuple[str, ...], name: str) -> None:
    """Insist on at least one row, and on the columns that the recipe names."""
    if not rows:
        raise DataError(f"the {name} split is empty", hint="give a file that holds rows")
    where, first = rows[0]
    for column in columns:
        if column not in first:
            raise no_column(where, column, first)


def _texts(rows: list[Row], recipe: DataRecipe) -> tuple[tuple[str, ...], ...]:
    """Return the text columns of raw rows, or name the first that is no text."""
    texts = []
    for where, row in rows:
        for column in recipe.text_columns:
            text = row.get(column)
            if not is_text(text):
                raise DataError(
                    f"{where}: '{column}' must be a text with at least one visible character, "
                    f"found {text!r:.80}",
                    hint="remove or correct the row",
                )
        texts.append(tuple(row[column] for column in recipe.text_columns))
    return tuple(texts)


def _insist_on_variety(
    split: Split, recipe: DataRecipe, labels: tuple[str, ...], name: str
) -> None:
    more = "" if recipe.max_train_rows is None else "raise data.max_train_rows, "
    if not len(split):
        raise DataError(
            f"the {name} split has no row left beside those that are set aside for `select`",
            hint=f"give more rows, {more}or set data.select_from=validation",
        )
    if len(np.unique(split.labels)) < 2:
        what = {
            "single_label": "one class only",
            "multi_label": "all labels in every row, or none in any",
            "regression": "one value only",
        }[recipe.task]
        held = split.labels.flat[0]
        value = labels[int(held)] if recipe.task == "single_label" else f"{held:g}"
        raise DataError(
            f"the {name} split holds {what}: '{value}' in all {len(split)} rows",
            hint=f"give rows that differ in their labels, {more}or name the right column in "
            "data.label_column",
        )
