"""Smoothing: the same function with flatter activations, decided group by group, folded, and accounted for."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

import msgspec
import numpy as np
import onnx_ir as ir

from qonnx.channels import FOREIGN
from qonnx.errors import DataError
from qonnx.graph import float32
from qonnx.group_error import Choice, GroupError, Quantizers, Ranges, Samples, Vector, best, decibels, measure
from qonnx.groups import Consumer, SmoothGroup
from qonnx.passes.outlier_suppression import OutlierSuppression
from qonnx.passes.rescale_channels import RescaleChannels, Rescaling
from qonnx.passes.smooth_quant import SmoothQuant
from qonnx.producers import Kind
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


class GroupReport(msgspec.Struct, frozen=True):
    """What was done with one group, or why nothing was.

    Attributes:
        producer: the operator that absorbs factors and offsets, such as `LayerNormalization 'norm1'`.
        value: the tensor it makes.
        channels: how many it has.
        changed: how many of them have a factor or an offset now.
        consumers: the linear layers that read it.
        method: what was done, with its parameter; "" where nothing was.
        parameter: alpha, or the threshold.
        nodes: how many nodes were added for it.
        crest: the largest magnitude of the widest channel over that of the median channel, before.
        smoothed_crest: the same after.
        weight_growth: how many times larger the largest weight became; the most of all layers.
        sqnr_db: estimated signal-to-noise ratio of the results of the layers once quantized, before; None where no
            samples tell.
        smoothed_sqnr_db: the same after.
        reason: why the group was left alone, or "".
    """

    producer: str
    value: str
    channels: int
    changed: int
    consumers: tuple[str, ...]
    method: str = ""
    parameter: float | None = None
    nodes: int = 0
    crest: float | None = None
    smoothed_crest: float | None = None
    weight_growth: float | None = None
    sqnr_db: float | None = None
    smoothed_sqnr_db: float | None = None
    reason: str = ""


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
            reports.append(msgspec.structs.replace(_blank(group), reason=reason))
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
    report = _blank(group)
    try:
        ranges = measure(group, statistics)
    except DataError as unusable:
        return None, msgspec.structs.replace(report, reason=str(unusable))
    error = GroupError(dataclasses.replace(group, consumers=_rounded(group, quantized)), ranges, samples, quantizers)
    one, zero = np.ones(group.producer.size), np.zeros(group.producer.size)
    before = error(one, zero) if error.measurable else None
    report = msgspec.structs.replace(
        report, crest=_crest(ranges.reach), sqnr_db=None if before is None else _rounded_db(before)
    )
    choice = method.choose(group, ranges, error, samples)
    if choice is None:
        return None, msgspec.structs.replace(report, reason="nothing to choose by: no samples, or no factor possible")
    nodes = _nodes(group, choice)
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
        smoothed_crest=_crest(np.maximum(ranges.high - choice.shift, choice.shift - ranges.low) / choice.scale),
        weight_growth=_weight_growth(group, choice),
        smoothed_sqnr_db=None if before is None else _rounded_db(error(choice.scale, choice.shift)),
    )


def _blank(group: SmoothGroup) -> GroupReport:
    producer = group.producer
    node = producer.node
    name = "" if node is None or producer.kind is Kind.NONE else f"{node.op_type} {node.name!r}"
    consumers = tuple(consumer.linear.node.name or "" for consumer in group.consumers)
    return GroupReport(name, group.value, producer.size, 0, consumers)


def _rounded_db(ratio: float) -> float:
    return round(decibels(ratio), 2)


def _nodes(group: SmoothGroup, choice: Choice) -> int:
    """How many nodes the choice adds, biases of layers left aside: they are part of the product at run time."""
    changed = (choice.scale != 1) | (choice.shift != 0)
    each = int((choice.scale != 1).any()) + int(choice.shift.any())
    if group.producer.kind is Kind.NONE:
        return each
    return each * len({tap.value for tap in group.taps if changed[tap.channels.present].any()})


def _crest(reach: Vector) -> float:
    """How far the widest channel sticks out over the median one."""
    return round(float(reach.max() / max(float(np.median(reach)), 1e-30)), 2)


def _weight_growth(group: SmoothGroup, choice: Choice) -> float:
    """How many times larger the largest weight became: the most of all layers."""
    growth = []
    for consumer in group.consumers:
        linear, tensor = consumer.linear, consumer.linear.weight.const_value
        if tensor is None or linear.groups > 1:
            continue
        weight = np.abs(float32(tensor.numpy()))
        s = np.where(consumer.index != FOREIGN, choice.scale[consumer.index], 1.0)
        shape = [-1 if axis == linear.input_axis else 1 for axis in range(weight.ndim)]
        growth.append(float((weight * s.reshape(shape)).max()) / max(float(weight.max()), 1e-30))
    return round(max(growth, default=1.0), 3)
