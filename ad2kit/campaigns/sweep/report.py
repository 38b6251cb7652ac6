"""What a sweep found: its trials, one a line, and its report as a record, tables and a plot."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from ad2kit.data.metrics import paired_bootstrap
from ad2kit.run.files import read_lines, whole_file, write_text
from ad2kit.run.markdown import table
from ad2kit.run.records import Part, Record
from ad2kit.run.sections import (
    Configuration,
    Metric,
)
from ad2kit.training.selection import good_enough

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from ad2kit.data.metrics import Array

Key = tuple[Configuration, int]

_DRAWS = 200

HEADER = ("batch", "lr", "radius", "alpha", "finished", "median", "lowest", "highest", "distance")
SELECTED = ("on validation", "median", "lowest", "highest", "retained")


class Trial(Record):
    """One student of a sweep, and how it ended; a line of ``trials.jsonl``.

    ``run`` is the name of its folder. Score and distance on `select` are those of the update that
    was kept, or of the best so far; ``criterion`` is the score, the least there is for one that was
    lost.
    """

    configuration: Configuration
    seed: int
    run: str
    state: Literal["begun", "finished", "stopped", "diverged", "failed"] = "begun"
    message: str = ""
    evaluations: int = 0
    criterion: float = -math.inf
    select_score: float | None = None
    select_distance: float | None = None

    @property
    def key(self) -> Key:
        """What tells it from the other trials of its sweep."""
        return self.configuration, self.seed

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to do: what failed is tried again, the rest is not."""
        return self.state in ("finished", "stopped", "diverged")


class Spread(Part):
    """Median, lowest and highest value over the seeds."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one value."""
        return cls(median=float(np.median(values)), lowest=min(values), highest=max(values))


class ConfigurationResult(Part):
    """The trials of one configuration, on `select`; None where none was evaluated."""

    configuration: Configuration
    trials: int
    finished: int
    criterion: float
    select_score: Spread | None
    select_distance: float | None


class SelectedStudent(Part):
    """A finished student of the selected configuration, on the validation set."""

    seed: int
    run: str
    student_sha256: str
    score: float


class SweepReport(Record):
    """Every configuration on `select`, and the best of them on the validation set."""

    recipe: str
    inputs: str
    search: Literal["grid", "optuna"]
    metrics: tuple[Metric, ...]
    select_from: Literal["train", "validation"]
    select_rows: int
    rows: int
    teacher_sha256: str
    teacher_select_score: float
    teacher_score: float
    baselines: dict[str, float] = Field(default_factory=dict)
    trials: tuple[Trial, ...]
    configurations: tuple[ConfigurationResult, ...]
    selected: Configuration
    students: tuple[SelectedStudent, ...]
    score: Spread
    retained: float
    environment: dict[str, str]


class Ledger:
    """``trials.jsonl``: what became of each trial, appended as it happens; the last line counts."""

    def __init__(self, path: Path) -> None:
        whole = [
            Trial.parse(line.encode(), f"{path}, line {number}")
            for number, line in enumerate(read_lines(path) if path.is_file() else [], start=1)
        ]
        self.path = path
        self.trials = {trial.key: trial for trial in whole}
        write_text(path, "".join(f"{trial.model_dump_json()}\n" for trial in self.trials.values()))

    def add(self, trial: Trial) -> None:
        """Write down how a trial stands."""
        self.trials[trial.key] = trial
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(f"{trial.model_dump_json()}\n")


def by_configuration(trials: Iterable[Trial]) -> list[ConfigurationResult]:
    """Return the trials of each configuration summed up, the best configuration first.

    The best has the highest median criterion over its seeds. One that was stopped counts with what
    it had reached, one that was lost as the worst.
    """
    groups: dict[Configuration, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.configuration, []).append(trial)
    found = [_summary(configuration, group) for configuration, group in groups.items()]
    return sorted(found, key=lambda each: -each.criterion)


def _summary(configuration: Configuration, trials: Sequence[Trial]) -> ConfigurationResult:
    scores = [t.select_score for t in trials if t.select_score is not None]
    distances = [t.select_distance for t in trials if t.select_distance is not None]
    return ConfigurationResult(
        configuration=configuration,
        trials=len(trials),
        finished=sum(trial.state == "finished" for trial in trials),
        criterion=float(np.median([trial.criterion for trial in trials])),
        select_score=Spread.of(scores) if scores else None,
        select_distance=float(np.median(distances)) if distances else None,
    )


