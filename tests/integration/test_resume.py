"""A run that was stopped at any point ends as if it had not been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from ad2kit.run import recipe as recipes
from ad2kit.run.errors import RunError
from ad2kit.run.files import sha256_of
from ad2kit.run.folder import RunDir, open_run
from ad2kit.run.machine import DECIDE_BITS
from ad2kit.training.distill import distill
from ad2kit.training.records import DistillReport, StepRecord
from tests.conftest import QUICK

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ad2kit.run.recipe import Recipe
    from tests.warm import Warm


class Stopped(Exception):
    """Stands for a kill between two updates: nothing is saved on the way out."""


def stop_at(phase: str, step: int) -> Callable[[StepRecord], None]:
    def on_step(record: StepRecord) -> None:
        if (record.phase, record.step) == (phase, step):
            raise Stopped

    return on_step


def weights(run: RunDir) -> dict[str, str]:
    return {
        name: sha256_of(run.path / name / "model.safetensors") for name in ("teacher", "student")
    }


def curve(run: RunDir, phase: str) -> list[dict[str, Any]]:
    """The records of a curve, without the time that each update took."""
    lines = [json.loads(line) for line in run.curve(phase).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize(
    "stops",
    [
        [("teacher", 3), ("student", 10)],
        [("teacher", 17), ("teacher", 124), ("student", 1), ("student", 15), ("student", 23)],
    ],
)
def test_a_resumed_run_is_bit_identical_to_a_straight_one(
    tmp_path: Path, quick_recipe: Recipe, finished_run: RunDir, stops: list[tuple[str, int]]
) -> None:
    run = open_run(quick_recipe, tmp_path)
    for phase, step in stops:
        with pytest.raises(Stopped):
            distill(run, on_step=stop_at(phase, step))
    distill(run)
    assert weights(run) == weights(finished_run)
    for phase in ("teacher", "student"):
        assert curve(run, phase) == curve(finished_run, phase)
    assert not run.checkpoint("teacher").exists()
    assert not run.checkpoint("student").exists()


# Heads that are started, a last part that patience begins early, and more evaluations than epochs.
WITH_PATIENCE = (
    *QUICK,
    "teacher.finetune.start_head=true",
    "teacher.finetune.decay_ratio=0.2",
    "teacher.finetune.evaluations=20",
    "teacher.finetune.patience=1",
    "teacher.finetune.min_updates=160",
    "distill.start_head=true",
    "distill.min_updates=90",
    "distill.evaluations=9",
    "distill.decay_ratio=0.3",
    "distill.patience=1",
    "distill.lr=null",
    "data.max_train_rows=900",
)


def test_patience_and_started_heads_end_with_the_same_bits_after_any_stop(tmp_path: Path) -> None:
    recipe = recipes.load_recipe("smoke", WITH_PATIENCE)
    straight = open_run(recipe, tmp_path / "straight")
    report = distill(straight)
    assert report.selection
    points = report.selection.points
    assert points[0].step == 0  # the started head is a candidate
    assert report.learning_rates == {"teacher": 1e-3, "student": 5e-4}
    lines = curve(straight, "teacher")
    ended = lines[-1]["step"]
    assert ended == lines[-1]["total_steps"] < lines[0]["total_steps"], "patience ended nothing"
    run = open_run(recipe, tmp_path / "stopped")
    last = points[-1].step
    # Before the first checkpoint, about the decision of patience, and in the last part.
    moments = [
        ("teacher", 2),
        *[("teacher", ended - back) for back in (40, 31, 1)],
        ("student", 4),
        ("student", last - 11),
        ("student", last - 1),
    ]
    for phase, step in moments:
        with pytest.raises(Stopped):
            distill(run, on_step=stop_at(phase, step))
    assert distill(run).selection == report.selection
    assert weights(run) == weights(straight)
    assert run.select_logits.read_bytes() == straight.select_logits.read_bytes()
    for phase in ("teacher", "student"):
        assert curve(run, phase) == curve(straight, phase)
        assert not run.snapshots(phase).exists()


def test_a_snapshot_that_was_deleted_is_missed(with_teacher: Path, quick_recipe: Recipe) -> None:
    recipe = quick_recipe.model_copy(
        update={
            "distill": quick_recipe.distill.model_copy(update={"evaluations": 12}),
        }
    )
    run = half_trained(with_teacher, recipe)
    snapshots = sorted(run.snapshots("student").iterdir())
    assert len(snapshots) > 1
    shutil.rmtree(snapshots[0])
    with pytest.raises(RunError, match="is damaged: it is missing") as caught:
        distill(run)
    assert str(run.checkpoint("student")) in caught.value.hint
    shutil.rmtree(run.checkpoint("student"))  # the hint
    assert distill(run).steps == 68


def test_a_finished_stage_is_not_done_again(finished_run: RunDir) -> None:
    def never(_record: StepRecord) -> None:
        raise AssertionError("an update was made")

    before = finished_run.distill_report.read_bytes()
    distill(finished_run, on_step=never)
    assert finished_run.distill_report.read_bytes() == before


@pytest.fixture
def with_teacher(tmp_path: Path, finished_run: RunDir) -> Path:
    """A folder for runs whose teacher is trained already."""
    shutil.copytree(finished_run.shared, tmp_path / "runs" / finished_run.shared.name)
    return tmp_path / "runs"


def half_trained(runs_dir: Path, recipe: Recipe) -> RunDir:
    run = open_run(recipe, runs_dir)
    with pytest.raises(Stopped):
        distill(run, on_step=stop_at("student", 15))
    return run


def test_a_damaged_checkpoint_is_refused(with_teacher: Path, quick_recipe: Recipe) -> None:
    run = half_trained(with_teacher, quick_recipe)
    path = run.checkpoint("student") / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match="is damaged: sha256 expected") as caught:
        distill(run)
    assert "delete" in caught.value.hint


def test_a_resume_under_other_threads_or_versions_is_refused_unless_allowed(
    with_teacher: Path, quick_recipe: Recipe
) -> None:
    run = half_trained(with_teacher, quick_recipe)
    path = run.checkpoint("student") / "checkpoint.json"
    facts = json.loads(path.read_text())
    facts["environment"] |= {"threads": "64", "torch": "1.0"}
    path.write_text(json.dumps(facts))
    with pytest.raises(RunError, match=r"threads: 64 then, 1 now; torch: 1\.0 then"):
        distill(run)
    distill(run, allow_inexact=True)
    assert run.distill_report.is_file()


def test_a_resume_under_another_kernel_or_quota_is_exact(
    with_teacher: Path, quick_recipe: Recipe, finished_run: RunDir
) -> None:
    run = half_trained(with_teacher, quick_recipe)
    path = run.checkpoint("student") / "checkpoint.json"
    facts = json.loads(path.read_text())
    assert set(facts["environment"]) > DECIDE_BITS  # no name of one that is never compared
    facts["environment"] |= {"platform": "Linux-9.9", "cores": "64", "bentoml": "1.0"}
    path.write_text(json.dumps(facts))
    distill(run)
    assert weights(run) == weights(finished_run)
    assert curve(run, "student") == curve(finished_run, "student")


def test_changed_data_under_the_same_run_is_refused(tmp_path: Path, quick_recipe: Recipe) -> None:
    rows = [f"a {'good' if i % 2 else 'bad'} film number {i}\t{i % 2}\n" for i in range(300)]
    source = tmp_path / "data"
    source.mkdir()
    for name in ("train", "validation"):
        own = "".join(rows).replace("film", name)
        (source / f"{name}.tsv").write_text(f"text\tlabel\n{own}")
    data = quick_recipe.data.model_copy(update={"source": str(source)})
    run = open_run(quick_recipe.model_copy(update={"data": data}), tmp_path / "runs")
    with pytest.raises(Stopped):
        distill(run, on_step=stop_at("student", 5))
    (source / "train.tsv").write_text("text\tlabel\n" + "".join(rows[:-1]))
    with pytest.raises(RunError, match="was made from other data"):
        distill(run)


def test_a_run_folder_of_another_recipe_is_refused(
    finished_run: RunDir, quick_recipe: Recipe
) -> None:
    other = quick_recipe.model_copy(update={"seed": 99})
    with pytest.raises(RunError, match="holds a run of recipe 'smoke' with other data"):
        open_run(other, finished_run.path.parent, finished_run.path)


def test_two_processes_cannot_write_one_run(finished_run: RunDir) -> None:
    with finished_run.locked(), pytest.raises(RunError, match="being written by another"):
        distill(finished_run)


def test_ctrl_c_saves_and_the_same_command_goes_on(
    with_teacher: Path, finished_run: RunDir, quick_recipe: Recipe
) -> None:
    run = open_run(quick_recipe, with_teacher)

    def press(record: StepRecord) -> None:
        if (record.phase, record.step) == ("student", 13):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        distill(run, on_step=press)
    assert json.loads((run.checkpoint("student") / "checkpoint.json").read_text())["step"] == 13
    distill(run)
    assert weights(run) == weights(finished_run)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [QUICK, WITH_PATIENCE], ids=["plain", "with patience"])
def test_kill_9_at_random_moments_changes_nothing(
    tmp_path: Path, settings: tuple[str, ...], finished_run: RunDir, warm: Warm
) -> None:
    """The short form of `make soak`, which kills the whole chain more often."""
    straight = finished_run
    if settings != QUICK:
        straight = open_run(recipes.load_recipe("smoke", settings), tmp_path / "straight")
        distill(straight)
    runs_dir = tmp_path / "killed"
    command = ("distill", "smoke", *settings, "--runs-dir", str(runs_dir))
    # The start-up takes a while: counted from the first line of the curve, kills hit the work.
    for marker, delay in (
        ("teacher-training.jsonl", 0.15),
        ("training.jsonl", 0.05),
        ("training.jsonl", 0.3),
    ):
        process = warm.start(*command)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            found = list(runs_dir.glob(f"*/{marker}"))
            if found and found[0].stat().st_size:
                time.sleep(delay)
                break
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    result = warm.run(*command)
    assert result.returncode == 0, result.stderr
    (folder,) = runs_dir.glob("smoke-*")
    run = RunDir(folder)
    assert weights(run) == weights(straight)
    ours, theirs = (DistillReport.read(each.distill_report) for each in (run, straight))
    assert ours.steps == theirs.steps
    assert not list(folder.rglob(".tmp-*"))


# Each kills the process itself, half-way through one kind of write.
INSIDE = {
    "a checkpoint": ("ad2kit.training.checkpoint", "save_file", 2),
    "a snapshot": ("ad2kit.training.checkpoint", "save_file", 1),
    "the teacher": ("ad2kit.models.text_model", "write_record", 0),
    "the logit cache": ("ad2kit.training.shared", "whole_file", 0),
    "the student": ("ad2kit.models.text_model", "write_record", 0),
    "the fp32 export": ("ad2kit.exporting.export", "main_export", 0),
    "the int8 export": ("ad2kit.exporting.int8", "quantize", 0),
    "the parity report": ("ad2kit.gate.parity", "write_record", 0),
    "the Bento": ("ad2kit.packaging.bento", "_build", 0),
    "the trial of the service": ("ad2kit.packaging.check", "ask", 3),
}
KILLER = """
import importlib, os, signal
from pathlib import Path
module, name, calls = {}
module = importlib.import_module(module)
original = getattr(module, name)
def killing(*args, **kwargs):
    global calls
    if calls == 0:
        for path in (a for a in args if isinstance(a, Path)):
            if ".tmp-" in str(path) and not path.exists():
                path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    calls -= 1
    return original(*args, **kwargs)
setattr(module, name, killing)
"""


@pytest.mark.slow
def test_a_kill_inside_each_kind_of_write_changes_nothing(
    tmp_path: Path, finished_run: RunDir, warm: Warm
) -> None:
    chain = ("run", "smoke", *QUICK, "--runs-dir", tmp_path)
    for what, place in INSIDE.items():
        killed = warm.run(*chain, before=KILLER.format(place))
        assert killed.returncode == -signal.SIGKILL, f"not inside {what}: {killed.stderr}"
    result = warm.run(*chain)
    assert result.returncode == 0, result.stderr
    (folder,) = tmp_path.glob("smoke-*")
    run = RunDir(folder)
    assert weights(run) == weights(finished_run)
    for variant in ("fp32", "fused", "steady", "int8"):
        ours, theirs = (r.onnx(variant) / "model.onnx" for r in (run, finished_run))
        assert ours.read_bytes() == theirs.read_bytes()
    assert not list(folder.rglob(".tmp-*"))
    # The killed trial took its server along.
    deadline = time.monotonic() + 20
    while (left := trial_servers()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


def trial_servers() -> list[str]:
    """The command lines of running processes that serve a Bento which is not published yet."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if "ad2kit-package-" in line:
            found.append(line)
    return found
