"""fp32 ONNX to the same graph with fewer, larger nodes, less of the last layer, and that to fp16.

The head of most encoders takes the state of the first token and drops all others, yet a graph
computes them all. Of the last layer only the keys and values of the other tokens are needed; the
queries, the output projection and the feed-forward block, which are five sixths of its
multiplications, are needed for one token. The results are the same numbers.

It is an analysis of demand: from the outputs backwards, is a tensor needed whole, or only at the
first position of an axis? Where all readers of a node agree on the latter, it computes no more.
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

    Shape = list[int | str]


# What the fusions make, and no exporter writes (LayerNormalization alone comes from both).
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


def fuse(fp32: Path, fused: Path) -> None:
    """Write a copy of an fp32 graph with ONNX Runtime's transformer fusions.

    Of the last layer it computes only what the first token needs, if that is all the head reads.

    The attention mask stays what it is. By default the fusions reduce it to a length per text,
    which gives other logits where padding is on the left or a token in the middle is masked, and
    no error.

    Args:
        fp32: the graph to read, of any family; heads and width are found in it.
        fused: the graph to write.
    """
    options = FusionOptions("bert")
    options.attention_mask_format = AttentionMaskFormat.AttentionMask
    # opt_level 0: what a session optimises when it starts is left to the session, because a graph
    # that went through it fits the machine that it was made on.
    # Of pruned heads: the fusion says that they are narrower than the layer, and fuses them.
    with without_message("fusion_attention", "Input hidden size"):
        model = optimize_model(
            str(fp32),
            model_type="bert",
            num_heads=0,
            hidden_size=0,
            optimization_options=options,
            opt_level=0,
        )
    read_first_token_only(model.model)
    model.save_model_to_file(str(fused))


def to_fp16(fp32: Path, fp16: Path) -> None:
    """Write a copy of a graph with half the bytes; inputs and outputs keep their types.

    What does not fit into float16 (such as the large negative number of a mask) becomes the largest
    that does. Nothing is kept in float32: the kernels of softmax and LayerNormalization sum in
    float32 themselves, and whether that is enough for a model is what the gate measures.
    """
    onnx.save(convert_float_to_float16(onnx.load(fp32), keep_io_types=True), fp16)


def node_counts(path: Path) -> dict[str, int]:
    """Return how many nodes of each fused kind a graph holds."""
    found = Counter(node.op_type for node in onnx.load(path).graph.node)
    return {name: found[name] for name in FUSED if found[name]}


# Each position of the output depends on that position of the inputs (of the last axis, on all).
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
_TOKENS = -2  # the axis of [texts, tokens, width]; axes are counted from the end throughout


def read_first_token_only(model: onnx.ModelProto) -> int:
    """Narrow what only the first token is read of, in place; return how many nodes that are."""
    shapes, graph = _shapes(model), model.graph
    zeros = {name for name, value in _constants(graph).items() if value.ndim == 0 and value == 0}
    # The axis of which a tensor's first position is enough; None if it is needed whole.
    demands: dict[str, int | None] = dict.fromkeys(output.name for output in graph.output)
    # For each node that is to be narrow: which inputs it needs the first of, along which axis.
    narrow: dict[int, dict[int, int]] = {}
    for place, node in reversed(list(enumerate(graph.node))):
        if _takes_first_token(node, shapes, zeros):
            wanted: dict[int, int] | None = {0: _TOKENS}
        else:
            axis = _agreed(node, demands)
            wanted = None if axis is None else _wanted(node, axis, shapes)
        if wanted is not None:
            narrow[place] = wanted
        for position, name in enumerate(node.input):
            axis = None if wanted is None else wanted.get(position)
            demands[name] = axis if demands.get(name, axis) == axis else None
        demands |= dict.fromkeys(_captured(node))
    return _rewrite(graph, narrow, demands, shapes)


def _takes_first_token(node: onnx.NodeProto, shapes: dict[str, Shape], zeros: set[str]) -> bool:
    return (
        node.op_type == "Gather"
        and node.input[1] in zeros
        and len(shapes.get(node.input[0], ())) == 3
        and _attributes(node).get("axis", 0) in (1, _TOKENS)
    )


def _agreed(node: onnx.NodeProto, demands: dict[str, int | None]) -> int | None:
    """Return the axis of which the first position of a node's only output is enough."""
    read = [name for name in node.output if name in demands]
    return demands[read[0]] if read == [node.output[0]] else None


