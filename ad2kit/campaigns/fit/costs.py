"""What systems cost on this machine: measured once, side by side, and kept."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ad2kit.campaigns.fit.records import Cost, Measurements
from ad2kit.gate.records import BUSY_SPREAD
from ad2kit.run.files import fingerprint, write_record
from ad2kit.run.machine import available_cpus, environment
from ad2kit.training.shared import writing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ad2kit.campaigns.fit.records import Target
    from ad2kit.run.recipe import Recipe

logger = logging.getLogger(__name__)

# How often systems are measured while others use the machine.
_TRIES = 3

Call = Callable[["NDArray[np.int64]"], object]
System = tuple[Call, int]
"""A forward pass from token ids [texts, tokens], and the bytes of its model."""


class Stopwatch:
    """Measures systems beside each other, and remembers what it has measured.

    Args:
        recipe: threads, seed, and the seconds for a system.
        target: the number of texts and their length.
        file: of the measurements, in the store of what runs share.
        clock: times calls, see :func:`ad2kit.gate.latency.time_rounds`.
        vocabulary: number of token ids to draw from.
    """

    def __init__(
        self,
        recipe: Recipe,
        target: Target,
        file: Path,
        clock: Callable[[dict[str, Call], NDArray[np.int64], float], dict[str, list[list[float]]]],
        vocabulary: int,
    ) -> None:
        self.threads = recipe.compute.threads or available_cpus()
        self.surroundings = environment(self.threads)
        self._seconds, self._clock, self._file = recipe.bench.seconds_per_cell, clock, file
        self._ids = np.random.default_rng(recipe.seed).integers(
            vocabulary, size=(target.batch_size, target.length_tokens), dtype=np.int64
        )
        self._known = self._read()
        self._conditions = [
            self.surroundings,
            self._ids.shape,
            self._seconds,
            recipe.export.provider,
        ]

    def measure(
        self, what: Any, make: Callable[[], dict[str, System]], baselines: Sequence[str] = ()
    ) -> tuple[Cost, ...]:
        """Return what each of some systems costs, as it was measured the first time.

        A measurement on a busy machine is tried again, and the calmest one counts. It is kept even
        if it is not calm, so that a search that goes on decides as before; reports say so.

        Args:
            what: plain data that identifies the systems.
            make: returns the systems by name, if they have to be measured.
            baselines: the fastest of these has the speed 1; of all if empty.
        """
        key = fingerprint(what, list(baselines), self._conditions)
        if key not in self._known:
            systems = make()
            calls = {name: call for name, (call, _) in systems.items()}
            sizes = {name: size for name, (_, size) in systems.items()}
            tries = list[tuple[Cost, ...]]()
            while len(tries) < _TRIES and not any(map(calm, tries)):
                tries.append(costs(self._clock(calls, self._ids, self._seconds), sizes, baselines))
            best = min(tries, key=lambda found: max(cost.spread for cost in found))
            if not calm(best):
                logger.warning(
                    "others use this machine: what was measured may be wrong; delete %s to measure "
                    "again when it is idle",
                    self._file,
                )
            self._keep(key, best)
        return self._known[key]

    def _keep(self, key: str, found: tuple[Cost, ...]) -> None:
        with writing(self._file.parent):
            # What it has measured first counts for both.
            self._known = {key: found, **self._read()}
            write_record(self._file, Measurements(costs=self._known))

    def _read(self) -> dict[str, tuple[Cost, ...]]:
        return Measurements.read(self._file).costs if self._file.is_file() else {}


def costs(
    seconds: dict[str, list[list[float]]], sizes: dict[str, int], baselines: Sequence[str] = ()
) -> tuple[Cost, ...]:
    """Return what systems cost; ratios are taken round by round, in which they took turns.

    Args:
        seconds: of each call of each system, round by round.
        sizes: of the models in bytes.
        baselines: the fastest of these has the speed 1; of all if empty.
    """
    medians = {name: np.array([np.median(r) for r in rounds]) for name, rounds in seconds.items()}
    fastest = min(baselines or medians, key=lambda name: float(np.median(medians[name])))
    found = []
    for name, rounds in seconds.items():
        ratios = medians[fastest] / medians[name]
        p50, p99 = np.percentile(1e3 * np.concatenate(rounds), [50, 99]).tolist()
        found.append(
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
    return tuple(found)


def calm(found: tuple[Cost, ...]) -> bool:
    """Tell whether the rounds of each system are alike, so that nobody else used the machine."""
    return all(cost.spread <= BUSY_SPREAD for cost in found)
