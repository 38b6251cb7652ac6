"""The search for int8: what it ships has passed on `select`, and it says what it tried."""

from __future__ import annotations

import errno
import gc
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, get_args
from weakref import WeakSet

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from ad2kit.data import splits
from ad2kit.exporting.classifier import MODEL_FILE, OnnxClassifier
from ad2kit.exporting.export import export
from ad2kit.exporting.int8 import WAYS, Activations, Way, nodes_to_quantize, quantize
from ad2kit.exporting.records import OnnxArtifact, QuantisationSearch
from ad2kit.gate.parity import judge
from ad2kit.gate.summary import caption
from ad2kit.run.errors import ModelError
from ad2kit.run.files import write_record
from tests.integration.test_parity import forge

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.data.splits import Data
    from ad2kit.run.folder import RunDir
    from ad2kit.run.sections import DataRecipe


FLOAT = {"MatMul", "Gemm", "Attention", "EmbedLayerNormalization"}


def searched(run: RunDir, seconds: float, **thresholds: Any) -> QuantisationSearch:
    """Export a run again under other settings, and return what the search says."""
    recipe = run.recipe
    changed = recipe.model_copy(
        update={
            "export": recipe.export.model_copy(update={"search_seconds": seconds}),
            "parity": recipe.parity.model_copy(update=thresholds),
        }
    )
    write_record(run.recipe_file, changed)
    export(run)
    return QuantisationSearch.read(run.int8_search)


def without_fused(run: RunDir) -> None:
    recipe = run.recipe
    fewer = recipe.export.model_copy(update={"variants": ("fp32", "int8")})
    write_record(run.recipe_file, recipe.model_copy(update={"export": fewer}))


def test_without_a_clock_the_first_that_passes_is_taken(finished_run: RunDir) -> None:
    search = QuantisationSearch.read(finished_run.int8_search)
    assert [trial.way for trial in search.trials] == [search.taken] == [str(WAYS[0])]
    assert not search.trials[0].failures
    assert search.rows == 240


@pytest.mark.slow
def test_with_time_all_ways_are_tried_and_the_fastest_of_the_exact_is_taken(
    copied_run: RunDir,
) -> None:
    search = searched(copied_run, seconds=600)
    assert [trial.way for trial in search.trials] == [str(way) for way in WAYS]
    safe = [
        trial
        for trial in search.trials
        if not trial.failures
        and trial.agreement - (trial.agreement * (1 - trial.agreement) / 200) ** 0.5 >= 0.95
    ]
    least = min(trial.rms_error for trial in safe)
    exact = [trial for trial in safe if trial.rms_error <= 1.25 * least]
    assert len(exact) < len(safe)  # one by tensor moves the logits further
    fastest = min(exact, key=lambda trial: trial.batch_ms * trial.alone_ms)
    assert search.taken == fastest.way
    assert (copied_run.onnx("int8") / MODEL_FILE).stat().st_size == fastest.size_bytes
    assert judge(copied_run).passed


@pytest.mark.parametrize("train_rows", [5, 110])
def test_calibration_takes_as_many_texts_as_there_are(
    copied_run: RunDir, monkeypatch: pytest.MonkeyPatch, train_rows: int
) -> None:
    load = splits.load_data

    def few(recipe: DataRecipe, seed: int, store: Path | None = None) -> Data:
        data = load(recipe, seed, store)
        return replace(data, train=data.train.take(np.arange(train_rows)))

    monkeypatch.setattr(splits, "load_data", few)
    one_of_each = tuple(Way(each) for each in get_args(Activations))
    monkeypatch.setattr("ad2kit.exporting.int8.WAYS", one_of_each)
    search = searched(copied_run, seconds=600)
    assert len(search.trials) == len(one_of_each)


