"""Simpler models beside a teacher: what it has to beat before anybody imitates it.

- *largest class*: the same answer to every text (the mean of a regression).
- *bag of words*: TF-IDF of words and pairs of words, and a linear model.
- *linear probe*: a linear model on what the head of the teacher reads (the input of its last linear
  layer), from the encoder as it was before any fine-tuning. Alain and Bengio, *Understanding
  intermediate layers using linear classifier probes*, 2016.
- *mean-vector probe*: the same on the mean of the token vectors. It is no bar, because no
  classifier of these families reads it, but what one would use without any training.

The linear models are scikit-learn's: logistic regression, one for each label where there are
several, ridge regression for a number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ad2kit.data import metrics, splits
from ad2kit.data.labels import answers
from ad2kit.models import text_model
from ad2kit.models.head import read_vectors
from ad2kit.models.records import BAG_OF_WORDS, Baseline, TeacherReport

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from numpy.typing import NDArray

    from ad2kit.data.splits import Data, Split
    from ad2kit.models.head import Floats
    from ad2kit.models.text_model import TextModel
    from ad2kit.run.recipe import Recipe
    from ad2kit.run.sections import Task

    Array = NDArray[Any]

LINEAR_PROBE = "linear probe"
MEAN_PROBE = "mean-vector probe"
# More would take minutes, and these models gain little from them.
TRAIN_ROWS = 5_000
# A standard error of 200 draws is itself known within 5 %.
_DRAWS = 200
# Inverse strengths of the regularisation. Vectors of TF-IDF have length 1 and thousands of
# dimensions, where scikit-learn's 1.0 learns too little; standardised vectors of an encoder have
# some hundred, where it learns too much.
_WORDS_C, _VECTORS_C = 10.0, 0.1
_WORD = r"\w+|[^\w\s]"
_RIDGE_ALPHAS = (1.0, 10.0, 100.0, 1_000.0, 10_000.0)


def most_frequent(task: Task, labels: Array, rows: int) -> Array:
    """Return the one answer that suits most rows: class, set of labels, or the mean.

    Args:
        task: of the labels.
        labels: of the training rows.
        rows: how many answers to return.
    """
    if task == "regression":
        return np.full(rows, labels.mean())
    values, found = np.unique(labels, axis=0, return_counts=True)
    return np.repeat(values[[found.argmax()]], rows, axis=0).astype(np.int64)


def bag_of_words(task: Task, train: Split) -> Callable[[Split], Array]:
    """Train a linear model on the words and pairs of words of texts, and return what it answers.

    The two texts of a pair are one to it. Punctuation and single characters count as words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=_WORD)

    def make() -> Any:
        # One against the rest, which for thousands of sparse columns is many times as fast.
        model = LogisticRegression(C=_WORDS_C, solver="liblinear")
        return Ridge() if task == "regression" else _one_against_the_rest(task, model)

    predict = _fit(task, make, words.fit_transform(_joined(train)), train.labels)
    return lambda split: predict(words.transform(_joined(split)))


def linear_probe(task: Task, vectors: Floats, labels: Array) -> Callable[[Floats], Array]:
    """Train a linear model on vectors [rows, width], and return what it answers to others."""
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()

    def make() -> Any:
        if task == "regression":
            return RidgeCV(_RIDGE_ALPHAS)
        return LogisticRegression(C=_VECTORS_C, max_iter=1_000)

    predict = _fit(task, make, scaler.fit_transform(vectors), labels)
    return lambda others: predict(scaler.transform(others))


def _joined(split: Split) -> list[str]:
    return [" ".join(columns) for columns in split.texts]


def _one_against_the_rest(task: Task, model: Any) -> Any:
    from sklearn.multiclass import OneVsRestClassifier

    return OneVsRestClassifier(model) if task == "single_label" else model


def _fit(task: Task, make: Callable[[], Any], inputs: Any, labels: Array) -> Callable[[Any], Array]:
    """Fit one model, or one for each of several labels; return what they answer."""
    from sklearn.dummy import DummyClassifier

    def fitted(column: Array) -> Any:
        # A rare label may be in no row, or in all, of those that are read here.
        varied = task == "regression" or len(np.unique(column)) > 1
        model = make() if varied else DummyClassifier(strategy="most_frequent")
        return model.fit(inputs, column)

    if task != "multi_label":
        model = fitted(labels)
        return lambda others: np.asarray(model.predict(others))
    each = [fitted(column) for column in labels.T.astype(np.int64)]
    return lambda others: np.stack([model.predict(others) for model in each], axis=1)


