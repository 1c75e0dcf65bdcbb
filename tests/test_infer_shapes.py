"""Shapes are inferred from the inputs; what a file says about inner values is only trusted when it is consistent."""

import numpy as np
import onnx_ir as ir
import pytest

from qonnx.errors import ModelError
from qonnx.passes.infer_shapes import InferShapes
from tests.graphs import model_of
from tests.helpers import leave_alone


def shapes(model: ir.Model) -> dict[str, str]:
    return {value.name or "": str(value.shape) for node in model.graph for value in node.outputs}


def test_infers_types_and_shapes_once() -> None:
    model = model_of("g (float[N,4] x, float[4,6] w) => (float[N,6] y) { a = MatMul(x, w) y = Relu(a) }", weights="w")
    assert InferShapes()(model).modified
    assert shapes(model)["a"] == "[N,6]"
    assert model.graph.node(0).outputs[0].dtype == ir.DataType.FLOAT
    leave_alone(InferShapes(), model)


def test_sizes_left_over_from_a_static_batch_are_dropped() -> None:
    text = "g (float[N,4] x) => (float[N,M] y) <float[1,4] a, float[1,4] b>"
    model = model_of(f"{text} {{ a = Relu(x) b = Abs(a) y = com.example.F(b) }}")
    assert InferShapes()(model).modified
    assert shapes(model) == {"a": "[N,4]", "b": "[N,4]", "y": "[N,M]"}


def test_consistent_sizes_complete_what_cannot_be_inferred() -> None:
    text = """
    g (float[N,4] x, int64[2] s) => (float[A,B] y) <float[N,4] a, float[N,16] b> {
      a = Relu(x) b = Reshape(a, s) y = Abs(b)
    }"""
    model = model_of(text)
    InferShapes()(model)
    assert shapes(model)["b"] == "[N,16]"


def test_declared_shapes_of_other_domains_are_kept_and_used() -> None:
    text = "g (float[N,4] x) => (float[N,1] y) <float[N,7] a> { a = com.example.F(x) b = Relu(a) y = com.example.G(b) }"
    model = model_of(text)
    InferShapes()(model)
    assert shapes(model)["b"] == "[N,7]"


def test_reshape_to_a_shape_that_is_computed() -> None:
    text = """
    g (float[N,L,8] x) => (float[A,B,C] y)
      <int64[1] zero = {0}, int64[1] one = {1}, int64[2] rest = {2, 4}, int64[1] minus = {-1}> {
      s = Shape(x) n = Gather(s, zero) l = Gather(s, one) m = Mul(n, l) to = Concat <axis = 0> (m, rest)
      a = Reshape(x, to) t = Transpose <perm = [1, 0, 2]> (a)
      s2 = Shape(t) n2 = Gather(s2, one) m2 = Mul(n2, minus) m3 = Mul(m2, minus) to2 = Concat <axis = 0> (m3, minus)
      b = Reshape(t, to2) c = Unsqueeze(b, zero) y = Relu(c)
    }"""
    model = model_of(text)
    InferShapes()(model)
    ranks = {name: shape.count(",") + 1 for name, shape in shapes(model).items()}
    assert shapes(model)["a"] == "[None,2,4]"
    assert shapes(model)["t"] == "[2,None,4]"
    assert (ranks["b"], ranks["c"]) == (2, 3)


def test_values_in_subgraphs() -> None:
    text = """
    g (float[N,4] x, bool c) => (float[N,4] y) {
      y = If (c) <
        then_branch = t () => (float[N,4] p) { a = Relu(x) p = Abs(a) },
        else_branch = f () => (float[N,4] q) { q = Neg(x) }
      >
    }"""
    model = model_of(text)
    InferShapes()(model)
    inner = {v.name: str(v.shape) for node in ir.traversal.RecursiveGraphIterator(model.graph) for v in node.outputs}
    assert inner["a"] == "[N,4]"


def test_weights_are_not_read() -> None:
    def read() -> ir.TensorProtocol:
        raise AssertionError

    model = model_of(
        "g (float[N,64] x, float[64,32] w) => (float[N,32] y) { a = MatMul(x, w) y = Relu(a) }", weights="w"
    )
    tensor = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape([64, 32]), name="w")
    model.graph.initializers["w"].const_value = tensor
    InferShapes()(model)
    assert shapes(model)["a"] == "[N,32]"
    assert model.graph.initializers["w"].const_value is tensor


def test_negative_sizes_of_inputs_mean_dynamic() -> None:
    model = model_of("g (float[N,4] x) => (float[N,4] y) { a = Relu(x) s = Shape(a) y = Reshape(a, s) }")
    model.graph.inputs[0].shape = ir.Shape([-1, 4])
    InferShapes()(model)
    assert shapes(model)["a"] == "[None,4]"


def test_a_graph_that_cannot_be_inferred_is_unchanged() -> None:
    model = model_of("g (float[N,4] x) => (float[N,4] y) <float[N,3] a> { a = Relu(x) y = Abs(a) }")
    model.graph.node(0).replace_input_with(0, ir.Value(name="nowhere"))
    with pytest.raises(ModelError, match="shapes cannot be inferred"):
        InferShapes()(model)
    assert shapes(model)["a"] == "[N,3]"


def test_string_constants_pass() -> None:
    model = model_of("g (float[N] x) => (float[N] y) { a = Relu(x) y = Abs(a) }")
    names = ir.Value(name="names", const_value=ir.StringTensor([b"a"] * 200, shape=ir.Shape([200]), name="names"))
    model.graph.register_initializer(names)
    InferShapes()(model)
    assert shapes(model)["a"] == "[N]"


def test_large_constant_attributes_pass() -> None:
    model = model_of("g (float[N,600] x) => (float[N,600] y) { a = Add(x, x) y = Abs(a) }")
    tensor = ir.tensor(np.ones(600, np.float32), name="c")
    constant = ir.node("Constant", [], attributes={"value": tensor})
    constant.outputs[0].name = "k"
    graph = model.graph
    graph.insert_before(graph.node(0), [constant])
    graph.node(1).replace_input_with(1, constant.outputs[0])
    InferShapes()(model)
    assert shapes(model)["a"] == "[N,600]"
    assert constant.attributes.get_tensor("value") is tensor
