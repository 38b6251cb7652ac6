"""Where the workers of a server leave their numbers, and what they find there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

import pytest

from ad2kit.run.errors import ModelError
from ad2kit.service.monitoring import RESERVED_BYTES, metrics_folder

if TYPE_CHECKING:
    from pathlib import Path

NOBODY = 2**22 + 1  # above the largest process number of Linux
# A worker of a server: counts, says what all have counted, and ends as it is told.
WORKER = """
import sys
from pathlib import Path
from ad2kit.service.monitoring import ServiceMetrics

metrics = ServiceMetrics(Path(sys.argv[1]), int(sys.argv[2]))
for _ in range(int(sys.argv[3])):
    metrics.answered(0.01)
print(metrics.exposition().decode())
metrics.waiting(5, 7)
if sys.argv[4:]:
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
"""


def work(folder: Path, worker: int, requests: int, *killed: str) -> dict[str, float]:
    """Let a worker answer requests; return what it said of all workers then."""
    done = subprocess.run(
        [sys.executable, "-u", "-c", WORKER, str(folder), str(worker), str(requests), *killed],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (-signal.SIGKILL if killed else 0), done.stderr
    rows = (line.rpartition(" ") for line in done.stdout.splitlines() if line[:1] not in ("", "#"))
    return {name: float(value) for name, _, value in rows}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this process's server, made for the first time."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = metrics_folder()
    assert path.is_relative_to(tmp_path)
    assert path.parent.name == f"ad2kit-metrics-of-{os.getuid()}"
    return path


def test_a_worker_counts_on_where_the_one_before_it_died(folder: Path) -> None:
    requests = 'ad2kit_requests_total{status="200"}'
    assert work(folder, 1, 3, "killed")[requests] == 3
    assert work(folder, 2, 2, "killed")[requests] == 5
    files = sorted(path.name for path in folder.iterdir())
    found = work(folder, 1, 4)
    assert found[requests] == found["ad2kit_request_seconds_count"] == 9
    # What one that was killed had waiting went with it; the other may still have it.
    assert (found["ad2kit_queue_texts"], found["ad2kit_queue_tokens"]) == (5, 7)
    # Workers that die for ever fill no disk.
    assert sorted(path.name for path in folder.iterdir()) == files
    assert {path.stat().st_size for path in folder.iterdir()} == {RESERVED_BYTES}


def test_the_room_for_a_worker_is_taken_before_it_starts(folder: Path) -> None:
    work(folder, 1, 1)
    for path in folder.iterdir():
        assert path.stat().st_blocks * 512 >= RESERVED_BYTES  # of a sparse file: a page or two


def test_the_folders_of_dead_servers_go_and_nothing_else(folder: Path) -> None:
    for name in (f"{NOBODY}-1", f"{os.getpid()}-1", "x-y", "other"):
        (folder.parent / name).mkdir()
    assert metrics_folder() == folder
    found = {path.name for path in folder.parent.iterdir()}
    assert found == {folder.name, f"{os.getpid()}-1", "x-y", "other"}


def test_a_link_that_somebody_else_may_have_put_there_is_refused(folder: Path) -> None:
    ours = folder.parent
    ours.rename(ours.with_name("elsewhere"))
    ours.symlink_to(ours.with_name("elsewhere"))
    with pytest.raises(ModelError, match="not this user's own folder"):
        metrics_folder()


def test_a_folder_that_cannot_be_made_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot leave their metrics in") as refused:
        metrics_folder()
    assert "TMPDIR" in refused.value.hint
