"""Every shape of a table that data teams have is read as other libraries read it.

Hypothesis makes the rows, another library writes them, and all readers must have the same rows.
"""

from __future__ import annotations

import csv
import errno
import gzip
import io
import json
import re
import tarfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import datasets
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from ad2kit.data.mapped import kept
from ad2kit.data.sources import open_unlabelled
from ad2kit.data.splits import load_data
from ad2kit.run.errors import DataError, RunError
from ad2kit.run.sections import DataRecipe
from ad2kit.scoring.blocks import Layout, find_inputs
from ad2kit.scoring.parts import blocks_of
from ad2kit.tables import formats
from ad2kit.tables.rows import BadRows
from tests import spark
from tests.unit.test_text_rows import AS_THEY_ARE, CELL, NAMES, PLAIN_CELL, for_scoring

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Shape:
    """How a table is written and read by others; ``cells`` may hold what its format can hold."""

    name: str
    write: Callable[[Path, pd.DataFrame], object]
    read: Callable[[Path], pd.DataFrame] | None
    cells: st.SearchStrategy[str] = CELL
    quotes: Any = "doubled"
    examples: int = 12


def text_of(path: Path) -> io.BytesIO:
    """The content of a file, decompressed by Arrow."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pa.input_stream(str(path), compression=compression) as stream:
        return io.BytesIO(stream.read())


def compressed(path: Path, content: bytes) -> None:
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pa.output_stream(str(path), compression=compression) as stream:
        stream.write(content)


def csv_shape(name: str, sep: str, quoting: Any = csv.QUOTE_MINIMAL) -> Shape:
    def write(path: Path, frame: pd.DataFrame) -> None:
        compressed(path, frame.to_csv(sep=sep, index=False, quoting=quoting).encode())

    return Shape(
        name, write, lambda path: pd.read_csv(text_of(path), sep=sep, **AS_THEY_ARE), PLAIN_CELL
    )


def spark_csv(path: Path, frame: pd.DataFrame) -> None:
    """As Spark writes it: a cell with the delimiter or a mark is quoted, and escaped if quoted."""

    def cell(value: str) -> str:
        if not set(value) & set('",\n\r'):
            return value
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'

    lines = [",".join(map(cell, row)) for row in (NAMES, *frame.itertuples(index=False, name=None))]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="")


def json_shape(name: str, *, lines: bool, indent: int | None = None) -> Shape:
    def write(path: Path, frame: pd.DataFrame) -> None:
        rows = frame.to_dict(orient="records")
        content = json.dumps(rows, indent=indent, ensure_ascii=False)
        if lines:
            content = "".join(f"{json.dumps(row)}\n" for row in rows)
        compressed(path, content.encode())

    def read(path: Path) -> pd.DataFrame:
        return pd.read_json(text_of(path), dtype=False, lines=lines)

    return Shape(name, write, read)


def parquet_shape(kind: Any) -> Shape:
    schema = pa.schema([(name, kind) for name in NAMES])

    def write(path: Path, frame: pd.DataFrame) -> None:
        table = pa.Table.from_pandas(frame, pa.schema([(n, pa.string()) for n in NAMES]))
        parquet.write_table(table.cast(schema), path, row_group_size=2)

    return Shape(f"{kind}.parquet", write, lambda path: parquet.read_table(path).to_pandas())


def parts(frame: pd.DataFrame) -> Iterator[tuple[int, pd.DataFrame]]:
    """Two parts, of which the second may be empty."""
    half = (len(frame) + 1) // 2
    yield 0, frame.iloc[:half]
    yield 1, frame.iloc[half:]


def spark_folder(path: Path, frame: pd.DataFrame) -> None:
    path.mkdir()
    (path / "_SUCCESS").touch()
    (path / ".part-00000.crc").touch()
    for number, part in parts(frame):
        part.to_parquet(path / f"part-{number:05}-c000.snappy.parquet", index=False)


def csv_folder(path: Path, frame: pd.DataFrame) -> None:
    path.mkdir()
    (path / "_SUCCESS").touch()
    for number, part in parts(frame):
        compressed(path / f"part-{number:05}.csv.gz", part.to_csv(index=False).encode())


def read_csv_folder(path: Path) -> pd.DataFrame:
    frames = [
        pd.read_csv(text_of(part), **AS_THEY_ARE) for part in sorted(path.glob("part-*.csv.gz"))
    ]
    return pd.concat(frames)


def shards(path: Path, frame: pd.DataFrame) -> None:
    for number, part in parts(frame):
        part.to_parquet(path.with_name(f"in-{number:05}-of-00002.parquet"), index=False)


def read_shards(path: Path) -> pd.DataFrame:
    files = [
        str(each)
        for each in sorted(path.parent.glob("in-*.parquet"))
        if parquet.read_metadata(each).num_rows  # datasets cannot read an empty file
    ]
    return datasets.Dataset.from_parquet(files, keep_in_memory=True).to_pandas()


def saved(path: Path, frame: pd.DataFrame) -> None:
    rows = datasets.Dataset.from_pandas(frame, preserve_index=False)
    rows.save_to_disk(path, num_shards=min(2, len(frame)))


SHAPES = [
    *(csv_shape(f"in{number}.csv", sep) for number, sep in enumerate(",;\t|")),
    csv_shape("all.csv", ";", csv.QUOTE_ALL),
    csv_shape("in.csv.gz", ","),
    csv_shape("in.csv.zst", ";"),
    Shape("spark.csv", spark_csv, None, PLAIN_CELL, "backslash", 40),
    json_shape("in.jsonl", lines=True),
    json_shape("in.ndjson", lines=True),
    json_shape("in.ndjson.gz", lines=True),
    json_shape("in.jsonl.zst", lines=True),
    json_shape("in.json", lines=False),
    json_shape("indented.json", lines=False, indent=2),
    json_shape("in.json.gz", lines=False),
    json_shape("lines.json", lines=True),
    parquet_shape(pa.string()),
    parquet_shape(pa.large_string()),
    parquet_shape(pa.string_view()),
    parquet_shape(pa.dictionary(pa.int32(), pa.string())),
    Shape("spark", spark_folder, lambda path: parquet.read_table(path).to_pandas()),
    Shape("parts", csv_folder, read_csv_folder, PLAIN_CELL),
    Shape("in-*-of-00002.parquet", shards, read_shards, examples=4),
    Shape("saved", saved, lambda path: datasets.load_from_disk(path).to_pandas(), examples=4),
]


def rows_of(frame: pd.DataFrame) -> Rows:
    return list(frame.itertuples(index=False, name=None))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_all_readers_have_the_same_rows(shape: Shape) -> None:
    cells = st.lists(st.tuples(shape.cells, shape.cells), min_size=1, max_size=5)

    @settings(max_examples=shape.examples, deadline=None)
    @given(rows=cells, block_rows=st.integers(1, 3))
    def check(rows: Rows, block_rows: int) -> None:
        with TemporaryDirectory() as folder:
            path = Path(folder) / shape.name
            shape.write(path, pd.DataFrame(rows, columns=list(NAMES)))
            read = formats.read_rows(path, NAMES, shape.quotes)
            training = [tuple(row[name] for name in NAMES) for _, row in read]
            assert training == rows
            assert for_scoring(path, block_rows, shape.quotes) == rows
            if shape.read is not None:  # Spark is not here
                assert rows_of(shape.read(path)) == rows

    check()


@pytest.fixture(scope="module")
def by_spark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables that Spark has written."""
    (archive,) = spark.FIXTURES.glob("spark-*.tar.xz")
    folder = tmp_path_factory.mktemp("spark")
    with tarfile.open(archive) as content:
        content.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("name", spark.WRITERS)
