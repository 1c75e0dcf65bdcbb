"""What the operands of a matrix product or convolution are: dequantized by what, along which axis, how wide."""

from __future__ import annotations

import onnx_ir as ir

from qonnx.linear import CONVOLUTIONS
from qonnx.linter.view import (
    PRODUCTS,
    Quantizer,
    is_op,
    path_to_source,
    permutation,
    quantizer_of,
    sizes_of,
    source_of,
)

# Integer tensor cores work on tiles this wide.
_TILE = 16


def operands_of(node: ir.Node) -> tuple[Quantizer | None, Quantizer | None] | None:
    """What dequantizes the two operands of a product, None for one in float; None altogether for other operators."""
    if not is_op(node, PRODUCTS) or len(node.inputs) < 2:
        return None
    return dequantizer_behind(node.inputs[0]), dequantizer_behind(node.inputs[1])


def dequantizer_behind(value: ir.Value | None) -> Quantizer | None:
    """The DequantizeLinear that a value comes from, seen through operators that only move elements."""
    found = quantizer_of(source_of(value))
    return found if found is not None and not found.quantizes else None


def per_axis_weight(value: ir.Value | None) -> tuple[Quantizer, int, int] | None:
    """A weight with many scales, the axis of `value` that they run along, and its rank."""
    path = list(path_to_source(value))
    found = quantizer_of(path[-1]) if path else None
    transposes = path[:-1]
    rank = len(sizes_of(found.data) or ()) if found is not None else 0
    if found is None or found.quantizes or found.weight is None or found.per_tensor or found.block_size:
        return None
    if not all(is_op(node, frozenset({"Identity", "Transpose"})) for node in transposes):
        return None
    if not -rank <= found.axis < rank:
        return None  # E6
    axis = found.axis % rank
    for node in reversed(transposes):
        axis = permutation(node, rank).index(axis)
    return found, axis, rank


def output_axis(node: ir.Node, index: int, rank: int) -> int | None:
    """The axis of an operand that runs over output channels; None where there is none."""
    match node.op_type:
        case "MatMul":
            return rank - 1 if index == 1 else rank - 2
        case "Gemm":
            if index == 1:
                return 0 if node.attributes.get_int("transB", 0) else 1
            return 1 if node.attributes.get_int("transA", 0) else 0
        case "Conv":
            return 0 if index == 1 else None
    grouped = node.attributes.get_int("group", 1) > 1
    return None if index == 0 or grouped else 1


def is_quantized_convolution(value: ir.Value | None) -> bool:
    """Whether a convolution with two dequantized operands computes the value, for one reader only."""
    node = value.producer() if value is not None else None
    if value is None or node is None or not is_op(node, CONVOLUTIONS) or len(value.uses()) != 1:
        return False
    return None not in (operands_of(node) or (None,))


def thin_matrix(node: ir.Node) -> str:
    """Why a matrix product is too thin for integer tensor cores, or ""."""
    left, right = sizes_of(node.inputs[0]), sizes_of(node.inputs[1])
    if node.op_type == "Gemm":
        left = left[::-1] if left is not None and node.attributes.get_int("transA", 0) == 1 else left
        right = right[::-1] if right is not None and node.attributes.get_int("transB", 0) == 1 else right
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return ""
    summed, columns, rows = left[-1] or right[-2], right[-1], left[-2]
    if summed is not None and summed < _TILE:
        return f"sums over {summed} elements"
    weights = [found is not None and found.weight is not None for found in map(dequantizer_behind, node.inputs[:2])]
    # A row or column takes as long as reading the weight, which is half as many bytes as in half precision.
    if columns is not None and columns < _TILE and not (columns == 1 and weights[0]):
        return f"has {columns} columns"
    return "has one row" if all(size == 1 for size in left[:-1]) and rows == 1 and not weights[1] else ""


def thin_convolution(node: ir.Node) -> str:
    """Why a convolution is too thin for integer tensor cores, or ""."""
    weight = sizes_of(node.inputs[1])
    if weight is None or len(weight) < 3 or weight[0] is None or weight[1] is None:
        return ""
    groups = node.attributes.get_int("group", 1)
    transposed = node.op_type == "ConvTranspose"
    outputs, inputs = (weight[1] * groups, weight[0]) if transposed else (weight[0], weight[1] * groups)
    if groups > 1:
        return f"has groups and {outputs} output channels" if outputs % 8 else ""
    if min(inputs, outputs) >= _TILE:
        return ""
    image = node.inputs[0]
    first = quantizer_of(found.data.producer()) if (found := dequantizer_behind(image)) is not None else None
    wide = max(inputs, outputs) >= _TILE or (first is not None and first.data.is_graph_input())
    return "" if wide and not (inputs % 8 and outputs % 8) else f"has {inputs} input and {outputs} output channels"
