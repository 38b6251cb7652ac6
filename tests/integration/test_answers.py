"""Teachers that are given by their answers: tables of logits, probabilities, labels; several."""

from __future__ import annotations

import csv
import json
import shutil
from html import unescape
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import binomtest

from ad2kit.campaigns.run import export_teacher
from ad2kit.data import splits
from ad2kit.data.demo_reviews import opinions
from ad2kit.exporting.export import export
from ad2kit.gate.parity import judge
from ad2kit.gate.records import BentoRecord, ParityReport
from ad2kit.models import given, text_model
from ad2kit.models.records import TeacherReport
from ad2kit.models.text_model import predict_logits
from ad2kit.run import recipe as recipes
from ad2kit.run.errors import ModelError
from ad2kit.run.folder import RunDir, open_run
from ad2kit.statistics.logits import scores, softmax
from ad2kit.statistics.metrics import expected_calibration_error
from ad2kit.training.distill import distill, teach
from tests import families
from tests.conftest import QUICK, TINY_STEPS
from tests.models import LABELS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from tests.conftest import Outcome

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def student(finished_run: RunDir) -> tuple[str, ...]:
    """Overrides: every student here starts from the same encoder, whatever its teacher is."""
    return (*QUICK, f"student.model={finished_run.teacher}")