def test_what_spark_wrote_is_read_as_it_was(by_spark: Path, name: str) -> None:
    form, options = spark.WRITERS[name]
    quotes: Any = "backslash" if form == "csv" and "escape" not in options else "doubled"
    expected: Rows = list(map(tuple, json.loads((by_spark / "rows.json").read_text())))
    assert expected == spark.rows()
    if form == "csv" and "ignoreLeadingWhiteSpace" not in options:
        expected = [(text.strip(" \t"), other) for text, other in expected]
    found = formats.read_rows(by_spark / name, NAMES, quotes)
    assert [tuple(row[name] for name in NAMES) for _, row in found] == expected
    assert for_scoring(by_spark / name, 50, quotes) == expected
    # Another reading of a quotation mark is no table, or is another one.
    if form == "csv":
        other: Any = {"backslash": "doubled", "doubled": "backslash"}[quotes]
        with pytest.raises(DataError, match="not CSV"):
            list(formats.read_rows(by_spark / name, NAMES, other))


@given(content=st.text(st.sampled_from('",\r\n\\ab'), max_size=25), block_rows=st.integers(1, 3))
def test_any_csv_with_backslashes_is_what_pandas_reads_or_refused(
    content: str, block_rows: int
) -> None:
    r"""In quoted cells alone; pandas drops a backslash before any other character: ``\a`` is ``a``.

    It takes ``""`` in a quoted cell for a mark, too, which is refused here.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "in.csv"
        path.write_text(f"text,other\n{content}", encoding="utf-8", newline="")
        found = list[Any]()
        for read in (
            lambda: [tuple(row.values()) for _, row in formats.read_rows(path, NAMES, "backslash")],
            lambda: for_scoring(path, block_rows, "backslash"),
        ):
            try:
                found.append(read())
            except DataError:
                found.append(None)
        assert found[0] == found[1]
        if found[0] and "\\" not in f"{found[0]}".replace("\\\\", "\\"):
            options: dict[str, Any] = {"escapechar": "\\", "doublequote": False}
            frame = pd.read_csv(path, **AS_THEY_ARE, **options)
            assert rows_of(frame) == found[0]


def read_all(path: Path, columns: tuple[str, ...] = ("text",)) -> list[Any]:
    """What training reads: the cells of each row, or the reason why it is bad."""
    return [
        error.message.removeprefix(f"{place}: ") if error else cells["text"]
        for place, cells, error in formats.read(path, columns)
    ]


def test_a_json_array_is_read_element_by_element(tmp_path: Path) -> None:
    """A bad element is a bad row, as a bad line of JSON lines is, for training and scoring."""
    path = tmp_path / "in.json"
    elements = [
        '{"text": "a] , \\"}"}',
        '{"text": "b", "text": "c"}',
        "[1]",
        '{"text":\n "d",\r\n "n": [{}, []]}',
        '{"text": "raw\nline"}',
        "null",
        '{"text": e}',
        "",
        '{"text": "caf\udce9"}',
        '{"text": "f"}',
    ]
    content = f"\ufeff \n [{', '.join(elements)}]\r\n \t"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    found = read_all(path)
    assert found[:2] == ['a] , "}', "the key 'text' appears twice"]
    assert found[2:4] == ["expected a JSON object, found list", "d"]
    assert found[4].startswith("not JSON: Invalid control character")
    assert found[5] == "expected a JSON object, found NoneType"
    assert found[6].startswith("not JSON: ")
    assert found[7].startswith("not JSON: ")
    assert found[8:] == ["not UTF-8: byte 0xe9", "f"]
    (file,) = find_inputs(str(path))
    for block_rows in (1, 3, 100):
        blocks = blocks_of(file.url)
        survey = blocks.survey(file, block_rows, ("text",))
        layout = Layout(survey.columns, ("text",), ("label",), survey.dialect)
        scored: list[Any] = [None] * len(found)
        with closing(blocks.Reader(file.url, layout)) as reader:
            for block in reversed(survey.blocks):
                rows = reader.read(block)
                for place, (text,) in zip(rows.places, rows.texts, strict=True):
                    scored[place[0] - 1] = text
                for bad in rows.bad:
                    scored[bad.row - 1] = bad.reason
                    assert bad.line is None
        assert scored == found


def survey_of(path: Path) -> Any:
    """What `ad2kit score` sees first."""
    (file,) = find_inputs(str(path))
    return blocks_of(file.url).survey(file, 10, ("text",))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("in.json", b'[{"text": "a"}', "the array of objects does not end"),
        ("in.json", b'[{"text": "a}]', "the array of objects does not end"),
        ("in.json", b'[{"text": "a"}] [', "found b'\\[' after the array of objects"),
        ("in.json", b'{"text": {"0": "a"}, "label": {"0": "b"}}', "must be a text with at least"),
        ("in.json", b'{"data": [{"text": "a"}]}', "no column 'text'"),
        ("in.csv.gz", b"text\na\n", "is not a readable gzip file"),
        ("in.csv.gz", gzip.compress(b"text\na\n", mtime=0)[:-4], "is not a readable gzip file"),
        ("in.csv.zst", b"text\na\n", "is not a readable zstd file"),
        ("in.arrow", b"text\na\n", "is not a readable Arrow stream"),
        ("in.parquet.gz", b"", "expected a file that ends in"),
        ("in.zip", b"", "expected a file that ends in"),
    ],
)
def test_what_is_no_table_is_named_by_training_and_scoring(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    recipe = DataRecipe(
        train=str(path),
        validation=str(path),
        text_columns=("text",),
        label_column="label",
        max_length_tokens=8,
    )
    with pytest.raises(DataError, match=expected):
        list(open_unlabelled(str(path), recipe).rows(BadRows()))
    if "column" in expected or "must be" in expected:
        return
    with pytest.raises(DataError, match=expected.replace("a file that ends in", "files of one")):
        survey_of(path)


def test_a_folder_is_one_table_of_one_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for content in ({}, {"a.csv": "text\na\n", "b.jsonl": '{"text": "b"}\n'}):
        for name, text in content.items():
            (folder / name).write_text(text)
        with pytest.raises(DataError, match="expected files of one format, found "):
            list(formats.read_rows(folder, ("text",)))
    (folder / "b.jsonl").rename(folder / "_b.jsonl")
    assert read_all(folder) == ["a"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_all(Path("~/parts")) == read_all(Path("~/parts/a.csv")) == ["a"]
    (folder / "dt=1").mkdir()
    with pytest.raises(DataError, match="it holds the folder dt=1"):
        read_all(folder)


def class_table(path: Path, cells: list[Any], names: list[str], *, several: bool = False) -> None:
    """Write a table whose labels are positions in names that its schema holds."""
    label: Any = datasets.ClassLabel(names=names)
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.List(label) if several else label
    )
    texts = [f"text {number} of {path}" for number in range(len(cells))]
    rows = datasets.Dataset.from_dict({"text": texts, "label": cells}, features)
    if path.suffix:
        rows.to_parquet(path)
    else:
        rows.save_to_disk(path)


def class_source(folder: Path, **changes: Any) -> DataRecipe:
    values: dict[str, Any] = {"text_columns": ("text",), "label_column": "label"}
    values |= {"source": str(folder), "max_length_tokens": 8}
    return DataRecipe(**values | changes)


@pytest.mark.parametrize("suffix", [".parquet", ""])
def test_names_of_classes_come_from_the_schema(tmp_path: Path, suffix: str) -> None:
    for name in ("train", "validation"):
        class_table(tmp_path / f"{name}{suffix}", [0, 1, 1, 2], ["poor", "fair", "1"])
    data = load_data(class_source(tmp_path, select_from="validation"), 1)
    assert (data.labels, data.order_given) == (("poor", "fair", "1"), True)
    assert data.validation.labels.tolist() == [0, 1, 1, 2]
    # The recipe may have another order: the cells are still positions in the names of the table.
    other = class_source(tmp_path, labels=("1", "fair", "poor"), select_from="validation")
    assert load_data(other, 1).validation.labels.tolist() == [2, 1, 1, 0]


def test_names_of_several_classes_and_what_contradicts_them(tmp_path: Path) -> None:
    cells = [[0], [1, 0], [], [1]]
    for name in ("train", "validation"):
        class_table(tmp_path / f"{name}.parquet", cells, ["b", "a"], several=True)
    recipe = class_source(tmp_path, task="multi_label", select_from="validation")
    data = load_data(recipe, 1)
    assert data.labels == ("b", "a")
    assert data.validation.labels.tolist() == [[1, 0], [1, 1], [0, 0], [0, 1]]
    (tmp_path / "labels.txt").write_text("0\ta\n1\tb\n")
    with pytest.raises(DataError, match="names other labels than the column 'label'"):
        load_data(recipe, 1)
    (tmp_path / "labels.txt").write_text("0\tb\n1\ta\n")
    assert load_data(recipe, 1).labels == ("b", "a")
    class_table(tmp_path / "validation.parquet", cells, ["a", "b"], several=True)
    with pytest.raises(DataError, match=r"has other classes in .*: b, a; a, b"):
        load_data(recipe, 1)
    # A table without names holds ids, or names.
    frame = pd.DataFrame({"text": ["w", "x", "y", "z"], "label": [["a"], [0], [], ["b"]]})
    (tmp_path / "validation.parquet").unlink()
    frame.to_json(tmp_path / "validation.jsonl", orient="records", lines=True)
    assert load_data(recipe, 1).validation.labels.tolist() == [[0, 1], [1, 0], [0, 0], [1, 0]]


def refuse_to(monkeypatch: pytest.MonkeyPatch, method: str, name: str) -> None:
    """Let the operating system refuse a method of paths of this name; a superuser may do all."""
    allowed = getattr(Path, method)

    def refused(self: Path, *arguments: Any, **named: Any) -> Any:
        if self.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return allowed(self, *arguments, **named)

    monkeypatch.setattr(Path, method, refused)


def test_a_file_that_may_not_be_read_is_the_users_to_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train", "validation"):
        class_table(tmp_path / f"{name}.parquet", [0, 1, 1, 0], ["b", "a"])
    (tmp_path / "labels.txt").write_text("0\tb\n1\ta\n")
    recipe = class_source(tmp_path, select_from="validation")
    for method, name in (
        ("open", "train.parquet"),
        ("open", "labels.txt"),
        ("iterdir", tmp_path.name),
    ):
        with monkeypatch.context() as patch:
            refuse_to(patch, method, name)
            with pytest.raises(DataError, match=rf"cannot read .*{name}: .*denied") as refused:
                load_data(recipe, 1)
            assert "access rights" in refused.value.hint
    with monkeypatch.context() as patch:
        refuse_to(patch, "iterdir", tmp_path.name)
        with pytest.raises(DataError, match="cannot read"):
            formats.files_of(tmp_path)
        refuse_to(patch, "open", "train.parquet")
        with pytest.raises(DataError, match="cannot read"):
            read_all(tmp_path / "train.parquet")


def test_a_missing_file_of_a_saved_data_set_is_no_link(tmp_path: Path) -> None:
    class_table(tmp_path / "train", [0, 1], ["b", "a"])
    (file,) = (tmp_path / "train").glob("*.arrow")
    file.unlink()
    for read_it in (read_all, lambda path: find_inputs(str(path))):
        with pytest.raises(DataError, match=rf"cannot read .*train.*No such file.*{file.name}"):
            read_it(tmp_path / "train")


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match=r"cannot write to .*runs/\.shared/x: "):
        kept(tmp_path / "runs" / ".shared" / "x", "last", lambda: None)


@pytest.mark.parametrize("reference", [".", "*.csv", "train-*-of-00003.csv"])
def test_a_missing_shard_is_refused_by_training_and_scoring(tmp_path: Path, reference: str) -> None:
    for number in (0, 2):
        (tmp_path / f"train-{number:05}-of-00003.csv").write_text("text\nx\n")
    path = tmp_path / reference
    message = "found 2; number 1 is missing (train-00001-of-00003.csv)"
    for read_it in (read_all, lambda path: find_inputs(str(path))):
        with pytest.raises(DataError, match=re.escape(message)):
            read_it(path)
    # That of another data set does not stand in for it.
    (tmp_path / "test-00001-of-00003.csv").write_text("text\nx\n")
    for read_it in (read_all, lambda path: find_inputs(str(path))):
        with pytest.raises(DataError, match="is missing"):
            read_it(path)
    (tmp_path / "test-00001-of-00003.csv").rename(tmp_path / "train-00001-of-00003.csv")
    assert read_all(path) == ["x"] * 3
    assert len(find_inputs(str(path))) == 3
    (tmp_path / "train-00001-of-00003.csv").unlink()
    alone = tmp_path / "train-00000-of-00003.csv"
    assert read_all(alone) == ["x"]
    assert len(find_inputs(str(alone))) == 1


def test_shards_may_be_numbered_from_one(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (tmp_path / f"train-{number:05}-of-00003.csv").write_text("text\nx\n")
    assert read_all(tmp_path) == ["x"] * 3
    (tmp_path / "train-00003-of-00003.csv").unlink()
    with pytest.raises(DataError, match="found 2; number 0 is missing"):
        read_all(tmp_path)


def test_shards_of_a_longer_name_belong_to_another_split(tmp_path: Path) -> None:
    for name in ("train", "train-more", "train-2023", "train-0-bad"):
        (tmp_path / f"{name}-00000-of-00001.csv").write_text(f"text\n{name}\n")
    assert read_all(formats.split_of(tmp_path, "train", "train")) == ["train"]
    for name in ("train-more", "train-2023", "train-0-bad"):
        assert read_all(formats.split_of(tmp_path, name, "train")) == [name]
