"""The gate for models that ad2kit did not make: good ones pass, broken ones are caught."""

from __future__ import annotations

import json
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import AutoTokenizer

from ad2kit.data import splits
from ad2kit.exporting.classifier import MODEL_FILE, OnnxClassifier
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.gate.foreign import judge_model
from ad2kit.gate.records import TeacherAgreement
from ad2kit.models import text_model
from ad2kit.run import recipe as recipes
from ad2kit.run.errors import DataError, ModelError
from ad2kit.training.records import DistillReport
from tests.integration.test_parity import drop_the_mask, edit

# The models of others are optimum's, which does not import under transformers 5.
optimum_models = pytest.importorskip("optimum.onnxruntime")
pipelines = pytest.importorskip("optimum.pipelines")

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ad2kit.run.folder import RunDir


@pytest.fixture
def rows(finished_run: RunDir, tmp_path: Path) -> Path:
    recipe = finished_run.recipe
    data = splits.load_data(recipe.data, recipe.seed)
    lines = [
        json.dumps({"text": texts[0], "label": data.labels[label]})
        for texts, label in zip(data.validation.texts, data.validation.labels, strict=True)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def model(finished_run: RunDir, tmp_path: Path) -> Path:
    """The fp32 graph as optimum left it, without anything of ours."""
    folder = tmp_path / "model"
    shutil.copytree(finished_run.onnx("fp32"), folder)
    (folder / OnnxArtifact.file_name).unlink()
    return folder


def failed(model: Path, run: RunDir, rows: Path) -> set[str]:
    recipe = recipes.load_recipe("custom", ["compute.threads=1", "parity.bootstrap_samples=200"])
    report = judge_model(model, str(run.teacher), rows, recipe)
    (verdict,) = report.variants
    assert report.rows == 640
    return {check.name for check in verdict.checks if not check.passed}


def test_a_good_model_passes(model: Path, finished_run: RunDir, rows: Path) -> None:
    assert failed(model, finished_run, rows) == set()
    assert not (model / OnnxArtifact.file_name).exists()


def graph(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        loaded = onnx.load(folder / MODEL_FILE)
        change(loaded.graph)
        onnx.save(loaded, folder / MODEL_FILE)

    return damage


def swap(graph: Any) -> None:
    edit(graph, "classifier.bias", lambda bias: bias[::-1])
    edit(graph, "classifier.weight", lambda weight: weight[::-1])


def destroy_a_scale(folder: Path) -> None:
    """As an int8 graph whose scale was computed from the wrong tensor."""
    shutil.copy(folder.parent / "int8.onnx", folder / MODEL_FILE)
    loaded = onnx.load(folder / MODEL_FILE)
    scale = next(
        tensor
        for tensor in loaded.graph.initializer
        if tensor.name.endswith("_scale") and "classifier" in tensor.name
    )
    scale.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(scale), scale.name))
    onnx.save(loaded, folder / MODEL_FILE)


def another_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    # Every word becomes [UNK], as with the vocabulary of another language.
    tokenizer["pre_tokenizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        pytest.param(graph(swap), "accuracy retained", id="swapped labels"),
        pytest.param(graph(drop_the_mask), "answers kept behind padding", id="dropped mask"),
        pytest.param(
            graph(lambda g: edit(g, "classifier.bias", lambda bias: bias * float("nan"))),
            "logits not finite",
            id="NaN",
        ),
        pytest.param(destroy_a_scale, "accuracy retained", id="int8 scale"),
        pytest.param(another_tokenizer, "accuracy retained", id="tokenizer"),
    ],
)
def test_a_broken_model_is_caught(
    model: Path, finished_run: RunDir, rows: Path, damage: Callable[[Path], None], expected: str
) -> None:
    shutil.copy(finished_run.onnx("int8") / MODEL_FILE, model.parent / "int8.onnx")
    damage(model)
    assert expected in failed(model, finished_run, rows)


def test_labels_in_another_order_than_the_teachers_are_refused(
    model: Path, finished_run: RunDir, rows: Path
) -> None:
    config = json.loads((model / "config.json").read_text())
    config["id2label"] = {"0": "positive", "1": "negative"}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="labels differ") as refused:
        failed(model, finished_run, rows)
    assert "{0: 'positive', 1: 'negative'}" in refused.value.message
    assert "{0: 'negative', 1: 'positive'}" in refused.value.message


def test_what_is_missing_is_named(model: Path, finished_run: RunDir, rows: Path) -> None:
    other = rows.with_suffix(".txt")
    with pytest.raises(DataError, match="no file"):
        failed(model, finished_run, other)
    shutil.copy(rows, other)
    with pytest.raises(DataError, match=r"a \.txt file holds one text a line"):
        failed(model, finished_run, other)
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json; there is config\.json"):
        failed(model, finished_run, rows)


