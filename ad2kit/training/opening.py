"""Opens the models of a recipe before anything is trained, and refuses what cannot be distilled."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from ad2kit.data import splits
from ad2kit.models import text_model
from ad2kit.run.errors import ModelError
from ad2kit.run.sections import TrainRecipe
from ad2kit.training.loop import check_compute
from ad2kit.training.losses import check_terms
from ad2kit.training.schedule import rate_of_width
from ad2kit.training.students import build_student, check_widths
from ad2kit.training.teachers import try_given

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
        DataError: a text is too long.
    """
    teacher = None
    if recipe.teacher.model is not None:
        teacher = text_model.load_reference(
            recipe.teacher.model,
            data,
            seed=recipe.seed,
            finished=recipe.teacher.finetune is None,
            key="teacher.model",
        )
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
    for tokenizer in dict.fromkeys(model.tokenizer for model in models.values()):
        splits.check_lengths(data, tokenizer, recipe.data.length)
    return teacher, student


def _check_windows(teacher: TextModel, student: TextModel, recipe: Recipe, data: Data) -> None:
    """Refuse a student that would have other windows than its teacher, whose logits they imitate.

    Raises:
        ModelError: the two tokenise a text differently.
    """
    if recipe.data.long_texts != "windows":
        return
    read = (data.distillation().texts, data.select.texts)
    tokenizers = teacher.tokenizer, student.tokenizer
    if not all(splits.same_tokens(texts, *tokenizers) for texts in read):
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
    source = teacher
    layers = recipe.student.layers
    if source is None or recipe.student.model is not None:
        source = text_model.load_reference(
            recipe.student.model, data, seed=recipe.seed, finished=False, key="student.model"
        )
    return build_student(source, layers) if layers else source
