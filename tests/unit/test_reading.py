"""Rows that are kept in files are the rows of the tables, and are read from them once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ad2kit.data import reading
from ad2kit.data.splits import Data, load_data
from ad2kit.run.errors import DataError, RunError
from ad2kit.run.files import fingerprint
from ad2kit.run.sections import DataRecipe

if TYPE_CHECKING:
    from collections.abc import Callable

LABELS: dict[str, Callable[[int], object]] = {
    "single_label": lambda number: ("good", "bad", "so so")[number % 3],
    "multi_label": lambda number: ["good", "long"][: number % 3],
    "regression": lambda number: number / 7,
}


@pytest.fixture(autouse=True)
def small_tables_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LARGE_BYTES", 0)
    monkeypatch.setattr(reading, "_BATCH_ROWS", 16)


def table(path: Path, name: str, rows: int, label: Callable[[int], object]) -> Path:
    lines = (
        json.dumps({"a": f"{name} {n}\u2028é", "b": f"b {n % 9}", "label": label(n)})
        for n in range(rows)
    )
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def recipe(folder: Path, task: str = "single_label", **changes: object) -> DataRecipe:
    """Write three tables; return the section that names them."""
    label = LABELS[task]
    values: dict[str, object] = {
        "train": str(table(folder / "train.jsonl", "train", 100, label)),
        "validation": str(table(folder / "held.jsonl", "held", 40, label)),
        "unlabelled": (str(table(folder / "more.jsonl", "more", 33, label)),) * 2,
        "task": task,
        "text_columns": ("a", "b"),
        "label_column": "label",
        "max_length_tokens": 32,
    }
    return DataRecipe.model_validate(values | changes)


def facts(data: Data) -> list[Any]:
    splits = [
        (name, tuple(split.texts), split.labels.tolist(), str(split.labels.dtype), split.sha256)
        for name, split in data.splits().items()
        if name != "unlabelled"
    ]
    everything = data.distillation()
    return [*splits, tuple(everything.texts), data.labels, data.order_given, data.bad_rows]


@pytest.mark.parametrize("task", LABELS)
def test_kept_rows_are_the_rows_of_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    section = recipe(tmp_path, task)
    in_memory = load_data(section, 3)
    first = load_data(section, 3, tmp_path / "store")
    monkeypatch.setattr(reading, "_read", None)  # the tables are not read again
    again = load_data(section, 3, tmp_path / "store")
    assert facts(first) == facts(again) == facts(in_memory)
    assert again.train.texts.files
    assert not in_memory.train.texts.files
    # Other choices among the same rows need no reading.
    fewer = section.model_copy(update={"max_train_rows": 30, "max_length_tokens": 9})
    assert len(load_data(fewer, 4, tmp_path / "store").train) == 24
    assert len(list((tmp_path / "store" / "tables").iterdir())) == 1


def test_whatever_decides_the_rows_leads_to_other_files(tmp_path: Path) -> None:
    store = tmp_path / "store"
    section = recipe(tmp_path)
    assert load_data(section, 3, store).labels == ("bad", "good", "so so")
    named = section.model_copy(update={"labels": ("so so", "good", "bad")})
    assert load_data(named, 3, store).labels == named.labels
    one_text = section.model_copy(update={"text_columns": ("a",)})
    assert load_data(one_text, 3, store).train.texts[0][1:] == ()
    table(tmp_path / "more.jsonl", "changed", 33, LABELS["single_label"])
    assert load_data(section, 3, store).unlabelled.texts[0] == ("changed 0\u2028é", "b 0")
    assert len(list((store / "tables").iterdir())) == 4


def test_a_fingerprint_is_kept_for_these_rows_and_labels_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = recipe(tmp_path)
    data = load_data(section, 3, tmp_path / "store")
    shas = [split.sha256 for split in data.splits().values()]
    other = load_data(section, 4, tmp_path / "store")
    assert other.train.sha256 not in shas
    changed = data.train.take(np.arange(80))
    assert changed.sha256 == data.train.sha256  # the same rows
    changed = type(changed)(changed.texts, 2 - changed.labels)
    assert changed.sha256 == fingerprint(changed.texts.blocks(), changed.labels.tolist())
    assert changed.sha256 != data.train.sha256
    monkeypatch.setattr("ad2kit.data.mapped.TextRows.blocks", None)  # no text is read again
    monkeypatch.setattr("ad2kit.data.splits._check_leakage", lambda *_: None)
    again = load_data(section, 3, tmp_path / "store")
    assert [split.sha256 for split in again.splits().values()] == shas


def test_bad_rows_are_kept_with_the_rows(tmp_path: Path) -> None:
    section = recipe(tmp_path, bad_rows="skip")
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('\n{"a": "", "b": "b", "label": "good"}\n')
    for _ in range(2):
        (bad,) = load_data(section, 3, tmp_path / "store").bad_rows
        assert (bad.row, "'a' must be a text" in bad.reason) == (101, True)


def test_a_refused_table_leaves_no_files(tmp_path: Path) -> None:
    section = recipe(tmp_path)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('\n{"a": "", "b": "b", "label": "good"}\n')
    with pytest.raises(DataError, match=r"train\.jsonl, line 101: 'a' must be a text"):
        load_data(section, 3, tmp_path / "store")
    (folder,) = (tmp_path / "store" / "tables").iterdir()
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_killed_reader_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    """The process dies after the texts of train are whole, and before the labels are."""
    section = recipe(tmp_path)
    script = (
        "import os, signal, sys; from pathlib import Path; from ad2kit.data import reading\n"
        "from ad2kit.data.splits import load_data\n"
        "from ad2kit.run.sections import DataRecipe\n"
        "reading.LARGE_BYTES = 0\n"
        "reading.np.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "load_data(DataRecipe.model_validate_json(sys.argv[1]), 3, Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, section.model_dump_json(), str(tmp_path / "store")]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode == -signal.SIGKILL
    (folder,) = (tmp_path / "store" / "tables").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert "train.arrow" in names
    assert "rows.json" not in names
    # What is there is not trusted: it is written again.
    (folder / "train.arrow").write_bytes(b"half")
    assert facts(load_data(section, 3, tmp_path / "store")) == facts(load_data(section, 3))
    assert not list(folder.glob(".tmp-*"))


def test_damaged_files_are_refused_and_the_advice_helps(tmp_path: Path) -> None:
    section = recipe(tmp_path)
    store = tmp_path / "store"
    load_data(section, 3, store)
    (folder,) = (store / "tables").iterdir()
    for name in ("train.arrow", "labels.npy"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:50])
        with pytest.raises(RunError, match=f"{name} is damaged") as caught:
            load_data(section, 3, store)
        assert f"delete {folder}" in caught.value.hint
        (folder / name).write_bytes(content)
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    assert facts(load_data(section, 3, store)) == facts(load_data(section, 3))
