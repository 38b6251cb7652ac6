"""Plots as inline SVG; text and axes take the colour of the page around them."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ad2kit.statistics.metrics import Bin
    from ad2kit.training.records import Selection, StepRecord

# Colour-blind readers can tell these apart, on black and on white (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def latency(points: Mapping[str, tuple[float, float]], score: str) -> str:
    """Return a plot of the score of each model against its latency.

    Args:
        points: the p50 latency in ms and the score of each model, by its name.
        score: the name of the score.
    """

    def draw(axes: Any) -> None:
        # Names stand above and below their points in turn, so that neighbours do not overlap.
        ordered_points = sorted(points.items(), key=lambda item: item[1])
        for index, (colour, (name, (ms, value))) in enumerate(
            zip(_colours(len(points)), ordered_points, strict=True)
        ):
            axes.plot(ms, value, "o", color=colour)
            axes.annotate(
                name,
                (ms, value),
                xytext=(0, 8 if index % 2 else -16),
                ha="center",
                textcoords="offset points",
                color=colour,
            )
        axes.set_xscale("log")
        # Only 1, 2 and 5 times a power of ten get a number; minor ticks with numbers would overlap.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(0.2)
        axes.set_xlabel("p50 latency of one text, ms")
        axes.set_ylabel(score)

    return _svg("latency", draw, f"{score} of each model against its latency")


def training(records: Sequence[StepRecord]) -> str:
    """Return a plot of the loss terms and of the adversary's gain over the updates."""

    def draw(axes: Any) -> None:
        steps = [record.step for record in records]
        names = sorted({name for record in records for name in record.terms})
        for colour, name in zip(_colours(len(names)), names, strict=True):
            values = [record.terms.get(name, np.nan) for record in records]
            axes.plot(steps, _smooth(values), color=colour, label=name)
        if any(record.adversarial_gain is not None for record in records):
            gains = [
                (r.step, r.adversarial_gain) for r in records if r.adversarial_gain is not None
            ]
            axes.plot(*zip(*gains, strict=True), ".:", color="#888888", label="adversarial gain")
        axes.set_yscale("symlog", linthresh=1e-4)
        axes.set_xlabel("update")
        axes.set_ylabel("loss terms, running median")
        axes.legend()

    return _svg("training", draw, "loss terms over the updates")


def selection(record: Selection | None, score: str) -> str:
    """Return a plot of the score on `select`, and of the distance from the teacher.

    Args:
        record: the evaluations and the kept step; None if nothing was trained.
        score: the name of the score.
    """
    points = record.points if record else ()

    def draw(axes: Any) -> None:
        steps = [point.step for point in points]
        axes.plot(steps, [point.score for point in points], "o-", color=COLOURS[0])
        axes.set_ylabel(score, color=COLOURS[0])
        if record:
            axes.axvline(record.kept_step, linestyle=":", color="#888888", label="kept")
            axes.legend()
        if all(point.distance is not None for point in points):
            distance_axes = axes.twinx()
            distance_axes.plot(steps, [point.distance for point in points], "s--", color=COLOURS[1])
            distance_axes.set_ylabel("distance from the teacher", color=COLOURS[1])
        axes.set_xlabel("update")

    return _svg("selection", draw, f"{score} and distance from the teacher on select")


def calibration(models: Mapping[str, Sequence[Bin]]) -> str:
    """Return a reliability diagram of each model; a calibrated model lies on the diagonal."""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], "--", color="#888888", label="calibrated")
        for colour, (name, bins) in zip(_colours(len(models)), models.items(), strict=True):
            axes.plot(
                [b.confidence for b in bins],
                [b.accuracy for b in bins],
                "o-",
                color=colour,
                label=name,
                markersize=4,
            )
        axes.set_xlim(min(b.confidence for bins in models.values() for b in bins) - 0.05, 1.0)
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")
        axes.legend()

    return _svg("calibration", draw, "accuracy against confidence")


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _smooth(values: Sequence[float], window: int = 21) -> Any:
    """Return the running median, because a single outlier does not move it."""
    array = np.asarray(values, dtype=float)
    if len(array) <= window:
        return array
    padded = np.pad(array, window // 2, mode="edge")
    return np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)


def _svg(name: str, draw: Callable[[Any], None], description: str) -> str:
    """Return a figure as an <svg> element without a size; the page sets the size."""
    # The salt makes the ids of two figures on one page differ, and the same in each run.
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 11,
        "font.family": "sans-serif",
    }
    with rc_context(style):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        draw(axes)
        # A second y axis needs the spine on the right.
        hidden_spines = ["top"] if len(figure.axes) > 1 else ["top", "right"]
        for drawn_axes in figure.axes:
            drawn_axes.spines[hidden_spines].set_visible(False)
            legend = drawn_axes.get_legend()
            if legend is not None:
                legend.get_frame().set_alpha(0)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    head, _, body = text.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    text = f'{head} role="img" aria-label="{description}">{body}'
    return text.replace("#000000", "currentColor").replace("black", "currentColor")
