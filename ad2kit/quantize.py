"""fp32 ONNX to int8 ONNX."""

from __future__ import annotations

import logging
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
    ``Gather`` is included, since the embedding tables are most of a small student.

    Args:
        fp32: the graph to read.
        int8: the graph to write.
    """
    with _without_advice():
        quantize_dynamic(
            fp32,
            int8,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            # The tracer leaves some intermediate types out; all of them are float.
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )


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
