"""The teacher is looked at before it is imitated, and what it is stands in every report."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

import ad2kit.training.distill as stage
from ad2kit.campaigns.compare import compare
from ad2kit.campaigns.sweep.trial import Job, make_teacher
from ad2kit.exporting.records import Check, RowsNeeded
from ad2kit.gate import summary
from ad2kit.gate.hub import model_card
from ad2kit.gate.records import ParityReport, check_passed
from ad2kit.gate.report import report as write_report
from ad2kit.gate.shipping import choose_variant
from ad2kit.models.records import TeacherReport
from ad2kit.run import recipe as recipes
from ad2kit.run.errors import GateFailed, RunError
from ad2kit.run.files import sha256_of, write_record
from ad2kit.run.folder import RunDir, open_run
from ad2kit.training.distill import distill
from tests.conftest import QUICK
from tests.integration.test_tasks import TASKS, rows

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.run.recipe import Recipe

# One epoch at this rate changes nothing: the teacher stays the random one that it begins as.
WEAK = (
    "teacher.finetune.epochs=1",
    "teacher.finetune.lr=1e-9",
    "distill.epochs=1",
    "teacher.accept=false",
    "parity.bootstrap_samples=200",
)
BASELINES = ["largest class", "bag of words", "linear probe", "mean-vector probe"]


def weak_recipe(task: str, folder: Path, *overrides: str) -> Recipe:
    """Made-up rows that a bag of words knows, and a teacher that does not."""
    for seed, (name, count) in enumerate((("train", 240), ("validation", 60))):
        lines = (json.dumps(row) for row in rows(task, seed, count))
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    plain = recipes.load_recipe("smoke", [*QUICK, *WEAK, *overrides]).model_dump(mode="json")
    plain["data"] = {"source": str(folder), "max_length_tokens": 32, **TASKS[task]}
    return recipes.from_data(plain, where=task)


def accepting(recipe: Recipe, **distill: Any) -> Recipe:
    plain = recipe.model_dump(mode="json")
    plain["teacher"]["accept"] = True
    plain["distill"] |= distill
    return recipes.from_data(plain, where="accepting")


def no_student(run: RunDir) -> bool:
    left = (run.student, run.curve("student"), run.checkpoint("student"), run.distill_report)
    return not any(path.exists() for path in left)


@pytest.mark.parametrize("task", TASKS)
def test_a_teacher_below_a_bag_of_words_stops_a_run_before_its_student(
    task: str, tmp_path: Path
) -> None:
    run = open_run(weak_recipe(task, tmp_path), tmp_path / "runs")
    with pytest.raises(GateFailed, match="random://bert is below a simpler model") as caught:
        distill(run)
    assert caught.value.exit_code == 1
    assert "bag of words" in caught.value.message
    assert "teacher.finetune.epochs=3" in caught.value.hint
    assert no_student(run)
    found = TeacherReport.read(run.teacher_report)
    constant = "mean" if task == "a number" else "largest class"
    assert [each.name for each in found.baselines] == [constant, *BASELINES[1:]]
    assert found.rows == 48
    assert json.loads(run.teacher_report.read_text())["findings"]


@pytest.mark.slow
def test_what_is_accepted_goes_on_with_the_same_teacher_and_is_looked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = weak_recipe("three classes of pairs", tmp_path)
    run = open_run(refused, tmp_path / "runs")
    with pytest.raises(GateFailed):
        distill(run)
    taught = sha256_of(run.teacher / "sha256.json")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the teacher was looked at again")

    monkeypatch.setattr(stage, "look_at_teacher", never)
    with pytest.raises(GateFailed):
        distill(run)  # a resume
    again = open_run(accepting(refused), tmp_path / "runs")
    assert again.path == run.path
    distill(again)
    assert sha256_of(run.teacher / "sha256.json") == taught
    assert run.student.is_dir()
    # Another student of the same teacher has what the first one knew.
    other = open_run(accepting(refused, lr=5e-4), tmp_path / "runs")
    distill(other)
    assert other.path != run.path
    assert other.teacher_report.read_bytes() == run.teacher_report.read_bytes()
    # Another teacher is another matter.
    changed = weak_recipe("three classes of pairs", tmp_path, "seed=5")
    with pytest.raises(AssertionError, match="looked at again"):
        distill(open_run(changed, tmp_path / "runs"))


def test_a_damaged_report_is_refused(tmp_path: Path) -> None:
    run = open_run(weak_recipe("three classes of pairs", tmp_path), tmp_path / "runs")
    with pytest.raises(GateFailed):
        distill(run)
    (stored,) = run.shared.glob("teacher-reports/*.json")
    stored.write_text(stored.read_text().replace('"rows"', '"lines"'))
    with pytest.raises(RunError, match="is not a TeacherReport"):
        distill(run)


def test_a_finished_teacher_is_looked_at_too(tmp_path: Path) -> None:
    recipe = weak_recipe("three classes of pairs", tmp_path)
    first = open_run(recipe, tmp_path / "runs")
    with pytest.raises(GateFailed):
        distill(first)
    plain = recipe.model_dump(mode="json")
    plain["teacher"] = {"model": str(first.teacher), "finetune": None}
    run = open_run(recipes.from_data(plain, where="finished"), tmp_path / "runs")
    with pytest.raises(GateFailed, match="is below a simpler model") as caught:
        distill(run)
    assert "finished classifier" in caught.value.hint
    assert no_student(run)
    assert TeacherReport.read(run.teacher_report).curve == ()


def test_campaigns_stop_for_such_a_teacher(tmp_path: Path) -> None:
    recipe = weak_recipe("three classes of pairs", tmp_path)
    with pytest.raises(GateFailed, match="not worth imitating"):
        compare(recipe, ["kd", "ad2"], 1, tmp_path / "runs")
    job = Job(recipe, tmp_path / "sweep", tmp_path, None, allow_inexact=False)
    kind, message, hint = make_teacher(job) or (None, "", "")
    assert kind is GateFailed
    assert "not worth imitating" in message
    assert "teacher.accept=true" in hint


@pytest.mark.slow
def test_the_commands_end_with_1_and_go_on_where_it_is_accepted(
    ad2kit: Any, tmp_path: Path
) -> None:
    weak_recipe("three classes of pairs", tmp_path)
    typed = [
        "smoke",
        f"data.source={tmp_path}",
        "data.text_columns=[first,second]",
        *QUICK,
        *WEAK,
        "--runs-dir",
        tmp_path / "runs",
    ]
    for command in ("distill", "run"):
        stopped = ad2kit(command, *typed)
        assert stopped.code == 1
        assert "ad2kit: the teacher is not worth imitating" in stopped.err
    (run,) = (RunDir(path.parent) for path in (tmp_path / "runs").glob("*/recipe.json"))
    assert no_student(run)
    accepted = ad2kit("distill", *typed, "teacher.accept=true")
    assert accepted.code == 0
    assert re.search(r"bag of words [01]\.\d{4}, linear probe ", accepted.out)
    assert run.recipe.teacher.accept


@pytest.mark.slow
def test_a_teacher_that_is_not_far_below_them_is_imitated(tmp_path: Path) -> None:
    """So small a BERT stays below a bag of words here, by less than two standard errors."""
    recipe = recipes.load_recipe(
        "smoke", [*QUICK, "teacher.accept=false", "teacher.finetune.epochs=3"]
    )
    run = open_run(recipe, tmp_path)
    distill(run)
    found = TeacherReport.read(run.teacher_report)
    assert found.far_better == ()
    assert [each.name for each in found.better] == ["bag of words"]
    assert len(found.curve) == 3
    assert run.distill_report.is_file()


def test_the_rows_stand_in_every_table(copied_run: RunDir) -> None:
    scores = summary.baseline_scores(copied_run)
    assert list(scores) == BASELINES
    shown = summary.model_rows(copied_run)
    assert [row[:2] for row in shown[:4]] == [(n, f"{s:.4f}") for n, s in scores.items()]
    assert shown[4][0] == "teacher (PyTorch)"
    assert {len(row) for row in shown} == {len(summary.HEADER)}
    page = write_report(copied_run).read_text()
    folder, _ = choose_variant(copied_run, None)
    card = model_card(copied_run, folder, "me/mine")
    for name, score in scores.items():
        assert f"<td>{name}</td>" in page
        assert f"| {name} | {score:.4f} |" in card
    assert "<h2>The teacher</h2>" in page
    # What was said of another teacher is not said of this one.
    other = TeacherReport.read(copied_run.teacher_report)
    write_record(copied_run.teacher_report, other.model_copy(update={"teacher_sha256": "another"}))
    assert summary.model_rows(copied_run)[0][0] == "teacher (PyTorch)"
    assert "<h2>The teacher</h2>" not in write_report(copied_run).read_text()


def reason(run: RunDir, *, teacher: TeacherReport | None = None, **changes: Any) -> str:
    """The hint of a gate whose variants all have these facts."""
    report = ParityReport.read(run.parity_report)
    variants = tuple(each.model_copy(update=changes) for each in report.variants)
    failed = report.model_copy(update={"variants": variants})
    with pytest.raises(GateFailed) as caught:
        check_passed(failed, run.path, report=run.parity_report, teacher=teacher)
    assert str(run.parity_report) in caught.value.hint
    return caught.value.hint


def check(question: Any, name: str, value: float, threshold: float) -> Check:
    return Check(question=question, name=name, value=value, bound="at least", threshold=threshold)


def test_a_failed_gate_says_who_is_the_reason(finished_run: RunDir) -> None:
    quality: Any = "distillation quality"
    kept = check(quality, "accuracy retained", 0.3, 0.5)
    low = check(quality, "accuracy retained, lower 95 % bound", 0.2, 0.3)
    weak: dict[str, Any] = {"retained": 0.3, "retained_interval": (0.2, 0.4), "checks": (kept, low)}
    assert reason(finished_run, **weak).startswith("the reason is the student")
    report = TeacherReport.read(finished_run.teacher_report)
    good = report.model_copy(update={"baselines": ()})
    assert reason(finished_run, teacher=good, **weak).startswith("the reason is the student")
    words = report.baselines[1].model_copy(update={"difference": -0.5})
    bad = report.model_copy(update={"baselines": (words,)})
    hint = reason(finished_run, teacher=bad, **weak)
    assert hint.startswith("the reason is the teacher, before the student: the teacher random://")
    assert "teacher.finetune.epochs=" in hint
    order = check(quality, "teacher accuracy, against the most frequent label", 0.3, 0.5)
    assert reason(finished_run, checks=(order,)).startswith("the reason is the teacher")
    few = kept.model_copy(
        update={
            "value": 0.6,
            "interval": (0.2, 1.0),
            "limit": 0.3,
            "needed": RowsNeeded(truth=0.6, rows=1138, present=640),
        }
    )
    hint = reason(finished_run, checks=(few,))
    assert hint.startswith("the reason is too few rows: give about 1,138 labelled validation rows")
    cost = check("conversion cost", "label agreement with fp32", 0.5, 0.9)
    assert reason(finished_run, checks=(cost,)).startswith("the reason is the conversion")
    gap = check("export fidelity", "logit gap", 0.0, 1.0)
    hint = reason(finished_run, teacher=bad, checks=(gap, kept))
    assert hint.startswith("the reason is the conversion")
    assert f"delete {finished_run.path / 'onnx'}" in hint
