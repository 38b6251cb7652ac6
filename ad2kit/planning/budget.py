"""`--max-minutes`: how much can be trained in a given time, decided before the first update.

Some updates of teacher and student are timed; where the recipe asks for more than fits, it gets
fewer epochs, and with one epoch each fewer rows. The plan is kept, so that the same command finds
it again and the clock decides nothing later: what is trained depends on the planned recipe alone,
and is never cut.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ad2kit.data import splits
from ad2kit.models.text_model import predict_logits
from ad2kit.run.errors import RecipeError, RunError, UserError
from ad2kit.run.files import fingerprint, write_record
from ad2kit.run.machine import accelerator, available_cpus, environment, processes
from ad2kit.run.recipe import from_data
from ad2kit.run.sections import PlanRecipe
from ad2kit.training import shared
from ad2kit.training.ad2 import distillation, finetuning
from ad2kit.training.checkpoint import Evaluation
from ad2kit.training.distill import before_training, open_models, with_rate
from ad2kit.training.loop import new_state, prepare, train
from ad2kit.training.losses import comparison
from ad2kit.training.schedule import Schedule

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.data.splits import Data
    from ad2kit.run.recipe import Recipe
    from ad2kit.run.sections import TrainRecipe

logger = logging.getLogger(__name__)

# Updates that are timed, after one that warms up.
_TIMED = 5


@dataclass(frozen=True)
class Costs:
    """Seconds of an update of each model that is trained, and of a text that the teacher reads."""

    seconds_per_update: dict[str, float]
    read_seconds: float


def planned(recipe: Recipe, max_minutes: float, runs_dir: Path) -> Recipe:
    """Return a recipe whose trainings take at most ``max_minutes`` on this machine.

    The minutes are those of updates and evaluations of teacher and student, and of the teacher's
    reading of the training texts; what comes after the distillation is not in them.

    Args:
        recipe: as it was asked for.
        max_minutes: for both trainings together.
        runs_dir: where the plan is kept.

    Raises:
        RecipeError: not even one epoch of a batch fits.
        RunError: the plan that lies there is damaged.
        UserError: several processes, each of which would time something else; or what
            :func:`ad2kit.training.distill.open_models` refuses.
    """
    if not (max_minutes > 0 and math.isfinite(max_minutes)):
        raise UserError(
            f"expected minutes above 0 for --max-minutes, found {max_minutes:g}",
            hint="for example: --max-minutes 30",
        )
    if processes() > 1:
        raise UserError(
            "--max-minutes takes one process: it times updates, and all have to follow one plan",
            hint="plan without `accelerate launch`, stop, and give the epochs of its recipe.json",
        )
    data = splits.load_data(recipe.data, recipe.seed)
    key = fingerprint(
        recipe.model_dump(mode="json"),
        max_minutes,
        data.train.sha256(),
        data.unlabelled.sha256(),
        environment(recipe.compute.threads or available_cpus()),
    )
    path = shared.plan_file(runs_dir / ".shared", key)
    if path.is_file():
        found = _read(path)
    else:
        found = fitted(recipe, data, measured_costs(recipe, data), max_minutes)
        with shared.writing(runs_dir / ".shared"):
            path.parent.mkdir(exist_ok=True)
            write_record(path, found)
    logger.info("%s", plan_words(recipe, found))
    return found


def _read(path: Path) -> Recipe:
    try:
        return from_data(json.loads(path.read_text(encoding="utf-8")), where=str(path))
    except (ValueError, RecipeError) as error:
        raise RunError(
            f"{path} is damaged: {error}", hint=f"delete {path}: a new plan is made"
        ) from error


def plan_words(asked: Recipe, found: Recipe) -> str:
    """Return the plan in words, with what it has changed."""
    plan = found.plan
    if plan is None:
        raise ValueError("expected a recipe with a plan")
    updates = " and ".join(
        f"{count:,} updates of the {name} at {plan.seconds_per_update[name]:.3f} s"
        for name, count in plan.updates.items()
    )
    text = f"plan: {plan.rows:,} rows, {updates}: {plan.minutes:.1f} of {plan.max_minutes:g} min"
    changes = []
    if asked.teacher.finetune and found.teacher.finetune:
        before, after = asked.teacher.finetune.epochs, found.teacher.finetune.epochs
        changes += [f"teacher.finetune.epochs {before} to {after}"] * (before != after)
    if asked.distill.epochs != found.distill.epochs:
        changes.append(f"distill.epochs {asked.distill.epochs} to {found.distill.epochs}")
    if asked.data.max_train_rows != found.data.max_train_rows:
        changes.append(f"data.max_train_rows to {found.data.max_train_rows}")
    return f"{text}; {', '.join(changes) or 'the recipe fits as it is'}"


def fitted(recipe: Recipe, data: Data, costs: Costs, max_minutes: float) -> Recipe:
    """Return the recipe with as many epochs (and least updates), and then rows, as fit.

    Args:
        recipe: as it was asked for.
        data: of the recipe.
        costs: of its updates, here.
        max_minutes: for teacher and student together.
    """
    phases = _phases(recipe).values()
    most = max(phase.epochs for phase in phases)
    shares = [epochs / most for epochs in range(most, 0, -1)]
    # Of one epoch each, the least updates may still be more than there is time for.
    while any(phase.min_updates * shares[-1] >= 1 for phase in phases):
        shares.append(0.9 * shares[-1])
    rows = len(data.train)
    for share in shares:
        plan = _plan(recipe, data, costs, max_minutes, share, rows)
        if plan.minutes <= max_minutes:
            return _with(recipe, plan, share, None)
    # Of the rows that a recipe may ask for, a part becomes `select`: so there are fewer than that.
    batch = max(phase.batch_size for phase in phases)
    while rows > batch:
        rows = max(batch, math.floor(0.95 * rows))
        plan = _plan(recipe, data, costs, max_minutes, shares[-1], rows)
        if plan.minutes <= max_minutes:
            return _with(recipe, plan, shares[-1], rows)
    least = _plan(recipe, data, costs, max_minutes, shares[-1], min(rows, batch)).minutes
    raise RecipeError(
        f"one epoch of {min(rows, batch)} rows and {len(data.unlabelled):,} unlabelled texts takes "
        f"{least:.2f} min here, more than --max-minutes {max_minutes:g}",
        hint=f"give --max-minutes {math.ceil(10 * least) / 10:g} or more"
        + (", or fewer texts in data.unlabelled" if len(data.unlabelled) else ""),
    )


def _phases(recipe: Recipe) -> dict[str, TrainRecipe]:
    found = {"teacher": recipe.teacher.finetune, "student": recipe.distill}
    return {name: phase for name, phase in found.items() if phase is not None}


def _shortened(phase: TrainRecipe, share: float) -> TrainRecipe:
    """Return a training of a share of the epochs, one at least, and of its least updates."""
    return phase.model_copy(
        update={
            "epochs": max(1, math.floor(phase.epochs * share + 1e-9)),
            "min_updates": math.floor(phase.min_updates * share + 1e-9),
        }
    )


def _plan(
    recipe: Recipe, data: Data, costs: Costs, max_minutes: float, share: float, rows: int
) -> PlanRecipe:
    """Return what a share of the epochs on some of the rows takes."""
    reads = {"teacher": rows, "student": rows + len(data.unlabelled)}
    phases = _phases(recipe)
    schedules = {
        name: Schedule.planned(reads[name], _shortened(phase, share))
        for name, phase in phases.items()
    }
    updates = {name: schedule.total for name, schedule in schedules.items()}
    evaluations = sum(math.ceil(each.total / each.every) for each in schedules.values())
    # The student is faster at `select` than the teacher, by whose time it is counted.
    texts = reads["student"] + (evaluations + 1) * len(data.select)
    seconds = sum(updates[name] * costs.seconds_per_update[name] for name in phases)
    return PlanRecipe(
        max_minutes=max_minutes,
        rows=rows,
        updates=updates,
        seconds_per_update={name: costs.seconds_per_update[name] for name in phases},
        read_seconds=texts * costs.read_seconds,
        minutes=(seconds + texts * costs.read_seconds) / 60,
    )


def _with(recipe: Recipe, plan: PlanRecipe, share: float, rows: int | None) -> Recipe:
    """Return the recipe that a plan asks for."""
    plain: dict[str, Any] = recipe.model_dump(mode="json")
    plain["plan"] = plan.model_dump(mode="json")
    phases = {"teacher": plain["teacher"]["finetune"], "student": plain["distill"]}
    for name, phase in _phases(recipe).items():
        shorter = _shortened(phase, share)
        phases[name] |= {"epochs": shorter.epochs, "min_updates": shorter.min_updates}
    if rows is not None:
        plain["data"]["max_train_rows"] = rows
    return from_data(plain, where="the planned recipe")


def measured_costs(recipe: Recipe, data: Data) -> Costs:
    """Time some updates of teacher and student, on copies that are thrown away.

    A student that is narrower than its teacher is timed with all heads and neurons.
    """
    ours = accelerator(recipe.compute)
    model, length = open_models(recipe, data), recipe.data.max_length_tokens
    logger.info("--max-minutes: timing some updates")
    seconds: dict[str, float] = {}

    def timed(
        phase: Literal["teacher", "student"],
        settings: TrainRecipe,
        trained: Any,
        encoded: Any,
        logits: Any,
        objective: Any,
    ) -> float:
        prepare(trained, recipe.compute)
        short = {"epochs": 1, "min_updates": 0, "evaluations": 1, "patience": None}
        settings = with_rate(settings, trained).model_copy(update=short)
        records = train(
            new_state(trained, settings, ours),
            encoded,
            logits,
            objective,
            settings,
            lambda _: Evaluation(0.0, torch.zeros(0)),
            ours,
            phase=phase,
            seed=recipe.seed,
        )
        found = [record.seconds for record in records]
        return float(np.mean(found[1:] or found))

    def some(settings: TrainRecipe) -> splits.Split:
        reading, count = data.distillation(), (_TIMED + 1) * settings.batch_size
        chosen = np.random.default_rng([recipe.seed, 3]).permutation(len(reading))[:count]
        return reading.take(np.sort(chosen))

    student, texts = before_training(model, recipe, data), some(recipe.distill)
    model.module.to(ours.device)
    read = splits.encode(texts, model.tokenizer, length)
    predict_logits(model, read, ours.device)  # the first call warms up
    start = time.perf_counter()
    logits = predict_logits(model, read, ours.device)
    reading_seconds = time.perf_counter() - start
    insides = comparison(model, student, recipe.distill.intermediate)
    seconds["student"] = timed(
        "student",
        recipe.distill,
        student,
        splits.encode(texts, student.tokenizer, length),
        logits,
        distillation(ours, recipe.distill, insides),
    )
    if recipe.teacher.finetune is not None:
        settings = recipe.teacher.finetune
        rows = data.train.take(np.arange(min(len(data.train), (_TIMED + 1) * settings.batch_size)))
        encoded = splits.encode(rows, model.tokenizer, length)
        seconds["teacher"] = timed("teacher", settings, model, encoded, None, finetuning(ours))
    return Costs(seconds, reading_seconds / len(texts))
