"""Calibrator: the magnitude that all but a small share of the elements stay below."""

from __future__ import annotations

import math

import msgspec
import numpy as np

from qonnx.calibrators._range import bounded, check_distribution, limits, negligible
from qonnx.numerics import Dtype
from qonnx.sketch import Cells
from qonnx.statistics import TensorStatistics


class Percentile(msgspec.Struct, frozen=True, tag_field="kind", tag="percentile", forbid_unknown_fields=True):
    """The smallest range that holds `percentile` percent of the elements.

    Symmetric: the smallest T such that |x| <= T for so many. Otherwise the rest is cut in equal parts from either end.
    T is at most 0.05 % above the exact order statistic, never below it, and never above the largest element.

    Values from 99.99 to 99.999 are the usual choice for transformers, whose few large elements matter and must not be
    clipped much: Wu et al., arXiv 2004.09602, table 5.

    Attributes:
        percentile: above 50, at most 100 (which is `minmax`).
    """

    percentile: float = 99.99

    def __post_init__(self) -> None:
        bounded("percentile", "percentile", self.percentile, 50.0, 100.0)

    def range(self, statistics: TensorStatistics, dtype: Dtype, symmetric: bool) -> tuple[float, float]:
        """The range to spread over the grid of `dtype`, 0 included; symmetric means 0 in the middle.

        Raises:
            DataError: no element was seen, or one was NaN or infinite; or the distribution was not measured.
        """
        sketch = check_distribution(statistics)
        low, high = statistics.minimum, statistics.maximum
        if negligible(statistics):
            return limits(low, high, dtype, symmetric)
        if symmetric:
            reach = min(
                _quantile(sketch.magnitudes(), statistics.count, self.percentile / 100), statistics.absolute_maximum
            )
            return limits(max(low, -reach), min(high, reach), dtype, symmetric)
        cells, cut = sketch.values(), (1 - self.percentile / 100) / 2
        mirrored = Cells(-cells.high[::-1], -cells.low[::-1], cells.counts[::-1])
        low = max(low, -_quantile(mirrored, statistics.count, 1 - cut))
        return limits(low, min(high, _quantile(cells, statistics.count, 1 - cut)), dtype, symmetric)


def _quantile(cells: Cells, count: int, share: float) -> float:
    """The upper edge of the cell that holds the element of rank ceil(share * count)."""
    # Shares such as 0.9999 are not exact in binary: without the slack, rank 9999 of 10 000 would become 10 000.
    above = count - math.ceil(share * count - 1e-6)
    from_top = np.cumsum(cells.counts[::-1])
    index = int(np.searchsorted(from_top, above, side="right"))
    return float(cells.high[max(cells.high.size - 1 - index, 0)])
