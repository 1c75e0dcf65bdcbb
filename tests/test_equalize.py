"""Equalization: both weights of a pair get the same ranges, in every channel, whatever lies between."""

import itertools

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qonnx.groups import SmoothGroup, find_groups
from qonnx.linear import linears
from qonnx.passes.equalize import channel_factors, cross_layer_factors, is_depthwise
from qonnx.passes.rescale_channels import RescaleChannels, Rescaling
from tests.helpers import assert_same_function
from tests.smoothing import prepared

Vector = npt.NDArray[np.float64]
WEIGHTS = "w1 w2 w3 b1 b2 slope g"


def widen(model: ir.Model, seed: int = 0) -> None:
    """Gives every output channel of every convolution another size."""
    rng = np.random.default_rng(seed)
    for linear in linears(model.graph):
        tensor = linear.weight.const_value
        assert tensor is not None
        array = tensor.numpy().copy()
        shape = [-1 if axis == linear.output_axis else 1 for axis in range(array.ndim)]
        factors = np.exp(2 * rng.standard_normal(array.shape[linear.output_axis])).reshape(shape)
        linear.weight.const_value = ir.tensor((array * factors).astype(array.dtype), name=linear.weight.name)


def equalized(model: ir.Model) -> list[SmoothGroup]:
    """Equalizes a model, checks that it computes what it did, and returns the groups that were scaled."""
    before = model.clone()
    groups = find_groups(model, bounds=True)
    scales = cross_layer_factors(groups)
    RescaleChannels(tuple(Rescaling(group, scale) for group, scale in zip(groups, scales, strict=True)))(model)
    assert_same_function(before, model, rtol=2e-5)
    return [group for group, scale in zip(groups, scales, strict=True) if (scale != 1).any()]


def reaches(model: ir.Model) -> list[tuple[Vector, Vector]]:
    """By layer: the largest weight of each output channel, and of each input channel."""
    found = []
    for linear in linears(model.graph):
        tensor = linear.weight.const_value
        assert tensor is not None
        weight = np.abs(tensor.numpy().astype(np.float64))
        if linear.groups > 1:  # depthwise
            rows = weight.reshape(weight.shape[0], -1).max(axis=1)
            found.append((rows, rows.reshape(linear.input_channels, -1).max(axis=1)))
            continue
        weight = np.moveaxis(weight, (linear.output_axis, linear.input_axis), (0, 1))
        weight = weight.reshape(*weight.shape[:2], -1).max(axis=2)
        found.append((weight.max(axis=1), weight.max(axis=0)))
    return found


