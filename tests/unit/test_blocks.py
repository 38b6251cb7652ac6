"""Blocks: every row once whatever their size, bad ones by number and reason, columns kept."""

from __future__ import annotations

import csv
import datetime as dt
import io
import json
from contextlib import closing
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from ad2kit import parquet_blocks, text_blocks
from ad2kit.blocks import Layout, Rows, find_inputs, layout_of, suffix_of
from ad2kit.errors import DataError
from ad2kit.scoring import format_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CSV = (
    '\ufeffid,text\r\n1,plain\r\n\r\n2,"two\r\nlines, and a ""quotation"""\r\n3,café\u2028 \r\n'
    '4,"",\r\n5,wide,r\r\n6,"never\nclosed"x\n7,last'
).encode()
TEXTS = ["plain", 'two\r\nlines, and a "quotation"', "café\u2028 ", "last"]
ANSWERS = {"label": np.array(["good"]), "score": np.array([0.5]), "truncated": np.array([False])}


def read_all(path: Path, block_rows: int) -> list[Rows]:
    (file,) = find_inputs(str(path))
    tables = format_of(suffix_of(file.url))
    survey = tables.survey(file, block_rows)
    layout = Layout(survey.columns, ("text",), tuple(ANSWERS))
    with closing(tables.Reader(file.url, layout)) as reader:
        found = [reader.read(block) for block in survey.blocks]
    for block, rows in zip(survey.blocks, found, strict=True):
        assert len(rows.places) + len(rows.bad) == block.rows <= block_rows
    return found


def texts(found: list[Rows]) -> list[Any]:
    return [text for rows in found for (text,) in rows.texts]


def bad(found: list[Rows]) -> list[tuple[int, int | None, str]]:
    return [(row.row, row.line, row.reason) for rows in found for row in rows.bad]


@pytest.mark.parametrize("block_rows", [1, 2, 3, 100])
def test_csv_is_the_same_in_blocks_of_any_size(tmp_path: Path, block_rows: int) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(CSV)
    found = read_all(path, block_rows)
    assert texts(found) == TEXTS
    places = [place for rows in found for place in rows.places]
    assert places == [(1, 2), (2, 4), (3, 6), (7, 11)]
    assert bad(found) == [
        (4, 7, "expected 2 fields (id, text), found 3"),
        (5, 8, "expected 2 fields (id, text), found 3"),
        (6, 9, "not CSV: ',' expected after '\"', 2 lines long: is a quotation mark never closed?"),
    ]  # fmt: skip


