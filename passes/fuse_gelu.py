"""Finds Gelu spelled out in elementary operators, and writes it as one node.

    erf     x/2 (1 + erf(x / sqrt(2)))                               Hendrycks and Gimpel, 2016 (arXiv 1606.08415)
    tanh    x/2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))          their approximation

in any order of the factors, with Div in place of Mul, and with the cube as Pow or as two products.

Only when

* the declared opset is 20 or above, which has the operator;
* x is float32, float16 or bfloat16, and the constants are those above within the precision of that type;
* nothing outside reads the values in between, and none of them is a graph output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from qonnx.graph import Names, is_float
from qonnx.matching import MismatchError, check_closed, made_by, other, read_by, scalar

GELU_OPSET = 20

# How far the constants may be off: exporters write five digits, or round them to the type.
_TOLERANCE = {ir.DataType.FLOAT: 2e-5, ir.DataType.FLOAT16: 1e-3, ir.DataType.BFLOAT16: 5e-3}


@dataclass(frozen=True)
class FuseGelu(ir.passes.InPlacePass):
    """See the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuses every Gelu of the main graph and its subgraphs."""
        names = Names(model)
        modified = False
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if node.op_type not in ("Erf", "Tanh") or node.domain != "" or model.opset_imports.get("", 0) < GELU_OPSET:
                continue
            try:
                x, nodes = _gelu_around(node)
            except MismatchError:
                continue
            _fuse(x, nodes, "none" if node.op_type == "Erf" else "tanh", names)
            modified = True
        return ir.passes.PassResult(model, modified)


def _gelu_around(function: ir.Node) -> tuple[ir.Value, list[ir.Node]]:
    """The x of a Gelu and its nodes, the last of which makes the result."""
    x, nodes = (_erf_argument if function.op_type == "Erf" else _tanh_argument)(function.inputs[0])
    if x is None or not is_float(x):
        raise MismatchError
    add = read_by(function.outputs[0], "Add")
    _check(other(add, function.outputs[0]), 1, x)
    nodes += [function, add, *_half_product(add.outputs[0], x)]
    check_closed(nodes)
    return x, nodes


def _erf_argument(value: ir.Value | None) -> tuple[ir.Value | None, list[ir.Node]]:
    """The x of x / sqrt(2)."""
    node = made_by(value, "Mul", "Div")
    return _scaled(node, math.sqrt(0.5)), [node]


def _tanh_argument(value: ir.Value | None) -> tuple[ir.Value | None, list[ir.Node]]:
    """The x of sqrt(2 / pi) (x + 0.044715 x^3)."""
    outer = made_by(value, "Mul")
    add = made_by(_scaled(outer, math.sqrt(2 / math.pi)), "Add")
    for index in (0, 1):
        x, term = add.inputs[index], add.inputs[1 - index]
        try:
            inner = made_by(term, "Mul")
            cube = _cube(_scaled(inner, 0.044715), x)
        except MismatchError:
            continue
        return x, [*cube, inner, add, outer]
    raise MismatchError


def _cube(value: ir.Value | None, x: ir.Value | None) -> list[ir.Node]:
    node = made_by(value, "Pow", "Mul")
    if node.op_type == "Pow":
        if node.inputs[0] is not x or scalar(node.inputs[1]) != 3:
            raise MismatchError
        return [node]
    if x is None or x not in node.inputs:
        raise MismatchError
    square = made_by(other(node, x), "Mul", "Pow")
    twice = square.inputs[1] is x if square.op_type == "Mul" else scalar(square.inputs[1]) == 2
    if square.inputs[0] is not x or not twice:
        raise MismatchError
    return [square, node]


def _half_product(value: ir.Value, x: ir.Value) -> list[ir.Node]:
    """The nodes that multiply `value` by x and by a half, in whatever order."""
    first = read_by(value, "Mul", "Div")
    operand = other(first, value)
    if operand is x:
        second = read_by(first.outputs[0], "Mul", "Div")
        _scaled(second, 0.5, first.outputs[0])
        return [first, second]
    if scalar(operand) is not None:
        _scaled(first, 0.5, value)
        second = read_by(first.outputs[0], "Mul")
        if other(second, first.outputs[0]) is not x:
            raise MismatchError
        return [first, second]
    half = made_by(operand, "Mul", "Div")
    if first.op_type != "Mul" or _scaled(half, 0.5) is not x:
        raise MismatchError
    return [half, first]


def _scaled(node: ir.Node, factor: float, value: ir.Value | None = None) -> ir.Value | None:
    """The operand that a Mul or Div scales by `factor`: `value`, where that is given."""
    for index in (0, 1):
        found = scalar(node.inputs[1 - index])
        if found is None or (node.op_type == "Div" and (index == 1 or found == 0)):
            continue
        operand = node.inputs[index]
        _check(node.inputs[1 - index], 1 / factor if node.op_type == "Div" else factor, operand)
        if value is not None and operand is not value:
            raise MismatchError
        return operand
    raise MismatchError


def _check(value: ir.Value | None, expected: float, like: ir.Value | None) -> None:
    """Whether a constant is the expected one, as far as the type of `like` can tell."""
    found = scalar(value)
    tolerance = _TOLERANCE.get(like.dtype, 0.0) if like is not None and like.dtype is not None else 0.0
    if found is None or not math.isclose(found, expected, rel_tol=tolerance):
        raise MismatchError


def _fuse(x: ir.Value, nodes: list[ir.Node], approximate: str, names: Names) -> None:
    last = nodes[-1]
    graph = last.graph
    assert graph is not None
    node = ir.node(
        "Gelu",
        [x],
        attributes={"approximate": approximate},
        name=names.fresh(f"{last.name}_Gelu"),
        metadata_props={**last.metadata_props, "qonnx.pass": "FuseGelu"},
    )
    ir.convenience.replace_nodes_and_values(graph, last, nodes, [node], last.outputs, node.outputs)
