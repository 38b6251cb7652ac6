"""Simpler models beside a teacher: what they learn, how sure the comparison is, what is said."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from ad2kit.data.splits import Data, Split, collate, encode
from ad2kit.models import baselines
from ad2kit.models.head import read_vectors
from ad2kit.models.layers import last_linear
from ad2kit.models.records import BAG_OF_WORDS, Baseline, TeacherReport
from ad2kit.run import recipe
from ad2kit.run.errors import GateFailed, RunError
from ad2kit.run.sections import TextLength
from ad2kit.statistics import metrics
from ad2kit.training.records import StepRecord, scores_before_decay
from tests import families, models

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.run.sections import Task

TASKS: tuple[Task, ...] = ("single_label", "multi_label", "regression")
WORDS = ("red", "green", "blue")


def rows(task: Task, count: int, seed: int) -> Split:
    """Texts whose label is which, or how many, colours they hold."""
    generator = np.random.default_rng(seed)
    held = generator.random((count, len(WORDS))) < 0.5
    texts = tuple(
        (" ".join(["paper", *(w for w, on in zip(WORDS, row, strict=True) if on), "."]),)
        for row in held
    )
    labels: dict[Task, Any] = {
        "single_label": held[:, 0].astype(np.int64) + held[:, 1],
        "multi_label": held.astype(np.float32),
        "regression": held.sum(axis=1).astype(np.float32),
    }
    return Split.of(texts, labels[task])


@pytest.mark.parametrize("task", TASKS)
def test_a_bag_of_words_learns_every_task(task: Task) -> None:
    train, other = rows(task, 300, 1), rows(task, 100, 2)
    found = baselines.bag_of_words(task, train)(other)
    judged_by = recipe.load_recipe("smoke").data.model_copy(update={"task": task, "metrics": None})
    constant = baselines.most_frequent(task, train.labels, len(other))
    assert found.shape == constant.shape == other.labels.shape
    assert metrics.mean_metric(judged_by.judged_by, found, other.labels) > 0.95
    assert metrics.mean_metric(judged_by.judged_by, constant, other.labels) < 0.7


@pytest.mark.parametrize("task", TASKS)
def test_a_probe_learns_every_task_from_vectors(task: Task) -> None:
    train, other = rows(task, 300, 1), rows(task, 100, 2)
    mixing = np.random.default_rng(0).normal(size=(len(WORDS), 8))

    def vectors(split: Split) -> Any:
        return np.array([[w in text for w in WORDS] for (text,) in split.texts]) @ mixing

    judged_by = recipe.load_recipe("smoke").data.model_copy(update={"task": task, "metrics": None})
    found = baselines.linear_probe(task, vectors(train), train.labels)(vectors(other))
    assert metrics.mean_metric(judged_by.judged_by, found, other.labels) > 0.95


def test_the_constant_answer_is_what_most_rows_have() -> None:
    labels = np.array([2, 0, 2, 1])
    assert baselines.most_frequent("single_label", labels, 3).tolist() == [2, 2, 2]
    sets = np.array([[0, 1], [1, 1], [0, 1]], dtype=np.float32)
    assert baselines.most_frequent("multi_label", sets, 2).tolist() == [[0, 1], [0, 1]]
    values = np.array([1.0, 4.0], dtype=np.float32)
    assert baselines.most_frequent("regression", values, 1).tolist() == [2.5]


def test_labels_without_any_choice_are_no_error() -> None:
    texts = (("red",), ("blue",), ("red blue",))
    several = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1]], dtype=np.float32)
    answer = baselines.bag_of_words("multi_label", Split.of(texts, several))
    assert answer(Split.of((("red",),), several[:1])).tolist() == [[1, 0, 1]]
    one = np.array([4, 4, 4])
    assert baselines.bag_of_words("single_label", Split.of(texts, one))(
        Split.of((("green",),), one[:1])
    ).tolist() == [4]
    probe = baselines.linear_probe("single_label", np.eye(3), one)
    assert probe(np.eye(3)).tolist() == [4, 4, 4]


def test_texts_of_signs_and_single_characters_have_words() -> None:
    texts = (("!",), ("?",), ("好",), ("坏",))
    split = Split.of(texts, np.array([0, 1, 0, 1]))
    assert baselines.bag_of_words("single_label", split)(split).tolist() == [0, 1, 0, 1]


# On import transformers compiles parts of DeBERTa, in a way that torch gives up.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_last_layer_makes_the_logits_of_the_vectors_that_a_probe_reads(family: str) -> None:
    model, split = families.tiny(family), models.split()
    encoded = encode(split, model.tokenizer, TextLength(32))
    found = read_vectors(model, encoded, torch.device("cpu"))
    head = last_linear(model.module)
    weight, bias = (part.detach().double().numpy() for part in (head.weight, head.bias))
    for row in range(len(split)):
        arrays = collate(encoded, [row], model.tokenizer)  # alone, without padding
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
        with torch.inference_mode():
            logits = model.module(**inputs).logits[0].double().numpy()
            states = model.module.base_model(**inputs)[0][0].double().numpy()
        np.testing.assert_allclose(found.head_inputs[row] @ weight.T + bias, logits, atol=1e-5)
        np.testing.assert_allclose(found.token_means[row], states.mean(axis=0), atol=1e-5)
    assert {each.dtype.name for each in found} == {"float64"}


def test_reading_vectors_leaves_no_hook_and_no_dropout() -> None:
    model = models.tiny_bert(dropout=True)
    model.module.train()
    encoded = models.encoded(model)
    first, second = (read_vectors(model, encoded, torch.device("cpu")) for _ in range(2))
    assert (first.head_inputs == second.head_inputs).all()
    for part in (last_linear(model.module), model.module.base_model):
        assert not part._forward_pre_hooks
        assert not part._forward_hooks


def looked_at(wrong: int, task: Task = "single_label") -> TeacherReport:
    """A teacher that is wrong on the first ``wrong`` of 100 rows of `select`, and right else."""
    train, select = rows(task, 300, 1), rows(task, 100, 2)
    labels = {"single_label": ("none", "one", "two"), "multi_label": WORDS, "regression": ("n",)}
    data = Data(task, labels[task], train, select, rows(task, 50, 3), train.take(np.arange(0)))
    plain = recipe.load_recipe("smoke", ["compute.threads=1"]).model_dump(mode="json")
    plain["data"] |= {"task": task}
    truth = select.labels
    logits: dict[Task, Any] = {
        "single_label": np.eye(3)[np.where(np.arange(100) < wrong, (truth + 1) % 3, truth)]
        if task == "single_label"
        else None,
        "multi_label": 2 * truth - 1,
        "regression": truth[:, None] if task == "regression" else None,
    }
    found = logits[task].astype(np.float64)
    if task != "single_label":
        found[:wrong] = -found[:wrong]
    encoder = models.tiny_bert()
    return baselines.look_at_teacher(
        recipe.from_data(plain, where="test"),
        data,
        encoder,
        found,
        torch.device("cpu"),
        inputs="i",
        teacher_sha256="t",
        curve=(0.5, 0.6),
    )


def test_the_standard_error_is_that_of_the_paired_difference() -> None:
    report = looked_at(wrong=30)
    words = next(each for each in report.baselines if each.name == BAG_OF_WORDS)
    assert words.select_score == 1.0
    assert words.difference == pytest.approx(-0.3)
    assert words.standard_error == pytest.approx(np.sqrt(0.3 * 0.7 / 100), rel=0.1)
    assert [each.name for each in report.baselines if not each.bar] == [baselines.MEAN_PROBE]
    assert report.score == pytest.approx(0.7)
    assert words in report.far_better
    assert report.train_rows == 300


@pytest.mark.parametrize("task", TASKS)
def test_a_perfect_teacher_is_below_nothing_and_a_bad_one_is(task: Task) -> None:
    good, bad = looked_at(wrong=0, task=task), looked_at(wrong=80, task=task)
    assert good.better == ()
    assert not any("simpler model" in line for line in good.findings)
    assert BAG_OF_WORDS in {each.name for each in bad.far_better}
    first = "mean" if task == "regression" else "largest class"
    assert good.baselines[0].name == first
    assert (bad.labels, good.rows) == ({"regression": 1}.get(task, 3), 100)


def report(**changes: Any) -> TeacherReport:
    """A good teacher, with some facts changed."""
    plain: dict[str, Any] = {
        "inputs": "",
        "teacher": "hub://me/mine",
        "teacher_sha256": "",
        "metrics": ("accuracy",),
        "finetune": recipe.load_recipe("custom").teacher.finetune,
        "rows": 200,
        "train_rows": 800,
        "score": 0.8,
        "standard_error": 0.03,
        "labels": 5,
        "unanswered": {},
        "curve": (),
        "cut": 0.0,
        "baselines": (),
    }
    return TeacherReport(**(plain | changes))


def beside(difference: float, *, bar: bool = True, name: str = "linear probe") -> Baseline:
    return Baseline(
        name=name,
        bar=bar,
        select_score=0.8 - difference,
        validation_score=0.7,
        difference=difference,
        standard_error=0.02,
    )


@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        ({"baselines": (beside(-0.05),)}, True),
        ({"baselines": (beside(-0.039),)}, False),  # below two standard errors: it is said
        ({"baselines": (beside(0.05),)}, False),
        ({"baselines": (beside(-0.5, bar=False),)}, False),  # it is information
        ({"baselines": (beside(-0.5),), "rows": 29}, False),  # too few to be sure of anything
        ({"unanswered": {"a": 50}}, False),
        ({"curve": (0.1, 0.8)}, False),
    ],
)
def test_a_teacher_stops_a_run_where_a_bar_is_more_than_two_standard_errors_above_it(
    changes: dict[str, Any], stops: bool
) -> None:
    found = report(**changes)
    found.check_worth_imitating(accepted=True)
    if not stops:
        found.check_worth_imitating(accepted=False)
        return
    with pytest.raises(GateFailed, match="hub://me/mine is below a simpler model") as caught:
        found.check_worth_imitating(accepted=False)
    assert caught.value.exit_code == 1
    assert "linear probe 0.8500 (-5.0 points, standard error 2.0)" in caught.value.message
    assert "teacher.accept=true" in caught.value.hint


@pytest.mark.parametrize("finetune", [True, False])
def test_the_settings_that_a_bad_teacher_is_mended_with_are_settings(finetune: bool) -> None:
    found = report(baselines=(beside(-0.2),), **({} if finetune else {"finetune": None}))
    with pytest.raises(GateFailed) as caught:
        found.check_worth_imitating(accepted=False)
    typed = re.findall(r"'(teacher\.[^']+)'|(teacher\.\w+\.?\w*=[^\s;']+)", caught.value.hint)
    settings = [quoted or plain for quoted, plain in typed]
    assert len(settings) == (3 if finetune else 2)
    changed = recipe.load_recipe("custom", settings)
    assert changed.teacher.accept
    assert changed.teacher.finetune
    assert changed.teacher.finetune.epochs > 3


def test_what_is_cut_off_is_named_where_a_bag_of_words_reads_on() -> None:
    better = (beside(-0.2, name=BAG_OF_WORDS),)
    assert "data.max_length_tokens" in report(baselines=better, cut=0.4).remedy
    assert "data.long_texts=windows" in report(baselines=better, cut=0.4).remedy
    of_answers = report(baselines=better, cut=0.4, given=True).remedy
    assert "data.max_length_tokens" in of_answers
    assert "windows" not in of_answers  # the recipe refuses them
    assert "data.max_length_tokens" not in report(baselines=better, cut=0.05).remedy
    assert "data.max_length_tokens" not in report(baselines=(beside(-0.2),), cut=0.4).remedy


@pytest.mark.parametrize(
    ("curve", "rises"),
    [
        ((), False),
        ((0.8,), False),
        ((0.5, 0.8), True),
        ((0.78, 0.8), False),  # within a standard error
        ((0.9, 0.5, 0.8), False),  # it was better before
        ((0.2, 0.5, 0.8, 0.801), False),
        # Of many evaluations those of the last quarter count together.
        (tuple(np.linspace(0.5, 0.8, 20)), True),
        ((*np.linspace(0.5, 0.8, 15), 0.8, 0.8, 0.8, 0.8, 0.8), False),
    ],
)
def test_a_curve_that_still_rises_is_said(curve: tuple[float, ...], rises: bool) -> None:
    found = report(curve=curve)
    assert any("still getting better" in line for line in found.findings) == rises


def test_labels_that_are_never_answered_are_named_if_they_are_more_than_bad_luck() -> None:
    (line,) = report(unanswered={"rare": 1, "lost": 4}).findings
    assert "never answers 2 of 5 labels, which 5 of 200 rows of select have: lost, rare;" in line
    assert report(unanswered={"rare": 1, "other": 3}).findings == ()


def test_unanswered_labels_are_counted_in_select() -> None:
    split = Split.of((("a",),) * 4, np.array([0, 1, 1, 2]))
    data = Data("single_label", ("x", "y", "z", "absent"), split, split, split, split)
    assert baselines._unanswered(data, np.array([0, 0, 0, 2])) == {"y": 2}
    several = Split.of((("a",),) * 2, np.array([[1, 1, 0], [0, 1, 0]], dtype=np.float32))
    data = Data("multi_label", ("x", "y", "z"), several, several, several, several)
    assert baselines._unanswered(data, np.array([[1, 0, 0], [0, 0, 0]])) == {"y": 2}


def test_what_rises_when_the_rate_falls_says_nothing(tmp_path: Path) -> None:
    """With less of a rate every score rises; what counts is whether it did before."""
    path, steps = tmp_path / "curve.jsonl", list[StepRecord]()

    def write(scores: list[float], rates: list[float]) -> tuple[float, ...]:
        steps[:] = [
            StepRecord(
                phase="teacher",
                step=number + 1,
                total_steps=len(scores),
                epoch=0,
                lr=rate,
                loss=1.0,
                terms={},
                grad_norm=1.0,
                examples=1,
                seconds=1.0,
                select_score=score,
            )
            for number, (score, rate) in enumerate(zip(scores, rates, strict=True))
        ]
        path.write_text("".join(f"{step.model_dump_json()}\n" for step in steps))
        return scores_before_decay(path)

    flat = [0.6, 0.7, 0.74, 0.73, 0.74, 0.735]
    assert write([*flat, 0.755, 0.78], [1e-4] * 6 + [5e-5, 1e-5]) == tuple(flat)
    # Where it falls all the time there is nothing else to look at.
    assert write(flat, [1e-4, 8e-5, 6e-5, 4e-5, 2e-5, 0.0]) == tuple(flat)
    assert scores_before_decay(tmp_path / "none.jsonl") == ()
    path.write_text(path.read_text().replace('"schema_version":2', '"schema_version":1'))
    with pytest.raises(RunError, match=r"curve\.jsonl is not a StepRecord of schema version 2"):
        scores_before_decay(path)
