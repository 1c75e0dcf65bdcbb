"""InsertQOperator: integer operators whose every code is that of the Q/DQ graph, or the next."""

from collections.abc import Mapping
from typing import NamedTuple

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

from qonnx.errors import TargetError
from qonnx.graph import load
from qonnx.numerics import Blocked, Dtype, Granularity, PerAxis, PerTensor
from qonnx.passes.allow_types import AllowTypes
from qonnx.passes.infer_shapes import InferShapes
from qonnx.passes.insert_qdq import InsertQDQ
from qonnx.passes.insert_qoperator import InsertQOperator
from qonnx.plan import QuantPlan, TensorPlan
from qonnx.recipe import Operators, load_recipe
from qonnx.runtime import session, with_outputs
from tests.graphs import model_of
from tests.helpers import LEVELS, operators, random_feeds
from tests.plans import Array, activation_plan, assert_outputs, inserted, outputs, quant_plan, stored, weight_plan
from tests.test_plan import planned as made_by_the_tool


class Case(NamedTuple):
    """A layer `n` that reads the activation `x` and the weight `w` and makes `c`.

    Attributes:
        inputs: of the graph.
        node: the layer.
        weight: where the weight is read.
        axis: of the stored weight, the output channels.
        rank: of the result.
        fused: the operator when the weight is int8 per channel and the result is quantized too.
    """

    inputs: str
    node: str
    weight: str
    axis: int
    rank: int
    fused: str = "QLinearConv"


LAYERS = {
    "Conv 1-D": Case("float[1,4,9] x, float[8,4,3] w, float[8] b", "Conv(x, w, b)", "n:1", 0, 3),
    "Conv 2-D": Case(
        "float[1,4,7,7] x, float[8,4,3,3] w, float[8] b",
        "Conv <pads = [1,1,1,1], strides = [2,2]> (x, w, b)",
        "n:1",
        0,
        4,
    ),
    "Conv 2-D, no bias": Case("float[1,4,7,7] x, float[8,4,3,3] w", "Conv <dilations = [2,2]> (x, w)", "n:1", 0, 4),
    "Conv 2-D, groups": Case(
        "float[1,4,7,7] x, float[8,2,3,3] w, float[8] b",
        'Conv <group = 2, auto_pad = "SAME_UPPER"> (x, w, b)',
        "n:1",
        0,
        4,
    ),
    "Conv 2-D, depthwise": Case(
        "float[1,8,7,7] x, float[8,1,3,3] w, float[8] b", "Conv <group = 8, pads = [1,1,1,1]> (x, w, b)", "n:1", 0, 4
    ),
    "Conv 3-D": Case("float[1,4,4,4,4] x, float[8,4,2,2,2] w, float[8] b", "Conv(x, w, b)", "n:1", 0, 5),
    "MatMul": Case("float[2,5,16] x, float[16,8] w", "MatMul(x, w)", "n:1", 1, 3, "QLinearMatMul"),
    "MatMul, batched weight": Case("float[2,5,16] x, float[2,16,8] w", "MatMul(x, w)", "n:1", 2, 3, "MatMulInteger"),
    "MatMul, weight first": Case("float[16,5] x, float[8,16] w", "MatMul(w, x)", "n:0", 0, 2, "MatMulInteger"),
    "Gemm": Case("float[5,16] x, float[16,8] w, float[8] b", "Gemm(x, w, b)", "n:1", 1, 2, "MatMulInteger"),
    "Gemm, transposed": Case(
        "float[16,5] x, float[8,16] w, float[8] b",
        "Gemm <transA = 1, transB = 1, alpha = 0.5, beta = 2.0> (x, w, b)",
        "n:1",
        0,
        2,
        "MatMulInteger",
    ),
    "Gemm, no bias": Case("float[5,16] x, float[8,16] w", "Gemm <transB = 1> (x, w)", "n:1", 0, 2, "MatMulInteger"),
}

