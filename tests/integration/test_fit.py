"""The cheapest student that meets a target: found, given up, and nothing done twice."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ad2kit.campaigns.fit.fit import fit
from ad2kit.campaigns.fit.looks import Looks, lost_on_select
from ad2kit.campaigns.fit.records import FitReport, Target, check_found
from ad2kit.campaigns.records import Grid
from ad2kit.data.splits import load_data
from ad2kit.exporting.records import QuantisationSearch
from ad2kit.gate.records import LatencyReport, ParityReport, RowAnswers
from ad2kit.gate.shipping import choose_variant, latest_passed_run, passed_variants
from ad2kit.run.errors import GateFailed, RecipeError, RunError, UserError
from ad2kit.run.files import read_lines, write_record, write_text
from ad2kit.run.folder import RunDir
from ad2kit.run.recipe import load_recipe
from ad2kit.run.records import CampaignRecord
from ad2kit.training.records import DistillReport
from tests.conftest import QUICK

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.training.records import StepRecord

pytestmark = pytest.mark.slow

# The teacher is that of the finished run.
SMALL = (*QUICK, "parity.bootstrap_samples=200", "distill.checkpoint_every_steps=2")


@pytest.fixture
def runs(finished_run: RunDir, tmp_path: Path) -> Path:
    shutil.copytree(finished_run.shared, tmp_path / ".shared")
    return tmp_path


def target(**changes: float | None) -> Target:
    plain = {
        "retain": 0.5,
        "margin": 0.2,
        "p99_ms": None,
        "max_mb": None,
        "speedup": None,
        "batch_size": 1,
        "length_tokens": 16,
    }
    return Target.model_validate(plain | changes)


def never(_record: StepRecord) -> None:
    raise AssertionError("an update was made again")


def test_a_student_is_found_through_an_interruption_and_nothing_is_repeated(runs: Path) -> None:
    recipe, aim = load_recipe("smoke", SMALL), target(max_mb=0.5)
    grid = Grid(layers=(2, 1), attention_heads=(2,), feed_forward=(64,))
    steps = list[int]()

    def stop(record: StepRecord) -> None:
        steps.append(record.step)
        if record.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(recipe, aim, grid, runs, on_step=stop)
    measured = (runs / ".shared" / "measured.json").read_text()

    report, folder = fit(recipe, aim, grid, runs, on_step=lambda record: steps.append(record.step))
    assert steps[:5] == [1, 2, 3, 4, 5]
    assert steps[5:] == list(range(5, 69))  # on from the checkpoint, to the end of one student
    assert (
        json.loads(measured)["costs"].items()
        <= json.loads((runs / ".shared" / "measured.json").read_text())["costs"].items()
    )

    # The cheapest first; which that is, a busy machine may see differently.
    took = [each.best(aim).p50_ms for each in report.candidates]
    assert took == sorted(took)
    found, unused = report.candidates
    assert (found.outcome, found.look, unused.outcome) == ("found", 1, "not needed")
    assert report.package == (found.run, found.variant)
    run, variant = RunDir(runs / str(found.run)), str(found.variant)
    check_found(report, folder)
    # It is ready to package, judged by the target's thresholds and the rule of the search.
    assert choose_variant(run, variant) == (run.onnx(variant), False)
    assert passed_variants(run) == [run.onnx(variant)]
    record = CampaignRecord.read(run.campaign_record)
    assert (record.command, record.rule) == ("ad2kit fit", str(aim))
    assert [(each.variant, each.look, each.passed) for each in record.verdicts] == [
        (variant, 1, True)
    ]
    with pytest.raises(RunError, match="but those of campaigns"):
        latest_passed_run(runs)
    parity = ParityReport.read(run.parity_report)
    assert parity.thresholds.min_retained == 0.5
    verdict = next(each for each in parity.variants if each.variant == variant)
    assert (found.retained, found.retained_interval) == (
        verdict.retained,
        verdict.retained_interval,
    )
    assert LatencyReport.read(run.latency_report).cells[0].length_tokens == 16
    config = json.loads((run.student / "config.json").read_text())
    assert config["intermediate_size"] == 64
    assert config["num_hidden_layers"] == len(found.shape.layers)
    assert len(config["pruned_heads"]["0"]) == 2

    # The teacher was exported as its students are, and both were measured together.
    teacher = DistillReport.read(folder / "teacher" / "distill.json")
    assert (teacher.steps, teacher.verdict) == (0, "the teacher itself")
    names = [cost.variant for cost in report.trained]
    assert set(names) == {f"{who}{v}" for who in ("teacher ", "") for v in recipe.export.variants}
    speeds = {cost.variant: cost.speedup for cost in report.trained}
    assert max(speed for name, speed in speeds.items() if "teacher" in name) == 1.0
    assert FitReport.read(folder / "fit.json") == report
    assert (folder / "fit.svg").is_file()

    again, _ = fit(recipe, aim, grid, runs, on_step=never)
    assert again == report


def test_the_hopeless_are_given_up_and_stay_so(runs: Path) -> None:
    """At such a learning rate a student learns to give one answer."""
    recipe = load_recipe("smoke", [*SMALL, "distill.lr=1.0", "distill.epochs=3"])
    aim = target(retain=1.0, max_mb=0.5)
    grid = Grid(layers=(1,), attention_heads=(4,), feed_forward=(8, 16))
    steps = list[int]()

    report, folder = fit(recipe, aim, grid, runs, on_step=lambda record: steps.append(record.step))
    assert steps == list(range(1, 137)) * 2  # two epochs of three, for each
    assert [each.outcome for each in report.candidates] == ["given up", "given up"]
    assert report.looks == 0
    assert report.package is None
    for each in report.candidates:
        assert str(each.run).startswith(f"{folder.name}-")
        assert "on select after 2 evaluations" in each.reason
        assert not RunDir(runs / str(each.run)).checkpoint("student").exists()
        assert not RunDir(runs / str(each.run)).distill_report.exists()
    with pytest.raises(GateFailed, match="2 shapes are cheap enough and none is good enough"):
        check_found(report, folder)

    again, _ = fit(recipe, aim, grid, runs, on_step=never)
    assert again == report


def test_each_look_at_the_validation_rows_is_counted_and_the_next_is_wider(runs: Path) -> None:
    """So few rows cannot show that a student keeps all, whatever it is, in whatever variant."""
    recipe = load_recipe("smoke", [*SMALL, "distill.lr=1e-9", "export.variants=[fp32,fused]"])
    grid = Grid(layers=(1, 2), attention_heads=(4,), feed_forward=(128,))
    report, folder = fit(recipe, target(retain=0.98, margin=0.0, max_mb=1.0), grid, runs)
    assert [(each.outcome, each.look) for each in report.candidates] == [
        ("not shown", 1),
        ("not shown", 2),
    ]
    for each, ordinary in zip(report.candidates, (True, False), strict=True):
        assert str(each.run).startswith(f"{folder.name}-")
        assert ": accuracy retained is " in each.reason
        assert "not shown: " in each.reason
        parity = ParityReport.read(RunDir(runs / str(each.run)).parity_report)
        (verdict,) = (found for found in parity.variants if found.variant == each.variant)
        assert (each.retained_interval == verdict.retained_interval) is ordinary
        run = RunDir(runs / str(each.run))
        (said,) = CampaignRecord.read(run.campaign_record).verdicts
        assert (said.variant, said.look, said.interval, said.passed) == (
            each.variant,
            each.look,
            each.retained_interval,
            False,
        )
        assert passed_variants(run) == []
        found, plain = np.array([each.retained_interval, verdict.retained_interval], float)
        assert found[0] <= plain[0] < plain[1] <= found[1]


@pytest.mark.parametrize("question", ["distillation quality", "conversion cost", None])
def test_only_what_its_conversion_cost_a_variant_may_spare_another(
    finished_run: RunDir, question: str | None
) -> None:
    recipe, report = finished_run.recipe, ParityReport.read(finished_run.parity_report)
    int8 = report.variants[-1]
    checks = [
        check.model_copy(
            update={
                "value": float(check.question != question),
                "bound": "at least",
                "threshold": 1,
                "interval": None,
            }
        )
        for check in int8.checks
    ]
    int8 = int8.model_copy(update={"checks": tuple(checks)})
    looks = Looks(0.5, load_data(recipe.data, recipe.seed).validation.labels)
    look = looks.look(finished_run, report.model_copy(update={"variants": (int8,)}), "int8")
    assert bool(look.failures) is (question is not None)
    assert look.weak is (question == "distillation quality")


def test_a_look_reads_texts_that_hold_what_ends_lines_elsewhere(copied_run: RunDir) -> None:
    rows = [RowAnswers.model_validate_json(line) for line in read_lines(copied_run.answers)]
    odd = rows[0].model_copy(update={"texts": ("a\u2028b\u2029c\u0085d",)})
    write_text(copied_run.answers, "".join(f"{r.model_dump_json()}\n" for r in [odd, *rows[1:]]))
    recipe, report = copied_run.recipe, ParityReport.read(copied_run.parity_report)
    looks = Looks(0.5, load_data(recipe.data, recipe.seed).validation.labels)
    assert looks.look(copied_run, report, "int8").number == 1


def test_a_teacher_that_scores_nothing_ends_the_search(runs: Path) -> None:
    recipe, aim = load_recipe("smoke", SMALL), target(max_mb=50)
    grid = Grid(layers=(1,), attention_heads=(2,), feed_forward=(64,))
    report, _ = fit(recipe, aim, grid, runs)
    run = RunDir(runs / str(report.candidates[0].run))
    distilled = DistillReport.read(run.distill_report)
    nothing = distilled.model_copy(update={"teacher_select_score": 0.0})
    write_record(run.distill_report, nothing)
    with pytest.raises(UserError, match=r"the teacher scores 0\.0000 on `select`"):
        fit(recipe, aim, grid, runs)


def test_what_int8_lost_on_select_is_known_before_a_look(copied_run: RunDir) -> None:
    search = QuantisationSearch.read(copied_run.int8_search)
    trials = [
        trial.model_copy(update={"points_lost": 2.5 if trial.way == search.taken else 9.0})
        for trial in search.trials
    ]
    write_record(copied_run.int8_search, search.model_copy(update={"trials": tuple(trials)}))
    assert lost_on_select(copied_run, "int8") == pytest.approx(0.025)
    assert lost_on_select(copied_run, "fused") == 0.0


def test_the_runs_of_others_keep_their_gate(finished_run: RunDir, runs: Path) -> None:
    other = RunDir(runs / finished_run.path.name)
    shutil.copytree(finished_run.path, other.path)
    before = {path: path.read_bytes() for path in (other.recipe_file, other.parity_report)}
    student = other.recipe.student
    grid = Grid(layers=(len(student.layers or ()),), attention_heads=(4,), feed_forward=(128,))
    with pytest.raises(KeyboardInterrupt):
        fit(other.recipe, target(retain=0.9, max_mb=1.0), grid, runs, on_step=interrupted)
    assert {path: path.read_bytes() for path in before} == before
    assert len(list(runs.glob("fit-smoke-*-*/recipe.json"))) == 1


def interrupted(_record: StepRecord) -> None:
    raise KeyboardInterrupt


def test_a_grid_of_the_teacher_alone_is_refused(runs: Path) -> None:
    grid = Grid(layers=(4,), attention_heads=(4,), feed_forward=(128,))
    with pytest.raises(RecipeError, match="the teacher's own"):
        fit(load_recipe("smoke", SMALL), target(max_mb=1.0), grid, runs)
