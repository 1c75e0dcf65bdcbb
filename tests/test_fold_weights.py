"""Weights that the graph computes from constants become initializers, wherever something else reads them."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qonnx
from qonnx.linear import linear_of
from qonnx.passes.fold_weights import FoldWeights
from qonnx.passes.infer_shapes import InferShapes
from qonnx.passes.prepare import prepare
from tests.graphs import model_of
from tests.helpers import assert_same_function

_NORM = """
g (float[n,6,20] x, float[8,6,3] v, float[8,1,1] s) => (float[n,8,20] y) {
    axes = Constant <value = int64[2] {1, 2}> () norm = ReduceL2 <keepdims = 1> (v, axes)
    f = Div(s, norm) w = Mul(v, f) y = Conv <pads = [1, 1]> (x, w)
}"""
_CROSS = """
g (float[n,8] x, float[n,8] z, float[24,8] w, float[24] b) => (float[n,16] y, float[n,8] q) {
    sizes = Constant <value = int64[2] {8, 16}> ()
    wq, wk = Split <axis = 0> (w, sizes) bq, bk = Split <axis = 0> (b, sizes)
    tq = Transpose <perm = [1, 0]> (wq) tk = Transpose <perm = [1, 0]> (wk)
    mq = MatMul(x, tq) q = Add(mq, bq) mk = MatMul(z, tk) y = Add(mk, bk)
}"""
_STACK = """
g (float[n,8] x, float[2,8,8] w) => (float[n,8] y) {
    zero = Constant <value = int64 {0}> () one = Constant <value = int64 {1}> ()
    a = Gather(w, zero) b = Gather(w, one) h = MatMul(x, a) r = Relu(h) y = MatMul(r, b)
}"""
_ADAPTER = """
g (float[n,8] x, float[8,8] w, float[8,2] b, float[2,8] a) => (float[n,8] y) {
    d = MatMul(b, a) half = Constant <value = float {0.5}> () e = Mul(d, half) t = Transpose <perm = [1, 0]> (e)
    s = Add(w, t) y = MatMul(x, s)
}"""
_HALF = """
g (float16[n,8] x, float16[8,16] w) => (float16[n,8] y) {
    at = Constant <value = int64[1] {8}> () to = Constant <value = int64[1] {16}> ()
    one = Constant <value = int64[1] {1}> () s = Slice(w, at, to, one) y = MatMul(x, s)
}"""


@pytest.mark.parametrize(("text", "layers"), [(_NORM, 1), (_CROSS, 2), (_STACK, 2), (_ADAPTER, 1), (_HALF, 1)], ids=str)
def test_layers_whose_weights_are_computed_can_be_quantized(text: str, layers: int) -> None:
    model = model_of(text, weights="v s w b a")
    before = model.clone()
    prepare(model)
    linear = [node for node in model.graph if node.op_type in ("Conv", "MatMul")]
    assert len(linear) == layers
    assert all(linear_of(node) is not None for node in linear)
    assert {node.op_type for node in model.graph} <= {"Conv", "MatMul", "Add", "Relu", "Transpose"}
    assert_same_function(before, model)


def test_large_weights_are_computed_when_they_are_asked_for() -> None:
    """Nothing is stored twice: the tensor is a formula."""
    model = model_of(
        _CROSS.replace("24", "3072").replace("16]", "2048]").replace("{8, 16}", "{1024, 2048}"), weights="w b"
    )
    before = model.clone()
    weight = model.graph.initializers["w"].const_value
    prepare(model)
    folded = model.graph.initializers["w_folded_1"].const_value
    assert isinstance(folded, ir.LazyTensor)
    assert weight is not None
    np.testing.assert_array_equal(folded.numpy(), weight.numpy()[1024:])
    assert "w" not in model.graph.initializers
    assert_same_function(before, model)


def test_quantized_files_hold_the_result(tmp_path: Path) -> None:
    model = model_of(_NORM.replace("8,", "64,").replace(",6,", ",32,"), weights="v s", scale=0.1)
    batches = [{"x": np.random.default_rng(k).standard_normal((4, 32, 20)).astype(np.float32)} for k in range(6)]
    result = qonnx.quantize(model, batches, tmp_path / "q.onnx")
    assert not result.plan.float_layers
    assert result.comparison.outputs[0].sqnr_db > 30
    assert {node.op_type for node in ir.load(tmp_path / "q.onnx").graph} == {
        "QuantizeLinear",
        "DequantizeLinear",
        "Conv",
    }


@pytest.mark.parametrize(
    "nodes",
    [
        "s = Relu(w) y = Identity(s)",  # maybe asked for under that name
        "r = RandomNormalLike(w) y = MatMul(x, r)",
        "c = Shape(w) r = ConstantOfShape(c) y = MatMul(x, r)",
        "c = Shape(w) r = Expand(v, c) y = MatMul(x, r)",
        "r, mask = Dropout(w, half, yes) y = MatMul(x, r)",
        "r = MatMul(v, u) y = MatMul(x, r)",  # 64 elements of 16: a matrix of low rank
        "r = DequantizeLinear(b, step) y = MatMul(x, r)",
        "c = Cast <to = 1> (b) r = Mul(c, v) y = MatMul(x, r)",  # four times the bytes
        "r = Sqrt(w) y = MatMul(x, r)",  # not a number
        "t = Transpose(w) y = MatMul(x, t)",
        "r = com.example.Odd(w) y = MatMul(x, r)",
        "r = Mul(w, d) y = MatMul(x, r)",  # d may be fed
        "h = MatMul(x, w) y = Relu(h)",
    ],
)
def test_leaves_alone(nodes: str) -> None:
    model = simple(nodes)
    before = ir.to_onnx_text(model)
    assert not FoldWeights()(model).modified
    assert ir.to_onnx_text(model) == before


def simple(nodes: str) -> ir.Model:
    """A model whose input d has a default, and of which all types are known."""
    inputs = "float[n,8] x, float[8,8] w, float[8,1] v, float[1,8] u, float half, bool yes, int8[8,8] b, float step"
    text = f"g ({inputs}, float[8] d) => (float[m,8] y) {{ {nodes} }}"
    model = model_of(text, weights="w v u half yes b step")
    default = next(value for value in model.graph.inputs if value.name == "d")
    default.const_value = ir.tensor(np.ones(8, np.float32), name="d")
    model.graph.register_initializer(default)
    InferShapes()(model)
    return model


@pytest.mark.parametrize("nodes", ["r = Relu(w) y = MatMul(x, r)", "r = Mul(w, v) t = Transpose(r) y = MatMul(x, t)"])
def test_folds_what_differs_little_from_what_it_leaves_alone(nodes: str) -> None:
    model = simple(nodes)
    before = model.clone()
    assert FoldWeights()(model).modified
    assert_same_function(before, model)


def test_sums_in_half_precision_are_those_of_the_runtime() -> None:
    """Added up in 16 bits, a column of 4096 loses half of its digits; squares of 300 are infinite."""
    text = """g (float16[n,4096] x, float16[4096,2] v) => (float16[n,2] y) {
        axes = Constant <value = int64[1] {0}> () norm = ReduceL2 <keepdims = 1> (v, axes) w = Div(v, norm)
        y = MatMul(x, w) }"""
    model = model_of(text, weights="v", scale=30)
    stored = model.graph.initializers["v"].const_value
    assert stored is not None
    v = stored.numpy().astype(np.float64)
    prepare(model)
    (folded,) = (value.const_value for value in model.graph.initializers.values())
    assert folded is not None
    np.testing.assert_allclose(folded.numpy(), v / np.linalg.norm(v, axis=0), rtol=2e-3, atol=1e-5)


def test_names_do_not_change_from_run_to_run() -> None:
    """A plan names what it quantizes."""
    text = "g (float[n,8] x, float[8,8] w2, float[8,8] w1) => (float[n,8] y) { r = Add(w2, w1) y = MatMul(x, r) }"
    names = set()
    for _ in range(12):
        model = model_of(text, weights="w1 w2")
        InferShapes()(model)
        FoldWeights()(model)
        names |= set(model.graph.initializers)
    assert names == {"w1", "w2", "w1_folded"}
