"""InsertQDQ: the graph computes exactly what the plan says, and holds nothing more."""

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

from qonnx.errors import RecipeError
from qonnx.graph import subgraphs
from qonnx.numerics import Dtype, PerAxis, PerTensor, fake_quantize
from qonnx.passes.insert_qdq import InsertQDQ
from qonnx.placement import Edge
from qonnx.plan import BiasPlan, QuantPlan, TensorPlan
from qonnx.recipe import Recipe, load_recipe
from qonnx.runtime import session
from tests.graphs import model_of
from tests.test_plan import data, mlp, planned


def quantized(model: ir.Model, plan: QuantPlan) -> ir.Model:
    copy = model.clone()
    InsertQDQ(plan)(copy)
    return copy


def run(model: ir.Model, feeds: dict[str, np.ndarray], optimize: bool = False) -> list[np.ndarray]:
    return list(session(model, optimize=optimize).run(feeds).values())


def weight_of(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def test_computes_the_fake_quantized_network() -> None:
    model, batches = mlp(), data()
    plan = planned(model, batches)
    tensors = {tensor.value: tensor for tensor in plan.activations + plan.weights}

    def rounded(value: str, array: np.ndarray) -> np.ndarray:
        tensor = tensors[value]
        scale = np.array(tensor.scale, np.float32)
        if isinstance(tensor.granularity, PerTensor):
            scale = scale.reshape(())
        return fake_quantize(array, scale, None, tensor.dtype, tensor.granularity)

    x = batches[0]["x"]
    hidden = rounded("x", x) @ rounded("w", weight_of(model, "w")) + weight_of(model, "b")
    expected = rounded("r", np.maximum(hidden, 0)) @ rounded("w2", weight_of(model, "w2"))
    (found,) = run(quantized(model, plan), batches[0])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["a800", "ort-cpu"])
def test_runs_the_same_with_and_without_optimizations(name: str) -> None:
    model, batches = mlp(), data()
    copy = quantized(model, planned(model, batches, name=name))
    (plain,), (fused,) = run(copy, batches[0]), run(copy, batches[0], optimize=True)
    np.testing.assert_allclose(fused, plain, atol=0.02 * np.abs(plain).max())


def test_leaves_no_dead_float_weights_and_keeps_float_biases() -> None:
    model = mlp()
    copy = quantized(model, planned(model, data()))
    assert "w" not in copy.graph.initializers
    assert "w2" not in copy.graph.initializers
    assert "b" in copy.graph.initializers
    stored = {name: value.dtype for name, value in copy.graph.initializers.items()}
    assert stored["w_quantized"] == ir.DataType.INT8
    assert all(value.uses() for value in copy.graph.initializers.values())


def test_one_pair_of_nodes_a_tensor() -> None:
    model = model_of(
        "g (float[8,32] x, float[32,32] w, float[32,32] w2) => (float[8,32] y, float[8,32] z) "
        "{ [a] y = MatMul(x, w) [b] z = MatMul(x, w2) }",
        weights="w w2",
    )
    copy = quantized(model, planned(model, data()))
    operators = [node.op_type for node in copy.graph]
    assert operators.count("QuantizeLinear") == 1
    assert operators.count("DequantizeLinear") == 3


def test_one_dequantized_weight_serves_all_that_read_it_alike() -> None:
    model = model_of(
        "g (float[8,32] x, float[32,32] w) => (float[8,32] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, w) }",
        weights="w",
    )
    copy = quantized(model, planned(model, data()))
    first, second = [node for node in copy.graph if node.op_type == "MatMul"]
    assert first.inputs[1] is second.inputs[1]
    assert [name for name in copy.graph.initializers if name.startswith("w_quantized")] == ["w_quantized"]


def test_a_weight_read_along_two_axes_is_stored_once_for_each() -> None:
    model = model_of(
        "g (float[8,32] x, float[32,32] w) => (float[8,32] y) "
        "{ h = Gemm(x, w) r = Relu(h) y = Gemm <transB = 1> (r, w) }",
        weights="w",
    )
    copy = quantized(model, planned(model, data()))
    assert {"w_quantized", "w_quantized_1"} <= set(copy.graph.initializers)
    assert "w" not in copy.graph.initializers
    (expected,), (found,) = run(model, data()[0]), run(copy, data()[0])
    np.testing.assert_allclose(found, expected, atol=0.1 * np.abs(expected).max())


