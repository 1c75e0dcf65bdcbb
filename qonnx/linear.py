"""One view of the operators that multiply by a constant weight: Conv, ConvTranspose, Gemm, and MatMul with its Add.

Passes ask here which axis of the *stored* initializer is the output channel, whatever Transpose, Cast or Identity
stands between the initializer and the operator, and where a DequantizeLinear would have to go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.graph import constant, is_float, is_initializer, rank

CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
LINEAR_OPS = CONVOLUTIONS | {"Gemm", "MatMul"}

# What may stand between a stored weight and its operator without changing which values belong to one output channel.
WEIGHT_PATH_OPS = frozenset({"Transpose", "Cast", "Identity"})


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear operator and its constant weight.

    Attributes:
        node: the Conv, ConvTranspose, Gemm or MatMul.
        data: the activation that is multiplied.
        data_index: which input of `node` is the activation.
        weight: the initializer that holds the weight, before any node of `weight_path`.
        weight_index: which input of `node` is the weight.
        weight_path: the Transpose, Cast and Identity nodes between `weight` and `node`, the one nearest to `weight`
            first.
        output_axis: the axis of `weight` (as stored) that runs over output channels; within a group for a grouped
            ConvTranspose, which stores [in, out / groups, ...].
        input_axis: the axis of `weight` (as stored) that is summed over; within a group for a grouped Conv, which
            stores [out, in / groups, ...].
        groups: the number of groups of a convolution, otherwise 1.
        bias: the value added per output channel, or None.
        bias_node: the node that adds `bias`: `node` itself, or the Add behind a MatMul; None without bias.
    """

    node: ir.Node
    data: ir.Value
    data_index: int
    weight: ir.Value
    weight_index: int
    weight_path: tuple[ir.Node, ...]
    output_axis: int
    input_axis: int
    groups: int
    bias: ir.Value | None
    bias_node: ir.Node | None

    @property
    def output(self) -> ir.Value:
        """The result, after the bias."""
        return (self.bias_node or self.node).outputs[0]

    @property
    def weight_reader(self) -> tuple[ir.Node, int]:
        """The node and input that read the stored initializer: where its DequantizeLinear goes."""
        return (self.weight_path[0], 0) if self.weight_path else (self.node, self.weight_index)

    @property
    def output_channels(self) -> int:
        """The number of output channels, all groups together."""
        per_group = _dimension(self.weight, self.output_axis)
        return per_group * self.groups if self.node.op_type == "ConvTranspose" else per_group

    @property
    def input_channels(self) -> int:
        """The number of input channels, all groups together."""
        per_group = _dimension(self.weight, self.input_axis)
        return per_group * self.groups if self.node.op_type == "Conv" else per_group

    @property
    def kernel(self) -> tuple[int, ...]:
        """The spatial extent of a convolution's kernel, () for Gemm and MatMul."""
        if self.node.op_type not in CONVOLUTIONS or self.weight.shape is None:
            return ()
        spatial = [axis for axis in range(len(self.weight.shape)) if axis not in (self.output_axis, self.input_axis)]
        return tuple(_dimension(self.weight, axis) for axis in spatial)


def linears(graph: ir.Graph) -> Iterator[Linear]:
    """The linear operators of a graph with constant weights, in graph order; bodies of subgraphs are not entered."""
    for node in graph:
        linear = linear_of(node)
        if linear is not None:
            yield linear


def linear_of(node: ir.Node) -> Linear | None:
    """The linear view of a node, or None where it has no constant floating-point weight.

    What a path of Transpose, Cast and Identity makes of a weight may have several readers when all of them are the
    same operator and use it in the same way (layers that share their weights): quantizing the stored weight changes
    them all, and nothing else.
    """
    if node.domain not in ("", "ai.onnx") or node.op_type not in LINEAR_OPS:
        return None
    for weight_index in (1, 0) if node.op_type == "MatMul" else (1,):
        data_index = 1 - weight_index
        found = _stored_weight(node, weight_index)
        data = node.inputs[data_index]
        if found is None or data is None or _stored_weight(node, data_index) is not None:
            continue
        weight, path = found
        axes = _axes(node, weight_index, rank(weight))
        if axes is None or not is_float(weight):
            return None
        stored = [_through(path, axis, rank(weight) or 0) for axis in axes]
        # Behind W x, a vector is added along the axis of x, not along the output channels.
        bias, bias_node = _bias(node, _dimension(weight, stored[0])) if weight_index == 1 else (None, None)
        groups = node.attributes.get_int("group", 1) if node.op_type in CONVOLUTIONS else 1
        return Linear(node, data, data_index, weight, weight_index, path, stored[0], stored[1], groups, bias, bias_node)
    return None