INTEGER_OPERATORS = {"QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger"}
FLOAT_OPERATORS = {"Conv", "Gemm", "MatMul"}

DATA = {"MatMul, weight first": "n:1"}


def graph(case: Case, tail: str) -> ir.Model:
    shape = ",".join("?" * case.rank).replace("?", "d{}").format(*range(case.rank))
    return model_of(
        f"g ({case.inputs}) => (float[{shape}] y) {{ [n] c = {case.node} {tail} }}", weights="w b", opset=13, scale=0.3
    )


def planned(
    model: ir.Model,
    name: str,
    data: Dtype = Dtype.UINT8,
    weight: Dtype = Dtype.INT8,
    per_channel: bool = True,
    **quantized: str,
) -> QuantPlan:
    """A plan for x, w and the values of `quantized`, with ranges as they are on random data."""
    case, feeds, symmetric = LAYERS[name], random_feeds(model), data is Dtype.INT8
    found = session(with_outputs(model, list(quantized)), optimize=False).run(feeds)
    activations = [activation_plan("x", feeds["x"], DATA.get(name, "n:0"), data, symmetric)]
    activations += [activation_plan(value, found[value], edges, data, symmetric) for value, edges in quantized.items()]
    kind: Granularity = PerAxis(case.axis) if per_channel else PerTensor()
    affine = not weight.signed and not per_channel
    return quant_plan(*activations, weights=(weight_plan(model, "w", case.weight, weight, kind, not affine),))


def assert_same_codes(
    model: ir.Model,
    plan: QuantPlan,
    chosen: Operators = Operators.ONNX,
    most: int = 1,
    feeds: Mapping[str, Array] | None = None,
    levels: tuple[bool, ...] = (False, True),
) -> ir.Model:
    """Every code of the two graphs differs by `most` steps, and few do; returns the one with integer operators."""
    reference, written = model.clone(), inserted(InsertQOperator(plan, chosen), model)
    AllowTypes(plan)(reference)
    InsertQDQ(plan)(reference)
    feeds = feeds or random_feeds(model)
    names = [f"{tensor.value}_quantized" for tensor in plan.activations]
    expected = session(with_outputs(reference, names), optimize=False).run(feeds)
    for optimize in [level for level in levels if level in LEVELS]:
        found = session(with_outputs(written, names), optimize=optimize).run(feeds)
        for tensor, name in zip(plan.activations, names, strict=True):
            shift = 128 if tensor.dtype is Dtype.INT8 else 0
            steps = found[name].astype(np.int32) - expected[name].astype(np.int32) - shift
            assert np.abs(steps).max() <= most
            assert np.mean(steps != 0) < 0.1
        for value in model.graph.outputs:
            one, other = found[value.name or ""], expected[value.name or ""]
            largest = max((tensor.scale[0] for tensor in plan.activations), default=0.0)
            np.testing.assert_allclose(one, other, rtol=0, atol=1.01 * most * largest)
    return written


WEIGHTS = [(Dtype.INT8, True), (Dtype.INT8, False), (Dtype.UINT8, True), (Dtype.UINT8, False), (Dtype.INT4, True)]
WEIGHTS += [(Dtype.UINT4, False), (Dtype.INT2, True), (Dtype.UINT2, False)]


@pytest.mark.parametrize(("weight", "per_channel"), WEIGHTS)
@pytest.mark.parametrize("data", [Dtype.UINT8, Dtype.INT8])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_whose_result_is_quantized(name: str, data: Dtype, weight: Dtype, per_channel: bool) -> None:
    model = graph(LAYERS[name], "[e] y = Identity(c)")
    written = assert_same_codes(model, planned(model, name, data, weight, per_channel, c="e:0"))
    assert len(INTEGER_OPERATORS & set(operators(written))) == 1
    assert not FLOAT_OPERATORS & set(operators(written))


