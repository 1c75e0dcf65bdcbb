"""Every operator through every format: what is quantized keeps its function, what is not stays as it is, with a reason.

The arithmetic of each cell is compared with fake-quantized floats in the tests of the passes; here the whole way is
gone, and what ONNX Runtime makes of the file when it optimizes it is compared with the file.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import qonnx
from qonnx.graph import load
from qonnx.runtime import Optimization, session
from tests.graphs import model_of
from tests.helpers import LEVELS

WEIGHTS = "w w2 w3 b k v r"
IMAGE = "float[n,16,8,8] x, float[16,16,3,3] w, float[16,16,1,1] w2"
ROWS = "float[n,4,32] x, float[32,64] w, float[32,16] w2"
THREE = "a = Conv <pads = [1,1,1,1]> (x, w)"


class Case(NamedTuple):
    """A graph, how many of its layers run on integers, and how many more have weights to store."""

    text: str
    layers: int = 1
    stored: int = 0


GRAPHS = {
    "Conv, 1-D": Case("g (float[n,16,9] x, float[24,16,3] w, float[24] b) => (float[n,24,m] y) { y = Conv(x, w, b) }"),
    "Conv, 3-D": Case("g (float[n,16,4,4,4] x, float[16,16,3,3,3] w) => (float[n,16,p,q,r] y) { y = Conv(x, w) }"),
    "Conv in groups": Case(
        "g (float[n,32,8,8] x, float[32,8,3,3] w) => (float[n,32,p,q] y) "
        "{ y = Conv <group = 4, strides = [2,2]> (x, w) }"
    ),
    "Conv, depthwise": Case(
        "g (float[n,32,8,8] x, float[32,1,3,3] w, float[32] b) => (float[n,32,p,q] y) "
        "{ y = Conv <group = 32> (x, w, b) }"
    ),
    "ConvTranspose": Case(
        "g (float[n,16,8,8] x, float[16,8,3,3] w, float[32] b) => (float[n,32,p,q] y) "
        "{ y = ConvTranspose <group = 4, strides = [2,2]> (x, w, b) }",
        0,
        1,
    ),
    "Gemm, all there is": Case(
        "g (float[32,8] x, float[64,32] w, float[64] b) => (float[8,64] y) "
        "{ y = Gemm <transA = 1, transB = 1, alpha = 0.5, beta = 2.0> (x, w, b) }"
    ),
    "Gemm, one bias for all": Case(
        "g (float[n,32] x, float[32,64] w, float[1] b) => (float[n,64] y) { y = Gemm(x, w, b) }"
    ),
    "MatMul, weight first": Case(
        "g (float[n,32,5] x, float[64,32] w) => (float[n,64,5] y) { y = MatMul(w, x) }"
    ),
    "MatMul, a stack of weights": Case(
        "g (float[4,n,32] x, float[4,32,64] w) => (float[4,n,64] y) { y = MatMul(x, w) }"
    ),
    "MatMul, one weight for two": Case(
        "g (float[n,32] x, float[32,32] w) => (float[n,32] y) { a = MatMul(x, w) r = Relu(a) y = MatMul(r, w) }", 2
    ),
    "Gemm and MatMul, one weight behind a Transpose": Case(
        "g (float[n,32] x, float[32,32] w, float[32] b) => (float[n,32] y) "
        "{ t = Transpose <perm = [1,0]> (w) a = Gemm(x, t, b) r = Relu(a) y = MatMul(r, t) }",
        2,
    ),
    "MatMul, one float16 weight for two": Case(
        "g (float[n,512] x, float16[512,512] w) => (float[n,512] y) "
        "{ c = Cast <to = 1> (w) a = MatMul(x, c) r = Tanh(a) y = MatMul(r, c) }",
        2,
    ),
    "a table in front of a layer, and the last weight": Case(
        "g (int64[n,5] x, float[50,32] w, float[32,32] w2) => (float[n,5,50] y) "
        "{ e = Gather(w, x) a = MatMul(e, w2) h = Tanh(a) t = Transpose <perm = [1,0]> (w) y = MatMul(h, t) }",
        2,
        1,
    ),
    "a table of two lookups": Case(
        "g (int64[n,5] x, int64[n,5] z, float[50,32] w, float[32,32] w2) => (float[n,5,32] y) "
        "{ e = Gather(w, x) f = Gather(w, z) s = Add(e, f) y = MatMul(s, w2) }",
        1,
        2,
    ),
    "two lookups, each in front of a layer": Case(
        "g (int64[n,5] x, int64[n,5] z, float[50,32] w, float[32,32] w2) => (float[n,5,32] y) "
        "{ e = Gather(w, x) a = MatMul(e, w2) f = Gather(w, z) b = MatMul(f, w2) y = Add(a, b) }",
        2,
        2,
    ),
    "Conv, one weight for two": Case(
        "g (float[n,16,8,8] x, float[n,16,8,8] z, float[16,16,3,3] w, float[16] b) => (float[n,16,6,6] y) "
        "{ a = Conv(x, w, b) c = Conv(z, w, b) r = Relu(c) y = Sub(a, r) }",
        2,
    ),
    "two activations": Case(
        "g (float[n,8,32] x, float[n,32,8] z) => (float[n,8,8] y) { y = MatMul(x, z) }", 0
    ),
    "Attention": Case(
        "g (float[n,16,64] x, float[64,64] w, float[64,64] k, float[64,64] v) => (float[n,16,64] y) "
        "{ q = MatMul(x, w) h = MatMul(x, k) u = MatMul(x, v) "
        "y = Attention <q_num_heads = 4, kv_num_heads = 4> (q, h, u) }",
        3,
    ),
    "Gather": Case(
        "g (int64[n,5] x, float[50,32] v, float[32,64] w) => (float[n,5,64] y) { e = Gather(v, x) y = MatMul(e, w) }",
        1,
        1,
    ),
    "a table that is the last weight, too": Case(
        "g (int64[n,5] x, float[50,32] w) => (float[n,5,50] y) "
        "{ e = Gather(w, x) h = Relu(e) t = Transpose <perm = [1,0]> (w) y = MatMul(h, t) }",
        1,
        1,
    ),
    "Add": Case(
        f"g ({IMAGE}) => (float[n,16,8,8] y) {{ {THREE} r = Relu(a) c = Conv(r, w2) s = Add(c, x) y = Relu(s) }}", 2
    ),
    "Mul": Case(f"g ({IMAGE}) => (float[n,16,8,8] y) {{ {THREE} c = Conv(x, w2) s = Sigmoid(c) y = Mul(a, s) }}", 2),
    "Concat": Case(
        f"g ({IMAGE}, float[16,48,1,1] w3) => (float[n,16,8,8] y) "
        f"{{ {THREE} c = Conv(x, w2) s = Concat <axis = 1> (a, c, x) y = Conv(s, w3) }}",
        3,
    ),
    "pools": Case(
        f"g ({IMAGE}, float[16,32] w3) => (float[n,32] y) {{ {THREE} m = MaxPool <kernel_shape = [2,2]> (a) "
        "p = AveragePool <kernel_shape = [2,2]> (m) c = Conv(p, w2) g = GlobalAveragePool(c) f = Flatten(g) "
        "y = Gemm(f, w3) }",
        3,
    ),
    "Clip, LeakyRelu": Case(
        f"g ({IMAGE}, float[16,16,1,1] w3) => (float[n,16,8,8] y) {{ {THREE} lo = Constant <value_float = 0.0> () "
        "hi = Constant <value_float = 6.0> () s = Clip(a, lo, hi) c = Conv(s, w2) l = LeakyRelu <alpha = 0.1> (c) "
        "y = Conv(l, w3) }",
        3,
    ),
    "Resize": Case(
        f"g ({IMAGE}) => (float[n,16,16,16] y) {{ {THREE} s = Constant <value_floats = [1.0, 1.0, 2.0, 2.0]> () "
        'm = Resize <mode = "nearest"> (a, , s) y = Conv(m, w2) }',
        2,
    ),
    "Reshape, Transpose, Slice": Case(
        f"g ({ROWS}) => (float[n,4,16] y) {{ a = MatMul(x, w) s = Constant <value_ints = [0,4,2,32]> () "
        "h = Reshape(a, s) t = Transpose <perm = [0,2,1,3]> (h) i = Constant <value_int = 0> () "
        "u = Gather <axis = 1> (t, i) f = Constant <value_ints = [0]> () e = Constant <value_ints = [4]> () "
        "d = Constant <value_ints = [1]> () c = Slice(u, f, e, d) y = MatMul(c, w2) }",
        2,
    ),
    "LSTM": Case(
        "g (float[7,n,16] x, float[1,128,16] w, float[1,128,32] r, float[32,32] w2) => (float[7,1,n,32] y) "
        "{ h = LSTM <hidden_size = 32> (x, w, r) y = MatMul(h, w2) }"
    ),
    "GRU": Case(
        "g (float[7,n,16] x, float[1,96,16] w, float[1,96,32] r, float[32,32] w2) => (float[7,1,n,32] y) "
        "{ h = GRU <hidden_size = 32> (x, w, r) y = MatMul(h, w2) }"
    ),
    "If, whose branch reads the weight": Case(
        "g (float[n,32] x, float[32,32] w) => (float[n,32] y) { a = MatMul(x, w) m = ReduceMax <keepdims = 0> (a) "
        "l = Constant <value_float = 0.0> () c = Greater(m, l) "
        "y = If (c) <then_branch = t () => (float[n,32] o) { o = MatMul(a, w) }, "
        "else_branch = e () => (float[n,32] u) { u = Neg(a) }> }"
    ),
    "Loop": Case(
        "g (float[8,32] x, float[32,32] w) => (float[8,32] y) { n = Constant <value_int = 2> () "
        "t = Constant <value = bool {1}> () h = MatMul(x, w) "
        "y = Loop (n, t, h) <body = b (int64 i, bool c, float[8,32] s) => (bool d, float[8,32] z) "
        "{ d = Identity(c) m = MatMul(s, w) z = Tanh(m) }> }"
    ),
}  # fmt: skip
FORMATS = {
    "int8-unsmoothed": ["activations.calibrator.kind=minmax"],
    "int8-qoperator": ["activations.calibrator.kind=minmax", "smooth.kind=none", "equalize.kind=none"],
    "int8-dynamic": [],
    "int8-per-token": [],
    "w8": [],
    "w4-nbits": ["weights.rounding=nearest"],
}


def feeds(model: Any, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    fed = {}
    for value in model.graph.inputs:
        shape = [size if isinstance(size, int) else 8 for size in value.shape]
        integers = value.dtype.name == "INT64"
        fed[value.name] = rng.integers(0, 50, shape) if integers else rng.standard_normal(shape).astype(np.float32)
    return fed


@pytest.mark.parametrize("recipe", FORMATS)
@pytest.mark.parametrize("name", GRAPHS)
def test_every_operator_in_every_format(name: str, recipe: str, tmp_path: Path) -> None:
    case, file = GRAPHS[name], tmp_path / "q.onnx"
    model = model_of(case.text, weights=WEIGHTS, opset=23 if name == "Attention" else 21, scale=0.2)
    data = [feeds(model, seed) for seed in range(3)]
    result = qonnx.quantize(model, data, file, recipe=recipe, target="ort-cpu", settings=FORMATS[recipe])
    plan = result.plan
    assert all(layer.reason for layer in plan.float_layers)
    convolutions = sum(layer.op == "Conv" for layer in plan.layers)
    on_integers = case.layers - (convolutions if recipe == "int8-per-token" else 0)
    weights_alone = recipe.startswith("w")
    assert len(plan.quantized_layers) == (case.layers + case.stored if weights_alone else on_integers)
    worst = min(output.sqnr_db for output in result.comparison.outputs)
    assert worst > (8 if recipe == "w4-nbits" else 28)
    if recipe == "int8-qoperator" and plan.quantized_layers:
        assert {"QLinearConv", "ConvInteger", "MatMulInteger", "QLinearMatMul"} & {
            node.op_type for node in load(file).graph
        }
    opened = session(file)
    assert opened.optimization is Optimization.ALL
    fast, plain = opened.run(data[0]), session(file, optimize=LEVELS[0]).run(data[0])
    for output, expected in plain.items():
        np.testing.assert_allclose(fast[output], expected, rtol=1e-4, atol=2e-2 * np.abs(expected).max())
