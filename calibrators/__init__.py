"""Statistics in, range out: one calibrator a file.

TensorRT's own, up to version 10, by what they are: `IInt8MinMaxCalibrator` is `minmax`; `IInt8LegacyCalibrator` is
`percentile`, its quantile being `percentile / 100`; `IInt8EntropyCalibrator` is what `entropy` writes out.
How `IInt8EntropyCalibrator2` differs from it was never published, so there is none here that claims to be it: TensorRT
itself runs it (`qonnx engine --calibrator entropy-2`).
"""

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
