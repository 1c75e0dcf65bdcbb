"""What is taken for the activation of a layer, and what is not."""

import pytest

from qonnx.activation import Activation, activation_of
from qonnx.passes.infer_shapes import InferShapes
from tests.graphs import model_of

CONSTANTS = (
    "<float low = {0}, float high = {6}, float half = {0.5}, float one = {1}, float root = {1.4142135}, "
    "int64 cube = {3}, float[2,2] mask = {0, -1e9, 0, 0}, float hidden = {-inf}, "
    "float[7,1] seven = {0, 0, 0, 0, 0, 0, 0}>"
)


def activation_behind(nodes: str, outputs: str = "float[n,16] y", constants: str = CONSTANTS) -> Activation | None:
    """That of the Gemm which makes `a`."""
    signature = f"g (float[n,16] x, float[n,16] other, float[16,16] w, float[16] row) => ({outputs}) {constants}"
    return activation_in(f"{signature} {{ [fc] a = Gemm(x, w) {nodes} }}")


def activation_in(text: str) -> Activation | None:
    """That of what makes `a`."""
    model = model_of(text, weights="w row")
    InferShapes()(model)
    (value,) = [value for node in model.graph for value in node.outputs if value.name == "a"]
    return activation_of(value)


FOUND = {
    "one node": ("y = Relu(a)", "Relu", "y"),
    "bounds": ("y = Clip(a, low, high)", "Clip", "y"),
    "bounds per channel": ("m = Max(a, low) y = Min(row, m)", "Max Min", "y"),
    "SiLU": ("s = Sigmoid(a) y = Mul(a, s)", "Sigmoid Mul", "y"),
    "HardSwish": ("s = HardSigmoid(a) y = Mul(s, a)", "HardSigmoid Mul", "y"),
    "Mish": ("s = Softplus(a) t = Tanh(s) y = Mul(a, t)", "Softplus Tanh Mul", "y"),
    "GELU": (
        "d = Div(a, root) e = Erf(d) p = Add(e, one) h = Mul(a, half) y = Mul(h, p)",
        "Div Mul Erf Add Mul",
        "y",
    ),
    "a whole power": ("y = Pow(a, cube)", "Pow", "y"),
    "what follows from it": ("r = Relu(a) y = Mul(r, half)", "Relu Mul", "y"),
    "the part that alone is read": ("r = Relu(a) h = Mul(r, half) y = Add(r, h) ", "Relu Mul Add", "y"),
    "up to two readers": ("s = Sigmoid(a) r = Mul(a, s) t = Tanh(r) y = MatMul(r, t)", "Sigmoid Mul", "r"),
    "up to a sum": ("r = Relu(a) y = Add(r, other)", "Relu", "r"),
    "up to a softmax": ("r = Mul(a, half) y = Softmax(r)", "Mul", "r"),
    "a value that is read twice": ("y = Mul(a, a)", "Mul", "y"),
}


@pytest.mark.parametrize("name", FOUND)
def test_finds(name: str) -> None:
    nodes, operators, result = FOUND[name]
    found = activation_behind(nodes)
    assert found is not None
    assert [node.op_type for node in found.nodes] == operators.split()
    assert found.result.name == result
    assert found.source.name == "a"


LEAVES_ALONE = {
    "no reader": "y = Relu(x)",
    "another operator": "y = Softmax(a)",
    "a second reader": "r = Relu(a) s = Softmax(a) y = Add(r, s)",
    "two results": "r = Relu(a) t = Tanh(a) u = Softmax(r) v = Softmax(t) y = Add(u, v)",
    "a gate of something else": "s = Sigmoid(other) y = Mul(a, s)",
    "a bound that is computed": "m = Softmax(other) y = Min(a, m)",
    "a mask": "y = Add(a, mask)",
    "a mask that hides": "y = Add(a, hidden)",
    "a row that makes another shape": "y = Add(a, seven)",
    "a root": "y = Pow(a, half)",
    "its inverse": "y = Div(one, a)",
    "an exponent": "y = Pow(high, a)",
    "truth": "c = Greater(a, low) y = Where(c, other, x)",
    "whole numbers": "i = Cast <to = 7> (a) y = Gather <axis = 1> (other, i)",
}


@pytest.mark.parametrize("name", LEAVES_ALONE)
def test_leaves_alone(name: str) -> None:
    assert activation_behind(LEAVES_ALONE[name]) is None


def test_an_output_of_the_model_is_read() -> None:
    assert activation_behind("y = Relu(a)", outputs="float[n,16] y, float[n,16] a") is None
    found = activation_behind("r = Relu(a) y = Mul(r, half)", outputs="float[n,16] y, float[n,16] r")
    assert found is not None
    assert found.result.name == "r"


def test_a_constant_of_a_higher_rank_changes_the_shape() -> None:
    nodes = "y = Mul(a, box)"
    assert activation_behind(nodes, constants="<float[1,1,1] box = {1}>") is None
    assert activation_behind(nodes, constants="<float[1,1] box = {1}>") is not None


def test_a_constant_that_widens_the_only_channel() -> None:
    text = "g (float[n,16] x, float[16,1] w, float[4] row) => (float[n,4] y) { [fc] a = Gemm(x, w) y = Mul(a, row) }"
    assert activation_in(text) is None


def test_a_body_is_no_activation() -> None:
    nodes = """m = ReduceMax <keepdims = 0> (other) c = Cast <to = 9> (m) y = If (c) <
        then_branch = t1 () => (float[n,16] o) { o = Relu(a) },
        else_branch = t2 () => (float[n,16] q) { q = Tanh(x) }>"""
    assert activation_behind(nodes) is None


def test_a_long_chain_is_followed_for_sixteen_nodes() -> None:
    chain = "".join(f"v{number} = Tanh({f'v{number - 1}' if number else 'a'}) " for number in range(40))
    found = activation_behind(chain + "y = Softmax(v39)")
    assert found is not None
    assert len(found.nodes) == 16
    assert found.result.name == "v15"


def test_an_input_of_the_model_is_made_by_no_layer() -> None:
    model = model_of("g (float[n,16] x) => (float[n,16] y) { y = Relu(x) }")
    (value,) = model.graph.inputs
    assert activation_of(value) is None