@pytest.mark.parametrize(("weight", "per_channel"), WEIGHTS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_whose_result_stays_float(name: str, weight: Dtype, per_channel: bool) -> None:
    model = graph(LAYERS[name], "[e] y = Identity(c)")
    feeds, plan = random_feeds(model), planned(model, name, Dtype.INT8, weight, per_channel)
    reference = model.clone()
    AllowTypes(plan)(reference)
    InsertQDQ(plan)(reference)
    written = inserted(InsertQOperator(plan), model)
    assert_outputs(written, feeds, outputs(reference, feeds))
    assert len({"ConvInteger", "MatMulInteger"} & set(operators(written))) == 1
    assert not FLOAT_OPERATORS & set(operators(written))


@pytest.mark.parametrize("name", LAYERS)
def test_uses_the_operator_that_rounds_once(name: str) -> None:
    model = graph(LAYERS[name], "[e] y = Identity(c)")
    written = inserted(InsertQOperator(planned(model, name, c="e:0")), model)
    assert LAYERS[name].fused in operators(written)


FUNCTIONS = {
    "Relu": "v = Relu(c)",
    "Clip": "low = Constant <value = float {-0.5}> () high = Constant <value = float {0.75}> () v = Clip(c, low, high)",
    "Clip from above": "high = Constant <value = float {0.75}> () v = Clip(c, , high)",
    "Relu, Clip": "r = Relu(c) high = Constant <value = float {0.75}> () v = Clip(r, , high)",
}


@pytest.mark.parametrize("data", [Dtype.UINT8, Dtype.INT8])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ["Conv 2-D", "MatMul"])
def test_activation_functions_become_bounds_of_the_codes(name: str, function: str, data: Dtype) -> None:
    model = graph(LAYERS[name], f"{FUNCTIONS[function]} [e] y = Identity(v)")
    written = assert_same_codes(model, planned(model, name, data, v="e:0"))
    bounded = [] if data is Dtype.UINT8 else ["Clip"]  # the range of a uint8 ends where the function does
    found = [op for op in operators(written) if op != "Constant"]
    assert found == ["QuantizeLinear", LAYERS[name].fused, *bounded, "DequantizeLinear", "Identity"]


def test_a_bound_inside_the_range_of_the_codes() -> None:
    model = graph(LAYERS["Conv 2-D"], "v = Relu(c) [e] y = Identity(v)")
    plan = planned(model, "Conv 2-D", v="e:0")
    wide = msgspec.structs.replace(plan.activations[1], scale=(0.05,), zero_point=(100,))
    written = assert_same_codes(model, quant_plan(plan.activations[0], wide, weights=plan.weights))
    (clip,) = [node for node in written.graph if node.op_type == "Clip"]
    assert [int(stored(written, str(value.name))) for value in clip.inputs[1:] if value] == [100, 255]


