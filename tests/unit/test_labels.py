"""What a cell of the label column means: read as pandas and plain Python read it, or refused."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ad2kit.data.labels import LabelReader
from ad2kit.data.splits import load_data
from ad2kit.run.errors import DataError
from ad2kit.run.sections import DataRecipe
from ad2kit.tables.rows import Place, SourceLabels

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ad2kit.run.sections import Task


def recipe(source: str | None = None, **changes: Any) -> DataRecipe:
    files = {"train": "train", "validation": "validation"} if source is None else {}
    values = {"text_columns": ("text",), "label_column": "label", "max_length_tokens": 32}
    return DataRecipe.model_validate(values | files | {"source": source} | changes)


def read(
    cells: Sequence[object],
    *,
    more: Sequence[object] = (),
    names: tuple[str, ...] | None = None,
    **changes: Any,
) -> tuple[tuple[str, ...], list[Any]]:
    """Return the names, and the labels of training cells and more; ``names`` is labels.txt."""
    how = recipe(**changes)
    only_ids = str(changes.get("source")).startswith("hub://")
    reader = LabelReader(how, None if names is None else SourceLabels(names, only_ids))
    codes = [reader.code(Place("train.csv", n, n + 1), cell) for n, cell in enumerate(cells, 1)]
    labels = reader.fix()
    codes += [reader.code(Place("validation.csv", n, n + 1), c) for n, c in enumerate(more, 1)]
    return labels.names, reader.read(np.array(codes, reader.code_type)).tolist()


@pytest.mark.parametrize(
    ("cells", "names"),
    [
        (range(12), tuple(map(str, range(12)))),
        ([10, 9, 2, 1], ("1", "2", "9", "10")),
        (["10", "9", "-2", "0"], ("-2", "0", "9", "10")),
        ([1.0, -1.0, 0.0], ("-1", "0", "1")),
        (["10", "9", "unknown"], ("10", "9", "unknown")),
        (["b", "a"], ("a", "b")),
        ([True, False], ("False", "True")),
    ],
)
def test_whole_numbers_are_sorted_as_numbers_and_names_as_texts(
    cells: Sequence[object], names: tuple[str, ...]
) -> None:
    found, labels = read(list(cells))
    assert found == names
    if not any(isinstance(cell, bool) for cell in cells):
        assert read([[cell] for cell in cells], task="multi_label")[0] == names
    assert [names[label] for label in labels] == [
        str(int(cell)) if isinstance(cell, float) else str(cell) for cell in cells
    ]


def test_a_number_is_an_id_where_the_order_is_given_and_no_name_is_a_number() -> None:
    assert read(["0", 1, "neg", 1.0], labels=("neg", "pos"))[1] == [0, 1, 0, 1]
    assert read(["0", "pos"], names=("neg", "pos"))[1] == [0, 1]
    assert read([[0], ["pos"], "0,1"], task="multi_label", names=("neg", "pos"))[1] == [
        [1, 0],
        [0, 1],
        [1, 1],
    ]


@pytest.mark.parametrize(
    ("cells", "more", "given", "expected"),
    [
        (["1", "2", "3"], ["0"], {}, r"line 2: label '0' is not in the label set \(1, 2, 3\)"),
        (["1", "2"], ["0"], {"labels": ("1", "2")}, "label '0' is not in the label set"),
        (["1", "2"], ["0"], {"names": ("1", "2")}, "label '0' is not in the label set"),
        # The order of sorting is no order of ids.
        (["neg", "pos"], ["0"], {}, "label '0' is not in the label set"),
        (["a", "b"], ["-1"], {"labels": ("a", "b")}, "label '-1' is not in the label set"),
        (["a", "b"], ["01"], {"labels": ("a", "b")}, "label '01' is not in the label set"),
        (["a", "b"], ["\u0660"], {"labels": ("a", "b")}, "is not in the label set"),
        (["1.5", "2.5"], [1], {"labels": ("1.5", "2.5")}, "label '1' is not in the label set"),
        ([True, False], [1], {}, "label '1' is not in the label set"),
    ],
)
def test_a_number_that_may_be_something_else_is_refused(
    cells: list[object], more: list[object], given: dict[str, Any], expected: str
) -> None:
    for task in ("single_label", "multi_label"):
        if isinstance(cells[0], bool) and task == "multi_label":
            continue
        several = [[[cell] for cell in column] for column in (cells, more)]
        train, validation = (cells, more) if task == "single_label" else several
        with pytest.raises(DataError, match=expected) as caught:
            read(train, more=validation, task=task, **given)
        assert caught.value.hint


def test_an_id_keeps_the_meaning_that_the_source_gives_it() -> None:
    """data.labels orders the outputs; labels.txt and class columns say what an id is called."""
    orders: dict[str, Any] = {"names": ("neg", "pos"), "labels": ("pos", "neg")}
    assert read([0, 1, "neg", "pos"], **orders)[1] == [1, 0, 1, 0]
    rows = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    assert read(rows, task="multi_label", **orders)[1] == [[0, 1], [1, 0], [1, 1]]
    # Other spellings are no other labels, and other names are new ones.
    assert read([0, 1], names=("neg", "pos"), labels=("POS", "NEG"))[1] == [1, 0]
    assert read([0, 1], names=("neg", "pos"), labels=("bad", "good"))[1] == [0, 1]
    # The cells of a class column are ids, whatever the classes are called.
    stars: dict[str, Any] = {"names": ("1", "2", "3"), "source": "hub://owner/stars"}
    assert read([0, 1, 2], **stars)[1] == [0, 1, 2]
    assert read([0, 1, 2], labels=("3", "2", "1"), **stars)[1] == [2, 1, 0]
    with pytest.raises(DataError, match="label '3' is not in the label set"):
        read([0, 3], **stars)
    with pytest.raises(DataError, match="label '1' is not in the label set"):
        read([0, 1], names=("a", "b", "c"), labels=("a", "c"))
    with pytest.raises(DataError, match=r"data\.labels holds 2 names"):
        read([0, 1], names=("a", "b", "c"), labels=("x", "y"))
    for names in (("a", "a"), ("a", ""), ("a", " a")):
        with pytest.raises(DataError, match="is empty or appears twice"):
            read([0, 1], names=names)


MULTI_HOT = [
    [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]],
    [[1, 0, 0], [0, 0, 1], [0, 0, 0]],
    [[True, False, False], [False, False, True], [False, False, False]],
    ["1,0,0", "0, 0, 1", "0,0,0"],
    ["1.0,0.0,0.0", "0.0,0.0,1.0", "0.0,0.0,0.0"],
    ["[1, 0, 0]", "[0, 0, 1]", "[0, 0, 0]"],
    [["1", "0", "0"], ["0", "0", "1"], ["0", "0", "0"]],
]


@pytest.mark.parametrize("cells", MULTI_HOT)
def test_rows_of_0_and_1_have_a_cell_for_each_label(cells: list[object]) -> None:
    names = ("toxic", "insult", "threat")
    expected = [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert read(cells, task="multi_label", labels=names) == (names, expected)
    assert read(cells, task="multi_label", names=names) == (names, expected)
    assert read(cells, task="multi_label", labels=("1", "2", "3"))[1] == expected
    with pytest.raises(DataError, match="every row of 'label' holds 3 cells of 0 or 1") as caught:
        read(cells, task="multi_label")
    assert "data.labels" in caught.value.hint
    for other in (("a", "b"), ("a", "b", "c", "d")):
        with pytest.raises(DataError, match="3 cells of 0 or 1, expected one for each label"):
            read(cells, task="multi_label", labels=other)


@pytest.mark.parametrize(
    ("cells", "more"),
    [
        ([[0, 0, 1], [1, 0]], []),  # a cell is missing
        ([[0, 0, 1], []], []),
        ([[0, 0, 1], ["toxic"]], []),
        ([[0, 0, 1], [1, 0, 0]], [["toxic"]]),  # other rows hold names
        ([["toxic"], ["insult"]], [[0, 0, 1]]),
        ([[True], [False]], []),
        ([[2, 2], [1]], []),
        (["0,0,1", "1,0"], []),
    ],
)
def test_rows_that_are_neither_labels_nor_0_and_1_for_each_are_refused(
    cells: list[object], more: list[object]
) -> None:
    with pytest.raises(DataError, match=r"neither labels .* nor, as every row would have to"):
        read(cells, more=more, task="multi_label", labels=("toxic", "insult", "threat"))


def test_ids_are_told_from_rows_of_0_and_1() -> None:
    names = ("a", "b", "c")
    assert read([[0, 1], [2], []], task="multi_label", labels=names)[1] == [
        [1, 1, 0],
        [0, 0, 1],
        [0, 0, 0],
    ]
    assert read(["0,1", "2", ""], task="multi_label", labels=names)[1][0] == [1, 1, 0]
    with pytest.raises(DataError, match="2 cells of 0 or 1, expected one for each label"):
        read([[0, 1], [1, 0]], task="multi_label", labels=names)


@pytest.mark.parametrize(
    "cell",
    [
        "['a', 'b']",
        "['a' 'b']",
        "('a', 'b')",
        "{'a', 'b'}",
        "set()",
        "()",
        "array(['a'])",
        "[a, b]",
        "(a, b)",
        "[1 0 1]",
        "frozenset({'a'})",
        "['a']",
        '["a", "b"',
    ],
)
def test_a_list_as_python_writes_it_is_refused_with_the_cure(cell: str) -> None:
    with pytest.raises(DataError, match="line 3: 'label' holds a list as Python") as caught:
        read(["a,b", cell], task="multi_label")
    assert "json.dumps" in caught.value.hint


@pytest.mark.parametrize("cell", ["['a', 'b']", "[]", "[0, 1]", "('a',)", '["a"]', "[0 1]"])
def test_a_list_is_no_class(cell: str) -> None:
    with pytest.raises(DataError, match="holds a list and not one class") as caught:
        read(["a", cell, "b"])
    assert "data.task=multi_label" in caught.value.hint
    assert read(["a", cell], labels=("a", cell))[1] == [0, 1]  # the cure


def test_a_list_in_json_is_read_and_brackets_in_names_are_no_lists() -> None:
    assert read(['["a","b"]', '["b"]', "[]", "a"], task="multi_label") == (
        ("a", "b"),
        [[1, 1], [0, 1], [0, 0], [1, 0]],
    )
    names, _ = read(["[spam]", "(other), b", ":(", ":)", "[spam],b"], task="multi_label")
    assert names == ("(other)", ":(", ":)", "[spam]", "b")
    assert read(["[a", "b]"], task="multi_label", labels=("[a", "b]"))[1] == [[1, 0], [0, 1]]
    assert read(["[spam]", "(x)", "[1]"])[0] == ("(x)", "[1]", "[spam]")


def test_a_comma_or_another_separator_that_may_be_part_of_a_name_is_refused() -> None:
    with pytest.raises(DataError, match="a comma may separate two labels or be part of one"):
        read([["a,b"], ["c"], "a,b"], task="multi_label")
    assert read([["a,b"], ["c"], '["a,b", "c"]'], task="multi_label")[1][2] == [1, 1]
    for separator in (";", "|", " / "):
        with pytest.raises(DataError, match="and 'a', 'b' are labels too") as caught:
            read(["a", f"a{separator}b", "b"], task="multi_label")
        assert "data.labels" in caught.value.hint
        names = ("a", f"a{separator}b", "b")
        assert read(names, task="multi_label", labels=names)[1] == np.eye(3).tolist()
    assert read(["and/or", "b"], task="multi_label")[0] == ("and/or", "b")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("mêlé", "me\u0302le\u0301"),
        ("Yes", "yes"),
        ("a b", "a  b"),
        ("a", "a\u200b"),
        ("❤", "❤\ufe0f"),
        ("1", "01"),
        ("1", "1.0"),
        ("\uff11", "1"),
        ("straße", "STRASSE"),
        ("\ufeffa", "a"),
        ("co\u00adop", "coop"),
    ],
)
def test_labels_that_look_alike_are_refused_unless_both_are_listed(one: str, other: str) -> None:
    for cells in ([one, "x", other], [[one], ["x"], [other]]):
        task: Task = "single_label" if isinstance(cells[0], str) else "multi_label"
        with pytest.raises(DataError, match=r"train\.csv, line 4: .*looks like") as caught:
            read(cells, task=task)
        assert ascii(one) in caught.value.message
        assert "data.labels" in caught.value.hint
        names = (one, "x", other)
        read(cells, task=task, labels=names)  # the cure
    with pytest.raises(DataError, match="is not in the label set") as caught:
        read([one, "x"], more=[other])
    assert ascii(one) in caught.value.hint


def test_large_numbers_that_differ_are_not_alike() -> None:
    ids = ("123456789012345678", "123456789012345679")
    assert read(ids)[0] == ids
    assert len(read(["9" * 5000, "1"])[0]) == 2


# What a file may hold, and what pandas and plain Python make of it.

NAME = st.text(
    st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=6
).filter(str.strip)
PLAIN = st.sampled_from(["a", "b", "c c", "É", "x,y", "no", "[z]", "1", "0", "-1", "10", "2.0"])
CLASS: dict[str, st.SearchStrategy[Any]] = {
    "whole numbers": st.integers(-3, 12),
    "floats": st.integers(-3, 12).map(float),
    "decimals": st.floats(allow_nan=False, width=32),
    "booleans": st.booleans(),
    "names": NAME,
    "plain names": PLAIN,
    "anything": st.one_of(st.integers(-2, 2), PLAIN, st.booleans(), st.none(), st.just(0.5)),
}


def columns(cell: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(cell, min_size=2, max_size=8)


def plain(cell: object) -> str:
    """A class as a reader takes it: whole numbers are one class however they are stored."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return str(cell).strip()


