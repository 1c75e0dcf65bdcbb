"""Moments of what layers read, their mean and scatter, from one pass over the data: what errors of weights cost."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.graph import Names, rank
from qonnx.linear import Linear
from qonnx.runtime import session
from qonnx.watching import watching

Floats: TypeAlias = npt.NDArray[np.float64]


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


class Moments(NamedTuple):
    """What is left of the rows (tokens) that a layer read.

    Attributes:
        scatter: sum (x - mean) (x - mean)^T, [inputs, inputs].
        mean: [inputs].
        rows: how many.
    """

    scatter: Floats
    mean: Floats
    rows: int

    @property
    def hessian(self) -> Floats:
        """The second moments, sum x x^T, [inputs, inputs]."""
        return np.asarray(self.scatter + self.rows * np.outer(self.mean, self.mean))

    def merge(self, other: Moments) -> Moments:
        """Of all rows together (Chan, Golub and LeVeque, "Updating formulae", 1979, equation 2.1)."""
        count, apart = self.rows + other.rows, other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(apart, apart) * (self.rows * other.rows / count)
        return Moments(scatter, self.mean + apart * (other.rows / count), count)


def hessians(
    model: ir.Model, wanted: Sequence[Inputs], batches: Iterable[Mapping[str, npt.NDArray[Any]]]
) -> dict[Inputs, Moments]:
    """Runs the model and returns the moments of each value, over all rows; none of a value that no batch had a row of.

    The sums of a batch are made in the graph: no activation leaves it.

    Args:
        model: the float model; it is left as it is.
        wanted: values of the main graph.
        batches: one array per model input each.
    """
    # ONNX Runtime computes the last outputs first, and would hold all activations until it comes to the first ones.
    backwards = list(dict.fromkeys(wanted))[::-1]
    make = {each: (each.value, functools.partial(_moments, axis=each.axis)) for each in backwards}
    summing, outputs = watching(model, make)
    runner, found = session(summing), dict[Inputs, Moments]()
    for batch in batches:
        results = runner.run(batch)
        for each, output in outputs.items():
            moments = _unpacked(results.pop(output))
            if moments.rows:
                found[each] = found[each].merge(moments) if each in found else moments
    return found


def _unpacked(array: npt.NDArray[np.float32]) -> Moments:
    """What `_moments` computes."""
    sums, offset = array[:, :-1].astype(np.float64), array[:-1, -1].astype(np.float64)
    count, moved = int(sums[-1, -1]), sums[:-1, -1]
    scatter = sums[:-1, :-1] - np.outer(moved, moved) / max(count, 1)
    return Moments(scatter, offset + moved / max(count, 1), count)


def _moments(graph: ir.Graph, names: Names, value: ir.Value, axis: int) -> ir.Value:
    """Appends nodes that make a matrix X of a value, the axis in front, and return what its moments are made of.

    X - m is multiplied by its transpose, with a row of ones below: float32 would not tell sums of squares from those of
    their means where these are large. m is the mean, but need not be quite. It is returned in a column of its own.
    """

    def add(op: str, inputs: Sequence[ir.Value], **attributes: int | Sequence[int]) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes, name=names.fresh(f"{value.name}_{op}"))
        node.outputs[0].name = names.fresh(f"{value.name}_{op}_output")
        graph.append(node)
        return node.outputs[0]

    def stored(array: npt.NDArray[Any]) -> ir.Value:
        tensor = ir.tensor(array, name=names.fresh(f"{value.name}_constant"))
        constant = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        graph.register_initializer(constant)
        return constant

    full = add("Cast", [value], to=int(ir.DataType.FLOAT))  # sums of squares overflow float16 at once
    others = [other for other in range(rank(value) or 0) if other != axis]
    rows = add("Flatten", [add("Transpose", [full], perm=[axis, *others])], axis=1)
    along, below, one = stored(np.array([1])), stored(np.array([0, 0, 1, 0])), stored(np.array(1, np.float32))
    count = add("Cast", [add("Gather", [add("Shape", [rows]), along])], to=int(ir.DataType.FLOAT))
    mean = add("Div", [add("ReduceSum", [rows, along], keepdims=1), add("Max", [count, one])])
    centred = add("Pad", [add("Sub", [rows, mean]), below, one])
    sums = add("Gemm", [centred, centred], transB=1)
    result = add("Concat", [sums, add("Pad", [mean, below])], axis=1)
    result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, None])
    return result
