"""The artefact reads texts as training did, and what is exported again can be loaded again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import assume, given

from ad2kit.data import splits
from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.exporting.export import export
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.gate.foreign import judge_model
from ad2kit.gate.parity import judge
from ad2kit.gate.records import ParityReport, check_passed
from ad2kit.gate.shipping import passed_variants
from ad2kit.models import text_model
from ad2kit.run import recipe as recipes
from ad2kit.run.errors import GateFailed, RunError
from ad2kit.run.files import write_record
from ad2kit.run.folder import RunDir, open_run
from ad2kit.tables.texts import is_text
from ad2kit.training.distill import distill
from ad2kit.training.records import DistillReport
from tests import families
from tests.models import LABELS
from tests.unit.test_tokenise import texts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LENGTH = 24
WORDS = ("never", "dull", "fine", "film", "bad", "slow", "start", "end", "hardly", "convincing")
# What a tokenizer's other file may say, and tokenizer.json does not.
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "cut on the left": (1, {"truncation_side": "left"}),
    "pairs without segments, cut on the left": (
        2,
        {"model_input_names": ["input_ids", "attention_mask"], "truncation_side": "left"},
    ),
    "pairs": (2, {"pad_token_type_id": 1}),
    "special tokens are text, in capitals": (
        1,
        {"split_special_tokens": True, "do_lower_case": False},
    ),
}


def rows(folder: Path, columns: int) -> Path:
    """Write labelled texts or pairs of a few known words, none as long as the model."""
    folder.mkdir()
    generator = np.random.default_rng(columns)
    for name, count in (("train", 300), ("validation", 100)):
        lines = []
        for _ in range(count):
            chosen = [" ".join(generator.choice(WORDS, 6)) for _ in range(columns)]
            label = LABELS[int("fine" in chosen[0])]
            named = {f"text{column}": text for column, text in enumerate(chosen)}
            lines.append(json.dumps({"label": label} | named))
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.fixture(scope="module", params=list(SETTINGS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that is exported, of a teacher whose tokenizer has settings of its own."""
    columns, settings = SETTINGS[request.param]
    folder = tmp_path_factory.mktemp("artefact")
    teacher = families.save("bert", folder / "teacher")
    file = teacher / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    names = ",".join(f"text{column}" for column in range(columns))
    recipe = recipes.load_recipe(
        "smoke",
        [
            f"data.source={rows(folder / 'data', columns)}",
            f"data.text_columns=[{names}]",
            f"data.max_length_tokens={LENGTH}",
            f"teacher.model={teacher}",
            "teacher.finetune.epochs=1",
            "distill.epochs=1",
            "student.layers=[0, 3]",
            "export.variants=[fp32,int8]",
            "parity.bootstrap_samples=100",
            "parity.min_retained=0.1",
            "parity.min_retained_lower=0.1",
        ],
    )
    run = open_run(recipe, folder / "runs")
    distill(run)
    export(run)
    return run


@pytest.fixture(scope="module")
def both(trained: RunDir) -> tuple[OnnxClassifier, text_model.TextModel]:
    distilled = DistillReport.read(trained.distill_report)
    student = text_model.load_model(trained.student, distilled.labels, distilled.task)
    return OnnxClassifier(trained.onnx("int8"), threads=1), student


@given(first=texts(600), second=texts(300))
def test_serving_reads_every_text_as_training_did(
    both: tuple[OnnxClassifier, text_model.TextModel], first: str, second: str
) -> None:
    classifier, student = both
    columns = classifier.artifact.text_columns
    example = (first, second)[:columns]
    assume(all(map(is_text, example)))
    encoded = splits.encode(
        splits.Split.of((example,), np.zeros(1)),
        student.tokenizer,
        classifier.artifact.length,
    )
    (tokens,) = classifier.encode([example if columns > 1 else first])  # type: ignore[list-item]
    assert tokens.ids == encoded.input_ids[0]
    assert tokens.truncated == encoded.truncated[0]
    feed, fed = classifier.feed([tokens]), splits.collate(encoded, [0], student.tokenizer)
    zeros = np.zeros_like(fed["input_ids"])
    np.testing.assert_array_equal(feed["token_type_ids"], fed.get("token_type_ids", zeros))


def fidelity(report: ParityReport) -> dict[str, float]:
    return {
        f"{verdict.variant}: {check.name}": check.value
        for verdict in report.variants
        for check in verdict.checks
        if check.question == "export fidelity" and not check.passed
    }


def tamper(run: RunDir, **changes: Any) -> None:
    """Let the artefacts of a run say something else of how texts become ids."""
    for variant in run.recipe.export.variants:
        file = run.onnx(variant) / OnnxArtifact.file_name
        artifact = OnnxArtifact.read(file)
        changed = artifact.tokenisation.model_copy(update=changes)
        write_record(file, artifact.model_copy(update={"tokenisation": changed}))


