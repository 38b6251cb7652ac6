"""A run folder: every file name of a run, its lock, and which run a command means.

    runs/<recipe>-<fingerprint>/
        recipe.json                 the resolved recipe
        teacher/  student/          safetensors, tokenizer, sha256 manifest
        teacher-training.jsonl  training.jsonl
        teacher-checkpoint/  checkpoint/   only while training
        distill.json  int8-search.json  parity.json  latency.json  bento.json  report.html
        answers.jsonl               what each model says of each validation row
        teacher-run/                a run whose student is the teacher, see campaigns.teacher
        onnx/<variant>/             model.onnx, tokenizer, manifest.json
    runs/.shared/                   what runs share, see ad2kit.store

The fingerprint covers what decides the weights, so the same command finds the same folder and
goes on where it stopped, and a change of the learning rate is another run.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from ad2kit.errors import RecipeError, RunError, no_room_left
from ad2kit.files import fingerprint, locked, write_record
from ad2kit.recipe import Recipe, from_data
from ad2kit.runtime import first_process_first, is_first_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class _Inside:
    """A file or folder of fixed name inside a run folder."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: RunDir, _owner: type[RunDir]) -> Path:
        return run.path / self._name


@dataclass(frozen=True)
class RunDir:
    """The folder of one run. Only this class knows its file names."""

    path: Path

    recipe_file = _Inside("recipe.json")
    teacher = _Inside("teacher")
    student = _Inside("student")
    distill_report = _Inside("distill.json")
    parity_report = _Inside("parity.json")
    answers = _Inside("answers.jsonl")
    latency_report = _Inside("latency.json")
    int8_search = _Inside("int8-search.json")
    bento_record = _Inside("bento.json")
    report = _Inside("report.html")
    teacher_run = _Inside("teacher-run")

    def onnx(self, variant: str) -> Path:
        """Return the folder of one ONNX variant."""
        return self.path / "onnx" / variant

    def curve(self, phase: str) -> Path:
        """Return the JSON-lines file of the step records of ``teacher`` or ``student``."""
        return self.path / ("training.jsonl" if phase == "student" else "teacher-training.jsonl")

    def checkpoint(self, phase: str) -> Path:
        """Return the folder of the unfinished training of ``teacher`` or ``student``."""
        return self.path / ("checkpoint" if phase == "student" else "teacher-checkpoint")

    @property
    def shared(self) -> Path:
        """The folder of what the runs beside this one share; see :mod:`ad2kit.store`."""
        return self.path.parent / ".shared"

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe of this run.

        Raises:
            RunError: this is not a run folder.
        """
        if not self.recipe_file.is_file():
            raise RunError(
                f"{self.path} is not a run folder: it has no recipe.json",
                hint="give a folder that `ad2kit distill` or `ad2kit run` made",
            )
        try:
            data = json.loads(self.recipe_file.read_text(encoding="utf-8"))
            return from_data(data, where=str(self.recipe_file))
        except (ValueError, RecipeError) as error:
            raise RunError(
                f"{self.recipe_file} is damaged: {error}",
                hint=f"restore it, or delete {self.path} and run the recipe again",
            ) from error

    def require(self, path: Path, *, command: str) -> None:
        """Insist that an earlier stage left ``path`` behind; else name its command."""
        if not path.exists():
            what = self.recipe.name if command == "distill" else self.path
            raise RunError(
                f"{self.path} has no {path.relative_to(self.path)} yet",
                hint=f"run `ad2kit {command} {what}` first",
            )

    def wait_until_free(self, timeout_s: float) -> None:
        """Wait for another process that still writes to this run, at most ``timeout_s``."""
        if self.path.is_dir():
            with suppress(Timeout), FileLock(self.path / ".lock", timeout=timeout_s):
                pass

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for writing and sweep away what a killed process left half-written.

        Raises:
            RunError: another process is writing to this run.
        """
        with locked(self.path):
            os.utime(self.recipe_file)
            yield


def exclusive(
    stage: Callable[Concatenate[RunDir, Parameters], Result],
) -> Callable[Concatenate[RunDir, Parameters], Result]:
    """Make a stage hold the lock of its run while it works."""

    @functools.wraps(stage)
    def locked_stage(run: RunDir, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        _ = run.recipe  # a folder that is no run gets no lock file
        with run.locked() if is_first_process() else nullcontext():
            return stage(run, *args, **kwargs)

    return locked_stage


def _training_part(recipe: Recipe) -> str:
    """Return the fingerprint of what decides the weights."""
    sections = {"seed", "data", "teacher", "student", "distill"}
    return fingerprint(recipe.model_dump(mode="json", include=sections), recipe.compute.precision)


def open_run(recipe: Recipe, runs_dir: Path, folder: Path | None = None) -> RunDir:
    """Create, or find again, the run of ``recipe`` under ``runs_dir`` or at ``folder``.

    Raises:
        RunError: ``folder`` holds a run of another recipe, or something that is no run.
    """
    run = RunDir(folder or runs_dir / f"{recipe.name}-{_training_part(recipe)[:8]}")
    # The others of several processes find what the first has made.
    with first_process_first(recipe.compute):
        _open(run, recipe)
    return run


def _open(run: RunDir, recipe: Recipe) -> None:
    if run.recipe_file.is_file():
        theirs = run.recipe
        if _training_part(theirs) != _training_part(recipe):
            raise RunError(
                f"{run.path} holds a run of recipe '{theirs.name}' with other data, teacher, "
                f"student, distill or seed settings than '{recipe.name}' asks for",
                hint="leave --run out to get a folder of its own, or name another one",
            )
    elif run.path.is_dir() and any(run.path.iterdir()):
        raise RunError(
            f"{run.path} is not empty and is not a run folder",
            hint="name an empty or a new folder",
        )
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        if is_first_process():
            write_record(run.recipe_file, recipe)
    except OSError as error:
        if no_room_left(error):
            raise
        raise RunError(
            f"cannot make the run folder {run.path}: {error.strerror}",
            hint="name a folder that can be written, with --runs-dir or --run",
        ) from error


def named_folder(runs_dir: Path, folder: Path) -> Path:
    """Return a folder as it was named, or the one of that name under ``runs_dir``."""
    inside = runs_dir / folder
    return inside if inside.exists() and not folder.exists() else folder


def find_run(runs_dir: Path, folder: Path | None = None) -> RunDir:
    """Return the run at ``folder``, or the distilled one under ``runs_dir`` that was used last.

    Raises:
        RunError: there is none.
    """
    if folder is not None:
        run = RunDir(named_folder(runs_dir, folder))
        _ = run.recipe
        return run
    # A run whose first command failed, or is still training, must not hide a finished one.
    runs = [RunDir(path.parent) for path in runs_dir.glob("*/distill.json")]
    if not runs:
        raise RunError(
            f"no run under {runs_dir.resolve()} has a distilled student",
            hint="make one with `ad2kit run demo`, or name the folder with --runs-dir",
        )
    return max(runs, key=lambda run: run.recipe_file.stat().st_mtime)
