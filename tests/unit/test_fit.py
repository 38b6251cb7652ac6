"""The parts of `ad2kit fit`: which shapes there are, what is hopeless, how sure a look is."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import numpy as np
import pytest

from ad2kit.campaigns import shapes
from ad2kit.campaigns.fit.costs import Call, Stopwatch, System
from ad2kit.campaigns.fit.looks import Looks, error_of, hopeless, thinned
from ad2kit.campaigns.fit.records import (
    Candidate,
    Cost,
    FitReport,
    Outcome,
    Target,
    check_found,
    shortfalls,
)
from ad2kit.campaigns.fit.report import _GROUPS, caption, markdown, plot, rows
from ad2kit.campaigns.records import Grid, Shape
from ad2kit.cli.options import numbers
from ad2kit.run.errors import GateFailed, ModelError, RecipeError, UserError
from ad2kit.run.recipe import load_recipe
from ad2kit.run.sections import StudentRecipe
from ad2kit.statistics.metrics import retained_interval
from ad2kit.training import students
from tests import families
from tests.models import tiny_bert

if TYPE_CHECKING:
    from pathlib import Path


def shape(layers: int, heads: int = 4, neurons: int = 128) -> Shape:
    return Shape(layers=tuple(range(layers)), attention_heads=heads, feed_forward=neurons)


def cost(
    variant: str = "int8", *, ms: float = 2.0, megabytes: float = 10, speedup: float = 2.0
) -> Cost:
    return Cost(
        variant=variant,
        size_bytes=int(1e6 * megabytes),
        p50_ms=ms,
        p99_ms=1.5 * ms,
        calls=100,
        speedup=speedup,
        speedup_range=(0.9 * speedup, 1.1 * speedup),
        spread=1.1,
    )


def target(**changes: float | None) -> Target:
    plain = {
        "retain": 0.97,
        "margin": 0.02,
        "p99_ms": None,
        "max_mb": None,
        "speedup": None,
        "batch_size": 1,
        "length_tokens": 64,
    }
    return Target.model_validate(plain | changes)


def report(aim: Target, *candidates: Candidate) -> FitReport:
    return FitReport(
        recipe="tiny",
        inputs="x",
        target=aim,
        grid=Grid(),
        metrics=("accuracy",),
        rows=100,
        untrained_teacher=(cost(ms=4.0, speedup=1.0),),
        candidates=candidates,
        trained=(),
        package=None,
        environment={"threads": "2", "cpu": "a CPU"},
    )


# Shapes.


def test_the_usual_shapes_of_four_layers_are_part_of_them_whole_and_half_as_wide() -> None:
    found = shapes.shapes(tiny_bert(), StudentRecipe(layers=(1, 3)), Grid())
    assert {len(each.layers) for each in found} == {1, 2, 3}
    # Of two layers those that the recipe names, of other numbers the lowest.
    assert {each.layers for each in found} == {(0,), (1, 3), (0, 1, 2)}
    assert {each.attention_heads for each in found} == {2, 4}
    assert {each.feed_forward for each in found} == {64, 128}
    assert len(found) == 12


def test_a_grid_names_its_own_and_the_teacher_is_no_student() -> None:
    grid = Grid(layers=(4,), attention_heads=(4, 3), feed_forward=(128,))
    (found,) = shapes.shapes(tiny_bert(), StudentRecipe(layers=(1, 3)), grid)
    assert found == shape(4, heads=3)
    assert str(found) == "4 layers, 3 heads, feed-forward 128"


def test_where_heads_cannot_be_cut_the_usual_shapes_keep_them() -> None:
    teacher, recipe = families.tiny("mpnet"), StudentRecipe(layers=(0,))
    found = shapes.shapes(teacher, recipe, Grid())
    assert {each.attention_heads for each in found} == {families.HEADS}
    assert {each.feed_forward for each in found} == {32, 64}
    with pytest.raises(ModelError, match="attention_heads: cannot be cut in a 'mpnet'"):
        shapes.shapes(teacher, recipe, Grid(attention_heads=(2,)))


def test_shapes_that_the_teacher_does_not_have_are_refused() -> None:
    recipe = StudentRecipe(layers=(0,))
    for asked, expected in (
        ({"layers": (2, 5)}, "--layers: expected at most the teacher's 4, found 5"),
        ({"attention_heads": (9,)}, "--heads: expected at most the teacher's 4, found 9"),
        ({"feed_forward": (999,)}, "--feed-forward: expected at most the teacher's 128, found 999"),
    ):
        with pytest.raises(ModelError, match=expected):
            shapes.shapes(tiny_bert(), recipe, Grid(**asked))
    with pytest.raises(RecipeError, match="fit makes students from the layers of the teacher"):
        shapes.shapes(tiny_bert(), StudentRecipe(model="somewhere"), Grid())


def test_an_untrained_student_has_the_size_of_its_shape() -> None:
    teacher = tiny_bert()
    full = shapes.whole(teacher)
    assert (len(full.layers), full.attention_heads, full.feed_forward) == (4, 4, 128)
    assert shapes.section(full, full) == StudentRecipe(layers=full.layers)
    student = shapes.untrained(teacher, shape(2, heads=1, neurons=7))
    assert students.widths(student)[1] == 7
    assert student.module.config.pruned_heads == {0: [1, 2, 3], 1: [1, 2, 3]}
    assert shapes.untrained(teacher, full).parameters() == teacher.parameters()


# Prospects.


@pytest.mark.parametrize(
    ("scores", "rows", "needed", "expected"),
    [
        ([0.50], 400, 0.99, False),  # one epoch says nothing
        ([0.70, 0.80], 400, 0.93, False),  # 0.80 + 0.10 and two errors of 0.02 are 0.94
        ([0.70, 0.80], 400, 0.95, True),
        ([0.80, 0.80], 400, 0.83, False),
        ([0.80, 0.80], 400, 0.85, True),
        ([0.80, 0.80], 100, 0.85, False),  # fewer rows know less
        ([0.90, 0.80], 400, 0.85, True),  # a loss is no gain
        ([0.60, 0.70, 0.80, 0.80], 400, 0.85, True),  # the last gain counts, and no other
        ([-0.10, -0.05], 400, 0.10, True),  # a correlation may be negative
        ([1.0, 1.0], 400, 1.0, False),
    ],
)
def test_hopeless(scores: list[float], rows: int, needed: float, expected: bool) -> None:
    assert hopeless(scores, rows, needed) is expected


def test_a_curve_of_many_evaluations_is_judged_at_a_few() -> None:
    assert thinned([0.1, 0.2, 0.3], 6) == [0.1, 0.2, 0.3]
    many = [i / 15 for i in range(1, 16)]
    assert thinned(many, 15) == [3 / 15, 6 / 15, 9 / 15, 12 / 15, 15 / 15]
    # Two evaluations that begin on a plateau say nothing yet.
    assert hopeless([0.5, 0.5], 400, 0.9)
    assert not hopeless(thinned([0.5, 0.5], 15), 400, 0.9)


def test_all_looks_together_err_no_more_than_one_interval_of_both_sides() -> None:
    assert error_of(1) == 0.05  # an ordinary run's
    assert error_of(2) == 0.025
    # A lower bound is too high in half of an interval's errors.
    assert sum(error_of(look) / 2 for look in range(1, 60)) <= 0.05
    generator = np.random.default_rng(1)
    draws = np.stack([generator.normal(0.97, 0.01, 20_000), np.ones(20_000)], axis=1)
    widths = [np.ptp(retained_interval(draws, error_of(look))) for look in (1, 2, 3)]
    # Two-sided quantiles of the normal distribution: 1.960, 2.241, 2.498.
    assert widths == pytest.approx([0.0392, 0.0448, 0.0500], rel=0.03)
    assert retained_interval(draws) == retained_interval(draws, 0.05)


def test_candidates_that_lost_between_the_splits_make_the_next_bring_a_part_of_it() -> None:
    looks = Looks(0.97, np.array([0, 1]))
    assert looks.needed() == 0.97
    looks.learn(0.99, 0.95)
    assert looks.needed() == pytest.approx(0.99)
    looks.learn(0.99, 0.97)
    assert looks.needed() == pytest.approx(0.99)
    looks.learn(0.98, 0.98)
    assert looks.needed() == pytest.approx(0.985)
    looks.learn(0.90, 1.00)  # gains do not make it easier
    assert looks.needed() == 0.97


# Targets.


def test_shortfalls_say_which_bound_and_by_how_much() -> None:
    found = shortfalls(
        cost(ms=4.0, megabytes=40, speedup=2.0), target(p99_ms=5, max_mb=30, speedup=2.5)
    )
    assert [each.words for each in found] == [
        "p99 6.00 ms, 1.00 ms above 5 ms",
        "size 40.00 MB, 10.00 MB above 30 MB",
        "2.00 times the teacher's speed, 0.50 below 2.5",
    ]
    assert [each.share for each in found] == pytest.approx([0.2, 1 / 3, 0.25])
    assert (
        shortfalls(
            cost(ms=4.0, megabytes=30, speedup=2.5), target(p99_ms=6, max_mb=30, speedup=2.5)
        )
        == []
    )


def test_the_best_variant_is_the_fastest_that_meets_the_target() -> None:
    costs = (cost("fused", ms=1.0, megabytes=70), cost("int8", ms=2.0, megabytes=17))
    candidate = Candidate(shape=shape(2), costs=costs)
    assert candidate.best(target(p99_ms=5)).variant == "fused"
    assert candidate.best(target(p99_ms=5, max_mb=30)).variant == "int8"
    nowhere = target(max_mb=1)
    assert candidate.best(nowhere).variant == "int8"  # nearer to it
    measured = Candidate.measured(shape(2), costs, nowhere)
    assert measured.outcome == "too costly"
    assert measured.reason == "int8: size 17.00 MB, 16.00 MB above 1 MB"


def test_the_recipe_takes_its_thresholds_from_the_target() -> None:
    recipe = target(retain=0.99, margin=0.03, speedup=2).applied_to(load_recipe("smoke"))
    assert recipe.parity.min_retained == 0.99
    assert recipe.parity.min_retained_lower == pytest.approx(0.96)
    assert recipe.bench.batch_sizes == (1,)
    assert recipe.bench.lengths_tokens == (64,)
    assert recipe.distill == load_recipe("smoke").distill


@pytest.mark.parametrize(
    ("aim", "overrides", "expected", "hint"),
    [
        (target(), [], "is met by the teacher itself", "--p99-ms, --max-mb or --speedup"),
        (
            target(speedup=2),
            ["data.select_from=validation"],
            "the rows that judge them",
            "data.select_from=train",
        ),
    ],
)
def test_targets_that_mean_nothing_are_refused(
    aim: Target, overrides: list[str], expected: str, hint: str
) -> None:
    with pytest.raises(RecipeError, match=expected) as caught:
        aim.applied_to(load_recipe("smoke", overrides))
    assert hint in caught.value.hint


# What is said at the end.


def test_where_no_shape_is_cheap_enough_the_nearest_is_named(tmp_path: Path) -> None:
    aim = target(p99_ms=1)
    near = Candidate.measured(shape(1), (cost(ms=0.8),), aim)
    far = Candidate.measured(shape(3), (cost(ms=3.0),), aim)
    with pytest.raises(GateFailed, match="none of 2 shapes is cheap enough") as caught:
        check_found(report(aim, far, near), tmp_path)
    assert "nearest: 1 layer, 4 heads, feed-forward 128: too costly: " in caught.value.message
    assert "int8: p99 1.20 ms, 0.20 ms above 1 ms" in caught.value.message
    assert caught.value.exit_code == 1
    assert str(tmp_path / "fit.md") in caught.value.hint


def test_where_none_is_good_enough_the_best_is_named(tmp_path: Path) -> None:
    aim = target(p99_ms=9)
    worse = Candidate(shape=shape(1), costs=(cost(),)).ended(
        "given up", "0.7100 on select after 2 epochs", select_score=0.71
    )
    better = Candidate(shape=shape(2), costs=(cost(),)).ended(
        "failed the gate",
        "int8: accuracy retained is 0.955, expected at least 0.97",
        retained=0.955,
        retained_interval=(0.93, 0.98),
        look=1,
        select_score=0.84,
        variant="int8",
    )
    with pytest.raises(GateFailed, match="2 shapes are cheap enough and none is good") as caught:
        check_found(report(aim, worse, better), tmp_path)
    assert "nearest: 2 layers, 4 heads, feed-forward 128: failed the" in caught.value.message
    assert "int8: accuracy retained is 0.955, expected at least 0.97" in caught.value.message
    assert "validation rows" not in caught.value.hint
    unsure = better.ended("not shown", "int8, at look 1: accuracy retained is 0.975")
    with pytest.raises(GateFailed, match="none is shown to be good enough") as caught:
        check_found(report(aim, worse, unsure), tmp_path)
    assert "give more labelled validation rows" in caught.value.hint
    found = report(aim, worse, better).model_copy(update={"package": ("tiny-1", "int8")})
    check_found(found, tmp_path)


def test_the_page_has_every_candidate_and_says_what_was_done(tmp_path: Path) -> None:
    aim = target(speedup=1.5)
    gone = Candidate(shape=shape(1), costs=(cost(),)).ended(
        "given up", "0.71 after 2 epochs", select_score=0.71
    )
    judged = Candidate(
        shape=shape(2),
        costs=(cost(),),
        variant="int8",
        retained=0.95,
        look=1,
        retained_interval=(0.93, 1.0),
    )
    failed = judged.ended("failed the gate", "int8: too little")
    unsure = judged.ended("not shown", "int8: too few rows", shape=shape(5))
    found = judged.ended("found", "", shape=shape(3), retained=0.98, look=2)
    unused = Candidate(shape=shape(4), costs=(cost(speedup=1.2),))
    page = report(aim, gone, failed, unsure, found, Candidate.measured(shape(4), unused.costs, aim))
    text = markdown(page)
    assert [row[0] for row in rows(page)] == ["teacher", *(str(c.shape) for c in page.candidates)]
    assert "| 98.00% | 93.00% to 100.00% | found |" in text
    assert "- 1 layer, 4 heads, feed-forward 128: given up: 0.71 after 2 epochs" in text
    assert "too costly: int8: 1.20 times the teacher's speed, 0.30 below 1.5" in text
    assert "looked at 2 times" in caption(page)
    assert "The interval of the answer reaches below 97.00%; --margin 0" in caption(page)
    assert "looked at" not in caption(report(aim, gone))
    plot(page, tmp_path / "fit.svg")
    drawn = (tmp_path / "fit.svg").read_text()
    assert drawn.startswith("<?xml")
    for words in (
        "teacher",
        "target",
        "found",
        "distilled, failed the gate",
        "too costly",
        "distilled, not shown to be good enough",
    ):
        assert f"<!-- {words} -->" in drawn


def test_what_was_measured_is_not_measured_again_and_the_baseline_has_speed_one(
    tmp_path: Path,
) -> None:
    recipe, made = load_recipe("smoke"), list[str]()

    def clock(
        calls: dict[str, Call], ids: np.ndarray, seconds: float
    ) -> dict[str, list[list[float]]]:
        assert ids.shape == (1, 64)
        assert seconds == recipe.bench.seconds_per_cell
        made.append("measured")
        return {name: [[0.001 * (place + 1)] * 5] * 2 for place, name in enumerate(calls)}

    def systems() -> dict[str, System]:
        return {"teacher": (lambda _ids: None, 4), "fused": (lambda _ids: None, 2)}

    def stopwatch(**changes: float | None) -> Stopwatch:
        aim = target(**changes)
        return Stopwatch(recipe, aim, tmp_path / "shared" / "m.json", 50, clock=clock)

    first = stopwatch().measure("a shape", systems, ["fused"])
    assert [each.p50_ms for each in first] == pytest.approx([1.0, 2.0])
    assert [each.speedup for each in first] == pytest.approx([2.0, 1.0])
    assert stopwatch().measure("a shape", systems, ["fused"]) == first
    assert len(made) == 1
    assert [e.speedup for e in stopwatch().measure("another", systems)] == pytest.approx([1.0, 0.5])
    assert len(made) == 2


def test_a_busy_machine_is_measured_again_and_called_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Both systems are as fast as each other; somebody else slows some rounds.
    noise = iter([(1, 3, 1), (1, 2, 1), (1, 4, 1), (1, 1, 1)])

    def clock(
        calls: dict[str, Call], _ids: np.ndarray, _seconds: float
    ) -> dict[str, list[list[float]]]:
        factors = next(noise)
        return {name: [[0.001 * factor] * 4 for factor in factors] for name in calls}

    def systems() -> dict[str, System]:
        return {"teacher": (lambda _ids: None, 4), "int8": (lambda _ids: None, 2)}

    file = tmp_path / "shared" / "m.json"
    busy = Stopwatch(load_recipe("smoke"), target(), file, 50, clock=clock)
    found = busy.measure("a shape", systems, ["teacher"])
    assert [each.spread for each in found] == [2, 2]  # the calmest of the three
    assert [each.speedup for each in found] == [1, 1]  # they took turns
    assert "others use this machine" in caplog.text
    # A search that goes on decides as before, unless it is told to measure again.
    again = Stopwatch(load_recipe("smoke"), target(), file, 50, clock=clock)
    assert again.measure("a shape", systems, ["teacher"]) == found
    assert f"delete {file}" in caplog.text
    file.unlink()
    idle = Stopwatch(load_recipe("smoke"), target(), file, 50, clock=clock)
    assert [each.spread for each in idle.measure("a shape", systems, ["teacher"])] == [1, 1]
    text = caption(report(target()).model_copy(update={"untrained_teacher": found}))
    assert "The machine was busy: rounds of the same calls differ by up to 2.0 times" in text
    assert "busy" not in caption(report(target()))


def test_two_searches_at_once_keep_what_the_other_has_measured(tmp_path: Path) -> None:
    file = tmp_path / ".shared" / "measured.json"
    measured = list[int]()

    def clock(
        calls: dict[str, Call], _ids: np.ndarray, _seconds: float
    ) -> dict[str, list[list[float]]]:
        measured.append(1)
        return {name: [[0.001] * 10] for name in calls}

    def systems() -> dict[str, System]:
        return {"fused": (lambda _ids: None, 2)}

    ours, theirs, third = (
        Stopwatch(load_recipe("smoke"), target(), file, 50, clock=clock) for _ in range(3)
    )
    ours.measure("one shape", systems)
    theirs.measure("another", systems)
    third.measure("a third", systems)
    assert len(measured) == 3
    last = Stopwatch(load_recipe("smoke"), target(), file, 50, clock=clock)
    for shape_name in ("one shape", "another", "a third"):
        last.measure(shape_name, systems)
    assert len(measured) == 3
    assert (file.parent / ".lock").is_file()


def test_what_was_measured_first_counts_for_all(tmp_path: Path) -> None:
    file = tmp_path / ".shared" / "measured.json"
    seconds = iter([0.001, 0.002])

    def clock(
        calls: dict[str, Call], _ids: np.ndarray, _seconds: float
    ) -> dict[str, list[list[float]]]:
        value = next(seconds)
        return {name: [[value] * 10] for name in calls}

    def systems() -> dict[str, System]:
        return {"fused": (lambda _ids: None, 2)}

    ours, theirs = (
        Stopwatch(load_recipe("smoke"), target(), file, 50, clock=clock) for _ in range(2)
    )
    first = ours.measure("one shape", systems)
    assert theirs.measure("one shape", systems) == first  # though it has measured something else
    again = Stopwatch(load_recipe("smoke"), target(), file, 50, clock=clock)
    assert again.measure("one shape", systems) == first


def test_lists_of_numbers() -> None:
    assert numbers("--layers", "2, 3") == (2, 3)
    assert numbers("--layers", None) == ()
    for wrong in ("", "two", "2,,3", "0", "-1", "1.5"):
        with pytest.raises(UserError, match="--layers: expected whole numbers above 0") as caught:
            numbers("--layers", wrong)
        assert caught.value.exit_code == 2


def test_every_outcome_has_its_place_in_the_plot() -> None:
    drawn = [outcome for _, _, outcomes in _GROUPS.values() for outcome in outcomes]
    assert sorted(drawn) == sorted(get_args(Outcome))
