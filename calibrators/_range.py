"""What every calibrator does before and after its own work."""

from __future__ import annotations

from qonnx.errors import DataError, RecipeError
from qonnx.numerics import Dtype
from qonnx.sketch import Sketch
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


def check_distribution(statistics: TensorStatistics) -> Sketch:
    """Refuses statistics that give no range, or hold the extremes only.

    Raises:
        DataError: no element was seen, or one was NaN or infinite; or the distribution was not measured.
    """
    check(statistics)
    if statistics.sketch is None:
        raise DataError("only the extremes were measured: calibrate again with distributions for this calibrator")
    return statistics.sketch


def negligible(statistics: TensorStatistics) -> bool:
    """Whether all elements are so small that the scale is 1 and all codes are that of 0, whatever the range."""
    return statistics.absolute_maximum < 2.0**-126


def bounded(calibrator: str, name: str, value: float, above: float, at_most: float) -> None:
    """Refuses a parameter that is out of bounds.

    Raises:
        RecipeError: it is.
    """
    if not above < value <= at_most:
        raise RecipeError(
            f"calibrator {calibrator}: {name} must be above {above:g} and at most {at_most:g}, not {value}"
        )


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