PAIRS = {
    "relu between convolutions": (
        "g (float[2,3,6] x, float[5,3,1] w1, float[5] b1, float[4,5,3] w2) => (float[2,4,4] y)"
        "{ c = Conv(x, w1, b1) r = Relu(c) y = Conv(r, w2) }"
    ),
    "relu6": (
        "g (float[2,3,6] x, float[5,3,1] w1, float[5] b1, float[4,5,3] w2) => (float[2,4,4] y)"
        "<float zero = {0}, float six = {0.6}>"
        "{ c = Conv(x, w1, b1) r = Clip(c, zero, six) y = Conv <pads = [1, 1], strides = [2]> (r, w2) }"
    ),
    "gemm without an activation": (
        "g (float[N,8] x, float[8,6] w1, float[6] b1, float[4,6] w2) => (float[N,4] y)"
        "{ h = Gemm(x, w1, b1) y = Gemm <transB = 1> (h, w2) }"
    ),
    "prelu between products": (
        "g (float[N,8] x, float[8,6] w1, float[6] b1, float[6] slope, float[6,4] w2) => (float[N,4] y)"
        "{ h = MatMul(x, w1) a = Add(h, b1) p = PRelu(a, slope) y = MatMul(p, w2) }"
    ),
    "three layers, one of them depthwise": (
        "g (float[2,3,6] x, float[5,3,1] w1, float[5,1,3] w2, float[5] b1, float[4,5,1] w3) => (float[2,4,6] y)"
        "<float zero = {0}, float six = {6}>"
        "{ c = Conv(x, w1, b1) r = Clip(c, zero, six) d = Conv <group = 5, pads = [1, 1]> (r, w2) s = Relu(d)"
        "  y = Conv(s, w3) }"
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_both_weights_get_the_same_ranges(case: str) -> None:
    model = prepared(PAIRS[case], WEIGHTS)
    widen(model)
    wide = max(np.ptp(np.log(outputs)) for outputs, _ in reaches(model))
    assert wide > 2
    assert equalized(model)
    found = reaches(model)
    for (makes, _), (_, reads) in itertools.pairwise(found):
        np.testing.assert_allclose(makes, reads, rtol=0.02)


def test_one_pair_is_the_formula_of_the_paper() -> None:
    model = prepared(PAIRS["relu between convolutions"], WEIGHTS)
    widen(model)
    (makes, _), (_, reads) = reaches(model)
    (scale,) = (s for s in cross_layer_factors(find_groups(model)) if (s != 1).any())
    np.testing.assert_allclose(scale, np.sqrt(makes * reads) / reads, rtol=1e-6)


def test_all_readers_count() -> None:
    text = (
        "g (float[2,3,6] x, float[5,3,1] w1, float[4,5,3] w2, float[2,5,1] w3) => (float[2,4,4] y, float[2,2,6] z)"
        "{ c = Conv(x, w1) r = Relu(c) y = Conv(r, w2) z = Conv(r, w3) }"
    )
    model = prepared(text, WEIGHTS)
    widen(model)
    (group,) = equalized(model)
    assert len(group.consumers) == 2
    (makes, _), (_, first), (_, second) = reaches(model)
    np.testing.assert_allclose(makes, np.maximum(first, second), rtol=0.02)


@pytest.mark.parametrize("silent", ["w1", "w2"])
def test_channels_without_weights_keep_their_size(silent: str) -> None:
    model = prepared(PAIRS["relu between convolutions"], WEIGHTS)
    widen(model)
    stored = model.graph.initializers[silent]
    assert stored.const_value is not None
    array = stored.const_value.numpy().copy()
    array[(2,) if silent == "w1" else (slice(None), 2)] = 0
    stored.const_value = ir.tensor(array, name=silent)
    scale = next(s for s in cross_layer_factors(find_groups(model)) if (s != 1).any())
    assert scale[2] == 1
    assert np.isfinite(scale).all()


LEAVES_ALONE = {
    "a residual connection": (
        "g (float[N,4] x, float[4,4] w1, float[4,6] w2) => (float[N,4] s, float[N,6] y)"
        "{ h = MatMul(x, w1) s = Add(h, x) y = MatMul(h, w2) }"
    ),
    "a gelu": (
        "g (float[N,4] x, float[4,5] w1, float[5,6] w2) => (float[N,6] y)"
        "{ h = MatMul(x, w1) e = Gelu(h) y = MatMul(e, w2) }"
    ),
    "a norm, which has no weights": (
        "g (float[N,4] x, float[4] g, float[4] b1, float[4,6] w2) => (float[N,6] y)"
        "{ n = LayerNormalization(x, g, b1) y = MatMul(n, w2) }"
    ),
    "an output": (
        "g (float[N,4] x, float[4,5] w1, float[5,6] w2) => (float[N,6] y, float[N,5] h)"
        "{ h = MatMul(x, w1) y = MatMul(h, w2) }"
    ),
}


@pytest.mark.parametrize("case", LEAVES_ALONE)
def test_what_is_no_pair_is_left_alone(case: str) -> None:
    model = prepared(LEAVES_ALONE[case], WEIGHTS)
    assert all((scale == 1).all() for scale in cross_layer_factors(find_groups(model, bounds=True)))


def test_depthwise() -> None:
    text = (
        "g (float[2,4,6] x, float[4,1,3] w1, float[8,1,3] w2, float[4,2,3] w3)"
        "=> (float[2,4,4] y, float[2,8,4] z, float[2,4,4] u)"
        "{ y = Conv <group = 4> (x, w1) z = Conv <group = 4> (x, w2) u = Conv <group = 2> (x, w3) }"
    )
    assert [is_depthwise(linear) for linear in linears(prepared(text, WEIGHTS).graph)] == [True, True, False]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=8))
def test_channels_become_as_wide_as_the_widest(reach: list[float]) -> None:
    scale = channel_factors(np.array(reach))
    assert scale.min() >= 0.01
    assert scale.max() <= 1
    scaled = np.array(reach) / scale
    assert (scaled <= max(reach) * (1 + 1e-9)).all()
    wide = np.array(reach) >= 0.01 * max(reach)
    np.testing.assert_allclose(scaled[wide], max(reach), rtol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_the_function_stays(seed: int) -> None:
    model = prepared(PAIRS["three layers, one of them depthwise"], WEIGHTS)
    widen(model, seed)
    assert len(equalized(model)) == 2