def _wanted(node: onnx.NodeProto, axis: int, shapes: dict[str, Shape]) -> dict[int, int] | None:
    """Return which inputs a node then needs only the first of, and along which axis.

    None if it has to be computed whole, because nothing is known of its kind or of a shape.
    """
    attributes = _attributes(node)
    if any(name and name not in shapes for name in (*node.input, *node.output)):
        return None
    out, inputs = shapes[node.output[0]], [shapes.get(name, []) for name in node.input]
    if node.op_type in _POSITIONWISE and axis < -1:
        if attributes.get("axis", -1) not in (-1, len(out) - 1):
            return None
        # Inputs without this axis, or with one position of it, are the same for all positions.
        return {
            place: axis
            for place, shape in enumerate(inputs)
            if len(shape) >= -axis and shape[axis] != 1
        }
    if node.op_type == "MatMul" and axis == -2:
        return {0: axis}
    if node.op_type == "Transpose":
        return {0: attributes["perm"][axis] - len(out)}
    if node.op_type == "Reshape" and not attributes.get("allowzero"):
        # Heads are split off or joined behind the axis; the axes up to it stay.
        stay = len(out) + axis + 1
        if inputs[0][:stay] == out[:stay] and all(isinstance(size, int) for size in out[stay:]):
            return {0: stay - 1 - len(inputs[0])}
    return None


def _rewrite(
    graph: onnx.GraphProto,
    narrow: dict[int, dict[int, int]],
    demands: dict[str, int | None],
    shapes: dict[str, Shape],
) -> int:
    """Cut the inputs of the narrow nodes, where they are not cut already; return their number."""
    nodes, cut = list[onnx.NodeProto](), dict[tuple[str, int], str]()
    axes = {name: demands[name] for place in narrow for name in graph.node[place].output}

    def constant(name: str, values: list[int]) -> str:
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    for place, node in enumerate(graph.node):
        for position, axis in narrow.get(place, {}).items():
            whole = node.input[position]
            if axes.get(whole) is not None or axes[node.output[0]] is None:
                continue  # made narrow, or about to lose the axis
            if (whole, axis) not in cut:
                name = f"{whole}/first_of_axis{axis}"
                limits = {"starts": 0, "ends": 1, "axes": axis}
                bounds = [constant(f"{name}/{key}", [value]) for key, value in limits.items()]
                nodes.append(helper.make_node("Slice", [whole, *bounds], [name], name=name))
                cut[whole, axis] = name
            node.input[position] = cut[whole, axis]
        if node.op_type == "Reshape" and (along := axes.get(node.output[0])) is not None:
            shape = shapes[node.output[0]]
            # 0 copies the size of the input.
            behind = [int(size) for size in shape[len(shape) + along + 1 :]]
            sizes = [*[0] * (len(shape) + along), 1, *behind]
            node.input[1] = constant(f"{node.output[0]}/first_shape", sizes)
        nodes.append(node)
    # What computed the shapes of whole tensors has no reader any more.
    live, kept = {output.name for output in graph.output}, list[onnx.NodeProto]()
    for node in reversed(nodes):
        if live.intersection(node.output):
            live.update([*node.input, *_captured(node)])
            kept.append(node)
    del graph.node[:]
    del graph.value_info[:]
    graph.node.extend(reversed(kept))
    return sum(axis is not None for axis in axes.values())


def _shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Return the shape of each tensor whose axes are all known; a size that varies has a name."""
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
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and "value" in (values := _attributes(node)):
            found[node.output[0]] = numpy_helper.to_array(values["value"])
    return found


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _captured(node: onnx.NodeProto) -> set[str]:
    """Return what the branches or the body of a node read, from inside or outside of them."""
    bodies = [item.g for item in node.attribute if item.type == onnx.AttributeProto.GRAPH]
    inner = [inner for body in bodies for inner in body.node]
    return {name for node in inner for name in (*node.input, *_captured(node))} | {
        output.name for body in bodies for output in body.output
    }
