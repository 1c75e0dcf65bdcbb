"""Copies of channels: exact, where they can be made, and left alone elsewhere."""

import numpy as np
import onnx_ir as ir
import pytest

from qonnx.errors import ModelError
from qonnx.passes.split_channels import Split, SplitChannels, find_region
from tests.graphs import model_of
from tests.helpers import assert_same_function, operators
from tests.smoothing import prepared

GATED = (
    "g (float[N,T,8] x, float[8,6] w1, float[6] b1, float[8,6] w2, float[6] c, float[6,5] w3) => (float[N,T,5] y)"
    "{ p = MatMul(x, w1) gate = Add(p, b1) up = MatMul(x, w2) sig = Sigmoid(gate) act = Mul(gate, sig)"
    "  h = Mul(act, up) scaled = Mul(h, c) y = MatMul(scaled, w3) }"
)
GEMM = (
    "g (float[N,8] x, float[6,8] w1, float[6] b1, float[6,5] w2, float[5] b2) => (float[N,5] y)"
    "{ h = Gemm <transB = 1> (x, w1, b1) r = Relu(h) y = Gemm(r, w2, b2) }"
)
WEIGHTS = {GATED: "w1 b1 w2 c w3", GEMM: "w1 b1 w2 b2"}


def last(model: ir.Model) -> ir.Node:
    return [node for node in model.graph if node.op_type in ("MatMul", "Gemm")][-1]


@pytest.mark.parametrize("opset", [17, 20, 21, 23])
@pytest.mark.parametrize("text", [GATED, GEMM])
def test_copies_change_nothing(text: str, opset: int) -> None:
    model = prepared(text, WEIGHTS[text], opset=opset)
    after = model.clone()
    split = Split(last(after).name or "", (1, 3, 1, 1, 2, 1))
    assert split.index.tolist() == [0, 1, 2, 3, 4, 5, 1, 1, 4]
    result = SplitChannels((split,))(after)
    assert result.modified
    assert operators(after) == operators(model)
    assert_same_function(model, after)
    data = last(after).inputs[0]
    assert data is not None
    assert data.shape is not None
    assert data.shape[-1] == 9
    weight = last(after).inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    before = last(model).inputs[1]
    assert before is not None
    assert before.const_value is not None
    shares = weight.const_value.numpy()
    np.testing.assert_allclose(shares[1], before.const_value.numpy()[1] / 3, rtol=1e-6)
    np.testing.assert_array_equal(shares[[1, 1, 4]], shares[[6, 7, 8]])


def test_a_weight_that_others_read_stays_as_it_is() -> None:
    text = (
        "g (float[N,6] x, float[6,6] w) => (float[N,6] y, float[N,6] z)"
        "{ a = MatMul(x, w) r = Relu(a) y = MatMul(r, w) z = MatMul(x, w) }"
    )
    model = prepared(text, "w")
    nodes = [node for node in model.graph if node.op_type == "MatMul"]
    after = model.clone()
    SplitChannels((Split(nodes[1].name or "", (2, 1, 1, 1, 1, 4)),))(after)
    assert_same_function(model, after)
    assert "w" in after.graph.initializers


HEAD = "g (float[N,8] x, float[8,6] w1, float[6] c, float[6,5] w2, float[N,1] k) => (float[N,5] y"
ALONE = {
    "what it reads is an output": f"{HEAD}, float[N,6] r) {{ a = MatMul(x, w1) r = Relu(a) y = MatMul(r, w2) }}",
    "another reader": f"{HEAD}, float[N,6] z) {{ a = MatMul(x, w1) r = Relu(a) y = MatMul(r, w2) z = Softmax(r) }}",
    "another reader of what it is made of": f"{HEAD}, float[N,6] z)"
    "{ a = MatMul(x, w1) r = Relu(a) y = MatMul(r, w2) z = Tanh(a) }",
    "an input of the model": "g (float[N,6] x, float[6,5] w2) => (float[N,5] y) { r = Relu(x) y = MatMul(r, w2) }",
    "mixes channels": f"{HEAD}) {{ a = MatMul(x, w1) r = Softmax(a) y = MatMul(r, w2) }}",
    "other sizes": f"{HEAD}) {{ a = MatMul(x, w1) r = Mul(a, k) y = MatMul(r, w2) }}",
    "changes shape": "g (float[4,8] x, float[8,6] w1, float[6,5] w2, int64[2] s) => (float[4,5] y)"
    "{ a = MatMul(x, w1) r = Reshape(a, s) y = MatMul(r, w2) }",
    "weight first": "g (float[8,6] x, float[5,8] w1, float[5,5] w2) => (float[5,6] y)"
    "{ a = MatMul(w1, x) r = Relu(a) y = MatMul(w2, r) }",
    "weight is computed": "g (float[N,8] x, float[8,6] w1, float[6,5] w2) => (float[N,5] y)"
    "{ e = Exp(w2) a = MatMul(x, w1) r = Relu(a) y = MatMul(r, e) }",
}


def chain(text: str) -> ir.Model:
    weights = [name for name in ("w1", "c", "w2") if f" {name}" in text.split("=>")[0] and f"{name})" in text + ")"]
    model = model_of(text, weights=" ".join(weights), opset=21, scale=0.5)
    for number, node in enumerate(model.graph):
        node.name = node.name or f"n{number}"
    return model


def test_the_chain_that_is_spoilt_below_is_fine() -> None:
    region = find_region(last(chain(f"{HEAD}) {{ a = MatMul(x, w1) r = Relu(a) y = MatMul(r, w2) }}")))
    assert region is not None
    assert [value.name for value in region.values] == ["r", "a"]


@pytest.mark.parametrize("why", ALONE)
def test_leaves_alone(why: str) -> None:
    model = chain(ALONE[why])
    node = last(model)
    assert find_region(node) is None
    with pytest.raises(ModelError, match="cannot be repeated"):
        SplitChannels((Split(node.name or "", (2, 1, 1, 1, 1, 1)),))(model)


def test_a_split_that_does_not_fit_is_one_line() -> None:
    for split in (Split("nobody", (2, 1, 1, 1, 1, 1)), Split("", (2, 1)), Split("", (2, 1, 1, 1, 1, 0))):
        model = prepared(GEMM, WEIGHTS[GEMM])
        name = split.node or last(model).name or ""
        with pytest.raises(ModelError, match=f"the inputs of '{name}' cannot be repeated; leave this split out"):
            SplitChannels((Split(name, split.copies),))(model)
    assert not SplitChannels(())(prepared(GEMM, WEIGHTS[GEMM])).modified