NOT_FUSED = {
    "a second reader": ("[e] z = Identity(c) y = Sigmoid(c)", "e:0", ", float[a,b,e,f] z"),
    "the result is an output": ("[e] y = Identity(c)", "e:0", ", float[a,b,e,f] c"),
    "another function": ("[r] v = LeakyRelu(c) [e] y = Identity(v)", "e:0", ""),
    "a function with two readers": ("v = Relu(c) [e] y = Identity(v) z = Sigmoid(v)", "e:0", ", float[a,b,e,f] z"),
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_a_result_that_is_read_in_float_is_not_rounded(name: str) -> None:
    text, edges, more = NOT_FUSED[name]
    case = LAYERS["Conv 2-D"]
    model = model_of(
        f"g ({case.inputs}) => (float[a,b,e,f] y{more}) {{ [n] c = {case.node} {text} }}", weights="w b", opset=13
    )
    value = next(node for node in model.graph if node.name == "e").inputs[0]
    assert value is not None
    written = assert_same_codes(
        model, planned(model, "Conv 2-D", Dtype.UINT8, Dtype.INT8, True, **{str(value.name): edges})
    )
    assert "ConvInteger" in operators(written)
    assert "QLinearConv" not in operators(written)


def test_a_bias_that_int32_does_not_hold_stays_float() -> None:
    """One channel of the weight is nearly zero, so that its bias would be some 10^12 steps."""
    model = graph(LAYERS["Conv 2-D"], "[e] y = Identity(c)")
    weight = model.graph.initializers["w"]
    assert weight.const_value is not None
    data = weight.const_value.numpy().copy()
    data[3] *= 1e-12
    weight.const_value = ir.Tensor(data, name="w")
    written = assert_same_codes(model, planned(model, "Conv 2-D", c="e:0"))
    assert "QLinearConv" not in operators(written)


def test_a_bias_that_is_computed_stays_float() -> None:
    model = model_of(
        "g (float[1,4,7,7] x, float[8,4,3,3] w, float[8] k) => (float[a,b,e,f] y) "
        "{ b = Identity(k) [n] c = Conv(x, w, b) [e] y = Identity(c) }",
        weights="w",
        opset=13,
    )
    assert "ConvInteger" in operators(assert_same_codes(model, planned(model, "Conv 2-D", c="e:0")))


def two_activations(value: str) -> ir.Model:
    return model_of(
        "g (float[2,3,5,16] x, float[2,3,16,7] w) => (float[2,3,5,7] y) "
        f"{{ [n] c = MatMul(x, w) [e] y = Identity({value}) }}",
        opset=13,
    )


@pytest.mark.parametrize("data", [Dtype.UINT8, Dtype.INT8])
@pytest.mark.parametrize("fused", [True, False])
def test_a_product_of_two_activations(data: Dtype, fused: bool) -> None:
    model = two_activations("c")
    feeds = random_feeds(model)
    c = np.matmul(feeds["x"], feeds["w"])
    ends = [activation_plan("c", c, "e:0", data, data is Dtype.INT8)] if fused else []
    both = [activation_plan(name, feeds[name], f"n:{i}", data, data is Dtype.INT8) for i, name in enumerate("xw")]
    written = assert_same_codes(model, quant_plan(*both, *ends))
    assert ("QLinearMatMul" if fused else "MatMulInteger") in operators(written)


def test_a_product_of_a_tensor_with_itself() -> None:
    model = model_of("g (float[16,16] x) => (float[16,16] y) { [n] y = MatMul(x, x) }", opset=13)
    plan = quant_plan(activation_plan("x", random_feeds(model)["x"], "n:0 n:1"))
    assert operators(assert_same_codes(model, plan)) == ["QuantizeLinear", "MatMulInteger", "Cast", "Mul"]


MOVES = {
    "MaxPool": "[m] v = MaxPool <kernel_shape = [2,2]> (c)",
    "Reshape": "shape = Constant <value_ints = [1,-1,2,2]> () [m] v = Reshape(c, shape)",
    "Transpose": "[m] v = Transpose <perm = [0,2,3,1]> (c)",
    "Slice": "s = Constant <value_ints = [1]> () e = Constant <value_ints = [3]> () [m] v = Slice(c, s, e, s)",
    "Concat": "[m] v = Concat <axis = 1> (c, c)",
}


@pytest.mark.parametrize("name", MOVES)
def test_what_only_moves_elements_runs_on_codes(name: str) -> None:
    model = graph(LAYERS["Conv 2-D"], f"{MOVES[name]} [e] y = Identity(v)")
    plan = planned(model, "Conv 2-D", c="m:0 m:1" if name == "Concat" else "m:0", v="e:0")
    tied = [tensor if tensor.value != "v" else replace(tensor, plan.activations[1]) for tensor in plan.activations]
    written = assert_same_codes(model, quant_plan(*tied, weights=plan.weights))
    expected = ["QuantizeLinear", "QLinearConv", name, "DequantizeLinear", "Identity"]
    assert [op for op in operators(written) if op != "Constant"] == expected


@pytest.mark.parametrize("name", MOVES)
def test_moves_between_different_grids_stay_float(name: str) -> None:
    model = graph(LAYERS["Conv 2-D"], f"{MOVES[name]} [e] y = Identity(v)")
    plan = planned(model, "Conv 2-D", c="m:0 m:1" if name == "Concat" else "m:0", v="e:0")
    other = [tensor if tensor.value != "v" else replace(tensor, tensor, 1.5) for tensor in plan.activations]
    written = assert_same_codes(model, quant_plan(*other, weights=plan.weights))
    assert operators(written).count("QuantizeLinear") == 2


def replace(tensor: TensorPlan, grid: TensorPlan, factor: float = 1.0) -> TensorPlan:
    """The tensor on the grid of another, or on a coarser one."""
    scale = (float(np.float32(grid.scale[0] * factor)),)
    return msgspec.structs.replace(tensor, scale=scale, zero_point=grid.zero_point)


def test_conv_transpose_stays_between_its_pairs() -> None:
    model = model_of(
        "g (float[1,4,5,5] x, float[4,6,2,2] w) => (float[1,6,6,6] y) { [n] y = ConvTranspose(x, w) }",
        weights="w",
        opset=13,
    )
    weight = weight_plan(model, "w", "n:1", Dtype.INT8, PerAxis(1))
    plan = quant_plan(activation_plan("x", random_feeds(model)["x"], "n:0"), weights=(weight,))
    written = assert_same_codes(model, plan)
    assert operators(written) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "ConvTranspose"]


