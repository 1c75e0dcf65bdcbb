"""The converted graph is valid, keeps its inputs and outputs, and computes the same within the digits of the type."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qonnx.engine import build_engine
from qonnx.engine.listing import int8_nodes
from qonnx.passes.convert_float import ConvertFloat
from qonnx.short_floats import Limits
from tests.graphs import model_of
from tests.helpers import operators, random_feeds, run
from tests.test_engine import DIMS, INT8, QUANTIZED, saved

HALF, BRAIN, FLOAT = ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT
TYPES = {HALF: "float16", BRAIN: "bfloat16"}


def converted(model: ir.Model, dtype: ir.DataType = HALF) -> ir.Model:
    """The model after the pass, valid and with the inputs and outputs that it had."""
    result = model.clone()
    assert ConvertFloat(dtype)(result).modified
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    for before, after in zip((*model.graph.inputs, *model.graph.outputs), _ends(result), strict=True):
        assert (before.name, before.dtype, before.shape) == (after.name, after.dtype, after.shape)
    again = result.clone()
    ConvertFloat(dtype)(again)
    assert operators(again) == operators(result)
    return result


def _ends(model: ir.Model) -> tuple[ir.Value, ...]:
    return (*model.graph.inputs, *model.graph.outputs)


def in_float32(model: ir.Model) -> list[str]:
    """The operators that compute floats in float32."""
    return [
        node.op_type
        for node in model.graph
        if node.op_type != "Cast" and any(value.dtype == FLOAT for value in node.outputs)
    ]


def error(model: ir.Model, dtype: ir.DataType = HALF, seed: int = 0) -> float:
    """Largest error of the converted model, relative to the largest output."""
    feeds = random_feeds(model, seed)
    expected, actual = run(model, feeds), run(converted(model, dtype), feeds)
    return max(
        float(np.abs(expected[name] - actual[name]).max() / max(np.abs(expected[name]).max(), 1e-30))
        for name in expected
    )


LINEAR = model_of(
    """net (float[N,16] x, float[16,32] w, float[32] b) => (float[N,32] y)
    { m = MatMul(x, w) a = Add(m, b) y = Relu(a) }""",
    weights="w b",
)
CONV = model_of(
    """net (float[2,3,8,8] x, float[8,3,3,3] w) => (float[2,8,8,8] y)
    { c = Conv<pads=[1,1,1,1]>(x, w) y = Sigmoid(c) }""",
    weights="w",
)


@pytest.mark.parametrize("model", [LINEAR, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize("dtype", TYPES)
def test_everything_else_becomes_short(model: ir.Model, dtype: ir.DataType) -> None:
    result = converted(model, dtype)
    assert in_float32(result) == []
    assert operators(result).count("Cast") == 2
    assert all(value.dtype == dtype for value in result.graph.initializers.values())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_half_precision_keeps_three_digits(seed: int) -> None:
    assert 0 < error(LINEAR, seed=seed) < 2e-3
    assert error(CONV, seed=seed) < 2e-3


def quantized(scales: str, codes: int = 100) -> ir.Model:
    weight = ", ".join([str(codes)] * 8)
    return model_of(
        f"""net (float[N,4] x) => (float[N,2] y)
        <float s = {{0.03}}, int8 z = {{0}}, int8[4,2] w = {{{weight}}}, float[2] ws = {{{scales}}}> {{
            q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)
            wd = DequantizeLinear<axis=1>(w, ws)  y = MatMul(d, wd) }}"""
    )


def weight_of(model: ir.Model) -> np.ndarray:
    node = next(node for node in model.graph if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer())  # type: ignore[union-attr]
    codes, scale = (value.const_value.numpy() for value in node.inputs[:2])  # type: ignore[union-attr]
    return codes.astype(np.float64) * scale.astype(np.float64)


@pytest.mark.parametrize("dtype", TYPES)
def test_scales_are_short_and_integers_stay(dtype: ir.DataType) -> None:
    result = converted(quantized("0.01, 0.5"), dtype)
    assert operators(result) == ["Cast", "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul", "Cast"]
    for node in result.graph:
        if "Linear" in node.op_type:
            assert node.inputs[1] is not None
            assert node.inputs[1].dtype == dtype
    assert {value.name for value in result.graph.initializers.values() if value.dtype == ir.DataType.INT8} == {"z", "w"}


def test_codes_make_up_for_scales_that_float16_does_not_have() -> None:
    # 3e-7 is 5 steps of 2**-24, 5.96e-8 each; 1e-9 would be 0.
    model = quantized("3e-7, 1e-9")
    before, after = weight_of(model), weight_of(converted(model))
    assert np.abs(before - after).max() <= 2.0**-24 * 5 / 2
    assert np.abs(before[:, 0] / after[:, 0] - 1).max() < 0.005
    assert after[0, 1] == 2.0**-24 * 2  # 1e-7, to the nearest code
    assert "w_int8" in converted(model).graph.initializers


SENSITIVE = {
    "a norm that is written out": (
        """net (float[N,64] x, float[64] g) => (float[N,64] y)
        <float two = {2.0}, float eps = {1e-12}, int64[1] last = {-1}> {
            mean = ReduceMean(x, last) c = Sub(x, mean) p = Pow(c, two) v = ReduceMean(p, last)
            e = Add(v, eps) s = Sqrt(e) n = Div(c, s) y = Mul(n, g) }""",
        {"ReduceMean", "Pow", "Add", "Sqrt", "Div"},
    ),
    "a norm by squares": (
        """net (float[N,64] x, float[64] g) => (float[N,64] y) <float eps = {1e-6}, int64[1] last = {-1}> {
            p = Mul(x, x) v = ReduceMean(p, last) e = Add(v, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, g) }""",
        {"Mul", "ReduceMean", "Add", "Sqrt", "Div"},
    ),
    "a length that is bounded below": (
        """net (float[N,64] x) => (float[N,64] y) <float eps = {1e-12}, int64[1] last = {-1}, int64[2] to = {1, 64}> {
            l = ReduceL2(x, last) b = Clip(l, eps) e = Expand(b, to) n = Div(x, e) y = Neg(n) }""",
        {"ReduceL2", "Clip", "Expand", "Div"},
    ),
}


@pytest.mark.parametrize("case", SENSITIVE)
@pytest.mark.parametrize("size", [1.0, 1000.0, 1e-6])
def test_sums_of_squares_keep_float32(case: str, size: float) -> None:
    text, kept = SENSITIVE[case]
    model = model_of(text, weights="g")
    result = converted(model)
    assert set(in_float32(result)) == kept
    feeds = {"x": (np.random.default_rng(0).standard_normal((3, 64)) * size).astype(np.float32)}
    expected, actual = run(model, feeds)["y"], run(result, feeds)["y"]
    np.testing.assert_allclose(actual, expected, atol=3e-2 if size < 1e-3 else 3e-3, rtol=3e-3)


def test_layer_norm_and_softmax_are_short() -> None:
    model = model_of(
        """net (float[N,64] x, float[64] g) => (float[N,64] y) { n = LayerNormalization(x, g) y = Softmax(n) }""",
        weights="g",
    )
    assert in_float32(converted(model)) == []
    assert error(model) < 2e-3


ROTARY = """net (float[1,T,8] x, int64[1,T] at, float[1,1,8] f) => (float[1,T,8] y) <int64[1] last = {2}> {
    p = Cast<to=1>(at) u = Unsqueeze(p, last) a = MatMul(u, f1) s = Sin(a) y = Mul(x, s) }"""


def test_positions_keep_their_digits() -> None:
    model = model_of(ROTARY.replace("float[1,1,8] f)", "float[1,8] f1)"), weights="f1")
    result = converted(model)
    assert set(in_float32(result)) == {"Unsqueeze", "MatMul", "Sin"}
    feeds = {"x": np.ones((1, 3, 8), np.float32), "at": np.array([[2049, 4099, 70001]])}
    np.testing.assert_allclose(run(result, feeds)["y"], run(model, feeds)["y"], atol=1e-3)


@pytest.mark.parametrize(
    "mask",
    [
        "m = Cast<to=1>(keep) i = Sub(one, m) bias = Mul(i, low)",
        "there = Cast<to=9>(keep) bias = Where(there, nothing, low)",
    ],
)
def test_a_row_that_is_masked_throughout_is_no_nan(mask: str) -> None:
    model = model_of(
        f"""net (float[N,8] x, int64[N,8] keep) => (float[N,8] y)
        <float one = {{1.0}}, float nothing = {{0.0}}, float low = {{-3.4028234663852886e38}}>
        {{ {mask} s = Add(x, bias) y = Softmax(s) }}"""
    )
    keep = np.array([[1, 1, 1, 0, 0, 0, 0, 0], [0] * 8])
    feeds = {"x": np.linspace(-50, 50, 16, dtype=np.float32).reshape(2, 8), "keep": keep}
    expected, actual = run(model, feeds)["y"], run(converted(model), feeds)["y"]
    np.testing.assert_allclose(actual[0], expected[0], atol=1e-2)
    assert np.isfinite(actual).all()
    # ONNX Runtime does not add numbers in bfloat16 on the CPU.
    for value in converted(model, BRAIN).graph.initializers.values():
        assert value.const_value is not None
        assert np.isfinite(value.const_value.numpy().astype(np.float32)).all()


KEPT = {
    "a constant beyond the range": "net (float[N,4] x) => (float[N,4] y) <float big = {1e6}> { y = Mul(x, big) }",
    "another domain": "net (float[N,4] x) => (float[N,4] y) { a = Relu(x) y = com.example.Wobble(a) }",
    "an int32 bias": """net (float[N,4] x) => (float[N,4] y) <int32[4] b = {1, 2, 3, 4}, float s = {1e-6}>
        { d = DequantizeLinear(b, s) y = Add(x, d) }""",
}


@pytest.mark.parametrize(("case", "kept"), [*zip(KEPT, ("Mul", "Wobble", "DequantizeLinear"), strict=True)])
def test_what_else_keeps_float32(case: str, kept: str) -> None:
    model = model_of(KEPT[case])
    result = model.clone()
    ConvertFloat()(result)
    assert in_float32(result) == [kept]


def test_an_operator_that_lacks_the_type_keeps_float32() -> None:
    model = model_of("net (float[1,1,4,4] x) => (float[1,1,4,4] y) { a = Relu(x) b = Det(a) y = Mul(b, a) }")
    model.graph[1].op_type = "Relu"
    assert in_float32(converted(model)) == []
    resized = model_of(
        """net (float[1,1,4,4] x) => (float[1,1,8,8] y) <float[4] scales = {1, 1, 2, 2}>
        { a = Relu(x) y = Resize<mode="nearest">(a, , scales) }"""
    )
    result = converted(resized)
    assert in_float32(result) == []
    assert result.graph.initializers["scales"].dtype == FLOAT  # by definition


def test_bodies_read_float32() -> None:
    body = "b () => (float[N,4] out) { t = Mul(a, a) out = Add(t, a) }"
    other = "b () => (float[N,4] out) { out = Identity(a) }"
    model = model_of(
        f"""net (float[N,4] x, bool c) => (float[N,4] y)
        {{ a = Relu(x) i = If<then_branch = {body}, else_branch = {other}>(c) y = Relu(i) }}"""
    )
    result = converted(model)
    assert in_float32(result) == ["If"]
    feeds = {"x": np.ones((2, 4), np.float32), "c": np.array(True)}
    np.testing.assert_array_equal(run(result, feeds)["y"], 2)


def test_a_graph_without_floats_is_left_alone() -> None:
    model = model_of("net (int64[N] x) => (int64[N] y) { y = Neg(x) }")
    before = ir.to_onnx_text(model)
    assert not ConvertFloat()(model).modified
    assert ir.to_onnx_text(model) == before


def test_limits() -> None:
    assert Limits.of(HALF) == (np.float32(65504), np.float32(2.0**-24))
    assert Limits.of(BRAIN).largest < np.finfo(np.float32).max


@pytest.mark.rtx
@pytest.mark.parametrize("float_type", ["fp16", "bf16"])
def test_integers_stay_integers_in_the_engine(float_type: str, tmp_path: Path) -> None:
    report = build_engine(
        saved(QUANTIZED, tmp_path / "net.onnx"), tmp_path / "net.plan", dims=DIMS, float_type=float_type
    )
    assert [answer.node for answer in int8_nodes(report.layers, INT8) if not answer.int8] == []
    wanted = HALF if float_type == "fp16" else BRAIN
    assert any(wanted in layer.outputs for layer in report.layers)


def test_constants_as_nodes_and_an_old_opset() -> None:
    text = """net (float[N,4] x) => (float[N,2,2] y) {
        s = Constant<value_float = 0.03>() z = Constant<value = int8 {0}>() to = Constant<value_ints = [0, 2, 2]>()
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) r = Reshape(d, to) y = Softmax(r) }"""
    result = converted(model_of(text, opset=13))
    assert operators(result) == ["Cast", "QuantizeLinear", "DequantizeLinear", "Reshape", "Softmax", "Cast"]
    assert result.opset_imports[""] == 19
    assert in_float32(result) == []
