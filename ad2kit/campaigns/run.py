"""Runs all stages in order, and skips each stage whose result for the same inputs exists.

The teacher itself can be a run too. It is then exported and timed like its students, and a service
can compare its student with it in the background.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import save_file

from ad2kit.campaigns import shapes
from ad2kit.exporting.export import export
from ad2kit.gate.latency import measure
from ad2kit.gate.parity import judge
from ad2kit.gate.records import check_passed
from ad2kit.gate.report import report
from ad2kit.gate.summary import teacher_report
from ad2kit.models import text_model
from ad2kit.models.records import is_given
from ad2kit.packaging.bento import package
from ad2kit.run.errors import RunError, UserError
from ad2kit.run.files import sha256_of, whole_file, write_record
from ad2kit.run.folder import open_run
from ad2kit.run.machine import processes
from ad2kit.training import shared
from ad2kit.training.distill import distill
from ad2kit.training.records import DistillReport

if TYPE_CHECKING:
    from collections.abc import Callable

    from ad2kit.gate.records import BentoRecord
    from ad2kit.run.folder import RunDir
    from ad2kit.training.records import StepRecord


def run_all(
    run: RunDir,
    *,
    on_step: Callable[[StepRecord], None] = lambda _record: None,
    allow_inexact: bool = False,
) -> BentoRecord:
    """Take a run from its recipe to a published Bento.

    The verdict comes before the measurements: only a run that passed is measured and packaged. The
    report is written even if no variant passed.

    Args:
        run: the run; stages that are done already are skipped.
        on_step: called after each update of a training.
        allow_inexact: see :func:`ad2kit.training.distill.distill`.

    Raises:
        GateFailed: the teacher is not worth imitating, no variant passed, or the service differs
            from its artefact.
        UserError: see the stages.
    """
    if processes() > 1:
        raise UserError(
            "`ad2kit run` takes one process: only the training is shared by several",
            hint="`accelerate launch -m ad2kit distill ...` first; then `ad2kit run` with the "
            "same settings goes on from there",
        )
    with run.locked() as held:
        distill(held, on_step=on_step, allow_inexact=allow_inexact)
        export(held)
        verdict = judge(held)
        report(held)
        teacher = teacher_report(held)
        check_passed(verdict, run.path, report=run.parity_report, teacher=teacher)
        measure(held, again=False)
        record = package(held)
        report(held)
    return record


def export_teacher(run: RunDir) -> RunDir:
    """Export the teacher of a distilled run, and judge its variants like a student's.

    Args:
        run: a run with a student.

    Returns:
        A run inside of ``run``, whose student is the teacher.

    Raises:
        RunError: ``run`` has no student yet, or its teacher is given by its answers.
        ModelError: see :func:`ad2kit.exporting.export.export`.
    """
    run.require(run.distill_report, command="distill")
    distilled = DistillReport.read(run.distill_report)
    if is_given(run.teacher):
        raise RunError(
            f"{run.path}: the teacher is given by its answers ({run.recipe.teacher.title}), and "
            "there is no model to export",
            hint="leave --teacher out",
        )
    whole = shapes.whole(text_model.load_model(run.teacher, distilled.labels, distilled.task))
    recipe = run.recipe.model_copy(update={"student": shapes.section(whole, whole)})
    teacher = open_run(recipe, run.path.parent, run.teacher_run)
    with teacher.locked() as held:
        fill_with_teacher(held, run)
        export(held)
        judge(held)
    return teacher


def fill_with_teacher(run: RunDir, student: RunDir) -> None:
    """Fill a run with the teacher of a distilled run, as both its teacher and its student.

    Args:
        run: the run to fill, locked; its recipe has all layers of the teacher, uncut. A run that is
            filled already is kept.
        student: the distilled run.
    """
    distilled = DistillReport.read(student.distill_report)
    if run.distill_report.is_file():
        previous = DistillReport.read(run.distill_report)
        if previous.teacher_sha256 == distilled.teacher_sha256:
            return
    for copy in (run.teacher, run.student):
        shared.link_folder(student.teacher, copy)
    with safe_open(student.select_logits, "pt") as tensors:
        if "teacher" in tensors.keys():  # noqa: SIM118  (not in runs of 0.1.0; it is no mapping)
            logits = tensors.get_tensor("teacher")
            with whole_file(run.select_logits) as temporary:
                save_file({"logits": logits, "teacher": logits.clone()}, temporary)
    untrained = {
        "student_sha256": sha256_of(run.student / text_model.MANIFEST),
        "student_parameters": distilled.teacher_parameters,
        "student_select_score": distilled.teacher_select_score,
        "selection": None,
        "steps": 0,
        "train_seconds": 0.0,
        "examples_per_s": 0.0,
        "mean_clean_kl": 0.0,
        "mean_adversarial_gain": None,
        "verdict": "the teacher itself",
    }
    write_record(run.distill_report, distilled.model_copy(update=untrained))
