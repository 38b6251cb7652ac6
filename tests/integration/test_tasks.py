"""The whole chain for every kind of task, on tiny real models and made-up rows."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ad2kit
from ad2kit.data.splits import load_data
from ad2kit.exporting.export import export
from ad2kit.gate.parity import judge
from ad2kit.gate.report import report as write_report
from ad2kit.planning.check import check, check_words
from ad2kit.run import recipe as recipes
from ad2kit.run.errors import DataError, ModelError
from ad2kit.run.files import read_lines
from ad2kit.run.folder import RunDir, open_run
from ad2kit.scoring.score import score
from ad2kit.tables import formats
from ad2kit.tables.rows import BadRow
from ad2kit.training.distill import distill
from ad2kit.training.opening import open_models
from ad2kit.training.records import read_curve
from tests.conftest import QUICK

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TASKS: dict[str, dict[str, Any]] = {
    "three classes of pairs": {"text_columns": ["first", "second"], "label_column": "label"},
    "several labels": {
        "text_columns": ["first"],
        "label_column": "label",
        "task": "multi_label",
        "metrics": ["micro_f1", "accuracy"],
    },
    "a number": {
        "text_columns": ["first", "second"],
        "label_column": "label",
        "task": "regression",
    },
}


def rows(task: str, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Texts whose label is the number, or the set, of the words that they hold."""
    generator = np.random.default_rng(seed)
    words = ("red", "green", "blue")
    for number in range(count):
        held = [word for word in words if generator.random() < 0.5]
        text = " ".join(generator.permutation([*held, "paper", "stone", f"n{number % 7}"]))
        labels = {
            "three classes of pairs": min(len(held), 2),
            "several labels": held,
            "a number": len(held) + 0.5,
        }
        yield {"first": f"{text} {seed}", "second": "how many colours", "label": labels[task]}


LEARNS = (
    "teacher.finetune.epochs=15",
    "teacher.finetune.lr=2e-3",
    "distill.epochs=4",
    "distill.lr=2e-3",
    "parity.bootstrap_samples=200",
)


def chain(task: str, folder: Path, **data: Any) -> RunDir:
    for seed, (name, count) in enumerate((("train", 400), ("validation", 150))):
        lines = (json.dumps(row) for row in rows(task, seed, count))
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    plain = recipes.load_recipe("smoke", [*QUICK, *LEARNS]).model_dump(mode="json")
    plain["data"] = {"source": str(folder), "max_length_tokens": 32, **TASKS[task], **data}
    run = open_run(recipes.from_data(plain, where=task), folder / "runs")
    distill(run)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    found = {}
    for task in TASKS:
        found[task] = chain(task, tmp_path_factory.mktemp("task"))
        export(found[task])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_task_passes_its_gate(runs: dict[str, RunDir], task: str) -> None:
    report = judge(runs[task])
    assert report.passed, report.failures()
    assert report.teacher_score > 0.6  # it has learnt the task
    metrics = {
        "three classes of pairs": {"accuracy"},
        "several labels": {"micro_f1", "accuracy"},
        "a number": {"pearson", "spearman"},
    }[task]
    for verdict in report.variants:
        assert set(verdict.metrics) == metrics
        assert verdict.score == pytest.approx(np.mean(list(verdict.metrics.values())))
    names = {check.name for check in report.variants[-1].checks}
    expected = {
        "three classes of pairs": {"label flips", "classes predicted", "accuracy retained"},
        "several labels": {"labels that the student lost", "label flips"},
        "a number": {
            "correlation with fp32",
            "different values predicted",
            "pearson and spearman retained",
        },
    }[task]
    assert expected <= names
    page = write_report(runs[task]).read_text()
    assert "Where teacher and student differ" in page
    assert ("<h2>Calibration</h2>" in page) == (task == "three classes of pairs")


@pytest.mark.slow
def test_predictions_have_the_form_of_their_task(runs: dict[str, RunDir]) -> None:
    for run in runs.values():
        judge(run)
    pair = ad2kit.load(runs["three classes of pairs"].path)
    (answer,) = pair.predict([("red stone blue", "how many colours")])
    assert set(answer.as_dict()) == {"label", "score", "scores", "tokens", "truncated"}
    assert answer.label in ("0", "1", "2")
    several = ad2kit.load(runs["several labels"].path)
    both, none = several.predict(["red paper blue stone", "paper stone"])
    for each in (both, none):
        assert set(each.labels or ()) == {n for n, p in each.scores.items() if p > 0.5}
        assert set(each.as_dict()) == {"labels", "scores", "tokens", "truncated"}
    number = ad2kit.load(runs["a number"].path)
    few, many = number.predict(
        [("paper stone", "how many colours"), ("red green blue", "how many colours")]
    )
    assert many.as_dict()["value"] > few.as_dict()["value"]
    assert set(many.as_dict()) == {"value", "tokens", "truncated"}


