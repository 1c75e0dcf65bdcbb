"""Rounding with error feedback, against the equations of the paper: column by column, in double precision."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qonnx.errors import DataError
from qonnx.gptq import factor, round_with_feedback
from qonnx.numerics import Array, Blocked, Dtype, dequantize, fake_quantize
from qonnx.recipe import Clip
from qonnx.weight_scales import weight_scales


def inputs(rows: int, width: int, seed: int) -> Array:
    """Samples whose elements depend on each other, and differ in size."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rows, width)) @ rng.standard_normal((width, width))
    return np.asarray(mixed * rng.uniform(0.1, 3, width))


def by_the_paper(
    weight: Array, hessian: Array, order: Array, scale: Array, zero: Array, size: int, dtype: Dtype
) -> Array:
    """Equations 2 and 3 of Frantar et al.: quantize one row, move those that are left, remove it from the Hessian."""
    weight = np.array(weight, np.float64)
    codes = np.zeros(weight.shape)
    left = list(order)
    while left:
        row = left[0]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        step, middle = scale[row // size].astype(np.float64), zero[row // size].astype(np.float64)
        codes[row] = np.clip(np.rint(weight[row] / step) + middle, dtype.minimum, dtype.maximum)
        error = (weight[row] - (codes[row] - middle) * step) / inverse[0, 0]
        weight[left] -= inverse[:, :1] * error
        left = left[1:]
    return codes


def damped(samples: Array) -> Array:
    hessian = samples.T @ samples
    return np.asarray(hessian + 0.01 * np.diag(hessian).mean() * np.eye(len(hessian)))


def cost(weight: Array, rounded: Array, samples: Array) -> float:
    return float(np.square(samples @ (weight - rounded)).sum())


@pytest.mark.parametrize("dtype", [Dtype.INT2, Dtype.INT4, Dtype.UINT4, Dtype.INT8])
@pytest.mark.parametrize("size", [8, 20, 64, 100])
def test_codes_are_those_of_the_paper(size: int, dtype: Dtype) -> None:
    same = []
    for seed in range(3):
        samples = inputs(300, 100, seed)
        weight = np.random.default_rng(seed + 10).standard_normal((100, 5)).astype(np.float32)
        kind = Blocked(0, size)
        scale, zero = weight_scales(weight, dtype, kind, symmetric=dtype.signed, clip=Clip.MSE)
        by = factor(samples.T @ samples)
        found = round_with_feedback(weight, by, scale, zero, size, dtype)
        assert found.dtype == dtype.numpy
        expected = by_the_paper(weight, damped(samples), by.order, scale, zero, size, dtype)
        same.append((found.astype(np.float64) == expected).mean())
        values = dequantize(found, scale, zero, kind)
        nearest = fake_quantize(weight, scale, zero, dtype, kind)
        assert cost(weight, values, samples) < cost(weight, nearest, samples)
    assert np.mean(same) > 0.99  # a tie goes another way in single precision


def test_rows_that_matter_most_come_first() -> None:
    samples = inputs(50, 12, 0)
    order = factor(samples.T @ samples).order
    energy = np.square(samples).sum(axis=0)[order]
    assert sorted(order) == list(range(12))
    assert (np.diff(energy) <= 0).all()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), dead=st.integers(0, 7))
def test_inputs_that_are_independent_or_never_there_leave_rounding_alone(seed: int, dead: int) -> None:
    rng = np.random.default_rng(seed)
    energy = rng.uniform(0.1, 10, 8)
    energy[:dead] = 0
    weight = rng.standard_normal((8, 3)).astype(np.float32)
    kind = Blocked(0, 4)
    scale, zero = weight_scales(weight, Dtype.INT4, kind, symmetric=True, clip=Clip.NONE)
    codes = round_with_feedback(weight, factor(np.diag(energy)), scale, zero, 4, Dtype.INT4)
    expected = fake_quantize(weight, scale, zero, Dtype.INT4, kind)
    np.testing.assert_array_equal(dequantize(codes, scale, zero, kind), expected)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 12))
def test_fewer_samples_than_inputs_are_enough(seed: int, rows: int) -> None:
    """The Hessian has no inverse then; on these samples the result is no worse than by nearest rounding."""
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal((rows, 16))
    weight = rng.standard_normal((16, 40)).astype(np.float32)
    kind = Blocked(0, 16)
    scale, zero = weight_scales(weight, Dtype.INT4, kind, symmetric=True, clip=Clip.NONE)
    codes = round_with_feedback(weight, factor(samples.T @ samples), scale, zero, 16, Dtype.INT4)
    nearest = fake_quantize(weight, scale, zero, Dtype.INT4, kind)
    assert cost(weight, dequantize(codes, scale, zero, kind), samples) <= cost(weight, nearest, samples)


def test_more_dampening_where_one_percent_leaves_it_indefinite() -> None:
    hessian = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.1], [0.0, 1.1, 1.0]])
    upper = factor(hessian, dampening=0.01).upper
    assert np.isfinite(upper).all()
    assert (np.diag(upper) == 1).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e6])
def test_what_cannot_be_factored_is_said(value: float) -> None:
    with pytest.raises(DataError):
        factor(np.diag([1.0, 1.0, value]))
