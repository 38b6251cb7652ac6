"""The folder of a job: parts whole or absent, one job in each, one process at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import fsspec
import pytest
from filelock import FileLock

from ad2kit.run.errors import RunError
from ad2kit.scoring.output import OutputFolder, part_name
from ad2kit.scoring.records import InputFile, ScoreJob
from ad2kit.tables.rows import BadRow

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

JOB = ScoreJob(
    artifact_sha256="a" * 64,
    text_columns=("text",),
    prefix="",
    block_rows=10,
    batch_size=4,
    versions={"onnxruntime": "1.31"},
    inputs=(InputFile(url="in.csv", size_bytes=3, version="1"),),
)
BAD = BadRow(file="in.csv", row=2, line=3, reason="caf\u00e9")


@pytest.fixture(params=["a folder", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OutputFolder]:
    if request.param == "a folder":
        yield OutputFolder(f"file://{tmp_path}/deep/out/")
        return
    yield OutputFolder("memory://deep/out")
    fsspec.filesystem("memory").rm("/deep", recursive=True)


def contents(output: OutputFolder) -> dict[str, bytes]:
    found = {path: output.store.cat_file(path) for path in output.store.find(output.path)}
    files = {path.removeprefix(f"{output.path}/"): content for path, content in found.items()}
    return {name: content for name, content in files.items() if name != ".lock"}


def names(output: OutputFolder) -> set[str]:
    return set(contents(output))


def test_parts_and_errors_of_a_job(output: OutputFolder) -> None:
    first, second = part_name(0, "csv"), part_name(1, "csv")
    with output.claimed(JOB):
        output.write_part(first, b"text\n", [BAD])
        output.write_part(second, b"text\n", [])
    assert names(output) == {
        "_job.json",
        "part-00000000.csv",
        "part-00000001.csv",
        "_errors/part-00000000.jsonl",
    }
    with output.claimed(JOB):
        assert output.names() >= {first, second}
        assert output.count_bad({first, second}) == 1
        assert output.count_bad({second}) == 0
    errors = output.store.cat_file(f"{output.path}/_errors/part-00000000.jsonl")
    assert BadRow.parse(errors, "") == BAD


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"artifact_sha256": "b" * 64}, f"artifact_sha256: {'b' * 64} there, {'a' * 64} now"),
        ({"batch_size": 8}, "batch_size: 8 there, 4 now"),
        ({"form": 2}, "form: 2 there, 1 now"),
        ({"text_columns": ("a", "b")}, "text_columns: a,b there, text now"),
        ({"versions": {"onnxruntime": "1.30"}}, "versions.onnxruntime: 1.30 there, 1.31 now"),
        (
            {"inputs": (InputFile(url="in.csv", size_bytes=4, version="1"),)},
            "in.csv has changed since",
        ),
        (
            {"inputs": (InputFile(url="b.csv", size_bytes=3, version="1"),)},
            "b.csv is an input only there\n  in.csv is an input only now",
        ),
    ],
)
def test_the_results_of_another_job_are_left_alone(
    output: OutputFolder, change: dict[str, Any], expected: str
) -> None:
    theirs = JOB.model_copy(update=change)
    with output.claimed(theirs):
        output.write_part(part_name(0, "csv"), b"text\n", [])
    before = contents(output)
    with pytest.raises(RunError, match="holds the results of another job") as caught:
        output.claimed(JOB).__enter__()
    assert expected in caught.value.message
    assert contents(output) == before


def test_a_folder_of_something_else_is_left_alone(output: OutputFolder) -> None:
    output.write("notes.txt", b"mine")
    with pytest.raises(RunError, match="is not empty, and no job"):
        output.claimed(JOB).__enter__()
    assert names(output) == {"notes.txt"}
    output.write("_job.json", b"{")
    with pytest.raises(RunError, match=r"_job\.json is not a ScoreJob"):
        output.claimed(JOB).__enter__()


def test_a_part_that_is_not_finished_has_not_its_name(
    output: OutputFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is killed where the temporary file would take its name."""

    class Killed(BaseException):
        """Stands for SIGKILL: nothing that should tidy up gets to run."""

    def killed(*_: object) -> None:
        raise Killed

    with output.claimed(JOB), monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", killed)
        patch.setattr(output.store, "mv", killed)
        with pytest.raises(Killed):
            output.write_part(part_name(0, "csv"), b"half", [])
    left_behind = names(output) - {"_job.json"}
    assert [name.startswith(".tmp-") for name in left_behind] == [True]
    assert output.names() == {"_job.json"}
    with output.claimed(JOB):
        output.write_part(part_name(0, "csv"), b"whole", [])
    assert output.store.cat_file(f"{output.path}/part-00000000.csv") == b"whole"
    assert names(output) == {"_job.json", "part-00000000.csv"}


def test_one_process_at_a_time(tmp_path: Path) -> None:
    output = OutputFolder(str(tmp_path))
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(RunError, match="is being written by another ad2kit process"),
    ):
        output.claimed(JOB).__enter__()
