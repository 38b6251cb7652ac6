"""The tables of a job and their parts: how a block of rows becomes one part with its answers.

:class:`BlockWorker` does it for any source of answers: a classifier (:mod:`.workers`), or what a
language model has said (:mod:`ad2kit.asking`).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ad2kit.run.errors import DataError, reading
from ad2kit.scoring import text_blocks
from ad2kit.scoring.blocks import (
    Block,
    check_partition_columns,
    filesystem,
    find_inputs,
    layout_of,
)
from ad2kit.scoring.output import OutputFolder, part_name
from ad2kit.tables.formats import known_format
from ad2kit.tables.texts import is_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from ad2kit.exporting.tokenise import Refuse
    from ad2kit.scoring.blocks import Layout, Rows, Survey
    from ad2kit.scoring.records import InputFile
    from ad2kit.tables.text_files import Quotes

    Numbered = tuple[int, Block]


class BlockReader(Protocol):
    """Reads blocks of one file; reading them in order is fastest."""

    def read(self, block: Block) -> Rows:
        """Read a block."""

    def close(self) -> None:
        """Close the file."""


class BlockFormat(Protocol):
    """The functions of a module that reads and writes blocks of one family of formats."""

    def survey(
        self,
        file: InputFile,
        block_rows: int,
        text_columns: Sequence[str] = (),
        quotes: Quotes = "doubled",
    ) -> Survey:
        """Cut a file into blocks."""

    def Reader(self, url: str, layout: Layout) -> BlockReader:  # noqa: N802  (a class there)
        """Open a file for reading."""

    def write(
        self, rows: Rows, good: Sequence[int], layout: Layout, answers: Mapping[str, NDArray[Any]]
    ) -> bytes:
        """Return the content of a part: the rows at the positions ``good`` with their answers."""


@dataclass(frozen=True, slots=True)
class Done:
    """The result of one block; ``seconds`` is the time of the classifier alone."""

    rows: int
    bad: int
    seconds: float


def blocks_of(url: str) -> BlockFormat:
    """Return the module that reads and writes the format of a file.

    Raises:
        MissingExtra: the format needs pyarrow, which is not installed.
    """
    if not known_format(url).is_arrow:
        return text_blocks
    from ad2kit.scoring import arrow_blocks

    return arrow_blocks


class BlockWorker(ABC):
    """Reads blocks, gets the answers to their texts, and writes parts.

    Args:
        output: the address of the output folder.
        layout: the columns of the job.
    """

    def __init__(self, output: str, layout: Layout) -> None:
        self.output = OutputFolder(output)
        self.layout = layout
        self._url = ""
        self._reader: BlockReader | None = None

    @abstractmethod
    def answers(self, texts: Sequence[Any], refuse: Refuse) -> dict[str, NDArray[Any]]:
        """Return the columns of the answers by name; the texts are checked.

        For a text without an answer ``refuse`` is called with its index and the reason, and it has
        no place in the columns. A row without a reason is left out of the part, and is not bad.
        """

    def __call__(self, index: int, block: Block) -> Done:
        """Answer one block and write its part.

        Raises:
            DataError: the file is gone, or has changed since it was surveyed.
        """
        rows, good = self.read(block)
        start = time.perf_counter()
        refused = dict[int, str]()
        texts = [rows.texts[position] for position in good]
        answer_columns = self.answers(texts, refused.__setitem__)
        seconds = time.perf_counter() - start
        for number, reason in refused.items():
            if reason:
                rows.refuse(rows.places[good[number]], reason)
        good = [position for number, position in enumerate(good) if number not in refused]
        content = blocks_of(block.url).write(rows, good, self.layout, answer_columns)
        bad = sorted(rows.bad, key=lambda row: row.row)
        self.output.write_part(part_name(index, known_format(block.url).of_parts), content, bad)
        return Done(block.rows, len(bad), seconds)

    def read(self, block: Block) -> tuple[Rows, list[int]]:
        """Read a block, and return the positions of the rows whose texts are texts, too.

        Raises:
            DataError: the file is gone, or has changed since it was surveyed.
        """
        rows = self._read(blocks_of(block.url), block)
        good = []
        for position, (texts, place) in enumerate(zip(rows.texts, rows.places, strict=True)):
            reason = _wrong(texts, self.layout.text_columns)
            if reason:
                rows.refuse(place, reason)
            else:
                good.append(position)
        return rows, good

    def close(self) -> None:
        """Close the file of the last block."""
        if self._reader is not None:
            self._reader.close()
        self._url = ""
        self._reader = None

    def _read(self, block_format: BlockFormat, block: Block) -> Rows:
        """Read a block, and check that it has as many rows as in the survey."""
        with reading(block.url):
            if self._reader is None or block.url != self._url:
                self.close()
                self._reader = block_format.Reader(block.url, self.layout)
                self._url = block.url
            rows = self._reader.read(block)
        row_count = len(rows.places) + len(rows.bad)
        if row_count != block.rows:
            raise DataError(
                f"{block.url} has changed while it was scored: expected {block.rows} rows from row "
                f"{block.first_row} on, found {row_count}",
                hint="score it into a new folder once it is complete",
            )
        return rows


def _wrong(texts: tuple[Any, ...], names: tuple[str, ...]) -> str:
    """Return the reason to refuse the texts of a row; "" if they are good."""
    for name, text in zip(names, texts, strict=True):
        if not is_text(text):
            return f"'{name}': expected at least one visible character, found {text!r:.60}"
    return ""


@dataclass(frozen=True)
class Tables:
    """The input of a job: its files, its columns, and its blocks by number."""

    files: tuple[InputFile, ...]
    layout: Layout
    blocks: list[Numbered]

    def part(self, number: int) -> str:
        """Return the name of the part of a block."""
        return part_name(number, known_format(self.files[0].url).of_parts)

    @property
    def rows(self) -> int:
        """The number of all rows."""
        return sum(block.rows for _, block in self.blocks)


def open_tables(
    input_url: str,
    output: OutputFolder,
    text_columns: tuple[str, ...],
    csv_quotes: Quotes,
    added: tuple[str, ...],
    labels: tuple[str, ...],
    block_rows: int,
    naming: str = "--text-columns a, or a,b for a pair",
) -> Tables:
    """Find the tables of a job, and divide them into blocks.

    Args:
        input_url: a file, folder or glob.
        output: the folder for the parts, which must not lie in the input.
        text_columns: the columns to read.
        csv_quotes: how CSV writes a quotation mark inside of a quoted cell.
        added: the names of the columns of the answers.
        labels: the labels that the answers may hold.
        block_rows: the most rows of a block.
        naming: how the command names the columns to read, for hints.

    Raises:
        DataError: an input or a column is missing, would occur twice, or cannot be read or written.
    """
    _check_apart(input_url, output)
    files = find_inputs(input_url)
    for file in files:
        _check_apart(file.url, output)
    surveys = _survey(files, block_rows, text_columns, csv_quotes)
    check_partition_columns(input_url, surveys)
    _check_writable(known_format(files[0].url).of_parts, (*added, *labels))
    layout = layout_of(surveys, text_columns, added, naming)
    blocks = enumerate(block for survey in surveys.values() for block in survey.blocks)
    return Tables(files, layout, list(blocks))


def _survey(
    files: tuple[InputFile, ...], block_rows: int, text_columns: tuple[str, ...], quotes: Quotes
) -> dict[str, Survey]:
    """Return the survey of each file, by its address."""
    surveys = {}
    for file in files:
        survey = blocks_of(file.url).survey
        with reading(file.url):
            surveys[file.url] = survey(file, block_rows, text_columns, quotes)
    return surveys


def _check_apart(input_url: str, output: OutputFolder) -> None:
    """Refuse an output inside an input folder, and an input inside the output."""
    store, path = filesystem(input_url)
    output_inside = f"{output.path}/".startswith(f"{path.rstrip('/')}/") and store.isdir(path)
    input_inside = path.startswith(f"{output.path}/")
    if store.protocol == output.store.protocol and (output_inside or input_inside):
        raise DataError(
            f"{output.url} and the input {input_url} lie in one another: parts would be read as "
            "input",
            hint="give an OUTPUT beside it",
        )


def _check_writable(suffix: str, words: Iterable[str]) -> None:
    """Refuse names of labels or columns that TSV cannot hold."""
    if suffix != "tsv":
        return
    for word in words:
        if any(character in word for character in "\t\r\n"):
            raise DataError(
                f"TSV has no quoting, and cannot hold {word!r}, which the answers need",
                hint="convert INPUT to CSV, JSON lines or Parquet",
            )
