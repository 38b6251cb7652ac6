"""Conversion of an fp32 ONNX graph: fused nodes, a smaller last layer, and fp16.

The head of most encoders reads the state of the first token only, but a graph computes the states
of all tokens. The last layer needs the keys and values of all tokens. It needs its queries, its
output projection and its feed-forward block, which are five sixths of its multiplications, for the
first token only. The results are the same numbers.

The method is an analysis of demand from the outputs backwards: is a tensor needed as a whole, or
only at the first position of an axis? If all readers of a node need the first position only, the
node computes no other position.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.fusion_options import AttentionMaskFormat, FusionOptions
from onnxruntime.transformers.optimizer import optimize_model

from ad2kit.run.machine import without_message

if TYPE_CHECKING:
    from pathlib import Path

    from onnxruntime.transformers.onnx_model import OnnxModel

    Shape = list[int | str]


# The fusions make these nodes, and no exporter writes them, except for LayerNormalization.
FUSED = (
    "Attention",
    "MultiHeadAttention",
    "EmbedLayerNormalization",
    "SkipLayerNormalization",
    "LayerNormalization",
    "BiasGelu",
    "FastGelu",
    "Gelu",
)


# Each position of the output depends on the same position of the inputs only, for all axes but the
# last one.
_POSITIONWISE = {
    "Add",
    "And",
    "BiasGelu",
    "Cast",
    "Clip",
    "Div",
    "Erf",
    "FastGelu",
    "Gelu",
    "Identity",
    "IsNaN",
    "LayerNormalization",
    "Mul",
    "Pow",
    "Relu",
    "Sigmoid",
    "SkipLayerNormalization",
    "Softmax",
    "Sqrt",
    "Sub",
    "Tanh",
    "Where",
}
_TOKENS = -2  # the tokens of [texts, tokens, width]; all axes here are counted from the end


def fuse(fp32: Path, fused: Path) -> None:
    """Write a copy of an fp32 graph with the fusions of :func:`fused_copy`.

    Args:
        fp32: the graph to read, of any family.
        fused: the graph to write.
    """
    fused_copy(fp32).save_model_to_file(str(fused))


def fused_copy(fp32: Path, *, keep_products: bool = False) -> OnnxModel:
    """Return a copy of an fp32 graph with ONNX Runtime's transformer fusions.

    If the head reads the first token only, the copy computes the last layer for that token only.

    The attention mask is kept as it is. By default the fusions reduce it to a length for each text.
    Such a graph gives other logits, without an error, if padding is on the left or a token in the
    middle is masked.

    Args:
        fp32: the graph to read, of any family; the number of heads and the width are found in it.
        keep_products: keep each matrix product and each lookup as a node of its own, so that they
            can be quantised one by one.
    """
    options = FusionOptions("bert")
    options.attention_mask_format = AttentionMaskFormat.AttentionMask
    options.use_multi_head_attention = keep_products
    options.enable_embed_layer_norm = not keep_products
    # On the CPU the fused node is slower than the two nodes that it replaces.
    options.enable_skip_layer_norm = not keep_products
    options.enable_bias_skip_layer_norm = not keep_products
    # With opt_level 0 the optimisations of a session are left to the session, because they would
    # fit the graph to the machine that exports it.
    # Pruned heads are narrower than the layer: the fusion warns about it, and fuses them. The
    # attention of a graph by torch.onnx stays as it is, and costs no more.
    with (
        without_message("fusion_attention", "Input hidden size"),
        without_message("fusion_attention", "Failed to detect num_heads"),
    ):
        model = optimize_model(
            str(fp32),
            model_type="bert",
            num_heads=0,
            hidden_size=0,
            optimization_options=options,
            opt_level=0,
        )
    read_first_token_only(model.model)
    return model


def to_fp16(fp32: Path, fp16: Path) -> None:
    """Write a copy of a graph with half the bytes; inputs and outputs keep their types.

    A number outside the range of float16 (such as the large negative number of a mask) becomes the
    nearest number in the range. No node is kept in float32: the kernels of softmax and
    LayerNormalization sum in float32 themselves. The gate measures whether that is enough.
    """
    onnx.save(convert_float_to_float16(onnx.load(fp32), keep_io_types=True), fp16)


def node_counts(path: Path) -> dict[str, int]:
    """Return how many nodes of each fused kind a graph holds."""
    counts = Counter(node.op_type for node in onnx.load(path).graph.node)
    return {name: counts[name] for name in FUSED if counts[name]}


def read_first_token_only(model: onnx.ModelProto) -> int:
    """Narrow the nodes that are read at the first token only, in place; return their number."""
    graph = model.graph
    shapes = _shapes(model)
    zeros = {name for name, value in _constants(graph).items() if value.ndim == 0 and value == 0}
    # For each tensor the axis whose first position is enough; None if the whole tensor is needed.
    demands: dict[str, int | None] = dict.fromkeys(output.name for output in graph.output)
    # For each node to narrow, by its index: the axis of each input that it needs the first
    # position of, by the index of the input.
    narrow: dict[int, dict[int, int]] = {}
    for node_index, node in reversed(list(enumerate(graph.node))):
        if _takes_first_token(node, shapes, zeros):
            input_axes: dict[int, int] | None = {0: _TOKENS}
        else:
            axis = _demanded_axis(node, demands)
            input_axes = None if axis is None else _input_axes(node, axis, shapes)
        if input_axes is not None:
            narrow[node_index] = input_axes
        for input_index, name in enumerate(node.input):
            axis = None if input_axes is None else input_axes.get(input_index)
            demands[name] = axis if demands.get(name, axis) == axis else None
        demands |= dict.fromkeys(names_read_inside(node))
    return _rewrite(graph, narrow, demands, shapes)


def _takes_first_token(node: onnx.NodeProto, shapes: dict[str, Shape], zeros: set[str]) -> bool:
    return (
        node.op_type == "Gather"
        and node.input[1] in zeros
        and len(shapes.get(node.input[0], ())) == 3
        and _attributes(node).get("axis", 0) in (1, _TOKENS)
    )


def _demanded_axis(node: onnx.NodeProto, demands: dict[str, int | None]) -> int | None:
    """Return the axis whose first position of the node's only output is enough, if there is one."""
    demanded_outputs = [name for name in node.output if name in demands]
    if demanded_outputs != [node.output[0]]:
        return None
    return demands[node.output[0]]


