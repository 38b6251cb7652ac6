"""The result of a sweep: its trials, one a line, and its report as a record, tables and a plot."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from ad2kit.run.files import read_lines, whole_file, write_text
from ad2kit.run.markdown import table
from ad2kit.run.records import Part, Record
from ad2kit.run.sections import Metric
from ad2kit.run.sweep_section import Configuration
from ad2kit.statistics.metrics import paired_bootstrap
from ad2kit.training.selection import good_enough

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from ad2kit.statistics.metrics import Array

Key = tuple[Configuration, int]

# Bootstrap draws for the standard error of a paired difference.
_DRAWS = 200

HEADER = ("batch", "lr", "radius", "alpha", "finished", "median", "lowest", "highest", "distance")
SELECTED = ("on validation", "median", "lowest", "highest", "retained")


_STATES = ("finished", "stopped", "diverged", "failed", "begun")


class Trial(Record):
    """One student of a sweep, and its state; a line of ``trials.jsonl``.

    ``run`` is the name of its folder. Score and distance on `select` are those of the kept update,
    or of the best update so far. ``criterion`` is the score; it is minus infinity for a trial that
    was lost.
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
        """The configuration and seed, which identify the trial in its sweep."""
        return self.configuration, self.seed

    @property
    def ended(self) -> bool:
        """Whether the trial is not to be run again; a failed trial is run again."""
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
    """The trials of one configuration, on `select`; None if no trial was evaluated."""

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
    """Every configuration on `select`, and the best configuration on the validation set."""

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
    """``trials.jsonl``: the states of the trials, each appended as it changes; the last counts."""

    def __init__(self, path: Path) -> None:
        states = [
            Trial.parse(line.encode(), f"{path}, line {number}")
            for number, line in enumerate(read_lines(path) if path.is_file() else [], start=1)
        ]
        self.path = path
        self.trials = {trial.key: trial for trial in states}
        write_text(path, "".join(f"{trial.model_dump_json()}\n" for trial in self.trials.values()))

    def add(self, trial: Trial) -> None:
        """Append the state of a trial."""
        self.trials[trial.key] = trial
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(f"{trial.model_dump_json()}\n")


def by_configuration(trials: Iterable[Trial]) -> list[ConfigurationResult]:
    """Return a summary of the trials of each configuration, the best configuration first.

    The best has the highest median criterion over its seeds. A stopped trial counts with the score
    that it had reached, a lost trial as the worst.
    """
    groups: dict[Configuration, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.configuration, []).append(trial)
    results = [_summary(configuration, group) for configuration, group in groups.items()]
    return sorted(results, key=lambda result: -result.criterion)


def _summary(configuration: Configuration, trials: Sequence[Trial]) -> ConfigurationResult:
    """Return the summary of the trials of one configuration."""
    scores = [trial.select_score for trial in trials if trial.select_score is not None]
    distances = [trial.select_distance for trial in trials if trial.select_distance is not None]
    return ConfigurationResult(
        configuration=configuration,
        trials=len(trials),
        finished=sum(trial.state == "finished" for trial in trials),
        criterion=float(np.median([trial.criterion for trial in trials])),
        select_score=Spread.of(scores) if scores else None,
        select_distance=float(np.median(distances)) if distances else None,
    )


def select(
    results: Sequence[ConfigurationResult],
    answers: Mapping[Configuration, Sequence[Array]],
    labels: Array,
    metrics: Sequence[Metric],
) -> ConfigurationResult:
    """Return the best configuration by the rule of :mod:`ad2kit.training.selection`.

    Candidates are the configurations whose median score over the seeds is within one standard error
    of the best (the error of the paired difference, from 200 bootstrap draws). The candidate
    nearest to the teacher is returned.

    Args:
        results: the results of the configurations, the best first.
        answers: for each configuration, the answers on ``select`` of its finished students. Of a
            configuration that was stopped early only the score is known; it is returned only if
            this score is the best.
        labels: labels of ``select``.
        metrics: the metrics whose mean is the score.
    """
    best = results[0]
    finished = [result for result in results if answers[result.configuration]]
    if best not in finished or best.select_distance is None:
        return best
    models = [model for result in finished for model in answers[result.configuration]]
    draws = paired_bootstrap(metrics, models, labels, _DRAWS, seed=0)
    ends = np.cumsum([len(answers[result.configuration]) for result in finished])
    medians = [np.median(part, axis=1) for part in np.split(draws, ends[:-1], axis=1)]
    errors = np.array([(median - medians[0]).std() for median in medians])
    flags = good_enough(np.array([result.criterion for result in finished]), errors)
    candidates = [result for result, good in zip(finished, flags, strict=True) if good]

    def distance(result: ConfigurationResult) -> float:
        return math.inf if result.select_distance is None else result.select_distance

    return min(candidates, key=distance)


