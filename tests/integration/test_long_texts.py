"""Long texts, from the training to HTTP: read in windows, cut, or refused."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from ad2kit.exporting.export import export
from ad2kit.gate.parity import judge
from ad2kit.run.errors import ModelError
from ad2kit.run.folder import open_run
from ad2kit.run.recipe import load_recipe
from ad2kit.training.distill import distill, teach
from bench.long_texts import both as both_ways
from bench.long_texts import rows, write
from tests import families
from tests.conftest import TINY_STEPS
from tests.models import LABELS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bench.long_texts import Measured
    from tests.conftest import Both, Outcome

pytestmark = pytest.mark.slow

# A tiny BERT that learns a few opinions at the end of texts of two to four windows.
ROWS, TOKENS, OPINIONS = (320, 160), (20, 30), 4
OVERRIDES = (
    "data.text_columns=[text]",
    "data.max_length_tokens=16",
    "data.window_overlap_tokens=4",
    "data.max_train_rows=null",
    "bench.lengths_tokens=null",
    "export.variants=[fp32]",
    "parity.min_retained=0.5",
    "parity.min_retained_lower=0.3",
    *(
        f"{phase}.{key}={value}"
        for phase, updates in (("teacher.finetune", 200), ("distill", 120))
        for key, value in {
            "epochs": 1,
            "min_updates": updates,
            "evaluations": 8,
            "batch_size": 16,
            "lr": 2e-3,
            "checkpoint_every_steps": 1000,
        }.items()
    ),
    "distill.hard_label_weight=1",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    folder = tmp_path_factory.mktemp("long-texts")
    write(folder / "rows", 5, ROWS, TOKENS, OPINIONS)
    return both_ways("smoke", folder, OVERRIDES)


def test_windows_find_the_evidence_at_the_end_and_cutting_does_not(
    found: dict[str, Measured],
) -> None:
    windows, cut = found["windows"], found["cut"]
    assert windows.teacher > 0.9
    assert windows.student >= 0.99 * windows.teacher
    assert windows.student >= cut.student + 0.2
    assert windows.windows > 1.8 * ROWS[1]
    assert cut.windows == ROWS[1]


def test_the_service_answers_what_the_artefact_says_of_long_texts(
    found: dict[str, Measured],
) -> None:
    for measured in found.values():
        assert measured.http == pytest.approx(measured.student)
        assert measured.gap < 1e-5


def test_what_is_too_long_is_refused_before_any_training_and_the_advice_helps(
    both: Callable[..., Both], tmp_path: Path
) -> None:
    write(tmp_path / "rows", 5, (80, 40), TOKENS, OPINIONS)
    shared = (
        f"data.source={tmp_path / 'rows'}",
        "data.text_columns=[text]",
        "data.max_length_tokens=16",
        "teacher.model=random://bert",
        "bench.lengths_tokens=[8]",
    )
    for overrides, expected, advice in (
        (["data.long_texts=refuse"], "expected at most 16 tokens", "data.long_texts=windows"),
        (
            ["data.long_texts=windows", "data.max_windows=2"],
            "expected at most 2 windows of 16 tokens",
            "data.long_texts=cut",
        ),
    ):
        refused = both(*shared, *overrides)
        assert refused.code == 2
        assert re.search(r"\d+ of 64 train texts are too long: " + expected, refused.err)
        assert advice in refused.hint
        assert both(*shared, *overrides[1:], advice).code == 0


def pairs(folder: Path, words: tuple[int, int]) -> tuple[str, ...]:
    """Overrides that read pairs whose first and second texts have so many words."""
    folder.mkdir()
    for name, count in (("train", 60), ("validation", 20)):
        lines = ["first,text,label,said"]
        for row in range(count):
            first, second = (" ".join(["fine", "dull"][row % 2] for _ in range(n)) for n in words)
            label = LABELS[row % 2]
            lines.append(f"{first} {name[0]} {row},{second},{label},{label}")
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return (
        *(f"data.source={folder}", "data.text_columns=[first,text]"),
        *("data.max_length_tokens=16", "bench.lengths_tokens=[8]"),
    )


GIVEN = "teacher={model: null, finetune: null, accept: true, answers: [{label: said}]}"
SEVERAL = GIVEN.replace("{label: said}", "{model: 'FOLDER/teacher'}")
ADVICE = {
    "pairs": (4, 40, ["data.long_texts=refuse"], "data.long_texts=windows"),
    "first text": (40, 4, ["data.long_texts=refuse"], "data.long_texts=cut"),
    "first text in windows": (40, 4, ["data.long_texts=windows"], "data.long_texts=cut"),
    "one window": (
        *(4, 20),
        ["data.long_texts=windows", "data.max_windows=1"],
        "data.max_windows=32",
    ),
    "another tokenizer": (
        *(4, 40),
        ["data.long_texts=refuse", "student.model=FOLDER/student", "student.layers=null"],
        "data.long_texts=cut",
    ),
    "given answers": (
        *(4, 40),
        ["data.long_texts=refuse", GIVEN, "student.model=FOLDER/student"],
        "data.long_texts=cut",
    ),
    "several teachers": (
        *(4, 5),
        ["data.long_texts=refuse", SEVERAL, "student.model=FOLDER/other"],
        "data.long_texts=cut",
    ),
}


@pytest.mark.parametrize("case", ADVICE)
def test_the_advice_on_long_texts_can_be_followed(
    ad2kit: Callable[..., Outcome], tmp_path: Path, case: str
) -> None:
    first, second, overrides, advice = ADVICE[case]
    families.save("bert", tmp_path / "teacher")
    families.save("roberta", tmp_path / "student")
    families.save("bert", tmp_path / "other")
    if case == "several teachers":  # only the teacher has tokens for letters alone
        spelling(tmp_path / "teacher")
    own = [each.replace("FOLDER", str(tmp_path)) for each in overrides]
    common = [each for each in TINY_STEPS if not each.startswith("data.max_length")]
    if any(each.startswith("teacher=") for each in own):
        common = [each for each in common if not each.startswith("teacher.")]
    else:
        own = [f"teacher.model={tmp_path / 'teacher'}", *own]
    settings = (*pairs(tmp_path / "rows", (first, second)), *common, *own)
    refused = ad2kit("check", "smoke", *settings)
    assert refused.code == 2, refused.err
    assert "texts are too long" in refused.err
    hint = refused.err.rpartition("\n  -> ")[2]
    followed = [each for each in settings if not each.startswith(advice.partition("=")[0])]
    assert advice.replace("=32", "") in hint
    assert ("long_texts=windows" in hint) == (advice == "data.long_texts=windows")
    assert ("raise data.max_windows" in hint) == (advice == "data.max_windows=32")
    assert ad2kit("check", "smoke", *followed, advice).code == 0


def spelling(folder: Path) -> None:
    """Take the words out of a vocabulary, but for single letters."""
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text())
    vocabulary = settings["model"]["vocab"]
    kept = [each for each in vocabulary if each.startswith(("[", "##")) or len(each) == 1]
    settings["model"]["vocab"] = {
        each if each in kept else f"{each}{number}~": number for each, number in vocabulary.items()
    }
    file.write_text(json.dumps(settings))


def test_a_student_with_other_windows_than_its_teacher_is_refused(
    both: Callable[..., Both], tmp_path: Path
) -> None:
    families.save("bert", tmp_path / "teacher")
    families.save("roberta", tmp_path / "student")
    given = (
        f"student.model={tmp_path / 'student'}",
        "student.layers=null",
        "data.max_length_tokens=16",
        "bench.lengths_tokens=[8]",
    )
    refused = both(*given, "data.long_texts=windows")
    assert refused.code == 2
    assert "the student has a tokenizer of its own" in refused.err
    assert "data.long_texts=cut" in refused.hint
    assert both(*given, "data.long_texts=cut").code == 0


def test_windows_of_pairs_pass_the_gate(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for seed, name in enumerate(("train", "validation")):
        lines = ["first,text,label"]
        lines += [
            f"{number} stars,{row['text'].replace(',', '')},{row['label']}"
            for number, row in enumerate(rows(seed, 60, (8, 60), OPINIONS))
        ]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    own = {"data.text_columns": "[first,text]", "data.max_length_tokens": 24}
    changed: dict[str, Any] = own | {
        "data.source": folder,
        "data.long_texts": "windows",
        "data.window_overlap_tokens": 3,
        "export.variants": "[fp32,fused]",
        "teacher.finetune.min_updates": 1,
        "distill.min_updates": 1,
    }
    kept = [each for each in OVERRIDES if each.partition("=")[0] not in changed]
    overrides = [*kept, *(f"{key}={value}" for key, value in changed.items())]
    run = open_run(load_recipe("smoke", overrides), tmp_path / "runs")
    distill(run)
    export(run)
    report = judge(run)
    for variant in report.variants:
        failed = [
            check.words
            for check in variant.checks
            if check.question != "distillation quality" and not check.passed
        ]
        assert failed == []
        assert any(check.name == "long texts with other segment ids" for check in variant.checks)


def test_a_teacher_of_another_run_is_held_against_the_student_too(tmp_path: Path) -> None:
    own = ("data.long_texts=windows", "data.max_length_tokens=32", "bench.lengths_tokens=[8]")
    kept = [each for each in TINY_STEPS if not each.startswith("data.max_length")]
    teach(open_run(load_recipe("smoke", [*kept, *own]), tmp_path / "runs"))
    student = f"student.model={families.save('roberta', tmp_path / 'student')}"
    run = open_run(load_recipe("smoke", [*kept, *own, student]), tmp_path / "runs")
    with pytest.raises(ModelError, match="the student has a tokenizer of its own"):
        distill(run)
