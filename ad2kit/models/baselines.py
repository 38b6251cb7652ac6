"""Baselines: simpler models that a teacher has to beat before a student imitates it.

- *largest class*: the same answer to every text (the mean of a regression).
- *bag of words*: TF-IDF of words and pairs of words, and a linear model.
- *linear probe*: a linear model on the input of the teacher's last linear layer, computed by the
  encoder before any fine-tuning. Alain and Bengio, *Understanding intermediate layers using linear
  classifier probes*, 2016.
- *mean-vector probe*: a linear model on the mean of the token vectors. The teacher need not beat
  it, because no classifier of these families reads this mean; it is the usual choice without
  training.

The linear models are scikit-learn's: logistic regression (one for each label if there are several
labels), and ridge regression for a number.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from ad2kit.data import splits
from ad2kit.data.labels import has_label
from ad2kit.models.head import read_vectors
from ad2kit.models.records import BAG_OF_WORDS, FEWEST_ROWS, Baseline, TeacherReport
from ad2kit.statistics import metrics
from ad2kit.statistics.logits import answers

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
# More rows would take minutes, and these models gain little from them.
TRAIN_ROWS = 5_000
# A standard error from 200 draws has itself a relative error of 5 %.
_DRAWS = 200
# Inverse strengths of the regularisation; scikit-learn's default is 1.0. It learns too little from
# TF-IDF vectors, which have length 1 and thousands of dimensions. It learns too much from the
# standardised vectors of an encoder, which have hundreds of dimensions.
_WORDS_C = 10.0
_VECTORS_C = 0.1
_WORD = r"\w+|[^\w\s]"
_RIDGE_ALPHAS = (1.0, 10.0, 100.0, 1_000.0, 10_000.0)


def most_frequent(task: Task, labels: Array, rows: int) -> Array:
    """Return the most frequent answer (class or set of labels), or the mean, for every row.

    Args:
        task: task of the labels.
        labels: labels of the training rows.
        rows: number of answers to return.
    """
    if task == "regression":
        return np.full(rows, labels.mean())
    values, counts = np.unique(labels, axis=0, return_counts=True)
    return np.repeat(values[[counts.argmax()]], rows, axis=0).astype(np.int64)


def bag_of_words(task: Task, train: Split) -> Callable[[Split], Array]:
    """Train a linear model on the words and word pairs of texts; return its predict function.

    The two texts of a pair are joined. Punctuation and single characters count as words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=_WORD)

    def make() -> Any:
        if task == "regression":
            return Ridge()
        # One against the rest, which is many times as fast for thousands of sparse columns.
        return _one_against_the_rest(task, LogisticRegression(C=_WORDS_C, solver="liblinear"))

    predict = _fit(task, make, vectorizer.fit_transform(_joined(train)), train.labels)
    return lambda split: predict(vectorizer.transform(_joined(split)))


def linear_probe(task: Task, vectors: Floats, labels: Array) -> Callable[[Floats], Array]:
    """Train a linear model on vectors [rows, width]; return its predict function."""
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()

    def make() -> Any:
        if task == "regression":
            return RidgeCV(_RIDGE_ALPHAS)
        return LogisticRegression(C=_VECTORS_C, max_iter=1_000)

    predict = _fit(task, make, scaler.fit_transform(vectors), labels)
    return lambda test_vectors: predict(scaler.transform(test_vectors))


def _joined(split: Split) -> list[str]:
    """Return each text of a split, or its two texts with a blank between them."""
    return [" ".join(columns) for columns in split.texts]


def _one_against_the_rest(task: Task, model: Any) -> Any:
    """Return a model with one binary classifier per class, for a task with classes."""
    from sklearn.multiclass import OneVsRestClassifier

    return OneVsRestClassifier(model) if task == "single_label" else model


def _fit(task: Task, make: Callable[[], Any], inputs: Any, labels: Array) -> Callable[[Any], Array]:
    """Fit one model, or one for each of several labels; return their predict function."""
    from sklearn.dummy import DummyClassifier

    def fitted(targets: Array) -> Any:
        # A rare label may be in none of these training rows, or in all of them.
        varied = task == "regression" or len(np.unique(targets)) > 1
        model = make() if varied else DummyClassifier(strategy="most_frequent")
        return model.fit(inputs, targets)

    if task != "multi_label":
        model = fitted(labels)
        return lambda test_inputs: np.asarray(model.predict(test_inputs))
    models = [fitted(targets) for targets in labels.T.astype(np.int64)]
    return lambda test_inputs: np.stack([model.predict(test_inputs) for model in models], axis=1)


