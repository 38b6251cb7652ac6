"""Opens the models of a recipe before anything is trained, and refuses what cannot be distilled."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from ad2kit.data import splits, tokens
from ad2kit.data.labels import has_label
from ad2kit.models import text_model
from ad2kit.run.errors import DataError, ModelError
from ad2kit.run.sections import TrainRecipe
from ad2kit.training.loop import check_compute
from ad2kit.training.losses import check_terms
from ad2kit.training.schedule import rate_of_width
from ad2kit.training.students import build_student, check_widths
from ad2kit.training.teachers import labelled_part, try_given

if TYPE_CHECKING:
    from ad2kit.data.splits import Data
    from ad2kit.models.text_model import TextModel
    from ad2kit.run.recipe import Recipe

Training = TypeVar("Training", bound=TrainRecipe)


def open_models(recipe: Recipe, data: Data) -> tuple[TextModel | None, TextModel]:
    """Open the models of a recipe, and refuse a pair that cannot be distilled; train nothing.

    Both `ad2kit check` and the stage call this function, so that they agree.

    Returns:
        The teacher, before its fine-tuning if there is any, and the student before any cut. A
        teacher that is given by its answers is None: these are read.

    Raises:
        DataError: see :func:`ad2kit.data.answers.read_answers`.
        ModelError: a model cannot be read or served, its labels differ from the data's, it has too
            few positions, layers or widths, the pair cannot have a loss term or the same windows,
            or the family does not support a setting of ``compute``.
        DataError: a text is too long, or no row has a label where labels are learned from.
    """
    _check_labels(recipe, data)
    teacher = None if recipe.teacher.answers else open_teacher(recipe, data)
    student = before_training(teacher, recipe, data)
    models = {"student.model": student}
    if teacher is None:
        try_given(recipe, data)
    else:
        check_widths(teacher, recipe.student)
        check_terms(teacher, student, recipe.distill.intermediate)
        _check_windows(teacher, student, recipe, data)
        models = {"teacher.model": teacher, **models}
    length = recipe.data.max_length_tokens
    for key, model in models.items():
        check_compute(model, recipe.compute)
        text_model.check_length(model, length, key="data.max_length_tokens")
        text_model.try_out(model, data.train.texts[:2], length, key=key)
    windows = recipe.data.long_texts == "windows" or (
        teacher is not None and tokens.equal_tokenizers(teacher.tokenizer, student.tokenizer)
    )
    for tokenizer in dict.fromkeys(model.tokenizer for model in models.values()):
        splits.check_lengths(data, tokenizer, recipe.data.length, windows=windows)
    return teacher, student


def open_teacher(recipe: Recipe, data: Data) -> TextModel:
    """Open the teacher of a recipe, before its fine-tuning if there is any.

    Raises:
        ModelError: it cannot be read, its labels differ, or it is given by its answers.
    """
    return text_model.load_reference(
        recipe.teacher.model,
        data,
        seed=recipe.seed,
        finished=recipe.teacher.finetune is None,
        key="teacher.model",
    )


def untrained_encoder(recipe: Recipe, data: Data, teacher: TextModel | None) -> TextModel:
    """Return the teacher before its fine-tuning; the teacher itself if it came finished.

    Of a teacher that is given by its answers (None) it is the encoder that the student starts from.
    """
    if teacher is None:
        return _open_encoder(recipe, data)
    return teacher if recipe.teacher.finetune is None else open_teacher(recipe, data)


def _open_encoder(recipe: Recipe, data: Data) -> TextModel:
    """Open the model that the student starts from, beside the teacher."""
    return text_model.load_reference(
        recipe.student.model, data, seed=recipe.seed, finished=False, key="student.model"
    )


def _check_labels(recipe: Recipe, data: Data) -> None:
    """Refuse a training on labels if no row has one; see also the validators of the recipe."""
    settings = recipe.distill
    if recipe.teacher.finetune is not None:
        labelled_part(data.task, data.train, "train")
        labelled_part(data.task, data.select, "select")
    by_labels = settings.hard_label_weight or settings.class_weights != "none"
    if by_labels and not has_label(data.task, data.train.labels).any():
        imitate = "" if settings.imitates else "distill.kd_weight=1 "
        raise DataError(
            "distill: no row of train has a label to learn from, and hard_label_weight is "
            f"{settings.hard_label_weight:g}, class_weights {settings.class_weights}",
            hint=f"give labels, or learn from the teacher alone: {imitate}"
            "distill.hard_label_weight=0 distill.class_weights=none",
        )


def _check_windows(teacher: TextModel, student: TextModel, recipe: Recipe, data: Data) -> None:
    """Refuse a student that would have other windows than its teacher, whose logits they imitate.

    Raises:
        ModelError: the two tokenise a text differently.
    """
    if recipe.data.long_texts != "windows":
        return
    read = (data.distillation().texts, data.select.texts)
    tokenizers = teacher.tokenizer, student.tokenizer
    if not all(tokens.same_tokens(texts, *tokenizers) for texts in read):
        raise ModelError(
            "data.long_texts is windows, and each window of the student imitates the same window "
            "of the teacher, but the student has a tokenizer of its own",
            hint="make the student from a model with the teacher's tokenizer, or set "
            "data.long_texts=cut",
        )


def with_rate(settings: Training, model: TextModel) -> Training:
    """Return the settings of a training with a learning rate; null takes it by the width."""
    if settings.lr is not None:
        return settings
    return settings.model_copy(update={"lr": rate_of_width(model.module.config.hidden_size)})


def before_training(teacher: TextModel | None, recipe: Recipe, data: Data) -> TextModel:
    """Return the student before any cut: with all heads and neurons of its layers.

    ``teacher`` is None if it is given by its answers; ``student.model`` is then there.
    """
    source, layers = teacher, recipe.student.layers
    if source is None or recipe.student.model is not None:
        source = _open_encoder(recipe, data)
    return build_student(source, layers) if layers else source
