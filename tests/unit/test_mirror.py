"""Folders at an fsspec address: whole or not there, and an address that is none is refused."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest
from fsspec.implementations.local import LocalFileSystem

from ad2kit.campaigns.sweep.storage import Mirror
from ad2kit.run.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    (run / "student").mkdir(parents=True)
    (run / "student" / "model").write_bytes(b"weights")
    (run / "aaa.json").write_text("first by name, sent last")
    (run / "recipe.json").write_text("{}")
    (run / ".lock").write_text("stays here")
    return run


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_what_was_sent_comes_back_whole(tmp_path: Path, folder: Path, scheme: str) -> None:
    mirror = Mirror(f"{scheme}://{tmp_path}/storage/")
    back = tmp_path / "elsewhere" / "run"
    assert not mirror.take(back, "run", last="aaa.json")
    assert not back.exists()
    mirror.send(folder, "run", last="aaa.json")
    back.mkdir(parents=True)
    (back / "recipe.json").write_text("older")
    assert mirror.take(back, "run", last="aaa.json")
    files = {p.relative_to(back).as_posix(): p.read_bytes() for p in back.rglob("*") if p.is_file()}
    assert files == {
        "aaa.json": b"first by name, sent last",
        "recipe.json": b"{}",
        "student/model": b"weights",
    }


def test_what_a_killed_process_left_does_not_stop_the_next(tmp_path: Path, folder: Path) -> None:
    mirror = Mirror(f"file://{tmp_path}/storage")
    mirror.send(folder, "run", last="aaa.json")
    back = tmp_path / "elsewhere" / "run"
    (back.parent / ".tmp-new-run" / "student").mkdir(parents=True)
    assert mirror.take(back, "run", last="aaa.json")
    assert [p.name for p in back.parent.iterdir()] == ["run"]
    assert not list(back.glob(".tmp-*"))


def test_a_copy_that_was_cut_short_is_not_there(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that says so is the last one."""
    put_file = LocalFileSystem.put_file

    def no_room(self: LocalFileSystem, source: str, target: str) -> None:
        if "model" in target:
            raise OSError(errno.ENOSPC, "No space left on device")
        put_file(self, source, target)

    mirror = Mirror(f"file://{tmp_path}/storage")
    monkeypatch.setattr(LocalFileSystem, "put_file", no_room)
    with pytest.raises(OSError, match="No space left"):
        mirror.send(folder, "run", last="aaa.json")
    monkeypatch.undo()
    assert (tmp_path / "storage/run/recipe.json").is_file()
    assert not mirror.take(tmp_path / "back", "run", last="aaa.json")
    mirror.send(folder, "run", last="aaa.json")
    assert mirror.take(tmp_path / "back", "run", last="aaa.json")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("nosuch://bucket/x", "Protocol not known: nosuch"),
        ("s3://bucket/x", "s3fs"),
        ("file:///proc/nothing/can/be/made/here", "cannot be used"),
    ],
)
def test_an_address_that_cannot_be_written_to_is_refused(url: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        Mirror(url)
    assert f"storage '{url}' cannot be used" in caught.value.message
    assert "fsspec" in caught.value.hint