def by_group(linear: Linear, weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A weight as [groups, inputs, taps, outputs] of one group each; all but grouped convolutions are one group.

    Args:
        linear: the layer.
        weight: as stored.
    """
    if linear.groups == 1:
        weight = np.moveaxis(weight, (linear.input_axis, linear.output_axis), (0, -1))
        return weight.reshape(1, weight.shape[0], -1, weight.shape[-1])
    weight = weight.reshape(linear.groups, -1, weight.shape[1], int(np.prod(weight.shape[2:])))
    # Conv stores [out, in / groups, ...], ConvTranspose [in, out / groups, ...].
    return weight.transpose(0, 2, 3, 1) if linear.node.op_type == "Conv" else weight.transpose(0, 1, 3, 2)


def _stored_weight(node: ir.Node, index: int) -> tuple[ir.Value, tuple[ir.Node, ...]] | None:
    if index >= len(node.inputs):
        return None
    value = node.inputs[index]
    path: list[ir.Node] = []
    while value is not None and not is_initializer(value):
        producer = value.producer()
        if producer is None or producer.op_type not in WEIGHT_PATH_OPS or producer.domain not in ("", "ai.onnx"):
            return None
        if value.is_graph_output() or not all(
            _same_use(node, index, path, usage.node, usage.idx) for usage in value.uses()
        ):
            return None
        path.append(producer)
        value = producer.inputs[0]
    return None if value is None else (value, tuple(reversed(path)))


def _same_use(node: ir.Node, index: int, path: list[ir.Node], reader: ir.Node, position: int) -> bool:
    """Whether a reader of a value on a weight's path is the path itself, or multiplies by the value as `node` does."""
    if path:
        return reader is path[-1]
    same = (reader.domain, reader.op_type, position) == (node.domain, node.op_type, index)
    return same and reader.graph is node.graph and _transposed(reader) == _transposed(node)


def _transposed(node: ir.Node) -> int:
    return node.attributes.get_int("transB", 0)


def _axes(node: ir.Node, weight_index: int, weight_rank: int | None) -> tuple[int, int] | None:
    """(output axis, input axis) of the weight as the operator sees it."""
    if weight_rank is None:
        return None
    if node.op_type == "Conv":
        return (0, 1) if weight_rank >= 3 else None
    if node.op_type == "ConvTranspose":
        return (1, 0) if weight_rank >= 3 else None
    if node.op_type == "Gemm":
        return (0, 1) if _transposed(node) else (1, 0)
    if weight_rank < 2:
        return None
    columns, rows = weight_rank - 1, weight_rank - 2
    return (columns, rows) if weight_index == 1 else (rows, columns)


def _through(path: tuple[ir.Node, ...], axis: int, weight_rank: int) -> int:
    """Follows an axis of the operator's operand back to the axis of the stored weight."""
    for node in reversed(path):
        if node.op_type == "Transpose":
            default = tuple(reversed(range(weight_rank)))
            axis = tuple(node.attributes.get_ints("perm", default))[axis]
    return axis


def _bias(node: ir.Node, channels: int) -> tuple[ir.Value | None, ir.Node | None]:
    if node.op_type in ("Conv", "ConvTranspose", "Gemm"):
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return bias, None if bias is None else node
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) != 1 or output.is_graph_output() or uses[0].node.op_type != "Add":
        return None, None
    add = uses[0].node
    if add.graph is not node.graph:
        return None, None
    bias = add.inputs[1 - uses[0].idx]
    array = constant(bias) if bias is not None and bias.shape is not None and bias.shape.rank() <= 1 else None
    return (bias, add) if array is not None and array.size in (1, channels) else (None, None)


def _dimension(value: ir.Value, axis: int) -> int:
    known = value.shape is not None and -value.shape.rank() <= axis < value.shape.rank()
    size = value.shape[axis] if value.shape is not None and known else None
    return size if isinstance(size, int) else 0
