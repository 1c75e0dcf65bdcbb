"""From statistics to the range of each tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from qonnx.calibrators import Calibrator
from qonnx.numerics import Dtype
from qonnx.statistics import Statistics


class Range(NamedTuple):
    """The ends of a grid, and where they come from."""

    low: float
    high: float
    source: str


def calibrated(
    values: Iterable[str], statistics: Statistics, calibrator: Calibrator, dtype: Dtype, *, symmetric: bool
) -> dict[str, Range]:
    """The range of every value that was observed and is always finite; the others have none.

    Args:
        values: value names.
        statistics: of these values.
        calibrator: turns the statistics of one value into its range.
        dtype: the type of the codes.
        symmetric: whether 0 is in the middle of the grid.
    """
    ranges = {}
    for value in values:
        observed = statistics.tensors.get(value)
        if observed is not None and observed.count and observed.finite:
            low, high = calibrator.range(observed, dtype, symmetric)
            ranges[value] = Range(float(low), float(high), described(calibrator))
    return ranges


def described(calibrator: Calibrator) -> str:
    """The calibrator and its parameters in a few words, such as `percentile 99.99`."""
    parameters = msgspec.to_builtins(calibrator)
    return " ".join(
        [str(parameters.pop("kind")), *(f"{value:g}" for value in parameters.values() if value is not None)]
    )