def test_the_gate_passes_what_reads_as_training_did_and_names_what_does_not(
    trained: RunDir,
) -> None:
    assert fidelity(judge(trained)) == {}
    honest = OnnxArtifact.read(trained.onnx("fp32") / OnnxArtifact.file_name)
    other = "right" if honest.tokenisation.truncation_side == "left" else "left"
    tamper(trained, truncation_side=other)
    # No text of the gate is longer than the model, and so those that are made of them tell.
    failed = fidelity(judge(trained))
    assert {
        "fp32: long texts with other token ids",
        "int8: long texts with other token ids",
    } <= set(failed)
    assert not any(": texts with other" in name for name in failed)
    tamper(trained, truncation_side=honest.tokenisation.truncation_side)
    assert fidelity(judge(trained)) == {}
    if honest.text_columns == 2:
        tamper(trained, segment_ids=not honest.tokenisation.segment_ids)
        report = judge(trained)
        assert fidelity(report)["fp32: texts with other segment ids"] > 0
        with pytest.raises(GateFailed, match="texts with other segment ids") as refused:
            check_passed(report, trained.path, report=trained.parity_report)
        assert "train longer" not in refused.value.hint
        assert "ad2kit export" in refused.value.hint
        tamper(trained, segment_ids=honest.tokenisation.segment_ids)


def test_a_foreign_model_is_read_by_the_settings_beside_it(trained: RunDir, tmp_path: Path) -> None:
    columns = OnnxArtifact.read(trained.onnx("fp32") / OnnxArtifact.file_name).text_columns
    names = ",".join(f"text{column}" for column in range(columns))
    recipe = recipes.load_recipe(
        "custom",
        [
            f"data.text_columns=[{names}]",
            f"data.max_length_tokens={LENGTH}",
            "compute.threads=1",
            "parity.bootstrap_samples=100",
        ],
    )
    folder = tmp_path / "model"
    folder.mkdir()
    for file in trained.onnx("fp32").iterdir():
        if file.name != OnnxArtifact.file_name:
            (folder / file.name).write_bytes(file.read_bytes())
    validation = rows(tmp_path / "data", columns) / "validation.jsonl"
    lines = [json.loads(line) for line in validation.read_text().splitlines()]
    for line in lines:  # so long that it matters which end is read
        line |= {name: " ".join([line[name]] * 5) for name in line if name != "label"}
    validation.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    report = judge_model(folder, str(trained.student), validation, recipe)
    (verdict,) = report.variants
    # The student against itself: all is kept if both read the same.
    assert verdict.score == report.teacher_score
    assert verdict.retained == 1.0


def change_recipe(run: RunDir, **changes: Any) -> None:
    recipe = run.recipe
    changed = recipe.export.model_copy(update=changes)
    write_record(run.recipe_file, recipe.model_copy(update={"export": changed}))


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(("search", "parity"), id="int8 alone is made again"),
        pytest.param(("calibrate", "parity", "search", "parity"), id="all are, then int8"),
        pytest.param(("search", "search", "parity", "search"), id="int8 again and again"),
    ],
)
def test_what_is_exported_again_after_a_gate_is_loaded_again(
    copied_run: RunDir, steps: tuple[str, ...]
) -> None:
    seconds = 0
    for step in steps:
        if step == "parity":
            assert judge(copied_run).passed
        elif step == "search":
            seconds += 1
            change_recipe(copied_run, search_seconds=seconds)
            export(copied_run)
        else:
            change_recipe(copied_run, calibrate=True)
            export(copied_run)
        for variant in copied_run.recipe.export.variants:
            folder = copied_run.onnx(variant)
            assert OnnxClassifier(folder, threads=1).predict(["not dull"])
            assert (
                ParityReport.file_name
                not in OnnxArtifact.read(folder / OnnxArtifact.file_name).files
            )
    assert judge(copied_run).passed
    assert len(passed_variants(copied_run)) == 4
    export(copied_run)  # and nothing is made again where nothing has changed
    assert len(passed_variants(copied_run)) == 4


def older(run: RunDir, also: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Let the artefacts of a run be those of a version that did not know how texts are cut."""
    for variant in run.recipe.export.variants:
        file = run.onnx(variant) / OnnxArtifact.file_name
        manifest = json.loads(file.read_text())
        manifest["pad_token_id"] = manifest.pop("tokenisation")["pad_token_id"]
        also(manifest)
        file.write_text(json.dumps(manifest))


def test_an_artefact_of_an_older_version_is_refused_with_a_cure_that_helps(
    copied_run: RunDir,
) -> None:
    # As they were, with the verdict among the files that the manifest vouches for.
    older(copied_run, lambda manifest: manifest["files"].update({"parity.json": "0" * 64}))
    with pytest.raises(RunError, match="tokenisation: Field required") as refused:
        OnnxClassifier(copied_run.onnx("int8"))
    assert "run `ad2kit export` on its run again, then `ad2kit parity`" in refused.value.hint
    export(copied_run)
    assert judge(copied_run).passed
    for variant in copied_run.recipe.export.variants:
        assert OnnxClassifier(copied_run.onnx(variant), threads=1).predict(["not dull"])
