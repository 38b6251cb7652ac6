"""`ad2kit init`: what it guesses, what it asks for, and that `check` takes its recipe."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from ad2kit.models import pretrained
from ad2kit.planning.init import label_task
from ad2kit.run.recipe import load_recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ad2kit.run.sections import DataRecipe

ROWS = 60
TOPICS = ("sport", "politics", "weather")


def sentence(number: int) -> str:
    return f'the man said "number {number}" to his {("dog", "cat", "cow")[number % 3]}'


def columns(rows: range, **more: Any) -> dict[str, list[Any]]:
    """An id, a text, and whatever a function of the row's number says."""
    return {
        "id": [1_000 + row for row in rows],
        "text": [sentence(row) for row in rows],
        **{name: [cell(row) for row in rows] for name, cell in more.items()},
    }


def write(path: Path, table: dict[str, list[Any]]) -> Path:
    """Write a table in the format that its name ends in."""
    rows = list(zip(*table.values(), strict=True))
    if path.suffix == ".parquet":
        parquet.write_table(pa.table(table), path)
    elif path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(table, row, strict=True))) for row in rows]
        path.write_text("\n".join(lines))
    elif path.suffix == ".tsv":
        path.write_text("\n".join("\t".join(map(str, row)) for row in (tuple(table), *rows)))
    else:
        with path.open("w", newline="") as stream:
            csv.writer(stream).writerows([tuple(table), *rows])
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def guessed(here: Path, ad2kit: Any) -> Any:
    """Make a recipe for two tables, let `check` look at it, and return its data section."""

    def call(suffix: str, options: Sequence[str] = (), **more: Any) -> DataRecipe:
        train = write(here / f"mine.{suffix}", columns(range(ROWS), **more))
        held_out = write(here / f"held.{suffix}", columns(range(ROWS, 2 * ROWS), **more))
        made = ad2kit("init", train, "--validation", held_out, *options)
        assert (made.code, made.err) == (0, "")
        assert made.out.endswith("next: ad2kit check mine.yaml\n")
        checked = ad2kit("check", "mine.yaml")
        assert checked.code == 0, checked.err
        return load_recipe("mine.yaml").data

    return call


def test_classes_of_a_csv(guessed: Any, here: Path) -> None:
    data = guessed("csv", topic=lambda row: TOPICS[row % 3])
    assert (data.text_columns, data.label_column, data.task) == (("text",), "topic", "single_label")
    recipe = (here / "mine.yaml").read_text()
    assert "politics 20 (33.3%), sport 20 (33.3%), weather 20 (33.3%)" in recipe
    assert "UNSURE:" not in recipe
    # All other sections are those of the shipped recipe.
    ours, shipped = load_recipe("mine.yaml").model_dump(), load_recipe("custom").model_dump()
    for each in (ours, shipped):
        del each["data"], each["name"], each["description"]
    assert ours == shipped


def test_a_pair_with_numbers_for_names_in_a_tsv(guessed: Any, here: Path) -> None:
    data = guessed("tsv", other=lambda row: f"a woman said {row * 7}", label=lambda row: row % 2)
    assert (data.text_columns, data.label_column) == (("text", "other"), "label")
    assert (data.task, data.labels) == ("single_label", None)
    recipe = (here / "mine.yaml").read_text()
    assert "# UNSURE: Two columns hold sentences: they are read as a pair." in recipe
    assert "# UNSURE: Nothing says what the numbers are called" in recipe


@pytest.mark.parametrize(
    ("suffix", "cell"),
    [
        ("jsonl", lambda row: [TOPICS[n] for n in range(3) if row >> n & 1]),
        ("parquet", lambda row: [TOPICS[n] for n in range(3) if row >> n & 1]),
        ("csv", lambda row: json.dumps([TOPICS[n] for n in range(3) if row >> n & 1])),
        ("csv", lambda row: ",".join(TOPICS[: 1 + row % 3])),
    ],
)
def test_several_labels(guessed: Any, suffix: str, cell: Any) -> None:
    data = guessed(suffix, tags=cell)
    assert (data.label_column, data.task, data.labels) == ("tags", "multi_label", None)


@pytest.mark.parametrize("options", [(), ("--label", "angry,sad")])
def test_one_column_a_label(guessed: Any, options: tuple[str, ...]) -> None:
    flags = {"angry": lambda row: row % 2, "sad": lambda row: int(row % 3 == 0)}
    data = guessed("csv", options, **flags)
    assert (data.label_column, data.task) == (("angry", "sad"), "multi_label")


