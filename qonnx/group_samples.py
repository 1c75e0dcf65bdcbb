"""Some rows of what the linear layers of smooth groups read: enough to see what quantization does to their results."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.errors import DataError
from qonnx.graph import Names, rank
from qonnx.group_error import channel_axes
from qonnx.groups import SmoothGroup
from qonnx.runtime import session
from qonnx.watching import watching

Array = npt.NDArray[np.float32]


def collect_inputs(
    model: ir.Model,
    groups: Sequence[SmoothGroup],
    batches: Sequence[Mapping[str, npt.NDArray[Any]]],
    tokens: int = 512,
) -> dict[str, Array]:
    """Runs the model and returns rows of every tensor that the linear layers of usable groups read.

    A row is one token or pixel. They are taken at even distances, in the graph: nothing else leaves it.

    Args:
        model: the float model that the groups were found in; it is left as it is.
        groups: those without a reason against them are looked at.
        batches: one array per model input each.
        tokens: how many rows to return of each tensor, at most; all of them where there are fewer.

    Returns:
        Value name -> [rows, channels].

    Raises:
        DataError: there is no batch, or one does not fit the model.
    """
    axes = channel_axes(groups)
    if not batches:
        raise DataError("no calibration data: smoothing needs at least one batch")
    if not axes:
        return {}
    rows = -(-tokens // len(batches))
    sampled, outputs = watching(
        model, {name: (name, functools.partial(_rows, axis=axis, rows=rows)) for name, axis in axes.items()}
    )
    runner = session(sampled)
    found: dict[str, list[Array]] = {name: [] for name in axes}
    for batch in batches:
        results = runner.run(batch)
        for name, output in outputs.items():
            found[name].append(np.asarray(results[output], np.float32))
    return {name: _thinned(np.concatenate(parts), tokens) for name, parts in found.items()}


def _thinned(rows: Array, count: int) -> Array:
    """At most `count` rows, at even distances."""
    return rows[np.linspace(0, len(rows) - 1, count).astype(np.intp)] if len(rows) > count else rows


def _rows(graph: ir.Graph, names: Names, value: ir.Value, axis: int, rows: int) -> ir.Value:
    """Appends nodes that put the channels last, make a matrix, and take `rows` to twice as many rows of it, evenly."""

    def add(op: str, inputs: Sequence[ir.Value], **attributes: int | list[int]) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes, name=names.fresh(f"{value.name}_{op}"))
        node.outputs[0].name = names.fresh(f"{value.name}_{op}_output")
        graph.append(node)
        return node.outputs[0]

    def integers(*numbers: int) -> ir.Value:
        tensor = ir.tensor(np.array(numbers, np.int64), name=names.fresh(f"{value.name}_constant"))
        shape = ir.Shape([len(numbers)])
        stored = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        graph.register_initializer(stored)
        return stored

    last = (rank(value) or 0) - 1
    order = [other for other in range(last + 1) if other != axis] + [axis]
    matrix = value if axis == last else add("Transpose", [value], perm=order)
    width = add("Slice", [add("Shape", [matrix]), integers(last), integers(last + 1)])
    matrix = add("Reshape", [matrix, add("Concat", [integers(-1), width], axis=0)])
    count = add("Slice", [add("Shape", [matrix]), integers(0), integers(1)])
    step = add("Max", [add("Div", [count, integers(rows)]), integers(1)])
    taken = add("Slice", [matrix, integers(0), count, integers(0), step])
    result = add("Cast", [taken], to=int(ir.DataType.FLOAT))
    result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, None])
    return result
