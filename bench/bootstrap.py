"""Would scipy's resampling serve in place of `ad2kit/statistics/metrics.py`?

    python bench/bootstrap.py --rows 5500 --classes 151

It prints the interval of *retained* (student over teacher) by 2,000 draws, and the p-value of
2,000 random swaps: by ad2kit and by scipy, of the same answers, with the ratio of their CPU times.
Ours is a percentile interval. `scipy.stats.bootstrap` is asked for the same, and for BCa.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from ad2kit.statistics.metrics import (
    mean_metric,
    paired_bootstrap,
    randomisation_p,
    retained_interval,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ad2kit.run.sections import Metric

DRAWS = 2_000


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a call returns, and its CPU seconds."""
    start = time.process_time()
    value = call()
    return value, time.process_time() - start


def main() -> None:
    """Print a line for each metric and method, and a last line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=5_500)
    parser.add_argument("--classes", type=int, default=151)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    labels = generator.integers(options.classes, size=options.rows)

    def noisy(answers: np.ndarray[Any, Any], kept: float) -> np.ndarray[Any, Any]:
        other = generator.integers(options.classes, size=options.rows)
        return np.where(generator.random(options.rows) < kept, answers, other)

    teacher = noisy(labels, 0.9)
    student = noisy(teacher, 0.97)
    lines = []
    metrics: tuple[Metric, ...] = ("accuracy", "macro_f1")
    for metric in metrics:
        lines += intervals(metric, student, teacher, labels)
    lines.append(swaps(student, teacher, labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same = stats.bootstrap(
            (np.arange(200),), lambda rows: 0 * len(rows), method="BCa", vectorized=False
        )
    lines.append({"of": "identical answers, BCa", "scipy": list(same.confidence_interval)})
    for line in lines:
        print(line, flush=True)
    print(json.dumps({**vars(options), "lines": lines}))


def intervals(
    metric: Metric,
    student: np.ndarray[Any, Any],
    teacher: np.ndarray[Any, Any],
    labels: np.ndarray[Any, Any],
) -> list[dict[str, Any]]:
    """Return the interval of *retained* by ours and by scipy's methods."""

    def retained(rows: np.ndarray[Any, Any]) -> float:
        scores = [mean_metric([metric], one[rows], labels[rows]) for one in (student, teacher)]
        return scores[0] / scores[1]

    ours, our_s = timed(
        lambda: retained_interval(paired_bootstrap([metric], [student, teacher], labels, DRAWS, 0))
    )
    lines = []
    for method in ("percentile", "BCa"):
        bootstrap = partial(
            stats.bootstrap,
            (np.arange(len(labels)),),
            retained,
            n_resamples=DRAWS,
            vectorized=False,
            method=method,
            rng=np.random.default_rng(0),
        )
        theirs, their_s = timed(bootstrap)
        lines.append(
            {
                "of": f"{metric}, {method}",
                "ours": np.round(ours, 4).tolist(),
                "scipy": np.round(theirs.confidence_interval, 4).tolist(),
                "scipy over ours, CPU time": round(their_s / our_s, 2),
            }
        )
    return lines


def swaps(
    student: np.ndarray[Any, Any], teacher: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]
) -> dict[str, Any]:
    """Return the p-value of a difference in accuracy by ours and by scipy."""
    ours, our_s = timed(
        lambda: randomisation_p(["accuracy"], [student], [teacher], labels, DRAWS, 0)
    )
    right = [(answers == labels).astype(float) for answers in (student, teacher)]
    theirs, their_s = timed(
        lambda: stats.permutation_test(
            right,
            lambda a, b, axis: np.mean(a, axis=axis) - np.mean(b, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=DRAWS,
            rng=np.random.default_rng(0),
        )
    )
    return {
        "of": "p of a difference in accuracy",
        "ours": round(ours, 4),
        "scipy": round(float(theirs.pvalue), 4),
        "scipy over ours, CPU time": round(their_s / our_s, 2),
    }


if __name__ == "__main__":
    main()