def test_a_weight_behind_a_transpose() -> None:
    model = model_of(
        "g (float[5,16] x, float[8,16] w) => (float[5,8] y) "
        "{ [t] v = Transpose(w) [n] c = MatMul(x, v) [e] y = Identity(c) }",
        weights="w",
        opset=13,
    )
    feeds = random_feeds(model)
    c = feeds["x"] @ stored(model, "w").T
    weight = weight_plan(model, "w", "t:0", Dtype.INT8, PerAxis(0))
    activations = activation_plan("x", feeds["x"], "n:0"), activation_plan("c", c, "e:0")
    written = assert_same_codes(model, quant_plan(*activations, weights=(weight,)))
    assert operators(written) == ["QuantizeLinear", "Transpose", "QLinearMatMul", "DequantizeLinear", "Identity"]


NETWORK = """g (float[n,3,16,16] x, float[8,3,3,3] w, float[8] b, float[8,8,3,3] w2, float[8] b2, float[8,1,3,3] w3,
float[16,8,1,1] w4, float[16,10] w5, float[10] b5) => (float[n,10] y) {
    [a] c = Conv <pads = [1,1,1,1]> (x, w, b)  r = Relu(c)
    [b_] c2 = Conv <pads = [1,1,1,1]> (r, w2, b2)
    [s] s = Add(c2, r)  r2 = Relu(s)
    [c_] c3 = Conv <pads = [1,1,1,1], group = 8> (r2, w3)  r3 = Relu(c3)
    [p] m = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r3)
    [d] c4 = Conv(m, w4)
    g = GlobalAveragePool(c4)  f = Flatten(g)
    [f_] y = Gemm(f, w5, b5)
}"""

NETWORK_EDGES = {"x": "a:0", "r": "b_:0 s:1", "c2": "s:0", "r2": "c_:0", "r3": "p:0", "m": "d:0", "f": "f_:0"}
NETWORK_WEIGHTS = {"w": "a:1", "w2": "b_:1", "w3": "c_:1", "w4": "d:1"}


def network_plan(data: Dtype) -> tuple[ir.Model, QuantPlan]:
    model = model_of(NETWORK, weights="w b w2 b2 w3 w4 w5 b5", opset=13, scale=0.25)
    feeds, symmetric = random_feeds(model), data is Dtype.INT8
    inner = [name for name in NETWORK_EDGES if name != "x"]
    found = {**feeds, **session(with_outputs(model, inner), optimize=False).run(feeds)}
    plans = {name: activation_plan(name, found[name], edges, data, symmetric) for name, edges in NETWORK_EDGES.items()}
    plans["m"] = replace(plans["m"], plans["r3"])
    weights = [weight_plan(model, name, edge, Dtype.INT8, PerAxis(0)) for name, edge in NETWORK_WEIGHTS.items()]
    weights.append(weight_plan(model, "w5", "f_:1", Dtype.INT8, PerAxis(1)))
    return model, quant_plan(*plans.values(), weights=tuple(weights))


