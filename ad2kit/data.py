"""Labelled texts: read, checked row by row, split three ways, tokenised, batched by length.

``train`` trains, ``select`` (carved from the training rows by seed) makes every choice, and
``validation`` is read by the gate alone.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ad2kit.errors import DataError, nearest
from ad2kit.files import fingerprint
from ad2kit.records import SplitFacts
from ad2kit.sources import Row, read_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from transformers import PreTrainedTokenizerFast

    from ad2kit.recipe import DataRecipe

logger = logging.getLogger(__name__)

_SELECT_FRACTION, _SELECT_LEAST, _SELECT_MOST = 0.05, 200, 2_000
# A tiny training set must not lose more than a fifth of its rows to `select`.
_SELECT_SHARE_LIMIT = 0.2
_BUCKET_BATCHES = 32


@dataclass(frozen=True)
class Split:
    """Texts (one or two columns each) and their label ids, shape [rows]."""

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
    """The three splits and the names of the label ids."""

    labels: tuple[str, ...]
    train: Split
    select: Split
    validation: Split


@dataclass(frozen=True)
class Encoded:
    """A tokenised split: ragged ``input_ids`` (and ``token_type_ids`` for the families that read
    them), label ids of shape [rows], and how many texts were cut to the maximum length.
    """  # noqa: D205

    input_ids: list[list[int]]
    token_type_ids: list[list[int]] | None
    labels: np.ndarray
    truncated: int

    def __len__(self) -> int:
        return len(self.input_ids)


def load_data(recipe: DataRecipe, seed: int) -> Data:
    """Read, check and split the data of a recipe.

    Raises:
        DataError: a file, column, row or label is not what the recipe says, a split is empty or
            holds one class only, or the hub cannot be reached.
    """
    train_rows, validation_rows, names = read_rows(recipe)
    for name, rows in (("train", train_rows), ("validation", validation_rows)):
        _check_columns(rows, recipe, name)
    labels = recipe.labels or names or _labels_seen(train_rows, recipe)
    train = _check(train_rows, recipe, labels)
    validation = _check(validation_rows, recipe, labels)

    order = np.random.default_rng([seed, 0]).permutation(len(train))[: recipe.max_train_rows]
    wanted = min(max(round(len(order) * _SELECT_FRACTION), _SELECT_LEAST), _SELECT_MOST)
    select_rows = max(1, min(wanted, int(len(order) * _SELECT_SHARE_LIMIT)))
    data = Data(
        labels, train.take(order[select_rows:]), train.take(order[:select_rows]), validation
    )
    for name, split in (("train", data.train), ("validation", data.validation)):
        _two_classes(split, labels, name)
    seen = {*data.train.texts, *data.select.texts}
    known = sum(text in seen for text in data.validation.texts)
    if known == len(data.validation):
        raise DataError(
            f"all {known} validation texts are also training texts: a gate on them proves nothing",
            hint="give a validation file that training does not see",
        )
    if known:
        logger.warning("%d of %d validation texts are also training texts", known,
                       len(data.validation))  # fmt: skip
    return data


def facts(data: Data, truncated: dict[str, int]) -> dict[str, SplitFacts]:
    """Return what the splits hold; ``truncated`` counts the cut texts of each split."""
    return {
        name: SplitFacts(
            rows=len(split),
            class_counts={
                label: int((split.labels == index).sum()) for index, label in enumerate(data.labels)
            },
            truncated=truncated[name],
            sha256=split.sha256(),
        )
        for name, split in (
            ("train", data.train), ("select", data.select), ("validation", data.validation),
        )
    }  # fmt: skip


def encode(split: Split, tokenizer: PreTrainedTokenizerFast, max_length_tokens: int) -> Encoded:
    """Tokenise a split; longer texts are truncated and counted."""
    columns = [list(column) for column in zip(*split.texts, strict=True)]
    batch = tokenizer(*columns, truncation=True, max_length=max_length_tokens)
    return Encoded(
        batch["input_ids"],
        batch["token_type_ids"] if "token_type_ids" in tokenizer.model_input_names else None,
        split.labels,
        sum(bool(encoding.overflowing) for encoding in batch.encodings or ()),
    )


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
    """Pad some rows to the longest of them.

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
    left = tokenizer.padding_side == "left"
    padded = {}
    for name, (values, fill) in fields.items():
        array = np.full((len(ids), width), fill, dtype=np.int64)
        for row, value in zip(array, values, strict=True):
            row[width - len(value) if left else 0 :][: len(value)] = value
        padded[name] = array
    return padded


def _labels_seen(rows: list[Row], recipe: DataRecipe) -> tuple[str, ...]:
    return tuple(sorted({_label(where, row, recipe.label_column) for where, row in rows}))


def _label(where: str, row: dict[str, Any], column: str) -> str:
    """Return a row's label as text: 1, "1" and 1.0 (a Parquet column with a gap) are the same."""
    value = row.get(column)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise DataError(
        f"{where}: '{column}' must be a label, a text or a whole number, found {value!r}",
        hint="remove or correct the row",
    )


def _check_columns(rows: list[Row], recipe: DataRecipe, name: str) -> None:
    """Insist on at least one row, and on the columns that the recipe names."""
    if not rows:
        raise DataError(f"the {name} split is empty", hint="give a file with at least two classes")
    where, first = rows[0]
    for column in (*recipe.text_columns, recipe.label_column):
        if column not in first:
            raise DataError(
                f"{where}: no column '{column}'{nearest(column, first)}; "
                f"columns: {', '.join(map(str, first))}",
                hint="set data.text_columns and data.label_column",
            )


def _check(rows: list[Row], recipe: DataRecipe, labels: tuple[str, ...]) -> Split:
    """Turn raw rows into a split, or name the first row that is wrong."""
    ids = {label: index for index, label in enumerate(labels)}
    texts, label_ids = [], []
    for where, row in rows:
        for column in recipe.text_columns:
            text = row.get(column)
            if not isinstance(text, str) or not text.strip() or not _is_unicode(text):
                raise DataError(
                    f"{where}: '{column}' must be a text with at least one visible character, "
                    f"found {text!r:.80}",
                    hint="remove or correct the row",
                )
        label = _label(where, row, recipe.label_column)
        # A name wins over an id, so that labels called "1" and "0" keep their meaning.
        index = ids.get(label)
        if index is None and label.isdecimal() and int(label) < len(labels):
            index = int(label)
        if index is None:
            raise DataError(
                f"{where}: label {label!r} is not in the label set ({', '.join(labels)})",
                hint="correct the row, or list all labels in data.labels",
            )
        texts.append(tuple(row[column] for column in recipe.text_columns))
        label_ids.append(index)
    return Split(tuple(texts), np.asarray(label_ids, dtype=np.int64))


def _is_unicode(text: str) -> bool:
    """Half a surrogate pair, which JSON lets through, is no character."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _two_classes(split: Split, labels: tuple[str, ...], name: str) -> None:
    present = np.unique(split.labels)
    if len(present) < 2:
        raise DataError(
            f"the {name} split holds one class only: '{labels[present[0]]}' in all "
            f"{len(split)} rows",
            hint="give rows of at least two classes, or raise data.max_train_rows",
        )
