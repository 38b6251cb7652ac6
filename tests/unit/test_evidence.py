"""What so many rows can show: each number of rows is tried on simulated tables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy.stats import binom, binomtest, pearsonr

from ad2kit.data.labels import NO_CLASS
from ad2kit.data.mapped import TokenRows
from ad2kit.data.splits import Encoded
from ad2kit.exporting.conversion import agreement, agrees, conversion_cost
from ad2kit.exporting.records import Check, RowsNeeded
from ad2kit.gate.questions import Reference, distillation_quality
from ad2kit.gate.records import ParityReport, VariantParity, check_passed
from ad2kit.gate.summary import untested_words
from ad2kit.run.errors import GateFailed
from ad2kit.run.sections import ParityRecipe
from ad2kit.statistics import sample_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ad2kit.run.sections import Task

TABLES = 100
# So many of a hundred tables are "about 80": three standard errors to either side.
ABOUT = (68, 92)


def logits_of(answers: NDArray[Any], classes: int) -> NDArray[np.float32]:
    """Logits that give these classes, or these labels (shape [rows, labels])."""
    if answers.ndim == 2:
        return (2 * answers - 1).astype(np.float32)
    logits: NDArray[np.float32] = np.eye(classes, dtype=np.float32)[answers]
    return logits


def judged(
    labels: NDArray[Any],
    teacher: NDArray[Any],
    student: NDArray[Any],
    classes: int = 2,
    samples: int = 400,
    **thresholds: float,
) -> VariantParity:
    """What the gate says of answers."""
    task: Task = "multi_label" if labels.ndim == 2 else "single_label"
    theirs, ours = (logits_of(each, classes) for each in (teacher, student))
    none = np.zeros(len(labels), dtype=bool)
    encoded = Encoded(TokenRows.of([[1]] * len(labels)), None, labels, none)
    metric: Any = "micro_f1" if task == "multi_label" else "accuracy"
    reference = Reference.of(
        task, (metric,), encoded, teacher=theirs, student=ours, student_left=ours
    )
    names = tuple(f"c{index}" for index in range(classes))
    recipe = ParityRecipe(bootstrap_samples=samples, **thresholds)  # type: ignore[arg-type]
    return distillation_quality("fp32", "", ours, reference, names, (), recipe, 0)


def check_of(verdict: VariantParity, name: str) -> Check:
    (found,) = [check for check in verdict.checks if check.name == name]
    return found


def report_of(*variants: VariantParity) -> ParityReport:
    return ParityReport(
        inputs="",
        thresholds=ParityRecipe(),
        rows=100,
        truncated=0,
        teacher_score=0.9,
        teacher_metrics={},
        teacher_ece=None,
        student_score=0.9,
        answers_sha256=None,
        variants=variants,
    )


def cells(shares: tuple[float, ...], rows: int, seed: int | None = None) -> tuple[Any, Any, Any]:
    """Labels, teacher and student, right both, only student, only teacher, neither; or drawn."""
    counts = np.round(np.array(shares) * rows).astype(int)
    if seed is not None:
        counts = np.random.default_rng(seed).multinomial(rows, shares)
    kind = np.repeat(np.arange(4), counts)
    labels = np.arange(len(kind)) % 2
    teacher = np.where(np.isin(kind, (0, 2)), labels, 1 - labels)
    student = np.where(np.isin(kind, (0, 1)), labels, 1 - labels)
    return labels, teacher, student


# A teacher of 0.90, and students that retain 100 %, 98.9 % and 80 % of it.
GOOD, FAIR, BAD = (0.85, 0.05, 0.05, 0.05), (0.85, 0.04, 0.05, 0.06), (0.70, 0.02, 0.20, 0.08)


@pytest.mark.parametrize("shares", [GOOD, FAIR])
def test_too_few_rows_do_not_show_it_and_the_number_that_is_named_does(
    shares: tuple[float, ...],
) -> None:
    few = check_of(judged(*cells(shares, 100), samples=2000), "accuracy retained")
    assert few.verdict == "not shown"
    assert few.needed is not None
    assert few.needed.rows is not None
    assert few.needed.truth == pytest.approx(few.value)  # the table is the population in small
    assert few.needed.rows > 100
    assert f"about {few.needed.rows:,} validation rows show a true value of" in few.words
    found = [
        check_of(judged(*cells(shares, few.needed.rows, seed)), "accuracy retained").verdict
        for seed in range(TABLES)
    ]
    assert ABOUT[0] <= found.count("passed") <= ABOUT[1]
    assert "FAILED" not in found
    # The control: a third of these rows are not enough.
    third = [
        check_of(judged(*cells(shares, few.needed.rows // 3, seed)), "accuracy retained").passed
        for seed in range(TABLES)
    ]
    assert sum(third) < 60


def test_a_clearly_bad_student_has_failed_and_is_not_called_too_few_rows() -> None:
    verdict = judged(*cells(BAD, 600))
    check = check_of(verdict, "accuracy retained")
    assert check.interval is not None
    assert check.interval[1] < 0.97
    assert (check.verdict, verdict.verdict) == ("FAILED", "FAILED")
    assert "not shown" not in check.words
    assert verdict.reasons()[0] == check.words
    # On few rows nobody can tell, and that is what is said.
    few = check_of(judged(*cells((0.8, 0.05, 0.1, 0.05), 60)), "accuracy retained")
    assert few.value < 0.97
    assert few.verdict == "not shown"


def test_a_student_that_equals_its_teacher_on_a_handful_of_rows_has_shown_little() -> None:
    """All draws of a bootstrap are equal then, and their interval is a point."""
    for rows, expected in ((30, "not shown"), (100, "passed")):
        labels, teacher, _ = cells(GOOD, rows)
        check = check_of(judged(labels, teacher, teacher), "accuracy retained")
        assert check.value == 1.0
        assert check.verdict == expected
        assert check.interval is not None
        unseen = 1 - 0.025 ** (1 / len(labels))
        assert 1 - check.interval[0] == pytest.approx(unseen / (teacher == labels).mean())


@pytest.mark.parametrize(
    ("shares", "rows", "labelled", "all_of_them", "kept"),
    [
        # Enough rows to show it of a student that is as good as its teacher.
        pytest.param(FAIR, 200, 199, "not shown", "not shown", id="one row lacks its label"),
        pytest.param(FAIR, 1000, 100, "passed", None, id="too few labels"),
        # Below the target: 15 of 18 right, where the teacher has 18.
        pytest.param(
            (0.9, 0.0, 0.1, 0.0), 30, 29, "not shown", "not shown", id="on the wrong side"
        ),
        pytest.param(GOOD, 2000, 1999, "passed", "passed", id="shown"),
        pytest.param(BAD, 600, 300, "FAILED", "FAILED", id="failed"),
    ],
)
def test_a_row_without_a_label_switches_no_rule_off(
    shares: tuple[float, ...], rows: int, labelled: int, all_of_them: str, kept: str | None
) -> None:
    labels, teacher, student = cells(shares, rows)
    order = np.random.default_rng(1).permutation(rows)
    whole = judged(labels[order], teacher[order], student[order], samples=2000)
    assert check_of(whole, "accuracy retained").verdict == all_of_them
    # The labelled rows are a table of the same shares.
    known, theirs, ours = cells(shares, labelled)
    some = np.concatenate([known, np.full(rows - labelled, NO_CLASS)])
    rest = theirs[np.arange(rows - labelled) % labelled]
    verdict = judged(
        some, np.concatenate([theirs, rest]), np.concatenate([ours, rest]), samples=2000
    )
    found = [check for check in verdict.checks if check.name == "accuracy retained"]
    assert [check.verdict for check in found] == ([] if kept is None else [kept])


@pytest.mark.parametrize("truth", [0.9925, 0.997])
def test_the_rows_that_agreement_needs_are_about_enough(truth: float) -> None:
    thresholds = ParityRecipe()
    rows = sample_size.rows_for_share(
        truth, thresholds.min_agreement, thresholds.min_agreement_lower
    )
    assert rows is not None
    generator = np.random.default_rng(1)

    def passed(rows: int) -> int:
        tables = generator.binomial(rows, truth, size=TABLES)
        found = [
            agrees("conversion cost", "", sample_size.share(k, rows), thresholds) for k in tables
        ]
        return sum(check.passed for check in found)

    assert ABOUT[0] <= passed(rows) <= 95  # the chance moves in teeth
    assert passed(rows // 3) < 40


def test_agreement_is_three_valued_by_an_exact_interval() -> None:
    thresholds = ParityRecipe()

    def verdict(agreeing: int, rows: int) -> str:
        share = sample_size.share(agreeing, rows)
        expected = binomtest(agreeing, rows).proportion_ci(0.95, method="exact")
        assert share.interval == pytest.approx((expected.low, expected.high))
        return agrees("conversion cost", "", share, thresholds).verdict

    assert verdict(864, 872) == "passed"
    assert verdict(100, 100) == "not shown"  # 0.9638 to 1
    assert verdict(122, 122) == "passed"
    assert verdict(98, 100) == "not shown"  # may be 0.9976
    assert verdict(93, 100) == "FAILED"
    assert verdict(0, 10) == "FAILED"


def test_answers_of_several_labels_count_by_rows_and_not_by_cells() -> None:
    ours = np.ones((50, 20), dtype=np.float32)
    theirs = ours.copy()
    theirs[0] = -1  # one text on which all labels differ
    found = agreement("multi_label", ours, theirs)
    assert found.value == pytest.approx(49 / 50)
    assert found.rows == 50
    assert found.interval == pytest.approx(sample_size.share(49, 50).interval)


def test_the_interval_of_a_correlation_is_fishers() -> None:
    generator = np.random.default_rng(0)
    first = generator.normal(size=60)
    second = first + 0.2 * generator.normal(size=60)
    found = sample_size.correlation(float(pearsonr(first, second).statistic), 60)
    assert found.interval == pytest.approx(tuple(pearsonr(first, second).confidence_interval()))
    assert sample_size.correlation(1.0, 60).interval == pytest.approx((1, 1))
    rows = sample_size.rows_for_correlation(0.99, 0.985, 0.97)
    assert rows is not None
    tables = []
    for _ in range(TABLES):
        x = generator.normal(size=(rows, 1)).astype(np.float32)
        y = 0.99 * x + math.sqrt(1 - 0.99**2) * generator.normal(size=(rows, 1)).astype(np.float32)
        tables.append(
            agrees("conversion cost", "", agreement("regression", x, y), ParityRecipe()).passed
        )
    assert ABOUT[0] <= sum(tables) <= ABOUT[1]


def test_points_lost_have_an_interval_and_a_limit() -> None:
    labels = np.arange(300) % 2
    fp32, converted = logits_of(labels, 2), logits_of(labels, 2)
    converted[:6] = converted[:6, ::-1]  # two points lost
    none = np.zeros(300, dtype=bool)
    reference = Reference(
        "single_label",
        ("accuracy",),
        labels,
        fp32,
        fp32,
        Encoded(TokenRows.of([[1]] * 300), None, labels, none),
        student_left=fp32,
    )
    found = conversion_cost(converted, converted, fp32, reference, ParityRecipe(), seed=0)
    lost = found[-1]
    assert (lost.name, lost.limit) == ("points lost to fp32", 3.0)
    assert lost.value == pytest.approx(2.0)
    assert lost.interval is not None
    assert lost.interval[0] < 1.0 < 2.0 < lost.interval[1]
    assert lost.verdict == "not shown"
    assert "expected at most 1, its interval up to 3" in lost.words
    for points, verdict in ((0.0, "passed"), (9.0, "FAILED")):
        other = fp32.copy()
        wrong = int(points * 3)
        other[:wrong] = other[:wrong, ::-1]
        check = conversion_cost(other, other, fp32, reference, ParityRecipe(), seed=0)[-1]
        assert check.verdict == verdict
    # What only compares candidates takes the value alone.
    assert (
        conversion_cost(converted, converted, fp32, reference, ParityRecipe())[-1].interval is None
    )


def test_a_teacher_on_too_few_rows_is_not_called_worse_than_the_most_frequent_label() -> None:
    name = "teacher accuracy, against the most frequent label"

    def verdict(rows: int, right: float) -> str:
        labels = (np.arange(rows) % 10 < 4).astype(int)  # the most frequent: 60 %
        teacher = np.where(np.arange(rows) < right * rows, labels, 1 - labels)
        return check_of(judged(labels, teacher, teacher), name).verdict

    assert [verdict(40, 0.55), verdict(2000, 0.5), verdict(40, 0.65)] == [
        "not shown",
        "FAILED",
        "passed",
    ]


def test_a_lost_class_with_many_rows_fails_and_one_with_three_is_listed() -> None:
    for rare, expected in ((20, "FAILED"), (3, "passed")):
        labels = np.repeat([0, 1, 2], [400, 400, rare])
        student = np.where(labels == 2, 1, labels)
        verdict = judged(labels, labels, student, classes=3)
        check = check_of(verdict, "classes that the student lost")
        assert (check.verdict, check.interval) == (expected, None)
        assert verdict.untested_classes == ({} if expected == "FAILED" else {"c2": 3})
        assert ("lost: c2 (0 of the 20 rows of its teacher)" in check.words) is (rare == 20)
        assert check_of(verdict, "accuracy retained").passed  # accuracy hardly notices


def test_a_lost_label_of_several_is_found_alike() -> None:
    for rare, expected in ((20, "FAILED"), (3, "passed")):
        labels = np.zeros((600, 3), dtype=np.int64)
        labels[:300, 0] = labels[200:600, 1] = labels[:rare, 2] = 1
        student = labels.copy()
        student[:, 2] = 0
        verdict = judged(labels, labels, student, classes=3)
        assert check_of(verdict, "labels that the student lost").verdict == expected
        assert verdict.untested_classes == ({} if expected == "FAILED" else {"c2": 3})


def test_a_class_is_lost_below_half_and_not_where_it_is_given_less_often() -> None:
    teacher = np.repeat([0, 1], [400, 400])

    def lost(kept: int) -> tuple[int, ...]:
        student = np.where(np.arange(800) < 800 - kept, 0, teacher)
        return sample_size.lost_classes("single_label", student, teacher, 2).lost

    assert lost(120) == (1,)
    assert lost(200) == lost(260) == ()  # half of its rows; fewer than the teacher, but most
    generator = np.random.default_rng(0)
    by_hand = sample_size.lost_classes("single_label", np.zeros(800, dtype=int), teacher, 2)
    assert (by_hand.given.tolist(), by_hand.kept.tolist()) == ([400, 400], [400, 0])
    unanswered = generator.integers(2, size=50)
    assert sample_size.lost_classes("single_label", unanswered, unanswered, 9).too_few == ()


def test_of_150_classes_that_are_not_lost_one_is_rarely_called_so() -> None:
    """At the border itself, where the student gives each on half of the rows."""
    generator, false = np.random.default_rng(3), 0
    uncorrected = 0
    for _ in range(TABLES):
        teacher = np.repeat(np.arange(150), generator.integers(12, 60, size=150))
        kept = generator.random(len(teacher)) < 0.5
        student = np.where(kept, teacher, (teacher + 1) % 150)
        found = sample_size.lost_classes("single_label", student, teacher, 150)
        false += bool(found.lost)
        uncorrected += bool((binom.cdf(found.kept, found.given, 0.5) <= 0.05).any())
    assert false <= 11  # 5 expected at the most
    assert uncorrected > 90  # without a correction nearly every table has one


def test_holm_finds_what_bonferroni_does_not() -> None:
    """Nine classes are plainly lost; the tenth is judged as the only one that is left."""
    rows = [40] * 9 + [5]
    teacher = np.repeat(np.arange(10), rows)
    student = np.full(len(teacher), 10)
    found = sample_size.lost_classes("single_label", student, teacher, 11)
    assert found.lost == tuple(range(10))
    assert found.too_few == ()
    assert sample_size.least_rows_of_a_class(10) == 8  # 2**-8 is below 0.05 / 10


@pytest.mark.parametrize(
    ("value", "interval", "limit", "bound", "expected"),
    [
        (0.98, (0.96, 1.0), 0.95, "at least", "passed"),
        (0.98, (0.94, 1.0), 0.95, "at least", "not shown"),
        (0.96, (0.955, 0.98), 0.95, "at least", "not shown"),
        (0.96, (0.955, 0.965), 0.95, "at least", "FAILED"),
        (math.nan, (math.nan, math.nan), 0.95, "at least", "FAILED"),
        (0.98, None, None, "at least", "passed"),
        (0.96, None, None, "at least", "FAILED"),
        (0.98, (0.5, 1.0), None, "at least", "passed"),
        (0.98, (0.975, 0.99), 0.99, "at most", "FAILED"),
        (0.98, (0.96, 0.99), 0.99, "at most", "not shown"),
        (0.97, (0.96, 0.98), 0.99, "at most", "passed"),
        (0.97, (0.96, 0.995), 0.99, "at most", "not shown"),
    ],
)
def test_three_values_of_a_check(
    value: float, interval: Any, limit: float | None, bound: Any, expected: str
) -> None:
    check = Check(
        question="conversion cost",
        name="x",
        value=value,
        bound=bound,
        threshold=0.97,
        interval=interval,
        limit=limit,
    )
    assert (check.verdict, check.passed) == (expected, expected == "passed")


def test_more_rows_are_not_promised_where_there_are_enough() -> None:
    needed = RowsNeeded(truth=0.985, rows=314, present=640)
    assert "more rows alone will hardly show it" in needed.words
    assert "these are 100" in RowsNeeded(truth=0.985, rows=314, present=100).words
    assert "no number" in RowsNeeded(truth=1.0, rows=None, present=100).words
    assert sample_size.rows_for_mean(0.97, 0.97, 0.95, 0.3) is None  # at the target itself
    assert sample_size.rows_for_share(1.0, 0.985, 1.0) is None


def test_a_verdict_belongs_to_the_best_variant() -> None:
    good = judged(*cells(GOOD, 2000))
    unsure, bad = judged(*cells(GOOD, 100)), judged(*cells(BAD, 2000))
    assert [v.verdict for v in (good, unsure, bad)] == ["passed", "not shown", "FAILED"]

    found = [report_of(*some).verdict for some in ((bad, unsure), (bad, unsure, good), (bad,))]
    assert found == ["not shown", "passed", "FAILED"]
    needed = check_of(unsure, "accuracy retained").needed
    assert needed is not None
    assert report_of(bad, unsure).rows_that_would_do() == needed.rows
    assert report_of(bad, good).rows_that_would_do() is None


def test_the_error_names_the_cure_of_each_verdict() -> None:
    unsure, bad = judged(*cells(GOOD, 100)), judged(*cells(BAD, 2000))
    # The value is too low, and of rows there are enough to show a better one.
    low = judged(*cells((0.82, 0.03, 0.06, 0.09), 900))
    assert (low.verdict, report_of(low).rows_that_would_do()) == ("not shown", None)
    for variant, words, hint in (
        (unsure, "is not shown to be passed by 100 validation rows", "labelled validation rows"),
        (low, "hardly show it", "more validation rows alone will hardly do"),
        (bad, "the parity gate of run failed", "the reason is the student"),
    ):
        with pytest.raises(GateFailed) as caught:
            check_passed(report_of(variant), Path("run"), report=Path("run/parity.json"))
        assert words in caught.value.message
        assert hint in caught.value.hint
        assert "run/parity.json" in caught.value.hint


def test_classes_with_too_few_rows_are_named_in_words() -> None:
    labels = np.concatenate([np.repeat([0, 1], 300), np.arange(2, 20)])
    verdict = judged(labels, labels, labels, classes=20, samples=100)
    assert verdict.passed
    assert verdict.untested_classes == {f"c{index}": 1 for index in range(2, 20)}
    words = untested_words(report_of(verdict))
    assert words.startswith("The teacher gives these on too few validation texts")
    assert words.endswith(
        "c2 (1), c3 (1), c4 (1), c5 (1), c6 (1), c7 (1), c8 (1), c9 (1), "
        "c10 (1), c11 (1), c12 (1), c13 (1) and 6 more."
    )
    assert untested_words(report_of(judged(*cells(GOOD, 500)))) == ""


def test_the_numbers_of_the_readme() -> None:
    recipe = ParityRecipe()
    bounds = recipe.min_retained, recipe.min_retained_lower
    assert sample_size.rows_for_mean(1.0, *bounds, math.sqrt(0.1)) == 314
    # By hand: the limit binds, and (2.8016 * sqrt(0.1) / 0.05)**2 is 313.96.
    agree = recipe.min_agreement, recipe.min_agreement_lower
    assert sample_size.rows_for_share(0.9925, *agree) == 290
