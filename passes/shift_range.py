"""The lost bit of one-sided tensors: an offset that moves the middle of a tensor to zero.

Behind a Relu, a Relu6 or a Gelu a tensor has next to no negative elements, and where zero points have to be 0 half of
the codes of a signed type are never used. The same network with another tensor in between uses all of them:

    max(y, 0) - z       =  Clip(y - z, -z)              z goes into the bias of what makes y,
    Clip(y, 0, 6) - z   =  Clip(y - z, -z, 6 - z)       W z into the bias of what reads it: no node is added

which is worth up to 6 dB. It is the exact form of "absorbing high biases" (Nagel et al. 2019, "Data-Free
Quantization", section 4.1.3), which moves offsets that an activation function never cuts off.

One offset for all channels where an activation function or padding compares with a number, otherwise one for each.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


class Offset(NamedTuple):
    """What a tensor is moved by.

    Attributes:
        shift: [channels] z, in units of the tensor.
        gain_db: how much finer the steps of a symmetric grid become.
    """

    shift: Vector
    gain_db: float


def middle(low: Vector, high: Vector, *, alike: bool) -> Offset:
    """The offset that leaves the smallest range around zero.

    Args:
        low: [channels] the smallest element of each channel; a channel without elements has low > high.
        high: [channels] the largest.
        alike: whether all channels need the same offset.

    >>> offset = middle(np.array([0.0, 0.0]), np.array([6.0, 1.0]), alike=True)
    >>> offset.shift, round(offset.gain_db, 2)
    (array([3., 3.]), 6.02)
    """
    seen = low <= high
    shift = np.zeros(low.shape)
    if not seen.any():
        return Offset(shift, 0.0)
    low, high = low[seen], high[seen]
    centre = (low.min() + high.max()) / 2 if alike else (low + high) / 2
    before = max(-low.min(), high.max())
    after = max(-(low - centre).min(), (high - centre).max())
    if not after < before:
        return Offset(shift, 0.0)
    shift[... if alike else seen] = centre
    return Offset(shift, 20 * math.log10(before / after) if after > 0 else math.inf)
