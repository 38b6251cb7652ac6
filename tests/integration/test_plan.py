"""`--max-minutes`: what fits is decided once, before the first update, and stands in the recipe."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from ad2kit.data.splits import load_data
from ad2kit.planning import budget as planning
from ad2kit.planning.budget import Costs, fitted, plan_words, planned
from ad2kit.run import recipe as recipes
from ad2kit.run.errors import RecipeError, RunError, UserError
from ad2kit.run.folder import RunDir
from ad2kit.training.records import overrun, read_curve
from tests.conftest import QUICK

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.run.recipe import Recipe
    from ad2kit.run.sections import PlanRecipe

# 400 rows train in 13 batches of 32, 100 choose: 2 epochs of the teacher and 4 of the student.
ASKED = ("data.max_train_rows=500", "distill.epochs=4", "teacher.finetune.epochs=2")
COSTS = Costs({"teacher": 1.0, "student": 2.0}, read_seconds=0.01)


def asked(*overrides: str) -> Recipe:
    return recipes.load_recipe("smoke", [*QUICK, *ASKED, *overrides])


def fit(minutes: float, *overrides: str) -> Recipe:
    recipe = asked(*overrides)
    return fitted(recipe, load_data(recipe.data, recipe.seed), COSTS, minutes)


def epochs(recipe: Recipe) -> tuple[int, int]:
    (finetune,) = filter(None, [recipe.teacher.finetune])
    return finetune.epochs, recipe.distill.epochs


def plan_of(recipe: Recipe) -> PlanRecipe:
    (plan,) = filter(None, [recipe.plan])
    return plan


def test_what_fits_stays_as_it_is() -> None:
    # 26 updates of 1 s, 52 of 2 s, and 400 + 7 * 100 texts of 0.01 s.
    seconds = 26 + 104 + 11
    found = fit(seconds / 60)
    assert plan_of(found).minutes == pytest.approx(seconds / 60)
    assert plan_of(found).updates == {"teacher": 26, "student": 52}
    assert found.model_copy(update={"plan": None}) == asked()


def test_epochs_go_before_rows() -> None:
    found = fit(140 / 60)
    assert epochs(found) == (1, 3)  # three quarters of 2 and 4
    said = plan_words(asked(), found)
    assert "400 rows, 13 updates of the teacher at 1.000 s" in said
    assert said.endswith("teacher.finetune.epochs 2 to 1, distill.epochs 4 to 3")
    assert plan_words(asked(), fit(10)).endswith("the recipe fits as it is")
    assert found.data.max_train_rows == 500
    assert epochs(fit(50 / 60)) == (1, 1)
    fewer = fit(20 / 60)
    assert epochs(fewer) == (1, 1)
    rows = fewer.data.max_train_rows or 0
    assert 32 <= rows < 300
    assert plan_of(fewer).minutes <= 20 / 60
    # As much as fits: a tenth more rows would not.
    assert (fit(1.3 * 20 / 60).data.max_train_rows or 0) > rows


def test_what_cannot_fit_is_an_error_whose_minutes_do_fit(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"more than --max-minutes 0\.01") as caught:
        fit(0.01)
    minutes = float(caught.value.hint.split()[2])
    assert plan_of(fit(minutes)).minutes <= minutes
    texts = tmp_path / "more.txt"
    texts.write_text("".join(f"text {n}\n" for n in range(5000)))
    with pytest.raises(RecipeError, match="5,000 unlabelled texts") as caught:
        fit(1.0, f"data.unlabelled=[{texts}]")
    assert "data.unlabelled" in caught.value.hint


def test_least_updates_go_before_rows() -> None:
    least = ("distill.min_updates=200", "teacher.finetune.min_updates=100")
    found = fit(5.0, *least)  # 100 s and 400 s for them alone, of 300
    assert plan_of(found).minutes <= 5.0
    assert found.data.max_train_rows == 500
    assert 13 < plan_of(found).updates["teacher"] < 100
    assert 13 < plan_of(found).updates["student"] < 200
    # Whatever fits without them fits with them, and on all rows.
    shortest = fit(50 / 60, *least)
    assert (shortest.data.max_train_rows, epochs(shortest)) == (500, (1, 1))
    assert plan_of(shortest).minutes <= 50 / 60


def test_other_data_have_another_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "measured_costs", lambda *_: COSTS)
    table = tmp_path / "train.tsv"
    fields = (f"data.source={tmp_path}", "data.max_train_rows=null")
    lines = [f"text {number}\t{number % 2}" for number in range(4000)]
    for name, count in (("validation", 100), ("train", 500)):
        (tmp_path / f"{name}.tsv").write_text("\n".join(["text\tlabel", *lines[-count:]]) + "\n")
    small = planned(asked(*fields, "data.max_leakage=1.0"), 10.0, tmp_path)
    table.write_text("\n".join(["text\tlabel", *lines]) + "\n")
    large = planned(asked(*fields, "data.max_leakage=1.0"), 10.0, tmp_path)
    assert plan_of(large).rows > plan_of(small).rows
    assert plan_of(large).minutes <= 10.0


def test_a_finished_teacher_takes_no_updates() -> None:
    found = fit(500 / 60, "teacher.finetune=null")
    assert set(plan_of(found).updates) == {"student"}


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_minutes_are_above_zero(minutes: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected minutes above 0"):
        planned(asked(), minutes, tmp_path)


@pytest.mark.parametrize("more", [(), ("distill.intermediate.hidden_states=1",)])
def test_updates_of_both_models_are_timed(more: tuple[str, ...]) -> None:
    recipe = asked("distill.batch_size=8", "teacher.finetune.batch_size=8", *more)
    costs = planning.measured_costs(recipe, load_data(recipe.data, recipe.seed))
    assert set(costs.seconds_per_update) == {"teacher", "student"}
    assert min(*costs.seconds_per_update.values(), costs.read_seconds) > 0


@pytest.mark.slow
def test_a_plan_is_made_once_and_trained_to_its_end(
    ad2kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*QUICK, "distill.epochs=8", "data.max_train_rows=300"]
    typed = ["distill", "smoke", *settings, "--runs-dir", tmp_path, "--max-minutes", "1"]
    monkeypatch.setattr(planning, "measured_costs", lambda *_: COSTS)
    assert ad2kit(*typed).code == 0
    (run,) = (RunDir(path.parent) for path in tmp_path.glob("*/recipe.json"))
    plan = plan_of(run.recipe)
    assert plan.minutes <= plan.max_minutes == 1.0
    assert epochs(run.recipe) == (1, 2)
    assert {name: len(read_curve(run.curve(name))) for name in plan.updates} == plan.updates
    # A slower clock would plan less: it is not asked again.
    monkeypatch.setattr(planning, "measured_costs", lambda *_: 1 / 0)
    assert ad2kit(*typed).code == 0
    assert len(list(tmp_path.glob("*/recipe.json"))) == 1
    (stored,) = (tmp_path / ".shared" / "plans").iterdir()
    stored.write_text(json.dumps({"name": "other"}))
    with pytest.raises(RunError, match="is damaged"):
        planned(recipes.load_recipe("smoke", settings), 1.0, tmp_path)


def test_what_took_longer_is_said_and_not_cut(finished_run: RunDir) -> None:
    updates = {name: len(read_curve(finished_run.curve(name))) for name in ("teacher", "student")}
    plain = fit(500 / 60).model_dump(mode="json")["plan"] | {"updates": updates}

    def said(seconds: float) -> str:
        each = dict.fromkeys(updates, seconds)
        changed = fit(500 / 60).model_dump(mode="json")
        changed["plan"] = plain | {"seconds_per_update": each}
        return overrun(finished_run, recipes.from_data(changed, where="test").plan)

    assert said(1e-6).startswith("the training took longer than --max-minutes")
    assert "nothing was cut" in said(1e-6)
    assert said(1e6) == ""
    assert overrun(finished_run, None) == ""
