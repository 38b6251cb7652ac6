"""Ray Tune, as far as a sweep uses it: which trial runs where, and which stops early.

The trainable is called with the ``trial`` of a config: the fields of a configuration, and a seed.
It reports ``progress``, of as many parts as it has, and the fields of
:class:`ad2kit.campaigns.sweep.report.Trial` that it knows, and returns them with a ``state`` at its
end; what it raises counts as the death of its worker.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from ad2kit.campaigns.sweep.report import Trial
from ad2kit.run.errors import UserError
from ad2kit.run.sections import Configuration

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ad2kit.campaigns.sweep.report import Key, Ledger
    from ad2kit.run.sections import ComputeRecipe

logger = logging.getLogger(__name__)

# How often a trial goes on after its worker died.
RESTARTS = 3
_REDUCTION = 3


def trial_resources(compute: ComputeRecipe) -> dict[str, float]:
    """Return what one trial takes of the connected cluster: cores, and a GPU where there is one.

    Without ``compute.threads`` a trial takes all cores of a node, as training does anywhere else,
    or the cores' share of one of its GPUs.

    Raises:
        UserError: no node has so many cores, or no node a GPU that the recipe insists on.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    node = max(nodes, key=lambda each: (each.get("GPU", 0), each.get("CPU", 0)))
    gpus = 0.0 if compute.device == "cpu" else node.get("GPU", 0.0)
    if compute.device == "cuda" and not gpus:
        raise UserError(
            "the recipe asks for device 'cuda', but no node of the Ray cluster has a GPU",
            hint="set compute.device=cpu, or see `ray status`",
        )
    cores = node.get("CPU", 0.0)
    wanted = compute.threads or max(1, int(cores // max(gpus, 1)))
    if wanted > cores:
        raise UserError(
            f"a trial takes {wanted} cores (compute.threads), but the largest node of the Ray "
            f"cluster has {cores:.0f}",
            hint=f"set compute.threads={max(1, int(cores))}",
        )
    return {"cpu": float(wanted), "gpu": min(gpus, 1.0)}


@dataclass(frozen=True)
class Tuning:
    """Runs trials on the connected cluster and writes into the ledger how each stands.

    Args:
        trainable: runs one trial in a worker; see the module.
        ledger: takes the trials.
        run_name: returns the name of the run folder of a trial.
        resources: of one trial; see :func:`trial_resources`.
        parts: of one trial, which its ``progress`` counts.
    """

    trainable: Callable[[dict[str, Any]], dict[str, Any]]
    ledger: Ledger
    run_name: Callable[[Key], str]
    resources: dict[str, float]
    parts: int

    def train(self, keys: Sequence[Key], *, early_stopping: bool) -> None:
        """Run some trials to their ends."""
        points = [{**configuration.model_dump(), "seed": seed} for configuration, seed in keys]
        self._fit({"trial": tune.grid_search(points)}, early_stopping)

    def search(
        self,
        values: Mapping[str, Sequence[float]],
        told: Sequence[Trial],
        trials: int,
        seed: int,
        *,
        early_stopping: bool,
    ) -> None:
        """Run trials of configurations that Optuna draws, given those that it was told of.

        Args:
            values: of each field of a configuration; see :class:`ad2kit.run.sections.SweepRecipe`.
            told: earlier trials.
            trials: how many to draw.
            seed: of the draws, and of the trials.
            early_stopping: whether ASHA may stop some.
        """
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space, free = dict[str, Any](seed=seed), list[str]()
        for name, choices in values.items():
            low, high = min(choices), max(choices)
            if low == high:
                space[name] = low
                continue
            free.append(name)
            if name == "batch_size":
                space[name] = tune.choice(list(choices))
            else:
                space[name] = tune.loguniform(low, high) if low else tune.uniform(low, high)
        points = [
            {f"trial/{name}": getattr(trial.configuration, name) for name in free} for trial in told
        ]
        # Another seed after a restart, or the first draws would be those of the first start.
        sampler = OptunaSearch(
            metric="criterion",
            mode="max",
            seed=seed + len(told),
            points_to_evaluate=points,
            evaluated_rewards=[trial.criterion for trial in told],
        )
        self._fit({"trial": space}, early_stopping, num_samples=trials, search_alg=sampler)

    def _fit(self, space: dict[str, Any], early_stopping: bool, **settings: Any) -> None:
        if early_stopping and self.parts > 1:
            settings["scheduler"] = ASHAScheduler(
                time_attr="progress",
                metric="criterion",
                mode="max",
                max_t=self.parts,
                reduction_factor=_REDUCTION,
                stop_last_trials=False,
            )
        trainable = self.trainable

        def unpacked(config: dict[str, Any]) -> dict[str, Any]:
            return trainable(config["trial"])

        # What Tune writes for a restart of its own is not needed: the ledger and the runs are.
        with tempfile.TemporaryDirectory(prefix="ad2kit-sweep-") as scratch:
            tune.Tuner(
                tune.with_resources(unpacked, self.resources),
                param_space=space,
                tune_config=tune.TuneConfig(**settings),
                run_config=tune.RunConfig(
                    storage_path=scratch,
                    verbose=0,
                    callbacks=[_Watch(self.ledger, self.run_name)],
                    failure_config=tune.FailureConfig(max_failures=RESTARTS),
                ),
            ).fit()


class _Watch(tune.Callback):
    """Writes the ledger, and says what happens."""

    def __init__(self, ledger: Ledger, run_name: Callable[[Key], str]) -> None:
        self.ledger, self.run_name = ledger, run_name

    def on_trial_start(self, *, trial: Any, **_: Any) -> None:
        self.ledger.add(self._record(trial, {}))

    def on_trial_result(self, *, trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "state" not in result:
            _say(self._record(trial, result))

    def on_trial_recover(self, *, trial: Any, **_: Any) -> None:
        record = self._record(trial, {})
        logger.warning("%s: its worker died; it goes on from %s", _name(record), record.run)

    def on_trial_complete(self, *, trial: Any, **_: Any) -> None:
        self._end(self._record(trial, {"state": "stopped", **trial.last_result}))

    def on_trial_error(self, *, trial: Any, **_: Any) -> None:
        message = f"its worker died {RESTARTS + 1} times"
        self._end(self._record(trial, {"state": "failed", "message": message}))

    def _record(self, trial: Any, result: Mapping[str, Any]) -> Trial:
        point = dict(trial.config["trial"])
        key = (
            Configuration(**{name: point[name] for name in Configuration.model_fields}),
            point["seed"],
        )
        known = {name: result[name] for name in Trial.model_fields if name in result}
        return Trial(configuration=key[0], seed=key[1], run=self.run_name(key), **known)

    def _end(self, record: Trial) -> None:
        self.ledger.add(record)
        _say(record)


def _say(record: Trial) -> None:
    state = "" if record.state == "begun" else f" {record.state}"
    score = "" if record.select_score is None else f", select {record.select_score:.4f}"
    why = f": {record.message}" if record.message else ""
    at = f" evaluation {record.evaluations}"
    logger.info("%s:%s%s%s%s", _name(record), state, at, score, why)


def _name(record: Trial) -> str:
    return f"{record.configuration}, seed {record.seed}"
