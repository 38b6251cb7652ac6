"""The teacher as a run of its own, so that it is exported and timed as its students are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ad2kit import models, store
from ad2kit.files import sha256_of, write_record
from ad2kit.records import DistillReport

if TYPE_CHECKING:
    from ad2kit.run_dir import RunDir


def fill_with_teacher(run: RunDir, student: RunDir) -> None:
    """Make the teacher of a distilled run the student of another: its own, with nothing to learn.

    Args:
        run: to fill, locked; its recipe has all layers of the teacher, uncut. Kept if it is filled
            already.
        student: a run that is distilled.
    """
    distilled = DistillReport.read(student.distill_report)
    known = DistillReport.read(run.distill_report) if run.distill_report.is_file() else None
    if known is not None and known.teacher_sha256 == distilled.teacher_sha256:
        return
    for copy in (run.teacher, run.student):
        store.link_folder(student.teacher, copy)
    untrained = {
        "student_sha256": sha256_of(run.student / models.MANIFEST),
        "student_parameters": distilled.teacher_parameters,
        "student_select_score": distilled.teacher_select_score,
        "selection": None, "steps": 0, "train_seconds": 0.0, "examples_per_s": 0.0,
        "mean_clean_kl": 0.0, "mean_adversarial_gain": None, "verdict": "the teacher itself",
    }  # fmt: skip
    write_record(run.distill_report, distilled.model_copy(update=untrained))
