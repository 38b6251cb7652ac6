"""The same work by Ray Data, on this machine or on a cluster.

Ray hands out the blocks, starts the actors, and gives the blocks of one that died to another. On a
cluster every machine has ad2kit installed, and reads input, output and artefact at one address.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from typing import TYPE_CHECKING, Any

from ad2kit.blocks import Block
from ad2kit.cluster import ray_cluster
from ad2kit.errors import MissingExtra, UserError
from ad2kit.scoring import Done, Scorer
from ad2kit.workers import single_threaded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ad2kit.scoring import Work
    from ad2kit.workers import Numbered

# One block under way and one that waits: no worker idles, and none hoards the last ones.
_BLOCKS_IN_FLIGHT = 2


class RayScorer:
    """A :class:`~ad2kit.scoring.Scorer` that takes and gives rows of a Ray data set."""

    def __init__(self, work: Work) -> None:
        single_threaded()
        self.work = work
        # Not yet loaded: Ray would start an actor that fails here again and again.
        self.scorer: Scorer | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score the block that a row names."""
        self.scorer = self.scorer or Scorer(self.work)
        block = Block(**{field.name: row[field.name] for field in dataclasses.fields(Block)})
        return dataclasses.asdict(self.scorer(row["index"], block))


def score_on_ray(
    work: Work, blocks: list[Numbered], workers: int, address: str | None
) -> Iterator[Done]:
    """Score blocks by actors with one core each, in no order.

    Raises:
        UserError: there is no cluster at the address, or it has too few cores.
        MissingExtra: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtra("ray", extra="scale")
    with ray_cluster(address):
        # Only now: Ray reads its settings from the environment when it is imported.
        import ray
        from ray import data

        cores = int(ray.cluster_resources().get("CPU", 0))
        if workers > cores:
            raise UserError(
                f"expected a core for each of {workers} workers, found {cores} in the cluster",
                hint=f"give --workers {cores} or fewer, or a larger cluster",
            )
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.raise_original_map_exception = True
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised, and told once
        rows = [{"index": index, **dataclasses.asdict(block)} for index, block in blocks]
        pool = data.ActorPoolStrategy(
            size=min(workers, len(rows)), max_tasks_in_flight_per_actor=_BLOCKS_IN_FLIGHT
        )
        scored = data.from_items(rows, override_num_blocks=len(rows)).map(
            RayScorer, fn_constructor_args=(work,), compute=pool, num_cpus=1
        )
        try:
            for row in scored.iter_rows():
                yield Done(**row)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
