"""A run folder: every file name of a run, its lock, and which run a command means.

    runs/<recipe>-<fingerprint>/    written by
        recipe.json                 the first stage: the resolved recipe
        hub.json                    the first stage: the commit of each hub:// reference, if any
        .lock                       held by the stage that writes
        teacher/  student/          distill: safetensors, tokenizer, sha256 manifest
        teacher.json                distill: the teacher beside simpler models
        teacher-training.jsonl  training.jsonl                   distill
        teacher-checkpoint/  teacher-snapshots/                  distill, only while training
        checkpoint/  snapshots/                                  distill, only while training
        select-logits.safetensors   distill: the student's logits on `select`
        bad-rows.jsonl              distill: the rows that data.bad_rows=skip left out, if any
        distill.json                distill, at its end
        onnx/<variant>/             export: model.onnx, tokenizer, manifest.json, golden.json;
                                    judge: a copy of parity.json
        int8-search.json            export
        parity.json                 judge: the verdict
        answers.jsonl               judge: the answers of each model to each validation row
        latency.json                measure
        bento.json                  package
        report.html                 report
        campaign.json               compare, sweep and fit alone: their rule and their verdicts
        teacher-run/                `export --teacher`: a run whose student is the teacher
    runs/.shared/                   files that runs share, see ad2kit.training.shared

The fingerprint covers every setting that decides the weights. So the same command finds the same
folder and continues where it stopped, and a change of the learning rate makes another run.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from ad2kit.run import hub
from ad2kit.run.errors import RecipeError, RunError, no_room_left
from ad2kit.run.files import LOCK, TEMPORARY, fingerprint, locked, write_record, write_text
from ad2kit.run.machine import first_process_first, is_first_process
from ad2kit.run.recipe import Recipe, from_data, load_recipe
from ad2kit.run.records import CampaignRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from filelock import BaseFileLock

logger = logging.getLogger(__name__)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


# Keys of the data section that 0.1.0 did not have. With their defaults a recipe has the folder that
# 0.1.0 gave it, and its run is found again. So it is without the new key teacher.answers.
_NEWER_DATA_KEYS = (
    "bad_rows",
    "csv_quotes",
    "label_separator",
    "long_texts",
    "max_unlabelled_rows",
    "max_windows",
    "missing_labels",
    "window_overlap_tokens",
)


@dataclass(frozen=True)
class RunDir:
    """The folder of one run. Only this class knows its file names.

    Args:
        path: path of the folder.
        asked: the recipe that the run was opened with. The holder of the lock writes it into the
            folder, so that a refused command changes nothing.
        campaign: record of the campaign that opened the run; None if a command asked for the run.
        lock: lock of the folder; set in the run that :meth:`locked` yields.
        commits: the commit of each ``hub://`` reference, of a run that is opened for the first
            time; None takes those in the folder.
    """

    path: Path
    asked: Recipe | None = field(default=None, compare=False, repr=False)
    campaign: CampaignRecord | None = field(default=None, compare=False, repr=False)
    lock: BaseFileLock | None = field(default=None, compare=False, repr=False)
    commits: Mapping[str, str] | None = field(default=None, compare=False, repr=False)

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.json"

    @property
    def hub_file(self) -> Path:
        """The commits that the references to the hub named when the run began."""
        return self.path / "hub.json"

    @property
    def teacher(self) -> Path:
        """The teacher: safetensors, tokenizer, sha256 manifest."""
        return self.path / "teacher"

    @property
    def student(self) -> Path:
        """The student, in the same form."""
        return self.path / "student"

    @property
    def teacher_report(self) -> Path:
        """The comparison of the teacher with simpler models."""
        return self.path / "teacher.json"

    @property
    def select_logits(self) -> Path:
        """The student's logits on ``select``."""
        return self.path / "select-logits.safetensors"

    @property
    def bad_rows(self) -> Path:
        """The rows that were left out, one JSON line each; absent if there are none."""
        return self.path / "bad-rows.jsonl"

    @property
    def distill_report(self) -> Path:
        """The report of the distillation: its inputs, and the update that was kept."""
        return self.path / "distill.json"

    @property
    def parity_report(self) -> Path:
        """The verdict of the parity gate."""
        return self.path / "parity.json"

    @property
    def answers(self) -> Path:
        """The answers of each model to each validation row, one JSON line each."""
        return self.path / "answers.jsonl"

    @property
    def latency_report(self) -> Path:
        """The latency of teacher and variants on this machine."""
        return self.path / "latency.json"

    @property
    def int8_search(self) -> Path:
        """The candidates that the int8 search has tried."""
        return self.path / "int8-search.json"

    @property
    def bento_record(self) -> Path:
        """The Bento that was built from the run."""
        return self.path / "bento.json"

    @property
    def report(self) -> Path:
        """All reports of the run as one HTML page."""
        return self.path / "report.html"

    @property
    def campaign_record(self) -> Path:
        """In the run of a campaign alone: its rule and its verdicts."""
        return self.path / CampaignRecord.file_name

    @property
    def teacher_run(self) -> Path:
        """A run whose student is the teacher, see :mod:`ad2kit.campaigns.run`."""
        return self.path / "teacher-run"

    def onnx(self, variant: str) -> Path:
        """Return the folder of one ONNX variant."""
        return self.path / "onnx" / variant

    def curve(self, phase: str) -> Path:
        """Return the JSON-lines file of the step records of ``teacher`` or ``student``."""
        return self.path / ("training.jsonl" if phase == "student" else "teacher-training.jsonl")

    def checkpoint(self, phase: str) -> Path:
        """Return the checkpoint folder of the unfinished training of ``teacher`` or ``student``."""
        return self.path / ("checkpoint" if phase == "student" else "teacher-checkpoint")

    def snapshots(self, phase: str) -> Path:
        """Return the folder of evaluated weights of the training of ``teacher`` or ``student``."""
        return self.path / ("snapshots" if phase == "student" else "teacher-snapshots")

    @property
    def shared(self) -> Path:
        """The folder that all runs in one place share; see :mod:`ad2kit.training.shared`."""
        return self.path.parent / ".shared"

    @property
    def recipe(self) -> Recipe:
        """The recipe that :meth:`resolved` returns."""
        return self.resolved()

    def resolved(self) -> Recipe:
        """Return the recipe that the run was opened with, or else the recipe in the folder.

        Its references to the hub name the commits that the run began with, if these were recorded.

        Raises:
            RunError: this is not a run folder, or its recipe is damaged.
        """
        recipe = self._stored() if self.asked is None else self.asked
        commits = self._stored_commits() if self.commits is None else self.commits
        return hub.pinned(recipe, commits)

    def _stored_commits(self) -> dict[str, str]:
        """Return the commits in the folder; none if nothing was read from the hub."""
        if not self.hub_file.is_file():
            return {}
        try:
            return dict(json.loads(self.hub_file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise self._damaged(self.hub_file, error) from error

    def _damaged(self, path: Path, error: Exception) -> RunError:
        return RunError(
            f"{path} is damaged: {error}",
            hint=f"restore it, or delete {self.path} and run the recipe again",
        )

    def _stored(self) -> Recipe:
        """Return the recipe in the folder, as it was asked for."""
        if not self.recipe_file.is_file():
            raise RunError(
                f"{self.path} is not a run folder: it has no recipe.json",
                hint="give a folder that `ad2kit distill` or `ad2kit run` made",
            )
        try:
            data = json.loads(self.recipe_file.read_text(encoding="utf-8"))
            return from_data(data, where=str(self.recipe_file))
        except (ValueError, RecipeError) as error:
            raise self._damaged(self.recipe_file, error) from error

    def require(self, path: Path, *, command: str) -> None:
        """Insist that an earlier stage has written ``path``.

        Raises:
            RunError: ``path`` is missing; the hint names the ``command`` that writes it.
        """
        if not path.exists():
            argument = self.recipe.name if command == "distill" else self.path
            raise RunError(
                f"{self.path} has no {path.relative_to(self.path)} yet",
                hint=f"run `ad2kit {command} {argument}` first",
            )

    def wait_until_free(self, timeout_s: float) -> None:
        """Wait at most ``timeout_s`` seconds for another process that writes to this run."""
        if self.path.is_dir():
            with suppress(Timeout), FileLock(self.path / LOCK, timeout=timeout_s):
                pass

    @contextmanager
    def locked(self) -> Iterator[RunDir]:
        """Lock the run for writing and remove the leftovers of a killed process.

        Yields:
            The run with its recipe as it was read or written under the lock. Stages that are called
            with this run do not lock it again, and no other process can change it between them.

        Raises:
            RunError: another process is writing to this run, or the folder now holds another run.
        """
        if self.lock is not None and self.lock.is_locked:
            yield self
            return
        with locked(self.path) as lock:
            recipe = self._claim()
            if self.campaign is None:
                os.utime(self.recipe_file)  # marks this run as the one that was used last
            yield replace(self, asked=recipe, lock=lock)

    def _claim(self) -> Recipe:
        """Write the recipe that the run was opened with, if any; return the recipe in force."""
        if self.asked is None:
            return self.recipe
        _check_weights(self, self.asked)
        record = self.campaign_record
        if self.campaign is None:
            if record.is_file() and CampaignRecord.read(record).rule is None:
                record.unlink()  # a command has now asked for this run itself
        else:
            has_rule = self.campaign.rule is not None
            if not record.is_file() and (has_rule or not self.recipe_file.is_file()):
                write_record(record, self.campaign)
            if self.distill_report.is_file():
                # A campaign must not change the gate of a finished run.
                return RunDir(self.path).recipe
        if self.commits:
            # Before the recipe: a folder with a recipe reads the commits that are there.
            write_text(self.hub_file, json.dumps(dict(self.commits), indent=2) + "\n")
        write_record(self.recipe_file, self.asked)
        return self.asked


def exclusive(
    stage: Callable[Concatenate[RunDir, Parameters], Result],
) -> Callable[Concatenate[RunDir, Parameters], Result]:
    """Decorate a stage so that it holds the lock of its run, with one recipe, while it works."""

    @functools.wraps(stage)
    def locked_stage(run: RunDir, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        run.resolved()  # fails for a folder that is not a run, before a lock file is created
        with run.locked() if is_first_process() else nullcontext(run) as locked_run:
            return stage(locked_run, *args, **kwargs)

    return locked_stage


def _training_fingerprint(recipe: Recipe) -> str:
    """Return the fingerprint of the settings that decide the weights."""
    sections = {"seed", "data", "teacher", "student", "distill"}
    settings = recipe.model_dump(mode="json", include=sections, exclude={"teacher": {"accept"}})
    fields = type(recipe.data).model_fields
    for key in _NEWER_DATA_KEYS:
        if settings["data"][key] == fields[key].default:
            del settings["data"][key]
    if not recipe.teacher.answers:
        del settings["teacher"]["answers"]
    return fingerprint(settings, recipe.compute.precision)


def run_folder(recipe: Recipe, runs_dir: Path) -> Path:
    """Return the path of a recipe's run under ``runs_dir``, whether or not it exists."""
    return runs_dir / f"{recipe.name}-{_training_fingerprint(recipe)[:8]}"


def open_run(
    recipe: Recipe | str | Path,
    runs_dir: str | Path = "runs",
    folder: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    campaign: CampaignRecord | None = None,
) -> RunDir:
    """Create, or find again, the run of ``recipe`` under ``runs_dir`` or at ``folder``.

        run = ad2kit.open_run("demo", overrides=["distill.lr=1e-4"])

    The next stage locks the run, and then writes the recipe into the folder.

    Args:
        recipe: the recipe of the run, or the name or path of one.
        runs_dir: the folder that holds the runs.
        folder: the folder of this run; named after the recipe if None.
        overrides: changes to a recipe that is given by name, such as ``distill.lr=1e-4``.
        campaign: record of the campaign that makes the run; None if a command asks for the run.
            A campaign does not change the recipe of a run that is already distilled.

    The first time, the hub is asked which commit each ``hub://`` reference names. The run reads
    these commits to its end, also if a branch moves meanwhile.

    Raises:
        RecipeError: there is no such recipe, or it has a wrong key or value.
        DataError, ModelError: see :func:`ad2kit.run.hub.commit_of`.
        RunError: ``folder`` holds a run of another recipe, is not a run folder, or cannot be made.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(str(recipe), overrides)
    run = RunDir(Path(folder or run_folder(recipe, Path(runs_dir))), recipe, campaign)
    # The first of several processes makes the folder; the others find it.
    with first_process_first(recipe.compute):
        _check_weights(run, recipe)
        if not run.recipe_file.is_file():
            run = replace(run, commits=hub.commits(recipe))
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if no_room_left(error):
                raise
            raise RunError(
                f"cannot make the run folder {run.path}: {error.strerror}",
                hint="name a folder that can be written, with --runs-dir or --run",
            ) from error
    return run


def _check_weights(run: RunDir, recipe: Recipe) -> None:
    """Refuse a folder that holds a run with other weights, or other files."""
    if run.recipe_file.is_file():
        stored = RunDir(run.path)._stored()  # noqa: SLF001  (of the same module)
        if _training_fingerprint(stored) != _training_fingerprint(recipe):
            raise RunError(
                f"{run.path} holds a run of recipe '{stored.name}' with other data, teacher, "
                f"student, distill or seed settings than '{recipe.name}' asks for",
                hint="leave --run out to get a folder of its own, or name another one",
            )
    elif run.path.is_dir():
        # The files of a run without a recipe yet.
        run_files = {LOCK, CampaignRecord.file_name, run.hub_file.name}
        names = [path.name for path in run.path.iterdir()]
        if any(name not in run_files and TEMPORARY not in name for name in names):
            raise RunError(
                f"{run.path} is not empty and is not a run folder",
                hint="name an empty or a new folder",
            )


def named_folder(runs_dir: Path, folder: Path) -> Path:
    """Return ``folder`` if it exists; else the folder of that name under ``runs_dir``, if any."""
    candidate = runs_dir / folder
    return candidate if candidate.exists() and not folder.exists() else folder


def judged_runs(runs_dir: Path) -> list[RunDir]:
    """Return the runs under ``runs_dir`` that a gate has judged, the most recent first."""
    reports = sorted(runs_dir.glob("*/parity.json"), key=lambda path: path.stat().st_mtime)
    return [RunDir(report.parent) for report in reversed(reports)]


def find_run(runs_dir: Path, folder: Path | None = None) -> RunDir:
    """Return the run at ``folder``, or the distilled run under ``runs_dir`` that was used last.

    Runs that a campaign made are skipped: they have to be named.

    Raises:
        RunError: there is no such run.
    """
    if folder is not None:
        run = RunDir(named_folder(runs_dir, folder))
        run.resolved()
        return run
    # A run whose first command failed, or is still training, must not hide a finished one.
    distilled = [RunDir(path.parent) for path in runs_dir.glob("*/distill.json")]
    runs = [run for run in distilled if not run.campaign_record.is_file()]
    if not runs:
        exception = ""
        hint = "make one with `ad2kit run demo`, or name the folder with --runs-dir"
        if distilled:
            exception = f" but those of campaigns, such as {distilled[0].path}"
            hint = "name the folder of the run"
        raise RunError(
            f"no run under {runs_dir.resolve()} has a distilled student{exception}", hint=hint
        )
    return max(runs, key=lambda run: run.recipe_file.stat().st_mtime)
