"""Many configurations of one recipe, on Ray Tune: a run folder each, one table at the end.

A trial is an ordinary run. So a later command uses the trained students again, and a trial whose
worker died goes on from its own checkpoint. Tune only decides where a trial runs and, with early
stopping, when it stops. Tune keeps no state that a restart would need: the run folders and
``trials.jsonl`` show what is left to do.

`select` decides which configuration wins; only the winner is judged on the validation set.
"""

from __future__ import annotations

import logging
import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from ad2kit.campaigns.sweep.report import (
    Ledger,
    SelectedStudent,
    Spread,
    SweepReport,
    Trial,
    by_configuration,
    markdown,
    plot,
    select,
)
from ad2kit.campaigns.sweep.storage import Mirror
from ad2kit.campaigns.sweep.trial import Job, make_teacher, run_trial
from ad2kit.campaigns.sweep.tune import RESTARTS, Tuning, trial_resources
from ad2kit.data import splits
from ad2kit.gate.summary import baseline_scores
from ad2kit.run.errors import UserError
from ad2kit.run.files import fingerprint, locked, write_record, write_text
from ad2kit.run.machine import processes
from ad2kit.run.ray_cluster import check_answer, ray_cluster
from ad2kit.statistics.logits import answers
from ad2kit.training import shared
from ad2kit.training.records import DistillReport
from ad2kit.training.shared import ValidationScores

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ad2kit.campaigns.sweep.report import Key
    from ad2kit.data.splits import Data
    from ad2kit.run.recipe import Recipe
    from ad2kit.run.sweep_section import Configuration

logger = logging.getLogger(__name__)


def sweep(
    recipe: Recipe,
    runs_dir: Path,
    *,
    address: str | None = None,
    storage: str | None = None,
    allow_inexact: bool = False,
) -> tuple[SweepReport, Path]:
    """Search the space of the recipe's sweep section, judge the best, write the report.

    Trials that have ended are not repeated; trials that have begun go on where they stopped.

    Args:
        recipe: the recipe of all trials, which differ in batch size, learning rate, radius, alpha
            and seed.
        runs_dir: the folder of the runs.
        address: HOST:PORT of a Ray cluster; this machine's cores and GPUs if None.
        storage: an fsspec address to which finished runs are copied, for workers that have another
            disk for ``runs_dir``.
        allow_inexact: see :func:`ad2kit.training.distill.distill`.

    Returns:
        The report, and its folder, which also holds a table and a plot.

    Raises:
        RecipeError: a configuration is not a valid recipe.
        RunError: another process works on this sweep.
        UserError: no cluster at the address, no such storage, or no trial finished.
        GateFailed: the teacher is not worth imitating; see :func:`ad2kit.training.distill.distill`.
    """
    if processes() > 1:
        raise UserError(
            "`ad2kit sweep` takes one process: Ray starts its own",
            hint="leave `accelerate launch` out",
        )
    if address:
        check_answer(address)
    mirror = Mirror(storage) if storage else None
    job = Job(recipe, runs_dir.resolve(), Path.cwd(), mirror, allow_inexact)
    inputs = fingerprint(recipe.model_dump(mode="json"))
    folder = runs_dir / f"sweep-{recipe.name}-{inputs[:8]}"
    for configuration in recipe.sweep.grid(recipe.distill):
        job.recipe_of(configuration, recipe.seed)  # checks all before the first is trained
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder), ExitStack() as stack:
        search = _Sweep(job, Ledger(folder / "trials.jsonl"), address, stack)
        data = splits.load_data(recipe.data, recipe.seed, runs_dir / ".shared")
        splits.check_labelled(data, "sweep")
        best = _best(job, data, search.explore())
        search.train((best, seed) for seed in job.seeds())
        report = _report(job, data, inputs, search.trials(), best)
        write_record(folder / "sweep.json", report)
        write_text(folder / "sweep.md", markdown(report))
        plot(report, folder / "sweep.svg")
    return report, folder