def baseline_answers(
    recipe: Recipe, data: Data, encoder: TextModel, device: torch.device
) -> dict[str, tuple[Array, Array]]:
    """Train each baseline on rows of ``train``; return its answers on ``select`` and validation.

    Args:
        recipe: recipe of the data.
        data: the splits; the training rows are in random order.
        encoder: the teacher before its fine-tuning; moved to ``device``.
        device: the device that computes the vectors.

    Returns:
        For each name of a baseline its answers on ``select`` and its answers on validation.
    """
    task = data.task
    length = recipe.data.length
    train = data.train.take(np.arange(min(len(data.train), TRAIN_ROWS)))
    test_splits = (data.select, data.validation)
    cast("torch.nn.Module", encoder.module).to(device)
    train_vectors, *test_vectors = (
        read_vectors(encoder, splits.encode(split, encoder.tokenizer, length), device)
        for split in (train, *test_splits)
    )
    predict_by_words = bag_of_words(task, train)
    predict_by_head = linear_probe(task, train_vectors.head_inputs, train.labels)
    predict_by_mean = linear_probe(task, train_vectors.token_means, train.labels)
    constant = "mean" if task == "regression" else "largest class"
    baselines: dict[str, list[Array]] = {
        constant: [most_frequent(task, train.labels, len(split)) for split in test_splits],
        BAG_OF_WORDS: [predict_by_words(split) for split in test_splits],
        LINEAR_PROBE: [predict_by_head(vectors.head_inputs) for vectors in test_vectors],
        MEAN_PROBE: [predict_by_mean(vectors.token_means) for vectors in test_vectors],
    }
    return {name: (select, validation) for name, (select, validation) in baselines.items()}


class LabelledRows(NamedTuple):
    """The rows of the splits that have labels, and the teacher's logits on those of ``select``."""

    data: Data
    select_logits: Array


def labelled_rows(data: Data, select_logits: Array) -> LabelledRows | None:
    """Return the rows with labels; None if a split has too few of them to compare models."""
    parts = {}
    for name in ("train", "select", "validation"):
        split = getattr(data, name)
        rows = np.flatnonzero(has_label(data.task, split.labels))
        if len(rows) == len(split):
            parts[name] = split
        elif len(rows) < FEWEST_ROWS or len(np.unique(split.labels[rows])) < 2:
            return None
        else:
            parts[name] = split.take(rows)
    labelled = has_label(data.task, data.select.labels)
    return LabelledRows(replace(data, **parts), select_logits[labelled])


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
    """Compare a teacher with the baselines on ``select``.

    Args:
        recipe: recipe of the run.
        data: data of the recipe.
        encoder: the teacher before its fine-tuning, or the teacher itself if it came finished.
        logits: logits of the teacher on ``select``, shape [rows, outputs].
        device: the device that computes the vectors of the encoder.
        inputs: the fingerprint of all inputs of the report.
        teacher_sha256: fingerprint of the teacher.
        curve: the teacher's scores on ``select`` during its training.
    """
    judged_by = recipe.data.judged_by
    labels = data.select.labels
    answers_by_name = baseline_answers(recipe, data, encoder, device)
    teacher_answers = answers(data.task, logits)
    draws = metrics.paired_bootstrap(
        judged_by,
        [teacher_answers, *(select for select, _ in answers_by_name.values())],
        labels,
        _DRAWS,
        recipe.seed,
    )
    # As in metrics.smallest_detectable_difference: at least the share of one row.
    errors = np.maximum((draws[:, :1] - draws[:, 1:]).std(axis=0), 1 / len(labels))
    teacher_score = metrics.mean_metric(judged_by, teacher_answers, labels)
    baselines = []
    for (name, (select, validation)), error in zip(answers_by_name.items(), errors, strict=True):
        select_score = metrics.mean_metric(judged_by, select, labels)
        baselines.append(
            Baseline(
                name=name,
                bar=name != MEAN_PROBE,
                select_score=select_score,
                validation_score=metrics.mean_metric(judged_by, validation, data.validation.labels),
                difference=teacher_score - select_score,
                standard_error=float(error),
            )
        )
    length = recipe.data.length
    return TeacherReport(
        inputs=inputs,
        teacher=recipe.teacher.title,
        given=recipe.teacher.model is None,
        teacher_sha256=teacher_sha256,
        finetune=recipe.teacher.finetune,
        metrics=judged_by,
        rows=len(labels),
        train_rows=min(len(data.train), TRAIN_ROWS),
        score=teacher_score,
        standard_error=float(max(draws[:, 0].std(), 1 / len(labels))),
        baselines=tuple(baselines),
        labels=len(data.labels),
        unanswered=_unanswered(data, teacher_answers),
        curve=curve,
        cut=float(splits.encode(data.select, encoder.tokenizer, length).truncated.mean()),
    )


def _unanswered(data: Data, teacher_answers: Array) -> dict[str, int]:
    """Return the labels of ``select`` that the teacher never answers, with their rows there."""
    if data.task == "regression":
        return {}
    labels = data.select.labels
    if data.task == "single_label":
        answered = set(teacher_answers.tolist())
        rows = np.bincount(labels, minlength=len(data.labels))
    else:
        answered = set(np.flatnonzero(teacher_answers.any(axis=0)).tolist())
        rows = labels.sum(axis=0)
    return {
        name: int(rows[index])
        for index, name in enumerate(data.labels)
        if rows[index] and index not in answered
    }
