"""Whether calibration can be trusted: what its ranges cut off, what held-back data exceed, what too few data hide.

Every function takes what was measured and returns findings; none decides anything. `diagnose` puts them together; it
runs the float model once over the held-back batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.calibrators import Auto, Calibrator, Entropy, MinMax, Percentile
from qonnx.channel_maxima import channel_maxima
from qonnx.errors import DataError
from qonnx.linear import CONVOLUTIONS
from qonnx.numerics import Dtype
from qonnx.plan import QuantPlan
from qonnx.ranges import Range, calibrated
from qonnx.sketch import Cells
from qonnx.statistics import Statistics

# From here on samples are few by any account: published calibration sets have 100 to 1000.
FEW_SAMPLES = 32

# A threshold that fewer elements lie beyond was set by chance.
FEW_ELEMENTS = 10

# How much larger than the calibrated one a held-back magnitude may be before static scales are in doubt.
EXCESS = 1.2

# A channel with magnitudes above this many times the median channel's is an outlier.
OUTLIER_FACTOR = 20.0

# Outliers that are in the same channels for this share of the samples are there for good.
_CONSTANT_SHARE = 0.9

# Samples that are compared in pairs: time and memory grow with their square, and the samples of matrices that hold one
# token a row are many. Half a million pairs tell a mean.
_PAIRED_SAMPLES = 1000

Floats = npt.NDArray[np.float32]


class Saturation(msgspec.Struct, frozen=True):
    """What the range of one tensor cuts off.

    Attributes:
        value: the tensor.
        below: share of its elements that are smaller than the range's lower end.
        above: share that are larger than its upper end.
    """

    value: str
    below: float
    above: float

    @property
    def share(self) -> float:
        """Of all elements."""
        return self.below + self.above


class Excess(msgspec.Struct, frozen=True):
    """A tensor that grew on data that calibration did not see.

    Attributes:
        value: the tensor.
        calibrated: the largest magnitude during calibration.
        held_out: the largest magnitude on the other data.
    """

    value: str
    calibrated: float
    held_out: float

    @property
    def ratio(self) -> float:
        """Held out over calibrated; infinite where calibration saw zeros only."""
        return self.held_out / self.calibrated if self.calibrated else math.inf


class Outliers(msgspec.Struct, frozen=True):
    """The outlier channels of one tensor, on held-back data.

    Attributes:
        value: the tensor.
        consistency: whether they stay where they are.
    """

    value: str
    consistency: Consistency


class Diagnostics(msgspec.Struct, frozen=True):
    """What is to be said about calibration.

    Attributes:
        warnings: what speaks against relying on the ranges, a line each.
        saturations: what the chosen range of each activation cuts off, the worst first.
        excesses: activations that are larger on held-back data by more than 20 %, the worst first.
        outliers: inputs of layers that have outlier channels on held-back data, the least consistent first.
    """

    warnings: tuple[str, ...] = ()
    saturations: tuple[Saturation, ...] = ()
    excesses: tuple[Excess, ...] = ()
    outliers: tuple[Outliers, ...] = ()


class Consistency(msgspec.Struct, frozen=True):
    """Whether the outliers of a tensor stay in the same channels from sample to sample.

    Attributes:
        jaccard: mean over pairs of samples of |S_i & S_k| / |S_i | S_k|, S_i being the outlier channels of sample i;
            pairs without any outlier are left out. 1: always the same channels. NaN where no pair has one. Of more than
            1000 samples, pairs of 1000 that are spread evenly.
        constant: the channels that are outliers in at least 90 % of the samples.
        outliers: the mean number of outlier channels in a sample.
        top_jaccard: the same mean for the largest 1 % of the channels (at least one) of each sample.
    """

    jaccard: float
    constant: tuple[int, ...]
    outliers: float
    top_jaccard: float


def saturations(statistics: Statistics, ranges: Mapping[str, Range]) -> tuple[Saturation, ...]:
    """What each range cuts off, the worst first; only tensors whose distribution was measured.

    A cell of the sketch that an end of the range lies in counts by the part beyond it. The share is thus uncertain by
    the elements within 0.05 % of the ends; beyond the extremes that were seen there is none.
    """
    found = []
    for value, range_ in ranges.items():
        tensor = statistics.tensors.get(value)
        if tensor is None or tensor.sketch is None or not tensor.finite or not tensor.count:
            continue
        cells = tensor.sketch.values()
        total = int(cells.counts.sum())
        above = _beyond(cells, range_.high) if tensor.maximum > range_.high else 0.0
        below = _beyond(_mirrored(cells), -range_.low) if tensor.minimum < range_.low else 0.0
        found.append(Saturation(value, below / total, above / total))
    return tuple(sorted(found, key=lambda saturation: -saturation.share))


def _beyond(cells: Cells, threshold: float) -> float:
    """How many elements are above a threshold."""
    part = np.clip((cells.high - threshold) / (cells.high - cells.low), 0.0, 1.0)
    return float(np.sum(part * cells.counts))


def _mirrored(cells: Cells) -> Cells:
    return Cells(-cells.high[::-1], -cells.low[::-1], cells.counts[::-1])


def diagnose(
    model: ir.Model,
    plan: QuantPlan,
    statistics: Statistics,
    held_out: Iterable[Mapping[str, npt.NDArray[Any]]],
    calibrator: Calibrator | Auto,
    *,
    symmetric: bool,
) -> Diagnostics:
    """What the ranges of a plan cut off, and what batches that calibration did not see say about them.

    Args:
        model: the prepared float model that the plan was made for; it is not changed.
        plan: whose ranges are judged.
        statistics: that they were made from.
        held_out: batches; the model is run over them once, which is all that this costs.
        calibrator: that made the ranges.
        symmetric: whether 0 is in the middle of the grid.
    """
    if not plan.activations:
        return Diagnostics()
    chosen = {tensor.value: Range(tensor.low, tensor.high, tensor.source) for tensor in plan.activations}
    layers = {layer.node: layer.op for layer in plan.quantized_layers}
    axes: dict[str, int | None] = {}
    for tensor in plan.activations:
        readers = {layers[edge.node] for edge in tensor.edges if edge.node in layers}
        axes[tensor.value] = None if not readers else 1 if readers & CONVOLUTIONS else -1
    maxima = channel_maxima(model, axes, held_out)
    outliers = [Outliers(value, outlier_consistency(x)) for value, x in maxima.items() if _comparable(x)]
    known = [
        value for value, (_, _, source) in chosen.items() if source.startswith("softmax")
    ]  # no calibrator chose it
    counted = [value for value in chosen if value in statistics.tensors and value not in known]
    dtype = plan.activations[0].dtype
    return Diagnostics(
        warnings=warnings(counted, statistics, calibrator, dtype, symmetric=symmetric),
        saturations=saturations(statistics, chosen),
        excesses=excesses(statistics, {value: float(x.max()) for value, x in maxima.items() if x.size}),
        outliers=tuple(sorted((o for o in outliers if o.consistency.outliers), key=lambda o: o.consistency.jaccard)),
    )


def _comparable(maxima: Floats) -> bool:
    return maxima.shape[0] > 1 and maxima.shape[1] > 1 and bool(np.isfinite(maxima).all())


def excesses(statistics: Statistics, held_out: Mapping[str, float], factor: float = EXCESS) -> tuple[Excess, ...]:
    """The tensors whose magnitude on other data exceeds the calibrated one by more than a factor, the worst first.

    Args:
        statistics: of calibration.
        held_out: the largest magnitudes on data that calibration did not see; tensors that are in one of the two only,
            or not finite in one, are left out.
        factor: 1.2 is 20 % more.
    """
    found = []
    for value, tensor in statistics.tensors.items():
        other = held_out.get(value, math.nan)
        if not (tensor.count and tensor.finite and math.isfinite(other)):
            continue
        if other > factor * tensor.absolute_maximum:
            found.append(Excess(value, tensor.absolute_maximum, other))
    return tuple(sorted(found, key=lambda excess: -excess.ratio))


def outlier_consistency(absmax: npt.ArrayLike, threshold: float | None = None) -> Consistency:
    """Whether outliers stay in the same channels for other inputs, which scales per channel rely on.

    LLM.int8() (Dettmers et al., arXiv 2208.07339) calls magnitudes above 6 outliers, SmoothQuant (arXiv 2211.10438)
    assumes that they stay where they are. A mean below 0.5 says that they do not.

    Args:
        absmax: [samples, channels] the largest magnitude in each channel of each sample, two samples or more.
        threshold: magnitudes above it are outliers; None: 20 times the median channel of each sample, of those that
            are not 0: behind a Relu half of them often are, and no grid is too coarse for a 0.

    Raises:
        DataError: the array has another shape, or elements that are negative, NaN or infinite.

    Example:
        >>> import numpy as np
        >>> absmax = np.ones((4, 100), np.float32)
        >>> absmax[:, 7], absmax[0, 3] = 60, 60
        >>> outlier_consistency(absmax)
        Consistency(jaccard=0.75, constant=(7,), outliers=1.25, top_jaccard=0.5)
    """
    x = np.asarray(absmax, np.float32)
    if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] < 1:
        raise DataError(f"channel maxima of shape {x.shape}: give [samples, channels] with two samples or more")
    if not (np.isfinite(x).all() and (x >= 0).all()):
        raise DataError("channel maxima that are negative, NaN or infinite: give largest magnitudes of finite elements")
    bound = _usual(x) * OUTLIER_FACTOR if threshold is None else threshold
    outlier = x > bound
    largest = np.argsort(-x, axis=1, kind="stable")[:, : max(1, round(x.shape[1] / 100))]
    top = np.zeros_like(outlier)
    np.put_along_axis(top, largest, True, axis=1)
    constant = np.flatnonzero(outlier.mean(axis=0) >= _CONSTANT_SHARE)
    return Consistency(
        jaccard=_mean_jaccard(outlier),
        constant=tuple(int(channel) for channel in constant),
        outliers=float(outlier.sum(axis=1).mean()),
        top_jaccard=_mean_jaccard(top),
    )


def _usual(x: Floats) -> Floats:
    """[samples, 1] the median over the channels that are not 0; 0 where all are."""
    counted = np.where((x > 0) | ~x.any(axis=1, keepdims=True), x, np.float32(np.nan))
    return np.asarray(np.nanmedian(counted, axis=1, keepdims=True), np.float32)


def _mean_jaccard(members: npt.NDArray[np.bool_]) -> float:
    """Over pairs of rows of [samples, channels] of which at least one is not empty."""
    few = np.linspace(0, len(members) - 1, min(len(members), _PAIRED_SAMPLES)).astype(np.int64)
    rows = members[few].astype(np.float32)  # exact up to 2^24 channels; integers have no fast product
    common = rows @ rows.T
    sizes = rows.sum(axis=1)
    union = sizes[:, None] + sizes - common
    pairs = np.triu(union > 0, 1)
    return float(np.mean(common[pairs] / union[pairs], dtype=np.float64)) if pairs.any() else math.nan


def channel_excess(calibrated: npt.ArrayLike, held_out: npt.ArrayLike) -> float:
    """The 95th percentile over channels of the held-out over the calibrated largest magnitude.

    Above 1.2, static scales per channel will clip. Channels that calibration saw as zeros only count as infinite,
    unless they stay 0.

    Args:
        calibrated: [channels] the largest magnitudes during calibration.
        held_out: [channels] those on other data.

    Raises:
        DataError: the two differ in shape, or are empty.

    Example:
        >>> channel_excess([1.0, 2.0, 4.0], [1.0, 2.0, 8.0])
        2.0
    """
    before, after = np.asarray(calibrated, np.float64), np.asarray(held_out, np.float64)
    if before.shape != after.shape or not before.size:
        raise DataError(f"channel maxima of shapes {before.shape} and {after.shape}: give one for each channel in both")
    ratio = np.full(before.shape, math.inf)
    np.divide(after, before, out=ratio, where=before > 0)
    ratio[(before == 0) & (after == 0)] = 1.0
    return float(np.percentile(ratio, 95, method="higher"))


def warnings(
    values: Iterable[str], statistics: Statistics, calibrator: Calibrator | Auto, dtype: Dtype, *, symmetric: bool
) -> tuple[str, ...]:
    """What speaks against relying on the ranges of one calibrator, a line each; of `auto`, that data are few.

    * fewer than 32 samples were seen;
    * the calibrator gives the range of min-max for every tensor, although it is one that clips;
    * for some tensors fewer than 10 elements lie beyond the threshold of entropy, or would beyond a percentile. Such a
      threshold is close to the largest elements, which chance decides.

    Args:
        values: names of the tensors that are to be quantized.
        statistics: of these tensors.
        calibrator: whose ranges are judged.
        dtype: the type of the codes.
        symmetric: whether 0 is in the middle of the grid.
    """
    found = []
    if statistics.samples < FEW_SAMPLES:
        found.append(f"calibrated on {statistics.samples} samples: too few to tell; give {FEW_SAMPLES} or more")
    if isinstance(calibrator, MinMax | Auto) or not (values := list(values)):
        return tuple(found)
    ranges = calibrated(values, statistics, calibrator, dtype, symmetric=symmetric)
    extremes = calibrated(values, statistics, MinMax(), dtype, symmetric=symmetric)
    kind = msgspec.to_builtins(calibrator)["kind"]
    if ranges and all(ranges[value][:2] == extremes[value][:2] for value in ranges):
        found.append(f"calibrator {kind} gives the range of minmax for every tensor: it clips nothing; give more data")
    elif chance := _by_chance(statistics, ranges, calibrator):
        found.append(
            f"calibrator {kind}: fewer than {FEW_ELEMENTS} elements lie beyond the threshold of {len(chance)} of "
            f"{len(ranges)} tensors, {chance[0]!r} for one: chance decided it; give more data"
        )
    return tuple(found)


def _by_chance(statistics: Statistics, ranges: Mapping[str, Range], calibrator: Calibrator) -> list[str]:
    """The tensors whose threshold rests on too few elements."""
    if isinstance(calibrator, Percentile):  # what should lie beyond: many equal largest elements are no chance
        cut = 1 - calibrator.percentile / 100
        return [value for value in ranges if 0 < cut * statistics.tensors[value].count < FEW_ELEMENTS]
    if not isinstance(calibrator, Entropy):
        return []
    counts = [(s.value, s.share * statistics.tensors[s.value].count) for s in saturations(statistics, ranges)]
    return [value for value, count in counts if 0 < count < FEW_ELEMENTS]  # 0: it decided to clip nothing
