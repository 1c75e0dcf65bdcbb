"""The weights that a graph stores, for formats that quantize nothing else: those of products, and tables to look up.

The arithmetic stays in float, so that what counts is only whether the runtime reads such weights, and in which shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from qonnx.graph import is_float, is_initializer, module_path
from qonnx.layers import Edge, Layer, Operand, is_gpu, table_operand, why_no_weight, why_no_weight_among
from qonnx.linear import CONVOLUTIONS, LINEAR_OPS, Linear, linear_of
from qonnx.recipe import PerBlock, Weights
from qonnx.roles import is_table
from qonnx.rules import Settings
from qonnx.targets import Target

# A group of fewer elements does not pay for its scale.
_SMALLEST_GROUP = 16


def fitting_block_size(size: int, length: int, target: Target) -> int:
    """The size of the blocks of a short axis: the power of two that holds it in one block, for TensorRT in two.

    Powers of two are what runtimes have kernels for, and padding them costs least. Weights of one block TensorRT
    unpacks in a kernel of their own; those of several the product itself reads.

    >>> from qonnx.targets import target
    >>> [fitting_block_size(128, length, target("ort-cpu")) for length in (256, 100, 64, 40)]
    [128, 128, 64, 64]
    >>> [fitting_block_size(128, length, target("a800")) for length in (256, 128, 64, 16)]
    [128, 64, 32, 16]
    """
    whole = 1 << (length - 1).bit_length()
    return min(size, max(whole // 2, _SMALLEST_GROUP) if is_gpu(target) else whole)


def find_weights(graph: ir.Graph, settings: Mapping[str, Settings], target: Target) -> tuple[Layer, ...]:
    """Every product, convolution and table of the main graph, in graph order.

    Args:
        graph: in the form that `qonnx.passes.prepare` makes.
        settings: of each node, by name.
        target: the consumer of the quantized graph.
    """
    return tuple(_weights(graph, settings, target))


def _weights(graph: ir.Graph, settings: Mapping[str, Settings], target: Target) -> Iterator[Layer]:
    for node in graph:
        if node.domain not in ("", "ai.onnx"):
            continue
        chosen = settings[node.name or ""]
        if node.op_type in LINEAR_OPS:
            linear = linear_of(node)
            if linear is None:
                yield _layer(node, (), node.outputs[0], chosen, chosen.reason or _why_not(node))
                continue
            reader, index = linear.weight_reader
            weight = linear.weight
            operand = Operand(Edge(reader.name or "", index), weight.name or "", linear.output_axis, linear.input_axis)
            reason = chosen.reason or _unfit(linear, chosen.weights, target)
            yield _layer(node, (operand,), linear.output, chosen, reason)
        elif is_table(node):
            table = node.inputs[0]
            assert table is not None
            operand = table_operand(node)
            reason = chosen.reason or _unfit_groups(table, operand, chosen.weights, target)
            yield _layer(node, (operand,), node.outputs[0], chosen, reason)


def _layer(node: ir.Node, operands: tuple[Operand, ...], output: ir.Value, chosen: Settings, reason: str) -> Layer:
    return Layer(node.name or "", node.op_type, module_path(node), operands, output.name or "", reason, chosen)


def _why_not(node: ir.Node) -> str:
    if all(not is_float(value) for value in node.inputs[:2] if value is not None):
        return "does not compute in float"
    if node.op_type == "MatMul" and not any(is_initializer(value) for value in node.inputs[:2]):
        return why_no_weight_among(node) or "multiplies two activations: it has no weight"
    return why_no_weight(node.inputs[1] if len(node.inputs) > 1 else None)


def _unfit(linear: Linear, weights: Weights, target: Target) -> str:
    if is_gpu(target) and linear.node.op_type in CONVOLUTIONS:
        return "a convolution in float reads float weights: smaller ones would be unpacked by a kernel of their own"
    operand = Operand(Edge("", 0), "", linear.output_axis, linear.input_axis)
    return _unfit_groups(linear.weight, operand, weights, target)


def _unfit_groups(weight: ir.Value, operand: Operand, weights: Weights, target: Target) -> str:
    """Why a weight has no groups of the size that the recipe wants."""
    sizes = () if weight.shape is None or not weight.shape.is_static() else tuple(weight.shape.numpy())
    if not sizes or 0 in sizes:
        return "its weight is empty" if sizes else "the shape of its weight is not known"
    if not isinstance(weights.granularity, PerBlock) or operand.block_axis is None:
        return ""
    length = sizes[operand.block_axis]
    size = fitting_block_size(weights.granularity.block_size, length, target)
    if min(length, size) < _SMALLEST_GROUP:
        return f"sums over {length} elements only: a scale for each block would be larger than the block"
    if not target.integer_operators and length % size:
        return f"blocks of {size} leave a short one in an axis of {length}: use a block_size that divides it"
    return ""
