"""Folds BatchNormalization, and constant per-channel arithmetic, into the weights of the operator before it.

Whatever follows y = W x + b per output channel, as z = s y + t with constant s and t, becomes

    z = (s W) x + (s b + t)

    BatchNormalization    s = scale / sqrt(variance + epsilon)    t = bias - s mean
    Mul, Div by c         s = c, 1 / c                            t = 0
    Add, Sub of c         s = 1 (-1 for c - y)                    t = c, -c (c for c - y)

and several in a row become one pair: (s2, t2) after (s1, t1) is (s2 s1, s2 t1 + t2). Computed in float64, stored in the
type of the weight; weights are evaluated when the file is written.

Only when

* the operator is a Conv, ConvTranspose or Gemm with constant weight and bias; or a MatMul with a constant matrix and a
  result of rank 2 that a BatchNormalization follows (its Add alone is its bias, and stays);
* nothing else reads the values in between, and none of them is a graph output;
* s and t are constant, finite, and vary along the channel axis only;
* the BatchNormalization is in inference mode;
* the new weights do not overflow their type.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.graph import Names, rank

Vector = npt.NDArray[np.float64]

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_DEFAULT_EPSILON = 1e-5


@dataclass(frozen=True)
class FoldBatchNorm(ir.passes.InPlacePass):
    """See the module docstring. Bodies of If, Loop and Scan are treated too; weights that others share are copied."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Folds into every operator that allows it."""
        names = Names(model)
        modified = False
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if node.domain == "" and node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
                modified |= _fold(node, names)
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True, eq=False)
class _Affine:
    """Nodes that scale and shift each channel of what they read, as one scale and one shift of shape [channels]."""

    nodes: tuple[ir.Node, ...]
    scale: Vector
    shift: Vector


def _fold(node: ir.Node, names: Names) -> bool:
    weight = _tensor(node, 1)
    channels = _channels(node, weight)
    affine = _affine_after(node, channels) if channels else None
    bias = _bias(node, channels) if affine is not None and channels else None
    if weight is None or affine is None or bias is None:
        return False
    shift = affine.scale * bias + affine.shift
    factor = _weight_factor(node, weight, affine.scale)
    if not _fits(weight, factor, shift):
        return False
    _set_input(node, 1, _scaled(weight, factor), names)
    _absorb(node, affine, ir.Tensor(shift.astype(weight.dtype.numpy()), dtype=weight.dtype), names)
    return True


