"""Steps along the edges of a graph, for passes that look for a group of nodes: each step fits or raises."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

_NUMBERS = frozenset(ir.DataType) - {ir.DataType.STRING, ir.DataType.UNDEFINED}


class MismatchError(Exception):
    """The nodes are not those that the pass looks for. Passes catch it; it never leaves them."""


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node:
    """The node that computes a value, if it is one of these operators."""
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type not in op_types or producer.domain != "":
        raise MismatchError
    return producer


def read_by(value: ir.Value, *op_types: str) -> ir.Node:
    """The only node that reads a value, if it is one of these operators and the value is not a graph output."""
    readers = set() if value.is_graph_output() else {usage.node for usage in value.uses()}
    reader = readers.pop() if len(readers) == 1 else None
    if reader is None or reader.op_type not in op_types or reader.domain != "":
        raise MismatchError
    return reader


def other(node: ir.Node, value: ir.Value | None) -> ir.Value | None:
    """The other operand of an operator with two."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def scalar(value: ir.Value | None) -> float | None:
    """The one element of a constant that no caller may override, or None for everything else."""
    tensor = None if value is None or value.is_graph_input() else ir.convenience.get_const_tensor(value)
    return (
        float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 and tensor.dtype in _NUMBERS else None
    )


def check_closed(nodes: Sequence[ir.Node]) -> None:
    """Raises unless all nodes are in one graph, and only they read what is computed before the last of them."""
    inside = set(nodes)
    if len({node.graph for node in nodes}) != 1:
        raise MismatchError
    for node in nodes[:-1]:
        for value in node.outputs:
            if value.is_graph_output() or any(usage.node not in inside for usage in value.uses()):
                raise MismatchError


def between(start: ir.Value, ends: Iterable[ir.Value]) -> tuple[ir.Node, ...]:
    """The nodes on all paths from a value to others, each once."""
    ahead: dict[ir.Node, None] = {}
    wanted = set(ends)
    pending = [value for value in wanted if value is not start]
    behind: dict[ir.Node, None] = {}
    while pending:
        node = pending.pop().producer()
        if node is not None and node not in behind:
            behind[node] = None
            pending += [value for value in node.inputs if value is not None and value is not start]
    following = [start]
    while following:
        for usage in following.pop().uses():
            if usage.node in behind and usage.node not in ahead:
                ahead[usage.node] = None
                following += usage.node.outputs
    return tuple(ahead)
