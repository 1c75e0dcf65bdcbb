"""Raising the opset rewrites what the newer opsets define differently, and keeps everything else."""

import numpy as np
import onnx_ir as ir
import pytest

from qonnx.errors import ModelError
from qonnx.passes.name_nodes import NameNodes
from qonnx.passes.raise_opset import RaiseOpset, opset
from tests.graphs import model_of
from tests.helpers import assert_same_function, leave_alone, operators, random_feeds

CHANGED_OPERATORS = {
    "softmax of the last axis": "g (float[2,3,4] x) => (float[2,3,4] y) { y = Softmax <axis = 2> (x) }",
    "softmax that flattens": "g (float[2,3,4] x) => (float[2,3,4] y) { y = Softmax(x) }",
    "logsoftmax that flattens": "g (float[A,3,4] x) => (float[A,3,4] y) { y = LogSoftmax <axis = 1> (x) }",
    "squeeze": "g (float[2,1,3] x) => (float[2,3] y) { y = Squeeze <axes = [1]> (x) }",
    "unsqueeze": "g (float[2,3] x) => (float[2,1,3] y) { y = Unsqueeze <axes = [1]> (x) }",
    "split": "g (float[2,6] x) => (float[2,2] y, float[2,4] z) { y, z = Split <axis = 1, split = [2, 4]> (x) }",
    "split in halves": "g (float[2,6] x) => (float[2,3] y, float[2,3] z) { y, z = Split <axis = 1> (x) }",
    "reduce sum": "g (float[2,3] x) => (float[2,1] y) { y = ReduceSum <axes = [1]> (x) }",
    "reduce mean": "g (float[2,3] x) => (float[2] y) { y = ReduceMean <axes = [-1], keepdims = 0> (x) }",
    "reduce all": "g (float[2,3] x) => (float[1,1] y) { y = ReduceMax(x) }",
    "dropout": "g (float[2,3] x) => (float[2,3] y) { y = Dropout <ratio = 0.5> (x) }",
    "clip without lower bound": "g (float[2,3] x) => (float[2,3] y) <float h = {0.5}> { y = Clip(x, , h) }",
    "pad": "g (float[2,3] x) => (float[2,5] y) <int64[4] p = {0, 1, 0, 1}> { y = Pad(x, p) }",
    "resize": "g (float[1,1,2,3] x) => (float[1,1,4,6] y) <float[0] r = {}, float[4] s = {1, 1, 2, 2}>"
    '{ y = Resize <mode = "nearest"> (x, r, s) }',
    "lstm with an omitted output": "g (float[5,1,3] x, float[1,8,3] w, float[1,8,2] r) => (float[1,1,2] h)"
    "{ , h = LSTM <hidden_size = 2> (x, w, r) }",
    "in a body": """
    g (float[2,3] x) => (float[2,3] y) <int64 count = {3}, bool go = {1}> {
      y = Loop(count, go, x) <body = b (int64 i, bool going, float[2,3] s) => (bool on, float[2,3] o) {
        on = Identity(going) t = Softmax <axis = 0> (s) u = Unsqueeze <axes = [0]> (t)
        v = ReduceSum <axes = [0], keepdims = 0> (u) o = Add(v, x)
      }>
    }""",
}


@pytest.mark.parametrize("version", [13, 17, 18, 21])
@pytest.mark.parametrize("text", CHANGED_OPERATORS.values(), ids=CHANGED_OPERATORS.keys())
def test_same_function(text: str, version: int) -> None:
    model = model_of(text, weights="w r", opset=11)
    before = model.clone()
    NameNodes()(model)
    step = RaiseOpset(version)
    assert step(model).modified
    assert model.opset_imports[""] == version
    assert_same_function(before, model)
    leave_alone(step, model)


