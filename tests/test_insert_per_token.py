"""InsertPerToken: one scale a row, found at run time, against float arithmetic on the rounded values."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qonnx.errors import TargetError
from qonnx.numerics import Blocked, Dtype, Granularity, PerAxis, PerTensor, fake_quantize
from qonnx.passes.infer_shapes import InferShapes
from qonnx.passes.insert_dynamic import InsertDynamic
from qonnx.passes.insert_per_token import InsertPerToken
from qonnx.plan import QuantPlan
from tests.graphs import model_of
from tests.helpers import LEVELS, operators, random_feeds
from tests.plans import (
    Array,
    assert_outputs,
    dynamic_plan,
    inserted,
    outputs,
    quant_plan,
    weight_plan,
    with_rounded_weights,
)
from tests.test_insert_dynamic import LAYERS, WEIGHTS, layer

# The axis of x that each layer sums over; what is not here is a convolution.
SUMMED = {
    name: -2 if name in ("MatMul, weight first",) or "transA" in name or "both" in name else -1 for name in LAYERS
}
PRODUCTS = [name for name in LAYERS if "Conv" not in name]


def planned(
    name: str, weight: Dtype = Dtype.INT8, kind: Granularity | None = None, symmetric: bool = True
) -> QuantPlan:
    case = LAYERS[name]
    chosen = weight_plan(layer(name), "w", case.weight, weight, kind or PerAxis(case.axis), symmetric)
    return quant_plan(dynamic_plan("x", case.data, Dtype.INT8, Blocked(SUMMED[name], 16)), weights=(chosen,))


def rounded_rows(x: Array, axis: int = -1) -> Array:
    """Every row of x on a symmetric int8 grid of its own."""
    scale = np.maximum(np.abs(x).max(axis=axis, keepdims=True) / np.float32(127), np.float32(2.0**-126))
    return fake_quantize(x, scale, None, Dtype.INT8, Blocked(axis, x.shape[axis]))


@pytest.mark.parametrize(("weight", "per_channel"), WEIGHTS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_computes_with_a_scale_for_every_row(name: str, weight: Dtype, per_channel: bool) -> None:
    model, feeds = layer(name), random_feeds(layer(name))
    kind = PerAxis(LAYERS[name].axis) if per_channel else PerTensor()
    plan = planned(name, weight, kind, symmetric=weight.signed or per_channel)
    written = inserted(InsertPerToken(plan), model)
    spread = 10.0 ** np.arange(feeds["x"].size).reshape(feeds["x"].shape).__mod__(3)
    for x in (feeds["x"], np.asarray(feeds["x"] * spread, np.float32)):
        expected = outputs(with_rounded_weights(model, *plan.weights), {"x": rounded_rows(x, SUMMED[name])})
        assert_outputs(written, {"x": x}, expected)
    assert "MatMulInteger" in operators(written)
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & set(operators(written))


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 4), min_size=0, max_size=3), seed=st.integers(0, 99))
def test_any_rank_and_size(shape: Sequence[int], seed: int) -> None:
    sizes = ",".join(f"d{i}" for i in range(len(shape)))
    comma = "," if sizes else ""
    model = model_of(
        f"g (float[{sizes}{comma}16] x, float[16,8] w) => (float[{sizes}{comma}8] y) {{ [n] y = MatMul(x, w) }}",
        weights="w",
    )
    weight = weight_plan(model, "w", "n:1", Dtype.INT8, PerAxis(1))
    plan = quant_plan(dynamic_plan("x", "n:0", Dtype.INT8, Blocked(-1, 16)), weights=(weight,))
    x = np.random.default_rng(seed).standard_normal((*shape, 16)).astype(np.float32)
    expected = outputs(with_rounded_weights(model, weight), {"x": rounded_rows(x)})
    (found,) = outputs(inserted(InsertPerToken(plan), model), {"x": x}, LEVELS[0])
    np.testing.assert_allclose(found, expected[0], rtol=0, atol=1e-5 * np.abs(expected[0]).max())


def test_an_outlier_costs_no_other_token_its_precision() -> None:
    name = "MatMul"
    x = random_feeds(layer(name))["x"]
    x[0, 0] *= 1000
    (expected,) = outputs(layer(name), {"x": x})
    error = {}
    for step in (InsertPerToken(planned(name)), InsertDynamic(dynamic(name))):
        (found,) = outputs(inserted(step, layer(name)), {"x": x}, LEVELS[0])
        error[type(step)] = np.abs(found - expected)[1:].max() / np.abs(expected[1:]).max()
    assert error[InsertPerToken] < 0.02
    assert error[InsertDynamic] > 0.5


def dynamic(name: str) -> QuantPlan:
    return quant_plan(dynamic_plan("x", LAYERS[name].data, Dtype.UINT8, PerTensor()), weights=planned(name).weights)


def test_rows_of_zeros_stay_zero() -> None:
    x = random_feeds(layer("MatMul, Add"))["x"]
    x[1] = 0
    written = inserted(InsertPerToken(planned("MatMul, Add")), layer("MatMul, Add"))
    (found,) = outputs(written, {"x": x})
    bias = layer("MatMul, Add").graph.initializers["c"].const_value
    assert bias is not None
    np.testing.assert_array_equal(found[1], np.broadcast_to(bias.numpy(), found[1].shape))


def test_scales_of_rows_are_no_factor_of_a_product_of_scales() -> None:
    """ONNX Runtime would fuse that into a kernel that takes the first of them for all rows."""
    written = inserted(InsertPerToken(planned("MatMul")), layer("MatMul"))
    *_, cast, by_rows, by_columns = written.graph
    assert [node.op_type for node in (cast, by_rows, by_columns)] == ["Cast", "Mul", "Mul"]
    assert by_rows.inputs[0] is cast.outputs[0]
    scale = by_rows.inputs[1]
    assert scale is not None
    producer = scale.producer()
    assert producer is not None
    assert producer.op_type == "Max"


def test_readers_share_one_quantization() -> None:
    model = model_of(
        "g (float[5,16] x, float[16,8] w, float[16,8] v) => (float[5,8] y, float[5,8] z) "
        "{ [a] y = MatMul(x, w) [c] z = Gemm(x, v) }",
        weights="w v",
    )
    weights = tuple(weight_plan(model, n, f"{e}:1", Dtype.INT8, PerAxis(1)) for n, e in (("w", "a"), ("v", "c")))
    plan = quant_plan(dynamic_plan("x", "a:0 c:0", Dtype.INT8, Blocked(1, 16)), weights=weights)
    written = inserted(InsertPerToken(plan), model)
    assert operators(written).count("QuantizeLinear") == 1
    feeds = random_feeds(model)
    assert_outputs(written, feeds, outputs(with_rounded_weights(model, *weights), {"x": rounded_rows(feeds["x"])}))


def test_the_opset_is_that_of_reduce_max_with_axes() -> None:
    assert inserted(InsertPerToken(planned("MatMul")), layer("MatMul")).opset_imports[""] == 18


def test_a_float16_graph_stays_float16() -> None:
    model = model_of(
        "g (float16[5,16] x, float16[16,8] w) => (float16[5,8] y) { m = Relu(x) [n] y = MatMul(m, w) }",
        weights="w",
        opset=19,
    )
    InferShapes()(model)
    weight = weight_plan(model, "w", "n:1", Dtype.INT8, PerAxis(1))
    plan = quant_plan(dynamic_plan("m", "n:0", Dtype.INT8, Blocked(-1, 16)), weights=(weight,))
    feeds = random_feeds(model)
    x = rounded_rows(np.maximum(feeds["x"], 0).astype(np.float32)).astype(np.float16)
    written = inserted(InsertPerToken(plan), model)
    assert_outputs(written, feeds, outputs(with_rounded_weights(model, weight), {"x": x}), rtol=3e-3)


REFUSED: dict[str, tuple[str, Dtype, Granularity, str]] = {
    "uint8": ("MatMul", Dtype.UINT8, Blocked(-1, 16), "per-token scales are for int8"),
    "one scale": ("MatMul", Dtype.INT8, PerTensor(), "format dynamic"),
    "blocks inside a row": ("MatMul", Dtype.INT8, Blocked(-1, 8), "use block_size 16"),
    "columns": ("MatMul", Dtype.INT8, Blocked(-2, 16), "do not run along the axis that is kept"),
    "convolution": ("Conv 2-D", Dtype.INT8, Blocked(-1, 16), "its input has more than one scale"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_integer_operators_do_not_take(name: str) -> None:
    case, dtype, kind, message = REFUSED[name]
    weight = weight_plan(layer(case), "w", LAYERS[case].weight, Dtype.INT8, PerAxis(LAYERS[case].axis))
    with pytest.raises(TargetError, match=message) as caught:
        InsertPerToken(quant_plan(dynamic_plan("x", LAYERS[case].data, dtype, kind), weights=(weight,)))(layer(case))
    assert "\n" not in str(caught.value)


def test_refuses_an_activation_of_unknown_rank() -> None:
    model: ir.Model = model_of(
        "g (float[5,16] x, float[16,8] w) => (float[5,8] y) { m = Relu(x) [n] y = MatMul(m, w) }", weights="w"
    )
    weight = weight_plan(model, "w", "n:1", Dtype.INT8, PerAxis(1))
    plan = quant_plan(dynamic_plan("m", "n:0", Dtype.INT8, Blocked(-1, 16)), weights=(weight,))
    with pytest.raises(TargetError, match="its rank is not known; infer shapes"):
        InsertPerToken(plan)(model)
