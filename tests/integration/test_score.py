"""Bulk scoring as a user meets it: every row once, the same bytes whatever was killed.

The graph is the int8 one of a finished run, whose answers depend on what shares a batch: equal
bytes prove equal batches.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import fsspec
import psutil
import pyarrow as pa
import pytest
import ray
from pyarrow import parquet

import ad2kit
from ad2kit.__main__ import main
from ad2kit.data import demo_reviews
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.run.errors import DataError, ModelError, UserError
from ad2kit.run.files import sha256_of, write_record
from ad2kit.scoring.score import Progress, score
from ad2kit.scoring.workers import interrupts_blocked
from tests.http_client import command_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ad2kit.run.folder import RunDir
    from ad2kit.scoring.records import ScoreReport

ROWS, BLOCK_ROWS = 4_000, 100
SIZES = ("--block-rows", str(BLOCK_ROWS), "--batch-size", "8")


@pytest.fixture(scope="module")
def model(finished_run: RunDir) -> Path:
    return finished_run.onnx("int8")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of one and of several sentences, so that sorting by length moves rows."""
    texts = [text for text, _ in demo_reviews.opinions(seed=11).train]
    rows = [" ".join(texts[(n + k) % len(texts)] for k in range(1 + n % 3)) for n in range(ROWS)]
    path = tmp_path_factory.mktemp("input") / "in.parquet"
    columns = {"id": pa.array(range(ROWS)), "text": rows}
    parquet.write_table(pa.table(columns), path, row_group_size=1_250)
    return path