@pytest.mark.parametrize("version", [13, 21])
def test_names_weights_and_metadata_are_kept(version: int) -> None:
    text = "g (float[2,40] x, float[40,40] w) => (float[2,40] y, float[2,1,40] z)"
    body = "a = MatMul(x, w) y = Softmax <axis = 1> (a) z = Unsqueeze <axes = [1]> (y)"
    model = model_of(f"{text} {{ {body} }}", weights="w", opset=12)
    NameNodes()(model)
    product = model.graph.node(0)
    product.metadata_props["origin"] = "layer"
    product.outputs[0].metadata_props["note"] = "activation"
    model.graph.initializers["w"].metadata_props["note"] = "weight"
    model.metadata_props["character"] = "abc"
    tensor = model.graph.initializers["w"].const_value
    RaiseOpset(version)(model)
    node = next(node for node in model.graph if node.op_type == "MatMul")
    assert (node.name, node.metadata_props) == ("MatMul_0", {"origin": "layer"})
    assert node.outputs[0].metadata_props == {"note": "activation"}
    assert model.graph.initializers["w"].const_value is tensor
    assert model.graph.initializers["w"].metadata_props == {"note": "weight"}
    assert model.metadata_props == {"character": "abc"}
    assert [value.name for value in model.graph.inputs] == ["x"]


def test_weights_in_bodies_and_large_constant_nodes_are_kept() -> None:
    text = """
    g (float[N,20] x, bool c) => (float[N,20] y) {
      y = If (c) <
        then_branch = t () => (float[N,20] p) <float[20,20] w> { p = MatMul(x, w) },
        else_branch = f () => (float[N,20] q) { q = Neg(x) }
      >
    }"""
    model = model_of(text.replace("<float[20,20] w>", "<float[1] w = {1}>"), opset=12)
    body = model.graph.node(0).attributes["then_branch"].as_graph()
    tensor = ir.tensor(np.random.default_rng(0).standard_normal((20, 20)).astype(np.float32), name="w")
    body.initializers["w"].const_value = tensor
    body.initializers["w"].shape = ir.Shape([20, 20])
    before = model.clone()
    RaiseOpset(17)(model)
    assert model.graph.node(0).attributes["then_branch"].as_graph().initializers["w"].const_value is tensor
    for condition in (True, False):
        assert_same_function(before, model, {**random_feeds(before), "c": np.array(condition)})


def test_other_domains_are_left_alone() -> None:
    model = model_of("g (float[2,3] x) => (float[2,3] y) { a = com.example.F(x) y = Softmax <axis = 1> (a) }", opset=12)
    RaiseOpset(13)(model)
    assert operators(model)[0] == "F"
    assert model.opset_imports["com.example"] == 1


WRONG_RESULTS = {
    "hardmax": ("g (float[2,3] x) => (float[2,3] y) { y = Hardmax(x) }", 11, 13),
    "prelu": ("g (float[2,3,4] x, float[3] s) => (float[2,3,4] y) { y = PRelu(x, s) }", 6, 13),
    "unknown version": ("g (float[2,3] x) => (float[2,3] y) { y = Relu(x) }", 11, 26),
    "unknown operator": ("g (float[2,3] x) => (float[2,3] y) { y = NoSuchOperator(x) }", 11, 13),
}


@pytest.mark.parametrize(("text", "current", "version"), WRONG_RESULTS.values(), ids=WRONG_RESULTS.keys())
def test_refuses_rather_than_convert_wrongly(text: str, current: int, version: int) -> None:
    model = model_of(text, opset=current)
    before = ir.to_onnx_text(model)
    with pytest.raises(ModelError, match="opset") as error:
        RaiseOpset(version)(model)
    assert "\n" not in str(error.value)
    assert ir.to_onnx_text(model) == before


def test_a_model_of_other_domains_only_needs_no_conversion() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["com.example" : 1]> g (float[2] x) => (float[2] y) { y = com.example.F(x) }'
    )
    assert opset(model) == 25
    leave_alone(RaiseOpset(21), model)
