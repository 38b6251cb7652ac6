"""Sweeps on a real local Ray: nothing twice, nothing lost to a kill, and the loss named."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import ray
from filelock import FileLock

from ad2kit.__main__ import main
from ad2kit.campaigns.sweep import tune
from ad2kit.campaigns.sweep.report import Ledger, SweepReport, Trial
from ad2kit.campaigns.sweep.sweep import sweep
from ad2kit.campaigns.sweep.trial import Job, make_teacher, run_trial
from ad2kit.campaigns.sweep.tune import Tuning, trial_resources
from ad2kit.run.errors import RunError, UserError
from ad2kit.run.files import sha256_of
from ad2kit.run.folder import RunDir, open_run
from ad2kit.run.recipe import load_recipe
from ad2kit.run.records import CampaignRecord
from ad2kit.run.sweep_section import Configuration
from ad2kit.training.distill import distill
from tests.conftest import QUICK

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.run.sections import ComputeRecipe

pytestmark = pytest.mark.slow

# Two learning rates, of which one diverges at its second update, with two seeds each.
SPACE = (
    *QUICK,
    "data.max_train_rows=300",
    "distill.epochs=3",
    "distill.checkpoint_every_steps=3",
    "sweep.batch_sizes=[32]",
    "sweep.lrs=[1e-3,1e30]",
    "sweep.seeds=2",
)


@dataclass
class Swept:
    """A sweep whose driver was killed once, and a worker once."""

    runs_dir: Path
    storage: str
    report: SweepReport
    folder: Path
    before: dict[str, int]  # when what had ended before the kill was last written to
    killed_workers: list[int]

    def sweep(self, **changes: Any) -> tuple[SweepReport, Path]:
        return sweep(load_recipe("smoke", SPACE), self.runs_dir, storage=self.storage, **changes)


def curve_times(runs_dir: Path, runs: list[str]) -> dict[str, int]:
    return {run: RunDir(runs_dir / run).curve("student").stat().st_mtime_ns for run in runs}


def kill_driver_after_its_first_student(runs_dir: Path, storage: str) -> list[str]:
    """Start a sweep as another process on the same Ray, kill it; return the finished runs."""
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "ad2kit", "sweep", "smoke", *SPACE, "--address", address]
    driver = subprocess.Popen(
        [*command, "--storage", storage, "--runs-dir", str(runs_dir)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    finished: list[str] = []
    while not finished:
        assert driver.poll() is None, driver.stderr.read() if driver.stderr else ""
        time.sleep(0.05)
        for ledger in runs_dir.glob("sweep-*/trials.jsonl"):
            whole = [line for line in ledger.read_text().splitlines(True) if line.endswith("\n")]
            trials = [Trial.model_validate_json(line) for line in whole]
            finished = [trial.run for trial in trials if trial.state == "finished"]
    driver.kill()
    driver.communicate()
    return finished


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Swept:
    request.getfixturevalue("ray_here")
    runs_dir = tmp_path_factory.mktemp("runs")
    storage = f"file://{tmp_path_factory.mktemp('storage')}"
    finished = kill_driver_after_its_first_student(runs_dir, storage)
    before = curve_times(runs_dir, finished)
    killed: list[int] = []
    shown = tune._Watch.on_trial_result

    def kill_the_first(self: Any, *, trial: Any, result: dict[str, Any], **rest: Any) -> None:
        shown(self, trial=trial, result=result, **rest)
        if not killed and result.get("evaluations"):
            killed.append(result["pid"])
            os.kill(result["pid"], signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune._Watch, "on_trial_result", kill_the_first)
        report, folder = sweep(load_recipe("smoke", SPACE), runs_dir, storage=storage)
    return Swept(runs_dir, storage, report, folder, before, killed)


def test_a_sweep_ends_complete_whoever_was_killed(swept: Swept) -> None:
    report = swept.report
    assert len(swept.before) >= 1
    assert len(swept.killed_workers) == 1
    assert curve_times(swept.runs_dir, list(swept.before)) == swept.before
    states = {(trial.configuration.lr, trial.seed): trial.state for trial in report.trials}
    assert states == {
        (1e-3, 17): "finished",
        (1e-3, 18): "finished",
        (1e30, 17): "diverged",
        (1e30, 18): "diverged",
    }
    assert report.selected.lr == 1e-3
    assert sorted(student.seed for student in report.students) == [17, 18]
    page = (swept.folder / "sweep.md").read_text()
    assert "Trials: 2 finished, 2 diverged." in page
    assert "lr 1e+30" in page
    assert "diverged: student: the loss is nan at update 2" in page
    assert SweepReport.read(swept.folder / "sweep.json") == report
    assert (swept.folder / "sweep.svg").read_text().startswith("<?xml")
    assert list(swept.runs_dir.rglob(".tmp-*")) == []


def test_a_trial_is_an_ordinary_run_with_the_bits_of_one(swept: Swept, tmp_path: Path) -> None:
    """Also the one whose worker was killed half-way; and the teacher was made once."""
    job = Job(load_recipe("smoke", SPACE), swept.runs_dir, tmp_path, None, allow_inexact=False)
    assert len(list((swept.runs_dir / ".shared" / "teachers").iterdir())) == 1
    made = [path.parent for path in swept.runs_dir.glob("*/teacher-training.jsonl")]
    assert len(made) == 1
    for student in swept.report.students:
        record = CampaignRecord.read(RunDir(swept.runs_dir / student.run).campaign_record)
        assert (record.command, record.rule) == ("ad2kit sweep", None)
        recipe = job.recipe_of(swept.report.selected, student.seed)
        assert open_run(recipe, swept.runs_dir).path.name == student.run
        alone = distill(open_run(recipe, tmp_path))
        assert alone.student_sha256 == student.student_sha256
        assert alone.teacher_sha256 == swept.report.teacher_sha256


def test_the_same_command_again_trains_nothing(swept: Swept, caplog: Any) -> None:
    runs = [trial.run for trial in swept.report.trials]
    before = curve_times(swept.runs_dir, runs)
    # A line that a kill has cut short is no line.
    with (swept.folder / "trials.jsonl").open("a") as ledger:
        ledger.write('{"configuration":{"batch')
    # What is gone here comes back from the storage.
    lost = RunDir(swept.runs_dir / swept.report.students[0].run)
    weights = sha256_of(lost.student / "model.safetensors")
    for file in sorted(lost.path.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    del before[lost.path.name]
    with caplog.at_level("INFO", "ad2kit"):
        assert swept.sweep()[0] == swept.report
    assert curve_times(swept.runs_dir, list(before)) == before
    assert sha256_of(lost.student / "model.safetensors") == weights
    assert "before the trials start" not in caplog.text


def test_the_command_prints_the_table_or_json_alone(
    swept: Swept, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["ad2kit", "sweep", "smoke", *SPACE, "--runs-dir", str(swept.runs_dir)]
    printed = []
    for options in ([], ["--json"]):
        arguments = [*command, "--storage", swept.storage, *options]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0
        printed.append(capsys.readouterr().out)
    assert "Trials: 2 finished, 2 diverged." in printed[0]
    assert f"report: {swept.folder / 'sweep.md'}" in printed[0].replace("\n", "")
    assert SweepReport.model_validate_json(printed[1]) == swept.report


def test_a_search_trains_the_best_of_its_draws_with_the_other_seeds(swept: Swept) -> None:
    changes = ["distill.epochs=1", "sweep.search=optuna", "sweep.trials=2", "sweep.lrs=[1e-4,5e-3]"]
    recipe = load_recipe("smoke", [*SPACE, *changes])
    report, folder = sweep(recipe, swept.runs_dir)
    seeds = {each.configuration: each.trials for each in report.configurations}
    assert len(seeds) == 2
    assert seeds.pop(report.selected) == 2
    assert list(seeds.values()) == [1]
    first = [trial for trial in report.trials if trial.seed == recipe.seed]
    best = max(first, key=lambda trial: trial.criterion)
    (taken,) = (trial for trial in first if trial.configuration == report.selected)
    # As good as the best, if it is not the best, and nearer to the teacher.
    assert taken == best or (taken.select_distance or 0) < (best.select_distance or 0)
    assert "2 student(s)" in (folder / "sweep.md").read_text()
    assert sweep(recipe, swept.runs_dir)[0] == report


def test_two_commands_do_not_work_on_one_sweep(swept: Swept) -> None:
    with (
        FileLock(swept.folder / ".lock"),
        pytest.raises(RunError, match="is being written by another ad2kit process"),
    ):
        swept.sweep()


def test_a_full_disk_ends_its_trial_alone_and_the_trial_goes_on(
    swept: Swept, tmp_path: Path
) -> None:
    """A limit on the size of a file stands for the full disk: the write fails half-way."""
    job = Job(
        load_recipe("smoke", [*SPACE, "distill.epochs=1"]),
        swept.runs_dir,
        tmp_path,
        None,
        allow_inexact=False,
    )
    point = {**swept.report.selected.model_dump(), "seed": 40}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    try:
        full = run_trial(job, point)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert full["state"] == "failed"
    assert full["message"].startswith("the disk is full, or a file is larger than allowed")
    run = job.run(Configuration.model_validate(swept.report.selected.model_dump()), 40)
    assert not run.student.exists()
    assert not run.distill_report.exists()
    assert run_trial(job, point)["state"] == "finished"


@pytest.mark.usefixtures("ray_here")
def test_a_teacher_that_cannot_be_made_is_the_users_to_mend(tmp_path: Path) -> None:
    recipe = load_recipe("smoke", [*SPACE, "student.layers=[7]"])
    job = Job(recipe, tmp_path, tmp_path, None, allow_inexact=False)
    kind, message, hint = make_teacher(job) or (None, "", "")
    assert kind is UserError
    assert "student.layers names layer 7, but" in message
    assert hint == "choose from 0 to 3"
    with pytest.raises(UserError, match="are 0 to 3") as caught:
        sweep(recipe, tmp_path)
    assert (caught.value.message, caught.value.hint) == (message, hint)


@dataclass(frozen=True)
class Tried:
    """What a trainable with known results came to."""

    states: dict[float, str]
    messages: list[str]
    drawn: list[Configuration]


@pytest.fixture
def tuned(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """Run Tune with a trainable of four epochs whose criterion is its learning rate."""
    request.getfixturevalue("ray_here")

    def call(method: str, *args: Any, early_stopping: bool) -> Tried:
        def trainable(point: dict[str, Any]) -> dict[str, Any]:
            if point["lr"] == 13:
                os.kill(os.getpid(), signal.SIGKILL)
            told = {"evaluations": 1, "criterion": point["lr"], "select_score": 0.5}
            ray.tune.report({"progress": 1, **told})
            return {**told, "progress": 4, "evaluations": 4, "state": "finished"}

        ledger = Ledger(tmp_path / "trials.jsonl")
        resources = {"cpu": 1.0, "gpu": 0.0}
        tuning = Tuning(trainable, ledger, lambda key: f"run-{key[0].lr}", resources, parts=4)
        getattr(tuning, method)(*args, early_stopping=early_stopping)
        trials = list(Ledger(tmp_path / "trials.jsonl").trials.values())
        return Tried(
            {trial.configuration.lr: trial.state for trial in trials},
            [trial.message for trial in trials if trial.message],
            [trial.configuration for trial in trials],
        )

    return call


def keys(*lrs: float) -> list[tuple[Configuration, int]]:
    return [(Configuration(batch_size=1, lr=lr, radius=0.0, alpha=0.0), 1) for lr in lrs]


def test_early_stopping_stops_what_is_hopeless_and_nothing_is_stopped_without(tuned: Any) -> None:
    # Whichever of the first two reports first, the last is below the best third.
    found = tuned("train", keys(9, 5, 1), early_stopping=True)
    assert found.states[9] == "finished"
    assert found.states[1] == "stopped"
    found = tuned("train", keys(9, 5, 1), early_stopping=False)
    assert set(found.states.values()) == {"finished"}


def test_a_worker_that_dies_again_and_again_is_a_failed_trial(
    tuned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "RESTARTS", 1)
    found = tuned("train", keys(13, 2), early_stopping=False)
    assert found.states == {13: "failed", 2: "finished"}
    assert found.messages == ["its worker died 2 times"]


def test_optuna_draws_within_the_space_and_knows_what_was_tried(tuned: Any) -> None:
    values = {"batch_size": (16, 32), "lr": (1e-3, 1.0), "radius": (0.0,), "alpha": (0.0, 2.0)}
    drawn = tuned("search", values, [], 3, 1, early_stopping=False).drawn
    assert len(set(drawn)) == 3
    for each in drawn:
        assert each.batch_size in (16, 32)
        assert 1e-3 <= each.lr <= 1.0
        assert each.radius == 0.0
        assert 0.0 <= each.alpha <= 2.0


@pytest.mark.usefixtures("ray_here")
def test_a_trial_that_no_node_can_hold_is_refused() -> None:
    def compute(*overrides: str) -> ComputeRecipe:
        return load_recipe("smoke", overrides).compute

    assert trial_resources(compute()) == {"cpu": 1.0, "gpu": 0.0}
    assert trial_resources(compute("compute.threads=null")) == {"cpu": 2.0, "gpu": 0.0}
    with pytest.raises(UserError, match=r"takes 64 cores .* has 2") as caught:
        trial_resources(compute("compute.threads=64"))
    assert caught.value.hint == "set compute.threads=2"
    with pytest.raises(UserError, match="no node of the Ray cluster has a GPU"):
        trial_resources(compute("compute.device=cuda"))
