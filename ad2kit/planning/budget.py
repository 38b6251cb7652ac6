"""`--max-minutes`: plans a training that fits into a given time, before its first update.

Some updates of teacher and student are timed. A recipe that takes too long gets fewer epochs; if
one epoch each is still too long, it gets fewer rows. The plan is kept, and the same command reads
it again. So the clock decides nothing later: the training depends on the planned recipe alone and
is never cut short.
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
from ad2kit.models.text_model import predict_windows
from ad2kit.run.errors import RecipeError, RunError, UserError
from ad2kit.run.files import fingerprint, write_record, writing
from ad2kit.run.machine import accelerator as make_accelerator
from ad2kit.run.machine import available_cpus, environment, processes
from ad2kit.run.recipe import from_data
from ad2kit.run.sections import PlanRecipe
from ad2kit.training import shared
from ad2kit.training.ad2 import distillation, finetuning
from ad2kit.training.checkpoint import Evaluation
from ad2kit.training.loop import new_state, prepare, train
from ad2kit.training.losses import comparison
from ad2kit.training.opening import open_models, with_rate
from ad2kit.training.schedule import Schedule

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.data.splits import Data
    from ad2kit.run.recipe import Recipe
    from ad2kit.run.sections import TrainRecipe

logger = logging.getLogger(__name__)

# The number of updates to time, after one that warms up.
_TIMED = 5


@dataclass(frozen=True)
class Costs:
    """Seconds of an update, by model, and seconds of the teacher's reading of one text."""

    seconds_per_update: dict[str, float]
    read_seconds: float


