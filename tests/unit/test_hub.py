"""References to the hub: how they are read, and how a run pins them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ad2kit.run import hub
from ad2kit.run.errors import DataError, ModelError
from ad2kit.run.folder import RunDir, open_run, run_folder
from ad2kit.run.recipe import load_recipe

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