@pytest.mark.parametrize("chosen", Operators)
@pytest.mark.parametrize("data", [Dtype.UINT8, Dtype.INT8])
def test_a_network_with_a_skip_connection(data: Dtype, chosen: Operators) -> None:
    model, plan = network_plan(data)
    # Two: each layer is off by one step at most, and a sum of two layers by one of each.
    written = assert_same_codes(model, plan, chosen, most=2)
    count = operators(written).count
    assert count("QLinearConv") == 3
    assert count("ConvInteger") == 1
    assert count("QLinearAdd") == (1 if chosen is Operators.MICROSOFT else 0)
    assert count("QGemm") == (1 if chosen is Operators.MICROSOFT else 0)


def around(plan: QuantPlan, model: ir.Model, name: str) -> QuantPlan:
    """The part of a plan that is about the operands and the result of one layer."""
    node = next(node for node in model.graph if node.name == name)
    results = {value.name for value in node.outputs}
    for usage in node.outputs[0].uses():
        results |= {value.name for value in usage.node.outputs if usage.node.op_type in ("Relu", "Clip")}
    kept = [
        tensor for tensor in plan.activations if tensor.value in results or name in {edge.node for edge in tensor.edges}
    ]
    weights = tuple(tensor for tensor in plan.weights if name in {edge.node for edge in tensor.edges})
    return quant_plan(*kept, weights=weights)


@pytest.mark.parametrize("name", ["a", "b_", "s", "c_", "p", "d", "f_"])
def test_each_layer_of_a_network_alone_is_off_by_one_step_at_most(name: str) -> None:
    model, plan = network_plan(Dtype.UINT8)
    assert_same_codes(model, around(plan, model, name), Operators.MICROSOFT)


@pytest.mark.models
def test_each_layer_of_a_real_network_alone_is_off_by_one_step_at_most() -> None:
    """Alone, because through many layers a step more or less grows to several."""
    from models import ocr

    model, batches = load(ocr.onnx_file()), list(ocr.calibration(1, 1))
    plan = made_by_the_tool(model, batches, load_recipe("int8-average"), "ort-cpu")
    assert len(plan.quantized_layers) > 40
    for layer in plan.quantized_layers[
        ::3
    ]:  # without optimizations: they change what reaches the layer in its last bits
        assert_same_codes(model, around(plan, model, layer.node), feeds=batches[0], levels=(False,))


SIMPLE = {
    "Add": "Add(x, c)",
    "Mul": "Mul(x, c)",
    "Sigmoid": "Sigmoid(x)",
    "LeakyRelu": "LeakyRelu <alpha = 0.1> (x)",
    "GlobalAveragePool": "GlobalAveragePool(x)",
    "AveragePool": "AveragePool <kernel_shape = [3,3], pads = [1,1,1,1], count_include_pad = 1> (x)",
    "Softmax": "Softmax <axis = 1> (x)",
    "Concat": "Concat <axis = 1> (x, c)",
}


@pytest.mark.parametrize("data", [Dtype.UINT8, Dtype.INT8])
@pytest.mark.parametrize("name", SIMPLE)
def test_operators_of_onnx_runtime_on_request(name: str, data: Dtype) -> None:
    model = model_of(
        f"g (float[1,4,6,6] x, float[1,4,6,6] c) => (float[a,b,d,e] y, float[1,4,6,6] z) "
        f"{{ [n] v = {SIMPLE[name]} [e] y = Identity(v) z = Identity(c) }}",
        opset=13,
    )
    feeds, symmetric = random_feeds(model), data is Dtype.INT8
    v = session(with_outputs(model, ["v"]), optimize=False).run(feeds)["v"]
    plans = [activation_plan("x", feeds["x"], "n:0", data, symmetric), activation_plan("v", v, "e:0", data, symmetric)]
    if "(x, c)" in SIMPLE[name]:
        plans.append(activation_plan("c", 2 * feeds["c"], "n:1", data, symmetric))
    written = assert_same_codes(model, quant_plan(*plans), Operators.MICROSOFT)
    assert f"QLinear{name}" in operators(written)
    assert name in operators(inserted(InsertQOperator(quant_plan(*plans)), model))


