"""Finds LayerNormalization and RMSNormalization spelled out in elementary operators, and writes them as one node.

    LayerNormalization    (x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon) * scale + bias    since opset 17
    RMSNormalization       x            / sqrt(mean(x^2)             + epsilon) * scale           since opset 23

Exporters spell this in many ways: either order of every product and sum; the square as Pow or Mul; the quotient as Div,
as Mul with a Reciprocal or a power of -0.5; x - mean(x) computed once or twice; axes as attribute or as input.

Only when

* the declared opset has the operator;
* x is float32, float16 or bfloat16;
* both means run over the same last axes and keep them;
* epsilon is constant and not negative;
* scale (and bias) are constants of the shape of those axes; without such a scale, there is one axis, of known size;
* nothing outside reads the values in between, and none of them is a graph output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.graph import Names, constant, is_float, rank
from qonnx.matching import MismatchError, check_closed, made_by, other, read_by, scalar

LAYER_NORM_OPSET = 17
RMS_NORM_OPSET = 23


@dataclass(frozen=True)
class FuseNorms(ir.passes.InPlacePass):
    """See the module docstring. Scale and bias stay the initializers that they were where their shape allows it."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuses what the model's opset has an operator for."""
        opset = model.opset_imports.get("", 0)
        names = Names(model)
        modified = False
        for root in list(_roots(model)):
            norm = _norm_around(root)
            if norm is not None and opset >= (LAYER_NORM_OPSET if norm.centred else RMS_NORM_OPSET):
                _fuse(norm, names)
                modified = True
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True, eq=False)
class DecomposedNorm:
    """A normalisation that is spelled out.

    Attributes:
        x: what is normalised.
        scale: the constant that multiplies it, or None.
        bias: the constant that is added, or None.
        epsilon: what is added to the variance.
        axes: over how many of the last axes it runs.
        centred: whether the mean is subtracted: LayerNormalization, otherwise RMSNormalization.
        nodes: all of it; the last one makes the result.
    """

    x: ir.Value
    scale: ir.Value | None
    bias: ir.Value | None
    epsilon: float
    axes: int
    centred: bool
    nodes: tuple[ir.Node, ...]


def decomposed_norms(model: ir.Model) -> Iterator[DecomposedNorm]:
    """The normalisations in a model's main graph and subgraphs, whatever its opset."""
    for root in _roots(model):
        norm = _norm_around(root)
        if norm is not None:
            yield norm


def _roots(model: ir.Model) -> Iterator[ir.Node]:
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type in ("Sqrt", "Pow") and node.domain == "":
            yield node


def _norm_around(root: ir.Node) -> DecomposedNorm | None:
    """The normalisation that divides by the square root `root`, or multiplies by its inverse."""
    try:
        return _match(root)
    except MismatchError:
        return None


def _match(root: ir.Node) -> DecomposedNorm:
    add = made_by(root.inputs[0], "Add")
    variance, epsilon = _split_constant(add)
    mean_square = made_by(variance, "ReduceMean")
    axes = _last_axes(mean_square)
    square = made_by(mean_square.inputs[0], "Pow", "Mul")
    centre = square.inputs[0]
    if square.inputs[1] is not centre if square.op_type == "Mul" else scalar(square.inputs[1]) != 2:
        raise MismatchError
    nodes = [square, mean_square, add, root]
    x = centre
    try:
        x, subtraction = _centred(centre, axes)
        nodes += subtraction
    except MismatchError:
        pass
    numerator, division = _quotient(root)
    if numerator is not centre:
        again, subtraction = _centred(numerator, axes)
        if again is not x or x is centre:
            raise MismatchError
        nodes += [node for node in subtraction if node not in nodes]
    nodes += division
    if x is None or not is_float(x) or epsilon < 0:
        raise MismatchError
    scale, bias, affine = _affine(division[-1].outputs[0], x, axes)
    if scale is None and (axes != 1 or _last_sizes(x, 1) == (None,)):
        raise MismatchError
    nodes += affine
    check_closed(nodes)
    return DecomposedNorm(x, scale, bias, epsilon, axes, x is not centre, tuple(nodes))


def _centred(value: ir.Value | None, axes: int) -> tuple[ir.Value | None, list[ir.Node]]:
    """The x of x - mean(x), and the nodes that compute it."""
    subtract = made_by(value, "Sub")
    mean = made_by(subtract.inputs[1], "ReduceMean")
    if mean.inputs[0] is not subtract.inputs[0] or _last_axes(mean) != axes:
        raise MismatchError
    return subtract.inputs[0], [mean, subtract]


def _quotient(root: ir.Node) -> tuple[ir.Value | None, list[ir.Node]]:
    """What is divided by the root, and the nodes that do so."""
    exponent = 0.5 if root.op_type == "Sqrt" else scalar(root.inputs[1])
    denominator = root.outputs[0]
    inverting = []
    if exponent == 0.5:
        divide = read_by(denominator, "Div", "Reciprocal")
        if divide.op_type == "Div" and divide.inputs[1] is not denominator:
            raise MismatchError
        if divide.op_type == "Div" and scalar(divide.inputs[0]) != 1:
            return divide.inputs[0], [divide]
        inverting = [divide]
    elif exponent != -0.5:
        raise MismatchError
    inverse = inverting[-1].outputs[0] if inverting else denominator
    multiply = read_by(inverse, "Mul")
    return other(multiply, inverse), [*inverting, multiply]


