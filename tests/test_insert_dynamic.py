"""InsertDynamic: integer operators on ranges found at run time, against float arithmetic on the rounded values."""

from typing import NamedTuple

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

from qonnx.errors import RecipeError, TargetError
from qonnx.numerics import Blocked, Dtype, Granularity, PerAxis, PerTensor
from qonnx.passes.infer_shapes import InferShapes
from qonnx.passes.insert_dynamic import InsertDynamic
from qonnx.plan import QuantPlan, TensorPlan
from tests.graphs import model_of
from tests.helpers import operators, random_feeds
from tests.plans import (
    Array,
    activation_plan,
    assert_outputs,
    dynamic_plan,
    inserted,
    outputs,
    quant_plan,
    rounded,
    weight_plan,
    with_rounded_weights,
)


class Case(NamedTuple):
    """A layer `n` that reads `x` at `data` and the weight `w` at `weight`, whose output channels are along `axis`."""

    text: str
    data: str
    weight: str
    axis: int


LAYERS = {
    "MatMul": Case("g (float[b,5,16] x, float[16,8] w) => (float[b,5,8] y) { [n] y = MatMul(x, w) }", "n:0", "n:1", 1),
    "MatMul, Add": Case(
        "g (float[b,5,16] x, float[16,8] w, float[8] c) => (float[b,5,8] y) { [n] m = MatMul(x, w) y = Add(c, m) }",
        "n:0",
        "n:1",
        1,
    ),
    "MatMul, batched weight": Case(
        "g (float[2,5,16] x, float[2,16,8] w) => (float[2,5,8] y) { [n] y = MatMul(x, w) }", "n:0", "n:1", 2
    ),
    "MatMul, weight first": Case(
        "g (float[16,5] x, float[8,16] w) => (float[8,5] y) { [n] y = MatMul(w, x) }", "n:1", "n:0", 0
    ),
    "MatMul, one row": Case("g (float[16] x, float[16,8] w) => (float[8] y) { [n] y = MatMul(x, w) }", "n:0", "n:1", 1),
    "Transpose, MatMul": Case(
        "g (float[5,16] x, float[8,16] w) => (float[5,8] y) { [t] v = Transpose(w) [n] y = MatMul(x, v) }",
        "n:0",
        "t:0",
        0,
    ),
    "Gemm": Case(
        "g (float[5,16] x, float[16,8] w, float[8] c) => (float[5,8] y) { [n] y = Gemm(x, w, c) }", "n:0", "n:1", 1
    ),
    "Gemm, transB, factors": Case(
        "g (float[5,16] x, float[8,16] w, float[8] c) => (float[5,8] y) "
        "{ [n] y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, c) }",
        "n:0",
        "n:1",
        0,
    ),
    "Gemm, transA, no bias": Case(
        "g (float[16,5] x, float[16,8] w) => (float[5,8] y) { [n] y = Gemm <transA = 1> (x, w) }", "n:0", "n:1", 1
    ),
    "Gemm, both transposed": Case(
        "g (float[16,5] x, float[8,16] w, float[5,1] c) => (float[5,8] y) "
        "{ [n] y = Gemm <transA = 1, transB = 1> (x, w, c) }",
        "n:0",
        "n:1",
        0,
    ),
    "Conv 1-D": Case(
        "g (float[b,4,9] x, float[8,4,3] w, float[8] c) => (float[b,8,7] y) { [n] y = Conv(x, w, c) }", "n:0", "n:1", 0
    ),
    "Conv 2-D": Case(
        "g (float[b,4,7,7] x, float[8,4,3,3] w, float[8] c) => (float[b,8,4,4] y) "
        "{ [n] y = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w, c) }",
        "n:0",
        "n:1",
        0,
    ),
    "Conv 2-D, groups": Case(
        "g (float[b,4,7,7] x, float[8,2,3,3] w) => (float[b,8,3,3] y) "
        "{ [n] y = Conv <group = 2, dilations = [2,2]> (x, w) }",
        "n:0",
        "n:1",
        0,
    ),
    "Conv 2-D, depthwise": Case(
        "g (float[b,8,7,7] x, float[8,1,3,3] w) => (float[b,8,7,7] y) "
        '{ [n] y = Conv <group = 8, auto_pad = "SAME_LOWER"> (x, w) }',
        "n:0",
        "n:1",
        0,
    ),
    "Conv 3-D": Case(
        "g (float[b,4,4,4,4] x, float[8,4,2,2,2] w) => (float[b,8,3,3,3] y) { [n] y = Conv(x, w) }", "n:0", "n:1", 0
    ),
}

