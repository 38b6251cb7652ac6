"""Float ONNX to int8 ONNX, in one of several ways."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

from ad2kit.runtime import without_message

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    Feed = dict[str, NDArray[np.int64]]

Activations = Literal["dynamic", "minmax", "percentile", "entropy"]
_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}
# Lookups among them: the embedding table is most of a small student.
_QUANTISED = ("MatMul", "Gemm", "Attention", "Gather", "EmbedLayerNormalization")


@dataclass(frozen=True, slots=True)
class Way:
    """How to quantise.

    ``activations``: their range is found for each batch as it comes (``dynamic``), or once, from
    real texts. ``weights`` is their type; ``per_channel`` gives each output its own scale.
    ``fused`` starts from the fused graph. ``in_float`` names nodes that are left as they are.
    """

    activations: Activations = "dynamic"
    weights: Literal["int8", "uint8"] = "int8"
    per_channel: bool = True
    fused: bool = False
    in_float: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [
            self.activations, self.weights, "per channel" if self.per_channel else "per tensor",
        ]  # fmt: skip
        if self.fused:
            parts.append("fused")
        if self.in_float:
            parts.append(f"{len(self.in_float)} nodes in float")
        return ", ".join(parts)


# In the order in which they are worth trying: what keeps most, then what is seldom better.
WAYS = tuple(
    Way(activations, weights, per_channel, fused)  # type: ignore[arg-type]
    for activations, weights, per_channel, fused in itertools.product(
        ("dynamic", "percentile", "minmax", "entropy"), ("int8", "uint8"), (True, False),
        (False, True),
    )
)  # fmt: skip


def quantize(source: Path, target: Path, way: Way, calibration: Sequence[Feed] = ()) -> None:
    """Write a quantised copy of a graph.

    Weights of matrix products and the largest embedding table become 8-bit. The smaller tables
    (positions, segments) are added to that one: a hundredth of its size, and their rounding errors
    would come on top of its own; they stay in float where they can be told apart.

    Args:
        source: the float graph; the fused one if the way says so.
        target: the graph to write.
        way: how.
        calibration: inputs of equal shape, for a way that is not dynamic.
    """
    common = {
        "op_types_to_quantize": list(_QUANTISED),
        # The quantiser splits a Gemm into a product and a sum first, and gives it another name.
        "nodes_to_exclude": [
            *_small_tables(source),
            *way.in_float,
            *(f"{name}_MatMul" for name in way.in_float),
        ],
        "per_channel": way.per_channel,
        "weight_type": QuantType.QInt8 if way.weights == "int8" else QuantType.QUInt8,
        # The tracer leaves some intermediate types out; all of them are float.
        "extra_options": {"DefaultTensorType": onnx.TensorProto.FLOAT},
    }
    # The root logger advises to preprocess, which changes nothing for these graphs.
    with without_message(None, "pre-processing before quantization"):
        if way.activations == "dynamic":
            quantize_dynamic(source, target, **common)
            return
        # Calibration sees only what has a type, and fused nodes have none until it is inferred.
        shaped = SymbolicShapeInference.infer_shapes(onnx.load(source), auto_merge=True)
        with contextlib.redirect_stdout(io.StringIO()):  # the calibrator prints as it goes
            quantize_static(
                shaped, target, _Reader(calibration), quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8, calibrate_method=_METHODS[way.activations],
                **common,
            )  # fmt: skip


def nodes_to_quantize(path: Path) -> list[str]:
    """Return the names of the nodes that :func:`quantize` would quantise."""
    graph, small = onnx.load(path).graph, set(_small_tables(path))
    constants = {tensor.name for tensor in graph.initializer}
    return [
        node.name
        for node in graph.node
        if node.op_type in _QUANTISED
        and node.name not in small
        and any(name in constants for name in node.input)
    ]


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def _small_tables(path: Path) -> list[str]:
    """Return the names of the nodes that look something up in any table but the largest."""
    graph = onnx.load(path).graph
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    lookups = [node for node in graph.node if node.op_type == "Gather" and node.input[0] in sizes]
    lookups.sort(key=lambda node: sizes[node.input[0]])
    return [node.name for node in lookups[:-1]]
