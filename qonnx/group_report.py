"""What is said of a group of channels: what was done with it, what that gains and costs, or why nothing was done."""

from __future__ import annotations

import msgspec
import numpy as np

from qonnx.channels import FOREIGN
from qonnx.graph import float32
from qonnx.group_error import Choice, Vector
from qonnx.groups import SmoothGroup
from qonnx.producers import Kind


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
        crest: the largest magnitude of the widest channel over that of the median channel, before. Channels that are
            always zero, or that no quantized layer reads, do not count.
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


def blank_report(group: SmoothGroup) -> GroupReport:
    """The report of a group that nothing is known of but its nodes."""
    producer = group.producer
    node = producer.node
    name = "" if node is None or producer.kind is Kind.NONE else f"{node.op_type} {node.name!r}"
    consumers = tuple(consumer.linear.node.name or "" for consumer in group.consumers)
    return GroupReport(name, group.value, producer.size, 0, consumers)


def added_nodes(group: SmoothGroup, choice: Choice) -> int:
    """How many nodes the choice adds, biases of layers left aside: they are part of the product at run time."""
    changed = (choice.scale != 1) | (choice.shift != 0)
    each = int((choice.scale != 1).any()) + int(choice.shift.any())
    if group.producer.kind is Kind.NONE:
        return each
    return each * len({tap.value for tap in group.taps if changed[tap.channels.present].any()})


def crest(reach: Vector) -> float:
    """How far the widest channel sticks out over the median one of those that are not always zero.

    >>> crest(np.array([0.0, 0.0, 0.0, 4.0, 1.0, 1.0]))
    4.0
    """
    used = reach[reach > 0]
    return round(float(used.max() / np.median(used)), 2) if used.size else 1.0


def weight_growth(group: SmoothGroup, choice: Choice) -> float:
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
