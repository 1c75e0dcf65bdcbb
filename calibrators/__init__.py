"""Statistics in, range out: one calibrator a file."""

from typing import TypeAlias

from qonnx.calibrators.auto import Auto
from qonnx.calibrators.average import Average
from qonnx.calibrators.ema import MovingAverage
from qonnx.calibrators.entropy import Entropy
from qonnx.calibrators.minmax import MinMax
from qonnx.calibrators.mse import MSE
from qonnx.calibrators.percentile import Percentile

Calibrator: TypeAlias = MinMax | Average | MovingAverage | Percentile | Entropy | MSE

# Those that work from the extremes alone. The others need to know how often each value occurred.
EXTREMES = (MinMax, Average, MovingAverage)

__all__ = ["EXTREMES", "MSE", "Auto", "Average", "Calibrator", "Entropy", "MinMax", "MovingAverage", "Percentile"]
