"""Calibrator: the extremes that were observed."""

from __future__ import annotations

import msgspec

from qonnx.calibrators._range import check, limits
from qonnx.numerics import Dtype
from qonnx.statistics import TensorStatistics


class MinMax(msgspec.Struct, frozen=True, tag_field="kind", tag="minmax", forbid_unknown_fields=True):
    """The smallest and the largest element seen: nothing that was seen is clipped."""

    def range(self, statistics: TensorStatistics, dtype: Dtype, symmetric: bool) -> tuple[float, float]:
        """The range to spread over the grid of `dtype`, 0 included; symmetric means 0 in the middle.

        Raises:
            DataError: no element was seen, or one was NaN or infinite.
        """
        check(statistics)
        return limits(statistics.minimum, statistics.maximum, dtype, symmetric)
