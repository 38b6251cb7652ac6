"""One reader of each format: what it reads is what pandas and Arrow read, or it refuses.

What scoring writes, pandas and scoring itself read again unchanged.
"""

from __future__ import annotations

import csv
import io
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from pyarrow import parquet

from ad2kit.run.errors import DataError
from ad2kit.scoring.blocks import Layout, find_inputs
from ad2kit.scoring.parts import blocks_of
from ad2kit.tables import formats, text_files
from ad2kit.tables.text_files import Dialect, Lines

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ad2kit.scoring.records import InputFile
    from ad2kit.tables.text_files import Quotes

# What ends a line for somebody, what quotes for somebody, and what is no character for some.
ODD = "\",;\\'\n\r\t \ufeff\u2028\u2029\u0085\x0b\x0c\x1c\x00"
CELL = st.text(st.sampled_from(ODD + "ab1é😀"), max_size=6)
# How Python before 3.11.9 writes CSV is told from \r by pandas; without it pandas is in no doubt.
PLAIN_CELL = st.text(st.sampled_from(ODD.replace("\r", "").replace("\x00", "") + "aé"), max_size=6)
ROWS = st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5)
PLAIN_ROWS = st.lists(st.tuples(PLAIN_CELL, PLAIN_CELL), min_size=1, max_size=5)
NAMES = ("text", "other")
LABELS = np.array(["plain", 'a,"b"', "c\rd", "\u2028\n"])
# Nothing is a gap, and nothing a number.
AS_THEY_ARE: dict[str, Any] = {"dtype": str, "keep_default_na": False, "na_filter": False}


def for_training(path: Path) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in NAMES) for _, row in formats.read_rows(path, NAMES)]


def for_scoring(path: Path, block_rows: int, quotes: Quotes = "doubled") -> list[tuple[str, ...]]:
    """The same rows in blocks; each is written with a label and read again."""
    found = list[tuple[str, ...]]()
    for file in find_inputs(str(path)):
        found += scored(file, block_rows, quotes, path.with_name("written"))
    return found


def scored(
    file: InputFile, block_rows: int, quotes: Quotes, folder: Path
) -> Iterator[tuple[str, ...]]:
    blocks, answer = blocks_of(file.url), LABELS
    suffix = formats.known_format(file.url).of_parts
    if suffix == "tsv":
        answer = LABELS[:2]  # TSV cannot hold the others, and `ad2kit score` refuses them
    survey = blocks.survey(file, block_rows, NAMES, quotes)
    layout = Layout(survey.columns, NAMES, ("label",), survey.dialect)
    folder.mkdir(exist_ok=True)
    written = folder / f"part.{suffix}"
    with closing(blocks.Reader(file.url, layout)) as reader:
        for number, block in enumerate(survey.blocks):
            rows = reader.read(block)
            assert len(rows.places) + len(rows.bad) == block.rows <= block_rows
            if rows.bad:
                raise DataError(rows.bad[0].reason, hint="")
            labels = answer[(number + np.arange(len(rows.texts))) % len(answer)]
            good = range(len(rows.texts))
            written.write_bytes(blocks.write(rows, good, layout, {"label": labels}))
            again = formats.read_rows(written, (*NAMES, "label"), quotes)
            assert [tuple(row[name] for name in (*NAMES, "label")) for _, row in again] == [
                (*texts, label) for texts, label in zip(rows.texts, labels, strict=True)
            ]
            yield from rows.texts


def both(path: Path, block_rows: int) -> list[tuple[str, ...]] | None:
    """What training and scoring read, who must agree; None if both refuse."""
    found = list[list[tuple[str, ...]] | None]()
    for reader in (for_training, lambda path: for_scoring(path, block_rows)):
        try:
            found.append(reader(path))
        except DataError:
            found.append(None)
    assert found[0] == found[1]
    event("refused" if found[0] is None else "read")
    return found[0]


def by_pandas(path: Path, **options: Any) -> list[tuple[str, ...]]:
    frame = pd.read_csv(path, **AS_THEY_ARE, **options)
    return list(frame.itertuples(index=False, name=None))


