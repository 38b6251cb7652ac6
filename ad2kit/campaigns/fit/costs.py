"""The costs of systems on this machine: measured once, in turns, and kept."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ad2kit.campaigns.fit.records import Cost, Measurements
from ad2kit.gate.latency import time_rounds
from ad2kit.gate.records import BUSY_SPREAD
from ad2kit.run.files import fingerprint, write_record, writing
from ad2kit.run.machine import available_cpus, environment

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ad2kit.campaigns.fit.records import Target
    from ad2kit.run.recipe import Recipe

logger = logging.getLogger(__name__)

# How many times systems are measured if other programs use the machine.
_TRIES = 3

Call = Callable[["NDArray[np.int64]"], object]
System = tuple[Call, int]
"""A forward pass from token ids [texts, tokens], and the bytes of its model."""


class Stopwatch:
    """Measures systems in turns, and keeps the measurements in a file.

    Args:
        recipe: gives threads, seed, and the seconds for a system.
        target: gives the number of texts and their length.
        file: the file of the measurements, in the folder that runs share.
        vocabulary: number of token ids to draw from.
        clock: times calls.
    """

    def __init__(
        self,
        recipe: Recipe,
        target: Target,
        file: Path,
        vocabulary: int,
        *,
        clock: Callable[
            [dict[str, Call], NDArray[np.int64], float], dict[str, list[list[float]]]
        ] = time_rounds,
    ) -> None:
        self.threads = recipe.compute.threads or available_cpus()
        self.surroundings = environment(self.threads)
        self._seconds = recipe.bench.seconds_per_cell
        self._clock = clock
        self._file = file
        self._ids = np.random.default_rng(recipe.seed).integers(
            vocabulary, size=(target.batch_size, target.length_tokens), dtype=np.int64
        )
        self._costs = self._read()
        self._conditions = [
            self.surroundings,
            self._ids.shape,
            self._seconds,
            recipe.export.provider,
        ]

    def measure(
        self, what: Any, make: Callable[[], dict[str, System]], baselines: Sequence[str] = ()
    ) -> tuple[Cost, ...]:
        """Return the cost of each of some systems, from their first measurement.

        A measurement on a busy machine is tried again, and the calmest one counts. It is kept even
        if it is not calm, so that a search that goes on decides as before; reports mention it.

        Args:
            what: plain data that identifies the systems.
            make: returns the systems by name; called only if they have to be measured.
            baselines: names of systems, the fastest of which has the speed 1; all if empty.
        """
        key = fingerprint(what, list(baselines), self._conditions)
        if key not in self._costs:
            systems = make()
            calls = {name: call for name, (call, _) in systems.items()}
            sizes = {name: size for name, (_, size) in systems.items()}
            tries = list[tuple[Cost, ...]]()
            while len(tries) < _TRIES and not any(map(calm, tries)):
                tries.append(costs(self._clock(calls, self._ids, self._seconds), sizes, baselines))
            calmest = min(tries, key=lambda trial: max(cost.spread for cost in trial))
            if not calm(calmest):
                logger.warning(
                    "others use this machine: what was measured may be wrong; delete %s to measure "
                    "again when it is idle",
                    self._file,
                )
            self._keep(key, calmest)
        return self._costs[key]

    def _keep(self, key: str, measured: tuple[Cost, ...]) -> None:
        """Add a measurement to the file, unless another process has added it meanwhile."""
        with writing(self._file.parent):
            # The measurement that is in the file first counts for both processes.
            self._costs = {key: measured, **self._read()}
            write_record(self._file, Measurements(costs=self._costs))

    def _read(self) -> dict[str, tuple[Cost, ...]]:
        """Return the measurements in the file."""
        return Measurements.read(self._file).costs if self._file.is_file() else {}


def costs(
    seconds: dict[str, list[list[float]]], sizes: dict[str, int], baselines: Sequence[str] = ()
) -> tuple[Cost, ...]:
    """Return the costs of systems that took turns; speeds are ratios within the same round.

    Args:
        seconds: times of the calls of each system, by round.
        sizes: sizes of the models in bytes.
        baselines: names of systems, the fastest of which has the speed 1; all if empty.
    """
    medians = {
        name: np.array([np.median(calls) for calls in rounds]) for name, rounds in seconds.items()
    }
    fastest = min(baselines or medians, key=lambda name: float(np.median(medians[name])))
    system_costs = []
    for name, rounds in seconds.items():
        ratios = medians[fastest] / medians[name]
        p50, p99 = np.percentile(1e3 * np.concatenate(rounds), [50, 99]).tolist()
        system_costs.append(
            Cost(
                variant=name,
                size_bytes=sizes[name],
                p50_ms=p50,
                p99_ms=p99,
                calls=sum(map(len, rounds)),
                speedup=float(np.median(ratios)),
                speedup_range=(float(ratios.min()), float(ratios.max())),
                spread=float(medians[name].max() / medians[name].min()),
            )
        )
    return tuple(system_costs)


def calm(measured: tuple[Cost, ...]) -> bool:
    """Tell whether the rounds of each system are alike, so that no other program was busy."""
    return all(cost.spread <= BUSY_SPREAD for cost in measured)
