"""Given answers: what the tables of a teacher may hold, and what is refused, by line."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pytest
from huggingface_hub import constants

from ad2kit.data import splits
from ad2kit.data.answers import mean_answers, read_answers
from ad2kit.data.labels import counts, filled, has_label, no_labels
from ad2kit.run.errors import DataError, RecipeError
from ad2kit.run.recipe import load_recipe
from ad2kit.run.sections import AnswersRecipe, DataRecipe
from ad2kit.statistics.logits import answers, logits_of, scores
from ad2kit.tables import hub
from ad2kit.training.opening import open_models
from ad2kit.training.teachers import given_sha256
from tests import families, models

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ad2kit.data.splits import Data
    from ad2kit.run.sections import Task

LABELS = ("good", "bad", "ugly")
TEXTS = tuple(f"text {number}" for number in range(24))
# The distribution of each text: all different, and each label is the most probable of some.
P = np.random.default_rng(5).dirichlet((1, 1, 1), len(TEXTS))


def table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    if path.suffix == ".jsonl":
        lines = (json.dumps(dict(zip(columns, row, strict=True))) for row in rows)
        path.write_text("".join(f"{line}\n" for line in lines))
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
    return str(path)


@pytest.fixture
def recipe(tmp_path: Path) -> DataRecipe:
    """18 rows of train, of which 3 become select, and 6 of validation; in each table a number."""
    rows = [(n, text, LABELS[P[n].argmax()], *P[n]) for n, text in enumerate(TEXTS)]
    columns = ("number", "text", "label", *(f"p_{name}" for name in LABELS))
    table(tmp_path / "train.csv", columns, rows[:18])
    table(tmp_path / "validation.csv", columns, rows[18:])
    return DataRecipe(
        source=str(tmp_path),
        text_columns=("text",),
        label_column="label",
        labels=LABELS,
        max_length_tokens=16,
    )


def read(recipe: DataRecipe, **keys: Any) -> dict[str, np.ndarray]:
    return read_answers(recipe, splits.load_data(recipe, 3), AnswersRecipe(**keys))


def number_of(text: str) -> int:
    return int(text.split()[1])


def expected(data: Data, by_number: np.ndarray) -> dict[str, np.ndarray]:
    parts = {"distillation": data.distillation(), "select": data.select}
    return {
        name: by_number[[number_of(text) for (text,) in split.texts]]
        for name, split in (parts | {"validation": data.validation}).items()
    }


def check(recipe: DataRecipe, by_number: np.ndarray, atol: float = 1e-6, **keys: Any) -> None:
    found = read(recipe, **keys)
    for name, wanted in expected(splits.load_data(recipe, 3), by_number).items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(scores(recipe.task, found[name]), wanted, rtol=0, atol=atol)


def test_columns_in_the_tables_of_the_data_themselves(recipe: DataRecipe) -> None:
    check(recipe, P, probabilities=("p_good", "p_bad", "p_ugly"))


def test_logits_are_returned_as_they_are(recipe: DataRecipe, tmp_path: Path) -> None:
    logits = np.random.default_rng(1).normal(size=P.shape).astype(np.float32)
    rows = [(text, *map(repr, row.tolist())) for text, row in zip(TEXTS, logits, strict=True)]
    file = table(tmp_path / "logits.csv", ("text", *"abc"), rows)
    found = read(recipe, files=(file,), logits=("a", "b", "c"))
    for name, wanted in expected(splits.load_data(recipe, 3), logits).items():
        np.testing.assert_array_equal(found[name], wanted)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize("form", ["object", "list"])
def test_one_column_holds_the_distribution(
    recipe: DataRecipe, tmp_path: Path, ending: str, form: str
) -> None:
    cells: list[Any] = P.tolist()
    if form == "object":  # its order does not matter
        cells = [dict(reversed([*zip(LABELS, row, strict=True)])) for row in cells]
    if ending == "csv":
        cells = [json.dumps(cell) for cell in cells]
    file = table(tmp_path / f"answers.{ending}", ("text", "p"), zip(TEXTS, cells, strict=True))
    check(recipe, P, files=(file,), probabilities=("p",))


def test_what_the_most_probable_labels_leave_is_spread_evenly(
    recipe: DataRecipe, tmp_path: Path
) -> None:
    cells = []
    top = np.empty_like(P)
    for n, row in enumerate(P):
        best = int(row.argmax())
        cells.append(json.dumps({LABELS[best]: row[best]}))
        top[n] = (1 - row[best]) / 2
        top[n, best] = row[best]
    file = table(tmp_path / "top.csv", ("text", "p"), zip(TEXTS, cells, strict=True))
    check(recipe, top, files=(file,), probabilities=("p",))


def test_a_label_with_its_confidence_or_alone(recipe: DataRecipe, tmp_path: Path) -> None:
    rows = []
    wanted = np.empty_like(P)
    for n, row in enumerate(P):
        best = int(row.argmax())
        confidence = "" if n % 2 else row[best]
        share = 1.0 if n % 2 else row[best]
        rows.append((TEXTS[n], LABELS[best], confidence))
        wanted[n] = (1 - share) / 2
        wanted[n, best] = share
    file = table(tmp_path / "labels.csv", ("text", "said", "sure"), rows)
    check(recipe, wanted, files=(file,), label="said", confidence="sure")
    alone = np.eye(3)[P.argmax(axis=1)]
    check(recipe, alone, files=(file,), label="said")


def class_column(path: Path, rows: Iterable[Sequence[Any]], **names: Sequence[str] | None) -> None:
    """Write a table whose columns after ``text`` are ids, with the names of classes or without."""
    kinds = {
        name: datasets.ClassLabel(names=list(of)) if of else datasets.Value("int64")
        for name, of in names.items()
    }
    columns = dict(zip(("text", *names), map(list, zip(*rows, strict=True)), strict=True))
    features = datasets.Features(text=datasets.Value("string"), **kinds)
    datasets.Dataset.from_dict(columns, features).to_parquet(path)


@pytest.mark.parametrize(
    "source", ["classes of the column", "classes of the labels", "labels.txt", "a file"]
)
def test_ids_of_a_teacher_stand_for_the_names_of_their_own_table(
    tmp_path: Path, source: str
) -> None:
    rows = [(text, n % 3, (n + 1) % 3) for n, text in enumerate(TEXTS)]
    said = [LABELS[row[2]] for row in rows]
    named = {"label": LABELS, "said": LABELS if source == "classes of the column" else None}
    for name, part in (("train", rows[:18]), ("validation", rows[18:])):
        if source == "labels.txt":
            table(tmp_path / f"{name}.csv", ("text", "label", "said"), part)
            (tmp_path / "labels.txt").write_text("0\tgood\n1\tbad\n2\tugly\n")
        else:
            class_column(tmp_path / f"{name}.parquet", part, **named)
    files: tuple[str, ...] = ()
    if source == "a file":
        # The table of the answers has names of its own, in an order of its own.
        own = LABELS[::-1]
        files = (str(tmp_path / "answers.parquet"),)
        ids = [own.index(name) for name in said]
        class_column(Path(files[0]), zip(TEXTS, ids, strict=True), said=own)
    values: dict[str, Any] = {"text_columns": ("text",), "label_column": "label"}
    values["max_length_tokens"] = 8
    recipe = DataRecipe(source=str(tmp_path), labels=("ugly", "good", "bad"), **values)
    certain = np.eye(3)[[("ugly", "good", "bad").index(name) for name in said]]
    check(recipe, certain, label="said", files=files)


@pytest.mark.parametrize("cell", ["POS", "0"])
@pytest.mark.parametrize("kind", ["labels.txt", "classes"])
def test_names_that_the_data_do_not_have_are_not_taken_by_their_place(
    recipe: DataRecipe, tmp_path: Path, cell: str, kind: str
) -> None:
    """Only the source of the data may be renamed by data.labels."""
    names = ("POS", "NEG", "NONE")
    (tmp_path / "own").mkdir()
    if kind == "classes":
        file = tmp_path / "own/answers.parquet"
        class_column(file, ((text, 0) for text in TEXTS), said=names)
    else:
        file = tmp_path / "own/answers.csv"
        table(file, ("text", "said"), [(text, cell) for text in TEXTS])
        (tmp_path / "own/labels.txt").write_text("0\tPOS\n1\tNEG\n2\tNONE\n")
    with pytest.raises(DataError, match="names its labels POS, NEG, NONE, and none of them is"):
        read(recipe, files=(str(file),), label="said")


def test_the_file_of_labels_is_found_beside_each_table(
    recipe: DataRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without data.source, and with a path that begins with the home of the user."""
    own = LABELS[::-1]
    said = [n % 3 for n in range(len(TEXTS))]
    rows = [(text, LABELS[number], number) for text, number in zip(TEXTS, said, strict=True)]
    (tmp_path / "other").mkdir()
    for name, part in (("train", rows[:18]), ("validation", rows[18:]), ("all", rows)):
        table(tmp_path / f"other/{name}.csv", ("text", "label", "said"), part)
    lines = "".join(f"{number}\t{name}\n" for number, name in enumerate(own))
    (tmp_path / "other/labels.txt").write_text(lines)
    certain = np.eye(3)[[LABELS.index(own[number]) for number in said]]
    files = {name: str(tmp_path / f"other/{name}.csv") for name in ("train", "validation")}
    alone = recipe.model_copy(update={"source": None, **files})
    check(alone, certain, label="said")
    monkeypatch.setenv("HOME", str(tmp_path))
    check(recipe, certain, label="said", files=("~/other/all.csv",))
    # Distributions do not need it, whatever it holds.
    (tmp_path / "other/labels.txt").write_text("good\nbad\nugly\n")
    columns = tuple(f"p_{name}" for name in LABELS)
    file = table(
        tmp_path / "other/p.csv",
        ("text", *columns),
        [(t, *p) for t, p in zip(TEXTS, P, strict=True)],
    )
    check(recipe, P, probabilities=columns, files=(file,))


