"""What can absorb a factor and an offset per channel of what it makes.

    LayerNormalization, BatchNormalization ...    scale / s, (bias - z) / s      without a bias input: scale / s only
    linear layer                                  W / s along the outputs, (b - z) / s
    Mul (and Add) by constants per channel        as in a normalisation that is spelled out, or a LayerScale

To teach it one more operator with a scale and a bias, add it to `_NORMS`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qonnx.channels import Channels
from qonnx.graph import constant, is_float, rank
from qonnx.linear import Linear
from qonnx.passes.fuse_norms import decomposed_norms


class Kind(enum.StrEnum):
    """What absorbs the factors and offsets of a group."""

    NORM = "normalisation"
    LINEAR = "linear"
    SCALING = "scaling"
    NONE = "none"


@dataclass(frozen=True, eq=False)
class Producer:
    """What makes the channels of a group.

    Attributes:
        kind: a normalisation with its scale and bias; a linear layer; a Mul (and Add) by constants per channel, as in a
            normalisation that is spelled out; or nothing that absorbs a factor: it takes a Mul (and Sub) of its own.
        node: the operator; None for an input of the model.
        value: what it makes, bias included.
        channels: of `value`.
        scale: the node and input that read the scale; None for a linear layer and for nothing.
        bias: the node and input that read the bias, or may; None where there is no such input.
        linear: the linear layer.
        no_shift: why it cannot absorb an offset, or "".
    """

    kind: Kind
    node: ir.Node | None
    value: ir.Value
    channels: Channels
    scale: tuple[ir.Node, int] | None = None
    bias: tuple[ir.Node, int] | None = None
    linear: Linear | None = None
    no_shift: str = ""

    @property
    def size(self) -> int:
        """The number of channels."""
        return int(self.channels.index.size)


_NORMS: Mapping[tuple[str, str], tuple[int, int | None]] = {
    ("", "LayerNormalization"): (1, 2),
    ("", "RMSNormalization"): (1, None),
    ("", "SimplifiedLayerNormalization"): (1, None),
    ("com.microsoft", "SkipLayerNormalization"): (2, 3),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): (2, None),
    ("", "BatchNormalization"): (1, 2),
    ("", "InstanceNormalization"): (1, 2),
    ("", "GroupNormalization"): (1, 2),
}
_NORMS_OF_AXIS_1 = frozenset({"BatchNormalization", "InstanceNormalization", "GroupNormalization"})


def producers(model: ir.Model, layers: Mapping[ir.Node, Linear]) -> Iterator[Producer]:
    """Everything that can absorb factors, in graph order."""
    spelled_out = {node for norm in decomposed_norms(model) for node in norm.nodes}
    for node in model.graph:
        producer = None
        if node in layers:
            producer = _linear_producer(layers[node])
        elif (node.domain if node.domain != "ai.onnx" else "", node.op_type) in _NORMS:
            producer = _norm_producer(node)
        elif node.op_type == "Mul" and node.domain in ("", "ai.onnx"):
            producer = _scaling_producer(node, spelled_out)
        if producer is not None:
            yield producer


def _linear_producer(linear: Linear) -> Producer | None:
    bare = linear.node.op_type == "MatMul" and linear.weight_index == 0
    value = linear.node.outputs[0] if bare else linear.output
    count, size = rank(value), linear.output_channels
    if count is None or not size or not is_float(value):
        return None
    batched = linear.node.op_type == "MatMul" and rank(linear.weight) != 2
    no_shift = f"MatMul {linear.node.name!r} takes no bias per output channel" if bare or batched else ""
    if linear.bias is not None and not bare:
        bias = constant(linear.bias)
        if bias is None or bias.size not in (1, size) or bias.size != (bias.shape or (1,))[-1]:
            return None
    axis = 1 if linear.node.op_type != "MatMul" else count - (2 if bare else 1)
    channels = Channels((axis,), np.arange(size, dtype=np.intp))
    return Producer(Kind.LINEAR, linear.node, value, channels, linear=linear, no_shift=no_shift)


def _norm_producer(node: ir.Node) -> Producer | None:
    scale_input, bias_input = _NORMS[(node.domain if node.domain != "ai.onnx" else "", node.op_type)]
    value = node.outputs[0]
    count, shape = rank(value), _constant_shape(node, scale_input)
    training = node.attributes.get_int("training_mode", 0)
    if count is None or not shape or not is_float(value) or training == 1:
        return None
    first = node.attributes.get_int("axis", -1) % count if node.op_type not in _NORMS_OF_AXIS_1 else 1
    axes = tuple(range(first, first + len(shape)))
    known = [value.shape[axis] if value.shape is not None and axis < count else 0 for axis in axes]
    if any(isinstance(size, int) and size != width for size, width in zip(known, shape, strict=True)):
        return None  # one scale for all channels, or for a group of them
    has_bias = bias_input is not None and bias_input < len(node.inputs) and node.inputs[bias_input] is not None
    if has_bias and _constant_shape(node, bias_input or 0) != shape:
        return None
    bias = None if bias_input is None else (node, bias_input)
    index = np.arange(int(np.prod(shape)), dtype=np.intp).reshape(shape)
    no_shift = "" if bias is not None else f"{node.op_type} {node.name!r} has no bias"
    return Producer(Kind.NORM, node, value, Channels(axes, index), (node, scale_input), bias, no_shift=no_shift)


def _scaling_producer(node: ir.Node, spelled_out: set[ir.Node]) -> Producer | None:
    """A product with a constant per channel, and the sum with one behind it."""
    factors = [(index, shape) for index in (0, 1) if (shape := _constant_shape(node, index)) is not None]
    count = rank(node.outputs[0])
    if len(factors) != 1 or count is None or not is_float(node.outputs[0]):
        return None
    ((position, shape),) = factors
    wide = [axis for axis, size in enumerate(shape) if size != 1]
    if len(wide) != 1 or len(shape) > count:
        return None
    axis = wide[0] + count - len(shape)
    value, bias = node.outputs[0], None
    uses = list(value.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add" and uses[0].node.graph is node.graph:
        add = uses[0].node
        added = _constant_shape(add, 1 - uses[0].idx)
        aligned = None if added is None else (1,) * (len(shape) - len(added)) + added
        if aligned is not None and aligned in (shape, (1,) * len(shape)) and not value.is_graph_output():
            value, bias = add.outputs[0], (add, 1 - uses[0].idx)
    kind = Kind.NORM if node in spelled_out else Kind.SCALING
    channels = Channels((axis,), np.arange(shape[wide[0]], dtype=np.intp))
    no_shift = "" if bias is not None else f"{node.op_type} {node.name!r} has no bias"
    return Producer(kind, node, value, channels, (node, position), bias, no_shift=no_shift)


def _constant_shape(node: ir.Node, index: int) -> tuple[int, ...] | None:
    """The shape of a constant input that no caller can override, or None."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tuple(tensor.shape.numpy())
