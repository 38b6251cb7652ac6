"""The distill stage: a teacher, fine-tuned if the recipe says so, and its student."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file

from ad2kit.data import splits
from ad2kit.data.labels import balance, counts, has_label
from ad2kit.models import given, text_model
from ad2kit.models.baselines import labelled_rows, look_at_teacher
from ad2kit.models.head import MOST_ROWS, start_head
from ad2kit.models.pretrained import reference_sha256
from ad2kit.models.records import ModelManifest, TeacherReport
from ad2kit.models.text_model import predict_in_blocks, predict_logits, predict_windows
from ad2kit.run import hub
from ad2kit.run.errors import RunError
from ad2kit.run.files import fingerprint, sha256_of, whole_file, write_record
from ad2kit.run.folder import exclusive
from ad2kit.run.machine import accelerator as make_accelerator
from ad2kit.run.machine import environment, peak_memory_mb
from ad2kit.statistics.logits import answers
from ad2kit.statistics.metrics import mean_metric
from ad2kit.tables.rows import write_bad_rows
from ad2kit.training import selection, shared
from ad2kit.training.ad2 import Batch, distillation, finetuning, inner_losses
from ad2kit.training.checkpoint import Evaluation
from ad2kit.training.loop import Trainer, prepare
from ad2kit.training.losses import balanced_weights, comparison, soft_targets
from ad2kit.training.opening import before_training, open_models, untrained_encoder, with_rate
from ad2kit.training.records import (
    DistillReport,
    StepRecord,
    overrun,
    read_curve,
    scores_before_decay,
    verdict,
)
from ad2kit.training.students import IMPORTANCE_TEXTS, encoder_sha256, narrow
from ad2kit.training.teachers import check_answers, given_logits, given_sha256, labelled_part

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from accelerate import Accelerator

    from ad2kit.data.records import SplitFacts
    from ad2kit.data.splits import Data, Encoded, Split
    from ad2kit.models.text_model import TextModel
    from ad2kit.run.folder import RunDir
    from ad2kit.run.recipe import Recipe
    from ad2kit.run.sections import DistillRecipe, TrainRecipe
    from ad2kit.training.records import Selection, SelectPoint

logger = logging.getLogger(__name__)

# The windows of the first rows of `select`, on which the effect of the adversary is measured.
_ATTACKED_WINDOWS = 32


@exclusive
def distill(
    run: RunDir,
    *,
    on_step: Callable[[StepRecord], None] = lambda _record: None,
    allow_inexact: bool = False,
) -> DistillReport:
    """Run the distill stage: make the teacher (fine-tuned if the recipe says so) and the student.

        report = ad2kit.distill(run)

    Finished work is kept. A finished teacher is loaded, or taken over from another run in the same
    place that fine-tuned it on the same data. An unfinished training resumes from its checkpoint. A
    finished student is not trained again. Under `accelerate launch` every process calls this
    function.

    Args:
        run: the run folder, with its recipe.
        on_step: called after each update.
        allow_inexact: also resume a checkpoint from another number of threads or other versions.

    Raises:
        DataError, ModelError, RunError, DivergedError: see the functions that this one calls.
        GateFailed: a simpler model is far better than the teacher, and the recipe does not accept
            this.
    """
    stage = _Stage.of(run, on_step, allow_inexact)
    recipe = stage.recipe
    data = stage.data
    teacher = stage.teacher()
    inputs = fingerprint(
        stage.teacher_sha256(),
        shared.data_sha256(stage.recipe, stage.data),
        data.unlabelled.sha256,
        recipe.model_dump(mode="json", include={"seed", "student", "distill"}),
        *stage.encoder_sha256,
    )
    if (finished_report := stage.finished(inputs)) is not None:
        return finished_report

    teacher_windows, teacher_logits = stage.select_logits(teacher)
    stage.look_at(teacher, teacher_logits)
    student = stage.student(teacher)
    settings = with_rate(recipe.distill, student)
    logger.info(
        "student: %d layers, %.1f M parameters, learning rate %.3g",
        student.module.config.num_hidden_layers,
        student.parameters() / 1e6,
        settings.rate,
    )
    select = stage.encode(student, data.select.answered(data.task, teacher_logits.numpy()))
    train = stage.encode(student, data.distillation(), keep=True)
    steps, student_selection = stage.train_student(
        teacher, student, settings, train, select, teacher_windows, inputs=inputs
    )
    validation = splits.encode(data.validation, student.tokenizer, recipe.data.length)
    report = stage.report(
        teacher,
        student,
        settings,
        student_selection,
        inputs=inputs,
        steps=steps,
        splits=splits.facts(data, train=train, select=select, validation=validation),
        teacher_score=stage.score(teacher_logits, select),
    )
    if stage.accelerator.is_main_process:
        write_record(run.distill_report, report)
    stage.trainer.clean_up("student")
    logger.info("%s", report.verdict)
    if overrun_words := overrun(run, recipe.plan):
        logger.warning("%s", overrun_words)
    return report


@exclusive
def teach(run: RunDir, *, allow_inexact: bool = False) -> None:
    """Do the part of :func:`distill` that all students of one teacher share.

    It makes the teacher of the run, and its logits on the students' training texts. Other runs in
    the same place take both from the store. Arguments and errors are those of :func:`distill`.
    """
    stage = _Stage.of(run, lambda _record: None, allow_inexact)
    teacher = stage.teacher()
    _, teacher_logits = stage.select_logits(teacher)
    stage.look_at(teacher, teacher_logits)
    stage.teacher_logits(teacher, stage.data.distillation())


@dataclass(frozen=True)
class _Stage:
    """The distill stage of one run: run, recipe, data and trainer, with the steps as methods."""

    run: RunDir
    recipe: Recipe
    data: Data
    trainer: Trainer

    @classmethod
    def of(cls, run: RunDir, on_step: Callable[[StepRecord], None], allow_inexact: bool) -> _Stage:
        """Open the device and read the data; nothing is trained yet."""
        recipe = run.recipe
        accelerator = make_accelerator(recipe.compute)
        surroundings = environment(
            torch.get_num_threads(), accelerator.device.type, accelerator.num_processes
        ) | {
            "compile": str(recipe.compute.compile),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        }
        data = splits.load_data(recipe.data, recipe.seed, run.shared)
        if accelerator.is_main_process:
            write_bad_rows(run.bad_rows, data.bad_rows)
        if data.task != "regression":
            train = data.train
            labelled = int(has_label(data.task, train.labels).sum())
            shares = balance(counts(data.task, train.labels, data.labels), labelled)
            logger.info("train: %d rows; %s", len(train), shares)
        trainer = Trainer(run, accelerator, surroundings, on_step, allow_inexact)
        return cls(run, recipe, data, trainer)

    @property
    def accelerator(self) -> Accelerator:
        return self.trainer.accelerator

    def finished(self, inputs: str) -> DistillReport | None:
        """Return the report of a complete student from the same inputs; None if there is none.

        Raises:
            ModelError: the student was changed since.
        """
        run = self.run
        if not run.distill_report.is_file():
            return None
        report = DistillReport.read(run.distill_report)
        results = (run.student / text_model.MANIFEST, run.select_logits)
        if report.inputs != inputs or not all(path.is_file() for path in results):
            return None
        text_model.load_model(run.student, self.data.labels, self.data.task)
        self.trainer.clean_up("student")
        logger.info("student is already distilled: %s", run.student)
        return report

    def train_student(
        self,
        teacher: TextModel | None,
        student: TextModel,
        settings: DistillRecipe,
        encoded: Encoded,
        select: Encoded,
        teacher_select: torch.Tensor,
        *,
        inputs: str,
    ) -> tuple[int, Selection]:
        """Train the student, and save it with its logits on ``select``; all processes take part.

        Args:
            teacher: the teacher; None if it is given by its answers.
            student: the student before its first update.
            settings: settings of the training.
            encoded: the student's training rows.
            select: the rows that choose the kept update.
            teacher_select: the teacher's logits on ``select``, shape [windows, outputs].
            inputs: fingerprint of the student's inputs.

        Returns:
            The number of updates, and the selection of the kept one.
        """
        terms = None if teacher is None else comparison(teacher, student, settings.intermediate)
        teacher_train = self.teacher_logits(teacher, self.data.distillation())
        select_targets = teacher_select if settings.imitates else None
        head_targets = teacher_train if settings.imitates else None
        prepare(student, self.recipe.compute)
        state, student_selection, select_logits = self.trainer.train(
            student,
            encoded,
            teacher_train,
            distillation(self.accelerator, settings, terms, self.class_weights(settings)),
            settings,
            lambda model: self.evaluate(model, select, select_targets, settings),
            functools.partial(self.choose, select),
            phase="student",
            seed=self.recipe.seed if settings.seed is None else settings.seed,
            inputs=inputs,
            start=self.head_start(settings, encoded, head_targets),
        )
        if self.accelerator.is_main_process:
            text_model.save(state.model, self.run.student, inputs=inputs)
            teacher_logits = torch.from_numpy(select.average(teacher_select.numpy()))
            tensors = {"logits": select_logits, "teacher": teacher_logits}
            with whole_file(self.run.select_logits) as temporary:
                save_file(tensors, temporary)
        self.accelerator.wait_for_everyone()
        return state.step, student_selection

    def report(
        self,
        teacher: TextModel | None,
        student: TextModel,
        settings: DistillRecipe,
        selection: Selection,
        *,
        inputs: str,
        steps: int,
        splits: dict[str, SplitFacts],
        teacher_score: float,
    ) -> DistillReport:
        """Return the report on a student that is trained and saved."""
        run = self.run
        finetune = self.recipe.teacher.finetune
        records = read_curve(run.curve("student"))
        clean_distance, gain, words = verdict(records, settings)
        seconds = sum(record.seconds for record in records)
        rates = {"student": settings.rate}
        if finetune is not None and teacher is not None:
            rates["teacher"] = with_rate(finetune, teacher).rate
        return DistillReport(
            inputs=inputs,
            labels=self.data.labels,
            splits=splits,
            bad_rows=len(self.data.bad_rows),
            teacher_sha256=self.teacher_sha256(),
            student_sha256=sha256_of(run.student / text_model.MANIFEST),
            teacher_parameters=None if teacher is None else teacher.parameters(),
            student_parameters=student.parameters(),
            task=self.data.task,
            metrics=self.recipe.data.judged_by,
            teacher_select_score=teacher_score,
            student_select_score=selection.kept.score,
            learning_rates=rates,
            selection=selection,
            steps=steps,
            train_seconds=seconds,
            examples_per_s=sum(record.examples for record in records) / seconds,
            peak_memory_mb=peak_memory_mb(),
            mean_clean_kl=clean_distance,
            mean_adversarial_gain=gain,
            verdict=words,
            environment=self.trainer.surroundings,
            hub=hub.references(self.recipe),
            encoder_sha256=next(iter(self.encoder_sha256), None),
        )

    def teacher_sha256(self) -> str:
        """Return the fingerprint of the teacher's weights and tokenizer."""
        return fingerprint(ModelManifest.read(self.run.teacher / text_model.MANIFEST).files)

    @functools.cached_property
    def encoder_sha256(self) -> list[dict[str, str]]:
        """The sha256 of the files that the student starts from, if it has some of its own."""
        files = encoder_sha256(self.run)
        return [] if files is None else [files]

    def encode(self, model: TextModel, split: Split, *, keep: bool = False) -> Encoded:
        """Tokenise a split for a model, with the lengths of the recipe.

        With ``keep`` the token ids of a large split are kept for other processes and runs.
        """
        length = self.recipe.data.length
        most_tokens = length.max_length_tokens
        text_model.check_length(model, most_tokens, key="data.max_length_tokens")
        store = self.run.shared if keep else None
        encoded = splits.encode(split, model.tokenizer, length, store)
        if cut := encoded.truncated.sum():
            logger.info("%d texts are longer than %d tokens and were truncated", cut, most_tokens)
        if encoded.first_windows is not None:
            logger.info("%d texts are read in %d windows", len(encoded), len(encoded.input_ids))
        return encoded

    def score(self, logits: torch.Tensor, encoded: Encoded) -> float:
        """Return the score of logits against the labels of their rows."""
        model_answers = answers(self.data.task, logits.numpy())
        return mean_metric(self.recipe.data.judged_by, model_answers, encoded.labels)

    def evaluate(
        self,
        model: TextModel,
        encoded: Encoded,
        teacher_windows: torch.Tensor | None = None,
        settings: DistillRecipe | None = None,
    ) -> Evaluation:
        """Evaluate a model on ``select``, and measure its adversary if the settings have one.

        ``teacher_windows`` are the teacher's logits, shape [windows, outputs].
        """
        logits = predict_logits(model, encoded, self.accelerator.device, self.accelerator)
        distance = None
        if teacher_windows is not None:
            temperature = self.recipe.distill.temperature
            teacher_logits = torch.from_numpy(encoded.average(teacher_windows.numpy()))
            distance = soft_targets(self.data.task, logits, teacher_logits, temperature).item()
        model_answers = answers(self.data.task, logits.numpy())
        constant = bool((model_answers == model_answers[0]).all())
        distances: tuple[float, float] | tuple[None, None] = (None, None)
        if settings is not None and settings.alpha and teacher_windows is not None:
            rows = encoded.batches(np.arange(len(encoded)), _ATTACKED_WINDOWS)[0]
            batch = Batch.of(model, encoded, rows, teacher_windows, self.accelerator.device)
            distances = inner_losses(model, batch, self.accelerator, settings)
        return Evaluation(
            score=self.score(logits, encoded),
            logits=logits,
            distance=distance,
            constant=constant,
            inner_losses=distances,
        )

    def choose(
        self, encoded: Encoded, points: Sequence[SelectPoint], logits: Sequence[torch.Tensor]
    ) -> Selection:
        """Choose the update of a training to keep, given the logits on ``select``."""
        model_answers = [answers(self.data.task, each.numpy()) for each in logits]
        return selection.keep(points, model_answers, encoded.labels, self.recipe.data.judged_by)

    def head_start(
        self, settings: TrainRecipe, encoded: Encoded, teacher_windows: torch.Tensor | None
    ) -> Callable[[TextModel], None] | None:
        """Return a function that fits the head of a model before its training, or None.

        A student's head is fitted to the answers of its teacher.
        """
        if not settings.start_head:
            return None
        targets = encoded.labels
        if teacher_windows is not None:
            teacher_logits = encoded.average(teacher_windows.numpy())
            targets = answers(self.data.task, teacher_logits[:MOST_ROWS])
        return lambda model: start_head(model, encoded, targets, self.accelerator)

    def teacher(self) -> TextModel | None:
        """Return the teacher of the run; make it first if it is missing.

        None stands for a teacher that is given by its answers; its folder holds their logits.
        """
        recipe = self.recipe
        run = self.run
        data = self.data
        settings = recipe.teacher.model_dump(mode="json", exclude={"accept"})
        parts = [recipe.seed, shared.data_sha256(self.recipe, self.data), settings]
        if recipe.teacher.answers:
            parts += [given_sha256(recipe), data.unlabelled.sha256]
        else:
            del settings["answers"]  # a key that 0.1.0 did not have
        inputs = fingerprint(*parts)
        if self._missing(run.teacher / text_model.MANIFEST):
            self._make_teacher(inputs)
        self.trainer.clean_up("teacher")
        if text_model.saved_inputs(run.teacher) != inputs:
            raise RunError(
                f"{run.teacher} was made from other data than this run reads now",
                hint=f"restore the data, or delete {run.path} to start again",
            )
        if recipe.teacher.answers:
            logger.info("teacher: %s", recipe.teacher.title)
            return None
        # Loaded as in a resumed run: a tokenizer differs after it was saved and loaded.
        teacher = text_model.load_model(run.teacher, data.labels, data.task)
        logger.info("teacher: %s", run.teacher)
        return teacher

    def _missing(self, path: Path) -> bool:
        """Tell whether a file is missing; all processes look before the first one makes it."""
        self.accelerator.wait_for_everyone()
        missing = not path.is_file()
        self.accelerator.wait_for_everyone()
        return missing

    def _make_teacher(self, inputs: str) -> None:
        """Take over the teacher of another run, or train it; all processes take part."""
        recipe = self.recipe
        run = self.run
        is_main = self.accelerator.is_main_process
        source = recipe.teacher.model
        # Also where another run has the teacher: its student may be another one.
        teacher, _ = open_models(recipe, self.data)
        if teacher is None:
            if is_main:
                logits = given_logits(recipe, self.data, self.accelerator.device)
                given.save(logits, run.teacher, inputs=inputs)
            self.accelerator.wait_for_everyone()
            return
        key = fingerprint(
            inputs,
            recipe.compute.precision,
            reference_sha256(source, key="teacher.model"),
        )
        if is_main and shared.take_teacher(run.shared, key, run.teacher):
            logger.info("another run has made this teacher")
        if self._missing(run.teacher / text_model.MANIFEST):
            if recipe.teacher.finetune is not None:
                settings = with_rate(recipe.teacher.finetune, teacher)
                logger.info("fine-tuning the teacher %s: learning rate %.3g", source, settings.rate)
                teacher = self._finetuned(teacher, settings, inputs)
            if is_main:
                text_model.save(teacher, run.teacher, inputs=inputs)
                shared.give_teacher(run.shared, key, run.teacher)
            self.accelerator.wait_for_everyone()

    def _finetuned(self, teacher: TextModel, settings: TrainRecipe, inputs: str) -> TextModel:
        """Fine-tune the teacher on ``train``; return it with the weights of the kept update.

        Rows without labels teach it nothing, and are left out.
        """
        task, data = self.data.task, self.data
        select = self.encode(teacher, labelled_part(task, data.select, "select"))
        train = self.encode(teacher, labelled_part(task, data.train, "train"), keep=True)
        prepare(teacher, self.recipe.compute)
        state, _, _ = self.trainer.train(
            teacher,
            train,
            None,
            finetuning(self.accelerator, self.class_weights(settings)),
            settings,
            lambda model: self.evaluate(model, select),
            functools.partial(self.choose, select),
            phase="teacher",
            seed=self.recipe.seed,
            inputs=inputs,
            start=self.head_start(settings, train, None),
        )
        return state.model

    def class_weights(self, settings: TrainRecipe) -> torch.Tensor | None:
        """Return the weights of the classes in the loss of the hard labels, if they have any."""
        if settings.class_weights == "none":
            return None
        data = self.data
        labels = data.train.labels
        return balanced_weights(data.task, labels[has_label(data.task, labels)], len(data.labels))

    def student(self, teacher: TextModel | None) -> TextModel:
        """Return the student before its first update."""
        student = before_training(teacher, self.recipe, self.data)
        if teacher is None:
            return student
        train = self.data.train
        first_rows = train.take(np.arange(min(len(train), IMPORTANCE_TEXTS)))
        encode_rows = functools.partial(self.encode, teacher, first_rows)
        narrow(student, teacher, self.recipe.student, encode_rows, self.accelerator)
        return student

    def select_logits(self, teacher: TextModel | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the teacher's logits on ``select``; refuse a teacher with a wrong label order.

        Returns:
            The logits of the windows, [windows, outputs], and of the texts, [rows, outputs].
        """
        data = self.data
        if teacher is None:
            window_logits = logits = given.logits(self.run.teacher, "select")
        else:
            device = self.accelerator.device
            teacher.module.to(device)
            encoded = self.encode(teacher, data.select)
            window_logits = predict_windows(teacher, encoded, device, self.accelerator)
            logits = torch.from_numpy(encoded.average(window_logits.numpy()))
        check_answers(data, logits.numpy(), finished=self.recipe.teacher.finetune is None)
        return window_logits, logits

    def look_at(self, teacher: TextModel | None, select_logits: torch.Tensor) -> None:
        """Compare the teacher with simpler models, once for all runs; stop if it is too weak.

        Only rows with labels show it. Without enough of them nothing is compared.

        Raises:
            GateFailed: see :meth:`ad2kit.models.records.TeacherReport.check_worth_imitating`.
        """
        run = self.run
        recipe = self.recipe
        is_main = self.accelerator.is_main_process
        rows = labelled_rows(self.data, select_logits.numpy())
        if rows is None:
            logger.info("too few rows have labels to compare the teacher with simpler models")
            return
        # The inputs of the teacher include the data, and the model before its training. Beside
        # given answers the student's encoder is probed.
        encoder = [recipe.student.model, *self.encoder_sha256] if teacher is None else []
        inputs = text_model.saved_inputs(run.teacher)
        key = fingerprint(self.teacher_sha256(), inputs, *encoder)
        path = shared.teacher_report_file(run.shared, key)
        if self._missing(path) and is_main:
            logger.info("looking at the teacher: simpler models on the same rows")
            report = look_at_teacher(
                recipe,
                rows.data,
                untrained_encoder(recipe, self.data, teacher),
                rows.select_logits,
                self.accelerator.device,
                inputs=key,
                teacher_sha256=self.teacher_sha256(),
                curve=scores_before_decay(run.curve("teacher")),
            )
            shared.write_teacher_report(path, report)
        self.accelerator.wait_for_everyone()
        report = TeacherReport.read(path)
        if is_main:
            write_record(run.teacher_report, report)
        report.check_worth_imitating(accepted=recipe.teacher.accept)

    def teacher_logits(self, teacher: TextModel | None, split: Split) -> torch.Tensor:
        """Return the teacher's logits on the student's training texts, computed once for all runs.

        The key of the file is the fingerprint of teacher (with its tokenizer), texts and lengths.
        The shape is [windows, outputs].
        """
        if teacher is None:
            return given.logits(self.run.teacher, "distillation")
        length = self.recipe.data.length
        teacher_sha256 = self.teacher_sha256()
        key = split.texts.remembered(
            lambda: fingerprint(teacher_sha256, split.texts.blocks(), *length.facts),
            teacher_sha256,
            length.facts,
        )
        path = shared.logits_file(self.run.shared, key)
        if not self._missing(path):
            return shared.read_logits(path)
        logger.info("teacher reads %d training texts", len(split))
        encoded = self.encode(teacher, split, keep=True)
        blocks = predict_in_blocks(teacher, encoded, self.accelerator.device, self.accelerator)
        if self.accelerator.is_main_process:
            shape = (len(encoded.input_ids), len(self.data.labels))
            shared.write_logits(path, shape, blocks)
        else:
            for _ in blocks:  # takes part in the computation
                pass
        self.accelerator.wait_for_everyone()
        return shared.read_logits(path)