def read_file(folder: Path, cells: list[Any], suffix: str, **changes: Any) -> Any:
    """Write cells as pandas does, read them through ad2kit; labels of train, select, validation."""
    for name in ("train", "validation"):
        texts = [f"{name} {n}" for n in range(len(cells))]
        frame = pd.DataFrame({"text": texts, "label": pd.Series(cells, dtype=object)})
        path = folder / f"{name}.{suffix}"
        if suffix == "csv":
            frame.to_csv(path, index=False)
        else:
            frame.to_json(path, orient="records", lines=True, force_ascii=False)
    data = load_data(recipe(str(folder), select_from="validation", **changes), 1)
    order = [int(text.split()[1]) for (text,) in data.train.texts]
    assert data.train.labels.tolist() == data.validation.labels[order].tolist()
    return data


@settings(max_examples=150)
@given(
    st.sampled_from(sorted(CLASS)).flatmap(lambda kind: columns(CLASS[kind])),
    st.sampled_from(["csv", "jsonl"]),
)
def test_classes_are_read_as_pandas_reads_them_or_refused(
    tmp_path_factory: pytest.TempPathFactory, cells: list[Any], suffix: str
) -> None:
    folder = tmp_path_factory.mktemp("classes")
    try:
        data = read_file(folder, cells, suffix)
    except DataError:
        return
    if suffix == "csv":
        table = pd.read_csv(folder / "validation.csv", dtype=str, keep_default_na=False)
        expected = [cell.strip() for cell in table["label"]]
    else:
        lines = (folder / "validation.jsonl").read_text().split("\n")[:-1]
        expected = [plain(json.loads(line)["label"]) for line in lines]
    assert [data.labels[label] for label in data.validation.labels] == expected
    assert data.labels == tuple(sorted(set(expected), key=_order(expected)))