def test_what_ids_stand_for_is_part_of_the_fingerprint_of_answers(
    recipe: DataRecipe, tmp_path: Path
) -> None:
    (tmp_path / "own").mkdir()
    file = table(tmp_path / "own/answers.csv", ("text", "said"), [(text, 0) for text in TEXTS])
    answers = (AnswersRecipe(files=(file,), label="said"),)
    whole = load_recipe("smoke")
    teacher = whole.teacher.model_copy(update={"answers": answers})
    given = whole.model_copy(update={"data": recipe, "teacher": teacher})
    found = set()
    for names in (LABELS, LABELS[::-1], LABELS):
        lines = "".join(f"{number}\t{name}\n" for number, name in enumerate(names))
        (tmp_path / "own/labels.txt").write_text(lines)
        found.add(given_sha256(given))
    assert len(found) == 2


@pytest.mark.parametrize("most", [None, 24])  # with a limit the tables are streams
def test_ids_of_a_teacher_on_the_hub_stand_for_the_names_of_their_column(
    recipe: DataRecipe, monkeypatch: pytest.MonkeyPatch, most: int | None
) -> None:
    own = LABELS[::-1]
    said = [LABELS[p.argmax()] for p in P]
    features = datasets.Features(
        text=datasets.Value("string"), said=datasets.ClassLabel(names=list(own))
    )
    columns = {"text": list(TEXTS), "said": [own.index(name) for name in said]}
    rows = datasets.Dataset.from_dict(columns, features)
    monkeypatch.setattr(hub, "load", lambda *_, **__: {"train": rows})
    monkeypatch.setattr("ad2kit.run.hub.commit_of", lambda _: "0" * 40)
    stream = {"train": rows.to_iterable_dataset()}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    limited = recipe.model_copy(update={"max_unlabelled_rows": most})
    found = read_answers(
        limited,
        splits.load_data(recipe, 3),
        AnswersRecipe(files=("hub://one/answers",), label="said"),
    )
    wanted = expected(splits.load_data(recipe, 3), np.array([LABELS.index(name) for name in said]))
    for name, ids in wanted.items():
        np.testing.assert_array_equal(found[name].argmax(axis=1), ids)


