"""The gate must pass what is right and fail what is not: every control breaks something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime.transformers.optimizer import optimize_model

from ad2kit import load
from ad2kit.data.mapped import TokenRows
from ad2kit.data.splits import Encoded, load_data
from ad2kit.exporting.classifier import MODEL_FILE, OnnxClassifier, read_artifact
from ad2kit.exporting.conversion import conversion_cost
from ad2kit.exporting.export import export
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.gate.latency import measure
from ad2kit.gate.parity import judge
from ad2kit.gate.questions import Reference, distillation_quality
from ad2kit.gate.records import ParityReport, RowAnswers, check_passed
from ad2kit.gate.shipping import passed_variants
from ad2kit.run import recipe as recipes
from ad2kit.run.errors import GateFailed, ModelError, RunError
from ad2kit.run.files import sha256_of, write_record
from ad2kit.run.folder import RunDir, open_run
from ad2kit.run.sections import DataRecipe, ParityRecipe
from ad2kit.training.distill import distill
from tests.conftest import QUICK
from tests.http_client import SERVICE

if TYPE_CHECKING:
    from collections.abc import Callable

    from ad2kit.run.recipe import Recipe
    from ad2kit.run.sections import Task

CHECKOUT = Path(__file__).parents[2]


def failed_checks(run: RunDir, variant: str = "fp32") -> set[str]:
    """Judge a run, expect a report whatever it says, and return what failed."""
    report = judge(run)
    assert ParityReport.read(run.parity_report) == report
    (verdict,) = [v for v in report.variants if v.variant == variant]
    assert report.passed == any(v.passed for v in report.variants)
    return {check.name for check in verdict.checks if not check.passed}


def damage(run: RunDir, change: Callable[[Any], None], variant: str = "fp32") -> None:
    """Change a graph and forge its manifest: the gate must notice, not the checksum."""
    folder = run.onnx(variant)
    model = onnx.load(folder / MODEL_FILE)
    change(model.graph)
    onnx.save(model, folder / MODEL_FILE)
    forge(folder)


def forge(folder: Path) -> None:
    artifact = OnnxArtifact.read(folder / OnnxArtifact.file_name)
    files = {name: sha256_of(folder / name) for name in artifact.files}
    write_record(folder / OnnxArtifact.file_name, artifact.model_copy(update={"files": files}))


def weights(graph: Any, name: str) -> Any:
    (tensor,) = [t for t in graph.initializer if name in t.name]
    return tensor


def edit(graph: Any, name: str, change: Callable[[Any], Any]) -> None:
    tensor = weights(graph, name)
    array = change(numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))


def test_an_honest_run_passes(copied_run: RunDir) -> None:
    copied_run.parity_report.unlink()
    assert failed_checks(copied_run) == set()
    report = ParityReport.read(copied_run.parity_report)
    assert {v.variant for v in report.variants} == {"fp32", "fused", "steady", "int8"}
    assert report.rows == 640
    assert report.student_score == report.variants[0].score
    check_passed(report, copied_run.path)


def test_swapped_labels_fail(copied_run: RunDir) -> None:
    def swap(graph: Any) -> None:
        edit(graph, "classifier.bias", lambda bias: bias[::-1])
        edit(graph, "classifier.weight", lambda weight: weight[::-1])

    damage(copied_run, swap)
    failed = failed_checks(copied_run)
    assert {"label flips", "logit gap, batches", "logit gap, one by one"} <= failed


def test_noise_on_one_weight_fails(copied_run: RunDir) -> None:
    def noise(array: Any) -> Any:
        array.flat[0] += 0.05
        return array

    damage(copied_run, lambda graph: edit(graph, "classifier.weight", noise))
    assert "logit gap, batches" in failed_checks(copied_run)


def drop_the_mask(graph: Any) -> None:
    """Feed the graph's insides a mask of ones, of the right shape, whatever it is given."""
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == "attention_mask":
                node.input[index] = "ones_mask"
    zero = numpy_helper.from_array(np.array(0, np.int64), "mask_zero")
    one = numpy_helper.from_array(np.array(1, np.int64), "mask_one")
    graph.initializer.extend([zero, one])
    graph.node.insert(0, onnx.helper.make_node("Add", ["mask_product", "mask_one"], ["ones_mask"]))
    graph.node.insert(
        0,
        onnx.helper.make_node("Mul", ["attention_mask", "mask_zero"], ["mask_product"]),
    )


