"""Equalization: factors that make channels equally wide, without samples of what layers make of them.

    s_c = sqrt(r1_c / r2_c)       r1_c the largest weight that makes channel c, r2_c the largest that reads it

gives both weights the same range sqrt(r1_c r2_c) in every channel: one scale then fits a whole weight. A layer between
two others is part of two such pairs, so that sweeps over all pairs are repeated until nothing moves any more. From:
Nagel et al. 2019, "Data-Free Quantization", section 4.1, equations 9 to 11. It is for weights with one scale.

    s_c = max |x_c|

gives the channels of an activation the same range. Weights with a scale for each output channel are what they were for
a depthwise convolution, which has one input channel for each of these: there it costs nothing.

Both are exact where the activation function between two layers is positively homogeneous, or its bounds move along: a
Relu6 becomes a Relu and a Min with 6 / s_c (`qonnx.passes.move_bounds`), of which quantization mostly makes the Min
superfluous (`qonnx.passes.drop_bounds`).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.channels import FOREIGN
from qonnx.graph import float32
from qonnx.groups import SmoothGroup
from qonnx.linear import Linear, by_group
from qonnx.producers import Kind

Vector = npt.NDArray[np.float64]

# A channel that was silent, or whose weights are next to zero, would get a factor without bounds.
_NARROWEST = 1e-2
_LIMIT = 1e3

_SWEEPS = 20
_SETTLED = 1e-3


class NoEqualization(msgspec.Struct, frozen=True, tag_field="kind", tag="none", forbid_unknown_fields=True):
    """Neither factors nor offsets."""


class Equalization(msgspec.Struct, frozen=True, tag_field="kind", tag="always", forbid_unknown_fields=True):
    """See the module docstring, and `qonnx.passes.shift_range`; `qonnx.equalization` decides.

    Attributes:
        factors: whether channels are made equally wide.
        shift: whether tensors are moved to the middle of their range.
        pad: whether a convolution that pads with zeros may get a Pad in front of it, so that what it reads can move.
        nodes: whether a group may cost a Mul, or a Sub or Add, at run time.
    """

    factors: bool = True
    shift: bool = True
    pad: bool = False
    nodes: bool = True


class AutoEqualization(Equalization, frozen=True, tag_field="kind", tag="auto", forbid_unknown_fields=True):
    """The same, kept where the outputs gain by it."""


def is_depthwise(linear: Linear) -> bool:
    """Whether every output channel of a layer has weights for one input channel only."""
    return linear.groups > 1 and linear.groups == linear.input_channels and linear.node.op_type == "Conv"


def channel_factors(reach: Vector) -> Vector:
    """[channels] the factors that make channels as wide as the widest.

    Args:
        reach: [channels] max |x_c|.

    >>> channel_factors(np.array([4.0, 1.0, 0.0]))
    array([1.  , 0.25, 0.01])
    """
    largest = float(reach.max(initial=0.0))
    return np.ones(reach.shape) if largest <= 0 else np.maximum(reach / largest, _NARROWEST)


def cross_layer_factors(groups: Sequence[SmoothGroup]) -> list[Vector]:
    """The factors of every group that has a linear layer on both sides and can be scaled; 1 for all others.

    Args:
        groups: of one model, as `qonnx.groups.find_groups` returns them.
    """
    scales = [np.ones(group.producer.size) for group in groups]
    pairs = [
        number
        for number, group in enumerate(groups)
        if group.producer.kind is Kind.LINEAR and not group.no_scale and group.free.any() and group.consumers
    ]
    layers = {number: _layers(groups[number]) for number in pairs}
    inner: dict[ir.Node, Vector] = {}
    outer: dict[ir.Node, Vector] = {}
    for _ in range(_SWEEPS):
        largest = 0.0
        for number in pairs:
            group, (maker, readers) = groups[number], layers[number]
            makes = _reach(maker, inner.get(maker.node), outer.get(maker.node), outputs=True)
            reads = np.zeros(group.producer.size)
            for reader, index in readers:
                ours = index != FOREIGN
                found = _reach(reader, inner.get(reader.node), outer.get(reader.node), outputs=False)
                np.maximum.at(reads, index[ours], found[ours])
            step = np.ones(makes.shape)
            usable = group.free & (makes > 0) & (reads > 0)
            step[usable] = np.sqrt(makes[usable] / reads[usable])
            step[usable] = np.clip(scales[number][usable] * step[usable], 1 / _LIMIT, _LIMIT) / scales[number][usable]
            scales[number] = scales[number] * step
            outer[maker.node] = outer.get(maker.node, np.ones(step.shape)) * step
            for reader, index in readers:
                factors = np.where(index != FOREIGN, step[index], 1.0)
                inner[reader.node] = inner.get(reader.node, np.ones(factors.shape)) * factors
            largest = max(largest, float(np.abs(np.log(step)).max()))
        if largest < _SETTLED:
            break
    return scales


def _layers(group: SmoothGroup) -> tuple[Linear, list[tuple[Linear, npt.NDArray[np.intp]]]]:
    assert group.producer.linear is not None
    return group.producer.linear, [(consumer.linear, consumer.index) for consumer in group.consumers]


def _reach(linear: Linear, inner: Vector | None, outer: Vector | None, *, outputs: bool) -> Vector:
    """[channels] the largest magnitude of the weights of each output channel, or of each input channel.

    Args:
        linear: the layer.
        inner: [inputs] what the weights of each input channel are multiplied by; None for 1.
        outer: [outputs] what the weights of each output channel are divided by; None for 1.
        outputs: which channels.
    """
    tensor = linear.weight.const_value
    assert tensor is not None
    weight = np.abs(float32(tensor.numpy()))
    inner = np.ones(linear.input_channels) if inner is None else inner
    outer = np.ones(linear.output_channels) if outer is None else outer
    matrices = by_group(linear, weight).max(axis=2).astype(np.float64)  # [groups, inputs, outputs]
    groups = matrices.shape[0]
    matrices = matrices * inner.reshape(groups, -1, 1) / outer.reshape(groups, 1, -1)
    return np.asarray(matrices.max(axis=1 if outputs else 2).reshape(-1))
