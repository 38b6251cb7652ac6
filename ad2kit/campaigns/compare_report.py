"""The result of a comparison of methods: as a record, as tables, and as a plot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ad2kit.run.files import whole_file
from ad2kit.run.markdown import table
from ad2kit.run.records import Part, Record
from ad2kit.run.sections import Metric

if TYPE_CHECKING:
    from pathlib import Path


HEADER = ("method", "median", "lowest", "highest", "retained", "seconds", "examples/s")
DIFFERENCES = ("points", "difference", "95 % interval", "p", "detectable")


class StudentResult(Part):
    """One student of a comparison; ``run`` is the name of its folder.

    ``constant`` means that it gives all rows of ``select`` the same answer, after every update.
    """

    method: str
    seed: int
    run: str
    teacher_sha256: str
    student_sha256: str
    score: float
    train_seconds: float
    examples_per_s: float
    verdict: str
    constant: bool = False


class MethodResult(Part):
    """The students of one method: scores over the seeds, and the cost of training a student."""

    method: str
    median: float
    lowest: float
    highest: float
    retained: float
    train_seconds: float
    examples_per_s: float


class Difference(Part):
    """Mean score of ``method`` over the seeds minus that of ``baseline``, as a fraction."""

    method: str
    baseline: str
    difference: float
    interval: tuple[float, float]
    p: float
    smallest_detectable_difference: float


class CompareReport(Record):
    """Several methods from one teacher, judged on the labelled validation set.

    ``baselines`` holds the scores of simpler models; see :mod:`ad2kit.models.baselines`.
    """

    recipe: str
    inputs: str
    metrics: tuple[Metric, ...]
    rows: int
    teacher_score: float
    baselines: dict[str, float] = Field(default_factory=dict)
    students: tuple[StudentResult, ...]
    methods: tuple[MethodResult, ...]
    differences: tuple[Difference, ...]
    environment: dict[str, str]


def tables(report: CompareReport) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Return the rows under :data:`HEADER` and the rows under :data:`DIFFERENCES`, as text."""
    references = {**report.baselines, "teacher": report.teacher_score}
    results = [(name, f"{score:.4f}", *[""] * 5) for name, score in references.items()]
    results += [
        (
            method.method,
            f"{method.median:.4f}",
            f"{method.lowest:.4f}",
            f"{method.highest:.4f}",
            f"{method.retained:.2%}",
            f"{method.train_seconds:.0f}",
            f"{method.examples_per_s:.0f}",
        )
        for method in report.methods
    ]
    differences: list[tuple[str, ...]] = [
        (
            f"{row.method} - {row.baseline}",
            f"{100 * row.difference:+.2f}",
            f"{100 * row.interval[0]:+.2f} to {100 * row.interval[1]:+.2f}",
            f"{row.p:.3f}",
            f"{100 * row.smallest_detectable_difference:.2f}",
        )
        for row in report.differences
    ]
    return results, differences


def caption(report: CompareReport) -> str:
    """Return the caption of the tables, with warnings about idle and constant students."""
    seeds = len({student.seed for student in report.students})
    idle = [
        student
        for student in report.students
        if student.verdict.startswith("the adversary was idle")
    ]
    text = (
        f"{' and '.join(report.metrics)} on {report.rows} validation rows, {seeds} seed(s), one "
        "teacher. Differences are of means, in points, with a bootstrap interval over rows and "
        "seeds, the p of an approximate randomisation test, and the smallest difference that four "
        "of five such comparisons would find."
    )
    if idle:
        text += f" {idle[0].run}: {idle[0].verdict}."
    constant = [student.run for student in report.students if student.constant]
    if constant:
        text += f" Students that give every row the same answer: {', '.join(constant)}."
    return text


def markdown(report: CompareReport) -> str:
    """Return the report as a page of Markdown."""
    results, differences = tables(report)
    lines = [f"# {report.recipe}", "", *table(HEADER, results)]
    if differences:
        lines += ["", *table(DIFFERENCES, differences)]
    return "\n".join([*lines, "", caption(report), ""])


def plot(report: CompareReport, path: Path) -> None:
    """Draw every student as a point, each method's median as a line, and the teacher."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.6 * len(report.methods) + 1.2), layout="constrained")
    axes = figure.subplots()
    for row, method in enumerate(report.methods):
        scores = [student.score for student in report.students if student.method == method.method]
        axes.plot(scores, [row] * len(scores), "o", alpha=0.6)
        axes.plot([method.median] * 2, [row - 0.25, row + 0.25], color="black")
    axes.axvline(report.teacher_score, linestyle="--", color="gray", label="teacher")
    axes.set_yticks(range(len(report.methods)), [method.method for method in report.methods])
    axes.invert_yaxis()
    axes.set_xlabel(" and ".join(report.metrics))
    axes.legend()
    with whole_file(path) as new:
        figure.savefig(new, format="svg", metadata={"Date": None})
