"""Outlier Suppression+: centres and factors of the paper, and the threshold with the least error."""

import msgspec
import numpy as np
import pytest

from qonnx.errors import RecipeError
from qonnx.group_error import GroupError, Quantizers, measure
from qonnx.passes.outlier_suppression import OutlierSuppression, suppressing_factors
from tests.test_smooth_quant import Array, observed, one_group, outliers, quantized_error, stored


def reference(x: Array, weights: list[Array]) -> tuple[float, Array, Array]:
    """The official grid search: thresholds from the largest magnitude down, the least error of the results wins."""
    shift = (x.max(axis=0) + x.min(axis=0)) / 2
    reach = np.abs(x - shift).max(axis=0)
    found = []
    for threshold in np.linspace(reach.max(), reach.max() / 50, 200):
        scale = np.maximum(1.0, reach / threshold)
        found.append((quantized_error(x, weights, scale, shift), threshold, scale))
    error, _, scale = min(found, key=lambda entry: entry[0])
    return error, scale, shift


@pytest.mark.parametrize("seed", range(4))
def test_as_good_as_the_official_search(seed: int) -> None:
    group, x = one_group(), outliers(seed=seed)
    ranges = measure(group, observed("n", x))
    error = GroupError(group, ranges, {"n": x}, Quantizers())
    choice = OutlierSuppression().choose(group, ranges, error, {"n": x})
    assert choice is not None
    expected, _, shift = reference(x.astype(np.float64), stored(group))
    if choice.shift.any():  # the search without an offset, which the paper does not make, may be better still
        np.testing.assert_allclose(choice.shift, shift, rtol=1e-6)
    assert quantized_error(x.astype(np.float64), stored(group), choice.scale, choice.shift) <= 1.05 * expected
    reach = np.abs(x - choice.shift).max(axis=0)
    np.testing.assert_allclose(choice.scale, np.maximum(1, reach / choice.parameter), rtol=1e-5)
    assert choice.method.endswith("after a shift") == bool(choice.shift.any())


def test_only_wide_channels_are_shrunk() -> None:
    np.testing.assert_array_equal(suppressing_factors(np.array([0.0, 1.0, 4.0, 8.0]), 4.0), [1, 1, 1, 2])


def test_factors_only_behind_an_rms_norm() -> None:
    text = (
        "g (float[N,8] x, float[8] g, float[8,16] w1) => (float[N,16] y)"
        "{ n = RMSNormalization(x, g) y = MatMul(n, w1) }"
    )
    group, x = one_group(text, opset=23), outliers()
    ranges = measure(group, observed("n", x))
    choice = OutlierSuppression().choose(group, ranges, GroupError(group, ranges, {"n": x}, Quantizers()), {"n": x})
    assert choice is not None
    assert not choice.shift.any()
    assert choice.scale[[1, 4]].min() > 2
    assert "shift" not in choice.method


def test_shift_can_be_left_out() -> None:
    group, x = one_group(), outliers()
    ranges = measure(group, observed("n", x))
    error = GroupError(group, ranges, {"n": x}, Quantizers())
    moved = OutlierSuppression().choose(group, ranges, error, {"n": x})
    fixed = OutlierSuppression(shift=False).choose(group, ranges, error, {"n": x})
    assert moved is not None
    assert fixed is not None
    assert moved.shift.any()
    assert not fixed.shift.any()


def test_no_shift_where_it_does_not_help() -> None:
    """Channels around 0 with one outlier: centred by the outlier, they would be wider than before."""
    x = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32)
    x[0] = 30.0
    group = one_group()
    ranges = measure(group, observed("n", x))
    error = GroupError(group, ranges, {"n": x}, Quantizers())
    choice = OutlierSuppression().choose(group, ranges, error, {"n": x})
    assert choice is not None
    assert error(choice.scale, choice.shift) <= error(np.ones(8), np.zeros(8))


def test_rare_extremes_do_not_move_the_centre() -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (1000, 8)).astype(np.float32)
    x += 5
    x[0] = 500
    group = one_group()
    ranges = measure(group, observed("n", x))
    error = GroupError(group, ranges, {"n": x}, Quantizers())
    plain = OutlierSuppression()._centre(group, ranges, {"n": x})
    clipped = OutlierSuppression(percentile=99.0)._centre(group, ranges, {"n": x})
    assert plain.min() > 200
    np.testing.assert_allclose(clipped, 5, atol=0.1)
    assert OutlierSuppression(percentile=99.0).choose(group, ranges, error, {"n": x}) is not None


def test_offsets_alone_where_no_factor_passes() -> None:
    """A Clip takes one offset for all channels, which this method does not look for."""
    text = (
        "g (float[2,3,6] x, float[5,3,1] w1, float[4,5,3] w2) => (float[2,4,4] y) <float one = {1}>"
        "{ c = Conv(x, w1) d = Clip(c, , one) y = Conv(d, w2) }"
    )
    group, x = one_group(text), np.random.default_rng(0).uniform(0, 1, (2, 6, 5)).astype(np.float32)
    ranges = measure(group, observed("d", x))
    error = GroupError(group, ranges, {"d": x.reshape(-1, 5)}, Quantizers())
    choice = OutlierSuppression().choose(group, ranges, error, {"d": x.reshape(-1, 5)})
    assert choice is not None
    assert (choice.scale == 1).all()
    assert not choice.shift.any()


def test_recipe_values() -> None:
    assert msgspec.convert({}, OutlierSuppression) == OutlierSuppression()
    for wrong in (50.0, 100.1):
        with pytest.raises(RecipeError, match="percentile must be above 50"):
            OutlierSuppression(percentile=wrong)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"percentil": 99}, OutlierSuppression)
