"""Scales of blocks: exact products, no clipping, and the Microscaling formulas."""

import hypothesis.extra.numpy as hnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qonnx.block_scales import integer_scales, power_of_two_scale, split_scales
from qonnx.errors import RecipeError
from qonnx.numerics import Blocked, Dtype, absmax, fake_quantize
from tests.plans import Array

SCALES = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 7)), elements=st.floats(2.0**-60, 2.0**60, width=32)
)

# The largest normal exponent of each element type, from the table of the specification.
EMAX = {Dtype.INT8: 6, Dtype.FLOAT8E4M3FN: 8, Dtype.FLOAT8E5M2: 15, Dtype.FLOAT4E2M1: 2}


@settings(max_examples=50, deadline=None)
@given(scale=SCALES, axis=st.sampled_from([0, 1, -1]), bits=st.integers(2, 8))
def test_products_are_exact_and_never_below_the_scale(scale: Array, axis: int, bits: int) -> None:
    codes, step = integer_scales(scale, axis, bits)
    column = step[:, None] if axis == 0 else step
    product = codes * column
    assert product.dtype == np.float32
    np.testing.assert_array_equal(product.astype(np.float64), codes.astype(np.float64) * column.astype(np.float64))
    assert (product >= scale).all()
    assert codes.min() >= 1
    assert (codes.max(axis=1 if axis == 0 else 0) == 2**bits - 1).all()


@settings(max_examples=50, deadline=None)
@given(scale=SCALES, axis=st.sampled_from([0, 1]), bits=st.integers(2, 8))
def test_codes_and_steps_can_be_told_from_the_products(scale: Array, axis: int, bits: int) -> None:
    codes, step = integer_scales(scale, axis, bits)
    found = split_scales(codes * (step[:, None] if axis == 0 else step), axis, bits)
    assert found is not None
    np.testing.assert_array_equal(found[0], codes)
    np.testing.assert_array_equal(found[1], step)


def test_scales_that_are_no_such_products_are_not_split() -> None:
    assert split_scales(np.random.default_rng(0).random((4, 9)), 0) is None


def test_scales_grow_by_one_step_at_most() -> None:
    scale = np.random.default_rng(0).random((4, 50)).astype(np.float32) + 0.01
    codes, step = integer_scales(scale, 0)
    assert (codes * step[:, None] - scale <= step[:, None] * (1 + 1e-6)).all()


@pytest.mark.parametrize("bits", [0, 9])
def test_other_numbers_of_bits_are_refused(bits: int) -> None:
    with pytest.raises(RecipeError, match=f"scales of {bits} bits are not possible: choose 1 to 8"):
        integer_scales([[1.0]], 0, bits)


@pytest.mark.parametrize("dtype", EMAX)
def test_power_of_two_scales_are_those_of_the_specification(dtype: Dtype) -> None:
    largest = np.random.default_rng(0).lognormal(0, 9, 500).astype(np.float32)
    expected = 2.0 ** (np.floor(np.log2(largest.astype(np.float64))) - EMAX[dtype])
    found = power_of_two_scale(largest, dtype)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found, found.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32))


@pytest.mark.parametrize("dtype", EMAX)
def test_power_of_two_scales_cost_the_largest_elements_at_most(dtype: Dtype) -> None:
    """A block of the format holds what lies below twice the power of two under its largest element, saturated."""
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    blocks = Blocked(1, 32)
    scale = power_of_two_scale(absmax(x, blocks), dtype)
    error = np.abs(fake_quantize(x, scale, None, dtype, blocks) - x)
    assert (error <= np.repeat(2 * scale * dtype.maximum, 32, axis=1) / 4).all()
    if dtype is Dtype.INT8:
        assert (error <= np.repeat(scale, 32, axis=1)).all()


def test_blocks_of_zeros_and_of_the_smallest_numbers() -> None:
    largest = np.array([0, 2.0**-149, 2.0**-126], np.float32)
    np.testing.assert_array_equal(power_of_two_scale(largest, Dtype.INT8), [1, 2.0**-126, 2.0**-126])
    assert power_of_two_scale(np.finfo(np.float32).max, Dtype.INT8) == 2.0**121
