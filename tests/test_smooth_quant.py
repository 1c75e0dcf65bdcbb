"""SmoothQuant: the factors of the paper up to a common one; `auto` takes the alpha with the best results."""

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qonnx.errors import RecipeError
from qonnx.group_error import GroupError, Quantizers, Ranges, measure
from qonnx.groups import SmoothGroup, find_groups
from qonnx.passes.smooth_quant import Alpha, SmoothQuant, smoothing_factors
from qonnx.statistics import Statistics, from_batch
from tests.smoothing import prepared

Array = npt.NDArray[Any]
WEIGHTS = "g b w1 w2 w3"
NORM = (
    "g (float[N,8] x, float[8] g, float[8] b, float[8,16] w1, float[8,6] w2) => (float[N,16] y, float[N,6] z)"
    "{ n = LayerNormalization(x, g, b) y = MatMul(n, w1) z = MatMul(n, w2) }"
)


def one_group(text: str = NORM, opset: int = 21) -> SmoothGroup:
    (group,) = [group for group in find_groups(prepared(text, WEIGHTS, opset)) if not group.reason]
    return group


def outliers(tokens: int = 200, channels: int = 8, seed: int = 0) -> Array:
    """Activations with two channels that are wide, one of them off centre."""
    x = np.random.default_rng(seed).standard_normal((tokens, channels))
    x[:, 1] *= 40
    x[:, 4] = 25 + 3 * x[:, 4]
    return x.astype(np.float32)


def observed(name: str, x: Array) -> Statistics:
    """What a calibration run says of a tensor whose channels are last."""
    rows = x.reshape(-1, x.shape[-1])
    tensor = from_batch(
        count=x.size,
        minimum=float(x.min()),
        maximum=float(x.max()),
        sum_squares=float(np.square(x).sum()),
        channel_axis=x.ndim - 1,
        channel_minimum=rows.min(axis=0),
        channel_maximum=rows.max(axis=0),
    )
    return Statistics({name: tensor}, batches=1, samples=len(x))


def reference(x: Array, weights: list[Array], alpha: float) -> Array:
    """The official implementation: maxima over tokens, over layers and their outputs, both clamped at 1e-5."""
    act = np.abs(x).max(axis=0)
    weight = np.clip(np.stack([np.abs(w).max(axis=1) for w in weights]).max(axis=0), 1e-5, None)
    return np.asarray(np.clip(act**alpha / weight ** (1 - alpha), 1e-5, None))


def stored(group: SmoothGroup) -> list[Array]:
    tensors = [consumer.linear.weight.const_value for consumer in group.consumers]
    return [tensor.numpy().astype(np.float64) for tensor in tensors if tensor is not None]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_factors_are_those_of_the_paper(seed: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    x, weights = rng.standard_normal((20, 8)), [rng.standard_normal((8, 5)), rng.standard_normal((8, 3))]
    expected = reference(x, weights, alpha)
    weight = np.maximum(np.abs(weights[0]).max(axis=1), np.abs(weights[1]).max(axis=1))
    found = smoothing_factors(np.abs(x).max(axis=0), weight, alpha)
    np.testing.assert_allclose(found / found[0], expected / expected[0], rtol=1e-9)
    np.testing.assert_allclose(np.log(found).mean(), 0, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 1e30), min_size=1, max_size=6),
    st.lists(st.floats(0, 1e30), min_size=6, max_size=6),
    st.floats(0, 1),
)
def test_factors_stay_within_bounds(reach: list[float], weight: list[float], alpha: float) -> None:
    found = smoothing_factors(np.array(reach), np.array(weight[: len(reach)]), alpha)
    assert np.isfinite(found).all()
    assert found.min() >= 1e-3
    assert found.max() <= 1e3


def test_alpha_says_what_becomes_equal() -> None:
    reach, weight = np.array([1.0, 8.0, 0.5]), np.array([2.0, 0.1, 3.0])
    np.testing.assert_allclose(np.ptp(reach / smoothing_factors(reach, weight, 1.0)), 0, atol=1e-12)
    np.testing.assert_allclose(np.ptp(weight * smoothing_factors(reach, weight, 0.0)), 0, atol=1e-12)


