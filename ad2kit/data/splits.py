"""Labelled texts: read, checked row by row, split three ways, tokenised, batched by length.

``train`` is for training. ``select`` (taken from the training rows by seed, unless the recipe says
otherwise) is for every choice. Only the gate reads ``validation``.
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

# `select` gets this share of the training rows, within these bounds.
_SELECT_FRACTION = 0.1
_SELECT_LEAST = 200
_SELECT_MOST = 2_000
# At least this number of `select` rows per class, on average, so that it has rows of each class.
_SELECT_ROWS_PER_CLASS = 4
# A tiny training set must not lose more than a fifth of its rows to `select`.
_SELECT_SHARE_LIMIT = 0.2
_BUCKET_BATCHES = 32
_CHUNK_CHARACTERS = 65_536


class SplitFacts(Part):
    """Facts about one split: rows, rows per class, truncated texts, and fingerprint."""

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

    ``unlabelled`` holds texts for the student alone; its labels are those of
    :func:`ad2kit.data.labels.no_labels`. ``order_given`` says whether recipe or source gave the
    order of ``labels``; else they are sorted, and a teacher's outputs may have another order.
    """

    task: Task
    labels: tuple[str, ...]
    train: Split
    select: Split
    validation: Split
    unlabelled: Split
    order_given: bool = False

    def splits(self) -> dict[str, Split]:
        """Return the splits that are not empty, by name."""
        splits = {
            "train": self.train,
            "select": self.select,
            "validation": self.validation,
            "unlabelled": self.unlabelled,
        }
        return {name: split for name, split in splits.items() if len(split)}

    def distillation(self) -> Split:
        """Return the rows that the student learns from: first ``train``, then ``unlabelled``."""
        return Split(
            self.train.texts + self.unlabelled.texts,
            np.concatenate([self.train.labels, self.unlabelled.labels]),
        )


@dataclass(frozen=True)
class Encoded:
    """A tokenised split: ragged ``input_ids`` (and ``token_type_ids`` for the families that read
    them), labels as in the split, and ``truncated``, bool [rows]: texts cut to the maximum length.
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
        DataError: a file, column, row or label does not fit the recipe, a split is empty or holds
            only one class, too many validation texts are training texts, or the hub cannot be
            reached.
    """
    train_rows, validation_rows, names = read_rows(recipe)
    columns = (*recipe.text_columns, recipe.label_column)
    _check_columns(train_rows, columns, "train")
    _check_columns(validation_rows, columns, "validation")
    output_labels = label_set(train_rows, recipe, names)
    train_texts = _texts(train_rows, recipe)
    validation_texts = _texts(validation_rows, recipe)
    row_labels = read_labels([*train_rows, *validation_rows], recipe, output_labels)
    train = Split(train_texts, row_labels[: len(train_rows)])
    validation = Split(validation_texts, row_labels[len(train_rows) :])
    labels = output_labels.names
    order = np.random.default_rng([seed, 0]).permutation(len(train))[: recipe.max_train_rows]
    select_rows = _select_rows(recipe, len(order), len(labels))
    unlabelled = tuple(text for each in recipe.unlabelled for text in _unlabelled(each, recipe))
    data = Data(
        task=recipe.task,
        labels=labels,
        train=train.take(order[select_rows:]),
        select=train.take(order[:select_rows]) if select_rows else validation,
        validation=validation,
        unlabelled=Split(unlabelled, no_labels(recipe.task, len(unlabelled), len(labels))),
        order_given=output_labels.given,
    )
    for name, split in (("train", data.train), ("validation", data.validation)):
        _check_variety(split, recipe, labels, name)
    _check_leakage(data, recipe)
    return data


def _select_rows(recipe: DataRecipe, train_rows: int, outputs: int) -> int:
    """Return the number of training rows for `select`; 0 if `select` is the validation split."""
    if recipe.select_from == "validation":
        return 0
    rows = max(round(train_rows * _SELECT_FRACTION), _SELECT_LEAST)
    if recipe.task == "single_label":
        rows = max(rows, _SELECT_ROWS_PER_CLASS * outputs)
    rows = min(rows, _SELECT_MOST)
    return max(1, min(rows, int(train_rows * _SELECT_SHARE_LIMIT)))


