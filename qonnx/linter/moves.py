"""Operators between a quantized constant and its DequantizeLinear go behind it: the repair for E8.

    constant -> Transpose -> DequantizeLinear    becomes    constant -> DequantizeLinear -> Transpose

Moving elements and dequantizing them commute as long as each element keeps its scale: always with one scale, and for
one scale per index of an axis where only Transpose and Identity stand between, which tell where that axis went.
"""

from __future__ import annotations

import onnx_ir as ir

from qonnx.linter.edit import Editor, Outcome
from qonnx.linter.findings import Repair
from qonnx.linter.view import (
    WEIGHT_MOVERS,
    Quantizer,
    is_constant,
    is_op,
    name_of,
    permutation,
    quantizer_of,
    readers,
    sizes_of,
)

_MOVED = (WEIGHT_MOVERS | {"Gather"}) - {"Split"}
_KEEP_AXES = frozenset({"Identity", "Transpose"})


def move_repair(node: ir.Node) -> Repair:
    """Whether `move_behind` can repair what this node does to a quantized constant."""
    return Repair.NONE if _path(node) is None else Repair.EXACT


def move_behind(editor: Editor, node: ir.Node) -> Outcome | None:
    """Moves a node that reads a quantized constant, and what follows it, behind the DequantizeLinear."""
    found = _path(node)
    if found is None:
        return None
    path, last, axis = found
    codes, last_moved = path[0].inputs[0], path[-1].outputs[0]
    assert codes is not None  # _path makes sure
    output = ir.Value(name=editor.names.fresh(f"{codes.name}_dequantized"), type=last.output.type, shape=_shape(codes))
    attributes = {**last.node.attributes}
    if not last.per_tensor:
        attributes["axis"] = ir.AttrInt64("axis", axis)
    dequantize = ir.node(
        last.node.op_type,
        [codes, *last.node.inputs[1:]],
        attributes=attributes,
        domain=last.node.domain,
        name=editor.names.fresh(f"{codes.name}_DequantizeLinear"),
        outputs=[output],
    )
    assert path[0].graph is not None
    path[0].graph.insert_before(path[0], [dequantize])
    path[0].replace_input_with(0, output)
    for moved in path:
        moved.outputs[0].type = output.type
    editor.replace(last.output, last_moved)
    names = ", ".join(name_of(moved) for moved in path)
    return Outcome(f"moved {names} behind the DequantizeLinear of {codes.name!r}", True)


def _path(node: ir.Node) -> tuple[list[ir.Node], Quantizer, int] | None:
    """The nodes from the constant on, the DequantizeLinear that follows them, and its axis before them."""
    codes = node.inputs[0] if node.inputs else None
    if codes is None or not is_constant(codes) or sizes_of(codes) is None:
        return None
    path: list[ir.Node] = []
    current = node
    while is_op(current, _MOVED):
        path.append(current)
        moved = current.outputs[0]
        following = readers(moved)
        if len(following) != 1 or moved.is_graph_output() or following[0].inputs[0] is not moved:
            return None
        current = following[0]
    last = quantizer_of(current)
    if not path or last is None or last.quantizes or last.output.is_graph_output() or len(moved.uses()) != 1:
        return None
    axis = _axis_before(path, last)
    return None if axis is None else (path, last, axis)


def _axis_before(path: list[ir.Node], last: Quantizer) -> int | None:
    """The axis of the stored constant that the scales run along; None where it cannot be told."""
    rank = len(sizes_of(path[0].inputs[0]) or ())
    if last.per_tensor:
        return last.axis
    if last.block_size or not all(is_op(node, _KEEP_AXES) for node in path) or not -rank <= last.axis < rank:
        return None
    axis = last.axis % rank
    for node in reversed(path):
        axis = permutation(node, rank)[axis]
    return axis


def _shape(value: ir.Value) -> ir.Shape | None:
    return None if value.shape is None else ir.Shape(value.shape)
