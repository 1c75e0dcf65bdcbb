"""Calibrator: the range whose rounding and clipping errors are smallest, in the mean square or another power."""

from __future__ import annotations

import functools
from collections.abc import Callable

import msgspec
import numpy as np
import numpy.typing as npt

from qonnx.calibrators._range import bounded, check_distribution, limits, negligible
from qonnx.numerics import Dtype, PerTensor, fake_quantize, scale_and_zero_point
from qonnx.sketch import Cells
from qonnx.statistics import TensorStatistics

# Candidates: 16 octaves down from the extremes in steps of 9 %, then the octave around the best one in steps of 1 %
# (on a float grid the error has several minima in each octave), then between its neighbours in steps of 0.1 %.
_COARSE = 2.0 ** (-np.arange(129) / 8)
_OCTAVE = 2.0 ** (np.arange(32, -33, -1) / 64)
_STEP = 2.0 ** (np.arange(8, -9, -1) / 512)


class MSE(msgspec.Struct, frozen=True, tag_field="kind", tag="mse", forbid_unknown_fields=True):
    """The range with the least sum of |x - quantized(x)|^exponent, on any grid: int8, int4, uint8, float8 ...

    Symmetric: one threshold. Otherwise the two ends are searched in turn. Each cell of the sketch stands for its
    elements with its centre, which is at most 0.025 % away from them.

    An exponent above 2 gives rare large elements more weight: 2.4 is used by GPTQ (arXiv 2210.17323, weights) and
    BRECQ (ICLR 2021, activations).

    Attributes:
        exponent: above 0, at most 16.
    """

    exponent: float = 2.0

    def __post_init__(self) -> None:
        bounded("mse", "exponent", self.exponent, 0.0, 16.0)

    def range(self, statistics: TensorStatistics, dtype: Dtype, symmetric: bool) -> tuple[float, float]:
        """The range to spread over the grid of `dtype`, 0 included; symmetric means 0 in the middle.

        Raises:
            DataError: no element was seen, or one was NaN or infinite; or the distribution was not measured.
        """
        sketch = check_distribution(statistics)
        low, high = limits(statistics.minimum, statistics.maximum, dtype, symmetric)
        if negligible(statistics) or dtype.bits > 8:  # finer than the cells; and 16 bits lose nothing to round
            return low, high
        error = functools.partial(_error, *_centres(sketch.values(), statistics), dtype, symmetric, self.exponent)
        if symmetric or not dtype.is_integer:
            reach = _search(lambda reach: error(max(low, -reach), reach), high)
            return max(low, -reach), reach
        furthest_low, furthest_high = low, high
        for _ in range(2):
            if furthest_high > 0:
                high = _search(functools.partial(error, low), furthest_high)
            if furthest_low < 0:
                low = -_search(lambda reach, high=high: error(-reach, high), -furthest_low)  # type: ignore[misc]
        return low, high


def _centres(cells: Cells, statistics: TensorStatistics) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Values and their counts. Zeros are left out: they are exact on every grid."""
    centres = np.clip((cells.low + cells.high) / 2, statistics.minimum, statistics.maximum)
    zero = (cells.low == 0) | (cells.high == 0)
    return centres[~zero].astype(np.float32), cells.counts[~zero].astype(np.float64)


def _error(
    x: npt.NDArray[np.float32],
    counts: npt.NDArray[np.float64],
    dtype: Dtype,
    symmetric: bool,
    exponent: float,
    low: float,
    high: float,
) -> float:
    """The sum over all elements of the error to the power `exponent`, in units of the largest magnitude."""
    scale, zero_point = scale_and_zero_point(low, high, dtype, symmetric=symmetric)
    error = np.abs(x - fake_quantize(x, scale, zero_point, dtype, PerTensor()), dtype=np.float64)
    error /= max(abs(float(x[0])), abs(float(x[-1])))  # powers of 1e30 and of 1e-30 are no float64
    powers = np.square(error) if exponent == 2 else error**exponent
    return float(np.sum(counts * powers))  # not by matmul: for so few elements its threads cost more than they save


def _search(error: Callable[[float], float], maximum: float) -> float:
    """The threshold with the least error, of equal ones the largest, from `maximum` down."""
    best = maximum
    for factors in (_COARSE, _OCTAVE, _STEP):
        candidates = np.unique(np.minimum(best * factors, maximum))[::-1]
        best = float(candidates[np.argmin([error(float(reach)) for reach in candidates])])
    return best
