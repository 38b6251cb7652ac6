"""What systems cost on this machine: measured once, side by side, and kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ad2kit.files import fingerprint, write_record
from ad2kit.fit_records import Cost, Measurements
from ad2kit.runtime import available_cpus, environment
from ad2kit.store import writing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ad2kit.fit_records import Target
    from ad2kit.recipe import Recipe

Call = Callable[["NDArray[np.int64]"], object]
System = tuple[Call, int]
"""A forward pass from token ids [texts, tokens], and the bytes of its model."""


class Stopwatch:
    """Measures systems beside each other, and remembers what it has measured.

    Args:
        recipe: threads, seed, and the seconds for a system.
        target: the number of texts and their length.
        file: of the measurements, in the store of what runs share.
        clock: times calls, see :func:`ad2kit.bench.measure`.
        vocabulary: number of token ids to draw from.
    """

    def __init__(
        self, recipe: Recipe, target: Target, file: Path,
        clock: Callable[[dict[str, Call], NDArray[np.int64], float], dict[str, list[list[float]]]],
        vocabulary: int,
    ) -> None:  # fmt: skip
        self.threads = recipe.compute.threads or available_cpus()
        self.surroundings = environment(self.threads)
        self._seconds, self._clock, self._file = recipe.bench.seconds_per_cell, clock, file
        self._ids = np.random.default_rng(recipe.seed).integers(
            vocabulary, size=(target.batch_size, target.length_tokens), dtype=np.int64
        )
        self._known = self._read()
        self._conditions = [self.surroundings, self._ids.shape, self._seconds,
                            recipe.export.provider]  # fmt: skip

    def measure(
        self, what: Any, make: Callable[[], dict[str, System]], baselines: Sequence[str] = ()
    ) -> tuple[Cost, ...]:
        """Return what each of some systems costs, as it was measured the first time.

        Args:
            what: plain data that identifies the systems.
            make: returns the systems by name, if they have to be measured.
            baselines: the fastest of these has the speed 1; of all if empty.
        """
        key = fingerprint(what, list(baselines), self._conditions)
        if key not in self._known:
            systems = make()
            calls = {name: call for name, (call, _) in systems.items()}
            seconds = self._clock(calls, self._ids, self._seconds)
            ms = {
                name: tuple(np.percentile(np.concatenate(rounds) * 1e3, [50, 99]).tolist())
                for name, rounds in seconds.items()
            }
            fastest = min(ms[name][0] for name in baselines or systems)
            costs = tuple(
                Cost(
                    variant=name, size_bytes=size, p50_ms=ms[name][0], p99_ms=ms[name][1],
                    calls=sum(map(len, seconds[name])), speedup=fastest / ms[name][0],
                )
                for name, (_, size) in systems.items()
            )  # fmt: skip
            with writing(self._file.parent):
                # Another process may have measured something meanwhile.
                self._known = {**self._read(), key: costs}
                write_record(self._file, Measurements(costs=self._known))
        return self._known[key]

    def _read(self) -> dict[str, tuple[Cost, ...]]:
        return Measurements.read(self._file).costs if self._file.is_file() else {}
