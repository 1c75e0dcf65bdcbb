"""Calibrators for TensorRT up to 10: one answers from a cache, one feeds the user's batches to TensorRT's own.

Both are subclasses of a class of the library, which decides what TensorRT does with them; so they are made by a
function that is given the library. See `IInt8Calibrator` in the TensorRT API reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qonnx.engine.protocol import Calibration
from qonnx.engine.settings import Calibrator

_CLASSES = {
    Calibrator.ENTROPY_2: "IInt8EntropyCalibrator2",
    Calibrator.ENTROPY: "IInt8EntropyCalibrator",
    Calibrator.MINMAX: "IInt8MinMaxCalibrator",
    Calibrator.LEGACY: "IInt8LegacyCalibrator",
}

# Of the legacy calibrator: the share of magnitudes that its range keeps, and where its search for a better one begins.
_QUANTILE, _REGRESSION_CUTOFF = 0.9999, 1.0

Array = npt.NDArray[Any]


class Memory(Protocol):
    """GPU memory for one batch at a time; `qonnx.engine.device_memory.DeviceMemory` is one."""

    def put(self, name: str, array: Array) -> int:
        """Copies an array to the GPU and returns its address there; what was put under that name before is gone."""


def make_calibrator(trt: Any, calibration: Calibration, memory: Memory | None = None) -> Any:
    """An object for `IBuilderConfig.int8_calibrator`.

    Args:
        trt: the library.
        calibration: the class, and the cache or the batches.
        memory: where batches are put; not needed for a cache.
    """
    base = getattr(trt, _CLASSES[calibration.calibrator])

    class Answering(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)
            self._batches = _batches(calibration.batches)

        def get_batch_size(self) -> int:
            return next((shape[0] for shape in calibration.shapes.values() if shape), 1)

        def get_batch(self, names: Sequence[str], *_: object) -> list[int] | None:
            batch = next(self._batches, None)
            if batch is None or memory is None:
                return None
            return [memory.put(name, batch[name]) for name in names]

        def read_calibration_cache(self, *_: object) -> bytes | None:
            return calibration.cache.encode() or None

        def write_calibration_cache(self, *_: object) -> None:
            """The ranges are in the engine; there is nothing to keep."""

        # What follows is asked of the legacy calibrator only.

        def get_quantile(self) -> float:
            return _QUANTILE

        def get_regression_cutoff(self) -> float:
            return _REGRESSION_CUTOFF

        def read_histogram_cache(self, *_: object) -> None:
            return None

        def write_histogram_cache(self, *_: object) -> None:
            return None

    return Answering()


def _batches(files: Sequence[str]) -> Iterator[Mapping[str, Array]]:
    for file in files:
        with np.load(file) as batch:
            yield dict(batch)
