"""The lost bit of one-sided tensors: an offset that moves the middle of a tensor to zero.

Behind a Relu, a Relu6 or a Gelu a tensor has next to no negative elements, and where zero points have to be 0 half of
the codes of a signed type are never used. The same network with another tensor in between uses all of them:

    max(y, 0) - z       =  Clip(y - z, -z)              z goes into the bias of what makes y,
    Clip(y, 0, 6) - z   =  Clip(y - z, -z, 6 - z)       W z into the bias of what reads it: no node is added

which is worth up to 6 dB. It is the exact form of "absorbing high biases" (Nagel et al. 2019, "Data-Free
Quantization", section 4.1.3), which moves offsets that an activation function never cuts off.

One offset for all channels where an activation function or padding compares with a number, otherwise one for each. An
offset is made for the range that loses least, rounding and clipping together: the middle of the extremes would be the
wrong one for a tensor with few large elements.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qonnx.numerics import Dtype, PerTensor, fake_quantize, scale_and_zero_point

Vector = npt.NDArray[np.float64]

# Fractions of the observed range that offsets are made for, and of the largest magnitude that grids end at: a quarter
# of an octave apart, down to a quarter.
_FRACTIONS = 2.0 ** (-np.arange(9) / 4)

# Elements that candidates are measured on, evenly spaced.
_ELEMENTS = 1 << 14


class Offset(NamedTuple):
    """What a tensor is moved by.

    Attributes:
        shift: [channels] z, in units of the tensor.
        gain_db: how much better the tensor survives a symmetric grid, each with the best range.
    """

    shift: Vector
    gain_db: float


def best_offset(
    x: npt.NDArray[np.float32], low: Vector, high: Vector, dtype: Dtype = Dtype.INT8, *, alike: bool
) -> Offset:
    """The offset with which a symmetric grid loses least.

    Args:
        x: [rows, channels] samples of the tensor.
        low: [channels] the smallest element of each channel; a channel without elements has low > high.
        high: [channels] the largest.
        dtype: type of the codes.
        alike: whether all channels need the same offset.

    >>> x = np.linspace(0, 6, 601, dtype=np.float32)[:, None]
    >>> offset = best_offset(x, np.zeros(1), np.full(1, 6.0), alike=True)
    >>> offset.shift, round(offset.gain_db)
    (array([3.]), 6)
    """
    low, high = np.where(low > high, 0.0, low), np.where(low > high, 0.0, high)
    x = x[:: max(1, x.size // _ELEMENTS)]
    if alike:
        middle = float(low.min() + high.max()) / 2
        candidates = [np.full(low.shape, fraction * middle) for fraction in _FRACTIONS]
    else:
        candidates = [(low + high) / 2]
    errors = [_error((x - shift).astype(np.float32), low - shift, high - shift, dtype) for shift in candidates]
    least = int(np.argmin(errors))
    before = _error(x, low, high, dtype)
    if not errors[least] < before:
        return Offset(np.zeros(low.shape), 0.0)
    gain = 10 * math.log10(before / errors[least]) if errors[least] > 0 else math.inf
    return Offset(candidates[least], gain)


def _error(x: npt.NDArray[np.float32], low: Vector, high: Vector, dtype: Dtype) -> float:
    """The least sum of squared errors over all ranges of a symmetric grid."""
    reach = float(max(-low.min(), high.max()))
    losses = []
    for fraction in _FRACTIONS:
        scale, zero_point = scale_and_zero_point(-fraction * reach, fraction * reach, dtype, symmetric=True)
        error = fake_quantize(x, scale, zero_point, dtype, PerTensor()) - x
        losses.append(float(np.vdot(error, error)))
    return min(losses)
