"""What the rules ask of a graph: the parameters of a Q/DQ node, and what lies between it and its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.graph import constant
from qonnx.linear import LINEAR_OPS
from qonnx.linter.findings import Finding, Repair, Severity
from qonnx.numerics import Blocked, Granularity, PerAxis, PerTensor

Array: TypeAlias = npt.NDArray[Any]

# The domain of ONNX, and that of ONNX Runtime, which has the same Q/DQ operators for older opsets.
ONNX_DOMAINS = frozenset({"", "ai.onnx"})
QDQ_DOMAINS = ONNX_DOMAINS | {"com.microsoft"}

# These give every element of their first input another place (MaxPool: drops some). A scale that holds for the whole
# tensor holds behind them too.
MOVERS = frozenset({
    "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "SpaceToDepth", "Split",
    "Squeeze", "Tile", "Transpose", "Unsqueeze",
})  # fmt: skip

# Of these, the operators whose result is still a constant when their first input is one.
WEIGHT_MOVERS = MOVERS - {"Gather", "MaxPool"}

PRODUCTS = LINEAR_OPS


@dataclass(frozen=True, eq=False)
class Quantizer:
    """A QuantizeLinear or DequantizeLinear node with all of its required inputs."""

    node: ir.Node

    @property
    def quantizes(self) -> bool:
        """Whether it is a QuantizeLinear."""
        return self.node.op_type == "QuantizeLinear"

    @property
    def data(self) -> ir.Value:
        """What it reads."""
        return _required(self.node, 0)

    @property
    def output(self) -> ir.Value:
        """What it writes."""
        return self.node.outputs[0]

    @property
    def codes(self) -> ir.Value:
        """The integers: what a QuantizeLinear writes and a DequantizeLinear reads."""
        return self.output if self.quantizes else self.data

    @property
    def scale(self) -> ir.Value:
        """The scale input."""
        return _required(self.node, 1)

    @property
    def zero_point(self) -> ir.Value | None:
        """The zero point input, or None if it is left out."""
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None

    @property
    def dtype(self) -> ir.DataType | None:
        """The type of the codes, or None where nothing tells.

        A QuantizeLinear takes it from its zero point, then from its attribute `output_dtype`, and is uint8 otherwise.
        """
        if self.zero_point is not None and self.zero_point.dtype is not None:
            return self.zero_point.dtype
        if not self.quantizes:
            return self.data.dtype
        return ir.DataType(self.node.attributes.get_int("output_dtype", 0)) or ir.DataType.UINT8

    @property
    def axis(self) -> int:
        """The attribute `axis`; it only means something where the scale is not a scalar."""
        return self.node.attributes.get_int("axis", 1)

    @property
    def block_size(self) -> int:
        """The attribute `block_size`; 0 without blocks."""
        return self.node.attributes.get_int("block_size", 0)

    @cached_property
    def scales(self) -> Array | None:
        """The scale as stored, or None where it is computed or fed."""
        return parameter(self.scale)

    @cached_property
    def zero_points(self) -> Array | None:
        """The zero point as stored, zeros if it is left out, or None where it is computed or fed."""
        if self.zero_point is None:
            return None if self.scales is None or self.dtype is None else np.zeros(self.scales.shape, np.int8)
        return parameter(self.zero_point)

    @property
    def per_tensor(self) -> bool:
        """Whether one scale holds for the whole tensor."""
        return size_of(self.scale) == 1

    @property
    def granularity(self) -> Granularity:
        """Which elements share a scale."""
        if self.per_tensor:
            return PerTensor()
        return Blocked(self.axis, self.block_size) if self.block_size else PerAxis(self.axis)

    @property
    def parameters(self) -> tuple[Array, Array, Granularity]:
        """Scale, zero point and granularity as `qonnx.numerics` wants them; the caller has checked that they are known.

        ONNX also has the shape [1] for one scale.
        """
        scale, zero = np.asarray(self.scales), np.asarray(self.zero_points)
        shape = () if self.per_tensor else scale.shape
        return scale.reshape(shape), zero.reshape(shape), self.granularity

    @property
    def mirrors(self) -> bool:
        """Whether it is a DequantizeLinear that undoes the QuantizeLinear right before it.

        What is wrong with the parameters of such a pair is reported once, at the QuantizeLinear.
        """
        first = None if self.quantizes else quantizer_of(self.data.producer())
        return first is not None and first.quantizes and same_parameters(first, self)

    @property
    def weight(self) -> ir.Value | None:
        """The constant that is quantized or dequantized, be it behind operators that move elements; or None."""
        value: ir.Value | None = self.data
        while value is not None and not is_constant(value):
            producer = value.producer()
            before = quantizer_of(producer)
            if producer is None or not (is_op(producer, WEIGHT_MOVERS) or (before is not None and before.quantizes)):
                return None
            value = producer.inputs[0]
        return value


@dataclass(frozen=True, eq=False)
class Site:
    """One node, and what rules need to know besides.

    Attributes:
        node: the node.
        quantizer: its parameters, if it is a Q/DQ node.
        opset: of the model.
        capability: compute capability of the device.
    """

    node: ir.Node
    quantizer: Quantizer | None
    opset: int
    capability: tuple[int, int]

    def error(self, rule: str, message: str, remedy: str, repair: Repair = Repair.NONE) -> Finding:
        """A finding about this node that keeps the graph from running as it says."""
        return Finding(rule, Severity.ERROR, name_of(self.node), message, remedy, repair)

    def warning(self, rule: str, message: str, remedy: str, repair: Repair = Repair.NONE) -> Finding:
        """A finding about this node that costs time or accuracy."""
        return Finding(rule, Severity.WARNING, name_of(self.node), message, remedy, repair)


Rule: TypeAlias = Callable[[Site], Finding | None]


def quantizer_of(node: ir.Node | None) -> Quantizer | None:
    """The Q/DQ view of a node, or None for any other node, and for one that lacks an input."""
    if node is None or node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.domain not in QDQ_DOMAINS:
        return None
    return Quantizer(node) if len(node.inputs) >= 2 and None not in node.inputs[:2] else None


def dequantizer_of(value: ir.Value | None) -> Quantizer | None:
    """The DequantizeLinear that writes a value, or None."""
    found = quantizer_of(value.producer()) if value is not None else None
    return found if found is not None and not found.quantizes else None


def readers(value: ir.Value) -> tuple[ir.Node, ...]:
    """The nodes that read a value, each once."""
    return tuple(dict.fromkeys(usage.node for usage in value.uses()))


def name_of(node: ir.Node) -> str:
    """The name of a node; TensorRT's name for it where it has none."""
    return node.name or f"node_of_{node.outputs[0].name if node.outputs else ''}"


