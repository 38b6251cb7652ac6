"""Small graphs of which only the first token is read, or not only the first."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from ad2kit.exporting.fuse import read_first_token_only

WIDTH = 4
HEAD = "y = Gather<axis = 1>(h, zero)"
# What a graph computes of the states x, and how many nodes of it need the first token alone.
NARROW = {
    "a product, a sum and a norm": (
        "m = MatMul(x, w)  s = Add(m, x)  h = LayerNormalization(s, b, b)",
        3,
    ),
    "a diamond": ("m = MatMul(x, w)  e = Erf(m)  h = Mul(m, e)", 3),
    "attention by queries": (
        """q = MatMul(x, w)  t = Transpose<perm = [0, 2, 1]>(x)  a = MatMul(q, t)
           p = Softmax<axis = -1>(a)  h = MatMul(p, x)""",
        4,
    ),
    "heads that are split off and joined": (
        """q = MatMul(x, w)  r = Reshape(q, four)  t = Transpose<perm = [0, 2, 1, 3]>(r)
           e = Erf(t)  u = Transpose<perm = [0, 2, 1, 3]>(e)  h = Reshape(u, three)""",
        6,
    ),
    "a mask for every position": ("i = Cast<to = 1>(mask)  h = Add(x, i)", 2),
    "a bias that is broadcast": ("m = MatMul(x, w)  h = Add(m, b)", 2),
}
WHOLE = {
    "a softmax over the tokens": ("e = Erf(x)  h = Softmax<axis = 1>(e)", 0),
    "a sum over the tokens": (
        "e = Erf(x)  t = Transpose<perm = [0, 2, 1]>(e)  a = MatMul(e, t)  h = MatMul(a, x)",
        2,
    ),
    "another node reads all": ("e = Erf(x)  h = Tanh(e)  z = ReduceMean(e, one)", 1),
    "tokens that are mixed": (
        "e = Erf(x)  t = Transpose<perm = [0, 2, 1]>(e)  h = Reshape(t, mixed)",
        0,
    ),
    "a kind of node that is not known": ("e = Erf(x)  h = CumSum(e, one_axis)", 0),
}


def model(body: str, head: str = HEAD) -> onnx.ModelProto:
    outputs = "float[n, 4] y" + (", float[n, 1, 4] z" if "z =" in body else "")
    found = onnx.parser.parse_model(f"""
        <ir_version: 9, opset_import: ["" : 18]>
        g (float[n, t, 4] x, int64[n, t, 4] mask) => ({outputs})
        <int64 zero = {{0}}, int64[1] one = {{1}}, int64 one_axis = {{1}},
         int64[4] four = {{0, 0, 2, 2}}, int64[3] three = {{0, 0, 4}},
         int64[3] mixed = {{0, -1, 4}}>
        {{ {body}  {head} }}
    """)
    generator = np.random.default_rng(3)
    for name, shape in (("w", (WIDTH, WIDTH)), ("b", (WIDTH,))):
        values = generator.normal(size=shape).astype(np.float32)
        found.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return found


def outputs(graph: onnx.ModelProto, tokens: int) -> Any:
    generator = np.random.default_rng(5)
    feed = {
        "x": generator.normal(size=(3, tokens, WIDTH)).astype(np.float32),
        "mask": generator.integers(0, 2, size=(3, tokens, WIDTH)),
    }
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {item.name: feed[item.name] for item in session.get_inputs()})


@pytest.mark.parametrize("case", [*NARROW, *WHOLE])
def test_the_results_are_the_same_and_as_few_positions_are_computed_as_can_be(case: str) -> None:
    body, count = (NARROW | WHOLE)[case]
    before = model(body)
    after = model(body)
    assert read_first_token_only(after) == count
    onnx.checker.check_model(after)
    for tokens in (1, 2, 9):
        for old, new in zip(outputs(before, tokens), outputs(after, tokens), strict=True):
            np.testing.assert_allclose(new, old, rtol=0, atol=1e-6)
    # What is narrow is narrow from its inputs on.
    assert ("Slice" in Counter(node.op_type for node in after.graph.node)) == (count > 0)


def test_another_token_than_the_first_is_left_alone() -> None:
    last = model("h = Erf(x)", "y = Gather<axis = 1>(h, one_axis)")
    assert read_first_token_only(last) == 0
    assert [node.op_type for node in last.graph.node] == ["Erf", "Gather"]