def test_a_given_alpha_uses_all_layers() -> None:
    group, x = one_group(), outliers()
    ranges = measure(group, observed("n", x))
    choice = SmoothQuant(0.7).choose(group, ranges, GroupError(group, ranges, {}, Quantizers()), {})
    assert choice is not None
    expected = reference(x.astype(np.float64), stored(group), 0.7)
    np.testing.assert_allclose(choice.scale / choice.scale[0], expected / expected[0], rtol=1e-6)
    assert not choice.shift.any()
    assert (choice.parameter, choice.method) == (0.7, "SmoothQuant, alpha 0.7")


def quantized_error(x: Array, weights: list[Array], scale: Array, shift: Array) -> float:
    """The noise-to-signal ratio of int8 layers, spelled out: one scale for x, one for each column of a weight."""
    ratios = []
    for w in weights:
        smooth, weight = (x - shift) / scale, w * scale[:, None]
        step, columns = np.abs(smooth).max() / 127, np.abs(weight).max(axis=0) / 127
        y = (np.rint(smooth / step) * step) @ (np.rint(weight / columns) * columns) + shift @ w
        noise, signal = y - x @ w, x @ w
        ratios.append(np.square(noise - noise.mean(0)).sum() / np.square(signal - signal.mean(0)).sum())
    return float(np.mean(ratios))


@pytest.mark.parametrize("seed", range(5))
def test_the_error_is_that_of_integer_layers(seed: int) -> None:
    group, x, rng = one_group(), outliers(seed=seed), np.random.default_rng(seed)
    ranges = measure(group, observed("n", x))
    error = GroupError(group, ranges, {"n": x}, Quantizers())
    for _ in range(3):
        scale, shift = np.exp(rng.standard_normal(8)), rng.standard_normal(8)
        expected = quantized_error(x.astype(np.float64), stored(group), scale, shift)
        assert error(scale, shift) == pytest.approx(expected, rel=0.02)


def test_auto_takes_the_best_of_the_grid() -> None:
    group, x = one_group(), outliers()
    ranges = measure(group, observed("n", x))
    error = GroupError(group, ranges, {"n": x}, Quantizers())
    choice = SmoothQuant(Alpha.AUTO).choose(group, ranges, error, {"n": x})
    assert choice is not None
    found = error(choice.scale, choice.shift)
    grid = {}
    for alpha in np.linspace(0, 1, 11):
        grid[alpha] = error(smoothing_factors(ranges.reach, ranges.weight, alpha), np.zeros(8))
    assert found <= min(grid.values())
    assert abs(choice.parameter - min(grid, key=lambda alpha: grid[alpha])) <= 0.0501
    assert found < error(np.ones(8), np.zeros(8)) / 5


@pytest.mark.parametrize("method", [SmoothQuant(Alpha.AUTO)])
def test_auto_needs_samples(method: SmoothQuant) -> None:
    group = one_group()
    ranges = measure(group, observed("n", outliers()))
    assert method.choose(group, ranges, GroupError(group, ranges, {}, Quantizers()), {}) is None


def test_groups_that_take_no_factors() -> None:
    text = (
        "g (float[2,3,6] x, float[5,3,1] w1, float[4,5,3] w2) => (float[2,4,4] y) <float one = {1}>"
        "{ c = Conv(x, w1) d = Clip(c, , one) y = Conv(d, w2) }"
    )
    group = one_group(text)
    ranges = Ranges(np.zeros(5), np.ones(5), np.ones(5))
    assert SmoothQuant(0.5).choose(group, ranges, GroupError(group, ranges, {}, Quantizers()), {}) is None


def test_channels_that_are_not_free_keep_their_size() -> None:
    text = (
        "g (float[N,8] x, float[8] g, float[8] b, float[8,16] w1) => (float[N,16] y, float[N,3] z)"
        "<int64[3] three = {1, 2, 5}>"
        "{ n = LayerNormalization(x, g, b) y = MatMul(n, w1) t = Gather <axis = 1> (n, three) z = Exp(t) }"
    )
    group = one_group(text)
    ranges = measure(group, observed("n", outliers()))
    choice = SmoothQuant(0.5).choose(group, ranges, GroupError(group, ranges, {}, Quantizers()), {})
    assert choice is not None
    assert (choice.scale == 1).tolist() == [False, True, True, False, False, True, False, False]


def test_recipe_values() -> None:
    assert msgspec.convert({"alpha": "auto"}, SmoothQuant) == SmoothQuant()
    assert msgspec.convert({"alpha": 0.8}, SmoothQuant) == SmoothQuant(0.8)
    for wrong in (-0.1, 1.5):
        with pytest.raises(RecipeError, match="alpha must be between 0 and 1"):
            SmoothQuant(wrong)
