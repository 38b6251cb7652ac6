"""Bulk scoring as a user meets it: every row once, the same bytes whatever was killed, plain errors.

The graph is the int8 one of a finished run, whose answers depend on what shares a batch: equal
bytes prove equal batches.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import psutil
import pyarrow as pa
import pytest
from pyarrow import parquet

import ad2kit
from ad2kit import corpus
from ad2kit.__main__ import main
from ad2kit.errors import DataError, UserError
from ad2kit.score import Progress, score
from ad2kit.scoring import Scorer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ad2kit.run_dir import RunDir

ROWS, BLOCK_ROWS = 4_000, 100
SIZES = ("--block-rows", str(BLOCK_ROWS), "--batch-size", "8")


@pytest.fixture(scope="module")
def model(finished_run: RunDir) -> Path:
    return finished_run.onnx("int8")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of one and of several sentences, so that sorting by length moves rows."""
    texts = [text for text, _ in corpus.opinions(seed=11).train]
    rows = [" ".join(texts[(n + k) % len(texts)] for k in range(1 + n % 3)) for n in range(ROWS)]
    path = tmp_path_factory.mktemp("input") / "in.parquet"
    columns = {"id": pa.array(range(ROWS)), "text": rows}
    parquet.write_table(pa.table(columns), path, row_group_size=1_250)
    return path


@pytest.fixture(scope="module")
def straight(model: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process that nobody disturbed has made."""
    output = tmp_path_factory.mktemp("straight") / "out"
    sizes = {"block_rows": BLOCK_ROWS, "batch_size": 8}
    report = score(model, str(table), str(output), text_columns=("text",), workers=1, **sizes)
    assert (report.rows, report.bad_rows, report.parts) == (ROWS, 0, ROWS // BLOCK_ROWS)
    return output


@pytest.fixture
def ad2kit_score(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `ad2kit score` in this process; return its exit code, stdout and stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ad2kit", "score", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def command(table: Path, output: Path, model: Path, *more: str) -> list[str]:
    arguments = [str(table), str(output), "--run", str(model), "--text-columns", "text", *SIZES]
    return [sys.executable, "-m", "ad2kit", "score", *arguments, *more]


def kill(arguments: list[str], output: Path, parts: int) -> None:
    """Start a job, and kill its first process alone once there are some parts."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and len(list(output.glob("part-*"))) < parts:
            time.sleep(0.002)
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, "it had ended already"
    assert psutil.wait_procs(children, timeout=20)[1] == [], "workers outlive their parent"
    assert len(list(output.glob("part-*"))) < ROWS // BLOCK_ROWS


def test_every_row_has_the_answer_of_the_classifier(
    straight: Path, table: Path, model: Path
) -> None:
    found, given = parquet.read_table(straight).to_pylist(), parquet.read_table(table).to_pylist()
    assert [{"id": row["id"], "text": row["text"]} for row in found] == given
    first = found[:BLOCK_ROWS]
    predicted = ad2kit.load(model, threads=1).predict([row["text"] for row in first], 8)
    assert [(row["label"], row["score"], row["truncated"]) for row in first] == [
        (each.label, each.score, each.truncated) for each in predicted
    ]
    assert {row["label"] for row in found} == {"negative", "positive"}
    assert {row["truncated"] for row in found} == {True, False}


def test_killed_twice_and_resumed_it_ends_with_the_same_bytes(
    straight: Path, table: Path, model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = command(table, output, model, "--workers", "2", "--json")
    kill(arguments, output, 5)
    (output / ".tmp-new-cafe-part-000039.parquet").write_bytes(b"half")
    kill(arguments, output, 20)
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["rows"] == ROWS
    assert 0 < report["scored_here"] < ROWS - 20 * BLOCK_ROWS + BLOCK_ROWS
    assert "rows/s" in done.stderr
    assert contents(output) == contents(straight)


def test_a_worker_that_is_killed_is_named_and_the_same_command_goes_on(
    straight: Path, table: Path, model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    sizes = {"text_columns": ("text",), "block_rows": BLOCK_ROWS, "batch_size": 8, "workers": 2}

    def kill_one(now: Progress) -> None:
        if now.scored_here:
            psutil.Process().children()[-1].kill()

    with pytest.raises(UserError, match="a scoring process ended before its time"):
        score(model, str(table), str(output), on_progress=kill_one, **sizes)  # type: ignore[arg-type]
    assert 0 < len(list(output.glob("part-*"))) < ROWS // BLOCK_ROWS
    score(model, str(table), str(output), **sizes)  # type: ignore[arg-type]
    assert contents(output) == contents(straight)


def test_ray_makes_the_same_bytes_though_a_worker_is_killed(
    ray_here: str, straight: Path, table: Path, model: Path, tmp_path: Path
) -> None:
    killed: list[psutil.Process] = []

    def kill_one(now: Progress) -> None:
        if now.scored_here and not killed:
            actors = [p for p in psutil.Process().children(recursive=True)
                      if "RayScorer" in " ".join(p.cmdline())]  # fmt: skip
            killed.append(actors[0])
            actors[0].kill()

    output = tmp_path / "out"
    report = score(
        model, str(table), str(output), text_columns=("text",), block_rows=BLOCK_ROWS,
        batch_size=8, engine="ray", workers=2, on_progress=kill_one,
    )  # fmt: skip
    assert len(killed) == 1
    assert report.scored_here == ROWS
    assert contents(output) == contents(straight)


def test_a_ray_job_whose_driver_is_killed_goes_on_with_either_engine(
    ray_here: str, straight: Path, table: Path, model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    address = ["--engine", "ray", "--address", ray_here, "--workers", "1"]
    kill(command(table, output, model, *address), output, 2)
    score(
        model, str(table), str(output), text_columns=("text",), block_rows=BLOCK_ROWS,
        batch_size=8, workers=1,
    )  # fmt: skip
    assert contents(output) == contents(straight)


def test_an_error_in_a_ray_worker_is_told_as_anywhere(
    ray_here: str, model: Path, tmp_path: Path, ad2kit_score: Any
) -> None:
    source, copy = tmp_path / "in.csv", tmp_path / "int8"
    source.write_text("text\nfine\n")
    shutil.copytree(model, copy)
    code, _, err = ad2kit_score(
        source, tmp_path / "out", "--run", copy, "--text-columns", "text", "--engine", "ray",
        "--workers", "64",
    )  # fmt: skip
    assert code == 0, err  # one block needs one worker
    source.write_text("text\n" + "fine\n" * 200)
    code, _, err = ad2kit_score(
        source, tmp_path / "other", "--run", copy, "--text-columns", "text", "--engine", "ray",
        "--workers", "64", "--block-rows", "1",
    )  # fmt: skip
    assert code == 2
    assert "expected a core for each of 64 workers, found 2 in the cluster" in err