def config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def rename_the_output(graph: Any) -> None:
    for node in graph.node:
        node.output[:] = ["scores" if name == "logits" else name for name in node.output]
    graph.output[0].name = "scores"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (config(id2label=None), "expected id2label with ids from 0 on, found None"),
        (config(id2label=["negative", "positive"]), "expected id2label"),
        (config(id2label={"a": "negative"}), "expected id2label"),
        (config(pad_token_id=[0, 1]), "expected an object with a pad_token_id"),
        (lambda folder: (folder / "config.json").write_text("{oops"), "is not JSON"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "is not a tokenizer"),
        (
            lambda folder: (folder / MODEL_FILE).write_bytes(b"none"),
            "cannot load .*/model/mod",
        ),
        (graph(rename_the_output), "an output 'logits' of 2 columns"),
        (shutil.rmtree, "expected a folder at .*, found nothing"),
    ],
)
def test_what_is_no_classifier_is_the_users_to_mend(
    model: Path, finished_run: RunDir, rows: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(model)
    with pytest.raises(ModelError, match=message) as refused:
        failed(model, finished_run, rows)
    assert "ad2kit-parity-" not in refused.value.message


def test_weights_in_a_file_of_their_own_are_read(
    model: Path, finished_run: RunDir, rows: Path
) -> None:
    loaded = onnx.load(model / MODEL_FILE)
    onnx.save(
        loaded,
        model / MODEL_FILE,
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=0,
    )
    assert (model / "model.onnx_data").is_file()
    assert failed(model, finished_run, rows) == set()


def traced(run: RunDir, folder: Path, axes: dict[int, str]) -> None:
    """Export the student as a user would who has torch alone; ``axes`` are the dynamic ones."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    student = text_model.load_model(run.student, DistillReport.read(run.distill_report).labels)
    inputs = student.tokenizer(
        ["never dull", "not at all convincing"], padding=True, return_tensors="pt"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer
        torch.onnx.export(
            student.module.eval(),
            tuple(inputs[name] for name in names),
            folder / MODEL_FILE,
            dynamo=False,
            input_names=list(names),
            output_names=["logits"],
            dynamic_axes=dict.fromkeys(names, axes) if axes else {},
        )


@pytest.mark.parametrize("axes", [{}, {0: "batch"}, {1: "tokens"}])
def test_fixed_axes_are_named_and_dynamic_ones_pass(
    model: Path, finished_run: RunDir, rows: Path, axes: dict[int, str]
) -> None:
    traced(finished_run, model, axes)
    with pytest.raises(
        ModelError, match=r"axes of input_ids are fixed to \w+ x \w+, but"
    ) as caught:
        failed(model, finished_run, rows)
    assert "dynamic_axes={'input_ids': {0: 'batch', 1: 'tokens'}, ...}" in caught.value.hint
    traced(finished_run, model, {0: "batch", 1: "tokens"})
    assert failed(model, finished_run, rows) == set()


def test_axes_that_are_fixed_inside_of_the_graph_are_found(
    model: Path, finished_run: RunDir, rows: Path
) -> None:
    """The inputs say that they are dynamic, and the graph was traced with other ones."""
    traced(finished_run, model, {})

    def lie(graph: Any) -> None:
        for item in graph.input:
            for axis, name in zip(item.type.tensor_type.shape.dim, "bt", strict=True):
                axis.dim_param = name

    graph(lie)(model)
    with pytest.raises(ModelError, match=r"two texts of different lengths|of shape") as caught:
        failed(model, finished_run, rows)
    assert "dynamic axes" in caught.value.hint


def test_an_artefact_is_a_plain_folder_for_other_tools(finished_run: RunDir) -> None:
    texts = ["never dull", "not at all convincing"]
    for name in ("fp32", "fused", "int8"):
        folder = finished_run.onnx(name)
        theirs = pipelines.pipeline(
            "text-classification",
            model=optimum_models.ORTModelForSequenceClassification.from_pretrained(
                folder, trust_remote_code=False
            ),
            tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        )
        ours = OnnxClassifier(folder).predict(texts, batch_size=1)
        for found, expected in zip(theirs(texts), ours, strict=True):
            assert found["label"] == expected.label
            assert found["score"] == pytest.approx(expected.score, abs=1e-5)


def test_rows_without_labels_are_judged_by_the_teachers_answers(
    model: Path, finished_run: RunDir, rows: Path
) -> None:
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    recipe = recipes.load_recipe(
        "custom",
        ["compute.threads=1", "parity.bootstrap_samples=200", "data.missing_labels=accept"],
    )
    for labelled in (320, 0):
        some = [
            line | {} if n < labelled else {**line, "label": None} for n, line in enumerate(lines)
        ]
        rows.write_text("".join(f"{json.dumps(line)}\n" for line in some))
        report = judge_model(model, str(finished_run.teacher), rows, recipe)
        assert report.labelled_rows == labelled
        (verdict,) = report.variants
        assert isinstance(verdict.agreement, TeacherAgreement)
        assert verdict.agreement.rows == 640
        names = {check.name for check in verdict.checks}
        assert "agreement with its teacher" in names
        by_labels = "teacher accuracy, against the most frequent label"
        assert (by_labels in names) == bool(labelled)