def _check_leakage(data: Data, recipe: DataRecipe) -> None:
    """Refuse data if too many validation texts are training texts; warn if some are."""
    training_texts = {*data.train.texts, *data.unlabelled.texts}
    if recipe.select_from != "validation":
        training_texts |= {*data.select.texts}
    leaked = sum(text in training_texts for text in data.validation.texts)
    share = leaked / len(data.validation)
    if share > recipe.max_leakage:
        raise DataError(
            f"{leaked} of {len(data.validation)} validation texts ({share:.1%}) are also training "
            f"texts; expected at most {recipe.max_leakage:.1%}, data.max_leakage: a gate on texts "
            "that were learned by heart proves nothing",
            hint="give a validation file that training does not see, or accept it with "
            f"data.max_leakage={math.ceil(100 * share) / 100:g}",
        )
    if leaked:
        logger.warning(
            "%d of %d validation texts are also training texts", leaked, len(data.validation)
        )


def load_split(path: Path, recipe: DataRecipe, labels: tuple[str, ...]) -> Split:
    """Read the labelled rows of one file; ``recipe`` names its columns.

    ``labels`` are the names of a model, in the order of the ids that the rows may hold.

    Raises:
        DataError: see :func:`load_data`.
    """
    columns = (*recipe.text_columns, recipe.label_column)
    rows = read_file(path, columns)
    _check_columns(rows, columns, path.name)
    model_recipe = recipe
    if recipe.task != "regression":
        model_recipe = recipe.model_copy(update={"labels": labels})
    output_labels = label_set(rows, model_recipe, None)
    split = Split(_texts(rows, recipe), read_labels(rows, recipe, output_labels))
    _check_variety(split, recipe, labels, path.name)
    return split


def _unlabelled(reference: str, recipe: DataRecipe) -> tuple[tuple[str, ...], ...]:
    """Read the texts of one entry of ``data.unlabelled``."""
    rows = read_unlabelled(reference, recipe.text_columns)
    _check_columns(rows, recipe.text_columns, reference)
    return _texts(rows, recipe)