def test_a_dropped_mask_fails_where_there_is_padding(copied_run: RunDir) -> None:
    damage(copied_run, drop_the_mask)
    failed = failed_checks(copied_run)
    assert {"logit gap, batches", "logit gap, padded"} <= failed
    assert "logit gap, one by one" not in failed  # without padding the mask is all ones anyway


def test_the_default_fusion_fails_on_the_left(copied_run: RunDir) -> None:
    path = copied_run.onnx("fused") / MODEL_FILE
    # What onnxruntime and optimum do if they are not told otherwise.
    source = copied_run.onnx("fp32")
    config = json.loads((source / "config.json").read_text())
    heads, width = config["num_attention_heads"], config["hidden_size"]
    fused = optimize_model(str(source / MODEL_FILE), "bert", num_heads=heads, hidden_size=width)
    fused.save_model_to_file(str(path))
    forge(path.parent)
    assert failed_checks(copied_run, "fused") == {"logit gap, padded on the left"}


def test_nan_in_one_logit_fails(copied_run: RunDir) -> None:
    def poison(array: Any) -> Any:
        array[0] = np.nan
        return array

    damage(copied_run, lambda graph: edit(graph, "classifier.bias", poison), "int8")
    assert "converted logits not finite" in failed_checks(copied_run, "int8")
    assert [folder.name for folder in passed_variants(copied_run)] == ["steady", "fused", "fp32"]


def test_another_tokenizer_fails(copied_run: RunDir) -> None:
    path = copied_run.onnx("fp32") / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"]["lowercase"] = False  # cased for uncased
    path.write_text(json.dumps(tokenizer))
    forge(copied_run.onnx("fp32"))
    assert "texts with other token ids" in failed_checks(copied_run)


def test_nothing_made_from_an_unfaithful_fp32_passes(copied_run: RunDir) -> None:
    damage(copied_run, lambda graph: edit(graph, "classifier.bias", lambda bias: bias + 0.01))
    assert "logit gap, batches" in failed_checks(copied_run, "int8")
    # The fused graph, made before the damage, is compared with the student itself.
    assert [folder.name for folder in passed_variants(copied_run)] == ["fused"]


def test_a_verdict_does_not_outlive_the_thresholds_that_it_was_given_by(
    copied_run: RunDir,
) -> None:
    assert len(passed_variants(copied_run)) == 4
    recipe = copied_run.recipe
    stricter = recipe.parity.model_copy(update={"min_agreement": 1.0})
    write_record(copied_run.recipe_file, recipe.model_copy(update={"parity": stricter}))
    assert passed_variants(copied_run) == []


def test_a_verdict_in_the_file_is_computed_again_and_not_believed(copied_run: RunDir) -> None:
    report = json.loads(copied_run.parity_report.read_text())
    assert report["passed"] is True
    for verdict in report["variants"]:
        verdict["checks"][0]["value"] = 7.0  # expected at most 0; "passed" still says true
    copied_run.parity_report.write_text(json.dumps(report))
    assert not ParityReport.read(copied_run.parity_report).passed
    assert passed_variants(copied_run) == []


def test_nan_in_fp32_leaves_a_report_that_can_be_read(copied_run: RunDir) -> None:
    damage(copied_run, lambda graph: edit(graph, "classifier.bias", lambda bias: bias * np.nan))
    failed = failed_checks(copied_run)  # reads the report back
    assert {"logits not finite", "logit gap, batches"} <= failed
    json.loads(copied_run.parity_report.read_text(), parse_constant=pytest.fail)