def _order(names: list[str]) -> Any:
    try:
        whole = all(str(int(name)) == name for name in names)
    except ValueError:
        whole = False
    return int if whole else str


LISTS = {
    "names": st.lists(st.sampled_from(["a", "b", "c c", "x,y"]), max_size=3),
    "ids": st.lists(st.integers(0, 2), max_size=3),
    "0 and 1": st.lists(st.sampled_from([0, 1]), min_size=3, max_size=3),
    "0.0 and 1.0": st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=3),
    "booleans": st.lists(st.booleans(), min_size=3, max_size=3),
    "ragged": st.lists(st.sampled_from([0, 1]), max_size=3),
    "mixed": st.lists(st.sampled_from([0, 1, "a", "b", True]), max_size=3),
}
WRITERS: dict[str, Any] = {
    "lists": lambda cells: cells,
    "commas": lambda cells: ",".join(map(str, cells)),
    "JSON": json.dumps,
    "Python": str,
    "numpy": lambda cells: str(np.array(cells)),
    "tuples": lambda cells: str(tuple(cells)),
}
NAMES = ("a", "b", "c c", "x,y")


def meanings(cells: list[list[Any]], names: tuple[str, ...]) -> list[list[list[int]]]:
    """Every reading of lists that makes sense of all of them: as 0 and 1, as names, as ids."""
    found = []
    flat = [cell for row in cells for cell in row]
    if all(cell in (0, 1) for cell in flat) and all(len(row) == len(names) for row in cells):
        found.append([[int(cell) for cell in row] for row in cells])
    if all(not isinstance(cell, bool) for cell in flat):
        known: dict[Any, int] = {place: place for place in range(len(names))}
        known |= {name: place for place, name in enumerate(names)}
        if all(cell in known for cell in flat):
            rows = [{known[cell] for cell in row} for row in cells]
            found.append([[int(i in row) for i in range(len(names))] for row in rows])
    return found


