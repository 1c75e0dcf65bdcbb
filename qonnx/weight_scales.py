"""Scales of weights: from the largest magnitude of each group, or clipped where that costs least.

    none    scale = max|w| / maximum
    mse     scale = r max|w| / maximum, with the r of a few that makes sum (w - dequantize(quantize(w)))^2 least

For few bits the second is better: of 16 levels, those that only the largest weight of a block needs are lost to all
others. For signed types 7/8 is among the ratios of int4, at which the grid reaches from -max|w| to 7/8 max|w|: the
lowest code is used, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qonnx.numerics import Blocked, Dtype, Granularity, PerTensor, fake_quantize, minmax, scale_and_zero_point
from qonnx.recipe import Clip

Array = npt.NDArray[Any]

# From 1 down: beyond a half, what is cut off always costs more than the finer grid gains.
_RATIOS = tuple(1 - step / 32 for step in range(1, 17))

# Elements that are searched at a time, so that they stay in the cache.
_CHUNK = 1 << 18


def weight_scales(
    weight: npt.NDArray[np.float32], dtype: Dtype, granularity: Granularity, *, symmetric: bool, clip: Clip
) -> tuple[npt.NDArray[np.float32], Array]:
    """Scales and zero points of a weight.

    Args:
        weight: finite values.
        dtype: the type of the codes.
        granularity: which elements share a scale.
        symmetric: whether 0 is in the middle of the grid.
        clip: where the grid ends.

    Returns:
        Scales in float32 and zero points in the type of the codes, both of the shape that ONNX wants.

    Raises:
        DataError: a value that is not finite, or no value at all.

    Example:
        >>> weight = np.array([[-8, 1, 2, 3, 4, 5, 6, 7]], np.float32)
        >>> [weight_scales(weight, Dtype.INT4, Blocked(1, 8), symmetric=True, clip=clip)[0].item() for clip in Clip]
        [1.1428571939468384, 1.0]
    """
    low, high = minmax(weight, granularity)
    scale, zero_point = scale_and_zero_point(low, high, dtype, symmetric=symmetric)
    if clip is Clip.NONE:
        return scale, zero_point
    least = _squared_error(weight, scale, zero_point, dtype, granularity)
    for ratio in _RATIOS:
        steps, zeros = scale_and_zero_point(
            low * np.float32(ratio), high * np.float32(ratio), dtype, symmetric=symmetric
        )
        error = _squared_error(weight, steps, zeros, dtype, granularity)
        better = error < least
        least = np.where(better, error, least)
        scale, zero_point = np.where(better, steps, scale), np.where(better, zeros, zero_point)
    return scale, zero_point


def _squared_error(weight: Array, scale: Array, zero_point: Array, dtype: Dtype, granularity: Granularity) -> Array:
    """The sum of squared errors of every group that shares a scale."""
    difference = fake_quantize(weight, scale, zero_point, dtype, granularity)
    np.subtract(weight, difference, out=difference)
    np.square(difference, out=difference)
    if isinstance(granularity, PerTensor):
        return np.asarray(difference.sum(dtype=np.float64))
    if isinstance(granularity, Blocked):
        axis = granularity.axis % weight.ndim
        starts = np.arange(0, weight.shape[axis], granularity.block_size)
        return np.asarray(np.add.reduceat(difference, starts, axis=axis))
    others = tuple(axis for axis in range(weight.ndim) if axis != granularity.axis % weight.ndim)
    return np.asarray(difference.sum(axis=others))