def planned(recipe: Recipe, max_minutes: float, runs_dir: Path) -> Recipe:
    """Return a recipe whose trainings take at most ``max_minutes`` on this machine.

    The minutes include updates and evaluations of teacher and student, and the teacher's reading
    of the training texts. They do not include the stages after the distillation.

    Args:
        recipe: the recipe that the user asked for.
        max_minutes: time for both trainings together.
        runs_dir: the folder of the runs; the plan is kept in its ``.shared``.

    Raises:
        RecipeError: not even one epoch of a batch fits.
        RunError: the kept plan is damaged.
        UserError: there are several processes, each of which would measure other times; or
            :func:`ad2kit.training.opening.open_models` refuses the recipe.
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
    data = splits.load_data(recipe.data, recipe.seed, runs_dir / ".shared")
    key = fingerprint(
        recipe.model_dump(mode="json"),
        max_minutes,
        data.train.sha256,
        data.unlabelled.sha256,
        environment(recipe.compute.threads or available_cpus()),
    )
    path = shared.plan_file(runs_dir / ".shared", key)
    if path.is_file():
        planned_recipe = _read(path)
    else:
        planned_recipe = fitted(recipe, data, measured_costs(recipe, data), max_minutes)
        with writing(runs_dir / ".shared"):
            path.parent.mkdir(exist_ok=True)
            write_record(path, planned_recipe)
    logger.info("%s", plan_words(recipe, planned_recipe))
    return planned_recipe


def _read(path: Path) -> Recipe:
    """Return the planned recipe in a file."""
    try:
        return from_data(json.loads(path.read_text(encoding="utf-8")), where=str(path))
    except (ValueError, RecipeError) as error:
        raise RunError(
            f"{path} is damaged: {error}", hint=f"delete {path}: a new plan is made"
        ) from error


def plan_words(asked: Recipe, planned_recipe: Recipe) -> str:
    """Return the plan in words, with its changes of the recipe that was asked for.

    Raises:
        ValueError: the planned recipe holds no plan.
    """
    plan = planned_recipe.plan
    if plan is None:
        raise ValueError("expected a recipe with a plan")
    updates = " and ".join(
        f"{count:,} updates of the {name} at {plan.seconds_per_update[name]:.3f} s"
        for name, count in plan.updates.items()
    )
    text = f"plan: {plan.rows:,} rows, {updates}: {plan.minutes:.1f} of {plan.max_minutes:g} min"
    changes = []
    if asked.teacher.finetune and planned_recipe.teacher.finetune:
        before = asked.teacher.finetune.epochs
        after = planned_recipe.teacher.finetune.epochs
        if before != after:
            changes.append(f"teacher.finetune.epochs {before} to {after}")
    if asked.distill.epochs != planned_recipe.distill.epochs:
        changes.append(f"distill.epochs {asked.distill.epochs} to {planned_recipe.distill.epochs}")
    if asked.data.max_train_rows != planned_recipe.data.max_train_rows:
        changes.append(f"data.max_train_rows to {planned_recipe.data.max_train_rows}")
    return f"{text}; {', '.join(changes) or 'the recipe fits as it is'}"


def fitted(recipe: Recipe, data: Data, costs: Costs, max_minutes: float) -> Recipe:
    """Return the recipe with as many epochs (and minimum updates) as fit, then as many rows.

    Args:
        recipe: the recipe that the user asked for.
        data: the data of the recipe.
        costs: seconds of its updates on this machine.
        max_minutes: time for teacher and student together.

    Raises:
        RecipeError: not even one epoch of a batch fits.
    """
    phases = _phases(recipe).values()
    max_epochs = max(phase.epochs for phase in phases)
    shares = [epochs / max_epochs for epochs in range(max_epochs, 0, -1)]
    # With one epoch each, the minimum updates (`min_updates`) may still take too long.
    while any(phase.min_updates * shares[-1] >= 1 for phase in phases):
        shares.append(0.9 * shares[-1])
    rows = len(data.train)
    for share in shares:
        plan = _plan(recipe, data, costs, max_minutes, share, rows)
        if plan.minutes <= max_minutes:
            return _with(recipe, plan, share, None)
    # `data.train` is smaller than the rows that a recipe may ask for: a part becomes `select`.
    batch = max(phase.batch_size for phase in phases)
    while rows > batch:
        rows = max(batch, math.floor(0.95 * rows))
        plan = _plan(recipe, data, costs, max_minutes, shares[-1], rows)
        if plan.minutes <= max_minutes:
            return _with(recipe, plan, shares[-1], rows)
    min_rows = min(rows, batch)
    min_minutes = _plan(recipe, data, costs, max_minutes, shares[-1], min_rows).minutes
    hint = f"give --max-minutes {math.ceil(10 * min_minutes) / 10:g} or more"
    if len(data.unlabelled):
        hint += ", or fewer texts in data.unlabelled"
    raise RecipeError(
        f"one epoch of {min_rows} rows and {len(data.unlabelled):,} unlabelled texts takes "
        f"{min_minutes:.2f} min here, more than --max-minutes {max_minutes:g}",
        hint=hint,
    )


def _phases(recipe: Recipe) -> dict[str, TrainRecipe]:
    """Return the trainings of a recipe by model; a teacher without fine-tuning has none."""
    phases = {"teacher": recipe.teacher.finetune, "student": recipe.distill}
    return {name: phase for name, phase in phases.items() if phase is not None}


def _shortened(phase: TrainRecipe, share: float) -> TrainRecipe:
    """Return a training with a share of its epochs, at least one, and of its minimum updates."""
    return phase.model_copy(
        update={
            "epochs": max(1, math.floor(phase.epochs * share + 1e-9)),
            "min_updates": math.floor(phase.min_updates * share + 1e-9),
        }
    )


def _plan(
    recipe: Recipe, data: Data, costs: Costs, max_minutes: float, share: float, rows: int
) -> PlanRecipe:
    """Return the plan, with its minutes, for a share of the epochs on some of the rows."""
    reads = {"teacher": rows, "student": rows + len(data.unlabelled)}
    phases = _phases(recipe)
    schedules = {
        name: Schedule.planned(reads[name], _shortened(phase, share))
        for name, phase in phases.items()
    }
    updates = {name: schedule.total for name, schedule in schedules.items()}
    evaluations = sum(math.ceil(plan.total / plan.every) for plan in schedules.values())
    # The student's evaluations on `select` are counted with the time of the slower teacher.
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
    """Return the planned recipe; ``rows`` is None if all rows fit."""
    plain: dict[str, Any] = recipe.model_dump(mode="json")
    plain["plan"] = plan.model_dump(mode="json")
    phases = {"teacher": plain["teacher"]["finetune"], "student": plain["distill"]}
    for name, phase in _phases(recipe).items():
        shortened = _shortened(phase, share)
        phases[name] |= {"epochs": shortened.epochs, "min_updates": shortened.min_updates}
    if rows is not None:
        plain["data"]["max_train_rows"] = rows
    return from_data(plain, where="the planned recipe")


def measured_costs(recipe: Recipe, data: Data) -> Costs:
    """Time some updates of teacher and student, on copies of the models that are thrown away.

    A student that is narrower than its teacher is timed with all heads and neurons.
    """
    accelerator = make_accelerator(recipe.compute)
    teacher, student = open_models(recipe, data)
    reader = teacher or student  # of answers that are given, the student reads `select` alone
    length = recipe.data.length
    logger.info("--max-minutes: timing some updates")
    seconds: dict[str, float] = {}

    def seconds_per_update(
        phase: Literal["teacher", "student"],
        settings: TrainRecipe,
        model: Any,
        encoded: Any,
        logits: Any,
        objective: Any,
    ) -> float:
        prepare(model, recipe.compute)
        short = {"epochs": 1, "min_updates": 0, "evaluations": 1, "patience": None}
        settings = with_rate(settings, model).model_copy(update=short)
        records = train(
            new_state(model, settings, accelerator),
            encoded,
            logits,
            objective,
            settings,
            lambda _: Evaluation(0.0, torch.zeros(0)),
            accelerator,
            phase=phase,
            seed=recipe.seed,
        )
        times = [record.seconds for record in records]
        return float(np.mean(times[1:] or times))

    texts = _sample(data.distillation(), (_TIMED + 1) * recipe.distill.batch_size, recipe.seed)
    reader.module.to(accelerator.device)
    reader_inputs = splits.encode(texts, reader.tokenizer, length)
    predict_windows(reader, reader_inputs, accelerator.device)  # the first call warms up
    start = time.perf_counter()
    teacher_logits = predict_windows(reader, reader_inputs, accelerator.device)
    reading_seconds = time.perf_counter() - start
    intermediate = None
    if teacher is not None:
        intermediate = comparison(teacher, student, recipe.distill.intermediate)
    seconds["student"] = seconds_per_update(
        "student",
        recipe.distill,
        student,
        splits.encode(texts, student.tokenizer, length),
        teacher_logits,
        distillation(accelerator, recipe.distill, intermediate),
    )
    if teacher is not None and recipe.teacher.finetune is not None:
        settings = recipe.teacher.finetune
        rows = data.train.take(np.arange(min(len(data.train), (_TIMED + 1) * settings.batch_size)))
        encoded = splits.encode(rows, teacher.tokenizer, length)
        seconds["teacher"] = seconds_per_update(
            "teacher", settings, teacher, encoded, None, finetuning(accelerator)
        )
    return Costs(seconds, reading_seconds / len(texts))


def _sample(split: splits.Split, count: int, seed: int) -> splits.Split:
    """Return so many random rows of a split, in their order."""
    rows = np.random.default_rng([seed, 3]).permutation(len(split))[:count]
    return split.take(np.sort(rows))