@settings(max_examples=300)
@given(
    st.sampled_from(sorted(LISTS)).flatmap(lambda kind: columns(LISTS[kind])),
    st.sampled_from(sorted(WRITERS)),
    st.sampled_from([2, 3, 4, None]),
)
def test_several_labels_are_read_as_they_were_meant_or_refused(
    cells: list[list[Any]], writer: str, count: int | None
) -> None:
    """A CSV round trip of texts, lists as they are; given names (the first ``count``) or not."""
    flat = [cell for row in cells for cell in row]
    # Between commas, nobody can tell a comma of a name, or the name True from what is true.
    assume(
        writer != "commas"
        or not any(cell is True or cell is False or cell == "x,y" for cell in flat)
    )
    column = [WRITERS[writer](row) for row in cells]
    if writer != "lists":
        buffer = io.StringIO()
        csv.writer(buffer).writerows([["label"], *([cell] for cell in column)])
        column = [row[0] if row else "" for row in csv.reader(io.StringIO(buffer.getvalue()))][1:]
    labels = None if count is None else NAMES[:count]
    try:
        names, found = read(column, task="multi_label", labels=labels)
    except DataError:
        return
    if labels is None:
        seen = {plain(cell) for row in cells for cell in row}
        assert set(names) == seen
        assert found == [[int(name in map(plain, row)) for name in names] for row in cells]
        # Rows of 0 and 1 have no names.
        assert not any(isinstance(cell, bool) for row in cells for cell in row)
        assert len({len(row) for row in cells}) > 1 or len(cells[0]) < 2 or not seen <= {"0", "1"}
        return
    several = meanings(cells, names)
    assert found in several
    # Of two readings the one is taken that the rows leave possible: 0 and 1 for each label.
    assert found == several[0]


