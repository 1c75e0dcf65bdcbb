"""What was observed while a model ran: one `TensorStatistics` per value, in `Statistics` that merge, save and load.

Counts and extremes do not depend on the order of the batches, on their size, or on how parts are merged. The two
arrays with one entry per batch follow the order and the size of the batches, which is their purpose.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from qonnx.data import Digest
from qonnx.errors import DataError, OutputError
from qonnx.graph import publish, staging
from qonnx.sketch import Sketch

Floats: TypeAlias = npt.NDArray[np.float32]

FORMAT = 2


@dataclasses.dataclass(frozen=True, eq=False)
class TensorStatistics:
    """What one value looked like over all batches.

    Attributes:
        count: elements seen.
        minimum: the smallest element; +inf where none was seen, not meaningful unless `finite`.
        maximum: the largest element; -inf where none was seen, not meaningful unless `finite`.
        finite: whether no element was NaN or infinite.
        sum_squares: the sum of the squared elements, from `sketch` where there is one; else float32 within a batch.
        batch_minima: [batches] the smallest element of each batch, in the order they were seen.
        batch_maxima: [batches] the largest element of each batch.
        channel_axis: the axis that `channel_minimum` and `channel_maximum` run along; None where they are None.
        channel_minimum: [channels] the smallest element of each channel.
        channel_maximum: [channels] the largest element of each channel.
        sketch: how often each value occurred; None where only the extremes were asked for.
    """

    count: int
    minimum: float
    maximum: float
    finite: bool
    sum_squares: float
    batch_minima: Floats
    batch_maxima: Floats
    channel_axis: int | None = None
    channel_minimum: Floats | None = None
    channel_maximum: Floats | None = None
    sketch: Sketch | None = None

    @property
    def mean_square(self) -> float:
        """The mean of the squared elements; 0 where none was seen."""
        return self.sum_squares / self.count if self.count else 0.0

    @property
    def absolute_maximum(self) -> float:
        """The largest magnitude; 0 where no element was seen."""
        return max(abs(self.minimum), abs(self.maximum)) if self.count else 0.0

    def merge(self, other: TensorStatistics) -> TensorStatistics:
        """The statistics of both sets of elements together; the batches of `other` come after these.

        Raises:
            DataError: the channels are along different axes, or their number differs; or one has no distribution.
        """
        if self.count and other.count and (self.sketch is None) != (other.sketch is None):
            raise DataError("the distribution was measured in one run only")
        if self.channel_axis != other.channel_axis:
            raise DataError(f"channels along axis {self.channel_axis} and {other.channel_axis}: observe the same axis")
        return TensorStatistics(
            count=self.count + other.count,
            minimum=float(np.fmin(self.minimum, other.minimum)),
            maximum=float(np.fmax(self.maximum, other.maximum)),
            finite=self.finite and other.finite,
            sum_squares=self.sum_squares + other.sum_squares,
            batch_minima=np.concatenate([self.batch_minima, other.batch_minima]),
            batch_maxima=np.concatenate([self.batch_maxima, other.batch_maxima]),
            channel_axis=self.channel_axis,
            channel_minimum=_merge_channels(np.fmin, self.channel_minimum, other.channel_minimum),
            channel_maximum=_merge_channels(np.fmax, self.channel_maximum, other.channel_maximum),
            sketch=_merge_sketches(self.sketch, other.sketch),
        )


def _merge_channels(function: np.ufunc, left: Floats | None, right: Floats | None) -> Floats | None:
    if left is None or right is None:
        return None
    if left.shape != right.shape:
        raise DataError(f"{left.size} and {right.size} channels: the size of a channel axis must not change")
    return np.asarray(function(left, right), np.float32)


def _merge_sketches(left: Sketch | None, right: Sketch | None) -> Sketch | None:
    if left is None or right is None:
        return left or right
    return left.merge(right)


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Everything that a calibration run measured.

    Attributes:
        tensors: by value name.
        batches: how many batches were run.
        samples: the sizes of the first axis of the first input, added up.
        data: the `qonnx.data.Digest` of these batches, as hexadecimal digits.
        model: the `qonnx.fingerprint.fingerprint` of the model they were run through; "" where nobody noted it.
        warnings: what the user should know before using them; neither merged nor saved.
    """

    tensors: Mapping[str, TensorStatistics]
    batches: int = 0
    samples: int = 0
    data: str = ""
    model: str = ""
    warnings: tuple[str, ...] = ()

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both runs together, as if one run had seen the data of both.

        Raises:
            DataError: the two runs did not observe the same values, or different models.
        """
        if self.model and other.model and self.model != other.model:
            raise DataError("cannot merge: the two were measured on different models; calibrate the same one")
        model = self.model or other.model
        if not self.batches and not self.tensors:
            return other if other.model == model else dataclasses.replace(other, model=model)
        if not other.batches and not other.tensors:
            return self if self.model == model else dataclasses.replace(self, model=model)
        if self.tensors.keys() != other.tensors.keys():
            odd = min(self.tensors.keys() ^ other.tensors.keys())
            raise DataError(
                f"cannot merge: value {odd!r} was observed in one run only; calibrate both for one target and recipe"
            )
        merged = {}
        for name, left in self.tensors.items():
            try:
                merged[name] = left.merge(other.tensors[name])
            except DataError as error:
                raise DataError(f"cannot merge value {name!r}: {error}") from None
        data = Digest(self.data).merge(Digest(other.data)).hexdigest()
        return Statistics(merged, self.batches + other.batches, self.samples + other.samples, data, model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one `.npz` file; it appears whole or not at all, and equal statistics give equal bytes.

        Raises:
            OutputError: the folder does not exist or cannot be written.
        """
        path = Path(path)
        with staging(path) as folder:
            try:
                with open(folder / path.name, "wb") as file:
                    np.savez_compressed(file, allow_pickle=False, **_to_arrays(self))
            except OSError as error:
                raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
            publish(folder, path.parent)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Reads what `save` wrote.

        Raises:
            DataError: the file is missing, damaged, or is not a file of statistics.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: no such file; `qonnx calibrate` writes one")
        try:
            with open(path, "rb") as file:  # not left to numpy: it forgets to close a damaged file
                archive = np.load(file, allow_pickle=False)
                if not isinstance(archive, np.lib.npyio.NpzFile) or "header" not in archive:
                    raise DataError(f"{path}: not a file of statistics; `qonnx calibrate` writes one")
                return _from_arrays({name: archive[name] for name in archive.files}, path)
        except DataError:
            raise
        except Exception as error:  # zipfile, zlib and numpy raise many types for a damaged file
            raise DataError(f"{path}: not readable as statistics ({error}); calibrate again") from error


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `save` writes besides arrays, as JSON: npz member names cannot hold every value name."""

    format: int
    batches: int
    samples: int
    data: str
    model: str
    names: list[str]
    channel_axes: dict[str, int]


def _to_arrays(statistics: Statistics) -> dict[str, npt.NDArray[Any]]:
    tensors = list(statistics.tensors.values())
    axes = {name: t.channel_axis for name, t in statistics.tensors.items() if t.channel_axis is not None}
    known = (statistics.batches, statistics.samples, statistics.data, statistics.model)
    header = _Header(FORMAT, *known, list(statistics.tensors), axes)
    arrays: dict[str, npt.NDArray[Any]] = {
        "header": np.frombuffer(msgspec.json.encode(header), np.uint8),
        "count": np.array([t.count for t in tensors], np.int64),
        "minimum": np.array([t.minimum for t in tensors], np.float64),
        "maximum": np.array([t.maximum for t in tensors], np.float64),
        "finite": np.array([t.finite for t in tensors], np.bool_),
        "sum_squares": np.array([t.sum_squares for t in tensors], np.float64),
        "batch_minima": _rows([t.batch_minima for t in tensors]),
        "batch_maxima": _rows([t.batch_maxima for t in tensors]),
    }
    for index, tensor in enumerate(tensors):
        if tensor.channel_minimum is not None and tensor.channel_maximum is not None:
            arrays[f"channel_minimum_{index}"] = tensor.channel_minimum
            arrays[f"channel_maximum_{index}"] = tensor.channel_maximum
        if tensor.sketch is not None:  # differences between cells, in the narrowest types: they compress well
            arrays[f"cells_{index}"] = np.diff(tensor.sketch.cells, prepend=np.uint32(0))
            counts = tensor.sketch.counts
            arrays[f"counts_{index}"] = counts.astype(np.min_scalar_type(int(counts.max(initial=0))))
    return arrays


def _rows(arrays: Sequence[Floats]) -> Floats:
    return np.stack(arrays) if arrays else np.zeros((0, 0), np.float32)


def _from_arrays(arrays: Mapping[str, npt.NDArray[Any]], path: Path) -> Statistics:
    header = msgspec.json.decode(arrays["header"].tobytes())
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise DataError(f"{path}: written by another version of qonnx; calibrate again")
    header = msgspec.convert(header, _Header)
    tensors = {}
    for index, name in enumerate(header.names):
        tensors[name] = TensorStatistics(
            count=int(arrays["count"][index]),
            minimum=float(arrays["minimum"][index]),
            maximum=float(arrays["maximum"][index]),
            finite=bool(arrays["finite"][index]),
            sum_squares=float(arrays["sum_squares"][index]),
            batch_minima=arrays["batch_minima"][index],
            batch_maxima=arrays["batch_maxima"][index],
            channel_axis=header.channel_axes.get(name),
            channel_minimum=arrays[f"channel_minimum_{index}"] if name in header.channel_axes else None,
            channel_maximum=arrays[f"channel_maximum_{index}"] if name in header.channel_axes else None,
            sketch=_sketch(arrays, index),
        )
    return Statistics(tensors, header.batches, header.samples, header.data, header.model)


def _sketch(arrays: Mapping[str, npt.NDArray[Any]], index: int) -> Sketch | None:
    if f"cells_{index}" not in arrays:
        return None
    cells = np.cumsum(arrays[f"cells_{index}"], dtype=np.uint32)
    return Sketch(cells, arrays[f"counts_{index}"].astype(np.int64))


def from_batch(
    count: int,
    minimum: float,
    maximum: float,
    sum_squares: float,
    channel_axis: int | None = None,
    channel_minimum: Floats | None = None,
    channel_maximum: Floats | None = None,
) -> TensorStatistics:
    """The statistics of one batch, from what the observers in the graph returned.

    The sum of squares is NaN if an element was NaN, whatever the extremes say: runtimes differ in whether a minimum
    passes NaN on. An infinite sum with finite extremes is float32 overflow, not an infinite element.
    """
    finite = not math.isnan(sum_squares) and (count == 0 or (math.isfinite(minimum) and math.isfinite(maximum)))
    return TensorStatistics(
        count=count,
        minimum=minimum,
        maximum=maximum,
        finite=finite,
        sum_squares=sum_squares,
        batch_minima=np.array([minimum], np.float32),
        batch_maxima=np.array([maximum], np.float32),
        channel_axis=channel_axis,
        channel_minimum=channel_minimum,
        channel_maximum=channel_maximum,
    )


class Part(NamedTuple):
    """What the observers in the graph returned of a batch, or of a piece of it: see `from_batch`."""

    elements: int
    sum_squares: float
    minimum: float
    maximum: float
    channel_minimum: Floats | None
    channel_maximum: Floats | None


def from_parts(parts: Sequence[Part], channel_axis: int | None) -> TensorStatistics:
    """The statistics of one batch, from its pieces, of which there is one at least.

    Raises:
        DataError: the pieces have other numbers of channels.
    """
    counts, squares, minima, maxima, channel_minima, channel_maxima = zip(*parts, strict=True)
    return from_batch(
        count=sum(counts),
        minimum=float(np.min(minima)),  # NaN if one of them is
        maximum=float(np.max(maxima)),
        sum_squares=sum(squares),
        channel_axis=channel_axis,
        channel_minimum=functools.reduce(functools.partial(_merge_channels, np.fmin), channel_minima),
        channel_maximum=functools.reduce(functools.partial(_merge_channels, np.fmax), channel_maxima),
    )


def with_sketch(tensor: TensorStatistics, sketch: Sketch) -> TensorStatistics:
    """The statistics with the distribution and what it tells: the sum of the squares, and whether NaN was seen."""
    finite = tensor.finite and not sketch.nonfinite
    return dataclasses.replace(tensor, sketch=sketch, finite=finite, sum_squares=sketch.sum_squares)