def _input_axes(node: onnx.NodeProto, axis: int, shapes: dict[str, Shape]) -> dict[int, int] | None:
    """Return the axis of each input that a narrow node needs the first position of.

    ``axis`` is the axis of its output; the keys are the indices of the inputs. None if the whole
    node has to be computed, because its kind or a shape is unknown.
    """
    attributes = _attributes(node)
    if any(name and name not in shapes for name in (*node.input, *node.output)):
        return None
    output_shape = shapes[node.output[0]]
    input_shapes = [shapes.get(name, []) for name in node.input]
    if node.op_type in _POSITIONWISE and axis < -1:
        if attributes.get("axis", -1) not in (-1, len(output_shape) - 1):
            return None
        # An input without this axis, or with one position of it, is the same for all positions.
        return {
            index: axis
            for index, shape in enumerate(input_shapes)
            if len(shape) >= -axis and shape[axis] != 1
        }
    if node.op_type == "MatMul" and axis == -2:
        return {0: axis}
    if node.op_type == "MultiHeadAttention" and axis == -2 and not any(node.input[5:]):
        return {0: axis}  # the queries; each sees the keys and values of all tokens
    if node.op_type == "Transpose":
        return {0: attributes["perm"][axis] - len(output_shape)}
    if node.op_type == "Reshape" and not attributes.get("allowzero"):
        # Heads are split or joined in the axes after this one; the axes up to it are unchanged.
        unchanged = len(output_shape) + axis + 1
        same_axes = input_shapes[0][:unchanged] == output_shape[:unchanged]
        if same_axes and all(isinstance(size, int) for size in output_shape[unchanged:]):
            return {0: unchanged - 1 - len(input_shapes[0])}
    return None


def _rewrite(
    graph: onnx.GraphProto,
    narrow: dict[int, dict[int, int]],
    demands: dict[str, int | None],
    shapes: dict[str, Shape],
) -> int:
    """Slice the inputs of the narrow nodes, unless they are narrow; return the number of nodes."""
    nodes: list[onnx.NodeProto] = []
    slices: dict[tuple[str, int], str] = {}
    axes = {name: demands[name] for index in narrow for name in graph.node[index].output}

    def constant(name: str, values: list[int]) -> str:
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    for node_index, node in enumerate(graph.node):
        for input_index, axis in narrow.get(node_index, {}).items():
            tensor = node.input[input_index]
            if axes.get(tensor) is not None or axes[node.output[0]] is None:
                continue  # the input is narrow already, or the node itself removes the axis
            if (tensor, axis) not in slices:
                name = f"{tensor}/first_of_axis{axis}"
                limits = {"starts": 0, "ends": 1, "axes": axis}
                bounds = [constant(f"{name}/{key}", [value]) for key, value in limits.items()]
                nodes.append(helper.make_node("Slice", [tensor, *bounds], [name], name=name))
                slices[tensor, axis] = name
            node.input[input_index] = slices[tensor, axis]
        if node.op_type == "Reshape" and (output_axis := axes.get(node.output[0])) is not None:
            shape = shapes[node.output[0]]
            axes_before = len(shape) + output_axis
            # In the shape of a Reshape, 0 copies the size of the input.
            sizes_after = [int(size) for size in shape[axes_before + 1 :]]
            sizes = [*[0] * axes_before, 1, *sizes_after]
            node.input[1] = constant(f"{node.output[0]}/first_shape", sizes)
        nodes.append(node)
    live_nodes = _live_nodes(graph, nodes)
    del graph.node[:]
    del graph.value_info[:]
    graph.node.extend(live_nodes)
    return sum(axis is not None for axis in axes.values())


def _live_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Return the nodes that an output needs; those that computed old shapes are left out."""
    live_names = {output.name for output in graph.output}
    live_nodes = []
    for node in reversed(nodes):
        if live_names.intersection(node.output):
            live_names.update([*node.input, *names_read_inside(node)])
            live_nodes.append(node)
    return live_nodes[::-1]


def _shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Return the shape of each tensor with known axes; an axis of variable size has a name."""
    graph = SymbolicShapeInference.infer_shapes(model, auto_merge=True).graph
    shapes: dict[str, Shape] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            axes = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
            if 0 not in axes:  # neither a name nor a size
                shapes[value.name] = axes
    constants = {name: list(array.shape) for name, array in _constants(graph).items()}
    return shapes | constants


def _constants(graph: onnx.GraphProto) -> dict[str, Any]:
    """Return the constant tensors of a graph by name."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "Constant":
            continue
        attributes = _attributes(node)
        if "value" in attributes:
            constants[node.output[0]] = numpy_helper.to_array(attributes["value"])
    return constants


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def names_read_inside(node: onnx.NodeProto) -> set[str]:
    """Return the names of all tensors that the branches or the body of a node read."""
    bodies = [
        attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH
    ]
    names = {output.name for body in bodies for output in body.output}
    for body in bodies:
        for inner in body.node:
            names.update(inner.input)
            names |= names_read_inside(inner)
    return names