def tables(
    report: SweepReport,
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Return the rows under ``HEADER`` and the rows under ``SELECTED``, as text."""
    configurations: list[tuple[str, ...]] = [
        (
            f"{result.configuration.batch_size}",
            f"{result.configuration.lr:.3g}",
            f"{result.configuration.radius:.3g}",
            f"{result.configuration.alpha:.3g}",
            f"{result.finished} of {result.trials}",
            *_numbers(result.select_score),
            "" if result.select_distance is None else f"{result.select_distance:.4g}",
        )
        for result in report.configurations
    ]
    return configurations, [
        *((name, f"{score:.4f}", "", "", "") for name, score in report.baselines.items()),
        ("teacher", f"{report.teacher_score:.4f}", "", "", ""),
        (str(report.selected), *_numbers(report.score), f"{report.retained:.2%}"),
    ]


def _numbers(spread: Spread | None) -> tuple[str, str, str]:
    """Return median, lowest and highest value as text, empty without a spread."""
    if spread is None:
        return "", "", ""
    return f"{spread.median:.4f}", f"{spread.lowest:.4f}", f"{spread.highest:.4f}"


def caption(report: SweepReport) -> str:
    """Return the caption of the tables, with a line for each lost trial."""
    origin = f"{report.select_rows} rows that were taken from the training data"
    if report.select_from == "validation":
        origin = "the validation rows, as in the paper, which flatters their scores"
    text = (
        f"{' and '.join(report.metrics)}. Configurations are compared on `select`, here {origin}: "
        "by the median of their score over the seeds; of those within one standard error of the "
        "best (of the paired difference, by bootstrap) the nearest to the teacher is taken: "
        f"{report.selected}. On {report.rows} validation rows the "
        f"median of its {len(report.students)} student(s) is {report.score.median:.4f}, and the "
        f"teacher's score {report.teacher_score:.4f}."
    )
    counts = {state: sum(trial.state == state for trial in report.trials) for state in _STATES}
    states = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    lines = [text, f"Trials: {states}."]
    lines += [
        f"Lost: {trial.configuration}, seed {trial.seed} ({trial.run}) {trial.state}: "
        f"{trial.message}"
        for trial in report.trials
        if trial.state in ("diverged", "failed")
    ]
    return "\n".join(lines)


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
    for result in report.configurations:
        point = result.configuration
        label = f"batch {point.batch_size}, radius {point.radius:.3g}, alpha {point.alpha:.3g}"
        if report.search == "optuna":
            label = f"batch {point.batch_size}"
        if result.select_score is not None:
            groups.setdefault(label, []).append((point.lr, result.select_score))
        if result.select_score is not None and point == report.selected:
            axes.plot(
                point.lr,
                result.select_score.median,
                "*",
                color="black",
                markersize=14,
                label="selected",
                zorder=3,
            )
    for label, points in sorted(groups.items()):
        points.sort(key=lambda pair: pair[0])
        medians = [spread.median for _, spread in points]
        distances = [
            [spread.median - spread.lowest for _, spread in points],
            [spread.highest - spread.median for _, spread in points],
        ]
        style = "o-" if report.search == "grid" else "o"
        rates = [lr for lr, _ in points]
        axes.errorbar(rates, medians, distances, fmt=style, capsize=3, label=label)
    axes.axhline(report.teacher_select_score, linestyle="--", color="gray", label="teacher")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"{' and '.join(report.metrics)} on select")
    axes.legend()
    with whole_file(path) as new:
        figure.savefig(new, format="svg", metadata={"Date": None})
