"""The steady graph: rows of their own scale, tables of 8 bits, and what it leaves in float."""

from __future__ import annotations

import platform
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import quantize_dynamic

from ad2kit.exporting import classifier
from ad2kit.exporting.conversion import company_checks, company_of
from ad2kit.exporting.int8 import weights_in_8_bits
from ad2kit.exporting.records import Company
from ad2kit.exporting.steady import make_steady
from ad2kit.gate.records import LatencyReport, ParityReport
from ad2kit.gate.shipping import passed_variants
from ad2kit.run import machine
from ad2kit.run.errors import ModelError
from ad2kit.run.files import write_record
from ad2kit.run.sections import ParityRecipe

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from ad2kit.run.folder import RunDir
    from ad2kit.run.sections import Task

TABLE, WIDTH, OUTPUTS = 300, 32, 8


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A graph with a table, two products that share an input and one their weights, and a head."""
    model = onnx.parser.parse_model(f"""
        <ir_version: 9, opset_import: ["" : 18]>
        g (int64[n, t] input_ids) => (float[n, t, {OUTPUTS}] logits, float[n, t, {OUTPUTS}] second)
        {{ x = Gather(table, input_ids)  a = MatMul(x, w)  b = MatMul(x, w)
           c = Mul(a, b)  logits = MatMul(x, v)  second = MatMul(c, v) }}
    """)
    rng = np.random.default_rng(3)
    table = rng.normal(size=(TABLE, WIDTH)).astype(np.float32)
    table[0] = 0
    tensors = {
        "table": table,
        "w": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32),
        "v": rng.normal(size=(WIDTH, OUTPUTS)).astype(np.float32),
    }
    tensors["v"][:, 1] = 0
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in tensors.items())
    onnx.checker.check_model(model)
    onnx.save(model, tmp_path / "plain.onnx")
    return tmp_path / "plain.onnx"


def run(path: Path, ids: NDArray[np.int64]) -> list[NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: list[NDArray[np.float32]] = session.run(None, {"input_ids": ids})
    return found


def test_products_and_tables_are_close_and_steady(graph: Path, tmp_path: Path) -> None:
    steady = tmp_path / "steady.onnx"
    make_steady(graph, steady)
    ids = np.random.default_rng(5).integers(0, TABLE, (6, 7))
    ids[0, 0] = 0  # a row of zeros
    plain, found = run(graph, ids), run(steady, ids)
    for expected, values in zip(plain, found, strict=True):
        assert np.isfinite(values).all()
        assert np.abs(values - expected).max() < 0.03 * np.abs(expected).max()
        assert np.abs(values - expected).max() > 0  # it is another graph
    assert (found[0][..., 1] == 0).all()  # an output whose weights are zeros
    for row in range(len(ids)):
        for together, alone in zip(found, run(steady, ids[row : row + 1]), strict=True):
            np.testing.assert_array_equal(together[row], alone[0])


def test_a_scale_for_a_whole_batch_is_not_steady(graph: Path, tmp_path: Path) -> None:
    """Control: the same weights with the dynamic scales of ONNX Runtime."""
    model = onnx.load(graph)
    for position, node in enumerate(model.graph.node):
        node.name = str(position)  # the quantiser asks for names
    (table,) = (each for each in model.graph.initializer if each.name == "table")
    values = numpy_helper.to_array(table).copy()
    values[1] *= 50  # a company that takes the range of all
    table.CopyFrom(numpy_helper.from_array(values, "table"))
    onnx.save(model, graph)
    quantize_dynamic(graph, tmp_path / "int8.onnx")
    make_steady(graph, tmp_path / "steady.onnx")
    ids = np.array([[5, 6, 7], [1, 1, 1]])

    def moved(path: Path) -> float:
        alone, together = run(path, ids[:1])[1][0], run(path, ids)[1][0]
        return float(np.abs(together - alone).max() / np.abs(alone).max())

    assert moved(tmp_path / "int8.onnx") > 0.1
    assert moved(tmp_path / "steady.onnx") == 0


def test_weights_are_kept_once_and_in_8_bits(graph: Path, tmp_path: Path) -> None:
    make_steady(graph, tmp_path / "steady.onnx")
    model = onnx.load(tmp_path / "steady.onnx")
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["MatMulIntegerToFloat"] == 4
    assert kinds["MatMul"] == 0
    assert kinds["QuantizeLinear"] == 2  # x once for its three products, and c
    large = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 2]
    integers = [each.name for each in large if each.data_type == onnx.TensorProto.INT8]
    assert sorted(integers) == ["table/int8_by_axis_1", "v/int8_by_axis_0", "w/int8_by_axis_0"]
    assert weights_in_8_bits(tmp_path / "steady.onnx")[0] > 0.95
    assert (tmp_path / "steady.onnx").stat().st_size < graph.stat().st_size / 3


def test_other_readers_of_a_matrix_are_left_alone(tmp_path: Path) -> None:
    """A matrix that is both table and weights, columns that are looked up, a branch that reads."""
    model = onnx.parser.parse_model(f"""
        <ir_version: 9, opset_import: ["" : 18]>
        g (int64[n, t] input_ids) => (float[n, t, {WIDTH}] logits)
        {{ x = Gather(w, input_ids)  a = MatMul(x, w)  c = Gather<axis = 1>(w, zero)
           d = Mul(a, c)  yes = Greater(one, none)
           logits = If (yes) <
               then_branch = yes_branch () => (float[n, t, {WIDTH}] e) {{ e = Add(d, b) }},
               else_branch = no_branch () => (float[n, t, {WIDTH}] f) {{ f = Sub(d, b) }}> }}
    """)
    rng = np.random.default_rng(3)
    tensors = {
        "w": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32),
        "b": rng.normal(size=WIDTH).astype(np.float32),
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.float32),
        "none": np.array(0, np.float32),
    }
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in tensors.items())
    onnx.save(model, tmp_path / "plain.onnx")
    make_steady(tmp_path / "plain.onnx", tmp_path / "steady.onnx")
    ids = rng.integers(0, WIDTH, (3, 4))
    (plain,), (found,) = (run(tmp_path / f"{name}.onnx", ids) for name in ("plain", "steady"))
    assert 0 < np.abs(found - plain).max() < 0.05 * np.abs(plain).max()
    old = onnx.load(tmp_path / "plain.onnx")
    old.opset_import[0].version = 17
    onnx.save(old, tmp_path / "old.onnx")
    with pytest.raises(ModelError, match="has opset 17, expected at least 18"):
        make_steady(tmp_path / "old.onnx", tmp_path / "none.onnx")


@pytest.mark.parametrize(
    ("cpu", "flags", "exact"),
    [
        ("x86_64", {"avx2"}, True),
        ("AMD64", None, True),
        ("x86_64", {"avx2", "avx_vnni"}, False),
        ("aarch64", {"asimd"}, False),
    ],
)
def test_a_cpu_that_may_overflow_multiplies_exactly(
    finished_run: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    cpu: str,
    flags: set[str] | None,
    exact: bool,
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: cpu)
    monkeypatch.setattr(machine, "cpu_flags", lambda: None if flags is None else frozenset(flags))
    graph = finished_run.onnx("fp32") / classifier.MODEL_FILE
    options = classifier.open_session(graph, 1, "cpu").get_session_options()
    entry = "session.x64quantprecision"
    if exact:
        assert options.get_session_config_entry(entry) == "1"
    else:
        with pytest.raises(RuntimeError, match="does not have"):
            options.get_session_config_entry(entry)


def test_company_is_measured_by_task() -> None:
    alone = np.array([[2.0, 0.0], [0.1, 0.0], [0.0, 3.0]], np.float32)
    beside = np.array([[2.0, 0.0], [0.0, 0.1], [0.0, 3.0]], np.float32)
    found = company_of("single_label", alone, beside)
    assert found.texts == 3
    assert found.flips == pytest.approx(1 / 3)
    assert found.shift == pytest.approx(2 / (1 + np.exp(-0.1)) - 1, abs=1e-6)
    several = company_of("multi_label", alone - 1, beside - 1)
    assert several.flips == 0  # 0.1 - 1 is below the threshold, alone and beside others
    value = company_of("regression", alone[:, :1], beside[:, :1], spread=0.5)
    assert value.flips == 0
    assert value.shift == pytest.approx(0.2)
    hot = company_of("single_label", alone, beside, temperature=2.0)
    assert hot.flips == found.flips
    assert hot.shift < found.shift
    unknown = company_of("single_label", alone, np.where(beside == 3, np.nan, beside))
    assert unknown.flips == pytest.approx(2 / 3)
    strict = ParityRecipe(max_company_flips=0.5, max_company_shift=0.01)

    def passed(company: Company, task: Task, thresholds: ParityRecipe) -> list[bool]:
        return [check.passed for check in company_checks(company, task, thresholds)]

    assert passed(found, "single_label", ParityRecipe()) == [False]
    assert passed(found, "single_label", strict) == [True, False]
    assert passed(company_of("single_label", alone, alone), "single_label", strict) == [True, True]
    assert passed(value, "regression", ParityRecipe()) == [True]
    assert passed(value, "regression", strict) == [False]
    odd = company_of("regression", alone[:, :1], np.where(beside == 3, np.nan, beside)[:, 1:])
    assert passed(odd, "regression", ParityRecipe(max_company_shift=100)) == [False, True]
    wild = company_of("regression", alone[:, :1], alone[::-1, :1], spread=0.5)
    assert passed(wild, "regression", ParityRecipe()) == [False]


def shipped(run: RunDir, ship: str) -> list[str]:
    """Return the variants in the order in which they would be shipped."""
    export = run.recipe.export.model_copy(update={"ship": ship})
    write_record(run.recipe_file, run.recipe.model_copy(update={"export": export}))
    return [folder.name for folder in passed_variants(run)]


def test_what_is_steady_is_shipped_before_what_is_faster(copied_run: RunDir) -> None:
    report = ParityReport.read(copied_run.parity_report)
    company = {each.variant: each.company for each in report.variants}
    assert company["fp32"] is None
    moved = Company(texts=500, flips=0.0, shift=0.2)  # the tiny model of the tests hardly moves
    variants = tuple(
        each.model_copy(update={"company": moved}) if each.variant == "int8" else each
        for each in report.variants
    )
    write_record(copied_run.parity_report, report.model_copy(update={"variants": variants}))
    latency = LatencyReport.read(copied_run.latency_report)
    p50_ms = {"fp32": 4.0, "fused": 3.0, "steady": 2.0, "int8": 1.0}
    cells = [c.model_copy(update={"p50_ms": p50_ms.get(c.system, 9.0)}) for c in latency.cells]
    write_record(copied_run.latency_report, latency.model_copy(update={"cells": tuple(cells)}))
    assert shipped(copied_run, "fastest") == ["int8", "steady", "fused", "fp32"]
    assert shipped(copied_run, "steady") == ["steady", "fused", "fp32", "int8"]
    # A report of an older version does not say that int8 is steady.
    unknown = tuple(each.model_copy(update={"company": None}) for each in report.variants)
    write_record(copied_run.parity_report, report.model_copy(update={"variants": unknown}))
    assert shipped(copied_run, "steady") == ["fused", "fp32", "int8", "steady"]
