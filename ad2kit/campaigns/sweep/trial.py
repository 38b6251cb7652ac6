"""One student of a sweep, in a worker: an ordinary run, that reports to Ray Tune as it goes."""

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
from ad2kit.run.sections import Configuration
from ad2kit.training.distill import distill, teach
from ad2kit.training.records import read_curve

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.campaigns.sweep.report import Key
    from ad2kit.campaigns.sweep.storage import Mirror
    from ad2kit.run.folder import RunDir
    from ad2kit.training.records import StepRecord

_CAMPAIGN = CampaignRecord(command="ad2kit sweep")
# A worker whose driver was killed may live on for a moment.
_SECONDS_TO_DIE = 60.0


@dataclass(frozen=True)
class Job:
    """What a worker has to know beside the configuration of its trial."""

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
        """Return the run of one trial, taken back from the storage if it is finished there."""
        recipe = self.recipe_of(configuration, seed)
        run = open_run(recipe, self.runs_dir, campaign=_CAMPAIGN)
        if self.mirror and not run.distill_report.is_file():
            run.wait_until_free(_SECONDS_TO_DIE)
            with run.locked():
                self.mirror.take(run.path, run.path.name, last=run.distill_report.name)
        return run

    def enter(self, configuration: Configuration, seed: int) -> RunDir:
        """Return the run of one trial in a worker: where the driver is, and with its teacher."""
        if self.working_dir.is_dir():
            os.chdir(self.working_dir)  # relative paths of the recipe are meant from there
        run = self.run(configuration, seed)
        run.wait_until_free(_SECONDS_TO_DIE)
        if self.mirror and not (run.teacher / text_model.MANIFEST).is_file():
            with run.locked():
                self.mirror.take(run.teacher, self.teacher_name(), last=text_model.MANIFEST)
        return run

    def first(self) -> Key:
        """Return the trial in whose run the teacher is made."""
        return self.recipe.sweep.grid(self.recipe.distill)[0], self.recipe.seed

    def has_teacher(self) -> bool:
        """Whether the teacher lies in that run, on this machine."""
        return (self.run(*self.first()).teacher / text_model.MANIFEST).is_file()

    def teacher_name(self) -> str:
        """Return what the teacher is called in the storage."""
        sections = {"seed", "data", "teacher"}
        not_weights = {"teacher": {"accept"}}
        shared = self.recipe.model_dump(mode="json", include=sections, exclude=not_weights)
        return f"teacher-{fingerprint(shared, self.recipe.compute.precision)[:16]}"


def make_teacher(job: Job) -> tuple[type[UserError | GateFailed], str, str] | None:
    """Make the teacher in the run of the first trial, and send it to the storage.

    Returns:
        Kind, message and hint where the user has to do something: an error of ours would not reach
        the other process whole.
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
    """Train one student in a worker, from wherever its run folder stands.

    The evaluations that the folder has on record are reported first, so that the scheduler can
    compare them after a restart. The last is not reported but returned: no scheduler may stop a
    student that is trained and not saved yet.

    Returns:
        The fields of its :class:`~ad2kit.campaigns.sweep.report.Trial`, and how far it has come.
    """
    point = dict(point)
    seed = point.pop("seed")
    told: dict[str, Any] = {"progress": 0, "evaluations": 0, "criterion": -math.inf}

    def tell(record: StepRecord) -> None:
        if record.phase != "student" or record.select_score is None:
            return
        progress = -(-record.step * job.recipe.distill.parts // record.total_steps)
        if progress <= told["progress"]:
            return
        told.update(progress=progress, evaluations=told["evaluations"] + 1)
        if record.select_score >= told["criterion"]:
            told.update(
                criterion=record.select_score,
                select_score=record.select_score,
                select_distance=record.select_distance,
            )
        if record.step < record.total_steps:
            tune.report(dict(told))

    try:
        run = job.enter(Configuration.model_validate(point), seed)
        for record in read_curve(run.curve("student")):
            tell(record)
        report = distill(run, on_step=tell, allow_inexact=job.allow_inexact)
        if job.mirror:
            job.mirror.send(run.path, run.path.name, last=run.distill_report.name)
    except DivergedError as error:
        return told | {"state": "diverged", "message": error.message, "criterion": -math.inf}
    except Exception as error:  # it is in the report, and ends this trial alone
        return told | {"state": "failed", "message": _explain(error), "criterion": -math.inf}
    score, selection = report.student_select_score, report.selection
    told |= {"criterion": score, "select_score": score}
    return told | {
        "state": "finished",
        "select_distance": selection.kept.distance if selection else None,
    }


def _explain(error: Exception) -> str:
    if isinstance(error, UserError):
        return error.message
    if no_room_left(error):
        return f"the disk is full, or a file is larger than allowed: {error}"
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
