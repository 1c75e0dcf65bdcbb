"""TensorRT's calibration cache: the scale of every tensor, for networks without QDQ nodes in TensorRT up to 10.

The file is text (see `IInt8Calibrator::readCalibrationCache` in the TensorRT API reference):

    TRT-101601-EntropyCalibration2
    input: 3c010a14

Behind the version and the algorithm, each line holds the name of a tensor and its scale, amax / 127, as the big-endian
hexadecimal digits of a float32. TensorRT reads it only where both match what runs; otherwise it calibrates again.
"""

from __future__ import annotations

import enum
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qonnx.calibrators import EXTREMES, Calibrator, MinMax
from qonnx.errors import DataError, OutputError, TargetError
from qonnx.graph import publish, staging
from qonnx.numerics import Dtype
from qonnx.ranges import Range, calibrated
from qonnx.statistics import Statistics

# The largest code of symmetric int8.
_LEVELS = 127

# From this release on TensorRT has no calibration: scales are in the graph or nowhere.
_WITHOUT_CALIBRATION = 11

# The release whose version number has one more digit for the major part.
_FIVE_DIGITS = 10

_HEADER = re.compile(r"TRT-\d+-\w+")
_SCALE = re.compile(r"[0-9a-fA-F]{1,8}")


class Algorithm(enum.Enum):
    """The calibrator class that will read the file, as TensorRT names it there."""

    ENTROPY_2 = "EntropyCalibration2"
    ENTROPY = "EntropyCalibration"
    MINMAX = "MinMaxCalibration"


def write(
    path: str | os.PathLike[str],
    amax: Mapping[str, float],
    version: str = "10.16.1",
    algorithm: Algorithm = Algorithm.ENTROPY_2,
) -> None:
    """Writes a cache; it appears whole or not at all.

    Tensors whose scale is 0 in float32 are left out: a reader would take the 0 for a scale.

    Args:
        path: the file to write.
        amax: by the name of a tensor in the network, the largest magnitude of its range; int8 only.
        version: of the TensorRT that will read it.
        algorithm: of the calibrator that will read it. It says nothing about where the ranges come from.

    Raises:
        DataError: a name or a magnitude cannot be written.
        OutputError: the folder does not exist or cannot be written.
        TargetError: there is no such version, or it has no calibration.
    """
    path, text = Path(path), dumps(amax, version, algorithm)
    with staging(path) as folder:
        try:
            (folder / path.name).write_text(text, encoding="utf-8", newline="\n")
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
        publish(folder, path.parent)