@pytest.mark.parametrize(
    ("name", "fused", "operator"),
    [("Gemm", True, "QGemm"), ("Gemm", False, "QGemm"), ("MatMul", False, "MatMulIntegerToFloat")],
)
def test_products_of_onnx_runtime_on_request(name: str, fused: bool, operator: str) -> None:
    model = graph(LAYERS[name], "[e] y = Identity(c)")
    plan = planned(model, name, Dtype.UINT8, Dtype.INT8, True, **({"c": "e:0"} if fused else {}))
    assert operator in operators(assert_same_codes(model, plan, Operators.MICROSOFT))


def test_onnx_runtime_has_no_gemm_with_factors() -> None:
    model = graph(LAYERS["Gemm, transposed"], "[e] y = Identity(c)")
    written = assert_same_codes(model, planned(model, "Gemm, transposed", c="e:0"), Operators.MICROSOFT)
    assert "QGemm" not in operators(written)


def test_a_float16_graph_stays_float16() -> None:
    model = model_of(
        "g (float16[1,4,7,7] x, float16[8,4,3,3] w, float16[8] b, float16[8,6] w2) => (float16[1,5,5,6] y) "
        "{ [n] c = Conv(x, w, b) [t] v = Transpose <perm = [0,2,3,1]> (c) [m] y = MatMul(v, w2) }",
        weights="w b w2",
        opset=19,
        scale=0.3,
    )
    InferShapes()(model)
    feeds = random_feeds(model)
    found = session(with_outputs(model, ["c", "v"]), optimize=False).run(feeds)
    plans = [activation_plan("x", feeds["x"], "n:0"), activation_plan("c", found["c"], "t:0")]
    plans.append(replace(activation_plan("v", found["v"], "m:0"), plans[1]))
    weights = (
        weight_plan(model, "w", "n:1", Dtype.INT8, PerAxis(0)),
        weight_plan(model, "w2", "m:1", Dtype.INT8, PerAxis(1)),
    )
    written = assert_same_codes(model, quant_plan(*plans, weights=weights))
    expected = ["QuantizeLinear", "QLinearConv", "Transpose", "MatMulInteger", "Cast", "Mul", "Cast"]
    assert operators(written) == expected