def facts(
    data: Data, *, train: Encoded, select: Encoded, validation: Encoded
) -> dict[str, SplitFacts]:
    """Return the facts about each split that is not empty.

    ``train`` holds the encoded rows of :meth:`Data.distillation`: the unlabelled texts come last.
    """
    train_rows = len(data.train)
    truncated = {
        "train": train.truncated[:train_rows],
        "select": select.truncated,
        "validation": validation.truncated,
        "unlabelled": train.truncated[train_rows:],
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
    """Tokenise a split; texts of more than ``max_length_tokens`` tokens are truncated and marked.

    The texts are tokenised in chunks: until a call ends, the tokenizer keeps all pieces of every
    text that is longer than the model, which takes 300 times the bytes of the text.
    """
    input_ids: list[list[int]] = []
    token_type_ids: list[list[int]] = []
    truncated: list[bool] = []
    for texts in _chunks(split.texts):
        columns = [list(column) for column in zip(*texts, strict=True)]
        batch = tokenizer(*columns, truncation=True, max_length=max_length_tokens)
        input_ids += batch["input_ids"]
        token_type_ids += batch.get("token_type_ids", [])
        truncated += [bool(encoding.overflowing) for encoding in batch.encodings or ()]
    reads_types = "token_type_ids" in tokenizer.model_input_names
    return Encoded(
        input_ids,
        token_type_ids if reads_types else None,
        split.labels,
        np.asarray(truncated, bool),
    )


def _chunks(texts: Sequence[tuple[str, ...]]) -> Iterator[Sequence[tuple[str, ...]]]:
    """Yield the texts in chunks that end when they reach ``_CHUNK_CHARACTERS`` characters."""
    start = 0
    characters = 0
    for index, columns in enumerate(texts):
        characters += sum(map(len, columns))
        if characters >= _CHUNK_CHARACTERS:
            yield texts[start : index + 1]
            start = index + 1
            characters = 0
    if start < len(texts):
        yield texts[start:]


def epoch_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """Return the batches of one epoch: every row once, in batches of similar length.

    Rows are shuffled and then sorted by length inside buckets of several batches. Then the batches
    are shuffled. So padding is small, and the order is still random. This is a pure function of its
    arguments: a resumed run sees the batches of the interrupted one.

    Args:
        lengths: number of tokens of each row.
        batch_size: rows of a batch; the last batch of a bucket may have fewer.
        seed: seed of the training.
        epoch: number of the epoch.

    Returns:
        The row indices of each batch.
    """
    generator = np.random.default_rng([seed, 1, epoch])
    order = generator.permutation(len(lengths))
    row_lengths = np.asarray(lengths)
    batches: list[np.ndarray] = []
    bucket_size = batch_size * _BUCKET_BATCHES
    for bucket_start in range(0, len(order), bucket_size):
        bucket = order[bucket_start : bucket_start + bucket_size]
        rows = bucket[np.argsort(row_lengths[bucket], kind="stable")]
        batches += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return [batches[index] for index in generator.permutation(len(batches))]


def by_length(lengths: Sequence[int], batch_size: int) -> list[np.ndarray]:
    """Return the row indices of each evaluation batch; the rows are sorted by length."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def collate(
    encoded: Encoded, rows: Iterable[int], tokenizer: PreTrainedTokenizerFast
) -> dict[str, np.ndarray]:
    """Pad some rows on the right to the longest of them; the heads read the first position.

    Returns:
        ``input_ids``, ``attention_mask`` and, if the family has them, ``token_type_ids``:
        int64 arrays of shape [rows, longest].
    """
    indices = [int(row) for row in rows]
    input_ids = [encoded.input_ids[index] for index in indices]
    fields = {
        "input_ids": (input_ids, tokenizer.pad_token_id),
        "attention_mask": ([[1] * len(ids) for ids in input_ids], 0),
    }
    if encoded.token_type_ids is not None:
        token_type_ids = [encoded.token_type_ids[index] for index in indices]
        fields["token_type_ids"] = (token_type_ids, tokenizer.pad_token_type_id)
    longest = max(map(len, input_ids))
    padded = {}
    for name, (sequences, padding) in fields.items():
        array = np.full((len(input_ids), longest), padding, dtype=np.int64)
        for array_row, sequence in zip(array, sequences, strict=True):
            array_row[: len(sequence)] = sequence
        padded[name] = array
    return padded


def _check_columns(rows: list[Row], columns: tuple[str, ...], name: str) -> None:
    """Insist on at least one row, and on the columns that the recipe names."""
    if not rows:
        raise DataError(f"the {name} split is empty", hint="give a file that holds rows")
    where, first_row = rows[0]
    for column in columns:
        if column not in first_row:
            raise no_column(where, column, first_row)


def _texts(rows: list[Row], recipe: DataRecipe) -> tuple[tuple[str, ...], ...]:
    """Return the text columns of raw rows; refuse the first cell that is not a text."""
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


def _check_variety(split: Split, recipe: DataRecipe, labels: tuple[str, ...], name: str) -> None:
    """Refuse a split that is empty, or in which all labels are the same."""
    advice = "" if recipe.max_train_rows is None else "raise data.max_train_rows, "
    if not len(split):
        raise DataError(
            f"the {name} split has no row left beside those that are set aside for `select`",
            hint=f"give more rows, {advice}or set data.select_from=validation",
        )
    if len(np.unique(split.labels)) < 2:
        content = {
            "single_label": "one class only",
            "multi_label": "all labels in every row, or none in any",
            "regression": "one value only",
        }[recipe.task]
        label = split.labels.flat[0]
        value = labels[int(label)] if recipe.task == "single_label" else f"{label:g}"
        raise DataError(
            f"the {name} split holds {content}: '{value}' in all {len(split)} rows",
            hint=f"give rows that differ in their labels, {advice}or name the right column in "
            "data.label_column",
        )