def read(path: str | os.PathLike[str]) -> dict[str, float]:
    """The largest magnitude of every tensor in a cache of any version and algorithm.

    Tensors with scale 0 are left out, as in `write`.

    Raises:
        DataError: the file is missing, or is not a calibration cache.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise DataError(f"{path}: cannot be read ({reason}); give a calibration cache of TensorRT") from error
    try:
        return loads(text)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def read_ranges(path: str | os.PathLike[str]) -> dict[str, Range]:
    """The range of every tensor in a cache, 0 in the middle.

    Raises:
        DataError: the file is missing, or is not a calibration cache.
    """
    return {name: Range(-amax, amax, "calibration cache") for name, amax in read(path).items()}


def magnitudes(statistics: Statistics, calibrator: Calibrator) -> dict[str, float]:
    """What `write` takes, by one calibrator; by min-max where only the extremes were measured.

    Values that were NaN or infinite, or never seen, have no range and are left out.
    """
    extremes_only = {name for name, tensor in statistics.tensors.items() if tensor.sketch is None}
    if isinstance(calibrator, EXTREMES):
        extremes_only = set()
    others = [name for name in statistics.tensors if name not in extremes_only]
    ranges = calibrated(others, statistics, calibrator, Dtype.INT8, symmetric=True)
    ranges |= calibrated(extremes_only, statistics, MinMax(), Dtype.INT8, symmetric=True)
    return {name: ranges[name].high for name in statistics.tensors if name in ranges}


def dumps(amax: Mapping[str, float], version: str = "10.16.1", algorithm: Algorithm = Algorithm.ENTROPY_2) -> str:
    """The text of a cache; see `write`.

    Example:
        >>> print(dumps({"input": 1.0002441, "x:0": 127, "unused": 0}, "8.6.1"), end="")
        TRT-8601-EntropyCalibration2
        input: 3c010a14
        x:0: 3f800000
    """
    lines = [f"TRT-{version_number(version)}-{algorithm.value}"]
    for name, magnitude in amax.items():
        if not name or len(name.splitlines()) > 1 or name != name.strip():
            raise DataError(f"tensor {name!r}: a calibration cache cannot hold this name; rename the tensor")
        scale = _float32(magnitude / _LEVELS)
        if not (scale >= 0 and math.isfinite(scale)):
            raise DataError(f"tensor {name!r}: no scale for a largest magnitude of {magnitude}; leave the tensor out")
        if scale > 0:
            lines.append(f"{name}: {np.array(scale, '>f4').tobytes().hex()}")
    return "".join(f"{line}\n" for line in lines)


def loads(text: str) -> dict[str, float]:
    r"""The largest magnitudes in the text of a cache; see `read`.

    Example:
        >>> amax = loads("TRT-8601-EntropyCalibration2\ninput: 3c010a14\nx:0: 3f800000\nunused: 0\n")
        >>> round(amax["input"] / 127, 7), amax["x:0"], "unused" in amax
        (0.0078759, 127.0, False)
    """
    header, *lines = text.split("\n")
    if not _HEADER.fullmatch(header.strip()):
        raise DataError("not a calibration cache of TensorRT: the first line is not TRT-<version>-<algorithm>")
    amax: dict[str, float] = {}
    seen: set[str] = set()
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        name, colon, digits = line.rpartition(": ")  # names may hold colons too
        if not colon or not name or not _SCALE.fullmatch(digits.strip()):
            raise DataError(f"line {number} is not NAME: SCALE in hexadecimal digits; calibrate again")
        if name in seen:
            raise DataError(f"line {number}: tensor {name!r} for the second time; calibrate again")
        seen.add(name)
        # Some writers drop leading zeros.
        scale = float(np.frombuffer(bytes.fromhex(digits.strip().zfill(8)), ">f4")[0])
        if not (scale >= 0 and math.isfinite(scale)):
            raise DataError(f"line {number}: tensor {name!r} has scale {scale}; calibrate again")
        if scale > 0:
            amax[name] = scale * _LEVELS
    return amax


def header(text: str) -> tuple[int, Algorithm]:
    r"""The version, as a number, and the algorithm that the first line of a cache names.

    >>> header("TRT-101601-MinMaxCalibration\ninput: 3c010a14\n")
    (101601, <Algorithm.MINMAX: 'MinMaxCalibration'>)

    Raises:
        DataError: it names none that TensorRT has.
    """
    first = text.partition("\n")[0].strip()
    _, number, name = [*first.split("-"), "", ""][:3]
    known = {algorithm.value: algorithm for algorithm in Algorithm}
    if not _HEADER.fullmatch(first) or name not in known:
        raise DataError(f"the first line is not TRT-<version>-<one of {', '.join(known)}>; write the cache again")
    return int(number), known[name]


def version_number(version: str) -> int:
    """A version as TensorRT writes it in the first line.

    Example:
        >>> version_number("8.6.1"), version_number("10.14.1.48"), version_number("10.16.1")
        (8601, 101401, 101601)

    Raises:
        TargetError: it is not a version, or one without calibration.
    """
    parts = version.split(".")
    if len(parts) not in (3, 4) or not all(part.isascii() and part.isdigit() for part in parts):
        raise TargetError(f"TensorRT version {version!r}: give major, minor and patch, such as 10.16.1")
    major, minor, patch = map(int, parts[:3])
    if major >= _WITHOUT_CALIBRATION:
        raise TargetError(
            f"TensorRT {version} reads no calibration cache: `qonnx quantize` puts the scales in the graph"
        )
    return major * (10_000 if major >= _FIVE_DIGITS else 1000) + minor * 100 + patch


def _float32(x: float) -> float:
    with np.errstate(over="ignore", under="ignore"):
        return float(np.float32(x))