@given(
    rows=ROWS,
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    end=st.sampled_from(["\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
    block_rows=st.integers(1, 3),
)
def test_csv_is_what_pandas_reads(
    rows: list[tuple[str, str]], quoting: Any, end: str, encoding: str, block_rows: int
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "in.csv"
        frame = pd.DataFrame(rows, columns=list(NAMES))
        frame.to_csv(path, index=False, quoting=quoting, lineterminator=end, encoding=encoding)
        found = both(path, block_rows)
        if quoting == csv.QUOTE_ALL:
            assert found == rows
        # Unquoted, a cell may hold a \r that ends the row, or be a row of nothing.
        elif found is not None and "\x00" not in f"{rows}":
            assert found == by_pandas(path, encoding=encoding)


@given(rows=PLAIN_ROWS, quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_what_no_reader_doubts_is_not_refused(rows: list[tuple[str, str]], quoting: Any) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "in.csv"
        pd.DataFrame(rows, columns=list(NAMES)).to_csv(path, index=False, quoting=quoting)
        assert both(path, 2) == rows == by_pandas(path)


@given(content=st.text(st.sampled_from('",\r\n\\ab'), max_size=25), block_rows=st.integers(1, 3))
def test_any_csv_is_what_pandas_reads_or_refused(content: str, block_rows: int) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "in.csv"
        path.write_text(f"text,other\n{content}", encoding="utf-8", newline="")
        found = both(path, block_rows)
        if found:
            assert found == by_pandas(path, skip_blank_lines=True)


@given(rows=ROWS, bom=st.booleans(), end=st.sampled_from(["\n", "\r\n"]))
def test_tsv_is_what_pandas_reads_without_quoting(
    rows: list[tuple[str, str]], bom: bool, end: str
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "in.tsv"
        lines = ["\t".join(row) + end for row in (NAMES, *rows)]
        path.write_text("\ufeff" * bom + "".join(lines), encoding="utf-8", newline="")
        found = both(path, 2)
        if not set("\t\r\n") & set("".join(map("".join, rows))):
            assert found == [row for row in rows if any(row)] or found == rows
        if found and "\x00" not in f"{rows}":
            assert found == by_pandas(path, sep="\t", quoting=csv.QUOTE_NONE)


@given(rows=ROWS, ascii_only=st.booleans(), bom=st.booleans())
def test_json_lines_are_what_was_written(
    rows: list[tuple[str, str]], ascii_only: bool, bom: bool
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "in.jsonl"
        frame = pd.DataFrame(rows, columns=list(NAMES))
        lines = frame.to_json(orient="records", lines=True, force_ascii=ascii_only)
        path.write_text("\ufeff" * bom + lines, encoding="utf-8", newline="")
        assert both(path, 2) == rows


TYPES = (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()))


@given(rows=ROWS, kind=st.sampled_from(TYPES), group=st.integers(1, 3))
def test_parquet_is_what_arrow_reads(rows: list[tuple[str, str]], kind: Any, group: int) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "in.parquet"
        columns = zip(NAMES, zip(*rows, strict=True), strict=True)
        table = pa.table({name: pa.array(cells, pa.string()).cast(kind) for name, cells in columns})
        parquet.write_table(table, path, row_group_size=group)
        assert both(path, 2) == rows


@pytest.mark.parametrize("label", LABELS)
def test_pandas_reads_the_answers_in_csv(tmp_path: Path, label: str) -> None:
    """A bare ``\\r`` is quoted in what is added, whatever ``csv`` of this Python does."""
    path = tmp_path / "in.csv"
    path.write_bytes(b'text,other\n"a\rb","c""\r\nd"\r\n\r\n007,1e5\n')
    (file,) = find_inputs(str(path))
    blocks = blocks_of("in.csv")
    layout = Layout(NAMES, ("text",), ("p\r_label", "score", "ok", "labels"), Dialect())
    with closing(blocks.Reader(file.url, layout)) as reader:
        (block,) = blocks.survey(file, 10).blocks
        rows = reader.read(block)
    several = np.empty(2, dtype=object)
    several[:] = [["é", label], []]
    answers = {
        "p\r_label": np.array([label] * 2),
        "score": np.array([0.1, np.nan]),
        "ok": np.array([True, False]),
        "labels": several,
    }
    written = blocks.write(rows, [0, 1], layout, answers)
    found = pd.read_csv(io.BytesIO(written), **AS_THEY_ARE)
    assert list(found.columns) == ["text", "other", "p\r_label", "score", "ok", "labels"]
    assert found["text"].tolist() == ["a\rb", "007"]
    assert found["other"].tolist() == ['c"\r\nd', "1e5"]
    assert found["p\r_label"].tolist() == [label] * 2
    assert found["score"].tolist() == ["0.1", "NaN"]
    assert found["ok"].tolist() == ["true", "false"]


SPARK = b'text,label\nplain,a\n"he said \\"never, dull\\" to me",b\n"ends \\"so\\"",a\n'


def refusal(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        list(formats.read_rows(path, ("text", "label")))
    return caught.value


def test_what_spark_wrote_is_refused_with_a_cure_that_works(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(SPARK)
    error = refusal(path)
    assert error.message.startswith(f"{path}, line 3: not CSV: ")
    assert "data.csv_quotes=backslash" in error.hint
    rows = [row for _, row in formats.read_rows(path, ("text", "label"), "backslash")]
    assert [row["text"] for row in rows] == ["plain", 'he said "never, dull" to me', 'ends "so"']
    assert [row["label"] for row in rows] == ["a", "b", "a"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_the_one_that_shows_the_columns(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "in.csv"
    others = "".join(set(",;|") - {delimiter})
    path.write_text(f"text{delimiter}other\nso{others} so{delimiter}x\n")
    assert for_training(path) == for_scoring(path, 1) == [(f"so{others} so", "x")]


def test_a_header_with_two_delimiters_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("text,a|text\n1,2|3\n")
    with pytest.raises(DataError, match="the columns text with a bar or a comma as the delimiter"):
        list(formats.read_rows(path, ("text",)))
    with pytest.raises(DataError, match="no column 'other'"):
        for_training(path)
    (file,) = find_inputs(str(path))
    with pytest.raises(DataError, match="with a bar or a comma as the delimiter"):
        blocks_of(file.url).survey(file, 10, ("text",), "doubled")
    ((_, row),) = formats.read_rows(path, ("a|text",))
    assert row == {"text": "1", "a|text": "2|3"}


def test_tsv_with_quoting_is_refused_with_a_cure_that_works(tmp_path: Path) -> None:
    path = tmp_path / "in.tsv"
    path.write_text('"text"\t"label"\n"so, so"\t"x"\n')
    error = refusal(path)
    assert "found names in quotation marks" in error.message
    with pytest.raises(DataError, match="found names in quotation marks"):
        for_scoring(path, 100)
    assert "end in .csv" in error.hint
    ((_, row),) = formats.read_rows(path.rename(tmp_path / "in.csv"), ("text", "label"))
    assert row == {"text": "so, so", "label": "x"}


def test_one_column_is_a_table_too(tmp_path: Path) -> None:
    for name, content in (("in.csv", "a text\nb;c\n"), ("in.tsv", 'a "text"\nb;c\n')):
        (tmp_path / name).write_text(content)
        ((_, row),) = formats.read_rows(tmp_path / name, ())
        assert list(row.values()) == ["b;c"]


@pytest.mark.parametrize(
    ("content", "expected", "cure"),
    [
        (
            b'text,label\na,x\n"b,x\nc,y\n"d,y\n',
            "line 3: not CSV: .* 3 lines long.*never closed",
            "close each quotation mark",
        ),
        (b'text,label\na,x\n"b,x\n', "line 3: not CSV: unexpected end.*never closed", "close each"),
        (b'text,label\n"a" b,x\n', "line 2: not CSV: ',' expected after", "close each"),
        (b"text,label\ra,x\rb,y\r", "line 1: not CSV: new-line", "end lines with"),
        (b"text,label\na,x,1\n", r"line 2: expected 2 fields \(text, label\), found 3", "correct"),
        ("text,label\né,x\n".encode("latin1"), "line 2: not UTF-8: byte 0xe9", "iconv -f latin1"),
        (
            "\ufefftext,label\n".encode("utf-16-le"),
            "line 1: not UTF-8: byte 0xff",
            "iconv -f utf-16",
        ),
        (
            b"text,label\n" + b"a" * 2**21 + b",x\n",
            "line 2: not CSV: field larger than field limit",
            "cells that long need JSON lines or Parquet",
        ),
        (b"text,text\na,b\n", "line 1: the column 'text' appears twice", "names the columns"),
        (b"", "is empty", "first line"),
    ],
)
def test_a_file_is_refused_by_line(
    tmp_path: Path, content: bytes, expected: str, cure: str
) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=expected) as caught:
        list(formats.read_rows(path, ("text", "label")))
    assert cure in caught.value.hint


def test_other_formats_are_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "in.tsv"
    path.write_bytes(b"text\tlabel\na\rb\tx\n")
    assert "line 2: not TSV: a carriage return" in refusal(path).message
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "a", "label": "x"}\n\n{"text": "b", "text": "c", "label": "x"}\n')
    assert "line 3: the key 'text' appears twice" in refusal(path).message
    path = tmp_path / "in.parquet"
    parquet.write_table(pa.table({"text": ["a"], "label": ["x"]}).rename_columns(["a", "a"]), path)
    assert "the column 'a' appears twice" in refusal(path).message


def test_parquet_of_training_reads_what_it_needs(tmp_path: Path) -> None:
    """Not a date that Python does not know; and bytes that are no text are refused by row."""
    path = tmp_path / "in.parquet"
    far = pa.array([2**45, 0], pa.int64()).cast(pa.timestamp("s"))
    raw = pa.array([b"fine", b"caf\xe9"], pa.binary())
    broken = pa.StringArray.from_buffers(2, *raw.buffers()[1:])
    parquet.write_table(pa.table({"far": far, "text": ["a", "b"], "label": broken}), path)
    assert [row["text"] for _, row in formats.read_rows(path, ("text",))] == ["a", "b"]
    with pytest.raises(DataError, match=r"in\.parquet, row 2: not UTF-8: byte 0xe9"):
        list(formats.read_rows(path, ("text", "label")))
    with pytest.raises(DataError, match=r"cannot read the column 'far' \(timestamp\[ms\]\)"):
        list(formats.read_rows(path, ("far",)))
    with pytest.raises(DataError, match=r"no column 'txt' \(did you mean 'text'\?\)"):
        list(formats.read_rows(path, ("txt",)))


def test_a_link_to_nothing_is_called_so(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.symlink_to(tmp_path / "gone.csv")
    assert refusal(path).message == f"{path} is a link to nothing"


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_texts_line_by_line(tmp_path: Path, ends: str) -> None:
    texts = ["first \u2028 text", "\ufeffinner", "a\x85b\x0bc\x0cd\x1ce", "last"]
    path = tmp_path / "more.txt"
    path.write_text("\ufeff" + f"{ends}{ends}".join(texts), encoding="utf-8", newline="")
    found = list(formats.read_rows(path, ("text",)))
    assert [row["text"] for _, row in found] == texts
    assert [str(place) for place, _ in found] == [f"{path}, line {n}" for n in (1, 3, 5, 7)]


def test_the_lines_are_the_same_in_a_block_and_in_the_survey() -> None:
    """A cell ends an unclosed quotation mark at the same line, however it is decoded."""
    text = '"' + "é" * 1000 + "\n"
    for raw in (text.encode(), text.encode("latin1")):
        decoded = Lines(io.BytesIO(raw + ("é" * 1000 + "\n").encode() * 1100 + b"a,b\n"))
        rows = text_files.checked_rows(decoded, Dialect(), ("a", "b"), decoded)
        (first, end, _, error), *_, last = rows
        assert (first, end) == (0, 1048)
        assert error.endswith("is a quotation mark never closed?")
        assert last == (1101, 1102, ["a", "b"], "")