def test_a_table_as_others_write_it(here: Path, ad2kit: Any) -> None:
    """Semicolons between the columns, bars between the labels, a backslash before the quotes."""
    for name, rows in (("mine", range(ROWS)), ("held", range(ROWS, 2 * ROWS))):
        texts = [f'the man said \\"never; really\\" to {n} dogs' for n in rows]
        tags = ["|".join(TOPICS[: 1 + n % 3]) for n in rows]
        lines = [f'"{text}";{tag}' for text, tag in zip(texts, tags, strict=True)]
        with gzip.open(here / f"{name}.csv.gz", "wt") as stream:
            stream.write("\n".join(["text;tags", *lines]))
    refused = ad2kit("init", "mine.csv.gz", "--validation", "held.csv.gz")
    assert refused.code == 2
    assert "--csv-quotes backslash" in refused.err
    options = ("--csv-quotes", "backslash", "--name", "mine")
    assert ad2kit("init", "mine.csv.gz", "--validation", "held.csv.gz", *options).code == 0
    data = load_recipe("mine.yaml").data
    assert (data.csv_quotes, data.label_separator) == ("backslash", "|")
    checked = ad2kit("check", "mine.yaml", "--json")
    assert checked.code == 0, checked.err
    report = json.loads(checked.out)
    assert report["labels"] == sorted(TOPICS)
    assert report["splits"]["train"]["example"][0].startswith('the man said "never; really" to ')


def test_rows_of_zeros_and_ones_get_names_to_replace(guessed: Any, here: Path) -> None:
    data = guessed("parquet", tags=lambda row: [row % 2, 1 - row % 2, int(row % 3 == 0)])
    assert (data.task, data.labels) == ("multi_label", ("label-0", "label-1", "label-2"))
    assert "# UNSURE: Each row has 3 cells of 0 or 1" in (here / "mine.yaml").read_text()


def test_numbers_with_fractions_are_a_regression(guessed: Any) -> None:
    data = guessed("tsv", score=lambda row: row % 11 / 2)
    assert (data.label_column, data.task, data.labels) == ("score", "regression", None)


def test_whole_numbers_are_classes_and_that_is_not_sure(guessed: Any, here: Path) -> None:
    assert guessed("csv", stars=lambda row: 1 + row % 5).task == "single_label"
    assert "5 whole numbers are taken for classes" in (here / "mine.yaml").read_text()


def test_many_whole_numbers_are_a_regression_where_they_are_named(guessed: Any) -> None:
    assert guessed("csv", ("--label", "likes"), likes=lambda row: row * row).task == "regression"


def test_the_name_decides_between_two_columns_of_classes(guessed: Any, here: Path) -> None:
    more = {"city": lambda row: "ab"[row % 2], "label": lambda row: TOPICS[row % 3]}
    assert guessed("csv", **more).label_column == "label"
    assert (
        "# UNSURE: Taken for its name; city could be labels too."
        in (here / "mine.yaml").read_text()
    )


def test_what_is_unclear_is_asked_for_with_the_columns(here: Path, ad2kit: Any) -> None:
    more = {
        "city": lambda row: "ab"[row % 2],
        "colour": lambda row: TOPICS[row % 3],
        "body": lambda row: f"{sentence(row)} " * 9,
    }
    train = write(here / "mine.csv", columns(range(ROWS), **more))
    held_out = write(here / "held.csv", columns(range(ROWS, 2 * ROWS), **more))
    command = ["init", train, "--validation", held_out]
    refused = ad2kit(*command)
    assert refused.code == 2
    assert "the label could be in city or colour" in refused.err
    assert "    colour: 3 different values, such as 'sport'" in refused.err
    refused = ad2kit(*command, "--label", "city")
    assert refused.code == 2
    assert "the text could be in body or text" in refused.err
    assert "--text A,B" in refused.err
    assert not (here / "mine.yaml").exists()
    assert ad2kit(*command, "--label", "city", "--text", "text,body").code == 0
    assert load_recipe("mine.yaml").data.text_columns == ("text", "body")
    assert ad2kit("check", "mine.yaml").code == 0


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (("--label", "topik"), "no column 'topik' (did you mean 'topic'?)", "--text A[,B]"),
        (("--text", "text,id2"), "no column 'id2'", "--label C"),
        (("--label", "text"), "'text' holds 60 different values in 60 rows", "--label"),
        (("--text", "text,id,topic"), "expected one or two columns of text, found 3", "--text"),
        (("--text", "topic", "--label", "topic"), "'topic' is both text and label", "--label"),
        (("--validation", "nowhere.csv"), "no file 'nowhere.csv'", "correct the path"),
        (("--name", "My Data"), "'My Data' cannot be the name of a recipe", "--name my-data"),
    ],
)
def test_wrong_options(
    here: Path, ad2kit: Any, options: tuple[str, ...], message: str, hint: str
) -> None:
    table = columns(range(ROWS), topic=lambda row: TOPICS[row % 3])
    train, held_out = write(here / "mine.csv", table), write(here / "held.csv", table)
    refused = ad2kit("init", train, "--validation", held_out, *options)
    assert refused.code == 2
    assert message in refused.err
    assert hint in refused.err
    assert not list(here.glob("*.yaml"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mine.csv", 'text,label\n"a b,x\n', "line 2: not CSV"),
        ("mine.jsonl", '{"text": "a b"\n', "line 1: not JSON"),
        ("mine.tsv", "text\tlabel\na b\n", "line 2: expected 2 fields"),
        ("mine.csv", "text,label\n", "holds no rows"),
        ("mine.txt", "a b\n", "a .txt file holds one text a line"),
        ("mine.csv", "id,n\n1,2\n2,3\n3,4\n4,5\n", "no column looks like a label"),
        ("mine.csv", "id,label\n1,a\n2,a\n3,b\n4,b\n", "no column holds sentences"),
    ],
)
def test_wrong_tables(here: Path, ad2kit: Any, name: str, content: str, message: str) -> None:
    (here / name).write_text(content)
    refused = ad2kit("init", name, "--validation", name)
    assert refused.code == 2
    assert message in refused.err
    assert not list(here.glob("*.yaml"))