def is_op(node: ir.Node | None, op_types: frozenset[str]) -> bool:
    """Whether a node is one of these ONNX operators, and reads and writes something."""
    known = node is not None and node.op_type in op_types and node.domain in ONNX_DOMAINS
    return known and node is not None and len(node.inputs) > 0 and len(node.outputs) > 0


def is_mover(node: ir.Node | None) -> bool:
    """Whether a node only moves the elements of its first input."""
    return is_op(node, MOVERS)


def permutation(node: ir.Node, rank: int) -> tuple[int, ...]:
    """Which axis of its input each axis of a Transpose's output is; Identity, and what is invalid, moves none."""
    default = tuple(reversed(range(rank))) if node.op_type == "Transpose" else tuple(range(rank))
    given = tuple(node.attributes.get_ints("perm", default))
    return given if sorted(given) == list(range(rank)) else tuple(range(rank))


def is_constant(value: ir.Value) -> bool:
    """Whether the value is an initializer or made by a Constant node, and no caller can override it."""
    return not value.is_graph_input() and ir.convenience.get_const_tensor(value) is not None


def parameter(value: ir.Value) -> Array | None:
    """The array behind a scale or zero point; TensorRT too sees through Cast and Identity, and nothing else."""
    array = constant(value)
    producer = value.producer()
    if array is not None or not is_op(producer, frozenset({"Cast", "Identity"})) or producer is None:
        return array
    source = producer.inputs[0]
    stored = parameter(source) if source is not None else None
    if stored is None or producer.op_type == "Identity":
        return stored
    return stored.astype(ir.DataType(producer.attributes.get_int("to", 1)).numpy())


def sizes_of(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """The sizes of a value, None for a dynamic one; None altogether where the rank is not known."""
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def size_of(value: ir.Value) -> int | None:
    """The number of elements, or None where it is dynamic or not known."""
    sizes = sizes_of(value)
    if sizes is None:
        return None
    product = 1
    for size in sizes:
        if size is None:
            return None
        product *= size
    return product


def same_parameters(first: Quantizer, second: Quantizer) -> bool:
    """Whether two Q/DQ nodes have equal scales, zero points, types and axes."""
    return (
        first.dtype == second.dtype
        and same_scale(first, second)
        and _same(first.zero_point, first.zero_points, second.zero_point, second.zero_points)
        and first.block_size == second.block_size
        and (first.per_tensor or first.axis == second.axis)
    )


def same_scale(first: Quantizer, second: Quantizer) -> bool:
    """Whether two Q/DQ nodes have equal scales."""
    return _same(first.scale, first.scales, second.scale, second.scales)


def _same(first: ir.Value | None, ours: Array | None, second: ir.Value | None, theirs: Array | None) -> bool:
    if first is second:
        return True
    return ours is not None and theirs is not None and np.array_equal(ours.reshape(-1), theirs.reshape(-1))


def path_to_source(value: ir.Value | None) -> Iterator[ir.Node]:
    """The nodes that a value comes through, the nearest first: operators that move elements, and what is before."""
    while value is not None:
        producer = value.producer()
        if producer is None:
            return
        yield producer
        if not is_mover(producer):
            return
        value = producer.inputs[0]


def source_of(value: ir.Value | None) -> ir.Node | None:
    """The node that computes a value, seen through operators that only move elements."""
    return next((node for node in path_to_source(value) if not is_mover(node)), None)


def _required(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None  # quantizer_of makes sure
    return value
