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

from ad2kit.run.errors import DataError
from ad2kit.scoring import arrow_blocks, text_blocks
from ad2kit.scoring.blocks import (
    Layout,
    Rows,
    check_partition_columns,
    find_inputs,
    layout_of,
)
from ad2kit.scoring.parts import blocks_of
from ad2kit.tables.text_files import TSV, Dialect

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
    tables = blocks_of(file.url)
    survey = tables.survey(file, block_rows)
    layout = Layout(survey.columns, ("text",), tuple(ANSWERS), survey.dialect)
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
    ]


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
    layout = Layout(("text", "id"), ("text",), tuple(ANSWERS), TSV)
    assert text_blocks.write(found[0], [0], layout, ANSWERS).decode() == (
        'text\tid\tlabel\tscore\ttruncated\na "quoted\t1\tgood\t0.5\tfalse\n'
    )


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = [
        b'{"text": "a\xe2\x80\xa8b", "n": [1234567890123456789, 1e400, 0.10], \r"x": "\\u00e9" }  ',
        b"",
        b'{"text": "half',
        b"[1]",
        b'{"other": 1}',
        b'{"text": "\\ud800"}',
        b'{"text": "caf\xe9"}',
        b'{"text": "twice", "label": 1}',
        b"[" * 100_000,
        b'{"text": 3}',
    ]
    path.write_bytes(b"\n".join(lines))
    for found in (read_all(path, 1), read_all(path, 4), whole := read_all(path, 100)):
        assert texts(found) == ["a\u2028b", None, 3]
        refused = bad(found)
        assert [place[:2] for place in refused] == [(2, 3), (3, 4), (5, 6), (6, 7), (7, 8), (8, 9)]
        for (_, _, reason), expected in zip(
            refused,
            (
                "not JSON: Unterminated",
                "expected a JSON object, found list",
                "half a surrogate",
                "not UTF-8",
                "has a 'label' already",
                "not JSON: maximum recursion",
            ),
            strict=True,
        ):
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
    whole = pa.BufferReader(arrow_blocks.write(rows, [3], layout, ANSWERS))
    nothing = {name: values[:0] for name, values in ANSWERS.items()}
    empty = pa.BufferReader(arrow_blocks.write(rows, [], layout, nothing))
    one, none = parquet.read_table(whole), parquet.read_table(empty)
    assert one.schema == none.schema
    assert (one.num_rows, none.num_rows) == (1, 0)
    assert one.schema.names == ["text", "when", "deep", "large", "label", "score", "truncated"]
    assert one.schema.field("when").type == pa.timestamp("ns", "UTC")
    assert one.to_pylist()[0]["deep"] == {"x": [3]}
    assert one.to_pylist()[0]["label"] == "good"


def test_rows_can_be_left_out_whatever_the_types_of_the_columns(tmp_path: Path) -> None:
    """``take`` knows neither string_view nor its like."""
    cells = [f"text {n}" if n != 1 else None for n in range(5)]
    columns = {
        "text": pa.array(cells, pa.string_view()),
        "bytes": pa.array([b"x"] * 5, pa.binary_view()),
        "tags": pa.array([[1]] * 5, pa.list_view(pa.int64())),
    }
    parquet.write_table(pa.table(columns), tmp_path / "in.parquet", row_group_size=2)
    (rows,) = read_all(tmp_path / "in.parquet", 100)
    assert texts([rows]) == cells
    layout = Layout(tuple(columns), ("text",), ("label",))
    for good in ([0, 2, 4], [0, 2, 3], [2], [0, 1, 2, 3, 4]):
        labels = {"label": np.array([f"{n}" for n in good])}
        written = parquet.read_table(
            pa.BufferReader(arrow_blocks.write(rows, good, layout, labels))
        )
        assert written.column("text").to_pylist() == [cells[n] for n in good]
        assert written.column("label").to_pylist() == [f"{n}" for n in good]
        assert written.schema.types[:3] == rows.kept.schema.types


