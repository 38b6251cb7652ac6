"""The distill stage: a teacher, fine-tuned where the recipe says so, and its AD2 student."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ad2kit import data as datasets
from ad2kit import models
from ad2kit.checkpoint import TrainState, restore_checkpoint, save_checkpoint
from ad2kit.curve import adversary_verdict, read_curve
from ad2kit.errors import RunError
from ad2kit.files import fingerprint, sha256_of, whole_file, write_record, write_text
from ad2kit.metrics import accuracy
from ad2kit.records import DistillReport, StepRecord
from ad2kit.run_dir import exclusive
from ad2kit.runtime import accelerator as make_accelerator
from ad2kit.runtime import deferred_interrupt, environment
from ad2kit.training import Objective, ad2, finetuning, new_state, predict_logits, train

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    from accelerate import Accelerator

    from ad2kit.data import Data, Encoded
    from ad2kit.models import TextModel
    from ad2kit.recipe import Recipe, TrainRecipe
    from ad2kit.run_dir import RunDir

logger = logging.getLogger(__name__)


@exclusive
def distill(
    run: RunDir,
    *,
    on_step: Callable[[StepRecord], None] = lambda _record: None,
    allow_inexact: bool = False,
) -> DistillReport:
    """The distill stage: teacher (fine-tuned if the recipe says so) and AD2 student of a run.

    Done work is kept: a finished teacher is loaded, an unfinished training goes on from its
    checkpoint, and a finished student is returned as it is.

    Args:
        run: the run folder, with its recipe.
        on_step: called after each update.
        allow_inexact: resume under other threads or versions than the checkpoint was made with.

    Raises:
        DataError, ModelError, RunError, DivergedError: see the functions that this one calls.
    """
    recipe = run.recipe
    accelerator = make_accelerator(recipe.compute)
    surroundings = environment(torch.get_num_threads(), accelerator.device.type)
    data = datasets.load_data(recipe.data, recipe.seed)
    stage = _Stage(run, recipe, data, accelerator, surroundings, on_step, allow_inexact)

    teacher = stage.teacher()
    teacher_sha = sha256_of(run.teacher / models.MANIFEST)
    inputs = fingerprint(
        teacher_sha, stage.data_sha256(),
        recipe.model_dump(mode="json", include={"seed", "student", "distill"}),
    )  # fmt: skip
    if run.distill_report.is_file():
        report = DistillReport.read(run.distill_report)
        if report.inputs == inputs and (run.student / models.MANIFEST).is_file():
            models.load(run.student, data.labels)  # refuses a student that was tampered with
            logger.info("student is already distilled: %s", run.student)
            return report

    encoded = stage.encode(teacher)
    teacher.module.to(accelerator.device)
    teacher_logits = stage.cached_logits(teacher, encoded["train"], teacher_sha)
    teacher_select = _accuracy(teacher, encoded["select"], accelerator)
    student = models.build_student(teacher, recipe.student.layers)
    logger.info(
        "student: %d layers, %.1f M parameters", len(recipe.student.layers),
        student.parameters() / 1e6,
    )  # fmt: skip
    state = stage.run_training(
        student, recipe.distill, "student", inputs, encoded, teacher_logits,
        ad2(accelerator, recipe.distill),
    )  # fmt: skip
    models.save(state.model, run.student, inputs=inputs)
    kd, gain, verdict = adversary_verdict(run.curve("student"), recipe.distill)
    report = DistillReport(
        inputs=inputs,
        labels=data.labels,
        splits=datasets.facts(data, {name: split.truncated for name, split in encoded.items()}),
        teacher_sha256=teacher_sha,
        student_sha256=sha256_of(run.student / models.MANIFEST),
        teacher_parameters=teacher.parameters(),
        student_parameters=state.model.parameters(),
        teacher_select_accuracy=teacher_select,
        student_select_accuracy=state.best_metric,
        best_step=state.best_step,
        steps=state.step,
        mean_clean_kl=kd,
        mean_adversarial_gain=gain,
        adversary_verdict=verdict,
        environment=surroundings,
    )
    write_record(run.distill_report, report)
    stage.clean_up("student")
    logger.info("%s", verdict)
    return report


@dataclass(frozen=True)
class _Stage:
    """What the steps of the stage share."""

    run: RunDir
    recipe: Recipe
    data: Data
    accelerator: Accelerator
    surroundings: dict[str, str]
    on_step: Callable[[StepRecord], None]
    allow_inexact: bool

    def data_sha256(self) -> str:
        return fingerprint(
            self.data.labels, self.data.train.sha256(), self.data.select.sha256(),
            self.data.validation.sha256(), self.recipe.data.max_length_tokens,
        )  # fmt: skip

    def encode(self, model: TextModel) -> dict[str, Encoded]:
        length = self.recipe.data.max_length_tokens
        models.check_length(model, length, key="data.max_length_tokens")
        encoded = {
            name: datasets.encode(getattr(self.data, name), model.tokenizer, length)
            for name in ("train", "select", "validation")
        }
        cut = sum(split.truncated for split in encoded.values())
        if cut:
            logger.info("%d texts are longer than %d tokens and were truncated", cut, length)
        return encoded

    def teacher(self) -> TextModel:
        """Return the teacher of the run, trained now if it is not there yet."""
        recipe, run = self.recipe, self.run
        settings = recipe.teacher.finetune
        inputs = fingerprint(
            recipe.seed, self.data_sha256(), recipe.teacher.model_dump(mode="json")
        )
        if (run.teacher / models.MANIFEST).is_file():
            teacher = models.load(run.teacher, self.data.labels)
            if models.saved_inputs(run.teacher) != inputs:
                raise RunError(
                    f"{run.teacher} was made from other data than this run reads now",
                    hint=f"restore the data, or delete {run.path} to start again",
                )
            logger.info("teacher: %s", run.teacher)
            return teacher
        teacher = models.load_teacher(
            recipe.teacher.model, self.data.labels, seed=recipe.seed, train=self.data.train,
            finished=settings is None,
        )  # fmt: skip
        models.check_layers(teacher, recipe.student.layers)  # before the long part, not after it
        if settings is not None:
            logger.info("fine-tuning the teacher %s", recipe.teacher.model)
            teacher = self.run_training(
                teacher, settings, "teacher", inputs, self.encode(teacher), None,
                finetuning(self.accelerator),
            ).model  # fmt: skip
        models.save(teacher, run.teacher, inputs=inputs)
        self.clean_up("teacher")
        # As a resumed run will find it: a tokenizer is not the same object after a round trip.
        return models.load(run.teacher, self.data.labels)

    def run_training(
        self,
        model: TextModel,
        settings: TrainRecipe,
        phase: Literal["teacher", "student"],
        inputs: str,
        encoded: dict[str, Encoded],
        teacher_logits: torch.Tensor | None,
        objective: Objective,
    ) -> TrainState:
        """Train to the end, through interruptions, and leave the best weights in the model."""
        torch.manual_seed(self.recipe.seed)
        state = new_state(model, settings, self.accelerator)
        checkpoint, curve = self.run.checkpoint(phase), self.run.curve(phase)
        if checkpoint.is_dir():
            restore_checkpoint(
                checkpoint, state, inputs, self.surroundings, allow_inexact=self.allow_inexact
            )
            logger.info("%s: resumed after update %d", phase, state.step)
        records = [r for r in read_curve(curve) if r.step <= state.step]
        write_text(curve, "".join(f"{record.model_dump_json()}\n" for record in records))
        with deferred_interrupt() as interrupted, curve.open("a", encoding="utf-8") as lines:
            for record in train(
                state, encoded["train"], teacher_logits, objective, settings,
                lambda model: _accuracy(model, encoded["select"], self.accelerator),
                self.accelerator, phase=phase, seed=self.recipe.seed,
            ):  # fmt: skip
                lines.write(f"{record.model_dump_json()}\n")
                lines.flush()
                self.on_step(record)
                stopping = interrupted.is_set()
                if stopping or record.step % settings.checkpoint_every_steps == 0:
                    save_checkpoint(checkpoint, state, inputs, self.surroundings)
                if stopping:
                    logger.info("%s: stopped after update %d, saved", phase, record.step)
                    raise KeyboardInterrupt
        state.model.module.load_state_dict(state.best_weights, strict=True)
        return state

    def clean_up(self, phase: str) -> None:
        """Remove the checkpoint of a training whose result is saved."""
        shutil.rmtree(self.run.checkpoint(phase), ignore_errors=True)

    def cached_logits(self, teacher: TextModel, encoded: Encoded, teacher_sha: str) -> torch.Tensor:
        """Return the teacher's logits on the training split, computed once per fingerprint.

        The file is named by teacher (with its tokenizer), rows and maximum length: a change of
        any of them looks for another file.
        """
        inputs = fingerprint(
            teacher_sha, self.data.train.sha256(), self.recipe.data.max_length_tokens
        )
        path = self.run.teacher_logits(inputs)
        if path.is_file():
            try:
                return load_file(path)["logits"]
            except (SafetensorError, KeyError) as error:
                raise RunError(
                    f"{path} is damaged: {error}", hint=f"delete {path} and run again"
                ) from error
        logger.info("teacher reads %d training texts", len(encoded))
        logits = predict_logits(teacher, encoded, self.accelerator.device)
        with whole_file(path) as new:
            save_file({"logits": logits}, new)
        return logits


def _accuracy(model: TextModel, encoded: Encoded, accelerator: Accelerator) -> float:
    logits = predict_logits(model, encoded, accelerator.device)
    return accuracy(logits.argmax(dim=1).numpy(), encoded.labels)
