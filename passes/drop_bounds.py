"""Drops bounds that quantization makes anyway: codes end where the grid ends.

    Min(x, b) -> QuantizeLinear          QuantizeLinear       where b is the largest code or beyond
    Max(x, b) -> QuantizeLinear          QuantizeLinear       where b is the smallest code or below
    Clip(x, a, b) -> QuantizeLinear      Clip(x, a), Clip(x, , b), Relu(x), or nothing, in the same way

A ReLU6 whose largest observed value is below 6 becomes a Relu, which compilers make part of the convolution.

Only when

* every reader is a QuantizeLinear to an integer type with one scale and zero point, and the result is no output;
* the bounds are constants: the codes are the same then, whatever x is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.graph import constant

# How far below the last code a bound may be to be rounded to it: half a code, less what division may round away.
_WITHIN = 0.25


@dataclass(frozen=True)
class DropBounds(ir.passes.InPlacePass):
    """See the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Looks at every node of the main graph, the last one first: behind a bound that goes there may be another."""
        modified = False
        for node in reversed(list(model.graph)):
            if node.domain in ("", "ai.onnx") and node.op_type in ("Clip", "Max", "Min"):
                grids = _grids(node.outputs[0])
                modified |= bool(grids) and _drop(node, grids)
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True)
class _Grid:
    """What a QuantizeLinear keeps apart, in codes."""

    scale: float
    zero_point: float
    smallest: float
    largest: float

    def ends_below(self, bound: npt.NDArray[Any]) -> bool:
        """Whether the grid ends before the bounds, upwards."""
        return bool((np.float64(bound) / self.scale + self.zero_point >= self.largest - _WITHIN).all())

    def ends_above(self, bound: npt.NDArray[Any]) -> bool:
        """Whether the grid ends before the bounds, downwards."""
        return bool((np.float64(bound) / self.scale + self.zero_point <= self.smallest + _WITHIN).all())


def _grids(value: ir.Value) -> list[_Grid]:
    """The grids of all readers; none where another kind of reader sees the value."""
    if value.is_graph_output():
        return []
    grids = []
    for usage in value.uses():
        grid = _grid(usage.node) if usage.idx == 0 else None
        if grid is None:
            return []
        grids.append(grid)
    return grids


def _grid(node: ir.Node) -> _Grid | None:
    if node.op_type != "QuantizeLinear" or node.domain not in ("", "ai.onnx") or len(node.inputs) < 3:
        return None
    scale, zero_point = constant(node.inputs[1]), constant(node.inputs[2])
    if scale is None or zero_point is None or scale.size != 1 or zero_point.size != 1:
        return None
    dtype = node.inputs[2].dtype if node.inputs[2] is not None else None
    if dtype is None or not dtype.is_integer():
        return None
    return _Grid(float(scale.item()), float(zero_point.item()), float(dtype.min), float(dtype.max))


def _drop(node: ir.Node, grids: list[_Grid]) -> bool:
    """Takes away the bounds of a node that no grid can tell apart from none."""
    if node.op_type == "Clip":
        given = [*node.inputs[1:3], None, None][:2]
        arrays = [constant(value) for value in given]
        needed = [
            value is not None and (array is None or not all(ends(grid, array) for grid in grids))
            for value, array, ends in zip(given, arrays, (_Grid.ends_above, _Grid.ends_below), strict=True)
        ]
        if not any(needed):
            _replace(node, node.inputs[0])
            return True
        if needed == [value is not None for value in given]:
            return False
        lower = given[0] if needed[0] else None
        source = node.inputs[0]
        relu = lower is not None and not needed[1] and arrays[0] is not None and not arrays[0].any()
        inputs = [source] if relu else [source, lower, *([given[1]] if needed[1] else [])]
        _exchange(node, "Relu" if relu else "Clip", inputs)
        return True
    if len(node.inputs) != 2:
        return False
    ends = _Grid.ends_below if node.op_type == "Min" else _Grid.ends_above
    for index in (0, 1):
        array, other = constant(node.inputs[index]), node.inputs[1 - index]
        if array is not None and _fits_in(array.shape, other) and all(ends(grid, array) for grid in grids):
            _replace(node, other)
            return True
    return False


def _fits_in(shape: tuple[int, ...], value: ir.Value | None) -> bool:
    """Whether the result of an operation with a constant of this shape has the shape of the value."""
    if value is None or value.shape is None or len(shape) > len(value.shape):
        return False
    return all(size in (1, other) for size, other in zip(shape[::-1], list(value.shape)[::-1], strict=False))


def _exchange(node: ir.Node, op: str, inputs: list[ir.Value | None]) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    new = ir.node(op, inputs, name=node.name, metadata_props={**node.metadata_props, "qonnx.pass": "DropBounds"})
    ir.convenience.replace_nodes_and_values(graph, node, [node], [new], node.outputs, new.outputs)


def _replace(node: ir.Node, value: ir.Value | None) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    assert value is not None
    node.outputs[0].replace_all_uses_with(value)
    graph.remove(node, safe=True)
