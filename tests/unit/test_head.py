"""A started head: what it fits, what it leaves, and that it is the layer the logits come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from ad2kit.data.labels import NO_CLASS
from ad2kit.models import head
from ad2kit.models.head import fit_linear, start_head
from ad2kit.models.text_model import predict_logits
from ad2kit.statistics.logits import answers
from tests.models import cpu, encoded, tiny_bert

if TYPE_CHECKING:
    from ad2kit.run.sections import Task

CPU = torch.device("cpu")


def clouds(classes: int, rows: int = 300, width: int = 6) -> tuple[Any, Any]:
    """Points around a centre for each class, far from the origin."""
    generator = np.random.default_rng(2)
    labels = np.arange(rows) % classes
    centres = 2 * generator.standard_normal((classes, width))
    return 3 + centres[labels] + 0.3 * generator.standard_normal((rows, width)), labels


@pytest.mark.parametrize("classes", [2, 5])
def test_logistic_regression_tells_classes_apart_as_scikit_learn_does(classes: int) -> None:
    from sklearn.linear_model import LogisticRegression

    read, labels = clouds(classes)
    index, weights, bias = fit_linear("single_label", read, labels, classes)
    assert index.tolist() == list(range(classes))
    logits = read @ weights.T + bias
    assert (logits.argmax(axis=1) == labels).mean() > 0.95
    size = np.sqrt((read**2).mean(axis=0))
    plain = LogisticRegression(C=1 / head._PENALTY, max_iter=200)
    plain.fit(read / size, labels)
    ours = torch.softmax(torch.from_numpy(logits), dim=1).numpy()
    np.testing.assert_allclose(ours, plain.predict_proba(read / size), atol=1e-9)


def test_classes_without_rows_are_not_fitted() -> None:
    read, labels = clouds(3)
    index, weights, _ = fit_linear("single_label", read, 2 * labels, 7)
    assert index.tolist() == [0, 2, 4]
    assert weights.shape == (3, 6)
    index, _, _ = fit_linear("single_label", read, np.zeros_like(labels), 7)
    assert index.tolist() == []


def test_several_labels_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_PENALTY", 1e-3)
    read, labels = clouds(4)
    several = np.stack([labels >= 2, labels % 2, np.ones_like(labels)], axis=1).astype(np.float32)
    index, weights, bias = fit_linear("multi_label", read, several, 3)
    assert index.tolist() == [0, 1]  # the third is in every row: nothing to tell apart
    found = read @ weights.T + bias > 0
    assert (found == several[:, :2]).mean() > 0.9
    line = read @ np.arange(6.0) + 1
    _, weights, bias = fit_linear("regression", read, line, 1)
    assert np.corrcoef(read @ weights[0] + bias[0], line)[0, 1] > 0.99


@pytest.mark.parametrize("task", ["single_label", "multi_label", "regression"])
def test_the_last_layer_of_a_model_is_fitted_and_nothing_else(task: Task) -> None:
    model = tiny_bert(task=task, dropout=True)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    rows = encoded(model)
    torch.manual_seed(0)
    start_head(model, rows, rows.labels, cpu())
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.rand(1) == drawn  # no number is taken from the training
    after = model.module.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    again = tiny_bert(task=task, dropout=True)
    start_head(again, rows, rows.labels, cpu())
    assert torch.equal(after["classifier.weight"], again.module.state_dict()["classifier.weight"])


def test_a_started_head_answers_right_where_a_random_one_does_not() -> None:
    model = tiny_bert()
    rows = encoded(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "_PENALTY", 1e-4)  # eight rows
        start_head(model, rows, rows.labels, cpu())
    found = answers("single_label", predict_logits(model, rows, CPU).numpy())
    assert (found == rows.labels).all()


def test_rows_without_a_label_are_left_out() -> None:
    one, other = tiny_bert(), tiny_bert()
    rows = encoded(one)
    labels = rows.labels.copy()
    labels[5:] = NO_CLASS
    start_head(one, rows, labels, cpu())
    weights = one.module.state_dict()["classifier.weight"]
    assert not torch.equal(weights, other.module.state_dict()["classifier.weight"])
    start_head(other, rows, np.full_like(labels, NO_CLASS), cpu())
    assert torch.equal(
        other.module.state_dict()["classifier.weight"],
        tiny_bert().module.state_dict()["classifier.weight"],
    )