def test_a_separator_other_than_a_comma() -> None:
    several: dict[str, Any] = {"task": "multi_label", "label_separator": ";"}
    names, labels = read(["a;b, c", " b, c ;", "", '["a"]'], **several)
    assert names == ("a", "b, c")
    assert labels == [[1, 1], [0, 1], [0, 0], [1, 0]]
    with pytest.raises(DataError, match="holds 'a,b', and 'a', 'b' are labels too") as caught:
        read(["a", "b", "a,b"], **several)
    assert 'data.label_separator=","' in caught.value.hint
    with pytest.raises(DataError, match=r"'a\|b', and 'a', 'b' are labels too") as caught:
        read(["a", "b", "a|b"], task="multi_label")
    assert 'data.label_separator="|"' in caught.value.hint
    assert read(["a", "b", "a|b"], task="multi_label", label_separator="|")[1][2] == [1, 1]


def test_one_column_a_label() -> None:
    columns: dict[str, Any] = {"task": "multi_label", "label_column": ("toxic", "insult")}
    cells = [[0, 1], ["1", "0.0"], [True, 1.0], [" 0", False]]
    assert read(cells, **columns) == (
        ("toxic", "insult"),
        [[0, 1], [1, 0], [1, 1], [0, 0]],
    )
    # The recipe may have them in another order, or under other names.
    assert read(cells, labels=("insult", "toxic"), **columns)[1][0] == [1, 0]
    assert read(cells, labels=("giftig", "gemein"), **columns)[1][0] == [0, 1]
    for wrong in (None, 2, 0.5, "yes", float("nan")):
        with pytest.raises(DataError, match=r"line 3: 'insult' must be 0 or 1, found "):
            read([[0, 1], [0, wrong]], **columns)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_column": ("a", "b")}, "for the task multi_label"),
        ({"label_column": ("a",), "task": "multi_label"}, "at least 2 items"),
        ({"label_separator": "", "task": "multi_label"}, "at least 1 character"),
    ],
)
def test_keys_of_labels_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


THREE = ("b", "a", "c d")
# One row of several labels in every way of writing it, and the keys of the recipe for each way.
WRITINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "list of names": (lambda row: [THREE[n] for n in row], {}),
    "list of ids": (sorted, {}),
    "JSON in a cell": (lambda row: json.dumps([THREE[n] for n in row]), {}),
    "commas": (lambda row: " , ".join(THREE[n] for n in row), {}),
    "bars": (lambda row: "|".join(THREE[n] for n in row), {"label_separator": "|"}),
    "two characters": (lambda row: "::".join(THREE[n] for n in row), {"label_separator": "::"}),
    "row of 0 and 1": (lambda row: [int(n in row) for n in range(3)], {}),
    "row of 0.0 and 1.0": (lambda row: [float(n in row) for n in range(3)], {}),
    "JSON of 0 and 1": (lambda row: json.dumps([int(n in row) for n in range(3)]), {}),
    "columns": (lambda row: [int(n in row) for n in range(3)], {"label_column": THREE}),
    "columns of texts": (
        lambda row: [str(n in row).lower() for n in range(3)],
        {"label_column": THREE},
    ),
}


@given(st.lists(st.frozensets(st.integers(0, 2)), min_size=2, max_size=8))
def test_several_labels_are_the_same_however_they_are_written(rows: list[frozenset[int]]) -> None:
    expected = [[int(n in row) for n in range(3)] for row in rows]
    for way, (write, keys) in WRITINGS.items():
        changes = {"task": "multi_label", "labels": THREE, **keys}
        names, labels = read([write(row) for row in rows], **changes)
        assert (names, labels) == (THREE, expected), way