def test_a_recipe_is_never_overwritten(here: Path, ad2kit: Any) -> None:
    table = columns(range(ROWS), topic=lambda row: TOPICS[row % 3])
    train, held_out = write(here / "mine.csv", table), write(here / "held.csv", table)
    (here / "mine.yaml").write_text("mine")
    refused = ad2kit("init", train, "--validation", held_out)
    assert refused.code == 2
    assert "mine.yaml exists already" in refused.err
    assert (here / "mine.yaml").read_text() == "mine"
    option = refused.err[refused.err.index("--name") :].partition(",")[0]
    assert ad2kit("init", train, "--validation", held_out, *shlex.split(option)).code == 0
    assert load_recipe("mine-2.yaml").name == "mine-2"


def test_a_folder_that_is_not_there_is_named(here: Path, ad2kit: Any) -> None:
    table = columns(range(ROWS), topic=lambda row: TOPICS[row % 3])
    train, held_out = write(here / "mine.csv", table), write(here / "held.csv", table)
    command = ("init", train, "--validation", held_out, "--name", "conf/mine")
    refused = ad2kit(*command)
    assert refused.code == 2
    assert "make the folder conf" in refused.err
    (here / "conf").mkdir()
    assert ad2kit(*command).code == 0
    assert load_recipe("conf/mine.yaml").name == "mine"


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_a_lone_table_is_divided_as_the_hint_says(here: Path, ad2kit: Any, suffix: str) -> None:
    table = write(here / f"my table.{suffix}", columns(range(99), topic=lambda n: TOPICS[n % 3]))
    refused = ad2kit("init", table)
    assert refused.code == 2
    assert "has no validation table beside it" in refused.err
    assert not list(here.glob("*.yaml"))
    divide, again = refused.err.splitlines()[-2:]
    _, *code = shlex.split(divide)
    subprocess.run([sys.executable, *code], check=True, cwd=here, env=os.environ)
    _, *arguments = shlex.split(again)
    assert ad2kit(*arguments).code == 0
    checked = ad2kit("check", "my-table-train.yaml", "--json")
    assert checked.code == 0, checked.err
    splits = json.loads(checked.out)["splits"]
    rows = {name: split["rows"] for name, split in splits.items()}
    assert (rows["train"] + rows["select"], rows["validation"]) == (79, 20)
    assert splits["validation"]["known"] == 0


def test_a_lone_table_of_spark_is_divided_as_the_hint_says(here: Path, ad2kit: Any) -> None:
    """Spark writes a quotation mark as \\", and a long table in numbered files."""
    table = columns(range(99), topic=lambda n: TOPICS[n % 3])
    rows = list(zip(*table.values(), strict=True))
    (here / "spark").mkdir()
    for number, part in enumerate((rows[:50], rows[50:])):
        with (here / f"spark/train-{number:05}-of-00002.csv").open("w", newline="") as stream:
            writer = csv.writer(
                stream, doublequote=False, escapechar="\\", quoting=csv.QUOTE_NONNUMERIC
            )
            writer.writerows([tuple(table), *part])
    refused = ad2kit("init", "spark", "--csv-quotes", "backslash")
    divide, again = refused.err.splitlines()[-2:]
    _, *code = shlex.split(divide)
    subprocess.run([sys.executable, *code], check=True, cwd=here, env=os.environ)
    _, *arguments = shlex.split(again)
    assert {Path(arguments[1]).name, Path(arguments[3]).name} == {
        "train-train.jsonl",
        "train-held-out.jsonl",
    }
    found = [
        json.loads(line)["text"]
        for name in (arguments[1], arguments[3])
        for line in Path(name).read_text().splitlines()
    ]
    assert sorted(found) == sorted(table["text"])


