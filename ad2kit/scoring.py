"""One block of rows through a classifier and into its part: what every worker of a job does.

Nothing here knows how many workers there are. A worker has one thread, and a block the same rows
and batches whoever scores it, so that its part has the same bytes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ad2kit import text_blocks
from ad2kit.blocks import suffix_of
from ad2kit.classifier import OnnxClassifier
from ad2kit.errors import DataError
from ad2kit.parts import OutputFolder, part_name
from ad2kit.tasks import answers, scores
from ad2kit.texts import is_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from ad2kit.blocks import Block, Layout, Rows, Survey
    from ad2kit.score_records import InputFile
    from ad2kit.sections import Task
    from ad2kit.tokenise import Tokens

ADDED: dict[Task, tuple[str, ...]] = {
    "single_label": ("label", "score", "truncated"),
    "multi_label": ("labels", "truncated"),
    "regression": ("value", "truncated"),
}
"""The columns of the answers for each task; see :class:`ad2kit.classifier.Prediction`."""


class BlockReader(Protocol):
    """Reads blocks of one file, the faster the more they are in order."""

    def read(self, block: Block) -> Rows:
        """Read a block."""

    def close(self) -> None:
        """Close the file."""


class BlockFormat(Protocol):
    """What a module that reads and writes blocks of one family of formats has."""

    def survey(self, file: InputFile, block_rows: int) -> Survey:
        """Cut a file into blocks."""

    def Reader(self, url: str, layout: Layout) -> BlockReader:  # noqa: N802  (a class there)
        """Open a file for reading."""

    def write(
        self, rows: Rows, good: Sequence[int], layout: Layout, answers: Mapping[str, NDArray[Any]]
    ) -> bytes:
        """Return some rows of a block with their answers as the content of a file."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker has to know beside its blocks: plain values, to be sent anywhere."""

    artifact: str
    output: str
    layout: Layout
    batch_size: int


@dataclass(frozen=True, slots=True)
class Done:
    """What became of one block; ``seconds`` are those of the classifier alone."""

    rows: int
    bad: int
    seconds: float


def format_of(suffix: str) -> BlockFormat:
    """Return the module that reads and writes a format.

    Raises:
        MissingExtra: it needs pyarrow, which is not installed.
    """
    if suffix != "parquet":
        return text_blocks
    from ad2kit import parquet_blocks

    return parquet_blocks


def cannot_read(url: str, error: OSError) -> DataError:
    """Return what to say of a file that was found and cannot be read."""
    return DataError(
        f"cannot read {url}: {error}",
        hint="put it back, or correct its access rights, then run the same command again",
    )


class Scorer:
    """A loaded classifier that turns blocks into parts.

    Raises:
        ModelError: the artefact is damaged or absent where the worker runs.
    """

    def __init__(self, work: Work) -> None:
        self.work, self.output = work, OutputFolder(work.output)
        self.classifier = OnnxClassifier(work.artifact, threads=1)
        self._url = ""
        self._reader: BlockReader | None = None

    def __call__(self, index: int, block: Block) -> Done:
        """Score one block and write its part.

        Raises:
            DataError: the file is gone, or has changed since it was surveyed.
        """
        suffix, layout = suffix_of(block.url), self.work.layout
        tables = format_of(suffix)
        rows = self._read(tables, block)
        good = []
        for position, (texts, place) in enumerate(zip(rows.texts, rows.places, strict=True)):
            if wrong := _wrong(texts, layout.text_columns):
                rows.refuse(place, wrong)
            else:
                good.append(position)
        start = time.perf_counter()
        found = self.answers([rows.texts[position] for position in good])
        seconds = time.perf_counter() - start
        content = tables.write(rows, good, layout, found)
        bad = sorted(rows.bad, key=lambda row: row.row)
        self.output.write_part(part_name(index, suffix), content, bad)
        return Done(block.rows, len(bad), seconds)

    def close(self) -> None:
        """Close the file of the last block."""
        if self._reader is not None:
            self._reader.close()
        self._url, self._reader = "", None

    def _read(self, tables: BlockFormat, block: Block) -> Rows:
        """Read a block, and insist that it is the one of the survey."""
        try:
            if self._reader is None or block.url != self._url:
                self.close()
                self._url, self._reader = block.url, tables.Reader(block.url, self.work.layout)
            rows = self._reader.read(block)
        except OSError as error:
            raise cannot_read(block.url, error) from error
        if (found := len(rows.places) + len(rows.bad)) != block.rows:
            raise DataError(
                f"{block.url} has changed while it was scored: expected {block.rows} rows from row "
                f"{block.first_row} on, found {found}",
                hint="score it into a new folder once it is complete",
            )
        return rows

    def answers(self, texts: Sequence[Any]) -> dict[str, NDArray[Any]]:
        """Return the columns of the answers, by name, for texts that are texts."""
        classifier = self.classifier
        encodings = classifier.encode(texts)
        logits = classifier.run_sorted(encodings, self.work.batch_size)
        values = columns(classifier, encodings, logits)
        return dict(zip(self.work.layout.added, values, strict=True))


def columns(
    classifier: OnnxClassifier, encodings: Sequence[Tokens], logits: NDArray[np.float32]
) -> list[NDArray[Any]]:
    """Return the columns of :data:`ADDED` for logits of shape [rows, outputs].

    They hold what :meth:`OnnxClassifier.predictions` says: str, float and bool, and of several
    labels objects, which are lists.
    """
    task, names = classifier.artifact.task, np.array(classifier.labels)
    found = answers(task, logits)
    cut = np.array([each.truncated for each in encodings], dtype=bool)
    if task == "regression":
        return [found.astype(np.float64), cut]
    if task == "multi_label":
        named = np.empty(len(found), dtype=object)
        named[:] = [names[row.astype(bool)].tolist() for row in found]
        return [named, cut]
    probabilities = scores(task, logits / classifier.artifact.temperature)
    taken = np.take_along_axis(probabilities, found[:, None], axis=1)[:, 0]
    return [names[found], taken, cut]


def _wrong(texts: tuple[Any, ...], names: tuple[str, ...]) -> str:
    for name, text in zip(names, texts, strict=True):
        if not is_text(text):
            return f"'{name}': expected at least one visible character, found {text!r:.60}"
    return ""
