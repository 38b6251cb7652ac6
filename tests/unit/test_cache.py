"""The cache command lists what runs keep, and clears it without harm to those that read it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ad2kit.data import reading, splits
from ad2kit.data.splits import encode, load_data
from ad2kit.planning import cache
from ad2kit.run.files import writing
from ad2kit.run.sections import TextLength
from ad2kit.training import shared
from tests.models import tiny_bert
from tests.unit.test_reading import facts, recipe

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with an entry of each kind, and a teacher."""
    monkeypatch.setattr(reading, "LARGE_BYTES", 0)
    monkeypatch.setattr(splits, "LARGE_ROWS", 0)
    store = tmp_path / "runs" / ".shared"
    data = load_data(recipe(tmp_path), 3, store)
    encode(data.train, tiny_bert().tokenizer, TextLength(32), store)
    shared.write_logits(shared.logits_file(store, "key"), (2, 2), [torch.zeros(2, 2)])
    (store / "teachers" / "key").mkdir(parents=True)
    return store


def test_the_kinds_and_their_sizes(store: Path, ad2kit: Any) -> None:
    told = json.loads(ad2kit("cache", "--runs-dir", store.parent, "--json").out)
    assert [(each["kind"], each["entries"]) for each in told["kept"]] == [
        ("tables", 1),
        ("tokens", 1),
        ("logits", 1),
    ]
    for each in told["kept"]:
        files = [path for path in (store / each["kind"]).rglob("*") if path.is_file()]
        assert each["size_bytes"] == sum(path.stat().st_size for path in files) > 0
    shown = ad2kit("cache", "--runs-dir", store.parent).out
    assert "tokens      1" in shown
    assert len(list(store.rglob("*.arrow"))) == 4  # nothing is cleared unasked


def test_what_is_cleared_is_read_again(store: Path, tmp_path: Path, ad2kit: Any) -> None:
    section = recipe(tmp_path)
    reading_now = load_data(section, 3, store)
    assert ad2kit("cache", "--runs-dir", store.parent, "--clear").code == 0
    assert not [path for path in store.rglob("*") if path.is_file() and path.name != ".lock"]
    assert (store / "teachers" / "key").is_dir()
    expected = facts(load_data(section, 3))
    assert facts(reading_now) == expected  # a process that has the files open goes on
    assert facts(load_data(section, 3, store)) == expected
    assert [each.entries for each in cache.contents(store)] == [1, 0, 0]


def test_an_entry_that_is_being_written_is_left(store: Path) -> None:
    (entry,) = (store / "tables").iterdir()
    with writing(entry):
        assert cache.clear(store) == [entry]
    assert (entry / "train.arrow").is_file()
    assert cache.clear(store) == []
    assert not entry.exists()


def test_no_runs_yet(tmp_path: Path, ad2kit: Any) -> None:
    told = ad2kit("cache", "--runs-dir", tmp_path, "--clear", "--json")
    assert {each["entries"] for each in json.loads(told.out)["kept"]} == {0}
    assert not list(tmp_path.iterdir())
