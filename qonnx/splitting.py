"""Which channels to repeat before smoothing: those that stick out so far that no factor alone can save the others.

A factor makes an outlier smaller and its weight larger. Where one channel is a thousand times wider than the others,
one of both is in the way whatever the factor. With the channel repeated, each copy carries a part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.group_error import GroupError, Quantizers, Samples, Vector, decibels, measure
from qonnx.groups import SmoothGroup, find_groups
from qonnx.passes.outlier_suppression import OutlierSuppression
from qonnx.passes.split_channels import Split, SplitChannels, find_region
from qonnx.producers import Kind
from qonnx.statistics import Statistics

# A tensor is looked at where its widest channel is so many times wider than the median one.
_STICKS_OUT = 16.0

# It gets one more channel for so many, in multiples of what tensor cores work on.
_CHANNELS_PER_COPY = 32
_MULTIPLE = 16

# What the results of a layer must gain over factors alone, for a few percent of its time and weights.
_WORTH_IT_DB = 2.0


def find_splits(
    model: ir.Model,
    groups: Sequence[SmoothGroup],
    statistics: Statistics,
    samples: Samples,
    quantizers: Quantizers,
) -> dict[str, Split]:
    """The groups that gain by copies, by value, and the copies: 2 dB at least over the best factors without.

    Args:
        model: prepared; it is not changed.
        groups: all groups of this model.
        statistics: of every tensor of `qonnx.group_error.channel_axes(groups)`, per channel.
        samples: rows of these tensors.
        quantizers: those that will be used.
    """
    tried = {group.value: split for group in groups if (split := _candidate(group, statistics)) is not None}
    if not tried:
        return {}
    wide = model.clone()
    SplitChannels(tuple(tried.values()))(wide)
    now = {group.value: group for group in groups}
    after = {group.value: group for group in find_groups(wide)}
    more, rows = repeated(statistics, samples, tried, after.values())
    return {
        value: split
        for value, split in tried.items()
        if value in after
        and _best(after[value], more, rows, quantizers)
        >= _best(now[value], statistics, samples, quantizers) + _WORTH_IT_DB
    }


def repeated(
    statistics: Statistics, samples: Samples, splits: Mapping[str, Split], groups: Iterable[SmoothGroup]
) -> tuple[Statistics, dict[str, npt.NDArray[np.float32]]]:
    """Statistics per channel, and samples, as they would be measured on the model with the copies.

    Args:
        statistics: of the model without.
        samples: of the model without.
        splits: by the value of their group.
        groups: of the model with the copies.
    """
    tensors, rows = dict(statistics.tensors), dict(samples)
    for group in groups:
        index = splits[group.value].index if group.value in splits else None
        for name in group.inputs if index is not None else ():
            seen = tensors[name]
            low, high = seen.channel_minimum, seen.channel_maximum
            if low is not None and high is not None:
                tensors[name] = replace(seen, channel_minimum=low[index], channel_maximum=high[index])
            if name in rows:
                rows[name] = rows[name][:, index]
    return replace(statistics, tensors=tensors), rows


def copies_of(reach: Vector, extra: int) -> tuple[int, ...]:
    """How often to have each channel so that the widest share of one is narrowest, with so many copies more.

    >>> copies_of(np.array([1.0, 9.0, 4.0]), 3)
    (1, 3, 2)
    """
    copies = np.ones(reach.size, int)
    for _ in range(extra):
        copies[np.argmax(reach / copies)] += 1
    return tuple(copies.tolist())


def _candidate(group: SmoothGroup, statistics: Statistics) -> Split | None:
    if (
        group.reason
        or group.no_scale
        or group.taps
        or len(group.consumers) != 1
        or group.producer.kind is not Kind.LINEAR
    ):
        return None
    linear = group.consumers[0].linear
    seen = statistics.tensors.get(linear.data.name or "")
    if seen is None or seen.channel_minimum is None or seen.channel_maximum is None or not seen.finite:
        return None
    reach = np.maximum(-seen.channel_minimum, seen.channel_maximum).astype(np.float64)
    extra = reach.size // _CHANNELS_PER_COPY // _MULTIPLE * _MULTIPLE
    if not extra or reach.max() <= _STICKS_OUT * np.median(reach) or find_region(linear.node) is None:
        return None
    return Split(linear.node.name or "", copies_of(reach, extra))


def _best(group: SmoothGroup, statistics: Statistics, samples: Samples, quantizers: Quantizers) -> float:
    """What the results of the layers keep with the best factors, in dB."""
    ranges = measure(group, statistics)
    error = GroupError(group, ranges, samples, quantizers)
    choice = OutlierSuppression(shift=False).choose(group, ranges, error, samples)
    return -np.inf if choice is None else decibels(error(choice.scale, choice.shift))
