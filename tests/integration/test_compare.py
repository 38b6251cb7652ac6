"""Methods beside each other: one teacher, nothing trained twice, and differences that are real."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

from ad2kit.campaigns.compare import METHODS, compare
from ad2kit.campaigns.compare_report import CompareReport, StudentResult, caption
from ad2kit.run.errors import RecipeError, RunError
from ad2kit.run.folder import find_run, open_run
from ad2kit.run.recipe import from_data, load_recipe
from ad2kit.statistics import metrics
from ad2kit.training.distill import distill
from tests.conftest import QUICK

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.run.recipe import Recipe
    from ad2kit.run.sections import TrainRecipe
    from ad2kit.training.records import StepRecord


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("smoke", [*QUICK, "data.max_train_rows=500", "parity.bootstrap_samples=200"])


@pytest.mark.slow
def test_a_comparison_trains_each_student_once_from_one_teacher(
    tmp_path: Path, recipe: Recipe
) -> None:
    steps: list[StepRecord] = []
    report, folder = compare(recipe, ["finetune", "kd", "ad2"], 2, tmp_path, on_step=steps.append)
    per_student = -(-400 // recipe.distill.batch_size)
    assert sum(record.phase == "student" for record in steps) == 6 * per_student
    finetune = cast("TrainRecipe", recipe.teacher.finetune)
    assert sum(record.phase == "teacher" for record in steps) == (
        finetune.epochs * -(-400 // finetune.batch_size)
    )
    assert len({student.teacher_sha256 for student in report.students}) == 1
    assert len({student.student_sha256 for student in report.students}) == 6
    assert {(d.method, d.baseline) for d in report.differences} == {
        ("ad2", "finetune"),
        ("ad2", "kd"),
    }
    assert CompareReport.read(folder / "compare.json") == report
    assert "| ad2 - kd |" in (folder / "compare.md").read_text()
    assert (folder / "compare.svg").read_text().startswith("<?xml")

    def never(_record: StepRecord) -> None:
        raise AssertionError("an update was made again")

    again, _ = compare(recipe, ["finetune", "kd", "ad2"], 2, tmp_path, on_step=never)
    assert again == report
    # Fewer methods are another comparison, and none of its runs is what a bare command means.
    smaller, other = compare(recipe, ["kd", "ad2"], 1, tmp_path, on_step=never)
    assert other != folder
    assert (CompareReport.read(folder / "compare.json"), len(smaller.students)) == (report, 2)
    with pytest.raises(RunError, match="but those of campaigns"):
        find_run(tmp_path)
    # The score is that of the run itself, judged by hand.
    scores = {student.run: student.score for student in report.students}
    assert set(scores) == {path.parent.name for path in tmp_path.glob("smoke-*/distill.json")}


def test_a_student_that_gives_one_answer_is_called_so() -> None:
    student = StudentResult(
        method="ad2",
        seed=1,
        run="run-1",
        teacher_sha256="",
        student_sha256="",
        score=0.5,
        train_seconds=1.0,
        examples_per_s=1.0,
        verdict="",
    )
    report = CompareReport(
        recipe="r",
        inputs="",
        metrics=("accuracy",),
        rows=10,
        teacher_score=0.9,
        students=(student,),
        methods=(),
        differences=(),
        environment={},
    )
    assert "the same answer" not in caption(report)
    same = student.model_copy(update={"constant": True})
    text = caption(report.model_copy(update={"students": (same,)}))
    assert text.endswith("Students that give every row the same answer: run-1.")


def test_methods_change_what_they_are_about_and_nothing_else(recipe: Recipe) -> None:
    plain = recipe.model_dump(mode="json")
    for method, changes in METHODS.items():
        changed = from_data(plain | {"distill": plain["distill"] | changes}, where=method)
        same = {"lr", "epochs", "batch_size", "temperature", "adversary", "seed"}
        assert changed.distill.model_dump(include=same) == recipe.distill.model_dump(include=same)
        assert changed.distill.imitates == (method != "finetune")
        assert changed.distill.intermediate.any == (method in ("pkd", "tinybert", "minilm"))


@pytest.mark.parametrize(
    ("overrides", "methods", "expected"),
    [
        ([], ["kd", "ad22"], r"no method 'ad22' \(did you mean 'ad2'\?\)"),
        (["distill.alpha=0"], ["kd", "ad2"], r"its distill\.alpha is 0"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused_before_any_training(
    tmp_path: Path, overrides: list[str], methods: list[str], expected: str
) -> None:
    with pytest.raises(RecipeError, match=expected):
        compare(load_recipe("smoke", overrides), methods, 1, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_randomisation_finds_a_difference_that_is_there_and_none_that_is_not() -> None:
    labels = np.ones(200, dtype=int)
    good, bad = labels.copy(), labels.copy()
    good[:10] = 0
    bad[:40] = 0
    p = metrics.randomisation_p(("accuracy",), [good, good], [bad, bad], labels, 500, seed=1)
    assert p == pytest.approx(1 / 501)
    # 30 rows on each side: an exchange explains it.
    other = labels.copy()
    other[10:20] = 0
    p = metrics.randomisation_p(("accuracy",), [good], [other], labels, 500, seed=1)
    assert p == 1.0
    # Eight of ten discordant rows one way: the sign test gives 2 * 56 / 1024 = 0.109.
    first, second = labels.copy(), labels.copy()
    first[:2] = 0
    second[2:10] = 0
    p = metrics.randomisation_p(("accuracy",), [first], [second], labels, 4000, seed=1)
    assert p == pytest.approx(112 / 1024, abs=0.02)


@pytest.mark.slow
def test_stored_logits_are_of_this_teacher_tokenizer_data_and_length(tmp_path: Path) -> None:
    """Any change of what the logits depend on computes them again; anything else does not."""

    def stored(*overrides: str) -> int:
        base = [*QUICK, "data.max_train_rows=500"]
        distill(open_run(load_recipe("smoke", [*base, *overrides]), tmp_path))
        return len(list((tmp_path / ".shared" / "logits").glob("*.safetensors")))

    assert stored() == 1
    assert stored("distill.lr=2e-3") == 1
    assert stored("distill.seed=5", "student.layers=[0, 2]") == 1
    assert stored("data.max_train_rows=501") == 2
    assert stored("data.max_length_tokens=16") == 3
    assert stored("teacher.finetune.lr=5e-4") == 4
    # The same weights with another tokenizer.
    teacher = next(tmp_path.glob("smoke-*")) / "teacher"
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in teacher.iterdir():
        if file.name != "sha256.json":
            (copied / file.name).write_bytes(file.read_bytes())
    finished = (f"teacher.model={copied}", "teacher.finetune=null")
    before = stored(*finished)
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    vocabulary: dict[str, Any] = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert stored(*finished, "distill.seed=3") == before + 1


@pytest.mark.slow
def test_a_damaged_store_is_named_and_a_deleted_one_costs_only_time(
    tmp_path: Path, recipe: Recipe
) -> None:
    run = open_run(recipe, tmp_path)
    distill(run)
    weights = (run.student / "model.safetensors").read_bytes()
    (logits,) = (run.shared / "logits").glob("*.safetensors")
    logits.write_bytes(logits.read_bytes()[:-9])
    run.distill_report.unlink()
    with pytest.raises(RunError, match="is damaged") as caught:
        distill(run)
    assert f"delete {logits}" in caught.value.hint
    logits.unlink()
    distill(run)
    assert (run.student / "model.safetensors").read_bytes() == weights