@pytest.fixture(scope="module")
def straight(model: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process that nobody disturbed has made."""
    output = tmp_path_factory.mktemp("straight") / "out"
    report = score_it(model, table, output)
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


def score_it(model: Path, table: str | Path, output: str | Path, **changes: Any) -> ScoreReport:
    """Score by one process in small blocks and batches, but for the changes."""
    options = {
        "text_columns": ("text",),
        "block_rows": BLOCK_ROWS,
        "batch_size": 8,
        "workers": 1,
    }
    return score(model, str(table), str(output), **{**options, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def command(table: Path, output: Path, model: Path, *more: str) -> list[str]:
    arguments = [str(table), str(output), "--run", str(model), "--text-columns", "text", *SIZES]
    return [sys.executable, "-m", "ad2kit", "score", *arguments, *more]


def children() -> list[tuple[psutil.Process, str]]:
    """The processes that this one has started, with their command lines."""
    processes = psutil.Process().children(recursive=True)
    return [(process, " ".join(command_of(process))) for process in processes]


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
    (output / ".tmp-new-cafe-part-00000039.parquet").write_bytes(b"half")
    kill(arguments, output, 20)
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["rows"] == ROWS
    assert 0 < report["scored_here"] < ROWS - 20 * BLOCK_ROWS + BLOCK_ROWS
    assert 0 < report["rows_per_s_per_core"] < report["limit_rows_per_s_per_core"]
    assert "rows/s" in done.stderr
    assert contents(output) == contents(straight)


def test_a_worker_that_is_killed_is_named_and_the_same_command_goes_on(
    straight: Path, table: Path, model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"

    def kill_one(now: Progress) -> None:
        if now.scored_here:
            [process for process, line in children() if "spawn_main" in line][-1].kill()

    with pytest.raises(UserError, match="a scoring process ended before its time"):
        score_it(model, table, output, workers=2, on_progress=kill_one)
    assert 0 < len(list(output.glob("part-*"))) < ROWS // BLOCK_ROWS
    score_it(model, table, output, workers=2)
    assert contents(output) == contents(straight)


@pytest.mark.usefixtures("ray_here")
def test_ray_makes_the_same_bytes_though_a_worker_is_killed(
    straight: Path, table: Path, model: Path, tmp_path: Path
) -> None:
    killed: list[psutil.Process] = []

    def kill_one(now: Progress) -> None:
        if now.scored_here and not killed:
            actors = [process for process, line in children() if "RayScorer" in line]
            killed.append(actors[0])
            actors[0].kill()

    output = tmp_path / "out"
    report = score_it(model, table, output, engine="ray", workers=2, on_progress=kill_one)
    assert len(killed) == 1
    assert report.scored_here == ROWS
    assert contents(output) == contents(straight)


@pytest.mark.usefixtures("ray_here")
def test_a_ray_job_whose_driver_is_killed_goes_on_with_either_engine(
    straight: Path, table: Path, model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    here = ray.get_runtime_context().gcs_address
    address = ["--engine", "ray", "--address", here, "--workers", "1"]
    kill(command(table, output, model, *address), output, 2)
    score_it(model, table, output)
    assert contents(output) == contents(straight)


@pytest.mark.usefixtures("ray_here")
def test_what_ray_cannot_do_is_said(
    model: Path, table: Path, tmp_path: Path, ad2kit_score: Any
) -> None:
    options = (*SIZES, "--run", model, "--text-columns", "text", "--engine", "ray")
    code, _, err = ad2kit_score(table, tmp_path / "a", *options, "--workers", "64")
    assert code == 2
    assert "expected a core for each of" in err
    source = tmp_path / "in.csv"
    source.write_text("text\nfine\n")
    # Written anew between survey and scoring, as if something else were still filling it.
    with pytest.raises(DataError, match="has changed while it was scored: expected 1 rows") as told:
        score_it(
            model,
            source,
            tmp_path / "b",
            engine="ray",
            on_progress=lambda _: source.write_text("text\n"),
        )
    assert "once it is complete" in told.value.hint
    source.write_text("text\nfine\n")
    with pytest.raises(DataError, match=r"cannot read .*in\.csv: .*No such file"):
        score_it(model, source, tmp_path / "c", engine="ray", on_progress=lambda _: source.unlink())


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize("engine", ["process", "ray"])
def test_no_worker_has_torch(engine: Any, table: Path, model: Path, tmp_path: Path) -> None:
    seen: dict[int, str] = {}

    def look(now: Progress) -> None:
        if now.scored_here and not seen:
            for process, line in children():
                if {"RayScorer", "spawn_main"} & set(re.findall(r"\w+", line)):
                    seen[process.pid] = str(process.memory_maps())

    score_it(model, table, tmp_path / "out", engine=engine, workers=2, on_progress=look)
    working = [maps for maps in seen.values() if "onnxruntime" in maps]
    assert working
    assert not [maps for maps in working if "libtorch" in maps]
    assert "libtorch" in str(psutil.Process().memory_maps())  # else it would prove nothing


def test_an_unreachable_address_ends_with_2(table: Path, model: Path, tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        here = f"127.0.0.1:{nobody.getsockname()[1]}"
        arguments = command(table, tmp_path / "out", model, "--engine", "ray", "--address", here)
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2, done.stderr
    assert f"no Ray cluster answers at {here}: " in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_rows_are_listed_and_the_others_scored(
    model: Path, tmp_path: Path, ad2kit_score: Any
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out"
    lines = [
        {"id": 1, "text": "never dull"},
        {"id": 2, "text": " "},
        {"id": 3, "text": None},
        {"id": 4, "text": "half \ud800"},
        {"id": 5},
        {"id": 6, "text": "dull \u2028 " * 200},
    ]
    source.write_text("\n".join([*map(json.dumps, lines), "{"]) + "\n")
    arguments = (source, output, "--run", model, "--text-columns", "text", "--block-rows", 2)
    for _ in range(2):  # the second time, nothing is left to score
        code, out, err = ad2kit_score(*arguments, "--json")
        assert code == 2
        assert "5 of 7 rows got no answer" in err
        report = json.loads(out)
        assert report["bad_rows"] == 5
        assert report["answered_here"] == report["scored_here"] * 2 / 7
    scored = [
        json.loads(line)
        for path in sorted(output.glob("part-*"))
        for line in path.read_text().split("\n")
        if line
    ]
    assert [(row["id"], row["truncated"]) for row in scored] == [(1, False), (6, True)]
    bad = [
        json.loads(line)
        for path in sorted(output.glob("_errors/*"))
        for line in path.read_text().splitlines()
    ]
    assert [(row["row"], row["line"]) for row in bad] == [(n, n) for n in (2, 3, 4, 5, 7)]
    assert [row["reason"].split(":")[0] for row in bad] == [
        "'text'",
        "'text'",
        "holds half a surrogate pair, which is no character",
        "'text'",
        "not JSON",
    ]
    assert {row["file"] for row in bad} == {str(source)}


@pytest.fixture
def memory() -> Iterator[Any]:
    store = fsspec.filesystem("memory")
    yield store
    for folder in ("/in", "/out"):
        store.rm(folder, recursive=True)


def test_any_fsspec_address(
    memory: Any, straight: Path, table: Path, model: Path, tmp_path: Path, ad2kit_score: Any
) -> None:
    memory.pipe_file("/in/deep/in.parquet", table.read_bytes())
    options = ("--run", model, "--text-columns", "text", *SIZES)
    code, out, err = ad2kit_score("memory://in", "memory://out", *options)
    assert code == 0, err
    assert f"{ROWS:,} rows in {ROWS // BLOCK_ROWS} parts in memory:///out" in out
    found = {path.removeprefix("/out/"): memory.cat_file(path) for path in memory.find("/out")}
    parts = {name: content for name, content in contents(straight).items() if "part" in name}
    assert found.keys() == {"_job.json", *parts}
    assert {name: found[name] for name in parts} == parts
    assert (
        "all of them were there already" in ad2kit_score("memory://in", "memory://out", *options)[1]
    )
    code, _, err = ad2kit_score("memory://in", "memory://out", *options, "--workers", "2")
    assert (code, "memory:// is seen by this process alone" in err) == (2, True)
    with pytest.raises(UserError, match="memory:// is seen by this process alone"):
        score_it(model, "memory://in", tmp_path, engine="ray")
    folder = tmp_path / "in.jsonl"
    folder.write_text('{"text": "fine"}\n')
    assert ad2kit_score(f"file://{folder}", f"file://{tmp_path}/out", *options)[0] == 0
    assert (tmp_path / "out" / "part-00000000.jsonl").read_text().startswith('{"text": "fine", "la')


@pytest.mark.parametrize(
    ("files", "options", "expected"),
    [
        ({}, [], "no file '"),
        ({"a.csv": "text\nx\n", "b.jsonl": "{}"}, [], "expected files of one format"),
        ({"a.csv": "txt\nx\n"}, [], "no column 'text' (did you mean 'txt'?)"),
        (
            {"a.csv": "text\nx\n"},
            ["--text-columns", "text,more"],
            "reads 1 text column(s), found 2",
        ),
        ({"a.csv": "text,score\nx,1\n"}, [], "has a column 'score' already"),
        ({"a.csv": "text\n"}, [], "no rows in"),
        ({"a.csv": "text\nx\n"}, ["--address", "h:1"], "add --engine ray"),
        ({"a.csv": "text\nx\n"}, ["--engine", "spark"], "'spark' is not one of"),
        ({"a.csv": "text\nx\n"}, ["--workers", "0"], "greater than or equal to 1"),
        ({"a.csv": "text\nx\n"}, ["--run", "nowhere"], "'nowhere' is neither a run folder nor"),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(
    copied_run: RunDir,
    tmp_path: Path,
    ad2kit_score: Any,
    files: dict[str, str],
    options: list[str],
    expected: str,
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, content in files.items():
        (source / name).write_text(content)
    code, out, err = ad2kit_score(
        source, tmp_path / "out", "--runs-dir", copied_run.path.parent, *options
    )
    assert (code, out) == (2, "")
    assert expected in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_the_run_says_which_columns_to_read_and_a_prefix_makes_room(
    copied_run: RunDir, tmp_path: Path, ad2kit_score: Any
) -> None:
    source, output = tmp_path / "in.csv", tmp_path / "out"
    source.write_text('text,label\n"never, dull",0\n')
    runs = ("--runs-dir", copied_run.path.parent)
    code, out, _ = ad2kit_score(source, output, *runs, "--prefix", "student_")
    assert code == 0
    assert "1 rows in 1 parts" in out
    header, row, _ = (output / "part-00000000.csv").read_text().split("\n")
    assert header == "text,label,student_label,student_score,student_truncated"
    assert row.startswith('"never, dull",0,')
    code, _, err = ad2kit_score(source, output, *runs, "--prefix", "other_")
    assert code == 2
    assert "holds the results of another job:\n  prefix: student_ there, other_ now" in err
    code, _, err = ad2kit_score(tmp_path, output, *runs)
    assert (code, "lie in one another" in err) == (2, True)
    job = json.loads((output / "_job.json").read_text())
    del job["form"]  # as of a version that wrote cells anew
    (output / "_job.json").write_text(json.dumps(job))
    code, _, err = ad2kit_score(source, output, *runs, "--prefix", "student_")
    assert (code, "form: 1 there, 2 now" in err) == (2, True)
    assert "name another OUTPUT, or delete this one" in err
    alone = tmp_path / "alone"
    shutil.copytree(copied_run.onnx("fp32"), alone)
    code, _, err = ad2kit_score(source, tmp_path / "b", "--run", alone, "--prefix", "a")
    assert (code, "name them with --text-columns" in err) == (2, True)


def test_a_place_that_cannot_be_written_is_named(
    model: Path, tmp_path: Path, ad2kit_score: Any
) -> None:
    source = tmp_path / "in.csv"
    source.write_text("text\nfine\n")
    arguments = ("--run", model, "--text-columns", "text")
    code, _, err = ad2kit_score(source, source / "out", *arguments)
    assert code == 2
    assert f"cannot write to {source}/out: " in err


def test_ctrl_c_ends_with_130_and_leaves_whole_parts(
    straight: Path, table: Path, model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = command(table, output, model, "--workers", "2")
    process = subprocess.Popen(
        arguments,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that runs the tests in the background would have it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    while process.poll() is None and len(list(output.glob("part-*"))) < 5:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the same command goes on where this one stopped" in err
    assert "Traceback" not in err
    found, expected = contents(output), contents(straight)
    assert 5 <= len(found) < len(expected)
    assert found.items() <= expected.items()


def test_ctrl_c_never_comes_to_a_worker_that_is_still_starting() -> None:
    code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set()))"
    started = [sys.executable, "-c", code]
    with interrupts_blocked():
        assert subprocess.check_output(started, text=True) == "True\n"
    assert subprocess.check_output(started, text=True) == "False\n"
    # A shell that runs the tests in the background would have it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), interrupts_blocked():  # it comes here, afterwards
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_full_disk_ends_with_2_and_no_half_written_part(
    table: Path, model: Path, tmp_path: Path
) -> None:
    """A limit on the size of a file stands for the full disk: a write fails in a worker."""
    output = tmp_path / "out"

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))

    arguments = command(table, output, model, "--workers", "2")
    full = subprocess.run(
        arguments, capture_output=True, text=True, preexec_fn=small_files, check=False
    )
    assert full.returncode == 2, full.stderr
    assert "the disk is full, or a file is larger than allowed" in full.stderr
    assert "Traceback" not in full.stderr
    assert set(contents(output)) <= {"_job.json"} | {
        name for name in contents(output) if name.startswith(".tmp-")
    }


@pytest.mark.parametrize("module", ["fsspec", "pyarrow", "ray"])
def test_a_missing_extra_ends_with_3_and_names_it(
    table: Path, model: Path, tmp_path: Path, module: str
) -> None:
    arguments = command(table, tmp_path / "out", model, "--engine", "ray")
    arguments = arguments[arguments.index("score") :]
    script = (
        f"import sys; sys.modules[{module!r}] = None\n"
        f"sys.argv = ['ad2kit', *{arguments!r}]\n"
        "from ad2kit.__main__ import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 3, result.stderr
    assert f"needs the Python module '{module}'" in result.stderr
    assert "pip install 'ad2kit[scale]'" in result.stderr


def test_another_batch_size_makes_other_bytes(straight: Path, table: Path, model: Path) -> None:
    """The control of the tests above: they would see batches of other rows."""
    other = straight.parent / "other"
    score_it(model, table, other, batch_size=1)
    ours, theirs = contents(straight), contents(other)
    assert ours.keys() == theirs.keys()
    assert ours["part-00000000.parquet"] != theirs["part-00000000.parquet"]


def test_a_model_that_cannot_be_loaded_is_named_by_several_workers_too(
    copied_run: RunDir, table: Path, tmp_path: Path
) -> None:
    folder = copied_run.onnx("int8")
    (folder / "model.onnx").write_bytes(b"no graph")
    artifact = OnnxArtifact.read(folder / OnnxArtifact.file_name)
    files = artifact.files | {"model.onnx": sha256_of(folder / "model.onnx")}
    write_record(folder / OnnxArtifact.file_name, artifact.model_copy(update={"files": files}))
    for workers in (1, 2):
        with pytest.raises(ModelError, match="onnxruntime cannot load"):
            score_it(folder, table, tmp_path / "out", workers=workers)


def test_parts_of_an_output_below_a_glob_are_not_read_as_input(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "in.csv").write_text("text\nfine\n")
    score_it(model, tmp_path / "*" / "*.csv", tmp_path / "out")
    with pytest.raises(DataError, match="lie in one another"):
        score_it(model, tmp_path / "*" / "*.csv", tmp_path / "out")


def test_tsv_that_cannot_hold_the_answers_is_refused_before_anything_is_scored(
    model: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in.tsv"
    source.write_text("text\nfine\n")
    with pytest.raises(DataError, match="TSV has no quoting, and cannot hold") as caught:
        score_it(model, source, tmp_path / "out", prefix="a\tb_")
    assert "convert INPUT to CSV" in caught.value.hint
    assert not (tmp_path / "out").exists()
    source = tmp_path / "in.csv"
    source.write_text("text\nfine\n")
    score_it(model, source, tmp_path / "out", prefix="a\tb_")


def test_folders_of_a_partitioned_table_are_refused_and_scored_one_by_one(
    model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in" / "dt=2026-01-01"
    folder.mkdir(parents=True)
    (folder / "part.csv").write_text("text\nfine\n")
    with pytest.raises(DataError, match="has no column 'dt'"):
        score_it(model, tmp_path / "in", tmp_path / "out")
    score_it(model, folder, tmp_path / "out" / "dt=2026-01-01")


def test_a_table_with_two_columns_of_one_name_is_refused(model: Path, tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array(["fine"]), pa.array(["dull"])], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "in.parquet")
    with pytest.raises(DataError, match="the column 'text' appears twice"):
        score_it(model, tmp_path / "in.parquet", tmp_path / "out")
