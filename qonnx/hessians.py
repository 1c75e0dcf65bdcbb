"""Moments of what layers read, X^T X and the sum of X, from one pass over the data: what errors of weights cost."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.graph import Names, rank
from qonnx.linear import Linear
from qonnx.runtime import session
from qonnx.watching import watching


class Inputs(NamedTuple):
    """What a layer multiplies by its weight.

    Attributes:
        value: the name of the value.
        axis: that is summed over.
    """

    value: str
    axis: int


def inputs_of(linear: Linear) -> Inputs:
    """What a Gemm or MatMul with a weight of two axes reads, or a convolution of one tap."""
    if linear.node.op_type == "Conv":
        return Inputs(linear.data.name or "", 1)
    last = (rank(linear.data) or 1) - 1
    first = linear.weight_index == 0 or linear.node.attributes.get_int("transA", False)
    return Inputs(linear.data.name or "", max(last - 1, 0) if first else last)


def hessians(
    model: ir.Model, wanted: Sequence[Inputs], batches: Iterable[Mapping[str, npt.NDArray[Any]]]
) -> dict[Inputs, npt.NDArray[np.float32]]:
    """Runs the model and returns sum x x^T over all rows (tokens) of each value, float32 [inputs + 1, inputs + 1].

    The last element of each x is a 1: the last row holds the sum of x, and the corner how many there were. The sums of
    a batch are made in the graph: no activation leaves it.

    Args:
        model: the float model; it is left as it is.
        wanted: values of the main graph.
        batches: one array per model input each.
    """
    summing, outputs = watching(model, {each: (each.value, functools.partial(_sum, axis=each.axis)) for each in wanted})
    runner, found = session(summing), dict[Inputs, npt.NDArray[np.float32]]()
    for batch in batches:
        results = runner.run(batch)
        for each, output in outputs.items():
            if each in found:
                found[each] += results[output]
            else:
                found[each] = np.array(results[output])
    return found


def around_mean(moments: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """What `hessians` returns, of x - mean(x) instead, without the last row and column.

    >>> around_mean(np.array([[10, 4], [4, 2]], np.float32))  # of 1 and 3
    array([[2.]])
    """
    sums, count = moments[:-1, -1].astype(np.float64), float(moments[-1, -1])
    return np.asarray(moments[:-1, :-1] - np.outer(sums, sums) / max(count, 1.0))


def _sum(graph: ir.Graph, names: Names, value: ir.Value, axis: int) -> ir.Value:
    """Appends nodes that make a matrix of a value, the axis in front, ones below, and multiply it by its transpose."""

    def add(op: str, inputs: Sequence[ir.Value], **attributes: int | Sequence[int]) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes, name=names.fresh(f"{value.name}_{op}"))
        node.outputs[0].name = names.fresh(f"{value.name}_{op}_output")
        graph.append(node)
        return node.outputs[0]

    def stored(array: npt.NDArray[Any]) -> ir.Value:
        tensor = ir.tensor(array, name=names.fresh(f"{value.name}_pad"))
        constant = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        graph.register_initializer(constant)
        return constant

    full = add("Cast", [value], to=int(ir.DataType.FLOAT))  # sums of squares overflow float16 at once
    others = [other for other in range(rank(value) or 0) if other != axis]
    rows = add("Flatten", [add("Transpose", [full], perm=[axis, *others])], axis=1)
    rows = add("Pad", [rows, stored(np.array([0, 0, 1, 0])), stored(np.array(1, np.float32))])
    result = add("Gemm", [rows, rows], transB=1)
    result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, None])
    return result