def _tensor(node: ir.Node, index: int) -> ir.TensorProtocol | None:
    """The constant that a node reads, unless a caller may override it."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.is_graph_input():
        return None
    return ir.convenience.get_const_tensor(value)


def _channels(node: ir.Node, weight: ir.TensorProtocol | None) -> int | None:
    """The number of output channels, or None where the operator is not of the kind that folds."""
    if weight is None or weight.dtype not in _FLOATS:
        return None
    shape = tuple(weight.shape.numpy())
    match node.op_type:
        case "Conv" if len(shape) >= 3:
            return shape[0]
        case "ConvTranspose" if len(shape) >= 3:
            return shape[1] * node.attributes.get_int("group", 1)
        case "Gemm" if len(shape) == 2:
            return shape[0] if node.attributes.get_int("transB", 0) else shape[1]
        case "MatMul" if len(shape) == 2 and rank(node.outputs[0]) == 2:
            return shape[1]
    return None


def _affine_after(node: ir.Node, channels: int) -> _Affine | None:
    """The longest run of per-channel arithmetic behind a node, or None where there is nothing to fold."""
    weight_rank = rank(node.inputs[1]) or 2
    nodes: list[ir.Node] = []
    scale, shift = np.ones(channels), np.zeros(channels)
    value = node.outputs[0]
    while (reader := _only_reader(value)) is not None and reader.graph is node.graph:
        step = _step(reader, value, channels, weight_rank)
        if step is None or not (np.isfinite(step[0]).all() and np.isfinite(step[1]).all()):
            break
        scale, shift = step[0] * scale, step[0] * shift + step[1]
        nodes.append(reader)
        value = reader.outputs[0]
    if not nodes or (node.op_type == "MatMul" and all(item.op_type != "BatchNormalization" for item in nodes)):
        return None
    return _Affine(tuple(nodes), scale, shift)


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _step(node: ir.Node, value: ir.Value, channels: int, value_rank: int) -> tuple[Vector, Vector] | None:
    """What one node does to the channels of `value`: scale and shift."""
    if node.domain != "":
        return None
    if node.op_type == "BatchNormalization":
        return _batchnorm(node, channels) if node.inputs[0] is value else None
    if node.op_type not in ("Mul", "Div", "Add", "Sub"):
        return None
    first = node.inputs[0] is value
    operand = _per_channel(_tensor(node, 1 if first else 0), channels, value_rank)
    if operand is None:
        return None
    one, zero = np.ones(channels), np.zeros(channels)
    match node.op_type:
        case "Mul":
            return operand, zero
        case "Div" if first and operand.all():
            return 1 / operand, zero
        case "Add":
            return one, operand
        case "Sub":
            return (one, -operand) if first else (-one, operand)
    return None


def _batchnorm(node: ir.Node, channels: int) -> tuple[Vector, Vector] | None:
    training = node.attributes.get_int("training_mode", 0) or any(output.name for output in node.outputs[1:])
    if training or not node.attributes.get_int("spatial", 1):
        return None
    tensors = [_tensor(node, index) for index in range(1, 5)]
    if any(tensor is None or tuple(tensor.shape.numpy()) != (channels,) for tensor in tensors):
        return None
    scale, bias, mean, variance = (tensor.numpy().astype(np.float64) for tensor in tensors if tensor is not None)
    with np.errstate(all="ignore"):  # what is not finite is refused by the caller
        factor = scale / np.sqrt(variance + node.attributes.get_float("epsilon", _DEFAULT_EPSILON))
        return factor, bias - factor * mean


def _per_channel(tensor: ir.TensorProtocol | None, channels: int, value_rank: int) -> Vector | None:
    """A constant operand as [channels], or None where it varies along another axis than the second or adds axes."""
    if tensor is None or len(tensor.shape) > value_rank:
        return None
    shape = tuple(tensor.shape.numpy())
    aligned = (1,) * (value_rank - len(shape)) + shape
    if aligned[1] not in (1, channels) or any(size != 1 for axis, size in enumerate(aligned) if axis != 1):
        return None
    return np.broadcast_to(tensor.numpy().astype(np.float64).reshape(-1), (channels,))


def _bias(node: ir.Node, channels: int) -> Vector | None:
    """What the operator itself adds, or None where that is not a constant per channel."""
    if node.op_type == "MatMul" or len(node.inputs) < 3 or node.inputs[2] is None:
        return np.zeros(channels)
    bias = _per_channel(_tensor(node, 2), channels, 2)
    return bias if bias is None else bias * node.attributes.get_float("beta", 1.0)


def _weight_factor(node: ir.Node, weight: ir.TensorProtocol, scale: Vector) -> Vector:
    """The scale in a shape that broadcasts over the weight as stored."""
    shape = tuple(weight.shape.numpy())
    match node.op_type:
        case "Conv":
            return scale.reshape(-1, *[1] * (len(shape) - 1))
        case (
            "ConvTranspose"
        ):  # [in, out / groups, ...], where each block of in / groups rows makes one group of outputs
            groups = node.attributes.get_int("group", 1)
            rows = np.repeat(scale.reshape(groups, -1), shape[0] // groups, axis=0)
            return rows.reshape(*rows.shape, *[1] * (len(shape) - 2))
        case "Gemm" if node.attributes.get_int("transB", 0):
            return scale.reshape(-1, 1)
    return scale.reshape(1, -1)


def _fits(weight: ir.TensorProtocol, factor: Vector, shift: Vector) -> bool:
    """Whether the products and the bias stay finite; only float16 has so short a range that one must look."""
    if weight.dtype != ir.DataType.FLOAT16:
        return True
    largest = float(np.finfo(np.float16).max)
    return bool((np.abs(weight.numpy() * factor) <= largest).all() and (np.abs(shift) <= largest).all())


def _scaled(weight: ir.TensorProtocol, factor: Vector) -> ir.LazyTensor:
    def evaluate() -> ir.TensorProtocol:
        product = weight.numpy().astype(np.float64) * factor
        return ir.Tensor(product.astype(weight.dtype.numpy()), dtype=weight.dtype)

    return ir.LazyTensor(evaluate, dtype=weight.dtype, shape=ir.Shape(weight.shape.numpy()))


def _absorb(node: ir.Node, affine: _Affine, bias: ir.TensorProtocol, names: Names) -> None:
    """Gives the operator its new bias, and lets its result take the place of the last of the nodes."""
    graph, last = node.graph, affine.nodes[-1].outputs[0]
    assert isinstance(graph, ir.Graph)
    node.metadata_props["qonnx.folded"] = ", ".join(item.name or item.op_type for item in affine.nodes)
    if node.op_type != "MatMul":
        node.attributes.pop("beta", None)
        _set_input(node, 2, bias, names)
        ir.convenience.replace_nodes_and_values(graph, node, affine.nodes, [], [last], [node.outputs[0]])
        return
    weight = node.inputs[1]
    stem = f"{weight.name if weight is not None else node.name}_bias"
    add = ir.node(
        "Add",
        [node.outputs[0], _initializer(graph, names.fresh(stem), bias)],
        name=names.fresh(f"{node.name}_bias"),
        metadata_props=dict(node.metadata_props),
    )
    ir.convenience.replace_nodes_and_values(graph, node, affine.nodes, [add], [last], [add.outputs[0]])


def _set_input(node: ir.Node, index: int, tensor: ir.TensorProtocol, names: Names) -> None:
    """Makes a node read a new initializer, whose name extends that of the old one."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    old = node.inputs[index] if index < len(node.inputs) else None
    stem = f"{old.name}_folded" if old is not None else f"{node.name or node.op_type}_bias"
    value = _initializer(graph, names.fresh(stem), tensor)
    if old is not None:
        value.metadata_props.update(old.metadata_props)
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    tensor.name = name
    kind = ir.TensorType(tensor.dtype)
    value = ir.Value(name=name, type=kind, shape=ir.Shape(tensor.shape.numpy()), const_value=tensor)
    graph.register_initializer(value)
    return value
