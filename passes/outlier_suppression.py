"""Outlier Suppression+: channels are moved to the middle of their range, then only those that stick out are shrunk.

    z_j = (max X_j + min X_j) / 2                           equation 5
    s_j = max(1, max |X_j - z_j| / t)                       equation 8

From: Wei et al., "Outlier Suppression+", EMNLP 2023. The threshold t is searched: the one with the least error in the
results of the layers (equation 6), `qonnx.group_error.GroupError`. Where nothing can absorb an offset, as behind an
RMSNormalization, z is 0 and the rest is the same.

One token with an outlier in a channel moves the centre of that channel. With `percentile` below 100, extremes that are
rarer than that do not count for the centre; they still count for s.
"""

from __future__ import annotations

import msgspec
import numpy as np

from qonnx.channels import FOREIGN
from qonnx.errors import RecipeError
from qonnx.group_error import Choice, GroupError, Ranges, Samples, Vector, best
from qonnx.groups import SmoothGroup

# Thresholds: 21 from the largest magnitude down to a 1024th of it (massive activations are 1000 times larger than what
# a channel usually holds), then eight between the neighbours of the best one.
_COARSE = np.geomspace(1.0, 1 / 1024, 21)
_FINE = 10


class OutlierSuppression(
    msgspec.Struct, frozen=True, tag_field="kind", tag="outlier_suppression", forbid_unknown_fields=True
):
    """See the module docstring.

    Attributes:
        shift: whether channels are moved to the middle of their range, where that is possible.
        percentile: of the elements of a channel, how many count for its centre; 100 for all.
        nodes: whether a group may cost a Mul and an Add at run time.
    """

    shift: bool = True
    percentile: float = 100.0
    nodes: bool = True

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise RecipeError(
                f"outlier_suppression: percentile must be above 50 and at most 100, not {self.percentile:g}"
            )

    def choose(self, group: SmoothGroup, ranges: Ranges, error: GroupError, samples: Samples) -> Choice | None:
        """The factors and offsets of a group; None where it is best left alone."""
        if not error.measurable:
            return None
        centres = [np.zeros(group.producer.size)]
        if self.shift and not group.no_shift and not group.clips:
            centres.append(np.where(group.free, self._centre(group, ranges, samples), 0.0))
        found = [self._search(group, ranges, shift, error) for shift in centres]
        return best(found, error)

    def _centre(self, group: SmoothGroup, ranges: Ranges, samples: Samples) -> Vector:
        """[channels] the middle of the range of each."""
        if self.percentile == 100:
            return (ranges.low + ranges.high) / 2
        low, high = np.full(group.producer.size, np.inf), np.full(group.producer.size, -np.inf)
        for name, (_, index) in group.inputs.items():
            if name in samples:
                ours = index != FOREIGN
                ends = np.percentile(samples[name][:, ours], [100 - self.percentile, self.percentile], axis=0)
                np.minimum.at(low, index[ours], ends[0])
                np.maximum.at(high, index[ours], ends[1])
        seen = low <= high
        low, high = np.where(seen, low, ranges.low), np.where(seen, high, ranges.high)
        return np.asarray((low + high) / 2)

    def _search(self, group: SmoothGroup, ranges: Ranges, shift: Vector, error: GroupError) -> Choice:
        """The best threshold for these offsets."""
        reach = np.maximum(ranges.high - shift, shift - ranges.low)
        largest = float(reach[group.free].max(initial=0.0))
        if group.no_scale or not largest > 0:
            return _choice(group, reach, shift, max(largest, 1.0))
        thresholds = largest * _COARSE
        coarse = best((_choice(group, reach, shift, threshold) for threshold in thresholds), error)
        place = int(np.argmin(np.abs(thresholds - coarse.parameter)))
        upper, lower = thresholds[max(place - 1, 0)], thresholds[min(place + 1, thresholds.size - 1)]
        fine = np.linspace(upper, lower, _FINE)[1:-1]
        return best((coarse, *(_choice(group, reach, shift, threshold) for threshold in fine)), error)


def _choice(group: SmoothGroup, reach: Vector, shift: Vector, threshold: float) -> Choice:
    scale = np.where(group.free, suppressing_factors(reach, threshold), 1.0)
    if group.no_scale:
        scale = np.ones_like(reach)
    moved = " after a shift" if shift.any() else ""
    return Choice(scale, shift, threshold, f"Outlier Suppression+, threshold {threshold:.4g}{moved}")


def suppressing_factors(reach: Vector, threshold: float) -> Vector:
    """[channels] the factors s that bring every channel within the threshold.

    >>> suppressing_factors(np.array([1.0, 6.0]), 2.0)
    array([1., 3.])
    """
    return np.asarray(np.maximum(1.0, reach / threshold))