def select(
    known: Sequence[ConfigurationResult],
    found: Mapping[Configuration, Sequence[Array]],
    labels: Array,
    metrics: Sequence[Metric],
) -> ConfigurationResult:
    """Return the best configuration by the rule of :mod:`ad2kit.training.selection`.

    Of those whose median score over the seeds is within one standard error of the best (of the
    paired difference, by 200 bootstrap draws) it is the nearest to the teacher.

    Args:
        known: the best first.
        found: the answers on ``select`` of the finished students of each; of one that was stopped
            early nothing but the score is known, and it is taken only if that is the best.
        labels: of ``select``.
        metrics: their mean is the score.
    """
    able = [each for each in known if found[each.configuration]]
    if known[0] not in able or known[0].select_distance is None:
        return known[0]
    models = [model for each in able for model in found[each.configuration]]
    draws = paired_bootstrap(metrics, models, labels, _DRAWS, seed=0)
    ends = np.cumsum([len(found[each.configuration]) for each in able])
    medians = [np.median(part, axis=1) for part in np.split(draws, ends[:-1], axis=1)]
    errors = np.array([(median - medians[0]).std() for median in medians])
    enough = good_enough(np.array([each.criterion for each in able]), errors)
    near = [each for each, good in zip(able, enough, strict=True) if good]
    return min(
        near, key=lambda each: math.inf if each.select_distance is None else each.select_distance
    )


def tables(
    report: SweepReport,
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Return the rows under ``HEADER`` and under ``SELECTED``."""
    configurations: list[tuple[str, ...]] = [
        (
            f"{each.configuration.batch_size}",
            f"{each.configuration.lr:.3g}",
            f"{each.configuration.radius:.3g}",
            f"{each.configuration.alpha:.3g}",
            f"{each.finished} of {each.trials}",
            *_numbers(each.select_score),
            "" if each.select_distance is None else f"{each.select_distance:.4g}",
        )
        for each in report.configurations
    ]
    return configurations, [
        *((name, f"{score:.4f}", "", "", "") for name, score in report.baselines.items()),
        ("teacher", f"{report.teacher_score:.4f}", "", "", ""),
        (str(report.selected), *_numbers(report.score), f"{report.retained:.2%}"),
    ]


def _numbers(spread: Spread | None) -> tuple[str, str, str]:
    if spread is None:
        return "", "", ""
    return f"{spread.median:.4f}", f"{spread.lowest:.4f}", f"{spread.highest:.4f}"


def caption(report: SweepReport) -> str:
    """Return in words what the tables show, and each trial that was lost."""
    origin = f"{report.select_rows} rows that were taken from the training data"
    if report.select_from == "validation":
        origin = "the validation rows, as in the paper, which flatters their scores"
    words = (
        f"{' and '.join(report.metrics)}. Configurations are compared on `select`, here {origin}: "
        "by the median of their score over the seeds; of those within one standard error of the "
        "best (of the paired difference, by bootstrap) the nearest to the teacher is taken: "
        f"{report.selected}. On {report.rows} validation rows the "
        f"median of its {len(report.students)} student(s) is {report.score.median:.4f}, and the "
        f"teacher's score {report.teacher_score:.4f}."
    )
    counts = {state: sum(trial.state == state for trial in report.trials) for state in _STATES}
    lines = [words, f"Trials: {', '.join(f'{n} {state}' for state, n in counts.items() if n)}."]
    lines += [
        f"Lost: {trial.configuration}, seed {trial.seed} ({trial.run}) {trial.state}: "
        f"{trial.message}"
        for trial in report.trials
        if trial.state in ("diverged", "failed")
    ]
    return "\n".join(lines)


_STATES = ("finished", "stopped", "diverged", "failed", "begun")


def markdown(report: SweepReport) -> str:
    """Return the report as a page of Markdown."""
    configurations, selected = tables(report)
    lines = [f"# {report.recipe}", "", *table(HEADER, configurations), ""]
    return "\n".join([*lines, *table(SELECTED, selected), "", caption(report), ""])


def plot(report: SweepReport, path: Path) -> None:
    """Draw the score on `select` over the learning rate: medians, and from lowest to highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    groups: dict[str, list[tuple[float, Spread]]] = {}
    for each in report.configurations:
        point = each.configuration
        label = f"batch {point.batch_size}, radius {point.radius:.3g}, alpha {point.alpha:.3g}"
        if report.search == "optuna":
            label = f"batch {point.batch_size}"
        if each.select_score is not None:
            groups.setdefault(label, []).append((point.lr, each.select_score))
        if each.select_score is not None and point == report.selected:
            axes.plot(
                point.lr,
                each.select_score.median,
                "*",
                color="black",
                markersize=14,
                label="selected",
                zorder=3,
            )
    for label, points in sorted(groups.items()):
        points.sort(key=lambda pair: pair[0])
        middles = [spread.median for _, spread in points]
        reach = [
            [spread.median - spread.lowest for _, spread in points],
            [spread.highest - spread.median for _, spread in points],
        ]
        line = "o-" if report.search == "grid" else "o"
        axes.errorbar([lr for lr, _ in points], middles, reach, fmt=line, capsize=3, label=label)
    axes.axhline(report.teacher_select_score, linestyle="--", color="gray", label="teacher")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"{' and '.join(report.metrics)} on select")
    axes.legend()
    with whole_file(path) as new:
        figure.savefig(new, format="svg", metadata={"Date": None})
