"""The answers of a teacher that is not one model here: from tables, or the mean of several."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ad2kit.data import splits
from ad2kit.data.answers import SPLITS, answer_tables, mean_answers, read_answers
from ad2kit.data.labels import has_label
from ad2kit.models import text_model
from ad2kit.models.given import stored_tensor
from ad2kit.models.pretrained import reference_sha256
from ad2kit.run.errors import DataError, reading
from ad2kit.run.files import fingerprint, sha256_of
from ad2kit.statistics.label_order import check_order
from ad2kit.statistics.logits import answers

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from ad2kit.data.sources import SplitRows
    from ad2kit.data.splits import Data, Split
    from ad2kit.models.text_model import TextModel
    from ad2kit.run.folder import RunDir
    from ad2kit.run.recipe import Recipe
    from ad2kit.run.sections import AnswersRecipe, Task

    Logits = NDArray[np.float32]

logger = logging.getLogger(__name__)


def given_logits(recipe: Recipe, data: Data, device: torch.device) -> dict[str, Logits]:
    """Return the logits of the given answers of a recipe on each of its splits.

    The models among them are run on ``device``, one after the other.

    Raises:
        DataError: see :func:`ad2kit.data.answers.read_answers`.
        ModelError: a model cannot be read, or has other labels.
    """
    members = []
    for number, given in enumerate(recipe.teacher.answers):
        logger.info("teacher: answers of %s", given)
        if given.model is None:
            members.append(read_answers(recipe.data, data, given))
        else:
            members.append(_of_model(_member(recipe, data, given, number), recipe, data, device))
    return mean_answers(members, [given.weight for given in recipe.teacher.answers], data)


def try_given(recipe: Recipe, data: Data) -> None:
    """Read all tables of given answers, and open the models among them, but run none.

    Raises:
        DataError: see :func:`given_logits`.
        ModelError: a model cannot be read, or a table has the labels in another order.
    """
    for number, given in enumerate(recipe.teacher.answers):
        if given.model is None:
            check_answers(data, read_answers(recipe.data, data, given)["select"])
        else:
            model = _member(recipe, data, given, number)
            splits.check_lengths(data, model.tokenizer, recipe.data.length, windows=False)


def check_answers(data: Data, select_logits: Logits, *, finished: bool = True) -> None:
    """Refuse a teacher that has the labels in another order than the rows of ``select``.

    Args:
        data: the data; rows without a label show nothing.
        select_logits: the teacher's logits, shape [rows, outputs].
        finished: the teacher was not fine-tuned on these data.

    Raises:
        ModelError: another order fits far better.
    """
    labelled = has_label(data.task, data.select.labels)
    check_order(
        data.task,
        answers(data.task, select_logits)[labelled],
        data.select.labels[labelled],
        data.labels,
        finished=finished,
    )


def judged_select(run: RunDir, data: Data) -> Split:
    """Return the `select` of a distilled run with labels for all rows, as its training judged it.

    A row without a label has the answer of the teacher.
    """
    if has_label(data.task, data.select.labels).all():
        return data.select
    hint = f"delete {run.distill_report} and run `ad2kit distill` again"
    logits = stored_tensor(run.select_logits, "teacher", hint=hint)
    return data.select.answered(data.task, logits.numpy())


def labelled_part(task: Task, split: Split, name: str) -> Split:
    """Return the rows of a split that have labels.

    Raises:
        DataError: there are none; ``name`` is the name of the split.
    """
    labelled = has_label(task, split.labels)
    if labelled.all():
        return split
    if not labelled.any():
        raise DataError(
            f"teacher.finetune: no row of {name} has a label to learn from",
            hint="give labels, or a finished teacher: teacher.finetune=null",
        )
    return split.take(np.flatnonzero(labelled))


def given_sha256(recipe: Recipe) -> str:
    """Return the fingerprint of the content of the tables and models that hold given answers."""
    parts: list[Any] = []
    for number, given in enumerate(recipe.teacher.answers):
        if given.model is not None:
            parts.append(reference_sha256(given.model, key=_key(number)) or given.model)
            continue
        columns = recipe.data.text_columns
        tables = list(answer_tables(recipe.data, columns, given.files))
        if given.files and given.key:
            tables += answer_tables(recipe.data, columns)
        parts.append([_content(table, given.label) for table in tables])
    return fingerprint(*parts)


def _content(table: SplitRows, label: str | None) -> list[Any]:
    """Return what identifies a table of answers, and what its ids of labels stand for."""
    with reading(table.name):
        content: list[Any] = [table.identity, [sha256_of(file) for file in table.files]]
    names = table.labels_of(label) if label else None
    return content if names is None else [*content, names.names]


def _key(number: int) -> str:
    """Return the key of the recipe that holds a model among given answers."""
    return f"teacher.answers[{number}].model"


def _member(recipe: Recipe, data: Data, given: AnswersRecipe, number: int) -> TextModel:
    """Open a finished classifier, and see that it reads the texts."""
    key = _key(number)
    model = text_model.load_reference(given.model, data, seed=recipe.seed, finished=True, key=key)
    length = recipe.data.max_length_tokens
    text_model.check_length(model, length, key="data.max_length_tokens")
    text_model.try_out(model, data.train.texts[:2], length, key=key)
    return model


def _of_model(
    model: TextModel, recipe: Recipe, data: Data, device: torch.device
) -> dict[str, Logits]:
    """Return the logits of a model on each split."""
    cast("torch.nn.Module", model.module).to(device)
    parts = (data.distillation(), data.select, data.validation)
    length = recipe.data.length
    return {
        name: text_model.predict_logits(
            model, splits.encode(split, model.tokenizer, length), device
        ).numpy()
        for name, split in zip(SPLITS, parts, strict=True)
    }