def test_without_a_fused_variant_nothing_is_made_from_a_fused_graph(
    copied_run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_fused(copied_run)
    monkeypatch.setattr("ad2kit.exporting.int8.WAYS", WAYS[:8])
    search = searched(copied_run, seconds=600)
    assert len(search.trials) == 4
    assert not any("fused" in trial.way for trial in search.trials)


def test_a_budget_ends_the_search(copied_run: RunDir) -> None:
    search = searched(copied_run, seconds=1e-9)
    assert len(search.trials) == 1


def test_a_way_that_cannot_be_made_costs_the_others_nothing(
    copied_run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def picky(source: Path, target: Path, way: Way, calibration: Any = ()) -> None:
        if way.weights == "int8":
            raise ValueError("no such kernel")
        quantize(source, target, way, calibration)

    monkeypatch.setattr("ad2kit.exporting.int8.quantize", picky)
    search = searched(copied_run, seconds=1e-9)
    assert "uint8" in search.taken
    told = {trial.way: trial.failures for trial in search.trials}
    assert told[str(WAYS[0])] == ("impossible: no such kernel",)
    assert judge(copied_run).variants[-1].variant == "int8"


def test_a_graph_that_no_way_fits_is_an_error_and_a_full_disk_stays_one(
    copied_run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise ValueError("no such kernel")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ad2kit.exporting.int8.quantize", never)
    with pytest.raises(ModelError, match=r"none of \d+ ways .* no such kernel"):
        searched(copied_run, seconds=1)
    monkeypatch.setattr("ad2kit.exporting.int8.quantize", full)
    with pytest.raises(OSError, match="No space left"):
        searched(copied_run, seconds=2)


def outlier(run: RunDir) -> str:
    """Give a layer a channel of huge activations, as real transformers have; all else is equal.

    The values of one channel grow by a factor by which the next product shrinks its weights.
    Returns the name of that product, whose other inputs an 8-bit range then rounds to nothing.
    """
    folder, name = run.onnx("fp32"), "/bert/encoder/layer.0/attention/{}/MatMul"
    model = onnx.load(folder / MODEL_FILE)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}

    def scale(tensor: str, where: Any, factor: float) -> None:
        array = numpy_helper.to_array(tensors[tensor]).copy()
        array[where] *= factor
        tensors[tensor].CopyFrom(numpy_helper.from_array(array, tensor))

    (bias,) = [name for name in tensors if name.endswith("layer.0.attention.self.value.bias")]
    scale(nodes[name.format("self/value")].input[1], (slice(None), 0), 1e5)  # [inputs, outputs]
    scale(bias, 0, 1e5)
    scale(nodes[name.format("output/dense")].input[1], 0, 1e-5)
    onnx.save(model, folder / MODEL_FILE)
    forge(folder)
    return name.format("output/dense")


@pytest.mark.slow
def test_where_none_passes_the_node_that_loses_most_is_left_in_float(copied_run: RunDir) -> None:
    node = outlier(copied_run)
    without_fused(copied_run)
    dynamic = [str(way) for way in WAYS if way.activations == "dynamic" and not way.fused]
    search = searched(copied_run, seconds=0, min_agreement=1.0)
    assert [trial.way for trial in search.trials[: len(dynamic)]] == dynamic
    assert all(trial.failures for trial in search.trials[:-1])
    assert not search.trials[-1].failures
    assert search.taken == search.trials[-1].way
    assert "nodes in float" in search.taken
    graph = onnx.load(copied_run.onnx("int8") / MODEL_FILE).graph
    assert node in {kept.name for kept in graph.node if kept.op_type == "MatMul"}


@pytest.mark.parametrize("fused", [False, True])
def test_a_node_that_is_left_in_float_stays_as_it_was(
    finished_run: RunDir, tmp_path: Path, fused: bool
) -> None:
    source = finished_run.onnx("fused" if fused else "fp32") / MODEL_FILE
    products = [name for name in nodes_to_quantize(source) if "Gather" not in name]
    for kept in ((), (products[-1],), tuple(products)):
        quantize(source, tmp_path / "model.onnx", Way(fused=fused, in_float=kept))
        nodes = onnx.load(tmp_path / "model.onnx").graph.node
        names = {node.name.removesuffix("_MatMul") for node in nodes if node.op_type in FLOAT}
        assert names & set(products) == set(kept)


def test_one_candidate_is_open_at_a_time(
    copied_run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An open graph keeps its weights and the activations of its largest batch."""
    alive, most = WeakSet[OnnxClassifier](), 0

    class Counted(OnnxClassifier):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            nonlocal most
            super().__init__(*args, **kwargs)
            gc.collect()
            alive.add(self)
            most = max(most, len(alive))

    monkeypatch.setattr("ad2kit.exporting.export.OnnxClassifier", Counted)
    monkeypatch.setattr("ad2kit.exporting.int8.WAYS", WAYS[:6])
    search = searched(copied_run, seconds=600, min_agreement=1.0)
    assert len(search.trials) >= 6
    assert most == 2  # the reference, and one candidate


def test_what_is_mostly_float_is_not_called_int8(
    copied_run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = nodes_to_quantize(copied_run.onnx("fp32") / MODEL_FILE)
    quantised = OnnxArtifact.read(copied_run.onnx("int8") / OnnxArtifact.file_name)
    assert quantised.weights_in_8_bits is not None
    assert quantised.weights_in_8_bits > 0.9
    assert "of its weights in 8 bits" in caption(copied_run)

    def timid(source: Path, target: Path, way: Way, calibration: Any = ()) -> None:
        quantize(source, target, replace(way, in_float=tuple(nodes[:-1])), calibration)

    monkeypatch.setattr("ad2kit.exporting.int8.quantize", timid)
    without_fused(copied_run)
    search = searched(copied_run, seconds=1e-9)
    assert search.trials[0].failures == ("share of weights in 8 bits",)
    artifact = OnnxArtifact.read(copied_run.onnx("int8") / OnnxArtifact.file_name)
    assert artifact.weights_in_8_bits is not None
    assert artifact.weights_in_8_bits < 0.5
    assert set(nodes[:-1]) & set(artifact.in_float)
    verdict = next(v for v in judge(copied_run).variants if v.variant == "int8")
    failed = [check.name for check in verdict.checks if not check.passed]
    assert failed == ["share of weights in 8 bits"]
    assert PurePosixPath(artifact.in_float[0].strip("/")).parent.as_posix() in caption(copied_run)
