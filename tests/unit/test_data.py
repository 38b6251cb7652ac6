"""Reading, checking, splitting and batching labelled texts, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from ad2kit.data.labels import balance
from ad2kit.data.sources import open_source
from ad2kit.data.splits import Data, Split, encode, epoch_batches, load_data
from ad2kit.data.tokens import _chunks
from ad2kit.run.errors import DataError
from ad2kit.run.sections import DataRecipe, TextLength
from ad2kit.tables.rows import BadRows
from tests.models import tiny_bert

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GOOD = "text\tlabel\n" + "".join(f'text {i} "quoted\t{i % 2}\n' for i in range(40))
OTHER = GOOD.replace("text ", "other ")


def recipe(source: object, **changes: object) -> DataRecipe:
    values: dict[str, object] = {
        "source": None if source is None else str(source),
        "text_columns": ("text",),
        "label_column": "label",
        "max_length_tokens": 32,
    }
    return DataRecipe.model_validate(values | changes)


def folder(path: Path, train: str = GOOD, validation: str = OTHER, suffix: str = "tsv") -> Path:
    (path / f"train.{suffix}").write_text(train)
    (path / f"validation.{suffix}").write_text(validation)
    return path


def everything(data: Data) -> Counter[tuple[str, ...]]:
    return Counter(data.train.texts) + Counter(data.select.texts)


def test_tsv_takes_a_quotation_mark_as_a_character(tmp_path: Path) -> None:
    data = load_data(recipe(folder(tmp_path)), seed=1)
    assert data.labels == ("0", "1")
    assert ('text 3 "quoted',) in everything(data)
    assert len(data.validation) == 40


def test_all_formats_read_the_same_rows(tmp_path: Path) -> None:
    plain: list[dict[str, object]] = [
        {"text": f"text, {i}\nsecond line", "label": i % 2} for i in range(40)
    ]
    found = []
    for suffix in ("csv", "jsonl", "parquet"):
        target = tmp_path / suffix
        target.mkdir()
        for name in ("train", "validation"):
            path = target / f"{name}.{suffix}"
            if name == "train":
                rows = [row | {"text": f"seen {row['text']}"} for row in plain]
            else:
                rows = plain
            if suffix == "csv":
                lines = "".join(f'"{row["text"]}",{row["label"]}\n' for row in rows)
                path.write_text("text,label\n" + lines)
            elif suffix == "jsonl":
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            else:
                parquet.write_table(pa.Table.from_pylist(rows), path)
        found.append(load_data(recipe(target), seed=1))
    assert {data.train.sha256 for data in found} == {found[0].train.sha256}
    assert found[0].validation.texts[3] == ("text, 3\nsecond line",)


def test_single_files_are_named_instead_of_a_folder(tmp_path: Path) -> None:
    folder(tmp_path)
    files = {name: str(tmp_path / f"{name}.tsv") for name in ("train", "validation")}
    by_file = recipe(None, **files)
    assert load_data(by_file, 1).train.texts == load_data(recipe(tmp_path), 1).train.texts


def test_label_names_come_from_labels_txt(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("0\tbad\n1\tgood\n")
    assert load_data(recipe(folder(tmp_path)), 1).labels == ("bad", "good")


def test_label_names_in_the_rows_mean_what_the_recipe_says(tmp_path: Path) -> None:
    rows = "text\tlabel\n" + "".join(f"t{i}\t{('yes', 'no')[i % 2]}\n" for i in range(20))
    source = folder(tmp_path, rows.replace("\nt", "\ns"), rows)
    data = load_data(recipe(source, labels=("no", "yes")), 1)
    first = dict(zip(data.validation.texts, data.validation.labels.tolist(), strict=True))
    assert (first[("t0",)], first[("t1",)]) == (1, 0)


def test_the_splits_are_disjoint_deterministic_and_depend_on_the_seed(tmp_path: Path) -> None:
    source = recipe(folder(tmp_path))
    data, again, other = load_data(source, 1), load_data(source, 1), load_data(source, 2)
    assert data.train.texts == again.train.texts
    assert data.select.texts != other.select.texts
    assert not set(data.train.texts) & set(data.select.texts)
    assert len(data.train) + len(data.select) == 40
    assert len(data.select) == 8  # a fifth at most of a tiny set
    # The gate's rows keep the order of the file.
    assert data.validation.texts[0] == ('other 0 "quoted',)


def test_select_grows_with_rows_and_classes_between_200_and_2000(tmp_path: Path) -> None:
    sizes = ((1_000, 2, 200), (5_000, 2, 500), (2_000, 90, 360), (60_000, 2, 2_000))
    for rows, classes, expected in sizes:
        text = "text\tlabel\n" + "".join(f"t{i}\t{i % classes}\n" for i in range(rows))
        assert len(load_data(recipe(folder(tmp_path, text)), 1).select) == expected


def test_max_train_rows_caps_train_and_select_together(tmp_path: Path) -> None:
    data = load_data(recipe(folder(tmp_path), max_train_rows=30), 1)
    assert len(data.train) + len(data.select) == 30
    assert len(data.validation) == 40


def test_labels_that_parquet_made_floats_are_whole_numbers(tmp_path: Path) -> None:
    lines = [f'{{"text": "t{i}", "label": {i % 2}.0}}\n' for i in range(20)]
    source = folder(tmp_path, "".join(lines[:14]), "".join(lines[14:]), suffix="jsonl")
    assert load_data(recipe(source), 1).labels == ("0", "1")


def without_column(path: Path) -> Path:
    return folder(path, GOOD.replace("text\tlabel", "texts\tlabel", 1))


def header_only(path: Path) -> Path:
    return folder(path, GOOD, "text\tlabel\n")


def one_class(path: Path) -> Path:
    return folder(path, GOOD, "text\tlabel\n" + "same\t1\n" * 9)


def empty_text(path: Path) -> Path:
    return folder(path, GOOD + "  \t1\n")


def not_utf8(path: Path) -> Path:
    folder(path)
    (path / "train.tsv").write_bytes(b"text\tlabel\ngood\t1\ncaf\xe9\t0\n")
    return path


def missing_field(path: Path) -> Path:
    return folder(path, GOOD + "no label here\n")


def no_train_file(path: Path) -> Path:
    folder(path)
    (path / "train.tsv").unlink()
    return path


def two_train_files(path: Path) -> Path:
    folder(path)
    return folder(path, "text,label\n", GOOD.replace("\t", ","), suffix="csv")


def broken_json(path: Path) -> Path:
    line = '{"text": "a", "label": 1}\n'
    return folder(path, line + '{"text": \n', line, suffix="jsonl")


def leaked(path: Path) -> Path:
    return folder(path, GOOD, GOOD)


def no_parquet(path: Path) -> Path:
    return folder(path, "PAR1", "PAR1", suffix="parquet")


def column_twice(path: Path) -> Path:
    return folder(path, GOOD.replace("text\tlabel", "text\ttext\tlabel", 1))


def old_line_ends(path: Path) -> Path:
    return folder(path, 'text,label\ra,1\r"b"x\r,0\r', "text,label\na,1\n", suffix="csv")


def deep_json(path: Path) -> Path:
    return folder(path, "[" * 100_000 + "\n", '{"text": "a", "label": 1}\n', suffix="jsonl")


def half_a_surrogate(path: Path) -> Path:
    line = '{"text": "a", "label": 1}\n'
    return folder(path, line + '{"text": "b \\ud800", "label": 0}\n', line, suffix="jsonl")


def no_label(path: Path) -> Path:
    line = '{"text": "a", "label": "x"}\n'
    return folder(path, line + '{"text": "b", "label": null}\n', line, suffix="jsonl")


def decimals(path: Path) -> Path:
    rows = "".join(f"t{i}\t{i % 5 / 2}\n" for i in range(20))
    return folder(path, f"text\tlabel\n{rows}", f"text\tlabel\n{rows}".replace("t1", "u1"))


def list_label(path: Path) -> Path:
    line = '{"text": "a", "label": "x"}\n'
    return folder(path, line + '{"text": "b", "label": ["x"]}\n', line, suffix="jsonl")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (without_column, r"train\.tsv, line 1: no column 'text' \(did you mean 'texts'\?\)"),
        (header_only, "validation split is empty"),
        (one_class, "validation split holds one class only: '1' in all 9 rows"),
        (empty_text, r"train\.tsv, line 42: 'text' must be a text with at least one visible"),
        (not_utf8, r"line 3: not UTF-8: byte 0xe9"),
        (missing_field, r"line 42: expected 2 fields \(text, label\), found 1"),
        (no_train_file, "expected exactly one train"),
        (two_train_files, r"expected exactly one train.*train\.csv, train\.tsv"),
        (broken_json, r"train\.jsonl, line 2: not JSON"),
        (leaked, r"40 of 40 validation texts \(100.0%\) are also training"),
        (no_parquet, r"train\.parquet is not a readable Parquet file"),
        (column_twice, "the column 'text' appears twice"),
        (old_line_ends, r"train\.csv, line \d+: not CSV"),
        (deep_json, r"train\.jsonl, line 1: not JSON"),
        (half_a_surrogate, r"train\.jsonl, line 2: holds half a surrogate pair"),
        (no_label, r"line 2: 'label' must be a label, a text or a whole number, found None"),
        (decimals, r"'label' holds decimal numbers such as 0\.0, not classes"),
        (list_label, r"line 2: 'label' must be a label, .* found \['x'\]"),
    ],
)
def test_wrong_data_is_an_error_that_says_where(
    tmp_path: Path, make: Callable[[Path], Path], expected: str
) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        load_data(recipe(make(tmp_path)), 1)
    assert caught.value.hint


def values(path: Path, *rows: tuple[str, object], suffix: str = "jsonl") -> Path:
    """A folder whose training rows are padded with good ones of both kinds."""
    lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
    return folder(path, "".join(lines), "".join(lines).replace('"text": "', '"text": "v'), suffix)


def test_several_labels_are_lists_or_names_between_commas(tmp_path: Path) -> None:
    rows = [("a", ["x", "y"]), ("b", []), ("c", ["y"]), ("d", ["z"]), ("e", ["x"])]
    lists = load_data(recipe(values(tmp_path, *rows), task="multi_label"), 1)
    assert lists.labels == ("x", "y", "z")
    found = dict(zip(lists.validation.texts, lists.validation.labels.tolist(), strict=True))
    assert found[("va",)] == [1.0, 1.0, 0.0]
    assert found[("vb",)] == [0.0, 0.0, 0.0]
    other = tmp_path / "commas"
    other.mkdir()
    texts = [(text, ", ".join(labels)) for text, labels in rows]
    commas = load_data(recipe(values(other, *texts), task="multi_label"), 1)
    assert commas.train.sha256 == lists.train.sha256


def test_a_regression_reads_numbers_and_names_its_output_after_the_column(tmp_path: Path) -> None:
    rows = [("a", "2.5"), ("b", 3), ("c", 0.0), ("d", "-1e-1"), ("e", 5)]
    data = load_data(recipe(values(tmp_path, *rows), task="regression"), 1)
    assert data.labels == ("label",)
    assert data.validation.labels.tolist() == pytest.approx([2.5, 3.0, 0.0, -0.1, 5.0])
    assert data.validation.labels.dtype == np.float32


@pytest.mark.parametrize(
    ("task", "label", "expected"),
    [
        ("regression", "NaN", "must be a finite number, found 'NaN'"),
        ("regression", "positive", "must be a finite number, found 'positive'"),
        ("regression", None, "must be a finite number, found None"),
        ("regression", True, "must be a finite number, found True"),
        ("multi_label", None, "must be a list of labels"),
        ("multi_label", [1.5], "must be a label, a text or a whole number, found 1.5"),
        ("single_label", float("nan"), "must be a label, a text or a whole number, found nan"),
    ],
)
def test_a_label_that_does_not_fit_the_task_is_refused(
    tmp_path: Path, task: str, label: object, expected: str
) -> None:
    source = values(tmp_path, ("a", "1"), ("b", label), ("c", "0"))
    with pytest.raises(DataError, match=rf"line 2: .*{expected}"):
        load_data(recipe(source, task=task), 1)


def test_leakage_is_an_error_from_a_share_on_that_the_user_sets(tmp_path: Path) -> None:
    """Of 40 validation texts some stand in the training file too."""
    lines, others = GOOD.splitlines(), OTHER.splitlines()
    for known, allowed in ((4, 0.1), (5, 0.1), (36, 0.9), (37, 0.9)):
        mixed = "\n".join([*others[: 41 - known], *lines[41 - known :]])
        source = folder(tmp_path, validation=mixed)
        if known <= 40 * allowed:
            assert len(load_data(recipe(source, max_leakage=allowed), 1).validation) == 40
            continue
        with pytest.raises(DataError, match=f"{known} of 40 validation texts") as caught:
            load_data(recipe(source, max_leakage=allowed), 1)
        advice = float(caught.value.hint.rpartition("=")[2])
        assert len(load_data(recipe(source, max_leakage=advice), 1).validation) == 40


def test_an_imbalance_is_said_in_words() -> None:
    assert balance({"a": 60, "b": 40}, 100) == "a 60 (60.0%), b 40 (40.0%)"
    assert balance({"a": 95, "b": 5}, 100).endswith("; rare (see class_weights): b")
    # Of many labels none is rare that has its share, and nobody reads all of them.
    many = {f"label {number}": 40 for number in range(77)} | {"most": 60}
    assert balance(many, 3_140) == "78 labels, from label 0 40 (1.3%) to most 60 (1.9%)"
    few = many | {f"few {number}": 2 for number in range(12)}
    assert balance(few, 3_164).endswith("few 8, few 9 and 2 more")


def test_a_pair_recipe_on_single_texts_is_refused(tmp_path: Path) -> None:
    pair = recipe(folder(tmp_path), text_columns=("sentence1", "sentence2"))
    with pytest.raises(DataError, match=r"no column 'sentence1'.*columns: text, label") as caught:
        load_data(pair, 1)
    assert "data.text_columns" in caught.value.hint


def test_unlabelled_texts_join_what_the_student_reads_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("one more\n\nand another\n")
    (tmp_path / "more.tsv").write_text("text\tsource\na third\tweb\n")
    files = tuple(str(tmp_path / name) for name in ("more.txt", "more.tsv"))
    data = load_data(recipe(folder(tmp_path), unlabelled=files), 1)
    assert data.unlabelled.texts == (("one more",), ("and another",), ("a third",))
    assert data.unlabelled.labels.tolist() == [-100] * 3
    reading = data.distillation()
    assert reading.texts == data.train.texts + data.unlabelled.texts
    assert not set(data.unlabelled.texts) & {*data.train.texts, *data.select.texts}
    plain = load_data(recipe(tmp_path), 1)
    assert (plain.train.sha256, plain.select.sha256) == (
        data.train.sha256,
        data.select.sha256,
    )
    assert set(plain.splits()) == {"train", "select", "validation"}


def test_wrong_unlabelled_files_are_named(tmp_path: Path) -> None:
    source = folder(tmp_path)
    with pytest.raises(DataError, match=r"no file .*absent\.tsv"):
        load_data(recipe(source, unlabelled=(str(tmp_path / "absent.tsv"),)), 1)
    (tmp_path / "other.tsv").write_text("sentence\nhello\n")
    with pytest.raises(DataError, match=r"other\.tsv, line 1: no column 'text'"):
        load_data(recipe(source, unlabelled=(str(tmp_path / "other.tsv"),)), 1)
    (tmp_path / "lines.txt").write_text("hello\n")
    pair = recipe(source, text_columns=("text", "label"), unlabelled=(f"{tmp_path}/lines.txt",))
    with pytest.raises(DataError, match=r"lines\.txt: a \.txt file holds one text a line"):
        load_data(pair, 1)


def test_select_may_be_the_validation_rows_as_papers_have_it(tmp_path: Path) -> None:
    data = load_data(recipe(folder(tmp_path), select_from="validation"), 1)
    assert data.select.texts == data.validation.texts
    assert len(data.train) == 40


def test_a_split_of_another_name_is_read(tmp_path: Path) -> None:
    source = folder(tmp_path)
    (source / "validation.tsv").rename(source / "dev.tsv")
    data = load_data(recipe(source, validation="dev"), 1)
    assert data.validation.texts[0] == ('other 0 "quoted',)
    with pytest.raises(DataError, match=r"expected exactly one validation\.\(tsv"):
        load_data(recipe(source), 1)


def test_a_label_outside_the_label_set_is_refused(tmp_path: Path) -> None:
    source = folder(tmp_path, GOOD.replace("\t0\n", "\tx\n", 1))
    with pytest.raises(DataError, match=r"line 2: label 'x' is not in the label set \(a, b\)"):
        load_data(recipe(source, labels=("a", "b")), 1)
    source = folder(tmp_path, GOOD.replace("\t0\n", "\t2\n", 1))
    with pytest.raises(DataError, match=r"line 2: label '2' is not in the label set \(a, b\)"):
        load_data(recipe(source, labels=("a", "b")), 1)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nowhere", "no folder 'nowhere'"),
        ("ftp://x", "expected a folder, hub://"),
        ("embedded://nothing", "expected a folder, hub://"),
    ],
)
def test_an_unknown_source_is_refused(source: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        load_data(recipe(source), 1)


@pytest.mark.parametrize("way", ["rename", "a stem", "both files"])
def test_files_of_other_names_are_read_as_the_hint_says(tmp_path: Path, way: str) -> None:
    source = folder(tmp_path)
    held_out = (source / "validation.tsv").rename(source / "held-out.tsv")
    with pytest.raises(DataError, match=r"expected exactly one validation\.") as caught:
        load_data(recipe(source), 1)
    hint = caught.value.hint
    changed: dict[str, object] = {"source": source}
    if way == "rename":
        assert "rename a file" in hint
        held_out.rename(source / "validation.tsv")
    elif way == "a stem":
        assert "data.validation=held-out" in hint
        changed["validation"] = "held-out"
    else:
        assert "data.source=null data.train=FILE data.validation=FILE" in hint
        changed = {"source": None, "train": str(source / "train.tsv"), "validation": str(held_out)}
    assert len(load_data(recipe(**changed), 1).validation) == 40


@pytest.mark.parametrize("rows", [None, 9])
def test_a_limit_of_rows_is_named_where_there_is_one(tmp_path: Path, rows: int | None) -> None:
    train = "text\tlabel\n" + "".join(f"word {row}\t0\n" for row in range(90))
    source = folder(tmp_path, train)
    with pytest.raises(DataError, match="the train split holds one class only") as caught:
        load_data(recipe(source, labels=("0", "1"), max_train_rows=rows), 1)
    assert ("data.max_train_rows" in caught.value.hint) == (rows is not None)
    assert "data.label_column" in caught.value.hint


@pytest.mark.parametrize("changes", [{}, {"max_train_rows": 1}])
def test_one_training_row_is_too_few(tmp_path: Path, changes: dict[str, object]) -> None:
    train = GOOD if changes else "text\tlabel\nfine\t1\n"
    with pytest.raises(DataError, match="the train split has no row left beside") as caught:
        load_data(recipe(folder(tmp_path, train), labels=("0", "1"), **changes), 1)
    assert "data.select_from=validation" in caught.value.hint


@pytest.mark.parametrize("where", ["train", "validation"])
def test_half_a_surrogate_pair_in_a_label_is_refused(tmp_path: Path, where: str) -> None:
    good = "".join(f'{{"text": "{{}} {i}", "label": "{"ab"[i % 2]}"}}\n' for i in range(20))
    texts = {name: good.replace("{}", name) for name in ("train", "validation")}
    texts[where] += '{"text": "x", "label": "\\ud800"}\n'
    source = folder(tmp_path, texts["train"], texts["validation"], suffix="jsonl")
    with pytest.raises(DataError, match=rf"{where}\.jsonl, line 21: holds half a surrogate pair"):
        load_data(recipe(source), 1)


@pytest.mark.parametrize("kind", ["shards", "a folder of parts", "save_to_disk"])
def test_a_split_in_several_files_is_read_in_their_order(tmp_path: Path, kind: str) -> None:
    texts = [f"text {number}" for number in range(8)]
    table = pa.table({"text": texts, "label": ["a", "b"] * 4})
    source = tmp_path / "data"
    for name in ("train", "validation"):
        if kind == "save_to_disk":
            continue
        parts = [f"{name}-{part:05}-of-00002.parquet" for part in range(2)]
        where = source if kind == "shards" else source / f"{name}.parquet"
        where.mkdir(parents=True, exist_ok=True)
        (where / "_SUCCESS").touch()
        for part, file in enumerate(parts):
            parquet.write_table(table.slice(4 * part, 4), where / file)
    if kind == "save_to_disk":
        splits = {name: datasets.Dataset(table) for name in ("train", "validation")}
        datasets.DatasetDict(splits).save_to_disk(source, num_shards={"train": 3, "validation": 1})
    for split in open_source(recipe(source))[:2]:
        assert [row.texts[0] for row in split.rows(BadRows())] == texts
        assert [row.label for row in split.rows(BadRows())] == ["a", "b"] * 4
    if kind == "shards":
        (source / "train-00001-of-00002.parquet").unlink()
        with pytest.raises(DataError, match=r"expected 2 files, found 1; number 1 is missing"):
            load_data(recipe(source), 1)


def bad_rows_of(path: Path) -> Path:
    """Rows that are no JSON, hold no text or no label; and one whose label no training row has."""
    good = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(30)]
    train = [json.dumps(row) for row in good]
    train[3:3] = ["[1]", '{"text": " ", "label": "a"}', '{"text": "x", "label": null}']
    other = [json.dumps({**row, "text": f"other {n}"}) for n, row in enumerate(good)]
    other += ['{"text": "odd", "label": "c"}', '{"text": "odd"']
    source = folder(path, "\n".join(train), "\n".join(other), suffix="jsonl")
    (path / "more.txt").write_bytes(b"fine\n\xe2\x80\x8b\n")
    return source


def test_bad_rows_are_refused_or_listed(tmp_path: Path) -> None:
    source = bad_rows_of(tmp_path)
    more = (str(tmp_path / "more.txt"),)
    with pytest.raises(DataError, match=r"train\.jsonl, line 4: expected a JSON object"):
        load_data(recipe(source, unlabelled=more), 1)
    data = load_data(recipe(source, unlabelled=more, bad_rows="skip", select_from="validation"), 1)
    assert sorted(data.train.texts) == sorted((f"text {n}",) for n in range(30))
    assert tuple(data.validation.texts) == tuple((f"other {n}",) for n in range(30))
    assert tuple(data.unlabelled.texts) == (("fine",),)
    found = [(row.file.rpartition("/")[2], row.row, row.line, row.reason) for row in data.bad_rows]
    text = "'text' must be a text with at least one visible character, found "
    assert found == [
        ("train.jsonl", 4, 4, "expected a JSON object, found list"),
        ("train.jsonl", 5, 5, f"{text}' '"),
        ("train.jsonl", 6, 6, "'label' must be a label, a text or a whole number, found None"),
        ("validation.jsonl", 31, 31, "label 'c' is not in the label set (a, b)"),
        ("validation.jsonl", 32, 32, found[4][3]),
        ("more.txt", 2, 2, f"{text}'\\u200b'"),
    ]
    assert found[4][3].startswith("not JSON: ")


def test_a_table_of_bad_rows_alone_is_refused(tmp_path: Path) -> None:
    source = folder(tmp_path, GOOD, "text\tlabel\n \t1\n", suffix="tsv")
    with pytest.raises(DataError, match="no row of the validation split can be read") as caught:
        load_data(recipe(source, bad_rows="skip"), 1)
    assert "at least one visible character" in caught.value.message


def test_label_names_keep_what_splits_lines_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes("\ufeff0\ta\u2028b\r\n1\tc\x85d\r\n".encode())
    assert load_data(recipe(folder(tmp_path)), 1).labels == ("a\u2028b", "c\x85d")


def test_the_hub_without_a_network_names_the_local_alternative() -> None:
    with pytest.raises(DataError, match="cannot load the data set 'nyu-mll/glue/sst2'") as caught:
        load_data(recipe("hub://nyu-mll/glue/sst2", text_columns=("sentence",)), 1)
    assert "data.source=FOLDER" in caught.value.hint


def test_few_texts_are_tokenised_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_bert().tokenizer
    texts = tuple((f"good {'! ' * number}", f"dull {number}") for number in range(60))
    split = Split.of(texts, np.arange(60))
    whole = encode(split, tokenizer, TextLength(32))
    monkeypatch.setattr("ad2kit.data.tokens._CHUNK_CHARACTERS", 300)
    sizes = [sum(len(text) for row in chunk for text in row) for chunk in _chunks(texts)]
    assert len(sizes) > 10
    # The one text that reaches the limit is part of it.
    assert max(sizes) < 300 + max(sum(map(len, columns)) for columns in texts)
    parts = encode(split, tokenizer, TextLength(32))
    assert whole.token_type_ids is not None
    assert parts.token_type_ids is not None
    assert list(parts.input_ids) == list(whole.input_ids)
    assert list(parts.token_type_ids) == list(whole.token_type_ids)
    assert {0, 1} == {kind for row in whole.token_type_ids for kind in row}
    assert parts.truncated.tolist() == whole.truncated.tolist()
    assert 0 < whole.truncated.sum() < 60
    assert len(encode(split.take(np.arange(0)), tokenizer, TextLength(32))) == 0


def test_an_epoch_holds_every_row_once_in_batches_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, size=1003).tolist()
    batches = epoch_batches(lengths, 16, seed=5, epoch=0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(1003))
    assert sum(len(batch) != 16 for batch in batches) == 1
    spread = np.mean([np.ptp(np.take(lengths, batch)) for batch in batches])
    assert spread < 10  # of 57 at random
    same = epoch_batches(lengths, 16, seed=5, epoch=0)
    assert all((a == b).all() for a, b in zip(batches, same, strict=True))
    assert any(
        (a != b).any()
        for a, b in zip(batches[:40], epoch_batches(lengths, 16, seed=5, epoch=1)[:40], strict=True)
        if len(a) == len(b)
    )


@pytest.mark.parametrize(
    ("task", "columns", "rows", "classes"),
    [
        ("sst2", ("sentence",), 872, 2),
        ("trec", ("sentence",), 500, 6),
        ("mrpc", ("sentence1", "sentence2"), 408, 2),
    ],
)
def test_real_tasks_are_read_whole(
    shared_data: Callable[[str], Path],
    task: str,
    columns: tuple[str, ...],
    rows: int,
    classes: int,
) -> None:
    data = load_data(recipe(shared_data(task), text_columns=columns), 1)
    assert len(data.validation) == rows
    assert len(data.labels) == classes
    assert all(len(text) == len(columns) for text in data.validation.texts)