REFUSED: dict[str, tuple[Dtype, Dtype, Granularity, str]] = {
    "int16 activations": (Dtype.INT16, Dtype.INT8, PerTensor(), "activation 'x': integer operators take int8 or uint8"),
    "float8 activations": (Dtype.FLOAT8E4M3FN, Dtype.INT8, PerTensor(), "activation 'x': integer operators take"),
    "int4 activations": (Dtype.INT4, Dtype.INT8, PerTensor(), "activation 'x': integer operators take"),
    "int16 weights": (Dtype.UINT8, Dtype.INT16, PerTensor(), "an operand has more than 8 bits, or is not an integer"),
    "float8 weights": (
        Dtype.UINT8,
        Dtype.FLOAT8E5M2,
        PerTensor(),
        "an operand has more than 8 bits, or is not an integer",
    ),
    "blocked weights": (Dtype.UINT8, Dtype.INT8, Blocked(0, 8), "the scales of its second operand are blocked"),
    "scales along the input": (Dtype.UINT8, Dtype.INT8, PerAxis(0), "do not run along the axis that is kept"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_integer_operators_do_not_take(name: str) -> None:
    data, weight, kind, message = REFUSED[name]
    model = graph(LAYERS["MatMul"], "[e] y = Identity(c)")
    activation = activation_plan("x", random_feeds(model)["x"], "n:0", data, symmetric=True)
    plan = quant_plan(activation, weights=(weight_plan(model, "w", "n:1", weight, kind),))
    with pytest.raises(TargetError, match=message) as caught:
        InsertQOperator(plan)(model)
    assert "\n" not in str(caught.value)


MORE_REFUSED = {
    "different zero points in a batched weight": ("MatMul, batched weight", PerAxis(2), "quantize it symmetrically"),
    "different zero points in a first operand": ("MatMul, weight first", PerAxis(0), "quantize it symmetrically"),
    "different zero points, float result": ("Conv 2-D", PerAxis(0), "quantize it symmetrically"),
    "scales along the input of a convolution": ("Conv 2-D", PerAxis(1), "do not run along the output channels"),
}


@pytest.mark.parametrize("name", MORE_REFUSED)
def test_refuses_scales_and_zero_points_that_do_not_factor_out(name: str) -> None:
    layer, kind, message = MORE_REFUSED[name]
    model = graph(LAYERS[layer], "[e] y = Identity(c)")
    plan = planned(model, layer)
    weight = weight_plan(model, "w", LAYERS[layer].weight, Dtype.UINT8, kind, symmetric=False)
    with pytest.raises(TargetError, match=message):
        InsertQOperator(quant_plan(*plan.activations, weights=(weight,)))(model)


@pytest.mark.parametrize("name", ["Conv 2-D", "MatMul", "Gemm"])
def test_a_zero_point_for_every_channel(name: str) -> None:
    """QLinearConv and products of two axes take them."""
    model = graph(LAYERS[name], "[e] y = Identity(c)")
    plan = planned(model, name, c="e:0")
    weight = weight_plan(model, "w", LAYERS[name].weight, Dtype.UINT8, PerAxis(LAYERS[name].axis), symmetric=False)
    written = assert_same_codes(model, quant_plan(*plan.activations, weights=(weight,)))
    assert LAYERS[name].fused in operators(written)


@pytest.mark.parametrize("chosen", Operators)
def test_tensorrt_has_no_integer_operators(chosen: Operators) -> None:
    model = graph(LAYERS["MatMul"], "[e] y = Identity(c)")
    plan = msgspec.structs.replace(planned(model, "MatMul"), target="a800")
    with pytest.raises(TargetError, match="cannot be imported on target a800; use format qdq, or target ort-cpu"):
        InsertQOperator(plan, chosen)(model)


@pytest.mark.skipif(False not in LEVELS, reason="ONNX Runtime cannot optimize float8, and is not exact without here")
def test_weights_that_float_activations_are_multiplied_with_may_have_any_type() -> None:
    model = model_of(
        "g (float[5,16] x, float[16,8] w, float[16,8] v, float[16,8] u) => (float[5,8] y, float[5,8] z, float[5,8] p) "
        "{ [n] y = MatMul(x, w) [m] z = MatMul(x, v) [o] p = MatMul(x, u) }",
        weights="w v u",
    )
    weights = (
        weight_plan(model, "w", "n:1", Dtype.INT8, PerAxis(1)),
        weight_plan(model, "v", "m:1", Dtype.INT4, Blocked(0, 8)),
        weight_plan(model, "u", "o:1", Dtype.FLOAT8E4M3FN, PerTensor()),
    )
    plan = quant_plan(activation_plan("x", random_feeds(model)["x"], "n:0"), weights=weights)
    assert operators(assert_same_codes(model, plan)).count("MatMul") == 2


def test_refuses_activations_without_a_scale() -> None:
    model = graph(LAYERS["MatMul"], "[e] y = Identity(c)")
    plan = quant_plan(msgspec.structs.replace(planned(model, "MatMul").activations[0], scale=()))
    with pytest.raises(TargetError, match="has no scale: calibrate it, or use format dynamic"):
        InsertQOperator(plan)(model)
