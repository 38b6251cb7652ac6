"""The part of Ray Tune that a sweep uses: where trials run, and which trials stop early.

The trainable is called with the ``trial`` of a config: the fields of a configuration, and a seed.
It reports ``progress``, the number of its parts that are done, and the fields of
:class:`ad2kit.campaigns.sweep.report.Trial` that it knows. At its end it returns these with a
``state``. An exception counts as the death of its worker.
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
from ad2kit.run.sweep_section import Configuration

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ad2kit.campaigns.sweep.report import Key, Ledger
    from ad2kit.run.sections import ComputeRecipe

logger = logging.getLogger(__name__)

# How many times a trial goes on after its worker died.
RESTARTS = 3
# ASHA continues one of so many trials at each of its decisions.
_REDUCTION = 3


def trial_resources(compute: ComputeRecipe) -> dict[str, float]:
    """Return the resources of one trial in the connected cluster: cores, and a GPU if it has one.

    Without ``compute.threads`` a trial takes all cores of a node, like any training; on a node with
    several GPUs it takes one GPU's share of the cores.

    Raises:
        UserError: no node has so many cores, or the recipe requires a GPU and no node has one.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    node = max(nodes, key=lambda resources: (resources.get("GPU", 0), resources.get("CPU", 0)))
    gpus = 0.0 if compute.device == "cpu" else node.get("GPU", 0.0)
    if compute.device == "cuda" and not gpus:
        raise UserError(
            "the recipe asks for device 'cuda', but no node of the Ray cluster has a GPU",
            hint="set compute.device=cpu, or see `ray status`",
        )
    cores = node.get("CPU", 0.0)
    trial_cores = compute.threads or max(1, int(cores // max(gpus, 1)))
    if trial_cores > cores:
        raise UserError(
            f"a trial takes {trial_cores} cores (compute.threads), but the largest node of the Ray "
            f"cluster has {cores:.0f}",
            hint=f"set compute.threads={max(1, int(cores))}",
        )
    return {"cpu": float(trial_cores), "gpu": min(gpus, 1.0)}


@dataclass(frozen=True)
class Tuning:
    """Runs trials on the connected cluster, and writes their states into the ledger.

    Args:
        trainable: runs one trial in a worker; see the docstring of the module.
        ledger: receives the states of the trials.
        run_name: returns the name of the run folder of a trial.
        resources: resources of one trial; see :func:`trial_resources`.
        parts: number of parts of one trial, which its ``progress`` counts.
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
        earlier: Sequence[Trial],
        trials: int,
        seed: int,
        *,
        early_stopping: bool,
    ) -> None:
        """Run trials of configurations that Optuna draws, given the results of earlier trials.

        Args:
            values: values of each field of a configuration; see
                :class:`ad2kit.run.sweep_section.SweepRecipe`.
            earlier: the trials whose results Optuna knows from the start.
            trials: number of configurations to draw.
            seed: seed of the draws, and of the trials.
            early_stopping: whether ASHA may stop trials.
        """
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = dict[str, Any](seed=seed)
        free = list[str]()  # fields with more than one value
        for name, choices in values.items():
            low = min(choices)
            high = max(choices)
            if low == high:
                space[name] = low
                continue
            free.append(name)
            if name == "batch_size":
                space[name] = tune.choice(list(choices))
            else:
                space[name] = tune.loguniform(low, high) if low else tune.uniform(low, high)
        points = [
            {f"trial/{name}": getattr(trial.configuration, name) for name in free}
            for trial in earlier
        ]
        # Another seed after a restart, or the first draws of the first start would come again.
        sampler = OptunaSearch(
            metric="criterion",
            mode="max",
            seed=seed + len(earlier),
            points_to_evaluate=points,
            evaluated_rewards=[trial.criterion for trial in earlier],
        )
        self._fit({"trial": space}, early_stopping, num_samples=trials, search_alg=sampler)

    def _fit(self, space: dict[str, Any], early_stopping: bool, **settings: Any) -> None:
        """Run the trials of a search space, with more settings of Tune."""
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

        # Tune's own files for a restart are not needed, because the ledger and the runs are kept.
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
    """Writes the states of trials into the ledger and the log."""

    def __init__(self, ledger: Ledger, run_name: Callable[[Key], str]) -> None:
        self.ledger = ledger
        self.run_name = run_name

    def on_trial_start(self, *, trial: Any, **_: Any) -> None:
        self.ledger.add(self._record(trial, {}))

    def on_trial_result(self, *, trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "state" not in result:
            _log(self._record(trial, result))

    def on_trial_recover(self, *, trial: Any, **_: Any) -> None:
        record = self._record(trial, {})
        logger.warning("%s: its worker died; it goes on from %s", _name(record), record.run)

    def on_trial_complete(self, *, trial: Any, **_: Any) -> None:
        self._end(self._record(trial, {"state": "stopped", **trial.last_result}))

    def on_trial_error(self, *, trial: Any, **_: Any) -> None:
        message = f"its worker died {RESTARTS + 1} times"
        self._end(self._record(trial, {"state": "failed", "message": message}))

    def _record(self, trial: Any, result: Mapping[str, Any]) -> Trial:
        """Return the record of one of Tune's trials with the fields of a result."""
        point = dict(trial.config["trial"])
        fields = {name: point[name] for name in Configuration.model_fields}
        configuration = Configuration(**fields)
        seed = point["seed"]
        run = self.run_name((configuration, seed))
        facts = {name: result[name] for name in Trial.model_fields if name in result}
        return Trial(configuration=configuration, seed=seed, run=run, **facts)

    def _end(self, record: Trial) -> None:
        """Write the final state of a trial into the ledger and the log."""
        self.ledger.add(record)
        _log(record)


def _log(record: Trial) -> None:
    """Log the state of a trial and its score in one line."""
    state = "" if record.state == "begun" else f" {record.state}"
    score = "" if record.select_score is None else f", select {record.select_score:.4f}"
    reason = f": {record.message}" if record.message else ""
    evaluation = f" evaluation {record.evaluations}"
    logger.info("%s:%s%s%s%s", _name(record), state, evaluation, score, reason)


def _name(record: Trial) -> str:
    """Return configuration and seed of a trial, as the log names it."""
    return f"{record.configuration}, seed {record.seed}"
