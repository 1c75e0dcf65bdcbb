"""Factors and offsets pass Relu, Clip and Pad: bounds and what is filled in move along, per channel where they must."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qonnx.errors import ModelError
from qonnx.graph import constant
from qonnx.groups import SmoothGroup, find_groups
from qonnx.passes.rescale_channels import RescaleChannels, Rescaling
from tests.helpers import assert_same_function, operators, random_feeds
from tests.smoothing import prepared

WEIGHTS = "w1 w2 b1 b2"
C = 4
SCALE = np.array([0.5, 1.0, 2.0, 3.0])
SHIFT = np.array([0.3, -0.2, 0.1, 0.4])
EVEN = np.full(C, 0.3)
ONE = np.ones(C)


def graph(body: str, constants: str = "", w2: str = "5,4,1,1", dtype: str = "float") -> ir.Model:
    text = (
        f"g ({dtype}[N,3,6,6] x, {dtype}[4,3,1,1] w1, {dtype}[4] b1, {dtype}[{w2}] w2, {dtype}[5] b2)"
        f"=> ({dtype}[N,K,H,W] y) <float zero = {{0}}, float low = {{-0.4}}, float high = {{0.6}}{constants}>"
        f"{{ c = Conv(x, w1, b1) {body} }}"
    )
    return prepared(text, WEIGHTS)


def rescale(model: ir.Model, scale: np.ndarray, shift: np.ndarray, rtol: float = 1e-5) -> list[str]:
    """Changes the group behind the first convolution, and checks that the model computes what it did."""
    before = model.clone()
    RescaleChannels((Rescaling(first(model), scale, shift),))(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert_same_function(before, model, random_feeds(before), rtol)
    return operators(model)[1:-1]


def first(model: ir.Model) -> SmoothGroup:
    return next(group for group in find_groups(model, pad=True, bounds=True) if group.value == "c")


# body, factors, offsets -> the operators between the convolutions afterwards
MOVED: dict[str, tuple[str, np.ndarray, np.ndarray, list[str]]] = {
    "relu, factors": ("r = Relu(c) y = Conv(r, w2, b2)", SCALE, 0 * ONE, ["Relu"]),
    "relu, one offset": ("r = Relu(c) y = Conv(r, w2, b2)", ONE, EVEN, ["Clip"]),
    "relu, factors and offsets alike": ("r = Relu(c) y = Conv(r, w2, b2)", SCALE, 0.3 * SCALE, ["Clip"]),
    "relu, an offset a channel": ("r = Relu(c) y = Conv(r, w2, b2)", ONE, SHIFT, ["Max"]),
    "clip, one offset": ("r = Clip(c, low, high) y = Conv(r, w2, b2)", ONE, EVEN, ["Clip"]),
    "clip, factors": ("r = Clip(c, low, high) y = Conv(r, w2, b2)", SCALE, 0 * ONE, ["Max", "Min"]),
    "clip from 0, factors": ("r = Clip(c, zero, high) y = Conv(r, w2, b2)", SCALE, 0 * ONE, ["Relu", "Min"]),
    "clip from 0, both": ("r = Clip(c, zero, high) y = Conv(r, w2, b2)", SCALE, 0.3 * SCALE, ["Clip", "Min"]),
    "clip without lower bound": ("r = Clip(c, , high) y = Conv(r, w2, b2)", SCALE, SHIFT, ["Min"]),
    "clip without bounds": ("r = Clip(c) y = Conv(r, w2, b2)", SCALE, SHIFT, ["Clip"]),
    "clip at zero only": ("r = Clip(c, zero) y = Conv(r, w2, b2)", SCALE, 0 * ONE, ["Clip"]),
    "clip whose upper bound stays alike": (
        "r = Clip(c, low, zero) y = Conv(r, w2, b2)",
        SCALE,
        -0.1 * SCALE,
        ["Clip", "Max"],
    ),
    "pad": ("p = Pad(c, pads) y = Conv(p, w2, b2)", ONE, EVEN, ["Pad"]),
    "pad, both": ("p = Pad(c, pads) y = Conv(p, w2, b2)", SCALE, 0.3 * SCALE, ["Pad"]),
    "pad with a number": ("p = Pad(c, pads, high) y = Conv(p, w2, b2)", ONE, EVEN, ["Pad"]),
    "pad with a mirror image": ('p = Pad <mode = "reflect"> (c, pads) y = Conv(p, w2, b2)', SCALE, SHIFT, ["Pad"]),
    "pad behind relu": ("r = Relu(c) p = Pad(r, pads) y = Conv(p, w2, b2)", ONE, EVEN, ["Clip", "Pad"]),
    "pooled with padding": (
        "r = Relu(c) p = MaxPool <kernel_shape = [2, 2], pads = [1, 1, 0, 0]> (r) y = Conv(p, w2, b2)",
        ONE,
        EVEN,
        ["Clip", "MaxPool"],
    ),
}


@pytest.mark.parametrize("case", MOVED)
def test_bounds_move_along(case: str) -> None:
    body, scale, shift, expected = MOVED[case]
    model = graph(body, ", int64[8] pads = {0, 0, 1, 0, 0, 0, 2, 1}")
    assert rescale(model, scale, shift) == expected
    assert model.graph.outputs[0].name == "y"


PADDING = [
    ("", "5,4,3,3", "pads = [1, 1, 1, 1]", [1, 1, 1, 1]),
    ("", "5,4,3,3", "pads = [0, 1, 2, 0], strides = [2, 2]", [0, 1, 2, 0]),
    ("r = Relu(c)", "4,1,3,3", "pads = [2, 2, 2, 2], dilations = [2, 2], group = 4", [2, 2, 2, 2]),
    ("r = Clip(c, zero, high)", "4,1,3,3", "pads = [1, 1, 1, 1], group = 4", [1, 1, 1, 1]),
]


@pytest.mark.parametrize(("before", "w2", "attributes", "widths"), PADDING)
def test_a_convolution_that_pads_gets_a_pad(before: str, w2: str, attributes: str, widths: list[int]) -> None:
    source = "r" if before else "c"
    model = graph(f"{before} y = Conv <{attributes}> ({source}, w2)", w2=w2)
    assert rescale(model, SCALE, 0.3 * SCALE)[-1] == "Pad"
    pad, conv = list(model.graph)[-2:]
    assert "pads" not in conv.attributes
    given = constant(pad.inputs[1])
    assert given is not None
    assert given.tolist() == [0, 0, *widths[:2], 0, 0, *widths[2:]]
    number = constant(pad.inputs[2])
    assert number is not None
    np.testing.assert_allclose(number, -0.3, rtol=1e-6)
    assert pad.metadata_props["qonnx.pass"] == "RescaleChannels"
    shape = pad.outputs[0].shape
    assert shape is not None
    assert list(shape)[1:] == [4, 6 + widths[0] + widths[2], 6 + widths[1] + widths[3]]


def test_factors_alone_need_no_pad() -> None:
    model = graph("r = Relu(c) y = Conv <pads = [1, 1, 1, 1]> (r, w2)", w2="5,4,3,3")
    assert rescale(model, SCALE, 0 * ONE) == ["Relu"]
    assert any(model.graph[-1].attributes.get_ints("pads", []))


def test_half_precision() -> None:
    bounds = "l = Cast <to = 10> (low) h = Cast <to = 10> (high)"
    model = graph(f"{bounds} r = Clip(c, l, h) y = Conv <pads = [1, 1, 1, 1]> (r, w2)", w2="5,4,3,3", dtype="float16")
    assert rescale(model, SCALE, 0.3 * SCALE, rtol=5e-3) == ["Max", "Min", "Pad"]


def test_bounds_of_some_of_the_channels() -> None:
    """Channels of another producer are put beside those of the group: their bound stays."""
    text = (
        "g (float[N,3,6] x, float[4,3,1] w1, float[2,3,1] w3, float[5,6,1] w2) => (float[N,5,6] y) <float high = {0.5}>"
        "{ c = Conv(x, w1) d = Conv(x, w3) e = Sigmoid(d) k = Concat <axis = 1> (c, e) r = Clip(k, , high)"
        "  y = Conv(r, w2) }"
    )
    model = prepared(text, "w1 w2 w3")
    before = model.clone()
    RescaleChannels((Rescaling(first(model), SCALE, SHIFT),))(model)
    assert_same_function(before, model)
    assert operators(model)[-2:] == ["Min", "Conv"]


LEAVES_ALONE: dict[str, tuple[str, bool, str, str]] = {
    "no pad allowed": ("y = Conv <pads = [1, 1, 1, 1]> (c, w2)", False, "pads with zeros", "no_shift"),
    "no bounds allowed": ("r = Clip(c, low) y = Conv(r, w2)", False, "has one bound for all channels", "no_scale"),
    "automatic padding": (
        'y = Conv <auto_pad = "SAME_UPPER"> (c, w2)',
        True,
        "pads with zeros",
        "no_shift",
    ),
    "a number for all channels": (
        "p = Pad(c, pads, high) y = Conv(p, w2)",
        True,
        "pads with one number for all channels",
        "no_scale",
    ),
}


@pytest.mark.parametrize("case", LEAVES_ALONE)
def test_what_is_not_possible_says_why(case: str) -> None:
    body, allowed, reason, field = LEAVES_ALONE[case]
    model = graph(body, ", int64[8] pads = {0, 0, 1, 0, 0, 0, 2, 1}", w2="5,4,3,3")
    (group,) = (group for group in find_groups(model, pad=allowed, bounds=allowed) if group.value == "c")
    assert getattr(group, field).endswith(reason)


@pytest.mark.parametrize("body", ["p = Pad(c, pads) y = Conv(p, w2)", "y = Conv <pads = [1, 1, 1, 1]> (c, w2)"])
def test_padding_takes_one_number(body: str) -> None:
    model = graph(body, ", int64[8] pads = {0, 0, 1, 0, 0, 0, 2, 1}", w2="5,4,3,3")
    text = ir.to_onnx_text(model)
    with pytest.raises(ModelError, match="pads all channels with one number; use one offset"):
        RescaleChannels((Rescaling(first(model), ONE, SHIFT),))(model)
    assert ir.to_onnx_text(model) == text


def test_bounds_that_are_computed() -> None:
    text = (
        "g (float[2,3,6] x, float f, float[5,3,1] w1, float[4,5,3] w2) => (float[2,4,4] y)"
        "{ c = Conv(x, w1) d = Clip(c, , f) y = Conv(d, w2) }"
    )
    group = find_groups(prepared(text, WEIGHTS), pad=True, bounds=True)[-1]
    assert group.no_scale.endswith("has bounds that are not constant")
    assert group.no_shift.endswith("has bounds that are not constant")


def test_a_filler_that_is_computed() -> None:
    model = graph(
        "f = ReduceMax <keepdims = 0> (x) p = Pad(c, pads, f) y = Conv(p, w2)", ", int64[8] pads = {0,0,1,0,0,0,2,1}"
    )
    assert all(group.value != "c" for group in find_groups(model, pad=True, bounds=True))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(0.1, 10), min_size=C, max_size=C),
    st.floats(-2, 2),
    st.sampled_from(["r = Relu(c)", "r = Clip(c, low, high)", "r = Clip(c, zero, high)", "r = Clip(c, , high)"]),
    st.booleans(),
)
def test_the_function_stays(factors: list[float], offset: float, body: str, padded: bool) -> None:
    attributes = "<pads = [1, 1, 1, 1]>" if padded else ""
    model = graph(f"{body} y = Conv {attributes} (r, w2, b2)", w2="5,4,3,3")
    scale = np.array(factors)
    before = model.clone()
    RescaleChannels((Rescaling(first(model), scale, offset * scale),))(model)
    assert_same_function(before, model, random_feeds(before), rtol=2e-5)