WEIGHTS = [
    (Dtype.INT8, True),
    (Dtype.INT8, False),
    (Dtype.UINT8, True),
    (Dtype.UINT8, False),
    (Dtype.INT4, True),
    (Dtype.UINT4, False),
    (Dtype.INT2, True),
    (Dtype.UINT2, False),
]


def layer(name: str) -> ir.Model:
    return model_of(LAYERS[name].text, weights="w c", opset=13)


def planned(
    name: str, weight: Dtype = Dtype.INT8, kind: Granularity | None = None, symmetric: bool = True
) -> QuantPlan:
    case = LAYERS[name]
    chosen = weight_plan(layer(name), "w", case.weight, weight, kind or PerAxis(case.axis), symmetric)
    return quant_plan(dynamic_plan("x", case.data, Dtype.UINT8, PerTensor()), weights=(chosen,))


def dynamically_rounded(x: Array) -> Array:
    """What DynamicQuantizeLinear and back makes of a tensor, after the formulas of the ONNX specification."""
    low, high = np.minimum(x.min(), np.float32(0)), np.maximum(x.max(), np.float32(0))
    scale = np.float32((high - low) / np.float32(255))
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return np.asarray((np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale, np.float32)


@pytest.mark.parametrize(("weight", "per_channel"), WEIGHTS)
@pytest.mark.parametrize("name", LAYERS)
def test_computes_on_the_range_of_each_batch(name: str, weight: Dtype, per_channel: bool) -> None:
    model, feeds = layer(name), random_feeds(layer(name))
    kind = PerAxis(LAYERS[name].axis) if per_channel else PerTensor()
    plan = planned(name, weight, kind, symmetric=weight.signed or per_channel)
    written = inserted(InsertDynamic(plan), model)
    for factor in (1, 40):
        x = np.asarray(feeds["x"] * factor, np.float32)
        expected = outputs(with_rounded_weights(model, *plan.weights), {"x": dynamically_rounded(x)})
        assert_outputs(written, {"x": x}, expected)
    assert operators(written)[0] == "DynamicQuantizeLinear"
    assert {"MatMulInteger", "ConvInteger"} & set(operators(written))
    assert not {"MatMul", "Gemm", "Conv", "DequantizeLinear"} & set(operators(written))


def test_onnx_runtime_makes_one_kernel_of_it() -> None:
    """Only when the product of both scales is one factor, that of the activation first."""
    written = inserted(InsertDynamic(planned("MatMul, Add")), layer("MatMul, Add"))
    expected = ["DynamicQuantizeLinear", "MatMulInteger", "Cast", "Mul", "Mul", "Add"]
    assert operators(written) == expected
    both = written.graph[3]
    assert [value.name for value in both.inputs if value] == ["x_DynamicQuantizeLinear_output_1", "n_scale"]
    assert written.graph[4].inputs[1] is both.outputs[0]


def test_readers_share_one_quantization() -> None:
    model = model_of(
        "g (float[5,16] x, float[16,8] w, float[16,8] v) => (float[5,8] y, float[5,8] z, float[5,16] r) "
        "{ [a] y = MatMul(x, w) [c] z = MatMul(x, v) r = Relu(x) }",
        weights="w v",
    )
    weights = tuple(weight_plan(model, n, f"{e}:1", Dtype.INT8, PerAxis(1)) for n, e in (("w", "a"), ("v", "c")))
    plan = quant_plan(dynamic_plan("x", "a:0 c:0", Dtype.UINT8, PerTensor()), weights=weights)
    written = inserted(InsertDynamic(plan), model)
    assert operators(written).count("DynamicQuantizeLinear") == 1
    assert operators(written).count("MatMulInteger") == 2
    feeds = random_feeds(model)
    y, z = outputs(with_rounded_weights(model, *weights), {"x": dynamically_rounded(feeds["x"])})[:2]
    assert_outputs(written, feeds, [y, z, np.maximum(feeds["x"], 0)])


@pytest.mark.parametrize("fixed", [False, True])
def test_a_product_of_two_activations(fixed: bool) -> None:
    """Both measured at run time, or one of them (probabilities) with a known range."""
    model = model_of("g (float[2,5,16] x, float[2,16,7] p) => (float[2,5,7] y) { [n] y = MatMul(x, p) }")
    feeds = random_feeds(model)
    feeds["p"] = np.abs(feeds["p"])
    x = dynamic_plan("x", "n:0", Dtype.UINT8, PerTensor())
    p = activation_plan("p", feeds["p"], "n:1") if fixed else dynamic_plan("p", "n:1", Dtype.UINT8, PerTensor())
    written = inserted(InsertDynamic(quant_plan(x, p)), model)
    assert operators(written).count("DynamicQuantizeLinear") == 2 - fixed
    right = rounded(feeds["p"], p) if fixed else dynamically_rounded(feeds["p"])
    assert_outputs(written, feeds, [np.matmul(dynamically_rounded(feeds["x"]), right)])


def test_a_bias_that_is_computed() -> None:
    model = model_of(
        "g (float[1,4,7,7] x, float[8,4,3,3] w, float[8] k) => (float[1,8,5,5] y) "
        "{ b = Identity(k) [n] y = Conv(x, w, b) }",
        weights="w",
    )
    weight = weight_plan(model, "w", "n:1", Dtype.INT8, PerAxis(0))
    feeds = random_feeds(model)
    plan = quant_plan(dynamic_plan("x", "n:0", Dtype.UINT8, PerTensor()), weights=(weight,))
    expected = outputs(with_rounded_weights(model, weight), {**feeds, "x": dynamically_rounded(feeds["x"])})
    assert_outputs(inserted(InsertDynamic(plan), model), feeds, expected)


def test_an_input_of_zeros() -> None:
    written = inserted(InsertDynamic(planned("MatMul, Add")), layer("MatMul, Add"))
    x = np.zeros((3, 5, 16), np.float32)
    assert_outputs(written, {"x": x}, outputs(layer("MatMul, Add"), {"x": x}))


def test_a_float16_graph_stays_float16() -> None:
    model = model_of(
        "g (float16[5,16] x, float16[16,8] w, float16[8] c) => (float16[5,8] y) { m = Relu(x) [n] y = Gemm(m, w, c) }",
        weights="w c",
        opset=19,
    )
    InferShapes()(model)
    weight = weight_plan(model, "w", "n:1", Dtype.INT8, PerAxis(1))
    plan = quant_plan(dynamic_plan("m", "n:0", Dtype.UINT8, PerTensor()), weights=(weight,))
    feeds = random_feeds(model)
    x = dynamically_rounded(np.maximum(feeds["x"], 0).astype(np.float32)).astype(np.float16)
    written = inserted(InsertDynamic(plan), model)
    assert_outputs(written, feeds, outputs(with_rounded_weights(model, weight), {"x": x}), rtol=3e-3)


def test_a_table_beside_it_is_weight_only() -> None:
    model = model_of(
        "g (int64[5] ids, float[20,16] t, float[16,8] w) => (float[5,8] y) "
        "{ [e] x = Gather(t, ids) [n] y = MatMul(x, w) }",
        weights="t w",
    )
    weights = (
        weight_plan(model, "t", "e:0", Dtype.INT8, PerTensor()),
        weight_plan(model, "w", "n:1", Dtype.INT8, PerAxis(1)),
    )
    plan = quant_plan(dynamic_plan("x", "n:0", Dtype.UINT8, PerTensor()), weights=weights)
    written = inserted(InsertDynamic(plan), model)
    assert operators(written)[:3] == ["Gather", "DequantizeLinear", "DynamicQuantizeLinear"]


REFUSED: dict[str, tuple[str, TensorPlan | None, Dtype, Granularity | None, bool, str]] = {
    "int8": ("MatMul", dynamic_plan("x", "n:0", Dtype.INT8, PerTensor()), Dtype.INT8, None, True, "uint8 per tensor"),
    "rows": ("MatMul", dynamic_plan("x", "n:0", Dtype.UINT8, Blocked(-1, 16)), Dtype.INT8, None, True, "per_token"),
    "int16 weights": ("MatMul", None, Dtype.INT16, None, True, "leave it in float, or use format qdq"),
    "float8 weights": ("MatMul", None, Dtype.FLOAT8E4M3FN, None, True, "not on integers of 8 bits or fewer"),
    "blocked weights": ("MatMul", None, Dtype.INT4, Blocked(0, 8), True, "its second operand are blocked"),
    "scales along the input": ("MatMul", None, Dtype.INT8, PerAxis(0), True, "along the axis that is kept"),
    "scales along the input channels": ("Conv 2-D", None, Dtype.INT8, PerAxis(1), True, "along the output channels"),
    "zero points per channel": ("Conv 2-D", None, Dtype.UINT8, None, False, "quantize it symmetrically"),
    "zero points per row": ("MatMul, weight first", None, Dtype.UINT8, None, False, "quantize it symmetrically"),
    "zero points, batched": ("MatMul, batched weight", None, Dtype.UINT8, None, False, "quantize it symmetrically"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_integer_operators_do_not_take(name: str) -> None:
    case, activation, weight, kind, symmetric, message = REFUSED[name]
    plan = planned(case, weight, kind, symmetric)
    if activation is not None:
        plan = quant_plan(activation, weights=plan.weights)
    with pytest.raises(TargetError, match=message) as caught:
        InsertDynamic(plan)(layer(case))
    assert "\n" not in str(caught.value)


def test_refuses_a_layer_without_integer_form() -> None:
    model = model_of(
        "g (float[1,4,5,5] x, float[4,6,2,2] w) => (float[1,6,6,6] y) { [n] y = ConvTranspose(x, w) }", weights="w"
    )
    weight = weight_plan(model, "w", "n:1", Dtype.INT8, PerAxis(1))
    plan = quant_plan(dynamic_plan("x", "n:0", Dtype.UINT8, PerTensor()), weights=(weight,))
    with pytest.raises(TargetError, match=r"'n' \(ConvTranspose\) cannot run on integers: ONNX has no integer form"):
        InsertDynamic(plan)(model)


def test_refuses_a_layer_whose_weight_is_not_in_the_plan() -> None:
    plan = quant_plan(dynamic_plan("x", "n:0", Dtype.UINT8, PerTensor()))
    with pytest.raises(TargetError, match="its other operand is not on integers"):
        InsertDynamic(plan)(layer("MatMul"))


@pytest.mark.parametrize(("value", "edges"), [("z", "n:0"), ("x", "nope:0"), ("x", "n:7")])
def test_a_plan_for_another_model_is_refused(value: str, edges: str) -> None:
    plan = quant_plan(dynamic_plan(value, edges, Dtype.UINT8, PerTensor()))
    with pytest.raises(RecipeError, match="make the plan again"):
        InsertDynamic(plan)(layer("MatMul"))


def test_an_empty_plan_changes_nothing() -> None:
    assert not InsertDynamic(quant_plan())(layer("MatMul")).modified


def test_tensorrt_has_no_integer_operators() -> None:
    plan = msgspec.structs.replace(planned("MatMul"), target="a800")
    with pytest.raises(TargetError, match="cannot be imported on target a800; use format qdq, or target ort-cpu"):
        InsertDynamic(plan)(layer("MatMul"))


def test_an_activation_that_no_edge_reads_is_left_alone() -> None:
    """As in a plan that was edited by hand."""
    plan = quant_plan(dynamic_plan("x", "", Dtype.UINT8, PerTensor()))
    model = layer("MatMul")
    assert not InsertDynamic(plan)(model).modified
    assert operators(model) == ["MatMul"]
