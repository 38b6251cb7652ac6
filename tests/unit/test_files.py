"""What is written is whole or absent, and what a kill left behind is swept away."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ad2kit import files
from ad2kit.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable


class Killed(BaseException):
    """Stands for SIGKILL: nothing that should tidy up gets to run."""


def killed(*_arguments: object) -> None:
    raise Killed


def write(path: Path, content: str, into: str = "a") -> None:
    with files.whole_folder(path) as new:
        (new / "a").write_text(content)
        (new / into).write_text(content)


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path / "model", "one")
    (tmp_path / "model" / "stray").write_text("")
    write(tmp_path / "model", "two")
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["a"]
    assert (tmp_path / "model" / "a").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_failure_leaves_the_old_folder_and_no_rubbish(tmp_path: Path) -> None:
    write(tmp_path / "model", "one")
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "model", "half", into="no folder/a")
    assert (tmp_path / "model" / "a").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(("renames", "expected"), [(0, "one"), (1, "one"), (2, "two")])
def test_a_kill_between_the_renames_loses_neither_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int, expected: str
) -> None:
    """The old folder gives up its name just before the new one takes it."""
    write(tmp_path / "model", "one")
    rename: Callable[[Path, Path], Path] = Path.rename
    done = 0

    def killing_rename(self: Path, target: Path) -> Path:
        nonlocal done
        if done == renames:
            raise Killed
        done += 1
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killing_rename)
        patch.setattr(shutil, "rmtree", lambda *_args, **_options: None)
        try:
            write(tmp_path / "model", "two")
        except Killed:
            assert renames < 2
    files.sweep(tmp_path)
    assert (tmp_path / "model" / "a").read_text() == expected
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_file_that_was_not_finished_has_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_text(tmp_path / "report", "one")
    monkeypatch.setattr(files, "_to_disk", killed)
    with pytest.raises(Killed):
        files.write_text(tmp_path / "report", "two")
    assert len(list(tmp_path.iterdir())) == 2
    assert (tmp_path / "report").read_text() == "one"
    files.sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


def test_a_changed_and_a_missing_file_are_named(tmp_path: Path) -> None:
    write(tmp_path / "model", "one")
    digests = files.sha256_of_folder(tmp_path / "model")
    files.check_sha256(tmp_path / "model", digests, hint="")
    (tmp_path / "model" / "a").write_text("two")
    with pytest.raises(ModelError, match="is not the file that was written") as caught:
        files.check_sha256(tmp_path / "model", digests, hint="copy it again")
    assert caught.value.hint == "copy it again"
    (tmp_path / "model" / "a").unlink()
    with pytest.raises(ModelError, match="found no file"):
        files.check_sha256(tmp_path / "model", digests, hint="")
