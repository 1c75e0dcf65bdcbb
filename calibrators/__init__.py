"""Statistics in, range out: one calibrator a file."""

from typing import TypeAlias

from qonnx.calibrators.average import Average
from qonnx.calibrators.minmax import MinMax

Calibrator: TypeAlias = MinMax | Average

__all__ = ["Average", "Calibrator", "MinMax"]
