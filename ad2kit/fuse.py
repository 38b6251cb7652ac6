"""fp32 ONNX to the same graph with fewer, larger nodes, and that to fp16."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.fusion_options import AttentionMaskFormat, FusionOptions
from onnxruntime.transformers.optimizer import optimize_model

from ad2kit.first_token import read_first_token_only
from ad2kit.runtime import without_message

if TYPE_CHECKING:
    from pathlib import Path

# What the fusions make, and no exporter writes (LayerNormalization alone comes from both).
FUSED = (
    "Attention", "MultiHeadAttention", "EmbedLayerNormalization", "SkipLayerNormalization",
    "LayerNormalization", "BiasGelu", "FastGelu", "Gelu",
)  # fmt: skip


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
            str(fp32), model_type="bert", num_heads=0, hidden_size=0, optimization_options=options,
            opt_level=0,
        )  # fmt: skip
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