def test_a_row_group_is_decoded_once_and_a_part_is_the_same_whatever_was_read_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in.parquet"
    columns = {
        "text": pa.array([f"text {n % 400}" for n in range(6000)]).dictionary_encode(),
        "view": pa.array([f"{n}" * (n % 7) for n in range(6000)], pa.string_view()),
    }
    parquet.write_table(pa.table(columns), path, row_group_size=2500, dictionary_pagesize_limit=99)
    decoded, plain = list[int](), parquet.ParquetFile.iter_batches

    def counted(self: Any, *arguments: Any, row_groups: list[int], **more: Any) -> Any:
        decoded.extend(row_groups)
        return plain(self, *arguments, row_groups=row_groups, **more)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counted)
    (file,) = find_inputs(str(path))
    blocks, layout = arrow_blocks.survey(file, 300).blocks, Layout(tuple(columns), ("text",), ())

    def parts(*orders: list[int]) -> dict[int, set[bytes]]:
        found: dict[int, set[bytes]] = {number: set() for number in range(len(blocks))}
        for order in orders:
            with closing(arrow_blocks.Reader(file.url, layout)) as reader:
                for number in order:
                    rows = reader.read(blocks[number])
                    found[number].add(arrow_blocks.write(rows, range(len(rows.places)), layout, {}))
        return found

    numbers = list(range(len(blocks)))
    alone = parts(numbers)
    assert decoded == [0, 1, 2]
    decoded.clear()
    shared = parts(numbers[::2], numbers[1::2])
    # One block reaches from the second group into the third: who has not read it starts a group.
    assert sorted(decoded) == [0, 0, 1, 1, 2, 2]
    assert alone == shared == parts(numbers[::-1]) == parts(*[[number] for number in numbers])
    assert {len(each) for each in alone.values()} == {1}


def test_a_link_to_nothing_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("text\nx\n")
    (tmp_path / "in" / "b.csv").symlink_to(tmp_path / "gone.csv")
    for reference in ("in", "in/*.csv"):
        with pytest.raises(DataError, match=r"in/b\.csv is a link to nothing"):
            find_inputs(str(tmp_path / reference))


def test_a_column_that_lies_in_the_names_of_folders_is_not_lost(tmp_path: Path) -> None:
    def look(reference: str) -> None:
        files = find_inputs(str(tmp_path / reference))
        surveys = {file.url: text_blocks.survey(file, 10) for file in files}
        check_partition_columns(str(tmp_path / reference), surveys)

    for day in (1, 2):
        folder = tmp_path / "in" / f"dt=2026-01-0{day}" / "hour=7"
        folder.mkdir(parents=True)
        (folder / "part.csv").write_text("text,hour\nx,7\n")
    for reference in ("in", "in/*/*/*.csv"):
        with pytest.raises(
            DataError, match="folder dt=2026-01-01, and has no column 'dt'"
        ) as caught:
            look(reference)
        words = caught.value.hint.split("`")[1].split()
        assert words[:2] == ["ad2kit", "score"]
        assert words[3] == "OUTPUT/dt=2026-01-01/hour=7"
        look(words[2])  # the cure works
    look("in/dt=2026-01-01")
    look("in/dt=2026-01-01/hour=7/part.csv")


def test_the_second_file_of_a_glob_has_its_bom_removed_too(tmp_path: Path) -> None:
    for suffix, content in (("csv", '"text"\nx\n'), ("jsonl", '{"text": "x"}\n')):
        for name in ("a", "b"):
            (tmp_path / f"{name}.{suffix}").write_text(f"\ufeff{content}", encoding="utf-8")
        for file in find_inputs(f"{tmp_path}/*.{suffix}"):
            survey = text_blocks.survey(file, 10)
            assert survey.columns == ("text",)
            layout = Layout(("text",), ("text",), (), survey.dialect)
            with closing(text_blocks.Reader(file.url, layout)) as reader:
                assert [reader.read(block).texts for block in survey.blocks] == [[("x",)]]


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
            arrow_blocks.Reader(url, layout)


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
        (["a.csv.zip"], "a.csv.zip", r"found a\.csv\.zip"),
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
            ("text",),
            ("label", "score"),
        )


def test_a_column_of_numbers_holds_no_texts(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "in.parquet")
    (file,) = find_inputs(str(tmp_path))
    with pytest.raises(DataError, match=r"expected texts in the column 'text', found text \(int64"):
        layout_of({file.url: arrow_blocks.survey(file, 10)}, ("text",), ("label",))


def test_json_lines_without_an_object_show_no_columns(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("1\n2\n")
    (file,) = find_inputs(str(tmp_path))
    with pytest.raises(DataError, match="none of its lines is a JSON object with a key"):
        text_blocks.survey(file, 10)


def test_what_csv_writes_csv_reads(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(CSV)
    (rows,) = read_all(path, 100)
    layout = Layout(("id", "text"), ("text",), ("labels",), Dialect())
    named = np.empty(2, dtype=object)
    named[:] = [["a", 'b"'], []]
    written = text_blocks.write(rows, [0, 1], layout, {"labels": named}).decode()
    found = list(csv.DictReader(io.StringIO(written, newline=""), strict=True))
    assert [row["text"] for row in found] == TEXTS[:2]
    assert [json.loads(row["labels"]) for row in found] == [["a", 'b"'], []]
