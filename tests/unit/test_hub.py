"""References to the hub: how they are read, and how a run pins them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import datasets
import pyarrow as pa
import pytest
from huggingface_hub import constants

from ad2kit.run import hub
from ad2kit.run.errors import DataError, ModelError
from ad2kit.run.folder import RunDir, open_run, run_folder
from ad2kit.run.recipe import load_recipe
from ad2kit.tables.hub import load

if TYPE_CHECKING:
    from pathlib import Path

ONE, TWO = "1" * 40, "2" * 40


@pytest.mark.parametrize(
    ("reference", "kind", "expected"),
    [
        ("hub://a/b", "model", ("a/b", None, "main")),
        ("hub://b@v1", "model", ("b", None, "v1")),
        ("hub://a/b@refs/pr/3", "model", ("a/b", None, "refs/pr/3")),
        ("hub://a/b/c", "dataset", ("a/b", "c", "main")),
        ("hub://a/b/c@v1#train", "dataset", ("a/b", "c", "v1")),
        ("hub://a/b#x@y", "dataset", ("a/b", None, "main")),
    ],
)
def test_the_parts_of_an_address(
    reference: str, kind: hub.Kind, expected: tuple[str, str | None, str]
) -> None:
    address = hub.parse(reference, kind, "data.source")
    assert (address.name, address.config, address.revision) == expected


@pytest.mark.parametrize("reference", ["hub://", "hub://a/", "hub://a/b@", "hub://a/b/c/d"])
def test_an_address_of_other_parts_is_refused(reference: str) -> None:
    with pytest.raises(ModelError, match="expected hub://owner/name"):
        hub.parse(reference, "model", "teacher.model")
    with pytest.raises(DataError, match=r"expected hub://owner/name\[/config\]\[@revision\]"):
        hub.parse(reference, "dataset", "data.source")


def test_a_run_is_pinned_and_keeps_its_folder(tmp_path: Path) -> None:
    recipe = load_recipe("sst2", ["data.unlabelled=[hub://a/b@v1#more,mine.txt]"])
    commits = {
        "hub://nyu-mll/glue/sst2": ONE,
        "hub://google-bert/bert-base-uncased": TWO,
        "hub://a/b@v1#more": ONE,
    }
    assert set(hub.references(recipe).values()) == set(commits)
    run = RunDir(run_folder(recipe, tmp_path), recipe, commits=commits)
    run.path.mkdir()
    with run.locked():
        pass
    for each in (run, RunDir(run.path), open_run(recipe, tmp_path)):
        with each.locked() as held:
            assert held.recipe.data.source == f"hub://nyu-mll/glue/sst2@{ONE}"
            assert held.recipe.data.unlabelled == (f"hub://a/b@{ONE}#more", "mine.txt")
            assert held.recipe.teacher.model == f"hub://google-bert/bert-base-uncased@{TWO}"
            assert held.recipe.student.model is None
    assert run_folder(run.recipe, tmp_path) != run.path  # one that names its commits is another

    # A run of an older version has no such file, and reads what it has read so far.
    run.hub_file.unlink()
    assert open_run(recipe, tmp_path).recipe == recipe


def test_a_run_that_the_hub_refuses_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot load the data set 'nyu-mll/glue/sst2'"):
        open_run("sst2", tmp_path)
    assert not list(tmp_path.iterdir())


README = """---
configs:
- config_name: small
  data_files: small/*
- config_name: large
  data_files: large/*
{}---
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of datasets of a user without a network; that of the hub lies beside it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path


def prepare(cache: Path, folder: str, config: str) -> None:
    """Write what datasets keeps of one configuration; its only text is the name of the folder."""
    path = cache / "datasets" / "one___set" / folder / "0.0.0" / ONE
    path.mkdir(parents=True)
    rows = datasets.Dataset.from_dict({"text": [folder]})
    with pa.ipc.new_stream(path / "set-train.arrow", rows.data.table.schema) as file:
        file.write_table(rows.data.table)
    split = datasets.SplitInfo("train", num_bytes=9, num_examples=1, dataset_name="set")
    datasets.DatasetInfo(
        features=rows.features,
        config_name=config,
        dataset_name="set",
        splits=datasets.SplitDict({"train": split}),
    ).write_to_directory(str(path))


def write_card(cache: Path, more: str = "") -> None:
    path = cache / "hub" / "datasets--one--set" / "snapshots" / ONE / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(README.format(more))


def loaded(reference: str) -> list[str]:
    return list(load(f"hub://{reference}@{ONE}", key="data.source")["train"]["text"])


def test_without_a_network_only_what_was_asked_for_is_read(cache: Path) -> None:
    # A part of the files, which load_dataset(..., data_files=...) has left there.
    prepare(cache, "default-1a2b", "default")
    with pytest.raises(DataError, match=r"does not hold its configuration 'default'") as refused:
        loaded("one/set")
    assert "configurations in it: none; parts of some, which are not read: 'default-1a2b'" in str(
        refused.value
    )
    prepare(cache, "default", "default")
    assert loaded("one/set") == ["default"]
    with pytest.raises(DataError, match=r"'small' .*configurations in it: 'default';") as refused:
        loaded("one/set/small")
    assert "write hub://one/set/CONFIG with one of these" in refused.value.hint
    assert "data.source=FOLDER" in refused.value.hint


def test_without_a_network_the_card_names_the_default_configuration(cache: Path) -> None:
    prepare(cache, "small", "small")
    write_card(cache)
    with pytest.raises(DataError, match="does not hold a default configuration"):
        loaded("one/set")  # datasets refuses it too, with a network
    assert loaded("one/set/small") == ["small"]
    write_card(cache, "  default: true\n")
    with pytest.raises(DataError, match="does not hold its configuration 'large'"):
        loaded("one/set")
    prepare(cache, "large", "large")
    assert loaded("one/set") == ["large"]
