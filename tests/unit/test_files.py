"""What is written is whole or absent, and what a kill left behind is swept away."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from ad2kit.run import files
from ad2kit.run.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path


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


# Replaces a folder in child processes, each of which is interrupted one step later than the last:
# at the n-th call that Python makes to make, open, rename or remove something.
INTERRUPTIONS = """
import os, shutil, signal, sys
from pathlib import Path
from ad2kit.run.files import whole_folder

STEPS = {"os.mkdir", "open", "os.rename", "os.remove", "os.rmdir", "os.scandir"}

def write(path, text):
    with whole_folder(path) as new:
        for name in "ab":
            (new / name).write_text(text)

def child(path, how, left):
    def interrupt(event, _arguments):
        nonlocal left
        if event in STEPS:
            left -= 1
            if left == 0:
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt
    sys.addaudithook(interrupt)
    try:
        write(path, "two")
        if left > 0:
            os._exit(7)  # that was all
    except KeyboardInterrupt:
        pass
    os._exit(0)

root, how = Path(sys.argv[1]), sys.argv[2]
for step in range(1, 100):
    path = root / str(step) / "model"
    write(path, "one")
    process = os.fork()
    if process == 0:
        child(path, how, step)
    _, status = os.waitpid(process, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 7:
        break
"""


@pytest.mark.parametrize("how", ["kill", "exception"])
def test_an_interruption_at_any_step_leaves_the_old_folder_or_the_new_one(
    tmp_path: Path, how: str
) -> None:
    subprocess.run([sys.executable, "-c", INTERRUPTIONS, str(tmp_path), how], check=True)
    *steps, _ = sorted(tmp_path.iterdir(), key=lambda path: int(path.name))
    found = set[str]()
    for step in steps:
        if how == "exception":  # nobody has to tidy up before it is read
            assert (step / "model").is_dir(), f"step {step.name}"
        shutil.copytree(step, tmp_path / "again")
        files.remove_leftovers(step)
        content = {p.name: p.read_text() for p in (step / "model").iterdir()}
        assert content in ({"a": "one", "b": "one"}, {"a": "two", "b": "two"}), f"step {step.name}"
        assert [p.name for p in step.iterdir()] == ["model"]
        found.add(content["a"])
        # Where no lock is, nobody sweeps before the next one writes.
        write(tmp_path / "again" / "model", "three", into="b")
        assert {p.read_text() for p in (tmp_path / "again" / "model").iterdir()} == {"three"}
        assert [p.name for p in (tmp_path / "again").iterdir()] == ["model"]
        shutil.rmtree(tmp_path / "again")
    assert len(steps) >= 8
    assert found == {"one", "two"}


def test_a_folder_with_a_lock_of_its_own_is_left_to_those_who_hold_it(tmp_path: Path) -> None:
    inner = tmp_path / "teacher-run"
    for folder in (tmp_path / "onnx", inner / "onnx"):
        (folder / ".tmp-new-int8").mkdir(parents=True)
        (folder / ".tmp-new-1a2b-parity.json").write_text("half")
    with files.locked(inner):
        assert not list(inner.rglob(".tmp-*"))
        (inner / "onnx" / ".tmp-new-int8").mkdir()
        with files.locked(tmp_path):
            assert [p.name for p in inner.rglob(".tmp-*")] == [".tmp-new-int8"]
            assert not list((tmp_path / "onnx").iterdir())


def test_a_file_that_was_not_finished_has_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_text(tmp_path / "report", "one")
    monkeypatch.setattr(files, "_to_disk", killed)
    with pytest.raises(Killed):
        files.write_text(tmp_path / "report", "two")
    assert len(list(tmp_path.iterdir())) == 2
    assert (tmp_path / "report").read_text() == "one"
    files.remove_leftovers(tmp_path)
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


def test_only_a_newline_ends_a_record_and_one_cut_short_is_left_out(tmp_path: Path) -> None:
    odd = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x1dh\x1ei"
    assert len(odd.splitlines()) == 9
    path = tmp_path / "records.jsonl"
    files.write_text(path, f"{odd}\n{odd}\n")
    assert files.read_lines(path) == [odd, odd]
    path.write_text(f"{odd}\n{odd}"[:-3], encoding="utf-8")
    assert files.read_lines(path) == [odd]
