"""Calibrator: the average over batches of the extremes of each."""

from __future__ import annotations

import math

import msgspec

from qonnx.calibrators._range import check, limits
from qonnx.numerics import Dtype
from qonnx.statistics import TensorStatistics


class Average(msgspec.Struct, frozen=True, tag_field="kind", tag="average", forbid_unknown_fields=True):
    """The mean of the batch minima, and the mean of the batch maxima.

    Softer than the extremes: one unusual batch moves the range a little. It depends on the size of the batches
    (the larger, the closer to the extremes), not on their order. Batches without elements do not count.

    From: Outlier Suppression+ (arXiv 2304.09145), its default observer.
    """

    def range(self, statistics: TensorStatistics, dtype: Dtype, symmetric: bool) -> tuple[float, float]:
        """The range to spread over the grid of `dtype`, 0 included; symmetric means 0 in the middle.

        Raises:
            DataError: no element was seen, or one was NaN or infinite.
        """
        check(statistics)
        seen = statistics.batch_minima <= statistics.batch_maxima
        batches = int(seen.sum())
        low = math.fsum(statistics.batch_minima[seen].tolist()) / batches  # fsum: the order must not matter
        high = math.fsum(statistics.batch_maxima[seen].tolist()) / batches
        return limits(low, high, dtype, symmetric)
