"""Where the workers of a server leave their numbers, and what they sweep away there."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

import pytest

from ad2kit.errors import ModelError
from ad2kit.service_metrics import _share_with_siblings

if TYPE_CHECKING:
    from pathlib import Path

NOBODY = 2**22 + 1  # above the largest process number of Linux


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this process's server, made for the first time."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "of all servers of a user")
    _share_with_siblings()
    path = os.environ["PROMETHEUS_MULTIPROC_DIR"]
    assert path.startswith(str(tmp_path))
    return tmp_path.__class__(path)


def test_what_a_dead_worker_had_waiting_goes_and_its_counters_stay(folder: Path) -> None:
    for pid in (NOBODY, os.getpid()):
        for kind in ("gauge_livesum", "counter", "histogram"):
            (folder / f"{kind}_{pid}.db").touch()
    _share_with_siblings()
    assert {path.name for path in folder.iterdir()} == {
        f"gauge_livesum_{os.getpid()}.db",
        *(f"{kind}_{pid}.db" for kind in ("counter", "histogram") for pid in (NOBODY, os.getpid())),
    }


def test_the_folders_of_dead_servers_go_and_nothing_else(folder: Path) -> None:
    for name in (f"{NOBODY}-1", f"{os.getpid()}-1", "x-y", "other"):
        (folder.parent / name).mkdir()
    _share_with_siblings()
    found = {path.name for path in folder.parent.iterdir()}
    assert found == {folder.name, f"{os.getpid()}-1", "x-y", "other"}


def test_a_link_that_somebody_else_may_have_put_there_is_refused(folder: Path) -> None:
    ours = folder.parent
    ours.rename(ours.with_name("elsewhere"))
    ours.symlink_to(ours.with_name("elsewhere"))
    with pytest.raises(ModelError, match="not this user's own folder"):
        _share_with_siblings()
