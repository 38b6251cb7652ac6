"""Plots as inline SVG: text and axes take the colour of the page that they stand in."""

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

    from ad2kit.data.metrics import Bin
    from ad2kit.training.records import Selection, StepRecord

# Told apart by those who see no red or green, and on black as on white (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def latency(points: Mapping[str, tuple[float, float]], score: str) -> str:
    """Draw (p50 in ms, score) of each model."""

    def draw(axes: Any) -> None:
        # Names of neighbours stand above and below their points, so that they do not overlap.
        in_order = sorted(points.items(), key=lambda item: item[1])
        for place, (colour, (name, (ms, value))) in enumerate(
            zip(_colours(len(points)), in_order, strict=True)
        ):
            axes.plot(ms, value, "o", color=colour)
            axes.annotate(
                name,
                (ms, value),
                xytext=(0, 8 if place % 2 else -16),
                ha="center",
                textcoords="offset points",
                color=colour,
            )
        axes.set_xscale("log")
        # Without numbers of their own between the powers of ten, which would overlap.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(0.2)
        axes.set_xlabel("p50 latency of one text, ms")
        axes.set_ylabel(score)

    return _svg("latency", draw, f"{score} of each model against its latency")


def training(records: Sequence[StepRecord]) -> str:
    """Draw the loss terms and the adversary's gain over the updates, and what `select` said."""

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


def selection(found: Selection | None, score: str) -> str:
    """Draw the score on `select`, and the distance from the teacher, at each evaluation."""
    points = found.points if found else ()

    def draw(axes: Any) -> None:
        steps = [point.step for point in points]
        axes.plot(steps, [point.score for point in points], "o-", color=COLOURS[0])
        axes.set_ylabel(score, color=COLOURS[0])
        if found:
            axes.axvline(found.kept_step, linestyle=":", color="#888888", label="kept")
            axes.legend()
        if all(point.distance is not None for point in points):
            other = axes.twinx()
            other.plot(steps, [point.distance for point in points], "s--", color=COLOURS[1])
            other.set_ylabel("distance from the teacher", color=COLOURS[1])
        axes.set_xlabel("update")

    return _svg("selection", draw, f"{score} and distance from the teacher on select")


def calibration(models: Mapping[str, Sequence[Bin]]) -> str:
    """Draw accuracy against confidence; a calibrated model lies on the diagonal."""

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
    """Return the running median, which a single odd batch does not move."""
    array, half = np.asarray(values, dtype=float), window // 2
    if len(array) <= window:
        return array
    padded = np.pad(array, half, mode="edge")
    return np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)


def _svg(name: str, draw: Callable[[Any], None], description: str) -> str:
    """Return a figure as an <svg> element without size, which its page gives it."""
    # The salt keeps the ids of two figures on one page apart, and the same from run to run.
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
        for each in figure.axes:
            # A second axis stands on the right.
            each.spines[["top"] if len(figure.axes) > 1 else ["top", "right"]].set_visible(False)
            if (legend := each.get_legend()) is not None:
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
