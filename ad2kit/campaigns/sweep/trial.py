"""One student of a sweep, in a worker: an ordinary run that reports to Ray Tune as it trains."""

from __future__ import annotations

import math
import os
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray import tune

from ad2kit.models import text_model
from ad2kit.run.errors import DivergedError, GateFailed, UserError, no_room_left
from ad2kit.run.files import fingerprint
from ad2kit.run.folder import open_run, run_folder
from ad2kit.run.recipe import Recipe, from_data
from ad2kit.run.records import CampaignRecord
from ad2kit.run.sweep_section import Configuration
from ad2kit.training.distill import distill, teach
from ad2kit.training.records import read_curve

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.campaigns.sweep.report import Key
    from ad2kit.campaigns.sweep.storage import Mirror
    from ad2kit.run.folder import RunDir
    from ad2kit.training.records import StepRecord

_CAMPAIGN = CampaignRecord(command="ad2kit sweep")
# How long a worker may live on after its driver was killed.
_SECONDS_TO_DIE = 60.0


@dataclass(frozen=True)
class Job:
    """The inputs of a worker that all trials of a sweep share."""

    recipe: Recipe
    runs_dir: Path
    working_dir: Path
    mirror: Mirror | None
    allow_inexact: bool

    def seeds(self) -> range:
        """Return the seeds of each configuration; the first is the recipe's."""
        return range(self.recipe.seed, self.recipe.seed + self.recipe.sweep.seeds)

    def recipe_of(self, configuration: Configuration, seed: int) -> Recipe:
        """Return the recipe of one trial."""
        plain = self.recipe.model_dump(mode="json")
        distill = plain["distill"]
        distill |= {"lr": configuration.lr, "batch_size": configuration.batch_size}
        distill |= {"alpha": configuration.alpha, "seed": seed}
        distill["adversary"]["radius"] = configuration.radius
        return from_data(plain, where=f"the recipe for {configuration}")

    def run_name(self, key: Key) -> str:
        """Return the name of the run folder of one trial."""
        return run_folder(self.recipe_of(*key), self.runs_dir).name

    def run(self, configuration: Configuration, seed: int) -> RunDir:
        """Return the run of one trial; it is copied from the storage if it is finished there."""
        recipe = self.recipe_of(configuration, seed)
        run = open_run(recipe, self.runs_dir, campaign=_CAMPAIGN)
        if self.mirror and not run.distill_report.is_file():
            run.wait_until_free(_SECONDS_TO_DIE)
            with run.locked():
                self.mirror.take(run.path, run.path.name, last=run.distill_report.name)
        return run

    def enter(self, configuration: Configuration, seed: int) -> RunDir:
        """Return the run of one trial in a worker.

        The worker takes the driver's working directory, and the run the teacher of the storage.
        """
        if self.working_dir.is_dir():
            os.chdir(self.working_dir)  # relative paths of the recipe start there
        run = self.run(configuration, seed)
        run.wait_until_free(_SECONDS_TO_DIE)
        if self.mirror and not (run.teacher / text_model.MANIFEST).is_file():
            with run.locked():
                self.mirror.take(run.teacher, self.teacher_name(), last=text_model.MANIFEST)
        return run

    def first(self) -> Key:
        """Return the key of the trial in whose run the teacher is made."""
        return self.recipe.sweep.grid(self.recipe.distill)[0], self.recipe.seed

    def has_teacher(self) -> bool:
        """Tell whether the teacher is in that run, on this machine."""
        return (self.run(*self.first()).teacher / text_model.MANIFEST).is_file()

    def teacher_name(self) -> str:
        """Return the name of the teacher in the storage, from all that determines its weights."""
        sections = {"seed", "data", "teacher"}
        not_weights = {"teacher": {"accept"}}
        inputs = self.recipe.model_dump(mode="json", include=sections, exclude=not_weights)
        return f"teacher-{fingerprint(inputs, self.recipe.compute.precision)[:16]}"


def make_teacher(job: Job) -> tuple[type[UserError | GateFailed], str, str] | None:
    """Make the teacher in the run of the first trial, and send it to the storage.

    Returns:
        Type, message and hint of an error that the user has to handle, else None. The exception
        itself would lose its fields on the way to the other process.
    """
    try:
        run = job.enter(*job.first())
        teach(run, allow_inexact=job.allow_inexact)
        if job.mirror:
            job.mirror.send(run.teacher, job.teacher_name(), last=text_model.MANIFEST)
    except GateFailed as error:
        return GateFailed, error.message, error.hint
    except UserError as error:
        return UserError, error.message, error.hint
    except Exception as error:
        if not no_room_left(error):
            raise
        return UserError, _explain(error), "make room, then run the same command again"
    return None


def run_trial(job: Job, point: dict[str, Any]) -> dict[str, Any]:
    """Train one student in a worker, from the state of its run folder.

    The recorded evaluations of the folder are reported first, so that the scheduler can compare
    them after a restart. The last evaluation is not reported but returned: the scheduler must not
    stop a student that is trained but not saved yet.

    Returns:
        The fields of its :class:`~ad2kit.campaigns.sweep.report.Trial`, and its ``progress``.
    """
    point = dict(point)
    seed = point.pop("seed")
    facts: dict[str, Any] = {"progress": 0, "evaluations": 0, "criterion": -math.inf}

    def report_evaluation(record: StepRecord) -> None:
        if record.phase != "student" or record.select_score is None:
            return
        progress = -(-record.step * job.recipe.distill.parts // record.total_steps)
        if progress <= facts["progress"]:
            return
        facts.update(progress=progress, evaluations=facts["evaluations"] + 1)
        if record.select_score >= facts["criterion"]:
            facts.update(
                criterion=record.select_score,
                select_score=record.select_score,
                select_distance=record.select_distance,
            )
        if record.step < record.total_steps:
            tune.report(dict(facts))

    try:
        run = job.enter(Configuration.model_validate(point), seed)
        for record in read_curve(run.curve("student")):
            report_evaluation(record)
        report = distill(run, on_step=report_evaluation, allow_inexact=job.allow_inexact)
        if job.mirror:
            job.mirror.send(run.path, run.path.name, last=run.distill_report.name)
    except DivergedError as error:
        return facts | {"state": "diverged", "message": error.message, "criterion": -math.inf}
    except Exception as error:  # it goes into the report, and ends only this trial
        return facts | {"state": "failed", "message": _explain(error), "criterion": -math.inf}
    score = report.student_select_score
    selection = report.selection
    facts |= {"criterion": score, "select_score": score}
    return facts | {
        "state": "finished",
        "select_distance": selection.kept.distance if selection else None,
    }


def _explain(error: Exception) -> str:
    """Return the message of an error; of an unexpected one also its type and place."""
    if isinstance(error, UserError):
        return error.message
    if no_room_left(error):
        return f"the disk is full, or a file is larger than allowed: {error}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