@pytest.fixture(scope="module")
def local(
    finished_run: RunDir, student: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> RunDir:
    """A run whose teacher is a model. Do not change it."""
    teacher = f"teacher={{model: '{finished_run.teacher}', finetune: null, accept: true}}"
    recipe = recipes.load_recipe("smoke", (*student, teacher))
    run = open_run(recipe, tmp_path_factory.mktemp("local"))
    distill(run)
    return run


@pytest.fixture(scope="module")
def answers(local: RunDir) -> dict[tuple[str, ...], Any]:
    """The logits of that teacher for each text, as the run itself has computed them."""
    recipe = local.recipe
    data = splits.load_data(recipe.data, recipe.seed)
    teacher = text_model.load_model(local.teacher, data.labels, data.task)
    (stored,) = (local.shared / "logits").iterdir()
    logits = {"train": load_file(stored)["logits"]}
    for name, split in (("select", data.select), ("validation", data.validation)):
        encoded = splits.encode(split, teacher.tokenizer, recipe.data.length)
        logits[name] = predict_logits(teacher, encoded, torch.device("cpu"))
    return {
        texts: row
        for name, rows in logits.items()
        for texts, row in zip(data.splits()[name].texts, rows.numpy(), strict=True)
    }


def write(path: Path, header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([header, *rows])
    return path


def given_by(*members: str) -> str:
    """The override that makes these answers the teacher."""
    answers = f"[{', '.join(members)}]"
    return f"teacher={{model: null, finetune: null, accept: true, answers: {answers}}}"


def given_run(runs: Path, student: tuple[str, ...], *members: str) -> RunDir:
    """A run whose teacher is given by its answers; it is not distilled yet."""
    return open_run(recipes.load_recipe("smoke", (*student, given_by(*members))), runs)


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.student / "model.safetensors")


def same_weights(one: RunDir, other: RunDir) -> bool:
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_a_file_of_a_teachers_logits_gives_its_student_bit_for_bit(
    ad2kit: Callable[..., Outcome],
    local: RunDir,
    student: tuple[str, ...],
    answers: dict[tuple[str, ...], Any],
    tmp_path: Path,
) -> None:
    file = write(
        tmp_path / "logits.csv",
        ("text", "no", "yes"),
        ((*texts, *map(repr, row.tolist())) for texts, row in answers.items()),
    )
    run = given_run(tmp_path / "runs", student, f"{{files: ['{file}'], logits: [no, yes]}}")
    report = distill(run)
    assert same_weights(run, local)
    assert report.teacher_parameters is None
    # Columns in another order than the labels are refused before anything is trained.
    swapped = f"{{files: ['{file}'], logits: [yes, no]}}"
    refused = ad2kit("check", "smoke", *student, given_by(swapped))
    assert refused.code == 2
    assert "another order" in refused.err
    # A control: another answer to one text gives another student.
    (first, row), *others = answers.items()
    write(
        file,
        ("text", "no", "yes"),
        ((*texts, *map(repr, row.tolist())) for texts, row in [(first, -row), *others]),
    )
    changed = given_run(tmp_path / "changed", student, f"{{files: ['{file}'], logits: [no, yes]}}")
    distill(changed)
    assert not same_weights(changed, local)


def test_a_file_of_probabilities_goes_the_whole_way_to_a_service(
    ad2kit: Callable[..., Outcome],
    local: RunDir,
    student: tuple[str, ...],
    answers: dict[tuple[str, ...], Any],
    tmp_path: Path,
) -> None:
    labels = splits.load_data(local.recipe.data, local.recipe.seed).labels
    cells = (
        json.dumps(dict(zip(labels, scores("single_label", row[None])[0].tolist(), strict=True)))
        for row in answers.values()
    )
    rows = [(*texts, cell) for texts, cell in zip(answers, cells, strict=True)]
    file = write(tmp_path / "llm.csv", ("text", "teacher_probabilities"), rows)
    teacher = given_by(f"{{files: ['{file}'], probabilities: [teacher_probabilities]}}")
    runs = tmp_path / "runs"
    assert "teacher answers of" in ad2kit("check", "smoke", *student, teacher).out
    done = ad2kit("run", "smoke", *student, teacher, "--runs-dir", runs)
    assert done.code == 0, done.err
    (folder,) = runs.glob("smoke-*")
    run = RunDir(folder)

    # The student is the local teacher's, up to the rounding of the logarithms.
    gap = load_file(run.select_logits)["logits"] - load_file(local.select_logits)["logits"]
    assert gap.abs().max() < 1e-2
    assert BentoRecord.read(run.bento_record).service_label_flips == 0
    parity = ParityReport.read(run.parity_report)
    validation = local.recipe.data
    truth = splits.load_data(validation, local.recipe.seed).validation
    expected = [answers[texts].argmax() for texts in truth.texts]
    assert parity.teacher_score == pytest.approx((np.array(expected) == truth.labels).mean())
    page = run.report.read_text(encoding="utf-8")
    assert "teacher (answers)" in page
    assert "teacher (PyTorch)" not in page + ad2kit("report", run.path).out

    refused = ad2kit("export", run.path, "--teacher")
    assert refused.code == 2
    assert "there is no model to export" in refused.err
    fit = ad2kit("fit", "smoke", *student, teacher, "--retain", "0.9", "--speedup", "2")
    assert fit.code == 2
    assert "the teacher is given by its answers alone" in " ".join(fit.err.split())
    # Other answers in the same file would be another teacher.
    write(file, ("text", "teacher_probabilities"), [(rows[0][0], rows[1][1]), *rows[1:]])
    stale = ad2kit("distill", "smoke", *student, teacher, "--runs-dir", runs)
    assert stale.code == 2
    assert "was made from other data than this run reads now" in stale.err


def test_the_mean_of_models_and_files_is_one_teacher(
    local: RunDir,
    student: tuple[str, ...],
    answers: dict[tuple[str, ...], Any],
    tmp_path: Path,
) -> None:
    said = [(*texts, "positive" if row.argmax() else "negative") for texts, row in answers.items()]
    file = write(tmp_path / "labels.csv", ("text", "said"), said)
    members = (f"{{model: '{local.teacher}', weight: 3}}", f"{{files: ['{file}'], label: said}}")
    run = given_run(tmp_path / "runs", student, *members)
    distill(run)
    data = splits.load_data(run.recipe.data, run.recipe.seed)
    found = given.logits(run.teacher, "validation").numpy()
    rows = np.array([answers[texts] for texts in data.validation.texts])
    wanted = 0.75 * scores("single_label", rows) + 0.25 * np.eye(2)[rows.argmax(axis=1)]
    np.testing.assert_allclose(scores("single_label", found), wanted, atol=1e-5)


def relabelled(
    local: RunDir, answers: dict[tuple[str, ...], Any], folder: Path, keep: Callable[[int], bool]
) -> str:
    """Write the data of a run with the labels of some rows alone; return the source's override."""
    data = splits.load_data(local.recipe.data, local.recipe.seed)
    folder.mkdir()
    parts = {"train": (data.train, data.select), "validation": (data.validation,)}
    for name, several in parts.items():
        rows = [
            (*texts, data.labels[label], data.labels[answers[texts].argmax()])
            for split in several
            for texts, label in zip(split.texts, split.labels.tolist(), strict=True)
        ]
        cells = [
            (text, label if keep(n) else "", said) for n, (text, label, said) in enumerate(rows)
        ]
        write(folder / f"{name}.csv", ("text", "label", "said"), cells)
    return f"data.source={folder}"


GIVEN_LABELS = ("data.labels=[negative, positive]", "distill.hard_label_weight=0")


def test_without_any_label_the_gate_judges_by_the_teachers_answers(
    ad2kit: Callable[..., Outcome],
    local: RunDir,
    student: tuple[str, ...],
    answers: dict[tuple[str, ...], Any],
    tmp_path: Path,
) -> None:
    source = relabelled(local, answers, tmp_path / "data", lambda _: False)
    settings = (*student, source, *GIVEN_LABELS, given_by("{label: said}"))
    easy = ("parity.min_teacher_agreement=0.5", "parity.min_teacher_agreement_lower=0.3")
    refused = ad2kit("check", "smoke", *settings)
    assert refused.code == 2
    assert "must be a label" in refused.err  # an empty cell, unless the recipe says so
    settings = (*settings, "data.label_column=null")
    checked = ad2kit("check", "smoke", *settings)
    assert "rows without a label: 2,160 of train, 240 of select, 640 of validation" in checked.out
    runs = tmp_path / "runs"
    done = ad2kit("run", "smoke", *settings, *easy, "--runs-dir", runs)
    assert done.code == 0, done.err
    (folder,) = runs.glob("smoke-*")
    run = RunDir(folder)
    parity = ParityReport.read(run.parity_report)
    assert parity.labelled_rows == 0
    assert parity.judged_against == (
        "the teacher's answers to 640 validation rows, which have no labels"
    )
    (fp32,) = (variant for variant in parity.variants if variant.variant == "fp32")
    lines = [json.loads(line) for line in run.answers.read_text().splitlines()]
    said = np.array([np.argmax(line["logits"]["teacher"]) for line in lines])
    ours = np.array([np.argmax(line["logits"]["fp32"]) for line in lines])
    assert all(line["label"] is None for line in lines)
    assert fp32.agreement is not None
    assert fp32.agreement.value == fp32.score == fp32.retained == (said == ours).mean()
    low, high = fp32.agreement.interval
    exact = binomtest(int((said == ours).sum()), len(said)).proportion_ci(method="exact")
    assert (low, high) == pytest.approx((exact.low, exact.high))
    assert sum(each.rows for each in fp32.agreement.by_class.values()) == len(said)
    assert sum(each.rows for each in fp32.agreement.slices) == len(said)
    assert (fp32.ece, fp32.mcnemar_p, parity.teacher_score) == (None, None, 1.0)
    page = run.report.read_text(encoding="utf-8")
    assert f"<p>Judged against {parity.judged_against}.</p>" in unescape(page)
    assert "Agreement with the teacher" in page
    table = ad2kit("report", run.path)
    assert table.out.startswith(f"judged against {parity.judged_against}\n")
    # The control: a bar above this student.
    strict = ("parity.min_teacher_agreement=0.999", "parity.min_teacher_agreement_lower=0.99")
    failed = ad2kit("run", "smoke", *settings, *strict, "--runs-dir", runs)
    assert failed.code == 1
    assert "agreement with its teacher is" in failed.err
    methods = ("--methods", "kd,ad2")  # fine-tuning has nothing to learn from, and is refused so
    compared = ad2kit("compare", "smoke", *settings, *methods, "--runs-dir", runs)
    assert compared.code == 2
    assert "240 of 240 rows of select have no label" in compared.err


def test_where_some_rows_have_labels_both_are_reported(
    local: RunDir, student: tuple[str, ...], answers: dict[tuple[str, ...], Any], tmp_path: Path
) -> None:
    source = relabelled(local, answers, tmp_path / "data", lambda n: n % 4 == 0)
    teacher = f"teacher={{model: '{local.teacher}', finetune: null, accept: true}}"
    recipe = recipes.load_recipe(
        "smoke",
        (
            *(*student, source, GIVEN_LABELS[0], teacher, "data.missing_labels=accept"),
            *("distill.hard_label_weight=1", "export.variants=[fp32]", "export.calibrate=true"),
            *("parity.min_teacher_agreement=0.5", "parity.min_teacher_agreement_lower=0.3"),
        ),
    )
    run = open_run(recipe, tmp_path / "runs")
    report = distill(run)
    assert sum(report.splits["train"].class_counts.values()) < report.splits["train"].rows / 3
    export(run)
    parity = judge(run)
    assert parity.labelled_rows == 160
    (fp32,) = parity.variants
    lines = [json.loads(line) for line in run.answers.read_text().splitlines()]
    labelled = [line for line in lines if line["label"] is not None]
    assert len(labelled) == 160
    right = [np.argmax(line["logits"]["fp32"]) == line["label"] for line in labelled]
    theirs = [np.argmax(line["logits"]["teacher"]) == line["label"] for line in labelled]
    assert fp32.score == pytest.approx(np.mean(right))
    assert fp32.retained == pytest.approx(np.mean(right) / np.mean(theirs))
    assert fp32.agreement is not None
    assert fp32.agreement.rows == 640
    own = np.array([line["logits"]["fp32"] for line in labelled]) / fp32.temperature
    cells = np.array([line["label"] for line in labelled])
    assert fp32.ece == pytest.approx(expected_calibration_error(softmax(own), cells), abs=1e-4)
    assert "and the labels of 160 of them" in parity.judged_against
    # The teacher as a run of its own is judged by the same rows, and retains all of itself.
    teachers = ParityReport.read(export_teacher(run).parity_report)
    assert teachers.labelled_rows == 160
    assert teachers.variants[0].retained == pytest.approx(1.0)


def encoders(tmp_path: Path) -> tuple[str, ...]:
    """Overrides of a student that starts from an encoder in ``tmp_path``."""
    start = f"student.model={families.save('bert', tmp_path / 'encoder')}"
    return (*TINY_STEPS, start)


def test_another_encoder_under_the_same_path_makes_another_student(tmp_path: Path) -> None:
    run = open_run(recipes.load_recipe("smoke", encoders(tmp_path)), tmp_path / "runs")
    first = distill(run)
    assert distill(run) == first  # it is done already
    families.save("bert", tmp_path / "encoder", seed=4)
    second = distill(run)
    assert second.teacher_sha256 == first.teacher_sha256
    assert second.inputs != first.inputs
    assert second.student_sha256 != first.student_sha256


def test_a_finished_student_does_not_need_its_encoder_any_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_run(recipes.load_recipe("smoke", encoders(tmp_path)), tmp_path / "runs")
    first = distill(run)
    assert first.encoder_sha256
    shutil.rmtree(tmp_path / "encoder")
    assert distill(run) == first
    assert "student.model is not there any more" in caplog.text
    run.select_logits.unlink()  # it is not finished any more
    with pytest.raises(ModelError, match=r"student\.model: .*/encoder"):
        distill(run)


def test_given_answers_are_compared_with_probes_of_the_runs_own_encoder(tmp_path: Path) -> None:
    corpus, folder = opinions(0, train_rows=80, validation_rows=20), tmp_path / "data"
    folder.mkdir()
    for name in ("train", "validation"):
        cells = [(text, LABELS[label]) for text, label in getattr(corpus, name)]
        write(folder / f"{name}.csv", ("text", "label", "said"), ((*row, row[1]) for row in cells))
    teacher = (f"data.source={folder}", given_by("{label: said}"))
    overrides = (*encoders(tmp_path), *teacher, "student.layers=[0]")
    kept = [each for each in overrides if not each.startswith("teacher.finetune")]

    def looked_at(runs: str, *more: str) -> TeacherReport:
        run = open_run(recipes.load_recipe("smoke", (*kept, *more)), tmp_path / runs)
        teach(run)
        return TeacherReport.read(run.teacher_report)

    first = looked_at("runs")
    assert looked_at("runs", "distill.lr=2e-3") == first  # of the store
    families.save("roberta", tmp_path / "other")
    other = looked_at("runs", f"student.model={tmp_path / 'other'}")
    assert other.teacher_sha256 == first.teacher_sha256
    alone = looked_at("alone", f"student.model={tmp_path / 'other'}")
    assert other.baselines == alone.baselines != first.baselines
    families.save("bert", tmp_path / "encoder", seed=4)
    again = looked_at("runs", "distill.lr=3e-3")
    assert again.baselines != first.baselines
