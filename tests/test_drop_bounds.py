"""Bounds go where the grid of every reader ends before them, and nothing that a reader could tell changes."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qonnx.passes.drop_bounds import DropBounds
from qonnx.passes.infer_shapes import InferShapes
from tests.graphs import model_of
from tests.helpers import apply, leave_alone, operators, run


def graph(body: str, dtype: str = "int8", zero: int = 0, opset: int = 21, more: str = "") -> ir.Model:
    """What `body` makes of x, as r, quantized in steps of 1/16: to 127/16 at most, or 255/16."""
    model = model_of(
        f"g (float[4,6] x) => (float[4,6] y{more})"
        "<float scale = {0.0625}, float wide = {0.125}, float none = {0}, float six = {6}, float eight = {8},"
        f" float sixteen = {{16}}, float low = {{-8}}, float[6] mixed = {{8, 8, 9, 8, 6, 8}},"
        f" float[6] high = {{8, 8, 9, 8, 16, 8}}, {dtype} zero = {{{zero}}}>"
        f"{{ {body} q = QuantizeLinear(r, scale, zero) y = DequantizeLinear(q, scale, zero) }}",
        opset=opset,
    )
    InferShapes()(model)
    return model


QDQ = ["QuantizeLinear", "DequantizeLinear"]
# body -> the operators in front of the quantization afterwards
DROPPED = {
    "upper bound of a relu": ("r = Clip(x, none, eight)", ["Relu"]),
    "upper bound alone": ("r = Clip(x, , eight)", []),
    "upper bound, another lower one": ("r = Clip(x, six, eight)", ["Clip"]),
    "both": ("r = Clip(x, low, eight)", []),
    "lower bound": ("r = Clip(x, low, six)", ["Clip"]),
    "minimum": ("r = Min(x, eight)", []),
    "minimum that comes first": ("r = Min(eight, x)", []),
    "minimum per channel": ("c = Relu(x) r = Min(c, high)", ["Relu"]),
    "maximum": ("r = Max(x, low)", []),
    "one behind the other": ("c = Max(x, low) r = Clip(c, none, eight)", ["Max", "Relu"]),
    "two that both go": ("c = Max(x, low) r = Min(c, eight)", []),
}


@pytest.mark.parametrize("case", DROPPED)
@pytest.mark.parametrize("opset", [13, 21])
def test_bounds_beyond_the_grid_go(case: str, opset: int) -> None:
    body, expected = DROPPED[case]
    feeds = {"x": np.random.default_rng(0).uniform(-20, 20, (4, 6)).astype(np.float32)}
    assert apply(DropBounds(), graph(body, opset=opset), feeds, rtol=0) == expected + QDQ


def test_an_unsigned_grid_makes_the_relu_too() -> None:
    feeds = {"x": np.random.default_rng(0).uniform(-20, 20, (4, 6)).astype(np.float32)}
    assert apply(DropBounds(), graph("r = Clip(x, none, sixteen)", "uint8"), feeds, rtol=0) == QDQ
    assert apply(DropBounds(), graph("r = Clip(x, low, eight)", "uint8", 128), feeds, rtol=0) == QDQ


OTHER = ", float[4,6] z"
LEAVES_ALONE = {
    "a bound within the grid": (graph, "r = Clip(x, none, six)", ""),
    "a lower bound within the grid": (graph, "r = Max(x, none)", ""),
    "one channel within the grid": (graph, "r = Min(x, mixed)", ""),
    "an output": (graph, "r = Clip(x, none, eight)", ", float[4,6] r"),
    "another reader": (graph, "r = Clip(x, none, eight) z = Exp(r)", OTHER),
    "a wider grid": (
        graph,
        "r = Clip(x, none, eight) p = QuantizeLinear(r, wide, zero) z = DequantizeLinear(p, wide, zero)",
        OTHER,
    ),
    "a bound that is computed": (graph, "e = Abs(eight) r = Min(x, x)", ""),
    "a minimum of three": (graph, "r = Min(x, eight, sixteen)", ""),
    "a relu": (graph, "r = Relu(x)", ""),
    "an operator of another domain": (graph, "r = com.example.Min(x, eight)", ""),
    "more rows than before": (graph, "s = ReduceMax(x) r = Min(s, high)", ""),
}


@pytest.mark.parametrize("case", LEAVES_ALONE)
def test_what_could_tell_is_left_alone(case: str) -> None:
    make, body, more = LEAVES_ALONE[case]
    leave_alone(DropBounds(), make(body, more=more))


@pytest.mark.parametrize(
    ("zero", "scale", "attribute"),
    [
        ("int8[6] zero", "float[6] scale = {1, 1, 1, 1, 1, 1}", "<axis = 1>"),
        ("float8e4m3fn zero", "float scale = {1}", ""),
    ],
)
def test_grids_of_several_scales_and_of_floats(zero: str, scale: str, attribute: str) -> None:
    text = (
        f"g (float[4,6] x, {zero}) => (float[4,6] y) <{scale}, float bound = {{800}}> {{ r = Min(x, bound)"
        f"  q = QuantizeLinear {attribute} (r, scale, zero) y = DequantizeLinear {attribute} (q, scale, zero) }}"
    )
    leave_alone(DropBounds(), model_of(text, weights="zero"))


@settings(max_examples=50, deadline=None)
@given(st.floats(-9, 9), st.floats(0, 9), st.sampled_from(["int8", "uint8"]), st.integers(0, 10**6))
def test_the_codes_stay(lower: float, width: float, dtype: str, seed: int) -> None:
    model = graph("r = Clip(x, six, eight)", dtype)
    for name, value in (("six", lower), ("eight", lower + width)):
        model.graph.initializers[name].const_value = ir.tensor(np.float32(value), name=name)
    feeds = {"x": np.random.default_rng(seed).uniform(-20, 20, (4, 6)).astype(np.float32)}
    before = run(model, feeds)["y"]
    DropBounds()(model)
    assert len(operators(model)) in (2, 3)
    np.testing.assert_array_equal(run(model, feeds)["y"], before)