BODIES = {
    "then": "y = If (c) <then_branch = t () => (float[8,32] u) { u = MatMul(r, w) }, "
    "else_branch = e () => (float[8,32] v) { v = Add(x, r) }>",
    "loop": "n = Constant <value = int64 {2}> () y = Loop (n, c, r) <body = l (int64 i, bool d, float[8,32] s) => "
    "(bool f, float[8,32] u) { f = Identity(d) u = MatMul(s, w) }>",
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_keep_the_float_weight_and_activation_that_they_read(name: str) -> None:
    model = model_of(
        "g (bool c, float[8,32] x, float[32,32] w) => (float[8,32] y, float[8,32] z) "
        f"{{ a = MatMul(x, w) r = Relu(a) z = MatMul(r, w) {BODIES[name]} }}",
        weights="w",
        scale=0.2,
    )
    batches = [{**batch, "c": np.array(True)} for batch in data()]
    copy = quantized(model, planned(model, batches))
    (body,) = [node for node in copy.graph if node.op_type in ("If", "Loop")]
    products = [node for graph in subgraphs(body) for node in graph if node.op_type == "MatMul"]
    assert [node.inputs[1] for node in products] == [copy.graph.initializers["w"]]
    expected, found = run(model, batches[0]), run(copy, batches[0])
    for before, after in zip(expected, found, strict=True):
        np.testing.assert_allclose(after, before, atol=0.1 * np.abs(before).max())


def test_weights_and_biases_that_are_outputs_stay() -> None:
    model = model_of(
        "g (float[8,32] x, float[32,32] w, float[32] b) => (float[8,32] y) { [fc] y = Gemm(x, w, b) }", weights="w b"
    )
    model.graph.outputs.extend([model.graph.initializers["w"], model.graph.initializers["b"]])
    plan = planned(model, data())
    shift = BiasPlan("fc", Edge("fc", 2), (0.5,) * 32)
    copy = quantized(model, msgspec.structs.replace(plan, biases=(shift,)))
    _, w, b = run(copy, data()[0])
    np.testing.assert_array_equal(w, weight_of(model, "w"))
    np.testing.assert_array_equal(b, weight_of(model, "b"))


def test_a_shift_for_another_number_of_channels_is_refused() -> None:
    plan = QuantPlan("a800", "int8", (), (), (), biases=(BiasPlan("fc1", Edge("fc1", 2), (0.5,) * 3),))
    with pytest.raises(RecipeError, match="no bias of 3 channels"):
        InsertQDQ(plan)(mlp())


def test_a_weight_that_an_embedding_shares_stays_in_float_for_the_embedding() -> None:
    model = model_of(
        "g (int64[4] ids, float[32,16] w) => (float[4,32] y) { x = Gather(w, ids) t = Transpose(w) y = MatMul(x, t) }",
        weights="w",
    )
    copy = quantized(model, planned(model, [{"ids": np.arange(4)}]))
    gather = next(node for node in copy.graph if node.op_type == "Gather")
    assert gather.inputs[0] is copy.graph.initializers["w"]
    product = next(node for node in copy.graph if node.op_type == "MatMul")
    (expected,), (found,) = run(model, {"ids": np.arange(4)}), run(copy, {"ids": np.arange(4)})
    assert product.inputs[1] is not copy.graph.initializers["w"]
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())


def test_other_readers_keep_the_float_tensor() -> None:
    model = model_of(
        "g (float[8,32] x, float[32,32] w) => (float[8,32] y, float[8,32] z) { y = MatMul(x, w) z = Sigmoid(x) }",
        weights="w",
    )
    copy = quantized(model, planned(model, data()))
    sigmoid = next(node for node in copy.graph if node.op_type == "Sigmoid")
    assert sigmoid.inputs[0] is copy.graph.inputs[0]


def test_new_names_extend_the_old_ones_and_avoid_those_that_are_taken() -> None:
    model = model_of(
        "g (float[8,32] x, float[32,32] w) => (float[8,32] y, float[8,32] x_quantized) "
        "{ y = MatMul(x, w) x_quantized = Identity(x) }",
        weights="w",
    )
    copy = quantized(model, planned(model, data()))
    names = [output.name for node in copy.graph for output in node.outputs]
    assert len(names) == len(set(names))
    assert {"x_quantized_1", "x_dequantized"} <= set(names)
    pair = [node for node in copy.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert all(node.metadata_props["qonnx.pass"] == "InsertQDQ" for node in pair)


@pytest.mark.parametrize("recipe", ["int8-average", "int8-minmax"])
def test_zero_points_are_written_in_the_type_and_shape_of_the_scale(recipe: str) -> None:
    model = mlp()
    copy = quantized(model, planned(model, data(), load_recipe(recipe)))
    for node in copy.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero_point = node.inputs[1], node.inputs[2]
            assert scale is not None
            assert zero_point is not None
            assert scale.shape == zero_point.shape
            assert zero_point.dtype == ir.DataType.INT8


def test_a_float16_graph_stays_float16() -> None:
    text = "g (float16[8,32] x, float16[32,32] w) => (float16[8,32] y) { y = MatMul(x, w) }"
    model = model_of(text, weights="w")
    batches = [{"x": batch["x"].astype(np.float16)} for batch in data()]
    copy = quantized(model, planned(model, batches))
    (found,) = run(copy, batches[0])
    (expected,) = run(model, batches[0])
    assert found.dtype == np.float16
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


BAD_EDGES = {
    "no such node": (TensorPlan("x", (Edge("nope", 0),), Dtype.INT8, PerTensor(), (1.0,)), "no node 'nope'"),
    "another value": (TensorPlan("z", (Edge("fc1", 0),), Dtype.INT8, PerTensor(), (1.0,)), "not 'z'"),
    "no such input": (TensorPlan("x", (Edge("fc1", 7),), Dtype.INT8, PerTensor(), (1.0,)), "nothing"),
}


@pytest.mark.parametrize("name", BAD_EDGES)
def test_a_plan_for_another_model_is_refused(name: str) -> None:
    tensor, message = BAD_EDGES[name]
    plan = QuantPlan("a800", "int8", (tensor,), (), ())
    with pytest.raises(RecipeError, match=message):
        InsertQDQ(plan)(mlp())


def test_weights_are_quantized_when_they_are_written_and_not_before() -> None:
    model = mlp()
    plan = planned(model, data())
    copy = quantized(model, plan)
    assert isinstance(copy.graph.initializers["w_quantized"].const_value, ir.LazyTensor)
    assert plan.weights[0].granularity == PerAxis(1)
    assert Recipe().weights.dtype == plan.weights[0].dtype
