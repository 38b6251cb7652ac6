"""Labelled texts: read, checked row by row, split three ways, tokenised, batched by length.

``train`` is for training. ``select`` (taken from the training rows by seed, unless the recipe says
otherwise) is for every choice. Only the gate reads ``validation``.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from ad2kit.data import windows
from ad2kit.data.labels import counts, filled, has_label, no_labels
from ad2kit.data.mapped import (
    TOKENS,
    TextRows,
    TokenRows,
    kept,
    map_table,
    write_table,
)
from ad2kit.data.reading import read_labelled, read_recipe
from ad2kit.data.records import SplitFacts
from ad2kit.data.tokens import token_batches, tokenizer_facts, window_batches
from ad2kit.run.errors import DataError
from ad2kit.run.files import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import ArrayLike
    from transformers import PreTrainedTokenizerFast

    from ad2kit.run.sections import DataRecipe, Task, TextLength
    from ad2kit.tables.rows import BadRow

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
LARGE_ROWS = 100_000
"""From this number of rows on, what was read is kept in a file, so that it is not read again."""


@dataclass(frozen=True)
class Split:
    """Texts (one or two columns each) and their labels; see :mod:`ad2kit.data.labels`."""

    texts: TextRows
    labels: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[tuple[str, ...]], labels: np.ndarray) -> Split:
        """Return a split in memory."""
        return cls(TextRows.of(texts), labels)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: np.ndarray) -> Split:
        """Return the split of these rows, in this order."""
        return Split(self.texts.take(rows), self.labels[rows])

    def answered(self, task: Task, logits: np.ndarray) -> Split:
        """Return the split with a model's answers, from its logits, for the rows without labels."""
        return Split(self.texts, filled(task, self.labels, logits))

    @functools.cached_property
    def sha256(self) -> str:
        """The fingerprint of texts and labels, in order."""
        labels = self.labels
        blocks = (block.tolist() for block in np.array_split(labels, len(self) // 10_000 + 1))
        return self.texts.remembered(
            lambda: fingerprint(self.texts.blocks(), blocks),
            str(labels.dtype),
            hashlib.sha256(np.ascontiguousarray(labels).data).hexdigest(),
        )


@dataclass(frozen=True)
class Data:
    """The splits, the kind of task, and the names of the label ids.

    ``unlabelled`` holds texts for the student alone; its labels are those of
    :func:`ad2kit.data.labels.no_labels`. ``order_given`` says whether recipe or source gave the
    order of ``labels``; else they are sorted, and a teacher's outputs may have another order.
    ``bad_rows`` are the rows that ``data.bad_rows: skip`` left out.
    """

    task: Task
    labels: tuple[str, ...]
    train: Split
    select: Split
    validation: Split
    unlabelled: Split
    order_given: bool = False
    bad_rows: tuple[BadRow, ...] = ()

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
        if not len(self.unlabelled):
            return self.train
        return Split(
            self.train.texts + self.unlabelled.texts,
            np.concatenate([self.train.labels, self.unlabelled.labels]),
        )


@dataclass(frozen=True)
class Encoded:
    """A tokenised split: ragged ``input_ids`` (and ``token_type_ids`` for the families that read
    them), labels as in the split, and ``truncated``, bool [rows]: texts cut to the maximum length.

    If long texts are read in windows, each row of ``input_ids`` is a window. ``first_windows``,
    int64 [rows], is the position of the first window of each text; None if each text is one window.
    """  # noqa: D205

    input_ids: TokenRows
    token_type_ids: TokenRows | None
    labels: np.ndarray
    truncated: np.ndarray
    first_windows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.truncated)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """The number of tokens that the model reads of each text, [rows]."""
        tokens = self.input_ids.lengths
        return tokens if self.first_windows is None else np.add.reduceat(tokens, self.first_windows)

    def windows_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the positions of the windows of some texts, in the order of ``rows``."""
        if self.first_windows is None:
            return rows
        ends = np.append(self.first_windows[1:], len(self.input_ids))
        ranges = zip(self.first_windows[rows], ends[rows], strict=True)
        return np.concatenate([np.arange(first, end) for first, end in ranges])

    def batches(self, rows: np.ndarray, most_windows: int) -> list[np.ndarray]:
        """Cut rows, in order, into batches of at most ``most_windows`` windows.

        The memory of a pass of a model grows with the windows that it reads. A text of more windows
        is a batch of its own.
        """
        ends = np.cumsum(self._window_counts(rows))
        batches, first = [], 0
        while first < len(rows):
            read = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, read + most_windows, side="right")))
            batches.append(rows[first:last])
            first = last
        return batches

    def averaging(self, rows: np.ndarray) -> np.ndarray | None:
        """Return the matrix that averages over the windows of some texts; None if there are none.

        See :func:`ad2kit.data.windows.averaging`; the windows are those of :meth:`windows_of`.
        """
        places = self._places(rows)
        return None if places is None else windows.averaging(*places)

    def average(self, values: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Return the values of texts, [rows, ...], from those of their windows, [windows, ...].

        ``rows`` are the texts whose windows have the values; None means all. See
        :func:`ad2kit.data.windows.average`.
        """
        places = self._places(rows)
        return values if places is None else windows.average(values, *places)

    def _places(self, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the tokens of the windows of some texts, and each text's first window of these."""
        if self.first_windows is None:
            return None
        if rows is None:
            return self.input_ids.lengths, self.first_windows
        counts = self._window_counts(rows)
        return self.input_ids.lengths[self.windows_of(rows)], np.cumsum(counts) - counts

    def _window_counts(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of windows of each of some texts."""
        if self.first_windows is None:
            return np.ones(len(rows), np.int64)
        counts: np.ndarray = np.diff(np.append(self.first_windows, len(self.input_ids)))[rows]
        return counts


def load_data(recipe: DataRecipe, seed: int, store: Path | None = None) -> Data:
    """Read, check and split the data of a recipe.

    Args:
        recipe: the data section.
        seed: decides which training rows become ``select``, and the order of the others.
        store: the folder that keeps the rows of large tables, see :mod:`ad2kit.data.reading`.

    Raises:
        DataError: a file, column, row or label does not fit the recipe, a split is empty or holds
            only one class, too many validation texts are training texts, or the hub cannot be
            reached.
    """
    rows = read_recipe(recipe, store)
    train = Split(rows.train, rows.row_labels[: len(rows.train)])
    validation = Split(rows.validation, rows.row_labels[len(rows.train) :])
    labels = rows.facts.labels
    order = np.random.default_rng([seed, 0]).permutation(len(train))[: recipe.max_train_rows]
    select_rows = _select_rows(recipe, len(order), len(labels))
    data = Data(
        task=recipe.task,
        labels=labels,
        train=train.take(order[select_rows:]),
        select=train.take(order[:select_rows]) if select_rows else validation,
        validation=validation,
        unlabelled=Split(
            rows.unlabelled, no_labels(recipe.task, len(rows.unlabelled), len(labels))
        ),
        order_given=rows.facts.order_given,
        bad_rows=rows.facts.bad_rows,
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
    leaked = int(known_rows(data, recipe).sum())
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


def check_labelled(data: Data, command: str) -> None:
    """Refuse rows without labels for a command that compares models by their scores.

    Raises:
        DataError: a row of ``select`` or validation has no label.
    """
    for name, split in (("select", data.select), ("validation", data.validation)):
        lacking = int((~has_label(data.task, split.labels)).sum())
        if lacking:
            raise DataError(
                f"{command} compares students by their scores, and {lacking} of {len(split)} rows "
                f"of {name} have no label",
                hint="give it rows with labels, or train one student: `ad2kit run`",
            )


def known_rows(data: Data, recipe: DataRecipe) -> np.ndarray:
    """Return for each validation row whether its texts are also training texts, bool [rows].

    Hashes of 64 bits are compared: among 10 million texts and 100,000 validation texts a wrong
    match has a probability of 1e-7.
    """
    learned = [data.train, data.unlabelled]
    if recipe.select_from != "validation":
        learned.append(data.select)
    hashes = data.validation.texts.hashes()
    known = np.zeros(len(hashes), bool)
    for split in learned:
        known |= np.isin(hashes, split.texts.hashes())
    return known


def load_split(path: Path, recipe: DataRecipe, labels: tuple[str, ...]) -> Split:
    """Read the labelled rows of one file; ``recipe`` names its columns.

    ``labels`` are the names of a model, in the order of the ids that the rows may hold.

    Raises:
        DataError: see :func:`load_data`.
    """
    split = Split(*read_labelled(path, recipe, labels))
    _check_variety(split, recipe, labels, path.name)
    return split


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
            sha256=split.sha256,
        )
        for name, split in data.splits().items()
    }


def encode(
    split: Split,
    tokenizer: PreTrainedTokenizerFast,
    length: TextLength,
    store: Path | None = None,
) -> Encoded:
    """Tokenise a split; long texts are cut and marked, refused, or divided into windows.

    Args:
        split: texts and labels.
        tokenizer: the tokenizer of the model that reads the token ids.
        length: the maximum length of a text, and what happens to a longer one.
        store: a folder that keeps the token ids of a large split, for all processes and runs.

    Raises:
        DataError: a text is too long.
    """
    if length.long_texts == "cut":
        batches = token_batches(split.texts, tokenizer, length.max_length_tokens)
    else:
        batches = window_batches(split.texts, tokenizer, length)
    if store is None or len(split) < LARGE_ROWS:
        table = pa.Table.from_batches(batches, TOKENS)
    else:
        key = fingerprint(split.sha256, tokenizer_facts(tokenizer), *length.facts)
        path = store / "tokens" / key[:16] / "tokens.arrow"
        kept(path.parent, path.name, functools.partial(_write_tokens, path, batches, len(split)))
        table = map_table(path)
    reads_types = "token_type_ids" in tokenizer.model_input_names
    truncated = table["truncated"].to_numpy()
    first_windows = None
    if length.long_texts == "windows":
        first_windows = np.flatnonzero(~table["continues"].to_numpy().astype(bool))
        truncated = truncated[first_windows]
    return Encoded(
        TokenRows(table["input_ids"]),
        TokenRows(table["token_type_ids"]) if reads_types else None,
        split.labels,
        truncated,
        first_windows,
    )


def _write_tokens(path: Path, batches: Iterable[pa.RecordBatch], rows: int) -> None:
    """Write the tokens of so many texts, and say how fast it was."""
    logger.info("tokenising %d texts", rows)
    start = time.perf_counter()
    write_table(path, TOKENS, batches)
    rate = rows / (time.perf_counter() - start)
    size_mb = path.stat().st_size / 1e6
    logger.info("tokenised %.0f texts per second; kept in %.0f MB", rate, size_mb)


def check_lengths(
    data: Data, tokenizer: PreTrainedTokenizerFast, length: TextLength, *, windows: bool
) -> None:
    """Refuse texts of any split that are too long for a tokenizer, before a model is trained.

    ``windows`` says whether the models could read long texts in windows, for the hint.

    Raises:
        DataError: names their number and the first one.
    """
    if length.long_texts != "cut":
        for name, split in data.splits().items():
            for _ in window_batches(split.texts, tokenizer, length, name, windows=windows):
                pass


def epoch_batches(lengths: ArrayLike, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
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
    row_lengths = np.asarray(lengths)
    order = generator.permutation(len(row_lengths))
    batches: list[np.ndarray] = []
    bucket_size = batch_size * _BUCKET_BATCHES
    for bucket_start in range(0, len(order), bucket_size):
        bucket = order[bucket_start : bucket_start + bucket_size]
        rows = bucket[np.argsort(row_lengths[bucket], kind="stable")]
        batches += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return [batches[index] for index in generator.permutation(len(batches))]


def by_length(lengths: ArrayLike, batch_size: int) -> list[np.ndarray]:
    """Return the row indices of each evaluation batch; the rows are sorted by length."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def collate(
    encoded: Encoded, windows: Iterable[int], tokenizer: PreTrainedTokenizerFast
) -> dict[str, np.ndarray]:
    """Pad some windows on the right to the longest of them; the heads read the first position.

    A text that is not long is one window; see :meth:`Encoded.windows_of`.

    Returns:
        ``input_ids``, ``attention_mask`` and, if the family has them, ``token_type_ids``:
        int64 arrays of shape [windows, longest].
    """
    indices = np.fromiter(windows, np.int64)
    input_ids = encoded.input_ids.padded(indices, tokenizer.pad_token_id)
    lengths = encoded.input_ids.lengths[indices]
    mask = np.arange(input_ids.shape[1]) < lengths[:, None]
    arrays = {"input_ids": input_ids, "attention_mask": mask.astype(np.int64)}
    if encoded.token_type_ids is not None:
        padding = tokenizer.pad_token_type_id
        arrays["token_type_ids"] = encoded.token_type_ids.padded(indices, padding)
    return arrays


def _check_variety(split: Split, recipe: DataRecipe, labels: tuple[str, ...], name: str) -> None:
    """Refuse a split that is empty, or in which all labels are the same."""
    advice = "" if recipe.max_train_rows is None else "raise data.max_train_rows, "
    if not len(split):
        raise DataError(
            f"the {name} split has no row left beside those that are set aside for `select`",
            hint=f"give more rows, {advice}or set data.select_from=validation",
        )
    labelled = split.labels[has_label(recipe.task, split.labels)]
    if not len(labelled) and recipe.may_lack_labels:
        return
    if len(np.unique(labelled)) < 2:
        content = {
            "single_label": "one class only",
            "multi_label": "all labels in every row, or none in any",
            "regression": "one value only",
        }[recipe.task]
        label = labelled.flat[0]
        value = labels[int(label)] if recipe.task == "single_label" else f"{label:g}"
        raise DataError(
            f"the {name} split holds {content}: '{value}' in all {len(labelled)} rows",
            hint=f"give rows that differ in their labels, {advice}or name the right column in "
            "data.label_column",
        )
