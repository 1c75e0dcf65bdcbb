"""What every calibrator does before and after its own work."""

from __future__ import annotations

from qonnx.errors import DataError
from qonnx.numerics import Dtype
from qonnx.statistics import TensorStatistics


def check(statistics: TensorStatistics) -> None:
    """Refuses statistics that give no range.

    Raises:
        DataError: no element was seen, or one was NaN or infinite.
    """
    if statistics.count == 0:
        raise DataError("no element was observed: the value was empty in every batch; leave it in float")
    if not statistics.finite:
        raise DataError("NaN or infinite elements were observed: no scale fits them; leave the value in float")


def limits(low: float, high: float, dtype: Dtype, symmetric: bool) -> tuple[float, float]:
    """The range that holds `low`, `high` and 0, such that 0 is in the middle of the grid where symmetric.

    An unsigned symmetric grid has 0 at its low end for values that are never negative.

    Example:
        >>> limits(0.5, 2.0, Dtype.INT8, symmetric=False), limits(-3.0, 2.0, Dtype.INT8, symmetric=True)
        ((0.0, 2.0), (-3.0, 3.0))
        >>> limits(0.5, 2.0, Dtype.UINT8, symmetric=True)
        (0.0, 2.0)
    """
    if symmetric and (dtype.signed or low < 0):
        high = max(abs(low), abs(high))
        return -high, high
    return min(low, 0.0), max(high, 0.0)