def test_a_quotation_mark_that_is_never_closed_takes_no_more_than_its_part(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(b'text\nfirst\n"open\n' + b"line\n" * 300_000 + b"\xff\nlast\n")
    found = read_all(path, 50_000)
    assert texts(found)[0] == "first"
    assert texts(found)[-1] == "last"
    first, second = bad(found)
    assert first[:2] == (2, 3)
    assert first[2] == (
        "not CSV: field larger than field limit (1048576), 209716 lines long: "
        "is a quotation mark never closed?"
    )
    assert second == (second[0], 300_004, "not UTF-8: byte 0xff")


def test_a_quotation_mark_that_the_end_of_the_file_leaves_open_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(b'text\n"open')
    assert bad(read_all(path, 1)) == [
        (1, 2, "not CSV: unexpected end of data: is a quotation mark never closed?")
    ]


def test_tsv_has_no_quoting(tmp_path: Path) -> None:
    path = tmp_path / "in.tsv"
    path.write_bytes(b'text\tid\r\na "quoted\t1\r\n\r\n\t2\r\nthree\tfields\there\n')
    found = read_all(path, 2)
    assert texts(found) == ['a "quoted', ""]
    assert bad(found) == [(3, 5, "expected 2 fields (text, id), found 3")]
    layout = Layout(("text", "id"), ("text",), tuple(ANSWERS))
    assert text_blocks.write(found[0], [0], layout, ANSWERS).decode() == (
        'text\tid\tlabel\tscore\ttruncated\na "quoted\t1\tgood\t0.5\tfalse\n'
    )


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = [
        b'{"text": "a\xe2\x80\xa8b", "n": [1234567890123456789, 1e400, 0.10], \r"x": "\\u00e9" }  ',
        b"", b'{"text": "half', b"[1]", b'{"other": 1}', b'{"text": "\\ud800"}',
        b'{"text": "caf\xe9"}', b'{"text": "twice", "label": 1}', b"[" * 100_000, b'{"text": 3}',
    ]  # fmt: skip
    path.write_bytes(b"\n".join(lines))
    for found in (read_all(path, 1), read_all(path, 4), whole := read_all(path, 100)):
        assert texts(found) == ["a\u2028b", None, 3]
        refused = bad(found)
        assert [place[:2] for place in refused] == [(2, 3), (3, 4), (5, 6), (6, 7), (7, 8), (8, 9)]
        for (_, _, reason), expected in zip(
            refused,
            ("not JSON: Unterminated", "expected a JSON object, found list", "half a surrogate",
             "not UTF-8", "has a 'label' already", "not JSON: maximum recursion"),
            strict=True,
        ):  # fmt: skip
            assert expected in reason
    layout = Layout(("text",), ("text",), tuple(ANSWERS))
    written = text_blocks.write(whole[0], [0], layout, ANSWERS)
    answers = b', "label": "good", "score": 0.5, "truncated": false}\n'
    assert written == lines[0].removesuffix(b" }  ").replace(b"\r", b" ") + answers


def test_a_byte_limit_ends_a_block_of_long_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_blocks, "_BLOCK_BYTES", 100)
    path = tmp_path / "in.csv"
    path.write_text("text\n" + "x" * 150 + "\n" + "y\n" * 60)
    assert [len(rows.places) for rows in read_all(path, 1000)] == [1, 50, 10]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Parquet with types that text has no words for, in row groups of 7."""
    count = 40
    when = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    names = pa.array([f"text {n}" if n % 5 else None for n in range(count)])
    columns = {
        "text": names.dictionary_encode(),
        "when": pa.array([when] * count, pa.timestamp("ns", "UTC")),
        "deep": pa.array([{"x": [n]} for n in range(count)]),
        "large": pa.array([f"{n}" for n in range(count)], pa.large_string()),
    }
    parquet.write_table(pa.table(columns), tmp_path / "in.parquet", row_group_size=7)
    return tmp_path / "in.parquet"


@pytest.mark.parametrize("block_rows", [1, 6, 7, 8, 39, 1000])
def test_parquet_is_the_same_in_blocks_of_any_size(table: Path, block_rows: int) -> None:
    found = read_all(table, block_rows)
    assert texts(found) == [f"text {n}" if n % 5 else None for n in range(40)]
    assert [place for rows in found for place in rows.places] == [(n, None) for n in range(1, 41)]
    kept = pa.concat_tables([rows.kept for rows in found], promote_options="permissive")
    assert kept.column("deep").to_pylist() == [{"x": [n]} for n in range(40)]


def test_parquet_keeps_its_types_and_a_block_without_answers_has_them_too(table: Path) -> None:
    (rows,) = read_all(table, 1000)
    layout = Layout(tuple(rows.kept.schema.names), ("text",), tuple(ANSWERS))
    whole = pa.BufferReader(parquet_blocks.write(rows, [3], layout, ANSWERS))
    nothing = {name: values[:0] for name, values in ANSWERS.items()}
    empty = pa.BufferReader(parquet_blocks.write(rows, [], layout, nothing))
    one, none = parquet.read_table(whole), parquet.read_table(empty)
    assert one.schema == none.schema
    assert (one.num_rows, none.num_rows) == (1, 0)
    assert one.schema.names == ["text", "when", "deep", "large", "label", "score", "truncated"]
    assert one.schema.field("when").type == pa.timestamp("ns", "UTC")
    assert one.to_pylist()[0]["deep"] == {"x": [3]}
    assert one.to_pylist()[0]["label"] == "good"


def test_bytes_that_are_not_utf8_in_parquet_are_no_crash(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"caf\xe9"]).view(pa.binary()).cast(pa.binary())
    column = pa.StringArray.from_buffers(2, *raw.buffers()[1:])
    parquet.write_table(pa.table({"text": column}), tmp_path / "in.parquet")
    assert texts(read_all(tmp_path / "in.parquet", 10)) == ["fine", "caf\udce9"]


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "in.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(DataError, match=r"in\.parquet is not a readable Parquet file"):
        read_all(tmp_path / "in.parquet", 10)


def test_a_parquet_file_that_is_gone_is_not_called_damaged(tmp_path: Path) -> None:
    layout = Layout(("text",), ("text",), ())
    for url in (str(tmp_path / "in.parquet"), "memory://gone.parquet"):
        with pytest.raises(FileNotFoundError):
            parquet_blocks.Reader(url, layout)


def test_a_folder_a_glob_and_a_url(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "_job.json", ".hidden.tsv", "deep/c.csv", "_errors/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text\nx\n")
    expected = [str(tmp_path / name) for name in ("a.csv", "b.csv", "deep/c.csv")]
    for reference in (str(tmp_path), f"file://{tmp_path}", f"{tmp_path}/"):
        assert [file.url for file in find_inputs(reference)] == expected
    assert [file.url for file in find_inputs(f"{tmp_path}/*.csv")] == expected[:2]
    (file,) = find_inputs(expected[0])
    assert file.size_bytes == 7
    (tmp_path / "a[1].csv").write_text("text\nx\n")
    assert len(find_inputs(f"{tmp_path}/a[1].csv")) == 1


@pytest.fixture
def memory() -> Iterator[Any]:
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()


def test_another_version_of_a_file_is_another_file(tmp_path: Path, memory: Any) -> None:
    path = tmp_path / "in.csv"
    path.write_text("text\nx\n")
    before = find_inputs(str(path))
    path.write_text("text\ny\n")
    assert find_inputs(str(path)) != before
    memory.pipe_file("/in/a.csv", b"text\nx\n")
    before = find_inputs("memory://in")
    assert [file.url for file in before] == ["memory:///in/a.csv"]
    assert find_inputs("memory://in/*.csv") == before
    memory.pipe_file("/in/a.csv", b"text\ny\n")
    assert find_inputs("memory://in") != before


@pytest.mark.parametrize(
    ("files", "reference", "expected"),
    [
        ([], "", "no file '"),
        (["a.csv", "b.tsv"], "", r"expected files of one format .*found a\.csv, b\.tsv"),
        (["a.csv", "readme.md"], "", r"found a\.csv, readme\.md"),
        (["a.csv.gz"], "a.csv.gz", r"found a\.csv\.gz"),
        (["a.csv"], "nothing/*.csv", "no file '"),
    ],
)
def test_what_is_no_input_is_named(
    tmp_path: Path, files: list[str], reference: str, expected: str
) -> None:
    for name in files:
        (tmp_path / name).write_text("text\nx\n")
    with pytest.raises(DataError, match=expected):
        find_inputs(f"{tmp_path}/{reference}")


@pytest.mark.parametrize(
    ("address", "expected"),
    [("nowhere://x", "Protocol not known: nowhere"), ("s3://bucket/x", "Install s3fs")],
)
def test_an_address_without_a_driver_is_named(address: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        find_inputs(address)


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (["id\n1\n"], "no column 'text'; columns: id"),
        (["txt\n1\n"], r"no column 'text' \(did you mean 'txt'\?\)"),
        (["text,label\na,b\n"], "has a column 'label' already"),
        (["text,id\na,b\n", "id,text\na,b\n"], "1.csv has other columns than .*0.csv"),
        (["text\n", "text\n\n"], "no rows in"),
        ([""], "is empty"),
        (["text,text\na,b\n"], "the column 'text' appears twice"),
        (['"open\n'], "line 1: not CSV: unexpected end of data"),
        (["caf\udce9,text\na,b\n"], "line 1: not UTF-8"),
    ],
)
def test_columns_are_looked_at_before_anything_is_scored(
    tmp_path: Path, contents: list[str], expected: str
) -> None:
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=expected):
        layout_of(
            {file.url: text_blocks.survey(file, 10) for file in find_inputs(str(tmp_path))},
            ("text",), ("label", "score"),
        )  # fmt: skip


def test_a_column_of_numbers_holds_no_texts(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "in.parquet")
    (file,) = find_inputs(str(tmp_path))
    with pytest.raises(DataError, match=r"expected texts in the column 'text', found text \(int64"):
        layout_of({file.url: parquet_blocks.survey(file, 10)}, ("text",), ("label",))


def test_json_lines_without_an_object_show_no_columns(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("1\n2\n")
    (file,) = find_inputs(str(tmp_path))
    with pytest.raises(DataError, match="none of its lines is a JSON object with a key"):
        text_blocks.survey(file, 10)


def test_what_csv_writes_csv_reads(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(CSV)
    (rows,) = read_all(path, 100)
    layout = Layout(("id", "text"), ("text",), ("labels",))
    named = np.empty(2, dtype=object)
    named[:] = [["a", 'b"'], []]
    written = text_blocks.write(rows, [0, 1], layout, {"labels": named}).decode()
    found = list(csv.DictReader(io.StringIO(written, newline=""), strict=True))
    assert [row["text"] for row in found] == TEXTS[:2]
    assert [json.loads(row["labels"]) for row in found] == [["a", 'b"'], []]
