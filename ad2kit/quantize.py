"""fp32 ONNX to int8 ONNX."""

from __future__ import annotations

import logging
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def quantize_int8(fp32: Path, int8: Path) -> None:
    """Write a dynamically quantised copy of an fp32 graph.

    Weights of matrix products become int8 per channel, activations are quantised at run time.
    So does the largest embedding table, which is most of a small student. The smaller tables
    (positions, segments) are added to it: a hundredth of its size, and their rounding errors
    would come on top of its own.

    Args:
        fp32: the graph to read.
        int8: the graph to write.
    """
    with _without_advice():
        quantize_dynamic(
            fp32,
            int8,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            nodes_to_exclude=_small_tables(fp32),
            per_channel=True,
            weight_type=QuantType.QInt8,
            # The tracer leaves some intermediate types out; all of them are float.
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )


def _small_tables(path: Path) -> list[str]:
    """Return the names of the nodes that look something up in any table but the largest."""
    graph = onnx.load(path).graph
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    lookups = [node for node in graph.node if node.op_type == "Gather" and node.input[0] in sizes]
    lookups.sort(key=lambda node: sizes[node.input[0]])
    return [node.name for node in lookups[:-1]]


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence the root logger's advice to preprocess, which changes nothing for these graphs."""

    def keep(record: logging.LogRecord) -> bool:
        return "pre-processing before quantization" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)