def baseline_answers(
    recipe: Recipe, data: Data, encoder: TextModel, device: torch.device
) -> dict[str, tuple[Array, Array]]:
    """Train each baseline on rows of ``train``; return its answers on ``select`` and validation.

    Args:
        recipe: of the data.
        data: whose training rows are in random order.
        encoder: the teacher before its fine-tuning; moved to ``device``.
        device: what computes the vectors.
    """
    task, length = data.task, recipe.data.max_length_tokens
    train = data.train.take(np.arange(min(len(data.train), TRAIN_ROWS)))
    asked = (data.select, data.validation)
    cast("torch.nn.Module", encoder.module).to(device)
    read, *others = (
        read_vectors(encoder, splits.encode(split, encoder.tokenizer, length), device)
        for split in (train, *asked)
    )
    by_words = bag_of_words(task, train)
    by_head = linear_probe(task, read.head_inputs, train.labels)
    by_mean = linear_probe(task, read.token_means, train.labels)
    constant = "mean" if task == "regression" else "largest class"
    found: dict[str, list[Array]] = {
        constant: [most_frequent(task, train.labels, len(split)) for split in asked],
        BAG_OF_WORDS: [by_words(split) for split in asked],
        LINEAR_PROBE: [by_head(vectors.head_inputs) for vectors in others],
        MEAN_PROBE: [by_mean(vectors.token_means) for vectors in others],
    }
    return {name: (select, validation) for name, (select, validation) in found.items()}


def look_at_teacher(
    recipe: Recipe,
    data: Data,
    encoder: TextModel,
    logits: Array,
    device: torch.device,
    *,
    inputs: str,
    teacher_sha256: str,
    curve: tuple[float, ...],
) -> TeacherReport:
    """Put a teacher beside the baselines, on ``select``.

    Args:
        recipe: of the run.
        data: of the recipe.
        encoder: the teacher before its fine-tuning, or itself if it came finished.
        logits: of the teacher on ``select``, shape [rows, outputs].
        device: what computes the vectors of the encoder.
        inputs: the fingerprint of all that the report depends on.
        teacher_sha256: of the teacher.
        curve: its scores on ``select`` during its training.
    """
    judged_by, labels = recipe.data.judged_by, data.select.labels
    found = baseline_answers(recipe, data, encoder, device)
    teacher = answers(data.task, logits)
    draws = metrics.paired_bootstrap(
        judged_by,
        [teacher, *(select for select, _ in found.values())],
        labels,
        _DRAWS,
        recipe.seed,
    )
    # As in metrics.smallest_detectable_difference: never finer than one of the rows.
    errors = np.maximum((draws[:, :1] - draws[:, 1:]).std(axis=0), 1 / len(labels))
    score = metrics.mean_metric(judged_by, teacher, labels)
    baselines = []
    for (name, (select, validation)), error in zip(found.items(), errors, strict=True):
        theirs = metrics.mean_metric(judged_by, select, labels)
        baselines.append(
            Baseline(
                name=name,
                bar=name != MEAN_PROBE,
                select_score=theirs,
                validation_score=metrics.mean_metric(judged_by, validation, data.validation.labels),
                difference=score - theirs,
                standard_error=float(error),
            )
        )
    length = recipe.data.max_length_tokens
    return TeacherReport(
        inputs=inputs,
        teacher=recipe.teacher.model,
        teacher_sha256=teacher_sha256,
        finetune=recipe.teacher.finetune,
        metrics=judged_by,
        rows=len(labels),
        train_rows=min(len(data.train), TRAIN_ROWS),
        score=score,
        standard_error=float(max(draws[:, 0].std(), 1 / len(labels))),
        baselines=tuple(baselines),
        labels=len(data.labels),
        unanswered=_unanswered(data, teacher),
        curve=curve,
        cut=float(splits.encode(data.select, encoder.tokenizer, length).truncated.mean()),
    )


def _unanswered(data: Data, teacher: Array) -> dict[str, int]:
    """Return the labels of ``select`` that the teacher gives to no row, with their rows there."""
    if data.task == "regression":
        return {}
    every = range(len(data.labels))
    labels = data.select.labels
    if data.task == "single_label":
        given, rows = set(teacher.tolist()), np.bincount(labels, minlength=len(every))
    else:
        given, rows = set(np.flatnonzero(teacher.any(axis=0)).tolist()), labels.sum(axis=0)
    return {data.labels[i]: int(rows[i]) for i in every if rows[i] and i not in given}


def untrained_encoder(recipe: Recipe, data: Data, teacher: TextModel) -> TextModel:
    """Return the teacher as it was before its fine-tuning; itself if it came finished."""
    if recipe.teacher.finetune is None:
        return teacher
    return text_model.load_reference(
        recipe.teacher.model, data, seed=recipe.seed, finished=False, key="teacher.model"
    )