class _Sweep:
    """The trials of a sweep; Ray is started when the first trial has to run."""

    def __init__(self, job: Job, ledger: Ledger, address: str | None, stack: ExitStack) -> None:
        self.job = job
        self.ledger = ledger
        self.address = address
        self.stack = stack
        self.started: Tuning | None = None

    def trials(self) -> list[Trial]:
        return list(self.ledger.trials.values())

    def explore(self) -> list[Trial]:
        """Train the recipe's configurations; return the trials that decide between them."""
        distill = self.job.recipe.distill
        space = self.job.recipe.sweep
        seeds = self.job.seeds()
        early_stopping = space.early_stopping
        if space.search == "grid":
            points = space.grid(distill)
            keys = ((point, seed) for seed in seeds for point in points)
            self.train(keys, early_stopping=early_stopping)
            return self.trials()

        def drawn() -> list[Trial]:
            return [trial for trial in self.trials() if trial.seed == seeds[0]]

        # The trials that an earlier search has drawn come first.
        self.train([trial.key for trial in drawn()], early_stopping=early_stopping)
        missing = space.trials - len(drawn())
        if missing > 0:
            values = space.values(distill)
            self._tuning().search(values, drawn(), missing, seeds[0], early_stopping=early_stopping)
        return drawn()

    def train(self, keys: Iterable[Key], *, early_stopping: bool = False) -> None:
        """Train the students of some configurations and seeds, without those that have ended.

        A trial that was stopped early goes on if ``early_stopping`` is off.
        """
        pending = [key for key in keys if not self._has_ended(key, early_stopping)]
        if pending:
            self._tuning().train(pending, early_stopping=early_stopping)

    def _has_ended(self, key: Key, early_stopping: bool) -> bool:
        """Tell whether a trial need not run again; a finished one must still have its files."""
        trial = self.ledger.trials.get(key)
        if trial is None or trial.state in ("begun", "failed"):
            return False
        if trial.state == "finished":
            run = self.job.run(*key)
            return run.distill_report.is_file() and run.select_logits.is_file()
        return trial.state == "diverged" or early_stopping

    def _tuning(self) -> Tuning:
        """Return the connection to Ray; the first call connects and makes the teacher."""
        if self.started is None:
            job = self.job
            self.stack.enter_context(ray_cluster(self.address))
            resources = trial_resources(job.recipe.compute)
            # If there are trials, the teacher was made before the first of them began.
            if not (self.ledger.trials and job.has_teacher()):
                _teach(job, resources)
            self.started = Tuning(
                trainable=lambda point: run_trial(job, point),
                ledger=self.ledger,
                run_name=job.run_name,
                resources=resources,
                parts=job.recipe.distill.parts,
            )
        return self.started


def _teach(job: Job, resources: dict[str, float]) -> None:
    """Make the teacher of all students in one worker, before the trials start.

    Raises:
        UserError, GateFailed: the worker's error, or the worker died too often.
    """
    task = ray.remote(make_teacher).options(
        num_cpus=resources["cpu"], num_gpus=resources["gpu"], max_retries=RESTARTS
    )
    logger.info("teacher: made, or found, before the trials start")
    try:
        problem = ray.get(task.remote(job))
    except ray.exceptions.WorkerCrashedError as error:
        raise UserError(
            f"the worker that makes the teacher died {RESTARTS + 1} times",
            hint="look for what killed it (memory?); the same command goes on from its checkpoint",
        ) from error
    if problem:
        kind, message, hint = problem
        raise kind(message, hint=hint)


def _best(job: Job, data: Data, trials: list[Trial]) -> Configuration:
    """Return the best configuration; see :func:`ad2kit.campaigns.sweep.report.select`.

    Raises:
        UserError: no configuration has students for most of its seeds.
    """
    results = [result for result in by_configuration(trials) if result.criterion > -math.inf]
    if not results:
        raise _all_lost("no configuration has students for most of its seeds", trials)
    select_answers = {
        result.configuration: [
            answers(data.task, shared.read_logits(job.run(*trial.key).select_logits).numpy())
            for trial in trials
            if trial.configuration == result.configuration and trial.state == "finished"
        ]
        for result in results
    }
    best = select(results, select_answers, data.select.labels, job.recipe.data.judged_by)
    return best.configuration


def _all_lost(fault: str, trials: list[Trial]) -> UserError:
    """Return an error that names a fault of the sweep and the first lost trial."""
    lost = next(trial for trial in trials if trial.state in ("diverged", "failed"))
    return UserError(
        f"{fault}; the first that was lost, {lost.run} ({lost.configuration}), {lost.state}: "
        f"{lost.message}",
        hint="mend that, or search elsewhere, for example with sweep.lrs=[1e-5,5e-5]",
    )


def _report(
    job: Job, data: Data, inputs: str, trials: list[Trial], best: Configuration
) -> SweepReport:
    """Judge the finished students of the best configuration on the validation set.

    Raises:
        UserError: none has finished.
    """
    recipe = job.recipe
    validation = ValidationScores(recipe, data, job.runs_dir)
    students = list[SelectedStudent]()
    distilled = list[DistillReport]()
    teacher_score = 0.0
    baselines = dict[str, float]()
    for trial in trials:
        if trial.configuration == best and trial.state == "finished":
            run = job.run(*trial.key)
            distilled.append(DistillReport.read(run.distill_report))
            teacher_score = validation.score(validation.answers(run.teacher))
            baselines = baseline_scores(run)
            students.append(
                SelectedStudent(
                    seed=trial.seed,
                    run=trial.run,
                    student_sha256=distilled[-1].student_sha256,
                    score=validation.score(validation.answers(run.student)),
                )
            )
    if not students:
        raise _all_lost(f"no student of the best configuration ({best}) has finished", trials)
    score = Spread.of([student.score for student in students])
    return SweepReport(
        recipe=recipe.name,
        inputs=inputs,
        search=recipe.sweep.search,
        metrics=recipe.data.judged_by,
        select_from=recipe.data.select_from,
        select_rows=len(data.select),
        rows=len(data.validation),
        teacher_sha256=distilled[0].teacher_sha256,
        teacher_select_score=distilled[0].teacher_select_score,
        teacher_score=teacher_score,
        baselines=baselines,
        trials=tuple(trials),
        configurations=tuple(by_configuration(trials)),
        selected=best,
        students=tuple(students),
        score=score,
        retained=score.median / teacher_score if teacher_score > 0 else 0.0,
        environment=distilled[0].environment,
    )