def _affine(value: ir.Value, x: ir.Value, axes: int) -> tuple[ir.Value | None, ir.Value | None, list[ir.Node]]:
    """Scale and bias behind the quotient as far as they fit, and the nodes that apply them."""
    scale, bias, nodes = None, None, []
    try:
        multiply = read_by(value, "Mul")
        scale = _fitting(other(multiply, value), x, axes)
        nodes.append(multiply)
        value = multiply.outputs[0]
        add = read_by(value, "Add")
        bias = _fitting(other(add, value), x, axes)
        nodes.append(add)
    except MismatchError:
        pass  # the normalisation ends here
    return scale, bias, nodes


def _fitting(value: ir.Value | None, x: ir.Value, axes: int) -> ir.Value:
    """The value, if it is a constant of the shape of the last axes of x (axes of size 1 may stand before)."""
    tensor = None if value is None or value.is_graph_input() else ir.convenience.get_const_tensor(value)
    if value is None or tensor is None or len(tensor.shape) < axes:
        raise MismatchError
    shape = tuple(tensor.shape.numpy())
    sizes, before = shape[len(shape) - axes :], shape[: len(shape) - axes]
    known = _last_sizes(x, axes)
    wide = len(before) > max((rank(x) or axes) - axes, 0)
    if wide or any(size != 1 for size in before):
        raise MismatchError
    if any(ours != theirs if theirs is not None else ours == 1 for ours, theirs in zip(sizes, known, strict=True)):
        raise MismatchError
    return value


def _last_sizes(x: ir.Value, axes: int) -> tuple[int | None, ...]:
    if x.shape is None or len(x.shape) < axes:
        return (None,) * axes
    return tuple(size if isinstance(size, int) else None for size in list(x.shape)[len(x.shape) - axes :])


def _last_axes(reduce: ir.Node) -> int:
    """How many of the last axes a ReduceMean runs over."""
    if reduce.attributes.get_int("keepdims", 1) != 1:
        raise MismatchError
    axes = reduce.attributes.get_ints("axes", [])
    if len(reduce.inputs) > 1 and (array := _constant(reduce.inputs[1])) is not None:
        axes = [int(axis) for axis in array.reshape(-1)]
    size = rank(reduce.inputs[0])
    if not axes or (size is None and any(axis >= 0 for axis in axes)):
        raise MismatchError
    negative = sorted(axis - (size or 0) if axis >= 0 else axis for axis in axes)
    if negative != list(range(-len(axes), 0)):
        raise MismatchError
    return len(axes)


def _constant(value: ir.Value | None) -> npt.NDArray[Any] | None:
    return None if value is None or value.is_graph_input() else constant(value)


def _split_constant(node: ir.Node) -> tuple[ir.Value | None, float]:
    """The operand of an Add that is computed, and the one that is a constant scalar."""
    for index in (0, 1):
        if (number := scalar(node.inputs[index])) is not None:
            return node.inputs[1 - index], number
    raise MismatchError


def _fuse(norm: DecomposedNorm, names: Names) -> None:
    last = norm.nodes[-1]
    graph = last.graph
    assert isinstance(graph, ir.Graph)
    op_type = "LayerNormalization" if norm.centred else "RMSNormalization"
    stem = last.name or op_type
    inputs = [norm.x, _parameter(norm.scale, norm, graph, names, f"{stem}_scale")]
    if norm.bias is not None:
        inputs.append(_parameter(norm.bias, norm, graph, names, f"{stem}_bias"))
    node = ir.node(
        op_type,
        inputs,
        attributes={"axis": -norm.axes, "epsilon": norm.epsilon},
        name=names.fresh(f"{stem}_{op_type}"),
        metadata_props={**last.metadata_props, "qonnx.pass": "FuseNorms"},
    )
    ir.convenience.replace_nodes_and_values(graph, last, norm.nodes, [node], last.outputs, node.outputs)


def _parameter(value: ir.Value | None, norm: DecomposedNorm, graph: ir.Graph, names: Names, stem: str) -> ir.Value:
    """Scale or bias in the shape of the normalised axes; ones where there is none."""
    if value is not None and rank(value) == norm.axes:
        return value
    name, dtype = names.fresh(stem), norm.x.dtype or ir.DataType.FLOAT
    array = constant(value)
    if array is None:
        array = np.ones([size or 0 for size in _last_sizes(norm.x, norm.axes)], dtype.numpy())
    tensor = ir.Tensor(array.reshape(array.shape[array.ndim - norm.axes :]), dtype=dtype, name=name)
    parameter = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor)
    graph.register_initializer(parameter)
    return parameter
