"""What reading and writing a table costs, without any model.

    python bench/tables.py --rows 200000

One table of random words, a third of its texts with commas and quotation marks, in each format; the
Parquet file has one row group. Seconds are those of the CPU, the least of three. `survey` cuts the
file into blocks, `read` and `write` are all blocks of 4,096 rows by one worker, `read by 4` is the
sum of four workers that take the blocks in turns, and `train` is how training reads the file. The
last two columns are milliseconds to read the first block, and the last whole one.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from ad2kit.scoring.blocks import Layout, find_inputs
from ad2kit.scoring.parts import blocks_of
from ad2kit.scoring.score import BLOCK_ROWS
from ad2kit.tables.formats import read_rows

if TYPE_CHECKING:
    from ad2kit.scoring.blocks import Block

_COLUMNS, _WORKERS, _TIMES = ("id", "text", "source"), 4, 3
_WORDS = "the film was dull and boring plot acting superb truly not weak it is great never café"


def make_tables(folder: Path, rows: int) -> None:
    """Write one table in each format."""
    generator, table = random.Random(0), list[dict[str, Any]]()  # noqa: S311  (no secret)
    for number in range(rows):
        text = " ".join(generator.choices(_WORDS.split(), k=generator.randint(8, 30)))
        text = text if number % 3 else f'{text}, he said "so"'
        table.append(dict(zip(_COLUMNS, (number, text, "web"), strict=True)))
    with (folder / "in.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([_COLUMNS, *(r.values() for r in table)])
    lines = ["\t".join(map(str, row)) for row in (_COLUMNS, *(r.values() for r in table))]
    (folder / "in.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = [json.dumps(row, ensure_ascii=False) for row in table]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    parquet.write_table(pa.Table.from_pylist(table), folder / "in.parquet", row_group_size=rows)


def measure(path: Path) -> list[float]:
    """Return the seconds of survey, read, write, read by several and train, and of two blocks."""
    (file,) = find_inputs(str(path))
    tables = blocks_of(file.url)
    start = time.process_time()
    surveyed = tables.survey(file, BLOCK_ROWS, ("text",))
    blocks = surveyed.blocks
    survey = time.process_time() - start
    layout = Layout(_COLUMNS, ("text",), ("label", "score", "truncated"), surveyed.dialect)

    def read(some: list[Block], *, write: bool) -> tuple[list[float], float]:
        reading, writing = list[float](), 0.0
        with closing(tables.Reader(file.url, layout)) as reader:
            for block in some:
                start = time.process_time()
                rows = reader.read(block)
                reading.append(time.process_time() - start)
                numbers = np.arange(len(rows.texts))
                answers = {
                    "label": np.array(["bad", "good"])[numbers % 2],
                    "score": numbers / block.rows,
                    "truncated": numbers < 0,
                }
                start = time.process_time()
                if write:
                    tables.write(rows, numbers.tolist(), layout, answers)
                writing += time.process_time() - start
        return reading, writing

    reading, writing = read(blocks, write=True)
    shared = sum(sum(read(blocks[n::_WORKERS], write=False)[0]) for n in range(_WORKERS))
    start = time.process_time()
    sum(1 for _ in read_rows(path, ("text", "id")))
    train = time.process_time() - start
    first, last = reading[0], reading[-2]
    return [survey, sum(reading), writing, shared, train, 1000 * first, 1000 * last]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ad2kit-tables-") as folder:
        make_tables(Path(folder), options.rows)
        head = "survey s | read s | write s | rows/s | read by 4 s | train s | first ms | last ms"
        print(f"| format | {head} |\n{'|---' * 9}|")
        for suffix in ("tsv", "csv", "jsonl", "parquet"):
            every = [measure(Path(folder) / f"in.{suffix}") for _ in range(_TIMES)]
            survey, read, write, *others = map(min, zip(*every, strict=True))
            rate = options.rows / (survey + read + write)
            cells = [f"{each:.2f}" for each in (survey, read, write)]
            cells += [f"{rate:,.0f}", *(f"{each:.2f}" for each in others[:2])]
            cells += [f"{each:.1f}" for each in others[2:]]
            print(f"| {suffix} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