def test_a_folder_with_validation_rows_and_names(here: Path, ad2kit: Any) -> None:
    folder = here / "News_24"
    folder.mkdir()
    more = {"label": lambda row: row % 3}
    write(folder / "train.tsv", columns(range(ROWS), **more))
    refused = ad2kit("init", folder)
    assert refused.code == 2
    assert "expected one train.(tsv|csv|jsonl|ndjson|json|parquet|arrow)" in refused.err
    write(folder / "dev.tsv", columns(range(ROWS, 2 * ROWS), **more))
    (folder / "labels.txt").write_text("".join(f"{n}\t{name}\n" for n, name in enumerate(TOPICS)))
    assert ad2kit("init", folder).code == 0
    data = load_recipe("news-24.yaml").data
    assert (data.source, data.train, data.validation) == (str(folder), None, "dev")
    assert "Nothing says what the numbers are called" not in Path("news-24.yaml").read_text()
    checked = ad2kit("check", "news-24.yaml")
    assert checked.code == 0
    assert "sport, politics, weather" in checked.out


@pytest.mark.parametrize(("words", "expected"), [(3, 16), (30, 40), (3_000, 512)])
def test_the_length_is_that_of_99_texts_of_100(
    here: Path, ad2kit: Any, words: int, expected: int
) -> None:
    """One word is one token here, beside [CLS] and [SEP]; lengths go up in steps of eight."""
    table = {"text": ["good " * words + "dog"] * 40 + ["bad dog"] * 40, "label": ["a", "b"] * 40}
    train = write(here / "mine.csv", table)
    assert ad2kit("init", train, "--validation", train, "--text", "text").code == 0
    assert load_recipe("mine.yaml").data.max_length_tokens == expected
    recipe = (here / "mine.yaml").read_text()
    assert f"99 of 100 texts have at most {words + 3} tokens, by the tokenizer of" in recipe
    assert ("The model reads 512 tokens: 50% of the texts are cut" in recipe) == (words == 3_000)


def test_without_the_packaged_model_the_length_is_estimated(
    here: Path, ad2kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "find_spec", lambda _name: None)
    table = {"text": ["good " * 39 + "dog", "bad dog"] * 40, "label": ["a", "b"] * 40}
    train = write(here / "mine.csv", table)
    assert ad2kit("init", train, "--validation", train, "--text", "text").code == 0
    assert load_recipe("mine.yaml").data.max_length_tokens == 64  # 1.4 * 40 + 3, in steps of eight
    assert "estimated from the words" in (here / "mine.yaml").read_text()


@pytest.mark.parametrize(
    ("cells", "task"),
    [
        (["a", "b"] * 9, "single_label"),
        (["New York, NY", "Austin, TX"] * 9, "single_label"),
        (["red, blue", "red", "blue", "red, blue"] * 5, "multi_label"),
        ([True, False] * 9, "single_label"),
        (["1.0", "2.0"] * 9, "single_label"),
        (["0.5", "1"] * 9, "regression"),
        ([*range(18)], None),
        ([str(n) for n in range(18)], None),
        (["same"] * 9, None),
        (["a", None, "b"] * 9, None),
        (["a", "", "b"] * 9, None),
        ([f"a sentence of its own, number {n}" for n in range(18)], None),
        (["[1]", "[2, 3]"] * 9, "multi_label"),
        (["[1", "[2"] * 9, "single_label"),
        ([{"a": 1}, {"a": 2}] * 9, None),
    ],
)
def test_what_a_column_of_labels_looks_like(cells: list[Any], task: str | None) -> None:
    assert label_task(cells) == task


def test_one_class_only_is_not_sure_and_refused_by_check(here: Path, ad2kit: Any) -> None:
    for name, rows in (("mine", range(ROWS)), ("held", range(ROWS, 2 * ROWS))):
        write(here / f"{name}.csv", columns(rows, label=lambda _: "good"))
    made = ad2kit("init", "mine.csv", "--validation", "held.csv", "--label", "label")
    assert made.code == 0
    assert "unsure, labels: All rows have the same" in made.out
    checked = ad2kit("check", "mine.yaml")
    assert checked.code != 0
    assert "one class only: 'good'" in checked.err
    assert "max_train_rows" not in checked.err
