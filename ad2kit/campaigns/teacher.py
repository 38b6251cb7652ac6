"""The teacher itself as an artefact: what a service compares its student with in the background."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ad2kit import models, shapes
from ad2kit.baseline import fill_with_teacher
from ad2kit.export import export
from ad2kit.parity import parity
from ad2kit.records import DistillReport
from ad2kit.run_dir import open_run

if TYPE_CHECKING:
    from ad2kit.run_dir import RunDir


def export_teacher(run: RunDir) -> RunDir:
    """Export the teacher of a distilled run, and judge its variants as those of a student.

    Args:
        run: a run with a student.

    Returns:
        A run of its own inside of ``run``, whose student is the teacher.

    Raises:
        RunError: ``run`` has no student yet.
        ModelError: see :func:`ad2kit.export.export`.
    """
    run.require(run.distill_report, command="distill")
    distilled = DistillReport.read(run.distill_report)
    whole = shapes.whole(models.load(run.teacher, distilled.labels, distilled.task))
    recipe = run.recipe.model_copy(update={"student": shapes.section(whole, whole)})
    teacher = open_run(recipe, run.path.parent, run.teacher_run)
    with teacher.locked() as held:
        fill_with_teacher(held, run)
        export(held)
        parity(held)
    return teacher
