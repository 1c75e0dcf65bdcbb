"""Calibrator: the threshold that loses least information, measured by the Kullback-Leibler divergence."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from qonnx.calibrators._range import check_distribution, limits, negligible
from qonnx.errors import RecipeError
from qonnx.numerics import Dtype
from qonnx.sketch import Sketch
from qonnx.statistics import TensorStatistics

BINS = 2048

# Divergences (in nats) that differ by less are equal: sums of so many logarithms are not more exact.
_TIE = 1e-12


class Entropy(msgspec.Struct, frozen=True, tag_field="kind", tag="entropy", forbid_unknown_fields=True):
    """The threshold T whose clipped histogram is closest to itself once it is reduced to the levels of the grid.

    The histogram of |x| has about 2048 bins of equal width up to the largest magnitude. For every i from the number of
    levels to the number of bins, P is the first i bins with all the rest added to the last one, and Q the first i bins
    without the rest, merged into as many groups as the grid has levels on one side of 0 and spread evenly again over
    the bins of each group that are not empty. T is the upper edge of bin i for the i with the smallest KL(P || Q);
    of several the largest. The first bin is replaced by the second, as exact zeros cost nothing on any grid.

    One side of 0 has 128 levels for int8 (2^(bits-1)); values of one sign on a grid that has no other, such as
    activations after ReLU in uint8, have 256. The range is cut to the observed extremes.

    Bins are one or two cells of the sketch wide, whichever is nearer to 2048 bins (there are 1536 to 3072), so that
    they hold exactly the counts that the raw values would give.

    Good for convolutional networks, harmful for transformers, whose rare large elements it cuts off: Wu et al.,
    arXiv 2004.09602, table 5. From: S. Migacz, "8-bit inference with TensorRT", GTC 2017.
    """

    def range(self, statistics: TensorStatistics, dtype: Dtype, symmetric: bool) -> tuple[float, float]:
        """The range to spread over the grid of `dtype`, 0 included; symmetric means 0 in the middle.

        Raises:
            DataError: no element was seen, or one was NaN or infinite; or the distribution was not measured.
            RecipeError: the grid is not one of integers.
        """
        if not dtype.is_integer:
            raise RecipeError(f"calibrator entropy knows grids of integers only, not {dtype}: choose mse or minmax")
        sketch = check_distribution(statistics)
        low, high = statistics.minimum, statistics.maximum
        if negligible(statistics):
            return limits(low, high, dtype, symmetric)
        one_sided = (low >= 0 or high <= 0) and not (symmetric and dtype.signed)
        levels = 2 ** (dtype.bits - (0 if one_sided else 1))
        counts, width = histogram(sketch, statistics.absolute_maximum)
        reach = width * threshold_bin(counts, levels)
        return limits(max(low, -reach), min(high, reach), dtype, symmetric)


def histogram(sketch: Sketch, maximum: float) -> tuple[npt.NDArray[np.float64], float]:
    """Counts of |x| in about 2048 bins of equal width that end at `maximum`, and the width.

    The width is that of the cell of `maximum`, or twice that. Smaller cells divide it, so none lies across an edge.

    Example:
        >>> from qonnx.sketch import sketch
        >>> counts, width = histogram(sketch(np.array([1.0, -1.0, 0.5], np.float32)), 1.0)
        >>> counts.size, width, np.flatnonzero(counts), counts[1024]
        (2049, 0.00048828125, array([1024, 2048]), np.float64(1.0))
    """
    low, high, counts = sketch.magnitudes()
    cell = float(high[-1] - low[-1])
    width = cell * max(1, round(maximum / (BINS * cell)))
    bins = np.floor(low / width).astype(np.int64)
    return np.bincount(bins, weights=counts).astype(np.float64), width


def threshold_bin(counts: npt.NDArray[Any], levels: int) -> int:
    """How many of the bins stay below the threshold: the i of the smallest divergence, of equal ones the largest.

    Args:
        counts: [bins] the histogram of |x|; the first bin is ignored.
        levels: grid steps on one side of 0.
    """
    counts = np.asarray(counts, np.float64).copy()
    if counts.size <= levels:
        return counts.size
    counts[0] = counts[1]
    divergence = divergences(counts, levels)
    return levels + int(np.flatnonzero(divergence <= divergence.min() + _TIE)[-1])


def divergences(counts: npt.NDArray[np.float64], levels: int) -> npt.NDArray[np.float64]:
    """KL(P || Q) for i = levels ... bins, in nats; infinite where the last bin is empty and something is clipped.

    With n_j the counts, s_g and m_g the sum and the number of non-empty bins of group g, c the sum of all that is
    clipped and N the sum of all,
        KL = (sum_j<i-1 n_j log n_j + (n_i-1 + c) log(n_i-1 + c) - sum_g s_g log(s_g / m_g) - c log(s_G / m_G)) / N
             - log(N / (N - c)),
    G being the last group. Every sum over bins is a difference of cumulative sums, hence no loop.

    Args:
        counts: [bins], more than `levels`.
        levels: grid steps on one side of 0.

    Returns:
        [bins - levels + 1] float64.
    """
    i = np.arange(levels, counts.size + 1)
    total = counts.sum()
    if total == 0:
        return np.zeros(i.size)
    # Group g of i bins begins at the first bin that is not below g * i / levels.
    begin = -(-np.arange(levels + 1) * i[:, None] // levels)
    group_sum = np.diff(_cumulative(counts)[begin], axis=1)
    group_bins = np.diff(_cumulative(counts > 0)[begin], axis=1)
    log_mean = _log(group_sum) - _log(group_bins)
    kept = _cumulative(counts)[i]
    clipped = total - kept
    last = counts[i - 1] + clipped
    p_log_p = _cumulative(counts * _log(counts))[i - 1] + last * _log(last)
    p_log_q = (group_sum * log_mean).sum(axis=1) + clipped * log_mean[:, -1]
    divergence: npt.NDArray[np.float64] = (p_log_p - p_log_q) / total + _log(kept) - np.log(total)
    divergence[(counts[i - 1] == 0) & (clipped > 0)] = np.inf
    return divergence


def _cumulative(x: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(x, dtype=np.float64)])


def _log(x: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Logarithm, with 0 for 0: every such term is multiplied by 0."""
    return np.log(np.where(x > 0, x, 1.0))
