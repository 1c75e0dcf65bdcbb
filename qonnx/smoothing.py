"""Smoothing: the same function with flatter activations, decided group by group, folded, and accounted for."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

import msgspec
import numpy as np
import onnx_ir as ir

from qonnx.errors import DataError
from qonnx.group_error import Choice, GroupError, Quantizers, Ranges, Samples, best, decibels, measure
from qonnx.group_report import GroupReport, added_nodes, blank_report, crest, weight_growth
from qonnx.groups import Consumer, SmoothGroup
from qonnx.passes.outlier_suppression import OutlierSuppression
from qonnx.passes.rescale_channels import RescaleChannels, Rescaling
from qonnx.passes.smooth_quant import SmoothQuant
from qonnx.statistics import Statistics


class NoSmoothing(msgspec.Struct, frozen=True, tag_field="kind", tag="none", forbid_unknown_fields=True):
    """Leaves all activations as they are."""


class AutoSmoothing(msgspec.Struct, frozen=True, tag_field="kind", tag="auto", forbid_unknown_fields=True):
    """For every group the better one of SmoothQuant and Outlier Suppression+.

    Attributes:
        nodes: whether a group may cost a Mul, or a Mul and an Add, at run time.
    """

    nodes: bool = True

    def choose(self, group: SmoothGroup, ranges: Ranges, error: GroupError, samples: Samples) -> Choice | None:
        """The factors and offsets of a group; None where it is best left alone."""
        methods = (OutlierSuppression(), SmoothQuant())
        choices = [method.choose(group, ranges, error, samples) for method in methods]
        found = [choice for choice in choices if choice is not None]
        return best(found, error) if found and error.measurable else None


Method: TypeAlias = SmoothQuant | OutlierSuppression | AutoSmoothing
Smoothing: TypeAlias = NoSmoothing | SmoothQuant | OutlierSuppression | AutoSmoothing

# What a group has to gain before it may cost a node at run time.
_WORTH_A_NODE_DB = 1.0


def smooth(
    model: ir.Model,
    groups: Sequence[SmoothGroup],
    method: Method,
    statistics: Statistics,
    samples: Samples,
    quantizers: Quantizers | None = None,
) -> tuple[GroupReport, ...]:
    """Smooths a model in place: it computes what it did, within float rounding.

    Statistics of the tensors in between are no longer true afterwards: observe again before planning. Biases take up
    offsets times rounded weights: correct them after planning (`qonnx.bias_correction`).

    A group is changed where samples say that its layers gain, by 1 dB at least where it takes a node at run time;
    without samples, always.

    Args:
        model: the prepared float model.
        groups: all groups of this model, as `qonnx.groups.find_groups` returns them.
        method: how factors are chosen.
        statistics: of every tensor of `qonnx.group_error.channel_axes(groups)`, per channel.
        samples: rows of these tensors, from `qonnx.group_samples.collect_inputs`.
        quantizers: those that will be used.

    Returns:
        One entry per group, in order. "This changed nothing" is worth a warning.

    Raises:
        ModelError: the groups are not of this model.
    """
    rescalings, reports = decide(groups, method, statistics, samples, quantizers or Quantizers())
    RescaleChannels(rescalings)(model)
    return reports


def decide(
    groups: Sequence[SmoothGroup],
    method: Method,
    statistics: Statistics,
    samples: Samples,
    quantizers: Quantizers,
    quantized: Collection[str] | None = None,
    leave: Mapping[str, str] | None = None,
) -> tuple[tuple[Rescaling, ...], tuple[GroupReport, ...]]:
    """What `smooth` would do, and why: nothing is changed.

    Args:
        groups: see `smooth`.
        method: see `smooth`.
        statistics: see `smooth`.
        samples: see `smooth`.
        quantizers: see `smooth`.
        quantized: the names of the linear layers that will be quantized: the others are exact whatever is done. None
            for all.
        leave: groups to leave alone, by value, with the reason.

    Returns:
        What to do, for the groups that gain; and one report per group.
    """
    rescalings, reports = [], []
    for group in groups:
        reason = group.reason or _no_rounding(group, quantized) or (leave or {}).get(group.value, "")
        if reason:
            reports.append(msgspec.structs.replace(blank_report(group), reason=reason))
            continue
        rescaling, report = _decide(group, method, statistics, samples, quantizers, quantized)
        reports.append(report)
        if rescaling is not None:
            rescalings.append(rescaling)
    return tuple(rescalings), tuple(reports)


def _rounded(group: SmoothGroup, quantized: Collection[str] | None) -> tuple[Consumer, ...]:
    return tuple(one for one in group.consumers if quantized is None or one.linear.node.name in quantized)


def _no_rounding(group: SmoothGroup, quantized: Collection[str] | None) -> str:
    return "" if _rounded(group, quantized) else "none of its layers is quantized"


def _decide(
    group: SmoothGroup,
    method: Method,
    statistics: Statistics,
    samples: Samples,
    quantizers: Quantizers,
    quantized: Collection[str] | None,
) -> tuple[Rescaling | None, GroupReport]:
    report = blank_report(group)
    try:
        ranges = measure(group, statistics)
    except DataError as unusable:
        return None, msgspec.structs.replace(report, reason=str(unusable))
    error = GroupError(dataclasses.replace(group, consumers=_rounded(group, quantized)), ranges, samples, quantizers)
    one, zero = np.ones(group.producer.size), np.zeros(group.producer.size)
    before = error(one, zero) if error.measurable else None
    report = msgspec.structs.replace(
        report, crest=crest(ranges.reach), sqnr_db=None if before is None else _rounded_db(before)
    )
    choice = method.choose(group, ranges, error, samples)
    if choice is None:
        return None, msgspec.structs.replace(report, reason="nothing to choose by: no samples, or no factor possible")
    nodes = added_nodes(group, choice)
    if before is not None:
        gain = decibels(error(choice.scale, choice.shift)) - decibels(before)
        if gain <= 0 or (nodes and gain < _WORTH_A_NODE_DB):
            cost = f", not worth {nodes} nodes" if gain > 0 else ""
            return None, msgspec.structs.replace(report, reason=f"{choice.method} would gain {gain:.1f} dB{cost}")
    return Rescaling(group, choice.scale, choice.shift, choice.method), msgspec.structs.replace(
        report,
        changed=int(((choice.scale != 1) | (choice.shift != 0)).sum()),
        method=choice.method,
        parameter=float(choice.parameter),
        nodes=nodes,
        smoothed_crest=crest(np.maximum(ranges.high - choice.shift, choice.shift - ranges.low) / choice.scale),
        weight_growth=weight_growth(group, choice),
        smoothed_sqnr_db=None if before is None else _rounded_db(error(choice.scale, choice.shift)),
    )


def _rounded_db(ratio: float) -> float:
    return round(decibels(ratio), 2)
