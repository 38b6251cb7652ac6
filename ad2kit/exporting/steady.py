"""The ``steady`` variant: int8 whose answer to a text does not depend on the texts beside it.

A dynamic int8 graph finds one scale for the activations of a whole batch, so each text changes the
answers to the others. Here each token has a scale of its own. ONNX Runtime has no such operator, so
it is written out: with the weights W of a product as int8 and a scale for each output,

    s = max|x| / 127,   q = round(x / s) + 128,   x W = s · (q - 128) (W_int8 · w)

for each row x of the input. The integers are exact: the product is the same in any batch. Tables of
embeddings are int8 with a scale for each row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ad2kit.exporting.fuse import fused_copy, names_read_inside
from ad2kit.run.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_CONTRIB = "com.microsoft"
_LARGEST = 127
_ZERO = 128  # of the activations, which are uint8: the fast products take them with int8 weights
_LEAST_OPSET = 18  # ReduceMax takes its axes as an input
# A row of zeros has the scale 0, which nothing can be divided by.
_LEAST_SCALE = 1e-12
# A smaller table stays in float: its lookup costs nothing, and its errors would add to the others.
_LEAST_TABLE_SHARE = 0.05


def make_steady(fp32: Path, steady: Path) -> None:
    """Write a copy of an fp32 graph with 8-bit matrix products and tables.

    Products of two activations (in the attention) and the head stay in float.

    Args:
        fp32: the graph to read, of any family.
        steady: the graph to write.

    Raises:
        ModelError: the graph is older than the operators that are written.
    """
    fused = fused_copy(fp32, keep_products=True)
    fused.topological_sort()
    model = fused.model
    opset = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    if opset < _LEAST_OPSET:
        raise ModelError(
            f"{fp32} has opset {opset}, expected at least {_LEAST_OPSET} for the variant steady",
            hint="export it again with a newer torch or optimum, or leave steady out of "
            "export.variants",
        )
    _Rewriting(model.graph).write()
    if not any(opset.domain == _CONTRIB for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_CONTRIB, 1))
    onnx.save(model, steady)


class _Rewriting:
    """The rewriting of one graph, in place."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._nodes: list[onnx.NodeProto] = []
        self._rows: dict[str, str] = {}  # the quantised rows of each input of a product
        self._tensors: dict[str, NDArray[Any]] = {
            "steady/one": np.array(1, np.float32),
            "steady/zero": np.array(_ZERO, np.uint8),
            "steady/largest": np.array(1 / _LARGEST, np.float32),
            "steady/least": np.array(_LEAST_SCALE, np.float32),
            "steady/last_axis": np.array([-1], np.int64),
        }

    def write(self) -> None:
        """Replace products with weights and lookups in large tables."""
        tables = self._large_tables()
        for node in self._graph.node:
            if node.op_type == "MatMul" and self._is_matrix(node.input[1]):
                self._product(node)
            elif _looks_up_rows(node) and node.input[0] in tables:
                self._lookup(node)
            else:
                self._nodes.append(node)
        used = {name for node in self._nodes for name in node.input}
        used |= {name for node in self._nodes for name in names_read_inside(node)}
        kept = [tensor for tensor in self._graph.initializer if tensor.name in used]
        new = [numpy_helper.from_array(v, n) for n, v in self._tensors.items()]
        for field, content in (("node", self._nodes), ("initializer", [*kept, *new])):
            self._graph.ClearField(field)
            getattr(self._graph, field).extend(content)
        self._graph.ClearField("value_info")

    def _is_matrix(self, name: str) -> bool:
        tensor = self._weights.get(name)
        return (
            tensor is not None
            and len(tensor.dims) == 2
            and tensor.data_type == onnx.TensorProto.FLOAT
        )

    def _large_tables(self) -> set[str]:
        """Return the names of the tables to look up that hold most of the weights."""
        sizes = {
            node.input[0]: int(np.prod(self._weights[node.input[0]].dims))
            for node in self._graph.node
            if _looks_up_rows(node) and self._is_matrix(node.input[0])
        }
        total = sum(
            int(np.prod(tensor.dims)) for tensor in self._weights.values() if len(tensor.dims) == 2
        )
        return {name for name, size in sizes.items() if size >= _LEAST_TABLE_SHARE * total}

    def _add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def _quantised_rows(self, name: str) -> str:
        """Quantise each row of an activation, once for all products that read it.

        Returns:
            The name of the tensor of integers; that of its scales has ``/scale`` at its end.
        """
        if name not in self._rows:
            rows = f"{name}/rows"
            sizes = self._add("Abs", [name], f"{rows}/abs")
            sizes = self._add("ReduceMax", [sizes, "steady/last_axis"], f"{rows}/max", keepdims=1)
            scale = self._add("Mul", [sizes, "steady/largest"], f"{rows}/any_scale")
            scale = self._add("Max", [scale, "steady/least"], f"{rows}/scale")
            scaled = self._add("Div", [name, scale], f"{rows}/scaled")
            self._add("QuantizeLinear", [scaled, "steady/one", "steady/zero"], rows)
            self._rows[name] = rows
        return self._rows[name]

    def _product(self, node: onnx.NodeProto) -> None:
        rows = self._quantised_rows(node.input[0])
        weights, scales = self._quantised_weights(node.input[1], axis=0)
        inputs = [rows, weights, "steady/one", scales, "steady/zero"]
        unscaled = self._add(
            "MatMulIntegerToFloat", inputs, f"{node.output[0]}/unscaled", domain=_CONTRIB
        )
        self._add("Mul", [unscaled, f"{rows}/scale"], node.output[0])

    def _lookup(self, node: onnx.NodeProto) -> None:
        table, scales = self._quantised_weights(node.input[0], axis=1)
        output = node.output[0]
        integers = self._add("Gather", [table, node.input[1]], f"{output}/integers")
        floats = self._add("Cast", [integers], f"{output}/unscaled", to=onnx.TensorProto.FLOAT)
        scale = self._add("Gather", [scales, node.input[1]], f"{output}/scale")
        self._add("Mul", [floats, scale], output)

    def _quantised_weights(self, name: str, axis: int) -> tuple[str, str]:
        """Add the int8 tensor of a matrix and its scales, found along ``axis``; return the names.

        Columns (``axis`` 0) have a vector of scales; rows (``axis`` 1) have a column of them.
        """
        integers, scales = (f"{name}/{part}_by_axis_{axis}" for part in ("int8", "scales"))
        if integers not in self._tensors:
            matrix = numpy_helper.to_array(self._weights[name])
            size = np.abs(matrix).max(axis=axis, keepdims=True) / _LARGEST
            size = np.maximum(size, _LEAST_SCALE).astype(np.float32)
            self._tensors[integers] = np.round(matrix / size).astype(np.int8)
            self._tensors[scales] = size if axis else size[0]
        return integers, scales


def _looks_up_rows(node: onnx.NodeProto) -> bool:
    """Whether a node takes rows of a table."""
    return node.op_type == "Gather" and all(
        attribute.i == 0 for attribute in node.attribute if attribute.name == "axis"
    )
