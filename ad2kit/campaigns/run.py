"""All stages in order, each skipped where its result for the same inputs lies there already."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ad2kit.bench import bench
from ad2kit.distill import distill
from ad2kit.errors import UserError
from ad2kit.export import export
from ad2kit.package import package
from ad2kit.parity import parity
from ad2kit.report import report
from ad2kit.runtime import processes
from ad2kit.tables import teacher_report
from ad2kit.verdicts import insist_passed

if TYPE_CHECKING:
    from collections.abc import Callable

    from ad2kit.records import BentoRecord, StepRecord
    from ad2kit.run_dir import RunDir


def run_all(
    run: RunDir,
    *,
    on_step: Callable[[StepRecord], None] = lambda _record: None,
    allow_inexact: bool = False,
) -> BentoRecord:
    """Take a run from its recipe to a published Bento.

    The verdict comes first: only what passed is measured and packaged. The report is written even
    where nothing passed.

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
        verdict = parity(held)
        report(held)
        looked = teacher_report(held)
        insist_passed(verdict, run.path, report=run.parity_report, teacher=looked)
        bench(held, again=False)
        record = package(held)
        report(held)
    return record