@pytest.mark.slow
def test_a_lost_label_and_a_constant_value_fail_their_gates() -> None:
    from ad2kit.gate.questions import distillation_quality
    from ad2kit.run.sections import ParityRecipe
    from tests.integration.test_parity import judged

    labels = np.tile([[1, 0], [0, 1], [1, 1], [0, 0]], (25, 1)).astype(np.float32)
    teacher = (2 * labels - 1).astype(np.float32)
    student = teacher.copy()
    student[:, 1] = -1
    reference = judged(labels, teacher, student, "multi_label")
    verdict = distillation_quality(
        "fp32", "", student, reference, ("a", "b"), (), ParityRecipe(), 0
    )
    failed = {check.name for check in verdict.checks if not check.passed}
    assert "labels that the student lost" in failed
    values = np.linspace(0, 5, 100, dtype=np.float32)
    constant = np.ones((100, 1), dtype=np.float32)
    reference = judged(values, values[:, None], constant, "regression")
    verdict = distillation_quality("fp32", "", constant, reference, ("x",), (), ParityRecipe(), 0)
    failed = {check.name for check in verdict.checks if not check.passed}
    assert failed == {
        "different values predicted",
        "pearson and spearman retained",
    }


@pytest.mark.slow
def test_unlabelled_texts_reach_the_student_through_its_teacher(tmp_path: Path) -> None:
    more = tmp_path / "more.txt"
    more.write_text("".join(f"{row['first']}\n" for row in rows("several labels", 5, 60)))
    run = chain("several labels", tmp_path)
    with_more = chain("several labels", tmp_path, unlabelled=[str(more)])
    plain, enlarged = (
        [json.loads(line)["total_steps"] for line in r.curve("student").read_text().splitlines()]
        for r in (run, with_more)
    )
    assert plain[0] == 4 * -(-320 // 32)
    assert enlarged[0] == 4 * -(-380 // 32)
    facts = json.loads(with_more.distill_report.read_text())["splits"]
    assert (facts["train"]["rows"], facts["unlabelled"]["rows"]) == (320, 60)
    # The teacher has not seen them, and is the same one.
    assert (run.teacher / "model.safetensors").samefile(with_more.teacher / "model.safetensors")


def test_class_labels_in_a_regression_are_refused_before_any_training(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "fine\tgood\nbad\tbad\n" * 20)
    (tmp_path / "validation.tsv").write_text("text\tlabel\nwell\tgood\nill\tbad\n")
    recipe = recipes.load_recipe("smoke", [f"data.source={tmp_path}", "data.task=regression"])
    with pytest.raises(DataError, match="must be a finite number, found 'good'") as caught:
        distill(open_run(recipe, tmp_path / "runs"))
    assert "data.task=single_label" in caught.value.hint


def test_a_finished_teacher_with_another_number_of_labels_is_refused(
    finished_run: RunDir, tmp_path: Path
) -> None:
    rows = "".join(f"t{i} word\t{i % 3}\n" for i in range(60))
    (tmp_path / "train.tsv").write_text(f"text\tlabel\n{rows}")
    (tmp_path / "validation.tsv").write_text(f"text\tlabel\n{rows.replace('word', 'other')}")
    recipe = recipes.load_recipe(
        "smoke",
        [
            f"data.source={tmp_path}",
            f"teacher.model={finished_run.teacher}",
            "teacher.finetune=null",
        ],
    )
    with pytest.raises(ModelError, match="the teacher's labels differ from the data's") as caught:
        distill(open_run(recipe, tmp_path / "runs"))
    assert "{0: 'negative', 1: 'positive'}" in caught.value.message
    assert "{0: '0', 1: '1', 2: '2'}" in caught.value.message


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_bulk_scoring_gives_every_task_its_columns(
    runs: dict[str, RunDir], task: str, tmp_path: Path
) -> None:
    folder = runs[task].onnx("fp32")
    source = runs[task].path.parents[1] / "validation.jsonl"
    report = score(folder, str(source), str(tmp_path / "out"), prefix="our_", workers=1)
    assert (report.rows, report.bad_rows) == (150, 0)
    lines = (tmp_path / "out" / "part-00000000.jsonl").read_text().splitlines()
    given = [json.loads(line) for line in source.read_text().splitlines()]
    names = TASKS[task]["text_columns"]
    texts: list[Any] = [tuple(row[name] for name in names) for row in given]
    predicted = ad2kit.load(folder, threads=1).predict(texts)
    for line, row, answer in zip(lines, given, predicted, strict=True):
        facts = json.loads(line)
        assert {name: facts.pop(name) for name in row} == row
        plain = json.loads(json.dumps(answer.as_dict()))
        expected = {
            f"our_{name}": value
            for name, value in plain.items()
            if name not in ("scores", "tokens")
        }
        assert facts.keys() == expected.keys()
        for name, value in expected.items():
            assert facts[name] == (pytest.approx(value) if isinstance(value, float) else value)


@pytest.mark.parametrize("task", ["three classes of pairs", "several labels"])
def test_weights_of_the_classes_reach_both_trainings(tmp_path: Path, task: str) -> None:
    for seed, (name, count) in enumerate((("train", 60), ("validation", 20))):
        lines = (json.dumps(row) for row in rows(task, seed, count))
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    first = {}
    for taught, distilled in (("none", "none"), ("balanced", "none"), ("none", "balanced")):
        plain = recipes.load_recipe("smoke", [*QUICK, "distill.hard_label_weight=1"]).model_dump(
            mode="json"
        )
        plain["data"] = {"source": str(tmp_path), "max_length_tokens": 32, **TASKS[task]}
        plain["teacher"]["finetune"] |= {"epochs": 1, "class_weights": taught}
        plain["distill"] |= {"epochs": 1, "class_weights": distilled}
        run = open_run(recipes.from_data(plain, where=task), tmp_path / "runs")
        distill(run)
        first[taught, distilled] = {
            phase: read_curve(run.curve(phase))[0].terms["supervised"]
            for phase in ("teacher", "student")
            if run.curve(phase).is_file()  # the last one takes the teacher of the first
        }
    # The first updates are of the same rows, by the same model: only the weights differ.
    plain_losses = first["none", "none"]
    taught_losses, distilled_losses = first["balanced", "none"], first["none", "balanced"]
    assert plain_losses["teacher"] != pytest.approx(taught_losses["teacher"], rel=1e-4)
    assert plain_losses["student"] != pytest.approx(distilled_losses["student"], rel=1e-4)


@pytest.mark.slow
def test_bad_rows_are_left_out_and_listed_in_the_run(tmp_path: Path, ad2kit: Any) -> None:
    """From a table as Spark and a data team write it: one column a label, two bad rows."""
    for seed, name in enumerate(("train", "validation")):
        lines = ["first;red;green;blue"]
        for row in rows("several labels", seed, 60):
            flags = [str(int(colour in row["label"])) for colour in ("red", "green", "blue")]
            lines.append(";".join((f'"\\"{row["first"]}\\""', *flags)))
        lines[3:3] = ['" ";0;0;1', '"maybe red";2;0;0']
        with gzip.open(tmp_path / f"{name}.csv.gz", "wt") as stream:
            stream.write("\n".join(lines))
    plain = recipes.load_recipe("smoke", [*QUICK, "teacher.accept=true"]).model_dump(mode="json")
    plain["teacher"]["finetune"]["epochs"] = 1
    plain["data"] = {
        "source": str(tmp_path),
        "text_columns": ["first"],
        "label_column": ["red", "green", "blue"],
        "task": "multi_label",
        "max_length_tokens": 32,
        "csv_quotes": "backslash",
    }
    with pytest.raises(DataError, match=r"train\.csv\.gz, line 4: 'first' must be a text"):
        distill(open_run(recipes.from_data(plain, where="strict"), tmp_path / "runs"))
    plain["data"]["bad_rows"] = "skip"
    recipe = recipes.from_data(plain, where="skip")
    data = load_data(recipe.data, recipe.seed)
    words = check_words(check(recipe, data, *open_models(recipe, data)))
    assert f"4 bad rows were left out, such as {tmp_path}/train.csv.gz, line 4: 'first'" in words
    run = open_run(recipe, tmp_path / "runs")
    report = distill(run)
    assert report.bad_rows == 4
    assert report.labels == ("red", "green", "blue")
    assert report.splits["validation"].rows == 60
    listed = [BadRow.parse(line.encode(), "") for line in read_lines(run.bad_rows)]
    assert [(row.file.rpartition("/")[2], row.row, row.line) for row in listed] == [
        (f"{name}.csv.gz", number, number + 1)
        for name in ("train", "validation")
        for number in (3, 4)
    ]
    assert listed[1].reason == "'red' must be 0 or 1, found '2'"
    scored = tmp_path / "scored"
    export(run)
    model = ("--run", run.onnx("fp32"))
    refused = ad2kit(
        "predict", "--file", f"{tmp_path}/train.csv.gz", *model, "--csv-quotes", "doubled"
    )
    assert (refused.code, "line 2: not CSV: ';' expected after" in refused.err) == (2, True)
    done = ad2kit("score", tmp_path / "train.csv.gz", scored, *model)
    assert done.code == 2  # the row without a text
    assert "1 of 62 rows" in done.out + done.err
    again = formats.read_rows(scored, ("first", "red", "labels"), "backslash")
    found = [row["first"] for _, row in again]
    assert len(found) == 61
    assert found[:2] == [f'"{row["first"]}"' for row in rows("several labels", 0, 2)]
