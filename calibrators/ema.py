"""Calibrator: the exponential moving average over batches of the extremes of each."""

from __future__ import annotations

import msgspec
import numpy as np

from qonnx.calibrators._range import bounded, check, limits
from qonnx.numerics import Dtype
from qonnx.statistics import Floats, TensorStatistics


class MovingAverage(msgspec.Struct, frozen=True, tag_field="kind", tag="ema", forbid_unknown_fields=True):
    """The moving average m <- (1 - constant) m + constant * batch of the batch minima, and of the batch maxima.

    It starts at the first batch. Of all calibrators this is the one whose result depends on the order of batches, and
    with the usual constant it hardly leaves the first few: `average` is the better choice, this one is for comparison
    with tools that have no other.

    From: ONNX Runtime (`averaging_constant`) and PyTorch (`MovingAverageMinMaxObserver`), both 0.01.

    Attributes:
        constant: the weight of each new batch, above 0 and at most 1.
    """

    constant: float = 0.01

    def __post_init__(self) -> None:
        bounded("ema", "constant", self.constant, 0.0, 1.0)

    def range(self, statistics: TensorStatistics, dtype: Dtype, symmetric: bool) -> tuple[float, float]:
        """The range to spread over the grid of `dtype`, 0 included; symmetric means 0 in the middle.

        Raises:
            DataError: no element was seen, or one was NaN or infinite.
        """
        check(statistics)
        seen = statistics.batch_minima <= statistics.batch_maxima
        low, high = self._last(statistics.batch_minima[seen]), self._last(statistics.batch_maxima[seen])
        return limits(low, high, dtype, symmetric)

    def _last(self, values: Floats) -> float:
        weights = self.constant * (1 - self.constant) ** np.arange(values.size - 1, -1, -1.0)
        weights[0] = (1 - self.constant) ** (values.size - 1)  # the first batch is the start, not a step
        return float(weights @ values)
