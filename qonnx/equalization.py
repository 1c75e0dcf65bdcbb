"""Equalization, decided: which channels get factors, which tensors an offset, what that gains, or why not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from qonnx.channels import FOREIGN
from qonnx.errors import DataError
from qonnx.group_error import Choice, GroupError, Quantizers, Ranges, Samples, decibels, measure
from qonnx.group_report import GroupReport, added_nodes, blank_report, crest, weight_growth
from qonnx.groups import Consumer, SmoothGroup
from qonnx.passes.equalize import Equalization, channel_factors, cross_layer_factors, is_depthwise
from qonnx.passes.rescale_channels import Rescaling
from qonnx.passes.shift_range import Offset, middle
from qonnx.statistics import Statistics

Vector = npt.NDArray[np.float64]

# What a tensor has to gain, in dB, to be moved at all, and for each node that it then takes at run time.
_WORTH_IT_DB = 0.5
_WORTH_A_NODE_DB = 1.0


def equalize(
    groups: Sequence[SmoothGroup],
    method: Equalization,
    statistics: Statistics,
    samples: Samples,
    quantizers: Quantizers,
    quantized: Collection[str] | None = None,
    leave: Mapping[str, str] | None = None,
) -> tuple[tuple[Rescaling, ...], tuple[GroupReport, ...]]:
    """Decides what to do with every group; nothing is changed.

    A group is changed where samples say that its layers gain, by 1 dB at least for each node that it takes at run time.
    Where weights have one scale, factors are those that balance them across layers, whatever a single group gains.

    Args:
        groups: all groups of a model, found with `bounds`.
        method: what is wanted.
        statistics: of every tensor of `qonnx.group_error.channel_axes(groups)`, per channel.
        samples: rows of these tensors.
        quantizers: those that will be used.
        quantized: the names of the linear layers that will be quantized; None for all.
        leave: groups to leave alone, by value, with the reason.

    Returns:
        What to do, for the groups that gain; and one report per group.
    """
    across = method.factors and not quantizers.per_channel
    factors = cross_layer_factors(groups) if across else [np.ones(group.producer.size) for group in groups]
    rescalings, reports = [], []
    for group, scale in zip(groups, factors, strict=True):
        readers = [one for one in group.consumers if quantized is None or one.linear.node.name in quantized]
        reason = group.reason or (leave or {}).get(group.value, "")
        if reason or not readers:
            reports.append(
                msgspec.structs.replace(blank_report(group), reason=reason or "none of its layers is quantized")
            )
            continue
        rescaling, report = _decide(group, readers, scale, method, statistics, samples, quantizers)
        reports.append(report)
        rescalings += [rescaling] if rescaling is not None else []
    return tuple(rescalings), tuple(reports)


def _decide(
    group: SmoothGroup,
    readers: Sequence[Consumer],
    scale: Vector,
    method: Equalization,
    statistics: Statistics,
    samples: Samples,
    quantizers: Quantizers,
) -> tuple[Rescaling | None, GroupReport]:
    report = blank_report(group)
    try:
        ranges = measure(group, statistics)
    except DataError as unusable:
        return None, msgspec.structs.replace(report, reason=str(unusable))
    depthwise = all(is_depthwise(reader.linear) for reader in readers)
    if method.factors and quantizers.per_channel and depthwise and not group.no_scale:
        scale = np.where(group.free, channel_factors(np.where(group.free, ranges.reach, 0.0)), 1.0)
    found, why = _offset(group, readers, scale, method, ranges, quantizers)
    none = Offset(np.zeros(scale.shape), 0.0)
    error = GroupError(dataclasses.replace(group, consumers=tuple(readers)), ranges, samples, quantizers)
    before = _keeps(error, np.ones(scale.shape), none.shift)
    report = msgspec.structs.replace(report, crest=crest(ranges.reach), sqnr_db=before)
    for offset in (found, none):  # where an offset does not pay for its nodes, factors still may
        if not (offset.shift.any() or (scale != 1).any()):
            continue
        choice = Choice(scale, offset.shift, 0.0, _words(scale, offset))
        nodes = added_nodes(group, choice) + (len(group.padded) if offset.shift.any() else 0)
        after = _keeps(error, scale, offset.shift)
        gain = math.inf if before is None or after is None else after - before
        least = _WORTH_A_NODE_DB * nodes if quantizers.per_channel or nodes else -math.inf
        if gain < least:
            why = f"{choice.method}, its layers would gain {gain:.1f} dB" + (f", not worth {nodes} nodes" * bool(nodes))
            continue
        return Rescaling(group, scale, offset.shift, choice.method), msgspec.structs.replace(
            report,
            changed=int(((scale != 1) | (offset.shift != 0)).sum()),
            method=choice.method,
            nodes=nodes,
            smoothed_crest=crest(np.maximum(ranges.high - offset.shift, offset.shift - ranges.low) / scale),
            weight_growth=weight_growth(group, choice),
            smoothed_sqnr_db=after,
        )
    return None, msgspec.structs.replace(report, reason=why)


def _keeps(error: GroupError, scale: Vector, shift: Vector) -> float | None:
    return round(decibels(error(scale, shift)), 2) if error.measurable else None


def _offset(
    group: SmoothGroup,
    readers: Sequence[Consumer],
    scale: Vector,
    method: Equalization,
    ranges: Ranges,
    quantizers: Quantizers,
) -> tuple[Offset, str]:
    """The offset of a group whose channels are divided by these factors, and why there is none."""
    none = Offset(np.zeros(scale.shape), 0.0)
    why = _no_offset(group, readers, method, quantizers)
    if why:
        return none, why
    found = middle(ranges.low / scale, ranges.high / scale, alike=bool(group.clips or group.padded))
    if not found.shift.any() or found.gain_db < _WORTH_IT_DB:
        return none, f"its range is even: an offset would gain {found.gain_db:.1f} dB"
    return Offset(np.where(group.free, found.shift * scale, 0.0), found.gain_db), ""


def _no_offset(group: SmoothGroup, readers: Sequence[Consumer], method: Equalization, quantizers: Quantizers) -> str:
    if not method.shift:
        return "its channels are no wider than its layers can bear, and offsets are not wanted"
    if not quantizers.symmetric:
        return "its grid has a zero point: an offset gains nothing"
    if not quantizers.correct_biases:
        return "an offset needs corrected biases"
    if group.no_shift:
        return group.no_shift
    alike = group.clips or group.padded
    if alike and (not group.free.all() or any((reader.index == FOREIGN).any() for reader in readers)):
        return "one bound serves channels that cannot move too"
    return ""


def _words(scale: Vector, offset: Offset) -> str:
    parts = ["equalized"] if (scale != 1).any() else []
    if offset.shift.any():
        gain = "" if math.isinf(offset.gain_db) else f", {offset.gain_db:.1f} dB"
        parts.append(f"moved to the middle{gain}")
    return " and ".join(parts)