def test_a_changed_teacher_or_student_is_noticed_even_where_the_verdict_is_known(
    copied_run: RunDir,
) -> None:
    path = copied_run.teacher / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match="is not the file that was written"):
        judge(copied_run)


def test_a_weak_student_fails_with_the_thresholds_of_the_recipe(copied_run: RunDir) -> None:
    recipe = copied_run.recipe
    strict = recipe.parity.model_copy(update={"min_retained": 1.0, "min_retained_lower": 1.0})
    write_record(copied_run.recipe_file, recipe.model_copy(update={"parity": strict}))
    report = judge(copied_run)
    assert not report.passed
    with pytest.raises(
        GateFailed, match=r"retained is .* expected at least 1, its interval from 1"
    ):
        check_passed(report, copied_run.path)
    assert passed_variants(copied_run) == []


def test_a_run_passes_by_the_variant_that_ships_and_says_which_others_did_not(
    copied_run: RunDir, ad2kit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def one_answer(graph: Any) -> None:
        edit(graph, "classifier.bias", lambda bias: bias + np.array([9.0, 0.0]))

    damage(copied_run, one_answer, "int8")
    done = ad2kit("parity", copied_run.path)
    assert done.code == 0
    assert "parity: fused: passed" in caplog.text
    failed = next(line for line in caplog.messages if "int8: FAILED" in line)
    assert "label agreement with fp32 is " in failed
    assert "classes predicted is 1, expected at least 2" in failed
    assert f"next: ad2kit package {copied_run.path} (or --variant " in done.err
    assert {folder.name for folder in passed_variants(copied_run)} == {"fp32", "fused", "steady"}
    # Nobody needs the latency of what cannot be shipped.
    assert measure(copied_run).artifacts.keys() == {"fp32", "fused", "steady"}
    assert ad2kit("report", copied_run.path).code == 0
    page = copied_run.report.read_text()
    assert "classes predicted is 1, expected at least 2" in page
    assert "p50 latency" in page


def test_the_verdict_comes_before_the_latency(
    tmp_path: Path, ad2kit: Any, quick_recipe: Recipe
) -> None:
    done = ad2kit(
        "run",
        "smoke",
        *QUICK,
        "parity.min_retained=1.0",
        "parity.min_retained_lower=1.0",
        "--runs-dir",
        tmp_path,
    )
    run = RunDir(next(tmp_path.glob(f"{quick_recipe.name}-*")))
    assert done.code == 1
    assert "fp32: accuracy retained is " in done.err
    assert run.report.is_file()
    assert not run.latency_report.is_file()
    assert not run.bento_record.is_file()


@pytest.fixture(scope="module")
def unsure_run(tmp_path_factory: pytest.TempPathFactory, quick_recipe: Recipe) -> RunDir:
    """The runs folder of `ad2kit run` on 60 validation rows, which show nothing near to 0.97."""
    folder = tmp_path_factory.mktemp("unsure")
    data = load_data(quick_recipe.data, quick_recipe.seed)
    for name, split in (("train", data.train), ("validation", data.validation.take(np.arange(60)))):
        lines = [
            json.dumps({"text": texts[0], "label": data.labels[label]})
            for texts, label in zip(split.texts, split.labels, strict=True)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ad2kit",
            "run",
            "smoke",
            *QUICK,
            f"data.source={folder}",
            "parity.min_retained_lower=0.97",
            "compute.threads=1",
            "--runs-dir",
            folder / "runs",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    (folder / "said.txt").write_text(done.stderr)
    assert done.returncode == 1, done.stderr
    (path,) = (folder / "runs").glob("smoke-*")
    return RunDir(path)


def test_what_so_few_rows_do_not_show_ends_with_1_and_says_how_many_would(
    unsure_run: RunDir, ad2kit: Any
) -> None:
    said = (unsure_run.path.parents[1] / "said.txt").read_text()
    assert "is not shown to be passed by 60 validation rows" in said
    judged = ParityReport.read(unsure_run.parity_report)
    assert judged.verdict == "not shown"
    assert {each.verdict for each in judged.variants} == {"not shown"}
    needed = judged.rows_that_would_do() or 0
    assert needed > 60
    assert f"give about {needed:,} labelled validation rows" in " ".join(said.split())
    (check,) = [c for c in judged.variants[0].checks if c.name == "accuracy retained"]
    assert "not shown: about " in check.words
    assert "FAILED" not in said
    page = unsure_run.report.read_text()
    assert "<title>smoke: not shown</title>" in page
    assert page.count('<summary>fp32: <span class="open">not shown</span>') == 1
    assert "validation rows show a true value of" in page
    assert not unsure_run.latency_report.is_file()
    assert not unsure_run.bento_record.is_file()
    shown = ad2kit("parity", unsure_run.path)
    assert shown.code == 1
    assert shown.out.count("not shown") == 4  # a row for each variant


def test_what_is_not_shown_is_shipped_by_no_command(unsure_run: RunDir, ad2kit: Any) -> None:
    assert passed_variants(unsure_run) == []
    why = "accuracy retained is "
    for command in (["package"], ["package", "--variant", "fp32"]):
        refused = ad2kit(command[0], unsure_run.path, *command[1:])
        assert (refused.code, why in refused.err, "not shown" in refused.err) == (1, True, True)
    refused = ad2kit("push", "someone/reviews", unsure_run.path)
    assert (refused.code, why in refused.err, "not shown" in refused.err) == (1, True, True)
    with pytest.raises(RunError, match=r"fp32: accuracy retained is .*not shown: about"):
        load(unsure_run.path)
    runs = unsure_run.path.parent
    for argument in (f"model={unsure_run.path}", f"runs_dir={runs}"):
        served = subprocess.run(
            [
                sys.executable,
                "-m",
                "bentoml",
                "serve",
                SERVICE,
                "--working-dir",
                str(CHECKOUT),
                f"--arg={argument}",
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            cwd=CHECKOUT,
        )
        words = " ".join((served.stdout + served.stderr).split())
        assert served.returncode != 0
        assert "passed the parity gate" in words
        assert "fp32: accuracy retained is" in words
        assert "not shown: about" in words
        assert "Traceback" not in words


def test_a_verdict_of_the_version_before_is_refused_and_its_cure_works(
    copied_run: RunDir, ad2kit: Any
) -> None:
    """It knew no limits: what it calls passed need not be."""
    old = json.loads(copied_run.parity_report.read_text()) | {"schema_version": 1}
    copied_run.parity_report.write_text(json.dumps(old))
    refused = ad2kit("package", copied_run.path)
    assert refused.code == 2
    assert "is not a ParityReport of schema version 2" in refused.err
    assert "delete it and run `ad2kit parity`" in " ".join(refused.err.split())
    copied_run.parity_report.unlink()
    assert ad2kit("parity", copied_run.path).code == 0
    assert len(passed_variants(copied_run)) == 4


def test_an_artefact_that_was_changed_after_its_export_is_refused(copied_run: RunDir) -> None:
    path = copied_run.onnx("int8") / MODEL_FILE
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ModelError, match="is not the file that was written"):
        judge(copied_run)


def test_a_verdict_does_not_cover_a_later_artefact(copied_run: RunDir) -> None:
    assert len(passed_variants(copied_run)) == 4
    damage(copied_run, lambda graph: edit(graph, "classifier.bias", lambda b: b + 1))
    assert [folder.name for folder in passed_variants(copied_run)] == ["steady", "int8", "fused"]


def test_parity_before_export_says_what_to_do(copied_run: RunDir) -> None:
    (copied_run.onnx("int8") / OnnxArtifact.file_name).unlink()
    with pytest.raises(RunError, match=r"has no onnx/int8/manifest\.json yet") as caught:
        judge(copied_run)
    assert "ad2kit export" in caught.value.hint


def test_one_answer_for_everything_fails_even_beside_such_a_teacher(copied_run: RunDir) -> None:
    def tilt(graph: Any) -> None:
        edit(graph, "classifier.bias", lambda bias: bias + np.array([9, 0]))

    for name in ("fp32", "int8"):
        damage(copied_run, tilt, name)
    assert "classes predicted" in failed_checks(copied_run)
    assert "classes predicted" in failed_checks(copied_run, "int8")


def judged(labels: Any, teacher: Any, student: Any, task: Task = "single_label") -> Reference:
    metrics = DataRecipe(
        train="x",
        validation="x",
        task=task,
        text_columns=("x",),
        label_column="y",
        max_length_tokens=8,
    ).judged_by
    none = np.zeros(len(labels), dtype=bool)
    encoded = Encoded(TokenRows.of([[1]] * len(labels)), None, labels, none)
    return Reference(task, metrics, labels, teacher, student, encoded, student_left=student)


def test_conversion_cost_by_hand() -> None:
    labels = np.array([0, 1] * 250)
    fp32 = np.eye(2, dtype=np.float32)[labels]
    reference = judged(labels, fp32, fp32)
    same = conversion_cost(fp32, fp32, fp32, reference, ParityRecipe())
    assert all(check.passed for check in same)
    worse = fp32.copy()
    worse[:10] = worse[:10, ::-1]
    checks = {c.name: c for c in conversion_cost(worse, worse, fp32, reference, ParityRecipe())}
    assert checks["label agreement with fp32"].value == 0.98
    assert checks["points lost to fp32"].value == pytest.approx(2.0)
    assert not any(checks[name].passed for name in list(checks)[1:])


def test_a_variant_that_is_right_only_in_company_fails() -> None:
    labels = np.array([0, 1] * 250)
    fp32 = np.eye(2, dtype=np.float32)[labels]
    alone = fp32.copy()
    alone[:20] = alone[:20, ::-1]
    checks = conversion_cost(fp32, alone, fp32, judged(labels, fp32, fp32), ParityRecipe())
    assert {check.name for check in checks if not check.passed} == {
        "label agreement with fp32, one by one",
        "points lost to fp32",
    }


def test_a_rare_class_that_the_student_lost_fails_although_accuracy_hardly_moves() -> None:
    labels = np.repeat([0, 1, 2], [490, 490, 20])
    teacher = np.eye(3, dtype=np.float32)[labels]
    student = teacher.copy()
    student[labels == 2] = [1, 0, 0]
    reference = judged(labels, teacher, student)
    verdict = distillation_quality(
        "fp32", "", student, reference, ("a", "b", "rare"), (), ParityRecipe(), 0
    )
    assert verdict.retained == pytest.approx(0.98)
    assert [check.name for check in verdict.checks if not check.passed] == [
        "classes that the student lost"
    ]
    honest = distillation_quality(
        "fp32", "", teacher, reference, ("a", "b", "rare"), (), ParityRecipe(), 0
    )
    assert honest.passed


def test_the_student_of_a_teacher_with_permuted_labels_fails() -> None:
    labels = np.array([0, 1, 2] * 40)
    right = np.eye(3, dtype=np.float32)[labels]
    permuted = right[:, [1, 2, 0]]
    for teacher, student in ((permuted, permuted), (permuted, right)):
        reference = judged(labels, teacher, student)
        verdict = distillation_quality(
            "fp32", "", student, reference, ("a", "b", "c"), (), ParityRecipe(), 0
        )
        failed = {check.name for check in verdict.checks if not check.passed}
        assert "teacher accuracy, against the most frequent label" in failed


def test_a_truncated_validation_file_fails(tmp_path: Path, finished_run: RunDir) -> None:
    data = load_data(finished_run.recipe.data, finished_run.recipe.seed)
    for name, split in (("train", data.train), ("validation", data.validation)):
        lines = [
            json.dumps({"text": texts[0], "label": data.labels[label]})
            for texts, label in zip(split.texts, split.labels, strict=True)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    overrides = (f"data.source={tmp_path}", "teacher.finetune.epochs=1")
    run = open_run(recipes.load_recipe("smoke", [*QUICK, *overrides]), tmp_path / "runs")
    distill(run)
    export(run)
    judge(run)
    path = tmp_path / "validation.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(RunError, match="the validation data changed"):
        judge(run)


def test_the_slices_cover_all_rows_from_the_shortest_on() -> None:
    labels = np.array([0, 1] * 50)
    right = np.eye(2, dtype=np.float32)[labels]
    wrong_on_long = right.copy()
    wrong_on_long[80:] = right[80:, ::-1]
    none = np.zeros(len(labels), dtype=bool)
    encoded = Encoded(TokenRows.of([1] * (3 + row // 10) for row in range(100)), None, labels, none)
    reference = Reference(
        "single_label", ("accuracy",), labels, right, right, encoded, student_left=right
    )
    verdict = distillation_quality(
        "fp32", "", wrong_on_long, reference, ("a", "b"), (), ParityRecipe(), 0
    )
    assert sum(piece.rows for piece in verdict.slices) == 100
    assert [piece.tokens for piece in verdict.slices] == sorted(p.tokens for p in verdict.slices)
    worst, *others = sorted(verdict.slices, key=lambda piece: piece.score)
    assert worst.tokens[1] == 12  # the longest are among them
    assert worst.score == pytest.approx(1 - 20 / worst.rows)
    assert worst.teacher_score == 1.0
    assert all(piece.score == 1.0 for piece in others)


def test_a_calibrated_student_answers_the_same_with_other_probabilities(
    copied_run: RunDir,
) -> None:
    folder = copied_run.onnx("fp32")
    before = OnnxClassifier(folder).predict(["never dull", "not at all convincing"])
    recipe = copied_run.recipe
    write_record(
        copied_run.recipe_file,
        recipe.model_copy(update={"export": recipe.export.model_copy(update={"calibrate": True})}),
    )
    export(copied_run)
    artifacts = [
        read_artifact(copied_run.onnx(name)) for name in ("fp32", "fused", "steady", "int8")
    ]
    assert len({artifact.temperature for artifact in artifacts}) == 1
    assert artifacts[0].temperature != 1.0
    after = OnnxClassifier(folder).predict(["never dull", "not at all convincing"])
    assert [p.label for p in after] == [p.label for p in before]
    assert [p.score for p in after] != [p.score for p in before]
    for verdict in judge(copied_run).variants:
        assert verdict.ece != verdict.ece_unscaled


def test_the_answers_of_all_models_are_kept(finished_run: RunDir) -> None:
    lines = [
        RowAnswers.model_validate_json(line)
        for line in finished_run.answers.read_text().splitlines()
    ]
    assert len(lines) == 640
    assert set(lines[0].logits) == {"teacher", "student", "fp32", "fused", "steady", "int8"}
    classifier = OnnxClassifier(finished_run.onnx("fp32"))
    texts = [line.texts[0] for line in lines[:5]]
    found = np.array([line.logits["fp32"] for line in lines[:5]])
    assert np.abs(classifier.logits(texts) - found).max() < 1e-5


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
def test_the_gate_fails_a_student_of_a_permuted_teacher_in_words(task: Task) -> None:
    ids = np.arange(300) % 3
    labels = ids if task == "single_label" else np.eye(3, dtype=np.float32)[ids]
    logits = 4 * np.eye(3, dtype=np.float32)[ids] - 2
    name = "teacher's right answers gained by another order of labels"
    thresholds = ParityRecipe(bootstrap_samples=100)
    for order, passes in (((0, 1, 2), True), ((1, 2, 0), False)):
        permuted = np.ascontiguousarray(logits[:, order])
        reference = judged(labels, permuted, permuted, task)
        verdict = distillation_quality(
            "fp32", "", permuted, reference, ("a", "b", "c"), (), thresholds, 0
        )
        (check,) = [check for check in verdict.checks if check.name == name]
        assert check.question == "distillation quality"
        assert (check.passed, verdict.passed) == (passes, passes)
        assert ('order that fits:    ["b", "c", "a"]' in check.words) != passes