@pytest.mark.parametrize("most", [None, 24])
@pytest.mark.parametrize("key", ["teacher.answers", "data.unlabelled"])
def test_the_advice_names_the_section_that_names_the_table(
    recipe: DataRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str, most: int | None
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    data = splits.load_data(recipe, 3)
    recipe = recipe.model_copy(update={"max_unlabelled_rows": most})
    files: tuple[str, ...] = ("hub://one/answers#said",)
    if key == "data.unlabelled":
        recipe, files = recipe.model_copy(update={"unlabelled": files}), ()
    with pytest.raises(DataError, match="does not answer") as refused:
        read_answers(recipe, data, AnswersRecipe(files=files, label="label"))
    (other,) = {"teacher.answers", "data.unlabelled", "data.source"} - {key, "data.source"}
    assert key in refused.value.hint
    assert not {other, "data.source"} & set(refused.value.hint.replace("=", " ").split())


def test_equal_texts_may_have_a_label_as_id_and_as_name(recipe: DataRecipe, tmp_path: Path) -> None:
    named = [LABELS.index(LABELS[p.argmax()]) for p in P]
    class_column(tmp_path / "ids.parquet", zip(TEXTS, named, strict=True), said=LABELS)
    names = [(text, LABELS[each]) for text, each in zip(TEXTS, named, strict=True)]
    files = (str(tmp_path / "ids.parquet"), table(tmp_path / "names.csv", ("text", "said"), names))
    check(recipe, np.eye(3)[named], files=files, label="said")


def test_several_labels_of_a_teacher_are_ids_of_their_own_table(tmp_path: Path) -> None:
    cells = [[0], [1, 0], [], [1]]
    for name in ("train", "validation"):
        texts = [f"{name} {n}" for n in range(4)]
        names = [[("b", "a")[each] for each in ids] for ids in cells]
        table(tmp_path / f"{name}.jsonl", ("text", "label"), zip(texts, names, strict=True))
        features = datasets.Features(
            text=datasets.Value("string"), said=datasets.List(datasets.ClassLabel(names=["b", "a"]))
        )
        rows = datasets.Dataset.from_dict({"text": texts, "said": cells}, features)
        rows.to_parquet(tmp_path / f"said-{name}.parquet")
    recipe = DataRecipe(
        source=str(tmp_path),
        task="multi_label",
        text_columns=("text",),
        label_column="label",
        labels=("a", "b"),
        max_length_tokens=8,
        select_from="validation",
    )
    files = tuple(str(tmp_path / f"said-{name}.parquet") for name in ("train", "validation"))
    found = read(recipe, files=files, label="said")
    wanted = splits.load_data(recipe, 3)
    for name, split in (("distillation", wanted.train), ("validation", wanted.validation)):
        np.testing.assert_array_equal(answers("multi_label", found[name]), split.labels)


def test_a_key_joins_a_file_that_has_no_texts(recipe: DataRecipe, tmp_path: Path) -> None:
    rows = [{"number": n, "p": row} for n, row in enumerate(P.tolist())]
    file = tmp_path / "keys.jsonl"  # here the key is a number, in the tables of the data a text
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    check(recipe, P, files=(str(file),), key="number", probabilities=("p",))


def test_texts_without_labels_have_answers_too(recipe: DataRecipe, tmp_path: Path) -> None:
    more = table(tmp_path / "more.csv", ("text",), [["text 24"], ["text 25"]])
    recipe = recipe.model_copy(update={"unlabelled": (more,)})
    both = np.vstack([P, P[:2]])
    rows = [(f"text {n}", json.dumps(row)) for n, row in enumerate(both.tolist())]
    file = table(tmp_path / "answers.csv", ("text", "p"), rows)
    check(recipe, both, files=(file,), probabilities=("p",))
    short = table(tmp_path / "short.csv", ("text", "p"), rows[:25])
    with pytest.raises(DataError, match=r"1 of 17 of distillation.*\n.*more.csv, line 3"):
        read(recipe, files=(short,), probabilities=("p",))


def test_several_labels_and_numbers(tmp_path: Path) -> None:
    rows = [(text, f"a{',b' * (n % 2)}", n / 4) for n, text in enumerate(TEXTS)]
    for name, part in (("train", rows[:18]), ("validation", rows[18:])):
        table(tmp_path / f"{name}.csv", ("text", "tags", "score"), part)
    recipe = DataRecipe(
        source=str(tmp_path),
        task="multi_label",
        text_columns=("text",),
        label_column="tags",
        labels=("a", "b", "c"),
        max_length_tokens=16,
    )
    file = table(
        tmp_path / "p.csv", ("text", "p"), zip(TEXTS, map(json.dumps, P.tolist()), strict=True)
    )
    check(recipe, P, files=(file,), probabilities=("p",))
    tags = np.array([[1, n % 2, 0] for n in range(len(TEXTS))])
    check(recipe, tags, label="tags")
    numbers = recipe.model_copy(
        update={"task": "regression", "label_column": "score", "labels": None}
    )
    check(numbers, np.arange(len(TEXTS))[:, None] / 4, label="score")


BAD = {
    '{"good": 0.5, "bad": 0.2, "ugly": 0.1}': "must have the sum 1, found 0.8",
    '{"good": 0.9, "bad": 0.2}': "must have the sum at most 1, found 1.1",
    '{"good": 1.2, "bad": -0.2, "ugly": 0}': "must be from 0 to 1, found -0.2",
    '{"god": 1.0}': r"unknown label 'god' \(did you mean 'good'\?\)",
    '{"good": 0.5, "good": 0.5}': "a label is there twice",
    "{'good': 1.0}": "is not JSON",
    "[0.5, 0.5]": "holds 2 numbers, expected 3",
    '{"good": NaN}': "must hold a finite number, found nan",
    '{"good": true}': "must hold a finite number, found True",
    "0.7": "must hold a list or an object",
    "": "is not JSON",
}


@pytest.mark.parametrize(("cell", "reason"), BAD.items())
def test_a_bad_answer_is_refused_by_its_line(
    recipe: DataRecipe, tmp_path: Path, cell: str, reason: str
) -> None:
    cells = [json.dumps(row) for row in P.tolist()]
    cells[4] = cells[9] = cell
    file = table(tmp_path / "answers.csv", ("text", "p"), zip(TEXTS, cells, strict=True))
    with pytest.raises(DataError, match=reason) as refused:
        read(recipe, files=(file,), probabilities=("p",))
    words = refused.value.message
    assert f"2 of 24 rows of {file} cannot be used" in words
    assert f"{file}, line 6" in words
    assert f"{file}, line 11" in words


def test_a_text_with_two_answers_is_refused(recipe: DataRecipe, tmp_path: Path) -> None:
    rows = [(text, json.dumps(row)) for text, row in zip(TEXTS, P.tolist(), strict=True)]
    again = [*rows, rows[3]]  # the same answer again does no harm
    file = table(tmp_path / "answers.csv", ("text", "p"), again)
    check(recipe, P, files=(file,), probabilities=("p",))
    file = table(tmp_path / "answers.csv", ("text", "p"), [*again, (TEXTS[7], rows[8][1])])
    with pytest.raises(DataError, match=r"line 27: another answer than .*, line 9 gives"):
        read(recipe, files=(file,), probabilities=("p",))


def test_texts_without_an_answer_are_refused_with_their_places(
    recipe: DataRecipe, tmp_path: Path
) -> None:
    rows = [(text, json.dumps(row)) for text, row in zip(TEXTS, P.tolist(), strict=True)]
    file = table(tmp_path / "answers.csv", ("text", "p"), rows[1:-1])
    with pytest.raises(DataError, match=r"1 of 6 of validation") as refused:
        read(recipe, files=(file,), probabilities=("p",))
    assert f"{tmp_path / 'train.csv'}, line 2: 'text 0'" in refused.value.message
    assert f"{tmp_path / 'validation.csv'}, line 7: 'text 23'" in refused.value.message
    keys = table(
        tmp_path / "keys.csv", ("number", "p"), [(n, row[1]) for n, row in enumerate(rows[2:])]
    )
    with pytest.raises(DataError, match=r"2 rows of the data have no answer .*\n.*number '22'"):
        read(recipe, files=(keys,), key="number", probabilities=("p",))


@pytest.mark.parametrize("confidence", ["0.2", "1.5", "-1", "high"])
def test_a_confidence_is_a_probability_of_the_best_label(
    recipe: DataRecipe, tmp_path: Path, confidence: str
) -> None:
    rows = [(text, "good", confidence) for text in TEXTS]
    file = table(tmp_path / "labels.csv", ("text", "said", "sure"), rows)
    with pytest.raises(DataError, match=r"24 of 24 rows.*\n.*line 2: 'sure' must"):
        read(recipe, files=(file,), label="said", confidence="sure")


def test_an_unknown_label_and_a_missing_column_are_refused(
    recipe: DataRecipe, tmp_path: Path
) -> None:
    file = table(tmp_path / "labels.csv", ("text", "said"), [(text, "fine") for text in TEXTS])
    with pytest.raises(DataError, match="label 'fine' is not in the label set"):
        read(recipe, files=(file,), label="said")
    with pytest.raises(DataError, match="p_best"):
        read(recipe, probabilities=("p_best",))
    with pytest.raises(DataError, match="names 2 columns: expected one, or one for each of the 3"):
        read(recipe, probabilities=("p_good", "p_bad"))


def test_the_mean_of_several_teachers(recipe: DataRecipe) -> None:
    data = splits.load_data(recipe, 3)
    one, other = P, np.roll(P, 1, axis=1)
    members = [expected(data, logits_of("single_label", p)) for p in (one, other)]
    mean = mean_answers(members, (3.0, 1.0), data)
    for name, wanted in expected(data, 0.75 * one + 0.25 * other).items():
        np.testing.assert_allclose(scores("single_label", mean[name]), wanted, atol=1e-6)
    assert mean_answers(members[:1], (3.0,), data) is members[0]


@pytest.mark.parametrize("task", ["single_label", "multi_label", "regression"])
def test_rows_may_lack_labels_if_the_recipe_says_so(tmp_path: Path, task: Task) -> None:
    cells: dict[str, list[Any]] = {
        "single_label": ["a", "b", None],
        "multi_label": ["a", "a,b", None],
        "regression": [1.5, 0.0, None],
    }
    for name in ("train", "validation"):
        rows = [(f"{name} {n}", cells[task][n % 3]) for n in range(18)]
        table(tmp_path / f"{name}.csv", ("text", "label"), rows)
    recipe = DataRecipe(
        source=str(tmp_path),
        task=task,
        text_columns=("text",),
        label_column="label",
        labels=None if task == "regression" else ("a", "b"),
        max_length_tokens=16,
    )
    if task != "multi_label":  # there an empty cell is a row that has none of the labels
        with pytest.raises(DataError, match=r"train.csv, line 4: 'label'"):
            splits.load_data(recipe, 3)
    data = splits.load_data(recipe.model_copy(update={"missing_labels": "accept"}), 3)
    for split in (data.train, data.select, data.validation):
        lacking = [int(text.split()[1]) % 3 == 2 for (text,) in split.texts]
        np.testing.assert_array_equal(~has_label(data.task, split.labels), lacking)
        outputs = len(data.labels)
        logits = np.random.default_rng(2).normal(size=(len(split), outputs)).astype(np.float32)
        labels = filled(data.task, split.labels, logits)
        assert labels.dtype == split.labels.dtype
        np.testing.assert_array_equal(labels[lacking], answers(data.task, logits)[lacking])
        kept = ~np.array(lacking)
        np.testing.assert_array_equal(labels[kept], split.labels[kept])
    none = splits.load_data(recipe.model_copy(update={"label_column": None}), 3)
    assert not any(has_label(none.task, split.labels).any() for split in none.splits().values())
    assert set(counts(none.task, none.train.labels, none.labels).values()) <= {0}


ANSWERS = "teacher={model: null, finetune: null, answers: [{label: label}]}"
STUDENT = "student.model=random://bert"
REFUSED = {
    "student.model: the teacher is given by its answers": (ANSWERS,),
    "distill.intermediate: hidden_states compare layers": (
        ANSWERS,
        STUDENT,
        "distill.intermediate.hidden_states=1",
    ),
    "give a 'model', or model=null and 'answers'": ("teacher.model=null",),
    "found probabilities and label": (ANSWERS.replace("label: l", "probabilities: [p], label: l"),),
    "'finetune' trains a 'model'": ("teacher.model=null", "teacher.answers=[{label: label}]"),
    "'key' joins 'files' to the data": (ANSWERS.replace("{label", "{key: id, label"),),
    "'confidence' belongs to 'label'": (
        "teacher={model: null, finetune: null, answers: [{logits: [l], confidence: c}]}",
    ),
    "without a 'label_column' nothing else names the labels": ("data.label_column=null",),
    "teacher.finetune: no row has a label": ("data.label_column=null", "data.labels=[a, b]"),
    "hard_label_weight to 0": (
        ANSWERS,
        STUDENT,
        "data.label_column=null",
        "data.labels=[a, b]",
        "distill.hard_label_weight=1",
    ),
    "data.long_texts: each window imitates": (ANSWERS, STUDENT, "data.long_texts=windows"),
    "a 'model' reads the texts itself": (ANSWERS.replace("label: label", "model: a, key: b"),),
}


@pytest.mark.parametrize(("reason", "overrides"), REFUSED.items())
def test_keys_that_do_not_fit_together(reason: str, overrides: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError, match="recipe") as refused:
        load_recipe("smoke", overrides)
    assert reason in refused.value.message


LEARNS = ("distill.hard_label_weight=1", "distill.class_weights=balanced")
FINISHED = "teacher.finetune=null"
ALONE = ("distill.kd_weight=0", "distill.alpha=0", LEARNS[0])


@pytest.mark.parametrize(
    ("lacking", "overrides", "reason"),
    [
        (("train",), (), "teacher.finetune: no row of train has a label"),
        (("select",), (), "teacher.finetune: no row of select has a label"),
        (("train",), (FINISHED, LEARNS[0]), "distill: no row of train has a label"),
        (("train",), (FINISHED, LEARNS[1]), "distill: no row of train has a label"),
        (("train",), (FINISHED, *ALONE), "distill: no row of train has a label"),
        (("train", "select", "validation"), (FINISHED,), None),
        (("validation",), LEARNS, None),
    ],
)
def test_labels_that_nobody_has_are_missed_before_the_training(
    tmp_path: Path, lacking: tuple[str, ...], overrides: tuple[str, ...], reason: str | None
) -> None:
    rows = models.split()
    nobody = replace(rows, labels=no_labels("single_label", len(rows), 2))
    parts: dict[str, Any] = {
        name: nobody if name in lacking else rows for name in ("train", "select", "validation")
    }
    data = replace(models.data(), **parts)
    families.save("bert", tmp_path / "teacher")
    shared = (
        *(f"teacher.model={tmp_path / 'teacher'}", "data.missing_labels=accept"),
        *("data.max_length_tokens=40", "compute.threads=1"),
    )
    if reason is None:
        open_models(load_recipe("smoke", (*shared, *overrides)), data)
        return
    with pytest.raises(DataError) as refused:
        open_models(load_recipe("smoke", (*shared, *overrides)), data)
    assert reason in refused.value.message
    # Do as it says.
    advice = re.findall(r"[a-z_.]+=\w+", refused.value.hint)
    assert advice
    kept = [each for each in overrides if each.partition("=")[0] not in " ".join(advice)]
    open_models(load_recipe("smoke", (*shared, *kept, *advice)), data)
