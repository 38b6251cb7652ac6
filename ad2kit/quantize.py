"""Float ONNX to int8 ONNX, in one of several ways."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

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
_8_BITS = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
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
    common: dict[str, Any] = {
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
        # All activations of one input at a time, and not of all inputs at once.
        common["extra_options"] |= {"CalibStridedMinMax": 1}
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


def weights_in_8_bits(path: Path) -> tuple[float, tuple[str, ...]]:
    """Return the share of a graph's weights that are stored in 8 bits, and where the others are.

    Weights are matrices and tables; biases and the parameters of norms are left out. The nodes are
    those that hold at least a hundredth of all weights in float, the largest first.
    """
    graph = onnx.load(path).graph
    tensors = [tensor for tensor in graph.initializer if _is_weight(tensor)]
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in tensors}
    in_8_bits = {tensor.name for tensor in tensors if tensor.data_type in _8_BITS}
    weights = sum(sizes.values())
    in_float = {
        node.name: sum(sizes.get(name, 0) for name in node.input if name not in in_8_bits)
        for node in graph.node
    }
    large = [name for name, size in in_float.items() if 100 * size >= weights]
    large.sort(key=lambda name: -in_float[name])
    share = sum(size for name, size in sizes.items() if name in in_8_bits) / weights
    return share, tuple(large)


def _is_weight(tensor: onnx.TensorProto) -> bool:
    """Whether this is a matrix of weights, in float or in 8 bits."""
    return len(tensor.dims) > 1 and tensor.data_type in {*_8_BITS, onnx.TensorProto.FLOAT}


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """The inputs of a calibration; the quantiser asks for ranges of them."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds, self._range = feeds, iter(feeds)

    def __len__(self) -> int:
        return len(self._feeds)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._range = iter(self._feeds[start_index:end_index])

    def get_next(self) -> Feed | None:
        return next(self._range, None)


def _small_tables(path: Path) -> list[str]:
    """Return the names of the nodes that look something up in any table but the largest."""
    graph = onnx.load(path).graph
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    lookups = [node for node in graph.node if node.op_type == "Gather" and node.input[0] in sizes]
    lookups.sort(key=lambda node: sizes[node.input[0]])
    return [node.name for node in lookups[:-1]]
